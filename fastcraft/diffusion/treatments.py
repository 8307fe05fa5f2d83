"""What a treatment of a `CheckpointPlan` means for one call: the only file that checkpoints.

Every treatment gives the same gradient to the last bit where the ops are deterministic: autograd's graph is the same,
only the tensors that it saved are made again; `BatchedSteps` of several at a time gives it to rounding. Random numbers
are drawn outside and passed in, so their state is not kept (an explicit generator would not be restored either).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastcraft.diffusion.offload import offload_contexts
from fastcraft.errors import UserError
from fastcraft.memory.plan import KEEP, OFFLOAD, RECOMPUTE, RECOMPUTE_BLOCKS, treatment_ops


def carry_out(treatment: str, call: Callable[..., Any], *args: Any, module: nn.Module) -> Any:
    """``call(*args)``, keeping for backward what ``treatment`` says.

    Args:
        treatment: see `fastcraft.records`; without gradient mode it does not matter.
        call: a pure function; run again in backward unless the treatment is ``keep``.
        args: what is kept of it.
        module: the network inside ``call``, whose blocks ``recompute+block`` recomputes.

    Raises:
        UserError: offloading tensors that are not on a CUDA device.
    """
    if torch.is_grad_enabled() and getattr(module, "graphs_grad", False):  # graphs keep and recompute by themselves
        return module.carry_out(treatment, call, *args)  # type: ignore[operator]
    if treatment == KEEP or not torch.is_grad_enabled():
        return call(*args)
    options: dict[str, Any] = {}
    if treatment.startswith(OFFLOAD):
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.type != "cuda":
            raise UserError(f"{treatment!r} needs CUDA tensors, got {device.type}")
    if treatment == RECOMPUTE_BLOCKS:
        call = functools.partial(_with_blocks, module, call)
    elif treatment != RECOMPUTE:
        matches = functools.partial(is_one_of, treatment_ops(treatment))
        contexts = offload_contexts if treatment.startswith(OFFLOAD) else _sac_contexts
        options["context_fn"] = functools.partial(contexts, matches)
    return recompute(call, *args, **options)


def recompute(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``call(*args)``, run again in backward."""
    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False, **options)


class BatchedSteps:
    """Independent steps, run again by backward several at a time, in one call of the network.

    Under a stop-gradient on the network's input (DRTune, arXiv:2405.00760, Sec. 3) the gradient at every prediction
    follows from that of the final latents by the sampler's arithmetic alone. So a step keeps its input for backward,
    and then the gradient at its prediction, until ``size`` steps have theirs: memory does not grow with the number of
    steps, and the network sees ``size`` times the batch.

    Args:
        size: steps of one call; the steps left over at the beginning of the chain are one more.
        num_steps: how many times `run` will be called; each goes backward once.
    """

    def __init__(self, size: int, *, num_steps: int) -> None:
        self.size, self.left = size, num_steps
        self.waiting: list[tuple[int, Tensor, Tensor]] = []  # (index, inputs, gradient), the last step first

    def run(self, call: Callable[..., Tensor], index: int, inputs: Tensor, *args: Tensor) -> Tensor:
        """``call([index], inputs, *args)``, whose gradient goes to ``args`` alone.

        Args:
            call: (step indices, their inputs one below the other, ``*args``) to outputs one below the other.
            index: of the step.
            inputs: ``(B, ...)``; saved for backward, with ``args``.
            args: the same for all steps.
        """
        return _Batched.apply(self, call, index, inputs, *args)

    def arrived(
        self, call: Callable[..., Tensor], index: int, gradient: Tensor, inputs: Tensor, args: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """The gradients of ``args`` by all steps that waited, once there are enough of them; before, nothing.

        Raises:
            RuntimeError: a second backward pass, which could not know when the last step is there.
        """
        if not self.left:
            raise RuntimeError("batched: steps that go backward in batches go backward once")
        self.waiting.append((index, inputs, gradient))
        self.left -= 1
        if len(self.waiting) < self.size and self.left:
            return [None] * len(args)
        indices, stacked, gradients = zip(*self.waiting, strict=True)
        self.waiting = []
        with torch.enable_grad():
            leaves = [arg.detach().requires_grad_() for arg in args]
            outputs = call(indices, torch.cat(stacked), *leaves)
        return torch.autograd.grad(outputs, leaves, torch.cat(gradients))


class _Batched(torch.autograd.Function):
    """One step of `BatchedSteps`; saves its inputs and ``args``."""

    @staticmethod
    def forward(
        ctx: Any, steps: BatchedSteps, call: Callable[..., Tensor], index: int, inputs: Tensor, *args: Tensor
    ) -> Tensor:
        ctx.steps, ctx.call, ctx.index = steps, call, index
        ctx.save_for_backward(inputs, *args)
        return call([index], inputs, *args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        inputs, *args = ctx.saved_tensors
        return (None, None, None, None, *ctx.steps.arrived(ctx.call, ctx.index, gradient, inputs, args))


def is_one_of(kinds: tuple[str, ...], op: Any) -> bool:
    """Whether a dispatcher op is of one of ``kinds``: one of `OP_KINDS` or a fused op's name."""
    namespace, name, kind = _identity(op)
    return kind in kinds or (namespace == "fastcraft" and ("fastcraft" in kinds or name in kinds))


@functools.cache
def _identity(op: Any) -> tuple[str, str, str]:
    """(namespace, name, kind) of an op; kind is empty for one that belongs to none."""
    namespace, _, name = op._schema.name.partition("::")
    if name.endswith("backward"):
        return namespace, name, ""
    if namespace == "aten":
        # bmm and softmax: attention written out (a CPU in bfloat16); nothing else in these networks uses them
        if "scaled_dot_product" in name or name in ("bmm", "baddbmm", "_softmax"):
            return namespace, name, "attention"
        if "convolution" in name:
            return namespace, name, "conv"
        if name in ("mm", "addmm", "linear", "_addmm_activation"):
            return namespace, name, "linear"
        return namespace, name, "norm" if name in ("native_group_norm", "native_layer_norm") else ""
    words = name.split("_")
    for kind in ("attention", "conv", "linear", "norm"):
        if any(word.startswith(kind) for word in words):
            return namespace, name, kind
    return namespace, name, ""


def _sac_contexts(matches: Callable[[Any], bool]) -> Any:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if matches(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _with_blocks(module: nn.Module, call: Callable[..., Any], *args: Any) -> Any:
    with _checkpointed_blocks(module):
        return call(*args)


@contextlib.contextmanager
def _checkpointed_blocks(module: nn.Module) -> Iterator[None]:
    """diffusers' own switch on every block, for the length of one call: a network is not left changed."""
    blocks = [block for block in module.modules() if hasattr(block, "gradient_checkpointing")]
    if not blocks:
        raise ValueError(f"{RECOMPUTE_BLOCKS!r}: {type(module).__name__} has no blocks that can be checkpointed")
    before = [(block.gradient_checkpointing, block.__dict__.get("_gradient_checkpointing_func")) for block in blocks]
    try:
        for block in blocks:
            block.gradient_checkpointing, block._gradient_checkpointing_func = True, recompute  # type: ignore[assignment]
        yield
    finally:
        for block, (flag, function) in zip(blocks, before, strict=True):
            block.gradient_checkpointing, block._gradient_checkpointing_func = flag, function  # type: ignore[assignment]
