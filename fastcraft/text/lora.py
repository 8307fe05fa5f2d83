"""LoRA on the text encoder's attention (Hu et al. 2021, arXiv:2106.09685), by peft.

Settings of TexForce (arXiv:2311.15657): rank 16, alpha 16, the four attention projections, Gaussian initialisation.
"""

from typing import Any

import torch

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def inject_lora(model: Any, *, rank: int, alpha: float) -> None:
    """Add trainable float32 adapters to a ``CLIPTextModel`` in place; all its own weights are frozen.

    The adapters' second factor starts at zero, so the model's output is unchanged.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it by r: a fraction is fine
        target_modules=list(TARGETS),
        init_lora_weights="gaussian",
    )
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
