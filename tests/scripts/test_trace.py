"""scripts/trace.py, its main called as the command line would."""

import importlib.util
import json
import re
import sys

import pytest
import torch

from model import GPT, GPTConfig
from nanope import REPO
from nanope.trace import add_ranges

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
    spec = importlib.util.spec_from_file_location("trace_command", REPO / "scripts" / "trace.py")  # Python has a trace
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

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


def test_ranges_change_nothing():
    """Loss and gradients of a model whose parts are in ranges, for a combination in a pattern."""
    config = GPTConfig(16, 64, 3, 2, 16, pos=["rope+alibi", "comrope"], window=[8, 0])
    plain, ranged = GPT(config), GPT(config)
    add_ranges(ranged)
    idx = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    losses = [model(idx[:, :-1], idx[:, 1:])[1] for model in (plain, ranged)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    parameters = list(zip(plain.parameters(), ranged.parameters(), strict=True))
    assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("pos", [pytest.param("rope", marks=pytest.mark.slow), "comrope"])
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


@pytest.mark.slow
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
