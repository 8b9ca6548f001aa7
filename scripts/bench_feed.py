"""How fast training's batches can be read, beside how fast they are used.

    python scripts/bench.py feed --data_dir data/fineweb-edu-gpt2 [--block_size 1024 --batch_tokens 524288 …]

Reads batches of a run as train.py does (windows all over the shards, in the order of the data seed, one batch ahead), and nothing
else. Files that fit memory are read from it after the first time: for a disk, take a folder larger than memory, or drop its cache.
"""

import statistics
import sys
import time

import _root

from data.shards import open_data
from nanope.config import check, parse
from nanope.distributed import Ranks, pick_device
from nanope.feed import Feed
from nanope.optim import resolve_batch

ROUNDS, TOKENS = 7, 2**21  # a round reads at least so many tokens


def main(arguments: list[str] | None = None) -> None:
    config = parse(arguments)
    try:
        check(config)
        split = open_data(config.data_dir).split("train")
        share, micro = resolve_batch(config, Ranks())
        feed = Feed(split, config, share, micro, Ranks(), pick_device(config.device))
        steps, speeds = -(-TOKENS // config.batch_tokens), []
        list(feed.batches(0))
        for round_ in range(ROUNDS):
            start = time.perf_counter()
            for step in range(1 + round_ * steps, 1 + (round_ + 1) * steps):
                for _ in feed.batches(step):
                    pass
            speeds.append(steps * config.batch_tokens / (time.perf_counter() - start))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    feed.close()
    print(
        f"{config.data_dir}, {len(split):,} tokens, windows of {config.block_size}, {micro} at a time: {statistics.median(speeds) / 1e6:.1f} M tokens/s "
        f"({min(speeds) / 1e6:.1f} … {max(speeds) / 1e6:.1f} over {ROUNDS} rounds) by one process"
    )


if __name__ == "__main__":
    main()
