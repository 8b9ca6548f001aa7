"""path: products of Householder-like matrices, over blocks, in chunks of queries, and in a cache."""

import copy
import functools

import pytest
import reference
import torch
import torch.nn.functional as F
from models import BLOCK, LAYERS, build, close, config, layer_context, refused, relative_error, tokens

from model import GPT
from nanope import attention
from schemes.path import blocks


def reference_scores(attn, config, x):
    """(H, T, T) scores of one layer for x (T, C), by explicit products; 0 for hidden pairs."""
    own = {f"attn.pos.{name}": p.detach() for name, p in attn.pos.named_parameters()}
    q, k, _ = (t.unflatten(-1, (attn.n_head, -1)) for t in attn.c_attn(x[None]).detach().chunk(3, -1))
    return reference.path(reference.Layer(x[None], q, k, config.pos_options, x[None], config, own, "attn", None))[0]


def scores(attn, x, rows=1000):
    """(H, T, T) scores of one layer for x (T, C), so many queries at a time; 0 for hidden pairs."""
    T, found = x.size(0), []

    def attend(scheme, q, k, v, x, ctx, window, dropout):
        for i in range(0, T, rows):
            part = slice(i, min(i + rows, T))
            found.append(scheme.scores(q[:, :, part], k[:, :, : part.stop], x, part, ctx)[0])
        return v

    attn(x[None], layer_context(attn.pos, x[None], attend=attend))
    return torch.cat([F.pad(part, (0, T - part.size(-1))) for part in found], 1).tril()


@functools.cache
def long_case(T=300):
    """A layer, its input, and its scores by explicit products. 300 tokens are 4 blocks and a part of one. β is near 2,
    so that distant keys are not forgotten."""
    model = build("path", n_head=2, n_embd=16, bias=False)
    model.transformer.h[0].attn.pos.gate.bias.data.fill_(5.0)
    x = torch.randn(T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return model.transformer.h[0].attn, x, reference_scores(model.transformer.h[0].attn, model.config, x)


@pytest.mark.parametrize("rows", [300, 64, 50, 7])
def test_scores_of_many_blocks_equal_products_of_matrices(rows):
    """However the chunks of queries lie to the blocks."""
    attn, x, expected = long_case()
    close(scores(attn, x, rows).detach(), expected, atol=1e-10)
    assert expected[:, -50:, :50].abs().mean() > 0.05


def test_scores_of_many_blocks_in_float32():
    """Also under autocast, which rounds products with queries, but not w, whose errors add up over tokens."""
    attn, x, expected = long_case()
    attn = copy.deepcopy(attn).float()
    assert relative_error(scores(attn, x.float()), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(scores(attn, x.float()), expected) < 0.025


@pytest.mark.slow
def test_gradients_in_chunks_equal_those_of_the_whole():
    """150 tokens in chunks of 40 queries, which are computed again in the backward pass."""
    model, idx = build("path"), tokens(150, B=1)
    results = []
    for chunk in (2**24, 3 * 150 * 40):
        model.attend = functools.partial(attention.attend, chunk=chunk)
        model.zero_grad()
        model(idx, idx)[1].backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for whole, part in zip(*results):
        close(part, whole, atol=1e-10)


@pytest.mark.parametrize("pieces", [[1] * 12 + [100, 1, 1, 36], [130, 20], [64, 65, 21]], ids=str)
def test_cached_keys_over_blocks(pieces):
    """Prefills longer than a block, single tokens between them."""
    model, idx = build("path"), tokens(150, B=1)
    caches = [{} for _ in range(LAYERS)]
    with torch.no_grad():
        parts = [model.hidden(piece, caches) for piece in idx.split(pieces, 1)]
        close(torch.cat(parts, 1), model.hidden(idx), atol=1e-9)
    assert caches[0]["k"].shape == caches[0]["v"].shape


def test_keys_in_the_cache_stay_float32_in_a_bfloat16_model():
    model, caches = build("path").bfloat16(), [{} for _ in range(LAYERS)]
    for token in tokens(4).split(1, 1):
        model.hidden(token, caches)
    assert caches[0]["k"].dtype == torch.float32 and caches[0]["v"].dtype == torch.bfloat16


def test_with_a_beta_of_2_queries_keep_their_length():
    """Every H is a reflection, and so is what a block does, filled up or not."""
    draw = torch.Generator().manual_seed(0)
    w, k, q = torch.randn(3, 1, 2, 70, 16, dtype=torch.float64, generator=draw)
    W, U, _, last = blocks(w / w.norm(dim=-1, keepdim=True), torch.full_like(w[..., :1], 2), k)
    for n in range(2):
        close((q - q @ W[:, :, n].mT @ U[:, :, n]).norm(dim=-1), q.norm(dim=-1))
    close(last.flatten(2, 3)[:, :, :70].norm(dim=-1), k.norm(dim=-1))


def test_it_starts_with_projections():
    """b = 0 and small weights: β is near 1 for every token and head."""
    pos = GPT(config("path")).transformer.h[0].attn.pos
    x = torch.randn(1, 5, 48)
    assert (2 * torch.sigmoid(pos.gate(x)) - 1).abs().max() < 0.5
    assert pos.conv.std().item() == pytest.approx(1 / 3, rel=0.2)


def test_combinations_and_options():
    model = GPT(config("path+alibi"))
    assert model(tokens(2 * BLOCK))[0].isfinite().all()
    refused({"pos": "path+rope"}, ["path cannot be combined with rope"])
    refused({"pos": "path", "pos_options": {"rank": 0}}, ["path's rank", "at least 1"])
    refused({"pos": "path", "pos_options": {"width": 0}}, ["width"])
