"""Training speed and peak memory of each scheme relative to rope, and of rope relative to a GPT-2 of the transformers
library, in one interleaved run.

    python scripts/bench.py                      # 4 layers × 128, vocabulary 50,304, length 256, batch 16
    python scripts/bench.py --vocab_size 320     # the quickstart's size
    python scripts/bench.py data --source …      # preparation of data; scripts/bench_data.py
    python scripts/bench.py eval                 # evaluation instead of training; scripts/bench_eval.py, --help for its options

Each variant lives in a process of its own, so that its peak memory is its own; the processes take turns, a few optimizer
steps each, and only one works at a time. Ratios are taken within a round and their median over rounds is printed, so a
machine whose speed drifts does not favour anyone. The first round is a warm-up.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import yaml

from model import SCHEMES, nearest

BASELINE, PEER = "rope", "transformers"
# Least speed relative to rope on 2 CPU cores at the default size, and of rope relative to transformers' GPT-2
FLOORS = {"comrope": 0.95, "crope": 0.95, "carope": 0.85, "learned": 0.95, PEER: 1.7}
MEMORY_FLOOR = 0.3  # of rope relative to transformers, at most


def scheme_of(variant: str) -> tuple[str, dict]:
    """A variant "comrope block=2 kind=ld" as a scheme and its options."""
    scheme, *options = variant.split()
    return scheme, {k: yaml.safe_load(v) for k, v in (o.split("=", 1) for o in options)}


def work(variant: str, args: argparse.Namespace, pipe) -> None:
    """A process: builds one model, then answers each number of steps n with (seconds, peak bytes)."""
    import torch

    from model import GPT, GPTConfig
    from train import autocast, peak_memory, pick_device, pick_dtype

    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    shape = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd, "vocab_size": args.vocab_size}
    if variant == PEER:
        import transformers

        transformers.logging.set_verbosity_error()
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(n_positions=args.block_size, bos_token_id=0, eos_token_id=0, use_cache=False, **shape, **dropout)
        model = transformers.GPT2LMHeadModel(config).to(device)
        loss_of = lambda x, y: model(input_ids=x, labels=x).loss  # noqa: E731 - it shifts the labels itself
    else:
        pos, options = scheme_of(variant)
        model = GPT(GPTConfig(block_size=args.block_size, pos=pos, pos_options=options, **shape)).to(device)
        module = torch.compile(model) if args.compile else model
        loss_of = lambda x, y: module(x, y)[1]  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(args.vocab_size, (args.batch, args.block_size + 1), generator=torch.Generator().manual_seed(0)).to(device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    while n := pipe.recv():
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            with autocast(device, dtype):
                loss = loss_of(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start, peak_memory(device)))


def main() -> None:
    if sys.argv[1:2] == ["eval"]:
        import bench_eval

        return bench_eval.main(sys.argv[2:])
    if sys.argv[1:2] == ["data"]:
        import bench_data

        return bench_data.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="scripts/bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--schemes", nargs="+", default=["learned", "sinusoidal", "none", "crope", "comrope", "carope", "alibi"], help="schemes beside rope; with options as \"comrope block=2\"")
    for name, default in (("n_layer", 4), ("n_head", 4), ("n_embd", 128), ("vocab_size", 50304), ("block_size", 256), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, after one warm-up (default: 7)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps a variant and round (default: 2)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="autocast dtype (default: as train.py)")
    parser.add_argument("--compile", action="store_true", help="torch.compile our models")
    parser.add_argument("--json", type=Path, help="where to write the seconds of every round")
    parser.add_argument("--no_peer", action="store_true", help="leave transformers out (it is in requirements-dev.txt)")
    args = parser.parse_args()
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "batch", "rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    for scheme in (variant.split(" ")[0] for variant in args.schemes):
        if scheme not in SCHEMES:
            parser.error(f"no scheme {scheme!r}{nearest(scheme, SCHEMES)} (schemes: {', '.join(SCHEMES)})")
    variants = [BASELINE, *(s for s in args.schemes if s != BASELINE), *([] if args.no_peer else [PEER])]

    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for variant in variants:
        pipes[variant], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(variant, args, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a process that dies ends the wait below
    seconds, memory = {v: [] for v in variants}, {}
    for round_ in range(args.rounds + 1):
        for variant in variants:
            try:
                pipes[variant].send(args.steps)
                elapsed, memory[variant] = pipes[variant].recv()
            except (EOFError, BrokenPipeError):
                sys.exit(f"error: {variant} failed; its message is above")
            if round_:
                seconds[variant].append(elapsed / args.steps)
        print(f"round {round_} of {args.rounds}", end="\r", file=sys.stderr, flush=True)
    for pipe in pipes.values():
        pipe.send(0)

    tokens = args.batch * args.block_size
    if args.json:
        import torch

        from train import pick_device

        device = pick_device(args.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        about = {"device": name, "threads": args.threads or torch.get_num_threads(), "torch": torch.__version__}
        shape = {k: getattr(args, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "batch", "steps", "compile")}
        args.json.write_text(json.dumps({"seconds": seconds, "memory": memory, "tokens_a_step": tokens, "rounds": args.rounds, **about, **shape}, indent=1) + "\n")
    default = all(getattr(args, n) == parser.get_default(n) for n in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "batch"))
    print(f"{args.n_layer} layers × {args.n_embd}, vocabulary {args.vocab_size:,}, length {args.block_size}, batch {args.batch}; median of {args.rounds} rounds of {args.steps} steps\n")
    print("| variant | tokens/s | speed relative to rope (min … max) | floor | peak memory, MB | relative to rope |\n|---|--:|--:|--:|--:|--:|")
    for variant in variants:
        ratios = [a / b for a, b in zip(seconds[BASELINE], seconds[variant])]
        floor = f"{FLOORS[variant]:.2f}" if default and variant in FLOORS and variant != PEER else ""
        print(
            f"| {variant} | {tokens / statistics.median(seconds[variant]):,.0f} | {statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f}) | {floor} "
            f"| {memory[variant] / 1e6:,.0f} | {memory[variant] / memory[BASELINE]:.2f} |"
        )
    if PEER in variants:
        ratios = [a / b for a, b in zip(seconds[PEER], seconds[BASELINE])]
        floors = f" (floor {FLOORS[PEER]})", f" (at most {MEMORY_FLOOR})"
        print(
            f"\nrope relative to transformers' GPT-2: {statistics.median(ratios):.2f} × the speed{floors[0] if default else ''}, "
            f"{memory[BASELINE] / memory[PEER]:.2f} × the peak memory{floors[1] if default else ''}"
        )


if __name__ == "__main__":
    main()
