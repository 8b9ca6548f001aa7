"""data/show.py: documents, windows and the table of a folder."""

import pytest
from preparing import documents

from data import show
from data.tokenizer import load_tokenizer


def shown(capsys, *arguments):
    show.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_a_document(whole, capsys):
    train, val = documents(whole, "train"), documents(whole, "val")
    for number in (0, 1, len(train) // 2, len(train) - 1):
        assert shown(capsys, whole.folder, "--document", number) == train[number] + "\n"
    assert shown(capsys, whole.folder, "--document", 3, "--split", "val") == val[3] + "\n"


def test_a_window(whole, capsys):
    stream = whole.split("train").read(200, 300)
    printed = shown(capsys, whole.folder, "--window", 2, "--block_size", 100)
    assert printed.strip() == load_tokenizer("gpt2").decode(stream).strip()


@pytest.mark.slow
def test_the_longest(whole, capsys):
    lengths = [len(load_tokenizer("gpt2").encode(text)) for text in documents(whole, "train")]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:3]
    assert shown(capsys, whole.folder, "--longest", 3).count("\n") >= 3
    assert show.longest(whole, "train", 3) == [(lengths[i], i) for i in order]


def test_the_table(whole, capsys):
    assert "every shard is what the manifest says" in shown(capsys, whole.folder, "--verify")
    printed = shown(capsys, whole.folder)
    records = whole.manifest["splits"]["train"]
    assert all(record["file"] in printed and f"{record['tokens']:,}" in printed for record in records)
    assert "fineweb-edu" in printed and "ODC-By" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--document", 10**6], "no document 1000000 in train"),
        (["--document", -1], "no document -1"),
        (["--window", 10**6], "no window"),
        (["--document", 0, "--split", "vla"], "did you mean 'val'"),
    ],
)
def test_mistakes(whole, capsys, arguments, message):
    with pytest.raises(SystemExit, match=f"show: .*{message}"):
        shown(capsys, whole.folder, *arguments)
