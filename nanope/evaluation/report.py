"""Reports of evaluations: their tables, and their figures for wandb."""

import sys
from pathlib import Path

from data.tasks import TASKS
from nanope.config import config_of
from nanope.errors import first_line
from nanope.evaluation.probe_tables import interval_of, label_of, path_of, probe_figures, probe_notes, tables_of
from nanope.evaluation.statistics import FEW, few_documents
from nanope.log import start_wandb

# ---- tables


def table(report: dict) -> str:
    """The report's rows as Markdown tables, the reasons for what is missing, and what a reader must know."""
    reasons = []
    shifts, answered = ([row for row in report["results"] if row["protocol"] == p] for p in ("shift", "task"))
    scored = [row for row in report["results"] if row["protocol"] not in ("shift", "task")]
    tables = [score_table(scored, reasons)] if scored else []
    if report.get("probe"):
        tables.append(probe_table(report["probe"], reasons))
    if answered:
        tables.append(task_table(answered, report["task"], reasons))
    if shifts:
        tables.append(shift_table(shifts, reasons))
    tables += tables_of(report, reasons)
    return "\n".join(["\n\n".join(tables), *reasons, *notes(report)])


def notes(report: dict) -> list[str]:
    """What a reader of the figures must know, a sentence or two each."""
    found = probe_notes(report)
    counts = [row["documents"] for row in report["results"] if row.get("documents")]
    if counts and 1 < min(counts) < FEW:
        found.append(few_documents(min(counts)))
    if report.get("other_data"):
        found.append(f"Other data than the run was trained on: {report['data_dir']}")
    return found


def score_table(rows: list[dict], reasons: list[str]) -> str:
    lines = [
        "| protocol | length | nats/token | 95 % interval | perplexity | bits/byte | top-1 | tokens |",
        "|---|--:|--:|:-:|--:|--:|--:|--:|",
    ]
    for r in rows:
        head = f"| {r['protocol']} | {label_of(r)}{' (cropping baseline)' if r['cropping_baseline'] else ''} |"
        if r["nats_per_token"] is None:
            lines.append(f"{head} n/a | | | | | |")
            reasons.append(f"n/a at {label_of(r)}: {r['reason']}")
        else:
            lines.append(
                f"{head} {r['nats_per_token']:.4f} | {interval_of(r, 'one document')} | {r['perplexity']:.3f} "
                f"| {r['bits_per_byte']:.4f} | {r['accuracy']:.1%} | {r['tokens']:,} |"
            )
    return "\n".join(lines)


def probe_table(rows: list[dict], reasons: list[str]) -> str:
    lines = [
        "| probe length | recall, nats/token | 95 % interval | NLL with key | without | top-1 with key |",
        "|--:|--:|:-:|--:|--:|--:|",
    ]
    for r in rows:
        if r["recall"] is None:
            lines.append(f"| {label_of(r)} | n/a | | | | |")
            reasons.append(f"probe n/a at {label_of(r)}: {r['reason']}")
        else:
            lines.append(
                f"| {label_of(r)} | {r['recall']:.4f} | {interval_of(r, 'one trial')} | {r['with_key']:.4f} "
                f"| {r['without_key']:.4f} | {r['accuracy']:.1%} |"
            )
    return "\n".join(lines)


def task_table(rows: list[dict], task: dict, reasons: list[str]) -> str:
    """Accuracies by length, beside those of guessing and of the model with no more context than a row of training."""
    lines = [
        f"| length in {TASKS[task['name']].unit} | exact match | 95 % interval | tokens right | chance, exact | tokens "
        "| cropped, exact | tokens | examples |",
        "|--:|--:|:-:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        cells = ["n/a", "", ""]
        if r["accuracy"] is None:
            reasons.append(f"n/a at {label_of(r)}: {r['reason']}")
        else:
            cells = [
                f"{r['accuracy']:.1%}",
                " … ".join(f"{b:.1%}" for b in r["interval"]),
                f"{r['token_accuracy']:.1%}",
            ]
        cells += [f"{r['chance']:.1%}", f"{r['token_chance']:.1%}"]
        cells += [f"{r['cropped'][figure]:.1%}" for figure in ("accuracy", "token_accuracy")]
        lines.append(f"| {label_of(r)} | {' | '.join(cells)} | {r['examples']:,} |")
    return "\n".join(lines)


def shift_table(rows: list[dict], reasons: list[str]) -> str:
    lines = [
        "| positions shifted by | length | nats/token | largest change of a token | tokens |",
        "|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        head = f"| {r['offset']:,} | {r['length']} |"
        if r["nats_per_token"] is None:
            lines.append(f"{head} n/a | | |")
        else:
            lines.append(f"{head} {r['nats_per_token']:.6f} | {r['largest_change']:.1e} | {r['tokens']:,} |")
    reasons += dict.fromkeys(f"shift n/a: {r['reason']}" for r in rows if "reason" in r)
    return "\n".join(lines)


# ---- wandb


def flat_figures(report: dict) -> dict[str, float]:
    """The report's figures by name, for wandb: eval/PROTOCOL/LENGTH[/SCALING][/OFFSET]/FIGURE."""
    figures = (
        "nats_per_token",
        "perplexity",
        "bits_per_byte",
        "accuracy",
        "token_accuracy",
        "recall",
        "largest_change",
    )
    found = {}
    for r in [*report["results"], *({"protocol": "probe", **p} for p in report.get("probe", ()))]:
        name = f"eval/{r['protocol']}/{path_of(r)}" + (f"/{r['offset']}" if "offset" in r else "")
        found |= {f"{name}/{f}": r[f] for f in figures if r.get(f) is not None}
    return found | probe_figures(report)


def log_to_wandb(report: dict) -> None:
    """Add the report's figures to the summary of the wandb run that training made, where it made one."""
    config, run = report["config"], Path(report["run"])
    if config.get("wandb", "off") == "off" or not run.is_dir():
        return
    try:
        logged = start_wandb(config_of(config), run, resumed=True)
        logged.summary.update(flat_figures(report))
        logged.finish()
    except Exception as error:  # the report is written; whatever wandb has is no reason to fail
        print(f"warning: the figures are not in wandb: {first_line(error)}", file=sys.stderr)
