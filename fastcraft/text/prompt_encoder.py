"""Prompts to embeddings: who encodes the prompt, who encodes the empty one."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastcraft.records import PromptEmbeds, TextEmbeds
from fastcraft.text.tokenize import tokenize

By = Literal["trained", "original"]


class PromptEncoder:
    """Encodes prompts by the trained encoder and by the frozen original.

    Args:
        tokenizer: a ``CLIPTokenizer``.
        trained: ``(N, S, 77)`` ids -> ``(N, L, D)``; the engine's forward, so that gradients are synchronised.
        original: the same signature, frozen.
        device: where ids go.
        guided: whether the empty prompt is needed.
        uncond_by: who encodes the empty prompt beside prompts by the trained encoder (TextCraftor: trained).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        trained: Callable[[Tensor], Tensor],
        original: Callable[[Tensor], Tensor],
        device: torch.device,
        guided: bool,
        uncond_by: By = "trained",
    ) -> None:
        self.tokenizer = tokenizer
        self._trained = trained
        self._original = original
        self.device = device
        self.guided = guided
        self.uncond_by = uncond_by

    def encode(self, prompts: Sequence[str], *, by: By) -> PromptEmbeds:
        """Embeddings of B prompts and, with guidance, of the empty one, in one forward where one encoder makes both.

        Those by the trained encoder carry gradient where it is enabled, the others never.
        """
        if by == "original":
            with torch.no_grad():
                return self._together(self._original, prompts)
        if not self.guided or self.uncond_by == "trained":
            return self._together(self._trained, prompts)
        cond = self._trained(self._ids(prompts))
        with torch.no_grad():
            uncond = self._original(self._ids([""])).to(cond.dtype)
        return PromptEmbeds(cond=TextEmbeds(sequence=cond), uncond=TextEmbeds(sequence=uncond))

    def through(self, trained: Callable[[Tensor], Tensor]) -> "PromptEncoder":
        """The same with another way to the trained encoder."""
        other = copy.copy(self)
        other._trained = trained
        return other

    def _together(self, encode: Callable[[Tensor], Tensor], prompts: Sequence[str]) -> PromptEmbeds:
        if not self.guided:
            return PromptEmbeds(cond=TextEmbeds(sequence=encode(self._ids(prompts))))
        embeds = encode(self._ids(["", *prompts]))
        return PromptEmbeds(cond=TextEmbeds(sequence=embeds[1:]), uncond=TextEmbeds(sequence=embeds[:1]))

    def _ids(self, prompts: Sequence[str]) -> Tensor:
        return tokenize(self.tokenizer, prompts).input_ids.to(self.device)
