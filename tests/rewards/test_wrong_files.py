"""What is in the place of weights and vocabularies: said in words, never a traceback; and all of it is listed."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from fastcraft.commands import info_rewards
from fastcraft.errors import UserError
from fastcraft.rewards import REWARDS
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.tensor_files import find_file, read_tensors

PAGE = b'\n<!DOCTYPE html>\n<html lang="en"><title>Sign in</title></html>\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 1786880927\n"
WRONG = {
    "page": (PAGE, "is a web page (HTML or XML)"),
    "old page": (b"\xef\xbb\xbf<HTML><HEAD>", "is a web page (HTML or XML)"),
    "error of a store": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "pointer": (POINTER, "is a git-lfs pointer to the file, not the file; `git lfs pull`"),
    "empty": (b"", "is an empty file"),
    "blank": (b"\n\n", "is a file of blanks"),
}


def build(name, path, **options):
    return REWARDS.get(name).build(str(path), towers=Towers(device="cpu", dtype=torch.float32), **options)


def refused(message, function, *args, **options):
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_weights_that_are_none(kind, ending, tmp_path):
    content, message = WRONG[kind]
    file = tmp_path / f"model.{ending}"
    file.write_bytes(content)
    assert repr(str(file)) in refused(message, read_tensors, file, reward="r")
    for name in ("hpsv2", "imagereward", "clip", "aesthetic"):
        refused(message, build, name, file)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_with_a_file_that_is_none(kind, name, copied):
    content, message = WRONG[kind]
    (copied / name).write_bytes(content)
    assert repr(str(copied / name)) in refused(message, build, "clip", copied)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(("reward", "name"), [("imagereward", "vocab.txt"), ("hpsv2", "tokenizer.json")])
def test_a_vocabulary_that_is_none(kind, reward, name, standins, tmp_path):
    content, message = WRONG[kind]
    (tmp_path / name).write_bytes(content)
    file = Path(standins[reward][0]) / REWARDS.get(reward).files[0].name
    said = refused(message, build, reward, file, tokenizer_path=str(tmp_path))
    assert repr(str(tmp_path / name)) in said


def test_a_detectors_model_that_is_a_page(tmp_path, mediapipe):
    (tmp_path / "face.tflite").write_bytes(PAGE)
    refused("face.tflite' of 'face' is a web page", build, "face", tmp_path / "face.tflite")


def test_a_page_in_the_cache_is_not_called_a_wrong_sum(tmp_path, monkeypatch):
    released = REWARDS.get("aesthetic").files[0]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / released.name).write_bytes(PAGE)
    refused("is a web page", find_file, "", released, reward="aesthetic")


PLACES = {
    "hpsv2": "needs CLIP's vocabulary (tokenizer.json, or vocab.json and merges.txt): ",
    "imagereward": "needs BERT's vocabulary (vocab.txt, or tokenizer.json): ",
}


@pytest.mark.parametrize("reward", PLACES)
def test_a_missing_vocabulary_says_what_is_missing_and_where(reward, standins, tmp_path):
    file = Path(standins[reward][0]) / REWARDS.get(reward).files[0].name
    (tmp_path / "vocab.json").write_text("{}")  # without its merges it is half of one
    (tmp_path / "other.bin").write_bytes(b"x")
    for place, message in (
        (tmp_path, f"folder {str(tmp_path)!r} does not hold it; give tokenizer_path"),
        (
            tmp_path / "nothing",
            f"there is nothing at {str(tmp_path / 'nothing')!r}; tokenizer_path must be a folder or",
        ),
        (tmp_path / "other.bin", "other.bin' is none of these files; tokenizer_path must be a folder or a hub id"),
        ("no such thing", "there is nothing at 'no such thing'; tokenizer_path must be a folder or a hub id"),
        ("some/where", "nor to be had from hub 'some/where' (LocalEntryNotFoundError); give tokenizer_path"),
    ):
        assert PLACES[reward] in refused(message, build, reward, file, tokenizer_path=str(place))


def test_damaged_vocabularies_are_one_line(standins, tmp_path):
    images = torch.rand(1, 3, 32, 32)
    for reward, name, content, message in (
        ("hpsv2", "tokenizer.json", b"{", f"cannot be read from {str(tmp_path)!r} ("),
        ("imagereward", "vocab.txt", b"\x80\xff\xfe", f"cannot be read from {str(tmp_path)!r} ("),
        ("imagereward", "vocab.txt", b"a\nb\nc\n", "the vocabulary must be that of google-bert/bert-base-uncased"),
    ):
        folder = Path(standins[reward][0])
        file = folder / REWARDS.get(reward).files[0].name
        (tmp_path / name).write_bytes(content)
        refused(message, build, reward, file, tokenizer_path=str(tmp_path))
        (tmp_path / name).unlink()
        # The file itself may be named as well as its folder.
        by_file = build(reward, file, tokenizer_path=str(folder / name))
        assert torch.equal(by_file(images, ["a cat"]), build(reward, folder)(images, ["a cat"]))


@pytest.fixture
def hub(tmp_path, monkeypatch, bundled, standins, make_head):
    """A hub cache and a folder of downloads with the stand-ins under the published names: exactly what is listed."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr("fastcraft.rewards.tensor_files._check_sum", lambda *args, **options: None)
    heads = tmp_path / "heads"
    heads.mkdir()
    torch.save(make_head(), heads / "sac+logos+ava1-l14-linearMSE.pth")

    def put(released):
        folder = released.cache_folder()
        if released.repo:
            (folder / "refs").mkdir(parents=True, exist_ok=True)
            (folder / "refs" / "main").write_text("abc")
            folder = folder / "snapshots" / "abc"
        folder.mkdir(parents=True, exist_ok=True)
        sources = [heads, bundled, *(Path(path) for path, _ in standins.values() if path.startswith("/"))]
        source = next(place / released.name for place in sources if (place / released.name).is_file())
        shutil.copyfile(source, folder / released.name)
        return folder / released.name

    return put


WITH_FILES = [name for name in REWARDS.names() if REWARDS.get(name).files]


@pytest.mark.parametrize("name", WITH_FILES)
def test_the_files_that_are_listed_are_all_that_is_needed(name, hub, mediapipe):
    places = [hub(released) for released in REWARDS.get(name).files]
    reward = build(name, "")
    scores = reward(torch.rand(1, 3, 32, 32), ["a cat"])
    assert torch.isfinite(scores).all()
    for place in places:
        content = place.read_bytes()
        place.unlink()
        with pytest.raises(UserError):
            build(name, "")
        place.write_bytes(content)


def test_info_says_which_are_there(hub, capsys):
    released = REWARDS.get("hpsv2").files
    there = hub(released[1])
    assert info_rewards.run(None) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if "HPS_v2_compressed.pt from hub xswu/HPSv2" in line)
    assert lines[start + 1].strip() == f"not in {released[0].cache_folder()}"
    assert "tokenizer.json (or vocab.json and merges.txt) from hub openai/clip-vit-large-patch14" in lines[start + 2]
    assert lines[start + 3].strip() == f"found: {there}"


def test_what_serves_instead_counts_as_found(hub):
    vocabulary = REWARDS.get("hpsv2").files[1]
    folder = hub(vocabulary).parent
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    assert vocabulary.cached() is None, "half of it"
    (folder / "merges.txt").write_text("")
    assert vocabulary.cached() == folder / "vocab.json"
