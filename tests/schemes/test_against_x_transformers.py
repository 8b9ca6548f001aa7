"""Biases beside an independent implementation, x-transformers (lucidrains, MIT), where both can be asked.

    alibi  AlibiPositionalBias: equal
    t5     RelativePositionBias, causal: equal at scale 1. Attention there multiplies the bias by √D, after T5, whose
           scores are not divided by √D
    fox    DataDependentAlibi: equal up to the rounding of sums. Its gates' bias starts at 5, ours at 0

x-transformers has no KERPLE, FIRE or CABLE. Its DynamicPositionBias, an MLP of the distance, is no FIRE: the distance
is not normalised by the query's position.
"""

import pytest
import torch
from models import BLOCK, HEADS, WIDTH, build, close, layer_context

from nanope import attention

pytestmark = pytest.mark.slow  # the import
T = 3 * BLOCK


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("x_transformers.x_transformers")


def ours(pos, x):
    """(B or 1, H, T, T) bias of a layer with the normed input x (B, T, C), 0 where a key is hidden."""
    bias = pos.bias(x, None, None, layer_context(pos, x))(*attention.indices(x.size(0), HEADS, 0, T, 0, x.device))
    return bias.view(-1, HEADS, T, T).tril()


@pytest.fixture
def x():
    return torch.randn(2, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def layer(case):
    return build(case).transformer.h[0].attn.pos


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
