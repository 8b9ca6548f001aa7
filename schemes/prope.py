"""Barbero et al. 2410.06205, p-RoPE: rope whose slowest frequencies are 0, θ_i = base^(-2i/D) for i < p·D/2 alone.

Unlike rope's `fraction`, which spreads all frequencies from 1 to 1/base over fewer channels, it leaves the remaining
frequencies where rope has them. Trained models use the slowest for content; without rotation it stays exact.
"""

import torch.nn.functional as F

from nanope.ops import rope_frequencies
from schemes.rope import RoPE


class PRoPE(RoPE):
    """`prope`. Options: base. p: the part of the frequencies that is kept, the fastest ⌊p·D/2⌋. 1 is rope, 0 is none.

    Parameters: none.
    Beyond block_size: yes, by construction; the frequencies that are kept wrap around as rope's do.
    Cache: none of its own.
    Cost: as rope, 6·C FLOPs a token; no bias, so flash attention stays.
    """

    def __init__(self, config, layer, *, base: float = 10000.0, p: float = 0.75):
        super().__init__(config, layer, base=base)
        if not 0 <= p <= 1:
            raise ValueError(f"prope's p must lie in [0, 1], not {p}")
        self.p = p

    def frequencies(self, device="cpu"):
        kept = int(self.p * self.head_width / 2 + 1e-9)
        return F.pad(rope_frequencies(self.head_width, self.base, device)[:kept], (0, self.head_width // 2 - kept))
