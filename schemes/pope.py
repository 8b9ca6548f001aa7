"""Gopalakrishnan et al. 2509.10534, PoPE: channel c is a complex number whose magnitude softplus is the content and
whose phase m·θ_c the position: score Σ_c softplus(q_c) softplus(k_c) cos((n - m) θ_c + δ_c), θ_c = base^(-c/D),
c = 0 … D-1."""

import math
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanope.ops import double_device, no_autocast, rope_frequencies
from schemes.base import Scheme


class Polar(torch.autograd.Function):
    """softplus(qk) (cos + i sin)(phase) of qk (B, T, 2, H, D): (B, T, 2, H, 2D), real part by imaginary part.

    cos, sin (T or B, T, 1, 1, D) are of the positions; keys turn by delta (H, D) more. Backward keeps qk, of which v
    is a part, and the result, which attention keeps; autograd would keep 6 tensors of the width of q and k more.
    """

    @staticmethod
    def table(delta, cos, sin):
        """cos and sin of queries and of keys: (T or B, T, 2, H, D)."""
        c, s = delta.cos(), delta.sin()
        keys = torch.cat((cos * c - sin * s, sin * c + cos * s), -3)  # by the sum of angles
        cos, sin = (z.expand(*z.shape[:-2], *delta.shape) for z in (cos, sin))
        return torch.cat((cos, keys[..., :1, :, :]), -3), torch.cat((sin, keys[..., 1:, :, :]), -3)

    @staticmethod
    def forward(ctx, qk, delta, cos, sin):
        ctx.save_for_backward(qk, delta, cos, sin)
        magnitude = F.softplus(qk.to(cos.dtype))
        c, s = Polar.table(delta, cos, sin)
        return torch.stack((magnitude * c, magnitude * s), -1).flatten(-2).to(qk.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        qk, delta, cos, sin = ctx.saved_tensors
        x, (g0, g1) = qk.to(cos.dtype), g.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, 2, H, D) each
        c, s = Polar.table(delta, cos, sin)
        grad_qk = (g0 * c + g1 * s) * x.sigmoid()
        across = g1[:, :, 1] * c[..., 1, :, :] - g0[:, :, 1] * s[..., 1, :, :]  # of keys, (B, T, H, D)
        return grad_qk.to(qk.dtype), (across * F.softplus(x[:, :, 1])).sum((0, 1)), None, None


class PoPE(Scheme):
    """`pope`. Options: base. start of δ: `zero`, or `uniform` in [-2π, 0].

    δ counts as clamped to [-2π, 0], as in the paper. Beyond that range its gradient is 0, so a δ that has left it stays
    at that end, but for Adam's momentum. At 0, where it starts, it has the gradient from within.

    Parameters: delta (H, D), 0 or uniform in [-2π, 0]. Not decayed: delta.
    Beyond block_size: yes, by construction.
    Cache: none of its own; k is twice as wide.
    Cost: 9·C FLOPs a token, and q·k is twice as wide: 2·T·C FLOPs a token more; v is padded to the same width. No
        bias, so flash attention stays.
    """

    wider = "score"
    undecayed = ("delta",)
    sole = ("encode",)  # another would turn magnitudes, or the pairs of this one

    def __init__(self, config, layer, *, base: float = 10000.0, start: Literal["zero", "uniform"] = "zero"):
        super().__init__(config, layer)
        if base <= 0:
            raise ValueError(f"pope's base must be positive, not {base}")
        self.base, self.start = base, start
        self.delta = nn.Parameter(torch.empty(self.n_head, self.head_width))

    def initial(self, name, shape, normal):
        if self.start == "zero":
            return torch.zeros(shape)
        return -2 * math.pi * torch.special.ndtr(normal(1.0))  # the normal distribution's own function makes it uniform

    @classmethod
    def prepare(cls, layers, ctx):
        """cos and sin (T or B, T, 1, 1, D) of the positions."""
        frequencies = rope_frequencies(2 * layers[0].head_width, layers[0].base, double_device(ctx.device))
        return [ctx.cos_sin(ctx.positions[..., None, None, None] * frequencies)] * len(layers)

    def encode(self, qk, x, ctx):
        with no_autocast(qk.device):
            return Polar.apply(qk, self.delta.to(ctx.dtype).clamp(-2 * math.pi, 0), *ctx.prepared)
