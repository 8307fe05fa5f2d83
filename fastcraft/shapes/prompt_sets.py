"""The prompt files that ship with the package, drawn from fixed seeds: `python -m fastcraft.shapes.prompt_sets`."""

from __future__ import annotations

import random
from pathlib import Path

from fastcraft.shapes.captions import sample_claims, write_long, write_short
from fastcraft.shapes.scenes import sample_scene

FOLDER = Path(__file__).parent / "prompts"
FILES = ("held_out_one", "held_out_two", "long", "train")

NUM_HELD_OUT = 200
NUM_LONG = 100
NUM_TRAIN = 2000
UNSEEN_SHARE = 5
"""Every fifth held-out caption has a combination that training never shows."""

LONG_WORDS = 76
"""A long caption has more words and full stops than this, so that it passes 77 tokens."""


def _held_out(num_things: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    chosen: dict[str, bool] = {}
    while len(chosen) < NUM_HELD_OUT:
        scene = sample_scene(rng, num_things=num_things, held_out=len(chosen) % UNSEEN_SHARE == 0)
        chosen[write_short(rng, sample_claims(rng, scene))] = True
    return list(chosen)


def _long(seed: int) -> list[str]:
    rng = random.Random(seed)
    chosen: dict[str, bool] = {}
    while len(chosen) < NUM_LONG:
        scene = sample_scene(rng, num_things=rng.choice((2, 3, 3)))
        claims = sample_claims(rng, scene, detail=0.8, relation=0.9, background=0.8)
        caption = write_long(rng, claims)
        if len(caption.split()) + caption.count(".") > LONG_WORDS:
            chosen[caption] = True
    return list(chosen)


def _train(seed: int, forbidden: set[str]) -> list[str]:
    rng = random.Random(seed)
    chosen: dict[str, bool] = {}
    while len(chosen) < NUM_TRAIN:
        scene = sample_scene(rng, num_things=rng.choice((1, 2, 2)))
        caption = write_short(rng, sample_claims(rng, scene))
        if caption not in forbidden:
            chosen[caption] = True
    return list(chosen)


def held_out_captions() -> set[str]:
    """Every caption that nothing may be trained on."""
    return {*_held_out(1, 101), *_held_out(2, 102)}


def make_prompts() -> dict[str, list[str]]:
    """Captions of every prompt file, by the file's name without `.txt`."""
    return {
        "held_out_one": _held_out(1, 101),
        "held_out_two": _held_out(2, 102),
        "long": _long(103),
        "train": _train(104, held_out_captions()),
    }


def load_prompts(name: str) -> list[str]:
    """Captions of one shipped prompt file.

    Raises:
        ValueError: there is no such file.
    """
    if name not in FILES:
        raise ValueError(f"name must be one of {', '.join(FILES)}, got {name!r}")
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def main() -> None:
    """Write all prompt files."""
    FOLDER.mkdir(exist_ok=True)
    for name, captions in make_prompts().items():
        (FOLDER / f"{name}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
