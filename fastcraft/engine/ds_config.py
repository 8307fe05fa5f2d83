"""DeepSpeed's JSON: read strictly, its "auto" values filled from the recipe, contradictions refused."""

import copy
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastcraft.errors import UserError
from fastcraft.registry import suggestion

MAX_BUCKET = 50_000_000
"""Elements of a reduction bucket; DeepSpeed allocates the whole of it whatever the model's size."""

_ACCEPTED = {
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer",
    "torch_autocast", "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers", "comms_logger",
    "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "dataloader_drop_last", "disable_python_gc",
}  # fmt: skip
_CASTS = "it would build the master weights from rounded ones; use torch_autocast"
_REFUSED = {
    "bf16": _CASTS,
    "bfloat16": _CASTS,
    "fp16": _CASTS,
    "amp": "DeepSpeed has removed it; use torch_autocast",
    "data_types": "parameters, gradients and masters are float32",
    "scheduler": "the schedule is the recipe's: train.lr_schedule and train.warmup_steps",
    "train_batch_size": "it follows from the batch per rank, the accumulation and the number of ranks",
    "managed_gradient_accumulation": "accumulation is train.gradient_accumulation_steps",
    "gradient_allreduce_op": "gradients are the mean over ranks",
    "activation_checkpointing": "memory.policy plans what is recomputed",
    "compile": "the trained part is not compiled",
}
_ADAMW_PARAMS = ("lr", "betas", "eps", "weight_decay", "torch_adam")
_AUTOCAST = ("enabled", "dtype", "lower_precision_safe_modules")


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed config, "auto" values left in place.

    Raises:
        UserError: no such file, not JSON, a key twice, an unknown key, a section that this project refuses (the reason
            is in the message), or a ZeRO stage other than 1 and 2.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"--ds_config: cannot read {str(path)!r}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--ds_config: {str(path)!r} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--ds_config: {str(path)!r} must hold an object, got {type(config).__name__}")
    for key in config:
        if key in _REFUSED:
            raise UserError(f"--ds_config: {key!r} is refused: {_REFUSED[key]}")
    _check_keys(config, "", _ACCEPTED)
    _check_zero(_section(config, "zero_optimization"))
    optimizer = _section(config, "optimizer")
    _check_keys(optimizer, "optimizer.", ("type", "params"))
    _check_keys(_section(optimizer, "params"), "optimizer.params.", _ADAMW_PARAMS)
    if optimizer.get("type", "AdamW") != "AdamW":
        raise UserError(f"--ds_config: optimizer.type must be 'AdamW', got {optimizer['type']!r}")
    _check_keys(_section(config, "torch_autocast"), "torch_autocast.", _AUTOCAST)
    return config


def fill_ds_config(
    ds_config: dict[str, Any],
    *,
    batch_size: int,
    gradient_accumulation_steps: int,
    dtype: str,
    max_grad_norm: float,
    learning_rate: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    num_parameters: int,
    largest_parameter: int,
) -> dict[str, Any]:
    """A complete config: what is "auto" or absent comes from the recipe; ``ds_config`` is left as it is.

    Gradients are always reduced in float32 (DeepSpeed would reduce those of linear layers in the autocast dtype), and
    buckets hold the trained part and no more. ``num_parameters`` and ``largest_parameter`` count trained elements, in
    all and of the largest tensor.

    Raises:
        UserError: a value in the file contradicts the recipe; the message names both.
    """
    config = copy.deepcopy(ds_config)
    _fill(config, "", "train_micro_batch_size_per_gpu", batch_size, "train.batch_size")
    _fill(config, "", "gradient_accumulation_steps", gradient_accumulation_steps, "train.gradient_accumulation_steps")
    _fill(config, "", "gradient_clipping", float(max_grad_norm), "train.max_grad_norm")
    _fill_autocast(config.setdefault("torch_autocast", {}), dtype)
    optimizer = config.setdefault("optimizer", {})
    optimizer["type"] = "AdamW"
    params = optimizer.setdefault("params", {})
    if params.pop("torch_adam", True) is not True:
        raise UserError("--ds_config: optimizer.params.torch_adam must be true: DeepSpeed's own would be compiled")
    for key, value, name in (
        ("lr", learning_rate, "learning_rate"),
        ("betas", list(betas), "betas"),
        ("eps", eps, "eps"),
        ("weight_decay", weight_decay, "weight_decay"),
    ):
        _fill(params, "optimizer.params.", key, value, f"train.{name}")
    config["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's CPU Adam would have to be compiled; torch's is fused
    zero = config["zero_optimization"]
    bucket = max(largest_parameter, min(num_parameters, MAX_BUCKET))
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(key, "auto") == "auto":
            zero[key] = bucket + bucket % 2  # DeepSpeed wants an even number
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise UserError(f"--ds_config: the key {key!r} is there twice")
        result[key] = value
    return result


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    section = config.get(key, {})
    if not isinstance(section, dict):
        raise UserError(f"--ds_config: {key} must be an object, got {section!r}")
    return section


def _check_zero(zero: dict[str, Any]) -> None:
    stage = zero.get("stage")
    if stage not in (1, 2) or isinstance(stage, bool):
        raise UserError(f"--ds_config: zero_optimization.stage must be 1 or 2, got {stage!r}")
    device = _section(zero, "offload_optimizer").get("device", "none")
    if device not in ("none", "cpu"):
        raise UserError(f"--ds_config: zero_optimization.offload_optimizer.device must be none or cpu, got {device!r}")
    if zero.get("compute_grad_norm", True) is not True:
        raise UserError(
            "--ds_config: zero_optimization.compute_grad_norm must be true: bad steps are found by the norm"
        )
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        size = zero.get(key, "auto")
        number = isinstance(size, (int, float)) and not isinstance(size, bool) and math.isfinite(size)
        if size != "auto" and not (number and size >= 2 and size % 2 == 0):
            raise UserError(f"--ds_config: zero_optimization.{key} must be 'auto' or an even number, got {size!r}")


def _check_keys(section: dict[str, Any], prefix: str, known: Iterable[str]) -> None:
    """DeepSpeed ignores unknown keys here, and with them what was meant."""
    for key in section:
        if key not in known:
            raise UserError(f"--ds_config: unknown key {prefix + key!r}{suggestion(key, known)}")


def _fill_autocast(autocast: dict[str, Any], dtype: str) -> None:
    enabled = dtype == "bfloat16"
    _fill(autocast, "torch_autocast.", "enabled", enabled, "train.dtype", f"{dtype!r}")
    if enabled:
        _fill(autocast, "torch_autocast.", "dtype", dtype, "train.dtype")
        autocast.setdefault("lower_precision_safe_modules", [])
    else:
        autocast.pop("dtype", None)


def _fill(section: dict[str, Any], prefix: str, key: str, value: Any, setting: str, shown: str = "") -> None:
    """Take the recipe's value, unless the file states another one."""
    given = section.get(key, "auto")
    if given != "auto" and given != value:
        raise UserError(
            f"--ds_config: {prefix}{key} is {given!r} but {setting} is {shown or repr(value)}; write 'auto' there"
        )
    section[key] = value
