"""Which modules of a reward's image tower can be patched: transformers' CLIP and BLIP, one rule a class.

Only the half that reads pictures is meant to be handed to a `Patch`: it has no masks, and it is where the gradient of
a score runs. A layer of another version of transformers, called in another way, is refused by its signature.
"""

import inspect

from torch import nn

from fastcraft.diffusion import tower_forwards
from fastcraft.diffusion.patch_rules import KNOWN_WIDTHS, Guard, Rule, affine, all_are, replaced_by
from fastcraft_kernels.attention.tiles import HEAD_SPLITS


def _takes(*names: str) -> Guard:
    """``forward`` has exactly these arguments."""
    return (
        lambda m: tuple(inspect.signature(type(m).forward).parameters) == ("self", *names),
        f"its forward does not take ({', '.join(names)}): another version of transformers",
    )


_NOT_CHECKPOINTED: Guard = (lambda m: not m.gradient_checkpointing, "transformers runs it again in backward")
_HEADS: Guard = (
    lambda m: m.head_dim in HEAD_SPLITS,
    "its head width is {m.head_dim}; the kernels know " + KNOWN_WIDTHS,
)
_NO_WEIGHTS_ASKED: Guard = (lambda m: not m.config.output_attentions, "its config asks for the attention weights")
_NORMS = "layer_norm1", "layer_norm2"

TOWER_RULES: dict[tuple[str, str], Rule] = {
    ("transformers", "CLIPEncoderLayer"): Rule(
        ops=lambda m: "layer_norm",
        guards=(
            _takes("hidden_states", "attention_mask", "kwargs"),
            (lambda m: hasattr(m.self_attn.config, "patch_size"), "it reads text, under a mask"),
            all_are(nn.LayerNorm, *_NORMS),
            affine(*_NORMS),
            _NOT_CHECKPOINTED,
        ),
        replace=replaced_by(tower_forwards.layer),
        absorbs=_NORMS,
    ),
    ("transformers", "BlipEncoderLayer"): Rule(
        ops=lambda m: "layer_norm",
        guards=(
            _takes("hidden_states", "kwargs"),
            all_are(nn.LayerNorm, *_NORMS),
            affine(*_NORMS),
            _NOT_CHECKPOINTED,
        ),
        replace=replaced_by(tower_forwards.layer),
        absorbs=_NORMS,
    ),
    ("transformers", "CLIPAttention"): Rule(
        ops=lambda m: "attention",
        guards=(
            _takes("hidden_states", "attention_mask", "kwargs"),
            (lambda m: hasattr(m.config, "patch_size"), "it reads text, under a mask"),
            _HEADS,
            _NO_WEIGHTS_ASKED,
            (lambda m: m.dropout == 0, "it has dropout {m.dropout}"),
        ),
        replace=replaced_by(tower_forwards.clip_attention),
    ),
    ("transformers", "BlipAttention"): Rule(
        ops=lambda m: "attention",
        guards=(
            _takes("hidden_states", "kwargs"),
            _HEADS,
            _NO_WEIGHTS_ASKED,
            (lambda m: m.dropout.p == 0, "it has dropout {m.dropout.p}"),
        ),
        replace=replaced_by(tower_forwards.blip_attention),
    ),
    ("transformers", "QuickGELUActivation"): Rule(
        ops=lambda m: "silu", guards=(), replace=replaced_by(tower_forwards.quick_gelu)
    ),
}
