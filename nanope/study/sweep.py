"""What scripts/sweep.py does, in the order in which it happens: read the grid, make the data, run, report."""

import argparse
import contextlib
import itertools
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from data.shards import given_path, output
from nanope import REPO, schedule
from nanope.config import RunConfig
from nanope.errors import nearest
from nanope.study import report
from nanope.study.costs import plan
from nanope.study.files import RUNS_FILE, RunFolders
from nanope.study.grid import Grid
from nanope.study.options import complete, grid_of, grid_path, parser_of, visible_gpus
from nanope.study.results import collect, unpack
from nanope.study.runner import INTERRUPTED, Interrupted, Runner, measure_throughput, prepare
from nanope.study.slurm import write_script
from nanope.study.status import status

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main(
    program: str,
    description: str,
    tables: dict[str, str] | None = None,
    arguments: list[str] | None = None,
    root: Path = REPO,
) -> None:
    """A command, `program`, that runs grids. Ends the process with an exit code.

    tables: the grids that it takes, by name (default: any). arguments: its command line (default: that of the process).
    root: the folder that holds configs/sweeps and data.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of(program, description)
    kind = "TABLE" if tables else "GRID"
    parser.add_argument(
        "grid", metavar=kind, type=given_path, help="a name, or a grid file" if not tables else f"{', '.join(tables)}"
    )
    args = parser.parse_args(arguments)
    args.root = root
    if tables and args.grid not in tables:
        parser.error(f"no table {args.grid!r}{nearest(args.grid, tables)} (tables: {', '.join(tables)})")
    with exit_codes():
        sys.exit(run(args, program, ["python", program, *arguments]))


def run(args: argparse.Namespace, program: str, command: list[str]) -> int:
    """Do what the command line asks for. `command`: as it was typed. Returns the exit code."""
    if args.folder:
        output(report.write(args.folder))
        return 0
    grid, said = grid_of(grid_path(args.grid, args.root), args)
    complete(args, grid, visible_gpus())
    parts = [grid.name, args.scale if args.scale != "paper" else None, args.corpus]
    files = RunFolders(args.out or Path("runs") / "-".join(filter(None, parts)))
    grid.command = shlex.join(["python", program, args.grid, *said])
    if grid.reduced:
        output(f"Reduced: {' '.join(grid.reduced.split())}\n")

    configs = [RunConfig(**grid.fields_of(*pair)) for pair in itertools.product(grid.settings, grid.arms)]
    for text in dict.fromkeys(filter(None, map(schedule.warning, configs))):
        print(f"warning: {text}", file=sys.stderr)

    if args.known and not (args.known / RUNS_FILE).is_file():
        raise ValueError(f"--known {args.known} holds no {RUNS_FILE}: give results, a folder that --collect made")
    for name, given in (("plan", args.plan), ("status", args.status), ("collect", args.collect)):
        if given and args.known:
            raise ValueError(f"--{name} takes nothing from elsewhere: leave --known out")
    if args.plan:
        output(plan(grid, files, args))
        return 0
    if args.status:
        output(status(grid.planned_runs(files)))
        return 0
    if args.collect:
        collect(grid, files, args.collect)
        report.start_readme(grid, args.collect)
        output(report.write(args.collect))
        return 0
    if (files.folder / RUNS_FILE).exists():
        raise ValueError(f"{files.folder} holds results, {RUNS_FILE}: give another folder for the runs, --out")
    if args.only and (unknown := {*args.only} - {run.name for run in grid.runs(files)}):
        name = sorted(unknown)[0]
        raise ValueError(
            f"no run {name!r} in this grid: was the script made from another version of it? --status lists them"
        )
    prepare(grid, args.source, args.root)
    if args.known:
        output(f"{unpack(grid, files, args.known, args.root)} runs taken from {args.known}")
    if old := [run for run in grid.runs(files) if run.other_code()]:
        raise ValueError(
            f"{len(old)} run(s) were trained with other code of their scheme than {old[0].config.pos} holds now, such "
            f"as {old[0].folder}: delete these folders, or give another --out, which keeps them"
        )
    if args.slurm:
        element = [program, args.grid, *said, "--out", str(files.folder)]
        element += ["--ranks", str(args.ranks), "--threads", str(args.threads)]
        output(write_script(args.slurm, grid, files, args, command, element))
        return 0
    return work(grid, files, args)


def work(grid: Grid, files: RunFolders, args: argparse.Namespace) -> int:
    """Run what is not done, measure speeds, make the tables. Returns the exit code."""
    out, runs = files.folder, grid.runs(files)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    if args.only:
        return told(grid, files, Runner(grid, files, args, args.only).execute(), whole=False)

    grid.write(out)
    if runs:
        how = f"{args.parallel} at a time, {args.ranks} process(es) of {args.threads} thread(s) each"
        count = f"{len(grid.planned_runs(files))} runs in {out}, {sum(run.done() for run in runs)} done already"
        output(f"{count}; {how}; logs in {out / 'logs'}")
    failed = Runner(grid, files, args).execute()
    if grid.throughput and (error := measure_throughput(grid, files)):
        failed["speed"] = error
    if grid.throughput or any(run and run.done() for run in grid.main_runs(files)):
        grid.write(out)  # another sweep of the folder, with other arms, may have written its own meanwhile
        output("\n" + report.write(out))
        made = [out / name for name in ("table.md", "table.tex", "figure.png", "figure.pdf")]
        output("Written: " + ", ".join(str(path) for path in made if path.is_file()))
    return told(grid, files, failed)


def told(grid: Grid, files: RunFolders, failed: dict[str, str], whole: bool = True) -> int:
    """Print the errors of runs that failed, and of a whole grid how many have no learning rate. Returns the exit
    code."""
    for name, error in failed.items():
        print(f"\n{name}: {error}", file=sys.stderr)
    waiting, found = sum(run is None for run in grid.main_runs(files)) if whole else 0, []
    ended = [run.name for run in grid.runs(files) if run.name in failed and run.diverged()]
    if again := len(failed) - len(ended):
        found.append(f"{again} run(s) failed: the same command tries them again")
    if ended:
        found.append(f"{len(ended)} diverged, and are not tried again")
    if waiting:
        found.append(f"{waiting} wait for a learning rate: trials failed, or diverged at every rate")
    if found:
        print(f"\n{'; '.join(found)}", file=sys.stderr)
    return 1 if failed or waiting else 0


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Errors as messages, and the exit code of a signal: 130 for Ctrl-C, 75 for the others, after which a queue starts
    the command again."""

    def stop(number, frame):
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except Interrupted as interruption:
        print("\ninterrupted: the runs wrote their checkpoints; the same command goes on", file=sys.stderr)
        sys.exit(130 if interruption.number == signal.SIGINT else INTERRUPTED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
