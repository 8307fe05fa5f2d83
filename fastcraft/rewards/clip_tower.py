"""A frozen CLIPModel that several rewards share: image features once per batch, text features once per prompt.

Shape letters: B images, D width of the joint embedding.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcraft.errors import UserError
from fastcraft.rewards.clip_files import load_clip
from fastcraft.rewards.preprocess import Fit, Resize, placement
from fastcraft.rewards.tower import ImageCache, Tower, raised


class ClipTower(Tower):
    """Both halves of a CLIP model, frozen, with their features L2-normalised.

    Args:
        model: a transformers ``CLIPModel``.
        tokenizer: its ``CLIPTokenizer``.
        source: where it came from, for records and messages.
        max_cached_prompts: text features kept, newest use first (3 KB each at D = 768).
        pixels: see `Tower`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        source: str,
        max_cached_prompts: int = 4096,
        pixels: ImageCache | None = None,
    ) -> None:
        super().__init__(source=source, pixels=pixels)
        if max_cached_prompts < 1:
            raise UserError(f"ClipTower: max_cached_prompts must be at least 1, got {max_cached_prompts}")
        self.model = model
        self.tokenizer = tokenizer
        self.max_cached_prompts = max_cached_prompts
        # A plain number: rounded to bfloat16 it would be off by one percent.
        self.logit_scale = model.logit_scale.detach().float().exp().item()
        self._text: OrderedDict[tuple[str, torch.device, torch.dtype], Tensor] = OrderedDict()
        self.freeze()

    @property
    def image_network(self) -> nn.Module:
        """A ``CLIPVisionModel``."""
        return self.model.vision_model

    @property
    def width(self) -> int:
        """D."""
        return self.model.config.projection_dim

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the arithmetic between preprocessing and normalisation."""
        return self.model.visual_projection.weight.dtype

    @property
    def image_size(self) -> int:
        """Side of the square that the image half reads, in pixels."""
        return self.model.config.vision_config.image_size

    @property
    def max_tokens(self) -> int:
        """Of a text, with the marks of its beginning and end; what is beyond is cut off."""
        return self.model.config.text_config.max_position_embeddings

    def num_tokens(self, text: str) -> int:
        """With both marks, before anything is cut off."""
        return len(self.tokenizer(text, verbose=False).input_ids)

    def image_features(
        self, images: Tensor, *, resize: Resize = "bicubic", clamp: bool = False, fit: Fit = "crop"
    ) -> Tensor:
        """Projected image embeddings.

        Args:
            images: ``(B, 3, H, W)`` float, in ``[0, 1]``.
            resize: see `resize_normalize`.
            clamp: straight-through clamp after the resize.
            fit: see `placement`.

        Returns:
            ``(B, D)`` float32, unit rows; carries gradient to ``images``.
        """
        key = (placement(images, self.image_size, fit), resize, clamp)
        return self.features.get(images, key, lambda: self._encode_images(images, resize, clamp, fit))

    def _encode_images(self, images: Tensor, resize: Resize, clamp: bool, fit: Fit) -> Tensor:
        pixels = self.preprocessed(images, self.image_size, resize=resize, clamp=clamp, fit=fit)
        output = self.model.get_image_features(pixel_values=pixels.to(self.dtype))
        return functional.normalize(raised(_tensor(output)), dim=-1)

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
            tokens = self.tokenizer(
                [prompt], padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
            ).to(device)
            # No attention mask: attention is causal and the features are read at the end mark, before any padding.
            output = self.model.get_text_features(input_ids=tokens.input_ids)
            return functional.normalize(raised(_tensor(output)), dim=-1)[0]


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
        self.pixels = ImageCache()
        self._loaded: dict[tuple[str, str, str, int], ClipTower] = {}

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

    def clip(
        self,
        path: str,
        *,
        tokenizer_path: str = "",
        tokenizer: str = "",
        activation: str = "gelu",
        head_width: int = 0,
    ) -> ClipTower:
        """The CLIP model at ``path``.

        Args:
            path: a folder, a hub id, ``"shapes"``, or a file or folder of open_clip.
            tokenizer_path: see `load_clip`.
            tokenizer: see `load_clip`.
            activation: see `load_open_clip`.
            head_width: see `load_open_clip`.
        """
        path = self.resolve(path)
        place = str(Path(path).resolve()) if Path(path).exists() else path
        key = (place, tokenizer_path, activation, head_width)
        if key not in self._loaded:
            model, vocabulary = load_clip(
                path,
                dtype=self.dtype,
                tokenizer_path=tokenizer_path,
                tokenizer=tokenizer,
                activation=activation,
                head_width=head_width,
            )
            tower = ClipTower(model, vocabulary, source=path, pixels=self.pixels)
            self._loaded[key] = tower.to(self.device)
        return self._loaded[key]
