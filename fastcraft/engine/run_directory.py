"""The run directory: which one, whose it is, and who may write to it."""

import fcntl
import os
import re
from pathlib import Path
from typing import IO, Any

from fastcraft.config import dump_recipe, recipe_to_tree
from fastcraft.durable import write_text
from fastcraft.engine.old_runs import load_run_recipe
from fastcraft.errors import UserError
from fastcraft.recipe import Recipe

LOCK = ".lock"
MAY_CHANGE = {
    "train": {"num_steps", "checkpoint_every", "keep_checkpoints", "batch_size", "gradient_accumulation_steps"},
    "memory": None,
    "evaluate": None,
    "kernels": None,
}
"""What a resumed run may set differently: sections (None) or keys that leave method, prompt order and noise alone."""


def choose_run_dir(given: str | None, *, recipe_name: str, resume: bool, root: Path = Path("runs")) -> Path:
    """The directory of this run: ``given``, else the newest (resume) or the next free ``runs/<recipe>-NNN``.

    Raises:
        UserError: resume was asked for and there is nothing to resume.
    """
    if given:
        return Path(given)
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(recipe_name).stem)[:80] or "run"
    pattern = re.compile(re.escape(stem) + r"-(\d{3,})$")
    numbers = sorted(int(m[1]) for path in root.glob(f"{stem}-*") if (m := pattern.match(path.name)))
    if not resume:
        return root / f"{stem}-{(numbers[-1] if numbers else 0) + 1:03d}"
    if not numbers:
        raise UserError(f"--resume: no run of recipe {recipe_name!r} in {root}{os.sep}; name one with --run-dir")
    return root / f"{stem}-{numbers[-1]:03d}"


def check_run_dir(run_dir: Path, recipe: Recipe, *, resume: bool) -> None:
    """Whether ``recipe`` may run in ``run_dir``; touches nothing.

    Raises:
        UserError: it is a file, it holds another run, or there is nothing to resume in it.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir: expected a directory, got the file {str(run_dir)!r}")
    stored = run_dir / "recipe.toml"
    if not resume:
        if run_dir.is_dir() and any(path.name != LOCK for path in run_dir.iterdir()):
            raise UserError(f"--run-dir: {str(run_dir)!r} is not empty; go on with --resume or name another directory")
        return
    if not stored.is_file():
        raise UserError(f"--resume: {str(run_dir)!r} holds no run (no recipe.toml)")
    differing = _differences(load_run_recipe(stored), recipe)
    if differing:
        key, old, new = differing[0]
        raise UserError(f"--run-dir: {str(run_dir)!r} belongs to another recipe: {key} is {old!r} there, {new!r} here")


def write_recipe(run_dir: Path, recipe: Recipe) -> None:
    """Create the directory and put the resolved recipe in it.

    Raises:
        UserError: the directory cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "recipe.toml", dump_recipe(recipe))
    except OSError as error:
        raise UserError(f"--run-dir: cannot write {str(run_dir)!r}: {error.strerror}") from error


def lock(run_dir: Path) -> IO[str]:
    """Make the directory if need be and hold it for this process, until the handle is closed.

    Raises:
        UserError: another process is training in it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = open(run_dir / LOCK, "w")  # noqa: SIM115  it is held as long as the run lasts
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        raise UserError(f"--run-dir: another process is training in {str(run_dir)!r}") from error
    return handle


def _differences(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """``(key, old, new)`` of settings that differ and must not; None where one of the two has no such key."""
    rows: list[tuple[str, Any, Any]] = []
    old_tree, new_tree = recipe_to_tree(old), recipe_to_tree(new)
    for section in new_tree:
        free = MAY_CHANGE.get(section, set())
        if section == "train" and new.train.lr_schedule == "cosine":
            free = set(free or ()) - {"num_steps"}  # the cosine's length is part of the method
        if free is None:
            continue
        before, now = (_flat(tree[section], section) for tree in (old_tree, new_tree))
        rows += [
            (key, before.get(key), now.get(key))
            for key in {**now, **before}
            if before.get(key) != now.get(key) and key.removeprefix(f"{section}.") not in free
        ]
    return rows


def _flat(tree: Any, where: str) -> dict[str, Any]:
    """Dotted keys of nested tables; a list of tables is one value."""
    if not isinstance(tree, dict):
        return {where: tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{where}.{name}").items()}
