"""scripts/sweep.py and what it stands on: grids, runs, statistics, tables. Real processes on tiny models where they matter."""

import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import grid as grid_module
import numpy as np
import pytest
import report
import scipy.stats
import sweep
import yaml
from grid import Grid
from report import (
    Study,
    Table,
    difference_cell,
    difference_of_losses,
    difference_of_rows,
    latex,
    seed_interval,
    verdict,
)

from data.prepare import prepare
from nanope import REPO

FIELDS = {
    "block_size": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "batch_tokens": 64,
    "max_steps": 30,
    "warmup_steps": 3,
    "eval_interval": 10,
    "eval_tokens": 64,
}
FIELDS |= {"checkpoint_interval": 5, "log_interval": 3, "learning_rate": 2e-3, "min_lr": 2e-4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep_data") / "texts"
    folder.mkdir()
    words = "and the of light darkness water earth heaven day night was it so good".split()
    for i in range(10):
        (folder / f"{i}.txt").write_text(" ".join(np.random.default_rng(i).choice(words, 80 + 20 * i)))
    return prepare("files", folder.parent / "data", source=folder, tokenizer_name="byte", val_tokens=2500).folder


def write_grid(path: Path, data="data/nowhere", **keys) -> Path:
    content = {"fields": {**FIELDS, "data_dir": str(data)}, "arms": ["rope", "crope"], "seeds": 2, **keys}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=REPO, capture_output=True, text=True, timeout=300, **options
    )


ARMS = {"rope": {"pos": "rope"}, "crope": {"pos": "crope"}, "broken": {"pos": "rope", "pos_options": {"bas": 1.0}}}
EVAL = {"far": {"lengths": ["1x", "2x"], "max_targets": 64, "resamples": 1000}}


@pytest.fixture(scope="module")
def swept(data, tmp_path_factory):
    """A grid of two schemes, two seeds and an arm whose runs cannot be built: (grid file, folder, what the command printed)."""
    folder = tmp_path_factory.mktemp("sweep")
    path = write_grid(folder / "tiny.yaml", data, arms=ARMS, eval=EVAL, question="Which?")
    return (
        path,
        folder / "out",
        command("scripts/sweep.py", path, "--out", folder / "out", "--parallel", 2, "--threads", 1),
    )


def folder_of(tmp_path, swept, **changes) -> Path:
    """A copy of the swept runs with a grid of its own."""
    out = tmp_path / "copy"
    shutil.copytree(swept[1], out, symlinks=True)
    grid = Grid.read(swept[0], changes=changes)
    grid.content["command"] = "the same"
    sweep.write_grid(grid, out)
    return out


# ---- whole sweeps


def test_a_failed_run_is_reported_and_stops_no_other(swept):
    path, out, printed = swept
    assert printed.returncode == 1
    assert re.search(
        r"broken-seed1-\w+: training ended with exit code 1.*unknown option 'bas'; did you mean base",
        printed.stderr,
        re.S,
    ), printed.stderr
    assert "2 run(s) failed" in printed.stderr and "Traceback" not in printed.stderr
    runs = Grid.read(path).runs(out)
    assert [r.done() for r in runs] == [r.arm != "broken" for r in runs] and len(runs) == 6
    table = (out / "table.md").read_text()
    assert "| broken | none is done |" in table and table in printed.stdout and table.startswith("Which?")


def test_the_table_says_what_the_files_say(swept, tmp_path):
    out = folder_of(tmp_path, swept, arms=["rope", "crope"])
    study = Study.read(out)
    text = report.markdown(study)
    last = {
        arm: [run.folder.joinpath("metrics.jsonl").read_text().splitlines()[-1] for run in study.runs["", arm].values()]
        for arm in ("rope", "crope")
    }
    losses = {arm: [json.loads(line)["val/loss"] for line in lines] for arm, lines in last.items()}
    low, high = scipy.stats.t.interval(0.95, 1, np.mean(losses["rope"]), scipy.stats.sem(losses["rope"]))
    assert f"{np.mean(losses['rope']):.4f} [{low:.4f}, {high:.4f}]" in text
    assert f"{np.mean(losses['crope']) - np.mean(losses['rope']):+.4f} [" in text
    rows = {
        arm: [
            next(r for r in run.report("far")["results"] if r["length"] == 32)["nats_per_token"]
            for run in study.runs["", arm].values()
        ]
        for arm in losses
    }
    line = next(
        line
        for line in text.splitlines()
        if line.startswith("| crope | ") and f"{np.mean(rows['crope']):.4f} [" in line
    )
    assert line.count("[") == 2  # two lengths
    assert f"{np.mean(rows['crope']) - np.mean(rows['rope']):+.4f} [" in text
    assert (
        "2 paired seeds" in text
        and "were not tuned" in text
        and "64 target bytes" in text
        and "Made by `the same`" in text
    )
    assert (swept[1] / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_collected_files_alone_give_the_same_tables_and_figure(swept, tmp_path):
    out, target = folder_of(tmp_path, swept, arms=["rope", "crope"]), tmp_path / "results"
    sweep.collect(Grid.of_folder(out), out, target)
    assert not list(target.rglob("*.pt*")) and len(list(target.rglob("*.json"))) == 4
    before = report.markdown(Study.read(out))
    shutil.rmtree(out)
    assert report.write(target) == before
    readme = (target / "README.md").read_text()
    assert before in readme and (target / "figure.png").is_file() and (target / "table.tex").is_file()
    (target / "README.md").write_text(readme + "By hand.\n")
    report.write(target)  # the answer stays, and the tables are there once
    assert (target / "README.md").read_text() == readme + "By hand.\n"


def test_collect_names_folders_that_the_grid_no_longer_has(swept, tmp_path, capsys):
    out, target = folder_of(tmp_path, swept, arms=["rope", "crope"]), tmp_path / "results"
    sweep.collect(Grid.of_folder(out), out, target)
    assert capsys.readouterr().err == ""
    fewer = Grid.read(swept[0], changes={"arms": ["rope"]})
    sweep.collect(fewer, out, target)
    said, left = capsys.readouterr().err, {p.name for p in target.glob("crope-*")}
    assert (
        len(left) == 2 and all(name in said for name in left) and not any(run.name in said for run in fewer.runs(out))
    )


def test_collect_refuses_what_is_not_done(swept, tmp_path):
    with pytest.raises(ValueError, match="2 runs .* are not done"):
        sweep.collect(Grid.read(swept[0]), swept[1], tmp_path / "results")


def test_what_is_done_is_kept_and_a_changed_field_is_another_run(swept, tmp_path, monkeypatch, capsys):
    out = folder_of(tmp_path, swept)
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda *a, **k: pytest.fail("nothing was left to do"))
    arguments = sweep.parser_of("sweep", "").parse_args(
        ["--out", str(out), "--arms", "rope", "crope", "--parallel", "1"]
    )
    assert sweep.run(swept[0], arguments, ["scripts/sweep.py"]) == 0
    assert "4 done already" in capsys.readouterr().out
    names = {r.name for r in Grid.read(swept[0]).runs(out)}
    for field, value in {"learning_rate": 1e-3, "max_steps": 31, "weight_decay": 0.2}.items():
        other = {r.name for r in Grid.read(swept[0], changes={"fields": {field: value}}).runs(out)}
        assert len(other) == len(names) and not other & names
    for field, value in {
        "dropout": 0.0,
        "device": "cpu",
        "wandb": "offline",
    }.items():  # a default written out; where it runs
        assert {r.name for r in Grid.read(swept[0], changes={"fields": {field: value}}).runs(out)} == names
    evaluated = Grid.read(swept[0], changes={"eval": {"far": {**EVAL["far"], "max_targets": 32}}}).runs(out)
    assert {r.name for r in evaluated} == names and all(r.missing_reports() == ["far"] for r in evaluated)


def test_a_sweep_killed_at_random_ends_with_the_same_table(swept, data, tmp_path):
    """First the sweep alone is killed, and its run goes on: nothing is done twice. Then the sweep and its run together."""
    arguments = [
        "scripts/sweep.py",
        swept[0],
        "--out",
        tmp_path / "out",
        "--arms",
        "rope",
        "--seeds",
        1,
        "--parallel",
        1,
        "--threads",
        1,
    ]
    grid = Grid.read(swept[0], changes={"arms": ["rope"], "seeds": 1})
    (run,) = grid.runs(tmp_path / "out")

    def kill(together: bool, wait: float):
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=REPO,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        log = tmp_path / "out" / "logs" / f"{run.name}.log"
        deadline = time.monotonic() + 60
        while (
            not (log.is_file() and log.read_text().count("$ "))
            and process.poll() is None
            and time.monotonic() < deadline
        ):
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
    stages = re.findall(r"^\$ .*?(train|eval)\.py", (tmp_path / "out" / "logs" / f"{run.name}.log").read_text(), re.M)
    assert (
        stages.count("train") <= 2 and stages.count("eval") <= 2
    )  # once more at most, for the one that was killed itself
    expected = folder_of(tmp_path, swept, arms=["rope"], seeds=1)
    grid.content["command"] = "the same"
    sweep.write_grid(grid, tmp_path / "out")
    assert report.markdown(Study.read(tmp_path / "out")) == report.markdown(Study.read(expected))


def test_a_run_of_another_process_is_waited_for(data, tmp_path):
    """Its lock is held by the training process itself, so it stays when the sweep is gone."""
    run = Grid.read(write_grid(tmp_path / "g.yaml", data)).runs(tmp_path / "out")[0]
    assert sweep.held(run) is None
    lock = sweep.take(run, 0)
    child = subprocess.Popen(["sleep", "30"], pass_fds=[lock.fileno()])
    lock.close()
    assert (
        sweep.held(run).split()[1:] == ["0", str(os.getpid())]
        and sweep.take(run, 1) is None
        and sweep.state_of(run) == "training"
    )
    child.kill(), child.wait()
    assert sweep.held(run) is None and sweep.state_of(run) == "waiting"


def test_data_and_speeds_that_a_killed_sweep_left_in_the_making_are_waited_for(tmp_path, monkeypatch):
    """A process that outlived its sweep holds the lock and then makes the file: nothing is made twice."""
    grid = Grid.read(
        write_grid(
            tmp_path / "g.yaml", fields=FIELDS, data={"corpus": "files", "tokenizer": "byte"}, throughput={"rounds": 1}
        )
    )
    monkeypatch.setattr(sweep, "local", lambda path: str(tmp_path / path))
    run, made = subprocess.run, []

    def left(path, target):
        path.parent.mkdir(parents=True, exist_ok=True), target.parent.mkdir(parents=True, exist_ok=True)
        with sweep.alone(path, "") as lock:
            subprocess.Popen(["bash", "-c", f"sleep 1; echo 1 > {target}"], pass_fds=[lock.fileno()])

    monkeypatch.setattr(sweep.subprocess, "run", lambda command, **more: made.append(command) or run(["true"], **more))
    left(tmp_path / "data" / "files-byte.lock", tmp_path / "data" / "files-byte" / "manifest.json")
    sweep.prepare(grid, None)
    left(tmp_path / "out" / "logs" / "speed.lock", report.throughput_path(grid, tmp_path / "out"))
    assert sweep.measure_throughput(grid, tmp_path / "out") is None and not made


def test_a_failed_measurement_of_speed_leaves_tables_and_errors(swept, tmp_path, monkeypatch, capsys):
    out = folder_of(tmp_path, swept)
    path = write_grid(
        tmp_path / "tiny.yaml",
        yaml.safe_load(swept[0].read_text())["fields"]["data_dir"],
        arms=ARMS,
        eval=EVAL,
        throughput={"shape": "nowhere"},
    )
    arguments = sweep.parser_of("sweep", "").parse_args(
        ["--out", str(out), "--arms", "rope", "broken", "--seeds", "1", "--threads", "1"]
    )
    assert sweep.run(path, arguments, ["scripts/sweep.py"]) == 1
    printed = capsys.readouterr()
    assert (
        "speed: scripts/bench.py ended with exit code 2" in printed.err
        and "unknown option 'bas'" in printed.err
        and "| broken | none is done |" in printed.out
    )


def test_interrupted_it_passes_the_signal_on_and_says_so(data, tmp_path):
    path = write_grid(
        tmp_path / "g.yaml", data, arms=["rope"], seeds=1, fields={**FIELDS, "data_dir": str(data), "max_steps": 100000}
    )
    arguments = [sys.executable, "scripts/sweep.py", path, "--out", tmp_path / "out", "--threads", "1"]
    process = subprocess.Popen(arguments, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    (run,) = Grid.read(path).runs(tmp_path / "out")
    deadline = time.monotonic() + 60
    while sweep.step_of(run) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command goes on" in errors and "Traceback" not in errors
    assert sweep.held(run) is None and run.folder.joinpath("last.pt").exists() and sweep.state_of(run) == "stopped"


# ---- grids


def test_runs_are_paired_and_named_by_what_they_are(tmp_path):
    arms = {"rope": {"pos": "rope"}, "rope, base 5e5": {"pos": "rope", "pos_options": {"base": 5e5}}}
    path = write_grid(
        tmp_path / "g.yaml",
        settings={"short": {}, "long": {"block_size": 32}},
        grid={"weight_decay": [0, "1e-1"]},
        arms=arms,
        eval=EVAL,
    )
    runs = Grid.read(path).runs(tmp_path)
    assert len(runs) == len({r.name for r in runs}) == 2 * 2 * 2 * 2
    assert all(r.fields["seed"] == r.fields["data_seed"] == r.seed for r in runs)
    assert {r.setting for r in runs} == {f"{s}, weight_decay {w}" for s in ("short", "long") for w in ("0", "1e-1")}
    assert {(r.fields["block_size"], tuple(r.reports["far"]["lengths"])) for r in runs} == {
        (16, (16, 32)),
        (32, (32, 64)),
    }
    assert {r.fields["weight_decay"] for r in runs} == {0.0, 0.1}  # 1e-1 is a text in YAML
    assert re.fullmatch(r"short-weight-decay-0-rope-base-5e5-seed1-[0-9a-f]{8}", runs[1].name)
    assert {r.seed for r in runs[:8]} == {1}  # seed by seed


@pytest.mark.parametrize("keys,words", [
    ({"arm": ["rope"]}, "unknown key 'arm'; did you mean arms"),
    ({"arms": ["crop"]}, "no scheme 'crop'; did you mean crope"),
    ({"fields": {"learning_rte": 1.0}}, "learning_rte: no field of train.py; did you mean learning_rate"),
    ({"fields": {"seed": 1}}, "seed: a grid sets it itself"),
    ({"fields": {"learning_rate": -1.0}}, "rope: learning_rate must be positive"),
    ({"fields": {"learning_rate": "fast"}}, "could not convert .*fast"),
    ({"arms": ["rope"], "baseline": "rpe"}, "baseline 'rpe' is no arm; did you mean rope"),
    ({"seeds": [1, 1]}, "seeds must be .* different"),
    ({"tune": {"rates": [1]}}, "tune takes learning_rate"),
    ({"eval": {"far": {"protocol": "sliding"}}}, "'far' of eval lacks lengths"),
    ({"figure": "bits"}, "figure must be nats or perplexity"),
    ({"arms": {"rope a": {}, "rope, a": {}}}, "differ in punctuation only"),
    ({"settings": {"a": {"data": {"corpus": "novel"}}}}, "unknown corpus 'novel'; did you mean 'novels'"),
    ({"settings": {"a": {"data": {"tokenizer": "byte"}}}}, "unknown corpus None"),
])  # fmt: skip
def test_grids_that_are_wrong_say_where(tmp_path, keys, words):
    with pytest.raises(ValueError, match=words):
        Grid.read(write_grid(tmp_path / "g.yaml", **keys))


def test_scales_and_selections(tmp_path):
    path = write_grid(
        tmp_path / "g.yaml", scales={"cpu": {"fields": {"max_steps": 7}, "arms": ["crope"], "reduced": "fewer"}}
    )
    grid = Grid.read(path, "cpu")
    assert (
        list(grid.arms) == [grid.baseline] == ["crope"]
        and grid.fields["max_steps"] == 7
        and grid.fields["n_layer"] == 2
    )
    assert list(Grid.read(path, changes={"arms": ["alibi", "rope"]}).arms) == ["alibi", "rope"]
    with pytest.raises(ValueError, match="no scale 'gpu'.*cpu"):
        Grid.read(path, "gpu")
    with pytest.raises(ValueError, match="settings has no 'x'"):
        Grid.read(path, changes={"settings": ["x"]})


# ---- the plan


def planned(grid, out, *words):
    arguments = sweep.parser_of("sweep", "").parse_args(["--plan", *words])
    sweep.complete(arguments, grid)
    return sweep.plan(grid, out, arguments)


def test_plan_by_hand(tmp_path, data):
    """rope: vocabulary 320 × 32, 2 layers of 12·32² and norms; FLOPs a token 6N + 12·L·C·T; 30 steps of 64 tokens, validated on
    64 tokens at 0, 10, 20 and 30, forward alone: a third of the FLOPs."""
    grid = Grid.read(write_grid(tmp_path / "g.yaml", data, seeds=3))
    parameters = 320 * 32 + 2 * 12 * 32**2 + 5 * 32
    flops = (6 * (320 * 32 + 2 * 12 * 32**2) + 12 * 2 * 32 * 16) * 30 * 64
    text = planned(grid, tmp_path / "out", "--tokens_per_s", "0.1", "--parallel", "2", "--price_per_hour", "1.5")
    hours = (30 * 64 + 4 * 64 / 3) / 0.1 / 3600  # 5.57 a run
    assert text.count(f"| waiting | {parameters:,} | 1,920 | {flops:.3g} | {hours:.2f} |") == 3  # and three of crope
    assert (
        f"{6 * hours:.2f} run-hours" in text
        and f"{3 * hours:.2f} hours with 2 at a time" in text
        and f"Cost: {6 * hours * 1.5:,.2f}" in text
    )
    assert not (tmp_path / "out").exists()
    odd = planned(grid, tmp_path / "out", "--tokens_per_s", "0.1", "--parallel", "4")  # six runs by four: two rounds
    assert f"{2 * hours:.2f} hours with 4 at a time" in odd
    broken = planned(Grid.read(write_grid(tmp_path / "b.yaml", data, arms=ARMS, seeds=1)), tmp_path / "out")
    assert "cannot run: pos_options: unknown option 'bas'" in broken and "1 cannot run" in broken


def test_plan_for_a_gpu_that_is_elsewhere(tmp_path):
    """carope-1's Small rope on 8 H100 at an MFU of 0.4; a step so small that launching its kernels takes longer; and what does not divide."""
    grid = Grid.read(
        REPO / "configs/sweeps/carope-1.yaml", changes={"arms": ["rope"], "settings": ["Small"], "seeds": 1}
    )
    text = planned(grid, tmp_path, "--gpu", "h100", "--ranks", "8", "--price_per_hour", "2")
    tokens = 19000 * 524288
    flops = (6 * (50304 * 768 + 12 * 12 * 768**2) + 12 * 12 * 768 * 512) * tokens
    hours = flops * (1 + 39 * 2097152 / 3 / tokens) / (8 * 0.4 * 989e12) / 3600
    assert (
        f"| {tokens:,} | {flops:.3g} | {hours:.2f} |" in text
        and f"Cost: {hours * 8 * 2:,.2f} at 2.00 an hour for each of 8" in text
    )
    assert f"{hours:.2f} hours with 1 at a time" in text and "8 H100 a run at 40% of 989 TFLOP/s" in text
    small = Grid.read(
        REPO / "configs/sweeps/crope-2.yaml",
        changes={"arms": ["rope"], "settings": ["2 × 512, width 64, γ 0.9 each 1,000"], "seeds": 1},
    )
    validated = 1 + 21 * 1048576 / 3 / 10_240_000
    assert f"| {10_000 * 4 * sweep.LAUNCH * validated / 3600:.2f} |" in planned(small, tmp_path, "--gpu", "H100")
    assert "cannot run: batch_tokens 1024 is 2 windows of 512, which do not divide over 8 ranks" in planned(
        small, tmp_path, "--gpu", "H100", "--ranks", "8"
    )
    speed = Grid.read(REPO / "configs/sweeps/carope-throughput.yaml")
    assert f"| speed, scripts/bench.py | waiting | | {3 * 16 * 10 * 32 * 512:,} |" in planned(
        speed, tmp_path, "--gpu", "H100"
    )
    with pytest.raises(ValueError, match="--gpu is for --plan"):
        arguments_of("--gpu", "H100")


def test_plan_takes_the_measured_speed_and_what_is_left(swept, monkeypatch):
    """A run at step 10 of 30 has two thirds to go, at the speed of its shape's other runs."""
    grid = Grid.read(swept[0], changes={"arms": ["rope"]})
    monkeypatch.setattr(
        grid_module.Run,
        "metrics",
        lambda run: [{"step": s, "tokens_per_s": 8.0} for s in (2, 10)] if run.seed == 1 else [],
    )
    monkeypatch.setattr(
        sweep,
        "cost",
        lambda run, ranks, real=sweep.cost: dataclasses.replace(real(run, ranks), tokens=1_920_000, validation=0.5),
    )
    hours = [
        float(line.split("|")[-2])
        for line in planned(grid, swept[1], "--parallel", "1").splitlines()
        if line.startswith("| rope")
    ]
    assert hours == [round(2 / 3 * 2_880_000 / 8 / 3600, 2), round(2_880_000 / 8 / 3600, 2)]


# ---- tuning


def fake(run, loss, steps=None, **environment):
    """The files of a finished run."""
    run.folder.mkdir(parents=True)
    lines = [
        {"step": 0, "environment": {"host": "x", **environment}},
        {"step": 0, "tokens": 0, "val/loss": 6.0},
        {"step": 3, "tokens": 192, "train/loss": 5.0, "tokens_per_s": 9.0},
    ]
    lines.append({"step": steps or run.max_steps, "tokens": 1, "val/loss": loss})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "config.yaml").write_text(yaml.safe_dump({**run.fields, "vocab_size": 320}))


def test_tuning_gives_every_arm_the_same_budget_and_takes_the_best_on_validation(tmp_path):
    tune = {"learning_rate": ["5e-4", 1e-3, 2e-3], "seeds": [7, 8], "fields": {"max_steps": 12}}
    grid = Grid.read(write_grid(tmp_path / "g.yaml", tune=tune))
    trials = grid.runs(tmp_path)
    budget = {arm: sorted((t.tuning, t.seed, t.max_steps) for t in trials if t.arm == arm) for arm in grid.arms}
    assert budget["rope"] == budget["crope"] == sorted(itertools.product((5e-4, 1e-3, 2e-3), (7, 8), (12,)))
    assert all(
        t.fields["learning_rate"] == t.tuning and math.isclose(t.fields["min_lr"], t.tuning / 10) for t in trials
    )  # as in the grid: 2e-3 to 2e-4
    best = {"rope": 1e-3, "crope": 5e-4}
    losses = lambda t: None if t.tuning == 2e-3 and t.seed == 8 else 3.0 - (t.tuning == best[t.arm]) + 0.1 * t.seed  # noqa: E731 - one diverged
    for trial in trials:
        if not (trial.arm == "crope" and trial.seed == 8 and trial.tuning == 1e-3):
            fake(trial, losses(trial))
    runs = grid.runs(tmp_path)
    assert (
        grid.best_rate(tmp_path, "", "rope") == 1e-3 and grid.best_rate(tmp_path, "", "crope") is None
    )  # one trial is missing
    assert {(r.arm, r.fields["learning_rate"]) for r in runs if r.tuning is None} == {("rope", 1e-3)}
    sweep.write_sbatch(tmp_path / "a.sbatch", grid, tmp_path, arguments_of("--slurm", "x"), ["made"], ["run"])
    assert "for the 2 main runs" in (tmp_path / "a.sbatch").read_text()
    fake(next(t for t in trials if not t.folder.exists()), 3.0)
    main = [r for r in grid.runs(tmp_path) if r.tuning is None]
    assert {(r.arm, r.fields["learning_rate"], r.seed) for r in main} == {
        (arm, rate, seed) for arm, rate in best.items() for seed in (1, 2)
    }
    for run in main:
        fake(run, 2.0)
    sweep.write_grid(grid, tmp_path)
    text = report.markdown(Study.read(tmp_path))
    assert "tuned for each arm with the same budget: 0.0005, 0.001, 0.002 with seed(s) 7, 8, max_steps 12" in text
    assert (
        "At the end of the range, so perhaps not the best: crope." in text
        and "| rope | 34,976 | 2 | 0.001 |" in text
        and "host x" in text
    )


def diverge(run, n=10, gap=0):
    """The files of a run whose last n steps were not finite."""
    run.folder.mkdir(parents=True)
    steps = [5 + i + (gap if i > 4 else 0) for i in range(n)]
    lines = [
        {"step": 0, "environment": {"host": "x"}},
        {"step": 0, "val/loss": 6.0},
        *({"step": s, "skipped": 1, "train/loss": None} for s in steps),
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "config.yaml").write_text(yaml.safe_dump({**run.fields, "vocab_size": 320}))


def test_a_learning_rate_that_diverges_is_out_and_holds_nothing_up(tmp_path):
    grid = Grid.read(write_grid(tmp_path / "g.yaml", arms=["rope"], tune={"learning_rate": [1e-3, 1.0]}))
    low, high = grid.runs(tmp_path)
    fake(low, 3.0)
    diverge(high, 9)
    assert not high.done() and grid.best_rate(tmp_path, "", "rope") is None  # may still go on
    shutil.rmtree(high.folder)
    diverge(high, 10, gap=1)  # a good step, not logged, between them
    assert not high.done()
    shutil.rmtree(high.folder)
    diverge(high)
    assert high.done() and sweep.state_of(high) == "diverged" and grid.best_rate(tmp_path, "", "rope") == 1e-3
    with pytest.raises(ValueError, match="tune: fields: max_step is no field .*did you mean max_steps"):
        Grid.read(write_grid(tmp_path / "b.yaml", tune={"learning_rate": [1e-3], "fields": {"max_step": 3}}))


def test_a_diverged_run_is_collected_and_named_in_the_table(tmp_path):
    grid = Grid.read(write_grid(tmp_path / "g.yaml", eval={}))
    grid.content["command"] = "c"
    out, target = tmp_path / "out", tmp_path / "results"
    for run in grid.runs(out):
        diverge(run) if (run.arm, run.seed) == ("crope", 2) else fake(run, 3.0 + (run.arm == "crope"))
    for run in grid.runs(out):
        (run.folder / "checkpoints").mkdir()
        (run.folder / "checkpoints" / f"step_{run.max_steps}.pt").touch()
    assert [sweep.state_of(r) for r in grid.runs(out)] == ["done", "done", "done", "diverged"]
    sweep.collect(grid, out, target)
    text = report.markdown(Study.read(target))
    assert "diverged: crope, seed 2 (diverged). Means are over" in text and re.search(
        r"^\| crope \| [\d,]+ \| 1 \|.*\| 4.0000 \| \+1.0000 \|$", text, re.M
    )


def test_runs_on_different_data_are_not_compared(tmp_path):
    """The same fields and the same folder of data, which somebody has made anew between two runs."""
    for name, second in (("same", "a"), ("other", "b")):
        grid = Grid.read(write_grid(tmp_path / "g.yaml", seeds=1))
        for run, data_hash in zip(grid.runs(tmp_path / name), ("a", second)):
            fake(run, 3.0, data_hash=data_hash)
        sweep.write_grid(grid, tmp_path / name)
    assert not Study.read(tmp_path / "same").missing
    with pytest.raises(ValueError, match="trained on different data"):
        Study.read(tmp_path / "other")


def arguments_of(*words):
    arguments = sweep.parser_of("sweep", "").parse_args([*words])
    sweep.complete(arguments, Grid({"seeds": [1], "settings": {"": {}}}))
    return arguments


# ---- SLURM and GPUs


def test_the_slurm_array_starts_each_run_once_and_requeues(swept, tmp_path):
    grid, script = Grid.read(swept[0]), tmp_path / "a.sbatch"
    command = ["scripts/sweep.py", "a grid.yaml", "--ranks", "4"]
    said = sweep.write_sbatch(
        script, grid, tmp_path / "out", arguments_of("--slurm", "x", "--ranks", "4"), ["python", "made"], command
    )
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0 and "array of 6 runs" in said
    assert (
        "#SBATCH --array=0-5" in text and "#SBATCH --gpus-per-node=4" in text and "#SBATCH --cpus-per-task=16" in text
    )
    stub = tmp_path / "python"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nexit $CODE\n')
    requeue = tmp_path / "scontrol"
    requeue.write_text('#!/bin/bash\necho "scontrol $*"\n')
    stub.chmod(0o755), requeue.chmod(0o755)
    started = []
    for index, code in itertools.product(range(6), (0, 75)):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SRUN": "", "PYTHON": str(stub), "CODE": str(code)}
        environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": "9"}
        done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        assert done.returncode == code and lines[:5] == ["scripts/sweep.py", "a grid.yaml", "--ranks", "4", "--only"]
        assert lines[6:] == ([f"scontrol requeue 9_{index}"] if code else [])
        started.append(lines[5])
    assert started[::2] == started[1::2] == [r.name for r in grid.runs(tmp_path / "out")]
    only_broken = sweep.write_sbatch(script, grid, swept[1], arguments_of("--slurm", "x"), ["made"], ["run"])
    assert "array of 2 runs" in only_broken and "--array=0-1" in script.read_text() and "broken" in script.read_text()


def test_only_takes_names_of_this_grid(swept):
    arguments = sweep.parser_of("sweep", "").parse_args(["--only", "rope-seed1-00000000", "--out", str(swept[1])])
    with pytest.raises(ValueError, match="no run 'rope-seed1-00000000'"):
        sweep.run(swept[0], arguments, ["scripts/sweep.py"])


def test_each_run_at_a_time_has_gpus_of_its_own(monkeypatch):
    monkeypatch.setattr(sweep.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5,7,8")
    arguments = sweep.parser_of("sweep", "").parse_args(["--ranks", "2"])
    sweep.complete(arguments, Grid({"seeds": [1, 2, 3], "settings": {"": {}}, "arms": {"a": {}}}))
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in sweep.slots_of(arguments)] == ["0,2", "5,7"]
    assert sweep.launched(["train.py"], 2)[1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--",
        "train.py",
    ]
    with pytest.raises(ValueError, match="more than the 5 GPU"):
        sweep.complete(
            sweep.parser_of("sweep", "").parse_args(["--ranks", "3", "--parallel", "2"]),
            Grid({"seeds": [1], "settings": {"": {}}}),
        )


def test_threads_do_not_depend_on_what_is_done(tmp_path):
    grid = Grid({"seeds": [1, 2], "settings": {"": {}}, "arms": {"a": {}}})
    arguments = sweep.parser_of("sweep", "").parse_args([])
    sweep.complete(arguments, grid)
    cores = len(os.sched_getaffinity(0))
    assert arguments.parallel == min(2, cores) and arguments.threads == max(1, cores // arguments.parallel)


# ---- statistics and cells


def test_seed_interval_is_students(tmp_path):
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


def row(nll, targets="t"):
    nll = np.array(nll, float)
    return {
        "nats_per_token": nll.sum() / 30,
        "targets_sha256": targets,
        "per_document": {"nll": nll.tolist(), "tokens": [10, 20]},
    }


def test_differences_of_evaluations_are_on_the_same_tokens():
    base, ours = {1: row([10, 20]), 2: row([12, 22])}, {1: row([9, 20]), 2: row([11, 22])}
    found = difference_of_rows(ours, base)
    assert (
        found["difference"] == pytest.approx(-1 / 30)
        and found["seeds"] == 2
        and found["interval"][0] < -1 / 30 < found["interval"][1]
    )
    with pytest.raises(ValueError, match="different tokens"):
        difference_of_rows({1: row([9, 20], "other")}, base)
    assert difference_of_rows({1: {"nats_per_token": None}}, base) is None


@pytest.mark.parametrize("published,interval,seeds,expected", [
    (1.0, [0.9, 1.1], 3, "within interval"), (1.0, [1.0, 1.1], 2, "within interval"), (1.2, [0.9, 1.1], 3, "differs"), (0.8, [0.9, 1.1], 3, "differs"),
    (1.0, [0.9, 1.1], 1, "one seed"), (1.0, None, 1, "one seed"), (None, [0, 1], 3, ""),
])  # fmt: skip
def test_verdicts(published, interval, seeds, expected):
    assert verdict(published, interval, seeds) == expected


@pytest.mark.parametrize("published,difference,interval,seeds,expected", [
    (0.5, 0.02, [0.01, 0.03], 2, "same direction"), (-0.5, -0.02, [-0.03, -0.01], 2, "same direction"), (0.5, -0.02, [-0.03, -0.01], 2, "other direction"),
    (0.5, 0.02, [-0.01, 0.05], 2, "inside noise"), (0.5, 0.02, [0.01, 0.03], 1, "one seed"), (0.5, 0.02, None, 1, "one seed"),
])  # fmt: skip
def test_directions(published, difference, interval, seeds, expected):
    assert report.direction(published, {"difference": difference, "interval": interval, "seeds": seeds}) == expected


@pytest.mark.parametrize("difference,interval,seeds,expected", [
    (-0.02, [-0.03, -0.01], 3, "**-0.0200 [-0.0300, -0.0100]**"),  # better beyond noise
    (0.02, [0.01, 0.03], 3, "+0.0200 [+0.0100, +0.0300]"),  # worse beyond noise
    (-0.02, [-0.05, 0.01], 3, "-0.0200 [-0.0500, +0.0100] ≈"),
    (-0.02, [-0.03, -0.01], 1, "-0.0200 [-0.0300, -0.0100]"),  # over documents only: not bold
    (-0.02, None, 1, "-0.0200"),
])  # fmt: skip
def test_noise_is_marked_and_only_significance_is_bold(difference, interval, seeds, expected):
    assert difference_cell({"difference": difference, "interval": interval, "seeds": seeds}) == expected


def test_tables_in_markdown_and_latex():
    table = Table(
        "a_b: 50 % of |x|",
        ["arm", "γ ± 1", "n"],
        [["rope & co", "**-0.02 [-0.03, -0.01]**", "2"], ["x^2 #1 ~ {y} \\", "+0.5 ≈", "1-2"]],
    )
    lines = table.markdown().splitlines()
    assert lines[2:] == [
        "| arm | γ ± 1 | n |",
        "|---|--:|--:|",
        "| rope & co | **-0.02 [-0.03, -0.01]** | 2 |",
        "| x^2 #1 ~ {y} \\ | +0.5 ≈ | 1-2 |",
    ]
    text = table.latex()
    assert (
        r"\caption{a\_b: 50 \% of |x|}" in text
        and r"\begin{tabular}{lrr}" in text
        and r"arm & $\gamma$ $\pm$ 1 & n \\" in text
    )
    assert r"rope \& co & \textbf{$-0.02$ [$-0.03$, $-0.01$]} & 2 \\" in text
    assert r"x\textasciicircum{}2 \#1 \textasciitilde{} \{y\} \textbackslash{} & $+0.5$ $\approx$ & 1-2 \\" in text
    assert (
        "{llr}" in Table("", ["a", "b", "c"], left=2).latex()
        and "|---|---|--:|" in Table("", ["a", "b", "c"], left=2).markdown()
    )
    assert latex("100 %_") == r"100 \%\_"
    assert Table("", ["a|b"], []).markdown().splitlines()[2] == "| a\\|b |"


def test_every_result_made_by_these_scripts_is_what_they_make(tmp_path):
    """Folders of results/ that hold a grid: the committed tables are those that the committed files give."""
    for path in (REPO / "results").glob("*/grid.yaml"):
        study = Study.read(path.parent)
        assert all(run.endswith("(diverged)") for run in study.missing), path
        assert report.markdown(study) in (path.parent / "README.md").read_text(), (
            f"{path.parent}: run scripts/report.py on it"
        )
        assert (path.parent / "table.tex").read_text() == report.latex_text(study), path
