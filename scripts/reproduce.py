"""Reproduce a paper's table: train its set-up with the controls that it lacks, and print its figures beside the measured ones.

    python scripts/reproduce.py crope-2 --scale cpu --source novels98.jsonl.xz     # a stated reduction, within 3 hours on 2 cores
    python scripts/reproduce.py carope-1 --ranks 8                                # the paper's set-up on 8 GPUs
    python scripts/reproduce.py crope-1 --plan --price_per_hour 2.5               # what it would take
    python scripts/reproduce.py crope-2 --from results/crope-2                    # tables and figure again, from collected files alone

It is scripts/sweep.py on configs/sweeps/TABLE.yaml, with all its options: kill it anywhere, the same command goes on. The grid
file holds the paper's set-up, its figures, and every decision where the paper leaves one open.
"""

import sys
from pathlib import Path

import _root
import report
import sweep

from nanope import REPO
from nanope.errors import nearest

TABLES = {
    "crope-1": "CRoPE, table 1: PG-19, WikiText-2, Penn Treebank",
    "crope-2": "CRoPE, table 2: batch, length, width and decay",
    "carope-1": "CARoPE, table 1: perplexity at the training length and beyond",
    "carope-throughput": "CARoPE's speed of training",
    "comrope-text": "ComRoPE on text: kinds, block sizes, shift invariance, cost",
}


def main() -> None:
    parser = sweep.parser_of(
        "scripts/reproduce.py",
        __doc__ + "\ntables:\n" + "\n".join(f"  {name}: {what}" for name, what in TABLES.items()),
    )
    parser.add_argument("table", metavar="TABLE", help=f"one of {', '.join(TABLES)}")
    parser.add_argument(
        "--from",
        dest="folder",
        type=Path,
        metavar="DIR",
        help="run nothing: make the tables of this folder of runs or results again",
    )
    args = parser.parse_args()
    if args.table not in TABLES:
        parser.error(f"no table {args.table!r}{nearest(args.table, TABLES)} (tables: {', '.join(TABLES)})")
    with sweep.exit_codes():
        if args.folder:
            print(report.write(args.folder))
            return
        path = REPO / "configs" / "sweeps" / f"{args.table}.yaml"
        if reduced := sweep.grid_of(path, args)[0].reduced:
            print(f"Reduced: {' '.join(reduced.split())}\n", flush=True)
        sys.exit(sweep.run(path, args, ["scripts/reproduce.py", args.table]))


if __name__ == "__main__":
    main()
