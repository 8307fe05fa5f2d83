"""Bytes that autograd keeps for one sample, plain and patched: ``python -m benchmarks.saved_bytes``.

Of a UNet for one step, and of a reward's image tower for one picture. Counted on the meta device at full size, in
bfloat16: nothing is computed, no weights are needed. One sample is one row of the UNet's batch; a guided picture has
two. Every storage counts once, for the first op that keeps it. What exists without the step does not count: parameters
and what the network is called with (latents, text, and the text keys and values, which all steps share; pictures).
PyTorch's fused attention is counted as a flash kernel keeps it: q, k, v, output and one number a row.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcraft.diffusion.patch import Patch
from fastcraft.families.components import freeze
from fastcraft.families.unet import UNetNetwork, use_text_kv
from fastcraft.records import PromptEmbeds, TextEmbeds

RESULTS = Path(__file__).parent / "results" / "saved_bytes"
TEXT_LENGTH = 77
_SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
MODELS: dict[str, dict[str, Any]] = {  # the published configurations, at the resolution that they were trained for
    "sd15@512": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21@768": {
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl@1024": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True, **_SDXL_BLOCKS,
    },
}  # fmt: skip


TOWERS: dict[str, dict[str, Any]] = {  # the image towers of the released rewards, at 224 pixels
    "clip-vit-l/14": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "hidden_act": "quick_gelu",
    },
    "clip-vit-h/14": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14, "hidden_act": "gelu",
    },
    "blip-vit-l/16": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 16, "image_size": 224,
    },
}  # fmt: skip
Rows = dict[str, dict[str, dict[str, float]]]


def count(model: str) -> Rows:
    """``{"plain": {op: {"tensors": n, "mb": MB}}, "patched": {...}}``; 1 MB is 10**6 bytes."""
    return count_tower(model) if model in TOWERS else count_unet(model)


def count_tower(tower: str) -> Rows:
    """Of a reward's image tower."""
    from transformers import BlipVisionConfig, BlipVisionModel, CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        network: Any = (
            CLIPVisionModel(CLIPVisionConfig(**TOWERS[tower]))
            if tower.startswith("clip")
            else BlipVisionModel(BlipVisionConfig(**TOWERS[tower]))
        )
        pictures = torch.empty(1, 3, 224, 224, dtype=torch.bfloat16, requires_grad=True)
    freeze(network.to(torch.bfloat16))
    owned = [*network.parameters(), *network.buffers(), pictures]

    def call() -> Tensor:
        return network(pixel_values=pictures).pooler_output

    rows = {"plain": _kept(call, owned)}
    with Patch(network):
        rows["patched"] = _kept(call, owned)
    return rows


def count_unet(model: str) -> Rows:
    """Of a UNet."""
    from diffusers import UNet2DConditionModel

    config = MODELS[model]
    with torch.device("meta"):
        unet = torch.nn.Module.to(freeze(UNet2DConditionModel(**config)), torch.bfloat16)
        latents = torch.empty(1, 4, config["sample_size"], config["sample_size"], dtype=torch.bfloat16)
        text = torch.empty(1, TEXT_LENGTH, config["cross_attention_dim"], dtype=torch.bfloat16, requires_grad=True)
        timestep = torch.empty((), dtype=torch.long)
        pooled, time_ids = torch.empty(1, 1280, dtype=torch.bfloat16), torch.empty(1, 6)
    added = {"text_embeds": pooled, "time_ids": time_ids} if "addition_embed_type" in config else None
    latents.requires_grad_()  # the latents of all but the first step with gradient depend on the text

    def call(**kwargs: Any) -> Tensor:
        arguments = {"encoder_hidden_states": text, "added_cond_kwargs": added} | kwargs
        return unet(latents, timestep, return_dict=False, **arguments)[0]

    owned = [*unet.parameters(), *unet.buffers(), latents, text]
    rows = {"plain": _kept(call, owned)}
    if added is None:
        use_text_kv(unet)
        conditioning = UNetNetwork(module=unet).condition(PromptEmbeds(cond=TextEmbeds(sequence=text)))
        with Patch(unet):
            rows["patched"] = _kept(
                lambda: call(encoder_hidden_states=None, cross_attention_kwargs={"conditioning": conditioning}),
                [*owned, *conditioning.flat()],
            )
    else:
        with Patch(unet):
            rows["patched"] = _kept(call, owned)
    return rows


def total_mb(row: dict[str, dict[str, float]]) -> float:
    """Megabytes of one column."""
    return sum(op["mb"] for op in row.values())


def _kept(call: Callable[[], Tensor], owned: list[Tensor]) -> dict[str, dict[str, float]]:
    """What the graph of ``call()`` holds, by the op that holds it; the same total as saved-tensor hooks see."""
    hooked: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in owned}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        hooked.setdefault(storage._cdata, storage)
        return tensor

    with (
        mock.patch.object(F, "scaled_dot_product_attention", flash),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = call()
    seen = {tensor.untyped_storage()._cdata for tensor in owned}
    rows: dict[str, dict[str, float]] = {}
    for node in _nodes(output.grad_fn):
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            if storage._cdata in seen:
                continue
            seen.add(storage._cdata)
            name = node.name().removeprefix("GeneratedBackwardFor_").removesuffix("Backward0")
            row = rows.setdefault(name.removesuffix("_defaultBackward"), {"tensors": 0, "mb": 0.0})
            row["tensors"] += 1
            row["mb"] += storage.nbytes() / 1e6
    by_hooks = sum(storage.nbytes() for storage in hooked.values() if storage is not None) / 1e6
    assert math.isclose(total_mb(rows), by_hooks, rel_tol=1e-5), (
        f"the graph holds {total_mb(rows)} MB, hooks saw {by_hooks} MB"
    )
    return dict(sorted(rows.items(), key=lambda item: -item[1]["mb"]))


def flash(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """On the meta device PyTorch would take its plain product, which keeps the whole matrix and no GPU run uses."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


def _nodes(root: Any) -> Iterator[Any]:
    """Every node of an autograd graph, forward order last to first."""
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def _saved(node: Any) -> Iterator[Tensor]:
    if hasattr(node, "saved_tensors"):
        yield from (tensor for tensor in node.saved_tensors if tensor is not None)
        return
    for name in dir(node):
        if name.startswith("_saved_"):
            value = getattr(node, name)
            yield from (x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, Tensor))


def markdown(results: dict[str, Any]) -> str:
    """Tables by model and op."""
    lines = [
        "# Bytes kept by autograd for one sample: a UNet's step, a reward's image tower",
        "",
        (__doc__ or "").split("\n\n", 1)[1].strip(),
    ]
    lines += ["", "`python -m benchmarks.saved_bytes`, torch " + results["torch"] + ".", ""]
    lines += ["| model | plain, MB | patched, MB | ratio |", "|---|---|---|---|"]
    for model, rows in results["models"].items():
        plain, patched = total_mb(rows["plain"]), total_mb(rows["patched"])
        lines.append(f"| {model} | {plain:.1f} | {patched:.1f} | {plain / patched:.2f}x |")
    for model, rows in results["models"].items():
        for kind, row in rows.items():
            lines += ["", f"{model}, {kind}:", "", "| op | tensors | MB |", "|---|---|---|"]
            lines += [f"| {op} | {cell['tensors']} | {cell['mb']:.1f} |" for op, cell in row.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, print, and write ``saved_bytes.json`` and ``README.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS, *TOWERS], choices=[*MODELS, *TOWERS])
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    results = {"torch": torch.__version__, "models": {model: count(model) for model in args.models}}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "saved_bytes.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "README.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
