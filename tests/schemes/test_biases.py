"""t5, kerple, fire, fox and cable: values at long distances, options that are refused."""

import bisect
import itertools
import math

import pytest
import reference
import torch
from models import LAYERS, Largest, build, close, config, layer_context, refused, shaken, tokens

from model import GPT
from nanope import attention, cpu_attention, pairs
from schemes.alibi import ALiBi
from schemes.fox import FoX
from schemes.t5 import first_distances

FAR = 65536
REFUSED = [
    ("t5", {"buckets": 7}, "even"),
    ("t5", {"buckets": 32, "longest": 16}, "half of its 32"),
    ("t5", {"longest": 2**20 + 1}, "and not 1048576"),
    ("t5", {"std": -1.0}, "std"),
    ("fire", {"c": 0.0}, "positive"),
    ("fire", {"L": -5.0}, "positive"),
    ("kerple", {"kind": "linear"}, "log.*power"),
]


def first(model):
    return model.transformer.h[0].attn.pos


def bias_at(pos, x, m, n):
    """(H,): the bias of query m and key n, in a layer with the normed input x (B, T, C)."""
    bias = pos.bias(x, None, None, layer_context(pos, x))
    at = torch.tensor([[m]]), torch.tensor([[n]])
    value = bias(torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.arange(pos.n_head).view(-1, 1, 1), *at)
    return value.flatten()


@pytest.mark.parametrize("pos, options, words", REFUSED)
def test_wrong_options_are_refused(pos, options, words):
    refused({"pos": pos, "pos_options": options}, [words])


# ---- t5


SIZES = pytest.mark.parametrize("buckets, longest", [(32, 128), (32, 256), (64, 1024), (8, 20), (2, 9)])


@SIZES
def test_t5_buckets_are_those_of_the_formula(buckets, longest):
    """At (32, 256) four distances are exactly where a bucket starts."""
    firsts = first_distances(buckets, longest)
    for d in (*range(2 * longest), FAR):
        assert bisect.bisect_right(firsts, d) == reference.t5_bucket(d, buckets, longest)


@pytest.mark.slow  # the import of transformers
@SIZES
def test_t5_buckets_are_those_of_transformers(buckets, longest):
    """At every distance to 65,536."""
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(FAR + 1)
    ours = torch.bucketize(distance, torch.tensor(first_distances(buckets, longest)), right=True)
    assert torch.equal(ours, modeling.T5Attention._relative_position_bucket(-distance, False, buckets, longest))


@pytest.mark.slow
def test_t5_bias_equals_transformers():
    """A whole layer's bias, with one table."""
    transformers = pytest.importorskip("transformers")
    pos = first(build("t5", torch.float32))
    other = transformers.T5Config(num_heads=pos.n_head, is_decoder=True)
    layer = transformers.models.t5.modeling_t5.T5Attention(other, has_relative_attention_bias=True, layer_idx=0)
    layer.relative_attention_bias.weight.data = pos.table.data
    T = 300
    theirs = layer.compute_bias(T, T)[0].detach()  # (H, T, T)
    x = torch.zeros(1, T, pos.n_embd)
    _, head, m, n = pairs.indices(1, pos.n_head, 0, T, 0, x.device)
    assert torch.equal(pos.bias(x, None, None, layer_context(pos, x))(None, head, m, n).tril(), theirs.tril())


# ---- kerple and fire


@pytest.mark.parametrize("kind", ["log", "power"])
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_kerple_at_a_long_distance(kind, dtype, rtol):
    pos = first(build("kerple power" if kind == "power" else "kerple", dtype))
    for distance in (0, 1, 2, 1000, FAR):
        ours = bias_at(pos, torch.zeros(1, 1, pos.n_embd, dtype=dtype), FAR, FAR - distance)
        for value, r1, r2 in zip(ours.tolist(), pos.r1.tolist(), pos.r2.tolist()):
            r1 = math.log1p(math.exp(r1))
            if kind == "log":
                exact = -r1 * math.log1p(math.log1p(math.exp(r2)) * distance)
            else:
                exact = -r1 * distance ** (2 / (1 + math.exp(-r2)))
            assert value == pytest.approx(exact, rel=rtol, abs=1e-30)


@pytest.mark.parametrize("kind, ends", [("log", (2, 1)), ("power", (1, 2))])
def test_kerple_starts_as_its_authors_code(kind, ends):
    """r1 and r2 are uniform between 0.01 and their ends."""
    pos = first(GPT(config("kerple", {"kind": kind}, n_head=512, n_embd=512)))
    for value, end in zip(pos.kernel(torch.float64), ends):
        assert value.min() > 0.0099 and value.max() < end
        close(value.mean(), torch.tensor(end / 2, dtype=torch.float64), atol=0.06 * end)
        close(value.std(), torch.tensor(end / math.sqrt(12), dtype=torch.float64), atol=0.03 * end)


def test_fire_interpolates_beyond_L():
    """The argument of f is the share log(c d + 1) / log(c m + 1) beyond L: 1 for the first token at any length."""
    pos = first(build("fire shared"))
    with torch.no_grad():
        pos.log_L.fill_(math.log(6))
    ends = [bias_at(pos, torch.zeros(1, T, pos.n_embd, dtype=torch.float64), T - 1, 0) for T in (8, 100, 3000)]
    for a, b in itertools.pairwise(ends):
        close(a, b)
    weight, bias, out = pos.hidden.weight[:, 0], pos.hidden.bias, pos.out.weight
    close(ends[0], out @ (weight + bias).clamp_min(0))


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_fires_linear_pieces_are_its_units(dtype, atol):
    """Without gradients f is looked up: the same values, also where units never, always or just at an end begin."""
    pos = first(build("fire", dtype))
    with torch.no_grad():
        pos.log_L.fill_(math.log(50))
        pos.hidden.weight[:4, 0] = torch.tensor([0.0, 0.0, 1.0, -1.0])
        pos.hidden.bias[:4] = torch.tensor([0.0, 2.0, -1.0, 0.0])
    m, n = torch.arange(200).view(-1, 1), torch.arange(200).view(1, -1)
    x, heads = torch.zeros(1, 200, pos.n_embd, dtype=dtype), torch.arange(pos.n_head).view(-1, 1, 1)
    found = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found.append(pos.bias(x, None, None, layer_context(pos, x))(0, heads, m, n))
    units, pieces = found
    assert units.requires_grad and units.std() > 0.1
    close(pieces, units.detach(), atol=atol)


# ---- fox and cable


@pytest.mark.parametrize("case, most", [("fox", 0.01), ("cable", 0.02)])
def test_long_sums_against_float64(case, most):
    """65,536 tokens in float32: a bias between neighbours at the end, where sums are largest, and over all."""
    x = torch.randn(1, FAR, 48, generator=torch.Generator().manual_seed(0))
    pairs = ((FAR - 1, FAR - 2), (FAR - 1, FAR - 100), (FAR - 1, 0))
    exact, ours = (
        [bias_at(first(build(case, t)), x.to(t), *at) for at in pairs] for t in (torch.float64, torch.float32)
    )
    for a, b in zip(ours, exact):
        assert ((a - b).abs() <= most + 1e-6 * b.abs()).all()


# ---- the kernel of a trained bias on a CPU


@pytest.mark.parametrize("case", ["t5", "fox"])
@pytest.mark.parametrize("window, start", [(0, 0), (70, 0), (0, 30)])
def test_a_trained_bias_in_blocks_equals_sdpa(case, window, start):
    """Values and gradients of 150 queries, in blocks of 64 and in chunks; with a window; behind a cache."""
    pos, T, S = first(build(case)), 150, 150 + start
    x = torch.randn(2, S, pos.n_embd, dtype=torch.float64)
    q, k, v = (torch.randn(2, pos.n_head, S, 16, dtype=torch.float64).requires_grad_() for _ in range(3))
    g = torch.randn(2, pos.n_head, T, 16, dtype=torch.float64)
    whole = layer_context(pos, x)
    found = []
    for blocks, chunk in ((True, 2**24), (True, 2 * pos.n_head * S * 50), (False, 2**24)):
        bias = pos.bias(x, q, k, whole)
        ctx = layer_context(pos, x[:, start:], start)
        if blocks:
            y = cpu_attention.attend_trained(q[:, :, start:], k, v, bias, ctx, window, chunk, None)
        else:
            y = attention.attend_by_chunks(q[:, :, start:], k, v, bias, ctx, window, 0.0, chunk)
        found.append((y, *torch.autograd.grad(y, (q, k, v, *pos.parameters()), g)))
    for own in found[:2]:
        for a, b in zip(own, found[2]):
            close(a, b)


# ---- a bias of the keys alone


OF_KEYS = pytest.mark.parametrize("case", ["alibi", "fox", "rope+alibi", "alibi+fox", "gape+alibi"])


def of_keys(case, dtype=torch.float64, **shape):
    model = shaken(config(case, **shape), dtype)
    assert attention.kernel(model, dtype, training=False) == "sdpa flash_attention with a bias of the keys"
    return model


@OF_KEYS
@pytest.mark.parametrize("rows", [7, 256])
def test_a_bias_of_the_keys_equals_the_dense_one(case, rows, monkeypatch):
    """In chunks of 7 queries, which do not divide the 40 tokens; behind a cache; with gradient it is the dense one."""
    monkeypatch.setattr(cpu_attention, "ROWS", rows)
    model, idx = of_keys(case), tokens(40, B=3)
    dense = model.hidden(idx)
    with torch.no_grad():
        close(model.hidden(idx), dense)
        caches = [{} for _ in range(LAYERS)]
        pieces = [model.hidden(piece, caches) for piece in idx.split([3, 20, 1, 16], 1)]
        close(torch.cat(pieces, 1), dense)


@pytest.mark.slow
@pytest.mark.parametrize("case, most", [("alibi", 2e-5), ("rope+alibi", 2e-5), ("fox", 3e-4)])
def test_a_bias_of_the_keys_in_float32(case, most):
    """2,048 tokens at 16 times the training length: losses against the dense form in float64. That of float32 is within
    1e-5; fox's sums are float32 in either form. No scores, nor a mask, of all queries and keys; a later token changes
    no bit."""
    shape = {"block_size": 128, "n_head": 4, "n_embd": 128, "vocab_size": 256}
    idx = tokens(2049, V=256)
    inputs, targets = idx[:, :-1], idx[:, 1:]
    with torch.no_grad(), Largest() as largest:
        ours = of_keys(case, torch.float32, **shape)(inputs, targets, reduction="none")[1]
    assert largest.elements < 2048**2
    exact = of_keys(case, **shape)(inputs, targets, reduction="none")[1]
    close(ours.double(), exact.detach(), atol=most)
    with torch.no_grad():
        changed = inputs.index_fill(1, torch.tensor([2000]), 7)
        again = of_keys(case, torch.float32, **shape)(changed, targets, reduction="none")[1]
    assert torch.equal(again[:, :2000], ours[:, :2000]) and not torch.equal(again[:, 2000:], ours[:, 2000:])


@OF_KEYS
def test_a_bias_of_the_keys_under_autocast(case):
    model, idx = of_keys(case, torch.float32), tokens(40)
    with torch.autocast("cpu", torch.bfloat16):
        dense = model.hidden(idx)
        with torch.no_grad():
            close(model.hidden(idx), dense, atol=0.1)


def test_a_bias_of_the_keys_with_channels_that_are_no_neighbours():
    """As an `encode` may leave them. The kernel itself would take them for neighbours."""
    pos, x = first(build("alibi")), torch.randn(2, 40, 48, dtype=torch.float64)
    q, k, v = torch.randn(3, 2, pos.n_head, 16, 40, dtype=torch.float64).mT
    ctx = layer_context(pos, x)
    bias = pos.bias(x, q, k, ctx)
    with torch.no_grad():
        dense = attention.attend_by_chunks(q, k, v, bias, ctx, 0, 0.0, attention.CHUNK)
        close(cpu_attention.attend_by_keys(q, k, v, bias, ctx, None), dense)


def test_another_bias_is_not_of_the_keys_unless_it_says_so():
    class Square(ALiBi):
        def bias(self, x, q, k, ctx):
            return lambda batch, head, m, n: -((m - n) ** 2) / 50

    class Twice(ALiBi):
        of_keys = True

        def bias(self, x, q, k, ctx):
            return lambda batch, head, m, n: (n - m) / 4

    assert [cls.of_keys for cls in (ALiBi, Square, Twice, type("Same", (ALiBi,), {}))] == [True, False, True, True]


@pytest.mark.slow
def test_memory_of_a_trained_bias_is_bounded():
    """1,500² scores of 8 heads exceed the 2^24 elements that may exist at once, also in training."""
    model = build("fox", torch.float32, n_layer=1, n_head=8, n_embd=32)
    idx = tokens(1500, B=1)
    with Largest() as largest:
        model(idx, idx)[1].backward()
    assert largest.elements <= attention.CHUNK < 8 * 1500**2
    assert isinstance(first(model), FoX)
