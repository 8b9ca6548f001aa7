"""Effective context, against its definition with a slow t interval, and its words."""

import itertools

import numpy as np
import pytest
import scipy.stats
from evaluating import evaluate, model

from nanope.evaluation.effective import effective_contexts
from nanope.evaluation.probe_tables import in_words
from nanope.evaluation.report import flat_figures, table

LENGTHS = (16, 32, 64, 128)


def row(length, nll, tokens, scaling="none", protocol="same-targets"):
    each = {"nll": list(nll), "tokens": list(tokens)}
    about = {"length": length, "protocol": protocol, "scaling": scaling, "factor": 1.0}
    return about | {"nats_per_token": sum(nll) / sum(tokens), "per_document": each}


def made(levels, seed=0, documents=12, noise=0.02, **about):
    """Rows at LENGTHS whose losses differ from `levels` by noise of each document."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(50, 200, documents)
    common = generator.normal(size=documents)  # of the text, the same at every length
    nll = {n: tokens * (v + common + noise * generator.normal(size=documents)) for n, v in zip(LENGTHS, levels)}
    return [row(n, each, tokens, **about) for n, each in nll.items()]


def slow(rows, epsilon):
    """length and interval by the definition, document by document."""
    longest, found = rows[-1], []
    for r in rows:
        tokens = r["per_document"]["tokens"]
        d = [a - b for a, b in zip(r["per_document"]["nll"], longest["per_document"]["nll"])]
        mean, n = sum(d) / sum(tokens), len(d)
        variance = sum((x - mean * t) ** 2 for x, t in zip(d, tokens)) * n / (n - 1) / sum(tokens) ** 2
        reach = scipy.stats.t.ppf(0.975, n - 1) * variance**0.5
        found.append((mean - reach, mean, mean + reach))
    low, point, high = (next(r["length"] for r, f in zip(rows, found) if f[i] <= epsilon) for i in range(3))
    return point, [low, high]


@pytest.mark.parametrize("seed,epsilon", [*itertools.product(range(4), (0.0, 0.01, 0.05))])
def test_it_is_the_least_length_within_epsilon_of_the_longest(seed, epsilon):
    rows = made((2.1, 2.03, 2.01, 2.0), seed)
    (found,) = effective_contexts(rows[::-1], epsilon)
    assert (found["length"], found["interval"]) == slow(rows, epsilon)
    assert (found["shortest"], found["longest"], found["epsilon"]) == (16, 128, epsilon)
    assert found["gain"] == pytest.approx(rows[0]["nats_per_token"] - rows[-1]["nats_per_token"])
    assert found["gain_interval"][0] < found["gain"] < found["gain_interval"][1]


def test_noise_widens_it_and_a_single_document_has_no_interval():
    levels = (2.1, 2.03, 2.015, 2.0)
    assert effective_contexts(made(levels, noise=1e-6), 0.02)[0]["interval"] == [64, 64]
    low, high = effective_contexts(made(levels, noise=0.05), 0.02)[0]["interval"]
    assert low < 64 < high
    alone = effective_contexts(made(levels, documents=1, noise=1e-6), 0.02)[0]
    assert alone["length"] == 64 and alone["interval"] is alone["gain_interval"] is None
    assert "95 %" not in in_words(alone)


def test_a_loss_that_rises_is_called_no_use_of_context():
    (rising,) = effective_contexts(made((2.0, 1.9, 2.1, 2.4), noise=1e-4), 0.01)
    assert rising["length"] == 16 and rising["lowest"] == 32 and rising["rises"]
    assert "0.4000 nats above" in in_words(rising) and "no use of context, rather than a short one" in in_words(rising)
    (flat,) = effective_contexts(made((2.0, 2.0, 2.0, 2.0), noise=1e-4), 0.01)
    assert flat["length"] == 16 and not flat["rises"] and "gains nothing" in in_words(flat)
    (falling,) = effective_contexts(made((2.5, 2.2, 2.1, 2.0), noise=1e-4), 0.01)
    assert falling["length"] == 128 and in_words(falling).endswith("of the loss at 128.")
    (partly,) = effective_contexts(made((2.5, 2.2, 2.0, 2.1), noise=1e-4), 0.01)
    assert partly["length"] == 64 and "lowest at 64, and rises" in in_words(partly)


def test_scalings_are_apart_and_one_length_is_none():
    rows = made((2.5, 2.2, 2.1, 2.0)) + made((2.1, 2.0, 2.0, 2.0), noise=1e-4, scaling="yarn")
    found = {e["scaling"]: e["length"] for e in effective_contexts(rows, 0.01)}
    assert found == {"none": 128, "yarn": 32}
    assert effective_contexts(rows[:1] + made((1, 1, 1, 1), protocol="sliding"), 0.01) == []


def test_a_report_has_it_of_the_lengths_in_reach(data):
    report = evaluate(model("learned"), data, [4, 16, 64], ["same-targets"], max_targets=64, epsilon=0.3)
    (found,) = report["effective_context"]
    assert found["longest"] == 16 and found["epsilon"] == 0.3
    assert "Effective context:" in table(report)
    assert flat_figures(report)["eval/effective-context"] == found["length"]
    assert evaluate(model("rope"), data, [16], ["same-targets"], max_targets=64)["effective_context"] == []
