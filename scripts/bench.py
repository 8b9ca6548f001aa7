"""Training speed and peak memory: each scheme relative to rope, and rope relative to nanoGPT and to transformers' GPT-2, in
one interleaved run.

    python scripts/bench.py [train]                          # shape `small`: 4 layers × 128, vocabulary 50,304, length 256, batch 16
    python scripts/bench.py --shape all --nanogpt ../nanoGPT   # every shape of SHAPES, beside a clone of karpathy/nanoGPT
    python scripts/bench.py --shape bytes --schemes carope   # the quickstart's size; also --n_layer, --batch … one by one
    python scripts/bench.py data --source …                  # preparation of data; scripts/bench_data.py
    python scripts/bench.py feed --data_dir …                # reading of training's batches; scripts/bench_feed.py
    python scripts/bench.py eval                             # evaluation instead of training; scripts/bench_eval.py, --help for its options

Each variant lives in a process of its own, so that its peak memory is its own; the processes take turns, a few optimizer
steps each, and only one works at a time. Ratios are taken within a round and their median over rounds is printed, so a
machine whose speed drifts does not favour anyone. The first round is a warm-up.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import _root
import torch
import yaml

from model import GPT, Block, GPTConfig, resolve

FIELDS = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "batch")
SHAPES = {  # FIELDS, and steps a round
    "small": ((4, 4, 128, 50304, 256, 16), 2),
    "medium": ((6, 6, 384, 50304, 256, 8), 1),
    "gpt2": ((12, 12, 768, 50304, 512, 1), 1),
    "bytes": ((4, 4, 128, 320, 256, 16), 8),
}
BASELINE, PEERS = "rope", ("nanogpt", "transformers")
# On one CPU thread: least speed of a scheme relative to rope, of rope relative to a peer, and most memory of rope relative to it
SPEEDS = {"learned": 1.0, "crope": 1.0, "comrope": 0.97, "carope": 0.92, "alibi": 0.85}
TARGETS = {
    "small": SPEEDS | {"nanogpt": 1.9, "transformers": 1.7},
    "medium": {"nanogpt": 1.25},
    "gpt2": {"nanogpt": 1.3},
    "bytes": SPEEDS | {"nanogpt": 1.15},
}
MEMORY_TARGETS = {"small": {"nanogpt": 0.22, "transformers": 0.3}}


def nanogpt(folder: str):
    """nanoGPT's model.py as a module of another name than ours."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    sys.modules["nanogpt"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scheme_of(variant: str) -> tuple[str, dict]:
    """A variant "comrope block=2 kind=ld" as a scheme and its options. ValueError for one of another form."""
    scheme, *options = variant.split() or [""]
    if odd := [option for option in options if "=" not in option]:
        raise ValueError(f"{odd[0]!r} is no option=value")
    return scheme, {k: yaml.safe_load(v) for k, v in (o.split("=", 1) for o in options)}


def check(variant: str, shape: dict) -> None:
    """ValueError for what no model can be built of."""
    pos, options = scheme_of(variant)
    with torch.device("meta"):
        Block(resolve(GPTConfig(pos=pos, pos_options=options, **{k: v for k, v in shape.items() if k != "batch"})), 0)


def work(variant: str, shape: dict, args: argparse.Namespace, pipe) -> None:
    """A process: builds one model, then answers each number of steps n with (seconds, of these in the optimizer, peak bytes)."""
    from nanope.distributed import autocast, peak_memory, pick_device, pick_dtype

    device = pick_device(args.device)
    if args.threads or device.type == "cpu":
        torch.set_num_threads(args.threads or 1)
    dtype = pick_dtype(args.dtype, device)
    shape, batch = dict(shape), shape["batch"]
    del shape["batch"]
    make_optimizer = lambda: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # noqa: E731
    if variant == "transformers":
        import transformers

        transformers.logging.set_verbosity_error()
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        positions = shape.pop("block_size")
        config = transformers.GPT2Config(
            n_positions=positions, bos_token_id=0, eos_token_id=0, use_cache=False, **shape, **dropout
        )
        model = transformers.GPT2LMHeadModel(config).to(device)
        loss_of = lambda x, y: model(input_ids=x, labels=x).loss  # noqa: E731 - it shifts the labels itself
        shape["block_size"] = positions
    elif variant == "nanogpt":
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # eager, its own loss and its own choice of optimizer (not fused on a CPU)
            module = nanogpt(args.nanogpt)
            model = module.GPT(module.GPTConfig(bias=False, dropout=0.0, **shape)).to(device)
            optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
        make_optimizer = lambda: optimizer  # noqa: E731
        loss_of = lambda x, y: model(x, y)[1]  # noqa: E731
    else:
        pos, options = scheme_of(variant)
        model = GPT(GPTConfig(pos=pos, pos_options=options, **shape)).to(device)
        if args.compile:
            model.compile_parts()
        loss_of = lambda x, y: model(x, y)[1]  # noqa: E731
    optimizer = make_optimizer()
    tokens = torch.randint(
        shape["vocab_size"], (batch, shape["block_size"] + 1), generator=torch.Generator().manual_seed(0)
    ).to(device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    while n := pipe.recv():
        optimizing = 0.0
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            with autocast(device, dtype):
                loss = loss_of(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = time.perf_counter()
            optimizer.step()
            optimizing += time.perf_counter() - before
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start, optimizing, peak_memory(device)))


def measure(variants: list[str], shape: dict, steps: int, args: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Variant → seconds a step in each round, the same less the optimizer, and peak bytes."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for variant in variants:
        pipes[variant], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(variant, shape, args, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a process that dies ends the wait below
    seconds, model_seconds, memory = {v: [] for v in variants}, {v: [] for v in variants}, {}
    for round_ in range(args.rounds + 1):
        for variant in variants:
            try:
                pipes[variant].send(steps)
                elapsed, optimizing, memory[variant] = pipes[variant].recv()
            except (EOFError, OSError):
                sys.exit(f"error: {variant} failed; its message is above")
            if round_:
                seconds[variant].append(elapsed / steps)
                model_seconds[variant].append((elapsed - optimizing) / steps)
        print(f"round {round_} of {args.rounds}", end="\r", file=sys.stderr, flush=True)
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(0)
        process.join()
    return seconds, model_seconds, memory


def ratio(above: list[float], below: list[float]) -> str:
    """Median (min … max) of the rounds' ratios."""
    ratios = [a / b for a, b in zip(above, below)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})"


def rows(name: str, shape: dict, variants: list[str], seconds: dict, model_seconds: dict, memory: dict) -> list[str]:
    """Lines of the table: a scheme relative to rope, rope relative to a peer."""
    lines, tokens = [], shape["batch"] * shape["block_size"]
    for variant in variants:
        above, below = (
            (variant, BASELINE) if variant in PEERS else (BASELINE, variant)
        )  # a ratio of speeds is the inverse one of times
        target, most = TARGETS.get(name, {}).get(variant), MEMORY_TARGETS.get(name, {}).get(variant)
        size = memory[below] / memory[above]
        lines.append(
            f"| {name} | {variant if variant not in PEERS else f'rope / {variant}'} | {tokens / statistics.median(seconds[variant]):,.0f} | {ratio(seconds[above], seconds[below])} "
            f"| {f'≥ {target}' if target else ''} | {ratio(model_seconds[above], model_seconds[below])} "
            f"| {memory[variant] / 1e6:,.0f} | {size:.2f}{f' (≤ {most})' if most else ''} |"
        )
    return lines


def record(shape: dict, steps: int, seconds: dict, memory: dict, args: argparse.Namespace) -> dict:
    """What --json writes: every round's seconds a step by variant, and the conditions."""
    from nanope.distributed import pick_device
    from nanope.log import device_name

    device = pick_device(args.device)
    threads = args.threads or (1 if device.type == "cpu" else torch.get_num_threads())
    about = {
        "device": device_name(device),
        "threads": threads,
        "torch": torch.__version__,
        "steps": steps,
        "compile": args.compile,
    }
    return {
        "seconds": seconds,
        "memory": memory,
        "tokens_a_step": shape["batch"] * shape["block_size"],
        "rounds": args.rounds,
        **about,
        **shape,
    }


def main() -> None:
    if sys.argv[1:2] == ["eval"]:
        import bench_eval

        return bench_eval.main(sys.argv[2:])
    if sys.argv[1:2] == ["data"]:
        import bench_data

        return bench_data.main(sys.argv[2:])
    if sys.argv[1:2] == ["feed"]:
        import bench_feed

        return bench_feed.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="scripts/bench.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--shape",
        default="small",
        choices=[*SHAPES, "all"],
        help="; ".join(f"{n}: {', '.join(map(str, v))}" for n, (v, _) in SHAPES.items()) + f" ({', '.join(FIELDS)})",
    )
    parser.add_argument(
        "--schemes",
        nargs="*",
        default=["learned", "crope", "comrope", "carope", "alibi"],
        help='schemes beside rope (with --shape all, where they have a target); with options as "comrope block=2"',
    )
    for name in FIELDS:
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, after one warm-up (default: 7)")
    parser.add_argument("--steps", type=int, help="optimizer steps a variant and round (default: 1 to 8, by the shape)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: 1 on a CPU)")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="autocast dtype (default: as train.py)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile our models, by parts")
    parser.add_argument("--nanogpt", metavar="DIR", help="a folder with nanoGPT's model.py, to compare with")
    parser.add_argument("--no_peer", action="store_true", help="leave transformers out (it is in requirements-dev.txt)")
    parser.add_argument("--json", type=Path, help="where to write the seconds of every round; of one shape")
    args = parser.parse_args(sys.argv[2:] if sys.argv[1:2] == ["train"] else None)
    own = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    for name, value in {**own, "rounds": args.rounds, "steps": args.steps, "threads": args.threads}.items():
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    if args.shape == "all" and args.json:
        parser.error("--json takes one shape, not all")
    if args.shape == "all" and own:
        parser.error(f"--{next(iter(own))} changes one shape, and --shape all names every one")
    if args.nanogpt is not None and not (Path(args.nanogpt) / "model.py").is_file():
        parser.error(
            f"--nanogpt {args.nanogpt}: no model.py there; expected a clone of https://github.com/karpathy/nanoGPT"
        )
    shapes = {
        name: dict(zip(FIELDS, SHAPES[name][0])) | own for name in (SHAPES if args.shape == "all" else [args.shape])
    }
    for variant, (name, shape) in itertools.product([BASELINE, *args.schemes], shapes.items()):
        try:
            check(variant, shape)
        except ValueError as error:
            parser.error(f"{variant!r} of shape {name}: {error}")

    lines = []
    for name, shape in shapes.items():
        steps = SHAPES[name][1]
        beside = [
            *(s for s in dict.fromkeys(args.schemes) if s != BASELINE),
            *(["nanogpt"] if args.nanogpt else []),
            *([] if args.no_peer else ["transformers"]),
        ]
        variants = [BASELINE, *(v for v in beside if args.shape != "all" or v in TARGETS[name])]
        label = name if not own else ", ".join(f"{k} {v}" for k, v in shape.items())
        seconds, model_seconds, memory = measure(variants, shape, args.steps or steps, args)
        lines += rows(label, shape, variants, seconds, model_seconds, memory)
        if args.json:
            args.json.write_text(json.dumps(record(shape, args.steps or steps, seconds, memory, args), indent=1) + "\n")
    print(f"{', '.join(FIELDS)}: " + "; ".join(f"{n} {', '.join(map(str, v))}" for n, (v, _) in SHAPES.items()))
    print(
        f"Median (min … max) over {args.rounds} rounds of the ratio of speeds: a scheme's to rope's, or rope's to a peer's, and of rope's memory to the peer's.\n"
    )
    print(
        "| shape | variant | tokens/s | speed ratio | target | without the optimizer's step | peak memory, MB | ratio |\n|---|---|--:|--:|--:|--:|--:|--:|"
    )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
