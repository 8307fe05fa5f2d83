"""Files that are not what their name says: nothing at all, a web page, a pointer of git-lfs."""

from pathlib import Path

from fastcraft.errors import UserError

_NUM_BYTES = 512
_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body", b"<?xml")
_BLANKS = b"\xef\xbb\xbf \t\r\n"


def what_it_is(file: Path) -> str:
    """In words, what ``file`` is when its first bytes show that it is neither weights nor a vocabulary; else empty."""
    with file.open("rb") as stream:
        head = stream.read(_NUM_BYTES)
    if not head.strip(_BLANKS):
        return "an empty file" if not head else "a file of blanks"
    if head.startswith(_POINTER):
        return "a git-lfs pointer to the file, not the file; `git lfs pull` in its folder fetches that"
    if head.lstrip(_BLANKS).lower().startswith(_PAGES):
        return "a web page (HTML or XML), as a server sends it instead of a file; download the file itself"
    return ""


def refuse_wrong_file(file: Path, *, reward: str) -> None:
    """Raise a `UserError` that names ``file`` and says what it is, if `what_it_is` knows; one that is not there passes.

    Args:
        file: local.
        reward: its name, for the message.
    """
    try:
        what = what_it_is(file) if file.is_file() else ""
    except OSError as error:
        raise UserError(f"rewards: {reward!r} cannot read {str(file)!r}: {error.strerror}") from error
    if what:
        raise UserError(f"rewards: {str(file)!r} of {reward!r} is {what}")
