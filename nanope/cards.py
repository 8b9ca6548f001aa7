"""A card per positional scheme for docs/schemes.md: what its file says of it, what it costs, and a picture of what it
does to attention. scripts/cards.py writes them.

Costs are of GPT-2 small (124M), computed by nanope/costs.py. Speeds were measured by scripts/bench.py, whose report is
read. The picture is of attention at the start of training, where no content distinguishes tokens.
"""

import inspect
import io
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

import schemes
from model import GPT, GPTConfig
from nanope.attention import weights_by_layer
from nanope.costs import parameters, products, simulate
from schemes.base import Scheme

LABELS = ("Parameters", "Beyond block_size", "Cache", "Cost")  # the last lines of every scheme's docstring
SMALL = GPTConfig(1024, 50304, 12, 12, 768)  # GPT-2 small
ROWS = 16  # windows of a forward pass: what a pass computes once, such as seqpe's encoder, they share


@dataclass
class Card:
    """One scheme: what its file says, and what it costs against rope's at GPT-2 small."""

    name: str
    about: str  # the docstring of its file: source and equation
    options: list[str]  # "base 10000.0"
    facts: dict[str, str]  # by LABELS
    own: int  # parameters less rope's
    flops: float  # matrix-product FLOPs of a training step over rope's
    elementwise: float  # and elementwise ones a token beyond those of none


# ---- what a file says


def facts_of(cls: type[Scheme]) -> dict[str, str]:
    """The last lines of a scheme's docstring, {label: text}. ValueError where one is missing."""
    text, found = inspect.cleandoc(cls.__doc__ or ""), {}
    for label in LABELS:
        match = re.search(rf"^{label}: (.+?)(?=\n(?:{'|'.join(LABELS)}): |\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
        if not match:
            raise ValueError(f"the docstring of {cls.__name__} has no line '{label}: …'")
        found[label] = " ".join(match[1].split())
    return found


def about(cls: type[Scheme]) -> str:
    """The docstring of a scheme's file; of `none`, the first paragraph of its class."""
    if cls is Scheme:
        return inspect.cleandoc(cls.__doc__).split("\n\n")[0]
    return inspect.cleandoc(inspect.getmodule(cls).__doc__)


def shown(options: dict[str, tuple]) -> list[str]:
    """Options with their defaults, and where it is a choice with all values."""
    return [f"`{name}` {default!r} ({schemes.announced(kind)})" for name, (kind, default) in options.items()]


def cards(names: list[str] | None = None) -> list[Card]:
    """The cards of schemes (default: all), rope's being what the others are compared with."""
    names = list(schemes.SCHEMES) if names is None else names
    config = {name: GPTConfig(**{**vars(SMALL), "pos": name}) for name in {*names, "rope", "none"}}
    runs = {name: simulate(c, ROWS, torch.bfloat16, gpu=True) for name, c in config.items()}
    tokens = ROWS * SMALL.block_size
    flops = {name: products(run, tokens)["total"] for name, run in runs.items()}
    count = {name: parameters(run.model)["total"] for name, run in runs.items()}
    found = []
    for name in names:
        cls = schemes.SCHEMES[name]
        extra = (runs[name].elementwise - runs["none"].elementwise) / tokens
        told = about(cls), shown(schemes.options_of(cls)), facts_of(cls)
        found.append(Card(name, *told, count[name] - count["rope"], flops[name] / flops["rope"], extra))
    return found


# ---- the page


def page(cards: list[Card], speeds: dict[str, dict], machine: str) -> str:
    """docs/schemes.md. speeds: {scheme: {"speed", "low", "high", "memory"}}, ratios to rope; machine: where."""
    lines = [
        HEAD.format(machine=textwrap.fill(machine, 120)),
        "| scheme | parameters | FLOPs | speed | memory | beyond training length |",
    ]
    lines.append("|---|--:|--:|--:|--:|---|")
    for card in cards:
        s = speeds.get(card.name)
        measured = f"{s['speed']:.2f} | {s['memory']:.2f}" if s else "– | –"
        beyond = re.split(r"[:;.,]", card.facts["Beyond block_size"])[0]
        row = f"| [{card.name}](#{card.name}) | {card.own:+,} | {card.flops:.3f} | {measured} | {beyond} |"
        lines.append(row)
    return "\n".join([*lines, "", *(card_text(card, speeds.get(card.name)) for card in cards)])


HEAD = """# Schemes

<!-- made by `python scripts/cards.py` from the files in schemes/: change those -->

Every scheme is one file of `schemes/`, and its name is a value of `pos`. They combine (`rope+fox`) and vary by layer
(`[rope, rope, none]`). Parameters and FLOPs of matrix products are those of GPT-2 small (124M, length 1,024), against
rope's; below 1 are dense schemes, which leave out keys that no query of a chunk sees. Speed and peak memory are of a
training step on a CPU, relative to rope in the same run.

{machine}

The small pictures show attention at the start of training, without content: all tokens are the same one, and keys have
the weights of queries, in a layer of 12 heads × 64 over 1,024 tokens. Each grey line is a head's attention of the last
token by distance, over what equal attention to all would be; black is their mean.
"""


def card_text(card: Card, speed: dict | None) -> str:
    """The section of one scheme."""
    lines = [f"## {card.name}", "", f"![Attention by distance of {card.name} at the start](schemes/{card.name}.png)"]
    lines += ["", card.about, ""]
    items = [f"Options: {', '.join(card.options)}."] if card.options else []
    items += [f"{label}: {text}" for label, text in card.facts.items()]
    cost = f"Against rope at 124M: {card.own:+,} parameters, {card.flops:.3f} of the FLOPs of matrix products"
    cost += f", {card.elementwise:,.0f} elementwise operations a token beyond `none`."
    if speed:
        low, high = speed["low"], speed["high"]
        cost += f" Training on a CPU: {speed['speed']:.2f} of rope's speed ({low:.2f} … {high:.2f})"
        cost += f", {speed['memory']:.2f} of its memory."
    wrap = textwrap.TextWrapper(120, "- ", "  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, *map(wrap.fill, [*items, cost]), ""])


# ---- the picture


@torch.no_grad()
def attention_by_distance(name: str, length: int = 1024) -> torch.Tensor:
    """(H, length) float32: attention of the last of `length` equal tokens to the token at each distance, times
    `length`, in one layer of GPT-2 small's heads with its initial values and the keys' weights equal to the
    queries'."""
    model = GPT(GPTConfig(length, 64, 1, 12, 768, pos=name), seed=1).eval()
    for parameter in model.transformer["h"][0].attn.c_attn.parameters():
        if parameter.size(0) % 3 == 0:  # q, k and v by rows
            q, k, _ = parameter.chunk(3)
            k.copy_(q)
    (weights,) = weights_by_layer(model, torch.zeros(1, length, dtype=torch.int64))  # (1, H, T, T)
    return weights[0, :, -1].flip(-1) * length


def picture(name: str) -> bytes:
    """A PNG, 2.6 × 1.25 inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    weights = attention_by_distance(name)
    figure = Figure((2.6, 1.25), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes, distance = figure.add_subplot(), range(weights.size(1))
    for head in weights.clamp_min(1e-4):
        axes.plot(distance, head, color="#BBBBBB", linewidth=0.5)
    axes.plot(distance, weights.mean(0).clamp_min(1e-4), color="black", linewidth=1)
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_yscale("log")
    axes.set_xlim(0, weights.size(1) - 1)
    low, high = (float(f(weights)) for f in (torch.amin, torch.amax))
    axes.set_ylim(min(0.1, max(1e-3, low / 1.5)), max(10, 1.5 * high))
    axes.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1,000"])
    axes.tick_params(labelsize=6, length=2, pad=1, which="both")
    axes.minorticks_off()
    axes.set_xlabel("distance", fontsize=6, labelpad=0)
    axes.set_ylabel("attention / equal", fontsize=6, labelpad=1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def write(folder: Path, speeds: dict[str, dict], machine: str) -> list[Path]:
    """docs/schemes.md and docs/schemes/NAME.png in `folder`: the files written."""
    (folder / "schemes").mkdir(exist_ok=True)
    made = {folder / "schemes" / f"{name}.png": picture(name) for name in schemes.SCHEMES}
    made[folder / "schemes.md"] = page(cards(), speeds, machine).encode()
    for old in {*(folder / "schemes").glob("*.png")} - made.keys():
        old.unlink()
    for path, content in made.items():
        path.write_bytes(content)
    return [*made]
