"""Draw evaluations: perplexity against context length, and nats by position in the context, of one run or of several.

python scripts/plot_eval.py runs/mine/eval/REPORT.json --out figure.png
python scripts/plot_eval.py runs/*/eval/REPORT.json --out overlay.png
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter, ScalarFormatter
from plot import STYLES, write

LINES = {"none": "-", "pi": ":", "ntk": "--", "yarn": "-."}


def label_of(report: dict, reports: list[dict]) -> str:
    """The scheme where that tells the reports apart, else the run's name."""
    name = Path(report.get("run") or report["model"]).name
    return report["pos"] if len({r["pos"] for r in reports}) == len(reports) else name


def draw(reports: list[dict], out: Path, protocol: str) -> None:
    """Left: perplexity by `protocol` against length, both logarithmic, bars the 95 % interval over documents. Right, where a
    report has the protocol per-position: nats by tokens of context, in bins, bands the interval."""
    curves = any(r.get("curve") for report in reports for r in report["results"])
    figure, axes = plt.subplots(1, 1 + curves, figsize=(5.2 * (1 + curves), 4.2), layout="constrained", squeeze=False)
    axes = axes[0]
    names = [label_of(r, reports) for r in reports]
    spare = iter(plt.rcParams["axes.prop_cycle"].by_key()["color"])
    found = set()
    for name, report in zip(names, reports):
        colour, marker = STYLES.get(report["pos"], (None, "."))
        if colour is None or sum(r["pos"] == report["pos"] for r in reports) > 1:
            colour = next(spare)
        for scaling in dict.fromkeys(r["scaling"] for r in report["results"]):
            rows = [r for r in report["results"] if r["scaling"] == scaling and r["nats_per_token"] is not None]
            label = name + (f", {scaling} ×{rows[0]['factor']:g}" if scaling != "none" and rows else "")
            points = sorted((r for r in rows if r["protocol"] == protocol), key=lambda r: r["length"])
            missing = any(
                r["nats_per_token"] is None
                for r in report["results"]
                if r["protocol"] == protocol and r["scaling"] == scaling
            )
            if points:
                x, y = [r["length"] for r in points], np.array([r["perplexity"] for r in points])
                found |= {r["length"] for r in report["results"] if r["protocol"] == protocol}
                axes[0].plot(
                    x,
                    y,
                    color=colour,
                    marker=marker,
                    linestyle=LINES[scaling],
                    label=label + (" (n/a beyond)" if missing else ""),
                )
                if all(r["interval"] for r in points):
                    low, high = np.exp([r["interval"] for r in points]).T
                    axes[0].errorbar(x, y, (y - low, high - y), color=colour, linestyle="none", capsize=3, alpha=0.6)
            for r in rows:
                if r.get("curve"):
                    c = r["curve"]
                    middle = np.sqrt(np.array(c["first"]) * np.array(c["last"]))
                    axes[1].plot(middle, c["nats"], color=colour, linestyle=LINES[scaling], label=label)
                    if None not in c["low"]:
                        axes[1].fill_between(middle, c["low"], c["high"], color=colour, alpha=0.15, linewidth=0)
    if not found and not curves:
        raise ValueError(f"the reports have no figures by {protocol}, and no per-position curve")
    unit = "byte" if all(r["tokenizer"]["name"] == "byte" for r in reports) else "token"
    axes[0].set(
        xlabel=f"context length ({unit}s)",
        ylabel=f"perplexity per {unit}",
        title=f"Perplexity by context length, {protocol}",
    )
    axes[0].set_xscale("log", base=2)
    axes[0].set_yscale("log", base=2)
    axes[0].set_xticks(sorted(found), [str(n) for n in sorted(found)])
    axes[0].minorticks_off()
    low, high = axes[0].get_ylim()
    decades = [
        [m * 10**k for k in range(8) for m in steps]
        for steps in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 5), (1,))
    ]
    inside = [[t for t in ticks if low <= t <= high] for ticks in decades]
    axes[0].set_yticks(next((ticks for ticks in inside if len(ticks) <= 10), inside[-1]))
    axes[0].yaxis.set_major_formatter(ScalarFormatter())
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    if curves:
        axes[1].set(
            xlabel=f"position: {unit}s of context", ylabel=f"nats per {unit}", title="By position in the window"
        )
        axes[1].set_xscale("log", base=2)
        axes[1].xaxis.set_major_formatter(ScalarFormatter())
    for panel in axes:
        for trained in {r["block_size"] for r in reports}:
            panel.axvline(trained, color="black", linestyle=":", linewidth=1)
            panel.annotate(
                "training length",
                (trained, 0.98),
                xycoords=("data", "axes fraction"),
                rotation=90,
                va="top",
                ha="right",
                fontsize=8,
            )
    write(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/plot_eval.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("reports", nargs="+", type=Path, help="reports of eval.py")
    parser.add_argument("--protocol", default="same-targets", help="protocol of the left panel (default: same-targets)")
    parser.add_argument("--out", type=Path, required=True, help="image to write (.png, .pdf, .svg)")
    args = parser.parse_args()
    try:
        draw([json.loads(path.read_text()) for path in args.reports], args.out, args.protocol)
    except KeyError as error:
        sys.exit(f"error: a report lacks {error}: is it one of eval.py?")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
