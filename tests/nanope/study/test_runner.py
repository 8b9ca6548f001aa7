"""How runs are started: locks, slots, what killed sweeps left, and the SLURM script."""

import itertools
import os
import signal
import subprocess

import pytest
from studies import EVAL, FIELDS, arguments_of, finish, prepared, write_grid
from training import files_of

from nanope.study.files import RunFolders
from nanope.study.grid import Grid
from nanope.study.locks import alone, held, take
from nanope.study.results import bench_file
from nanope.study.runner import Runner, Work, flags, launched, measure_throughput, prepare, slots_of
from nanope.study.slurm import write_script
from nanope.study.status import state_of, status
from nanope.study.sweep import main
from schemes import outside_sources


@pytest.fixture
def grid(tmp_path):
    return Grid.read(write_grid(tmp_path / "g.yaml", eval={}))


@pytest.fixture
def files(tmp_path):
    return RunFolders(tmp_path / "out")


def test_a_run_of_another_process_is_left_alone(grid, files):
    """Its lock is held by the training process itself, so it stays when the sweep is gone."""
    run = grid.runs(files)[0]
    assert held(run) is None
    lock = take(run, 0)
    child = subprocess.Popen(["sleep", "30"], pass_fds=[lock.fileno()])
    lock.close()
    assert held(run).split()[1:] == ["0", str(os.getpid())] and take(run, 1) is None
    assert state_of(run) == "training"
    child.kill(), child.wait()
    assert held(run) is None and state_of(run) == "waiting"


@pytest.mark.slow
def test_data_and_speeds_that_a_killed_sweep_left_in_the_making_are_waited_for(tmp_path, files, capsys):
    """A process that outlived its sweep holds the lock and then makes the file: it is not made twice."""
    data = {"corpus": "files", "tokenizer": "byte"}  # data/prepare.py would fail: there is no source
    grid = Grid.read(write_grid(tmp_path / "g.yaml", fields=FIELDS, data=data, throughput={"rounds": 1}))

    def left(lock_path, target):
        target.parent.mkdir(parents=True)
        with alone(lock_path, "") as lock:
            subprocess.Popen(["bash", "-c", f"sleep 0.5; echo 1 > {target}"], pass_fds=[lock.fileno()])

    left(tmp_path / "data" / "files-byte.lock", tmp_path / "data" / "files-byte" / "manifest.json")
    prepare(grid, None, root=tmp_path)
    speeds = files.folder / bench_file(grid)
    left(files.folder / "logs" / "speed.lock", speeds)
    assert measure_throughput(grid, files) is None and speeds.read_text() == "1\n"
    assert capsys.readouterr().out.count("waiting for another process that is") == 2
    with pytest.raises(ValueError, match="--source needs a name for each of several corpora"):
        grid.settings = {"a": {"data": {"corpus": "ptb"}}, "b": {}}
        prepare(grid, ["texts"], root=tmp_path)


def test_each_run_at_a_time_has_gpus_of_its_own():
    grid = Grid("g", arms={"a": {}}, seeds=[1, 2, 3])
    args = arguments_of("--ranks", "2", grid=grid, gpus="02578")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_of(args)] == ["0,2", "5,7"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    several = launched(["train.py"], 2)[1:]
    assert several[:4] == torchrun and several[-2:] == ["--", "train.py"] and launched(["a"], 1)[1:] == ["a"]
    assert "SIGUSR1" in several[4]  # which torchrun itself would not pass on


def test_threads_do_not_depend_on_what_is_done():
    cores = len(os.sched_getaffinity(0))
    args = arguments_of(grid=Grid("g", arms={"a": {}}, seeds=[1, 2]))
    assert args.parallel == min(2, cores) and args.threads == max(1, cores // args.parallel)
    assert slots_of(args) == [{"OMP_NUM_THREADS": str(args.threads)}] * args.parallel


@pytest.mark.parametrize("words,gpus,error", [
    (["--ranks", "3", "--parallel", "2"], "02578", "more than the 5 GPU"),
    (["--gpu", "H100"], "", "--gpu is for --plan"),
    (["--parallel", "0"], "", "--parallel must be positive, not 0"),
    (["--price_per_hour", "2"], "", "--price_per_hour is for --plan"),
    (["--mfu", "1.5"], "", r"--mfu must lie in \(0, 1\], not 1.5"),
])  # fmt: skip
def test_options_that_cannot_be(words, gpus, error):
    with pytest.raises(ValueError, match=error):
        arguments_of(*words, gpus=gpus)


def test_arguments_as_a_command_line_has_them():
    arguments = {"lengths": [16, 32], "stream": True, "compile": False, "data": "x"}
    assert flags(arguments) == ["--lengths", "16", "32", "--stream", "--data", "x"]


def test_an_evaluation_takes_the_runs_own_data_which_eval_checks(tmp_path, monkeypatch):
    """Named by --data they would be whatever lies there, so the sweep names them only where it started elsewhere."""
    grid = Grid.read(write_grid(tmp_path / "g.yaml", "data/set", eval=EVAL, seeds=1))
    run = grid.runs(RunFolders(tmp_path / "out"))[0]
    monkeypatch.chdir(tmp_path)
    finish(run, 2.0)
    evaluation = Work(run, 0, None, 1, {}, tmp_path).command("far")
    assert "--data" not in evaluation and evaluation[evaluation.index("--lengths") + 1 :][:2] == ["16", "32"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluation = Work(run, 0, None, 1, {}, tmp_path).command("far")
    assert evaluation[evaluation.index("--data") + 1] == "../data/set"


def test_an_evaluation_on_other_data_needs_them_before_anything_is_trained(tmp_path):
    eval = {"far": {"lengths": ["1x"], "data": "data/other"}}
    grid = Grid.read(write_grid(tmp_path / "g.yaml", eval=eval))
    with pytest.raises(ValueError, match="'far' is on data/other, which is not there"):
        prepare(grid, None, root=tmp_path)
    run = next(iter(grid.runs(RunFolders(tmp_path / "out"))))
    work = Work(run, 0, None, 1, {}, tmp_path)
    assert work.command("far")[-1] == os.path.relpath(tmp_path / "data" / "other")  # relative to the repository


def test_data_that_were_made_with_other_options_are_refused(tmp_path):
    data = {"corpus": "files", "tokenizer": "byte", "val_tokens": 800}
    prepared(tmp_path).rename(tmp_path / "made")
    (tmp_path / "data").mkdir()
    (tmp_path / "made").rename(tmp_path / "data" / "files-byte")

    def grid(val_tokens):
        return Grid.read(write_grid(tmp_path / "g.yaml", fields=FIELDS, data=data | {"val_tokens": val_tokens}))

    prepare(grid(2500), None, root=tmp_path)
    with pytest.raises(ValueError, match="made with val_tokens 2500, and the grid's data has val_tokens 800"):
        prepare(grid(800), None, root=tmp_path)


def test_an_evaluation_that_is_added_does_not_train_again_what_has_no_checkpoint(tmp_path, files):
    """Reports of the weights before would stand beside those of others."""
    keys = {"seeds": 1, "arms": ["rope"]}
    (run,) = Grid.read(write_grid(tmp_path / "g.yaml", eval=EVAL, **keys)).runs(files)
    finish(run, 2.0)
    more = Grid.read(write_grid(tmp_path / "g.yaml", eval=EVAL | {"more": {"lengths": ["1x"]}}, **keys))
    before = files_of(run.folder)
    (error,) = Runner(more, files, arguments_of()).execute().values()
    assert "its checkpoint, which the evaluation 'more' needs, is gone" in error and files_of(run.folder) == before
    (run,) = more.runs(files)
    assert state_of(run) == "checkpoint gone"
    lock = take(run, 0)
    assert state_of(run) == "training"
    lock.close()
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "step_25.pt").touch()  # killed while the last one was being written
    assert not run.bare() and state_of(run) == "stopped"


def test_a_run_of_a_scheme_whose_file_has_changed_is_not_taken_as_done(tmp_path, monkeypatch, capsys):
    scheme = tmp_path / "mine.py"
    scheme.write_text("from schemes import Scheme\n\n\nclass Mine(Scheme):\n    pass\n")
    data = prepared(tmp_path)
    path = write_grid(tmp_path / "g.yaml", data, eval={}, seeds=1, arms=[f"{scheme}:Mine"])
    monkeypatch.chdir(tmp_path)
    files = RunFolders(tmp_path / "out")
    (run,) = Grid.read(path).runs(files)
    assert outside_sources(run.config.pos) and outside_sources("rope") is None
    finish(run, 2.0, scheme_sources=outside_sources(run.config.pos))
    assert run.done() and not run.other_code()
    scheme.write_text(scheme.read_text() + "    # better\n")
    assert run.other_code()
    with pytest.raises(SystemExit, match="1 run.* were trained with other code of their scheme"):
        main("scripts/sweep.py", "", arguments=[str(path), "--out", str(tmp_path / "out")])


def test_an_error_of_the_sweep_leaves_no_process_behind(tmp_path, grid, files, monkeypatch):
    monkeypatch.setattr(Work, "command", lambda self, stage: ["sleep", "30"])
    runner = Runner(grid, files, arguments_of("--parallel", "1", grid=grid))
    (files.folder / "logs").mkdir(parents=True)
    monkeypatch.setattr(runner, "reap", lambda: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        runner.execute()
    assert [work.process.returncode for work in runner.works] == [-signal.SIGTERM]


def test_status_shows_every_run(grid, files):
    done, *others = grid.runs(files)
    finish(done, 2.0)
    lines = status([done, *others], {others[0].name: "error"}).splitlines()
    assert lines[2] == f"| {done.name} | done | 30/30 | 5.0000 |  |"
    assert [line.split(" | ")[1] for line in lines[3:]] == ["failed", "waiting", "waiting"]


def test_the_slurm_array_starts_each_run_once_and_requeues(grid, files, tmp_path):
    script = tmp_path / "a.sbatch"
    command = ["scripts/sweep.py", "a grid.yaml", "--ranks", "4"]
    args = arguments_of("--slurm", "x", "--ranks", "4")
    said = write_script(script, grid, files, args, ["python", "made"], command)
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0 and "array of 4 runs" in said
    for line in ("--array=0-3", "--gpus-per-node=4", "--cpus-per-task=16"):
        assert f"#SBATCH {line}\n" in text
    stub, requeue = tmp_path / "python", tmp_path / "scontrol"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nexit $CODE\n')
    requeue.write_text('#!/bin/bash\necho "scontrol $*"\n')
    stub.chmod(0o755), requeue.chmod(0o755)
    started = []
    for index, code in itertools.product(range(4), (0, 75)):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SRUN": "", "PYTHON": str(stub), "CODE": str(code)}
        environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": "9"}
        done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        assert done.returncode == code and lines[:5] == [*command, "--only"]
        assert lines[6:] == ([f"scontrol requeue 9_{index}"] if code else [])
        started.append(lines[5])
    runs = grid.runs(files)
    assert started[::2] == started[1::2] == [run.name for run in runs]

    for run in runs[:2]:
        finish(run, 2.0)
    said = write_script(script, grid, files, arguments_of("--slurm", "x"), ["made"], ["run"])
    assert "array of 2 runs" in said and "--array=0-1" in script.read_text() and runs[3].name in script.read_text()
    for run in runs[2:]:
        finish(run, 2.0)
    assert "no script to write" in write_script(script, grid, files, arguments_of("--slurm", "x"), ["made"], ["run"])
