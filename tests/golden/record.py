"""Record the numbers of cases: ``python -m tests.golden.record [CASE ...] [--because "REASON"]``.

A case without values is recorded; one that has some is left alone unless a reason is given, which is kept beside them.
``--compare`` changes nothing and prints how far this machine's numbers are from those on file.
"""

import argparse
import contextlib
import datetime
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.golden.cases import CASES, LONG, SHORT
from tests.golden.job import VALUES, fingerprint, numbers, read, run_case, threads, write


def measure(name: str, folder: Path) -> dict[str, Any]:
    """The short and the long run of a case."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return {
            "short": run_case(name, SHORT, folder / f"{name}-short"),
            "long": run_case(name, LONG, folder / f"{name}-long"),
        }


def record(name: str, folder: Path, because: str) -> None:
    """Write the values of one case, with the reasons of all times it was recorded."""
    history = read(name)["because"] if (VALUES / f"{name}.json").is_file() else []
    reason = f"{datetime.date.today().isoformat()}: {because or 'recorded for the first time'}"
    write(name, {"because": [*history, reason], "fingerprint": fingerprint(), **measure(name, folder)})


def compare(name: str, folder: Path) -> str:
    """The largest relative differences from the values on file, over all steps of the short and of the long run."""
    old, new = read(name), measure(name, folder)
    found = []
    for part in ("short", "long"):
        largest: dict[str, float] = {}
        for before, after in zip(old[part]["steps"], new[part]["steps"], strict=True):
            was, now = numbers(before), numbers(after)
            for key, value in was.items():
                largest[key] = max(largest.get(key, 0.0), abs(now[key] - value) / max(abs(value), 1e-30))
        found.append(f"{part}: " + ", ".join(f"{key} {value:.1e}" for key, value in largest.items()))
    return "; ".join(found)


def main() -> int:
    """Exit status: 0 done, 2 a case has values already and no reason was given."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.record", allow_abbrev=False)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--because", default="", metavar="REASON", help="why existing values are replaced")
    parser.add_argument("--compare", action="store_true", help="only print differences from the values on file")
    parser.add_argument("--threads", type=int, default=1, help="to compare with; values are recorded with one")
    args = parser.parse_args()
    names = args.cases or list(CASES)
    if unknown := sorted(set(names) - set(CASES)):
        parser.error(f"no such case: {', '.join(unknown)}")
    if args.threads != 1 and not args.compare:
        parser.error("--threads: values are recorded with one thread")
    there = [name for name in names if (VALUES / f"{name}.json").is_file()]
    if there and not (args.compare or args.because.strip()):
        if args.cases:
            parser.error(f'{", ".join(there)}: recorded already; say --because "REASON" to replace the values')
        names = [name for name in names if name not in there]
    with threads(args.threads), tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # estimates that are kept are this run's own
        for name in names:
            began = time.perf_counter()
            said = compare(name, Path(folder)) if args.compare else record(name, Path(folder), args.because) or ""
            print(f"{name}  {time.perf_counter() - began:.1f} s  {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
