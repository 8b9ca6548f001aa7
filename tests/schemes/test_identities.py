"""Schemes that are another scheme at some values of their options or own parameters."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from models import BLOCK, HEADS, WIDTH, D, close, config, extends, layer_context, shaken, tokens

from model import GPT, SCHEMES
from nanope.ops import rotate

LN2 = math.log(2)
FAR = 1e3  # where a sigmoid is 0 or 1, and a softplus of the negative 0
ALIBI = torch.tensor(reference.alibi_slopes(HEADS), dtype=torch.float64)
SLOPES = torch.tensor([0.5, 0.1, 0.02], dtype=torch.float64)  # of other heads
GATED = {"rank": 0, "gate": True, "phase_bias": True}
TABLE = -SLOPES * torch.arange(64).view(-1, 1)  # (distances, H)

# A scheme, with these options, at these values of its own parameters, all others being random, is that other scheme.
# `start`: all own parameters have their initial values, float32 numbers
IDENTITIES = [
    ("learned", {}, {"wpe.weight": 0}, "none", {}),
    ("t5", {}, {"table": 0}, "none", {}),
    ("t5", {}, {"table": 3}, "none", {}),
    ("kerple", {}, {"r1": -FAR}, "none", {}),
    ("fire", {}, {"out.weight": 0}, "none", {}),
    ("fox", {}, {"gate.weight": 0, "gate.bias": FAR}, "none", {}),
    ("cable", {}, {"distance.weight": 0}, "none", {}),
    ("cope", {}, {"e": 0}, "none", {}),
    ("cope", {}, "start", "none", {}),
    ("urpe", {}, {"C.table": 1, "B.table": 3}, "none", {}),
    ("urpe", {}, "start", "none", {}),
    ("path", {}, {"gate.weight": 0, "gate.bias": -FAR}, "none", {}),
    ("seqpe", {}, {"encoder.to_q.weight": 0}, "none", {}),
    ("prope", {"p": 0.0}, {}, "none", {}),
    #
    ("fox", {}, {"gate.weight": 0, "gate.bias": 0}, "alibi", {"slopes": LN2}),
    ("grape", {}, {"c_p.weight": 0}, "alibi", {"slopes": LN2 * ALIBI}),
    ("kerple", {"kind": "power"}, {"r1": SLOPES.expm1().log(), "r2": 0}, "alibi", {"slopes": SLOPES}),
    ("t5", {"buckets": 64}, {"table": TABLE}, "alibi", {"slopes": SLOPES}),
    ("urpe", {}, {"C.table": 1, "B.table": TABLE[:BLOCK].mT}, "alibi", {"slopes": SLOPES}),
    #
    ("rope", {"explicit": True}, {}, "rope", {}),
    ("prope", {"p": 1.0, "base": 50.0}, {}, "rope", {"base": 50.0}),
    ("lerope", {"base": 50.0}, "start", "rope", {"base": 50.0}),
    ("lerope", {}, {"scale.log": 0}, "rope", {}),
    ("xpos", {"scale": 1e12}, {}, "rope", {}),
    ("gape", {}, {"gamma": -FAR}, "rope", {}),
    ("selective", {"phase_bias": True}, {"up": 0, "phase_bias": 0}, "rope", {"base": 5e5}),
    ("selective", {"phase_bias": True, "base": 50.0}, {"conv": 0, "phase_bias": 0}, "rope", {"base": 50.0}),
    ("selective", GATED, {"scale": 0, "gate.weight": 0, "gate.bias": 0, "phase_bias": LN2}, "rope", {"base": 5e5}),
    ("carope", {}, "start", "rope", {}),
    ("carope", {"source": "embedding", "base": 50.0}, "start", "rope", {"base": 50.0}),
    ("carope", {"content": False}, "start", "rope", {}),
    ("carope", {"init": "paper"}, {"c_pos.weight": 0}, "rope", {"base": "(1+ln2)^(D/2)"}),
    ("comrope", {}, "start", "rope", {}),
    ("comrope", {"unit": 1.0, "base": 50.0}, "start", "rope", {"base": 50.0}),
    ("comrope", {"block": 4}, "start", "rope", {}),
    ("comrope", {"block": 2, "unit": 1.0}, "start", "rope", {}),
    ("comrope", {"block": 4, "kind": "ld", "base": 50.0}, "start", "rope", {"base": 50.0}),
]
NAMES = [f"{row[0]} is {row[3]}" for row in IDENTITIES]


def set_own(model, values):
    """Own parameters of all layers get these values, or their initial ones."""
    if values == "start":
        initial = dict(GPT(model.config).named_parameters())
        values = {name: p for name, p in initial.items() if ".attn.pos." in name}
    for name, value in values.items():
        found = [p for full, p in model.named_parameters() if f".{full}".endswith(f".{name}")]
        assert found, name
        for p in found:
            p.copy_(torch.as_tensor(value, dtype=torch.float64).expand_as(p))


def of_weights(other, options, state):
    """A model of the scheme `other` with another model's weights. alibi has an option here, slopes."""
    options, slopes = {k: v for k, v in options.items() if k != "slopes"}, options.get("slopes")
    model = GPT(config(other, options)).double()
    model.load_state_dict({name: state.get(name, value) for name, value in model.state_dict().items()})
    if slopes is not None:
        for block in model.transformer.h:
            block.attn.pos.slopes = lambda device: torch.as_tensor(slopes, dtype=torch.float64).expand(HEADS)
    return model


@torch.no_grad()
@pytest.mark.parametrize("pos, options, own, other, others", IDENTITIES, ids=NAMES)
def test_it_is_another_scheme(pos, options, own, other, others):
    model = shaken(config(pos, options))
    idx = tokens(2 * BLOCK if extends(pos) else BLOCK)
    expected = of_weights(other, others, model.state_dict())(idx)[0]
    if own:  # not before they are set
        assert (model(idx)[0] - expected).abs().max() > 1e-3
        set_own(model, own)
    close(model(idx)[0], expected, atol=2e-5 if own == "start" else 1e-9)


def large(pos):
    """A model of a seed, with weights so large that positions matter."""
    model = GPT(config(pos), seed=3)
    for p in model.parameters():
        p.mul_(8 if p.dim() > 1 else 1)
    return model


@torch.no_grad()
@pytest.mark.parametrize("pos", SCHEMES)
def test_in_a_pattern_and_with_none_it_is_itself(pos):
    expected = large(pos)(tokens(BLOCK))[0]
    for other in ([pos], [pos, f"{pos}+none"])[: 1 if pos == "none" else 2]:
        assert torch.equal(large(other)(tokens(BLOCK))[0], expected), other


def test_pope_is_rope_of_real_numbers():
    """softplus(q_c) and 0 are a pair, turned by m·θ_c as rope turns pairs of twice the width; keys by δ more."""
    pope, rope = (
        GPT(config(pos, options, n_embd=width)).double().transformer.h[0].attn.pos
        for pos, options, width in (("pope", {"start": "uniform"}, WIDTH), ("rope", {}, 2 * WIDTH))
    )
    qk = torch.randn(2, 7, 2, HEADS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = torch.stack((F.softplus(qk), torch.zeros_like(qk)), -1).flatten(-2)  # (B, T, 2, H, 2D)
    x = qk[:, :, 0].flatten(2)
    with torch.no_grad():
        found, expected = pope.encode(qk, x, layer_context(pope, x)), rope.encode(pairs, x, layer_context(rope, x))
        close(found[:, :, 0], expected[:, :, 0])
        close(found[:, :, 1], rotate(expected[:, :, 1], pope.delta.cos(), pope.delta.sin()), atol=1e-7)
        close(found.unflatten(-1, (-1, 2)).norm(dim=-1), F.softplus(qk), atol=1e-7)
        pope.delta.zero_()
        close(pope.encode(qk, x, layer_context(pope, x)), expected)
