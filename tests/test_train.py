"""train.py: exact and repeatable training, resuming, checkpoints, and what bad input gets."""

# ruff: noqa: F811 - pytest finds fixtures by their names; those of training.py are imported

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from models import relative_error
from torch._dynamo.utils import counters
from training import (  # noqa: F401 - fixtures
    CPU,
    ENVIRONMENT,
    REPO,
    TIMES,
    TOYS,
    all_lines,
    arguments,
    at_step,
    before_forward,
    command,
    crash,
    environments,
    files_of,
    finish,
    folders,
    kill,
    last,
    losses,
    make,
    metrics,
    one_thread,
    plain,
    poison,
    same,
    same_run,
    scripted_validation,
    small_files,
    start,
    together,
    wait_for_lines,
    words,
)

from data.shards import WindowOrder, batch, open_data
from model import GPT, GPTConfig
from nanope import checkpoint
from nanope.config import SINCE, RunConfig
from nanope.distributed import Ranks, compiler_works
from nanope.feed import Validation
from nanope.log import git_state
from nanope.optim import learning_rate
from train import main, train


def slow(*values):
    """A case of a parametrized test that the quick tests leave out."""
    return pytest.param(*values, marks=pytest.mark.slow)


# ---- the same command, the same bits


@pytest.mark.parametrize("pos", [slow("learned"), slow("comrope"), "carope"])
def test_the_same_config_gives_the_same_bits(make, pos):
    a, b, c = (make(name, pos=pos, dropout=0.1, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    for config in (a, b, c):
        torch.manual_seed(hash(config.out_dir))  # what happened before does not matter
        train(config)
    assert same_run(a.out_dir, b.out_dir)
    assert not same(last(a.out_dir)["model"], last(c.out_dir)["model"])  # the comparison can fail


def test_the_same_config_gives_the_same_files(make):
    """To the byte, beside times: nothing in a checkpoint comes from the clock or the operating system's entropy."""
    found = []
    for _ in range(2):
        torch.manual_seed(random.SystemRandom().getrandbits(32)), random.seed(), np.random.seed()
        config = make(dropout=0.1, sample_interval=5)
        train(config)
        found.append({k: v for k, v in files_of(config.out_dir).items() if k != "metrics.jsonl"})
        shutil.rmtree(config.out_dir)
    assert found[0] == found[1] and "checkpoints/step_12.pt" in found[0] and "best.pt" in found[0]


@pytest.mark.slow
def test_seeds_of_weights_and_of_order_are_apart(make):
    runs = [make(name, seed=seed, data_seed=order) for name, seed, order in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1))]
    for config in runs:
        train(config)
    first = [metrics(config.out_dir)[0]["val/loss"] for config in runs]
    assert first[0] == first[1] != first[2]
    assert losses(runs[0].out_dir) != losses(runs[1].out_dir)


@pytest.mark.parametrize(
    "fields",
    [
        slow(dict(eval_interval=0)),
        dict(eval_interval=1, checkpoint_interval=0),
        dict(log_interval=5),
        slow(dict(checkpoint_interval=0)),
        slow(dict(checkpoint_interval=1, keep_checkpoints=1)),
    ],
)
def test_watching_changes_nothing(make, plain, fields):
    config = make(**fields)
    train(config)
    assert same(last(config.out_dir)["model"], last(plain)["model"])
    assert same(last(config.out_dir)["optimizer"], last(plain)["optimizer"])
    logged = range(1, 13) if "log_interval" not in fields else [5, 10, 12]  # the last always
    training = lambda run: [line for line in metrics(run) if "train/loss" in line and line["step"] in logged]  # noqa: E731
    assert training(config.out_dir) == training(plain)


@pytest.mark.slow
def test_watching_changes_nothing_with_dropout(make):
    a = make("a", dropout=0.2, eval_interval=0, checkpoint_interval=0)
    b = make("b", dropout=0.2, eval_interval=1, checkpoint_interval=1)
    train(a)
    train(b)
    assert same(last(a.out_dir)["model"], last(b.out_dir)["model"])


# ---- resuming


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT), slow(signal.SIGUSR1)])
def test_a_signal_ends_the_step_and_resuming_is_exact(make, number):
    """With dropout, accumulation and an epoch edge: an epoch is about 28 steps."""
    fields = dict(max_steps=36, dropout=0.1, pos="carope", micro_batch_size=2, eval_interval=6, checkpoint_interval=7)
    whole, cut = make("whole", **fields), make("cut", **fields)
    order = WindowOrder(len(open_data(whole.data_dir).split("train")), 16, 1)
    assert 8 * 26 < order.windows < 8 * 31 and order.windows % 8  # an epoch ends inside a step, and inside the run
    train(whole)
    signals = at_step({2: kill(number), 26: kill(number), 31: kill(number)})
    ends = []
    for _ in range(4):
        ends.append(train(dataclasses.replace(cut, resume=True), signals))
        assert last(cut.out_dir)["step"] == ends[-1]["step"]  # nothing was lost
    assert [(end["step"], end["signal"]) for end in ends] == [(3, number), (27, number), (32, number), (36, 0)]
    assert same_run(whole.out_dir, cut.out_dir)
    assert ends[-1]["val_loss"] == losses(whole.out_dir, "val/loss")[-1]


@pytest.mark.slow
def test_a_crash_drops_what_lies_beyond_the_checkpoint(make, plain):
    config = make()
    with pytest.raises(RuntimeError, match="power"):
        train(config, at_step({7: crash}))
    run = Path(config.out_dir)
    assert metrics(run)[-1]["step"] == 7 and last(run)["step"] == 4
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train/lo\n{"step": 3}')  # lines cut short, one of them by its end alone
    (run / "checkpoints" / ".step_99.pt.partial").write_bytes(b"PK")
    (run / ".last.pt.partial").symlink_to("nowhere")
    train(dataclasses.replace(config, resume=True))
    assert same_run(run, plain)
    assert not [*run.rglob("*.partial")] and not os.path.lexists(run / ".last.pt.partial")


@pytest.mark.slow
def test_resume_starts_where_there_is_no_checkpoint(make, plain):
    config = make(resume=True)
    with pytest.raises(RuntimeError):
        train(config, at_step({2: crash}))  # before the first checkpoint
    train(config)
    assert same_run(config.out_dir, plain)


def test_resuming_a_finished_run_changes_nothing_and_it_can_be_prolonged(make, plain, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(plain, run, symlinks=True)
    first, *lines = all_lines(run)
    first["environment"]["git"] = {"commit": "0" * 40, "dirty": True}  # it was made with another commit
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (first, *lines)))
    before = files_of(run)
    result = train(make(resume=True))
    assert "nothing to do" in capsys.readouterr().err
    assert result == {"step": 12, "val_loss": losses(plain, "val/loss")[-1], "signal": 0}
    assert files_of(run) == before
    assert train(make(resume=True, max_steps=14))["step"] == 14
    assert [line["step"] for line in metrics(run) if "train/loss" in line] == list(range(1, 15))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(make, plain, tmp_path, capsys):
    newest, before = checkpoint.step_files(plain)
    assert (newest.name, before.name) == ("step_12.pt", "step_8.pt")
    content, hash_content = newest.read_bytes(), checkpoint.hash_path(newest).read_bytes()
    damaged_files = (content[:-1000], hash_content), (bytes(len(content)), hash_content)
    for damaged in (*damaged_files, (content, b""), (content, b"\xff\xfe")):
        run = tmp_path / "run"
        shutil.copytree(plain, run, symlinks=True)
        for file, bytes_ in zip((newest, checkpoint.hash_path(newest)), damaged):
            (run / "checkpoints" / file.name).write_bytes(bytes_)
        train(make(resume=True, keep_checkpoints=1))
        err = capsys.readouterr().err
        assert "warning" in err and "step_12.pt is truncated or altered" in err
        assert same_run(run, plain)
        shutil.rmtree(run)


def test_a_damaged_newer_checkpoint_never_pushes_out_a_good_one(make, plain, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(plain, run, symlinks=True)
    (run / "checkpoints" / "step_12.pt").write_bytes(b"")
    train(make(resume=True, keep_checkpoints=1), at_step({8: kill(signal.SIGTERM)}))
    assert [f.name for f in checkpoint.step_files(run)] == ["step_9.pt"] and last(run)["step"] == 9
    train(make(resume=True))
    assert same_run(run, plain)


def test_a_damaged_checkpoint_without_its_hash_is_passed_over_too(make, plain, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(plain, run, symlinks=True)
    for name, content in (("step_12.pt", b""), ("step_8.pt", b"PK\x03\x04 not a checkpoint")):
        (run / "checkpoints" / name).write_bytes(content)
        (run / "checkpoints" / f"{name}.sha256").unlink()
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged") as info:
        train(make(resume=True))
    assert "delete" in str(info.value) and capsys.readouterr().err.count("warning: ") == 2


def another_process():
    torch.manual_seed(99), random.seed(99), np.random.seed(99)


@pytest.mark.slow
def test_equal_commands_give_equal_files_also_where_one_was_interrupted(make):
    config = make(resume=True, dropout=0.1, sample_interval=6, keep_checkpoints=9)
    digests = []
    for actions in {}, {6: crash}, {5: kill(signal.SIGTERM)}:
        shutil.rmtree(config.out_dir, ignore_errors=True)
        another_process()
        with contextlib.suppress(RuntimeError):
            train(config, at_step(actions))
        train(config)
        files = {name: content for name, content in files_of(config.out_dir).items() if name.endswith(".pt")}
        digests.append({k: hashlib.sha256(v).hexdigest() for k, v in files.items() if k != "checkpoints/step_6.pt"})
    assert digests[0].keys() >= {f"checkpoints/step_{n}.pt" for n in (4, 8, 12)} | {"best.pt"}
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.slow
def test_what_is_drawn_in_a_step_follows_from_the_step(make):
    """Also by a scheme from outside, from whichever generator."""
    draws, seen = lambda: (torch.rand(2).tolist(), random.random(), np.random.rand()), {}

    def drawing(event, step, subject):
        if event == "launched":
            assert seen.setdefault(step, drawn := draws()) == drawn

    config = make()
    train(config, together(drawing, at_step({7: kill(signal.SIGTERM)})))
    another_process()
    train(dataclasses.replace(config, resume=True), drawing)
    train(make("validated", eval_interval=1), drawing)
    assert len({repr(drawn) for drawn in seen.values()}) == 12


def test_dropout_depends_on_seed_and_step(make):
    """Ranks differ too: test_optim.py has step_seed."""
    seeds = set()
    observer = lambda event, step, model: seeds.add(torch.initial_seed()) if event == "launched" else None  # noqa: E731
    for seed in 1, 2, 1:
        train(make(f"run{len(seeds)}", dropout=0.1, seed=seed, max_steps=3), observer)
    assert len(seeds) == 6


@pytest.mark.slow
def test_resume_keeps_the_configs_hyperparameters(make, capsys):
    config = make(pos="comrope")
    train(config, at_step({5: kill(signal.SIGTERM)}))
    train(dataclasses.replace(config, resume=True, weight_decay=0.3, beta2=0.9, pos_lr_multiplier=4.0))
    changed = "pos_lr_multiplier 1.0 → 4.0, weight_decay 0.1 → 0.3, beta2 0.95 → 0.9"
    assert f"goes on with other settings than it began with: {changed}\n" in capsys.readouterr().err
    decayed, plain, positional = last(config.out_dir)["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], plain["weight_decay"], positional["weight_decay"]) == (0.3, 0.0, 0.0)
    assert tuple(decayed["betas"]) == (0.9, 0.9) and positional["lr_multiplier"] == 4.0
    assert positional["lr"] == pytest.approx(4 * decayed["lr"])


@pytest.mark.slow
def test_real_processes_killed_and_stopped_resume_exactly(make, folders, tmp_path):
    fields = dict(schedule="constant", max_steps=100_000, checkpoint_interval=20, eval_interval=30, dropout=0.1)
    run = tmp_path / "run"
    command = [REPO / "train.py", *arguments(make(**fields, resume=True))]
    process = start(command, tmp_path)
    wait_for_lines(run, 60, process)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    process = start(command, tmp_path)
    wait_for_lines(run, 160, process)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    step = last(run)["step"]
    assert status == os.EX_TEMPFAIL and f"stopped by SIGTERM after step {step}" in err and "--resume true" in err
    assert metrics(run)[-1]["step"] <= step
    fields["max_steps"] = step + 5
    train(make(**fields, resume=True))
    train(make("whole", **fields))
    assert same_run(run, tmp_path / "whole")


# ---- batches, micro-batches, ranks


@pytest.mark.slow
def test_micro_batches_do_not_matter(make):
    curves = []
    for micro in (1, 2, 8, None):
        config = make(f"micro{micro}", micro_batch_size=micro, max_steps=30)
        train(config)
        curves.append((losses(config.out_dir), losses(config.out_dir, "val/loss"), losses(config.out_dir, "grad_norm")))
    for other in curves[1:]:
        for mine, theirs in zip(curves[0], other):
            assert len(mine) > 3 and theirs == pytest.approx(mine, rel=1e-5)


# ---- the optimizer, the schedule, the step itself


@pytest.mark.slow
@pytest.mark.parametrize("pos, name", [("comrope", "pos.P"), slow("carope", "pos.c_pos.bias")])
def test_pos_lr_multiplier(make, pos, name):
    key, moved, others = f"transformer.h.0.attn.{name}", [], []
    for multiplier in (0.0, 1.0, 3.0):
        config = make(f"x{multiplier}", pos=pos, pos_lr_multiplier=multiplier, max_steps=1, warmup_steps=0)
        start = GPT(dataclasses.replace(config, vocab_size=320).model_config(), seed=1).state_dict()
        train(config)
        after = last(config.out_dir)["model"]
        moved.append((after[key] - start[key]).double())
        others.append(after["transformer.h.0.attn.c_attn.weight"])
    assert moved[0].abs().max() == 0 and moved[1].abs().max() > 1e-4
    torch.testing.assert_close(moved[2], 3 * moved[1], rtol=1e-3, atol=1e-6)
    assert same(others[0], others[2])


def test_pos_lr_multiplier_of_matrices(make):
    """carope's W, by which one group more is saved and restored."""
    moved, key = [], "transformer.h.0.attn.pos.c_pos.weight"
    for matrices in (False, True):
        fields = dict(pos="carope", pos_lr_multiplier=3.0, pos_lr_matrices=matrices, warmup_steps=0)
        config = make(f"x{matrices}", **fields, max_steps=1)
        train(config)
        moved.append(last(config.out_dir)["model"][key])
        train(dataclasses.replace(config, max_steps=2, resume=True))
        assert len(last(config.out_dir)["optimizer"]["param_groups"]) == 3 + matrices
    torch.testing.assert_close(moved[1], 3 * moved[0], rtol=1e-3, atol=1e-6)  # W starts at 0
    assert moved[0].abs().max() > 1e-4


def by_hand(schedule, s, c):
    """The schedules as config.py describes them, s counted from 0."""
    if s < c.warmup_steps:
        return c.learning_rate * (s + 1) / c.warmup_steps
    if schedule == "cosine":
        progress = (s - c.warmup_steps) / (c.max_steps - c.warmup_steps)
        return c.min_lr + (c.learning_rate - c.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "step":
        return c.learning_rate * math.prod([c.lr_gamma] * (s // c.lr_step))
    if schedule == "wsd":
        first = c.max_steps - c.decay_fraction * c.max_steps
        return c.learning_rate + (c.min_lr - c.learning_rate) * max(0, s - first) / (c.max_steps - first)
    return c.learning_rate


@pytest.mark.parametrize("schedule", ["cosine", slow("step"), slow("wsd"), slow("constant")])
def test_schedules(make, schedule):
    fields = dict(max_steps=20, warmup_steps=4, lr_step=6, lr_gamma=0.5, decay_fraction=0.25, eval_interval=0)
    config = make(schedule=schedule, **fields)
    train(config)
    expected = [by_hand(schedule, s, config) for s in range(20)]
    assert losses(config.out_dir, "lr") == pytest.approx(expected, rel=1e-12)
    peak = config.learning_rate
    assert expected[0] == peak / 4 and expected[3] == expected[4] == peak  # the warm-up ends at the peak
    final = {"cosine": 3e-4, "wsd": 3e-4, "step": 3e-3 / 8, "constant": 3e-3}[schedule]
    assert learning_rate(20, config) == pytest.approx(final)
    assert learning_rate(0, dataclasses.replace(config, warmup_steps=0)) == peak
    assert learning_rate(19, dataclasses.replace(config, warmup_steps=100)) == pytest.approx(0.2 * peak)
    if schedule == "wsd":
        assert expected[15] == peak > expected[16]
    assert 0 <= learning_rate(19, dataclasses.replace(config, warmup_steps=0, decay_fraction=1.0)) <= peak


def test_training_is_what_plain_torch_does(make):
    """Five steps again with whole-batch logits, cross_entropy, clipping by hand and a plain AdamW."""
    fields = dict(max_steps=5, warmup_steps=2, grad_clip=0.6, weight_decay=0.5, learning_rate=1e-3)
    config = make(pos="comrope", bias=True, pos_lr_multiplier=2.0, **fields)
    train(config)
    model = GPT(GPTConfig(16, 320, 1, 2, 16, bias=True, pos="comrope"), seed=1)
    named = dict(model.named_parameters())
    positional = [p for name, p in named.items() if name.endswith("attn.pos.P")]
    decayed = [p for name, p in named.items() if name.endswith("weight") and ".ln_" not in name]
    plain = [p for p in named.values() if all(p is not q for q in positional + decayed)]
    assert len(positional) == 1 and len(decayed) == 5 and len(plain) == 10  # 3 norms with biases, 4 other biases
    groups = [(decayed, 0.5, 1.0), (plain, 0.0, 1.0), (positional, 0.0, 2.0)]
    parameters = [{"params": p, "weight_decay": decay} for p, decay, _ in groups]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), fused=False, foreach=False)
    split = open_data(config.data_dir).split("train")
    starts = WindowOrder(len(split), 16, 1).starts(0, 40)
    norms, curve = [], []
    for s in range(5):
        x, y = map(torch.from_numpy, batch(split, starts[8 * s : 8 * s + 8], 16))
        loss = F.cross_entropy(model(x)[0].view(-1, 320), y.view(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
        for p in model.parameters():
            p.grad *= min(1.0, 0.6 / norm.item())
        for group, (_, _, multiplier) in zip(optimizer.param_groups, groups):
            group["lr"] = multiplier * by_hand("cosine", s, config)
        optimizer.step()
        norms.append(norm.item())
        curve.append(loss.item())
    assert min(norms) > 0.65  # clipping acted, and the log has the norm before it
    assert losses(config.out_dir, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert losses(config.out_dir) == pytest.approx(curve, rel=1e-6)
    for name, value in last(config.out_dir)["model"].items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_grad_clip_0_does_not_clip(make):
    a, b, c = make("a", grad_clip=0.0), make("b", grad_clip=1e9), make("c", grad_clip=0.1)
    for config in (a, b, c):
        train(config)
    assert same(last(a.out_dir)["model"], last(b.out_dir)["model"])
    assert losses(a.out_dir, "grad_norm") == losses(b.out_dir, "grad_norm") != losses(c.out_dir, "grad_norm")


# ---- what schemes draw in a step, and losses of their own


def test_an_auxiliary_loss_is_trained_on_and_logged_apart(make):
    """Two steps again: the gradient is that of both, train/loss that of cross-entropy alone."""
    config = make(pos=f"{TOYS}:Penalty", max_steps=2, grad_clip=0.0, weight_decay=0.0)
    train(config)
    model = GPT(dataclasses.replace(config, vocab_size=320).model_config(), seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    split = open_data(config.data_dir).split("train")
    starts = WindowOrder(len(split), 16, 1).starts(0, 16)
    for s, line in enumerate(line for line in metrics(config.out_dir) if "train/loss" in line):
        x, y = map(torch.from_numpy, batch(split, starts[8 * s : 8 * s + 8], 16))
        _, loss = model(x, y)
        auxiliary = model.auxiliary()
        optimizer.zero_grad()
        (loss + auxiliary).backward()
        norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
        optimizer.param_groups[0]["lr"] = by_hand("cosine", s, config)
        optimizer.step()
        assert line["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert line["train/auxiliary"] == pytest.approx(auxiliary.item(), rel=1e-6)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert auxiliary.item() != 0.03125  # its initial value, 2 · 0.125², is trained on
    for name, value in last(config.out_dir)["model"].items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-6, msg=name)


def test_an_auxiliary_loss_that_is_not_finite_skips_the_step(make):
    def spoil(event, step, model):
        if event == "step" and step in (3, 4):
            model.transformer["h"][0].attn.pos.slope.data.fill_(math.inf if step == 3 else 0.125)

    config = make(pos=f"{TOYS}:Penalty", max_steps=6, eval_interval=0)
    train(config, spoil)
    assert [line["step"] for line in metrics(config.out_dir) if "skipped" in line] == [4]


@pytest.mark.slow
def test_what_schemes_draw_depends_on_seed_and_step_alone(make):
    """Equal in every micro-batch, and on resuming; other in another run or step."""
    pos = f"{TOYS}:Stretch+{TOYS}:Penalty"
    whole, cut, other, small = (make(name, pos=pos) for name in ("whole", "cut", "other", "small"))

    def drawn(seeds):
        return before_forward(lambda model, x, reduction: seeds.append(model.draw_seed) if model.training else None)

    first, second = [], []
    train(whole, drawn(first))
    train(cut, at_step({5: kill(signal.SIGTERM)}))
    train(dataclasses.replace(cut, resume=True))
    train(dataclasses.replace(other, seed=2), drawn(second))
    train(dataclasses.replace(small, micro_batch_size=1))
    assert same_run(whole.out_dir, cut.out_dir)
    assert len(first) == 24 and first[::2] == first[1::2] and len({*first} | {*second}) == 24
    for key in "train/loss", "train/auxiliary":
        assert len(losses(whole.out_dir, key)) == 12
        assert losses(small.out_dir, key) == pytest.approx(losses(whole.out_dir, key), rel=1e-5)
    assert not any("auxiliary" in key for line in metrics(whole.out_dir) if "val/loss" in line for key in line)


# ---- half precision


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("pos", [slow("rope"), slow("comrope"), "carope"])
def test_half_precision_stays_close(make, dtype, pos):
    half, full = make("half", dtype=dtype, pos=pos), make("full", pos=pos)
    train(half)
    train(full)
    assert losses(half.out_dir) == pytest.approx(losses(full.out_dir), rel=0.01)
    assert losses(half.out_dir) != losses(full.out_dir)
    assert not any("skipped" in line for line in metrics(half.out_dir))
    state = last(half.out_dir)
    assert all(p.dtype == torch.float32 for p in state["model"].values())
    assert bool(state["scaler"]) == (dtype == "float16")


@pytest.mark.slow
def test_the_scaler_is_saved_and_restored(make):
    whole, cut = make("whole", dtype="float16"), make("cut", dtype="float16", resume=True)
    train(whole)
    train(cut, at_step({5: kill(signal.SIGTERM)}))
    assert last(cut.out_dir)["scaler"]["_growth_tracker"] == 6
    train(cut)
    assert same_run(whole.out_dir, cut.out_dir) and last(cut.out_dir)["scaler"]["_growth_tracker"] == 12


@pytest.mark.slow
def test_a_run_may_be_resumed_in_another_dtype(make):
    for name, first, then in (("a", "float32", "float16"), ("b", "float16", "float32")):
        config = make(name, dtype=first)
        train(config, at_step({5: kill(signal.SIGTERM)}))
        assert train(dataclasses.replace(config, dtype=then, resume=True))["step"] == 12
        assert bool(last(config.out_dir)["scaler"]) == (then == "float16")


# ---- loss and gradients that are not finite


@pytest.mark.parametrize("value", [math.nan, slow(math.inf)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bad_step_is_skipped_and_counted(make, capsys, dtype, value):
    config = make(dtype=dtype, max_bad_steps=3)
    observer, weights = poison({(3, 0), (7, 0), (8, 0)}, value=value)
    train(config, observer)
    assert same(weights[3], weights[4]) and same(weights[7], weights[9]) and not same(weights[4], weights[5])
    skipped = [line for line in metrics(config.out_dir) if "skipped" in line]
    assert [line["step"] for line in skipped] == [4, 8, 9] and all(line["train/loss"] is None for line in skipped)
    assert [line["step"] for line in metrics(config.out_dir) if "grad_norm" in line] == list(range(1, 13))
    state = last(config.out_dir)
    assert state["bad_steps"] == 0 and state["optimizer"]["state"][0]["step"] == 9
    assert capsys.readouterr().err.count("skipped: loss") == 3
    if dtype == "float16":
        assert state["scaler"]["scale"] == 2**16 / 8


def test_bad_steps_stop_the_run_and_good_checkpoints_stay(make):
    config = make(checkpoint_interval=1, max_bad_steps=3, eval_interval=0)
    observer, weights = poison({(step, 0) for step in range(6, 100)})
    message = r"3 steps in a row up to step 9 .*learning rate .*rows at train_00000.bin at token \d+, "
    with pytest.raises(ValueError, match=message) as info:
        train(config, observer)
    assert "step_6.pt holds the very weights that failed" in str(info.value)
    assert [f.name for f in checkpoint.step_files(Path(config.out_dir))] == ["step_6.pt", "step_5.pt"]
    assert same(last(config.out_dir)["model"], weights[6])
    lines = (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert train(dataclasses.replace(config, resume=True))["step"] == 12  # once the cause is gone


def test_a_checkpoint_that_is_due_in_a_bad_step_is_written_after_it(make):
    config = make(checkpoint_interval=4, keep_checkpoints=9)
    train(config, poison({(3, 0), (4, 0), (11, 0)})[0])
    assert [f.name for f in checkpoint.step_files(Path(config.out_dir))] == ["step_12.pt", "step_8.pt", "step_6.pt"]
    assert last(config.out_dir)["bad_steps"] == 1  # the end is written in any case


@pytest.mark.slow
def test_an_interruption_among_bad_steps_is_exact_and_removes_nothing(make):
    whole, cut = make("whole", checkpoint_interval=2), make("cut", checkpoint_interval=2, resume=True)
    bad = {(5, 0), (6, 0), (7, 0)}
    train(whole, poison(bad)[0])
    observer = poison(bad)[0]
    assert train(cut, together(observer, at_step({6: kill(signal.SIGTERM)})))["step"] == 7
    assert [f.name for f in checkpoint.step_files(Path(cut.out_dir))] == ["step_7.pt", "step_4.pt", "step_2.pt"]
    assert last(cut.out_dir)["bad_steps"] == 2
    train(cut, observer)
    assert same_run(whole.out_dir, cut.out_dir)


def test_an_absurd_learning_rate(make, command):
    fields = dict(learning_rate=1e38, schedule="constant", warmup_steps=0, max_bad_steps=2, eval_interval=1)
    message = command(*arguments(make(**fields)))
    assert "2 steps in a row up to step 3 had a loss or gradient that is not finite (learning rate 1e+38" in message


# ---- memory


def test_out_of_memory_says_what_to_try(make):
    def hungry(model, x, reduction):
        if len(x) > 2 and reduction == "mean":
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB\nmore")

    observe = before_forward(hungry)
    where = r"out of memory at micro_batch_size 4 \(4 windows of 16 tokens\) on cpu"
    with pytest.raises(ValueError, match=rf"{where}: try --micro_batch_size 2; .*\(Tried to allocate 20.00 GiB\)"):
        train(make(), observe)
    assert train(make("smaller", micro_batch_size=2), observe)["step"] == 12


def test_a_model_that_is_too_large_says_so(make, monkeypatch):
    def hungry(*_):
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    monkeypatch.setattr("train.initial_model", hungry)
    with pytest.raises(ValueError, match="on cpu for the model alone: take a smaller model, or --fsdp true .*--plan"):
        train(make())


def test_what_deterministic_cannot_have(make):
    def undetermined(*_):
        raise RuntimeError("that_cuda does not have a deterministic implementation\nmore")

    with pytest.raises(ValueError, match="deterministic true cannot be had .*: that_cuda does not have a determin"):
        train(make(deterministic=True), before_forward(undetermined))


# ---- validation


def test_validation_is_the_mean_over_fixed_windows(make, plain):
    config = dataclasses.replace(make(), vocab_size=320)
    data = open_data(config.data_dir)
    (record,) = data.manifest["splits"]["val"]
    tokens = torch.from_numpy(np.fromfile(data.folder / record["file"], "<u2").astype(np.int64))
    windows = (len(tokens) - 1) // 16
    assert windows > 16  # fewer than all: eval_tokens 256
    starts = [16 * (i * windows // 16) for i in range(16)]
    for step in (12, 8):
        model = GPT(config.model_config())
        model.load_state_dict(checkpoint.load(plain / "checkpoints" / f"step_{step}.pt")["model"])
        pairs = [(tokens[None, s : s + 16], tokens[s + 1 : s + 17]) for s in starts]
        expected = sum(F.cross_entropy(model(x)[0][0], y).double().item() for x, y in pairs) / 16
        torch.manual_seed(0)
        before = torch.get_rng_state()
        found = Validation(data.split("val"), config, 5, Ranks(), CPU).loss(model, torch.float32)
        assert found == pytest.approx(expected, rel=1e-6)
        assert model.training and torch.equal(before, torch.get_rng_state())
        if step == 12:
            assert losses(plain, "val/loss")[-1] == pytest.approx(expected, rel=1e-6)


# ---- init_from


def test_init_from_a_run(make, plain):
    best = checkpoint.load(plain / "best.pt")["val_loss"]
    for source, expected in ((plain, losses(plain, "val/loss")[-1]), (plain / "best.pt", best)):
        config = make(f"from-{source.name}", init_from=str(source), max_steps=2, seed=9)
        train(config)
        assert metrics(config.out_dir)[0]["val/loss"] == expected
        state = last(config.out_dir)
        assert state["step"] == 2 and state["optimizer"]["state"][0]["step"] == 2  # weights only


@pytest.mark.slow
def test_init_from_a_run_with_a_base_by_name(make):
    """Its checkpoint has the number."""
    named = dict(pos_options={"base": "(1+ln2)^(D/2)"}, max_steps=1)
    source = make("named", **named)
    train(source)
    config = make("again", **named, init_from=source.out_dir)
    train(config)
    train(dataclasses.replace(config, resume=True, max_steps=2))
    assert last(config.out_dir)["config"]["pos_options"]["base"] == pytest.approx((1 + math.log(2)) ** 4)


def test_init_from_with_another_block_size(make, tmp_path):
    for pos in ("rope", "learned", "comrope"):
        train(make(pos, pos=pos, max_steps=2))
    still = dict(max_steps=1, learning_rate=1e-30, min_lr=0.0)
    for pos, size in (("rope", 32), ("rope", 8), ("learned", 8), ("comrope", 32)):
        config = make(f"{pos}{size}", pos=pos, block_size=size, init_from=str(tmp_path / pos), **still)
        train(config)
        state, source = last(config.out_dir), last(tmp_path / pos)["model"]
        for name, value in state["model"].items():
            torch.testing.assert_close(value, source[name][: len(value)])
        if pos == "comrope":
            assert state["config"]["pos_options"]["unit"] == 16.0  # the frequencies are the source's
    with pytest.raises(ValueError, match="learned positions end at block_size 16; they cannot be extended to 32"):
        train(make("grown", pos="learned", block_size=32, init_from=str(tmp_path / "learned")))
    assert not (tmp_path / "grown").exists()


@pytest.mark.slow
@pytest.mark.parametrize("pos", ["comrope", "comrope+alibi"])
def test_a_run_from_weights_resumes_without_them(make, tmp_path, pos):
    several = "+" in pos
    options = lambda **given: {"comrope": given} if several else given  # noqa: E731
    train(make("source", max_steps=2, block_size=8, pos=pos, pos_options=options(block=4)))
    more = dict(init_from=str(tmp_path / "source"), pos=pos)  # the options come with the weights
    whole, cut = make("whole", **more), make("cut", **more)
    train(whole)
    train(cut, at_step({5: kill(signal.SIGTERM)}))
    train(make("named", **more, pos_options=options(block=4), max_steps=1))
    with pytest.raises(ValueError, match="has another architecture than the config; it needs --pos_options .*4"):
        train(make("other", **more, pos_options=options(block=8)))
    (tmp_path / "source").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="pos_options was"):
        train(dataclasses.replace(cut, resume=True, pos_options=options(block=8)))
    train(dataclasses.replace(cut, resume=True, pos_options=options(block=4)))
    assert same_run(whole.out_dir, cut.out_dir)
    found = last(cut.out_dir)["config"]["pos_options"]
    expected = {
        "kind": "ap",
        "block": 4,
        "init": "rope",
        "base": 10000.0,
        "unit": 8.0,
        "axes": ["token"],
        "jitter": 0.0,
    }
    assert found == ({"comrope": expected, "alibi": {}} if several else expected)


@pytest.mark.slow
def test_init_from_gpt2_in_transformers_layout(make, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = dict(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256)
    theirs = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    fields = dict(init_from=str(tmp_path / "hf"), pos="learned", bias=True, vocab_size=300, n_layer=2, max_steps=1)
    config = make(**fields)
    train(config)
    validation = Validation(open_data(config.data_dir).split("val"), config, 4, Ranks(), CPU)
    nll = []
    with torch.no_grad():
        for start in validation.items:
            x, y = map(torch.from_numpy, validation.rows.read(np.array([start])))
            nll.append(F.cross_entropy(theirs(x).logits[0], y[0]).double().item())
    assert metrics(config.out_dir)[0]["val/loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    needs = r"it needs --n_layer 2 \(the config says 1\), --bias True .*, --vocab_size 300 .*, --pos learned"
    with pytest.raises(ValueError, match=needs):
        train(make("no", **{**fields, "n_layer": 1, "bias": False, "vocab_size": None, "pos": "rope"}))
    assert not (tmp_path / "no").exists()


def test_init_from_refuses_what_does_not_fit(make, plain, folders, tmp_path):
    (tmp_path / "empty").mkdir()
    shape = r"another architecture than the config; it needs --n_head 2 .*, --n_embd 16 \(the config says 32\)"
    tokenizer = "was trained with the tokenizer byte, which is not that of"
    for fields, message in (
        (dict(init_from=plain, n_embd=32, n_head=4), shape),
        (dict(init_from=plain, pos="carope"), "--pos rope .the config says carope"),
        (dict(init_from=plain, pos_options={"base": 500.0}), "--pos_options .*10000.0"),
        (dict(init_from=plain, window=4), "--window 0 .the config says 4"),
        (dict(init_from=plain, data_dir=str(folders / "gpt2")), tokenizer),
        (dict(init_from=tmp_path / "empty"), "holds no config.json"),
        (dict(init_from=folders / "small.jsonl"), "cannot be read as a checkpoint"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            train(make("no", **{**fields, "init_from": str(fields["init_from"])}))
        assert not (tmp_path / "no").exists()


# ---- checkpoints and the run's folder


def test_what_a_checkpoint_holds(make, plain):
    state = torch.load(plain / "last.pt", weights_only=True)
    assert not {"generators", "numpy", "python"} & state.keys()  # each step seeds them: a resumed run needs none
    assert {"model", "optimizer", "scaler", "step", "config", "data_hash", "tokenizer"} <= state.keys()
    data = open_data(make().data_dir)
    assert state["step"] == 12 and state["data_hash"] == data.hash
    assert state["tokenizer"]["sha256"] == data.tokenizer_hash
    shape = {f.name for f in dataclasses.fields(GPTConfig)}
    assert shape <= state["config"].keys() == {f.name for f in dataclasses.fields(RunConfig)}
    assert state["config"]["vocab_size"] == 320 and state["config"]["pos_options"]["base"] == 10000.0
    model = GPT(GPTConfig(**{name: state["config"][name] for name in shape}))
    model.load_state_dict(state["model"])
    head, embedding = state["model"]["lm_head.weight"], state["model"]["transformer.wte.weight"]
    assert head.data_ptr() == embedding.data_ptr()  # tied, and stored once

    def plain_types(x):
        if isinstance(x, dict):
            return all(map(plain_types, [*x.keys(), *x.values()]))
        if isinstance(x, (list, tuple)):
            return all(map(plain_types, x))
        return isinstance(x, (torch.Tensor, int, float, str, bool, type(None)))

    assert plain_types(state)


def test_the_runs_folder(plain):
    files = [".lock", "best.pt", "best.pt.sha256", "checkpoints", "config.yaml", "last.pt", "metrics.jsonl"]
    assert sorted(p.name for p in plain.iterdir()) == files
    files = ["step_12.pt", "step_12.pt.sha256", "step_8.pt", "step_8.pt.sha256"]
    assert sorted(p.name for p in (plain / "checkpoints").iterdir()) == files
    assert os.readlink(plain / "last.pt") == "checkpoints/step_12.pt" and not (plain / "best.pt").is_symlink()
    resolved = yaml.safe_load((plain / "config.yaml").read_text())
    assert resolved == checkpoint.load(plain / "last.pt")["config"]
    lines = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    assert lines[0].keys() == {"step", "environment"} and lines[0]["step"] == 0
    assert lines[1].keys() == {"step", "tokens", "val/loss"} and lines[1]["step"] == 0
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 5, 10, 12]
    training = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in training] == list(range(1, 13))
    assert [line["tokens"] for line in training] == list(range(128, 1537, 128))
    assert training[0].keys() == {"step", "tokens", "train/loss", "lr", "grad_norm", *TIMES}
    assert all(line["tokens_per_s"] > 0 and line["peak_memory"] > 2**20 for line in training)


def test_a_moved_run_is_whole(plain, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(plain, moved, symlinks=True)
    assert checkpoint.find(moved).resolve() == (moved / "checkpoints" / "step_12.pt").resolve()


@pytest.mark.parametrize("keep", [slow(1), 3])
def test_keep_checkpoints(make, keep):
    config = make(checkpoint_interval=2, keep_checkpoints=keep, eval_interval=0)
    train(config)
    kept = [f"step_{n}.pt" for n in (12, 10, 8)[:keep]]
    assert [f.name for f in checkpoint.step_files(Path(config.out_dir))] == kept
    assert len([*Path(config.out_dir, "checkpoints").iterdir()]) == 2 * keep  # each with its hash, no others


def test_best_is_the_best(make):
    figures = [0.5, 5.0, 3.0, 4.0, math.nan, 3.5]  # the first is before training
    config = make(eval_interval=1, max_steps=5, keep_checkpoints=9, checkpoint_interval=1)
    train(config, scripted_validation(figures))
    run = Path(config.out_dir)
    best = checkpoint.load(run / "best.pt")
    assert (best["step"], best["val_loss"]) == (2, 3.0)
    assert same(best["model"], checkpoint.load(checkpoint.find(run, "2"))["model"])
    assert losses(run, "val/loss") == [0.5, 5.0, 3.0, 4.0, None, 3.5] and last(run)["best_val_loss"] == 3.0


@pytest.mark.slow
def test_best_survives_resuming(make):
    observer = scripted_validation([9.0, 3.0, 4.0, 5.0, 3.5, 3.25])
    config = make(eval_interval=1, max_steps=5)
    train(config, together(observer, at_step({2: kill(signal.SIGTERM)})))
    train(dataclasses.replace(config, resume=True), observer)
    assert losses(config.out_dir, "val/loss") == [9.0, 3.0, 4.0, 5.0, 3.5, 3.25]
    assert checkpoint.load(Path(config.out_dir) / "best.pt")["step"] == 1


@contextlib.contextmanager
def full_disk(name, until=math.inf):
    """Yields an observer with which writing the files called `name…` fails in the middle, as on a full disk, at the
    steps before `until`."""
    with contextlib.ExitStack() as limit:

        def observe(event, step, path):
            if event == "write":
                limit.close()  # the file before is done
                if path.name.startswith(name) and step < until:
                    limit.enter_context(small_files(20_000))

        yield observe


@pytest.mark.parametrize("name", ["step_8.pt", slow("best.pt")])
def test_training_goes_on_while_the_disk_is_full(make, plain, capsys, name):
    """It says so, what was good stays, and what there is room for later is written."""
    config = make(eval_interval=5)
    with full_disk(name, until=9) as observer:
        train(config, observer)
    err = capsys.readouterr().err
    assert err.count("a checkpoint could not be written") == 1 and "File too large" in err and name in err
    assert "the newest good one is of step 4" in err
    assert same_run(config.out_dir, plain)
    kept = [f.name for f in checkpoint.step_files(Path(config.out_dir))]
    assert kept == (["step_12.pt", "step_4.pt"] if name == "step_8.pt" else ["step_12.pt", "step_8.pt"])
    assert same(checkpoint.load(Path(config.out_dir) / "best.pt")["model"], last(plain)["model"])
    assert not [*Path(config.out_dir).rglob("*.partial")]


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_an_error_and_loses_nothing(make, command, plain, tmp_path):
    config = make(eval_interval=0)
    with pytest.raises(RuntimeError):
        train(config, at_step({6: crash}))
    before = files_of(tmp_path / "run")
    with full_disk("step_") as observer:
        message = command(*arguments(config), "--resume", "true", observe=observer)
    assert "the checkpoint of step 12 could not be written" in message and "File too large" in message
    assert "step 4 is where --resume true continues" in message
    after = files_of(tmp_path / "run")
    for changing in ("metrics.jsonl", "config.yaml", "best.pt", "best.pt.sha256"):
        before.pop(changing, None), after.pop(changing, None)
    assert after == before
    train(dataclasses.replace(config, resume=True))
    assert same(last(tmp_path / "run")["model"], last(plain)["model"])


def test_a_file_in_the_way_of_the_folder(make, command, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert "run" in command(*arguments(make()))
    assert "run" in command(*arguments(make("run/below")))
    assert (tmp_path / "run").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(make, command, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "ermission" in command(*arguments(make("locked/run")))


# ---- wandb and torch.compile


@pytest.mark.slow
def test_wandb_is_not_imported_and_a_missing_compiler_is_no_error(make, tmp_path):
    code = "import sys, train; train.main(); print('wandb' in sys.modules)"
    config = make(compile=True, max_steps=2)
    status, out, err = finish(start(["-c", code, *arguments(config)], tmp_path, CXX="/nonexistent", CC="/nonexistent"))
    assert status == 0 and out.strip() == "False"
    assert "warning: torch.compile does not work here, training goes on without it" in err and "Traceback" not in err
    plain = make("eager", max_steps=2)
    train(plain)
    assert same(last(config.out_dir)["model"], last(plain.out_dir)["model"])


@pytest.mark.slow
def test_compiled_training_is_the_same_up_to_rounding(make):
    """By inductor: a graph to see whether it works, the block's for training and validation, which serve both blocks,
    and the loss's for both."""
    if not compiler_works(CPU):
        pytest.skip("no C++ compiler on this machine")
    fields = dict(pos="rope", n_layer=2, max_steps=8)  # every scheme compiles in tests/test_compile.py
    compiled, eager = make("compiled", compile=True, **fields), make("eager", **fields)
    torch._dynamo.reset()
    counters.clear()
    train(compiled)
    assert counters["stats"]["unique_graphs"] == 5 and not counters["graph_break"]
    train(eager)
    for key in ("train/loss", "val/loss", "grad_norm"):
        assert losses(compiled.out_dir, key) == pytest.approx(losses(eager.out_dir, key), rel=1e-4)
    found, expected = (last(config.out_dir) for config in (compiled, eager))
    assert found["model"].keys() == expected["model"].keys()
    moments, others = (run["optimizer"]["state"] for run in (found, expected))
    for i, other in others.items():  # every gradient shows in its own first moment
        assert relative_error(moments[i]["exp_avg"], other["exp_avg"]) < 1e-3, i


@pytest.mark.slow
def test_wandb_without_a_login_goes_offline(make, tmp_path):
    (home := tmp_path / "home").mkdir()
    clean = {k: "" for k in ENVIRONMENT if k.startswith("WANDB")}
    clean |= {k: str(home) for k in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    config = make(wandb="online", max_steps=3)
    status, _, err = finish(start([REPO / "train.py", *arguments(config)], tmp_path, **clean))
    assert status == 0 and "Traceback" not in err
    assert "warning: wandb is not logged in" in err and "wandb sync" in err
    (run,) = Path(config.out_dir, "wandb").glob("offline-run-*")
    assert [*run.glob("run-*.wandb")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "run"] and not [*home.iterdir()]
    without = make("without", max_steps=3)
    train(without)
    assert same(last(config.out_dir)["model"], last(without.out_dir)["model"])


class FakeWandb(types.ModuleType):
    """Stands for wandb where the server cannot be reached."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")
        self.modes, self.lines = [], []

    def login(self, **_):
        return True

    def teardown(self):
        self.modes.append("teardown")

    def init(self, mode, **_):
        self.modes.append(mode)
        if mode == "online":
            raise self.Error("Timed out\nsecond line")
        log = lambda values, step: self.lines.append(step)  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda exit_code: self.modes.append(exit_code))


def test_wandb_out_of_reach_goes_offline(make, monkeypatch, capsys):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_CACHE_DIR", "unused")
    train(make(wandb="online", max_steps=3))
    assert fake.modes == ["online", "teardown", "offline", 0] and fake.lines == [0, 1, 2, 3, 3]
    warning = "warning: wandb cannot be used online, logging offline; `wandb sync` uploads later: Timed out\n"
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize("broken", [slow("login"), "init"])
def test_a_wandb_that_does_not_start_does_not_end_the_run(make, plain, monkeypatch, capsys, broken):
    """Such as with a WANDB_API_KEY that is none, or where it cannot write."""
    fake = FakeWandb()

    def fail(**_):
        raise ValueError("API key must have 40+ characters\nsecond line")

    setattr(fake, broken, fail)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_CACHE_DIR", "unused")
    config = make(wandb="online")
    train(config)
    assert same(metrics(config.out_dir), metrics(plain)) and "second" not in (err := capsys.readouterr().err)
    assert "uploads later: API key must have 40+ characters\n" in err
    assert fake.modes == (["teardown", "offline", 0] if broken == "login" else ["teardown"])
    assert ("training goes on without" in err) == (broken == "init")


# ---- bad input


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(n_lyer=3), ["n_lyer", "did you mean n_layer?"]),
        (dict(zzz=3), ["zzz"]),
        (dict(n_layer="two"), ["n_layer", "int", "two"]),
        (dict(n_layer=1.5), ["n_layer", "int", "1.5"]),
        (dict(n_layer="null"), ["n_layer", "int", "None"]),
        (dict(pos_options="null"), ["pos_options", "dict", "None"]),
        (dict(learning_rate="fast"), ["learning_rate", "float", "fast"]),
        (dict(learning_rate="nan"), ["learning_rate"]),
        (dict(learning_rate=math.inf), ["learning_rate", "float", "inf"]),
        (dict(bias="maybe"), ["bias", "bool", "maybe"]),
        (dict(schedule="cosin"), ["schedule", "cosine", "step", "wsd", "constant"]),
        (dict(dtype="fp16"), ["dtype", "float16"]),
        (dict(wandb="yes"), ["wandb", "offline"]),
        (dict(pos="ropes"), ["pos 'ropes' is no scheme", "did you mean rope?", "alibi"]),
        (dict(pos_options={"bas": 3}), ["unknown option 'bas'", "did you mean base?", "rope takes base"]),
        (dict(pos_options={"base": "big"}), ["base of rope cannot be 'big'"]),
        (dict(pos_options="["), ["pos_options"]),
        ({"pos": "comrope", "pos_options.block": "3"}, ["block of comrope cannot be 3", "(2, 4, 8)"]),
        ({"pos_options.block": "["}, ["pos_options"]),
        (dict(pos="comrope", n_embd=12, n_head=2), ["block 8 must divide the head width", "6"]),
        (dict(n_head=16), ["head width", "must be even"]),
        (dict(n_head=3), ["n_embd 16 must be a multiple of n_head 3"]),
        (dict(batch_tokens=100), ["batch_tokens 100 must be a multiple of block_size 16, such as 96"]),
        (dict(batch_tokens=4), ["batch_tokens 4", "such as 16"]),
        (dict(micro_batch_size=3), ["micro_batch_size 3 does not divide", "1, 2, 4, 8"]),
        (dict(micro_batch_size=0), ["micro_batch_size must be at least 1 or null, not 0"]),
        (dict(micro_batch_size="auto", fsdp=True), ["micro_batch_size auto", "fsdp", "give a number"]),
        (dict(compile_mode="max-autotune-no-cudagraphs"), ["compile_mode", "give compile true too"]),
        (dict(compile_mode="reduce-overhead", compile=True), ["compile_mode", "max-autotune-no-cudagraphs"]),
        (dict(n_layer=0, vocab_size=512), ["n_layer must be a positive whole number, not 0"]),
        (dict(n_embd=-16), ["n_embd", "-16"]),
        (dict(block_size=-16, batch_tokens=0), ["block_size must be at least 1, not -16", "batch_tokens"]),
        (dict(max_steps=-1, eval_tokens=0), ["max_steps", "eval_tokens"]),
        (dict(keep_checkpoints=0, log_interval=0, lr_step=0), ["keep_checkpoints", "log_interval", "lr_step"]),
        (dict(eval_interval=-1, checkpoint_interval=-1), ["eval_interval must not be negative", "checkpoint_interval"]),
        (dict(warmup_steps=-1, weight_decay=-0.1, grad_clip=-1.0), ["warmup_steps", "weight_decay", "grad_clip"]),
        (dict(pos_lr_multiplier=-1.0, lr_gamma=0.0), ["pos_lr_multiplier", "lr_gamma must be positive"]),
        (dict(beta1=1.0, beta2=-0.1), ["beta1 must lie in [0, 1), not 1.0", "beta2"]),
        (dict(decay_fraction=0.0), ["decay_fraction must lie in (0, 1], not 0.0"]),
        (dict(window=-1), ["window must be a whole number from 0 on", "-1"]),
        (dict(window="[4, x]"), ["window", "x"]),
        (dict(window=1.5), ["window", "int", "1.5"]),
        (dict(pos="[rope, ropes]"), ["pos 'ropes' is no scheme", "did you mean rope?"]),
        (dict(pos="rope+rope"), ["pos rope+rope has two schemes of one name"]),
        (dict(pos="[]"), ["pos must be a scheme's name or a list of them, not []"]),
        (dict(pos="nowhere.py:My"), ["nowhere.py, which is not there"]),
        (dict(learning_rate=1e-4), ["min_lr 0.0003 exceeds learning_rate 0.0001"]),
        (dict(dropout=1.0), ["dropout must lie in [0, 1), not 1.0"]),
        (dict(seed=-1, data_seed=-1), ["seed must not be negative", "data_seed must not be negative"]),
        (dict(data_seed=2**64), ["data_seed"]),
        (dict(vocab_size=100), ["vocab_size 100 is smaller than the 257"]),
        (dict(block_size=10**5, batch_tokens=10**5), ["too few for one window of block_size 100000"]),
        (dict(data_dir="nowhere"), ["no data folder nowhere", "data/prepare.py"]),
        (dict(data_dir="."), ["not a finished data folder"]),
        (dict(device="gpu"), ["device 'gpu'"]),
        (dict(device="meta"), ["device 'meta' cannot be used"]),
        (dict(init_from="/nowhere/at/all"), ["/nowhere/at/all"]),
    ],
)
def test_bad_fields(make, command, tmp_path, fields, expected):
    named = {name.partition(".")[0] for name in fields}
    good = {k: v for k, v in vars(make(micro_batch_size=None)).items() if k not in named}
    message = command(*words({**good, **fields}))
    for part in expected:
        assert part in message, message
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(make, command, tmp_path):
    assert "device 'cuda' cannot be used" in command(*arguments(make(device="cuda")))
    assert not [*tmp_path.iterdir()]


def test_wandb_where_it_is_not_installed(make, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb is not installed: pip install wandb, or --wandb off" in command(*arguments(make(wandb="offline")))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("n_lyer: 3", ["n_lyer", "did you mean n_layer?"]),
        ("n_layer: two", ["n_layer", "two"]),
        ("n_layer: [1\nbias: 2\n  : 3", ["line 2"]),
        ("\tn_layer: 1", ["line 1"]),
        ("- 1\n- 2", ["1"]),
        ("just words", ["just words"]),
        ("", []),
        ("\x00\x01", []),
        ("n_layer:\nseed: 1", ["n_layer must not be null"]),
        ("pos_options:\nseed: 1", ["pos_options must not be null"]),
        ("n_layer: ", ["n_layer"]),
        ("min_lr: .inf", ["min_lr", "inf"]),
        ("pos_options: [1]", ["pos_options"]),
        ("model: {n_layer: 3}", ["model"]),
    ],
)
def test_bad_config_files(make, command, tmp_path, text, expected):
    (tmp_path / "bad.yaml").write_text(text)
    message = command("--config", tmp_path / "bad.yaml", "--out_dir", tmp_path / "run")
    assert all(part in message for part in expected), message
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


def test_bad_command_lines(command, tmp_path):
    assert "missing.yaml" in command("--config", tmp_path / "missing.yaml")
    assert str(tmp_path) in command("--config", tmp_path)
    assert "n_layer" in command("--n_layer")
    assert "stray" in command("stray")
    assert "--n_lay" in command("--n_lay", 3)  # no abbreviations: a field is named or it is wrong
    # Without --plan a run would start
    for option in (["--schemes"], ["--gpus", 8], ["--mfu", 0], ["--price_per_hour", 2.5]):
        assert f"{option[0]} goes with --plan" in command(*option, "--out_dir", tmp_path / "run")
    assert "two questions" in command("--plan", "--diff", tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_data(make, command, folders, tmp_path):
    shutil.copytree(folders / "small", tmp_path / "data")
    (shard,) = (tmp_path / "data").glob("train_*.bin")
    content = shard.read_bytes()
    for altered in (content[:-2], bytes([content[0] ^ 1]) + content[1:]):
        shard.write_bytes(altered)
        assert shard.name in command(*arguments(make(data_dir=str(tmp_path / "data"))))
        assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_left_alone(make, command, plain, tmp_path):
    before = files_of(plain)
    assert "already holds a run: continue it with --resume true, or choose another --out_dir" in command(
        *arguments(make(out_dir=str(plain)))
    )
    assert files_of(plain) == before


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(seed=2), "seed was 1, now 2"),
        (dict(data_seed=2), "data_seed was 1, now 2"),
        (dict(data_order="drawn"), "data_order was feistel, now drawn"),
        (dict(pos="carope"), "pos was rope, now carope"),
        (dict(pos=["rope"]), "pos was rope, now ['rope']"),
        (dict(pos_options={"base": 500.0}), "pos_options was"),
        (dict(window=4), "window was 0, now 4"),
        (dict(window=[4]), "window was 0, now [4]"),
        (dict(pos_lr_matrices=True), "pos_lr_matrices was False, now True"),
        (dict(block_size=8), "block_size was 16, now 8"),
        (dict(batch_tokens=256), "batch_tokens was 128, now 256"),
        (dict(n_embd=32, dropout=0.1), "n_embd was 16, now 32; dropout was 0.0, now 0.1"),
        (dict(bias=True), "bias was False, now True"),
        (dict(vocab_size=512), "vocab_size was 320, now 512"),
        (dict(data_dir="other"), "is not what the run began with"),
        (dict(data_dir="gpt2"), "is not what the run began with"),
    ],
)
def test_what_may_not_change_on_resume(make, command, plain, folders, fields, expected):
    before = files_of(plain)
    if "data_dir" in fields:
        fields = {"data_dir": str(folders / fields["data_dir"])}
    message = command(*arguments(make(out_dir=str(plain), resume=True, **fields)))
    assert f"cannot resume {plain}: " in message and expected in message, message
    assert files_of(plain) == before


def test_a_run_from_before_there_were_windows_resumes(make, plain, tmp_path, command):
    """Nor some options of its scheme, nor a hash of the data that leaves out where they came from."""
    run = tmp_path / "run"
    shutil.copytree(plain, run, symlinks=True)
    for path in checkpoint.step_files(run):
        state = checkpoint.load(path)
        state["config"].pop("window"), state["config"]["pos_options"].pop("qkv")
        state["data_hash"] = open_data(state["config"]["data_dir"]).manifest_hash
        checkpoint.save(path, state)
    config = make(resume=True, max_steps=14)
    assert "pos_options was" in command(*arguments(dataclasses.replace(config, pos_options={"qkv": "grouped"})))
    assert "window was 0, now 4" in command(*arguments(dataclasses.replace(config, window=4)))
    train(config)
    assert last(run)["step"] == 14 and last(run)["config"]["window"] == 0


def test_a_run_from_before_there_was_a_choice_of_order_goes_on_in_its_own(make):
    whole, begun = make("whole", data_order="drawn"), make("begun", data_order="drawn")
    train(whole)
    with pytest.raises(RuntimeError, match="power is out"):
        train(begun, at_step({6: crash}))
    for path in checkpoint.step_files(Path(begun.out_dir)):
        state = checkpoint.load(path)
        assert state["config"].pop("data_order") == "drawn"
        checkpoint.save(path, state)
    train(make("begun", resume=True), at_step({9: kill(signal.SIGTERM)}))
    assert last(begun.out_dir)["step"] == 10 and last(begun.out_dir)["config"]["data_order"] == "drawn"
    train(make("begun", resume=True))  # and again, now that it is recorded
    assert same_run(whole.out_dir, begun.out_dir) and last(begun.out_dir)["config"]["data_order"] == "drawn"
    train(make("other"))
    assert losses(make("other").out_dir) != losses(whole.out_dir)


@pytest.mark.slow
def test_a_real_process_says_one_line_and_fails(make, tmp_path):
    status, out, err = finish(start([REPO / "train.py", *arguments(make(pos="roop"))], tmp_path))
    assert status == 1 and out == "" and not [*tmp_path.iterdir()]
    assert err.startswith("error: pos 'roop' is no scheme") and err.count("\n") == 1


def test_a_second_interrupt_ends_at_once(make, capsys):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as info:
        main(arguments(make()), at_step({5: twice}))
    assert info.value.code == 130 and "--resume true" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler and last(make().out_dir)["step"] == 4


@pytest.mark.slow
def test_two_processes_cannot_train_in_one_folder(make, tmp_path):
    run = tmp_path / "run"
    train(make(max_steps=4))
    before = files_of(run)
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{code}; print('held', flush=True); time.sleep(60)", run / ".lock"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is training"):
            train(make(max_steps=8, resume=True))
        assert files_of(run) == before
    finally:
        holder.kill()
        holder.wait()
    assert train(make(max_steps=8, resume=True))["step"] == 8  # a dead process holds nothing


# ---- the environment, the difference from another run, the plan


def test_metrics_begin_with_the_environment(make, plain):
    (there,) = environments(plain)
    data = open_data(make().data_dir)
    assert there["data_hash"] == data.hash and (there["seed"], there["data_seed"], there["ranks"]) == (1, 1, 1)
    assert (there["torch"], there["dtype"]) == (torch.__version__, "float32")
    assert there["attention"] == "sdpa flash_attention"
    assert there["git"] is None or len(there["git"]["commit"]) == 40
    config = make(pos="alibi", max_steps=4)
    train(config)
    assert environments(config.out_dir)[0]["attention"] == "sdpa with a dense bias, by chunks"
    train(dataclasses.replace(config, resume=True, max_steps=6))
    assert len(environments(config.out_dir)) == 1  # nothing has changed
    first, *lines = all_lines(config.out_dir)
    first["environment"]["git"] = {"commit": "0" * 40, "dirty": True}  # it was begun with another commit
    text = "".join(json.dumps(line) + "\n" for line in (first, *lines))
    (Path(config.out_dir) / "metrics.jsonl").write_text(text)
    train(dataclasses.replace(config, resume=True, max_steps=8))
    before, now = environments(config.out_dir)
    assert before["git"]["commit"] == "0" * 40 and now["git"] == there["git"]


def test_git_state_of_a_repository(tmp_path):
    assert git_state(tmp_path) is None or "commit" in git_state(tmp_path)  # tmp_path may lie inside a repository

    def git(*words):
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@y", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD").strip(), "dirty": False}
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path)["dirty"]


def diff(capsys, config, run):
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        main([*arguments(config), "--diff", str(run)])
    return info.value.code, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "content, words",
    [
        (b"pos: [", "config.yaml: line 1, column 7: while parsing a flow"),
        (b"", "config.yaml is no config of a run"),
        (b"- 1", "config.yaml: expected names and values"),
        (b"pos: rope\nseed: 1\nseed: 2\n", "'seed' stands twice"),
        (b"\xff\xfe\x00", "config.yaml: 'utf-8' codec"),
        (None, "No such file"),
    ],
)
def test_diff_from_what_is_no_config(make, command, tmp_path, content, words):
    (tmp_path / "other").mkdir()
    if content is not None:
        (tmp_path / "other" / "config.yaml").write_bytes(content)
    assert words in command(*arguments(make()), "--diff", tmp_path / "other")
    assert "empty path" in command(*arguments(make()), "--diff", "")


def test_diff_from_a_run_with_odd_values(make, plain, capsys, tmp_path):
    shutil.copytree(plain, tmp_path / "other", symlinks=True)
    (tmp_path / "other" / "metrics.jsonl").write_text('{"environment": {}}\n{"environment": 4}\n')
    assert diff(capsys, make("mine"), tmp_path / "other") == (0, [f"no difference from {tmp_path / 'other'}"])
    there = yaml.safe_load((plain / "config.yaml").read_text()) | {"pos_options": {1: 2, "base": 3}}
    for pos, status in (("alibi", 1), ("rope", f"error: {tmp_path}/other/config.yaml: pos_options: unknown option 1")):
        (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump(there | {"pos": pos}))
        assert str(diff(capsys, make("mine"), tmp_path / "other")[0]).startswith(str(status))


def test_diff(make, plain, folders, capsys, tmp_path):
    assert diff(capsys, make("mine"), plain) == (0, [f"no difference from {plain}"])
    assert diff(capsys, make("mine", vocab_size=320, pos_options={"base": 10000.0}), plain)[0] == 0
    assert not (tmp_path / "mine").exists()
    scheme = dict(pos="comrope", pos_options={"block": 2})
    other = make("mine", learning_rate=1e-3, micro_batch_size=2, data_dir=str(folders / "other"), **scheme)
    status, lines = diff(capsys, other, plain)
    assert status == 1 and lines[0] == "pos: rope there, comrope here"
    assert "learning_rate: 0.003 there, 0.001 here" in lines
    assert any(line.startswith("pos_options: ") and "'block': None" in line and "'block': 2" in line for line in lines)
    assert any(line.startswith("data: its hash is ") for line in lines)
    assert lines[-1] == "micro_batch_size: 4 there, 2 here (changes rounding at most)"
    status, lines = diff(capsys, make("mine", data_dir="not/yet", seed=2), plain)
    assert status == 1 and lines[0] == "seed: 1 there, 2 here" and not any("vocab" in line for line in lines)
    assert "error" in diff(capsys, make("mine"), tmp_path / "nothing")[0]


@pytest.mark.slow
def test_diff_from_a_run_made_before_there_were_windows(make, plain, capsys, tmp_path):
    shutil.copytree(plain, tmp_path / "old", symlinks=True)
    path = tmp_path / "old" / "config.yaml"
    text = path.read_text()
    fields = yaml.safe_load(text)
    assert all(fields.pop(name, "absent") == value for name, value in {**SINCE, "data_order": "feistel"}.items())
    assert fields["pos_options"].pop("qkv") == "dense"
    path.write_text(yaml.safe_dump(fields))
    assert diff(capsys, make("mine"), tmp_path / "old") == (1, ["data_order: drawn there, feistel here"])
    make = functools.partial(make, data_order="drawn")
    assert diff(capsys, make("mine"), tmp_path / "old")[0] == 0
    grouped = ["pos_options: {'qkv': 'dense'} there, {'qkv': 'grouped'} here"]
    assert diff(capsys, make("mine", pos_options={"qkv": "grouped"}), tmp_path / "old") == (1, grouped)
    assert diff(capsys, make("mine", window=[4]), tmp_path / "old") == (1, ["window: 0 there, [4] here"])
    for more in ({}, {"data_dir": "not/yet"}):
        status, lines = diff(capsys, make("mine", document_mask=True, **more), tmp_path / "old")
        assert status == 1 and lines[0] == "document_mask: False there, True here"


def test_plan_trains_nothing(make, command, capsys, tmp_path):
    main([*arguments(make()), "--plan", "--gpus", "2", "--price_per_hour", "3"])
    out = capsys.readouterr().out
    assert "8,240" in out and "8 windows of 16 = 2 rank(s) × 1 × micro_batch_size 4" in out
    assert "2 × A100" in out and "cost at 3 per GPU-hour" in out
    assert not (tmp_path / "run").exists()
    assert "do not divide over 3 ranks" in command(*arguments(make()), "--plan", "--gpus", "3")
