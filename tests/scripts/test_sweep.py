"""scripts/sweep.py, reproduce.py and report.py: whole sweeps of real processes on tiny models, and what they print."""

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import report as report_command
import reproduce
import scipy.stats
import yaml
from studies import ARMS, EVAL, FIELDS, SWEEPS, command, finish, prepared, report_row, write_grid

from nanope import REPO
from nanope.study import report
from nanope.study.files import RunFolders
from nanope.study.grid import Grid
from nanope.study.locks import held
from nanope.study.results import Study, collect
from nanope.study.status import state_of
from nanope.study.sweep import main

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("sweep_data"))


@pytest.fixture(scope="module")
def swept(data, tmp_path_factory):
    """A grid of two schemes, two seeds and an arm whose runs cannot be built: (grid file, its runs, exit code, stdout
    and stderr)."""
    folder = tmp_path_factory.mktemp("sweep")
    path = write_grid(folder / "tiny.yaml", data, arms=ARMS, eval=EVAL, question="Which?")
    words = [path, "--out", folder / "out", "--parallel", 2, "--threads", 1]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        with pytest.raises(SystemExit) as stopped:
            main("scripts/sweep.py", "", None, [*map(str, words)])
    return path, RunFolders(folder / "out"), (stopped.value.code, out.getvalue(), err.getvalue())


def copy_of(swept, tmp_path, **changes) -> RunFolders:
    """A copy of the swept runs with a grid of its own."""
    files = RunFolders(tmp_path / "copy")
    shutil.copytree(swept[1].folder, files.folder, symlinks=True)
    grid = Grid.read(swept[0], changes=changes)
    grid.command = "the same"
    grid.write(files.folder)
    return files


def sweep(*arguments, capsys, root=REPO, program="scripts/sweep.py", tables=None) -> tuple[int | str, str, str]:
    """(exit code or error, stdout, stderr) of a sweep in this process."""
    with pytest.raises(SystemExit) as stopped:
        main(program, "", tables, [*map(str, arguments)], root)
    return stopped.value.code, *capsys.readouterr()


# ---- whole sweeps


@slow
def test_a_failed_run_is_reported_and_stops_no_other(swept):
    path, files, (code, out, errors) = swept
    assert code == 1
    error = r"broken-seed1-\w+: training ended with exit code 1.*unknown option 'bas'; did you mean base"
    assert re.search(error, errors, re.S), errors
    assert "2 run(s) failed" in errors and "Traceback" not in errors
    runs = Grid.read(path).runs(files)
    assert [run.done() for run in runs] == [run.arm != "broken" for run in runs] and len(runs) == 6
    table = (files.folder / "table.md").read_text()
    assert "| broken | none is done |" in table and table in out and table.startswith("Which?")


@slow
def test_the_table_says_what_the_files_say(swept, tmp_path):
    study = Study.read(copy_of(swept, tmp_path, arms=["rope", "crope"]).folder)
    text, losses, rows = report.markdown(study), {}, {}
    for arm in ("rope", "crope"):
        runs = study.runs["", arm].values()
        lines = [(run.folder / "metrics.jsonl").read_text().splitlines()[-1] for run in runs]
        losses[arm] = np.mean([json.loads(line)["val/loss"] for line in lines])
        if arm == "rope":
            each = [json.loads(line)["val/loss"] for line in lines]
            low, high = scipy.stats.t.interval(0.95, 1, np.mean(each), scipy.stats.sem(each))
        far = [next(row for row in run.report("far")["results"] if row["length"] == 32) for run in runs]
        rows[arm] = np.mean([row["nats_per_token"] for row in far])
    assert f"{losses['rope']:.4f} [{low:.4f}, {high:.4f}]" in text
    assert f"{losses['crope'] - losses['rope']:+.4f} [" in text
    lines = [line for line in text.splitlines() if line.startswith("| crope | ") and f"{rows['crope']:.4f} [" in line]
    assert lines[0].count("[") == 2  # two lengths
    assert f"{rows['crope'] - rows['rope']:+.4f} [" in text
    for words in ("2 paired seeds", "were not tuned", "64 target bytes", "Made by `the same`"):
        assert words in text
    assert (swept[1].folder / "figure.png").read_bytes().startswith(b"\x89PNG")


@slow
def test_real_runs_are_collected_whole(swept, tmp_path, capsys):
    files, target = copy_of(swept, tmp_path, arms=["rope", "crope"]), tmp_path / "results"
    collect(Grid.of_folder(files.folder), files, target)
    before = report.markdown(Study.read(files.folder))
    read = [json.loads(line) for line in (target / "runs.jsonl").read_text().splitlines()]
    for line in read:
        folder = files.folder / line["run"]
        assert line["config"] == yaml.safe_load((folder / "config.yaml").read_text())
        assert line["metrics"] == [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        reports = {path.name: json.loads(path.read_text()) for path in (folder / "eval").glob("*.json")}
        assert line["eval"] == reports and len(reports) == 1
    shutil.rmtree(files.folder)
    assert report.markdown(Study.read(target)) == before

    capsys.readouterr()
    report_command.main(["--csv", "-", str(target)])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    reports = [there for line in read for there in line["eval"].values()]
    figures = [row["nats_per_token"] for there in reports for row in there["results"]]
    assert [float(row["nats_per_token"]) for row in rows] == figures and len(rows) == 8


@slow
def test_a_sweep_killed_at_random_ends_with_the_same_table(swept, tmp_path):
    """First the sweep alone is killed, and its run goes on: nothing is done twice. Then the sweep and its run."""
    files = RunFolders(tmp_path / "out")
    arguments = ["scripts/sweep.py", swept[0], "--out", files.folder, "--arms", "rope", "--seeds", 1]
    arguments = [*map(str, arguments), "--parallel", "1", "--threads", "1"]
    grid = Grid.read(swept[0], changes={"arms": ["rope"], "seeds": 1})
    (run,) = grid.runs(files)
    log = files.folder / "logs" / f"{run.name}.log"

    def kill(together: bool, wait: float):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, *arguments], cwd=REPO, start_new_session=True, **quiet)
        deadline = time.monotonic() + 60
        while not (log.is_file() and "$ " in log.read_text()) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGKILL) if together else process.kill()
        process.wait()

    wait = random.uniform(0, 4)
    print(f"killed {wait:.2f} s after the start of the run")  # shown where the test fails
    kill(False, wait)
    kill(True, wait / 2)
    last = command(*arguments)
    assert last.returncode == 0, last.stderr
    stages = re.findall(r"^\$ .*?(train|eval)\.py", log.read_text(), re.M)
    assert stages.count("train") <= 2 and stages.count("eval") <= 2  # once more at most, for the one killed itself
    expected = copy_of(swept, tmp_path, arms=["rope"], seeds=1)
    grid.command = "the same"
    grid.write(files.folder)
    assert report.markdown(Study.read(files.folder)) == report.markdown(Study.read(expected.folder))


@slow
def test_a_failed_measurement_of_speed_leaves_tables_and_errors(swept, data, tmp_path, capsys):
    files = copy_of(swept, tmp_path)
    path = write_grid(tmp_path / "tiny.yaml", data, arms=ARMS, eval=EVAL, throughput={"shape": "nowhere"})
    words = [path, "--out", files.folder, "--arms", "rope", "broken", "--seeds", 1, "--threads", 1]
    code, out, err = sweep(*words, capsys=capsys)
    assert code == 1 and "speed: scripts/bench.py ended with exit code 2" in err
    assert "unknown option 'bas'" in err and "| broken | none is done |" in out


@slow
def test_interrupted_it_passes_the_signal_on_and_says_so(data, tmp_path):
    fields, files = {**FIELDS, "data_dir": str(data), "max_steps": 100000}, RunFolders(tmp_path / "out")
    path = write_grid(tmp_path / "g.yaml", arms=["rope"], seeds=1, fields=fields)
    arguments = [sys.executable, "scripts/sweep.py", path, "--out", files.folder, "--threads", "1"]
    (run,) = Grid.read(path).runs(files)

    def stopped_after(step):
        process = subprocess.Popen(arguments, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while run.step() <= step and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75 and "the same command goes on" in errors and "Traceback" not in errors, errors
        assert held(run) is None and (run.folder / "last.pt").exists() and state_of(run) == "stopped"
        return run.step()

    assert stopped_after(stopped_after(0)) > 0


@slow
def test_from_a_text_to_the_table(tmp_path, capsys):
    """crope-2 --scale cpu with a corpus, width and steps of its own: the data are prepared, runs trained and evaluated,
    the table printed."""
    words = "and the of light darkness water earth heaven day night was it so good".split()
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(np.random.default_rng(i).choice(words, 100)))
    content = yaml.safe_load((SWEEPS / "crope-2.yaml").read_text())
    content |= {"base": str(REPO / "configs" / "crope_paper.yaml"), "eval": {}}
    setting = "2 × 512, width 128, γ 0.9 each 1,000"
    content["scales"]["cpu"]["settings"] = {setting: {"block_size": 16, "batch_tokens": 32, "micro_batch_size": 2}}
    content["scales"]["cpu"]["data"] = {"corpus": "files", "tokenizer": "byte"}
    (tmp_path / "configs" / "sweeps").mkdir(parents=True)
    (tmp_path / "configs" / "sweeps" / "crope-2.yaml").write_text(yaml.safe_dump(content))

    def reproduced(*words):
        return sweep("crope-2", *words, capsys=capsys, root=tmp_path, **DOOR)

    small = ["max_steps=3", "eval_interval=1", "eval_tokens=64", "n_layer=1", "n_head=2", "n_embd=8"]
    where = ["--source", tmp_path / "texts", "--out", tmp_path / "out", "--threads", "1"]
    asked = ["--arms", "rope", "crope", "--seeds", "1"]
    code, out, err = reproduced("--scale", "cpu", *where, *asked, "--set", *small)
    assert code == 0, err
    assert out.startswith("Reduced: one row") and (tmp_path / "data" / "files-byte" / "manifest.json").is_file()
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"| {setting} | crope | 6.584 ± 0.106 |" in table and "one seed" in table
    assert "python scripts/reproduce.py crope-2 --scale cpu --arms rope crope --seeds 1" in table
    assert str(tmp_path) not in table  # where it was made is nobody's business
    assert reproduced("--from", tmp_path / "out")[1].strip() == table.strip()


# ---- without training


DOOR = {"program": "scripts/reproduce.py", "tables": reproduce.TABLES}


@pytest.fixture
def finished(tmp_path):
    """A grid whose runs are there, of rope and crope with two seeds: (grid file, its runs)."""
    path, files = write_grid(tmp_path / "g.yaml", eval=EVAL), RunFolders(tmp_path / "out")
    for run in Grid.read(path).runs(files):
        finish(run, 2.0 + 0.1 * run.seed, [report_row([10 + run.seed, 20], n) for n in (16, 32)])
    return path, files


def test_what_is_done_is_kept(finished, capsys):
    path, files = finished
    code, out, err = sweep(path, "--out", files.folder, capsys=capsys)
    assert code == 0 and "4 runs in" in out and "4 done already" in out, err
    assert not [*files.folder.glob("logs/*.log")]  # nothing was started
    assert (files.folder / "table.md").read_text() in out and "Written: " in out
    assert f"Made by `python scripts/sweep.py {path}`" in out


@pytest.mark.slow
def test_a_sweep_is_collected_and_its_results_take_no_runs(finished, tmp_path, capsys):
    path, files = finished
    target = tmp_path / "results"
    assert sweep(path, "--out", files.folder, "--collect", target, capsys=capsys)[0] == 0
    names = {"README.md", "figure.png", "grid.yaml", "runs.jsonl", "table.tex"}
    assert {item.name for item in target.iterdir()} >= names and not [*target.glob("*/")]
    code, _, err = sweep(path, "--out", target, capsys=capsys)
    assert "holds results, runs.jsonl" in code


@pytest.mark.parametrize("words,error", [
    (["scheme"], "no grid 'scheme'; did you mean schemes"),
    (["nowhere.yaml"], "No such file"),
    (["schemes", "--only", "rope-seed1-00000000"], "no run 'rope-seed1-00000000'"),
    (["schemes", "--known", "nowhere"], "--known nowhere holds no runs.jsonl"),
    (["schemes", "--plan", "--known", "results/schemes"], "leave --known out"),
    (["schemes", "--arms", "rop"], "arms has no 'rop'; did you mean rope"),
    (["schemes", "--corpus", "novel"], "unknown corpus 'novel'"),
    (["schemes", "--set", "max_steps"], "--set takes FIELD=VALUE, not 'max_steps'"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(words, error, tmp_path, capsys):
    code, out, _ = sweep(*words, "--out", tmp_path / "out", capsys=capsys)
    assert code.startswith("error: ") and error in code and not out and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_reproduce_takes_the_papers_tables_alone(capsys):
    assert all(
        (SWEEPS / f"{name}.yaml").is_file() and Grid.read(SWEEPS / f"{name}.yaml", "cpu") for name in DOOR["tables"]
    )
    code, _, err = sweep("crope-3", capsys=capsys, **DOOR)
    assert code == 2 and "no table 'crope-3'; did you mean crope-" in err
    code, out, _ = sweep("crope-2", "--scale", "cpu", "--plan", "--tokens_per_s", 1, capsys=capsys, **DOOR)
    assert code == 0 and out.startswith("Reduced: one row") and "18 runs, 0 done" in out


@pytest.mark.parametrize("words,arms", [
    ([], ["learned", "rope", "crope", "comrope", "carope"]), (["--schemes", "alibi", "none"], ["alibi", "none"]),
])  # fmt: skip
def test_the_quickstart_is_a_sweep_of_the_schemes_asked_for(words, arms, capsys, tmp_path):
    code, out, _ = sweep(
        "quickstart", "--plan", "--seeds", 2, "--tokens_per_s", 5600, "--out", tmp_path, *words, capsys=capsys
    )
    names = [line.split()[1].rpartition("-")[0] for line in out.splitlines() if "-seed" in line]
    assert code == 0 and names == [f"{arm}-seed{seed}" for seed in (1, 2) for arm in arms]


def test_make_quickstart_is_that_sweep():
    made = subprocess.run(["make", "-n", "quickstart", "ARGS=--seeds 3"], cwd=REPO, capture_output=True, text=True)
    assert re.search(r"bin/python scripts/sweep\.py quickstart --seeds 3$", made.stdout, re.M), made.stderr


def test_reports_as_csv(finished, tmp_path, capsys):
    path, files = finished
    for run in files.names():
        for file in (files.folder / run / "eval").glob("*.json"):
            about = {
                "pos": run[: run.index("-")],
                "config": files.config(run),
                "data_hash": "a",
                "run": run,
                "step": 30,
            }
            file.write_text(json.dumps(json.loads(file.read_text()) | about))
    reports = sorted(files.folder.glob("*/eval/*.json"))
    report_command.main(["--csv", str(tmp_path / "all.csv"), *map(str, reports)])
    lines = list(csv.DictReader(open(tmp_path / "all.csv")))
    assert len(lines) == 8 and {line["pos"] for line in lines} == {"rope", "crope"}
    first = json.loads(reports[0].read_text())["results"][0]
    assert float(lines[0]["nats_per_token"]) == first["nats_per_token"] and lines[0]["report"] == str(reports[0])
    assert "config.n_embd" not in lines[0] and "config.pos" in lines[0]  # what all runs share is left out

    collect(Grid.read(path), files, tmp_path / "results")
    capsys.readouterr()
    report_command.main(["--csv", "-", str(tmp_path / "results")])
    shown = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    for line in (*lines, *shown):
        line.pop("report")
    assert sorted(map(str, shown)) == sorted(map(str, lines))


@pytest.mark.parametrize("arguments,error", [
    (["--csv", "-", "README.md"], "error: README.md is no report of eval.py"),
    (["--csv", "-", "nowhere"], "No such file"),
    (["configs"], "error: configs holds no grid.yaml"),
])  # fmt: skip
def test_what_is_no_report_is_said_in_a_line(arguments, error, monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(SystemExit, match=error):
        report_command.main(arguments)


def test_tables_are_of_one_folder(capsys):
    with pytest.raises(SystemExit):
        report_command.main(["results/schemes", "results/crope-2"])
    assert "tables are of one folder" in capsys.readouterr().err


@pytest.mark.parametrize("script,successor", [
    ("gather", "`python scripts/report.py --csv OUT.csv REPORT …`"),
    ("quickstart", "`make quickstart`, or `python scripts/sweep.py quickstart`"),
])  # fmt: skip
def test_scripts_that_are_gone_name_what_took_their_place(script, successor):
    said = command(f"scripts/{script}.py", "runs")
    assert said.returncode == 1 and successor in said.stderr and said.stderr.count("\n") == 1 and not said.stdout
