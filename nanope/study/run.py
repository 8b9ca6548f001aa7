"""One training run of a grid with its evaluations, and how far it has come."""

import dataclasses
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from nanope.config import ELSEWHERE, SINCE, RunConfig
from nanope.study.files import Files
from schemes import outside_sources


@dataclass
class Run:
    """What a grid asks for, and what there is of it. The latter is read from the run's files, never remembered."""

    arm: str
    setting: str
    seed: int
    fields: dict  # of train.py, without out_dir
    evaluations: dict[str, dict]  # name → arguments of eval.py
    files: Files
    tuning: float | None = None  # the learning rate that this run is a trial of

    # ---- what it is

    @functools.cached_property
    def name(self) -> str:
        """Arm, setting, seed, and a digest of every field that is not train.py's default, or not what runs had before
        the field existed: so an older run keeps its name."""
        given, defaults = dataclasses.asdict(self.config), vars(RunConfig()) | SINCE
        differ = {k: v for k, v in given.items() if v != defaults[k] and k not in ELSEWHERE}
        trial = [] if self.tuning is None else ["tune"]
        rate = [] if self.tuning is None else [f"{self.tuning:g}"]
        words = filter(None, map(slug, [*trial, self.setting, self.arm, *rate]))
        return "-".join([*words, f"seed{self.seed}", digest(differ)])

    @functools.cached_property
    def config(self) -> RunConfig:
        """The fields as the grid gives them: vocab_size is not filled in."""
        return RunConfig(**self.fields)

    @property
    def max_steps(self) -> int:
        return self.config.max_steps

    @property
    def folder(self) -> Path:
        return self.files.folder / self.name

    def report_file(self, evaluation: str) -> str:
        """The name of a report's file. It tells the evaluation's arguments."""
        return f"{slug(evaluation)}-{digest(self.evaluations[evaluation])}.json"

    def report_path(self, evaluation: str) -> Path:
        """Where eval.py is to write a report."""
        return self.folder / "eval" / self.report_file(evaluation)

    # ---- what there is of it

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        return self.files.metrics(self.name)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(tokens, values) of a metric that lines of metrics.jsonl hold, such as train/loss."""
        found = [(m.get("tokens", 0), m[name]) for m in self.metrics() if m.get(name) is not None]
        return tuple(map(list, zip(*found))) if found else ([], [])

    def step(self) -> int:
        """The last step that was logged."""
        return max((m["step"] for m in self.metrics()), default=0)

    def val_loss(self) -> float | None:
        """Validation loss at the last step, nats per token. None where the run has not ended, or it was not finite."""
        losses = [m["val/loss"] for m in self.metrics() if m["step"] == self.max_steps and "val/loss" in m]
        return losses[-1] if losses else None

    def report(self, evaluation: str) -> dict | None:
        return self.files.report(self.name, self.report_file(evaluation))

    def missing_reports(self) -> list[str]:
        there = self.files.reports(self.name)
        return [evaluation for evaluation in self.evaluations if self.report_file(evaluation) not in there]

    def trained(self) -> bool:
        """Whether training has ended. The last checkpoint may be gone only where every report is there."""
        if not any(m["step"] == self.max_steps and "val/loss" in m for m in self.metrics()):
            return False
        return self.files.last_checkpoint(self.name) == self.max_steps or not self.missing_reports()

    def bare(self) -> bool:
        """Whether it has reports, lacks another one, and has no checkpoint to make it from."""
        return bool(
            self.files.reports(self.name) and self.missing_reports() and self.files.last_checkpoint(self.name) is None
        )

    def diverged(self) -> bool:
        """Whether max_bad_steps steps in a row that were not finite ended it. Started again, it would do so again."""
        steps = [m for m in self.metrics() if "skipped" in m or "train/loss" in m]
        n = self.config.max_bad_steps
        in_a_row = len(steps) >= n and steps[-1]["step"] - steps[-n]["step"] == n - 1
        return in_a_row and all(m.get("skipped") for m in steps[-n:])

    def other_code(self) -> bool:
        """Whether its scheme comes from a file that has changed since it was trained: its name does not tell."""
        then = {m["environment"].get("scheme_sources") for m in self.metrics() if "environment" in m} - {None}
        return bool(then) and then != {outside_sources(self.config.pos)}

    def done(self) -> bool:
        return self.trained() and not self.missing_reports() or self.diverged()


def slug(text: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def digest(value) -> str:
    """Eight hexadecimal digits for a value of plain types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
