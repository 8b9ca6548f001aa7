"""Where every run stands, read from its files, and how that is shown while runs train."""

import shutil
import sys
import time

from tqdm import tqdm

from data.shards import output
from nanope.study.locks import held
from nanope.study.run import Run


def state_of(run: Run, failed: dict | None = None) -> str:
    if failed and run.name in failed:
        return "failed"
    if run.done():
        return "done" if run.trained() else "diverged"
    if held(run):
        return "evaluating" if run.trained() else "training"
    if run.bare():
        return "checkpoint gone"
    return "to evaluate" if run.trained() else "stopped" if run.step() else "waiting"


def status(runs: list[Run], failed: dict | None = None) -> str:
    """Every run's state, step, loss and remaining time of training, as a Markdown table."""
    lines = ["| run | state | step | loss | ETA |", "|---|---|--:|--:|--:|"]
    for run in runs:
        state, step = state_of(run, failed), run.step()
        losses, speeds = run.series("train/loss")[1], run.series("tokens_per_s")[1]
        eta = (run.max_steps - step) * run.config.batch_tokens / speeds[-1] if speeds else None
        left = tqdm.format_interval(eta) if eta and state == "training" else ""
        loss = f"{losses[-1]:.4f}" if losses else ""
        lines.append(f"| {run.name} | {state} | {step}/{run.max_steps} | {loss} | {left} |")
    return "\n".join(lines)


class Display:
    """The status of what runs: redrawn on a terminal, else a line every half a minute."""

    def __init__(self, total: int):
        self.total, self.terminal, self.drawn = total, sys.stderr.isatty(), 0
        self.started = self.told = time.monotonic()
        self.first = None  # runs' worth of steps that were there at the start

    def show(self, runs: list[Run], busy: list[Run], failed: dict) -> None:
        """Show what is new, where it is time to."""
        now = time.monotonic()
        if now - self.told < (2 if self.terminal else 30):
            return
        self.told = now
        done, wanted = sum(min(1.0, r.step() / r.max_steps) for r in runs), max(len(runs), self.total)
        self.first = done if self.first is None else self.first
        eta = (now - self.started) / (done - self.first) * (wanted - done) if done > self.first else None
        counts = f"{sum(r.done() for r in runs)} of {wanted} runs done, {len(busy)} running, {len(failed)} failed"
        counts += f"; training left about {tqdm.format_interval(eta)}" if eta else ""
        lines = [*status(busy, failed).splitlines(), counts] if busy else [counts]
        if self.terminal:
            self.clear()
            width = shutil.get_terminal_size().columns - 1
            print("\n".join(line[:width] for line in lines), file=sys.stderr, flush=True)
            self.drawn = len(lines)
        else:
            rows = "; ".join(" ".join(line.strip("| ").split(" | ")[:4]) for line in lines[2:-1])
            output(f"[{tqdm.format_interval(now - self.started)}] {counts}{': ' + rows if rows else ''}")

    def clear(self) -> None:
        """Take what was drawn off the terminal."""
        if self.drawn:
            print(f"\033[{self.drawn}F\033[J", end="", file=sys.stderr)
            self.drawn = 0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        output(text)
