"""The planner of a run: its own networks on its own device."""

import os
from collections.abc import Iterable
from dataclasses import replace

import psutil
import torch

from fastcraft.forecast.cache import cached_estimate
from fastcraft.forecast.cards import CARDS, Card, cpu_card
from fastcraft.forecast.networks import Networks
from fastcraft.forecast.phases import OFFLOADS, TREATMENTS
from fastcraft.forecast.planner import Planner


def card_of(device: torch.device) -> Card:
    """The device as a `Card`: its own memory, with the rates of the card it is called after (else of an A100).

    It may pin its share of half the host memory that is free.

    A CPU has what is free now, less a tenth; ranks that share one should be given a budget each.
    """
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        known = [card for name, card in CARDS.items() if name.partition("-")[0] in found.name.lower()]
        local_ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1")  # torchrun, deepspeed
        return replace(
            (known or [CARDS["a100-80g"]])[0], name=found.name, memory_bytes=found.total_memory,
            host_bytes=psutil.virtual_memory().available // (2 * int(local_ranks)),
        )  # fmt: skip
    return cpu_card(psutil.virtual_memory().available)


def treatments_on(device: torch.device) -> tuple[str, ...]:
    """What a step with gradient is weighed under on ``device``."""
    return TREATMENTS + OFFLOADS if device.type == "cuda" else TREATMENTS


def planner_of(
    networks: Networks,
    *,
    device: torch.device,
    guided: bool,
    uncond_trained: bool,
    num_inference_steps: int,
    input_grad: bool,
    budget_gib: float = 0.0,
    decode_micro_batch: int = 0,
    world_size: int = 1,
    treatments: Iterable[str] = (),
    batches: bool = True,
    unet_copies: int = 0,
) -> Planner:
    """A planner for these networks on this device.

    Args:
        networks: of the run.
        device: where it trains.
        guided: whether a step calls the UNet on two rows per sample.
        uncond_trained: whether the trained encoder encodes the empty prompt too.
        num_inference_steps: T.
        input_grad: see `Trajectory`.
        budget_gib: what tensors may take at the peak; 0 = what the device has.
        decode_micro_batch: 0 = free to choose.
        world_size: ranks of ZeRO-2.
        treatments: what the estimate is to know; none = those of `treatments_on`.
        batches: see `Planner`.
        unet_copies: of the UNet's weights besides, as compiled code has them that they are frozen into.
    """
    card = card_of(device)
    treatments = tuple(treatments) or treatments_on(device)
    estimate = cached_estimate(
        networks,
        guided=guided,
        on_cpu=device.type == "cpu",
        uncond_trained=uncond_trained,
        world_size=world_size,
        treatments=tuple(sorted(treatments)),
    )
    if unet_copies:
        copies = {"UNet in compiled code": unet_copies * estimate.static["UNet"]}
        estimate = replace(estimate, static={**estimate.static, **copies})
    return Planner(
        estimate,
        card,
        num_inference_steps=num_inference_steps,
        input_grad=input_grad,
        budget_bytes=int(budget_gib * 2**30) or None,
        decode_micro_batch=decode_micro_batch,
        batches=batches,
    )
