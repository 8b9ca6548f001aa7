"""Evaluation speed and peak memory by length: eval.py's scoring against the usual loop over a GPT-2 of the transformers
library, `model(input_ids=x, labels=x).loss` a window, in one interleaved run.

    python scripts/bench.py eval                     # 4 layers × 128, vocabulary 50,304, lengths 1,024, 2,048, 4,096

float32, weights random, the same shape for both. `nonoverlapping` scores every token of a window; `sliding` the last
half, for which the usual loop sets the labels before to -100 and forms their logits all the same. Each variant,
protocol and length has a process of its own, so that its peak memory is its own; they take turns. Speeds and ratios are
medians over rounds; a warm-up comes first. Peak memory is the process's, the libraries' own some 300 MB included.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from data.shards import output
from nanope.bench.turns import Worker, check_counts, command_line, heading, ratios, row, spread, take_turns, workers
from nanope.distributed import peak_memory, pick_device

OURS, PEER = "eval.py", "transformers"
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 50304}
# Targets at the default shape on 2 CPU cores, relative to transformers: speed at least, memory at most. Measured:
# sliding reaches the speed; nonoverlapping has 1.3 to 1.5, as most of its time is the output layer's matrix product,
# which both must do.
FLOOR, MEMORY_FLOOR, AT = 2.0, 0.2, 4096


def scorer(variant: str, length: int, scored: int, args: argparse.Namespace) -> Callable:
    """A worker: builds one model. For each message it scores the last `scored` tokens of each window.

    Its answer is (seconds, peak bytes).
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, (max(1, args.batch_tokens // length), length + 1))
    score = (score_by_peer if variant == PEER else score_by_eval)(tokens, scored, args, device)

    def answer(_) -> tuple[float, int]:
        start = time.perf_counter()
        score()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, peak_memory(device)

    return answer


def score_by_peer(tokens: np.ndarray, scored: int, args: argparse.Namespace, device: torch.device) -> Callable:
    """What transformers does with tokens (windows, L+1)."""
    import transformers

    transformers.logging.set_verbosity_error()
    shape = {name: getattr(args, name) for name in SHAPE}
    config = transformers.GPT2Config(n_positions=tokens.shape[1], bos_token_id=0, eos_token_id=0, **shape)
    model = transformers.GPT2LMHeadModel(config).to(device).eval()
    batch = torch.from_numpy(tokens).to(device)
    labels = batch.clone()
    labels[:, : tokens.shape[1] - scored] = -100

    @torch.no_grad()
    def score() -> None:
        for x, y in zip(batch, labels):
            model(input_ids=x[None], labels=y[None]).loss.item()

    return score


def score_by_eval(tokens: np.ndarray, scored: int, args: argparse.Namespace, device: torch.device) -> Callable:
    """What eval.py does with tokens (windows, L+1)."""
    from model import GPT, GPTConfig  # here, as the other process's memory should not hold them
    from nanope.evaluation.scoring import score_tokens

    shape = {name: getattr(args, name) for name in SHAPE}
    config = GPTConfig(block_size=tokens.shape[1] - 1, pos="learned", bias=True, **shape)
    model = GPT(config).to(device).eval()

    def score() -> None:
        score_tokens(model, tokens, np.full(len(tokens), scored), torch.float32)

    return score


def measure(protocol: str, length: int, args: argparse.Namespace) -> str:
    """The row of a protocol and length."""
    scored = length if protocol == "nonoverlapping" else length // 2
    variants = (OURS, PEER)
    found = (Worker(f"{v} at length {length}", scorer, v, length, scored, args) for v in variants)
    with workers(found) as started:
        ways = {v: lambda _, worker=worker: worker.ask("score") for v, worker in zip(variants, started)}
        answers = take_turns(ways, args.rounds, f"{protocol} {length}, ")
    ours, theirs = ([seconds for seconds, _ in answers[v][1:]] for v in variants)
    memory, peer_memory = (answers[v][-1][1] for v in variants)
    tokens = max(1, args.batch_tokens // length) * length
    return row(
        protocol,
        length,
        f"{tokens / statistics.median(ours):,.0f}",
        f"{tokens / statistics.median(theirs):,.0f}",
        spread(ratios(theirs, ours), 2, " ×"),
        f"{memory / 1e6:,.0f}",
        f"{peer_memory / 1e6:,.0f}",
        f"{memory / peer_memory:.2f} ×",
    )


def main(arguments: list[str]) -> None:
    parser = command_line("scripts/bench.py eval", __doc__, rounds=5)
    for name, default in {**SHAPE, "batch_tokens": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="(default: 1024 2048 4096)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    args = parser.parse_args(arguments)
    check_counts(parser, {"rounds": args.rounds})
    output(
        f"{args.n_layer} layers × {args.n_embd}, vocabulary {args.vocab_size:,}, float32, "
        f"{args.batch_tokens:,} tokens a turn; median of {args.rounds} rounds\n"
    )
    speeds = ("eval.py, input tokens/s", "transformers", "speed (min … max)")
    output(heading(1, "protocol", "length", *speeds, "peak memory, MB", "transformers", "memory"))
    for protocol in ("nonoverlapping", "sliding"):
        for length in args.lengths:
            output(measure(protocol, length, args))
    if AT in args.lengths and all(getattr(args, name) == default for name, default in SHAPE.items()):
        output(f"\nTargets at {AT:,}: at least {FLOOR} × the speed, at most {MEMORY_FLOOR} × the memory.")
