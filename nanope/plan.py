"""What a run will cost, before it starts: `python train.py --config FILE --plan [--gpus 8] [--mfu 0.4]
[--price_per_hour 2.5]`, and `python train.py --plan --schemes`, a table of all schemes.

Parameters, FLOPs, memory, tokens, hours. Nothing is trained or allocated: FLOPs and memory are those of a pass on fake
tensors (nanope/costs.py). nanope/plan_report.py makes the text.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.shards import Data, open_data
from nanope.config import RunConfig, check, padded_vocabulary, with_vocabulary
from nanope.costs import memory, outline, parameters, products, simulate, windows_that_fit
from nanope.distributed import Ranks, pick_device, pick_dtype
from nanope.errors import first_line
from nanope.gpus import PEAK_FLOPS, expected_mfu
from nanope.optim import USABLE, divisors, make_optimizer, resolve_batch, within
from nanope.plan_report import report, scheme_report
from schemes import SCHEMES

GPUS = ("A100", "H100")
CARDS = (80, 40, 24)  # GiB, which their names call GB
GPT2_VOCABULARY = 50257


@dataclass
class Plan:
    """What a run costs: plain numbers. Bytes, FLOPs, tokens, hours; everything of memory is of one rank."""

    config: RunConfig  # with vocab_size and micro_batch_size filled in
    gpus: int  # ranks
    micro_batch_size: int  # windows a forward pass; with details those of the first of `dtypes`
    accumulation: int  # forward passes a step and rank, likewise
    windows: int  # a step, over all ranks
    tokens: int  # of the whole run
    data_tokens: int | None  # of the train split; None without a data folder
    epochs: float | None
    vocabulary_assumed: bool  # neither the config nor a data folder said it
    validation: float  # FLOPs of all validations relative to those of training
    parameters: dict[str, int]  # by part, and their total
    groups: dict[str, int]  # parameters by the optimizer's group
    flops_per_token: int  # GPT.flops_per_token, which MFU is defined with
    flops: float  # of the whole run, by that
    checkpoint: int  # bytes of a checkpoint file
    mfu: dict[str, float]  # {GPU: expected}
    price_per_hour: float | None  # of one GPU
    hours: dict[str, tuple[float, float]]  # {GPU: (on one, on all)}
    tokens_per_s: float | None = None  # measured, of all ranks
    # With details:
    products: dict[str, float] = field(default_factory=dict)  # {part: matrix-product FLOPs, both passes, a token}
    elementwise: float = 0.0  # operations a token
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # {"cuda", "cpu" or "mps": of matrix products}
    rows: dict[str, int] = field(default_factory=dict)  # {one of these: windows a forward pass}
    memory: dict[str, dict[str, int]] = field(default_factory=dict)  # {"cuda" or "cpu": {part: bytes}}, with "total"
    largest_micro_batch: int = 0  # that fits the largest card and divides the windows of a rank; 0: none, or unknown

    @property
    def measured_hours(self) -> float | None:
        """Of the whole run at tokens_per_s."""
        return self.tokens / self.tokens_per_s / 3600 if self.tokens_per_s else None

    def cost(self, hours: float, gpus: int) -> float | None:
        """In the currency of price_per_hour."""
        return None if self.price_per_hour is None else hours * gpus * self.price_per_hour

    def fits(self, card: int) -> bool:
        """Whether a GPU of so many GiB holds a rank."""
        return self.memory["cuda"]["total"] <= usable(card)


def plan(
    config: RunConfig,
    gpus: int = 1,
    mfu: float | None = None,
    price_per_hour: float | None = None,
    vocab_size: int | None = None,
    tokens_per_s: float | None = None,
    details: bool = True,
) -> Plan:
    """The Plan of a run on `gpus` ranks. Starts nothing, writes nothing.

    mfu: FLOPs of flops_per_token over the GPU's peak, in (0, 1]; None: a guess by GPU. price_per_hour: of one GPU.
    vocab_size: of the tokenizer, assumed where there is no data folder (default: GPT-2's). tokens_per_s: a measured
    speed of all ranks. details: also exact FLOPs and memory, which take seconds, with path minutes. ValueError
    for what could not be run.
    """
    check(config)
    check_arguments(gpus, mfu, price_per_hour, tokens_per_s, vocab_size)
    data = open_data(config.data_dir, verify=False) if Path(config.data_dir).is_dir() else None
    tokenizer = data.vocab_size if data else config.vocab_size or vocab_size or GPT2_VOCABULARY
    assumed = not data and config.vocab_size is None
    config = with_vocabulary(config, tokenizer, data.eot if data else config.eot or 0)
    share, micro = resolve_batch(config, Ranks(0, gpus, 0))
    asked = config.micro_batch_size
    config = dataclasses.replace(config, micro_batch_size=micro)
    model = outline(config.model_config())
    groups = make_optimizer(model, config).param_groups
    tokens, per_token = config.max_steps * config.batch_tokens, model.flops_per_token()
    expected = {gpu: expected_mfu(gpu) if mfu is None else mfu for gpu in GPUS}
    rates = {gpu: PEAK_FLOPS[gpu] * expected[gpu] for gpu in GPUS}  # FLOP/s
    data_tokens = data.epoch_tokens("train", config.block_size) if data else None
    weights = [*model.parameters(), *model.buffers()]
    p = Plan(
        config=config,
        gpus=gpus,
        micro_batch_size=micro,
        accumulation=share // micro,
        windows=share * gpus,
        tokens=tokens,
        data_tokens=data_tokens,
        epochs=tokens / data_tokens if data else None,
        vocabulary_assumed=assumed,
        validation=validation_tokens(config, data) / 3 / tokens,  # forward alone
        parameters=parameters(model),
        groups={
            name: sum(p.numel() for p in group["params"])
            for name, group in zip(("decayed", "plain", "positional", "own matrices"), groups)
        },
        flops_per_token=per_token,
        flops=tokens * per_token,
        # weights, two moments in float32, and a count of steps
        checkpoint=sum(t.numel() * t.element_size() for t in weights)
        + sum(2 * 4 * p.numel() + 4 for p in model.parameters()),
        mfu=expected,
        price_per_hour=price_per_hour,
        hours={gpu: tuple(tokens * per_token / (rates[gpu] * n) / 3600 for n in (1, gpus)) for gpu in GPUS},
        tokens_per_s=tokens_per_s,
    )
    if details:
        try:
            add_details(p, share, asked)
        except RuntimeError as error:  # of a scheme from outside that looks at values, which fake tensors do not have
            raise ValueError(f"memory and FLOPs cannot be estimated with {config.pos}: {first_line(error)}") from error
    return p


def check_arguments(gpus, mfu, price_per_hour, tokens_per_s, vocab_size) -> None:
    """ValueError that lists all that are out of range."""
    problems = []
    if type(gpus) is not int or gpus < 1:
        problems.append(f"gpus must be a whole number from 1 on, not {gpus}")
    if mfu is not None and not 0 < mfu <= 1:
        problems.append(
            f"mfu must lie in (0, 1], not {mfu}: the share of a GPU's peak FLOP/s that training uses, such as 0.4"
        )
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        problems.append(
            f"price_per_hour must not be negative or infinite, but is {price_per_hour}: the price of one GPU for an "
            "hour"
        )
    if tokens_per_s is not None and not 0 < tokens_per_s < math.inf:
        problems.append(f"tokens_per_s must be positive, not {tokens_per_s}")
    if vocab_size is not None and vocab_size < 1:
        problems.append(f"vocab_size must be at least 1, not {vocab_size}")
    if problems:
        raise ValueError("; ".join(problems))


def validation_tokens(config: RunConfig, data: Data | None) -> int:
    """Of all validations: at the start, every eval_interval steps, at the end."""
    times = 2 + (config.max_steps - 1) // config.eval_interval if config.eval_interval else 2
    windows = config.eval_tokens // config.block_size
    if data:
        windows = min(windows, data.epoch_tokens("val", config.block_size) // config.block_size)
    return times * config.block_size * max(1, windows)


def usable(card: int) -> float:
    """Bytes of a GPU of so many GiB that a rank may take."""
    return USABLE * card * 2**30


def devices(config: RunConfig) -> dict[str, torch.dtype]:
    """{"cuda", "cpu" or "mps": dtype of its matrix products} that a run is planned for. `auto` is a GPU, also where
    there is none yet, and what it would be here."""
    found, host = {}, torch.device("cpu")
    if config.device == "auto" or config.device.startswith("cuda"):  # of GPUs of which each has bfloat16
        dtype = {"auto": "bfloat16", "tf32": "float32"}.get(config.dtype, config.dtype)
        found["cuda"] = pick_dtype(dtype, host)
    if "cuda" not in config.device and (config.device, config.dtype) != ("auto", "tf32"):  # which GPUs alone have
        found.setdefault(pick_device(config.device).type, pick_dtype(config.dtype, host))
    return found


def add_details(p: Plan, share: int, asked: int | str | None) -> None:
    """FLOPs by part, memory by part and the largest micro-batch, by passes on fake tensors. share: windows a step and
    rank; asked: the config's micro_batch_size. Where that is null or auto, it becomes on a GPU what the largest card
    would take, and stays elsewhere."""
    config, shape = p.config, p.config.model_config()
    ranks = p.gpus if config.fsdp else 1  # over which the model is divided
    p.dtypes = devices(config)
    p.rows = dict.fromkeys(p.dtypes, p.micro_batch_size)
    if "cuda" in p.dtypes:
        limit, again = usable(CARDS[0]), config.activation_checkpointing
        p.largest_micro_batch = windows_that_fit(shape, divisors(share), p.dtypes["cuda"], limit, again, ranks)
        if asked in (None, "auto"):
            fitting = [n for n in within(asked, share, shape.block_size) if n <= p.largest_micro_batch]
            p.rows["cuda"] = p.micro_batch_size = max(fitting, default=1)
            p.accumulation = share // p.micro_batch_size
            p.config = dataclasses.replace(p.config, micro_batch_size=p.micro_batch_size)
    for kind, dtype in p.dtypes.items():
        rows = p.rows[kind]
        keep = rows < share or p.gpus > 1  # DDP's buckets hold the gradients from the first step on
        how = dict(keep_gradients=keep, again=config.activation_checkpointing, divided=ranks > 1)
        run = simulate(shape, rows, dtype, kind == "cuda", **how)
        if kind != "mps":  # whose attention saves what no other does
            p.memory[kind] = memory(run, rows, ranks)
        if not p.products:
            tokens, again = rows * shape.block_size, None
            if config.activation_checkpointing:
                run, again = simulate(shape, rows, dtype, kind == "cuda"), run
            p.products, p.elementwise = products(run, tokens, again), (again or run).elementwise / tokens


# ---- as text


def plan_text(
    config: RunConfig,
    schemes: bool = False,
    gpus: int | None = None,
    mfu: float | None = None,
    price_per_hour: float | None = None,
) -> str:
    """What `train.py --plan` prints; with schemes, the table of all schemes. gpus: by default the ranks of this launch.
    ValueError for what could not be run."""
    if not schemes:
        ranks = int(os.environ.get("WORLD_SIZE", 1)) if gpus is None else gpus
        return show(plan(config, gpus=ranks, mfu=mfu, price_per_hour=price_per_hour))
    if (gpus, mfu, price_per_hour) != (None, None, None):
        raise ValueError(
            "--schemes is a table of FLOPs and bytes a token: it takes no --gpus, --mfu or --price_per_hour"
        )
    return scheme_table(config)


def show(p: Plan) -> str:
    """The plan as a text of a few lines a part."""
    return report(p, CARDS)


def scheme_table(config: RunConfig, names: list[str] | None = None) -> str:
    """Markdown: parameters, training FLOPs a token and saved activations of each scheme (default: all) at the shape of
    `config`, on a GPU in bfloat16. pos_options are left at each scheme's defaults. ValueError for an unknown scheme."""
    check(config)
    names = list(SCHEMES) if names is None else names
    _, rows = resolve_batch(config, Ranks())
    vocabulary = config.vocab_size or padded_vocabulary(GPT2_VOCABULARY)
    shape = dataclasses.replace(config, vocab_size=vocabulary, pos_options={}, eot=config.eot or 0).model_config()
    runs = {
        name: simulate(dataclasses.replace(shape, pos=name), rows, torch.bfloat16, gpu=True)
        for name in dict.fromkeys([*names, "rope", "none"])
    }
    return scheme_report(shape, names, runs, rows)
