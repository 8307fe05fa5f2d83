"""What the denoising loop asks of a network: one implementation for each way in which text enters."""

from typing import Any, Protocol

from torch import Tensor

from fastcraft.diffusion.conditioning import Conditioning
from fastcraft.records import PromptEmbeds


class Network(Protocol):
    """A denoiser behind two calls."""

    @property
    def module(self) -> Any:
        """The network itself, an ``nn.Module`` or what stands for one: its blocks may be recomputed one by one."""

    def using(self, module: Any) -> "Network":
        """The same with another module in its place."""

    def condition(self, prompts: PromptEmbeds) -> Conditioning:
        """What the network reads of B prompts, for N = 2B samples (unconditional first) or, without guidance, N = B."""

    def predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning, *, guided: bool) -> Tensor:
        """What the network predicts with the text and, if ``guided``, without it; the sampler's step combines the two.

        Args:
            latents: ``(B, C, h, w)`` float32.
            time: ``()``, or ``(B,)`` of one's own for each row, on the network's device.
            conditioning: for B samples; if ``guided`` for 2B, unconditional first.
            guided: whether there are unconditional rows.

        Returns:
            ``(B, C, h, w)`` or, if ``guided``, ``(2B, C, h, w)``; dtype of the network.
        """
