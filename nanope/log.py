"""What a run tells while it trains: metrics.jsonl, the progress line, wandb; and the environment it ran in.

Nothing here ends a training that could go on. There is one warning for a full disk, a folder that is gone, or a wandb
that is down. What could not be written is written as soon as that is possible.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import GPT
from nanope import REPO
from nanope.attention import kernel
from nanope.config import RunConfig, write_yaml
from nanope.distributed import Ranks, peak_memory
from nanope.errors import first_line
from nanope.files import write_atomically
from nanope.gpus import peak_flops
from schemes import label, outside_sources

# ---- the environment


def environment(
    config: RunConfig, model: GPT, device: torch.device, dtype: torch.dtype, world: int, data_hash: str
) -> dict:
    """What a result may depend on beside the config: versions, commit, device, attention kernel, data and seeds. No
    times, so that equal runs have equal files."""
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
        "attention": kernel(model, dtype),
        "data_hash": data_hash,
        "seed": config.seed,
        "data_seed": config.data_seed,
    } | ({"scheme_sources": code} if (code := outside_sources(config.pos)) else {})  # no commit has them


def git_state(repo: Path) -> dict | None:
    """{"commit", "dirty"} of a repository, None where there is none; dirty: a tracked file differs from the commit, but
    not in results/."""

    def git(*command: str) -> str:
        options = dict(cwd=repo, capture_output=True, text=True, check=True, timeout=30)
        return subprocess.run(["git", *command], **options).stdout.strip()

    status = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git(*status))}
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the device's type and the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({processor()})"


def processor() -> str:
    """The name of this machine's CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---- the log


def title(
    config: RunConfig, model: GPT, ranks: Ranks, share: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> str:
    """A run in a line. `share`: windows a step and rank; `tokens`: of the train split."""
    c, micro = config, config.micro_batch_size
    return (
        f"{Path(c.out_dir)}: {label(c.pos)} {c.pos_options}, {model.parameter_count():,} parameters; "
        f"{c.max_steps} steps of {c.batch_tokens:,} tokens ({share * ranks.world} windows of {c.block_size}, "
        f"{ranks.world} rank(s) × {share // micro} × {micro}); "
        f"{tokens:,} training tokens, {c.max_steps * c.batch_tokens / tokens:.2f} epochs; "
        f"{device}, {str(dtype).removeprefix('torch.')}"
    )


class Log:
    """metrics.jsonl, the progress line and, when asked, wandb. Only the first rank writes.

    step: where the run starts or goes on. watched: whether validation and sample of that step are done already. What an
    interrupted run logged beyond that is taken out of metrics.jsonl: it happens again.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        device: torch.device,
        flops_per_token: int,
        environment: dict,
        step: int,
        watched: bool,
    ):
        self.main, self.config, self.run = ranks.main, config, Path(config.out_dir)
        if not self.main:
            return
        self.path, self.file, self.warned = self.run / "metrics.jsonl", None, False
        self.lines = lines_until(self.path, step, watched)  # all of them: a file that is lost can be written again
        known = [line["environment"] for line in map(json.loads, self.lines) if "environment" in line]
        # A finished run keeps the record of how it was made
        if not known or (known[-1] != environment and step < config.max_steps):
            self.lines.append(encode({"step": step, "environment": environment}))
        self.open()
        self.wandb = start_wandb(config, self.run, resumed=step > 0) if config.wandb != "off" else None
        self.identity = (self.run / WANDB_FILE).read_bytes() if self.wandb else None
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=config.max_steps, initial=step, desc=self.run.name, unit="step", disable=not self.terminal
        )
        self.device, self.flops_per_token = device, flops_per_token
        peak = peak_flops(device)
        self.flops = peak * ranks.world if peak else None
        self.started, self.first_step = time.monotonic(), step
        self.start_clock(step)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close(failed=kind is not None)

    # -- what a run has to tell

    def training(self, step: int, means: dict[str, float], rate: float, norm: float) -> None:
        """The line of a training step. means: train/loss and what else is a mean over the step's batch."""
        if not self.main:
            return
        tokens, now = self.config.batch_tokens, time.monotonic()
        speed = (step - self.clock_step) * tokens / (now - self.clock)
        self.clock, self.clock_step = now, step
        memory = peak_memory(self.device)
        mfu = speed * self.flops_per_token / self.flops if self.flops else None
        self.write(
            **{"step": step, "tokens": step * tokens, **means, "lr": rate, "grad_norm": norm},
            **{"tokens_per_s": speed, "mfu": mfu, "peak_memory": memory},
        )
        text = f"loss {means['train/loss']:.4f}  lr {rate:.2e}  norm {norm:.2f}  {speed:,.0f} tokens/s  "
        text += f"{memory / 2**30:.2f} GiB" + (f"  MFU {mfu:.1%}" if mfu else "")
        self.progress(step, text)

    def skipped(self, step: int, loss: float, rate: float, norm: float) -> None:
        """The line of a step whose loss or gradient was not finite."""
        self.say(f"warning: step {step} skipped: loss {loss}, gradient norm {norm}")
        self.write(**{"step": step, "skipped": 1, "train/loss": None, "grad_norm": None, "lr": rate})

    def validation(self, step: int, loss: float) -> None:
        """The line of a validation."""
        self.write(**{"step": step, "tokens": step * self.config.batch_tokens, "val/loss": loss})
        if step:
            self.say(f"step {step}: validation loss {loss:.4f}")

    def sample(self, step: int, text: str) -> None:
        """The line of a text that the model has written."""
        self.write(step=step, sample=text)
        self.say(f"step {step}, a sample: {text!r}")

    def say(self, text: str) -> None:
        """Print a message."""
        if self.main:
            with contextlib.suppress(OSError):  # stderr on a full disk, a closed terminal
                tqdm.write(text, file=sys.stderr)

    def progress(self, step: int, text: str | None = None) -> None:
        """Move the progress bar; with a text, where there is no terminal, print a line instead."""
        if not self.main:
            return
        self.bar.update(step - self.bar.n)
        if text is not None:
            if self.terminal:
                self.bar.set_postfix_str(text)
            else:
                each = (time.monotonic() - self.started) / max(1, step - self.first_step)
                left = each * (self.config.max_steps - step)
                self.say(f"step {step}/{self.config.max_steps}  {text}  ETA {tqdm.format_interval(left)}")

    # -- the clock, which tokens/s is measured with

    def start_clock(self, step: int) -> None:
        """Training begins now, after `step` steps."""
        self.clock, self.clock_step = time.monotonic(), step

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What happens within does not count: tokens/s is of training alone."""
        paused = time.monotonic()
        yield
        if self.main:
            self.clock += time.monotonic() - paused

    # -- metrics.jsonl and wandb

    def write(self, **values) -> None:
        """Append a line; it goes to wandb too."""
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

    def open(self) -> None:
        """Write all lines anew, atomically. OSError where that is not possible."""
        self.run.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda file: file.writelines(self.lines))
        self.file = open(self.path, "ab", buffering=0)

    def there(self) -> bool:
        """Whether the open file still is the one at its path."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False

    def restore(self) -> None:
        """Write a file that was lost or cut short again. OSError where that is not possible yet."""
        self.close_file()
        gone = not self.run.is_dir()
        self.open()
        if gone:
            write_yaml(self.config, self.run / "config.yaml")
            if self.identity:
                write_atomically(self.run / WANDB_FILE, lambda file: file.write(self.identity))
        what = self.run if gone else self.path
        self.say(
            f"warning: {what} was lost or could not be written for a while: all lines of this run are written again"
        )
        self.warned = False

    def close_file(self) -> None:
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()
        self.file = None

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk. Called before a checkpoint, which must not be ahead of it."""
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

    def close(self, failed: bool) -> None:
        """Write what could not be written before, where that is possible now, and end wandb's run."""
        if not self.main:
            return
        self.bar.close()
        try:
            if self.file is None or not self.there():
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


def lines_until(path: Path, step: int, watched: bool) -> list[bytes]:
    """The whole lines of metrics.jsonl up to a step; a fresh start (step 0) keeps none. Validation and sample of that
    step itself are left out where the checkpoint does not know of them (not `watched`): they happen again."""
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


# ---- wandb

WANDB_FILE = "wandb.json"  # in the run's folder; a checkpoint holds nothing that is drawn from entropy


def check_wandb(config: RunConfig) -> None:
    """ValueError where the config asks for a wandb that is not installed."""
    if config.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb is not installed: pip install wandb, or --wandb off")


def wandb_id(config: RunConfig, run: Path, resumed: bool) -> str:
    """The id of a run, drawn when it begins and kept in its folder, so that a resumed run continues its curve.

    A run that was killed before its first checkpoint begins anew, and keeps its id where the command is the same. So
    does a folder that was moved. A copy, whose original is still there, is a run of its own.
    """
    path, here = run / WANDB_FILE, str(run.resolve())
    now = {k: v for k, v in vars(config).items() if k not in ("out_dir", "resume")}

    def known(folder: Path) -> dict:
        file = folder / WANDB_FILE
        return json.loads(file.read_text()) if file.is_file() else {}

    found = known(run)
    if not resumed and not (config.resume and found.get("config") == now):
        found = {}
    elif found and found["folder"] != here and known(Path(found["folder"])).get("id") == found["id"]:
        found = {}
    elif not found and (run / "wandb").is_dir():  # begun before the file existed: the id was that of the path
        found = {"id": hashlib.sha256(here.encode()).hexdigest()[:16]}
    content = {"id": found.get("id") or secrets.token_hex(8), "folder": here, "config": found.get("config", now)}
    if content != found:
        write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))
    return content["id"]


def start_wandb(config: RunConfig, run: Path, resumed: bool):
    """The wandb run of this folder, the same one after a resume. Offline, with a warning, where nobody is logged in or
    the server is out of reach. None where wandb does not work at all."""
    os.environ.setdefault("WANDB_CACHE_DIR", str((run / "wandb" / "cache").resolve()))  # it would log under $HOME
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

        identity = wandb_id(config, run, resumed)
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
