"""The command line of scripts/sweep.py: its options, the grid that they make, and what they leave to the machine."""

import argparse
import os
from pathlib import Path

import torch

from data.shards import as_path, cores, given_path
from nanope.config import ELSEWHERE, ROUTINE
from nanope.errors import nearest
from nanope.gpus import PEAK_FLOPS
from nanope.study.grid import Grid
from nanope.values import read_yaml


def source(text: str) -> str:
    """The --source of the command line: PATH, or CORPUS=PATH, with the path as it is meant."""
    corpus, equals, path = text.partition("=")
    return f"{corpus}={given_path(path)}" if equals else given_path(text)


def parser_of(program: str, description: str) -> argparse.ArgumentParser:
    """The options, less the grid's name."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_argument_group("what to run").add_argument
    what("--scale", help="one of the grid's scales (default: paper, the grid as it stands)")
    what("--arms", "--schemes", nargs="+", metavar="ARM", help="only these arms; names of schemes are always arms")
    what("--settings", nargs="+", metavar="SETTING", help="only these settings")
    what("--seeds", type=int, nargs="+", metavar="N", help="a number of seeds, or several seeds themselves")
    what("--corpus", help="another corpus for all settings, as data/prepare.py names it")
    text = "fields of train.py for all runs, such as max_steps=100; what an arm has of its own stays"
    what("--set", nargs="+", default=[], metavar="FIELD=VALUE", help=text)

    where = parser.add_argument_group("where and how").add_argument
    where("--out", type=as_path, help="folder of the runs (default: runs/NAME of the grid, with scale and corpus)")
    text = "text for data/prepare.py to read instead of downloading it; CORPUS=PATH where there are several"
    where("--source", nargs="+", type=source, metavar="PATH", help=text)
    text = "results whose runs count as done, such as results/all-schemes: only what they lack is trained"
    where("--known", type=as_path, metavar="DIR", help=text)
    where("--parallel", type=int, help="runs at a time (default: as many as fit on the GPUs, else one a core)")
    where("--threads", type=int, help="CPU threads a process (default: the cores over the processes at a time)")
    text = "processes a run, by torchrun: a GPU each, or on a CPU --threads each (default: 1)"
    where("--ranks", type=int, default=1, help=text)
    text = "write a SLURM array script of the runs that are not done, and stop"
    where("--slurm", type=as_path, metavar="FILE", help=text)
    where("--only", nargs="+", metavar="RUN", help="these runs by name, and no table: an element of the array")

    look = parser.add_argument_group("without running anything").add_argument
    look("--plan", action="store_true", help="print runs, FLOPs and hours")
    look("--price_per_hour", type=float, help="of one device, for --plan")
    text = "for --plan: hours on such GPUs, --ranks a run, --parallel runs at a time, on a machine without one too"
    look("--gpu", type=str.upper, choices=PEAK_FLOPS, help=text)
    text = "speed of one run, for --plan (default: that of finished runs, else a guess)"
    look("--tokens_per_s", type=float, help=text)
    text = "for --plan on GPUs: part of the peak that training reaches (default: a guess by GPU)"
    look("--mfu", type=float, help=text)
    look("--status", action="store_true", help="print where every run stands")
    text = "put the finished runs into one file, DIR/runs.jsonl, with tables and figure beside it"
    look("--collect", type=as_path, metavar="DIR", help=text)
    text = "make the tables and the figure of this folder of runs or results again"
    look("--from", dest="folder", type=as_path, metavar="DIR", help=text)
    return parser


def grid_path(name: str, root: Path) -> Path:
    """The file of a grid: a path, or a bare name such as crope-2, which is a file in configs/sweeps."""
    folder = Path(root) / "configs" / "sweeps"
    if Path(name).is_file() or Path(name).name != name or Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    names = sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "wandb")  # wandb's own sweep, no grid
    if name not in names:
        raise ValueError(f"no grid {name!r}{nearest(name, names)} (configs/sweeps has {', '.join(names)})")
    return folder / f"{name}.yaml"


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
        changes["fields"] = fields_of(args.set)
        said += ["--set", *args.set]
    grid = Grid.read(path, args.scale, changes)
    if args.corpus:
        grid.use_corpus(args.corpus)
        said += ["--corpus", args.corpus]
    changed = [f"--set {k}={v}" for k, v in changes.get("fields", {}).items() if k not in (*ELSEWHERE, *ROUTINE)]
    changed += [f"--corpus {args.corpus}"] * bool(args.corpus)
    if changed and grid.published:
        texts = [grid.reduced, f"Changed on the command line: {', '.join(changed)}."]
        grid.reduced = " ".join(filter(None, texts))
    return grid, said


def fields_of(settings: list[str]) -> dict:
    """The fields that --set gives, each FIELD=VALUE with a value as YAML has it."""
    found = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes FIELD=VALUE, not {text!r}")
        try:
            found[name] = read_yaml(value)
        except ValueError as error:
            raise ValueError(f"--set {text}: {error}") from error
    return found


def visible_gpus() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def complete(args, grid: Grid, gpus: list[str]) -> None:
    """Fill in the numbers of runs, threads and GPUs that the command line leaves open. They depend on the grid and the
    machine alone: what is done already has no influence, so a sweep that goes on has the same threads, and the same
    bits. ValueError for what cannot be."""
    for name in ("parallel", "threads", "ranks", "tokens_per_s"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name} must be positive, not {getattr(args, name)}")
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu must lie in (0, 1], not {args.mfu}")
    for name in ("gpu", "price_per_hour", "tokens_per_s", "mfu"):
        if getattr(args, name) is not None and not args.plan:
            raise ValueError(f"--{name} is for --plan" + ": runs take the GPUs that are here" * (name == "gpu"))
    args.gpus = [] if args.gpu else gpus
    total = max(1, len(grid.arms) * len(grid.settings) * len(grid.seeds))
    room = 1 if args.gpu else (len(args.gpus) or cores()) // args.ranks
    if args.gpus and (args.parallel or 1) > room:
        many = f"{args.parallel or 1} run(s) at a time of {args.ranks} rank(s)"
        raise ValueError(f"{many} need more than the {len(args.gpus)} GPU(s) here")
    if args.slurm or args.only:
        args.parallel, args.threads = 1, args.threads or (4 if args.slurm else max(1, cores() // args.ranks))
    elif torch.backends.mps.is_available():
        args.parallel = args.parallel or 1
    args.parallel = args.parallel or max(1, min(room, total))
    args.threads = args.threads or max(1, cores() // (args.parallel * args.ranks))
