"""What the panels of a figure show, as plain numbers: of a study, or of evaluation reports. drawing.py draws them.

Means, intervals and differences are those of the tables, by the same functions. A panel is a function of (study,
setting, looks) that returns Lines, Forest or Points, or None where the study has nothing for it; or a list of panels.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from data.tasks import TASKS
from nanope.study.costs import model_cost
from nanope.study.drawing import Curve, Forest, Heat, Lines, Points
from nanope.study.grid import as_list, bench_variants
from nanope.study.probe_panels import attention, attention_of_report, needle, needle_of_reports
from nanope.study.results import Study, scaled, three_of, throughput
from nanope.study.seed_statistics import (
    answers_interval,
    beyond_noise,
    difference_of_losses,
    difference_of_rows,
    seed_interval,
    speed_ratios,
)
from schemes import label

# Of known schemes. The colours stay apart under simulated protanopia, deuteranopia and tritanopia (OKLab distance of at
# least 0.09 for each pair), and are dark enough for labels on white (contrast of at least 3).
COLOURS = {
    "learned": "#222222", "sinusoidal": "#d07c12", "none": "#969696", "rope": "#0b4f8a",
    "crope": "#3a99ee", "comrope": "#027f63", "carope": "#d03024", "alibi": "#9049c4",
}  # fmt: skip
SPARE = ("#871a46", "#dd55b0", "#3a24b8", "#8a9a1c", "#13a9bd", "#6b4410")
DASHES = ("-", "--", ":", "-.")  # the first, second, … arm of one scheme
SCALINGS = {"none": "-", "pi": ":", "ntk": "--", "yarn": "-.", "yarn-code": (0, (6, 1, 1, 1, 1, 1))}
BANDS = 3  # curves with a band: more cover each other


def looks_of(schemes: dict[str, str]) -> dict[str, dict]:
    """Colour and line style of each arm (arm → its scheme, as schemes.label names it). The first arm of a known scheme
    has the scheme's colour, all others a spare one. The arms of one scheme differ in their line style too, where there
    are enough. Where colours run out they come again, with another line style."""
    spare = [*SPARE, *(colour for scheme, colour in COLOURS.items() if scheme not in schemes.values())]
    others = [colour for scheme, colour in COLOURS.items() if scheme != "rope"]  # which others are compared with
    again = [(colour, style) for style in DASHES[1:] for colour in (*others, *SPARE)]
    found, styles = {}, {}
    for arm, scheme in schemes.items():
        seen = styles.setdefault(scheme, [])
        look = COLOURS.get(scheme), DASHES[len(seen) % len(DASHES)]
        if (seen or not look[0]) and spare:
            look = spare.pop(0), look[1]
        elif seen or not look[0]:
            left = [pair for pair in again if pair not in found.values()]
            look = next((pair for pair in left if pair[1] not in seen), left[0] if left else ("#555555", look[1]))
        seen.append(look[1])
        found[arm] = look
    return {arm: {"color": colour, "linestyle": style} for arm, (colour, style) in found.items()}


# ---- by context length


def length(study: Study, setting: str, looks: dict) -> Lines | None:
    """Nats or perplexity against context length. None where there are fewer than two lengths."""
    protocol, rows = study.rows_by_length(setting)
    lengths = sorted({n for by_length in rows.values() for n in by_length})
    if len(lengths) < 2:
        return None
    baseline, show = study.grid.baseline, show_of(study)
    curves = [curve for arm, by in rows.items() if (curve := curve_of(arm, by, show, looks[arm])).x]
    if not curves:
        return None
    with_bands(curves, baseline, {arm: d for arm, (d,) in study.differences(setting, lengths[-1:]).items()})
    paired = protocol == "same-targets"
    title = f"Same {study.unit}s scored, longer context" if paired else f"Longer context, {protocol}"
    base = rows.get(baseline, {}) if paired else {}
    return by_length(study, setting, title, note_of(study, setting, curves), curves, lengths, base)


def scalings(study: Study, setting: str, looks: dict) -> list[Lines]:
    """The same by each rule of scaled frequencies: a panel for each evaluation that compares several."""
    panels, show = [], show_of(study)
    for name, options in (study.grid.eval or {}).items():
        if len({*as_list(options.get("scaling"))} - {"none"}) < 2:
            continue
        rows = {key[1:]: at for key, at in study.rows(setting, name).items() if key[0] == "same-targets"}
        curves = []
        for (arm, scaling), at in rows.items():
            title, look = by_rule(arm, scaling, at, looks[arm])
            curves.append(curve_of(title, at, show, look))
            curves[-1].band = any(curves[-1].intervals)
        note = note_of(study, setting, []) + "; bars: 95 % intervals" * any(curve.band for curve in curves)
        lengths, base = sorted({n for at in rows.values() for n in at}), rows.get((study.grid.baseline, "none"), {})
        title, shown = f"Scaled frequencies, {name}", [curve for curve in curves if curve.x]
        panels.append(by_length(study, setting, title, note, shown, lengths, base, bars=True))
    return panels


def by_length(
    study: Study, setting: str, title: str, note: str, curves: list[Curve], lengths: list[int], base: dict, bars=False
) -> Lines:
    """Curves against context length. base: the baseline's rows, length → seed → row, whose level at its training length
    is drawn; {} for none."""
    show, baseline = show_of(study), study.grid.baseline
    block, ticks, xlabel = scale_of_lengths(study, setting, lengths)
    level = None
    if trained := values_of(base.get(block, {})):
        colour = next(curve for curve in curves if curve.name == baseline).look["color"]
        level = (show(np.mean(trained)), f"{baseline}, cropped to its training length", colour)
    return Lines(
        title,
        note,
        xlabel,
        f"{'nats' if show is float else 'perplexity'} per {study.unit}",
        curves,
        baseline,
        ticks,
        log_x=True,
        log_y=show is not float,
        level=level,
        bars=bars,
    )


def show_of(study: Study) -> Callable:
    """What figures show of nats: perplexity, or these."""
    return math.exp if study.grid.figure == "perplexity" else float


def by_rule(arm: str, scaling: str, at: dict, look: dict) -> tuple[str, dict]:
    """The name and the look of an arm's rows (length → seed → row) by a rule of scaled frequencies."""
    title = scaled(arm, next(row for by_seed in at.values() for row in by_seed.values()))
    return title, look | ({} if scaling == "none" else {"linestyle": SCALINGS[scaling]})


def scale_of_lengths(study: Study, setting: str, lengths: list[int]) -> tuple[int, dict[float, str], str]:
    """(the baseline's training length, tick labels, axis label), in training lengths where all arms have the same."""
    configs = {arm: c for arm in study.grid.arms if (c := study.config(setting, arm))}
    block = configs.get(study.grid.baseline, next(iter(configs.values()))).block_size
    if len({c.block_size for c in configs.values()}) > 1:
        return block, {n: f"{n:,}" for n in lengths}, f"context length ({study.unit}s)"
    ticks = {n: f"{n / block:.3g}×" for n in lengths}
    return block, ticks, f"context, in training lengths ({block:,} {study.unit}s)"


def values_of(by_seed: dict[int, dict]) -> list[float]:
    """Nats of each seed; empty where a seed has none."""
    values = [row["nats_per_token"] for row in by_seed.values()]
    return [] if None in values or not np.isfinite(values).all() else values


def curve_of(arm: str, by_length: dict, show: Callable, look: dict) -> Curve:
    """Means over seeds with intervals over seeds, or over documents where there is one seed."""
    able = {n: values for n in sorted(by_length) if (values := values_of(by_length[n]))}
    intervals = []
    for n, values in able.items():
        interval = seed_interval(values) or next(iter(by_length[n].values()))["interval"]
        intervals.append(interval and [show(bound) for bound in interval])
    ends = any(row["nats_per_token"] is None for by_seed in by_length.values() for row in by_seed.values())
    return Curve(arm, look, list(able), [show(np.mean(v)) for v in able.values()], intervals, ends=ends)


def with_bands(curves: list[Curve], baseline: str, ends: dict[str, dict | None]) -> None:
    """Give a band to the baseline and to the lowest of the arms that end below it beyond noise, BANDS in all. `ends`:
    arm → its paired difference at the end. Bands of arms that tie would cover each other; differences say more."""
    clear = {arm: d["difference"] for arm, d in ends.items() if arm != baseline and d and beyond_noise(d)}
    better = {arm: difference for arm, difference in clear.items() if difference < 0}
    chosen = [baseline, *sorted(better, key=better.get)][:BANDS]
    for curve in curves:
        curve.band = curve.name in chosen and any(curve.intervals)


def note_of(study: Study, setting: str, curves: list[Curve]) -> str:
    """How many seeds, and what a band is, where a curve has one."""
    counts = [len(done) for arm in study.grid.arms if (done := study.runs[setting, arm])]
    fewest, seeds = min(counts), max(counts)
    note = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    if fewest < seeds:  # of a study that is not finished
        note = f"means of {fewest} to {seeds} seeds"
    several = {len(study.runs[setting, curve.name]) > 1 for curve in curves if curve.band}
    over = " or ".join(["seeds"] * (True in several) + ["documents"] * (False in several))
    return note + f"; band: 95 % interval over {over}" * bool(over)


def difference(study: Study, setting: str, looks: dict) -> Forest | None:
    """Paired differences from the baseline at up to three lengths, or of validation losses where there is no report.
    The arm that is lowest at the longest length comes first."""
    baseline, unit = study.grid.baseline, study.unit
    _, rows = study.rows_by_length(setting)
    if rows:
        lengths = sorted({n for by_length in rows.values() for n in by_length})
        _, ticks, _ = scale_of_lengths(study, setting, lengths)
        shown = three_of(lengths, [n for n in lengths if ticks[n] in ("1×", "4×", "16×")])
        marks = [ticks[n] for n in shown]
        found = study.differences(setting, shown)
        what = f"nats per {unit}"
    else:
        losses = study.losses(setting, baseline)
        marks, what = ["at the last step"], f"validation loss, nats per {unit},"
        arms = [arm for arm in study.grid.arms if arm != baseline]
        found = {arm: [difference_of_losses(study.losses(setting, arm), losses)] for arm in arms}
    found = {arm: each for arm, each in found.items() if any(each)}
    if not found:
        return None
    seeds = max(d["seeds"] for each in found.values() for d in each if d)
    cropped = ", cropped to 1×" * bool(study.cropped_to(setting))
    known = lambda arm: [d["difference"] for d in found[arm] if d]  # noqa: E731
    order = sorted(found, key=lambda arm: (found[arm][-1] is None, known(arm)[-1]))
    return Forest(
        f"Paired difference from {baseline}{cropped}",
        "filled: 95 % interval excludes 0" if seeds > 1 else "one seed: none is filled",
        f"← better      {what} minus {'cropped ' * bool(cropped)}{baseline}’s",
        marks,
        [(arm, looks[arm], found[arm]) for arm in order],
    )


# ---- tasks


def accuracy(study: Study, setting: str, looks: dict) -> Lines | None:
    """Exact matches against the length of a task's examples, with chance. None where no evaluation is of a task."""
    for name in study.grid.eval or {}:
        if rows := study.rows(setting, name, task=True):
            break
    else:
        return None
    known = {arm: by_length for (_, arm, scaling), by_length in rows.items() if scaling == "none"}
    curves = [answers_curve(arm, by_length, looks[arm]) for arm, by_length in known.items()]
    reports = [report for arm in known for report in study.reports(setting, arm, name).values()]
    note = f"{note_of(study, setting, [])}; bars: 95 % intervals"
    return task_panel(setting or reports[0]["task"]["name"], note, reports, [c for c in curves if c.x])


def answers_curve(name: str, by_length: dict, look: dict) -> Curve:
    """Mean exact matches over seeds with answers_interval."""
    found = Curve(name, look, [], [], [], band=True)
    for length in sorted(by_length):
        values = [row["accuracy"] for row in by_length[length].values()]
        if None in values:
            found.ends = True
            continue
        found.x.append(length)
        found.y.append(float(np.mean(values)))
        found.intervals.append(answers_interval([*by_length[length].values()]))
    return found


def task_panel(title: str, note: str, reports: list[dict], curves: list[Curve]) -> Lines:
    task, chance = reports[0]["task"], {}
    for report in reports:
        chance |= {row["length"]: row["chance"] for row in report["results"] if row["protocol"] == "task"}
    lengths = sorted(chance)
    guess = Curve("chance", {"color": "#999999", "linestyle": ":"}, lengths, [chance[n] for n in lengths], [])
    guess.intervals = [None] * len(lengths)
    visible = [guess] if max(guess.y) > 0.02 else []
    ticks = {n: f"{n:,}" for n in lengths}
    return Lines(
        title, note, f"length in {TASKS[task['name']].unit}", "exact match", [*curves, *visible], ticks=ticks,
        log_x=True, trained=(task["length"],), bars=True, limits=(-0.03, 1.03),
    )  # fmt: skip


# ---- the other panels


def loss(study: Study, setting: str, looks: dict) -> Lines | None:
    """Validation loss against tokens, or training loss where it was validated at the ends only."""
    curves = {}
    for name in ("val/loss", "train/loss"):
        curves[name] = [
            c for a in study.grid.arms if (c := training_curve(study, setting, a, name, looks[a])) is not None
        ]
        if any(len(c.x) > 2 for c in curves[name]):
            break
    else:
        name = "val/loss" if curves["val/loss"] else "train/loss"
    if not curves[name]:
        return None
    base = study.losses(setting, study.grid.baseline)
    ends = {arm: difference_of_losses(study.losses(setting, arm), base) for arm in study.grid.arms}
    with_bands(curves[name], study.grid.baseline, ends)
    return Lines(
        "Validation loss" if name == "val/loss" else "Training loss",
        note_of(study, setting, curves[name]),
        f"training {study.unit}s (millions)",
        f"nats per {study.unit}",
        curves[name],
        study.grid.baseline,
        points=False,
    )


def training_curve(study: Study, setting: str, arm: str, name: str, look: dict) -> Curve | None:
    """Mean over seeds of a metric, as far as all seeds have it; without step 0, whose ln V would flatten the rest."""
    series = [run.series(name) for run in study.runs[setting, arm].values()]
    n = min((len(x) for x, _ in series), default=0)
    skip = 1 if n and series[0][0][0] == 0 else 0
    if n - skip < 2:
        return None
    values = np.array([y[skip:n] for _, y in series])
    intervals = [seed_interval(column) for column in values.T]
    x = [tokens / 1e6 for tokens in series[0][0][skip:n]]
    return Curve(arm, look, x, list(values.mean(0)), intervals, settled=(n - skip) // 4)


def position(study: Study, setting: str, looks: dict) -> Lines | None:
    """Nats by position in the window, of the first report by position."""
    for name in study.grid.eval or {}:
        found = {
            arm: by_length
            for (protocol, arm, scaling), by_length in study.rows(setting, name).items()
            if protocol == "per-position" and scaling == "none"
        }
        by_seed = {
            arm: [r["curve"] for by in found[arm].values() for r in by.values() if r.get("curve")] for arm in found
        }
        if curves := [position_curve(arm, each, looks[arm]) for arm, each in by_seed.items() if each]:
            break
    else:
        return None
    baseline, longest = study.grid.baseline, max(n for by_length in found.values() for n in by_length)
    base = found.get(baseline, {}).get(longest, {})
    with_bands(curves, baseline, {arm: difference_of_rows(by.get(longest, {}), base) for arm, by in found.items()})
    trained = {c.block_size for arm in study.grid.arms if (c := study.config(setting, arm))}
    return Lines(
        "By position in the window",
        note_of(study, setting, curves),
        f"position: {study.unit}s of context",
        f"nats per {study.unit}",
        curves,
        baseline,
        log_x=True,
        trained=tuple(sorted(trained)),
        points=False,
    )


def position_curve(name: str, by_seed: list[dict], look: dict) -> Curve:
    """Mean over seeds by bin, drawn at the bin's geometric middle."""
    first, last = (np.array(by_seed[0][key]) for key in ("first", "last"))
    values = np.array([curve["nats"] for curve in by_seed])
    over_documents = [None if low is None else [low, high] for low, high in zip(by_seed[0]["low"], by_seed[0]["high"])]
    intervals = [seed_interval(column) for column in values.T] if len(by_seed) > 1 else over_documents
    return Curve(name, look, list(np.sqrt(first * last)), list(values.mean(0)), intervals)


def parameters(study: Study, setting: str, looks: dict) -> Points | None:
    """Final validation loss against the number of parameters."""
    configs = {arm: c for arm in study.grid.arms if (c := study.config(setting, arm))}
    x = {arm: (model_cost(config)[0] / 1e6, None) for arm, config in configs.items()}
    return points_of(study, setting, looks, x, "Loss and size", "parameters (millions)")


def speed(study: Study, setting: str, looks: dict) -> Points | None:
    """Final validation loss against the speed of training relative to rope's, where the grid asks for a benchmark of
    its arms. Speeds of the runs themselves tell more about the machine's other work."""
    if not (bench := throughput(study)):
        return None
    variants = {arm: v for arm, v in bench_variants(study.grid).items() if arm in study.grid.arms}
    x = {arm: speed_ratios(bench, v) for arm, v in variants.items() if v in bench["seconds"]}
    return points_of(study, setting, looks, x, "Loss and speed", "training speed relative to rope")


def points_of(study: Study, setting: str, looks: dict, x: dict[str, tuple], title: str, xlabel: str) -> Points | None:
    """Final validation losses, means over seeds with their intervals, at x: arm → (x, its interval or None)."""
    panel = Points(title, note_of(study, setting, []), xlabel, f"validation loss (nats per {study.unit})")
    for arm, (at, interval) in x.items():
        if losses := list(study.losses(setting, arm).values()):
            panel.points.append((arm, looks[arm], at, interval, float(np.mean(losses)), seed_interval(losses)))
    if any(over or x_over for _, _, _, x_over, _, over in panel.points):
        panel.note += "; bars: 95 % intervals"
    return panel if len(panel.points) > 1 else None


PANELS = {
    "length": length,
    "scalings": scalings,
    "difference": difference,
    "loss": loss,
    "accuracy": accuracy,
    "position": position,
    "parameters": parameters,
    "speed": speed,
    "attention": attention,
    "needle": needle,
}


# ---- evaluation reports, without a study


OF_REPORTS = ("length", "position", "accuracy")  # panels of reports, unless others are asked for


def of_reports(reports: list[dict], protocol: str, panels: Sequence[str] = OF_REPORTS) -> list[Lines | Heat]:
    """Of reports of eval.py: perplexity by `protocol` against length, nats by position, attention by distance, recall
    by depth, exact matches by length: those of `panels` that a report has. Intervals are over documents or examples.
    ValueError where there is none."""
    schemes = [label(r["pos"]) for r in reports]
    alone = len(set(schemes)) == len(schemes)
    names = schemes if alone else [str(r.get("run") or r["model"]).rstrip("/").rpartition("/")[2] for r in reports]
    looks = looks_of({i: scheme for i, scheme in enumerate(schemes)})
    by_length, by_position, lengths, answered = [], [], set(), {}
    for i, (name, report) in enumerate(zip(names, reports)):
        for scaling in dict.fromkeys(row["scaling"] for row in report["results"]):
            rows = [row for row in report["results"] if row["scaling"] == scaling]
            title = scaled(name, rows[0])
            look = {"color": looks[i]["color"], "linestyle": SCALINGS[scaling]}
            if answers := {row["length"]: {0: row} for row in rows if row["protocol"] == "task"}:
                answered.setdefault(report["task"]["name"], []).append((report, answers_curve(title, answers, look)))
                continue
            mine = {row["length"]: {0: row} for row in rows if row["protocol"] == protocol}
            if (curve := curve_of(title, mine, math.exp, look)).x:
                by_length.append(curve)
                lengths |= mine.keys()
            by_position += [position_curve(title, [row["curve"]], look) for row in rows if row.get("curve")]
    tasks = [
        task_panel(task, "one run each; bars: 95 % intervals over examples", *map(list, zip(*pairs)))
        for task, pairs in answered.items()
    ]
    for curve in by_length + by_position[:BANDS]:
        curve.band = any(curve.intervals)
    unit = "byte" if all(r["tokenizer"]["name"] == "byte" for r in reports) else "token"
    trained, note = tuple(sorted({r["block_size"] for r in reports})), "95 % intervals over documents"
    left = Lines(
        f"Context length, {protocol}", note, f"context length ({unit}s)", f"perplexity per {unit}",
        by_length, ticks={n: f"{n:,}" for n in sorted(lengths)}, log_x=True, log_y=True, trained=trained, bars=True,
    )  # fmt: skip
    right = Lines(
        "By position in the window", note, f"position: {unit}s of context", f"nats per {unit}",
        by_position, log_x=True, trained=trained, points=False,
    )  # fmt: skip
    attended = [panel for name, report in zip(names, reports) for panel in attention_of_report(name, report, unit)]
    made = {"length": [left] * bool(by_length), "position": [right] * bool(by_position)}
    made |= {"attention": attended, "needle": needle_of_reports(names, reports, unit), "accuracy": tasks}
    found = [panel for name in panels for panel in made.get(name, ())]
    if not found:
        if tuple(panels) == OF_REPORTS:
            raise ValueError(f"the reports have no figures by {protocol}, and no per-position curve")
        raise ValueError(f"the reports have nothing to draw of {', '.join(panels)}")
    return found
