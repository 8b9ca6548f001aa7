"""Attention by distance and entropy against loops over pairs, and that the weights are those that were used."""

import math

import numpy as np
import pytest
import torch
from evaluating import evaluate, model

import nanope.evaluation.attention_by_distance as measured
from nanope.attention import weights_by_layer
from nanope.evaluation.protocols import spread_windows
from nanope.evaluation.report import flat_figures, table
from nanope.evaluation.scoring import Compute


def slow(gpt, split, length, count, bins):
    """layer → head → (mean weight of each bin, entropy, mean distance), pair by pair."""
    found = []
    for start in spread_windows(split, count, length).start.tolist():
        idx = torch.from_numpy(split.read(start, start + length).astype(np.int64))[None]
        found.append([w[0].double() for w in weights_by_layer(gpt, idx)])
    result = []
    for layer in range(len(found[0])):
        result.append([])
        for head in range(found[0][0].size(0)):
            by_bin, entropy, distance = [[] for _ in bins], [], []
            for window in found:
                for m in range(length):
                    w = window[layer][head, m, : m + 1].tolist()
                    for n, weight in enumerate(w):
                        by_bin[next(i for i, (a, b) in enumerate(bins) if a <= m - n <= b)].append(weight)
                    share = [abs(x) / (sum(map(abs, w)) or 1) for x in w]
                    entropy.append(-sum(p * math.log(p) for p in share if p))
                    distance.append(sum(p * (m - n) for n, p in enumerate(share)))
            result[-1].append(([np.mean(each) for each in by_bin], np.mean(entropy), np.mean(distance)))
    return result


@pytest.mark.parametrize("pos,rows", [("rope", 128), ("alibi", 5), ("urpe", 128), ("stickbreaking", 7), ("none", 1)])
def test_it_is_what_a_loop_over_pairs_finds(data, monkeypatch, pos, rows):
    monkeypatch.setattr(measured, "ROWS", rows)
    gpt, split, length = model(pos, 32), data.split("val"), 23
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.mul_(2.0)
    found = measured.measure_attention(gpt, split, length, 3, Compute())
    bins = [*zip(found["distance"]["first"], found["distance"]["last"])]
    assert bins[0] == (0, 0) and bins[-1][1] == length - 1
    assert all(b[0] == a[1] + 1 for a, b in zip(bins, bins[1:]))
    for layer, expected in zip(found["layers"], slow(gpt, split, length, 3, bins)):
        for head, (weight, entropy, distance) in zip(layer, expected):
            assert head["weight"] == pytest.approx(weight, rel=1e-4, abs=1e-9)
            assert head["entropy"] == pytest.approx(entropy, rel=1e-4)
            assert head["mean_distance"] == pytest.approx(distance, rel=1e-4, abs=1e-9)


def test_uniform_attention_has_the_figures_of_uniform(data):
    gpt = model("none", 16)
    with torch.no_grad():
        for block in gpt.transformer["h"]:
            block.attn.c_attn.weight[:32].zero_()  # queries and keys
    found = measured.measure_attention(gpt, data.split("val"), 40, 2, Compute())
    for head in (head for layer in found["layers"] for head in layer):
        assert head["weight"] == pytest.approx(found["uniform"]["weight"], rel=1e-4)
        assert head["entropy"] == pytest.approx(found["uniform"]["entropy"], rel=1e-4)
        assert head["mean_distance"] == pytest.approx(found["uniform"]["mean_distance"], rel=1e-4)
    assert found["uniform"]["mean_distance"] == pytest.approx(39 / 4, rel=1e-5)
    assert found["uniform"]["entropy"] == pytest.approx(math.lgamma(41) / 40, rel=1e-5)


def test_far_and_small_weights_are_not_lost_in_sums():
    """A weight of 1e-12 far behind one of 1: a float32 sum would have 0."""
    weights = torch.zeros(1, 64, 64, dtype=torch.float64)
    weights[0, :, 0] = 1e-12
    weights[0, range(64), range(64)] = 1.0
    edges = np.array([0, 1, 32, 64])
    assert measured.sums_of(weights, edges)[0, :3].tolist() == pytest.approx([64 + 0.0, 31e-12, 32e-12], rel=1e-3)


def test_the_pass_goes_on_with_the_weights_that_it_shows(data, monkeypatch):
    """The second layer's input comes from the first's weights: the hidden states are those of a plain pass."""
    gpt, shown, hidden = model("rope", 16), [], {}
    before = gpt.attend
    monkeypatch.setattr(measured, "sums_of", lambda w, edges: shown.append(w) or torch.zeros(2, len(edges) + 1))
    plain = gpt.hidden
    monkeypatch.setattr(gpt, "hidden", lambda idx, *a, **k: hidden.setdefault("is", plain(idx, *a, **k)))
    measured.measure_attention(gpt, data.split("val"), 16, 1, Compute())
    idx = torch.from_numpy(data.split("val").read(0, 16).astype(np.int64))[None]
    with torch.no_grad():
        assert torch.allclose(hidden["is"], plain(idx), atol=1e-5)
        for ours, theirs in zip(shown, weights_by_layer(gpt, idx)):
            assert torch.equal(ours, theirs[0])
    assert gpt.attend is before


def test_a_report_has_each_length_or_a_reason(data, monkeypatch):
    monkeypatch.setattr(measured, "LARGEST", 2 * 40**2 * 4)
    report = evaluate(model("learned"), data, [8, 16, 64], ["same-targets"], max_targets=64, attention=2)
    assert [(row["length"], row["windows"], row["layers"] is None) for row in report["attention"]] == [
        (8, 2, False), (16, 2, False), (64, 2, True),
    ]  # fmt: skip
    assert "learned" in report["attention"][2]["reason"]
    large = evaluate(model("rope"), data, [16, 41], ["same-targets"], max_targets=64, attention=1)
    assert "GB" in large["attention"][1]["reason"]
    assert "| attention, length |" in table(large) and "attention n/a at 41" in table(large)
    figures = flat_figures(large)
    assert {name for name in figures if "attention" in name} == {
        f"eval/attention/16/layer-{layer}/{name}" for layer in (1, 2) for name in ("entropy", "mean_distance")
    }
