"""ImageReward: a BLIP that reads picture and prompt together, on transformers' classes.

Shape letters: B images, L tokens (35), P picture tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastcraft.errors import UserError
from fastcraft.rewards.affine_head import AffineHead
from fastcraft.rewards.base import Reward
from fastcraft.rewards.blip import load_blip
from fastcraft.rewards.checks import checked_flag, checked_resize
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.preprocess import Resize
from fastcraft.rewards.tensor_files import ReleasedFile, find_file
from fastcraft.rewards.tower import Tower, raised
from fastcraft.rewards.vocabulary import BERT, load_tokenizer

REPO = "THUDM/ImageReward"
BERT_REPO = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores on the authors' test set."""
MAX_TOKENS = 35
ADDED_MARKS = ("[DEC]", "[ENC]")
"""Which BLIP puts behind BERT's vocabulary, in this order; the last two rows of its table of words."""


class BlipTower(Tower):
    """Image half, text half with cross-attention and tokenizer of a BLIP; see `load_blip` for the first two."""

    def __init__(self, vision: Any, text: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(**options)
        self.vision, self.text, self.tokenizer = vision, text, tokenizer
        self.freeze()

    @property
    def image_network(self) -> nn.Module:
        """A ``BlipVisionModel``."""
        return self.vision

    def first_token(self, images: Tensor, prompts: Sequence[str], *, resize: Resize, clamp: bool) -> Tensor:
        """The text half's output at [CLS], with gradient to ``images``: ``(B, D)`` float32."""
        weight = self.text.embeddings.word_embeddings.weight
        size = self.vision.config.image_size
        pixels = self.preprocessed(images, size, resize=resize, clamp=clamp).to(weight.dtype)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).to(weight.device)
        picture = self.vision(pixel_values=pixels).last_hidden_state  # (B, P, D)
        output = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=picture,
            encoder_attention_mask=torch.ones(picture.shape[:2], dtype=torch.long, device=picture.device),
            is_decoder=False,
        )
        return raised(output.last_hidden_state[:, 0])


class ImageRewardReward(Reward):
    """``(head(first token) - 0.1672) / 1.0333``: people's preference, about 0 on average and 1 in spread.

    Prompts are cut at 35 tokens, which is little for long captions. The head is affine (see `collapse`) and stays in
    float32; the first token stays [CLS], as in the released code. ReFL uses ``relu(2 - score)`` as its loss.

    Official preprocessing: the short side of the 8-bit picture becomes 224 by bicubic, then the centre is cut out
    (`placement` ``crop``); the text goes as it is to BERT's uncased tokenizer with two marks more, [DEC] and [ENC],
    which are one token each where a prompt holds them, and is padded to 35 tokens.

    Args:
        tower: the BLIP.
        head: on the text half's first token.
        resize: see `resize_normalize`.
        clamp: straight-through clamp to [0, 1] after the resize; see `resize_normalize`.

    Source: Xu et al. 2023, arXiv:2304.05977, section 3, and its released model.
    """

    name = "imagereward"
    uses_prompt = True
    loads_weights = True
    score_range = "unbounded; 98 % of Stable Diffusion 1.4 in [-2, 2]"
    files = (
        ReleasedFile(
            name="ImageReward.pt",
            repo=REPO,
            sha256="d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
            num_bytes=1_786_880_927,
        ),
        ReleasedFile(name=BERT.forms[0][0], repo=BERT_REPO, instead=BERT.forms[1]),
    )

    vector: Tensor
    bias: Tensor

    def __init__(self, tower: BlipTower, head: AffineHead, *, resize: Resize = "bicubic", clamp: bool = False) -> None:
        super().__init__()
        self.tower = tower
        self.resize: Resize = checked_resize("imagereward", resize)
        self.clamp = checked_flag("imagereward", "clamp", clamp)
        self.register_buffer("vector", head.vector)
        self.register_buffer("bias", head.bias)
        self.freeze()

    @classmethod
    def build(cls, path: str, *, towers: Towers, tokenizer_path: str = "", **options: Any) -> Self:
        """``path`` is the released file, a folder with it or a hub id; empty = the hub's, checked by its SHA-256.

        ``tokenizer_path`` holds BERT's vocabulary; empty = beside the file, or else google-bert/bert-base-uncased.
        """
        file = find_file(path, cls.files[0], reward=cls.name)
        tokenizer = _load_tokenizer(tokenizer_path or (str(file.parent) if BERT.is_in(file.parent) else BERT_REPO))
        vision, text, head = load_blip(file, dtype=towers.dtype)
        num_tokens, size = max(tokenizer.get_vocab().values()) + 1, text.config.vocab_size
        if num_tokens != size:
            raise UserError(
                f"rewards: 'imagereward': its tokenizer has {num_tokens} ids with {' and '.join(ADDED_MARKS)}, its "
                f"model {size}; the vocabulary must be that of {BERT_REPO}"
            )
        tower = BlipTower(vision, text, tokenizer, source=str(file), pixels=towers.pixels)
        return cls(tower.to(towers.device), head, **options)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Backbone, resize and clamp."""
        return {"backbone": self.tower.source, "resize": self.resize, "clamp": self.clamp}

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` and B prompts to ``(B,)`` float32."""
        first = self.tower.first_token(images, prompts, resize=self.resize, clamp=self.clamp)  # (B, D)
        raw = (first * self.vector.to(first)).sum(dim=-1) + self.bias.to(first)
        return (raw - MEAN) / STD


def _load_tokenizer(place: str) -> Any:
    """BERT's, with the marks that BLIP adds."""
    from transformers import BertTokenizer

    tokenizer = load_tokenizer(BertTokenizer, place, BERT, owner="imagereward")
    tokenizer.add_tokens(list(ADDED_MARKS), special_tokens=True)
    return tokenizer
