"""Backend choice, launch arithmetic and the compile harness itself."""

import json

import pytest
import torch

from fastcraft_kernels import backend, launch, testing

CPU = torch.device("cpu")


def test_auto_means_plain_pytorch_on_cpu_without_a_warning():
    assert backend.current_backend() == "auto"
    assert not backend.uses_triton("geglu", torch.zeros(2))


def test_triton_on_cpu_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        backend.use_backend("triton"),
        pytest.raises(ValueError, match=r"geglu: backend triton .* CUDA device, not cpu"),
    ):
        backend.uses_triton("geglu", torch.zeros(2))
    assert backend.current_backend() == "auto"


def test_the_interpreter_serves_cpu_tensors(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with backend.use_backend("triton"):
        assert backend.uses_triton("geglu", torch.zeros(2))
    with backend.use_backend("reference"):
        assert not backend.uses_triton("geglu", torch.zeros(2))
    assert "not torch.float64" in str(backend.triton_refusal(CPU, torch.float64))
    assert "CPU tensors, not cuda" in str(backend.triton_refusal(torch.device("cuda"), torch.float32))


def test_an_old_device_is_refused_and_auto_warns(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or newer, not 7.5" in str(backend.triton_refusal(torch.device("cuda"), torch.float32))
    x = torch.empty(2, device="meta")
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    with pytest.warns(RuntimeWarning, match=r"geglu: plain PyTorch computes this, because .* 7\.5"):
        assert not backend.uses_triton("geglu", x)


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend.triton_refusal(torch.device("cuda"), torch.float32) == "the package triton is not installed"


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="one of auto, reference, triton, got 'cuda'"):
        backend.set_backend("cuda")


def test_splits_fill_the_device_once_and_no_more():
    assert launch.split_count(528, 40, most=16) == 13  # 520 programs
    assert launch.split_count(528, 10, most=16) == 16
    assert launch.split_count(528, 529, most=16) == 1
    assert launch.split_count(528, 10, most=0) == 1


def test_powers_of_two():
    assert [launch.next_power_of_2(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert [launch.largest_power_of_2(n) for n in (1, 2, 3, 64, 127)] == [1, 2, 2, 64, 64]
    assert launch.ceil_div(7, 3) == 3


def test_an_assumed_device_ends_with_its_block():
    with launch.assume_device(testing.H200):
        assert launch.device_facts(CPU).num_sms == 132
    assert launch.device_facts(CPU) == launch.INTERPRETER


def test_accuracy_is_measured_against_eager():
    exact = torch.linspace(1, 2, 50, dtype=torch.float64)
    eager = (exact * (1 + 1e-3)).float()
    testing.assert_as_accurate("y", (exact * (1 - 1.9e-3)).float(), eager, exact)
    with pytest.raises(AssertionError, match="y: max error"):
        testing.assert_as_accurate("y", (exact * (1 - 2.1e-3)).float(), eager, exact)
    with pytest.raises(AssertionError, match="nan"):
        testing.assert_as_accurate("y", torch.full((50,), torch.nan), eager, exact)


def test_run_returns_outputs_and_gradients():
    x = torch.ones(3, requires_grad=True)
    outputs = testing.run(
        lambda a, b, c: (a * b, a), [x, torch.full((3,), 2.0), None], [torch.ones(()).expand(3), None]
    )
    assert [t.tolist() for t in outputs] == [[2.0] * 3, [1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize("arch", [80, 90])
def test_a_recorded_launch_compiles_without_a_device(arch):
    import triton
    import triton.language as tl

    @triton.jit
    def double(x_ptr, y_ptr, n, one, offset_ptr, BLOCK: tl.constexpr):
        cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < n, other=0.0)
        tl.store(y_ptr + cols, x + x, mask=cols < n)

    x = torch.empty(1024, dtype=torch.bfloat16, device="meta")
    with testing.record_launches() as launches:
        double[(8,)](x, x[4:], 1000, 1, None, BLOCK=1024, num_warps=4)
    (recorded,) = launches
    assert recorded.name == "double"
    assert recorded.grid == (8,)
    assert recorded.types == {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32"}
    assert recorded.constants == {"one": 1, "offset_ptr": None, "BLOCK": 1024}
    assert recorded.aligned == ("x_ptr",)
    report = testing.compile_report(recorded, arch=arch)
    testing.check_compiled("double", report, arch=arch)
    assert report.ld128 == 0  # 1000 is a multiple of 8 and not of 16
    assert 0 < report.registers < 64


def test_the_register_table_catches_growth(tmp_path, monkeypatch):
    fields = dict.fromkeys(testing.CompileReport.__dataclass_fields__, 0)
    path = tmp_path / "registers.json"
    with monkeypatch.context() as patch:
        patch.setenv("FASTCRAFT_WRITE_REGISTERS", "1")
        testing.RegisterTable(path).check("a", testing.CompileReport(**fields | {"registers": 40}), arch=80)
    monkeypatch.delenv("FASTCRAFT_WRITE_REGISTERS", raising=False)
    table = testing.RegisterTable(path)
    assert json.loads(path.read_text()) == {table.version: {"sm80": {"a": 40}}}
    table.check("a", testing.CompileReport(**fields | {"registers": 48}), arch=80)
    with pytest.raises(AssertionError, match="49 registers, the table allows 48"):
        table.check("a", testing.CompileReport(**fields | {"registers": 49}), arch=80)
    with pytest.raises(AssertionError, match=r"b sm80: not in registers\.json"):
        table.check("b", testing.CompileReport(**fields), arch=80)


def test_spills_and_shared_memory_are_caught():
    fields = dict.fromkeys(testing.CompileReport.__dataclass_fields__, 0)
    with pytest.raises(AssertionError, match="8 bytes spilled"):
        testing.check_compiled("a", testing.CompileReport(**fields | {"spill_bytes": 8}), arch=80)
    with pytest.raises(AssertionError, match="too much shared memory"):
        testing.check_compiled("a", testing.CompileReport(**fields | {"shared_bytes": 200_000}), arch=80)
