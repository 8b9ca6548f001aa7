"""Which queries see which keys, the place of a token in its document, and a chunk of queries at a time: what the
ways of attention with a mask of their own share.

Shapes: B batch, H heads, T queries of this pass, S = start + T keys; R queries of a chunk, N keys that it may see.
"""

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def indices(B: int, H: int, start: int, end: int, low: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Index tensors of queries start … end-1 and keys low … end-1 that broadcast to (B, H, R, N): batch, head, m, n."""
    batch = torch.arange(B, device=device).view(-1, 1, 1, 1)
    heads = torch.arange(H, device=device).view(-1, 1, 1)
    m, n = torch.arange(start, end, device=device), torch.arange(low, end, device=device)
    return batch, heads, m.view(-1, 1), n.view(1, -1)


def visible(m, n, window: int, documents=None, batch=0):
    """Whether query m may see key n; documents (B, S): which text each token is of, where texts do not see others."""
    seen = (n <= m) & (m - n < window) if window else n <= m
    return seen if documents is None else seen & (documents[batch, m] == documents[batch, n])


def pairs_of(ctx, B: int, H: int, first: int, last: int, window: int) -> tuple[slice, tuple, torch.Tensor]:
    """Of the queries first … last-1 of this pass: the keys that they may see, the index tensors of these pairs, and the
    mask of those that are visible."""
    start, end = ctx.start + first, ctx.start + last
    low = max(0, start - window + 1) if window else 0
    batch, heads, m, n = pairs = indices(B, H, start, end, low, ctx.device)
    return slice(low, end), pairs, visible(m, n, window, ctx.documents, batch)


def places_in_documents(idx: torch.Tensor, eot: int, cache: dict | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of each token in its document, (B, T), and the number of the document of every token so far, (B, S):
    int64. idx (B, T) follows the tokens of `cache`, where it is not None. An end-of-text token is its document's
    last."""
    ends, step = idx == eot, torch.arange(idx.size(1), device=idx.device)
    begins = F.pad(ends[:, :-1], (1, 0))  # (B, T): behind an end in this pass
    documents = begins.long().cumsum(1)  # (B, T)
    places = step - torch.where(begins, step, 0).cummax(1).values  # (B, T)
    if cache is None:
        return places, documents
    if "documents" in cache:
        next_place, next_document = cache["next"]  # (B, 1) each: of the token behind the cached ones
        places = torch.where(documents == 0, places + next_place, places)
        documents = documents + next_document
    cache["next"] = torch.where(ends[:, -1:], 0, places[:, -1:] + 1), documents[:, -1:] + ends[:, -1:]
    cache["documents"] = torch.cat((cache["documents"], documents), 1) if "documents" in cache else documents
    return places, cache["documents"]


# ---- a chunk of queries at a time


def queries_at_a_time(share: int, H: int, T: int, S: int, window: int, chunk: int) -> int:
    """How many queries at a time, so that their dense mask has at most `chunk` elements; share: masks of a batch.
    Within a window about as many as it is long: then the masks of all chunks together are linear in T."""
    rows, span = (min(T, max(window, 128)), 2 * max(window, 128)) if window else (T, S)
    return min(rows, max(1, chunk // (share * H * span)))


def by_chunks(part, tensors: tuple, T: int, rows: int, again: bool) -> torch.Tensor:
    """part(*tensors, first query) of `rows` queries at a time, joined: (B, H, T, D). With `again`, several chunks
    keep no scores: each is computed again in the backward pass."""
    if again and rows < T:
        part = functools.partial(checkpoint, part, use_reentrant=False)
    return torch.cat([part(*tensors, i) for i in range(0, T, rows)], 2)
