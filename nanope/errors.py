"""What messages to the user are made of."""

import difflib
from collections.abc import Iterable


def nearest(word: str, valid: Iterable[str]) -> str:
    """'; did you mean …?' where something valid is close to the word."""
    close = difflib.get_close_matches(str(word), list(valid), 1)
    return f"; did you mean {close[0]}?" if close else ""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or the name of its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
