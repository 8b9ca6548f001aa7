"""Which document goes to validation: the rule by hash, its edges, and the long documents that are listed."""

import hashlib

import pytest
from preparing import TEXTS, documents, files, write_jsonl

from data.corpora import named, subset_of
from data.files import find_files
from data.prepare import prepare
from data.shards import DataError
from data.split import fraction, validation_rule
from data.units import Sizes


def in_val(text, threshold):
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < threshold


def test_hash_rule(tmp_path, source):
    data = files(tmp_path, source, val_tokens=20_000)
    rule, n_bytes = data.manifest["val_rule"], sum(len(text.encode()) for text in TEXTS)
    assert rule == {
        "kind": "hash",
        "val_bytes": 20_000,
        "text_bytes": n_bytes,
        "sha256_fraction_below": 20_000 / n_bytes,
    }
    val = [text for text in TEXTS if in_val(text, 20_000 / n_bytes)]
    assert 5 < len(val) < 60  # of 120: the rule does choose
    assert documents(data, "val") == val
    assert documents(data, "train") == [text for text in TEXTS if text not in val]  # whole, and in order
    assert documents(files(tmp_path, source, "bytes", val_bytes=20_000), "val") == val
    gpt2 = files(tmp_path, source, "gpt2", tokenizer="gpt2", val_tokens=5_000).manifest["val_rule"]
    assert gpt2["val_bytes"] == round(5_000 * 4.3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"val_bytes": 9_000}])
def test_every_tokenizer_has_the_same_validation(tmp_path, source, corpus, options):
    """So that bits per byte of two tokenizers are of the same text."""
    byte, gpt2 = (files(tmp_path, source, name, name, **options) for name in ("byte", "gpt2"))
    assert documents(byte, "val") == documents(gpt2, "val") and documents(byte, "train") == documents(gpt2, "train")
    assert byte.manifest["val_rule"] == gpt2.manifest["val_rule"]
    large = {"sizes": Sizes(survey=0)} | options  # whose size is estimated
    byte, gpt2 = (prepare("openwebtext", tmp_path / f"large {n}", corpus[0], n, **large) for n in ("byte", "gpt2"))
    assert documents(byte, "val") == documents(gpt2, "val")


def test_a_large_corpus_has_at_most_so_much_validation():
    """Of FineWeb-Edu 430 MB, which are 100 M GPT-2 tokens, unless more is asked for."""
    fineweb, (_, subset) = named("fineweb-edu"), subset_of(named("fineweb-edu"), None)
    text_bytes = subset.tokens * 43 // 10
    below = [
        validation_rule(fineweb, [], asked, text_bytes, False, 0)["sha256_fraction_below"]
        for asked in (None, text_bytes // 2)
    ]
    assert below == pytest.approx([100e6 / subset.tokens, 0.5])


def test_duplicates_fall_on_one_side(tmp_path):
    data = files(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS + TEXTS[::-1] + TEXTS), val_bytes=60_000)
    train, val = documents(data, "train"), documents(data, "val")
    assert not set(train) & set(val) and len(train) + len(val) == 360 and len(val) > 10


def test_no_side_stays_empty(tmp_path, source, capsys):
    few, most = files(tmp_path, source, "few", val_tokens=1), files(tmp_path, source, "most", val_tokens=10**9)
    order = sorted(TEXTS, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert documents(few, "val") == [order[0]] and documents(most, "train") == [order[-1]]
    notes = capsys.readouterr().err
    assert "would take no document" in notes and "would take every document" in notes
    total = sum(len(text.encode()) for text in TEXTS)
    assert all(f" {len(text.encode()):,} of {total:,} bytes" in notes for text in (order[0], order[-1]))
    assert fraction(b"\xff" * 32) < 1
    with pytest.raises(DataError, match="all 3 documents are the same"):
        files(tmp_path, write_jsonl(tmp_path / "same.jsonl", ["same"] * 3), "same")


def test_single_document_is_cut_at_a_line(tmp_path, capsys):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    data = files(tmp_path, tmp_path / "a.txt")
    (train,), (val,) = documents(data, "train"), documents(data, "val")
    assert train + val == text and train.endswith("\n") and 0.04 < len(val) / len(text) < 0.06
    assert "single document" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="too little text"):
        files(tmp_path, tmp_path / "a.txt", "tiny")


def test_a_single_document_of_long_lines_is_cut_near_its_end(tmp_path):
    """Where the last line break is far back, all behind it would be validation. What is empty is no second document."""
    (tmp_path / "in").mkdir()
    text = "first line\n" + "no break " * 1000
    (tmp_path / "in" / "a.txt").write_text(text)
    (tmp_path / "in" / "b.txt").write_text(" \n")
    data = files(tmp_path, tmp_path / "in")
    (train,), (val,) = documents(data, "train"), documents(data, "val")
    assert train + val == text and 0.04 < len(val) / len(text) < 0.08
    assert data.manifest["source"]["empty"] == 1


def test_a_few_large_texts_have_a_validation_document(tmp_path):
    """A large source is not read beforehand, but one of a few .txt files is: their number could leave a side empty."""
    large = {"sizes": Sizes(survey=0)}
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    data = files(tmp_path, tmp_path / "a.txt", **large)
    assert data.manifest["val_rule"]["kind"] == "cut" and len(data.split("val"))
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"text {i}\n" * 100)
    assert len(documents(files(tmp_path, folder, "three", **large), "val")) == 1


@pytest.mark.slow
def test_no_validation_document(tmp_path, corpus):
    """A large source is not read beforehand. So it shows at the end that the rule took nothing."""
    large = {"sizes": Sizes(survey=0)}
    message = "there is no val document: the source has 747 documents.*give another --val_tokens"
    with pytest.raises(DataError, match=message):
        prepare("fineweb-edu", tmp_path / "out", corpus[0], val_tokens=1, **large)
    with pytest.raises(DataError, match="is the whole corpus"):
        prepare("fineweb-edu", tmp_path / "out2", corpus[0], val_tokens=10**9, **large)
    data = prepare("fineweb-edu", tmp_path / "out3", corpus[0], **large)  # 5 % of what the metadata let one expect
    assert data.manifest["val_rule"]["val_bytes"] == round(data.manifest["val_rule"]["text_bytes"] / 20)


def test_val_long_is_halved_until_there_is_one(tmp_path, source, capsys):
    data = files(tmp_path, source, val_tokens=20_000)
    lengths = [len(text.encode()) for text in documents(data, "val")]
    long = data.manifest["val_long_tokens"]
    assert long <= max(lengths) < 2 * long and f"at least {long:,}" in capsys.readouterr().err
    assert [d["tokens"] for d in data.manifest["val_long"]] == [n for n in lengths if n >= long]
    # a document of exactly that many tokens counts
    data = files(tmp_path, write_jsonl(tmp_path / "b.jsonl", [f"{i}".ljust(128, ".") for i in range(9)]), "exact")
    assert data.manifest["val_long_tokens"] == 128 and data.manifest["val_long"][0] == {"start": 0, "tokens": 128}


def test_a_source_of_unknown_size(tmp_path, source):
    """Such as a stream: it is read before until it turns out to be large. Then the share needs no size."""
    data = files(tmp_path, source)
    listed, corpus = find_files(source), named("files")
    known = validation_rule(corpus, listed, None, None, False, 10**6)
    assert known == data.manifest["val_rule"]
    large = validation_rule(corpus, listed, None, None, False, 10_000)
    assert large == {"kind": "hash", "val_bytes": None, "text_bytes": None, "sha256_fraction_below": 0.05}
    with pytest.raises(DataError, match="nobody knows how large"):
        validation_rule(corpus, listed, 5000, None, False, 10_000)
