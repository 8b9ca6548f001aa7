"""Veisi et al. 2503.08067: -softplus(w_s·x_m)_h (S_m - S_n) on the score of query m and key n of head h,
S_m = Σ_{t ≤ m} relu(w_c·x_t)_h. Tokens are as far apart as what is between them says, and a query weighs it."""

import torch
import torch.nn.functional as F

from nanope.ops import Linear
from schemes.base import Scheme


class CABLE(Scheme):
    """`cable`. Option bias: both maps have one, as in the authors' code. x is the block's normed input.

    Distances and weights are float32 or wider, also under autocast. In float32 S is within one part in 10^7 of the
    exact sum. The code of the paper's first version sums softplus(w·x + b) without a weight, which is fox's bias, on
    scores that it does not divide by √D.

    Parameters: distance.weight (H, C) and slope.weight (H, C), N(0, 0.02²); with bias distance.bias and slope.bias
        (H,), 0. Not decayed: both biases.
    Beyond block_size: yes, by construction.
    Cache: sums S (B, S, H) and weights (B, S, H), and the last sum in float64.
    Cost: 4·C·H FLOPs a token; a bias, whose dense form on a CPU takes B·H·T² numbers.
    """

    undecayed = ("distance.bias", "slope.bias")

    def __init__(self, config, layer, *, bias: bool = False):
        super().__init__(config, layer)
        self.distance, self.slope = (Linear(config.n_embd, config.n_head, bias=bias) for _ in range(2))

    def initial(self, name, shape, normal):
        return torch.zeros(shape) if name.endswith("bias") else normal(0.02)

    def bias(self, x, q, k, ctx):
        step = F.relu(self.distance.in_dtype(x, ctx.dtype))  # (B, T, H)
        slope = F.softplus(self.slope.in_dtype(x, ctx.dtype))  # (B, T, H)
        total = ctx.joined("total", ctx.accumulated("sum", step))  # (B, S, H)
        slope = ctx.joined("slope", slope)  # of the queries, by their index among all S
        return lambda batch, head, m, n: slope[batch, m, head] * (total[batch, n, head] - total[batch, m, head])
