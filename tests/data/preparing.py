"""What the tests of data/ share: texts, files of them, folders made from them, and the command as a process."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from data.corpora import CORPORA
from data.documents import king_james_file
from data.prepare import prepare
from data.tokenizer import load_tokenizer
from data.units import Sizes
from nanope import REPO

TEXTS = [f"Document {i}.\n" + f"It has {i} lines, naïve ones.\n" * (i % 40 + 1) for i in range(120)]  # about 75 kB


@functools.cache
def verses(count):
    """The first texts, of 20 verses each, of the built-in corpus."""
    texts = []
    for _, book in CORPORA["builtin"].reader(king_james_file()):
        lines = book.splitlines(keepends=True)
        texts += ["".join(lines[i : i + 20]) for i in range(0, len(lines), 20)]
    return texts[:count]


# ---- files ----


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_parquet(path, texts, row_group_size=50):
    """A file of FineWeb-Edu's schema."""
    n = len(texts)
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{i}>" for i in range(n)],
        "dump": ["CC-MAIN-2024-10"] * n,
        "url": [f"https://example.org/{i}" for i in range(n)],
        "file_path": ["s3://none"] * n,
        "language": ["en"] * n,
        "language_score": [0.9] * n,
        "token_count": [len(t or "") // 4 for t in texts],
        "score": [3.1] * n,
        "int_score": [3] * n,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def parquet(table=None, **columns):
    """The bytes of a parquet file."""
    stream = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table or pyarrow.table(columns), stream, row_group_size=40)
    return stream.getvalue().to_pybytes()


def with_damaged_row_group(content, group):
    """The bytes of a parquet file, some of them overwritten."""
    column = pyarrow.parquet.read_metadata(pyarrow.BufferReader(content)).row_group(group).column(0)
    at = column.dictionary_page_offset or column.data_page_offset
    return content[:at] + b"\xff" * 60 + content[at + 60 :]


def zstd(content):
    return pyarrow.Codec("zstd").compress(content).to_pybytes()


# ---- folders ----


def files(folder, source, name="out", tokenizer="byte", **options):
    """The data folder `name` in `folder`, made from texts of one's own."""
    return prepare("files", folder / name, source, tokenizer, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def shard_contents(folder):
    return {name: content for name, content in contents(folder).items() if name.endswith(".bin")}


def times(folder, pattern="*"):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob(pattern)}


def documents(data, split):
    """Every document of a split, decoded from the shard files themselves."""
    tokenizer, texts = load_tokenizer(data.manifest["tokenizer"]["name"]), []
    for record in data.manifest["splits"][split]:
        ids = np.fromfile(data.folder / record["file"], np.dtype(data.manifest["dtype"]).newbyteorder("<"))
        assert ids[-1] == tokenizer.eot  # a shard ends where a document ends
        texts += [tokenizer.decode(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)[:-1]]
    return texts


def all_documents(data):
    return sorted(documents(data, "train") + documents(data, "val"))


# ---- the command as a process ----

SMALL = {"shard_tokens": 20_000, "val_tokens": 20_000, "sizes": Sizes(least_unit=20_000, batch=10_000)}  # as by `start`


def start(out, *options, source=None, corpus="fineweb-edu", val_tokens=20_000, fault=None, env=None, **popen):
    """The command with small units, as a process. fault: see prepare_small.py. env: the environment, if not ours."""
    command = [sys.executable, Path(__file__).with_name("prepare_small.py"), corpus, "--out", out]
    command += ["--shard_tokens", 20_000] + ([] if val_tokens is None else ["--val_tokens", val_tokens])
    command += [] if source is None else ["--source", source]
    command += options if "--workers" in options else ["--workers", 1, *options]
    environment = {name: value for name, value in (env or os.environ).items() if name != "FAULT"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "scripts")])
    if fault:
        environment["FAULT"] = json.dumps(fault)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(part) for part in command], env=environment, **pipes, **popen)


def finish(process, code=0):
    """What the process printed, after its end with this exit status."""
    output, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error
    return output + error
