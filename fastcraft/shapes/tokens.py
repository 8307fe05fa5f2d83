"""A CLIP tokenizer for this world: byte-level BPE whose merges make every caption word one token."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from fastcraft.shapes.captions import BACKDROPS, FILLERS, JOINERS, NUMBERS, PREFIXES, RELATION_WORDS
from fastcraft.shapes.scenes import BACKGROUNDS, COLORS, PATTERNS, SHAPES, SIZES

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77
END_OF_WORD = "</w>"
_FRAME = "There is are one two three One Another object objects in the picture a The background is"


def words() -> list[str]:
    """Every word that the grammar can write, in lower case, sorted."""
    phrases = [*COLORS, *SHAPES, *SIZES, *PATTERNS, *BACKGROUNDS, *NUMBERS, *PREFIXES, *JOINERS, *BACKDROPS, *FILLERS]
    phrases += [word for group in RELATION_WORDS.values() for word in group] + [_FRAME]
    text = " ".join(phrases).lower().replace(".", " ").replace("{}", " ")
    return sorted(set(text.split()))


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's and CLIP's vocabularies, in their order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def _apply(rules: list[tuple[str, str]], word: str) -> list[str]:
    """Pieces of a word after byte-pair encoding: the earliest rule that fits is always applied first."""
    pieces = [*word[:-1], word[-1] + END_OF_WORD]
    ranks = {rule: rank for rank, rule in enumerate(rules)}
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        best = min(range(len(pairs)), key=lambda index: ranks.get(pairs[index], len(rules)))
        if pairs[best] not in ranks:
            break
        pieces[best : best + 2] = ["".join(pairs[best])]
    return pieces


def merge_rules() -> list[tuple[str, str]]:
    """Pairs that, applied in order, make each word one piece. A later rule never disturbs an earlier word."""
    rules: list[tuple[str, str]] = []
    for word in words():
        first, *rest = _apply(rules, word)
        for piece in rest:
            rules.append((first, piece))
            first += piece
    return rules


def save_tokenizer(folder: Path) -> None:
    """Write `vocab.json`, `merges.txt` and their configuration, as every version of transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols, rules = byte_symbols(), merge_rules()
    pieces = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *("".join(rule) for rule in rules)]
    vocab = {piece: index for index, piece in enumerate([*dict.fromkeys(pieces), START, END])}
    merges = "\n".join(["#version: 0.2", *(" ".join(rule) for rule in rules)])
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True, **special}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
