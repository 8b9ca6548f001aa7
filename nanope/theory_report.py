"""The numbers of nanope/theory.py as the parts of docs/theory.md that scripts/theory.py makes, and as a figure."""

import math
import re
import textwrap
from pathlib import Path

from nanope.study.drawing import GREY, Curve, Lines
from nanope.study.figures import compose, save, style
from nanope.study.markup import Table
from nanope.study.panels import looks_of
from nanope.theory import EULER, LAST, TIMES, octaves, share_deviation

MARK = re.compile(r"(<!-- made by scripts/theory.py: (\w+) -->\n).*?(<!-- end -->)", re.S)
ZERO = 1e-9
SAME = 0.05  # of all attention: curves of the last panel that are nowhere farther apart are drawn once


def page_with(page: str, numbers: dict) -> str:
    """docs/theory.md with its parts between marks made anew. KeyError for a mark of another name."""
    parts = parts_of(numbers)
    return MARK.sub(lambda found: found[1] + parts[found[2]] + "\n" + found[3], page)


def parts_of(numbers: dict) -> dict[str, str]:
    """Name of a mark → Markdown."""
    makers = (relative, turns, comrope, conjugate, frequencies, decay, bias, beyond)
    return {make.__name__: make(numbers) for make in makers} | {"runs": runs_of(numbers)}


def figure(value: float | None, digits: int = 2) -> str:
    """0 for what is rounding, empty for None."""
    if value is None:
        return ""
    if abs(value) < ZERO:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if 1e-3 <= abs(value) else f"{value:.0e}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return Table("", head, rows).markdown().removeprefix("****\n\n")


def runs_of(numbers: dict) -> str:
    steps = sorted({run["step"] for run in numbers["runs"].values()})
    runs = f"{', '.join(numbers['runs'])}, at step {' or '.join(map(str, steps))}" if steps else ""
    missing = f" No run was there of {', '.join(numbers['missing'])}." if numbers["missing"] else ""
    return wrapped(f"Runs: {runs or 'none'}.{missing}")


def wrapped(text: str) -> str:
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


# ---- parts of the page


def relative(numbers: dict) -> str:
    structure = numbers["exact"]["structure"]
    alike, largest = {}, 0.0
    for name, found in structure.items():
        values = [found[key] for key in ("shift", "before", "between", "turn")]
        largest = max([largest, *(v for v in values if v is not None and v < ZERO)])
        alike.setdefault(tuple(map(figure, values)), []).append(f"`{name}`")
    rows = [[", ".join(names), *cells] for cells, names in sorted(alike.items(), key=lambda item: -len(item[1]))]
    head = ["scheme", "all positions + 300", "600 tokens before", "token between", "RᵀR from R(n-m)"]
    return markdown(head, rows) + f"\n\n0 is rounding: at most {largest:.0e}."


def turns(numbers: dict) -> str:
    found = {name: run["trained"]["turn"] for name, run in numbers["runs"].items() if run["trained"]["turn"]}
    relative = [f"`{name}`" for name, by_distance in found.items() if max(by_distance) < ZERO]
    rows, at = [], []
    for name in found.keys() - {name.strip("`") for name in relative}:
        distances = octaves(numbers["runs"][name]["block_size"])[1:]
        at = [d for d in distances if d in (1, 4, 16, 64, 128)]
        rows.append([f"`{name}`", *(figure(found[name][distances.index(d)]) for d in at)])
    text = f"It is 0 in the trained runs of {', '.join(relative)}." if relative else ""
    return "\n\n".join(filter(None, [rows and markdown(["run", *(f"m - n = {d}" for d in at)], sorted(rows)), text]))


def comrope(numbers: dict) -> str:
    gaps = numbers["exact"]["comrope"]
    others = [n for n, found in numbers["exact"]["structure"].items() if found["to_rope"] is not None and n != "rope"]
    worst = max(numbers["exact"]["structure"][n]["to_rope"] for n in others)
    return wrapped(
        f"Largest difference of a score from that by matrix exponentials: {max(gaps.values()):.0e} standard deviations "
        f"({'; '.join(gaps)}). `to_rope()` exists for {', '.join(f'`{n}`' for n in others)}; the logits differ by at "
        f"most {figure(worst)}."
    )


def conjugate(numbers: dict) -> str:
    rows = []
    for name, run in numbers["runs"].items():
        if name == "rope":
            for layer, shares in enumerate(run["conjugate"]):
                rows.append([f"`rope`, layer {layer}", *(f"{share:.3f}" for share in shares)])
            expected = f"0.5 ± {share_deviation(run['n_embd']):.4f}"
            rows.append(["a random matrix", *[expected] * 3])
    if not rows:
        return "No such run."
    others = {name: sum(run["conjugate"], []) for name, run in numbers["runs"].items() if name != "rope"}
    none = [f"`{name}`" for name, shares in others.items() if max(shares) < ZERO]
    rest = [share for shares in others.values() if max(shares) >= ZERO for share in shares]
    text = ""
    if "rope" in numbers["runs"]:
        run = numbers["runs"]["rope"]
        farthest = max(abs(share - 0.5) for share in sum(run["conjugate"], [])) / share_deviation(run["n_embd"])
        text = f"The farthest of `rope`'s is {farthest:.1f} standard deviations from 0.5. "
    text += f"In {' and '.join(none)} it is 0. " * bool(none)
    if rest:
        text += f"In the other runs the shares lie in {min(rest):.3f} … {max(rest):.3f}."
    return markdown(["trained run", "W_q", "W_k", "W_v"], rows) + f"\n\n{wrapped(text)}".rstrip()


def frequencies(numbers: dict) -> str:
    rows, head = [], []
    for name, run in numbers["runs"].items():
        found = run["trained"]["frequencies"]
        if found and not (name != "rope" and unmoved(found)):
            pairs = len(found["median"])
            at = sorted({0, pairs // 4, pairs // 2, 3 * pairs // 4, pairs - 1})
            head = [f"pair {i}" for i in at]
            cells = [
                f"{figure(found['median'][i])} [{figure(found['least'][i])}, {figure(found['largest'][i])}]" for i in at
            ]
            rows.append([f"`{name}`", *cells, figure(max(found["spread"]))])
    return markdown(["trained run", *head, "spread over tokens"], rows) if rows else "No such run."


def unmoved(found: dict) -> bool:
    """Whether all frequencies are rope's, or 0, as prope's slow pairs."""
    return max(min(ratio, abs(ratio - 1)) for key in ("least", "largest") for ratio in found[key]) < 1e-6


def decay(numbers: dict) -> str:
    exact, rows = numbers["exact"]["decay"], []
    values = ", ".join(f"{value:.2f} at {int(d):,}" for d, value in exact["values"].items())
    text = wrapped(
        f"`rope` with {exact['width']} channels: {values}. Mean difference from 1 - (ln d + γ)/ln base over d = 16 … "
        f"4,096: {exact['mean_gap']:.2f}. It rises at {exact['rises']:.0%} of the steps d → d + 1."
    )
    for name, run, values in named(numbers["runs"], "similarity"):
        distances = far(run)
        if values:
            cells = [figure(values[distances.index(d)]) for d in (1, 16, run["block_size"], distances[-1])]
            rows.append([f"`{name}`", *cells])
    if not rows:
        return text
    block = next(iter(numbers["runs"].values()))["block_size"]
    head = ["trained run", "m - n = 1", "16", f"{block} (1×)", f"{TIMES * block - LAST:,} ({TIMES}×)"]
    return text + "\n\n" + markdown(head, rows)


def far(run: dict) -> list[int]:
    """The distances of `similarity` and `bias`."""
    last = TIMES * run["block_size"] - LAST
    return [*octaves(last)[1:], last]


def growth(run: dict, values: list[float]) -> float | None:
    """p, where the bias grows as dᵖ from 1× to its farthest distance; None where it has another sign there, or none."""
    distances = far(run)
    near, end = values[distances.index(run["block_size"])], values[-1]
    if near * end <= 0:
        return None
    return math.log(end / near) / math.log(distances[-1] / run["block_size"])


def bias(numbers: dict) -> str:
    rows = []
    for name, run in numbers["runs"].items():
        if run["trained"]["bias"]:
            cells = []
            for when in ("start", "trained"):
                values = run[when]["bias"]
                power = growth(run, values)
                near = values[far(run).index(run["block_size"])]
                cells += [figure(near, 3), figure(values[-1], 3), "" if power is None else f"{power:.2f}"]
            rows.append([f"`{name}`", *cells])
    head = ["run", "start: at 1×", f"at {TIMES}×", "p", "trained: at 1×", f"at {TIMES}×", "p"]
    return markdown(head, rows) if rows else "No such run."


def beyond(numbers: dict) -> str:
    rows = []
    for name, run in numbers["runs"].items():
        block, cells = run["block_size"], []
        for when in ("start", "trained"):
            near, distant = run[when]["beyond_1x"], run[when]["beyond_16x"]
            cells.append(figure(near[octaves(block).index(block // 8)]))
            for d in (block // 8, block):
                cells.append(figure(distant[octaves(TIMES * block).index(d)]) if distant else "n/a")
        rows.append([f"`{name}`", *cells])
    if not rows:
        return "No such run."
    block = next(iter(numbers["runs"].values()))["block_size"]
    near, distant = (T - min(LAST, T // 2) / 2 for T in (block, TIMES * block))  # keys of the mean query
    uniform = [1 - block / 8 / near, 1 - block / 8 / distant, 1 - block / distant]
    rows.append(["uniform attention", *(figure(u) for u in uniform * 2)])
    head = [
        f"{when}{at}" for when in ("start: ", "trained: ") for at in ("1×, ≥ ⅛", f"{TIMES}×, ≥ ⅛", f"{TIMES}×, ≥ 1")
    ]
    return markdown(["run", *head], rows)


# ---- figure


def write_figure(numbers: dict, folder: Path) -> None:
    """figure.png and figure.pdf. ValueError where no run was there."""
    runs = numbers["runs"]
    if not runs:
        raise ValueError("there is nothing to draw: no run of a scheme")
    looks = looks_of({name: name for name in runs})
    makers = (turn_panel, frequency_panel, similarity_panel, conjugate_panel, bias_panel, beyond_panel)
    with style():
        panels = [panel for make in makers if (panel := make(runs, looks)) and panel.curves]
        drawn = compose([("", panels)])
        for kind in ("png", "pdf"):
            save(drawn, folder / f"figure.{kind}")


def curve(name: str, look: dict, x: list, y: list, intervals: list | None = None) -> Curve:
    return Curve(name, look, list(map(float, x)), list(y), intervals or [None] * len(y), band=intervals is not None)


def alike(values: list[float], others: list[float], most: float) -> bool:
    return len(others) == len(values) and max(abs(a - b) for a, b in zip(values, others)) < most


def named(runs: dict, what: str, most: float = 1e-3) -> list[tuple[str, dict, list]]:
    """(name, run, values) of runs that have them; those nowhere `most` from rope's, or an earlier one's, are left to
    it."""
    kept = {}
    for name in sorted(runs, key=lambda name: name != "rope"):
        values = runs[name]["trained"][what]
        if values and not any(alike(values, others, most) for others in kept.values()):
            kept[name] = values
    return [(name, run, kept[name]) for name, run in runs.items() if name in kept]


def turn_panel(runs, looks):
    found = [(n, octaves(run["block_size"])[1:], y) for n, run, y in named(runs, "turn")]
    curves = [curve(n, looks[n], x, [v if v > ZERO else 0.0 for v in y]) for n, x, y in found]
    title, note = "Turns that are not relative", "turn between m and n against that between m - n and 0, trained"
    return Lines(title, note, "distance m - n", "relative difference", curves, "rope", log_x=True)


def frequency_panel(runs, looks):
    curves, seen = [], []  # the axis shows all, which is many powers of ten
    for name, run in runs.items():
        found = run["trained"]["frequencies"]
        if not found or name != "rope" and unmoved(found):
            continue
        ends = [list(pair) for pair in zip(found["least"], found["largest"])]
        band = ends if name in ("comrope", "carope") else None
        curves.append(curve(name, looks[name], range(len(ends)), found["median"], band))
        seen += [value for value in found["median"] + sum(band or [], []) if value > 0]
    note = "median of layers and heads; band of comrope, carope: all"
    return Lines(
        "Trained frequencies", note, "channel pair", "over rope’s", curves, "rope", log_y=True, points=False,
        limits=(min(seen) / 2, max(seen) * 2) if seen else None,
    )  # fmt: skip


def similarity_panel(runs, looks):
    curves = [curve(n, looks[n], far(run), y) for n, run, y in named(runs, "similarity")]
    if curves:
        x = curves[0].x
        y = [1 - (math.log(d) + EULER) / math.log(10000.0) for d in x]
        curves.append(curve("logarithmic", {"color": GREY, "linestyle": ":"}, x, y))
    return distance_panel(
        "Score of equal q and k",
        "mean of cos over the angles between m and n, trained",
        "share of distance 0",
        curves,
        runs,
    )


def conjugate_panel(runs, looks):
    if "rope" not in runs:
        return None
    run = runs["rope"]
    layers, around = range(1, len(run["conjugate"]) + 1), 2 * share_deviation(run["n_embd"])
    styles = zip(("W_q", "W_k", "W_v"), zip(*run["conjugate"]), ("-", "--", ":"))
    look = looks["rope"]["color"]
    curves = [curve(name, {"color": look, "linestyle": line}, layers, shares) for name, shares, line in styles]
    spread = [[0.5 - around, 0.5 + around]] * len(layers)
    curves.append(curve("random", {"color": GREY, "linestyle": "-"}, layers, [0.5] * len(layers), spread))
    note = "share of the squared norm that CRoPE lacks; band: 2 σ"
    ticks = {float(layer): str(layer - 1) for layer in layers}
    title = "Conjugate-linear part of rope’s weights"
    return Lines(title, note, "layer", "share", curves, "random", ticks) if len(layers) > 1 else None


def bias_panel(runs, looks):
    curves = [curve(n, looks[n], far(run), y) for n, run, y in named(runs, "bias")]
    return distance_panel("Bias beyond the training length", "trained; mean of heads and layers", "nats", curves, runs)


def beyond_panel(runs, looks):
    found = named(runs, "beyond_16x", SAME)
    curves = [curve(n, looks[n], octaves(TIMES * run["block_size"])[1:], y[1:]) for n, run, y in found]
    if curves:
        x = curves[0].x
        longest = 2 * x[-1] - LAST / 2
        curves.append(curve("uniform", {"color": GREY, "linestyle": ":"}, x, [1 - d / longest for d in x]))
    note = f"at {TIMES}× the training length, trained"
    return distance_panel("Attention at a distance or farther", note, "share of all attention", curves, runs)


def distance_panel(title, note, ylabel, curves, runs):
    blocks = {float(run["block_size"]) for run in runs.values()}
    baseline = "rope" if any(c.name == "rope" for c in curves) else ""
    return Lines(
        title, note, "distance m - n", ylabel, curves, baseline, log_x=True, trained=tuple(sorted(blocks)), points=False
    )
