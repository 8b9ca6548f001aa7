"""Su et al. 2104.09864: channel pair i of q and k turns by m·θ_i at position m, θ_i = base^(-2i/D)."""

import math
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanope.ops import double_device, linear, rope_frequencies, rotate
from schemes.base import Scheme


class GroupedLinear(nn.Module):
    """Even channels from even ones by A, odd from odd by B: (..., C) → (..., 3C), A and B (3C/2, C/2).

    The control that CRoPE's paper lacks: its number of parameters, half of a dense Q, K and V, but no i² = -1. Each
    half of the residual stream feeds one channel of every pair of every head, so heads mix as in a dense layer. Turned
    by 45° in each pair, this is A + jB with j² = +1: CRoPE's sharing of weights, with scalings and reflections instead
    of scalings and rotations. Computed as one dense product.
    """

    initial_std = 0.02 * math.sqrt(2)  # of half as many inputs: q, k, v and scores start as large as a dense layer's

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.A = nn.Parameter(torch.empty(3 * width // 2, width // 2))
        self.B = nn.Parameter(torch.empty(3 * width // 2, width // 2))
        self.bias = nn.Parameter(torch.empty(3 * width)) if bias else None

    @property
    def weight(self) -> torch.Tensor:
        """The dense equivalent, (3C, C)."""
        none = torch.zeros_like(self.A)
        return self.interleaved(self.A, none, none, self.B)

    def interleaved(self, a, b, c, d) -> torch.Tensor:
        """The dense weight (3C, C) of 2×2 blocks [[a, b], [c, d]], (3C/2, C/2) each."""
        blocks = torch.stack((a, b, c, d), -1).unflatten(-1, (2, 2))  # (3C/2, C/2, 2, 2)
        return blocks.transpose(1, 2).reshape(2 * self.A.size(0), 2 * self.A.size(1))

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class LowRankLinear(nn.Module):
    """(..., C) → (..., 3C) of rank r = 3C/8: up (3C, r), down (r, C). Half of the parameters of a dense Q, K and V.

    A control of another structure: all heads share r directions of the residual stream.
    """

    def __init__(self, width: int, bias: bool):
        super().__init__()
        rank = 3 * width // 8
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.empty(3 * width, rank))
        self.bias = nn.Parameter(torch.empty(3 * width)) if bias else None
        self.initial_std = (0.02**2 / rank) ** 0.25  # so that up @ down has 0.02, as a dense weight

    @property
    def weight(self) -> torch.Tensor:
        """The dense equivalent, (3C, C)."""
        return self.up @ self.down

    def forward(self, x):
        return linear(linear(x, self.down), self.up, self.bias)


# ---- rope

PROJECTIONS = {"grouped": GroupedLinear, "low-rank": LowRankLinear}
CAROPE_BASE = "(1+ln2)^(D/2)"


class RoPE(Scheme):
    """`rope`. Options:

    base, fraction: the leading part of a head's channels that turns. Its width replaces D in θ_i, as GPT-NeoX's
    rotary_pct does; the rest has frequency 0. The base `(1+ln2)^(D/2)` is the number that makes θ_1 = 1/(1+ln2) =
    0.59, where carope stands with W = 0 and no bias: 4,562 for 32 channels, 2.1e7 for 64. explicit: the frequencies are
    a buffer `freqs` (H, D/2), float64 radians per token, saved with the weights (to_rope() makes it). qkv: the Q/K/V
    projection, `dense`, or one with crope's number of parameters that is real: `grouped` or `low-rank`.

    Parameters: none.
    Beyond block_size: yes, by construction; slow pairs come to phases that training has not seen.
    Cache: nothing of its own.
    Cost: 6·C FLOPs a token to turn q and k; a table of cos and sin (T, D/2), once a pass for all layers.
    """

    def __init__(
        self,
        config,
        layer,
        *,
        base: float | Literal["(1+ln2)^(D/2)"] = 10000.0,
        fraction: float = 1.0,
        explicit: bool = False,
        qkv: Literal["dense", "grouped", "low-rank"] = "dense",
    ):
        super().__init__(config, layer)
        self.base, self.fraction, self.explicit, self.qkv = base, fraction, explicit, qkv
        width = self.head_width
        if width % 2:
            raise ValueError(
                f"{self.name} turns channels in pairs: head width n_embd/n_head = {self.head_width} must be even"
            )
        if not 0 < fraction <= 1 or round(fraction * width) % 2 or not round(fraction * width):
            raise ValueError(
                f"fraction {fraction} must lie in (0, 1] and "
                f"leave an even number of the {width} channels of a head turning"
            )
        if base <= 0:
            raise ValueError(f"base must be positive, not {base}")
        if qkv == "low-rank" and config.n_embd % 8:
            raise ValueError(f"rope's qkv low-rank has rank 3/8 of n_embd {config.n_embd}, which 8 must divide")
        if explicit:
            self.register_buffer("freqs", self.frequencies().expand(self.n_head, -1).clone())

    @classmethod
    def complete_options(cls, options, config):
        if options.get("base") != CAROPE_BASE:
            return options
        width = round(options.get("fraction", 1.0) * (config.n_embd // config.n_head))
        return {**options, "base": (1 + math.log(2)) ** (width / 2)}

    def claims(self, hook):
        if hook == "projection" and type(self).projection is RoPE.projection:
            return self.qkv != "dense"
        return super().claims(hook)

    def projection(self, config):
        if self.qkv == "dense":
            return super().projection(config)
        return PROJECTIONS[self.qkv](config.n_embd, config.bias)

    def _apply(self, fn, recurse=True):
        """Explicit frequencies stay float64 (float32 on MPS) whatever the weights are cast to: a phase of 16k tokens
        needs them."""
        if not self.explicit:
            return super()._apply(fn, recurse)
        freqs = self.freqs
        try:
            super()._apply(fn, recurse)
        except TypeError:  # the device has no float64
            self.freqs = freqs.float()
            super()._apply(fn, recurse)
        if not self.freqs.is_meta:
            mps = self.freqs.device.type == "mps"
            self.freqs = freqs.to(self.freqs.device, torch.float32 if mps else torch.float64)
        return self

    def frequencies(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """(D/2,), or the explicit (H, D/2): float64 on `device`, radians per token."""
        if hasattr(self, "freqs"):
            return self.freqs.to(device, torch.float64)
        width = round(self.fraction * self.head_width)
        return F.pad(rope_frequencies(width, self.base, device), (0, (self.head_width - width) // 2))

    @classmethod
    def prepare(cls, layers, ctx):
        """cos and sin (T, 1, 1, D/2), (B, T, 1, 1, D/2) where documents restart; the same in all layers. Of explicit
        frequencies, those of each layer: (T, 1, H, D/2) or (B, T, 1, H, D/2)."""
        return [layer.angles(ctx) for layer in layers] if layers[0].explicit else [layers[0].angles(ctx)] * len(layers)

    def angles(self, ctx):
        frequencies = self.frequencies(double_device(ctx.device)).view(-1, self.head_width // 2)  # (1 or H, D/2)
        return ctx.cos_sin(ctx.positions[..., None, None, None] * frequencies)  # (T or B, T, 1, 1 or H, D/2) each

    def encode(self, qk, x, ctx):
        return rotate(qk, *ctx.prepared)

    def as_rope(self, c_attn):
        return c_attn.weight, c_attn.bias, self.frequencies().expand(self.n_head, -1)
