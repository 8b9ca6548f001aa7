"""The command: every document comes back, any number of workers makes the same bytes, and mistakes are explained."""

import collections
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from preparing import (
    TEXTS,
    all_documents,
    contents,
    documents,
    files,
    finish,
    shard_contents,
    start,
    times,
    verses,
    write_jsonl,
    write_parquet,
)

from data.encode import encode_units
from data.plan import Request, make_plan
from data.prepare import main, prepare, unescaped
from data.shards import DataError, fingerprint, open_data
from data.summary import lengths_figure, quantile
from data.tokenizer import load_tokenizer
from data.units import Sizes, cut_group
from nanope import REPO

# ---- what is made ----


def test_every_document_comes_back(corpus, whole):
    texts = [text for text in corpus[1] if text and text.strip()]
    manifest = whole.manifest
    assert manifest["groups"] == 3 and len(manifest["splits"]["train"]) > 15  # many units, several shards in some
    threshold = manifest["val_rule"]["sha256_fraction_below"]
    val = [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < threshold for text in texts]
    assert documents(whole, "val") == list(itertools.compress(texts, val))
    assert documents(whole, "train") == [text for text, there in zip(texts, val) if not there]
    assert not set(documents(whole, "val")) & set(documents(whole, "train"))
    assert manifest["source"]["documents"] == len(texts) and manifest["source"]["empty"] == 3
    assert manifest["source"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["dataset"] == "fineweb-edu" and manifest["revision"] is None
    assert manifest["tokenizer"]["version"].startswith("tiktoken ")
    assert all(record["tokens"] <= 20_000 for records in manifest["splits"].values() for record in records)
    assert manifest["val_rule"]["val_bytes"] == 86_000 and 10_000 < len(whole.split("val")) < 30_000
    there = sorted(["COMPLETE", "manifest.json", "lengths.png", *shard_contents(whole.folder)])
    assert sorted(contents(whole.folder)) == there


@pytest.mark.slow
def test_lengths_are_counted(whole):
    """The histogram that the manifest sums over shards, its quantiles and its figure."""
    for split in ("train", "val"):
        lengths = np.array([len(load_tokenizer("gpt2").encode(text)) for text in documents(whole, split)])
        counts = whole.manifest["lengths"][split]
        assert sum(counts.values()) == len(lengths)
        for share in (0.05, 0.5, 0.95):
            exact = np.quantile(lengths, share, method="inverted_cdf")
            assert quantile(counts, share) == pytest.approx(exact, rel=0.05)
    figure = (whole.folder / "lengths.png").read_bytes()
    assert figure.startswith(b"\x89PNG") and figure == lengths_figure(whole.manifest["lengths"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_make_the_same_bytes(corpus, whole, tmp_path, workers):
    finish(start(tmp_path / "out", "--workers", workers, source=corpus[0]))
    assert contents(tmp_path / "out") == contents(whole.folder)


@pytest.mark.slow
def test_threads_make_the_same_bytes(corpus, tmp_path):
    """Without processes: one unit or little text is shared among threads, and a long document is cut in pieces."""
    cut, uncut = Sizes(batch=30_000, piece=500), Sizes(batch=30_000, piece=10**9)
    one, three = (prepare("fineweb-edu", tmp_path / str(n), corpus[0], workers=n, sizes=cut) for n in (1, 3))
    assert contents(one.folder) == contents(three.folder)
    assert contents(prepare("fineweb-edu", tmp_path / "uncut", corpus[0], sizes=uncut).folder) == contents(one.folder)


def test_threads_make_the_same_shards_of_one_unit(tmp_path, source):
    options = {"tokenizer": "gpt2", "shard_tokens": 3000, "sizes": Sizes(batch=2000)}  # some 40 batches
    one = files(tmp_path, source, "one", **options)
    two = files(tmp_path, source, "two", workers=2, **options)
    assert len(one.manifest["splits"]["train"]) > 3
    assert contents(one.folder) == contents(two.folder)


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
    """A corpus twenty times the size takes no more memory, and a long document some times its own size."""

    def peak(texts):
        """In MB."""
        path = write_parquet(tmp_path / f"{len(texts)}.parquet", texts, row_group_size=100)
        code = (
            f"from data.build import prepare\n"
            f"prepare('fineweb-edu', {str(tmp_path / str(len(texts)))!r}, {str(path)!r}, 'byte', val_tokens=200_000)\n"
            f"print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )  # not ru_maxrss: a child inherits that from its parent
        run = subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, capture_output=True, text=True)
        return int(run.stdout.split()[-2]) / 1024

    texts = verses(600)
    small = peak(texts)
    large = peak([f"{i} {text}" for i in range(20) for text in texts])
    long = peak([*texts, "".join(texts) * 10])
    assert large < small + 25, (small, large)  # the larger corpus has 25 MB more
    assert long < small + 14 * 13, (small, long)  # one of 13 MB


# ---- a folder that is there ----


def test_second_run_verifies_and_refuses_other_options(tmp_path, source, capsys):
    folder = files(tmp_path, source).folder
    before, made = contents(folder), times(folder)
    capsys.readouterr()
    files(tmp_path, source)
    assert "nothing to do" in capsys.readouterr().out
    for options, message in (
        (dict(tokenizer="gpt2"), "tokenizer"),
        (dict(shard_tokens=99), "shard_tokens"),
        (dict(val_tokens=9999), "val_tokens"),
        (dict(val_bytes=9999), "val_bytes"),
        (dict(skip_bad=True), "skip_bad"),
    ):
        with pytest.raises(DataError, match=f"other options.*{message}"):
            files(tmp_path, source, **options)
    other = write_jsonl(tmp_path / "other.jsonl", TEXTS[::-1])  # the same counts
    with pytest.raises(DataError, match="other text"):
        files(tmp_path, other)
    with pytest.raises(DataError, match="dataset"):
        prepare("builtin", folder)
    assert contents(folder) == before and times(folder) == made
    shard = folder / "val_00000.bin"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    with pytest.raises(DataError, match="altered"):
        files(tmp_path, source)


def test_a_folder_of_something_else_is_not_touched(tmp_path, source):
    for name in ("out", "new.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
        with pytest.raises(DataError, match=f"{name} is in the way"):
            files(tmp_path, source, name.removesuffix(".partial"))
        assert contents(tmp_path / name) == {"thesis.tex": b"mine"}
    (tmp_path / "empty").mkdir()
    assert len(files(tmp_path, source, "empty").split("train"))


@pytest.mark.parametrize("stopped", [False, True])
def test_text_that_changes_between_the_samples_of_a_file_is_noticed(tmp_path, stopped, monkeypatch):
    """A file's identity looks at 64 KiB of it. Else a run that continues would join documents of two texts."""
    lines = [f"{i:05d} {'word ' * 50}" for i in range(4000)]
    source = write_jsonl(tmp_path / "a.jsonl", lines)
    if stopped:
        with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
            during.setattr("data.build.join_units", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
            files(tmp_path, source)
    else:
        files(tmp_path, source)
    before = fingerprint(source)
    lines[2001] = lines[2001].replace("word", "WORD")
    write_jsonl(source, lines)
    assert fingerprint(source) == before
    with pytest.raises(DataError, match="other text in the source"):
        files(tmp_path, source)


def test_names_that_are_not_utf8_do_not_stop_a_run(tmp_path):
    source = Path(os.fsdecode(bytes(tmp_path / "caf") + b"\xe9.jsonl"))
    source.write_text('{"text": "one"}\nno JSON\n{"text": "two"}\n')
    data = files(tmp_path, source, skip_bad=True)
    assert data.manifest["source"]["bad"] and sorted(all_documents(data)) == ["one", "two"]


# ---- the command ----


def test_command_line(tmp_path, source):
    """As a user starts it: a script, from another folder, with processes of its own."""
    command = [sys.executable, REPO / "data" / "prepare.py", "files", "--source", source, "--out", "here"]
    command += ["--workers", "2", "--tokenizer", "byte"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    total = sum(len(text.encode()) + 1 for text in TEXTS)
    data = open_data(tmp_path / "here")
    assert len(data.split("train")) + len(data.split("val")) == total
    assert f"train {len(data.split('train')):,} tokens" in run.stdout and "1.000 bytes a token" in run.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "which corpus? One of builtin, builtin-verses, novels"),
        ("bultin", "'bultin'; did you mean 'builtin'"),
        ("builtin --toknizer byte", "'--toknizer'; did you mean '--tokenizer'"),
        ("builtin --tokenizer bite", "'bite'; did you mean 'byte'"),
        ("builtin --shard_tokens 0", "--shard_tokens must be at least 1, not 0"),
        ("builtin --val_tokens -3", "--val_tokens must be at least 1, not -3"),
        ("builtin --long_tokens 0", "--long_tokens must be at least 1, not 0"),
        ("builtin --workers 0", "--workers must be at least 1, not 0"),
        ("builtin --workers 0 --dry_run", "--workers must be at least 1, not 0"),
        ("builtin --val_tokens 9", "names its validation documents"),
        ("builtin --val_bytes 9", "names its validation documents"),
        ("files --source IN --val_bytes 9 --val_tokens 9", "give one"),
        ("files --source IN --dataset x --streaming", "--dataset, --streaming: only for the corpus hub, not for files"),
        ("hub", "hub needs --dataset NAME"),
        ("hub --split train", "hub needs --dataset NAME"),
        ("hub --dataset x --source IN", "corpus hub takes no --source"),
        ("hub --dataset x --separator y", "--separator does not apply"),
        ("hub --dataset x --subset y", "--config"),
        ("hub --dataset x --keep_downloads", "--keep_downloads does not apply"),
        ("builtin --source IN", "corpus builtin takes no --source"),
        ("builtin --out FILE/x", "Not a directory"),
        ("builtin --out FILE", "is in the way"),
        ("files", "files needs --source"),
        ("files --dry_run", "files needs --source"),
        ("files --source IN/no", "no does not exist"),
        ("fineweb-edu --source IN", "no .txt, .jsonl, .parquet file"),
        ("fineweb-edu --source IN --part 0/3", "from 1 to n"),
        ("fineweb-edu --source IN --part 4/3", "from 1 to n"),
        ("fineweb-edu --source IN --part x", "for example 1/4"),
        ("fineweb-edu --source IN --part 1/2 --merge", "do not go together"),
        ("fineweb-edu --source IN --merge", "nothing to merge"),
    ],
)
def test_user_mistakes(arguments, message, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("x")
    words = arguments.replace("IN", str(tmp_path / "in")).replace("FILE", __file__).split()
    with pytest.raises(SystemExit) as stop:
        main(words if "--out" in words else [*words, "--out", str(tmp_path / "out")])
    assert str(stop.value).startswith("prepare: ") and message in str(stop.value)  # to stderr, with exit status 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_worker_s_error_names_the_document(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:5] + [" " * 1_500_000 + "x"])
    with pytest.raises(DataError, match="document a.jsonl:6"):
        files(tmp_path, path, tokenizer="gpt2", workers=2)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_too_little_room(corpus, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10_000))
    with pytest.raises(DataError, match="needs about 0.0 GB, and 0.0 GB are free; give an --out on another disk"):
        prepare("fineweb-edu", tmp_path / "out", corpus[0])
    assert not any(tmp_path.iterdir())


# ---- fields and separators ----


def test_field_and_separator_are_in_the_manifest_where_they_change_something(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "1", "body": "one"}\n{"text": "2", "body": "two"}\n')
    default = files(tmp_path, folder, "default")
    assert contents(files(tmp_path, folder, "named", field="text").folder) == contents(default.folder)
    assert not {"field", "separator"} & set(default.manifest)
    with pytest.raises(DataError, match="field None there, 'body' now"):
        files(tmp_path, folder, "default", field="body")
    body = files(tmp_path, folder, "body", field="body")
    assert all_documents(body) == ["one", "two"] and body.manifest["field"] == "body"
    assert contents(files(tmp_path, folder, "body", field="body").folder) == contents(body.folder)
    (folder / "b.txt").write_text("--\nthree\n--\nfour\n--\n\n--\nfive\n--\n")
    data = files(tmp_path, folder, "separated", separator="--\n")
    assert all_documents(data) == ["1", "2", "five\n", "four\n", "three\n"]
    assert data.manifest["separator"] == "--\n" and data.manifest["source"]["empty"] == 1
    with pytest.raises(DataError, match=r"separator '--\\n' there, None now"):
        files(tmp_path, folder, "separated")


def test_escapes_of_a_separator():
    assert unescaped(r"<|endoftext|>\n") == "<|endoftext|>\n" and unescaped(r"é\\n\t\x1e\u2028") == "é\\n\t\x1e\u2028"
    for wrong in (r"\q", r"\x1", "end\\"):
        with pytest.raises(DataError, match=r"no escape begins with .*; a backslash is \\\\"):
            unescaped(wrong)


@pytest.mark.parametrize("threads, ahead", [(1, False), (2, True)])
def test_threads_have_the_next_unit_before_a_unit_ends(tmp_path, source, threads, ahead):
    options = {"shard_tokens": 10**6, "val_tokens": None, "val_bytes": None, "long_tokens": 10, "skip_bad": False}
    request = Request.checked("files", None, source, "byte", options)
    _, found = request.files(None)
    plan = make_plan(request, None, found, Sizes(least_unit=20_000))
    units, events = cut_group(0, found, request.corpus, plan["unit_bytes"]), []

    def coming():
        for unit in units:
            events.append(("asked for", unit.id.index))
            yield unit

    def done(unit):
        events.append(("done", unit.id.index))

    encode_units(coming(), tmp_path, plan, lambda *counts, found=False: None, done, threads)
    assert [index for what, index in events if what == "done"] == [*range(len(units))] and len(units) > 2
    assert (events.index(("asked for", 1)) < events.index(("done", 0))) == ahead
