"""LieRE, STRING and HARoPE on the one axis of text are rope with trained frequencies of each head, and no schemes of
their own. What else they train folds into W_q and W_k. Each paper's scores are written out here, in float64, and
compared with rope's on folded weights.

LieRE   2406.10322: R(m) = exp(m A), A dense and skew. A = Q (⊕ ω_i J) Qᵀ, so Qᵀ folds into W_q and W_k alike, and the
        frequencies are ω.
STRING  2502.02562: R(m) = exp(m L) with commuting skew generators, one axis: one L; or P rot(m θ) with a trained
        orthogonal P before, which folds into both.
HARoPE  a map A_h = U Σ Vᵀ of each head's q and k before rope's rotation, one for both or one each: A_h W_q
        and A_h W_k. The frequencies are rope's.
"""

import pytest
import torch
from models import WIDTH, D, close, config, layer_scores

from model import GPT
from schemes.comrope import skew_canonical_form

H, T = 3, 9
J = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def skew(seed=0):
    """(H, D, D)."""
    A = 0.3 * drawn(H, D, D, seed=seed)
    return A - A.mT


def orthogonal(seed=0):
    return torch.linalg.qr(drawn(H, D, D, seed=seed)).Q


def scores(q, k, before_q, before_k, turn):
    """(H, T, T): q_mᵀ before_qᵀ R(m)ᵀ R(n) before_k k_n of q, k (H, T, D), matrices (H, D, D), turn(m) (H, D, D)."""
    q = torch.stack([torch.einsum("hij,hj->hi", turn(m) @ before_q, q[:, m]) for m in range(T)], 1)
    k = torch.stack([torch.einsum("hij,hj->hi", turn(m) @ before_k, k[:, m]) for m in range(T)], 1)
    return (q @ k.mT).tril()


def rope_turn(m):
    angles = m * 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    c, s = angles.cos(), angles.sin()
    return torch.block_diag(*torch.stack((c, -s, s, c), -1).view(-1, 2, 2)).expand(H, D, D)


def lie(A):
    return lambda m: torch.matrix_exp(m * A)


def forms():
    """Name → (a matrix before the turn of q, one of k, the turn; folded: what goes into W_q, into W_k, frequencies)."""
    one, A, P = torch.eye(D, dtype=torch.float64).expand(H, D, D), skew(), orthogonal(seed=1)
    Q, omega = skew_canonical_form(A)  # whose Q and ω must be right, or the scores differ
    rope = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D).expand(H, -1)
    U, S, V = orthogonal(seed=2), 0.2 + drawn(H, D, 1, seed=3).abs(), orthogonal(seed=4)
    shared, other = U @ (S * V.mT), orthogonal(seed=5) @ (S.flip(1) * V.mT)
    # Commuting generators of several axes are all diagonal in one frame; one axis uses one of them
    string = P.mT @ torch.stack([torch.block_diag(*(w * J for w in row)) for row in omega]) @ P
    return {
        "LieRE": (one, one, lie(A), Q.mT, Q.mT, omega),
        "STRING, any generator": (one, one, lie(string), P, P, omega),
        "STRING, P before rope": (P, P, rope_turn, P, P, rope),
        "HARoPE, one map": (shared, shared, rope_turn, shared, shared, rope),
        "HARoPE, a map for q and one for k": (shared, other, rope_turn, shared, other, rope),
    }


@pytest.mark.parametrize("name", forms())
def test_it_folds_into_trained_frequencies(name):
    before_q, before_k, turn, fold_q, fold_k, frequencies = forms()[name]
    model = GPT(config("rope", {"explicit": True}, n_layer=1)).double()
    attn, x = model.transformer.h[0].attn, drawn(T, WIDTH, seed=6)
    with torch.no_grad():
        attn.c_attn.weight.copy_(drawn(3 * WIDTH, WIDTH, seed=7))
        attn.c_attn.bias.copy_(drawn(3 * WIDTH, seed=8))
        q, k, _ = (z.view(T, H, D).transpose(0, 1) for z in attn.c_attn(x).split(WIDTH, -1))
        expected = scores(q, k, before_q, before_k, turn)
        assert (layer_scores(attn, x) - expected).abs().max() > 1  # not before it is folded
        for rows, fold in ((slice(0, WIDTH), fold_q), (slice(WIDTH, 2 * WIDTH), fold_k)):
            for part in (attn.c_attn.weight, attn.c_attn.bias):
                part[rows] = torch.einsum("hij,hj...->hi...", fold, part[rows].unflatten(0, (H, D))).flatten(0, 1)
        attn.pos.freqs.copy_(frequencies)
        close(layer_scores(attn, x), expected, atol=1e-10 * expected.abs().max())


def test_rope_has_a_fraction():
    """Partial rotation, as in GPT-NeoX: the leading channels alone turn, the rest adds its product at any distance."""
    attn = GPT(config("rope", {"fraction": 0.5}, n_layer=1)).double().transformer.h[0].attn
    assert (attn.pos.frequencies() > 0).tolist() == [True] * (D // 4) + [False] * (D // 4)
