"""Names of a UNet's modules in Stability's own code (CompVis' latent diffusion and what came of it).

Source: the tables of diffusers' ``loaders/single_file_utils.py``, read backwards.
"""

import re
from collections.abc import Collection

_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_BLOCK = re.compile(
    r"(?P<way>down|up)_blocks\.(?P<block>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)"
    r"\.(?P<rest>.+)"
)
_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<index>\d+)\.(?P<rest>.+)")


def ldm_names(modules: Collection[str]) -> dict[str, str]:
    """From the names of a diffusers UNet's modules to Stability's; modules that have none there are left out."""
    resnets = {
        match["index"] for name in modules if (match := re.match(r"down_blocks\.0\.resnets\.(?P<index>\d+)", name))
    }
    with_attention = {
        match["block"] for name in modules if (match := re.match(r"up_blocks\.(?P<block>\d+)\.att", name))
    }
    names = {}
    for module in modules:
        if module in _OUTSIDE:
            names[module] = _OUTSIDE[module]
        elif match := _MIDDLE.fullmatch(module):
            position = 2 * int(match["index"]) + (match["kind"] == "attentions")
            names[module] = f"middle_block.{position}.{_inside(match['kind'], match['rest'])}"
        elif match := _BLOCK.fullmatch(module):
            names[module] = _in_block(match, len(resnets), attention=match["block"] in with_attention)
    return names


def _in_block(match: re.Match[str], layers_per_block: int, *, attention: bool) -> str:
    """A block going down has ``layers_per_block`` and what halves the size; one going up has a layer more."""
    block, index, kind = int(match["block"]), int(match["index"]), match["kind"]
    first = block * (layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.{'op' if match['rest'] == 'conv' else match['rest']}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers_per_block}.{1 + attention}.{match['rest']}"
    blocks, position = (
        ("input_blocks", first + 1 + index) if match["way"] == "down" else ("output_blocks", first + index)
    )
    return f"{blocks}.{position}.{int(kind == 'attentions')}.{_inside(kind, match['rest'])}"


def _inside(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest
