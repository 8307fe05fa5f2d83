"""The training engine: DeepSpeed ZeRO around the trained module, and nothing else. Only this file imports deepspeed.

Trained parameters are float32, with autocast inside the forward, or bfloat16 with float32 masters and gradients, which
takes 6 bytes a parameter less on every rank, always by ZeRO-2. DeepSpeed would build those masters from the rounded
weights; they are set to the exact ones instead. Its timers see only this module, and its checkpoints are replaced by
`fastcraft.engine.checkpoint`.
"""

import contextlib
import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from fastcraft.engine import averages
from fastcraft.engine.agreement import agree, rank
from fastcraft.engine.groups import ParameterGroup, StepResult, one_group
from fastcraft.engine.out_of_memory import MemoryRanOutError, is_out_of_memory
from fastcraft.engine.schedule import lr_at
from fastcraft.errors import UserError
from fastcraft.weights.keymap import parameter_group

_MOMENTS = ("exp_avg", "exp_avg_sq")


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

    One micro-step is ``engine(...)`` as often as wanted, any frozen chain on its output, ``backward(loss)`` once and
    ``step()`` once; a ``step()`` that closes an update changes the weights by the sum of the gradients since the last
    one, of which the mean over ranks is taken.

    Args:
        module: its trained parameters are all float32 or all bfloat16. Rank 0's weights are sent to every rank.
        groups: all trained parameters; None = one group at the config's rate.
        exact: for bfloat16 parameters, by name, the float32 values that they were rounded from; taken out when used.
        watched: the part of the module whose first output with gradient gets its own before any trained weight does;
            None = the module. See `backward`.
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
        groups: Sequence[ParameterGroup] | None = None,
        exact: MutableMapping[str, Tensor] | None = None,
        watched: nn.Module | None = None,
    ) -> None:
        config = copy.deepcopy(dict(ds_config))
        params = config.pop("optimizer")["params"]
        self._schedule: dict[str, Any] = {
            "warmup_steps": warmup_steps, "total_steps": total_steps, "schedule": lr_schedule,
        }  # fmt: skip
        self._groups = list(groups or one_group(module, learning_rate=params["lr"]))
        self._parameters = {name: param for group in self._groups for name, param in group.parameters.items()}
        self._check_parameters(module)
        if self._dtype == torch.bfloat16:
            config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
            config["zero_optimization"]["stage"] = 2  # the same numbers; for stage 1 DeepSpeed has an optimiser apart
            config.pop("torch_autocast", None)
        module.to(device)
        self._initialize(module, config, params, device)
        self.module = module
        self._updates = 0
        self._awaits_step = self._closes = self._is_watching = self.gradient_arrived = False
        self._hook = (watched or module).register_forward_hook(self._watch)
        self._set_masters(exact if exact is not None else {})
        self._make_moments()

    def _check_parameters(self, module: nn.Module) -> None:
        """All trained parameters, in one of the two dtypes, and each in a group."""
        if not self._parameters:
            raise UserError("nothing to train: no parameter of the model requires a gradient")
        trained = {name for name, param in module.named_parameters() if param.requires_grad}
        if trained != self._parameters.keys():
            raise ValueError(f"parameter groups must have all trained parameters, got {len(self._parameters)}")
        dtypes = {param.dtype for param in self._parameters.values()}
        if dtypes not in ({torch.float32}, {torch.bfloat16}):
            raise ValueError(f"trained parameters must all be float32 or all bfloat16, got {sorted(map(str, dtypes))}")
        self._dtype = dtypes.pop()

    def _initialize(
        self, module: nn.Module, config: dict[str, Any], params: dict[str, Any], device: torch.device
    ) -> None:
        import deepspeed
        import pydantic

        offloaded = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") == "cpu"
        rows = [{"params": list(group.parameters.values()), "lr": group.learning_rate} for group in self._groups]
        optimizer = torch.optim.AdamW(
            rows, betas=tuple(params["betas"]), eps=params["eps"], weight_decay=params["weight_decay"],
            fused=device.type == "cuda" or offloaded,
        )  # fmt: skip
        try:
            self._engine, self._zero, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UserError(f"--ds_config: {where}: {problem['msg']}, got {problem['input']!r}") from error
        except (ValueError, AssertionError) as error:
            raise UserError(f"--ds_config: DeepSpeed refuses it: {str(error).splitlines()[0]}") from error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, under autocast where its parameters are float32."""
        return self._engine(*args, **kwargs)

    forward = __call__

    def begin(self) -> None:
        """Begin a micro-step: forwards of one that was given up, for want of memory, mean nothing any more."""
        self._is_watching = self.gradient_arrived = False

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        """Look out for the gradient of the first output of this micro-step; a recompute is not the first."""
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.requires_grad and not self._is_watching:
            self._is_watching = True
            tensor.register_hook(self._note_arrival)

    def _note_arrival(self, gradient: Tensor) -> None:
        """The last moment at which all ranks can leave backward together."""
        if any(agree([False])):
            raise MemoryRanOutError("on another rank")
        self.gradient_arrived = True

    def backward(self, loss: Tensor, *, closes_update: bool = True) -> None:
        """Back-propagate a scalar loss.

        When the gradient comes to what is watched, ranks agree that all have got so far; one whose memory ran out
        before makes all leave, with nothing added up or exchanged: the micro-step may be done again. After that buckets
        are being reduced, and a rank that left would keep the others waiting.

        Args:
            loss: its gradient is added to those since the last update.
            closes_update: whether the next `step` updates the weights.

        Raises:
            MemoryRanOutError: on every rank, if memory ran out on one before the gradient arrived.
            RuntimeError: memory ran out later; or a second call before `step`: DeepSpeed would drop the first gradient.
        """
        if self._awaits_step:
            raise RuntimeError("backward was called twice in one micro-step; call step() after each backward")
        self._closes = closes_update
        self._engine.set_gradient_accumulation_boundary(closes_update)
        try:
            self._engine.backward(loss, scale_wrt_gas=False)
        except RuntimeError as error:
            if self.gradient_arrived or not self._is_watching or not is_out_of_memory(error):
                raise
            agree([True])
            raise MemoryRanOutError(str(error).splitlines()[0]) from error
        finally:
            self._is_watching = False
        self._awaits_step = True

    def step(self) -> StepResult:
        """End the micro-step; update the weights if its loss closes an update."""
        if not self._awaits_step:
            raise RuntimeError("step needs a backward before it")
        self._awaits_step = False
        lr = self.lr
        for group, rate in zip(self._zero.optimizer.param_groups, lr.values(), strict=True):
            group["lr"] = rate
        self._engine.step()
        if not self._closes:
            return StepResult(took_step=False, skipped=False, grad_norm=None, lr=lr)
        if not self._engine.was_step_applied():
            return StepResult(took_step=False, skipped=True, grad_norm=None, lr=lr)
        self._updates += 1
        averages.update_averages(self._zero.optimizer, self._decays, num_updates=self._updates)
        return StepResult(took_step=True, skipped=False, grad_norm=float(self._engine.get_global_grad_norm()), lr=lr)

    @property
    def lr(self) -> dict[str, float]:
        """Learning rate of the next update, by parameter group."""
        return {group.name: lr_at(self._updates, peak=group.learning_rate, **self._schedule) for group in self._groups}

    @property
    def num_updates(self) -> int:
        """Updates applied so far; skipped ones do not count."""
        return self._updates

    @property
    def _decays(self) -> list[float]:
        return [group.ema_decay for group in self._groups]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> trained parameter, whole on every rank."""
        return dict(self._parameters)

    def gradients(self) -> dict[str, Tensor]:
        """Name -> gradient of the update that is due, float32, before clipping, the mean over ranks and micro-steps.

        Collective. Only between the last ``backward`` of an accumulation and its ``step``, else RuntimeError.
        """
        from deepspeed.utils import safe_get_full_grad

        if not self._awaits_step or not self._closes:
            raise RuntimeError("gradients are whole only between the last backward of an update and its step")
        return {name: safe_get_full_grad(param) for name, param in self._parameters.items()}

    def group_gradient_norms(self) -> dict[str, float]:
        """`parameter_group` -> norm of its gradient; when and how as `gradients`. Zero means: not trained."""
        norms: dict[str, float] = {}
        for name, gradient in self.gradients().items():
            group = parameter_group(name)
            norms[group] = math.hypot(norms.get(group, 0.0), float(gradient.norm()))
        return norms

    def masters(self) -> dict[str, Tensor]:
        """Name -> what this rank has of the parameter's float32 master, a flat copy on the CPU; empty if nothing."""
        return {name: self._fragment(param).detach().cpu().clone() for name, param in self._parameters.items()}

    def group_changes(self, before: Mapping[str, Tensor]) -> dict[str, float]:
        """`parameter_group` -> largest absolute change of a master weight since `masters` gave ``before``.

        Of this rank's share: zero where it has nothing of a group.
        """
        changes: dict[str, float] = {}
        for name, now in self.masters().items():
            change = float((now - before[name]).abs().max()) if now.numel() else 0.0
            changes[parameter_group(name)] = max(changes.get(parameter_group(name), 0.0), change)
        return changes

    def _fragment(self, param: Any) -> Tensor:
        mapping = param._hp_mapping
        return torch.empty(0) if mapping is None else mapping.get_hp_fragment()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages in the weights' places, for an evaluation or an export. Collective; no update inside.

        Parameters without an average stay as they are.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        swapped = [param for group in self._groups if group.ema_decay for param in group.parameters.values()]
        with torch.no_grad():
            for param in swapped:
                param.copy_(safe_get_full_optimizer_state(param, averages.NAME))
        try:
            yield
        finally:
            with torch.no_grad():
                for param in swapped:
                    param.copy_(safe_get_full_fp32_param(param))

    def weights(self) -> dict[str, Tensor]:
        """Name -> what training has made of the parameter, its average where there is one: float32, on the CPU, whole.

        Collective. Unlike the parameters themselves these are exact where those are bfloat16.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights = {}
        for name, param in self._parameters.items():
            averaged = averages.NAME in self._kept(name)
            whole = safe_get_full_optimizer_state(param, averages.NAME) if averaged else safe_get_full_fp32_param(param)
            weights[name] = whole.cpu().contiguous()
        return weights

    def state(self) -> dict[str, Tensor]:
        """Everything that training goes on from, consolidated: float32 CPU copies, the same at any world size.

        Keys: ``param.<name>``, ``exp_avg.<name>``, ``exp_avg_sq.<name>``, ``ema.<name>`` where there is an average, and
        ``step`` (updates, int64). Collective.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = {"step": torch.tensor(self._updates, dtype=torch.int64)}
        for name, param in self._parameters.items():
            state[f"param.{name}"] = safe_get_full_fp32_param(param).cpu().contiguous()
            for moment in self._kept(name):
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
            for moment in self._kept(name):
                safe_set_full_optimizer_state(param, state[f"{moment}.{name}"], moment)
        self._set_updates(int(state["step"]))

    def close(self) -> None:
        """Take all hooks off the module; the module stays usable."""
        self._hook.remove()
        self._engine.destroy()

    def _check_fits(self, state: Mapping[str, Tensor]) -> None:
        shapes = {f"{kind}.{name}": param.shape for name, param in self._parameters.items()
                  for kind in ("param", *self._kept(name))} | {"step": torch.Size([])}  # fmt: skip
        for name in sorted(shapes.keys() ^ state.keys()):
            raise UserError(
                f"the checkpoint is of another model: {name} is {'missing' if name in shapes else 'unknown'}"
            )
        for name, shape in shapes.items():
            if state[name].shape != shape:
                raise UserError(
                    f"the checkpoint is of another model: {name} must be {tuple(shape)}, got {tuple(state[name].shape)}"
                )

    def _kept(self, name: str) -> tuple[str, ...]:
        """What the optimiser's state has of a parameter."""
        averaged = any(name in group.parameters for group in self._groups if group.ema_decay)
        return (*_MOMENTS, averages.NAME) if averaged else _MOMENTS

    def _set_masters(self, exact: MutableMapping[str, Tensor]) -> None:
        """Give masters of bfloat16 weights the values that the weights were rounded from."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name in list(exact):
            param = self._parameters[name]
            safe_set_full_fp32_param(param, exact.pop(name).to(param.device, torch.float32))

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
        averages.add_averages(self._zero.optimizer, self._decays)
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()
        self._set_updates(0)

    def _set_updates(self, updates: int) -> None:
        self._updates = updates
        for moments in self._zero.optimizer.state.values():
            moments["step"].fill_(updates)
