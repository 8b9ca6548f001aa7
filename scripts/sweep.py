"""Run a grid: every arm with every seed, trained, evaluated, and put into one table with intervals and one figure.

    python scripts/sweep.py GRID.yaml --plan --price_per_hour 2.5        # runs, FLOPs, hours and cost, before anything starts
    python scripts/sweep.py GRID.yaml --plan --gpu H100 --parallel 8     # the same for eight H100 that are elsewhere, a run each
    python scripts/sweep.py GRID.yaml --out runs/mine                    # CPU cores, or one run a GPU
    python scripts/sweep.py GRID.yaml --parallel 2 --threads 1           # two runs at a time of one thread each
    python scripts/sweep.py GRID.yaml --ranks 8                          # each run by torchrun on 8 GPUs
    python scripts/sweep.py GRID.yaml --slurm sweep.sbatch --ranks 4 && sbatch --time=8:00:00 sweep.sbatch
    python scripts/sweep.py GRID.yaml --status                           # from another terminal
    python scripts/sweep.py GRID.yaml --collect results/mine             # the small files, the tables and the figure
    python scripts/report.py results/mine                                # … made again from those files alone

Interrupt or kill it and start it again: finished runs are kept, the others continue from their checkpoints, and what still
runs is left alone and waited for. A run that fails does not stop the others. scripts/grid.py explains grid files; wandb's
own sweeps go without this program: configs/sweeps/wandb.yaml.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import _root
import report
import torch
import yaml
from grid import ELSEWHERE, Grid, Run, bench_variants, command_of, local, model_cost
from tqdm import tqdm

from data.shards import cores
from nanope import REPO
from nanope.checkpoint import write_atomically
from nanope.config import RunConfig
from nanope.distributed import PEAK_FLOPS, peak_flops
from nanope.ops import linear
from nanope.plan import Plan
from nanope.plan import plan as run_plan

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAUNCH = 2e-3  # seconds a layer: what a GPU's host needs at least for the kernels of a forward and backward pass; a guess, for --plan
# Fields whose change leaves a set-up the paper's own, within rounding
NO_MATTER = (
    *ELSEWHERE,
    "micro_batch_size",
    "compile",
    "checkpoint_interval",
    "keep_checkpoints",
    "log_interval",
    "sample_interval",
    "rank_timeout",
)
INTERRUPTED = 75  # EX_TEMPFAIL: started again, it goes on


# ---- what it will cost


def cost(run: Run, ranks: int = 1) -> Plan:
    """The Plan of a run (plan.py). Where the data are not there yet, the vocabulary is its tokenizer's. ValueError for what could
    not be run, such as a batch that does not divide over the ranks."""
    config = RunConfig(**{**run.fields, "data_dir": local(run.fields.get("data_dir", RunConfig.data_dir))})
    return run_plan(config, gpus=ranks, vocab_size=257 if config.data_dir.endswith("-byte") else None, details=False)


def shape_of(run: Run) -> str:
    return json.dumps(dataclasses.asdict(RunConfig(**run.fields).model_config()), sort_keys=True)


def flops_per_second(args) -> tuple[float, str]:
    """A guess at what one run computes a second, and where it is from. Runs that there are tell more: see `plan`."""
    peak = PEAK_FLOPS[args.gpu] if args.gpu else peak_flops(torch.device("cuda")) if torch.cuda.is_available() else None
    if peak:
        return (
            args.ranks * args.mfu * peak,
            f"{args.ranks} {args.gpu or 'GPU(s)'} a run at {args.mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s (--mfu), or {LAUNCH * 1e3:g} ms a layer and micro-batch where that is longer, a guess",
        )
    if torch.cuda.is_available():
        raise ValueError("this GPU's peak is not known: give --gpu, or --tokens_per_s, the speed of one run")
    torch.set_num_threads(1)
    x, times = torch.randn(512, 512), []
    for _ in range(20):
        start = time.perf_counter()
        linear(x, x)
        times.append(time.perf_counter() - start)
    part = 0.4  # of that speed; results/schemes, carope-1 and crope-2 reached 0.38, 0.37 and 0.46
    return part * 2 * 512**3 / min(times) * min(
        args.threads * args.ranks, cores()
    ), f"{part:g} of this machine's speed in the model's matrix product, a guess"


def plan(grid: Grid, out: Path, args) -> str:
    """The runs as a table, with parameters, tokens, FLOPs of training and hours with validation, and their sum; what is done
    costs nothing more. With --gpu all times are of that GPU, whatever ran here."""
    runs = planned_runs(grid, out)
    measured = {}
    for run in runs if not args.gpu else ():
        if speeds := run.series("tokens_per_s")[1][1:]:
            measured[shape_of(run)] = statistics.median(speeds)
    guess, source = (None, "") if args.tokens_per_s else flops_per_second(args)
    lines = ["| run | state | parameters | tokens | FLOPs | hours |", "|---|---|--:|--:|--:|--:|"]
    total, hours, failing = 0, [], 0
    for run in runs:
        try:
            p = cost(run, args.ranks)
        except ValueError as error:
            lines.append(f"| {run.name} | cannot run: {error} | | | | |")
            failing += 1
            continue
        speed = args.tokens_per_s or measured.get(shape_of(run))
        if not speed:
            seconds = p.config.batch_tokens * p.flops_per_token / guess  # a step
            if args.gpu or torch.cuda.is_available():
                seconds = max(seconds, p.accumulation * p.config.n_layer * LAUNCH)
            speed = p.config.batch_tokens / seconds
        left = 0.0 if run.trained() or run.diverged() else 1 - step_of(run) / run.max_steps
        hours.append(left * p.tokens * (1 + p.validation) / speed / 3600)
        lines.append(
            f"| {run.name} | {state_of(run)} | {p.parameters['total']:,} | {p.tokens:,} | {p.flops:.3g} | {hours[-1]:.2f} |"
        )
        total += left * p.flops
    if grid.throughput:
        tokens, flops = bench_cost(grid)
        done = report.throughput_path(grid, out).is_file()
        speed = args.tokens_per_s or guess / args.ranks / (flops / tokens)  # on one device
        hours.append(0.0 if done else tokens / speed / 3600)
        lines.append(
            f"| speed, scripts/bench.py | {'done' if done else 'waiting'} | | {tokens:,} | {flops:.3g} | {hours[-1]:.2f} |"
        )
        total += 0 if done else flops
    free = [0.0] * args.parallel  # when each slot is free again
    for h in hours:
        free[free.index(min(free))] += h
    lines += [
        "",
        f"{len(runs)} runs, {sum(r.done() for r in runs)} done{f', {failing} cannot run' if failing else ''}. Still to train: {total:.3g} FLOPs, "
        f"{sum(hours):.2f} run-hours with validation, {max(free):.2f} hours with {args.parallel} at a time; evaluation comes on top.",
    ]
    told = (
        f"{args.tokens_per_s:,.0f} tokens/s (--tokens_per_s)"
        if args.tokens_per_s
        else source
        if args.gpu
        else f"measured where runs of the same shape are there, else {source}"
    )
    lines.append(f"Speed of a run: {told}.")
    if grid.tune:
        lines.append("The learning rates of the main runs are tuned first; until then the grid's own stand for them.")
    if args.price_per_hour is not None:
        gpus = args.ranks if args.gpu or torch.cuda.is_available() or args.tokens_per_s else 1
        lines.append(
            f"Cost: {sum(hours) * gpus * args.price_per_hour:,.2f} at {args.price_per_hour:,.2f} an hour for each of {gpus} device(s) a run."
        )
    return "\n".join(lines)


def bench_cost(grid: Grid) -> tuple[int, float]:
    """(tokens, FLOPs) of the grid's `throughput`: rope and its variants, which differ by less than a percent, and a round to warm up."""
    t = grid.throughput
    config = RunConfig(
        **{k: v for k, v in t.items() if k in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")}
    )
    tokens = (
        len({"rope", *bench_variants(grid).values()})
        * (t.get("rounds", 7) + 1)
        * t.get("steps", 1)
        * t.get("batch", 1)
        * config.block_size
    )
    return tokens, tokens * model_cost(config)[1]


def planned_runs(grid: Grid, out: Path) -> list[Run]:
    """All runs, those with a learning rate that is still to be tuned at the grid's own."""
    waiting = [
        grid.run(out, s, a, seed)
        for seed in grid.seeds
        for s in grid.settings
        for a in grid.arms
        if grid.tune and grid.best_rate(out, s, a) is None
    ]
    return [*grid.runs(out), *waiting]


# ---- where a run stands, read from its files


def lock_path(run: Run) -> Path:
    return run.out / "logs" / f"{run.name}.lock"


def held(run: Run) -> str | None:
    """Who works on this run now, "HOST SLOT PID"; None where nobody does."""
    with contextlib.suppress(OSError), open(lock_path(run)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another process"
    return None


def step_of(run: Run) -> int:
    return max((m["step"] for m in run.metrics()), default=0)


def state_of(run: Run, failed: dict | None = None) -> str:
    if failed and run.name in failed:
        return "failed"
    if run.done():
        return "done" if run.trained() else "diverged"
    if held(run):
        return "evaluating" if run.trained() else "training"
    return "to evaluate" if run.trained() else "stopped" if step_of(run) else "waiting"


def status(runs: list[Run], failed: dict | None = None) -> str:
    """Every run's state, step, loss and remaining time of training."""
    lines = ["| run | state | step | loss | ETA |", "|---|---|--:|--:|--:|"]
    for run in runs:
        state, (_, losses), speeds = state_of(run, failed), run.series("train/loss"), run.series("tokens_per_s")[1]
        step = step_of(run)
        eta = (run.max_steps - step) * RunConfig(**run.fields).batch_tokens / speeds[-1] if speeds else None
        left = tqdm.format_interval(eta) if eta and state == "training" else ""
        lines.append(
            f"| {run.name} | {state} | {step}/{run.max_steps} | {f'{losses[-1]:.4f}' if losses else ''} | {left} |"
        )
    return "\n".join(lines)


class Display:
    """The status of what runs: redrawn on a terminal, else a line every half a minute."""

    def __init__(self, total: int):
        self.total, self.terminal, self.drawn = total, sys.stderr.isatty(), 0
        self.started = self.told = time.monotonic()
        self.first = None

    def show(self, runs: list[Run], busy: list[Run], failed: dict) -> None:
        now = time.monotonic()
        if now - self.told < (2 if self.terminal else 30):
            return
        self.told = now
        done, wanted = sum(min(1.0, step_of(r) / r.max_steps) for r in runs), max(len(runs), self.total)
        self.first = done if self.first is None else self.first
        eta = (now - self.started) / (done - self.first) * (wanted - done) if done > self.first else None
        counts = f"{sum(r.done() for r in runs)} of {wanted} runs done, {len(busy)} running, {len(failed)} failed"
        counts += f"; training left about {tqdm.format_interval(eta)}" if eta else ""
        lines = [*status(busy, failed).splitlines(), counts] if busy else [counts]
        if self.terminal:
            self.clear()
            print(
                "\n".join(line[: shutil.get_terminal_size().columns - 1] for line in lines), file=sys.stderr, flush=True
            )
            self.drawn = len(lines)
        else:
            rows = "; ".join(" ".join(line.strip("| ").split(" | ")[:4]) for line in lines[2:-1])
            print(f"[{tqdm.format_interval(now - self.started)}] {counts}{': ' + rows if rows else ''}", flush=True)

    def clear(self) -> None:
        if self.drawn:
            print(f"\033[{self.drawn}F\033[J", end="", file=sys.stderr)
            self.drawn = 0

    def say(self, text: str) -> None:
        self.clear()
        print(text, flush=True)


# ---- running


class Interrupted(BaseException):
    def __init__(self, number: int):
        self.number = number


@dataclasses.dataclass
class Work:
    """A run that this process works on: its next stage is a process, and the lock is held by that process too, so
    that it outlives this one where this one is killed."""

    run: Run
    slot: int
    lock: object
    stage: str = ""
    process: subprocess.Popen | None = None
    log_start: int = 0

    @property
    def log(self) -> Path:
        return self.run.out / "logs" / f"{self.run.name}.log"

    def next_stage(self, ranks: int) -> tuple[str, list[str]] | None:
        """What is to be done next, by what is there: (name, command)."""
        run = self.run
        data, folder = local(run.fields.get("data_dir", RunConfig.data_dir)), str(run.folder)
        if not run.trained():
            config = run.out / "logs" / f"{run.name}.yaml"
            fields = {**run.fields, "data_dir": data, "out_dir": folder, "resume": True}
            config.write_text(yaml.safe_dump(fields, sort_keys=False))
            return "training", launched([str(REPO / "train.py"), "--config", str(config)], ranks)
        if missing := run.missing_reports():
            name = missing[0]
            own = command_of(run.reports[name], run.folder, data, run.path_of(name))
            return name, launched(own, ranks if Path(own[0]).name == "eval.py" else 1)
        return None

    def start(self, ranks: int, environment: dict) -> bool:
        """Start the next stage, with the threads or GPUs of the slot; False where there is none."""
        stage = self.next_stage(ranks)
        if stage is None:
            return False
        self.stage, command = stage
        with open(self.log, "ab") as log:
            self.log_start = log.tell()
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                pass_fds=[self.lock.fileno()],
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            )
        return True

    def error(self) -> str:
        text = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        return f"{self.stage} ended with exit code {self.process.returncode}; the end of {self.log}:\n" + "\n".join(
            "    " + line for line in text.splitlines()[1:][-8:]
        )


def launched(command: list[str], ranks: int) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"] if ranks > 1 else []
    return [sys.executable, *torchrun, *command]


def take(run: Run, slot: int):
    """The lock on a run, a file to keep open; None where another process has it."""
    lock_path(run).parent.mkdir(parents=True, exist_ok=True)
    file = open(lock_path(run), "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    file.write(f"{socket.gethostname()} {slot} {os.getpid()}\n")
    file.flush()
    return file


def slots_of(args) -> list[dict]:
    """What each run at a time gets: threads, or GPUs of its own."""
    if torch.cuda.is_available() and args.gpus:
        return [
            {"CUDA_VISIBLE_DEVICES": ",".join(args.gpus[i * args.ranks : (i + 1) * args.ranks])}
            for i in range(args.parallel)
        ]
    return [{"OMP_NUM_THREADS": str(args.threads)} for _ in range(args.parallel)]


def execute(grid: Grid, out: Path, args, only: list[str] | None = None) -> dict[str, str]:
    """Do everything that is not done, `parallel` runs at a time, and wait for what other processes are at. Returns the errors
    of runs that failed, by name. On a signal: pass it on, wait for the checkpoints, Interrupted."""

    def known():
        runs = grid.runs(out)
        return [r for r in runs if r.name in only] if only else runs

    failed, works, slots = {}, [], slots_of(args)
    display = Display(len(only) if only else len(grid.arms or {}) * len(grid.settings) * len(grid.seeds))
    host, ranks = socket.gethostname(), args.ranks
    runs, fresh = known(), False
    unfinished = [r for r in runs if not r.done()]
    try:
        while True:
            mine = {w.run.name for w in works}
            holders = {r.name: held(r) for r in unfinished if r.name not in mine}
            elsewhere = [r for r in unfinished if holders.get(r.name)]  # such as what a killed sweep left running
            here = [holders[r.name].split()[1] for r in elsewhere if holders[r.name].startswith(f"{host} ")]
            free = [i for i in range(len(slots)) if i not in {w.slot for w in works} and str(i) not in here]
            for run in [r for r in unfinished if r.name not in mine and r not in elsewhere]:
                if not free or len(works) + len(here) >= len(slots):
                    break
                lock = take(run, free[0])
                if lock is None:
                    continue
                work = Work(run, free[0], lock)
                if work.start(ranks, slots[work.slot]):
                    works.append(work)
                    free.pop(0)
                else:  # another process has finished it
                    lock.close()
                    fresh = True
            for work in [w for w in works if w.process.poll() is not None]:
                again = False
                if work.process.returncode:
                    failed[work.run.name] = work.error()
                    display.say(f"{work.run.name}: failed in {work.stage}")
                else:
                    before = work.stage
                    again = work.start(ranks, slots[work.slot])
                    if again and work.stage == before:
                        work.process.kill()
                        failed[work.run.name], again = (
                            f"{before} ended without a result, and without an error: see {work.log}",
                            False,
                        )
                if not again:
                    works.remove(work)
                    work.lock.close()
                    if work.run.name not in failed:
                        display.say(f"{work.run.name}: done")
                fresh = True
            if fresh or elsewhere:
                runs, fresh = known(), False
                unfinished = [r for r in runs if r.name not in failed and not r.done()]
            if not works and not unfinished:
                return failed
            display.show(runs, [w.run for w in works] + elsewhere, failed)
            time.sleep(0.3)
    except Interrupted:
        for work in works:
            work.process.send_signal(signal.SIGTERM)
        for work in works:
            work.process.wait()
        raise
    finally:
        display.clear()


@contextlib.contextmanager
def alone(path: Path, what: str):
    """Hold the lock `path`, a file; a process that is passed it holds it too, so that one that a killed sweep left is waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is {what}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def measure_throughput(grid: Grid, out: Path) -> str | None:
    """scripts/bench.py with the grid's arguments, alone on the machine, unless its figures are there. Returns what went wrong, or None."""
    target = report.throughput_path(grid, out)
    with alone(out / "logs" / "speed.lock", "measuring speeds") as lock:
        if target.is_file():
            return None
        partial = target.with_name(f".{target.name}.partial")
        command = [sys.executable, str(REPO / "scripts" / "bench.py"), "--no_peer", "--json", str(partial)]
        for name, value in {**grid.throughput, "schemes": list(bench_variants(grid).values())}.items():
            command += [
                f"--{name}",
                *([] if value is True else map(str, value if isinstance(value, list) else [value])),
            ]
        print(f"speed: {shlex.join(command[1:])}", flush=True)
        code = subprocess.run(command, stdout=subprocess.DEVNULL, pass_fds=[lock.fileno()]).returncode
        if code:
            return f"scripts/bench.py ended with exit code {code}; its message is above"
        os.replace(partial, target)


def prepare(grid: Grid, sources: list[str]) -> None:
    """Make the data folders that are missing. `sources`: PATH, or CORPUS=PATH where there are several corpora."""
    wanted = {}
    for setting in grid.settings if grid.arms else ():
        if data := grid.data_of(setting):
            wanted[f"data/{data['corpus']}-{data['tokenizer']}"] = data
    named = dict(s.split("=", 1) if "=" in s else (None, s) for s in sources or ())
    if None in named and len({d["corpus"] for d in wanted.values()}) > 1:
        raise ValueError(
            f"--source needs a name for each of several corpora: --source {' '.join(d['corpus'] + '=PATH' for d in wanted.values())}"
        )
    for folder, data in wanted.items():
        folder = local(folder)
        there = Path(folder) / "manifest.json"
        if there.is_file():
            continue
        command = [sys.executable, str(REPO / "data" / "prepare.py"), data["corpus"], "--out", folder]
        for key, value in {k: v for k, v in data.items() if k != "corpus"}.items():
            command += [f"--{key}", str(value)]
        if source := named.get(data["corpus"], named.get(None)):
            command += ["--source", source]
        with alone(Path(f"{folder}.lock"), f"preparing {folder}") as lock:
            if not there.is_file() and subprocess.run(command, pass_fds=[lock.fileno()]).returncode:
                raise ValueError(f"the data were not made: {shlex.join(command[1:])}")


# ---- SLURM

SBATCH = """\
#!/bin/bash
# {n} runs of the grid {name} as a SLURM array: an element a run, {ranks} process(es) each. Made by
#     {made}
# Submit it from the repository, with what your site needs: sbatch --partition=… --time=… FILE. A run that reaches its time limit or is
# preempted writes a checkpoint and is queued again; submitted again, the script continues what failed. When all are done, the same
# command without --slurm finds nothing to run and makes the tables.{note}
#SBATCH --job-name=nanope-{name}
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={cpus}{gpus}
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={out}/logs/slurm-%A-%a.log
set -u
cd "${{SLURM_SUBMIT_DIR:?start me with sbatch, from the repository}}"
runs=(
{runs}
)
${{SRUN-srun}} ${{PYTHON-.venv/bin/python}} {command} --only "${{runs[$SLURM_ARRAY_TASK_ID]}}"
code=$?
if [ $code -eq {interrupted} ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit $code
"""


def write_sbatch(path: Path, grid: Grid, out: Path, args, made: list[str], command: list[str]) -> str:
    """The script for all runs that are known and not done. Returns what to say about it."""
    runs = [r.name for r in grid.runs(out) if not r.done()]
    if not runs:
        return f"every run in {out} is done: no script to write"
    waiting = sum(r is None for r in grid.main_runs(out))
    note = (
        f"\n# These are the trials of learning rates: when they are done, make the script again for the {waiting} main runs."
        if waiting
        else ""
    )
    gpus = "" if (grid.fields or {}).get("device") == "cpu" else f"\n#SBATCH --gpus-per-node={args.ranks}"
    text = SBATCH.format(
        n=len(runs), last=len(runs) - 1, name=grid.name, ranks=args.ranks, made=shlex.join(made), note=note, gpus=gpus, cpus=args.ranks * args.threads,
        out=out, runs="\n".join(f"    {name}" for name in runs), command=shlex.join(command), interrupted=INTERRUPTED,
    )  # fmt: skip
    (out / "logs").mkdir(parents=True, exist_ok=True)  # SLURM does not make it
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return f"{path}: an array of {len(runs)} runs" + (", the trials; then make it again" if waiting else "")


# ---- the small files


def collect(grid: Grid, out: Path, target: Path) -> None:
    """Copy what tables and figures are made of: of every run config.yaml, metrics.jsonl and the grid's reports; the grid; speeds.
    Folders of runs that an earlier collection left in the target and the grid no longer has are named, not deleted. ValueError
    where runs are not done."""
    runs = grid.runs(out)
    if undone := [r.name for r in runs if not r.done()] + ["runs that wait for their learning rate"] * (
        None in grid.main_runs(out)
    ):
        raise ValueError(f"{len(undone)} runs in {out} are not done ({', '.join(undone[:3])} …): run the sweep first")
    if grid.throughput and not report.throughput_path(grid, out).is_file():
        raise ValueError(f"{out} lacks the measurement of speed: run the sweep first")
    write_grid(grid, target)
    if not (target / "README.md").exists():
        figure = "![figures](figure.png)\n\n" if grid.arms else ""
        (target / "README.md").write_text(
            report.README.format(title=grid.name, begin=report.BEGIN, end=report.END, figure=figure)
        )
    for run in runs:
        there = target / run.name
        (there / "eval").mkdir(parents=True, exist_ok=True)
        reports = [run.path_of(name) for name in run.reports] if run.trained() else []  # none of a run that diverged
        for path in [run.folder / "config.yaml", run.folder / "metrics.jsonl", *reports]:
            shutil.copyfile(path, there / path.relative_to(run.folder))
    if grid.throughput:
        shutil.copyfile(report.throughput_path(grid, out), report.throughput_path(grid, target))
    if old := sorted({path.parent.name for path in target.glob("*/config.yaml")} - {run.name for run in runs}):
        print(
            f"{target} also holds {', '.join(old)}, no longer in this grid and in no table: delete what you do not need",
            file=sys.stderr,
        )


def write_grid(grid: Grid, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "grid.yaml", lambda file: file.write(grid.text().encode()))


# ---- the command


def value_of(text: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set: {text!r} is no value: {error}") from error


def parser_of(prog: str, description: str) -> argparse.ArgumentParser:
    """The options of a sweep, less the grid's path."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_argument_group("what to run")
    what.add_argument("--scale", help="one of the grid's scales (default: paper, the grid as it stands)")
    what.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms; names of schemes are always arms")
    what.add_argument("--settings", nargs="+", metavar="SETTING", help="only these settings")
    what.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="a number of seeds, or several seeds themselves"
    )
    what.add_argument("--corpus", help="another corpus for all settings, as data/prepare.py names it")
    what.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of train.py for all runs, such as max_steps=100",
    )
    where = parser.add_argument_group("where and how")
    where.add_argument(
        "--out", type=Path, help="folder of the runs (default: runs/NAME of the grid, with scale and corpus)"
    )
    where.add_argument(
        "--source",
        nargs="+",
        metavar="PATH",
        help="text for data/prepare.py to read instead of downloading it; CORPUS=PATH where there are several",
    )
    where.add_argument(
        "--parallel", type=int, help="runs at a time (default: as many as fit on the GPUs, else one a core)"
    )
    where.add_argument(
        "--threads", type=int, help="CPU threads a process (default: the cores over the processes at a time)"
    )
    where.add_argument(
        "--ranks",
        type=int,
        default=1,
        help="processes a run, by torchrun: a GPU each, or on a CPU --threads each (default: 1)",
    )
    where.add_argument(
        "--slurm", type=Path, metavar="FILE", help="write a SLURM array script of the runs that are not done, and stop"
    )
    where.add_argument(
        "--only", nargs="+", metavar="RUN", help="these runs by name, and no table: an element of the array"
    )
    look = parser.add_argument_group("without running anything")
    look.add_argument("--plan", action="store_true", help="print runs, FLOPs and hours")
    look.add_argument("--price_per_hour", type=float, help="of one device, for --plan")
    look.add_argument(
        "--gpu",
        type=str.upper,
        choices=PEAK_FLOPS,
        help="for --plan: hours on such GPUs, --ranks a run, --parallel runs at a time, on a machine without one too",
    )
    look.add_argument(
        "--tokens_per_s", type=float, help="speed of one run, for --plan (default: that of finished runs, else a guess)"
    )
    look.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="for --plan on GPUs: part of the peak that training reaches (default: 0.4)",
    )
    look.add_argument("--status", action="store_true", help="print where every run stands")
    look.add_argument(
        "--collect",
        type=Path,
        metavar="DIR",
        help="copy the small files of finished runs to DIR, with tables and figure",
    )
    return parser


def grid_of(path: Path, args) -> tuple[Grid, list[str]]:
    """The grid with what the command line changes, and the part of the command line that says so."""
    changes, said = {}, []
    if args.scale:
        said += ["--scale", args.scale]
    for name in ("arms", "settings"):
        if chosen := getattr(args, name):
            changes[name] = list(dict.fromkeys(chosen))
            said += [f"--{name}", *chosen]
    if args.seeds:
        changes["seeds"] = args.seeds[0] if len(args.seeds) == 1 else args.seeds
        said += ["--seeds", *map(str, args.seeds)]
    if args.set:
        if bad := [s for s in args.set if "=" not in s]:
            raise ValueError(f"--set takes FIELD=VALUE, not {bad[0]!r}")
        changes["fields"] = {k: value_of(v) for k, v in (s.split("=", 1) for s in args.set)}
        said += ["--set", *args.set]
    grid = Grid.read(path, args.scale, changes)
    if args.corpus:
        for content in (grid.content, *grid.settings.values()):
            if content is grid.content or "data" in content:
                content["data"] = {**(content.get("data") or {}), "corpus": args.corpus}
            content.pop("data_dir", None)
        grid.fields.pop("data_dir", None)
        grid.check(path)
        said += ["--corpus", args.corpus]
    changed = [f"--set {k}={v}" for k, v in changes.get("fields", {}).items() if k not in NO_MATTER] + [
        f"--corpus {args.corpus}"
    ] * bool(args.corpus)
    if changed and grid.published:
        grid.content["reduced"] = " ".join(
            filter(None, [grid.reduced, f"Changed on the command line: {', '.join(changed)}."])
        )
    return grid, said


def complete(args, grid: Grid) -> None:
    """Numbers of runs, threads and GPUs where the command line leaves them open. They depend on the grid and the machine
    alone: what is done already has no influence, so a sweep that goes on has the same threads, and the same bits."""
    for name in ("parallel", "threads", "ranks", "tokens_per_s"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name} must be positive, not {getattr(args, name)}")
    if not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu must lie in (0, 1], not {args.mfu}")
    if args.gpu and not args.plan:
        raise ValueError("--gpu is for --plan: runs take the GPUs that are here")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    args.gpus = (
        (visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())])
        if torch.cuda.is_available() and not args.gpu
        else []
    )
    total = max(1, len(grid.arms or {}) * len(grid.settings) * len(grid.seeds))
    room = 1 if args.gpu else len(args.gpus) // args.ranks if args.gpus else cores() // args.ranks
    if args.gpus and (args.parallel or 1) > room:
        raise ValueError(
            f"{args.parallel or 1} run(s) at a time of {args.ranks} rank(s) need more than the {len(args.gpus)} GPU(s) here"
        )
    if args.slurm or args.only:
        args.parallel, args.threads = 1, args.threads or (4 if args.slurm else max(1, cores() // args.ranks))
    elif torch.backends.mps.is_available():
        args.parallel = args.parallel or 1
    args.parallel = args.parallel or max(1, min(room, total))
    args.threads = args.threads or max(1, cores() // (args.parallel * args.ranks))


def run(path: Path, args, program: list[str]) -> int:
    """Do what the command line asks for with the grid at `path`; `program` is how a user would call it. Returns the exit code."""
    grid, said = grid_of(path, args)
    complete(args, grid)
    out = args.out or Path("runs") / "-".join(
        filter(None, (grid.name, args.scale if args.scale != "paper" else None, args.corpus))
    )
    grid.content["command"] = shlex.join(["python", *program, *said])
    if args.plan:
        print(plan(grid, out, args))
        return 0
    if args.status:
        print(status(planned_runs(grid, out)))
        return 0
    if args.slurm:
        own = [*program, *said, "--out", str(out), "--ranks", str(args.ranks), "--threads", str(args.threads)]
        prepare(grid, args.source)
        print(write_sbatch(args.slurm, grid, out, args, ["python", *program, *sys.argv[1 + (len(program) > 1) :]], own))
        return 0
    if args.collect:
        collect(grid, out, args.collect)
        print(report.write(args.collect))
        return 0
    if args.only and (unknown := set(args.only) - {r.name for r in grid.runs(out)}):
        raise ValueError(
            f"no run {sorted(unknown)[0]!r} in this grid: was the script made from another version of it? --status lists them"
        )
    (out / "logs").mkdir(parents=True, exist_ok=True)
    prepare(grid, args.source)
    if not args.only:
        write_grid(grid, out)
    runs = grid.runs(out)
    if runs and not args.only:
        how = f"{args.parallel} at a time, {args.ranks} process(es) of {args.threads} thread(s) each"
        print(
            f"{len(planned_runs(grid, out))} runs in {out}, {sum(r.done() for r in runs)} done already; {how}; logs in {out / 'logs'}",
            flush=True,
        )
    failed = execute(grid, out, args, args.only)
    if not args.only:
        if grid.throughput and (error := measure_throughput(grid, out)):
            failed["speed"] = error
        if any(r and r.done() for r in grid.main_runs(out)) or grid.throughput:
            print("\n" + report.write(out))
            print(
                "Written: "
                + ", ".join(
                    str(out / name) for name in ("table.md", "table.tex", "figure.png") if (out / name).is_file()
                )
            )
    for name, error in failed.items():
        print(f"\n{name}: {error}", file=sys.stderr)
    if failed:
        waiting = sum(r is None for r in grid.main_runs(out))
        waiting = f", and {waiting} wait for the learning rate of failed trials" if waiting else ""
        print(f"\n{len(failed)} run(s) failed{waiting}; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def exit_codes():
    """Errors as messages, and the exit code of a signal: 130 for Ctrl-C, 75 for the others, which a queue starts again."""

    def stop(number, frame):
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield
    except (ValueError, OSError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
    except Interrupted as interruption:
        print("\ninterrupted: the runs wrote their checkpoints; the same command goes on", file=sys.stderr)
        sys.exit(130 if interruption.number == signal.SIGINT else INTERRUPTED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    parser = parser_of("scripts/sweep.py", __doc__)
    parser.add_argument("grid", type=Path, help="a grid file; configs/sweeps/ has some")
    args = parser.parse_args()
    with exit_codes():
        sys.exit(run(args.grid, args, ["scripts/sweep.py", str(args.grid)]))


if __name__ == "__main__":
    main()
