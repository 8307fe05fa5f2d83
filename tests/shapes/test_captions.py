"""The grammar and its parser are inverses, and wrong captions are wrong."""

from __future__ import annotations

import random

import pytest

from fastcraft.shapes.captions import Claims, parse, sample_claims, write_long, write_short
from fastcraft.shapes.negatives import change_attribute, swap_attribute, wrong_claims
from fastcraft.shapes.prompt_sets import FILES, FOLDER, load_prompts, make_prompts
from fastcraft.shapes.scenes import HELD_OUT_KINDS, HELD_OUT_PAIRS, is_held_out, sample_scene


def draw(seed: int, num_things: int, count: int = 300) -> list[Claims]:
    rng = random.Random(seed)
    scenes = [sample_scene(rng, num_things=num_things, held_out=None) for _ in range(count)]
    return [sample_claims(rng, scene, detail=0.6, relation=0.7, background=0.6) for scene in scenes]


@pytest.mark.parametrize("num_things", [1, 2])
def test_parse_inverts_short_captions(num_things: int) -> None:
    rng = random.Random(0)
    for claims in draw(1, num_things):
        assert parse(write_short(rng, claims)) == claims


@pytest.mark.parametrize("num_things", [1, 2, 3])
def test_parse_inverts_long_captions(num_things: int) -> None:
    rng = random.Random(0)
    for claims in draw(2, num_things):
        read = parse(write_long(rng, claims, max_sentences=20))
        assert (read.things, read.background) == (claims.things, claims.background)
        assert set(read.relations) == set(claims.relations)


def test_several_phrasings_are_used() -> None:
    rng, claims = random.Random(0), draw(3, 2)[0]
    assert len({write_short(rng, claims) for _ in range(200)}) >= 8


@pytest.mark.parametrize(
    "caption",
    [
        "a pink circle",
        "a red circle and",
        "two circles",
        "There are two objects in the picture.",
        "The red circle is small.",
        "There is one object in the picture. One object is a red circle. It is nice.",
    ],
)
def test_text_outside_the_grammar_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="caption must"):
        parse(caption)


def test_too_many_objects_for_a_short_caption_are_refused() -> None:
    with pytest.raises(ValueError, match="at most two objects"):
        write_short(random.Random(0), draw(4, 3)[0])


def test_wrong_captions_differ_and_hold_nothing_back() -> None:
    rng = random.Random(5)
    for scene in (sample_scene(rng, num_things=rng.choice((1, 2, 3))) for _ in range(300)):
        claims = sample_claims(rng, scene)
        wrong = wrong_claims(rng, claims)
        assert wrong != claims
        assert not is_held_out(tuple(thing.kind for thing in wrong.things))


def test_a_swap_keeps_the_words_and_a_change_changes_one() -> None:
    rng = random.Random(6)
    for claims in draw(6, 2):
        changed, kind = change_attribute(rng, claims)
        assert changed != claims
        assert kind in {"color", "shape", "size", "pattern", "relation", "background"}
        swapped = swap_attribute(rng, claims)
        if swapped is not None:
            assert set(swapped.things) != set(claims.things) or swapped.relations
            for name in ("color", "shape", "size", "pattern"):
                before, after = ({str(getattr(t, name)) for t in c.things} for c in (claims, swapped))
                assert before == after


def test_prompt_files_can_be_made_again() -> None:
    for name, captions in make_prompts().items():
        assert (FOLDER / f"{name}.txt").read_bytes() == ("\n".join(captions) + "\n").encode()


def test_prompt_files_have_the_promised_sizes() -> None:
    sizes = {name: len(set(load_prompts(name))) for name in FILES}
    assert sizes == {"held_out_one": 200, "held_out_two": 200, "long": 100, "train": 2000}
    ones = sum(len(parse(caption).things) == 1 for caption in load_prompts("train"))
    assert 0.20 < ones / 2000 < 0.40
    with pytest.raises(ValueError, match="name must be one of"):
        load_prompts("tests")


def test_training_prompts_hold_nothing_that_is_held_out() -> None:
    held_out = {*load_prompts("held_out_one"), *load_prompts("held_out_two")}
    for caption in load_prompts("train"):
        kinds = [thing.kind for thing in parse(caption).things]
        assert caption not in held_out
        assert not HELD_OUT_KINDS & set(kinds)
        assert frozenset(kinds) not in HELD_OUT_PAIRS


def test_held_out_prompts_cover_what_is_held_out() -> None:
    for name in ("held_out_one", "held_out_two"):
        unseen = [is_held_out(tuple(t.kind for t in parse(caption).things)) for caption in load_prompts(name)]
        assert 0.15 < sum(unseen) / len(unseen) < 0.25


def test_long_captions_have_at_most_ten_sentences() -> None:
    assert all(5 <= caption.count(".") <= 10 for caption in load_prompts("long"))


def test_a_turned_relation_changes_nothing_else() -> None:
    claims = parse("a red circle left of a blue square on a white background")
    wrong = wrong_claims(random.Random(0), claims, turn=1.0)
    assert [relation.relation for relation in wrong.relations] == ["right"]
    assert (wrong.things, wrong.background) == (claims.things, claims.background)
