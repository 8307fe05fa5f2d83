"""The tokenizer's files, copied or derived."""

import json
import shutil

import pytest
from transformers import CLIPTokenizer

from fastcraft.errors import UserError
from fastcraft.weights.tokenizer_files import write_tokenizer

PROMPTS = ["a cat", "a cat, an über-café; 12 cats!", "", "<|endoftext|> at"]


@pytest.mark.parametrize("source", ["vocabulary", "tokenizer_json"])
def test_written_files_tokenise_alike(source, tokenizer_folder, tmp_path):
    original = CLIPTokenizer.from_pretrained(tokenizer_folder)
    folder = tokenizer_folder
    if source == "tokenizer_json":  # as transformers 5 saves it
        folder = tmp_path / "saved"
        original.save_pretrained(folder)
        assert not (folder / "vocab.json").exists()
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(folder, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    assert json.loads((out / "vocab.json").read_text()) == json.loads((tokenizer_folder / "vocab.json").read_text())
    assert (out / "merges.txt").read_text() == (tokenizer_folder / "merges.txt").read_text()
    special = json.loads((out / "special_tokens_map.json").read_text())
    assert (special["bos_token"], special["pad_token"]) == ("<|startoftext|>", "<|endoftext|>")
    reloaded = CLIPTokenizer.from_pretrained(out)
    assert reloaded(PROMPTS).input_ids == original(PROMPTS).input_ids
    assert reloaded.model_max_length == 77
    assert str(tmp_path.parent) not in "".join(path.read_text() for path in out.iterdir())


def test_a_folder_without_vocabulary_is_refused(tokenizer_folder, tmp_path):
    shutil.copy(tokenizer_folder / "vocab.json", tmp_path)
    with pytest.raises(UserError, match=r"tokenizer: no vocab\.json with merges\.txt and no tokenizer\.json"):
        write_tokenizer(tmp_path, tmp_path)
