"""Tiny runs for the tests of training: data, configs, processes, and how two runs are compared."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train as train_module
from data.prepare import prepare
from nanope import REPO, checkpoint
from nanope.config import RunConfig
from train import learning_rate, train

CPU = torch.device("cpu")
TIMES = ("tokens_per_s", "mfu", "peak_memory")
TINY = dict(
    block_size=16, n_layer=1, n_head=2, n_embd=16, batch_tokens=128, micro_batch_size=4, max_steps=12, learning_rate=3e-3, min_lr=3e-4,
    warmup_steps=3, eval_interval=5, eval_tokens=256, checkpoint_interval=4, log_interval=1, device="cpu",
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


def arguments(config):
    """The command line of a RunConfig."""
    given = [(k, v) for k, v in vars(config).items() if v is not None]
    return [text for k, v in given for text in (f"--{k}", json.dumps(v) if isinstance(v, (bool, dict)) else str(v))]


def all_lines(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def metrics(run):
    """Lines of metrics.jsonl without times and without those of the environment."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in all_lines(run) if "environment" not in line]


def environments(run):
    return [line["environment"] for line in all_lines(run) if "environment" in line]


def losses(run, key="train/loss"):
    return [line[key] for line in metrics(run) if key in line]


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


def at_step(monkeypatch, actions):
    """Call actions[s]() at the beginning of optimizer step s, once each."""
    rate = learning_rate

    def hooked(step, config):
        actions.pop(step, lambda: None)()
        return rate(step, config)

    monkeypatch.setattr(train_module, "learning_rate", hooked)


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


DRIVER = """
import os, signal, sys, time
from pathlib import Path
import model, train
rank, rate = os.environ["RANK"], train.learning_rate
prepare = train.find_state
def slow_find_state(*a):  # ranks need not look at the run's folder at the same moment
    time.sleep(float(os.environ.get("LATE", 0)) * int(rank))
    return prepare(*a)
def hooked(step, config):
    here, once = f"{rank}:{step}", os.environ.get("ONCE")
    if here == os.environ.get("SIGNAL_AT"):
        os.kill(os.getpid(), signal.SIGUSR1)
    if here == os.environ.get("DIE_AT") and not (once and Path(once).exists()):
        if once:
            Path(once).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if here == os.environ.get("HANG_AT"):
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(float(os.environ.get("SLEEP", 0)))
    return rate(step, config)
to_device, validation_batches = train.to_device, 0
def counted(*a):
    global validation_batches
    validation_batches += 1
    if f"{rank}:{validation_batches}" == os.environ.get("SIGNAL_IN_VALIDATION"):
        os.kill(os.getpid(), signal.SIGUSR1)
    return to_device(*a)
train.find_state, train.learning_rate, train.to_device = slow_find_state, hooked, counted
if os.environ.get("COUNT"):
    import atexit
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    reductions = 0
    class Counting(train.DistributedDataParallel):  # reductions of all gradients over ranks
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.register_comm_hook(None, reduce)
    def reduce(state, bucket):
        global reductions
        reductions += bucket.is_last()
        return default_hooks.allreduce_hook(None, bucket)
    atexit.register(lambda: print("reductions:", reductions, file=sys.stderr))
    train.DistributedDataParallel = Counting
if backend := os.environ.get("BACKEND"):
    parts, train.compiler_works = model.GPT.compile_parts, lambda device: True
    model.GPT.compile_parts = lambda self: parts(self, backend=backend)
train.main()
"""
