"""nanope/attention.py: a bias by FlexAttention and by dense chunks of queries; attention weights."""

import pytest
import reference
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from models import (
    BLOCK,
    HEADS,
    LAYERS,
    WIDTH,
    D,
    Largest,
    all_cases_fast_without_options,
    build,
    close,
    config,
    extends,
    layer_context,
    tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode

import schemes
from model import GPT, resolve
from nanope import attention, cpu_attention
from nanope.block_masks import causal_block_mask
from nanope.ops import as_on


@pytest.mark.slow
def test_bias_by_flex_attention_equals_the_dense_path(monkeypatch):
    """What a GPU runs, here uncompiled on the CPU: the same bias, as FlexAttention's score_mod."""
    pos, x = build("alibi", torch.float32).transformer.h[0].attn.pos, torch.randn(2, 40, WIDTH)
    q, k, v = torch.randn(3, 2, HEADS, 40, D)
    dense = attention.attend(pos, q, k, v, x, layer_context(pos, x))
    monkeypatch.setattr(attention, "compiled_flex_attention", lambda: flex.flex_attention)
    block_mask = causal_block_mask(40, 0, x.device)
    fast = attention.attend(pos, q, k, v, x, layer_context(pos, x, block_mask=block_mask))
    close(fast, dense, atol=2e-5)
    assert not torch.allclose(fast, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-2)


# ---- the way, and its name


class Ran(TorchDispatchMode):
    """How the fused kernel ran: "causal", with "masks", or with a row of "keys" for all queries."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            mask, causal = (kwargs or {}).get("attn_mask"), len(args) > 4 and args[4]
            if mask is not None or causal:  # seqpe's encoder has neither
                self.found.add("causal" if mask is None else "keys" if causal else "masks")
        return func(*args, **(kwargs or {}))


EVIDENCE = {  # of a name's beginning
    "sdpa flash_attention with a bias of the keys": {"keys"},
    "sdpa flash_attention": {"causal"},
    "sdpa with": {"masks"},
    "blocks of queries": {"blocks"},
    "dense scores": set(),
}


@pytest.mark.parametrize("fields", [{}, {"window": 5}, {"document_mask": True, "eot": 7}, {"window": BLOCK}])
@all_cases_fast_without_options
def test_the_kernel_that_is_named_is_the_one_that_runs(case, fields, monkeypatch):
    """In training and in evaluation, at block_size and beyond."""
    forward = cpu_attention.BiasedAttention.forward
    model, length = build(case, torch.float32, **fields), 2 * BLOCK if extends(case) else BLOCK
    for size in {BLOCK, length}:
        for training in (True, False):
            name = attention.kernel(model, torch.float32, size, training)
            with torch.set_grad_enabled(training), Ran() as ran:
                found = lambda *args, ran=ran: ran.found.add("blocks") or forward(*args)  # noqa: E731
                monkeypatch.setattr(cpu_attention.BiasedAttention, "forward", staticmethod(found))
                model.train(training)(tokens(size))
            evidence = next(kinds for start, kinds in EVIDENCE.items() if name.startswith(start))
            assert ran.found == evidence, name


def test_the_name_of_a_mixed_model_and_of_a_compiled_one():
    model = GPT(config(["rope", "fox"], window=[0, 4]))
    assert attention.kernel(model, torch.float32) == "sdpa flash_attention, blocks of queries with a trained bias"
    model.compile_parts(backend="eager")
    assert attention.kernel(model, torch.float32) == (
        "sdpa flash_attention, sdpa with a dense bias and a window, by chunks"
    )


def cuda(case, length=256, dtype=torch.float32, **more):
    fields = {name: more.pop(name) for name in ("n_head", "n_embd") if name in more}
    pos = schemes.make(resolve(config(case, **fields)), 0)
    return attention.way_of(pos, torch.device("cuda"), dtype, length, **more)


def test_the_ways_of_cuda():
    """By construction: nothing runs."""
    assert cuda("rope") == cuda("rope", grad=False) == cuda("gape") == "causal"
    assert cuda("path") == cuda("stickbreaking", window=9) == "dense"
    assert cuda("rope", 1, start=9) == cuda("rope", 1, start=9, window=4) == "newest"
    for case in ("alibi", "fox", "rope+alibi", "t5"):
        for length in (1, 40, 256, 1000, 65536):
            assert cuda(case, length) == cuda(case, length, grad=False) == "flex"
        # What FlexAttention's kernels do not have
        assert cuda(case, n_head=4, n_embd=32) == cuda(case, dropout=0.1) == cuda(case, dtype=torch.float64) == "chunks"
        assert cuda(case, n_head=1, n_embd=512) == cuda(case, start=9) == "chunks"
    assert cuda("rope", window=9) == cuda("rope", documents=True) == cuda("rope", n_embd=96, window=9) == "flex"
    assert cuda("rope", window=9, dropout=0.1) == cuda("rope", documents=True, n_head=4, n_embd=32) == "chunks"
    # q and k of pope are twice as wide as a head
    assert cuda("pope", n_head=1, n_embd=128, window=9) == cuda("rope", n_head=1, n_embd=192, window=9) == "flex"
    assert cuda("pope", n_head=1, n_embd=192, window=9) == "chunks"


def test_what_is_deterministic_on_cuda():
    """FlexAttention sums gradients of what a bias has captured by atomics: there a trained bias has dense masks."""
    torch.use_deterministic_algorithms(True)
    try:
        assert cuda("rope") == "causal" and cuda("alibi") == cuda("rope", window=9) == "flex"
        assert cuda("kerple") == cuda("fox") == cuda("rope+fox") == "chunks"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def calls(monkeypatch):
    """Of sdpa's, as on CUDA: whether each might have taken cuDNN's kernel."""
    found, sdpa = [], F.scaled_dot_product_attention

    def attention(*args, **options):
        found.append(torch.backends.cuda.cudnn_sdp_enabled())
        return sdpa(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with as_on("cuda"):
        yield found


def test_cudnn_is_not_for_passes_with_a_cache(calls):
    """It makes a plan for each number of keys."""
    model = build("rope", torch.float32)
    model(tokens(BLOCK))
    assert calls == [True] * LAYERS
    calls.clear()
    model.generate(tokens(4), 3)
    assert calls == [False] * 3 * LAYERS


def test_queries_that_fit_are_not_divided_on_a_gpu(calls):
    """40 are no multiple of 16; two chunks would be computed again in the backward pass."""
    model = build("t5", torch.float32, dropout=0.1)
    model(tokens(40))
    assert len(calls) == LAYERS


@pytest.mark.slow
def test_masks_without_cudnn_are_compiled_in_one_graph():
    """As on CUDA, where sdpa must not take cuDNN's kernel with a mask."""
    model, idx = build("rope", window=5, dropout=0.1), tokens(BLOCK)
    with as_on("cuda"):
        model.compile_parts(backend="aot_eager")
        model(idx, idx)[1].backward()
        seen = []
        inside = lambda *_, **__: seen.append(torch.backends.cuda.cudnn_sdp_enabled())  # noqa: E731
        with attention.without_cudnn(idx.device):
            inside()
        inside()
    assert seen == [False, True]


# ---- weights_of


@all_cases_fast_without_options
@pytest.mark.parametrize("window", [0, 5])
def test_attention_weights_are_the_references(case, window):
    """Of a whole pass; and of the last tokens behind a cache, after which the cache goes on as ever."""
    model, idx = build(case, window=window), tokens(BLOCK)
    with torch.no_grad():
        logits, expected = reference.logits_and_weights(model.config, dict(model.named_parameters()), idx)
        for found, weights in zip(attention.weights_by_layer(model, idx), expected, strict=True):
            close(found, weights)
        caches = [{} for _ in range(LAYERS)]
        model.hidden(idx[:, :4], caches)
        for found, weights in zip(attention.weights_by_layer(model, idx[:, 4:9], caches), expected, strict=True):
            close(found, weights[:, :, 4:9, :9])
        close(model.lm_head(model.hidden(idx[:, 9:], caches)), logits[:, 9:])


@all_cases_fast_without_options
def test_attention_weights_in_documents_are_those_of_each_alone(case):
    model, idx = build(case, document_mask=True, eot=7), tokens(BLOCK, B=1)
    idx[idx == 7] = 8
    idx[0, 4] = 7
    parts = attention.weights_by_layer(model, idx[:, :5]), attention.weights_by_layer(model, idx[:, 5:])
    for found, first, second in zip(attention.weights_by_layer(model, idx), *parts, strict=True):
        close(found[:, :, :5, :5], first)
        close(found[:, :, 5:, 5:], second)
        assert not found[:, :, 5:, :5].any() and not found.triu(1).any()


@pytest.mark.slow
def test_weights_of_many_keys_in_float32_and_by_chunks():
    """300 keys are more than the kernel is asked about at a time."""
    for case in ("rope", "alibi"):
        model, idx = build(case, torch.float32), tokens(300)
        plain, found = model(idx)[0], attention.weights_by_layer(model, idx)
        assert all((weights.sum(-1) - 1).abs().max() < 1e-5 for weights in found)
        exact = attention.weights_by_layer(model.double(), idx)
        for weights, other in zip(found, exact, strict=True):
            close(weights.double(), other, atol=2e-4)
        close(plain.double(), model(idx)[0], atol=1e-2)
        pos, x = model.transformer.h[0].attn.pos, torch.randn(2, 40, WIDTH, dtype=torch.float64)
        q, k, v = torch.randn(3, 2, HEADS, 40, D, dtype=torch.float64)
        by_chunks = attention.weights_of(pos, q, k, x, layer_context(pos, x), window=9, chunk=HEADS * 256)
        close(by_chunks @ v, attention.attend(pos, q, k, v, x, layer_context(pos, x), window=9))


# ---- biases


@pytest.mark.parametrize("rows", [1, 7])
def test_dense_bias_by_chunks_of_any_size(rows):
    """7 queries at a time do not divide the 40 that there are."""
    pos, x = build("alibi").transformer.h[0].attn.pos, torch.randn(2, 40, WIDTH, dtype=torch.float64)
    q, k, v = torch.randn(3, 2, HEADS, 40, D, dtype=torch.float64)
    whole = attention.attend(pos, q, k, v, x, layer_context(pos, x))
    close(attention.attend(pos, q, k, v, x, layer_context(pos, x), chunk=rows * HEADS * 40), whole, atol=1e-12)


@pytest.mark.slow
def test_dense_bias_in_several_chunks_of_queries():
    """1,500² scores of 8 heads exceed the 2^24 elements that may exist at once; a prefix of 1,400 does not.

    Also after a cache.
    """
    model = build("alibi", torch.float32, n_layer=1, n_head=8, n_embd=32)
    x = tokens(1500, B=1)
    with torch.no_grad(), Largest() as largest:
        full = model(x)[0]
    assert largest.elements <= attention.CHUNK < 8 * 1500**2
    close(full[:, :1400], model(x[:, :1400])[0], atol=1e-4)
    caches = [{}]
    model.hidden(x[:, :10], caches)
    close(model.lm_head(model.hidden(x[:, 10:], caches)), full[:, 10:], atol=1e-4)
