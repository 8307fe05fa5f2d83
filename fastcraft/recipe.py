"""What a recipe can say: one frozen dataclass per section, and the rules between fields.

Every field has its meaning and unit on the line below it. Components receive plain arguments, never this tree.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from fastcraft.errors import UserError


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
    """Which K steps. last: the last K (TextCraftor, DRaFT); random: a random number of last steps for each sample,
    mean K (AlignProp); single: one of the last K, ending with its x0 estimate (ReFL); spaced: K at equal distances
    (DRTune)."""
    truncation_std: float = 0.0
    """Standard deviation, in steps, of AlignProp's random truncation point."""
    input_grad: bool = True
    """false = stop-gradient on the latents entering the UNet (DRTune). Changes the gradient."""
    uncond_grad: bool = True
    """false = stop-gradient on the unconditional noise prediction. Changes the gradient."""
    straight_through_clamp: bool = False
    """true = where a picture is clamped to [0, 1], the gradient passes as if it were not; otherwise it is zero there.
    Changes the gradient. The clamp after a reward's resize is that reward's option ``clamp``."""
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
    normalize_rewards: Literal["none", "running_std", "gradient_share"] = "none"
    """running_std divides each reward by the running standard deviation of its scores before weighting; gradient_share
    scales it so that its gradient at the picture has norm weight / sum of weights in every micro-batch."""
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
    "model.resolution": 0, "prompts.max_characters": 1, "text.lora_rank": 1,
    "sampler.num_inference_steps": 1, "sampler.guidance_scale": 1, "sampler.eta": 0,
    "objective.backprop_steps": 1, "objective.truncation_std": 0, "objective.early_stop_steps": 0,
    "objective.low_variance_draws": 1, "objective.anchor_weight": 0, "memory.decode_micro_batch": 0,
    "memory.budget_gib": 0, "memory.prefix_reuse": 1, "memory.prefix_pool": 1, "memory.prefix_store_mib": 1,
    "train.num_steps": 1, "train.batch_size": 1, "train.gradient_accumulation_steps": 1, "train.seed": 0,
    "train.eps": 0, "train.weight_decay": 0, "train.max_grad_norm": 0, "train.warmup_steps": 0,
    "train.checkpoint_every": 0, "train.keep_checkpoints": 1, "train.max_bad_steps": 1,
    "evaluate.every": 0, "evaluate.num_samples": 1, "evaluate.batch_size": 1,
    "evaluate.exam_num_samples": 0, "evaluate.trained_steps": 0, "evaluate.held_out_patience": 1,
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
    if objective.truncation == "random" and recipe.text.prefix_encoder != "trained":
        raise UserError(
            "objective.truncation = 'random' needs text.prefix_encoder = 'trained' (samples start at different steps), "
            f"got {recipe.text.prefix_encoder!r}"
        )
    if recipe.train.seed >= 2**63:
        raise UserError(f"train.seed must be below 2**63, got {recipe.train.seed}")
    if objective.early_stop_steps and objective.truncation != "spaced":
        raise UserError(
            f"objective.early_stop_steps needs objective.truncation = 'spaced', got {objective.truncation!r}"
        )
    if objective.early_stop_steps >= sampler.num_inference_steps:
        raise UserError(
            f"objective.early_stop_steps must be below sampler.num_inference_steps ({sampler.num_inference_steps}), "
            f"got {objective.early_stop_steps}"
        )
    if recipe.evaluate.trained_steps > sampler.num_inference_steps:
        raise UserError(
            f"evaluate.trained_steps must be at most sampler.num_inference_steps ({sampler.num_inference_steps}), "
            f"got {recipe.evaluate.trained_steps}"
        )
    _check_prefix(recipe)
    for section, rewards in (("rewards", recipe.rewards), ("held_out", recipe.held_out)):
        names = [reward.label or reward.name for reward in rewards]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{section}: {name!r} is named twice; give one of them a label")
    if recipe.rewards and all(reward.weight == 0 for reward in recipe.rewards):
        raise UserError("rewards: at least one weight must not be 0")


def _check_prefix(recipe: Recipe) -> None:
    """What keeps the latents of the frozen steps must find them unchanged the next time."""
    memory = recipe.memory
    if not memory.prefix_store:
        raise UserError("memory.prefix_store must be 'memory' or a folder, got ''")
    if not memory.keeps_prefixes:
        return
    what = "memory.prefix_reuse above 1" if memory.prefix_reuse > 1 else "a folder as memory.prefix_store"
    objective = recipe.objective
    if (encoder := recipe.text.prefix_encoder) != "original":
        raise UserError(
            f"{what} needs text.prefix_encoder = 'original': what the trained encoder gives changes with every step; "
            f"got {encoder!r}"
        )
    if objective.truncation != "last":
        raise UserError(
            f"{what} needs objective.truncation = 'last': elsewhere the frozen steps end at another step each time; "
            f"got {objective.truncation!r}"
        )
    if objective.backprop_steps == recipe.sampler.num_inference_steps:
        raise UserError(f"{what} needs frozen steps: objective.backprop_steps below sampler.num_inference_steps")
