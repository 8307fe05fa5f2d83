"""Every phase of a step, run once by the project's own code on tensors without contents.

For a card, networks lie on the meta device and attention resolves to the fused op that the card would run; for a CPU
they are fake CPU tensors, so that the CPU's own branches are taken. `fastcraft.forecast.estimate` adds the phases up.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from fastcraft.diffusion.conditioning import Conditioning
from fastcraft.diffusion.decode import decode
from fastcraft.diffusion.samplers.ddim import ddim
from fastcraft.diffusion.schedule import NoiseSchedule
from fastcraft.diffusion.unroll import denoise
from fastcraft.families.unet import UNetNetwork
from fastcraft.forecast.cost import Cost, Line, TrainedBytes, measure, measure_step, offloaded, static_bytes
from fastcraft.forecast.estimate import StepEstimate
from fastcraft.forecast.networks import Networks
from fastcraft.forecast.tracker import Work, bytes_of
from fastcraft.memory.plan import KEEP, OFFLOAD, RECOMPUTE, RECOMPUTE_BLOCKS, SAC, CheckpointPlan, treatment_ops
from fastcraft.records import PromptEmbeds, TextEmbeds, Trajectory
from fastcraft.rewards.mix import WeightedRewards

TREATMENTS = (
    KEEP, "sac:attention+conv+linear", "sac:attention+conv", "sac:conv", "sac:attention", RECOMPUTE, RECOMPUTE_BLOCKS,
)  # fmt: skip
"""What a step with gradient is weighed under: no other choice of ops avoids more recompute per byte (measured)."""
OFFLOADS = (OFFLOAD + "attention+conv", OFFLOAD + "attention")
"""What it is weighed under besides where there is a host's memory to move to."""
DECODES = (KEEP, RECOMPUTE, RECOMPUTE_BLOCKS)
"""The same for the decode."""
_MAX_BUCKET = 50_000_000  # as fastcraft.engine.ds_config fills it in


def estimate_step(
    networks: Networks, *, guided: bool, on_cpu: bool = False, uncond_trained: bool = True, world_size: int = 1,
    treatments: Sequence[str] = TREATMENTS,
) -> StepEstimate:  # fmt: skip
    """Count every phase once. Nothing is computed, and the networks given are left as they are.

    Args:
        networks: with weights of any kind.
        guided: whether every step calls the UNet on two rows per sample.
        on_cpu: predict this machine's CPU instead of a card.
        uncond_trained: whether the trained encoder encodes the empty prompt too.
        world_size: ranks of ZeRO-2.
        treatments: of a step with gradient, to be weighed.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) if on_cpu else _card_attention():
        return _Forecast(networks, guided=guided, device="cpu" if on_cpu else "meta").estimate(
            uncond_trained=uncond_trained, world_size=world_size, treatments=treatments
        )


class _Forecast:
    """The closures that `measure` runs, over hollow copies of the networks on ``device``."""

    def __init__(self, networks: Networks, *, guided: bool, device: str) -> None:
        self.networks, self.guided, self.device = networks, guided, device
        self.unet, self.vae, self.rewards = (
            hollow(module, device) for module in (networks.unet, networks.vae, networks.rewards)
        )
        self.network = UNetNetwork(module=self.unet)
        if isinstance(self.rewards, WeightedRewards):
            keep_differentiable(self.rewards)
        schedule = NoiseSchedule(alphas_cumprod=(0.9, 0.8, 0.7), final_alpha_cumprod=1.0)
        self.sampler = ddim(schedule, num_inference_steps=2)
        self.weights = [t for module in (self.unet, self.vae, self.rewards) for t in _tensors(module)]

    def estimate(self, *, uncond_trained: bool, world_size: int, treatments: Sequence[str]) -> StepEstimate:
        networks = self.networks
        text, kv = self._text(uncond_trained), measure(self._keys, weights=self.weights)
        flat = tuple(t.detach().requires_grad_() for t in self._keys(1))
        keys = self._conditioning(flat)
        weights = [*self.weights, *flat, *self._gradients_of_weights()]
        latents = torch.empty((1, *networks.latent_shape), device=self.device)

        def step(treatment: str | None, latents: Tensor) -> Tensor:
            grads = () if treatment is None else (0,)
            for t in flat:
                t.grad = None
            return denoise(
                self.network, latents, keys, sampler=self.sampler,
                guidance_scale=2.0 if self.guided else 1.0, trajectory=Trajectory(num_steps=1, grad_steps=grads),
                plan=CheckpointPlan(steps=() if treatment is None else (treatment,)),
            )  # fmt: skip

        static, update, weight_gradients = self._static(world_size)
        return StepEstimate(
            model=networks.name,
            dtype=str(networks.dtype).removeprefix("torch."),
            resolution=networks.latent_shape[-1] * networks.pixels_per_latent,
            guided=self.guided,
            static=static,
            update_bytes=update,
            text=_join(text, kv),
            kv_bytes=Line(each=sum(t.nbytes for t in flat)),
            weight_gradient_bytes=weight_gradients,
            prefix=measure_step(lambda x: step(None, x), latents, weights=weights, backward=False),
            steps=self._steps(lambda name: measure_step(lambda x: step(name, x), latents, weights=weights), treatments),
            heads={
                name: measure(lambda n, name=name: self._head(n, name), weights=self.weights)  # type: ignore[misc]
                for name in DECODES
            },
        )

    def _steps(self, cost_of: Callable[[str], Cost], treatments: Sequence[str]) -> dict[str, Cost]:
        """A step under each treatment; offloading is put together from what it would keep on the device."""
        offloads = [name for name in treatments if name.startswith(OFFLOAD)]
        kept = {name: SAC + name.removeprefix(OFFLOAD) for name in offloads}
        counted = {*treatments, *kept.values(), *([RECOMPUTE, KEEP] if offloads else [])} - {*offloads}
        costs = {name: _selected(name, cost_of(name)) for name in sorted(counted)}
        return {
            name: offloaded(costs[kept[name]], again=costs[RECOMPUTE], keep=costs[KEEP])
            if name in kept
            else costs[name]
            for name in treatments
        }

    def _gradients_of_weights(self) -> list[Tensor]:
        """Where all steps add what they send to a trained UNet's weights: there from the first backward to the last."""
        trained = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        return [parameter.grad for parameter in trained if parameter.grad is not None]

    def _conditioning(self, flat: Sequence[Tensor]) -> Conditioning:
        names = [name.removesuffix(".processor") for name in self.unet.attn_processors]
        layers = [name for name in names if self.unet.get_submodule(name).is_cross_attention]
        return Conditioning(layers=dict(zip(layers, zip(flat[::2], flat[1::2], strict=True), strict=True)))

    def _keys(self, samples: int) -> tuple[Tensor, ...]:
        """Keys and values of the trained encoder, with gradient."""
        width, dtype = self.unet.config.cross_attention_dim, self.networks.dtype
        shape = (samples, self.networks.text_length, width)
        cond = torch.empty(shape, device=self.device, dtype=dtype, requires_grad=True)
        uncond = torch.empty((1, *shape[1:]), device=self.device, dtype=dtype, requires_grad=True)
        prompts = PromptEmbeds(
            cond=TextEmbeds(sequence=cond), uncond=TextEmbeds(sequence=uncond) if self.guided else None
        )
        return tuple(self.network.condition(prompts).flat())

    def _head(self, samples: int, treatment: str) -> tuple[Tensor, ...]:
        latents = torch.empty((samples, *self.networks.latent_shape), device=self.device, requires_grad=True)
        images = decode(self.vae, latents, CheckpointPlan(steps=(), decode=treatment))
        return (self.rewards(images, ["a prompt"] * samples).total,)

    def _text(self, uncond_trained: bool) -> Cost:
        """The trained encoders under autocast, on fake CPU tensors: their bytes do not depend on the device."""
        dtype, length = self.networks.dtype, self.networks.text_length
        more = int(self.guided and uncond_trained)
        with contextlib.nullcontext() if self.device == "cpu" else FakeTensorMode():
            encoders = [hollow(encoder, "cpu") for encoder in self.networks.text_encoders]

            def encode(samples: int) -> tuple[Tensor, ...]:
                ids = torch.zeros((samples + more, 1, length), dtype=torch.long)
                for encoder in encoders:
                    encoder.zero_grad(set_to_none=True)
                with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                    return tuple(encoder(ids) for encoder in encoders)

            return measure(encode, weights=[t for encoder in encoders for t in _tensors(encoder)])

    def _static(self, world_size: int) -> tuple[dict[str, int], int, int]:
        """What is there all the time, what besides while the optimiser runs, and gradients of a trained UNet."""
        networks, size = self.networks, self.networks.dtype.itemsize
        texts = [p for encoder in networks.text_encoders for p in encoder.parameters()]
        parts = {"text": [p for p in texts if p.requires_grad],
                 "unet": [p for p in networks.unet.parameters() if p.requires_grad]}  # fmt: skip
        trained = {name: self._trained(name, parameters) for name, parameters in parts.items() if parameters}
        frozen_unet = bytes_of(self.unet) - sum(p.nbytes for p in parts["unet"])
        static, update = static_bytes(
            frozen={
                "UNet": frozen_unet,
                "VAE": bytes_of(self.vae),
                "rewards": bytes_of(self.rewards),
                "original text encoder": networks.text_copies * size * sum(p.numel() for p in texts),
                "untrained text weights": sum(p.nbytes for p in texts if not p.requires_grad),
            },
            trained=trained,
            world_size=world_size,
            max_bucket=_MAX_BUCKET,
        )
        return static, update, sum(p.nbytes for p in parts["unet"])

    def _trained(self, name: str, parameters: Sequence[Tensor]) -> TrainedBytes:
        return TrainedBytes(
            num_parameters=sum(p.numel() for p in parameters), itemsize=parameters[0].itemsize,
            num_averaged=self.networks.num_averaged.get(name, 0),
        )  # fmt: skip


def _selected(treatment: str, cost: Cost) -> Cost:
    """With the calls that a selective treatment looks at: those of the forward, and as many when it is run again."""
    if not treatment_ops(treatment):
        return cost
    calls = cost.forward.num_calls
    return replace(
        cost, forward=replace(cost.forward, num_selected=calls), backward=replace(cost.backward, num_selected=calls)
    )


def _join(text: Cost, kv: Cost) -> Cost:
    """Encoding and projecting, one after the other."""
    held = Line(fixed=text.held.fixed + kv.held.fixed, each=text.held.each + kv.held.each)
    return Cost(
        held=held, forward_peak=held, backward_extra=text.backward_extra,
        forward=_both(text.forward, kv.forward), backward=_both(text.backward, kv.backward),
    )  # fmt: skip


def _both(first: Work, second: Work) -> Work:
    ops = Counter(first.ops)
    ops.update(second.ops)
    return replace(first, ops=dict(ops))  # the projections run no attention


def keep_differentiable(rewards: WeightedRewards) -> None:
    """Take out, in place, rewards without gradient (they may leave torch, and keep nothing) and running statistics."""
    kept = [i for i, reward in enumerate(rewards.rewards) if reward.differentiable]
    rewards.names = [rewards.names[i] for i in kept]
    rewards.weights = [rewards.weights[i] for i in kept]
    rewards.rewards = nn.ModuleList(rewards.rewards[i] for i in kept)
    rewards.statistics = None


def hollow(module: nn.Module, device: str) -> Any:
    """A copy of ``module`` whose parameters and buffers have shape and dtype but, on meta or under fakes, no memory."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(module):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    with _disable_current_modes():  # what else a module holds, such as running statistics, is small and copied whole
        return copy.deepcopy(module, memo)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@contextlib.contextmanager
def _card_attention() -> Iterator[None]:
    """On the meta device, attention is the fused op that CUDA would choose: flash, or else memory-efficient."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
        causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if query.dtype != torch.float32 and query.shape[-1] <= 256 and mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, scale=scale)[
                0
            ]
        keeps = any(tensor.requires_grad for tensor in (query, key, value))
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, keeps, dropout, causal, scale=scale
        )[0]

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", attend, "AutogradMeta")
        yield
