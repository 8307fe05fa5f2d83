"""Finds the vocabulary of a text half, here or on the hub, and says what is wrong when it cannot be had."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcraft.errors import UserError
from fastcraft.rewards.wrong_files import refuse_wrong_file

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """A kind of vocabulary, by the files that hold it."""

    name: str
    """For messages."""
    forms: tuple[tuple[str, ...], ...]
    """Files that go together; one form is enough, and the first is asked for first."""
    num_least: int
    """Entries that every one of its kind exceeds: what transformers makes when it has no file."""

    @property
    def files(self) -> str:
        """For people: ``tokenizer.json, or vocab.json and merges.txt``."""
        return ", or ".join(" and ".join(form) for form in self.forms)

    def is_in(self, folder: Path) -> bool:
        """Whether every file of a form lies in ``folder``."""
        return any(all((folder / name).is_file() for name in form) for form in self.forms)


CLIP = Vocabulary(name="CLIP's", forms=(("tokenizer.json",), ("vocab.json", "merges.txt")), num_least=256)
BERT = Vocabulary(name="BERT's", forms=(("vocab.txt",), ("tokenizer.json",)), num_least=5)


def load_tokenizer(tokenizer_class: Any, place: str, kind: Vocabulary, *, owner: str) -> Any:
    """A tokenizer of transformers, made of the files at ``place``.

    Args:
        tokenizer_class: ``CLIPTokenizer`` or ``BertTokenizer``.
        place: a folder, one of its files, or a hub id.
        kind: what is looked for.
        owner: whose it is, for messages.

    Raises:
        UserError: nothing there, a file of another kind, or one that cannot be read; the message names the place.
    """
    needs = f"rewards: {owner!r} needs {kind.name} vocabulary ({kind.files})"
    folder = _folder(place, kind, needs=needs)
    for name in sorted({name for form in kind.forms for name in form} | {"tokenizer_config.json"}):
        refuse_wrong_file(folder / name, reward=owner)
    try:
        tokenizer = tokenizer_class.from_pretrained(folder)
    except Exception as error:  # tokenizers raises plain Exception for what it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{needs}: it cannot be read from {str(folder)!r} ({reason}); give tokenizer_path") from error
    if len(tokenizer) <= kind.num_least:
        raise UserError(
            f"{needs}: what is in {str(folder)!r} has only {len(tokenizer)} entries and is none; give tokenizer_path"
        )
    return tokenizer


def _folder(place: str, kind: Vocabulary, *, needs: str) -> Path:
    """The local folder with the files; for a hub id the one in the cache, fetched if need be."""
    local = Path(place).expanduser()
    if local.is_file() and any(local.name in form for form in kind.forms):
        local = local.parent
    if local.is_file():
        raise UserError(f"{needs}: {place!r} is none of these files; tokenizer_path must be a folder or a hub id")
    if local.is_dir():
        if not kind.is_in(local):
            raise UserError(f"{needs}: folder {place!r} does not hold it; give tokenizer_path")
        return local
    if not _HUB_ID.fullmatch(place) or place.startswith("."):
        raise UserError(f"{needs}: there is nothing at {place!r}; tokenizer_path must be a folder or a hub id")
    return _from_hub(place, kind, needs=needs)


def _from_hub(repo: str, kind: Vocabulary, *, needs: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    for form in kind.forms:
        cached_files = [try_to_load_from_cache(repo, name) for name in form]
        if all(isinstance(file, str) for file in cached_files):
            return _one_folder(cached_files)
    reason = "it has none of these files"
    for form in kind.forms:
        try:
            return _one_folder([hf_hub_download(repo, name) for name in form])
        except LocalEntryNotFoundError as error:
            reason = type(error).__name__
            break
        except EntryNotFoundError:
            continue
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = type(error).__name__
            break
    raise UserError(
        f"{needs}: neither in the hub cache ({HF_HUB_CACHE}) nor to be had from hub {repo!r} ({reason}); "
        "give tokenizer_path"
    )


def _one_folder(files: Sequence[Any]) -> Path:
    return Path(files[0]).parent
