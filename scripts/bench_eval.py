"""Evaluation speed and peak memory by length: eval.py's scoring against the usual loop over a GPT-2 of the transformers
library, `model(input_ids=x, labels=x).loss` a window, in one interleaved run.

    python scripts/bench.py eval                     # 4 layers × 128, vocabulary 50,304, lengths 1,024, 2,048, 4,096

float32, weights random, the same shape for both. `nonoverlapping` scores every token of a window; `sliding` the last half,
for which the usual loop sets the labels before to -100 and forms their logits all the same. Each variant, protocol and length lives in a process of its own, so that its peak memory is its own; they take turns. Speeds and ratios are medians over
rounds, the first of which is a warm-up. Peak memory is the process's, the libraries' own some 300 MB included.
"""

import argparse
import multiprocessing
import statistics
import sys
import time

import _root

OURS, PEER = "eval.py", "transformers"
# Targets at the default shape on 2 CPU cores, relative to transformers: speed at least, memory at most. Measured: sliding reaches
# the speed; nonoverlapping has 1.3 to 1.5, as the output layer's matrix product, which both must do, is most of its time.
FLOOR, MEMORY_FLOOR, AT = 2.0, 0.2, 4096


def work(variant: str, length: int, scored: int, args: argparse.Namespace, pipe) -> None:
    """A process: builds one model, then scores the last `scored` tokens of each window for each message, and answers (seconds, peak bytes)."""
    import numpy as np
    import torch

    from nanope.distributed import peak_memory, pick_device

    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    shape = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd, "vocab_size": args.vocab_size}
    windows = max(1, args.batch_tokens // length)
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, (windows, length + 1))
    if variant == PEER:
        import transformers

        transformers.logging.set_verbosity_error()
        config = transformers.GPT2Config(n_positions=length + 1, bos_token_id=0, eos_token_id=0, **shape)
        model = transformers.GPT2LMHeadModel(config).to(device).eval()
        batch = torch.from_numpy(tokens).to(device)
        labels = batch.clone()
        labels[:, : length + 1 - scored] = -100

        @torch.no_grad()
        def score() -> None:
            for x, y in zip(batch, labels):
                model(input_ids=x[None], labels=y[None]).loss.item()
    else:
        from nanope.evaluation.scoring import score_tokens
        from model import GPT, GPTConfig

        model = GPT(GPTConfig(block_size=length, pos="learned", bias=True, **shape)).to(device).eval()

        def score() -> None:
            score_tokens(model, tokens, np.full(windows, scored), torch.float32)

    while pipe.recv():
        start = time.perf_counter()
        score()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start, peak_memory(device)))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/bench.py eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, default in (
        ("n_layer", 4),
        ("n_head", 4),
        ("n_embd", 128),
        ("vocab_size", 50304),
        ("batch_tokens", 4096),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="(default: 1024 2048 4096)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after one warm-up (default: 5)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    args = parser.parse_args(arguments)
    print(
        f"{args.n_layer} layers × {args.n_embd}, vocabulary {args.vocab_size:,}, float32, {args.batch_tokens:,} tokens a turn; median of {args.rounds} rounds\n"
    )
    print(
        "| protocol | length | eval.py, input tokens/s | transformers | speed (min … max) | peak memory, MB | transformers | memory |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    context = multiprocessing.get_context("spawn")
    for protocol, length in [(p, n) for p in ("nonoverlapping", "sliding") for n in args.lengths]:
        scored = length if protocol == "nonoverlapping" else length // 2
        pipes, seconds, memory = {}, {OURS: [], PEER: []}, {}
        for variant in (OURS, PEER):
            pipes[variant], theirs = context.Pipe()
            context.Process(target=work, args=(variant, length, scored, args, theirs), daemon=True).start()
            theirs.close()  # so that a process that dies ends the wait below
        for round_ in range(args.rounds + 1):
            for variant in (OURS, PEER):
                try:
                    pipes[variant].send(1)
                    elapsed, memory[variant] = pipes[variant].recv()
                except (EOFError, BrokenPipeError):
                    sys.exit(f"error: {variant} failed at length {length}; its message is above")
                if round_:
                    seconds[variant].append(elapsed)
        for pipe in pipes.values():
            pipe.send(0)
        tokens = max(1, args.batch_tokens // length) * length
        ratios = [b / a for a, b in zip(seconds[OURS], seconds[PEER])]
        print(
            f"| {protocol} | {length} | {tokens / statistics.median(seconds[OURS]):,.0f} | {tokens / statistics.median(seconds[PEER]):,.0f} "
            f"| {statistics.median(ratios):.2f} × ({min(ratios):.2f} … {max(ratios):.2f}) "
            f"| {memory[OURS] / 1e6:,.0f} | {memory[PEER] / 1e6:,.0f} | {memory[OURS] / memory[PEER]:.2f} × |",
            flush=True,
        )
    if (
        all(getattr(args, n) == parser.get_default(n) for n in ("n_layer", "n_head", "n_embd", "vocab_size"))
        and AT in args.lengths
    ):
        print(f"\nTargets at {AT:,}: at least {FLOOR} × the speed, at most {MEMORY_FLOOR} × the memory.")
