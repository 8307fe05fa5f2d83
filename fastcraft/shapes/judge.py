"""The judge: which claims of a caption does a picture fulfil? Nothing learned, never a reward: it is the exam."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from torch import Tensor

from fastcraft.shapes.captions import Claims, ThingClaim, parse
from fastcraft.shapes.detect import Blob, Sighting, look
from fastcraft.shapes.scenes import relation_between

MAX_BLOBS = 6
"""Of more blobs than this only the largest are matched with the caption; all of them count."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One claim and whether it holds."""

    kind: str
    """`color`, `shape`, `size`, `pattern`, `relation`, `count` or `background`."""
    thing: int | None
    """Index of the object in the caption; None for `count` and `background`."""
    claimed: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge says about one picture and its caption."""

    findings: tuple[Finding, ...]
    num_things: int
    """Objects that the caption names."""

    @property
    def fully_right(self) -> bool:
        return all(finding.holds for finding in self.findings)


def _thing_findings(index: int, claim: ThingClaim, blob: Blob | None) -> list[Finding]:
    asked = {"color": claim.color, "shape": claim.shape, "size": claim.size, "pattern": claim.pattern}
    return [
        Finding(kind, index, word, blob is not None and getattr(blob, kind) == word)
        for kind, word in asked.items()
        if word is not None
    ]


def _findings(claims: Claims, blobs: Sequence[Blob | None]) -> list[Finding]:
    """Findings about objects and relations when caption object i is taken to be `blobs[i]`."""
    findings = [f for i, claim in enumerate(claims.things) for f in _thing_findings(i, claim, blobs[i])]
    for relation in claims.relations:
        first, second = blobs[relation.first], blobs[relation.second]
        seen = None
        if first is not None and second is not None:
            seen = relation_between(first.x - second.x, first.y - second.y)
        findings.append(Finding("relation", relation.first, relation.relation, seen == relation.relation))
    return findings


def compare(sighting: Sighting, claims: Claims) -> Verdict:
    """Match what is seen with what is claimed, in the way that is kindest to the picture."""
    candidates: list[Blob | None] = list(sorted(sighting.blobs, key=lambda blob: -blob.area)[:MAX_BLOBS])
    candidates += [None] * max(0, len(claims.things) - len(candidates))
    options = (_findings(claims, choice) for choice in permutations(candidates, len(claims.things)))
    findings = max(options, key=lambda option: sum(finding.holds for finding in option))
    count = len(claims.things)
    findings.append(Finding("count", None, str(count), len(sighting.blobs) == count))
    if claims.background is not None:
        findings.append(Finding("background", None, claims.background, sighting.background == claims.background))
    return Verdict(tuple(findings), count)


def judge(image: Tensor, caption: str) -> Verdict:
    """Judge one picture by its caption.

    Args:
        image: (3, 64, 64) floating point, RGB in [0, 1].
        caption: text of the grammar in `fastcraft.shapes.captions`.

    Raises:
        ValueError: the caption is outside the grammar, or the picture has another shape.
    """
    return compare(look(image[None])[0], parse(caption))


def judge_all(images: Tensor, prompts: Sequence[str]) -> list[Verdict]:
    """Judge (B, 3, 64, 64) pictures by B captions.

    Raises:
        ValueError: there are not as many prompts as pictures.
    """
    if len(images) != len(prompts):
        raise ValueError(f"prompts must be one for each of the {len(images)} images, got {len(prompts)}")
    return [compare(seen, parse(prompt)) for seen, prompt in zip(look(images), prompts, strict=True)]


def summarize(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of what holds, by kind of claim and of captions fully right; kinds that nobody asked for are absent."""
    tally: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        right = verdict.fully_right
        tally["fully_right"].append(right)
        if verdict.num_things <= 3:
            tally[f"{('one', 'two', 'three')[verdict.num_things - 1]}_object_fully_right"].append(right)
        for finding in verdict.findings:
            tally[finding.kind].append(finding.holds)
    return {name: sum(values) / len(values) for name, values in tally.items()}


def exam(images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Examine pictures against their prompts.

    Args:
        images: (B, 3, 64, 64) floating point, RGB in [0, 1].
        prompts: B captions of the grammar.

    Returns:
        Fractions in [0, 1]: `fully_right`, `one_object_fully_right`, `two_object_fully_right`,
        `three_object_fully_right`, `color`, `shape`, `size`, `pattern`, `relation`, `count`, `background`.
        A key is absent where no caption asked.
    """
    return summarize(judge_all(images, prompts))
