"""Bytes that the ops of a UNet step and of a VAE decode move, plain and patched: ``python -m benchmarks.traffic``.

Stable Diffusion 1.5 at 512 pixels, bfloat16, forward and gradient, counted on the meta device: nothing is computed and
nothing is timed. An op reads each of its tensors once and writes its results once; a view moves nothing; a group norm
over planes of more than 256 pixels reads its input twice (statistics, then the norm), backward too. Caches, workspaces
and the layout changes inside cuDNN are left out, so this is what a perfect memory system would have to carry.

The residual form of `group_norm_silu` makes a sum inside the group norm that follows: it saves one read of the sum
forward, and backward the write and the read of the gradient that is added to another. The patch uses it between the
ResNets of a VAE decoder's block. The last column of the first table is what it would save in the other places, where
sum and norm belong to different modules.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.saved_bytes import MODELS, TEXT_LENGTH, flash
from fastcraft.diffusion.patch import Patch
from fastcraft.families.components import freeze
from fastcraft.families.unet import UNetNetwork, use_text_kv
from fastcraft.records import PromptEmbeds, TextEmbeds

RESULTS = Path(__file__).parent / "results" / "traffic"
ROWS = 2  # of the UNet's batch: one guided picture
SMALL_PLANE = 256  # pixels that fit one program's registers
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_GROUP_NORMS = {  # op -> (argument that holds the normalised tensor, how often it is read once more)
    "fastcraft::group_norm_silu": (0, 1),
    "fastcraft::group_norm_silu_backward": (2, 2),  # and the gradient, of the same size
    "aten::native_group_norm": (0, 1),
    "aten::native_group_norm_backward": (1, 2),
}


class Traffic(TorchDispatchMode):
    """Counts in ``megabytes``, by op; 1 MB is 10**6 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.megabytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if func.is_view or "empty" in name or name == "aten::_unsafe_view":
            return result
        tensors = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        moved = [*tensors.values(), *(x for x in tree_leaves(result) if isinstance(x, Tensor))]
        if name in _GROUP_NORMS:
            position, times = _GROUP_NORMS[name]
            normed = args[position]
            moved += [normed] * (times if normed[0, 0].numel() > SMALL_PLANE else 0)
        self.megabytes[name] += sum(_num_bytes(x) for x in moved) / 1e6
        return result


def _num_bytes(x: Tensor) -> int:
    """An expanded tensor is read from less memory than it has elements."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def sums_before_norms(model: Any) -> Iterator[Any]:
    """Modules that begin with a group norm of a sum that the module before them has just made."""
    for block in [*getattr(model, "down_blocks", ()), model.mid_block, *model.up_blocks]:
        yield from (attention for attention in getattr(block, "attentions", ()) or () if attention is not None)
        joins_skips = hasattr(model, "down_blocks") and block in list(model.up_blocks)
        if not joins_skips:  # there a concatenation comes between
            yield from list(block.resnets)[1:]
    if not hasattr(model, "down_blocks"):
        yield model.conv_norm_out


def unet() -> tuple[Any, Callable[[], Tensor], list[Tensor]]:
    """The network, a call of it, and what gradient is wanted of."""
    from diffusers import UNet2DConditionModel

    config = MODELS["sd15@512"]
    with torch.device("meta"):
        network = torch.nn.Module.to(freeze(UNet2DConditionModel(**config)), torch.bfloat16)
        latents = torch.empty(ROWS, 4, config["sample_size"], config["sample_size"], dtype=torch.bfloat16)
        text = torch.empty(ROWS, TEXT_LENGTH, config["cross_attention_dim"], dtype=torch.bfloat16, requires_grad=True)
        timestep = torch.empty((), dtype=torch.long)
    latents.requires_grad_()
    use_text_kv(network)
    conditioning = UNetNetwork(module=network).condition(PromptEmbeds(cond=TextEmbeds(sequence=text)))

    def call() -> Tensor:
        kwargs = {"conditioning": conditioning}
        return network(latents, timestep, None, cross_attention_kwargs=kwargs, return_dict=False)[0]

    return network, call, [latents, *conditioning.flat()]


def vae() -> tuple[Any, Callable[[], Tensor], list[Tensor]]:
    """The decoder, a call of it, and what gradient is wanted of."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        network = torch.nn.Module.to(freeze(AutoencoderKL(**VAE)), torch.bfloat16)
        latents = torch.empty(1, 4, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    return network.decoder, lambda: network.decode(latents).sample, [latents]


def count(build: Callable[[], Any]) -> dict[str, Any]:
    """``{"plain": {op: MB}, "patched": {op: MB}, "fold": MB}``."""
    network, call, wanted = build()
    rows: dict[str, Any] = {}
    for kind in ("plain", "patched"):
        with (
            Patch(network) if kind == "patched" else nullcontext(),
            mock.patch.object(F, "scaled_dot_product_attention", flash),
            Traffic() as traffic,
        ):
            output = call()
            torch.autograd.grad(output, wanted, torch.empty_like(output))
        rows[kind] = dict(traffic.megabytes.most_common())
    sums: list[float] = []
    with Patch(network):
        for module in sums_before_norms(network):  # on the patched network, which calls some of them no more
            module.register_forward_pre_hook(lambda _, inputs: sums.append(_num_bytes(inputs[0]) / 1e6))
        call()
    return rows | {"fold": 3 * sum(sums)}


def markdown(results: dict[str, Any]) -> str:
    """Tables by network and op."""
    lines = [
        "# Bytes moved by the ops of a UNet step and of a VAE decode",
        "",
        (__doc__ or "").split("\n\n", 1)[1].strip(),
    ]
    lines += ["", f"`python -m benchmarks.traffic`, torch {results['torch']}.", ""]
    lines += [
        "| network | plain, GB | patched, GB | ratio | more residuals in norms would save, of patched |",
        "|---|---|---|---|---|",
    ]
    totals = {}
    for name, rows in results["networks"].items():
        plain, patched = totals[name] = [sum(rows[kind].values()) / 1e3 for kind in ("plain", "patched")]
        share = rows["fold"] / 1e3 / patched
        lines.append(f"| {name} | {plain:.2f} | {patched:.2f} | {plain / patched:.2f}x | {share:.1%} |")
    for name, rows in results["networks"].items():
        for kind, total in zip(("plain", "patched"), totals[name], strict=True):
            lines += ["", f"{name}, {kind}:", "", "| op | MB | share |", "|---|---|---|"]
            shown = [(op, size) for op, size in rows[kind].items() if size >= total]  # a thousandth
            lines += [f"| {op} | {size:.0f} | {size / total / 1e3:.1%} |" for op, size in shown]
    return "\n".join(lines) + "\n"


NETWORKS = {f"unet, {ROWS} rows": unet, "vae, 1 picture": vae}


def main() -> None:
    """Count, print, and write ``traffic.json`` and ``README.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    results = {"torch": torch.__version__, "networks": {name: count(build) for name, build in NETWORKS.items()}}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "traffic.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "README.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
