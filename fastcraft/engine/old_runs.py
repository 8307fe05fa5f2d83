"""Runs from before there were parts to train: their checkpoints (format 1) and recipes, in today's names.

Then the text encoder alone was trained: its weights had no part's name before theirs, PEFT named the adapters, the
objective's only state stood in ``state.json``, and a round was an update.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastcraft.config import RENAMED, recipe_from_tree
from fastcraft.errors import UserError
from fastcraft.recipe import Recipe

if TYPE_CHECKING:
    from fastcraft.engine.checkpoint import Checkpoint

FORMAT = 1
"""Of those checkpoints."""

_WEIGHT = re.compile(r"(?P<kind>param|exp_avg|exp_avg_sq)\.(?P<name>.+)")
_ADAPTER = re.compile(r"\.lora_(?P<side>[AB])\.default\.weight$")


def translate_checkpoint(old: "Checkpoint") -> "Checkpoint":
    """A checkpoint of format 1 as one of today's.

    Raises:
        ValueError: it does not say how many samples it has seen.
    """
    state = dict(old.state)
    if not isinstance(seen := state.pop("samples_seen", None), int):
        raise ValueError("state.json: samples_seen is missing")
    tensors = {_name(name): tensor for name, tensor in old.tensors.items()}
    tensors["objective.samples_seen"] = torch.tensor(seen)
    return replace(old, tensors=tensors, state=state | {"rounds": old.step})


def load_run_recipe(path: Path) -> Recipe:
    """The ``recipe.toml`` of a run directory, of any age.

    Raises:
        UserError: it cannot be read, or holds what is no recipe.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--run-dir: cannot read {str(path)!r}: {error}") from error
    return recipe_from_tree(_keys(tree))


def _name(name: str) -> str:
    """``param.model.X`` is ``param.text.model.X`` now, and PEFT's name of the only adapter is gone."""
    match = _WEIGHT.fullmatch(name)
    return _ADAPTER.sub(r".lora_\g<side>.weight", f"{match['kind']}.text.{match['name']}") if match else name


def _keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that have moved, in their new places."""
    moved = {key: dict(section) if isinstance(section, dict) else section for key, section in tree.items()}
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if isinstance(moved.get(section), dict) and key in moved[section]:
            *parents, last = new.split(".")
            node = moved
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = moved[section].pop(key)
    return moved
