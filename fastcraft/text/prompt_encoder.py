"""Prompts to embeddings: who encodes the prompt, who encodes the empty one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcraft.records import PromptEmbeds
from fastcraft.text.tokenize import tokenize


class PromptEncoder:
    """Encodes prompts by the trained encoder and by the frozen original.

    Args:
        tokenizer: a ``CLIPTokenizer``.
        trained: ``(N, S, 77)`` ids -> ``(N, L, D)``; the engine's forward, so that gradients are synchronised.
        original: the same signature, frozen.
        device: where ids go.
        guided: whether the empty prompt is needed.
        uncond_encoder: ``"trained"`` (TextCraftor) or ``"original"``: who encodes the empty prompt for `trained`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        trained: Callable[[Tensor], Tensor],
        original: Callable[[Tensor], Tensor],
        device: torch.device,
        guided: bool,
        uncond_encoder: str = "trained",
    ) -> None:
        self.tokenizer = tokenizer
        self._trained = trained
        self._original = original
        self.device = device
        self.guided = guided
        self.uncond_encoder = uncond_encoder

    def trained(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings by the trained encoder, with gradient where enabled; one forward for prompts and empty prompt."""
        if self.guided and self.uncond_encoder == "original":
            cond = self._trained(self._ids(prompts))
            with torch.no_grad():
                return PromptEmbeds(cond=cond, uncond=self._original(self._ids([""])).to(cond.dtype))
        return self._encode(self._trained, prompts)

    @torch.no_grad()
    def original(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings by the frozen original."""
        return self._encode(self._original, prompts)

    def _ids(self, prompts: Sequence[str]) -> Tensor:
        return tokenize(self.tokenizer, prompts).input_ids.to(self.device)

    def _encode(self, encode: Callable[[Tensor], Tensor], prompts: Sequence[str]) -> PromptEmbeds:
        if not self.guided:
            return PromptEmbeds(cond=encode(self._ids(prompts)))
        embeds = encode(self._ids(["", *prompts]))
        return PromptEmbeds(cond=embeds[1:], uncond=embeds[:1])
