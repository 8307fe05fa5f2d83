"""Captions: a small grammar that describes scenes, and `parse`, its exact inverse."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from fastcraft.shapes.scenes import BACKGROUNDS, COLORS, PATTERNS, SHAPES, SIZES, Kind, Scene, relation_between

STATED_MARGIN = 1.25
STATED_MIN_OFFSET = 10.0
"""A relation is put into words only where it is plain to see; the judge asks for less."""

RELATION_WORDS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
NUMBERS = ("one", "two", "three")
PREFIXES = ("", "a picture of ", "a drawing of ", "there is ")
JOINERS = ("and", "next to", "with")
BACKDROPS = ("on a {} background", "in front of a {} background")
FILLERS = ("Nothing else is in the picture.", "The picture is simple and flat.")


@dataclass(frozen=True, slots=True)
class ThingClaim:
    """What a caption says about one object; None where it says nothing."""

    color: str
    shape: str
    size: str | None = None
    pattern: str | None = None

    @property
    def kind(self) -> Kind:
        return self.color, self.shape


@dataclass(frozen=True, slots=True)
class RelationClaim:
    """Objects `first` and `second`, by index, and the word of `RELATIONS` that the caption puts between them."""

    first: int
    second: int
    relation: str


@dataclass(frozen=True, slots=True)
class Claims:
    """Everything that a caption says. Objects that it does not name are claimed to be absent."""

    things: tuple[ThingClaim, ...]
    relations: tuple[RelationClaim, ...] = ()
    background: str | None = None


def sample_claims(
    rng: random.Random, scene: Scene, *, detail: float = 0.4, relation: float = 0.5, background: float = 0.35
) -> Claims:
    """Choose what to say about a scene: color and shape always, the rest each with its probability."""
    order = rng.sample(range(len(scene.things)), len(scene.things))
    chosen = [scene.things[index] for index in order]
    things = tuple(
        ThingClaim(
            thing.color,
            thing.shape,
            thing.size if rng.random() < detail else None,
            thing.pattern if rng.random() < detail else None,
        )
        for thing in chosen
    )
    relations = []
    for second in range(1, len(chosen)):
        first = second - 1
        x_offset, y_offset = chosen[first].x - chosen[second].x, chosen[first].y - chosen[second].y
        word = relation_between(x_offset, y_offset, margin=STATED_MARGIN, min_offset=STATED_MIN_OFFSET)
        if word is not None and rng.random() < relation:
            relations.append(RelationClaim(first, second, word))
    return Claims(things, tuple(relations), scene.background if rng.random() < background else None)


def _phrase(rng: random.Random, claim: ThingClaim) -> str:
    adjectives = [claim.pattern, claim.color] if rng.random() < 0.5 else [claim.color, claim.pattern]
    return " ".join(word for word in ("a", claim.size, *adjectives, claim.shape) if word)


def write_short(rng: random.Random, claims: Claims) -> str:
    """One line about one or two objects, without a full stop, in one of several phrasings.

    Raises:
        ValueError: there are more than two objects to describe.
    """
    if len(claims.things) > 2:
        raise ValueError(f"claims must name at most two objects for a short caption, got {len(claims.things)}")
    text = rng.choice(PREFIXES) + _phrase(rng, claims.things[0])
    if len(claims.things) == 2:
        joiner = rng.choice(RELATION_WORDS[claims.relations[0].relation] if claims.relations else JOINERS)
        text += f" {joiner} {_phrase(rng, claims.things[1])}"
    if claims.background:
        text += " " + rng.choice(BACKDROPS).format(claims.background)
    return text


def write_long(rng: random.Random, claims: Claims, *, max_sentences: int = 10) -> str:
    """Up to ten sentences about one to three objects. What does not fit into `max_sentences` goes unsaid.

    Raises:
        ValueError: `max_sentences` leaves no room to name every object.
    """
    count = len(claims.things)
    if max_sentences < count + 1:
        raise ValueError(f"max_sentences must be at least {count + 1} for {count} objects, got {max_sentences}")
    names = [f"{claim.color} {claim.shape}" for claim in claims.things]
    there = "is one object" if count == 1 else f"are {NUMBERS[count - 1]} objects"
    opening = [f"There {there} in the picture."]
    opening += [f"{'One' if i == 0 else 'Another'} object is a {name}." for i, name in enumerate(names)]
    details = [f"The {names[i]} is {c.size}." for i, c in enumerate(claims.things) if c.size]
    details += [f"The {names[i]} is {c.pattern}." for i, c in enumerate(claims.things) if c.pattern]
    for claim in claims.relations:
        word = rng.choice(RELATION_WORDS[claim.relation])
        details.append(f"The {names[claim.first]} is {word} the {names[claim.second]}.")
    if claims.background:
        details.append(f"The background is {claims.background}.")
    rng.shuffle(details)
    room = max_sentences - len(opening)
    fillers = list(FILLERS) if room > len(details) and rng.random() < 0.5 else []
    return " ".join((opening + details + fillers)[:max_sentences])


def _any_of(words: tuple[str, ...] | dict[str, object]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_THING = (
    rf"a (?:(?:{_any_of(SIZES)}) )?(?:(?:{_any_of(PATTERNS)}) )?"
    rf"(?:{_any_of(tuple(COLORS))}) (?:(?:{_any_of(PATTERNS)}) )?(?:{_any_of(SHAPES)})"
)
_WORD_RELATION = {word: relation for relation, words in RELATION_WORDS.items() for word in words}
_BETWEEN = _any_of((*JOINERS, *_WORD_RELATION))
_SHORT = re.compile(
    rf"(?:{_any_of(tuple(p for p in PREFIXES if p))})?(?P<first>{_THING})"
    rf"(?: (?P<between>{_BETWEEN}) (?P<second>{_THING}))?"
    rf"(?: (?:on|in front of) a (?P<background>{_any_of(tuple(BACKGROUNDS))}) background)?"
)
_NAME = rf"(?:{_any_of(tuple(COLORS))}) (?:{_any_of(SHAPES)})"
_NAMED = re.compile(rf"(?:one|another) object is a (?P<name>{_NAME})")
_DETAIL = re.compile(rf"the (?P<name>{_NAME}) is (?P<value>{_any_of(SIZES + PATTERNS)})")
_RELATED = re.compile(
    rf"the (?P<first>{_NAME}) is (?P<between>{_any_of(tuple(_WORD_RELATION))}) the (?P<second>{_NAME})"
)
_BACKGROUND = re.compile(rf"the background is (?P<background>{_any_of(tuple(BACKGROUNDS))})")
_COUNTED = re.compile(rf"there (?:is|are) (?P<number>{_any_of(NUMBERS)}) objects? in the picture")


def _thing_claim(phrase: str) -> ThingClaim:
    words = phrase.split()
    size = next((word for word in words if word in SIZES), None)
    pattern = next((word for word in words if word in PATTERNS), None)
    return ThingClaim(next(word for word in words if word in COLORS), words[-1], size, pattern)


def _parse_long(caption: str) -> Claims:
    sentences = [sentence.strip() for sentence in caption.split(".") if sentence.strip()]
    details: dict[str, dict[str, str]] = {}
    relations_said: list[tuple[str, str, str]] = []
    number, background = None, None
    for sentence in sentences:
        if match := _COUNTED.fullmatch(sentence):
            number = NUMBERS.index(match["number"]) + 1
        elif match := _NAMED.fullmatch(sentence):
            details[match["name"]] = {}
        elif (match := _DETAIL.fullmatch(sentence)) and match["name"] in details:
            details[match["name"]]["size" if match["value"] in SIZES else "pattern"] = match["value"]
        elif match := _RELATED.fullmatch(sentence):
            relations_said.append((match["first"], match["second"], _WORD_RELATION[match["between"]]))
        elif match := _BACKGROUND.fullmatch(sentence):
            background = match["background"]
        elif f"{sentence}." not in {filler.lower() for filler in FILLERS}:
            raise ValueError(f"caption must follow the grammar of fastcraft.shapes.captions, got sentence {sentence!r}")
    names = list(details)
    if number != len(names) or not all(a in details and b in details for a, b, _ in relations_said):
        raise ValueError(f"caption must name each object that it counts or relates, got {caption!r}")
    things = tuple(ThingClaim(*name.split(), **details[name]) for name in names)
    relations = tuple(RelationClaim(names.index(a), names.index(b), word) for a, b, word in relations_said)
    return Claims(things, relations, background)


def parse(caption: str) -> Claims:
    """Read a caption back into what it claims.

    Raises:
        ValueError: the text is not one that this grammar can write.
    """
    text = " ".join(caption.lower().split())
    if text.endswith("."):
        return _parse_long(text)
    match = _SHORT.fullmatch(text)
    if match is None:
        raise ValueError(f"caption must follow the grammar of fastcraft.shapes.captions, got {caption!r}")
    things = [_thing_claim(match["first"])]
    relations: tuple[RelationClaim, ...] = ()
    if match["second"]:
        things.append(_thing_claim(match["second"]))
        if match["between"] in _WORD_RELATION:
            relations = (RelationClaim(0, 1, _WORD_RELATION[match["between"]]),)
    return Claims(tuple(things), relations, match["background"])
