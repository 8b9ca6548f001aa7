"""What a grid will cost, before anything starts: parameters, FLOPs and hours of every run, and their sum."""

import dataclasses
import statistics
import time
from pathlib import Path

import torch

from data.shards import cores
from nanope.config import RunConfig
from nanope.costs import key_of, outline
from nanope.gpus import PEAK_FLOPS, card_of, expected_mfu, peak_flops
from nanope.ops import linear
from nanope.plan import Plan
from nanope.plan import plan as plan_of_run
from nanope.study.files import Files, local
from nanope.study.grid import Grid, bench_variants
from nanope.study.results import bench_file
from nanope.study.run import Run
from nanope.study.status import state_of

# Seconds a layer that a GPU's host needs at least for the kernels of a forward and backward pass: a guess
LAUNCH = 2e-3
# The part of a core's speed in matrix products that training reaches: 0.38 in results/schemes, 0.37 in carope-1, 0.46
# in crope-2
CPU_PART = 0.4


def model_cost(config: RunConfig) -> tuple[int, int]:
    """(parameters, training FLOPs a token) of a config whose vocab_size is set. ValueError for a model that cannot be
    built."""
    model = outline(config.model_config())
    return model.parameter_count(), model.flops_per_token()


# ---- of one run


def run_plan(run: Run, ranks: int, root: Path) -> Plan:
    """The Plan of a run. Where the data are not there yet, the vocabulary is its tokenizer's. ValueError for what could
    not be run, such as a batch that does not divide over the ranks."""
    config = dataclasses.replace(run.config, data_dir=local(run.config.data_dir, root))
    name = Path(config.data_dir).name
    vocab_size = 257 if name.endswith("-byte") else 512 if name.startswith("task-") else None
    return plan_of_run(config, gpus=ranks, vocab_size=vocab_size, details=False)


def bench_cost(grid: Grid) -> tuple[int, float]:
    """(tokens, FLOPs) of the grid's `throughput`: rope and its variants, which differ by less than a percent, and a
    round to warm up."""
    t = grid.throughput
    shape = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    config = RunConfig(**{k: v for k, v in t.items() if k in shape})
    variants = len({"rope", *bench_variants(grid).values()})
    steps = (t.get("rounds", 7) + 1) * t.get("steps", 1)
    tokens = variants * steps * t.get("batch", 1) * config.block_size
    return tokens, tokens * model_cost(config)[1]


# ---- speeds


def flops_per_second(args) -> tuple[float, str]:
    """A guess at what one run computes a second, and where it is from. Finished runs tell more."""
    if args.gpu or torch.cuda.is_available():
        peak = PEAK_FLOPS[args.gpu] if args.gpu else peak_flops(torch.device("cuda"))
        if not peak:
            raise ValueError("this GPU's peak is not known: give --gpu, or --tokens_per_s, the speed of one run")
        mfu = expected_mfu(args.gpu or card_of(torch.cuda.get_device_name())) if args.mfu is None else args.mfu
        return args.ranks * mfu * peak, (
            f"{args.ranks} {args.gpu or 'GPU(s)'} a run at {mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s (--mfu), "
            f"or {LAUNCH * 1e3:g} ms a layer and micro-batch where that is longer, a guess"
        )
    core = CPU_PART * product_speed()
    text = f"{CPU_PART:g} of this machine's speed in the model's matrix product, a guess"
    return core * min(args.threads * args.ranks, cores()), text


def product_speed() -> float:
    """FLOPs a second of one thread in a matrix product, measured now."""
    torch.set_num_threads(1)
    x, times = torch.randn(512, 512), []
    for _ in range(20):
        start = time.perf_counter()
        linear(x, x)
        times.append(time.perf_counter() - start)
    return 2 * 512**3 / min(times)


def measured_speeds(runs: list[Run]) -> dict[str, float]:
    """Median tokens a second of the runs that have started, by the key_of their model."""
    found = {}
    for run in runs:
        if speeds := run.series("tokens_per_s")[1][1:]:
            found[key_of(run.config.model_config())] = statistics.median(speeds)
    return found


def guessed_speed(plan: Plan, flops: float, gpu: bool) -> float:
    """Tokens a second at `flops` FLOPs a second. On a GPU the launches of its kernels take time too."""
    seconds = plan.config.batch_tokens * plan.flops_per_token / flops  # a step
    if gpu:
        seconds = max(seconds, plan.accumulation * plan.config.n_layer * LAUNCH)
    return plan.config.batch_tokens / seconds


# ---- of the grid


@dataclasses.dataclass
class Row:
    """A line of the plan, with what is left to do."""

    cells: list[str]
    flops: float = 0.0
    hours: float = 0.0
    fails: bool = False

    def __str__(self) -> str:
        return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in self.cells)}|"


def plan(grid: Grid, files: Files, args) -> str:
    """The runs as a table, with parameters, tokens, FLOPs of training, hours with validation, and their sum. What is
    done costs nothing more. With --gpu all times are of that GPU, whatever ran here."""
    runs, gpu = grid.planned_runs(files), bool(args.gpu or args.gpus)
    measured = {} if args.gpu else measured_speeds(runs)
    guess, source = (None, "") if args.tokens_per_s else flops_per_second(args)

    def speed_of(run: Run, plan: Plan) -> float:
        return args.tokens_per_s or measured.get(key_of(run.config.model_config())) or guessed_speed(plan, guess, gpu)

    rows = [row_of_run(run, args, speed_of) for run in runs]
    if grid.throughput:
        rows.append(row_of_bench(grid, files, args.tokens_per_s, guess / args.ranks if guess else None))
    hours, failing = sum(row.hours for row in rows), sum(row.fails for row in rows)
    lines = ["| run | state | parameters | tokens | FLOPs | hours |", "|---|---|--:|--:|--:|--:|", *map(str, rows), ""]
    lines.append(
        f"{len(runs)} runs, {sum(r.done() for r in runs)} done{f', {failing} cannot run' if failing else ''}. "
        f"Still to train: {sum(row.flops for row in rows):.3g} FLOPs, {hours:.2f} run-hours with validation, "
        f"{makespan(rows, args.parallel):.2f} hours with {args.parallel} at a time; evaluation comes on top."
    )
    if args.tokens_per_s:
        source = f"{args.tokens_per_s:,.0f} tokens/s (--tokens_per_s)"
    elif not args.gpu:
        source = f"measured where runs of the same shape are there, else {source}"
    lines.append(f"Speed of a run: {source}.")
    if grid.tune:
        lines.append("The learning rates of the main runs are tuned first; until then the grid's own stand for them.")
    if args.price_per_hour is not None:
        devices = args.ranks if gpu or args.tokens_per_s else 1
        lines.append(
            f"Cost: {hours * devices * args.price_per_hour:,.2f} at {args.price_per_hour:,.2f} an hour "
            f"for each of {devices} device(s) a run."
        )
    return "\n".join(lines)


def row_of_run(run: Run, args, speed_of) -> Row:
    try:
        plan = run_plan(run, args.ranks, args.root)
    except ValueError as error:
        return Row([run.name, f"cannot run: {error}", "", "", "", ""], fails=True)
    left = 0.0 if run.trained() or run.diverged() else 1 - run.step() / run.max_steps
    hours = left * plan.tokens * (1 + plan.validation) / speed_of(run, plan) / 3600
    figures = [f"{plan.parameters['total']:,}", f"{plan.tokens:,}", f"{plan.flops:.3g}", f"{hours:.2f}"]
    return Row([run.name, state_of(run), *figures], left * plan.flops, hours)


def row_of_bench(grid: Grid, files: Files, tokens_per_s: float | None, flops_per_s: float | None) -> Row:
    """scripts/bench.py, on one device."""
    tokens, flops = bench_cost(grid)
    done = files.bench(bench_file(grid)) is not None
    hours = 0.0 if done else tokens / (tokens_per_s or flops_per_s / (flops / tokens)) / 3600
    cells = [
        "speed, scripts/bench.py",
        "done" if done else "waiting",
        "",
        f"{tokens:,}",
        f"{flops:.3g}",
        f"{hours:.2f}",
    ]
    return Row(cells, 0.0 if done else flops, hours)


def makespan(rows: list[Row], parallel: int) -> float:
    """Hours until all are done, `parallel` at a time, in their order."""
    free = [0.0] * parallel  # when each slot is free again
    for row in rows:
        free[free.index(min(free))] += row.hours
    return max(free)
