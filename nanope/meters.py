"""Meters of a forward and backward pass: the bytes and the FLOPs of a model's operations, on fake or real tensors. Of
blocks that are alike two are run. nanope/costs.py reads them.
"""

import dataclasses
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from model import GPT, MLP, Attention, LayerNorm

aten = torch.ops.aten
# What torch's counter of FLOPs does not know: oneDNN's products, the product that accumulates in place, the CPU's
# attention
MORE_PRODUCTS = {
    torch.ops.mkldnn._linear_pointwise: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[0],
    aten.addmm_: lambda self, a, b, **_: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}
OTHERS = {operator: shape_wrapper(flops) for operator, flops in MORE_PRODUCTS.items()}


class Meter(TorchDispatchMode):
    """Bytes of all storages that operations make, while they live, by the part of the model that made them. Parameters,
    buffers and idx are not counted. And arithmetic.

    peak: the most bytes at once. live: {part: bytes} now. products: FLOPs of all matrix products; attention: of those
    within model.attend. elementwise: elements of results of pointwise operations; a complex product counts as its 6
    real operations.
    """

    def __init__(self, model: GPT, idx: torch.Tensor):
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        self.known = self.parameters | {idx.untyped_storage()._cdata}
        self.live, self.total, self.peak, self.elementwise = Counter(), 0, 0, 0
        self.products = self.attention = self.since = 0
        self.block, self.likes = None, Counter()  # set by Alike: the block and direction that runs, and see `drop`
        model.attend = partial(self.attend, model.attend)  # held by the model alone: finalizers keep the meter
        self.parts = ["residual stream"]
        for kind, part in ((Attention, "attention"), (MLP, "MLP"), (LayerNorm, "norms")):
            for module in (m for m in model.modules() if isinstance(m, kind)):
                module.register_forward_pre_hook(lambda *_, part=part: self.parts.append(part))
                module.register_forward_hook(lambda *_: self.parts.pop() and None)
        model.transformer["ln_f"].register_forward_hook(lambda *_: self.parts.append("loss head"))  # comes after it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:  # fake tensors are asked for it all the time
            return out
        if flops := flop_registry.get(func._overloadpacket) or OTHERS.get(func._overloadpacket):
            self.products += flops(*args, **kwargs, out_val=out)
        cast = func is aten._to_copy.default and args[0].untyped_storage()._cdata in self.parameters
        for tensor in (t for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            self.see(tensor, "autocast's weights" if cast else self.parts[-1])
            if torch.Tag.pointwise in func.tags:
                complex_product = tensor.is_complex() and func is aten.mul.Tensor
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

    def attend(self, inner, scheme, q, k, v, *others):
        """The model's own, whose products are those of attention."""
        self.begin()
        y = inner(scheme, q, k, v, *others)
        self.end()
        # The backward pass reaches y first, and q, k and v when it is through
        y.register_hook(lambda _: self.begin())
        for tensor in (q, k, v):
            tensor.register_hook(lambda _: self.end())
        return y

    def begin(self) -> None:
        self.since = self.products

    def end(self) -> None:
        self.attention += self.products - self.since
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

    def __init__(self, model: GPT, meter: Meter, whole: bool = False):
        self.meter, self.costs = meter, {}
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
        return self.meter.elementwise, self.meter.products, self.meter.attention

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
