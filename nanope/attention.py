"""Causal attention with a bias, within a window, by the fastest kernel that is exact.

    softmax(q kᵀ / √D + bias) v,  query m sees key n where n ≤ m, within a window of w where m - w < n, and with
                                  documents where both are of one

`way_of` decides the way, and `kernel` gives it a name:
    causal   no bias, no window, no documents: the fused causal kernel (flash attention, cuDNN's on Hopper)
    newest   one new token without a bias: it sees all keys, or the window's
    flex     a bias, a window or documents on CUDA: FlexAttention
    blocks   a bias with parameters, in training on a CPU: nanope/cpu_attention.py
    keys     a bias `of_keys`, without gradient on a CPU: the same file, with a mask of one row for a chunk
    chunks   whatever is left: sdpa for a chunk of queries, with a dense mask of those and the keys that they may see.
             Masks that are more than a chunk together are computed again in the backward pass
    dense    `scores` or `weights` of a scheme's own: no fused kernel, dense scores of a chunk of queries

Shapes: B batch, H heads, T queries of this pass, S = start + T keys, D width of a head's values.
"""

import contextlib
import functools
import math

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from nanope.cpu_attention import attend_by_keys, attend_trained
from nanope.ops import kind_of, no_autocast, wide
from nanope.pairs import by_chunks, indices, pairs_of, queries_at_a_time, visible

CHUNK = 2**24  # elements of a dense mask or of dense scores that exist at once: 64 MB in float32
GPU_CHUNK = 2**26  # the same on a GPU, where each chunk starts all its kernels anew; no more than CHUNK are kept
SMALL_CHUNK, FEW_QUERIES = 2**21, 128  # the same on a CPU without gradients, where what is in its cache counts


def attend(
    scheme, q, k, v, x, ctx, window: int = 0, dropout: float = 0.0, chunk: int | None = None, way: str | None = None
) -> torch.Tensor:
    """Attention of one layer: q (B, H, T, ≥ D) at start … S-1, k (B, H, S, ≥ D), v (B, H, S, D) → (B, H, T, D).

    scheme: the layer's; x (B, T, C): the block's normed input; ctx: schemes.base.Context; window: how many tokens a
    query sees, itself among them, 0 for all; dropout: probability for attention weights; chunk: elements of a dense
    mask or of dense scores that exist at once, as many as are fast where None; way: as of way_of, that of this call
    where None.
    """
    window = 0 if window >= k.size(2) else window
    chunk = chunk or chunk_here(q, k)
    way = way or ("flex" if ctx.block_mask is not None else way_here(scheme, q, ctx, window, dropout))
    if way == "dense":
        return attend_densely(scheme, q, k, v, x, ctx, window, dropout, chunk)
    bias = scheme.bias(x, q, k, ctx)
    if bias is None and way in ("blocks", "keys"):  # of a scheme that has one in other places
        way = "chunks"
    if q.dtype != v.dtype:  # under autocast, of a scheme that computes in float32
        q, k = q.to(v.dtype), k.to(v.dtype)
    width, scale = v.size(-1), None
    if q.size(-1) != width:  # kernels want equal widths, and scores are divided by the root of a head's own
        v, scale = F.pad(v, (0, q.size(-1) - width)), width**-0.5
    if way in ("causal", "newest"):
        if way == "newest" and window:
            k, v = k[:, :, -window:], v[:, :, -window:]
        with without_cudnn(q.device, ctx.cache is not None):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=way == "causal", dropout_p=dropout, scale=scale)
    elif way == "flex":
        y = flex_attend(q, k, v, bias, ctx.block_mask, scale)
    elif way == "blocks":
        y = attend_trained(q, k, v, bias, ctx, window, chunk, scale)
    elif way == "keys":
        y = attend_by_keys(q, k, v, bias, ctx, scale)
    else:
        y = attend_by_chunks(q, k, v, bias, ctx, window, dropout, chunk, scale)
    return y if scale is None else y[..., :width]


# ---- the way


def way_of(
    scheme,
    device: torch.device,
    dtype: torch.dtype,
    length: int,
    start: int = 0,
    window: int = 0,
    documents: bool = False,
    dropout: float = 0.0,
    grad: bool = True,
    eager: bool = True,
    flex: bool = True,
) -> str:
    """Which way a layer's attention goes, of those at the top of this file.

    scheme: the layer's; dtype: of biases, ctx.dtype; length: T, behind `start` cached tokens; window: 0 where no query
    reaches it; grad: whether gradients are asked for; eager: neither compiled nor within functorch's transforms; flex:
    whether there is, or may be, a block mask.
    """
    masked = window > 0 or documents
    if scheme.dense:
        return "dense"
    # MPS has let is_causal see future tokens (pytorch #195910): there the mask is explicit
    if not scheme.biased and not masked and start == 0 and device.type != "mps":
        return "causal"
    if not scheme.biased and not documents and length == 1:
        return "newest"
    if flex and flex_fits(scheme, device, dtype, start, dropout):
        # It adds up gradients of what a bias has captured by atomics, and does not say so (torch 2.13)
        if not (torch.are_deterministic_algorithms_enabled() and trains_bias(scheme)):
            return "flex"
    if kind_of(device) == "cpu" and eager and not dropout:
        if grad and trains_bias(scheme):
            return "blocks"
        if not grad and scheme.biased and scheme.of_keys and not masked and length > 1:
            return "keys"
    return "chunks"


def way_here(scheme, q, ctx, window: int, dropout: float) -> str:
    """way_of for one call of `attend` without a block mask."""
    eager = not (q.is_meta or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    masks = {"window": window, "documents": ctx.documents is not None, "dropout": dropout}
    grad = torch.is_grad_enabled()
    return way_of(scheme, q.device, ctx.dtype, ctx.length, ctx.start, **masks, grad=grad, eager=eager, flex=False)


def chunk_here(q: torch.Tensor, k: torch.Tensor) -> int:
    """How many elements of a mask or of scores exist at once. On a CPU without gradients those of 128 queries, or more
    where these are few: one text of 4,096 tokens (4 × 128) takes 1 / 1.4 (kerple) to 1 / 2.6 (fire) of the time with
    CHUNK, path's 1.05. On a GPU, forward and backward of a layer of 64 windows (12 × 64, T 1,024) start 25,000 kernels
    with path and CHUNK, 8,400 with GPU_CHUNK (counted, not timed); the peak is the same, that of the loss head."""
    kind = kind_of(q.device)
    if kind == "cuda":
        return GPU_CHUNK
    if torch.is_grad_enabled() or kind != "cpu":
        return CHUNK
    return min(CHUNK, max(SMALL_CHUNK, FEW_QUERIES * q.size(1) * k.size(2)))


def trains_bias(scheme) -> bool:
    """Whether a bias of the scheme, or of a part of it, has parameters."""
    return any(part.biased and next(part.parameters(), None) is not None for part in scheme.parts())


@torch.no_grad()
def weights_of(scheme, q, k, x, ctx, window: int = 0, chunk: int = CHUNK) -> torch.Tensor:
    """The weights that `attend` gives to the values, (B, H, T, S) in q's dtype: `weights @ v` is what it returns.

    Call it in the place of `attend` (`attending`), not beside it: both go on with the cache, and a scheme may drop what
    it prepared.
    """
    return attend_densely(scheme, q, k, None, x, ctx, window, 0.0, chunk).to(q.dtype)


@contextlib.contextmanager
def attending(model, attend):
    """Within it the attention of a GPT's layers is `attend(scheme, q, k, v, x, ctx, window, dropout)`."""
    before, model.attend = model.attend, attend
    try:
        yield
    finally:
        model.attend = before


@torch.no_grad()
def weights_by_layer(model, idx, caches: list[dict] | None = None) -> list[torch.Tensor]:
    """The attention weights of each layer of a GPT, (B, H, T, S), for tokens idx (B, T) that follow those in
    `caches`."""
    found = []

    def attend(scheme, q, k, v, x, ctx, window, dropout):
        found.append(weights_of(scheme, q, k, x, ctx, window))
        return found[-1].to(v.dtype) @ v

    with attending(model, attend):
        model.hidden(idx, caches)
    return found


# ---- dense masks


def attend_by_chunks(
    q, k, v, bias, ctx, window: int, dropout: float, chunk: int, scale: float | None = None
) -> torch.Tensor:
    """Attention of a chunk of queries at a time, with a dense mask; bias: as Scheme.bias gives it, or None; scale: of
    scores, 1/√(width of q) where None."""
    documents = ctx.documents
    B, H, T, S = q.size(0), q.size(1), ctx.length, k.size(2)
    share, trained = of_bias(bias, B, H, q.device) if B * H * T * S > chunk else (1, False)
    share, heads = share if documents is None else B, 1 if bias is None else H  # of masks
    rows = queries_at_a_time(share, heads, T, S, window, chunk)
    rows = rows if documents is None else min(rows, 128)
    if kind_of(q.device) == "cuda" and 16 < rows < T:
        rows -= rows % 16  # its kernel copies a mask whose rows are not aligned
    # No fused kernel gives a mask's gradient, and no masks are kept that are more than CHUNK together
    again = trained or share * heads * T * (min(S, 2 * max(window, 128)) if window else S) > min(chunk, CHUNK)

    def part(q, k, v, i: int):
        keys, pairs, mask = pairs_of(ctx, B, H, i, min(i + rows, T), window)
        parts = q[:, :, i : i + rows], k[:, :, keys], v[:, :, keys]
        if bias is not None:
            # All four dimensions, so that a CPU's fused kernel takes it. Without autocast, which would round the bias,
            # large at a distance, to bfloat16
            mask = bias(*pairs).to(ctx.dtype).masked_fill(~mask, -math.inf).expand(B, H, -1, -1)
            parts = [t.to(mask.dtype) for t in parts]
        with no_autocast(q.device), without_cudnn(q.device):
            y = F.scaled_dot_product_attention(*parts, attn_mask=mask, dropout_p=dropout, scale=scale)
        return y.to(v.dtype)

    return by_chunks(part, (q, k, v), T, rows, again and torch.is_grad_enabled())


def without_cudnn(device: torch.device, needed: bool = True):
    """Context without cuDNN's attention, which is sdpa's first choice on Hopper, where that is needed.

    With a mask its gradient of q is NaN at some lengths (T mod 128 = 64, log-sum-exp below -88; pytorch #196678). With
    a cache each token has another number of keys, and cuDNN makes a plan for each shape, which took 0.4 s on a B200
    (FunASR #3704)."""
    if not needed or kind_of(device) != "cuda":
        return contextlib.nullcontext()
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return torch.nn.attention.sdpa_kernel(others)


def of_bias(bias, B: int, H: int, device: torch.device) -> tuple[int, bool]:
    """How many dense biases a batch has, 1 where sequences share it, and whether its gradient is asked for."""
    if bias is None:
        return 1, False
    one = torch.zeros(1, 1, dtype=torch.int64, device=device)
    batch, heads, *_ = indices(B, H, 0, 1, 0, device)
    value = bias(batch, heads, one, one)
    return value.size(0) if value.dim() == 4 else 1, value.requires_grad


# ---- scores or weights of a scheme's own


def attend_densely(scheme, q, k, v, x, ctx, window: int, dropout: float, chunk: int) -> torch.Tensor:
    """Attention of a scheme that has scores or weights of its own: T × S scores, a chunk of queries at a time. Without
    values, v None, its weights (B, H, T, S)."""
    B, H, T, S = q.size(0), q.size(1), ctx.length, k.size(2)
    bias = scheme.bias(x, q, k, ctx)
    size = max(1, chunk // (B * H * S))
    again = torch.is_grad_enabled() and B * H * T * S > min(chunk, CHUNK)
    # Few queries leave out the keys after them: 8 chunks do 0.56 of the work of one
    size = min(size, max(64, -(-T // 8)))

    def part(q, k, v, x, i: int):
        rows = slice(i, min(i + size, T))
        end = ctx.start + rows.stop
        scores = scheme.scores(q[:, :, rows], k[:, :, :end], x, rows, ctx).to(ctx.dtype)  # (B, H, R, N)
        batch, heads, m, n = indices(B, H, ctx.start + i, end, 0, q.device)
        if bias is not None:
            scores = scores + bias(batch, heads, m, n)
        hidden = ~visible(m, n, window, ctx.documents, batch)
        weights = scheme.weights(scores.masked_fill(hidden, -math.inf), ctx)
        if v is None:
            return F.pad(weights, (0, S - end))
        weights = F.dropout(weights, dropout, dropout > 0)
        return weights.to(v.dtype) @ v[:, :, :end]

    return by_chunks(part, (q, k, v, x), T, size, again)


# ---- FlexAttention


def flex_fits(scheme, device: torch.device, dtype: torch.dtype, start: int, dropout: float) -> bool:
    """Whether a bias, a window or documents go through FlexAttention: on CUDA, without a cache and dropout, and within
    the limits of its kernels (torch 2.13): heads of 16 channels or more, and no float64. More than 256 channels exceed
    a GPU's shared memory in float32; those that are `wider` are up to twice as wide."""
    fits = 16 <= scheme.head_width <= (128 if scheme.wider else 256)
    return fits and device.type == "cuda" and start == 0 and dropout == 0 and dtype != torch.float64


@functools.cache
def compiled_flex_attention():
    import torch._dynamo
    import torch.nn.attention.flex_attention as flex

    # Each length of an evaluation is another shape, and beyond the limit it would run uncompiled, with all scores
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(flex.flex_attention, dynamic=False)


def flex_attend(q, k, v, bias, block_mask, scale: float | None) -> torch.Tensor:
    """Causal attention with a bias on a GPU, by FlexAttention: no (T, T) bias ever exists."""
    import torch.nn.attention.flex_attention as flex

    # Uncompiled, it would form all scores
    flex_attention = flex.flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    score_mod = None if bias is None else lambda s, b, h, m, n: s + bias(b, h, m, n)
    return flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale)


# ---- which kernel it is


def kernel(model, dtype: torch.dtype, length: int | None = None, training: bool = True) -> str:
    """The kernels that the attention of a GPT's layers takes in a pass over `length` tokens, block_size where None, for
    records and reports. dtype: autocast's."""
    weight, config = model.lm_head.weight, model.config
    length, dropout = length or config.block_size, config.dropout * training

    def name(block) -> str:
        pos, window = block.attn.pos, block.attn.window if block.attn.window < length else 0
        asked = {"window": window, "documents": config.document_mask, "dropout": dropout, "grad": training}
        eager = block._compiled_call_impl is None
        way = way_of(pos, weight.device, wide(weight.dtype), length, **asked, eager=eager)
        if way == "causal":
            return f"sdpa {backend(pos, length, dropout, weight.device, dtype, training)}"
        if way == "chunks":
            masks = ("a dense bias" * pos.biased, "documents" * config.document_mask, "a window" * (window > 0))
            return f"sdpa with {' and '.join(filter(None, masks)) or 'a causal mask'}, by chunks"
        return NAMES[way]

    return ", ".join(dict.fromkeys(map(name, model.transformer["h"])))


NAMES = {  # of the ways that are one kernel
    "flex": "flex_attention",
    "blocks": "blocks of queries with a trained bias",
    "keys": "sdpa flash_attention with a bias of the keys",
    "newest": "sdpa of one query",
    "dense": "dense scores, by chunks",
}


def backend(scheme, length: int, dropout: float, device: torch.device, dtype: torch.dtype, training: bool) -> str:
    """Which of its kernels sdpa takes for a causal pass."""
    q = torch.empty(1, scheme.n_head, length, scheme.head_width, device=device, dtype=dtype, requires_grad=training)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, None, dropout, True)).name.lower()
