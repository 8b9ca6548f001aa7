"""Train one run: `python train.py --config FILE [--field value …]`, or the same under torchrun.

Data → windows chosen by (data_seed, step) → model → loss → AdamW, with checkpoints, validation and metrics.jsonl in
out_dir. The order of data, dropout and validation depend on the step alone, never on what happened before, so an
interrupted run continues as if it had not been (`--resume true`).
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import math
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data.shards import Data, DataError, Split, WindowOrder, batch, open_data
from data.tokenizer import load_tokenizer
from model import GPT, resolve
from nanope import checkpoint
from nanope.config import RunConfig, check, padded_vocabulary, parse, write_yaml
from nanope.distributed import (
    Ranks,
    autocast,
    compiler_works,
    peak_flops,
    peak_memory,
    pick_dtype,
    pinned,
    ranks_of,
    to_device,
    to_host,
)
from nanope.log import Log, differences, environment, first_line

# What a resumed run must have in common with its checkpoint: the model and the order of its data
FIXED_ON_RESUME = (
    "block_size",
    "n_layer",
    "n_head",
    "n_embd",
    "bias",
    "dropout",
    "vocab_size",
    "pos",
    "pos_options",
    "batch_tokens",
    "seed",
    "data_seed",
)


# ---- from config to model, optimizer, schedule


def resolve_batch(config: RunConfig, ranks: Ranks) -> tuple[int, int]:
    """(windows a step and rank, windows a forward pass; where that is auto, as it is for null). ValueError that lists what fits."""
    windows = config.batch_tokens // config.block_size
    if windows % ranks.world:
        fits = divisors(windows)
        raise ValueError(
            f"batch_tokens {config.batch_tokens} is {windows} windows of {config.block_size}, which do not divide over {ranks.world} ranks; "
            f"these numbers of ranks do: {', '.join(map(str, fits))}"
        )
    share = windows // ranks.world
    fits, micro = divisors(share), config.micro_batch_size
    if micro in (None, "auto"):
        micro = max([n for n in fits if n * config.block_size <= 16384] or [1])
    if micro not in fits:
        raise ValueError(
            f"batch_tokens {config.batch_tokens} is {windows} windows of {config.block_size}, {share} a rank: "
            f"micro_batch_size {micro} does not divide them; these do: {', '.join(map(str, fits))}"
        )
    return share, micro


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def largest_micro_batch(model: GPT, share: int, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> int:
    """The largest divisor of `share` (windows a step and rank) whose forward and backward pass fit the GPU's memory on every
    rank, with AdamW's moments and a tenth of the memory to spare. Tries them in ascending order; draws nothing, leaves no gradients."""
    T, fits = model.config.block_size, 0
    moments = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]  # AdamW makes them in the first step
    idx = torch.zeros(1, T, dtype=torch.int64, device=device)
    for micro in divisors(share):
        try:
            torch.cuda.reset_peak_memory_stats(device)
            with autocast(device, dtype):
                _, loss = model(idx.expand(micro, T).contiguous(), idx.expand(micro, T).contiguous())
            loss.backward()
            if (
                micro > 1
                and torch.cuda.max_memory_reserved(device) > 0.9 * torch.cuda.get_device_properties(device).total_memory
            ):
                break
            fits = micro
        except torch.OutOfMemoryError:
            break
        finally:
            loss = None
            model.zero_grad(set_to_none=True)
    del moments
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)  # the run's peak is its own
    fits = -int(ranks.max(torch.tensor(-fits, device=device)))  # the least of all ranks
    if not fits:
        raise ValueError(
            f"not even one window of {T} tokens fits the memory of {torch.cuda.get_device_name(device)}: take a smaller model or block_size"
        )
    return fits


def initial_model(config: RunConfig, tokenizer_hash: str) -> GPT:
    """A new model, or with init_from one with the weights of another, whose architecture the config must name and
    whose tokenizer must be the data's."""
    if config.init_from is None:
        return GPT(config.model_config(), seed=config.seed)
    if Path(config.init_from).is_file() or (Path(config.init_from) / "checkpoints").is_dir():
        state = checkpoint.load(checkpoint.find(config.init_from))
        if state["tokenizer"]["sha256"] != tokenizer_hash:
            raise ValueError(
                f"init_from {config.init_from} was trained with the tokenizer {state['tokenizer']['name']}, which is not that of {config.data_dir}"
            )
    else:
        pretrained, gpt2 = GPT.from_pretrained(config.init_from), load_tokenizer("gpt2")
        if pretrained.config.vocab_size == gpt2.n_vocab and gpt2.sha256 != tokenizer_hash:
            raise ValueError(
                f"init_from {config.init_from} has GPT-2's vocabulary, and {config.data_dir} another tokenizer"
            )
        state = {"config": dataclasses.asdict(pretrained.config), "model": pretrained.state_dict()}
    model = checkpoint.build_model(state, block_size=config.block_size, dropout=config.dropout)
    differ = []
    for name in ("n_layer", "n_head", "n_embd", "bias", "vocab_size", "pos", "pos_options"):
        have, asked = getattr(model.config, name), getattr(config, name)
        if name == "pos_options":  # options that the config does not name come with the weights
            have, asked = {k: have.get(k) for k in asked}, asked
        if have != asked:
            differ.append(f"--{name} {have} (the config says {asked})")
    if differ:
        raise ValueError(
            f"init_from {config.init_from} has another architecture than the config; it needs {', '.join(differ)}"
        )
    return model


def make_optimizer(model: GPT, config: RunConfig) -> torch.optim.AdamW:
    """AdamW with every parameter in exactly one group: matrices with weight decay, vectors without, and the scheme's own
    positional parameters without and with pos_lr_multiplier."""
    positional = model.position_parameters()
    groups = {"decayed": [], "plain": [], "positional": []}
    for name, parameter in model.named_parameters():
        groups["positional" if name in positional else "decayed" if parameter.dim() >= 2 else "plain"].append(parameter)
    grouped = [id(p) for group in groups.values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters()), "a parameter is in no group or in two"
    return torch.optim.AdamW(
        [
            {"params": groups["decayed"], "weight_decay": config.weight_decay, "lr_multiplier": 1.0},
            {"params": groups["plain"], "weight_decay": 0.0, "lr_multiplier": 1.0},
            {"params": groups["positional"], "weight_decay": 0.0, "lr_multiplier": config.pos_lr_multiplier},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=next(model.parameters()).device.type in ("cuda", "cpu", "mps"),
    )


def learning_rate(step: int, config: RunConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0."""
    peak, last = config.learning_rate, config.max_steps
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
        return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "step":
        return peak * config.lr_gamma ** (step // config.lr_step)
    if config.schedule == "wsd":
        decay = config.decay_fraction * last
        return config.min_lr + (peak - config.min_lr) * min(1.0, max(0.0, last - step) / decay)
    return peak


# ---- batches


class Feed:
    """The batches of this rank in their order, each read by a thread while the one before is in use."""

    def __init__(self, split: Split, config: RunConfig, share: int, micro: int, ranks: Ranks, device: torch.device):
        self.split, self.block_size, self.share, self.micro, self.ranks, self.device = (
            split,
            config.block_size,
            share,
            micro,
            ranks,
            device,
        )
        self.order = WindowOrder(len(split), config.block_size, config.data_seed)
        self.thread = ThreadPoolExecutor(
            1, "batches", *((torch.cuda.set_device, (device,)) if device.type == "cuda" else ())
        )
        self.number, self.ahead = None, None  # of the micro-batch that is being read, counted from the run's first

    def starts(self, number: int) -> np.ndarray:
        """First tokens of the windows of a micro-batch: (micro,) int64."""
        step, i = divmod(number, self.share // self.micro)
        return self.order.starts((step * self.ranks.world + self.ranks.rank) * self.share + i * self.micro, self.micro)

    def read(self, number: int) -> list[torch.Tensor]:
        return [
            pinned(torch.from_numpy(a), self.device) for a in batch(self.split, self.starts(number), self.block_size)
        ]

    def batches(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """x and y, (micro, T) int64 each on the device, of the micro-steps of a step. DataError where a shard is damaged."""
        count = self.share // self.micro
        for number in range(step * count, (step + 1) * count):
            tensors = self.ahead.result() if number == self.number else self.read(number)
            self.number, self.ahead = number + 1, self.thread.submit(self.read, number + 1)
            yield tuple(t.to(self.device, non_blocking=True) for t in tensors)

    def describe(self, step: int, parts: list[int]) -> str:
        """Where the windows of some micro-steps of a step lie: shard, and offset in tokens."""
        count = self.share // self.micro
        starts = [
            self.thread.submit(self.starts, step * count + part).result() for part in parts
        ]  # in the thread, which alone uses the order
        places = [self.split.locate(int(s)) for s in np.concatenate(starts)]
        return ", ".join(f"{file.name} at token {offset}" for file, offset in places[:8]) + (
            " …" if len(places) > 8 else ""
        )

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)


# ---- validation


class Validation:
    """Mean loss on fixed windows of the validation split, sharded over ranks, summed in float64; draws nothing."""

    def __init__(self, split: Split, config: RunConfig, rows: int, ranks: Ranks, device: torch.device):
        windows = (len(split) - 1) // config.block_size
        if windows < 1:
            raise ValueError(
                f"the val split of {config.data_dir} has {len(split)} tokens, fewer than one window of {config.block_size} + 1"
            )
        count = max(1, min(windows, config.eval_tokens // config.block_size))
        starts = [config.block_size * (i * windows // count) for i in range(count)]  # evenly spread
        self.starts = starts[ranks.rank :: ranks.world]
        self.split, self.rows, self.block_size, self.ranks, self.device = split, rows, config.block_size, ranks, device

    @torch.no_grad()
    def loss(self, model: GPT, dtype: torch.dtype, stop: "Stop | None" = None) -> float:
        """Nats per token, the same on every rank. Interrupted on every rank where one was told to stop meanwhile."""
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for i in range(0, len(self.starts), self.rows):
            if stop and stop.signal:  # it may take longer than the grace time
                break
            x, y = to_device(batch(self.split, self.starts[i : i + self.rows], self.block_size), self.device)
            with autocast(self.device, dtype):
                _, nll = model(x, y, reduction="none")
            total += torch.tensor([nll.cpu().double().sum(), nll.numel()], dtype=torch.float64)
        model.train()
        total = torch.cat((total, torch.tensor(stop.flags() if stop else [], dtype=torch.float64)))
        nll, count, *flags = self.ranks.sum(total.to(self.device) if self.device.type == "cuda" else total).tolist()
        if any(flags):
            raise Interrupted(Stop.first(flags))
        return nll / count


# ---- interruption


class Stop:
    """Remembers SIGINT, SIGTERM or SIGUSR1 until the end of the step; a second Ctrl-C ends at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.signal = 0
        self.before = {s: signal.signal(s, self.handle) for s in self.SIGNALS}

    def handle(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def flags(self) -> list[float]:
        """One of SIGNALS has arrived, or none: what the sum over ranks tells to all of them."""
        return [float(self.signal == s) for s in self.SIGNALS]

    @classmethod
    def first(cls, flags: list[float]) -> int:
        """The signal of summed flags, or 0."""
        return next((s for s, flag in zip(cls.SIGNALS, flags) if flag), 0)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Interrupted(Exception):
    """A signal, the same on every rank, has ended what need not be finished."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


# ---- the run's folder


def find_state(config: RunConfig, data_hash: str, ranks: Ranks) -> dict | None:
    """The checkpoint to resume from, or None to start. Changes nothing."""
    run = Path(config.out_dir)
    exists = (run / "config.yaml").exists() or (run / "metrics.jsonl").exists() or bool(checkpoint.step_files(run))
    if exists and not config.resume:
        raise ValueError(f"{run} already holds a run: continue it with --resume true, or choose another --out_dir")
    state = checkpoint.load_newest(run) if config.resume else None
    if state:
        check_resumable(state, config, data_hash)
        quiet = (*FIXED_ON_RESUME, "resume", "out_dir", "data_dir", "verify_data", "micro_batch_size")
        shown = {k: (state["config"].get(k), v) for k, v in vars(config).items() if k not in quiet}
        changed = [f"{k} {then} → {now}" for k, (then, now) in shown.items() if then != now and k in state["config"]]
        if changed and ranks.main:
            print(
                f"warning: {run} goes on with other settings than it began with: {', '.join(changed)}", file=sys.stderr
            )
    return state


def launch() -> str:
    """The launch that this process belongs to, the same for all its restarts by torchrun --max-restarts."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"{platform.node()} {os.getppid()}"  # torchrun's own process


def restarted(run: Path, ranks: Ranks) -> bool:
    """Whether torchrun restarted these ranks after the same launch had begun the run in this folder: then it is to be resumed."""
    lock = run / ".lock"
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return ranks.first(again and lock.is_file() and lock.read_text() == launch())


def prepare_run(run: Path, ranks: Ranks):
    """Make the run's folder, once every rank has seen what was there. Returns the first rank's lock on it, a file to keep
    open while the run lasts: two processes that train in one folder would mix their checkpoints."""
    ranks.wait()
    lock = None
    if ranks.main:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {run}: wait for it, or choose another --out_dir"
            ) from None
        except OSError as error:
            print(
                f"warning: {run} is on a file system without locks ({error}): do not start a second run in it",
                file=sys.stderr,
            )
        lock.truncate(0)
        lock.write(launch())
        lock.flush()
        for left_over in [*run.glob(".*.partial"), *run.glob("checkpoints/.*.partial")]:
            left_over.unlink()
        if not os.access(run, os.W_OK):
            raise PermissionError(f"no permission to write in {run}")
    return lock


def check_resumable(state: dict, config: RunConfig, data_hash: str) -> None:
    """ValueError where the checkpoint's run differs in what its result depends on."""
    then = state["config"]
    # Options that the config does not name have their defaults, or with init_from came with the weights
    options = (
        {**then["pos_options"], **config.pos_options}
        if config.init_from
        else resolve(config.model_config()).pos_options
    )
    now = {**vars(config), "pos_options": options}
    differ = [f"{k} was {then[k]}, now {now[k]}" for k in FIXED_ON_RESUME if then[k] != now[k]]
    if state["data_hash"] != data_hash:
        differ.append(f"the data in {config.data_dir} is not what the run began with")
    if differ:
        raise ValueError(
            f"cannot resume {config.out_dir}: {'; '.join(differ)}. Choose another --out_dir for a different run"
        )


# ---- the run


def train(config: RunConfig) -> dict:
    """Run `config` to its end, or to a signal. Returns {"step", "val_loss", "signal"}: steps completed, the last
    validation loss in nats per token, the signal that ended it or 0. ValueError or OSError for what a user can mend."""
    check(config)
    with ranks_of(config.device, config.rank_timeout, config.dtype == "tf32") as (ranks, device):
        return Training(config, ranks, device).run()


def with_vocabulary(config: RunConfig, data: Data) -> RunConfig:
    """The config with vocab_size: the data's, rounded up to a multiple of 64, where it is not set. ValueError if it is too small."""
    if config.vocab_size is None:
        config = dataclasses.replace(config, vocab_size=padded_vocabulary(data.vocab_size))
    if config.vocab_size < data.vocab_size:
        raise ValueError(f"vocab_size {config.vocab_size} is smaller than the {data.vocab_size} of {config.data_dir}")
    return config


class Training:
    """One run in progress. Its state is what a checkpoint holds; everything else follows from the config and the step.

    On a GPU the host is one step ahead: it launches a step and then reads the outcome of the one before (`settle`), so
    that the GPU never waits for it. A step whose loss or gradient is not finite is skipped on the device itself.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, device: torch.device):
        self.ranks, self.device, self.path = ranks, device, Path(config.out_dir)
        self.dtype = pick_dtype(config.dtype, device)
        if config.wandb != "off" and importlib.util.find_spec("wandb") is None:
            raise ValueError("wandb is not installed: pip install wandb, or --wandb off")
        self.data = data = open_data(config.data_dir, verify=config.verify_data or None)
        config = with_vocabulary(config, data)
        self.share, self.micro = resolve_batch(config, ranks)
        WindowOrder(
            len(data.split("train")), config.block_size, config.data_seed
        )  # too little text is an error before anything is made
        data.split("val")
        config = dataclasses.replace(config, resume=config.resume or restarted(self.path, ranks))

        state = find_state(config, data.hash, ranks)
        ranks.check_equal(
            state["step"] if state else 0,
            device,
            f"the step to resume from: {self.path} must be one folder, shared by all nodes",
        )
        self.model = checkpoint.build_model(state) if state else initial_model(config, data.tokenizer_hash)
        self.model.to(device)
        if config.micro_batch_size == "auto":
            found = state["config"]["micro_batch_size"] if state else None
            if found and self.share % found == 0:
                self.micro = found
            elif device.type == "cuda":
                self.micro = largest_micro_batch(self.model, self.share, ranks, device, self.dtype)
        self.config = config = dataclasses.replace(
            config, micro_batch_size=self.micro, pos_options=self.model.config.pos_options
        )
        self.validation = Validation(data.split("val"), config, self.micro, ranks, device)

        self.lock = prepare_run(self.path, ranks)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        # Steps completed; the last at which was done what watches; the last validation's loss, the lowest; bad steps in a row
        self.step, self.watched, self.val_loss, self.best, self.bad_steps = 0, -1, math.nan, math.inf, 0
        if state:
            self.restore(state)
        del state
        if ranks.main and self.step < config.max_steps:  # a finished run keeps the record of how it was made
            write_yaml(config, self.path / "config.yaml")

        if config.compile and compiler_works(device):
            self.model.compile_parts()
        self.parallel = self.model  # what forward and backward go through
        if ranks.world > 1:
            # Blocks are compiled one by one inside: each one's gradients are reduced while the blocks below still compute theirs
            self.parallel = DistributedDataParallel(
                self.model,
                device_ids=[device.index] if device.type == "cuda" else None,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )
        self.feed = Feed(data.split("train"), config, self.share, self.micro, ranks, device)
        self.tokenizer = load_tokenizer(data.manifest["tokenizer"]["name"]) if config.sample_interval else None
        self.log = Log(
            config,
            ranks.main,
            self.step,
            environment(config, device, self.dtype, ranks.world, data.hash),
            self.watched == self.step,
        )
        self.writer, self.saved, self.owed = checkpoint.Writer(), self.step, False
        self.unwritten: OSError | None = None  # why the newest checkpoint could not be written
        self.pending: collections.deque[Outcome] = collections.deque()
        self.behind = 1 if device.type == "cuda" else 0  # outcomes that may be pending after a step
        self.interrupted = 0
        self.flops, self.flops_per_token = peak_flops(device), self.model.flops_per_token()

    def restore(self, state: dict) -> None:
        fields = [
            {k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, now in zip(self.optimizer.param_groups, fields):  # weight decay, betas and the like are the config's
            group.update(now)
        if state["scaler"]:  # empty where the run was not float16
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.bad_steps, self.val_loss = (
            state[k] for k in ("step", "best_val_loss", "bad_steps", "val_loss")
        )
        self.watched = state.get("watched", self.step)
        restore_generators(state["generators"], self.device)

    # ---- from start to end

    def run(self) -> dict:
        """To the end or to a signal; see train()."""
        c, stop, failed = self.config, Stop(), True
        try:
            if self.step == 0:
                self.log.say(self.title())
            elif self.step >= c.max_steps:
                self.log.say(f"{self.path} is at step {self.step} of {c.max_steps}: nothing to do")
            if self.watched != self.step:  # at the start, or owed by a run that was interrupted here
                better = self.watch(stop)
                if self.interrupted or 0 < self.step == c.max_steps:
                    self.save_checkpoint(best=better)
                elif better:
                    self.save_best()
            self.clock, self.clock_step = time.monotonic(), self.step
            while self.step < c.max_steps and not self.interrupted:
                self.optimizer_step(stop)
                self.follow_up(stop)
            self.finish_writing()
            failed = False
            return {"step": self.step, "val_loss": self.val_loss, "signal": self.interrupted}
        except torch.OutOfMemoryError as error:
            raise ValueError(self.out_of_memory(error)) from error
        except RuntimeError as error:
            if "DefaultCPUAllocator" in str(error):
                raise ValueError(self.out_of_memory(error)) from error
            raise
        finally:
            stop.restore()
            if not isinstance(sys.exception(), KeyboardInterrupt):
                self.writer.wait()  # what was good is to be on the disk
            self.feed.close()
            self.log.close(failed)
            if self.lock:
                self.lock.close()

    def title(self) -> str:
        c = self.config
        return (
            f"{self.path}: {c.pos} {c.pos_options}, {self.model.parameter_count():,} parameters; {c.max_steps} steps of {c.batch_tokens:,} tokens "
            f"({self.share * self.ranks.world} windows of {c.block_size}, {self.ranks.world} rank(s) × {self.share // self.micro} × {self.micro}); "
            f"{len(self.feed.split):,} training tokens, {c.max_steps * c.batch_tokens / len(self.feed.split):.2f} epochs; "
            f"{self.device}, {str(self.dtype).removeprefix('torch.')}"
        )

    def optimizer_step(self, stop: Stop) -> None:
        """Launch one step: forward, backward, update; its outcome is pending."""
        c, ranks = self.config, self.ranks
        rate = learning_rate(self.step, c)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        if c.dropout:  # dropout too depends on the step alone
            torch.manual_seed(
                int.from_bytes(hashlib.sha256(f"{c.seed}/{self.step}/{ranks.rank}".encode()).digest()[:8], "little")
                >> 1
            )
        parts, weight = [], self.micro / self.share
        with self.model.parameters_fixed():
            for i, (x, y) in enumerate(self.feed.batches(self.step)):
                last = i == self.share // self.micro - 1  # gradients are reduced over ranks once a step
                with contextlib.nullcontext() if last or ranks.world == 1 else self.parallel.no_sync():
                    with autocast(self.device, self.dtype):
                        _, loss = self.parallel(x, y)
                    self.scaler.scale(loss * weight).backward()
                parts.append(loss.detach())
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.grad_clip or math.inf)
        shared = sum(part * weight for part in parts).reshape(1) / ranks.world  # mean over micro-steps and ranks
        if ranks.world > 1:
            flags = pinned(torch.tensor(stop.flags()), self.device).to(self.device, non_blocking=True)
            shared = ranks.sum(torch.cat((shared, flags)))
        finite = torch.isfinite(norm) & torch.isfinite(shared[0])  # the same on every rank
        if self.device.type != "mps" or finite:
            self.optimizer.found_inf = (
                ~finite
            ).float()  # fused AdamW skips the update where this is 1, without asking the host
            self.optimizer.step()  # not scaler.step(), which would look at the gradients alone: what is logged as skipped is skipped
        self.scaler.update()  # float16: a lower scale where a gradient was not finite
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.pending.append(Outcome(self.step, rate, to_host(torch.cat((norm.reshape(1), shared))), parts))

    def due(self, interval: int) -> bool:
        return bool(interval) and self.step % interval == 0

    def follow_up(self, stop: Stop) -> None:
        """What is due after a step: its outcome, log, validation, sample, checkpoint."""
        c = self.config
        end = self.step == c.max_steps
        self.owed = self.owed or self.due(c.checkpoint_interval)
        if self.ranks.world == 1:
            self.interrupted = stop.signal
        looked_at = (
            end
            or self.owed
            or self.interrupted
            or any(map(self.due, (c.log_interval, c.eval_interval, c.sample_interval)))
        )
        self.settle(0 if looked_at else self.behind)
        if self.interrupted:  # known from a step before this one
            self.settle(0)
        self.log.progress(self.step)
        paused = time.monotonic()
        better = not self.interrupted and self.watch(
            stop
        )  # when interrupted at once to the checkpoint: the rest waits until the run is resumed
        if (
            end or self.interrupted or (self.owed and not self.bad_steps)
        ):  # while steps are bad, no checkpoint takes the place of a good one
            self.save_checkpoint(best=better)
        elif better:
            self.save_best()
        self.clock += time.monotonic() - paused  # tokens/s is of training alone

    def settle(self, behind: int) -> None:
        """Read the outcomes of all steps but the newest `behind`: count bad ones, log those that are due.
        ValueError where max_bad_steps in a row were not finite."""
        c = self.config
        while len(self.pending) > behind:
            outcome = self.pending.popleft()
            norm, loss, *flags = outcome.values()
            step, rate = outcome.step, outcome.rate
            self.interrupted = self.interrupted or Stop.first(flags)
            if not (math.isfinite(norm) and math.isfinite(loss)):
                self.bad_steps += 1
                self.log.say(f"warning: step {step} skipped: loss {loss}, gradient norm {norm}")
                self.log.write(**{"step": step, "skipped": 1, "train/loss": None, "grad_norm": None, "lr": rate})
                if self.bad_steps >= c.max_bad_steps:
                    raise ValueError(self.diverged(outcome))
                continue
            self.bad_steps = 0
            if step % c.log_interval == 0 or step == c.max_steps:
                self.log_step(step, rate, loss, norm)

    def log_step(self, step: int, rate: float, loss: float, norm: float) -> None:
        tokens, now = self.config.batch_tokens, time.monotonic()
        speed = (step - self.clock_step) * tokens / (now - self.clock)
        self.clock, self.clock_step = now, step
        memory = peak_memory(self.device)
        mfu = speed * self.flops_per_token / (self.flops * self.ranks.world) if self.flops else None
        self.log.write(
            **{"step": step, "tokens": step * tokens, "train/loss": loss, "lr": rate, "grad_norm": norm},
            **{"tokens_per_s": speed, "mfu": mfu, "peak_memory": memory},
        )
        text = f"loss {loss:.4f}  lr {rate:.2e}  norm {norm:.2f}  {speed:,.0f} tokens/s  {memory / 2**30:.2f} GiB"
        self.log.progress(step, text + (f"  MFU {mfu:.1%}" if mfu else ""))

    # ---- what watches the training and leaves it as it is

    def watch(self, stop: Stop) -> bool:
        """Validate and sample where due; whether the validation loss is the lowest so far. A signal puts off both."""
        try:
            better = (self.step in (0, self.config.max_steps) or self.due(self.config.eval_interval)) and self.validate(
                stop
            )
        except Interrupted as interruption:
            self.interrupted = interruption.signal
            return False
        if self.step and self.due(self.config.sample_interval):
            self.sample()
        self.watched = self.step
        return better

    def validate(self, stop: Stop) -> bool:
        """Validate, log; whether the loss is the lowest so far. That before training is not counted."""
        self.val_loss = self.validation.loss(self.model, self.dtype, stop)
        self.log.write(**{"step": self.step, "tokens": self.step * self.config.batch_tokens, "val/loss": self.val_loss})
        if self.step:
            self.log.say(f"step {self.step}: validation loss {self.val_loss:.4f}")
        return self.step > 0 and self.val_loss < self.best

    def sample(self, length: int = 64) -> None:
        """Log a text that the model writes, from a generator of its own."""
        if not self.ranks.main:
            return
        length = min(length, self.config.block_size)
        generator = torch.Generator(self.device).manual_seed(self.step)
        prompt = torch.full((1, 1), self.data.eot, dtype=torch.int64, device=self.device)
        eager = (
            torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()
        )  # every length would be compiled
        with eager, autocast(self.device, self.dtype):
            ids = self.model.generate(prompt, length, top_k=50, generator=generator)[0, 1:].tolist()
        text = self.tokenizer.decode([i for i in ids if i < self.data.vocab_size and i != self.data.eot])
        self.log.write(step=self.step, sample=text)
        self.log.say(f"step {self.step}, a sample: {text!r}")

    # ---- checkpoints

    def snapshot(self) -> dict:
        """What a checkpoint holds: tensors and plain types only, copied to the host."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "generators": generators(),
            "data_hash": self.data.hash,
            "tokenizer": dict(self.data.manifest["tokenizer"]),
            "best_val_loss": self.best,
            "val_loss": self.val_loss,
            "watched": self.watched,
            "bad_steps": self.bad_steps,
        }
        return checkpoint.host_copy(state)

    def save_checkpoint(self, best: bool = False) -> None:
        """step_N.pt of this moment, and best.pt too; written by a thread while training goes on."""
        self.owed = False
        keep = self.config.keep_checkpoints if not self.bad_steps else sys.maxsize
        self.write(best, lambda state: checkpoint.save_step(self.path, state, keep))

    def save_best(self) -> None:
        self.write(True, None)

    def write(self, best: bool, save_step: Callable[[dict], None] | None) -> None:
        self.writer.wait()  # at most one in flight
        lowest = self.best
        if best:
            self.best = self.val_loss
        if not self.ranks.main:
            return
        state = self.snapshot()

        def job() -> None:
            self.log.sync()  # a checkpoint never knows more steps than metrics.jsonl
            if best and not self.attempt(lambda: checkpoint.save(self.path / "best.pt", state), state["step"]):
                self.best = state["best_val_loss"] = lowest
            if save_step and self.attempt(lambda: save_step(state), state["step"]):
                self.saved = state["step"]

        self.writer.submit(job)

    def attempt(self, save: Callable[[], None], step: int) -> bool:
        """Whether a file could be written. If not, training goes on: there may be room, or the disk, the next time."""
        try:
            save()
            self.unwritten = None
            return True
        except OSError as error:
            self.unwritten = error
            self.log.say(
                f"warning: at step {step} a checkpoint could not be written ({error}): training goes on; the newest good one is of step {self.saved}"
            )
            return False

    def finish_writing(self) -> None:
        """Until everything is on the disk. OSError where the last checkpoint could not be written, also not when tried again."""
        self.writer.wait()
        if self.unwritten and self.ranks.main:
            self.save_checkpoint()
            self.writer.wait()
        if self.interrupted:
            saved = (
                "checkpoint written: continue with --resume true"
                if not self.unwritten
                else "but no checkpoint could be written"
            )
            self.log.say(f"stopped by {signal.Signals(self.interrupted).name} after step {self.step}, {saved}")
        self.ranks.wait()  # torchrun ends the others when one has left
        if self.unwritten:
            raise OSError(
                f"the checkpoint of step {self.step} could not be written ({self.unwritten}); step {self.saved} is where --resume true continues"
            )

    # ---- what went wrong

    def diverged(self, outcome: "Outcome") -> str:
        self.writer.wait()
        bad = [i for i, part in enumerate(outcome.parts) if not math.isfinite(part.item())]
        what = "micro-batches whose loss is not finite" if bad else "all windows of the step"
        places = self.feed.describe(outcome.step - 1, bad or list(range(len(outcome.parts))))
        text = (
            f"{self.bad_steps} steps in a row up to step {outcome.step} had a loss or gradient that is not finite (learning rate {outcome.rate:.3g}; rank {self.ranks.rank}, {what}: "
            f"windows at {places}). Lower learning_rate, or look at the data there (python data/show.py {self.config.data_dir}); the checkpoints in {self.path} are from before"
        )
        if 0 < outcome.step - self.bad_steps <= self.saved:
            text += f", but step_{self.saved}.pt holds the very weights that failed: delete it to go back further"
        return text

    def out_of_memory(self, error: Exception) -> str:
        smaller = [n for n in divisors(self.share) if n < self.micro]
        advice = (
            f"try --micro_batch_size {max(smaller, default=1, key=lambda n: (n <= self.micro // 2, n))}"
            if smaller
            else "take a smaller model or block_size, or more ranks"
        )
        advice += ", or --micro_batch_size auto" if smaller and self.device.type == "cuda" else ""
        return (
            f"out of memory at micro_batch_size {self.micro} ({self.micro} windows of {self.config.block_size} tokens) on {self.device}: {advice}; "
            f"the result does not depend on it. train.py --plan estimates the memory ({first_line(error)})"
        )


@dataclasses.dataclass
class Outcome:
    """A step's numbers on their way from the device."""

    step: int  # steps completed with it
    rate: float
    values: Callable[[], list[float]]  # waits for: gradient norm, loss, and with several ranks how many got each signal
    parts: list[torch.Tensor]  # this rank's losses of the micro-steps


def generators() -> dict:
    version, internal, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    kind, keys, position, has_gauss, cached = np.random.get_state()
    old = {
        "kind": kind,
        "keys": torch.from_numpy(keys.astype(np.int64)),
        "position": position,
        "has_gauss": has_gauss,
        "cached": cached,
    }
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": [version, list(internal), gauss], "numpy": old}


def restore_generators(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if numpy := state.get("numpy"):
        np.random.set_state(
            (
                numpy["kind"],
                numpy["keys"].numpy().astype(np.uint32),
                numpy["position"],
                numpy["has_gauss"],
                numpy["cached"],
            )
        )


# ---- the command


def modes(parser) -> None:
    """Arguments that are no fields of a run."""
    parser.add_argument(
        "--plan", action="store_true", help="Print parameters, FLOPs, memory and hours of the run; train nothing."
    )
    parser.add_argument("--gpus", type=int, help="With --plan: the number of GPUs (default: the ranks of this launch).")
    parser.add_argument("--mfu", type=float, default=0.4, help="With --plan: the model FLOPs utilisation to expect.")
    parser.add_argument("--price_per_hour", type=float, help="With --plan: price of an hour of one GPU.")
    parser.add_argument(
        "--diff",
        metavar="RUN",
        help="Print where the config differs from that of another run's folder; train nothing. Exit status 1 where it does.",
    )


def show_differences(config: RunConfig, run: Path) -> int:
    """Print them; 1 where there are any, else 0."""
    data_hash = None
    with contextlib.suppress(DataError):  # data that is not here yet leaves its fields open
        data = open_data(config.data_dir, verify=False)
        config, data_hash = with_vocabulary(config, data), data.hash
    options = resolve(
        config.model_config() if config.vocab_size else dataclasses.replace(config.model_config(), vocab_size=1)
    ).pos_options
    micro = (
        None
        if config.micro_batch_size == "auto"
        else resolve_batch(config, Ranks())[1]
        if config.micro_batch_size
        else None
    )
    lines = differences({**vars(config), "pos_options": options, "micro_batch_size": micro}, run, data_hash)
    print("\n".join(lines) or f"no difference from {run}")
    return int(bool(lines))


def main() -> None:
    try:
        config, mode = parse(modes=modes)
        if mode["diff"]:
            check(config)
            sys.exit(show_differences(config, Path(mode["diff"])))
        if mode["plan"]:
            from nanope.plan import plan, show

            return print(
                show(
                    plan(
                        config,
                        gpus=mode["gpus"] or int(os.environ.get("WORLD_SIZE", 1)),
                        mfu=mode["mfu"],
                        price_per_hour=mode["price_per_hour"],
                    )
                )
            )
        result = train(config)
    except (ValueError, OSError) as error:
        if (
            dist.is_initialized()
        ):  # left so on purpose, see ranks_of: at exit, too, NCCL could wait for ranks that are not coming
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: the last checkpoint, if there is one, is where --resume true continues", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if result["signal"]:
        # 75 (EX_TEMPFAIL) asks a scheduler to start the job again; Ctrl-C does not
        sys.exit(128 + signal.SIGINT if result["signal"] == signal.SIGINT else os.EX_TEMPFAIL)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until the run handles them itself: there is nothing to save yet
        signal.signal(number, lambda *_: sys.exit(os.EX_TEMPFAIL))
    main()
