"""What holds for the schemes that turn queries and keys: relative positions, exact angles."""

import pytest
import torch
from models import BLOCK, LAYERS, TURNING, WIDTH, build, cases_of, close, layer_scores, tokens

from model import SCHEMES
from nanope.attention import attend

RELATIVE = [case for case in TURNING if "carope" not in case]


def watched(model):
    """A list that gets (x, ctx), what its scheme is told, of each layer in each forward pass from now on."""
    seen = []

    def record(scheme, q, k, v, x, ctx, *rest):
        seen.append((x, ctx))
        return attend(scheme, q, k, v, x, ctx, *rest)

    model.attend = record
    return seen


# ------------------------------------------------------------------------------------------------
# Relative positions


@pytest.mark.parametrize("case", RELATIVE)
def test_scores_depend_on_relative_positions_only(case):
    attn = build(case).transformer.h[1].attn
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    scores = layer_scores(attn, x)
    assert (layer_scores(attn, x, start=1000) - scores).abs().max() <= 1e-9 * scores.abs().max()
    # the same tokens one position further apart do score otherwise
    apart = layer_scores(attn, torch.cat((x[:1], torch.zeros(1, WIDTH, dtype=torch.float64), x[1:])))
    assert (apart[:, 2:, 0] - scores[:, 1:, 0]).abs().max() > 1e-3 * scores.abs().max()


@pytest.mark.parametrize("case", RELATIVE)
def test_logits_of_a_sequence_shifted_by_1000_positions(case):
    """By hidden's `offset`, which does reach the layers; positions twice as far apart do give other logits."""
    model, idx = build(case), tokens(2 * BLOCK)
    logits, seen = model(idx)[0], watched(model)
    close(model.lm_head(model.hidden(idx, offset=1000)), logits, atol=1e-8)
    assert len(seen) == LAYERS
    for _, ctx in seen:
        assert torch.equal(ctx.positions, torch.arange(1000, 1000 + 2 * BLOCK, dtype=torch.float64))
    model.transformer.h[0].attn.pos.positions = lambda ctx: 2 * ctx.positions
    assert (model.train()(idx)[0] - logits).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------
# Angles are exact whatever the dtype of activations and weights


def cos_and_sin(model, idx):
    """cos and sin of the first layer's angles, interleaved, in float64 (1, T, 2, H, D), and their dtype before. It is
    what the layer's scheme turns pairs of (1, 0) to."""
    seen, attn = watched(model), model.transformer.h[0].attn
    with torch.no_grad():
        model(idx)
    x, ctx = seen[0]
    qk = torch.zeros(1, idx.size(1), 2, attn.n_head, attn.pos.head_width, dtype=torch.float64)
    qk[..., 0::2] = 1
    return attn.pos.encode(qk, x, ctx).detach(), ctx.dtype


@cases_of(TURNING, fast=SCHEMES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_angles_are_float32_under_autocast(case, low):
    """cos and sin of the first layer, 2,000 tokens: the same bits with and without autocast. bfloat16 holds no odd
    integer beyond 256."""
    model, idx = build(case, torch.float32, n_layer=1), tokens(2000, B=1)
    expected, dtype = cos_and_sin(model, idx)
    with torch.autocast("cpu", dtype=low):
        found, low_dtype = cos_and_sin(model, idx)
    assert dtype == low_dtype == torch.float32
    assert torch.equal(found, expected)
    assert found[0, -1, 0].unique().numel() > 4  # they do turn


@pytest.mark.parametrize("case", RELATIVE)
def test_angles_of_a_bfloat16_model_are_float32(case):
    """Casting the weights changes no closed-form position; comrope's frequencies are those of its cast P, but no
    coarser."""
    model, idx = build(case, torch.float32, n_layer=1).bfloat16(), tokens(1000, B=1)
    assert model(idx)[0].dtype == torch.bfloat16
    found, dtype = cos_and_sin(model, idx)
    expected, double = cos_and_sin(model.double(), idx)  # the same, rounded weights
    assert dtype == torch.float32 and double == torch.float64
    # comrope's P - Pᵀ is rounded to float32, at up to some hundred radians here
    close(found, expected, atol=1e-3 if "comrope" in case else 1e-7)
