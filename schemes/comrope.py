"""Yu et al., CVPR 2025, 2506.03737, on the one axis that text has: R(m) = exp((m/unit) A), A block-diagonal and
skew-symmetric, trained per layer and head, the same for q and k.

Every skew A is Q (⊕ ω_k J) Qᵀ, so this is RoPE with trained frequencies ω/unit in a trained orthonormal frame Q. The
frame is folded into the Q and K projections, and the rest costs what RoPE costs.
"""

import math
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanope.ops import double_device, linear, no_autocast, rope_frequencies, rotate, wide
from schemes.base import Scheme


def svd_of_small(M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S, Vᵀ of M (..., n, n), S ≥ 0 in no order. 1×1 and 2×2 are in closed form, which unlike torch.linalg.svd never
    makes a CUDA device wait for the host. For n = 4, the default block of 8, that happens once an optimizer step."""
    if M.size(-1) > 2:
        return torch.linalg.svd(M)
    if M.size(-1) == 1:
        return torch.where(M < 0, -1.0, 1.0).to(M), M.abs()[..., 0], torch.ones_like(M)
    # M = r·rot(α) + s·rot(β)·diag(1, -1) has the singular values r + s and r - s; its rotations are by half sums and
    # half differences of the angles
    (a, b), (c, d) = (row.unbind(-1) for row in M.unbind(-2))
    alpha, beta = torch.atan2(c - b, a + d), torch.atan2(c + b, a - d)
    r, s = torch.hypot(a + d, c - b) / 2, torch.hypot(a - d, c + b) / 2

    def rotation(angle):
        cos, sin = angle.cos(), angle.sin()
        return torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))

    signs = torch.stack((torch.ones_like(r), torch.where(r < s, -1.0, 1.0).to(r)), -1)
    return (
        rotation((alpha + beta) / 2) * signs.unsqueeze(-2),
        torch.stack((r + s, (r - s).abs()), -1),
        rotation((alpha - beta) / 2),
    )


def skew_canonical_form(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A = Q (⊕_k ω_k [[0, -1], [1, 0]]) Qᵀ for skew-symmetric A (..., b, b), b even: Q (..., b, b) orthogonal,
    ω (..., b/2) ≥ 0, in A's dtype. No gradient.

    Householder reflections make A tridiagonal; its even and odd rows then meet only in a (b/2, b/2) matrix
    whose singular values are the frequencies (Golub & Kahan; Ward & Gray 1978). Unlike an eigenproblem of iA
    or of A², this is real arithmetic and backward stable also where frequencies coincide or vanish.
    """
    with torch.no_grad():
        b = A.size(-1)
        A = A.detach().clone()
        Q = torch.eye(b, dtype=A.dtype, device=A.device).expand_as(A).clone()
        for k in range(b - 2):
            x = A[..., k + 1 :, k]  # the column below the diagonal, to become a multiple of e_1
            norm = x.norm(dim=-1, keepdim=True)
            first = x[..., :1]
            v = torch.cat((first + torch.where(first < 0, -norm, norm), x[..., 1:]), -1)
            v = v / v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
            v = F.pad(v, (k + 1, 0)).unsqueeze(-1)  # (..., b, 1); H = I - 2 v vᵀ
            A = A - 2 * v @ (v.mT @ A)
            A = A - 2 * (A @ v) @ v.mT
            Q = Q - 2 * (Q @ v) @ v.mT
        # A maps even coordinates to odd ones by M and odd to even by -Mᵀ:
        # M = U S Vᵀ gives A v_k = s_k u_k, A u_k = -s_k v_k
        U, omega, Vh = svd_of_small(A[..., 1::2, 0::2])
        frame = torch.stack((Q[..., 0::2] @ Vh.mT, Q[..., 1::2] @ U), -1).flatten(-2)  # columns v_0 u_0 v_1 u_1 …
        return frame, omega


class SkewGradient(torch.autograd.Function):
    """Identity on y, with the gradient of the skew generators A that the constant frame leaves out.

    y (B, T, 2, H, D) are q and k in the frame Q in which R(m) = exp(m A/unit) is plain rotation by mω. The
    caller treats Q and ω as constants; here dL/dA comes from the derivative of the matrix exponential itself,
        Qᵀ dR(m) Q = rot(mω) X(m),  X(m) = ∫_0^m rot(-sω) (Qᵀ dA Q / unit) rot(sω) ds
    (Daleckii–Krein; the outer Q drops out, since scores are invariant to an orthogonal map of both q and k). With
    g = dL/dy, dL = Σ_m <M_m, X(m)>, M_m = Σ_batch g yᵀ. Between channel pairs k and l, the part of M_m that is linear
    over the complex numbers turns by s(ω_k - ω_l), the conjugate-linear part by s(ω_k + ω_l), and the integral of a
    turn is W_m(δ) = ∫_0^m e^{isδ} ds = (2 sin(mδ/2)/δ) e^{imδ/2}, m where δ = 0: exact also where frequencies
    coincide or vanish.
    """

    @staticmethod
    def forward(ctx, y, A, Q, omega, unit, dtype, positions):
        # y (B, T, 2, H, D); A, Q (H, D/b, b, b); omega (H, D/b, b/2) float64, radians per token; positions (T,) float64
        ctx.save_for_backward(y, Q, omega, positions)
        ctx.unit, ctx.dtype, ctx.A_dtype = unit, dtype, A.dtype
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, Q, omega, positions = ctx.saved_tensors
        T, dtype = y.size(1), ctx.dtype
        # One product of views for each block of q and of k, (B, 2 T H D/b, b): nothing is copied
        g_blocks, y_blocks = (z.to(dtype).flatten(1).unflatten(1, (-1, Q.size(-1))) for z in (g, y))
        with no_autocast(g.device):  # which is still on where backward is called inside it
            M = torch.bmm(g_blocks.permute(1, 2, 0), y_blocks.transpose(0, 1))
        M = M.view(T, 2, *Q.shape).sum(1)  # (T, H, D/b, b, b)
        # Entries of pairs' 2×2 blocks, (T, H, D/b, b/2, b/2) each
        p, q, r, s = (M[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        m = positions.view(-1, 1, 1, 1, 1)

        def integrated(re, im, delta):
            """Σ_m (re + i im)_m W_m(δ), δ (H, D/b, b/2, b/2): its real and imaginary part."""
            turns = m * (delta / (4 * math.pi))
            half = ((turns - turns.round()) * (2 * math.pi)).to(
                re
            )  # mδ/2 less whole turns: exact in float64, cheap below
            delta, sin = delta.to(re), half.sin()
            length = torch.where(delta == 0, m.to(re), 2 * sin / delta)
            cos, sin = length * half.cos(), length * sin
            return ((re * cos - im * sin).sum(0) / 2).to(Q), ((re * sin + im * cos).sum(0) / 2).to(Q)

        rows, columns = omega.unsqueeze(-1), omega.unsqueeze(-2)
        a, b = integrated(p + s, r - q, rows - columns)
        c, d = integrated(p - s, r + q, rows + columns)
        E = torch.stack((a + c, d - b, b + d, a - c), -1).unflatten(-1, (2, 2))  # [[a, -b], [b, a]] + [[c, d], [d, -c]]
        E = E.transpose(-3, -2).reshape(Q.shape)
        return g, (Q @ E @ Q.mT / ctx.unit).to(g.device, ctx.A_dtype), None, None, None, None, None


class ComRoPE(Scheme):
    """`comrope`. Options:

    kind `ap`, A = P - Pᵀ, or `ld`, A = θ (P - Pᵀ) with a trained multiplier θ per block and head; in `ld-shared` θ is
    the same for all heads, as in the authors' code. block, the block size b. init `rope`, with RoPE's frequencies (of
    `base`) at the start, or `gaussian`, the paper's P ~ N(0, 1) and θ ~ N(0, 1), which else starts at 1. unit, the
    tokens in which the angle of a frequency 1 is one radian (default: block_size when the model is made; the paper's
    coordinates in [0, 1] are the training length).
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
        unit: float | None = None,
    ):
        super().__init__(config, layer)
        self.block, self.init, self.base, self.unit = block, init, base, unit
        if self.head_width % block:
            raise ValueError(f"comrope's block {block} must divide the head width n_embd/n_head = {self.head_width}")
        if base <= 0 or unit <= 0:
            raise ValueError(f"comrope's base ({base}) and unit ({unit}) must be positive")
        blocks = self.head_width // block
        self.P = nn.Parameter(torch.empty(self.n_head, blocks, block, block))
        heads = 1 if kind == "ld-shared" else self.n_head
        self.theta = None if kind == "ap" else nn.Parameter(torch.empty(heads, blocks))

    @classmethod
    def complete_options(cls, options, config):
        return {**options, "unit": float(config.block_size) if options["unit"] is None else options["unit"]}

    def initial(self, name, shape, normal):
        if self.init == "gaussian":
            return normal(1.0)
        if name == "theta":
            return torch.ones(shape)
        frequencies = rope_frequencies(self.head_width, self.base).view(-1, self.block // 2)  # (D/b, b/2)
        P = torch.zeros(shape[1:], dtype=torch.float64)
        even = torch.arange(0, self.block, 2)
        P[:, even + 1, even] = frequencies * self.unit / 2  # A = P - Pᵀ = 2P
        P[:, even, even + 1] = -frequencies * self.unit / 2
        return P.expand(shape)

    def generators(self) -> torch.Tensor:
        """The skew-symmetric A, (H, D/b, b, b)."""
        P = self.P.to(wide(self.P.dtype))
        A = P - P.mT
        return A if self.theta is None else A * self.theta[..., None, None]

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

    def encode(self, qk, x, ctx):
        Q, omega = ctx.constants
        if torch.is_grad_enabled() and self.P.requires_grad:
            with no_autocast(x.device):
                A = self.generators()
            qk = SkewGradient.apply(qk, A, Q, omega, self.unit, ctx.dtype, ctx.positions)
        frequencies = omega.flatten(1)  # (H, D/2)
        return rotate(qk, *ctx.cos_sin(ctx.positions.view(-1, 1, 1, 1) * frequencies))

    @torch.no_grad()
    def as_rope(self, c_attn):
        Q, omega = skew_canonical_form(self.generators().to(double_device(self.P.device), torch.float64))
        return *self.fold(c_attn, Q), omega.flatten(1) / self.unit
