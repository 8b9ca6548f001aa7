"""Data sets of the library `datasets`: what it can load by name, and folders that its save_to_disk wrote.

Rows are read from the library's Arrow tables on disk, a few at a time, or with --streaming from the network. A table
is cut into units by its rows, a stream by the files that the data set has on the hub.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.diagnose import HEAD, pointer
from data.files import File
from data.progress import note
from data.readers import Bad, Documents, text_column, texts_of
from data.shards import DataError, fingerprint, json_sha256

# What data sets call their splits, and we
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "val")
BATCH_BYTES = 2**22  # of text that is read at a time
HINTS = {  # part of the library's message → what to do
    "scripts are no longer supported": "the code of a data set is not run here, and no option trusts it; many have a "
    "copy in parquet: try --revision refs/convert/parquet",
    "Config name is missing": "--config picks one",
    "corresponds to no data": "--split NAME reads a split that has rows",
    "Bad split": "--streaming reads a split as a whole, by its name",
}


@dataclass(frozen=True)
class Wanted:
    """What the corpus `hub` is asked for: --dataset, --config, --split, --revision and --streaming."""

    dataset: str  # on the hub, or a folder
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    streaming: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder on this machine."""
        return os.path.isdir(self.dataset)

    @property
    def name(self) -> str:
        """The name on the hub, or that of the folder."""
        return Path(self.dataset).resolve().name if self.is_folder else self.dataset


def is_saved(source: Path | str) -> bool:
    """Whether a folder was written by save_to_disk, of one split or of several."""
    one = all((Path(source) / name).is_file() for name in ("state.json", "dataset_info.json"))
    return one or (Path(source) / "dataset_dict.json").is_file()


def saved_files(source: Path | str, field: str) -> list[File]:
    """The splits of a folder that save_to_disk wrote. DataError where it cannot be read."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(source))
    except Exception as error:  # the library's own, pyarrow's, OSError, KeyError …
        raise DataError(f"--source {source} cannot be read as a folder of save_to_disk: {_line(error)}") from None
    splits = loaded if isinstance(loaded, dict) else {None: loaded}
    return _files(Path(source).resolve().name, splits, field, f"--source {source}/")


def loaded_files(wanted: Wanted, revision: str | None, field: str) -> tuple[str | None, list[File]]:
    """Loads a data set, or what of it is not in the library's cache. Returns its commit and the files of its splits.

    revision: a commit to read again, instead of what is wanted. The commit that is returned is None for a folder on
    this machine. DataError for what cannot be loaded.
    """
    builder = _builder(wanted, revision or wanted.revision)
    try:
        if wanted.streaming:
            loaded = builder.as_streaming_dataset(wanted.split)
        else:
            builder.download_and_prepare()
            loaded = builder.as_dataset(wanted.split)
    except Exception as error:
        raise _refused(wanted, error) from None
    splits = loaded if isinstance(loaded, dict) else {None: loaded}
    if wanted.is_folder:
        return None, _files(wanted.name, splits, field, "--split ", builder, _contents(builder))
    return builder.hash, _files(wanted.name, splits, field, "--split ", builder)


def expected_bytes(wanted: Wanted) -> int:
    """Bytes of a data set as its page or its files tell, without downloading it. DataError where they do not."""
    builder = _builder(wanted, wanted.revision)
    files = _data_files(builder)
    if builder.info.dataset_size:
        return builder.info.dataset_size
    if files and all(Path(path).is_file() for path in files):
        return sum(Path(path).stat().st_size for path in files)
    raise DataError(f"{wanted.dataset} does not say how large it is; it shows when it is loaded")


def rows(file: File, field: str, bad: Bad, start: int | None, stop: int | None) -> Documents:
    """Yield (name, text) of rows start … stop-1 of a File with a table or a stream."""
    import pyarrow.compute

    row = start or 0
    for batch in _batches(file, field, start, stop):
        names = _names(batch.schema, field, file.path)
        for values in batch.column(batch.schema.names.index(names[0])).chunks:
            if names[1:]:
                values = pyarrow.compute.struct_field(values, names[1:])
            for text in texts_of(values, bad, file.path, row):
                row += 1
                yield f"{file.name}:{row}", text


def row_ranges(file: File, unit_bytes: int) -> list[tuple[int, int]]:
    """Ranges of rows of about `unit_bytes` each. [] for a stream, which is read whole."""
    if file.stream:
        return []
    count = file.table.num_rows
    step = max(1, count * unit_bytes // max(file.bytes, 1))
    return [(start, min(start + step, count)) for start in range(0, count, step)]


# ---- loading ----


def _builder(wanted: Wanted, revision: str | None) -> Any:
    import datasets

    name = wanted.dataset
    if wanted.is_folder and is_saved(name):
        raise DataError(f"--dataset {name} was written by save_to_disk; read it as a source: files --source {name}")
    if wanted.is_folder and revision:
        raise DataError(f"--revision does not apply: --dataset {name} is a folder on this machine")
    # A whole path is never taken for one of the library's formats, such as `text`
    path = str(Path(name).resolve()) if wanted.is_folder else name
    try:
        with tempfile.TemporaryDirectory() as empty:  # what a stream is must not depend on what the cache has of it
            cache = empty if wanted.streaming else None
            builder = datasets.load_dataset_builder(path, wanted.config, revision=revision, cache_dir=cache)
    except Exception as error:
        raise _refused(wanted, error) from None
    here = [path for path in _data_files(builder) if os.path.isfile(path)]
    if here and not wanted.is_folder:
        raise DataError(f"--dataset {name} is a format of the library, not a data set; give the folder of the files")
    for path in here:
        with open(path, "rb") as f:
            if problem := pointer(f.read(HEAD)):
                raise DataError(f"--dataset {name}: {path} {problem}")
    if not wanted.is_folder and re.fullmatch("[0-9a-f]{40}", revision or "") and builder.hash != revision:
        raise DataError(  # without the network the library takes the newest that it has
            f"--dataset {name} at {revision} is neither on the hub nor in the library's cache, which has {builder.hash}"
        )
    return builder


def _data_files(builder: Any) -> list[str]:
    return [path for paths in (builder.config.data_files or {}).values() for path in paths]


def _contents(builder: Any) -> str:
    """A digest of the files of a folder. The library's own fingerprint changes with their times and their place."""
    return json_sha256([[Path(path).name, fingerprint(path)] for path in _data_files(builder)])


def _refused(wanted: Wanted, error: Exception) -> DataError:
    import datasets

    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    line = _line(error)
    hints = [hint for part, hint in HINTS.items() if part in line]
    if os.path.isfile(wanted.dataset):
        hints.append(f"a file is read as a source: files --source {wanted.dataset}")
    line = "; ".join([line.rstrip(".!"), *hints])
    return DataError(f"--dataset {wanted.dataset} cannot be loaded ({type(error).__name__}): {line}")


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:500]


def _files(
    name: str, splits: dict[str | None, Any], field: str, option: str, builder: Any = None, contents: str | None = None
) -> list[File]:
    """A File for each table, or for each file of a stream, of the splits that are read.

    option: what, followed by the name of a split, reads that one alone.
    contents: of a folder, instead of the library's fingerprints.
    """
    files = []
    for split, key in _chosen(name, splits, option):
        table, title = splits[key], f"{name}:{key}" if key else name
        if table.features:  # a stream may not know them yet
            column = table.select_columns(_names(table.features.arrow_schema, field, title)[:1])
        if hasattr(table, "num_rows"):
            digest = [fingerprint(cached["filename"]) for cached in table.cache_files]
            identity = json_sha256([digest, table.num_rows])
            mark = title, contents or table._fingerprint
            files.append(File(title, column.data.nbytes, identity, split, title, table, fingerprint=mark))
            continue
        sizes, version = builder.info.splits or {}, contents or builder.hash
        size = sizes[key].num_bytes // table.num_shards if key in sizes else 0
        for i in range(table.num_shards):
            place = table.num_shards, i
            identity, where = json_sha256([version, str(key), *place]), f"{title}, file {i}"
            files.append(File(f"{title}:{i}", size, identity, split, where, table, place, (title, version)))
    return files


def _chosen(name: str, splits: dict[str | None, Any], option: str) -> list[tuple[str | None, str | None]]:
    """(our split or None, its key) of the splits that are read. None: the hash of a text decides.

    A data set that has training and validation is read with its own splits. Of another only train is read.
    """
    if len(splits) == 1:
        return [(None, key) for key in splits]
    ours = {SPLIT_NAMES[key]: key for key in reversed(splits) if key in SPLIT_NAMES}
    if "train" not in ours:
        raise DataError(f"{name} has the splits {', '.join(splits)}; name one: {option}{next(iter(splits))}")
    own = [(split, ours[split]) for split in ("train", "val", "test") if split in ours and "val" in ours]
    chosen = own or [(None, ours["train"])]
    if left := [key for key in splits if key not in [k for _, k in chosen]]:
        note(f"{name}: the splits {', '.join(left)} are left out; one is read by {option}{left[0]}")
    return chosen


def _batches(file: File, field: str, start: int | None, stop: int | None) -> Iterator[Any]:
    """pyarrow tables of a few rows each, with the one column."""
    try:
        if file.stream:
            number, index = file.stream
            yield from _one_column(file.table.shard(number, index, contiguous=True), field).iter(batch_size=64)
            return
        table = _one_column(file.table, field)
        step = min(max(BATCH_BYTES * len(table) // max(file.bytes, 1), 1), 1024)
        for at in range(start or 0, len(table) if stop is None else stop, step):
            yield table[at : min(at + step, len(table) if stop is None else stop)]
    except Exception as error:  # pyarrow's, OSError, those of the network
        line = f"{file.path} cannot be read: {_line(error).rstrip('.')}"
        raise DataError(f"{line}; when that is mended, the same command continues") from None


def _names(schema: Any, field: str, where: str) -> list[str]:
    """The names that lead to the text in a table of that schema. DataError where it has none."""
    names, problem = text_column(schema, field)
    if problem:
        raise DataError(f"{where}: {problem}")
    return names


def _one_column(table: Any, field: str) -> Any:
    """The table or stream as pyarrow tables, with the column of the text alone where the columns are known."""
    if table.column_names:
        table = table.select_columns([field if field in table.column_names else field.split(".")[0]])
    return table.with_format("arrow")
