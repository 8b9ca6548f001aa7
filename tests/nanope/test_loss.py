"""nanope/loss.py: the fused loss, and the score of each token."""

import pytest
import torch
import torch.nn.functional as F
from models import Calls, Largest, close, config, relative_error, rows_of_logits, tokens

from model import GPT
from nanope.evaluation.scoring import score_head
from nanope.loss import chunk_rows, equal_chunks, linear_cross_entropy, linear_nll
from nanope.ops import as_on


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
    assert chunk_rows(50304, h.device) < 203
    with as_on("cuda"):
        assert chunk_rows(50304, h.device) > 5000
    fused, plain = linear_cross_entropy(h, weight, targets), plain_loss(h, weight, targets)
    close(fused, plain, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(fused, (h, weight)), torch.autograd.grad(plain, (h, weight))):
        close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rows", [100, 128, 16384, 16385, 65536, 128 * 41, 128 * 83])
def test_chunks_of_a_gpu_are_equal_whole_tiles(rows):
    most = 5248
    with as_on("cuda"):
        assert chunk_rows(50304, torch.device("cpu")) == most
        size = equal_chunks(rows, most, torch.device("cpu"))
    assert size % 128 == 0 and size <= most
    if rows % 128 == 0 and rows != 128 * 83:  # 83 is a prime
        assert rows % size == 0 and size > min(rows, most) / 2
    assert equal_chunks(rows, most, torch.device("cpu")) == most


@pytest.mark.parametrize("autocast", [False, True])
def test_fused_loss_as_on_a_gpu(autocast, monkeypatch):
    """Its chunks, and its log-sum-exp from the largest probability's place: the CPU's loss and gradients."""
    h, weight, targets = loss_case(torch.float32, T=120, scale=20.0)
    monkeypatch.setattr("nanope.loss.chunk_rows", lambda vocab_size, device: 128)
    found = []
    for kind in ("cpu", "cuda"):
        with as_on(kind), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(h, weight, targets)
        found.append((loss, *torch.autograd.grad(loss, (h, weight))))
    for a, b in zip(*found):
        close(a, b, rtol=1e-2 if autocast else 1e-6, atol=1e-3 if autocast else 1e-7)


@pytest.mark.parametrize("kind, in_place", [("cpu", True), ("cuda", True), ("mps", False)])
def test_where_the_softmax_of_the_loss_is_in_place(kind, in_place):
    """Not on MPS, whose graphs do not promise that it may be. The loss is the same."""
    h, weight, targets = loss_case(torch.float32)
    with as_on(kind), Calls("softmax.int_out") as written:
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
