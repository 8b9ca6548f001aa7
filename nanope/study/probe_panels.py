"""Panels of what evaluations measure beside the loss: attention by distance, and recall by depth of the needle.

Of a study, attention is a panel with a curve an arm, and recall a panel an arm; of reports both are a panel a report.
"""

import numpy as np
from matplotlib import colormaps

from nanope.evaluation.probe_tables import depth_of, label_of
from nanope.study.drawing import GREY, Curve, Heat, Lines
from nanope.study.results import Study

LEAST = 1e-7  # smaller mean weights are not drawn: a decaying bias has them down to 1e-30
NOISE = 0.1  # nats: colours do not resolve less, so that noise makes no pattern


# ---- attention by distance


def attention(study: Study, setting: str, looks: dict) -> Lines | None:
    """Mean over layers, heads and seeds, a curve an arm, at the longest length that any arm has."""
    rows = {}  # arm → rows of its seeds
    for name in study.grid.eval or {}:
        for arm in study.grid.arms:
            of_arm = [row for report in study.reports(setting, arm, name).values() for row in looked_at(report)]
            rows.setdefault(arm, []).extend(row for row in of_arm if row["scaling"] == "none")
    longest = max((row["length"] for of_arm in rows.values() for row in of_arm), default=0)
    rows = {arm: at for arm, of_arm in rows.items() if (at := [r for r in of_arm if r["length"] == longest])}
    if not rows:
        return None
    seeds = max(map(len, rows.values()))
    curves = [
        curve_of(arm, looks[arm], at[0], np.mean([weights_of(r).mean((0, 1)) for r in at], 0))
        for arm, at in rows.items()
    ]
    note = f"windows of {longest:,}, mean over layers and heads" + (f", {seeds} seeds" if seeds > 1 else "")
    return lines("Attention by distance", note, curves, next(iter(rows.values()))[0], study.unit)


def attention_of_report(name: str, report: dict, unit: str) -> list[Lines]:
    """A panel with a curve a layer, mean over heads, at the longest length of each scaling."""
    found = {row["scaling"]: row for row in sorted(looked_at(report), key=lambda row: row["length"])}
    panels = []
    for row in found.values():
        each = weights_of(row).mean(1)  # (layers, bins)
        colours = colormaps["viridis"](np.linspace(0, 0.8, len(each)))
        curves = [
            curve_of(f"layer {i}", {"color": tuple(colour), "linestyle": "-"}, row, weights)
            for i, (colour, weights) in enumerate(zip(colours, each), 1)
        ]
        note = f"windows of {label_of(row)}, mean over heads"
        panels.append(lines(f"Attention by distance, {name}", note, curves, row, unit))
    return panels


def looked_at(report: dict) -> list[dict]:
    return [row for row in report.get("attention", ()) if row["layers"]]


def weights_of(row: dict) -> np.ndarray:
    """(layers, heads, bins)."""
    return np.array([[head["weight"] for head in layer] for layer in row["layers"]])


def curve_of(name: str, look: dict, row: dict, weights: np.ndarray) -> Curve:
    """Weights (bins,) at the geometric middles of the bins, without distance 0, for which a logarithm has no place."""
    middles = np.sqrt(np.multiply(row["distance"]["first"], row["distance"]["last"], dtype=float))
    shown = (middles > 0) & (weights >= LEAST)
    return Curve(name, look, list(middles[shown]), list(weights[shown]), [None] * int(shown.sum()))


def lines(title: str, note: str, curves: list[Curve], row: dict, unit: str) -> Lines:
    even = curve_of("uniform", {"color": GREY, "linestyle": ":"}, row, np.array(row["uniform"]["weight"]))
    return Lines(
        title, note, f"distance ({unit}s back)", "mean weight of a pair", [*(c for c in curves if c.x), even],
        log_x=True, log_y=True, points=False,
    )  # fmt: skip


# ---- depth of the needle by length


def needle(study: Study, setting: str, looks: dict) -> list[Heat]:
    """A panel an arm, mean over seeds, of the first evaluation with a probe."""
    for name in study.grid.eval or {}:
        reports = {arm: [*study.reports(setting, arm, name).values()] for arm in study.grid.arms}
        if found := [panel for arm, each in reports.items() for panel in heats(arm, each, study.unit)]:
            return scaled(found)
    return []


def needle_of_reports(names: list[str], reports: list[dict], unit: str) -> list[Heat]:
    return scaled([panel for name, report in zip(names, reports) for panel in heats(name, [report], unit)])


def heats(name: str, reports: list[dict], unit: str) -> list[Heat]:
    """A panel for each scaling: recall, mean over `reports` of several seeds. Recall, not the perplexity of the value:
    other depths and lengths have other trials or fillers, whose difficulty the control takes out."""
    found = {}  # scaling → length → rows of seeds
    for row in (row for report in reports for row in report.get("probe", ())):
        found.setdefault(row["scaling"], {}).setdefault(row["length"], []).append(row)
    panels = []
    for scaling, by_length in found.items():
        bins = next((row["by_depth"] for rows in by_length.values() for row in rows if row.get("by_depth")), [])
        if not bins:
            continue
        values = [[mean_at(rows, i) for rows in by_length.values()] for i in range(len(bins))]
        title = f"Recall by depth, {name}" + (f", {scaling}" if scaling != "none" else "")
        note = f"nats per {unit} of the value; {sum(b['trials'] for b in bins)} trials a length"
        note += f", mean of {len(reports)} seeds" if len(reports) > 1 else ""
        xlabel, ylabel = f"context length ({unit}s)", "depth of the key (0: beginning)"
        panels.append(Heat(title, note, xlabel, ylabel, [f"{n:,}" for n in by_length], [*map(depth_of, bins)], values))
    return panels


def mean_at(rows: list[dict], i: int) -> float | None:
    """Mean over seeds of a bin's recall; None where there is none."""
    values = [row["by_depth"][i]["recall"] for row in rows if row.get("by_depth") and row["by_depth"][i]["trials"]]
    return float(np.mean(values)) if values else None


def scaled(panels: list[Heat]) -> list[Heat]:
    """With one scale of colours for all, so that they compare."""
    top = max([NOISE, *(v for panel in panels for row in panel.values for v in row if v is not None)])
    for panel in panels:
        panel.top = top
    return panels
