"""The runs whose numbers are recorded: one base recipe, and for each case what it sets differently.

A setting that is renamed is renamed here, in the base or in its case; the recorded values stay as they are. A case with
new numbers, or a new case, is recorded with ``python -m tests.golden.record``.
"""

from typing import Any

SHORT, LONG = 3, 20
"""Optimiser steps of the daily run and of the slow one; both are recorded, each as a run of its own."""

BASE = """
[model]
path = "shapes"

[prompts]
path = "tests/golden/prompts.txt"

[sampler]
num_inference_steps = 4
guidance_scale = 3.0

[objective]
backprop_steps = 3

[[rewards]]
name = "clip"
path = "shapes"
weight = 10.0

[[rewards]]
name = "aesthetic"
path = "shapes"
weight = 0.1

[memory]
policy = "none"

[kernels]
backend = "reference"

[train]
batch_size = 1
dtype = "float32"
learning_rate = 2e-4
max_grad_norm = 0.0
checkpoint_every = 0

[evaluate]
every = 0
num_samples = 1
batch_size = 1
"""

CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "batch_2": {"train.batch_size": 2},
    # which steps carry gradient
    "truncation_random": {
        "objective.truncation": "random", "text.prefix_encoder": "trained", "train.batch_size": 2,
    },
    "truncation_std": {
        "objective.truncation": "random", "objective.truncation_std": 1.0, "text.prefix_encoder": "trained",
        "train.batch_size": 2,
    },
    "truncation_single": {"objective.truncation": "single"},
    "truncation_spaced": {"objective.truncation": "spaced", "objective.backprop_steps": 2},
    "early_stop_steps": {
        "objective.truncation": "spaced", "objective.backprop_steps": 2, "objective.early_stop_steps": 2,
    },
    # what the gradient passes
    "input_grad_false": {"objective.input_grad": False},
    "uncond_grad_false": {"objective.uncond_grad": False},
    "straight_through_clamp": {"objective.straight_through_clamp": True},
    "low_variance_draws": {"objective.backprop_steps": 1, "objective.low_variance_draws": 3, "train.batch_size": 2},
    "last_step": {"objective.backprop_steps": 1},
    # the loss
    "loss_hinge": {"objective.loss": "hinge", "objective.hinge_margin": 9.0, "train.batch_size": 2},
    "loss_scale": {"objective.loss_scale": 0.01},
    "normalize_running_std": {"objective.normalize_rewards": "running_std", "train.batch_size": 2},
    "normalize_gradient_share": {"objective.normalize_rewards": "gradient_share", "train.batch_size": 2},
    "anchor_weight": {"objective.anchor_weight": 5.0},
    "reward_weight_negative": {"rewards.1.weight": -0.3},
    "reward_watched_only": {"rewards.1.weight": 0.0},
    # the text encoder
    "lora": {
        "trained.text.mode": "lora", "trained.text.rank": 4, "trained.text.alpha": 8.0, "train.learning_rate": 5e-4,
    },
    "lora_gradient_checkpointing": {
        "trained.text.mode": "lora", "trained.text.rank": 4, "trained.text.gradient_checkpointing": True,
    },
    "uncond_encoder_original": {"text.uncond_encoder": "original"},
    "prefix_encoder_trained": {"text.prefix_encoder": "trained"},
    "gradient_checkpointing": {"trained.text.gradient_checkpointing": True},
    # the sampler
    "eta": {"sampler.eta": 0.7},
    "guidance_scale_1": {"sampler.guidance_scale": 1.0, "train.batch_size": 2},
    "spacing_leading": {"sampler.timestep_spacing": "leading"},
    # the steps of the optimiser
    "accumulation": {"train.gradient_accumulation_steps": 2},
    "accumulation_running_std": {
        "train.gradient_accumulation_steps": 2, "objective.normalize_rewards": "running_std",
    },
    "warmup_cosine": {"train.warmup_steps": 2, "train.lr_schedule": "cosine"},
    "max_grad_norm": {"train.max_grad_norm": 0.5},
    "adamw": {"train.betas": [0.8, 0.95], "train.eps": 1e-4, "train.weight_decay": 0.3},
    "seed": {"train.seed": 7},
    # what is kept for backward; the numbers are those of the base but for rounding
    "decode_micro_batch": {"memory.decode_micro_batch": 1, "train.batch_size": 2},
    "decode_micro_batch_step": {"memory.decode_micro_batch": 1, "memory.policy": "step", "train.batch_size": 2},
    "policy_step": {"memory.policy": "step"},
    "policy_step_block": {"memory.policy": "step+block"},
    "policy_sac": {"memory.policy": "sac:attention+conv"},
    "policy_segment": {"memory.policy": "segment:2"},
    "policy_last_k_live": {"memory.policy": "last_k_live:1"},
    "policy_plan": {"memory.policy": "plan:recompute,sac:linear+norm,keep"},
    "policy_auto": {"memory.policy": "auto", "memory.budget_gib": 0.08},
    "policy_batched": {"memory.policy": "batched:2", "objective.input_grad": False},
    "prefix_reuse": {"memory.prefix_reuse": 2, "memory.prefix_pool": 2},
    # settings that meet each other
    "refl": {
        "objective.truncation": "single", "objective.loss": "hinge", "objective.hinge_margin": 9.0,
        "objective.loss_scale": 1e-3, "memory.policy": "step",
    },
    "drtune": {
        "objective.truncation": "spaced", "objective.backprop_steps": 2, "objective.early_stop_steps": 1,
        "objective.input_grad": False, "sampler.eta": 0.5, "memory.policy": "batched:2",
    },
    "alignprop": {
        "objective.truncation": "random", "objective.truncation_std": 1.0, "text.prefix_encoder": "trained",
        "trained.text.mode": "lora", "trained.text.rank": 4, "sampler.eta": 1.0, "memory.policy": "step",
        "train.batch_size": 2,
    },
}  # fmt: skip

SLOW_ONLY = (
    "accumulation_running_std", "alignprop", "batch_2", "decode_micro_batch_step", "drtune", "last_step",
    "lora_gradient_checkpointing", "policy_auto", "refl", "reward_watched_only", "reward_weight_negative", "seed",
)  # fmt: skip
"""Left out of the daily run for its length; they repeat what other cases have, or (auto) take long to begin."""

SAME_AS: dict[str, str] = {
    "gradient_checkpointing": "base",
    "decode_micro_batch": "batch_2",
    "decode_micro_batch_step": "batch_2",
    "policy_step": "base",
    "policy_step_block": "base",
    "policy_sac": "base",
    "policy_segment": "base",
    "policy_last_k_live": "base",
    "policy_plan": "base",
    "policy_auto": "base",
    "policy_batched": "input_grad_false",
}
"""Cases whose first step must give the numbers of another case but for rounding; every other case differs from all."""
