"""Ali et al. 2605.10414, GAPE: rope, and the bias -Γ_h g_m (1 - l_n) (m - n)/T of query m and key n. The query's gate
g = softplus(w_g·q + b_g) says how much of the past fades, the key's l = σ(w_l·k + b_l) protects that key,
Γ_h = softplus(γ_h). q and k are those before rotation; T is the training length."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanope.ops import no_autocast, rotate
from schemes.rope import RoPE


def parts(x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Numbers of a dtype whose sum is x to 24 bits: one where the dtype has as many, else three."""
    if dtype in (torch.float32, torch.float64):
        return [x]
    found = []
    for _ in range(3):
        found.append(x.to(dtype))
        x = x - found[-1].to(x)
    return found


class GAPE(RoPE):
    """`gape`. Options: base; unit, the T of the equation, by default the block_size that the model is made with. It is
    the same at every length, so a distance means the same in a longer text.

    The bias is of low rank, so it goes into q and k, and flash attention stays: channels g·m and g of the query meet
    (1 - l) and (1 - l)·n of the key. In bfloat16 and float16 the products g·m and (1 - l)·n are three channels each, 24
    bits in all, since a rounded one would be off by 0.25 at 64 times the training length. g and l themselves are
    rounded there as q and k are, and their gradients have an error of about 0.004·m/T of the sum over keys.
    In float32 the bias has an absolute error of about 1e-7·Γ·g·m/T.

    Parameters: w_g, w_l (H, D), N(0, 0.02²); b_g, b_l, gamma (H,), 0: the bias at distance T starts at -0.24.
    Not decayed: b_g, b_l, gamma.
    Beyond block_size: yes, by construction.
    Cache: none of its own; k is 2 channels wider, 6 in bfloat16.
    Cost: 10·C FLOPs a token, and q·k is 2 or 6 channels a head wider, 8 or so on CUDA; v is padded to the same width.
        No bias, so flash attention stays.
    """

    undecayed = ("b_g", "b_l", "gamma")
    wider = "bias"
    sole = ("encode",)  # the gates are of q and k before any other encoding, and the result is wider

    def __init__(self, config, layer, *, base: float = 10000.0, unit: float | None = None):
        super().__init__(config, layer, base=base)
        if unit is not None and not 0 < unit < math.inf:
            raise ValueError(f"gape's unit {unit} must be a positive number of tokens")
        self.unit = unit
        self.w_g, self.w_l = (nn.Parameter(torch.empty(self.n_head, self.head_width)) for _ in range(2))
        self.b_g, self.b_l, self.gamma = (nn.Parameter(torch.empty(self.n_head)) for _ in range(3))

    @classmethod
    def complete_options(cls, options, config):
        return {**options, "unit": float(config.block_size) if options["unit"] is None else options["unit"]}

    def initial(self, name, shape, normal):
        return normal(0.02) if name in ("w_g", "w_l") else torch.zeros(shape)

    @classmethod
    def prepare(cls, layers, ctx):
        """rope's cos and sin, and positions in units (T or B, T, 1)."""
        scaled = (ctx.positions / layers[0].unit).to(ctx.device, ctx.dtype).unsqueeze(-1)
        return [(*table, scaled) for table in super().prepare(layers, ctx)]

    def encode(self, qk, x, ctx):
        cos, sin, m = ctx.prepared
        with no_autocast(qk.device):
            q, k = qk.to(ctx.dtype).unbind(2)  # (B, T, H, D)
            w_g, w_l, b_g, b_l, gamma = (w.to(ctx.dtype) for w in (self.w_g, self.w_l, self.b_g, self.b_l, self.gamma))
            # Scores are divided by √D, this bias is not
            g = F.softplus((q * w_g).sum(-1) + b_g) * F.softplus(gamma) * self.head_width**0.5  # (B, T, H)
            fading = torch.sigmoid(-(k * w_l).sum(-1) - b_l)  # 1 - l
            g, fading = g.to(qk.dtype), fading.to(qk.dtype)
            queries, keys = parts(-g.to(ctx.dtype) * m, qk.dtype), parts(fading.to(ctx.dtype) * m, qk.dtype)
        n = len(keys)
        more = torch.stack((torch.stack(queries + n * [g], -1), torch.stack(n * [fading] + keys, -1)), 2)
        if qk.device.type == "cuda":  # whose fused kernels want a multiple of 8
            more = F.pad(more, (0, -(self.head_width + 2 * n) % 8))
        return torch.cat((rotate(qk, cos, sin), more), -1)  # (B, T, 2, H, D + 2n)
