"""Recipes: TOML into frozen dataclasses; an unknown key is an error with the nearest right one.

Every field has its meaning and unit on the line below it. Components receive plain arguments, never this tree.
"""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastcraft.errors import UserError
from fastcraft.registry import suggestion

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    path: str = "shapes"
    """A diffusers Stable Diffusion 1.x or 2.x folder, a hub id, or "shapes" for the bundled miniature."""
    resolution: int = 0
    """Width and height of the pictures, pixels; 0 = the size the model was trained at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptsConfig:
    path: str = "shapes"
    """A .txt, .csv, .tsv, .json, .jsonl or .parquet file, or "shapes" for the bundled captions."""
    column: str = ""
    """Column or key that holds the prompt; empty = the first of prompt, Prompt, text, caption."""
    max_characters: int = 4000
    """A longer prompt is refused with its line number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    train: Literal["full", "lora"] = "full"
    """Every weight of the text encoder, or LoRA adapters on its attention."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    uncond_encoder: Literal["trained", "original"] = "trained"
    """Who encodes the empty prompt in the steps with gradient; TextCraftor: trained."""
    prefix_encoder: Literal["original", "trained"] = "original"
    """Who conditions the steps before the first one with gradient; TextCraftor: original, DRaFT: trained."""
    gradient_checkpointing: bool = False
    """Recompute the text encoder's layers in backward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    name: str = "ddim"
    """A name from the samplers' catalogue."""
    num_inference_steps: int = 25
    """T, all denoising steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance weight; 1 = one forward per step, no unconditional branch."""
    eta: float = 0.0
    """DDIM noise weight in [0, 1]; 0 = deterministic."""
    timestep_spacing: Literal["trailing", "leading"] = "trailing"
    """trailing: 999, 959, ..., 39 for T = 25 (TextCraftor); leading: 981, 961, ..., 1 for T = 50 (diffusers)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    name: str = "reward_backprop"
    """A name from the objectives' catalogue."""
    backprop_steps: int = 5
    """K, denoising steps that carry gradient."""
    truncation: Literal["last", "random", "single", "spaced"] = "last"
    """Which K steps: the last K (TextCraftor, DRaFT-K); a random number of last steps with mean K (AlignProp);
    one random step among the last K, ending with its x0 estimate (ReFL); K equally spaced ones (DRTune)."""
    truncation_std: float = 0.0
    """Standard deviation, in steps, of AlignProp's random truncation point."""
    input_grad: bool = True
    """false = stop-gradient on the latents entering the UNet (DRTune). Changes the gradient."""
    uncond_grad: bool = True
    """false = stop-gradient on the unconditional noise prediction. Changes the gradient."""
    early_stop_steps: int = 0
    """DRTune: the trajectory ends, with an x0 estimate, up to this many steps early, at random; 0 = never."""
    low_variance_draws: int = 1
    """DRaFT-LV: noisings of the final latents whose last-step gradients are averaged; needs backprop_steps 1."""
    loss: Literal["negative_reward", "hinge"] = "negative_reward"
    """negative_reward: -mean(total); hinge: mean(relu(hinge_margin - total)) (ReFL)."""
    hinge_margin: float = 2.0
    """Reward above which the hinge loss is zero."""
    loss_scale: float = 1.0
    """Multiplies the loss (ReFL 1e-3, AlignProp 0.01)."""
    anchor_weight: float = 0.0
    """Weight of mean squared distance between trained and original embeddings; 0 = off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    name: str
    """A name from the rewards' catalogue, or "package.module:Class"."""
    weight: float = 1.0
    """Factor in the total."""
    path: str = ""
    """Weights of the reward: a file, folder or hub id; empty = the reward's own default; "shapes" = the bundled one."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the reward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    policy: str = "step"
    """A name from the checkpoint policies' catalogue."""
    decode_micro_batch: int = 0
    """Images decoded at once; 0 = the whole batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelsConfig:
    backend: Literal["auto", "reference"] = "auto"
    """Which implementation of the fused ops runs; until Triton ones are registered, auto is reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    num_steps: int = 100
    """Optimiser steps."""
    batch_size: int = 4
    """Prompts per rank and micro-step."""
    gradient_accumulation_steps: int = 1
    """Micro-steps per optimiser step."""
    seed: int = 0
    """Seeds prompt order, noise and adapters."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the frozen networks and of the trained encoder's arithmetic; its master weights are always float32."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW."""
    eps: float = 1e-8
    """AdamW."""
    weight_decay: float = 1e-2
    """AdamW."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm; 0 = off (TextCraftor as published)."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up."""
    warmup_steps: int = 0
    """Linear warm-up, optimiser steps."""
    checkpoint_every: int = 50
    """Optimiser steps between checkpoints; 0 = only the last."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    max_bad_steps: int = 10
    """Skipped steps in a row (NaN or Inf) after which the run stops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    every: int = 50
    """Optimiser steps between sample grids and evaluations; 0 = only before the first and after the last step."""
    prompts: str = ""
    """Prompt file of the evaluation; empty = the first prompts of prompts.path."""
    num_samples: int = 8
    """Pictures in the grid, on fixed prompts and seeds."""
    batch_size: int = 16
    """Pictures sampled at once per rank."""
    exam: str = ""
    """"package.module:function" of (images, prompts) -> {name: number}; "shapes" = the miniature world's judge."""
    exam_num_samples: int = 0
    """Pictures scored before the first and after the last step; 0 = the grid's."""
    trained_steps: int = 0
    """Last denoising steps conditioned by the trained encoder when sampling (TextCraftor: 15 of 25); 0 = all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One run. Sections are those of the TOML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    text: TextConfig = field(default_factory=TextConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rewards: tuple[RewardConfig, ...] = ()
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        _check_recipe(self)


_AT_LEAST: dict[str, float] = {
    "model.resolution": 0, "prompts.max_characters": 1, "text.lora_rank": 1,
    "sampler.num_inference_steps": 1, "sampler.guidance_scale": 1, "sampler.eta": 0,
    "objective.backprop_steps": 1, "objective.truncation_std": 0, "objective.early_stop_steps": 0,
    "objective.low_variance_draws": 1, "objective.anchor_weight": 0, "memory.decode_micro_batch": 0,
    "train.num_steps": 1, "train.batch_size": 1, "train.gradient_accumulation_steps": 1, "train.seed": 0,
    "train.eps": 0, "train.weight_decay": 0, "train.max_grad_norm": 0, "train.warmup_steps": 0,
    "train.checkpoint_every": 0, "train.keep_checkpoints": 1, "train.max_bad_steps": 1,
    "evaluate.every": 0, "evaluate.num_samples": 1, "evaluate.batch_size": 1, "evaluate.exam_num_samples": 0, "evaluate.trained_steps": 0,
}  # fmt: skip
_POSITIVE = ("text.lora_alpha", "objective.loss_scale", "train.learning_rate")


def _check_recipe(recipe: Recipe) -> None:
    """Ranges of single fields and rules between fields; raises `UserError` for the first one broken."""

    def value(key: str) -> float:
        section, name = key.split(".")
        return getattr(getattr(recipe, section), name)

    for key, least in _AT_LEAST.items():
        if not value(key) >= least:
            raise UserError(f"{key} must be at least {least}, got {value(key)}")
    for key in _POSITIVE:
        if not value(key) > 0:
            raise UserError(f"{key} must be greater than 0, got {value(key)}")
    sampler, objective = recipe.sampler, recipe.objective
    if sampler.eta > 1:
        raise UserError(f"sampler.eta must be at most 1, got {sampler.eta}")
    for beta in recipe.train.betas:
        if not 0 <= beta < 1:
            raise UserError(f"train.betas must lie in [0, 1), got {list(recipe.train.betas)}")
    if objective.backprop_steps > sampler.num_inference_steps:
        raise UserError(
            f"objective.backprop_steps must be at most sampler.num_inference_steps ({sampler.num_inference_steps}), "
            f"got {objective.backprop_steps}"
        )
    if objective.low_variance_draws > 1 and (objective.backprop_steps > 1 or objective.truncation != "last"):
        raise UserError(
            "objective.low_variance_draws above 1 needs objective.backprop_steps = 1 and truncation = 'last', got "
            f"backprop_steps = {objective.backprop_steps}, truncation = {objective.truncation!r}"
        )
    if objective.early_stop_steps and objective.truncation != "spaced":
        raise UserError(
            f"objective.early_stop_steps needs objective.truncation = 'spaced', got {objective.truncation!r}"
        )
    for name in ("early_stop_steps",):
        if getattr(objective, name) >= sampler.num_inference_steps:
            raise UserError(
                f"objective.{name} must be below sampler.num_inference_steps ({sampler.num_inference_steps}), "
                f"got {getattr(objective, name)}"
            )
    if recipe.evaluate.trained_steps > sampler.num_inference_steps:
        raise UserError(
            f"evaluate.trained_steps must be at most sampler.num_inference_steps ({sampler.num_inference_steps}), "
            f"got {recipe.evaluate.trained_steps}"
        )
    names = [reward.name for reward in recipe.rewards]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"rewards: {name!r} is named twice")
    if recipe.rewards and all(reward.weight == 0 for reward in recipe.rewards):
        raise UserError("rewards: at least one weight must not be 0")


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), replaced: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by name or TOML file and apply ``section.key=value`` overrides, then ``replaced`` dotted keys.

    Raises:
        UserError: no such recipe, broken TOML, an unknown key, a wrong type or a rule broken.
    """
    tree = _read_toml(name_or_path)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--set: expected SECTION.KEY=VALUE, got {item!r}")
        _assign(tree, key.strip(), _parse_value(text.strip()))
    for key, value in (replaced or {}).items():
        _assign(tree, key, value)
    return recipe_from_tree(tree)


def recipe_from_tree(tree: Mapping[str, Any]) -> Recipe:
    """Nested tables, as `tomllib` reads them, into a checked `Recipe`."""
    return _build(Recipe, tree, "")


def recipe_names() -> list[str]:
    """Recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _read_toml(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = RECIPES / f"{name_or_path}.toml"
        if not path.is_file():
            raise UserError(f"--recipe: unknown recipe {name_or_path!r}{suggestion(name_or_path, recipe_names())}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--recipe: cannot read {name_or_path!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe: {name_or_path!r} is not TOML: {error}") from error


def _parse_value(text: str) -> Any:
    """A TOML value; text that is none is taken as a string, so quotes are optional on a command line."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b`` or, in an array of tables, ``rewards.0.weight``."""
    node: Any = tree
    *parents, last = key.split(".")
    if not parents:
        raise UserError(f"--set: expected SECTION.KEY=VALUE, got key {key!r}")
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"--set: {key!r}: expected an index below {len(node)}, got {part!r}")
            node = node[int(part)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise UserError(f"--set: {key!r}: {part!r} is a value, not a section")
    if isinstance(node, list):
        raise UserError(f"--set: {key!r} must go on to a key inside entry {last!r}")
    node[last] = value


def _build(cls: Any, tree: Any, where: str) -> Any:
    """A dataclass from a table, checking names and types on the way."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{where or 'recipe'}: expected a table, got {tree!r}")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise UserError(f"unknown key {_join(where, key)!r}{suggestion(key, hints)}")
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    for key in required:
        if key not in tree:
            raise UserError(f"{_join(where, key)} is required")
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in tree.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type, or a `UserError` that names the key."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if origin is tuple:
        length = None if args[-1] is Ellipsis else len(args)
        if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
            raise UserError(f"{where}: expected a list{f' of {length} values' if length else ''}, got {value!r}")
        kinds = [args[0]] * len(value) if length is None else args
        return tuple(
            _convert(kind, item, f"{where}.{i}") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is Literal:
        if value not in args:
            near = suggestion(value, args) if isinstance(value, str) else ""
            raise UserError(f"{where} must be one of {', '.join(map(repr, args))}, got {value!r}{near}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a table, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{where} must be finite, got {value!r}")
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def recipe_to_tree(recipe: Recipe) -> dict[str, Any]:
    """Nested plain values, the inverse of `recipe_from_tree`."""
    return dataclasses.asdict(recipe)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML that `load_recipe` reads back to an equal `Recipe`."""
    lines: list[str] = []
    for section, content in recipe_to_tree(recipe).items():
        tables = content if isinstance(content, (list, tuple)) else [content]
        for table in tables:
            lines.append(f"[[{section}]]" if isinstance(content, (list, tuple)) else f"[{section}]")
            lines += [f"{key} = {_toml_value(value)}" for key, value in table.items()]
            lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(char):04x}" if ord(char) < 32 or ord(char) == 127 else {"\\": "\\\\", '"': '\\"'}.get(char, char)
            for char in value
        )
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    return repr(value)
