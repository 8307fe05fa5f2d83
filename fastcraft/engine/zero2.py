"""The training engine: DeepSpeed ZeRO around the trained module, and nothing else. Only this file imports deepspeed.

Parameters are float32 with autocast inside the forward. DeepSpeed's bf16 section would build the master weights from
rounded ones, its timers see only this module, and its checkpoints are replaced by `fastcraft.engine.checkpoint`.
"""

import copy
import logging
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from fastcraft.engine.agreement import agree, barrier, close_distributed, rank, world_size
from fastcraft.engine.ds_config import fill_ds_config, load_ds_config
from fastcraft.engine.out_of_memory import MemoryRanOutError, is_out_of_memory
from fastcraft.engine.schedule import lr_at
from fastcraft.errors import UserError
from fastcraft.weights.keymap import parameter_group

__all__ = [
    "StepResult", "Zero2Engine", "barrier", "close_distributed", "fill_ds_config", "init_distributed", "load_ds_config",
    "lr_at", "parameter_group", "rank", "world_size",
]  # fmt: skip

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one call of `Zero2Engine.step` did.

    ``took_step``: the weights were updated. ``skipped``: an update was due and dropped, the gradient not being finite.
    Both are False while gradients accumulate. ``grad_norm``: global norm before clipping when the weights were
    updated. ``lr``: the learning rate of this update, or of the one that is due next.
    """

    took_step: bool
    skipped: bool
    grad_norm: float | None
    lr: float


def init_distributed(device_type: str) -> bool:
    """Join the other ranks: gloo on ``"cpu"``, nccl on ``"cuda"``; called before anything else touches DeepSpeed.

    Ranks come from the environment that the ``deepspeed`` launcher or torchrun sets; without one this process is
    alone and opens no port. A process group that exists is used as it is.

    Returns:
        Whether a process group was opened here, and so is to be closed here.

    Raises:
        UserError: DS_ACCELERATOR asks for another device.
    """
    accelerator = os.environ.setdefault("DS_ACCELERATOR", device_type)
    if accelerator != device_type:
        raise UserError(f"DS_ACCELERATOR must be {device_type!r} or unset, got {accelerator!r}")
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed asks for it
    import deepspeed
    import deepspeed.ops

    if device_type == "cpu":  # the op would be compiled for minutes, or fail without a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(local_rank)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)  # DeepSpeed's call
    backend, opens = ("gloo" if device_type == "cpu" else "nccl"), not distributed.is_initialized()
    if not distributed.is_initialized() and "RANK" not in os.environ:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING if rank() == 0 else logging.ERROR)
    return opens


class Zero2Engine:
    """Trains the parameters of one module that require a gradient.

    One micro-step is ``engine(...)`` once, any frozen chain on its output, ``backward(loss)`` once and ``step()``
    once; every ``gradient_accumulation_steps``-th ``step()`` updates the weights with the mean gradient over
    micro-steps and ranks.

    Args:
        module: its trained parameters are float32. Rank 0's weights are sent to every rank.
        ds_config: from `fill_ds_config`.
        device: where the module goes; that of `init_distributed`.
        total_steps: updates of the whole run, for the cosine.
        warmup_steps: updates of the warm-up.
        lr_schedule: ``"constant"`` or ``"cosine"``.

    Raises:
        UserError: nothing to train, or DeepSpeed refuses the config.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        ds_config: Mapping[str, Any],
        device: torch.device,
        total_steps: int,
        warmup_steps: int,
        lr_schedule: str,
    ) -> None:
        import deepspeed
        import pydantic

        config = copy.deepcopy(dict(ds_config))
        params = config.pop("optimizer")["params"]
        self._schedule = {"peak": params["lr"], "warmup_steps": warmup_steps,
                          "total_steps": total_steps, "schedule": lr_schedule}  # fmt: skip
        self._parameters = {name: param for name, param in module.named_parameters() if param.requires_grad}
        if not self._parameters:
            raise UserError("nothing to train: no parameter of the text encoder requires a gradient")
        for name, param in self._parameters.items():
            if param.dtype != torch.float32:
                raise ValueError(f"trained parameters must be float32, got {param.dtype} for {name}")
        module.to(device)
        offloaded = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") == "cpu"
        optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=params["lr"], betas=tuple(params["betas"]), eps=params["eps"],
            weight_decay=params["weight_decay"], fused=device.type == "cuda" or offloaded,
        )  # fmt: skip
        try:
            self._engine, self._zero, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UserError(f"--ds_config: {where}: {problem['msg']}, got {problem['input']!r}") from error
        except (ValueError, AssertionError) as error:
            raise UserError(f"--ds_config: DeepSpeed refuses it: {str(error).splitlines()[0]}") from error
        self.module = module
        self._updates = 0
        self._awaits_step = self._watched = self.gradient_arrived = False
        self._make_moments()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward under autocast; once per micro-step when gradients are on."""
        output = self._engine(*args, **kwargs)
        self.gradient_arrived = False
        self._watched = isinstance(output, Tensor) and output.requires_grad
        if self._watched:
            output.register_hook(self._note_arrival)
        return output

    forward = __call__

    def _note_arrival(self, gradient: Tensor) -> None:
        """The last moment at which all ranks can leave backward together."""
        if any(agree([False])):
            raise MemoryRanOutError("on another rank")
        self.gradient_arrived = True

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a scalar loss.

        When the gradient comes to the module, ranks agree that all have got so far; one whose memory ran out before
        makes all leave, with nothing added up or exchanged: the micro-step may be done again. After that buckets are
        being reduced, and a rank that left would keep the others waiting.

        Raises:
            MemoryRanOutError: on every rank, if memory ran out on one before the gradient arrived.
            RuntimeError: memory ran out later; or a second call before `step`: DeepSpeed would drop the first gradient.
        """
        if self._awaits_step:
            raise RuntimeError("backward was called twice in one micro-step; call step() after each backward")
        try:
            self._engine.backward(loss)
        except RuntimeError as error:
            if self.gradient_arrived or not self._watched or not is_out_of_memory(error):
                raise
            agree([True])
            raise MemoryRanOutError(str(error).splitlines()[0]) from error
        self._awaits_step = True

    def step(self) -> StepResult:
        """End the micro-step; update the weights if it was the last one of an accumulation."""
        if not self._awaits_step:
            raise RuntimeError("step needs a backward before it")
        self._awaits_step = False
        lr = self.lr
        due = self._engine.is_gradient_accumulation_boundary()
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if not due:
            return StepResult(took_step=False, skipped=False, grad_norm=None, lr=lr)
        if not self._engine.was_step_applied():
            return StepResult(took_step=False, skipped=True, grad_norm=None, lr=lr)
        self._updates += 1
        return StepResult(took_step=True, skipped=False, grad_norm=float(self._engine.get_global_grad_norm()), lr=lr)

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return lr_at(self._updates, **self._schedule)

    @property
    def num_updates(self) -> int:
        """Updates applied so far; skipped ones do not count."""
        return self._updates

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> trained parameter, whole on every rank."""
        return dict(self._parameters)

    def gradients(self) -> dict[str, Tensor]:
        """Name -> gradient of the update that is due, float32, before clipping, the mean over ranks and micro-steps.

        Collective. Only between the last ``backward`` of an accumulation and its ``step``, else RuntimeError.
        """
        from deepspeed.utils import safe_get_full_grad

        if not self._awaits_step or not self._engine.is_gradient_accumulation_boundary():
            raise RuntimeError("gradients are whole only between the last backward of an update and its step")
        return {name: safe_get_full_grad(param) for name, param in self._parameters.items()}

    def group_gradient_norms(self) -> dict[str, float]:
        """`parameter_group` -> norm of its gradient; when and how as `gradients`. Zero means: not trained."""
        norms: dict[str, float] = {}
        for name, gradient in self.gradients().items():
            group = parameter_group(name)
            norms[group] = math.hypot(norms.get(group, 0.0), float(gradient.norm()))
        return norms

    def group_changes(self, before: Mapping[str, Tensor]) -> dict[str, float]:
        """`parameter_group` -> largest absolute change of a weight since ``before`` (clones of the parameters)."""
        changes: dict[str, float] = {}
        for name, param in self._parameters.items():
            change = float((param.detach() - before[name].to(param.device)).abs().max())
            changes[parameter_group(name)] = max(changes.get(parameter_group(name), 0.0), change)
        return changes

    def state(self) -> dict[str, Tensor]:
        """Everything that training goes on from, consolidated: float32 CPU copies, the same at any world size.

        Keys: ``param.<name>``, ``exp_avg.<name>``, ``exp_avg_sq.<name>`` and ``step`` (updates, int64). Collective.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = {"step": torch.tensor(self._updates, dtype=torch.int64)}
        for name, param in self._parameters.items():
            state[f"param.{name}"] = safe_get_full_fp32_param(param).cpu().contiguous()
            for moment in _MOMENTS:
                state[f"{moment}.{name}"] = safe_get_full_optimizer_state(param, moment).cpu().contiguous()
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state` of a run at any world size; every rank passes the whole of it.

        Raises:
            UserError: a name is missing or unknown, or a shape differs.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._check_fits(state)
        for name, param in self._parameters.items():
            param.copy_(state[f"param.{name}"])
            safe_set_full_fp32_param(param, state[f"param.{name}"])
            for moment in _MOMENTS:
                safe_set_full_optimizer_state(param, state[f"{moment}.{name}"], moment)
        self._set_updates(int(state["step"]))

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module; the module stays usable."""
        self._engine.destroy()

    def _check_fits(self, state: Mapping[str, Tensor]) -> None:
        shapes = {f"{kind}.{name}": param.shape for name, param in self._parameters.items()
                  for kind in ("param", *_MOMENTS)} | {"step": torch.Size([])}  # fmt: skip
        for name in sorted(shapes.keys() ^ state.keys()):
            raise UserError(
                f"the checkpoint is of another model: {name} is {'missing' if name in shapes else 'unknown'}"
            )
        for name, shape in shapes.items():
            if state[name].shape != shape:
                raise UserError(
                    f"the checkpoint is of another model: {name} must be {tuple(shape)}, got {tuple(state[name].shape)}"
                )

    def _make_moments(self) -> None:
        """AdamW makes its moments in its first step: take one now, with zero gradient and rate, and uncount it."""
        groups = self._zero.optimizer.param_groups
        kept = [{key: group[key] for key in ("lr", "weight_decay", "eps")} for group in groups]
        for index, (group, master) in enumerate(zip(groups, self._zero.single_partition_of_fp32_groups, strict=True)):
            gradient = master.grad
            master.grad = torch.zeros_like(master)
            group.update(lr=0.0, weight_decay=0.0, eps=1.0)
            self._zero._optimizer_step(index)
            group.update(kept[index])
            master.grad = gradient
        self._set_updates(0)

    def _set_updates(self, updates: int) -> None:
        self._updates = updates
        for moments in self._zero.optimizer.state.values():
            moments["step"].fill_(updates)
