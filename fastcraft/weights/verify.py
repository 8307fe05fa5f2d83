"""How an export is compared with the model that was trained: the same call of both."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastcraft.weights.keymap import for_module

Reference = Tensor | Mapping[str, Any]
"""What a model is called with: token ids ``(B, L)`` for a text encoder, arguments of a UNet by their names."""


@torch.no_grad()
def outputs(model: Any, reference: Reference) -> list[Tensor]:
    """Float32 results on the CPU, without dropout.

    Of a text encoder the last hidden state ``(B, L, D)`` and, where it has a projection, ``text_embeds`` ``(B, P)``; of
    a UNet its prediction, by diffusers' own attention whatever processors it has.
    """
    training = model.training
    model.eval()
    try:
        if isinstance(reference, Mapping):
            with _stock_attention(model):
                found = [model(**_like(reference, model), return_dict=False)[0]]
        else:
            out = model(reference.to(next(model.parameters()).device))
            found = [
                out.last_hidden_state,
                *([out.text_embeds] if getattr(out, "text_embeds", None) is not None else []),
            ]
    finally:
        model.train(training)
    return [x.float().cpu() for x in found]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest absolute difference; infinite where either is not a number."""
    worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    return worst if all(bool(x.isfinite().all()) for x in (*found, *expected)) else float("inf")


def tolerance(expected: list[Tensor], *dtypes: torch.dtype) -> float:
    """Rounding that a chain of layers may add: 64 units in the last place of the largest value."""
    return 64 * max(torch.finfo(dtype).eps for dtype in dtypes) * max(float(x.abs().max()) for x in expected)


def fresh_copy(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """A new model of the same configuration with these weights, on the same device; nothing else is carried over."""
    if hasattr(model, "from_config"):  # diffusers: without drawing weights first
        with torch.device("meta"):
            fresh = type(model).from_config(dict(model.config))
        fresh.load_state_dict({name: x.clone() for name, x in for_module(weights, fresh).items()}, assign=True)
    else:
        fresh = type(model)(model.config).to(next(model.parameters()).dtype)
        fresh.load_state_dict(for_module(weights, fresh))
    return fresh.to(next(model.parameters()).device).requires_grad_(False)


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether names and values are equal, to the bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@contextmanager
def _stock_attention(unet: Any) -> Iterator[None]:
    from diffusers.models.attention_processor import AttnProcessor2_0

    before = unet.attn_processors
    unet.set_attn_processor(AttnProcessor2_0())
    try:
        yield
    finally:
        unet.set_attn_processor(before)


def _like(value: Any, model: nn.Module) -> Any:
    """Tensors on the model's device, fractions in its dtype."""
    if isinstance(value, Mapping):
        return {name: _like(content, model) for name, content in value.items()}
    if not isinstance(value, Tensor):
        return value
    parameter = next(model.parameters())
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() and value.dim() else value.dtype)
