"""scripts/bench.py on training, as the command line calls it."""

import importlib
import json
import subprocess
import sys

import pytest

from nanope import REPO

SHAPE = [
    "--n_layer",
    "1",
    "--n_head",
    "2",
    "--n_embd",
    "16",
    "--vocab_size",
    "64",
    "--block_size",
    "16",
    "--batch",
    "2",
]


def test_a_tiny_run(tmp_path):
    """A row for each variant, once, and every round's seconds in the file."""
    command = [
        sys.executable,
        str(REPO / "scripts" / "bench.py"),
        "train",
        *SHAPE,
        "--rounds",
        "2",
        "--steps",
        "1",
        "--no_peer",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [*command, "--schemes", "comrope block=2", "comrope block=2", "--json", str(tmp_path / "b.json")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if line.startswith("| n_layer 1")
    ]
    assert [row[1] for row in rows] == ["rope", "comrope block=2"] and rows[0][3] == "1.000 (1.000 … 1.000)"
    record = json.loads((tmp_path / "b.json").read_text())
    assert {variant: len(seconds) for variant, seconds in record["seconds"].items()} == {
        "rope": 2,
        "comrope block=2": 2,
    }
    assert record["tokens_a_step"] == 32 and record["memory"]["rope"] > 1e7
    assert record["device"].startswith("cpu (") and record["threads"] == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--schemes", "rop"], "did you mean rope?"),
        (["--schemes", "comrope block=3"], "block of comrope cannot be 3"),
        (["--schemes", "comrope block"], "'block' is no option=value"),
        (
            ["--schemes", "alibi", "--n_embd", "18", "--n_head", "6"],
            "head width n_embd/n_head = 3 must be even",
        ),  # of rope, always beside
        (["--schemes", "", "--no_peer"], "'' is no scheme"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_refuses_before_anything_starts(arguments, words, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPO / "scripts"))
    monkeypatch.setattr(sys, "argv", ["bench.py", *SHAPE, *arguments])
    with pytest.raises(SystemExit):
        importlib.import_module("bench").main()
    assert words in capsys.readouterr().err
