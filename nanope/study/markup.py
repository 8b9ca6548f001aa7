"""Tables as Markdown and as LaTeX, and figures as the text of their cells."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from nanope.study.seed_statistics import answers_interval, seed_interval

NOISE, WORSE, LOWER = "≈", "↑", "↓"


@dataclass
class Table:
    """Cells are text. **bold** is Markdown's, and becomes LaTeX's."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    left: int = 1  # columns of text; the others are figures

    def markdown(self) -> str:
        def line(cells):
            return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

        rule = "|" + "---|" * self.left + "--:|" * (len(self.head) - self.left)
        return "\n".join([f"**{self.title}**\n", line(self.head), rule, *map(line, self.rows)])

    def latex(self) -> str:
        """A booktabs tabular in a table environment."""

        def line(cells):
            return " & ".join(map(latex, cells)) + r" \\"

        columns = "l" * self.left + "r" * (len(self.head) - self.left)
        begin = [r"\begin{table}", rf"\caption{{{latex(self.title)}}}", r"\centering"]
        begin += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(self.head), r"\midrule"]
        return "\n".join([*begin, *map(line, self.rows), r"\bottomrule", r"\end{tabular}", r"\end{table}"])


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "×": r"$\times$", "±": r"$\pm$", "≈": r"$\approx$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "…": r"\dots{}", "γ": r"$\gamma$", "σ": r"$\sigma$", "–": "--", "−": "$-$", "²": "$^2$",
    "<": "$<$", ">": "$>$",
}  # fmt: skip


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped, signed numbers in math mode, and **bold** as \\textbf."""
    escaped = "".join(LATEX.get(c, c) for c in re.sub(r"\*\*(.*?)\*\*", "\0\\1\1", text))
    escaped = re.sub(r"(?<![\w.-])([+-]\d+(?:[.,]\d+)*)", r"$\1$", escaped)
    return escaped.replace("\0", r"\textbf{").replace("\1", "}")


def titled(setting: str, title: str) -> str:
    return f"{setting}: {title}" if setting else title


# ---- cells


def mean_cell(
    values: list[float], interval: list[float] | None, show: Callable[[float], float] = float, digits: int = 4
) -> str:
    """A mean with its interval, each as `show` gives it."""
    text = f"{show(np.mean(values)):,.{digits}f}"
    return text if interval is None else f"{text} [{show(interval[0]):,.{digits}f}, {show(interval[1]):,.{digits}f}]"


def row_cell(rows: dict[int, dict], figure: str) -> str:
    """Mean over seeds of a row of reports, with its interval: over seeds, or for one seed over documents."""
    values = [row["nats_per_token"] for row in rows.values()]
    if not values or None in values:
        return "n/a"
    interval = seed_interval(values) or next(iter(rows.values()))["interval"]
    return mean_cell(values, interval, math.exp, 2) if figure == "perplexity" else mean_cell(values, interval)


def difference_cell(found: dict | None, digits: int = 4, better: int = -1) -> str:
    """A paired difference with its interval: ≈ where that contains 0; where it is over seeds, not over documents
    alone, bold if it is better, and a mark if it is worse: ↑ of a loss, which is better below 0 (`better` -1), ↓ of an
    accuracy, which is better above (1)."""
    if found is None:
        return "n/a"
    text, interval = f"{found['difference']:+.{digits}f}", found["interval"]
    if interval is None:
        return text
    text += f" [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]"
    if interval[0] <= 0 <= interval[1]:
        return f"{text} {NOISE}"
    if found["seeds"] < 2:
        return text
    return f"**{text}**" if interval[0] * better > 0 else f"{text} {WORSE if better < 0 else LOWER}"


def accuracy_cell(rows: list[dict], figure: str = "accuracy", own: str = "interval") -> str:
    """Mean over seeds of an accuracy in per cent, from their rows on a task, with answers_interval."""
    values = [row[figure] for row in rows]
    if not values or None in values:
        return "n/a"
    text, interval = f"{np.mean(values):.1%}", answers_interval(rows, figure, own)
    return text if interval is None else f"{text} [{interval[0]:.1%}, {interval[1]:.1%}]"
