"""Yang et al. 2505.16381 (PaTH): the score of query m and key n is k_nᵀ H_{n+1} H_{n+2} … H_m q_m / √D, where each
token has a Householder-like matrix of its own, H_s = I - β_s w_s w_sᵀ.

For the tokens of a block, W (b, D) and β, the product is I - WᵀXᵀW with X = (I + tril₋₁(β W Wᵀ))⁻¹ β, lower triangular
(the UT transform). So all scores of a block are matrix products, and a query walks from block to block:
    y = q Wᵀ, without the tokens after the query;  scores = q Kᵀ - y V;  q ← q - y U;  U = X W, V = X tril₋₁(W Kᵀ)
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanope.ops import Linear, no_autocast
from schemes.base import Scheme

BLOCK = 64  # tokens


def blocks(w: torch.Tensor, beta: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """W, U, V and the keys at the end of their block, from w and k (B, H, T, D) and β (B, H, T, 1): (B, H, n, b, D),
    and V (B, H, n, b, b). The last block is filled up with tokens of β = 0."""
    T = w.size(2)
    size = min(BLOCK, T)
    w, beta, k = (F.pad(t, (0, 0, 0, -T % size)).unflatten(2, (-1, size)) for t in (w, beta, k))
    inner = torch.cat((w @ w.mT, w @ k.mT), -1).unflatten(-1, (2, size)).transpose(-2, -3)  # (B, H, n, 2, b, b)
    among, keys = (beta.unsqueeze(-3) * inner).tril(-1).unbind(-3)
    right = torch.cat((beta * w, keys), -1)  # (B, H, n, b, D + b)
    U, V = torch.linalg.solve_triangular(among, right, upper=False, unitriangular=True).split((w.size(-1), size), -1)
    return w, U, V, k - V.mT @ w


class PaTH(Scheme):
    """`path`. w = L2norm(SiLU(conv(x down up))) per head, a map of low rank and a short causal convolution of each
    channel; β = 2σ(x · gate + b) per head. No norm of q and k. PaTH-FoX is `path+fox`; its authors' code divides fox's
    bias by √D too, which is fox's option divided. Options:

    rank of the map, width of the convolution. start: b at the start; 0 gives β = 1, a projection that forgets what a
    key has along w, and -10 nearly `none`.

    w and β are float32 or wider also under autocast, which rounds products with queries alone: with w in bfloat16 the
    scores of 300 tokens were wrong by 0.04. Another scheme's encoding would change the keys after V is made of them, so
    no other may have one. The authors' models start conv at N(0, 0.02²) and norm w by √(Σw² + 1e-6).

    Parameters: down.weight (rank, C), up.weight (C, rank), N(0, 0.02²); conv (C, width), N(0, 1/(3·width)); gate.weight
        (H, C), N(0, 0.02²); gate.bias (H,), start. Not decayed: gate.bias.
    Beyond block_size: yes, by construction.
    Cache: keys as they are after the last pass's H, in float32; W, U and keys of the last pass; width - 1 inputs of the
        convolution.
    Cost: 2·C·(2·rank + width + H) FLOPs a token, about 512·C for blocks of 64, and scores at three times their price,
        6·C a pair of tokens instead of 2·C; dense scores by chunks. While decoding 4·C a cached token.
    """

    undecayed = ("gate.bias",)
    sole = ("encode",)

    def __init__(self, config, layer, *, rank: int = 32, width: int = 3, start: float = 0.0):
        super().__init__(config, layer)
        if rank < 1 or width < 1:
            raise ValueError(f"path's rank and width must be at least 1, not {rank} and {width}")
        self.start = start
        self.conv = nn.Parameter(torch.empty(config.n_embd, width))  # the last column is for the token itself
        self.down = Linear(config.n_embd, rank, bias=False)
        self.up = Linear(rank, config.n_embd, bias=False)
        self.gate = Linear(config.n_embd, config.n_head)

    def initial(self, name, shape, normal):
        if name == "gate.bias":
            return torch.full(shape, self.start)
        return normal((3 * shape[1]) ** -0.5 if name == "conv" else 0.02)

    @classmethod
    def prepare(cls, layers, ctx):
        """What `encode` hands on to `scores`: a list a layer, filled there."""
        return [[] for _ in layers]

    def encode(self, qk, x, ctx):
        with no_autocast(x.device):
            mapped = self.up.in_dtype(self.down.in_dtype(x, ctx.dtype), ctx.dtype)
            w = F.silu(ctx.convolved("conv", mapped, self.conv.to(ctx.dtype)))  # (B, T, C)
            w = F.normalize(w.unflatten(2, (self.n_head, -1)), dim=-1, eps=1e-6).transpose(1, 2)  # (B, H, T, D)
            beta = 2 * torch.sigmoid(self.gate.in_dtype(x, ctx.dtype)).mT.unsqueeze(-1)  # (B, H, T, 1)
            made = blocks(w, beta, qk[:, :, 1].transpose(1, 2).to(ctx.dtype))
            ctx.prepared[:] = made
            if ctx.cache is None:
                return qk
            self.advance(ctx, made)
            return qk.to(ctx.dtype)  # rounded to bfloat16 again at each token, cached keys would drift away

    def advance(self, ctx, made) -> None:
        """Bring the cached keys to the end of the pass before: k ← H_m … H_{n+1} k, and keep this pass for the next."""
        key = ctx.key("blocks")
        if key in ctx.cache:
            *before, T = ctx.cache[key]
            keys = ctx.cache["k"][:, :, : ctx.start - T]
            for W, U, last in zip(*(t.unbind(2) for t in before)):
                keys = torch.cat((keys - (keys @ U.mT) @ W, last), 2)
            ctx.cache["k"] = keys[:, :, : ctx.start]  # without what filled up the last block
        W, U, _, last = made
        ctx.cache[key] = W, U, last, ctx.length

    def scores(self, q, k, x, rows, ctx):
        W, U, V, last = ctx.prepared
        q, k, size = q.to(ctx.dtype), k.to(ctx.dtype), W.size(3)
        first, walked, found = q.size(2), q[:, :, :0], []  # the queries from `first` on are walking
        for n in reversed(range((rows.stop + size - 1) // size)):
            parts, at = [], n * size  # at: of the block in this pass
            if walked.size(2):
                parts.append(walked @ last[:, :, n].mT)
                walked = walked - walked @ W[:, :, n].mT @ U[:, :, n]
            start, end = max(0, at - rows.start), first
            if start < end:  # these queries are among the block's tokens
                m = torch.arange(rows.start + start, rows.start + end, device=q.device).view(-1, 1)
                own, keys = q[:, :, start:end], k[:, :, ctx.start + at : ctx.start + at + size]
                y = (own @ W[:, :, n].mT).masked_fill(torch.arange(at, at + size, device=q.device) > m, 0)
                parts.insert(0, own @ keys.mT - (y @ V[:, :, n])[..., : keys.size(2)])
                walked, first = torch.cat((own - y @ U[:, :, n], walked), 2), start
            found.append(F.pad(torch.cat(parts, 2), (0, 0, first, 0)))  # hidden from queries before the block
        if ctx.start:
            found.append(walked @ k[:, :, : ctx.start].mT)
        if rows.stop == ctx.length and not torch.is_grad_enabled():
            ctx.prepared.clear()  # no chunk comes after, so that layers do not pile up what they made
        return torch.cat(found[::-1], -1) / self.head_width**0.5
