"""Fixtures of the kernel tests; `fastcraft_kernels.testing` says how these tests are laid out."""

from collections.abc import Iterator

import pytest
import torch

from fastcraft_kernels.backend import triton_refusal, use_backend
from fastcraft_kernels.launch import is_interpreting


@pytest.fixture(autouse=True)
def nan_filled_outputs() -> Iterator[None]:
    """Deterministic mode fills every ``empty`` tensor with NaN, so an element that nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where cases run: the CPU under Triton's interpreter, the GPU otherwise."""
    return torch.device("cpu" if is_interpreting() else "cuda")


@pytest.fixture
def triton_backend(device: torch.device) -> Iterator[None]:
    """The Triton kernels compute every op of the case, or the case fails."""
    assert triton_refusal(device, torch.bfloat16) is None
    with use_backend("triton"):
        yield
