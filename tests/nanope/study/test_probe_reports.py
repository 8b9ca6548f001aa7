"""Tables, figures and CSV lines of what evaluations measure beside the loss."""

import csv
import io
import json

import numpy as np
import pytest
from studies import report_row, study_of, write_grid

from nanope.evaluation.effective import effective_contexts
from nanope.study import figures, report
from nanope.study.export import complete_rows, write_csv
from nanope.study.markup import latex
from nanope.study.panels import PANELS, looks_of, of_reports
from nanope.study.probe_tables import probe_tables
from nanope.study.results import Study
from nanope.study.tables import tables

ENTROPY = {"rope": 1.0, "crope": 2.0}


def heads(arm, seed):
    return [[{"weight": [0.5, 0.1 * seed, 1e-9], "entropy": ENTROPY[arm] + seed + h, "mean_distance": 3.0 * seed}
             for h in range(2)] for _ in range(2)]  # fmt: skip


def more(arm, seed):
    """What a report has beside its rows, different for each seed."""
    row = {"scaling": "none", "factor": 1.0}
    bins = [
        {"low": i / 5, "high": (i + 1) / 5, "recall": None if i == 1 else seed + 0.1 * i, "interval": None,
         "with_key": 1.0, "without_key": 2.0, "perplexity": 2.7, "trials": 0 if i == 1 else 4} for i in range(5)
    ]  # fmt: skip
    probe = row | {
        "length": 16,
        "recall": seed / 4,
        "interval": [0, 1],
        "accuracy": 0.5,
        "trials": 16,
        "by_depth": bins,
    }
    beyond = row | {"length": 32, "recall": None, "interval": None, "trials": None, "reason": "too far"}
    uniform = {"weight": [0.3, 0.2, 0.1], "entropy": 2.5, "mean_distance": 7.5}
    looked = row | {"length": 16, "windows": 2, "uniform": uniform, "layers": heads(arm, seed)}
    looked["distance"] = {"first": [0, 1, 4], "last": [0, 3, 8]}
    context = {"epsilon": 0.01, "length": 16 * seed, "interval": [16, 32], "shortest": 8, "longest": 64, "lowest": 64}
    context |= {"gain": 0.2 * seed, "gain_interval": [0.1, 0.3], "rises": False}
    keys = {"evaluator": "judge", "weights_sha256": "w", "lengths": [8, 32], "falls_by": 2.0, "ends_below": 2.0}
    keys |= {"tokens": 3, "of": 30, "sha256": "k", "evaluator_nats": [3.0, 2.0]}
    return {
        "probe": [probe, beyond], "attention": [looked], "effective_context": [row | context], "key_tokens": keys,
        "block_size": 16, "pos": arm, "run": arm, "step": 4, "config": {"pos": arm}, "data_hash": "h",
    }  # fmt: skip


def key_row(level, seed, length):
    nll = np.array([2.0, 1.0]) * (level + 0.01 * seed)
    figures = {"key_nats_per_token": nll.sum() / 3, "key_tokens": 3, "key_interval": None, "key_sha256": "k"}
    figures["key_per_document"] = {"document": [0, 1], "nll": nll.tolist(), "tokens": [2, 1]}
    return report_row([30, 60], length) | figures


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("probes")
    losses = {"rope": [3.0, 3.1], "crope": [2.9, 3.0]}
    path = write_grid(folder / "grid.yaml", eval={"far": {"lengths": [16, 32]}})
    level = {"rope": 1.0, "crope": 0.7}
    made = study_of(folder, path, losses, rows=lambda run: [key_row(level[run.arm], run.seed, n) for n in (16, 32)])
    for (_, arm), by_seed in made.runs.items():
        for seed, run in by_seed.items():
            file = run.report_path("far")
            file.write_text(json.dumps(json.loads(file.read_text()) | more(arm, seed)))
    return Study.read(folder)


def cells(study, start) -> dict[tuple, list[str]]:
    (table,) = [t for t in tables(study) if t.title.startswith(start)]
    return {tuple(row[: table.left]): row[table.left :] for row in table.rows}


def test_tables_have_means_over_seeds(study):
    found = cells(study, "effective context")
    assert found["rope",] == found["crope",] == ["24 [16, 32]", "64", "0.3000 [0.2000, 0.4000]"]
    recall = cells(study, "recall of a value")["rope",]
    assert recall[0].startswith("0.3750 [") and len(recall) == 1
    depth = cells(study, "recall by depth")["rope", "16"]
    assert len(depth) == 4 and depth[0].startswith("1.5000 [") and depth[3].startswith("1.9000 [")
    assert cells(study, "perplexity of the value by depth")["rope", "16"] == ["2.70"] * 4
    rope, crope = (cells(study, "attention")[arm, "16"] for arm in ("rope", "crope"))
    assert rope[0].startswith("3.000 [") and crope[0].startswith("4.000 [")
    assert rope[1] == "2.500" and rope[2].startswith("4.5 [") and rope[3] == "7.5"


def test_key_tokens_have_figures_and_paired_differences(study):
    mean = cells(study, "nats per token at context lengths, key tokens")
    less = cells(study, "nats per token less rope, key tokens")
    assert mean["rope",][0].startswith("1.0150 [") and mean["crope",][1].startswith("0.7150 [")
    assert less["crope",][0].lstrip("*").startswith("-0.3000 [")
    text = report.markdown(study)
    assert "- Key tokens: 3 of 30, whose loss under judge falls" in text and "- n/a: too far." in text
    assert "recall by depth" in report.latex_text(study) and latex("0–20 %") == r"0--20 \%"


def test_reports_of_before_have_the_table_that_their_rows_give(study):
    old = Study.read(study.folder)
    for key in old.runs:
        for seed, each in old.reports(*key, "far").items():
            old.cache[(*key, "far")][seed] = {k: v for k, v in each.items() if k not in more("rope", 1)}
    (table,) = probe_tables(old, "", "far")
    (rows, *_) = [report["results"] for report in old.reports("", "rope", "far").values()]
    (found,) = effective_contexts(rows, 0.01)
    assert table.title.startswith("effective context") and table.rows[0][:2] == ["rope", str(found["length"])]
    report = next(iter(old.reports("", "rope", "far").values()))
    shown = {(row["effective_context"], row["epsilon"]) for row in complete_rows(report)}
    assert shown == {(found["length"], 0.01)}
    looks = looks_of({arm: arm for arm in old.grid.arms})
    assert PANELS["attention"](old, "", looks) is None and PANELS["needle"](old, "", looks) == []


def test_panels_have_the_numbers_of_the_tables(study, tmp_path):
    looks = looks_of({arm: arm for arm in study.grid.arms})
    panel = PANELS["attention"](study, "", looks)
    assert [curve.name for curve in panel.curves] == ["rope", "crope", "uniform"]
    assert panel.curves[0].x == pytest.approx([3**0.5]) and panel.curves[0].y == pytest.approx(
        [0.15]
    )  # 1e-9 is not drawn
    assert panel.curves[2].x == pytest.approx([3**0.5, 32**0.5]) and panel.curves[2].y == [0.2, 0.1]
    rope, _ = PANELS["needle"](study, "", looks)
    assert (rope.columns, rope.rows[0]) == (["16", "32"], "0–20 %")
    assert [row[0] for row in rope.values] == pytest.approx([1.5, None, 1.7, 1.8, 1.9])
    assert {row[1] for row in rope.values} == {None} and rope.top == pytest.approx(1.9)
    for name in ("a.png", "a.pdf"):
        figures.draw(study, tmp_path / name, ["attention", "needle"])
        assert (tmp_path / name).stat().st_size > 5000


def test_panels_of_reports(study, tmp_path):
    reports = [each for key in study.runs for each in study.reports(*key, "far").values()][::2]
    attended, other, needle, _ = of_reports(reports, "same-targets", ("attention", "needle"))
    assert [curve.name for curve in attended.curves] == ["layer 1", "layer 2", "uniform"]
    assert attended.title.endswith("rope") and other.title.endswith("crope") and needle.values[0][0] == 1.0
    figures.draw_reports(reports, tmp_path / "a.png", panels=["needle"])
    with pytest.raises(ValueError, match="nothing to draw of difference"):
        of_reports(reports, "same-targets", ("difference",))


def test_colours_do_not_resolve_noise(study):
    (made,) = [each for each in study.reports("", "rope", "far").values()][:1]
    for b in made["probe"][0]["by_depth"]:
        b["recall"] = 0.004
    (panel,) = of_reports([made], "same-targets", ("needle",))
    assert panel.top == 0.1
    study.cache.clear()


def test_a_csv_has_a_line_for_each(study):
    text = io.StringIO(newline="")
    write_csv([study.folder], text)
    lines = [*csv.DictReader(io.StringIO(text.getvalue()))]
    count = lambda protocol: sum(line["protocol"] == protocol for line in lines)  # noqa: E731
    # 4 runs: 2 lengths, 2 of the probe, 5 depths, 2 layers of 2 heads
    assert [count(p) for p in ("same-targets", "key tokens", "probe", "probe depth")] == [8, 8, 8, 20]
    assert count("attention") == 16 and len(lines) == 60
    (first, *_) = [line for line in lines if line["protocol"] == "same-targets"]
    found = [first[k] for k in ("effective_context", "effective_low", "effective_high", "epsilon")]
    assert found == ["16", "16", "32", "0.01"]
    (head, *_) = [line for line in lines if line["protocol"] == "attention" and line["head"] == "2"]
    assert head["layer"] == "1" and float(head["entropy"]) in (3.0, 4.0, 5.0)
    (depth, *_) = [line for line in lines if line["protocol"] == "probe depth"]
    assert depth["depth"] == "0–20 %" and depth["accuracy"] == "" and depth["perplexity"] == "2.7"
