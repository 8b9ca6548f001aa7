"""model.py against independent references (reference.py, transformers, the spec's vectors) and invariances.

Where exactness matters the models are float64 with random weights, large enough that positions matter.
"""

import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
from model import GPT, SCHEMES, Context, GPTConfig, PathRotation, linear_cross_entropy, linear_nll, path_phases, rotate

BLOCK, VOCAB, LAYERS, HEADS, WIDTH = 12, 40, 2, 3, 48  # 3 heads of 16: no power of 2
SHAPE = dict(block_size=BLOCK, vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, bias=True)

# Every scheme, and every option of it away from its default at least once
CASES = {
    "learned": {},
    "sinusoidal": {},
    "sinusoidal base scale": {"base": 50.0, "scale": 0.3},
    "none": {},
    "rope": {},
    "rope base fraction": {"base": 50.0, "fraction": 0.5},
    "rope explicit": {"explicit": True, "base": 50.0, "fraction": 0.5},
    "rope grouped": {"qkv": "grouped"},
    "crope": {},
    "crope base fraction": {"base": 50.0, "fraction": 0.25},
    "comrope": {},
    "comrope 4 ld": {"block": 4, "kind": "ld", "base": 50.0},
    "comrope 2 unit": {"block": 2, "unit": 3.0},
    "comrope gaussian": {"init": "gaussian", "unit": 5},
    "carope": {},
    "carope embedding": {"source": "embedding", "base": 50.0},
    "carope paper": {"init": "paper"},
    "carope constant": {"content": False},
    "alibi": {},
}
all_cases = pytest.mark.parametrize("case", CASES)
all_schemes = pytest.mark.parametrize("pos", SCHEMES)


def config(pos="rope", options=None, **shape):
    return GPTConfig(pos=pos, pos_options=options or {}, **(SHAPE | shape))


def build(case, dtype=torch.float64, seed=0, **shape):
    """A model in which everything is random and matters: no zero bias, no small weight, no untouched frequency."""
    model = GPT(config(case.split()[0], CASES[case], **shape), seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def tokens(T, B=2, seed=0, V=VOCAB):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def close(a, b, rtol=0.0, atol=1e-10, **kwargs):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, **kwargs)


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def extends(case):
    return case != "learned"


def own_parameters(model):
    """The scheme's own, by name: what GPT-2 has not."""
    return {
        n: p
        for n, p in model.named_parameters()
        if n.split(".")[-1] in ("P", "theta", "A", "B") or "c_pos" in n or "wpe" in n
    }


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def attended(monkeypatch):
    """The (q, k, v) that reach scaled_dot_product_attention, which the model looks up at call time. It then returns q."""
    calls = []

    def record(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        calls.append((q, k, v))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return calls


def causal_scores(q, k):
    """(…, T, D) → (…, T, T): dot products, 0 above the diagonal, as in vectors.json."""
    return (q @ k.mT).tril()


def layer_scores(attn, x, start, attended):
    """(H, T, T) scores of one attention layer for the normed input x (T, C), the first token at position `start`."""
    ctx = Context(start, x.size(0), x.dtype, x.device, x[None])
    ctx.constants = attn.constants([attn])
    (ctx.shared,) = attn.prepare([attn], ctx) or [None]
    attended.clear()
    attn(x[None], ctx)
    q, k, _ = attended[-1]
    return causal_scores(q[0], k[0])


# ------------------------------------------------------------------------------------------------
# The spec's vectors

VECTORS = json.loads((Path(__file__).parent / "data/vectors.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("index", range(len(VECTORS)), ids=lambda i: f"{i}-{VECTORS[i]['scheme']}")
def test_vectors(index, dtype, attended):
    case = VECTORS[index]
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in case.items() if isinstance(value, list)}
    pos, H, T, D, start = case["scheme"], case["H"], case["T"], case["D"], case.get("start", 0)
    C = H * D
    options = {"block": case["block"], "unit": 1} if pos == "comrope" else {}
    options |= {"base": case["base"]} if "base" in case else {}
    model = GPT(config(pos, options, block_size=8, n_layer=1, n_head=H, n_embd=C, bias=False)).to(dtype)
    attn = model.transformer.h[0].attn
    with torch.no_grad():
        if pos == "crope":
            x = given["x"]
            attn.c_attn.A.copy_(torch.cat([given["A" + name] for name in "qkv"]))
            attn.c_attn.B.copy_(torch.cat([given["B" + name] for name in "qkv"]))
        else:  # a projection that makes the given q and k from x: T ≤ C rows are linearly independent
            x = given.get("x", torch.eye(T, C, dtype=torch.float64))
            outputs = [given[name].transpose(0, 1).reshape(T, C) for name in "qk"]
            attn.c_attn.weight[: 2 * C] = torch.cat([(torch.linalg.pinv(x) @ y).T for y in outputs])
        if pos == "comrope":
            attn.P.copy_(given["P"])
        if pos == "carope":
            attn.c_pos.weight.copy_(given["W"])
            attn.c_pos.bias.copy_(given["b"])
            phases = path_phases(attn.log_frequencies(x.to(dtype)[None]), attn.head_width // 2)[0].transpose(0, 1)
            close(phases.double(), given["phases"], atol=1e-12 if dtype == torch.float64 else 2e-6)
    scores = layer_scores(attn, x.to(dtype), start, attended)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4 if start > 1000 else 1e-5
    assert scores.dtype == dtype
    assert (scores.double() - given["scores"]).abs().max() <= tolerance * given["scores"].abs().max()
    if "v" in given:
        error = attended[-1][2][0].double() - given["v"]
        assert error.abs().max() <= tolerance * given["v"].abs().max()


# ------------------------------------------------------------------------------------------------
# The whole model against the slow reference


@all_cases
def test_logits_loss_and_gradients_equal_the_reference(case):
    """Values and every gradient, through explicit per-position rotation matrices and autograd, at up to twice block_size."""
    model = build(case)
    T = 2 * BLOCK if extends(case) else BLOCK
    idx, targets = tokens(T), tokens(T, seed=1)
    targets[0, 3] = targets[1, :5] = -1
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = reference.logits(model.config, parameters, idx)
    expected_loss = reference.cross_entropy(expected, targets)
    expected_loss.backward()
    logits, none = model(idx)
    assert none is None and logits.dtype == torch.float64
    close(logits, expected, atol=1e-9)
    none, loss = model(idx, targets)
    assert none is None and loss.dtype == torch.float64 and loss.shape == ()
    close(loss, expected_loss)
    loss.backward()
    assert parameters.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        close(gradient, parameters[name].grad, rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_real_and_complex_rotation_are_equal(monkeypatch):
    """Eager code multiplies complex numbers, compiled code real ones."""
    x = torch.randn(2, 5, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        y = rotate(x, angles.cos(), angles.sin())
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, angles))))
    for a, b in zip(*results):
        close(a, b, atol=1e-13)
    matrices = reference.rotations(angles).expand(5, 2, 3, 8, 8)
    close(results[0][0], torch.einsum("tshij,btshj->btshi", matrices, x))


@pytest.mark.parametrize("H", [1, 2, 3, 4, 6, 8, 12, 20])
def test_alibi_slopes(H):
    attn = GPT(config("alibi", n_head=H, n_embd=4 * H)).transformer.h[0].attn
    close(attn.slopes(), torch.tensor(reference.alibi_slopes(H), dtype=torch.float64), atol=1e-15)
    if H == 8:  # the paper's own example
        close(attn.slopes(), 0.5 ** torch.arange(1, 9, dtype=torch.float64), atol=1e-15)


@pytest.mark.parametrize("width", [2, 6, 48])
def test_sinusoids(width):
    """In float64 for a float64 model: angles, cos and sin are never below the model's dtype."""
    model = GPT(config("sinusoidal", {"base": 100.0, "scale": 2.0}, n_head=1, n_embd=width)).double()
    seen = {}
    model.transformer.h[0].register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model(torch.zeros(1, 300, dtype=torch.int64))
    close(seen["x"][0] - model.transformer.wte.weight[0], reference.sinusoids(300, width, 100.0, 2.0), atol=1e-12)


def test_bias_by_flex_attention_equals_the_dense_path(monkeypatch):
    """What a GPU runs, here uncompiled on the CPU: the same score_bias, as FlexAttention's score_mod."""
    import torch.nn.attention.flex_attention as flex

    model = build("alibi", torch.float32)
    attn, x = model.transformer.h[0].attn, torch.randn(2, 40, WIDTH)
    ctx = Context(0, 40, torch.float32, x.device)
    (ctx.shared,) = attn.prepare([attn], ctx)
    q, k, v = torch.randn(3, 2, HEADS, 40, WIDTH // HEADS)
    dense = attn.attend(q, k, v, ctx)
    monkeypatch.setattr(model_module, "compiled_flex_attention", lambda: flex.flex_attention)
    ctx.block_mask = model_module.causal_block_mask(40, x.device)
    fast = attn.attend(q, k, v, ctx)
    close(fast, dense, atol=2e-5)
    assert not torch.allclose(fast, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-2)


def test_dense_bias_in_several_chunks_of_queries():
    """1,500² scores of 8 heads exceed the 2^24 elements that may exist at once; a prefix of 1,400 does not. Also after a cache."""
    model = build("alibi", torch.float32, n_layer=1, n_head=8, n_embd=32)
    x = tokens(1500, B=1)
    full = model(x)[0]
    close(full[:, :1400], model(x[:, :1400])[0], atol=1e-4)
    caches = [{}]
    model.hidden(x[:, :10], caches)
    close(model.lm_head(model.hidden(x[:, 10:], caches)), full[:, 10:], atol=1e-4)


# ------------------------------------------------------------------------------------------------
# Causality, caches, generation


@all_cases
def test_causal_at_every_length(case):
    """Logits up to t do not change when later tokens do; logits from the changed token on do."""
    model = build(case)
    for T in (BLOCK // 2, BLOCK) + ((2 * BLOCK,) if extends(case) else ()):
        idx = tokens(T)
        logits = model(idx)[0]
        for t in (0, T // 2, T - 2):
            changed = idx.clone()
            changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % VOCAB
            other = model(changed)[0]
            close(other[:, : t + 1], logits[:, : t + 1], atol=1e-12)
            assert (other - logits)[:, t + 1 :].abs().amax(-1).min() > 1e-3


@all_cases
@pytest.mark.parametrize("chunks", [[1] * 20, [5, 1, 7, 7], [20], [12]])
def test_cached_hidden_states_equal_the_uncached(case, chunks):
    """Token by token, and in chunks as a prefill is, beyond block_size where the scheme can."""
    model = build(case)
    total = sum(chunks) if extends(case) else BLOCK
    idx = tokens(total)
    caches, parts = [{} for _ in range(LAYERS)], []
    for chunk in idx.split(chunks if sum(chunks) == total else [3, 1, 8], 1):
        parts.append(model.hidden(chunk, caches))
    close(torch.cat(parts, 1), model.hidden(idx))


def uncached(model, idx, n, temperature=1.0, top_k=None, generator=None):
    """What generate must equal: every token from a forward pass over all before it."""
    for _ in range(n):
        logits = model(idx)[0][:, -1].float()
        if top_k:
            logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
        probabilities = torch.softmax(logits / (temperature or 1), -1)
        new = (
            torch.multinomial(probabilities, 1, generator=generator) if temperature else logits.argmax(-1, keepdim=True)
        )
        idx = torch.cat((idx, new), 1)
    return idx


@all_cases
def test_generate_equals_uncached_decoding(case):
    model = build(case)
    prompt = tokens(4, B=3)
    n = 2 * BLOCK if extends(case) else BLOCK - 4 + 1  # the last token needs no position
    for options in ({"temperature": 0}, {"temperature": 1.3}, {"temperature": 0.8, "top_k": 5}):
        ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
        out = model.generate(prompt, n, **options, generator=ours)
        assert out.shape == (3, 4 + n) and torch.equal(out[:, :4], prompt)
        assert torch.equal(out, uncached(model, prompt, n, **options, generator=theirs))
    assert torch.equal(model.generate(prompt, n, top_k=1), model.generate(prompt, n, temperature=0))
    assert torch.equal(model.generate(prompt, 0), prompt)
    all_of_them, none_named = (
        model.generate(prompt, n, top_k=k, generator=torch.Generator().manual_seed(3)) for k in (10 * VOCAB, None)
    )
    assert torch.equal(all_of_them, none_named)
    assert not torch.equal(model.generate(prompt, n, temperature=0), model.generate(prompt, n, temperature=5.0))


def test_generate_computes_each_token_once_and_keeps_the_mode(monkeypatch):
    model = build("rope").train()
    lengths, hidden = [], GPT.hidden
    monkeypatch.setattr(
        GPT, "hidden", lambda self, idx, caches=None: lengths.append(idx.size(1)) or hidden(self, idx, caches)
    )
    model.generate(tokens(4), 5)
    assert lengths == [4, 1, 1, 1, 1]
    assert model.training
    with pytest.raises(ValueError):
        model.generate(torch.full((1, 4), VOCAB), 5)
    assert model.training, "the mode is restored after an error too"


def test_generate_with_dropout_is_the_model_without():
    model = build("rope", dropout=0.5).train()
    assert torch.equal(model.generate(tokens(4), 9, temperature=0), uncached(model.eval(), tokens(4), 9, temperature=0))


@pytest.mark.parametrize("options", [{"n": -1}, {"temperature": -1.0}, {"top_k": 0}])
def test_generate_refuses(options):
    with pytest.raises(ValueError, match="generate needs"):
        build("rope").generate(tokens(4), **({"n": 3} | options))
    with pytest.raises(ValueError, match="generate needs"):
        build("rope").generate(tokens(0), 3)


def test_learned_refuses_to_extend_and_names_both_lengths():
    model = build("learned")
    for call in (
        lambda: model(tokens(BLOCK + 1)),
        lambda: model(tokens(BLOCK + 1), tokens(BLOCK + 1)),
        lambda: model.generate(tokens(4), BLOCK - 2),
    ):
        with pytest.raises(ValueError, match=rf"(?s)learned.*\b{BLOCK}\b.*\b{BLOCK + 1}\b"):
            call()
    assert not any(SCHEMES[pos].extends for pos in ("learned",)) and all(
        SCHEMES[pos].extends for pos in SCHEMES if pos != "learned"
    )


def test_dropout_is_on_in_training_only_and_seeded():
    model = build("alibi", dropout=0.3)
    idx = tokens(BLOCK)
    plain = build("alibi")(idx)[0]
    assert torch.equal(model.eval()(idx)[0], plain)
    torch.manual_seed(0)
    first = model.train()(idx)[0]
    torch.manual_seed(0)
    assert torch.equal(model(idx)[0], first) and not torch.allclose(first, plain, atol=1e-2)


@all_schemes
def test_dropout_is_where_gpt2_has_it(pos, monkeypatch):
    """On the embeddings, on both outputs of each block, and on the attention weights; none of it in evaluation."""
    model, idx, dropped, attended, original = (
        build(pos, dropout=0.25),
        tokens(BLOCK),
        [],
        [],
        F.scaled_dot_product_attention,
    )
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: dropped.append(p * training) or x)
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: attended.append(kwargs.get("dropout_p", 0.0)) or original(*args, **kwargs),
    )
    model.train()(idx)
    assert [p for p in dropped if p] == [0.25] * (1 + 2 * LAYERS) and attended == [0.25] * LAYERS
    dropped.clear(), attended.clear()
    model.eval()(idx)
    assert not any(dropped + attended)


# ------------------------------------------------------------------------------------------------
# Relative positions


RELATIVE = [case for case in CASES if case.split()[0] in ("rope", "crope", "comrope")]


@pytest.mark.parametrize("case", RELATIVE)
def test_scores_depend_on_relative_positions_only(case, attended):
    attn = build(case).transformer.h[1].attn
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    scores = layer_scores(attn, x, 0, attended)
    assert (layer_scores(attn, x, 1000, attended) - scores).abs().max() <= 1e-9 * scores.abs().max()
    # the same tokens one position further apart do score otherwise
    stretched = torch.cat((x[:1], torch.zeros(1, WIDTH, dtype=torch.float64), x[1:]))
    assert (
        layer_scores(attn, stretched, 0, attended)[:, 2:, 0] - scores[:, 1:, 0]
    ).abs().max() > 1e-3 * scores.abs().max()


@pytest.mark.parametrize("case", RELATIVE)
def test_logits_of_a_sequence_shifted_by_1000_positions(case, monkeypatch):
    model, idx = build(case), tokens(2 * BLOCK)
    logits = model(idx)[0]
    positions = Context.positions.fget
    monkeypatch.setattr(Context, "positions", property(lambda ctx: positions(ctx) + 1000))
    close(model(idx)[0], logits, atol=1e-8)
    monkeypatch.setattr(
        Context, "positions", property(lambda ctx: positions(ctx) * 2)
    )  # the patch does reach the model
    assert (model(idx)[0] - logits).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------
# comrope's algebra


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


@pytest.mark.parametrize("kind", ["ap", "ld"])
@pytest.mark.parametrize("name", HARD_P)
def test_comrope_equals_matrix_exp(name, kind, attended):
    """Scores, and the gradients of a loss of the scores with respect to P, θ, the projection and its bias, against autograd
    through torch.matrix_exp, also where frequencies coincide or vanish."""
    P, T, D, unit = HARD_P[name], 9, 16, 3.0
    model = GPT(
        config("comrope", {"block": P.size(-1), "kind": kind, "unit": unit}, n_head=1, n_embd=D, n_layer=1)
    ).double()
    attn = model.transformer.h[0].attn
    x, weights = torch.randn(T, D, dtype=torch.float64), torch.randn(1, T, T, dtype=torch.float64)
    parameters = dict(attn.named_parameters())
    del parameters["c_proj.weight"], parameters["c_proj.bias"]
    with torch.no_grad():
        parameters["P"].copy_(P)
        for own in set(parameters) - {"P"}:
            parameters[own].copy_(torch.rand(parameters[own].shape, dtype=torch.float64) + 0.5)
    ours = layer_scores(attn, x, 0, attended)

    q, k, _ = attn.c_attn(x).view(T, 3, 1, D).unbind(1)
    R = reference.comrope_rotations(attn.P, attn.theta, unit, T)
    q, k = (torch.einsum("thij,thj->hti", R, z) for z in (q, k))
    theirs = causal_scores(q, k)
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()

    grads, expected = (torch.autograd.grad((weights * s.sin()).sum(), parameters.values()) for s in (ours, theirs))
    for own, a, b in zip(parameters, grads, expected):
        assert (a - b).abs().max() <= 1e-8 * b.abs().max() + 1e-10, own
    if "zero" not in name and name != "symmetric":
        assert expected[list(parameters).index("P")].abs().max() > 1e-3


@pytest.mark.parametrize("name", HARD_P)
def test_skew_canonical_form(name):
    """A = Q (⊕ ω J) Qᵀ with an orthogonal Q and ω ≥ 0, for a batch that mixes easy and hard blocks."""
    A = HARD_P[name] - HARD_P[name].mT
    A = torch.cat((A, torch.randn_like(A) - torch.randn_like(A)))
    A = A - A.mT
    Q, omega = model_module.skew_canonical_form(A)
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
        with torch.no_grad():
            model.transformer.h[0].attn.c_attn.weight *= 10
        model(tokens(1024), tokens(1024, seed=1))[1].backward()
        results.append(model.transformer.h[0].attn.P.grad)
    assert relative_error(results[1], results[0]) < 1e-3


@all_cases
def test_gradients_through_a_cache(case):
    """A sequence in two chunks with a cache has the gradients of the whole: comrope's hand-made backward must know where a
    chunk starts."""
    model, idx = build(case), tokens(BLOCK)
    weights = torch.randn(2, BLOCK, WIDTH, dtype=torch.float64)
    results = []
    for chunks in ([BLOCK], [5, BLOCK - 5]):
        model.zero_grad()
        caches = [{} for _ in range(LAYERS)]
        hidden = torch.cat([model.hidden(chunk, caches) for chunk in idx.split(chunks, 1)], 1)
        (weights * hidden).sum().backward()
        results.append(gradients(model))
    for name, gradient in results[1].items():
        close(gradient, results[0][name], rtol=1e-7, atol=1e-9, msg=name)


def train(model, steps=40, lr=2e-3):
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


@pytest.mark.parametrize("options", [{}, {"kind": "ld"}, {"init": "gaussian"}, {"block": 2}, {"unit": 1.0}], ids=str)
def test_comrope_trains_at_the_recipes_learning_rate(options):
    model = GPT(config("comrope", options, block_size=32, vocab_size=16))
    before = model.transformer.h[0].attn.P.detach().clone()
    losses = train(model, steps=60)
    assert all(map(math.isfinite, losses))
    assert losses[0] == pytest.approx(math.log(16), abs=0.3)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2 and max(losses) < losses[0] + 0.5
    change = (model.transformer.h[0].attn.P - before).abs().max()
    assert 1e-3 < change < 0.3  # P is trained, and Adam's steps do not throw it about


# ------------------------------------------------------------------------------------------------
# Step 0


@pytest.mark.parametrize("base", [10000.0, 50.0])
@pytest.mark.parametrize(
    "pos,options",
    [("carope", {}), ("carope", {"source": "embedding"})]
    + [
        ("comrope", {"kind": kind, "block": block, "unit": unit})
        for kind, block, unit in itertools.product(("ap", "ld"), (2, 4, 8), (None, 1.0))
    ],
    ids=str,
)
def test_step_0_is_rope(pos, options, base):
    """With equal seeds the other weights are equal, so the logits are: float64, up to the float32 rounding of initial values."""
    shape = dict(block_size=64)
    ours = GPT(config(pos, {"base": base, **options}, **shape), seed=3).double()
    rope = GPT(config("rope", {"base": base}, **shape), seed=3).double()
    with torch.no_grad():
        for model in (ours, rope):  # at std 0.02 positions would hardly matter
            for block in model.transformer.h:
                block.attn.c_attn.weight *= 20
    idx = tokens(128)
    expected = rope(idx)[0]
    close(ours(idx)[0], expected, atol=2e-5)
    other = GPT(config("none", **shape), seed=3).double()
    other.load_state_dict(rope.state_dict())
    assert not torch.allclose(other(idx)[0], expected, atol=1e-2)


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


def test_carope_without_content_is_rope_with_a_base_a_head():
    """Every token turns pair i of head h by f_h^i, whatever it is; f_h = base_h^(-2/D)."""
    model = build("carope constant", bias=False)
    attn = model.transformer.h[1].attn
    f = 1 / (1 + F.softplus(attn.c_pos.bias.detach()))  # (H,), all different
    expected = torch.stack([f**i for i in range(D // 2)], -1) * torch.arange(1, 31, dtype=torch.float64).view(-1, 1, 1)
    for x in torch.randn(2, 1, 30, WIDTH, dtype=torch.float64):
        close(path_phases(attn.log_frequencies(x), D // 2)[0], expected, atol=1e-9)
    rope = GPT(config("rope", {"explicit": True}, bias=False)).double()
    state = {k: v for k, v in model.state_dict().items() if "c_pos" not in k}
    for i, block in enumerate(model.transformer.h):
        f = 1 / (1 + F.softplus(block.attn.c_pos.bias.detach()))
        state[f"transformer.h.{i}.attn.freqs"] = torch.stack([f**j for j in range(D // 2)], -1)
    rope.load_state_dict(state)
    close(model(tokens(30))[0], rope(tokens(30))[0], atol=1e-8)


def test_comrope_of_block_2_is_rope_with_learned_frequencies():
    """No frame is left: the equivalent rope has the same weights up to the sign of a channel pair, frequencies |2P|/unit a head and pair."""
    model = build("comrope 2 unit")
    rope = model.to_rope()
    for ours, theirs in zip(model.transformer.h, rope.transformer.h):
        P = ours.attn.P.detach()
        close(theirs.attn.freqs, (P[..., 1, 0] - P[..., 0, 1]).abs() / 3.0)
        q, turned = (block.attn.c_attn.weight[:WIDTH].unflatten(0, (-1, 2)) for block in (ours, theirs))  # (C/2, 2, C)
        assert all(
            any(torch.allclose(b, a * torch.tensor(s).view(2, 1)) for s in ((1, 1), (1, -1), (-1, 1), (-1, -1)))
            for a, b in zip(q, turned)
        )


def test_carope_paper_init():
    """Without the bias W = 0 gives f = 1/(1 + log 2) = 0.5906."""
    attn = GPT(config("carope", {"init": "paper"})).transformer.h[0].attn
    assert attn.c_pos.bias is None and not attn.c_pos.weight.any()
    phases = path_phases(attn.log_frequencies(torch.randn(1, 3, WIDTH)), attn.head_width // 2)[0, :, 0]  # (T, D/2)
    f = 1 / (1 + math.log(2))
    assert round(f, 4) == 0.5906
    close(phases, torch.tensor([[(m + 1) * f**i for i in range(8)] for m in range(3)]), atol=1e-6)


@pytest.mark.parametrize("D,base", [(2, 10000.0), (4, 1e7), (64, 10000.0), (128, 500000.0)])
def test_carope_bias_for_any_head_width(D, base):
    """f = base^(-2/D) at step 0. Where softplus(b) is large, exp(b) would overflow."""
    attn = GPT(config("carope", {"base": base}, n_head=1, n_embd=D)).transformer.h[0].attn
    b = attn.c_pos.bias.double()
    close(1 / (1 + F.softplus(b)), torch.full((1,), base ** (-2 / D), dtype=torch.float64), rtol=1e-5, atol=0)
    if (D, base) == (64, 10000.0):
        assert b.item() == pytest.approx(-0.92666, abs=1e-5)  # the spec's figure


# ------------------------------------------------------------------------------------------------
# Gradients of each scheme's own parameters against finite differences


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.split()[0] in ("learned", "crope", "comrope", "carope") or case == "rope grouped"],
)
def test_own_gradients_equal_finite_differences(case):
    """torch.autograd.gradcheck in float64, through the whole model and its fused loss, all own parameters at once."""
    model, idx, targets = build(case), tokens(8), tokens(8, seed=1)
    own = {name: p.detach().clone().requires_grad_() for name, p in own_parameters(model).items()}
    assert own

    def loss(*values):
        return torch.func.functional_call(model, dict(zip(own, values)), (idx, targets))[1]

    assert torch.autograd.gradcheck(loss, tuple(own.values()), eps=1e-6, atol=1e-7, rtol=1e-4, fast_mode=True)


# ------------------------------------------------------------------------------------------------
# Equivalent models: to_rope, transformers' GPT-2 and GPT-NeoX

ROPES = {
    "rope": {"pos": "rope", "options": {}},
    "rope fraction": {"pos": "rope", "options": {"fraction": 0.5, "base": 50.0}},
    "rope grouped": {"pos": "rope", "options": {"qkv": "grouped"}},
    "crope": {"pos": "crope", "options": {}},
    "crope fraction": {"pos": "crope", "options": {"fraction": 0.5, "base": 50.0}},
} | {
    f"comrope {kind} {block}": {"pos": "comrope", "options": {"kind": kind, "block": block, "unit": 7.0}}
    for kind in ("ap", "ld")
    for block in (2, 4, 8)
}


@pytest.fixture(params=ROPES)
def rope_pair(request, monkeypatch):
    """A random model with biases, and what to_rope makes of it."""
    monkeypatch.setitem(CASES, request.param, ROPES[request.param]["options"])
    model = build(request.param)
    return model, model.to_rope()


def test_to_rope_equals_the_model(rope_pair, tmp_path):
    model, rope = rope_pair
    idx = tokens(3 * BLOCK)
    expected = model(idx)[0]
    assert rope.config.pos == "rope" and rope.config.pos_options["explicit"] is True
    assert {name: p.shape for name, p in rope.named_parameters()} == {
        name: p.shape for name, p in GPT(config("rope")).named_parameters()
    }
    freqs = rope.state_dict()["transformer.h.1.attn.freqs"]
    assert freqs.shape == (HEADS, WIDTH // HEADS // 2) and freqs.dtype == torch.float64
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
    name = "transformer.h.0.attn.freqs"
    before = rope.state_dict()[name].clone()
    for cast in (rope.bfloat16, rope.half, rope.float, lambda: rope.to(torch.bfloat16), rope.double):
        cast()
        assert torch.equal(rope.state_dict()[name], before) and rope.state_dict()[name].dtype == torch.float64
    rope.bfloat16()
    assert rope.transformer.h[0].attn.c_attn.weight.dtype == torch.bfloat16 and rope(tokens(8))[0].isfinite().all()


def test_to_rope_keeps_mode_and_dtype_and_refuses_the_others():
    model = build("comrope", torch.bfloat16).eval()
    rope = model.to_rope()
    assert not rope.training and rope.lm_head.weight.dtype == torch.bfloat16
    for pos in set(SCHEMES) - {"rope", "crope", "comrope"}:
        with pytest.raises(ValueError, match=f"^{pos} "):
            GPT(config(pos)).to_rope()


def randomise(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))


def test_learned_equals_transformers_gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=BLOCK, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config == GPTConfig(BLOCK, VOCAB, LAYERS, HEADS, WIDTH, 0.0, True, "learned", {})
    assert (
        torch.equal(ours.lm_head.weight, theirs.transformer.wte.weight)
        and ours.lm_head.weight is ours.transformer.wte.weight
    )
    idx, targets = tokens(BLOCK), tokens(BLOCK, seed=1)
    ours, theirs = ours.double(), theirs.double()
    close(ours(idx)[0], theirs(idx).logits)
    expected = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
    expected.backward()
    loss = GPT.forward(ours, idx, targets)[1]
    loss.backward()
    close(loss, expected)
    close(ours.transformer.wte.weight.grad, theirs.transformer.wte.weight.grad)
    close(ours.transformer.h[1].attn.c_attn.weight.grad, theirs.transformer.h[1].attn.c_attn.weight.grad.T)
    assert torch.equal(
        ours.generate(idx[:, :4], 8, temperature=0),
        theirs.generate(idx[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None),
    )


@pytest.fixture
def gpt2_folder(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "key,value",
    [
        ("model_type", "gpt_neox"),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 12),
        ("tie_word_embeddings", False),
        ("scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_from_pretrained_refuses_what_is_not_gpt2(gpt2_folder, key, value):
    edit(gpt2_folder, **{key: value})
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        GPT.from_pretrained(gpt2_folder)


def test_from_pretrained_refuses_a_broken_folder(gpt2_folder, tmp_path):
    edit(gpt2_folder, n_inner=32)  # 4 C, written out: the same architecture
    GPT.from_pretrained(str(gpt2_folder))
    edit(gpt2_folder, n_layer=2)
    with pytest.raises(ValueError, match=r"lack h\.1"):
        GPT.from_pretrained(gpt2_folder)
    edit(gpt2_folder, n_layer=1, vocab_size=16)
    with pytest.raises(ValueError, match=r"wte\.weight.*\(8, 8\).*\(16, 8\)"):
        GPT.from_pretrained(gpt2_folder)
    (gpt2_folder / "model.safetensors").rename(gpt2_folder / "elsewhere")
    with pytest.raises(OSError, match="safetensors"):
        GPT.from_pretrained(gpt2_folder)
    (gpt2_folder / "config.json").rename(gpt2_folder / "elsewhere.json")
    with pytest.raises(OSError, match=r"config\.json"):
        GPT.from_pretrained(gpt2_folder)


def test_from_pretrained_says_what_was_not_found(monkeypatch, tmp_path):
    """A name that is no folder goes to the hub; whatever the hub answers is an OSError that holds the name. No network here."""
    import huggingface_hub

    def offline(name, **kwargs):
        raise ConnectionError(f"no network for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(OSError, match="gpt2-missing is no local folder.*no network"):
        GPT.from_pretrained("gpt2-missing")


@pytest.mark.parametrize("fraction,bias", [(1.0, True), (0.5, True), (0.25, False)])
def test_rope_equals_transformers_gpt_neox(fraction, bias):
    """Sequential residuals, tied embeddings, our neighbouring pairs permuted to NeoX's halves, zero biases where ours has none."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    D = WIDTH // HEADS
    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDTH, hidden_act="gelu_new",
        max_position_embeddings=64, rotary_pct=fraction, rotary_emb_base=10000, tie_word_embeddings=True, use_parallel_residual=False,
    )).eval()  # fmt: skip
    assert theirs.config.rope_parameters["partial_rotary_factor"] == fraction
    ours = GPT(config("rope", {"fraction": fraction}, bias=bias))
    randomise(ours)
    state, turning = ours.state_dict(), round(fraction * D)
    halves = (
        list(range(0, turning, 2)) + list(range(1, turning, 2)) + list(range(turning, D))
    )  # our channel at their place

    def query_key_value(w):  # (3, H, D, …) → (H, 3, D, …)
        w = w.unflatten(0, (3, HEADS, D))
        return torch.cat((w[:2, :, halves], w[2:])).transpose(0, 1).flatten(0, 2)

    new = {
        name: state["lm_head.weight"]
        for name in theirs.state_dict()
        if name.endswith(("embed_in.weight", "embed_out.weight", "lm_head.weight"))
    }
    names = {
        "attention.query_key_value": "attn.c_attn",
        "attention.dense": "attn.c_proj",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "mlp.dense_h_to_4h": "mlp.c_fc",
        "mlp.dense_4h_to_h": "mlp.c_proj",
    }
    pairs = {f"gpt_neox.layers.{i}.{a}": f"transformer.h.{i}.{b}" for i in range(LAYERS) for a, b in names.items()}
    for a, b in (pairs | {"gpt_neox.final_layer_norm": "transformer.ln_f"}).items():
        for part in ("weight", "bias"):
            value = state.get(f"{b}.{part}", torch.zeros_like(theirs.state_dict()[f"{a}.{part}"]))
            new[f"{a}.{part}"] = query_key_value(value) if b.endswith("c_attn") else value
    theirs.load_state_dict(new)  # strict: every name must match
    idx = tokens(64)
    ours, theirs = ours.double(), theirs.double()
    close(ours(idx)[0], theirs(idx).logits, atol=5e-6)  # their angles are float32 even in a float64 model


# ------------------------------------------------------------------------------------------------
# Parameters: names, counts, initial values


def gpt2_names(bias):
    """nanoGPT's, less wpe."""
    kinds = ("weight", "bias") if bias else ("weight",)
    parts = [
        f"h.{i}.{part}"
        for i in range(LAYERS)
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    ]
    return {"transformer.wte.weight"} | {f"transformer.{part}.{kind}" for part in parts + ["ln_f"] for kind in kinds}


D = WIDTH // HEADS
OWN = {  # per layer: name → shape
    "comrope": {"P": (HEADS, D // 8, 8, 8)},
    "comrope 4 ld": {"P": (HEADS, D // 4, 4, 4), "theta": (HEADS, D // 4)},
    "comrope 2 unit": {"P": (HEADS, D // 2, 2, 2)},
    "comrope gaussian": {"P": (HEADS, D // 8, 8, 8)},
    "carope": {"c_pos.weight": (HEADS, WIDTH), "c_pos.bias": (HEADS,)},
    "carope embedding": {"c_pos.weight": (HEADS, WIDTH), "c_pos.bias": (HEADS,)},
    "carope paper": {"c_pos.weight": (HEADS, WIDTH)},
    "carope constant": {"c_pos.bias": (HEADS,)},
}
HALVED = ("crope", "crope base fraction", "rope grouped")  # A and B instead of one dense weight for Q, K, V


@all_cases
@pytest.mark.parametrize("bias", [False, True])
def test_names_shapes_and_counts(case, bias):
    pos, C, V, L = case.split()[0], WIDTH, VOCAB, LAYERS
    model = GPT(config(pos, CASES[case], bias=bias))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    expected = gpt2_names(bias)
    if case in HALVED:
        expected -= {f"transformer.h.{i}.attn.c_attn.weight" for i in range(L)}
        expected |= {f"transformer.h.{i}.attn.c_attn.{part}" for i in range(L) for part in "AB"}
    else:
        assert shapes["transformer.h.0.attn.c_attn.weight"] == (3 * C, C)
    if pos == "learned":
        expected.add("transformer.wpe.weight")
    own = {f"transformer.h.{i}.attn.{name}": shape for i in range(L) for name, shape in OWN.get(case, {}).items()}
    assert set(shapes) == expected | set(own)
    assert all(shapes[name] == shape for name, shape in own.items())
    buffers = {f"transformer.h.{i}.attn.freqs" for i in range(L)} if case == "rope explicit" else set()
    assert set(model.state_dict()) == set(shapes) | buffers | {"lm_head.weight"}
    assert model.lm_head.weight is model.transformer.wte.weight

    count = V * C + L * 12 * C * C + (2 * L + 1) * C  # embedding, matrices, LayerNorm weights
    count += L * (3 + 1 + 4 + 1 + 2) * C + C if bias else 0
    count += {
        "learned": BLOCK * C,
        "comrope": L * C * model.config.pos_options.get("block", 0),  # H · D/b · b²
        "carope": L * (C * HEADS * (case != "carope constant") + HEADS * (case != "carope paper")),
    }.get(pos, 0)
    count -= L * 3 * C * C // 2 if case in HALVED else 0
    count += L * HEADS * D // 4 if case == "comrope 4 ld" else 0
    assert model.parameter_count() == count == sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("width", [WIDTH, 96])
def test_crope_and_its_real_control_have_exactly_half_of_qkv(width):
    """The same parameters with the same initial values, and at the paper's width of 128 a model of exactly the same size."""
    crope, grouped, rope = (
        GPT(config(*which, bias=False, n_embd=width)) for which in (("crope",), ("rope", {"qkv": "grouped"}), ("rope",))
    )
    counts = [
        sum(p.numel() for p in model.transformer.h[0].attn.c_attn.parameters()) for model in (crope, grouped, rope)
    ]
    assert (
        counts == [3 * width**2 // 2, 3 * width**2 // 2, 3 * width**2]
        and crope.parameter_count() == grouped.parameter_count()
    )
    ours, theirs = dict(grouped.named_parameters()), dict(crope.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_gpt2_small_has_124m_parameters():
    """The figure everyone knows: 124,439,808 with 50,257 tokens, 1,024 positions and biases."""
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "initialise", lambda self, seed: None)
        assert GPT(GPTConfig(1024, 50257, 12, 12, 768, 0.0, True, "learned")).parameter_count() == 124_439_808


@all_cases
def test_seeds(case):
    """Equal seeds give equal shared parameters in every scheme; another seed gives others; the global generator is left alone."""
    pos = case.split()[0]
    state = torch.random.get_rng_state()
    model = GPT(config(pos, CASES[case]), seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)  # the global generator has no influence either
    again = dict(GPT(config(pos, CASES[case]), seed=5).named_parameters())
    learned = dict(GPT(config("learned"), seed=5).named_parameters())
    other = dict(GPT(config(pos, CASES[case]), seed=6).named_parameters())
    shared = 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again[name])
        if name in learned:
            shared += 1
            assert torch.equal(parameter, learned[name]), name
        random = parameter.std() > 0 and not (name.endswith(".P") and model.config.pos_options["init"] == "rope")
        assert torch.equal(parameter, other[name]) != random, name
    assert shared >= len(gpt2_names(True)) - (LAYERS if case in HALVED else 0)


@all_cases
def test_initial_values_are_gpt2s(case):
    """N(0, 0.02), 0.02/√(2L) into the residual stream, LayerNorm 1, biases 0; matrices differ from each other."""
    model = GPT(config(case.split()[0], CASES[case], n_layer=3, n_embd=96))
    values = dict(model.named_parameters())
    for name, parameter in values.items():
        part, kind = name.split(".")[-2:]
        if kind in ("P", "theta") or part == "c_pos":
            continue
        if part.startswith("ln"):
            assert (parameter == (kind == "weight")).all()
        elif kind == "bias":
            assert not parameter.any()
        else:
            std = 0.02 / math.sqrt(6) if part == "c_proj" else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
    assert not torch.equal(values["transformer.h.0.mlp.c_fc.weight"], values["transformer.h.1.mlp.c_fc.weight"])


def test_initial_own_values():
    gaussian = GPT(config("comrope", {"init": "gaussian", "kind": "ld"}, n_head=6, n_embd=192)).transformer.h
    assert gaussian[0].attn.P.std().item() == pytest.approx(1, rel=0.1) and (gaussian[0].attn.theta == 1).all()
    assert not torch.equal(gaussian[0].attn.P, gaussian[1].attn.P)
    # rope: A's frequencies are RoPE's in radians per token, times the unit, distinct within a block
    for unit in (None, 1.0):
        attn = GPT(config("comrope", {"unit": unit})).transformer.h[0].attn
        A = (attn.P - attn.P.mT)[2].double() / (unit or BLOCK)
        found = torch.linalg.eigvals(A).imag.flatten().sort(descending=True).values[: D // 2]
        close(found, reference.rope_angles(2, D, 10000.0)[1], atol=1e-6)


def test_position_parameters():
    """The ones without weight decay: P, θ and CARoPE's bias, and no matrix that acts on activations."""
    names = {
        case: {name.split(".attn.")[-1] for name in GPT(config(case.split()[0], CASES[case])).position_parameters()}
        for case in CASES
    }
    assert {case: found for case, found in names.items() if found} == {
        "comrope": {"P"}, "comrope 4 ld": {"P", "theta"}, "comrope 2 unit": {"P"}, "comrope gaussian": {"P"}, "carope": {"c_pos.bias"}, "carope embedding": {"c_pos.bias"},
        "carope constant": {"c_pos.bias"},
    }  # fmt: skip
    model = build("comrope 4 ld")
    assert (
        len(model.position_parameters()) == 2 * LAYERS
        and model.position_parameters() <= dict(model.named_parameters()).keys()
    )


# ------------------------------------------------------------------------------------------------
# The fused loss


def plain_loss(h, weight, targets):
    return F.cross_entropy((h @ weight.T).flatten(0, -2), targets.flatten(), ignore_index=-1)


def loss_case(dtype=torch.float64, B=3, T=13, C=8, V=37, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    h = (scale * torch.randn(B, T, C, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (B, T), generator=generator)
    targets[0, 0] = targets[1] = targets[-1, -1] = -1
    return h, weight, targets


@pytest.fixture
def rows(monkeypatch):
    """Sets the rows of a chunk."""
    return lambda n: monkeypatch.setattr(model_module, "chunk_rows", lambda vocab_size, device: n)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [1, 5, 13, 38, 39, 1000])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_fused_loss_equals_the_plain_one(dtype, tolerance, chunk, scale, rows):
    """Values and gradients, with ignored targets (a whole chunk of them too), uneven chunks, and logits in the hundreds."""
    rows(chunk)
    h, weight, targets = loss_case(dtype, scale=scale)
    fused, plain = linear_cross_entropy(h, weight, targets), plain_loss(h, weight, targets)
    assert fused.dtype == dtype and fused.shape == ()
    close(fused, plain, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(3 * fused, (h, weight)), torch.autograd.grad(3 * plain, (h, weight))):
        assert a.dtype == dtype
        close(a, b, rtol=tolerance, atol=tolerance * scale)


def test_fused_loss_with_gpt2s_vocabulary():
    """50,304 tokens and the real chunk size: two chunks on a CPU."""
    h, weight, targets = loss_case(torch.float32, T=203, V=50304)
    assert model_module.chunk_rows(50304, h.device) < 203
    fused, plain = linear_cross_entropy(h, weight, targets), plain_loss(h, weight, targets)
    close(fused, plain, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(fused, (h, weight)), torch.autograd.grad(plain, (h, weight))):
        close(a, b, rtol=1e-4, atol=1e-7)


def test_fused_loss_of_nothing_is_nan():
    h, weight, targets = loss_case()
    assert linear_cross_entropy(h, weight, torch.full_like(targets, -1)).isnan()


@pytest.mark.parametrize("only", [0, 1])
def test_fused_loss_when_one_input_needs_a_gradient(only):
    """Frozen embeddings, or a linear probe."""
    h, weight, targets = loss_case()
    inputs = [h, weight]
    expected = torch.autograd.grad(plain_loss(h, weight, targets), inputs[only])[0]
    inputs[1 - only] = inputs[1 - only].detach()
    loss = linear_cross_entropy(*inputs, targets)
    close(torch.autograd.grad(loss, inputs[only])[0], expected)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("V", [64, 50304])
def test_fused_loss_under_autocast(dtype, tolerance, V, rows):
    """Half-precision products, float32 sums. With a loss scale of 65,536, as GradScaler starts with, nothing overflows or underflows:
    with 50,304 tokens a mean's probabilities, 2e-5/N, would vanish in float16."""
    rows(16)
    h, weight, targets = loss_case(torch.float32, T=29, V=V, scale=0.3)
    expected = torch.autograd.grad(plain_loss(h, weight, targets), (h, weight))
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_cross_entropy(h, weight, targets)
    assert loss.dtype == torch.float32
    close(loss, plain_loss(h, weight, targets), rtol=tolerance)
    logits = (h.to(dtype) @ weight.to(dtype).T).float()  # the softmax, after a product in half precision, is float32
    close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1), rtol=1e-4)
    for scale in (1.0, 65536.0):
        for a, b in zip(torch.autograd.grad(loss * scale, (h, weight), retain_graph=True), expected):
            assert a.dtype == torch.float32 and a.isfinite().all()
            assert relative_error(a / scale, b) < 2 * tolerance
            # the rows of tokens that are no target, too: their gradients are the small ones
            if a.shape == weight.shape:
                rest = torch.tensor([v for v in range(V) if v not in targets])
                assert relative_error(a[rest] / scale, b[rest]) < 4 * tolerance


def test_fused_loss_in_float16_does_not_overflow_in_a_long_chunk():
    """One frequent token in a chunk of 100,000 rows: the weight's gradient is a sum beyond float16's 65,504, and no loss scale
    would repair an infinity here, for the sum is formed before any scale."""
    h, weight = torch.ones(100_000, 8, requires_grad=True), torch.zeros(16, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(h, weight, torch.zeros(100_000, dtype=torch.int64))
    loss.backward()
    expected = torch.full((16, 8), 1 / 16)
    expected[0] -= 1
    close(weight.grad, expected, atol=1e-3)


@pytest.mark.parametrize("pos", ["learned", "comrope"])
def test_gradient_accumulation_equals_one_batch(pos, rows):
    rows(7)
    model, idx, targets = build(pos), tokens(BLOCK, B=6), tokens(BLOCK, B=6, seed=1)
    model(idx, targets)[1].backward()
    whole = gradients(model)
    model.zero_grad()
    for x, y in zip(idx.split(2), targets.split(2)):
        (model(x, y)[1] / 3).backward()
    for name, gradient in gradients(model).items():
        close(gradient, whole[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reduction_none(dtype, rows):
    rows(5)
    h, weight, targets = loss_case(dtype)
    nll = linear_nll(h, weight, targets)
    expected = F.cross_entropy((h @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none").view(
        targets.shape
    )
    assert not nll.requires_grad and nll.dtype == dtype and nll.shape == targets.shape
    close(nll, expected.detach(), atol=1e-12 if dtype == torch.float64 else 1e-5)
    assert (nll[targets == -1] == 0).all() and (nll[targets >= 0] > 0).all()


@all_schemes
def test_reduction_none_through_the_model(pos):
    model, idx, targets = build(pos), tokens(BLOCK), tokens(BLOCK, seed=1)
    targets[0, 2:5] = -1
    none, nll = model(idx, targets, reduction="none")
    assert none is None and nll.shape == targets.shape and not nll.requires_grad
    expected = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none").view(
        targets.shape
    )
    close(nll, expected.detach())
    close(model(idx, targets)[1], nll.sum() / (targets >= 0).sum())


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which an operator made, backward included."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_full_logits_never_exist():
    """N·V elements exist in no forward or backward pass of the loss; with the plain loss they do, so the observer sees them."""
    V, T, B = 50304, 256, 2
    model = GPT(config("rope", vocab_size=V, n_layer=1, n_head=1, n_embd=8))
    idx, targets = tokens(T, B, V=V), tokens(T, B, seed=1, V=V)
    with Largest() as training:
        model(idx, targets)[1].backward()
    with Largest() as evaluation:
        model(idx, targets, reduction="none")
    with Largest() as plain:
        F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten()).backward()
    assert plain.elements == B * T * V
    assert evaluation.elements <= 2**23 and training.elements <= 2**23 < B * T * V / 3


def test_mean_without_grad_forms_no_gradients():
    """Validation needs the loss alone: no (V, C) gradient, no further products."""

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += "mm" in func.__name__
            return func(*args, **(kwargs or {}))

    h, weight, targets = loss_case()
    expected = linear_cross_entropy(h, weight, targets)
    with torch.no_grad(), Count() as count:
        close(linear_cross_entropy(h, weight, targets), expected.detach())
    assert count.products == 1


class FromHost(TorchDispatchMode):
    """Counts the tensors that are copied from the CPU to another device."""

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.copies += "cpu" in inputs and isinstance(out, torch.Tensor) and out.device.type != "cpu"
        return out


@all_cases
def test_a_training_pass_copies_nothing_from_the_host(case, monkeypatch):
    """A copy to a GPU from ordinary memory makes the host wait until the GPU has done all work before it. Meta tensors stand for the GPU's."""
    monkeypatch.setattr(
        model_module, "no_autocast", lambda device: contextlib.nullcontext()
    )  # meta tensors have no autocast
    monkeypatch.setattr(model_module, "head_dtype", lambda h: h.dtype)
    model, idx = build(case, torch.float32).to("meta"), tokens(BLOCK).to("meta")
    with FromHost() as copied:
        model(idx, idx)[1].backward()
    assert copied.copies == 0
    with FromHost() as copied:
        torch.ones(3).to("meta")
    assert copied.copies == 1


# ------------------------------------------------------------------------------------------------
# torch.compile and autocast


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model, run, idx, targets):
    model.zero_grad()
    loss = run(idx, targets)[1]
    loss.backward()
    return loss.detach(), gradients(model)


COMPILED = [
    "learned",
    "sinusoidal",
    "none",
    "rope",
    "rope explicit",
    "crope",
    "comrope",
    "comrope 4 ld",
    "carope",
    "carope embedding",
    "alibi",
]


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_without_graph_breaks(case, dynamo, rows):
    """fullgraph, forward and backward, several chunks of the loss: equal to eager, whose rotation is complex."""
    rows(9)
    model, idx, targets = build(case), tokens(BLOCK), tokens(BLOCK, seed=1)
    expected = loss_and_gradients(model, model, idx, targets)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    found = loss_and_gradients(model, compiled, idx, targets)
    close(found[0], expected[0])
    for name in expected[1]:
        close(found[1][name], expected[1][name], msg=name)


def test_every_scheme_is_compiled():
    assert {case.split()[0] for case in COMPILED} == set(SCHEMES) == {case.split()[0] for case in CASES}


@pytest.mark.parametrize("case", ["comrope", "carope"])
def test_compiled_under_autocast(case, dynamo):
    model, idx, targets = build(case, torch.float32), tokens(BLOCK), tokens(BLOCK, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loss_and_gradients(model, model, idx, targets)
        found = loss_and_gradients(model, compiled, idx, targets)
    close(found[0], expected[0], rtol=1e-2)
    for name in expected[1]:
        assert relative_error(found[1][name], expected[1][name]) < 0.1, name


def test_compiled_evaluation_equals_eager(dynamo):
    model, idx, targets = build("rope"), tokens(BLOCK), tokens(BLOCK, seed=1)
    targets[0, :5] = -1
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        close(compiled(idx, targets, reduction="none")[1], model(idx, targets, reduction="none")[1])
        close(compiled(idx)[0], model(idx)[0])


def test_compiled_by_inductor(dynamo):
    model, idx, targets = build("rope", torch.float32), tokens(BLOCK), tokens(BLOCK, seed=1)
    expected = loss_and_gradients(model, model, idx, targets)
    found = loss_and_gradients(model, torch.compile(model, fullgraph=True, dynamic=False), idx, targets)
    close(found[0], expected[0], atol=1e-5)
    for name in expected[1]:
        close(found[1][name], expected[1][name], rtol=1e-3, atol=1e-5, msg=name)


TURNING = [case for case in CASES if case.split()[0] in ("rope", "crope", "comrope", "carope")]


@pytest.mark.parametrize("case", TURNING)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_angles_are_float32_under_autocast(case, low, monkeypatch):
    """cos and sin of the first layer, 2,000 tokens: the same bits with and without autocast. bfloat16 holds no integer beyond 256."""
    model, idx = build(case, torch.float32, n_layer=1), tokens(2000, B=1)
    seen, turn = [], model_module.rotate
    monkeypatch.setattr(model_module, "rotate", lambda x, cos, sin: seen.append((cos, sin)) or turn(x, cos, sin))
    with torch.no_grad():
        model(idx)
        with torch.autocast("cpu", dtype=low):
            model(idx)
    (cos, sin), (low_cos, low_sin) = seen
    assert low_cos.dtype == low_sin.dtype == torch.float32
    assert torch.equal(cos, low_cos) and torch.equal(sin, low_sin)


def test_comrope_folds_its_frame_in_float32_under_autocast(monkeypatch):
    """The frame is data of the positions, like an angle: bfloat16 would turn it by up to 1/256."""
    seen, fold = [], SCHEMES["comrope"].fold
    monkeypatch.setattr(SCHEMES["comrope"], "fold", lambda self, Q: seen.append(fold(self, Q)) or seen[-1])
    model = build("comrope", torch.float32)
    model(tokens(BLOCK))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(BLOCK))
    assert len(seen) == 2 * LAYERS
    for plain, low in zip(seen[:LAYERS], seen[LAYERS:]):
        assert all(torch.equal(a, b) for a, b in zip(plain, low))


@pytest.mark.parametrize("case", [case for case in TURNING if "carope" not in case])
def test_angles_of_a_bfloat16_model_are_float32(case, monkeypatch):
    """Casting the weights changes no closed-form position; comrope's frequencies are those of its cast P, but no coarser."""
    seen, turn = [], model_module.rotate
    monkeypatch.setattr(model_module, "rotate", lambda x, cos, sin: seen.append((cos, sin)) or turn(x, cos, sin))
    model = build(case, torch.float32, n_layer=1).bfloat16()
    idx = tokens(1000, B=1)
    with torch.no_grad():
        low = model(idx)[0]
        model.double()(idx)  # the same, rounded weights
    assert low.dtype == torch.bfloat16 and seen[0][0].dtype == torch.float32 and seen[1][0].dtype == torch.float64
    for a, b in zip(*seen):  # comrope's P - Pᵀ is rounded to float32, at up to some hundred radians here
        close(a.double(), b, atol=1e-3 if "comrope" in case else 1e-7)


@all_cases
def test_autocast_is_close_to_float32(case):
    model, idx, targets = build(case, torch.float32), tokens(BLOCK), tokens(BLOCK, seed=1)
    loss, expected = loss_and_gradients(model, model, idx, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, found = loss_and_gradients(model, model, idx, targets)
        nll = model(idx, targets, reduction="none")[1]
    assert low.dtype == nll.dtype == torch.float32
    close(low, loss, rtol=2e-2)
    close(nll.mean(), loss, rtol=2e-2)
    for name in expected:
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], expected[name]) < 0.2, name


@all_cases
def test_bfloat16_model_runs(case):
    """Weights cast to bfloat16, as for inference: forward, loss in float32, cached generation."""
    model = build(case).bfloat16()
    assert model(tokens(BLOCK))[0].dtype == torch.bfloat16
    assert model(tokens(BLOCK), tokens(BLOCK, seed=1))[1].dtype == torch.float32
    assert model.generate(tokens(4), 6).shape == (2, 10)


@all_schemes
def test_same_bits_again(pos):
    results = []
    for _ in range(2):
        model = GPT(config(pos), seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            model(tokens(BLOCK, seed=step), tokens(BLOCK, seed=step + 9))[1].backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------------------
# Options: each does something; errors name the thing

ALTERNATIVES = {
    "sinusoidal": {"base": 50.0, "scale": 0.5},
    "rope": {"base": 50.0, "fraction": 0.5, "explicit": True, "qkv": "grouped"},
    "crope": {"base": 50.0, "fraction": 0.5},
    "comrope": {"kind": "ld", "block": 4, "init": "gaussian", "base": 50.0, "unit": 3.0},
    "carope": {"base": 50.0, "source": "embedding", "init": "paper", "content": False},
}


def options_of(pos):
    return {p.name for p in inspect.signature(SCHEMES[pos].__init__).parameters.values() if p.kind is p.KEYWORD_ONLY}


def test_every_option_has_an_alternative_here():
    assert {pos: options_of(pos) for pos in SCHEMES if options_of(pos)} == {
        pos: set(found) for pos, found in ALTERNATIVES.items()
    }


@pytest.mark.parametrize("pos,option", [(pos, option) for pos, found in ALTERNATIVES.items() for option in found])
def test_every_option_does_something(pos, option):
    """Another function of the same weights, or other weights (comrope's unit and explicit frequencies leave step 0 as it is)."""

    def made(options):
        model = GPT(config(pos, options)).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "c_attn" in name:
                    parameter *= 20
                if "c_pos.weight" in name:
                    parameter += torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter)
        return model.state_dict(), model(tokens(BLOCK))[0]

    (state, logits), (other, changed) = made({}), made({option: ALTERNATIVES[pos][option]})
    same_state = state.keys() == other.keys() and all(
        state[k].shape == other[k].shape and torch.equal(state[k], other[k]) for k in state
    )
    if (pos, option) in {("rope", "explicit"), ("comrope", "unit"), ("comrope", "kind"), ("comrope", "block")}:
        assert not same_state
        close(changed, logits, atol=1e-5)
    else:
        assert (changed - logits).abs().max() > 1e-3


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


@all_cases
def test_resolved_config_makes_the_same_model(case):
    """A checkpoint holds model.config: all options written out, plain types, and the caller's config is not touched."""
    asked = config(case.split()[0], dict(CASES[case]))
    before = dataclasses.asdict(asked)
    model = GPT(asked)
    assert dataclasses.asdict(asked) == before
    assert set(model.config.pos_options) == options_of(asked.pos)
    again = GPT(GPTConfig(**json.loads(json.dumps(dataclasses.asdict(model.config)))))
    assert torch.equal(again(tokens(BLOCK))[0], model(tokens(BLOCK))[0])


BAD_CONFIGS = [
    (dict(pos="crop"), ["pos 'crop'", "did you mean crope", "alibi, *|learned"]),
    (dict(pos="xyzzy"), ["xyzzy", "learned, sinusoidal, none, rope, crope, comrope, carope, alibi"]),
    (
        dict(pos="rope", pos_options={"bas": 1.0}),
        ["unknown option 'bas'", "did you mean base", "base, fraction, explicit, qkv"],
    ),
    (dict(pos="none", pos_options={"base": 1.0}), ["unknown option 'base'", "no options"]),
    (dict(pos="rope", pos_options={"base": "1e4"}), ["base of rope", "'1e4'", "float"]),
    (dict(pos="rope", pos_options={"base": True}), ["base of rope", "True"]),
    (dict(pos="rope", pos_options={"base": math.nan}), ["base of rope", "nan"]),
    (dict(pos="rope", pos_options={"explicit": 1}), ["explicit of rope", "bool"]),
    (dict(pos="rope", pos_options={"base": -1.0}), ["base", "positive", "-1"]),
    (dict(pos="rope", pos_options={"fraction": 1.5}), ["fraction 1.5"]),
    (dict(pos="rope", pos_options={"fraction": 0.0}), ["fraction 0.0"]),
    (dict(pos="rope", pos_options={"fraction": 0.19}), ["fraction 0.19", "16"]),  # 3 channels of 16
    (dict(pos="rope", pos_options={"fraction": 0.01}), ["fraction 0.01", "16"]),  # none of 16: rope without positions
    (dict(pos="sinusoidal", pos_options={"base": -1.0}), ["base", "positive", "-1"]),  # would be nan
    (dict(pos="sinusoidal", pos_options={"base": 0.0}), ["base", "positive", "0"]),
    (dict(pos="sinusoidal", n_head=5, n_embd=15), ["15", "even"]),
    (dict(pos="comrope", pos_options={"block": 3}), ["block of comrope", "3", "2, 4, 8"]),
    (dict(pos="comrope", pos_options={"block": 8.0}), ["block of comrope", "8.0"]),
    (dict(pos="comrope", pos_options={"kind": "lp"}), ["kind of comrope", "'lp'", "ap", "ld"]),
    (dict(pos="comrope", pos_options={"unit": "x"}), ["unit of comrope", "'x'"]),
    (dict(pos="comrope", pos_options={"unit": 0}), ["unit", "positive", "0"]),
    (dict(pos="comrope", n_embd=36), ["block 8", "12"]),
    (dict(pos="carope", pos_options={"source": "x"}), ["source of carope", "hidden", "embedding"]),
    (dict(pos="carope", pos_options={"base": 1.0}), ["base", "1.0"]),
    (dict(pos="carope", pos_options={"init": "paper", "content": False}), ["content false", "init rope"]),
    (dict(pos="rope", pos_options={"qkv": "sparse"}), ["qkv of rope", "'sparse'", "dense", "grouped"]),
    (dict(pos="rope", n_embd=50), ["n_embd 50", "n_head 3"]),
    (dict(pos="rope", n_embd=45), ["15", "even"]),
    (dict(pos="crope", n_embd=45), ["crope", "15", "even"]),
    (dict(pos="carope", n_embd=45), ["carope", "15", "even"]),
    (dict(n_layer=0), ["n_layer", "0"]),
    (dict(n_head=-1), ["n_head", "-1"]),
    (dict(vocab_size=2.5), ["vocab_size", "2.5"]),
    (dict(block_size="9"), ["block_size", "'9'"]),
    (dict(block_size=True), ["block_size", "True"]),
    (dict(dropout=1.0), ["dropout", "1.0"]),
    (dict(dropout="a lot"), ["dropout", "a lot"]),
    (dict(pos=None), ["pos", "None"]),
    (dict(pos=["rope"]), ["pos", "rope"]),
    (dict(pos_options=None), ["pos_options", "None"]),
    (dict(pos_options=[1]), ["pos_options", r"\[1\]"]),
    (dict(bias="no"), ["bias", "no"]),
    (
        dict(pos="comrope", n_layer=0, dropout=2.0, pos_options={"blok": 8, "kind": 1}),
        ["n_layer", "dropout", "blok.*did you mean block", "kind"],
    ),
    (dict(pos="ropee", n_layer=0), ["n_layer", "ropee.*did you mean rope"]),
]


@pytest.mark.parametrize("bad,words", BAD_CONFIGS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_config_errors_name_the_thing(bad, words):
    with pytest.raises(ValueError) as error:
        GPT(GPTConfig(**(SHAPE | {"pos_options": {}} | bad)))
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} not in: {error.value}"


def test_bad_tokens_and_reduction():
    model, idx = build("rope"), tokens(BLOCK)
    for bad in (VOCAB, -1):
        with pytest.raises(ValueError, match=rf"idx.*{bad}.*{VOCAB - 1}"):
            model(torch.where(idx == idx[0, 0], bad, idx))
    for bad in (VOCAB, -2, -100):  # -100 is ignored by others: here it is refused, not trained on
        with pytest.raises(ValueError, match=rf"targets.*{bad}.*{VOCAB - 1}"):
            model(idx, torch.where(idx == idx[0, 0], bad, idx))
        with pytest.raises(ValueError, match="targets"):
            model(idx, torch.where(idx == idx[0, 0], bad, idx), reduction="none")
    with pytest.raises(ValueError, match="reduction.*'sum'"):
        model(idx, idx, reduction="sum")


def test_flops_per_token():
    """nanoGPT's estimate: 6 N + 12 L C T."""
    assert build("rope").flops_per_token() == 6 * (LAYERS * 12 * WIDTH**2 + VOCAB * WIDTH) + 12 * LAYERS * WIDTH * BLOCK


# ------------------------------------------------------------------------------------------------
# Products by oneDNN, which eager float32 takes on some CPUs: here on every CPU that has the operator


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def library(request, monkeypatch):
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(model_module, "onednn_is_faster", lambda: request.param)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_first_and_second_derivatives(bias, library):
    generator = torch.Generator().manual_seed(0)
    x, w, b, probe = (torch.randn(shape, generator=generator) for shape in ((3, 20, 24), (40, 24), (40,), (3, 20, 40)))
    results = []
    for dtype, linear in ((torch.float64, F.linear), (torch.float32, model_module.linear)):
        inputs = [z.to(dtype).requires_grad_() for z in ((x, w, b) if bias else (x, w))]
        y = linear(*inputs)
        first = torch.autograd.grad((y.tanh() * probe.to(dtype)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append([y, *first, *second])
    for expected, found in zip(*results):
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert relative_error(found, expected) < 1e-5


def test_onednn_serves_eager_float32_alone(library, monkeypatch):
    """float64, autocast and a few rows, as in cached decoding, go to F.linear."""
    calls, apply = [], model_module.Product.apply
    monkeypatch.setattr(model_module.Product, "apply", lambda *a: calls.append(a) or apply(*a))
    model_module.linear(torch.randn(64, 8), torch.randn(5, 8))
    assert len(calls) == library
    model_module.linear(torch.randn(64, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64))
    model_module.linear(torch.randn(2, 8), torch.randn(5, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model_module.linear(torch.randn(64, 8), torch.randn(5, 8)).dtype == torch.bfloat16
    assert len(calls) == library


@pytest.mark.parametrize("case", ["crope", "comrope", "carope", "alibi"])
def test_float32_models_of_both_libraries(case, library, rows):
    """Loss, its gradients and the losses of single tokens, several chunks of logits: close to float64 whichever library multiplies."""
    rows(48)
    idx, targets = tokens(40, B=3), tokens(40, B=3, seed=1)
    targets[0, :7] = -1
    exact, model = build(case), build(case, torch.float32)
    expected, found = (loss_and_gradients(m, m, idx, targets) for m in (exact, model))
    close(found[0].double(), expected[0], rtol=1e-4)
    for name in expected[1]:
        assert found[1][name].is_contiguous() and relative_error(found[1][name], expected[1][name]) < 1e-2, name
    close(model(idx, targets, reduction="none")[1].double(), exact(idx, targets, reduction="none")[1], atol=1e-3)
    again = loss_and_gradients(model, model, idx, targets)
    assert torch.equal(again[0], found[0]) and all(torch.equal(again[1][name], found[1][name]) for name in found[1])


def test_per_sample_gradients_by_torch_func(library):
    """torch.func's grad and vmap over a layer, whichever library multiplies otherwise."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator) for shape in ((3, 40, 8), (5, 8)))
    found = torch.func.vmap(torch.func.grad(lambda w, x: model_module.linear(x, w).square().sum()), (None, 0))(w, x)
    close(found, torch.stack([2 * (x_i @ w.t()).t() @ x_i for x_i in x]), rtol=1e-4, atol=1e-4)


LENGTHS = """
import resource, sys, torch
from model import GPT, GPTConfig, onednn_is_faster
torch.set_num_threads(1)
if not onednn_is_faster():
    sys.exit()
model = GPT(GPTConfig(block_size=256, vocab_size=500, n_layer=1, n_head=2, n_embd=64))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
idx = torch.randint(500, (1, 256))
model(idx, idx)[1].backward()
before = peak()
for length in range(60, 160):
    model(idx[:, :length], idx[:, :length])[1].backward()
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_number_of_lengths():
    """oneDNN keeps code for every shape that it has seen. In a process of its own: the limit is read once."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    }
    done = subprocess.run(
        [sys.executable, "-c", LENGTHS],
        capture_output=True,
        text=True,
        cwd=Path(model_module.__file__).parent,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        pytest.skip("products do not go through oneDNN on this CPU")
    assert float(done.stdout) < 350  # MB; 700 without the limit
