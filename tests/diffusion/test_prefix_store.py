"""The store of prefixes: what is put comes back, whatever else happens to a file is a miss."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastcraft.diffusion.prefix_store import DiskStore, MemoryStore, Prefixes, prefix_context
from fastcraft.errors import UserError


@pytest.fixture(params=["memory", "disk"])
def make_store(request, tmp_path):
    if request.param == "memory":
        return lambda max_bytes: MemoryStore(max_bytes=max_bytes)
    return lambda max_bytes: DiskStore(tmp_path / "prefixes", max_bytes=max_bytes)


def latents(value, rows=2):
    return torch.full((rows, 4, 8, 8), float(value))  # 1 KiB a row


def test_what_is_put_comes_back_until_the_bound_is_passed(make_store):
    store = make_store(9 * 1024)
    for number in range(6):
        assert store.get(f"k{number}") is None
        store.put(f"k{number}", latents(number))
        if isinstance(store, DiskStore):  # files of one tick of the clock have no order
            os.utime(store.folder / f"k{number}.prefix.safetensors", ns=(number, number))
    kept = [number for number in range(6) if store.get(f"k{number}") is not None]
    assert kept in ([2, 3, 4, 5], [3, 4, 5])
    assert all(torch.equal(store.get(f"k{number}"), latents(number)) for number in kept)


def test_an_entry_above_the_bound_is_not_kept(make_store):
    store = make_store(1024)
    store.put("big", latents(1))
    assert store.get("big") is None


def test_a_stored_entry_does_not_follow_the_tensor_it_was_made_from(make_store):
    store, tensor = make_store(2**20), latents(1)
    store.put("k", tensor)
    tensor.add_(1)
    assert torch.equal(store.get("k"), latents(1))


@pytest.mark.parametrize("damage", ["torn", "flipped", "renamed", "empty", "text"])
def test_a_corrupt_file_is_dropped_and_made_again(tmp_path, damage):
    store = DiskStore(tmp_path, max_bytes=2**20)
    store.put("k", latents(1))
    path = tmp_path / "k.prefix.safetensors"
    data = path.read_bytes()
    if damage == "renamed":  # intact, but of another key
        path = path.rename(tmp_path / "other.prefix.safetensors")
    else:
        flipped = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
        path.write_bytes({"torn": data[:-9], "flipped": flipped, "empty": b"", "text": b"no tensors here"}[damage])
    key = path.name.partition(".")[0]
    prefixes = Prefixes(store=store, context="c")
    assert store.get(key) is None
    assert store.num_corrupt == 1
    assert not path.exists()
    store.put(key, latents(2))
    assert torch.equal(store.get(key), latents(2))
    assert prefixes.fetch(["a"], [1], lambda: latents(3))[1] is False


def test_the_key_tells_apart_context_prompts_seeds_and_batch():
    store = MemoryStore(max_bytes=2**20)
    calls = []

    def fetch(context, prompts, seeds):
        return Prefixes(store=store, context=context).fetch(
            prompts, seeds, lambda: calls.append(1) or latents(len(calls))
        )

    cases = [
        ("c", ["a", "b"], [1, 2]), ("d", ["a", "b"], [1, 2]), ("c", ["a", "c"], [1, 2]), ("c", ["a", "b"], [1, 3]),
        ("c", ["b", "a"], [2, 1]), ("c", ["a"], [1]),
    ]  # fmt: skip
    first = [fetch(*case) for case in cases]
    assert [reused for _, reused in first] == [False] * len(cases)
    for case, (made, _) in zip(cases, first, strict=True):
        found, reused = fetch(*case)
        assert reused
        assert torch.equal(found, made)


def test_the_context_follows_weights_dtypes_and_settings():
    torch.manual_seed(0)
    unet, text = torch.nn.Linear(3, 3), torch.nn.Linear(2, 2)
    contexts = [prefix_context([unet, text], {"eta": 0.0})]
    assert prefix_context([unet, text], {"eta": 0.0}) == contexts[0]
    contexts.append(prefix_context([unet, text], {"eta": 0.1}))
    contexts.append(prefix_context([text, unet], {"eta": 0.0}))
    with torch.no_grad():
        text.bias[1] += 1e-6
    contexts.append(prefix_context([unet, text], {"eta": 0.0}))
    contexts.append(prefix_context([unet.bfloat16(), text], {"eta": 0.0}))
    assert len(set(contexts)) == len(contexts)


def test_ranks_that_write_and_evict_at_once_never_read_a_wrong_entry(tmp_path):
    """Three stores on one folder go through the same keys under a bound that holds a third of them."""
    stores = [DiskStore(tmp_path, max_bytes=10 * 1300) for _ in range(3)]

    def rank(store):
        for number in 4 * list(range(30)):
            found = store.get(f"k{number}")
            assert found is None or torch.equal(found, latents(number, rows=1)), number
            store.put(f"k{number}", latents(number, rows=1))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(rank, stores))
    assert [store.num_corrupt for store in stores] == [0, 0, 0]
    assert not list(tmp_path.glob("*.draft"))
    assert 0 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 12 * 1300


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot make the folder .*file/x"):
        DiskStore(tmp_path / "file" / "x", max_bytes=1)


def test_a_disk_that_cannot_be_written_loses_the_entry_only(tmp_path, monkeypatch):
    store = DiskStore(tmp_path, max_bytes=2**20)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    store.put("k", latents(1))
    assert store.get("k") is None
    assert store.num_corrupt == 0
    assert not list(tmp_path.iterdir())
