"""nanope/ops.py: matrix products by either library, the fused loss, rotation."""

import os
import subprocess
import sys

import pytest
import reference
import torch
import torch.nn.functional as F
from models import Calls, Largest, build, close, config, loss_and_gradients, relative_error, rows_of_logits, tokens
from torch._subclasses.fake_tensor import FakeTensorMode

from model import GPT
from nanope import REPO, ops
from nanope.evaluation.scoring import score_head
from nanope.ops import equal_chunks, linear, linear_cross_entropy, linear_nll, rotate, turned, turns

# ------------------------------------------------------------------------------------------------
# Products by oneDNN, which eager float32 takes on some CPUs: here on every CPU that has the operator


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def library(request, monkeypatch):
    """Whether products go through oneDNN."""
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(ops, "onednn_is_faster", lambda: request.param)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_first_and_second_derivatives(bias, library):
    generator = torch.Generator().manual_seed(0)
    x, w, b, probe = (torch.randn(shape, generator=generator) for shape in ((3, 20, 24), (40, 24), (40,), (3, 20, 40)))
    results = []
    for dtype, product in ((torch.float64, F.linear), (torch.float32, linear)):
        inputs = [z.to(dtype).requires_grad_() for z in ((x, w, b) if bias else (x, w))]
        y = product(*inputs)
        first = torch.autograd.grad((y.tanh() * probe.to(dtype)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append([y, *first, *second])
    for expected, found in zip(*results):
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert relative_error(found, expected) < 1e-5


def test_onednn_serves_eager_float32_alone(library):
    """float64, autocast, a few rows, as in cached decoding, and what acts as on a GPU go to F.linear."""
    with Calls("_linear_pointwise") as onednn:
        linear(torch.randn(64, 8), torch.randn(5, 8))
    assert onednn.count == library
    with Calls("_linear_pointwise") as onednn:
        linear(torch.randn(64, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64))
        linear(torch.randn(2, 8), torch.randn(5, 8))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(torch.randn(64, 8), torch.randn(5, 8)).dtype == torch.bfloat16
        with ops.as_on("cuda"):
            linear(torch.randn(64, 8), torch.randn(5, 8))
    assert onednn.count == 0


@pytest.mark.parametrize("case", ["crope", "comrope", "carope", "alibi"])
def test_float32_models_of_both_libraries(case, library, monkeypatch):
    """Loss, its gradients and the losses of single tokens, several chunks of logits: close to float64 whichever library
    multiplies."""
    rows_of_logits(monkeypatch, 48)
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
    found = torch.func.vmap(torch.func.grad(lambda w, x: linear(x, w).square().sum()), (None, 0))(w, x)
    close(found, torch.stack([2 * (x_i @ w.t()).t() @ x_i for x_i in x]), rtol=1e-4, atol=1e-4)


LENGTHS = """
import resource, sys, torch
from model import GPT, GPTConfig
from nanope.ops import onednn_is_faster
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


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_lengths():
    """oneDNN keeps code for every shape that it has seen. In a process of its own: the limit is read once."""
    limits = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in limits}
    command = [sys.executable, "-c", LENGTHS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment)
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        pytest.skip("products do not go through oneDNN on this CPU")
    assert float(done.stdout) < 350  # MB; 700 without the limit


# ------------------------------------------------------------------------------------------------
# GELU, which eager float32 takes through exp2 where a CPU's tanh is slow: here on every CPU


@pytest.fixture
def slow_tanh(monkeypatch):
    monkeypatch.setattr(ops, "tanh_is_slow", lambda: True)
    monkeypatch.setattr(ops, "GELU_BLOCK", 10_007)  # several blocks, the last one shorter


def test_gelu_and_its_derivative_are_those_of_float64(slow_tanh):
    """Within 1e-6 wherever the function is curved, and beyond; with and without gradient the same bits."""
    x, g = torch.linspace(-15, 15, 300_001), torch.linspace(-1, 1, 300_001)
    exact, found = x.double().requires_grad_(), x.clone().requires_grad_()
    expected, y = F.gelu(exact, approximate="tanh"), ops.gelu(found)
    close(y.double(), expected, rtol=0, atol=1e-6)
    expected.backward(g.double())
    y.backward(g)
    close(found.grad.double(), exact.grad, rtol=0, atol=1e-6)
    assert torch.equal(ops.gelu(x), y)


def test_gelu_of_extreme_values(slow_tanh):
    ends = torch.tensor([0.0, -0.0, 1e-30, 20, -20, 1e10, -1e10, 3e38, -3e38, torch.inf, torch.nan])
    x = ends.repeat(2000).requires_grad_()
    y = ops.gelu(x)
    close(y[: len(ends)], F.gelu(ends, approximate="tanh"), equal_nan=True)
    (slope,) = torch.autograd.grad(y.sum(), x)
    close(slope[:7], torch.tensor([0.5, 0.5, 0.5, 1, 0, 1, 0]))


def test_gelu_keeps_as_much_as_its_input(slow_tanh):
    """For the backward pass; and nothing where none follows."""
    x, kept = torch.randn(128, 256), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        ops.gelu(x)
        ops.gelu(x.clone().requires_grad_())
    assert kept == [x.nbytes]


def test_gelu_is_pytorchs_elsewhere(slow_tanh):
    """Another dtype, autocast, compiled code, fake tensors, torch.func, a part of a tensor, a few elements."""
    x = torch.randn(64, 512)
    with Calls("exp2") as own:
        ops.gelu(x)
    assert own.count
    with Calls("exp2") as own:
        for other in (x.double(), x.bfloat16(), x[:, 1:], x[:2]):
            assert torch.equal(ops.gelu(other), F.gelu(other, approximate="tanh"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ops.gelu(x)
        with ops.as_on("cuda"):
            ops.gelu(x)
        slope = torch.func.vmap(torch.func.grad(lambda x: ops.gelu(x).sum()))(x)
    close(slope, torch.func.grad(lambda x: F.gelu(x, approximate="tanh").sum())(x))
    with FakeTensorMode(), Calls("exp2") as fake:
        ops.gelu(torch.empty(64, 512))
    compiled = torch.compile(ops.gelu, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), F.gelu(x, approximate="tanh")) and own.count == fake.count == 0


def test_the_mlp_of_a_model_takes_it(slow_tanh, monkeypatch):
    """The loss and all gradients of a model whose MLPs are wide enough, against those with PyTorch's GELU."""
    model, idx, targets = build("rope", torch.float32, block_size=64), tokens(64, B=4), tokens(64, B=4, seed=1)
    with Calls("exp2") as own:
        found = loss_and_gradients(model, model, idx, targets)
    assert own.count == model.config.n_layer * -(-4 * 64 * 4 * 48 // (ops.GELU_BLOCK * torch.get_num_threads()))
    monkeypatch.setattr(ops, "tanh_is_slow", lambda: False)
    expected = loss_and_gradients(model, model, idx, targets)
    close(found[0], expected[0], rtol=1e-5)
    for name in expected[1]:
        assert relative_error(found[1][name], expected[1][name]) < 1e-4, name


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


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [1, 5, 13, 38, 39, 1000])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_fused_loss_equals_the_plain_one(dtype, tolerance, chunk, scale, monkeypatch):
    """Values and gradients, with ignored targets (a whole chunk of them too), uneven chunks, and logits in the
    hundreds."""
    rows_of_logits(monkeypatch, chunk)
    h, weight, targets = loss_case(dtype, scale=scale)
    fused, plain = linear_cross_entropy(h, weight, targets), plain_loss(h, weight, targets)
    assert fused.dtype == dtype and fused.shape == ()
    close(fused, plain, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(3 * fused, (h, weight)), torch.autograd.grad(3 * plain, (h, weight))):
        assert a.dtype == dtype
        close(a, b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.slow
def test_fused_loss_with_gpt2s_vocabulary():
    """50,304 tokens and the real chunk size: several chunks on a CPU, one on a GPU."""
    h, weight, targets = loss_case(torch.float32, T=203, V=50304)
    assert ops.chunk_rows(50304, h.device) < 203
    with ops.as_on("cuda"):
        assert ops.chunk_rows(50304, h.device) > 5000
    fused, plain = linear_cross_entropy(h, weight, targets), plain_loss(h, weight, targets)
    close(fused, plain, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(fused, (h, weight)), torch.autograd.grad(plain, (h, weight))):
        close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rows", [100, 128, 16384, 16385, 65536, 128 * 41, 128 * 83])
def test_chunks_of_a_gpu_are_equal_whole_tiles(rows):
    most = 5248
    with ops.as_on("cuda"):
        assert ops.chunk_rows(50304, torch.device("cpu")) == most
        size = equal_chunks(rows, most, torch.device("cpu"))
    assert size % 128 == 0 and size <= most
    if rows % 128 == 0 and rows != 128 * 83:  # 83 is a prime
        assert rows % size == 0 and size > min(rows, most) / 2
    assert equal_chunks(rows, most, torch.device("cpu")) == most


@pytest.mark.parametrize("autocast", [False, True])
def test_fused_loss_as_on_a_gpu(autocast, monkeypatch):
    """Its chunks, and its log-sum-exp from the largest probability's place: the CPU's loss and gradients."""
    h, weight, targets = loss_case(torch.float32, T=120, scale=20.0)
    monkeypatch.setattr(ops, "chunk_rows", lambda vocab_size, device: 128)
    found = []
    for kind in ("cpu", "cuda"):
        with ops.as_on(kind), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(h, weight, targets)
        found.append((loss, *torch.autograd.grad(loss, (h, weight))))
    for a, b in zip(*found):
        close(a, b, rtol=1e-2 if autocast else 1e-6, atol=1e-3 if autocast else 1e-7)


@pytest.mark.parametrize("kind, in_place", [("cpu", True), ("cuda", True), ("mps", False)])
def test_where_the_softmax_of_the_loss_is_in_place(kind, in_place):
    """Not on MPS, whose graphs do not promise that it may be. The loss is the same."""
    h, weight, targets = loss_case(torch.float32)
    with ops.as_on(kind), Calls("softmax.int_out") as written:
        loss = linear_cross_entropy(h, weight, targets)
    assert bool(written.count) == in_place
    close(loss, plain_loss(h, weight, targets), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_loss_equals_the_eager_one(autocast, monkeypatch):
    """It subtracts 1 by `where` and sums exponentials itself."""
    rows_of_logits(monkeypatch, 16)
    h, weight, targets = loss_case(torch.float32, scale=20.0)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = [loss(h, weight, targets) for loss in (linear_cross_entropy, compiled)]
    (a, *first), (b, *second) = ((loss, *torch.autograd.grad(loss, (h, weight))) for loss in losses)
    close(a, b, rtol=1e-5)
    for x, y in zip(first, second):
        assert relative_error(y, x) < (5e-3 if autocast else 1e-5)


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
def test_fused_loss_under_autocast(dtype, tolerance, V, monkeypatch):
    """Half-precision products, float32 sums. With a loss scale of 65,536, GradScaler's first, nothing overflows or
    underflows: with 50,304 tokens a mean's probabilities, 2e-5/N, would vanish in float16."""
    rows_of_logits(monkeypatch, 16)
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
                rest = torch.ones(V, dtype=torch.bool)
                rest[targets[targets >= 0]] = False
                assert relative_error(a[rest] / scale, b[rest]) < 4 * tolerance


def test_fused_loss_in_float16_does_not_overflow_in_a_long_chunk():
    """One frequent token in a chunk of 100,000 rows: the weight's gradient is a sum beyond float16's 65,504.

    No loss scale would repair an infinity here, for the sum is formed before any scale.
    """
    h, weight = torch.ones(100_000, 8, requires_grad=True), torch.zeros(16, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(h, weight, torch.zeros(100_000, dtype=torch.int64))
    loss.backward()
    expected = torch.full((16, 8), 1 / 16)
    expected[0] -= 1
    close(weight.grad, expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reduction_none(dtype, monkeypatch):
    rows_of_logits(monkeypatch, 5)
    h, weight, targets = loss_case(dtype)
    nll, logits = linear_nll(h, weight, targets), (h @ weight.T).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none").view(targets.shape)
    assert not nll.requires_grad and nll.dtype == dtype and nll.shape == targets.shape
    close(nll, expected.detach(), atol=1e-12 if dtype == torch.float64 else 1e-5)
    assert (nll[targets == -1] == 0).all() and (nll[targets >= 0] > 0).all()


def test_mean_without_grad_forms_no_gradients():
    """Validation needs the loss alone: no (V, C) gradient, no further products."""
    h, weight, targets = loss_case()
    expected = linear_cross_entropy(h, weight, targets)
    with torch.no_grad(), Calls("mm") as products:
        close(linear_cross_entropy(h, weight, targets), expected.detach())
    assert products.count == 1


@pytest.mark.slow
def test_full_logits_never_exist():
    """N·V elements exist in no forward or backward pass of the loss; with the plain loss they do, so the observer sees
    them."""
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


# ------------------------------------------------------------------------------------------------
# Rotation


def test_real_and_complex_rotation_are_equal(monkeypatch):
    """Eager code multiplies complex numbers, compiled code real ones."""
    x = torch.randn(2, 5, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        y = rotate(x, angles.cos(), angles.sin())
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, angles))))
    for a, b in zip(*results):
        close(a, b, atol=1e-13)
    matrices = reference.rotations(angles).expand(5, 2, 3, 8, 8)
    close(results[0][0], torch.einsum("tshij,btshj->btshi", matrices, x))


@pytest.mark.parametrize("compiling", [False, True])
def test_turned_back_is_the_gradient_of_turned(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = torch.randn(2, 5, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    angles, g = torch.randn(5, 1, 3, 4, dtype=torch.float64), torch.randn(2, 5, 2, 3, 8, dtype=torch.float64)
    by = turns(angles.cos(), angles.sin())
    y = turned(x, by)
    close(turned(y, by, back=True), x)
    close(turned(g, by, back=True), torch.autograd.grad(y, x, g)[0])
    assert turned(x.float(), by).dtype == torch.float32


@pytest.mark.parametrize("offset", [0.0, -60.0, -100.0])
def test_scores_of_logits_far_from_zero_are_exact_under_autocast(offset):
    """bfloat16 has steps of 0.25 at 60 and 0.5 at 100: logits of that dtype would shift the NLL by 0.002 and 0.009."""
    generator = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(n, 128, generator=generator) for n in (4000, 320))
    weight *= 0.15
    h[:, 0], weight[:, 0] = 1, offset
    targets = torch.multinomial((h @ weight.T).softmax(1), 1, generator=generator)[:, 0]
    expected = F.cross_entropy(h.double() @ weight.double().T, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert linear_nll(h, weight, targets).double().mean().item() == pytest.approx(expected.item(), abs=3e-4)
        assert linear_cross_entropy(h, weight, targets).item() == pytest.approx(expected.item(), abs=3e-4)
        nll, _ = score_head(h, weight, targets)
    assert nll.double().mean().item() == pytest.approx(expected.item(), abs=3e-4)
