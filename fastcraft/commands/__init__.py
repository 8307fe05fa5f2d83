"""Subcommands of ``fastcraft``: every module here is one.

A command has ``NAME`` and ``HELP``, ``add_arguments(parser)``, and ``run(args)``, which returns the exit status. Heavy
imports belong inside ``run``, so that ``fastcraft --help`` stays quick.
"""
