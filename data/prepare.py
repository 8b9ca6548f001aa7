"""Make a data folder of token shards from a corpus: python data/prepare.py CORPUS --out DIR [--source PATH] …

The source is cut into units of work (corpora.py). A process takes a unit, reads its documents, sends each to a split,
tokenizes it and writes the unit's own shards, so the bytes do not depend on who does which unit, or when. All of it
happens in DIR.partial, where a finished shard has a record beside it and a finished unit has one too: the same command
continues after the last of them. When every unit is there the shards get their final names, the manifest joins their
records, and DIR.partial becomes DIR.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import _root
import numpy as np
from tqdm import tqdm

from data import corpora
from data.corpora import CORPORA, SPLITS, Bad, File, download, groups, read_unit, units
from data.shards import (
    OCTAVE,
    DataError,
    ShardWriter,
    Split,
    open_data,
    unknown,
    write_json,
    write_manifest,
    write_whole,
)
from data.tokenizer import load_tokenizer, pieces, tokenizer_names

SHARD_TOKENS = 100_000_000
VAL_FRACTION = 0.05  # unless the corpus has its own validation, or --val_tokens is given
LONG_TOKENS = 16384  # a validation document of so many tokens is listed under val_long
BATCH_CHARACTERS = 2**20  # of text tokenized between two reports of progress
SURVEY_BYTES = 2**26  # of text; a source of less is read once before, so that neither side of the split can be empty
PROCESS_BYTES = 2**26  # of text; for less, threads: starting processes would take longer than they save


def note(message):
    tqdm.write(f"note: {message}", file=sys.stderr)


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- what goes to validation ----


@dataclass
class Survey:
    documents: int = 0
    bytes: int = 0
    low: float = 1.0  # extremes of `fraction` over the documents
    high: float = 0.0


def text_sha256(text):
    return hashlib.sha256(text.encode()).digest()


def fraction(digest):
    """A sha256 as a float in [0, 1): 53 bits, so that it is exact."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def survey(corpus, files, bad):
    """Read the documents of a small source once: Survey."""
    seen = Survey()
    for number, group in enumerate(groups(files, corpus, SURVEY_BYTES)):
        for unit in units(number, group, corpus, SURVEY_BYTES):
            for _, text in read_unit(unit, corpus, bad):
                if text and not text.isspace():
                    place = fraction(text_sha256(text))
                    seen.documents, seen.bytes = seen.documents + 1, seen.bytes + len(text.encode())
                    seen.low, seen.high = min(seen.low, place), max(seen.high, place)
    return seen


def validation_rule(corpus, files, tokenizer, asked, expected, skip_bad):
    """What sends a document to validation, as the manifest records it: a dict with `kind` own, names, hash or cut.

    asked: --val_tokens, or None; expected: tokens of the whole corpus, or None to estimate them from the files.
    """
    if corpora.own_splits(corpus) or corpus.val:
        if asked is not None:
            raise DataError(
                "--val_tokens does not apply: this corpus "
                + ("names its validation documents" if corpus.val else "has a validation split of its own")
            )
        return {"kind": "names", "documents": list(corpus.val)} if corpus.val else {"kind": "own"}
    seen = None
    if expected is None:
        n_bytes = corpora.estimated_bytes(files, corpus.field)
        if n_bytes <= SURVEY_BYTES:
            seen = survey(corpus, files, Bad(skip_bad))
            n_bytes = seen.bytes
            if not seen.documents:
                raise DataError("there is no text in the source: every document is empty")
        expected = max(1, round(n_bytes / tokenizer.bytes_per_token))
    if asked is None:
        asked = max(1, min(corpus.val_tokens or expected, round(VAL_FRACTION * expected)))
    rule, threshold = {"val_tokens": asked, "expected_tokens": expected}, asked / expected
    if seen and seen.documents == 1:
        note("there is a single document: its end, from a line break on, is the validation document")
        return {"kind": "cut"} | rule | {"share": min(threshold, 0.5)}
    if seen and seen.low == seen.high:
        raise DataError(f"all {seen.documents} documents are the same, so none can be kept for validation")
    if seen and threshold <= seen.low:
        threshold = math.nextafter(seen.low, 1)
        note(f"{asked:,} validation tokens would take no document; the one with the smallest hash is taken")
    elif seen and threshold > seen.high:
        threshold = seen.high
        note(
            f"{asked:,} validation tokens would take every document; the one with the largest hash is left for training"
        )
    elif threshold >= 1:
        raise DataError(f"--val_tokens {asked:,} is the whole corpus, which has about {expected:,} tokens")
    return {"kind": "hash"} | rule | {"sha256_fraction_below": threshold}


def assigned(documents, rule, own_split):
    """(name, text) → (split, name, text, sha256 of the text), in order."""
    for name, text in documents:
        digest, split = text_sha256(text), own_split
        if rule["kind"] == "names":
            split = "val" if name in rule["documents"] else "train"
        elif rule["kind"] == "hash":
            split = "val" if fraction(digest) < rule["sha256_fraction_below"] else "train"
        elif rule["kind"] == "cut":
            middle = round(len(text) * (1 - rule["share"]))
            cut = text.rfind("\n", 0, middle) + 1 or middle
            if not text[:cut].strip() or not text[cut:].strip():
                raise DataError(f"{name} is too little text for training and validation")
            yield "train", name, text[:cut], digest
            split, text = "val", text[cut:]
        yield split, name, text, digest


# ---- one unit of work ----


def encode_all(tokenizer, documents, threads):
    """Yield lists of (document, token array that ends in end-of-text, or the tokenizer's DataError), in order.

    A document is (split, name, text, …). Threads share the pieces of a few lists; tiktoken lets them run at once.
    """

    def encode(text):
        try:
            return tokenizer.encode_piece(text)
        except DataError as error:
            return error

    end = np.array([tokenizer.eot], tokenizer.dtype)

    def joined(batch, parts, encoded):
        for document, count in zip(batch, map(len, parts)):
            tokens = list(itertools.islice(encoded, count))
            error = next((part for part in tokens if isinstance(part, DataError)), None)
            yield document, error or np.concatenate([*tokens, end])

    with concurrent.futures.ThreadPoolExecutor(threads) if threads > 1 else contextlib.nullcontext() as pool:
        pending = collections.deque()
        for batch in batches(documents):
            parts = [pieces(document[2]) for document in batch]
            pending.append(
                joined(batch, parts, (pool.map if pool else map)(encode, itertools.chain.from_iterable(parts)))
            )
            if len(pending) >= threads:
                yield list(pending.popleft())
        while pending:
            yield list(pending.popleft())


def batches(documents):
    """Group documents into lists of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[2])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def do_unit(unit, folder, plan, threads=1, report=lambda *counts, **found: None):
    """Tokenize a unit into shards in `folder`, after those that are finished, and write its record, ID.unit.json.

    report(documents, tokens, bytes of text, found) is called after each batch, and with found for what was finished before.
    """
    folder, corpus = Path(folder), CORPORA[plan["dataset"]]
    tokenizer, bad = load_tokenizer(plan["tokenizer"]["name"]), Bad(plan["skip_bad"])
    consumed, digests, empty = collections.Counter(), hashlib.sha256(), 0
    writers = {
        split: ShardWriter(folder, f"{unit.id}.{split}", tokenizer.dtype, plan["shard_tokens"]) for split in SPLITS
    }
    for record in itertools.chain.from_iterable(writer.records for writer in writers.values()):
        report(record["documents"], record["tokens"], record["bytes"], found=True)
    done = {split: writer.state.get("consumed", 0) for split, writer in writers.items()}
    refused = {split: writer.state.get("refused", 0) for split, writer in writers.items()}  # by the tokenizer
    bad.counts["documents"] = sum(refused.values())

    def fresh():
        """The documents that are not in a finished shard."""
        nonlocal empty
        for split, name, text, digest in assigned(read_unit(unit, corpus, bad), plan["val_rule"], unit.split):
            if not text or text.isspace():
                empty += 1
                continue
            digests.update(digest)
            consumed[split] += 1
            if consumed[split] > done[split]:
                yield split, name, text, consumed[split]

    for batch in encode_all(tokenizer, fresh(), threads):
        counts = np.zeros(3, np.int64)
        for (split, name, text, number), tokens in batch:
            if isinstance(tokens, DataError):
                bad("documents", f"document {name}: {tokens}")
                refused[split] += 1
            else:
                n_bytes = len(text) if text.isascii() else len(text.encode())
                writers[split].add(tokens, n_bytes)
                counts += 1, len(tokens), n_bytes
            writers[split].state = {"consumed": number, "refused": refused[split]}
        report(*counts.tolist())
    shards = {split: writer.close() for split, writer in writers.items()}
    write_json(
        folder / f"{unit.id}.unit.json",
        {
            "shards": shards,
            "documents": sum(consumed.values()),
            "empty": empty,
            "sha256": digests.hexdigest(),
            "bad": {kind: count for kind, count in bad.counts.items() if count},
            "messages": bad.messages,
        },
    )


# ---- all units ----


def in_background(function, *arguments):
    """A Future of function(*arguments), which a daemon thread runs: it does not hold up the end of the program."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def finished_units(folder, number=None):
    """{group: [its ids that are finished]}, and {group: how many it has} where one is known."""
    ids, counts = collections.defaultdict(set), {}
    for path in folder.glob("*.unit.json" if number is None else f"{number:05d}-*.unit.json"):
        group, unit, _, count = path.name.removesuffix(".unit.json").split("-")
        ids[int(group)].add(int(unit))
        counts[int(group)] = int(count)
    return ids, counts


def supply(corpus, plan, files, folder, mine, downloads, ahead):
    """Yield the units that are still to be done, as their files come to hand, or None where the next is not there yet.

    mine(group, unit) says which are this part's. Groups of files are downloaded one after the other, the next as soon
    as only `ahead` units wait.
    """
    there, counts = finished_units(folder)
    todo = collections.deque(
        (number, group)
        for number, group in enumerate(groups(files, corpus, plan["unit_bytes"]))
        if mine(number)
        and (number not in counts or any(mine(number, i) and i not in there[number] for i in range(counts[number])))
    )
    waiting, coming = collections.deque(), None

    def fetch(group):
        return [download(corpus, plan["revision"], file, downloads) for file in group]

    while todo or coming or waiting:
        if todo and not coming and len(waiting) <= ahead:
            number, group = todo.popleft()
            coming = number, in_background(fetch, group)
            if all(file.path for file in group):
                concurrent.futures.wait([coming[1]])
        if coming and coming[1].done():
            (number, future), coming = coming, None
            waiting.extend(
                unit
                for i, unit in enumerate(units(number, future.result(), corpus, plan["unit_bytes"]))
                if mine(number, i) and i not in there[number]
            )
        else:
            yield waiting.popleft() if waiting else None


def work(pipe, folder, plan):
    """A worker process: does the units that come through the pipe, and tells of progress, end or failure."""
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone, and so is the work
        while True:
            unit = pipe.recv()
            try:
                do_unit(unit, folder, plan, 1, lambda *counts, found=False: pipe.send(("progress", (counts, found))))
                pipe.send(("done", unit))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except (DataError, OSError) as error:
                pipe.send(("failed", error))
            except BaseException:
                pipe.send(("failed", RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))


def in_processes(supplied, workers, folder, plan, report, done):
    """Do the units in processes of their own: report(…) on their progress, done(unit) as each ends."""
    context = multiprocessing.get_context("spawn")  # the same on every system, and safe beside other libraries' threads
    processes, idle, busy, supplied = [], [], set(), iter(supplied)
    exhausted = False
    try:
        while busy or not exhausted:
            while not exhausted and (idle or len(processes) < workers):
                unit = next(supplied, "end")
                exhausted = unit == "end"
                if exhausted or unit is None:
                    break
                if not idle:
                    pipe, theirs = context.Pipe()
                    processes.append(context.Process(target=work, args=(theirs, folder, plan), daemon=True))
                    mask = signal.pthread_sigmask(
                        signal.SIG_BLOCK, {signal.SIGINT}
                    )  # which it inherits: Ctrl-C is for the parent
                    processes[-1].start()
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                    theirs.close()  # so that the end of the process ends the pipe
                    idle.append(pipe)
                busy.add(pipe := idle.pop())
                pipe.send(unit)
            if not busy and not exhausted:
                time.sleep(0.1)  # a download is awaited
            for pipe in multiprocessing.connection.wait(busy, 0.1):
                kind, value = pipe.recv()
                if kind == "failed":
                    raise value
                if kind == "progress":
                    report(*value[0], found=value[1])
                else:
                    busy.remove(pipe)
                    idle.append(pipe)
                    done(value)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise DataError("a worker process died, perhaps for want of memory; try fewer --workers") from None
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


class Progress:
    """The bar: text in MB/s and time left, with documents, tokens, tokens/s and the disk that is free."""

    def __init__(self, folder, expected_bytes):
        self.folder, self.start, self.documents, self.tokens, self.new_tokens = folder, time.monotonic(), 0, 0, 0
        self.bar = tqdm(
            desc="tokenizing",
            total=expected_bytes,
            unit="B",
            unit_scale=True,
            mininterval=1 if sys.stderr.isatty() else 30,
        )

    def __call__(self, documents, tokens, n_bytes, found=False):
        """Count; with `found` it was done before, and says nothing about the speed."""
        self.documents, self.tokens = self.documents + documents, self.tokens + tokens
        if found:
            self.bar.initial += n_bytes
            self.bar.n += n_bytes
            return
        self.new_tokens += tokens
        if time.monotonic() - self.bar.last_print_t >= self.bar.mininterval:
            rate = self.new_tokens / (time.monotonic() - self.start)
            self.bar.set_postfix_str(
                f"{self.documents:,} documents, {self.tokens:,} tokens, {rate:,.0f} tokens/s, "
                f"{shutil.disk_usage(self.folder).free / 1e9:.0f} GB free",
                refresh=False,
            )
        self.bar.update(n_bytes)


def run_units(corpus, plan, files, folder, part, workers, downloads, keep):
    """Do the units of this part that are not finished."""
    index, count = part or (1, 1)

    def mine(group, unit=None):
        """Whether a unit, or with None any of its group, is this part's. By groups, where there are enough of them:
        then nobody downloads what is another's."""
        if plan["groups"] >= count:
            return group % count == index - 1
        return unit is None or (group + unit) % count == index - 1

    for path in folder.glob("*.tmp"):  # of an interrupted run of this part
        if (unit := re.match(r"(\d{5})-(\d{5})-of", path.name)) and mine(int(unit[1]), int(unit[2])):
            path.unlink(missing_ok=True)
    for path in downloads.rglob("*.incomplete"):  # which the hub's library would not take up again
        path.unlink(missing_ok=True)
    progress = Progress(folder, plan["text_bytes"] // count)
    there, _ = finished_units(folder)
    for group, ids in there.items():
        for path in [path for i in ids if mine(group, i) for path in folder.glob(f"{group:05d}-{i:05d}-*.unit.json")]:
            for record in itertools.chain.from_iterable(json.loads(path.read_text())["shards"].values()):
                progress(record["documents"], record["tokens"], record["bytes"], found=True)

    def done(unit):
        """Delete what was downloaded for the unit's group, when it was the last of the group."""
        number, total = int(unit.id[:5]), int(unit.id[-5:])
        finished = finished_units(folder, number)[0][number]
        if not keep and all(i in finished or not mine(number, i) for i in range(total)):
            for file in unit.files:
                if Path(file.path).is_relative_to(downloads):
                    Path(file.path).unlink(missing_ok=True)

    supplied, threads = supply(corpus, plan, files, folder, mine, downloads, workers), 1
    if all(file.path for file in files):
        supplied = [unit for unit in supplied if unit]
        in_one = plan["text_bytes"] < PROCESS_BYTES or len(supplied) < 2
        most = len(supplied)
    else:
        in_one, most = corpus.join != "rows" or corpus.reader is not None, workers
    with contextlib.closing(progress.bar):
        if workers > 1 and not in_one:
            return in_processes(supplied, min(workers, most), folder, plan, progress, done)
        for unit in supplied:
            if unit is None:
                time.sleep(0.1)
            else:
                do_unit(unit, folder, plan, workers, progress)
                done(unit)


# ---- the folder ----

RECORD = re.compile(r"\d{5}-\d{5}-of-\d{5}(\.unit|\.[a-z]+_\d{5})\.json|plan\.json|.*\.tmp|lock.*")


def lock(folder, part):
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


def join_units(folder, plan, corpus):
    """Give every shard its final name and write figure, manifest and COMPLETE. Nothing is read but records and val."""
    there, counts = finished_units(folder)
    missing = [f"{number:05d}" for number in range(plan["groups"]) if len(there[number]) < counts.get(number, 1)]
    if missing:
        raise DataError(
            f"{folder} is not finished: of {plan['groups']} groups of source files {len(missing)} are not, "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; run the other parts, or the command without --part"
        )
    splits, lengths, totals, digests = {"train": [], "val": []}, {}, collections.Counter(), []
    bad, messages = collections.Counter(), []
    for path in sorted(folder.glob("*.unit.json")):
        unit = json.loads(path.read_text())
        totals.update({"documents": unit["documents"], "empty": unit["empty"]})
        bad.update(unit["bad"])
        messages += unit["messages"]
        digests.append(unit["sha256"])
        for split, records in unit["shards"].items():
            for record in records:
                shards = splits.setdefault(split, [])
                name = f"{split}_{len(shards):05d}.bin"
                if (folder / record["file"]).exists():
                    os.replace(folder / record["file"], folder / name)
                shards.append(
                    {"file": name}
                    | {key: record[key] for key in ("tokens", "documents", "bytes", "sha256", "fingerprint")}
                )
                totals["bytes"] += record["bytes"]
                lengths.setdefault(split, collections.Counter()).update(
                    {int(b): n for b, n in record["lengths"].items()}
                )
    for split in ("train", "val"):
        if not splits[split]:
            raise DataError(
                f"there is no {split} document: the source has {totals['documents']:,} documents and {totals['empty']:,} "
                f"empty ones"
                + (f"; validation is {', '.join(corpus.val)}" if corpus.val else "; give another --val_tokens")
            )
    sha256 = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    revision = plan["revision"]
    if corpus.sha256 not in (None, sha256):
        note(
            f"the source's {totals['documents']} documents are not exactly those of {corpus.repo}@{corpus.revision}; no revision is "
            f"recorded"
        )
        revision = None
    for message in messages[:10]:
        note(f"skipped: {message}")
    val = Split(folder, splits["val"], plan["dtype"], plan["vocab_size"], plan["tokenizer"]["eot"]).documents()
    long = plan["long_tokens"]
    while long > val[:, 1].max():
        long //= 2
    if long < plan["long_tokens"]:
        note(f"no validation document has {plan['long_tokens']:,} tokens; val_long lists those of at least {long:,}")
    ordered = {split: dict(sorted(counts.items())) for split, counts in lengths.items()}
    write_whole(folder / "lengths.png", lengths_figure(ordered))
    write_manifest(
        folder,
        plan
        | {
            "revision": revision,
            "source": plan["source"] | totals | {"sha256": sha256, "bad": dict(bad)},
            "splits": {split: splits[split] for split in SPLITS if split in splits},
            "lengths": ordered,
            "bins_per_doubling": OCTAVE,
            "val_long_tokens": long,
            "val_long": [{"start": int(start), "tokens": int(n)} for start, n in val if n >= long],
        },
    )


def publish(folder, out):
    """Check the complete folder, clear it of the records of units, and give it its name."""
    open_data(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "plan.json"):  # that one last
        if path.name.startswith("downloads") and path.is_dir():
            shutil.rmtree(path)
        elif RECORD.fullmatch(path.name):
            path.unlink()
    os.replace(folder, out)


def make_plan(corpus_name, corpus, subset_name, subset, files, commit, source, tokenizer, options):
    """What is to be made, as plan.json and the manifest record it: it settles every byte of the shards."""
    expected = None
    if subset and source is None:
        expected = max(1, round(subset.tokens * 4.3 / tokenizer.bytes_per_token))  # the table counts GPT-2's tokens
        n_bytes = round(subset.tokens * 4.3)
    else:
        n_bytes = corpora.estimated_bytes(files, corpus.field)
    unit_bytes = min(max(n_bytes // 64, corpora.LEAST_UNIT_BYTES), corpora.UNIT_BYTES)
    return (
        {
            "dataset": corpus_name,
            "subset": subset_name,
            "revision": commit,
            "licence": corpus.licence,
            "source": {
                "files": len(files),
                "file_bytes": sum(file.bytes for file in files),
                "identity": files_identity(files),
            },
            "tokenizer": {key: getattr(tokenizer, key) for key in ("name", "sha256", "n_vocab", "eot", "version")},
            "vocab_size": tokenizer.n_vocab,
            "dtype": tokenizer.dtype.name,
        }
        | options
        | {
            "text_bytes": n_bytes,
            "unit_bytes": unit_bytes,
            "groups": len(groups(files, corpus, unit_bytes)),
            "val_rule": validation_rule(corpus, files, tokenizer, options["val_tokens"], expected, options["skip_bad"]),
        }
    )


def source_files(corpus, subset, source, commit):
    """(revision, File list) of what is to be read; of the hub at `commit`."""
    if source is not None and corpus.reader:
        source = Path(source)
        listed = corpora.local_files(corpus, source)
        identity = hashlib.sha256(json.dumps([[f.name, f.identity] for f in listed]).encode()).hexdigest()
        return corpus.revision, [File(source.name, sum(f.bytes for f in listed), identity, path=str(source))]
    if source is not None:
        return None, corpora.local_files(corpus, source)
    if corpus.archive:
        return corpus.revision, [File(f"{corpus.repo.split('/')[1]}.zip", 0, corpus.revision)]
    if corpus.repo:
        return corpora.hub_files(corpus, subset, commit)
    return corpus.revision, [corpora.king_james_file()]


def prepare(
    corpus_name,
    out=None,
    source=None,
    tokenizer_name=None,
    shard_tokens=SHARD_TOKENS,
    val_tokens=None,
    workers=1,
    *,
    subset=None,
    long_tokens=LONG_TOKENS,
    skip_bad=False,
    keep_downloads=False,
    part=None,
    merge=False,
    verify=None,
):
    """Make the data folder `out`, continue it, or verify it where it is already there with these options. Returns its Data.

    part: (i, n), to do only the i-th of n parts, which returns None, or with `merge` only to join what the parts made.
    verify: as for open_data, of a folder that is complete. DataError for what the user can put right; then nothing at
    `out` was touched, and what is finished is kept in `out`.partial.
    """
    if corpus_name not in CORPORA:
        raise unknown("corpus", corpus_name, list(CORPORA))
    corpus = CORPORA[corpus_name]
    for name, value in (
        ("shard_tokens", shard_tokens),
        ("val_tokens", val_tokens),
        ("workers", workers),
        ("long_tokens", long_tokens),
    ):
        if value is not None and value < 1:
            raise DataError(f"--{name} must be at least 1, not {value}")
    if part and not 1 <= part[0] <= part[1]:
        raise DataError(f"--part must be i/n with i from 1 to n, not {part[0]}/{part[1]}")
    if corpus.local and source is None:
        raise DataError(f"corpus {corpus_name} needs --source PATH: {corpus.description}")
    if corpus_name == "builtin" and source is not None:
        raise DataError("corpus builtin takes no --source; for your own text take the corpus `files`")
    tokenizer = load_tokenizer(tokenizer_name or corpus.tokenizer)
    subset_name, subset = corpora.subset_of(corpus, subset)
    options = {"shard_tokens": shard_tokens, "val_tokens": val_tokens, "long_tokens": long_tokens, "skip_bad": skip_bad}

    out = Path(out) if out else default_folder(corpus_name, tokenizer.name)
    finished = open_data(out, verify) if (out / "COMPLETE").exists() else None
    if not finished and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is in the way: it is not a finished data folder and not empty; give another --out")
    folder = Path(os.path.abspath(out) + ".partial")
    there = finished.manifest if finished else unfinished_plan(folder)
    if merge and there is None:
        raise DataError(f"there is nothing to merge: {folder} holds no parts")
    if there:
        now = {"dataset": corpus_name, "subset": subset_name, "tokenizer": tokenizer.name} | options
        differ = [
            f"{key} {was} there, {now[key]} now"
            for key, was in (there | {"tokenizer": there["tokenizer"]["name"]}).items()
            if key in now and was != now[key]
        ]
        if there["tokenizer"]["sha256"] != tokenizer.sha256:
            differ.append(f"another vocabulary of {tokenizer.name}")
        if (
            not differ and not merge and (source is not None or not finished)
        ):  # what is finished is not asked of the hub again
            revision, files = source_files(corpus, subset, source, there["revision"])
            differ = [] if files_identity(files) == there["source"]["identity"] else ["other text in the source"]
        if differ:
            raise DataError(
                f"{out if finished else folder} was made with other options or from other text ({'; '.join(differ)}); "
                f"give another --out, or delete it"
            )
    if finished:
        print(f"{out} is complete and as it should be; nothing to do")
        return finished

    downloads = (
        Path(f"{os.path.abspath(out)}.downloads")
        if keep_downloads
        else folder / f"downloads{f'-{part[0]}' if part else ''}"
    )
    opened = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = lock(folder, part)
        plan = there
        if not merge and not (folder / "COMPLETE").exists():
            if plan is None:
                revision, files = source_files(corpus, subset, source, corpus.revision)
                plan = make_plan(corpus_name, corpus, subset_name, subset, files, revision, source, tokenizer, options)
                need_disk(folder, plan, files, tokenizer)
                write_json(folder / "plan.json", plan)
            run_units(corpus, plan, files, folder, part, workers, downloads, keep_downloads)
        if part and not merge:
            print(
                f"part {part[0]} of {part[1]} is done; when all are, join them: the same command with --merge instead of --part"
            )
            return None
        if not (folder / "COMPLETE").exists():
            join_units(folder, plan, corpus)
        publish(folder, out)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; make room and run the same command again, which continues" if full else ""
        raise DataError(f"{error.filename or folder}: {error.strerror or error}{advice}") from error
    finally:
        if opened:  # else another is at work there
            if folder.is_dir() and not part and not merge:
                discard_if_empty(folder)
            opened.close()
    return open_data(out, verify=False)


def default_folder(corpus_name, tokenizer_name):
    return Path(__file__).resolve().parent / f"{corpus_name}-{tokenizer_name}"


def files_identity(files):
    return hashlib.sha256(json.dumps([[f.name, f.bytes, f.identity, f.split] for f in files]).encode()).hexdigest()


def unfinished_plan(folder):
    """The plan of an interrupted run in `folder`; None where there is none. DataError where something else is there."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    for name in ("plan.json", "manifest.json"):
        if (folder / name).is_file() and (name == "plan.json" or (folder / "COMPLETE").exists()):
            return json.loads((folder / name).read_text())
    if all(RECORD.fullmatch(path.name) for path in folder.iterdir()):
        return None  # stopped before it began
    raise DataError(f"{folder} is in the way: it holds files that data/prepare.py did not write; give another --out")


def discard_if_empty(folder):
    """Remove DIR.partial where nothing in it is worth continuing from."""
    shards = [path for path in folder.glob("*.bin") if path.with_suffix(".json").exists()]
    if (
        not shards
        and not any(folder.glob("*.unit.json"))
        and not any(path.is_file() for path in folder.glob("downloads*/**/*"))
    ):
        for path in folder.iterdir():
            if RECORD.fullmatch(path.name) or path.suffix == ".bin":
                path.unlink()
        with contextlib.suppress(OSError):  # what is not ours stays
            for path in folder.glob("downloads*"):
                path.rmdir()
            folder.rmdir()


def need_disk(folder, plan, files, tokenizer):
    """DataError where the disk has no room for the shards and what is downloaded at a time."""
    tokens = plan["text_bytes"] / tokenizer.bytes_per_token
    need = tokens * tokenizer.dtype.itemsize + 2 * max((file.bytes for file in files if not file.path), default=0)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"{folder} needs about {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; give an --out on another disk"
        )


# ---- what is told ----


def quantile(lengths, share):
    """Length below which that share of the documents is, to within a bin of the histogram."""
    total, seen = sum(lengths.values()), 0
    for b, count in sorted((int(b), count) for b, count in lengths.items()):
        seen += count
        if seen >= share * total:
            return round(2 ** ((b + 0.5) / OCTAVE))
    return 0


def lengths_figure(lengths):
    """The histogram of document lengths, shares of each split's documents: {split: {bin: documents}} → PNG bytes."""
    from matplotlib.figure import Figure  # here: it takes longer to import than a small corpus to prepare

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for split, counts in lengths.items():
        tokens = 2 ** ((np.array([int(b) for b in counts]) + 0.5) / OCTAVE)
        documents = np.array(list(counts.values()))
        low, high = np.floor(np.log2(tokens.min())), np.ceil(np.log2(tokens.max()) + 1e-9)
        edges = 2 ** np.arange(low, high + 0.5, 0.5)  # two bars per doubling
        axes.hist(tokens, edges, weights=documents / documents.sum(), alpha=0.5, label=f"{split} ({documents.sum():,})")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in a document", ylabel="share of the split's documents")
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def summary(data):
    """Documents, tokens, their quantiles, bytes a token and what was left out, in a few lines."""
    manifest = data.manifest
    lines = [f"{data.folder}"]
    for split, shards in manifest["splits"].items():
        total = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes")}
        of = ", ".join(
            f"{share:.0%} {quantile(manifest['lengths'][split], share):,}" for share in (0.05, 0.25, 0.5, 0.75, 0.95)
        )
        lines.append(
            f"  {split} {total['tokens']:,} tokens in {total['documents']:,} documents and {len(shards)} shards "
            f"({total['bytes'] / (total['tokens'] - total['documents']):.3f} bytes a token); tokens a document: {of}"
        )
    rule, source = manifest["val_rule"], manifest["source"]
    if "val_tokens" in rule:
        lines[-1 if len(manifest["splits"]) < 3 else 2] += f"; {rule['val_tokens']:,} were aimed at"
    lines.append(f"  val_long {len(manifest['val_long'])} documents of at least {manifest['val_long_tokens']:,} tokens")
    left_out = [f"{source['empty']:,} empty documents"] * bool(source["empty"]) + [
        f"{n:,} bad {kind}" for kind, n in source["bad"].items()
    ]
    if left_out:
        lines.append(f"  left out: {', '.join(left_out)}")
    return "\n".join([*lines, f"  lengths of documents: {data.folder / 'lengths.png'}"])


def table():
    """The corpora, for --list."""
    lines = []
    for name, corpus in CORPORA.items():
        lines.append(f"{name}: {corpus.description}")
        lines.append(f"    licence: {corpus.licence}")
        if corpus.repo:
            lines.append(f"    from: {corpus.archive or f'hub data set {corpus.repo}'} at {corpus.revision}")
        elif corpus.revision:
            lines.append(f"    from: {corpus.revision}")
        for i, (subset, what) in enumerate(corpus.subsets.items()):
            splits = ", ".join(f"{split} {pattern}" for split, pattern in what.files.items())
            lines.append(
                f"    {subset}{' (default)' if i == 0 and len(corpus.subsets) > 1 else ''}: field {corpus.field}; {splits}; about "
                f"{what.tokens:,} GPT-2 tokens in {what.documents:,} documents; {what.megabytes:,} MB to download"
            )
    return "\n".join(lines)


def estimate(corpus_name, source=None, tokenizer_name=None, workers=1, subset=None):
    """Tokens, disk and minutes on this machine for a corpus, in a sentence; nothing is downloaded or written."""
    corpus = CORPORA[corpus_name] if corpus_name in CORPORA else None
    if corpus is None:
        raise unknown("corpus", corpus_name, list(CORPORA))
    tokenizer = load_tokenizer(tokenizer_name or corpus.tokenizer)
    what = corpora.subset_of(corpus, subset)[1]
    if source is None and corpus.local:
        raise DataError(f"corpus {corpus_name} needs --source PATH: {corpus.description}")
    sample = "".join(text for _, text in itertools.islice(CORPORA["builtin"].reader(corpora.king_james_file()), 12))
    download_mb = 0
    if source is None and (what or corpus.archive):
        n_bytes, download_mb = (what.tokens * 4.3, what.megabytes) if what else (76e6, 30)
        where = f"; {download_mb:,} MB to download, a file at a time, take their own time"
    else:
        n_bytes, where = corpora.estimated_bytes(source_files(corpus, what, source, None)[1], corpus.field), ""
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < 1:
        for i in range(0, len(sample), 4096):
            tokenizer.encode(sample[i : i + 4096])
        done += len(sample.encode())
    rate = (
        done / (time.perf_counter() - started) * min(workers, cores()) * 0.9
    )  # reading, hashing and writing take the rest
    tokens = n_bytes / tokenizer.bytes_per_token
    return (
        f"{corpus_name}: about {tokens:,.0f} tokens ({n_bytes / 1e6:,.0f} MB of text), {tokens * tokenizer.dtype.itemsize / 1e9:,.2f} GB on "
        f"disk, {n_bytes / rate / 60:,.1f} minutes with {workers} workers at {rate / 1e6:.1f} MB/s{where}"
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="data/prepare.py",
        description="Make a data folder of token shards from a corpus. Interrupted, it continues.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="corpora (--list tells more):\n"
        + "\n".join(f"  {name}: {c.description}" for name, c in CORPORA.items()),
    )
    parser.add_argument("corpus", nargs="?", metavar="CORPUS", help=f"one of {', '.join(CORPORA)}; see below")
    parser.add_argument(
        "--out", metavar="DIR", help="folder to make (default: data/CORPUS-TOKENIZER in this repository)"
    )
    parser.add_argument(
        "--source",
        metavar="PATH",
        help="file or folder of .txt, .jsonl (.gz, .xz, .zst) or .parquet to read, with the "
        "corpus's own fields, instead of downloading it",
    )
    parser.add_argument("--subset", metavar="NAME", help="of the corpus, as --list has them (default: the first)")
    defaults = ", ".join(name for name, corpus in CORPORA.items() if corpus.tokenizer != "gpt2")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help=f"{', '.join(tokenizer_names())} (default: gpt2; byte for {defaults})"
    )
    parser.add_argument(
        "--shard_tokens",
        metavar="N",
        type=int,
        default=SHARD_TOKENS,
        help="start a new shard rather than exceed this many tokens; a longer document has a shard to "
        "itself (default: %(default)s)",
    )
    parser.add_argument(
        "--val_tokens",
        metavar="N",
        type=int,
        help="tokens to aim at for validation, which takes whole documents by the hash of their text; not for "
        f"corpora that have their own validation (default: {VAL_FRACTION:.0%}% of an estimate; fineweb-edu 100 M and "
        f"openwebtext 10 M at most)",
    )
    parser.add_argument(
        "--long_tokens",
        metavar="N",
        type=int,
        default=LONG_TOKENS,
        help="list validation documents of at least this many tokens as val_long (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=cores(),
        help="processes that tokenize; any number makes the same bytes (default: the cores, here %(default)s)",
    )
    parser.add_argument(
        "--part", metavar="I/N", help="do only the I-th of N parts, for N machines or an array of jobs; then --merge"
    )
    parser.add_argument(
        "--merge", action="store_true", help="join what all parts made in DIR.partial; nothing else is read"
    )
    parser.add_argument(
        "--skip_bad", action="store_true", help="count and leave out what cannot be read, instead of stopping"
    )
    parser.add_argument("--keep_downloads", action="store_true", help="keep downloaded files, in DIR.downloads")
    parser.add_argument(
        "--verify",
        choices=("quick", "full"),
        help="for a folder that is complete: sizes and fingerprints, or every sha256 (default: full up to 1 GiB)",
    )
    parser.add_argument("--dry_run", action="store_true", help="only estimate tokens, disk and minutes on this machine")
    parser.add_argument("--list", action="store_true", help="only print where each corpus comes from")
    args, extra = parser.parse_known_args(arguments)
    out = args.out
    try:
        if extra:
            raise unknown("argument", extra[0].split("=")[0], [f"--{name}" for name in vars(args) if name != "corpus"])
        if args.list:
            print(table())
            return
        if args.corpus is None:
            raise DataError(f"which corpus? One of {', '.join(CORPORA)}")
        if args.dry_run:
            print(estimate(args.corpus, args.source, args.tokenizer, args.workers, args.subset))
            return
        part = None
        if args.part is not None:
            if args.merge:
                raise DataError("--part and --merge do not go together: first every part, then --merge")
            if not (match := re.fullmatch(r"(\d+)/(\d+)", args.part)):
                raise DataError(f"--part must be i/n, for example 1/4, not {args.part!r}")
            part = int(match[1]), int(match[2])
        data = prepare(
            args.corpus,
            out,
            args.source,
            args.tokenizer,
            args.shard_tokens,
            args.val_tokens,
            args.workers,
            subset=args.subset,
            long_tokens=args.long_tokens,
            skip_bad=args.skip_bad,
            keep_downloads=args.keep_downloads,
            part=part,
            merge=args.merge,
            verify={None: None, "quick": False, "full": True}[args.verify],
        )
        if data:
            print(summary(data))
    except DataError as error:
        sys.exit(f"prepare: {error}")
    except KeyboardInterrupt:
        command = shlex.join(["python", "data/prepare.py", *(sys.argv[1:] if arguments is None else arguments)])
        sys.exit(f"\nprepare: interrupted; the same command continues from what is finished: {command}")


if __name__ == "__main__":
    main()
