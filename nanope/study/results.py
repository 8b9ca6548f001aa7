"""What a study found: its finished runs, read from a folder of runs or from runs.jsonl, and how that is made."""

import dataclasses
import functools
import itertools
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from data.shards import open_data
from nanope.config import RunConfig
from nanope.evaluation.key_tokens import key_rows
from nanope.files import write_atomically
from nanope.study.files import RUNS_FILE, CollectedRuns, Files, RunFolders, local, open_runs, write_runs
from nanope.study.grid import Grid, bench_variants
from nanope.study.locks import alone
from nanope.study.run import Run, digest
from nanope.study.seed_statistics import difference_of_rows


@dataclass
class Study:
    """A grid and those of its runs that are done, by setting, arm and seed."""

    folder: Path
    grid: Grid
    runs: dict[tuple[str, str], dict[int, Run]]  # (setting, arm) → seed → run
    missing: list[str]  # runs that are not done, or diverged
    files: Files
    cache: dict = field(default_factory=dict, repr=False)  # of reports: each is read once

    @classmethod
    def read(cls, folder: Path) -> "Study":
        """The study in a folder. ValueError where it has no grid, or where runs that are to be compared were trained on
        different data."""
        grid, files = Grid.of_folder(folder), open_runs(folder)
        study = cls(Path(folder), grid, {}, [], files)
        for setting, arm in itertools.product(grid.settings, grid.arms):
            study.add(setting, arm)
        for setting in grid.settings:
            study.check_data(setting)
        return study

    def add(self, setting: str, arm: str) -> None:
        """Read the runs of an arm: those that are done, and what is missing."""
        rate = self.grid.best_rate(self.files, setting, arm) if self.grid.tune else None
        waiting = self.grid.tune and rate is None
        known = {} if waiting else {s: self.grid.run(self.files, setting, arm, s, rate) for s in self.grid.seeds}
        done = {seed: run for seed, run in known.items() if run.done() and run.val_loss() is not None}
        label = ", ".join(filter(None, (setting, arm)))
        for seed in self.grid.seeds:
            if seed not in done:
                why = " (diverged)" if seed in known and known[seed].diverged() else ""
                if waiting and all(trial.diverged() for trial in self.grid.trials(self.files, setting, arm)):
                    why = " (all trials diverged)"
                self.missing.append(f"{label}, seed {seed}{why}")
        self.runs[setting, arm] = done

    def check_data(self, setting: str) -> None:
        lines = [line for arm in self.grid.arms for run in self.runs[setting, arm].values() for line in run.metrics()]
        if len({line["environment"].get("data_hash") for line in lines if "environment" in line}) > 1:
            where = f" of {setting}" if setting else ""
            raise ValueError(
                f"{self.folder}: runs{where} were trained on different data, so they do not compare: "
                "was their data folder made anew?"
            )

    def config(self, setting: str, arm: str) -> RunConfig | None:
        """The resolved config of one of an arm's runs."""
        for run in self.runs[setting, arm].values():
            there = self.files.config(run.name)
            return RunConfig(**{k: v for k, v in there.items() if k in RunConfig.__dataclass_fields__})
        return None

    def any_config(self, setting: str) -> RunConfig | None:
        """The config of the first arm that has runs, for what all arms share."""
        return next((config for arm in self.grid.arms if (config := self.config(setting, arm))), None)

    def losses(self, setting: str, arm: str) -> dict[int, float]:
        """Final validation losses by seed, nats per token."""
        return {seed: run.val_loss() for seed, run in self.runs[setting, arm].items()}

    def reports(self, setting: str, arm: str, name: str) -> dict[int, dict]:
        """The reports of an evaluation of the grid, by seed."""
        key = setting, arm, name
        if key not in self.cache:
            found = {seed: run.report(name) for seed, run in self.runs[setting, arm].items()}
            self.cache[key] = {seed: report for seed, report in found.items() if report is not None}
        return self.cache[key]

    def all_reports(self, name: str) -> list[dict]:
        """The reports of an evaluation of the grid, of all settings, arms and seeds."""
        return [report for key in self.runs for report in self.reports(*key, name).values()]

    def rows(self, setting: str, name: str, task: bool = False) -> dict:
        """The rows of an evaluation: (protocol, arm, scaling) → length → seed → row, arms in the grid's order. Those of
        shifted positions are in the reports' "shift", those of key tokens have a protocol of
        their own. With `task` those of a task, which have other figures."""
        found = {}
        for arm in self.grid.arms:
            for seed, report in self.reports(setting, arm, name).items():
                scored = [*scored_rows(report), *key_rows(scored_rows(report))]
                for row in task_rows(report) if task else scored:
                    by_length = found.setdefault((row["protocol"], arm, row["scaling"]), {})
                    by_length.setdefault(row["length"], {})[seed] = row
        return found

    def rows_by_length(self, setting: str) -> tuple[str, dict]:
        """The protocol that tells most about context length, and its rows without scaling: arm → length → seed → row.
        Several lengths come before a single one, then the same targets before others, then the grid's order. ("", {})
        where there is no report."""
        found = {}
        for name in self.grid.eval or {}:
            for (protocol, arm, scaling), by_length in self.rows(setting, name).items():
                if protocol != "per-position" and scaling == "none":
                    found.setdefault((name, protocol), {})[arm] = by_length
        if not found:
            return "", {}
        several = {key: len({n for by in rows.values() for n in by}) > 1 for key, rows in found.items()}
        best = max(found, key=lambda key: (several[key], key[1] == "same-targets"))
        return best[1], found[best]

    def cropped_to(self, setting: str) -> int | None:
        """The baseline's training length, where leaderboard and figure compare longer contexts with it: where the grid
        says so, and the same targets were scored at that length."""
        protocol, rows = self.rows_by_length(setting)
        if not self.grid.cropped or protocol != "same-targets" or not (base := rows.get(self.grid.baseline)):
            return None
        trained = self.config(setting, self.grid.baseline).block_size
        return trained if trained in base else None

    def compared(self, setting: str, lengths: list[int]) -> dict[str, list[tuple[dict, dict] | None]]:
        """The rows_by_length of each arm beside the baseline's, by seed, at each of `lengths`; None where they are the
        same rows. Where the baseline's context is cropped (cropped_to), it too is compared beyond."""
        _, rows = self.rows_by_length(setting)
        base = dict(rows.get(self.grid.baseline, {}))
        if trained := self.cropped_to(setting):
            base |= {n: base[trained] for n in lengths if n > trained}
        return {
            arm: [None if at.get(n) is base.get(n) else (at.get(n, {}), base.get(n, {})) for n in lengths]
            for arm, at in rows.items()
        }

    def differences(self, setting: str, lengths: list[int]) -> dict[str, list[dict | None]]:
        """Of what is compared at each of `lengths`: arm → difference_of_rows; None where there is none."""
        found = self.compared(setting, lengths)
        return {arm: [pair and difference_of_rows(*pair) for pair in pairs] for arm, pairs in found.items()}

    @property
    def unit(self) -> str:
        """What one target is: a byte, or a token."""
        names = {made.get("tokenizer") for made in map(self.grid.data_of, self.grid.settings) if made}
        reports = [report for name in self.grid.eval for report in self.all_reports(name)]
        names |= {report["tokenizer"]["name"] for report in reports if "tokenizer" in report}
        return "byte" if names == {"byte"} else "token"


def three_of(lengths: list[int], wanted: list[int]) -> list[int]:
    """The wanted ones where there are three, else the first, the middle and the last."""
    return wanted if len(wanted) == 3 else sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})


def scaled(name: str, row: dict) -> str:
    """A name with the row's frequency scaling, where it has one."""
    return name if row["scaling"] == "none" else f"{name}, {row['scaling']} ×{row['factor']:g}"


def scored_rows(report: dict) -> list[dict]:
    """The rows of a report by context length: all but those of shifted positions and of tasks."""
    return [row for row in report.get("results", ()) if row["protocol"] not in ("shift", "task")]


def task_rows(report: dict) -> list[dict]:
    """The rows of a report on a task, by length."""
    return [row for row in report.get("results", ()) if row["protocol"] == "task"]


def bench_file(grid: Grid) -> str:
    """The name of the file of the measured speeds. It tells the arguments of scripts/bench.py."""
    return f"throughput-{digest([grid.throughput, bench_variants(grid)])}.json"


def throughput(study: Study) -> dict | None:
    """What scripts/bench.py measured for the grid. None where it asks for nothing, or nothing was measured yet."""
    return study.files.bench(bench_file(study.grid)) if study.grid.throughput else None


# ---- runs.jsonl


def collect(grid: Grid, files: Files, target: Path) -> None:
    """Write what tables and figures are made of to `target`: grid.yaml, and the finished runs in runs.jsonl. What an
    earlier collection left there stays. Named on stderr: runs that are not done and were not there, and runs there that
    the grid no longer has. ValueError where nothing is done."""
    runs, target = grid.runs(files), Path(target)
    if target.resolve() == Path(files.folder).resolve():
        raise ValueError(f"--collect {target} is the sweep's own folder: collect into another, such as results/NAME")
    lines = [line_of(run) for run in runs if run.done()]
    measured = files.bench(bench_file(grid)) if grid.throughput else None
    if not lines and measured is None:
        raise ValueError(f"nothing in {files.folder} is done: run the sweep first")
    if measured:
        lines.append({"bench": bench_file(grid), "report": measured})

    grid.write(target)
    before = CollectedRuns(target) if (target / RUNS_FILE).is_file() else None
    old = kept_from_before(lines, before) if before else []
    write_runs(target, [*lines, *old])
    there = CollectedRuns(target)
    wanted = {run.name: run for run in grid.runs(there)}
    undone = [name for name, run in wanted.items() if not run.done()]
    undone += ["runs that wait for their learning rate"] * (None in grid.main_runs(there))
    undone += ["the measurement of speed"] * bool(grid.throughput and there.bench(bench_file(grid)) is None)
    if undone:
        print(f"{files.folder}: not done, hence not collected: {', '.join(undone)}", file=sys.stderr)
    in_tables = {*wanted, *([bench_file(grid)] if grid.throughput else [])}
    if left_over := {line.get("run") or line["bench"] for line in old} - in_tables:
        names = ", ".join(sorted(left_over))
        print(
            f"{target / RUNS_FILE} also holds {names}, no longer in this grid and in no table: "
            "delete the lines that you do not need",
            file=sys.stderr,
        )


def kept_from_before(lines: list[dict], before: CollectedRuns) -> list[dict]:
    """Lines of an earlier collection that the new one lacks. Evaluations of a run in both join its new line."""
    runs = {line["run"]: line for line in lines if "run" in line}
    benches = {line["bench"] for line in lines if "bench" in line}
    for name in runs.keys() & before.runs.keys():
        runs[name]["eval"] = {**before.runs[name]["eval"], **runs[name]["eval"]}
    old = [line for name, line in before.runs.items() if name not in runs]
    return old + [{"bench": name, "report": report} for name, report in before.benches.items() if name not in benches]


def unpack(grid: Grid, files: RunFolders, source: Path, root: Path) -> int:
    """Put the finished runs of the grid that are in results, `source`, where training and evaluations would have put
    them, less their checkpoints. Runs and measurements that are there stay. A run is there whole or not at all. Returns
    how many runs were missing. OSError where `source` holds no results, ValueError where its runs were trained on other
    data than that under `root`."""
    known, count, partial = CollectedRuns(source), 0, files.folder / "logs" / "known.partial"
    data_in = functools.cache(lambda folder: open_data(local(folder, root), verify=False))
    with alone(files.folder / "logs" / "known.lock", f"taking runs from {source}"):
        while fresh := [
            run for run in grid.runs(files) if not run.folder.exists() and dataclasses.replace(run, files=known).done()
        ]:
            for run in fresh:  # trials first: their outcome makes more runs known
                line, where = known.runs[run.name], run.config.data_dir
                trained = [m["environment"] for m in line["metrics"] if "environment" in m]
                if not any(data_in(where).is_of(environment.get("data_hash")) for environment in trained):
                    raise ValueError(f"{source}: {run.name} was trained on other data than {where} holds now")
                for environment in trained:  # it may be the manifest's, of before
                    environment["data_hash"] = data_in(where).hash
                shutil.rmtree(partial, ignore_errors=True)  # of a sweep that was killed
                (partial / "eval").mkdir(parents=True)
                for name, report in line["eval"].items():
                    (partial / "eval" / name).write_text(json.dumps(report))
                (partial / "config.yaml").write_text(yaml.safe_dump(line["config"], sort_keys=False))
                (partial / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in line["metrics"]))
                partial.rename(run.folder)
            count += len(fresh)
        report = known.bench(bench_file(grid)) if grid.throughput else None
        if report and files.bench(bench_file(grid)) is None:
            text = json.dumps(report).encode()
            write_atomically(files.folder / bench_file(grid), lambda file: file.write(text))
    return count


def line_of(run: Run) -> dict:
    """A run as a line of runs.jsonl. A run that diverged has no evaluations."""
    names = [run.report_file(evaluation) for evaluation in run.evaluations] if run.trained() else []
    reports = {name: run.files.report(run.name, name) for name in names}
    return {"run": run.name, "config": run.files.config(run.name), "metrics": run.metrics(), "eval": reports}
