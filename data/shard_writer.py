"""Writes documents into shards, so that an interrupted writer can continue after its last finished shard."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from data.shards import DataError, file_sha256, fingerprint, mask_path, write_atomically, write_json

OCTAVE = 16  # bins per doubling in the histogram of document lengths


def length_bin(lengths: np.ndarray | list[int]) -> np.ndarray:
    """The histogram's bin of each length in tokens: (n,) int64. OCTAVE bins per doubling, bin 0 for one token."""
    return np.floor(np.log2(np.maximum(lengths, 1)) * OCTAVE + 1e-9).astype(np.int64)


class ShardWriter:
    """Writes shards `{name}_00000.bin`, … of at most `shard_tokens` tokens. A shard ends where a document ends.

    A document longer than `shard_tokens` makes a longer shard of its own. A shard has a temporary name until it is
    complete. Then NAME.json beside it holds its record: file, tokens, documents, bytes, sha256, fingerprint, `lengths`
    as {bin: documents}, and `state`, which is whatever the caller had in `self.state`. Where documents have masks, the
    shard has a file of its own for them, NAME.mask, a byte a token, and the record its sha256 and fingerprint.
    `records` lists the finished shards. A writer that finds some in the folder continues after them.
    """

    def __init__(self, folder: Path | str, name: str, dtype: np.dtype | str, shard_tokens: int):
        self.folder, self.name, self.shard_tokens = Path(folder), name, shard_tokens
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.records, self.state, self._file = [], {}, None
        while (path := self._path(len(self.records))).is_file() and (beside := path.with_suffix(".json")).is_file():
            self.records.append(json.loads(beside.read_text()))
            self.state = self.records[-1]["state"]

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}_{number:05d}.bin"

    def add(self, tokens: np.ndarray, n_bytes: int, mask: np.ndarray | None = None) -> None:
        """Append one document: `tokens` (n,) integers, end-of-text last, made from `n_bytes` of UTF-8 text; `mask`,
        bool (n,), says which of them are targets, in all documents or in none."""
        if tokens.dtype != self.dtype and len(tokens) and int(tokens.max()) > np.iinfo(self.dtype).max:
            raise DataError(f"token id {int(tokens.max())} does not fit the shards' {self.dtype.name}")
        if self._file and self._record["tokens"] + len(tokens) > self.shard_tokens:
            self.close()
        if self._file is None:
            path = self._path(len(self.records))
            # The process id keeps others away from this file: a worker of a killed run may live on for a moment.
            self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            self._file, self._sha256 = open(self._temporary, "wb"), hashlib.sha256()
            self._lengths, self._masks = [], []
            self._record = {"file": path.name, "tokens": 0, "documents": 0, "bytes": 0}
        content = np.ascontiguousarray(tokens, self.dtype).data.cast("B")
        self._file.write(content)
        self._sha256.update(content)
        self._lengths.append(len(tokens) - 1)
        if mask is not None:
            self._masks.append(mask.astype(np.uint8))
        for key, more in (("tokens", len(tokens)), ("documents", 1), ("bytes", n_bytes)):
            self._record[key] += more

    def close(self) -> list[dict]:
        """Finish the shard that is being written, if any. Returns `records`."""
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
            if self._masks:
                write_atomically(mask_path(path), np.concatenate(self._masks).tobytes())
                record["mask"] = {"sha256": file_sha256(mask_path(path)), "fingerprint": fingerprint(mask_path(path))}
            os.replace(self._temporary, path)
            write_json(path.with_suffix(".json"), record)  # after the shard: the record says that the shard is there
            self.records.append(record)
        return self.records
