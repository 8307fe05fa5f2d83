"""A frozen CLIPModel that several rewards share: image features once per batch, text features once per prompt.

Shape letters: B images, D width of the joint embedding.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcraft.errors import UserError
from fastcraft.rewards.clip_files import load_clip
from fastcraft.rewards.preprocess import Resize, resize_normalize

OPENAI_CLIP_L = "openai/clip-vit-large-patch14"


class ClipTower(nn.Module):
    """Both halves of a CLIP model, frozen, with their features L2-normalised.

    Args:
        model: a transformers ``CLIPModel``.
        tokenizer: its ``CLIPTokenizer``.
        source: where it came from, for records and messages.
        max_cached_prompts: text features kept, newest use first (3 KB each at D = 768).
    """

    def __init__(self, model: Any, tokenizer: Any, *, source: str, max_cached_prompts: int = 4096) -> None:
        super().__init__()
        if max_cached_prompts < 1:
            raise UserError(f"ClipTower: max_cached_prompts must be at least 1, got {max_cached_prompts}")
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.max_cached_prompts = max_cached_prompts
        self._text: OrderedDict[tuple[str, torch.device, torch.dtype], Tensor] = OrderedDict()
        self._images: dict[tuple[Resize, bool], tuple[Tensor, Tensor]] | None = None
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, path: str, *, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Read a folder or hub id; see `load_clip` for what is refused."""
        model, tokenizer = load_clip(path, dtype=dtype)
        return cls(model, tokenizer, source=path).to(device)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    @property
    def width(self) -> int:
        """D."""
        return self.model.config.projection_dim

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the arithmetic between preprocessing and normalisation."""
        return self.model.visual_projection.weight.dtype

    @contextmanager
    def shared_images(self) -> Iterator[None]:
        """Inside, the same ``images`` tensor goes through the vision half once; nothing is kept afterwards."""
        self._images = {}
        try:
            yield
        finally:
            self._images = None

    def image_features(self, images: Tensor, *, resize: Resize = "bicubic") -> Tensor:
        """Projected image embeddings.

        Args:
            images: ``(B, 3, H, W)`` float, in ``[0, 1]``.
            resize: see `resize_normalize`.

        Returns:
            ``(B, D)`` float32, unit rows; carries gradient to ``images``.
        """
        if self._images is None:
            return self._encode_images(images, resize)
        # A result with gradient serves a call without, never the other way round.
        for with_grad in {torch.is_grad_enabled(), True}:
            known, features = self._images.get((resize, with_grad), (None, None))
            if known is images and features is not None:
                return features
        features = self._encode_images(images, resize)
        self._images[resize, torch.is_grad_enabled()] = (images, features)
        return features

    def _encode_images(self, images: Tensor, resize: Resize) -> Tensor:
        size = self.model.config.vision_config.image_size
        # The default mean and std are those of every published CLIPModel.
        pixels = resize_normalize(images, size, resize=resize)
        output = self.model.get_image_features(pixel_values=pixels.to(self.dtype))
        return functional.normalize(_tensor(output).float(), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Projected text embeddings, without gradient; tokens beyond the model's length are cut off.

        Every prompt is encoded by itself, so its features do not depend on the batch it came in, and a resumed run
        sees the same numbers.

        Returns:
            ``(B, D)`` float32, unit rows.
        """
        weight = self.model.text_projection.weight
        rows = []
        for prompt in prompts:
            key = (prompt, weight.device, weight.dtype)
            if key not in self._text:
                self._text[key] = self._encode_text(prompt, weight.device)
            self._text.move_to_end(key)
            rows.append(self._text[key])
            if len(self._text) > self.max_cached_prompts:
                self._text.popitem(last=False)
        return torch.stack(rows)

    def _encode_text(self, prompt: str, device: torch.device) -> Tensor:
        with torch.no_grad():
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                [prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).to(device)
            # No attention mask: attention is causal and the features are read at the end mark, before any padding.
            output = self.model.get_text_features(input_ids=tokens.input_ids)
            return functional.normalize(_tensor(output).float(), dim=-1)[0]


def _tensor(output: Any) -> Tensor:
    """The features themselves: transformers 5 wraps them, 4 does not."""
    return output if isinstance(output, Tensor) else output.pooler_output


class Towers:
    """CLIP models by path, each loaded once and shared by the rewards that name it.

    Args:
        device: where they live.
        dtype: of their weights.
        bundled: folder that the path ``"shapes"`` stands for; None = there is none.
    """

    def __init__(self, *, device: torch.device | str, dtype: torch.dtype, bundled: Path | None = None) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.bundled = bundled
        self._loaded: dict[str, ClipTower] = {}

    def resolve(self, path: str) -> str:
        """``path`` with ``"shapes"`` replaced by the bundled folder.

        Raises:
            UserError: ``"shapes"`` where nothing is bundled.
        """
        if path != "shapes":
            return path
        if self.bundled is None or not self.bundled.is_dir():
            raise UserError(
                f"rewards: path 'shapes' needs the bundled reward model, and there is none at {self.bundled}"
            )
        return str(self.bundled)

    def clip(self, path: str) -> ClipTower:
        """The CLIP model at ``path``: a folder, a hub id, or ``"shapes"``."""
        path = self.resolve(path)
        key = str(Path(path).resolve()) if Path(path).is_dir() else path
        if key not in self._loaded:
            self._loaded[key] = ClipTower.load(path, device=self.device, dtype=self.dtype)
        return self._loaded[key]
