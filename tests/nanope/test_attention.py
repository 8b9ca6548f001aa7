"""nanope/attention.py: a bias by FlexAttention and by dense chunks of queries."""

import pytest
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from models import HEADS, WIDTH, D, Largest, build, close, layer_context, tokens

from nanope import attention


def test_bias_by_flex_attention_equals_the_dense_path(monkeypatch):
    """What a GPU runs, here uncompiled on the CPU: the same bias, as FlexAttention's score_mod."""
    pos, x = build("alibi", torch.float32).transformer.h[0].attn.pos, torch.randn(2, 40, WIDTH)
    q, k, v = torch.randn(3, 2, HEADS, 40, D)
    dense = attention.attend(pos, q, k, v, x, layer_context(pos, x))
    monkeypatch.setattr(attention, "compiled_flex_attention", lambda: flex.flex_attention)
    block_mask = attention.causal_block_mask(40, 0, x.device)
    fast = attention.attend(pos, q, k, v, x, layer_context(pos, x, block_mask=block_mask))
    close(fast, dense, atol=2e-5)
    assert not torch.allclose(fast, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-2)


@pytest.mark.parametrize("rows", [1, 7])
def test_dense_bias_by_chunks_of_any_size(rows):
    """7 queries at a time do not divide the 40 that there are."""
    pos, x = build("alibi").transformer.h[0].attn.pos, torch.randn(2, 40, WIDTH, dtype=torch.float64)
    q, k, v = torch.randn(3, 2, HEADS, 40, D, dtype=torch.float64)
    whole = attention.attend(pos, q, k, v, x, layer_context(pos, x))
    close(attention.attend(pos, q, k, v, x, layer_context(pos, x), chunk=rows * HEADS * 40), whole, atol=1e-12)


def test_dense_bias_in_several_chunks_of_queries():
    """1,500² scores of 8 heads exceed the 2^24 elements that may exist at once; a prefix of 1,400 does not.

    Also after a cache.
    """
    model = build("alibi", torch.float32, n_layer=1, n_head=8, n_embd=32)
    x = tokens(1500, B=1)
    with torch.no_grad(), Largest() as largest:
        full = model(x)[0]
    assert largest.elements <= attention.CHUNK < 8 * 1500**2
    close(full[:, :1400], model(x[:, :1400])[0], atol=1e-4)
    caches = [{}]
    model.hidden(x[:, :10], caches)
    close(model.lm_head(model.hidden(x[:, 10:], caches)), full[:, 10:], atol=1e-4)
