"""Prompts to token ids."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastcraft.records import TokenBatch


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> TokenBatch:
    """Token ids, padded and cut to the encoder's length as Stable Diffusion's pipeline does.

    Args:
        tokenizer: a ``CLIPTokenizer``.
        prompts: B strings.

    Returns:
        ``TokenBatch`` with ``input_ids`` ``(B, 1, 77)``; ``num_truncated`` counts the prompts that lost tokens.
    """
    length = tokenizer.model_max_length
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=True, max_length=length + 1).input_ids]
    input_ids: Tensor = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return TokenBatch(input_ids=input_ids[:, None, :], num_truncated=sum(n > length for n in lengths))
