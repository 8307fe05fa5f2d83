"""Shapes of the released models, and small ones for a machine without a GPU."""

import torch
from torch import Tensor

from benchmarks.kernels.harness import Inputs, Workload

CUDA = torch.cuda.is_available()


def picture(n: int, c: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``(n, c, size, size)`` channels-last, off-centre as activations are, with gradient."""
    x = torch.randn(n, c, size, size, device=device) * 0.5 + 0.3
    return x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def sizes_of(gpu: list, cpu: list) -> list:
    """The shapes to run on this machine."""
    return gpu if CUDA else cpu


def norm_workloads() -> list[Workload]:
    """Group norms: the planes of SD1.5 at 512, SDXL at 1024, and the SD decoder."""
    rows = sizes_of(
        gpu=[
            ("sd15@512 64x64 C320 N2", 2, 320, 64), ("sd15@512 64x64 C320 N8", 8, 320, 64),
            ("sd15@512 64x64 C320 N16", 16, 320, 64), ("sd15@512 32x32 C640 N8", 8, 640, 32),
            ("sd15@512 16x16 C1280 N8", 8, 1280, 16), ("sd15@512 8x8 C1280 N8", 8, 1280, 8),
            ("sdxl@1024 128x128 C320 N2", 2, 320, 128), ("vae@512 512x512 C128 N1", 1, 128, 512),
        ],
        cpu=[("small 8x8 C64 N2", 2, 64, 8)],
    )  # fmt: skip

    def make(n: int, c: int, size: int):
        def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
            weight, bias = (torch.randn(c, device=device).to(dtype) for _ in range(2))
            shift = torch.randn(n, c, device=device).to(dtype)
            return {"x": picture(n, c, size, device, dtype), "weight": weight, "bias": bias, "shift": shift}

        return inputs

    return [
        Workload(name=name, make=make(n, c, s), num_elements=(2 * n * c * s * s, 5 * n * c * s * s))
        for name, n, c, s in rows
    ]


def token_workloads(*, gated: bool) -> list[Workload]:
    """Rows of tokens: layer norms (with the residual before it), or the doubled width that a GEGLU halves."""
    rows = sizes_of(
        gpu=[
            ("sd15@512 64x64 C320 N8", 8, 4096, 320), ("sd15@512 32x32 C640 N8", 8, 1024, 640),
            ("sd15@512 16x16 C1280 N8", 8, 256, 1280), ("sdxl@1024 32x32 C1280 N2", 2, 1024, 1280),
            ("sdxl@1024 64x64 C640 N2", 2, 4096, 640), ("sd15@512 64x64 C320 N2", 2, 4096, 320),
        ],
        cpu=[("small 4x4 C32 N2", 2, 16, 32)],
    )  # fmt: skip

    def make(n: int, s: int, c: int):
        def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
            if gated:
                return {"x": torch.randn(n, s, 8 * c, device=device).to(dtype).requires_grad_()}
            x, residual = (torch.randn(n, s, c, device=device).to(dtype).requires_grad_() for _ in range(2))
            weight, bias = (torch.randn(c, device=device).to(dtype) for _ in range(2))
            return {"x": x, "weight": weight, "bias": bias, "residual": residual}

        return inputs

    workloads = []
    for name, n, s, c in rows:
        size = n * s * c
        # GEGLU reads 8C, writes 4C; backward reads 8C and 4C, writes 8C. Norm: x, residual in, sum and result out;
        # backward reads the sum and both gradients, writes one.
        num_elements = (12 * size, 32 * size) if gated else (4 * size, 8 * size)
        workloads.append(Workload(name=name, make=make(n, s, c), num_elements=num_elements))
    return workloads


def attention_workloads(*, keys: int, guided: bool = False) -> list[Workload]:
    """Self-attention (``keys`` = 0) or cross-attention over that many keys; ``(N, S, H, D)``.

    ``guided``: the first half of the samples shares one of the N/2 + 1 rows of k and v; shapes of several prompts only.
    """
    rows = sizes_of(
        gpu=[
            ("sd15@512 S4096 D40 N2", 2, 4096, 8, 40), ("sd15@512 S4096 D40 N8", 8, 4096, 8, 40),
            ("sd15@512 S1024 D80 N8", 8, 1024, 8, 80), ("sd15@512 S256 D160 N8", 8, 256, 8, 160),
            ("sd21@768 S9216 D64 N2", 2, 9216, 5, 64), ("sdxl@1024 S4096 D64 N2", 2, 4096, 10, 64),
            ("sdxl@1024 S1024 D64 N2", 2, 1024, 20, 64),
        ],
        cpu=[("small S64 D40 N4", 4, 64, 2, 40) if guided else ("small S64 D40 N1", 1, 64, 2, 40)],
    )  # fmt: skip
    rows = [row for row in rows if row[1] > 2 or not guided]

    def make(n: int, s: int, h: int, d: int):
        def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
            of_text = (n // 2 + 1 if guided else n, keys or s)
            return {
                name: torch.randn(*size, h, d, device=device).to(dtype).requires_grad_()
                for name, size in {"q": (n, s), "k": of_text, "v": of_text}.items()
            }

        return inputs

    workloads = []
    for name, n, s, h, d in rows:
        products = 2 * n * h * s * (keys or s) * d  # FLOPs of one of the two products
        q, kv = n * s * h * d, 2 * (n // 2 + 1 if guided else n) * (keys or s) * h * d
        # forward: q, k, v in, out; backward: q, k, v, out (or q again), d_out in, dq, dk, dv out
        workloads.append(
            Workload(
                name=name, make=make(n, s, h, d), flops=(2 * products, 7 * products),
                num_elements=(2 * q + kv, 2 * q + kv + 4 * q + 2 * kv),
            )
        )  # fmt: skip
    return workloads
