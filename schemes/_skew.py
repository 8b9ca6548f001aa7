"""Skew-symmetric matrices A = Q (⊕_k ω_k J) Qᵀ and their exponentials, which comrope trains."""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanope.ops import kind_of, no_autocast, turned, turns, widens

SWEEPS = 6  # of Jacobi's rotations. In float64 5 were enough for 20,000 hard 4×4, whose values coincide or vanish


def reflection(x: torch.Tensor, size: int) -> torch.Tensor:
    """H (..., size, size), symmetric and orthogonal, that maps a column whose last entries are x (..., n) to one in
    which only the first of these is left. The entries before stay. Where x = 0, H = I."""
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(-1, keepdim=True).clamp_min(
        tiny
    )  # else squares of a rounding error's rounding error underflow
    norm, first = x.norm(dim=-1, keepdim=True), x[..., :1]
    v = torch.cat((first + torch.where(first < 0, -norm, norm), x[..., 1:]), -1)
    v = v / v.norm(dim=-1, keepdim=True).clamp_min(tiny)
    v = F.pad(v, (size - x.size(-1), 0)).unsqueeze(-1)
    return torch.eye(size, dtype=x.dtype, device=x.device) - 2 * v * v.mT


def svd_of_small(M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S, V of M = U diag(S) Vᵀ (..., n, n), n = 1, 2 or 4 (8 to 1e-8), S ≥ 0 in no order.

    One-sided Jacobi: rotations of two columns at a time make the columns of M V orthogonal. Reflections then make U of
    them, where columns vanish too. A fixed number of these, unlike torch.linalg.svd, never makes the host wait for a
    GPU, to ask it whether it has converged.
    """
    n = M.size(-1)
    X = torch.cat((M, torch.eye(n, dtype=M.dtype, device=M.device).expand_as(M)), -2)  # M V above V
    for _ in range(SWEEPS * (n - 1)):  # in n - 1 rounds every column meets every other
        gram = X[..., :n, :].mT @ X[..., :n, :]
        norms, product = gram.diagonal(dim1=-2, dim2=-1), gram.diagonal(n // 2, -2, -1)  # column i meets i + n/2
        excess = norms[..., : n // 2] - norms[..., n // 2 :]
        angle = torch.atan2(2 * torch.copysign(product, product * excess), excess.abs()).unsqueeze(-2) / 2  # ≤ π/4
        cos, sin = angle.cos(), angle.sin()
        a, b = X.chunk(2, -1)
        a, b = a * cos + b * sin, b * cos - a * sin
        round_robin = (a[..., :1], b[..., :1], a[..., 1:-1], b[..., 1:], a[..., -1:])
        X = torch.cat(round_robin if n > 2 else (a, b), -1)
    order = X[..., :n, :].norm(dim=-2).argsort(-1, descending=True)  # columns that vanish are last: G becomes diagonal
    G, V = X.gather(-1, order.unsqueeze(-2).expand_as(X)).split(n, -2)
    U = torch.eye(n, dtype=M.dtype, device=M.device).expand_as(M)
    for k in range(n - 1):
        H = reflection(G[..., k:, k], n)
        G, U = H @ G, U @ H
    S = G.diagonal(dim1=-2, dim2=-1)
    return U * torch.where(S < 0, -1.0, 1.0).to(M).unsqueeze(-2), S.abs(), V


def skew_canonical_form(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A = Q (⊕_k ω_k [[0, -1], [1, 0]]) Qᵀ for skew-symmetric A (..., b, b), b even: Q (..., b, b) orthogonal,
    ω (..., b/2) ≥ 0, in A's dtype. No gradient.

    Householder reflections make A tridiagonal; its even and odd rows then meet only in a (b/2, b/2) matrix
    whose singular values are the frequencies (Golub & Kahan; Ward & Gray 1978). Unlike an eigenproblem of iA
    or of A², this is real arithmetic and backward stable also where frequencies coincide or vanish.
    """
    with torch.no_grad():
        b, A = A.size(-1), A.detach()
        Q = torch.eye(b, dtype=A.dtype, device=A.device).expand_as(A)
        for k in range(b - 2):
            H = reflection(A[..., k + 1 :, k], b)  # the column below the diagonal
            A, Q = H @ A @ H, Q @ H
        # A maps even coordinates to odd ones by M and odd to even by -Mᵀ:
        # M = U S Vᵀ gives A v_k = s_k u_k, A u_k = -s_k v_k
        U, omega, V = svd_of_small(A[..., 1::2, 0::2])
        frame = torch.stack((Q[..., 0::2] @ V, Q[..., 1::2] @ U), -1).flatten(-2)  # columns v_0 u_0 v_1 u_1 …
        return frame, omega


CHUNK = 2**25  # entries of M below that exist at once where m differs between texts: 128 MB in float32


def less_turns(turns: torch.Tensor) -> torch.Tensor:
    """Angles in radians, between -π and π, of a number of turns."""
    return (turns - turns.round()) * (2 * math.pi)


def outer(g: torch.Tensor, z: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Σ g zᵀ over texts and over q and k, of g, z (B, T, 2, H, D) in blocks of `shape` (H, D/b, b, b): (T, *shape)."""
    B, T = z.shape[:2]
    # Outer products take a third of bmm's time of one text. Compiled for a GPU they read g and z as they are, once
    if B == 1 or (kind_of(g.device) != "cpu" and torch.compiler.is_compiling()):
        g, z = (t.to(dtype).view(B, T, 2, *shape[:-1]) for t in (g, z))
        return (g.unsqueeze(-1) * z.unsqueeze(-2)).sum((0, 2))  # (T, H, D/b, b, b)
    # One product of views for each block of q and of k, (B, 2 T H D/b, b): nothing is copied
    with no_autocast(g.device):  # which is still on where backward is called inside it
        if widens(g) and g.dtype == z.dtype:
            g, z = (t.flatten(1).unflatten(1, (-1, shape[-1])) for t in (g, z))
            M = torch.bmm(g.permute(1, 2, 0), z.transpose(0, 1), out_dtype=dtype)
        else:
            g, z = (t.to(dtype).flatten(1).unflatten(1, (-1, shape[-1])) for t in (g, z))
            M = torch.bmm(g.permute(1, 2, 0), z.transpose(0, 1))
    return M.view(T, 2, *shape).sum(1)


class SkewTurned(torch.autograd.Function):
    """R(m) y with R(m) = exp(m A/unit), in the frame in which that is a plain rotation, with the gradients of the skew
    generators A and of m.

    y (B, T, 2, H, D) are q and k in the frame Q. cos and sin are of the angles mω, (T or B, T, 1, H, D/2). The caller
    treats Q, ω and m as constants; here dL/dA comes from the derivative of the matrix exponential itself,
        Qᵀ dR(m) Q = Y(m) rot(mω),  Y(m) = ∫_0^m rot(sω) (Qᵀ dA Q / unit) rot(-sω) ds
    (Daleckii–Krein; the outer Q drops out, since scores are invariant to an orthogonal map of both q and k). With
    g = dL/dz of the turned z, dL = Σ_m <M_m, Y(m)>, M_m = Σ_batch g zᵀ. So z is enough, which attention keeps anyway.
    Between channel pairs k and l, the part of M_m that is linear over the complex numbers turns by -s(ω_k - ω_l), the
    conjugate-linear part by -s(ω_k + ω_l), and the integral of a turn is W_m(δ) = ∫_0^m e^{-isδ} ds =
    (2 sin(mδ/2)/δ) e^{-imδ/2}, m where δ = 0: exact also where frequencies coincide or vanish. And dL/dm =
    Σ_k ω_k <M_m, J> over the channel pairs k. Where m differs between the texts of a batch, tokens and not positions
    are summed over.
    """

    @staticmethod
    def forward(ctx, y, A, m, Q, omega, cos, sin, unit):
        # A, Q (H, D/b, b, b); omega (H, D/b, b/2) float64, radians where m = 1; m float64, (T or B, T, 1 or H, 1 or
        # D/b)
        by = turns(cos, sin)
        z = turned(y, by)
        ctx.save_for_backward(z, m, Q, omega, *by)
        ctx.unit, ctx.dtype, ctx.A_dtype = unit, cos.dtype, A.dtype
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        z, m, Q, omega, *by = ctx.saved_tensors
        gradient, shape, rows = turned(g, by, back=True), m.shape, z.size(1)
        if m.dim() == 4:  # one text of all B·T tokens, some at a time
            g, z, m = g.flatten(0, 1).unsqueeze(0), z.flatten(0, 1).unsqueeze(0), m.flatten(0, 1)
            rows = max(1, CHUNK // Q.numel())
        pieces = zip(g.split(rows, 1), z.split(rows, 1), m.split(rows))
        parts = [SkewTurned.part(ctx, *piece, Q, omega) for piece in pieces]
        E = sum((E for E, _ in parts[1:]), start=parts[0][0])
        slope = torch.cat([slope for _, slope in parts]).view(shape) if ctx.needs_input_grad[2] else None
        return gradient, (Q @ E @ Q.mT / ctx.unit).to(g.device, ctx.A_dtype), slope, None, None, None, None, None

    @staticmethod
    def part(ctx, g, z, m, Q, omega):
        """Of g, z (B, T, 2, H, D) and m (T, 1 or H, 1 or D/b): Qᵀ dL/dA Q · unit (H, D/b, b, b), and dL/dm as m."""
        M = outer(g, z, Q.shape, ctx.dtype)
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
            cos, sin = length * half.cos(), -length * sin
            return ((re * cos - im * sin).sum(0) / 2).to(Q), ((re * sin + im * cos).sum(0) / 2).to(Q)

        rows, columns = omega.unsqueeze(-1), omega.unsqueeze(-2)
        a, b = integrated(p + s, r - q, rows - columns)
        c, d = integrated(p - s, r + q, rows + columns)
        E = torch.stack((a + c, d - b, b + d, a - c), -1).unflatten(-1, (2, 2))  # [[a, -b], [b, a]] + [[c, d], [d, -c]]
        return E.transpose(-3, -2).reshape(Q.shape), slope
