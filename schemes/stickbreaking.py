"""Tan et al. 2410.17980: the weight of key n for query m is σ(z_mn) Π_{j=n+1..m-1} (1 - σ(z_mj)) over n < m,
z = qᵀk/√D. From the query backwards, each key takes a share σ(z) of what the keys after it have left."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanope.ops import suffix_sums
from schemes.base import Scheme


class StickBreaking(torch.autograd.Function):
    """Scores z (…, R, N) of the last R of N queries, -inf where a key is hidden → weights (…, R, N).

    With s = -log(1 - σ(z)), log a_n = z_n - Σ_{j ≥ n} s_j. Backward: dL/dz_n = u_n - σ(z_n) Σ_{i ≤ n} u_i, u = a dL/da.
    """

    @staticmethod
    def forward(ctx, z):
        s = F.softplus(z, threshold=40.0)
        own = z.size(-1) - z.size(-2)  # the diagonal of the queries' own keys
        s.diagonal(own, -2, -1).zero_()
        # What is below 1e-26 in float32 is 0: products of subnormal numbers take a CPU 50 times as long, and so does
        # the exponential of -inf
        least = 0.7 * math.log(torch.finfo(z.dtype).tiny)
        a = suffix_sums(s).neg_().add_(z).clamp_(min=least - 1).exp_()
        a = F.threshold_(a, math.exp(least), 0.0)
        a.diagonal(own, -2, -1).zero_()
        ctx.save_for_backward(z, a)
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        z, a = ctx.saved_tensors
        u = a * g
        grad = u.addcmul_(u.cumsum(-1), torch.sigmoid(z), value=-1)
        grad.diagonal(z.size(-1) - z.size(-2), -2, -1).zero_()
        return grad


class StickBreakingAttention(Scheme):
    """`stickbreaking`: no positions and no softmax. A key that a query likes hides the keys before it, so recency is
    in the order of the product alone. A token does not see itself. Option remainder, what keys leave of a token's 1:
    `none` leaves it out, as in the paper's equation, so that a text's first token attends to nothing; `value` gives it
    to the token's own value, as the tests of the authors' kernels do. Their later language models give it to a trained
    vector, with a norm of each head after it, which are not here.

    Hidden keys (of a window, of another document) take no share. The sum of logarithms is in float32 or wider, from
    the query backwards, so that weights near the query are exact at any length.

    Parameters: none.
    Beyond block_size: yes, by construction.
    Cache: nothing of its own.
    Cost: dense scores, C·T multiplications each for q k and a v; about 12 elementwise passes over H·T² scores, forward
        and backward; memory of a chunk of queries.
    """

    def __init__(self, config, layer, *, remainder: Literal["none", "value"] = "none"):
        super().__init__(config, layer)
        self.remainder = remainder

    def weights(self, scores, ctx):
        a = StickBreaking.apply(scores)
        if self.remainder == "none":
            return a
        return a.diagonal_scatter(1 - a.sum(-1), a.size(-1) - a.size(-2), -2, -1)
