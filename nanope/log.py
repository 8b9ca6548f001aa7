"""What a run tells while it trains: metrics.jsonl, the progress line, wandb; and the environment it ran in.

Nothing here may stop a training that could go on: a full disk, a folder that is gone and a wandb that is down are
said once and lived with, and what could not be written is written when it can be.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

import schemes
from nanope import REPO, checkpoint
from nanope.config import RunConfig, write_yaml

# ---- the environment


def environment(config: RunConfig, device: torch.device, dtype: torch.dtype, world: int, data_hash: str) -> dict:
    """What a result may depend on beside the config: versions, commit, device, attention kernel, data and seeds. No times, so
    that equal runs have equal files."""
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda and world > 1 else None,
        "git": git_state(REPO),
        "device": device_name(device),
        "ranks": world,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "compile": config.compile,
        "attention": attention_backend(config, device, dtype),
        "data_hash": data_hash,
        "seed": config.seed,
        "data_seed": config.data_seed,
    }


def git_state(repo: Path) -> dict | None:
    """{"commit", "dirty"} of a repository, dirty where a tracked file differs from the commit; None where there is none."""
    try:
        git = lambda *command: (
            subprocess.run(["git", *command], cwd=repo, capture_output=True, text=True, check=True, timeout=30).stdout
        )  # noqa: E731
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no").strip()),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({processor()})"


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def attention_backend(config: RunConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that training's attention takes."""
    if any(schemes.scheme_class(n).bias is not schemes.Scheme.bias for n in schemes.names_in(config.pos)):
        return "flex_attention" if device.type == "cuda" and not config.dropout else "sdpa with a dense bias, by chunks"
    q = torch.empty(1, config.n_head, config.block_size, config.n_embd // config.n_head, device=device, dtype=dtype)
    choice = torch._fused_sdp_choice(q, q, q, None, config.dropout, True)
    return f"sdpa {torch.nn.attention.SDPBackend(choice).name.lower()}"


# ---- the log


class Log:
    """metrics.jsonl, the progress line and, when asked, wandb. Only the first rank writes."""

    def __init__(self, config: RunConfig, main: bool, step: int, environment: dict, watched: bool = True):
        self.main, self.config, self.run = main, config, Path(config.out_dir)
        if not main:
            return
        self.path, self.file, self.warned = self.run / "metrics.jsonl", None, False
        # Every line, kept: a file that is lost or cut short can be written again
        self.lines = lines_until(
            self.path, step, watched
        )  # what an interrupted run logged beyond its checkpoint happens again
        known = [line["environment"] for line in map(json.loads, self.lines) if "environment" in line]
        if not known or (
            known[-1] != environment and step < config.max_steps
        ):  # a finished run keeps the record of how it was made
            self.lines.append(encode({"step": step, "environment": environment}))
        self.open()
        self.wandb = start_wandb(config, self.run, resumed=step > 0) if config.wandb != "off" else None
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=config.max_steps, initial=step, desc=self.run.name, unit="step", disable=not self.terminal
        )
        self.started, self.first_step = time.monotonic(), step

    def open(self) -> None:
        """Write all lines anew, whole or not at all. OSError where that is not possible."""
        self.run.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(self.path, lambda file: file.writelines(self.lines))
        self.file = open(self.path, "ab", buffering=0)

    def write(self, **values) -> None:
        """Append a line; one with a "step" and figures goes to wandb too."""
        if not self.main:
            return
        self.lines.append(encode(values))
        try:
            if self.file and self.file.write(self.lines[-1]) == len(self.lines[-1]) and self.there():
                return
            self.restore()
        except OSError as error:
            self.close_file()
            if not self.warned:
                self.say(f"warning: metrics cannot be written ({error}): training goes on, and writes them when it can")
            self.warned = True
        finally:
            self.to_wandb(values)

    def there(self) -> bool:
        """Whether the open file still is the one at its path."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False

    def restore(self) -> None:
        self.close_file()
        gone = not self.run.is_dir()
        self.open()
        if gone:
            write_yaml(self.config, self.run / "config.yaml")
        self.say(
            f"warning: {self.run if gone else self.path} was lost or could not be written for a while: all lines of this run are written again"
        )
        self.warned = False

    def close_file(self) -> None:
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()
        self.file = None

    def sync(self) -> None:
        """What is logged is on the disk, where it can be; before a checkpoint that continues it."""
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no file, or closed in another thread
            os.fsync(self.file.fileno())

    def to_wandb(self, values: dict) -> None:
        if not self.wandb:
            return
        try:
            self.wandb.log(values, step=values["step"])
        except Exception as error:  # whatever ends its service is no reason to end the training
            self.say(
                f"warning: wandb failed ({first_line(error)}): training goes on without; metrics.jsonl has everything"
            )
            self.wandb = None

    def say(self, text: str) -> None:
        if self.main:
            with contextlib.suppress(OSError):  # a log on a full disk, a closed terminal
                tqdm.write(text, file=sys.stderr)

    def progress(self, step: int, text: str | None = None) -> None:
        if not self.main:
            return
        self.bar.update(step - self.bar.n)
        if text is not None:
            if self.terminal:
                self.bar.set_postfix_str(text)
            else:
                left = (
                    (time.monotonic() - self.started) / max(1, step - self.first_step) * (self.config.max_steps - step)
                )
                self.say(f"step {step}/{self.config.max_steps}  {text}  ETA {tqdm.format_interval(left)}")

    def close(self, failed: bool) -> None:
        if not self.main:
            return
        self.bar.close()
        try:
            if self.file is None or not self.there():  # the last chance
                self.restore()
        except OSError as error:
            self.say(f"warning: the last lines of {self.path} are lost: {error}")
        self.close_file()
        if self.wandb:
            with contextlib.suppress(Exception):
                self.wandb.finish(exit_code=int(failed))


def encode(values: dict) -> bytes:
    """A line of metrics.jsonl; JSON has no nan."""
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return (json.dumps(values) + "\n").encode()


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def lines_until(path: Path, step: int, watched: bool = True) -> list[bytes]:
    """The whole lines of metrics.jsonl up to a step; a fresh start (step 0) keeps none. Of the last step without its validation and
    sample where the checkpoint knows nothing of them (not `watched`): they happen again."""
    kept = []
    if step == 0 or not path.is_file():
        return kept
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line cut short by the interruption
            values = json.loads(line)
            again = values["step"] == step and not watched and ("val/loss" in values or "sample" in values)
            if line.endswith(b"\n") and values["step"] <= step and not again:
                kept.append(line)
    return kept


def start_wandb(config: RunConfig, run: Path, resumed: bool):
    """The wandb run that continues with this folder; offline, with a warning, where it is not logged in or out of reach; None where
    it does not work at all."""
    os.environ.setdefault("WANDB_CACHE_DIR", str((run / "wandb" / "cache").resolve()))  # it would log under $HOME
    # The id follows from the folder, so that a resumed run continues its curve
    identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    project = os.environ.get("WANDB_PROJECT", "nanope")

    def warn(text):
        print(f"warning: wandb {text}", file=sys.stderr)

    def init(mode):
        return wandb.init(
            project=project,
            name=run.name,
            id=identity,
            resume="allow" if resumed else None,
            mode=mode,
            dir=run,
            config=dataclasses.asdict(config),
        )

    try:
        import wandb

        if config.wandb == "online":
            try:
                if wandb.login(prompt=False, verify=False):
                    return init("online")
                warn("is not logged in (WANDB_API_KEY or `wandb login`): logging offline; `wandb sync` uploads later")
            except Exception as error:  # out of reach, a key that is none
                warn(f"cannot be used online, logging offline; `wandb sync` uploads later: {first_line(error)}")
                wandb.teardown()
        return init("offline")
    except Exception as error:
        warn(f"does not start ({first_line(error)}): training goes on without; metrics.jsonl has everything")
        return None


# ---- the difference from another run


# Fields that leave the training curve as it is, beyond rounding
NEUTRAL = (
    "data_dir",
    "verify_data",
    "out_dir",
    "eval_interval",
    "eval_tokens",
    "checkpoint_interval",
    "keep_checkpoints",
    "log_interval",
    "sample_interval",
)
NEUTRAL += ("resume", "wandb", "device", "compile", "micro_batch_size", "rank_timeout")


def differences(mine: dict, run: Path, my_data_hash: str | None) -> list[str]:
    """A line for each field in which a resolved config differs from that of `run`, those that change the result first, and one
    for other data. Fields that `mine` leaves open (None) until the run starts are not compared. OSError where there is no such run."""
    path = run / "config.yaml" if run.is_dir() else run
    theirs = yaml.safe_load(path.read_text())
    if not isinstance(theirs, dict) or "pos" not in theirs:
        raise ValueError(f"{path} is no config of a run")
    lines = []
    for field in dataclasses.fields(RunConfig):
        name = field.name
        there, here = theirs.get(name, "absent"), mine[name]
        if there != here and (here is not None or field.default is not None) and name not in ("out_dir", "resume"):
            if isinstance(here, dict) and isinstance(there, dict):
                options = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
                there, here = ({k: d.get(k) for k in options} for d in (there, here))
            lines.append(
                (
                    name in NEUTRAL,
                    f"{name}: {there} there, {here} here" + (" (changes rounding at most)" if name in NEUTRAL else ""),
                )
            )
    with contextlib.suppress(OSError, StopIteration):
        hash = next(
            line["environment"]["data_hash"] for line in checkpoint.read_metrics(path.parent) if "environment" in line
        )
        if my_data_hash and hash != my_data_hash:
            lines.append((False, f"data: its manifest's hash is {hash[:12]}… there, {my_data_hash[:12]}… here"))
    return [text for _, text in sorted(lines, key=lambda line: line[0])]
