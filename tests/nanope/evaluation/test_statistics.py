"""Intervals, means and paired differences against what they promise, and against scipy."""

import math

import numpy as np
import pytest
import scipy.stats

from nanope.evaluation.statistics import document_interval, paired_difference, position_curve, row_figures


def test_means_weight_tokens_not_documents():
    nll, document = np.array([1.0, 1.0, 1.0, 5.0]), np.array([0, 0, 0, 2])
    figures = row_figures(nll, np.array([True, True, False, False]), np.array([1, 2, 1, 4]), document)
    assert figures["nats_per_token"] == 2.0 and figures["documents"] == 2 and figures["accuracy"] == 0.5
    assert figures["bits_per_byte"] == pytest.approx(8 / math.log(2) / 8)
    assert figures["perplexity_interval"] == pytest.approx(np.exp(figures["interval"]))
    alone = row_figures(nll, nll > 2, nll, np.zeros(4, int))
    assert alone["interval"] is None is alone["perplexity_interval"]
    found = {"document": [0, 2], "nll": [3.0, 5.0], "tokens": [3, 1], "bytes": [4, 4]}
    assert figures["per_document"] == found


def test_a_curve_counts_each_token_for_its_own_document():
    """A window of a stream may hold the end of one document and the beginning of the next."""
    nll = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [1.0, 3.0, 5.0, 9.0]])
    document = np.array([[0, 0, 1, 1], [1, 1, 1, 3], [3, 3, 3, 3]])
    curve = position_curve(nll.ravel(), document.ravel(), 4)
    for i, (first, last) in enumerate(zip(curve["first"], curve["last"])):
        here, of = nll[:, first - 1 : last], document[:, first - 1 : last]
        each = [here[of == d] for d in np.unique(of)]
        band = document_interval(np.array([d.sum() for d in each]), np.array([d.size for d in each]))
        assert (curve["low"][i], curve["high"][i]) == pytest.approx(band)
        assert curve["nats"][i] == pytest.approx(here.mean()) and curve["tokens"][i] == here.size


def test_an_interval_over_equal_documents_is_students():
    means = np.random.default_rng(3).normal(2, 0.3, 7)
    expected = scipy.stats.t.interval(0.95, 6, means.mean(), scipy.stats.sem(means))
    assert document_interval(means * 50, np.full(7, 50)) == pytest.approx(expected)
    # Documents that have the mean exactly, of whatever length, leave no doubt
    assert document_interval(np.array([2.0, 8.0]), np.array([1, 4])) == pytest.approx([2.0, 2.0])


def coverage(n, sigma, interval, trials=2000):
    """How often the interval of n documents holds the truth, 2 nats; their lengths are log-normal, their NLL normal."""
    generator, inside = np.random.default_rng(n), 0
    for _ in range(trials):
        counts = np.ceil(1000 * np.exp(sigma * generator.standard_normal(n)))
        low, high = interval(counts * generator.normal(2, 0.2, n), counts)
        inside += low <= 2 <= high
    return inside / trials


def bootstrapped(sums, counts):
    """The interval of before: percentiles over resampled documents."""
    drawn = np.random.default_rng(0).integers(0, len(sums), (1000, len(sums)))
    return np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])


@pytest.mark.slow
@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(13, marks=pytest.mark.slow)])
def test_intervals_cover_as_documented(n):
    assert 0.91 <= coverage(n, 0.5, document_interval) <= 0.97
    assert 0.84 <= coverage(n, 1.0, document_interval) <= 0.93  # a few documents have most of the text
    assert coverage(n, 0.5, bootstrapped, 300) < 0.93


def draw(generator, seeds, sd_seed, sd_document, paired):
    """Two arms with no true difference: NLL sums (seeds, documents) of each, and tokens."""
    tokens, base = generator.integers(1000, 6000, 12), generator.normal(2, 0.3, 12)
    common = generator.normal(0, 0.05, seeds)
    arms = []
    for sd in (0, sd_document):
        seed = (common if paired else generator.normal(0, 0.05, seeds)) + generator.normal(0, sd_seed, seeds)
        noise = generator.normal(0, sd, 12) + seed[:, None] + generator.normal(0, 0.005, (seeds, 12))
        arms.append((base + noise) * tokens)
    return *arms, tokens


@pytest.mark.parametrize(
    "seeds, sd_seed, sd_document, paired",
    [
        (3, 0.02, 0.001, True),
        (3, 0.001, 0.02, True),
        (3, 0.02, 0.02, True),
        (3, 0.02, 0.02, False),
        (2, 0.02, 0.02, True),  # Satterthwaite's degrees of freedom have 0.90 here
    ],
)
def test_a_comparison_errs_no_more_often_than_it_says(seeds, sd_seed, sd_document, paired):
    generator = np.random.default_rng(0)
    drawn = [draw(generator, seeds, sd_seed, sd_document, paired) for _ in range(400)]
    results = [paired_difference(*arms, paired) for arms in drawn]
    inside = np.mean([r["interval"][0] <= 0 <= r["interval"][1] for r in results])
    assert 0.94 <= inside <= 0.995  # a percentile bootstrap has 0.76 in the first case
    assert all((r["p_value"] < 0.05) == (not r["interval"][0] <= 0 <= r["interval"][1]) for r in results)
    assert results[0]["levels"] == ["seeds", "documents"]
    if paired:
        for (a, b, tokens), got in zip(drawn, results):
            alone = scipy.stats.ttest_rel(b.sum(1), a.sum(1)).confidence_interval()
            assert got["interval"][1] - got["interval"][0] >= (alone.high - alone.low) / tokens.sum()


def test_levels_join_as_in_banerjee():
    a = np.random.default_rng(4).normal(2, 0.3, (3, 9)) * 500
    b = a + np.random.default_rng(5).normal(10, 5, (3, 9)) + np.array([[-8], [1], [7]])
    got, each = paired_difference(a, b, np.full(9, 500), True), (b - a) / 500
    widths = [np.ptp(scipy.stats.ttest_1samp(each.mean(axis), 0).confidence_interval()) for axis in (0, 1)]
    assert np.ptp(got["interval"]) == pytest.approx(math.hypot(*widths))
    assert got["difference"] == pytest.approx(each.mean())
    same = paired_difference(a, a[::-1], np.full(9, 500), True)  # seeds differ, and not their means
    assert same["difference"] == pytest.approx(0) and same["p_value"] == pytest.approx(1)
    sure = paired_difference(np.zeros((1, 300)), 1 + np.linspace(0, 1e-9, 300)[None], np.ones(300), True)
    assert 0 < sure["p_value"] < 1e-90


def test_pairing_removes_what_documents_and_seeds_share():
    generator, tokens = np.random.default_rng(1), np.full(10, 1000)
    base = generator.normal(2, 1, 10) + generator.normal(0, 0.5, (3, 1))
    other = base + 0.01 + generator.normal(0, 0.001, (3, 10))
    got = paired_difference(base * tokens, other * tokens, tokens, True)
    assert got["difference"] == pytest.approx(0.01, abs=0.001) and got["p_value"] < 0.001
    assert paired_difference(base * tokens, other * tokens, tokens, False)["p_value"] > 0.5


def test_one_seed_is_a_paired_t_test_over_equal_documents():
    a, b = np.random.default_rng(2).normal(2, 0.3, (2, 9))
    got = paired_difference(a[None] * 500, b[None] * 500, np.full(9, 500), True)
    reference = scipy.stats.ttest_rel(b, a)
    assert got["p_value"] == pytest.approx(reference.pvalue) and got["levels"] == ["documents"]
    assert got["interval"] == pytest.approx(list(reference.confidence_interval()))
    alone = paired_difference(a[None, :1], b[None, :1], np.ones(1), True)
    assert alone["interval"] is None and alone["p_value"] is None
