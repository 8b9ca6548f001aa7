"""nanope/costs.py: FLOPs and memory against formulas worked out by hand, and against real passes of real models."""

import dataclasses
import functools
import resource

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, SCHEMES, GPTConfig
from nanope import costs
from nanope.costs import memory, parameters, products, simulate
from nanope.distributed import autocast
from nanope.meters import MORE_PRODUCTS
from schemes._skew import SWEEPS

CPU = torch.device("cpu")
# Small models. The vocabulary is large enough for the loss head to work in chunks: 2^23 / 20,032 = 418 rows
ROWS, LENGTH, LAYERS, HEADS, WIDTH, VOCAB = 5, 96, 3, 2, 64, 20032
TOKENS = ROWS * LENGTH
SHAPE = GPTConfig(block_size=LENGTH, vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH)
MIXED = {  # several schemes, and windows
    "rope+alibi": {"pos": "rope+alibi"},
    "rope, alibi, none": {"pos": ["rope", "alibi", "none"]},
    "rope in windows": {"pos": "rope", "window": [16, 0]},
    "alibi in windows": {"pos": "alibi", "window": 16},
    "scores of its own": {"pos": "SOFTPLUS"},
}
OWN = """
import torch.nn.functional as F
from schemes import Scheme

class Softplus(Scheme):
    def scores(self, q, k, x, rows, ctx):
        return F.softplus(q @ k.mT)
"""


# Whose products are those of a plain GPT-2 with whole scores, but for what is worked out by hand
PLAIN = ["none", "alibi", "carope", "comrope", "crope", "learned", "rope", "sinusoidal", "xpos", "selective"]


def each_scheme(names=PLAIN, fast=("rope",)):
    """Parametrization in which only a few are fast."""
    return pytest.mark.parametrize(
        "pos", [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in names]
    )


@pytest.fixture
def mixed(tmp_path):
    """mixed(case): the GPTConfig of a case of MIXED."""
    (tmp_path / "own.py").write_text(OWN)

    def config(case):
        fields = dict(MIXED[case])
        if fields["pos"] == "SOFTPLUS":
            fields["pos"] = f"{tmp_path / 'own.py'}:Softplus"
        return dataclasses.replace(SHAPE, **fields)

    return config


def ids():
    return torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


# ---- FLOPs


@pytest.mark.slow
@each_scheme()
def test_flops_of_a_real_pass(pos):
    """All matrix products, attention aside, as torch's own counter sees them in a real model; and attention: the flash
    kernel's seven products of T² scores (two forward, one recomputed, four backward) where the plain one has six."""
    count = simulate(dataclasses.replace(SHAPE, pos=pos), ROWS, torch.bfloat16, gpu=True)
    model = GPT(dataclasses.replace(SHAPE, pos=pos))
    onednn = torch.ops.mkldnn._linear_pointwise  # takes selective's float32 products where the CPU has AVX-512
    known = {onednn: MORE_PRODUCTS[onednn]}
    with FlopCounterMode(display=False, custom_mapping=known) as counter, sdpa_kernel(SDPBackend.MATH):
        # In float32 on a CPU the head's accumulation is an operation that the counter does not know
        with autocast(CPU, torch.bfloat16):
            loss = model(ids(), ids())[1]
        loss.backward()
    assert count.attention == 14 * LAYERS * WIDTH * LENGTH * TOKENS
    assert counter.get_total_flops() == count.products - count.attention // 7


@pytest.mark.slow
@pytest.mark.parametrize("dtype, gpu", [("float32", False), ("bfloat16", True)])
@each_scheme(fast=["comrope"])
def test_flops_by_hand(pos, dtype, gpu):
    """6 FLOPs per weight of a product and token, and what schemes add, worked out from their definitions."""
    C, L = WIDTH, LAYERS
    count = simulate(dataclasses.replace(SHAPE, pos=pos), ROWS, getattr(torch, dtype), gpu)
    added = 0
    if pos == "carope":  # one Linear, C → H
        added = 6 * L * C * HEADS * TOKENS
    if pos == "selective":  # W = up·down, C → 16 → C/2
        added = 6 * L * 16 * (C + C // 2) * TOKENS
    if pos == "comrope":
        b = 8
        frame = 8 * b * C**2  # Qᵀ W_q and Qᵀ W_k, and the same for the weights' gradient
        moments = 4 * b * C * TOKENS  # M_m = Σ g yᵀ of q and k
        tridiagonal = 6 * b**3 * (b - 2) + b**3  # b - 2 reflections of A from both sides and of Q from one; Q V, Q U
        n = b // 2
        tridiagonal += SWEEPS * (n - 1) * 2 * n**3 + 4 * n**3 * (n - 1)  # Jacobi: Gram matrices; reflections of M V, U
        gradient = 4 * b**3  # Q E Qᵀ
        added = L * (frame + moments + C // b * (tridiagonal + gradient))
    assert count.products == TOKENS * (6 * L * 12 * C**2 + 6 * VOCAB * C) + count.attention + added
    # The flash kernel has seven products of T² scores. Where a CPU has dense biases or one of its own, they are six
    assert count.attention in [n * L * C * LENGTH * TOKENS for n in ((14,) if gpu else (12, 14))]
    by_part = products(count, TOKENS)
    assert by_part.get("positional scheme", 0) == pytest.approx(added / TOKENS)
    assert by_part["total"] == pytest.approx(sum(n for part, n in by_part.items() if part != "total"))


def test_flops_with_dropout_by_hand():
    """A CPU's attention with dropout is plain products, of which six have T² scores."""
    count = simulate(dataclasses.replace(SHAPE, dropout=0.1), ROWS, torch.float32, gpu=False)
    assert count.attention == 12 * LAYERS * WIDTH * LENGTH * TOKENS
    assert "positional scheme" not in products(count, TOKENS)


@pytest.mark.slow
def test_flops_of_windows_by_hand(mixed):
    """On a GPU as many scores a query as its window has. On a CPU 128 queries at a time, and the 15 keys before."""
    alibi, rope = mixed("alibi in windows"), mixed("rope in windows")  # of 16 in all layers; of 16, all, 16
    assert simulate(alibi, ROWS, torch.bfloat16, gpu=True).attention == 14 * WIDTH * TOKENS * 3 * 16
    assert simulate(rope, ROWS, torch.bfloat16, gpu=True).attention == 14 * WIDTH * TOKENS * (16 + LENGTH + 16)
    rope = dataclasses.replace(rope, block_size=512, vocab_size=64)
    chunks = 128 * (128 + 3 * 143)
    assert simulate(rope, 1, torch.float32, gpu=False).attention == 14 * WIDTH * (chunks + 512**2 + chunks)


@pytest.mark.slow
def test_rotation_is_elementwise_work():
    """rope turns q and k, and their gradients back: C complex products of six operations a token and layer each way."""
    plain, rope = (
        simulate(dataclasses.replace(SHAPE, pos=pos), ROWS, torch.float32, gpu=False) for pos in ("none", "rope")
    )
    rotation = 12 * LAYERS * WIDTH * TOKENS
    assert rotation <= rope.elementwise - plain.elementwise <= 1.02 * rotation  # and a table of T angles


def test_parameters_of_several_schemes():
    """Each layer's own: comrope's P is 2 heads of 4 blocks of 8 × 8."""
    config = dataclasses.replace(SHAPE, pos=["learned+comrope", "rope"])
    parts = parameters(GPT(config))
    assert parts["positional scheme"] == 2 * (2 * 4 * 8 * 8) and parts["positional table"] == LENGTH * WIDTH
    assert parts["total"] == sum(n for part, n in parts.items() if part != "total")


# ---- memory


def saved_by_a_real_pass(model, dtype=torch.float32):
    """Bytes of the storages that autograd keeps, parameters and token ids aside: of real tensors, by its hooks."""
    storages, idx = {}, ids()
    not_counted = {t.untyped_storage().data_ptr() for t in [idx, *model.parameters()]}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(CPU, dtype):
        loss = model(idx, idx)[1]
    return sum(storages.values()) + 4 * bool(loss.dim() == 0)  # the loss itself lives too


CASES = [
    *PLAIN,
    "fox",
    "t5",
    "gape",
    "cope",
    "seqpe",
    *MIXED,
    "learned with dropout",
    "rope in bfloat16",
    "alibi in bfloat16",
]


@pytest.mark.slow
@each_scheme(CASES, fast=["rope", "alibi", "rope in windows"])
def test_saved_for_backward_is_what_a_real_model_saves(pos, mixed):
    name = pos.split()[0]
    config = mixed(pos) if pos in MIXED else dataclasses.replace(SHAPE, pos=name, dropout=0.1 * ("dropout" in pos))
    dtype = torch.bfloat16 if "bfloat16" in pos else torch.float32
    found, real = sum(simulate(config, ROWS, dtype, gpu=False).saved.values()), saved_by_a_real_pass(GPT(config), dtype)
    # Blocks of queries keep some numbers of their own, and indices that fake tensors share. Layers of comrope share its
    # constants: one that is not run books 256 bytes less
    close = 0.005 if name in SCHEMES.keys() - {*PLAIN} else 1e-4 if name == "comrope" else 0
    assert found == pytest.approx(real, rel=close, abs=0)


@pytest.mark.slow
def test_memory_on_a_gpu_by_hand():
    """GPT-2 in bfloat16 with a flash kernel, every saved byte of a token: L blocks of C channels, H heads."""
    C, L, H = 768, 2, 12
    tokens = 4 * 1024

    def saved_with(**fields):
        return simulate(GPTConfig(n_layer=L, **fields), 4, torch.bfloat16, gpu=True).saved

    saved = saved_with(pos="none")
    attention = saved["attention"]
    # Input, q k v, output; log-sum-exp in float32; random state
    assert attention == tokens * L * (2 * C + 2 * 3 * C + 2 * C + 4 * H) + 24 * L
    assert saved["MLP"] == tokens * L * (2 * C + 2 * 4 * C + 2 * 4 * C)  # input, before and after GELU
    assert saved["norms"] == tokens * (2 * L + 1) * 2 * 4  # mean and 1/σ
    assert saved["residual stream"] == tokens * (2 * L + 1) * 4 * C  # float32
    assert saved["autocast's weights"] == L * 12 * C**2 * 2
    gradients = 4 * 50304 * C + 4 * tokens * C + 4  # of the head's weight and its input, and the loss
    assert saved["loss head"] == gradients + 8  # and the count of targets
    rope = saved_with(pos="rope")["attention"]
    assert rope - attention == L * (tokens * 2 * 2 * C + 1024 * 64 // 2 * 8)  # q and k turned; a complex table
    # FlexAttention: slopes, and no (T, T) matrix; a window adds nothing
    assert 0 <= saved_with(pos="alibi")["attention"] - attention <= L * H * 8
    assert saved_with(pos="none", window=128)["attention"] == attention


ALIKE = {  # what layers have of their own, what they share, and kinds of layers
    "rope, rope, none": {"pos": ["rope", "rope", "none"], "n_layer": 5},
    "windows": {"pos": "rope+fox", "window": [16, 0], "n_layer": 6},
    "learned": {"pos": "learned"},
    "comrope": {"pos": "comrope"},
    "carope": {"pos": "carope", "pos_options": {"source": "embedding", "share_layers": True}},
    "seqpe": {"pos": "seqpe"},
}


@pytest.mark.slow
@each_scheme(ALIKE)
def test_blocks_that_are_alike_cost_the_same(pos):
    """A pass that runs two blocks of each kind has the figures of one that runs all: also where gradients are kept, and
    where blocks are computed again."""
    config = dataclasses.replace(SHAPE, vocab_size=512, **{"n_layer": 4, **ALIKE[pos]})
    often = dict(keep_gradients=True, again=True, divided=True)
    for gpu, how in ((True, {}), (True, {"keep_gradients": True}), (True, often), (False, {})):
        found, whole = (simulate(config, ROWS, torch.bfloat16, gpu, **how, whole=w) for w in (False, True))
        assert (found.products, found.attention) == (whole.products, whole.attention)
        assert found.elementwise == pytest.approx(whole.elementwise, rel=0.001)
        assert found.peak == pytest.approx(whole.peak, rel=0.001)
        assert found.saved == pytest.approx(whole.saved, rel=0.001)


def test_blocks_that_are_alike_are_not_run():
    """Of 40 layers two are, whose products are most of a pass."""
    config = dataclasses.replace(SHAPE, n_layer=40, vocab_size=512)
    with FlopCounterMode(display=False) as counter:
        count = simulate(config, ROWS, torch.bfloat16, gpu=True)
    assert counter.get_total_flops() < count.products / 10


@pytest.mark.slow
def test_a_large_model_is_passed_without_its_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = simulate(GPTConfig(n_layer=48, n_head=25, n_embd=1600), 16, torch.bfloat16, gpu=True)
    assert parameters(run.model)["total"] == 1_555_201_600 and run.peak > 50e9
    # kB; the parameters alone would be 6 GB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


@pytest.mark.parametrize("fields", [{"pos": "alibi"}, {"window": 16}, {"document_mask": True, "eot": 0}])
def test_dropout_saves_no_probabilities_on_a_gpu(fields):
    """No kernel there saves T² of them; a mask may be."""
    plain, dropped = (
        simulate(dataclasses.replace(SHAPE, dropout=p, **fields), ROWS, torch.bfloat16, gpu=True).saved["attention"]
        for p in (0.0, 0.1)
    )
    pairs = SHAPE.n_layer * ROWS * SHAPE.n_head * SHAPE.block_size**2
    assert dropped - plain < 6 * pairs  # 12.5 with probabilities


def test_many_scores_are_not_kept_on_a_gpu():
    """16 windows have 32 M scores a layer: twice what may be kept, half of what may exist at once."""
    shape = dataclasses.replace(SHAPE, pos="stickbreaking", vocab_size=64, n_embd=8, block_size=1024)
    few, many = (simulate(shape, n, torch.bfloat16, gpu=True).saved["attention"] for n in (8, 16))
    assert many < few / 8


@pytest.mark.parametrize("again", [False, True])
def test_windows_that_fit(monkeypatch, again):
    """Those that a search through all sizes finds, without a pass of many more."""
    shape, sizes = dataclasses.replace(SHAPE, vocab_size=64, block_size=512), [1, 2, 3, 5, 8, 16, 40, 120, 960]
    passed, once = [], functools.cache(lambda n: simulate(shape, n, torch.bfloat16, True, True, again))
    monkeypatch.setattr(costs, "simulate", lambda _, n, *args, **how: passed.append(n) or once(n))

    def fitting(limit):
        passed.clear()
        return costs.windows_that_fit(shape, sizes, torch.bfloat16, limit, again)

    needs = {n: memory(once(n), n)["total"] for n in sizes}
    assert fitting(needs[1] - 1) == 0
    for n, following in zip(sizes, sizes[1:]):
        assert fitting(needs[n]) == fitting(needs[following] - 1) == n
        assert max(passed) <= max(32, following)
    assert fitting(needs[960]) == fitting(2 * needs[960]) == 960
