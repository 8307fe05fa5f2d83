"""From a recipe to the parts of a run, top to bottom: `model`, `judges`, `plan`, and `run`, which puts them together.

This folder alone reads the whole of a recipe. What is below it takes plain arguments and speaks of those; the recipe's
keys are put on its messages here.
"""
