"""All studies as one page that opens offline: plotly's figures, drawn by the script in page.html. Means, differences
and intervals are those of the tables, by the same functions."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from nanope.files import write_atomically
from nanope.study.panels import SCALINGS, answers_curve, by_rule, curve_of, looks_of, loss, position, show_of
from nanope.study.results import Study
from nanope.study.seed_statistics import difference_of_answers, difference_of_rows
from schemes import label

BEFORE, BETWEEN, AFTER = Path(__file__).with_suffix(".html").read_text().split("@@")  # plotly, and the studies
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot", SCALINGS["yarn-code"]: "longdashdot"}


def write_page(out: Path, paths: list[Path]) -> int:
    """Write the page of the studies at `paths`: folders of runs or results, or folders that hold such. The same input
    gives the same bytes. Returns how many studies it has. ValueError without plotly, where `out` is there and no such
    page, or where there is nothing to draw."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ValueError("--html needs plotly: pip install plotly") from None
    if out.is_dir() or out.exists() and not out.read_bytes().startswith(BEFORE.splitlines()[0].encode()):
        raise ValueError(f"{out} is there, and is no page that --html made: choose another name")
    grids = [grid for path in paths for grid in [*path.glob("grid.yaml")] or sorted(path.glob("*/grid.yaml"))]
    folders = list(dict.fromkeys(grid.parent.resolve() for grid in grids))
    top = os.path.commonpath([folder.parent for folder in folders]) if folders else ""
    studies = [about(Study.read(folder), str(folder.relative_to(top))) for folder in folders]
    if not (studies := [study for study in studies if study["views"]]):
        raise ValueError(f"no study with runs that are done in {', '.join(map(str, paths))}: name folders of sweep.py")
    data = json.dumps(studies, separators=(",", ":")).replace("<", r"\u003c")  # so that no name ends the script
    write_atomically(out, lambda file: file.write("".join([BEFORE, get_plotlyjs(), BETWEEN, data, AFTER]).encode()))
    return len(studies)


def about(study: Study, name: str) -> dict:
    """What the page has of a study, in plain types."""
    views = [view | {"setting": setting} for setting in study.grid.settings for view in views_of(study, setting)]
    return {"name": name, "question": study.grid.question or "", "baseline": study.grid.baseline, "views": views}


def views_of(study: Study, setting: str) -> Iterator[dict]:
    """The figures of a setting: evaluations by length, the loss while it trained, nats by position. `y` is of means,
    then of differences. Points are [x, y, [low, high] or None, seeds]."""
    grid, looks = study.grid, looks_of({arm: label(f.get("pos", "rope")) for arm, f in study.grid.arms.items()})
    unit, nats, show = study.unit, f"nats per {study.unit}", show_of(study)
    for name in grid.eval:
        found = study.rows(setting, name) | study.rows(setting, name, task=True)
        for protocol in dict.fromkeys(key[0] for key in found if key[0] != "per-position"):
            rows = {key[1:]: at for key, at in found.items() if key[0] == protocol}
            base, curves, task = rows.get((grid.baseline, "none"), {}), [], protocol == "task"
            less = difference_of_answers if task else difference_of_rows
            for (arm, scaling), at in rows.items():
                title, look = by_rule(arm, scaling, at, looks[arm])
                curve = answers_curve(title, at, look) if task else curve_of(title, at, show, look)
                pairs = {x: less(at[x], base.get(x, {})) for x in sorted(at) if title != grid.baseline}
                points = [[x, d["difference"], d["interval"], d["seeds"]] for x, d in pairs.items() if d]
                curves += [plain(curve, [len(at[x]) for x in curve.x]) | {"less": points}] * bool(curve.x)
            y = "exact match" if task else f"perplexity per {unit}" if show is math.exp else nats
            lengths = sorted({x for at in rows.values() for x in at})
            axes = {"title": f"{name}: {protocol}", "x": "length" if task else f"context length ({unit}s)"}
            trained = None if task else study.any_config(setting).block_size
            yield axes | {"y": [y, y if task else nats], "lengths": lengths, "trained": trained, "curves": curves}
    for panel in (loss(study, setting, looks), position(study, setting, looks)):
        if panel:
            curves = [plain(curve, [len(study.runs[setting, curve.name])] * len(curve.x)) for curve in panel.curves]
            yield {"title": panel.title, "x": panel.xlabel, "y": [nats, nats], "lengths": [], "curves": curves}


def plain(curve, seeds: list[int]) -> dict:
    """A curve in plain types."""
    look = {"color": curve.look["color"], "dash": DASHES[curve.look["linestyle"]]}
    return {"name": curve.name, **look, "mean": [*zip(curve.x, curve.y, curve.intervals, seeds)], "less": []}
