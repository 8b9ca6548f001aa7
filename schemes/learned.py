"""GPT-2's table of absolute positions: x_m = wte[token] + wpe[m] (Radford et al. 2019)."""

import torch.nn as nn

from schemes.base import Scheme


class Learned(Scheme):
    """`learned`.

    Parameters: wpe (block_size, C), N(0, 0.02²), decayed as GPT-2 does.
    Beyond block_size: no: the table ends there.
    Cache: nothing of its own.
    Cost: one sum of (B, T, C) a forward pass.
    """

    extends = False

    def embedding(self, config):
        return nn.Embedding(config.block_size, config.n_embd)
