"""nanope/convert.py: a model as plain rope with explicit frequencies."""

import dataclasses

import pytest
import torch
from models import BLOCK, HEADS, D, build, close, config, shaken, tokens, uncached

from model import GPT, SCHEMES, GPTConfig
from nanope.convert import SCALINGS

ROPES = {
    "rope": ("rope", {}),
    "rope fraction": ("rope", {"fraction": 0.5, "base": 50.0}),
    "rope grouped": ("rope", {"qkv": "grouped"}),
    "crope": ("crope", {}),
    "crope fraction": ("crope", {"fraction": 0.5, "base": 50.0}),
} | {
    f"comrope {kind} {block}": ("comrope", {"kind": kind, "block": block, "unit": 7.0})
    for kind in ("ap", "ld")
    for block in (2, 4, 8)
}


@pytest.fixture(params=ROPES)
def rope_pair(request):
    """A random model with biases, and what to_rope makes of it."""
    model = shaken(config(*ROPES[request.param]))
    return model, model.to_rope()


def test_to_rope_equals_the_model(rope_pair, tmp_path):
    model, rope = rope_pair
    idx = tokens(3 * BLOCK)
    expected = model(idx)[0]
    assert rope.config.pos == "rope" and rope.config.pos_options["explicit"] is True
    shapes = {name: p.shape for name, p in GPT(config("rope")).named_parameters()}
    assert {name: p.shape for name, p in rope.named_parameters()} == shapes
    freqs = rope.state_dict()["transformer.h.1.attn.pos.freqs"]
    assert freqs.shape == (HEADS, D // 2) and freqs.dtype == torch.float64
    close(rope(idx)[0], expected, atol=1e-9)
    # the copy shares nothing with the original
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    close(rope(idx)[0], expected, atol=1e-9)
    # saved, reloaded into a fresh model of the same config, and converted again
    torch.save({"model": rope.state_dict(), "config": dataclasses.asdict(rope.config)}, tmp_path / "rope.pt")
    saved = torch.load(tmp_path / "rope.pt", weights_only=True)
    again = GPT(GPTConfig(**saved["config"]), seed=9).double()
    again.load_state_dict(saved["model"])
    assert torch.equal(again(idx)[0], rope(idx)[0])
    assert torch.equal(again.to_rope()(idx)[0], rope(idx)[0])
    # the relations that decoding relies on hold for explicit frequencies too
    assert torch.equal(again.generate(idx[:, :4], 9, temperature=0), uncached(again, idx[:, :4], 9, temperature=0))


def test_explicit_frequencies_stay_float64(rope_pair):
    rope = rope_pair[1]
    name = "transformer.h.0.attn.pos.freqs"
    before = rope.state_dict()[name].clone()
    for cast in (rope.bfloat16, rope.half, rope.float, lambda: rope.to(torch.bfloat16), rope.double):
        cast()
        assert torch.equal(rope.state_dict()[name], before) and rope.state_dict()[name].dtype == torch.float64
    rope.bfloat16()
    assert rope.transformer.h[0].attn.c_attn.weight.dtype == torch.bfloat16 and rope(tokens(8))[0].isfinite().all()


def test_to_rope_keeps_mode_and_dtype():
    model = build("comrope", torch.bfloat16).eval()
    rope = model.to_rope()
    assert not rope.training and rope.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("pos", sorted(SCHEMES.keys() - {"rope", "crope", "comrope", "prope", "lerope"}))
def test_to_rope_refuses_the_others(pos):
    with pytest.raises(ValueError, match=f"^{pos} "):
        GPT(config(pos)).to_rope()


@pytest.mark.parametrize("case", ["rope fraction", "crope fraction"])
@pytest.mark.parametrize("rule", SCALINGS)
def test_scaling_and_to_rope_commute(case, rule):
    """The plain rope of a model knows the base and the width that frequencies are scaled by, and what scores are."""
    model, idx = shaken(config(*ROPES[case])), tokens(3 * BLOCK)
    expected = model.scaled(rule, 4.0)(idx)[0]
    close(model.to_rope().scaled(rule, 4.0)(idx)[0], expected, atol=1e-9)
    close(model.scaled(rule, 4.0).to_rope()(idx)[0], expected, atol=1e-9)
