"""The same text for runs of different tokenizers: their bits per byte compare on it, and on nothing else.

Lengths are in tokens of each, so the runs see different amounts of text before a target. The targets are the same
bytes: pieces between two places where every tokenizer has a boundary, of documents that every data folder has.
"""

import dataclasses
import hashlib
from functools import reduce

import numpy as np

from data.shards import Data, Split
from data.tokenizer import load_tokenizer
from nanope.evaluation.options import Options
from nanope.evaluation.protocols import Targets, spans_of, targets_of


def same_text(datas: list[Data], options: Options) -> tuple[list[Targets], str]:
    """Targets in each of several data folders that are the same bytes, and a hash of what they are.

    A document is eligible where every folder has it with more tokens than the longest length. Its pieces begin where
    each tokenizer has that many tokens before, and have at most `stride` bytes, or one token of at most the shortest
    length. Beyond max_targets bytes, pieces spread evenly over all are kept. Documents have one number in all folders,
    whatever their order there: comparisons pair them by it. ValueError where nothing is left.
    """
    shortest, longest, limit = options.lengths[0], options.lengths[-1], options.max_targets
    splits = [spans_of(data, options.split, False, longest) for data in datas]
    found = [edges_of(data, *split) for data, split in zip(datas, splits)]
    names = [name for name in found[0] if all(name in others for others in found)]
    pieces = [
        (name, *piece)
        for name in names
        for piece in pieces_of([f[name][1] for f in found], longest, options.stride, shortest)
    ]
    if not pieces:
        folders = " and ".join(str(data.folder) for data in datas)
        raise ValueError(
            f"no text of more than {longest} tokens is in {options.split} of all of {folders}: bits per byte compare "
            "on the same text alone; prepare all of them from one source, or take smaller --lengths"
        )
    if limit:
        count = max(1, round(len(pieces) * limit / sum(end - start for _, start, end in pieces)))
        if count < len(pieces):
            pieces = [pieces[i * len(pieces) // count] for i in range(count)]
    number, targets = {name: i for i, name in enumerate(names)}, []
    for (tokens, documents, _), edges in zip(splits, found):
        blocks = []
        for name, start, end in pieces:
            first, offsets = edges[name]
            blocks.append((first, *(first + np.searchsorted(offsets, (start, end)) - (0, 1))))
        chosen = targets_of(tokens, documents, np.array(blocks))
        sizes = [last - first + 1 for _, first, last in blocks]
        targets.append(dataclasses.replace(chosen, document=np.repeat([number[name] for name, *_ in pieces], sizes)))
    return targets, hashlib.sha256(repr(pieces).encode()).hexdigest()


def edges_of(data: Data, tokens: Split, _, spans: np.ndarray) -> dict[str, tuple[int, np.ndarray]]:
    """Of each span, by the sha256 of its text: its first token, and the byte at which each token begins, and the text
    ends, (tokens + 1,)."""
    tokenizer = load_tokenizer(data.manifest["tokenizer"]["name"])
    found = {}
    for start, size in spans.tolist():
        ids = tokens.read(start, start + size)
        text = b"".join(tokenizer.tokens[i] for i in ids.tolist())
        edges = np.concatenate(([0], np.cumsum(tokenizer.token_bytes[ids])))
        found.setdefault(hashlib.sha256(text).hexdigest(), (start, edges))
    return found


def pieces_of(edges: list[np.ndarray], longest: int, stride: int, most: int) -> list[tuple[int, int]]:
    """(first byte, end) of the pieces of a document, with `longest` tokens before them in every tokenizer: of at most
    `stride` bytes; where there is no shared boundary so soon, up to the next one, if that is within `most`. `edges`: as
    of edges_of, one a tokenizer."""
    shared = reduce(np.intersect1d, edges)
    shared = shared[shared >= max(of[longest] for of in edges)].tolist()
    found, at = [], 0
    while at < len(shared) - 1:
        end = max(at + 1, int(np.searchsorted(shared, shared[at] + stride, side="right")) - 1)
        if shared[end] - shared[at] <= most:
            found.append((shared[at], shared[end]))
        at = end
    return found
