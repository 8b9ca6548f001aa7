"""Train the five schemes by one recipe, evaluate them far beyond the training length, print one table and draw one figure.

    make quickstart                    # or: python scripts/quickstart.py
    make quickstart ARGS="--seeds 3"

Everything lies under runs/quickstart/: a folder a run, logs/, table.md, figure.png. Interrupt it and start it again: runs
that are finished are kept, the others continue where they were.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.stats
import yaml
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import torch

from checkpoint import read_metrics
from data.shards import open_data
from eval import document_interval
from model import SCHEMES as KNOWN
from model import nearest

CONFIG = REPO / "configs" / "quickstart.yaml"
BUILTIN = Path(os.path.relpath(REPO / "data" / "builtin-byte"))  # relative, since the runs record it
SCHEMES = ("learned", "rope", "crope", "comrope", "carope")
MAX_TARGETS = 16384  # scored bytes an evaluation


@dataclass
class Job:
    """A run to train, then to evaluate: a subprocess each, whose output goes to a log."""

    scheme: str
    seed: int
    out: Path
    stages: list[tuple[str, list[str]]] = field(default_factory=list)  # (name, command), those still to do
    process: subprocess.Popen | None = None
    failed: str = ""

    @property
    def name(self) -> str:
        return f"{self.scheme}-seed{self.seed}"

    @property
    def run(self) -> Path:
        return self.out / self.name

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.name}.log"

    @property
    def report(self) -> Path:
        return self.run / "eval" / "quickstart.json"

    def metrics(self) -> list[dict]:
        return read_metrics(self.run) if (self.run / "metrics.jsonl").is_file() else []

    def step(self) -> int:
        return max((m["step"] for m in self.metrics()), default=0)

    def status(self) -> str:
        losses = [m["train/loss"] for m in self.metrics() if m.get("train/loss") is not None]
        return f"{self.name} {self.stages[0][0]} {self.step()}" + (f" loss {losses[-1]:.3f}" if losses else "")


def plan(job: Job, args: argparse.Namespace, recipe: dict, lengths: list[int], data_hash: str) -> None:
    """Fill in the stages that are not done yet: training where the last checkpoint is missing, evaluation where there is no
    report on it. ValueError where the run's folder is of another recipe or other data, which would be a mixture."""
    mine = {**recipe, "pos": job.scheme, "seed": job.seed, "data_seed": job.seed}
    config = job.run / "config.yaml"
    if config.is_file():
        there = yaml.safe_load(config.read_text())
        differ = [f"{k} {there.get(k)}, now {v}" for k, v in mine.items() if k not in ("data_dir", "out_dir") and there.get(k) != v]
        if differ:
            raise ValueError(f"{job.run} is a run of another recipe ({'; '.join(differ)}): choose another --out, or delete it")
    trained = (job.run / "checkpoints" / f"step_{recipe['max_steps']}.pt").is_file()
    evaluated = False
    if trained and job.report.is_file():
        report = json.loads(job.report.read_text())
        if report["data_hash"] != data_hash:
            raise ValueError(f"{job.run} was trained on other data than {args.data}: choose another --out, or delete it")
        evaluated = report["step"] == recipe["max_steps"] and [r["length"] for r in report["results"]] == lengths
    train = [str(REPO / "train.py"), "--config", str(args.config), "--pos", job.scheme, "--seed", str(job.seed), "--data_seed", str(job.seed)]
    train += ["--data_dir", str(args.data), "--out_dir", str(job.run), "--resume", "true"]
    evaluate = [str(REPO / "eval.py"), "--run", str(job.run), "--data", str(args.data), "--json", str(job.report)]
    evaluate += ["--max_targets", str(MAX_TARGETS), "--lengths", *map(str, lengths)]
    job.stages = [] if evaluated else [("evaluating", evaluate)] if trained else [("training", train), ("evaluating", evaluate)]


def run_all(jobs: list[Job], parallel: int, steps: int) -> None:
    """Run the jobs' stages, `parallel` at a time, in order, with a progress line. A failure does not stop the others."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if parallel > 1:
        environment["OMP_NUM_THREADS"] = "1"
    waiting, running = [j for j in jobs if j.stages], []
    terminal, told = sys.stderr.isatty(), 0.0
    bar = tqdm(total=len(jobs) * steps, unit="step", disable=not terminal, desc="quickstart")
    started, first = time.monotonic(), sum(j.step() for j in jobs)
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                job.log.parent.mkdir(parents=True, exist_ok=True)
                with open(job.log, "a") as log:
                    job.process = subprocess.Popen([sys.executable, *job.stages[0][1]], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
                running.append(job)
            time.sleep(0.5)
            for job in [j for j in running if j.process.poll() is not None]:
                running.remove(job)
                stage, _ = job.stages.pop(0)
                if job.process.returncode:
                    job.failed, job.stages = f"{stage} ended with exit code {job.process.returncode}", []
                elif job.stages:
                    waiting.insert(0, job)
            done = sum(j.step() for j in jobs)
            bar.n = done
            text = "; ".join(j.status() for j in running)
            bar.set_postfix_str(text)
            if not terminal and time.monotonic() - told > 10 and running:
                told = time.monotonic()
                left = (told - started) / max(1, done - first) * (len(jobs) * steps - done)
                eta = f", training left about {tqdm.format_interval(left)}" if done > first else ""
                print(f"[{tqdm.format_interval(told - started)}] {done}/{len(jobs) * steps} steps; {text}{eta}", flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted: the runs write a checkpoint; the same command continues", file=sys.stderr)
        for job in running:
            job.process.send_signal(signal.SIGTERM)
        for job in running:
            job.process.wait()
        raise
    finally:
        bar.close()


# ---- the table


def seed_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % t interval of a mean over seeds."""
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, values.mean(), scipy.stats.sem(values))
    return float(low), float(high)


def paired(rows: list[dict], bases: list[dict]) -> str:
    """Mean over seeds of row - base on the same tokens, in nats per token, with its interval: over seeds, or for one seed a
    paired bootstrap over documents."""
    if any(r["nats_per_token"] is None for r in (*rows, *bases)):
        return "n/a"
    if len(rows) > 1:
        differences = np.array([r["nats_per_token"] - b["nats_per_token"] for r, b in zip(rows, bases)])
        return "{:+.3f} [{:+.3f}, {:+.3f}]".format(differences.mean(), *seed_interval(differences))
    difference = np.subtract(rows[0]["per_document"]["nll"], bases[0]["per_document"]["nll"])
    tokens = np.array(rows[0]["per_document"]["tokens"])
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(difference.sum() / tokens.sum(), *(document_interval(difference, tokens, 2000, 0) or [np.nan, np.nan]))


def cell(values: list[float], interval: list[float] | None, seeds: int) -> str:
    low, high = seed_interval(np.array(values)) if seeds > 1 else interval or [np.nan, np.nan]
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"


def make_table(jobs: list[Job], schemes: list[str], seeds: int, lengths: list[int], unit: str) -> str:
    train_length = lengths[0]
    head = ["scheme", "parameters", "training loss", "tokens/s", *(f"{unit} at {n}" for n in lengths)]
    head += [f"growth, {lengths[-1]} less {train_length}", *([f"less rope, at {train_length}"] if "rope" in schemes else [])]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    for scheme in schemes:
        mine = [j for j in jobs if j.scheme == scheme and j.report.is_file()]
        if not mine:
            lines.append(f"| {scheme} | failed |" + " |" * (len(head) - 2))
            continue
        reports = [json.loads(j.report.read_text()) for j in mine]
        logged = [[m for m in j.metrics() if m.get("train/loss") is not None] for j in mine]
        loss = np.mean([np.mean([m["train/loss"] for m in lines_[-5:]]) for lines_ in logged])
        speed = np.median([m["tokens_per_s"] for lines_ in logged for m in lines_[1:]])
        cells = [scheme, f"{reports[0]['parameters']:,}", f"{loss:.3f}", f"{speed:,.0f}"]
        rows = [{r["length"]: r for r in report["results"]} for report in reports]
        for length in lengths:
            if rows[0][length]["nats_per_token"] is None:
                cells.append("n/a")
            else:
                cells.append(cell([r[length]["nats_per_token"] for r in rows], rows[0][length]["interval"], len(mine)))
        cells.append(paired([r[lengths[-1]] for r in rows], [r[train_length] for r in rows]))
        if "rope" in schemes:
            base = {j.seed: json.loads(j.report.read_text()) for j in jobs if j.scheme == "rope"}
            both = [j.seed for j in mine if j.seed in base]
            of_rope = [next(r for r in base[seed]["results"] if r["length"] == train_length) for seed in both]
            cells.append(paired([r[train_length] for j, r in zip(mine, rows) if j.seed in both], of_rope) if scheme != "rope" and both else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(recipe: dict, reports: dict[str, dict], seeds: int, lengths: list[int], minutes: float | None) -> str:
    report, tokens = next(iter(reports.values())), recipe["max_steps"] * recipe["batch_tokens"]
    if seeds == 1:
        intervals = "Brackets: 95 % bootstrap over documents. One seed: they say nothing about what another seed would give."
    else:
        intervals = f"Means over {seeds} seeds; brackets: 95 % t interval over seeds, on the same documents."
    missing = {scheme: [r for r in report["results"] if r.get("reason")] for scheme, report in reports.items()}
    reasons = [f"n/a: {rows[-1]['reason']}." for rows in missing.values() if rows]
    lines = [
        f"Recipe: {recipe['n_layer']} layers × {recipe['n_embd']}, training length {recipe['block_size']}, {recipe['max_steps']} steps × "
        f"{recipe['batch_tokens']:,} tokens = {tokens / 1e6:.1f} M tokens ({report['tokenizer']['name']} tokenizer), one order of data and equal "
        "shared initial weights for all schemes. Training loss is the mean of the last five logged steps; tokens/s is of one "
        "process as the runs went, so compare speeds with scripts/bench.py instead.",
        f"Evaluation: protocol same-targets, {report['results'][0]['tokens']:,} target tokens in {report['documents']} whole validation "
        f"documents, the same for every length and scheme. {lengths[0]} is the training length and the cropping baseline. Lower is better.",
        intervals + " The last two columns are paired differences on the same tokens; documents differ more than schemes do, so the brackets of two schemes may overlap although they differ.",
        *reasons,
        "What a run of this size can tell: whether a scheme trains, and what happens beyond the training length. What it cannot: which scheme is "
        "better at the training length, where another seed moves a scheme by hundredths of a nat, or anything about larger models.",
    ]
    return "\n".join(lines + ([f"This took {minutes:.1f} minutes."] if minutes else []))


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/quickstart.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=1, help="seeds a scheme, paired over schemes (default: 1)")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), help=f"schemes to compare (default: {' '.join(SCHEMES)})")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the runs (default: runs/quickstart)")
    parser.add_argument("--data", type=Path, default=BUILTIN, help="data folder (default: data/builtin-byte, made if missing)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe (default: configs/quickstart.yaml)")
    parser.add_argument("--parallel", type=int, help="runs at a time (default: 1 on a GPU, else one a core and at most 2; one thread each if more than one)")
    args = parser.parse_args()
    args.schemes = list(dict.fromkeys(args.schemes))
    for scheme in args.schemes:
        if scheme not in KNOWN:
            parser.error(f"no scheme {scheme!r}{nearest(scheme, KNOWN)} (schemes: {', '.join(KNOWN)})")
    if args.seeds < 1 or (args.parallel is not None and args.parallel < 1):
        parser.error("--seeds and --parallel must be at least 1")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    started = time.monotonic()
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    parallel = args.parallel or (1 if gpu else min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))
    try:
        recipe = yaml.safe_load(args.config.read_text())
        lengths = [recipe["block_size"] * n for n in (1, 2, 4, 8)]
        if args.data == BUILTIN:
            prepared = subprocess.run([sys.executable, str(REPO / "data" / "prepare.py"), "builtin", "--out", str(args.data)])
            if prepared.returncode:
                sys.exit(prepared.returncode)
        data_hash = open_data(args.data, verify=False).hash
        jobs = [Job(scheme, seed, args.out) for seed in range(1, args.seeds + 1) for scheme in args.schemes]
        for job in jobs:
            plan(job, args, recipe, lengths, data_hash)
        fresh = all(len(j.stages) == 2 and not j.step() for j in jobs)
        todo = [j for j in jobs if j.stages]
        print(f"{len(jobs)} runs, {len(jobs) - len(todo)} already done; {parallel} at a time; logs in {args.out / 'logs'}", flush=True)
        run_all(jobs, parallel, recipe["max_steps"])
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        sys.exit(f"error: {f'{args.config} lacks {error}' if isinstance(error, KeyError) else error}")
    failed = [j for j in jobs if j.failed]
    reports = {j.scheme: json.loads(j.report.read_text()) for j in jobs if not j.failed}
    if reports:
        tokenizer = next(iter(reports.values()))["tokenizer"]["name"]
        text = make_table([j for j in jobs if not j.failed], args.schemes, args.seeds, lengths, f"nats/{'byte' if tokenizer == 'byte' else 'token'}")
        text += "\n\n" + notes(recipe, reports, args.seeds, lengths, (time.monotonic() - started) / 60 if fresh else None) + "\n"
        (args.out / "table.md").write_text(text)
        figure = args.out / "figure.png"
        subprocess.run([sys.executable, str(REPO / "scripts" / "plot.py"), *(str(j.run) for j in jobs if not j.failed), "--report", "quickstart.json", "--out", str(figure)], check=True)
        print(f"\n{text}\nWritten: {args.out / 'table.md'}, {figure}")
    for job in failed:
        print(f"\n{job.name}: {job.failed}; the end of {job.log}:\n" + "\n".join(job.log.read_text().splitlines()[-8:]), file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
