"""Where weights are looked for, and what is refused: foreign, half matching, damaged, another file under the name."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastcraft.errors import UserError
from fastcraft.rewards import REWARDS
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.open_clip import load_open_clip
from fastcraft.rewards.tensor_files import ReleasedFile, filled, find_file, read_tensors

RELEASED = ReleasedFile(name="model.pt", repo="someone/something")


def test_a_file_and_a_folder_with_it_are_found(tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"x")
    assert find_file(str(file), RELEASED, reward="r") == file
    assert find_file(str(tmp_path), RELEASED, reward="r") == file


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"'r' needs model.pt: not in the hub cache \(/.*\), and not to be had from hub someone/something \(.*\)"),
        ("another/place", "not to be had from hub another/place"),
        ("/nowhere/model.pt", "path of 'r' must be a file, a folder with model.pt or a hub id, and there is nothing"),
        ("weights/model.pt", "and there is nothing at 'weights/model.pt'"),
        ("shapes", "and there is nothing at 'shapes'"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(path, message):
    with pytest.raises(UserError, match=message) as error:
        find_file(path, RELEASED, reward="r")
    assert "\n" not in str(error.value)


def test_a_folder_without_it_names_both(tmp_path):
    with pytest.raises(UserError, match=r"'r' looked for model.pt in folder '.*': it is not there"):
        find_file(str(tmp_path), RELEASED, reward="r")


def test_a_copy_of_the_released_size_must_have_its_hash(tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"good")
    known = ReleasedFile(name="model.pt", repo="a/b", sha256=hashlib.sha256(b"good").hexdigest(), num_bytes=4)
    assert find_file(str(file), known, reward="r") == file
    file.write_bytes(b"evil")
    with pytest.raises(UserError, match=r"is not the released file of 'r' \(wrong SHA-256\); delete it"):
        find_file(str(file), known, reward="r")
    file.write_bytes(b"my own")
    assert find_file(str(file), known, reward="r") == file, "another size: a file of one's own"


def test_the_hubs_copy_is_found_in_the_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    snapshot = tmp_path / "models--someone--something" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.pt").write_bytes(b"x")
    refs = tmp_path / "models--someone--something" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(file_download.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_file("", RELEASED, reward="r").read_bytes() == b"x"
    assert RELEASED.cached() == snapshot / "model.pt"
    assert ReleasedFile(name="other.pt", repo="someone/something").cached() is None


TENSORS = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "safetensors"])
@pytest.mark.parametrize("form", ["plain", "nested", "parallel"])
def test_every_form_is_read(ending, form, tmp_path):
    file = tmp_path / f"model.{ending}"
    tensors = {f"module.{name}": tensor for name, tensor in TENSORS.items()} if form == "parallel" else TENSORS
    if ending == "safetensors":
        save_file(tensors, file)
    else:
        torch.save({"state_dict": tensors, "epoch": 3} if form == "nested" else tensors, file)
    assert read_tensors(file, reward="r").keys() == TENSORS.keys()


def test_old_files_that_are_no_archives_are_read(tmp_path):
    torch.save(TENSORS, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(tmp_path / "model.pt", reward="r")["weight"], TENSORS["weight"])


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_truncated_file_is_refused(keep, ending, tmp_path):
    file = tmp_path / f"model.{ending}"
    (save_file if ending == "safetensors" else torch.save)({"weight": torch.ones(100, 100)}, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match="model") as error:
        read_tensors(file, reward="r")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_is_filled_with_exactly_the_file(dtype):
    module = filled(lambda: nn.Linear(3, 2), TENSORS, dtype=dtype, source="f")
    assert module.weight.dtype == dtype
    assert torch.equal(module.weight.float(), TENSORS["weight"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.ones(2, 3)}, "missing: bias; unexpected: none"),
        ({**TENSORS, "x": torch.ones(1)}, "missing: none; unexpected: x"),
        ({**TENSORS, "bias": torch.ones(5)}, r"of another shape: bias \(5,\) instead of \(2,\)"),
    ],
)
def test_half_matching_weights_are_refused(tensors, message):
    with pytest.raises(UserError, match=message):
        filled(lambda: nn.Linear(3, 2), tensors, dtype=torch.float32, source="f")


def damaged(name, standins, tmp_path, change):
    """A reward built from its stand-in's folder after ``change`` was made to the tensors in it."""
    folder = Path(standins[name][0])
    released = REWARDS.get(name).files[0].name
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = torch.load(tmp_path / released, weights_only=True)
    tensors = content.get("state_dict", content)
    change(tensors)
    torch.save(content, tmp_path / released)
    return REWARDS.get(name).build(str(tmp_path), towers=Towers(device="cpu", dtype=torch.float32))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hpsv2", lambda t: t.pop("visual.proj"), "missing: visual.proj; unexpected: none"),
        ("hpsv2", lambda t: t.update(extra=torch.ones(1)), "missing: none; unexpected: extra"),
        (
            "hpsv2",
            lambda t: t.pop("transformer.resblocks.0.attn.in_proj_weight"),
            "missing: transformer.resblocks.0.attn.in_proj_weight",
        ),
        ("hpsv2", lambda t: t.update({"ln_final.bias": torch.ones(3)}), "text_model.final_layer_norm.bias (3,)"),
        ("hpsv2", lambda t: t.clear() or t.update(a=torch.ones(1)), "and 35 more; unexpected: a"),
        ("hpsv2", lambda t: t.update({"visual.class_embedding": torch.ones(70)}), "70 is no multiple of the head"),
        (
            "imagereward",
            lambda t: t.pop("blip.visual_encoder.blocks.1.norm1.bias"),
            "missing: encoder.layers.1.layer_norm1.bias",
        ),
        ("imagereward", lambda t: t.pop("mlp.layers.7.bias"), "missing: mlp.layers.7.bias"),
        (
            "imagereward",
            lambda t: t.update({"blip.itm_head.weight": torch.ones(1)}),
            "unexpected: blip.itm_head.weight",
        ),
        (
            "imagereward",
            lambda t: t.update({"blip.text_encoder.pooler.dense.weight": torch.ones(1)}),
            "unexpected: pooler.dense.weight",
        ),
        (
            "imagereward",
            lambda t: t.update({"blip.text_encoder.embeddings.word_embeddings.weight": torch.ones(9, 128)}),
            "its tokenizer has 59 ids with [DEC] and [ENC], its model 9; the vocabulary must be",
        ),
        ("imagereward", lambda t: t.clear() or t.update(a=torch.ones(1)), "unexpected: a"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(name, change, message, standins, tmp_path):
    with pytest.raises(UserError) as error:
        damaged(name, standins, tmp_path, change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_old_causal_mask_is_no_mistake(standins, tmp_path):
    images, prompts = torch.rand(2, 3, 32, 32), ["a cat", "a dog"]
    (tmp_path / "masked").mkdir()
    (tmp_path / "plain").mkdir()
    masked = damaged(
        "hpsv2", standins, tmp_path / "masked", lambda tensors: tensors.update(attn_mask=torch.zeros(77, 77))
    )
    plain = damaged("hpsv2", standins, tmp_path / "plain", lambda tensors: None)
    assert torch.equal(masked(images, prompts), plain(images, prompts))


def test_a_missing_vocabulary_says_where_it_looked(standins, tmp_path):
    for name, released, message in (
        ("hpsv2", "HPS_v2_compressed.pt", "needs CLIP's vocabulary .*'openai/clip-vit-large-patch14'.*tokenizer_path"),
        ("imagereward", "ImageReward.pt", "needs BERT's vocabulary .*'google-bert/bert-base-uncased'.*tokenizer_path"),
    ):
        (tmp_path / released).write_bytes((Path(standins[name][0]) / released).read_bytes())
        with pytest.raises(UserError, match=message) as error:
            REWARDS.get(name).build(str(tmp_path), towers=Towers(device="cpu", dtype=torch.float32))
        assert "\n" not in str(error.value)
        reward = REWARDS.get(name).build(
            str(tmp_path), towers=Towers(device="cpu", dtype=torch.float32), tokenizer_path=standins[name][0]
        )
        assert reward(torch.rand(1, 3, 32, 32), ["a cat"]).shape == (1,)


def test_clip_reads_open_clip_files_and_folders(standins, tmp_path):
    folder = Path(standins["hpsv2"][0])
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = torch.load(folder / "HPS_v2_compressed.pt", weights_only=True)
    save_file({k: v.contiguous() for k, v in content["state_dict"].items()}, tmp_path / "open_clip_model.safetensors")
    towers = Towers(device="cpu", dtype=torch.float32)
    clip = REWARDS.get("clip").build(str(tmp_path), towers=towers, head_width=80)
    hps = REWARDS.get("hpsv2").build(str(folder), towers=towers)
    images = torch.rand(2, 3, 40, 40)
    assert torch.equal(clip(images, ["a", "b"]), hps(images, ["a", "b"]))
    quick = REWARDS.get("clip").build(str(tmp_path), towers=towers, head_width=80, activation="quick_gelu")
    assert not torch.allclose(quick(images, ["a", "b"]), hps(images, ["a", "b"]), atol=1e-4)
    with pytest.raises(UserError, match="image half 160 wide: option head_width is needed, known widths are"):
        REWARDS.get("clip").build(str(tmp_path), towers=towers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "activation must be 'gelu' or 'quick_gelu', got 'relu'"),
        ({"head_width": -1}, "head_width must be a whole number, 0 or above, got -1"),
        ({"head_width": "80"}, "head_width must be a whole number, 0 or above, got '80'"),
    ],
)
def test_open_clip_options_are_checked(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_open_clip(tmp_path / "model.pt", dtype=torch.float32, **options)


def test_pickled_clip_weights_are_read_without_running_them(copied):
    from safetensors.torch import load_file

    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(tensors, copied / "pytorch_model.bin")
    tower = Towers(device="cpu", dtype=torch.float32).clip(str(copied))
    assert torch.equal(tower.model.visual_projection.weight, tensors["visual_projection.weight"])
