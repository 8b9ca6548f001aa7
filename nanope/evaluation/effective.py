"""Effective context: how much of its longest context a model's loss needs, on the same targets."""

import numpy as np

from nanope.evaluation.statistics import paired_difference

EPSILON = 0.01  # nats per token that count as none, where nothing else is said


def effective_of(report: dict) -> list[dict]:
    """The effective contexts of a report of eval.py; of one from before eval.py wrote them, what its rows give."""
    found = report.get("effective_context")
    return effective_contexts(report.get("results", ()), EPSILON) if found is None else found


def effective_contexts(rows: list[dict], epsilon: float) -> list[dict]:
    """For each scaling of a model, the least length whose loss on the same targets is at most `epsilon` nats per token
    above that at the longest length which the model reaches. `rows` are those of a report.

    d(L) is the loss at L less that at the longest, with its 95 % interval over documents. `length` is the least L with
    d(L) ≤ ε. `interval` goes from the least L where the lower end of d's interval is ≤ ε to the least where its upper
    end is; null for a single document. `gain` is d at the `shortest` length, with its interval: what the longest
    context saves. It is negative where the loss rises with length, and then the effective context is the shortest.
    `lowest` is the length of the lowest loss; `rises`: that at the longest is above it beyond noise. Scalings with
    fewer than two lengths in reach have no entry.
    """
    found = []
    same = [row for row in rows if row["protocol"] == "same-targets" and row["nats_per_token"] is not None]
    for scaling in dict.fromkeys(row["scaling"] for row in same):
        own = {row["length"]: row for row in sorted(same, key=lambda r: r["length"]) if row["scaling"] == scaling}
        if len(own) < 2:
            continue
        shortest, longest = min(own), max(own)
        d = {length: above(row, own[longest]) for length, row in own.items()}
        within = lambda bound, d=d: next(n for n, ends in d.items() if ends[bound] <= epsilon)  # noqa: E731
        low, point, high = (within(bound) for bound in (0, 1, 2))
        lowest = min(own, key=lambda n, own=own: own[n]["nats_per_token"])
        sure = len(own[longest]["per_document"]["nll"]) > 1
        found.append({
            "scaling": scaling, "factor": own[longest]["factor"], "epsilon": epsilon, "length": point,
            "interval": [low, high] if sure else None, "shortest": shortest, "longest": longest,
            "gain": d[shortest][1], "gain_interval": [d[shortest][0], d[shortest][2]] if sure else None,
            "lowest": lowest, "rises": d[lowest][2] < 0,
        })  # fmt: skip
    return found


def above(row: dict, longest: dict) -> tuple[float, float, float]:
    """(low, difference, high) of a row's loss less the longest's, nats per token; all alike where there is no
    interval."""
    a, b = (np.array([r["per_document"]["nll"]]) for r in (longest, row))
    d = paired_difference(a, b, np.array(row["per_document"]["tokens"]), paired=True)
    low, high = d["interval"] or (d["difference"],) * 2
    return low, d["difference"], high
