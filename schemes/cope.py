"""Golovneva et al. 2405.18719: key n stands p = Σ_{j=n..m} σ(z_mj) before query m, and its score is z + q·e[p], with
q·e interpolated between whole positions; z = qᵀk/√D. A query counts the keys that it has a gate for."""

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable

from nanope.ops import no_autocast, suffix_sums
from schemes.base import Scheme


class Interpolated(torch.autograd.Function):
    """z + values[p], p the contextual positions of z (B, H, R, N), values (B, H, R, P) at 0 … P-1 for each query.
    The last R of N queries, of which each counts the keys up to its own."""

    @staticmethod
    def forward(ctx, z, values):
        gates = torch.sigmoid(z).tril_(z.size(-1) - z.size(-2))
        p = suffix_sums(gates).clamp_(max=values.size(-1) - 1)
        ctx.save_for_backward(z, p, values)
        i, w = split(p, values)
        low = values.gather(-1, i)
        return low.lerp_(values.gather(-1, i.add_(1)), w).add_(z)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        z, p, values = ctx.saved_tensors
        i, w = split(p, values)
        # Where a position is clamped, w is 1: it moves no more
        grad_p = values.diff(dim=-1).gather(-1, i).mul_(g).mul_(w < 1)
        gate = torch.sigmoid(z)
        gate = gate.mul_(1 - gate).tril_(z.size(-1) - z.size(-2))
        grad_z = grad_p.cumsum(-1).mul_(gate).add_(g)
        upper = w.mul_(g)
        grad_values = torch.zeros_like(values).scatter_add_(-1, i, g - upper)
        return grad_z, grad_values.scatter_add_(-1, i.add_(1), upper)


def split(p: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions 0 … P-1 as the whole ones below, 0 … P-2 in int64, and how far towards the next, 0 … 1."""
    i = p.to(torch.int64).clamp_(max=values.size(-1) - 2)
    return i, p - i


class CoPE(Scheme):
    """`cope`. Options:

    positions: rows of the table. Keys that stand farther take its last row, as in the paper, so that any length is
    possible. All heads share the table, each layer has its own. q·e is not divided by √D, as in the paper's listing;
    the authors' released code divides it unless it is told not to.

    Parameters: e (D, positions), 0, which is no positions at all. Not decayed: e.
    Beyond block_size: yes, counts are clamped to the table at any length.
    Cache: nothing of its own.
    Cost: dense scores, C·T multiplications each for q k and a v, 2·C·positions FLOPs for q·e; about 25 elementwise
        passes over H·T² scores, with a gather and a scatter each; memory of a chunk of queries.
    """

    undecayed = ("e",)

    def __init__(self, config, layer, *, positions: int = 64):
        super().__init__(config, layer)
        if positions < 2:
            raise ValueError(f"cope interpolates between positions, which must be 2 or more, not {positions}")
        self.e = nn.Parameter(torch.empty(self.head_width, positions))

    def initial(self, name, shape, normal):
        return torch.zeros(shape)

    def scores(self, q, k, x, rows, ctx):
        z = super().scores(q, k, x, rows, ctx).to(ctx.dtype)
        with no_autocast(q.device):
            values = q.to(ctx.dtype) @ self.e.to(ctx.dtype)  # (B, H, R, positions)
        return Interpolated.apply(z, values)
