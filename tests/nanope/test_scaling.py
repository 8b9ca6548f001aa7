"""Frequencies scaled for longer contexts, against the papers' formulas written out in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from nanope.convert import SCALINGS, scale_frequencies


def turned(ids, gpt, frequencies, logits=1.0):
    """Logits of a one-layer model whose head h turns pair i by frequencies[h, i], in float64, written out."""
    p = {k.removeprefix("transformer."): v.double() for k, v in gpt.state_dict().items()}
    H, C, T = gpt.config.n_head, gpt.config.n_embd, len(ids)

    def normed(x, name):
        return F.layer_norm(x, (C,), p[f"{name}.weight"])

    def spun(x):  # (H, T, D)
        angle = torch.arange(T, dtype=torch.float64)[None, :, None] * frequencies[:, None]
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    x = p["wte.weight"][ids]
    qkv = normed(x, "h.0.ln_1") @ p["h.0.attn.c_attn.weight"].t()
    q, k, v = qkv.view(-1, 3, H, C // H).permute(1, 2, 0, 3)
    mask = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)
    weights = (logits * spun(q) @ spun(k).mT / (C // H) ** 0.5 + mask).softmax(-1)
    x = x + (weights @ v).transpose(0, 1).reshape(-1, C) @ p["h.0.attn.c_proj.weight"].t()
    inner = F.gelu(normed(x, "h.0.ln_2") @ p["h.0.mlp.c_fc.weight"].t(), approximate="tanh")
    x = x + inner @ p["h.0.mlp.c_proj.weight"].t()
    return normed(x, "ln_f") @ p["lm_head.weight"].t()


@pytest.mark.parametrize("rule", SCALINGS)
def test_scaled_frequencies_are_the_papers_formulas(rule):
    gpt, s, D, length = GPT(GPTConfig(256, 64, 1, 2, 64, pos="rope"), seed=0), 4.0, 32, 256
    theta, logits = [10000 ** (-2 * i / D) for i in range(D // 2)], 1.0
    if rule == "pi":
        expected = [t / s for t in theta]
    elif rule == "ntk":
        expected = [(10000 * s ** (D / (D - 2))) ** (-2 * i / D) for i in range(D // 2)]
    else:
        if rule == "yarn":
            ratio = [length / (2 * math.pi / t) for t in theta]
            gamma = [0 if r < 1 else 1 if r > 32 else (r - 1) / 31 for r in ratio]
        else:  # 32 turns in 256 tokens are those of index 0.4, one turn that of 6.4
            gamma = [1 - min(i / 7, 1) for i in range(D // 2)]
        expected, logits = [(1 - g) * t / s + g * t for g, t in zip(gamma, theta)], (0.1 * math.log(s) + 1) ** 2
        assert 0 < sum(0 < g < 1 for g in gamma)
    ids = torch.randint(64, (600,), generator=torch.Generator().manual_seed(0))
    got = gpt.double().scaled(rule, s)(ids[None])[0][0]
    expected = torch.tensor(expected, dtype=torch.float64).expand(2, -1)
    assert torch.allclose(got, turned(ids, gpt, expected, logits), atol=1e-9)
    assert not torch.allclose(got, gpt(ids[None])[0][0], atol=1e-4)
    assert torch.allclose(gpt.scaled(rule, 1.0)(ids[None])[0], gpt(ids[None])[0], atol=1e-9)  # factor 1 changes nothing


@pytest.mark.slow  # transformers takes seconds to import
@pytest.mark.parametrize("length, factor, D, base", [(128, 16.0, 32, 1e4), (1024, 4.0, 64, 5e5), (8192, 8.0, 128, 1e4)])
def test_pi_and_yarn_of_transformers(length, factor, D, base):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    freqs = base ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
    for rule, theirs in (("pi", "linear"), ("yarn-code", "yarn")):
        parameters = {"rope_type": theirs, "factor": factor, "original_max_position_embeddings": length}
        config = LlamaConfig(
            hidden_size=4 * D, num_attention_heads=4, rope_parameters=parameters | {"rope_theta": base}
        )
        expected, of_each = ROPE_INIT_FUNCTIONS[theirs](config, "cpu")
        got, logits = scale_frequencies(freqs, rule, factor, length, D, base)
        torch.testing.assert_close(got, expected.double(), rtol=1e-5, atol=0)
        assert logits == pytest.approx(of_each**2)  # of q and of k


@pytest.mark.parametrize("pos", ["rope", "crope", "comrope"])
def test_trained_and_explicit_frequencies_scale_alike(pos):
    gpt = GPT(GPTConfig(64, 64, 2, 2, 32, pos=pos), seed=0).double()
    plain = gpt.to_rope()
    ids = torch.randint(64, (1, 200), generator=torch.Generator().manual_seed(0))
    before = [block.attn.pos.freqs.clone() for block in plain.transformer["h"]]
    rules = {"pi": lambda f: f / 2, "ntk": lambda f: f * 2 ** -(f.log() / math.log(10000 ** (-14 / 16))).clamp(0, 1)}
    for rule, expected in rules.items():
        scaled = gpt.scaled(rule, 2.0)
        for block, f in zip(scaled.transformer["h"], before):
            assert torch.allclose(block.attn.pos.freqs, expected(f), atol=1e-12)
        assert torch.isfinite(scaled(ids)[0]).all()
    assert torch.allclose(gpt(ids)[0], plain(ids)[0])  # the model itself is left as it was
