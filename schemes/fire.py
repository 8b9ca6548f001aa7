"""Li et al. 2310.04418: f_h(ψ(m - n) / ψ(max(L, m))) on the score of query m and key n of head h, ψ(x) = log(c x + 1).

f is an MLP, 1 → 32 → H with ReLU. The argument lies in [0, 1] at every length: beyond L distances shrink with m.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanope.ops import Linear
from schemes.base import Scheme

HIDDEN = 32


class FIRE(Scheme):
    """`fire`. Options c and L: their initial values, the paper's. share_layers: one f, c and L for all layers, which
    the paper calls FIRE-S.

    m is the query's place in its own text, where documents are apart. f has no bias at its output: softmax ignores it,
    and its gradient is 0. c and L are exponentials of what is trained, so they stay positive. The MLP starts with the
    variances of torch's nn.Linear, as the paper's code does.

    Parameters: hidden.weight (32, 1) and hidden.bias (32,), N(0, 1/3); out.weight (H, 32), N(0, 1/96); log_c (), log
        c; log_L (), log L. Not decayed: hidden.bias, log_c, log_L.
    Beyond block_size: yes, by construction.
    Cache: places (S,), or (B, S) where documents are apart.
    Cost: 64·(H + 1) FLOPs a pair; a bias, whose dense form on a CPU takes H·T² numbers, the same in each sequence, and
        in training 32·T² more.
    """

    undecayed = ("hidden.bias", "log_c", "log_L")

    def __init__(self, config, layer, *, c: float = 0.1, L: float = 512.0, share_layers: bool = False):
        super().__init__(config, layer)
        if not (c > 0 and L > 0):
            raise ValueError(f"fire's c and L must be positive, which is not so for {c} and {L}")
        self.start = {"log_c": math.log(c), "log_L": math.log(L)}
        self.shared = ("log_c", "log_L", "hidden", "out") if share_layers else ()
        self.log_c, self.log_L = (nn.Parameter(torch.empty(())) for _ in range(2))
        self.hidden, self.out = Linear(1, HIDDEN), Linear(HIDDEN, config.n_head, bias=False)

    def initial(self, name, shape, normal):
        if name in self.start:
            return torch.tensor(self.start[name], dtype=torch.float64)
        return normal((3 * HIDDEN) ** -0.5 if name == "out.weight" else 3**-0.5)

    def bias(self, x, q, k, ctx):
        c, L = self.log_c.to(ctx.dtype).exp(), self.log_L.to(ctx.dtype).exp()
        weight, bias, out = (t.to(ctx.dtype) for t in (self.hidden.weight[:, 0], self.hidden.bias, self.out.weight))
        places = ctx.joined("places", ctx.places, -1)  # (S,) or (B, S)

        def f(batch, head, m, n):
            place = places[m] if places.dim() == 1 else places[batch, m]
            span = torch.log1p(c * torch.maximum(L, place.to(c.dtype)))
            y = torch.log1p(c * (m - n).clamp_min(0)) / span  # (R, N)
            total = 0
            for j in range(HIDDEN):  # one hidden unit at a time: no tensor of all 32
                total = total + out[head, j] * F.relu(weight[j] * y + bias[j])
            return total

        return f
