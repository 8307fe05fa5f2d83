"""The aesthetic head: five layers in one, read without running anything."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastcraft.errors import UserError
from fastcraft.rewards.aesthetic import RELEASED_HEAD, AestheticReward, load_head
from fastcraft.rewards.affine_head import collapse
from fastcraft.rewards.clip_tower import Towers

RELEASED = (768, 1024, 128, 64, 16, 1)


def layered(head):
    """The head as it was trained: linear layers and dropout."""
    modules = [nn.Module()] * 8
    for index in (0, 2, 4, 6, 7):
        weight = head[f"layers.{index}.weight"]
        modules[index] = nn.Linear(weight.shape[1], weight.shape[0])
    for index, rate in ((1, 0.2), (3, 0.2), (5, 0.1)):
        modules[index] = nn.Dropout(rate)
    model = nn.Sequential(*modules)
    model.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in head.items()})
    return model.eval()


@pytest.mark.parametrize("widths", [RELEASED, (24, 20, 12, 8, 4, 1), (5, 1, 1, 1, 1, 1)], ids=str)
def test_one_vector_equals_five_layers(widths, make_head):
    tensors = make_head(widths, seed=1)
    head = collapse(tensors)
    features = nn.functional.normalize(torch.randn(16, widths[0]), dim=-1)
    with torch.no_grad():
        expected = layered(tensors).double()(features.double())[:, 0]
    assert expected.std() > 0.01
    got = features @ head.vector + head.bias
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ending", ["pth", "pt", "safetensors", "folder"])
def test_reads_every_form(ending, tmp_path, make_head):
    tensors = make_head(RELEASED)
    if ending == "folder":
        path = tmp_path
        save_file(tensors, tmp_path / "aesthetic.safetensors")
    else:
        path = tmp_path / f"head.{ending}"
        (save_file if ending == "safetensors" else torch.save)(tensors, path)
    head, expected = load_head(str(path)), collapse(tensors)
    assert torch.equal(head.vector, expected.vector)
    assert torch.equal(head.bias, expected.bias)
    assert head.source == str(path)


def test_score_is_head_of_the_normalised_embedding(bundled, make_head):
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)
    reward = AestheticReward.build("shapes", towers=towers)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = layered(make_head())(towers.clip("shapes").image_features(images))[:, 0]
    torch.testing.assert_close(reward(images, [""] * 3), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_of_the_tower_leaves_the_head_alone(bundled):
    reward = AestheticReward.build("shapes", towers=Towers(device="cpu", dtype=torch.bfloat16, bundled=bundled))
    assert reward.vector.dtype == reward.bias.dtype == torch.float32
    assert reward(torch.rand(1, 3, 32, 32), [""]).dtype == torch.float32


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache and no network: the list of what would have been downloaded."""
    asked = []

    def download(url, file, **options):
        asked.append((url, options["hash_prefix"]))
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return asked


def test_no_path_means_the_released_head_by_its_hash(hub, bundled):
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)
    with pytest.raises(
        UserError,
        match=r"needs sac\+logos.*: not in .*, and not to be had from https://.* \(no route",
    ):
        AestheticReward.build("", towers=towers)
    assert [sha256 for _, sha256 in hub] == ["21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"]


def test_another_file_under_the_released_name_is_refused(hub, tmp_path, make_head):
    (tmp_path / "checkpoints").mkdir()
    torch.save(make_head(RELEASED), tmp_path / "checkpoints" / RELEASED_HEAD.name)
    with pytest.raises(UserError, match=r"is not the released file of 'aesthetic' \(wrong SHA-256\); delete it"):
        load_head("")
    assert hub == [], "what is there is not fetched again"


class Malicious:
    """Makes a folder when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    target = tmp_path / "owned"
    torch.save({"layers.0.weight": Malicious(str(target))}, tmp_path / "head.pth")
    with pytest.raises(UserError, match="holds more than tensors and is refused"):
        load_head(str(tmp_path / "head.pth"))
    assert not target.exists()
    torch.load(tmp_path / "head.pth", weights_only=False)
    assert target.exists(), "the file is dangerous when read the other way, or this test proves nothing"


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "layers.4.bias"), "missing: layers.4.bias; unexpected: none"),
        (lambda t: {**without(t, "layers.7.bias"), "x.y": torch.ones(1)}, "missing: layers.7.bias; unexpected: x.y"),
        (
            lambda t: {f"module.{key}": value for key, value in t.items()},
            "and 7 more; unexpected: module.layers.0.bias",
        ),
        (lambda t: {**t, "layers.2.weight": torch.ones(12, 19)}, "layers.2 has weight (12, 19) and bias (12,)"),
        (lambda t: {**t, "layers.2.bias": torch.ones(11)}, "layers.2 has weight (12, 20) and bias (11,)"),
        (lambda t: {**t, "layers.0.weight": torch.ones(20)}, "layers.0 has weight (20,)"),
        (lambda t: {**t, "layers.0.weight": torch.tensor(1.0)}, "layers.0 has weight ()"),
        (
            lambda t: {**t, "layers.7.weight": torch.ones(2, 4), "layers.7.bias": torch.ones(2)},
            "must end in 1 output, got 2",
        ),
    ],
)
def test_wrong_names_and_shapes_are_named(change, message, make_head):
    with pytest.raises(UserError) as error:
        collapse(change(make_head()), source="head.pth")
    assert message in str(error.value)
    assert "'head.pth'" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_head_of_another_width_is_refused(bundled, tmp_path, make_head):
    torch.save(make_head(RELEASED), tmp_path / "head.pth")
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)
    with pytest.raises(UserError, match=r"reads 768 features, but clip_path .* gives 24"):
        AestheticReward.build(str(tmp_path / "head.pth"), towers=towers, clip_path="shapes")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pth", None, "must be a file, a folder with sac+logos+ava1-l14-linearMSE.pth or a hub id"),
        ("head.ckpt", b"x", "must end in .pth, .pt, .bin, .safetensors"),
        ("head.safetensors", b"x", "'aesthetic' cannot read"),
        ("head.pth", b"", "head.pth' of 'aesthetic' is an empty file"),
        ("head.pt", b"no pickle", "of 'aesthetic' holds more than tensors"),
    ],
)
def test_bad_files_are_one_line(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_head(str(tmp_path / name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_names_is_refused(tmp_path):
    torch.save([torch.ones(3)], tmp_path / "head.pth")
    with pytest.raises(UserError, match="must hold named tensors, got list"):
        load_head(str(tmp_path / "head.pth"))
