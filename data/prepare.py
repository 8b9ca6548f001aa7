"""Make a data folder of token shards from a corpus: python data/prepare.py CORPUS --out DIR [--source PATH] …

Two passes over the documents: the first counts and hashes them, which settles what goes to validation; the second
tokenizes and writes. All of it happens in DIR.partial, which becomes DIR when it is complete.
"""
import argparse
import collections
import concurrent.futures
import errno
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
if not __package__:  # as a script: look for modules in the repository, not in data/
    sys.path[0] = str(REPO)

from data.corpora import CORPORA
from data.shards import DataError, ShardWriter, Split, open_data, unknown, write_manifest
from data.tokenizer import TOKENIZERS, load_tokenizer

SHARD_TOKENS = 100_000_000
VAL_FRACTION = 0.05  # unless the corpus names its validation documents or --val_tokens is given
LONG_TOKENS = 16384  # a validation document of so many tokens is listed under val_long
BATCH_CHARACTERS = 2**20  # of text handed to a worker at once


def note(message):
    print(f"note: {message}", file=sys.stderr)


# ---- first pass: what is there, and what goes to validation ----

@dataclass
class Survey:
    documents: int = 0
    empty: int = 0
    bytes: int = 0
    sha256: str = ""  # of the documents' sha256s: identifies the text whatever kind of file it came from
    low: float = 1.0  # extremes of `fraction` over the documents
    high: float = 0.0
    named: tuple = ()  # which of the corpus's validation documents there are


def text_sha256(text):
    return hashlib.sha256(text.encode()).digest()


def fraction(digest):
    """A sha256 as a float in [0, 1): 53 bits, so that it is exact."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def documents_of(corpus, source):
    """Yield (name, text) without the documents that hold nothing but white space."""
    return ((name, text) for name, text in corpus.documents(source) if text.strip())


def survey(corpus, source):
    """Read the documents once: Survey."""
    seen, digests, named = Survey(), hashlib.sha256(), []
    with tqdm(desc="reading", unit="B", unit_scale=True, mininterval=1) as bar:
        for name, text in corpus.documents(source):
            if not text.strip():
                seen.empty += 1
                continue
            digest, n_bytes = text_sha256(text), len(text.encode())
            digests.update(digest)
            seen.documents, seen.bytes = seen.documents + 1, seen.bytes + n_bytes
            seen.low, seen.high = min(seen.low, fraction(digest)), max(seen.high, fraction(digest))
            if name in corpus.val:
                named.append(name)
            bar.update(n_bytes)
    seen.sha256, seen.named = digests.hexdigest(), tuple(named)
    return seen


def validation_rule(corpus, seen, tokenizer, val_tokens):
    """What sends a document to validation, as the manifest records it: a dict with `kind` names, hash or cut."""
    if corpus.val:
        if val_tokens is not None:
            raise DataError("--val_tokens does not apply: this corpus names its validation documents")
        if not seen.named or len(seen.named) == seen.documents:
            raise DataError(f"the source has {seen.documents} documents, {len(seen.named)} of them among the validation "
                            f"documents {', '.join(corpus.val)}: there must be some, and others too")
        return {"kind": "names", "documents": list(seen.named)}
    expected = max(1, round(seen.bytes / tokenizer.bytes_per_token))
    asked = max(1, round(VAL_FRACTION * expected)) if val_tokens is None else val_tokens
    rule = {"val_tokens": asked, "expected_tokens": expected}
    if seen.documents == 1:
        note("there is a single document: its end, from a line break on, is the validation document")
        return {"kind": "cut"} | rule | {"share": min(asked / expected, 0.5)}
    if seen.low == seen.high:
        raise DataError(f"all {seen.documents} documents are the same, so none can be kept for validation")
    threshold = asked / expected
    if threshold <= seen.low:
        threshold = math.nextafter(seen.low, 1)
        note(f"{asked:,} validation tokens would take no document; the one with the smallest hash is taken")
    elif threshold > seen.high:
        threshold = seen.high
        note(f"{asked:,} validation tokens would take every document; the one with the largest hash is left for training")
    return {"kind": "hash"} | rule | {"sha256_fraction_below": threshold}


def assigned(documents, rule):
    """Yield (split, name, text), in order."""
    for name, text in documents:
        if rule["kind"] == "names":
            yield ("val" if name in rule["documents"] else "train"), name, text
        elif rule["kind"] == "hash":
            yield ("val" if fraction(text_sha256(text)) < rule["sha256_fraction_below"] else "train"), name, text
        else:
            middle = round(len(text) * (1 - rule["share"]))
            cut = text.rfind("\n", 0, middle) + 1 or middle
            if not text[:cut].strip() or not text[cut:].strip():
                raise DataError(f"{name} is too little text for training and validation")
            yield "train", name, text[:cut]
            yield "val", name, text[cut:]


# ---- second pass: tokens ----

def encode_batch(tokenizer_name, batch):
    """[(split, name, text)] → [(split, tokens (n,) with the end-of-text token last, bytes of text)]."""
    tokenizer, encoded = load_tokenizer(tokenizer_name), []
    for split, name, text in batch:
        try:
            tokens = np.append(tokenizer.encode(text), tokenizer.dtype.type(tokenizer.eot))
        except DataError as error:
            raise DataError(f"document {name}: {error}") from None
        encoded.append((split, tokens, len(text.encode())))
    return encoded


def batches(documents):
    """Group (split, name, text) into lists of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[-1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(tokenizer_name, documents, workers):
    """Yield what encode_batch makes of the documents, in order, whatever the number of processes."""
    if workers == 1:
        for batch in batches(documents):
            yield from encode_batch(tokenizer_name, batch)
        return
    # Ctrl-C is for the parent alone. spawn: the same on every system, and safe beside other libraries' threads.
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal,
                                                (signal.SIGINT, signal.SIG_IGN)) as pool:
        pending = collections.deque()
        try:
            for batch in batches(documents):
                pending.append(pool.submit(encode_batch, tokenizer_name, batch))
                if len(pending) > 2 * workers:  # bounds what is read ahead
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def write_data(folder, plan, corpus, source, workers):
    """Write shards, manifest and COMPLETE into the empty `folder`."""
    tokenizer = load_tokenizer(plan["tokenizer"]["name"])
    writers = {split: ShardWriter(folder, split, tokenizer.dtype, plan["shard_tokens"]) for split in ("train", "val")}
    documents = assigned(documents_of(corpus, source), plan["val_rule"])
    with tqdm(desc="tokenizing", total=plan["source"]["bytes"], unit="B", unit_scale=True, mininterval=1) as bar:
        done = tokens_done = 0
        for split, tokens, n_bytes in encode_all(tokenizer.name, documents, workers):
            writers[split].add(tokens, n_bytes)
            done, tokens_done = done + 1, tokens_done + len(tokens)
            bar.set_postfix_str(f"{done:,} documents, {tokens_done:,} tokens", refresh=False)
            bar.update(n_bytes)
    splits = {split: writer.close() for split, writer in writers.items()}

    val = Split(folder, splits["val"], tokenizer.dtype, tokenizer.n_vocab, tokenizer.eot).documents()
    long = LONG_TOKENS
    while long > val[:, 1].max():
        long //= 2
    if long < LONG_TOKENS:
        note(f"no validation document has {LONG_TOKENS:,} tokens; val_long lists those of at least {long:,}")
    write_manifest(folder, plan | {
        "splits": splits, "val_long_tokens": long,
        "val_long": [{"start": int(start), "tokens": int(n)} for start, n in val if n >= long]})


def prepare(corpus_name, out=None, source=None, tokenizer_name=None, shard_tokens=SHARD_TOKENS, val_tokens=None, workers=1):
    """Make the data folder `out`, or verify it where it is already there with these options. Returns its Data.

    DataError for what the user can put right; then nothing was left at `out`, and nothing there was touched.
    """
    if corpus_name not in CORPORA:
        raise unknown("corpus", corpus_name, list(CORPORA))
    corpus = CORPORA[corpus_name]
    for field, value in (("shard_tokens", shard_tokens), ("val_tokens", val_tokens), ("workers", workers)):
        if value is not None and value < 1:
            raise DataError(f"--{field} must be at least 1, not {value}")
    if corpus.needs_source == (source is None):
        raise DataError(f"corpus {corpus_name} needs --source PATH: {corpus.description}" if source is None else
                        f"corpus {corpus_name} takes no --source; for your own text take the corpus `files`")
    tokenizer = load_tokenizer(tokenizer_name or corpus.tokenizer)
    source = None if source is None else Path(source)
    out = Path(out) if out else REPO / "data" / f"{corpus_name}-{tokenizer.name}"
    finished = open_data(out) if (out / "COMPLETE").exists() else None
    if not finished and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is in the way: it is not a finished data folder and not empty; give another --out")

    partial = Path(os.path.abspath(out) + ".partial")
    if not finished and partial.exists():
        if any(path.suffix not in (".bin", ".tmp", ".json") and path.name != "COMPLETE" for path in partial.iterdir()):
            raise DataError(f"{partial} is in the way: it holds files that data/prepare.py did not write; give another --out")
        note(f"removing what an interrupted run left in {partial}")
        shutil.rmtree(partial)
    try:
        if not finished:
            partial.mkdir(parents=True)
        seen = survey(corpus, source)
        if not seen.documents:
            raise DataError(f"there is no text in {source}: {seen.empty} documents, all empty")
        exact = corpus.sha256 in (None, seen.sha256)
        if not exact:
            note(f"the source's {seen.documents} documents are not exactly those of {corpus.revision}; no revision is recorded")
        plan = {
            "dataset": corpus_name, "revision": corpus.revision if exact else None,
            "source": {"documents": seen.documents, "empty": seen.empty, "bytes": seen.bytes, "sha256": seen.sha256},
            "tokenizer": {key: getattr(tokenizer, key) for key in ("name", "sha256", "n_vocab", "eot")},
            "vocab_size": tokenizer.n_vocab, "dtype": tokenizer.dtype.name, "shard_tokens": shard_tokens,
            "val_rule": validation_rule(corpus, seen, tokenizer, val_tokens)}
        if finished:
            there = finished.manifest
            differ = [f"{key} {there[key]} there, {plan[key]} now" for key in plan if there[key] != plan[key]]
            if differ:
                raise DataError(f"{out} was made from other text or with other options ({'; '.join(differ)}); "
                                f"give another --out, or delete it")
            print(f"{out} is complete and as it should be; nothing to do")
            return finished
        write_data(partial, plan, corpus, source, workers)
        open_data(partial)  # what was meant to be written is there
        os.replace(partial, out)
    except OSError as error:
        advice = "; make room and run the same command again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise DataError(f"{error.filename or partial}: {error.strerror or error}{advice}") from error
    except BrokenProcessPool:
        raise DataError("a worker process died, perhaps for want of memory; try fewer --workers") from None
    finally:
        if not finished:
            shutil.rmtree(partial, ignore_errors=True)
    return open_data(out, verify=False)


def summary(data):
    """One line: documents, tokens, bytes per token, long documents."""
    parts = []
    for split, shards in data.manifest["splits"].items():
        total = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes")}
        parts.append(f"{split} {total['tokens']:,} tokens in {total['documents']:,} documents and {len(shards)} shards "
                     f"({total['bytes'] / (total['tokens'] - total['documents']):.3f} bytes a token)")
    parts.append(f"val_long {len(data.manifest['val_long'])} documents of at least {data.manifest['val_long_tokens']:,} tokens")
    return f"{data.folder}: {'; '.join(parts)}"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="data/prepare.py", description="Make a data folder of token shards from a corpus.", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="corpora:\n" + "\n".join(f"  {name}: {c.description}. Licence: {c.licence}." for name, c in CORPORA.items()))
    parser.add_argument("corpus", metavar="CORPUS", help=f"one of {', '.join(CORPORA)}; see below")
    parser.add_argument("--out", metavar="DIR", help="folder to make (default: data/CORPUS-TOKENIZER in this repository)")
    parser.add_argument("--source", metavar="PATH", help="file or folder of .txt, .jsonl (.gz, .xz, .zst) or .parquet to read")
    defaults = ", ".join(f"{corpus.tokenizer} for {name}" for name, corpus in CORPORA.items())
    parser.add_argument("--tokenizer", metavar="NAME", help=f"{' or '.join(TOKENIZERS)} (default: {defaults})")
    parser.add_argument("--shard_tokens", metavar="N", type=int, default=SHARD_TOKENS,
                        help="start a new shard rather than exceed this many tokens; a longer document has a shard to "
                             "itself (default: %(default)s)")
    parser.add_argument("--val_tokens", metavar="N", type=int,
                        help="tokens to aim at for validation, which takes whole documents by the hash of their text; not for "
                             f"corpora that name their validation documents (default: {VAL_FRACTION:.0%}% of an estimate)")
    parser.add_argument("--workers", metavar="N", type=int, default=1,
                        help="processes that tokenize; any number makes the same bytes (default: %(default)s)")
    args, extra = parser.parse_known_args(arguments)
    try:
        if extra:
            raise unknown("argument", extra[0].split("=")[0], [f"--{name}" for name in vars(args) if name != "corpus"])
        print(summary(prepare(args.corpus, args.out, args.source, args.tokenizer,
                              args.shard_tokens, args.val_tokens, args.workers)))
    except DataError as error:
        sys.exit(f"prepare: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare: interrupted, nothing was left behind; the same command starts again")


if __name__ == "__main__":
    main()
