"""cope, urpe, stickbreaking, grape: schemes with scores or weights of their own."""

import functools
import math

import pytest
import torch
from models import BLOCK, HEADS, WIDTH, D, Largest, build, close, config, layer_context, refused, tokens

from model import GPT
from nanope import attention

DENSE = ["cope", "urpe", "stickbreaking", "grape"]


def at_start(pos, options=None):
    return GPT(config(pos, options), seed=3).double()


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def qkv(T):
    """q, k, v, (1, H, T, D) each, and x (1, T, C)."""
    return *random(3, 1, HEADS, T, D).unbind(), random(1, T, WIDTH)


def scheme(pos, options=None):
    return at_start(pos, options).transformer.h[0].attn.pos


def table_of_distances(table, T):
    """(H, length) → (H, T, T): entry m - n, 0 above the diagonal."""
    return torch.stack(
        [torch.stack([torch.cat((h[: m + 1].flip(0), h.new_zeros(T - m - 1))) for m in range(T)]) for h in table]
    )


@pytest.mark.parametrize("pos", DENSE)
def test_no_scores_of_all_queries_and_keys_exist_at_once(pos):
    """Neither forward nor backward."""
    T = 256
    model, idx = build(pos, torch.float32, block_size=T, n_layer=1), tokens(T)
    model.attend = functools.partial(attention.attend, chunk=2 * HEADS * T * 8)  # 8 queries
    with Largest() as largest:
        model(idx, idx)[1].backward()
    assert largest.elements < 2 * HEADS * T * T / 2


@pytest.mark.parametrize(("fields", "words"), [
    ({"pos": "cope", "pos_options": {"positions": 1}}, ["2 or more, not 1"]),
    ({"pos": "grape", "pos_options": {"width": 3}}, ["even and positive, not 3"]),
    ({"pos": "urpe", "pos_options": {"bias": "t5"}}, ["toeplitz"]),
])  # fmt: skip
def test_bad_options(fields, words):
    refused(fields, words)


# ---- cope


def test_cope_with_open_gates_is_a_table_of_distances():
    """Where each key counts 1, p = m - n + 1; keys beyond the table take its last entry."""
    T, P = 20, 6
    pos, (q, k, _, x) = scheme("cope", {"positions": P}), qkv(T)
    k[:], q[..., 0] = 0, 4  # z = 400 for every pair
    k[..., 0] = 100 * D**0.5
    pos.e.data = random(D, P)
    scores = pos.scores(q, k, x, slice(0, T), layer_context(pos, x))
    m, n = torch.arange(T)[:, None], torch.arange(T)
    expected = 400 + (q @ pos.e).gather(-1, (m - n + 1).clamp(0, P - 1).expand(1, HEADS, T, T))
    close(scores.tril(), expected.tril())


# ---- urpe


def test_urpe_is_two_fused_attentions():
    """Σ_± ± attend(z + B + log C^±) exp(lse^± - lse), which kernels can do that give a log-sum-exp."""
    T = BLOCK
    pos, (q, k, v, x) = scheme("urpe"), qkv(T)
    pos.B.table.data, pos.C.table.data = random(HEADS, T), 1 - 2 * random(HEADS, T).cos()
    assert (pos.C.table > 0).any() and (pos.C.table < 0).any()
    z = q @ k.mT / math.sqrt(D) + table_of_distances(pos.B.table, T)
    z = z.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    C, y = table_of_distances(pos.C.table, T), torch.zeros_like(v)
    for sign in (1, -1):
        part = z + (sign * C).clamp(min=0).log()
        lse = part.logsumexp(-1, keepdim=True)
        y = y + sign * (torch.softmax(part, -1) @ v * (lse - z.logsumexp(-1, keepdim=True)).exp()).nan_to_num()
    close(attention.attend(pos, q, k, v, x, layer_context(pos, x)), y)


def test_urpe_ends_at_its_table_unless_it_is_clipped():
    with pytest.raises(ValueError, match=f"urpe.* end at block_size {BLOCK}"):
        at_start("urpe")(tokens(BLOCK + 1))
    pos, T = scheme("urpe", {"clip": True}), 2 * BLOCK
    pos.C.table.data = random(HEADS, BLOCK)
    longer = torch.cat((pos.C.table, pos.C.table[:, -1:].expand(-1, BLOCK)), 1)
    close(pos.C(5, T).tril(T - 5), table_of_distances(longer, T)[:, -5:])


# ---- stick-breaking


def test_stickbreaking_shares_a_stick():
    """A row is what σ(z) takes of what is left, and the rest is the product of all 1 - σ(z)."""
    T, own = 9, 4
    z = (random(1, 2, T - own, T) * 3).masked_fill(torch.ones(T - own, T, dtype=torch.bool).triu(own + 1), -math.inf)
    z[..., 1] = -math.inf  # a hidden key takes nothing
    weights = scheme("stickbreaking").weights(z, None)
    for r in range(T - own):
        left = torch.ones(1, 2, dtype=torch.float64)
        for n in reversed(range(own + r)):
            close(weights[..., r, n], z[..., r, n].sigmoid() * left)
            left = left * (1 - z[..., r, n].sigmoid())
        close(weights[..., r, : own + r].sum(-1), 1 - left)
        assert not weights[..., r, own + r].any() and (left >= 0).all()
    assert not weights[..., 1].any()


def test_stickbreaking_of_extreme_scores_and_long_rows():
    pos, z = scheme("stickbreaking"), torch.full((1, 1, 2, 16384), -9.0, dtype=torch.float64)
    z += random(1, 1, 2, 16384)
    z[..., 0, -1] = -math.inf
    close(pos.weights(z.float(), None).double(), pos.weights(z, None), rtol=2e-5, atol=1e-9)
    z = torch.tensor([[[-math.inf, 1e4, -1e4, 30.0, -30.0, 0.0, 1e4]]], requires_grad=True)
    weights = pos.weights(z, None)
    close(weights[0, 0], torch.tensor([0, 0, 0, 0.5, 0.5 * math.exp(-30), 0.5, 0]), atol=1e-6)
    weights.square().sum().backward()
    assert torch.isfinite(z.grad).all() and z.grad[0, 0, 5] > 0


# ---- grape


def test_grape_turns_far_from_the_start_and_with_rope():
    """In float32 at 65,000 as in float64; and its bias is another there, since only keys turn."""
    model, idx = build("grape"), tokens(BLOCK)
    far = model.hidden(idx, offset=65000)
    assert (far - model.hidden(idx)).abs().max() > 1e-3
    close(model.float().hidden(idx, offset=65000).double(), far, atol=1e-4)
    assert torch.isfinite(at_start("rope+grape")(idx)[0]).all()
