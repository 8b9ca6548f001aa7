"""Li et al. 2310.04418: f_h(ψ(m - n) / ψ(max(L, m))) on the score of query m and key n of head h, ψ(x) = log(c x + 1).

f is an MLP, 1 → 32 → H with ReLU. The argument lies in [0, 1] at every length: beyond L distances shrink with m.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanope.ops import Linear, kind_of
from schemes.base import Scheme

HIDDEN = 32


class FIRE(Scheme):
    """`fire`. Options c and L: their initial values, the paper's. share_layers: one f, c and L for all layers, which
    the paper calls FIRE-S.

    m is the query's place in its own text, where documents are apart. f has no bias at its output: softmax ignores it,
    and its gradient is 0. c and L are exponentials of what is trained, so they stay positive; the paper's listing
    trains c itself, so that at the start an Adam step moves its c ten times as far. The MLP starts with the variances
    of torch's nn.Linear, as the paper's code does.

    Parameters: hidden.weight (32, 1) and hidden.bias (32,), N(0, 1/3); out.weight (H, 32), N(0, 1/96); log_c (), log
        c; log_L (), log L. Not decayed: hidden.bias, log_c, log_L.
    Beyond block_size: yes, by construction.
    Cache: places (S,), or (B, S) where documents are apart.
    Cost: 64·(H + 1) FLOPs a pair, in evaluation on a CPU 2·H; a bias, whose dense form on a CPU takes H·T² numbers, the
        same in each sequence, and in training 32·T² more.
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

        def units(y, head):  # one hidden unit at a time: no tensor of all 32
            total = 0
            for j in range(HIDDEN):
                total = total + out[head, j] * F.relu(weight[j] * y + bias[j])
            return total

        by_pieces = kind_of(ctx.device) == "cpu" and not torch.is_grad_enabled()  # gradients are those of the units
        of = self.pieces(ctx.dtype) if by_pieces else units

        def f(batch, head, m, n):
            place = places[m] if places.dim() == 1 else places[batch, m]
            span = torch.log1p(c * torch.maximum(L, place.to(c.dtype)))
            return of(torch.log1p(c * (m - n).clamp_min(0)) / span, head)

        return f

    def pieces(self, dtype: torch.dtype):
        """f(y, head) by its linear pieces, at most 33 in [0, 1]. A search for the piece and two look-ups take a ninth
        of the time of 32 units."""
        weight, bias, out = (t.double() for t in (self.hidden.weight[:, 0], self.hidden.bias, self.out.weight))
        ends = (-bias / weight).nan_to_num(0.0).clamp(0, 1).sort().values  # where a unit begins or ends, (32,)
        middle = (F.pad(ends, (1, 0)) + F.pad(ends, (0, 1), value=1.0)) / 2  # (33,)
        on = (weight[:, None] * middle + bias[:, None] > 0).double()  # (32, 33)
        slope, start = ((out @ (on * t[:, None])).to(dtype).flatten() for t in (weight, bias))  # (33 H,) each
        ends = ends.to(dtype)

        def f(y, head):
            at = torch.bucketize(y, ends) + (HIDDEN + 1) * head
            start_of, slope_of = (t.index_select(0, at.flatten()).view_as(at) for t in (start, slope))
            return torch.addcmul(start_of, slope_of, y)

        return f
