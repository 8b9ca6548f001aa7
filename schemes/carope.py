"""Veisi et al. 2507.23083: pair i of head h turns by the phase φ_i(m) = Σ_{t ≤ m} f(x_t)_h^i, i = 0 … D/2-1,
f(x) = 1/(1 + softplus(x W + b)): path sums of bounded, content-dependent frequencies."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanope.ops import Linear, no_autocast, phase_gradient, rotate, running_sums, wide
from schemes.base import Scheme

TURN = 2 * math.pi


def powers(log_f: torch.Tensor, pairs: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """f^i and i, i = first … first+pairs-1: log_f (B, T, H) → (B, T, H, pairs), (pairs,)."""
    i = torch.arange(first, first + pairs, dtype=log_f.dtype, device=log_f.device)
    return (log_f.unsqueeze(-1) * i).exp(), i


def path_phases(log_f: torch.Tensor, pairs: int, first: int = 0) -> torch.Tensor:
    """φ_i(m) = Σ_{t ≤ m} f_t^i up to whole turns, i = first … first+pairs-1: log_f (B, T, H) → (B, T, H, pairs)."""
    return running_sums(powers(log_f, pairs, first)[0], TURN)


class PathRotation(torch.autograd.Function):
    """Turn qk (B, T, 2, H, D) by the phases of log_f (B, T, H), whose powers start at `first`.

    Backward computes the phases again from log_f, and takes their gradient from the turned q and k, which attention
    keeps anyway. Kept instead, phases, cosines, sines and q, k in float32 made carope's activations 1.6 times rope's.
    This is faster too.
    """

    @staticmethod
    def forward(ctx, qk, log_f, first=0):
        phases = path_phases(log_f, qk.size(-1) // 2, first).unsqueeze(2)  # (B, T, 1, H, D/2)
        y = rotate(qk, phases.cos(), phases.sin())
        ctx.save_for_backward(y, log_f)
        ctx.first = first
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, log_f = ctx.saved_tensors
        f_i, i = powers(log_f, y.size(-1) // 2, ctx.first)
        phases = running_sums(f_i, TURN).unsqueeze(2)
        grad_qk = rotate(g, phases.cos(), -phases.sin())
        grad_phases = phase_gradient(y, g, log_f.dtype).sum(2)  # (B, T, H, D/2)
        after = running_sums(grad_phases.flip(1)).flip(1)  # Σ_{m ≥ t}: f_t is in the phase of every later token
        return grad_qk, (after * f_i * i).sum(-1), None


class CARoPE(Scheme):
    """`carope`. W starts at 0 and b where f = base^(-2/D), so that step 0 is exactly rope. Options:

    base. source of x_t: `hidden`, the block's layer-normed input, as in the same authors' earlier code, or `embedding`,
    which the paper's abstract names. init `rope`, or `paper`, without a bias: f starts at 0.59. std: W starts at N(0,
    std²). content false leaves W out (W = 0 for good), the control that the paper lacks: one trained constant f a head,
    which is RoPE with a trained base a head. first_power of f: with 1 pair i turns as rope's pair i+1 does at step 0.
    share_layers: one W and b for all layers.

    Parameters: W (H, C), 0; b (H,), where f = base^(-2/D). Not decayed: b.
    Beyond block_size: yes, by construction; phases are path sums, of which no length is new in kind.
    Cache: phases (B, 1, H, D/2) of the last token, in float64 less whole turns.
    Cost: 2·C·H FLOPs a token for W; D/2·H powers, sums, cosines and sines, computed again in the backward pass.
    """

    undecayed = ("c_pos.bias",)

    def __init__(
        self,
        config,
        layer,
        *,
        base: float = 10000.0,
        source: Literal["hidden", "embedding"] = "hidden",
        init: Literal["rope", "paper"] = "rope",
        std: float = 0.0,
        content: bool = True,
        first_power: Literal[0, 1] = 0,
        share_layers: bool = False,
    ):
        super().__init__(config, layer)
        self.base, self.source, self.std, self.first_power = base, source, std, first_power
        if self.head_width % 2:
            raise ValueError(
                f"carope turns channels in pairs: head width n_embd/n_head = {self.head_width} must be even"
            )
        if base <= 1:
            raise ValueError(f"carope's base must exceed 1, not {base}: f = base^(-2/D) lies below 1")
        if std < 0:
            raise ValueError(f"carope's std of W must not be negative, but is {std}")
        self.c_pos = Linear(config.n_embd, config.n_head, bias=init == "rope")
        self.shared = ("c_pos",) if share_layers else ()
        if not content:
            if init == "paper":
                raise ValueError(
                    "carope's content false trains the bias alone, which init paper does not have: take init rope"
                )
            if std:
                raise ValueError("carope's content false has no W, so std must be 0")
            self.c_pos.weight = None

    def initial(self, name, shape, normal):
        if name == "c_pos.weight":
            return normal(self.std)
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

    def encode(self, qk, x, ctx):
        log_f = self.log_frequencies(x if self.source == "hidden" else ctx.embedding)
        if ctx.cache is None:
            return PathRotation.apply(qk, log_f, self.first_power)
        f_i, _ = powers(log_f, self.head_width // 2, self.first_power)
        phases = ctx.accumulated("phase", f_i, TURN)  # of the last token kept in float64, less whole turns
        phases = phases.unsqueeze(2)  # (B, T, 1, H, D/2)
        return rotate(qk, phases.cos(), phases.sin())
