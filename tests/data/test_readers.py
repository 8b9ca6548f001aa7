"""Readers: every kind of file, ranges of a file, and what is said of files that cannot be read."""

import collections
import gzip
import json
import lzma
import random
import shutil

import pyarrow
import pytest
from preparing import (
    TEXTS,
    all_documents,
    files,
    parquet,
    shard_contents,
    verses,
    with_damaged_row_group,
    write_jsonl,
    zstd,
)

from data.corpora import CORPORA
from data.prepare import prepare
from data.readers import Bad, File, find_files, read_file
from data.shards import DataError
from data.units import cut_group, group_files, read_unit

FILES = CORPORA["files"]


def test_every_kind_of_file_gives_the_same_folder(tmp_path):
    texts = TEXTS[:12] + ["naïve\nend", " \n ", ""]  # the last two are empty: skipped and counted
    lines = "".join(json.dumps({"other": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    made = {}
    for kind in ("txt", "txt.gz", "jsonl", "jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / ".hidden.txt").write_text("passed over")
        (folder / "notes.md").write_text("passed over")
        if kind.startswith("txt"):
            for i, text in enumerate(texts):
                sub = folder / f"part{i // 10}"
                sub.mkdir(exist_ok=True)
                content = text.encode("utf-8-sig" if i == 3 else "utf-8")  # a byte-order mark is not text
                (sub / f"{i:02d}.{kind}").write_bytes(gzip.compress(content) if kind == "txt.gz" else content)
        elif kind == "parquet":
            (folder / "a.parquet").write_bytes(parquet(id=range(len(texts)), text=texts[:-1] + [None]))
        else:
            pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress, "jsonl.zst": zstd}[kind]
            (folder / f"a.{kind}").write_bytes(pack(lines))
        made[kind] = files(tmp_path, folder, f"out-{kind}", shard_tokens=3000)
    for kind, data in made.items():
        assert shard_contents(data.folder) == shard_contents(made["jsonl"].folder), kind
        for key in ("documents", "empty", "bytes", "sha256"):
            assert data.manifest["source"][key] == made["jsonl"].manifest["source"][key], kind
    manifest = made["txt"].manifest
    assert manifest["source"]["documents"] == 13 and manifest["source"]["empty"] == 2
    assert all_documents(made["txt"]) == sorted(texts[:13])


BAD_FILES = {
    "latin1.txt": ("first\nsecond caf\u00e9\n".encode("latin1"), "latin1.txt, line 2: byte 0xe9.*iconv"),
    "latin1.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "latin1.jsonl, line 2: byte 0xe9"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', "broken.jsonl, line 3: not JSON"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}\n', "field.jsonl, line 2: no field 'text', only body, id"),
    "list.jsonl": (b"[1]\n", "list.jsonl, line 1: no field 'text', but list"),
    "number.jsonl": (b'{"text": 3}\n', "number.jsonl, line 1: 'text' is not text but int"),
    "short.txt.gz": (gzip.compress(b"abc" * 1000)[:-5], "short.txt.gz is damaged"),
    "not.txt.gz": (b"plain", "not.txt.gz is damaged"),
    "short.txt.xz": (lzma.compress(bytes(range(256)) * 99)[:-40], "short.txt.xz is damaged"),
    "short.txt.zst": (zstd(bytes(range(256)) * 99)[:-9], "short.txt.zst is damaged"),
    "not.txt.zst": (b"plain text", "not.txt.zst is damaged"),
    "not.parquet": (b"PAR1 nothing", "not.parquet cannot be read"),
    "column.parquet": (
        parquet(id=[1], body=["x"]),
        r"column.parquet: no text column 'text'; it has id \(int64\), body \(string\)",
    ),
    "damaged.parquet": (
        with_damaged_row_group(parquet(text=TEXTS), 1),
        "damaged.parquet, row group 1 cannot be read.*--skip_bad goes on without it",
    ),
    "image.png": (b"", "no .txt, .jsonl, .parquet file"),
    "empty.txt": (b" \n", "no text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("folder", [False, True])
def test_bad_files(tmp_path, name, folder):
    content, message = BAD_FILES[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        files(tmp_path, tmp_path / "in" if folder else tmp_path / "in" / name)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_parquet_that_is_not_utf8(tmp_path):
    values = pyarrow.array([b"fine", b"caf\xe9", None, b"also fine"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 4, values.buffers())
    (tmp_path / "a.parquet").write_bytes(parquet(text=text))
    with pytest.raises(DataError, match="a.parquet, row 2: not UTF-8"):
        files(tmp_path, tmp_path / "a.parquet")
    data = files(tmp_path, tmp_path / "a.parquet", skip_bad=True)
    assert all_documents(data) == ["also fine", "fine"]
    assert data.manifest["source"]["bad"] == {"rows": 1} and data.manifest["source"]["empty"] == 2


def test_skipped_row_groups_and_files(corpus, tmp_path, capsys):
    folder, texts = tmp_path / "in", corpus[1]
    shutil.copytree(corpus[0], folder)
    damaged = folder / "001_00000.parquet"
    damaged.write_bytes(with_damaged_row_group(damaged.read_bytes(), 2))
    (folder / "003_00000.parquet").write_bytes(b"PAR1 not at all")
    data = prepare("fineweb-edu", tmp_path / "skipped", folder, val_tokens=20_000, skip_bad=True)
    assert all_documents(data) == sorted(t for i, t in enumerate(texts) if t and t.strip() and not 350 <= i < 400)
    assert data.manifest["source"]["bad"] == {"row groups": 1, "files": 1}
    assert "skipped: " in capsys.readouterr().err
    with pytest.raises(DataError, match="skip_bad True there, False now"):
        prepare("fineweb-edu", tmp_path / "skipped", folder, val_tokens=20_000)


def test_skipped_lines_and_documents(tmp_path):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(9)]
    lines[3], lines[6] = "{", json.dumps({"text": "x" + " " * 1_500_000 + "y"})  # which tiktoken cannot encode
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "c.jsonl").write_text("\n".join(lines))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:3] * 9).encode())[:-12])
    data = files(tmp_path, folder, tokenizer="gpt2", skip_bad=True, shard_tokens=4, val_tokens=20)
    assert data.manifest["source"]["bad"] == {"documents": 1, "lines": 1, "files": 1}
    assert set(all_documents(data)) == {f"text {i}" for i in range(9) if i not in (3, 6)}


def test_reading_does_not_hold_the_corpus(tmp_path):
    """The first document is there before the last line, which is broken, has been read."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 1000}) + "\n" + "broken")
    rows = read_file(File(path.name, 0, "", path=str(path)))
    assert next(rows) == ("a.jsonl:1", "x" * 1000)
    with pytest.raises(DataError):
        next(rows)


def test_lone_surrogates_are_replaced_before_anything_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "one \ud83d\ude00 \ud800."}' + "\n" + r'{"text": "two"}' + "\n")
    data = files(tmp_path, tmp_path / "a.jsonl")
    assert all_documents(data) == ["one 😀 \ufffd.", "two"]
    assert data.manifest["source"]["bytes"] == 4 + 4 + 1 + 3 + 1 + 3


# ---- ranges of a file ----


@pytest.mark.parametrize("end", ["\n", ""])
def test_ranges_of_a_jsonl_file_are_the_file(tmp_path, end):
    rng = random.Random(0)
    lines = [json.dumps({"text": "é" * rng.randrange(1, 60)}, ensure_ascii=False) for _ in range(50)]
    lines[7:7] = ["", "  "]
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n".join(lines) + end, encoding="utf-8")
    file = File("a.jsonl", path.stat().st_size, "", path=str(path))
    expected = list(read_file(file))
    assert len(expected) == 50
    for size in (7, 40, 100, 1000, 10**6):
        cut = cut_group(0, [file], FILES, size)
        assert (len(cut) > 1) == (size < file.bytes)
        assert [row for unit in cut for row in read_unit(unit, FILES, Bad())] == expected
    path.write_text("\n".join([*lines, "broken"]))
    bad = Bad(skip=True)
    for unit in cut_group(0, [File("a.jsonl", path.stat().st_size, "", path=str(path))], FILES, 100):
        collections.deque(read_unit(unit, FILES, bad), 0)
    assert bad.counts == {"lines": 1} and "line 53: not JSON" in bad.messages[0]


def test_small_files_share_a_unit_and_large_ones_have_several(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"text {i}\n" * 20)
    write_jsonl(folder / "big.jsonl", verses(200))
    listed = find_files(folder)
    groups = group_files(listed, FILES, 6000)
    assert [len(group) for group in groups] == [13, 12, 5, 1]  # of 7 or 8 bytes × 20 each, 2,000 together at most
    assert len(cut_group(3, groups[3], FILES, 100_000)) == round(listed[-1].bytes / 100_000) > 2
    assert sum(groups, []) == listed
