"""A grid file: what is compared (arms), where (settings), with which seeds, and how it is evaluated; and the runs it asks for.

    base: ../quickstart.yaml                    # a config to start from, relative to the grid file
    data: {corpus: novels, tokenizer: byte}     # data/prepare.py makes data/novels-byte where it is missing; or fields: {data_dir: …}
    fields: {max_steps: 1000}                   # fields of train.py for every run, over the base
    arms:                                       # what is compared; a list of schemes will do
      rope: {pos: rope}
      comrope, block 2: {pos: comrope, pos_options: {block: 2}}
    settings: {short: {block_size: 256}}        # optional: what all arms are compared under, a table each; may have base and data of its own
    grid: {weight_decay: [0, 0.1]}              # optional: every combination of these fields is a setting
    seeds: 3                                    # 1, 2, 3, or a list; seed = data_seed: the arms of a seed are paired
    baseline: rope                              # default: the first arm
    tune: {learning_rate: [5.0e-4, 1.0e-3], seeds: [0], fields: {max_steps: 300}}    # optional: per arm, on validation, before the rest
    eval: {far: {lengths: [1x, 4x], max_targets: 16384}}       # reports: the arguments of eval.py; 4x is four times block_size
    throughput: {schemes: [rope, carope], rounds: 7}           # optional: arguments of scripts/bench.py
    figure: nats                                # or perplexity: what tables show (statistics are in nats)
    published: {…}                              # figures of a paper to print beside the measured ones; see configs/sweeps/crope-2.yaml
    question, decisions, reduced                # texts for the report
    scales: {cpu: {…}}                          # any of these keys again, for --scale cpu; arms and settings may be lists of names

A run's folder is named by arm, setting, seed and a hash of every field that is not train.py's default: another config is another folder.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import _root
import numpy as np
import torch
import yaml

from data.corpora import CORPORA
from data.shards import unknown
from model import GPT, SCHEMES, GPTConfig
from nanope import REPO
from nanope.checkpoint import read_metrics, step_files
from nanope.config import RunConfig, check
from nanope.errors import nearest

KEYS = (
    "name", "command", "question", "base", "data", "fields", "arms", "settings", "grid", "seeds", "baseline", "tune", "eval", "throughput",
    "figure", "published", "decisions", "reduced", "scales",
)  # fmt: skip
PER_RUN = ("out_dir", "seed", "data_seed", "resume")  # a grid sets none of these: they are what tells its runs apart
ELSEWHERE = ("out_dir", "resume", "device", "wandb", "verify_data")  # fields that say where and how, not what


@dataclass
class Run:
    """One training run of a grid, and its evaluations. What was done is read from its folder, never remembered."""

    arm: str
    setting: str
    seed: int
    fields: dict  # of train.py, without out_dir
    reports: dict  # name → arguments of its program, of `eval`
    out: Path
    tuning: float | None = None  # the learning rate that this run is a trial of

    @property
    def name(self) -> str:
        defaults = RunConfig()
        differ = {
            k: v
            for k, v in dataclasses.asdict(RunConfig(**self.fields)).items()
            if v != getattr(defaults, k) and k not in ELSEWHERE
        }
        words = (
            [self.setting, self.arm] if self.tuning is None else ["tune", self.setting, self.arm, f"{self.tuning:g}"]
        )
        return "-".join([*filter(None, map(slug, words)), f"seed{self.seed}", digest(differ)])

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def max_steps(self) -> int:
        return RunConfig(**self.fields).max_steps

    def metrics(self) -> list[dict]:
        return read_metrics(self.folder) if (self.folder / "metrics.jsonl").is_file() else []

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(tokens, values) of a metric that lines of metrics.jsonl hold, such as train/loss."""
        found = [(m.get("tokens", 0), m[name]) for m in self.metrics() if m.get(name) is not None]
        return ([], []) if not found else tuple(map(list, zip(*found)))

    def val_loss(self) -> float | None:
        """Validation loss at the last step, nats per token; None where the run has not ended there, or it was not finite."""
        return next(
            (m["val/loss"] for m in self.metrics()[::-1] if m["step"] == self.max_steps and "val/loss" in m), None
        )

    def path_of(self, report: str) -> Path:
        """The JSON file of a report, whose name tells its arguments."""
        return self.folder / "eval" / f"{slug(report)}-{digest(self.reports[report])}.json"

    def report(self, name: str) -> dict | None:
        path = self.path_of(name)
        return json.loads(path.read_text()) if path.is_file() else None

    def trained(self) -> bool:
        """At its last step; the checkpoint may be gone where every report is there."""
        if not any(m["step"] == self.max_steps and "val/loss" in m for m in self.metrics()):
            return False
        return [f.stem for f in step_files(self.folder)[:1]] == [f"step_{self.max_steps}"] or not self.missing_reports()

    def missing_reports(self) -> list[str]:
        return [name for name in self.reports if not self.path_of(name).is_file()]

    def diverged(self) -> bool:
        """Ended by max_bad_steps in a row that were not finite: started again, it would come to the same end."""
        steps = [m for m in self.metrics() if "skipped" in m or "train/loss" in m]
        n = RunConfig(**self.fields).max_bad_steps
        return (
            len(steps) >= n
            and all(m.get("skipped") for m in steps[-n:])
            and steps[-1]["step"] - steps[-n]["step"] == n - 1
        )

    def done(self) -> bool:
        return self.trained() and not self.missing_reports() or self.diverged()


@dataclass
class Grid:
    """The content of a grid file with its base, scale and product written out: `content` holds plain values only."""

    content: dict

    @classmethod
    def read(cls, path: Path, scale: str | None = None, changes: dict | None = None) -> "Grid":
        """From a file; `changes` are top-level keys that replace the file's (fields are added to its own).
        ValueError or OSError for what is wrong with it."""
        path = Path(path)
        given = yaml.safe_load(path.read_text())
        if not isinstance(given, dict):
            raise ValueError(f"{path} is no grid: expected keys such as arms, seeds and eval")
        scales = given.pop("scales", None) or {}
        if scale is not None and scale not in scales and scale != "paper":
            raise ValueError(
                f"{path} has no scale {scale!r}{nearest(scale, scales)} (scales: {', '.join(['paper', *scales])})"
            )
        given.setdefault("name", path.stem)
        for layer in (scales.get(scale, {}), changes or {}):
            for key, value in layer.items():
                if key == "fields":
                    value = {**(given.get("fields") or {}), **value}
                elif key in ("arms", "settings") and isinstance(value, list):
                    value = select(as_mapping(given.get(key), key), value, key, path)
                given[key] = value
        if odd := [k for k in given if k not in KEYS]:
            raise ValueError(f"{path}: unknown key {odd[0]!r}{nearest(odd[0], KEYS)} (keys: {', '.join(KEYS)})")

        def config_of(base):
            there = yaml.safe_load((path.parent / base).read_text()) if base else {}
            return {k: v for k, v in there.items() if k not in PER_RUN}

        fields = {**config_of(given.pop("base", None)), **(given.get("fields") or {})}
        settings = as_mapping(given.get("settings"), "settings") or {"": {}}
        expanded = {}
        product = given.pop("grid", None) or {}
        for (name, own), values in itertools.product(
            settings.items(), itertools.product(*(as_list(v) for v in product.values()))
        ):
            own = dict(own or {})
            own = config_of(own.pop("base", None)) | own | dict(zip(product, values))
            label = ", ".join([*filter(None, [name]), *(f"{k} {v}" for k, v in zip(product, values))])
            expanded[label] = own
        arms = as_mapping(given.get("arms"), "arms")
        seeds = given.get("seeds", 1)
        seeds = list(range(1, seeds + 1)) if isinstance(seeds, int) else list(seeds)
        baseline = given.get("baseline")
        if baseline is None or (baseline not in arms and "arms" in (changes or {})):  # a selection may leave it out
            baseline = next(iter(arms), None)
        grid = cls(
            {**given, "fields": fields, "settings": expanded, "arms": arms, "seeds": seeds, "baseline": baseline}
        )
        grid.check(path)
        return grid

    @classmethod
    def of_folder(cls, folder: Path) -> "Grid":
        """The grid that a folder of runs, or of results, was made by."""
        path = Path(folder) / "grid.yaml"
        if not path.is_file():
            raise ValueError(f"{folder} holds no grid.yaml: expected a folder that scripts/sweep.py made")
        return cls(yaml.safe_load(path.read_text()))

    def __getattr__(self, key):
        if key in KEYS:
            return self.content.get(key)
        raise AttributeError(key)

    def text(self) -> str:
        return yaml.safe_dump(self.content, sort_keys=False, allow_unicode=True, width=150)

    def check(self, path: Path) -> None:
        """ValueError that names what is wrong, before anything starts. Options of a scheme are left to the run itself."""
        c = self.content
        if not self.arms and not self.throughput:
            raise ValueError(f"{path}: nothing to do: give arms, or throughput")
        if self.arms and self.baseline not in self.arms:
            raise ValueError(
                f"{path}: baseline {self.baseline!r} is no arm{nearest(self.baseline, self.arms)} (arms: {', '.join(self.arms)})"
            )
        if not all(isinstance(s, int) for s in self.seeds) or len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError(f"{path}: seeds must be a number, or a list of different whole numbers, not {c['seeds']}")
        if c.get("figure", "nats") not in ("nats", "perplexity"):
            raise ValueError(f"{path}: figure must be nats or perplexity, not {c['figure']!r}")
        if bad := [
            k
            for k in ((self.tune or {}).get("fields") or {})
            if k not in RunConfig.__dataclass_fields__ or k in PER_RUN
        ]:
            raise ValueError(
                f"{path}: tune: fields: {bad[0]} is no field that a grid may set{nearest(bad[0], RunConfig.__dataclass_fields__)}"
            )
        if self.tune and (
            set(self.tune) - {"learning_rate", "seeds", "fields"} or not as_list(self.tune.get("learning_rate"))
        ):
            raise ValueError(
                f"{path}: tune takes learning_rate, a list, and optionally seeds and fields; it has {', '.join(self.tune)}"
            )
        for name, report in (self.eval or {}).items():
            if "lengths" not in report and "program" not in report:
                raise ValueError(f"{path}: the report {name!r} of eval lacks lengths")
        for data in map(self.data_of, self.settings):
            if data and data.get("corpus") not in CORPORA:
                raise ValueError(f"{path}: {unknown('corpus', data.get('corpus'), list(CORPORA))}")
        for setting, arm in itertools.product(self.settings, self.arms):
            try:
                check(RunConfig(**self.fields_of(setting, arm)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: {', '.join(filter(None, (setting, arm)))}: {error}") from None
        if len({slug(a) for a in self.arms}) < len(self.arms) or len({slug(s) for s in self.settings}) < len(
            self.settings
        ):
            raise ValueError(
                f"{path}: two arms or settings differ in punctuation only: their folders would have one name"
            )

    # ---- runs

    def data_of(self, setting: str) -> dict | None:
        """What data/prepare.py is to make for a setting, or None where fields name the folder."""
        own = self.settings[setting]
        if "data_dir" in own or (
            "data_dir" in (self.content.get("fields") or {}) and "data" not in own and not self.data
        ):
            return None
        data = {**(self.data or {}), **own.get("data", {})}
        return {"tokenizer": "gpt2", **data} if data else None

    def fields_of(self, setting: str, arm: str) -> dict:
        """Fields of train.py for a setting and an arm, with values of the right kind; without seeds. Paths are relative to the repository."""
        own = {k: v for k, v in self.settings[setting].items() if k != "data"}
        fields = {**self.fields, **own, **self.arms[arm]}
        if odd := [k for k in fields if k not in RunConfig.__dataclass_fields__ or k in PER_RUN]:
            why = (
                "a grid sets it itself"
                if odd[0] in PER_RUN
                else f"no field of train.py{nearest(odd[0], RunConfig.__dataclass_fields__)}"
            )
            raise ValueError(f"{odd[0]}: {why}")
        if data := self.data_of(setting):
            fields["data_dir"] = f"data/{data['corpus']}-{data['tokenizer']}"
        defaults = RunConfig()
        return {
            k: float(v) if isinstance(getattr(defaults, k), float) and v is not None else v for k, v in fields.items()
        }  # YAML reads 1e-3 as a text

    def run(self, out: Path, setting: str, arm: str, seed: int, rate: float | None = None, **more) -> Run:
        fields = self.fields_of(setting, arm)
        if rate is not None:
            old = RunConfig(**fields)
            fields |= {"learning_rate": rate, "min_lr": old.min_lr * rate / old.learning_rate}
        fields |= {**more.pop("fields", {}), "seed": seed, "data_seed": seed}
        reports = (
            {}
            if "tuning" in more
            else {name: self.arguments(report, fields) for name, report in (self.eval or {}).items()}
        )
        return Run(arm, setting, seed, fields, reports, Path(out), **more)

    @staticmethod
    def arguments(report: dict, fields: dict) -> dict:
        """A report's arguments with its lengths in tokens."""
        block_size = RunConfig(**fields).block_size
        lengths = [
            round(float(n[:-1]) * block_size) if isinstance(n, str) and n.endswith("x") else int(n)
            for n in as_list(report.get("lengths"))
        ]
        return {**report, **({"lengths": lengths} if lengths else {})}

    def trials(self, out: Path, setting: str, arm: str) -> list[Run]:
        """The runs that tune the learning rate of an arm: the same rates, seeds and steps for every arm."""
        tune = self.tune or {}
        rates, seeds = [float(r) for r in as_list(tune.get("learning_rate"))], as_list(tune.get("seeds") or [0])
        return [
            self.run(out, setting, arm, seed, rate, fields=tune.get("fields", {}), tuning=rate)
            for rate in rates
            for seed in seeds
        ]

    def best_rate(self, out: Path, setting: str, arm: str) -> float | None:
        """The tuned learning rate: lowest mean validation loss at the end of its trials, the lower rate in a tie; a rate with which a
        trial diverged is out. None until all have ended, or where none is finite."""
        trials = self.trials(out, setting, arm)
        if not all(t.trained() or t.diverged() for t in trials):
            return None
        losses = {
            rate: [t.val_loss() for t in trials if t.tuning == rate] for rate in sorted({t.tuning for t in trials})
        }
        means = {rate: np.mean(values) for rate, values in losses.items() if None not in values}
        return min(means, key=means.get, default=None)

    def runs(self, out: Path) -> list[Run]:
        """Every run that is known: trials first, and the runs that need their outcome once it is there; seed by seed, so that
        a sweep that ends early has whole pairs."""
        pairs = list(itertools.product(self.settings, self.arms))
        trials = [t for setting, arm in pairs for t in self.trials(out, setting, arm)]
        return trials + [r for r in self.main_runs(out) if r]

    def main_runs(self, out: Path) -> list[Run | None]:
        """The runs of the tables; None where one waits for its learning rate."""
        found = []
        rates = {
            pair: self.best_rate(out, *pair) if self.tune else None
            for pair in itertools.product(self.settings, self.arms)
        }
        for seed, (pair, rate) in itertools.product(self.seeds, rates.items()):
            found.append(None if self.tune and rate is None else self.run(out, *pair, seed, rate))
        return found


def bench_variants(grid: Grid) -> dict[str, str]:
    """What scripts/bench.py is to compare, by label: the arms, or the schemes that `throughput` names."""
    named = as_list(grid.throughput.get("schemes"))
    arms = {
        arm: " ".join([f["pos"], *(f"{k}={v}" for k, v in f.get("pos_options", {}).items())])
        for arm, f in (grid.arms or {}).items()
    }
    return {variant: variant for variant in named} or arms


def command_of(report: dict, run: Path, data: str, target: Path) -> list[str]:
    """The command that makes a report of a run: eval.py, or the report's `program`, with its other keys as arguments."""
    command = [str(REPO / report.get("program", "eval.py")), "--run", str(run), "--data", data, "--json", str(target)]
    for name, value in report.items():
        if name != "program" and value is not False:
            command += [f"--{name}", *([] if value is True else map(str, as_list(value)))]
    return command


def model_cost(config: RunConfig) -> tuple[int, int]:
    """(parameters, training FLOPs a token) of a config whose vocab_size is set. ValueError for a model that cannot be built."""
    shape = dataclasses.asdict(config.model_config())
    return _model_cost(json.dumps(shape, sort_keys=True))


@functools.cache
def _model_cost(shape: str) -> tuple[int, int]:
    with torch.device("meta"):
        model = GPT(GPTConfig(**json.loads(shape)))
    return model.parameter_count(), model.flops_per_token()


def local(path: str) -> str:
    """A path relative to the repository, as seen from here: relative where it can be, since runs record it."""
    return path if Path(path).is_absolute() else os.path.relpath(REPO / path)


def as_list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def as_mapping(value, key: str) -> dict:
    """A list of schemes as the mapping that it stands for."""
    if isinstance(value, list) and key == "arms":
        if bad := [v for v in value if v not in SCHEMES]:
            raise ValueError(f"no scheme {bad[0]!r}{nearest(bad[0], SCHEMES)} (schemes: {', '.join(SCHEMES)})")
        return {scheme: {"pos": scheme} for scheme in value}
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping of names to fields, not {value!r}")
    return {str(k): dict(v or {}) for k, v in (value or {}).items()}


def select(mapping: dict, names: list, key: str, path) -> dict:
    """The named part of a mapping; schemes by name are always arms."""
    if key == "arms":
        mapping = {**mapping, **{n: {"pos": n} for n in names if n in SCHEMES and n not in mapping}}
    if bad := [n for n in names if n not in mapping]:
        raise ValueError(f"{path}: {key} has no {bad[0]!r}{nearest(bad[0], mapping)} (it has {', '.join(mapping)})")
    return {n: mapping[n] for n in names}


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
