"""Tables of a sweep in Markdown and LaTeX with their figure, or many evaluations as one CSV.

    python scripts/report.py runs/mine                         # table.md, table.tex, figure.png there
    python scripts/report.py results/mine                      # README.md, table.tex, figure.png there
    python scripts/report.py --csv all.csv runs/*/eval/*.json  # a line for each row of each report; - for the terminal
    python scripts/report.py --csv all.csv results/mine        # the reports of all runs of a folder

Figures are means over seeds. Differences are paired: the same data order, the same shared initial weights, the same
tokens. The CSV has the fields of the run that differ, so it can be grouped by them.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import _root

from nanope.study.export import write_csv
from nanope.study.report import write


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, help="a folder of runs or results; for --csv reports of eval.py too"
    )
    parser.add_argument("--csv", metavar="OUT", help="write this file, or - for the terminal, and no tables")
    args = parser.parse_args(arguments)
    if len(args.paths) > 1 and not args.csv:
        parser.error("tables are of one folder; --csv OUT takes several reports")
    try:
        if args.csv:
            to_terminal = contextlib.nullcontext(sys.stdout)
            with to_terminal if args.csv == "-" else open(args.csv, "w", newline="") as file:
                write_csv(args.paths, file)
        else:
            print(write(args.paths[0]))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
