"""The numbers of docs/theory.md, its tables and its figure.

    python scripts/theory.py --runs runs/theory                # results/theory/ and the tables of docs/theory.md
    python scripts/theory.py --runs runs/theory --out /tmp/t --page ""   # elsewhere, and no page

--runs is a folder of trained runs named by scheme, each made by

    python train.py --config configs/quickstart.yaml --pos NAME --out_dir runs/theory/NAME

Schemes without a run are named, and left out where a run is needed. What needs none is measured on tiny models.
"""

import argparse
import json
import sys
from pathlib import Path

import _root

from data.shards import as_path, given_path, output
from nanope import REPO
from nanope.files import write_atomically
from nanope.theory import measure
from nanope.theory_report import page_with, write_figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/theory.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--runs", type=as_path, required=True, help="a folder of runs, each named by its scheme")
    parser.add_argument("--data", type=given_path, help="the runs' data folder, where it is not where they say")
    parser.add_argument("--out", type=as_path, default=REPO / "results" / "theory", help="default: results/theory")
    parser.add_argument("--page", default=str(REPO / "docs" / "theory.md"), help="default: docs/theory.md; '' for none")
    args = parser.parse_args(arguments)
    if not args.runs.is_dir():
        parser.error(f"--runs {args.runs} is no folder")
    try:
        numbers = measure(args.runs, args.data, output)
        if numbers["missing"]:
            output(f"no run of {', '.join(numbers['missing'])} in {args.runs}: left out where one is needed")
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(numbers, indent=1, ensure_ascii=False) + "\n"
        write_atomically(args.out / "numbers.json", lambda file: file.write(text.encode()))
        if numbers["runs"]:
            write_figure(numbers, args.out)
        if args.page:
            page = page_with(Path(args.page).read_text(), numbers)
            write_atomically(Path(args.page), lambda file: file.write(page.encode()))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    output(f"wrote {args.out}" + (f" and {args.page}" if args.page else ""))


if __name__ == "__main__":
    main()
