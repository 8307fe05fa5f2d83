"""What the miniature world's aesthetic head likes, as a formula on pixels, and the head itself.

The head likes **vivid** pictures: strong color and strong contrast. For a picture in [0, 1]

    vividness = 10 * (0.6 * chroma + 0.8 * contrast)

where `chroma` is the mean of (largest - smallest RGB channel) over the twentieth of the pixels with the most of it,
and `contrast` is the standard deviation of Rec. 601 luma over the picture. Values run from 0 (uniform gray) to about 9.
No caption mentions it, so a text encoder that raises it changes the style of a picture and not what is in it. It can be
hacked: more or larger objects raise the contrast too, and then the judge's `count` and `size` fall.
"""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (64, 32, 16, 8)
"""Outputs of the head's inner layers."""


def vividness(images: Tensor) -> Tensor:
    """Score pictures by the formula above: (B, 3, H, W) in [0, 1] to (B,). Differentiable almost everywhere."""
    chroma = (images.amax(1) - images.amin(1)).flatten(1)
    most = chroma.topk(max(1, chroma.shape[1] // 20), dim=1).values.mean(1)
    luma = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1).flatten(1)
    return 10.0 * (0.6 * most + 0.8 * luma.std(1))


class AestheticHead(nn.Module):
    """Five linear layers on a normalised image embedding, in the key layout of LAION's aesthetic predictor.

    As there, nothing non-linear lies between them; the dropouts at the odd places do nothing when scoring.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        a, b, c, d = WIDTHS
        self.layers = nn.Sequential(
            nn.Linear(width, a), nn.Identity(), nn.Linear(a, b), nn.Identity(),
            nn.Linear(b, c), nn.Identity(), nn.Linear(c, d), nn.Linear(d, 1),
        )  # fmt: skip

    def forward(self, embeds: Tensor) -> Tensor:
        """Scores (B,) of L2-normalised image embeddings (B, D)."""
        return self.layers(embeds)[:, 0]
