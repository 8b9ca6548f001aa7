"""A grid file: what is compared (arms), where (settings), with which seeds, and how it is evaluated.

    base: ../quickstart.yaml                    # a config to start from, relative to the grid file
    data: {corpus: novels, tokenizer: byte}     # data/prepare.py makes data/novels-byte; or give data_dir in fields.
                                                # {corpus: task, task: copy, length: 9} is data/task-copy-9
    fields: {max_steps: 1000}                   # fields of train.py for every run, over the base
    arms:                                       # what is compared; a list of schemes will do
      rope: {pos: rope}
      comrope, block 2: {pos: comrope, pos_options: {block: 2}}
    settings: {short: {block_size: 256}}        # optional: what all arms are compared under; may have base and data.
                                                # `arm` in its pos is the arm's scheme: {pos: [arm, arm, arm, none]}
    grid: {weight_decay: [0, 0.1]}              # optional: every combination of these fields is a setting
    seeds: 3                                    # 1, 2, 3, or a list; seed = data_seed: the arms of a seed are paired
    baseline: rope                              # default: the first arm
    tune: {learning_rate: [5.0e-4, 1.0e-3], seeds: [0], fields: {max_steps: 300}}
                                                # optional: per arm, on validation, before the rest
    eval: {far: {lengths: [1x, 4x], max_targets: 16384}}       # name → arguments of eval.py; 4x is 4 times block_size.
                                                # {answers: {protocol: task}} for tasks
    throughput: {schemes: [rope, carope], rounds: 7}           # optional: arguments of scripts/bench.py
    figure: nats                                # or perplexity: what tables show (statistics are in nats)
    cropped: true                               # in leaderboard and figure, the baseline's context ends at its training
                                                # length: a longer one is worth it only where it beats that
    published: {…}                              # a paper's figures, to print beside; see configs/sweeps/crope-2.yaml
    question, decisions, reduced                # texts for the report
    scales: {cpu: {…}}                          # any of these keys again, for --scale cpu; arms, settings may be names

A run's folder is named by arm, setting, seed and a digest of every field that is not train.py's default (of data_order
not "drawn", which older runs have): another config is another folder.
"""

import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from data.corpora import CORPORA
from data.shards import given_path, unknown
from data.tasks import task_named
from nanope.config import SINCE, SWITCHES, RunConfig, as_field, carried, check
from nanope.errors import nearest
from nanope.evaluation.options import lengths_in_tokens, make_parser
from nanope.files import write_atomically
from nanope.study.files import Files
from nanope.study.run import Run, slug
from nanope.values import read_yaml_file
from schemes import label, problems_of, short, single

EVAL_ARGUMENTS = vars(make_parser().parse_args(["--run", "a run"])).keys()
PER_RUN = ("out_dir", "seed", "data_seed", "resume")  # a grid sets none of these: they are what tells its runs apart
WRITTEN_OUT = ("base", "grid", "scales")  # keys of a grid file that a Grid no longer has


@dataclass
class Grid:
    """A grid file with its base, scale and combinations written out: plain values only."""

    name: str
    command: str | None = None  # that made the runs
    question: str | None = None
    data: dict | None = None  # arguments of data/prepare.py, for settings without their own
    fields: dict = field(default_factory=dict)
    settings: dict[str, dict] = field(default_factory=lambda: {"": {}})
    arms: dict[str, dict] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1])
    baseline: str | None = None
    tune: dict | None = None
    eval: dict[str, dict] = field(default_factory=dict)
    throughput: dict | None = None
    figure: str = "nats"
    cropped: bool = False
    published: dict | None = None
    decisions: list[str] = field(default_factory=list)
    reduced: str | None = None

    # ---- reading and writing

    @classmethod
    def read(cls, path: Path, scale: str | None = None, changes: dict | None = None) -> "Grid":
        """From a file. `changes` are keys that replace the file's; fields are added to its own. ValueError or OSError
        for what is wrong with it."""
        path = Path(path)
        given = read_yaml_file(path)
        try:
            grid = cls._of(given, path, scale, changes or {})
            grid.check()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return grid

    @classmethod
    def _of(cls, given: dict, path: Path, scale: str | None, changes: dict) -> "Grid":
        scales = given.pop("scales", None) or {}
        if scale not in (None, "paper", *scales):
            names = ["paper", *scales]
            raise ValueError(f"no scale {scale!r}{nearest(scale, names)} (scales: {', '.join(names)})")
        for layer in (scales.get(scale, {}), changes):
            given = overlaid(given, layer)
        keys = [f.name for f in dataclasses.fields(cls)] + [*WRITTEN_OUT]
        if odd := [k for k in given if k not in keys]:
            raise ValueError(f"unknown key {odd[0]!r}{nearest(odd[0], keys)} (keys: {', '.join(keys)})")

        for key in ("data", "fields", "grid", "tune", "eval", "throughput", "published"):
            if not isinstance(given.get(key), dict | None):
                raise ValueError(f"{key} must be a mapping, not {given[key]!r}")
        for name, report in (given.get("eval") or {}).items():
            if not isinstance(report, dict):
                raise ValueError(f"eval: {name!r} must be a mapping, the arguments of eval.py, not {report!r}")
        if "learning_rate" in changes.get("fields", {}) and given.get("tune"):
            raise ValueError("learning_rate is tuned: change tune in the grid file")

        arms, seeds, baseline = as_mapping(given.get("arms"), "arms"), given.get("seeds", 1), given.get("baseline")
        if baseline is None or (baseline not in arms and "arms" in changes):  # a selection may leave it out
            baseline = next(iter(arms), None)
        made = {
            "name": given.get("name", path.stem),
            "fields": {"data_order": RunConfig.data_order}
            | config_of(path, given.pop("base", None))
            | (given.get("fields") or {}),
            "settings": settings_of(
                given.get("settings"), given.pop("grid", None) or {}, path, given.get("fields") or {}
            ),
            "arms": arms,
            "seeds": list(range(1, seeds + 1)) if isinstance(seeds, int) else seeds,
            "baseline": baseline,
        }
        for fields in (*made["settings"].values(), (given.get("tune") or {}).get("fields") or {}):
            for name in changes.get("fields", {}):  # of all runs, but for what arms are
                fields.pop(name, None)
        different = {json.dumps(setting, sort_keys=True) for setting in made["settings"].values()}
        if changes.get("fields") and len(different) < len(made["settings"]):
            names = ", ".join(changes["fields"])
            raise ValueError(f"{names} set for all runs makes settings equal: choose some of them by --settings")
        return cls(**{k: v for k, v in {**given, **made}.items() if v is not None})

    @classmethod
    def of_folder(cls, folder: Path) -> "Grid":
        """The grid that a folder of runs, or of results, was made by. One that does not say the order of data was
        written before there was a choice."""
        path = Path(folder) / "grid.yaml"
        if not path.is_file():
            raise ValueError(f"{folder} holds no grid.yaml: expected a folder that scripts/sweep.py made")
        content = {k: v for k, v in read_yaml_file(path).items() if v is not None}
        if odd := [k for k in content if k not in cls.__dataclass_fields__]:
            raise ValueError(f"{path}: unknown key {odd[0]!r}: expected what scripts/sweep.py wrote")
        return cls(**content | {"fields": {"data_order": SINCE["data_order"]} | content.get("fields", {})})

    def write(self, folder: Path) -> None:
        """Write grid.yaml, without what is empty."""
        content = {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, {}, []) and v is not False}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=150)
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(folder) / "grid.yaml", lambda file: file.write(text.encode()))

    def use_corpus(self, corpus: str) -> None:
        """Take another corpus for all settings. ValueError where data/prepare.py does not know it."""
        self.data = {**(self.data or {}), "corpus": corpus}
        self.fields.pop("data_dir", None)
        for own in self.settings.values():
            own.pop("data_dir", None)
            if "data" in own:
                own["data"] = {**own["data"], "corpus": corpus}
        self.check()

    # ---- checks

    def check(self) -> None:
        """ValueError that names what is wrong, before anything starts. Options of a scheme are left to the run."""
        if not self.arms and not self.throughput:
            raise ValueError("nothing to do: give arms, or throughput")
        if self.arms and self.baseline not in self.arms:
            hint = f"{nearest(self.baseline, self.arms)} (arms: {', '.join(self.arms)})"
            raise ValueError(f"baseline {self.baseline!r} is no arm{hint}")
        if (
            not isinstance(self.seeds, list)
            or not self.seeds
            or not all(isinstance(s, int) for s in self.seeds)
            or len(set(self.seeds)) < len(self.seeds)
        ):
            raise ValueError(f"seeds must be a number, or a list of different whole numbers, not {self.seeds}")
        if self.figure not in ("nats", "perplexity"):
            raise ValueError(f"figure must be nats or perplexity, not {self.figure!r}")
        if not isinstance(self.cropped, bool):
            raise ValueError(f"cropped must be true or false, not {self.cropped!r}")
        self.check_tune()
        for name, report in self.eval.items():
            if "program" in report:
                raise ValueError(
                    f"the report {name!r} of eval has a program: scripts/shift.py is now `protocol: shift`"
                )
            if odd := [k for k in report if k not in EVAL_ARGUMENTS]:
                hint = nearest(odd[0], EVAL_ARGUMENTS)
                raise ValueError(f"the report {name!r} of eval: {odd[0]} is no argument of eval.py{hint}")
            if "lengths" not in report and as_list(report.get("protocol")) not in (["shift"], ["task"]):
                raise ValueError(f"the report {name!r} of eval lacks lengths")
        for data in map(self.data_of, self.settings):
            if data and data.get("corpus") not in CORPORA:
                raise unknown("corpus", data.get("corpus"), list(CORPORA))
            if data and data["corpus"] == "task":
                task_named(data.get("task"))
        for setting, arm in itertools.product(self.settings, self.arms):
            try:
                check(RunConfig(**self.fields_of(setting, arm)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{', '.join(filter(None, (setting, arm)))}: {error}") from None
        if any(len({*map(slug, names)}) < len(names) for names in (self.arms, self.settings)):
            raise ValueError("two arms or settings differ in punctuation only: their folders would have one name")

    def check_tune(self) -> None:
        tune = self.tune or {}
        for name in tune.get("fields") or {}:
            if name not in RunConfig.__dataclass_fields__ or name in PER_RUN:
                hint = nearest(name, RunConfig.__dataclass_fields__)
                raise ValueError(f"tune: fields: {name} is no field that a grid may set{hint}")
        if isinstance(tune.get("seeds"), int) and tune["seeds"] > 1:  # would be one seed of that number
            raise ValueError(f"tune: seeds is a list of seeds, such as [0], not {tune['seeds']!r}")
        if tune and (set(tune) - {"learning_rate", "seeds", "fields"} or not as_list(tune.get("learning_rate"))):
            raise ValueError(
                f"tune takes learning_rate, a list, and optionally seeds and fields; it has {', '.join(tune)}"
            )

    # ---- what a run is made of

    def data_of(self, setting: str) -> dict | None:
        """What data/prepare.py is to make for a setting. None where fields name the folder."""
        own = self.settings[setting]
        if "data_dir" in own or ("data_dir" in self.fields and "data" not in own and not self.data):
            return None
        data = {**(self.data or {}), **own.get("data", {})}
        if not data:
            return None
        return data if data.get("corpus") == "task" else {"tokenizer": "gpt2", **data}

    def fields_of(self, setting: str, arm: str) -> dict:
        """Fields of train.py for a setting and an arm, without seeds. Paths are relative to the repository."""
        own = {k: v for k, v in self.settings[setting].items() if k != "data"}
        pattern = own.get("pos") if has_arm(own.get("pos")) else None
        beside = {k: own.pop(k) for k in ("pos", "pos_options") if pattern and k in own}
        fields, arm = {**self.fields, **own}, self.arms[arm]
        if "pos" in arm and fields.get("pos_options"):  # made for another scheme
            fields["pos_options"], _ = carried(fields["pos_options"], fields.get("pos", "rope"), arm["pos"])
        fields |= arm
        if pattern:
            pos, options = fields.get("pos", RunConfig.pos), fields.get("pos_options") or {}
            fields |= placed(pattern, beside.get("pos_options") or {}, pos, options)
        for name in fields:
            if name in PER_RUN:
                raise ValueError(f"{name}: a grid sets it itself")
            if name not in RunConfig.__dataclass_fields__:
                raise ValueError(f"{name}: no field of train.py{nearest(name, RunConfig.__dataclass_fields__)}")
        if data := self.data_of(setting):
            fields["data_dir"] = folder_of(data)
        floats = {k for k, v in vars(RunConfig()).items() if isinstance(v, float)}
        fields = {k: as_field(k, v) for k, v in fields.items()}
        return {k: float(v) if k in floats and v is not None else v for k, v in fields.items()}

    # ---- runs

    def run(self, files: Files, setting: str, arm: str, seed: int, rate: float | None = None) -> Run:
        """A run of the tables, with a tuned learning rate where one is given."""
        fields = at_rate(self.fields_of(setting, arm), rate) | {"seed": seed, "data_seed": seed}
        block_size = RunConfig(**fields).block_size
        evaluations = {name: in_tokens(report, block_size) for name, report in self.eval.items()}
        return Run(arm, setting, seed, fields, evaluations, files)

    def trials(self, files: Files, setting: str, arm: str) -> list[Run]:
        """The runs that tune the learning rate of an arm: the same rates, seeds and steps for every arm."""
        tune, found = self.tune or {}, []
        rates, seeds = map(float, as_list(tune.get("learning_rate"))), as_list(tune.get("seeds") or [0])
        for rate, seed in itertools.product(rates, seeds):
            fields = at_rate(self.fields_of(setting, arm), rate)
            fields |= {k: as_field(k, v) for k, v in (tune.get("fields") or {}).items()}
            fields |= {"seed": seed, "data_seed": seed}
            found.append(Run(arm, setting, seed, fields, {}, files, tuning=rate))
        return found

    def best_rate(self, files: Files, setting: str, arm: str) -> float | None:
        """The tuned learning rate: lowest mean validation loss at the end of its trials, the lower rate in a tie. A
        rate with which a trial diverged is out. None until all trials have ended, or where no loss is finite."""
        trials = self.trials(files, setting, arm)
        if not all(t.trained() or t.diverged() for t in trials):
            return None
        losses = {r: [t.val_loss() for t in trials if t.tuning == r] for r in sorted({t.tuning for t in trials})}
        means = {rate: np.mean(values) for rate, values in losses.items() if None not in values}
        return min(means, key=means.get, default=None)

    def main_runs(self, files: Files) -> list[Run | None]:
        """The runs of the tables, seed by seed: a sweep that ends early has whole pairs. None where one waits for its
        learning rate."""
        pairs = [*itertools.product(self.settings, self.arms)]
        rates = {pair: self.best_rate(files, *pair) if self.tune else None for pair in pairs}
        return [
            None if self.tune and rates[pair] is None else self.run(files, *pair, seed, rates[pair])
            for seed, pair in itertools.product(self.seeds, pairs)
        ]

    def runs(self, files: Files) -> list[Run]:
        """Every run that is known: the trials first, and the runs that need their outcome once it is there."""
        pairs = itertools.product(self.settings, self.arms)
        trials = [trial for pair in pairs for trial in self.trials(files, *pair)]
        return trials + [run for run in self.main_runs(files) if run]

    def planned_runs(self, files: Files) -> list[Run]:
        """All runs. Those whose learning rate is still to be tuned have the grid's own."""
        keys = itertools.product(self.seeds, self.settings, self.arms)
        waiting = [key for key, run in zip(keys, self.main_runs(files)) if run is None]
        return self.runs(files) + [self.run(files, setting, arm, seed) for seed, setting, arm in waiting]


# ---- parts of a grid file


def overlaid(content: dict, layer: dict) -> dict:
    """A grid file's content with the keys of a layer over it: fields are added, arms and settings may be named."""
    content = dict(content)
    for key, value in layer.items():
        if key == "fields":
            value = {**(content.get("fields") or {}), **value}
        elif key in ("arms", "settings") and isinstance(value, list):
            value = select(as_mapping(content.get(key), key), value, key)
        content[key] = value
    return content


def config_of(path: Path, base: str | None) -> dict:
    """The fields of a config file that the grid file at `path` names as its base."""
    there = read_yaml_file(path.parent / given_path(base)) if base else {}
    return {k: v for k, v in there.items() if k not in PER_RUN}


def folder_of(data: dict) -> str:
    """The data folder that data/prepare.py makes with these arguments, relative to the repository."""
    if data["corpus"] != "task":
        return f"data/{data['corpus']}-{data['tokenizer']}"
    return "-".join(["data/task", data["task"], *([str(data["length"])] if "length" in data else [])])


def settings_of(given, product: dict[str, list], path: Path, fields: dict) -> dict[str, dict]:
    """Every setting with every combination of the fields in `product`, by label. A base has no field of `fields`, those
    of the grid for every run."""
    found = {}
    values = [*itertools.product(*map(as_list, product.values()))]
    for (name, own), chosen in itertools.product((as_mapping(given, "settings") or {"": {}}).items(), values):
        base, over = config_of(path, own.get("base")), {*fields, *(["data_dir"] if "data" in own else [])}
        made = {k: v for k, v in base.items() if k not in over} | {k: v for k, v in own.items() if k != "base"}
        label = ", ".join([*filter(None, [name]), *(f"{k} {v}" for k, v in zip(product, chosen))])
        found[label] = made | dict(zip(product, chosen))
    return found


def as_list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def as_mapping(value, key: str) -> dict[str, dict]:
    """Names → fields. A list of schemes stands for one: each entry is what `pos` can be."""
    if isinstance(value, list) and key == "arms":
        for pos in value:
            if problems := problems_of(pos, {}):
                raise ValueError(problems[0])
        return {label(pos): {"pos": pos} for pos in value}
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping of names to fields, not {value!r}")
    for name, fields in (value or {}).items():
        if not isinstance(fields, dict | None):
            raise ValueError(f"{key}: {name} must be a mapping of fields, not {fields!r}")
    return {str(k): dict(v or {}) for k, v in (value or {}).items()}


def select(mapping: dict, names: list, key: str) -> dict:
    """The named part of a mapping. Names of schemes are always arms."""
    if key == "arms":
        mapping = {**{name: {"pos": name} for name in names if not problems_of(name, {})}, **mapping}
    if bad := [n for n in names if n not in mapping]:
        raise ValueError(f"{key} has no {bad[0]!r}{nearest(bad[0], mapping)} (it has {', '.join(mapping)})")
    return {n: mapping[n] for n in names}


def has_arm(pos) -> bool:
    """Whether a setting's pos has the word `arm`."""
    return any("arm" in str(entry).split("+") for entry in (pos if isinstance(pos, list) else [pos]))


def placed(pattern: str | list, others: dict, pos: str | list, options: dict) -> dict:
    """pos and pos_options where an arm's scheme, `pos` with its `options`, stands for the word `arm` in a setting's
    pos, `pattern`. others: the setting's pos_options, by scheme; those of the arm come before them."""
    if not single(pos):
        raise ValueError(f"a setting's pos {pattern} takes arms of one scheme, not pos {pos}")
    entries = [str(entry).split("+") for entry in ([pattern] if isinstance(pattern, str) else pattern)]
    made = ["+".join(pos if name == "arm" else name for name in entry) for entry in entries]
    made = made[0] if isinstance(pattern, str) else made
    if single(made):
        options = {**others, **options}
    else:
        options = others | ({short(pos): {**others.get(short(pos), {}), **options}} if options else {})
    return {"pos": made} | ({"pos_options": options} if options else {})


def at_rate(fields: dict, rate: float | None) -> dict:
    """The fields with another learning rate. The final one keeps its ratio to it."""
    if rate is None:
        return fields
    old = RunConfig(**fields)
    return fields | {"learning_rate": rate, "min_lr": old.min_lr * rate / old.learning_rate}


def in_tokens(report: dict, block_size: int) -> dict:
    """Arguments of eval.py whose lengths are in tokens: 4x is four times block_size. A task's are left as they are."""
    if "task" in as_list(report.get("protocol")):
        return report
    lengths = [n if str(n).endswith("x") else int(n) for n in as_list(report.get("lengths"))]
    return {**report, **({"lengths": lengths_in_tokens(lengths, block_size)} if lengths else {})}


def bench_variants(grid: Grid) -> dict[str, str]:
    """What scripts/bench.py is to compare, by label: the schemes that `throughput` names, or the arms."""
    if named := as_list(grid.throughput.get("schemes")):
        return {variant: variant for variant in named}
    return {arm: bench_variant(fields) for arm, fields in grid.arms.items()}


def bench_variant(fields: dict) -> str:
    """An arm as scripts/bench.py takes it: "comrope block=2", "[rope,none] window=[64,0]"."""
    pos = fields.get("pos", "rope")
    options = fields.get("pos_options", {}) | {k: v for k, v in fields.items() if k in SWITCHES}
    shown = dict | list | bool | None
    texts = {k: json.dumps(v, separators=(",", ":")) if isinstance(v, shown) else v for k, v in options.items()}
    return " ".join([pos if isinstance(pos, str) else f"[{','.join(pos)}]", *(f"{k}={v}" for k, v in texts.items())])
