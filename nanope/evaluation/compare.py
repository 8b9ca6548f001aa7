"""Comparisons of runs: experiments found by their configs, paired differences on the same tokens, and their table."""

import dataclasses

import numpy as np

from nanope.config import RunConfig
from nanope.evaluation.statistics import paired_difference
from schemes import label

# Fields of a run in which two seeds of one experiment may differ
NOT_THE_EXPERIMENT = {
    *("out_dir", "seed", "data_seed", "resume", "device", "wandb", "micro_batch_size", "log_interval"),
    *("checkpoint_interval", "keep_checkpoints", "eval_interval", "eval_tokens"),
}
# Values of fields that configs made before these fields lack
DEFAULTS = {f.name: f.default for f in dataclasses.fields(RunConfig) if f.default is not dataclasses.MISSING}
# Of a report, in the JSON of a comparison
CONDITIONS = ("run", "step", "checkpoint_sha256", "data_hash", "targets_sha256", "stride", "split", "stream", "dtype")
CONDITIONS += ("device", "torch")


def arms_of(configs: list[dict]) -> list[str]:
    """The name of each run's experiment.

    Runs whose configs differ in nothing but seeds and housekeeping share an experiment. Its name is the scheme where
    that tells the experiments apart, else the fields that differ. ValueError unless there are two or more.
    """
    keys = [{k: v for k, v in (DEFAULTS | config).items() if k not in NOT_THE_EXPERIMENT} for config in configs]
    distinct = [key for i, key in enumerate(keys) if key not in keys[:i]]
    if len(distinct) < 2:
        raise ValueError(
            "the runs differ in their seeds at most: they are one experiment, and there is nothing to compare"
        )
    fields = [f for f in distinct[0] if any(key.get(f) != distinct[0][f] for key in distinct)]
    if len({label(key["pos"]) for key in distinct}) == len(distinct):
        fields = ["pos"]
    names = [" ".join(label(key[f]) if f == "pos" else f"{f}={key[f]}" for f in fields) for key in keys]
    seeds = [(name, config["seed"], config["data_seed"]) for name, config in zip(names, configs)]
    if len(set(seeds)) < len(seeds):
        raise ValueError("two of the runs have the same config and the same seeds: name each run once")
    return names


def compare(reports: list[dict]) -> list[dict]:
    """Each experiment against that of the first report, row by row: the mean difference in nats per token on the same
    tokens, negative where it is better than the first, with interval and p-value (statistics.paired_difference).
    ValueError where two reports scored different tokens."""
    arms = {}  # experiment → seeds → report
    for name, report in zip(arms_of([report["config"] for report in reports]), reports):
        arms.setdefault(name, {})[report["config"]["seed"], report["config"]["data_seed"]] = report
    first, *others = arms
    rows = []
    for name in others:
        ours, theirs = ([arms[arm][seed] for seed in sorted(arms[arm])] for arm in (first, name))
        for key in map(key_of, ours[0]["results"]):
            row = dict(zip(("protocol", "length", "scaling"), key)) | {"first": first, "second": name}
            a, b = ([row_of(report, key) for report in arm] for arm in (ours, theirs))
            if not all(r and r["nats_per_token"] is not None for r in a + b):
                reasons = [r["reason"] for r in a + b if r and r.get("reason")]
                rows.append(row | {"difference": None, "reason": (reasons or ["not there for every run"])[0]})
                continue
            if len({r["targets_sha256"] for r in a + b}) > 1:
                raise ValueError(
                    f"the runs' evaluations by {key[0]} at length {key[1]} scored different tokens: "
                    "evaluate all on the same data"
                )
            sums = [np.array([r["per_document"]["nll"] for r in arm]) for arm in (a, b)]
            paired = arms[name].keys() == arms[first].keys()
            rows.append(row | paired_difference(*sums, np.array(a[0]["per_document"]["tokens"]), paired))
    return rows


def key_of(row: dict) -> tuple:
    return row["protocol"], row["length"], row["scaling"]


def row_of(report: dict, key: tuple) -> dict | None:
    return next((row for row in report["results"] if key_of(row) == key), None)


def comparison_table(rows: list[dict]) -> str:
    """The comparison as a Markdown table, and what its intervals can tell."""
    lines = [
        "| protocol | length | scaling | compared | difference, nats/token | 95 % interval | p | seeds |",
        "|---|--:|---|---|--:|:-:|--:|:-:|",
    ]
    notes = []
    for r in rows:
        head = f"| {r['protocol']} | {r['length']} | {r['scaling']} | {r['second']} less {r['first']} |"
        if r["difference"] is None:
            lines.append(f"{head} n/a | | | |")
            notes.append(f"n/a at {r['length']}: {r['reason']}")
            continue
        interval = "one document, one seed | "
        if r["interval"]:
            interval = f"{r['interval'][0]:+.4f} … {r['interval'][1]:+.4f} | {r['p_value']:.2g}"
        seeds = f"{r['seeds'][0]}, {r['seeds'][1]}{', paired' if r['paired_seeds'] else ''}"
        lines.append(f"{head} {r['difference']:+.4f} | {interval} | {seeds} |")
    if any(r.get("levels") == ["documents"] for r in rows):
        notes.append(
            "One seed in an arm: interval and p-value are over documents, for these checkpoints. "
            "They say nothing about other seeds."
        )
    if any("seeds" in r.get("levels", ()) for r in rows):
        notes.append("Intervals and p-values are over seeds and documents.")
    return "\n".join([*lines, "", *dict.fromkeys(notes)])
