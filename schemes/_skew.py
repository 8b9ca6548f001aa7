"""Skew-symmetric matrices A = Q (⊕_k ω_k J) Qᵀ and their exponentials, which comrope trains."""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanope.ops import no_autocast


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


CHUNK = 2**25  # entries of M below that exist at once where m differs between texts: 128 MB in float32


def less_turns(turns: torch.Tensor) -> torch.Tensor:
    """Angles in radians, between -π and π, of a number of turns."""
    return (turns - turns.round()) * (2 * math.pi)


class SkewGradient(torch.autograd.Function):
    """Identity on y, with the gradients of the skew generators A and of m that constant frames and angles leave out.

    y (B, T, 2, H, D) are q and k in the frame Q in which R(m) = exp(m A/unit) is plain rotation by mω. The
    caller treats Q, ω and m as constants; here dL/dA comes from the derivative of the matrix exponential itself,
        Qᵀ dR(m) Q = rot(mω) X(m),  X(m) = ∫_0^m rot(-sω) (Qᵀ dA Q / unit) rot(sω) ds
    (Daleckii–Krein; the outer Q drops out, since scores are invariant to an orthogonal map of both q and k). With
    g = dL/dy, dL = Σ_m <M_m, X(m)>, M_m = Σ_batch g yᵀ. Between channel pairs k and l, the part of M_m that is linear
    over the complex numbers turns by s(ω_k - ω_l), the conjugate-linear part by s(ω_k + ω_l), and the integral of a
    turn is W_m(δ) = ∫_0^m e^{isδ} ds = (2 sin(mδ/2)/δ) e^{imδ/2}, m where δ = 0: exact also where frequencies
    coincide or vanish. And dL/dm = Σ_k ω_k <M_m, J> over the channel pairs k. Where m differs between the texts of a
    batch, tokens and not positions are summed over.
    """

    @staticmethod
    def forward(ctx, y, A, m, Q, omega, unit, dtype):
        # y (B, T, 2, H, D); A, Q (H, D/b, b, b); omega (H, D/b, b/2) float64, radians where m = 1; m float64,
        # (T or B, T, 1 or H, 1 or D/b)
        ctx.save_for_backward(y, m, Q, omega)
        ctx.unit, ctx.dtype, ctx.A_dtype = unit, dtype, A.dtype
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, m, Q, omega = ctx.saved_tensors
        gradient, shape, rows = g, m.shape, y.size(1)
        if m.dim() == 4:  # one text of all B·T tokens, some at a time
            g, y, m = g.flatten(0, 1).unsqueeze(0), y.flatten(0, 1).unsqueeze(0), m.flatten(0, 1)
            rows = max(1, CHUNK // Q.numel())
        parts = [
            SkewGradient.part(ctx, *part, Q, omega) for part in zip(g.split(rows, 1), y.split(rows, 1), m.split(rows))
        ]
        E = sum((E for E, _ in parts[1:]), start=parts[0][0])
        slope = torch.cat([slope for _, slope in parts]).view(shape) if ctx.needs_input_grad[2] else None
        return gradient, (Q @ E @ Q.mT / ctx.unit).to(g.device, ctx.A_dtype), slope, None, None, None, None

    @staticmethod
    def part(ctx, g, y, m, Q, omega):
        """Of g, y (B, T, 2, H, D) and m (T, 1 or H, 1 or D/b): Qᵀ dL/dA Q · unit (H, D/b, b, b), and dL/dm as m."""
        T, dtype = y.size(1), ctx.dtype
        # One product of views for each block of q and of k, (B, 2 T H D/b, b): nothing is copied
        g_blocks, y_blocks = (z.to(dtype).flatten(1).unflatten(1, (-1, Q.size(-1))) for z in (g, y))
        if y.size(0) == 1:  # outer products, for which bmm takes three times as long
            g_blocks, y_blocks = (z.reshape(T, 2, *Q.shape[:-1]) for z in (g_blocks, y_blocks))
            M = (g_blocks.unsqueeze(-1) * y_blocks.unsqueeze(-2)).sum(1)  # (T, H, D/b, b, b)
        else:
            with no_autocast(g.device):  # which is still on where backward is called inside it
                M = torch.bmm(g_blocks.permute(1, 2, 0), y_blocks.transpose(0, 1))
            M = M.view(T, 2, *Q.shape).sum(1)
        # Entries of pairs' 2×2 blocks, (T, H, D/b, b/2, b/2) each
        p, q, r, s = (M[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        slope = None
        if ctx.needs_input_grad[2]:
            slope = ((r - q).diagonal(dim1=-2, dim2=-1).to(omega) * omega).sum(-1).sum_to_size(m.shape)
        m = m[..., None, None]

        def integrated(re, im, delta):
            """Σ_m (re + i im)_m W_m(δ), δ (H, D/b, b/2, b/2): its real and imaginary part."""
            half = less_turns(m * (delta / (4 * math.pi))).to(re)  # mδ/2: exact in float64, cheap below
            delta, sin = delta.to(re), half.sin()
            length = torch.where(delta == 0, m.to(re), 2 * sin / delta)
            cos, sin = length * half.cos(), length * sin
            return ((re * cos - im * sin).sum(0) / 2).to(Q), ((re * sin + im * cos).sum(0) / 2).to(Q)

        rows, columns = omega.unsqueeze(-1), omega.unsqueeze(-2)
        a, b = integrated(p + s, r - q, rows - columns)
        c, d = integrated(p - s, r + q, rows + columns)
        E = torch.stack((a + c, d - b, b + d, a - c), -1).unflatten(-1, (2, 2))  # [[a, -b], [b, a]] + [[c, d], [d, -c]]
        return E.transpose(-3, -2).reshape(Q.shape), slope
