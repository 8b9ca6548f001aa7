"""What data becomes for the model: batches to train on, rows to validate on, and samples of text back from it.

A row is block_size inputs with their targets. Of text it is a window of the split's stream, and every token is a
target. Of a task it is an example, padded, and its answer alone is: other targets are -1.
"""

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data.shards import Data, DataError, Split, WindowOrder, batch
from data.tokenizer import load_tokenizer
from model import GPT
from nanope.config import RunConfig
from nanope.distributed import Ranks, autocast, pinned, to_device
from nanope.run_folder import Stop


class TextRows:
    """Rows of text, named by their first tokens in the split."""

    def __init__(self, split: Split, config: RunConfig):
        self.split, self.block_size = split, config.block_size
        self.order = WindowOrder(len(split), config.block_size, config.data_seed, config.data_order)
        self.total = (len(split) - 1) // config.block_size  # windows that do not overlap

    def items(self, first: int, count: int) -> np.ndarray:
        """Rows first … first+count-1 of the training order: (count,) int64."""
        return self.order.starts(first, count)

    def spread(self, count: int) -> np.ndarray:
        """`count` rows, spread evenly over the split."""
        return self.block_size * (np.arange(count) * self.total // count)

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return batch(self.split, rows, self.block_size)

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """How many targets each row has: (n,) int64."""
        return np.full(len(rows), self.block_size)

    def starts(self, rows: np.ndarray) -> np.ndarray:
        """The first token of each."""
        return rows


class TaskRows:
    """Rows of a task, examples named by their numbers. DataError for an example that is longer than a row, or without
    an answer."""

    def __init__(self, split: Split, config: RunConfig):
        self.split, self.block_size = split, config.block_size
        self.start, self.length = split.documents().T  # without end-of-text, which is at start + length
        self.total = len(self.start)
        self.order = WindowOrder(self.total + 1, 1, config.data_seed, config.data_order)  # of numbers
        # All of them, 3 bytes a token: examples are short, and to read them one by one is slow
        self.tokens, self.mask = split.read(0, len(split)).astype(split.dtype), split.read_mask(0, len(split))
        self.answers = np.add.reduceat(self.mask, self.start, dtype=np.int64)
        if (longest := self.length.max()) > self.block_size:
            raise DataError(
                f"block_size {self.block_size} is shorter than the longest example of {config.data_dir}, which has "
                f"{longest} tokens: take block_size {longest} or more"
            )
        if not self.answers.all():
            which = int(np.argmin(self.answers))
            raise DataError(
                f"{config.data_dir}: example {which} has no answer: its mask has no target; prepare it again"
            )

    def items(self, first: int, count: int) -> np.ndarray:
        return self.order.starts(first, count)

    def spread(self, count: int) -> np.ndarray:
        return np.arange(count) * self.total // count

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs x, with end-of-text behind an example, and targets y, -1 where there is none: (n, T) int64 each."""
        length, step = self.length[rows, None], np.arange(self.block_size)
        inside, at = step < length, self.start[rows, None] + np.minimum(step, length - 1)
        x, y = (self.tokens[places].astype(np.int64) for places in (at, at + 1))
        return np.where(inside, x, self.split.eot), np.where(inside & self.mask[at + 1], y, -1)

    def targets(self, rows: np.ndarray) -> np.ndarray:
        return self.answers[rows]

    def starts(self, rows: np.ndarray) -> np.ndarray:
        return self.start[rows]


def rows_of(split: Split, config: RunConfig) -> TextRows | TaskRows:
    """The rows of a split. DataError where it has too little text for one."""
    return (TaskRows if split.masked else TextRows)(split, config)


def check_splits(data: Data, config: RunConfig) -> None:
    """ValueError where a split is missing, or cannot be cut into rows."""
    rows_of(data.split("train"), config)
    data.split("val")


class Feed:
    """The batches of this rank in their order. A thread reads each one while the one before is in use.

    A step has share · world rows: those of rank r are the r-th part, `share` long, in micro-batches of `micro`.
    """

    def __init__(self, split: Split, config: RunConfig, share: int, micro: int, ranks: Ranks, device: torch.device):
        self.split, self.ranks, self.device = split, ranks, device
        self.share, self.micro = share, micro
        self.rows = rows_of(split, config)
        on_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else ()
        self.thread = ThreadPoolExecutor(1, "batches", *on_device)
        self.number, self.ahead = None, None  # of the micro-batch that is being read, counted from the run's first

    def items(self, number: int) -> np.ndarray:
        """The rows of a micro-batch: (micro,) int64."""
        step, i = divmod(number, self.share // self.micro)
        return self.rows.items((step * self.ranks.world + self.ranks.rank) * self.share + i * self.micro, self.micro)

    def weight(self, number: int, items: np.ndarray) -> float:
        """The part of the step's loss that is a micro-batch's, times the ranks, over which gradients are averaged: the
        loss of a step is the mean over all of its targets, however they lie in micro-batches and ranks."""
        if isinstance(self.rows, TextRows):
            return self.micro / self.share
        whole = self.share * self.ranks.world
        step = self.rows.items(number // (self.share // self.micro) * whole, whole)
        return float(self.rows.targets(items).sum() * self.ranks.world / self.rows.targets(step).sum())

    def read(self, number: int) -> tuple[list[torch.Tensor], float]:
        items = self.items(number)
        arrays = self.rows.read(items)
        return [pinned(torch.from_numpy(a), self.device) for a in arrays], self.weight(number, items)

    def batches(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """x and y, (micro, T) int64 each on the device, and the weight of their mean loss, of the micro-steps of a
        step. DataError where a shard is damaged."""
        count = self.share // self.micro
        for number in range(step * count, (step + 1) * count):
            tensors, weight = self.ahead.result() if number == self.number else self.read(number)
            self.number, self.ahead = number + 1, self.thread.submit(self.read, number + 1)
            yield *(t.to(self.device, non_blocking=True) for t in tensors), weight

    def describe(self, step: int, parts: list[int]) -> str:
        """Where the rows of some micro-steps of a step lie: shard, and offset in tokens."""
        count = self.share // self.micro
        items = [  # in the thread, which alone uses the order
            self.thread.submit(self.items, step * count + part).result() for part in parts
        ]
        places = [self.split.locate(int(s)) for s in self.rows.starts(np.concatenate(items))]
        shown = ", ".join(f"{file.name} at token {offset}" for file, offset in places[:8])
        return shown + (" …" if len(places) > 8 else "")

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)


def diverged(step: int, rate: float, losses: list[torch.Tensor], bad_steps: int, feed: Feed, config: RunConfig) -> str:
    """What to say when `bad_steps` steps in a row up to `step` had a loss or gradient that is not finite. `losses` are
    those of this rank's micro-steps in the last of them."""
    bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss.item())]
    what = "micro-batches whose loss is not finite" if bad else "all rows of the step"
    places = feed.describe(step - 1, bad or list(range(len(losses))))
    return (
        f"{bad_steps} steps in a row up to step {step} had a loss or gradient that is not finite (learning rate "
        f"{rate:.3g}; rank {feed.ranks.rank}, {what}: rows at {places}). Lower learning_rate, or look at the data "
        f"there (python data/show.py {config.data_dir})"
    )


class Validation:
    """Mean loss on fixed rows of the validation split, divided among ranks and summed in float64. Draws nothing.

    together: every rank takes part in each forward pass, as a model that is divided over them needs.
    """

    def __init__(
        self,
        split: Split,
        config: RunConfig,
        at_a_time: int,
        ranks: Ranks,
        device: torch.device,
        together: bool = False,
    ):
        if len(split) <= config.block_size and not split.masked:
            raise ValueError(
                f"the val split of {config.data_dir} has {len(split)} tokens, "
                f"fewer than one window of {config.block_size} + 1"
            )
        self.rows = rows_of(split, config)
        count = max(1, min(self.rows.total, config.eval_tokens // config.block_size))
        items = self.rows.spread(count)
        self.items, self.first = items[ranks.rank :: ranks.world], items[:1]
        self.longest = len(items[:: ranks.world]) if together else len(self.items)  # share of a rank
        self.at_a_time, self.ranks, self.device, self.together = at_a_time, ranks, device, together
        self.one_shape = config.compile

    @torch.no_grad()
    def loss(self, model: GPT, dtype: torch.dtype, stop: Stop | None = None) -> float | None:
        """Nats per token, the same on every rank. None where a rank was told to stop meanwhile: a validation may take
        longer than a scheduler waits. stop.agreed then holds the signal, on every rank."""
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for i in range(0, self.longest, self.at_a_time):
            if stop and self.stopped(stop):
                break
            items = self.items[i : i + self.at_a_time]
            x, y = self.rows.read(items if len(items) else self.first)
            if self.one_shape:  # a shorter last batch would be compiled for itself
                missing = self.at_a_time - len(x)
                x, y = np.pad(x, ((0, missing), (0, 0))), np.pad(y, ((0, missing), (0, 0)), constant_values=-1)
            x, y = to_device((x, y), self.device)
            with autocast(self.device, dtype):
                _, nll = model(x, y, reduction="none")
            if len(items):
                count = int(self.rows.targets(items).sum())
                total += torch.tensor([nll.cpu().double().sum(), count], dtype=torch.float64)
        model.train()
        total = torch.cat((total, torch.tensor(stop.flags() if stop else [], dtype=torch.float64)))
        nll, count, *flags = self.ranks.sum(total.to(self.device) if self.device.type == "cuda" else total).tolist()
        if any(flags):
            stop.agree(flags)
            return None
        return nll / count

    def stopped(self, stop: Stop) -> bool:
        """Whether this rank was told to stop, or any where all take part."""
        told = bool(stop.received)
        return bool(self.ranks.max(torch.tensor(told, device=self.device).int())) if self.together else told


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
