"""Where a model looks: attention weights by distance, and their entropy, of each layer and head on a fixed sample.

The weights are those that the values are multiplied with (nanope.attention.weights_of). They are reduced within the
forward pass, so those of one layer and one window exist at a time.
"""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.shards import Data, Split
from model import GPT
from nanope.attention import attending, weights_of
from nanope.distributed import autocast
from nanope.evaluation.models import Model, Variant
from nanope.evaluation.options import Options
from nanope.evaluation.parts import Parts
from nanope.evaluation.protocols import split_of, spread_windows
from nanope.evaluation.scoring import Compute, read_windows, sum_over_ranks
from nanope.evaluation.statistics import growing_edges
from nanope.ops import double_device

LARGEST = 10**9  # bytes of the weights of one layer and one window
ROWS = 128  # queries whose sums exist at once, in float64
FIGURES = ("distance", "uniform", "layers")


def evaluate_attention(variant: Variant, data: Data, options: Options, compute: Compute, parts: Parts) -> list[dict]:
    """A row for each of options.lengths, of options.attention windows spread over the split: see measure_attention.
    Null figures and a reason where the model, or the memory, cannot do the length."""
    rows, tokens = [], split_of(data, options.split)
    for length, reason in variant.reach(options.lengths).items():
        row = {"length": length, **variant.label, "windows": options.attention}
        if reason := reason or why_not_looked_at(variant.model, length, len(tokens)):
            rows.append(row | dict.fromkeys(FIGURES) | {"reason": reason})
            continue
        key = row | {"attention": True, "split": options.split}
        found = parts.get(key)
        if found is None:
            found = parts.keep(key, measure_attention(variant.model, tokens, length, options.attention, compute))
        rows.append(row | found)
    return rows


def why_not_looked_at(model: Model, length: int, tokens: int) -> str | None:
    """Why the weights at a length cannot be had; None where they can."""
    if not isinstance(model, GPT):
        return "attention weights are there for runs of train.py, not for models of transformers"
    size = model.config.n_head * length**2 * 4
    if size > LARGEST:
        return f"the attention weights of one layer would take {size / 1e9:.1f} GB, more than {LARGEST / 1e9:g}"
    if tokens < length + 1:
        return f"a window of {length} needs {length + 1:,} tokens, and the split has {tokens:,}"
    return None


@torch.no_grad()
def measure_attention(model: GPT, split: Split, length: int, count: int, compute: Compute) -> dict:
    """Figures of one length, means over all queries of `count` windows.

    distance: `first` and `last` of bins of distances, query less key, whose width grows. layers: for each layer a list,
    for each head {weight, entropy, mean_distance}: the mean weight of a pair of a bin, the mean entropy of a query's
    weights in nats, and the mean distance that they look back. uniform: the same of a head that gives all tokens up to
    its own the same weight. Weights that do not add up to 1 (urpe, stickbreaking) are divided by the sum of their
    magnitudes for entropy and distance, as a distribution must be; `weight` has them as they are. Numbers have six
    digits.
    """
    edges = np.concatenate(([0], growing_edges(length - 1)))  # (bins + 1,)
    windows, ranks = spread_windows(split, count, length), compute.ranks
    found = np.zeros((model.config.n_layer, model.config.n_head, len(edges) + 1))
    layers = []

    def attend(scheme, q, k, v, x, ctx, window, dropout):
        weights = weights_of(scheme, q, k, x, ctx, window)  # (1, H, T, T)
        layers.append(sums_of(weights[0], edges))
        return weights.to(v.dtype) @ v

    device = model.lm_head.weight.device
    for i in tqdm(range(count), desc=f"attention {length}", unit="window", disable=compute.silent):
        if i % ranks.world == ranks.rank:
            text = torch.from_numpy(read_windows(split, windows.start[i : i + 1], length))  # (1, T + 1)
            with attending(model, attend), autocast(device, compute.dtype):
                model.hidden(text[:, :-1].to(device))
            found += torch.stack(layers).cpu().numpy()
            layers.clear()
    found, keys = sum_over_ranks(found, model, ranks), keys_of(length, edges)
    queries, pairs = count * length, count * keys.sum(0)
    seen = np.arange(1, length + 1)  # keys of each query
    even = np.concatenate(((keys / seen[:, None]).sum(0), [np.log(seen).sum(), (seen - 1).sum() / 2]))
    return {
        "distance": {"first": edges[:-1].tolist(), "last": (edges[1:] - 1).tolist()},
        "uniform": figures(even, keys.sum(0), length),
        "layers": [[figures(head, pairs, queries) for head in layer] for layer in found],
    }


def sums_of(weights: torch.Tensor, edges: np.ndarray) -> torch.Tensor:
    """Sums over the queries of weights (H, T, T): of the weights of each bin of distances, of entropies in nats, and of
    the distances looked back. (H, bins + 2) float64."""
    device, T = double_device(weights.device), weights.size(1)
    edges, found = torch.from_numpy(edges).to(device), 0
    for first in range(0, T, ROWS):
        rows = weights[:, first : first + ROWS].to(device, torch.float64)  # (H, R, T)
        m = torch.arange(first, first + rows.size(1), device=device)[:, None]
        # A query's sum over keys before n, at the keys where bins end: float64 keeps what is small and far away
        before = F.pad(rows.cumsum(-1), (1, 0))  # (H, R, T + 1)
        ends = before.gather(-1, (m + 1 - edges).clamp_min(0).expand(len(rows), -1, -1))  # (H, R, bins + 1)
        share = rows.abs() / rows.abs().sum(-1, keepdim=True).clamp_min(1e-300)
        back = (share * (m - torch.arange(T, device=device))).sum((1, 2))
        entropy = torch.special.entr(share).sum((1, 2))
        found = found + torch.cat(((ends[..., :-1] - ends[..., 1:]).sum(1), entropy[:, None], back[:, None]), 1)
    return found


def keys_of(length: int, edges: np.ndarray) -> np.ndarray:
    """How many keys each query of a window has, itself among them, in each bin of distances: (T, bins)."""
    before = np.maximum(np.arange(1, length + 1)[:, None] - edges, 0)
    return before[:, :-1] - before[:, 1:]


def figures(sums: np.ndarray, pairs: np.ndarray, queries: int) -> dict:
    """Of one head: sums (bins + 2,) of sums_of."""
    weight, entropy, back = sums[:-2] / pairs, sums[-2] / queries, sums[-1] / queries
    return {"weight": [digits(w) for w in weight], "entropy": digits(entropy), "mean_distance": digits(back)}


def digits(value: float) -> float:
    return float(f"{value:.5e}")


def head_means(row: dict, name: str) -> list[float]:
    """The mean over heads of `entropy` or `mean_distance`, of each layer of a row."""
    return [float(np.mean([head[name] for head in layer])) for layer in row["layers"]]
