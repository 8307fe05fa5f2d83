"""The samplers' catalogue."""

from fastcraft.registry import Registry

SAMPLERS = Registry("sampler", {"ddim": "fastcraft.diffusion.samplers.ddim:DDIMSampler"})
