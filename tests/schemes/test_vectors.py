"""Each scheme gives the attention scores of data/vectors.json, computed elsewhere from the papers' formulas."""

import json

import pytest
import torch
from models import DATA, causal_scores, close, config, heads

from model import GPT
from schemes.carope import path_phases

VECTORS = json.loads((DATA / "vectors.json").read_text())


def projections(given, x, H, T, D):
    """Weights (2C, C) that make the given q and k from x: T ≤ C rows are linearly independent."""
    outputs = [given[name].transpose(0, 1).reshape(T, H * D) for name in "qk"]
    return torch.cat([(torch.linalg.pinv(x) @ y).T for y in outputs])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("index", range(len(VECTORS)), ids=lambda i: f"{i}-{VECTORS[i]['scheme']}")
def test_vectors(index, dtype):
    case = VECTORS[index]
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in case.items() if isinstance(value, list)}
    pos, H, T, D, start = case["scheme"], case["H"], case["T"], case["D"], case.get("start", 0)
    C = H * D
    x = given.get("x", torch.eye(T, C, dtype=torch.float64))
    options = {"block": case["block"], "unit": 1} if pos == "comrope" else {}
    options |= {"base": case["base"]} if "base" in case else {}
    model = GPT(config(pos, options, block_size=8, n_layer=1, n_head=H, n_embd=C, bias=False)).to(dtype)
    attn = model.transformer.h[0].attn
    with torch.no_grad():
        if pos == "crope":
            attn.c_attn.A.copy_(torch.cat([given["A" + name] for name in "qkv"]))
            attn.c_attn.B.copy_(torch.cat([given["B" + name] for name in "qkv"]))
        else:
            attn.c_attn.weight[: 2 * C] = projections(given, x, H, T, D)
        if pos == "comrope":
            attn.pos.P.copy_(given["P"])
        if pos == "carope":
            attn.pos.c_pos.weight.copy_(given["W"])
            attn.pos.c_pos.bias.copy_(given["b"])
            phases = path_phases(attn.pos.log_frequencies(x.to(dtype)[None]), D // 2)[0].transpose(0, 1)
            close(phases.double(), given["phases"], atol=1e-12 if dtype == torch.float64 else 2e-6)
        q, k, v = heads(attn, x.to(dtype), start)
    scores = causal_scores(q, k)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4 if start > 1000 else 1e-5
    assert scores.dtype == dtype
    assert (scores.double() - given["scores"]).abs().max() <= tolerance * given["scores"].abs().max()
    if "v" in given:
        error = v.double() - given["v"]
        assert error.abs().max() <= tolerance * given["v"].abs().max()
