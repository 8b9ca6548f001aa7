"""What an evaluation is asked for, apart from the model, the data and the machine."""

import argparse
import dataclasses
import os
import re
import sys
from dataclasses import dataclass
from typing import Self

from data.shards import given_path
from nanope.convert import SCALINGS
from nanope.errors import nearest
from nanope.evaluation.effective import EPSILON
from nanope.evaluation.protocols import PROTOCOLS


@dataclass(frozen=True)
class Options:
    """The flags of eval.py by their names; see its --help. Lengths are in tokens, or such as "4x"."""

    lengths: list[int | str] | None = None
    protocol: list[str] = ("same-targets",)
    split: str = "val"
    stream: bool = False
    stride: int | None = None
    max_targets: int = 50_000
    scaling: list[str] = ("none",)
    factor: float | None = None
    probe: int = 0
    examples: int = 500
    epsilon: float = EPSILON
    attention: int = 0
    offsets: list[int] = (0, 256, 4096, 65536)
    windows: int = 8
    seed: int = 0

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})

    @property
    def asked(self) -> list[int | str]:
        """The lengths that were given, or the default."""
        return self.lengths or (["1x", "2x", "4x", "8x"] if "task" in self.protocol else ["1x"])

    def resolved(self, trained: int) -> Self:
        """For a model of this training length: lengths in order, the training length among them where it is shorter
        than the longest, and the stride. ValueError for lengths below 1, and for a stride beyond the shortest."""
        lengths = {*lengths_in_tokens(self.asked, trained)}
        lengths = sorted(lengths | {trained} if trained < max(lengths) else lengths)
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


def length_of(text: str) -> int | str:
    """A context length as it may be given: tokens, or a multiple of the training length such as 4x.
    ArgumentTypeError for anything else."""
    if not re.fullmatch(r"\d+|\d+(\.\d+)?x", text):
        raise argparse.ArgumentTypeError(f"a length is a number of tokens, or such as 4x, not {text!r}")
    return text if text.endswith("x") else int(text)


def lengths_in_tokens(lengths: list[int | str], block_size: int) -> list[int]:
    """Lengths in tokens: 4x is four times the training length."""
    return [n if isinstance(n, int) else round(float(n.removesuffix("x")) * block_size) for n in lengths]


# ---- the command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors name the nearest valid option."""

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            message += nearest(message.split()[2], self._option_string_actions)
        super().error(message)


def make_parser(description: str = "") -> Parser:
    epilog = "protocols:\n" + "\n".join(f"  {name}: {what}" for name, what in PROTOCOLS.items())
    parser = Parser(prog="eval.py", description=description, epilog=epilog, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    what.add_argument("--run", type=given_path, help="a run's folder, or a checkpoint file")
    what.add_argument(
        "--compare",
        nargs="+",
        type=given_path,
        metavar="RUN",
        help="two or more runs: differences from the first's experiment",
    )
    what.add_argument(
        "--model", type=given_path, help="a transformers causal LM: a folder or a hub name such as gpt2; needs --data"
    )
    add("--checkpoint", default="last", help="last, best, or a step number (default: last)")
    add("--data", type=given_path, help="data folder (default: the run's own, which must be as it was in training)")
    add("--split", default="val", help="a split of the data, or val_long, the long documents of val (default: val)")
    add("--stream", action="store_true", help="the split as one text, documents joined by end-of-text tokens")
    text = "context lengths in tokens, or 4x for 4 training lengths; a training length below the longest is added. For "
    text += "task: lengths of examples in the task's unit (default: 1x 2x 4x 8x)"
    add("--lengths", type=length_of, nargs="+", help=text)
    add("--protocol", nargs="+", choices=PROTOCOLS, default=["same-targets"], help="see below (default: same-targets)")
    add("--stride", type=int, help="S of same-targets and sliding, see below (default: half the shortest length)")
    add("--max_targets", type=int, default=50_000, help="scored tokens, evenly spread; 0 for all (default: 50,000)")
    add("--scaling", nargs="+", choices=("none", *SCALINGS), default=["none"], help="of frequencies (default: none)")
    add("--factor", type=float, help="of --scaling: new context over training length, the same for every length")
    add("--probe", type=int, default=0, metavar="TRIALS", help="of retrieval; 200 is a good number (default: 0)")
    add("--examples", type=int, default=500, help="of task, at each length (default: 500)")
    text = "nats that count as none in the effective context of same-targets (default: 0.01)"
    add("--epsilon", type=float, default=Options.epsilon, help=text)
    text = "a fixed evaluator, a run or a transformers model, that chooses the key tokens of same-targets"
    add("--key_tokens", type=given_path, metavar="EVALUATOR", help=text)
    text = "windows whose attention is shown by distance, by layer and head; 8 is a good number (default: 0)"
    add("--attention", type=int, default=0, metavar="WINDOWS", help=text)
    add("--offsets", type=int, nargs="+", default=[*Options.offsets], help="of shift (default: 0 256 4096 65536)")
    add("--windows", type=int, default=8, help="of shift, of the training length, spread over the split (default: 8)")
    add("--batch_tokens", type=int, help="input tokens a forward pass (default: 4,096 on a CPU, else 65,536)")
    add("--resamples", type=int, help="has no effect any more: intervals are t intervals, without a bootstrap")
    add("--seed", type=int, default=0, help="seed of the probe and of the examples of task (default: 0)")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    text = "of autocast; tf32 is float32 with a GPU's products in TF32 (default: float32)"
    add("--dtype", choices=("float32", "tf32", "bfloat16", "float16"), default="float32", help=text)
    add(
        "--json",
        type=given_path,
        help="where to write the report, with its table as .md (default: in RUN/eval/, for a run's folder)",
    )
    return parser


def parse(arguments: list[str] | None, description: str) -> argparse.Namespace:
    """The arguments of eval.py, checked as far as can be without a run. Ends the process for those that are wrong."""
    parser = make_parser(description)
    args = parser.parse_args(arguments)
    lowest = {"stride": 1, "max_targets": 0, "batch_tokens": 1, "resamples": 1000, "seed": 0, "probe": 0, "factor": 1}
    lowest |= {"epsilon": 0, "attention": 0, "examples": 1}
    for name, least in {**lowest, "windows": 1, "offsets": 0}.items():
        value = min(args.offsets) if name == "offsets" else getattr(args, name)
        if value is not None and not value >= least:
            parser.error(f"--{name} must be at least {least}, not {value}")
    shift_alone, task = {*args.protocol} == {"shift"}, "task" in args.protocol
    if task and len({*args.protocol}) > 1:
        parser.error("--protocol task is for runs on a task, the others for runs on text: give it alone")
    if not args.lengths and not shift_alone and not task:
        parser.error("the following arguments are required: --lengths")
    if args.factor is None and args.scaling != ["none"]:
        parser.error("--scaling needs a --factor, for example 8")
    if args.factor is not None and args.scaling == ["none"]:
        parser.error(f"--factor needs a --scaling: {', '.join(SCALINGS)}")
    if args.model and not args.data:
        parser.error("--model needs --data, a folder prepared with the model's tokenizer")
    if args.compare and len(args.compare) < 2:
        parser.error("--compare needs two runs or more")
    if args.compare and "shift" in args.protocol:
        parser.error("--compare takes every protocol but shift, whose rows are differences already")
    others = ("stream", "stride", "max_targets", *(() if args.probe or args.attention else ("scaling",)))
    for names, used, what in (
        (("offsets", "windows"), "shift" in args.protocol, "for --protocol shift"),
        (others, not shift_alone, "not for --protocol shift"),
        (
            ("lengths",),
            not shift_alone or args.attention,
            "not for --protocol shift, whose windows have the training length",
        ),
        (("examples",), task, "for --protocol task"),
        (("stream", "stride", "max_targets", "split", "probe", "attention"), not task, "not for --protocol task"),
        (("epsilon", "key_tokens"), "same-targets" in args.protocol, "for --protocol same-targets"),
    ):
        for name in names:
            if not used and getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} is {what}")
    if args.split == "val_long" and ("shift" in args.protocol or args.attention):
        parser.error("--split val_long is a list of documents, and shift and --attention take windows of a whole split")
    for name in ("run", "model", "data", "json", "key_tokens"):
        if getattr(args, name) is not None and not getattr(args, name).strip():
            parser.error(f"--{name} needs a name, not an empty one")
    if args.json and args.json.endswith(os.sep):
        parser.error(f"--json needs a file's name, such as {args.json}report.json")
    if args.resamples is not None:
        print("note: --resamples has no effect any more: intervals are t intervals", file=sys.stderr)
    return args
