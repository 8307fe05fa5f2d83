"""Texts reach each reward's model as its official tokenizer would hand them on."""

import pytest
import torch
from transformers import CLIPTokenizer

from fastcraft.rewards import REWARDS
from fastcraft.rewards.clean_text import clean_open_clip_text, clean_text
from fastcraft.rewards.clip_tower import Towers

CASES = {
    "curly quotes": ("\u201cA cat\u2019s hat\u201d", '"a cat\'s hat"'),
    "an entity": ("salt &amp; pepper", "salt & pepper"),
    "an entity escaped twice": ("salt &amp;amp; pepper &lt;3", "salt & pepper <3"),
    "full-width letters": ("\uff21 \uff23\uff21\uff34", "a cat"),
    "ligatures": ("a \ufb01sh in a \ufb02ow", "a fish in a flow"),
    "wrongly decoded": ("un caf\u00c3\u00a9", "un caf\u00e9"),
    "accents put together": ("un cafe\u0301", "un caf\u00e9"),
    "white space": ("  a\u00a0red\n\n cube\t", "a red cube"),
    "control characters": ("a \x1b[31mred\x1b[0m cube", "a red cube"),
    "the sigma at a word's end": ("\u039f\u0394\u039f\u03a3", "\u03bf\u03b4\u03bf\u03c2"),
    "nothing": (" ", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_text_is_cleaned_as_by_openai(case):
    text, cleaned = CASES[case]
    assert clean_text(text) == cleaned
    assert clean_open_clip_text(text) == cleaned
    assert clean_text(cleaned) == cleaned


def test_open_clips_marks_are_marks_and_openais_are_text(bundled):
    tokenizer = CLIPTokenizer.from_pretrained(bundled)

    def ids(text):
        return tokenizer(clean_open_clip_text(text)).input_ids[1:-1]

    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids("a <start_of_text> b <END_OF_TEXT>") == [*ids("a"), begin, *ids("b"), end]
    for text in ("a <|endoftext|> b", "a &lt;|startoftext|&gt; b"):
        assert not {begin, end} & set(ids(text)), "a prompt does not end itself"
    assert tokenizer(clean_text("a <|endoftext|> b")).input_ids[2] == end, "to OpenAI's tokenizer it is the mark"


@pytest.fixture(scope="module")
def build(bundled, standins):
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)

    def make(name, **more):
        path, options = standins[name]
        return REWARDS.get(name).build(path, towers=towers, **options, **more)

    return make


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["clip", "hpsv2", "hpsv2.1"])
def test_the_score_is_that_of_the_cleaned_text(name, case, build):
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text, cleaned = CASES[case]
    assert torch.equal(build(name)(images, [text]), build(name)(images, [cleaned]))


@torch.no_grad()
def test_the_prefix_is_cleaned_with_the_prompt(build):
    images = torch.rand(1, 3, 32, 32)
    reward = build("clip", prefix="\u201cA PHOTO\u201d &amp; ")
    assert torch.equal(reward(images, ["lt; b"]), build("clip")(images, ['"a photo" & lt; b']))


@torch.no_grad()
@pytest.mark.parametrize("name", ["pickscore", "denscore"])
def test_transformers_processor_does_not_clean(name, build):
    """Their official processor leaves entities and quotes as they are, and so does the reward."""
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reward = build(name)
    for case in ("curly quotes", "an entity", "full-width letters", "ligatures", "wrongly decoded"):
        text, cleaned = CASES[case]
        assert not torch.equal(reward(images, [text]), reward(images, [cleaned])), case
    for case in ("accents put together", "nothing"):
        text, cleaned = CASES[case]
        assert torch.equal(reward(images, [text]), reward(images, [cleaned])), case
    assert torch.equal(reward(images, ["A  red\tCUBE"]), reward(images, ["a red cube"]))
