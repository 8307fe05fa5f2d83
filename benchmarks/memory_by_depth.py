"""Memory against depth with committed results: ``python -m benchmarks.memory_by_depth [fastcraft profile's options]``.

The same as ``fastcraft profile``; results go to ``benchmarks/results/<card or cpu>/`` unless ``--out`` says otherwise.
"""

import argparse
import sys
from pathlib import Path

import torch

from fastcraft.commands import profile
from fastcraft.errors import UserError

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Exit status: 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    profile.add_arguments(parser)
    card = torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"
    parser.set_defaults(out=RESULTS / card)
    try:
        return profile.run(parser.parse_args())
    except UserError as error:
        print(f"benchmarks.memory_by_depth: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
