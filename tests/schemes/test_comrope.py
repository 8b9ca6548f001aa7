"""comrope: its algebra against torch.matrix_exp, initial values, training, the unit."""

import dataclasses
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from models import (
    BLOCK,
    LAYERS,
    WIDTH,
    D,
    build,
    cases_of,
    causal_scores,
    close,
    config,
    layer_scores,
    relative_error,
    tokens,
)

from model import GPT
from schemes.comrope import skew_canonical_form


def skew(frequencies, seed=None):
    """P (H=1, blocks, b, b) with the given frequencies (blocks, b/2), in a random frame if there is a seed."""
    omega = torch.tensor(frequencies, dtype=torch.float64)
    A = reference.block_diagonal(omega[..., None, None] * reference.J)
    if seed is not None:
        random = torch.randn(A.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        Q = torch.linalg.qr(random)[0]
        A = Q @ A @ Q.mT
    return (A / 2).unsqueeze(0)


HARD_P = {
    "random": torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)),
    "large": 100 * torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6)),
    "zero": torch.zeros(1, 2, 8, 8, dtype=torch.float64),
    "symmetric": torch.ones(1, 2, 8, 8, dtype=torch.float64),  # A = 0 although P is not
    "block 2 zero": torch.zeros(1, 8, 2, 2, dtype=torch.float64),
    "all equal": skew([[1.0] * 4, [0.5] * 4], seed=0),
    "two equal": skew([[1.0, 1.0, 2.0, 0.3], [0.5, 0.7, 0.7, 0.7]], seed=1),
    "two equal, aligned": skew([[1.0, 1.0, 2.0, 0.3], [0.5, -0.5, 0.7, 0.7]]),
    "nearly equal": skew([[1.0, 1.0 + 1e-9, 2.0, 2.0 + 1e-14], [0.5, 0.5 + 1e-5, 0.7, 0.7 - 1e-12]], seed=2),
    "some zero": skew([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.5]], seed=3),
    "nearly zero": skew([[1.0, 1e-9, 1e-14, 2.0], [1e-5, 1e-30, 0.1, 0.5]], seed=4),
    "above pi": skew([[3.0, 6.0, 2 * math.pi, 7.0], [3.0, 2 * math.pi + 3.0, 1.0, 1.0 + 2 * math.pi]], seed=5),
    "block 2": skew([[1.0], [-2.0], [0.0], [1e-10], [3.0], [7.0], [-1e-30], [0.5]]),
    "block 4, aligned": skew([[1.0, -1.0], [-2.0, 0.5], [0.0, -3.0], [1.0, 1.0 + 1e-12]]),
    "block 4": skew([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0], [3.0, 1e-10]], seed=6),
}


@pytest.mark.parametrize("kind", ["ap", "ld", "ld-shared"])
@pytest.mark.parametrize("name", HARD_P)
def test_comrope_equals_matrix_exp(name, kind):
    """Scores, and the gradients of a loss of the scores with respect to P, θ, the projection and its bias, against
    autograd through torch.matrix_exp, also where frequencies coincide or vanish."""
    P, T, width, unit = HARD_P[name], 9, 16, 3.0
    options = {"block": P.size(-1), "kind": kind, "unit": unit}
    attn = GPT(config("comrope", options, n_head=1, n_embd=width, n_layer=1)).double().transformer.h[0].attn
    x, weights = torch.randn(T, width, dtype=torch.float64), torch.randn(1, T, T, dtype=torch.float64)
    parameters = dict(attn.named_parameters())
    del parameters["c_proj.weight"], parameters["c_proj.bias"]
    with torch.no_grad():
        for own, parameter in parameters.items():
            parameter.copy_(P if own == "pos.P" else torch.rand(parameter.shape, dtype=torch.float64) + 0.5)
    ours = layer_scores(attn, x)

    q, k, _ = attn.c_attn(x).view(T, 3, 1, width).unbind(1)
    R = reference.comrope_rotations(attn.pos.P, attn.pos.theta, unit, T)
    q, k = (torch.einsum("thij,thj->hti", R, z) for z in (q, k))
    theirs = causal_scores(q, k)
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()

    grads, expected = (torch.autograd.grad((weights * s.sin()).sum(), parameters.values()) for s in (ours, theirs))
    for own, a, b in zip(parameters, grads, expected):
        assert (a - b).abs().max() <= 1e-8 * b.abs().max() + 1e-10, own
    if "zero" not in name and name != "symmetric":
        assert expected[list(parameters).index("pos.P")].abs().max() > 1e-3


@pytest.mark.parametrize("name", HARD_P)
def test_skew_canonical_form(name):
    """A = Q (⊕ ω J) Qᵀ with an orthogonal Q and ω ≥ 0, for a batch that mixes easy and hard blocks."""
    A = HARD_P[name] - HARD_P[name].mT
    A = torch.cat((A, torch.randn_like(A) - torch.randn_like(A)))
    A = A - A.mT
    Q, omega = skew_canonical_form(A)
    b = A.size(-1)
    assert omega.shape == (*A.shape[:-2], b // 2) and omega.min() >= 0
    close(Q @ Q.mT, torch.eye(b, dtype=torch.float64).expand_as(A), atol=1e-13)
    form = reference.block_diagonal(omega[..., None, None] * reference.J)
    close(Q @ form @ Q.mT, A, atol=1e-13 * A.abs().max().item())


def test_comrope_gradient_in_float32_at_length_1024():
    """The path that training takes: P's gradient in float32 arithmetic stays close to the float64 one."""
    results = []
    for dtype in (torch.float64, torch.float32):
        model = GPT(config("comrope", block_size=1024, n_layer=1)).to(dtype)
        attn = model.transformer.h[0].attn
        with torch.no_grad():
            attn.c_attn.weight *= 10
        model(tokens(1024), tokens(1024, seed=1))[1].backward()
        results.append(attn.pos.P.grad)
    assert relative_error(results[1], results[0]) < 1e-3


def test_comrope_folds_its_frame_in_float32_under_autocast():
    """The frame is data of the positions, like an angle: bfloat16 would turn it by up to 1/256."""
    model, seen = build("comrope", torch.float32), []
    for block in model.transformer.h:
        fold = block.attn.pos.fold
        block.attn.pos.fold = lambda c_attn, Q, fold=fold: seen.append(fold(c_attn, Q)) or seen[-1]
    model(tokens(BLOCK))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(BLOCK))
    assert len(seen) == 2 * LAYERS
    for plain, low in zip(seen[:LAYERS], seen[LAYERS:]):
        assert all(torch.equal(a, b) for a, b in zip(plain, low))


def test_comrope_of_block_2_is_rope_with_learned_frequencies():
    """No frame is left: the equivalent rope has the same weights up to the sign of a channel pair, and frequencies
    |2P|/unit for each head and pair."""
    model = build("comrope 2 unit")
    rope = model.to_rope()
    signs = [torch.tensor(s).view(2, 1) for s in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    for ours, theirs in zip(model.transformer.h, rope.transformer.h):
        P = ours.attn.pos.P.detach()
        close(theirs.attn.pos.freqs, (P[..., 1, 0] - P[..., 0, 1]).abs() / 3.0)
        q, turned = (block.attn.c_attn.weight[:WIDTH].unflatten(0, (-1, 2)) for block in (ours, theirs))  # (C/2, 2, C)
        assert all(any(torch.allclose(b, a * sign) for sign in signs) for a, b in zip(q, turned))


# ------------------------------------------------------------------------------------------------
# Initial values, training, the unit


def test_initial_own_values():
    for kind, heads in (("ld", 24), ("ld-shared", 1)):  # the paper's θ, and the authors' code's
        model = GPT(config("comrope", {"init": "gaussian", "kind": kind, "block": 2}, n_head=24, n_embd=384))
        first, second = (block.attn.pos for block in model.transformer.h)
        assert first.theta.shape == (heads, 8) and first.P.shape == (24, 8, 2, 2)
        assert first.P.std().item() == pytest.approx(1, rel=0.1)
        assert first.theta.std().item() == pytest.approx(1, rel=0.1 if heads > 1 else 0.8)
        assert not torch.equal(first.P, second.P) and not torch.equal(first.theta, second.theta)
    assert (GPT(config("comrope", {"kind": "ld"})).transformer.h[0].attn.pos.theta == 1).all()
    # rope: A's frequencies are RoPE's in radians per token, times the unit, distinct within a block
    for unit in (None, 1.0):
        pos = GPT(config("comrope", {"unit": unit})).transformer.h[0].attn.pos
        A = (pos.P - pos.P.mT)[2].double() / (unit or BLOCK)
        found = torch.linalg.eigvals(A).imag.flatten().sort(descending=True).values[: D // 2]
        close(found, reference.rope_angles(2, D, 10000.0)[1], atol=1e-6)


TRAINED = {
    "comrope": {},
    "ld": {"kind": "ld"},
    "gaussian": {"init": "gaussian"},
    "block 2": {"block": 2},
    "unit 1": {"unit": 1.0},
}


def train(model, steps, lr=2e-3):
    """Losses on a task that needs positions: to name the token three before."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        idx = torch.randint(16, (16, 32), generator=generator)
        targets = F.pad(idx, (3, 0), value=-1)[:, :32]
        loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@cases_of(TRAINED, fast=["comrope"])
def test_comrope_trains_at_the_recipes_learning_rate(case):
    model = GPT(config("comrope", TRAINED[case], block_size=32, vocab_size=16))
    pos = model.transformer.h[0].attn.pos
    before = pos.P.detach().clone()
    losses = train(model, steps=60)
    assert all(map(math.isfinite, losses))
    assert losses[0] == pytest.approx(math.log(16), abs=0.3)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2 and max(losses) < losses[0] + 0.5
    assert 1e-3 < (pos.P - before).abs().max() < 0.3  # P is trained, and Adam's steps do not throw it about


def test_unit_is_written_out_and_never_depends_on_the_length():
    """pos_options of model.config hold it, so a checkpoint evaluated with another block_size keeps it."""
    model = build("comrope")
    assert model.config.pos_options == {"kind": "ap", "block": 8, "init": "rope", "base": 10000.0, "unit": float(BLOCK)}
    longer = GPT(dataclasses.replace(model.config, block_size=4 * BLOCK)).double()
    longer.load_state_dict(model.state_dict())
    idx = tokens(4 * BLOCK)
    assert torch.equal(longer(idx)[0], model(idx)[0])
    other = GPT(config("comrope", {"unit": 2.0 * BLOCK})).double()
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(other(idx)[0], model(idx)[0], atol=1e-2)
