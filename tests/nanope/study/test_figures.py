"""nanope/study/figures.py and what it stands on: numbers of the tables, robust axes, labels with room, equal bytes."""

import functools
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import plot
import pytest
from matplotlib.text import Text

from nanope import REPO
from nanope.convert import SCALINGS
from nanope.study import figures, panels
from nanope.study.drawing import number, robust_limits
from nanope.study.grid import Grid
from nanope.study.labels import spread, wrapped
from nanope.study.results import Study
from schemes import SCHEMES

STUDIES = "all-schemes schemes schemes-novels carope-1 crope-2 comrope-text quickstart rope-scaling".split()


@pytest.fixture(scope="module")
def study_in():
    """Reads a study of results/, once."""
    return functools.cache(lambda name: Study.read(REPO / "results" / name))


class Made:
    """A study of given nats by length: levels, arm → [nats at each length, or None]; seeds differ by 0.01."""

    folder, unit, cropped_to = Path("made"), "token", Study.cropped_to
    rows_by_length, compared, differences = Study.rows_by_length, Study.compared, Study.differences

    def __init__(self, levels, lengths=(256, 512, 1024, 2048, 4096), seeds=3, reports=True, settings=("",), **grid):
        arms = {arm: {"pos": arm} for arm in levels}
        self.grid = SimpleNamespace(
            arms=arms,
            settings=dict.fromkeys(settings, {}),
            baseline=next(iter(arms)),
            eval={"far": {}} if reports else {},
            figure=None,
            cropped=False,
            throughput=None,
        )
        vars(self.grid).update(grid)
        self.levels, self.lengths, self.seeds = levels, lengths, range(1, seeds + 1)
        self.runs = {
            (setting, arm): {
                seed: SimpleNamespace(series=functools.partial(self.series, arm, seed)) for seed in self.seeds
            }
            for setting, arm in itertools.product(settings, arms)
        }

    def series(self, arm, seed, name):
        last = self.levels[arm][0]
        return [0, 1000, 2000, 3000], [6.0, last + 0.5, last + 0.1, last + 0.01 * seed]

    def config(self, setting, arm):
        return SimpleNamespace(block_size=256)

    def losses(self, setting, arm):
        return {seed: self.levels[arm][0] + 0.01 * seed for seed in self.runs[setting, arm]}

    def rows(self, setting, name, task=False):
        return (
            {}
            if task
            else {
                ("same-targets", arm, "none"): {
                    n: {seed: self.row(arm, n, value, seed) for seed in self.seeds}
                    for n, value in zip(self.lengths, values)
                }
                for arm, values in self.levels.items()
            }
        )

    def row(self, arm, n, value, seed):
        if value is None:
            return {"nats_per_token": None, "interval": None, "targets_sha256": "t"}
        generator = np.random.default_rng([seed, n, len(arm)])
        nll = 100 * (value + 0.01 * seed + 0.01 * generator.normal(size=20))
        mean = float(nll.sum() / 2000)
        documents = {"nll": nll.tolist(), "tokens": [100.0] * 20}
        interval = [mean - 0.02, mean + 0.02]
        return {"nats_per_token": mean, "interval": interval, "targets_sha256": "t", "per_document": documents}


def panel_of(study, name, setting=""):
    return panels.PANELS[name](study, setting, panels.looks_of({arm: arm for arm in study.grid.arms}))


# ---- the numbers are those of the tables


def table(name: str, title: str) -> dict[str, list[tuple[float, ...]]]:
    """A table of results/NAME/README.md: arm → the numbers of each cell."""
    text = (REPO / "results" / name / "README.md").read_text()
    lines = text[text.index(title) :].split("|---|", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: [tuple(map(float, re.findall(r"[-+]?\d+\.\d+", cell))) for cell in row[1:]] for row in cells}


@pytest.mark.parametrize(
    ("name", "setting", "what", "digits"),
    [("schemes", "", "nats", 4), ("quickstart", "", "nats", 4), ("carope-1", "Tiny", "perplexity", 2)],
)
def test_curves_and_intervals_are_those_of_the_tables(study_in, name, setting, what, digits):
    study = study_in(name)
    mean = table(name, f"{what} per byte at context lengths, same-targets")
    less = table(name, "nats per byte less rope, same-targets")
    curves = panel_of(study, "length", setting).curves
    assert [curve.name for curve in curves] == list(study.grid.arms)
    for curve in curves:
        cells = [cell for cell in mean[curve.name] if cell]
        assert [tuple(round(v, digits) for v in (y, *i)) for y, i in zip(curve.y, curve.intervals)] == cells
        assert curve.ends == (curve.name == "learned")
    forest = panel_of(study, "difference", setting)
    lengths = sorted(next(iter(study.rows(setting, next(iter(study.grid.eval))).values())))
    shown = [lengths.index(256 * int(mark[:-1])) for mark in forest.marks]
    assert {row[0] for row in forest.rows} == set(study.grid.arms) - {"rope"}
    for arm, _, found in forest.rows:
        numbers = [tuple(round(v, 4) for v in (d["difference"], *d["interval"])) if d else () for d in found]
        assert numbers == [less[arm][i] for i in shown]


def test_losses_and_speeds_are_those_of_the_tables(study_in):
    study = study_in("comrope-text")
    speeds, losses = table("comrope-text", "training speed"), table("comrope-text", "training**")
    points = {name: (x, over, y, spread) for name, _, x, over, y, spread in panel_of(study, "speed").points}
    assert list(points) == list(study.grid.arms)
    for arm, (x, x_interval, y, y_interval) in points.items():
        assert tuple(round(v, 4) for v in (y, *y_interval)) == losses[arm][4]
        if arm != "rope":
            assert tuple(round(v, 3) for v in (x, *x_interval)) == speeds[arm][1]
    curve = panel_of(study, "loss").curves[0]
    assert round(curve.y[-1], 4) == losses["rope"][4][0] and curve.x[-1] == pytest.approx(300 * 4096 / 1e6)
    sizes = {name: x for name, _, x, *_ in panel_of(study, "parameters").points}
    assert sizes["rope"] == 0.828544 and sizes["AP, block 4"] == 0.830592


# ---- what is shown


def test_bands_are_the_baselines_and_of_the_lowest_that_are_better_beyond_noise(study_in):
    banded = lambda name, panel="length": {c.name for c in panel_of(study_in(name), panel).curves if c.band}  # noqa: E731
    assert banded("schemes") == {"rope", "alibi", "carope"}  # none, crope and comrope are better too, by less
    assert banded("schemes-novels") == {"rope", "alibi", "none"}
    assert banded("comrope-text") == {"rope"}
    assert banded("schemes", "loss") == {"rope"} and banded("schemes", "position") == {"rope", "alibi", "carope"}


def test_the_line_of_cropping_and_the_marks(study_in):
    panel, forest = panel_of(study_in("schemes"), "length"), panel_of(study_in("schemes"), "difference")
    rope = next(curve for curve in panel.curves if curve.name == "rope")
    assert panel.level[:2] == (rope.y[0], "rope, cropped to its training length")
    assert list(panel.ticks.values()) == ["1×", "2×", "4×", "8×", "16×"]
    assert forest.marks == ["1×", "4×", "16×"] and [name for name, *_ in forest.rows][::5] == ["alibi", "learned"]
    assert panel_of(study_in("quickstart"), "difference").marks == ["1×", "4×", "8×"]
    assert panel_of(study_in("crope-2"), "difference", next(iter(study_in("crope-2").grid.settings))).marks == [
        "1×",
        "2×",
    ]


@pytest.mark.slow
def test_one_length_or_no_report_is_drawn_by_training_curves():
    study = Made({"rope": [3.0], "fox": [2.9]}, lengths=(256,))
    assert panel_of(study, "length") is None and panel_of(study, "difference").marks == ["1×"]
    study = Made({"rope": [3.0], "fox": [2.9]}, reports=False, settings=("PG-19", "WikiText-2"))
    (_, look, (found,)) = panel_of(study, "difference", "PG-19").rows[0]
    assert found["difference"] == pytest.approx(-0.1) and found["seeds"] == 3
    loss = panel_of(study, "loss", "WikiText-2")
    assert loss.title == "Validation loss" and loss.curves[0].x == [0.001, 0.002, 0.003]  # no step 0
    with figures.style():
        figure = figures.figure_of(study)
    words = texts(figure)
    assert {"PG-19", "WikiText-2", "(a) Validation loss", "(d) Paired difference from rope"} <= words
    assert not any("documents" in word for word in words)


def test_a_study_of_one_arm_and_one_seed():
    study = Made({"rope": [3.0, 3.1, 3.2, 3.3, 3.4]}, seeds=1)
    with figures.style():
        words = texts(figures.figure_of(study))
    assert "one seed; band: 95 % interval over documents" in words and "Same tokens scored, longer context" in words


@pytest.mark.slow
def test_what_lies_far_outside_stands_at_the_edge_with_its_value():
    levels = {arm: [3 + 0.02 * i + 0.1 * k for k in range(5)] for i, arm in enumerate(("rope", "fox", "cable", "t5"))}
    study = Made({**levels, "none": [3.1, 9.0, 20.0, 30.0, 140.0], "learned": [3.05, *[None] * 4]})
    with figures.style():
        figure = figures.figure_of(study)
    left, right = figure.axes
    assert left.get_ylim()[1] < 4 and right.get_xlim()[1] < 0.5
    words = texts(figure)
    assert {"none ↑ 140", "9.02", "20.02", "30.02", "+16.80", "+137"} <= words  # 4× is the second of three lengths
    assert "learned (ends here)" in words
    study = Made({"rope": [3.0, 4.0, 6.0, 8.0, 12.0], **{arm: [3.0] * 5 for arm in ("fox", "cable", "t5")}})
    with figures.style():
        assert figures.figure_of(study).axes[0].get_ylim()[1] > 12  # the baseline is what all are compared with


def test_what_the_baselines_noise_holds_is_not_at_the_edge():
    levels = {"rope": 3.0, "fox": 3.0005, "cable": 3.0006, "t5": 3.01, "none": 9.0}
    study = Made({arm: [nats] * 5 for arm, nats in levels.items()})
    with figures.style():
        words = texts(figures.figure_of(study))
    assert "none ↑ 9.02" in words and not any(word.startswith("t5 ") for word in words)


def test_of_many_settings_differences_alone_are_drawn():
    levels = {arm: [3.0 + 0.1 * i] * 5 for i, arm in enumerate(("rope", "fox", "alibi"))}
    with figures.style():
        few, many = (figures.figure_of(Made(levels, settings=[*"wxyz"][:n])) for n in (3, 4))
        alone = figures.figure_of(Made({"rope": [3.0] * 5}, settings=[*"wxyz"]))  # without differences
    assert len(few.axes) == 6 and len(many.axes) == 4 == len(alone.axes)
    assert {"(a) w", "(d) z"} <= texts(many) and "nats per token minus rope’s" in " ".join(texts(many))


def texts(figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()}


# ---- labels and axes


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name == "all-schemes" else pytest.param(name, marks=pytest.mark.slow) for name in STUDIES]
)
def test_no_text_overlaps_another_or_leaves_the_figure(study_in, name):
    with figures.style():
        figure = figures.figure_of(study_in(name))
        boxes = {}
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text().strip():
                boxes[text] = Text.get_window_extent(text)  # of an annotation, its text alone
    whole = figure.bbox
    shown = [(t, b) for t, b in boxes.items() if b.width and not hidden_tick(t, figure)]
    for text, box in shown:
        assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 and box.y1 <= whole.y1, text
    for (a, one), (b, other) in itertools.combinations(shown, 2):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        along = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert across <= 0 or along <= 0, f"{a.get_text()!r} and {b.get_text()!r}"


def hidden_tick(text, figure) -> bool:
    """Ticks outside an axis's limits have labels that are not drawn."""
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in axis.get_major_ticks():
                if text in (tick.label1, tick.label2):
                    return not min(low, high) <= tick.get_loc() <= max(low, high)
    return False


def test_rules_of_scaling_have_curves_of_their_own(study_in):
    study = study_in("rope-scaling")
    looks = panels.looks_of({"rope": "rope", "alibi": "alibi"})
    four, sixteen = panels.scalings(study, "", looks)
    rules = [f"rope, {rule} ×16" for rule in SCALINGS]
    assert [c.name for c in sixteen.curves] == ["rope", *rules, "alibi"] and four.title != sixteen.title
    assert len({str(c.look["linestyle"]) for c in sixteen.curves}) == 5  # alibi's is rope's
    rows = study.rows("", "x16")["same-targets", "rope", "yarn"]
    curve = sixteen.curves[1 + SCALINGS.index("yarn")]
    assert curve.x == [256, 1024, 4096]
    assert curve.y == pytest.approx([np.mean([r["nats_per_token"] for r in rows[n].values()]) for n in curve.x])
    assert sixteen.level[0] == pytest.approx(sixteen.curves[0].y[0])
    assert panels.scalings(study_in("carope-1"), "Tiny", looks) == []  # one rule


def test_labels_spread_without_overlaps():
    generator = np.random.default_rng(0)
    for _ in range(200):
        n = generator.integers(1, 9)
        wanted, heights = generator.uniform(0, 100, n), generator.uniform(5, 12, n)
        found = np.array(spread(list(wanted), list(heights), 0, 100))
        order = np.argsort(wanted)
        gaps = np.diff(found[order]) - (heights[order][1:] + heights[order][:-1]) / 2
        assert (gaps > -1e-9).all() and (found - heights / 2 > -1e-9).all() and (found + heights / 2 < 100 + 1e-9).all()
    assert spread([10, 90], [8, 8], 0, 100) == [10, 90]  # where there is room, at their place
    assert spread([50, 50], [10, 10], 0, 100) == [45, 55]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("carope, constant f", "carope, constant f"),
        ("AP, block 2 (learned frequencies)", "AP, block 2\n(learned frequencies)"),
        ("rope, grouped Q/K/V", "rope,\ngrouped Q/K/V"),
        ("sinusoidal, scale 0.02", "sinusoidal,\nscale 0.02"),
        ("tiny-rope-base-2e7-seed1-6ac26f01", "tiny-rope-base-\n2e7-seed1-6ac26f01"),
        ("x" * 30, "x" * 23 + "…"),
    ],
)
def test_long_names_are_wrapped(name, lines):
    assert wrapped(name) == lines


@pytest.mark.parametrize(
    ("extents", "always", "limits"),
    [
        ([(0, 1), (0.1, 1), (0.2, 0.9), (9, 12)], (), (0, 1)),  # one outlier
        ([(0, 1), (0.1, 1), (0.2, 0.9), (9, 12), (10, 11)], (), (0, 1)),  # two, which hide each other
        ([(0, 1), (0.1, 1), (0.2, 0.9), (2, 3.9)], (), (0, 3.9)),  # less than four times the others' range
        ([(0, 1), (9, 12)], (), (0, 12)),  # of two arms none is the outlier
        ([(0, 1), (0.1, 1), (0.2, 0.9), (9, 12)], (10,), (0, 12)),  # what must be shown
        ([(0, 1), (0, 1), (0, 1), (50, 60), (0, 1), (1e6, 1e6)], (), (0, 1)),
        ([(1, 1), (1, 1), (1, 1), (2, 2)], (), (1, 2)),  # nothing but a point would be left
    ],
)
def test_robust_limits(extents, always, limits):
    assert robust_limits(extents, always) == limits


def test_numbers():
    assert [number(v) for v in (1234.5, 3.276, 0.0312)] == ["1,234", "3.28", "0.0312"]
    assert number(0.742, "+") == "+0.74" and number(-2.0, "+") == "-2.00"


@pytest.mark.slow
def test_styles_tell_arms_apart():
    for path in (REPO / "results").glob("*/grid.yaml"):
        if arms := Study.read(path.parent).grid.arms if path.parent.name in STUDIES else None:
            looks = panels.looks_of({arm: fields["pos"] for arm, fields in arms.items()})
            assert len({tuple(look.values()) for look in looks.values()}) == len(arms)
            assert len({look["color"] for look in looks.values()}) == min(
                len(arms), len(panels.COLOURS) + len(panels.SPARE)
            )
    looks = panels.looks_of({"a": "rope", "b": "rope", "c": "rope, rope, none", "d": "alibi"})
    assert looks["a"] == {"color": panels.COLOURS["rope"], "linestyle": "-"} and looks["b"]["linestyle"] == "--"
    assert looks["c"]["color"] in panels.SPARE and looks["d"]["color"] == panels.COLOURS["alibi"]
    many = panels.looks_of({arm: arm for arm in SCHEMES})
    assert len({tuple(look.values()) for look in many.values()}) == len(SCHEMES)
    assert [arm for arm, look in many.items() if look["color"] == panels.COLOURS["rope"]] == ["rope"]


def test_no_two_arms_look_alike_and_those_of_a_scheme_differ_in_style():
    """Two arms of eight schemes; and all-schemes, where a second arm comes after colours have run out."""
    names = "rope", "crope", "comrope", "carope", "t5", "fox", "kerple", "fire"
    twice = {f"{scheme} {n}": scheme for scheme in names for n in (1, 2)}
    arms = Grid.read(REPO / "configs" / "sweeps" / "all-schemes.yaml").arms
    for schemes in (twice, {a: f["pos"] for a, f in arms.items()}):
        looks = panels.looks_of(schemes)
        assert len({tuple(look.values()) for look in looks.values()}) == len(schemes)
        assert len({(scheme, looks[arm]["linestyle"]) for arm, scheme in schemes.items()}) == len(schemes)


# ---- files


@pytest.mark.slow
def test_equal_studies_give_equal_files(study_in, tmp_path):
    study = study_in("schemes")
    first = [path.read_bytes() for path in figures.write_figures(study, tmp_path)]
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 30, "pdf.compression": 0}):
        paths = figures.write_figures(study, tmp_path)
    assert [path.name for path in paths] == ["figure.png", "figure.pdf"]
    assert [path.read_bytes() for path in paths] == first
    png, pdf = first
    assert png.startswith(b"\x89PNG") and pdf.startswith(b"%PDF")
    assert b"CreationDate" not in pdf and b"/Subtype /Image" not in pdf and b"/Type3" not in pdf and len(pdf) < 60_000


def test_a_study_without_anything_to_draw(tmp_path):
    study = Made({"rope": [3.0], "fox": [2.9]})
    study.runs = {key: {} for key in study.runs}
    assert figures.write_figures(study, tmp_path) == [] and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="nothing to draw of length, difference"):
        figures.draw(study, tmp_path / "x.png")


# ---- scripts/plot.py


def run_plot(monkeypatch, *arguments) -> str:
    """What the command ends with: nothing, or its message."""
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    try:
        plot.main()
    except SystemExit as stopped:
        return str(stopped.code)
    return ""


def report_of(pos: str, run: str, curve: bool = False) -> dict:
    figures_of = {
        ("none", 64): (1.0, [0.9, 1.1]),
        ("none", 128): (None, None),
        ("yarn", 64): (1.1, [1.0, 1.2]),
        ("yarn", 128): (1.2, [1.1, 1.3]),
    }
    rows = [
        {
            "length": n,
            "protocol": "same-targets",
            "scaling": scaling,
            "factor": 4.0,
            "nats_per_token": nats,
            "interval": over,
        }
        for (scaling, n), (nats, over) in figures_of.items()
    ]
    bins = {"first": [1, 2], "last": [1, 64], "nats": [2.0, 1.0], "low": [1.9, 0.9], "high": [2.1, 1.1]}
    if curve:
        rows.append({**rows[0], "protocol": "per-position", "curve": bins})
    return {"pos": pos, "run": f"runs/{run}", "block_size": 64, "tokenizer": {"name": "byte"}, "results": rows}


@pytest.mark.slow
def test_reports_are_drawn_with_their_intervals(tmp_path, monkeypatch):
    reports = [report_of("rope", "first"), report_of("alibi", "second", curve=True)]
    left, right = panels.of_reports(reports, "same-targets")
    assert [c.name for c in left.curves] == ["rope", "rope, yarn ×4", "alibi", "alibi, yarn ×4"]
    plain, scaled = left.curves[:2]
    assert plain.y == [np.exp(1.0)] and plain.intervals == [[np.exp(0.9), np.exp(1.1)]] and plain.ends
    assert scaled.look == {"color": plain.look["color"], "linestyle": "-."} and not scaled.ends
    assert right.curves[0].intervals == [[1.9, 2.1], [0.9, 1.1]] and right.trained == (64,)
    names = [c.name for c in panels.of_reports([reports[0], report_of("rope", "other")], "same-targets")[0].curves]
    assert names[::2] == ["first", "other"]  # their schemes do not tell them apart
    paths = [tmp_path / f"{i}.json" for i in range(2)]
    for path, report in zip(paths, reports):
        path.write_text(json.dumps(report))
    assert run_plot(monkeypatch, *paths, "--out", tmp_path / "deep" / "figure.png") == ""
    assert (tmp_path / "deep" / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_draws_panels_by_name(tmp_path, monkeypatch):
    where = REPO / "results" / "quickstart"
    assert run_plot(monkeypatch, where, "--panels", "loss", "parameters", "--out", tmp_path / "x.pdf") == ""
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/report.json", "--protocol", "sliding"], "no figures by sliding, and no per-position curve"),
        (["{tmp}/other.json"], "a report lacks 'pos': is it one of eval.py?"),
        (["{tmp}/list.json"], "list.json is no report of eval.py: it holds []"),
        (["{tmp}/odd.json"], "odd.json are reports of eval.py"),
        (["{tmp}/report.json", "{tmp}/list.json"], "list.json is no report of eval.py"),
        (["{tmp}/gone"], "grid.yaml"),
        (["{tmp}/gone.json"], "No such file"),
        (["{tmp}/gone.json", "{tmp}/report.json"], "No such file"),
        (["{results}/quickstart", "--panels", "position"], "nothing to draw of position"),
        (["{results}/quickstart", "--panels", "speed"], "nothing to draw of speed"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text(json.dumps(report_of("rope", "first")))
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "odd.json").write_text(json.dumps({"pos": "rope", "results": 3}))
    given = [word.format(tmp=tmp_path, results=REPO / "results") for word in arguments]
    said = run_plot(monkeypatch, *given, "--out", tmp_path / "x.png")
    assert said.startswith("error: ") and message in said and "\n" not in said and not (tmp_path / "x.png").exists()


def test_plot_eval_says_what_took_its_place():
    code = compile((REPO / "scripts" / "plot_eval.py").read_text(), "plot_eval.py", "exec")
    with pytest.raises(SystemExit, match="scripts/plot.py REPORT.json"):
        exec(code, {})
