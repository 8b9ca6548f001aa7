"""What a run will cost, before it starts: `python train.py --config FILE --plan [--gpus 8] [--mfu 0.4] [--price_per_hour 2.5]`,
and `python plan.py --schemes`, a table of all schemes.

Parameters, FLOPs, memory, tokens, hours. Nothing is trained or allocated: one forward and backward pass goes through the
real model on fake tensors, which have shapes and storages but no contents, and every storage and matrix product is counted.
"""

import argparse
import dataclasses
import math
import os
import sys
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from data.shards import open_data
from model import GPT, MLP, SCHEMES, Attention, GPTConfig, LayerNorm
from nanope import attention, ops
from nanope.config import RunConfig, check, padded_vocabulary, parse
from nanope.distributed import PEAK_FLOPS, Ranks, autocast, pick_device, pick_dtype
from nanope.errors import nearest
from train import make_optimizer, resolve_batch

GPUS = ("A100", "H100")
CARDS = (
    80,
    40,
    24,
)  # GB, 10^9 bytes: what this leaves of a card's GiB, 7 %, is for CUDA's context and the allocator's gaps
GPT2_VOCABULARY = 50257
# Where an MFU of 0.4 lies, both for GPT-2 124M at length 1,024 on 8 A100: nanoGPT's README has 600,000 iterations of
# 491,520 tokens in about 4 days, 0.85 M tokens/s, an MFU of 0.29; llm.c reports 1.75 M tokens/s, 0.60
MFU_SOURCE = "GPT-2 124M on 8 A100: nanoGPT 0.29 (README, 4 days), llm.c 0.60 (1.75 M tokens/s)"


# ---- one training pass on fake tensors


class Unfilled(GPT):
    """A GPT of fake tensors: no initial values are drawn, no token ids looked at."""

    def initialise(self, *_):
        pass

    def check_tokens(self, *_):
        pass


class Meter(TorchDispatchMode):
    """Bytes of all storages that operations make, while they live, by the part of the model that made them; and elementwise work.

    peak: the most bytes at once. live: {part: bytes} now. elementwise: elements of results of pointwise operations, a complex
    product counted as its 6 real operations. Parameters, buffers and idx are not counted.
    """

    def __init__(self, model: GPT, idx: torch.Tensor):
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        self.known = self.parameters | {idx.untyped_storage()._cdata}
        self.live, self.total, self.peak, self.elementwise = Counter(), 0, 0, 0
        self.parts = ["residual stream"]
        for kind, part in ((Attention, "attention"), (MLP, "MLP"), (LayerNorm, "norms")):
            for module in (m for m in model.modules() if isinstance(m, kind)):
                module.register_forward_pre_hook(lambda *_, part=part: self.parts.append(part))
                module.register_forward_hook(lambda *_: self.parts.pop() and None)
        model.transformer["ln_f"].register_forward_hook(lambda *_: self.parts.append("loss head"))  # comes after it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.parameters
        for tensor in (t for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            self.see(tensor, "autocast's weights" if cast else self.parts[-1])
            if torch.Tag.pointwise in func.tags:
                self.elementwise += tensor.numel() * (
                    6 if tensor.is_complex() and func is torch.ops.aten.mul.Tensor else 1
                )
        return out

    def see(self, tensor: torch.Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            weakref.finalize(storage, self.drop, key, size, part)
            self.live[part] += size
            self.total += size
            self.peak = max(self.peak, self.total)

    def drop(self, key: int, size: int, part: str) -> None:
        self.known.discard(key)
        self.live[part] -= size
        self.total -= size


# What torch's counter does not know: the CPU's attention kernel, oneDNN's products, and the product that accumulates in place
MORE_PRODUCTS = {
    torch.ops.mkldnn._linear_pointwise: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[0],
    torch.ops.aten.addmm_: lambda self, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}


@dataclass
class Pass:
    """Forward and backward of one micro-batch. saved: {part: bytes} held from forward to backward; peak: the most bytes at
    once beside parameters and moments; products, attention: FLOPs of all matrix products and of those inside the attention
    kernel (all T² scores, as if nothing were masked); elementwise: operations; parameters: the model, without contents."""

    saved: dict[str, int]
    peak: int
    products: int
    attention: int
    elementwise: int
    model: GPT


def measure(model: GPT, rows: int, dtype: torch.dtype, keep_gradients: bool) -> Pass:
    """One pass over `rows` windows on the model's own (fake or real) CPU tensors. keep_gradients: gradients are there
    already, as from the second micro-batch of a step on."""
    idx = torch.zeros(rows, model.config.block_size, dtype=torch.int64)
    meter = Meter(model, idx)
    with meter, FlopCounterMode(display=False, custom_mapping=MORE_PRODUCTS) as counter:
        if keep_gradients:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            meter.live.clear()
        with autocast(torch.device("cpu"), dtype):
            _, loss = model(idx, idx)
        saved = {part: size for part, size in meter.live.items() if size}
        loss.backward()
    flops = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in flops.items() if "attention" in str(op))
    return Pass(saved, meter.peak, sum(flops.values()), attention, meter.elementwise, model)


def simulate(config: GPTConfig, rows: int, dtype: torch.dtype, gpu: bool, keep_gradients: bool = False) -> Pass:
    """The pass that a CPU, or with `gpu` a CUDA GPU, would do, in eager mode, on fake tensors: no memory, no arithmetic.

    Fake tensors cannot be on a GPU that is not there. They are on the CPU, where autocast casts the same operations of
    this model, and the two things that a GPU does otherwise are put in: attention by the flash kernel (FlexAttention for
    biased scores saves the same: q, k, v, the output and a log-sum-exp), and the loss head's larger chunks. What is left:
    in float32 the head reuses two buffers, as on a CPU, where a GPU has a third of up to 1 GiB.
    """
    held = []

    def flash(scheme, q, k, v, x, ctx, window, dropout):
        bias = scheme.bias(x, q, k, ctx)
        if bias is not None and dropout:  # FlexAttention has no dropout
            return attention.attend(scheme, q, k, v, x, ctx, window, dropout)
        held.append(bias)  # FlexAttention saves the tensors that it captured
        q, k, v = (t.to(dtype) for t in (q, k, v))
        if dtype == torch.float32:
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout, True)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, True)[0]

    with FakeTensorMode(), ops.as_on("cuda" if gpu else "cpu"):
        model = Unfilled(config)
        if gpu:
            model.attend = flash
        return measure(model, rows, dtype, keep_gradients)


# ---- the plan


@dataclass
class Plan:
    """What a run costs: plain numbers. Bytes, FLOPs, tokens, hours; everything of memory is of one rank."""

    config: RunConfig  # with vocab_size and micro_batch_size filled in
    gpus: int  # ranks
    micro_batch_size: int  # windows a forward pass
    accumulation: int  # forward passes a step and rank
    windows: int  # a step, over all ranks
    tokens: int  # of the whole run
    data_tokens: int | None  # of the train split; None without a data folder
    epochs: float | None
    vocabulary_assumed: bool  # neither the config nor a data folder said it
    validation: float  # FLOPs of all validations relative to those of training
    parameters: dict[str, int]  # by part, and their total
    groups: dict[str, int]  # parameters by the optimizer's group
    flops_per_token: int  # GPT.flops_per_token, which MFU is defined with
    flops: float  # of the whole run, by that
    checkpoint: int  # bytes of a checkpoint file
    mfu: float
    price_per_hour: float | None  # of one GPU
    hours: dict[str, tuple[float, float]]  # {GPU: (on one, on all)}
    tokens_per_s: float | None = None  # measured, of all ranks
    products: dict[str, float] = field(
        default_factory=dict
    )  # {part: matrix-product FLOPs of forward and backward a token}
    elementwise: float = 0.0  # operations a token
    memory: dict[str, dict[str, int]] = field(default_factory=dict)  # {"cuda" or "cpu": {part: bytes}}, with "total"
    largest_micro_batch: int = 0  # that fits an 80 GB GPU and divides the windows of a rank; 0: none, or not estimated

    @property
    def measured_hours(self) -> float | None:
        """Of the whole run at tokens_per_s."""
        return self.tokens / self.tokens_per_s / 3600 if self.tokens_per_s else None

    def cost(self, hours: float, gpus: int) -> float | None:
        """In the currency of price_per_hour."""
        return None if self.price_per_hour is None else hours * gpus * self.price_per_hour


def plan(
    config: RunConfig,
    world: int = 1,
    gpus: int | None = None,
    mfu: float = 0.4,
    price_per_hour: float | None = None,
    vocab_size: int | None = None,
    tokens_per_s: float | None = None,
    details: bool = True,
) -> Plan:
    """The Plan of a run on `gpus` ranks (default: world). Starts nothing, writes nothing.

    mfu: FLOPs of flops_per_token over the GPU's peak, in (0, 1]. price_per_hour: of one GPU. vocab_size: of the tokenizer,
    assumed where there is no data folder (default: GPT-2's). tokens_per_s: a measured speed of all ranks. details: also
    exact FLOPs and memory, a second or a few; without, milliseconds. ValueError for what could not be run.
    """
    check(config)
    gpus = world if gpus is None else gpus
    problems = []
    if type(gpus) is not int or gpus < 1:
        problems.append(f"gpus must be a whole number from 1 on, not {gpus}")
    if not 0 < mfu <= 1:
        problems.append(
            f"mfu must lie in (0, 1], not {mfu}: the share of a GPU's peak FLOP/s that training uses, such as 0.4"
        )
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        problems.append(
            f"price_per_hour must not be negative or infinite, but is {price_per_hour}: the price of one GPU for an hour"
        )
    if tokens_per_s is not None and not 0 < tokens_per_s < math.inf:
        problems.append(f"tokens_per_s must be positive, not {tokens_per_s}")
    if vocab_size is not None and vocab_size < 1:
        problems.append(f"vocab_size must be at least 1, not {vocab_size}")
    if problems:
        raise ValueError("; ".join(problems))

    data = open_data(config.data_dir, verify=False) if Path(config.data_dir).is_dir() else None
    tokenizer = data.vocab_size if data else vocab_size or GPT2_VOCABULARY
    assumed, vocabulary = not data and config.vocab_size is None, config.vocab_size or padded_vocabulary(tokenizer)
    if data and vocabulary < tokenizer:
        raise ValueError(f"vocab_size {vocabulary} is smaller than the {tokenizer} of {config.data_dir}")
    share, micro = resolve_batch(config, Ranks(0, gpus, 0))
    config = dataclasses.replace(config, vocab_size=vocabulary, micro_batch_size=micro)
    with FakeTensorMode():
        model = Unfilled(config.model_config())
        groups = {
            name: sum(p.numel() for p in g["params"])
            for name, g in zip(("decayed", "plain", "positional"), make_optimizer(model, config).param_groups)
        }
    tokens, per_token = config.max_steps * config.batch_tokens, model.flops_per_token()
    flops = tokens * per_token
    evaluations = (
        2 + (config.max_steps - 1) // config.eval_interval if config.eval_interval else 2
    )  # at the start, between, at the end
    val_windows = (len(data.split("val")) - 1) // config.block_size if data else config.eval_tokens // config.block_size
    val_tokens = evaluations * config.block_size * max(1, min(val_windows, config.eval_tokens // config.block_size))
    tensors = [*model.parameters(), *model.buffers()]
    p = Plan(
        config=config,
        gpus=gpus,
        micro_batch_size=micro,
        accumulation=share // micro,
        windows=share * gpus,
        tokens=tokens,
        data_tokens=len(data.split("train")) if data else None,
        epochs=tokens / len(data.split("train")) if data else None,
        vocabulary_assumed=assumed,
        validation=val_tokens / 3 / tokens,  # forward alone
        parameters=parameters(model),
        groups=groups,
        flops_per_token=per_token,
        flops=flops,
        checkpoint=sum(t.numel() * t.element_size() for t in tensors)
        + sum(2 * 4 * p.numel() + 4 for p in model.parameters()),
        mfu=mfu,
        price_per_hour=price_per_hour,
        hours={gpu: tuple(flops / (PEAK_FLOPS[gpu] * mfu * n) / 3600 for n in (1, gpus)) for gpu in GPUS},
        tokens_per_s=tokens_per_s,
    )
    if details:
        add_details(p, share)
    return p


def parameters(model: GPT) -> dict[str, int]:
    """{part: parameters}, with their total. The positional scheme's own are what Attention and the trunk do not have by themselves."""
    parts = dict.fromkeys(
        ("token embedding (tied)", "positional table", "attention projections", "positional scheme", "MLP", "norms"), 0
    )
    for name, p in model.named_parameters():
        module, _, own = name.removeprefix("transformer.").removeprefix("h.").partition(".attn.")
        if own:
            part = "attention projections" if own.startswith(("c_attn.", "c_proj.")) else "positional scheme"
        elif ".mlp." in name:
            part = "MLP"
        else:
            part = {"wte.weight": "token embedding (tied)", "wpe.weight": "positional table"}.get(module, "norms")
        parts[part] += p.numel()
    return {**{part: n for part, n in parts.items() if n}, "total": sum(parts.values())}


def devices(config: RunConfig) -> dict[str, torch.dtype]:
    """{"cuda", "cpu" or "mps": dtype of its matrix products} that a run is planned for: `auto` is a GPU, also where there is
    none yet, and what it would be here."""
    found = {}
    if config.device == "auto" or config.device.startswith("cuda"):  # of GPUs of which each has bfloat16
        found["cuda"] = pick_dtype(
            {"auto": "bfloat16", "tf32": "float32"}.get(config.dtype, config.dtype), torch.device("cpu")
        )
    if "cuda" not in config.device and (config.device, config.dtype) != ("auto", "tf32"):  # which GPUs alone have
        kind = pick_device(config.device).type
        found.setdefault(kind, pick_dtype(config.dtype, torch.device("cpu")))
    return found


def add_details(p: Plan, share: int) -> None:
    """FLOPs by part, memory by part and the largest micro-batch, by passes on fake tensors; share: windows a step and rank."""
    config, shape = p.config, p.config.model_config()
    keep = p.accumulation > 1 or p.gpus > 1  # DDP's buckets hold the gradients from the first step on
    for kind, dtype in devices(config).items():
        run = simulate(shape, p.micro_batch_size, dtype, kind == "cuda", keep)
        if kind != "mps":  # whose attention saves what no other does
            p.memory[kind] = memory(run, p.micro_batch_size)
        if not p.products:
            tokens = p.micro_batch_size * config.block_size
            p.products, p.elementwise = products(run, tokens), run.elementwise / tokens
        if kind == "cuda":  # linear in the batch where it fills the loss head's chunks: two points
            first = max(
                p.micro_batch_size, -(-ops.chunk_rows(config.vocab_size, torch.device("cuda")) // config.block_size)
            )
            low, high = (memory(simulate(shape, n, dtype, True, keep), n)["total"] for n in (first, 2 * first))
            most = first + (CARDS[0] * 10**9 - low) * first // (high - low)
            p.largest_micro_batch = max([n for n in range(1, share + 1) if share % n == 0 and n <= most], default=0)


def memory(run: Pass, rows: int) -> dict[str, int]:
    """{part: bytes} of one rank, with their total, the peak. `temporary` is what the peak has beside the others: logits,
    gradients of activations; less than nothing where the others are not held at once. The total is what torch's allocator
    hands out: measured on a CPU in float32, 1.000 of it. The process is larger, by Python and torch and what malloc holds
    back: its growth was 1.11 to 1.44 times the total, and 1.01 times with MALLOC_MMAP_THRESHOLD_=65536. In bfloat16 a CPU's
    kernels also copy weights: 1.08 at 6 layers × 512, vocabulary 50,304."""
    size = sum(4 * p.numel() for p in run.model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in run.model.buffers())
    parts = {
        "parameters": size + buffers,
        "gradients": size,
        "AdamW's moments": 2 * size,
        "input": 2 * 8 * rows * run.model.config.block_size,
    }
    order = ("autocast's weights", "attention", "MLP", "norms", "residual stream", "loss head")
    parts |= {
        ("activations: " if part in order[1:5] else "") + part: run.saved[part] for part in order if part in run.saved
    }
    total = parts["parameters"] + parts["AdamW's moments"] + parts["input"] + run.peak
    return {**parts, "temporary": total - sum(parts.values()), "total": total}


def products(run: Pass, tokens: int) -> dict[str, float]:
    """{part: FLOPs of matrix products a token}: forward and backward, as many as are executed, with their total. The scheme's
    are what is left when those that every GPT-2 has are taken off."""
    c = run.model.config
    parts = {
        "attention projections": 6 * c.n_layer * 4 * c.n_embd**2,
        "attention scores": run.attention / tokens,
        "positional scheme": 0.0,
        "MLP": 6 * c.n_layer * 8 * c.n_embd**2,
        "head and loss": 6 * c.vocab_size * c.n_embd,
    }
    parts["positional scheme"] = (run.products - run.attention) / tokens - sum(
        parts[part] for part in ("attention projections", "MLP", "head and loss")
    )
    return {**{part: n for part, n in parts.items() if n}, "total": run.products / tokens}


# ---- text


def size(n: float) -> str:
    """Bytes in decimal units."""
    unit = next((u for u in ("GB", "MB", "kB") if abs(n) >= {"GB": 1e9, "MB": 1e6, "kB": 1e3}[u]), "B")
    return f"{n / {'GB': 1e9, 'MB': 1e6, 'kB': 1e3, 'B': 1}[unit]:.{0 if unit == 'B' else 2}f} {unit}"


def duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines, indented, the first column left and the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def show(p: Plan) -> str:
    """The plan as a text of a few lines a part."""
    c = p.config
    lines = [
        f"{c.pos} {c.pos_options or ''}".strip()
        + f": {c.n_layer} layers × {c.n_embd}, {c.n_head} heads, length {c.block_size:,}, vocabulary {c.vocab_size:,}"
    ]
    if p.data_tokens is None:
        lines.append(
            f"  no data folder {c.data_dir}: epochs are unknown"
            + (", and the vocabulary is assumed" if p.vocabulary_assumed else "")
        )
    lines += ["", "parameters"]
    lines += columns([(part, f"{n:,}", f"{n / p.parameters['total']:.1%}") for part, n in p.parameters.items()])
    lines.append("  optimizer groups: " + ", ".join(f"{name} {n:,}" for name, n in p.groups.items() if n))

    lines += [
        "",
        f"FLOPs per token: {p.flops_per_token:,} (6 N + 12 L C T, PaLM's convention, which MFU is measured in)",
    ]
    if p.products:
        lines += columns([(part, f"{n:,.0f}") for part, n in p.products.items()])
        causal = p.products["attention scores"] * (c.block_size - 1) / (2 * c.block_size)
        lines.append(
            f"  matrix products executed, forward and backward, all T² scores; without those that causality masks {p.products['total'] - causal:,.0f}"
        )
        lines.append(f"  beside them {p.elementwise:,.0f} elementwise operations")

    lines += ["", "batch and data"]
    lines.append(
        f"  {c.batch_tokens:,} tokens a step = {p.windows:,} windows of {c.block_size:,} = {p.gpus} rank(s) × {p.accumulation} × micro_batch_size {p.micro_batch_size}"
    )
    epochs = "" if p.epochs is None else f", {p.epochs:.3g} epochs of {p.data_tokens:,}"
    lines.append(
        f"  {c.max_steps:,} steps, {p.tokens:,} tokens{epochs}; {p.flops:.3g} FLOPs; validation adds {p.validation:.1%}"
    )
    files = c.keep_checkpoints + 2  # best.pt, and the one being written
    lines.append(
        f"  checkpoint {size(p.checkpoint)}, as much host memory for a snapshot of it; {size(files * p.checkpoint)} of disk for {files} (kept, best, being written)"
    )

    if p.memory:
        names = {"cuda": "GPU", "cpu": "CPU"}
        parts = list(
            dict.fromkeys(part for m in p.memory.values() for part in m if part not in ("temporary", "total"))
        ) + ["temporary", "total"]
        dtypes = {kind: str(dtype).removeprefix("torch.") for kind, dtype in devices(c).items()}
        lines += [
            "",
            "memory of a rank at its peak" + (", without torch.compile, which saves less" if c.compile else ""),
        ]
        lines += columns(
            [("", *(f"{names[k]}, {dtypes[k]}" for k in p.memory))]
            + [(part, *(size(m.get(part, 0)) for m in p.memory.values())) for part in parts]
        )
        if "cuda" in p.memory:
            fits = ", ".join(
                f"{card} GB: {'yes' if p.memory['cuda']['total'] <= card * 10**9 else 'no'}" for card in CARDS
            )
            largest = (
                f"largest micro_batch_size in {CARDS[0]} GB: {p.largest_micro_batch}"
                if p.largest_micro_batch
                else f"no micro_batch_size fits {CARDS[0]} GB"
            )
            lines.append(f"  fits in {fits}; {largest}")
        if "cpu" in p.memory:
            lines.append(
                f"  this machine has {size(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))}; Python and torch take 0.3 GB of it, and malloc holds back 10 to 40 % of the total"
            )
    elif p.products:
        lines += ["", "memory: no estimate for MPS, whose attention differs"]

    lines += [
        "",
        f"expected time at an MFU of {p.mfu:g} (of the dense bfloat16 peak, whatever the dtype)"
        + (f", cost at {p.price_per_hour:g} per GPU-hour" if p.price_per_hour is not None else ""),
    ]
    rows = []
    for gpu, hours in p.hours.items():
        for n, h in dict(zip((1, p.gpus), hours)).items():
            cost = p.cost(h, n)
            rows.append(
                (
                    f"{n} × {gpu}",
                    duration(h),
                    f"{p.tokens / h / 3600:,.0f} tokens/s",
                    *([f"cost {cost:,.2f}"] if cost is not None else []),
                )
            )
    if p.measured_hours is not None:
        cost = p.cost(p.measured_hours, p.gpus)
        rows.append(
            (
                "as measured",
                duration(p.measured_hours),
                f"{p.tokens_per_s:,.0f} tokens/s",
                *([f"cost {cost:,.2f}"] if cost is not None else []),
            )
        )
    lines += columns(rows)
    lines.append(f"  for comparison, {MFU_SOURCE}")
    if "cpu" in p.memory and p.measured_hours is None:
        lines.append("  on this CPU: not known without measuring; a run's first lines have its tokens/s")
    return "\n".join(lines)


def scheme_table(config: RunConfig, schemes: list[str] | None = None) -> str:
    """Markdown: parameters, training FLOPs a token and saved activations of each scheme (default: all) at the shape of
    `config`, on a GPU in bfloat16. pos_options are left at each scheme's defaults. ValueError for an unknown scheme."""
    schemes = list(SCHEMES) if schemes is None else schemes
    for scheme in schemes:
        if scheme not in SCHEMES:
            raise ValueError(f"no scheme {scheme!r}{nearest(scheme, SCHEMES)} (schemes: {', '.join(SCHEMES)})")
    check(config)
    _, rows = resolve_batch(config, Ranks())
    tokens = rows * config.block_size
    shape = dataclasses.replace(
        config, vocab_size=config.vocab_size or padded_vocabulary(GPT2_VOCABULARY), pos_options={}
    ).model_config()

    def row(scheme):
        run = simulate(dataclasses.replace(shape, pos=scheme), rows, torch.bfloat16, gpu=True)
        activations = sum(n for part, n in run.saved.items() if part not in ("autocast's weights", "loss head"))
        return parameters(run.model), products(run, tokens), run.elementwise / tokens, activations / tokens

    rows_of = {scheme: row(scheme) for scheme in {*schemes, "rope", "none"}}
    (rope, _, _, rope_saved), (_, _, none, _) = rows_of["rope"], rows_of["none"]
    lines = [
        f"{shape.n_layer} layers × {shape.n_embd}, {shape.n_head} heads, length {shape.block_size:,}, vocabulary {shape.vocab_size:,}; training FLOPs and bytes a token at "
        f"{rows} windows a forward pass. Matrix products count all T² scores; elementwise operations are those beyond `none`; activations are bfloat16 on a GPU, eager.\n",
        "| scheme | parameters | own | against rope | matrix-product FLOPs | of the scheme | elementwise of the scheme | activations, bytes | against rope |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for scheme in schemes:
        count, flops, elementwise, saved = rows_of[scheme]
        own = count.get("positional table", 0) + count.get("positional scheme", 0)
        lines.append(
            f"| {scheme} | {count['total']:,} | {own:,} | {count['total'] - rope['total']:+,} | {flops['total']:,.0f} | {flops.get('positional scheme', 0):,.0f} "
            f"| {elementwise - none:,.0f} | {saved:,.0f} | {saved / rope_saved:.3f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="plan.py",
        description="What a run will cost. Every field of train.py can follow (train.py --help).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--schemes", action="store_true", help="a Markdown table of all schemes instead, at the shape of the config"
    )
    parser.add_argument("--gpus", type=int, help="ranks of the run (default: 1)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPUs' peak FLOP/s (default: 0.4)")
    parser.add_argument("--price_per_hour", type=float, help="price of one GPU for an hour")
    own, fields = parser.parse_known_args(arguments)
    if own.schemes and (own.gpus, own.mfu, own.price_per_hour) != (None, parser.get_default("mfu"), None):
        parser.error("--schemes is a table of FLOPs and bytes a token: it takes no --gpus, --mfu or --price_per_hour")
    config = parse(fields)
    try:
        print(
            scheme_table(config)
            if own.schemes
            else show(plan(config, gpus=own.gpus, mfu=own.mfu, price_per_hour=own.price_per_hour))
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
