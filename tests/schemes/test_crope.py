"""crope beside its real control, rope with grouped projections."""

import pytest
import torch
from models import WIDTH, config

from model import GPT


@pytest.mark.parametrize("width", [WIDTH, 96])
def test_crope_and_its_real_control_have_exactly_half_of_qkv(width):
    """The same parameters with the same initial values."""
    shape = dict(bias=False, n_embd=width)
    crope, rope = GPT(config("crope", **shape)), GPT(config("rope", **shape))
    grouped = GPT(config("rope", {"qkv": "grouped"}, **shape))
    counts = [sum(p.numel() for p in m.transformer.h[0].attn.c_attn.parameters()) for m in (crope, grouped, rope)]
    assert counts == [3 * width**2 // 2, 3 * width**2 // 2, 3 * width**2]
    assert crope.parameter_count() == grouped.parameter_count()
    ours, theirs = dict(grouped.named_parameters()), dict(crope.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
