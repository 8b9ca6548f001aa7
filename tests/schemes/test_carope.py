"""carope: its phases and their gradient at long lengths, its options, its control without content, its initial
values."""

import copy
import itertools
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from models import BLOCK, LAYERS, WIDTH, D, build, close, config, relative_error, tokens

from model import GPT
from nanope.ops import rotate
from schemes.carope import PathRotation, path_phases


@pytest.fixture
def sequential_scan(monkeypatch):
    """cumsum as on CUDA, one addition after another in the tensor's own dtype. A CPU's adds up in float64."""

    def cumsum(x, dim):
        return torch.stack(list(itertools.accumulate(x.unbind(dim))), dim)

    assert cumsum(torch.ones(2, 3), 1).equal(torch.ones(2, 3).cumsum(1))
    monkeypatch.setattr(torch, "cumsum", cumsum)
    monkeypatch.setattr(torch.Tensor, "cumsum", cumsum)


def far(phases, exact):
    """The largest difference in radians, up to whole turns."""
    difference = phases.double() - exact
    return (difference - (difference / (2 * math.pi)).round() * 2 * math.pi).abs().max().item()


def constant(H, D):
    """z (H,) of heads with f = base^(-2/D), which start as rope does for these bases."""
    f = torch.logspace(3, 6, H, dtype=torch.float64) ** (-2 / D)
    return (1 / f - 1).expm1().log()


# ---- phases


@pytest.mark.parametrize("T", [8192, 16384, 10007])
@pytest.mark.parametrize("content", [True, False])
def test_phases_of_long_sequences(T, content, sequential_scan):
    """In float32, as close to the exact sum as its powers allow, also where f is the same at every token, so that all
    errors have one sign. One scan of all tokens is wrong by 0.4 radians at 8,192."""
    z = constant(2, 64).expand(1, T, -1)
    if content:
        z = z + torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = reference.carope_phases(z, torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 64)
    log_f = -torch.log1p(F.softplus(z))
    assert far(path_phases(log_f, 32), exact) < 1e-8
    assert far(path_phases(log_f.float(), 32), exact) < 1e-3
    assert path_phases(log_f.float(), 32).abs().max() < 50  # so that cos and sin get them with 5 digits


def test_gradients_of_long_sequences(sequential_scan):
    """Of queries, keys and frequencies, in float32 at 8,192 tokens."""
    T, H, width = 8192, 2, 16
    draw = torch.Generator().manual_seed(0)
    z = constant(H, width) + 0.3 * torch.randn(1, T, H, dtype=torch.float64, generator=draw)
    qk, g = (torch.randn(1, T, 2, H, width, dtype=torch.float64, generator=draw) for _ in range(2))
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = qk.to(dtype).requires_grad_(), (-torch.log1p(F.softplus(z))).to(dtype).requires_grad_()
        if dtype == torch.float64:
            phases = torch.stack([(i * leaves[1]).exp() for i in range(width // 2)], -1)
            phases = torch.stack(list(itertools.accumulate(phases.unbind(1))), 1).unsqueeze(2)
            y = rotate(leaves[0], phases.cos(), phases.sin())
        else:
            y = PathRotation.apply(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, g.to(dtype))))
    for exact, found in zip(*results):
        assert found.dtype == torch.float32 and relative_error(found, exact) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("content", [True, False])
def test_decoding_equals_the_whole_pass_at_thousands_of_positions(content):
    """One token at a time, in float32."""
    shape = dict(vocab_size=2000, n_layer=1, n_head=1, n_embd=64, bias=False)
    model = GPT(config("carope", {"content": content}, **shape))
    with torch.no_grad():
        attn = model.transformer.h[0].attn
        attn.c_attn.weight *= 20  # so that positions matter
        if content:
            attn.pos.c_pos.weight.copy_(torch.linspace(-0.3, 0.3, 64))
        idx, cache = tokens(3000, B=1, V=2000), [{}]
        parts = [model.hidden(token, cache) for token in idx.split(1, 1)]
        whole = model.hidden(idx)
    close(torch.cat(parts, 1), whole, atol=4e-4)
    phase = cache[0]["pos.phase"]
    assert phase.dtype == torch.float64 and phase.min() >= 0 and phase.max() < 2 * math.pi


@pytest.mark.parametrize("T", [31, 32, 33, 64, 75])
def test_values_and_gradients_equal_the_reference_across_chunks(T):
    """Through the whole model, in one pass and in two with a cache."""
    model, idx = build("carope"), tokens(T)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = reference.logits(model.config, parameters, idx)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (weights * expected).sum().backward()
    for pieces in ([T], [T - 20, 20]):
        model.zero_grad()
        caches = [{} for _ in range(LAYERS)]
        hidden = [model.hidden(piece, caches if len(pieces) > 1 else None) for piece in idx.split(pieces, 1)]
        logits = model.lm_head(torch.cat(hidden, 1))
        close(logits, expected, atol=1e-9)
        (weights * logits).sum().backward()
        for name, p in model.named_parameters():
            close(p.grad, parameters[name].grad, rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.slow
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


# ---- options


def test_first_power():
    """Powers 1 … D/2: pair i turns as the next one does from 0."""
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64)
    models = [GPT(config("carope", {"first_power": first, "std": 0.5})).double() for first in (0, 1)]
    log_f, other = (model.transformer.h[0].attn.pos.log_frequencies(x) for model in models)
    assert torch.equal(log_f, other)
    close(path_phases(log_f, D // 2 - 1, 1), path_phases(log_f, D // 2)[..., 1:])
    logits = [model(tokens(BLOCK))[0] for model in models]
    assert (logits[0] - logits[1]).abs().max() > 1e-5


def test_drawn_weights():
    """W ~ N(0, std²) by seed and layer, beside the bias of rope's frequencies or without one."""
    for init in ("rope", "paper"):
        pos = [b.attn.pos for b in GPT(config("carope", {"std": 0.3, "init": init}, n_embd=480)).transformer.h]
        assert all(p.c_pos.weight.std().item() == pytest.approx(0.3, rel=0.1) for p in pos)
        assert not torch.equal(pos[0].c_pos.weight, pos[1].c_pos.weight)
    again = GPT(config("carope", {"std": 0.3, "init": "paper"}, n_embd=480)).transformer.h[1].attn.pos
    assert torch.equal(again.c_pos.weight, pos[1].c_pos.weight)


@pytest.mark.parametrize("pos", ["carope", ["carope", "none", "carope+alibi"]], ids=str)
def test_layers_share_weights(pos):
    """One W and b in all layers that have carope, which get the sum of all layers' gradients; saved, copied, cast."""
    options = {"share_layers": True, "std": 0.3}
    model = GPT(config(pos, options if pos == "carope" else {"carope": options}, n_layer=3)).double()
    owners = [name for name, _ in model.named_parameters() if "c_pos" in name]
    assert owners == [f"transformer.h.0.attn.pos.c_pos.{kind}" for kind in ("weight", "bias")]
    for m in (model, copy.deepcopy(model).float()):
        modules = [m for b in m.transformer.h for m in b.attn.pos.modules() if isinstance(m, torch.nn.Linear)]
        assert len(modules) == (3 if pos == "carope" else 2) and len({*map(id, modules)}) == 1

    idx, apart = tokens(BLOCK), GPT(config(pos, n_layer=3)).double()
    apart.load_state_dict(model.state_dict())
    for m in (model, apart):
        m(idx, idx)[1].backward()
    for kind in ("weight", "bias"):
        gradients = [p.grad for name, p in apart.named_parameters() if f"c_pos.{kind}" in name]
        assert len(gradients) == len(modules) and all(g.any() for g in gradients)
        close(model.get_parameter(f"transformer.h.0.attn.pos.c_pos.{kind}").grad, sum(gradients))
    other = GPT(model.config, seed=9).double()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(idx)[0], model(idx)[0])


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
