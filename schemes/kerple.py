"""Chi et al. 2205.09921: a bias that falls with the distance, by a kernel with two trained numbers a head.

log    -r1 log(1 + r2 (m - n)),  r1, r2 > 0
power  -r1 (m - n)^r2,           r1 > 0, 0 < r2 ≤ 2
"""

import math
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from schemes.base import Scheme

LEAST = 0.01  # of r1 and r2 at the start, the bound to which the authors' code clips them after each step


class KERPLE(Scheme):
    """`kerple`. Options kind: `log`, the paper's best, or `power`, of which alibi is a case. share_layers: one r1 and
    r2 for all layers, as in the authors' code; by default each layer has its own.

    r1 and r2 are softplus of what is trained; power's exponent r2 is 2σ of it. So they stay in their ranges. The
    authors train r1 and r2 themselves and clip them: an Adam step moves an r of 1 by 0.63 of theirs (power's r2: 0.5),
    one of 0.1 by a tenth. At the start they are drawn as in their code: for log r1 from U(0, 2) and r2 from U(0, 1),
    for power r1 from U(0, 1) and r2 from U(0, 2).

    Parameters: r1 (H,), r2 (H,): their softplus or 2σ is uniform as above, at least 0.01. Not decayed: r1, r2.
    Beyond block_size: yes, by construction.
    Cache: none of its own.
    Cost: a logarithm or a power a pair and head; a bias, whose dense form on a CPU takes H·T² numbers, the same in each
        sequence.
    """

    undecayed = ("r1", "r2")

    def __init__(self, config, layer, *, kind: Literal["log", "power"] = "log", share_layers: bool = False):
        super().__init__(config, layer)
        self.shared = ("r1", "r2") if share_layers else ()
        self.kind = kind
        self.r1, self.r2 = (nn.Parameter(torch.empty(config.n_head)) for _ in range(2))

    def initial(self, name, shape, normal):
        uniform = (1 + torch.erf(normal(1.0).double() / math.sqrt(2))) / 2
        exponent = self.kind == "power" and name == "r2"
        value = (uniform if (name == "r2") == (self.kind == "log") else 2 * uniform).clamp(LEAST, 2 - LEAST)
        return torch.logit(value / 2) if exponent else value + torch.log(-torch.expm1(-value))

    def kernel(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """r1 and r2, (H,) each, in their ranges."""
        r1, r2 = self.r1.to(dtype), self.r2.to(dtype)
        return F.softplus(r1), F.softplus(r2) if self.kind == "log" else 2 * torch.sigmoid(r2)

    def bias(self, x, q, k, ctx):
        r1, r2 = self.kernel(ctx.dtype)

        def log(batch, head, m, n):
            return -r1[head] * torch.log1p(r2[head] * (m - n).clamp_min(0))

        def power(batch, head, m, n):
            # A distance 0 apart: of 0^r2, which is 0, the gradient would be log 0
            distance = (m - n).clamp_min(1).to(r2.dtype)
            return -r1[head] * torch.exp(r2[head] * torch.log(distance)) * (n < m)

        return log if self.kind == "log" else power
