"""comrope: its algebra against torch.matrix_exp, initial values, training, the unit."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.nn.functional as F
from models import (
    BLOCK,
    LAYERS,
    WIDTH,
    Calls,
    D,
    build,
    cases_of,
    causal_scores,
    close,
    config,
    described,
    layer_context,
    layer_scores,
    relative_error,
    tokens,
)

from model import GPT
from nanope import coordinates
from schemes import _skew
from schemes._skew import skew_canonical_form


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


@pytest.mark.parametrize("b", [2, 4, 8])
def test_decomposition_of_graded_and_equal_frequencies(b):
    """Down to 1e-16 of the largest, a third of them rounded and so often equal; without a question to the device, for
    which a GPU's host would wait."""
    draw = torch.Generator().manual_seed(0)
    omega = 10.0 ** (-16 * torch.rand(500, b // 2, dtype=torch.float64, generator=draw))
    omega[::3] = omega[::3].round(decimals=1)
    frame = torch.linalg.qr(torch.randn(500, b, b, dtype=torch.float64, generator=draw))[0]
    A = frame @ reference.block_diagonal(omega[..., None, None] * reference.J) @ frame.mT
    A = (A - A.mT) / 2
    with Calls("svd") as svd, Calls("_local_scalar") as asked:
        Q, found = skew_canonical_form(A)
    assert svd.count == asked.count == 0
    close(Q @ Q.mT, torch.eye(b, dtype=torch.float64).expand_as(A), atol=1e-13)
    close(Q @ reference.block_diagonal(found[..., None, None] * reference.J) @ Q.mT, A, atol=1e-13)


@pytest.mark.parametrize("b", [4, 8])
def test_decomposition_of_sparse_generators(b):
    """Channels that turn with any others, or not at all: columns vanish, and rounding errors of rounding errors do."""
    draw = torch.Generator().manual_seed(0)
    there = torch.rand(5000, b, b, generator=draw) < torch.rand(5000, 1, 1, generator=draw)
    P = there * torch.randn(5000, b, b, dtype=torch.float64, generator=draw)
    P[::2] = P[::2].sign()
    A = P - P.mT
    Q, omega = skew_canonical_form(A)
    close(Q @ Q.mT, torch.eye(b, dtype=torch.float64).expand_as(A), atol=1e-13)
    close(Q @ reference.block_diagonal(omega[..., None, None] * reference.J) @ Q.mT, A, atol=1e-13)


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


@pytest.mark.slow
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
    options = {"kind": "ap", "block": 8, "init": "rope", "base": 10000.0, "axes": ["token"], "jitter": 0.0}
    assert model.config.pos_options == options | {"unit": float(BLOCK)}
    longer = GPT(dataclasses.replace(model.config, block_size=4 * BLOCK)).double()
    longer.load_state_dict(model.state_dict())
    idx = tokens(4 * BLOCK)
    assert torch.equal(longer(idx)[0], model(idx)[0])
    other = GPT(config("comrope", {"unit": 2.0 * BLOCK})).double()
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(other(idx)[0], model(idx)[0], atol=1e-2)


# ------------------------------------------------------------------------------------------------
# Several axes, positions of each text, jitter

AXES = ["token", "line", "byte"]


def qk(attn, x, positions):
    """q and k (B, T, 2, H, D) of a layer for its normed input x (B, T, C) at these positions."""
    pos, ctx = attn.pos, layer_context(attn.pos, x, positions=positions)
    projected = pos.project(attn.c_attn, x, ctx)[..., : 2 * WIDTH]
    return pos.encode(projected.unflatten(2, (2, -1, D)), x, ctx)


def scores(attn, x, positions):
    return torch.einsum("bmhd,bnhd->bhmn", *qk(attn, x, positions).unbind(2))


def layer_of(case):
    return build(case).transformer.h[0].attn


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_coordinates_of_documents_and_of_pieces():
    """Against a count in the text itself: lines, sentences and bytes restart with a document, also in a later piece."""
    idx, starts = tokens(50, B=3), [[0, 9, 10, 33], [0, 41], [0]]
    places = torch.stack([torch.cat([torch.arange(n) for n in torch.tensor([*s, 50]).diff()]) for s in starts])
    words = [reference.VOCABULARY[i % 8] for i in range(40)]
    table = coordinates.table(words, 44)
    for axes in (AXES, ["token", "sentence", "byte"], ["token", "byte"]):
        expected = torch.stack(
            [
                torch.cat([reference.coordinates(text, axes) for text in row.tensor_split(s[1:])])
                for row, s in zip(idx, starts)
            ]
        )
        cache, found = {}, []
        for piece, at in zip(idx.split([7, 3, 1, 39], 1), places.split([7, 3, 1, 39], 1)):
            ctx = SimpleNamespace(idx=piece, places=at, positions=at.double() + 5)
            found.append(coordinates.of_tokens(table, ctx, 5, cache)(axes))
        assert torch.equal(torch.cat(found, 1), expected + 5)


def test_table_of_tokens():
    words = [b"a\n\nbc", b'Mr."', "end.\u201d ".encode(), b".a", b"", b"\n"]
    rows = coordinates.table(words, 8, eot=6).tolist()
    assert rows == [
        [5, 2, 2, 0],
        [4, 0, 4, 1],
        [8, 0, 8, 1],
        [2, 0, 2, 0],
        [0] * 4,
        [1, 1, 0, 0],
        [0, 1, 0, 1],
        [0] * 4,
    ]


def test_a_model_without_the_table_says_so_and_a_state_dict_brings_it():
    made = [GPT(config("comrope", {"axes": AXES, "kind": "ld"}), seed=s) for s in (0, 1)]
    with pytest.raises(ValueError, match="describe_tokens"):
        made[1](tokens(BLOCK))
    made[1].load_state_dict(described(made[0]).state_dict())
    assert torch.equal(made[1](tokens(BLOCK))[0], made[0](tokens(BLOCK))[0])
    with pytest.raises(ValueError, match="several axes"):
        made[0].to_rope()


def test_ap_and_ld_coincide_on_one_axis_and_differ_on_several():
    """ld with θ = 1. From init rope, ld on several axes is rope at the start, and ap is not."""
    for axes, same in ((["token"], True), (["token", "byte"], False)):
        made = {k: described(GPT(config("comrope", {"kind": k, "axes": axes})).double()) for k in ("ap", "ld")}
        rope = GPT(config("rope")).double()
        for model in (*made.values(), rope):
            for block in model.transformer.h:
                block.attn.c_attn.weight.data *= 20
        logits, expected = {k: m(tokens(BLOCK))[0] for k, m in made.items()}, rope(tokens(BLOCK))[0]
        close(logits["ld"], expected, atol=1e-5)
        assert torch.allclose(logits["ap"], expected, atol=1e-5) == same
        for block in made["ld"].transformer.h:
            block.attn.pos.theta.data.fill_(1)
        for a, b in zip(*(m.transformer.h for m in made.values())):
            b.attn.pos.P.data.copy_(a.attn.pos.P)
        assert torch.allclose(made["ld"](tokens(BLOCK))[0], logits["ap"], atol=1e-9) == same


@pytest.mark.parametrize("case", ["comrope axes", "comrope axes ld"])
def test_a_shift_of_all_coordinates_leaves_scores_unchanged(case):
    """By its own number on each axis, and by the offset of all positions; float64 angles also far out."""
    attn, x, at = layer_of(case), normal(2, 9, WIDTH), 30 * normal(2, 9, 3)
    close(scores(attn, x, at + torch.tensor([65536.0, -3.5, 700])), scores(attn, x, at), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(scores(attn, x, at * 1.1), scores(attn, x, at), atol=1e-2)
    model = build(case)
    close(model.hidden(tokens(BLOCK), offset=4096), model.hidden(tokens(BLOCK)), atol=1e-8)


@pytest.mark.parametrize("case", ["comrope", "comrope 4 ld", "comrope axes", "comrope axes ld-shared"])
def test_positions_of_each_text(case, monkeypatch):
    """(B, T) positions, as where documents restart, or coordinates: a row is what it is alone, and gradients are sums
    over rows, also where tokens come in chunks."""
    attn, x, axes = layer_of(case), normal(3, 9, WIDTH), max(1, len(layer_of(case).pos.axes))
    at = torch.randint(40, (3, 9, axes), generator=torch.Generator().manual_seed(1)).double()
    at = at if attn.pos.axes else at[..., 0]
    own, weights = [*attn.pos.parameters()], normal(3, 9, 2, 3, D)
    alone = [qk(attn, x[i : i + 1], at[i : i + 1] if attn.pos.axes else at[i]) for i in range(3)]
    expected = torch.autograd.grad((torch.cat(alone) * weights).sum(), own)
    for chunk in (2**25, 200):
        monkeypatch.setattr(_skew, "CHUNK", chunk)
        found = qk(attn, x, at)
        close(found, torch.cat(alone))
        for gradient, other in zip(torch.autograd.grad((found * weights).sum(), own), expected):
            close(gradient, other, rtol=1e-9, atol=1e-9)


def test_other_schemes_see_positions_alone():
    """In a combination: (T,), with the same jitter on the axis of tokens."""
    options = {"comrope": {"axes": AXES, "kind": "ld", "jitter": 0.2}}
    model, seen = described(GPT(config("learned+comrope+alibi", options))), []
    model.transformer.wpe.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    told = model.contexts
    model.contexts = lambda *args: [seen.append(c.parts) or c for c in told(*args)]
    model(tokens(BLOCK))
    assert torch.equal(seen[0], torch.arange(BLOCK))
    jittered = seen[1]["comrope"].positions
    assert jittered.shape == (2, BLOCK, 3) and torch.equal(seen[1]["alibi"].positions, jittered[1, :, 0])
    assert not torch.equal(jittered[0, :, 0], torch.arange(BLOCK))


@pytest.mark.parametrize("axes", [["token"], AXES])
def test_jitter(axes):
    """Of each step's own, within half a step of the axis, the same in every text; none in evaluation."""
    plain, model = (described(GPT(config("comrope", {"axes": axes, "kind": "ld", "jitter": j}))) for j in (0.0, 0.3))
    idx, seen = tokens(400, B=1).expand(2, -1), []
    told = model.positions
    model.positions = lambda *args: seen.append(told(*args)) or seen[-1]
    for seed in (1, 1, 2):
        with model.parameters_fixed(seed), torch.no_grad():
            model(idx)
    assert torch.equal(model.eval()(idx)[0], plain.eval()(idx)[0])
    (a,), (b,), (c,), (d,) = seen
    assert torch.equal(a, b) and not torch.equal(a, c) and d.frac().abs().max() == 0
    noise = a - d
    assert noise.abs().max() == pytest.approx(0.49) and abs(noise.std() - 0.27) < 0.02
    assert torch.equal(a.round(), d)  # a table's row is that of the token, the last one too
    if len(axes) > 1:
        assert torch.equal(noise[0], noise[1]) and (noise.flatten(0, 1).std(0) > 0.2).all()
