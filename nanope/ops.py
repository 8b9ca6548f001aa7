"""What makes the model fast and exact, and is no part of GPT-2: dtypes, matrix products, GELU, sums, rotation.

Shapes: B batch, T positions, C model width, H heads, D head width.
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


def widens(x: torch.Tensor) -> bool:
    """Whether a product of 16-bit factors can be had in float32: on CUDA in eager code."""
    return x.device.type == "cuda" and torch.version.cuda is not None and not torch.compiler.is_compiling()


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
