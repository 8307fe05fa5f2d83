"""The objectives' catalogue: each turns a batch of prompts into losses."""

from fastcraft.registry import Registry

OBJECTIVES = Registry("objective", {"reward_backprop": "fastcraft.objectives.reward_backprop:RewardBackprop"})
