"""Units of work: how the files of a source are cut into parts that are read and tokenized one by one.

What a unit gives depends on its files alone. So the bytes of the shards do not depend on who does which unit, or when.
Small files that are neighbours make one group. A group of one large file is cut into several units.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.corpora import Corpus
from data.documents import JOINS
from data.files import File, kind_of
from data.library import row_ranges, rows
from data.readers import Bad, Documents, read_file, row_group_bytes
from data.tokenizer import PIECE


@dataclass(frozen=True)
class Sizes:
    """How large the parts of the work are. Tests make them small, so that little text takes the ways of much."""

    unit: int = 2**27  # bytes of text: a unit is a 64th of the corpus, but not more than this
    least_unit: int = 2**22  # nor less than this
    survey: int = 2**26  # bytes of text; a smaller source is read once before, so that no side of the split is empty
    processes: int = 2**25  # bytes of text; less is done in threads, which share a core's time badly but start at once
    batch: int = 2**20  # characters tokenized between two reports of progress
    piece: int = PIECE  # characters; a longer document is tokenized in pieces


SIZES = Sizes()


class UnitId(NamedTuple):
    """A unit's group of files, its index in the group, and how many units the group has. Sorts as the documents do."""

    group: int
    index: int
    of: int

    def __str__(self) -> str:
        return f"{self.group:05d}-{self.index:05d}-of-{self.of:05d}"

    @classmethod
    def of_file(cls, name: str) -> "UnitId | None":
        """The unit that a file in DIR.partial belongs to. None where it belongs to none."""
        found = re.match(r"(\d{5})-(\d{5})-of-(\d{5})\.", name)
        return cls(*map(int, found.groups())) if found else None


@dataclass(frozen=True)
class Unit:
    """A unit of work: all of its files, or a range of one: rows of a table, row groups (.parquet), bytes (.jsonl)."""

    id: UnitId
    split: str | None  # of a corpus that has its own splits
    files: tuple[File, ...]
    start: int | None = None
    stop: int | None = None


def group_files(files: list[File], corpus: Corpus, unit_bytes: int) -> list[list[File]]:
    """Cut the list of files into groups.

    Neighbours of one split stay together while they are small together, or if the corpus joins rows across files.
    A file of a stream of unknown size is not small.
    """
    groups = []
    for file in files:
        together = groups and groups[-1][0].split == file.split
        if together and corpus.join == "rows":
            known = file.bytes or not file.stream
            together = known and sum(f.bytes for f in groups[-1]) + file.bytes <= unit_bytes // 3
        if together:
            groups[-1].append(file)
        else:
            groups.append([file])
    return groups


def cut_group(number: int, group: list[File], corpus: Corpus, unit_bytes: int) -> list[Unit]:
    """The units, of about `unit_bytes` each, of a group of files that are on this machine."""
    ranges = [(None, None)]
    if len(group) == 1 and corpus.join == "rows" and not corpus.reader:
        ranges = _ranges(group[0], corpus.field, unit_bytes) or ranges
    return [
        Unit(UnitId(number, i, len(ranges)), group[0].split, tuple(group), start, stop)
        for i, (start, stop) in enumerate(ranges)
    ]


def _ranges(file: File, field: str, unit_bytes: int) -> list[tuple[int, int]]:
    """Ranges of rows, row groups or bytes of about `unit_bytes`. [] where the file is read whole."""
    if file.table is not None:
        return row_ranges(file, unit_bytes)
    kind = kind_of(file.name)
    if kind == (".parquet", ""):
        ranges, start, size = [], 0, 0
        sizes = row_group_bytes(file.path, field)
        for row_group, n_bytes in enumerate(sizes):
            size += n_bytes
            if size >= unit_bytes or row_group == len(sizes) - 1:
                ranges.append((start, row_group + 1))
                start, size = row_group + 1, 0
        return ranges
    if kind == (".jsonl", "") and file.bytes > unit_bytes:
        return list(itertools.pairwise([*range(0, file.bytes - unit_bytes // 2, unit_bytes), file.bytes]))
    return []


def read_unit(unit: Unit, corpus: Corpus, bad: Bad) -> Documents:
    """Yield (name, text) of every document of a unit, in order. A text may be empty."""
    if corpus.reader:
        rows = (row for file in unit.files for row in corpus.reader(file))
    else:
        rows = (row for file in unit.files for row in _rows(file, unit, corpus, bad))
    yield from JOINS[corpus.join](rows)


def _rows(file: File, unit: Unit, corpus: Corpus, bad: Bad) -> Documents:
    if file.table is not None:
        return rows(file, corpus.field, bad, unit.start, unit.stop)
    return read_file(file, corpus.field, bad, unit.start, unit.stop, corpus.separator)


def record_of(folder: Path, unit: UnitId) -> Path:
    """Where the record of a finished unit is: which shards it has, and what was left out."""
    return folder / f"{unit}.unit.json"


def finished_units(folder: Path, group: int | None = None) -> list[UnitId]:
    """The units, of one group or of all, that have a record in `folder`, in order."""
    pattern = "*.unit.json" if group is None else f"{group:05d}-*.unit.json"
    return sorted(UnitId.of_file(path.name) for path in folder.glob(pattern))
