"""Token shards on disk: how they are written, checked and read, and the order in which training visits them.

A data folder holds
    train_00000.bin, val_00000.bin, …   token ids, flat and little-endian: numpy.memmap(file, dtype) reads one
    lengths.png                         a histogram of the documents' lengths
    manifest.json                       what the shards are: corpus, tokenizer, counts, sha256 of each
    COMPLETE                            sha256 of manifest.json; written last, so without it nothing is to be trusted
Documents are stored whole and in source order, each followed by the end-of-text token. The same input gives the same bytes.
"""

import difflib
import hashlib
import json
import os
import uuid
from pathlib import Path

import numpy as np

FORMAT = 2
VERIFY_LIMIT = 2**30  # bytes; above this, opening checks sizes only unless asked (sha256 takes about a second per GB)
SCAN = 2**20  # tokens held at a time while scanning for documents
OCTAVE = 16  # bins per doubling in the histogram of document lengths


class DataError(ValueError):
    """A problem with data that the user can solve; its message is meant to be read without a traceback."""


def unknown(kind, name, known):
    """The DataError for a `name` that is not among `known`, with the nearest one that is."""
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return DataError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")


# ---- writing ----


def write_whole(path, content):
    """Write bytes so that `path` never holds a part of them."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # several machines may write the same file
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def fingerprint(path):
    """sha256 of a file's size and of 16 blocks of 4 KiB spread over it: cheap whatever the size, blind in between."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for i in range(16):
            f.seek(max(0, size - 4096) * i // 15)
            digest.update(f.read(4096))
    return digest.hexdigest()


def length_bin(lengths):
    """The histogram's bin of each length in tokens: OCTAVE bins per doubling, 0 for one token."""
    return np.floor(np.log2(np.maximum(lengths, 1)) * OCTAVE + 1e-9).astype(np.int64)


class ShardWriter:
    """Stream documents into shards `{name}_00000.bin`, … of at most `shard_tokens` tokens that end where a document ends.

    A single document longer than `shard_tokens` makes a longer shard of its own. A shard has a temporary name until it
    is complete; then NAME.json beside it holds its record, {file, tokens, documents, bytes, sha256, fingerprint}, with
    `lengths`, {bin: documents} of its histogram, and `state`, whatever the caller had in `self.state`. `records` lists
    the finished shards: a writer that finds some in the folder continues after them.
    """

    def __init__(self, folder, name, dtype, shard_tokens):
        self.folder, self.name, self.shard_tokens = Path(folder), name, shard_tokens
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.records, self.state, self._file = [], {}, None
        while (path := self._path(len(self.records))).is_file() and (beside := path.with_suffix(".json")).is_file():
            self.records.append(json.loads(beside.read_text()))
            self.state = self.records[-1]["state"]

    def _path(self, number):
        return self.folder / f"{self.name}_{number:05d}.bin"

    def add(self, tokens, n_bytes):
        """Append one document: `tokens` (n,) integers with the end-of-text token last, made from `n_bytes` of UTF-8 text."""
        if tokens.dtype != self.dtype and len(tokens) and int(tokens.max()) > np.iinfo(self.dtype).max:
            raise DataError(f"token id {int(tokens.max())} does not fit the shards' {self.dtype.name}")
        if self._file and self._record["tokens"] + len(tokens) > self.shard_tokens:
            self.close()
        if self._file is None:
            path = self._path(len(self.records))
            # No other process writes to this file: the worker of a run that was killed may live on for a moment.
            self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            self._file, self._sha256, self._lengths = open(self._temporary, "wb"), hashlib.sha256(), []
            self._record = {"file": path.name, "tokens": 0, "documents": 0, "bytes": 0}
        content = np.ascontiguousarray(tokens, self.dtype).data.cast("B")
        self._file.write(content)
        self._sha256.update(content)
        self._lengths.append(len(tokens) - 1)
        for key, more in (("tokens", len(tokens)), ("documents", 1), ("bytes", n_bytes)):
            self._record[key] += more

    def close(self):
        """Finish the shard being written, if any. Returns `records`."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file, path = None, self.folder / self._record["file"]
            bins, counts = np.unique(length_bin(self._lengths), return_counts=True)
            record = self._record | {
                "sha256": self._sha256.hexdigest(),
                "fingerprint": fingerprint(self._temporary),
                "lengths": dict(zip(map(str, bins.tolist()), counts.tolist())),
                "state": dict(self.state),
            }
            os.replace(self._temporary, path)
            write_json(path.with_suffix(".json"), record)  # after the shard: the record says that it is there
            self.records.append(record)
        return self.records


def write_manifest(folder, manifest):
    """Write manifest.json and then COMPLETE, which makes `folder` a finished data folder."""
    write_json(Path(folder) / "manifest.json", {"format": FORMAT} | manifest)
    digest = hashlib.sha256((Path(folder) / "manifest.json").read_bytes()).hexdigest()
    write_whole(Path(folder) / "COMPLETE", f"{digest}\n".encode())


# ---- reading ----


class Split:
    """The tokens of one split as one stream: shards one after another. len() is the number of tokens."""

    def __init__(self, folder, records, dtype, vocab_size, eot):
        self.files = [Path(folder) / r["file"] for r in records]
        self.dtype, self.vocab_size, self.eot = np.dtype(dtype).newbyteorder("<"), vocab_size, eot
        self._edges = np.cumsum([0] + [r["tokens"] for r in records])  # shard i holds tokens _edges[i] … _edges[i+1]-1

    def __len__(self):
        return int(self._edges[-1])

    def read(self, start, stop):
        """Tokens start … stop-1, across shards: (stop - start,) int64.

        IndexError outside the stream; DataError naming the shard where it is short or holds an id >= vocab_size.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} … {stop} of a split with {len(self)}")
        tokens, done = np.empty(stop - start, np.int64), 0
        shard = int(np.searchsorted(self._edges, start, side="right")) - 1
        while done < len(tokens):
            offset = start + done - int(self._edges[shard])
            count = min(len(tokens) - done, int(self._edges[shard + 1]) - start - done)
            # A plain read, not a memmap: as fast from the page cache, and the process does not grow with what it has seen.
            part = np.fromfile(self.files[shard], self.dtype, count, offset=offset * self.dtype.itemsize)
            if len(part) < count:
                raise DataError(f"{self.files[shard]} is truncated: no token {offset + len(part)}")
            if count and int(part.max()) >= self.vocab_size:
                at = int(np.argmax(part >= self.vocab_size))
                raise DataError(
                    f"{self.files[shard]} holds token id {part[at]} at offset {offset + at}; "
                    f"ids must be below vocab_size {self.vocab_size}"
                )
            tokens[done : done + count] = part
            done, shard = done + count, shard + 1
        return tokens

    def locate(self, position):
        """Where token `position` of the stream lies: (Path of its shard, its offset there in tokens)."""
        shard = int(np.searchsorted(self._edges, position, side="right")) - 1
        return self.files[shard], position - int(self._edges[shard])

    def documents(self):
        """(n, 2) int64: start and length, without its end-of-text token, of every document. Reads the whole split."""
        ends = [
            np.flatnonzero(self.read(at, min(at + SCAN, len(self))) == self.eot) + at
            for at in range(0, len(self), SCAN)
        ]
        ends = np.concatenate(ends) if ends else np.empty(0, np.int64)
        starts = np.concatenate([[0], ends + 1])[:-1].astype(np.int64)
        return np.stack([starts, ends - starts], axis=1)


class Data:
    """A finished data folder, as `open_data` returns it.

    folder: Path; manifest: dict; hash, tokenizer_hash: hex sha256; vocab_size, eot: int; split(name): Split.
    """

    def __init__(self, folder, manifest, hash):
        self.folder, self.manifest, self.hash = folder, manifest, hash
        self.tokenizer_hash, self.eot = manifest["tokenizer"]["sha256"], manifest["tokenizer"]["eot"]
        self.vocab_size = manifest["vocab_size"]

    def split(self, name):
        """The Split called `name`; DataError where the folder has none."""
        if not self.manifest["splits"].get(name):
            raise unknown(
                f"split in {self.folder}:", name, [s for s, shards in self.manifest["splits"].items() if shards]
            )
        return Split(self.folder, self.manifest["splits"][name], self.manifest["dtype"], self.vocab_size, self.eot)


def open_data(folder, verify=None):
    """Open a data folder that prepare.py finished, and check that it still is what prepare.py made.

    The manifest's hash and every shard's size and fingerprint are always checked; the shards' sha256 with verify=True,
    or with verify=None if together they hold at most 1 GiB. Returns Data; DataError names the file, what was expected
    and what to run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no data folder {folder}; make it, for example: python data/prepare.py builtin --out {folder}")
    if not (folder / "COMPLETE").is_file() or not (folder / "manifest.json").is_file():
        raise DataError(
            f"{folder} is not a finished data folder (it has no COMPLETE or no manifest.json); make one in "
            f"another or an empty folder, for example: python data/prepare.py builtin --out DIR"
        )
    content = (folder / "manifest.json").read_bytes()
    found, expected = hashlib.sha256(content).hexdigest(), (folder / "COMPLETE").read_text(errors="replace").strip()
    if found != expected:
        raise DataError(
            f"{folder / 'manifest.json'} was altered: its sha256 is {found}, COMPLETE says {expected}; "
            f"delete {folder} and run data/prepare.py again"
        )
    manifest = json.loads(content)
    if manifest["format"] != FORMAT:
        advice = (
            "it was made by a newer version of this repository: update, or prepare the data in another folder"
            if manifest["format"] > FORMAT
            else f"delete {folder} and prepare the data again"
        )
        raise DataError(f"{folder} has data format {manifest['format']}, this version reads {FORMAT}; {advice}")

    again = (
        f"delete {folder} and run: python data/prepare.py {manifest['dataset']} --out {folder} --tokenizer "
        f"{manifest['tokenizer']['name']} (with the --source it was made from, if any)"
    )
    shards = [record for records in manifest["splits"].values() for record in records]
    width = np.dtype(manifest["dtype"]).itemsize
    for record in shards:
        path = folder / record["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != record["tokens"] * width:
            problem = "is missing" if size is None else f"has {size:,} bytes instead of {record['tokens'] * width:,}"
            raise DataError(f"{path} {problem}; {again}")
        if fingerprint(path) != record["fingerprint"]:
            raise DataError(f"{path} was altered: it is not what the manifest describes; {again}")
    if verify or (verify is None and sum(r["tokens"] for r in shards) * width <= VERIFY_LIMIT):
        for record in shards:
            with open(folder / record["file"], "rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()
            if digest != record["sha256"]:
                raise DataError(
                    f"{folder / record['file']} was altered: its sha256 is {digest}, the manifest says "
                    f"{record['sha256']}; {again}"
                )
    return Data(folder, manifest, found)


# ---- order ----


class WindowOrder:
    """Which window of the train stream comes when: a function of (data_seed, n_tokens, block_size) alone, without state.

    With N tokens and T = block_size there are K = (N-1) // T windows an epoch. Epoch e starts at an offset o in
    [0, (N-1) mod T] and visits its windows j, tokens o+jT … o+(j+1)T inclusive, in a permutation; both are drawn from
    (data_seed, e). Items are numbered 0, 1, 2, … through the endless sequence of epochs.
    """

    def __init__(self, n_tokens, block_size, data_seed):
        if block_size < 1:
            raise DataError(f"block_size must be at least 1, not {block_size}")
        if not 0 <= data_seed < 2**64:
            raise DataError(f"data_seed must be from 0 to 2**64 - 1, not {data_seed}")
        self.windows, self.slack = (n_tokens - 1) // block_size, (n_tokens - 1) % block_size
        if self.windows < 1:
            raise DataError(
                f"{n_tokens:,} tokens are too few for one window of block_size {block_size} + 1 tokens; "
                f"take a smaller block_size or more text"
            )
        self.block_size, self.data_seed = block_size, data_seed
        self._epoch, self._starts = None, None  # of the latest epoch only: K may be ten million

    def _epoch_starts(self, epoch):
        if epoch != self._epoch:
            # numpy keeps a bit generator's raw stream the same in every version; it does not promise that of permutation().
            bits = np.random.Philox(key=np.array([self.data_seed, epoch], np.uint64))
            offset = int(bits.random_raw()) % (self.slack + 1)  # bias below 2**-40
            permutation = np.argsort(bits.random_raw(self.windows), kind="stable")
            self._epoch, self._starts = epoch, offset + permutation * self.block_size
        return self._starts

    def starts(self, first, count):
        """First tokens of the windows that are items first … first+count-1: (count,) int64."""
        parts, item, end = [np.empty(0, np.int64)], first, first + count
        while item < end:
            epoch, at = divmod(item, self.windows)
            parts.append(self._epoch_starts(epoch)[at : at + end - item])
            item += len(parts[-1])
        return np.concatenate(parts)


def batch(split, starts, block_size):
    """Inputs and next-token targets of the windows that begin at `starts` (n,): x, y, each (n, block_size) int64."""
    tokens = np.stack([split.read(int(s), int(s) + block_size + 1) for s in starts])  # (n, T + 1)
    return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
