"""Token shards on disk: what a data folder holds, how it is opened, checked and read, and the order of training.

A data folder holds
    train_00000.bin, val_00000.bin, …   token ids, flat and little-endian: numpy.memmap(file, dtype) reads one
    train_00000.mask, …                 of tasks: a byte for each token, 1 where it is a target of training, else 0
    lengths.png                         a histogram of the documents' lengths
    manifest.json                       what the shards are: corpus, tokenizer, counts, sha256 of each
    COMPLETE                            sha256 of manifest.json; written last: a folder without it is not finished
Documents are whole and in source order. Each is followed by the end-of-text token. The same input gives the same bytes.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

FORMAT = 2
VERIFY_LIMIT = 2**30  # bytes; a larger folder is hashed only when asked (sha256 takes about a second per GB)
SCAN = 2**20  # tokens held at a time while scanning for documents


class DataError(ValueError):
    """A problem with data that the user can solve. Its message is meant to be read without a traceback."""


def unknown(kind: str, name: object, known: Iterable[str]) -> DataError:
    """The DataError for a `name` that is not among `known`. It suggests the nearest one that is."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return DataError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- commands ----


class PathError(DataError, argparse.ArgumentTypeError):
    """A path that cannot be meant."""


def given_path(text: str) -> str:
    """A path as it is meant on a command line or in a config: ~ and variables such as $HOME are replaced, which a
    shell does not do within quotes or after `=`. PathError for an empty one, an unknown user or variable."""
    if not text.strip():
        raise PathError("an empty path: name a file or a folder")
    path = os.path.expanduser(os.path.expandvars(text))
    if not os.path.lexists(path):
        if path.startswith("~"):
            raise PathError(f"{text}: there is no such user; a file of that name here is ./{text}")
        if unset := re.search(r"\$(\w+|\{[^}]*\})", path):
            raise PathError(f"{text}: the variable {unset[0]} is not set")
    return path


def as_path(text: str) -> Path:
    """given_path as a Path."""
    return Path(given_path(text))


def output(text: str) -> None:
    """Print to standard output. A reader that has seen enough, as `| head` has, is no error: the command goes on, and
    what it prints from then on is dropped."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- files ----


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that `path` never holds a part of it: write a temporary file, then rename it."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # several machines may write the same file
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"))  # of file names that are no UTF-8; JSON's own escape


def write_manifest(folder: Path | str, manifest: dict) -> None:
    """Write manifest.json, then COMPLETE. With these `folder` is a finished data folder."""
    path = Path(folder) / "manifest.json"
    write_json(path, {"format": FORMAT} | manifest)
    write_atomically(path.with_name("COMPLETE"), f"{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())


def fingerprint(path: Path | str) -> str:
    """Hex sha256 of a file's size and of 16 blocks of 4 KiB, spread evenly. Cheap at any size; blind between blocks."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for i in range(16):
            f.seek(max(0, size - 4096) * i // 15)
            digest.update(f.read(4096))
    return digest.hexdigest()


def file_sha256(path: Path | str) -> str:
    """Hex sha256 of a whole file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def mask_path(shard: Path) -> Path:
    """Where the mask of a shard lies, in a folder of a task."""
    return shard.with_suffix(".mask")


def json_sha256(value: object) -> str:
    """Hex sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# ---- reading ----


class Split:
    """The tokens of one split as one stream, shard after shard. len() is the number of tokens. masked: whether it says
    which of them are targets."""

    def __init__(self, folder: Path | str, records: list[dict], dtype: np.dtype | str, vocab_size: int, eot: int):
        self.files = [Path(folder) / record["file"] for record in records]
        self.masked = any("mask" in record for record in records)
        self.dtype, self.vocab_size, self.eot = np.dtype(dtype).newbyteorder("<"), vocab_size, eot
        self._edges = np.cumsum([0] + [r["tokens"] for r in records])  # shard i holds tokens _edges[i] … _edges[i+1]-1

    def __len__(self) -> int:
        return int(self._edges[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop-1, across shards: (stop - start,) int64.

        IndexError outside the stream. DataError, naming the shard, where one is short or holds an id >= vocab_size.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} … {stop} of a split with {len(self)}")
        return self._read(self.files, self.dtype, start, stop, np.empty(stop - start, np.int64))

    def read_mask(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens start … stop-1 are targets: (stop - start,) bool; all of them where there is no mask.
        DataError, naming the file, where one is short."""
        if not self.masked:
            return np.ones(stop - start, bool)
        return self._read([*map(mask_path, self.files)], np.dtype(np.uint8), start, stop, np.empty(stop - start, bool))

    def _read(self, files: list[Path], dtype: np.dtype, start: int, stop: int, found: np.ndarray) -> np.ndarray:
        """Fill `found` with entries start … stop-1 of the shards' `files`."""
        done, shard = 0, int(np.searchsorted(self._edges, start, side="right")) - 1
        while done < len(found):
            offset = start + done - int(self._edges[shard])
            count = min(len(found) - done, int(self._edges[shard + 1]) - start - done)
            # A plain read is as fast as a memmap from the page cache, and the process does not grow with what it reads.
            part = np.fromfile(files[shard], dtype, count, offset=offset * dtype.itemsize)
            if len(part) < count:
                raise DataError(f"{files[shard]} is truncated: no token {offset + len(part)}")
            if count and int(part.max()) >= self.vocab_size:
                at = int(np.argmax(part >= self.vocab_size))
                raise DataError(
                    f"{files[shard]} holds token id {part[at]} at offset {offset + at}; "
                    f"ids must be below vocab_size {self.vocab_size}"
                )
            found[done : done + count] = part
            done, shard = done + count, shard + 1
        return found

    def locate(self, position: int) -> tuple[Path, int]:
        """Where token `position` of the stream lies: the path of its shard, and its offset there in tokens."""
        shard = int(np.searchsorted(self._edges, position, side="right")) - 1
        return self.files[shard], position - int(self._edges[shard])

    def documents(self, scan: int = SCAN) -> np.ndarray:
        """Start and length, without its end-of-text token, of every document: (n, 2) int64.

        Reads the whole split, `scan` tokens at a time.
        """
        blocks = [(at, min(at + scan, len(self))) for at in range(0, len(self), scan)]
        ends = [np.flatnonzero(self.read(start, stop) == self.eot) + start for start, stop in blocks]
        ends = np.concatenate(ends) if ends else np.empty(0, np.int64)
        starts = np.concatenate([[0], ends + 1])[:-1].astype(np.int64)
        return np.stack([starts, ends - starts], axis=1)


class Data:
    """A finished data folder, as `open_data` returns it.

    folder: Path; manifest: dict; tokenizer_hash: hex sha256; vocab_size, eot: int; split(name): Split.
    hash: hex sha256 of what is trained on and scored. It is the same wherever the same text came from: an archive, a
    clone, a .jsonl.
    """

    def __init__(self, folder: Path, manifest: dict, manifest_hash: str):
        self.folder, self.manifest, self.manifest_hash = folder, manifest, manifest_hash
        self.tokenizer_hash, self.eot = manifest["tokenizer"]["sha256"], manifest["tokenizer"]["eot"]
        self.vocab_size = manifest["vocab_size"]
        shards = [  # lists, sorted: the order of keys in a manifest means nothing
            [split, [[r["tokens"], r["sha256"], r.get("mask", {}).get("sha256")] for r in records]]
            for split, records in sorted(manifest["splits"].items())
        ]
        long = [[document["start"], document["tokens"]] for document in manifest["val_long"]]
        task = sorted(manifest.get("task", {}).items())
        self.hash = json_sha256([self.tokenizer_hash, self.vocab_size, manifest["dtype"], shards, long, task])

    def is_of(self, recorded: str) -> bool:
        """Whether a recorded hash is of this data: `hash`, or the manifest's, which was recorded until 2026-11-30."""
        return recorded in (self.hash, self.manifest_hash)

    def records(self, split: str) -> list[dict]:
        """The manifest's records of the shards of a split, in order. DataError where the folder has no such split."""
        splits = self.manifest["splits"]
        if not splits.get(split):
            raise unknown(f"split in {self.folder}:", split, [name for name, shards in splits.items() if shards])
        return splits[split]

    def epoch_tokens(self, split: str, block_size: int) -> int:
        """Inputs that an epoch of a split goes through: its tokens, or of a task a row of block_size each example."""
        records = self.records(split)
        return sum(r["documents"] * block_size if "mask" in r else r["tokens"] for r in records)

    def stream(self, records: list[dict]) -> Split:
        """Some of the folder's shards as one stream."""
        return Split(self.folder, records, self.manifest["dtype"], self.vocab_size, self.eot)

    def split(self, name: str) -> Split:
        """The split called `name`. DataError where the folder has none."""
        return self.stream(self.records(name))


def open_data(folder: Path | str, verify: bool | None = None) -> Data:
    """Open a data folder that data/prepare.py finished, and check that it still is what prepare.py made.

    The manifest's hash and every shard's size and fingerprint are always checked. The shards' sha256 are checked with
    verify=True, and with verify=None where the shards are at most 1 GiB together. A DataError names the file, what was
    expected and what to run.
    """
    folder = Path(folder)
    manifest, digest = _read_manifest(folder)
    again = (
        f"delete {folder} and run: python data/prepare.py {manifest['dataset']} --out {folder} --tokenizer "
        f"{manifest['tokenizer']['name']} (with the --source, --field and so on that it was made with)"
    )
    if "task" in manifest:
        task = manifest["task"]
        options = " ".join(f"--{name} {task[name]}" for name in ("length", "examples", "seed"))
        again = f"delete {folder} and run: python data/prepare.py task {task['name']} --out {folder} {options}"
    width, files = np.dtype(manifest["dtype"]).itemsize, []  # path, bytes, fingerprint and sha256 of each
    for record in (record for records in manifest["splits"].values() for record in records):
        path = folder / record["file"]
        files.append((path, record["tokens"] * width, record))
        files += [(mask_path(path), record["tokens"], record["mask"])] if "mask" in record else []
    for path, expected, record in files:
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            problem = "is missing" if size is None else f"has {size:,} bytes instead of {expected:,}"
            raise DataError(f"{path} {problem}; {again}")
        if fingerprint(path) != record["fingerprint"]:
            raise DataError(f"{path} was altered: it is not what the manifest describes; {again}")
    if verify or (verify is None and sum(size for _, size, _ in files) <= VERIFY_LIMIT):
        for path, _, record in files:
            if (found := file_sha256(path)) != record["sha256"]:
                raise DataError(
                    f"{path} was altered: its sha256 is {found}, the manifest says {record['sha256']}; {again}"
                )
    return Data(folder, manifest, digest)


def _read_manifest(folder: Path) -> tuple[dict, str]:
    """The manifest of a finished data folder and its sha256. DataError where it is not there, altered, or too new."""
    if not folder.is_dir():
        what = folder.name.replace("-", " ", 1).replace("-", " --length ") if folder.name[:5] == "task-" else "builtin"
        raise DataError(f"no data folder {folder}; make it, for example: python data/prepare.py {what} --out {folder}")
    path, complete = folder / "manifest.json", folder / "COMPLETE"
    if not complete.is_file() or not path.is_file():
        raise DataError(
            f"{folder} is not a finished data folder (it has no COMPLETE or no manifest.json); make one in "
            f"another or an empty folder, for example: python data/prepare.py builtin --out DIR"
        )
    content = path.read_bytes()
    found, expected = hashlib.sha256(content).hexdigest(), complete.read_text(errors="replace").strip()
    if found != expected:
        raise DataError(
            f"{path} was altered: its sha256 is {found}, COMPLETE says {expected}; "
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
    return manifest, found


# ---- order ----


ROUNDS = 12  # of `feistel`. With 8 the orders of 6 windows are not equally likely; with 12 those of 5 are, within 4 %


def feistel(count: int, bits: np.random.Philox) -> Callable[[np.ndarray], np.ndarray]:
    """A permutation of 0 … count-1 as a function of places, (n,) int64 each way. It holds nothing of size `count`.

    A Feistel network permutes the numbers of as many bits as count-1 has: by turns each half of the bits is changed by
    a hash of the other. A number that comes out beyond count-1 goes in again until one is below (cycle walking).
    """
    total = max((count - 1).bit_length(), 2)
    low_bits = total // 2
    high_bits = total - low_bits
    keys = bits.random_raw(ROUNDS).reshape(-1, 2)

    def network(numbers: np.ndarray) -> np.ndarray:
        high, low = numbers >> low_bits, numbers & np.uint64(2**low_bits - 1)
        for one, other in keys:
            high = high ^ _hash(low ^ one) >> 64 - high_bits
            low = low ^ _hash(high ^ other) >> 64 - low_bits
        return high << low_bits | low

    def permuted(places: np.ndarray) -> np.ndarray:
        found = network(places.astype(np.uint64))
        while len(beyond := np.flatnonzero(found >= count)):
            found[beyond] = network(found[beyond])
        return found.astype(np.int64)

    return permuted


def _hash(x: np.ndarray) -> np.ndarray:
    """64 bits, of which the upper ones depend on all bits of x: products with splitmix64's constants (OOPSLA 2014)."""
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    return (x ^ x >> 32) * np.uint64(0x94D049BB133111EB)


def drawn(count: int, bits: np.random.Philox) -> Callable[[np.ndarray], np.ndarray]:
    """Likewise, by drawing a number for each of 0 … count-1 and sorting them: 8 bytes each are held, 20 meanwhile."""
    return np.argsort(bits.random_raw(count), kind="stable").take  # numpy does not promise what permutation() gives


ORDERS = {"feistel": feistel, "drawn": drawn}


class WindowOrder:
    """Which window of the train stream comes when. It depends on (data_seed, n_tokens, block_size, kind) alone.

    With N tokens and T = block_size an epoch has K = (N-1) // T windows. Epoch e starts at an offset o in
    [0, (N-1) mod T]. It visits its windows j, which are tokens o+jT … o+(j+1)T inclusive, in a permutation, made as
    ORDERS[kind] says. Offset and permutation follow from (data_seed, e). Items are numbered 0, 1, 2, … through the
    endless sequence of epochs.
    """

    def __init__(self, n_tokens: int, block_size: int, data_seed: int, kind: str = "feistel"):
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
        self.block_size, self.data_seed, self.kind = block_size, data_seed, kind
        self._epoch = self._offset = self._permuted = None  # of the latest epoch only

    def _begin(self, epoch: int) -> None:
        # Every version of numpy has the same raw stream
        bits = np.random.Philox(key=np.array([self.data_seed, epoch], np.uint64))
        self._epoch, self._offset = epoch, int(bits.random_raw()) % (self.slack + 1)  # bias below 2**-40
        self._permuted = ORDERS[self.kind](self.windows, bits)

    def starts(self, first: int, count: int) -> np.ndarray:
        """First tokens of the windows that are items first … first+count-1: (count,) int64."""
        found, done = np.empty(count, np.int64), 0
        while done < count:
            epoch, at = divmod(first + done, self.windows)
            if epoch != self._epoch:
                self._begin(epoch)
            places = np.arange(at, min(at + count - done, self.windows))
            found[done : done + len(places)] = self._offset + self._permuted(places) * self.block_size
            done += len(places)
        return found


def batch(split: Split, starts: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and next-token targets of the windows that begin at `starts` (n,): x and y, each (n, block_size) int64."""
    tokens = np.stack([split.read(int(s), int(s) + block_size + 1) for s in starts])  # (n, T + 1)
    return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
