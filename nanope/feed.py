"""What data becomes for the model: batches to train on, windows to validate on, and samples of text back from it."""

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data.shards import Data, Split, WindowOrder, batch
from data.tokenizer import load_tokenizer
from model import GPT
from nanope.config import RunConfig
from nanope.distributed import Ranks, autocast, pinned, to_device
from nanope.run_folder import Stop


def check_splits(data: Data, config: RunConfig) -> None:
    """ValueError where the train split has too little text for a window, or where a split is missing."""
    WindowOrder(len(data.split("train")), config.block_size, config.data_seed)
    data.split("val")


class Feed:
    """The batches of this rank in their order. A thread reads each one while the one before is in use.

    A step has share · world windows: those of rank r are the r-th part, `share` long, in micro-batches of `micro`.
    """

    def __init__(self, split: Split, config: RunConfig, share: int, micro: int, ranks: Ranks, device: torch.device):
        self.split, self.block_size, self.ranks, self.device = split, config.block_size, ranks, device
        self.share, self.micro = share, micro
        self.order = WindowOrder(len(split), config.block_size, config.data_seed)
        on_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else ()
        self.thread = ThreadPoolExecutor(1, "batches", *on_device)
        self.number, self.ahead = None, None  # of the micro-batch that is being read, counted from the run's first

    def starts(self, number: int) -> np.ndarray:
        """First tokens of the windows of a micro-batch: (micro,) int64."""
        step, i = divmod(number, self.share // self.micro)
        return self.order.starts((step * self.ranks.world + self.ranks.rank) * self.share + i * self.micro, self.micro)

    def read(self, number: int) -> list[torch.Tensor]:
        arrays = batch(self.split, self.starts(number), self.block_size)
        return [pinned(torch.from_numpy(a), self.device) for a in arrays]

    def batches(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """x and y, (micro, T) int64 each on the device, of the micro-steps of a step. DataError where a shard is
        damaged."""
        count = self.share // self.micro
        for number in range(step * count, (step + 1) * count):
            tensors = self.ahead.result() if number == self.number else self.read(number)
            self.number, self.ahead = number + 1, self.thread.submit(self.read, number + 1)
            yield tuple(t.to(self.device, non_blocking=True) for t in tensors)

    def describe(self, step: int, parts: list[int]) -> str:
        """Where the windows of some micro-steps of a step lie: shard, and offset in tokens."""
        count = self.share // self.micro
        starts = [  # in the thread, which alone uses the order
            self.thread.submit(self.starts, step * count + part).result() for part in parts
        ]
        places = [self.split.locate(int(s)) for s in np.concatenate(starts)]
        shown = ", ".join(f"{file.name} at token {offset}" for file, offset in places[:8])
        return shown + (" …" if len(places) > 8 else "")

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)


def diverged(step: int, rate: float, losses: list[torch.Tensor], bad_steps: int, feed: Feed, config: RunConfig) -> str:
    """What to say when `bad_steps` steps in a row up to `step` had a loss or gradient that is not finite. `losses` are
    those of this rank's micro-steps in the last of them."""
    bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss.item())]
    what = "micro-batches whose loss is not finite" if bad else "all windows of the step"
    places = feed.describe(step - 1, bad or list(range(len(losses))))
    return (
        f"{bad_steps} steps in a row up to step {step} had a loss or gradient that is not finite (learning rate "
        f"{rate:.3g}; rank {feed.ranks.rank}, {what}: windows at {places}). Lower learning_rate, or look at the data "
        f"there (python data/show.py {config.data_dir})"
    )


class Validation:
    """Mean loss on fixed windows of the validation split, divided among ranks and summed in float64. Draws nothing."""

    def __init__(self, split: Split, config: RunConfig, rows: int, ranks: Ranks, device: torch.device):
        windows = (len(split) - 1) // config.block_size
        if windows < 1:
            raise ValueError(
                f"the val split of {config.data_dir} has {len(split)} tokens, "
                f"fewer than one window of {config.block_size} + 1"
            )
        count = max(1, min(windows, config.eval_tokens // config.block_size))
        starts = [config.block_size * (i * windows // count) for i in range(count)]  # evenly spread
        self.starts = starts[ranks.rank :: ranks.world]
        self.split, self.rows, self.block_size, self.ranks, self.device = split, rows, config.block_size, ranks, device

    @torch.no_grad()
    def loss(self, model: GPT, dtype: torch.dtype, stop: Stop | None = None) -> float | None:
        """Nats per token, the same on every rank. None where a rank was told to stop meanwhile: a validation may take
        longer than a scheduler waits. stop.agreed then holds the signal, on every rank."""
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for i in range(0, len(self.starts), self.rows):
            if stop and stop.received:
                break
            x, y = to_device(batch(self.split, self.starts[i : i + self.rows], self.block_size), self.device)
            with autocast(self.device, dtype):
                _, nll = model(x, y, reduction="none")
            total += torch.tensor([nll.cpu().double().sum(), nll.numel()], dtype=torch.float64)
        model.train()
        total = torch.cat((total, torch.tensor(stop.flags() if stop else [], dtype=torch.float64)))
        nll, count, *flags = self.ranks.sum(total.to(self.device) if self.device.type == "cuda" else total).tolist()
        if any(flags):
            stop.agree(flags)
            return None
        return nll / count


class Sampler:
    """Texts that the model writes, from a generator of their own, so that training goes on as if there were none."""

    def __init__(self, data: Data, config: RunConfig, device: torch.device, dtype: torch.dtype):
        self.tokenizer = load_tokenizer(data.manifest["tokenizer"]["name"])
        self.data, self.config, self.device, self.dtype = data, config, device, dtype

    def text(self, model: GPT, step: int, length: int = 64) -> str:
        """A text of at most `length` tokens, which follows from the weights and the step alone."""
        length = min(length, self.config.block_size)
        generator = torch.Generator(self.device).manual_seed(step)
        prompt = torch.full((1, 1), self.data.eot, dtype=torch.int64, device=self.device)
        # Compiled code would be compiled again for every length
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()
        with eager, autocast(self.device, self.dtype):
            ids = model.generate(prompt, length, top_k=50, generator=generator)[0, 1:].tolist()
        return self.tokenizer.decode([i for i in ids if i < self.data.vocab_size and i != self.data.eot])
