"""Reads a CLIPModel and its tokenizer from disk or the hub, and refuses whatever would be half right."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastcraft.errors import UserError
from fastcraft.rewards.open_clip import OPEN_CLIP_FILES, load_open_clip
from fastcraft.rewards.tensor_files import ENDINGS, ReleasedFile, first_line, some
from fastcraft.rewards.vocabulary import CLIP, load_tokenizer
from fastcraft.rewards.wrong_files import refuse_wrong_file

OPENAI_CLIP_L = "openai/clip-vit-large-patch14"
LAION_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_PICKLE = "pytorch_model.bin"

_LOAD_ERRORS = (OSError, EOFError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError)


def released_vocabulary(repo: str) -> ReleasedFile:
    """CLIP's vocabulary on the hub."""
    return ReleasedFile(name=CLIP.forms[0][0], repo=repo, instead=CLIP.forms[1])


def released_clip(repo: str, *, vocabulary: str = "") -> tuple[ReleasedFile, ...]:
    """What a ``CLIPModel`` on the hub is read from; ``vocabulary`` is another hub id, empty = the same."""
    return (
        ReleasedFile(name="model.safetensors", repo=repo, instead=(_PICKLE,)),
        ReleasedFile(name="config.json", repo=repo),
        released_vocabulary(vocabulary or repo),
    )


def load_clip(
    path: str,
    *,
    dtype: torch.dtype,
    tokenizer_path: str = "",
    tokenizer: str = "",
    activation: str = "gelu",
    head_width: int = 0,
) -> tuple[Any, Any]:
    """A transformers ``CLIPModel`` in ``dtype`` and its ``CLIPTokenizer``.

    Pickled weights are read without running what they hold. Nothing is left at random: a weight that is missing,
    unknown or of another shape is an error, and so is a tokenizer that does not fit the model.

    Args:
        path: a folder or a hub id of a ``CLIPModel``, or a file or folder of open_clip.
        dtype: of the weights.
        tokenizer_path: a folder or hub id with the vocabulary; empty = where the weights are, if it is there.
        tokenizer: hub id of the vocabulary otherwise; empty = OpenAI's for open_clip, whose files never bring one, and
            none for a ``CLIPModel``, which must.
        activation: see `load_open_clip`, which alone needs it.
        head_width: see `load_open_clip`, which alone needs it.

    Raises:
        UserError: no such folder or hub id, another kind of model, no weights, or any mismatch above.
    """
    open_clip = _open_clip_file(path)
    if open_clip:
        model: Any = load_open_clip(open_clip, dtype=dtype, activation=activation, head_width=head_width)
    else:
        _check_folder(path)
        model = _load_transformers(path, dtype)
    fallback = tokenizer or (OPENAI_CLIP_L if open_clip else "")
    vocabulary = _load_tokenizer(path, tokenizer_path or _own_tokenizer(path) or fallback)
    _check_tokenizer(path, vocabulary, model.config)
    return model, vocabulary


def _open_clip_file(path: str) -> Path | None:
    """The open_clip file at ``path``, unless it is a folder that transformers reads."""
    place = Path(path).expanduser()
    if path and place.is_file() and place.suffix in ENDINGS:
        return place
    if path and place.is_dir() and not (place / "config.json").is_file():
        return next((place / name for name in OPEN_CLIP_FILES if (place / name).is_file()), None)
    return None


def _check_folder(path: str) -> None:
    """Local folders are checked by name, before transformers takes a mistyped one for a hub id."""
    folder = Path(path)
    if path and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"rewards: {path!r} is no model folder: it has no config.json")
        if not any(folder.glob("model*.safetensors*")) and not (folder / _PICKLE).is_file():
            raise UserError(f"rewards: {path!r} has no weights: neither model.safetensors nor {_PICKLE}")
        for pattern in ("config.json", "model*.safetensors*", "pytorch_model*.bin*"):
            for file in sorted(folder.glob(pattern)):
                refuse_wrong_file(file, reward=path)
    elif (
        not path or path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith(ENDINGS) or folder.exists()
    ):
        raise UserError(
            f"rewards: path must be a folder with a CLIPModel, a file of open_clip or a hub id, got {path!r}"
        )


def _own_tokenizer(path: str) -> str:
    """The folder of the weights if the vocabulary lies there, or empty."""
    place = Path(path).expanduser()
    folder = place.parent if place.is_file() else place
    return str(folder) if CLIP.is_in(folder) else ""


def _load_transformers(path: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, CLIPConfig, CLIPModel

    class ExactScaleClip(CLIPModel):
        """The logit scale stays in float32: in bfloat16 it is off by one percent."""

        _keep_in_fp32_modules_strict = ["logit_scale"]  # noqa: RUF012

    folder = Path(path)
    # A local folder says which it has; for a hub id, the second is asked for when the first is not there.
    kinds = [any(folder.glob("model*.safetensors*"))] if folder.is_dir() else [True, False]
    for safe in kinds:
        try:
            with _quiet():
                config = AutoConfig.from_pretrained(path, trust_remote_code=False)
                if not isinstance(config, CLIPConfig):
                    raise UserError(f"rewards: {path!r} must hold a CLIPModel, got model type {config.model_type!r}")
                # With output_loading_info a pair comes back, which the annotation of from_pretrained does not say.
                loaded: Any = ExactScaleClip.from_pretrained(
                    path, dtype=dtype, use_safetensors=safe, output_loading_info=True, ignore_mismatched_sizes=True
                )
        except UserError:
            raise
        except _LOAD_ERRORS as error:
            if safe and len(kinds) > 1 and isinstance(error, OSError):
                continue
            raise UserError(f"rewards: cannot load a CLIPModel from {path!r}: {_reason(path, error)}") from error
        break
    model, report = loaded
    _check_keys(path, report)
    return model


def _reason(path: str, error: Exception) -> str:
    """The error's first line; for a hub id also where a copy was looked for."""
    if Path(path).exists():
        return first_line(error)
    from huggingface_hub.constants import HF_HUB_CACHE

    return f"neither in the hub cache ({HF_HUB_CACHE}) nor to be had: {first_line(error)}"


def _load_tokenizer(path: str, place: str) -> Any:
    from transformers import CLIPTokenizer

    if not place and Path(path).is_dir():
        raise UserError(f"rewards: {path!r} has no tokenizer: neither {CLIP.files.replace(', or', ' nor')}")
    with _quiet():
        return load_tokenizer(CLIPTokenizer, place or path, CLIP, owner=path)


def _check_keys(path: str, report: dict[str, Any]) -> None:
    """Raise unless the files held exactly the model's weights."""
    mismatched = {entry[0] for entry in report["mismatched_keys"]}
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if missing or unexpected or mismatched:
        raise UserError(
            f"rewards: {path!r} does not hold exactly the weights of its CLIPModel; "
            f"missing: {some(missing) or 'none'}; unexpected: {some(unexpected) or 'none'}; "
            f"of another shape than its config's: {some(mismatched) or 'none'}"
        )
    if report["error_msgs"]:
        raise UserError(f"rewards: cannot load a CLIPModel from {path!r}: {first_line(report['error_msgs'][0])}")


def _check_tokenizer(path: str, tokenizer: Any, config: Any) -> None:
    """Raise unless ids fit the embedding table and the end mark is the one at which the model pools."""
    text, largest = config.text_config, max(tokenizer.get_vocab().values())
    if largest >= text.vocab_size:
        raise UserError(f"rewards: the tokenizer of {path!r} has id {largest}, its model only {text.vocab_size} ids")
    # Configs that say 2 are the old OpenAI ones: there the model pools at the largest id.
    pooled = largest if text.eos_token_id == 2 else text.eos_token_id
    if tokenizer.eos_token_id != pooled:
        raise UserError(
            f"rewards: {path!r} pools at token {pooled}, but its tokenizer ends a text with {tokenizer.eos_token_id}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and tables from transformers while loading: problems are reported in one line here."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
