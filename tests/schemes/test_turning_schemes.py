"""prope, lerope, xpos, pope, gape, selective: rope beside them, long lengths against float64, caches, errors."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from models import BLOCK, CASES, build, close, config, layer_context, refused, shaken, tokens

from model import GPT
from nanope.ops import Turned, rope_frequencies, rotate


def drawn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def scheme(pos, options=None, width=64, heads=1, block_size=256, dtype=torch.float32):
    """The scheme of a model with one layer, at its initial values."""
    shape = dict(n_layer=1, n_head=heads, n_embd=heads * width, block_size=block_size)
    return GPT(config(pos, options, **shape)).to(dtype).transformer.h[0].attn.pos


def encoded(pos, qk, start=0, positions=None, **fields):
    """What `encode` makes of qk (B, T, 2, H, D), at `start` or at given positions."""
    x = qk[:, :, 0].flatten(2)
    ctx = layer_context(pos, x, start, **fields)
    if positions is not None:
        ctx = dataclasses.replace(ctx, positions=positions)
        ctx = dataclasses.replace(ctx, prepared=pos.prepare([pos], ctx)[0])
    with torch.no_grad():
        return pos.encode(qk, x, ctx)


def product(y, m, n):
    """(H,) scores of query m and key n of y (1, T, 2, H, D)."""
    return (y[0, m, 0] * y[0, n, 1]).sum(-1)


# ---- what they are beside rope


@pytest.mark.parametrize("case", [case for case in CASES if case.split()[0] in ("prope", "lerope")])
def test_to_rope(case):
    model = build(case)
    close(model.to_rope()(tokens(2 * BLOCK))[0], model(tokens(2 * BLOCK))[0], atol=1e-9)
    model.scaled("ntk", 2.0)(tokens(BLOCK))


@pytest.mark.parametrize("pos", ["xpos", "pope", "gape", "selective"])
def test_no_plain_rope_is_claimed(pos):
    with pytest.raises(ValueError, match="as_rope|no equivalent"):
        build(pos).to_rope()


def test_prope_keeps_ropes_fastest_frequencies():
    """rope's `fraction` does not: its frequencies are spread again."""
    found = scheme("prope").frequencies()
    assert torch.equal(found[:24], rope_frequencies(64, 10000.0)[:24]) and not found[24:].any()
    fraction = scheme("rope", {"fraction": 0.75}).frequencies()
    assert (fraction != 0).equal(found != 0) and not torch.allclose(fraction, found)


def test_lerope_trains_one_set_of_frequencies():
    """The gradient is that of all layers, and the optimizer has it once, without decay."""
    model = build("lerope")
    scales = [block.attn.pos.scale.log for block in model.transformer.h]
    assert scales[0] is scales[1]
    assert model.position_parameters() == {"transformer.h.0.attn.pos.scale.log"}


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_turned_equals_autograd(low):
    """Values and gradients, of phases that a batch shares and of its own; they need no more activations."""
    for shape in ((5, 1, 1, 4), (2, 5, 1, 3, 4)):
        qk, phases = drawn(2, 5, 2, 3, 8).to(low).requires_grad_(), drawn(*shape, seed=1).requires_grad_()
        exact = phases.detach().float()
        y = Turned.apply(qk, phases, exact.cos(), exact.sin())
        plain = rotate(qk.double(), phases.cos(), phases.sin())
        assert y.dtype == low
        tolerance = 1e-5 if low == torch.float32 else 0.1
        close(y.double(), plain, atol=tolerance)
        g = drawn(*y.shape, seed=2)
        for found, expected in zip(
            torch.autograd.grad(y, (qk, phases), g.to(low)), torch.autograd.grad(plain, (qk, phases), g)
        ):
            close(found.double(), expected.double(), atol=4 * tolerance)


# ---- xpos at long lengths


def xpos_score(qk, m, n, scale=512):
    """Its formula, from the distance alone: qk (1, T, 2, 1, 64)."""
    i = torch.arange(32, dtype=torch.float64)
    q, k = (torch.view_as_complex(qk[0, t, j, 0].double().unflatten(-1, (-1, 2))) for t, j in ((m, 0), (n, 1)))
    turned = q.conj() * k * torch.exp(1j * (n - m) * 10000.0 ** (-i / 32))
    return (turned.real * ((2 * i / 64 + 0.4) / 1.4) ** ((m - n) / scale)).sum()


PAIRS = [(65535, 65535), (65535, 65000), (65535, 30000), (65535, 0), (33000, 32000), (100, 3), (0, 0)]


@pytest.mark.parametrize("low,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_xpos_of_65536_positions(low, tolerance):
    """Factors of one fixed reference would be e^160 there, and float32 ends at e^88. The pass in between needs no
    tokens: positions stand for it."""
    at = sorted({t for pair in PAIRS for t in pair})
    qk, positions = drawn(1, len(at), 2, 1, 64, dtype=torch.float32), torch.tensor(at, dtype=torch.float64)
    y = encoded(scheme("xpos"), qk.to(low), positions=positions)
    assert y.dtype == low and torch.isfinite(y).all() and y.abs().max() > 1e30
    spread = torch.zeros(1, 65536, 2, 1, 64).index_copy(1, torch.tensor(at), qk.to(low).float())
    for m, n in PAIRS:
        found = product(y.float(), at.index(m), at.index(n))
        close(found.double(), xpos_score(spread, m, n).view(1), atol=tolerance)


def test_xpos_decodes_beyond_any_single_pass():
    """The reference moves along with the queries, and cached keys by powers of 2: not one bit is lost where none
    underflows."""
    pos, T = scheme("xpos", {"scale": 16.0}), 6000  # as far, for the factors, as 192,000 positions at 512
    qk, cache, start = drawn(1, T, 2, 1, 64, dtype=torch.float32), {}, 0
    for size in (1900, 1, 1, 1500, 40, 1, 1700, T - 5145, 1, 1):
        y = encoded(pos, qk[:, start : start + size], start, cache=cache)
        k = y[:, :, 1].transpose(1, 2)
        cache["k"] = torch.cat((cache["k"], k), 2) if "k" in cache else k
        start += size
    assert start == T
    found = (y[0, -1, 0] * cache["k"][0, 0]).sum(-1)  # (T,)
    assert torch.isfinite(cache["k"]).all()
    for n in (T - 1, T - 2, T - 30, T - 500, T - 1500, T - 5000, 0):
        close(found[n].double(), xpos_score(qk, T - 1, n, scale=16), atol=1e-5)
    whole = encoded(pos, qk[:, :2000])
    before = {"k": whole[:, :1999, 1].transpose(1, 2), "pos.exponents": layer_context(pos, whole[:, :, 0]).prepared[2]}
    encoded(pos, qk[:, 1999:2000], 1999, cache=before)
    ratio = before["k"].double() / whole[:, :1999, 1].transpose(1, 2)
    assert torch.equal(ratio[0, 0, 1900:].log2(), ratio[0, 0, 1900:].log2().round())


def test_xpos_refuses_a_pass_that_overflows():
    model = GPT(config("xpos", {"scale": 2.0}, n_layer=1))
    with pytest.raises(ValueError, match="xpos.* more than 261 tokens at scale 2.0, and this one has 300"):
        model(tokens(300))
    refused({"pos": "xpos", "pos_options": {"scale": 0.01}}, ["more than 1 tokens at scale 0.01, and block_size is 12"])


def test_xpos_in_documents_overflows_no_earlier():
    """Hidden keys of an earlier document are far ahead by their own positions, and inf where hidden would be nan."""
    fields = dict(n_layer=1, n_head=2, n_embd=8, document_mask=True, eot=7)
    model, idx = GPT(config("xpos", {"scale": 2.0}, **fields)).eval(), tokens(250, B=1)
    idx[idx == 7], idx[0, 235] = 8, 7
    with torch.no_grad():
        whole, caches = model.hidden(idx), [{}]
        alone = torch.cat([model.hidden(part) for part in idx.split([236, 14], 1)], 1)
        cached = torch.cat([model.hidden(part, caches) for part in idx.split([230] + [1] * 20, 1)], 1)
    close(whole, alone, atol=1e-5)
    close(cached, alone, atol=1e-5)


# ---- pope


def test_popes_delta_is_clamped_and_uniform_at_the_start():
    delta = scheme("pope", {"start": "uniform"}, heads=8).delta
    assert -2 * math.pi <= delta.min() < -6 and -0.3 < delta.max() <= 0
    assert delta.mean().item() == pytest.approx(-math.pi, abs=0.3) and delta.std().item() == pytest.approx(
        1.81, abs=0.2
    )
    model = shaken(config("pope", n_layer=1))
    beyond, inside = (model.transformer.h[0].attn.pos.delta.detach() > 0), tokens(BLOCK)
    model(inside, inside)[1].backward()
    gradient = model.transformer.h[0].attn.pos.delta.grad
    assert beyond.any() and not gradient[beyond].any() and gradient[~beyond].all()
    at_start = GPT(config("pope", n_layer=1))
    at_start(inside, inside)[1].backward()
    assert at_start.transformer.h[0].attn.pos.delta.grad.all()  # 0 is an end of the range, and still gets one


# ---- gape


def gape_bias(pos, qk, m, n):
    """Its formula, of the unrotated q and k (H, D) of two tokens."""
    q, k = qk[0, m, 0].double(), qk[0, n, 1].double()
    w_g, w_l, b_g, b_l, gamma = (w.detach().double() for w in (pos.w_g, pos.w_l, pos.b_g, pos.b_l, pos.gamma))
    g, fading = F.softplus((w_g * q).sum(-1) + b_g), 1 - torch.sigmoid((w_l * k).sum(-1) + b_l)
    return -F.softplus(gamma) * g * fading * (m - n) / pos.unit


@pytest.mark.parametrize("low,close_by,far", [(torch.float32, 3e-5, 1e-6), (torch.bfloat16, 3e-3, 0.012)])
def test_gape_at_256_training_lengths(low, close_by, far):
    """Also in bfloat16, whose product of a gate and a position would be off by 0.5 and more: `close_by` to a neighbour,
    relative `far` to all."""
    pos, at = scheme("gape", heads=2), [0, 1, 1000, 40000, 65534, 65535]
    with torch.no_grad():
        for w in (pos.w_g, pos.w_l):
            w *= 10
    qk = drawn(1, len(at), 2, 2, 64, dtype=torch.float32).to(low)
    y = encoded(pos, qk, positions=torch.tensor(at, dtype=torch.float64))
    assert y.dtype == low
    spread = torch.zeros(1, 65536, 2, 2, 64, dtype=low).index_copy(1, torch.tensor(at), qk)
    for i, m in enumerate(at):
        for j, n in enumerate(at[: i + 1]):
            found, exact = product(y[..., 64:].float(), i, j).double() / 8, gape_bias(pos, spread, m, n)
            assert ((found - exact).abs() <= close_by + far * exact.abs()).all(), (m, n, found, exact)
    assert exact.abs().max() == 0


def test_gapes_gradient_in_low_precision():
    """Its gates' gradients are near those of float32 at the training length, through the parts of products too."""
    found = []
    for low in (False, True):
        model = build("gape", torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            model(tokens(BLOCK), tokens(BLOCK, seed=1))[1].backward()
        pos = model.transformer.h[0].attn.pos
        found.append(torch.cat([p.grad.flatten() for p in (pos.w_g, pos.w_l, pos.gamma)]))
    assert (found[1] - found[0]).norm() < 0.1 * found[0].norm()


# ---- selective


def test_selectives_phases_at_long_lengths():
    """In float32, as float64 has them, where all steps have one sign; also in pieces with a cache."""
    pos, T = scheme("selective", {"phase_bias": True}, width=16, heads=2), 20000
    qk = drawn(1, T, 2, 2, 16, dtype=torch.float32)
    exact = encoded(scheme("selective", {"phase_bias": True}, width=16, heads=2, dtype=torch.float64), qk.double())
    close(encoded(pos, qk).double(), exact, atol=5e-3)
    cache, found = {}, []
    for start, part in zip((0, 12000, 19990), qk.split([12000, 7990, 10], 1)):
        found.append(encoded(pos, part, start, cache=cache))
    close(torch.cat(found, 1).double(), exact, atol=5e-3)


def test_what_schemes_keep_for_the_backward_pass():
    """Bytes of activations, relative to rope's: the turned q and k serve the gradients of phases."""

    def kept(pos, options=None):
        model, seen = GPT(config(pos, options, n_embd=64, n_head=2, block_size=64, n_layer=1)), {}

        def pack(t):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.hidden(tokens(64, B=4))
        return sum(seen.values())

    rope = kept("rope")
    for pos, options, limit in (
        ("prope", {}, 1.0),
        ("lerope", {}, 1.02),
        ("xpos", {}, 1.05),
        ("pope", {}, 1.5),
        ("gape", {}, 1.5),
        ("selective", {}, 1.5),
        ("selective", {"gate": True, "phase_bias": True, "rank": 0}, 1.6),
    ):
        assert kept(pos, options) < limit * rope + 1e4, (pos, kept(pos, options) / rope)


@pytest.mark.parametrize(
    "bad,words",
    [
        (("prope", {"p": 1.5}), ["p must lie in", "1.5"]),
        (("xpos", {"scale": 0.0}), ["scale must be positive"]),
        (("pope", {"base": -1.0}), ["base must be positive"]),
        (("selective", {"rank": -1}), ["rank"]),
        (("selective", {"std": 0.0}), ["std must be positive"]),
        (("selective", {"base": 0.0}), ["base must be positive"]),
        (("gape+rope", {}), ["gape cannot be combined with rope", "encode"]),
        (("pope+xpos", {}), ["cannot be combined", "encode"]),
    ],
)
def test_bad_options(bad, words):
    refused({"pos": bad[0], "pos_options": bad[1]}, words)
