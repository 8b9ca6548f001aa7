"""The tables of a study: training, evaluations, a paper's figures beside the measured ones, and speed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanope.study.costs import model_cost
from nanope.study.grid import as_list, bench_variants
from nanope.study.markup import Table, accuracy_cell, difference_cell, mean_cell, row_cell, titled
from nanope.study.probe_tables import probe_tables
from nanope.study.results import Study, scaled, three_of, throughput
from nanope.study.seed_statistics import (
    change_of_difference,
    difference_of_answers,
    difference_of_losses,
    difference_of_rows,
    direction,
    seed_interval,
    speed_ratios,
    verdict,
)


def tables(study: Study) -> list[Table]:
    """All tables that there is something for, in the order of the report."""
    grid, found = study.grid, []
    if grid.arms and (grid.published or {}).get("rows"):
        found.append(published_table(study))
    found += settings_tables(study)
    for setting in grid.settings if grid.arms else ():
        found += leaderboard(study, setting)
        found.append(training_table(study, setting))
        for name in grid.eval:
            found += report_tables(study, setting, name)
    if bench := throughput(study):
        found.append(throughput_table(study, bench))
    return found


def training_table(study: Study, setting: str) -> Table:
    baseline, base = study.grid.baseline, study.losses(setting, study.grid.baseline)
    columns = ["arm", "parameters", "seeds", "learning rate", "training loss", "validation loss", f"less {baseline}"]
    table = Table(titled(setting, "training"), columns)
    for arm in study.grid.arms:
        runs, config, losses = study.runs[setting, arm], study.config(setting, arm), study.losses(setting, arm)
        if not runs:
            table.rows.append([arm, "none is done", *[""] * 5])
            continue
        last = np.mean([np.mean(run.series("train/loss")[1][-5:]) for run in runs.values()])
        values = [*losses.values()]
        table.rows.append([
            arm, f"{model_cost(config)[0]:,}", str(len(runs)), f"{config.learning_rate:g}", f"{last:.4f}",
            mean_cell(values, seed_interval(values)),
            "" if arm == baseline else difference_cell(difference_of_losses(losses, base)),
        ])  # fmt: skip
    return table


def leaderboard(study: Study, setting: str) -> list[Table]:
    """What the other tables say, in a row an arm: differences from the baseline on the same targets, and what an arm
    costs. The lowest at the training length comes first. [] where no speed was measured, or there is one length."""
    baseline, bench = study.grid.baseline, throughput(study)
    protocol, rows = study.rows_by_length(setting)
    lengths = sorted({n for by_length in rows.values() for n in by_length})
    if not bench or protocol != "same-targets" or len(lengths) < 2:
        return []
    trained, variants = study.any_config(setting).block_size, bench_variants(study.grid)
    alike = {study.config(setting, arm).block_size for arm in rows} == {trained}
    shown = three_of(lengths, [n for n in lengths if n in (trained, 4 * trained, 16 * trained)])
    found, than = study.differences(setting, shown), ", its context cropped to 1×" * bool(study.cropped_to(setting))
    table = Table(
        titled(
            setting,
            f"leaderboard: nats per {study.unit} less {baseline}{than}; speed and peak memory in parts of rope's",
        ),
        ["arm", "seeds", "rate", *(f"{n / trained:.3g}×" if alike else f"{n:,}" for n in shown), "speed", "memory"],
    )
    first = shown.index(trained) if trained in shown else 0
    at_first = {arm: d["difference"] if (d := each[first]) else math.inf for arm, each in found.items()}
    for arm in sorted(found, key=lambda arm: 0.0 if arm == baseline else at_first[arm]):
        cells = ["" if arm == baseline and not d else difference_cell(d, digits=3) for d in found[arm]]
        cost, variant = ["n/a", "n/a"], variants.get(arm)
        if variant in bench["seconds"]:
            memory = bench["memory"][variant] / bench["memory"]["rope"]
            cost = [f"{speed_ratios(bench, variant)[0]:.2f}", f"{memory:.2f}"]
        rate = f"{study.config(setting, arm).learning_rate:g}"
        table.rows.append([arm, str(len(study.runs[setting, arm])), rate, *cells, *cost])
    return [table]


def settings_tables(study: Study) -> list[Table]:
    """Differences from the baseline in every setting, and what a setting changes in them: each less that in the first
    setting. [] where fewer than two scored same-targets, or not all the same ones at the same training length."""
    grid, by_setting = study.grid, {setting: study.rows_by_length(setting) for setting in study.grid.settings}
    settings = [setting for setting, (protocol, _) in by_setting.items() if protocol == "same-targets"]
    by_length = [at for setting in settings for at in by_setting[setting][1].values()]  # of every arm
    rows = [row for at in by_length for by_seed in at.values() for row in by_seed.values()]
    scored = {row["targets_sha256"] for row in rows if row["nats_per_token"] is not None}
    trained = {study.any_config(setting).block_size for setting in settings}
    if len(settings) < 2 or len(scored) > 1 or len(trained) > 1:
        return []
    first, lengths = settings[0], sorted({row["length"] for row in rows})
    what = f"nats per {study.unit} less {grid.baseline}" + ", its context cropped to 1×" * bool(study.cropped_to(first))
    head = ["setting", "arm", *(f"{n / max(trained):.3g}×" for n in lengths)]
    less = Table(f"{what}, by setting", head, left=2)
    change = Table(f"what a setting changes: {what}, less the same in {first}", head, left=2)
    before = study.compared(first, lengths)
    for setting in settings:
        for arm, pairs in study.compared(setting, lengths).items():
            if not any(pairs):  # the baseline
                continue
            found = [pair and difference_of_rows(*pair) for pair in pairs]
            less.rows.append([setting, arm, *blank_or_cells(pairs, found)])
            if setting != first and arm in before:
                found = [pair and then and change_of_difference(pair, then) for pair, then in zip(pairs, before[arm])]
                change.rows.append([setting, arm, *blank_or_cells(pairs, found)])
    return [less, change]


def blank_or_cells(pairs: list[tuple | None], found: list[dict | None]) -> list[str]:
    return [difference_cell(d, digits=3) if pair else "" for pair, d in zip(pairs, found)]


# ---- evaluations


def report_tables(study: Study, setting: str, name: str) -> list[Table]:
    """Of one evaluation: the tables of each protocol, that of shifted positions, and those of probe_tables."""
    everything, found = study.rows(setting, name), []
    for protocol in dict.fromkeys(key[0] for key in everything if key[0] != "per-position"):  # a curve, for the figure
        rows = {(arm, scaling): by_length for (p, arm, scaling), by_length in everything.items() if p == protocol}
        rows = {key: by_length for key, by_length in rows.items() if key[1] == "none" or has_figure(by_length)}
        found += protocol_tables(study, setting, name, protocol, rows)
    if answers := study.rows(setting, name, task=True):
        found += task_tables(study, setting, name, answers)
    if any("shift" in report for arm in study.grid.arms for report in study.reports(setting, arm, name).values()):
        found.append(shift_table(study, setting, name))
    return found + probe_tables(study, setting, name)


def has_figure(by_length: dict[int, dict[int, dict]]) -> bool:
    return any(row["nats_per_token"] is not None for rows in by_length.values() for row in rows.values())


def protocol_tables(study: Study, setting: str, name: str, protocol: str, rows: dict) -> list[Table]:
    """Figures by length, differences from the baseline, and, where lengths share their targets, from the arm's own
    figure at the training length. rows: (arm, scaling) → length → seed → row."""
    grid, unit = study.grid, study.unit
    lengths = sorted({n for by_length in rows.values() for n in by_length})
    mean, less, growth = (
        Table(titled(setting, f"{what}, {protocol} ({name})"), ["arm", *map(str, lengths)])
        for what in (
            f"{'perplexity' if grid.figure == 'perplexity' else 'nats'} per {unit} at context lengths",
            f"nats per {unit} less {grid.baseline}",
            f"nats per {unit} less the arm's own at the training length",
        )
    )
    base = rows.get((grid.baseline, "none"), {})
    for (arm, scaling), by_length in rows.items():
        at = {n: by_length.get(n, {}) for n in lengths}
        trained = study.config(setting, arm).block_size
        own = rows.get((arm, "none"), {}).get(trained, {})
        itself = trained if scaling == "none" else None
        title = scaled(arm, next(row for by_seed in by_length.values() for row in by_seed.values()))

        mean.rows.append([title, *(row_cell(at[n], grid.figure) for n in lengths)])
        if title != grid.baseline:
            from_base = (difference_cell(difference_of_rows(at[n], base.get(n, {}))) for n in lengths)
            less.rows.append([title, *from_base])
        from_own = ("" if n == itself else difference_cell(difference_of_rows(at[n], own)) for n in lengths)
        growth.rows.append([title, *from_own])
    return [mean] + [less] * bool(less.rows) + [growth] * (protocol == "same-targets" and len(lengths) > 1)


def task_tables(study: Study, setting: str, name: str, rows: dict) -> list[Table]:
    """Of a task by length: exact matches beside chance, their differences from the baseline, single tokens, and the
    same models with no more context than a row of training. rows: (protocol, arm, scaling) → length → seed → row."""
    lengths = sorted({n for by_length in rows.values() for n in by_length})
    rows = {
        arm if scaling == "none" else f"{arm}, {scaling}": by_length for (_, arm, scaling), by_length in rows.items()
    }
    baseline, any_row = study.grid.baseline, {}
    for by_length in rows.values():
        any_row |= {n: next(iter(by_seed.values())) for n, by_seed in by_length.items()}
    head = ["arm", *(f"{n}" for n in lengths)]
    exact, less, tokens, cropped = (
        Table(titled(setting, f"{what} by length ({name})"), head)
        for what in (
            "exact match",
            f"exact match less {baseline}",
            "tokens of the answer that are right",
            "exact match with the context cropped to a row of training",
        )
    )
    for arm, by_length in rows.items():
        at = [[*by_length.get(n, {}).values()] for n in lengths]  # of each length, a row a seed
        exact.rows.append([arm, *map(accuracy_cell, at)])
        tokens.rows.append([arm, *(accuracy_cell(each, "token_accuracy", "token_interval") for each in at)])
        if arm != baseline:
            base = rows.get(baseline, {})
            found = (difference_of_answers(by_length.get(n, {}), base.get(n, {})) for n in lengths)
            less.rows.append([arm, *(difference_cell(d, digits=3, better=1) for d in found)])
        cropped.rows.append([arm, *(accuracy_cell([row["cropped"] for row in each]) for each in at)])
    exact.rows.append(["chance", *(f"{any_row[n]['chance']:.1%}" for n in lengths)])
    tokens.rows.append(["chance", *(f"{any_row[n]['token_chance']:.1%}" for n in lengths)])
    return [table for table in (exact, less, tokens, cropped) if table.rows]


def shift_table(study: Study, setting: str, name: str) -> Table:
    """By how much the NLL of any token changes when all positions move; the largest over seeds."""
    changes = {}  # arm → offset → [a seed each]
    for arm in study.grid.arms:
        changes[arm] = {}
        for report in study.reports(setting, arm, name).values():
            for row in report.get("shift", ()):
                changes[arm].setdefault(row["offset"], []).append(row["largest_change"])
    offsets = sorted({n for by_offset in changes.values() for n in by_offset})
    title = titled(setting, f"largest change of any token's NLL, nats, when all positions are shifted ({name})")
    rows = [[arm, *(f"{max(by[n]):.1e}" if n in by else "n/a" for n in offsets)] for arm, by in changes.items()]
    return Table(title, ["arm", *(f"by {n:,}" for n in offsets)], rows)


# ---- a paper's figures


@dataclass
class Measured:
    """An arm's figure for a row of `published`, in nats."""

    by_seed: dict
    nats: list[float]  # one a seed
    difference: Callable[[dict, dict], dict | None]  # from another arm's by_seed

    @property
    def interval(self) -> list[float] | None:
        return seed_interval(self.nats)


def published_table(study: Study) -> Table:
    """A paper's figures beside the measured ones, and differences from the baseline beside each other. Of a reduced
    set-up only the direction of a difference compares."""
    grid, p = study.grid, study.grid.published
    title = f"{p['source']}: {p['what']}" + ("; measured in a reduced set-up" if grid.reduced else "")
    less = f"less {grid.baseline}, nats"
    head = ["setting", "arm", "published", "measured", "seeds", "less published", "verdict"]
    table = Table(title, [*head, f"published {less}", f"measured {less}", "verdict on the difference"], left=2)
    for row in p["rows"]:
        if row.get("setting", "") in grid.settings:
            table.rows += published_rows(study, row)
    return table


def published_rows(study: Study, row: dict) -> list[list[str]]:
    """The cells of a row of `published`, a line an arm."""
    grid, setting, found = study.grid, row.get("setting", ""), []
    nats, show, digits = (math.log, math.exp, 2) if grid.figure == "perplexity" else (float, float, 4)
    length = f"{row['length'] / row['trained']:g}× the training length" if "length" in row else ""
    label = ", ".join(filter(None, [setting, length]))
    texts = {arm: as_list(value) for arm, value in row["values"].items()}  # figure, spread; or a word
    published = {arm: value[0] for arm, value in texts.items() if isinstance(value[0], (int, float))}
    spread = {arm: reach_in(nats, *texts[arm]) for arm in published}
    figures = {arm: measured(study, setting, arm, row) for arm in grid.arms}
    base = figures[grid.baseline]
    for arm, ours in figures.items():
        text = " ± ".join(f"{v:g}" if isinstance(v, (int, float)) else v for v in texts.get(arm, ["–"]))
        if ours is None:
            found.append([label, arm, text, "n/a", "0", *[""] * 5])
            continue
        seeds, number = len(ours.by_seed), published.get(arm)
        cells = [label, arm, text, mean_cell(ours.nats, ours.interval, show, digits), str(seeds)]
        if number is None or grid.reduced:
            cells += ["", "" if number is None else "not comparable"]
        else:
            change = show(np.mean(ours.nats)) - number
            cells += [f"{change:+.{digits}f}", verdict(nats(number), ours.interval, seeds, spread[arm])]
        less = theirs = None
        if arm != grid.baseline and base is not None:
            less = ours.difference(ours.by_seed, base.by_seed)
        if arm != grid.baseline and number is not None and grid.baseline in published:
            theirs = nats(number) - nats(published[grid.baseline])
            both = math.hypot(spread[arm], spread[grid.baseline])
        cells += ["" if theirs is None else f"{theirs:+.4f}", difference_cell(less) if less else ""]
        if theirs is None or less is None:
            judged = ""
        else:
            judged = (
                direction(theirs, less, both)
                if grid.reduced
                else verdict(theirs, less["interval"], less["seeds"], both)
            )
        found.append([*cells, judged])
    return found


def reach_in(nats: Callable[[float], float], figure: float, spread: float = 0.0) -> float:
    """Half of the width of figure ± spread in nats."""
    return (nats(figure + spread) - nats(figure - spread)) / 2


def measured(study: Study, setting: str, arm: str, row: dict) -> Measured | None:
    """What an arm has for a row of `published`: the last validation loss, or a row of a report. In a reduced set-up,
    lengths are the same multiples of the training length."""
    where = study.grid.published.get("from")
    if not study.runs[setting, arm]:
        return None
    if where:
        length = round(row["length"] / row["trained"] * study.config(setting, arm).block_size)
        rows = study.rows(setting, where["report"]).get((where["protocol"], arm, "none"), {}).get(length, {})
        found = Measured(rows, [r["nats_per_token"] for r in rows.values()], difference_of_rows)
    else:
        losses = study.losses(setting, arm)
        found = Measured(losses, [*losses.values()], difference_of_losses)
    return None if not found.nats or None in found.nats else found


# ---- speed


def throughput_table(study: Study, bench: dict) -> Table:
    """Speeds of training; beside a paper's where it has some. `bench` is a report of scripts/bench.py."""
    labels = {}  # arms that the benchmark does not tell apart, such as by learning rates, share a row
    for label, variant in bench_variants(study.grid).items():
        labels.setdefault(variant, []).append(label)
    published = (study.grid.published or {}).get("tokens_per_s", {})
    table = Table(
        f"training speed: medians over {bench['rounds']} interleaved rounds, of tokens/s and of ratios within a round, "
        f"on {bench['device']}, {bench['threads']} thread(s)"
        + "; timed in groups, each beside its own rope: only ratios compare"
        * ("rope_seconds" in bench),
        ["arm", "tokens/s", "relative to rope", "peak memory, MB"]
        + ["published, tokens/s", "published, relative", "verdict"] * bool(published),
    )
    for variant, seconds in bench["seconds"].items():
        ratio, interval = speed_ratios(bench, variant)
        relation = "1" if variant == "rope" else f"{ratio:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
        speed = f"{bench['tokens_a_step'] / np.median(seconds):,.0f}"
        cells = ["; ".join(labels.get(variant, [variant])), speed, relation, f"{bench['memory'][variant] / 1e6:,.0f}"]
        if published:
            cells += published_speed(study, published, variant, ratio, interval, len(seconds))
        table.rows.append(cells)
    return table


def published_speed(
    study: Study, published: dict, variant: str, ratio: float, interval: list[float], rounds: int
) -> list[str]:
    """Three cells: the published speed, that relative to rope's, and the verdict on the measured ratio."""
    theirs, base = published.get(variant), published.get("rope")
    relative = theirs / base if theirs and base and variant != "rope" else None
    if study.grid.reduced and relative:
        found = {"difference": ratio - 1, "interval": [bound - 1 for bound in interval], "seeds": rounds}
        judged = direction(relative - 1, found)
    else:
        judged = verdict(relative, interval, rounds)
    return [f"{theirs:,.0f}" if theirs else "–", f"{relative:.3f}" if relative else "", judged]
