"""A run's folder: whether it holds a run to resume, who trains in it, and the signals that end a run early."""

import contextlib
import fcntl
import os
import platform
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data.shards import Data
from nanope import checkpoint
from nanope.config import SINCE, SWITCHES, RunConfig, completed, merged
from nanope.distributed import Ranks

# ---- what is there, and whether this run may continue it

# What a resumed run must have in common with its checkpoint: the model and the order of its data
FIXED_ON_RESUME = ("block_size", "n_layer", "n_head", "n_embd", "bias", "dropout", "vocab_size", "pos", "pos_options")
FIXED_ON_RESUME += (*SWITCHES, "eot", "pos_lr_matrices", "batch_tokens", "seed", "data_seed", "data_order")
# What may change without a word
QUIET_ON_RESUME = ("resume", "out_dir", "data_dir", "verify_data")


def find_state(config: RunConfig, data: Data, ranks: Ranks) -> dict | None:
    """The checkpoint to resume from, or None to start. Changes nothing. ValueError where the folder holds a run that
    config does not resume, or may not."""
    run = Path(config.out_dir)
    exists = (run / "config.yaml").exists() or (run / "metrics.jsonl").exists() or bool(checkpoint.step_files(run))
    if exists and not config.resume:
        raise ValueError(f"{run} already holds a run: continue it with --resume true, or choose another --out_dir")
    state = checkpoint.load_newest(run) if config.resume else None
    if state:
        check_resumable(state, as_begun(config, state), data)
        then = state["config"]
        quiet = {*FIXED_ON_RESUME, *QUIET_ON_RESUME}
        if not config.dropout or config.micro_batch_size in (None, "auto"):  # it divides what dropout draws
            quiet.add("micro_batch_size")
        shown = [k for k in vars(config) if k in then and k not in quiet]
        changed = [f"{k} {then[k]} → {getattr(config, k)}" for k in shown if then[k] != getattr(config, k)]
        if changed and ranks.main:
            text = f"warning: {run} goes on with other settings than it began with: {', '.join(changed)}"
            print(text, file=sys.stderr)
    return state


def as_begun(config: RunConfig, state: dict | None) -> RunConfig:
    """The config, with the older order of data where the checkpoint to resume from has that, be it recorded or from
    before there was a choice: a run goes on in it without being told, however often it is resumed."""
    older = SINCE["data_order"]
    if state and state["config"].get("data_order", older) == older:
        config = replace(config, data_order=older)
    return config


def check_resumable(state: dict, config: RunConfig, data: Data) -> None:
    """ValueError where the checkpoint's run differs in what its result depends on."""
    then = completed(state["config"], config)
    if config.init_from and not config.init_pos_from_config:  # options that it does not name came with the weights
        config = replace(config, pos_options=merged(then["pos_options"], config.pos_options))
    now = completed(vars(config), config)
    differ = [f"{k} was {then[k]}, now {now[k]}" for k in FIXED_ON_RESUME if then[k] != now[k]]
    if not data.is_of(state["data_hash"]):
        differ.append(f"the data in {config.data_dir} is not what the run began with")
    if differ:
        raise ValueError(
            f"cannot resume {config.out_dir}: {'; '.join(differ)}. Choose another --out_dir for a different run"
        )


def launch() -> str:
    """The launch that this process belongs to, the same for all its restarts by torchrun --max-restarts: torchrun's own
    process, by when it began; over several nodes, each of which has one, its --rdzv_id."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none" and os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return name
    number, began = os.getppid(), ""
    with contextlib.suppress(OSError):  # numbers come again: in a container each torchrun may have the same
        began = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{platform.node()} {number} {began}"


def resumed_if_restarted(config: RunConfig, ranks: Ranks) -> RunConfig:
    """The config with resume where torchrun has restarted these ranks, after the same launch had begun the run in this
    folder."""
    lock = Path(config.out_dir) / ".lock"
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    restarted = ranks.first(again and lock.is_file() and lock.read_text() == launch())
    return replace(config, resume=config.resume or restarted)


# ---- one process at a time


@contextlib.contextmanager
def locked(run: Path, ranks: Ranks) -> Iterator[None]:
    """Make the run's folder once every rank has seen what was there, and keep others out of it: two processes that
    train in one folder would mix their checkpoints. ValueError where another one does. Partial files left by a run
    that was killed are removed. Only the first rank does any of it."""
    ranks.wait()
    if not ranks.main:
        yield
        return
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {run}: wait for it, or choose another --out_dir"
            ) from None
        except OSError as error:
            text = f"{run} is on a file system without locks ({error}): do not start a second run in it"
            print(f"warning: {text}", file=sys.stderr)
        lock.truncate(0)
        lock.write(launch())
        lock.flush()
        for left_over in [*run.glob(".*.partial"), *run.glob("checkpoints/.*.partial")]:
            left_over.unlink()
        if not os.access(run, os.W_OK):
            raise PermissionError(f"no permission to write in {run}")
        yield


# ---- signals


class Stop:
    """Within it SIGINT, SIGTERM and SIGUSR1 do not end the process: the run ends itself after its step, with a
    checkpoint. A second Ctrl-C ends the process at once.

    received: the signal that has reached this process, or 0. agreed: the one that every rank knows of, or 0. Ranks must
    all stop after the same step, so they act on the second alone.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received, self.agreed, self.before = 0, 0, {}

    def __enter__(self):
        self.before = {s: signal.signal(s, self.handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def flags(self) -> list[float]:
        """A 1 for the signal that this process has received, else 0: to be summed over ranks."""
        return [float(self.received == s) for s in self.SIGNALS]

    def agree(self, flags: list[float]) -> None:
        """Set `agreed` from flags that were summed over ranks."""
        self.agreed = self.agreed or next((s for s, flag in zip(self.SIGNALS, flags) if flag), 0)
