"""Checkpoints and the files of a run's folder: written whole or not at all, checked when read.

runs/NAME/config.yaml             every field, resolved
runs/NAME/metrics.jsonl           a JSON object a line
runs/NAME/checkpoints/step_N.pt   the latest keep_checkpoints; step_N.pt.sha256 beside each
runs/NAME/last.pt                 relative link to the newest of them
runs/NAME/best.pt                 the checkpoint of the lowest validation loss, a file of its own
runs/NAME/eval/*.json             what eval.py wrote
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from model import GPT, GPTConfig


class HashingFile:
    """A binary file for writing that hashes what passes through."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def write_atomically(path: Path, write) -> None:
    """write(file) into a temporary file, fsync, rename: `path` holds the old or the new, never a part, also after a
    power loss. OSError (disk full, no permission), which names `path`, leaves the old one and no remains."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None:  # what fails in the middle does not know the name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def host_copy(state, copies: dict | None = None):
    """A copy of nested dicts and lists with every tensor's values on the CPU: what is written while training goes on. Tied
    parameters stay tied: they are copied, and written, once."""
    copies = {} if copies is None else copies
    if isinstance(state, torch.Tensor):
        same = state.data_ptr(), state.dtype, state.shape, state.stride()
        if not state.numel() or same not in copies:
            copies[same] = state.detach().to("cpu", copy=True)
        return copies[same]
    if isinstance(state, dict):
        return {k: host_copy(v, copies) for k, v in state.items()}
    return type(state)(host_copy(v, copies) for v in state) if isinstance(state, (list, tuple)) else state


class Writer:
    """Writes in a thread beside the training, one file at a time."""

    def __init__(self):
        self.thread, self.error = None, None

    def submit(self, write: Callable[[], None]) -> None:
        """Call write() in the thread, once the one before has ended. What it raises is raised by the next wait()."""
        self.wait()

        def run():
            try:
                write()
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(
            target=run, daemon=True
        )  # a second Ctrl-C need not wait for it: files are written whole or not at all
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error:
            error, self.error = self.error, None
            raise error


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
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {str(error).partition(chr(10))[0] or type(error).__name__}"
        ) from error
    if not isinstance(state, dict) or not {"model", "config", "step"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of train.py: it lacks model, config or step")
    return state


def step_files(run: Path) -> list[Path]:
    """checkpoints/step_N.pt, newest first."""
    files = (run / "checkpoints").glob("step_*.pt")
    return sorted((f for f in files if f.stem.removeprefix("step_").isdecimal()), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def save_step(run: Path, state: dict, keep: int) -> None:
    """checkpoints/step_N.pt, the link last.pt to it, and older ones beyond `keep` removed; newer ones too, which a run
    that was resumed before them must have found damaged."""
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
    """The newest undamaged checkpoint of a run, with a warning for each that is damaged or cannot be read; None where there is none.
    ValueError where there are some and none is good."""
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
    """The file of a run's `last` or `best` checkpoint, or of a step number; a path to a .pt file is itself."""
    run = Path(run)
    if run.is_file():
        return run
    if not run.is_dir():
        raise OSError(f"no run {run}: neither a folder nor a checkpoint file")
    path = run / f"{which}.pt" if which in ("last", "best") else run / "checkpoints" / f"step_{which}.pt"
    if not path.exists():
        have = [f.name for f in [run / "last.pt", run / "best.pt", *step_files(run)] if f.exists()]
        raise OSError(f"{run} has no checkpoint {which!r}; it has {', '.join(have) or 'none: was it trained?'}")
    return path


def read_metrics(run: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl, which may be being written. OSError where there is none."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def build_model(state: dict, **changes) -> GPT:
    """The GPT of a checkpoint, with `changes` to its GPTConfig (such as another block_size). ValueError where the
    weights do not fit: a learned table is cut for a smaller block_size, never stretched."""
    names = GPTConfig.__dataclass_fields__
    config = GPTConfig(**{**{k: v for k, v in state["config"].items() if k in names}, **changes})
    model = GPT(config)
    weights = dict(state["model"])
    wpe = "transformer.wpe.weight"
    if wpe in weights:
        if len(weights[wpe]) < config.block_size:
            raise ValueError(
                f"learned positions end at block_size {len(weights[wpe])}; they cannot be extended to {config.block_size}"
            )
        weights[wpe] = weights[wpe][: config.block_size]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint is of another architecture: {error}") from error
    return model
