"""Coordinates of a token in its text beside its position: its line, its sentence, and its byte in either.

They follow from the tokens before it, by a table of what each token of the vocabulary is made of. A line ends after
each newline, a sentence after a token that ends with . ! or ? and any quotes, brackets and white space behind it. End
of text ends both. A token's own end counts for the token after it.
"""

import random
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F

COLUMNS = 4  # of a token: bytes, newlines, bytes after the last newline, whether it ends a sentence
SENTENCE_END = re.compile(rb"""[.!?](?:['")\]\s]|\xe2\x80[\x99\x9d])*\Z""")  # the last two: ’ and ”


def table(tokens: list[bytes], vocab_size: int, eot: int | None = None) -> torch.Tensor:
    """(V, COLUMNS) int32 of the tokens' bytes; eot: the id of end of text. Ids without text are zeros."""
    rows = torch.zeros(vocab_size, COLUMNS, dtype=torch.int32)
    values = [(len(t), t.count(b"\n"), len(t) - 1 - t.rfind(b"\n"), bool(SENTENCE_END.search(t))) for t in tokens]
    rows[: len(values)] = torch.tensor(values, dtype=torch.int32)
    if eot is not None:
        rows[eot] = torch.tensor([0, 1, 0, 1])
    return rows


def made_up(vocab_size: int) -> list[bytes]:
    """The bytes of a vocabulary that never was, the same each time, for models without data."""
    draw = random.Random(0)
    parts = [b" and", b"ing", b"e", b" un", b"believ", b".", b"\n", b"\n\n ", b'?"', b" ", b"\xc3\xa9", b"able,"]
    return [b"".join(draw.choices(parts, k=draw.randint(1, 2))) for _ in range(vocab_size)]


def of_tokens(table: torch.Tensor, ctx, offset: float, cache: dict | None) -> Callable[[tuple[str, ...]], torch.Tensor]:
    """A function of names of axes that returns those coordinates of a pass's tokens, (B, T, axes) float64.

    ctx: schemes.base.Context, whose positions are those of "token"; offset: added to all. "byte" is in the line, or in
    the sentence where the axes name sentences and no lines. All restart where ctx.places do. The cache keeps, in
    "text", where the tokens before have led: (B, 4).
    """
    device = ctx.positions.device
    size, newlines, tail, sentence = table[ctx.idx].to(device, torch.int64).unbind(-1)  # (B, T)
    before = (cache or {}).get("text")
    before = size.new_zeros(len(size), 4) if before is None else before
    restarts = F.pad((ctx.places == 0).to(device).expand_as(size), (0, 1))  # (B, T + 1)
    line, byte = counted(size, newlines, tail, restarts, before[:, :2])
    sentences, byte_of_sentence = counted(size, sentence, sentence * 0, restarts, before[:, 2:])
    found = {"line": line, "sentence": sentences, "byte": byte, "byte of sentence": byte_of_sentence}
    if cache is not None:
        cache["text"] = torch.stack([c[:, -1] for c in (line, byte, sentences, byte_of_sentence)], 1)
    found = {name: values[:, :-1].double() + offset for name, values in found.items()}
    found["token"] = ctx.positions.expand_as(found["line"])

    def pick(axes: tuple[str, ...]) -> torch.Tensor:
        of_sentence = "sentence" in axes and "line" not in axes
        names = ["byte of sentence" if axis == "byte" and of_sentence else axis for axis in axes]
        return torch.stack([found[name] for name in names], -1)

    return pick


def counted(
    size: torch.Tensor, ends: torch.Tensor, tail: torch.Tensor, restarts: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many lines have ended before each token, and how many bytes of its line are before it: (B, T + 1) each. The
    last column is of the token that comes next.

    size, ends, tail (B, T): bytes of each token, ends of lines in it, bytes after the last of these. restarts
    (B, T + 1): where a text begins. before (B, 2): both results where these tokens begin.
    """
    ended = F.pad(ends.cumsum(1), (1, 0)) + before[:, :1]
    behind = F.pad(size.cumsum(1), (1, 0)) + before[:, 1:]  # bytes since the first token's line began
    # Where the line of each token began is the largest of all beginnings so far: they only grow
    begin = F.pad(torch.where(ends > 0, behind[:, 1:] - tail, 0), (1, 0))
    begin = torch.maximum(begin, torch.where(restarts, behind, 0)).cummax(1).values
    return ended - torch.where(restarts, ended, 0).cummax(1).values, behind - begin
