"""What OpenAI's and open_clip's tokenizers do to a text before they cut it into tokens."""

import html
import re

import ftfy

_OPEN_CLIP_MARKS = {
    "<start_of_text>": "<|startoftext|>",
    "<end_of_text>": "<|endoftext|>",
    "<|startoftext|>": "<| startoftext |>",
    "<|endoftext|>": "<| endoftext |>",
}
"""What the text must say to transformers' tokenizer to be cut as open_clip's cuts it: its marks have other names, and
OpenAI's are plain text to it."""
_MARK = re.compile("|".join(map(re.escape, _OPEN_CLIP_MARKS)))


def clean_text(text: str) -> str:
    """``text`` repaired, unescaped, with single blanks and in lower case.

    In this order: ``ftfy.fix_text``, which mends wrongly decoded text and turns curly quotes, full-width letters and
    ligatures into plain ones; ``html.unescape`` twice, for what was escaped twice; every run of white space becomes
    one blank, and none stays at the ends; lower case.

    transformers' ``CLIPTokenizer`` does only the last two by itself. It also composes accents (NFC), as ftfy does, but
    after lowering, so the few letters whose accent exists for the lower case alone come out as another token.

    Source: ``SimpleTokenizer`` of https://github.com/openai/CLIP, which open_clip took over.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def clean_open_clip_text(text: str) -> str:
    """`clean_text`, and the marks of beginning and end, if somebody wrote them into the text, as open_clip has them."""
    return _MARK.sub(lambda mark: _OPEN_CLIP_MARKS[mark.group()], clean_text(text))
