"""What makes the model fast and exact, and is no part of GPT-2: dtypes, matrix products, GELU, the loss, rotation.

Shapes: B batch, T positions, C model width, H heads, D head width, V vocabulary.
"""

import contextlib
import functools
import math
import os
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ------------------------------------------------------------------------------------------------
# Dtypes and devices


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that positions, softmax and sums use: float32, or the model's dtype if wider."""
    return torch.promote_types(dtype, torch.float32)


def double_device(device: torch.device) -> torch.device:
    """Where float64 arithmetic for this device runs: MPS has no float64, so the CPU does it."""
    return torch.device("cpu") if device.type == "mps" else device


def no_autocast(device: torch.device):
    """Context in which autocast leaves dtypes alone."""
    return torch.autocast(device.type, enabled=False)


acting_kind: str | None = None  # set by as_on alone


@contextlib.contextmanager
def as_on(kind: str):
    """Within it, fast paths are chosen as on a device of this kind ("cuda", "cpu"), wherever the tensors are. An
    estimate on fake tensors, which cannot be on a GPU that is not there, needs it (nanope/plan.py)."""
    global acting_kind
    before, acting_kind = acting_kind, kind
    try:
        yield
    finally:
        acting_kind = before


def kind_of(device: torch.device) -> str:
    """The kind of device that fast paths are chosen for: the device's own; within `as_on`, the kind given there."""
    return acting_kind or device.type


# ------------------------------------------------------------------------------------------------
# Matrix products


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD CPU of Zen 5 or later (family 26), whose AVX-512 is twice as wide as AVX2.

    MKL, PyTorch's BLAS, stays with AVX2 there. oneDNN, which PyTorch has for other uses, takes 0.42 to 0.48 of its time
    for x Wᵀ and 0.5 to 0.65 for a weight's gradient (measured on one core). Known on Linux only."""
    cpuinfo = Path("/proc/cpuinfo")
    family = re.search(r"AuthenticAMD\ncpu family\s*: (\d+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    amd = family is not None and int(family[1]) >= 26 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (amd and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    # oneDNN makes code for each shape. It and PyTorch keep 1,024 of these, 0.9 GB where lengths vary. Training needs 30
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
        os.environ.setdefault(cache, "128")
    return True


def replaceable(x: torch.Tensor) -> bool:
    """Whether x is float32 on a CPU in eager code, where functions of our own may stand for PyTorch's."""
    if x.dtype != torch.float32 or kind_of(x.device) != "cpu":
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return not torch._C._are_functorch_transforms_active()  # torch.func knows PyTorch's, and not ours


def by_onednn(x: torch.Tensor) -> bool:
    """Whether products of the rows of x go through oneDNN: on such a CPU, and with rows enough to repay its set-up."""
    return replaceable(x) and x.numel() >= 32 * x.size(-1) and onednn_is_faster()


class Product(torch.autograd.Function):
    """a (m, k), b (n, k) → a bᵀ (m, n) by oneDNN. Its derivatives are such products too, to any order."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        grad_a = Product.apply(g, b.t()) if ctx.needs_input_grad[0] else None
        grad_b = Product.apply(a.t(), g.t()).t() if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear by the faster library: x (..., K), weight (N, K), bias (N,) → x Wᵀ + bias (..., N)."""
    if not by_onednn(x):
        return F.linear(x, weight, bias)
    y = Product.apply(x.reshape(-1, x.size(-1)), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """torch.nn.Linear by the faster library."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)

    def in_dtype(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same computed in a dtype, also under autocast: for gates and distances, whose sums over tokens grow."""
        with no_autocast(x.device):
            return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


# ------------------------------------------------------------------------------------------------
# Activation

GELU_BLOCK = 2**17  # elements a thread and operation: a block stays in the caches, and repays the calls from Python
LN2 = math.log(2)
FIRST, THIRD = math.sqrt(8 / math.pi), math.sqrt(8 / math.pi) * 0.044715  # GPT-2's, of x and x³


@functools.cache
def tanh_is_slow() -> bool:
    """Whether this CPU's vectors are AVX2's: PyTorch's tanh takes 4.3 ns an element on one core of Zen 3, 5 times its
    exp2. With AVX-512, whose vectors are twice as long, it was not measured."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


class TanhGELU(torch.autograd.Function):
    """GELU in its tanh form, x (...) contiguous float32 on a CPU → y = x/(1 + e), where e = exp(-x w) and
    w = FIRST + THIRD x².

    Its derivative (1 + e y (x w)')/(1 + e) is formed at once, from the same e, and kept for the backward pass in the
    place of x. Against float64 the errors are at most 6e-7 and 3e-7; those of PyTorch's float32 are 5e-7 and 1.1e-6.
    """

    @staticmethod
    def forward(ctx, x):
        y, slope = torch.empty_like(x), torch.empty_like(x) if ctx.needs_input_grad[0] else None
        one, of_w, of_slope = x.new_tensor([1.0, -FIRST / LN2, -2 * FIRST])
        size = GELU_BLOCK * torch.get_num_threads()
        temporaries = [x.new_empty(min(size, x.numel())) for _ in range(2)]
        for first in range(0, x.numel(), size):
            x_, y_ = (t.view(-1)[first : first + size] for t in (x, y))
            w, e = (t[: x_.numel()] for t in temporaries)
            torch.clamp_min(x_, -9.9, out=y_)  # below, y > -1e-36; and from -10.1 on e would overflow
            torch.addcmul(of_w, y_, y_, value=-THIRD / LN2, out=w)  # -w/ln 2: exp2 takes 0.6 of the time of exp
            torch.mul(y_, w, out=e).exp2_()
            if slope is None:
                y_.div_(e.add_(one))
                continue
            slope_ = slope.view(-1)[first : first + size]
            y_.div_(torch.add(e, one, out=slope_))
            torch.add(of_slope, w, alpha=-3 * LN2, out=w).mul_(y_)  # (x w)' = 3 w - 2 FIRST
            torch.div(torch.addcmul(one, e, w, out=w), slope_, out=slope_)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (slope,) = ctx.saved_tensors
        return g * slope


def gelu(x: torch.Tensor) -> torch.Tensor:
    """torch.nn.functional.gelu(x, approximate="tanh") by the faster way: x (...) → (...)."""
    fast = type(x) is torch.Tensor and x.numel() >= 2**14 and x.is_contiguous() and replaceable(x) and tanh_is_slow()
    return TanhGELU.apply(x) if fast else F.gelu(x, approximate="tanh")


# ------------------------------------------------------------------------------------------------
# The loss: linear head and cross-entropy in one, without (tokens × V) logits


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits that may exist at a time: 2^23 elements (32 MB) on a CPU, where matrix products are at full speed
    from about 160 rows on, and 2^28 on a GPU, where each chunk should be one large product."""
    elements, step = (2**23, 16) if kind_of(device) == "cpu" else (2**28, TILE)
    return max(step, elements // vocab_size // step * step)


TILE = 128  # rows of a GPU's product that one thread block computes: a part of a tile takes the time of a whole one


def equal_chunks(rows: int, most: int, device: torch.device) -> int:
    """Rows of each chunk of `rows`, at most `most`. On a GPU chunks are equal, in whole tiles, up to half as large as
    they might be: another shape is another choice of kernel. A CPU's are as large as they may be."""
    count = max(1, -(-rows // most))
    if kind_of(device) == "cpu":
        return most
    if rows % TILE == 0:
        count = next((n for n in range(count, 2 * count) if rows // TILE % n == 0), count)
    return min(most, -(-rows // count // TILE) * TILE)


def softmax_and_lse(
    logits: torch.Tensor, exact: torch.dtype, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax (n, V) and log-sum-exp (n, 1) of logits (n, V), in the dtype `exact`, which they may not have yet.

    Compiled, both are one kernel: it reads logits as they are. Eager, the log-sum-exp comes from the largest
    probability, which never underflows; it is found on a CPU by the faster amax, on a GPU without a pass over p."""
    if torch.compiler.is_compiling():
        logits = logits.to(exact)
        peak = logits.amax(1, keepdim=True)
        p = (logits - peak).exp()
        total = p.sum(1, keepdim=True)
        return p / total, peak + total.log()
    if kind_of(logits.device) == "cpu":
        peak = logits.amax(1, keepdim=True)
        p = torch.softmax(logits, 1, dtype=exact, out=out)
        return p, peak - p.amax(1, keepdim=True).log()
    peak, at = logits.max(1, keepdim=True)
    p = torch.softmax(logits, 1, dtype=exact, out=out)
    return p, peak - p.gather(1, at).log()


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `h @ weight.T`, chunked over rows, with the gradients formed in the forward pass.

    While a chunk of logits is at hand, its softmax gives the gradients of h and of the weight at once:
    two matrix products more, no second look at the logits. Stored gradients are those of the *sum*
    (so float16 does not underflow), the weight's is accumulated in float32; backward divides by the
    count and multiplies by grad_output, which carries any loss scale or accumulation factor.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, compute_dtype):
        # h (N, C), weight (V, C), targets (N,) int64 with -1 ignored
        exact = wide(h.dtype)
        need_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        head = weight.to(compute_dtype)
        total = torch.zeros((), dtype=exact, device=h.device)
        fast = compute_dtype == h.dtype and by_onednn(h)
        if need_grad:
            grad_h = torch.empty_like(h)  # (N, C), of the summed loss
            shape = weight.shape[::-1] if fast else weight.shape  # (V, C); (C, V) by oneDNN, its faster order
            grad_weight = torch.zeros(shape, dtype=wide(weight.dtype), device=weight.device)
        rows = chunk_rows(weight.size(0), h.device)
        if fast:  # at full speed with half the rows, and it holds a packed copy of p
            rows = max(1, rows // 2)
        if compute_dtype == torch.float16:  # p.t() @ x sums over the chunk, and float16 ends at 65,504
            rows = min(rows, 2048)
        rows = equal_chunks(h.size(0), rows, h.device)
        compiling = torch.compiler.is_compiling()
        in_place = not compiling and kind_of(h.device) != "mps"  # Metal's graphs promise nothing of a softmax in place
        # Fresh memory costs a CPU page faults, a tenth of the whole loss: one buffer serves all chunks
        reuse = h.device.type == "cpu" and compute_dtype == exact and not compiling
        buffer = h.new_empty(min(rows, h.size(0)), weight.size(0)) if reuse and not fast else None
        for start in range(0, h.size(0), rows):
            part = slice(start, start + rows)
            x, target = h[part].to(compute_dtype), targets[part]
            if fast:
                logits = Product.apply(x, head)
            elif widens(x):  # written in float32 by the product, which saves a GPU's softmax a pass
                logits = exact_product(x, head)
            else:
                logits = torch.mm(x, head.t(), out=buffer[: x.size(0)] if reuse else None)  # (n, V)
            keep = target >= 0
            index = target.clamp_min(0).unsqueeze(1)  # (n, 1)
            target_logit = logits.gather(1, index)
            p, lse = softmax_and_lse(logits, exact, logits if logits.dtype == exact and in_place else None)
            nll = lse - target_logit
            total = total + (nll.squeeze(1) * keep).sum()
            if need_grad:
                if compiling:  # part of the kernel that makes p; a scatter would write p in float32 and read it again
                    p = torch.where(torch.arange(p.size(1), device=p.device) == index, p - 1, p)
                else:
                    p.scatter_add_(1, index, torch.full_like(nll, -1.0))
                p = p.to(compute_dtype)
                keep = keep.unsqueeze(1).to(compute_dtype)
                grad_h[part] = (Product.apply(p, head.t()) if fast else p @ head) * keep
                if fast:
                    grad_weight += Product.apply((x * keep).t(), p.t())
                elif p.dtype == grad_weight.dtype:
                    grad_weight.addmm_(p.t(), x * keep)
                else:
                    grad_weight += p.t() @ (x * keep)
        count = (targets >= 0).sum()
        if need_grad:
            ctx.save_for_backward(grad_h, grad_weight.t() if fast else grad_weight, count)
            ctx.dtypes = h.dtype, weight.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad_h, grad_weight, count = ctx.saved_tensors
        scale = grad_output / count
        h_dtype, weight_dtype = ctx.dtypes
        # In place where no further backward pass reads them: (V, C) of fresh memory is a tenth of a CPU's loss
        kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
        times = torch.mul if kept else torch.Tensor.mul_
        return times(grad_h, scale).to(h_dtype), times(grad_weight, scale).to(weight_dtype), None, None


def head_dtype(h: torch.Tensor) -> torch.dtype:
    """The dtype of the head's matrix products: autocast's where it is on, else that of h."""
    device = h.device.type
    if torch.is_autocast_enabled(device) and h.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return h.dtype


def linear_cross_entropy(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of a linear head over the targets that are not -1.

    h (..., C), weight (V, C), targets (...) int64 → scalar, float32 (h's dtype if wider). No target left
    gives nan, as in torch.nn.functional.cross_entropy.
    """
    if not torch.is_grad_enabled():  # within a Function's forward this cannot be seen
        return linear_nll(h, weight, targets).sum() / (targets >= 0).sum()
    dtype = head_dtype(h)
    with no_autocast(h.device):
        return LinearCrossEntropy.apply(h.reshape(-1, h.size(-1)), weight, targets.reshape(-1), dtype)


def scoring_dtype(h: torch.Tensor) -> torch.dtype:
    """The dtype of the factors of `exact_product` for hidden states h: the head's where a product of that dtype can be
    had in float32, which is on CUDA in eager code, else float32 (h's dtype if wider)."""
    dtype = head_dtype(h)
    return dtype if widens(h) else wide(dtype)


def widens(x: torch.Tensor) -> bool:
    """Whether a product of 16-bit factors can be had in float32: on CUDA in eager code."""
    return x.device.type == "cuda" and torch.version.cuda is not None and not torch.compiler.is_compiling()


def exact_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (n, C), weight (V, C), both of scoring_dtype → x Wᵀ (n, V) in float32 (their dtype if wider).

    Scores need it: logits about -100 have steps of 0.5 in bfloat16, which shifts their NLL by 0.01 nats. Training keeps
    the faster product, whose error its gradients do not notice."""
    exact = wide(x.dtype)
    return linear(x, weight) if x.dtype == exact else torch.mm(x, weight.t(), out_dtype=exact)


@torch.no_grad()
def linear_nll(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target: h (..., C), weight (V, C), targets (...) → (...), 0 where
    the target is -1. Chunked, without gradient; logits and result in float32 (h's dtype if wider)."""
    dtype, exact = scoring_dtype(h), wide(h.dtype)
    nll = torch.zeros(targets.shape, dtype=exact, device=h.device)
    with no_autocast(h.device):
        # No logits for the rest; under torch.compile for all, since a graph's shapes are fixed
        keep = ... if torch.compiler.is_compiling() else targets >= 0
        scored, target = h[keep].reshape(-1, h.size(-1)).to(dtype), targets[keep].reshape(-1)  # (n, C), (n,)
        head = weight.to(dtype)
        rows = equal_chunks(scored.size(0), chunk_rows(weight.size(0), h.device), h.device)
        parts = [
            F.cross_entropy(exact_product(x, head), y, ignore_index=-1, reduction="none")
            for x, y in zip(scored.split(rows), target.split(rows))
        ]
        nll[keep] = torch.cat(parts).view(targets[keep].shape)
    return nll


# ------------------------------------------------------------------------------------------------
# Sums over tokens

SUM_CHUNK = 32  # tokens whose sum is exact enough in float32: within 2e-5 of up to 32 radians


def double_sum(x: torch.Tensor, dim: int, keepdim: bool = False) -> torch.Tensor:
    """The sum in float64. MPS has none: there it is summed in float32, and float64, on the CPU, from then on."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return x.sum(dim, keepdim, dtype=dtype).to(double_device(x.device), torch.float64)


def running_sums(x: torch.Tensor, modulus: float | None = None) -> torch.Tensor:
    """Σ_{s ≤ t} x_s over dimension 1, of x (B, T, …) in x's dtype; with a modulus up to multiples of it.

    Summed within chunks of 32 tokens in x's dtype, and over chunks in float64, of which there are few. A float32 scan
    of all tokens is wrong by 1.4 radians at 16,384 where it is sequential, as CUDA's is; a CPU's has float64 sums
    inside.
    """
    T = x.size(1)
    if T <= SUM_CHUNK:
        return x.cumsum(1)
    if T % SUM_CHUNK:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -T % SUM_CHUNK))
    chunks = x.unflatten(1, (-1, SUM_CHUNK))  # (B, chunks, tokens, …)
    totals = double_sum(chunks, 2)
    before = totals.cumsum(1) - totals
    if modulus is not None:
        before = before % modulus
    return (chunks.cumsum(2) + before.to(x).unsqueeze(2)).flatten(1, 2)[:, :T]


def suffix_sums(x: torch.Tensor) -> torch.Tensor:
    """Σ_{j ≥ n} x_j over the last dimension. Exact near its end, as no difference of two long sums is."""
    return x.flip(-1).cumsum_(-1).flip(-1)


# ------------------------------------------------------------------------------------------------
# Rotation


def rope_frequencies(width: int, base: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """θ_i = base^(-2i/width), i = 0 … width/2-1, in radians per token: (width/2,) float64. Made on `device`: a copy
    from the host would make it wait for the GPU."""
    return base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)


def turns(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a pair of channels is multiplied by to turn it, of cos and sin (..., D/2), for `turned`.

    A complex number in eager mode, where one product of these is the fastest way. torch.compile has no complex code:
    there it is (cos, cos) and (-sin, sin), by x·(cos, cos) + (x1, x0)·(-sin, sin). Turning back is of the same form,
    and both become part of a GPU's kernels around them. x0 and x1 apart, stacked again, do not in the backward pass; on
    a CPU they are faster: a layer's whole step takes 0.94 of the time."""
    if torch.compiler.is_compiling():
        if kind_of(cos.device) == "cpu":
            return cos, sin
        signs = torch.arange(-1, 2, 2, dtype=sin.dtype, device=sin.device)
        return cos.unsqueeze(-1), sin.unsqueeze(-1) * signs
    return (torch.complex(cos, sin),)


def turned(x: torch.Tensor, by: tuple[torch.Tensor, ...], back: bool = False) -> torch.Tensor:
    """Each channel pair (2i, 2i+1) of x (..., D) multiplied by `turns`, or by their conjugates to turn it `back`: in
    x's dtype, computed in theirs."""
    dtype = by[0].real.dtype if len(by) == 1 else by[0].dtype
    pairs = x.to(dtype).unflatten(-1, (-1, 2))  # (..., D/2, 2)
    if len(by) == 1:
        y = torch.view_as_real(torch.view_as_complex(pairs) * (by[0].conj() if back else by[0]))
    elif kind_of(x.device) == "cpu":
        (x0, x1), cos, sin = pairs.unbind(-1), by[0], -by[1] if back else by[1]
        y = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1)
    elif back:
        y = pairs * by[0] + (pairs * by[1]).flip(-1)
    else:
        y = pairs * by[0] + pairs.flip(-1) * by[1]
    y = y.flatten(-2)
    # Not an idle .to(): compiled by torch 2.11, it loses the gradients of an autograd.Function that saves its result
    return y if y.dtype == x.dtype else y.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each channel pair (2i, 2i+1) of x by an angle: (x0 + i·x1)·(cos + i·sin).

    x (..., D); cos, sin broadcastable to (..., D/2) in max(float32, model dtype) → (..., D) in x's dtype.
    """
    return turned(x, turns(cos, sin))


def fuse_rotations() -> None:
    """Let inductor put a rotation's backward pass into the kernel that joins the gradients of q, k and v. It writes an
    intermediate result out from 30 operations on for a GPU, which that kernel exceeds; for a CPU from 50 on."""
    import torch._inductor.config

    torch._inductor.config.realize_opcount_threshold = 50


def phase_gradient(y: torch.Tensor, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dL/dφ = Im(conj(y) g) of y = x e^{iφ} and g = dL/dy, (..., D) each: (..., D/2)."""
    (y0, y1), (g0, g1) = (z.to(dtype).unflatten(-1, (-1, 2)).unbind(-1) for z in (y, g))
    return g1 * y0 - g0 * y1


class Turned(torch.autograd.Function):
    """Turn qk (B, T, 2, H, D) by phases that have a gradient, which broadcast to (B, T, 2, H, D/2); cos, sin: theirs.

    The phases' gradient comes from the turned q and k, which attention keeps anyway. Autograd would keep q and k once
    more.
    """

    @staticmethod
    def forward(ctx, qk, phases, cos, sin):
        by = turns(cos, sin)
        y = turned(qk, by)
        ctx.save_for_backward(y, *by)
        ctx.dtype, ctx.phases = cos.dtype, (phases.shape, phases.dtype, phases.device)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, *by = ctx.saved_tensors
        shape, dtype, device = ctx.phases
        grad_phases = phase_gradient(y, g, ctx.dtype).sum_to_size(shape)
        return turned(g, by, back=True), grad_phases.to(device, dtype), None, None
