"""What ``fastcraft`` can do: one file for each subcommand, and one for each topic of ``fastcraft info``.

Heavy imports belong inside ``run``, so that ``fastcraft --help`` stays quick.
"""
