"""Corpora in FineWeb-Edu's schema: units of work, interruptions, parts, the hub over HTTP, bad input, tokenizers, show.py."""

import base64
import collections
import gzip
import hashlib
import http.server
import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_data import contents, shard_contents, write_jsonl

from data import corpora, show
from data.corpora import CORPORA, Bad, Corpus, File, read_unit, units
from data.prepare import estimate, lengths_figure, main, prepare, quantile, table
from data.shards import DataError, open_data
from data.tokenizer import Tokenizer, load_tokenizer, pieces
from nanope import REPO

# As data/prepare.py, but with small units and processes whatever the size, so that little text takes the ways of much.
SMALL = """
import sys
sys.path.insert(0, {repo!r})
import data.corpora, data.prepare
data.corpora.LEAST_UNIT_BYTES, data.prepare.PROCESS_BYTES, data.prepare.BATCH_CHARACTERS = 20_000, 0, 10_000
{more}
if __name__ == "__main__":
    data.prepare.main()
"""


def verses():
    """The built-in corpus as documents of some 20 verses: text, in order."""
    file = corpora.king_james_file()
    for book, text in CORPORA["builtin"].reader(file):
        lines = text.splitlines(keepends=True)
        for i in range(0, len(lines), 20):
            yield "".join(lines[i : i + 20])


def write_parquet(path, texts, row_group_size=50, **more):
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
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size, **more)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder of three files, their texts in order): 750 documents, some empty, some several times."""
    folder = tmp_path_factory.mktemp("fineweb")
    texts = list(itertools.islice(verses(), 740))
    texts[5:5] = [None, "", " \n", texts[40], texts[40]]
    texts[600:600] = [texts[2]] * 5
    for i, name in enumerate(("000_00000", "001_00000", "002_00000")):
        write_parquet(folder / f"{name}.parquet", texts[i * 250 : (i + 1) * 250])
    return folder, texts


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """What an uninterrupted run with small units makes."""
    out = tmp_path_factory.mktemp("whole") / "data"
    finish(start(corpus[0], out))
    return open_data(out)


def start(source, out, *options, more="", **popen):
    """The command with small units, as a process; `more` is Python to run before it."""
    script = out.parent / "small.py"
    script.write_text(SMALL.format(repo=str(REPO), more=more))
    command = [
        sys.executable,
        script,
        "fineweb-edu",
        "--source",
        source,
        "--out",
        out,
        "--shard_tokens",
        "20000",
        "--val_tokens",
        "20000",
    ]
    options = options if "--workers" in options else ["--workers", "1", *options]
    return subprocess.Popen(
        [str(part) for part in [*command, *options]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def finish(process, code=0):
    output, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error
    return output + error


def documents(data, split):
    """Every document of a split, decoded from the shard files."""
    tokenizer, texts = load_tokenizer(data.manifest["tokenizer"]["name"]), []
    for record in data.manifest["splits"][split]:
        ids = np.fromfile(data.folder / record["file"], data.manifest["dtype"])
        texts += [tokenizer.decode(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)[:-1]]
    return texts


# ---- every document, once, on one side ----


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
    assert (
        manifest["dataset"] == "fineweb-edu"
        and manifest["revision"] is None
        and manifest["tokenizer"]["version"].startswith("tiktoken ")
    )
    assert all(record["tokens"] <= 20_000 for records in manifest["splits"].values() for record in records)
    assert manifest["val_rule"]["val_tokens"] == 20_000 and 10_000 < len(whole.split("val")) < 30_000
    assert sorted(contents(whole.folder)) == sorted(
        ["COMPLETE", "manifest.json", "lengths.png", *shard_contents(whole.folder)]
    )


def test_workers_make_the_same_bytes(corpus, whole, tmp_path):
    for workers in (2, 3):
        finish(start(corpus[0], tmp_path / f"out{workers}", "--workers", workers))
        assert contents(tmp_path / f"out{workers}") == contents(whole.folder)


def test_threads_make_the_same_bytes(corpus, tmp_path, monkeypatch):
    """Without processes: one unit or little text is shared among threads, and a long document is cut in pieces."""
    monkeypatch.setattr("data.prepare.BATCH_CHARACTERS", 30_000)
    monkeypatch.setattr("data.tokenizer.PIECE", 500)
    one, three = (prepare("fineweb-edu", tmp_path / str(n), corpus[0], workers=n) for n in (1, 3))
    assert contents(one.folder) == contents(three.folder)
    monkeypatch.setattr("data.tokenizer.PIECE", 10**9)
    assert contents(prepare("fineweb-edu", tmp_path / "uncut", corpus[0]).folder) == contents(one.folder)


def test_killed_at_ten_random_moments(corpus, whole, tmp_path):
    rng, out = random.Random(int.from_bytes(os.urandom(4), "little")), tmp_path / "data"
    began = time.monotonic()
    finish(start(corpus[0], tmp_path / "timed", "--workers", "2"))
    span, kept, killed = time.monotonic() - began, [], 0
    slow = """
import time
from data.shards import ShardWriter
close = ShardWriter.close
def slow(self):
    time.sleep(0.01)
    return close(self)
ShardWriter.close = slow"""
    while killed < 10:
        process = start(corpus[0], out, "--workers", rng.choice(["1", "2"]), more=slow)
        try:
            process.wait(rng.uniform(0.2 * span, span))
            assert process.returncode == 0, process.stderr.read()
            shutil.rmtree(out)  # it was faster; once more from the beginning
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
            kept.append(len(list((tmp_path / "data.partial").glob("*.bin"))))
            if out.exists():  # only what is whole has the name
                assert contents(out) == contents(whole.folder)
                shutil.rmtree(out)
    finish(start(corpus[0], out))
    assert max(kept) > 0, kept
    assert contents(out) == contents(whole.folder) and not (tmp_path / "data.partial").exists()


@pytest.mark.parametrize("where", ["write_manifest", "open_data", "join_units", "publish", "do_unit"])
def test_killed_at_the_seams(corpus, whole, tmp_path, where):
    """Just before and just after each of the last steps."""
    for when in ("before", "after"):
        more = f"""
import os
original = data.prepare.{where}
def killed(*arguments, **keywords):
    if {when == "before"}:
        os.kill(os.getpid(), 9)
    original(*arguments, **keywords)
    os.kill(os.getpid(), 9)
data.prepare.{where} = killed"""
        process = start(corpus[0], tmp_path / when, more=more)
        process.communicate(timeout=60)
        assert process.returncode == -9
        finish(start(corpus[0], tmp_path / when))
        assert contents(tmp_path / when) == contents(whole.folder)


def test_a_unit_continues_after_its_last_shard(corpus, whole, tmp_path):
    """Finished shards are kept, those after them made anew, and what was half written is not taken for a shard."""
    more = """
import os
from data.shards import ShardWriter
close, closed = ShardWriter.close, []
def closing(self):
    if self._file:
        closed.append(1)
    records = close(self)
    if len(closed) == 5:
        os.kill(os.getpid(), 9)
    return records
ShardWriter.close = closing"""
    start(corpus[0], tmp_path / "out", more=more).communicate(timeout=60)
    partial = tmp_path / "out.partial"
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.bin")}
    unit_records = set(path.name for path in partial.glob("*.unit.json"))
    assert len(before) == 5
    last = max(before)
    (partial / last).with_suffix(".json").unlink()  # as if killed between a shard and its record
    (partial / last).write_bytes(b"half")
    more = "import os\ndata.prepare.join_units = lambda *arguments: os.kill(os.getpid(), 9)"
    start(corpus[0], tmp_path / "out", more=more).communicate(timeout=60)
    after = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.bin")}
    assert {name for name in before if after[name] == before[name]} == set(before) - {last}
    assert len(unit_records) < len(set(partial.glob("*.unit.json")))
    finish(start(corpus[0], tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(whole.folder)


@pytest.mark.parametrize("count", [2, 3, 5])  # by files where there are enough, else by units
def test_parts_merge_to_the_same_bytes(corpus, whole, tmp_path, count):
    out = tmp_path / "out"
    for i in reversed(range(2, count + 1)):
        assert f"part {i} of {count} is done" in finish(start(corpus[0], out, "--part", f"{i}/{count}"))
    assert "is not finished" in finish(start(corpus[0], out, "--merge"), code=1)
    elsewhere = tmp_path / "elsewhere" / "out"  # another machine: the folder is copied
    elsewhere.parent.mkdir()
    finish(start(corpus[0], elsewhere, "--part", f"1/{count}"))
    assert not elsewhere.exists()
    made = [
        set(path.name for path in folder.glob("*.unit.json"))
        for folder in (tmp_path / "out.partial", tmp_path / "elsewhere" / "out.partial")
    ]
    assert all(made) and not made[0] & made[1]
    shutil.copytree(tmp_path / "elsewhere" / "out.partial", tmp_path / "out.partial", dirs_exist_ok=True)
    finish(start("no source is needed", out, "--merge"))
    assert contents(out) == contents(whole.folder)


def test_mistakes_with_parts(corpus, tmp_path):
    for options, message in (
        (["--part", "0/3"], "from 1 to n"),
        (["--part", "4/3"], "from 1 to n"),
        (["--part", "x"], "for example 1/4"),
        (["--part", "1/2", "--merge"], "do not go together"),
        (["--merge"], "nothing to merge"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["fineweb-edu", "--source", str(corpus[0]), "--out", str(tmp_path / "out"), *options])
    assert not any(tmp_path.iterdir())


def test_two_at_once(corpus, tmp_path):
    """A second process is sent away while the first is at work, and a killed one leaves no lock behind."""
    more = """
import time
def wait(*arguments):
    print("working", flush=True)
    time.sleep(60)
data.prepare.do_unit = wait"""
    first = start(corpus[0], tmp_path / "out", more=more)
    assert first.stdout.readline() == "working\n"
    there = set(path.name for path in (tmp_path / "out.partial").iterdir())
    assert "another data/prepare.py is at work" in finish(start(corpus[0], tmp_path / "out"), code=1)
    assert "plan.json" in there and there == set(path.name for path in (tmp_path / "out.partial").iterdir())
    first.kill()
    first.communicate()
    finish(start(corpus[0], tmp_path / "out"))


def test_ctrl_c_and_a_dead_worker(corpus, tmp_path):
    """Processes end with the parent, in an orderly way or not."""
    more = """
import os
report = data.prepare.Progress.__call__
def stop(self, *a, **k):
    {}
    report(self, *a, **k)
data.prepare.Progress.__call__ = stop"""
    for act, code in (
        ("os.killpg(0, 2)", 1),
        ("os.kill(os.getpid(), 9)", -9),
    ):  # a terminal's Ctrl-C goes to the whole group
        process = start(corpus[0], tmp_path / "out", "--workers", "2", more=more.format(act), start_new_session=True)
        _, error = process.communicate(timeout=60)  # returns when all that hold its stderr are gone: workers too
        assert process.returncode == code and "Traceback" not in error
        if code == 1:
            assert "interrupted; the same command continues" in error
    more = """
def kill_workers(self, *a, **k):
    for child in data.prepare.multiprocessing.active_children():
        child.kill()
data.prepare.Progress.__call__ = kill_workers"""
    assert "a worker process died" in finish(start(corpus[0], tmp_path / "out", "--workers", "2", more=more), code=1)
    finish(start(corpus[0], tmp_path / "out", "--workers", "2"))


def test_the_disk(corpus, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10_000))
        with pytest.raises(DataError, match=r"needs about 0.0 GB, and 0.0 GB are free; give an --out on another disk"):
            prepare("fineweb-edu", tmp_path / "out", corpus[0])
        assert not any(tmp_path.iterdir())
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # noqa: E731 - a write fails, as on a full disk
    message = finish(start(corpus[0], tmp_path / "out", preexec_fn=limit), code=1)
    assert "File too large; make room and run the same command again, which continues" in message
    finish(start(corpus[0], tmp_path / "out"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_flat(tmp_path):
    """A corpus twenty times the size takes no more memory, and a long document some times its own size."""

    def peak(texts):
        path = write_parquet(tmp_path / f"{len(texts)}.parquet", texts, row_group_size=100)
        code = (
            f"import sys; sys.path.insert(0, {str(REPO)!r})\nfrom data.prepare import prepare\n"
            f"prepare('fineweb-edu', {str(tmp_path / str(len(texts)))!r}, {str(path)!r}, 'byte', val_tokens=200_000)\n"
            f"print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        # Not ru_maxrss: a child inherits that from its parent.
        return (
            int(
                subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()[
                    -2
                ]
            )
            / 1024
        )

    texts = list(itertools.islice(verses(), 600))
    small, large, long = (
        peak(texts),
        peak([f"{i} {text}" for i in range(20) for text in texts]),
        peak([*texts, "".join(texts) * 10]),
    )
    assert large < small + 25, (small, large)  # MB; the larger corpus has 25 MB more
    assert long < small + 14 * 13, (small, long)  # one of 13 MB


# ---- corpora with splits of their own ----


def test_wikitext_rows_become_articles(tmp_path):
    rows = [
        "",
        " = First = \n",
        "",
        " A line . \n",
        " = not a heading = \n",
        " = = Section = = \n",
        "",
        " 1 = 2 \n",
        "",
        " = Second Title = \n",
        "",
        " Last . \n",
        "",
    ]
    first = " = First = \n\n A line . \n = not a heading = \n = = Section = = \n\n 1 = 2 \n\n"
    cut = {"train": [rows[:5], rows[5:]], "validation": [rows[:8]], "test": [rows[9:]]}
    for split, files in cut.items():
        for i, lines in enumerate(files):  # an article may go on in the next file
            pyarrow.parquet.write_table(
                pyarrow.table({"text": lines}),
                tmp_path / f"{split}-{i:05d}-of-{len(files):05d}.parquet",
                row_group_size=2,
            )
    data = prepare("wikitext-2", tmp_path / "out", tmp_path, "byte", workers=2)
    assert documents(data, "train") == [first, " = Second Title = \n\n Last . \n\n"]
    assert documents(data, "val") == [" = First = \n\n A line . \n = not a heading = \n = = Section = = \n\n 1 = 2 \n"]
    assert documents(data, "test") == [" = Second Title = \n\n Last . \n\n"]
    assert data.manifest["val_rule"] == {"kind": "own"} and list(data.manifest["splits"]) == ["train", "val", "test"]
    with pytest.raises(DataError, match="--val_tokens does not apply.*split of its own"):
        prepare("wikitext-2", tmp_path / "other", tmp_path, "byte", val_tokens=5)
    (tmp_path / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="no file for the split val among .*train-00000-of-00002.parquet"):
        prepare("wikitext-2", tmp_path / "other", tmp_path, "byte")
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="x.parquet: its path should name one split"):
        prepare("wikitext-2", tmp_path / "other", tmp_path, "byte")


def test_ptb_is_one_document_a_split(tmp_path):
    for split, sentences in (("train", ["a b <unk>", "c d"]), ("validation", ["e f"]), ("test", ["g"])):
        (tmp_path / "in" / split).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"sentence": sentences}), tmp_path / "in" / split / "0000.parquet")
    data = prepare("ptb", tmp_path / "out", tmp_path / "in", "byte")
    assert [documents(data, split) for split in ("train", "val", "test")] == [["a b <unk>\nc d\n"], ["e f\n"], ["g\n"]]
    with pytest.raises(DataError, match=r"no text column 'text'; it has sentence \(string\)"):
        prepare("pg19", tmp_path / "pg19", tmp_path / "in", "byte")


# ---- ranges of a file ----


@pytest.mark.parametrize("end", ["\n", ""])
def test_ranges_of_a_jsonl_file_are_the_file(tmp_path, end):
    rng = random.Random(0)
    lines = [json.dumps({"text": "é" * rng.randrange(1, 60)}, ensure_ascii=False) for _ in range(50)]
    lines[7:7] = ["", "  "]
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n".join(lines) + end, encoding="utf-8")
    file = File("a.jsonl", path.stat().st_size, "", path=str(path))
    expected = list(corpora.read_file(file))
    assert len(expected) == 50
    for size in (7, 40, 100, 1000, 10**6):
        cut = units(0, [file], CORPORA["files"], size)
        assert (len(cut) > 1) == (size < file.bytes)
        assert [row for unit in cut for row in read_unit(unit, CORPORA["files"], Bad())] == expected
    path.write_text("\n".join([*lines, "broken"]))
    bad = Bad(skip=True)
    for unit in units(0, [File("a.jsonl", path.stat().st_size, "", path=str(path))], CORPORA["files"], 100):
        collections.deque(read_unit(unit, CORPORA["files"], bad), 0)
    assert bad.counts == {"lines": 1} and "line 53: not JSON" in bad.messages[0]


def test_small_files_share_a_unit_and_large_ones_have_several(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"text {i}\n" * 20)
    write_jsonl(folder / "big.jsonl", list(itertools.islice(verses(), 200)))
    listed = corpora.local_files(CORPORA["files"], folder)
    grouped = corpora.groups(listed, CORPORA["files"], 6000)
    assert [len(group) for group in grouped] == [13, 12, 5, 1]  # of 7 or 8 bytes × 20 each, 2,000 together at most
    assert len(units(3, grouped[3], CORPORA["files"], 100_000)) == round(listed[-1].bytes / 100_000) > 2
    assert sum(grouped, []) == listed


# ---- bad input ----


def damage(path, group):
    content = bytearray(path.read_bytes())
    column = pyarrow.parquet.read_metadata(path).row_group(group).column(0)
    at = column.dictionary_page_offset or column.data_page_offset
    content[at : at + 80] = b"\xff" * 80
    path.write_bytes(content)


def test_a_corrupt_row_group(corpus, tmp_path, capsys):
    folder, texts = tmp_path / "in", corpus[1]
    shutil.copytree(corpus[0], folder)
    damage(folder / "001_00000.parquet", 2)
    with pytest.raises(
        DataError, match=r"001_00000.parquet, row group 2 cannot be read.*--skip_bad goes on without it"
    ):
        prepare("fineweb-edu", tmp_path / "out", folder)
    (folder / "003_00000.parquet").write_bytes(b"PAR1 not at all")
    data = prepare("fineweb-edu", tmp_path / "skipped", folder, val_tokens=20_000, skip_bad=True)
    kept = [text for i, text in enumerate(texts) if text and text.strip() and not 350 <= i < 400]
    assert sorted(documents(data, "train") + documents(data, "val")) == sorted(kept)
    assert data.manifest["source"]["bad"] == {"row groups": 1, "files": 1}
    assert "skipped: " in capsys.readouterr().err
    with pytest.raises(DataError, match="skip_bad True there, False now"):
        prepare("fineweb-edu", tmp_path / "skipped", folder, val_tokens=20_000)


def test_other_bad_input(tmp_path):
    values = pyarrow.array([b"fine", b"caf\xe9", None, b"also fine"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 4, values.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet, row 2: not UTF-8"):
        prepare("files", tmp_path / "out", tmp_path / "a.parquet", "byte")
    data = prepare("files", tmp_path / "out", tmp_path / "a.parquet", "byte", skip_bad=True)
    assert sorted(documents(data, "train") + documents(data, "val")) == ["also fine", "fine"]
    assert data.manifest["source"]["bad"] == {"rows": 1} and data.manifest["source"]["empty"] == 2

    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"], "id": ["y"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: no text column 'text'; it has content \(string\), id \(string\)"):
        prepare("fineweb-edu", tmp_path / "out2", tmp_path / "b.parquet")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.csv").write_text("x")
    with pytest.raises(DataError, match="no .txt, .jsonl, .parquet file"):
        prepare("fineweb-edu", tmp_path / "out2", tmp_path / "none")

    lines = [json.dumps({"text": f"text {i}"}) for i in range(9)]
    lines[3], lines[6] = "{", json.dumps({"text": "x" + " " * 1_500_000 + "y"})  # which tiktoken cannot encode
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:3] * 9).encode())[:-12])
    folder = tmp_path / "cd"
    folder.mkdir()
    for name in ("c.jsonl", "d.jsonl.gz"):
        os.rename(tmp_path / name, folder / name)
    data = prepare("files", tmp_path / "cd-out", folder, "gpt2", skip_bad=True, shard_tokens=4, val_tokens=20)
    assert data.manifest["source"]["bad"] == {"documents": 1, "lines": 1, "files": 1}
    assert set(documents(data, "train") + documents(data, "val")) == {f"text {i}" for i in range(9) if i not in (3, 6)}


def test_no_validation_document(tmp_path, corpus, monkeypatch):
    """A large source is not read beforehand, so that the hash rule took nothing shows at the end."""
    monkeypatch.setattr("data.prepare.SURVEY_BYTES", 0)
    with pytest.raises(
        DataError, match="there is no val document: the source has 747 documents.*give another --val_tokens"
    ):
        prepare("fineweb-edu", tmp_path / "out", corpus[0], val_tokens=1)
    with pytest.raises(DataError, match="is the whole corpus"):
        prepare("fineweb-edu", tmp_path / "out2", corpus[0], val_tokens=10**9)
    data = prepare("fineweb-edu", tmp_path / "out3", corpus[0])  # 5 % of what the metadata let one expect
    assert data.manifest["val_rule"]["val_tokens"] == round(data.manifest["val_rule"]["expected_tokens"] / 20)


# ---- the hub ----


class Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's HTTP interface that huggingface_hub uses to list and download a data set."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = (
            self.server,
            re.sub("^http://hub.invalid", "", self.path.split("?")[0]),
        )  # whole where this is a proxy
        server.asked.append((self.command, path))
        if server.failures:
            return self.answer(server.failures.pop(), b"busy")
        if path == f"/api/datasets/{server.repo}":
            return self.answer(
                200,
                json.dumps({"id": server.repo, "sha": server.commit}).encode(),
                {"Content-Type": "application/json"},
            )
        if path.startswith(f"/api/datasets/{server.repo}/revision/"):
            return self.answer(
                200,
                json.dumps({"id": server.repo, "sha": server.commit}).encode(),
                {"Content-Type": "application/json"},
            )
        if path.startswith(f"/api/datasets/{server.repo}/tree/{server.commit}"):
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(content),
                    "oid": "0" * 40,
                    "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130},
                }
                for name, content in server.files.items()
            ]
            return self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        name = path.removeprefix(f"/datasets/{server.repo}/resolve/{server.commit}/")
        if name in server.files:
            content = server.served.get(name, server.files[name])
            return self.answer(
                200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": server.commit}
            )
        self.answer(404, b"not there", {"X-Error-Code": "EntryNotFound"})

    def answer(self, code, content, headers={}):
        self.send_response(code)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(corpus):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repo, server.commit = CORPORA["fineweb-edu"].repo, CORPORA["fineweb-edu"].revision
    server.files = {f"sample/10BT/{path.name}": path.read_bytes() for path in sorted(corpus[0].iterdir())}
    server.asked, server.failures, server.served = [], [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def from_hub(hub, out, *options, env={}, more=""):
    script = out.parent / "hub.py"
    # The table's sizes are those of the real corpus; here it is small.
    small = """
subsets = data.corpora.CORPORA["fineweb-edu"].subsets
subsets["sample-10BT"] = data.corpora.Subset({"train": "sample/10BT/*.parquet"}, 400_000, 747, 2)
"""
    script.write_text(SMALL.format(repo=str(REPO), more=small + more))
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.lower().endswith("_proxy") and not key.startswith("HF_")
    }
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(out.parent / "home"),
        "HF_HUB_DISABLE_XET": "1",
    } | env
    return subprocess.Popen(
        [
            sys.executable,
            str(script),
            "fineweb-edu",
            "--out",
            str(out),
            "--shard_tokens",
            "20000",
            "--val_tokens",
            "20000",
            "--workers",
            "2",
            *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_from_the_hub(hub, whole, tmp_path, corpus):
    watched = """
units = data.prepare.units
def seen(number, group, *arguments):
    print("files", len(list(data.prepare.Path(group[0].path).parent.glob("*.parquet"))), flush=True)
    return units(number, group, *arguments)
data.prepare.units = seen"""
    hub.failures = [503, 429]  # the library waits and tries again
    output = finish(from_hub(hub, tmp_path / "out", more=watched))
    data = open_data(tmp_path / "out")
    texts = [text for text in corpus[1] if text and text.strip()]
    assert sorted(documents(data, "train") + documents(data, "val")) == sorted(texts)
    assert data.manifest["revision"] == hub.commit and data.manifest["subset"] == "sample-10BT"
    assert data.manifest["val_rule"]["expected_tokens"] == 400_000  # the table's, not what the files have
    assert output.count("files ") == 3 and "files 3" not in output  # never all at once
    assert sum(command == "GET" and "/resolve/" in path for command, path in hub.asked) == 3
    assert not (tmp_path / "out.downloads").exists() and not (tmp_path / "out.partial").exists()
    hub.asked.clear()
    assert "nothing to do" in finish(from_hub(hub, tmp_path / "out"))
    assert not hub.asked  # a folder that is complete is checked without the network
    # interrupted, with downloads kept, and in another place: the same bytes, and what is finished is not fetched again
    killing = "import os\ndata.prepare.join_units = lambda *arguments: os.kill(os.getpid(), 9)"
    from_hub(hub, tmp_path / "again", "--keep_downloads", more=killing).communicate(timeout=60)
    hub.asked.clear()
    finish(from_hub(hub, tmp_path / "again", "--keep_downloads"))
    assert not any("/resolve/" in path for _, path in hub.asked)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    kept = sorted((tmp_path / "again.downloads").rglob("*.parquet"))
    assert [path.read_bytes() for path in kept] == list(hub.files.values())


def test_the_hub_fails(hub, tmp_path):
    hub.files.clear()
    assert "has no file sample/10BT/*.parquet" in finish(from_hub(hub, tmp_path / "out"), code=1)
    message = finish(from_hub(hub, tmp_path / "out", env={"HF_HUB_OFFLINE": "1"}), code=1)
    assert "cannot be fetched" in message and "--source" in message
    assert not (tmp_path / "out.partial").exists()


def test_offline_from_the_cache(hub, whole, tmp_path):
    """What `hf download` brought before is used where it lies; without it, the error says so."""
    out = tmp_path / "out"
    code = (
        f"import huggingface_hub\nhuggingface_hub.snapshot_download({hub.repo!r}, repo_type='dataset', "
        f"revision={hub.commit!r}, allow_patterns='sample/10BT/*.parquet')"
    )
    more = f"import os\nif os.environ.pop('FETCH', None):\n    exec({code!r})\n    raise SystemExit\n"
    finish(from_hub(hub, out, env={"FETCH": "1"}, more=more))
    hub.asked.clear()
    finish(from_hub(hub, out, env={"HF_HUB_OFFLINE": "1"}))
    assert not hub.asked and list((tmp_path / "home").rglob("*.parquet"))  # not deleted: it is not ours
    finish(from_hub(hub, tmp_path / "online"))
    assert contents(out) == contents(tmp_path / "online")


def test_through_a_proxy(hub, tmp_path):
    proxy = {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": f"http://127.0.0.1:{hub.server_address[1]}"}
    finish(from_hub(hub, tmp_path / "out", env=proxy))
    assert open_data(tmp_path / "out").manifest["revision"] == hub.commit


def test_a_download_with_other_bytes_is_refused(hub, tmp_path):
    name = sorted(hub.files)[1]
    good = hub.files[name]
    hub.served[name] = good[:1000] + bytes([good[1000] ^ 1]) + good[1001:]
    assert "001_00000.parquet was not downloaded whole" in finish(from_hub(hub, tmp_path / "out"), code=1)
    hub.served.clear()
    finish(from_hub(hub, tmp_path / "out"))


def test_a_download_that_breaks_can_be_continued(hub, tmp_path):
    """Of three files the last is gone: the first two are done, and the same command continues when it is back."""
    last = sorted(hub.files)[-1]
    gone = """
download = data.prepare.download
def fails(corpus, commit, file, folder):
    if file.name.endswith("002_00000.parquet"):
        while not list(folder.parent.glob("*.unit.json")):  # not before something is finished
            pass
        raise data.prepare.DataError("002_00000.parquet cannot be fetched")
    return download(corpus, commit, file, folder)
data.prepare.download = fails"""
    assert "002_00000.parquet cannot be fetched" in finish(from_hub(hub, tmp_path / "out", more=gone), code=1)
    assert list((tmp_path / "out.partial").glob("*.unit.json"))
    hub.asked.clear()
    finish(from_hub(hub, tmp_path / "out"))
    fetched = [path for command, path in hub.asked if "/resolve/" in path and command == "GET"]
    assert fetched and any(path.endswith(last) for path in fetched)
    assert len(open_data(tmp_path / "out").manifest["splits"]["train"]) > 15


def test_an_archive_from_github(tmp_path, monkeypatch):
    import zipfile

    with zipfile.ZipFile(tmp_path / "repo.zip", "w") as z:
        for name in [*CORPORA["novels"].val, "Austen_A_1811", "Woolf_Years_1937"]:
            z.writestr(f"100_english_novels-143e601/corpus/{name}.txt", f"\ufeff{name}\r\n\r\nText.\r\n")
        z.writestr("100_english_novels-143e601/README.md", "no novel")
    here = Corpus(**(vars(CORPORA["novels"]) | {"archive": (tmp_path / "repo.zip").as_uri(), "sha256": None}))
    monkeypatch.setitem(CORPORA, "novels", here)
    data = prepare("novels", tmp_path / "out", None, "byte")
    assert documents(data, "train") == ["Austen_A_1811\n\nText."]
    assert documents(data, "val") == [f"{name}\n\nText." for name in sorted(CORPORA["novels"].val)]
    assert data.manifest["revision"] == here.revision and not (tmp_path / "out.downloads").exists()
    monkeypatch.setitem(CORPORA, "novels", Corpus(**(vars(here) | {"archive": (tmp_path / "gone.zip").as_uri()})))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(DataError, match="100_english_novels.zip cannot be fetched.*the same command continues"):
        prepare("novels", tmp_path / "out2", None, "byte")
    (tmp_path / "gone.zip").write_bytes((tmp_path / "repo.zip").read_bytes()[:-30])
    with pytest.raises(DataError, match="100_english_novels.zip is damaged.*delete it"):
        prepare("novels", tmp_path / "out2", None, "byte")


def test_a_connection_that_breaks_off(monkeypatch, tmp_path):
    """urllib says nothing when fewer bytes come than were announced; and a 404 is not tried again."""

    class Short(Hub):
        def do_GET(self):
            self.server.asked.append(self.path)
            if self.path == "/gone":
                return self.answer(404, b"")
            self.close_connection = True
            self.answer(200, b"ab", {"Content-Length": "2" if len(self.server.asked) == 3 else "9"})

    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.HTTPServer(("127.0.0.1", 0), Short)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    corpora.fetch(f"{url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"ab" and len(server.asked) == 3 and waits == [1, 2]
    with pytest.raises(OSError, match="404"):
        corpora.fetch(f"{url}/gone", tmp_path / "gone")
    assert len(server.asked) == 4 and not (tmp_path / "gone").exists()
    server.shutdown()
    server.server_close()


def test_the_table(capsys):
    main(["--list"])
    listed = capsys.readouterr().out
    assert listed.strip() == table()
    for name, row in CORPORA.items():
        assert f"{name}: " in listed and row.licence in listed
        if row.repo:
            assert row.repo in listed and row.revision in listed
    assert "sample-350BT" in listed and "field sentence" in listed
    assert corpora.subset_of(CORPORA["fineweb-edu"], "CC-MAIN-2024-10")[1].files == {
        "train": "data/CC-MAIN-2024-10/*.parquet"
    }
    with pytest.raises(DataError, match="'sample-10TB'; did you mean 'sample-10BT'"):
        corpora.subset_of(CORPORA["fineweb-edu"], "sample-10TB")
    with pytest.raises(DataError, match="no subsets"):
        corpora.subset_of(CORPORA["builtin"], "x")


def test_the_estimate(corpus, tmp_path):
    text = estimate("fineweb-edu", workers=2)
    assert (
        text.startswith("fineweb-edu: about 9,950,000,000 tokens")
        and "19.90 GB on disk" in text
        and "28,518 MB to download" in text
        and "minutes" in text
    )
    n_bytes = sum(len((text or "").encode()) for text in corpus[1])
    tokens = int(estimate("fineweb-edu", corpus[0], "byte").split()[2].replace(",", ""))
    assert 0.7 * n_bytes < tokens < 1.4 * n_bytes
    assert not any(tmp_path.iterdir())


# ---- tokenizers ----


def test_pieces_change_no_token(monkeypatch):
    gpt2, rng = load_tokenizer("gpt2"), random.Random(1)
    alphabet = " \n\t\xa0\x1c\u3000ab'sé1.!日\u0301"
    monkeypatch.setattr("data.tokenizer.PIECE", 6)
    cut = 0
    for _ in range(3000):
        text = "".join(rng.choice(alphabet + "     ") for _ in range(rng.randrange(80)))
        parts = pieces(text)
        cut += len(parts) > 1
        assert "".join(parts) == text
        assert gpt2.encode(text).tolist() == gpt2.encode_piece(text).tolist(), repr(text)
    assert cut > 1000


def test_a_vocabulary_put_beside_the_code(tmp_path, monkeypatch):
    """r50k_base is GPT-2's vocabulary in another form, so that its file can be made here, with its published sha256."""
    gpt2 = load_tokenizer("gpt2")
    monkeypatch.setattr("data.tokenizer.VOCABULARY", tmp_path / "vocab.bpe.xz")
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))

    def refuse(*arguments, **keywords):
        raise ConnectionError("no network")

    monkeypatch.setattr("tiktoken.load.read_file", refuse)
    load_tokenizer.cache_clear()
    with pytest.raises(
        DataError,
        match=rf"r50k_base cannot be downloaded.*put https.*r50k_base.tiktoken at {tmp_path}.*sha256 is 306cd27f",
    ):
        load_tokenizer("r50k_base")
    path = tmp_path / "r50k_base.tiktoken"
    path.write_text("YQ== 0\n")
    with pytest.raises(DataError, match="r50k_base.tiktoken is not the vocabulary of r50k_base; put"):
        load_tokenizer("r50k_base")
    assert path.exists()  # it is the user's
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(gpt2.tokens)))
    r50k = load_tokenizer("r50k_base")
    assert r50k.encode("Hello world <|endoftext|>").tolist() == gpt2.encode("Hello world <|endoftext|>").tolist()
    assert (r50k.n_vocab, r50k.eot, r50k.tokens, r50k.name) == (50257, 50256, gpt2.tokens, "r50k_base")
    load_tokenizer.cache_clear()


def test_a_large_vocabulary_takes_four_bytes(tmp_path, monkeypatch):
    """Ids with gaps, above 2**16, and a special token that is not the end of text."""
    tokens = [bytes([b]) for b in range(256)] + [b""] * 70_000
    made = Tokenizer(
        "large",
        tokens,
        lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint32),
        "",
        1.0,
        eot=70_300,
        n_vocab=70_400,
    )
    assert (
        made.dtype == np.uint32
        and made.token_bytes.shape == (70_400,)
        and made.decode([97, 70_300, 70_310, 98, 300]) == "ab"
    )
    monkeypatch.setattr("data.tokenizer.TOKENIZERS", {"large": lambda: made})
    load_tokenizer.cache_clear()
    data = prepare(
        "files", tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", list(itertools.islice(verses(), 60))), "large"
    )
    assert data.manifest["dtype"] == "uint32" and data.vocab_size == 70_400 and data.eot == 70_300
    assert sorted(documents(data, "train") + documents(data, "val")) == sorted(itertools.islice(verses(), 60))
    assert np.fromfile(data.folder / "train_00000.bin", "<u4")[-1] == 70_300
    load_tokenizer.cache_clear()


def test_special_tokens_in_documents_are_text(tmp_path):
    texts = [f"{i} <|endoftext|> and <|endofprompt|><|endoftext|>" for i in range(20)]
    for name in ("byte", "gpt2"):
        data = prepare("files", tmp_path / name, write_jsonl(tmp_path / "a.jsonl", texts), name)
        assert sorted(documents(data, "train") + documents(data, "val")) == sorted(texts)


# ---- show.py ----


def shown(capsys, *arguments):
    show.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_show(whole, capsys):
    train, val = documents(whole, "train"), documents(whole, "val")
    for number in (0, 1, len(train) // 2, len(train) - 1):
        assert shown(capsys, whole.folder, "--document", number) == train[number] + "\n"
    assert shown(capsys, whole.folder, "--document", 3, "--split", "val") == val[3] + "\n"
    stream = whole.split("train").read(200, 300)
    assert (
        shown(capsys, whole.folder, "--window", 2, "--block_size", 100).strip()
        == load_tokenizer("gpt2").decode(stream).strip()
    )
    lengths = [len(load_tokenizer("gpt2").encode(text)) for text in train]
    order = sorted(range(len(train)), key=lambda i: -lengths[i])[:3]
    assert shown(capsys, whole.folder, "--longest", 3).count("\n") >= 3
    assert show.longest(whole, "train", 3) == [(lengths[i], i) for i in order]
    assert "every shard is what the manifest says" in shown(capsys, whole.folder, "--verify")
    printed = shown(capsys, whole.folder)
    assert all(
        record["file"] in printed and f"{record['tokens']:,}" in printed for record in whole.manifest["splits"]["train"]
    )
    assert "fineweb-edu" in printed and "ODC-By" in printed
    for arguments, message in (
        (["--document", 10**6], "no document 1000000 in train"),
        (["--document", -1], "no document -1"),
        (["--window", 10**6], "no window"),
        (["--document", 0, "--split", "vla"], "did you mean 'val'"),
    ):
        with pytest.raises(SystemExit, match=f"show: .*{message}"):
            shown(capsys, whole.folder, *arguments)


def test_lengths_are_counted(whole):
    """The histogram that the manifest sums over shards, its quantiles and its figure."""
    for split in ("train", "val"):
        lengths = np.array([len(load_tokenizer("gpt2").encode(text)) for text in documents(whole, split)])
        counts = whole.manifest["lengths"][split]
        assert sum(counts.values()) == len(lengths)
        for share in (0.05, 0.5, 0.95):
            assert quantile(counts, share) == pytest.approx(
                np.quantile(lengths, share, method="inverted_cdf"), rel=0.05
            )
    figure = (whole.folder / "lengths.png").read_bytes()
    assert figure.startswith(b"\x89PNG") and figure == lengths_figure(whole.manifest["lengths"])
