"""Lou & Xu 2601.02728: rope whose Q, K and V projections are complex-linear over the whole width, with half their
parameters. The output projection stays real and dense."""

from schemes.rope import GroupedLinear, RoPE


class ComplexLinear(GroupedLinear):
    """ỹ = (A + iB) x̃ over adjacent channel pairs: (..., C) → (..., 3C), A and B (3C/2, C/2).

    The equivalent dense weight, real 2×2 blocks [[a, -b], [b, a]], is assembled and used in one matrix product.
    Measured (one CPU thread, MKL, forward and backward, 4,096 tokens), this takes 0.92, 1.03 and 1.04 of a dense
    layer's time at C = 128, 384 and 768. Three products with a quarter fewer multiplications (Gauss) take 1.73, 1.05
    and 0.94, for their additional passes over the activations.
    """

    initial_std = 0.02

    @property
    def weight(self):
        """The dense equivalent, (3C, C)."""
        return self.interleaved(self.A, -self.B, self.B, self.A)


class CRoPE(RoPE):
    """`crope`. Options: base, fraction, as rope.

    Parameters: A, B (3C/2, C/2) for c_attn's weight (3C, C), N(0, 0.02²), decayed: half of a dense Q, K and V.
    Beyond block_size: as rope: yes by construction, untrained phases.
    Cache: nothing of its own.
    Cost: as rope; the dense weight is put together from A and B in each forward pass.
    """

    def __init__(self, config, layer, *, base: float = 10000.0, fraction: float = 1.0):
        super().__init__(config, layer, base=base, fraction=fraction)

    def projection(self, config):
        return ComplexLinear(config.n_embd, config.bias)
