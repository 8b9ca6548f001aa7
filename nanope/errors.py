"""Words for error messages."""

import difflib
from collections.abc import Iterable


def nearest(word: object, valid: Iterable[str]) -> str:
    """'; did you mean …?' where something valid is close to the word, else an empty text."""
    close = difflib.get_close_matches(str(word), list(valid), 1)
    return f"; did you mean {close[0]}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
