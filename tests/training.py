"""Tiny runs for the tests of training: data, configs, processes, and how two runs are compared."""

import contextlib
import errno
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.prepare import prepare
from nanope import REPO, checkpoint
from nanope.config import RunConfig
from train import main, train

CPU = torch.device("cpu")
TOYS = REPO / "tests" / "schemes" / "toys.py"  # schemes that draw positions, or have a loss of their own
TIMES = ("tokens_per_s", "mfu", "peak_memory")
TINY = dict(
    block_size=16, n_layer=1, n_head=2, n_embd=16, batch_tokens=128, micro_batch_size=4, max_steps=12,
    learning_rate=3e-3, min_lr=3e-4, warmup_steps=3, eval_interval=5, eval_tokens=256, checkpoint_interval=4,
    log_interval=1, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_text(path, seed, documents):
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 7))) for _ in range(60)]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=120))}) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data folders: `small` (about 3,000 training tokens), `other` text, and small text in GPT-2's tokens."""
    base = tmp_path_factory.mktemp("data")
    small, other = write_text(base / "small.jsonl", 1, 7), write_text(base / "other.jsonl", 2, 7)
    prepare("files", base / "small", small, "byte", val_tokens=600)
    prepare("files", base / "other", other, "byte", val_tokens=600)
    prepare("files", base / "gpt2", small, "gpt2", val_tokens=300)
    return base


@pytest.fixture
def make(folders, tmp_path):
    """make(name, field=value, …): the RunConfig of a tiny run in tmp_path/name."""

    def config(name="run", **fields):
        return RunConfig(**{**TINY, "data_dir": str(folders / "small"), "out_dir": str(tmp_path / name), **fields})

    return config


@pytest.fixture(scope="module")
def plain(folders, tmp_path_factory):
    """A finished run of TINY, to compare with: its folder. Not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "plain"
    train(RunConfig(**TINY, data_dir=str(folders / "small"), out_dir=str(run)))
    return run


@pytest.fixture
def command(capsys):
    """command(*arguments): the one line that `train.py …` ends with, having failed without a traceback."""

    def run(*given, **options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as info:
            main([*map(str, given)], **options)
        code, err = info.value.code, capsys.readouterr().err
        message = code if isinstance(code, str) else err.strip()
        assert code not in (0, None) and message.startswith("error: ") and "\n" not in message, message
        return message

    return run


def words(fields):
    """The command line of some fields."""
    text = lambda v: json.dumps(v) if isinstance(v, (bool, dict, list)) else str(v)  # noqa: E731
    return [word for k, v in fields.items() if v is not None for word in (f"--{k}", text(v))]


def arguments(config):
    """The command line of a RunConfig."""
    return words(vars(config))


def all_lines(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def metrics(run):
    """Lines of metrics.jsonl without times and without those of the environment."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in all_lines(run) if "environment" not in line]


def environments(run):
    return [line["environment"] for line in all_lines(run) if "environment" in line]


def losses(run, key="train/loss"):
    return [line[key] for line in metrics(run) if key in line]


def files_of(run):
    """The content of every file of a folder."""
    return {str(p.relative_to(run)): p.read_bytes() for p in Path(run).rglob("*") if p.is_file()}


def last(run):
    return checkpoint.load(checkpoint.find(run))


def same(a, b):
    """Equality to the bit of nested dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


def same_run(a, b):
    """Two runs ended with the same bits and logged the same figures."""
    x, y = last(a), last(b)
    assert same(metrics(a), metrics(b)) and environments(a) == environments(b) and "environment" in all_lines(a)[0]
    for key in ("model", "optimizer", "scaler", "step", "best_val_loss", "val_loss", "watched", "bad_steps"):
        assert same(x[key], y[key]), key
    return True


# ---- observers: what a test does at some moment of a run, as train(config, observe=…)


def at_step(actions):
    """An observer that calls actions[s]() at the beginning of optimizer step s, once each."""

    def observe(event, step, subject):
        if event == "step":
            actions.pop(step, lambda: None)()

    return observe


def at_write(action):
    """An observer that calls action(step, path) before a checkpoint's file is written, in the writer's thread."""
    return lambda event, step, path: action(step, path) if event == "write" else None


def after_forward(change):
    """An observer after which each forward pass returns change(model, x, reduction, loss) instead of its loss."""

    def hook(model, arguments, options, output):
        if output[1] is None:  # without targets
            return output
        return output[0], change(model, arguments[0], options.get("reduction", "mean"), output[1])

    return lambda event, step, model: model.register_forward_hook(hook, with_kwargs=True) if event == "ready" else None


def before_forward(look):
    """An observer after which look(model, x, reduction) is called before each forward pass."""

    def hook(model, arguments, options):
        look(model, arguments[0], options.get("reduction", "mean"))

    return lambda event, step, model: (
        model.register_forward_pre_hook(hook, with_kwargs=True) if event == "ready" else None
    )


def together(*observers):
    """One observer that is several."""
    return lambda *seen: [observe(*seen) for observe in observers]


def poison(bad, rows=2, value=math.nan):
    """(observer, weights): the loss of each (step, micro-step) in `bad` is multiplied by `value`; there are `rows`
    micro-steps a step. `weights` is a list that receives the weights at the beginning of each step."""
    calls, weights = [0], []

    def change(model, idx, reduction, loss):
        if reduction != "mean":
            return loss
        at = divmod(calls[0], rows)
        calls[0] += 1
        return loss * value if at in bad else loss

    def observe(event, step, model):
        if event == "step":
            weights.append({k: v.clone() for k, v in model.state_dict().items()})

    return together(after_forward(change), observe), weights


def scripted_validation(figures, batches=4):
    """An observer after which the validations of a run, of so many batches each, give these losses."""
    calls = [0]

    def change(model, idx, reduction, loss):
        if reduction == "none":
            loss = torch.full_like(loss, figures[calls[0] // batches])
            calls[0] += 1
        return loss

    return after_forward(change)


def no_room(step, path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@contextlib.contextmanager
def small_files(limit):
    """No file may grow beyond `limit` bytes: a write that fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def kill(number):
    return lambda: os.kill(os.getpid(), number)


def crash():
    raise RuntimeError("the power is out")


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


def start(command, cwd, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=cwd, env=ENVIRONMENT | environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, timeout=120):
    """(exit status, stdout, stderr) of a process, which is ended where it takes too long."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks
            process.communicate(timeout=60)
    return process.returncode, out, err


def wait_for_lines(run, count, process):
    """Until metrics.jsonl has so many lines."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError):
            if (Path(run) / "metrics.jsonl").read_bytes().count(b"\n") >= count:
                return
        time.sleep(0.02)
    process.terminate()
    raise AssertionError(f"no {count} lines: {process.communicate(timeout=60)}")
