"""The retrieval probe: a model that recalls, models that cannot, and how trials are made."""

import types

import numpy as np
import pytest
import torch
import torch.nn as nn
from evaluating import evaluate, model

from model import GPT, GPTConfig
from nanope.evaluation.probe import KEY, VALUE, make_trials


class Oracle(nn.Module):
    """Says what followed the last occurrence of the last `reach` tokens, where the context holds one: V = C = 320
    one-hot."""

    def __init__(self, block_size, reach):
        super().__init__()
        self.lm_head, self.reach = nn.Linear(320, 320, bias=False), reach
        self.lm_head.weight = nn.Parameter(torch.eye(320), requires_grad=False)
        self.config = types.SimpleNamespace(block_size=block_size, pos="none")

    def hidden(self, idx):
        h = torch.zeros(*idx.shape, 320)
        for row, ids in enumerate(idx.tolist()):
            last = {}  # the last `reach` tokens → what followed
            for t in range(self.reach - 1, len(ids)):
                context = tuple(ids[t - self.reach + 1 : t + 1])
                if context in last:
                    h[row, t, ids[last[context]]] = 9.0
                last[context] = t + 1
        return h

    def check_length(self, length):
        pass


def probe(gpt, data, trials):
    return evaluate(gpt, data, [80], ["same-targets"], max_targets=100, probe=trials)["probe"]


def test_probe_sees_recall_where_there_is_one_and_none_where_there_is_none(data):
    found = probe(Oracle(80, KEY), data, 6)
    assert [r["length"] for r in found] == [80, 160, 320, 640]
    for r in found:
        assert r["recall"] > 4 and r["interval"][0] > 4 and r["accuracy"] == 1.0
        assert r["recall"] == pytest.approx(r["without_key"] - r["with_key"])
    nothing = GPT(GPTConfig(80, 320, 1, 2, 16, pos="none"), seed=0)
    with torch.no_grad():
        nothing.transformer["h"][0].attn.c_proj.weight.zero_()  # no token sees another
    for r in probe(nothing, data, 4):
        assert r["recall"] == pytest.approx(0, abs=1e-6)


def test_probe_is_paired_over_lengths_and_seeded(data):
    split = data.split("val")
    trials, again, other = (make_trials(split, split.documents(), 640, 5, seed) for seed in (0, 0, 1))
    for a, b in zip(trials, again):
        assert np.array_equal(a.tokens(640, True), b.tokens(640, True))
    assert any(not np.array_equal(a.tokens(640, True), b.tokens(640, True)) for a, b in zip(trials, other))
    for trial in trials:
        short, long, control = trial.tokens(80, True), trial.tokens(640, True), trial.tokens(640, False)
        assert len(short) == 81 and len(long) == len(control) == 641
        assert np.array_equal(short[-KEY - VALUE :], long[-KEY - VALUE :])
        assert np.array_equal(long[-VALUE:], trial.value)
        assert (long != control).sum() == (trial.key != trial.other).sum()  # nothing but the key differs
    with pytest.raises(ValueError, match="needs a document of"):
        make_trials(split, split.documents(), 100_000, 5, 0)


def test_lengths_out_of_reach_have_a_reason(data):
    first, *beyond = probe(model("learned", 80), data, 3)
    assert first["recall"] is not None
    assert all(r["recall"] is None and "learned" in r["reason"] for r in beyond)
    short = probe(model("rope", 40), data, 3)
    assert "do not fit into a length of 40" in short[0]["reason"] and short[1]["recall"] is not None


def test_trials_do_not_depend_on_how_far_a_model_reaches(data):
    far, near = Oracle(80, 1), Oracle(80, 1)  # the last token alone: right at some trials
    near.check_length = GPT(GPTConfig(80, 320, 1, 2, 16, pos="learned"), seed=0).check_length
    rows = [probe(oracle, data, 6) for oracle in (far, near)]
    assert rows[0][0] == rows[1][0] and rows[0][0]["recall"] is not None
    assert rows[0][1]["recall"] is not None and rows[1][1]["recall"] is None


def test_depths_are_bins_of_the_same_trials(data):
    """Each bin against the trials of its depth alone, one by one, and all bins together against the whole."""
    gpt, split = model("rope", 80), data.split("val")
    (row, *_) = probe(gpt, data, 12)
    trials = make_trials(split, split.documents(), 640, 12, 0)

    def loss(trial, with_key):
        ids = torch.from_numpy(trial.tokens(80, with_key).astype(np.int64))
        with torch.no_grad():
            table = torch.log_softmax(gpt(ids[None, :-1])[0][0].double(), -1)
        return float(-table[-VALUE:].gather(1, ids[-VALUE:, None]).mean())

    assert [(b["low"], b["high"]) for b in row["by_depth"]] == [(i / 5, (i + 1) / 5) for i in range(5)]
    for b in row["by_depth"]:
        mine = [trial for trial in trials if b["low"] <= trial.depth < b["high"]]
        assert b["trials"] == len(mine)
        if not mine:
            assert b["recall"] is b["interval"] is b["with_key"] is b["perplexity"] is None
            continue
        with_key, without = (np.array([loss(trial, which) for trial in mine]) for which in (True, False))
        assert b["with_key"] == pytest.approx(with_key.mean(), abs=1e-5)
        assert b["perplexity"] == pytest.approx(np.exp(with_key.mean()), rel=1e-5)
        assert b["without_key"] == pytest.approx(without.mean(), abs=1e-5)
        assert b["recall"] == pytest.approx((without - with_key).mean(), abs=1e-5)
        assert (b["interval"] is None) == (len(mine) < 2)
    assert sum(b["trials"] for b in row["by_depth"]) == row["trials"] == 12
    assert sum(b["trials"] * (b["recall"] or 0) for b in row["by_depth"]) / 12 == pytest.approx(row["recall"])


def test_of_scaled_models_those_are_probed_that_were_asked_for(data):
    options = {"probe": 2, "attention": 1, "max_targets": 64, "factor": 2.0}
    for scaling in ["yarn"], ["none", "yarn"]:
        report = evaluate(model("rope", 80), data, [80], ["same-targets"], scaling=scaling, **options)
        for kind in "probe", "attention":
            assert list(dict.fromkeys(row["scaling"] for row in report[kind])) == scaling
