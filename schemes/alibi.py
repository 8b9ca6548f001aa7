"""Press et al. 2108.12409: slope_h · (n - m) on the score of query m and key n, after the division by √D."""

import math

import torch

from nanope.ops import double_device
from schemes.base import Scheme


class ALiBi(Scheme):
    """`alibi`: slopes 2^(-8h/H), h = 1 … H, or the paper's interpolation where H is not a power of 2.

    Parameters: none.
    Beyond block_size: yes, by construction.
    Cache: nothing of its own.
    Cost: 2 FLOPs a score; a bias, by FlexAttention on CUDA, and on a CPU by dense chunks in training and a row of keys
        in evaluation.
    """

    of_keys = True

    def slopes(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """(H,) float64."""
        power = 2 ** int(math.log2(self.n_head))
        h = torch.arange(1, self.n_head + 1, dtype=torch.float64, device=device)
        # Beyond the power of 2: halfway between, ½, 3/2 …
        return 2.0 ** (-8 / power * torch.where(h <= power, h, h - power - 0.5))

    @classmethod
    def prepare(cls, layers, ctx):
        return [layers[0].slopes(double_device(ctx.device)).to(ctx.device, ctx.dtype)] * len(layers)

    def bias(self, x, q, k, ctx):
        slopes = ctx.prepared
        return lambda batch, head, m, n: slopes[head] * (n - m)
