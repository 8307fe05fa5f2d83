"""What a recipe can say: one frozen dataclass per section, and the rules between fields.

Every field has its meaning and unit on the line below it. Components receive plain arguments, never this tree.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from fastcraft.errors import UserError, named
from fastcraft.objectives.backprop_settings import BackpropSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    path: str = "shapes"
    """A diffusers Stable Diffusion 1.x or 2.x folder, a hub id, or "shapes" for the bundled miniature."""
    resolution: int = 0
    """Width and height of the pictures, pixels; 0 = the size the model was trained at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptsConfig:
    path: str = ""
    """A .txt, .csv, .tsv, .json, .jsonl or .parquet file; "shapes:NAME" is a bundled one (train, held_out_two, ...)."""
    column: str = ""
    """Column or key that holds the prompt; empty = the first of prompt, Prompt, text, caption."""
    max_characters: int = 4000
    """A longer prompt is refused with its line number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    uncond_encoder: Literal["trained", "original"] = "trained"
    """Who encodes the empty prompt in the steps with gradient; TextCraftor: trained."""
    prefix_encoder: Literal["original", "trained"] = "original"
    """Who conditions the steps before the first one with gradient; TextCraftor: original, DRaFT: trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedConfig:
    """A part of the model: ``[trained.text]``, ``[trained.unet]``. A recipe without either trains the text encoder."""

    mode: Literal["full", "lora", "none"] = "full"
    """Every weight; low-rank adapters; or nothing, for a part that only starts elsewhere (start)."""
    start: str = ""
    """Weights to begin with in place of the model's: a run directory, an export or a file; empty = the model's own."""
    learning_rate: float = 0.0
    """Peak learning rate; 0 = train.learning_rate."""
    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    rslora: bool = False
    """Scale the adapters by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    targets: tuple[str, ...] = ()
    """Layers with adapters, by the ends of their names; "linear": all linear ones, "linear+conv": convolutions too;
    empty = the attention's projections."""
    ema_decay: float = 0.0
    """Decay of an average of the weights, which evaluations and exports then use; 0 = none."""
    gradient_checkpointing: bool = False
    """Recompute a text encoder's layers in backward. A UNet's recompute is memory.policy."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise UserError(f"alpha must be greater than 0, got {self.alpha}")
        if not self.learning_rate >= 0:
            raise UserError(f"learning_rate must be at least 0, got {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")


PARTS = ("text", "unet")
"""What can be trained."""


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
    """An objective's name and, in the same section, the settings that it declares (`fastcraft.objectives`)."""

    name: str = "reward_backprop"
    """A name from the objectives' catalogue."""
    settings: Any = field(default_factory=BackpropSettings)
    """An instance of that objective's ``Settings``."""


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
    label: str = ""
    """What it is called in metrics; empty = its name. Needed where one name appears twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    policy: str = "step"
    """What the K steps keep for backward. none; step; step+block; sac:OPS, offload:OPS (OPS: attention, conv, linear,
    norm, fastcraft or a fused op, joined by +); segment:k; last_k_live:k; batched:n (n steps recomputed in one call,
    with objective.input_grad = false); plan:3*recompute,2*keep (one per step); auto: the fastest that is predicted to
    fit, and after an out-of-memory error the next one."""
    budget_gib: float = 0.0
    """With auto: what tensors may take at the peak, GiB; 0 = what the device has."""
    decode_micro_batch: int = 0
    """Images decoded and scored at once; 0 = the whole batch. Below the batch size, these go backward first."""
    prefix_reuse: int = 1
    """Times that each pair of prompt and noise is trained on; above 1 the latents of its frozen steps are kept and used
    again, and the data are less varied. 1 = every pair is new (TextCraftor as published)."""
    prefix_pool: int = 1024
    """Pairs gone through in turn before the next pass over them; a multiple of train.batch_size x ranks."""
    prefix_store: str = "memory"
    """Where such latents are kept: "memory", or a folder, which later runs with the same seed find again."""
    prefix_store_mib: int = 1024
    """Bound of the store (in memory: of each rank's), MiB; the oldest entries go first."""

    @property
    def keeps_prefixes(self) -> bool:
        """Whether the latents of the frozen steps are kept."""
        return self.prefix_reuse > 1 or self.prefix_store != "memory"


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelsConfig:
    backend: Literal["auto", "triton", "reference"] = "auto"
    """Who computes UNet, VAE and the rewards' image towers. triton: the fused kernels, refused where they cannot run;
    reference: diffusers' and transformers' own modules; auto: triton on CUDA, reference elsewhere."""
    attention_table: str = ""
    """Who computes self-attention on CUDA: a file of ``fastcraft info --measure-attention``; empty = as shipped."""
    compile: Literal["none", "prefix", "blocks", "whole"] = "none"
    """What of the UNet ``torch.compile`` takes. prefix: the whole of it in steps without gradient, with its weights
    frozen in (a second copy of them); blocks: its repeated blocks one by one in every step, with memory.policy none,
    step, step+block, segment or last_k_live; whole: prefix, and the whole of it in steps with gradient too, with those
    but step+block. Only training's micro-batch is compiled for, which takes minutes; other sizes run as without.
    Checked against the UNet as it was before every run. Not measured on a GPU."""
    cuda_graphs: Literal["none", "prefix", "all"] = "none"
    """Replay UNet calls from CUDA graphs. prefix: those without gradient; all: those with gradient too, with
    memory.policy none, step or last_k_live. Graphs hold their memory for good, about what the steps they stand for
    keep, which no estimate knows: not with memory.policy auto. Gradients of the text are then added up in train.dtype.
    Checked like compile. Not measured on a GPU."""


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
    held_out_action: Literal["alarm", "stop"] = "alarm"
    """When a [[held_out]] reward falls while the trained total rises: say so, or end the run early, with its export."""
    held_out_patience: int = 3
    """Evaluations in a row for which that must hold; evaluations are evaluate.every steps apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One run. Sections are those of the TOML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    text: TextConfig = field(default_factory=TextConfig)
    trained: dict[str, TrainedConfig] = field(default_factory=lambda: {"text": TrainedConfig()})
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rewards: tuple[RewardConfig, ...] = ()
    held_out: tuple[RewardConfig, ...] = ()
    """Rewards that are not trained on: scored without gradient at every evaluation, to see when training goes too far.
    Their weights mean nothing."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        _check_recipe(self)


_AT_LEAST: dict[str, float] = {
    "model.resolution": 0, "prompts.max_characters": 1,
    "sampler.num_inference_steps": 1, "sampler.guidance_scale": 1, "sampler.eta": 0, "memory.decode_micro_batch": 0,
    "memory.budget_gib": 0, "memory.prefix_reuse": 1, "memory.prefix_pool": 1, "memory.prefix_store_mib": 1,
    "train.num_steps": 1, "train.batch_size": 1, "train.gradient_accumulation_steps": 1, "train.seed": 0,
    "train.eps": 0, "train.weight_decay": 0, "train.max_grad_norm": 0, "train.warmup_steps": 0,
    "train.checkpoint_every": 0, "train.keep_checkpoints": 1, "train.max_bad_steps": 1,
    "evaluate.every": 0, "evaluate.num_samples": 1, "evaluate.batch_size": 1,
    "evaluate.exam_num_samples": 0, "evaluate.trained_steps": 0, "evaluate.held_out_patience": 1,
}  # fmt: skip


def _check_recipe(recipe: Recipe) -> None:
    """Ranges of single fields and rules between fields; raises `UserError` for the first one broken."""
    _check_ranges(recipe)
    sampler = recipe.sampler
    with named("objective."):
        recipe.objective.settings.check(
            num_inference_steps=sampler.num_inference_steps, prefix_by=recipe.text.prefix_encoder
        )
    if recipe.evaluate.trained_steps > sampler.num_inference_steps:
        raise UserError(
            f"evaluate.trained_steps must be at most sampler.num_inference_steps ({sampler.num_inference_steps}), "
            f"got {recipe.evaluate.trained_steps}"
        )
    _check_trained(recipe)
    _check_prefix(recipe)
    _check_rewards(recipe)


def _check_ranges(recipe: Recipe) -> None:
    def value(key: str) -> float:
        section, name = key.split(".")
        return getattr(getattr(recipe, section), name)

    for key, least in _AT_LEAST.items():
        if not value(key) >= least:
            raise UserError(f"{key} must be at least {least}, got {value(key)}")
    if recipe.sampler.eta > 1:
        raise UserError(f"sampler.eta must be at most 1, got {recipe.sampler.eta}")
    if not recipe.train.learning_rate > 0:
        raise UserError(f"train.learning_rate must be greater than 0, got {recipe.train.learning_rate}")
    for beta in recipe.train.betas:
        if not 0 <= beta < 1:
            raise UserError(f"train.betas must lie in [0, 1), got {list(recipe.train.betas)}")
    if recipe.train.seed >= 2**63:
        raise UserError(f"train.seed must be below 2**63, got {recipe.train.seed}")


def _check_trained(recipe: Recipe) -> None:
    """Parts that are there, one of them trained, and nothing switched on that would lose a UNet's gradient."""
    for part in recipe.trained:
        if part not in PARTS:
            raise UserError(f"trained: a part is one of {', '.join(PARTS)}, got {part!r}")
    if all(part.mode == "none" for part in recipe.trained.values()):
        raise UserError("trained: at least one part must have a mode other than 'none'")
    unet = recipe.trained.get("unet", TrainedConfig(mode="none"))
    if unet.gradient_checkpointing:
        raise UserError("trained.unet.gradient_checkpointing is for text encoders; a UNet's recompute is memory.policy")
    if unet.mode == "none":
        return
    if recipe.memory.policy.startswith("batched"):
        raise UserError(
            f"memory.policy: {recipe.memory.policy!r} differentiates the text alone; with trained.unet.mode = "
            f"{unet.mode!r} take 'step', which takes as little memory"
        )
    for switch in ("compile", "cuda_graphs"):
        if (setting := getattr(recipe.kernels, switch)) != "none":
            raise UserError(
                f"kernels.{switch} must be 'none' with trained.unet.mode = {unet.mode!r}: weights in compiled code and "
                f"in graphs are constants, got {setting!r}"
            )
    if recipe.memory.keeps_prefixes:
        raise UserError(
            f"memory.prefix_reuse and memory.prefix_store keep what a frozen UNet makes; with trained.unet.mode = "
            f"{unet.mode!r} it changes with every step"
        )


def _check_prefix(recipe: Recipe) -> None:
    """What keeps the latents of the frozen steps must find them unchanged the next time."""
    memory, needs = recipe.memory, recipe.objective.settings.needs
    if not memory.prefix_store:
        raise UserError("memory.prefix_store must be 'memory' or a folder, got ''")
    if not memory.keeps_prefixes:
        return
    what = "memory.prefix_reuse above 1" if memory.prefix_reuse > 1 else "a folder as memory.prefix_store"
    if (encoder := recipe.text.prefix_encoder) != "original":
        raise UserError(
            f"{what} needs text.prefix_encoder = 'original': what the trained encoder gives changes with every step; "
            f"got {encoder!r}"
        )
    if not needs.fixed_prefix:
        raise UserError(
            f"{what} needs objective.truncation = 'last': elsewhere the frozen steps end at another step each time; "
            f"got {getattr(recipe.objective.settings, 'truncation', recipe.objective.name)!r}"
        )
    if needs.backprop_steps == recipe.sampler.num_inference_steps:
        raise UserError(f"{what} needs frozen steps: objective.backprop_steps below sampler.num_inference_steps")


def _check_rewards(recipe: Recipe) -> None:
    for section, rewards in (("rewards", recipe.rewards), ("held_out", recipe.held_out)):
        names = [reward.label or reward.name for reward in rewards]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{section}: {name!r} is named twice; give one of them a label")
    if recipe.rewards and all(reward.weight == 0 for reward in recipe.rewards):
        raise UserError("rewards: at least one weight must not be 0")
