"""scripts/trace.py, its main called as the command line would."""

import importlib
import json
import re
import sys

import pytest

from nanope import REPO

FIELDS = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "vocab_size": 64,
    "block_size": 64,
    "batch_tokens": 256,
    "micro_batch_size": 2,
    "device": "cpu",
}


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPO / "scripts"))
    script = importlib.import_module("trace")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["trace.py", *map(str, arguments)])
        try:
            script.main()
        except SystemExit as error:
            return str(error) + capsys.readouterr().err
        return capsys.readouterr().out

    return run


def options(**fields):
    return [a for k, v in (FIELDS | fields).items() for a in (f"--{k}", v)]


@pytest.mark.parametrize("pos", ["rope", "comrope"])
def test_trace(pos, run, tmp_path):
    """The table's parts sum to the step, the work lies where it must, and the trace holds the steps' events."""
    out = tmp_path / "trace.json"
    shown = run("--steps", 2, "--out", out, *options(pos=pos, data_dir=tmp_path / "none"))
    rows = {
        name: (float(ms), float(share))
        for name, ms, share in re.findall(r"^\| ([\w:() ]+) \| (-?[\d.]+) \| (-?[\d.]+)% \|$", shown, re.M)
    }
    (step, _) = rows.pop("step")
    assert (
        abs(sum(share for _, share in rows.values()) - 100) < 2
        and abs(sum(ms for ms, _ in rows.values()) - step) < 0.02 * step + 0.3
    )
    assert min(ms for ms, _ in rows.values()) >= 0
    for part in ("attention: projection", "attention: turn", "attention: sdpa", "attention: output", "MLP", "norms"):
        assert rows[part][0] > 0 and rows[f"{part} (backward)"][0] > 0, part
    assert rows["loss head"][0] > 0 and rows["optimizer"][0] > 0 and rows["clip"][0] > 0

    names = [event.get("name") for event in json.loads(out.read_text())["traceEvents"]]
    assert names.count("part/rest") == 2 and names.count("part/optimizer") == 2
    assert names.count("part/MLP") == 2 * 2 * FIELDS["n_layer"]  # steps × micro-batches × layers
    if pos == "comrope":
        assert names.count("part/positions") == 2 * (2 + 1)  # constants once a step, prepare once a micro-batch


def test_trace_takes_a_run_and_refuses_with_a_reason(run, tmp_path):
    (tmp_path / "config.yaml").write_text("".join(f"{k}: {v}\n" for k, v in (FIELDS | {"pos": "alibi"}).items()))
    assert run("--steps", 1, "--out", tmp_path / "trace.json", "--run", tmp_path, "--n_layer", 1).startswith(
        "alibi, 1 layers × 32"
    )
    for arguments, words in (
        (["--run", tmp_path / "none"], "holds no config.yaml"),
        (["--batch_tokens", 7, "--block_size", 4], "multiple of block_size"),
        (["--posn", "rope"], "posn"),
    ):
        assert words in run("--out", tmp_path / "trace.json", *arguments)
