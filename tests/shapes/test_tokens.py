"""The tokenizer: one token per caption word, readable as two plain files."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from fastcraft.shapes.prompt_sets import FILES, load_prompts
from fastcraft.shapes.tokens import save_tokenizer, words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= {file.name for file in folder.iterdir()}
    return CLIPTokenizer.from_pretrained(folder)


def test_every_caption_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    captions = [caption for name in FILES for caption in load_prompts(name)]
    used = {word for caption in captions for word in caption.lower().replace(".", " ").split()}
    assert used <= set(words())
    assert all(tokenizer.tokenize(word) == [f"{word}</w>"] for word in words())


def test_long_prompts_pass_what_the_encoder_can_read(tokenizer: CLIPTokenizer) -> None:
    lengths = [len(ids) for ids in tokenizer(load_prompts("long"))["input_ids"]]
    assert min(lengths) > tokenizer.model_max_length == 77
    short = tokenizer(load_prompts("train") + load_prompts("held_out_two"))["input_ids"]
    assert max(map(len, short)) <= 40


def test_other_words_fall_back_to_letters(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.decode(tokenizer("a zebra!")["input_ids"], skip_special_tokens=True).split() == ["a", "zebra", "!"]


def test_padding_is_the_end_token(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    ids = tokenizer("a red circle", padding="max_length", max_length=8)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[4:] == [tokenizer.eos_token_id] * 4 == [tokenizer.pad_token_id] * 4
    assert tokenizer.eos_token_id != 2
