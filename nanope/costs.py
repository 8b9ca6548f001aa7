"""What one forward and backward pass of a model costs: FLOPs and memory, without doing it.

The pass goes through the real model on fake tensors, which have shapes and storages but no contents. Every storage and
every matrix product is counted. Of blocks that are alike two are run. nanope/plan.py makes a plan of it.
"""

import bisect
import contextlib
import dataclasses
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from model import GPT, MLP, Attention, GPTConfig, LayerNorm
from nanope import ops
from nanope.attention import attend, way_of
from nanope.distributed import autocast, drop_casts


class Unfilled(GPT):
    """A GPT of fake tensors: no initial values are drawn, no token ids looked at."""

    def initialise(self, *_):
        self.described = True

    def check_tokens(self, *_):
        pass


@dataclass
class Pass:
    """Forward and backward of one micro-batch."""

    model: GPT  # without contents
    saved: dict[str, int]  # {part: bytes} held from forward to backward
    peak: int  # the most bytes at once beside parameters and moments
    products: int  # FLOPs of all matrix products
    attention: int  # and of those inside attention: all T² scores, or T times a window, as if nothing were masked
    elementwise: int  # operations


# ---- what is counted


class Meter(TorchDispatchMode):
    """Bytes of all storages that operations make, while they live, by the part of the model that made them. Parameters,
    buffers and idx are not counted. And elementwise work.

    peak: the most bytes at once. live: {part: bytes} now. elementwise: elements of results of pointwise operations; a
    complex product counts as its 6 real operations.
    """

    def __init__(self, model: GPT, idx: torch.Tensor):
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        self.known = self.parameters | {idx.untyped_storage()._cdata}
        self.live, self.total, self.peak, self.elementwise = Counter(), 0, 0, 0
        self.block, self.likes = None, Counter()  # set by Alike: the block and direction that runs, and see `drop`
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
                complex_product = tensor.is_complex() and func is torch.ops.aten.mul.Tensor
                self.elementwise += tensor.numel() * (6 if complex_product else 1)
        return out

    def see(self, tensor: torch.Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            weakref.finalize(storage, self.drop, key, size, part, self.block)
            self.live[part] += size
            self.total += size
            self.peak = max(self.peak, self.total)

    def drop(self, key: int, size: int, part: str, made_by: tuple | None) -> None:
        """What goes outside of all blocks, such as autocast's weights, goes for all that cost what its maker does."""
        self.known.discard(key)
        size *= 1 if self.block else 1 + self.likes[made_by]
        self.live[part] -= size
        self.total -= size


# What torch's counter does not know: oneDNN's products, the product that accumulates in place, the CPU's attention
aten = torch.ops.aten
MORE_PRODUCTS = {
    torch.ops.mkldnn._linear_pointwise: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[0],
    aten.addmm_: lambda self, a, b, **_: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}


class Untracked(contextlib.nullcontext):
    """In the place of torch's ModuleTracker, whose hooks would keep what activation checkpointing computes again."""

    parents = ("Global",)


class Products(FlopCounterMode):
    """FLOPs of all matrix products, and `attention`, of those within `attend`, which is nanope.attention.attend or
    stands for it."""

    def __init__(self, attend):
        super().__init__(display=False, custom_mapping=MORE_PRODUCTS)
        self.inner, self.attention, self.since = attend, 0, 0
        self.mod_tracker = Untracked()

    def attend(self, scheme, q, k, v, *others):
        self.begin()
        y = self.inner(scheme, q, k, v, *others)
        self.end()
        # The backward pass reaches y first, and q, k and v when it is through
        y.register_hook(lambda _: self.begin())
        for tensor in (q, k, v):
            tensor.register_hook(lambda _: self.end())
        return y

    def begin(self) -> None:
        self.since = self.get_total_flops()

    def end(self) -> None:
        self.attention += self.get_total_flops() - self.since
        self.begin()


# ---- blocks that are alike


@dataclass
class Cost:
    """What a block adds to the meters in one direction."""

    live: Counter  # bytes that are there after it and were not before, by part
    bytes: int  # and their sum
    peak: int  # the most bytes at once beside those before it
    counts: tuple[int, ...]  # elementwise operations, FLOPs of products and of those inside attention


class Alike:
    """Of the blocks of a kind, which have the same schemes and window, the first and the last are run. The others cost
    what these do, and hand on tensors of the right shapes, so that all around the blocks is run as it is.

    Bytes are those of the block of its kind that is passed first: forward its first, backward its last. Counts are
    those of the one that is passed last, which finds sums of gradients to add to where layers share a tensor.
    """

    def __init__(self, model: GPT, meter: Meter, products: Products, whole: bool = False):
        self.meter, self.products, self.costs = meter, products, {}
        self.ends = {}  # {block that is not run: the first and the last of its kind}
        self.used = {}  # {the first of a kind: which of `computed` its block differentiates}
        self.made = {}  # {the same: ids of tensors that have a gradient after the kind's first backward pass}
        self.shared = {}  # {block that is not run: bytes of gradients of these, which it adds to}
        blocks, kinds = model.transformer["h"], {}
        for number, group in enumerate(model.groups):
            for i in group:
                kinds.setdefault((number, blocks[i].attn.window), []).append(i)
        for first, *between, last in (members for members in kinds.values() if len(members) > 2 and not whole):
            self.ends |= dict.fromkeys(between, (first, last))
            meter.likes[first, "forward"] = len(between)
        for i, block in enumerate(blocks):
            if i in self.ends:
                block.forward = partial(self.stand_in, i, block)
            block.register_forward_pre_hook(partial(self.before, i))
            block.register_forward_hook(partial(self.after, i))

    def stand_in(self, i: int, block, x: torch.Tensor, ctx) -> torch.Tensor:
        """The forward pass of a block that is not run."""
        first, _ = self.ends[i]
        used = [t for t, is_used in zip(computed(ctx), self.used[first]) if is_used]
        if i not in self.shared:  # else activation checkpointing runs it again
            others = [*used, *(p for p in block.parameters() if p.grad is None)]
            self.shared[i] = sum(t.nbytes for t in others if id(t) in self.made[first])
        return StandIn.apply(x, *used)

    # A block's forward pass lasts from `before` to `after`, its backward pass from when the gradient of its output is
    # there to when that of its input is

    def before(self, i: int, block, given: tuple) -> tuple | None:
        if self.meter.block:  # activation checkpointing runs it again
            return None
        self.begin(i, "forward")
        if i > 0:
            return None
        # A node of the graph, whose gradient is there before what is before the blocks has its own
        x, ctx = given
        return x.view_as(x), ctx

    def after(self, i: int, block, given: tuple, y: torch.Tensor) -> None:
        if self.meter.block != (i, "forward"):
            return
        self.end()
        x, ctx = given
        y.register_hook(lambda _: self.begin(i, "backward"))
        if i == 0:
            x.register_hook(lambda _: self.end())
        if (i, "forward") in self.meter.likes:
            tensors = computed(ctx)
            self.used[i] = uses(y, x, tensors)
            self.made[i] = {*map(id, [*tensors, *block.parameters()])}

    def begin(self, *block) -> None:
        if self.meter.block:
            self.end()
        meter = self.meter
        self.at_begin = Counter(meter.live), meter.total, meter.peak, self.counts()
        meter.block, meter.peak = block, meter.total

    def end(self) -> None:
        meter, (live, total, peak, counts) = self.meter, self.at_begin
        (i, direction), meter.block = meter.block, None
        if i in self.ends:
            cost = self.costs[self.ends[i][direction == "backward"], direction]
            live.update(cost.live)
            meter.live, meter.total, meter.elementwise = live, total + cost.bytes, counts[0]
            meter.peak = max(peak, total + cost.peak)
            if direction == "backward":
                meter.total -= self.shared[i]
        else:
            left = Counter(meter.live)
            left.subtract(live)
            done = tuple(now - then for now, then in zip(self.counts(), counts))
            self.costs[i, direction] = Cost(left, meter.total - total, meter.peak - total, done)
            meter.peak = max(peak, meter.peak)

    def counts(self) -> tuple[int, ...]:
        return self.meter.elementwise, self.products.get_total_flops(), self.products.attention

    def totals(self) -> list[int]:
        """Counts of the whole pass, once it is over."""
        found = [self.counts()]
        for first, last in self.ends.values():
            found += [self.costs[last, "forward"].counts, self.costs[first, "backward"].counts]
        return [*map(sum, zip(*found))]


class StandIn(torch.autograd.Function):
    """x (B, T, C), and what else a block differentiates → a tensor like x; gradients like all of them."""

    @staticmethod
    def forward(ctx, x, *used):
        ctx.save_for_backward(x)
        ctx.used = [(t.shape, t.dtype) for t in used]
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, g):
        return torch.empty_like(g), *(torch.empty(shape, dtype=dtype) for shape, dtype in ctx.used)


def computed(thing) -> list[torch.Tensor]:
    """The tensors of a layer's Context that have a gradient to pass on, each once, in order."""
    if isinstance(thing, torch.Tensor):
        return [thing] if thing.grad_fn is not None else []
    if dataclasses.is_dataclass(thing):
        thing = vars(thing)
    items = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    return [*{id(t): t for item in items for t in computed(item)}.values()]


def uses(y: torch.Tensor, x: torch.Tensor, tensors: list[torch.Tensor]) -> list[bool]:
    """Whether the way from y back to x meets each of the tensors."""
    ends = {x.grad_fn, *(t.grad_fn for t in tensors)}
    seen, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [] if node in ends else [following for following, _ in node.next_functions]
    return [t.grad_fn in seen for t in tensors]


# ---- the pass


def measure(model: GPT, rows: int, dtype: torch.dtype, keep_gradients: bool, whole: bool = False) -> Pass:
    """One pass over `rows` windows on the model's own (fake or real) CPU tensors; the model is of no use afterwards.
    keep_gradients: gradients are there already, as from the second micro-batch of a step on. whole: run every block."""
    idx = torch.zeros(rows, model.config.block_size, dtype=torch.int64)
    meter, products = Meter(model, idx), Products(model.attend)
    model.attend = products.attend
    with meter, products:
        if keep_gradients:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            meter.live.clear()
        alike = Alike(model, meter, products, whole)
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
        if way_of(scheme, torch.device("cuda"), ctx.dtype, ctx.length, **masks) not in ("causal", "flex"):
            return attend(scheme, q, k, v, x, ctx, window, dropout)
        self.held.append(scheme.bias(x, q, k, ctx))  # FlexAttention saves the tensors that it captured
        width = v.size(-1)
        if q.size(-1) > width:  # kernels want equal widths
            v = F.pad(v, (0, q.size(-1) - width))
        q, k, v = (t.to(self.dtype) for t in (q, k, v))
        if window:  # as many keys a query as it sees, for the count of products
            k, v = k[:, :, :window], v[:, :, :window]
        if self.dtype == torch.float32:
            y = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout, True)[0]
        else:
            y = aten._scaled_dot_product_flash_attention(q, k, v, dropout, True)[0]
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

    def fits(n: int) -> bool:
        run = simulate(shape, n, dtype, True, keep_gradients=True, again=again, divided=ranks > 1)
        return memory(run, n, ranks)["total"] <= limit

    if fits(sizes[-1]):
        return sizes[-1]
    found = bisect.bisect_left(sizes, True, hi=len(sizes) - 1, key=lambda n: not fits(n))
    return sizes[found - 1] if found else 0


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
    if again:
        scores = (again.attention - run.attention) / tokens
        parts["scores, computed again"] = scores
        parts["others, computed again"] = (again.products - run.products) / tokens - scores
    return {**{part: n for part, n in parts.items() if n}, "total": (again or run).products / tokens}
