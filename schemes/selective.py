"""Movahedi et al. 2511.17388, Selective RoPE: pair i of head h turns by φ_i(m) = temp_i Σ_{t ≤ m} ω_t, temp_i =
base^(-2i/D), ω = conv₄(W x̂): a causal convolution over 4 tokens of a linear map, x̂ the input normed in each head's
slice. Angles have both signs and no bound."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanope.ops import Linear, Turned, double_device, linear, no_autocast, rope_frequencies
from schemes.base import Scheme

WIDTH = 4  # tokens of the convolution
TURN = 2 * math.pi


class Selective(Scheme):
    """`selective`. The defaults are those of the authors' module (github.com/timurcarstensen/selective-rope). Its
    language models have rank 0, std 0.02, the gate and SiLU. Its experiments of copying have other temperatures and no
    convolution, which are not here. Options:

    base of the temperatures, which are not trained. rank of W = up·down; 0: a matrix for each head's own slice, with
    normed columns times one trained scale. silu: of the convolution's output. gate: ω is multiplied by σ(w·x̂ + b), one
    a head. phase_bias: exp(b) is added to ω before the gate; with b = 0 at the start, that is one radian a token, which
    is rope of the same base but for W. std of down, up and conv at the start; null is the variance of torch's linear
    layers, 1/(3·inputs). At the start, at C 768, the fastest pair turns by about 0.02 radians a token with null, and by
    0.0002 with 0.02; for rank 0 by 0.07 and 0.004.

    Parameters: down (rank, C), up (C/2, rank), conv (C/2, 4), N(0, std²); for rank 0 full (H, D, D/2), N(0, 4/D), and
        scale (H,), 1; gate.weight (H, C), N(0, 0.02²); gate.bias (H,), 0; phase_bias (H, D/2), 0. Not decayed: scale,
        gate.bias, phase_bias.
    Beyond block_size: yes, by construction.
    Cache: sums of the angles (B, 1, H, D/2) in float64 less whole turns, and the last 3 inputs of the convolution.
    Cost: 3·rank·C + 20·C FLOPs a token, or C·D + 20·C; flash attention stays. Activations of about 4·C more.
    """

    undecayed = ("scale", "gate.bias", "phase_bias")

    def __init__(
        self,
        config,
        layer,
        *,
        base: float = 5e5,
        rank: int = 16,
        silu: bool = False,
        gate: bool = False,
        phase_bias: bool = False,
        std: float | None = None,
    ):
        super().__init__(config, layer)
        C, H = self.n_embd, self.n_head
        if self.head_width % 2:
            raise ValueError(f"selective turns channels in pairs: head width n_embd/n_head = {C // H} must be even")
        if base <= 0:
            raise ValueError(f"selective's base must be positive, not {base}")
        if rank < 0:
            raise ValueError(f"selective's rank must be positive, or 0 for a matrix a head, not {rank}")
        if std is not None and std <= 0:
            raise ValueError(f"selective's std must be positive, or null, not {std}")
        self.base, self.rank, self.silu, self.std = base, rank, silu, std
        self.scale = None
        if rank:
            self.down = nn.Parameter(torch.empty(rank, C))
            self.up = nn.Parameter(torch.empty(C // 2, rank))
        else:
            self.full = nn.Parameter(torch.empty(H, self.head_width, self.head_width // 2))
            self.scale = nn.Parameter(torch.empty(H))
        self.conv = nn.Parameter(torch.empty(C // 2, WIDTH))
        self.phase_bias = nn.Parameter(torch.empty(H, self.head_width // 2)) if phase_bias else None
        self.gate = Linear(C, H, bias=True) if gate else None

    def initial(self, name, shape, normal):
        if name in ("gate.bias", "phase_bias"):
            return torch.zeros(shape)
        if name == "scale":
            return torch.ones(shape)
        if name == "full":  # torch's kaiming_uniform_ of (D, D/2), which takes D/2 for the inputs
            return normal(2 * self.head_width**-0.5)
        return normal(0.02 if name == "gate.weight" else self.std or (3 * shape[1]) ** -0.5)

    @classmethod
    def prepare(cls, layers, ctx):
        """The temperatures (D/2,)."""
        pos = layers[0]
        exact = rope_frequencies(pos.head_width, pos.base, double_device(ctx.device))
        return [exact.to(ctx.device, ctx.dtype)] * len(layers)

    def steps(self, x: torch.Tensor, ctx) -> torch.Tensor:
        """temp_i ω of the input x (B, T, C): (B, T, H, D/2), in max(float32, model dtype)."""
        temperature, H, conv = ctx.prepared, self.n_head, self.conv.to(ctx.dtype)
        x = x.to(ctx.dtype).unflatten(-1, (H, -1))
        heads = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)  # (B, T, H, D)
        x = heads.flatten(-2)
        if self.rank:
            omega = linear(linear(x, self.down.to(ctx.dtype)), self.up.to(ctx.dtype))  # (B, T, C/2)
        else:
            W = F.normalize(self.full.to(ctx.dtype), dim=1) * self.scale.to(ctx.dtype).view(-1, 1, 1)  # (H, D, D/2)
            omega = torch.einsum("bthd,hde->bthe", heads, W).flatten(-2)
        if not self.silu:  # the convolution's weights take the temperature, which saves a pass over ω
            conv = conv * temperature.repeat(H).unsqueeze(-1)
        steps = ctx.convolved("omega", omega, conv).unflatten(-1, (H, -1))
        if self.silu:
            steps = F.silu(steps) * temperature
        if self.phase_bias is not None:
            steps = steps + self.phase_bias.to(ctx.dtype).exp() * temperature
        if self.gate is not None:
            gate = linear(x, self.gate.weight.to(ctx.dtype), self.gate.bias.to(ctx.dtype))
            steps = steps * gate.sigmoid().unsqueeze(-1)
        return steps

    def encode(self, qk, x, ctx):
        with no_autocast(x.device):
            phases = ctx.accumulated("phase", self.steps(x, ctx), TURN).unsqueeze(2)  # (B, T, 1, H, D/2)
            exact = phases.detach()
            return Turned.apply(qk, phases, exact.cos(), exact.sin())
