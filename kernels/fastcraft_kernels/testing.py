"""How kernels are tested, on machines with and without a GPU. Used by `tests/kernels/` and `benchmarks/`.

An op's tests are three files in ``tests/kernels/<op>/``:

``test_op.py``
    The public op on CPU (its reference): `torch.library.opcheck`, `gradcheck` in float64 (``fast_mode=True``),
    ``torch.compile``, what is saved for backward, one test for each `ValueError`.
``cases.py``
    Pytest cases for the Triton source, not collected by themselves. ``tests/kernels/test_cases.py`` runs each file in
    one process with ``TRITON_INTERPRET=1`` (and, marked ``gpu``, compiled on a CUDA device). A case calls the *public*
    op: the fixture ``triton_backend`` (``pytestmark = pytest.mark.usefixtures("triton_backend")``) makes
    `backend.uses_triton` true for the tensors of the fixture ``device``, so forward, autograd and backward are the
    ones users get. Compare with `assert_op_as_accurate`. Keep a case below about 100 programs.
``test_compile.py``
    Host launchers called on *meta* tensors inside `record_launches` and `launch.assume_device`: what would be launched,
    with the specialisation that Triton's JIT would derive, is then compiled for sm80 and sm90 by `compile_report`.
    `check_compiled` holds what every kernel must meet; `RegisterTable` compares with ``registers.json`` beside the
    test, which ``FASTCRAFT_WRITE_REGISTERS=1`` rewrites.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastcraft_kernels.launch import DeviceFacts

A100 = DeviceFacts(arch=80, num_sms=108)
H200 = DeviceFacts(arch=90, num_sms=132)
SHARED_MEMORY_BYTES = {80: 166_912, 90: 232_448}  # what one program may ask for

_POINTERS = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_as_accurate(name: str, fast: Tensor, eager: Tensor, exact: Tensor, *, slack: float = 2.0) -> None:
    """Fail unless ``fast`` is at most ``slack`` times further from ``exact`` (float64) than ``eager`` is.

    One unit in the last place of the largest exact value is granted besides. NaN fails.
    """
    assert fast.shape == exact.shape, f"{name}: shape {tuple(fast.shape)}, expected {tuple(exact.shape)}"
    assert fast.dtype == eager.dtype, f"{name}: dtype {fast.dtype}, expected {eager.dtype}"
    floor = torch.finfo(fast.dtype).eps * exact.abs().max().item()
    allowed = slack * (eager.double() - exact).abs().max().item() + floor
    error = (fast.double() - exact).abs().max().item()
    assert error <= allowed, f"{name}: max error {error:.3e} exceeds allowed {allowed:.3e}"


def run(op: Op, inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs of ``op(*inputs)``, then the gradient of every input that requires one.

    ``cotangents``: one gradient for each output (``None``: the output is not used), any strides, cast to its dtype.
    Inputs keep their strides.
    """
    leaves = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
    outputs = op(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    used = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, cotangents, strict=True) if dy is not None]
    grads = torch.autograd.grad([y for y, _ in used], wanted, [dy for _, dy in used]) if wanted else ()
    return [*(y.detach() for y in outputs), *grads]


def assert_op_as_accurate(
    fast: Op, eager: Op, inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], *, slack: float = 2.0
) -> list[Tensor]:
    """`assert_as_accurate` for every output and every gradient; returns those of ``fast``.

    ``eager`` is plain PyTorch; run in float64 on the same (already rounded) inputs it is the exact answer.
    """
    wide = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    got, plain, exact = run(fast, inputs, cotangents), run(eager, inputs, cotangents), run(eager, wide, cotangents)
    for i, (f, e, t) in enumerate(zip(got, plain, exact, strict=True)):
        name = f"output {i}" if i < len(cotangents) else f"gradient {i - len(cotangents)}"
        assert_as_accurate(name, f, e, t, slack=slack)
    return got


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One recorded launch: the kernel, its grid, and what Triton's JIT would specialise it on.

    ``types``: argument -> ``"*bf16"``, ``"i32"``, ``"tensordesc<...>"`` ...; ``constants``: compile-time arguments;
    ``aligned``: arguments divisible by 16; ``options``: ``num_warps``, ``num_stages`` ...
    """

    kernel: Any
    grid: tuple[int, ...]
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


def _specialise(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    names = kernel.arg_names
    bound = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[str] = []
    for parameter in kernel.params:
        name = parameter.name
        value = bound.get(name, parameter.default if parameter.has_default else None)
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = "*" + _POINTERS[value.dtype]
            aligned += [name] if value.storage_offset() * value.element_size() % 16 == 0 else []
        elif hasattr(value, "block_shape"):  # a host TensorDescriptor
            types[name] = f"tensordesc<{_POINTERS[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
        elif isinstance(value, bool):
            types[name] = "i1"
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned += [name] if value % 16 == 0 and not plain else []
        else:
            types[name] = "fp32"
    options = {k: v for k, v in kwargs.items() if k not in names}
    return Launch(
        kernel=kernel, grid=tuple(grid), types=types, constants=constants, aligned=tuple(aligned), options=options
    )


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect what host launchers would start, and start nothing. Give them meta tensors (taken as 16-byte aligned)."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_specialise(self, grid, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What ptxas made of a kernel: registers a thread, bytes, and counts of instructions in the PTX."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    cp_async: int
    tma: int
    wgmma: int
    mma_sync: int
    ld128: int
    st128: int


def compile_report(launch: Launch, *, arch: int) -> CompileReport:
    """Compile ``launch`` for ``arch`` (80, 90) without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    at = {name: i for i, name in enumerate(launch.kernel.arg_names)}
    source = ASTSource(
        fn=launch.kernel,
        signature={name: launch.types.get(name, "constexpr") for name in at},
        constexprs={(at[name],): value for name, value in launch.constants.items()},
        attrs={(at[name],): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    log, knobs = io.StringIO(), triton.knobs
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
        knobs.cache.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        options = {"enable_fp_fusion": True, **launch.options}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump did not report registers: {usage}"
    ptx = compiled.asm["ptx"]
    return CompileReport(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill", log.getvalue())),
        shared_bytes=compiled.metadata.shared,
        cp_async=ptx.count("cp.async.cg"),
        tma=ptx.count("cp.async.bulk.tensor"),
        wgmma=ptx.count("wgmma.mma_async"),
        mma_sync=ptx.count("mma.sync"),
        ld128=len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v8\.b16", ptx)),
        st128=len(re.findall(r"st\.global[\w.:]*\.v4\.b32|st\.global[\w.:]*\.v8\.b16", ptx)),
    )


def check_compiled(name: str, report: CompileReport, *, arch: int, allowed_spill_bytes: int = 0) -> None:
    """No spills (or a listed exception) and shared memory within one program's limit."""
    assert report.spill_bytes <= allowed_spill_bytes, f"{name} sm{arch}: {report.spill_bytes} bytes spilled: {report}"
    assert report.stack_bytes <= allowed_spill_bytes, f"{name} sm{arch}: {report.stack_bytes} bytes of stack: {report}"
    assert report.shared_bytes <= SHARED_MEMORY_BYTES[arch], f"{name} sm{arch}: too much shared memory: {report}"


class RegisterTable:
    """``registers.json``: Triton version -> ``"sm80"`` -> configuration -> registers a thread.

    Registers move between Triton versions, so a version without a column is not compared.
    """

    slack = 8

    def __init__(self, path: Path) -> None:
        import triton

        self.path = path
        self.version = ".".join(triton.__version__.split(".")[:2])
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def check(self, name: str, report: CompileReport, *, arch: int) -> None:
        """Fail when ``name`` needs more than `slack` registers above the table, or has no row in a known version."""
        if os.environ.get("FASTCRAFT_WRITE_REGISTERS") == "1":
            self.rows.setdefault(self.version, {}).setdefault(f"sm{arch}", {})[name] = report.registers
            self.path.write_text(json.dumps(self.rows, indent=1, sort_keys=True) + "\n")
        if self.version not in self.rows:
            return
        row = self.rows[self.version].get(f"sm{arch}", {})
        assert name in row, f"{name} sm{arch}: not in {self.path.name}; FASTCRAFT_WRITE_REGISTERS=1 adds it"
        allowed = row[name] + self.slack
        assert report.registers <= allowed, f"{name} sm{arch}: {report.registers} registers, the table allows {allowed}"
