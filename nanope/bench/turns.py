"""What all benchmarks share: workers, rounds in which they take turns, ratios within a round, and tables.

Each variant lives in a process of its own, so that its peak memory is its own. Only one works at a time. Ratios are
taken within a round, so a machine whose speed drifts does not favour anyone.
"""

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def command_line(prog: str, description: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the option --rounds, whose default is `rounds`."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = f"counted rounds, after one warm-up (default: {rounds})"
    parser.add_argument("--rounds", type=int, default=rounds, help=what)
    return parser


def check_counts(parser: argparse.ArgumentParser, counts: dict[str, int | None]) -> None:
    """End the process where a number of something, by the name of its option, is below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")


class Worker:
    """A process that calls build(*arguments) once, and then its result, a function of one message, for each message.

    name: how an error calls it. A worker that dies ends this program: its own message is above.
    """

    def __init__(self, name: str, build: Callable, *arguments):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, build, arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that a process that dies ends the wait in `receive`

    def send(self, message) -> None:
        try:
            self.pipe.send(message)
        except OSError:
            self.failed()

    def receive(self):
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.failed()

    def ask(self, message):
        self.send(message)
        return self.receive()

    def failed(self) -> None:
        sys.exit(f"error: {self.name} failed; its message is above")

    def stop(self) -> None:
        self.send(None)
        self.process.join()


def serve(pipe, build: Callable, arguments: tuple) -> None:
    """The life of a worker's process. It ends with the message None."""
    answer = build(*arguments)
    while (message := pipe.recv()) is not None:
        pipe.send(answer(message))


@contextmanager
def workers(found: Iterable[Worker]) -> Iterator[list[Worker]]:
    """Ends them where the block ends as it should. On an error they end with this process."""
    started = list(found)
    yield started
    for worker in started:
        worker.stop()


def take_turns(ways: dict[str, Callable[[int], T]], rounds: int, label: str = "") -> dict[str, list[T]]:
    """{way: its answers}. In each round every way is called once, in this order, with the round's number.

    Round 0, the warm-up, comes first and is in the answers too; `rounds` more follow.
    """
    answers = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            answers[name].append(way(number))
        print(f"{label}round {number} of {rounds}", end="\r", file=sys.stderr, flush=True)
    return answers


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Of each round."""
    return [a / b for a, b in zip(above, below)]


def rope_ratios(record: dict, variant: str) -> list[float]:
    """Of each round: the speed of a variant over that of rope in the same round; record: what `bench.py train --json`
    writes, where rope_seconds are those of a variant's own group."""
    rope = record.get("rope_seconds", {}).get(variant, record["seconds"]["rope"])
    return ratios(rope, record["seconds"][variant])


def spread(values: list[float], digits: int, unit: str = "", over: str = "") -> str:
    """Median, unit, minimum and maximum: "1.02 × (0.98 … 1.07)". over: what stands after the maximum."""
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle}{unit} ({low} … {high}{over})"


def heading(texts: int, *columns: str) -> str:
    """The two first lines of a Markdown table whose first `texts` columns hold text, the others numbers."""
    return row(*columns) + "\n|" + "---|" * texts + "--:|" * (len(columns) - texts)


def row(*cells) -> str:
    return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|"
