"""Lin et al. 2503.02130, the forgetting transformer: Σ_{t=n+1..m} log σ(u_h·x_t + b_h) on the score of query m and key
n of head h. What is between them makes n forgotten, by a gate a token and head."""

import torch
import torch.nn.functional as F

from nanope.ops import Linear
from schemes.base import Scheme


class FoX(Scheme):
    """`fox`. Options start: b at the start. 0, as in the authors' code, forgets half at each token: step 0 is alibi
    with all slopes log 2, but for u. 5 hardly forgets. divided: the bias by √D, as the authors of PaTH have it in
    path+fox.

    `fox` is the paper's gate alone, of x, the block's normed input, without the shifts, norms and output gate of its
    "Pro" block. Gates and their sums are float32 or wider, also under autocast. In float32 a sum of 65,536 gates of 0.5
    is within 0.004 of the exact one, so a bias is within 0.008.

    Parameters: gate.weight (H, C), N(0, 0.02²); gate.bias (H,), start. Not decayed: gate.bias.
    Beyond block_size: yes, by construction.
    Cache: sums of the gates' logs (B, S, H), and the last in float64.
    Cost: 2·C·H FLOPs a token; a bias, whose dense form, for training on a CPU, takes B·H·T² numbers.
    """

    undecayed = ("gate.bias",)
    of_keys = True

    def __init__(self, config, layer, *, start: float = 0.0, divided: bool = False):
        super().__init__(config, layer)
        self.start, self.gate = start, Linear(config.n_embd, config.n_head)
        self.divided = divided

    def initial(self, name, shape, normal):
        return normal(0.02) if name == "gate.weight" else torch.full(shape, self.start)

    def bias(self, x, q, k, ctx):
        log_f = F.logsigmoid(self.gate.in_dtype(x, ctx.dtype))  # (B, T, H)
        if self.divided:
            log_f = log_f / self.head_width**0.5
        total = ctx.joined("total", ctx.accumulated("sum", log_f))  # (B, S, H)
        minus = -total  # a sum has a cheaper gradient than a difference
        return lambda batch, head, m, n: total[batch, m, head] + minus[batch, n, head]
