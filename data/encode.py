"""Does units of work: reads their documents, sends each to its split, tokenizes it, and writes the units' shards."""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from data.corpora import SPLITS, Corpus, planned
from data.readers import Bad
from data.shard_writer import ShardWriter
from data.shards import DataError, write_json
from data.split import assigned
from data.tokenizer import Tokenizer, load_tokenizer, pieces
from data.units import SIZES, Sizes, Unit, read_unit, record_of

T = TypeVar("T")
Report = Callable[..., None]  # (documents, tokens, bytes of text, found=False): see Progress
END_OF_TEXT = "<|endoftext|>"  # in text it is text, but some files have it between their documents
Document = tuple[str, str, str, int]  # split, name, text, number of the document in its split of the unit


def encode_units(
    units: Iterable[Unit | None],
    folder: Path,
    plan: dict,
    report: Report,
    done: Callable[[Unit], None],
    threads: int = 1,
    sizes: Sizes = SIZES,
) -> None:
    """Tokenize units into shards in `folder`, after those that are finished there. Write each unit's record at its end.

    A unit None means that the next one is not there yet. report(documents, tokens, bytes of text) is called after each
    batch, and with found=True for each finished shard; done(unit) after each unit.
    Threads share the text of a few batches, across the ends of units: none waits while another unit's files are closed.
    tiktoken lets them run at once.
    """
    corpus, tokenizer = planned(plan), load_tokenizer(plan["tokenizer"]["name"])
    waiting = collections.deque()  # what is to be written, in order

    def write(most: int) -> None:
        """Write until at most so much waits."""
        while len(waiting) > most:
            waiting.popleft()()

    with concurrent.futures.ThreadPoolExecutor(threads) if threads > 1 else contextlib.nullcontext() as pool:
        for unit in units:
            if unit is None:
                write(max(len(waiting) - 1, 0))
                time.sleep(0 if waiting else 0.1)
                continue
            work = Work(unit, folder, plan, corpus, tokenizer, report)
            for batch in groups(work.documents(), sizes.batch, lambda document: len(document[2])):
                encoded = encode(tokenizer, [text for _, _, text, _ in batch], sizes.piece, pool)
                waiting.append(functools.partial(work.write, batch, encoded))
                write(threads - 1)
            waiting.append(functools.partial(work.end, done))
            write(threads - 1)
        write(0)


class Work:
    """A unit while it is being done: what is to be read of it, and what was counted and written."""

    def __init__(self, unit: Unit, folder: Path, plan: dict, corpus: Corpus, tokenizer: Tokenizer, report: Report):
        self.unit, self.folder, self.rule = unit, folder, plan["val_rule"]
        self.corpus, self.report, self.bad = corpus, report, Bad(plan["skip_bad"])
        self.writers = {
            split: ShardWriter(folder, f"{unit.id}.{split}", tokenizer.dtype, plan["shard_tokens"]) for split in SPLITS
        }
        for record in itertools.chain.from_iterable(writer.records for writer in self.writers.values()):
            report(record["documents"], record["tokens"], record["bytes"], found=True)
        # How many documents of each split went into the finished shards, and how many of them the tokenizer refused
        self.finished = {split: writer.state.get("consumed", 0) for split, writer in self.writers.items()}
        self.refused = {split: writer.state.get("refused", 0) for split, writer in self.writers.items()}
        self.bad.counts["documents"] = sum(self.refused.values())
        self.consumed, self.digests, self.empty, self.marked = collections.Counter(), hashlib.sha256(), 0, 0

    def documents(self) -> Iterator[Document]:
        """The documents that are not in a finished shard."""
        for split, name, text, digest in assigned(
            read_unit(self.unit, self.corpus, self.bad), self.rule, self.unit.split
        ):
            if not text or text.isspace():
                self.empty += 1
                continue
            self.digests.update(digest)
            self.marked += END_OF_TEXT in text
            self.consumed[split] += 1
            if self.consumed[split] > self.finished[split]:
                yield split, name, text, self.consumed[split]

    def write(self, batch: list[Document], encoded: Iterator[np.ndarray | DataError]) -> None:
        """Add documents to the shards of their splits."""
        counts = np.zeros(3, np.int64)
        for (split, name, text, number), tokens in zip(batch, encoded, strict=True):
            if isinstance(tokens, DataError):
                self.bad("documents", f"document {name}: {tokens}")
                self.refused[split] += 1
            else:
                n_bytes = len(text) if text.isascii() else len(text.encode())
                self.writers[split].add(tokens, n_bytes, self.corpus.scored and self.corpus.scored(text))
                counts += 1, len(tokens), n_bytes
            self.writers[split].state = {"consumed": number, "refused": self.refused[split]}
        self.report(*counts.tolist())

    def end(self, done: Callable[[Unit], None]) -> None:
        """Finish the shards, write the unit's record, and call done(unit)."""
        write_json(
            record_of(self.folder, self.unit.id),
            {
                "shards": {split: writer.close() for split, writer in self.writers.items()},
                "documents": sum(self.consumed.values()),
                "empty": self.empty,
                "marked": self.marked,
                "sha256": self.digests.hexdigest(),
                "bad": {kind: count for kind, count in self.bad.counts.items() if count},
                "messages": self.bad.messages,
            },
        )
        done(self.unit)


def encode(
    tokenizer: Tokenizer, texts: list[str], piece: int, pool: concurrent.futures.Executor | None
) -> Iterator[np.ndarray | DataError]:
    """Of each text its tokens, (n,) of the tokenizer's dtype with end-of-text last, or the tokenizer's DataError.

    The pool's threads begin at once. Each takes some texts, or pieces of long ones, of about `piece` characters.
    """

    def encode_some(parts: list[str]) -> list[np.ndarray | DataError]:
        found = []
        for part in parts:
            try:
                found.append(tokenizer.encode_piece(part))
            except DataError as error:
                found.append(error)
        return found

    def joined(parts: list[np.ndarray | DataError]) -> np.ndarray | DataError:
        error = next((part for part in parts if isinstance(part, DataError)), None)
        return error or np.concatenate([*parts, end])

    end = np.array([tokenizer.eot], tokenizer.dtype)
    parts = [pieces(text, piece) for text in texts]
    shares = groups(itertools.chain.from_iterable(parts), piece, len)
    encoded = itertools.chain.from_iterable((pool.map if pool else map)(encode_some, shares))
    return (joined(list(itertools.islice(encoded, count))) for count in map(len, parts))


def groups(items: Iterable[T], size: int, size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of neighbours, each of at least `size` together, except the last."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += size_of(item)
        if total >= size:
            yield group
            group, total = [], 0
    if group:
        yield group
