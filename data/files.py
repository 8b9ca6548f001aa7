"""Which files a --source has: their kinds by their names, folders and links, and what is passed over."""

import collections
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data.shards import DataError, fingerprint

SUFFIXES = {  # of files that are read → their kind
    ".txt": ".txt",
    ".jsonl": ".jsonl",
    ".parquet": ".parquet",
    ".json": ".json",
    ".text": ".txt",
    ".ndjson": ".jsonl",
}
COMPRESSED = {".gz": 2.7, ".bz2": 3.3, ".xz": 3.5, ".zst": 2.9}  # bytes of text per byte on disk, typically
# Files that the `datasets` library and the hub put beside the data
METADATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")


@dataclass(frozen=True)
class File:
    """A file of a source."""

    name: str  # relative to the source, whose files are sorted by it
    bytes: int
    identity: str  # hex digest that changes with the content: on the hub with all of it, else with samples of it
    split: str | None = None  # of a corpus that has its own splits
    path: str | None = None  # where the file is; None until it is downloaded
    table: object = field(default=None, compare=False, repr=False)  # of the library `datasets`: see data/library.py
    stream: tuple[int, int] | None = None  # of a table that is streamed, how many files it has, and which this is
    fingerprint: tuple[str, str] | None = None  # of a table: its split, and the library's own fingerprint of it


def kind_of(name: str) -> tuple[str, str] | None:
    """Kind of the content (.txt, .jsonl, .json, .parquet) and suffix of the compression (or "") of a file's name.

    None where we cannot read it.
    """
    stem, packed = os.path.splitext(name.lower())
    if packed in COMPRESSED:
        kind = SUFFIXES.get(os.path.splitext(stem)[1])
        return (kind, packed) if kind and kind != ".parquet" else None
    return (SUFFIXES[packed], "") if packed in SUFFIXES else None


def find_files(source: Path | str, tell: Callable[[str], None] = lambda message: None) -> list[File]:
    """The files of a --source: one file, or those of a folder and of what it links to, in the order of their paths.

    tell(message) is called on what was passed over, and on files that are there twice.
    """
    source = Path(source)
    try:
        if not source.exists():
            broken = " (it is a broken link)" if source.is_symlink() else ""
            raise DataError(f"--source {source} does not exist{broken}")
        if not source.is_file() and not source.is_dir():
            raise DataError(f"--source {source} is a pipe or a device; save the text in a file, and give that")
        found, passed = _walk(source) if source.is_dir() else ({source.name: source}, "")
        if source.is_file() and not kind_of(source.name):
            found, passed = {}, f"1 {_label(source.name)}"
        if not found:
            known = list(SUFFIXES)
            tables = re.search(r"\.(csv|tsv|arrow)\b", passed)
            hint = "; the corpus hub reads a folder of tables: --dataset" if tables else ""
            raise DataError(
                f"--source {source}: no {', '.join(known[:3])} file (nor {', '.join(known[3:])}; all but .parquet "
                f"also with {', '.join(COMPRESSED)}); there is {passed or 'no file at all'}{hint}"
            )
        if passed:
            tell(f"passed over: {passed} (in {source})")
        files, first, again = [], {}, []
        for name, path in sorted(found.items()):
            stat = path.stat()
            files.append(File(name, stat.st_size, fingerprint(path), path=str(path)))
            if (other := first.setdefault((stat.st_dev, stat.st_ino), name)) != name:
                again.append(f"{name} ({other})")
        if again:
            tell(f"files that are links to another are read again: {some(again)}")
    except OSError as error:
        raise DataError(f"--source {source}: {error.filename} cannot be read: {error.strerror}") from None
    return files


def _walk(source: Path) -> tuple[dict[str, Path], str]:
    """The files below a folder by their relative paths, and what was passed over, counted by kind, or "".

    Folders are read before links to folders, and each is read once. So a link to a folder above makes no loop.
    """
    found, kinds, broken, again, seen = {}, collections.Counter(), [], [], set()
    folders, links = [("", str(source))], []
    while folders or links:
        if not folders:
            links.sort()
            folders.append(links.pop(0))
        prefix, folder = folders.pop()
        if (real := os.path.realpath(folder)) in seen:
            again.append(prefix)
            continue
        seen.add(real)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        if _is_ours(folder, [entry.name for entry in entries]):
            kinds["data folders of prepare.py"] += 1
            continue
        for entry in entries:
            name, is_link = prefix + entry.name, entry.is_symlink()
            if entry.name.startswith("."):
                kinds["hidden"] += 1
            elif os.path.isdir(entry.path) if is_link else entry.is_dir():
                (links if is_link else folders).append((f"{name}/", entry.path))
            elif is_link and not os.path.exists(entry.path):
                broken.append(f"{name} -> {os.readlink(entry.path)}")
            elif not entry.is_file():
                kinds["pipes or devices"] += 1
            elif kind_of(name) and entry.name not in METADATA:
                found[name] = Path(entry.path)
            else:
                kinds[_label(entry.name)] += 1
    passed = [f"{count:,} {kind}" for kind, count in kinds.most_common(10)]
    if len(kinds) > 10:
        passed.append(f"{kinds.total() - sum(count for _, count in kinds.most_common(10)):,} of other kinds")
    lists = {"": passed, "broken links: ": broken, "folders that are read already: ": again}
    return found, "; ".join(what + some(names, 11) for what, names in lists.items() if names)


def _is_ours(folder: str, names: list[str]) -> bool:
    """Whether data/prepare.py made a folder: what it makes inside its source is no source."""
    begun = folder.endswith(".partial") and any(name == "plan.json" or name.startswith("lock") for name in names)
    return begun or {"COMPLETE", "manifest.json"} <= set(names)


def _label(name: str) -> str:
    """What a file that we cannot read is counted as."""
    if name in METADATA:
        return name
    stem, suffix = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1] if suffix in COMPRESSED else "") + suffix or "without a suffix"


def some(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
