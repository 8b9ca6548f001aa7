"""How a panel is drawn: Lines, Forest, Points and Heat say what is in it, and `draw_panel` puts it into axes.

Curves are named at their ends. An arm far from all others does not set an axis: what is outside stands at the edge,
with an arrow and its value.
"""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, ScalarFormatter
from matplotlib.transforms import ScaledTranslation

from nanope.study.labels import Labels, wrapped
from nanope.study.seed_statistics import beyond_noise

MARKS = "osD"  # of a forest's lengths
FLATTENS = 4  # arms without which an axis has a quarter of the range or less do not set it
GREY = "#555555"


# ---- what is drawn


@dataclass
class Curve:
    """A line: y against x, with an interval [low, high] or None for each point."""

    name: str
    look: dict  # color and linestyle, as matplotlib names them
    x: list[float]
    y: list[float]
    intervals: list[list[float] | None]
    band: bool = False  # show the intervals
    ends: bool = False  # cannot go on: longer contexts are impossible
    settled: int = 0  # the axis shows y[settled:] whole; what is before may leave it


@dataclass
class Lines:
    """Curves over one axis."""

    title: str
    note: str
    xlabel: str
    ylabel: str
    curves: list[Curve]
    baseline: str = ""  # the name of the curve that all others are compared with
    ticks: dict[float, str] | None = None  # position → label
    log_x: bool = False
    log_y: bool = False
    level: tuple[float, str, str] | None = None  # a dashed line: y, label, colour
    trained: tuple[float, ...] = ()  # dotted lines at x, labelled as the training length
    bars: bool = False  # intervals are bars, not bands
    points: bool = True  # each point matters: one outside the axis is marked at its edge
    limits: tuple[float, float] | None = None  # of y; where None, what the curves need


@dataclass
class Forest:
    """Differences from a baseline. A row is (name, look, for each mark a finding {difference, interval, …} or None)."""

    title: str
    note: str
    xlabel: str
    marks: list[str]
    rows: list[tuple[str, dict, list[dict | None]]]


@dataclass
class Points:
    """An arm each: (name, look, x, its interval or None, y, its interval or None)."""

    title: str
    note: str
    xlabel: str
    ylabel: str
    points: list[tuple] = field(default_factory=list)


@dataclass
class Heat:
    """A value, or None, for each row and column, as the colour of a cell with its number in it."""

    title: str
    note: str
    xlabel: str
    ylabel: str
    columns: list[str]
    rows: list[str]
    values: list[list[float | None]]
    top: float = 1.0  # the value of the last colour; the first is that of 0 and below


# ---- axes


def robust_limits(extents: list[tuple[float, float]], always: tuple[float, ...] = ()) -> tuple[float, float]:
    """Limits of an axis from the (low, high) of each arm, and values that it must show. Arms without which it has a
    quarter of its range or less do not count. They are fewer than half of the arms, and as few as possible."""

    def width(kept):
        ends = [*itertools.chain(*kept), *always]
        return max(ends) - min(ends)

    kept = list(extents)
    while True:
        rest, found = list(kept), False
        for _ in range((len(kept) - 1) // 2):
            rest.pop(min(range(len(rest)), key=lambda i: width(rest[:i] + rest[i + 1 :])))
            if found := width(kept) >= FLATTENS * width(rest) > 0:
                break
        if not found:
            ends = [*itertools.chain(*kept), *always]
            return min(ends), max(ends)
        kept = rest


def padded(low: float, high: float, below: float = 0.05, above: float = 0.05) -> tuple[float, float]:
    reach = (high - low) or abs(high) * 0.02 or 1.0
    return low - below * reach, high + above * reach


def plain_log_ticks(axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis as plain numbers, at most eight of them; as powers of ten where they go far below
    0.01."""
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())
    if low < 1e-3:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        powers = powers[:: -(-len(powers) // 8)]
        axis.set_ticks([10.0**k for k in powers], [f"{10.0**k:g}" if powers[0] >= -4 else f"1e{k}" for k in powers])
        return
    steps = [
        [m * 10**k for k in range(-4, 8) for m in ms]
        for ms in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 3, 5, 7), (1, 2, 5), (1,))
    ]
    inside = [[t for t in ticks if low <= t <= high] for ticks in steps]
    axis.set_ticks(next((ticks for ticks in inside if len(ticks) <= 8), inside[-1]))
    axis.set_major_formatter(ScalarFormatter())


def thinned(ticks: dict[float, str]) -> dict[float, str]:
    """Those ticks of a logarithmic axis that have room: a tenth of its length apart."""
    ends, found = np.log(list(ticks)), {}
    for at, text in ticks.items():
        if not found or np.log(at / list(found)[-1]) >= 0.09 * np.ptp(ends):
            found[at] = text
    return found


def heading(axes, title: str, note: str = "", left: float = 0) -> None:
    """The title above a panel, and a note in grey below it; `left`: points to the left of the panel's edge."""
    place = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    axes.annotate(title, xytext=(-left, 14), fontsize=9, weight="bold", **place)
    axes.annotate(note, xytext=(-left, 4), fontsize=7, color=GREY, **place)


# ---- panels


def draw_lines(axes, panel: Lines, title: str) -> Labels:
    labels, curves = Labels(axes), panel.curves
    low, high = panel.limits or y_limits(panel)
    log_y = panel.log_y and high > 2 * low
    axes.set_yscale("log" if log_y else "linear")
    axes.set_ylim(low, high)
    first, last = min(c.x[0] for c in curves), max(c.x[-1] for c in curves)
    margins = 0.025, 0.02 if panel.bars else 0.005
    if panel.log_x:
        axes.set_xscale("log", base=2)
        axes.set_xlim(*np.exp2(padded(*np.log2([first, last]), *margins)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
    else:
        axes.set_xlim(*padded(first, last, *margins))
        axes.xaxis.set_major_locator(MaxNLocator(6))
    if panel.ticks:
        ticks = thinned(panel.ticks)
        axes.set_xticks(list(ticks), list(ticks.values()))
    if log_y:
        plain_log_ticks(axes.yaxis, low, high)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    for order, curve in enumerate(curves):
        draw_curve(axes, panel, curve, labels, order, last)
    if panel.level:
        y, text, colour = panel.level
        axes.axhline(y, color=colour, linewidth=0.7, linestyle=(0, (5, 3)), zorder=1)
        labels.avoid(axes.get_xlim(), [y, y])
        x0, x1 = np.log(axes.get_xlim())
        labels.near(text, [(np.exp(x0 + at * (x1 - x0)), y) for at in (0.45, 0.3, 0.6, 0.15)], colour)
    for x in panel.trained:
        axes.axvline(x, color="black", linewidth=0.6, linestyle=":", zorder=1)
        labels.avoid([x, x], (low, high))
        labels.near("training length", [(x, y) for y in (high, low)], GREY)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    heading(axes, title, panel.note)
    return labels


def y_limits(panel: Lines) -> tuple[float, float]:
    """Robust against outlying curves; the baseline's is never one, nor is what its narrowest interval holds. Bands may
    widen the axis by three quarters each way, and leave it beyond."""
    to, back = (np.log, np.exp) if panel.log_y else (np.asarray, np.asarray)
    extents = {c.name: (to(min(c.y[c.settled :])), to(max(c.y[c.settled :]))) for c in panel.curves}
    base = next((c.intervals[c.settled :] for c in panel.curves if c.name == panel.baseline and c.band), [])
    noise = min((to(i) for i in base if i), key=np.ptp, default=())
    low, high = robust_limits(list(extents.values()), (*extents.get(panel.baseline, ()), *noise))
    reach = 0.75 * (high - low)
    inside = [c for c in panel.curves if c.band and extents[c.name][0] >= low and extents[c.name][1] <= high]
    bounds = [to(bound) for c in inside for i in c.intervals[c.settled :] if i for bound in i]
    low, high = max(low - reach, min([low, *bounds])), min(high + reach, max([high, *bounds]))
    return tuple(back(np.array(padded(low, high, 0.12 if panel.level else 0.05))))


def draw_curve(axes, panel: Lines, curve, labels: Labels, order: int, last: float) -> None:
    low, high = axes.get_ylim()
    colour, x, y = curve.look["color"], np.array(curve.x), np.array(curve.y)
    dots = {"marker": "o", "markersize": 3.5} if len(x) == 1 or panel.bars else {}
    width = 1.8 if curve.band and not panel.bars else 1.1
    axes.plot(x, y, linewidth=width, zorder=3 + (curve.band - 0.01 * order), **curve.look, **dots)
    labels.avoid(x, y)
    if curve.band:
        bounds = np.array([i or (v, v) for i, v in zip(curve.intervals, y)]).T
        if panel.bars or len(x) == 1:
            axes.errorbar(x, y, abs(bounds - y), color=colour, linestyle="none", elinewidth=0.8, alpha=0.7)
        else:
            axes.fill_between(x, *bounds, color=colour, alpha=0.13, linewidth=0)
    outside = [(a, b) for a, b in zip(x, y) if not low <= b <= high]
    arrow = "" if low <= y[-1] <= high else f" {'↑' if y[-1] > high else '↓'} {number(y[-1])}"
    if x[-1] == last:
        labels.at_end(wrapped(curve.name) + arrow, x[-1], np.clip(y[-1], low, high), colour, y[-1])
    else:
        words = " (ends here)" if curve.ends else ""
        labels.near(wrapped(curve.name + words, 26) + arrow, [(x[-1], np.clip(y[-1], low, high))], colour, 7.5)
    for a, b in outside if panel.points else ():
        edge = high if b > high else low
        axes.plot([a], [edge], marker="^" if b > high else "v", color=colour, markersize=4, clip_on=False, zorder=5)
        if a != x[-1]:
            labels.near(number(b), [(a, edge)], colour)


def number(value: float, sign: str = "") -> str:
    """With two decimals, none where it is large, more where it is small; sign "+": a positive one has its sign."""
    return f"{value:{sign},.0f}" if abs(value) >= 100 else f"{value:{sign}.{2 if abs(value) >= 0.1 else 4}f}"


def draw_forest(axes, panel: Forest, title: str) -> Labels:
    each = [(min(ends), max(ends)) for *_, found in panel.rows if (ends := [e for d in found if d for e in ends_of(d)])]
    low, high = padded(*robust_limits(each, (0.0,)))
    axes.set_xlim(low, high)
    for row, (_, look, found) in enumerate(panel.rows):
        for k, finding in enumerate(found):
            y = row + (k - (len(found) - 1) / 2) * 0.3
            if finding:
                draw_difference(axes, finding, y, look["color"], MARKS[k % len(MARKS)])
    axes.axvline(0, color="black", linewidth=0.7, zorder=1)
    axes.set_ylim(len(panel.rows) - 0.5, -0.5)
    axes.set_yticks(range(len(panel.rows)), [wrapped(name) for name, *_ in panel.rows])
    axes.tick_params(axis="y", length=0, labelsize=8)
    for tick, (_, look, _) in zip(axes.get_yticklabels(), panel.rows):
        tick.set(color=look["color"], linespacing=0.95)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel=panel.xlabel)
    left = max(tick.get_window_extent().width for tick in axes.get_yticklabels()) * 72 / axes.figure.dpi + 3.5
    heading(axes, title, left=left)
    legend_of_marks(axes, panel, left)
    return Labels(axes)


def legend_of_marks(axes, panel: Forest, left: float) -> None:
    """In the place of a note: which mark is which length, and what a filled one is."""
    look = {"color": GREY, "markersize": 3.6, "linestyle": "none"}
    handles = [Line2D([], [], marker=MARKS[k], label=text, **look) for k, text in enumerate(panel.marks)]
    handles.append(Line2D([], [], linestyle="none", label=panel.note))
    shift = ScaledTranslation(-left / 72, 0, axes.figure.dpi_scale_trans)
    legend = axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), bbox_transform=axes.transAxes + shift, frameon=False,
        ncols=len(handles), fontsize=7, labelcolor=GREY, handlelength=0.8, handletextpad=0.3, columnspacing=0.8,
        borderpad=0, borderaxespad=0.4,
    )  # fmt: skip
    legend.set_in_layout(False)


def ends_of(finding: dict) -> tuple[float, float]:
    return tuple(finding["interval"] or (finding["difference"],) * 2)


def draw_difference(axes, finding: dict, y: float, colour: str, marker: str) -> None:
    """A mark with its bar. What lies outside the axis is an arrow at its edge; a mark there has its value beside it."""
    low, high = axes.get_xlim()
    value, (start, stop) = finding["difference"], ends_of(finding)
    if finding["interval"]:
        axes.plot(np.clip([start, stop], low, high), [y, y], color=colour, linewidth=1.1, solid_capstyle="butt")
    look = {
        "color": colour,
        "markerfacecolor": colour if beyond_noise(finding) else "white",
        "markeredgewidth": 0.9,
        "zorder": 4,
    }
    if low <= value <= high:
        axes.plot([value], [y], marker, markersize=3.8, **look)
    for edge, beyond, arrow in ((low, start < low, "<"), (high, stop > high, ">")):
        if beyond:
            axes.plot([edge], [y], arrow, markersize=3.5, clip_on=False, **look)
    if not low <= value <= high:
        # right of the axis is room; left of it are the arms' names, so there it covers a part of the bar
        axes.annotate(
            number(value, "+"), (np.clip(value, low, high), y), (4, 0), textcoords="offset points", color=colour,
            fontsize=6, va="center_baseline", zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
        )  # fmt: skip


def draw_points(axes, panel: Points, title: str) -> Labels:
    labels = Labels(axes)
    whole = lambda at, interval: tuple(interval or (at, at))  # noqa: E731
    low, high = padded(*robust_limits([whole(y, over) for *_, y, over in panel.points]), 0.1, 0.1)
    ends = [end for _, _, x, over, _, _ in panel.points for end in whole(x, over)]
    axes.set_xlim(*padded(min(ends), max(ends), 0.12, 0.12))
    axes.set_ylim(low, high)
    for name, look, x, x_interval, y, y_interval in panel.points:
        colour, at = look["color"], np.clip(y, low, high)
        inside = low <= y <= high
        axes.plot([x], [at], "o" if inside else "^", color=colour, markersize=4, clip_on=False, zorder=3)
        if inside:
            for interval, place in ((x_interval, lambda i, y=y: (i, [y, y])), (y_interval, lambda i, x=x: ([x, x], i))):
                if interval:
                    axes.plot(*place(interval), color=colour, linewidth=0.9)
                    labels.avoid(*place(interval))
        labels.avoid([x], [at])
        labels.near(
            wrapped(name) + ("" if inside else f" {'↑' if y > high else '↓'} {number(y)}"), [(x, at)], colour, 7.5
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    heading(axes, title, panel.note)
    return labels


def draw_heat(axes, panel: Heat, title: str) -> Labels:
    values = np.array(panel.values, float)  # None becomes nan, which has no colour
    drawn = axes.pcolormesh(values, cmap="cividis", vmin=0, vmax=panel.top, edgecolors="white", linewidth=0.8)
    for (row, column), value in np.ndenumerate(values):
        text = "n/a" if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}"
        colour = GREY if np.isnan(value) else "black" if drawn.norm(value) > 0.55 else "white"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=7.5)
    axes.set_xticks(np.arange(len(panel.columns)) + 0.5, panel.columns)
    axes.set_yticks(np.arange(len(panel.rows)) + 0.5, panel.rows)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    heading(axes, title, panel.note)
    return Labels(axes)


DRAW = {Lines: draw_lines, Forest: draw_forest, Points: draw_points, Heat: draw_heat}


def draw_panel(axes, panel: Lines | Forest | Points | Heat, title: str) -> Labels:
    """Returns the labels, which are to be placed once the layout is known."""
    return DRAW[type(panel)](axes, panel, title)
