"""Gather evaluations of many runs into one CSV: a line a row of each report, with the run's fields that differ.

python scripts/gather.py runs/*/eval/*.json --out all.csv
"""

import argparse
import contextlib
import csv
import json
import sys
from pathlib import Path

FIGURES = (
    "nats_per_token",
    "perplexity",
    "bits_per_byte",
    "accuracy",
    "recall",
    "tokens",
    "documents",
    "trials",
    "low",
    "high",
    "targets_sha256",
    "reason",
)


def lines_of(path: Path) -> list[dict]:
    """One flat mapping for each row of results, and of the probe, in a report of eval.py. ValueError for another file."""
    try:
        report = json.loads(path.read_text())
        rows = [*report["results"], *({"protocol": "probe", **p} for p in report.get("probe", ()))]
        about = {
            "report": str(path),
            "run": report.get("run") or report.get("model"),
            "step": report.get("step"),
            "pos": report["pos"],
        }
        about |= {f"config.{k}": v for k, v in report.get("config", {}).items()} | {
            "data_hash": report["data_hash"],
            "dtype": report["dtype"],
        }
        return [
            about
            | {k: row.get(k) for k in ("protocol", "length", "scaling", "factor")}
            | {"stride": report["stride"], "stream": report["stream"]}
            | {k: row.get(k) for k in FIGURES}
            | dict(zip(("low", "high"), row.get("interval") or (None, None)))
            for row in rows
        ]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no report of eval.py: {type(error).__name__} {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/gather.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("reports", nargs="+", type=Path, help="reports of eval.py")
    parser.add_argument("--out", type=Path, help="CSV to write (default: to the terminal)")
    args = parser.parse_args()
    try:
        lines = [line for path in args.reports for line in lines_of(path)]
        fields = list(dict.fromkeys(k for line in lines for k in line))
        same = {k for k in fields if k.startswith("config.") and len({json.dumps(line.get(k)) for line in lines}) == 1}
        with open(args.out, "w", newline="") if args.out else contextlib.nullcontext(sys.stdout) as file:
            writer = csv.DictWriter(file, [k for k in fields if k not in same])
            writer.writeheader()
            writer.writerows({k: v for k, v in line.items() if k not in same} for line in lines)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
