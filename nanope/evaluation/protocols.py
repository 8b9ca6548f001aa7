"""Which tokens an evaluation scores, and in which windows: the protocols of eval.py, without any model.

A *span* is a document, or with --stream the whole split. Windows stay inside a span. The scored tokens are chosen once
for all lengths, from the longest length, the stride and max_targets. A length changes only the context in front of
them. Where a token's window lies depends on its position in its span alone, not on which other tokens are scored.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from data.shards import Data, Split
from data.tokenizer import Tokenizer, load_tokenizer

PROTOCOLS = {
    "same-targets": "the same target tokens for every length L, each with L-S+1 … L tokens of context (S: --stride)",
    "nonoverlapping": "consecutive windows of L tokens, every token scored; those at a window's start see little",
    "sliding": "windows of L tokens, one every S tokens, of which only the last S are scored (the first window whole)",
    "per-position": "consecutive windows of the longest length that the scheme can do, NLL by position in the window",
    "task": "examples of the run's task, of each length in its own unit: how often the answer is right",
    "shift": "windows of the training length with all positions moved by --offsets: largest change of a token's NLL",
}


# ---- what is there to score


def checked_tokenizer(data: Data, vocab_size: int) -> Tokenizer:
    """The tokenizer that the data were made with. ValueError where it is another than ours of this name, and where a
    model of `vocab_size` tokens lacks some of the data's."""
    tokenizer = load_tokenizer(data.manifest["tokenizer"]["name"])
    if tokenizer.sha256 != data.tokenizer_hash:
        raise ValueError(
            f"{data.folder} was made with another {tokenizer.name} tokenizer than this version has; prepare it again"
        )
    if vocab_size < data.vocab_size:
        raise ValueError(f"the model has a vocabulary of {vocab_size}, and {data.folder} one of {data.vocab_size}")
    return tokenizer


def spans_of(data: Data, split: str, stream: bool, longest: int) -> tuple[Split, np.ndarray, np.ndarray]:
    """The split's tokens, all its documents, and what windows must stay inside.

    Documents and spans are (n, 2) int64, start and size of each. Spans are the documents of more than `longest`
    tokens, or with `stream` the whole split. `val_long` is the part of val that the manifest lists. ValueError where
    nothing is long enough.
    """
    if stream and split == "val_long":
        raise ValueError("--stream takes a whole split, and val_long is a list of documents: take --split val")
    tokens = split_of(data, split)
    documents = tokens.documents()
    spans = np.array([[0, len(tokens)]]) if stream else documents
    if split == "val_long":
        spans = spans[np.isin(spans[:, 0], [d["start"] for d in data.manifest.get("val_long") or []])]
    found = spans[spans[:, 1] >= longest + 1]
    if not len(found):
        needs = f"{'a stream' if stream else 'a document'} of {longest + 1:,} tokens"
        what = "the stream" if stream else f"the longest of the {len(spans):,} documents"
        has = spans[:, 1].max(initial=0)
        raise ValueError(
            f"length {longest} needs {needs}, and {what} in {data.folder} ({split}) has {has:,}: "
            "take smaller --lengths, or --data with longer documents"
        )
    return tokens, documents, found


def split_of(data: Data, split: str) -> Split:
    """The tokens that a split's documents lie in: val_long is a part of val."""
    return data.split("val" if split == "val_long" else split)


# ---- tokens and windows


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
        """Indices of windows of one size, batch_tokens inputs or one window at a time. Only a span's last are
        short."""
        found = []
        for size in np.unique(self.size):
            members = np.flatnonzero(self.size == size)
            found += np.split(members, range(0, len(members), max(1, batch_tokens // size))[1:])
        return found


@dataclass
class Targets:
    """The scored tokens of a protocol: blocks of consecutive ones, in order, and the identity of the whole.

    blocks (n, 3) int64: start of the span, first and last target, all positions in the split. positions, ids, document
    (tokens,): position in the split, id, and index of its document in the split, of every target. Targets of same_text
    have another number of a document, one for all folders.
    """

    blocks: np.ndarray
    positions: np.ndarray
    ids: np.ndarray
    document: np.ndarray

    @property
    def sha256(self) -> str:
        """Equal for two evaluations that scored the same tokens of the same split."""
        return hashlib.sha256(self.positions.tobytes() + self.ids.tobytes()).hexdigest()

    def shortened(self, longest: int, length: int) -> "Targets":
        """Of blocks of `longest` targets each, the first `length`."""
        blocks = self.blocks.copy()
        blocks[:, 2] = blocks[:, 1] + length - 1
        first = [x.reshape(-1, longest)[:, :length].reshape(-1) for x in (self.positions, self.ids, self.document)]
        return Targets(blocks, *first)


def choose_targets(
    split: Split, documents: np.ndarray, spans: np.ndarray, protocol: str, longest: int, stride: int, max_targets: int
) -> Targets:
    """The tokens that `protocol` scores in spans of at least longest+1 tokens each. spans and documents, all those of
    the split: (n, 2), start and size.

    same-targets: blocks of `stride` targets, the first of a span ending at token index `longest`. nonoverlapping,
    sliding: every token but a span's first, in blocks of `longest`. per-position: whole windows of `longest`. Beyond
    max_targets (0: no limit), blocks spread evenly over all are kept.
    """
    blocks = np.concatenate([blocks_of(*span, protocol, longest, stride) for span in spans])
    if max_targets:
        total = (blocks[:, 2] - blocks[:, 1] + 1).sum()
        count = max(1, round(len(blocks) * max_targets / total))
        if count < len(blocks):
            blocks = blocks[np.arange(count) * len(blocks) // count]
    return targets_of(split, documents, blocks)


def targets_of(split: Split, documents: np.ndarray, blocks: np.ndarray) -> Targets:
    """The tokens of `blocks`, as in Targets, of a split with these documents."""
    positions = np.concatenate([np.arange(first, last + 1) for _, first, last in blocks])
    ids = np.concatenate([split.read(first, last + 1) for _, first, last in blocks.tolist()])
    return Targets(blocks, positions, ids, np.searchsorted(documents[:, 0], positions, side="right") - 1)


def blocks_of(start: int, size: int, protocol: str, longest: int, stride: int) -> np.ndarray:
    """All blocks of one span, as in Targets."""
    if protocol == "same-targets":
        lasts = np.arange(longest, size, stride)
        firsts = lasts - stride + 1
    else:
        firsts = np.arange(1, size, longest)
        lasts = np.minimum(firsts + longest - 1, size - 1)
        if protocol == "per-position":
            whole = lasts - firsts + 1 == longest
            firsts, lasts = firsts[whole], lasts[whole]
    return np.stack((np.full(len(firsts), start), start + firsts, start + lasts), 1)


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

    def number(target):
        # Window k of a span begins at k·step. Window 0 scores the targets 1 … L, window k those from L+(k-1)·step+1 to
        # L+k·step: that of a target is ⌈(target - L)/step⌉.
        return np.maximum(0, -((length - target) // step))

    lowest, highest = number(first - span), number(last - span)
    counts = highest - lowest + 1
    span, low, high = (np.repeat(a, counts) for a in (span, first, last))
    k = np.concatenate([np.arange(a, b + 1) for a, b in zip(lowest, highest)])
    start = span + k * step
    end = np.minimum(high, start + length)  # a window ends at its last scored target
    begin = np.maximum(low, np.where(k == 0, start + 1, start + length - step + 1))
    return Windows(start, end - start, end - begin + 1)


def spread_windows(split: Split, count: int, length: int) -> Windows:
    """`count` windows of `length` inputs, spread evenly over the split, every target scored; they may lie over the
    ends of documents. ValueError where the split has no room for one."""
    if len(split) < length + 1:
        raise ValueError(f"a window of {length} needs {length + 1:,} tokens, and the split has {len(split):,}")
    start = np.linspace(0, len(split) - length - 1, count).astype(int)
    return Windows(start, np.full(count, length), np.full(count, length))
