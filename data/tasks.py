"""Tasks to train on from scratch: questions with one right answer, made from a seed, of any length.

    copy       ab3=ab3         the symbols again
    reverse    ab3=3ba         the symbols backwards
    sort       b3a=3ab         the symbols in the order of their ids: digits, capitals, small letters
    addition   54+73=281       the sum of two numbers, all three with their least significant digit first: 45 + 37 = 082
    recall     ÀaÁbÂc|ÁbÀa     multi-query associative recall (MQAR, Zoology 2312.04927): pairs of a key and a value,
                               then 8 times one of the keys, to be followed by its value
    flipflop   w1i0i1r1w0r0    flip-flop language (2306.00946, FFL(0.8)): write, ignore and read instructions with a
                               bit each; a read repeats the bit of the last write

The answer alone is scored: what follows `=`, with the end of the text; the values of recall; the bits that are read.
A token is a character (the tokenizer `characters`). The length of an example is a number of symbols, digits, pairs or
instructions. Everything follows from the seed, on every version of Python: only Random.random() is used.
"""

import dataclasses
import hashlib
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from data.files import File
from data.readers import Documents
from data.shards import DataError, json_sha256, unknown
from data.tokenizer import CHARACTERS

DIGITS = string.digits
SYMBOLS = string.digits + string.ascii_uppercase + string.ascii_lowercase  # 62, in the order of their ids
KEYS = [character for character in CHARACTERS if not character.isascii()][:128]  # of recall
QUERIES = 8  # of recall
WRITE = READ = 0.1  # of flip-flop's instructions; the others are ignored


def drawn(generator: Random, choices: list[str] | str, count: int) -> list[str]:
    return [choices[int(generator.random() * len(choices))] for _ in range(count)]


def copy(generator: Random, length: int) -> str:
    text = "".join(drawn(generator, SYMBOLS, length))
    return f"{text}={text}"


def reverse(generator: Random, length: int) -> str:
    text = "".join(drawn(generator, SYMBOLS, length))
    return f"{text}={text[::-1]}"


def sort(generator: Random, length: int) -> str:
    symbols = drawn(generator, SYMBOLS, length)
    return f"{''.join(symbols)}={''.join(sorted(symbols))}"


def addition(generator: Random, length: int) -> str:
    a, b = ("".join(drawn(generator, DIGITS, length)) for _ in range(2))
    total, carried = "", 0
    for pair in zip(a, b):
        carried, digit = divmod(sum(map(int, pair)) + carried, 10)
        total += str(digit)
    return f"{a}+{b}={total}{carried}"


def recall(generator: Random, length: int) -> str:
    keys = {}  # an ordered set
    while len(keys) < length:
        keys[drawn(generator, KEYS, 1)[0]] = True
    pairs = [key + value for key, value in zip(keys, drawn(generator, SYMBOLS, length))]
    # With replacement: else a model may learn to leave out what was answered already, and never to look up
    return f"{''.join(pairs)}|{''.join(drawn(generator, pairs, QUERIES))}"


def flipflop(generator: Random, length: int) -> str:
    text, written = "", ""
    for i in range(length):
        kind, bit = generator.random(), "01"[int(2 * generator.random())]
        if i == 0 or (kind < WRITE and i < length - 1):
            text, written = f"{text}w{bit}", bit
        elif i == length - 1 or kind < WRITE + READ:
            text += f"r{written}"
        else:
            text += f"i{bit}"
    return text


def behind_equals(text: str) -> np.ndarray:
    """The characters behind `=`, and the end of the text."""
    return np.arange(len(text) + 1) > text.index("=")


def values_asked(text: str) -> np.ndarray:
    """The values behind `|`."""
    at = np.arange(len(text) + 1) - text.index("|")
    return (at > 0) & (at % 2 == 0)


def bits_read(text: str) -> np.ndarray:
    """The bits behind the instructions to read."""
    return np.array([False, *(character == "r" for character in text)])


@dataclass(frozen=True)
class Task:
    """A task. `make` draws an example of a length; `scored` tells which of its characters, and of the end behind them,
    are its answer: bool (len(text) + 1,)."""

    make: Callable[[Random, int], str]
    scored: Callable[[str], np.ndarray]
    unit: str  # of lengths
    length: int  # the longest in training, unless --length
    choices: int  # how many symbols a character of the answer may be
    shortest: int = 1
    longest: int | None = None  # that its vocabulary can hold

    def check(self, name: str, length: int) -> None:
        """DataError for a length that there is no example of."""
        if length < self.shortest:
            raise DataError(f"{name} begins at length {self.shortest}, in {self.unit}: {length} is not possible")
        if self.longest and length > self.longest:
            raise DataError(
                f"{name} at length {length} needs {length} different keys, and its vocabulary has {self.longest}: "
                f"take lengths of at most {self.longest} {self.unit}"
            )


TASKS = {
    "copy": Task(copy, behind_equals, "symbols", 20, len(SYMBOLS)),
    "reverse": Task(reverse, behind_equals, "symbols", 20, len(SYMBOLS)),
    "sort": Task(sort, behind_equals, "symbols", 20, len(SYMBOLS)),
    "addition": Task(addition, behind_equals, "digits", 6, len(DIGITS)),
    "recall": Task(recall, values_asked, "pairs", 8, len(SYMBOLS), longest=len(KEYS)),
    "flipflop": Task(flipflop, bits_read, "instructions", 24, 2, shortest=2),
}


def task_named(name: str) -> Task:
    """DataError for an unknown name."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


@dataclass(frozen=True)
class Examples:
    """What the corpus `task` is to hold: so many examples of a task, of lengths drawn evenly up to `length`."""

    name: str
    length: int
    examples: int = 100_000
    seed: int = 0

    @classmethod
    def checked(cls, name: str, length: int | None, examples: int | None, seed: int) -> "Examples":
        """DataError for what there is none of."""
        task = task_named(name)
        made = cls(
            name, task.length if length is None else length, cls.examples if examples is None else examples, seed
        )
        task.check(name, made.length)
        if made.examples < 2:
            raise DataError(f"--examples must be at least 2, one for training and one for validation, not {examples}")
        return made

    @property
    def task(self) -> Task:
        return TASKS[self.name]

    def texts(self) -> Iterator[str]:
        generator, task = generator_of("training", self.name, self.length, self.seed), self.task
        for _ in range(self.examples):
            length = task.shortest + int(generator.random() * (self.length - task.shortest + 1))
            yield task.make(generator, length)

    def documents(self, file: File | None = None) -> Documents:
        """Yield (name, text) of every example."""
        for number, text in enumerate(self.texts()):
            yield str(number), text

    def file(self) -> File:
        """What stands for a source: it changes with the examples."""
        first = [text for text, _ in zip(self.texts(), range(1000))]
        size = sum(len(text.encode()) for text in first) * self.examples // len(first)
        return File(f"{self.name}.txt", size, json_sha256([dataclasses.asdict(self), first]), path=str(Path(__file__)))


def generator_of(*key: object) -> Random:
    """A generator of the values in `key` alone."""
    return Random(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()))


def evaluation_examples(name: str, length: int, count: int, seed: int) -> list[str]:
    """`count` examples of one length, the same for every model. DataError for a length that there is no example of."""
    task, generator = task_named(name), generator_of("evaluation", name, length, seed)
    task.check(name, length)
    return [task.make(generator, length) for _ in range(count)]
