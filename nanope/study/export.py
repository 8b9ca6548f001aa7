"""Reports of eval.py as one CSV: a line a row of each report, with the fields of its run."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from nanope.evaluation.effective import effective_of
from nanope.evaluation.key_tokens import key_rows
from nanope.evaluation.probe_tables import depth_of
from nanope.study.files import open_runs
from schemes import label

FIGURES = (
    "nats_per_token", "perplexity", "bits_per_byte", "accuracy", "token_accuracy", "chance", "recall", "tokens",
    "documents", "trials", "examples", "low", "high", "targets_sha256", "reason",
)  # fmt: skip
SOMETIMES = ("offset", "largest_change", "depth", "layer", "head", "entropy", "mean_distance")
SOMETIMES += ("effective_context", "effective_low", "effective_high", "epsilon")
SOMETIMES += ("task", "token_chance", "cropped_accuracy", "cropped_token_accuracy")


def write_csv(paths: list[Path], file: TextIO) -> None:
    """Write the rows of the reports at `paths`, or of all runs of the folders among them. Fields of train.py that all
    runs share are left out. ValueError for what is no report of eval.py, and where there is none."""
    lines = [line for path in paths for name, report in reports_of(path) for line in lines_of(name, report)]
    if not lines:
        raise ValueError(f"no report of eval.py in {', '.join(map(str, paths))}: name reports, or a folder of runs")
    fields = list(dict.fromkeys(k for line in lines for k in line))
    same = {k for k in fields if k.startswith("config.") and len({json.dumps(line.get(k)) for line in lines}) == 1}
    writer = csv.DictWriter(file, [k for k in fields if k not in same])
    writer.writeheader()
    writer.writerows({k: v for k, v in line.items() if k not in same} for line in lines)


def reports_of(path: Path) -> Iterator[tuple[str, dict]]:
    """(name, report) of a report's file, or of all reports of a folder of runs or results."""
    if not path.is_dir():
        try:
            yield str(path), json.loads(path.read_text())
        except ValueError as error:  # no JSON, or no text
            raise ValueError(f"{path} is no report of eval.py: {type(error).__name__} {error}") from error
        return
    files = open_runs(path)
    for run in files.names():
        for name in sorted(files.reports(run)):
            if "results" in (report := files.report(run, name)):  # measurements of other kinds have no rows
                yield str(path / run / "eval" / name), report


def lines_of(name: str, report: dict) -> list[dict]:
    """One flat mapping for each row of results, of the probe, and of what else was measured (more_rows)."""
    try:
        rows = [
            *complete_rows(report),
            *({"protocol": "probe", **p} for p in report.get("probe", ())),
            *more_rows(report),
        ]
        about = {"report": name, "run": report.get("run") or report.get("model"), "step": report.get("step")}
        about |= {"pos": label(report["pos"])} | {f"config.{k}": v for k, v in report.get("config", {}).items()}
        about |= {"data": report.get("data_dir"), "data_hash": report["data_hash"], "dtype": report["dtype"]}
        return [
            about
            | {k: row.get(k) for k in ("protocol", "length", "scaling", "factor")}
            | {"split": report.get("split"), "stride": report["stride"], "stream": report["stream"]}
            | {k: row.get(k) for k in FIGURES}
            | {k: row[k] for k in SOMETIMES if k in row}
            | dict(zip(("low", "high"), row.get("interval") or (None, None)))
            for row in rows
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is no report of eval.py: {type(error).__name__} {error}") from error


def more_rows(report: dict) -> Iterator[dict]:
    """Rows of key tokens, of the probe's depths, and of attention, one a layer and head."""
    yield from key_rows(report["results"])
    for row in report.get("probe", ()):
        for b in row.get("by_depth") or ():
            about = {name: row[name] for name in ("length", "scaling", "factor")}
            yield {**about, **b, "protocol": "probe depth", "depth": depth_of(b)}
    for row in report.get("attention", ()):
        for layer, heads in enumerate(row["layers"] or (), 1):
            for head, figures in enumerate(heads, 1):
                yield {**row, **figures, "protocol": "attention", "layer": layer, "head": head}


def complete_rows(report: dict) -> Iterator[dict]:
    """The rows of results, those of same-targets with the effective context of their scaling, those of a task with its
    name and the figures of the cropped model."""
    found = {e["scaling"]: e for e in effective_of(report)}
    for row in report["results"]:
        if row["protocol"] == "same-targets" and (e := found.get(row["scaling"])):
            low, high = e["interval"] or (None, None)
            row = {**row, "effective_context": e["length"], "effective_low": low, "effective_high": high}
            row["epsilon"] = e["epsilon"]
        if row["protocol"] == "task":
            cropped = {f"cropped_{k}": v for k, v in row["cropped"].items()}
            row = {**row, **cropped, "task": report["task"]["name"]}
        yield row
