"""Checkpoints: what they hold, how they are written and read, and what happens when the disk is full.

runs/NAME/config.yaml             every field, resolved
runs/NAME/metrics.jsonl           a JSON object a line
runs/NAME/checkpoints/step_N.pt   the latest keep_checkpoints; step_N.pt.sha256 beside each
runs/NAME/last.pt                 relative link to the newest of them
runs/NAME/best.pt                 the checkpoint of the lowest validation loss, a file of its own
runs/NAME/eval/*.json             what eval.py wrote
"""

import dataclasses
import hashlib
import json
import math
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from data.shards import Data
from data.tokenizer import Tokenizer, load_tokenizer
from model import GPT, GPTConfig, resolve
from nanope.config import RunConfig
from nanope.distributed import HostCopies, Ranks, divided_as, is_divided, whole
from nanope.errors import first_line
from nanope.files import HashingFile, write_atomically
from nanope.log import Log

# ---- what a checkpoint holds


@dataclasses.dataclass
class Progress:
    """How far a run is, beside its weights and the optimizer's state. The names are those in a checkpoint."""

    step: int = 0  # optimizer steps completed
    watched: int = -1  # the last step after which validation and sample were done where due
    val_loss: float = math.nan  # of the last validation
    best_val_loss: float = math.inf
    bad_steps: int = 0  # in a row, up to now: their loss or gradient was not finite, and they were skipped


def snapshot(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: RunConfig,
    data: Data,
    progress: Progress,
    copies: HostCopies,
) -> Callable[[], dict]:
    """Start to copy to the host what a checkpoint holds: tensors and plain types alone. The function that is returned
    waits for it and returns it; it is good until the next snapshot into `copies`. Equal commands give equal files.

    A model that is divided over ranks gives the same checkpoint: every rank must ask, and the first has it."""
    state = {
        "model": model.state_dict(keep_vars=True),  # tied parameters are one object
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "step": progress.step,
        "config": dataclasses.asdict(config) | {"resume": False},  # the same files, interrupted or not
        "data_hash": data.hash,
        "tokenizer": dict(data.manifest["tokenizer"]),
        "best_val_loss": progress.best_val_loss,
        "val_loss": progress.val_loss,
        "watched": progress.watched,
        "bad_steps": progress.bad_steps,
    }
    state, wait = host_copy(state, copies.copy), copies.finish()

    def read() -> dict:
        wait()
        return state

    return read


def restore(state: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> Progress:
    """Put a checkpoint's state into the optimizer and the scaler. Weight decay, betas and the like stay the config's.
    The model's weights come with build_model, and random generators are seeded anew for each step."""
    fields = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        i: {name: divided_as(t, parameters[i]) if t.dim() else t for name, t in of_one.items()}  # step is a number
        for i, of_one in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**state["optimizer"], "state": own})
    for group, now in zip(optimizer.param_groups, fields):
        group.update(now)
    if state["scaler"]:  # empty where the run was not float16
        scaler.load_state_dict(state["scaler"])
    state = {"watched": state["step"], **state}  # checkpoints of old were written after validation, and do not say so
    return Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})


def host_copy(state, copy: Callable[[torch.Tensor], torch.Tensor], copies: dict | None = None):
    """A copy of nested dicts and lists with every tensor as `copy` gives it, which can be written while training goes
    on. Tied parameters stay tied: they are copied, and written, once. So are equal texts, which a resumed run has read
    one by one: equal states give equal files."""
    copies = {} if copies is None else copies
    if isinstance(state, torch.Tensor):
        same = state.data_ptr(), state.dtype, state.shape, state.stride()
        if is_divided(state):  # known by itself: ranks must agree on what they gather, and their addresses differ
            same = id(state)
        if not state.numel() or same not in copies:
            copies[same] = copy(whole(state.detach()))
        return copies[same]
    if isinstance(state, dict):
        return {host_copy(k, copy): host_copy(v, copy, copies) for k, v in state.items()}
    if isinstance(state, str):
        return sys.intern(state)
    return type(state)(host_copy(v, copy, copies) for v in state) if isinstance(state, (list, tuple)) else state


# ---- a model from a checkpoint


def model_config_of(state: dict) -> GPTConfig:
    """The GPTConfig of a checkpoint. What the scheme's options leave to it, such as the unit of distances, is written
    out: it belongs to the weights."""
    return resolve(GPTConfig(**{k: v for k, v in state["config"].items() if k in GPTConfig.__dataclass_fields__}))


def build_model(state: dict, **changes) -> GPT:
    """The GPT of a checkpoint, with `changes` to its GPTConfig (such as another block_size). ValueError where the
    weights do not fit: a learned table is cut for a smaller block_size, never stretched."""
    config = dataclasses.replace(model_config_of(state), **changes)
    model = GPT(config)
    weights = dict(state["model"])
    wpe = "transformer.wpe.weight"
    if wpe in weights:
        if len(weights[wpe]) < config.block_size:
            raise ValueError(
                f"learned positions end at block_size {len(weights[wpe])}; "
                f"they cannot be extended to {config.block_size}"
            )
        weights[wpe] = weights[wpe][: config.block_size]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint is of another architecture: {error}") from error
    return model


def run_tokenizer(state: dict) -> Tokenizer:
    """The tokenizer that the run of a checkpoint was trained with. ValueError where the one of its name is another by
    now, or is not at hand."""
    tokenizer = load_tokenizer(state["tokenizer"]["name"])
    if tokenizer.sha256 != state["tokenizer"]["sha256"]:
        raise ValueError(f"the run's tokenizer {tokenizer.name} had another vocabulary than the one that is here")
    return tokenizer


# ---- files


def save(path: Path, state: dict) -> None:
    """torch.save `state` (tensors and plain types) atomically, with its sha256 in a file beside it."""
    digest = None

    def write(file):
        nonlocal digest
        hashing = HashingFile(file)
        try:
            torch.save(state, hashing)
        except RuntimeError as error:  # torch wraps what the file raised
            cause = error.__cause__ or error.__context__
            raise cause if isinstance(cause, OSError) else OSError(f"cannot write {path}: {error}") from None
        digest = hashing.sha256.hexdigest()
        file.flush()  # a full disk shows here at the latest, and leaves the old file with its hash
        hash_path(path).unlink(missing_ok=True)  # no moment at which a new file stands beside an old hash

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
    write_atomically(hash_path(path), lambda file: file.write(f"{digest}\n".encode()))


def hash_path(path: Path) -> Path:
    """The file that holds the sha256 of the one at `path`."""
    return path.with_name(path.name + ".sha256")


def load(path: Path) -> dict:
    """The checkpoint at `path`, tensors on the CPU. ValueError where it is damaged or no checkpoint of ours, OSError
    where it is not there."""
    path = Path(path).resolve()
    if hash_path(path).is_file():
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != hash_path(path).read_text(errors="replace").strip():
            raise ValueError(f"{path} is truncated or altered: its sha256 is not the recorded one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except OSError:
        raise
    except pickle.UnpicklingError as error:  # its text advises to load the file unsafely
        what = "it is no file of torch.save, or holds other things than tensors and plain values"
        raise ValueError(f"{path} cannot be read as a checkpoint: {what}") from error
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
    if not isinstance(state, dict) or not {"model", "config", "step"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of train.py: it lacks model, config or step")
    return state


def step_files(run: Path) -> list[Path]:
    """checkpoints/step_N.pt, newest first."""
    files = (run / "checkpoints").glob("step_*.pt")
    return sorted((f for f in files if f.stem.removeprefix("step_").isdecimal()), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """N of step_N.pt."""
    return int(path.stem.removeprefix("step_"))


def save_step(run: Path, state: dict, keep: int) -> None:
    """Write checkpoints/step_N.pt and the link last.pt to it, and remove older ones beyond `keep`. Newer ones are
    removed too: a run that was resumed before them must have found them damaged."""
    path = run / "checkpoints" / f"step_{state['step']}.pt"
    save(path, state)
    link = run / ".last.pt.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(path.relative_to(run))
    os.replace(link, run / "last.pt")
    files = step_files(run)
    older = [f for f in files if step_of(f) <= state["step"]]
    for other in {*files} - {*older[:keep]}:
        other.unlink(missing_ok=True)
        hash_path(other).unlink(missing_ok=True)


def load_newest(run: Path) -> dict | None:
    """The newest undamaged checkpoint of a run, with a warning for each that is damaged or cannot be read; None where
    there is none. ValueError where there are some and none is good."""
    files = step_files(run)
    for path in files:
        try:
            return load(path)
        except (ValueError, OSError) as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    if files:
        raise ValueError(
            f"every checkpoint in {run / 'checkpoints'} is damaged or cannot be read; delete {run} to start again"
        )
    return None


def find(run: str | Path, which: str = "last") -> Path:
    """The file of a run's `last` or `best` checkpoint, or of a step number. A path to a .pt file is itself. OSError
    where there is none.

    Where last.pt was lost, as in a copy without links, the last checkpoint is the newest step, and stderr says so."""
    run = Path(run)
    if run.is_file() and not was_link(run):
        return run
    if run.name in ("last.pt", "best.pt") and not run.is_dir():  # by its path
        run, which = run.parent, run.stem
    if not run.is_dir():
        raise OSError(f"no run {run}: neither a folder nor a checkpoint file")
    path = run / f"{which}.pt" if which in ("last", "best") else run / "checkpoints" / f"step_{which}.pt"
    if path.is_file() and not was_link(path):
        return path
    steps = step_files(run)
    if which == "last" and steps:
        if os.environ.get("RANK", "0") == "0":
            what = "no longer leads to a checkpoint" if os.path.lexists(path) else "is not there"
            print(f"note: {path} {what} (a copy without links?): taking the newest, {steps[0]}", file=sys.stderr)
        return steps[0]
    have = [f.name for f in [run / "last.pt", run / "best.pt", *steps] if f.is_file() and not was_link(f)]
    raise OSError(f"{run} has no checkpoint {which!r}; it has {', '.join(have) or 'none: was it trained?'}")


def was_link(path: Path) -> bool:
    """Whether a file is what some copies make of a link: empty, or a short text that names its target."""
    size = path.stat().st_size
    return not size or (size < 1024 and b".pt" in path.read_bytes())


def read_metrics(run: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl, which may be being written. OSError where there is none, ValueError
    where it is damaged."""
    path = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


# ---- writing while training goes on


class Writer:
    """Writes in a background thread, one file at a time."""

    def __init__(self):
        self.thread, self.error = None, None

    def submit(self, write: Callable[[], None]) -> None:
        """Call write() in the thread, once the one before has ended. The next wait() raises what it raises."""
        self.wait()

        def run():
            try:
                write()
            except Exception as error:
                self.error = error

        # A daemon: a second Ctrl-C need not wait for it, since files are written atomically
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def busy(self, seconds: float) -> bool:
        """Whether something is still being written after so many seconds, or sooner where nothing is."""
        if self.thread:
            self.thread.join(seconds)
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error:
            error, self.error = self.error, None
            raise error


class Keeper:
    """Writes the checkpoints of a run in the background.

    A checkpoint that cannot be written, as on a full disk, does not end the run: there may be room the next time. Only
    where the last one cannot be written, also not at a second try, the run ends with an error.

    take: starts to copy what a checkpoint holds now, on every rank, and returns the function that waits for it and
    returns it. observe("write", step, path): called in the thread before each file.
    """

    def __init__(
        self,
        config: RunConfig,
        progress: Progress,
        take: Callable[[], Callable[[], dict]],
        ranks: Ranks,
        log: Log,
        observe: Callable[[str, int, Path], None],
    ):
        self.run, self.keep, self.patience = Path(config.out_dir), config.keep_checkpoints, config.rank_timeout / 4
        self.progress, self.take, self.ranks, self.log, self.observe = progress, take, ranks, log, observe
        self.writer = Writer()
        self.saved = progress.step  # of the newest good step_N.pt
        self.unwritten: OSError | None = None  # why the newest checkpoint could not be written

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not KeyboardInterrupt:  # of a second Ctrl-C, which waits for nothing
            self.writer.wait()

    def wait(self) -> None:
        """Until nothing is being written, on every rank. The others hear of it before they would give the first up: a
        large checkpoint may take longer than rank_timeout."""
        while self.ranks.first(self.writer.busy(self.patience)):
            pass
        self.writer.wait()

    def save(self, step: bool, best: bool) -> None:
        """Write step_N.pt, best.pt, both or neither, as of this moment. Training goes on meanwhile."""
        if not (step or best):
            return
        self.wait()  # at most one is being written: the next one's copies go where its are
        progress, lowest = self.progress, self.progress.best_val_loss
        if best:
            progress.best_val_loss = progress.val_loss
        read = self.take()
        if not self.ranks.main:
            return
        keep = sys.maxsize if progress.bad_steps else self.keep  # no good one is removed for one among bad steps

        def write() -> None:
            state = read()
            self.log.sync()  # a checkpoint never knows more steps than metrics.jsonl
            path = self.run / "best.pt"
            if best and not self.attempt(path, state, lambda: save(path, state)):
                progress.best_val_loss = state["best_val_loss"] = lowest
            path = self.run / "checkpoints" / f"step_{state['step']}.pt"
            if step and self.attempt(path, state, lambda: save_step(self.run, state, keep)):
                self.saved = state["step"]

        self.writer.submit(write)

    def attempt(self, path: Path, state: dict, write: Callable[[], None]) -> bool:
        """Whether a file could be written. Warns where not."""
        try:
            self.observe("write", state["step"], path)
            write()
            self.unwritten = None
            return True
        except OSError as error:
            self.unwritten = error
            self.log.say(
                f"warning: at step {state['step']} a checkpoint could not be written ({error}): training goes on; "
                + (f"the newest good one is of step {self.saved}" if self.saved else "there is none yet")
            )
            return False

    def finish(self, stopped_by: int) -> None:
        """Wait until everything is on the disk; `stopped_by` is the signal that ended the run, or 0. OSError where the
        last checkpoint could not be written, also not when tried again."""
        self.wait()
        if self.ranks.first(self.unwritten is not None):
            self.save(step=True, best=False)
            self.wait()
        step = self.progress.step
        if stopped_by:
            saved = "checkpoint written: continue with --resume true"
            saved = "but no checkpoint could be written" if self.unwritten else saved
            self.log.say(f"stopped by {signal.Signals(stopped_by).name} after step {step}, {saved}")
        self.ranks.wait()  # torchrun ends the others when one has left
        if self.unwritten:
            raise OSError(
                f"the checkpoint of step {step} could not be written ({self.unwritten}); "
                f"step {self.saved} is where --resume true continues"
            )

    def good_until(self, step: int) -> str:
        """Which checkpoints are good, where what followed step `step` went wrong."""
        self.writer.wait()
        text = f"the checkpoints in {self.run} are from before"
        if 0 < step <= self.saved:
            text += f", but step_{self.saved}.pt holds the very weights that failed: delete it to go back further"
        return text
