"""Perplexity of a run, or of a model of the transformers library, at context lengths far beyond its training length.

    python eval.py --run runs/NAME --lengths 256 512 1024 2048
    python eval.py --run runs/NAME --lengths 2048 --protocol same-targets per-position --scaling none yarn --factor 8
    python eval.py --run runs/NAME --protocol shift --offsets 0 256 4096
    python eval.py --compare runs/rope-seed1 runs/rope-seed2 runs/crope-seed1 runs/crope-seed2 --lengths 1024
    python eval.py --model gpt2 --data data/novels-gpt2 --lengths 512 1024
    torchrun --standalone --nproc_per_node=8 -- eval.py --run …    # sooner; the -- keeps --run from torchrun

It evaluates whole documents of the validation split that are longer than the longest length, or with --stream the
split as one text. The scored tokens are the same for every length, and their hash stands in the report. Means are over
tokens, sums are float64, and intervals come from a bootstrap over documents. The training length is evaluated too: it
is the cropping baseline.
"""

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from data.shards import Data, Split, given_path, output
from data.tokenizer import Tokenizer
from nanope import checkpoint
from nanope.convert import SCALINGS
from nanope.distributed import ranks_of
from nanope.errors import nearest
from nanope.evaluation.compare import CONDITIONS, arms_of, compare, comparison_table
from nanope.evaluation.models import Model, Subject, open_pretrained, open_run, scaled_models
from nanope.evaluation.options import Options
from nanope.evaluation.parts import Parts, source_hashes, write_json
from nanope.evaluation.probe import evaluate_probe
from nanope.evaluation.protocols import PROTOCOLS, Targets, checked_tokenizer, choose_targets, spans_of, windows_of
from nanope.evaluation.report import log_to_wandb, report_name, table, write_report
from nanope.evaluation.scoring import Compute, score
from nanope.evaluation.shift import evaluate_shift, shift_figures
from nanope.evaluation.statistics import FIGURES, position_curve, row_figures

# ---- arguments


class Parser(argparse.ArgumentParser):
    """argparse whose errors name the nearest valid option."""

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            message += nearest(message.split()[2], self._option_string_actions)
        super().error(message)


def make_parser() -> Parser:
    epilog = "protocols:\n" + "\n".join(f"  {name}: {what}" for name, what in PROTOCOLS.items())
    parser = Parser(prog="eval.py", description=__doc__, epilog=epilog, allow_abbrev=False)
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
    add(
        "--data",
        type=given_path,
        help="data folder (default: the run's own; for --model one that was made with its tokenizer)",
    )
    add("--split", default="val", help="a split of the data, or val_long, the long documents of val (default: val)")
    add("--stream", action="store_true", help="the split as one text, documents joined by end-of-text tokens")
    add("--lengths", type=int, nargs="+", help="context lengths in tokens; the training length is added")
    add("--protocol", nargs="+", choices=PROTOCOLS, default=["same-targets"], help="see below (default: same-targets)")
    add("--stride", type=int, help="S of same-targets and sliding, see below (default: half the shortest length)")
    add("--max_targets", type=int, default=50_000, help="scored tokens, evenly spread; 0 for all (default: 50,000)")
    add("--scaling", nargs="+", choices=("none", *SCALINGS), default=["none"], help="of frequencies (default: none)")
    add("--factor", type=float, help="of --scaling: new context over training length, the same for every length")
    add("--probe", type=int, default=0, metavar="TRIALS", help="of retrieval; 200 is a good number (default: 0)")
    add("--offsets", type=int, nargs="+", default=[*Options.offsets], help="of shift (default: 0 256 4096 65536)")
    add("--windows", type=int, default=8, help="of shift, of the training length, spread over the split (default: 8)")
    add("--batch_tokens", type=int, help="input tokens a forward pass (default: 4,096 on a CPU, else 65,536)")
    add("--resamples", type=int, default=2000, help="bootstrap resamples of documents (default: 2,000)")
    add("--seed", type=int, default=0, help="seed of the bootstrap and of the probe (default: 0)")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of autocast (default: float32)")
    add(
        "--json",
        type=given_path,
        help="where to write the report, with its table as .md (default: in RUN/eval/, for a run's folder)",
    )
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(arguments)
    lowest = {"stride": 1, "max_targets": 0, "batch_tokens": 1, "resamples": 1000, "seed": 0, "probe": 0, "factor": 1}
    for name, least in {**lowest, "windows": 1, "offsets": 0}.items():
        value = min(args.offsets) if name == "offsets" else getattr(args, name)
        if value is not None and not value >= least:
            parser.error(f"--{name} must be at least {least}, not {value}")
    if not args.lengths and args.protocol != ["shift"]:
        parser.error("the following arguments are required: --lengths")
    if args.factor is None and args.scaling != ["none"]:
        parser.error("--scaling needs a --factor, for example 8")
    if args.factor is not None and args.scaling == ["none"]:
        parser.error("--factor is for --scaling pi, ntk or yarn")
    if args.model and not args.data:
        parser.error("--model needs --data, a folder prepared with the model's tokenizer")
    if args.compare and len(args.compare) < 2:
        parser.error("--compare needs two runs or more")
    for name in ("offsets", "windows"):
        if "shift" not in args.protocol and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for --protocol shift")
    if args.compare and "shift" in args.protocol:
        parser.error("--compare takes every protocol but shift, whose rows are differences already")
    return args


# ---- what is done, in the order in which it happens


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    options, main_rank = Options.of(args), os.environ.get("RANK", "0") == "0"
    try:
        with ranks_of(args.device) as (ranks, device):
            torch.set_float32_matmul_precision("highest")  # evaluation in float32 is float32
            batch_tokens = args.batch_tokens or (4096 if device.type == "cpu" else 65536)
            compute = Compute(batch_tokens, getattr(torch, args.dtype), device, ranks)
            if args.compare:
                text = comparison_table(compare_runs(args, options, compute))
            elif args.model:
                subject = open_pretrained(args.model, args.data, args.split)
                text = table(make_report(subject, args, options, compute, args.json))
            else:
                text = table(evaluate_run(args.run, args, options, compute, args.json))
        if main_rank:
            output(text)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}" if main_rank else 1)
    except KeyboardInterrupt:
        if main_rank:
            print("\ninterrupted: finished rows are kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def compare_runs(args: argparse.Namespace, options: Options, compute: Compute) -> list[dict]:
    """Evaluate every run, reusing what is finished, at the same lengths, and compare them; rows as of `compare`."""
    configs = [checkpoint.load(checkpoint.find(run, args.checkpoint))["config"] for run in args.compare]
    arms_of(configs)  # refuses what cannot be compared, before the work
    shorter = {config["block_size"] for config in configs if config["block_size"] < max(args.lengths)}
    options = dataclasses.replace(options, lengths=sorted({*args.lengths} | shorter))
    reports = [evaluate_run(run, args, options, compute) for run in args.compare]
    rows = compare(reports)
    if args.json and compute.ranks.main:
        runs = [{name: report[name] for name in CONDITIONS} for report in reports]
        write_json(Path(args.json), {"comparison": rows, "runs": runs, "command": vars(args)})
    return rows


def evaluate_run(
    run: str, args: argparse.Namespace, options: Options, compute: Compute, output: str | Path | None = None
) -> dict:
    """Evaluate one run of train.py; the report goes to `output`, or into the run's folder, and to the run's wandb."""
    subject = open_run(run, args.checkpoint, args.data)
    if output is None and Path(run).is_dir():
        output = Path(run) / "eval" / report_name(args, make_parser().get_default, subject.about["step"])
    report = make_report(subject, args, options, compute, output)
    if compute.ranks.main:
        log_to_wandb(report)
    return report


def make_report(
    subject: Subject, args: argparse.Namespace, options: Options, compute: Compute, output: str | Path | None
) -> dict:
    """Evaluate a model, reusing rows that are kept beside `output`, and write the report there (None: nowhere)."""
    conditions = {"weights": subject.sha256, "data": subject.data.hash, "sources": source_hashes(subject.model)}
    conditions |= {"dtype": args.dtype, "device": compute.device.type, "torch": torch.__version__}
    parts = Parts(Path(output).parent / ".parts" if output else None, conditions, compute.ranks)
    report = evaluate(subject.model.to(compute.device), subject.data, options, compute, parts)
    report |= subject.about | {"command": vars(args)}
    if output and compute.ranks.main:
        write_report(report, Path(output))
    return report


def evaluate(
    model: Model, data: Data, options: Options, compute: Compute | None = None, parts: Parts | None = None
) -> dict:
    """Figures of a model at each length by each protocol: {"results": rows, and the conditions they were taken under}.

    The training length is added to the lengths where it is shorter than the longest. Its row is the cropping baseline:
    the same tokens with no more context than in training, and never with scaled frequencies. A length that the scheme
    cannot reach, or a scaling that it does not have, has null figures and a reason. per-position has one row, at the
    longest length that the scheme can do. "probe" holds the recall of options.probe trials, "shift" the figures of the
    protocol shift. ValueError for lengths below 1, a stride beyond the shortest, or lengths beyond any document.
    """
    compute, parts, block_size = compute or Compute(), parts or Parts(), model.config.block_size
    options = options.resolved(block_size)
    tokenizer = checked_tokenizer(data, model.lm_head.weight.size(0))
    by_windows = [protocol for protocol in options.protocol if protocol != "shift"]
    longest = options.lengths[-1] if by_windows else 0
    tokens, documents, spans = spans_of(data, options.split, options.stream, longest)
    variants = scaled_models(model, options.scaling, options.factor)
    results, hashes = [], {}
    for protocol in by_windows:
        intended = choose_targets(tokens, documents, spans, protocol, longest, options.stride, options.max_targets)
        hashes[protocol] = intended.sha256
        for variant in variants:
            for length, reason in variant.lengths(protocol, options.lengths, block_size).items():
                row = {"length": length, "protocol": protocol, **variant.label}
                row["cropping_baseline"] = length == block_size and variant.scaling == "none"
                if reason:
                    results.append(row | dict.fromkeys(FIGURES) | {"reason": reason})
                    continue
                targets = intended.shortened(longest, length) if protocol == "per-position" else intended
                key = row | {"targets": targets.sha256, "stride": options.stride}
                key |= {"resamples": options.resamples, "seed": options.seed}
                found = parts.get(key)
                if found is None:
                    found = parts.keep(key, measure(variant.model, tokens, tokenizer, targets, row, options, compute))
                results.append(row | found)
    report = {"results": results, "targets_sha256": hashes, "split": options.split, "stream": options.stream}
    report |= {"stride": options.stride, "documents": len(documents if options.stream else spans)}
    report |= {"max_targets": options.max_targets, "resamples": options.resamples, "seed": options.seed}
    report["interval"] = f"95 % percentile bootstrap over documents, {options.resamples} resamples, nats per token"
    report |= {"block_size": block_size, "data_hash": data.hash, "tokenizer": data.manifest["tokenizer"]}
    report |= compute.conditions(model)
    if "shift" in options.protocol:
        shifts = evaluate_shift(model, data, tokenizer, options, compute)
        results += shifts
        report["shift"] = shift_figures(shifts)
    if options.probe:
        asked = [variant for variant in variants if variant.asked]
        report["probe"] = [row for v in asked for row in evaluate_probe(v, data, block_size, options, compute, parts)]
    return report


def measure(
    model: Model, tokens: Split, tokenizer: Tokenizer, targets: Targets, row: dict, options: Options, compute: Compute
) -> dict:
    """The figures of one row: a model, a protocol and a length."""
    protocol, length, scaling = row["protocol"], row["length"], row["scaling"]
    windows = windows_of(targets, protocol, length, options.stride)
    assert np.array_equal(windows.targets(), targets.positions), "every length scores the same tokens"
    label = f"{protocol} {length}" + (f" {scaling}" if scaling != "none" else "")
    nll, hits = score(model, tokens, windows, compute, label)
    bootstrap = options.resamples, options.seed
    found = row_figures(nll, hits, tokenizer.token_bytes[targets.ids], targets.document, *bootstrap)
    found["targets_sha256"] = targets.sha256
    if protocol == "per-position":
        found["curve"] = position_curve(nll, targets.document, length, *bootstrap)
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    main()
