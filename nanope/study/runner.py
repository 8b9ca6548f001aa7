"""Runs the commands that a grid needs as processes: data/prepare.py, train.py, eval.py, scripts/bench.py.

Killed and started again, it goes on: what is done is read from files, and what still runs holds its lock.
"""

import dataclasses
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import yaml

from data.corpora import planned
from data.shards import output
from nanope import REPO
from nanope.study.files import RunFolders, local
from nanope.study.grid import Grid, as_list, bench_variants, folder_of
from nanope.study.locks import alone, held, take
from nanope.study.results import bench_file
from nanope.study.run import Run
from nanope.study.status import Display

# Arguments of data/prepare.py that decide what is in a folder, beside corpus and tokenizer
OF_DATA = ("subset", "dataset", "config", "split", "revision", "field", "separator", "val_tokens", "val_bytes")
OF_DATA += ("long_tokens", "shard_tokens", "skip_bad")
# torchrun would not pass SIGUSR1 on, and would kill its ranks 30 seconds after a signal, in the midst of a checkpoint
PATIENT = ("--signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown_timeout=110")
INTERRUPTED = 75  # EX_TEMPFAIL, the exit code of what goes on where it is started again


class Interrupted(BaseException):
    """A signal came."""

    def __init__(self, number: int):
        self.number = number


# ---- before the runs: data


def prepare(grid: Grid, sources: list[str] | None, root: Path = REPO) -> None:
    """Make the data folders that are missing, under `root`. sources: PATH, or CORPUS=PATH where there are several
    corpora. Those of tasks are checked where they are there: a name does not tell the lengths in it. ValueError where
    data/prepare.py fails, for two settings with different data in one folder, and where an evaluation is on data that
    are not there."""
    wanted = {}
    for setting in grid.settings if grid.arms else ():
        if (data := grid.data_of(setting)) and (other := wanted.setdefault(folder_of(data), data)) != data:
            raise ValueError(f"two settings have different data in one folder, {folder_of(data)}: {other} and {data}")
    for name, report in grid.eval.items():
        where = report.get("data")
        if where not in (None, *wanted) and not (Path(local(where, root)) / "manifest.json").is_file():
            raise ValueError(f"the report {name!r} is on {where}, which is not there: make it by data/prepare.py first")
    named = dict(s.split("=", 1) if "=" in s else (None, s) for s in sources or ())
    if None in named and len({data["corpus"] for data in wanted.values()}) > 1:
        each = " ".join(f"{data['corpus']}=PATH" for data in wanted.values())
        raise ValueError(f"--source needs a name for each of several corpora: --source {each}")
    for name, data in wanted.items():
        folder, is_task = local(name, root), data["corpus"] == "task"
        manifest = Path(folder) / "manifest.json"
        if manifest.is_file() and not is_task:
            check_made(folder, data)
            continue
        what = [data["corpus"], *([data["task"]] if is_task else [])]
        options = {k: v for k, v in data.items() if k not in ("corpus", "task")}
        if source := named.get(data["corpus"], named.get(None)):
            options["source"] = source
        command = [sys.executable, str(REPO / "data" / "prepare.py"), *what, "--out", folder, *flags(options)]
        with alone(Path(f"{folder}.lock"), f"preparing {folder}") as lock:
            needed = is_task or not manifest.is_file()
            if needed and subprocess.run(command, pass_fds=[lock.fileno()]).returncode:
                raise ValueError(f"the data were not made: {shlex.join(command[1:])}")


def check_made(folder: str, data: dict) -> None:
    """ValueError where a data folder was made with other options than a grid gives: its name tells corpus and tokenizer
    alone."""
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    corpus = planned(manifest)
    there = manifest | manifest.get("hub", {}) | {"field": corpus.field, "separator": corpus.separator}
    for name, asked in data.items():
        if name in OF_DATA and there.get(name) != asked:
            raise ValueError(
                f"{folder} was made with {name} {there.get(name)}, and the grid's data has {name} {asked}: delete the "
                "folder, which is then made again, or change the grid"
            )


def flags(arguments: dict) -> list[str]:
    """A command line's options: --name value …; --name alone for true, nothing for false."""
    found = []
    for name, value in arguments.items():
        if value is not False:
            found += [f"--{name}", *([] if value is True else map(str, as_list(value)))]
    return found


# ---- one run


@dataclasses.dataclass
class Work:
    """A run that this process works on, stage by stage: training, then each evaluation. The process of a stage holds
    the run's lock too, so that it is left alone where this process is killed and started again."""

    run: Run
    slot: int
    lock: TextIO
    ranks: int
    environment: dict  # the threads or GPUs of the slot
    root: Path
    stage: str = ""
    process: subprocess.Popen | None = None
    log_start: int = 0

    @property
    def log(self) -> Path:
        return self.run.files.folder / "logs" / f"{self.run.name}.log"

    def next_stage(self) -> str | None:
        """The next stage that is missing: training, or the name of an evaluation."""
        if not self.run.trained():
            return "training"
        return next(iter(self.run.missing_reports()), None)

    def command(self, stage: str) -> list[str]:
        run, data = self.run, local(self.run.config.data_dir, self.root)
        if stage == "training":
            config = self.log.with_suffix(".yaml")
            fields = {**run.fields, "data_dir": data, "out_dir": str(run.folder), "resume": True}
            config.write_text(yaml.safe_dump(fields, sort_keys=False))
            return launched([str(REPO / "train.py"), "--config", str(config)], self.ranks)
        where, options = ["--run", str(run.folder), "--json", str(run.report_path(stage))], run.evaluations[stage]
        if "data" in options:  # another folder than the run's; as all of a grid, relative to the repository
            options = options | {"data": local(options["data"], self.root)}
        # Named only where the run's own path leads elsewhere from here: unnamed, eval.py checks that it is the run's
        elif Path(run.files.config(run.name)["data_dir"]).resolve() != Path(data).resolve():
            where += ["--data", data]
        return launched([str(REPO / "eval.py"), *where, *flags(options)], self.ranks)

    def start(self, stage: str) -> None:
        """Start a stage. What it prints goes to the run's log."""
        self.stage, command = stage, self.command(stage)
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
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            )

    def error(self) -> str | None:
        """What went wrong in the stage that has ended."""
        if not self.process.returncode:
            again = self.next_stage() == self.stage
            return f"{self.stage} ended without a result, and without an error: see {self.log}" if again else None
        text = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        end = "\n".join("    " + line for line in text.splitlines()[1:][-8:])
        return f"{self.stage} ended with exit code {self.process.returncode}; the end of {self.log}:\n{end}"


def launched(command: list[str], ranks: int) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *PATIENT, "--"]
    return [sys.executable, *(torchrun if ranks > 1 else []), *command]


def slots_of(args) -> list[dict]:
    """The environment of each run at a time: threads, or GPUs of its own."""
    if args.gpus:
        shares = [args.gpus[i * args.ranks : (i + 1) * args.ranks] for i in range(args.parallel)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]
    return [{"OMP_NUM_THREADS": str(args.threads)} for _ in range(args.parallel)]


# ---- all runs


class Runner:
    """Does everything of a grid that is not done, args.parallel runs at a time. `only`: these runs by name."""

    def __init__(self, grid: Grid, files: RunFolders, args, only: list[str] | None = None):
        self.grid, self.files, self.args, self.only = grid, files, args, only
        self.slots, self.host = slots_of(args), socket.gethostname()
        self.works: list[Work] = []
        self.failed: dict[str, str] = {}
        self.display = Display(len(only) if only else len(grid.arms) * len(grid.settings) * len(grid.seeds))

    def execute(self) -> dict[str, str]:
        """Run, and wait for what other processes are at. Returns the errors of runs that failed, by name. On
        Interrupted, and on any error: pass the signal on, wait for the checkpoints, raise it again."""
        self.look()
        try:
            while self.works or self.unfinished:
                elsewhere = self.start_what_fits()
                self.reap()
                if self.changed or elsewhere:
                    self.look()
                self.display.show(self.runs, [w.run for w in self.works] + elsewhere, self.failed)
                time.sleep(0.3)
            return self.failed
        except BaseException:
            for work in self.works:
                work.process.send_signal(signal.SIGTERM)
            for work in self.works:
                work.process.wait()
            raise
        finally:
            self.display.clear()

    def look(self) -> None:
        """See which runs there are by now, and which of them are to be done."""
        self.changed = False  # a stage has ended: the outcome of trials may make more runs known
        runs = self.grid.runs(self.files)
        self.runs = [run for run in runs if run.name in self.only] if self.only else runs
        self.unfinished = [run for run in self.runs if run.name not in self.failed and not run.done()]

    def start_what_fits(self) -> list[Run]:
        """Start runs in the slots that are free. Returns the runs that other processes work on, such as what a killed
        sweep left running: those on this machine keep their slots."""
        mine = {work.run.name for work in self.works}
        holders = {run.name: held(run) for run in self.unfinished if run.name not in mine}
        elsewhere = [run for run in self.unfinished if holders.get(run.name)]
        here = [holders[r.name].split()[1] for r in elsewhere if holders[r.name].startswith(f"{self.host} ")]
        taken = {*here, *(str(work.slot) for work in self.works)}
        free = [i for i in range(len(self.slots)) if str(i) not in taken]
        free = free[: max(0, len(self.slots) - len(self.works) - len(here))]
        for run in self.unfinished:
            if free and run.name not in mine and run not in elsewhere and self.start(run, free[0]):
                free.pop(0)
        return elsewhere

    def start(self, run: Run, slot: int) -> bool:
        """Start the next stage of a run; False where another process has its lock, or has finished it."""
        lock = take(run, slot)
        if lock is None:
            return False
        work = Work(run, slot, lock, self.args.ranks, self.slots[slot], self.args.root)
        stage = work.next_stage()
        if stage is None or (stage == "training" and run.bare()):
            lock.close()
            self.changed = True
            if stage:
                self.failed[run.name] = (
                    f"it has ended, and its checkpoint, which the evaluation {run.missing_reports()[0]!r} needs, is "
                    f"gone: delete {run.folder}, and the same command trains it again"
                )
            return False
        work.start(stage)
        self.works.append(work)
        return True

    def reap(self) -> None:
        """Go on with the runs whose stage has ended: start the next, or say that the run is done, or has failed."""
        for work in [work for work in self.works if work.process.poll() is not None]:
            self.changed = True
            error, stage = work.error(), work.next_stage()
            if error is None and stage:
                work.start(stage)
                continue
            self.works.remove(work)
            work.lock.close()
            if error:
                self.failed[work.run.name] = error
                self.display.say(f"{work.run.name}: failed in {work.stage}")
            else:
                self.display.say(f"{work.run.name}: done")


# ---- after the runs: speed


def measure_throughput(grid: Grid, files: RunFolders) -> str | None:
    """Measure speeds by scripts/bench.py, alone on the machine, unless they are there. Returns what went wrong."""
    target = files.folder / bench_file(grid)
    with alone(files.folder / "logs" / "speed.lock", "measuring speeds") as lock:
        if target.is_file():
            return None
        partial = target.with_name(f".{target.name}.partial")
        options = {**grid.throughput, "schemes": [*bench_variants(grid).values()]}
        command = [sys.executable, str(REPO / "scripts" / "bench.py"), "--no_peer", "--json", str(partial)]
        command += flags(options)
        output(f"speed: {shlex.join(command[1:])}")
        code = subprocess.run(command, stdout=subprocess.DEVNULL, pass_fds=[lock.fileno()]).returncode
        if code:
            return f"scripts/bench.py ended with exit code {code}; its message is above"
        os.replace(partial, target)
        return None
