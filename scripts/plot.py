"""Figures of a sweep: what its files have, a panel each. Seeds are averaged; bands span them.

    python scripts/plot.py runs/mine --out figure.png
    python scripts/plot.py results/mine --panels length --out length.pdf       # one of them, for a paper

length      perplexity or nats against context length, the same targets where the grid asked for them
loss        validation and training loss against tokens
position    nats by position in the window
parameters  final validation loss against the number of parameters
speed       final validation loss against the speed of training relative to rope's, by scripts/bench.py where the grid has `throughput`
"""

import argparse
import sys
from pathlib import Path

import _root
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

# Okabe & Ito's colours, which colour-blind readers can tell apart; markers for print
STYLES = {
    "learned": ("#000000", "o"), "sinusoidal": ("#999999", "P"), "none": ("#56B4E9", "x"), "rope": ("#0072B2", "s"),
    "crope": ("#E69F00", "^"), "comrope": ("#009E73", "D"), "carope": ("#D55E00", "v"), "alibi": ("#CC79A7", "*"),
}  # fmt: skip
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#000000", "#999999")
MARKERS, DASHES = "osD^vP*Xh<>p", ("-", "--", ":", "-.")
PANELS = ("length", "loss", "position", "parameters", "speed")


def styles_of(arms: dict[str, dict]) -> dict[str, dict]:
    """Colour, marker and line of each arm: its scheme's for the first arm of a scheme, for the others what no scheme here has."""
    schemes = {fields.get("pos", "rope") for fields in arms.values()}
    spare = [c for c in COLOURS if c not in {STYLES[s][0] for s in schemes if s in STYLES}]
    marks = [m for m in MARKERS if m not in {STYLES[s][1] for s in schemes if s in STYLES}]
    found, seen = {}, {}
    for arm, fields in arms.items():
        scheme = fields.get("pos", "rope")
        n = seen[scheme] = seen.get(scheme, -1) + 1
        first = n == 0 and scheme in STYLES
        colour, marker = (
            STYLES[scheme] if first else (spare.pop(0) if spare else "#777777", marks.pop(0) if marks else ".")
        )
        found[arm] = {"color": colour, "marker": marker, "linestyle": DASHES[n % len(DASHES)]}
    return found


def band(axes, x, by_seed: np.ndarray, style: dict, label: str) -> None:
    """Mean over seeds (seeds, n) with a band from the lowest to the highest. About ten markers a curve: in print, colours alone tell nothing."""
    axes.plot(x, by_seed.mean(0), label=label, markersize=5, linewidth=1.3, markevery=max(1, len(x) // 10), **style)
    if len(by_seed) > 1:
        axes.fill_between(x, by_seed.min(0), by_seed.max(0), color=style["color"], alpha=0.18, linewidth=0)


# ---- panels: (axes, study, setting, styles), False where there is nothing to draw


def draw_length(axes, study, setting, styles) -> bool:
    name, rows = first_rows(study, setting, lambda protocol: protocol != "per-position")
    if not rows or len({n for by in rows.values() for n in by}) < 2:
        return False
    protocol = next(iter(rows))[0]
    perplexity = study.grid.figure == "perplexity"
    lengths = sorted({n for (p, *_), by in rows.items() if p == protocol for n in by})
    for (p, arm, scaling), by_length in rows.items():
        if p != protocol or scaling != "none":
            continue
        points = [(n, [r["nats_per_token"] for r in by_length[n].values()]) for n in lengths if n in by_length]
        able = [(n, v) for n, v in points if None not in v]
        if able:
            values = np.array([v for _, v in able]).T  # (seeds, lengths)
            label = arm + (" (n/a beyond)" if len(able) < len(points) else "")
            band(axes, [n for n, _ in able], np.exp(values) if perplexity else values, styles[arm], label)
    config = next(c for arm in study.grid.arms if (c := study.config(setting, arm)))
    mark_training_length(axes, config.block_size)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    if perplexity and high > 2 * low:
        axes.set_yscale("log")
        plain_log_ticks(axes)
    axes.set(
        xlabel=f"context length ({study.unit}s)",
        ylabel=f"{'perplexity' if perplexity else 'nats'} per {study.unit}, {protocol}",
        title="By context length",
    )
    return True


def draw_loss(axes, study, setting, styles) -> bool:
    found, start, stop = False, [], []
    for arm in study.grid.arms:
        series = [run.series("val/loss") for run in study.runs[setting, arm].values()]
        if not series:
            continue
        n = min(len(x) for x, _ in series)
        values = np.array([v[:n] for _, v in series])
        if n < 3:  # validated at the ends only: training loss says more
            series = [run.series("train/loss") for run in study.runs[setting, arm].values()]
            n = min(len(x) for x, _ in series)
            values = np.array([v[:n] for _, v in series])
        if n < 2:
            continue
        found = True
        x = np.array(series[0][0][:n]) / 1e6
        skip = 1 if x[0] == 0 else 0  # ln V at the start would flatten the rest
        band(axes, x[skip:], values[:, skip:], styles[arm], arm)
        start.append(values.mean(0)[max(skip, n // 4)])
        stop.append(values.min())
    if found:
        if max(start) > min(stop):
            axes.set_ylim(min(stop) - 0.1 * (max(start) - min(stop)), max(start) + 0.25 * (max(start) - min(stop)))
        axes.set(
            xlabel=f"training {study.unit}s (millions)",
            ylabel=f"loss (nats per {study.unit})",
            title="Validation loss" if n >= 3 else "Loss",
        )
    return found


def draw_position(axes, study, setting, styles) -> bool:
    name, rows = first_rows(study, setting, lambda protocol: protocol == "per-position")
    found = False
    for (_, arm, scaling), by_length in (rows or {}).items():
        curves = [
            r["curve"]
            for by_seed in by_length.values()
            for r in by_seed.values()
            if r.get("curve") and scaling == "none"
        ]
        if curves:
            found = True
            first, last = np.array(curves[0]["first"]), np.array(curves[0]["last"])
            band(axes, np.sqrt(first * last), np.array([c["nats"] for c in curves]), styles[arm], arm)
    if found:
        config = next(c for arm in study.grid.arms if (c := study.config(setting, arm)))
        mark_training_length(axes, config.block_size)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set(
            xlabel=f"position: {study.unit}s of context",
            ylabel=f"nats per {study.unit}",
            title="By position in the window",
        )
    return found


def draw_parameters(axes, study, setting, styles) -> bool:
    from nanope.study.costs import model_cost

    x = {arm: (model_cost(c)[0] / 1e6, None) for arm in study.grid.arms if (c := study.config(setting, arm))}
    if not scatter(axes, study, setting, styles, x):
        return False
    axes.set(xlabel="parameters (millions)", title="Loss and size")
    return True


def draw_speed(axes, study, setting, styles) -> bool:
    """Where the grid asks for a benchmark of its arms: speeds as the runs went tell more about the machine's other work, and
    so do tokens a second beside ratios within a round."""
    from nanope.study.grid import bench_variants
    from nanope.study.results import throughput
    from nanope.study.statistics import speed_ratios

    if not (bench := throughput(study)):
        return False
    x = {
        arm: speed_ratios(bench, v)
        for arm, v in bench_variants(study.grid).items()
        if v in bench["seconds"] and arm in study.grid.arms
    }
    if not scatter(axes, study, setting, styles, x):
        return False
    axes.set(xlabel="training speed relative to rope", title="Loss and speed")
    return True


def scatter(axes, study, setting, styles, x: dict[str, tuple]) -> bool:
    """Final validation loss of the arms at their (x, its interval or None): the mean over seeds, and a bar from the lowest to
    the highest."""
    for arm, (at, interval) in x.items():
        if losses := list(study.losses(setting, arm).values()):
            mean = np.mean(losses)
            look = {**styles[arm], "linestyle": "none"}
            width = interval and [[at - interval[0]], [interval[1] - at]]
            axes.errorbar(
                [at], [mean], [[mean - min(losses)], [max(losses) - mean]], width, capsize=3, label=arm, **look
            )
    axes.set_ylabel(f"validation loss (nats per {study.unit})")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="both", useOffset=False)
    axes.margins(x=0.15)
    return len(axes.containers) > 1


def first_rows(study, setting, fits) -> tuple:
    """The first report of the grid that has rows of a fitting protocol, with them."""
    for name in study.grid.eval or {}:
        rows = {key: by for key, by in study.rows(setting, name).items() if fits(key[0])}
        if rows:
            return name, rows
    return None, None


def mark_training_length(axes, length: int) -> None:
    axes.axvline(length, color="black", linestyle=":", linewidth=1)
    axes.annotate(" training length", (length, 0.99), xycoords=("data", "axes fraction"), va="top", fontsize=7)


def plain_log_ticks(axes) -> None:
    """Ticks of a logarithmic axis as plain numbers, about ten of them."""
    low, high = axes.get_ylim()
    steps = [
        [m * 10**k for k in range(-2, 8) for m in ms] for ms in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 5), (1,))
    ]
    inside = [[t for t in ticks if low <= t <= high] for ticks in steps]
    axes.set_yticks(next((ticks for ticks in inside if len(ticks) <= 10), inside[-1]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw(study, out: Path, panels: list[str] | None = None) -> None:
    """A row of panels for each setting, with one legend. ValueError where there is nothing of the panels asked for."""
    styles = styles_of(study.grid.arms)
    drawers = {
        "length": draw_length,
        "loss": draw_loss,
        "position": draw_position,
        "parameters": draw_parameters,
        "speed": draw_speed,
    }
    settings = [s for s in study.grid.settings if any(study.runs[s, a] for a in study.grid.arms)]
    scratch = plt.figure()  # to learn which panels have something
    able = [p for p in panels or PANELS if any(drawers[p](scratch.add_subplot(), study, s, styles) for s in settings)]
    plt.close(scratch)
    if not able:
        raise ValueError(f"{study.folder} has nothing to draw of {', '.join(panels or PANELS)}")
    columns = 2 if len(able) in (2, 4) else min(len(able), 3)
    rows = -(-len(able) // columns)
    figure, axes = plt.subplots(
        rows * len(settings),
        columns,
        figsize=(4.6 * columns, 3.7 * rows * len(settings)),
        layout="constrained",
        squeeze=False,
    )
    for i, setting in enumerate(settings):
        places = iter(axes[i * rows : (i + 1) * rows].flat)
        for panel in able:
            place = next(places)
            drawers[panel](place, study, setting, styles)
            if setting:
                place.set_title(f"{setting}: {place.get_title()}", fontsize=10)
        for place in places:
            place.remove()
    handles = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    finish(figure)
    order = [k for arm in study.grid.arms for k in handles if k in (arm, f"{arm} (n/a beyond)")]
    if any(k.endswith(" (n/a beyond)") for k in order):
        order = [k for k in order if f"{k} (n/a beyond)" not in order]
    figure.legend(
        [handles[k] for k in order],
        order,
        loc="outside lower center",
        ncols=min(len(order), 2 + columns),
        fontsize=8,
        frameon=False,
    )
    save(figure, out)


def finish(figure) -> None:
    """The common look of all panels."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def save(figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def write(figure, out: Path) -> None:
    """The common look with a legend in each panel, and the file."""
    finish(figure)
    for axes in figure.axes:
        axes.legend(fontsize=8)
    save(figure, out)


def main() -> None:
    from nanope.study.results import Study

    parser = argparse.ArgumentParser(
        prog="scripts/plot.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="a sweep's folder of runs, or what --collect made of it")
    parser.add_argument("--out", type=Path, required=True, help="image to write (.png, .pdf, .svg)")
    parser.add_argument(
        "--panels", nargs="+", choices=PANELS, help="which panels (default: all that there is something for)"
    )
    args = parser.parse_args()
    try:
        draw(Study.read(args.folder), args.out, args.panels)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
