"""The console command ``fastcraft``: finds its subcommands in `fastcraft.commands` and runs one."""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastcraft import commands
from fastcraft.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other bad input."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``run`` is the chosen command's function."""
    parser = _Parser(prog="fastcraft", description="Reward fine-tuning of Stable Diffusion text encoders.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for found in pkgutil.iter_modules(commands.__path__):
        command = importlib.import_module(f"{commands.__name__}.{found.name}")
        subparser = subparsers.add_parser(command.NAME, help=command.HELP, description=command.HELP, allow_abbrev=False)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: that of the command; 2 for bad input (one line, no traceback)."""
    args = parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f"fastcraft: error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
