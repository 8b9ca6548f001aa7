"""seqpe: what it adds in training, where its positions end, documents."""

import copy
import dataclasses

import pytest
import reference
import torch
from models import BLOCK, LAYERS, D, build, close, config, layer_context, refused, tokens

from model import GPT
from schemes import seqpe


def scheme(model):
    return model.transformer.h[0].attn.pos


def embeddings(model, positions):
    """e (N, H, D) by the slow form."""
    own = {name: p.detach() for name, p in scheme(model).named_parameters()}
    return reference.seqpe_embeddings(positions, own.get, D).unflatten(1, (-1, D))


def training(model, seed, T=BLOCK):
    """The positions that a pass with draws sees, and its auxiliary loss."""
    seen = []
    hook = scheme(model).encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with model.parameters_fixed(seed):
        model(tokens(T))
        hook.remove()
        return seen[0], model.auxiliary()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.1, 0.2)])
def test_auxiliary_losses(weights, monkeypatch):
    """From the draws, position by position."""
    seed = 1
    monkeypatch.setattr(seqpe, "CANDIDATES", 6)  # the slow form takes a second for 32
    options = {"digits": 3, "farthest": 400, "contrast": weights[0], "transfer": weights[1]}
    model = GPT(config("seqpe", options | {"width": 16})).double()
    with torch.no_grad():
        for p in scheme(model).parameters():
            p *= 5  # so that embeddings differ
    ctx = layer_context(scheme(model), torch.zeros(1, BLOCK, 48, dtype=torch.float64), seed=seed)
    pivots, candidates, offsets, starts = scheme(model).drawn(ctx)

    contrast = 0
    for p, row in zip(pivots.tolist(), candidates.tolist()):
        e, others = embeddings(model, [p])[0], embeddings(model, row)
        nearest = min(range(len(row)), key=lambda i: abs(row[i] - p))
        similar = (others * e).sum(-1)  # (N, H)
        contrast = contrast - (similar[nearest] - similar.exp().sum(0).log()).mean() / len(pivots)
    transfer = 0
    for places, start in zip(offsets, starts):
        near, far = (embeddings(model, p.tolist()).transpose(0, 1) for p in (places, start + places))  # (H, n, D)
        a, b = (torch.softmax(e @ e.mT, -1).log() for e in (near, far))
        kl = (a.exp() * (a - b)).mean() + (b.exp() * (b - a)).mean()  # over rows and columns, as kl_div's default
        transfer = transfer + kl / len(starts)
    assert contrast > 0.5 and transfer > 1e-4 and offsets.shape == (seqpe.WINDOWS, BLOCK)
    _, loss = training(model, seed)
    close(loss.detach(), weights[0] * contrast + weights[1] * transfer, rtol=1e-9)


def test_the_window_of_training_is_the_teacher():
    """Its embeddings take no gradient from the transfer loss."""
    model = GPT(config("seqpe", {"contrast": 0.0, "transfer": 1.0})).double()
    called, encoder = [], scheme(model).encoder
    encoder.register_forward_hook(lambda module, args, out: called.append((args[0], out.requires_grad)))
    training(model, 0)
    own, windows, base = called  # of the pass itself, of the shifted windows with the pivots, of 0 … T-1
    assert own[1] and windows[1] and not base[1]
    assert base[0].unique().tolist() == list(range(BLOCK)) and windows[0][-1] > BLOCK


def test_draws():
    """Candidates are never the pivot, all within reach; 10 of 16 pivots compare a span of 256."""
    pos = scheme(GPT(config("seqpe")))
    ctx = layer_context(pos, torch.zeros(1, 2000, 48))
    drawn = [pos.drawn(dataclasses.replace(ctx, seed=seed)) for seed in range(30)]
    pivots, candidates, offsets, starts = map(torch.stack, zip(*drawn))
    assert (candidates != pivots.unsqueeze(-1)).all()
    assert pivots.min() >= 0 and candidates.min() >= 0 and max(pivots.max(), candidates.max()) <= 20000
    assert pivots.max() > 19000 and candidates.max() > 19000
    width = candidates.amax(-1) - candidates.amin(-1)  # (30, 16)
    assert (width[:, :6] > 10000).all() and (width[:, 6:] <= 256).all()
    assert offsets.shape == (30, 8, 32) and (offsets.sort(-1).values.diff() > 0).all() and 1900 < offsets.max() < 2000
    assert starts.min() >= 1 and 19000 < (starts + offsets).max() <= 20000


@pytest.mark.slow
def test_positions_shift_in_training_alone():
    model = GPT(config("seqpe", {"width": 16, "layers": 1}))
    starts = []
    for seed in range(60):
        positions, loss = training(model, seed)
        assert torch.equal(positions - positions[0], torch.arange(BLOCK)) and loss.requires_grad
        starts.append(int(positions[0]))
    shifted = [start for start in starts if start]
    assert 1 <= len(shifted) <= 15 and max(shifted) <= 20000 + 1 - BLOCK  # of 60 with probability 0.1
    assert all(torch.equal(training(model, seed)[0], training(model, seed)[0]) for seed in range(5))
    always = GPT(config("seqpe", {"shift": 1.0}))
    assert training(always, 0)[0][0] > 0
    positions, loss = training(always.eval(), 0)
    assert positions[0] == 0 and loss is None
    assert model(tokens(BLOCK)) and model.auxiliary() is None  # outside of an optimizer step


def test_evaluation_draws_nothing(monkeypatch):
    model = build("seqpe").eval()
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: pytest.fail("drawn"))
    state = torch.random.get_rng_state()
    with model.parameters_fixed(3):
        model(tokens(BLOCK))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_loss_is_given_once_and_not_copied():
    model = build("seqpe")
    with model.parameters_fixed(0):
        model(tokens(BLOCK))
        copy.deepcopy(model)
        assert model.auxiliary() is not None and model.auxiliary() is None
    model = GPT(config(["seqpe", "seqpe+alibi"], {"seqpe": {"shift": 0.0}}))
    with model.parameters_fixed(0):
        model(tokens(BLOCK))
        both = model.auxiliary()
    with torch.no_grad():
        alone = GPT(config("seqpe", {"shift": 0.0}))
        with alone.parameters_fixed(0):
            alone(tokens(BLOCK))
            close(both.detach(), alone.auxiliary())


def test_positions_end_at_the_digits():
    model = GPT(config("seqpe", {"digits": 2, "farthest": 60})).eval()
    assert model(tokens(100))[0].isfinite().all()
    for pos, options in (
        ("seqpe", {"digits": 2, "farthest": 60}),
        ("rope+seqpe", {"seqpe": {"digits": 2, "farthest": 60}}),
    ):
        with pytest.raises(
            ValueError, match=f"{pos[-5:]} positions end at length 100: a length of 101 is not possible"
        ):
            GPT(config(pos, options))(tokens(101))
    with pytest.raises(ValueError, match="length of 101"):
        model.generate(tokens(90), 12)
    with pytest.raises(ValueError, match="length of 110"):
        model.hidden(tokens(10), offset=100)
    far = model.hidden(tokens(10), offset=80)
    assert (far - model.hidden(tokens(10))).abs().max() > 0


def test_documents_have_positions_of_their_own():
    """(B, T) positions, of which few differ: as each row alone."""
    pos = scheme(build("seqpe"))
    x = torch.zeros(3, 7, 48, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6], [5, 6, 0, 1, 2, 3, 4]]).double()
    ctx = layer_context(pos, x)
    ctx.positions = positions
    ctx.prepared = pos.prepare([pos], ctx)[0]
    qk = torch.randn(3, 7, 2, 3, 16, dtype=torch.float64)
    found = pos.encode(qk, x, ctx)
    assert torch.equal(found[..., :16], qk)
    for row, own in enumerate(positions):
        ctx.positions = own
        ctx.prepared = pos.prepare([pos], ctx)[0]
        close(pos.encode(qk[row : row + 1], x[:1], ctx)[0], found[row])


def test_options():
    for options, words in (
        ({"digits": 0}, ["digits", "1 … 15"]),
        ({"digits": 3}, ["3 digits end at position 999", "farthest 20000"]),
        ({"width": 24}, ["multiple of the head width 16"]),
        ({"width": 0}, ["multiple of the head width 16, not 2 and 0"]),
        ({"layers": 0}, ["layers"]),
        ({"shift": 1.5}, ["shift in"]),
        ({"contrast": -1.0}, ["contrast"]),
    ):
        refused({"pos": "seqpe", "pos_options": options}, words)
    refused({"pos": "learned+seqpe"}, ["learned cannot be combined with seqpe", "ends at block_size 12", "up to 20000"])
    for allowed in ({"shift": 0.0}, {"farthest": BLOCK - 1}):
        GPT(config("learned+seqpe", {"seqpe": allowed}))
    assert GPT(config("seqpe")).config.pos_options["width"] == 48
    assert len({id(b.attn.pos.encoder) for b in GPT(config("seqpe")).transformer.h}) == 1 < LAYERS
