"""nanope/attention.py: a bias by FlexAttention and by dense chunks of queries; attention weights."""

import pytest
import reference
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from models import (
    BLOCK,
    HEADS,
    LAYERS,
    WIDTH,
    D,
    Largest,
    all_cases_fast_without_options,
    build,
    close,
    layer_context,
    tokens,
)

from nanope import attention


@pytest.mark.slow
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


# ---- weights_of


@all_cases_fast_without_options
@pytest.mark.parametrize("window", [0, 5])
def test_attention_weights_are_the_references(case, window):
    """Of a whole pass; and of the last tokens behind a cache, after which the cache goes on as ever."""
    model, idx = build(case, window=window), tokens(BLOCK)
    with torch.no_grad():
        logits, expected = reference.logits_and_weights(model.config, dict(model.named_parameters()), idx)
        for found, weights in zip(attention.weights_by_layer(model, idx), expected, strict=True):
            close(found, weights)
        caches = [{} for _ in range(LAYERS)]
        model.hidden(idx[:, :4], caches)
        for found, weights in zip(attention.weights_by_layer(model, idx[:, 4:9], caches), expected, strict=True):
            close(found, weights[:, :, 4:9, :9])
        close(model.lm_head(model.hidden(idx[:, 9:], caches)), logits[:, 9:])


@all_cases_fast_without_options
def test_attention_weights_in_documents_are_those_of_each_alone(case):
    model, idx = build(case, document_mask=True, eot=7), tokens(BLOCK, B=1)
    idx[idx == 7] = 8
    idx[0, 4] = 7
    parts = attention.weights_by_layer(model, idx[:, :5]), attention.weights_by_layer(model, idx[:, 5:])
    for found, first, second in zip(attention.weights_by_layer(model, idx), *parts, strict=True):
        close(found[:, :, :5, :5], first)
        close(found[:, :, 5:, 5:], second)
        assert not found[:, :, 5:, :5].any() and not found.triu(1).any()


@pytest.mark.slow
def test_weights_of_many_keys_in_float32_and_by_chunks():
    """300 keys are more than the kernel is asked about at a time."""
    for case in ("rope", "alibi"):
        model, idx = build(case, torch.float32), tokens(300)
        plain, found = model(idx)[0], attention.weights_by_layer(model, idx)
        assert all((weights.sum(-1) - 1).abs().max() < 1e-5 for weights in found)
        exact = attention.weights_by_layer(model.double(), idx)
        for weights, other in zip(found, exact, strict=True):
            close(weights.double(), other, atol=2e-4)
        close(plain.double(), model(idx)[0], atol=1e-2)
        pos, x = model.transformer.h[0].attn.pos, torch.randn(2, 40, WIDTH, dtype=torch.float64)
        q, k, v = torch.randn(3, 2, HEADS, 40, D, dtype=torch.float64)
        by_chunks = attention.weights_of(pos, q, k, x, layer_context(pos, x), window=9, chunk=HEADS * 256)
        close(by_chunks @ v, attention.attend(pos, q, k, v, x, layer_context(pos, x), window=9))


# ---- biases


@pytest.mark.parametrize("rows", [1, 7])
def test_dense_bias_by_chunks_of_any_size(rows):
    """7 queries at a time do not divide the 40 that there are."""
    pos, x = build("alibi").transformer.h[0].attn.pos, torch.randn(2, 40, WIDTH, dtype=torch.float64)
    q, k, v = torch.randn(3, 2, HEADS, 40, D, dtype=torch.float64)
    whole = attention.attend(pos, q, k, v, x, layer_context(pos, x))
    close(attention.attend(pos, q, k, v, x, layer_context(pos, x), chunk=rows * HEADS * 40), whole, atol=1e-12)


@pytest.mark.slow
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
