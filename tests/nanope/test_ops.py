"""nanope/ops.py: matrix products by either library, GELU, rotation."""

import os
import subprocess
import sys

import pytest
import reference
import torch
import torch.nn.functional as F
from models import Calls, build, close, loss_and_gradients, relative_error, rows_of_logits, tokens
from torch._subclasses.fake_tensor import FakeTensorMode

from nanope import REPO, ops
from nanope.ops import linear, rotate, turned, turns

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
