"""Zhang et al. 2512.07805, GRAPE-AP: slope_h Σ_{l=n+1..m} log σ(p_mᵀ R_l p̃_l / d) on the score of query m and key n,
after the division by √D; p = W x for each head, p̃ = p over its root mean square, R_l turns all channel pairs by l."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanope.ops import Linear, double_device, no_autocast, rotate, suffix_sums
from schemes.alibi import ALiBi
from schemes.base import Scheme


class Path(torch.autograd.Function):
    """Σ_{l=n+1..m} -log σ(-x_ml) of x (…, R, N), of the last R of N queries m: (…, R, N), 0 for keys after a query."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        steps = F.softplus(x, threshold=40.0).tril_(x.size(-1) - x.size(-2))
        return suffix_sums(steps).sub_(steps)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        g = g.tril(x.size(-1) - x.size(-2))
        return g.cumsum(-1).sub_(g).mul_(torch.sigmoid(x)).tril_(x.size(-1) - x.size(-2))


class GRAPE(Scheme):
    """`grape`. Options:

    width: d, of p. The turn has one radian a token in every pair (rotary base 1). It is the key's alone, as in the
    official code, so a bias depends on where the text starts, unlike other relative schemes. Slopes are ALiBi's, fixed.
    The query's p is not normalised there, though the paper's text says so of both. Their models norm q and k, which is
    the switch qk_norm here, without their gain. In a combination, what turns queries and keys comes first: rope+grape.

    Parameters: c_p.weight (H·width, C), N(0, 0.02²). Not decayed: none.
    Beyond block_size: yes, by construction.
    Cache: p̃ turned, H·width numbers a token in float32, as further channels of k.
    Cost: 2·C·H·width FLOPs a token; dense scores, T·(C + H·width) multiplications for q k and p p̃; about 12
        elementwise passes over H·T² scores more than softmax; memory of a chunk of queries.
    """

    wider = "bias"

    def __init__(self, config, layer, *, width: int = 8):
        super().__init__(config, layer)
        if width < 2 or width % 2:
            raise ValueError(f"grape turns the channels of p in pairs: width must be even and positive, not {width}")
        self.width = width
        self.c_p = Linear(config.n_embd, config.n_head * width, bias=False)

    def initial(self, name, shape, normal):
        return normal(0.02)

    @classmethod
    def prepare(cls, layers, ctx):
        """Slopes (H, 1, 1), and cos and sin of the turn, (T, 1, 1) or (B, T, 1, 1)."""
        slopes = ALiBi.slopes(layers[0], double_device(ctx.device)).to(ctx.device, ctx.dtype).view(-1, 1, 1)
        return [(slopes, *ctx.cos_sin(ctx.positions[..., None, None]))] * len(layers)

    def encode(self, qk, x, ctx):
        _, cos, sin = ctx.prepared
        with no_autocast(x.device):
            p = self.c_p.in_dtype(x, ctx.dtype).unflatten(-1, (self.n_head, -1))
            turned = rotate(F.rms_norm(p, (self.width,)), cos, sin)  # (B, T, H, width)
        return torch.cat((qk.to(ctx.dtype), torch.stack((p, turned), 2)), -1)  # (B, T, 2, H, D + width)

    def scores(self, q, k, x, rows, ctx):
        D = q.size(-1) - self.width
        with no_autocast(q.device):
            path = Path.apply((q[..., D:] / -self.width) @ k[..., D:].mT)  # (B, H, R, N)
        z = super().scores(q[..., :D], k[..., :D], x, rows, ctx).to(ctx.dtype)
        return torch.addcmul(z, ctx.prepared[0], path, value=-1)
