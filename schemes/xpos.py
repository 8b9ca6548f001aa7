"""Sun et al. 2212.10554: rope with a decay of its own for each channel pair, ζ_i^((m-n)/scale) at distance m - n,
ζ_i = (2i/D + 0.4)/1.4."""

import math

import torch

from nanope.ops import double_device, rope_frequencies, rotate
from schemes.rope import RoPE

GAMMA = 0.4  # of the paper: ζ_0 = 0.29, so that the fastest pair fades by 1/e in 409 tokens


class XPos(RoPE):
    """`xpos`. Options: base. scale: the distance at which pair i has faded by ζ_i. Attention is all over the text, as
    in the authors' library, also beyond the training length.

    The decay is a factor 2^(m·l_i - e_i) of queries and 2^(e_i - n·l_i) of keys, l_i = log2(ζ_i)/scale, so flash
    attention stays. Around a fixed position such factors leave float32 from 36,000 tokens on. Here the whole number
    e_i ≈ c·l_i is for a position c amid the queries of each pass. With a cache c moves along, and cached keys are then
    multiplied by powers of 2, which is exact. Keys far behind come to 0, as their decay says.
    What is left is the length of one pass: 66,000 tokens in float32 and bfloat16 at scale 512, in proportion to scale.
    A longer one is a ValueError, and so is a block_size beyond it; in pieces any length will do. float16 ends at about
    8,000.

    Parameters: none.
    Beyond block_size: yes, by construction: phases that training has not seen are at faded pairs.
    Cache: the exponents e (D/2,) of the cached keys, which are changed every 2·scale tokens.
    Cost: as rope, 6·C FLOPs a token; no bias, so flash attention stays. It reads twice as large a table.
    """

    sole = ("encode",)  # cached keys are q's and k's channels alone

    def __init__(self, config, layer, *, base: float = 10000.0, scale: float = 512.0):
        super().__init__(config, layer, base=base)
        if scale <= 0:
            raise ValueError(f"xpos's scale must be positive, not {scale}")
        self.decay_scale = scale
        if config.block_size > (longest := self.longest_pass(torch.float32)):
            raise ValueError(
                f"xpos's factors overflow in a pass of more than {longest} tokens at scale {scale}, and block_size is "
                f"{config.block_size}: take a larger scale"
            )

    def longest_pass(self, dtype: torch.dtype) -> int:
        """How many tokens one pass may have, so that no factor leaves a dtype."""
        bits = -math.log2(torch.finfo(dtype).smallest_normal) - 6  # 120 of 126: some are for q and k themselves
        return max(0, int(2 * self.decay_scale * (bits / -math.log2(GAMMA / (1 + GAMMA)) - 1)))

    def decays(self, device="cpu") -> torch.Tensor:
        """l (D/2,) float64: log2 of what a pair is multiplied by for each token of distance."""
        i = torch.arange(self.head_width // 2, dtype=torch.float64, device=device)
        return ((2 * i / self.head_width + GAMMA) / (1 + GAMMA)).log2() / self.decay_scale

    @classmethod
    def prepare(cls, layers, ctx):
        """cos and sin times the factors, (T, 2, 1, D/2) of queries and keys, and the exponents e (D/2,)."""
        pos, step = layers[0], 2 * layers[0].decay_scale
        if ctx.length > (longest := pos.longest_pass(ctx.dtype)):
            raise ValueError(
                f"xpos's factors overflow in a pass of more than {longest} tokens at scale {pos.decay_scale}, and this "
                f"one has {ctx.length}: give them in pieces with a cache, or take a larger scale"
            )
        device = double_device(ctx.device)
        positions, decays = ctx.positions, pos.decays(device)
        if ctx.documents is not None:  # positions that restart would make keys of earlier documents overflow
            positions = torch.arange(ctx.start, ctx.start + ctx.length, dtype=torch.float64, device=device)
        m = positions[..., None, None, None]
        middle = ((m.amin() + m.amax()) / 2 / step).round() * step  # seldom another one in decoding
        exponents = (middle * decays).round()
        log2 = m * decays - exponents  # (T, 1, 1, D/2)
        factors = torch.cat((log2, -log2), -3).exp2().to(ctx.device, ctx.dtype)
        cos, sin = ctx.cos_sin(m * rope_frequencies(pos.head_width, pos.base, device))
        return [(cos * factors, sin * factors, exponents)] * len(layers)

    def encode(self, qk, x, ctx):
        cos, sin, exponents = ctx.prepared
        if ctx.cache is not None:
            key = ctx.key("exponents")
            before = ctx.cache.get(key, exponents)
            if not torch.equal(before, exponents):
                k = ctx.cache["k"]  # (B, H, start, D)
                ctx.cache["k"] = k * (exponents - before).exp2().repeat_interleave(2).to(k)
            ctx.cache[key] = exponents
        return rotate(qk, cos, sin)
