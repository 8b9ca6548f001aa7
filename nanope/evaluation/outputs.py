"""The files that an evaluation writes: their names, and what is checked of them before the work."""

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from data.shards import Data, output
from nanope.distributed import Ranks
from nanope.evaluation.parts import FOLDER, write_json
from nanope.evaluation.report import table
from nanope.files import check_writable, write_atomically

# What a report's name tells where it is not the default
NAMED = ("stride", "data", "split", "stream", "max_targets", "probe", "epsilon", "key_tokens", "attention")
NAMED += ("examples", "offsets", "windows", "seed", "dtype")
# Keys of an earlier report, and of a comparison: other programs have "results" too
REPORT, COMPARISON = {"results", "targets_sha256"}, {"comparison", "runs"}
TABLES = (
    b"| protocol |",
    b"| probe length |",
    b"| positions shifted by |",
    b"| length in ",
)  # how tables of either begin
LONGEST = 240  # bytes of a name: file systems take 255, of which a temporary file needs some


def report_name(
    args: argparse.Namespace,
    default: Callable[[str], object],
    lengths: list[int],
    step: int,
    data: Data,
    text: str | None = None,
) -> str:
    """The file name of a report of a checkpoint's step, at lengths in tokens. `default` gives an option's default by
    its name; `text` is the hash of a text that was chosen for several tokenizers. A name that would be too long ends
    with its hash."""
    parts = [f"step_{step}", "+".join(args.protocol)]
    if lengths:
        parts.append(joined(lengths))
    if args.scaling != ["none"]:
        parts.append(f"{'+'.join(args.scaling)}-{exactly(args.factor)}")
    for name in NAMED:
        value = getattr(args, name)
        if value != default(name):
            parts.append(name if value is True else f"{name}-{shown(name, value, data)}")
    if text:
        parts.append(f"text-{text[:8]}")
    name = "_".join(parts)
    if len(os.fsencode(name)) + len(".json") > LONGEST:
        name = f"{os.fsencode(name)[:160].decode(errors='ignore')}_{short_hash(name)}"
    return f"{name}.json"


def shown(name: str, value, data: Data) -> str:
    """The value of an option, as it stands in a name."""
    if name == "data":
        return folder_name(data)
    if name == "key_tokens":
        return f"{Path(value).name}-{short_hash(value)}"
    return joined(value) if name == "offsets" else exactly(value) if name == "epsilon" else str(value)


def joined(numbers: list[int]) -> str:
    return "-".join(map(str, numbers))


def exactly(number: float) -> str:
    """The shortest text of a number that is this number."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def short_hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


def folder_name(data: Data) -> str:
    """A data folder's name with a hash of where it lies and of what it holds: two of one name are two."""
    where = data.folder.resolve()
    return f"{where.name}-{short_hash(f'{where} {data.hash}')}"


def table_path(report: Path) -> Path:
    """Where the table of a report is written: rep.md beside rep.json."""
    return report.parent / f"{report.stem if report.suffix in ('', '.json') else report.name}.md"


def check_outputs(reports: list[Path | None], comparison: Path | None, ranks: Ranks) -> None:
    """ValueError, on every rank, unless every file can be written: no two are one, nothing that is no earlier report or
    comparison is overwritten, and there is permission. Reports that are None go nowhere. Makes folders."""
    problem = None
    if ranks.main:
        try:
            targets = {}  # file → keys of what may be overwritten there
            for path, keys in [*((path, REPORT) for path in reports), (comparison, COMPARISON)]:
                if path and path.suffix.lower() == ".md":
                    better = path.with_suffix(".json").name
                    raise ValueError(f"{path} is a table's name: with --json {better} it is written beside the report")
                for file in (path, table_path(path)) if path else ():
                    if file.resolve() in targets:
                        raise ValueError(f"two files would be written to {file}: name another with --json")
                    targets[file.resolve()] = keys
            for file, keys in targets.items():
                check_target(file, keys)
            for folder in {path.parent / FOLDER for path in reports if path}:
                check_writable(folder / "row.json")
        except (OSError, ValueError) as error:
            problem = str(error)
    if problem := ranks.first(problem):
        raise ValueError(problem)


def check_target(path: Path, keys: set[str]) -> None:
    """ValueError where a file is there that is no table of eval.py, and no JSON object with these keys, and where
    nothing can be written."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give --json a file's name, such as {path / 'report.json'}")
    if path.exists() and not is_ours(path, keys):
        raise ValueError(f"{path} is there and was not written by such a command: name another file with --json")
    try:
        check_writable(path)
    except OSError as error:
        in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
        why = "a file stands where its folder should be" if in_the_way else error.strerror
        raise ValueError(
            f"{path} cannot be written ({why}): --json names another file; a run that is given by its "
            "checkpoint file, RUN/last.pt, leaves no report"
        ) from error


def is_ours(path: Path, keys: set[str]) -> bool:
    """Whether an earlier evaluation wrote this file, or it is an empty file."""
    if not path.is_file():  # a device, a pipe
        return False
    content = path.read_bytes()
    if path.suffix == ".md" or not content:
        return not content or content.startswith(TABLES)
    try:
        found = json.loads(content)
    except ValueError:
        return False
    return isinstance(found, dict) and keys <= found.keys()


def show_and_write(text: str, outputs: list[tuple[Path | None, dict]], ranks: Ranks) -> None:
    """On the first rank print `text`, whether or not the files can be written then, and write them (None: nowhere), as
    JSON with a table beside each. Links are followed: what check_outputs looked at is what is written."""
    if not ranks.main:
        return
    try:
        output(text)
    finally:
        for path, content in outputs:
            if path:
                shown = f"{table(content) if 'results' in content else text}\n".encode()
                write_json(path.resolve(), content)
                write_atomically(table_path(path).resolve(), lambda file, shown=shown: file.write(shown))
