"""Which pairs of tokens FlexAttention computes: masks of blocks of them, made outside of compiled code.

Shapes: B batch, S keys.
"""

import functools

import torch

from nanope.attention import way_of
from nanope.pairs import visible


class BlockMasks:
    """The masks with which attention goes through FlexAttention in one forward pass, one a window. A prompt that is to
    be continued, `cached`, has another length each time, for which FlexAttention would be compiled: it takes none."""

    def __init__(self, ctx, dropout: float, cached: bool = False):
        self.ctx, self.made, self.dropout, self.cached = ctx, {}, dropout, cached

    def of(self, scheme, window: int):
        """A layer's mask, or None where its attention goes another way."""
        ctx, documents = self.ctx, self.ctx.documents is not None
        window = 0 if window >= ctx.length else window
        masks = {"window": window, "documents": documents, "dropout": self.dropout}
        if self.cached or way_of(scheme, ctx.device, ctx.dtype, ctx.length, ctx.start, **masks) != "flex":
            return None
        if not documents:
            return causal_block_mask(ctx.length, window, ctx.device)
        if window not in self.made:
            self.made[window] = document_block_mask(ctx.documents, window)
        return self.made[window]


@functools.lru_cache(maxsize=8)
def causal_block_mask(length: int, window: int, device: torch.device):
    """FlexAttention's mask, made outside compiled blocks and kept. It is made of its blocks: create_block_mask would
    form (length, length) elements."""
    import torch.nn.attention.flex_attention as flex

    size = flex._DEFAULT_SPARSE_BLOCK_SIZE
    first = torch.arange(0, length, size, device=device)
    m, n = first.view(-1, 1), first.view(1, -1)  # the first query and the first key of each block
    least, most = m - n - (size - 1), m - n + (size - 1)  # distances in a block
    some, whole = most >= 0, (least >= 0) & (torch.maximum(m, n) + size <= length)
    if window:
        some, whole = some & (least < window), whole & (most < window)
    blocks = []
    for kind in (some & ~whole, whole):
        kind = kind.to(torch.int32)[None, None]
        order = kind.argsort(dim=-1, descending=True, stable=True)
        blocks += [kind.sum(-1, dtype=torch.int32), order.to(torch.int32)]
    seen = {"mask_mod": lambda b, h, m, n: visible(m, n, window), "seq_lengths": (length, length)}
    return flex.BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=size, **seen)


def document_block_mask(documents: torch.Tensor, window: int):
    """FlexAttention's mask of texts that do not see one another, documents (B, S). It is another in every batch: on
    CUDA its making is compiled, or it would form (B, S, S) elements."""
    import torch.nn.attention.flex_attention as flex

    B, S = documents.shape
    mask = functools.partial(flex.create_block_mask, B=B, H=None, Q_LEN=S, KV_LEN=S, device=documents.device)
    compiled = documents.device.type == "cuda"
    return mask(lambda b, h, m, n: visible(m, n, window, documents, b), _compile=compiled)
