"""GPT-2 with a choice of positional scheme, in one file.

Read it in this order: matrix products, the fused loss, the rotation, the schemes (one class each), the model.

Shapes: B batch, T positions, C model width, H heads, D = C/H head width, V vocabulary, L layers.
Channels of a head are paired as neighbours, (0,1)(2,3)…, each pair one complex number, in every scheme.

    from model import GPT, GPTConfig, SCHEMES
    model = GPT(GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=128, pos="rope"), seed=0)
    logits, _ = model(idx)              # idx (B, T) int64 -> (B, T, V)
    _, loss = model(idx, targets)       # mean cross-entropy, scalar; targets of -1 are ignored
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ------------------------------------------------------------------------------------------------
# Small helpers on dtypes


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that positions, softmax and sums use: float32, or the model's dtype if wider."""
    return torch.promote_types(dtype, torch.float32)


def double_device(device: torch.device) -> torch.device:
    """Where float64 arithmetic for this device runs: MPS has no float64, so the CPU does it."""
    return torch.device("cpu") if device.type == "mps" else device


def no_autocast(device: torch.device):
    """Context in which autocast leaves dtypes alone."""
    return torch.autocast(device.type, enabled=False)


# ------------------------------------------------------------------------------------------------
# Matrix products


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD CPU of Zen 5 or later (family 26), whose AVX-512 is twice as wide as AVX2. MKL, PyTorch's BLAS,
    stays with AVX2 there; oneDNN, which PyTorch has for other uses, takes 0.42 to 0.48 of its time for x Wᵀ and 0.5 to 0.65
    for a weight's gradient (measured on one core). Known on Linux only."""
    cpuinfo = Path("/proc/cpuinfo")
    family = re.search(r"AuthenticAMD\ncpu family\s*: (\d+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    amd = family is not None and int(family[1]) >= 26 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (amd and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    # oneDNN makes code for each shape. It and PyTorch keep 1,024 of these, 0.9 GB where lengths vary; training needs about 30.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
        os.environ.setdefault(cache, "128")
    return True


def by_onednn(x: torch.Tensor) -> bool:
    """Whether products of the rows of x go through oneDNN: float32 on such a CPU in eager code, and rows enough to repay its set-up."""
    if (
        x.dtype != torch.float32
        or x.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    if torch._C._are_functorch_transforms_active():  # torch.func knows F.linear, and not Product
        return False
    return x.numel() >= 32 * x.size(-1) and onednn_is_faster()


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
    """x (..., K), weight (N, K), bias (N,) → x Wᵀ + bias (..., N): torch.nn.functional.linear, by the faster library."""
    if not by_onednn(x):
        return F.linear(x, weight, bias)
    y = Product.apply(x.reshape(-1, x.size(-1)), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


# ------------------------------------------------------------------------------------------------
# The loss: linear head and cross-entropy in one, without (tokens × V) logits


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits that exist at a time: 2^23 elements (32 MB) on a CPU, where matrix products are at full speed
    from about 160 rows on, and 2^28 on a GPU, where each chunk should be one large product."""
    elements = 2**23 if device.type == "cpu" else 2**28
    return max(16, elements // vocab_size // 16 * 16)


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
            shape = weight.shape[::-1] if fast else weight.shape
            grad_weight = torch.zeros(
                shape, dtype=wide(weight.dtype), device=weight.device
            )  # (V, C); (C, V) by oneDNN, its faster order
        rows = chunk_rows(weight.size(0), h.device)
        if fast:  # at full speed with half the rows, and it holds a packed copy of p
            rows = max(1, rows // 2)
        if compute_dtype == torch.float16:  # p.t() @ x sums over the chunk, and float16 ends at 65,504
            rows = min(rows, 2048)
        # Fresh memory costs a CPU page faults, a tenth of the whole loss: one buffer serves all chunks
        reuse = h.device.type == "cpu" and compute_dtype == exact and not torch.compiler.is_compiling()
        buffer = h.new_empty(min(rows, h.size(0)), weight.size(0)) if reuse and not fast else None
        for start in range(0, h.size(0), rows):
            part = slice(start, start + rows)
            x, target = h[part].to(compute_dtype), targets[part]
            if fast:
                logits = Product.apply(x, head)
            else:
                logits = torch.mm(x, head.t(), out=buffer[: x.size(0)] if reuse else None).to(exact)  # (n, V)
            keep = target >= 0
            index = target.clamp_min(0).unsqueeze(1)  # (n, 1)
            target_logit = logits.gather(1, index)
            peak = logits.amax(1, keepdim=True)
            p = torch.softmax(logits, 1, out=logits if reuse else None)
            # log-sum-exp from the largest probability, which never underflows
            nll = peak - p.amax(1, keepdim=True).log() - target_logit
            total = total + (nll.squeeze(1) * keep).sum()
            if need_grad:
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
        return (grad_h * scale).to(h_dtype), (grad_weight * scale).to(weight_dtype), None, None


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


@torch.no_grad()
def linear_nll(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target: h (..., C), weight (V, C), targets (...) → (...), 0 where
    the target is -1. Chunked, without gradient; float32 (h's dtype if wider)."""
    dtype, exact = head_dtype(h), wide(h.dtype)
    nll = torch.zeros(targets.shape, dtype=exact, device=h.device)
    with no_autocast(h.device):
        keep = (
            ... if torch.compiler.is_compiling() else targets >= 0
        )  # no logits for the rest; a graph's shapes are fixed
        scored, target, head = (
            h[keep].reshape(-1, h.size(-1)).to(dtype),
            targets[keep].reshape(-1),
            weight.to(dtype),
        )  # (n, C), (n,)
        rows = chunk_rows(weight.size(0), h.device)
        parts = [
            F.cross_entropy(linear(x, head).to(exact), y, ignore_index=-1, reduction="none")
            for x, y in zip(scored.split(rows), target.split(rows))
        ]
        nll[keep] = torch.cat(parts).view(targets[keep].shape)
    return nll


LOSSES = {"mean": linear_cross_entropy, "none": linear_nll}  # by `reduction`


# ------------------------------------------------------------------------------------------------
# Rotation


def rope_frequencies(width: int, base: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """θ_i = base^(-2i/width), i = 0 … width/2-1, in radians per token: (width/2,) float64. Made on `device`: a copy from
    the host would make it wait for the GPU."""
    return base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)


def scale_frequencies(
    freqs: torch.Tensor, rule: str, factor: float, length: int, width: int, base: float
) -> tuple[torch.Tensor, float]:
    """Frequencies for a context `factor` times the training length, and what all attention logits are multiplied by.

    freqs: any shape, float64, radians per token, of a model trained at `length` tokens.
    pi    position interpolation, ω/s (Chen 2306.15595)
    ntk   NTK-aware: RoPE's base becomes base·s^(D/(D-2)), D = `width` turning channels. Of a frequency alone, that is
          ω·s^(-log ω / log ω_last) with ω_last = base^(-(D-2)/D), RoPE's slowest: the fastest stays, the slowest is
          interpolated. Trained frequencies follow the same curve, clamped at both ends.
    yarn  ω/s where a wavelength exceeds the training length, ω where 32 or more fit into it, a ramp in their number
          between; logits times (0.1 ln s + 1)² (Peng 2309.00071)
    ValueError for another rule, factor < 1, or ntk with fewer than 4 turning channels.
    """
    if not 1 <= factor < math.inf:
        raise ValueError(f"factor must be at least 1, not {factor}: it is the new context over the training length")
    if rule == "pi":
        return freqs / factor, 1.0
    if rule == "ntk":
        if width < 4 or base <= 1:
            raise ValueError(f"ntk needs at least 4 turning channels a head and a base above 1, not {width} and {base}")
        share = (freqs.clamp_min(torch.finfo(freqs.dtype).tiny).log() / (-(width - 2) / width * math.log(base))).clamp(
            0, 1
        )
        return freqs * factor**-share, 1.0
    if rule == "yarn":
        kept = ((length * freqs / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
        return freqs * (kept + (1 - kept) / factor), (0.1 * math.log(factor) + 1) ** 2
    raise ValueError(f"no frequency scaling {rule!r}{nearest(rule, SCALINGS)} There are: {', '.join(SCALINGS)}")


SCALINGS = ("pi", "ntk", "yarn")


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each channel pair (2i, 2i+1) of x by an angle: (x0 + i·x1)·(cos + i·sin).

    x (..., D); cos, sin broadcastable to (..., D/2) in max(float32, model dtype) → (..., D) in x's dtype.
    One complex product in eager mode, where it is the fastest way; real arithmetic under torch.compile,
    whose inductor has no complex code.
    """
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2))  # (..., D/2, 2)
    if torch.compiler.is_compiling():
        x0, x1 = pairs.unbind(-1)
        turned = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


# ------------------------------------------------------------------------------------------------
# Attention, and the positional schemes as its subclasses


@dataclass
class GPTConfig:
    """Shape of a model. `pos` names a scheme in SCHEMES, `pos_options` are keyword arguments of its class."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    pos: str = "rope"
    pos_options: dict = field(default_factory=dict)


@dataclass
class Context:
    """What a block's attention is told about the positions of this forward pass."""

    start: int  # position of the first token: 0, or the length of the cache
    length: int  # T
    dtype: torch.dtype  # of angles and phases: max(float32, model dtype)
    device: torch.device
    embedding: torch.Tensor | None = None  # (B, T, C) token embeddings
    constants: list | None = None  # what the scheme's `constants` made of the parameters, an item a layer
    block_mask: Any = None  # FlexAttention's causal mask, where a score bias goes through it
    shared: Any = None  # what the scheme's `prepare` made for this layer

    @property
    def positions(self) -> torch.Tensor:
        """(T,) float64 on `double_device`: exact for every length."""
        end = self.start + self.length
        return torch.arange(self.start, end, dtype=torch.float64, device=double_device(self.device))

    def of_layer(self, shared: Any) -> "Context":
        """The same for one layer, with its own item of what `prepare` made."""
        return Context(
            self.start, self.length, self.dtype, self.device, self.embedding, self.constants, self.block_mask, shared
        )

    def cos_sin(self, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of float64 angles, in the dtype and on the device of this pass."""
        return tuple(f(angles).to(device=self.device, dtype=self.dtype) for f in (torch.cos, torch.sin))


class Attention(nn.Module):
    """Causal self-attention without positions (scheme `none`: Haviv 2203.16634, Kazemnejad 2305.19466),
    and the base of every scheme.

    A new scheme is a subclass that overrides what it needs, and a line in SCHEMES. Keyword-only
    arguments of its __init__ are its `pos_options`; their annotations are checked.

    embedding    what is added to the token embeddings (learned, sinusoidal)
    projection   the Q/K/V projection (crope)
    constants    work on parameters alone, without gradient: once per forward or optimizer step (comrope's eigenproblem)
    prepare      other work for all layers, once per forward, outside compiled blocks (rope's table)
    turn         q and k, given positions and the block's normed input (rope, comrope, carope)
    score_bias   what is added to the scores (alibi)
    """

    extends = True  # whether lengths beyond block_size are possible
    position_parameters: tuple[str, ...] = ()  # own parameters without weight decay, with pos_lr_multiplier

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.pos, self.n_head, self.n_embd, self.dropout = config.pos, config.n_head, config.n_embd, config.dropout
        self.c_attn = self.projection(config)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    # ---- what a scheme may override

    @staticmethod
    def embedding(config: GPTConfig) -> nn.Module | None:
        """A module that maps positions (T,) int64 to (T, C), to be added to the token embeddings."""
        return None

    def projection(self, config: GPTConfig) -> nn.Module:
        """A module that maps (B, T, C) to (B, T, 3C): q, k, v, each as H heads of D channels."""
        return Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)

    @classmethod
    def constants(cls, layers: list["Attention"]) -> list | None:
        """An item a layer, made of parameters alone, without gradient; `prepare` finds the list as `ctx.constants`. Once per
        forward pass, or once within GPT.parameters_fixed."""
        return None

    @classmethod
    def prepare(cls, layers: list["Attention"], ctx: Context) -> list | None:
        """An item a layer, which that layer finds as `ctx.shared`; once per forward pass. A layer sees no other's item, so
        that one compiled block serves all layers."""
        return None

    def project(self, x: torch.Tensor, ctx: Context) -> torch.Tensor:
        """(B, T, C) → (B, T, 3C)."""
        return self.c_attn(x)

    def turn(self, qk: torch.Tensor, x: torch.Tensor, ctx: Context, cache: dict | None) -> torch.Tensor:
        """Turn queries qk[:, :, 0] and keys qk[:, :, 1]: (B, T, 2, H, D) → the same. x (B, T, C) is the
        block's normed input. What later tokens need of this one goes into `cache`."""
        return qk

    def score_bias(self, ctx: Context) -> Callable | None:
        """A function of index tensors (batch, head, query position, key position), elementwise, that gives
        what is added to the scores after the division by √D: FlexAttention's convention, used densely too."""
        return None

    def initial_value(self, name: str, shape: torch.Size, normal: Callable[[float], torch.Tensor]) -> torch.Tensor:
        """The initial value of a parameter of the scheme's own; normal(std) draws one, keyed by its name."""
        raise KeyError(f"{type(self).__name__} gives no initial value to its parameter {name}")

    @classmethod
    def complete_options(cls, options: dict, config: GPTConfig) -> dict:
        """Options with everything that depends on the config written out."""
        return options

    def rope_equivalent(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(c_attn weight (3C, C), c_attn bias (3C,) or None, frequencies (H, D/2) float64) of the plain rope
        layer that computes the same."""
        raise ValueError(f"{self.pos} has no equivalent as plain rope; rope, crope and comrope have")

    # ---- the same for all

    def forward(self, x: torch.Tensor, ctx: Context, cache: dict | None = None) -> torch.Tensor:
        B, T, C = x.size()
        qk, v = self.project(x, ctx).split((2 * C, C), dim=2)
        qk = self.turn(qk.unflatten(2, (2, self.n_head, self.head_width)), x, ctx, cache)
        q, k = (part.transpose(1, 2) for part in qk.unbind(2))  # (B, H, T, D)
        v = v.unflatten(2, (self.n_head, self.head_width)).transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat((cache["k"], k), 2), torch.cat((cache["v"], v), 2)
            cache["k"], cache["v"] = k, v
        y = self.attend(q, k, v, ctx)  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Causal attention: q (B, H, T, D) at positions start … start+T-1, k and v (B, H, start+T, D)."""
        bias = self.score_bias(ctx)
        dropout = self.dropout if self.training else 0.0
        # MPS has let is_causal see future tokens (pytorch #195910): there the mask is explicit
        if bias is None and ctx.start == 0 and q.device.type != "mps":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        if bias is None and ctx.length == 1:  # one new token sees every cached one
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        if bias is not None and ctx.block_mask is not None:
            return flex_attend(q, k, v, bias, ctx.block_mask)
        # Dense mask and bias for a chunk of queries at a time: at most 2^24 elements (64 MB) exist at once
        rows = max(1, 2**24 // (q.size(1) * k.size(2)))
        heads = torch.arange(q.size(1), device=q.device).view(-1, 1, 1)
        batch = torch.arange(q.size(0), device=q.device).view(-1, 1, 1, 1)
        out = []
        for i in range(0, ctx.length, rows):
            part = q[:, :, i : i + rows]
            end = ctx.start + i + part.size(2)
            m = torch.arange(ctx.start + i, end, device=q.device).view(-1, 1)  # query positions
            n = torch.arange(end, device=q.device).view(1, -1)  # key positions
            mask = n <= m
            if bias is not None:
                mask = bias(batch, heads, m, n).masked_fill(~mask, -math.inf)
                mask = mask.expand(
                    q.size(0), q.size(1), -1, -1
                )  # with all four dimensions, a CPU's fused kernel takes it
            parts = part, k[:, :, :end], v[:, :, :end]
            if bias is not None:  # autocast would round the bias, large at a distance, to bfloat16
                parts = [t.to(mask.dtype) for t in parts]
            with no_autocast(q.device):
                out.append(F.scaled_dot_product_attention(*parts, attn_mask=mask, dropout_p=dropout).to(v.dtype))
        return torch.cat(out, 2)


def flex_fits(ctx: Context, dropout: float) -> bool:
    """Whether a score bias goes through FlexAttention: it compiles for each length, and is worth it in training, where there is one."""
    return ctx.device.type == "cuda" and ctx.start == 0 and dropout == 0 and torch.is_grad_enabled()


def causal(batch, head, m, n):
    """FlexAttention's mask_mod: whether query m may see key n."""
    return n <= m


@functools.lru_cache(maxsize=8)
def causal_block_mask(length: int, device: torch.device):
    """The causal mask of FlexAttention, made outside compiled blocks and kept: building it costs more than using it."""
    import torch.nn.attention.flex_attention as flex

    return flex.create_block_mask(causal, None, None, length, length, device=device)


@functools.cache
def compiled_flex_attention():
    import torch.nn.attention.flex_attention as flex

    return torch.compile(flex.flex_attention, dynamic=False)


def flex_attend(q, k, v, bias, block_mask):
    """Causal attention with a score bias on a GPU, by FlexAttention: no (T, T) bias ever exists."""
    import torch.nn.attention.flex_attention as flex

    # Uncompiled, it would form all scores
    attend = flex.flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    return attend(q, k, v, score_mod=lambda s, b, h, m, n: s + bias(b, h, m, n), block_mask=block_mask)


class Learned(Attention):
    """`learned`: GPT-2's table of absolute positions, x_m = wte[token] + wpe[m]. Ends at block_size."""

    extends = False

    @staticmethod
    def embedding(config):
        return nn.Embedding(config.block_size, config.n_embd)


class Sinusoid(nn.Module):
    """Positions (T,) int64 → (T, C): channel 2i is sin(m / base^{2i/C}), channel 2i+1 the cosine."""

    def __init__(self, width: int, base: float, scale: float):
        super().__init__()
        self.width, self.base, self.scale = width, base, scale

    def forward(self, positions):
        device = double_device(positions.device)
        angles = torch.outer(positions.to(device).double(), rope_frequencies(self.width, self.base, device))
        table = self.scale * torch.stack((angles.sin(), angles.cos()), -1).flatten(1)  # (T, C)
        return table.to(positions.device, torch.float64 if device == positions.device else torch.float32)


class Sinusoidal(Attention):
    """`sinusoidal`: the fixed absolute sinusoids of Vaswani 1706.03762, added to the embeddings.

    Options: base; scale, the amplitude (token embeddings start with a standard deviation of 0.02).
    """

    def __init__(self, config, *, base: float = 10000.0, scale: float = 1.0):
        super().__init__(config)
        if base <= 0:
            raise ValueError(f"base must be positive, not {base}")
        if config.n_embd % 2:
            raise ValueError(f"sinusoidal pairs channels: n_embd {config.n_embd} must be even")

    @staticmethod
    def embedding(config):
        return Sinusoid(config.n_embd, config.pos_options["base"], config.pos_options["scale"])


class RoPE(Attention):
    """`rope`: Su et al. 2104.09864. Channel pair i of q and k turns by m·θ_i at position m, θ_i = base^(-2i/D).

    Options: base; fraction, the leading part of a head's channels that turns (its width replaces D in θ_i,
    as GPT-NeoX's rotary_pct does), the rest has frequency 0; explicit, to hold the frequencies as a
    buffer `freqs` (H, D/2), float64 radians per token, saved with the weights (to_rope() makes it); qkv, the Q/K/V
    projection: `dense`, or `grouped`, which has crope's number of parameters and is real (GroupedLinear): its control.
    """

    def __init__(
        self,
        config,
        *,
        base: float = 10000.0,
        fraction: float = 1.0,
        explicit: bool = False,
        qkv: Literal["dense", "grouped"] = "dense",
    ):
        super().__init__(config)
        self.base, self.fraction, self.explicit = base, fraction, explicit
        if self.head_width % 2:
            raise ValueError(
                f"{config.pos} turns channels in pairs: head width n_embd/n_head = {self.head_width} must be even"
            )
        if not 0 < fraction <= 1 or round(fraction * self.head_width) % 2 or not round(fraction * self.head_width):
            raise ValueError(
                f"fraction {fraction} must lie in (0, 1] and leave an even number of the {self.head_width} channels of a head turning"
            )
        if base <= 0:
            raise ValueError(f"base must be positive, not {base}")
        if explicit:
            self.register_buffer("freqs", self.frequencies().expand(self.n_head, -1).clone())

    def projection(self, config):
        return (
            GroupedLinear(config.n_embd, config.bias)
            if config.pos_options["qkv"] == "grouped"
            else super().projection(config)
        )

    def _apply(self, fn, recurse=True):
        """Explicit frequencies stay float64 (float32 on MPS) whatever the weights are cast to: a phase of
        16k tokens needs them."""
        if not self.explicit:
            return super()._apply(fn, recurse)
        freqs = self.freqs
        try:
            super()._apply(fn, recurse)
        except TypeError:  # the device has no float64
            self.freqs = freqs.float()
            super()._apply(fn, recurse)
        if not self.freqs.is_meta:
            self.freqs = freqs.to(
                self.freqs.device, torch.float32 if self.freqs.device.type == "mps" else torch.float64
            )
        return self

    def frequencies(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """(D/2,), or the explicit (H, D/2): float64 on `device`."""
        if hasattr(self, "freqs"):
            return self.freqs.to(device, torch.float64)
        width = round(self.fraction * self.head_width)
        return F.pad(rope_frequencies(width, self.base, device), (0, (self.head_width - width) // 2))

    @classmethod
    def prepare(cls, layers, ctx):
        """cos and sin (T, 1, 1, D/2), the same in all layers unless the frequencies are explicit."""
        return None if layers[0].explicit else [layers[0].angles(ctx)] * len(layers)

    def angles(self, ctx):
        frequencies = self.frequencies(double_device(ctx.device)).view(-1, self.head_width // 2)  # (1 or H, D/2)
        return ctx.cos_sin(ctx.positions.view(-1, 1, 1, 1) * frequencies)  # (T, 1, 1 or H, D/2) each

    def turn(self, qk, x, ctx, cache):
        return rotate(qk, *(self.angles(ctx) if self.explicit else ctx.shared))

    def rope_equivalent(self):
        return self.c_attn.weight, self.c_attn.bias, self.frequencies().expand(self.n_head, -1)


class ComplexLinear(nn.Module):
    """ỹ = (A + iB) x̃ over adjacent channel pairs: (..., C) → (..., 3C) with half the parameters of a dense layer.

    A and B are (3C/2, C/2). The equivalent dense weight, real 2×2 blocks [[a, -b], [b, a]], is assembled and used in
    one matrix product. Measured (one CPU thread, MKL, forward and backward, 4,096 tokens), this takes 0.92, 1.03 and 1.04 of
    a dense layer's time at C = 128, 384 and 768; three products with a quarter fewer multiplications (Gauss) take 1.73,
    1.05 and 0.94, for their additional passes over the activations.
    """

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.A = nn.Parameter(torch.empty(3 * width // 2, width // 2))
        self.B = nn.Parameter(torch.empty(3 * width // 2, width // 2))
        self.bias = nn.Parameter(torch.empty(3 * width)) if bias else None

    @property
    def weight(self) -> torch.Tensor:
        """The dense equivalent, (3C, C)."""
        blocks = torch.stack((self.A, -self.B, self.B, self.A), -1).unflatten(-1, (2, 2))  # (3C/2, C/2, 2, 2)
        return blocks.transpose(1, 2).reshape(2 * self.A.size(0), 2 * self.A.size(1))

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class GroupedLinear(ComplexLinear):
    """Even channels from even ones by A, odd from odd by B: (..., C) → (..., 3C), real, with ComplexLinear's parameters,
    (3C/2, C/2) each, and its initial values. The control that CRoPE's paper lacks: half of Q, K and V, but no i² = -1.

    Each half of the residual stream feeds one channel of every pair of every head, so heads mix as in a dense layer.
    Turned by 45° in each pair, this is A + jB with j² = +1: ComplexLinear's sharing of weights, scalings and
    reflections instead of scalings and rotations. Computed as one dense product, like ComplexLinear.
    """

    @property
    def weight(self) -> torch.Tensor:
        """The dense equivalent, (3C, C)."""
        none = torch.zeros_like(self.A)
        blocks = torch.stack((self.A, none, none, self.B), -1).unflatten(-1, (2, 2))  # (3C/2, C/2, 2, 2)
        return blocks.transpose(1, 2).reshape(2 * self.A.size(0), 2 * self.A.size(1))


class CRoPE(RoPE):
    """`crope`: Lou & Xu 2601.02728. RoPE whose Q, K and V projections are complex-linear over the whole width,
    with half their parameters; the output projection stays real and dense. Options: base, fraction, as rope.
    """

    def __init__(self, config, *, base: float = 10000.0, fraction: float = 1.0):
        super().__init__(config, base=base, fraction=fraction)

    def projection(self, config):
        return ComplexLinear(config.n_embd, config.bias)


def svd_of_small(M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S, Vᵀ of M (..., n, n), S ≥ 0 in no order. 1×1 and 2×2 in closed form, which unlike torch.linalg.svd never makes a
    CUDA device wait for the host; for n = 4, comrope's default block of 8, GPT.parameters_fixed keeps that to once a step."""
    if M.size(-1) > 2:
        return torch.linalg.svd(M)
    if M.size(-1) == 1:
        return torch.where(M < 0, -1.0, 1.0).to(M), M.abs()[..., 0], torch.ones_like(M)
    # M = r·rot(α) + s·rot(β)·diag(1, -1): of singular values r + s and r - s, and of rotations by half sums and differences of angles
    (a, b), (c, d) = (row.unbind(-1) for row in M.unbind(-2))
    alpha, beta = torch.atan2(c - b, a + d), torch.atan2(c + b, a - d)
    r, s = torch.hypot(a + d, c - b) / 2, torch.hypot(a - d, c + b) / 2

    def rotation(angle):
        cos, sin = angle.cos(), angle.sin()
        return torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))

    signs = torch.stack((torch.ones_like(r), torch.where(r < s, -1.0, 1.0).to(r)), -1)
    return (
        rotation((alpha + beta) / 2) * signs.unsqueeze(-2),
        torch.stack((r + s, (r - s).abs()), -1),
        rotation((alpha - beta) / 2),
    )


def skew_canonical_form(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A = Q (⊕_k ω_k [[0, -1], [1, 0]]) Qᵀ for skew-symmetric A (..., b, b), b even: Q (..., b, b) orthogonal,
    ω (..., b/2) ≥ 0, in A's dtype. No gradient.

    Householder reflections make A tridiagonal; its even and odd rows then meet only in a (b/2, b/2) matrix
    whose singular values are the frequencies (Golub & Kahan; Ward & Gray 1978). Unlike an eigenproblem of iA
    or of A², this is real arithmetic and backward stable also where frequencies coincide or vanish.
    """
    with torch.no_grad():
        b = A.size(-1)
        A = A.detach().clone()
        Q = torch.eye(b, dtype=A.dtype, device=A.device).expand_as(A).clone()
        for k in range(b - 2):
            x = A[..., k + 1 :, k]  # the column below the diagonal, to become a multiple of e_1
            norm = x.norm(dim=-1, keepdim=True)
            first = x[..., :1]
            v = torch.cat((first + torch.where(first < 0, -norm, norm), x[..., 1:]), -1)
            v = v / v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
            v = F.pad(v, (k + 1, 0)).unsqueeze(-1)  # (..., b, 1); H = I - 2 v vᵀ
            A = A - 2 * v @ (v.mT @ A)
            A = A - 2 * (A @ v) @ v.mT
            Q = Q - 2 * (Q @ v) @ v.mT
        # A maps even coordinates to odd ones by M and odd to even by -Mᵀ: M = U S Vᵀ gives A v_k = s_k u_k, A u_k = -s_k v_k
        U, omega, Vh = svd_of_small(A[..., 1::2, 0::2])
        frame = torch.stack((Q[..., 0::2] @ Vh.mT, Q[..., 1::2] @ U), -1).flatten(-2)  # columns v_0 u_0 v_1 u_1 …
        return frame, omega


class SkewGradient(torch.autograd.Function):
    """Identity on y, with the gradient of the skew generators A that the constant frame leaves out.

    y (B, T, 2, H, D) are q and k in the frame Q in which R(m) = exp(m A/unit) is plain rotation by mω. The
    caller treats Q and ω as constants; here dL/dA comes from the derivative of the matrix exponential itself,
        Qᵀ dR(m) Q = rot(mω) X(m),  X(m) = ∫_0^m rot(-sω) (Qᵀ dA Q / unit) rot(sω) ds
    (Daleckii–Krein; the outer Q drops out, since scores are invariant to an orthogonal map of both q and k). With
    g = dL/dy, dL = Σ_m <M_m, X(m)>, M_m = Σ_batch g yᵀ. Between channel pairs k and l, the part of M_m that is linear over
    the complex numbers turns by s(ω_k - ω_l), the conjugate-linear part by s(ω_k + ω_l), and the integral of a turn is
    W_m(δ) = ∫_0^m e^{isδ} ds = (2 sin(mδ/2)/δ) e^{imδ/2}, m where δ = 0: exact also where frequencies coincide or vanish.
    """

    @staticmethod
    def forward(ctx, y, A, Q, omega, unit, dtype, start):
        # y (B, T, 2, H, D); A, Q (H, D/b, b, b); omega (H, D/b, b/2) float64, radians per token
        ctx.save_for_backward(y, Q, omega)
        ctx.unit, ctx.dtype, ctx.A_dtype, ctx.start = unit, dtype, A.dtype, start
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, Q, omega = ctx.saved_tensors
        T, dtype = y.size(1), ctx.dtype
        # One product of views for each block of q and of k, 2 T H D/b of them: nothing is copied
        g_blocks, y_blocks = (
            z.to(dtype).flatten(1).unflatten(1, (-1, Q.size(-1))) for z in (g, y)
        )  # (B, 2 T H D/b, b)
        with no_autocast(g.device):  # which is still on where backward is called inside it
            M = torch.bmm(g_blocks.permute(1, 2, 0), y_blocks.transpose(0, 1))
        M = M.view(T, 2, *Q.shape).sum(1)  # (T, H, D/b, b, b)
        p, q, r, s = (
            M[..., i::2, j::2] for i in (0, 1) for j in (0, 1)
        )  # a pair's 2×2 entries, (T, H, D/b, b/2, b/2) each
        m = torch.arange(ctx.start, ctx.start + T, dtype=omega.dtype, device=omega.device).view(-1, 1, 1, 1, 1)

        def integrated(re, im, delta):
            """Σ_m (re + i im)_m W_m(δ), δ (H, D/b, b/2, b/2): its real and imaginary part."""
            turns = m * (delta / (4 * math.pi))
            half = ((turns - turns.round()) * (2 * math.pi)).to(
                re
            )  # mδ/2 without whole turns: exact in float64, cheap below
            delta, sin = delta.to(re), half.sin()
            length = torch.where(delta == 0, m.to(re), 2 * sin / delta)
            cos, sin = length * half.cos(), length * sin
            return ((re * cos - im * sin).sum(0) / 2).to(Q), ((re * sin + im * cos).sum(0) / 2).to(Q)

        rows, columns = omega.unsqueeze(-1), omega.unsqueeze(-2)
        a, b = integrated(p + s, r - q, rows - columns)
        c, d = integrated(p - s, r + q, rows + columns)
        E = (
            torch.stack((a + c, d - b, b + d, a - c), -1).unflatten(-1, (2, 2)).transpose(-3, -2).reshape(Q.shape)
        )  # blocks [[a, -b], [b, a]] + [[c, d], [d, -c]]
        return g, (Q @ E @ Q.mT / ctx.unit).to(g.device, ctx.A_dtype), None, None, None, None, None


class ComRoPE(Attention):
    """`comrope`: Yu et al., CVPR 2025, 2506.03737, on the one axis that text has: R(m) = exp((m/unit) A), A
    block-diagonal skew-symmetric and trained, per layer and head, the same for q and k.

    Every skew A is Q (⊕ ω_k J) Qᵀ, so this is RoPE with trained frequencies ω/unit in a trained orthonormal frame
    Q. The frame is folded into the Q and K projections, and the rest costs what RoPE costs.

    Options: kind `ap`, A = P - Pᵀ, or `ld`, A = θ (P - Pᵀ) with a trained multiplier θ per block and head; block,
    the block size b; init `rope`, with RoPE's frequencies (of `base`) at the start, or `gaussian`, the paper's
    P ~ N(0, 1); unit, the tokens in which the angle of a frequency 1 is one radian (default: block_size
    when the model is made; the paper's coordinates in [0, 1] are the training length).
    """

    position_parameters = ("P", "theta")

    def __init__(
        self,
        config,
        *,
        kind: Literal["ap", "ld"] = "ap",
        block: Literal[2, 4, 8] = 8,
        init: Literal["rope", "gaussian"] = "rope",
        base: float = 10000.0,
        unit: float | None = None,
    ):
        super().__init__(config)
        self.block, self.init, self.base, self.unit = block, init, base, unit
        if self.head_width % block:
            raise ValueError(f"comrope's block {block} must divide the head width n_embd/n_head = {self.head_width}")
        if base <= 0 or unit <= 0:
            raise ValueError(f"comrope's base ({base}) and unit ({unit}) must be positive")
        blocks = self.head_width // block
        self.P = nn.Parameter(torch.empty(self.n_head, blocks, block, block))
        self.theta = nn.Parameter(torch.empty(self.n_head, blocks)) if kind == "ld" else None

    @classmethod
    def complete_options(cls, options, config):
        return {**options, "unit": float(config.block_size) if options["unit"] is None else options["unit"]}

    def initial_value(self, name, shape, normal):
        if name == "theta":
            return torch.ones(shape)
        if self.init == "gaussian":
            return normal(1.0)
        frequencies = rope_frequencies(self.head_width, self.base).view(-1, self.block // 2)  # (D/b, b/2)
        P = torch.zeros(shape[1:], dtype=torch.float64)
        even = torch.arange(0, self.block, 2)
        P[:, even + 1, even] = frequencies * self.unit / 2  # A = P - Pᵀ = 2P
        P[:, even, even + 1] = -frequencies * self.unit / 2
        return P.expand(shape)

    def generators(self) -> torch.Tensor:
        """The skew-symmetric A, (H, D/b, b, b)."""
        P = self.P.to(wide(self.P.dtype))
        A = P - P.mT
        return A if self.theta is None else A * self.theta[..., None, None]

    @classmethod
    def constants(cls, layers):
        """Frames and frequencies of all layers by one batched decomposition: a layer's are Q (H, D/b, b, b) and
        ω (H, D/b, b/2) in float64 radians per token."""
        device = layers[0].P.device
        with torch.no_grad(), no_autocast(device):
            A = torch.stack([layer.generators() for layer in layers])  # (L, H, D/b, b, b)
            Q, omega = skew_canonical_form(A.to(double_device(device), torch.float64))
            return [(Q_l, omega_l / layer.unit) for layer, Q_l, omega_l in zip(layers, Q, omega)]

    @classmethod
    def prepare(cls, layers, ctx):
        return ctx.constants

    def fold(self, Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """c_attn's weight (3C, C) and bias with q and k in the frame: Qᵀ W_q, Qᵀ W_k."""
        C, H, b = self.n_embd, self.n_head, self.block

        def turned(w):  # (3C, …)
            qk, v = w.split((2 * C, C))
            qk = Q.mT.to(w) @ qk.reshape(2, H, C // H // b, b, -1)
            return torch.cat((qk.reshape(2 * C, *w.shape[1:]), v))

        bias = self.c_attn.bias
        return turned(self.c_attn.weight), None if bias is None else turned(bias)

    def project(self, x, ctx):
        Q, _ = ctx.shared
        with no_autocast(x.device):
            weight, bias = self.fold(Q)
        return linear(x, weight, bias)

    def turn(self, qk, x, ctx, cache):
        Q, omega = ctx.shared
        if torch.is_grad_enabled() and self.P.requires_grad:
            with no_autocast(x.device):
                A = self.generators()
            qk = SkewGradient.apply(qk, A, Q, omega, self.unit, ctx.dtype, ctx.start)
        frequencies = omega.flatten(1)  # (H, D/2)
        return rotate(qk, *ctx.cos_sin(ctx.positions.view(-1, 1, 1, 1) * frequencies))

    @torch.no_grad()
    def rope_equivalent(self):
        Q, omega = skew_canonical_form(self.generators().to(double_device(self.P.device), torch.float64))
        return *self.fold(Q), omega.flatten(1) / self.unit


def path_phases(log_f: torch.Tensor, pairs: int) -> torch.Tensor:
    """φ_i(m) = Σ_{t ≤ m} f_t^i, i = 0 … pairs-1: log_f (B, T, H) → (B, T, H, pairs)."""
    i = torch.arange(pairs, dtype=log_f.dtype, device=log_f.device)
    return (log_f.unsqueeze(-1) * i).exp().cumsum(1)


class PathRotation(torch.autograd.Function):
    """Turn qk (B, T, 2, H, D) by the phases of log_f (B, T, H). Backward computes the phases again from log_f, and takes their
    gradient from the turned q and k, which attention keeps anyway: with y = x e^{iφ} and g = dL/dy, dL/dφ = Im(conj(y) g).
    Kept instead, phases, cosines, sines and q, k in float32 made carope's activations 1.6 times rope's; and this is faster."""

    @staticmethod
    def forward(ctx, qk, log_f):
        phases = path_phases(log_f, qk.size(-1) // 2).unsqueeze(2)  # (B, T, 1, H, D/2)
        y = rotate(qk, phases.cos(), phases.sin())
        ctx.save_for_backward(y, log_f)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, log_f = ctx.saved_tensors
        phases = path_phases(log_f, y.size(-1) // 2).unsqueeze(2)
        grad_qk = rotate(g, phases.cos(), -phases.sin())
        (y0, y1), (g0, g1) = (
            z.to(log_f.dtype).unflatten(-1, (-1, 2)).unbind(-1) for z in (y, g)
        )  # (B, T, 2, H, D/2) each
        grad_phases = (g1 * y0 - g0 * y1).sum(2)  # (B, T, H, D/2)
        after = grad_phases.flip(1).cumsum(1).flip(1)  # Σ_{m ≥ t}: f_t is in the phase of every later token
        i = torch.arange(after.size(-1), dtype=log_f.dtype, device=log_f.device)
        return grad_qk, (after * (log_f.unsqueeze(-1) * i).exp() * i).sum(-1)


class CARoPE(Attention):
    """`carope`: Veisi et al. 2507.23083. Pair i of head h turns by the phase φ_i(m) = Σ_{t ≤ m} f(x_t)_h^i with
    f(x) = 1/(1 + softplus(x W + b)), i = 0 … D/2-1: path sums of bounded, content-dependent frequencies.

    W starts at 0 and b where f = base^(-2/D), so that step 0 is exactly rope. Options: base; source of x_t,
    `hidden` (the block's layer-normed input, as in the same authors' earlier code) or `embedding`; init `rope`, or
    `paper`, without a bias: f starts at 0.59; content false leaves W out (W = 0 for good), the control that the paper lacks:
    one trained constant f a head, which is RoPE with a trained base a head.
    """

    position_parameters = ("c_pos.bias",)

    def __init__(
        self,
        config,
        *,
        base: float = 10000.0,
        source: Literal["hidden", "embedding"] = "hidden",
        init: Literal["rope", "paper"] = "rope",
        content: bool = True,
    ):
        super().__init__(config)
        self.source = source
        if self.head_width % 2:
            raise ValueError(
                f"carope turns channels in pairs: head width n_embd/n_head = {self.head_width} must be even"
            )
        if base <= 1:
            raise ValueError(f"carope's base must exceed 1, not {base}: f = base^(-2/D) lies below 1")
        self.base = base
        self.c_pos = Linear(config.n_embd, config.n_head, bias=init == "rope")
        if not content:
            if init == "paper":
                raise ValueError(
                    "carope's content false trains the bias alone, which init paper does not have: take init rope"
                )
            self.c_pos.weight = None

    def initial_value(self, name, shape, normal):
        if name == "c_pos.weight":
            return torch.zeros(shape)
        softplus = self.base ** (2 / self.head_width) - 1  # of b, so that f = base^(-2/D)
        return torch.full(shape, softplus + math.log(-math.expm1(-softplus)), dtype=torch.float64)

    def log_frequencies(self, x: torch.Tensor) -> torch.Tensor:
        """log f (B, T, H) in max(float32, model dtype) of the source x (B, T, C)."""
        with no_autocast(x.device):
            W, bias = self.c_pos.weight, self.c_pos.bias
            dtype = wide(next(self.c_pos.parameters()).dtype)
            bias = None if bias is None else bias.to(dtype)
            z = bias.expand(*x.shape[:2], -1) if W is None else F.linear(x.to(dtype), W.to(dtype), bias)
            return -torch.log1p(F.softplus(z))

    def turn(self, qk, x, ctx, cache):
        log_f = self.log_frequencies(x if self.source == "hidden" else ctx.embedding)
        if cache is None:
            return PathRotation.apply(qk, log_f)
        phases = path_phases(log_f, self.head_width // 2) + cache.get("phase", 0.0)
        cache["phase"] = phases[:, -1:]
        phases = phases.unsqueeze(2)  # (B, T, 1, H, D/2)
        return rotate(qk, phases.cos(), phases.sin())


class ALiBi(Attention):
    """`alibi`: Press et al. 2108.12409. slope_h · (n - m) is added to the score of query m and key n, after the division
    by √D; slopes 2^(-8h/H), h = 1 … H, or the paper's interpolation where H is not a power of 2."""

    def slopes(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """(H,) float64."""
        power = 2 ** int(math.log2(self.n_head))
        h = torch.arange(1, self.n_head + 1, dtype=torch.float64, device=device)
        return 2.0 ** (
            -8 / power * torch.where(h <= power, h, h - power - 0.5)
        )  # beyond the power of 2: halfway between, ½, 3/2 …

    @classmethod
    def prepare(cls, layers, ctx):
        return [layers[0].slopes(double_device(ctx.device)).to(ctx.device, ctx.dtype)] * len(layers)

    def score_bias(self, ctx):
        slopes = ctx.shared
        return lambda batch, head, m, n: slopes[head] * (n - m)


SCHEMES: dict[str, type[Attention]] = {
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "none": Attention,
    "rope": RoPE,
    "crope": CRoPE,
    "comrope": ComRoPE,
    "carope": CARoPE,
    "alibi": ALiBi,
}


# ------------------------------------------------------------------------------------------------
# Checks of a config: every problem is a ValueError that says what is valid


def nearest(word: str, valid) -> str:
    """'; did you mean …?' where something valid is close to the word."""
    close = difflib.get_close_matches(str(word), list(valid), 1)
    return f"; did you mean {close[0]}?" if close else ""


def option_fits(value, annotation) -> bool:
    """Whether an option's value has the type that the scheme's signature announces."""
    if get_origin(annotation) is Literal:
        return any(value == valid and type(value) is type(valid) for valid in get_args(annotation))
    if get_args(annotation):  # X | None
        return any(option_fits(value, part) for part in get_args(annotation))
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is annotation


def resolve(config: GPTConfig) -> GPTConfig:
    """The config with every option of its scheme written out. Raises ValueError for what cannot be built."""
    problems = []
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            problems.append(f"{name} must be a positive whole number, not {value!r}")
    if type(config.dropout) not in (int, float) or not 0 <= config.dropout < 1:
        problems.append(f"dropout must lie in [0, 1), not {config.dropout!r}")
    if type(config.bias) is not bool:
        problems.append(f"bias must be True or False, not {config.bias!r}")
    if not isinstance(config.pos_options, dict):
        problems.append(f"pos_options must be a mapping of option to value, not {config.pos_options!r}")
    if not problems and config.n_embd % config.n_head:
        problems.append(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}")
    if not isinstance(config.pos, str) or config.pos not in SCHEMES:
        problems.append(
            f"pos {config.pos!r} is no scheme{nearest(config.pos, SCHEMES)} (schemes: {', '.join(SCHEMES)})"
        )
        raise ValueError("; ".join(problems))
    scheme = SCHEMES[config.pos]
    parameters = inspect.signature(scheme.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    types = get_type_hints(scheme.__init__)
    for name, value in config.pos_options.items() if isinstance(config.pos_options, dict) else ():
        valid = f"{config.pos} takes {', '.join(defaults) or 'no options'}"
        if name not in defaults:
            problems.append(f"pos_options: unknown option {name!r}{nearest(name, defaults)} ({valid})")
        elif not option_fits(value, types[name]):
            expected = (
                get_args(types[name])
                if get_origin(types[name]) is Literal
                else getattr(types[name], "__name__", types[name])
            )
            problems.append(f"pos_options: {name} of {config.pos} cannot be {value!r}; expected {expected}")
    if problems:
        raise ValueError("; ".join(problems))
    options = scheme.complete_options({**defaults, **config.pos_options}, config)
    return dataclasses.replace(config, pos_options=options)


# ------------------------------------------------------------------------------------------------
# The model


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, eps 1e-5 as GPT-2."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = SCHEMES[config.pos](config, **config.pos_options)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x, ctx, cache=None):
        x = x + self.attn(self.ln_1(x), ctx, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (pre-norm, tanh GELU, tied embeddings) with the positional scheme `config.pos`.

    Parameters that two schemes share have equal initial values for equal seeds: each is drawn from a generator
    of its own, keyed by (seed, parameter name). `self.config` is the config with all options written out.
    Raises ValueError, listing every problem, for a config that cannot be built.
    """

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        self.config = config = resolve(config)
        with torch.random.fork_rng(devices=[]):  # the layers' own initial values are replaced below
            self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd)})
            positions = SCHEMES[config.pos].embedding(config)
            if positions is not None:
                self.transformer["wpe"] = positions
            self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.transformer["ln_f"] = LayerNorm(config.n_embd, config.bias)
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        self.losses = dict(LOSSES)
        self.fixed = None  # the scheme's constants, within parameters_fixed
        self.initialise(seed)

    def __getstate__(self):
        """What copies and pickles have: neither compiled code, which nn.Module leaves out of the blocks' too, nor fixed constants."""
        return super().__getstate__() | {"losses": dict(LOSSES), "fixed": None}

    # ---- parameters

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """GPT-2's initial values: N(0, 0.02), projections into the residual stream scaled by 1/√(2L), LayerNorm 1,
        biases 0; a scheme's own parameters as the scheme says."""
        for name, parameter in self.named_parameters():

            def normal(std, name=name, shape=parameter.shape):
                key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
                return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)

            parent, _, last = name.rpartition(".")
            if isinstance(self.get_submodule(parent), LayerNorm):
                value = torch.full(parameter.shape, float(last == "weight"))
            elif parent.endswith("c_proj") and last == "weight":
                value = normal(0.02 / math.sqrt(2 * self.config.n_layer))
            elif parent.rpartition(".")[2] in ("wte", "wpe", "c_attn", "c_proj", "c_fc"):
                value = torch.zeros(parameter.shape) if last == "bias" else normal(0.02)
            else:  # transformer.h.{i}.attn.{the scheme's own}
                i, own = name.removeprefix("transformer.h.").split(".attn.")
                value = self.transformer["h"][int(i)].attn.initial_value(own, parameter.shape, normal)
            parameter.copy_(value)

    def position_parameters(self) -> set[str]:
        """Names of the scheme's own parameters that take no weight decay and the multiplied learning rate."""
        own = SCHEMES[self.config.pos].position_parameters
        names = {f"transformer.h.{i}.attn.{name}" for i in range(self.config.n_layer) for name in own}
        return names & {name for name, _ in self.named_parameters()}

    def parameter_count(self) -> int:
        """All parameters, the tied embedding once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs of a token at length block_size: 6 per parameter of a matrix product and 12·L·C·T
        for attention (PaLM 2204.02311, appendix B, without its causal halving)."""
        c = self.config
        n = c.n_layer * 12 * c.n_embd**2 + c.vocab_size * c.n_embd
        return 6 * n + 12 * c.n_layer * c.n_embd * c.block_size

    # ---- forward

    def hidden(self, idx: torch.Tensor, caches: list[dict] | None = None) -> torch.Tensor:
        """Final hidden states (B, T, C) of tokens idx (B, T), which follow those in `caches` (a dict a layer)."""
        scheme = SCHEMES[self.config.pos]
        if idx.dim() != 2:
            raise ValueError(f"idx must be (B, T), not of shape {tuple(idx.shape)}")
        start = caches[0]["k"].size(2) if caches and "k" in caches[0] else 0
        self.check_length(start + idx.size(1))
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_tokens(idx, 0, "idx")
        embedding = self.transformer["wte"](idx)  # (B, T, C)
        blocks, none = self.transformer["h"], [None] * self.config.n_layer
        layers = [block.attn for block in blocks]
        constants = scheme.constants(layers) if self.fixed is None else self.fixed
        ctx = Context(start, idx.size(1), wide(embedding.dtype), idx.device, embedding, constants)
        if scheme.score_bias is not Attention.score_bias and flex_fits(
            ctx, self.config.dropout if self.training else 0.0
        ):
            ctx.block_mask = causal_block_mask(ctx.length, ctx.device)
        x = embedding
        if "wpe" in self.transformer:
            positions = torch.arange(start, start + idx.size(1), device=idx.device)
            x = x + self.transformer["wpe"](positions).to(x.dtype)  # (T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block, shared, cache in zip(blocks, scheme.prepare(layers, ctx) or none, caches or none):
            x = block(x, ctx.of_layer(shared), cache)
        return self.transformer["ln_f"](x)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, reduction: Literal["mean", "none"] = "mean"
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """idx (B, T) int64 → (logits (B, T, V), None); with targets (B, T), -1 ignored, (None, loss).

        The loss is the mean cross-entropy, a scalar, or with reduction="none" that of each target, (B, T),
        without gradient; float32 or the model's dtype if wider. T may exceed block_size where the scheme can;
        otherwise, and for ids outside the vocabulary (checked on the CPU), ValueError.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', not {reduction!r}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets must have the shape of idx, {tuple(idx.shape)}, not {tuple(targets.shape)}")
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_tokens(targets, -1, "targets")
        return None, self.losses[reduction](x, self.lm_head.weight, targets)

    @contextlib.contextmanager
    def parameters_fixed(self):
        """Within `with model.parameters_fixed():` the parameters do not change, as over the micro-batches of an optimizer
        step: what depends on them alone and takes no gradient (comrope's frames and frequencies) is computed once, at the
        entry. Values and gradients are those without it, bit for bit. Nothing is kept beyond it, or found by itself: an
        optimizer's update need not show in a parameter's version."""
        before = self.fixed
        self.fixed = SCHEMES[self.config.pos].constants([block.attn for block in self.transformer["h"]])
        try:
            yield
        finally:
            self.fixed = before

    def compile_parts(self, **options) -> None:
        """torch.compile in place, by parts: each block, with one graph for all layers, and the loss. `options` are those of
        torch.compile; shapes are static, and a graph break is an error. The names in the state dict stay.

        Under DistributedDataParallel a block's gradients are there when its own backward ends, so that their reduction
        overlaps with the backward of the blocks before it; one graph of the whole model has them all at its end.
        """
        import torch._dynamo

        # A block is the grain that overlaps: without this, dynamo cuts its graph again at the sizes of DDP's buckets
        torch._dynamo.config.optimize_ddp = False
        options = {"fullgraph": True, "dynamic": False, **options}
        for block in self.transformer["h"]:
            block.compile(**options)
        self.losses = {reduction: torch.compile(loss, **options) for reduction, loss in self.losses.items()}

    def check_length(self, length: int) -> None:
        """ValueError where the scheme cannot go to this length."""
        c = self.config
        if length > c.block_size and not SCHEMES[c.pos].extends:
            raise ValueError(
                f"{c.pos} positions end at block_size {c.block_size}: a length of {length} is not possible"
            )

    def check_tokens(self, ids: torch.Tensor, lowest: int, what: str) -> None:
        if ids.numel() and not (lowest <= ids.min() and ids.max() < self.config.vocab_size):
            raise ValueError(
                f"{what} holds ids {ids.min()} … {ids.max()}, outside {lowest} … vocab_size-1 = {self.config.vocab_size - 1}"
            )

    @torch.no_grad()
    def generate(
        self,
        idx: torch.Tensor,
        n: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Append n sampled tokens: idx (B, T) int64, T ≥ 1 → (B, T + n). Temperature 0 is greedy; top_k keeps the
        k likeliest. Cached: each token is computed once. ValueError where the scheme cannot reach T + n - 1."""
        if idx.size(1) < 1 or n < 0 or not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                f"generate needs a prompt of ≥ 1 tokens, n ≥ 0, temperature ≥ 0, top_k ≥ 1; got {idx.size(1)}, {n}, {temperature}, {top_k}"
            )
        self.check_length(idx.size(1) + n - 1)
        caches, new, training = [{} for _ in self.transformer["h"]], idx, self.training
        self.eval()
        try:
            for _ in range(n):
                logits = self.lm_head(self.hidden(new, caches)[:, -1]).float()  # (B, V)
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                if temperature == 0:
                    new = logits.argmax(1, keepdim=True)
                else:
                    new = torch.multinomial(torch.softmax(logits / temperature, 1), 1, generator=generator)
                idx = torch.cat((idx, new), 1)
        finally:
            self.train(training)
        return idx

    # ---- other forms of the same model

    @torch.no_grad()
    def to_rope(self) -> "GPT":
        """The equivalent model that is plain `rope`, with explicit frequencies and dense weights. For rope, crope
        and comrope; other schemes have none: ValueError."""
        layers = [block.attn.rope_equivalent() for block in self.transformer["h"]]
        config = dataclasses.replace(self.config, pos="rope", pos_options={"explicit": True})
        state = {k: v for k, v in self.state_dict().items() if ".attn." not in k or ".c_proj." in k}
        for i, (weight, bias, freqs) in enumerate(layers):
            prefix = f"transformer.h.{i}.attn."
            state |= {prefix + "c_attn.weight": weight, prefix + "freqs": freqs}
            if bias is not None:
                state[prefix + "c_attn.bias"] = bias
        weight = self.lm_head.weight
        model = GPT(config).to(weight.device, weight.dtype)
        model.load_state_dict(state)
        return model.train(self.training)

    @torch.no_grad()
    def scaled(self, rule: str, factor: float) -> "GPT":
        """The plain rope model with explicit frequencies whose frequencies are scaled by `rule` (see scale_frequencies) for
        contexts of factor × block_size: evaluation beyond the training length. ValueError where to_rope() has none."""
        model, c = self.to_rope(), self.config
        width, base = (
            round(c.pos_options.get("fraction", 1.0) * c.n_embd / c.n_head),
            c.pos_options.get("base", 10000.0),
        )
        for block in model.transformer["h"]:
            freqs, logits = scale_frequencies(block.attn.frequencies(), rule, factor, c.block_size, width, base)
            block.attn.freqs.copy_(freqs)
            for parameter in block.attn.c_attn.parameters():  # the model's own copy: q carries the factor of the logits
                parameter[: c.n_embd] *= logits
        return model

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "GPT":
        """GPT-2 in the transformers layout (config.json and safetensors): a local folder, or a name on the
        Hugging Face hub such as "gpt2". A `learned` model with biases. Raises ValueError for another architecture,
        OSError where nothing is found."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            try:
                folder = Path(
                    snapshot_download(
                        str(name), allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"]
                    )
                )
            except Exception as error:
                raise OSError(f"{name} is no local folder, and the hub did not give it: {error}") from error
        if not (folder / "config.json").is_file():
            raise OSError(
                f"{folder} holds no config.json: expected a GPT-2 folder as transformers' save_pretrained writes it"
            )
        c = json.loads((folder / "config.json").read_text())
        expected = {
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        }
        expected |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "n_inner": None}
        for key, value in expected.items():
            if c.get(key, value) != value and not (key == "n_inner" and c[key] == 4 * c.get("n_embd", 0)):
                raise ValueError(f"{folder}: {key} is {c[key]!r}; GPT-2 as built here has {value!r}")
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise OSError(f"{folder} holds no .safetensors file; save the model with safe_serialization=True")
        try:
            theirs = {k.removeprefix("transformer."): v for file in files for k, v in load_file(file).items()}
        except SafetensorError as error:
            raise ValueError(f"{folder}: the weights are damaged: {error}") from error
        if missing := {"n_positions", "vocab_size", "n_layer", "n_head", "n_embd"} - c.keys():
            raise ValueError(f"{folder}/config.json lacks {', '.join(sorted(missing))}")
        model = cls(
            GPTConfig(c["n_positions"], c["vocab_size"], c["n_layer"], c["n_head"], c["n_embd"], 0.0, True, "learned")
        )
        state = {}
        for key, ours in model.state_dict().items():
            source = "wte.weight" if key == "lm_head.weight" else key.removeprefix("transformer.")
            if source not in theirs:
                raise ValueError(f"{folder}: the weights lack {source}")
            value = theirs[source]
            if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                value = value.t()  # transformers' Conv1D holds (in, out)
            if value.shape != ours.shape:
                raise ValueError(f"{folder}: {source} has shape {tuple(value.shape)}, expected {tuple(ours.shape)}")
            state[key] = value
        model.load_state_dict(state)
        return model
