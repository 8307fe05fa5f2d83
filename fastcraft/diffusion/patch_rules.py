"""Which modules of a diffusers UNet or VAE can be patched: one rule a class, with the guards that make it exact.

Those of the rewards' image towers are in `tower_rules`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from fastcraft.diffusion import fused_forwards
from fastcraft.diffusion.attention import CrossAttention, SelfAttention
from fastcraft.diffusion.fused_attention import FusedCrossAttention, FusedSelfAttention
from fastcraft_kernels.attention.tiles import HEAD_SPLITS

Guard = tuple[Callable[[Any], Any], str]
Replacement = tuple[Any, str, Any]
KNOWN_WIDTHS = ", ".join(map(str, HEAD_SPLITS))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How modules of one class are patched.

    ``guards``: a test that the module must pass, and what to say of one that fails (a format string over ``m``).
    ``replace``: from a module and its name to (owner, attribute, new value). ``absorbs``: children whose work the new
    forward does itself, so they are left alone. ``label``: the child that the rule is about, if it is not the module.
    """

    ops: Callable[[Any], str]
    guards: tuple[Guard, ...]
    replace: Callable[[Any, str], list[Replacement]]
    absorbs: tuple[str, ...] = ()
    label: str = ""


def refusal(module: Any, rule: Rule) -> str:
    """Why ``module`` stays as it is; empty if it does not."""
    if "forward" in module.__dict__:
        return "its forward has been replaced already"
    for holds, reason in rule.guards:
        if not holds(module):
            return reason.format(m=module)
    for name in rule.absorbs:
        child = getattr(module, name)
        if "forward" in child.__dict__ or has_hooks(child):
            return f"its {name} has a hook or another forward, which would not run"
    return ""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def all_are(kind: type, *names: str) -> Guard:
    """Every named child is exactly of class ``kind``: a subclass may compute something else."""
    return (
        lambda m: all(type(getattr(m, name, None)) is kind for name in names),
        f"{' and '.join(names)} must be plain {kind.__name__}",
    )


def affine(*names: str) -> Guard:
    """Every named norm has weight and bias, as the ops want them."""
    return (
        lambda m: all(getattr(m, name).weight is not None and getattr(m, name).bias is not None for name in names),
        f"{' and '.join(names)} must have weight and bias",
    )


def replaced_by(function: Callable[..., Any]) -> Callable[[Any, str], list[Replacement]]:
    """``function``, bound to the module, in the place of its ``forward``."""
    return lambda m, name: [(m, "forward", MethodType(function, m))]


def embeds_patches(conv: nn.Conv2d) -> bool:
    """Whether its windows tile the picture: of 3 channels, so there is little to keep and no use for channels-last."""
    return conv.stride == conv.kernel_size != (1, 1)


def _norm_then_silu(m: Any, name: str) -> list[Replacement]:
    return [
        (m.conv_norm_out, "forward", MethodType(fused_forwards.group_norm_then_silu, m.conv_norm_out)),
        (m.conv_act, "forward", MethodType(fused_forwards.identity, m.conv_act)),
    ]


def _tokens(m: Any, name: str) -> list[Replacement]:
    return [
        (m, "_operate_on_continuous_inputs", MethodType(fused_forwards.picture_to_tokens, m)),
        (m, "_get_output_for_continuous_inputs", MethodType(fused_forwards.tokens_to_picture, m)),
    ]


def _processor(m: Any, name: str) -> list[Replacement]:
    return [(m, "processor", FusedCrossAttention(name) if m.is_cross_attention else FusedSelfAttention())]


def _known_processor(m: Any) -> bool:
    kind = type(m.processor)
    stock = kind.__module__.startswith("diffusers.") and kind.__name__ in ("AttnProcessor", "AttnProcessor2_0")
    return stock or kind in (SelfAttention, CrossAttention)


_NOTHING_INSIDE = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj")

_HEAD = Rule(
    ops=lambda m: "group_norm_silu",
    guards=(all_are(nn.GroupNorm, "conv_norm_out"), all_are(nn.SiLU, "conv_act"), affine("conv_norm_out")),
    replace=_norm_then_silu,
    absorbs=("conv_norm_out", "conv_act"),
    label="conv_norm_out",
)

_RESNET = Rule(
    ops=lambda m: "group_norm_silu + frozen_conv2d",
    guards=(
        all_are(nn.GroupNorm, "norm1", "norm2"),
        affine("norm1", "norm2"),
        all_are(nn.SiLU, "nonlinearity"),
        all_are(nn.Conv2d, "conv1"),
        affine("conv1"),
        (lambda m: m.upsample is None and m.downsample is None, "it resamples inside"),
        (
            lambda m: m.time_embedding_norm == "default" or m.time_emb_proj is None,
            "its time embedding is {m.time_embedding_norm!r}, no shift",
        ),
        (lambda m: not m.skip_time_act, "its time embedding arrives activated"),
        (lambda m: m.dropout.p == 0, "it has dropout {m.dropout.p}"),
    ),
    replace=replaced_by(fused_forwards.resnet),
    absorbs=("norm1", "norm2", "conv1"),
)

RULES: dict[tuple[str, str], Rule] = {
    ("diffusers", "UNet2DConditionModel"): _HEAD,
    ("diffusers", "Encoder"): _HEAD,
    ("diffusers", "Decoder"): _HEAD,
    ("diffusers", "ResnetBlock2D"): _RESNET,
    ("diffusers", "UpDecoderBlock2D"): Rule(
        ops=lambda m: "group_norm_silu with residual",
        guards=(
            (
                lambda m: all(type(resnet).__name__ == "ResnetBlock2D" for resnet in m.resnets),
                "resnets must be plain ResnetBlock2D",
            ),
            (lambda m: not any(refusal(resnet, _RESNET) for resnet in m.resnets), "a resnet in it is left as it is"),
            (lambda m: all(resnet.output_scale_factor == 1 for resnet in m.resnets), "its resnets scale their sums"),
            (lambda m: not any(map(has_hooks, m.resnets)), "a resnet in it has a hook, which would not run"),
        ),
        replace=replaced_by(fused_forwards.decoder_block),
    ),
    ("diffusers", "Transformer2DModel"): Rule(
        ops=lambda m: "group_norm_silu + frozen_linear",
        guards=(
            (lambda m: m.is_input_continuous, "its input is no picture"),
            all_are(nn.GroupNorm, "norm"),
            affine("norm"),
            (lambda m: type(m.proj_in) is type(m.proj_out), "proj_in and proj_out differ"),
            (lambda m: type(m.proj_in) in (nn.Conv2d, nn.Linear), "proj_in must be plain Conv2d or Linear"),
        ),
        replace=_tokens,
        absorbs=("norm", "proj_in", "proj_out"),
    ),
    ("diffusers", "BasicTransformerBlock"): Rule(
        ops=lambda m: "layer_norm",
        guards=(
            (lambda m: m.norm_type == "layer_norm", "its norm type is {m.norm_type!r}"),
            all_are(nn.LayerNorm, "norm1", "norm2", "norm3"),
            affine("norm1", "norm2", "norm3"),
            (lambda m: m.attn2 is not None, "it has no cross-attention"),
            (lambda m: m.pos_embed is None, "it has a positional embedding"),
            (lambda m: not hasattr(m, "fuser"), "it has gated attention (GLIGEN)"),
            (lambda m: m._chunk_size is None, "its feed-forward is chunked"),
        ),
        replace=replaced_by(fused_forwards.transformer_block),
        absorbs=("norm1", "norm2", "norm3"),
    ),
    ("diffusers", "Attention"): Rule(
        ops=lambda m: "cross_attention" if m.is_cross_attention else "attention",
        guards=(
            (_known_processor, "its processor is {m.processor.__class__.__name__}"),
            (
                lambda m: m.inner_dim // m.heads in HEAD_SPLITS,
                "its head width is {m.inner_dim} / {m.heads}; the kernels know " + KNOWN_WIDTHS,
            ),
            *((lambda m, n=name: getattr(m, n, None) is None, f"it has {name} inside") for name in _NOTHING_INSIDE),
            (lambda m: not m.residual_connection and m.rescale_output_factor == 1, "it adds or scales its input"),
            (lambda m: m.to_out[1].p == 0, "it has dropout {m.to_out[1].p}"),
        ),
        replace=_processor,
    ),
    ("diffusers", "GEGLU"): Rule(ops=lambda m: "geglu", guards=(), replace=replaced_by(fused_forwards.gated)),
    ("torch", "Conv2d"): Rule(
        ops=lambda m: "frozen_conv2d",
        guards=(
            (lambda m: m.padding_mode == "zeros", "its padding mode is {m.padding_mode!r}"),
            (lambda m: not isinstance(m.padding, str), "its padding is {m.padding!r}"),
            (lambda m: not embeds_patches(m), "it embeds patches: 3 channels in, little to keep"),
        ),
        replace=replaced_by(fused_forwards.conv2d),
    ),
    ("torch", "GroupNorm"): Rule(
        ops=lambda m: "group_norm_silu",
        guards=((lambda m: m.affine, "it has no weight and bias"),),
        replace=replaced_by(fused_forwards.group_norm),
    ),
    ("torch", "LayerNorm"): Rule(
        ops=lambda m: "layer_norm",
        guards=(
            (lambda m: m.weight is not None and m.bias is not None, "it has no weight and bias"),
            (lambda m: len(m.normalized_shape) == 1, "it norms over {m.normalized_shape}"),
        ),
        replace=replaced_by(fused_forwards.layer_normed),
    ),
}
