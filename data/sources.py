"""Finds the files that a corpus is read from: on this machine, on the hub, or in a package."""

import dataclasses
import re
from pathlib import Path

from data.corpora import SPLITS, Corpus, Subset
from data.documents import king_james_file
from data.files import File, find_files, kind_of
from data.hub import hub_files
from data.library import is_saved, saved_files
from data.progress import note
from data.readers import Bad, read_file
from data.shards import VERIFY_LIMIT, DataError, file_sha256, json_sha256


def source_files(
    corpus: Corpus, subset: Subset | None, source: Path | str | None, revision: str | None
) -> tuple[str | None, list[File]]:
    """Revision and files of what is to be read. `revision` is of the hub.

    The revision that is returned is a commit, or None where it is not known, as for a --source.
    """
    if source is not None and not corpus.reader and is_saved(source):
        files = saved_files(source, corpus.field)
        if corpus.own_splits and not any(file.split == "val" for file in files):
            raise DataError(f"--source {source}: no split for validation, and this corpus has its own")
        return None, files
    if source is not None and corpus.reader:
        source, listed = Path(source), local_files(corpus, source)
        identity = json_sha256([[file.name, file.identity] for file in listed])
        return corpus.revision, [File(source.name, sum(file.bytes for file in listed), identity, path=str(source))]
    if source is not None:
        return None, local_files(corpus, source)
    if corpus.archive:
        return corpus.revision, [File(f"{corpus.repo.split('/')[1]}.zip", 0, corpus.revision)]
    if corpus.repo:
        return hub_files(corpus, subset, revision)
    return corpus.revision, [king_james_file()]


def local_files(corpus: Corpus, source: Path | str) -> list[File]:
    """The files of a --source. For a corpus with its own splits, a file belongs to the split that its path names."""
    files = find_files(source, note)
    if not corpus.own_splits:
        return files
    files = [dataclasses.replace(file, split=_split_of(file.name)) for file in files]
    missing = [split for split in ("train", "val") if split not in {file.split for file in files}]
    if missing:
        raise DataError(
            f"--source {source}: no file for the split {missing[0]} among {', '.join(file.name for file in files)}; "
            f"this corpus has its own splits, and each path must name one: train, validation or test"
        )
    return sorted(files, key=lambda file: (SPLITS.index(file.split), file.name))


def check_reading(files: list[File], reading: dict[str, str]) -> None:
    """DataError where a --field or --separator would change nothing in the files."""
    texts = [file for file in files if file.table is None and (kind_of(file.name) or "")[:1] == (".txt",)]
    if "field" in reading and len(texts) == len(files):
        raise DataError("--field is for rows, of .jsonl, .json or .parquet files, and the source has only .txt files")
    if (separator := reading.get("separator")) is None:
        return
    if not texts:
        raise DataError("--separator is for .txt files, and the source has none")
    if not any(separator in text for file in texts for _, text in read_file(file, bad=Bad(skip=True))):
        raise DataError(f"--separator {separator!r} is in none of the source's {len(texts)} .txt files")


def identity_of(files: list[File]) -> str:
    """Hex sha256 that changes with the name, the size, the split or the identity of a file."""
    return json_sha256([[file.name, file.bytes, file.identity, file.split] for file in files])


def contents_of(files: list[File]) -> str | None:
    """Hex sha256 of all bytes of the files of a --source, at which their identities look in samples. None where they
    have more than VERIFY_LIMIT, and for what is no file: tables, and folders that a corpus reads in its own way."""
    if sum(file.bytes for file in files) > VERIFY_LIMIT or not all(Path(file.path).is_file() for file in files):
        return None
    return json_sha256([file_sha256(file.path) for file in files])


def _split_of(name: str) -> str:
    found = [split for split in SPLITS if re.search(rf"(^|[^a-z]){split}", name.lower())]
    if len(found) != 1:
        raise DataError(f"{name}: its path should name one split, train, validation or test")
    return found[0]
