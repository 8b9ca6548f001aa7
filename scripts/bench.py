"""Benchmarks: speed and peak memory, in one interleaved run each.

    python scripts/bench.py [train]             # training: each scheme relative to rope, rope relative to other GPT-2s
    python scripts/bench.py eval                # evaluation by length, relative to a plain transformers loop
    python scripts/bench.py data --source …     # preparation of data, relative to tiktoken alone
    python scripts/bench.py feed --data_dir …   # reading of training's batches
    python scripts/bench.py bytes               # what compiled kernels move on a GPU, which need not be there
    python scripts/bench.py roofline            # an estimate of a GPU's speed from that

Each kind has a --help of its own, and a file of its name in nanope/bench/.
"""

import importlib
import sys

import _root  # noqa: I001

KINDS = ("train", "eval", "data", "feed", "bytes", "roofline")


def main() -> None:
    arguments = sys.argv[1:]
    kind = arguments.pop(0) if arguments[:1] and arguments[0] in KINDS else "train"
    importlib.import_module(f"nanope.bench.{kind}").main(arguments)


if __name__ == "__main__":
    main()
