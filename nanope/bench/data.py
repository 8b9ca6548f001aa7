"""Speed of data preparation against tiktoken alone, and its peak memory, in one interleaved run.

    python scripts/bench.py data --source PATH     # of `novels`: a clone, or the .jsonl of {id, text}; --copies 2 …

The novels are written as parquet of FineWeb-Edu's schema, once cut into documents of about 4 kB and once whole. Turn by
turn are then timed
    prepare   data/prepare.py as a user starts it: start-up, reading, hashing, tokenizing, writing, verifying
    threads   tiktoken's encode_ordinary_batch on texts in memory, all cores as threads: no files, nothing kept
    processes the same in one process a core, texts there before the clock starts
    arrays    as processes, with encode_to_numpy, which spares the lists and is what prepare uses
    loop      one process that reads, encodes document by document and writes one file: no hashes, no manifest
What prepare needs for a corpus of one document is its start-up; a corpus of gigabytes does not notice it.
The first round is a warm-up. Ratios are taken within a round, and their median is printed.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from data.corpora import CORPORA
from data.shards import cores, open_data, output
from data.sources import source_files
from data.tokenizer import GPT2_PATTERN, load_tokenizer
from nanope import REPO
from nanope.bench.turns import Worker, check_counts, command_line, heading, ratios, row, spread, take_turns, workers

FLOOR = 0.9  # of the better of threads and processes
MEMORY_LIMIT = 1.5e9  # bytes, of all processes of prepare with 2 workers
CUT = 4096  # characters of a short document

# ---- the corpus


def documents(novels: list[str], copies: int) -> dict[str, list[str]]:
    """The two corpora: {name: texts}. Each copy is cut elsewhere, or begins with its number, so that copies differ."""
    cuts = [
        text[max(i, 0) : i + CUT]
        for copy in range(copies)
        for text in novels
        for i in range(-(copy * 531 % CUT), len(text), CUT)
    ]
    return {
        "documents of 4 kB": [text for text in cuts if text.strip()],
        "whole novels": [f"{copy}\n{text}" if copy else text for copy in range(copies) for text in novels],
    }


def write_parquet(path: Path, texts: list[str]) -> None:
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


def read_texts(path: Path) -> list[str]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, columns=["text"]).column(0).to_pylist()


# ---- the ways of encoding it


def prepare(path: Path, out: Path, processes: int, watch: bool = False) -> tuple[float, int]:
    """(seconds, peak bytes of all its processes) of the command. The bytes are 0 unless `watch`, which costs time."""
    start, peak = time.perf_counter(), 0
    command = [sys.executable, REPO / "data" / "prepare.py", "fineweb-edu"]
    command += ["--source", path, "--out", out, "--workers", str(processes)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while watch and process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.05)
    error = process.communicate()[1]
    if process.returncode:
        sys.exit(f"error: prepare failed: {error[-1000:]}")
    return time.perf_counter() - start, peak


def memory_of(pid: int) -> int:
    """Bytes that a process and its children keep in memory (proportional set size: shared pages count in parts)."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if pid in (int(entry.name), parent):
                    lines = (entry / "smaps_rollup").read_text().splitlines()
                    total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
            except (OSError, StopIteration, ValueError):  # it has ended
                pass
    return total


def encoding():
    """tiktoken's own, from the vocabulary in data/."""
    import tiktoken

    ranks = {token: i for i, token in enumerate(load_tokenizer("gpt2").tokens)}
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


def encoder(path: Path, share: int, shares: int) -> Callable[[str], None]:
    """A worker: holds its share of the texts, and encodes them in the way that a message names."""
    texts, raw = read_texts(path)[share::shares], encoding()
    raw.encode_ordinary("warm")

    def encode(way: str) -> None:
        for i in range(0, len(texts), 256):
            if way == "processes":
                raw.encode_ordinary_batch(texts[i : i + 256], num_threads=1)
            else:
                for text in texts[i : i + 256]:
                    raw.encode_to_numpy(text, disallowed_special=())

    return encode


def loop(path: Path, out: Path) -> None:
    """What a plain script does."""
    import numpy as np
    import pyarrow.parquet

    raw = encoding()
    with open(out, "wb") as f:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000, columns=["text"]):
            for text in batch.column(0).to_pylist():
                f.write(np.array([*raw.encode_ordinary(text), 50256], np.uint16).tobytes())


def timed(function: Callable, *arguments) -> float:
    """Seconds."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


# ---- the measurement


def measure(kind: str, texts: list[str], folder: Path, processes: int, rounds: int) -> tuple[dict, int, int]:
    """{way: seconds of each counted round}, the peak bytes of prepare, and the tokens that it made."""
    folder.mkdir()
    path, one = folder / "novels.parquet", folder / "one.parquet"
    write_parquet(path, texts)
    write_parquet(one, ["A single document.\n" * 50, "Another one.\n" * 50])
    raw = encoding()

    def threads() -> None:
        for i in range(0, len(texts), 1024):
            raw.encode_ordinary_batch(texts[i : i + 1024], num_threads=processes)

    def at_once(way: str) -> None:
        for worker in encoders:
            worker.send(way)
        for worker in encoders:
            worker.receive()

    found = (Worker("tiktoken", encoder, path, share, processes) for share in range(processes))
    with workers(found) as encoders:
        ways = {
            "start-up": lambda round_: prepare(one, folder / f"one{round_}", processes),
            "prepare": lambda round_: prepare(path, folder / f"out{round_}", processes, watch=round_ == 0),
            "threads": lambda _: (timed(threads), 0),
            "processes": lambda _: (timed(at_once, "processes"), 0),
            "arrays": lambda _: (timed(at_once, "arrays"), 0),
            "loop": lambda _: (timed(loop, path, folder / "loop.bin"), 0),
        }
        answers = take_turns(ways, rounds, f"{kind}, ")
    data = open_data(folder / f"out{rounds}")
    tokens = sum(len(data.split(split)) for split in ("train", "val"))
    seconds = {way: [taken for taken, _ in of_rounds[1:]] for way, of_rounds in answers.items()}
    return seconds, max(peak for _, peak in answers["prepare"]), tokens


def table(kind: str, seconds: dict, tokens: int) -> list[str]:
    """A row for each way: its speed, and relative to it that of prepare, with and without prepare's start-up."""
    prepared, start_up = seconds["prepare"], seconds["start-up"]
    warm = [whole - start for whole, start in zip(prepared, start_up)]
    ways = {
        "tiktoken, threads": seconds["threads"],
        "tiktoken, processes": seconds["processes"],
        "tiktoken, the better": [min(pair) for pair in zip(seconds["threads"], seconds["processes"])],
        "tiktoken to arrays, processes": seconds["arrays"],
        "plain loop": seconds["loop"],
    }
    lines = [row(kind, "prepare", f"{tokens / statistics.median(prepared):,.0f}", "", "")]
    for name, taken in ways.items():
        speed, less = f"{tokens / statistics.median(taken):,.0f}", f"{statistics.median(ratios(taken, warm)):.2f}"
        lines.append(row(kind, name, speed, spread(ratios(taken, prepared), 2), less))
    return lines


def main(arguments: list[str]) -> None:
    parser = command_line("scripts/bench.py data", __doc__, rounds=3)
    parser.add_argument(
        "--source", required=True, help="the corpus novels: a clone of its repository, or a .jsonl of {id, text}"
    )
    parser.add_argument(
        "--copies", type=int, default=1, help="how often the novels are repeated, each time cut elsewhere (default: 1)"
    )
    parser.add_argument("--workers", type=int, help="processes and threads (default: all cores)")
    args = parser.parse_args(arguments)
    check_counts(parser, {"rounds": args.rounds})

    processes = args.workers or cores()
    corpus = CORPORA["novels"]
    novels = [text for _, text in corpus.reader(source_files(corpus, None, args.source, None)[1][0])]
    output(f"{os.cpu_count()} cores, {processes} workers; medians of {args.rounds} rounds\n")
    output(heading(2, "corpus", "", "tokens/s", "prepare relative to it (min … max)", "less start-up"))
    with tempfile.TemporaryDirectory() as base:
        for number, (kind, texts) in enumerate(documents(novels, args.copies).items()):
            seconds, peak, tokens = measure(kind, texts, Path(base, str(number)), processes, args.rounds)
            output("\n".join(table(kind, seconds, tokens)))
            start_up, whole = (statistics.median(seconds[way]) for way in ("start-up", "prepare"))
            size = sum(len(text.encode()) for text in texts)
            output(
                f"\n{len(texts):,} documents, {size / 1e6:.1f} MB, {tokens:,} tokens; "
                f"start-up {start_up:.2f} s of {whole:.2f} s; peak memory of all processes {peak / 1e6:,.0f} MB "
                f"(limit {MEMORY_LIMIT / 1e6:,.0f}); floor {FLOOR} of the better\n"
            )
