"""The optimizer, the arithmetic of batches, and the seeds of a step. The learning rate is schedule.py's."""

import hashlib
import random

import numpy as np
import torch

from model import GPT
from nanope.config import RunConfig
from nanope.distributed import Ranks, autocast
from nanope.errors import first_line
from nanope.schedule import learning_rate as learning_rate

# ---- the optimizer


def make_optimizer(model: GPT, config: RunConfig) -> torch.optim.AdamW:
    """AdamW in groups: matrices, with weight decay; vectors, without; the scheme's own undecayed parameters, without
    and with pos_lr_multiplier; and where config.pos_lr_matrices, its own matrices, with both. Every parameter is in
    exactly one group."""
    positional = model.position_parameters()
    groups = {"decayed": [], "plain": [], "positional": [], "own matrices": []}
    for name, parameter in model.named_parameters():
        kind = "positional" if name in positional else "decayed" if parameter.dim() >= 2 else "plain"
        if kind == "decayed" and config.pos_lr_matrices and ".attn.pos." in name:
            kind = "own matrices"
        groups[kind].append(parameter)
    decay, multiplier = config.weight_decay, config.pos_lr_multiplier
    made = [
        {"params": groups["decayed"], "weight_decay": decay, "lr_multiplier": 1.0},
        {"params": groups["plain"], "weight_decay": 0.0, "lr_multiplier": 1.0},
        {"params": groups["positional"], "weight_decay": 0.0, "lr_multiplier": multiplier},
        {"params": groups["own matrices"], "weight_decay": decay, "lr_multiplier": multiplier},
    ]
    return torch.optim.AdamW(
        made if config.pos_lr_matrices else made[:3],  # three, as checkpoints from before have them
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=next(model.parameters()).device.type in ("cuda", "cpu", "mps"),
    )


def step_seed(config: RunConfig, step: int, what: int | str) -> int:
    """The seed of what is drawn in a step, from (config.seed, step, what) alone, so that a resumed run draws the same.
    `what` is a rank's number for its dropout, and a name for what all ranks draw alike."""
    digest = hashlib.sha256(f"{config.seed}/{step}/{what}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_generators(seed: int) -> None:
    """Seed torch's, Python's and NumPy's generators, all that a scheme may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # it takes no larger one


# ---- batches


def resolve_batch(config: RunConfig, ranks: Ranks) -> tuple[int, int]:
    """(windows a step and rank, windows a forward pass). A micro_batch_size of auto counts as null here. ValueError,
    which lists what fits, where batch_tokens does not divide over the ranks and micro-batches."""
    windows = config.batch_tokens // config.block_size
    step = f"batch_tokens {config.batch_tokens} is {windows} windows of {config.block_size}"
    if windows % ranks.world:
        fits = ", ".join(map(str, divisors(windows)))
        raise ValueError(f"{step}, which do not divide over {ranks.world} ranks; these numbers of ranks do: {fits}")
    share = windows // ranks.world
    fits, micro = divisors(share), config.micro_batch_size
    if micro in (None, "auto"):
        micro = max([n for n in fits if n * config.block_size <= 16384] or [1])
    if micro not in fits:
        raise ValueError(
            f"{step}, {share} a rank: micro_batch_size {micro} does not divide them; "
            f"these do: {', '.join(map(str, fits))}"
        )
    return share, micro


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def largest_micro_batch(model: GPT, share: int, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> int:
    """The largest divisor of `share` (windows a step and rank) whose forward and backward pass fit the GPU's memory on
    every rank, with AdamW's moments and a tenth of the memory to spare. Divisors are tried in ascending order. Draws
    nothing, leaves no gradients. ValueError where not even one window fits."""
    T, fits = model.config.block_size, 0
    moments = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]  # AdamW makes them in the first step
    idx = torch.zeros(1, T, dtype=torch.int64, device=device)
    for micro in divisors(share):
        try:
            torch.cuda.reset_peak_memory_stats(device)
            with autocast(device, dtype):
                _, loss = model(idx.expand(micro, T).contiguous(), idx.expand(micro, T).contiguous())
            loss.backward()
            total = torch.cuda.get_device_properties(device).total_memory
            if micro > 1 and torch.cuda.max_memory_reserved(device) > 0.9 * total:
                break
            fits = micro
        except torch.OutOfMemoryError:
            break
        finally:
            loss = None
            model.zero_grad(set_to_none=True)
    del moments
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)  # so that the run's peak is its own
    fits = -int(ranks.max(torch.tensor(-fits, device=device)))  # the least of all ranks
    if not fits:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"not even one window of {T} tokens fits the memory of {name}: take a smaller model or block_size"
        )
    return fits


def out_of_memory(error: Exception, config: RunConfig, share: int, device: torch.device) -> str:
    """What to say when the memory was too small for a run with config.micro_batch_size of `share` windows at a time."""
    micro = config.micro_batch_size
    smaller = [n for n in divisors(share) if n < micro]
    advice = "take a smaller model or block_size, or more ranks"
    if smaller:
        half = max(smaller, key=lambda n: (n <= micro // 2, n))  # the largest of at most half
        advice = f"try --micro_batch_size {half}" + (", or --micro_batch_size auto" if device.type == "cuda" else "")
    return (
        f"out of memory at micro_batch_size {micro} ({micro} windows of {config.block_size} tokens) on {device}: "
        f"{advice}; the result does not depend on it. train.py --plan estimates the memory ({first_line(error)})"
    )
