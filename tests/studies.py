"""Grids, and the files of runs that never trained, for the tests of studies."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from data.prepare import prepare
from nanope import REPO
from nanope.study.files import RunFolders
from nanope.study.grid import Grid
from nanope.study.options import complete, parser_of
from nanope.study.results import Study

SWEEPS = REPO / "configs" / "sweeps"
FIELDS = {
    "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "batch_tokens": 64, "max_steps": 30, "warmup_steps": 3,
    "eval_interval": 10, "eval_tokens": 64, "checkpoint_interval": 5, "log_interval": 3, "learning_rate": 2e-3,
    "min_lr": 2e-4,
}  # fmt: skip
ARMS = {"rope": {"pos": "rope"}, "crope": {"pos": "crope"}, "broken": {"pos": "rope", "pos_options": {"bas": 1.0}}}
EVAL = {"far": {"lengths": ["1x", "2x"], "max_targets": 64, "resamples": 1000}}


def write_grid(path: Path, data_dir="data/nowhere", **keys) -> Path:
    content = {"fields": {**FIELDS, "data_dir": str(data_dir)}, "arms": ["rope", "crope"], "seeds": 2, **keys}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def arguments_of(*words, grid: Grid | None = None, gpus=(), root: Path = REPO):
    """The command line of a sweep, complete for a grid (default: of one run)."""
    args = parser_of("sweep", "").parse_args([*words])
    args.root = root
    complete(args, grid or Grid("one run", arms={"a": {}}), [*gpus])
    return args


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=REPO, capture_output=True, text=True, timeout=300, **options
    )


def prepared(folder: Path) -> Path:
    """A data folder of bytes."""
    (folder / "texts").mkdir()
    words = "and the of light darkness water earth heaven day night was it so good".split()
    for i in range(10):
        (folder / "texts" / f"{i}.txt").write_text(" ".join(np.random.default_rng(i).choice(words, 80 + 20 * i)))
    made = prepare("files", folder / "data", source=folder / "texts", tokenizer_name="byte", val_tokens=2500)
    return made.folder


# ---- files of runs


def write_run(run, lines: list[dict], vocab_size: int = 320) -> None:
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "config.yaml").write_text(yaml.safe_dump({**run.fields, "vocab_size": vocab_size}))


def finish(run, loss: float | None, rows=(), vocab_size: int = 320, **environment) -> None:
    """The files of a finished run. rows: of every report, or by evaluation."""
    write_run(run, [
        {"step": 0, "environment": {"host": "x", **environment}},
        {"step": 0, "tokens": 0, "val/loss": 6.0},
        {"step": 3, "tokens": 192, "train/loss": 5.0, "tokens_per_s": 9.0},
        {"step": run.max_steps, "tokens": 1, "val/loss": loss},
    ], vocab_size)  # fmt: skip
    about = {
        "pos": run.config.pos,
        "data_hash": "d",
        "tokenizer": {"name": "gpt2"},
        "split": "val",
        "stream": True,
        "documents": 2,
        "stride": 8,
    }
    rows = rows if isinstance(rows, dict) else [*rows]
    for name in run.evaluations:
        run.report_path(name).parent.mkdir(exist_ok=True)
        results = [*(rows[name] if isinstance(rows, dict) else rows)]
        report = {"results": results, "dtype": "float32", **about}
        if shifted := [row for row in results if row["protocol"] == "shift"]:
            report["shift"] = [row for row in shifted if "reason" not in row]
        if any(row["protocol"] == "task" for row in results):
            report["task"] = {"name": "copy", "length": 8}
        run.report_path(name).write_text(json.dumps(report))


def diverge(run, n: int = 10, gap: int = 0) -> None:
    """The files of a run whose last n steps were not finite; with a gap before the sixth of them."""
    steps = [5 + i + (gap if i > 4 else 0) for i in range(n)]
    start = [{"step": 0, "environment": {"host": "x"}}, {"step": 0, "val/loss": 6.0}]
    write_run(run, [*start, *({"step": s, "skipped": 1, "train/loss": None} for s in steps)])


def report_row(nll, length: int = 16, targets: str = "t", protocol: str = "same-targets") -> dict:
    """A row of a report with the NLL of two documents, of 10 and 20 tokens; None: a length that cannot be."""
    row = {"protocol": protocol, "length": length, "scaling": "none", "factor": 1.0, "interval": None, "tokens": 30}
    if nll is None:
        return row | {"nats_per_token": None, "tokens": 0, "reason": "too long"}
    nll = np.array(nll, float)
    documents = {"nll": nll.tolist(), "tokens": [10, 20]}
    return row | {"nats_per_token": nll.sum() / 30, "targets_sha256": targets, "per_document": documents}


def task_row(right, length: int = 8, examples: str = "t") -> dict:
    """A row of a report on a task: of each example how many of its 4 tokens are right; None: out of reach."""
    row = {"protocol": "task", "length": length, "scaling": "none", "factor": 1.0, "examples": 5, "chance": 0.0625}
    row |= {"token_chance": 0.5, "targets_sha256": examples}
    row["cropped"] = {"accuracy": 0.0, "interval": [0.0, 0.4], "token_accuracy": 0.5}
    if right is None:
        return row | {"accuracy": None, "token_accuracy": None, "per_example": None, "reason": "too long"}
    exact = np.mean(np.array(right) == 4)
    row |= {"accuracy": float(exact), "interval": [0.1, 0.9], "token_interval": [0.2, 0.8]}
    return row | {"token_accuracy": float(np.mean(right) / 4), "per_example": {"right": right, "answers": [4] * 5}}


def study_of(folder: Path, path: Path, losses: dict, scale=None, rows=None, **changes) -> Study:
    """A study in `folder` of a grid whose runs end with given validation losses, {arm: [a seed each]}. rows: run → the
    rows of its reports."""
    seeds = len(next(iter(losses.values())))
    grid = Grid.read(path, scale, {"arms": list(losses), "seeds": seeds, **changes})
    for run in grid.runs(RunFolders(folder)):
        finish(run, losses[run.arm][run.seed - 1], [] if rows is None else rows(run), vocab_size=50304)
    grid.command = "c"
    grid.write(folder)
    return Study.read(folder)
