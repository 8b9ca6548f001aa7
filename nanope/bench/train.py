"""Training speed and peak memory: each scheme relative to rope, and rope relative to nanoGPT and to transformers'
GPT-2, in one interleaved run.

    python scripts/bench.py                                    # shape `small`: 4 layers × 128, vocabulary 50,304, T 256
    python scripts/bench.py --shape all --nanogpt ../nanoGPT   # every shape, beside a clone of karpathy/nanoGPT
    python scripts/bench.py --shape bytes --schemes carope     # the quickstart's size; also --n_layer, --batch …
    python scripts/bench.py --schemes all --no_peer --json all.json    # every scheme of model.SCHEMES, 7 at a time
    python scripts/bench.py --from all.json                    # its table again, for a page

Other kinds: `bench.py eval`, `bench.py data`, `bench.py feed`, each with --help.

Each variant lives in a process of its own, so that its peak memory is its own. The processes take turns, a few
optimizer steps each, and only one works at a time. Ratios are taken within a round and their median over rounds is
printed, so a machine whose speed drifts does not favour anyone. The first round is a warm-up. All processes of a run
are kept: more variants than --together are measured group after group, with a rope in each.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from data.shards import as_path, output
from model import GPT, SCHEMES, Block, GPTConfig, resolve
from nanope import coordinates
from nanope.bench.turns import (
    Worker,
    check_counts,
    command_line,
    heading,
    ratios,
    rope_ratios,
    row,
    spread,
    take_turns,
    workers,
)
from nanope.config import SWITCHES
from nanope.distributed import autocast, peak_memory, pick_device, use_dtype
from nanope.log import device_name
from nanope.values import number, read_yaml

COUNTS = ("rounds", "together", "steps", "threads")
FIELDS = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "batch")
SHAPES = {  # FIELDS, and steps a round
    "small": ((4, 4, 128, 50304, 256, 16), 2),
    "medium": ((6, 6, 384, 50304, 256, 8), 1),
    "gpt2": ((12, 12, 768, 50304, 512, 1), 1),
    "bytes": ((4, 4, 128, 320, 256, 16), 8),
}
BASELINE, PEERS = "rope", ("nanogpt", "transformers")
# On one CPU thread: least speed of a scheme relative to rope, and of rope relative to a peer
SPEEDS = {"learned": 1.0, "crope": 1.0, "comrope": 0.97, "carope": 0.92, "alibi": 0.85}
CLOSED_FORM = ("t5", "kerple", "fire", "xpos", "prope", "lerope", "sinusoidal", "none")  # of positions alone
OF_CONTENT = ("fox", "cable", "gape", "selective", "pope")
DENSE = ("cope", "path", "grape", "stickbreaking", "urpe", "seqpe")  # their speed is stated, without a target
TARGETS = {
    "small": SPEEDS
    | dict.fromkeys(CLOSED_FORM, 0.9)
    | dict.fromkeys(OF_CONTENT, 0.75)
    | {"nanogpt": 1.9, "transformers": 1.7},
    "medium": {"nanogpt": 1.25},
    "gpt2": {"nanogpt": 1.3},
    "bytes": SPEEDS | {"nanogpt": 1.15},
}
# Most memory of a scheme relative to rope, and of rope relative to a peer
MEMORY_TARGETS = {"small": {"nanogpt": 0.22, "transformers": 0.3} | dict.fromkeys(DENSE, 3.0)}

# ---- variants


def scheme_of(variant: str) -> dict:
    """A variant "comrope block=2 kind=ld qk_norm=true" as fields of a GPTConfig: pos, pos_options, and the switches
    that it names.

    A pattern over the layers is a list without spaces: "[rope,none] window=[64,0]". Documents end with token 0.
    ValueError for another form.
    """
    pos, *options = variant.split() or [""]
    if odd := [option for option in options if "=" not in option]:
        raise ValueError(f"{odd[0]!r} is no option=value")
    options = {k: number(read_yaml(v)) for k, v in (o.split("=", 1) for o in options)}
    switches = {name: options.pop(name) for name in SWITCHES if name in options}
    if switches.get("document_mask"):
        switches["eot"] = 0
    return {"pos": read_yaml(pos) if pos.startswith("[") else pos, "pos_options": options, **switches}


def check(variant: str, shape: dict) -> None:
    """ValueError for what no model can be built of."""
    config = resolve(GPTConfig(**scheme_of(variant), **{k: v for k, v in shape.items() if k != "batch"}))
    with torch.device("meta"):
        for layer in range(config.n_layer):
            Block(config, layer)


# Each of the three makes, of a model's shape, (model, loss of inputs x and targets y, optimizer), compiled or not


def our_model(variant: str, shape: dict, device: torch.device, compiled: bool) -> tuple:
    model = GPT(GPTConfig(**scheme_of(variant), **shape)).to(device)
    model.describe_tokens(coordinates.made_up(shape["vocab_size"]))
    if compiled:
        model.compile_parts()
    return model, lambda x, y: model(x, y)[1], adamw(model)


def nanogpt_model(folder: str, shape: dict, device: torch.device, compiled: bool) -> tuple:
    """nanoGPT's model.py, as a module of another name than ours. It has its own loss and its own choice of optimizer,
    which is not fused on a CPU."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    sys.modules["nanogpt"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(bias=False, dropout=0.0, **shape)).to(device)
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
    model = torch.compile(model) if compiled else model
    return model, lambda x, y: model(x, y)[1], optimizer


def transformers_model(shape: dict, device: torch.device, compiled: bool) -> tuple:
    import transformers

    transformers.logging.set_verbosity_error()
    shape = dict(shape)
    config = transformers.GPT2Config(
        n_positions=shape.pop("block_size"), bos_token_id=0, eos_token_id=0, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shape,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(device)
    model = torch.compile(model) if compiled else model
    return model, lambda x, y: model(input_ids=x, labels=x).loss, adamw(model)  # it shifts the labels itself


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


# ---- the measurement


def stopwatch(device: torch.device) -> tuple[Callable, Callable]:
    """mark(), a moment in the device's work, and seconds(a, b) between two. On CUDA a moment is an event in its stream,
    for which the host does not wait before `seconds` is asked."""
    if device.type != "cuda":
        return time.perf_counter, lambda a, b: b - a

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(a: torch.cuda.Event, b: torch.cuda.Event) -> float:
        b.synchronize()
        return a.elapsed_time(b) / 1e3

    return mark, seconds


def trainer(variant: str, shape: dict, args: argparse.Namespace) -> Callable[[int], tuple[float, float, int]]:
    """A worker: builds one model. For a number of steps it answers (seconds, of these in the optimizer, peak bytes)."""
    device = pick_device(args.device)
    if args.threads or device.type == "cpu":
        torch.set_num_threads(args.threads or 1)
    dtype = use_dtype(args.dtype, device)
    shape = dict(shape)
    batch = shape.pop("batch")
    if variant == "transformers":
        model, loss_of, optimizer = transformers_model(shape, device, args.compile)
    elif variant == "nanogpt":
        model, loss_of, optimizer = nanogpt_model(args.nanogpt, shape, device, args.compile)
    else:
        model, loss_of, optimizer = our_model(variant, shape, device, args.compile)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape["vocab_size"], (batch, shape["block_size"] + 1), generator=generator).to(device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    mark, seconds = stopwatch(device)

    def steps(count: int) -> tuple[float, float, int]:
        start, optimizing = mark(), []
        for _ in range(count):
            with autocast(device, dtype):
                loss = loss_of(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = mark()
            optimizer.step()
            optimizing.append((before, mark()))
            optimizer.zero_grad(set_to_none=True)
        taken = seconds(start, mark())
        return taken, sum(seconds(*pair) for pair in optimizing), peak_memory(device)

    return steps


def groups(variants: list[str], together: int) -> list[list[str]]:
    """The baseline with at most `together` of the others, as often as it takes, in groups of about one size."""
    others = [v for v in variants if v != BASELINE]
    size = -(-len(others) // max(1, -(-len(others) // together))) or 1
    return [[BASELINE, *others[i : i + size]] for i in range(0, len(others), size)] or [[BASELINE]]


def measure(variants: list[str], shape: dict, steps: int, args: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Variant → seconds a step in each round, the same less the optimizer, and peak bytes."""
    with workers(Worker(variant, trainer, variant, shape, args) for variant in variants) as started:
        ways = {worker.name: lambda _, worker=worker: worker.ask(steps) for worker in started}
        answers = take_turns(ways, args.rounds)
    seconds = {v: [taken / steps for taken, _, _ in rounds[1:]] for v, rounds in answers.items()}
    model_seconds = {v: [(taken - own) / steps for taken, own, _ in rounds[1:]] for v, rounds in answers.items()}
    return seconds, model_seconds, {v: rounds[-1][2] for v, rounds in answers.items()}


# ---- what is shown and written


def rows(name: str, shape: dict, variants: list[str], seconds: dict, model_seconds: dict, memory: dict) -> list[str]:
    """Lines of the table: a scheme relative to rope, rope relative to a peer."""
    lines, tokens = [], shape["batch"] * shape["block_size"]
    targets, most = TARGETS.get(name, {}), MEMORY_TARGETS.get(name, {})
    for variant in variants:
        # a ratio of speeds is the inverse one of times
        above, below = (variant, BASELINE) if variant in PEERS else (BASELINE, variant)
        cells = [
            name,
            f"rope / {variant}" if variant in PEERS else variant,
            f"{tokens / statistics.median(seconds[variant]):,.0f}",
            spread(ratios(seconds[above], seconds[below]), 3),
            f"≥ {targets[variant]}" if variant in targets else "",
            spread(ratios(model_seconds[above], model_seconds[below]), 3),
            f"{memory[variant] / 1e6:,.0f}",
            f"{memory[below] / memory[above]:.2f}" + (f" (≤ {most[variant]})" if variant in most else ""),
        ]
        lines.append(row(*cells))
    return lines


def record(shape: dict, steps: int, parts: list[tuple[dict, dict, dict]], args: argparse.Namespace) -> dict:
    """What --json writes: every round's seconds a step by variant, and the conditions. parts: `measure` of each group.
    rope_seconds, where there are several, are rope's in the rounds of a variant's own group."""
    device = pick_device(args.device)
    seconds, memory = ({v: x for part in parts for v, x in part[i].items()} | parts[0][i] for i in (0, 2))
    apart = {v: part[0][BASELINE] for part in parts for v in part[0] if v != BASELINE}
    return {
        "seconds": seconds,  # rope's are those of the first group
        **({"rope_seconds": apart} if len(parts) > 1 else {}),
        "memory": memory,
        "tokens_a_step": shape["batch"] * shape["block_size"],
        "rounds": args.rounds,
        "device": device_name(device),
        "threads": args.threads or (1 if device.type == "cpu" else torch.get_num_threads()),
        "torch": torch.__version__,
        "steps": steps,
        "compile": args.compile,
        **shape,
    }


def table_of(found: dict) -> str:
    """A Markdown table of the schemes in a `record`: speed and peak memory relative to rope, beside their targets."""
    shape = tuple(found[name] for name in FIELDS)
    name = next((name for name, (values, _) in SHAPES.items() if values == shape), None)
    targets, most = TARGETS.get(name, {}), MEMORY_TARGETS.get(name, {})
    lines = [heading(1, "scheme", "speed / rope's (min … max)", "target", "peak memory, MB", "/ rope's", "limit")]
    for variant in sorted(found["seconds"].keys() - {BASELINE, *PEERS}):
        cells = [
            spread(rope_ratios(found, variant), 2),
            f"≥ {targets[variant]}" if variant in targets else "",
            f"{found['memory'][variant] / 1e6:,.0f}",
            f"{found['memory'][variant] / found['memory'][BASELINE]:.2f}",
            f"< {most[variant]:g}" if variant in most else "",
        ]
        lines.append(row(variant, *cells))
    return "\n".join(lines)


def relative(found: dict) -> dict[str, dict]:
    """{variant: {"speed", "low", "high", "memory"}} of a `record`: the median, least and largest ratio of its speed to
    rope's, and of its peak memory."""
    result = {}
    for variant in found["seconds"]:
        speeds = rope_ratios(found, variant)
        result[variant] = {"speed": statistics.median(speeds), "low": min(speeds), "high": max(speeds)}
        result[variant]["memory"] = found["memory"][variant] / found["memory"][BASELINE]
    return result


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, dict], dict]:
    """The arguments, the shapes by name, and the fields of a shape that were given one by one. Exits with a message for
    what cannot be run."""
    parser = command_line("scripts/bench.py", __doc__, rounds=7)
    shapes = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, (values, _) in SHAPES.items())
    parser.add_argument("--shape", default="small", choices=[*SHAPES, "all"], help=f"{shapes} ({', '.join(FIELDS)})")
    parser.add_argument(
        "--schemes",
        nargs="*",
        default=["learned", "crope", "comrope", "carope", "alibi"],
        help="schemes beside rope (with --shape all, where they have a target); with options as "
        '"comrope block=2"; all for every one of model.SCHEMES',
    )
    for name in FIELDS:
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's")
    parser.add_argument("--together", type=int, default=7, help="variants beside rope in a group (default: 7)")
    parser.add_argument(
        "--steps",
        type=int,
        help="optimizer steps a variant and round (default: 1 to 8, by the shape; at least 20 on CUDA)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: 1 on a CPU)")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="autocast dtype (default: as train.py)")
    parser.add_argument("--compile", action="store_true", help="torch.compile: our models by parts, others whole")
    parser.add_argument("--nanogpt", metavar="DIR", help="a folder with nanoGPT's model.py, to compare with")
    parser.add_argument("--no_peer", action="store_true", help="leave transformers out (it is in requirements-dev.txt)")
    parser.add_argument("--json", type=as_path, help="where to write the seconds of every round; of one shape")
    parser.add_argument("--from", dest="source", type=as_path, help="print the table of what --json wrote, and end")
    args = parser.parse_args(arguments)
    args.schemes = [v for scheme in args.schemes for v in (SCHEMES if scheme == "all" else [scheme])]

    own = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    check_counts(parser, {**own, **{k: getattr(args, k) for k in COUNTS}})
    if args.source is not None and not args.source.is_file():
        parser.error(f"--from {args.source}: no such file")
    if args.shape == "all" and args.json:
        parser.error("--json takes one shape, not all")
    if args.shape == "all" and own:
        parser.error(f"--{next(iter(own))} changes one shape, and --shape all names every one")
    if args.nanogpt is not None and not (Path(args.nanogpt) / "model.py").is_file():
        parser.error(
            f"--nanogpt {args.nanogpt}: no model.py there; expected a clone of https://github.com/karpathy/nanoGPT"
        )
    named = SHAPES if args.shape == "all" else [args.shape]
    shapes = {name: dict(zip(FIELDS, SHAPES[name][0])) | own for name in named}
    for variant, (name, shape) in itertools.product([BASELINE, *args.schemes], shapes.items()):
        try:
            check(variant, shape)
        except ValueError as error:
            parser.error(f"{variant!r} of shape {name}: {error}")
    return args, shapes, own


def main(arguments: list[str]) -> None:
    args, shapes, own = parse(arguments)
    if args.source:
        return output(table_of(json.loads(args.source.read_text())))
    schemes = [s for s in dict.fromkeys(args.schemes) if s != BASELINE]
    beside = schemes + ["nanogpt"] * bool(args.nanogpt) + ["transformers"] * (not args.no_peer)
    lines = []
    for name, shape in shapes.items():
        variants = [BASELINE, *(v for v in beside if args.shape != "all" or v in TARGETS[name])]
        least = 20 if pick_device(args.device).type == "cuda" else 1
        steps, parts = args.steps or max(least, SHAPES[name][1]), []
        label = ", ".join(f"{k} {v}" for k, v in shape.items()) if own else name
        for group in groups(variants, args.together):
            parts.append(measure(group, shape, steps, args))
            lines += rows(label, shape, group if len(parts) == 1 else group[1:], *parts[-1])
        if args.json:
            args.json.write_text(json.dumps(record(shape, steps, parts, args), indent=1) + "\n")
    output(f"{', '.join(FIELDS)}: " + "; ".join(f"{n} {', '.join(map(str, v))}" for n, (v, _) in SHAPES.items()))
    output(
        f"Median (min … max) over {args.rounds} rounds of the ratio of speeds: a scheme's to rope's, or rope's to a "
        "peer's, and of rope's memory to the peer's.\n"
    )
    speeds = ("tokens/s", "speed ratio", "target", "without the optimizer's step")
    output(heading(2, "shape", "variant", *speeds, "peak memory, MB", "ratio"))
    output("\n".join(lines))
