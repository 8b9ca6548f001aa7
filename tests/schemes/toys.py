"""Schemes from outside of the registry: one for each hook, and some that are wrong. Tests load them by path."""

import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanope.ops import Linear
from schemes import Scheme
from schemes.rope import RoPE


class Slope(Scheme):
    """bias: (n - m)/8, ALiBi with one slope."""

    def bias(self, x, q, k, ctx):
        return lambda batch, head, m, n: (n - m) / 8


class WideSlope(Scheme):
    """encode: the same as two more channels of q and k."""

    def encode(self, qk, x, ctx):
        m = ctx.positions.to(qk).view(1, -1, 1, 1).expand(qk.size(0), -1, self.n_head, 1)  # (B, T, H, 1)
        scale = torch.full_like(m, self.head_width**0.5 / 8)
        q, k = torch.cat((qk[:, :, 0], scale, m * scale), -1), torch.cat((qk[:, :, 1], m, -torch.ones_like(m)), -1)
        return torch.stack((q, k), 2)


class DenseSlope(Scheme):
    """scores: the same by dense scores."""

    def scores(self, q, k, x, rows, ctx):
        n = torch.arange(k.size(2), device=q.device)
        return super().scores(q, k, x, rows, ctx) + (n - n[-q.size(2) :, None]) / 8


class Forget(Scheme):
    """bias from hidden states and a cache: gates as in 2503.02130."""

    undecayed = ("gate.bias",)

    def __init__(self, config, layer, *, start: float = 1.0):
        super().__init__(config, layer)
        self.start, self.gate = start, Linear(config.n_embd, config.n_head, bias=True)

    def initial(self, name, shape, normal):
        return normal(0.02) if name == "gate.weight" else torch.full(shape, self.start)

    def bias(self, x, q, k, ctx):
        total = ctx.joined("log_f", F.logsigmoid(self.gate(x).to(ctx.dtype))).cumsum(1)  # (B, S, H)
        return lambda batch, head, m, n: total[batch, m, head] - total[batch, n, head]


class Sigmoid(Scheme):
    """weights: a sigmoid for the softmax."""

    def weights(self, scores, ctx):
        return torch.sigmoid(scores - 2.0)


class Jitter(Scheme):
    """positions: all moved by a random number of tokens, one a step."""

    def positions(self, ctx):
        return ctx.positions + torch.randint(1000, (1,), generator=ctx.generator()).to(ctx.positions)


class Stretch(Scheme):
    """positions and bias: distances of randomly spaced positions, so that what is drawn shows in the loss."""

    def positions(self, ctx):
        return torch.rand(ctx.length, generator=ctx.generator(), dtype=torch.float64).to(ctx.positions).cumsum(0)

    def bias(self, x, q, k, ctx):
        at = ctx.joined("positions", ctx.positions.to(ctx.dtype), 0)
        return lambda batch, head, m, n: at[n] - at[m]


class Penalty(Slope):
    """auxiliary: a loss on a parameter of its own."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.slope = nn.Parameter(torch.empty(config.n_head))

    def initial(self, name, shape, normal):
        return torch.full(shape, 0.125)

    def bias(self, x, q, k, ctx):
        slope = self.slope
        return lambda batch, head, m, n: slope[head] * (n - m)

    def auxiliary(self):
        return self.slope.square().sum()


class Halved(Scheme):
    """projection, project: a dense projection, and half of what it gives."""

    def projection(self, config):
        return nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)

    def project(self, c_attn, x, ctx):
        return c_attn(x) / 2


class Skip(Scheme):
    """positions: from a drawn start on, within a table of 64."""

    def positions(self, ctx):
        return ctx.positions + torch.randint(20, (1,), generator=ctx.generator()).to(ctx.positions)


class KeepsK(Scheme):
    """joined under a name that attention has too."""

    def bias(self, x, q, k, ctx):
        total = ctx.joined("k", x[..., : self.n_head])  # (B, S, H)
        return lambda batch, head, m, n: total[batch, n, head]


class Biased(RoPE):
    """bias beside rope's rotation."""

    bias = Slope.bias


class NoDefault(Scheme):
    def __init__(self, config, layer, *, start: float):
        super().__init__(config, layer)


class NoLayer(Scheme):
    def __init__(self, config):
        super().__init__(config, 0)


# ---- wrong ones, and the check that must say so


class SeesTheFuture(Scheme):
    """causality"""

    def encode(self, qk, x, ctx):
        return qk + x.mean(1).view(x.size(0), 1, 1, self.n_head, -1)


class ForgetsTheCache(Scheme):
    """cached_decoding"""

    def bias(self, x, q, k, ctx):
        position = torch.arange(k.size(2)) - ctx.start  # counts from these tokens, not from the first
        return lambda batch, head, m, n: -(position[m] ** 2) * (n - m).abs() / 500


class MixesRows(Scheme):
    """separate_rows"""

    def encode(self, qk, x, ctx):
        return qk + qk.mean(0, keepdim=True)


class Draws(Scheme):
    """determinism"""

    def encode(self, qk, x, ctx):
        return qk + torch.rand(())


class NoInitialValue(Scheme):
    """initial_values"""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.slope = nn.Parameter(torch.empty(config.n_head))

    def initial(self, name, shape, normal):
        return torch.full(shape, float("nan"))

    bias = Penalty.bias


class Unused(Penalty):
    """gradients"""

    def bias(self, x, q, k, ctx):
        return None

    def auxiliary(self):
        return None


class WrongGradient(Penalty):
    """gradients"""

    def bias(self, x, q, k, ctx):
        slope = 2 * self.slope - self.slope.detach()
        return lambda batch, head, m, n: slope[head] * (n - m)


class ChunksAlone(Scheme):
    """chunks"""

    def scores(self, q, k, x, rows, ctx):
        return super().scores(q, k, x, rows, ctx) * (1 + rows.start)


class KeysInVain(Scheme):
    """evaluation"""

    of_keys = True

    def bias(self, x, q, k, ctx):
        return lambda batch, head, m, n: -((m - n) ** 2) / 50


class ByLayer(Scheme):
    """compilation"""

    def encode(self, qk, x, ctx):
        return qk * (1 + 0.1 * self.layer)


class Breaks(Scheme):
    """compilation"""

    def encode(self, qk, x, ctx):
        return qk * float(qk.abs().max() > 0)


class Untyped(Scheme):
    """options_are_announced"""

    def __init__(self, config, layer, *, base=1.0):
        super().__init__(config, layer)


MADE = itertools.count(1)


class KeepsATensor(Scheme):
    """saving"""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.table = torch.full((config.n_head, 1), float(next(MADE)))

    def encode(self, qk, x, ctx):
        return qk * self.table.to(qk)
