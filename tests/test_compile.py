"""torch.compile of a whole model, GPT.compile_parts, and GPT.parameters_fixed, in the loop that training has."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from models import (
    BLOCK,
    WIDTH,
    Calls,
    build,
    close,
    gradients,
    layer_context,
    loss_and_gradients,
    relative_error,
    rows_of_logits,
    tokens,
    uncached,
)
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from model import GPT
from nanope import attention
from schemes import comrope
from schemes.carope import PathRotation

# Of a few kinds: test_conformance.py compiles the layers of every scheme
COMPILED = ["comrope 4 ld", "carope embedding"]


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(optimize_ddp=True):  # which compile_parts sets
        yield
    torch._dynamo.reset()


@pytest.fixture
def decompositions(monkeypatch):
    """The generators that were decomposed, an item a call."""
    calls, decompose = [], comrope.skew_canonical_form
    monkeypatch.setattr(comrope, "skew_canonical_form", lambda A: calls.append(A) or decompose(A))
    return calls


# ------------------------------------------------------------------------------------------------
# The whole model


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_without_graph_breaks(case, monkeypatch):
    """fullgraph, forward and backward, several chunks of the loss: equal to eager, whose rotation is complex."""
    rows_of_logits(monkeypatch, 9)
    model, idx, targets = build(case), tokens(BLOCK), tokens(BLOCK, seed=1)
    expected = loss_and_gradients(model, model, idx, targets)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    found = loss_and_gradients(model, compiled, idx, targets)
    close(found[0], expected[0])
    for name in expected[1]:
        close(found[1][name], expected[1][name], msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["comrope", "carope"])
def test_compiled_under_autocast(case):
    model, idx, targets = build(case, torch.float32), tokens(BLOCK), tokens(BLOCK, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loss_and_gradients(model, model, idx, targets)
        found = loss_and_gradients(model, compiled, idx, targets)
    close(found[0], expected[0], rtol=1e-2)
    for name in expected[1]:
        assert relative_error(found[1][name], expected[1][name]) < 0.1, name


@pytest.mark.slow
def test_compiled_evaluation_equals_eager():
    model, idx, targets = build("rope"), tokens(BLOCK), tokens(BLOCK, seed=1)
    targets[0, :5] = -1
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        close(compiled(idx, targets, reduction="none")[1], model(idx, targets, reduction="none")[1])
        close(compiled(idx)[0], model(idx)[0])


@pytest.mark.slow
def test_carope_of_many_lengths():
    """Phases are summed by chunks of 32 tokens. Lengths that are dynamic need no graph each, beyond a chunk."""
    draw = torch.Generator().manual_seed(0)
    run = torch.compile(PathRotation.apply, fullgraph=True, dynamic=True, backend="eager")
    for T in (40, 75):
        qk = torch.randn(2, T, 2, 3, 8, generator=draw).requires_grad_()
        log_f = (-torch.rand(2, T, 3, generator=draw)).requires_grad_()
        g, results = torch.randn(qk.shape, generator=draw), []
        for rotation in (PathRotation.apply, run):
            y = rotation(qk, log_f, 1)
            results.append((y, *torch.autograd.grad(y, (qk, log_f), g)))
        for eager, compiled in zip(*results):
            assert relative_error(compiled, eager) < 1e-5
    assert counters["stats"]["unique_graphs"] <= 2


# ------------------------------------------------------------------------------------------------
# GPT.compile_parts


def train(model, steps=3, lr=1e-3):
    """Steps of two micro-batches and clipped AdamW, with a validation before the first. Yields the number of graphs
    compiled so far, and the gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    for step in range(steps):
        if step == 0:
            model.eval()
            with torch.no_grad():
                model(tokens(BLOCK), tokens(BLOCK, seed=1), reduction="none")
            model.train()
        with model.parameters_fixed():
            for micro in range(2):
                loss = model(tokens(BLOCK, seed=4 * step + micro), tokens(BLOCK, seed=4 * step + micro + 2))[1]
                (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield counters["stats"]["unique_graphs"], gradients(model)
        optimizer.step()
        optimizer.zero_grad()


def graphs_of_training(case, backend, tolerance, layers=3):
    """The number of graphs, the same after each step; the gradients are those of eager code."""
    eager, model = (build(case, torch.float32, n_layer=layers) for _ in range(2))
    names = list(model.state_dict())
    model.compile_parts(backend=backend)
    assert list(model.state_dict()) == names
    (first, found), *later = train(model)
    _, expected = next(train(eager))
    for name in expected:
        close(found[name], expected[name], rtol=tolerance, atol=tolerance * expected[name].abs().max().item(), msg=name)
    assert [count for count, _ in later] == [first, first] and not counters["graph_break"]
    return first


@pytest.mark.slow
@pytest.mark.parametrize("case", ["comrope 4 ld", "alibi"])
def test_blocks_compile_once(case):
    """4 graphs: the block's for training and validation, which serve all 3 blocks, and the loss's for both.
    Those of inductor: test_train.py."""
    assert graphs_of_training(case, "aot_eager", 1e-4) == 4


@pytest.mark.slow
def test_compiled_parts_with_dropout_and_autocast():
    """Dropout draws other numbers in a graph; its share is the same. Under autocast the loss stays float32."""
    model = build("rope", torch.float32, dropout=0.5)
    model.compile_parts(backend="aot_eager")
    idx, targets = tokens(BLOCK), tokens(BLOCK, seed=1)
    losses = [model(idx, targets)[1].item() for _ in range(2)]
    assert losses[0] != losses[1]
    model.eval()
    close(model(idx, targets)[1], build("rope", torch.float32)(idx, targets)[1], atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(idx, targets)[1]
    assert low.dtype == torch.float32
    close(low, model(idx, targets)[1], rtol=2e-2)


@pytest.mark.slow
def test_compiled_parts_ignore_targets_and_generate():
    model, idx, targets = build("rope", torch.float32), tokens(BLOCK), tokens(BLOCK, seed=1)
    targets[0, :5] = -1
    expected = [model(idx, targets)[1], model(idx, targets, reduction="none")[1], model.generate(idx, 3, temperature=0)]
    model.compile_parts(backend="eager")
    with torch.no_grad():
        close(model(idx, targets)[1], expected[0], atol=1e-5)
    close(model(idx, targets, reduction="none")[1], expected[1], atol=1e-5)
    assert torch.equal(model.generate(idx, 3, temperature=0), expected[2])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["comrope", "rope"])
def test_compiled_parts_under_ddp(case):
    """DDP around compiled blocks: the same gradients, and no graph cut at DDP's buckets."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, idx, targets = build(case, torch.float32, n_embd=240), tokens(BLOCK), tokens(BLOCK, seed=1)
        expected = loss_and_gradients(model, model, idx, targets)
        model.compile_parts(backend="aot_eager")
        parallel = DistributedDataParallel(model, bucket_cap_mb=1)
        with model.parameters_fixed():
            found = loss_and_gradients(model, parallel, idx, targets)
        close(found[0], expected[0], atol=1e-5)
        for name in expected[1]:
            close(found[1][name], expected[1][name], atol=1e-5, rtol=1e-4, msg=name)
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_compiled_blocks_that_are_computed_again_change_no_bit():
    """With the block's dropout, which is drawn alike; by the same number of graphs."""
    found, graphs = [], []
    for again in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = build("comrope 4 ld", torch.float32, dropout=0.3)
        model.activation_checkpointing = again
        model.compile_parts(backend="aot_eager")
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run = [loss_and_gradients(model, model, tokens(BLOCK, seed=i), tokens(BLOCK, seed=i + 2)) for i in (0, 1)]
        found.append(run)
        graphs.append(counters["stats"]["unique_graphs"])
    for (loss, there), (other, here) in zip(*found):
        assert torch.equal(loss, other) and all(torch.equal(there[name], here[name]) for name in there)
    assert graphs[0] == graphs[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_eager_and_hold_no_constants(duplicate):
    """A copy made of a compiled model, within parameters_fixed, computes with its own parameters."""
    model, idx, targets = build("comrope", torch.float32), tokens(BLOCK), tokens(BLOCK, seed=1)
    model.compile_parts(backend="eager")
    with model.parameters_fixed():
        expected = model(idx, targets)[1]
        twin = duplicate(model)
    graphs = counters["stats"]["unique_graphs"]
    close(twin(idx, targets)[1], expected, atol=1e-5)
    for block in twin.transformer["h"]:
        block.attn.pos.P.data.mul_(1.5)
    fresh = GPT(twin.config)
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(twin(idx)[0], fresh(idx)[0]) and counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_flex_attention_in_compiled_blocks(monkeypatch):
    """A bias through FlexAttention, its block mask made outside; on a CPU that is possible without gradient only."""
    model, idx = build("alibi", torch.float32, n_embd=96), tokens(40)
    with torch.no_grad():
        expected = model(idx)[0]
        monkeypatch.setattr(attention, "flex_fits", lambda *_: True)
        model.compile_parts(backend="aot_eager")
        close(model(idx)[0], expected, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------------------
# GPT.parameters_fixed


@pytest.mark.parametrize("case", ["comrope", "comrope 4 ld", "comrope 2 unit"])
def test_one_decomposition_a_step(case, decompositions):
    model = build(case, torch.float32)
    list(train(model, steps=3))
    assert len(decompositions) == 3 + 1  # the validation lies outside


def test_one_decomposition_a_generate(decompositions):
    """And the tokens are those of passes that each decompose anew."""
    model = build("comrope")
    found = model.generate(tokens(4), 5, temperature=0)
    assert len(decompositions) == 1
    assert torch.equal(found, uncached(model, tokens(4), 5, temperature=0)) and model.fixed_constants is None


@pytest.mark.parametrize("case", ["comrope", "comrope 4 ld", "rope explicit", "rope", "lerope"])
def test_blocks_compute_no_cosines(case):
    """Tables of angles are made once a pass, outside of the blocks that are compiled."""
    attn, x = build(case).transformer.h[0].attn, torch.randn(2, BLOCK, WIDTH, dtype=torch.float64)
    ctx = layer_context(attn.pos, x)
    with Calls("cos") as cosines:
        attn.pos.encode(torch.randn(2, BLOCK, 2, 3, WIDTH // 3, dtype=torch.float64), x, ctx)
    assert cosines.count == 0


@pytest.mark.parametrize("case", ["comrope", "comrope 4 ld", "rope", "carope"])
def test_fixed_parameters_change_no_bit(case):
    model = build(case, torch.float32)
    micro_batches = [(tokens(BLOCK, seed=i), tokens(BLOCK, seed=i + 9)) for i in range(3)]
    for x, y in micro_batches:
        model(x, y)[1].backward()
    expected = gradients(model)
    model.zero_grad()
    with model.parameters_fixed():
        for x, y in micro_batches:
            model(x, y)[1].backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_nothing_is_kept_beyond_fixed_parameters(decompositions):
    """Not after the end, not after an error inside, not into the next one: an update by p.data shows at once."""
    model, idx = build("comrope"), tokens(BLOCK)
    with model.parameters_fixed():
        before = model(idx)[0]
    with pytest.raises(KeyError), model.parameters_fixed():
        raise KeyError
    for block in model.transformer["h"]:
        block.attn.pos.P.data.mul_(1.5)
    after = model(idx)[0]
    assert not torch.allclose(after, before, atol=1e-3)
    with model.parameters_fixed():
        assert torch.equal(model(idx)[0], after)
        with model.parameters_fixed():
            pass
        assert torch.equal(model(idx)[0], after)
    assert len(decompositions) == 5  # at four entries, and in the one forward pass outside
