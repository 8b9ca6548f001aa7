"""Schemes beside an independent implementation, x-transformers (lucidrains, MIT), where both can be asked.

Biases:
    alibi  AlibiPositionalBias: equal
    t5     RelativePositionBias, causal: equal at scale 1. Attention there multiplies the bias by √D, after T5, whose
           scores are not divided by √D
    fox    DataDependentAlibi: equal up to the rounding of sums. Its gates' bias starts at 5, ours at 0
Scores:
    cope   CoPE: equal up to rounding, with all gradients. Its table has 16 positions where none are given, ours 64. Its
           further forms, talking heads and a softmax over positions in place of interpolation, ours has not
    rope   RotaryEmbedding: equal up to its angles, which are float32 in a float64 model too
    xpos   the same with use_xpos: equal. Its powers are around half of the length, so that those of 74,000 tokens at
           scale 512 are infinite. Ours move along with a cache
    pope   PolarEmbedding and apply_polar_pos_emb: equal up to float32, in which it computes. There all real parts come
           before all imaginary parts, here they are neighbours. Its bias_uniform_init is a RuntimeError of torch

x-transformers has no KERPLE, FIRE or CABLE. Its DynamicPositionBias, an MLP of the distance, is no FIRE: the distance
is not normalised by the query's position.
"""

import pytest
import torch
from models import BLOCK, HEADS, WIDTH, D, build, close, layer_context

from nanope import pairs

pytestmark = pytest.mark.slow  # the import
T = 3 * BLOCK


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("x_transformers.x_transformers")


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def ours(pos, x):
    """(B or 1, H, T, T) bias of a layer with the normed input x (B, T, C), 0 where a key is hidden."""
    bias = pos.bias(x, None, None, layer_context(pos, x))(*pairs.indices(x.size(0), HEADS, 0, T, 0, x.device))
    return bias.view(-1, HEADS, T, T).tril()


@pytest.fixture
def x():
    return drawn(2, T, WIDTH)


def layer(case, dtype=torch.float64):
    return build(case, dtype).transformer.h[0].attn.pos


# ---- biases


def test_alibi(theirs, x):
    close(
        ours(layer("alibi"), x)[0], theirs.AlibiPositionalBias(HEADS)(T, T).double().tril().view(HEADS, T, T), atol=1e-5
    )


@pytest.mark.parametrize("case, buckets, longest", [("t5", 32, 128), ("t5 own", 8, 11)])
def test_t5(theirs, x, case, buckets, longest):
    pos = layer(case)
    other = theirs.RelativePositionBias(1.0, True, buckets, longest, HEADS).double()
    other.relative_attention_bias.weight.data = pos.table.data
    assert torch.equal(ours(pos, x)[0], other(T, T).tril())


@pytest.mark.parametrize("case", ["fox", "fox start"])
def test_fox(theirs, x, case):
    pos = layer(case)
    other = theirs.DataDependentAlibi(WIDTH, HEADS).double()
    other.to_forget_gates[0].load_state_dict(pos.gate.state_dict())
    close(ours(pos, x), other(x).tril(), atol=1e-12)


# ---- scores


@pytest.mark.parametrize("case", ["cope", "cope positions"])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_cope(theirs, case, dtype, atol):
    """Values, and gradients of queries, keys and the table."""
    pos, (q, k) = layer(case, dtype), drawn(2, 2, HEADS, T, D).to(dtype).unbind()
    other = theirs.CoPE(D, HEADS, pos.e.size(1)).to(dtype)
    other.pos_emb.data = pos.e.data.mT.clone()
    q.requires_grad_(), k.requires_grad_()
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    found = pos.scores(q, k, q[:, 0], slice(0, T), layer_context(pos, q[:, 0])).tril()
    z = (q @ k.mT / D**0.5).masked_fill(hidden, -torch.finfo(dtype).max)
    expected = (z + other(q, z)).tril()
    close(found, expected, atol=atol)
    g = drawn(*found.shape).to(dtype)
    gradients = [torch.autograd.grad(y, (q, k, e), g) for y, e in ((found, pos.e), (expected, other.pos_emb))]
    for a, b in zip(gradients[0], (*gradients[1][:2], gradients[1][2].mT)):
        close(a, b, atol=50 * atol)


@pytest.mark.parametrize("case", ["rope", "rope base fraction", "xpos", "xpos base scale", "pope", "pope base uniform"])
def test_turned_queries_and_keys(theirs, case):
    """By the scores (B, H, T, T) that they make."""
    pos, qk, at = layer(case), drawn(2, T, 2, HEADS, D), torch.arange(T)
    y = pos.encode(qk, qk[:, :, 0].flatten(2), layer_context(pos, qk[:, :, 0].flatten(2))).detach()
    q, k = qk.permute(2, 0, 3, 1, 4)  # (B, H, T, D)
    if case.startswith("pope"):
        other = theirs.PolarEmbedding(D, HEADS, base=pos.base)
        other.learned_bias.data = pos.delta.data.float().unsqueeze(1)
        angles, delta = (z.detach() for z in other(at))
        q, k = theirs.apply_polar_pos_emb(q, angles), theirs.apply_polar_pos_emb(k, angles + delta)
    else:
        xpos = {"use_xpos": True, "scale_base": pos.decay_scale} if case.startswith("xpos") else {}
        angles, scale = theirs.RotaryEmbedding(round(pos.fraction * D), base=pos.base, **xpos)(at)
        q, k = theirs.apply_rotary_pos_emb(q, angles, scale), theirs.apply_rotary_pos_emb(k, angles, scale**-1)
    expected = (q @ k.mT).tril()
    found = torch.einsum("bmhd,bnhd->bhmn", *y.unbind(2)).tril()
    close(found, expected, atol=1e-5 * expected.abs().max())
