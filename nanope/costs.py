"""What one forward and backward pass of a model costs: FLOPs and memory, without doing it.

The pass goes through the real model on fake tensors, which have shapes and storages but no contents. Every storage and
every matrix product is counted, by nanope/meters.py. nanope/plan.py makes a plan of it.
"""

import bisect
import dataclasses
import functools
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from model import GPT, GPTConfig, resolve
from nanope import ops
from nanope.attention import attend, way_of
from nanope.distributed import autocast, drop_casts
from nanope.meters import Alike, Meter

FEW_TOKENS = 16384  # of a pass to go by, before one of as many as fit


class Unfilled(GPT):
    """A GPT of fake tensors: no initial values are drawn, no token ids looked at."""

    def initialise(self, *_):
        self.described = True

    def check_tokens(self, *_):
        pass


def outline(config: GPTConfig) -> GPT:
    """The model of a config in fake tensors, to count its parameters and FLOPs. Equal configs share one object, which
    is not to be changed. ValueError for a model that cannot be built."""
    return outline_of(key_of(resolve(config)))


@functools.lru_cache(128)  # a sweep has many runs of few models
def outline_of(key: str) -> GPT:
    with FakeTensorMode():
        return Unfilled(GPTConfig(**json.loads(key)))


def key_of(config: GPTConfig) -> str:
    """The fields of a model as a text, to look it up by."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


@dataclass
class Pass:
    """Forward and backward of one micro-batch."""

    model: GPT  # without contents
    saved: dict[str, int]  # {part: bytes} held from forward to backward
    peak: int  # the most bytes at once beside parameters and moments
    products: int  # FLOPs of all matrix products
    attention: int  # and of those inside attention: all T² scores, or T times a window, as if nothing were masked
    elementwise: int  # operations


def measure(model: GPT, rows: int, dtype: torch.dtype, keep_gradients: bool, whole: bool = False) -> Pass:
    """One pass over `rows` windows on the model's own (fake or real) CPU tensors; the model is of no use afterwards.
    keep_gradients: gradients are there already, as from the second micro-batch of a step on. whole: run every block."""
    idx = torch.zeros(rows, model.config.block_size, dtype=torch.int64)
    meter = Meter(model, idx)
    with meter:
        if keep_gradients:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            meter.live.clear()
        alike = Alike(model, meter, whole)
        with autocast(torch.device("cpu"), dtype):
            _, loss = model(idx, idx)
        saved = {part: size for part, size in meter.live.items() if size}
        loss.backward()
    elementwise, total, attention = alike.totals()
    return Pass(model, saved, meter.peak, total, attention, elementwise)


def simulate(
    config: GPTConfig,
    rows: int,
    dtype: torch.dtype,
    gpu: bool,
    keep_gradients: bool = False,
    again: bool = False,
    divided: bool = False,
    whole: bool = False,
) -> Pass:
    """The pass that a CPU, or with `gpu` a CUDA GPU, would do in eager mode, on fake tensors: no memory, no arithmetic.
    again: with activation checkpointing. divided: of a model that FSDP divides, as if it were whole. whole: run every
    block, also those that are alike.

    Fake tensors cannot be on a GPU that is not there. They are on the CPU, where autocast casts the same operations of
    this model. What a GPU does otherwise is put in: attention by the flash kernel, and the loss head's larger chunks.
    What is left: in float32 the head reuses two buffers, as on a CPU, where a GPU has a third of up to 1 GiB.
    """
    with FakeTensorMode(), ops.as_on("cuda" if gpu else "cpu"):
        model = Unfilled(config)
        if gpu:
            model.attend = GPUAttention(dtype)
        if divided:
            drop_casts(model)
        model.activation_checkpointing = again
        return measure(model, rows, dtype, keep_gradients, whole)


class GPUAttention:
    """nanope.attention.attend as on a GPU, for fake tensors: the flash kernel, or the efficient one in float32.

    FlexAttention, which takes biases and windows, saves the same: q, k, v, the output and a log-sum-exp.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.held = dtype, []

    def __call__(self, scheme, q, k, v, x, ctx, window: int, dropout: float) -> torch.Tensor:
        window = 0 if window >= k.size(2) else window
        masks = {"window": window, "documents": ctx.documents is not None, "dropout": dropout}
        way = way_of(scheme, torch.device("cuda"), ctx.dtype, ctx.length, **masks)
        if way not in ("causal", "flex"):
            # Of chunks without dropout: with it a CPU's kernel saves T² probabilities, which those of a GPU do not
            return attend(scheme, q, k, v, x, ctx, window, dropout if way == "dense" else 0.0, way=way)
        self.held.append(scheme.bias(x, q, k, ctx))  # FlexAttention saves the tensors that it captured
        width = v.size(-1)
        if q.size(-1) > width:  # kernels want equal widths
            v = F.pad(v, (0, q.size(-1) - width))
        q, k, v = (t.to(self.dtype) for t in (q, k, v))
        if window:  # as many keys a query as it sees, for the count of products
            k, v = k[:, :, :window], v[:, :, :window]
        if self.dtype == torch.float32:
            y = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout, True)[0]
        else:
            y = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, True)[0]
        return y[..., :width]


# ---- by part


def block_parameters(model: GPT) -> list[int]:
    """Parameters of each block without the scheme's own, which FSDP gathers for it."""
    blocks = model.transformer["h"]
    return [sum(p.numel() for name, p in b.named_parameters() if not name.startswith("attn.pos.")) for b in blocks]


def parameters(model: GPT) -> dict[str, int]:
    """{part: parameters}, with their total."""
    parts = dict.fromkeys(
        ("token embedding (tied)", "positional table", "attention projections", "positional scheme", "MLP", "norms"), 0
    )
    for name, p in model.named_parameters():
        if ".attn.pos." in name:
            part = "positional scheme"
        elif ".attn." in name:
            part = "attention projections"
        elif ".mlp." in name:
            part = "MLP"
        else:
            part = {"wte": "token embedding (tied)", "wpe": "positional table"}.get(name.split(".")[1], "norms")
        parts[part] += p.numel()
    return {**{part: n for part, n in parts.items() if n}, "total": sum(parts.values())}


def memory(run: Pass, rows: int, ranks: int = 1) -> dict[str, int]:
    """{part: bytes} of one rank, with their total, the peak. ranks: over which FSDP divides a model; `run` then has
    kept gradients.

    FSDP's `gathered` are what a rank has whole at a time: embedding, last norm and the schemes' own parameters, with
    their gradients; of blocks the parameters of one and of its neighbour, which is being gathered, and a buffer for it;
    the gradients of one, and those of its neighbour, which are being reduced.

    `temporary` is what the peak has beside the others: logits, gradients of activations; less than nothing where the
    others are not held at once. The total is what torch's allocator hands out: on a CPU in float32, 1.000 of it was
    measured. The process is larger, by Python and torch and what malloc holds back: its growth was 1.11 to 1.44 times
    the total, and 1.01 times with MALLOC_MMAP_THRESHOLD_=65536. In bfloat16 a CPU's kernels also copy weights: 1.08 at
    6 layers × 512, vocabulary 50,304.
    """
    whole = sum(4 * p.numel() for p in run.model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in run.model.buffers())
    windows, size = 2 * 8 * rows * run.model.config.block_size, -(-whole // ranks)
    parts = {"parameters": size + buffers, "gradients": size, "AdamW's moments": 2 * size, "input": windows}
    if ranks > 1:
        in_blocks = [4 * n for n in block_parameters(run.model)]
        outside, most = whole - sum(in_blocks), max(in_blocks)
        parts |= {"gathered parameters": outside + 3 * most, "gathered gradients": outside + 2 * most}
    for part in ("autocast's weights", "attention", "MLP", "norms", "residual stream", "loss head"):
        name = part if part in ("autocast's weights", "loss head") else f"activations: {part}"
        if part in run.saved:
            parts[name] = run.saved[part]
    total = sum(parts[part] for part in ("parameters", "AdamW's moments", "input")) + run.peak
    if ranks > 1:  # the peak has whole gradients
        total += parts["gradients"] - whole + parts["gathered parameters"] + parts["gathered gradients"]
    return {**parts, "temporary": total - sum(parts.values()), "total": total}


def windows_that_fit(
    shape: GPTConfig, sizes: list[int], dtype: torch.dtype, limit: float, again: bool = False, ranks: int = 1
) -> int:
    """The largest of `sizes`, ascending numbers of windows a forward pass, with which a GPU's rank needs at most
    `limit` bytes, by estimate; 0 where none does. Gradients lie there, as from the second pass of a step on. again:
    with activation checkpointing; ranks: over which the model is divided."""

    @functools.cache
    def run(n: int) -> Pass:
        return simulate(shape, n, dtype, True, keep_gradients=True, again=again, divided=ranks > 1)

    def needs(n: int) -> int:
        return memory(run(n), n, ranks)["total"]

    # A pass of many windows can be of thousands of chunks, and takes minutes: a few say about how many to look at
    few = max(n for n in sizes if n == sizes[0] or n * shape.block_size <= FEW_TOKENS)
    weights = 16 * sum(p.numel() for p in run(few).model.parameters()) / ranks  # with gradients and two moments
    at = max(0, bisect.bisect_right(sizes, few * (limit - weights) / (needs(few) - weights)) - 1)
    while needs(sizes[at]) > limit:
        if at == 0:
            return 0
        at -= 1
    while at + 1 < len(sizes) and needs(sizes[at + 1]) <= limit:
        at += 1
    return sizes[at]


def products(run: Pass, tokens: int, again: Pass | None = None) -> dict[str, float]:
    """{part: FLOPs of matrix products a token}: forward and backward, as many as are executed, with their total. The
    scheme's are what is left when those that every GPT-2 has are taken off. again: the same with activation
    checkpointing."""
    c = run.model.config
    parts = {
        "attention projections": 6 * c.n_layer * 4 * c.n_embd**2,
        "attention scores": run.attention / tokens,
        "positional scheme": 0.0,
        "MLP": 6 * c.n_layer * 8 * c.n_embd**2,
        "head and loss": 6 * c.vocab_size * c.n_embd,
    }
    everywhere = sum(parts[part] for part in ("attention projections", "MLP", "head and loss"))
    parts["positional scheme"] = (run.products - run.attention) / tokens - everywhere
    if parts["positional scheme"] < 0:  # the scheme's projections are cheaper than dense ones
        parts["attention projections"] += parts.pop("positional scheme")
    if again:
        scores = (again.attention - run.attention) / tokens
        parts["scores, computed again"] = scores
        parts["others, computed again"] = (again.products - run.products) / tokens - scores
    return {**{part: n for part, n in parts.items() if n}, "total": (again or run).products / tokens}
