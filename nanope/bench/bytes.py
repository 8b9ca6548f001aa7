"""Bytes that the compiled kernels of a GPU move: a block of each scheme, and the loss. No GPU is needed.

    python scripts/bench.py bytes                                    # none, and every scheme that turns q and k
    python scripts/bench.py bytes --schemes carope --kernels         # one line a kernel
    python scripts/bench.py bytes --json results/gpu-bytes/now.json  # what `bench.py roofline` reads

It needs a CUDA build of torch with Triton, also on a machine without a GPU. Inductor makes its code for an H100, by
nanope/bench/lowering.py, which counts; matrix products and attention are not counted. Blocks are of width 768 with 12
heads, forward and backward in bfloat16.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch

from data.shards import output
from nanope.bench.turns import heading, row
from nanope.files import write_atomically

SCHEMES = "none rope crope comrope carope lerope prope xpos pope selective gape".split()


def record(graphs) -> dict:
    """Bytes and kernels of a forward and backward pass."""
    return {
        "forward": sum(g.bytes for g in graphs if not g.backward),
        "backward": sum(g.bytes for g in graphs if g.backward),
        "kernels": sum(len(g.kernels) for g in graphs),
    }


def measure(schemes: list[str], rows: int, length: int, vocabulary: int, kernels: bool = False) -> dict:
    """{"block": {scheme: record}, "loss": record} with the shape."""
    from nanope.bench import lowering

    found = {"torch": torch.__version__, "rows": rows, "length": length, "vocabulary": vocabulary, "block": {}}
    parts = {name: lambda name=name: lowering.block_graphs(name, {}, rows, length) for name in schemes}
    parts["the loss"] = lambda: lowering.loss_graphs(rows * length, vocabulary)
    for name, lower in parts.items():
        torch._dynamo.reset()
        graphs = lower()
        if name == "the loss":
            found["loss"] = record(graphs)
        else:
            found["block"][name] = record(graphs)
        for graph in graphs if kernels else ():
            for what, size in graph.kernels:
                output(f"{name}, {'backward' if graph.backward else 'forward'}: {size / 1e6:.1f} MB, {what}")
    return found


def table(found: dict) -> str:
    """Markdown."""
    parts = {**found["block"], "loss": found["loss"]}
    lines = [heading(1, "a block, or the loss", "forward, GB", "backward, GB", "together, GB", "Triton kernels")]
    for name, part in parts.items():
        sizes = part["forward"], part["backward"], part["forward"] + part["backward"]
        lines.append(row(name, *(f"{size / 1e9:.3f}" for size in sizes), part["kernels"]))
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.py bytes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, metavar="POS", help="default: " + " ".join(SCHEMES))
    parser.add_argument("--rows", type=int, default=32, help="windows of a micro-batch (default: 32)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--vocabulary", type=int, default=50304, help="of the loss (default: 50304)")
    parser.add_argument("--kernels", action="store_true", help="one line a kernel too")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args(arguments)
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        sys.exit(
            f"error: torch {torch.__version__} has no CUDA or no Triton: take a CUDA build of torch, in an environment "
            "of its own; a GPU is not needed"
        )
    found = measure(args.schemes, args.rows, args.length, args.vocabulary, args.kernels)
    if args.json:
        text = json.dumps(found, indent=1) + "\n"
        write_atomically(Path(args.json), lambda file: file.write(text.encode()))
    output(table(found))
