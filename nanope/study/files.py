"""The files of a study's runs: in a folder a run, as train.py and eval.py write them, or together in one runs.jsonl.

runs.jsonl has a line for each run, and one for each measurement of speed:

    {"run": NAME, "config": {…}, "metrics": [{…}, …], "eval": {FILE: {…}, …}}
    {"bench": FILE, "report": {…}}

`config` is what the run's config.yaml holds, `metrics` are the lines of its metrics.jsonl, and `eval` are its reports,
by the names of their files. `open_runs` finds which of the two a folder has; both are read by the same methods.
"""

import json
import os
from pathlib import Path

from nanope.checkpoint import read_metrics, step_files, step_of
from nanope.files import write_atomically
from nanope.values import read_yaml_file

RUNS_FILE = "runs.jsonl"


class RunFolders:
    """Runs in folders of their own. They may be training: nothing is remembered, every call reads."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def names(self) -> list[str]:
        """The runs that have started."""
        return sorted(path.parent.name for path in self.folder.glob("*/metrics.jsonl"))

    def config(self, run: str) -> dict:
        """The resolved fields of a run. OSError where it has not started."""
        return read_yaml_file(self.folder / run / "config.yaml")

    def metrics(self, run: str) -> list[dict]:
        """The lines of metrics.jsonl so far; [] where the run has not started."""
        return read_metrics(self.folder / run) if (self.folder / run / "metrics.jsonl").is_file() else []

    def last_checkpoint(self, run: str) -> int | None:
        """The step of the newest checkpoint."""
        return next(map(step_of, step_files(self.folder / run)), None)

    def reports(self, run: str) -> set[str]:
        """The names of the report files that are there."""
        return {path.name for path in (self.folder / run / "eval").glob("*.json")}

    def report(self, run: str, file: str) -> dict | None:
        return read_json(self.folder / run / "eval" / file)

    def bench(self, file: str) -> dict | None:
        """A report of scripts/bench.py."""
        return read_json(self.folder / file)


class CollectedRuns:
    """Runs of a runs.jsonl, read once. They are finished, and their checkpoints are elsewhere."""

    def __init__(self, folder: Path):
        """ValueError for a line that is no JSON object with a run or a bench."""
        self.folder = Path(folder)
        self.runs, self.benches = {}, {}
        path = self.folder / RUNS_FILE
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                try:
                    line = json.loads(text)
                    if "run" in line:
                        self.runs[line["run"]] = line
                    else:
                        self.benches[line["bench"]] = line["report"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}: line {number} is no run: {type(error).__name__} {error}") from error

    def names(self) -> list[str]:
        return [*self.runs]

    def config(self, run: str) -> dict:
        return self.runs[run]["config"]

    def metrics(self, run: str) -> list[dict]:
        return self.runs[run]["metrics"] if run in self.runs else []

    def last_checkpoint(self, run: str) -> int | None:
        return None

    def reports(self, run: str) -> set[str]:
        return set(self.runs[run]["eval"]) if run in self.runs else set()

    def report(self, run: str, file: str) -> dict | None:
        return self.runs[run]["eval"].get(file) if run in self.runs else None

    def bench(self, file: str) -> dict | None:
        return self.benches.get(file)


Files = RunFolders | CollectedRuns


def open_runs(folder: Path) -> Files:
    """The runs in `folder`."""
    return CollectedRuns(folder) if (Path(folder) / RUNS_FILE).is_file() else RunFolders(folder)


def write_runs(folder: Path, lines: list[dict]) -> None:
    """Write the runs.jsonl of `folder`, atomically."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(Path(folder) / RUNS_FILE, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


def local(path: str, root: Path) -> str:
    """A path relative to `root`, as seen from here. It stays relative where it can, since runs record it."""
    return path if Path(path).is_absolute() else os.path.relpath(Path(root) / path)
