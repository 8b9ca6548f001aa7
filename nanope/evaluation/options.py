"""What an evaluation is asked for, apart from the model, the data and the machine."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Options:
    """The flags of eval.py by their names; see its --help."""

    lengths: list[int] | None = None
    protocol: list[str] = ("same-targets",)
    split: str = "val"
    stream: bool = False
    stride: int | None = None
    max_targets: int = 50_000
    scaling: list[str] = ("none",)
    factor: float | None = None
    probe: int = 0
    offsets: list[int] = (0, 256, 4096, 65536)
    windows: int = 8
    resamples: int = 2000
    seed: int = 0

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})

    def resolved(self, block_size: int) -> Self:
        """For a model of this training length: lengths in order, the training length among them where it is shorter
        than the longest, and the stride. ValueError for lengths below 1, and for a stride beyond the shortest."""
        lengths = {*(self.lengths or [block_size])}
        lengths = sorted(lengths | {block_size} if block_size < max(lengths) else lengths)
        shortest = lengths[0]
        if shortest < 1:
            raise ValueError(f"lengths must be at least 1, not {shortest}")
        stride = self.stride or max(1, shortest // 2)
        if stride > shortest:
            raise ValueError(
                f"stride {stride} exceeds the shortest length {shortest}: "
                "its tokens would have no context in the window"
            )
        protocol = list(dict.fromkeys(self.protocol))
        return dataclasses.replace(self, lengths=lengths, stride=stride, protocol=protocol, factor=self.factor or 1.0)
