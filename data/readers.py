"""Reads files of text: .txt, .jsonl (both also .gz, .xz, .zst) and .parquet, document by document.

A .txt file is one document. So is a line of a .jsonl file and a row of a .parquet file.
"""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data.shards import DataError, fingerprint
from data.tokenizer import well_formed

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSED = {".gz": 2.7, ".xz": 3.5, ".zst": 2.9}  # bytes of text per byte on disk, typically
PARQUET_RATIO = 1.55  # likewise

Documents = Iterator[tuple[str, str]]  # (name, text) of each


@dataclass(frozen=True)
class File:
    """A file of a source."""

    name: str  # relative to the source, whose files are sorted by it
    bytes: int
    identity: str  # hex digest that changes with the content
    split: str | None = None  # of a corpus that has its own splits
    path: str | None = None  # where the file is; None until it is downloaded
    table: object = field(default=None, compare=False, repr=False)  # of the library `datasets`: see data/library.py
    stream: tuple[int, int] | None = None  # of a table that is streamed, how many files it has, and which this is
    fingerprint: tuple[str, str] | None = None  # of a table: its split, and the library's own fingerprint of it


class Bad:
    """What to do about a part of the source that cannot be read: raise, or with `skip` count it by kind in `counts`."""

    def __init__(self, skip: bool = False):
        self.skip, self.counts, self.messages = skip, {}, []

    def __call__(self, kind: str, message: str) -> None:
        message = " ".join(message.split())  # some libraries' messages have several lines
        if not self.skip:
            raise DataError(f"{message} (--skip_bad goes on without it)") from None
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.messages) < 10:
            self.messages.append(message)


# ---- which files ----


def kind_of(name: str) -> tuple[str, str] | None:
    """Suffix of the content and suffix of the compression (or "") of a file's name. None where we cannot read it."""
    path = Path(name)
    packed = path.suffix if path.suffix in COMPRESSED else ""
    kind = Path(name.removesuffix(packed)).suffix
    return (kind, packed) if kind in KINDS and not (packed and kind == ".parquet") else None


def find_files(source: Path | str) -> list[File]:
    """The files of a --source: one file, or those of a folder in the order of their paths. Hidden ones are left out."""
    source = Path(source)
    if not source.exists():
        raise DataError(f"--source {source} does not exist")
    named = {source.name: source}
    if source.is_dir():
        named = {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
        named = {name: path for name, path in named.items() if not any(p.startswith(".") for p in name.split("/"))}
    named = {name: path for name, path in named.items() if kind_of(name)}
    if not named:
        raise DataError(
            f"--source {source}: no {', '.join(KINDS)} file (the first two also with {', '.join(COMPRESSED)})"
        )
    return [File(name, path.stat().st_size, fingerprint(path), path=str(path)) for name, path in sorted(named.items())]


def estimated_bytes(files: Iterable[File], field: str) -> int:
    """Bytes of text in files, without reading them: from parquet's metadata, or else from the size on disk."""
    total = 0
    for file in files:
        kind, packed = ("", "") if file.table is not None else kind_of(file.name) or ("", "")
        if kind == ".parquet" and file.path:
            total += sum(row_group_bytes(file.path, field))
        else:
            total += file.bytes * (PARQUET_RATIO if kind == ".parquet" else COMPRESSED.get(packed, 1.0))
    return int(total)


# ---- reading ----


def read_file(
    file: File,
    field: str = "text",
    bad: Bad | None = None,
    start: int | None = None,
    stop: int | None = None,
    separator: str | None = None,
) -> Documents:
    """Yield (name, text) of each document of a file. A text may be empty. Only one document is held at a time.

    start, stop: read only these row groups (.parquet), or the lines that begin in these bytes (.jsonl).
    separator: of the documents of a .txt file, which is one document where it is None.
    What cannot be read is handed to `bad`, with the file's name and the line or row group.
    """
    kind, packed = kind_of(file.name)
    path, bad = Path(file.path), bad or Bad()
    try:
        name = file.name.removesuffix(packed)
        if kind == ".txt":
            rows = _read_txt(path, name, separator, bad)
        else:
            rows = (_read_jsonl if kind == ".jsonl" else _read_parquet)(path, name, field, bad, start, stop)
        for name, text in rows:
            yield name, well_formed(text)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None):  # of the system, not of the decompressor
            raise
        bad("files", f"{path} is damaged and cannot be decompressed: {error}")


def _open(path: Path) -> BinaryIO:
    """A binary stream of the unpacked content."""
    if path.suffix == ".zst":
        import pyarrow  # it has zstd, and unlike the zstandard package it notices a truncated file

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb")


def _decode(content: bytes, first: bool) -> str:
    return content.decode("utf-8-sig" if first else "utf-8")  # without the byte-order mark of a file's start


def _not_utf8(error: UnicodeDecodeError, path: Path, line: int) -> str:
    line += error.object[: error.start].count(b"\n")
    return (
        f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file, "
        f"for example: iconv -f latin1 -t utf-8"
    )


def _read_txt(path: Path, name: str, separator: str | None, bad: Bad) -> Documents:
    """The file, or what stands between the separators. One at an end of the file makes no empty document there."""
    with _open(path) as f:
        try:
            text = _decode(f.read(), True)
        except UnicodeDecodeError as error:
            bad("files", _not_utf8(error, path, 1))
            return
    if separator is None:
        yield name, text
        return
    parts = text.split(separator)
    for number, part in enumerate(parts, 1):
        if part.strip() or 1 < number < len(parts):
            yield f"{name}:{number}", part


def _read_jsonl(path: Path, name: str, field: str, bad: Bad, start: int | None, stop: int | None) -> Documents:
    """The lines that begin in bytes start … stop-1. They are numbered as in the whole file."""
    with _open(path) as f:
        before = at = 0
        if start:  # the line that begins before `start` belongs to the range before
            before = _lines_before(f, start)
            f.seek(start - 1)
            at = start - 1 + len(f.readline())
        for number, line in enumerate(f, before + 1):
            if stop is not None and at >= stop:
                return
            first, at = at == 0, at + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(_decode(line, first))
            except UnicodeDecodeError as error:
                bad("lines", _not_utf8(error, path, number))
            except (ValueError, RecursionError) as error:
                bad("lines", f"{path}, line {number}: not JSON ({error})")
            else:
                if problem := _no_text(record, field):
                    bad("lines", f"{path}, line {number}: {problem}")
                else:
                    yield str(record.get("id", f"{name}:{number}")), record[field] or ""


def _no_text(record: object, field: str) -> str | None:
    """Why a line's JSON has no text in `field`, which may be null. None where it has."""
    if not isinstance(record, dict):
        return f"no field {field!r}, but {type(record).__name__}"
    if field not in record:
        return f"no field {field!r}, only {', '.join(record)}"
    if not isinstance(record[field], str | None):
        return f"{field!r} is not text but {type(record[field]).__name__}"
    return None


def _lines_before(f: BinaryIO, start: int) -> int:
    """How many lines begin before byte `start`."""
    f.seek(0)
    lines = 0
    while (left := start - f.tell()) > 0 and (block := f.read(min(2**20, left))):
        lines += block.count(b"\n")
    f.seek(start - 1)
    return lines + (f.read(1) != b"\n")


def row_group_bytes(path: Path | str, field: str) -> list[int]:
    """Bytes of each row group of a parquet file, of its text column where there is one. [] for a damaged file."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError):
        return []  # reading it will say what is wrong
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [
        sum(c.total_uncompressed_size for c in map(g.column, range(g.num_columns)) if c.path_in_schema == field)
        or g.total_byte_size
        for g in groups
    ]


def _read_parquet(path: Path, name: str, field: str, bad: Bad, start: int | None, stop: int | None) -> Documents:
    """The rows of row groups start … stop-1."""
    import pyarrow
    import pyarrow.parquet

    try:
        f = pyarrow.parquet.ParquetFile(path, pre_buffer=False)  # a row group may be larger than the memory
    except (pyarrow.ArrowException, OSError) as error:
        bad("files", f"{path} cannot be read: {error}")
        return
    with f:
        columns = {column.name: str(column.type) for column in f.schema_arrow}
        if columns.get(field) not in ("string", "large_string", "string_view"):
            has = ", ".join(f"{column} ({kind})" for column, kind in columns.items())
            raise DataError(f"{path}: no text column {field!r}; it has {has}")
        sizes, counts = (
            row_group_bytes(path, field),
            [f.metadata.row_group(i).num_rows for i in range(f.num_row_groups)],
        )
        for group in range(start or 0, f.num_row_groups if stop is None else stop):
            rows = min(max(2**22 * counts[group] // max(sizes[group], 1), 1), 1024)  # about 4 MB of text at a time
            row = sum(counts[:group])
            try:
                for batch in f.iter_batches(rows, row_groups=[group], columns=[field], use_threads=False):
                    for text in _texts(batch.column(0), bad, path, row):
                        row += 1
                        yield f"{name}:{row}", text or ""
            except (pyarrow.ArrowException, OSError) as error:
                bad("row groups", f"{path}, row group {group} cannot be read: {error}")


def _texts(values, bad: Bad, path: Path, row: int) -> list[str | None]:
    """The texts of a pyarrow array that follow `row` rows of the file. None for a text that is not UTF-8."""
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        return [_text(value, bad, f"{path}, row {row + i + 1}") for i, value in enumerate(values)]


def _text(value, bad: Bad, where: str) -> str | None:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        bad("rows", f"{where}: not UTF-8 ({error.reason})")
        return None
