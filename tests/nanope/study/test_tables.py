"""Statistics over seeds, cells, tables, and what stands beside a paper's figures."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from studies import EVAL, SWEEPS, report_row, study_of, write_grid

from nanope.evaluation.statistics import paired_difference
from nanope.study import report
from nanope.study.files import RunFolders
from nanope.study.grid import Grid
from nanope.study.markup import Table, difference_cell, latex
from nanope.study.panels import PANELS, looks_of
from nanope.study.results import Study, bench_file, collect
from nanope.study.seed_statistics import (
    difference_of_losses,
    difference_of_rows,
    direction,
    seed_interval,
    speed_ratios,
    verdict,
)
from nanope.study.tables import published_table, reach_in, tables

# ---- statistics


def test_seed_interval_is_students():
    values = [1.0, 1.2, 0.9, 1.3]
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert seed_interval(values) == pytest.approx([low, high]) and seed_interval([1.0]) is None


def test_differences_are_paired_by_seed():
    """Seeds differ by far more than arms: only pairs can tell, here 0.01 ± t(0.975, 2)·0.001/√3 by hand."""
    base, ours = {1: 3.0, 2: 5.0, 3: 4.0, 9: 0.0}, {3: 4.011, 1: 3.009, 2: 5.010}
    found = difference_of_losses(ours, base)
    reach = 4.302652729911275 * 0.001 / math.sqrt(3)
    assert found["difference"] == pytest.approx(0.01) and found["seeds"] == 3
    assert found["interval"] == pytest.approx([0.01 - reach, 0.01 + reach])
    assert difference_of_losses({1: 1.0}, {2: 1.0}) is None


def test_differences_of_evaluations_are_on_the_same_tokens():
    base, ours = {1: report_row([10, 20]), 2: report_row([12, 22])}, {1: report_row([9, 20]), 2: report_row([11, 22])}
    found = difference_of_rows(ours, base)
    assert found["difference"] == pytest.approx(-1 / 30) and found["seeds"] == 2
    assert found["interval"][0] < -1 / 30 < found["interval"][1]
    with pytest.raises(ValueError, match="different tokens"):
        difference_of_rows({1: report_row([9, 20], targets="other")}, base)
    assert difference_of_rows({1: report_row(None)}, base) is None


@pytest.mark.parametrize("published,interval,seeds,expected", [
    (1.0, [0.9, 1.1], 3, "within interval"), (1.0, [1.0, 1.1], 2, "within interval"), (1.2, [0.9, 1.1], 3, "differs"),
    (0.8, [0.9, 1.1], 3, "differs"), (1.0, [0.9, 1.1], 1, "one seed"), (1.0, None, 1, "one seed"),
    (None, [0, 1], 3, ""),
])  # fmt: skip
def test_verdicts(published, interval, seeds, expected):
    assert verdict(published, interval, seeds) == expected


@pytest.mark.parametrize("spread,expected", [(0.0, "differs"), (0.09, "differs"), (0.11, "cannot be told apart")])
@pytest.mark.parametrize("published", [0.8, 1.2])
def test_a_published_spread_reaches_towards_the_measured_interval(published, spread, expected):
    assert verdict(published, [0.9, 1.1], 3, spread) == expected
    assert verdict(1.0, [0.9, 1.1], 3, spread) == "within interval" and verdict(1.0, None, 1, spread) == "one seed"


def test_a_published_difference_within_its_spread_has_no_direction():
    found = {"difference": 0.02, "interval": [0.01, 0.03], "seeds": 2}
    assert direction(0.5, found, 0.4) == "same direction" and direction(0.5, found, 0.6) == "cannot be told apart"
    assert direction(-0.5, found, 0.6) == "cannot be told apart"
    assert direction(0.5, found | {"interval": [-0.01, 0.05]}, 0.6) == "inside noise"


@pytest.mark.parametrize("published,difference,interval,seeds,expected", [
    (0.5, 0.02, [0.01, 0.03], 2, "same direction"), (-0.5, -0.02, [-0.03, -0.01], 2, "same direction"),
    (0.5, -0.02, [-0.03, -0.01], 2, "other direction"), (0.5, 0.02, [-0.01, 0.05], 2, "inside noise"),
    (0.5, 0.02, [0.01, 0.03], 1, "one seed"), (0.5, 0.02, None, 1, "one seed"),
])  # fmt: skip
def test_directions(published, difference, interval, seeds, expected):
    assert direction(published, {"difference": difference, "interval": interval, "seeds": seeds}) == expected


def test_ratios_of_speed_are_within_a_round():
    """The machine slows down by half; crope takes 1.25 times rope's time in every round but one."""
    bench = {"seconds": {"rope": [1.0, 1.0, 2.0, 2.0, 2.0], "crope": [1.25, 1.25, 2.5, 2.5, 2.0]}}
    ratio, (low, high) = speed_ratios(bench, "crope")
    assert ratio == pytest.approx(0.8) == low and high > 0.85
    assert speed_ratios(bench, "rope") == (1.0, [1.0, 1.0])


# ---- cells


@pytest.mark.parametrize("difference,interval,seeds,expected", [
    (-0.02, [-0.03, -0.01], 3, "**-0.0200 [-0.0300, -0.0100]**"),  # better beyond noise
    (0.02, [0.01, 0.03], 3, "+0.0200 [+0.0100, +0.0300] ↑"),  # worse beyond noise
    (0.02, [0.01, 0.03], 1, "+0.0200 [+0.0100, +0.0300]"),
    (-0.02, [-0.05, 0.01], 3, "-0.0200 [-0.0500, +0.0100] ≈"),
    (-0.02, [-0.03, -0.01], 1, "-0.0200 [-0.0300, -0.0100]"),  # over documents only: not bold
    (-0.02, None, 1, "-0.0200"),
])  # fmt: skip
def test_noise_is_marked_and_only_significance_is_bold(difference, interval, seeds, expected):
    assert difference_cell({"difference": difference, "interval": interval, "seeds": seeds}) == expected


def test_tables_in_markdown_and_latex():
    rows = [["rope & co", "**-0.02 [-0.03, -0.01]**", "2"], ["x^2 #1 ~ {y} \\", "+0.5 ≈", "1-2"]]
    table = Table("a_b: 50 % of |x|", ["arm", "γ ± 1", "n"], rows)
    assert table.markdown().splitlines()[2:] == [
        "| arm | γ ± 1 | n |",
        "|---|--:|--:|",
        "| rope & co | **-0.02 [-0.03, -0.01]** | 2 |",
        "| x^2 #1 ~ {y} \\ | +0.5 ≈ | 1-2 |",
    ]
    text = table.latex()
    assert r"\caption{a\_b: 50 \% of |x|}" in text and r"\begin{tabular}{lrr}" in text
    assert r"arm & $\gamma$ $\pm$ 1 & n \\" in text
    assert r"rope \& co & \textbf{$-0.02$ [$-0.03$, $-0.01$]} & 2 \\" in text
    assert r"x\textasciicircum{}2 \#1 \textasciitilde{} \{y\} \textbackslash{} & $+0.5$ $\approx$ & 1-2 \\" in text
    wide = Table("", ["a", "b", "c"], left=2)
    assert "{llr}" in wide.latex() and "|---|---|--:|" in wide.markdown()
    assert latex("100 %_") == r"100 \%\_"
    assert Table("", ["a|b"], []).markdown().splitlines()[2] == "| a\\|b |"


# ---- evaluations


def test_rows_of_shifted_positions_have_a_table_of_their_own(tmp_path):
    """eval.py --protocol shift: rows of one length, and the same figures in "shift"; null ones for other schemes."""

    def rows(run):
        def row(offset):
            there = report_row(None if run.arm == "alibi" else [10, 20], protocol="shift")
            return there | {"offset": offset, "largest_change": offset * run.seed / 1e6}

        return {"far": [report_row([10, 20])], "shift": [row(0), row(256)]}

    losses = {"rope": [1.0, 1.0], "alibi": [1.0, 1.0]}
    evaluations = {"far": EVAL["far"], "shift": {"protocol": "shift", "offsets": [0, 256]}}
    study = study_of(tmp_path, write_grid(tmp_path / "g.yaml"), losses, rows=rows, eval=evaluations)
    assert {key[0] for name in evaluations for key in study.rows("", name)} == {"same-targets"}
    (table,) = [table for table in tables(study) if "are shifted (shift)" in table.title]
    assert table.head == ["arm", "by 0", "by 256"]
    assert table.rows == [["rope", "0.0e+00", "5.1e-04"], ["alibi", "n/a", "n/a"]]  # the largest over seeds
    notes = report.notes(study)
    assert notes[-1] == "n/a: too long." and sum(note.startswith("Report") for note in notes) == 1


# ---- a paper's figures


def test_published_figures_stand_beside_measured_ones(tmp_path):
    """CRoPE, table 1, WikiText-2: RoPE as published, CRoPE 0.1 better where the paper has it 0.0086 worse; one arm that
    the paper lacks."""
    losses = {
        "sinusoidal": [5.7, 5.8],
        "rope": [5.36, 5.37],
        "crope": [5.261, 5.269],
        "rope, grouped Q/K/V": [5.3, 5.3],
    }
    study = study_of(tmp_path, SWEEPS / "crope-1.yaml", losses, settings=["WikiText-2"])
    (table,) = [t for t in tables(study) if t.title.startswith("Lou & Xu")]
    rows = {row[1]: dict(zip(table.head, row)) for row in table.rows}
    assert list(rows) == list(losses)
    assert all(row["setting"] == "WikiText-2" and row["seeds"] == "2" for row in rows.values())
    rope, crope, control = rows["rope"], rows["crope"], rows["rope, grouped Q/K/V"]
    assert rope["published"] == "5.3644 ± 0.0279" and rope["verdict"] == "within interval"
    assert rope["less published"] == f"{5.365 - 5.3644:+.4f}"
    assert crope["verdict"] == "differs" and crope["published less rope, nats"] == "+0.0086"
    assert crope["measured less rope, nats"].startswith("**-0.1000 [")
    assert crope["verdict on the difference"] == "differs"
    assert control["published"] == "–" and control["verdict"] == control["verdict on the difference"] == ""
    assert control["measured"].startswith("5.3000 [")
    assert "all of PG-19's training books" in report.markdown(study)
    assert r"5.3644 $\pm$ 0.0279" in report.latex_text(study)


def test_a_published_spread_decides_in_a_table(tmp_path):
    """CRoPE, table 1, WikiText-2: 5.3730 ± 0.0255 against 5.40 ± 0.013, and rope's 5.3644 ± 0.0279 against the same.
    The difference +0.0086 has a ± of √(0.0255² + 0.0279²) = 0.0378."""
    losses = {"rope": [5.399, 5.401], "crope": [5.399, 5.401], "sinusoidal": [5.9, 5.91]}
    study = study_of(tmp_path, SWEEPS / "crope-1.yaml", losses, settings=["WikiText-2"])
    table = published_table(study)
    rows = {row[1]: dict(zip(table.head, row)) for row in table.rows}
    assert rows["crope"]["verdict"] == "cannot be told apart" == rows["crope"]["verdict on the difference"]
    assert rows["rope"]["verdict"] == "cannot be told apart"
    assert rows["sinusoidal"]["verdict"] == "differs" == rows["sinusoidal"]["verdict on the difference"]
    assert rows["sinusoidal"]["measured less rope, nats"].endswith("↑") and r"$\uparrow$" in report.latex_text(study)
    assert "cannot be told apart" in "".join(report.notes(study))


def test_a_spread_of_perplexities_is_taken_in_nats():
    assert reach_in(math.log, 20.0, 2.0) == pytest.approx(math.log(22 / 18) / 2)
    assert reach_in(float, 20.0, 2.0) == 2.0 and reach_in(float, 20.0) == 0.0


def test_brackets_of_one_seed_name_the_method_that_made_them(tmp_path):
    """Committed reports have the intervals of their day."""
    losses = {"rope": [1.0], "crope": [1.0]}
    study = study_of(
        tmp_path, write_grid(tmp_path / "g.yaml"), losses, rows=lambda run: [report_row([10, 20])], eval=EVAL
    )
    for key in study.runs:
        study.reports(*key, "far")[1]["interval"] = "95 % percentile bootstrap"
    assert "Brackets at figures: 95 % percentile bootstrap." in "".join(report.notes(study))
    assert "for each difference alone" in "".join(report.notes(study))


def test_a_reduced_set_up_compares_directions_only(tmp_path):
    losses = {"sinusoidal": [9.0, 9.2], "rope": [8.0, 8.1], "crope": [8.1, 8.0]}
    study = study_of(tmp_path, SWEEPS / "crope-2.yaml", losses, "cpu")
    (table,) = [t for t in tables(study) if t.title.startswith("Lou & Xu")]
    rows = {row[1]: dict(zip(table.head, row)) for row in table.rows}
    assert len(table.rows) == 3  # one setting is left
    assert {row["verdict"] for row in rows.values()} == {"not comparable"}
    assert {row["less published"] for row in rows.values()} == {""}
    sinusoidal, crope = rows["sinusoidal"], rows["crope"]
    same = sinusoidal["verdict on the difference"] == "same direction"
    assert same or "≈" in sinusoidal["measured less rope, nats"]
    assert crope["verdict on the difference"] == "inside noise" and "≈" in crope["measured less rope, nats"]
    text = report.markdown(study)
    assert "measured in a reduced set-up" in text and "2,000 of 10,000 steps" in text


def test_perplexities_are_compared_as_such_and_differences_in_nats(tmp_path):
    """CARoPE, table 1: rows of a report, at multiples of the training length, null figures as n/a."""
    nats = {"rope": {512: 3.06, 1024: 4.0}, "carope": {512: 3.05, 1024: 3.1}, "learned": {512: 3.1, 1024: None}}

    def rows(run):
        for length, base in nats[run.arm].items():
            nll = None if base is None else np.array([10, 20]) * (base + 0.001 * run.seed)
            yield report_row(nll, length, protocol="nonoverlapping")

    losses = dict.fromkeys(nats, [1.0] * 3)
    study = study_of(tmp_path, SWEEPS / "carope-1.yaml", losses, rows=rows, settings=["Small"])
    table = published_table(study)
    found = {(row[0], row[1]): dict(zip(table.head, row)) for row in table.rows}
    far = found["Small, 2× the training length", "carope"]
    assert far["published"] == "21.39" and far["measured"].startswith(f"{math.exp(3.102):.2f} [")
    assert far["published less rope, nats"] == f"{math.log(21.39 / 56.61):+.4f}"
    assert far["measured less rope, nats"].startswith("**-0.9000 [") and far["verdict"] == "differs"
    assert found["Small, 2× the training length", "learned"]["measured"] == "n/a"
    assert found["Small, 1× the training length", "rope"]["less published"] == f"{math.exp(3.062) - 21.31:+.2f}"


@pytest.mark.parametrize("scale,judged", [("paper", "differs"), ("cpu", "other direction")])
def test_speeds_are_compared_by_their_ratio(scale, judged, tmp_path):
    grid, files = Grid.read(SWEEPS / "carope-throughput.yaml", scale), RunFolders(tmp_path / "out")
    grid.command = "c"
    grid.write(files.folder)
    seconds = {"rope": [1.0, 2.0, 1.0], "carope": [1.1, 2.2, 1.1], "carope content=false": [1.0, 2.0, 1.0]}
    bench = {"seconds": seconds, "memory": dict.fromkeys(seconds, 1e6), "tokens_a_step": 1000, "rounds": 3}
    (files.folder / bench_file(grid)).write_text(json.dumps(bench | {"device": "cpu", "threads": 1}))
    (table,) = tables(Study.read(files.folder))
    rows = {row[0]: row for row in table.rows}
    assert rows["rope"][1:4] == ["1,000", "1", "1"] and rows["carope"][2].startswith("0.909 [0.909, 0.909]")
    assert rows["carope"][-3:] == ["760,000", "1.206", judged] and rows["carope content=false"][-3:] == ["–", "", ""]
    collect(grid, files, tmp_path / "results")
    report.start_readme(grid, tmp_path / "results")
    report.write(tmp_path / "results")
    readme = (tmp_path / "results" / "README.md").read_text()
    assert "Made by `c` (device cpu; threads 1)." in readme and "figure.png" not in readme  # there are no runs to draw


def test_the_leaderboard_says_what_the_other_tables_say_lowest_first(tmp_path):
    path = write_grid(tmp_path / "g.yaml", eval=EVAL, throughput={"rounds": 3}, baseline="rope")
    level = {"rope": 20, "crope": 10, "learned": 30}

    def rows(run):
        longer = [None] if run.arm == "learned" else [[level[run.arm] + 7, 25 + run.seed]]
        return [
            report_row([level[run.arm], 2 * level[run.arm] + run.seed / 10], 16),
            *(report_row(n, 32) for n in longer),
        ]

    losses = {arm: [2.0, 2.1] for arm in level}
    study_of(tmp_path / "out", path, losses, rows=rows, arms=["crope", "rope", "learned"])
    bench = {"seconds": {"rope": [1.0, 2.0], "crope": [1.25, 2.5]}, "memory": {"rope": 2e6, "crope": 3e6}}
    bench |= {"tokens_a_step": 1, "rounds": 2, "device": "cpu", "threads": 1}
    grid = Grid.of_folder(tmp_path / "out")
    (tmp_path / "out" / bench_file(grid)).write_text(json.dumps(bench))
    board, *others = tables(Study.read(tmp_path / "out"))
    assert board.head == ["arm", "seeds", "rate", "1×", "2×", "speed", "memory"]
    assert [row[0] for row in board.rows] == ["crope", "rope", "learned"]
    (less,) = (table for table in others if "less rope, same-targets" in table.title)
    of_others = {row[0]: row[1:] for row in less.rows} | {"rope": ["", ""]}
    number = lambda cell: cell.strip("*").partition(" ")[0]  # noqa: E731
    for arm, seeds, rate, *cells in board.rows:
        assert (seeds, rate) == ("2", "0.002")
        for ours, theirs in zip(cells, of_others[arm]):
            assert ours == theirs or float(number(ours)) == pytest.approx(float(number(theirs)), abs=5e-4)
    assert board.rows[0][3].endswith("**") and board.rows[2][3].endswith("↑")
    assert [row[5:] for row in board.rows] == [["0.80", "1.50"], ["1.00", "1.00"], ["n/a", "n/a"]]


def test_a_leaderboard_and_figure_may_compare_with_the_baseline_cropped_to_its_training_length(tmp_path):
    """At 2× each arm less rope at 1×, rope's own loss there among them; at 1×, and in all other tables, as without."""
    path = write_grid(tmp_path / "g.yaml", eval=EVAL, throughput={"rounds": 3}, baseline="rope", cropped=True)
    level = {("rope", 16): 2.0, ("crope", 16): 1.5, ("rope", 32): 5.0, ("crope", 32): 1.8}
    noise = {(arm, n): i / 100 for i, (arm, n) in enumerate(level)}

    def rows(run):
        return [
            report_row(np.array([10, 20]) * (level[run.arm, n] + noise[run.arm, n] * run.seed), n) for n in (16, 32)
        ]

    study_of(tmp_path / "out", path, {"rope": [2.0, 2.1], "crope": [2.0, 2.1]}, rows=rows, arms=["crope", "rope"])
    study = Study.read(tmp_path / "out")
    at_1x, at_2x = study.differences("", [16, 32])["crope"]
    assert at_1x["difference"] == pytest.approx(1.5 - 2.0 + 1.5 * 0.01)
    assert at_2x["difference"] == pytest.approx(1.8 - 2.0 + 1.5 * 0.03)
    none, itself = study.differences("", [16, 32])["rope"]
    assert none is None and itself["difference"] == pytest.approx(5.0 - 2.0 + 1.5 * 0.02)
    bench = {"seconds": {"rope": [1.0]}, "memory": {"rope": 2e6}}
    bench |= {"tokens_a_step": 1, "rounds": 1, "device": "cpu", "threads": 1}
    (tmp_path / "out" / bench_file(study.grid)).write_text(json.dumps(bench))
    board, *others = tables(Study.read(tmp_path / "out"))
    assert "less rope, its context cropped to 1×;" in board.title
    cells = {row[0]: [cell.strip("*").partition(" ")[0] for cell in row[3:5]] for row in board.rows}
    assert cells == {"crope": ["-0.485", "-0.155"], "rope": ["", "+3.030"]}
    (less,) = (table.rows for table in others if "less rope, same-targets" in table.title)
    assert [row[2].strip("*").partition(" ")[0] for row in less] == ["-3.1850"]  # crope less rope at 2×
    forest = PANELS["difference"](study, "", looks_of({"rope": "rope", "crope": "crope"}))
    assert forest.title == "Paired difference from rope, cropped to 1×" and forest.xlabel.endswith("cropped rope’s")
    assert [(name, found[0] is None, found[1]) for name, _, found in forest.rows] == [
        ("crope", False, at_2x),
        ("rope", True, itself),
    ]
    for by_seed in study.cache["", "rope", "far"].values():  # a study that did not evaluate the training length
        by_seed["results"] = [row for row in by_seed["results"] if row["length"] != 16]
    assert study.cropped_to("") is None and study.differences("", [32])["rope"] == [None]
    forest = PANELS["difference"](study, "", looks_of({"rope": "rope", "crope": "crope"}))
    assert forest.title == "Paired difference from rope"


def test_what_a_setting_changes_is_the_paired_difference_of_differences(tmp_path):
    """Each arm less rope at its training length, in a setting less in the first, over seeds and documents."""
    settings = {"plain": {}, "normed": {"qk_norm": True}}
    path = write_grid(tmp_path / "g.yaml", eval=EVAL, settings=settings, baseline="rope", cropped=True, seeds=3)
    generator = np.random.default_rng(0)
    nll = {}

    def rows(run):
        for n in (16, 32):
            nll[run.setting, run.arm, run.seed, n] = np.array([10, 20]) * generator.normal(2, 0.1, 2)
        return [report_row(nll[run.setting, run.arm, run.seed, n], n) for n in (16, 32)]

    losses = {"rope": [2.0] * 3, "crope": [2.0] * 3}
    study = study_of(tmp_path / "out", path, losses, rows=rows)
    less, change, *_ = tables(study)
    assert less.title == "nats per token less rope, its context cropped to 1×, by setting"
    assert change.title == f"what a setting changes: {less.title.partition(', by')[0]}, less the same in plain"
    assert [row[:2] for row in less.rows] == [[s, arm] for s in settings for arm in ("rope", "crope")]
    assert [row[:2] for row in change.rows] == [["normed", "rope"], ["normed", "crope"]]
    of = lambda setting, arm, n: np.stack([nll[setting, arm, seed, n] for seed in (1, 2, 3)])  # noqa: E731
    for arm, n, cell in (("rope", 32, change.rows[0][3]), ("crope", 16, change.rows[1][2])):
        then, now = (of(setting, arm, n) - of(setting, "rope", 16) for setting in settings)
        assert cell == difference_cell(paired_difference(then, now, np.array([10, 20]), True) | {"seeds": 3}, 3)
        assert cell.startswith(f"{(now - then).sum() / 90:+.3f} [")
    assert change.rows[0][2] == ""  # rope less itself


@pytest.mark.parametrize("of_second", [{"targets": "other"}, {"length": 16, "protocol": "nonoverlapping"}])
def test_settings_that_scored_other_targets_are_not_compared(tmp_path, of_second):
    path = write_grid(tmp_path / "g.yaml", eval=EVAL, settings={"plain": {}, "normed": {"qk_norm": True}})
    row = lambda run: [report_row([20, 41], **(of_second if run.setting == "normed" else {}))]  # noqa: E731
    study = study_of(tmp_path / "out", path, {"rope": [2.0, 2.1], "crope": [2.0, 2.2]}, rows=row)
    assert not [table.title for table in tables(study) if "setting" in table.title]


def test_arms_that_share_a_speed_share_its_row_and_the_training_length_orders_the_leaderboard(tmp_path):
    """Two arms differ in a rate alone, which the benchmark does not know. One length is below that of training."""
    arms = {
        "rope": {"pos": "rope"},
        "slow": {"pos": "crope"},
        "fast, × 10": {"pos": "crope", "pos_lr_multiplier": 10.0},
    }
    far = {"far": {"lengths": ["8", "1x", "2x"], "max_targets": 64}}
    path = write_grid(tmp_path / "g.yaml", eval=far, throughput={"rounds": 2}, arms=arms)
    at_training = {"rope": 20, "slow": 15, "fast, × 10": 10}

    def rows(run):
        return [
            report_row([n, n], length) for length, n in ((8, 40 - at_training[run.arm]), (16, at_training[run.arm]))
        ]

    study_of(tmp_path / "out", path, {arm: [2.0, 2.1] for arm in arms}, rows=rows)
    bench = {"seconds": {"rope": [1.0, 2.0], "crope": [1.25, 2.5]}, "memory": {"rope": 2e6, "crope": 3e6}}
    bench |= {"tokens_a_step": 1, "rounds": 2, "device": "cpu", "threads": 1}
    (tmp_path / "out" / bench_file(Grid.of_folder(tmp_path / "out"))).write_text(json.dumps(bench))
    board, *_, speeds = tables(Study.read(tmp_path / "out"))
    assert board.head[3:5] == ["0.5×", "1×"] and [row[0] for row in board.rows] == ["fast, × 10", "slow", "rope"]
    assert {row[0]: row[5] for row in board.rows} == {"rope": "1.00", "slow": "0.80", "fast, × 10": "0.80"}
    assert [row[0] for row in speeds.rows] == ["rope", "slow; fast, × 10"]
