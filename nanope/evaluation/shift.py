"""By how much predictions change when all positions are shifted: ComRoPE's figure 5 (arXiv 2506.03737), on text.

A relative scheme gives the same logits for a text at positions 0 … T-1 as at s … s+T-1. Here every angle of rotation
is computed for the shifted positions, and the NLL of every token is compared with that of the unshifted ones.
"""

import math

import numpy as np
import torch

from data.shards import Data
from data.tokenizer import Tokenizer
from model import GPT
from nanope.attention import attending
from nanope.distributed import autocast
from nanope.evaluation.models import Model
from nanope.evaluation.options import Options
from nanope.evaluation.protocols import split_of, spread_windows
from nanope.evaluation.scoring import Compute, read_windows
from nanope.evaluation.statistics import FIGURES
from nanope.loss import linear_nll
from schemes import label


def evaluate_shift(model: Model, data: Data, tokenizer: Tokenizer, options: Options, compute: Compute) -> list[dict]:
    """A row for each offset: the NLL of some windows of the training length, spread over the split, whose first token
    stands at that position, and the largest change of any token's NLL from offset 0, in nats.

    The model is the unscaled one. Every rank computes all of it. Null figures and a reason for a model without
    positions that could be shifted.
    """
    length = model.config.block_size
    kind = {"length": length, "protocol": "shift", "scaling": "none", "factor": 1.0, "cropping_baseline": False}
    rows = [kind | {"offset": offset} | dict.fromkeys((*FIGURES, "largest_change")) for offset in options.offsets]
    if reason := why_not_shifted(model):
        return [row | {"reason": reason} for row in rows]
    tokens = split_of(data, options.split)
    windows = spread_windows(tokens, options.windows, length)
    text = read_windows(tokens, windows.start, length)  # (B, T + 1)
    n_bytes = int(tokenizer.token_bytes[text[:, 1:]].sum())
    parts = [text[part] for part in windows.batches(compute.batch_tokens)]
    plain = losses_of_parts(model, parts, 0, compute.dtype)  # (B, T)
    for row in rows:
        nll = losses_of_parts(model, parts, row["offset"], compute.dtype)
        row["nats_per_token"] = nll.mean().item()
        row["perplexity"] = float(np.exp(row["nats_per_token"]))
        row["bits_per_byte"] = nll.sum().item() / math.log(2) / n_bytes
        row["tokens"] = nll.numel()
        row["largest_change"] = (nll - plain).abs().max().item()
    return rows


def shift_figures(rows: list[dict]) -> list[dict]:
    """What was measured, in the short form that tables read."""
    names = ("offset", "nats_per_token", "largest_change")
    return [{name: row[name] for name in names} for row in rows if "reason" not in row]


@torch.no_grad()
def why_not_shifted(model: Model) -> str | None:
    """Why a model's positions cannot be shifted; None where they can."""
    if not isinstance(model, GPT):
        return "positions are shifted in runs of train.py, not in models of transformers"
    pos = model.config.pos
    if "wpe" in model.transformer:
        return f"{label(pos)} adds absolute positions to the embeddings; rope has positions to shift"
    here, there = queries_and_keys(model, 0), queries_and_keys(model, 997)
    if all(torch.equal(a, b) for a, b in zip(here, there)):
        return f"{label(pos)} has no positions that could be shifted, as rope has"
    return None


@torch.no_grad()
def queries_and_keys(model: GPT, offset: int) -> list[torch.Tensor]:
    """q and k of every layer, with their positions, for a few tokens of which the first is at `offset`."""
    found, before = [], model.attend

    def attend(scheme, q, k, *rest):
        found.extend((q, k))
        return before(scheme, q, k, *rest)

    with attending(model, attend):
        model.hidden(torch.zeros(1, 4, dtype=torch.int64, device=model.lm_head.weight.device), offset=offset)
    return found


def losses_of_parts(model: GPT, parts: list[np.ndarray], offset: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([losses(model, part, offset, dtype) for part in parts])


@torch.no_grad()
def losses(model: GPT, text: np.ndarray, offset: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """NLL (B, T), float64 on the CPU, of each token of text (B, T + 1) but the first, whose position is `offset`."""
    device = model.lm_head.weight.device
    x, y = (torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in (text[:, :-1], text[:, 1:]))
    with autocast(device, dtype):
        h = model.hidden(x, offset=offset)  # (B, T, C)
        return linear_nll(h, model.lm_head.weight, y).cpu().double()
