"""train.py where something goes wrong, or watches: full disks, lost folders, wandb, memory, bad steps. Nothing of it
changes a run."""
# ruff: noqa: F811 - pytest finds fixtures by their names; those of training.py are imported

import dataclasses
import hashlib
import math
import os
import shutil
import signal
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from training import (  # noqa: F401 - fixtures
    after_forward,
    all_lines,
    arguments,
    at_step,
    at_write,
    before_forward,
    command,
    crash,
    environments,
    finish,
    folders,
    kill,
    last,
    losses,
    make,
    metrics,
    no_room,
    one_thread,
    plain,
    poison,
    same,
    same_run,
    scripted_validation,
    small_files,
    start,
    together,
    write_text,
)

from data.prepare import prepare
from data.shards import WindowOrder, open_data
from nanope import checkpoint
from train import train

pytestmark = pytest.mark.slow

# ---- what is due at the moment of an interruption


@pytest.mark.parametrize("at", [4, 5, 9, 11], ids=["before", "validation", "both", "end"])
def test_what_a_signal_puts_off_is_done_on_resuming(make, at):
    """A signal in step `at` + 1 is followed by its checkpoint at once; validation and sample of that step wait for the
    next start."""
    fields = dict(eval_interval=3, sample_interval=5, pos="carope", dropout=0.1)
    whole, cut = make("whole", **fields), make("cut", resume=True, **fields)
    train(whole)
    assert train(cut, at_step({at: kill(signal.SIGTERM)}))["signal"] == signal.SIGTERM
    there = [line for line in metrics(cut.out_dir) if line["step"] == at + 1]
    assert not [line for line in there if "val/loss" in line or "sample" in line]
    train(cut)
    assert same_run(whole.out_dir, cut.out_dir)
    best = [checkpoint.load(Path(config.out_dir) / "best.pt")["model"] for config in (whole, cut)]
    assert same(*best)


@pytest.mark.parametrize("batches", [2, 6, 14], ids=["start", "middle", "end"])
def test_a_signal_ends_a_validation(make, batches):
    """It may take longer than the grace time: what was validated is dropped, the checkpoint is written, and resuming
    validates again."""
    whole, cut = make("whole"), make("cut", resume=True)
    train(whole)
    calls = []

    def interrupt(model, idx, reduction, loss):
        if reduction == "none":
            calls.append(1)
            if len(calls) == batches:
                kill(signal.SIGTERM)()
        return loss

    end = train(cut, after_forward(interrupt))
    step = {2: 0, 6: 5, 14: 12}[batches]  # 16 windows by 4
    assert len(calls) == batches and (end["step"], end["signal"]) == (step, signal.SIGTERM)
    assert last(cut.out_dir)["step"] == step
    assert not [line for line in metrics(cut.out_dir) if line["step"] == step and "val/loss" in line]
    train(cut)
    assert same_run(whole.out_dir, cut.out_dir)


def test_what_was_put_off_is_done_again_after_a_crash_and_logged_once(make):
    """The checkpoint of step 6 does not know of its validation and sample, metrics.jsonl does."""
    fields = dict(eval_interval=3, sample_interval=3, checkpoint_interval=4)
    whole, cut = make("whole", **fields), make("cut", resume=True, **fields)
    train(whole)
    observer = at_step({5: kill(signal.SIGTERM), 7: crash})
    train(cut, observer)
    with pytest.raises(RuntimeError, match="power"):
        train(cut, observer)
    assert [line["step"] for line in metrics(cut.out_dir) if "val/loss" in line] == [0, 3, 6]
    train(cut)
    assert same_run(whole.out_dir, cut.out_dir)


def test_samples_are_logged_and_change_nothing(make, plain):
    config = make(sample_interval=3)
    train(config)
    samples = [line for line in metrics(config.out_dir) if "sample" in line]
    assert [line["step"] for line in samples] == [3, 6, 9, 12]
    assert all(1 <= len(line["sample"]) <= 16 for line in samples)
    assert same([line for line in metrics(config.out_dir) if "sample" not in line], metrics(plain))
    assert same(last(config.out_dir)["model"], last(plain)["model"])


# ---- checkpoints that are written while training goes on


def test_a_checkpoint_holds_its_moment_whenever_it_is_written(make):
    """Writing is held up until two steps later. The file must hold the weights of its step; the run does not wait."""
    may_write, steps = threading.Event(), []

    def hold_up(step, path):
        assert may_write.wait(30)
        steps.append(step)

    config = make(keep_checkpoints=9, eval_interval=0)
    # The checkpoint of step 4 is due before steps 4 and 5
    train(config, together(at_write(hold_up), at_step({6: may_write.set})))
    reference = make("reference", keep_checkpoints=9, eval_interval=0)
    train(reference)
    assert sorted({*steps}) == [4, 8, 12]
    for step in "4", "8", "12":
        mine, theirs = (checkpoint.load(checkpoint.find(c.out_dir, step)) for c in (config, reference))
        assert same(mine["model"], theirs["model"]) and same(mine["optimizer"], theirs["optimizer"])


def test_a_run_that_fails_finishes_the_checkpoint_that_is_being_written(make):
    started = threading.Event()

    def slow(step, path):
        started.set()
        threading.Event().wait(0.3)

    config = make(eval_interval=0)
    with pytest.raises(RuntimeError, match="power"):
        train(config, together(at_write(slow), at_step({4: lambda: (started.wait(30), crash())})))
    assert last(config.out_dir)["step"] == 4


def test_what_goes_wrong_in_the_writer_ends_the_run(make):
    """Anything but a disk's failure is a bug, and not to be passed over."""

    def broken(step, path):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        train(make(), at_write(broken))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system has no /proc")
def test_a_checkpoint_never_knows_more_than_metrics(make, monkeypatch):
    """The lines of a step are on the disk before the checkpoint of that step is written."""
    synced, config = [], make(eval_interval=0)

    def fsync(descriptor, real=os.fsync):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    def check(step, path):
        if path.name.startswith("step_"):
            ours = [name for name in synced if name.endswith("metrics.jsonl") or "step_" in name]
            assert ours and ours[-1].endswith("metrics.jsonl")
            assert max(line["step"] for line in metrics(config.out_dir)) >= step

    monkeypatch.setattr(os, "fsync", fsync)
    train(config, at_write(check))
    assert last(config.out_dir)["step"] == 12


# ---- folders and disks


def test_a_folder_that_is_lost_is_made_again(make, plain, capsys):
    config = make()

    def lose():
        while Path(config.out_dir).exists():  # a checkpoint may be being written
            shutil.rmtree(config.out_dir, ignore_errors=True)

    train(config, at_step({6: lose}))
    run = Path(config.out_dir)
    assert same_run(run, plain) and (run / "config.yaml").is_file()
    assert f"warning: {run} was lost" in capsys.readouterr().err


def test_a_best_that_could_not_be_written_is_not_remembered(make):
    """Neither by the run nor by its checkpoints: the next lowest is written, also after resuming."""
    full = at_write(lambda step, path: no_room(step, path) if path.name == "best.pt" else None)
    figures = scripted_validation([9.0, 3.0, 3.5])
    config = make(eval_interval=4, checkpoint_interval=4, max_steps=4)
    train(config, together(figures, full))
    assert last(config.out_dir)["best_val_loss"] == math.inf
    train(dataclasses.replace(config, max_steps=8, resume=True), figures)
    assert checkpoint.load(Path(config.out_dir) / "best.pt")["step"] == 8


def test_the_last_checkpoint_is_tried_again(make, plain, capsys):
    tries = []

    def no_room_once(step, path):
        if path.name == "step_12.pt":
            tries.append(path)
            if len(tries) == 1:
                no_room(step, path)

    config = make()
    train(config, at_write(no_room_once))
    assert len(tries) == 2 and same_run(config.out_dir, plain)
    assert "at step 12 a checkpoint could not be written" in capsys.readouterr().err


def test_metrics_that_cannot_be_written_for_a_while_are_not_lost(make, plain, capsys):
    """From step 5 on there is room for half a line more, from step 8 on for all."""
    config, room = make(checkpoint_interval=0), []

    def fill():
        size = (Path(config.out_dir) / "metrics.jsonl").stat().st_size
        room.append(small_files(size + 50))
        room[0].__enter__()

    train(config, at_step({5: fill, 8: lambda: room[0].__exit__(None, None, None)}))
    assert same(metrics(config.out_dir), metrics(plain))
    err = capsys.readouterr().err
    assert err.count("metrics cannot be written") == 1 and "File too large" in err


def test_a_real_process_with_no_room_for_checkpoints_trains_to_its_end(make, tmp_path):
    code = "import resource, train; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); train.main()"
    config = make(max_steps=30, log_interval=1)
    status, _, err = finish(start(["-c", code, *arguments(config)], tmp_path))
    assert status == 1 and "Traceback" not in err and "error: the checkpoint of step 30 could not be written" in err
    assert losses(config.out_dir, "step")[-1] == 30
    assert not [*Path(config.out_dir).rglob("*.pt")] and not [*Path(config.out_dir).rglob("*.partial")]
    assert train(dataclasses.replace(config, resume=True))["step"] == 30


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_the_screens_log_does_not_end_the_run(make, tmp_path):
    config = make()
    code = "import os, sys, train; os.dup2(os.open('/dev/full', os.O_WRONLY), 2); train.main()"
    finish(start(["-c", code, *arguments(config)], tmp_path))
    assert last(config.out_dir)["step"] == 12


# ---- wandb


class FailingWandb(types.ModuleType):
    """Its service dies at the third line."""

    Error = RuntimeError

    def __init__(self):
        super().__init__("wandb")
        self.__spec__, self.lines, self.finished = types.SimpleNamespace(name="wandb"), [], 0

    def login(self, **_):
        return True

    def init(self, **_):
        return self

    def log(self, values, step):
        self.lines.append(step)
        if len(self.lines) == 3:
            raise BrokenPipeError("the service\nis gone")

    def finish(self, exit_code):
        raise ConnectionError("gone")


def test_a_wandb_that_fails_does_not_end_the_run(make, plain, monkeypatch, capsys):
    fake = FailingWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_CACHE_DIR", "unused")
    config = make(wandb="online")
    train(config)
    assert same(metrics(config.out_dir), metrics(plain)) and len(fake.lines) == 3
    assert capsys.readouterr().err.count("warning: wandb failed (the service)") == 1


class NotingWandb(FailingWandb):
    """Notes how each run was begun."""

    def __init__(self):
        super().__init__()
        self.begun = []

    def init(self, id, resume, mode, **_):
        self.begun.append((id, resume))
        return types.SimpleNamespace(log=lambda values, step: None, finish=lambda exit_code: None)


@pytest.fixture
def wandb(monkeypatch):
    fake = NotingWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_CACHE_DIR", "unused")
    return fake


@pytest.mark.parametrize("again", [dict(seed=2), dict(seed=1), dict(seed=1, resume=True)])
def test_a_run_that_is_deleted_and_begun_anew_is_another_one_to_wandb(make, wandb, again):
    config = make(wandb="offline", max_steps=2)
    train(config)
    if "resume" in again:
        shutil.rmtree(config.out_dir)
    else:
        for path in Path(config.out_dir).iterdir():  # as rm -r run/* does
            shutil.rmtree(path) if path.is_dir() else path.name.startswith(".") or path.unlink()
    train(dataclasses.replace(config, **again))
    (first, _), (second, how) = wandb.begun
    assert first != second and how is None


def test_a_resumed_run_continues_its_wandb_run_wherever_its_folder_went(make, wandb, tmp_path):
    config = make(wandb="offline", resume=True)
    with pytest.raises(RuntimeError):
        train(config, at_step({2: crash}))  # before the first checkpoint
    with pytest.raises(RuntimeError):
        train(config, at_step({5: crash}))
    train(config)
    ids, how = zip(*wandb.begun)
    assert len({*ids}) == 1 and how == (None, None, "allow")
    shutil.copytree(config.out_dir, tmp_path / "copy", symlinks=True)
    for folder in ("copy", "copy", "run"):
        train(dataclasses.replace(config, out_dir=str(tmp_path / folder), max_steps=13))
    Path(config.out_dir).rename(tmp_path / "moved")
    train(dataclasses.replace(config, out_dir=str(tmp_path / "moved"), max_steps=14))
    train(dataclasses.replace(config, max_steps=3))  # a new one where the first was
    copied, again, *same = [identity for identity, _ in wandb.begun[3:7]]
    assert copied == again != ids[0] and {*same} == {ids[0]}
    assert wandb.begun[-1][0] not in (copied, ids[0])


def test_a_run_of_another_command_before_its_first_checkpoint_is_another_one_to_wandb(make, wandb):
    config = make(wandb="offline", resume=True, max_steps=3)
    for seed in 1, 2:
        with pytest.raises(RuntimeError):
            train(dataclasses.replace(config, seed=seed), at_step({2: crash}))
    assert len({identity for identity, _ in wandb.begun}) == 2


def test_a_run_that_was_begun_before_ids_were_kept_goes_on_under_its_own(make, wandb):
    config = make(wandb="offline", resume=True)
    train(dataclasses.replace(config, max_steps=4, wandb="off"))
    (Path(config.out_dir) / "wandb").mkdir()
    train(config)
    path = str(Path(config.out_dir).resolve())
    assert wandb.begun == [(hashlib.sha256(path.encode()).hexdigest()[:16], "allow")]


# ---- steps that are not finite


def test_the_message_names_the_windows_by_shard_and_offset(make, tmp_path):
    text = write_text(tmp_path / "text.jsonl", 3, 9)
    prepare("files", tmp_path / "shards", text, "byte", val_tokens=600, shard_tokens=1200)
    config = make(data_dir=str(tmp_path / "shards"), max_bad_steps=2)
    data = open_data(config.data_dir)
    files = data.split("train").files
    assert len(files) > 2
    message = "2 steps in a row up to step 7 .*learning rate 0.00232; rank 0, micro-batches whose loss is not finite"
    with pytest.raises(ValueError, match=message) as info:
        train(config, poison({(5, 1), (6, 1)})[0])
    split = data.split("train")
    starts = WindowOrder(len(split), 16, 1).starts(6 * 8 + 4, 4)  # the second micro-batch of step 7
    edges = np.cumsum([0] + [r["tokens"] for r in data.manifest["splits"]["train"]])
    for s in map(int, starts):
        shard = max(i for i in range(len(files)) if edges[i] <= s)
        assert f"{files[shard].name} at token {s - edges[shard]}" in str(info.value)
        there = np.fromfile(files[shard], data.manifest["dtype"])[s - edges[shard] :][:16]
        assert np.array_equal(there, split.read(s, s + len(there)))
    assert str(info.value).count(" at token ") == 4


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_that_is_logged_as_skipped_is_skipped(make, dtype, what):
    """A loss that is not finite, with gradients that are (the scaler of float16 sees nothing), and the reverse."""
    weights = []

    def infinite(model, idx, reduction, loss):
        if reduction == "mean":
            weights.append(model.lm_head.weight.clone())
            if len(weights) == 4:
                loss = loss + (math.inf if what == "loss" else 0.0)
                loss.register_hook(lambda g: g * (math.inf if what == "gradient" else 1.0))
        return loss

    config = make(dtype=dtype, micro_batch_size=8)
    train(config, after_forward(infinite))
    assert [line["step"] for line in metrics(config.out_dir) if "skipped" in line] == [4]
    assert same(weights[3], weights[4]) and not same(weights[4], weights[5])
    assert last(config.out_dir)["optimizer"]["state"][0]["step"] == 11


@pytest.mark.parametrize("log_interval", [1, 5])
def test_a_host_one_step_ahead_gives_the_same_run(make, log_interval):
    """As on a GPU: outcomes are read a step late. Bad steps are skipped on the device, and everything logged is the
    same."""
    runs, fields = [], dict(log_interval=log_interval, max_bad_steps=3, checkpoint_interval=5, eval_interval=7)
    for ahead in 0, 1:
        config = make(f"ahead{ahead}", **fields)
        train(config, poison({(3, 0), (6, 1), (7, 0)})[0], ahead)
        runs.append(config.out_dir)
    assert same_run(*runs)
    assert [line["step"] for line in metrics(runs[0]) if "skipped" in line] == [4, 7, 8]


def test_a_host_one_step_ahead_stops_for_bad_steps_and_keeps_good_checkpoints(make):
    config = make(log_interval=100, max_bad_steps=3, checkpoint_interval=4, eval_interval=0)
    with pytest.raises(ValueError, match="3 steps in a row up to step 8 "):
        train(config, poison({(s, 0) for s in range(5, 100)})[0], ahead=1)
    assert [f.name for f in checkpoint.step_files(Path(config.out_dir))] == ["step_4.pt"]


def test_no_number_is_read_from_the_device_inside_a_step(make, monkeypatch):
    """A step that nothing is due after launches without asking for a value: what would be a host synchronisation on a
    GPU. Only conversions from tensors to Python are caught, not the optimizer's and the model's own work on the CPU."""
    reads, inside = [], [False]
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        real = getattr(torch.Tensor, name)

        def caught(self, *args, name=name, real=real):
            if inside[0]:
                reads.append(name)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, caught)

    def observe(event, step, subject):
        inside[0] = event == "step" or (inside[0] and event != "launched")
        if event == "ready":
            subject.check_tokens = lambda *_: None  # on the CPU only

    train(make(log_interval=100, eval_interval=0, max_steps=4, grad_clip=1.0), observe)
    assert not reads


# ---- memory


def test_auto_is_recorded_and_kept(make):
    config = make(micro_batch_size="auto", max_steps=4)
    train(config)  # on a CPU as null
    recorded = last(config.out_dir)["config"]["micro_batch_size"]
    assert recorded == 8 and f"micro_batch_size: {recorded}" in (Path(config.out_dir) / "config.yaml").read_text()
    other = make("other", micro_batch_size=2, max_steps=4)
    train(other)
    train(dataclasses.replace(other, micro_batch_size="auto", max_steps=6, resume=True))
    assert last(other.out_dir)["config"]["micro_batch_size"] == 2  # found once
    train(dataclasses.replace(other, micro_batch_size=None, max_steps=8, resume=True))
    assert last(other.out_dir)["config"]["micro_batch_size"] == 2


# ---- data


def test_a_shard_that_is_damaged_during_the_run_ends_it_with_its_name(make, command, folders, tmp_path):
    shutil.copytree(folders / "small", tmp_path / "data")
    shard = tmp_path / "data" / "train_00000.bin"
    config = make(data_dir=str(tmp_path / "data"))
    damage = at_step({6: lambda: shard.write_bytes(shard.read_bytes()[:64])})
    assert "train_00000.bin is truncated" in command(*arguments(config), observe=damage)
    assert last(config.out_dir)["step"] == 4
