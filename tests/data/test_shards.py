"""Shards: writing, reading, opening a folder that is damaged, and the order of windows."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from preparing import TEXTS, documents, files, write_jsonl

from data.shard_writer import ShardWriter
from data.shards import (
    FORMAT,
    ORDERS,
    SCAN,
    DataError,
    Split,
    WindowOrder,
    as_path,
    batch,
    given_path,
    open_data,
    write_manifest,
)
from nanope import REPO

# ---- writing and reading ----


def test_shards_end_at_documents(tmp_path):
    writer = ShardWriter(tmp_path, "train", "uint16", shard_tokens=10)
    texts = [np.full(n, i, np.int64) for i, n in enumerate((4, 5, 3, 25, 10, 1), 1)]
    for text in texts:
        writer.add(text, 7)
    shards = [f"train_{i:05d}.{end}" for i in range(4) for end in ("bin", "json")]
    unfinished = f"train_00004.bin.{os.getpid()}.tmp"  # what is not complete is not called a shard
    assert sorted(path.name for path in tmp_path.iterdir()) == [*shards, unfinished]
    again = ShardWriter(
        tmp_path, "train", "uint16", shard_tokens=10
    )  # finds what is finished, as after an interruption
    assert again.records == writer.records and len(again.records) == 4
    records = writer.close()
    counts = [(r["tokens"], r["documents"], r["bytes"]) for r in records]
    assert counts == [(9, 2, 14), (3, 1, 7), (25, 1, 7), (10, 1, 7), (1, 1, 7)]
    for record in records:
        content = (tmp_path / record["file"]).read_bytes()
        assert len(content) == 2 * record["tokens"] and hashlib.sha256(content).hexdigest() == record["sha256"]
    stream = np.concatenate(texts)
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


def test_documents_are_found_whatever_is_read_at_once(tmp_path, source):
    data = files(tmp_path, source, shard_tokens=5000)
    assert len(data.manifest["splits"]["train"]) > 5
    stream, lengths = data.split("train"), [len(text.encode()) for text in documents(data, "train")]
    expected = [[sum(lengths[:i]) + i, n] for i, n in enumerate(lengths)]
    assert len(stream) < SCAN
    for scan in (SCAN, 1000, 977):
        found = stream.documents(scan)
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


def slow_feistel(raw, windows, at):
    """The window at a place of an epoch, by a network of Python's whole numbers, whose first word is the offset's."""
    total = max((windows - 1).bit_length(), 2)
    low_bits = total // 2

    def upper(x, bits):
        x = x * 0xBF58476D1CE4E5B9 % 2**64
        return (x ^ x >> 32) * 0x94D049BB133111EB % 2**64 >> 64 - bits

    while True:
        high, low = at >> low_bits, at % 2**low_bits
        for i in range(1, 13, 2):
            high ^= upper(low ^ raw[i], total - low_bits)
            low ^= upper(high ^ raw[i + 1], low_bits)
        at = high << low_bits | low
        if at < windows:
            return at


def slow_item(n_tokens, block_size, data_seed, kind, item):
    """The definition in WindowOrder's docstring, one item at a time."""
    windows = (n_tokens - 1) // block_size
    epoch, at = item // windows, item % windows
    raw = [int(r) for r in np.random.Philox(key=[data_seed, epoch]).random_raw(max(windows, 12) + 1)]
    offset = raw[0] % ((n_tokens - 1) % block_size + 1)
    if kind == "drawn":
        return offset + sorted(range(windows), key=lambda j: raw[j + 1])[at] * block_size
    return offset + slow_feistel(raw, windows, at) * block_size


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize(
    "n_tokens, block_size", [(101, 10), (110, 10), (109, 10), (11, 10), (19, 10), (5, 1), (1000, 64)]
)
def test_order_is_the_definition(n_tokens, block_size, kind):
    windows = (n_tokens - 1) // block_size
    order = WindowOrder(n_tokens, block_size, data_seed=5, kind=kind)
    many = order.starts(0, 5 * windows + 3)
    assert many.dtype == np.int64
    assert many.tolist() == [slow_item(n_tokens, block_size, 5, kind, item) for item in range(len(many))]
    offsets = set()
    for epoch in range(5):
        starts = np.sort(many[epoch * windows : (epoch + 1) * windows])
        offsets.add(int(starts[0]))
        assert np.array_equal(starts, starts[0] + block_size * np.arange(windows))  # each window once
        assert 0 <= starts[0] <= (n_tokens - 1) % block_size and starts[-1] + block_size < n_tokens
    if n_tokens in (109, 1000):
        assert len(offsets) > 1  # epochs cut the stream elsewhere
    for size in (1, 3, windows + 2):  # however it is asked, backwards too
        fresh = WindowOrder(n_tokens, block_size, data_seed=5, kind=kind)
        parts = [fresh.starts(at, min(size, len(many) - at)) for at in range(0, len(many), size)]
        assert np.array_equal(np.concatenate(parts), many)
        assert np.array_equal(fresh.starts(0, 1), many[:1])
    assert len(order.starts(3, 0)) == 0


# Of epoch 0's end and epoch 1's start. Runs are resumed under other versions of numpy
@pytest.mark.parametrize("kind, pinned", [("drawn", [7232, 8952, 9763, 5073]), ("feistel", [4302, 342, 8683, 3843])])
def test_order_depends_on_the_seed_and_never_changes(kind, pinned):
    one, two = (WindowOrder(10_001, 10, seed, kind).starts(0, 2000) for seed in (1, 2))
    assert not np.array_equal(one, two) and not np.array_equal(one[:1000], one[1000:])
    assert WindowOrder(10_005, 10, 7, kind).starts(998, 4).tolist() == pinned


@pytest.mark.parametrize("windows", [*range(1, 35), 97, 127, 128, 129, 1021, 4096, 65_537, 2**20 + 1])
def test_an_epoch_has_each_window_once(windows):
    order, everyone = WindowOrder(windows + 1, 1, 3), np.arange(windows)
    epochs = [order.starts(epoch * windows, windows) for epoch in range(2)]
    assert all(np.array_equal(np.sort(epoch), everyone) for epoch in epochs)
    if windows > 20:
        assert not np.array_equal(*epochs)
        assert (epochs[0] == epochs[1]).sum() < 10  # of two random orders, 1 in the mean
        assert (np.diff(epochs[0]) == 1).sum() < 10  # likewise: neighbours do not stay together
    if windows > 1000:
        for a, b in ((epochs[0], everyone), (epochs[0][1:], epochs[0][:-1]), epochs):
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / windows**0.5


def chi_squared(counts):
    """How many standard deviations the counts of equally likely cases are from what is expected of them."""
    expected, degrees = counts.mean(), counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5


def test_all_orders_are_equally_likely():
    """All 24 of 4 windows; of 23 windows, a pair of places; of many, where the first tenth of an epoch lies."""
    of_four = WindowOrder(5, 1, 1).starts(0, 4 * 1440).reshape(-1, 4)
    assert abs(chi_squared(np.unique(of_four, axis=0, return_counts=True)[1])) < 4
    places = WindowOrder(24, 1, 2).starts(0, 23 * 1500).reshape(-1, 23)[:, [0, 22]]
    pairs = np.zeros((23, 23))
    np.add.at(pairs, tuple(places.T), 1)
    assert abs(chi_squared(pairs[~np.eye(23, dtype=bool)])) < 4
    for windows in (100_003, 10**9 + 7):
        first = WindowOrder(windows + 1, 1, 3).starts(0, 10_000)
        assert abs(chi_squared(np.bincount(first * 100 // windows, minlength=100))) < 4


def test_a_large_order_takes_no_memory():
    """10^12 tokens: a batch over the edge of an epoch."""
    tracemalloc.start()
    try:
        starts = WindowOrder(10**12 + 500, 1000, 1).starts(10**9 - 256, 512)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    assert len({*starts[:256].tolist()}) == len({*starts[256:].tolist()}) == 256
    assert starts.min() >= 0 and starts.max() < 10**12 and starts.max() > 9 * 10**11


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((10, 10, 0), "10 tokens are too few.*block_size 10"),
        ((0, 1, 0), "too few"),
        ((9, 0, 0), "block_size"),
        ((99, 10, -1), "data_seed"),
    ],
)
def test_order_of_too_little(arguments, message):
    with pytest.raises(DataError, match=message):
        WindowOrder(*arguments)


# ---- opening ----


def truncate(folder):
    os.truncate(folder / "train_00001.bin", 100)


def alter(folder):
    content = bytearray((folder / "val_00000.bin").read_bytes())
    content[10] ^= 1
    (folder / "val_00000.bin").write_bytes(content)


def alter_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 257', '"vocab_size": 999'))


def with_format(number):
    def rewrite(folder):
        write_manifest(folder, json.loads((folder / "manifest.json").read_text()) | {"format": number})

    return rewrite


def without(name):
    return lambda folder: (folder / name).unlink()


DAMAGES = {
    "truncated": (
        truncate,
        r"train_00001.bin has 100 bytes instead of [\d,]+; delete .*prepare.py files --out .* --tokenizer byte",
    ),
    "no shard": (without("train_00000.bin"), "train_00000.bin is missing.*prepare.py"),
    "altered": (alter, "val_00000.bin was altered.*prepare.py"),
    "manifest": (alter_manifest, "manifest.json was altered"),
    "no manifest": (without("manifest.json"), "not a finished data folder"),
    "not complete": (without("COMPLETE"), "not a finished data folder.*COMPLETE.*prepare.py"),
    "no folder": (shutil.rmtree, "no data folder.*python data/prepare.py builtin --out"),
    "newer": (
        with_format(FORMAT + 1),
        f"data format {FORMAT + 1}, this version reads {FORMAT}; .*newer version of this repository: update",
    ),
    "older": (
        with_format(FORMAT - 1),
        f"data format {FORMAT - 1}, this version reads {FORMAT}; .*prepare the data again",
    ),
}


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undamaged")
    return files(folder, write_jsonl(folder / "texts.jsonl", TEXTS), shard_tokens=20_000).folder


@pytest.mark.parametrize("name", DAMAGES)
def test_opening_a_damaged_folder(tmp_path, undamaged, name):
    damage, message = DAMAGES[name]
    folder = shutil.copytree(undamaged, tmp_path / "out")
    damage(folder)
    with pytest.raises(DataError, match=message):
        open_data(folder)


def test_how_much_is_verified(tmp_path, monkeypatch):
    """A cheap look at a few blocks always; all of it on demand, or where that is little."""
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


def test_unknown_split(undamaged):
    with pytest.raises(DataError, match="'vall'; did you mean 'val'.*known: train, val"):
        open_data(undamaged).split("vall")


def without_a_reader(*command):
    """(exit status, stderr) of a Python command whose standard output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *command], cwd=REPO, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    return done.returncode, done.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    """What is printed from then on is dropped, and the command goes on."""
    code = "import sys; from data.shards import output; [output('x' * 9999) for _ in 'abc']; sys.stderr.write('on')"
    assert without_a_reader("-c", code) == (0, "on")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "data/prepare.py --list",
        *(
            pytest.param(command, marks=pytest.mark.slow)
            for command in (
                "train.py --plan --n_layer 1 --n_head 2 --n_embd 32 --block_size 64",
                "scripts/sweep.py quickstart --plan",
                "scripts/report.py --csv - results/quickstart",
                "eval.py --help",
            )
        ),
    ],
)
def test_commands_whose_output_is_cut_short(command):
    assert without_a_reader(*command.split()) == (0, "")


def test_paths_of_command_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert given_path("~/a") == given_path("$HOME/a") == given_path("${HOME}/a") == "/home/x/a"
    assert given_path("a/~b") == "a/~b" and as_path("a") == Path("a")
    for text, words in (("", "empty path"), ("~nobody-here/a", "no such user"), ("$NOWHERE/a", "NOWHERE is not set")):
        with pytest.raises(DataError, match=words):
            given_path(text)
    Path("~nobody-here").touch()  # odd names that are there are meant
    Path("$NOWHERE").touch()
    assert given_path("~nobody-here") == "~nobody-here" and given_path("$NOWHERE") == "$NOWHERE"
