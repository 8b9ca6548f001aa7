"""Draw runs: nats per token against context length, and training loss against tokens.

    python scripts/plot.py runs/quickstart/*-seed1 --report quickstart.json --out figure.png
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from checkpoint import read_metrics

# Okabe & Ito's colours, which colour-blind readers can tell apart; markers for print
STYLES = {
    "learned": ("#000000", "o"), "sinusoidal": ("#999999", "P"), "none": ("#999999", "x"), "rope": ("#0072B2", "s"),
    "crope": ("#E69F00", "^"), "comrope": ("#009E73", "D"), "carope": ("#D55E00", "v"), "alibi": ("#CC79A7", "*"),
}  # fmt: skip


def read(run: Path, report: str) -> dict:
    """Config, metrics and an evaluation of a run's folder. OSError, ValueError or KeyError for what is missing or broken."""
    evaluation = json.loads((run / "eval" / report).read_text())
    return {
        "config": yaml.safe_load((run / "config.yaml").read_text()),
        "train": [(m["tokens"], m["train/loss"]) for m in read_metrics(run) if m.get("train/loss") is not None],
        "results": evaluation["results"],
        "tokenizer": evaluation["tokenizer"]["name"],
    }


def draw(runs: list[dict], out: Path) -> None:
    """The figure: seeds of a scheme are averaged; a band spans them."""
    figure, (far, loss) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    schemes = list(dict.fromkeys(r["config"]["pos"] for r in runs))
    lengths = sorted({row["length"] for r in runs for row in r["results"]})
    for scheme in schemes:
        mine = [r for r in runs if r["config"]["pos"] == scheme]
        colour, marker = STYLES.get(scheme, (None, "."))
        points = [(n, [row for r in mine for row in r["results"] if row["length"] == n and row["nats_per_token"] is not None]) for n in lengths]
        points = [(n, rows) for n, rows in points if rows]
        if points:
            x, mean = [n for n, _ in points], [np.mean([row["nats_per_token"] for row in rows]) for _, rows in points]
            far.plot(x, mean, marker=marker, color=colour, label=scheme + (" (n/a beyond)" if len(points) < len(lengths) else ""))
            if len(mine) > 1:
                low, high = zip(*[(min(v), max(v)) for v in ([row["nats_per_token"] for row in rows] for _, rows in points)])
                far.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        for i, r in enumerate(mine):
            tokens, values = zip(*r["train"])
            loss.plot(np.array(tokens) / 1e6, values, color=colour, linewidth=1, alpha=0.8, label=scheme if i == 0 else None)
    if lengths:
        trained = runs[0]["config"]["block_size"]
        far.axvline(trained, color="black", linestyle=":", linewidth=1)
        far.annotate("training length", (trained, 0.4), xycoords=("data", "axes fraction"), rotation=90, va="center", ha="right", fontsize=8)
        far.set_xscale("log", base=2)
        far.set_xticks(lengths, [str(n) for n in lengths])
    token = "byte" if all(r["tokenizer"] == "byte" for r in runs) else "token"
    far.set(xlabel=f"context length ({token}s)", ylabel=f"nats per {token}, same targets", title="Beyond the training length")
    loss.set(xlabel=f"training {token}s (millions)", ylabel=f"training loss (nats per {token})", title="Training")
    final = [value for r in runs for _, value in r["train"][-5:]]
    start = [value for r in runs for _, value in r["train"][len(r["train"]) // 10 :][:1]]
    if final and max(start) > min(final):
        loss.set_ylim(min(final) - 0.1, max(start) + 0.1)
    write(figure, out)


def write(figure, out: Path) -> None:
    """The common look of all panels, and the file."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--report", required=True, help="name of the evaluation in each run's eval/ folder")
    parser.add_argument("--out", type=Path, required=True, help="image to write (.png, .pdf, .svg)")
    args = parser.parse_args()
    try:
        draw([read(run, args.report) for run in args.runs], args.out)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
