"""An estimate of a training step's time on a GPU, part by part: work over what a card does of it in a second.

    python scripts/bench.py roofline                        # rope, 124M: two cards, two lengths, eager and compiled
    python scripts/bench.py roofline --pos carope           # and every scheme relative to rope, compiled

Nothing here was measured on a GPU. Compiled bytes are those of `bench.py bytes` in results/gpu-bytes/; before.json
is of commit 4a117ff. Eager bytes are what each operator reads and writes, counted on fake tensors. A card's rates are
assumptions (`CARDS`). Left out: launches of kernels, which hide behind work at these sizes, and the network.
"""

import argparse
import json
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.shards import output
from model import GPTConfig
from nanope import REPO, ops
from nanope.bench.turns import heading, row
from nanope.costs import GPUAttention, Unfilled
from nanope.distributed import autocast

L, C, H, V = 12, 768, 12, 50304  # 124M
LENGTHS, MICRO_BATCHES, BATCH = (512, 1024), (16384, 65536), 65536  # tokens: of a forward pass, of a step on one GPU
FOLDER = REPO / "results" / "gpu-bytes"


@dataclass
class Card:
    """What a card does in a second."""

    peak: float  # FLOP/s of its data sheet, dense bfloat16: MFU is of these
    products: float  # that large matrix products reach: llm.c and cuBLAS are reported at 0.6 to 0.8 of the peak
    bandwidth: float  # bytes that elementwise kernels reach: 0.87 of the data sheet's 3.35 TB/s, 0.86 of 2.04
    attention: dict[int, tuple[float, float]]  # {length: forward, backward}, of causal FLOPs at head width 64


# Attention is FlashAttention-2's, which SDPA has: its paper (2307.08691) plots 60 to 130 TFLOP/s on an A100 at these
# lengths, causal, width 64; an H100 runs the same kernel about 1.6 times as fast. cuDNN's is said to be 1.7 times that
CARDS = {
    "H100 SXM": Card(989e12, 600e12, 2.9e12, {512: (150e12, 120e12), 1024: (200e12, 165e12)}),
    "A100 80GB": Card(312e12, 240e12, 1.75e12, {512: (95e12, 75e12), 1024: (125e12, 100e12)}),
}


# ---- bytes of eager code

OTHERS = ("mm", "attention", "empty", "view", "detach", "alias")  # products, attention, and what moves nothing
FEW = ("gather", "scatter_add_", "embedding")  # reach a few elements of their first argument


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, each tensor once, but for products and attention."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and not any(word in name for word in OTHERS):
            touched = args[1:] if name == "scatter_add_" else (args[1:], out) if name in FEW else (args, kwargs, out)
            self.bytes += sum(size_of(t) for t in tree_leaves(touched) if isinstance(t, torch.Tensor))
        return out


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of what a tensor shows, an expanded dimension once."""
    elements = 1
    for size, stride in zip(tensor.size(), tensor.stride()):
        elements *= size if stride or size == 1 else 1
    return elements * tensor.element_size()


def eager_bytes(pos, tokens: int, length: int, layers: int) -> int:
    """Of a forward and backward pass of a GPT with so many layers, in bfloat16 as on a GPU."""
    with FakeTensorMode(), ops.as_on("cuda"), Traffic() as traffic:
        model = Unfilled(GPTConfig(length, V, layers, H, C, pos=pos))
        model.attend = GPUAttention(torch.bfloat16)
        idx = torch.zeros(tokens // length, length, dtype=torch.int64)
        traffic.bytes = 0
        with autocast(torch.device("cpu"), torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()
    return traffic.bytes


# ---- time


def parts(card: Card, tokens: int, length: int, block: float, loss: float, attention: float = 1.0) -> dict[str, float]:
    """{part: seconds} of a forward and backward pass of `tokens`. block, loss: bytes of elementwise kernels, of one
    block and of the loss; attention: how much faster than the card's its kernel is."""
    forward, backward = card.attention[length]
    params = 12 * L * C * C + V * C
    # AdamW reads p, m, v and the gradient, and writes three; clipping reads the gradient twice, and writes it
    step = 40 * params / (BATCH // tokens)
    return {
        "products of the blocks": 6 * 12 * C * C * L * tokens / card.products,
        "products of the head": 6 * V * C * tokens / card.products,
        "attention": L * tokens * length * C * (2 / forward + 5 / backward) / attention,
        "elementwise, blocks": L * block / card.bandwidth,
        "elementwise, loss": loss / card.bandwidth,
        "embedding, gradients' sums": (12 * params + 16 * tokens * C) / card.bandwidth,
        "AdamW and clipping, shared by a step's passes": step / card.bandwidth,
    }


def mfu(card: Card, tokens: int, length: int, seconds: float) -> float:
    """By GPT.flops_per_token's convention."""
    return (6 * (12 * L * C * C + V * C) + 12 * L * C * length) * tokens / seconds / card.peak


def compiled_bytes(name: str, pos: str, tokens: int) -> tuple[float, float]:
    """Of a block and of the loss, from results/gpu-bytes/NAME.json, in proportion to tokens."""
    found = json.loads((FOLDER / f"{name}.json").read_text())
    scale = tokens / (found["rows"] * found["length"])
    return tuple((part["forward"] + part["backward"]) * scale for part in (found["block"][pos], found["loss"]))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.py roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pos", default="rope", help="a scheme that `bench.py bytes` has measured (default: rope)")
    pos = parser.parse_args(arguments).pos
    measured = json.loads((FOLDER / "now.json").read_text())["block"]
    if pos not in measured:
        parser.error(f"pos {pos} has no bytes in {FOLDER.name}/now.json: it has {', '.join(measured)}")
    for tokens in MICRO_BATCHES:
        output("\n" + table_of_parts(pos, tokens))
    output("\n" + table_of_schemes(measured))


def ways(pos: str, tokens: int, length: int) -> dict[str, tuple[float, float, float]]:
    """{way: bytes of a block, of the loss, speed of attention}."""
    two, one = (eager_bytes(pos, tokens, length, n) for n in (2, 1))
    # Without the embedding. On CUDA the product writes logits in float32: no cast of 6 bytes, and max reads 4, not 2
    rest = 2 * one - two - 16 * tokens * C - 4 * tokens * V
    now = compiled_bytes("now", pos, tokens)
    return {
        "eager": (two - one, rest, 1.0),
        "compiled before": (*compiled_bytes("before", pos, tokens), 1.0),
        "compiled": (*now, 1.0),
        "compiled, cuDNN": (*now, 1.7),
    }


def table_of_parts(pos: str, tokens: int) -> str:
    """Milliseconds by part, a column for each card, length and way."""
    columns, cells = [], []
    for length in LENGTHS:
        for way, (block, loss, attention) in ways(pos, tokens, length).items():
            for name, card in CARDS.items():
                if way != "compiled, cuDNN" or "H100" in name:  # cuDNN's gain is Hopper's
                    columns.append(f"{name}, {length}, {way}")
                    cells.append((card, length, parts(card, tokens, length, block, loss, attention)))
    names = list(cells[0][2])
    lines = [heading(1, f"{pos}, {tokens:,} tokens a pass", *names, "together, ms", "tokens/s", "MFU")]
    for column, (card, length, found) in sorted(zip(columns, cells), key=lambda pair: pair[0].split(", ")[0]):
        total = sum(found.values())
        figures = [f"{1e3 * found[name]:.1f}" for name in names] + [f"{1e3 * total:.1f}", f"{tokens / total:,.0f}"]
        lines.append(row(column, *figures, f"{mfu(card, tokens, length, total):.1%}"))
    return "\n".join(lines)


def table_of_schemes(measured: dict) -> str:
    """Speed relative to rope, compiled, before and now."""
    lines = [heading(1, "H100 SXM, 512, compiled: speed / rope's", "before", "now")]
    card, speeds = CARDS["H100 SXM"], {}
    for name in ("before", "now"):
        for pos in measured:
            block, loss = compiled_bytes(name, pos, MICRO_BATCHES[0])
            speeds[name, pos] = 1 / sum(parts(card, MICRO_BATCHES[0], 512, block, loss).values())
    for pos in measured:
        lines.append(row(pos, *(f"{speeds[name, pos] / speeds[name, 'rope']:.2f}" for name in ("before", "now"))))
    return "\n".join(lines)
