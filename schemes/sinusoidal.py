"""Vaswani et al. 1706.03762: fixed absolute sinusoids, added to the token embeddings."""

import torch
import torch.nn as nn

from nanope.ops import double_device, rope_frequencies
from schemes.base import Scheme


class Sinusoid(nn.Module):
    """Positions (…) int64 → (…, C): channel 2i is sin(m / base^{2i/C}), channel 2i+1 the cosine."""

    def __init__(self, width: int, base: float, scale: float):
        super().__init__()
        self.width, self.base, self.scale = width, base, scale

    def forward(self, positions):
        device = double_device(positions.device)
        angles = positions.to(device).double().unsqueeze(-1) * rope_frequencies(self.width, self.base, device)
        table = self.scale * torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)  # (…, C)
        return table.to(positions.device, torch.float64 if device == positions.device else torch.float32)


class Sinusoidal(Scheme):
    """`sinusoidal`. Options: base; scale, the amplitude (token embeddings start with a standard deviation of 0.02).
    The paper's amplitude is 1, and its token embeddings are multiplied by √C, which those of GPT-2 are not.

    Parameters: none.
    Beyond block_size: yes, by construction; angles are exact in float64.
    Cache: nothing of its own.
    Cost: one sum of (B, T, C) a forward pass.
    """

    def __init__(self, config, layer, *, base: float = 10000.0, scale: float = 1.0):
        super().__init__(config, layer)
        self.base, self.scale = base, scale
        if base <= 0:
            raise ValueError(f"base must be positive, not {base}")
        if config.n_embd % 2:
            raise ValueError(f"sinusoidal pairs channels: n_embd {config.n_embd} must be even")

    def embedding(self, config):
        return Sinusoid(config.n_embd, self.base, self.scale)
