"""What ranks need to know of each other: their number, a barrier, and whether any of them has seen something."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as distributed

from fastcraft.errors import UserError

T = TypeVar("T")


def agree(flags: Sequence[bool]) -> list[bool]:
    """Logical OR of each flag over all ranks.

    Every rank must call it at the same place with the same number of flags; it is a barrier and a host sync of a few
    bytes. Called before every backward: a NaN or a signal on one rank then makes all of them skip, or stop, together
    instead of leaving the others in a collective that never ends. A single process returns its own flags.
    """
    if world_size() == 1:
        return [bool(flag) for flag in flags]
    device = f"cuda:{torch.cuda.current_device()}" if distributed.get_backend() == "nccl" else "cpu"
    votes = torch.tensor([bool(flag) for flag in flags], dtype=torch.int32, device=device)
    distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def close_distributed() -> None:
    """Leave the process group; the last thing that a run does. Another run may follow in the same process."""
    deepspeed = sys.modules.get("deepspeed.comm")  # keeps references of its own, where it was used at all
    if deepspeed is not None and deepspeed.is_initialized():
        deepspeed.destroy_process_group()
    elif distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number among `world_size`."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Number of training processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    agree([False])


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean of ``values`` over all ranks, the same shape, dtype and device. Collective."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values / world_size()


def gather(value: Any) -> list[Any] | None:
    """Every rank's ``value``, in rank order, on rank 0; None elsewhere. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    distributed.gather_object(value, values)
    return values


def from_rank_zero(work: Callable[[], T]) -> T:
    """What ``work`` returns on rank 0, on every rank; a `UserError` there is raised everywhere. Collective."""
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = work()
        except (UserError, OSError) as error:
            box[1] = str(error)
    if world_size() > 1:
        distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise UserError(box[1])  # on every rank
    return box[0]
