"""The optimizer, the arithmetic of batches, and the seeds of a step. The learning rate is schedule.py's."""

import hashlib
import random
import sys

import numpy as np
import torch

from model import GPT
from nanope.config import RunConfig
from nanope.costs import windows_that_fit
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
    """(windows a step and rank, windows a forward pass). A micro_batch_size of null or auto is at most 16,384 tokens
    here; gpu_micro_batch knows better. ValueError, which lists what fits, where batch_tokens does not divide over the
    ranks and micro-batches."""
    windows = config.batch_tokens // config.block_size
    step = f"batch_tokens {config.batch_tokens} is {windows} windows of {config.block_size}"
    if windows % ranks.world:
        fits = ", ".join(map(str, divisors(windows)))
        raise ValueError(f"{step}, which do not divide over {ranks.world} ranks; these numbers of ranks do: {fits}")
    share = windows // ranks.world
    fits, micro = divisors(share), config.micro_batch_size
    if micro in (None, "auto"):
        micro = max([n for n in fits if n * config.block_size <= USUAL_TOKENS] or [1])
    if micro not in fits:
        raise ValueError(
            f"{step}, {share} a rank: micro_batch_size {micro} does not divide them; "
            f"these do: {', '.join(map(str, fits))}"
        )
    return share, micro


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


# Tokens of a forward pass: on a CPU, and where it is not known what fits; on a GPU, where more gives hardly any speed
USUAL_TOKENS, MOST_TOKENS = 16384, 65536
USABLE = 0.93  # of a GPU's GiB, also in a plan: the rest is for CUDA's context and the allocator's gaps


def within(asked: str | None, share: int, block_size: int) -> list[int]:
    """What a micro_batch_size of null or auto may be on a GPU, ascending: divisors of `share`; for null of at most
    65,536 tokens."""
    return [n for n in divisors(share) if n == 1 or asked == "auto" or n * block_size <= MOST_TOKENS]


def gpu_micro_batch(
    config: RunConfig, model: GPT, share: int, ranks: Ranks, device: torch.device, dtype: torch.dtype
) -> int:
    """What a micro_batch_size of null or auto is on this GPU, the least of all ranks. null goes by the estimate of
    train.py --plan. auto tries whether that fits, and then its neighbours. ValueError where not even one window
    does."""
    limit = USABLE * torch.cuda.get_device_properties(device).total_memory
    sizes, divided = within(config.micro_batch_size, share, model.config.block_size), ranks.world if config.fsdp else 1
    try:
        found = max(1, windows_that_fit(model.config, sizes, dtype, limit, config.activation_checkpointing, divided))
    except RuntimeError as error:  # of a scheme from outside that looks at values, which fake tensors do not have
        found = resolve_batch(config, ranks)[1]
        if ranks.main:
            text = f"warning: what fits the GPU cannot be estimated with {model.config.pos}: {first_line(error)}"
            print(text, file=sys.stderr)
    if config.micro_batch_size == "auto":
        try:
            found = largest_micro_batch(model, share, found, device, dtype)
        except torch.OutOfMemoryError:  # gradients and moments alone
            found = 0
    found = -int(ranks.max(torch.tensor(-found, device=device)))
    if not found:
        raise ValueError(
            f"not even one window of {model.config.block_size} tokens fits the memory of "
            f"{torch.cuda.get_device_name(device)}: {without_smaller_batches(config)}"
        )
    return found


def largest_micro_batch(model: GPT, share: int, guess: int, device: torch.device, dtype: torch.dtype) -> int:
    """The largest divisor of `share` (windows a step and rank) whose forward and backward pass fit the GPU's memory
    beside gradients and AdamW's moments, with a tenth of the memory to spare; 0 where none does. `guess`, a divisor, is
    tried first, and from there each next one. Draws nothing, leaves no gradients."""
    sizes = divisors(share)
    held = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]  # AdamW makes them in the first step
    for p in model.parameters():  # they lie there from a step's second pass on, and with several ranks always
        p.grad = torch.zeros_like(p)
    i = sizes.index(guess)
    if pass_fits(model, sizes[i], device, dtype):
        while i + 1 < len(sizes) and pass_fits(model, sizes[i + 1], device, dtype):
            i += 1
    else:
        i -= 1
        while i >= 0 and not pass_fits(model, sizes[i], device, dtype):
            i -= 1
    del held
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)  # so that the run's peak is its own
    return sizes[i] if i >= 0 else 0


def pass_fits(model: GPT, micro: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one forward and backward pass over `micro` windows fits the GPU's memory; more than one with a tenth to
    spare."""
    idx = torch.zeros(micro, model.config.block_size, dtype=torch.int64, device=device)
    torch.cuda.empty_cache()  # what other sizes left behind is not this one's
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with autocast(device, dtype):
            _, loss = model(idx, idx)
        loss.backward()
    except torch.OutOfMemoryError:
        return False
    total = torch.cuda.get_device_properties(device).total_memory
    return micro == 1 or torch.cuda.max_memory_reserved(device) <= 0.9 * total


def out_of_memory(error: Exception, config: RunConfig, share: int | None, device: torch.device) -> str:
    """What to say when the memory was too small for a run with config.micro_batch_size of `share` windows at a time, or
    with None for the model alone."""
    estimated = f"train.py --plan estimates the memory ({first_line(error)})"
    if share is None:
        ways = "take a smaller model" + ", or --fsdp true on several ranks" * (not config.fsdp)
        return f"out of memory on {device} for the model alone: {ways}. {estimated}"
    micro = config.micro_batch_size
    smaller = [n for n in divisors(share) if n < micro]
    if smaller:
        half = max(smaller, key=lambda n: (n <= micro // 2, n))  # the largest of at most half
        auto = device.type == "cuda" and not config.fsdp
        advice = f"try --micro_batch_size {half}" + (", or --micro_batch_size auto" if auto else "")
    else:
        advice = without_smaller_batches(config)
    return (
        f"out of memory at micro_batch_size {micro} ({micro} windows of {config.block_size} tokens) on {device}: "
        f"{advice}{'' if config.dropout else '; the result does not depend on it'}. {estimated}"
    )


def without_smaller_batches(config: RunConfig) -> str:
    """What to try where the memory is too small for one window."""
    ways = [] if config.activation_checkpointing else ["--activation_checkpointing true"]
    ways += [] if config.fsdp else ["--fsdp true on several ranks"]
    return f"try {', or '.join(ways)}" if ways else "take a smaller model or block_size, or more ranks"
