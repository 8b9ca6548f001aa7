"""Where a training step's time goes: a table by part of the model, and a trace for chrome://tracing or ui.perfetto.dev.

    python scripts/trace.py --config configs/quickstart.yaml --pos comrope --steps 5 --out trace.json
    python scripts/trace.py --run runs/gpt2-small --steps 3 --out trace.json     # a run's own config; further fields override it

Takes the fields of train.py. Eager and on one device; the weights are new, and the tokens random where data_dir holds no data.
Parts are the model's methods, each within a profiler range. A backward operation belongs to the part whose forward operation has
its sequence number, which autograd gives to both. On a GPU the times are those of its kernels, and the rest of the step is idle.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

import _root
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from data.shards import batch, open_data
from model import GPT, SCHEMES
from nanope.config import RunConfig, check, padded_vocabulary, parse
from nanope.distributed import Ranks, autocast, pick_device, pick_dtype
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


@contextlib.contextmanager
def ranges(model: GPT):
    """Within it each part of the model runs in a profiler range of its name; nothing stays behind."""
    with contextlib.ExitStack() as stack:

        def wrap(owner, attribute, name):
            function = getattr(owner, attribute)

            def ranged(*args, **kwargs):
                with record_function(PREFIX + name):
                    return function(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, attribute, ranged))

        scheme = SCHEMES[model.config.pos]
        wrap(scheme, "constants", "positions")
        wrap(scheme, "prepare", "positions")
        for name, module in model.transformer.items():
            if name in ("wte", "wpe"):
                wrap(module, "forward", "embedding")
        for block in model.transformer["h"]:
            wrap(block.attn, "project", "attention: projection")
            wrap(block.attn, "turn", "attention: turn")
            wrap(block.attn, "attend", "attention: sdpa")
            wrap(block.attn.c_proj, "forward", "attention: output")
            wrap(block.mlp, "forward", "MLP")
            wrap(block.ln_1, "forward", "norms")
            wrap(block.ln_2, "forward", "norms")
        wrap(model.transformer["ln_f"], "forward", "norms")
        stack.enter_context(mock.patch.dict(model.losses))
        losses = argparse.Namespace(**model.losses)
        wrap(losses, "mean", "loss head")
        model.losses["mean"] = losses.mean
        yield


def batches(config: RunConfig, device: torch.device) -> tuple[RunConfig, list]:
    """The config with its vocabulary and micro-batch filled in, and the micro-batches (x, y) of a step, each (b, T) int64."""
    share, micro = resolve_batch(config, Ranks())
    has_data = (Path(config.data_dir) / "manifest.json").is_file()
    data = open_data(config.data_dir) if has_data else None
    vocab_size = config.vocab_size or padded_vocabulary(data.vocab_size if has_data else 50257)
    T, generator = config.block_size, torch.Generator().manual_seed(0)
    pairs = []
    for i in range(0, share, micro):
        if has_data:
            x, y = (torch.from_numpy(a) for a in batch(data.split("train"), [T * j for j in range(i, i + micro)], T))
        else:
            tokens = torch.randint(vocab_size, (micro, T + 1), generator=generator)
            x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        pairs.append((x.to(device), y.to(device)))
    return dataclasses.replace(config, vocab_size=vocab_size, micro_batch_size=micro), pairs


def trace(config: RunConfig, steps: int):
    """Profile `steps` optimizer steps after two unprofiled ones. Returns the profile, and the device that ran it."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    config, pairs = batches(config, device)
    model = GPT(config.model_config(), seed=config.seed).to(device)
    optimizer = make_optimizer(model, config)

    def step():
        with model.parameters_fixed():
            for x, y in pairs:
                with record_function(PREFIX + "other forward"), autocast(device, dtype):
                    loss = model(x, y)[1] / len(pairs)
                with record_function(PREFIX + "other backward"):
                    loss.backward()
        with record_function(PREFIX + "clip"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or float("inf"))
        with record_function(PREFIX + "optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with ranges(model):
        for _ in range(2):
            step()
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                with record_function(PREFIX + "rest"):
                    step()
    return profiler, device


def by_part(events, device: torch.device) -> dict[str, float]:
    """Seconds of each part in all profiled steps, "… (backward)" for its backward; they sum to the steps' time."""
    cpu = device.type != "cuda"
    own = lambda e: (e.cpu_time_total if cpu else e.device_time_total) / 1e6  # noqa: E731 - of the event and what it contains
    events = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    spans = sorted(
        (e for e in events if e.name.startswith(PREFIX)), key=lambda e: (e.time_range.start, -e.time_range.end)
    )
    main = spans[0].thread
    seconds, stack, part_of = defaultdict(float), [], {}  # part_of: sequence number → part
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        while stack and stack[-1].time_range.end <= event.time_range.start:
            stack.pop()
        if event.name.startswith(PREFIX):
            name = event.name.removeprefix(PREFIX)
            seconds[name] += own(event)
            if stack:  # a part inside another is taken out of it
                seconds[stack[-1].name.removeprefix(PREFIX)] -= own(event)
            if name == "rest" and not cpu:  # the wall time of the step: what no kernel fills is idle
                seconds[name] += event.cpu_time_total / 1e6 - own(event)
            stack.append(event)
        elif event.name.startswith("autograd::engine::evaluate_function"):
            part = part_of.get(event.sequence_nr)
            name = (
                f"{part} (backward)"
                if part
                else "accumulation of gradients"
                if "AccumulateGrad" in event.name
                else "other backward"
            )
            seconds[name] += own(event)
            inside = (
                stack and event.thread == main
            )  # on a GPU backward has a thread of its own, whose kernels no range contains
            seconds[stack[-1].name.removeprefix(PREFIX) if inside else "rest"] -= own(event)
        elif stack and event.sequence_nr >= 0 and event.thread == main:
            name = stack[-1].name.removeprefix(PREFIX)
            if name in FORWARD:
                part_of[event.sequence_nr] = name  # the last operation that saw a number is the one that took it
    return dict(seconds)


def table(seconds: dict[str, float], steps: int) -> str:
    total = sum(seconds.values())
    lines = ["| part | ms a step | share |", "|---|--:|--:|"]
    for name in (*FORWARD, *(f"{part} (backward)" for part in FORWARD), *STEP):
        if name in seconds:
            lines.append(f"| {name} | {seconds[name] / steps * 1e3:.2f} | {seconds[name] / total:.1%} |")
    return "\n".join([*lines, f"| step | {total / steps * 1e3:.2f} | {sum(seconds.values()) / total:.1%} |"])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/trace.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=5, help="profiled optimizer steps, after two others (default: 5)")
    parser.add_argument("--out", required=True, help="file of the trace, .json or .json.gz")
    parser.add_argument("--run", help="a run's folder, whose config.yaml to take")
    args, fields = parser.parse_known_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, not {args.steps}")
    if args.run and not (Path(args.run) / "config.yaml").is_file():
        parser.error(f"--run {args.run} holds no config.yaml: expected the out_dir of a run")
    if not Path(args.out).parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {Path(args.out).parent}")
    config = parse([*(["--config", str(Path(args.run) / "config.yaml")] if args.run else []), *fields])
    try:
        check(config)
        profiler, device = trace(config, args.steps)
        profiler.export_chrome_trace(args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    c = config
    print(
        f"{c.pos}, {c.n_layer} layers × {c.n_embd}, length {c.block_size}, {c.batch_tokens:,} tokens a step; {device}, {torch.get_num_threads()} CPU thread(s), {args.steps} steps\n"
    )
    print(table(by_part(profiler.events(), device), args.steps))


if __name__ == "__main__":
    main()
