"""Reproduce a paper's table: train its set-up with the controls that it lacks, and print its figures beside the
measured ones.

    python scripts/reproduce.py crope-2 --scale cpu --source novels98.jsonl.xz   # a stated reduction: 3 hours, 2 cores
    python scripts/reproduce.py carope-1 --ranks 8                               # the paper's set-up on 8 GPUs
    python scripts/reproduce.py crope-1 --plan --price_per_hour 2.5              # what it would take
    python scripts/reproduce.py crope-2 --from results/crope-2                   # the tables again, from the results

It is scripts/sweep.py TABLE, with all its options: kill it anywhere, the same command goes on. The grid file,
configs/sweeps/TABLE.yaml, holds the paper's set-up, its figures, and every decision where the paper leaves one open.
"""

import _root

from nanope.study.sweep import main

TABLES = {
    "crope-1": "CRoPE, table 1: PG-19, WikiText-2, Penn Treebank",
    "crope-2": "CRoPE, table 2: batch, length, width and decay",
    "carope-1": "CARoPE, table 1: perplexity at the training length and beyond",
    "cable-4": "CABLE, table 4: perplexity to 15 times the training length",
    "carope-throughput": "CARoPE's speed of training",
    "comrope-text": "ComRoPE on text: kinds, block sizes, shift invariance, cost",
}

if __name__ == "__main__":
    lines = [f"  {name}: {what}" for name, what in TABLES.items()]
    main("scripts/reproduce.py", "\n".join([__doc__, "tables:", *lines]), TABLES)
