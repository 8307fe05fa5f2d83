"""What a denoiser reads at every step besides the latents, prepared once per prompt.

Text does not depend on the timestep, so a network prepares of it what it can before the first step: keys and values of
cross-attention, embeddings that are added to the timestep's. In backward, the gradients of all denoising steps meet
there, and go on to the text encoders a single time.

Shape letters: N samples that the network sees in a step, R rows, L text length, C a layer's width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditioning:
    """The same for all steps of a run, with gradient where the text has one.

    ``layers`` maps the name of a cross-attention layer to its ``(key, value)``, each ``(R, L, C)``; ``leaves`` are
    other tensors ``(R, ...)`` that gradients reach. Of the N samples (2B with guidance, unconditional ones first) the
    first N - R + 1 read row 0, each of the others a row of its own. So R = N is a row each, and with R = B + 1 the
    unconditional samples share one.

    ``sums`` has, for layers that add the gradients of all denoising steps up themselves, the float32 tensors that they
    are added to, in the shapes of key and value. They belong to the very tensors in ``layers``.
    """

    layers: Mapping[str, Pair] = field(default_factory=dict)
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    sums: Mapping[str, Pair] = field(default_factory=dict)

    def flat(self) -> list[Tensor]:
        """Every tensor that gradients reach: key, value, key, value, ..., then the leaves."""
        return [tensor for pair in self.layers.values() for tensor in pair] + list(self.leaves.values())

    def unflatten(self, flat: Sequence[Tensor]) -> "Conditioning":
        """Other tensors in the places of these; the inverse of `flat`.

        A layer keeps its sums where it gets its own tensors back. Copies, such as a graph's static inputs, go without:
        their gradient is autograd's to add up.
        """
        pairs = zip(flat[: 2 * len(self.layers) : 2], flat[1 : 2 * len(self.layers) : 2], strict=True)
        layers = dict(zip(self.layers, pairs, strict=True))
        leaves = dict(zip(self.leaves, flat[2 * len(self.layers) :], strict=True))
        sums = {name: pair for name, pair in self.sums.items() if layers[name][0] is self.layers[name][0]}
        return Conditioning(layers=layers, leaves=leaves, sums=sums)

    def repeat(self, times: int, *, num_samples: int) -> "Conditioning":
        """For a batch of ``num_samples`` that is stacked ``times`` over: every branch's rows, as often in turn.

        A row that the unconditional samples share stays one. There are no ``sums``: these rows are copies.
        """

        def rows(tensor: Tensor) -> Tensor:
            shared, each = tensor.split([len(tensor) % num_samples, len(tensor) // num_samples * num_samples])
            branches = each.unflatten(0, (-1, 1, num_samples))
            return torch.cat([shared, branches.expand(-1, times, *branches.shape[2:]).flatten(0, 2)])

        return self._map(rows)

    def detach(self) -> "Conditioning":
        """The same numbers, cut off from the text encoders."""
        return self._map(Tensor.detach)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        layers = {name: (change(key), change(value)) for name, (key, value) in self.layers.items()}
        return Conditioning(layers=layers, leaves={name: change(leaf) for name, leaf in self.leaves.items()})
