"""Reads files of text: .txt, .jsonl, .json (these also .gz, .bz2, .xz, .zst) and .parquet, document by document.

A .txt file is one document, unless a separator divides it. So is a line of a .jsonl file, an item of a .json file and a
row of a .parquet file.
"""

import bz2
import codecs
import collections
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from data.diagnose import HEAD, encoding_advice, mistaken_file
from data.files import COMPRESSED, File, kind_of, some
from data.shards import DataError
from data.tokenizer import well_formed

# Types of pyarrow that hold text; bytes must be UTF-8
STRINGS = (
    *("string", "large_string", "string_view"),
    *("binary", "large_binary", "binary_view", "fixed_size_binary"),
    "null",
)
PARQUET_RATIO = 1.55  # bytes of text per byte on disk, likewise

Documents = Iterator[tuple[str, str]]  # (name, text) of each


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
    """Yield (name, text) of each document of a file. A text may be empty.

    Only one document is held at a time, but the whole of a .txt file, and of a .json file that is one value.
    start, stop: read only these row groups (.parquet), or the lines that begin in these bytes (.jsonl).
    separator: of the documents of a .txt file, which is one document where it is None.
    What cannot be read is handed to `bad`, with the file's name and the line or row group.
    """
    kind, packed = kind_of(file.name)
    path, base, bad = Path(file.path), file.name[: len(file.name) - len(packed)], bad or Bad()
    try:
        if problem := _mistaken(path, kind, packed):
            if not start:  # else the file's first range says it
                bad("files", f"{path} {problem}")
            return
        if kind == ".txt":
            rows = _read_txt(path, packed, base, separator, bad)
        elif kind == ".json":
            rows = _read_json(path, packed, base, field, bad)
        elif kind == ".jsonl":
            rows = _read_jsonl(path, packed, base, field, bad, start, stop)
        else:
            rows = _read_parquet(path, base, field, bad, start, stop)
        for name, text in rows:
            yield name, well_formed(text)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None):  # of the system, not of the decompressor
            raise
        bad("files", f"{path} is damaged and cannot be decompressed: {error}")


def _mistaken(path: Path, kind: str, packed: str) -> str | None:
    """What a file is, where it is not what its name says."""
    with open(path, "rb", buffering=0) as f:
        head = f.read(HEAD)
    if packed:
        if not head:
            return "is empty, without even the header of its compression"
        if problem := mistaken_file(head, packed):
            return problem
        with _open(path, packed) as f:
            head = f.read(HEAD)
    problem = mistaken_file(head, kind)
    return f"when unpacked {problem}" if problem and packed else problem


def _open(path: Path, packed: str) -> BinaryIO:
    """A binary stream of the unpacked content."""
    if packed == ".zst":
        import pyarrow  # it has zstd, and unlike the zstandard package it notices a truncated file

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(packed, open)(path, "rb")


def _decode(content: bytes, first: bool) -> str:
    return content.decode("utf-8-sig" if first else "utf-8")  # without the byte-order mark of a file's start


def _not_utf8(error: UnicodeDecodeError, path: Path, packed: str, bad: Bad, line: int = 1, at: int = 0) -> str:
    """What to say of a file that is not UTF-8. The bytes of the error are those from line `line`, byte `at` on."""
    line += error.object[: error.start].count(b"\n")
    message = (
        f"{path}{' when unpacked' if packed else ''}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8"
    )
    if bad.skip:
        return message
    with _open(path, packed) as f:
        f.seek(max(0, at + error.start - 2**20))
        return f"{message}; {encoding_advice(f.read(2**21))}"


# ---- text ----


def _read_txt(path: Path, packed: str, name: str, separator: str | None, bad: Bad) -> Documents:
    """The file, or what stands between the separators. One at an end of the file makes no empty document there."""
    with _open(path, packed) as f:
        try:
            text = _decode(f.read(), True)
        except UnicodeDecodeError as error:
            bad("files", _not_utf8(error, path, packed, bad))
            return
    if separator is None:
        yield name, text
        return
    parts = text.split(separator)
    for number, part in enumerate(parts, 1):
        if part.strip() or 1 < number < len(parts):
            yield f"{name}:{number}", part


# ---- JSON ----


def _read_jsonl(
    path: Path, packed: str, name: str, field: str, bad: Bad, start: int | None, stop: int | None
) -> Documents:
    """The lines that begin in bytes start … stop-1. They are numbered as in the whole file."""
    parse = _parser(field)
    with _open(path, packed) as f:
        before = at = 0
        if start:  # the line that begins before `start` belongs to the range before
            before = _lines_before(f, start)
            f.seek(start - 1)
            at = start - 1 + len(f.readline())
        for number, line in enumerate(f, before + 1):
            if stop is not None and at >= stop:
                return
            here, at = at, at + len(line)
            if not line.strip():
                continue
            try:
                record = parse(_decode(line, here == 0))
                text = _text_of(record, field)
            except UnicodeDecodeError as error:
                bad("lines", _not_utf8(error, path, packed, bad, number, here))
            except ValueError as error:
                hint = "; an array is read where the name ends in .json" if line.startswith(b"[") else ""
                bad("lines", f"{path}, line {number}: {error}{hint}")
            else:
                yield str(record.get("id", f"{name}:{number}")), text


def _lines_before(f: BinaryIO, start: int) -> int:
    """How many lines begin before byte `start`."""
    f.seek(0)
    lines = 0
    while (left := start - f.tell()) > 0 and (block := f.read(min(2**20, left))):
        lines += block.count(b"\n")
    f.seek(start - 1)
    return lines + (f.read(1) != b"\n")


def _read_json(path: Path, packed: str, name: str, field: str, bad: Bad) -> Documents:
    """The items of an array, the rows of an object of columns, a single object, or lines as in a .jsonl file."""
    if _has_lines(path, packed):
        yield from _read_jsonl(path, packed, name, field, bad, None, None)
        return
    try:
        with _open(path, packed) as f:
            value = _parser(field)(_decode(f.read(), True))
    except UnicodeDecodeError as error:
        bad("files", _not_utf8(error, path, packed, bad))
        return
    except ValueError as error:
        bad("files", f"{path}: {error}")
        return
    for number, record in enumerate(_records(value), 1):
        record = {field: record} if isinstance(record, str) else record
        try:
            text = _text_of(record, field)
        except ValueError as error:
            bad("rows", f"{path}, item {number}: {error}")
        else:
            yield str(record.get("id", f"{name}:{number}")), text


def _has_lines(path: Path, packed: str) -> bool:
    """Whether a .json file has an object a line, and more than one."""
    with _open(path, packed) as f:
        lines = (line for line in map(bytes.strip, f) if line)
        first, second = next(lines, b"").removeprefix(codecs.BOM_UTF8), next(lines, b"")
        return first.startswith(b"{") and first.endswith(b"}") and second.startswith(b"{")


def _records(value: object) -> list:
    """The rows of what a .json file holds. An object whose values are all arrays of one length has columns."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len(set(map(len, value.values()))) == 1:
            return [dict(zip(value, row)) for row in zip(*value.values())]
    return value if isinstance(value, list) else [value]


def _parser(field: str) -> Callable[[str], object]:
    """json.loads, but ValueError says so where it is not JSON, or has the field twice in one object."""
    names = {field, *field.split(".")}

    def unique(pairs: list[tuple[str, object]]) -> dict:
        record = dict(pairs)
        if len(record) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            if twice := [name for name in names if counts[name] > 1]:
                raise ValueError(f"two fields are called {twice[0]!r}")
        return record

    decode = json.JSONDecoder(object_pairs_hook=unique).decode

    def parse(text: str) -> object:
        try:
            return decode(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from None

    return parse


def _text_of(record: object, field: str) -> str:
    """The text in a field of a row, or for a.b in field b of field a. ValueError says why there is none."""
    if not isinstance(record, dict):
        raise ValueError(f"no field {field!r}, but {type(record).__name__}")
    if isinstance(value := record.get(field), str):
        return value
    value = record
    for name in [field] if field in record else field.split("."):
        if value is None:
            return ""
        if not isinstance(value, dict) or name not in value:
            has = f"only {some(list(value), 10)}" if isinstance(value, dict) else f"but {type(value).__name__}"
            raise ValueError(f"no field {field!r}, {has}; --field NAME reads another")
        value = value[name]
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, str | None):
            raise ValueError(f"{field!r} is not text but {type(part).__name__}")
    return _joined(value)


def _joined(value: str | bytes | list | None) -> str:
    """The text of what a field or a column holds: null is "", bytes are UTF-8, each text of a list has a line."""
    if isinstance(value, list):
        return "\n".join(_joined(part) for part in value if part is not None)
    return value.decode() if isinstance(value, bytes) else value or ""


# ---- parquet ----


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
        sum(
            column.total_uncompressed_size
            for column in map(g.column, range(g.num_columns))
            if f"{column.path_in_schema}.".startswith(f"{field}.")  # text.list.element belongs to text
        )
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
        names, problem = text_column(f.schema_arrow, field)
        if problem:
            if not start:  # else the file's first range says it
                bad("files", f"{path}: {problem}")
            return
        sizes, counts = (
            row_group_bytes(path, field),
            [f.metadata.row_group(i).num_rows for i in range(f.num_row_groups)],
        )
        for group in range(start or 0, f.num_row_groups if stop is None else stop):
            rows = min(max(2**22 * counts[group] // max(sizes[group], 1), 1), 1024)  # about 4 MB of text at a time
            row = sum(counts[:group])
            try:
                for batch in f.iter_batches(rows, row_groups=[group], columns=[field], use_threads=False):
                    values = batch.column(batch.schema.names.index(names[0]))
                    if names[1:]:
                        import pyarrow.compute  # which takes a while

                        values = pyarrow.compute.struct_field(values, names[1:])
                    for text in texts_of(values, bad, path, row):
                        row += 1
                        yield f"{name}:{row}", text
            except (pyarrow.ArrowException, OSError) as error:
                bad("row groups", f"{path}, row group {group} cannot be read: {error}")


def text_column(schema, field: str) -> tuple[list[str], str | None]:
    """The names that lead to a column of text, or to a field of its structs; and what is wrong with it, or None."""
    names = [field] if field in schema.names else field.split(".")
    if schema.names.count(names[0]) > 1:
        return names, f"two columns are called {names[0]!r}"
    kind = schema
    for name in names:
        at = kind.get_field_index(name) if hasattr(kind, "get_field_index") else -1
        kind = kind.field(at).type if at >= 0 else None
    if _is_text(kind):
        return names, None
    has = some([f"{column.name} ({column.type})" for column in schema], 20)
    return names, f"no text column {field!r}; it has {has}; --field NAME reads another"


def _is_text(kind) -> bool:
    """Whether a type of pyarrow is text: strings, bytes or nulls, or a dictionary or lists of them."""
    if "list" in str(kind).split("<")[0] or str(kind).startswith("dictionary<"):
        kind = kind.value_type
    return str(kind).split("[")[0] in STRINGS


def texts_of(values, bad: Bad, path: Path, row: int) -> list[str]:
    """The texts of a pyarrow array that follows `row` rows of the file. "" for a text that is not UTF-8."""
    try:
        return [value if isinstance(value, str) else _joined(value) for value in values.to_pylist()]
    except UnicodeDecodeError:
        return [_text(value, bad, f"{path}, row {row + i + 1}") for i, value in enumerate(values)]


def _text(value, bad: Bad, where: str) -> str:
    try:
        return _joined(value.as_py())
    except UnicodeDecodeError as error:
        bad("rows", f"{where}: not UTF-8 ({error.reason})")
        return ""
