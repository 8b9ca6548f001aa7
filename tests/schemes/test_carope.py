"""carope: the gradient of its phases, its control without content, its initial values."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import WIDTH, D, build, close, config, tokens

from model import GPT
from nanope.ops import rotate
from schemes.carope import PathRotation, path_phases


def test_carope_gradient_of_the_phases():
    """PathRotation against autograd through the phases as they are written, and finite differences."""
    draw = torch.Generator().manual_seed(0)
    qk = torch.randn(2, 5, 2, 3, 8, dtype=torch.float64, generator=draw, requires_grad=True)
    log_f = (-torch.rand(2, 5, 3, dtype=torch.float64, generator=draw)).requires_grad_()
    g = torch.randn(qk.shape, dtype=torch.float64, generator=draw)
    phases = path_phases(log_f, 4).unsqueeze(2)
    expected = torch.autograd.grad(rotate(qk, phases.cos(), phases.sin()), (qk, log_f), g)
    for mine, theirs in zip(torch.autograd.grad(PathRotation.apply(qk, log_f), (qk, log_f), g), expected):
        close(mine, theirs, atol=1e-12)
    assert torch.autograd.gradcheck(PathRotation.apply, (qk, log_f))
    half = torch.autograd.grad(PathRotation.apply(qk.bfloat16(), log_f.float()), (qk, log_f), g.bfloat16())
    for mine, theirs in zip(half, expected):
        assert (mine - theirs).norm() < 0.01 * theirs.norm()


def trained_constants(pos):
    """f (H,) of a carope layer without content."""
    return 1 / (1 + F.softplus(pos.c_pos.bias.detach()))


def test_carope_without_content_is_rope_with_a_base_a_head():
    """Every token turns pair i of head h by f_h^i, whatever it is; f_h = base_h^(-2/D)."""
    model = build("carope constant", bias=False)
    pos = model.transformer.h[1].attn.pos
    f = trained_constants(pos)  # all different
    expected = torch.stack([f**i for i in range(D // 2)], -1) * torch.arange(1, 31, dtype=torch.float64).view(-1, 1, 1)
    for x in torch.randn(2, 1, 30, WIDTH, dtype=torch.float64):
        close(path_phases(pos.log_frequencies(x), D // 2)[0], expected, atol=1e-9)
    rope = GPT(config("rope", {"explicit": True}, bias=False)).double()
    state = {name: value for name, value in model.state_dict().items() if "c_pos" not in name}
    for i, block in enumerate(model.transformer.h):
        f = trained_constants(block.attn.pos)
        state[f"transformer.h.{i}.attn.pos.freqs"] = torch.stack([f**j for j in range(D // 2)], -1)
    rope.load_state_dict(state)
    close(model(tokens(30))[0], rope(tokens(30))[0], atol=1e-8)


def test_carope_paper_init():
    """Without the bias W = 0 gives f = 1/(1 + log 2) = 0.5906."""
    pos = GPT(config("carope", {"init": "paper"})).transformer.h[0].attn.pos
    assert pos.c_pos.bias is None and not pos.c_pos.weight.any()
    phases = path_phases(pos.log_frequencies(torch.randn(1, 3, WIDTH)), D // 2)[0, :, 0]  # (T, D/2)
    f = 1 / (1 + math.log(2))
    assert round(f, 4) == 0.5906
    close(phases, torch.tensor([[(m + 1) * f**i for i in range(8)] for m in range(3)]), atol=1e-6)


@pytest.mark.parametrize("width,base", [(2, 10000.0), (4, 1e7), (64, 10000.0), (128, 500000.0)])
def test_carope_bias_for_any_head_width(width, base):
    """f = base^(-2/D) at step 0. Where softplus(b) is large, exp(b) would overflow."""
    pos = GPT(config("carope", {"base": base}, n_head=1, n_embd=width)).transformer.h[0].attn.pos
    b = pos.c_pos.bias.double()
    close(1 / (1 + F.softplus(b)), torch.full((1,), base ** (-2 / width), dtype=torch.float64), rtol=1e-5, atol=0)
    if (width, base) == (64, 10000.0):
        assert b.item() == pytest.approx(-0.92666, abs=1e-5)  # the spec's figure
