"""How fast training's batches can be read, beside how fast they are used.

    python scripts/bench.py feed --data_dir data/fineweb-edu-gpt2 [--block_size 1024 --batch_tokens 524288 …]

Reads batches of a run as train.py does: windows all over the shards, in the order of the data seed, one batch ahead.
It does nothing else. Files that fit memory are read from it after the first time: to measure a disk, take a folder
larger than memory, or drop its cache.
"""

import sys
import time

from data.shards import open_data, output
from nanope.bench.turns import spread
from nanope.config import check, parse
from nanope.distributed import Ranks, pick_device
from nanope.feed import Feed
from nanope.optim import resolve_batch

ROUNDS, TOKENS = 7, 2**21  # a round reads at least so many tokens


def main(arguments: list[str]) -> None:
    config = parse(arguments)
    try:
        check(config)
        split = open_data(config.data_dir).split("train")
        share, micro = resolve_batch(config, Ranks())
        feed = Feed(split, config, share, micro, Ranks(), pick_device(config.device))
        list(feed.batches(0))  # warm-up
        steps, speeds = -(-TOKENS // config.batch_tokens), []
        for round_ in range(ROUNDS):
            start = time.perf_counter()
            for step in range(1 + round_ * steps, 1 + (round_ + 1) * steps):
                for _ in feed.batches(step):
                    pass
            speeds.append(steps * config.batch_tokens / (time.perf_counter() - start) / 1e6)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    feed.close()
    output(
        f"{config.data_dir}, {len(split):,} tokens, windows of {config.block_size}, {micro} at a time: "
        f"{spread(speeds, 1, ' M tokens/s', f' over {ROUNDS} rounds')} by one process"
    )
