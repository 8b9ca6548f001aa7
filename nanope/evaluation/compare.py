"""Comparisons of runs: experiments found by their configs, paired differences on the same tokens, and their table."""

import hashlib
import math

import numpy as np

from data.shards import Data
from nanope.config import NEUTRAL, completed, config_of
from nanope.evaluation.key_tokens import key_rows
from nanope.evaluation.options import Options, lengths_in_tokens
from nanope.evaluation.probe_tables import key_notes
from nanope.evaluation.protocols import Targets, split_of
from nanope.evaluation.same_text import same_text
from nanope.evaluation.statistics import FEW, difference_of_matches, few_documents, paired_difference
from schemes import label

# Fields of a run in which two seeds of one experiment may differ, and eot, which is the data's
NOT_THE_EXPERIMENT = {*NEUTRAL, "seed", "data_seed", "eot"} - {"data_dir", "compile"}
# Of a report, in the JSON of a comparison
CONDITIONS = ("run", "step", "checkpoint_sha256", "data_hash", "targets_sha256", "stride", "split", "stream", "dtype")
CONDITIONS += ("device", "torch", "data_dir", "other_data", "text_sha256")


def arms_of(configs: list[dict]) -> list[str]:
    """The name of each run's experiment.

    Runs whose configs differ in nothing but seeds and housekeeping share an experiment. Its name is the scheme where
    that tells the experiments apart, else the fields that differ. ValueError unless there are two or more.
    """
    keys = [{k: v for k, v in whole(config).items() if k not in NOT_THE_EXPERIMENT} for config in configs]
    distinct = [key for i, key in enumerate(keys) if key not in keys[:i]]
    if len(distinct) < 2:
        raise ValueError(
            "the runs differ in their seeds at most: they are one experiment, and there is nothing to compare"
        )
    fields = [f for f in distinct[0] if any(key.get(f) != distinct[0][f] for key in distinct)]
    for fewer in ([f for f in fields if f != "pos_options"], ["pos"]):  # short names, where they do
        if len({name_of(key, fewer) for key in distinct}) == len(distinct):
            fields = fewer
    names = [name_of(key, fields) for key in keys]
    seeds = [(name, config["seed"], config["data_seed"]) for name, config in zip(names, configs)]
    if len(set(seeds)) < len(seeds):
        raise ValueError("two of the runs have the same config and the same seeds: name each run once")
    return names


def name_of(key: dict, fields: list[str]) -> str:
    return " ".join(label(key[f]) if f == "pos" else f"{f}={key[f]}" for f in fields)


def whole(config: dict) -> dict:
    """A run's config with the fields and options that did not exist when it was made, at their defaults."""
    ours = config_of(config)
    return completed(vars(ours) | config, ours)


def tokens_for_all(lengths: list[int | str], trained: list[int]) -> tuple[list[int], set[int]]:
    """Lengths in tokens, and those training lengths of the runs that are shorter than the longest and not among them.
    ValueError for multiples of training lengths that differ."""
    sizes = {*trained}
    if len(sizes) > 1 and any(isinstance(n, str) for n in lengths):
        many = ", ".join(map(str, sorted(sizes)))
        raise ValueError(f"the training lengths of the runs differ ({many}): give --lengths as numbers")
    asked = lengths_in_tokens(lengths, max(sizes))
    return asked, {size for size in sizes if size < max(asked)} - {*asked}


def choose_text(
    datas: list[Data], options: Options, key_tokens: bool = False
) -> tuple[list[Targets | None], str | None]:
    """What the runs with these data are to score, so that they compare: None, what each chooses by itself, where all
    have one tokenizer; else the same text (same_text), and its hash. `key_tokens`: they are asked for, which are of one
    tokenizer. ValueError where there is nothing that compares."""
    if "task" in options.protocol:
        names = dict.fromkeys(data.manifest["task"]["name"] for data in datas)
        if len(names) > 1:
            raise ValueError(f"the runs were trained on different tasks: {', '.join(names)}")
        return [None] * len(datas), None
    if len({data.tokenizer_hash for data in datas}) == 1:
        shards = {tuple(r["sha256"] for r in records_of(data, options.split)): data for data in datas}
        # Folders may differ in how they cut the same tokens into shards
        if len(shards) > 1 and len({tokens_hash(data, options.split) for data in shards.values()}) > 1:
            folders = ", ".join(dict.fromkeys(str(data.folder) for data in datas))
            raise ValueError(
                f"the runs' data hold different text in {options.split} ({folders}): give --data with the folder that "
                "all are to be evaluated on"
            )
        return [None] * len(datas), None
    if options.stream or "per-position" in options.protocol or key_tokens:
        what = "--stream" if options.stream else "--key_tokens" if key_tokens else "--protocol per-position"
        raise ValueError(f"{what} does not score the same text under two tokenizers: leave it out")
    return same_text(datas, options)


def compare(reports: list[dict]) -> list[dict]:
    """Each experiment against that of the first report, row by row: the mean difference on the same tokens in nats per
    token, or where they have different tokenizers on the same text in bits per byte (`unit`), negative where it is
    better than the first, with interval and p-value (statistics.paired_difference). Of a task it is the difference of
    exact matches, positive where it is better. ValueError where two reports scored different tokens, or different
    text."""
    arms = {}  # experiment → seeds → report
    for name, report in zip(arms_of([report["config"] for report in reports]), reports):
        arms.setdefault(name, {})[report["config"]["seed"], report["config"]["data_seed"]] = report
    text = reports[0].get("text_sha256")
    size, nats, unit = ("bytes", math.log(2), "bits/byte") if text else ("tokens", 1.0, "nats/token")
    if reports[0].get("task"):
        unit = "exact match"
    first, *others = arms
    rows = []
    for name in others:
        ours, theirs = ([arms[arm][seed] for seed in sorted(arms[arm])] for arm in (first, name))
        for key in map(key_of, rows_of(ours[0])):
            row = dict(zip(("protocol", "length", "scaling"), key)) | {"first": first, "second": name, "unit": unit}
            a, b = ([row_of(report, key) for report in arm] for arm in (ours, theirs))
            figure = "accuracy" if unit == "exact match" else "nats_per_token"
            if not all(r and r[figure] is not None for r in a + b):
                reasons = [r["reason"] for r in a + b if r and r.get("reason")]
                rows.append(row | {"difference": None, "reason": (reasons or ["not there for every run"])[0]})
                continue
            scored = {report.get("text_sha256") for report in reports} if text else {r["targets_sha256"] for r in a + b}
            if len(scored) > 1:
                raise ValueError(
                    f"the runs' evaluations by {key[0]} at length {key[1]} scored different tokens: "
                    "evaluate all on the same data"
                )
            paired = arms[name].keys() == arms[first].keys()
            if unit == "exact match":
                rows.append(row | difference_of_matches(a, b, paired))
                continue
            sums = [np.array([r["per_document"]["nll"] for r in arm]) / nats for arm in (a, b)]
            rows.append(row | paired_difference(*sums, np.array(a[0]["per_document"][size]), paired))
    return rows


def records_of(data: Data, split: str) -> list[dict]:
    return data.records("val" if split == "val_long" else split)


def tokens_hash(data: Data, split: str) -> str:
    """The sha256 of a split's tokens, whatever their shards are."""
    digest = hashlib.sha256()
    for path in split_of(data, split).files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def key_of(row: dict) -> tuple:
    return row["protocol"], row["length"], row["scaling"]


def rows_of(report: dict) -> list[dict]:
    """All rows, those of key tokens as of a protocol of their own."""
    return report["results"] + key_rows(report["results"])


def row_of(report: dict, key: tuple) -> dict | None:
    return next((row for row in rows_of(report) if key_of(row) == key), None)


def comparison_table(rows: list[dict], reports: list[dict] = ()) -> str:
    """The comparison as a Markdown table, and what its intervals can tell."""
    lines = [
        f"| protocol | length | scaling | compared | difference, {rows[0]['unit']} | 95 % interval | p | seeds |",
        "|---|--:|---|---|--:|:-:|--:|:-:|",
    ]
    notes, over = [], "examples" if rows[0]["unit"] == "exact match" else "documents"
    for r in rows:
        head = f"| {r['protocol']} | {r['length']} | {r['scaling']} | {r['second']} less {r['first']} |"
        if r["difference"] is None:
            lines.append(f"{head} n/a | | | |")
            notes.append(f"n/a at {r['length']}: {r['reason']}")
            continue
        interval = "one document, one seed | "
        if r["interval"]:
            interval = f"{r['interval'][0]:+.4f} … {r['interval'][1]:+.4f} | "
            interval += "" if r["p_value"] is None else f"{r['p_value']:.2g}"
        seeds = f"{r['seeds'][0]}, {r['seeds'][1]}{', paired' if r['paired_seeds'] else ''}"
        lines.append(f"{head} {r['difference']:+.4f} | {interval} | {seeds} |")
    measured = [r for r in rows if r.get("interval")]
    if any(r["levels"] == ["documents"] for r in measured):
        notes.append(
            f"One seed in an arm: interval and p-value are over {over}, for these checkpoints. "
            "They say nothing about other seeds."
        )
    if any("seeds" in r["levels"] for r in measured):
        notes.append(f"Intervals and p-values are over seeds and {over}.")
    if measured:
        notes.append(
            "Each is for its own difference alone, not for all at once: without any true difference one row of twenty "
            "has p < 0.05."
        )
    if any("documents" in r["levels"] and r["documents"] < FEW for r in measured):
        notes.append(few_documents(min(r["documents"] for r in measured)))
    if rows[0]["unit"] == "bits/byte":
        names = ", ".join(dict.fromkeys(report["tokenizer"]["name"] for report in reports))
        notes.append(f"Tokenizers {names}: all scored the same text. Lengths are in tokens of each.")
    notes += key_notes(reports)
    for report in reports:
        if report.get("other_data"):
            notes.append(f"Other data than {report['run']} was trained on: {report['data_dir']}")
    return "\n".join([*lines, "", *dict.fromkeys(notes)])
