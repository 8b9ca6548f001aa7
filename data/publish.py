"""Turns finished units into a finished data folder: final names, manifest, figure of lengths, verification."""

import collections
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

from data.corpora import SPLITS, Corpus
from data.encode import END_OF_TEXT
from data.plan import RECORD
from data.progress import note
from data.shard_writer import OCTAVE
from data.shards import DataError, Split, mask_path, open_data, write_atomically, write_manifest
from data.summary import lengths_figure
from data.units import finished_units, record_of


def join_units(folder: Path, plan: dict, corpus: Corpus) -> None:
    """Give every shard its final name, and write the figure, the manifest and COMPLETE.

    Reads only the units' records and the val shards. DataError where units are missing or a split is empty.
    """
    units = _all_units(folder, plan["groups"])
    splits, lengths = _rename_shards(folder, [(split, record) for unit in units for split, record in _shards_of(unit)])
    counts = {key: sum(unit[key] for unit in units) for key in ("documents", "empty")}
    for message in [message for unit in units for message in unit["messages"]][:10]:
        note(f"skipped: {message}")
    if marked := sum(unit.get("marked", 0) for unit in units):  # older units have no such count
        note(
            f"{marked:,} documents contain {END_OF_TEXT}, which is text here and not the end of a document; "
            f"--separator '{END_OF_TEXT}' divides .txt files there"
        )
    kind = plan["val_rule"]["kind"]
    advice = {
        "names": f"validation is {', '.join(corpus.val)}",
        "own": "the source's own split has no more (of a data set of the hub, --split NAME reads another)",
    }
    for split in ("train", "val"):
        if not splits[split]:
            raise DataError(
                f"there is no {split} document: the source has {counts['documents']:,} documents and "
                f"{counts['empty']:,} empty ones; {advice.get(kind, 'give another --val_tokens or --val_bytes')}"
            )
    counts["bytes"] = sum(record["bytes"] for records in splits.values() for record in records)
    digests = [unit["sha256"] for unit in units]
    sha256 = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    revision = _revision(plan, corpus, counts["documents"], sha256)
    bad = collections.Counter()
    for unit in units:
        bad.update(unit["bad"])
    long, val_long = _long_documents(folder, plan, splits["val"])
    write_atomically(folder / "lengths.png", lengths_figure(lengths))
    write_manifest(
        folder,
        plan
        | {
            "revision": revision,
            "source": plan["source"] | counts | {"sha256": sha256, "bad": dict(bad)},
            "splits": {split: records for split, records in splits.items() if records},
            "lengths": lengths,
            "bins_per_doubling": OCTAVE,
            "val_long_tokens": long,
            "val_long": val_long,
        },
    )


def resolved(out: Path | str) -> tuple[Path, Path]:
    """The absolute paths of --out and of its DIR.partial. Links are followed: nothing can be renamed to a link, or
    across disks.

    DataError where it cannot end well: in a circle of links, in the folder that the user is in, or where something is
    that a folder cannot replace. An empty folder can be replaced, unless it is a mount point.
    """
    try:
        path = Path(out).resolve()
        if not path.name:
            raise DataError(f"--out {out} is the root of the disk; give a folder in it")
        partial = path.with_name(f"{path.name}.partial")
        partial.exists()  # OSError where the longer name is too long
        if (path / "COMPLETE").exists() or not path.exists():
            return path, partial
        if path == Path.cwd():
            raise DataError(f"--out {out} is the folder you are in; give one of its own, such as {path / 'data'}")
    except (OSError, RuntimeError) as error:
        raise DataError(f"--out {out} cannot be used ({error}); give another --out") from None
    try:
        path.rmdir()  # the last step replaces it; better to know now whether that can be
        path.mkdir(exist_ok=True)
    except FileNotFoundError:
        pass  # another part, on another machine, is trying the same
    except OSError as error:
        raise _in_the_way(path, error) from None
    return path, partial


def _in_the_way(out: Path, error: OSError) -> DataError:
    if error.errno == errno.EBUSY:
        return DataError(f"{out} is a mount point, which a folder cannot replace; give a folder in it as --out")
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        return DataError(f"{out} is in the way: it is not a finished data folder and not empty; give another --out")
    return DataError(f"{out} cannot be replaced ({error.strerror}); give another --out")


def publish(folder: Path, out: Path) -> None:
    """Verify the complete folder, delete the records of its units, and rename it to `out`.

    DataError where `out` is in the way now. `folder` is then complete, and the same command only renames it.
    """
    open_data(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "plan.json"):  # that one last
        if path.name.startswith("downloads") and path.is_dir():
            shutil.rmtree(path)
        elif RECORD.fullmatch(path.name):
            path.unlink()
    try:
        os.replace(folder, out)
    except OSError as error:
        raise DataError(
            f"{_in_the_way(out, error)}. Nothing is lost: {folder} is complete, and the same command renames it when "
            f"{out} is free"
        ) from None


def _all_units(folder: Path, groups: int) -> list[dict]:
    """The records of all units, in order. DataError where some are missing."""
    found = collections.defaultdict(list)
    for unit in finished_units(folder):
        found[unit.group].append(unit)
    missing = [f"{group:05d}" for group in range(groups) if not found[group] or len(found[group]) < found[group][0].of]
    if missing:
        raise DataError(
            f"{folder} is not finished: of {groups} groups of source files {len(missing)} are not, "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; "
            f"run the other parts, or the command without --part"
        )
    return [json.loads(record_of(folder, unit).read_text()) for group in sorted(found) for unit in found[group]]


def _shards_of(unit: dict) -> list[tuple[str, dict]]:
    """Split and record of every shard of a unit."""
    return [(split, record) for split, records in unit["shards"].items() for record in records]


def _rename_shards(folder: Path, shards: list[tuple[str, dict]]) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """Give shards, in order, their final names. Returns the manifest's records of each split, and its histograms.

    A shard that is not there has its final name already, from an interrupted run.
    """
    splits, lengths = {split: [] for split in SPLITS}, {}
    for split, record in shards:
        name = f"{split}_{len(splits[split]):05d}.bin"
        there, final = folder / record["file"], folder / name
        for old, new in ((there, final), (mask_path(there), mask_path(final))):
            if old.exists():
                os.replace(old, new)
        kept = {key: record[key] for key in ("tokens", "documents", "bytes", "sha256", "fingerprint")}
        kept |= {key: record[key] for key in ("mask",) if key in record}
        splits[split].append({"file": name} | kept)
        histogram = lengths.setdefault(split, collections.Counter())
        histogram.update({int(b): count for b, count in record["lengths"].items()})
    return splits, {split: dict(sorted(histogram.items())) for split, histogram in lengths.items()}


def _revision(plan: dict, corpus: Corpus, documents: int, sha256: str) -> str | None:
    """The plan's revision. None where the documents are not those that the corpus has at it."""
    if corpus.sha256 in (None, sha256):
        return plan["revision"]
    note(
        f"the source's {documents} documents are not exactly those of {corpus.repo}@{corpus.revision}; "
        f"no revision is recorded"
    )
    return None


def _long_documents(folder: Path, plan: dict, val: list[dict]) -> tuple[int, list[dict]]:
    """The validation documents of at least --long_tokens, which is halved until there is one; a task has none. Returns
    it, and them."""
    documents = Split(folder, val, plan["dtype"], plan["vocab_size"], plan["tokenizer"]["eot"]).documents()
    long = plan["long_tokens"]
    while long > documents[:, 1].max() and "task" not in plan:
        long //= 2
    if long < plan["long_tokens"]:
        note(f"no validation document has {plan['long_tokens']:,} tokens; val_long lists those of at least {long:,}")
    return long, [{"start": int(start), "tokens": int(tokens)} for start, tokens in documents if tokens >= long]
