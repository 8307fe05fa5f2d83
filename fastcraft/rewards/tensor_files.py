"""Files of weights: where they are looked for, how they are read, and what is refused."""

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastcraft.errors import UserError
from fastcraft.rewards.wrong_files import refuse_wrong_file

M = TypeVar("M", bound=nn.Module)
ENDINGS = (".pth", ".pt", ".bin", ".safetensors")
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleasedFile:
    """A published file: its name, where it is had, and how it is known."""

    name: str
    repo: str = ""
    """Hub id; empty = ``url``."""
    url: str = ""
    sha256: str = ""
    """Empty = not known."""
    num_bytes: int = 0
    """0 = not known."""
    instead: tuple[str, ...] = ()
    """Files of the same place that serve together where this one is not there."""

    @property
    def origin(self) -> str:
        """For people."""
        return f"hub {self.repo}" if self.repo else self.url

    def cache_folder(self) -> Path:
        """Where a downloaded copy lies."""
        if not self.repo:
            return Path(torch.hub.get_dir()) / "checkpoints"
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE) / f"models--{self.repo.replace('/', '--')}"

    def cached(self) -> Path | None:
        """The downloaded copy, or the first of those that serve instead; nothing is downloaded."""
        if not self.repo:
            file = self.cache_folder() / self.name
            return file if file.is_file() else None
        from huggingface_hub import try_to_load_from_cache

        for names in ((self.name,), self.instead):
            given = [try_to_load_from_cache(self.repo, name) for name in names]
            if given and all(isinstance(file, str) for file in given):
                return Path(str(given[0]))
        return None


def find_file(path: str, released: ReleasedFile, *, reward: str) -> Path:
    """The file of weights that ``path`` stands for.

    Args:
        path: a file; a folder that holds ``released.name``; a hub id that has it; empty = the published place.
        released: what is looked for. A copy of the published size must have the published SHA-256, and so must
            whatever comes from the published place.
        reward: its name, for messages.

    Raises:
        UserError: nothing there (the message says where it looked), another file under the released name, or a web
            page, a git-lfs pointer or nothing in its place.
    """
    local = Path(path).expanduser()
    if path and local.is_file():
        file = local
    elif path and local.is_dir():
        file = local / released.name
        if not file.is_file():
            raise UserError(f"rewards: {reward!r} looked for {released.name} in folder {path!r}: it is not there")
    elif path and (path.startswith(("/", ".", "~")) or path.count("/") != 1 or path.endswith(ENDINGS)):
        raise UserError(
            f"rewards: path of {reward!r} must be a file, a folder with {released.name} or a hub id, and there is "
            f"nothing at {path!r}"
        )
    else:
        file = _download(path or released.repo, released, reward=reward)
    refuse_wrong_file(file, reward=reward)
    _check_sum(file, released, reward=reward, always=not path)
    return file


def _download(repo: str, released: ReleasedFile, *, reward: str) -> Path:
    """A copy from the hub, or from the file's own address where no hub id is known or given; kept for the next time."""
    if not repo:
        return _fetch(released, reward=reward)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repo, released.name))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"rewards: {reward!r} needs {released.name}: not in the hub cache ({HF_HUB_CACHE}), and not to be had from "
            f"hub {repo} ({type(error).__name__}); give path = a local copy"
        ) from error


def _fetch(released: ReleasedFile, *, reward: str) -> Path:
    file = released.cache_folder() / released.name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(released.url, str(file), hash_prefix=released.sha256, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"rewards: {reward!r} needs {released.name}: not in {str(file.parent)!r}, and not to be had from "
                f"{released.url} ({first_line(error)}); give path = a local copy"
            ) from error
    return file


def _check_sum(file: Path, released: ReleasedFile, *, reward: str, always: bool) -> None:
    """Raise unless the SHA-256 is the published one, where it is known and the file claims to be the published one."""
    if not released.sha256 or not (always or file.stat().st_size == released.num_bytes):
        return
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != released.sha256:
        raise UserError(f"rewards: {str(file)!r} is not the released file of {reward!r} (wrong SHA-256); delete it")


def read_tensors(file: str | os.PathLike[str], *, reward: str) -> dict[str, Tensor]:
    """Named tensors of a .safetensors, .pth, .pt or .bin file, which is read without running anything that it holds.

    Zip archives are mapped, not copied into memory. A training checkpoint counts by its ``state_dict``; a ``module.``
    that data-parallel training puts before every name is dropped.

    Raises:
        UserError: another ending, not a plain file of tensors, damaged, cut short or empty, a web page, a git-lfs
            pointer.
    """
    file = Path(file)
    if file.suffix in ENDINGS:
        refuse_wrong_file(file, reward=reward)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        elif file.suffix in ENDINGS:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        else:
            raise UserError(f"rewards: path of {reward!r} must end in {', '.join(ENDINGS)}, got {str(file)!r}")
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"rewards: {str(file)!r} of {reward!r} holds more than tensors and is refused") from error
    except Exception as error:  # safetensors and torch raise a dozen types for damaged files
        raise UserError(f"rewards: {reward!r} cannot read {str(file)!r}: {first_line(error)}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"rewards: {str(file)!r} of {reward!r} must hold named tensors, got {type(content).__name__}")
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return dict(content)


def filled(make: Callable[[], M], tensors: Mapping[str, Tensor], *, dtype: torch.dtype, source: str) -> M:
    """A module made by ``make`` with exactly these weights in ``dtype``; nothing is initialised at random first.

    Raises:
        UserError: a weight is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        module = make()
    expected = module.state_dict()
    check_names(expected, tensors, source=source)
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if tensors[name].shape != value.shape
    ]
    if wrong:
        raise UserError(f"rewards: {source!r} holds weights of another shape: {some(wrong)}")
    module = module.to(dtype).to_empty(device="cpu")
    for name, buffer in module.named_buffers():
        if name not in expected:  # made by the constructor, and on the meta device without values
            assert name.endswith("position_ids"), name
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    module.load_state_dict(tensors)
    return module


def check_names(expected: Mapping[str, Any] | set[str], given: Mapping[str, Any] | set[str], *, source: str) -> None:
    """Raise a `UserError` that lists missing and unexpected names, unless the two agree."""
    missing, unexpected = set(expected) - set(given), set(given) - set(expected)
    if missing or unexpected:
        raise UserError(
            f"rewards: {source!r} does not hold exactly the weights of the model; "
            f"missing: {some(missing) or 'none'}; unexpected: {some(unexpected) or 'none'}"
        )


def some(keys: Any, *, limit: int = 3) -> str:
    """The first few of ``keys`` for a one-line message."""
    names = sorted(map(str, keys))
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def first_line(error: object) -> str:
    """What an exception says, for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
