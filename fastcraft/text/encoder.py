"""The text encoder: a trained copy with float32 masters beside the frozen original."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """A ``CLIPTextModel`` that reads segments.

    Args:
        model: a transformers ``CLIPTextModel``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings of token ids.

        Args:
            input_ids: ``(B, S, 77)`` int64; the S segments of a prompt are encoded one by one and joined.

        Returns:
            ``(B, S * 77, D)``: the last hidden state after the final layer norm.
        """
        hidden = self.model(input_ids=input_ids.flatten(0, 1)).last_hidden_state
        return hidden.unflatten(0, input_ids.shape[:2]).flatten(1, 2)


def split_encoders(
    model: Any,
    *,
    train: str,
    dtype: torch.dtype,
    lora_rank: int = 16,
    lora_alpha: float = 16.0,
    gradient_checkpointing: bool = False,
) -> tuple[TextEncoder, TextEncoder]:
    """The trained encoder and the frozen original, from one loaded model.

    Args:
        model: a float32 ``CLIPTextModel``; it becomes the trained one.
        train: ``"full"`` trains every weight, ``"lora"`` adapters on the attention projections.
        dtype: of the frozen original.
        lora_rank: rank of the adapters.
        lora_alpha: adapters are scaled by ``lora_alpha / lora_rank``.
        gradient_checkpointing: recompute the layers of the trained encoder in backward.

    Returns:
        ``(trained, original)``; ``trained`` has float32 parameters, and those that require gradient are the only ones
        in the program that do.
    """
    original = copy.deepcopy(model).to(dtype).requires_grad_(False).eval()
    if train == "lora":
        from fastcraft.text.lora import inject_lora

        inject_lora(model, rank=lora_rank, alpha=lora_alpha)
    else:
        model.requires_grad_(True)
    if gradient_checkpointing:
        # transformers renamed this in 5.2x and warns about the old name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model.train(gradient_checkpointing)  # CLIP has no dropout in use; checkpointing acts in train mode only
    return TextEncoder(model), TextEncoder(original)
