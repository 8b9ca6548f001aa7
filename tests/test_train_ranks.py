"""Several ranks, as real processes over gloo: the same curve, exact resume, lost ranks, restarts; and requeueing by the
job script."""
# ruff: noqa: F811 - pytest finds fixtures by their names; those of training.py are imported

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import (  # noqa: F401 - fixtures
    DRIVER,
    REPO,
    TINY,
    TOYS,
    arguments,
    environments,
    files_of,
    finish,
    folders,
    last,
    losses,
    make,
    metrics,
    one_thread,
    same,
    same_run,
    start,
    wait_for_lines,
)

from nanope import checkpoint
from nanope.config import RunConfig
from train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "driver.py"
    path.write_text(DRIVER)
    return path


def start_ranks(command, cwd, number=2, **environment):
    """So many processes of a command, one a rank, without torchrun's agent."""
    port = 20000 + os.getpid() % 20000
    group = dict(WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **environment)
    return [start(command, cwd, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(number)]


def train_by_ranks(driver, config, cwd, number=2, **environment):
    """What all ranks of a run that ends well say to stderr."""
    said = [finish(process) for process in start_ranks([driver, *arguments(config)], cwd, number, **environment)]
    assert not any(status for status, _, _ in said), said
    return "".join(err for _, _, err in said)


# What the tests of interruptions compare with `pair`
PAIR = dict(max_steps=40, micro_batch_size=2, checkpoint_interval=5, keep_checkpoints=99, rank_timeout=20.0)
PAIR |= dict(pos="carope", dropout=0.1)


@pytest.fixture(scope="module")
def pair(driver, folders, tmp_path_factory):
    """A finished run of PAIR by two ranks, with dropout and accumulation: its folder."""
    run = tmp_path_factory.mktemp("runs") / "pair"
    config = RunConfig(**{**TINY, **PAIR, "data_dir": str(folders / "small"), "out_dir": str(run)})
    train_by_ranks(driver, config, run.parent)
    return run


def torchrun(driver, config, ranks=2, *options):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, *options, driver, *arguments(config)]


def test_the_number_of_ranks_does_not_matter(make, driver, tmp_path):
    """1 and 4 ranks, other micro-batches: one curve of 50 steps. A run begun by 4 ranks goes on with 1."""
    fields = dict(max_steps=50, pos="comrope", eval_interval=20, checkpoint_interval=25)
    one = make("one", micro_batch_size=8, **fields)
    train(one)
    other = make("four", micro_batch_size=1, **fields)
    train_by_ranks(driver, other, tmp_path, 4, LATE="0.3")
    keys = [[line.keys() for line in metrics(config.out_dir)] for config in (one, other)]
    assert keys[0] == keys[1]  # one writer
    assert environments(other.out_dir)[0]["ranks"] == 4
    for key in ("train/loss", "val/loss", "grad_norm"):
        assert losses(other.out_dir, key) == pytest.approx(losses(one.out_dir, key), rel=1e-5)
    assert losses(one.out_dir)[0] > losses(one.out_dir)[-1] + 0.5  # something was learned
    (Path(other.out_dir) / "checkpoints" / "step_50.pt").unlink()
    train(dataclasses.replace(other, resume=True, micro_batch_size=4))
    assert losses(other.out_dir) == pytest.approx(losses(one.out_dir), rel=1e-5)
    assert len(environments(other.out_dir)) == 2


def test_ranks_draw_alike_and_share_an_auxiliary_loss(make, driver, tmp_path):
    fields = dict(pos=f"{TOYS}:Stretch+{TOYS}:Penalty", micro_batch_size=2)
    one, two = make("one", **fields), make("two", **fields)
    train(one)
    train_by_ranks(driver, two, tmp_path)
    for key in ("train/loss", "train/auxiliary", "val/loss", "grad_norm"):
        assert losses(two.out_dir, key) == pytest.approx(losses(one.out_dir, key), rel=1e-5)
    assert len(losses(two.out_dir, "train/auxiliary")) == 12


def test_two_ranks_resume_exactly(make, driver, pair, tmp_path):
    """SIGKILL of everything, SIGTERM to torchrun, SIGUSR1 to one rank alone."""
    cut = make("cut", **PAIR, resume=True)
    process = start(torchrun(driver, cut), tmp_path, SLEEP="0.1")
    wait_for_lines(cut.out_dir, 10, process)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for pid in (process.pid, *children):
        os.kill(pid, signal.SIGKILL)
    process.wait(), process.stderr.close(), process.stdout.close()

    process = start(torchrun(driver, cut), tmp_path, SLEEP="0.1")
    wait_for_lines(cut.out_dir, 19, process)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    stopped = last(cut.out_dir)["step"]
    assert status != 0 and f"stopped by SIGTERM after step {stopped}, checkpoint written" in err and 10 <= stopped < 33

    status, _, err = finish(start(torchrun(driver, cut), tmp_path, SIGNAL_AT="1:34"))
    assert status != 0 and "stopped by SIGUSR1 after step 35" in err and "exitcode  : 75" in err
    there = checkpoint.load(checkpoint.find(pair, "35"))
    for key in ("model", "optimizer"):
        assert same(last(cut.out_dir)[key], there[key])
    train_by_ranks(driver, cut, tmp_path)
    assert same_run(pair, cut.out_dir)


def test_a_signal_to_one_rank_during_validation(make, driver, pair, tmp_path):
    """The other rank has finished its share: both put the validation off, and none waits for the other."""
    cut = make("cut", **PAIR, resume=True)
    stopped = start_ranks([driver, *arguments(cut)], tmp_path, SIGNAL_IN_VALIDATION="1:6")
    (status, _, err), (other, _, _) = map(finish, stopped)
    assert status == other == os.EX_TEMPFAIL and "stopped by SIGUSR1 after step 5, checkpoint written" in err
    assert last(cut.out_dir)["step"] == 5 and len(losses(cut.out_dir, "val/loss")) == 1
    train_by_ranks(driver, cut, tmp_path)
    assert same_run(pair, cut.out_dir)


def test_compiled_blocks_under_ddp_with_accumulation(make, driver, tmp_path):
    fields = dict(max_steps=10, micro_batch_size=2, n_layer=2)
    eager, compiled = make("eager", **fields), make("compiled", compile=True, **fields)
    train(eager)
    err = train_by_ranks(driver, compiled, tmp_path, BACKEND="aot_eager", COUNT="1")
    assert err.count("reductions: 10\n") == 2  # on each rank once a step, of two micro-steps
    assert environments(compiled.out_dir)[0]["compile"]
    for key in ("train/loss", "val/loss", "grad_norm"):
        assert losses(compiled.out_dir, key) == pytest.approx(losses(eager.out_dir, key), rel=1e-5)


def test_torchrun_restarts_and_the_run_resumes_by_itself(make, driver, pair, tmp_path):
    """A rank is killed in step 13. With --max-restarts the same launch continues, without --resume, and ends as if
    nothing had happened."""
    cut = make("cut", **PAIR)
    dying = dict(DIE_AT="1:12", ONCE=str(tmp_path / "died"))
    status, _, err = finish(start(torchrun(driver, cut, 2, "--max-restarts=2"), tmp_path, **dying))
    assert status == 0, err
    assert (tmp_path / "died").exists() and same_run(pair, cut.out_dir)

    # A restart of this launch has no claim on another's run
    before = files_of(pair)
    longer = dataclasses.replace(cut, max_steps=50, out_dir=str(pair))
    status, _, err = finish(start(torchrun(driver, longer, 2, "--max-restarts=1"), tmp_path))
    assert status != 0 and err.count("already holds a run") >= 2
    assert files_of(pair) == before


@pytest.mark.parametrize("how", ["DIE_AT", "HANG_AT"])
def test_a_rank_that_is_gone_ends_the_others(make, driver, tmp_path, how):
    """Without torchrun's agent, which would end them itself: killed at once, hanging after rank_timeout. The last
    checkpoint stays."""
    config = make(max_steps=500, micro_batch_size=2, checkpoint_interval=5, rank_timeout=6.0)
    processes = start_ranks([driver, *arguments(config)], tmp_path, SLEEP="0.01", **{how: "1:12"})
    try:
        started = time.monotonic()
        status, _, err = finish(processes[0], timeout=100)
        assert status == 1 and time.monotonic() - started < 90
        assert "Traceback" not in err
        assert "error: rank 0 of 2 lost another rank" in err and "continue with --resume true" in err
        assert last(config.out_dir)["step"] == 10
    finally:
        processes[1].kill()
        processes[1].communicate()


# ---- schedulers


def test_exit_codes(make, tmp_path):
    """75 asks to be started again, Ctrl-C does not; both leave a checkpoint of the last step."""
    for number, expected in (signal.SIGUSR1, os.EX_TEMPFAIL), (signal.SIGINT, 130):  # SIGTERM: test_train.py
        config = make(f"signal{number}", max_steps=100_000, schedule="constant", checkpoint_interval=0)
        process = start([REPO / "train.py", *arguments(config)], tmp_path)
        wait_for_lines(config.out_dir, 20, process)
        process.send_signal(number)
        status, _, err = finish(process)
        assert status == expected and "Traceback" not in err
        assert last(config.out_dir)["step"] == losses(config.out_dir, "step")[-1]


def test_a_signal_before_the_first_step_asks_to_be_started_again(make, tmp_path):
    config = make(max_steps=4)
    code = f"""
import os, runpy, signal, sys
import data.shards
def late(*a, open_data=data.shards.open_data, **k):
    os.kill(os.getpid(), signal.SIGTERM)
    return open_data(*a, **k)
data.shards.open_data = late
runpy.run_path({str(REPO / "train.py")!r}, run_name="__main__")
"""
    status, _, err = finish(start(["-c", code, *arguments(config)], tmp_path))
    assert status == os.EX_TEMPFAIL and "Traceback" not in err and not Path(config.out_dir).exists()


@pytest.mark.parametrize("ends", ["interrupted", "finished", "failed"])
def test_the_job_script_requeues_what_was_interrupted(make, tmp_path, ends):
    """configs/slurm/train.sbatch with stand-ins: srun runs the command and, like Slurm's, answers SIGTERM with SIGKILL
    for it; scancel signals the command; scontrol notes its arguments."""
    tools, submitted = tmp_path / "tools", tmp_path / "submitted"
    tools.mkdir(), submitted.mkdir()
    # Without the .venv that the repository may have, whose torchrun would be taken
    (submitted / "train.py").symlink_to(REPO / "train.py")
    config = make(max_steps=100_000 if ends == "interrupted" else 12, schedule="constant")
    if ends == "failed":
        config.learning_rate = -1.0
    srun = 'while [ "${1#--}" != "$1" ]; do shift; done\n"$@" &\necho $! > $TASK\ntrap "kill -KILL $!" TERM\nwait $!\n'
    (tools / "srun").write_text(f"#!/bin/sh\n{srun}")
    (tools / "scancel").write_text('#!/bin/sh\n[ "$*" = "--signal=TERM 7" ] && kill -TERM $(cat $TASK)\n')
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tools / "torchrun").write_text(
        f'#!/bin/sh\nwhile [ "${{1#--}}" != "$1" ]; do shift; done\nexec {sys.executable} "$@"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = dict(SLURM_JOB_ID="7", SLURM_NNODES="1", SLURM_JOB_NODELIST="here", SLURM_GPUS_ON_NODE="1")
    slurm |= dict(SLURM_SUBMIT_DIR=str(submitted), TASK=str(tmp_path / "task"), OMP_NUM_THREADS="1")
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", **slurm}
    command = ["bash", REPO / "configs" / "slurm" / "train.sbatch", *arguments(config)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=environment, cwd=REPO, **pipes)
    if ends == "interrupted":
        wait_for_lines(config.out_dir, 20, process)
        process.send_signal(signal.SIGUSR1)
    _, _, err = finish(process)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert [c for c in calls if c.startswith("requeue")] == (["requeue 7"] if ends == "interrupted" else []), err
    if ends == "interrupted":
        assert "stopped by SIGTERM" in err and checkpoint.find(config.out_dir).exists()
    assert (process.returncode == 0) == (ends != "failed")
