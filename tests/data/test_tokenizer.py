"""Tokenizers: round trips, the published ids, long texts in pieces, vocabularies that are missing or damaged."""

import base64
import lzma
import random

import numpy as np
import pytest
from preparing import TEXTS, all_documents, files, verses, write_jsonl

from data import tokenizer as tokenizer_module
from data.shards import DataError
from data.tokenizer import (
    GPT2_PATTERN,
    PUBLISHED,
    URL,
    Tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    pieces,
    published_tokenizer,
    well_formed,
)

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


def test_pieces_change_no_token():
    gpt2, rng = load_tokenizer("gpt2"), random.Random(1)
    alphabet = " \n\t\xa0\x1c\u3000ab'sé1.!日\u0301"
    cut = 0
    for _ in range(3000):
        text = "".join(rng.choice(alphabet + "     ") for _ in range(rng.randrange(80)))
        parts = pieces(text, 6)
        cut += len(parts) > 1
        assert "".join(parts) == text
        whole = gpt2.encode_piece(text).tolist()
        assert [i for part in parts for i in gpt2.encode_piece(part)] == whole, repr(text)
    assert cut > 1000


def test_a_long_text_is_encoded_in_pieces():
    text = "".join(verses(300))
    assert len(pieces(text)) > 1
    gpt2 = load_tokenizer("gpt2")
    assert np.array_equal(gpt2.encode(text), gpt2.encode_piece(text))


@pytest.mark.parametrize("content", [None, b"not xz", lzma.compress(b"#version: 0.2\na b\n")])
def test_a_broken_vocabulary(tmp_path, content):
    path = tmp_path / "vocab.bpe.xz"
    if content:
        path.write_bytes(content)
    with pytest.raises(DataError, match="vocab.bpe.xz"):
        gpt2_tokenizer(path)


def test_an_unknown_tokenizer():
    with pytest.raises(DataError, match="'gpt3'.*did you mean 'gpt2'"):
        load_tokenizer("gpt3")


def test_published_encodings_are_those_of_tiktoken(monkeypatch):
    """Files, patterns and ids. The vocabularies are not at hand here, so tiktoken gets one of a single token."""
    openai_public = pytest.importorskip("tiktoken_ext.openai_public")
    asked = []

    def load(url, expected_hash=None):
        asked.append((url, expected_hash))
        return {b"a": 0}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", load)
    for name, row in PUBLISHED.items():
        theirs = openai_public.ENCODING_CONSTRUCTORS[name]()
        assert asked[-1] == (URL + row.file, row.sha256)
        assert theirs["pat_str"] == row.pattern
        ids = theirs["special_tokens"]
        n_vocab = theirs.get("explicit_n_vocab") or max(ids.values()) + 1
        assert (ids["<|endoftext|>"], n_vocab) == (row.eot, row.n_vocab)


def test_a_vocabulary_put_beside_the_code(tmp_path, monkeypatch):
    """r50k_base is GPT-2's vocabulary in another form, so that its file can be made here, with its published sha256."""
    gpt2 = load_tokenizer("gpt2")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))

    def refuse(*arguments, **keywords):
        raise ConnectionError("no network")

    monkeypatch.setattr("tiktoken.load.read_file", refuse)
    path = tmp_path / "r50k_base.tiktoken"
    with pytest.raises(DataError, match=rf"r50k_base cannot be downloaded.*put https.* at {path}.*sha256 is 306cd27f"):
        published_tokenizer("r50k_base", tmp_path)
    path.write_text("YQ== 0\n")
    with pytest.raises(DataError, match="r50k_base.tiktoken is not the vocabulary of r50k_base; put"):
        published_tokenizer("r50k_base", tmp_path)
    assert path.exists()  # it is the user's
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(gpt2.tokens)))
    r50k = published_tokenizer("r50k_base", tmp_path)
    text = "Hello world <|endoftext|>"
    assert r50k.encode(text).tolist() == gpt2.encode(text).tolist()
    assert (r50k.n_vocab, r50k.eot, r50k.tokens, r50k.name) == (50257, 50256, gpt2.tokens, "r50k_base")


def test_a_large_vocabulary_takes_four_bytes(tmp_path, monkeypatch):
    """Ids with gaps, above 2**16, and a special token that is not the end of text."""
    made = Tokenizer(
        "large",
        [bytes([b]) for b in range(256)] + [b""] * 70_000,
        lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint32),
        "",
        1.0,
        eot=70_300,
        n_vocab=70_400,
    )
    assert made.dtype == np.uint32 and made.token_bytes.shape == (70_400,)
    assert made.decode([97, 70_300, 70_310, 98, 300]) == "ab"
    monkeypatch.setitem(tokenizer_module.TOKENIZERS, "large", lambda: made)
    data = files(tmp_path, write_jsonl(tmp_path / "a.jsonl", verses(60)), tokenizer="large")
    assert data.manifest["dtype"] == "uint32" and data.vocab_size == 70_400 and data.eot == 70_300
    assert all_documents(data) == sorted(verses(60))
    assert np.fromfile(data.folder / "train_00000.bin", "<u4")[-1] == 70_300


def test_special_tokens_in_documents_are_text(tmp_path):
    texts = [f"{i} <|endoftext|> and <|endofprompt|><|endoftext|>" for i in range(20)]
    for name in ("byte", "gpt2"):
        data = files(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), name, tokenizer=name)
        assert all_documents(data) == sorted(texts)


def test_endless_white_space_is_a_clear_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["fine", "x" + " " * 1_500_000 + "y"])
    with pytest.raises(DataError, match="a.jsonl:2.*gpt2 cannot encode"):
        files(tmp_path, path, tokenizer="gpt2")
