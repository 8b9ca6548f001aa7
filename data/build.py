"""Makes a data folder, or continues one that was interrupted.

The source is cut into units of work (data/units.py). Threads or processes read a unit, send each document to a split,
tokenize it, and write the unit's own shards (data/encode.py). All of this happens in DIR.partial. There every
finished shard and every finished unit has a record, so that the same command continues after the last of them.
When every unit is done, the shards get their final names, the manifest joins the records, and DIR.partial becomes DIR
(data/publish.py).
"""

import collections
import concurrent.futures
import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from data.corpora import Corpus, planned
from data.encode import encode_units
from data.files import File
from data.hub import download
from data.library import Wanted
from data.plan import RECORD, Request, check_workers, make_plan, unfinished_plan
from data.progress import Progress
from data.publish import join_units, publish, resolved
from data.shards import Data, DataError, open_data, output, write_json
from data.tasks import Examples
from data.tokenizer import Tokenizer
from data.units import SIZES, Sizes, Unit, UnitId, cut_group, finished_units, group_files, record_of
from data.workers import do_in_processes, in_background

SHARD_TOKENS = 100_000_000
LONG_TOKENS = 16384  # a validation document of so many tokens is listed under val_long
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(
    corpus_name: str,
    out: Path | str | None = None,
    source: Path | str | None = None,
    tokenizer_name: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
    val_tokens: int | None = None,
    workers: int = 1,
    *,
    subset: str | None = None,
    long_tokens: int = LONG_TOKENS,
    skip_bad: bool = False,
    keep_downloads: bool = False,
    part: tuple[int, int] | None = None,
    merge: bool = False,
    verify: bool | None = None,
    field: str | None = None,
    separator: str | None = None,
    val_bytes: int | None = None,
    wanted: Wanted | None = None,
    examples: Examples | None = None,
    sizes: Sizes = SIZES,
) -> Data | None:
    """Make the data folder `out`, continue it, or verify it where it is already there with these options.

    field, separator: instead of the corpus's own, as --field and --separator; they are in the plan where they differ.
    val_tokens, val_bytes: at most one; bytes of text give every tokenizer the same validation documents.
    wanted: of the corpus `hub`, which data set. examples: of the corpus `task`, what it is to hold.
    part: (i, n) does only the i-th of n parts, and returns None. merge: only joins what the parts made.
    verify: as for open_data, of a folder that is complete.
    DataError for what the user can put right. Then `out` was not touched, and `out`.partial keeps what is finished.
    """
    check_workers(workers)
    if part and not 1 <= part[0] <= part[1]:
        raise DataError(f"--part must be i/n with i from 1 to n, not {part[0]}/{part[1]}")
    if wanted and keep_downloads:
        raise DataError("--keep_downloads does not apply: the library `datasets` keeps what it loads in its own cache")
    options = {"shard_tokens": shard_tokens, "val_tokens": val_tokens, "long_tokens": long_tokens, "skip_bad": skip_bad}
    options["val_bytes"] = val_bytes
    request = Request.checked(corpus_name, subset, source, tokenizer_name, options, field, separator, wanted, examples)
    corpus = request.corpus
    name = f"{Path(wanted.name).name if wanted else corpus_name}-{request.tokenizer.name}"
    out, folder = resolved(out or Path(__file__).parent / (f"task-{examples.name}" if examples else name))

    finished = open_data(out, verify) if (out / "COMPLETE").exists() else None
    plan = finished.manifest if finished else unfinished_plan(folder)
    if merge and plan is None:
        raise DataError(f"there is nothing to merge: {folder} holds no parts")
    files = None
    if plan:
        # Merging reads no source. For shards that are complete the hub is not asked again.
        read_source = not merge and (request.is_here or not (finished or (folder / "COMPLETE").exists()))
        files = request.check(plan, out if finished else folder, read_source)
    if finished:
        output(f"{out} is complete and as it should be; nothing to do")
        return finished

    with _working_in(folder, part, merge):
        complete = (folder / "COMPLETE").exists()
        if not merge and not complete:
            if plan is None:
                revision, files = request.files(corpus.revision)
                plan = make_plan(request, revision, files, sizes)
                _need_disk(folder, plan, files, request.tokenizer)
                write_json(folder / "plan.json", plan)
            downloads = folder / (f"downloads-{part[0]}" if part else "downloads")
            if keep_downloads:
                downloads = out.with_name(f"{out.name}.downloads")
            Part(plan, files, folder, part, downloads, keep_downloads).do(workers, sizes)
        if part and not merge:
            output(
                f"part {part[0]} of {part[1]} is done; when all are, join them: the same command with --merge instead "
                f"of --part"
            )
            return None
        if not complete:
            join_units(folder, plan, corpus)
        publish(folder, out)
    return open_data(out, verify=False)


# ---- the units of a part ----


class Part:
    """The units that this command has to do: all of a plan, or with --part I/N those of one machine of N.

    downloads: the folder for the files that are not on this machine. Without `keep` a file is deleted when its group
    of files is done.
    """

    def __init__(
        self, plan: dict, files: list[File], folder: Path, part: tuple[int, int] | None, downloads: Path, keep: bool
    ):
        self.corpus: Corpus = planned(plan)
        self.plan, self.files, self.folder, self.downloads, self.keep = plan, files, folder, downloads, keep
        self.number, self.parts = part or (1, 1)

    def do(self, workers: int, sizes: Sizes) -> None:
        """Do the units of this part that are not finished."""
        self._clean_up()
        text_bytes = self.plan["text_bytes"]  # None where nobody knows
        progress = Progress(self.folder, text_bytes and text_bytes // self.parts)
        for unit in filter(self._is_mine, finished_units(self.folder)):
            for records in json.loads(record_of(self.folder, unit).read_text())["shards"].values():
                for record in records:
                    progress(record["documents"], record["tokens"], record["bytes"], found=True)
        units = self._remaining(ahead=workers)
        if all(file.path for file in self.files):
            units = [unit for unit in units if unit]
            in_processes = (text_bytes is None or text_bytes >= sizes.processes) and len(units) > 1
            most = len(units)
        else:
            in_processes, most = self.corpus.join == "rows" and self.corpus.reader is None, workers
        with contextlib.closing(progress.bar):
            if workers > 1 and in_processes:
                do_in_processes(units, min(workers, most), self.folder, self.plan, sizes, progress, self._done)
                return
            encode_units(units, self.folder, self.plan, progress, self._done, workers, sizes)

    def _clean_up(self) -> None:
        """Delete what an interrupted run of this part left half written."""
        for path in self.folder.glob("*.tmp"):
            if (unit := UnitId.of_file(path.name)) and self._is_mine(unit):
                path.unlink(missing_ok=True)
        for path in self.downloads.rglob("*.incomplete"):  # which the hub's library would not take up again
            path.unlink(missing_ok=True)

    def _is_mine(self, unit: UnitId) -> bool:
        """Whether a unit is this part's. Groups are dealt out where there are enough: each is downloaded once then."""
        by_group = self.plan["groups"] >= self.parts
        return (unit.group if by_group else unit.group + unit.index) % self.parts == self.number - 1

    def _remaining(self, ahead: int) -> Iterator[Unit | None]:
        """Yield the units that are still to be done, as their files arrive, or None where the next is not there yet.

        Groups of files are downloaded one after the other, the next as soon as at most `ahead` units wait.
        """
        finished = set(finished_units(self.folder))
        counts = {unit.group: unit.of for unit in finished}  # units of a group, where known

        def is_open(unit: UnitId) -> bool:
            return self._is_mine(unit) and unit not in finished

        def may_be_open(group: int) -> bool:
            if group in counts:
                return any(is_open(UnitId(group, i, counts[group])) for i in range(counts[group]))
            return self.plan["groups"] < self.parts or self._is_mine(UnitId(group, 0, 0))

        groups = enumerate(group_files(self.files, self.corpus, self.plan["unit_bytes"]))
        todo = collections.deque((number, group) for number, group in groups if may_be_open(number))
        waiting, coming = collections.deque(), None
        while todo or coming or waiting:
            if todo and not coming and len(waiting) <= ahead:
                number, group = todo.popleft()
                coming = number, in_background(self._download, group)
                if all(file.path for file in group):
                    concurrent.futures.wait([coming[1]])
            if coming and coming[1].done():
                (number, future), coming = coming, None
                units = cut_group(number, future.result(), self.corpus, self.plan["unit_bytes"])
                waiting.extend(unit for unit in units if is_open(unit.id))
            else:
                yield waiting.popleft() if waiting else None

    def _download(self, group: list[File]) -> list[File]:
        return [download(self.corpus, self.plan["revision"], file, self.downloads) for file in group]

    def _done(self, unit: Unit) -> None:
        """Delete what was downloaded for the unit's group, if the unit was the last of it."""
        finished = finished_units(self.folder, unit.id.group)
        group = [unit.id._replace(index=i) for i in range(unit.id.of)]
        if not self.keep and all(other in finished or not self._is_mine(other) for other in group):
            for file in unit.files:
                if Path(file.path).is_relative_to(self.downloads):
                    Path(file.path).unlink(missing_ok=True)


# ---- the folder ----


@contextlib.contextmanager
def _working_in(folder: Path, part: tuple[int, int] | None, merge: bool) -> Iterator[None]:
    """Makes and locks DIR.partial. An error of the disk becomes a DataError. A folder that stays empty is removed."""
    opened = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = _lock(folder, part)
        yield
    except OSError as error:
        advice = "; make room and run the same command again, which continues" if error.errno in FULL else ""
        raise DataError(f"{error.filename or folder}: {error.strerror or error}{advice}") from error
    finally:
        if opened:  # else another is at work there
            if folder.is_dir() and not part and not merge:
                _discard_if_empty(folder)
            opened.close()


def _lock(folder: Path, part: tuple[int, int] | None) -> TextIO:
    """Keep others from doing the same part at once, as long as the returned file is open."""
    file = open(folder / ("lock" if part is None else f"lock-{part[0]}-of-{part[1]}"), "w")
    with contextlib.suppress(ImportError):  # elsewhere than on Unix there is no check
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another data/prepare.py is at work in {folder}; wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass
    return file


def _discard_if_empty(folder: Path) -> None:
    """Remove DIR.partial where nothing in it is worth continuing from."""
    if (folder / "COMPLETE").exists():
        return
    shards = any(path.with_suffix(".json").exists() for path in folder.glob("*.bin"))
    downloads = any(path.is_file() for path in folder.glob("downloads*/**/*"))
    if shards or downloads or finished_units(folder):
        return
    for path in folder.iterdir():
        if RECORD.fullmatch(path.name) or path.suffix in (".bin", ".mask"):
            path.unlink()
    with contextlib.suppress(OSError):  # what is not ours stays
        for path in folder.glob("downloads*"):
            path.rmdir()
        folder.rmdir()


def _need_disk(folder: Path, plan: dict, files: list[File], tokenizer: Tokenizer) -> None:
    """DataError where the disk has no room for the shards and for what is downloaded at a time, if that is known."""
    if plan["text_bytes"] is None:
        return
    largest = max((file.bytes for file in files if not file.path), default=0)
    need = plan["text_bytes"] / tokenizer.bytes_per_token * tokenizer.dtype.itemsize + 2 * largest
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"{folder} needs about {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; "
            f"give an --out on another disk"
        )
