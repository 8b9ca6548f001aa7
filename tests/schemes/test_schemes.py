"""What holds for every scheme: the model against the slow reference, causality, caches, generation, dtypes, dropout."""

import contextlib

import reference
import torch
import torch.nn.functional as F
from models import (
    BLOCK,
    CASES,
    LAYERS,
    VOCAB,
    WIDTH,
    all_cases,
    all_cases_fast_without_options,
    all_schemes,
    build,
    cases_of,
    close,
    config,
    extends,
    gradients,
    loss_and_gradients,
    relative_error,
    shaken,
    tokens,
    uncached,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, SCHEMES
from schemes.base import Context

# ------------------------------------------------------------------------------------------------
# Values


@all_cases
def test_logits_loss_and_gradients_equal_the_reference(case):
    """Values and every gradient, at up to twice block_size. The reference has an explicit rotation matrix for each
    position, and autograd."""
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


@all_schemes
def test_reduction_none_through_the_model(pos):
    model, idx, targets = build(pos), tokens(BLOCK), tokens(BLOCK, seed=1)
    targets[0, 2:5] = -1
    none, nll = model(idx, targets, reduction="none")
    assert none is None and nll.shape == targets.shape and not nll.requires_grad
    logits = model(idx)[0].flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none").view(targets.shape)
    close(nll, expected.detach())
    close(model(idx, targets)[1], nll.sum() / (targets >= 0).sum())


@cases_of(SCHEMES, fast=["comrope", "carope"])
def test_same_bits_again(case):
    results = []
    for _ in range(2):
        model = GPT(config(case), seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            model(tokens(BLOCK, seed=step), tokens(BLOCK, seed=step + 9))[1].backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------------------
# Causality, caches, generation


@cases_of(CASES, fast=["learned", "rope", "carope", "path"])
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


@all_cases_fast_without_options
def test_cached_hidden_states_equal_the_uncached(case):
    """Token by token, in chunks, and all at once as a prefill is, beyond block_size where the scheme can."""
    model, pieces = build(case), [5, 1, 7, 7] if extends(case) else [3, 1, 8]
    idx = tokens(sum(pieces))
    expected = model.hidden(idx)
    for chunks in ([1] * len(idx[0]), pieces, [len(idx[0])]):
        caches = [{} for _ in range(LAYERS)]
        parts = [model.hidden(chunk, caches) for chunk in idx.split(chunks, 1)]
        close(torch.cat(parts, 1), expected, msg=lambda text, chunks=chunks: f"in chunks of {chunks}: {text}")


@all_cases_fast_without_options
def test_room_in_the_cache_changes_no_bit(case, monkeypatch):
    """Token by token and in pieces, against caches that are joined anew each time; and two that go on from one."""
    model = build(case, torch.float32)
    idx = tokens(24 if extends(case) else BLOCK)
    sizes = [3, 1, 1, 4, 1] + [1] * (idx.size(1) - 10)

    @torch.no_grad()
    def hidden():
        caches, found = [{} for _ in range(LAYERS)], []
        for i, piece in enumerate(idx.split(sizes, 1)):
            if i == 4:
                twins = [dict(cache) for cache in caches]
                model.hidden(piece, twins)
                model.hidden((piece + 1) % VOCAB, twins)
            found.append(model.hidden(piece, caches))
        return found

    def joined(self, key, new, dim):
        if self.cache is None:
            return new
        self.cache[key] = torch.cat((self.cache[key], new), dim) if key in self.cache else new
        return self.cache[key]

    ours = hidden()
    monkeypatch.setattr(Context, "appended", joined)
    for a, b in zip(ours, hidden(), strict=True):
        # Products depend on where in memory gape's heads of 18 channels begin
        close(a, b, atol=1e-5 if case.startswith("gape") else 0.0)


def test_some_sequences_of_a_cache_go_on():
    """As a search keeps the best: the cache of the first of two, which has room behind it."""
    model, idx, caches = shaken(config("rope+fox")), tokens(8), [{} for _ in range(LAYERS)]
    with torch.no_grad():
        for piece in idx[:, :7].split([4, 1, 2], 1):
            model.hidden(piece, caches)
        for cache in caches:
            cache.update({name: value[:1] for name, value in cache.items() if isinstance(value, torch.Tensor)})
        close(model.hidden(idx[:1, 7:], caches), model.hidden(idx[:1])[:, 7:])


@all_cases_fast_without_options
def test_gradients_through_a_cache(case):
    """A sequence in two chunks with a cache has the gradients of the whole. comrope's own backward must know where a
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


@cases_of(SCHEMES, fast=["learned", "carope"])
def test_generate_equals_uncached_decoding(case):
    """Of schemes without options: what these change, caches must know, which the test of hidden states has for all."""
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


# ------------------------------------------------------------------------------------------------
# Dropout, dtypes, devices


@all_schemes
def test_dropout_is_where_gpt2_has_it(pos, monkeypatch):
    """On the embeddings, on both outputs of each block, and on the attention weights; none of it in evaluation."""
    model, idx = build(pos, dropout=0.25), tokens(BLOCK)
    dropped, attended, attention = [], [], F.scaled_dot_product_attention

    def dropout(x, p=0.5, training=True, inplace=False):
        dense = x.shape[2:] == (BLOCK, BLOCK)  # attention weights, of schemes without a fused kernel
        (attended if dense else dropped).append(p * training)
        return x

    def sdpa(*args, **kwargs):
        attended.append(kwargs.get("dropout_p", 0.0))
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    model.train()(idx)
    assert [p for p in dropped if p] == [0.25] * (1 + 2 * LAYERS) and attended == [0.25] * LAYERS
    dropped.clear(), attended.clear()
    model.eval()(idx)
    assert not any(dropped + attended)


@all_cases_fast_without_options
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


@cases_of(CASES, fast=["learned", "rope", "comrope", "carope", "alibi", "path"])
def test_bfloat16_model_runs(case):
    """Weights cast to bfloat16, as for inference: forward, loss in float32, cached generation."""
    model = build(case).bfloat16()
    assert model(tokens(BLOCK))[0].dtype == torch.bfloat16
    assert model(tokens(BLOCK), tokens(BLOCK, seed=1))[1].dtype == torch.float32
    assert model.generate(tokens(4), 6).shape == (2, 10)


class FromHost(TorchDispatchMode):
    """Counts the tensors that are copied from the CPU to another device."""

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.copies += "cpu" in inputs and isinstance(out, torch.Tensor) and out.device.type != "cpu"
        return out


@cases_of(CASES, fast=["learned", "rope", "comrope", "carope", "t5", "path"])
def test_a_training_pass_copies_nothing_from_the_host(case, monkeypatch):
    """A copy to a GPU from ordinary memory makes the host wait until the GPU has done all work before it. Meta tensors
    stand for the GPU's; torch has no autocast for them."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    model, idx = build(case, torch.float32).to("meta"), tokens(BLOCK).to("meta")
    with FromHost() as copied:
        model(idx, idx)[1].backward()
    assert copied.copies == 0
    with FromHost() as copied:
        torch.ones(3).to("meta")
    assert copied.copies == 1
