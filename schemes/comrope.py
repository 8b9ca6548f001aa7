"""Yu et al., CVPR 2025, 2506.03737: R(x) = exp(Σ_i A_i x_i/unit_i) of a token at the coordinates x, with A_i that are
block-diagonal, skew-symmetric and commute. They are trained per layer and head, the same for q and k. A text has one
axis, the position m, or several (`axes`).

Every skew A is Q (⊕ ω_k J) Qᵀ, so on one axis this is RoPE with trained frequencies ω/unit in a trained orthonormal
frame Q. The frame is folded into the Q and K projections, and the rest costs what RoPE costs. On several axes each
block has one matrix P - Pᵀ, and A_i a multiple of it: the frame stays, and m/unit becomes the sum of these multiples of
the x_i. schemes/_skew.py has the algebra.
"""

import itertools
import math
from typing import Literal

import torch
import torch.nn as nn

from nanope.ops import double_device, linear, no_autocast, rope_frequencies, rotate, wide
from schemes._skew import SkewTurned, less_turns, skew_canonical_form
from schemes.base import AXES, Scheme


class ComRoPE(Scheme):
    """`comrope`. Options:

    axes, the coordinates of a token: `token`, its position, always; `line` or `sentence`, how many of them have ended
    before it; `byte`, the bytes of its line (else sentence) before it. Default: [token].
    kind `ap`, where block j has axis j mod N, A_i = P - Pᵀ there and 0 elsewhere; or `ld`, where each block has all
    axes, A_i = θ_i (P - Pᵀ) with a trained multiplier θ_i per axis, block and head; in `ld-shared` θ is the same for
    all heads, as in the authors' code. On one axis both are the same functions. block, the block size b.
    init `rope`, with RoPE's frequencies (of `base`) per step of an axis at the start, or `gaussian`, the paper's
    P ~ N(0, 1) and θ ~ N(0, 1). Else θ starts at 1 for `token` and at 0 for other axes: `ld` starts as rope.
    unit, the steps of an axis in which the angle of a frequency 1 is one radian: a number, or one per axis. The paper's
    coordinates in [0, 1] are what an axis extends to, which is the default when the model is made: block_size tokens,
    a 16th of it in lines or sentences, 64 bytes.
    jitter, σ of the noise N(0, σ²) that coordinates have in training, in steps of their axis: the paper's, cut at 0.49
    steps, so that tokens keep their order. The authors' code halves σ and cuts at 0.5. All texts of a step have the
    same. The authors' models add learned absolute positions to the patches, as their code is set; here there are none.

    Parameters: P (H, D/b, b, b); of ld theta (H or 1, D/b), or (N, H or 1, D/b) on N > 1 axes. Not decayed: both.
    Beyond block_size: yes; frequencies are trained, and may alias.
    Cache: none beside k and v; on several axes the model's own keeps where in the text it is.
    Cost: RoPE's; to fold the frame 4·b·C² FLOPs a pass, in training 12; for P's gradient 4·b·C FLOPs a token. On
        several axes C/2 sines and cosines, and b·C entries of that gradient, per token of the batch, not per position.
    """

    undecayed = ("P", "theta")
    sole = ("encode",)  # in the frame Q, another's rotation would be another rotation

    def __init__(
        self,
        config,
        layer,
        *,
        kind: Literal["ap", "ld", "ld-shared"] = "ap",
        block: Literal[2, 4, 8] = 8,
        init: Literal["rope", "gaussian"] = "rope",
        base: float = 10000.0,
        unit: float | list[float] | None = None,
        axes: list[str] | None = None,
        jitter: float = 0.0,
    ):
        super().__init__(config, layer)
        names = ["token"] if axes is None else axes
        self.units = unit if isinstance(unit, list) else [unit] * len(names)
        self.block, self.init, self.base, self.jitter = block, init, base, jitter
        if names[:1] != ["token"] or any(n not in AXES or names.count(n) > 1 for n in names):
            raise ValueError(
                f"comrope's axes {names} must be token, and then others of {', '.join(AXES[1:])}, once each"
            )
        if self.head_width % block:
            raise ValueError(f"comrope's block {block} must divide the head width n_embd/n_head = {self.head_width}")
        blocks = self.head_width // block
        if kind == "ap" and blocks < len(names):
            raise ValueError(
                f"comrope ap has {len(names)} axes for {blocks} blocks of {block}: take a smaller block, or ld"
            )
        if len(self.units) != len(names) or not all(type(u) in (int, float) and 0 < u < math.inf for u in self.units):
            raise ValueError(f"comrope's unit {unit} must be a positive number, or one for each of {', '.join(names)}")
        if base <= 0 or jitter < 0:
            raise ValueError(f"comrope's base ({base}) must be positive, and jitter ({jitter}) not negative")
        self.axes = tuple(names) if len(names) > 1 else ()
        self.P = nn.Parameter(torch.empty(self.n_head, blocks, block, block))
        shape = (1 if kind == "ld-shared" else self.n_head, blocks)
        shape = (len(names), *shape) if self.axes else shape
        self.theta = None if kind == "ap" else nn.Parameter(torch.empty(shape))

    @classmethod
    def complete_options(cls, options, config):
        axes, T = ["token"] if options["axes"] is None else options["axes"], config.block_size
        extents = {"token": float(T), "line": T / 16, "sentence": T / 16, "byte": 64.0}
        units = [extents.get(str(axis), 1.0) for axis in axes]
        default = units if len(axes) > 1 else float(T)
        return {**options, "axes": axes, "unit": default if options["unit"] is None else options["unit"]}

    def claims(self, hook):
        return super().claims(hook) and (hook != "positions" or self.jitter > 0)

    def axes_of_blocks(self, of_axes: list) -> list:
        """What block j has of a list with an item per axis: where θ weighs the axes, the first."""
        count = len(of_axes) if self.theta is None else 1
        return list(itertools.islice(itertools.cycle(of_axes[:count]), self.P.size(1)))

    def initial(self, name, shape, normal):
        if self.init == "gaussian":
            return normal(1.0)
        if name == "theta":
            theta = torch.ones(shape)
            return torch.cat((theta[:1], 0 * theta[1:])) if self.axes else theta
        frequencies = rope_frequencies(self.head_width, self.base).view(-1, self.block // 2)  # (D/b, b/2)
        frequencies = frequencies * torch.tensor(self.axes_of_blocks(self.units), dtype=torch.float64).view(-1, 1)
        P = torch.zeros(shape[1:], dtype=torch.float64)
        even = torch.arange(0, self.block, 2)
        P[:, even + 1, even] = frequencies / 2  # A = P - Pᵀ = 2P
        P[:, even, even + 1] = -frequencies / 2
        return P.expand(shape)

    def generators(self) -> torch.Tensor:
        """The skew-symmetric A, (H, D/b, b, b)."""
        P = self.P.to(wide(self.P.dtype))
        A = P - P.mT
        return A if self.theta is None or self.axes else A * self.theta[..., None, None]

    @property
    def unit(self) -> float:
        """That of the frequencies; on several axes `steps` has the units."""
        return 1.0 if self.axes else self.units[0]

    def steps(self, positions: torch.Tensor) -> torch.Tensor:
        """What ω is multiplied by, (T or B, T, 1 or H, 1 or D/b) float64: positions, or Σ_i θ_i x_i/unit_i."""
        if not self.axes:
            return positions[..., None, None]
        x = [x_i / unit for x_i, unit in zip(positions.unbind(-1), self.units)]  # (B, T) each
        if self.theta is None:
            return torch.stack(self.axes_of_blocks(x), -1).unsqueeze(2)
        x, theta = torch.stack(x, -1), self.theta.to(positions)
        return (x @ theta.flatten(1)).unflatten(-1, theta.shape[1:])

    @classmethod
    def constants(cls, layers):
        """Frames and frequencies of all layers by one batched decomposition: a layer's are Q (H, D/b, b, b) and
        ω (H, D/b, b/2) in float64 radians per token."""
        device = layers[0].P.device
        with torch.no_grad(), no_autocast(device):
            A = torch.stack([layer.generators() for layer in layers])  # (L, H, D/b, b, b)
            Q, omega = skew_canonical_form(A.to(double_device(device), torch.float64))
            return [(Q_l, omega_l / layer.unit) for layer, Q_l, omega_l in zip(layers, Q, omega)]

    def fold(self, c_attn: nn.Module, Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """c_attn's weight (3C, C) and bias with q and k in the frame: Qᵀ W_q, Qᵀ W_k."""
        C, H, b = self.n_embd, self.n_head, self.block

        def turned(w):  # (3C, …)
            qk, v = w.split((2 * C, C))
            qk = Q.mT.to(w) @ qk.reshape(2, H, C // H // b, b, -1)
            return torch.cat((qk.reshape(2 * C, *w.shape[1:]), v))

        bias = c_attn.bias
        return turned(c_attn.weight), None if bias is None else turned(bias)

    def project(self, c_attn, x, ctx):
        Q, _ = ctx.constants
        with no_autocast(x.device):
            weight, bias = self.fold(c_attn, Q)
        return linear(x, weight, bias)

    def positions(self, ctx):
        if not self.jitter:
            return ctx.positions
        noise = torch.randn(ctx.length, max(1, len(self.axes)), generator=ctx.generator(), dtype=torch.float64)
        noise = (self.jitter * noise).clamp(-0.49, 0.49)  # not half: whole positions are those without it
        if ctx.positions.is_cuda:
            noise = noise.pin_memory()  # a copy for which the host does not wait
        noise = noise.to(ctx.positions.device, non_blocking=True)
        return ctx.positions + (noise if self.axes else noise[:, 0])

    @classmethod
    def prepare(cls, layers, ctx):
        """cos and sin of the angles (T or B, T, 1, H, D/2) of each layer on one axis. On several, where every token has
        angles of its own, they are not kept for all layers: `encode` makes them."""
        if layers[0].axes:
            return None
        with torch.no_grad():
            return [
                layer.cos_sin(layer.steps(ctx.positions), omega, ctx)
                for layer, (_, omega) in zip(layers, ctx.constants)
            ]

    def cos_sin(self, steps, omega, ctx):
        angles = (steps.detach().unsqueeze(-1) * omega).flatten(-2).unsqueeze(-3)  # (T or B, T, 1, H, D/2)
        if self.axes:  # many: sine and cosine in the dtype of the pass
            angles = less_turns(angles / (2 * math.pi)).to(ctx.dtype)
        return ctx.cos_sin(angles)

    def encode(self, qk, x, ctx):
        Q, omega = ctx.constants
        with no_autocast(x.device):
            steps = self.steps(ctx.positions)
            cos, sin = self.cos_sin(steps, omega, ctx) if self.axes else ctx.prepared
            if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (self.P, self.theta)):
                return SkewTurned.apply(qk, self.generators(), steps, Q, omega, cos, sin, self.unit)
            return rotate(qk, cos, sin)

    @torch.no_grad()
    def as_rope(self, c_attn):
        if self.axes:
            raise ValueError("comrope of several axes has no equivalent as plain rope, which has one")
        Q, omega = skew_canonical_form(self.generators().to(double_device(self.P.device), torch.float64))
        return *self.fold(c_attn, Q), omega.flatten(1) / self.unit
