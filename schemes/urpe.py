"""Luo et al. 2205.13401: (softmax(z + B) ⊙ C) v, B and C Toeplitz tables of m - n for each head, z = qᵀk/√D. Weights
that do not sum to 1 can tell positions, which no additive bias can for equal values."""

from typing import Literal

import torch
import torch.nn as nn

from schemes.base import Scheme


class Toeplitz(nn.Module):
    """A table of the distance m - n for each head: (H, length)."""

    def __init__(self, heads: int, length: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(heads, length))

    def forward(self, R: int, N: int) -> torch.Tensor:
        """table[m - n] of the last R of N queries: (H, R, N); 1 or 0 keys after a query have some entry. Distances
        beyond the table take its last entry."""
        d = torch.arange(N - 1, -R, -1, device=self.table.device)  # the largest distance first, R - 1 keys too many
        line = self.table.index_select(1, d.clamp(0, self.table.size(1) - 1))  # (H, N + R - 1)
        return line.unfold(1, N, 1).flip(1)  # row i of the windows is query N - 1 - i


class URPE(Scheme):
    """`urpe`. Options:

    bias: B is `toeplitz`, or left out: `none`, to which other biases may be added (t5+urpe). share_layers: all layers
    have the same tables, as in the official code. clip: distances beyond the table take its last entry, which the
    paper does not do.

    Parameters: C.table (H, block_size), 1; B.table (H, block_size), 0. Not decayed: both.
    Beyond block_size: no, the tables end there; with clip yes, by the last entry.
    Cache: nothing of its own.
    Cost: dense scores, C·T multiplications each for q k and a v; about 4 elementwise passes over H·T² scores more than
        softmax; memory of a chunk of queries.
    """

    extends = False
    undecayed = ("C.table", "B.table")

    def __init__(
        self,
        config,
        layer,
        *,
        bias: Literal["toeplitz", "none"] = "toeplitz",
        share_layers: bool = True,
        clip: bool = False,
    ):
        super().__init__(config, layer)
        self.extends = clip
        self.C = Toeplitz(config.n_head, config.block_size)
        self.B = Toeplitz(config.n_head, config.block_size) if bias == "toeplitz" else None
        self.shared = ("C", "B") if share_layers else ()

    def initial(self, name, shape, normal):
        return torch.full(shape, float(name == "C.table"))

    def weights(self, scores, ctx):
        R, N = scores.shape[-2:]
        if self.B is not None:
            scores = scores + self.B(R, N)
        return torch.softmax(scores, -1) * self.C(R, N)
