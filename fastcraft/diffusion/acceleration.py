"""A UNet that runs compiled, from CUDA graphs, or both; whoever calls it need not know.

`AcceleratedUNet` stands where the denoising loop calls a UNet prepared by `use_text_kv`, patched or not. Two kinds of
calls are told apart: without gradient (the prefix, and sampling) the compiler may freeze the weights into the code.
Where steps with gradient are compiled or replayed, autograd adds up what they send to the text, in the UNet's dtype.

Inductor's layout optimisation is off on a CPU: with it the gradient of a compiled whole UNet has been seen wrong there
(torch 2.13), while its output was right. `fastcraft.families.parity` looks for such errors at the start of
every run.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcraft.diffusion.conditioning import Conditioning
from fastcraft.diffusion.cuda_graphs import MAX_SHAPES, CudaRecorder, GraphedCall, Recorder
from fastcraft.diffusion.treatments import recompute
from fastcraft.errors import UserError
from fastcraft.memory.plan import KEEP, RECOMPUTE, RECOMPUTE_BLOCKS, CheckpointPlan

COMPILED_TREATMENTS = {"blocks": (KEEP, RECOMPUTE, RECOMPUTE_BLOCKS), "whole": (KEEP, RECOMPUTE)}
"""What a step with gradient can be asked to keep, where its inside is compiled."""
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""diffusers' classes that a UNet repeats."""
_MAX_VERSIONS = 1024  # every block of every width, with and without gradient
_MAX_NOTES = 4


def refuse_acceleration(
    *, compile: str, cuda_graphs: str, device_type: str, plan: CheckpointPlan | None = None, policy: str = ""
) -> None:
    """Raise `UserError` if the switches cannot be had: see `fastcraft.recipe.KernelsConfig`.

    Args:
        compile: ``"none"``, ``"prefix"``, ``"blocks"`` or ``"whole"``.
        cuda_graphs: ``"none"``, ``"prefix"`` or ``"all"``.
        device_type: ``"cpu"`` or ``"cuda"``.
        plan: of the steps with gradient, once it is known.
        policy: the recipe's name for it.
    """
    if cuda_graphs != "none" and device_type != "cuda":
        raise UserError(f"cuda_graphs: {cuda_graphs!r} needs a CUDA device, got {device_type}")
    if cuda_graphs != "none" and policy == "auto":
        raise UserError(
            f"cuda_graphs: {cuda_graphs!r} needs a checkpoint policy other than 'auto', whose estimate does not "
            "know what graphs hold"
        )
    if plan is None:
        return
    treatments = sorted({*plan.steps, RECOMPUTE} if plan.segments else set(plan.steps))
    if cuda_graphs == "all" and (plan.segments or plan.batched or not set(treatments) <= {KEEP, RECOMPUTE}):
        raise UserError(
            "cuda_graphs: 'all' replays single steps, kept or recomputed as a whole (policies none, step, "
            f"last_k_live:k), got {policy or treatments!r}"
        )
    if compile not in COMPILED_TREATMENTS:
        return
    why = "is compiled for training's micro-batch, and several steps at once are more" if plan.batched else ""
    if not set(treatments) <= set(COMPILED_TREATMENTS[compile]):
        why = "hides what is inside, so that no part of it can be kept"
    if why:
        known = "none, step, step+block," if compile == "blocks" else "none, step,"
        raise UserError(
            f"compile: {compile!r} {why}; the policy must be {known} segment:k or last_k_live:k, got "
            f"{policy or treatments!r}"
        )


class AcceleratedUNet:
    """A prepared UNet behind its own call; every other attribute is the UNet's.

    Args:
        unet: frozen, in eval mode, prepared by `use_text_kv`; its repeated blocks are compiled in place.
        compile: see `fastcraft.recipe.KernelsConfig`.
        cuda_graphs: likewise.
        recorder: who records the graphs; None = CUDA.
        backend: of ``torch.compile``.

    Compiled code serves the shapes it was made for inside `learning`; other calls run eager. Graphs are recorded for up
    to `MAX_SHAPES` kinds of calls; more are not recorded. Both are said in `take_notes`.
    """

    def __init__(
        self, unet: Any, *, compile: str = "none", cuda_graphs: str = "none", recorder: Recorder | None = None,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:  # fmt: skip
        if any(parameter.requires_grad for parameter in unet.parameters()):
            raise ValueError(
                "AcceleratedUNet: the UNet must be frozen: compiled code and graphs would lose its gradient"
            )
        self.unet = unet
        self.compiles = compile
        self.graphs_grad = cuda_graphs == "all"
        self._graphs = None if cuda_graphs == "none" else GraphedCall(recorder or CudaRecorder(unet.device))
        self._network: Any = unet
        self._layout: Conditioning | None = None  # of the text, without contents
        self._learned: set[Any] = set()
        self._learning = False
        self._keep = True
        self._notes: dict[str, bool] = {}  # text -> whether it has been taken
        if compile == "none":
            return
        _allow_versions()
        options: dict[str, Any] = {"dynamic": False, "fullgraph": True, "backend": backend}
        if backend == "inductor":
            options["options"] = {"layout_optimization": unet.device.type != "cpu"}
        if compile == "blocks":
            for block in _blocks(unet):
                block.compile(**options)
        else:
            self._network = torch.compile(unet, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)

    def __call__(
        self, sample: Tensor, timestep: Tensor, *, encoder_hidden_states: None = None,
        cross_attention_kwargs: dict[str, Conditioning], return_dict: bool = False,
    ) -> tuple[Tensor]:  # fmt: skip
        """As the UNet's own, with text keys and values alone and a tuple as the answer."""
        (conditioning,) = cross_attention_kwargs.values()
        if self._layout is None:
            self._layout = conditioning.unflatten([tensor.detach().to("meta") for tensor in conditioning.flat()])
        inputs = (sample, timestep, *conditioning.flat())
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
            return (self._without_grad(inputs),)
        if not self.graphs_grad and self.compiles in ("none", "prefix"):
            return (_run(self.unet, sample, timestep, conditioning),)
        if self.graphs_grad:
            assert self._graphs is not None
            if self._graphed(inputs):
                return (self._graphs(self._compiled, inputs, keep=self._keep),)
            if not self._keep:
                return (recompute(self._compiled, *inputs),)
        return (self._compiled(*inputs),)

    def carry_out(self, treatment: str, call: Callable[..., Any], *args: Any) -> Any:
        """``call(*args)`` with the graphs keeping what ``treatment`` says.

        Raises:
            UserError: a treatment that graphs do not know.
        """
        refuse_acceleration(
            compile="none", cuda_graphs="all", device_type="cuda", plan=CheckpointPlan(steps=(treatment,))
        )
        before, self._keep = self._keep, treatment == KEEP
        try:
            return call(*args)
        finally:
            self._keep = before

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Compile for whatever is called inside; minutes for a large network."""
        self._learning = True
        try:
            with warnings.catch_warnings():
                for harmless in ("(?s).*functools.lru_cache", "The .grad attribute of a Tensor that is not a leaf"):
                    warnings.filterwarnings("ignore", message=harmless)  # the tracer's, of diffusers and of itself
                yield
        finally:
            self._learning = False

    def take_notes(self) -> list[str]:
        """What has run slower than asked for since the last time; each is said once."""
        new = [text for text, taken in self._notes.items() if not taken]
        self._notes.update(dict.fromkeys(new, True))
        return new

    def _without_grad(self, inputs: Sequence[Tensor]) -> Tensor:
        if self._graphs is not None and self._graphed(inputs):
            with torch.no_grad():
                return self._graphs(self._compiled, inputs, keep=True)
        if self.compiles == "none":
            with torch.no_grad():
                return self._compiled(*inputs)
        with torch.inference_mode(False), torch.no_grad():  # one kind of tensors, so that one version serves all calls
            return self._compiled(*(tensor.clone() if tensor.is_inference() else tensor.detach() for tensor in inputs))

    def _compiled(self, sample: Tensor, timestep: Tensor, *flat: Tensor) -> Tensor:
        """The UNet's output by the code that has been compiled for these shapes, or else eager. ``flat``: the text."""
        assert self._layout is not None
        conditioning = self._layout.unflatten(flat)
        grad = torch.is_grad_enabled()
        if self.compiles == "none" or (grad and self.compiles == "prefix"):
            return _run(self.unet, sample, timestep, conditioning)
        key = (grad, *((tuple(t.shape), t.requires_grad) for t in (sample, *flat)))
        if self._learning:
            self._learned.add(key)
        elif key not in self._learned:
            self._note(
                f"compile: runs eager on latents of {_shape(sample)} and {flat[0].shape[1]} "
                "text tokens, for which nothing was compiled"
            )
            with torch.compiler.set_stance("force_eager"):
                return _run(self.unet, sample, timestep, conditioning)
        freezes = self._learning and not grad and self.compiles != "blocks"
        with _frozen() if freezes else contextlib.nullcontext():
            return _run(self._network, sample, timestep, conditioning)

    def _graphed(self, inputs: Sequence[Tensor]) -> bool:
        assert self._graphs is not None
        if self._graphs.takes(inputs):
            return True
        self._note(f"cuda_graphs: {MAX_SHAPES} kinds of calls are recorded; {_shape(inputs[0])} runs without")
        return False

    def _note(self, text: str) -> None:
        if len(self._notes) < _MAX_NOTES:
            self._notes.setdefault(text, False)


def _blocks(unet: nn.Module) -> list[nn.Module]:
    return [module for module in unet.modules() if type(module).__name__ in BLOCKS]


def _allow_versions() -> None:
    """For the whole process: the compiler keeps versions by class, and a UNet has many blocks of one."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _MAX_VERSIONS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, _MAX_VERSIONS)


def _run(network: Any, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    output: Tensor = network(
        sample,
        timestep,
        encoder_hidden_states=None,
        cross_attention_kwargs={"conditioning": conditioning},
        return_dict=False,
    )[0]
    return output


def _frozen() -> Any:
    """Inductor may fold the weights into the code, and lay them out anew; they must not change from then on."""
    from torch._inductor import config

    return config.patch(freezing=True)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
