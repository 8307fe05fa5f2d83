"""The tokenizer's files as every reader wants them; transformers 5 no longer writes vocab.json and merges.txt."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fastcraft.errors import UserError

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_LOCAL = ("name_or_path", "tokenizer_file", "special_tokens_map_file", "is_local", "local_files_only", "backend")


def write_tokenizer(source: Path, folder: Path) -> None:
    """Copy a CLIP tokenizer from ``source`` to ``folder``; what is missing is derived from tokenizer.json.

    Writes vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, without paths of this machine.

    Raises:
        UserError: the source has neither vocab.json with merges.txt nor tokenizer.json.
    """
    pair = [source / name for name in ("vocab.json", "merges.txt")]
    whole = source / "tokenizer.json"
    if all(path.is_file() for path in pair):
        for path in pair:
            shutil.copyfile(path, folder / path.name)
    elif whole.is_file():
        _derive(json.loads(whole.read_text(encoding="utf-8")), folder)
    else:
        raise UserError(f"tokenizer: no vocab.json with merges.txt and no tokenizer.json in {str(source)!r}")
    config = _read(source / "tokenizer_config.json")
    config = {key: value for key, value in config.items() if key not in _LOCAL and not _is_path(value)}
    config["tokenizer_class"] = "CLIPTokenizer"
    _write(folder / "tokenizer_config.json", config)
    special = _read(source / "special_tokens_map.json")
    _write(folder / "special_tokens_map.json", special or {key: config[key] for key in _SPECIAL if key in config})


def _derive(tokenizer: dict[str, Any], folder: Path) -> None:
    vocab = dict(tokenizer["model"]["vocab"])
    for token in tokenizer.get("added_tokens", []):
        vocab.setdefault(token["content"], token["id"])
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and os.path.isabs(value)
