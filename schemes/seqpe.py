"""Li et al. 2506.13277 (SeqPE): a position is the sequence of its decimal digits, which a small transformer reads:
e(m) = out(transformer(digits of m, CLS)). Its own term is added to scores: q·k/√D + e(m)W_Q · e(n)W_K/√D per head."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanope.ops import Linear, gelu, no_autocast
from schemes.base import Scheme

PIVOTS, CANDIDATES, SPAN = 16, 32, 256  # of the contrastive loss
WINDOWS, SAMPLED = 8, 32  # shifted windows of the transfer loss, positions of each


class DigitEncoder(nn.Module):
    """Positions (N,) int64 → e (N, C). GPT-2's blocks without biases and gains, over digits and CLS, which is last."""

    def __init__(self, digits: int, layers: int, width: int, heads: int, out: int):
        super().__init__()
        self.heads = heads
        self.digit = nn.Parameter(torch.empty(10, width))
        self.place = nn.Parameter(torch.empty(digits, width))
        self.cls = nn.Parameter(torch.empty(1, width))
        sizes = {"q": (width, width), "kv": (width, 2 * width), "proj": (width, width)}
        sizes |= {"fc": (width, 4 * width), "out": (4 * width, width)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: Linear(*size, bias=False) for name, size in sizes.items()}) for _ in range(layers)
        )
        self.out = Linear(width, out, bias=False)
        self.to_q = Linear(out, out, bias=False)
        self.to_k = Linear(out, out, bias=False)
        self.loss = None  # of the last training pass, until it is asked for

    def __getstate__(self):
        """Copies are made without the loss, whose graph cannot be copied."""
        return super().__getstate__() | {"loss": None}

    def forward(self, positions):
        places = 10 ** torch.arange(self.place.size(0) - 1, -1, -1, device=positions.device)
        x = F.embedding(positions.unsqueeze(1) // places % 10, self.digit) + self.place  # (N, digits, width)
        x = torch.cat((x, self.cls.expand(x.size(0), 1, -1)), 1)

        future = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1)

        def norm(x):
            return F.layer_norm(x, x.shape[-1:])

        def split(x):
            return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1  # where CLS alone is read
            h = norm(x)
            k, v = map(split, layer["kv"](h).chunk(2, -1))
            x, h = (x[:, -1:], h[:, -1:]) if last else (x, h)
            scores = split(layer["q"](h)) @ k.mT / k.size(-1) ** 0.5  # (N, heads, digits + 1, digits + 1)
            y = torch.softmax(scores if last else scores.masked_fill(future, -torch.inf), -1).to(v.dtype) @ v
            x = x + layer["proj"](y.transpose(1, 2).flatten(2))
            x = x + layer["out"](gelu(layer["fc"](norm(x))))
        return self.out(norm(x[:, -1]))


class SeqPE(Scheme):
    """`seqpe`. Queries and keys become 2D wide. All layers share the encoder, W_Q and W_K. Options:

    digits: positions end at 10^digits - 1. width of the encoder, null for n_embd as in the authors' runs; its heads are
    as wide as the model's. layers of it.

    Only while training, within GPT.parameters_fixed(seed) as in train.py: with probability `shift` the positions are i
    … i+T-1 up to `farthest`; and two losses are added, whose weights are `contrast` and `transfer`. Both are of a
    head's channels of e, and averaged over heads; the authors' code has contrast of all C channels at once, which is
    larger. contrast: cross-entropy of e_p·e_j over 32 sampled positions j, the nearest to p is right, for 16 p. 6 of
    the p have j from all positions, 10 from a span of 256, as the authors' 60 %; their edited digits are left out.
    transfer: KL in both directions between the softmaxed rows of the Gram matrix of e over 32 of the positions 0 … T-1,
    which takes no gradient, and over the same of a shifted window, for 8 windows (the authors have 16). It is the mean
    over all entries of these matrices, as the authors' weight of 0.1 is meant (kl_div's default): the sum over a row
    would be 32 times as much. The authors' dropout of 0.1 in the encoder is left out. They clip the encoder's gradient
    apart from the model's, give W_Q and W_K biases, and leave transfer out of shifted steps; here none of these.

    Parameters: encoder.digit (10, width), encoder.place (digits, width), encoder.cls (1, width), 12·width² a layer of
        the encoder, encoder.out (C, width), encoder.to_q and to_k (C, C); all N(0, 0.02²). Not decayed: digit, place,
        cls.
    Beyond block_size: yes, up to 10^digits tokens, then an error.
    Cache: keys of 2D channels.
    Cost: scores of twice the width, which stay in flash attention. Once a pass, not for each sequence: 24·(digits +
        1)·width² FLOPs a position and layer of the encoder, a third of it in the last, and 2·width·C + 4·C².
    """

    wider = "score"
    undecayed = ("encoder.digit", "encoder.place", "encoder.cls")
    shared = ("encoder",)

    def __init__(
        self,
        config,
        layer,
        *,
        digits: int = 5,
        width: int | None = None,
        layers: int = 2,
        farthest: int = 20000,
        shift: float = 0.1,
        contrast: float = 0.1,
        transfer: float = 0.1,
    ):
        super().__init__(config, layer)
        width, self.longest = config.n_embd if width is None else width, 10**digits
        if not 1 <= digits <= 15:
            raise ValueError(f"seqpe's digits must lie in 1 … 15, not {digits}")
        if max(config.block_size, farthest) >= self.longest:  # block_size itself is in a shifted window
            raise ValueError(
                f"seqpe's {digits} digits end at position {self.longest - 1}: "
                f"block_size {config.block_size} and farthest {farthest} must not exceed it"
            )
        if width < 1 or width % self.head_width or layers < 1:
            raise ValueError(
                f"seqpe needs layers ≥ 1 and a width that is a multiple of the head width {self.head_width}, "
                f"not {layers} and {width}"
            )
        if not 0 <= shift <= 1 or contrast < 0 or transfer < 0 or farthest < 1:
            raise ValueError("seqpe needs shift in [0, 1], weights contrast and transfer ≥ 0, and farthest ≥ 1")
        self.farthest, self.shift, self.contrast, self.transfer = farthest, shift, contrast, transfer
        self.reach = farthest if shift else 0
        self.encoder = DigitEncoder(digits, layers, width, width // self.head_width, config.n_embd)

    @classmethod
    def complete_options(cls, options, config):
        return options | {"width": config.n_embd} if options.get("width") is None else options

    def initial(self, name, shape, normal):
        return normal(0.02)

    def positions(self, ctx):
        if ctx.seed is None:
            return ctx.positions
        generator, last = ctx.generator(), max(0, self.farthest + 1 - ctx.length)
        shifted = torch.rand((), generator=generator).item() < self.shift
        by = torch.randint(last + 1, (), generator=generator).item()
        return ctx.positions + by if shifted else ctx.positions

    @classmethod
    def prepare(cls, layers, ctx):
        """e(m)W_Q and e(m)W_K, (T, 2, H, D) or (B, T, 2, H, D), the same for all layers."""
        self, encoder = layers[0], layers[0].encoder
        positions = ctx.positions.round().to(ctx.device, torch.int64)  # (T,) or (B, T)
        index, span = None, ctx.start + ctx.length
        if positions.numel() > span:  # documents: few positions, at many places
            index = positions - positions.min()
            positions = positions.min() + torch.arange(span, device=ctx.device)
        e = encoder(positions.flatten())
        both = torch.stack((encoder.to_q(e), encoder.to_k(e)), 1).unflatten(2, (self.n_head, -1))  # (N, 2, H, D)
        both = both.unflatten(0, positions.shape) if index is None else both[index]
        encoder.loss = self.losses(ctx) if self.training and ctx.seed is not None else None
        return [both] * len(layers)

    def encode(self, qk, x, ctx):
        return torch.cat((qk, ctx.prepared.expand(qk.size(0), -1, -1, -1, -1).to(qk.dtype)), -1)

    def auxiliary(self):
        loss, self.encoder.loss = self.encoder.loss, None  # given once, not by each layer
        return loss

    def losses(self, ctx):
        """The weighted sum of the two auxiliary losses, None where both weights are 0."""
        if not self.contrast and not self.transfer:
            return None
        pivots, candidates, offsets, starts = (self.sent(t, ctx) for t in self.drawn(ctx))
        e = self.encoder(torch.cat((pivots, candidates.flatten(), (starts + offsets).flatten())))
        with torch.no_grad():
            base = self.encoder(offsets.flatten())
        with no_autocast(ctx.device):
            e, base = (t.to(ctx.dtype).unflatten(1, (self.n_head, -1)) for t in (e, base))  # (N, H, D)
            p, j, far = e.split((PIVOTS, PIVOTS * CANDIDATES, offsets.numel()))
            similar = torch.einsum("phd,pjhd->pjh", p, j.unflatten(0, (PIVOTS, CANDIDATES)))
            nearest = (candidates - pivots.unsqueeze(1)).abs().argmin(1)
            contrast = F.cross_entropy(similar, nearest.unsqueeze(1).expand(-1, self.n_head))
            near, far = (t.unflatten(0, offsets.shape).transpose(1, 2) for t in (base, far))  # (windows, H, n, D)
            near, far = ((t @ t.mT).log_softmax(-1) for t in (near, far))
            transfer = ((near - far) * (near.exp() - far.exp())).mean()  # KL in both directions
            return self.contrast * contrast + self.transfer * transfer

    def drawn(self, ctx):
        """Pivots (P,), candidates (P, N), places in each window (W, n), and its start (W, 1), int64 on the CPU."""
        generator = ctx.generator()
        torch.rand(2, generator=generator)  # those of `positions`

        def below(ends, *shape):
            """Whole numbers in 0 … ends - 1."""
            return (torch.rand(*shape, generator=generator, dtype=torch.float64) * ends).long()

        far, T = self.farthest, ctx.length
        spans = torch.where(torch.arange(PIVOTS) < 6, far, min(SPAN, far)).unsqueeze(1)
        pivots = below(far + 1, PIVOTS)
        candidates = below(far - spans + 1, PIVOTS, 1) + below(spans, PIVOTS, CANDIDATES)
        candidates = candidates + (candidates >= pivots.unsqueeze(1))  # never the pivot itself
        offsets = torch.stack([torch.randperm(T, generator=generator)[:SAMPLED] for _ in range(WINDOWS)])
        return pivots, candidates, offsets, 1 + below(max(far + 1 - T, 1), WINDOWS, 1)

    @staticmethod
    def sent(drawn, ctx):
        """On the device of this pass, from pinned memory, so that a GPU's host does not wait."""
        pinned = drawn.pin_memory() if ctx.device.type == "cuda" else drawn
        return pinned.to(ctx.device, non_blocking=True)
