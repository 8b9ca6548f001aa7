"""A plan (nanope/plan.py) as text, and the table of schemes."""

import os

from model import GPTConfig
from nanope.costs import Pass, parameters, products
from schemes import label

# nanope/gpus.py has the sources
MFU_SOURCE = "GPT-2 124M on 8 A100: nanoGPT 0.29 (README, 4 days), llm.c 0.60 (1.75 M tokens/s)"


def report(p, cards: tuple[int, ...]) -> str:
    """The text of a Plan, a few lines a part. cards: GB of memory of GPUs, the largest first."""
    parts = [model_lines(p), flops_lines(p), batch_lines(p), memory_lines(p, cards), time_lines(p)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def model_lines(p) -> list[str]:
    c = p.config
    options, window = f" {c.pos_options}" if c.pos_options else "", f", window {c.window}" if c.window else ""
    lines = [
        f"{label(c.pos)}{options}: {c.n_layer} layers × {c.n_embd}, {c.n_head} heads, length {c.block_size:,}{window}, "
        f"vocabulary {c.vocab_size:,}"
    ]
    if p.data_tokens is None:
        assumed = ", and the vocabulary is assumed" if p.vocabulary_assumed else ""
        lines.append(f"  no data folder {c.data_dir}: epochs are unknown{assumed}")
    lines += ["", "parameters"]
    lines += columns([(part, f"{n:,}", f"{n / p.parameters['total']:.1%}") for part, n in p.parameters.items()])
    return [*lines, "  optimizer groups: " + ", ".join(f"{name} {n:,}" for name, n in p.groups.items() if n)]


def flops_lines(p) -> list[str]:
    c = p.config
    lines = [f"FLOPs per token: {p.flops_per_token:,} (6 N + 12 L C T, PaLM's convention, which MFU is measured in)"]
    if not p.products:
        return lines
    lines += columns([(part, f"{n:,.0f}") for part, n in p.products.items()])
    executed, total = "  matrix products executed, forward and backward", p.products["total"]
    if c.activation_checkpointing:
        lines.append("  what is computed again, by activation checkpointing, does not count for MFU, by its convention")
    scores, square = p.products["attention scores"], c.n_layer * c.n_embd * c.block_size
    if scores in (12 * square, 14 * square):  # six products of T² scores, or a kernel that forms them a second time
        all_scores = scores + p.products.get("scores, computed again", 0)
        masked = all_scores * (c.block_size - 1) / (2 * c.block_size)
        lines.append(f"{executed}, all T² scores; without those that causality masks {total - masked:,.0f}")
    else:
        lines.append(f"{executed}; the scores are those of a window, or of some queries and the keys before them")
    return [*lines, f"  beside them {p.elementwise:,.0f} elementwise operations"]


def batch_lines(p) -> list[str]:
    c = p.config
    epochs = "" if p.epochs is None else f", {p.epochs:.3g} epochs of {p.data_tokens:,}"
    files = c.keep_checkpoints + 2  # best.pt, and the one being written
    rows, share = p.rows.get("cpu", p.micro_batch_size), p.accumulation * p.micro_batch_size
    here = "" if rows == p.micro_batch_size else f" (on a CPU {share // rows} × {rows})"
    return [
        "batch and data",
        f"  {c.batch_tokens:,} tokens a step = {p.windows:,} windows of {c.block_size:,} = {p.gpus} rank(s) × "
        f"{p.accumulation} × micro_batch_size {p.micro_batch_size}{here}",
        f"  {c.max_steps:,} steps, {p.tokens:,} tokens{epochs}; {p.flops:.3g} FLOPs; "
        f"validation adds {p.validation:.1%}",
        f"  checkpoint {size(p.checkpoint)}, as much host memory for a copy of it (page-locked on a GPU: up to twice); "
        f"{size(files * p.checkpoint)} of disk for {files} (kept, best, being written)",
    ]


def memory_lines(p, cards: tuple[int, ...]) -> list[str]:
    if not p.memory:
        return ["memory: no estimate for MPS, whose attention differs"] if p.products else []
    names = {"cuda": "GPU", "cpu": "CPU"}
    parts = dict.fromkeys(part for m in p.memory.values() for part in m if part not in ("temporary", "total"))
    compiled = ", without torch.compile, which saves less" if p.config.compile else ""
    divided = f", parameters divided over {p.gpus} (FSDP)" if p.config.fsdp and p.gpus > 1 else ""
    lines = [f"memory of a rank at its peak{divided}{compiled}"]
    lines += columns(
        [("", *(f"{names[kind]}, {str(p.dtypes[kind]).removeprefix('torch.')}" for kind in p.memory))]
        + [("micro_batch_size", *(f"{p.rows[kind]}" for kind in p.memory))]
        + [(part, *(size(m.get(part, 0)) for m in p.memory.values())) for part in (*parts, "temporary", "total")]
    )
    if "cuda" in p.memory:
        fits = ", ".join(f"{card} GB: {'yes' if p.fits(card) else 'no'}" for card in cards)
        largest = f"largest micro_batch_size in {cards[0]} GB: {p.largest_micro_batch}"
        lines.append(
            f"  fits in {fits}; {largest if p.largest_micro_batch else f'no micro_batch_size fits {cards[0]} GB'}"
        )
    if "cpu" in p.memory:
        here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        lines.append(
            f"  this machine has {size(here)}; Python and torch take 0.3 GB of it, and malloc holds back 10 to 40 % of "
            "the total"
        )
    return lines


def time_lines(p) -> list[str]:
    price = "" if p.price_per_hour is None else f", cost at {p.price_per_hour:g} per GPU-hour"
    rates = dict.fromkeys(p.mfu.values())
    mfu = f"{next(iter(rates)):g}" if len(rates) == 1 else ", ".join(f"{x:g} on {gpu}" for gpu, x in p.mfu.items())
    lines = [f"expected time at an MFU of {mfu} (a guess; of the dense bfloat16 peak, whatever the dtype){price}"]

    def row(name: str, hours: float, speed: float, gpus: int) -> tuple[str, ...]:
        cost = p.cost(hours, gpus)
        return name, duration(hours), f"{speed:,.0f} tokens/s", *([] if cost is None else [f"cost {cost:,.2f}"])

    rows = []
    for gpu, hours in p.hours.items():
        for n, h in dict(zip((1, p.gpus), hours)).items():
            rows.append(row(f"{n} × {gpu}", h, p.tokens / h / 3600, n))
    if p.measured_hours is not None:
        rows.append(row("as measured", p.measured_hours, p.tokens_per_s, p.gpus))
    lines += columns(rows) + [f"  for comparison, {MFU_SOURCE}"]
    if "cpu" in p.memory and p.measured_hours is None:
        lines.append("  on this CPU: not known without measuring; a run's first lines have its tokens/s")
    return lines


# ---- the table of schemes


def scheme_report(shape: GPTConfig, names: list[str], runs: dict[str, Pass], rows: int) -> str:
    """Markdown: a row for each of `names`. runs: the passes of these, of rope and of none, over `rows` windows each."""
    tokens = rows * shape.block_size
    count = {name: parameters(run.model) for name, run in runs.items()}
    saved = {
        name: sum(n for part, n in run.saved.items() if part not in ("autocast's weights", "loss head"))
        for name, run in runs.items()
    }
    lines = [
        f"{shape.n_layer} layers × {shape.n_embd}, {shape.n_head} heads, length {shape.block_size:,}, vocabulary "
        f"{shape.vocab_size:,}; training FLOPs and bytes a token at {rows} windows a forward pass. Matrix products "
        f"count all {'scores of a window' if shape.window else 'T² scores'}; elementwise operations are those beyond "
        "`none`, without the work of a bias, which is inside of the attention kernel; activations are bfloat16 on a "
        "GPU, eager.\n",
        "| scheme | parameters | own | against rope | matrix-product FLOPs | of the scheme | elementwise of the scheme "
        "| activations, bytes | against rope |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        parts, flops = count[name], products(runs[name], tokens)
        own = parts.get("positional table", 0) + parts.get("positional scheme", 0)
        elementwise = (runs[name].elementwise - runs["none"].elementwise) / tokens
        lines.append(
            f"| {label(name)} | {parts['total']:,} | {own:,} | {parts['total'] - count['rope']['total']:+,} "
            f"| {flops['total']:,.0f} | {flops.get('positional scheme', 0):,.0f} | {elementwise:,.0f} "
            f"| {saved[name] / tokens:,.0f} | {saved[name] / saved['rope']:.3f} |"
        )
    return "\n".join(lines)


# ---- numbers


def size(n: float) -> str:
    """Bytes in decimal units."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= least:
            return f"{n / least:.2f} {unit}"
    return f"{n:.0f} B"


def duration(hours: float) -> str:
    """In hours, minutes or seconds: the largest unit with a value of at least 1."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines, indented, the first column left and the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:]))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
