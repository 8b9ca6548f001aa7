"""Two ways of attention with a bias that only a CPU takes: a bias that is trained, whose gradient no fused kernel
gives, and a bias of the keys alone, as a mask of one row.

Both compute what nanope.attention.attend_by_chunks does. Shapes as in nanope/attention.py.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanope.ops import no_autocast
from nanope.pairs import by_chunks, indices, pairs_of, queries_at_a_time

# ---- a bias with parameters, in training

BLOCK = 64  # queries: their scores of a sequence are in a CPU's cache, and causality saves 3/8 of those at T = 256


class BiasedAttention(torch.autograd.Function):
    """Attention of blocks of queries, each with a bias and its gradient: q (B, H, T, D), k, v (B, H, S, D) →
    (B, H, T, D).

    blocks: for each (first key, mask of visible keys, or what broadcasts to (B, H, R, N)), its queries those after the
    last block's. biases: for each what broadcasts to (B, H, R, N). sdpa has no fused kernel that gives a mask's
    gradient; its way takes 1.8 (one bias for all sequences) to 2.5 times this one's time at B 16, H 4, T 256. The
    weights are kept, once, for the backward pass.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale, blocks, *biases):
        (B, H, T, D), i, weights = q.shape, 0, []
        q, k, v = (t.reshape(B * H, -1, D) for t in (q * scale, k, v))
        y = torch.empty_like(q)
        for (low, mask), bias in zip(blocks, biases):
            R, N = mask.shape[-2:]
            scores = torch.bmm(q[:, i : i + R], k[:, low : low + N].mT).view(B, H, R, N)
            p = torch.softmax(scores.add_(bias).masked_fill_(~mask, -math.inf), -1).flatten(0, 1)  # (BH, R, N)
            p = F.threshold_(p, 1e-30, 0.0)  # a CPU is slow at numbers below 1e-38, which distant keys would have
            y[:, i : i + R] = torch.bmm(p, v[:, low : low + N])
            weights.append(p)
            i += R
        ctx.save_for_backward(q, k, v, y, *weights)
        ctx.scale, ctx.spans, ctx.shapes = scale, [low for low, _ in blocks], [bias.shape for bias in biases]
        return y.view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        with no_autocast(g.device):
            return BiasedAttention.gradients(ctx, g)

    @staticmethod
    def gradients(ctx, g):
        q, k, v, y, *weights = ctx.saved_tensors
        (B, H, T, D), i = g.shape, 0
        g = g.reshape(B * H, T, D)
        mean = (g * y).sum(-1, keepdim=True)  # Σ_n p dL/dp
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_biases = []
        for p, low, shape in zip(weights, ctx.spans, ctx.shapes):
            R, N = p.shape[-2:]
            queries, keys = slice(i, i + R), slice(low, low + N)
            grad_v[:, keys].baddbmm_(p.mT, g[:, queries])
            grad_scores = torch.bmm(g[:, queries], v[:, keys].mT).sub_(mean[:, queries]).mul_(p)
            grad_q[:, queries] = torch.bmm(grad_scores, k[:, keys])
            grad_k[:, keys].baddbmm_(grad_scores.mT, q[:, queries])
            grad_biases.append(grad_scores.view(B, H, R, N).sum_to_size(shape))
            i += R
        grads = (grad_q.mul_(ctx.scale), grad_k, grad_v)
        return *(t.view(B, H, -1, D) for t in grads), None, None, *grad_biases


def attend_trained(q, k, v, bias, ctx, window: int, chunk: int, scale: float | None) -> torch.Tensor:
    """As attend_by_chunks, by BiasedAttention. Its weights are at most `chunk` elements, or are computed again."""
    B, H, T, S = q.size(0), q.size(1), ctx.length, k.size(2)
    rows = queries_at_a_time(B, H, T, S, window, chunk)
    scale = q.size(-1) ** -0.5 if scale is None else scale

    def part(q, k, v, i: int):
        blocks, biases, last = [], [], min(i + rows, T)
        for first in range(i, last, BLOCK):
            keys, pairs, mask = pairs_of(ctx, B, H, first, min(first + BLOCK, last), window)
            blocks.append((keys.start, mask))
            biases.append(bias(*pairs).to(ctx.dtype))
        parts = (t.to(ctx.dtype) for t in (q[:, :, i:last], k, v))
        with no_autocast(q.device):
            return BiasedAttention.apply(*parts, scale, blocks, *biases).to(v.dtype)

    return by_chunks(part, (q, k, v), T, rows, again=True)


# ---- a bias of the keys alone, without gradient

ROWS = 192  # queries whose mask is one row: so few that the bias of near keys, from the first query, is small


def attend_by_keys(q, k, v, bias, ctx, scale: float | None) -> torch.Tensor:
    """As attend_by_chunks, of a bias `of_keys`: that of any two queries differs by one number for all keys, which the
    softmax cancels. So a chunk of queries takes the bias of its first one, (B, H, 1, N), as the mask of the kernel
    that also is causal: no later token changes a bit. The keys before the chunk, which all of its queries see, are a
    second call; both are joined by their log-sum-exps.

    In float32 a score has the rounding error of a bias that is up to ROWS tokens longer.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))  # it takes for granted what sdpa asks
    B, H, T, found = q.size(0), q.size(1), ctx.length, []
    with no_autocast(q.device):
        for i in range(0, T, ROWS):
            start, end = ctx.start + i, ctx.start + min(i + ROWS, T)
            batch, heads, _, n = indices(B, H, start, end, 0, q.device)
            mask = bias(batch, heads, torch.full((1, 1), start, device=q.device), n).to(ctx.dtype).expand(B, H, 1, -1)
            rows, own, past = q[:, :, i : i + ROWS], slice(start, end), slice(0, start)
            y, lse = flash(rows, k[:, :, own], v[:, :, own], 0.0, True, attn_mask=mask[..., own], scale=scale)
            if start:
                before, other = flash(rows, k[:, :, past], v[:, :, past], attn_mask=mask[..., past], scale=scale)
                y = torch.lerp(y, before, torch.sigmoid(other - lse).unsqueeze(-1).to(y.dtype))
            found.append(y)
    return torch.cat(found, 2)
