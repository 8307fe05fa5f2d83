"""Reads a CLIPModel and its tokenizer from disk or the hub, and refuses whatever would be half right."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastcraft.errors import UserError

NUM_BYTE_SYMBOLS = 256
"""A byte-level vocabulary has at least these."""


def load_clip(path: str, *, dtype: torch.dtype) -> tuple[Any, Any]:
    """A transformers ``CLIPModel`` in ``dtype`` and its ``CLIPTokenizer``.

    Only safetensors are read: a pickle can run code. Nothing is left at random: a weight that is missing, unknown or
    of another shape is an error, and so is a tokenizer that does not fit the model.

    Args:
        path: a folder or a hub id.
        dtype: of the weights.

    Raises:
        UserError: no such folder or hub id, another kind of model, no safetensors, or any mismatch above.
    """
    _check_path(path)
    from safetensors import SafetensorError
    from transformers import AutoConfig, CLIPConfig, CLIPModel, CLIPTokenizer

    try:
        with _quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            if not isinstance(config, CLIPConfig):
                raise UserError(f"rewards: {path!r} must hold a CLIPModel, got model type {config.model_type!r}")
            # With output_loading_info a pair comes back, which the annotation of from_pretrained does not say.
            loaded: Any = CLIPModel.from_pretrained(
                path, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
            tokenizer = CLIPTokenizer.from_pretrained(path)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"rewards: cannot load a CLIPModel from {path!r}: {_first_line(error)}") from error
    model, report = loaded
    _check_keys(path, report)
    _check_tokenizer(path, tokenizer, model.config)
    return model, tokenizer


def _check_path(path: str) -> None:
    """Local folders are checked by name, before transformers takes a mistyped one for a hub id."""
    folder = Path(path)
    if path and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"rewards: {path!r} is no model folder: it has no config.json")
        if not any(folder.glob("model*.safetensors*")):
            raise UserError(f"rewards: {path!r} has no model.safetensors (pickled weights are not read)")
        if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
            raise UserError(f"rewards: {path!r} has no tokenizer: neither tokenizer.json nor vocab.json")
    elif not path or path.startswith(("/", ".", "~")) or path.count("/") > 1 or folder.exists():
        raise UserError(f"rewards: path must be a folder with a CLIPModel or a hub id, got {path!r}")


def _check_keys(path: str, report: dict[str, Any]) -> None:
    """Raise unless the files held exactly the model's weights."""
    mismatched = {entry[0] for entry in report["mismatched_keys"]}
    for rule, keys in (
        ("lacks weights of a CLIPModel", report["missing_keys"]),
        ("holds weights that a CLIPModel does not have", report["unexpected_keys"]),
        ("holds weights whose shape differs from its config", mismatched),
    ):
        if keys:
            raise UserError(f"rewards: {path!r} {rule}: {some(keys)}")
    if report["error_msgs"]:
        raise UserError(f"rewards: cannot load a CLIPModel from {path!r}: {_first_line(report['error_msgs'][0])}")


def _check_tokenizer(path: str, tokenizer: Any, config: Any) -> None:
    """Raise unless ids fit the embedding table and the end mark is the one at which the model pools."""
    text, largest = config.text_config, max(tokenizer.get_vocab().values())
    if len(tokenizer) <= NUM_BYTE_SYMBOLS:
        raise UserError(f"rewards: the tokenizer of {path!r} has only {len(tokenizer)} entries")
    if largest >= text.vocab_size:
        raise UserError(f"rewards: the tokenizer of {path!r} has id {largest}, its model only {text.vocab_size} ids")
    # Configs that say 2 are the old OpenAI ones: there the model pools at the largest id.
    pooled = largest if text.eos_token_id == 2 else text.eos_token_id
    if tokenizer.eos_token_id != pooled:
        raise UserError(
            f"rewards: {path!r} pools at token {pooled}, but its tokenizer ends a text with {tokenizer.eos_token_id}"
        )


def some(keys: Any, *, limit: int = 3) -> str:
    """The first few of ``keys`` for a one-line message."""
    names = sorted(map(str, keys))
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
