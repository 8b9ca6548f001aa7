"""Means, differences and intervals over seeds, and what they say about a published figure."""

import math

import numpy as np
import scipy

from nanope.evaluation.statistics import difference_of_matches, paired_difference


def seed_interval(values) -> list[float] | None:
    """95 % t interval of a mean over seeds, (n,); None for fewer than two."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return None
    reach = scipy.special.stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values))
    return [float(values.mean() - reach), float(values.mean() + reach)]


def answers_interval(rows: list[dict], figure: str = "accuracy", own: str = "interval") -> list[float] | None:
    """95 % interval of the mean of a figure of a task over seeds, from their rows, within 0 and 1. Where there is one
    seed, or all have the same figure, that of one over its examples: equal seeds do not tell how sure they are."""
    values = [row[figure] for row in rows]
    interval = seed_interval(values) if np.ptp(values) else rows[0][own]
    return interval and [max(interval[0], 0.0), min(interval[1], 1.0)]


def difference_of_losses(ours: dict[int, float], base: dict[int, float]) -> dict | None:
    """Mean paired difference of two arms' losses by seed, over the seeds that both have, with its t interval."""
    seeds = sorted(ours.keys() & base.keys())
    if not seeds:
        return None
    each = [ours[s] - base[s] for s in seeds]
    return {"difference": float(np.mean(each)), "interval": seed_interval(each), "seeds": len(seeds)}


def difference_of_rows(ours: dict[int, dict], base: dict[int, dict]) -> dict | None:
    """Mean paired difference of two rows of reports by seed: see contrast."""
    return contrast([ours], [base])


def change_of_difference(pair: tuple[dict, dict], first: tuple[dict, dict]) -> dict | None:
    """By how much a difference of rows changes from one setting, `first`, to another: that of `pair` less that of
    `first`, each (ours, base) as of difference_of_rows: see contrast."""
    return contrast([pair[0], first[1]], [pair[1], first[0]])


def contrast(plus: list[dict[int, dict]], minus: list[dict[int, dict]]) -> dict | None:
    """Sum of the rows of reports in `plus` less that of those in `minus`, each seed → row, in nats per token: the mean
    over the seeds that all have, with an interval over seeds and documents (paired_difference). None where no seed has
    all figures. ValueError where they scored different tokens."""
    every = [{s: row for s, row in rows.items() if row["nats_per_token"] is not None} for rows in plus + minus]
    seeds = sorted(set.intersection(*map(set, every)))
    if not seeds:
        return None
    if len({rows[s]["targets_sha256"] for rows in every for s in seeds}) > 1:
        raise ValueError("two evaluations scored different tokens: they are of different data")
    nll = np.array([[rows[s]["per_document"]["nll"] for s in seeds] for rows in every])  # (rows, seeds, documents)
    tokens = np.array(every[0][seeds[0]]["per_document"]["tokens"])
    found = paired_difference(nll[len(plus) :].sum(0), nll[: len(plus)].sum(0), tokens, True)
    return {"difference": found["difference"], "interval": found["interval"], "seeds": len(seeds)}


def beyond_noise(found: dict) -> bool:
    """Whether the interval of a difference excludes 0. One seed does not tell: its interval is over documents alone."""
    return (
        found["seeds"] > 1 and found["interval"] is not None and not found["interval"][0] <= 0 <= found["interval"][1]
    )


def difference_of_answers(ours: dict[int, dict], base: dict[int, dict]) -> dict | None:
    """Mean paired difference of two rows on a task by seed, of exact matches, with an interval over seeds and examples;
    None where one cannot reach the length. ValueError where they answered different examples."""
    seeds = [s for s in sorted(ours.keys() & base.keys()) if None not in (ours[s]["accuracy"], base[s]["accuracy"])]
    if not seeds:
        return None
    if len({r[s]["targets_sha256"] for r in (ours, base) for s in seeds}) > 1:
        raise ValueError("two runs' evaluations answered different examples: they are of different data")
    found = difference_of_matches(*([r[s] for s in seeds] for r in (base, ours)), True)
    return {"difference": found["difference"], "interval": found["interval"], "seeds": len(seeds)}


def verdict(published: float | None, interval: list[float] | None, seeds: int, spread: float = 0.0) -> str:
    """Whether a published figure, which its paper gives as ± `spread`, agrees with the measured interval: it lies
    inside; or outside, but not by more than the spread, so that the two cannot be told apart; or they differ."""
    if published is None:
        return ""
    if seeds < 2 or interval is None:
        return "one seed"
    low, high = interval
    if low <= published <= high:
        return "within interval"
    return "cannot be told apart" if low - spread <= published <= high + spread else "differs"


def direction(published: float, found: dict, spread: float = 0.0) -> str:
    """Whether a measured difference has the sign of the published one, whose ± is `spread`."""
    if found["seeds"] < 2 or found["interval"] is None:
        return "one seed"
    if found["interval"][0] <= 0 <= found["interval"][1]:
        return "inside noise"
    if abs(published) <= spread:
        return "cannot be told apart"
    return "same direction" if found["difference"] * published > 0 else "other direction"


def speed_ratios(bench: dict, variant: str) -> tuple[float, list[float]]:
    """Median over rounds of a variant's speed relative to rope's in the same round, with its 95 % bootstrap interval.
    `bench` is a report of scripts/bench.py."""
    rope = bench.get("rope_seconds", {}).get(variant, bench["seconds"]["rope"])  # of the same rounds
    ratios = np.array(rope) / np.array(bench["seconds"][variant])
    if len(ratios) < 2 or np.ptp(ratios) == 0:
        return float(np.median(ratios)), [float(ratios.min()), float(ratios.max())]
    drawn = scipy.stats.bootstrap(
        (ratios,), np.median, n_resamples=2000, confidence_level=0.95, method="percentile", rng=np.random.default_rng(0)
    )
    return float(np.median(ratios)), [float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)]
