"""The report of a study: its tables with notes on how they came about, as Markdown and as LaTeX, and its figure."""

from collections import Counter
from pathlib import Path

from nanope.config import RunConfig
from nanope.evaluation.key_tokens import key_rows
from nanope.evaluation.probe_tables import key_notes
from nanope.files import write_atomically
from nanope.study.figures import write_figures
from nanope.study.grid import Grid, as_list
from nanope.study.markup import LOWER, NOISE, WORSE
from nanope.study.results import Study, scored_rows, task_rows, throughput
from nanope.study.tables import tables

BEGIN, END = "<!-- made by scripts/report.py: begin -->", "<!-- end -->"
README = """\
# {title}

{begin}
{end}

{figure}## Answer

"""


def write(folder: Path) -> str:
    """Make the tables and the figure of a folder: table.md, table.tex, figure.png, figure.pdf. Where there is a
    README.md, the part of it between two marks is made instead of table.md, and the rest is left alone. Returns the
    Markdown."""
    study = Study.read(folder)
    text, readme = markdown(study), study.folder / "README.md"
    if readme.is_file():
        before, begun, rest = readme.read_text().partition(BEGIN)
        _, ended, after = rest.partition(END)
        if not (begun and ended):
            raise ValueError(f"{readme} lacks the line {BEGIN}, or {END} behind it, between which the tables go")
        made = f"{before}{BEGIN}\n{text}{END}{after}".encode()
        write_atomically(readme, lambda file: file.write(made))
    else:
        (study.folder / "table.md").write_text(text)
    (study.folder / "table.tex").write_text(latex_text(study))
    write_figures(study, study.folder)
    return text


def start_readme(grid: Grid, folder: Path) -> None:
    """A README.md with the two marks and a heading for the answer, where there is none."""
    path = Path(folder) / "README.md"
    if not path.exists():
        figure = "![figures](figure.png)\n\n" if grid.arms else ""
        path.write_text(README.format(title=grid.name, begin=BEGIN, end=END, figure=figure))


def markdown(study: Study) -> str:
    grid = study.grid
    parts = [grid.question.strip()] if grid.question else []
    parts += [table.markdown() for table in tables(study)]
    parts.append("\n".join(f"- {note}" for note in notes(study)))
    if grid.decisions:
        parts.append("Decisions:\n\n" + "\n".join(f"- {' '.join(decision.split())}" for decision in grid.decisions))
    where = environment(study)
    parts.append(f"Made by `{grid.command}`" + (f" ({where})" if where else "") + ".")
    return "\n\n".join(filter(None, parts)) + "\n"


def latex_text(study: Study) -> str:
    text = "\n\n".join(table.latex() for table in tables(study))
    return "% needs booktabs\n" + text + "\n\n" + "\n".join(f"% {note}" for note in notes(study)) + "\n"


def environment(study: Study) -> str:
    """Where the runs of the tables were made, as their metrics and evaluations say: each value, and of how many runs
    where it is not that of all. Without runs: where speed was measured."""
    runs, found = [run for by_seed in study.runs.values() for run in by_seed.values()], {}
    for run in runs:
        trained = next((line["environment"] for line in run.metrics() if "environment" in line), {})
        reports = filter(None, map(run.report, study.grid.eval))
        evaluated = next((report for report in reports if "torch" in report), {})
        told = {k: evaluated[k] for k in ("torch", "device", "threads") if k in evaluated} | trained
        if git := told.get("git"):
            told["commit"] = git["commit"] + " with changes" * git["dirty"]
        for key, value in told.items():
            if isinstance(value, (str, int, float)) and key not in ("seed", "data_seed"):
                found.setdefault(key, Counter())[value] += 1
    if not runs and (bench := throughput(study)):
        found = {k: Counter([bench[k]]) for k in ("torch", "device", "threads", "compile") if k in bench}
    return "; ".join(f"{key} {counted(counts, len(runs) or 1)}" for key, counts in found.items())


def counted(counts: Counter, total: int) -> str:
    """Values, with the number of runs of each where it is not one value for all."""
    if [*counts.values()] == [total]:
        return str(*counts)
    return ", ".join(f"{n} × {value}" for value, n in counts.most_common())


# ---- notes


def notes(study: Study) -> list[str]:
    """What a reader must know to judge the tables, a sentence or a few each."""
    grid, found = study.grid, []
    for setting in grid.settings if grid.arms else ():
        if config := study.any_config(setting):
            found.append(set_up_note(study, setting, config))
    if grid.arms:
        found += [tuning_note(study), seeds_note(len(grid.seeds))]
        marks = f"{NOISE}: inside noise, the interval contains 0; bold: better than what is subtracted, beyond noise"
        marks += f"; {WORSE}: worse, beyond noise"
        found.append(f"Differences are in nats per {study.unit}, negative is better; {marks}.")
        if has_spread(grid):
            found.append(SPREAD)
    for name in grid.eval:
        found += evaluation_notes(study, name)
    if grid.reduced:
        found.append(f"Reduced: {' '.join(grid.reduced.split())}")
    if study.missing:
        found.append(
            f"Missing, not done or diverged: {'; '.join(study.missing)}. Means are over an arm's other seeds, "
            "differences over those that both arms have; where these are one, brackets are over documents alone, "
            f"and nothing is bold or has {WORSE}."
        )
    return found


SPREAD = (
    "Published figures reach as far as their ±, and a difference of two as far as the root of the sum of the squares. "
    "What is outside of the measured interval by less cannot be told apart; nor can the direction of a published "
    "difference that is within its own reach."
)


def has_spread(grid: Grid) -> bool:
    """Whether a published figure of the table has a ±."""
    rows = [row for row in (grid.published or {}).get("rows", ()) if row.get("setting", "") in grid.settings]
    return any(len(as_list(value)) > 1 for row in rows for value in row["values"].values())


def set_up_note(study: Study, setting: str, c: RunConfig) -> str:
    decay = {
        "cosine": f"cosine to {c.min_lr:g}",
        "step": f"times {c.lr_gamma:g} every {c.lr_step:,} steps",
        "wsd": "constant, then linear",
    }
    data = study.grid.data_of(setting) or {"corpus": Path(c.data_dir).name}
    return (
        f"{setting + ': ' if setting else ''}{c.n_layer} layers × {c.n_embd}, {c.n_head} heads, "
        f"vocabulary {c.vocab_size:,}, {data['corpus']}; length {c.block_size}, {c.max_steps:,} steps × "
        f"{c.batch_tokens:,} {study.unit}s = {c.max_steps * c.batch_tokens / 1e6:,.2f} M; "
        f"warm-up {c.warmup_steps}, {decay.get(c.schedule, c.schedule)}."
    )


def tuning_note(study: Study) -> str:
    grid = study.grid
    if not grid.tune:
        own = {}  # what is said of settings in which arms differ → those settings
        for setting in grid.settings:
            rates = {arm: rate_of(c) for arm in grid.arms if (c := study.config(setting, arm))}
            if len({*rates.values()}) > 1:
                own.setdefault(", ".join(f"{arm} {rate}" for arm, rate in rates.items()), []).append(setting)
        if not own:
            return "Learning rates are the same for all arms and were not tuned."
        texts = (text + f" ({', '.join(at)})" * any(at) for text, at in own.items())
        return f"Learning rates were not tuned, and are the grid's own: {'; '.join(texts)}."
    rates = sorted(float(rate) for rate in as_list(grid.tune["learning_rate"]))
    seeds = ", ".join(map(str, as_list(grid.tune.get("seeds") or [0])))
    budget = [f"{', '.join(f'{rate:g}' for rate in rates)} with seed(s) {seeds}"]
    budget += [f"{k} {v}" for k, v in (grid.tune.get("fields") or {}).items()]
    text = f"Learning rates were tuned for each arm with the same budget: {', '.join(budget)}; "
    text += "lowest final validation loss."
    chosen = {key: grid.best_rate(study.files, *key) for key in study.runs}
    edge = [", ".join(filter(None, key)) for key, rate in chosen.items() if rate in (rates[0], rates[-1])]
    return text + (f" At the end of the range, so perhaps not the best: {'; '.join(edge)}." if edge else "")


def rate_of(c: RunConfig) -> str:
    return f"{c.learning_rate:g}" + f" (positions × {c.pos_lr_multiplier:g})" * (c.pos_lr_multiplier != 1)


def seeds_note(n: int) -> str:
    if n == 1:
        return (
            "One seed: brackets are over documents, and say nothing about what another seed would give. "
            f"Nothing is bold or has {WORSE} for that reason. They are for each difference alone, not for all at once."
        )
    return (
        f"{n} paired seeds. Brackets at means: 95 % t interval over seeds; at differences of validation loss: "
        "the same of paired differences; at differences of evaluations: over seeds and documents. "
        "They are for each difference alone, not for all at once."
        + (" Two seeds leave one degree of freedom: such intervals are wide." if n == 2 else "")
    )


def evaluation_notes(study: Study, name: str) -> list[str]:
    """What an evaluation scored, and why figures are missing."""
    reports = study.all_reports(name)
    rows = [row for report in reports for kind in ("results", "probe", "attention") for row in report.get(kind, ())]
    reasons = [row["reason"] for row in [*rows, *key_rows(rows)] if row.get("reason")]
    found = [f"n/a: {reason}." for reason in dict.fromkeys(reasons)]
    if answered := [(report["task"], row) for report in reports for row in task_rows(report)]:
        found.append(task_note(study, name, answered))
    found += key_notes(reports)
    scored = [row for report in reports for row in scored_rows(report) if row["tokens"]]
    if not scored:
        return found
    about = next(report for report in reports if scored_rows(report))
    span = "the split as one text" if about["stream"] else f"{about['documents']} whole documents"
    # an arm that ends at its training length has the start of the windows of a curve, not all their targets
    curve = all(row["protocol"] == "per-position" for row in scored)
    same = "in whole windows" if curve else "the same for all arms and lengths"
    targets = f"{max(row['tokens'] for row in scored):,} target {study.unit}s, {same}"
    what = f"Report {name}: split {about['split']}, {span}, {targets}; stride {about['stride']}; {about['dtype']}."
    if len(study.grid.seeds) == 1 and "interval" in about:  # that of the run itself, by the method of its day
        what += f" Brackets at figures: {about['interval']}."
    if any(report.get("other_data") for report in reports):
        what += " It is on other data than that of the runs' training."
    return [what, *found]


def task_note(study: Study, name: str, answered: list[tuple[dict, dict]]) -> str:
    """What the figures of a task are. answered: (the data's task, row) of every row."""
    trained = "; ".join(dict.fromkeys(f"{task['name']} up to {task['length']}" for task, _ in answered))
    counts = " … ".join(dict.fromkeys(f"{row['examples']:,}" for _, row in answered))
    over = (
        "examples (Wilson for exact matches)"
        if len(study.grid.seeds) == 1
        else "seeds (where all are equal, over examples)"
    )
    return (
        f"Report {name}: {counts} examples of each length, the same for all arms and seeds; trained on {trained}. An "
        "exact match is a greedy answer that is right at every place. Chance guesses evenly among the symbols of an "
        f"answer. Brackets are over {over}, of differences over seeds and examples. More is better: bold is better "
        f"than the baseline, {LOWER} worse."
    )
