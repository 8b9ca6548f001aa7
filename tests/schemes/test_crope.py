"""crope beside its real controls, rope with grouped or low-rank projections."""

import pytest
import torch
from models import WIDTH, close, config

from model import GPT


def controls(**shape):
    """rope, and the three models with half of its Q, K and V."""
    options = ({}, {"qkv": "grouped"}, {"qkv": "low-rank"})
    rope, grouped, low_rank = (GPT(config("rope", o, bias=False, **shape)) for o in options)
    return rope, GPT(config("crope", bias=False, **shape)), grouped, low_rank


@pytest.mark.parametrize("width", [WIDTH, 96])
def test_crope_and_its_real_controls_have_exactly_half_of_qkv(width):
    rope, *halved = controls(n_embd=width)
    for model in halved:
        assert sum(p.numel() for p in model.transformer.h[0].attn.c_attn.parameters()) == 3 * width**2 // 2
        assert rope.parameter_count() - model.parameter_count() == 2 * 3 * width**2 // 2  # in 2 layers


def test_the_grouped_control_starts_with_cropes_draws():
    """Times √2."""
    _, crope, grouped, _ = controls()
    ours, theirs = dict(grouped.named_parameters()), dict(crope.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        factor = 2**0.5 if ".c_attn." in name else 1
        close(ours[name], factor * theirs[name], rtol=1e-6, atol=0)


def test_crope_and_its_controls_start_at_ropes_scale():
    """q, k and v have standard deviation 0.02 √C = 0.226 for normed inputs, so scores and logits start alike."""
    x = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    for model in controls(n_layer=1, n_head=4, n_embd=128):
        q, k, v = model.transformer.h[0].attn.c_attn(x).detach().split(128, -1)
        for part in (q, k, v):
            assert part.std().item() == pytest.approx(0.02 * 128**0.5, rel=0.05), model.config
        scores = (q[:1000] * k[1000:]).unflatten(-1, (4, 32)).sum(-1) / 32**0.5  # of different tokens
        assert scores.std().item() == pytest.approx(0.02**2 * 128, rel=0.1), model.config
