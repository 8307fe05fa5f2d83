"""The samplers' catalogue: functions from (`NoiseSchedule`, num_inference_steps, eta, spacing) to a `Grid`."""

from fastcraft.registry import Registry

SAMPLERS = Registry("sampler", {"ddim": "fastcraft.diffusion.samplers.ddim:ddim"})
