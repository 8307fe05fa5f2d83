"""Whether the fused ops are put in, for the rest of the process: what a recipe's ``kernels.backend`` means."""

from collections.abc import Sequence

import torch
from torch import nn

from fastcraft.errors import UserError
from fastcraft_kernels.backend import set_backend


def use_kernels(models: Sequence[nn.Module], *, backend: str, device: torch.device, attention_table: str = "") -> None:
    """Patch ``models`` if the kernels are wanted, and tell every op who computes it.

    Args:
        models: what a `Patch` takes.
        backend: ``"triton"``: patch, or say why not; ``"reference"``: leave the modules; ``"auto"``: patch on CUDA.
        device: where the models are.
        attention_table: a file of ``fastcraft info --measure-attention``; empty = the shipped table.

    Raises:
        UserError: a table that cannot be read, or ``"triton"`` where the kernels cannot run.
    """
    if attention_table:
        from fastcraft_kernels.attention import load_attention_table

        try:
            load_attention_table(attention_table)
        except ValueError as error:
            raise UserError(f"attention_table: {error}") from error
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        from fastcraft.diffusion.patch import Patch  # the ops take a second to load; a run without them need not wait

        Patch(*models, backend=backend).apply()
    else:
        set_backend(backend)
