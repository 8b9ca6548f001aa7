"""Tables of what evaluations measure beside the loss: effective context, recall, attention. Means over seeds."""

from collections.abc import Callable

import numpy as np

from nanope.evaluation.attention_by_distance import head_means
from nanope.evaluation.effective import effective_of
from nanope.evaluation.probe_tables import depth_of, label_of
from nanope.study.markup import Table, mean_cell, titled
from nanope.study.results import Study
from nanope.study.seed_statistics import seed_interval

# Of one report: (label of the row, column) → (figure, its interval within the run or None, digits)
Cells = dict[tuple[str, str], tuple[float, list[float] | None, int]]


def probe_tables(study: Study, setting: str, name: str) -> list[Table]:
    """Of one evaluation: the tables that its reports have something for."""
    unit = study.unit
    made = (
        (f"effective context, {unit}s, mean [range over seeds]", "scaling", effective, range_of),
        (f"recall of a value by its key, nats per {unit}, by context length", "scaling", recall, seed_interval),
        (f"recall by depth of the key, nats per {unit}", "length", by_depth("recall", 4), seed_interval),
        ("perplexity of the value by depth of its key", "length", by_depth("perplexity", 2), seed_interval),
        (f"attention, mean over layers and heads; distance in {unit}s", "length", attention, seed_interval),
    )
    found = (table_of(study, setting, name, *each) for each in made)
    return [table for table in found if table]


def table_of(
    study: Study,
    setting: str,
    name: str,
    title: str,
    second: str,
    cells: Callable[[dict], Cells],
    over_seeds: Callable[[list[float]], list[float] | None],
) -> Table | None:
    """A line for each arm and label: figures are means over seeds, with `over_seeds` of them, or with the run's own
    interval for one seed. `second` heads the labels, and is left out where they are all empty."""
    arms = {arm: [cells(report) for report in study.reports(setting, arm, name).values()] for arm in study.grid.arms}
    keys = list(dict.fromkeys(key for each in arms.values() for seed in each for key in seed))
    if not keys:
        return None
    columns, labels = list(dict.fromkeys(c for _, c in keys)), list(dict.fromkeys(label for label, _ in keys))
    named = any(labels)
    table = Table(titled(setting, f"{title} ({name})"), ["arm", *[second] * named, *columns], left=1 + named)
    for arm, seeds in arms.items():
        for label in labels:
            values = [[seed[label, c] for seed in seeds if (label, c) in seed] for c in columns]
            if any(values) or not named:
                table.rows.append([arm, *[label] * named, *(cell(each, over_seeds) for each in values)])
    return table


def cell(values: list[tuple], over_seeds: Callable) -> str:
    if not values:
        return "n/a"
    figures, (_, own, digits) = [value for value, *_ in values], values[0]
    interval = own if len(figures) == 1 else over_seeds(figures) if np.ptp(figures) else None
    return mean_cell(figures, interval, lambda value: round(value, digits) + 0.0, digits)  # + 0.0: no -0.0000


def range_of(values: list[float]) -> list[float]:
    return [min(values), max(values)]


# ---- cells of one report


def effective(report: dict) -> Cells:
    found = {}
    for e in effective_of(report):
        label = "" if e["scaling"] == "none" else f"{e['scaling']} ×{e['factor']:g}"
        found[label, f"within {e['epsilon']:g} nats of the longest"] = (e["length"], e["interval"], 0)
        found[label, "longest"] = (e["longest"], None, 0)
        found[label, "its gain over the shortest, nats"] = (e["gain"], e["gain_interval"], 4)
    return found


def recall(report: dict) -> Cells:
    scaling = lambda row: label_of(row).partition(" ")[2]  # noqa: E731
    return {
        (scaling(row), str(row["length"])): (row["recall"], row["interval"], 4)
        for row in report.get("probe", ())
        if row["recall"] is not None
    }


def by_depth(figure: str, digits: int) -> Callable[[dict], Cells]:
    return lambda report: {
        (label_of(row), depth_of(b)): (b[figure], b["interval"] if figure == "recall" else None, digits)
        for row in report.get("probe", ())
        for b in row.get("by_depth") or ()
        if b["trials"]
    }


def attention(report: dict) -> Cells:
    found = {}
    for row in report.get("attention", ()):
        for name, shown, digits in (("entropy", "entropy, nats", 3), ("mean_distance", "mean distance", 1)):
            if row["layers"]:
                found[label_of(row), shown] = (float(np.mean(head_means(row, name))), None, digits)
                found[label_of(row), f"{shown}, if uniform"] = (row["uniform"][name], None, digits)
    return found
