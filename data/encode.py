"""Does one unit of work: reads its documents, sends each to its split, tokenizes it, and writes the unit's shards."""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from data.corpora import SPLITS, planned
from data.readers import Bad
from data.shard_writer import ShardWriter
from data.shards import DataError, write_json
from data.split import assigned
from data.tokenizer import Tokenizer, load_tokenizer, pieces
from data.units import SIZES, Sizes, Unit, read_unit, record_of

Report = Callable[..., None]  # (documents, tokens, bytes of text, found=False): see Progress
END_OF_TEXT = "<|endoftext|>"  # in text it is text, but some files have it between their documents
Pending = tuple[str, str, str, int]  # split, name, text, number of the document in its split of the unit


def encode_unit(unit: Unit, folder: Path, plan: dict, report: Report, threads: int = 1, sizes: Sizes = SIZES) -> None:
    """Tokenize a unit into shards in `folder`, after those that are finished there. Then write the unit's record.

    report(documents, tokens, bytes of text) is called after each batch, and with found=True for each finished shard.
    """
    corpus, bad = planned(plan), Bad(plan["skip_bad"])
    tokenizer = load_tokenizer(plan["tokenizer"]["name"])
    writers = {
        split: ShardWriter(folder, f"{unit.id}.{split}", tokenizer.dtype, plan["shard_tokens"]) for split in SPLITS
    }
    for record in itertools.chain.from_iterable(writer.records for writer in writers.values()):
        report(record["documents"], record["tokens"], record["bytes"], found=True)
    # How many documents of each split went into the finished shards, and how many of them the tokenizer refused
    done = {split: writer.state.get("consumed", 0) for split, writer in writers.items()}
    refused = {split: writer.state.get("refused", 0) for split, writer in writers.items()}
    bad.counts["documents"] = sum(refused.values())
    consumed, digests, empty, marked = collections.Counter(), hashlib.sha256(), 0, 0

    def pending() -> Iterator[Pending]:
        """The documents that are not in a finished shard."""
        nonlocal empty, marked
        for split, name, text, digest in assigned(read_unit(unit, corpus, bad), plan["val_rule"], unit.split):
            if not text or text.isspace():
                empty += 1
                continue
            digests.update(digest)
            marked += END_OF_TEXT in text
            consumed[split] += 1
            if consumed[split] > done[split]:
                yield split, name, text, consumed[split]

    for batch in encode_all(tokenizer, pending(), threads, sizes):
        counts = np.zeros(3, np.int64)
        for (split, name, text, number), tokens in batch:
            if isinstance(tokens, DataError):
                bad("documents", f"document {name}: {tokens}")
                refused[split] += 1
            else:
                n_bytes = len(text) if text.isascii() else len(text.encode())
                writers[split].add(tokens, n_bytes, corpus.scored and corpus.scored(text))
                counts += 1, len(tokens), n_bytes
            writers[split].state = {"consumed": number, "refused": refused[split]}
        report(*counts.tolist())
    write_json(
        record_of(folder, unit.id),
        {
            "shards": {split: writer.close() for split, writer in writers.items()},
            "documents": sum(consumed.values()),
            "empty": empty,
            "marked": marked,
            "sha256": digests.hexdigest(),
            "bad": {kind: count for kind, count in bad.counts.items() if count},
            "messages": bad.messages,
        },
    )


def encode_all(
    tokenizer: Tokenizer, documents: Iterable[Pending], threads: int, sizes: Sizes
) -> Iterator[list[tuple[Pending, np.ndarray | DataError]]]:
    """Yield the documents in batches, in order, each with its tokens, or with the tokenizer's DataError.

    tokens: (n,) of the tokenizer's dtype, end-of-text last.
    Threads share the pieces of a few batches. tiktoken lets them run at once.
    """

    def encode(text: str) -> np.ndarray | DataError:
        try:
            return tokenizer.encode_piece(text)
        except DataError as error:
            return error

    end = np.array([tokenizer.eot], tokenizer.dtype)

    def joined(batch: list[Pending], parts: list[list[str]], encoded: Iterator) -> Iterator:
        for document, count in zip(batch, map(len, parts)):
            tokens = list(itertools.islice(encoded, count))
            error = next((part for part in tokens if isinstance(part, DataError)), None)
            yield document, error or np.concatenate([*tokens, end])

    with concurrent.futures.ThreadPoolExecutor(threads) if threads > 1 else contextlib.nullcontext() as pool:
        waiting = collections.deque()
        for batch in _batches(documents, sizes.batch):
            parts = [pieces(text, sizes.piece) for _, _, text, _ in batch]
            encoded = (pool.map if pool else map)(encode, itertools.chain.from_iterable(parts))
            waiting.append(joined(batch, parts, encoded))
            if len(waiting) >= threads:
                yield list(waiting.popleft())
        while waiting:
            yield list(waiting.popleft())


def _batches(documents: Iterable[Pending], characters: int) -> Iterator[list[Pending]]:
    """Group documents into lists of about so many characters of text."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[2])
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
