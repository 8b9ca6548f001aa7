"""Speed of data preparation against tiktoken alone, and its peak memory, in one interleaved run.

    python scripts/bench_data.py --source PATH          # of `novels`: a clone, or the .jsonl of {id, text}; --copies 2 …

The novels are written as parquet of FineWeb-Edu's schema, once cut into documents of about 4 kB and once whole. Turn by
turn are then timed
    prepare   data/prepare.py as a user starts it: start-up, reading, hashing, tokenizing, writing, verifying
    threads   tiktoken's encode_ordinary_batch on texts in memory, all cores as threads: no files, nothing kept
    processes the same in one process a core, texts there before the clock starts
    arrays    as processes, with encode_to_numpy, which spares the lists and is what prepare uses
    loop      one process that reads, encodes document by document and writes one file: no hashes, no manifest
What prepare needs for a corpus of one document is its start-up; a corpus of gigabytes does not notice it. The first round
is a warm-up. Ratios are taken within a round, and their median is printed.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _root

from nanope import REPO

FLOOR = 0.9  # of the better of threads and processes
MEMORY_LIMIT = 1.5e9  # bytes, of all processes of prepare with 2 workers
CUT = 4096


def write_parquet(path, texts):
    """FineWeb-Edu's columns, in row groups of 1,000 documents."""
    import pyarrow
    import pyarrow.parquet

    n = len(texts)
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{i}>" for i in range(n)],
        "dump": ["CC-MAIN-2024-10"] * n,
        "url": [f"https://example.org/{i}" for i in range(n)],
        "file_path": ["s3://none"] * n,
        "language": ["en"] * n,
        "language_score": [0.9] * n,
        "token_count": [len(t) // 4 for t in texts],
        "score": [3.0] * n,
        "int_score": [3] * n,
    }
    pyarrow.parquet.write_table(
        pyarrow.table(columns), path, row_group_size=1000 if n > 1000 else 8, compression="snappy"
    )


def read_texts(path):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, columns=["text"]).column(0).to_pylist()


def encoding():
    """tiktoken's own, from the vocabulary in data/."""
    import tiktoken

    from data.tokenizer import GPT2_PATTERN, load_tokenizer

    ranks = {token: i for i, token in enumerate(load_tokenizer("gpt2").tokens)}
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


def raw_process(path, share, shares, pipe):
    texts, raw = read_texts(path)[share::shares], encoding()
    raw.encode_ordinary("warm")
    while way := pipe.recv():
        for i in range(0, len(texts), 256):
            if way == "processes":
                raw.encode_ordinary_batch(texts[i : i + 256], num_threads=1)
            else:
                for text in texts[i : i + 256]:
                    raw.encode_to_numpy(text, disallowed_special=())
        pipe.send("done")


def loop(path, out):
    """What a plain script does."""
    import numpy as np
    import pyarrow.parquet

    raw = encoding()
    with open(out, "wb") as f:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000, columns=["text"]):
            for text in batch.column(0).to_pylist():
                f.write(np.array([*raw.encode_ordinary(text), 50256], np.uint16).tobytes())


def memory_of(pid):
    """Resident bytes of a process and its children that no other shares: proportional set size."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if pid in (int(entry.name), parent):
                    total += next(
                        int(line.split()[1]) * 1024 for line in open(entry / "smaps_rollup") if line.startswith("Pss:")
                    )
            except (OSError, StopIteration, ValueError):
                pass
    return total


def prepare(path, out, workers, watch=False):
    """(seconds, peak bytes or 0) of the command."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [
            sys.executable,
            REPO / "data" / "prepare.py",
            "fineweb-edu",
            "--source",
            path,
            "--out",
            out,
            "--workers",
            str(workers),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while watch and process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.05)
    error = process.communicate()[1]
    if process.returncode:
        sys.exit(f"error: prepare failed: {error[-1000:]}")
    return time.perf_counter() - start, peak


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="scripts/bench_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--source", required=True, help="the corpus novels: a clone of its repository, or a .jsonl of {id, text}"
    )
    parser.add_argument(
        "--copies", type=int, default=1, help="how often the novels are repeated, each time cut elsewhere (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one warm-up (default: 3)")
    parser.add_argument("--workers", type=int, help="processes and threads (default: all cores)")
    args = parser.parse_args(arguments)

    from data.corpora import CORPORA
    from data.shards import cores, open_data
    from data.sources import source_files

    workers = args.workers or cores()
    corpus = CORPORA["novels"]
    novels = [text for _, text in corpus.reader(source_files(corpus, None, args.source, None)[1][0])]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        kinds = {
            "documents of 4 kB": [
                text[max(i, 0) : i + CUT]
                for copy in range(args.copies)
                for text in novels
                for i in range(-(copy * 531 % CUT), len(text), CUT)
                if text[max(i, 0) : i + CUT].strip()
            ],
            "whole novels": [f"{copy}\n{text}" if copy else text for copy in range(args.copies) for text in novels],
        }
        write_parquet(folder / "one.parquet", ["A single document.\n" * 50, "Another one.\n" * 50])
        print(f"{os.cpu_count()} cores, {workers} workers; medians of {args.rounds} rounds\n")
        print("| corpus | | tokens/s | prepare relative to it (min … max) | less start-up |\n|---|---|--:|--:|--:|")
        for kind, texts in kinds.items():
            path = folder / "novels.parquet"
            write_parquet(path, texts)
            pipes, children = [], []
            for share in range(workers):
                ours, theirs = context.Pipe()
                children.append(context.Process(target=raw_process, args=(path, share, workers, theirs), daemon=True))
                children[-1].start()
                pipes.append(ours)
            raw, seconds, peak = (
                encoding(),
                {name: [] for name in ("prepare", "start-up", "threads", "processes", "arrays", "loop")},
                0,
            )
            for round_ in range(args.rounds + 1):
                taken = {"start-up": prepare(folder / "one.parquet", folder / f"one{round_}{kind[:3]}", workers)[0]}
                out = folder / f"out{round_}{kind[:3]}"
                taken["prepare"], bytes_ = prepare(path, out, workers, watch=round_ == 0)
                peak = max(peak, bytes_)
                start = time.perf_counter()
                for i in range(0, len(texts), 1024):
                    raw.encode_ordinary_batch(texts[i : i + 1024], num_threads=workers)
                taken["threads"] = time.perf_counter() - start
                for way in ("processes", "arrays"):
                    start = time.perf_counter()
                    for pipe in pipes:
                        pipe.send(way)
                    for pipe in pipes:
                        pipe.recv()
                    taken[way] = time.perf_counter() - start
                start = time.perf_counter()
                loop(path, folder / "loop.bin")
                taken["loop"] = time.perf_counter() - start
                if round_:
                    for name, value in taken.items():
                        seconds[name].append(value)
                print(f"{kind}, round {round_} of {args.rounds}", end="\r", file=sys.stderr, flush=True)
            for pipe in pipes:
                pipe.send(None)
            data = open_data(out)
            tokens = sum(len(data.split(split)) for split in ("train", "val"))
            size = sum(len(text.encode()) for text in texts)
            best = [min(pair) for pair in zip(seconds["threads"], seconds["processes"])]
            rows = {
                "prepare": seconds["prepare"],
                "tiktoken, threads": seconds["threads"],
                "tiktoken, processes": seconds["processes"],
                "tiktoken, the better": best,
                "tiktoken to arrays, processes": seconds["arrays"],
                "plain loop": seconds["loop"],
            }
            for name, values in rows.items():
                line = f"| {kind} | {name} | {tokens / statistics.median(values):,.0f} |"
                if name != "prepare":
                    whole = [b / a for a, b in zip(seconds["prepare"], values)]
                    warm = [b / (a - s) for a, b, s in zip(seconds["prepare"], values, seconds["start-up"])]
                    line += f" {statistics.median(whole):.2f} ({min(whole):.2f} … {max(whole):.2f}) | {statistics.median(warm):.2f} |"
                print(line + (" | |" if name == "prepare" else ""))
            print(
                f"\n{len(texts):,} documents, {size / 1e6:.1f} MB, {tokens:,} tokens; start-up {statistics.median(seconds['start-up']):.2f} s of "
                f"{statistics.median(seconds['prepare']):.2f} s; peak memory of all processes {peak / 1e6:,.0f} MB (limit {MEMORY_LIMIT / 1e6:,.0f}); "
                f"floor {FLOOR} of the better\n"
            )


if __name__ == "__main__":
    main()
