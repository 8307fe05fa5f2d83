"""Text embeddings made up in a test, as a network takes them."""

from fastcraft.families.unet import UNetNetwork
from fastcraft.records import PromptEmbeds, TextEmbeds


def embeds(cond, uncond=None):
    """B prompts ``(B, L, D)`` and, with guidance, the empty one ``(1, L, D)``."""
    return PromptEmbeds(cond=TextEmbeds(sequence=cond), uncond=None if uncond is None else TextEmbeds(sequence=uncond))


def condition(unet, cond, uncond=None):
    """What a UNet prepared by `use_text_kv` reads of them at every step."""
    return UNetNetwork(module=unet).condition(embeds(cond, uncond))
