"""Which prompt and which noise a sample gets: functions of counters, so that any run can be resumed or split anew."""

import hashlib
from collections.abc import Sequence

from fastcraft.errors import UserError
from fastcraft.records import PromptBatch

_MASK64 = (1 << 64) - 1
_NUM_ROUNDS = 8
_MIN_HALF_BITS = 4  # a Feistel network over fewer bits reaches too few orders of a handful of prompts


def prompt_at(num_prompts: int, index: int, seed: int) -> int:
    """The prompt of the sample numbered ``index``.

    Samples ``e * num_prompts`` to ``(e + 1) * num_prompts - 1`` are epoch ``e``: each prompt once, in an order of that
    epoch and ``seed`` alone. Nothing is stored, so ten million prompts cost what ten do.

    Args:
        num_prompts: at least 1.
        index: global sample number, at least 0.
        seed: of the run.

    Returns:
        A number in ``[0, num_prompts)``.

    Raises:
        ValueError: an argument out of range.

    Source: a balanced Feistel network with cycle walking, Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains", sections 4 and 5; a shuffle, not a cipher.
    """
    if num_prompts < 1 or index < 0:
        raise ValueError(f"prompt_at: need num_prompts >= 1 and index >= 0, got {num_prompts} and {index}")
    epoch, value = divmod(index, num_prompts)
    keys = [_hash64("order", seed, epoch, i) for i in range(_NUM_ROUNDS)]
    half_bits = max(_MIN_HALF_BITS, ((num_prompts - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = value >> half_bits, value & mask
        for key in keys:
            left, right = right, left ^ (_mix64(key ^ right) & mask)
        value = left << half_bits | right
        if value < num_prompts:
            return value


def sample_seed(run_seed: int, index: int, stream: int = 0) -> int:
    """Seed of the noise generator of one sample.

    Args:
        run_seed: of the run.
        index: global sample number.
        stream: tells apart several generators of one sample.

    Returns:
        A number in ``[0, 2**63)``, the same on every machine and at every world size.
    """
    return _hash64("noise", run_seed, index, stream) >> 1


def reused_index(index: int, *, reuse: int, pool: int) -> int:
    """The sample whose prompt and noise the sample numbered ``index`` repeats.

    ``pool`` samples are gone through ``reuse`` times in the same order, then the next ``pool``.
    """
    block, within = divmod(index, reuse * pool)
    return block * pool + within % pool


class PromptOrder:
    """Batches of prompts in the order of `prompt_at`, each pair of prompt and noise used ``reuse`` times.

    Sample numbers count over micro-steps and ranks, so the order is the same at any world size and batch size, and a
    run goes on exactly where it stopped when it keeps count of the samples it has seen.

    Args:
        prompts: at least one.
        seed: of the run.
        reuse: see `reused_index`.
        pool: see `reused_index`.

    Raises:
        UserError: no prompts.
    """

    def __init__(self, prompts: Sequence[str], *, seed: int, reuse: int = 1, pool: int = 1) -> None:
        if not len(prompts):
            raise UserError("prompts: at least one is needed, got none")
        self.prompts = prompts
        self.seed = seed
        self.reuse = reuse
        self.pool = pool

    def batch(self, first: int, rank: int, *, batch_size: int) -> PromptBatch:
        """What ``rank`` works on in the micro-step whose first sample, over all ranks, has the number ``first``.

        Raises:
            ValueError: an argument out of range.
        """
        if not (first >= 0 and rank >= 0 and batch_size >= 1):
            raise ValueError(f"PromptOrder.batch: first {first}, rank {rank}, batch_size {batch_size}")
        first += rank * batch_size
        numbers = range(first, first + batch_size)
        indices = [reused_index(number, reuse=self.reuse, pool=self.pool) for number in numbers]
        prompts = [self.prompts[prompt_at(len(self.prompts), index, self.seed)] for index in indices]
        return PromptBatch(prompts=prompts, indices=indices)


def _hash64(*parts: str | int) -> int:
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _mix64(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK64
    return value ^ (value >> 31)
