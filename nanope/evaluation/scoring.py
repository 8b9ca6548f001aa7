"""What a model makes of given tokens: negative log-likelihoods in nats, and whether the likeliest token was right.

No logits of a whole window exist at any time. Every figure is the same for any number of ranks.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.shards import Split
from model import GPT
from nanope.attention import kernel
from nanope.distributed import Ranks, autocast
from nanope.evaluation.models import Model, why_not
from nanope.evaluation.protocols import Windows
from nanope.loss import chunk_rows, exact_product, scoring_dtype
from nanope.ops import by_onednn, kind_of, no_autocast, wide

BLOCK = 128  # tokens of a block of FlexAttention


@dataclass(frozen=True)
class Compute:
    """How forward passes run: `batch_tokens` input tokens each or one window, with autocast to `dtype`, shared by
    ranks."""

    batch_tokens: int = 4096
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    ranks: Ranks = field(default_factory=Ranks)
    tf32: bool = False  # products in float32 are in TF32, on a GPU

    @property
    def silent(self) -> bool | None:
        """tqdm's `disable`: other ranks show no progress, nor does the first where there is no terminal."""
        return None if self.ranks.main else True

    def conditions(self, model: Model, lengths: list[int]) -> dict:
        """What figures at these lengths may depend on beyond the model and the tokens, for a report."""
        return {
            "dtype": "tf32" if self.tf32 else str(self.dtype).removeprefix("torch."),
            "device": str(model.lm_head.weight.device),
            "backend": kernels(model, self.dtype, lengths),
            "batch_tokens": self.batch_tokens,
            "ranks": self.ranks.world,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def kernels(model: Model, dtype: torch.dtype, lengths: list[int]) -> str:
    """The kernels of attention at each of some lengths, as one text; without the lengths where all have the same."""
    if not isinstance(model, GPT):
        return "transformers, scaled_dot_product_attention"
    at = {}
    for length in lengths:
        at.setdefault(kernel(model, dtype, whole_blocks(model, length), training=False), []).append(str(length))
    return "; ".join(name if len(at) == 1 else f"{name} at {', '.join(found)}" for name, found in at.items())


def whole_blocks(model: Model, length: int) -> int:
    """How many tokens a window of `length` is given to the model as. On CUDA windows are filled up behind their end to
    one of few sizes, where the scheme can do it: no causal model notices, kernels like such sizes, and each other size
    would be compiled. They are powers of 2 from 16 on, then multiples of a block of attention, and beyond 1,024 tokens
    four between two powers of 2."""
    power = 1 << (length - 1).bit_length()
    block = max(16, min(power, BLOCK), power // 8)
    blocks = -(-length // block) * block
    fill = isinstance(model, GPT) and kind_of(model.lm_head.weight.device) == "cuda" and why_not(model, blocks) is None
    return blocks if fill else length


@torch.no_grad()
def score_head(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL in nats and whether the likeliest token is the target: h (n, C), weight (V, C), targets (n,) → (n,) float32
    (h's dtype if wider) and (n,) bool. Logits exist for a chunk of rows at a time."""
    dtype, exact = scoring_dtype(h), wide(h.dtype)
    rows = chunk_rows(weight.size(0), h.device)
    nll = torch.empty(len(h), dtype=exact, device=h.device)
    hits = torch.empty(len(h), dtype=torch.bool, device=h.device)
    with no_autocast(h.device):
        head = weight.to(dtype)
        buffer = None
        if dtype == h.dtype and by_onednn(h):  # at full speed with half of the rows, and it holds packed copies
            rows = max(1, rows // 2)
        elif dtype == exact:  # one buffer for all chunks: new memory is slow
            buffer = torch.empty(min(rows, len(h)), len(head), dtype=dtype, device=h.device)
        for i in range(0, len(h), rows):
            part = slice(i, i + rows)
            target = targets[part]
            x = h[part].to(dtype)
            if buffer is None:
                logits = exact_product(x, head)  # (rows, V)
            else:
                logits = torch.mm(x, head.t(), out=buffer[: len(target)])
            peak, ours = logits.amax(1), logits.gather(1, target[:, None]).squeeze(1)
            hits[part] = ours == peak
            # Right, or one of several that are equally likely: then the first of them counts
            level = hits[part].nonzero().squeeze(1)
            hits[i + level] = logits[level].argmax(1) == target[level]
            nll[part] = logits.sub_(peak[:, None]).exp_().sum(1).log() + (peak - ours)
    return nll, hits


@torch.no_grad()
def score_tokens(
    model: Model, tokens: np.ndarray, scored: np.ndarray, dtype: torch.dtype = torch.float32
) -> tuple[np.ndarray, np.ndarray]:
    """NLL and hits of the last `scored` (B,) tokens of each row of tokens (B, L+1), row by row: (Σ scored,) float64
    and bool."""
    size = tokens.shape[1] - 1
    keep = torch.arange(size) >= size - torch.from_numpy(scored)[:, None]  # (B, L)
    return score_kept(model, tokens, keep, dtype)


@torch.no_grad()
def score_kept(
    model: Model, tokens: np.ndarray, keep: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[np.ndarray, np.ndarray]:
    """NLL and hits of the targets of tokens (B, L+1) that `keep` (B, L) names, row by row: (kept,) float64 and bool."""
    device = model.lm_head.weight.device
    tokens = torch.from_numpy(tokens)
    with autocast(device, dtype):
        inputs = F.pad(tokens[:, :-1], (0, whole_blocks(model, keep.size(1)) - keep.size(1)))
        h = model.hidden(inputs.to(device))[:, : keep.size(1)]  # (B, L, C)
        nll, hits = score_head(h[keep.to(device)], model.lm_head.weight, tokens[:, 1:][keep].to(device))
    return nll.cpu().double().numpy(), hits.cpu().numpy()


def score(
    model: Model, split: Split, windows: Windows, compute: Compute, label: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """NLL in nats and hits of every scored token, in the order of `windows.targets()`: (tokens,) float64 and bool, on
    every rank. The batches are the same for any number of ranks, and so is each figure."""
    edges = np.concatenate(([0], np.cumsum(windows.scored)))
    found = np.zeros((2, edges[-1]))
    total, ranks = int(windows.size.sum()), compute.ranks
    with tqdm(total=total, desc=label, unit="token", unit_scale=True, disable=compute.silent) as progress:
        for number, part in enumerate(windows.batches(compute.batch_tokens)):
            if number % ranks.world == ranks.rank:
                tokens = read_windows(split, windows.start[part], int(windows.size[part[0]]))
                where = np.concatenate([np.arange(edges[i], edges[i + 1]) for i in part])
                found[:, where] = score_tokens(model, tokens, windows.scored[part], compute.dtype)
            progress.update(int(windows.size[part].sum()))
    nll, hits = sum_over_ranks(found, model, ranks)
    return nll, hits > 0


def read_windows(split: Split, starts: np.ndarray, size: int) -> np.ndarray:
    """Inputs and the last target of windows of one size: (B, size + 1) int64."""
    return np.stack([split.read(start, start + size + 1) for start in starts.tolist()])


def sum_over_ranks(values: np.ndarray, model: Model, ranks: Ranks) -> np.ndarray:
    """The sum of each rank's values, on every rank."""
    if ranks.world == 1:
        return values
    return ranks.sum(torch.from_numpy(values).to(model.lm_head.weight.device)).cpu().numpy()
