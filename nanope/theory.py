"""What positional schemes do, measured. docs/theory.md has the claims, scripts/theory.py is the command.

What needs no trained run is measured in float64, on tiny models whose own parameters are moved away from their initial
values (nanope/conformance.py). Everything is asked of a scheme by its hooks, so a new scheme needs nothing here.

Shapes: B batch, T positions, C width, H heads, D head width, W ≥ D width of what `encode` gives.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT, SCHEMES
from nanope import attention
from nanope.conformance import VOCABULARY, Case
from nanope.evaluation.models import open_run
from nanope.evaluation.protocols import split_of
from nanope.ops import rope_frequencies
from nanope.pairs import indices
from schemes.base import Context, Scheme

LONGEST = 1024  # block_size of the tiny models, so that tables reach every position below
TIMES = 16  # training lengths, at which trained runs are asked
EULER = 0.5772156649015329  # γ
LAST = 64  # queries of a long text that are averaged over
HOOKS = ("embedding", "projection", "project", "encode", "bias", "scores", "weights")


# ---- what a layer sees


@dataclass
class Seen:
    """One layer in a forward pass, as its attention sees it."""

    scheme: Scheme
    q: torch.Tensor  # (B, H, T, W)
    k: torch.Tensor
    x: torch.Tensor  # (B, T, C), the normed input
    ctx: Context


@torch.no_grad()
def layers_of(model: GPT, idx: torch.Tensor, offset: int = 0) -> list[Seen]:
    """Each layer in a pass over tokens idx (B, T)."""
    found, before = [], model.attend

    def attend(scheme, q, k, v, x, ctx, window, dropout):
        found.append(Seen(scheme, q, k, x, ctx))
        return before(scheme, q, k, v, x, ctx, window, dropout)

    with attention.attending(model, attend):
        model.hidden(idx, offset=offset)
    return found


def encodes_linearly(seen: Seen) -> bool:
    """Whether positions are matrices on q and k: `encode` is linear in them, and nothing else reads them."""
    scheme, x, ctx = seen.scheme, seen.x[:1], seen.ctx
    if not scheme.claims("encode") or scheme.claims("scores"):
        return False
    shape = (1, x.size(1), 2, scheme.n_head, scheme.head_width)
    a, b = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
    whole, parts = scheme.encode(a + 2 * b, x, ctx), scheme.encode(a, x, ctx) + 2 * scheme.encode(b, x, ctx)
    return bool((whole - parts).norm() < 1e-4 * whole.norm())


def column(seen: Seen, j: int) -> torch.Tensor:
    """What becomes of channel j of queries and keys: (T, 2, H, W)."""
    scheme, T = seen.scheme, seen.x.size(1)
    one = torch.zeros(1, T, 2, scheme.n_head, scheme.head_width, dtype=seen.x.dtype)
    one[..., j] = 1
    return scheme.encode(one, seen.x[:1], seen.ctx)[0]


def matrices(seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    """R_q(m) and R_k(n), (T, H, W, D): with them the score of query m and key n is qᵀ R_q(m)ᵀ R_k(n) k."""
    both = torch.stack([column(seen, j) for j in range(seen.scheme.head_width)], -1)  # (T, 2, H, W, D)
    return both[:, 0], both[:, 1]


# ---- R(m)ᵀ R(n) = R(n - m)


@torch.no_grad()
def distance_from_relative(seen: Seen, distances: list[int]) -> list[float]:
    """How far M(m, n) = R_q(m)ᵀ R_k(n) is from a function of n - m: for each distance d the mean over queries m and
    heads of |M(m, m-d) - M(d, 0)| / |M(d, 0)|, Frobenius norms. Unrelated rotations have √2."""
    q, k = matrices(seen)
    found = []
    for d in distances:
        products = q[d:].mT @ k[: k.size(0) - d]  # (T - d, H, D, D)
        gap, size = (products - products[:1]).flatten(2).norm(dim=-1), products[0].flatten(1).norm(dim=-1)
        found.append(float((gap / size)[1:].detach().mean()))
    return found


def log_odds(model: GPT, idx: torch.Tensor, query: int, near: int, far: int) -> torch.Tensor:
    """log of weight(query, far) over weight(query, near) in the first layer, whose input is each token alone: (H,)."""
    caches = [{} for _ in model.transformer["h"]]
    model.hidden(idx[:, :query], caches)
    weights = attention.weights_by_layer(model, idx[:, query : query + 1], caches)[0][0, :, 0]  # (H, query + 1)
    return (weights[:, far] / weights[:, near]).abs().log()


@torch.no_grad()
def structure(name: str, options: dict | None = None) -> dict:
    """What the scores of a scheme depend on, by experiment on a tiny model.

    shift    largest change of a logit, in standard deviations of logits, when all positions move by 300
    before   largest change of a head's log-odds between two keys in the first layer, in nats, when 600 tokens are put
             before the text
    between  the same, when a token between the keys is another one
    turn     mean of distance_from_relative in the first layer; None where positions are no matrices
    to_rope  largest difference of logits from the model of to_rope(), None where there is none
    """
    case = Case(name, options or {}, {"block_size": LONGEST})
    model, draw = case.model(), torch.Generator().manual_seed(5)
    idx = case.tokens(64, rows=1)
    logits = model(idx)[0]
    moved = model.lm_head(model.hidden(idx, offset=300))
    text = case.tokens(24, rows=1)
    prefix, changed = torch.randint(VOCABULARY, (1, 600), generator=draw), text.clone()
    changed[:, 12] = (changed[:, 12] + 1) % VOCABULARY
    odds = log_odds(model, text, 23, 20, 4)
    seen = layers_of(model, idx)[0]
    result = {
        "hooks": [hook for hook in HOOKS if model.transformer["h"][0].attn.pos.claims(hook)],
        "shift": float((moved - logits).abs().max() / logits.std()),
        "before": float((log_odds(model, torch.cat((prefix, text), 1), 623, 620, 604) - odds).abs().max()),
        "between": float((log_odds(model, changed, 23, 20, 4) - odds).abs().max()),
        "turn": None,
        "to_rope": None,
    }
    if encodes_linearly(seen):
        found = distance_from_relative(seen, [1, 2, 4, 8, 16, 32])
        result["turn"] = sum(found) / len(found)
    try:
        result["to_rope"] = float((model.to_rope()(idx)[0] - logits).abs().max())
    except ValueError:
        pass
    return result


# ---- comrope is rope with learned frequencies


@torch.no_grad()
def comrope_gap(options: dict, T: int = 48) -> float:
    """Scores of plain rope, as to_rope() makes it, against the definition qᵀ R(m)ᵀ R(n) k, R(m) = exp(m A / unit) by
    matrix exponentials: the largest difference in standard deviations of scores, in the first layer."""
    case = Case("comrope", options)
    model, idx = case.model(), case.tokens(T, rows=1)
    rope, attn = layers_of(model.to_rope(), idx)[0], model.transformer["h"][0].attn
    A = attn.pos.generators() / attn.pos.unit  # (H, D/b, b, b)
    H, n, b, _ = A.shape
    R = torch.matrix_exp(torch.arange(T, dtype=A.dtype).view(-1, 1, 1, 1, 1) * A)  # (T, H, D/b, b, b)
    q, k, _ = attn.c_attn(rope.x[0]).view(T, 3, H, n, b, 1).unbind(1)
    q, k = ((R @ z).view(T, H, n * b).transpose(0, 1) for z in (q, k))
    scores = rope.q[0] @ rope.k[0].mT
    return float((q @ k.mT - scores).abs().max() / scores.std())


COMROPES = {
    f"{kind}, blocks of {block}": {"kind": kind, "block": block} for kind in ("ap", "ld") for block in (2, 4, 8)
}


def exact_claims() -> dict:
    """What needs no trained run."""
    return {
        "structure": {name: structure(name) for name in SCHEMES},
        "comrope": {name: comrope_gap(options) for name, options in COMROPES.items()},
        "decay": rope_decay(),
    }


# ---- frequencies and decay


def similarity(seen: Seen, distances: list[int]) -> list[float]:
    """tr(R_q(m)ᵀ R_k(m-d)) / D for each distance d, mean over heads and the last queries: what is left at that distance
    of the score of equal q and k, spread over all channels. For a rotation the mean of cos over its angles."""
    T, last = seen.x.size(1), min(LAST, seen.x.size(1) - max(distances))
    found = torch.zeros(len(distances), dtype=torch.float64)
    for j in range(seen.scheme.head_width):
        q, k = column(seen, j).unbind(1)  # (T, H, W)
        for i, d in enumerate(distances):
            found[i] += (q[T - last :] * k[T - last - d : T - d]).sum(-1).double().mean()
    return (found / seen.scheme.head_width).tolist()


def rope_decay(width: int = 128, base: float = 10000.0, longest: int = 4096) -> dict:
    """The mean of cos(d θ_i) over rope's frequencies against 1 - (ln d + γ)/ln base, where it is to be."""
    d = torch.arange(1, longest + 1, dtype=torch.float64)
    exact = (d.unsqueeze(1) * rope_frequencies(width, base)).cos().mean(1)
    gap = exact - (1 - (d.log() + EULER) / math.log(base))
    return {
        "width": width,
        "values": {str(n): float(exact[n - 1]) for n in (1, 16, 256, 4096)},
        "mean_gap": float(gap[15:].abs().mean()),
        "rises": float((exact.diff() > 0).double().mean()),
    }


def frequencies(seen: Seen) -> tuple[torch.Tensor, torch.Tensor] | None:
    """By how many radians each channel pair turns from token to token: mean and standard deviation over tokens,
    (H, D/2) each. None where R_k is no block-diagonal of rotations, times a factor."""
    R = matrices(seen)[1]  # (T, H, W, D)
    D = seen.scheme.head_width
    if R.size(2) != D or D % 2:
        return None
    blocks = R.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # (T, H, D/2, 2, D/2, 2)
    own = blocks.diagonal(dim1=2, dim2=4)  # (T, H, 2, 2, D/2)
    if not torch.allclose(own.square().sum(), R.square().sum()):
        return None
    turned = torch.complex(own[:, :, 0, 0], own[:, :, 1, 0])  # (T, H, D/2)
    steps = (turned[1:] * turned[:-1].conj()).angle()
    return steps.mean(0), steps.std(0)


def frequency_ratios(layers: list[Seen]) -> dict | None:
    """Frequencies over rope's of the same rank, over layers and heads: median, least and largest for each pair. spread:
    standard deviation over tokens, divided by rope's frequency; its median."""
    found = [f for seen in layers if (f := frequencies(seen)) is not None]
    if len(found) < len(layers):
        return None
    mean, std = (torch.stack(parts).flatten(0, 1) for parts in zip(*found))  # (L·H, D/2)
    rope = rope_frequencies(2 * mean.size(1), 10000.0)
    ratios = mean.abs().sort(1, descending=True).values / rope
    ends = {"median": ratios.median(0).values, "least": ratios.amin(0), "largest": ratios.amax(0)}
    return {name: values.tolist() for name, values in (ends | {"spread": (std / rope).median(0).values}).items()}


# ---- CRoPE's projection


def conjugate_share(weight: torch.Tensor) -> float:
    """How much of a real matrix (N, C) is conjugate-linear. With neighbouring channels as complex numbers it is
    x̃ → U x̃ + W conj(x̃) for one U and one W: W's share in the squared norm. CRoPE has 0, a random matrix 0.5."""
    w = weight.detach().double().unflatten(0, (-1, 2)).unflatten(2, (-1, 2))  # (N/2, 2, C/2, 2)
    a, b, c, d = w[:, 0, :, 0], w[:, 0, :, 1], w[:, 1, :, 0], w[:, 1, :, 1]
    U, W = torch.complex(a + d, c - b) / 2, torch.complex(a - d, c + b) / 2
    linear, conjugate = U.abs().square().sum(), W.abs().square().sum()
    return float(conjugate / (linear + conjugate))


def share_deviation(C: int) -> float:
    """The standard deviation of conjugate_share of a (C, C) matrix of independent normal numbers: the share of one of
    two χ² of C²/2 degrees of freedom each."""
    return 0.5 / math.sqrt(C * C / 2 + 1)


def conjugate_shares(model: GPT) -> list[list[float]]:
    """Of W_q, W_k, W_v, for each layer."""
    weights = [block.attn.c_attn.weight for block in model.transformer["h"]]
    return [[conjugate_share(part) for part in weight.chunk(3)] for weight in weights]


# ---- far beyond the training length


@torch.no_grad()
def bias_by_distance(layers: list[Seen], distances: list[int]) -> list[float] | None:
    """The bias of the last queries at each distance less that at distance 0: mean over queries, heads and layers. None
    for a scheme without one."""
    found = []
    for seen in layers:
        bias = seen.scheme.bias(seen.x, seen.q, seen.k, seen.ctx)
        if bias is None:
            return None
        T, last = seen.x.size(1), min(LAST, seen.x.size(1) - max(distances))
        # A bias is elementwise on m and n: those of the last queries and all keys, of which the distances are taken
        batch, heads, m, n = indices(1, seen.scheme.n_head, T - last, T, 0, seen.x.device)
        values = bias(batch, heads, m, n).expand(1, seen.scheme.n_head, last, T)[0].double()
        by = torch.stack([values.gather(-1, (m - d).expand(values.size(0), -1, 1)) for d in (0, *distances)])
        found.append((by[1:] - by[:1]).mean((1, 2, 3)))
    return torch.stack(found).mean(0).tolist()


@torch.no_grad()
def attention_beyond(model: GPT, idx: torch.Tensor, distances: list[int]) -> list[float]:
    """The attention that goes to keys at each distance or farther: sum of weights, mean over the last queries, heads
    and layers. idx (1, T)."""
    caches, last = [{} for _ in model.transformer["h"]], min(LAST, idx.size(1) // 2)
    model.hidden(idx[:, :-last], caches)
    found = 0
    for weights in attention.weights_by_layer(model, idx[:, -last:], caches):
        m = torch.arange(idx.size(1) - last, idx.size(1)).view(-1, 1)
        apart = m - torch.arange(idx.size(1))  # (last, T)
        parts = [weights[0].double().masked_fill(apart < d, 0).sum(-1).mean() for d in distances]
        found = found + torch.stack(parts)
    return (found / len(caches)).tolist()


def octaves(longest: int) -> list[int]:
    """0, 1, 2, 4 … below `longest`."""
    return [0, *(2**i for i in range(math.ceil(math.log2(longest))))]


@torch.no_grad()
def of_model(model: GPT, text: torch.Tensor) -> dict:
    """What is measured of one model, on a text (1, T) of TIMES training lengths or more."""
    block = model.config.block_size
    near, far = text[:, :block], text[:, : TIMES * block]
    kinds = octaves(block)[1:]
    result = {"beyond_1x": attention_beyond(model, near, octaves(block))}
    exact = layers_of(model.double(), near)
    turning = all(encodes_linearly(seen) for seen in exact)
    result["turn"] = mean_of([distance_from_relative(seen, kinds) for seen in exact]) if turning else None
    result["frequencies"] = frequency_ratios(exact) if turning else None
    model.float()
    try:
        model.check_length(far.size(1))
    except ValueError:
        return result | {"beyond_16x": None, "bias": None, "similarity": None}
    layers, distances = layers_of(model, far), octaves(TIMES * block - LAST)[1:] + [TIMES * block - LAST]
    result["bias"] = bias_by_distance(layers, distances)
    result["similarity"] = mean_of([similarity(seen, distances) for seen in layers]) if turning else None
    del layers
    return result | {"beyond_16x": attention_beyond(model, far, octaves(TIMES * block))}


def mean_of(rows: list[list[float]]) -> list[float]:
    return torch.tensor(rows, dtype=torch.float64).mean(0).tolist()


def of_run(run: Path, data: str | None = None) -> dict:
    """What is measured of a run of train.py, as its seed started it and trained, on the first tokens of the validation
    split."""
    subject = open_run(str(run), "last", data)
    model, seed = subject.model.eval(), subject.about["config"]["seed"]
    split, block = split_of(subject.data, "val"), model.config.block_size
    if len(split) < TIMES * block:
        raise ValueError(f"{run}: its validation split has {len(split):,} tokens, and {TIMES * block:,} are needed")
    text = torch.from_numpy(split.read(0, TIMES * block)).long().unsqueeze(0)
    start = GPT(model.config, seed).eval()
    about = {"step": subject.about["step"], "checkpoint_sha256": subject.sha256, "block_size": block}
    about |= {"n_embd": model.config.n_embd, "conjugate": conjugate_shares(model)}
    return about | {"start": of_model(start, text), "trained": of_model(model, text)}


def measure(folder: Path, data: str | None = None, say: Callable[[str], None] = print) -> dict:
    """All numbers: what needs no run, and of every run in the folder, by name. `missing`: schemes without a run."""
    runs = {name: folder / name for name in SCHEMES if (folder / name / "last.pt").exists()}
    numbers = {"exact": exact_claims(), "runs": {}, "missing": [name for name in SCHEMES if name not in runs]}
    for name, run in runs.items():
        say(f"{name}: {run}")
        numbers["runs"][name] = of_run(run, data)
    return rounded(numbers)


def rounded(value):
    """Floats with five significant digits, one where they are rounding errors."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.{4 if abs(value) > 1e-9 else 0}e}") if isinstance(value, float) else value
