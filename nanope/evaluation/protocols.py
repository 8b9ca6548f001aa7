"""Which tokens an evaluation scores, and in which windows: the protocols of eval.py, without any model.

A *span* is a document, or with --stream the whole split; windows stay inside a span. The scored tokens are chosen once, for
all lengths, from the longest length, the stride and max_targets; a length changes only the context in front of them. Where a
token's window lies depends on its position in its span alone, not on which other tokens are scored.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from data.shards import Split

PROTOCOLS = {
    "same-targets": "the same target tokens for every length L, each with L-S+1 … L tokens of context (S: --stride)",
    "nonoverlapping": "consecutive windows of L tokens, every token scored, so those at a window's start with little context",
    "sliding": "windows of L tokens, one every S tokens, of which only the last S are scored (the first window whole)",
    "per-position": "consecutive windows of the longest length that the scheme can do, NLL by position in the window",
}


@dataclass
class Windows:
    """Windows of one protocol at one length: inputs start … start+size-1 of the split, of which the last `scored`
    positions are scored, each predicting the token after it. All arrays (n,) int64."""

    start: np.ndarray
    size: np.ndarray
    scored: np.ndarray

    def targets(self) -> np.ndarray:
        """Positions in the split of all scored tokens, in order."""
        ends = self.start + self.size
        return np.concatenate([np.arange(e - s + 1, e + 1) for e, s in zip(ends, self.scored)])

    def batches(self, batch_tokens: int) -> list[np.ndarray]:
        """Indices of windows of one size, batch_tokens inputs or one window at a time. Only a span's last are short."""
        found = []
        for size in np.unique(self.size):
            members = np.flatnonzero(self.size == size)
            found += np.split(members, range(0, len(members), max(1, batch_tokens // size))[1:])
        return found


@dataclass
class Targets:
    """The scored tokens of a protocol: blocks of consecutive ones, in order, and the identity of the whole.

    blocks (n, 3) int64: start of the span, first and last target, all positions in the split. positions, ids, document
    (tokens,): position in the split, id, and index of its document in the split, of every target.
    """

    blocks: np.ndarray
    positions: np.ndarray
    ids: np.ndarray
    document: np.ndarray

    @property
    def sha256(self) -> str:
        """Equal for two evaluations that scored the same tokens of the same split."""
        return hashlib.sha256(self.positions.tobytes() + self.ids.tobytes()).hexdigest()


def choose_targets(
    split: Split,
    documents: np.ndarray,
    spans: np.ndarray,
    protocol: str,
    longest: int,
    stride: int,
    max_targets: int,
    length: int | None = None,
) -> Targets:
    """The tokens that `protocol` scores in spans of at least longest+1 tokens each. spans and documents, all those of the
    split: (n, 2), start and size.

    same-targets: blocks of `stride` targets, the first of a span ending at token index `longest`. nonoverlapping, sliding:
    every token but a span's first, in blocks of `longest`. per-position: whole windows of `longest`, of which the first
    `length` targets. Beyond max_targets (0: no limit), blocks spread evenly over all are kept.
    """
    found = []
    for start, size in spans:
        if protocol == "same-targets":
            lasts = np.arange(longest, size, stride)
            firsts = lasts - stride + 1
        else:
            firsts = np.arange(1, size, longest)
            lasts = np.minimum(firsts + longest - 1, size - 1)
            if protocol == "per-position":
                firsts = firsts[lasts - firsts + 1 == longest]
                lasts = firsts + longest - 1
        found.append(np.stack((np.full(len(firsts), start), start + firsts, start + lasts), 1))
    blocks = np.concatenate(found)
    count = (
        max(1, round(len(blocks) * max_targets / (blocks[:, 2] - blocks[:, 1] + 1).sum()))
        if max_targets
        else len(blocks)
    )
    if count < len(blocks):
        blocks = blocks[np.arange(count) * len(blocks) // count]
    if length:  # of the same windows, their first part
        blocks[:, 2] = blocks[:, 1] + length - 1
    positions = np.concatenate([np.arange(first, last + 1) for _, first, last in blocks])
    ids = np.concatenate([split.read(first, last + 1) for _, first, last in blocks.tolist()])
    return Targets(blocks, positions, ids, np.searchsorted(documents[:, 0], positions, side="right") - 1)


def windows_of(targets: Targets, protocol: str, length: int, stride: int) -> Windows:
    """The windows of one length that score `targets`, in their order."""
    span, first, last = targets.blocks.T
    if protocol == "same-targets":  # one window a block, which ends before the block's last target
        return Windows(last - length, np.full(len(last), length), last - first + 1)
    if protocol == "per-position":
        return Windows(first - 1, last - first + 1, last - first + 1)
    step = length if protocol == "nonoverlapping" else stride
    joins = np.flatnonzero((first[1:] == last[:-1] + 1) & (span[1:] == span[:-1]))  # a block that goes on in the next
    span, first, last = np.delete(span, joins + 1), np.delete(first, joins + 1), np.delete(last, joins)
    # Window k of a span begins at k·step; window 0 scores the targets 1 … L, window k those from L+(k-1)·step+1 to L+k·step
    number = lambda target: np.maximum(0, -((length - target) // step))  # noqa: E731 - ⌈(target - L)/step⌉
    lowest, highest = number(first - span), number(last - span)
    counts = highest - lowest + 1
    span, low, high = (np.repeat(a, counts) for a in (span, first, last))
    k = np.concatenate([np.arange(a, b + 1) for a, b in zip(lowest, highest)])
    start, end = span + k * step, np.minimum(high, span + k * step + length)  # a window ends at its last scored target
    begin = np.maximum(low, np.where(k == 0, start + 1, start + length - step + 1))
    return Windows(start, end - start, end - begin + 1)
