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
import rank
from training import (  # noqa: F401 - fixtures
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


def start_ranks(config, cwd, number=2, **environment):
    """So many processes that train, one a rank, without torchrun's agent."""
    port = 20000 + os.getpid() % 20000
    group = dict(WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **environment)
    return [rank.Rank(arguments(config), cwd, RANK=str(i), LOCAL_RANK=str(i), **group) for i in range(number)]


def train_by_ranks(config, cwd, number=2, **environment):
    """What all ranks of a run that ends well print."""
    said = [finish(process) for process in start_ranks(config, cwd, number, **environment)]
    assert not any(status for status, _, _ in said), said
    return "".join(text for _, _, text in said)


# What the tests of interruptions compare with `pair`
PAIR = dict(max_steps=40, micro_batch_size=2, checkpoint_interval=5, keep_checkpoints=99, rank_timeout=20.0)
PAIR |= dict(pos="carope", dropout=0.1)


@pytest.fixture(scope="module")
def pair(folders, tmp_path_factory):
    """A finished run of PAIR by two ranks, with dropout and accumulation: its folder."""
    run = tmp_path_factory.mktemp("runs") / "pair"
    config = RunConfig(**{**TINY, **PAIR, "data_dir": str(folders / "small"), "out_dir": str(run)})
    train_by_ranks(config, run.parent)
    return run


def test_the_number_of_ranks_does_not_matter(make, tmp_path):
    """1 and 4 ranks, other micro-batches: one curve of 30 steps. A run begun by 4 ranks goes on with 1."""
    fields = dict(max_steps=30, pos="comrope", eval_interval=10, checkpoint_interval=15)
    one = make("one", micro_batch_size=8, **fields)
    train(one)
    other = make("four", micro_batch_size=1, **fields)
    train_by_ranks(other, tmp_path, 4, LATE="0.3")
    keys = [[line.keys() for line in metrics(config.out_dir)] for config in (one, other)]
    assert keys[0] == keys[1]  # one writer
    assert environments(other.out_dir)[0]["ranks"] == 4
    for key in ("train/loss", "val/loss", "grad_norm"):
        assert losses(other.out_dir, key) == pytest.approx(losses(one.out_dir, key), rel=1e-5)
    assert losses(one.out_dir)[0] > losses(one.out_dir)[-1] + 0.5  # something was learned
    (Path(other.out_dir) / "checkpoints" / "step_30.pt").unlink()
    train(dataclasses.replace(other, resume=True, micro_batch_size=4))
    assert losses(other.out_dir) == pytest.approx(losses(one.out_dir), rel=1e-5)
    assert len(environments(other.out_dir)) == 2


def test_ranks_draw_alike_and_share_an_auxiliary_loss(make, tmp_path):
    fields = dict(pos=f"{TOYS}:Stretch+{TOYS}:Penalty", micro_batch_size=2)
    one, two = make("one", **fields), make("two", **fields)
    train(one)
    train_by_ranks(two, tmp_path)
    for key in ("train/loss", "train/auxiliary", "val/loss", "grad_norm"):
        assert losses(two.out_dir, key) == pytest.approx(losses(one.out_dir, key), rel=1e-5)
    assert len(losses(two.out_dir, "train/auxiliary")) == 12


def test_two_ranks_resume_exactly(make, pair, tmp_path):
    """A signal to one rank during validation, SIGKILL of both, SIGUSR1 to one rank alone."""
    cut = make("cut", **PAIR, resume=True)
    # The other rank has finished its share: both put the validation off, and none waits for the other
    stopped = start_ranks(cut, tmp_path, SIGNAL_IN_VALIDATION="1:6")
    (status, _, said), (other, _, _) = map(finish, stopped)
    assert status == other == os.EX_TEMPFAIL and "stopped by SIGUSR1 after step 5, checkpoint written" in said
    assert last(cut.out_dir)["step"] == 5 and len(losses(cut.out_dir, "val/loss")) == 1

    processes = start_ranks(cut, tmp_path, SLEEP="0.1")
    wait_for_lines(cut.out_dir, 16, processes[0])
    for process in processes:
        process.kill()
    assert [finish(process)[0] for process in processes] == [-signal.SIGKILL] * 2
    assert 10 <= last(cut.out_dir)["step"] < 30

    (status, _, said), (other, _, _) = map(finish, start_ranks(cut, tmp_path, SIGNAL_AT="1:34"))
    assert status == other == os.EX_TEMPFAIL and "stopped by SIGUSR1 after step 35" in said
    there = checkpoint.load(checkpoint.find(pair, "35"))
    for key in ("model", "optimizer"):
        assert same(last(cut.out_dir)[key], there[key])
    train_by_ranks(cut, tmp_path)
    assert same_run(pair, cut.out_dir)


def test_three_ranks_resume_exactly(make, tmp_path):
    """A sum of three terms depends on their order, which depends on where a gradient lies in DDP's buckets."""
    fields = dict(batch_tokens=192, micro_batch_size=2, n_layer=2, max_steps=8, eval_interval=4)
    whole, cut = make("whole", **fields), make("cut", **fields, resume=True)
    train_by_ranks(whole, tmp_path, 3)
    assert {finish(process)[0] for process in start_ranks(cut, tmp_path, 3, SIGNAL_AT="1:3")} == {os.EX_TEMPFAIL}
    assert last(cut.out_dir)["step"] == 4
    train_by_ranks(cut, tmp_path, 3)
    assert same_run(whole.out_dir, cut.out_dir)
    for step in "48":  # all that the files hold, though a signal put off the validation of step 4
        states = [checkpoint.load(checkpoint.find(Path(config.out_dir), step)) for config in (whole, cut)]
        assert same(*(state | {"config": state["config"] | {"out_dir": ""}} for state in states))


def test_a_checkpoint_may_take_longer_than_rank_timeout(make, tmp_path):
    config = make(micro_batch_size=2, rank_timeout=5.0, max_steps=2, checkpoint_interval=0, eval_interval=0)
    train_by_ranks(config, tmp_path, SLOW_DISK="8")
    assert last(config.out_dir)["step"] == 2


def test_torchrun_restarts_and_the_run_resumes_by_itself(make, pair, tmp_path):
    """A rank is killed in step 13. With --max-restarts the same launch continues, without --resume. SIGTERM to torchrun
    stops it; it ends as if nothing had happened."""
    cut, died = make("cut", **PAIR), tmp_path / "died"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    process = start([*launcher, rank.__file__, *arguments(cut)], tmp_path, DIE_AT="1:12", ONCE=str(died), SLEEP="0.1")
    wait_for_lines(cut.out_dir, 20, process)  # more than the rank that was killed left
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    stopped = last(cut.out_dir)["step"]
    assert status != 0 and f"stopped by SIGTERM after step {stopped}, checkpoint written" in err, err
    assert died.exists() and 13 <= stopped < 40
    train_by_ranks(dataclasses.replace(cut, resume=True), tmp_path)
    assert same_run(pair, cut.out_dir)


def test_a_restart_has_no_claim_on_the_run_of_another_launch(make, pair, tmp_path):
    before = files_of(pair)
    longer = make(**PAIR | dict(max_steps=50, out_dir=str(pair)))
    for count in "01":
        torchrun = dict(TORCHELASTIC_RUN_ID="another", TORCHELASTIC_RESTART_COUNT=count, LOCAL_WORLD_SIZE="1")
        for status, _, said in map(finish, start_ranks(longer, tmp_path, **torchrun)):
            assert status == 1 and "already holds a run" in said
    assert files_of(pair) == before


def test_a_launch_of_the_same_name_has_no_claim_on_an_earlier_run(make, tmp_path):
    """--rdzv_id is a text that users take again, and a torchrun's number comes again in a container."""
    launcher = ["-m", "torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--rdzv_id=100"]
    launcher += ["--nproc_per_node=1", "--max-restarts=1", rank.__file__]
    config = make(max_steps=4)
    assert finish(start([*launcher, *arguments(config)], tmp_path))[0] == 0
    before = files_of(config.out_dir)
    status, _, said = finish(start([*launcher, *arguments(dataclasses.replace(config, max_steps=8))], tmp_path))
    assert status == 1 and said.count("already holds a run") == 2
    assert files_of(config.out_dir) == before


def test_compiled_blocks_under_ddp_with_accumulation(make, tmp_path):
    fields = dict(max_steps=6, micro_batch_size=2, n_layer=2)
    eager, compiled = make("eager", **fields), make("compiled", compile=True, **fields)
    train(eager)
    said = train_by_ranks(compiled, tmp_path, BACKEND="aot_eager", COUNT="1")
    assert said.count("reductions: 7\n") == 2  # on each rank once a step, of two micro-steps, and once before
    assert environments(compiled.out_dir)[0]["compile"]
    for key in ("train/loss", "val/loss", "grad_norm"):
        assert losses(compiled.out_dir, key) == pytest.approx(losses(eager.out_dir, key), rel=1e-5)


@pytest.mark.parametrize("how", ["DIE_AT", "HANG_AT"])
def test_a_rank_that_is_gone_ends_the_others(make, tmp_path, how):
    """Without torchrun's agent, which would end them itself: killed at once, hanging after rank_timeout. The last
    checkpoint stays."""
    config = make(max_steps=500, micro_batch_size=2, checkpoint_interval=5, rank_timeout=6.0)
    processes = start_ranks(config, tmp_path, SLEEP="0.01", **{how: "1:12"})
    try:
        started = time.monotonic()
        status, _, said = finish(processes[0], timeout=100)
        assert status == 1 and time.monotonic() - started < 90
        assert "Traceback" not in said
        assert "error: rank 0 of 2 lost another rank" in said and "continue with --resume true" in said
        assert last(config.out_dir)["step"] == 10
    finally:
        processes[1].kill()
        processes[1].communicate()


# ---- schedulers


def test_ctrl_c_does_not_ask_to_be_started_again(make, tmp_path):
    """It leaves a checkpoint of the last step. SIGTERM, which asks by its exit code 75: test_train.py."""
    config = make(max_steps=100_000, schedule="constant", checkpoint_interval=0)
    process = start([REPO / "train.py", *arguments(config)], tmp_path)
    wait_for_lines(config.out_dir, 20, process)
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130 and "Traceback" not in err
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


@pytest.mark.parametrize("ends", ["interrupted", 75, 0, 1])
def test_the_job_script_requeues_what_was_interrupted(make, tmp_path, ends):
    """configs/slurm/train.sbatch with stand-ins: srun runs the command and, like Slurm's, answers SIGTERM with SIGKILL
    for it; scancel signals the command; scontrol notes its arguments; torchrun is the command, or ends with a code."""
    tools, submitted = tmp_path / "tools", tmp_path / "submitted"
    tools.mkdir(), submitted.mkdir()
    # Without the .venv that the repository may have, whose torchrun would be taken
    (submitted / "train.py").symlink_to(REPO / "train.py")
    config = make(max_steps=100_000, schedule="constant")
    srun = 'while [ "${1#--}" != "$1" ]; do shift; done\n"$@" &\necho $! > $TASK\ntrap "kill -KILL $!" TERM\nwait $!\n'
    (tools / "srun").write_text(f"#!/bin/sh\n{srun}")
    (tools / "scancel").write_text('#!/bin/sh\n[ "$*" = "--signal=TERM 7" ] && kill -TERM $(cat $TASK)\n')
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    trains = f'while [ "${{1#--}}" != "$1" ]; do shift; done\nexec {sys.executable} "$@"\n'
    (tools / "torchrun").write_text(f"#!/bin/sh\n{trains if ends == 'interrupted' else f'exit {ends}'}")
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
    calls = (tmp_path / "calls").read_text().splitlines()
    requeued = ends in ("interrupted", 75)
    assert [c for c in calls if c.startswith("requeue")] == (["requeue 7"] if requeued else []), err
    assert process.returncode == (0 if requeued else ends)
    if ends == "interrupted":
        assert "stopped by SIGTERM" in err and checkpoint.find(config.out_dir).exists()
