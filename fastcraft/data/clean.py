"""What may be in a prompt, and what is done about the rest."""

import re

from fastcraft.errors import UserError

# C0 and C1 controls (tab and line ends too) and the two Unicode line separators.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# CLIP's tokenizer lowers the case and then reads these as its own marks, ending the prompt early.
_MARKS = re.compile(r"<\|(?:start|end)oftext\|>", re.IGNORECASE)
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean_prompt(text: str, *, where: str, max_characters: int) -> tuple[str, bool]:
    """The prompt as it is used, and whether a tokenizer mark was taken out of it.

    Control characters and the literal marks ``<|startoftext|>`` and ``<|endoftext|>`` become a space; white space at
    both ends goes. Everything else stays as written: emoji, any script, any case, inner spaces.

    Args:
        text: as read.
        where: file and line, for messages.
        max_characters: longest prompt accepted, counted after cleaning.

    Raises:
        UserError: too long, or a lone surrogate, which is no character at all.
    """
    cleaned = _CONTROLS.sub(" ", text)
    cleaned, num_marks = _MARKS.subn(" ", cleaned)
    cleaned = cleaned.strip()
    if len(cleaned) > max_characters:
        raise UserError(f"{where}: a prompt may have at most {max_characters} characters, got {len(cleaned)}")
    if half := _SURROGATES.search(cleaned):
        raise UserError(f"{where}: a lone surrogate ({half.group()!r}), which is half a character")
    return cleaned, num_marks > 0
