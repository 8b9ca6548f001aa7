"""The protocol shift: rotations are relative, and schemes without positions say so."""

import numpy as np
import pytest
import torch
from evaluating import evaluate, model

from data.shards import batch
from model import GPT, GPTConfig
from nanope.evaluation.report import flat_figures, table
from nanope.evaluation.scoring import Compute
from nanope.evaluation.shift import losses


def test_a_rotation_does_not_change_and_what_is_not_relative_shows(tmp_path):
    text = np.random.default_rng(0).integers(0, 64, (2, 17))

    def change(pos):
        gpt = GPT(GPTConfig(16, 64, 2, 2, 32, pos=pos), seed=1).double().eval()
        with torch.no_grad():
            for block in gpt.transformer["h"]:
                block.attn.c_attn.weight *= 20
        plain = losses(gpt, text, 0)
        x, y = torch.from_numpy(text[:, :-1]), torch.from_numpy(text[:, 1:])
        assert torch.equal(plain, gpt(x, y, reduction="none")[1].double())
        return (losses(gpt, text, 5000) - plain).abs().max()

    assert change("comrope") < 1e-9
    bent = tmp_path / "bent.py"
    bent.write_text(
        "from dataclasses import replace\n\nfrom schemes.rope import RoPE\n\n\nclass Bent(RoPE):\n"
        "    @classmethod\n    def prepare(cls, layers, ctx):  # positions on a curve\n"
        "        return super().prepare(layers, replace(ctx, positions=ctx.positions.sqrt()))\n"
    )
    assert change(f"{bent}:Bent") > 1e-3


def test_rows_and_short_form(data):
    offsets = [0, 16, 4096]
    report = evaluate(model("rope"), data, None, ["shift"], offsets=offsets, windows=5)
    assert [r["offset"] for r in report["results"]] == offsets and "targets_sha256" in report
    names = ("offset", "nats_per_token", "largest_change")
    assert report["shift"] == [{name: r[name] for name in names} for r in report["results"]]
    split = data.split("val")
    x, y = batch(split, np.linspace(0, len(split) - 17, 5).astype(int), 16)
    with torch.no_grad():
        nll = model("rope")(torch.from_numpy(x), torch.from_numpy(y), reduction="none")[1].double()
    in_parts = evaluate(model("rope"), data, None, ["shift"], Compute(batch_tokens=5), offsets=offsets, windows=5)
    for whole, part in zip(report["results"], in_parts["results"]):
        assert part["nats_per_token"] == pytest.approx(whole["nats_per_token"]) and part["tokens"] == 80
    first = report["results"][0]
    assert first["nats_per_token"] == nll.mean().item() and first["largest_change"] == 0.0 and first["tokens"] == 80
    assert first["bits_per_byte"] == pytest.approx(nll.sum().item() / np.log(2) / (y != 256).sum())
    assert (first["protocol"], first["length"], first["interval"]) == ("shift", 16, None)
    assert 0 < report["results"][2]["largest_change"] < 1e-4
    assert "| 4,096 | 16 |" in table(report) and "same-targets" not in table(report)
    assert flat_figures(report)["eval/shift/16/4096/largest_change"] == report["shift"][2]["largest_change"]


@pytest.mark.parametrize("pos", ["none", "alibi", "urpe", "selective", "learned", "sinusoidal", ["none", "alibi"]])
def test_without_positions_there_are_no_figures_and_a_reason(data, pos):
    report = evaluate(model(pos), data, None, ["shift"], offsets=[0, 16])
    assert report["shift"] == [] and len(report["results"]) == 2
    assert all(r["nats_per_token"] is None and "rope has" in r["reason"] for r in report["results"])
    assert table(report).count("shift n/a") == 1


def test_beside_other_protocols_and_schemes(data):
    report = evaluate(model(["rope", "none"]), data, [32], ["shift", "same-targets"], offsets=[16], max_targets=100)
    assert [(r["protocol"], r["length"]) for r in report["results"]] == [
        ("same-targets", 16),
        ("same-targets", 32),
        ("shift", 16),
    ]
    assert report["results"][2]["largest_change"] < 1e-4
    assert table(report).count("|---") == 1 and "positions shifted by" in table(report)
