"""Tables of a sweep in Markdown and LaTeX, from its runs' folder or from the small files that were collected of it.

    python scripts/report.py runs/mine                # table.md, table.tex, figure.png there
    python scripts/report.py results/mine             # the same from config, metrics and evaluations alone: README.md, table.tex, figure.png

Figures are means over seeds; differences are paired: the same data order, the same shared initial weights, the same tokens.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import _root
import numpy as np
import scipy.stats
import yaml
from grid import Grid, Run, as_list, bench_variants, digest, model_cost

from nanope.config import RunConfig
from nanope.evaluation.statistics import paired_difference

NOISE = "≈"
BEGIN, END = "<!-- made by scripts/report.py: begin -->", "<!-- end -->"


# ---- statistics


def seed_interval(values) -> list[float] | None:
    """95 % t interval of a mean over seeds, (n,); None for fewer than two."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return None
    reach = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return [float(values.mean() - reach), float(values.mean() + reach)]


def difference_of_losses(ours: dict[int, float], base: dict[int, float]) -> dict | None:
    """Mean paired difference of two arms' losses by seed, over the seeds that both have, with its t interval."""
    seeds = sorted(ours.keys() & base.keys())
    if not seeds:
        return None
    each = [ours[s] - base[s] for s in seeds]
    return {"difference": float(np.mean(each)), "interval": seed_interval(each), "seeds": len(seeds)}


def difference_of_rows(ours: dict[int, dict], base: dict[int, dict]) -> dict | None:
    """Mean paired difference of two rows of reports by seed, in nats per token, with an interval over seeds and documents
    (intervals.paired_difference). ValueError where they scored different tokens."""
    seeds = sorted(
        s
        for s in ours.keys() & base.keys()
        if ours[s]["nats_per_token"] is not None and base[s]["nats_per_token"] is not None
    )
    if not seeds:
        return None
    if len({r[s]["targets_sha256"] for r in (ours, base) for s in seeds}) > 1:
        raise ValueError("two runs' evaluations scored different tokens: they are of different data")
    a, b = (np.array([r[s]["per_document"]["nll"] for s in seeds]) for r in (base, ours))
    found = paired_difference(a, b, np.array(ours[seeds[0]]["per_document"]["tokens"]), True)
    return {"difference": found["difference"], "interval": found["interval"], "seeds": len(seeds)}


def verdict(published: float | None, interval: list[float] | None, seeds: int) -> str:
    """Whether a published figure lies in the measured interval."""
    if published is None:
        return ""
    if seeds < 2 or interval is None:
        return "one seed"
    return "within interval" if interval[0] <= published <= interval[1] else "differs"


def direction(published: float, found: dict) -> str:
    """Whether a measured difference has the published one's sign."""
    if found["seeds"] < 2 or found["interval"] is None:
        return "one seed"
    if found["interval"][0] <= 0 <= found["interval"][1]:
        return "inside noise"
    return "same direction" if found["difference"] * published > 0 else "other direction"


# ---- what there is to report


@dataclass
class Study:
    """A grid and those of its runs that are done, by setting, arm and seed."""

    folder: Path
    grid: Grid
    runs: dict[tuple[str, str], dict[int, Run]]
    missing: list[str]
    cache: dict = field(default_factory=dict, repr=False)  # of reports, each read once

    @classmethod
    def read(cls, folder: Path) -> "Study":
        """ValueError where the folder has no grid, or runs that are to be compared were trained on different data."""
        grid = Grid.of_folder(folder)
        runs, missing = {}, []
        for setting in grid.settings:
            for arm in grid.arms or {}:
                rate = grid.best_rate(folder, setting, arm) if grid.tune else None
                all_ = (
                    {}
                    if grid.tune and rate is None
                    else {seed: grid.run(folder, setting, arm, seed, rate) for seed in grid.seeds}
                )
                runs[setting, arm] = {seed: r for seed, r in all_.items() if r.done() and r.val_loss() is not None}
                label = ", ".join(filter(None, (setting, arm)))
                ends = {s: " (diverged)" if s in all_ and all_[s].diverged() else "" for s in grid.seeds}
                missing += [f"{label}, seed {s}{end}" for s, end in ends.items() if s not in runs[setting, arm]]
            lines = [m for arm in grid.arms or {} for run in runs[setting, arm].values() for m in run.metrics()]
            if len({m["environment"].get("data_hash") for m in lines if "environment" in m}) > 1:
                raise ValueError(
                    f"{folder}: runs{f' of {setting}' if setting else ''} were trained on different data, so they do not compare: was their data folder made anew?"
                )
        return cls(Path(folder), grid, runs, missing)

    def config(self, setting: str, arm: str) -> RunConfig | None:
        """The resolved config of one of the runs."""
        for run in self.runs[setting, arm].values():
            there = yaml.safe_load((run.folder / "config.yaml").read_text())
            return RunConfig(**{k: v for k, v in there.items() if k in RunConfig.__dataclass_fields__})
        return None

    def losses(self, setting: str, arm: str) -> dict[int, float]:
        return {seed: run.val_loss() for seed, run in self.runs[setting, arm].items()}

    def reports(self, setting: str, arm: str, name: str) -> dict[int, dict]:
        key = setting, arm, name
        if key not in self.cache:
            self.cache[key] = {seed: run.report(name) for seed, run in self.runs[setting, arm].items()}
        return self.cache[key]

    def rows(self, setting: str, name: str) -> dict:
        """The rows of a report: (protocol, arm, scaling) → length → seed → row, arms in the grid's order."""
        found = {}
        for arm in self.grid.arms:
            for seed, there in self.reports(setting, arm, name).items():
                for row in there.get("results", ()):
                    found.setdefault((row["protocol"], arm, row["scaling"]), {}).setdefault(row["length"], {})[seed] = (
                        row
                    )
        return found

    @property
    def unit(self) -> str:
        """What one target is: a byte, or a token."""
        made = [self.grid.data_of(s) for s in self.grid.settings]
        names = {m["tokenizer"] for m in made if m}
        names |= {
            r["tokenizer"]["name"]
            for (s, a) in self.runs
            for n in self.grid.eval or {}
            for r in self.reports(s, a, n).values()
            if "tokenizer" in r
        }
        return "byte" if names == {"byte"} else "token"


@dataclass
class Table:
    """Cells are text; **bold** is Markdown's, and becomes LaTeX's."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    left: int = 1  # columns of text; the others are figures

    def markdown(self) -> str:
        line = lambda cells: f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |"  # noqa: E731
        return "\n".join(
            [
                f"**{self.title}**\n",
                line(self.head),
                "|" + "---|" * self.left + "--:|" * (len(self.head) - self.left),
                *map(line, self.rows),
            ]
        )

    def latex(self) -> str:
        """A booktabs tabular in a table environment."""
        columns = "l" * self.left + "r" * (len(self.head) - self.left)
        lines = [
            r"\begin{table}",
            rf"\caption{{{latex(self.title)}}}",
            r"\centering",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
        ]
        lines += [
            " & ".join(map(latex, self.head)) + r" \\",
            r"\midrule",
            *(" & ".join(map(latex, row)) + r" \\" for row in self.rows),
        ]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", "×": r"$\times$", "±": r"$\pm$", "≈": r"$\approx$", "…": r"\dots{}", "γ": r"$\gamma$", "σ": r"$\sigma$", "–": "--",
         "−": "$-$", "²": "$^2$", "<": "$<$", ">": "$>$"}  # fmt: skip


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped, signed numbers in math mode, and **bold** as \\textbf."""
    escaped = "".join(LATEX.get(c, c) for c in re.sub(r"\*\*(.*?)\*\*", "\0\\1\1", text))
    escaped = re.sub(r"(?<![\w.])([+-]\d+(?:[.,]\d+)*)", r"$\1$", escaped)
    return escaped.replace("\0", r"\textbf{").replace("\1", "}")


# ---- cells


def mean_cell(values: list[float], interval: list[float] | None, show=lambda x: x, digits: int = 4) -> str:
    text = f"{show(np.mean(values)):,.{digits}f}"
    return text if interval is None else f"{text} [{show(interval[0]):,.{digits}f}, {show(interval[1]):,.{digits}f}]"


def row_cell(rows: dict[int, dict], figure: str) -> str:
    """Mean over seeds of a row of reports, with its interval: over seeds, or for one seed over documents."""
    values = [r["nats_per_token"] for r in rows.values()]
    if not values or None in values:
        return "n/a"
    interval = seed_interval(values) or next(iter(rows.values()))["interval"]
    return mean_cell(values, interval, math.exp, 2) if figure == "perplexity" else mean_cell(values, interval)


def difference_cell(found: dict | None) -> str:
    """A paired difference with its interval; ≈ where that contains 0, bold where it lies below 0 and seeds, not documents
    alone, say so."""
    if found is None:
        return "n/a"
    text, interval = f"{found['difference']:+.4f}", found["interval"]
    if interval is None:
        return text
    text += f" [{interval[0]:+.4f}, {interval[1]:+.4f}]"
    if interval[0] <= 0 <= interval[1]:
        return f"{text} {NOISE}"
    return f"**{text}**" if interval[1] < 0 and found["seeds"] > 1 else text


# ---- tables


def tables(study: Study) -> list[Table]:
    grid, found = study.grid, []
    if grid.arms and (grid.published or {}).get("rows"):
        found.append(published_table(study))
    for setting in grid.settings if grid.arms else ():
        head = f"{setting}: " if setting else ""
        found.append(training_table(study, setting, head))
        for name in grid.eval or {}:
            found += report_tables(study, setting, name, head)
    if bench := throughput(study):
        found.append(throughput_table(study, bench))
    return found


def training_table(study: Study, setting: str, head: str) -> Table:
    grid = study.grid
    table = Table(
        f"{head}training",
        ["arm", "parameters", "seeds", "learning rate", "training loss", "validation loss", f"less {grid.baseline}"],
    )
    for arm in grid.arms:
        runs, config = study.runs[setting, arm], study.config(setting, arm)
        if not runs:
            table.rows.append([arm, "none is done", *[""] * 5])
            continue
        losses = study.losses(setting, arm)
        last = [np.mean(run.series("train/loss")[1][-5:]) for run in runs.values()]
        less = (
            ""
            if arm == grid.baseline
            else difference_cell(difference_of_losses(losses, study.losses(setting, grid.baseline)))
        )
        cells = [f"{model_cost(config)[0]:,}", str(len(runs)), f"{config.learning_rate:g}", f"{np.mean(last):.4f}"]
        table.rows.append([arm, *cells, mean_cell(list(losses.values()), seed_interval(list(losses.values()))), less])
    return table


def report_tables(study: Study, setting: str, name: str, head: str) -> list[Table]:
    """Of one report: figures by length for each protocol, differences from the baseline, and, where lengths share their targets,
    from the arm's own figure at the training length; shifts of all positions."""
    grid, found, everything = study.grid, [], study.rows(setting, name)
    figure = grid.figure or "nats"
    label = f"perplexity per {study.unit}" if figure == "perplexity" else f"nats per {study.unit}"
    config = next((c for arm in grid.arms if (c := study.config(setting, arm))), None)
    for protocol in dict.fromkeys(key[0] for key in everything if key[0] != "per-position"):  # a curve, for the figure
        mine = {(arm, scaling): by_length for (p, arm, scaling), by_length in everything.items() if p == protocol}
        mine = {
            key: v
            for key, v in mine.items()
            if key[1] == "none"
            or any(row["nats_per_token"] is not None for rows in v.values() for row in rows.values())
        }
        lengths = sorted({n for by_length in mine.values() for n in by_length})
        titles = (
            f"{label} at context lengths",
            f"nats per {study.unit} less {grid.baseline}",
            f"nats per {study.unit} less the arm's own at the training length",
        )
        mean, less, growth = (
            Table(f"{head}{title}, {protocol} ({name})", ["arm", *map(str, lengths)]) for title in titles
        )
        for (arm, scaling), by_length in mine.items():
            factor = next((row["factor"] for rows in by_length.values() for row in rows.values()), 1)
            title = arm if scaling == "none" else f"{arm}, {scaling} ×{factor:g}"
            base, own = mine.get((grid.baseline, "none"), {}), mine.get((arm, "none"), {}).get(config.block_size, {})
            mean.rows.append([title, *(row_cell(by_length.get(n, {}), figure) for n in lengths)])
            if title != grid.baseline:
                less.rows.append(
                    [
                        title,
                        *(difference_cell(difference_of_rows(by_length.get(n, {}), base.get(n, {}))) for n in lengths),
                    ]
                )
            itself = config.block_size if scaling == "none" else None
            growth.rows.append(
                [
                    title,
                    *(
                        "" if n == itself else difference_cell(difference_of_rows(by_length.get(n, {}), own))
                        for n in lengths
                    ),
                ]
            )
        found += [mean] + [less] * bool(less.rows) + [growth] * (protocol == "same-targets" and len(lengths) > 1)
    if any("shift" in r for arm in grid.arms for r in study.reports(setting, arm, name).values()):
        found.append(shift_table(study, setting, name, head))
    return found


def shift_table(study: Study, setting: str, name: str, head: str) -> Table:
    """scripts/shift.py: by how much the NLL of any token changes when all positions move; the largest over seeds."""
    offsets, rows = [], []
    for arm in study.grid.arms:
        by_offset = {}
        for there in study.reports(setting, arm, name).values():
            for row in there["shift"]:
                by_offset.setdefault(row["offset"], []).append(row["largest_change"])
        offsets = sorted({*offsets, *by_offset})
        rows.append((arm, by_offset))
    table = Table(
        f"{head}largest change of any token's NLL, nats, when all positions are shifted ({name})",
        ["arm", *(f"by {n:,}" for n in offsets)],
    )
    table.rows = [[arm, *(f"{max(by[n]):.1e}" if n in by else "n/a" for n in offsets)] for arm, by in rows]
    return table


def published_table(study: Study) -> Table:
    """A paper's figures beside the measured ones, and differences from the baseline beside each other. Of a reduced set-up only the
    direction of a difference compares."""
    grid = study.grid
    p, perplexity = grid.published, grid.figure == "perplexity"
    nats, show, digits = (math.log, math.exp, 2) if perplexity else (float, float, 4)
    head = ["setting", "arm", "published", "measured", "seeds", "less published", "verdict"]
    head += [
        f"published less {grid.baseline}, nats",
        f"measured less {grid.baseline}, nats",
        "verdict on the difference",
    ]
    table = Table(
        f"{p['source']}: {p['what']}" + ("; measured in a reduced set-up" if grid.reduced else ""), head, left=2
    )
    for row in p["rows"]:
        setting = row.get("setting", "")
        if setting not in grid.settings:
            continue
        label = ", ".join(
            filter(
                None, [setting, f"{row['length'] / row['trained']:g}× the training length" if "length" in row else ""]
            )
        )
        values = {arm: as_list(value) for arm, value in row["values"].items()}  # figure, spread; or a word
        numbers = {arm: v[0] for arm, v in values.items() if isinstance(v[0], (int, float))}
        figures = {arm: measured(study, setting, arm, row) for arm in grid.arms}
        base = figures[grid.baseline]
        for arm, ours in figures.items():
            number = numbers.get(arm)
            cells = [
                label,
                arm,
                " ± ".join(f"{v:g}" if isinstance(v, (int, float)) else v for v in values.get(arm, ["–"])),
            ]
            if ours is None:
                table.rows.append([*cells, "n/a", "0", *[""] * 5])
                continue
            n = len(ours["by_seed"])
            cells += [mean_cell(ours["nats"], ours["interval"], show, digits), str(n)]
            if number is None or grid.reduced:
                cells += ["", "" if number is None else "not comparable"]
            else:
                cells += [
                    f"{show(np.mean(ours['nats'])) - number:+.{digits}f}",
                    verdict(nats(number), ours["interval"], n),
                ]
            found = None if arm == grid.baseline or base is None else ours["less"](base)
            theirs = (
                None
                if arm == grid.baseline or number is None or grid.baseline not in numbers
                else nats(number) - nats(numbers[grid.baseline])
            )
            cells += ["" if theirs is None else f"{theirs:+.4f}", difference_cell(found) if found else ""]
            cells.append(
                ""
                if None in (theirs, found)
                else direction(theirs, found)
                if grid.reduced
                else verdict(theirs, found["interval"], found["seeds"])
            )
            table.rows.append(cells)
    return table


def measured(study: Study, setting: str, arm: str, row: dict) -> dict | None:
    """An arm's figure for a row of `published`, the last validation loss or the row of a report: nats (one a seed), interval, by_seed, and
    less(base), its paired difference from another's. In a reduced set-up, lengths are the same multiples of the training length."""
    where = study.grid.published.get("from")
    if not study.runs[setting, arm]:
        return None
    if where:
        length = round(row["length"] / row["trained"] * study.config(setting, arm).block_size)
        by_seed, less = (
            study.rows(setting, where["report"]).get((where["protocol"], arm, "none"), {}).get(length, {}),
            difference_of_rows,
        )
        values = [r["nats_per_token"] for r in by_seed.values()]
    else:
        by_seed, less = study.losses(setting, arm), difference_of_losses
        values = list(by_seed.values())
    if not values or None in values:
        return None
    return {
        "nats": values,
        "interval": seed_interval(values),
        "by_seed": by_seed,
        "less": lambda base: less(by_seed, base["by_seed"]),
    }


# ---- speed


def throughput_path(grid: Grid, folder: Path) -> Path:
    return Path(folder) / f"throughput-{digest([grid.throughput, bench_variants(grid)])}.json"


def speed_ratios(there: dict, variant: str) -> tuple[float, list[float]]:
    """Median over rounds of a variant's speed relative to rope's in the same round, with its 95 % bootstrap interval."""
    ratios = np.array(there["seconds"]["rope"]) / np.array(there["seconds"][variant])
    if len(ratios) < 2 or np.ptp(ratios) == 0:
        return float(np.median(ratios)), [float(ratios.min()), float(ratios.max())]
    drawn = scipy.stats.bootstrap(
        (ratios,), np.median, n_resamples=2000, confidence_level=0.95, method="percentile", rng=np.random.default_rng(0)
    )
    return float(np.median(ratios)), [float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)]


def throughput(study: Study) -> dict | None:
    """What scripts/bench.py measured for the grid; None where it asks for nothing, or nothing was measured yet."""
    if not study.grid.throughput or not (path := throughput_path(study.grid, study.folder)).is_file():
        return None
    return json.loads(path.read_text())


def throughput_table(study: Study, there: dict) -> Table:
    labels = {variant: label for label, variant in bench_variants(study.grid).items()}
    published = (study.grid.published or {}).get("tokens_per_s", {})
    base = published.get("rope")
    head = [
        "arm",
        "tokens/s",
        "relative to rope",
        "peak memory, MB",
        *(["published, tokens/s", "published, relative", "verdict"] if published else []),
    ]
    table = Table(
        f"training speed: medians over {there['rounds']} interleaved rounds, of tokens/s and of ratios within a round, on {there['device']}, {there['threads']} thread(s)",
        head,
    )
    for variant, seconds in there["seconds"].items():
        ratio, interval = speed_ratios(there, variant)
        relation = "1" if variant == "rope" else f"{ratio:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
        cells = [
            labels.get(variant, variant),
            f"{there['tokens_a_step'] / np.median(seconds):,.0f}",
            relation,
            f"{there['memory'][variant] / 1e6:,.0f}",
        ]
        if published:
            theirs = published.get(variant)
            relative = theirs / base if theirs and base and variant != "rope" else None
            found = {"difference": ratio - 1, "interval": [bound - 1 for bound in interval], "seeds": len(seconds)}
            judged = (
                direction(relative - 1, found)
                if study.grid.reduced and relative
                else verdict(relative, interval, len(seconds))
            )
            cells += [f"{theirs:,.0f}" if theirs else "–", f"{relative:.3f}" if relative else "", judged]
        table.rows.append(cells)
    return table


# ---- notes and texts


def notes(study: Study) -> list[str]:
    grid, found = study.grid, []
    for setting in grid.settings if grid.arms else ():
        if c := next((c for arm in grid.arms if (c := study.config(setting, arm))), None):
            decay = {
                "cosine": f"cosine to {c.min_lr:g}",
                "step": f"times {c.lr_gamma:g} every {c.lr_step:,} steps",
                "wsd": "constant, then linear",
            }
            data = grid.data_of(setting) or {"corpus": Path(c.data_dir).name}
            found.append(
                f"{setting + ': ' if setting else ''}{c.n_layer} layers × {c.n_embd}, {c.n_head} heads, vocabulary {c.vocab_size:,}, {data['corpus']}; "
                f"length {c.block_size}, {c.max_steps:,} steps × {c.batch_tokens:,} {study.unit}s = {c.max_steps * c.batch_tokens / 1e6:,.2f} M; "
                f"warm-up {c.warmup_steps}, {decay.get(c.schedule, c.schedule)}."
            )
    n = len(grid.seeds)
    if grid.arms:
        found.append(tuning_note(study))
        if n > 1:
            found.append(
                f"{n} paired seeds. Brackets at means: 95 % t interval over seeds; at differences of validation loss: the same of paired differences; "
                "at differences of evaluations: over seeds and documents (intervals.py). They are for each difference alone, not for all at once."
                + (" Two seeds leave one degree of freedom: such intervals are wide." if n == 2 else "")
            )
        else:
            found.append(
                "One seed: brackets are over documents, and say nothing about what another seed would give. Nothing is bold for that reason."
            )
        marks = f"{NOISE}: inside noise, the interval contains 0; bold: better than what is subtracted, beyond noise"
        found.append(f"Differences are in nats per {study.unit}, negative is better; {marks}.")
    for name in grid.eval or {}:
        there = next((r for key in study.runs for r in study.reports(*key, name).values() if "results" in r), None)
        if there:
            rows = [
                r
                for key in study.runs
                for report in study.reports(*key, name).values()
                for r in report.get("results", ())
                if r["tokens"]
            ]
            curve = all(
                r["protocol"] == "per-position" for r in rows
            )  # whose windows an arm that ends earlier has the start of
            span = "the split as one text" if there["stream"] else f"{there['documents']} whole documents"
            targets = f"{max((r['tokens'] for r in rows), default=0):,} target {study.unit}s, " + (
                "in whole windows" if curve else "the same for all arms and lengths"
            )
            found.append(
                f"Report {name}: split {there['split']}, {span}, {targets}; stride {there['stride']}; {there['dtype']}."
            )
        reasons = [
            row["reason"]
            for key in study.runs
            for r in study.reports(*key, name).values()
            for row in r.get("results", ())
            if row.get("reason")
        ]
        found += [f"n/a: {reason}." for reason in dict.fromkeys(reasons)]
    if grid.reduced:
        found.append(f"Reduced: {' '.join(grid.reduced.split())}")
    if study.missing:
        found.append(
            f"Missing, not done or diverged: {'; '.join(study.missing)}. Means are over an arm's other seeds, differences over those that both arms have; "
            "where these are one, brackets are over documents alone, and nothing is bold."
        )
    return found


def tuning_note(study: Study) -> str:
    grid = study.grid
    if not grid.tune:
        return "Learning rates are the same for all arms and were not tuned."
    rates = sorted(float(r) for r in as_list(grid.tune["learning_rate"]))
    chosen = {(s, a): grid.best_rate(study.folder, s, a) for s in grid.settings for a in grid.arms}
    budget = [
        f"{', '.join(f'{r:g}' for r in rates)} with seed(s) {', '.join(map(str, as_list(grid.tune.get('seeds') or [0])))}"
    ]
    budget += [f"{k} {v}" for k, v in (grid.tune.get("fields") or {}).items()]
    text = f"Learning rates were tuned for each arm with the same budget: {', '.join(budget)}; lowest final validation loss."
    edge = [", ".join(filter(None, key)) for key, rate in chosen.items() if rate in (rates[0], rates[-1])]
    return text + (f" At the end of the range, so perhaps not the best: {'; '.join(edge)}." if edge else "")


def environment(study: Study) -> str:
    """Where the runs were made, as their metrics and evaluations say; without runs, where speed was measured."""
    for by_seed in study.runs.values():
        for run in by_seed.values():
            found = next((m["environment"] for m in run.metrics() if "environment" in m), {})
            there = next((r for n in study.grid.eval or {} if (r := run.report(n)) and "torch" in r), {})
            found = {**{k: there[k] for k in ("torch", "device", "threads") if k in there}, **found}
            return ", ".join(f"{k} {v}" for k, v in found.items() if isinstance(v, (str, int, float)))
    bench = throughput(study) or {}
    return ", ".join(f"{k} {bench[k]}" for k in ("torch", "device", "threads", "compile") if k in bench)


def markdown(study: Study) -> str:
    grid = study.grid
    parts = [grid.question.strip()] if grid.question else []
    parts += [t.markdown() for t in tables(study)]
    parts.append("\n".join(f"- {note}" for note in notes(study)))
    if grid.decisions:
        parts.append("Decisions:\n\n" + "\n".join(f"- {' '.join(d.split())}" for d in grid.decisions))
    parts.append(f"Made by `{grid.command}`" + (f" ({where})" if (where := environment(study)) else "") + ".")
    return "\n\n".join(p for p in parts if p) + "\n"


def latex_text(study: Study) -> str:
    text = "\n\n".join(t.latex() for t in tables(study))
    return "% needs booktabs\n" + text + "\n\n" + "\n".join(f"% {note}" for note in notes(study)) + "\n"


README = """\
# {title}

{begin}
{end}

{figure}## Answer

"""


def write(folder: Path) -> str:
    """Make tables and figure of a folder: table.md, or in a folder of collected files README.md, whose part between two marks is
    made and the rest left alone; table.tex; figure.png. Returns the Markdown."""
    import plot  # after the files are read: matplotlib takes a moment

    study = Study.read(folder)
    text = markdown(study)
    readme = study.folder / "README.md"
    if readme.is_file():
        before, _, rest = readme.read_text().partition(BEGIN)
        readme.write_text(f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}")
    else:
        (study.folder / "table.md").write_text(text)
    (study.folder / "table.tex").write_text(latex_text(study))
    if any(study.runs.values()):
        plot.draw(study, study.folder / "figure.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="a sweep's folder of runs, or what --collect made of it")
    args = parser.parse_args()
    try:
        print(write(args.folder))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
