"""The loss: linear head and cross-entropy in one, without (tokens × V) logits; and the score of each token.

Shapes: N tokens, n of them at a time, C model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanope.ops import Product, by_onednn, kind_of, linear, no_autocast, wide, widens


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits that may exist at a time: 2^23 elements (32 MB) on a CPU, where matrix products are at full speed
    from about 160 rows on, and 2^28 on a GPU, where each chunk should be one large product."""
    elements, step = (2**23, 16) if kind_of(device) == "cpu" else (2**28, TILE)
    return max(step, elements // vocab_size // step * step)


TILE = 128  # rows of a GPU's product that one thread block computes: a part of a tile takes the time of a whole one


def equal_chunks(rows: int, most: int, device: torch.device) -> int:
    """Rows of each chunk of `rows`, at most `most`. On a GPU chunks are equal, in whole tiles, up to half as large as
    they might be: another shape is another choice of kernel. A CPU's are as large as they may be."""
    count = max(1, -(-rows // most))
    if kind_of(device) == "cpu":
        return most
    if rows % TILE == 0:
        count = next((n for n in range(count, 2 * count) if rows // TILE % n == 0), count)
    return min(most, -(-rows // count // TILE) * TILE)


def softmax_and_lse(
    logits: torch.Tensor, exact: torch.dtype, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax (n, V) and log-sum-exp (n, 1) of logits (n, V), in the dtype `exact`, which they may not have yet.

    Compiled, both are one kernel: it reads logits as they are. Eager, the log-sum-exp comes from the largest
    probability, which never underflows; it is found on a CPU by the faster amax, on a GPU without a pass over p."""
    if torch.compiler.is_compiling():
        logits = logits.to(exact)
        peak = logits.amax(1, keepdim=True)
        p = (logits - peak).exp()
        total = p.sum(1, keepdim=True)
        return p / total, peak + total.log()
    if kind_of(logits.device) == "cpu":
        peak = logits.amax(1, keepdim=True)
        p = torch.softmax(logits, 1, dtype=exact, out=out)
        return p, peak - p.amax(1, keepdim=True).log()
    peak, at = logits.max(1, keepdim=True)
    p = torch.softmax(logits, 1, dtype=exact, out=out)
    return p, peak - p.gather(1, at).log()


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `h @ weight.T`, chunked over rows, with the gradients formed in the forward pass.

    While a chunk of logits is at hand, its softmax gives the gradients of h and of the weight at once:
    two matrix products more, no second look at the logits. Stored gradients are those of the *sum*
    (so float16 does not underflow), the weight's is accumulated in float32; backward divides by the
    count and multiplies by grad_output, which carries any loss scale or accumulation factor.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, compute_dtype):
        # h (N, C), weight (V, C), targets (N,) int64 with -1 ignored
        exact = wide(h.dtype)
        need_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        head = weight.to(compute_dtype)
        total = torch.zeros((), dtype=exact, device=h.device)
        fast = compute_dtype == h.dtype and by_onednn(h)
        if need_grad:
            grad_h = torch.empty_like(h)  # (N, C), of the summed loss
            shape = weight.shape[::-1] if fast else weight.shape  # (V, C); (C, V) by oneDNN, its faster order
            grad_weight = torch.zeros(shape, dtype=wide(weight.dtype), device=weight.device)
        rows = chunk_rows(weight.size(0), h.device)
        if fast:  # at full speed with half the rows, and it holds a packed copy of p
            rows = max(1, rows // 2)
        if compute_dtype == torch.float16:  # p.t() @ x sums over the chunk, and float16 ends at 65,504
            rows = min(rows, 2048)
        rows = equal_chunks(h.size(0), rows, h.device)
        compiling = torch.compiler.is_compiling()
        in_place = not compiling and kind_of(h.device) != "mps"  # Metal's graphs promise nothing of a softmax in place
        # Fresh memory costs a CPU page faults, a tenth of the whole loss: one buffer serves all chunks
        reuse = h.device.type == "cpu" and compute_dtype == exact and not compiling
        buffer = h.new_empty(min(rows, h.size(0)), weight.size(0)) if reuse and not fast else None
        for start in range(0, h.size(0), rows):
            part = slice(start, start + rows)
            x, target = h[part].to(compute_dtype), targets[part]
            if fast:
                logits = Product.apply(x, head)
            elif widens(x):  # written in float32 by the product, which saves a GPU's softmax a pass
                logits = exact_product(x, head)
            else:
                logits = torch.mm(x, head.t(), out=buffer[: x.size(0)] if reuse else None)  # (n, V)
            keep = target >= 0
            index = target.clamp_min(0).unsqueeze(1)  # (n, 1)
            target_logit = logits.gather(1, index)
            p, lse = softmax_and_lse(logits, exact, logits if logits.dtype == exact and in_place else None)
            nll = lse - target_logit
            total = total + (nll.squeeze(1) * keep).sum()
            if need_grad:
                if compiling:  # part of the kernel that makes p; a scatter would write p in float32 and read it again
                    p = torch.where(torch.arange(p.size(1), device=p.device) == index, p - 1, p)
                else:
                    p.scatter_add_(1, index, torch.full_like(nll, -1.0))
                p = p.to(compute_dtype)
                keep = keep.unsqueeze(1).to(compute_dtype)
                grad_h[part] = (Product.apply(p, head.t()) if fast else p @ head) * keep
                if fast:
                    grad_weight += Product.apply((x * keep).t(), p.t())
                elif p.dtype == grad_weight.dtype:
                    grad_weight.addmm_(p.t(), x * keep)
                else:
                    grad_weight += p.t() @ (x * keep)
        count = (targets >= 0).sum()
        if need_grad:
            ctx.save_for_backward(grad_h, grad_weight.t() if fast else grad_weight, count)
            ctx.dtypes = h.dtype, weight.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad_h, grad_weight, count = ctx.saved_tensors
        scale = grad_output / count
        h_dtype, weight_dtype = ctx.dtypes
        # In place where no further backward pass reads them: (V, C) of fresh memory is a tenth of a CPU's loss
        kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
        times = torch.mul if kept else torch.Tensor.mul_
        return times(grad_h, scale).to(h_dtype), times(grad_weight, scale).to(weight_dtype), None, None


def head_dtype(h: torch.Tensor) -> torch.dtype:
    """The dtype of the head's matrix products: autocast's where it is on, else that of h."""
    device = h.device.type
    if torch.is_autocast_enabled(device) and h.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return h.dtype


def linear_cross_entropy(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of a linear head over the targets that are not -1.

    h (..., C), weight (V, C), targets (...) int64 → scalar, float32 (h's dtype if wider). No target left
    gives nan, as in torch.nn.functional.cross_entropy.
    """
    if not torch.is_grad_enabled():  # within a Function's forward this cannot be seen
        return linear_nll(h, weight, targets).sum() / (targets >= 0).sum()
    dtype = head_dtype(h)
    with no_autocast(h.device):
        return LinearCrossEntropy.apply(h.reshape(-1, h.size(-1)), weight, targets.reshape(-1), dtype)


def scoring_dtype(h: torch.Tensor) -> torch.dtype:
    """The dtype of the factors of `exact_product` for hidden states h: the head's where a product of that dtype can be
    had in float32, which is on CUDA in eager code, else float32 (h's dtype if wider)."""
    dtype = head_dtype(h)
    return dtype if widens(h) else wide(dtype)


def exact_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (n, C), weight (V, C), both of scoring_dtype → x Wᵀ (n, V) in float32 (their dtype if wider).

    Scores need it: logits about -100 have steps of 0.5 in bfloat16, which shifts their NLL by 0.01 nats. Training keeps
    the faster product, whose error its gradients do not notice."""
    exact = wide(x.dtype)
    return linear(x, weight) if x.dtype == exact else torch.mm(x, weight.t(), out_dtype=exact)


@torch.no_grad()
def linear_nll(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target: h (..., C), weight (V, C), targets (...) → (...), 0 where
    the target is -1. Chunked, without gradient; logits and result in float32 (h's dtype if wider)."""
    dtype, exact = scoring_dtype(h), wide(h.dtype)
    nll = torch.zeros(targets.shape, dtype=exact, device=h.device)
    with no_autocast(h.device):
        # No logits for the rest; under torch.compile for all, since a graph's shapes are fixed
        keep = ... if torch.compiler.is_compiling() else targets >= 0
        scored, target = h[keep].reshape(-1, h.size(-1)).to(dtype), targets[keep].reshape(-1)  # (n, C), (n,)
        head = weight.to(dtype)
        rows = equal_chunks(scored.size(0), chunk_rows(weight.size(0), h.device), h.device)
        parts = [
            F.cross_entropy(exact_product(x, head), y, ignore_index=-1, reduction="none")
            for x, y in zip(scored.split(rows), target.split(rows))
        ]
        nll[keep] = torch.cat(parts).view(targets[keep].shape)
    return nll
