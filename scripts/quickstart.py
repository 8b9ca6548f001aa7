"""Train the five schemes by one recipe, evaluate them far beyond the training length, print one table and draw one figure.

    make quickstart                    # or: python scripts/quickstart.py
    make quickstart ARGS="--seeds 3"
    make quickstart ARGS="--schemes rope alibi none"

It is scripts/sweep.py on configs/sweeps/quickstart.yaml, with all its options. Everything lies under runs/quickstart/: a folder a
run, logs/, table.md, figure.png. Interrupt it and start it again: runs that are finished are kept, the others continue.
"""

import sys

import _root
import sweep

from nanope import REPO


def main() -> None:
    parser = sweep.parser_of("scripts/quickstart.py", __doc__)
    parser.add_argument(
        "--schemes",
        dest="arms",
        nargs="+",
        metavar="SCHEME",
        help="schemes to compare (default: learned rope crope comrope carope)",
    )
    args = parser.parse_args()
    with sweep.exit_codes():
        sys.exit(sweep.run(REPO / "configs" / "sweeps" / "quickstart.yaml", args, ["scripts/quickstart.py"]))


if __name__ == "__main__":
    main()
