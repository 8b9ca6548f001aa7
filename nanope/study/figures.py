"""Figures of a study at a paper's width: by default loss by length and paired differences, a row for each setting;
where these are many, differences alone.

    draw(study, Path("figure.png"), ["loss", "position"])
    write_figures(study, folder)                       # figure.png and figure.pdf there

panels.py says what is in a panel, drawing.py draws it, labels.py finds room for its labels. Equal input gives equal
bytes, whatever the reader's own matplotlib settings are.
"""

import contextlib
from dataclasses import replace
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from nanope.study.drawing import Forest, Lines, draw_panel
from nanope.study.labels import wrapped
from nanope.study.panels import OF_REPORTS, PANELS, looks_of, of_reports
from schemes import label

WIDTH, COLUMN, HEIGHT = 6.75, 3.35, 2.75  # inches: a page, a column, a row of panels
ROWS = 3  # that fit a page
STYLE = {
    "font.family": "serif", "font.serif": ["STIXGeneral", "DejaVu Serif"], "text.parse_math": False,
    "font.size": 8, "axes.labelsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 3, "ytick.major.size": 3,
    "figure.dpi": 220, "savefig.dpi": 220, "pdf.fonttype": 42, "svg.hashsalt": "nanope",
}  # fmt: skip
UNDATED = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


def draw(study, out: Path, panels: list[str] | None = None) -> None:
    """Write one image, of the kind that its name tells. `panels`: names of PANELS, or None for the paper's figure.
    ValueError where the study has nothing for them."""
    with style():
        if (figure := figure_of(study, panels)) is None:
            raise ValueError(f"{study.folder} has nothing to draw of {', '.join(panels or ('length', 'difference'))}")
        save(figure, out)


def write_figures(study, folder: Path) -> list[Path]:
    """Write figure.png and figure.pdf into a folder. Returns their paths: none where the study has nothing to draw."""
    with style():
        if (figure := figure_of(study)) is None:
            return []
        paths = [Path(folder) / f"figure.{kind}" for kind in ("png", "pdf")]
        for path in paths:
            save(figure, path)
    return paths


def draw_reports(
    reports: list[dict], out: Path, protocol: str = "same-targets", panels: list[str] | None = None
) -> None:
    """Draw one or several reports of eval.py in one image. `panels`: length, position, accuracy (by default),
    attention, needle. ValueError where they have nothing to draw."""
    with style():
        save(compose([("", of_reports(reports, protocol, panels or OF_REPORTS))]), out)


@contextlib.contextmanager
def style():
    """matplotlib's defaults with STYLE, within the block."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def save(figure: Figure, out: Path) -> None:
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata=UNDATED.get(out.suffix[1:].lower()))


def figure_of(study, panels: list[str] | None = None) -> Figure | None:
    """A row of panels for each setting; None where there is nothing to draw. By default a study without several lengths
    shows its training curves instead, one of several rules of scaling these, and one of more settings than fit a page
    the differences alone."""
    looks = looks_of({arm: label(fields.get("pos", "rope")) for arm, fields in study.grid.arms.items()})
    rows = []
    settings = [s for s in study.grid.settings if any(study.runs[s, arm] for arm in study.grid.arms)]
    if panels in (None, ["accuracy"]):  # of tasks: small multiples, one a setting
        of_tasks = {s: panel for s in settings if (panel := PANELS["accuracy"](study, s, looks))}
        settings = [s for s in settings if s not in of_tasks]
        rows += [("", [*of_tasks.values()])] * bool(of_tasks)
    if panels is None and len(settings) > ROWS:
        found = [(s, PANELS["difference"](study, s, looks)) for s in settings]
        if forests := [replace(panel, title=s) for s, panel in found if panel]:
            return compose([*rows, ("", forests)])
    for setting in settings:
        make = lambda name, setting=setting: PANELS[name](study, setting, looks)  # noqa: E731
        if panels:
            found = [make(p) for p in panels]
        else:
            found = make("scalings") or [make("length") or make("loss"), make("difference")]
        found = [panel for each in found for panel in (each if isinstance(each, list) else [each]) if panel]
        if found:
            rows.append((setting, found))
    return compose(rows) if rows else None


def compose(rows: list[tuple[str, list]]) -> Figure:
    """A figure of (title, panels) rows, two panels side by side, with letters where there are several."""
    lines = [(title if i == 0 else "", pair) for title, panels in rows for i, pair in enumerate(pairs(panels))]
    heights = [max(height_of(panel) for panel in pair) + 0.25 * bool(title) for title, pair in lines]
    columns = max(len(pair) for _, pair in lines)
    figure = Figure((WIDTH if columns > 1 else COLUMN, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(lines), 1, height_ratios=heights, squeeze=False)[:, 0]
    letters = iter("abcdefghijklmnopqrstuvwxyz" if sum(len(pair) for _, pair in lines) > 1 else "")
    labels = []
    for part, (title, pair) in zip(parts, lines):
        if title:
            part.suptitle(title, x=0.01, ha="left", fontsize=9, fontstyle="italic")
        ratios = [1 if isinstance(panel, Forest) else 1.15 for panel in (*pair, None)[:columns]]
        places = list(part.subplots(1, columns, squeeze=False, width_ratios=ratios)[0])
        for panel in pair:
            title = f"({letter}) {panel.title}" if (letter := next(letters, "")) else panel.title
            labels.append(draw_panel(places.pop(0), panel, title))
        for place in places:
            place.remove()
    figure.draw_without_rendering()  # to lay it out
    figure.set_layout_engine("none")
    for each in labels:
        each.place()
    return figure


def pairs(panels: list) -> list[list]:
    return [panels[i : i + 2] for i in range(0, len(panels), 2)]


def height_of(panel) -> float:
    """Inches: more where many arms stand one below the other."""
    if isinstance(panel, Forest):
        return max(1.6, 0.85 + len(panel.rows) * (0.07 * len(panel.marks) + 0.07))
    names = [curve.name for curve in panel.curves] if isinstance(panel, Lines) else []
    return max(HEIGHT, 0.85 + 0.125 * sum(1 + wrapped(name).count("\n") for name in names))
