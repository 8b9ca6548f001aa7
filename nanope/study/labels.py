"""Where the labels of a panel go: in a column at the ends of its curves, or near a point where there is room.

A label names its curve directly, so a figure needs no legend, and can be read without colours.
"""

import itertools
import re

import numpy as np

GAP = 1.0  # points between two labels
DIRECTIONS = ((1, 0), (1, -1), (1, 1), (0, 1), (0, -1), (-1, 0), (-1, -1), (-1, 1))
DISTANCES = (4, 8, 13, 19, 27)  # points from the point that is labelled


def wrapped(name: str, width: int = 18, longest: int = 24) -> str:
    """A name in one line where it has at most `width` characters, else in two or three, broken at spaces and dashes,
    preferably after a comma or before a parenthesis. A line that is longer than `longest` loses its end."""
    if len(name) <= width:
        return name
    parts = re.findall(r"[^\s_-]*(?:\s+|[_-]+|$)", name)  # each with the space or the dash that ends it
    parts, best = [part for part in parts if part], (float("inf"), [name])
    for n in (1, 2):
        for breaks in itertools.combinations(range(1, len(parts)), n):
            lines = ["".join(parts[i:j]).strip() for i, j in zip((0, *breaks), (*breaks, len(parts)))]
            rough = sum(not (parts[i - 1].rstrip()[-1] in ",;:" or parts[i][0] in "([") for i in breaks)
            best = min(best, (max(map(len, lines)) + 3 * rough + 8 * n, lines))
    return "\n".join(shortened(line, longest) for line in best[1])


def shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def spread(wanted: list[float], heights: list[float], low: float, high: float) -> list[float]:
    """Centres of labels as near as possible to the wanted ones, without overlaps and in the same order, between low and
    high where they fit there. All in one unit. Labels that touch move together, about the mean of what they want."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups = []  # of touching labels: [members, where the lowest edge of the group wants to be, height]
    for i in order:
        groups.append([[i], wanted[i] - heights[i] / 2, heights[i]])
        while True:
            members, bottom, height = groups[-1]
            groups[-1][1] = bottom = max(low, min(bottom, high - height))
            if len(groups) < 2 or groups[-2][1] + groups[-2][2] <= bottom:
                break
            below = groups[-2]
            n, m = len(below[0]), len(members)
            middle = (below[1] * n + (bottom - below[2]) * m) / (n + m)
            groups[-2:] = [[below[0] + members, middle, below[2] + height]]
    found = [0.0] * len(wanted)
    for members, bottom, _ in groups:
        for i in members:
            found[i] = bottom + heights[i] / 2
            bottom += heights[i]
    return found


class Labels:
    """The labels of one panel. They are placed once the layout is known, by `place`."""

    def __init__(self, axes):
        self.axes, self.column, self.free, self.curves = axes, [], [], []
        self.point = axes.figure.dpi / 72  # in pixels

    def avoid(self, x, y) -> None:
        """A curve that free labels must not cover, in data coordinates."""
        self.curves.append((np.asarray(x, float), np.asarray(y, float)))

    def at_end(self, text: str, x: float, y: float, colour: str, value: float) -> None:
        """In the column to the right, beside the end of a curve at (x, y), in the order of the values."""
        leader = {"arrowstyle": "-", "color": colour, "lw": 0.5, "relpos": (0, 0.5), "shrinkA": 0.5, "shrinkB": 1.5}
        label = self.axes.annotate(
            text, (x, y), (7, 0), textcoords="offset points", color=colour, va="center", annotation_clip=False,
            linespacing=0.95, arrowprops=leader,
        )  # fmt: skip
        self.column.append((value, label))

    def near(self, text: str, points: list[tuple[float, float]], colour: str, size: float = 7) -> None:
        """Near the first of some points that has room, inside the panel."""
        label = self.axes.text(*points[0], text, color=colour, fontsize=size, va="bottom", ha="left", linespacing=0.95)
        label.set_in_layout(False)
        self.free.append((label, points))

    def place(self) -> None:
        """Move all labels to their places. The layout must stay as it is afterwards."""
        box = self.axes.get_window_extent()
        inside = box.padded(-2 * self.point)
        if self.column:
            self.place_column(box)
        taken = [label.get_window_extent().extents for _, label in self.column]
        ink = self.ink()
        for label, points in self.free:
            best = self.room_for(label, points, inside, ink, taken)
            label.set_transform(self.axes.transAxes)
            label.set_position(self.axes.transAxes.inverted().transform(best[:2]))
            taken.append(best)

    def place_column(self, box) -> None:
        column = [label for _, label in sorted(self.column, key=lambda entry: entry[0])]
        ends = [self.axes.transData.transform(label.xy)[1] for label in column]
        heights = [(text_height(label) + GAP) * self.point for label in column]
        slack = 4 * self.point
        for label, end, y in zip(column, ends, spread(ends, heights, box.y0 - slack, box.y1 + slack)):
            label.set_position((7, (y - end) / self.point))

    def ink(self) -> np.ndarray:
        """Points on all curves, some 2 points apart, in pixels: (n, 2)."""
        found = [np.empty((0, 2))]
        for x, y in self.curves:
            corners = self.axes.transData.transform(np.column_stack([x, y]))
            for a, b in itertools.pairwise(corners):
                n = 2 + int(np.hypot(*(b - a)) / (2 * self.point))
                found.append(a + (b - a) * np.linspace(0, 1, n)[:, None])
            found.append(corners)
        return np.concatenate(found)

    def room_for(self, label, points, box, ink, taken) -> tuple:
        """The box (x0, y0, x1, y1) in pixels of the candidate that covers least; the nearest of equals."""
        size = label.get_window_extent()
        width, height, best = size.width, size.height, None
        for rank, (distance, (x, y), (right, up)) in enumerate(
            itertools.product(DISTANCES, self.axes.transData.transform(points), DIRECTIONS)
        ):
            step = distance * self.point / (2**0.5 if right and up else 1)
            left = x + right * step + (right - 1) / 2 * width
            bottom = y + up * step + (up - 1) / 2 * height
            here = left, bottom, left + width, bottom + height
            covered = np.all((ink > (here[0] - 1, here[1] - 1)) & (ink < (here[2] + 1, here[3] + 1)), axis=1).sum()
            clash = any(overlap(here, other, 3 * self.point) for other in taken)
            outside = here[0] < box.x0 or here[1] < box.y0 or here[2] > box.x1 or here[3] > box.y1
            cost = 1000 * outside + 100 * clash + covered + rank / 1000
            if best is None or cost < best[0]:
                best = cost, here
        return best[1]


def text_height(label) -> float:
    """Points that a label takes, without the line that leads to it."""
    return label.get_fontsize() * (1 + 1.05 * label.get_text().count("\n"))


def overlap(a: tuple, b: tuple, gap: float) -> bool:
    """Whether two boxes (x0, y0, x1, y1) overlap, or stand side by side nearer than the gap."""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] and b[1] < a[3]
