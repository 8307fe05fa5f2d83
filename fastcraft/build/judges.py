"""Who judges the pictures of a recipe: the rewards that are trained on, those that are held out, and the exam."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastcraft.diffusion.use_kernels import use_kernels
from fastcraft.errors import UserError, named
from fastcraft.evaluation.scores import Exam
from fastcraft.recipe import Recipe, RewardConfig
from fastcraft.registry import resolve
from fastcraft.rewards import RewardSpec, build_rewards
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.mix import WeightedRewards
from fastcraft.shapes import REWARD


@dataclass(frozen=True, kw_only=True)
class Judges:
    """``rewards`` are trained on, ``held_out`` only watched; the ``exam`` scores evaluations in its own way."""

    rewards: WeightedRewards
    held_out: WeightedRewards | None
    exam: Exam | None


def build_judges(recipe: Recipe, *, device: torch.device) -> Judges:
    """Load the rewards; those that look through the same tower share it.

    Raises:
        UserError: no reward, or one that is not there, cannot be loaded or has no gradient where one is needed.
    """
    if not recipe.rewards:
        raise UserError("rewards: at least one [[rewards]] table is required, got none")
    exam = find_exam(recipe.evaluate.exam)
    needs = recipe.objective.settings.needs
    towers = Towers(device=device, dtype=getattr(torch, recipe.train.dtype), bundled=REWARD)
    rewards = build_rewards(
        _specs(recipe.rewards), towers=towers, normalize=needs.normalize_rewards, require_grad=needs.reward_gradients
    )
    held_out = build_rewards(_specs(recipe.held_out), towers=towers, require_grad=False) if recipe.held_out else None
    networks = [network for mix in (rewards, held_out) if mix is not None for network in mix.image_networks]
    with named("kernels."):
        use_kernels(networks, backend=recipe.kernels.backend, device=device)
    return Judges(rewards=rewards, held_out=held_out, exam=exam)


def find_exam(path: str) -> Exam | None:
    """The exam that a recipe names; ``"shapes"`` is the miniature world's judge."""
    if not path:
        return None
    return resolve("fastcraft.shapes.judge:exam" if path == "shapes" else path, "evaluate.exam")


def _specs(rewards: Sequence[RewardConfig]) -> list[RewardSpec]:
    return [RewardSpec(entry.name, entry.weight, entry.path, entry.options, entry.label) for entry in rewards]
