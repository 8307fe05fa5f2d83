"""Self-attention on CPU: the op, its gradient, its dispatch table, its measurement."""

import json

import pytest
import torch
import torch.nn.functional as F

from fastcraft_kernels.attention import (
    attention,
    attention_table,
    choose_attention,
    load_attention_table,
    measure_attention,
    providers,
)
from fastcraft_kernels.attention.measure import measure_case
from fastcraft_kernels.attention.reference import attention_forward_reference
from fastcraft_kernels.attention.tiles import FLOAT32, HEAD_SPLITS, TILES, tile_for
from fastcraft_kernels.backend import use_backend
from fastcraft_kernels.launch import assume_device
from fastcraft_kernels.testing import H200, assert_op_as_accurate

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def shipped_table():
    yield
    load_attention_table(None)


def qkv(seq=5, width=40, n=2, heads=2, dtype=torch.float64):
    return [torch.randn(n, seq, heads, width, dtype=dtype, requires_grad=True) for _ in range(3)]


def plain(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("width", HEAD_SPLITS)
def test_the_reference_agrees_with_pytorch(width, monkeypatch):
    monkeypatch.setattr("fastcraft_kernels.attention.reference.ROWS", 4)
    inputs = qkv(seq=9, width=width, dtype=torch.bfloat16)
    assert_op_as_accurate(attention, plain, inputs, [torch.randn(2, 9, 2, width)])


def test_gradcheck_and_opcheck():
    inputs = qkv()
    assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)
    torch.library.opcheck(torch.ops.fastcraft.attention.default, (*inputs, 0.2, "reference", "reference"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_and_checkpointed_agree_with_eager(dynamic):
    inputs = qkv(dtype=torch.float32)

    def gradients(op):
        return torch.autograd.grad(op(*inputs).square().sum(), inputs)

    want = gradients(attention)
    options = {"backend": "aot_eager", "fullgraph": True, "dynamic": dynamic}
    compiled = torch.compile(lambda q, k, v: attention(q, k, v) * 1.0, **options)
    again = gradients(lambda *x: torch.utils.checkpoint.checkpoint(attention, *x, use_reentrant=False))
    for got in (gradients(compiled), again):
        torch.testing.assert_close(got, want)
    with use_backend("triton"), pytest.raises(Exception, match="CUDA device, not cpu"):
        compiled(*inputs)  # a change of backend reaches a compiled graph


def test_q_k_v_out_and_statistics_are_all_that_is_saved():
    inputs, saved = qkv(dtype=torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = attention(*inputs)
    storages = {x.untyped_storage().data_ptr(): x for x in saved}
    kept = {x.untyped_storage().data_ptr() for x in (*inputs, out)}
    (lse,) = (x for at, x in storages.items() if at not in kept)
    assert len(storages) == 5
    assert lse.shape == (2, 2, 5)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 40)}, r"q must be \(N, S, H, D\) and not empty, got shape \(2, 5, 40\)"),
        ({"q": torch.zeros(2, 0, 2, 40)}, "not empty"),
        ({"q": torch.zeros(2, 5, 2, 48)}, "head width of q must be one of 40, 64, 80, 160, got 48"),
        ({"q": torch.zeros(2, 5, 2, 40, dtype=torch.int32)}, "q must be float16, .* got torch.int32"),
        ({"k": torch.zeros(2, 6, 2, 40)}, r"k must have q's shape \(2, 5, 2, 40\), got \(2, 6, 2, 40\)"),
        ({"v": torch.zeros(2, 5, 2, 40).half()}, "v must be torch.float32 on cpu like q, got torch.float16 on cpu"),
        ({"k": torch.zeros(2, 5, 2, 40, device="meta")}, "k must be torch.float32 on cpu like q, got .* on meta"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"backend": "fast"}, "backend must be one of auto, sdpa, .* got 'fast'"),
        ({"backend": "flash"}, "backend flash was asked for, but flash needs a CUDA device, not cpu"),
        ({"backend": "triton"}, "backend triton was asked for, but the kernels need a CUDA device"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_illegal_input_is_named(change, message):
    arguments = {name: torch.zeros(2, 5, 2, 40) for name in "qkv"} | change
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_sdpa_and_the_process_backend_choose():
    inputs = qkv(dtype=torch.float32)
    assert attention(*inputs, backend="sdpa").grad_fn.name().startswith("Transpose")
    with use_backend("triton"), pytest.raises(ValueError, match="backend triton was asked for"):
        attention(*inputs)


def choose(**change):
    arguments = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 40, "sequence": 4096, "grad": True} | change
    with assume_device(H200):
        return choose_attention("auto", "auto", **arguments)


def row(**change):
    return {
        "arch": 90, "head_dim": 40, "sequence": 4096, "direction": "forward", "provider": "flash", "origin": "measured"
    } | change  # fmt: skip


def test_the_shipped_table_claims_nothing_unmeasured():
    rows = attention_table()
    assert {(r["arch"], r["head_dim"], r["direction"]) for r in rows} == {
        (arch, width, direction) for arch in TILES for width in HEAD_SPLITS for direction in ("forward", "backward")
    }
    for r in rows:
        assert r["origin"].startswith("measured on ") or (r["origin"], r["provider"]) == ("unmeasured", "sdpa")
        assert "milliseconds" in r or r["why"]


def test_without_a_measurement_pytorch_chooses():
    choice = choose()
    assert (choice.forward, choice.backward) == ("sdpa", "sdpa")
    assert choice.why == "forward: sdpa (unmeasured); backward: sdpa (unmeasured)"


def test_each_direction_has_its_provider(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"rows": [row(), row(direction="backward", provider="efficient")]}))
    load_attention_table(path)
    choice = choose(sequence=5000)  # nearer to 4096 than to 9216
    assert (choice.forward, choice.backward) == ("flash", "efficient")
    assert choose(grad=False).backward == "flash"
    assert choose(sequence=1024).forward == "sdpa"
    assert choose(dtype=torch.float32).why == "the table is about float16 and bfloat16, not torch.float32"
    load_attention_table({"rows": [row(direction="backward", provider="sdpa")]})
    assert choose().forward == "sdpa"  # PyTorch's own backward pass needs its own forward pass
    assert choose(grad=False).forward == "flash"
    load_attention_table(None)
    assert choose(grad=False).forward == "sdpa"


def test_a_provider_that_refuses_is_replaced_with_a_warning():
    load_attention_table(
        {"rows": [row(head_dim=160, provider="cudnn"), row(head_dim=160, direction="backward", provider="cudnn")]}
    )
    with pytest.warns(RuntimeWarning, match="because cudnn takes head widths up to 128"):
        assert choose(head_dim=160).forward == "sdpa"


def test_an_unknown_card_is_left_to_pytorch():
    with assume_device(type(H200)(arch=89, num_sms=100)):
        choice = choose_attention(
            "auto", "auto", device=CUDA, dtype=torch.float16, head_dim=40, sequence=64, grad=False
        )
    assert choice.why == "forward: sdpa (no row for sm89)"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"rows": [{"arch": 90}]}, "a row of the table lacks head_dim, sequence, direction, provider, origin"),
        ({"rows": [row(provider="fast")]}, "provider in the table must be one of sdpa, .* got 'fast'"),
        ({"rows": [row(head_dim=48)]}, "head_dim in the table must be one of 40, 64, 80, 160, got 48"),
        ({"rows": [row(direction="up")]}, "direction in the table must be one of forward, backward"),
        ({"rows": [row(sequence=0)]}, "sequence in the table must be a positive integer, got 0"),
        ({}, "must hold a list under 'rows', got NoneType"),
        ("/no/such/file.json", "source must be a JSON file or a mapping, got /no/such/file.json"),
    ],
)
def test_a_bad_table_is_refused_whole(source, message):
    before = attention_table()
    with pytest.raises(ValueError, match=f"load_attention_table: .*{message}"):
        load_attention_table(source)
    assert attention_table() == before


def test_tiles_fit_the_head_widths():
    for width, split in HEAD_SPLITS.items():
        assert split.head + split.tail >= width
        assert split.head + split.tail_out == width
    assert tile_for("dq", arch=120, head_dim=40, dtype=torch.float16) is TILES[90][40]["dq"]
    assert tile_for("dq", arch=86, head_dim=40, dtype=torch.float16) is TILES[80][40]["dq"]
    assert tile_for("dq", arch=90, head_dim=40, dtype=torch.float32) is FLOAT32


def test_measuring_needs_a_card():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="measure_attention: a CUDA device must be present, found none"):
        measure_attention()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dims": (48,)}, r"head_dims must be among 40, 64, 80, 160, got \[48\]"),
        ({"sequences": ()}, "sequences must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"dtype": torch.float32}, "dtype must be float16 or bfloat16, got torch.float32"),
    ],
)
def test_measuring_checks_its_arguments(change, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=message):
        measure_attention(**change)


def test_the_fastest_right_answer_wins_a_row():
    good = providers.PROVIDERS["reference"]

    def provider(**change):
        return providers.Provider(
            **{"forward": good.forward, "backward": good.backward, "refusal": good.refusal} | change
        )

    def raising(*arguments):
        raise RuntimeError("no kernel\nfor this")

    candidates = {
        "reference": good,
        "slow": provider(),
        "fast": provider(),
        "wrong": provider(forward=lambda q, k, v, scale: good.forward(q, k, v, scale * 1.5)),
        "broken": provider(forward=raising, backward=raising),
        "absent": provider(refusal=lambda *x: "it is not here"),
    }
    times = iter([[3.0, 1.0, 2.0], [1.0, 1.5, 0.5], [5.0, 5.0, 5.0], [4.0, 4.0, 4.0], [0.1, 0.1, 0.1], [9.0] * 3])
    inputs = [torch.randn(1, 9, 1, 40).bfloat16() for _ in range(4)]
    forward, backward = measure_case(candidates, inputs, timer=lambda call: next(times))
    assert (forward["direction"], forward["provider"]) == ("forward", "fast")
    assert forward["milliseconds"] == {"slow": 2.0, "fast": 1.0}
    assert forward["spread"]["slow"] == [1.0, 3.0]
    assert forward["refused"]["broken"] == "RuntimeError: no kernel"
    assert forward["refused"]["absent"] == "it is not here"
    assert forward["refused"]["wrong"].startswith("its answer is wrong: relative distance")
    assert backward["milliseconds"] == {"slow": 5.0, "fast": 4.0, "wrong": 0.1}  # its backward pass is right
    load_attention_table({"rows": [{**forward, "provider": "triton", "arch": 90, "origin": "measured on a test"}]})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_provider_is_right_on_the_card(tmp_path):
    torch.use_deterministic_algorithms(False)  # which would refuse PyTorch's backward passes
    path = tmp_path / "table.json"
    rows = measure_attention(path, head_dims=(40, 160), sequences=(250,))["rows"]
    for row in rows:
        assert {"triton", "flash"} <= set(row["milliseconds"]), row
        assert not any("its answer is wrong" in reason for reason in row["refused"].values()), row
    load_attention_table(path)


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_pytorchs_backends_are_called_as_they_are_declared(name):
    q, k, v, dout = (torch.empty(2, 48, 8, 40, dtype=torch.float16, device="meta") for _ in range(4))
    provider = providers.PROVIDERS[name]
    out, lse = provider.forward(q, k, v, 0.2)
    assert (out.shape, lse.shape) == (q.shape, (2, 8, 48))
    grads = provider.backward(dout, q, k, v, out, lse, 0.2)
    assert [g.shape for g in grads] == [q.shape] * 3


def test_statistics_are_natural_logarithms():
    q, k, v = qkv(width=64)
    _, lse = attention_forward_reference(q, k, v, scale=0.5)
    scores = torch.einsum("nshd,nthd->nhst", q, k) * 0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
