"""The text encoder of a model, as one module from token ids to embeddings."""

from typing import Any

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


def recompute_layers(model: Any) -> None:
    """Make a ``CLIPTextModel`` recompute its layers in backward."""
    # transformers renamed this in 5.2x and warns about the old name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()  # CLIP has no dropout in use; checkpointing acts in train mode only
