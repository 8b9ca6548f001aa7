"""Tables of a sweep in Markdown and LaTeX with their figure, many evaluations as one CSV, or all studies as one page.

    python scripts/report.py runs/mine                         # table.md, table.tex, figure.png there
    python scripts/report.py results/mine                      # README.md, table.tex, figure.png there
    python scripts/report.py --csv all.csv runs/*/eval/*.json  # a line for each row of each report; - for the terminal
    python scripts/report.py --csv all.csv results/mine        # the reports of all runs of a folder
    python scripts/report.py results --html all.html           # a page for a browser; opens offline, needs plotly

Figures are means over seeds. Differences are paired: the same data order, the same shared initial weights, the same
tokens. The CSV has the fields of the run that differ, so it can be grouped by them.
"""

import argparse
import io
import sys
from pathlib import Path

import _root

from data.shards import as_path, given_path, output
from nanope.files import write_atomically
from nanope.study.export import write_csv
from nanope.study.page import write_page
from nanope.study.report import write


def save_csv(out: str, paths: list[Path]) -> None:
    """Write the CSV of reports to a file, or - for the terminal: only once all of them are read."""
    if Path(out).suffix == ".json" or Path(out).resolve() in [path.resolve() for path in paths]:
        raise ValueError(f"--csv {out} would overwrite a report: name the CSV first, then the reports")
    text = io.StringIO(newline="")
    write_csv(paths, text)
    if out == "-":
        output(text.getvalue().removesuffix("\r\n"))
    else:
        write_atomically(Path(out), lambda file: file.write(text.getvalue().encode()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=as_path,
        help="a folder of runs or results; for --csv reports of eval.py too; for --html a folder of such folders too",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--csv", type=given_path, metavar="OUT", help="write this file, or - for the terminal, and no tables"
    )
    instead.add_argument("--html", type=as_path, metavar="FILE", help="write this page of all studies, and no tables")
    args = parser.parse_args(arguments)
    if len(args.paths) > 1 and not (args.csv or args.html):
        parser.error("tables are of one folder; --csv OUT takes several reports, --html FILE several folders")
    try:
        if args.csv:
            save_csv(args.csv, args.paths)
        elif args.html:
            studies = write_page(args.html, args.paths)
            output(f"{args.html}: {studies} studies, {args.html.stat().st_size / 1e6:.1f} MB")
        else:
            output(write(args.paths[0]))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
