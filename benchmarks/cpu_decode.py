"""Layout of a decode on a CPU: ``OMP_NUM_THREADS=1 python -m benchmarks.cpu_decode [--out FILE]``.

The bundled VAE with its pictures kept contiguous behind the middle attention, as `fastcraft.families.components` does
in bfloat16, against the layout that the attention leaves; 8 pictures, forward and backward, in turn.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from fastcraft.evaluation.environment import environment
from fastcraft.families.components import load_components
from fastcraft.shapes import PIPELINE


def measure(rounds: int) -> list[dict[str, object]]:
    """Median milliseconds of forward and backward, by dtype and layout."""
    rows: list[dict[str, object]] = []
    for dtype in (torch.bfloat16, torch.float32):
        times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        vaes = {}
        for contiguous in times:
            folder = PIPELINE
            vaes[contiguous] = load_components(folder, dtype=dtype, device=torch.device("cpu")).vae
            middle = vaes[contiguous].decoder.mid_block
            middle._forward_hooks.clear()
            if contiguous:
                middle.register_forward_hook(lambda module, inputs, picture: picture.contiguous())
        for number in range(rounds + 3):
            for contiguous, vae in vaes.items():
                latents = torch.randn(8, 4, 8, 8).to(dtype).requires_grad_()
                began = time.perf_counter()
                pictures = vae.decode(latents, return_dict=False)[0].float()
                between = time.perf_counter()
                pictures.sum().backward()
                if number >= 3:
                    times[contiguous].append((1e3 * (between - began), 1e3 * (time.perf_counter() - between)))
        for contiguous, pairs in times.items():
            forward, backward = (statistics.median(column) for column in zip(*pairs, strict=True))
            name = str(dtype).removeprefix("torch.")
            rows.append({"dtype": name, "contiguous": contiguous, "forward_ms": forward, "backward_ms": backward})
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    rows = measure(args.rounds)
    for row in rows:
        print(row)
    if args.out:
        document = {"environment": environment(), "threads": torch.get_num_threads(), "rows": rows}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
