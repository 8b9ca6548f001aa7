"""Studies, read from folders of runs and from runs.jsonl, and the committed results."""

import json
import re
import shutil

import pytest
from studies import EVAL, diverge, finish, prepared, report_row, write_grid

from data.shards import open_data
from nanope import REPO
from nanope.study import report
from nanope.study.files import CollectedRuns, RunFolders, open_runs, write_runs
from nanope.study.grid import Grid
from nanope.study.results import Study, collect, unpack
from nanope.study.status import state_of


@pytest.fixture
def study(tmp_path):
    """A finished study: (grid, its runs, the folder for results)."""
    grid = Grid.read(write_grid(tmp_path / "g.yaml", eval=EVAL, question="Which?"))
    grid.command = "the same"
    files = RunFolders(tmp_path / "out")
    for run in grid.runs(files):
        rows = [report_row([10 + run.seed, 1 / 3], n) for n in (16, 32)]
        finish(run, 2.0 + 0.1 * run.seed + 1e-17 * (run.arm == "crope"), rows, data_hash="a")
    grid.write(tmp_path / "out")
    return grid, files, tmp_path / "results"


def test_a_folder_of_runs_and_runs_jsonl_are_read_alike(study):
    grid, files, target = study
    collect(grid, files, target)
    assert sorted(path.name for path in target.iterdir()) == ["grid.yaml", "runs.jsonl"]
    collected = open_runs(target)
    assert isinstance(collected, CollectedRuns) and sorted(collected.names()) == files.names()
    for name in files.names():
        assert collected.config(name) == files.config(name)
        assert collected.metrics(name) == files.metrics(name)
        assert collected.reports(name) == files.reports(name) != set()
        assert all(collected.report(name, file) == files.report(name, file) for file in files.reports(name))
    assert all(run.done() for run in grid.runs(collected))
    assert collected.report(files.names()[0], "other.json") is None is collected.bench("other.json")
    assert collected.metrics("other") == [] and collected.reports("other") == set()


@pytest.mark.slow
def test_runs_jsonl_alone_gives_the_same_tables_and_figure(study):
    grid, files, target = study
    collect(grid, files, target)
    report.start_readme(grid, target)
    before = report.markdown(Study.read(files.folder))
    shutil.rmtree(files.folder)
    assert report.write(target) == before and before.startswith("Which?")
    readme = (target / "README.md").read_text()
    assert before in readme and (target / "figure.png").is_file() and (target / "table.tex").is_file()
    (target / "README.md").write_text(readme + "By hand.\n")
    report.write(target)  # the answer stays, and the tables are there once
    assert (target / "README.md").read_text() == readme + "By hand.\n"


def test_collect_keeps_and_names_runs_that_the_grid_no_longer_has(study, capsys):
    grid, files, target = study
    collect(grid, files, target)
    assert capsys.readouterr().err == ""
    fewer = Grid.read(files.folder.parent / "g.yaml", changes={"arms": ["rope"]})
    collect(fewer, files, target)
    said, left = capsys.readouterr().err, [name for name in files.names() if name.startswith("crope")]
    assert {*left} < {*open_runs(target).names()} and len(left) == 2
    assert all(name in said for name in left) and not any(run.name in said for run in fewer.runs(files))


def test_collecting_again_keeps_measurements_that_only_the_earlier_collection_had(study):
    grid, files, target = study
    collect(grid, files, target)
    collected = open_runs(target)
    name, *others = collected.names()
    lines = [{**collected.runs[other], "run": other} for other in (name, *others)]
    lines[0]["eval"]["earlier-0.json"] = {"results": []}
    write_runs(target, [*lines, {"bench": "throughput-earlier.json", "report": {"rounds": 1}}])
    collect(grid, files, target)
    again = open_runs(target)
    assert again.report(name, "earlier-0.json") == {"results": []} and files.reports(name) < again.reports(name)
    assert again.bench("throughput-earlier.json") == {"rounds": 1}


def test_collect_refuses_the_sweeps_own_folder(study):
    grid, files, _ = study
    with pytest.raises(ValueError, match="is the sweep's own folder"):
        collect(grid, files, files.folder)
    assert not (files.folder / "runs.jsonl").exists()


def test_what_is_not_done_is_named_and_joins_a_later_collection(study, capsys):
    grid, files, target = study
    first, second, *_ = grid.runs(files)
    for run in (first, second):
        run.folder.rename(files.folder.parent / run.name)
    collect(grid, files, target)
    said = capsys.readouterr().err
    assert first.name in said and second.name in said and sorted(open_runs(target).names()) == files.names()
    assert "Missing, not done or diverged: rope, seed 1; crope, seed 1." in report.markdown(Study.read(target))
    for run in (first, second):
        (files.folder.parent / run.name).rename(run.folder)
    for run in grid.runs(files)[2:]:  # which are nowhere else any more
        shutil.rmtree(run.folder)
    collect(grid, files, target)
    assert capsys.readouterr().err == ""  # they are collected, and in the tables
    assert len(open_runs(target).names()) == 4 and not Study.read(target).missing


def test_collect_refuses_where_nothing_is_done(study):
    grid, files, target = study
    shutil.rmtree(files.folder)
    with pytest.raises(ValueError, match="nothing in .* is done"):
        collect(grid, files, target)
    assert not target.exists()


def test_known_results_are_runs_that_are_done(tmp_path):
    """Tuned: the trials' outcome tells which other runs there are. Two of six main runs are unknown."""
    data = prepared(tmp_path)
    tune = {"learning_rate": [1e-3, 2e-3], "seeds": [0]}
    grid = Grid.read(write_grid(tmp_path / "g.yaml", data, eval=EVAL, tune=tune, arms=["rope", "crope", "none"]))
    there, here = RunFolders(tmp_path / "there"), RunFolders(tmp_path / "here")
    for done in (grid.runs, grid.main_runs):
        for run in done(there):
            rows = [report_row([10 + run.seed, 1 / 3], n) for n in (16, 32)]
            finish(run, 2.0 + (run.tuning or 0), rows, data_hash=open_data(data).hash)
    unknown = [run for run in grid.main_runs(there) if run.arm == "none"]
    shutil.rmtree(unknown[0].folder)
    shutil.rmtree(unknown[1].folder / "eval")
    collect(grid, there, tmp_path / "results")

    assert unpack(grid, here, tmp_path / "results", tmp_path) == 10
    assert [run.name for run in grid.runs(here) if not run.done()] == [run.name for run in unknown]
    for run in (run for run in grid.runs(here) if run.name not in [other.name for other in unknown]):
        assert here.metrics(run.name) == there.metrics(run.name) and here.config(run.name) == there.config(run.name)
        assert all(run.report(name) == there.report(run.name, run.report_file(name)) for name in run.evaluations)
    assert unpack(grid, here, tmp_path / "results", tmp_path) == 0  # what is there stays

    path, known = tmp_path / "results" / "runs.jsonl", open_data(data)
    path.write_text(path.read_text().replace(known.hash, known.manifest_hash))  # as was recorded before
    assert unpack(grid, RunFolders(tmp_path / "again"), tmp_path / "results", tmp_path) == 10
    begun = [run.metrics()[0] for run in grid.runs(RunFolders(tmp_path / "again")) if run.done()]
    assert {line["environment"]["data_hash"] for line in begun} == {known.hash}
    path.write_text(path.read_text().replace(known.manifest_hash, "b"))
    with pytest.raises(ValueError, match="was trained on other data than"):
        unpack(grid, RunFolders(tmp_path / "new"), tmp_path / "results", tmp_path)
    assert not [*(tmp_path / "new").glob("*/metrics.jsonl")]


def test_a_known_run_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """Killed between a run's files: it would be trained, and keep the evaluations of another."""
    data = prepared(tmp_path)
    grid = Grid.read(write_grid(tmp_path / "k.yaml", data, eval=EVAL))
    there, here = RunFolders(tmp_path / "there"), RunFolders(tmp_path / "here")
    for run in grid.runs(there):
        finish(run, 2.0, [report_row([10, 1 / 3], n) for n in (16, 32)], data_hash=open_data(data).hash)
    collect(grid, there, tmp_path / "known")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nanope.study.results.yaml.safe_dump", killed)
        unpack(grid, here, tmp_path / "known", tmp_path)
    assert not any(run.folder.exists() for run in grid.runs(here))
    unpack(grid, here, tmp_path / "known", tmp_path)
    assert all(run.done() for run in grid.runs(here)) and here.names() == there.names()


def test_a_line_that_is_no_run_is_named(tmp_path):
    for text in ("{", "[]", '{"a": 1}', '{"bench": "b"}'):
        (tmp_path / "runs.jsonl").write_text(json.dumps({"run": "a"}) + f"\n{text}\n")
        with pytest.raises(ValueError, match="runs.jsonl: line 2 is no run"):
            open_runs(tmp_path)


def test_a_diverged_run_is_collected_and_named_in_the_table(tmp_path):
    grid = Grid.read(write_grid(tmp_path / "g.yaml", eval={}))
    files, target = RunFolders(tmp_path / "out"), tmp_path / "results"
    for run in grid.runs(files):
        diverge(run) if (run.arm, run.seed) == ("crope", 2) else finish(run, 3.0 + (run.arm == "crope"))
        (run.folder / "checkpoints").mkdir()
        (run.folder / "checkpoints" / f"step_{run.max_steps}.pt").touch()
    assert [state_of(run) for run in grid.runs(files)] == ["done", "done", "done", "diverged"]
    collect(grid, files, target)
    text = report.markdown(Study.read(target))
    assert "diverged: crope, seed 2 (diverged). Means are over" in text
    assert re.search(r"^\| crope \| [\d,]+ \| 1 \|.*\| 4.0000 \| \+1.0000 \|$", text, re.M)


def test_a_report_says_on_which_machines_its_runs_were_made(study):
    """A study may take sessions on several. Every value has its number of runs; of equal ones the value is enough."""
    _, files, _ = study
    for name, device in zip(files.names(), ("cpu (A)", "cpu (B)", "cpu (B)", "cpu (B)")):
        path = files.folder / name / "metrics.jsonl"
        first, *rest = path.read_text().splitlines()
        line = json.loads(first)
        line["environment"] |= {"device": device, "dtype": "float32", "git": {"commit": "c0ffee", "dirty": True}}
        line["environment"] |= {"attention": "dense"} if device == "cpu (A)" else {}
        path.write_text("\n".join([json.dumps(line), *rest]) + "\n")
    told = "host x; data_hash a; device 3 × cpu (B), 1 × cpu (A); dtype float32; commit c0ffee with changes; attention "
    assert report.environment(Study.read(files.folder)) == told + "1 × dense"


def test_a_report_says_which_arms_have_rates_of_their_own(tmp_path):
    arms = {"rope": {"pos": "rope"}, "none": {"pos": "none", "learning_rate": 0.5, "pos_lr_multiplier": 2}}
    grid = Grid.read(write_grid(tmp_path / "g.yaml", eval={}, arms=arms, seeds=1))
    for run in grid.runs(RunFolders(tmp_path / "out")):
        finish(run, 3.0)
    grid.write(tmp_path / "out")
    note = report.tuning_note(Study.read(tmp_path / "out"))
    rate = grid.runs(RunFolders(tmp_path / "out"))[0].config.learning_rate
    assert note == f"Learning rates were not tuned, and are the grid's own: rope {rate:g}, none 0.5 (positions × 2)."


def test_runs_on_different_data_are_not_compared(tmp_path):
    """The same fields and the same folder of data, which somebody has made anew between two runs."""
    for name, second in (("same", "a"), ("other", "b")):
        grid = Grid.read(write_grid(tmp_path / "g.yaml", seeds=1))
        for run, data_hash in zip(grid.runs(RunFolders(tmp_path / name)), ("a", second)):
            finish(run, 3.0, data_hash=data_hash)
        grid.write(tmp_path / name)
    assert not Study.read(tmp_path / "same").missing
    with pytest.raises(ValueError, match="trained on different data"):
        Study.read(tmp_path / "other")


@pytest.mark.parametrize("path", sorted((REPO / "results").glob("*/grid.yaml")), ids=lambda path: path.parent.name)
def test_every_committed_table_is_what_the_committed_runs_give(path):
    study = Study.read(path.parent)
    assert report.markdown(study) in (path.parent / "README.md").read_text(), "run scripts/report.py on it"
    assert (path.parent / "table.tex").read_text() == report.latex_text(study)
