"""Where a training step's time goes, by part of the model. scripts/trace.py shows it.

Each part runs within a profiler range of its name. A backward operation belongs to the part whose forward operation has
its sequence number, which autograd gives to both. On a GPU the times are those of its kernels, and the rest of the step
is idle.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch.profiler import ProfilerActivity, profile, record_function

from data.shards import open_data
from model import GPT
from nanope import coordinates
from nanope.config import RunConfig, with_vocabulary
from nanope.distributed import Ranks, autocast, pick_device, use_dtype
from nanope.feed import rows_of
from nanope.optim import make_optimizer, resolve_batch

FORWARD = (
    "embedding",
    "norms",
    "positions",
    "attention: projection",
    "attention: turn",
    "attention: sdpa",
    "attention: output",
    "MLP",
    "loss head",
    "other forward",
)
STEP = ("accumulation of gradients", "other backward", "clip", "optimizer", "rest")
PREFIX = "part/"


# ---- ranges


def in_range(name: str, function: Callable) -> Callable:
    """The function, within a range."""

    def ranged(*args, **kwargs):
        with record_function(PREFIX + name):
            return function(*args, **kwargs)

    return ranged


def add_range(name: str, module: nn.Module) -> None:
    """The module's forward passes, each within a range."""
    ranges = []

    def begin(*_) -> None:
        ranges.append(record_function(PREFIX + name))
        ranges[-1].__enter__()

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(lambda *_: ranges.pop().__exit__(None, None, None))


class Ranged(nn.Module):
    """A layer's positional scheme with its work in ranges. Everything else of it is the scheme's own."""

    def __init__(self, scheme: nn.Module):
        super().__init__()
        self.scheme = scheme

    def __getattr__(self, name: str):
        scheme = super().__getattr__("scheme")
        return scheme if name == "scheme" else getattr(scheme, name)

    def constants(self, layers: list["Ranged"]) -> list | None:
        return in_range("positions", self.scheme.constants)([layer.scheme for layer in layers])

    def prepare(self, layers: list["Ranged"], ctx) -> list | None:
        return in_range("positions", self.scheme.prepare)([layer.scheme for layer in layers], ctx)

    def project(self, c_attn: nn.Module, x: torch.Tensor, ctx) -> torch.Tensor:
        return in_range("attention: projection", self.scheme.project)(c_attn, x, ctx)

    def encode(self, qk: torch.Tensor, x: torch.Tensor, ctx) -> torch.Tensor:
        return in_range("attention: turn", self.scheme.encode)(qk, x, ctx)


def add_ranges(model: GPT) -> None:
    """Each part of the model in a range of its name. Names of the schemes' own parameters change by it, so an optimizer
    is to be made before."""
    for name in ("wte", "wpe"):
        if name in model.transformer:
            add_range("embedding", model.transformer[name])
    for block in model.transformer["h"]:
        block.attn.pos = Ranged(block.attn.pos)
        add_range("attention: output", block.attn.c_proj)
        add_range("MLP", block.mlp)
        add_range("norms", block.ln_1)
        add_range("norms", block.ln_2)
    add_range("norms", model.transformer["ln_f"])
    model.attend = in_range("attention: sdpa", model.attend)
    model.losses["mean"] = in_range("loss head", model.losses["mean"])


# ---- the steps


def batches(config: RunConfig, device: torch.device) -> tuple[RunConfig, list]:
    """The config with its vocabulary and micro-batch filled in, and the micro-batches of a step: x and y, (b, T) int64
    each. The tokens are random where data_dir holds no data."""
    share, micro = resolve_batch(config, Ranks())
    has_data = (Path(config.data_dir) / "manifest.json").is_file()
    data = open_data(config.data_dir) if has_data else None
    vocab_size = data.vocab_size if has_data else config.vocab_size or 50257
    config = with_vocabulary(config, vocab_size, data.eot if has_data else config.eot or 0)
    T, generator = config.block_size, torch.Generator().manual_seed(0)
    pairs, rows = [], rows_of(data.split("train"), config) if has_data else None
    for i in range(0, share, micro):
        if has_data:
            x, y = (torch.from_numpy(a) for a in rows.read(rows.items(i, micro)))
        else:
            tokens = torch.randint(vocab_size, (micro, T + 1), generator=generator)
            x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        pairs.append((x.to(device), y.to(device)))
    return dataclasses.replace(config, micro_batch_size=micro), pairs


def trace(config: RunConfig, steps: int) -> tuple[profile, torch.device]:
    """Profile `steps` optimizer steps after two unprofiled ones. Returns the profile, and the device that ran it."""
    device = pick_device(config.device)
    dtype = use_dtype(config.dtype, device)
    config, pairs = batches(config, device)
    model = GPT(config.model_config(), seed=config.seed).to(device)
    model.describe_tokens(coordinates.made_up(config.vocab_size))
    model.activation_checkpointing = config.activation_checkpointing
    optimizer = make_optimizer(model, config)
    add_ranges(model)

    def step(seed: int) -> None:
        with model.parameters_fixed(seed):
            for x, y in pairs:
                with record_function(PREFIX + "other forward"), autocast(device, dtype):
                    loss, own = model(x, y)[1], model.auxiliary()
                    loss = (loss if own is None else loss + own) / len(pairs)
                with record_function(PREFIX + "other backward"):
                    loss.backward()
        with record_function(PREFIX + "clip"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or float("inf"))
        with record_function(PREFIX + "optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    for seed in range(2):
        step(seed)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for seed in range(steps):
            with record_function(PREFIX + "rest"):
                step(seed)
    return profiler, device


# ---- the table


def by_part(events, device: torch.device) -> dict[str, float]:
    """Seconds of each part in all profiled steps, "… (backward)" for its backward; they sum to the steps' time."""
    cpu = device.type != "cuda"

    def own(event) -> float:
        """Seconds of the event and what it contains."""
        return (event.cpu_time_total if cpu else event.device_time_total) / 1e6

    events = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    events.sort(key=lambda e: (e.time_range.start, -e.time_range.end))
    main = next(e for e in events if e.name.startswith(PREFIX)).thread
    seconds, stack, part_of = defaultdict(float), [], {}  # ranges around an event, sequence number → part
    for event in events:
        while stack and stack[-1].time_range.end <= event.time_range.start:
            stack.pop()
        around = stack[-1].name.removeprefix(PREFIX) if stack else None
        if event.name.startswith(PREFIX):
            name = event.name.removeprefix(PREFIX)
            seconds[name] += own(event)
            if around:  # a part inside another is taken out of it
                seconds[around] -= own(event)
            if name == "rest" and not cpu:  # the wall time of the step: what no kernel fills is idle
                seconds[name] += event.cpu_time_total / 1e6 - own(event)
            stack.append(event)
        elif event.name.startswith("autograd::engine::evaluate_function"):
            if part := part_of.get(event.sequence_nr):
                name = f"{part} (backward)"
            else:
                name = "accumulation of gradients" if "AccumulateGrad" in event.name else "other backward"
            seconds[name] += own(event)
            # On a GPU backward has a thread of its own, whose kernels no range contains
            seconds[around if around and event.thread == main else "rest"] -= own(event)
        elif around in FORWARD and event.sequence_nr >= 0 and event.thread == main:
            part_of[event.sequence_nr] = around  # the last operation that saw a number is the one that took it
    return dict(seconds)


def table(seconds: dict[str, float], steps: int) -> str:
    """Markdown: milliseconds a step and share of each part that has any."""
    total = sum(seconds.values())
    lines = ["| part | ms a step | share |", "|---|--:|--:|"]
    for name in (*FORWARD, *(f"{part} (backward)" for part in FORWARD), *STEP):
        if name in seconds:
            lines.append(f"| {name} | {seconds[name] / steps * 1e3:.2f} | {seconds[name] / total:.1%} |")
    return "\n".join([*lines, f"| step | {total / steps * 1e3:.2f} | {1:.1%} |"])
