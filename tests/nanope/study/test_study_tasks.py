"""Grids of tasks: their data, tables, figures and CSV."""

import csv
import io
import json

import numpy as np
import pytest
import yaml
from scipy.stats import norm
from studies import FIELDS, command, study_of, task_row, write_grid

from nanope.evaluation.statistics import paired_difference
from nanope.study.export import write_csv
from nanope.study.figures import draw, draw_reports
from nanope.study.grid import Grid, in_tokens
from nanope.study.panels import accuracy, looks_of
from nanope.study.report import latex_text, markdown
from nanope.study.results import Study
from nanope.study.runner import prepare

ANSWERS = {"answers": {"protocol": "task"}}
# Arm → seed → of five examples how many tokens are right, at 8 and 16
RIGHT = {
    "rope": {1: ([4, 4, 4, 4, 3], [4, 1, 0, 0, 2]), 2: ([4, 4, 4, 3, 3], [0, 1, 4, 0, 2])},
    "alibi": {1: ([4, 4, 4, 4, 4], [4, 4, 4, 4, 2]), 2: ([4, 4, 4, 4, 3], [4, 4, 4, 3, 4])},
    "learned": {1: ([4, 4, 4, 4, 3], None), 2: ([4, 4, 0, 0, 0], None)},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    grid = write_grid(folder / "g.yaml", arms=[*RIGHT], eval=ANSWERS, data={"corpus": "task", "task": "copy"})
    made = yaml.safe_load(grid.read_text())
    del made["fields"]["data_dir"]
    grid.write_text(yaml.safe_dump(made))

    def rows(run):
        return [task_row(right, 8 * (i + 1)) for i, right in enumerate(RIGHT[run.arm][run.seed])]

    return study_of(folder / "runs", grid, dict.fromkeys(RIGHT, [1.0, 1.1]), rows=rows)


def test_tables_have_accuracies_chance_and_paired_differences(study):
    text = markdown(study)
    assert "**exact match by length (answers)**" in text and "| arm | 8 | 16 |" in text
    line = next(line for line in text.splitlines() if line.startswith("| rope |") and "70.0%" in line)
    assert "70.0% [0.0%, 100.0%]" in line and "20.0% [10.0%, 90.0%]" in line  # 0.8 and 0.6; 0.2 twice: of one
    assert "| learned | 60.0% [0.0%, 100.0%] | n/a |" in text and "| chance | 6.2% | 6.2% |" in text
    a, b = (np.array([[r == 4 for r in RIGHT[arm][seed][1]] for seed in (1, 2)], float) for arm in ("rope", "alibi"))
    found = paired_difference(a, b, np.ones(5), True)
    low, high = found["interval"]
    assert found["difference"] == pytest.approx(0.6) and low > 0
    assert f"**+0.600 [{low:+.3f}, {high:+.3f}]**" in text
    assert "exact match with the context cropped to a row of training" in text
    assert "5 examples of each length, the same for all arms and seeds; trained on copy up to 8" in text
    assert "n/a: too long." in text and "$+0.600$" in latex_text(study)


def test_worse_is_marked_with_an_arrow_down(tmp_path):
    grid = write_grid(tmp_path / "g.yaml", arms=["alibi", "rope"], eval=ANSWERS)
    study = study_of(
        tmp_path / "runs", grid, {"alibi": [1.0, 1.0], "rope": [1.0, 1.0]},
        rows=lambda run: [task_row(RIGHT[run.arm][run.seed][1])],
    )  # fmt: skip
    assert "-0.600" in markdown(study) and "↓" in markdown(study)


def test_what_is_always_right_and_what_never_is_differ_for_sure(tmp_path):
    """Without any variance: Wilson's interval of 5 of 5 examples, whose lower end is 1 / (1 + z²/5)."""
    grid = write_grid(tmp_path / "g.yaml", arms=["rope", "alibi", "fox"], eval=ANSWERS)
    right = {"alibi": [0] * 5, "rope": [4] * 5, "fox": [0] * 5}  # alibi is the baseline
    study = study_of(
        tmp_path / "runs", grid, dict.fromkeys(right, [1.0, 1.0]), rows=lambda run: [task_row(right[run.arm])]
    )
    text, low = markdown(study), 1 / (1 + norm.ppf(0.975) ** 2 / 5)
    assert f"| rope | **+1.000 [{low:+.3f}, +1.000]** |" in text
    assert f"| fox | +0.000 [{low - 1:+.3f}, {1 - low:+.3f}] ≈ |" in text
    assert "| rope | 100.0% [10.0%, 90.0%] |" in text  # of equal seeds, that over the examples of one


def test_other_examples_do_not_compare(tmp_path):
    grid = write_grid(tmp_path / "g.yaml", arms=["alibi", "rope"], eval=ANSWERS)
    study = study_of(
        tmp_path / "runs", grid, {"alibi": [1.0], "rope": [1.0]}, rows=lambda run: [task_row([4] * 5, 8, run.arm)]
    )
    with pytest.raises(ValueError, match="answered different examples"):
        markdown(study)


def test_figure_and_csv(study, tmp_path):
    panel = accuracy(study, "", looks_of({arm: arm for arm in RIGHT}))
    by_name = {curve.name: curve for curve in panel.curves}
    assert by_name["alibi"].y == pytest.approx([0.9, 0.8]) and by_name["learned"].x == [8] and by_name["learned"].ends
    assert by_name["chance"].y == [0.0625, 0.0625] and panel.trained == (8,) and panel.title == "copy"
    draw(study, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 10_000
    file = io.StringIO()
    write_csv([study.folder], file)
    lines = [*csv.DictReader(io.StringIO(file.getvalue()))]
    assert len(lines) == 12 and {line["task"] for line in lines} == {"copy"}
    figures = "accuracy token_accuracy chance token_chance cropped_accuracy cropped_token_accuracy examples".split()
    line = next(each for each in lines if "alibi-seed1" in each["report"] and each["length"] == "16")
    assert [line[name] for name in figures] == ["0.8", "0.9", "0.0625", "0.5", "0.0", "0.5", "5"]
    reports = [json.loads(path.read_text()) for path in sorted(study.folder.glob("*seed1*/eval/*.json"))]
    for report, run in zip(reports, ("alibi", "learned", "rope")):
        report |= {"pos": run, "run": run, "block_size": 16}
    draw_reports(reports, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_a_grid_names_the_data_of_a_task(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**FIELDS, "data_dir": "data/elsewhere"}))
    settings = {name: {"base": "base.yaml", "data": {"corpus": "task", "task": name}} for name in ("copy", "sort")}
    content = {"arms": ["rope"], "settings": settings, "eval": ANSWERS}
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(content))
    grid = Grid.read(tmp_path / "g.yaml")
    assert grid.fields_of("sort", "rope")["data_dir"] == "data/task-sort"
    assert grid.data_of("copy") == {"corpus": "task", "task": "copy"}
    content["fields"] = {"max_steps": 7}  # for every run, over a setting's base too
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(content))
    assert grid.fields_of("sort", "rope")["max_steps"] == FIELDS["max_steps"]
    assert Grid.read(tmp_path / "g.yaml").fields_of("sort", "rope")["max_steps"] == 7
    report = {"protocol": "task", "lengths": ["1x", "2x"]}
    assert in_tokens(report, 64) == report  # of the task's lengths, not of block_size
    settings["copy"]["data"]["task"] = "cpoy"
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="unknown task 'cpoy'; did you mean 'copy'"):
        Grid.read(tmp_path / "g.yaml")


def test_a_folder_with_other_examples_is_not_taken(tmp_path, capfd):
    def prepared(**settings):
        settings = {name: {"data": {"corpus": "task", "task": "copy", **own}} for name, own in settings.items()}
        content = {"fields": FIELDS, "arms": ["rope"], "settings": settings}
        (tmp_path / "g.yaml").write_text(yaml.safe_dump(content))
        prepare(Grid.read(tmp_path / "g.yaml"), None, root=tmp_path)

    small = {"length": 4, "examples": 50}
    prepared(a=small, b=small)
    with pytest.raises(ValueError, match="the data were not made: .*prepare.py task copy"):
        prepared(a={**small, "examples": 60})
    assert "was made with other options" in capfd.readouterr().err
    with pytest.raises(ValueError, match="two settings have different data in one folder, data/task-copy-4: .*50.*60"):
        prepared(a=small, b={**small, "examples": 60})
    prepared(a=small, b={**small, "length": 5})
    assert {path.name for path in (tmp_path / "data").glob("task-*[0-9]")} == {"task-copy-4", "task-copy-5"}


@pytest.mark.slow
def test_a_sweep_over_tasks(tmp_path):
    """Data, runs, evaluations, tables and figure, by the command."""
    small = {"corpus": "task", "length": 4, "examples": 300}
    settings = {name: {"data": {**small, "task": name}} for name in ("copy", "flipflop")}
    content = {"fields": {**FIELDS, "max_steps": 4}, "arms": ["rope"], "settings": settings}
    content |= {"eval": {"answers": {"protocol": "task", "examples": 20}}}
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(content))
    driver = "from pathlib import Path; from nanope.study.sweep import main; main('s', '', root=Path({!r}))"
    done = command("-c", driver.format(str(tmp_path)), str(tmp_path / "g.yaml"), "--out", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "runs" / "table.md").read_text()
    assert (
        "copy: exact match by length" in text
        and "| arm | 4 | 8 | 16 | 32 |" in text
        and (tmp_path / "runs/figure.pdf").is_file()
    )
    assert len(Study.read(tmp_path / "runs").all_reports("answers")) == 2
