"""What a recipe can say: one frozen dataclass per section; the rules between them are in `recipe_rules`.

Every field has its meaning and unit on the line below it. Components receive plain arguments, never this tree.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from fastcraft.errors import UserError
from fastcraft.objectives.backprop_settings import BackpropSettings
from fastcraft.recipe_rules import check_recipe


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
        check_recipe(self)
