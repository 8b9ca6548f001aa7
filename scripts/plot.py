"""Figures of a sweep, or of evaluation reports.

    python scripts/plot.py results/mine --out figure.pdf                        # the paper's figure: length difference
    python scripts/plot.py runs/mine --out curves.png --panels loss position    # others, by name
    python scripts/plot.py runs/*/eval/REPORT.json --out overlay.png            # one report of eval.py, or several
    python scripts/plot.py REPORT.json --out looks.pdf --panels attention needle

length      perplexity or nats against context length, the same targets where the grid asked for them
difference  paired differences from the baseline, with their 95 % intervals
loss        validation loss against tokens
accuracy    exact matches against the length of a task's examples, a panel a setting
position    nats by position in the window
parameters  final validation loss against the number of parameters
speed       final validation loss against the speed of training relative to rope's, where the grid has `throughput`
attention   attention weights against distance, of evaluations with --attention
needle      recall by depth of the key and context length, of evaluations with --probe

Means and intervals are those of the tables. Bands would cover each other, so only the baseline has one, and up to two
arms that end below it beyond noise, the lowest ones. An arm far outside the others' range stands at the edge, with an
arrow and its value.
"""

import argparse
import sys
from pathlib import Path

import _root

from data.shards import as_path
from nanope.study.export import reports_of
from nanope.study.figures import draw, draw_reports
from nanope.study.panels import PANELS
from nanope.study.results import Study


def draw_files(paths: list[Path], out: Path, protocol: str, panels: list[str] | None) -> None:
    """Draw reports of eval.py. ValueError for what is none."""
    reports = dict(pair for path in paths for pair in reports_of(path))
    for name, report in reports.items():
        if not isinstance(report, dict):
            raise ValueError(f"{name} is no report of eval.py: it holds {report!r:.40}")
    try:
        draw_reports([*reports.values()], out, protocol, panels)
    except (TypeError, AttributeError) as error:
        what = f"{type(error).__name__} {error}"
        raise ValueError(f"not all of {', '.join(reports)} are reports of eval.py: {what}") from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/plot.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="+", type=as_path, help="a folder of runs or of results, or reports of eval.py")
    parser.add_argument("--out", type=as_path, required=True, help="image to write (.png, .pdf, .svg)")
    parser.add_argument(
        "--panels",
        nargs="+",
        choices=PANELS,
        help="see above; of reports length, position, accuracy, attention, needle (default: length difference, of "
        "reports the first three)",
    )
    parser.add_argument(
        "--protocol", default="same-targets", help="of reports: what is shown by length (default: same-targets)"
    )
    args = parser.parse_args()
    try:
        first = args.paths[0]
        if len(args.paths) == 1 and not (first.is_file() or first.suffix == ".json"):
            draw(Study.read(first), args.out, args.panels)
        else:
            draw_files(args.paths, args.out, args.protocol, args.panels)
    except KeyError as error:
        sys.exit(f"error: a report lacks {error}: is it one of eval.py?")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
