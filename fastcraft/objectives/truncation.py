"""Which denoising steps carry gradient: the one thing in which the reward back-propagation methods differ.

| truncation | method | source |
|---|---|---|
| last | TextCraftor, DRaFT-K, DRaFT-LV | arXiv:2403.18978 Alg. 1; arXiv:2309.17400 Sec. 3 |
| random | AlignProp | arXiv:2310.03739 Sec. 4 (randomised truncation) |
| single | ReFL | arXiv:2304.05977 Alg. 1 |
| spaced | DRTune | arXiv:2405.00760 Sec. 3 |
"""

import random
from collections.abc import Sequence

from fastcraft.records import Trajectory


def choose_trajectory(
    truncation: str,
    *,
    num_inference_steps: int,
    backprop_steps: int,
    rng: random.Random,
    row_rngs: Sequence[random.Random] = (),
    truncation_std: float = 0.0,
    early_stop_steps: int = 0,
    input_grad: bool = True,
    uncond_grad: bool = True,
) -> Trajectory:
    """Draw the trajectory of one micro-batch.

    Args:
        truncation: ``last``: the last K steps; ``random``: for each sample from a step drawn from N(T - K, std) to the
            end; ``single``: one step drawn from the last K, where the run ends with its x0 estimate; ``spaced``: K
            equally spaced steps from a random offset, the run ending with the x0 estimate of its last step.
        num_inference_steps: T.
        backprop_steps: K, in 1..T.
        rng: the random numbers of this micro-batch.
        row_rngs: those of each sample, for ``random``.
        truncation_std: standard deviation of the ``random`` start, in steps.
        early_stop_steps: ``spaced``: up to this many last steps are left out, at random.
        input_grad: see `Trajectory`.
        uncond_grad: see `Trajectory`.
    """
    total, depth, num_steps, predict_original = num_inference_steps, backprop_steps, num_inference_steps, False
    row_starts: tuple[int, ...] = ()
    if truncation == "last":
        grad_steps = range(total - depth, total)
    elif truncation == "random":
        starts = (round(row.gauss(total - depth, truncation_std)) for row in row_rngs)
        row_starts = tuple(min(max(start, 0), total - 1) for start in starts)
        grad_steps = range(min(row_starts), total)
    elif truncation == "single":
        last = rng.randrange(total - depth, total)
        grad_steps, num_steps, predict_original = range(last, last + 1), last + 1, True
    elif truncation == "spaced":
        stride = total // depth
        num_steps, predict_original = total - rng.randint(0, early_stop_steps), True
        offset = rng.randrange(min(stride, num_steps))
        grad_steps = range(offset, min(offset + stride * depth, num_steps), stride)
    else:
        raise ValueError(f"truncation must be 'last', 'random', 'single' or 'spaced', got {truncation!r}")
    return Trajectory(
        num_steps=num_steps,
        grad_steps=tuple(grad_steps),
        predict_original=predict_original,
        input_grad=input_grad,
        uncond_grad=uncond_grad,
        row_starts=row_starts,
    )
