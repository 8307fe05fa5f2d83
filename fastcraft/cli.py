"""The console command ``fastcraft``: finds the subcommand and hands over."""

import importlib
import logging
import sys
from collections.abc import Sequence

from fastcraft.errors import CommandLine, UserError

COMMANDS = {
    "info": "fastcraft.commands.info",
    "plan": "fastcraft.commands.plan",
    "profile": "fastcraft.commands.profile",
    "score": "fastcraft.commands.score",
}
"""Name -> module with ``HELP``, ``add_arguments(parser)`` and ``run(args) -> exit status``; cheap to import."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input (one line, no traceback), else what the subcommand says."""
    parser = CommandLine(
        prog="fastcraft",
        description="Tools around the fine-tuning of text encoders by rewards. Training itself: fastcraft/train.py.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandLine)
    modules = {name: importlib.import_module(path) for name, path in COMMANDS.items()}
    for name, module in modules.items():
        subparser = commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(subparser)
    args = parser.parse_args(argv)
    logging.getLogger("xformers").setLevel(logging.ERROR)  # on a machine without CUDA it warns about its extensions
    try:
        return modules[args.command].run(args)
    except UserError as error:
        print(f"fastcraft: error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
