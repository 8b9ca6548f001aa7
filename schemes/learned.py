"""GPT-2's table of absolute positions: x_m = wte[token] + wpe[m] (Radford et al. 2019)."""

import torch.nn as nn

from schemes.base import Scheme


class Learned(Scheme):
    """`learned`. Ends at block_size."""

    extends = False

    def embedding(self, config):
        return nn.Embedding(config.block_size, config.n_embd)
