"""LeRoPE 2607.10134: rope with trained frequencies θ_i·exp(s_i), θ_i = base^(-2i/D); one s for all heads and layers.

On one axis LieRE, STRING and HARoPE are this too, with a frequency for each head: their further matrices fold into W_q
and W_k (tests/schemes/test_folds.py).
"""

import torch
import torch.nn as nn

from nanope.ops import Turned, double_device, rope_frequencies
from schemes.rope import RoPE


class LogScales(nn.Module):
    """s (D/2,), in a module so that layers can share it."""

    def __init__(self, pairs: int):
        super().__init__()
        self.log = nn.Parameter(torch.empty(pairs))


class LeRoPE(RoPE):
    """`lerope`. Option: base, of the frequencies at the start, which are rope's.

    An Adam step of 1e-3 on s_i moves the phase at distance m by 1e-3·m·θ_i: 0.26 radians at 256 tokens for the fastest.
    pos_lr_multiplier makes it smaller.

    Parameters: scale.log (D/2,), 0, one for all layers. Not decayed: scale.log.
    Beyond block_size: yes, by construction; as rope, phases there are not seen in training.
    Cache: none of its own.
    Cost: as rope, and 5·C FLOPs a token in the backward pass; no bias, so flash attention stays. No activations kept.
    """

    undecayed = ("scale.log",)
    shared = ("scale",)

    def __init__(self, config, layer, *, base: float = 10000.0):
        super().__init__(config, layer, base=base)
        self.scale = LogScales(self.head_width // 2)

    def initial(self, name, shape, normal):
        return torch.zeros(shape)

    def frequencies(self, device="cpu"):
        return rope_frequencies(self.head_width, self.base, device) * self.scale.log.to(device, torch.float64).exp()

    @classmethod
    def prepare(cls, layers, ctx):
        """Phases (T or B, T, 1, 1, D/2) in float64, with the gradient of s, and their cos and sin without."""
        phases = ctx.positions[..., None, None, None] * layers[0].frequencies(double_device(ctx.device))
        return [(phases, *ctx.cos_sin(phases.detach()))] * len(layers)

    def encode(self, qk, x, ctx):
        return Turned.apply(qk, *ctx.prepared)

    def as_rope(self, c_attn):
        return c_attn.weight, c_attn.bias, self.frequencies().detach().expand(self.n_head, -1)
