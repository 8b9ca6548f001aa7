"""Perplexity of a run, or of a model of the transformers library, at context lengths far beyond its training length.

    python eval.py --run runs/NAME --lengths 1x 2x 4x 8x          # of the training length, or in tokens: 256 512
    python eval.py --run runs/NAME --lengths 2048 --protocol same-targets per-position --scaling none yarn --factor 8
    python eval.py --run runs/NAME --protocol task                 # of a run on a task of data/prepare.py
    python eval.py --run runs/NAME --protocol shift --offsets 0 256 4096
    python eval.py --compare runs/rope-seed1 runs/rope-seed2 runs/crope-seed1 runs/crope-seed2 --lengths 1024
    python eval.py --model gpt2 --data data/novels-gpt2 --lengths 512 1024
    torchrun --standalone --nproc_per_node=8 -- eval.py --run …    # sooner; the -- keeps --run from torchrun

It evaluates whole documents of the validation split that are longer than the longest length, or with --stream the
split as one text. The scored tokens are the same for every length, and their hash stands in the report. Means are over
tokens, sums are float64, and intervals are over documents. The training length is evaluated too: it is the cropping
baseline.
"""

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from data.shards import Data, Split
from data.tokenizer import Tokenizer
from nanope.distributed import ranks_of, use_dtype
from nanope.evaluation.attention_by_distance import evaluate_attention
from nanope.evaluation.compare import CONDITIONS, arms_of, choose_text, compare, comparison_table, tokens_for_all
from nanope.evaluation.effective import effective_contexts
from nanope.evaluation.key_tokens import FIGURES as KEY_FIGURES
from nanope.evaluation.key_tokens import Evaluator, KeyTokens, open_evaluator
from nanope.evaluation.models import Model, Subject, open_pretrained, open_run, scaled_models
from nanope.evaluation.options import Options, lengths_in_tokens, make_parser, parse
from nanope.evaluation.outputs import check_outputs, report_name, show_and_write
from nanope.evaluation.parts import FOLDER, Parts, source_hashes
from nanope.evaluation.probe import evaluate_probe
from nanope.evaluation.protocols import Targets, checked_tokenizer, choose_targets, spans_of, windows_of
from nanope.evaluation.report import log_to_wandb, table
from nanope.evaluation.scoring import Compute, score
from nanope.evaluation.shift import evaluate_shift, shift_figures
from nanope.evaluation.statistics import FIGURES, METHOD, position_curve, row_figures
from nanope.evaluation.tasks import evaluate_task, training_length

MOST_NATS = 500.0  # a token, beyond which perplexity is no finite number: guessing has 11 with GPT-2's tokens


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments, __doc__)
    options, main_rank = Options.of(args), os.environ.get("RANK", "0") == "0"
    try:
        with ranks_of(args.device) as (ranks, device):
            batch_tokens = args.batch_tokens or (4096 if device.type == "cpu" else 65536)
            dtype = use_dtype(args.dtype, device)
            compute = Compute(batch_tokens, dtype, device, ranks, args.dtype == "tf32")
            (compare_runs if args.compare else evaluate_one)(args, options, compute)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}" if main_rank else 1)
    except KeyboardInterrupt:
        if main_rank:
            print(
                "\ninterrupted: finished rows of a report are kept, and the same command goes on from there",
                file=sys.stderr,
            )
        sys.exit(128 + signal.SIGINT)


def evaluate_one(args: argparse.Namespace, options: Options, compute: Compute) -> None:
    """Evaluate a run of train.py or a model of transformers. The report goes to --json, or into the run's folder, and
    to the run's wandb."""
    if args.model:
        subject = open_pretrained(args.model, args.data, args.split)
    else:
        subject = open_run(args.run, args.checkpoint, args.data)
    output = Path(args.json) if args.json else output_of(args.run, subject.about, subject.data, args, options)
    check_outputs([output], None, compute.ranks)
    evaluator = open_evaluator(args.key_tokens, subject.data, options.resolved(subject.model.config.block_size))
    report = make_report(subject, args, options, compute, output, evaluator)
    show_and_write(table(report), [(output, report)], compute.ranks)
    if args.run and compute.ranks.main:
        log_to_wandb(report)


def compare_runs(args: argparse.Namespace, options: Options, compute: Compute) -> None:
    """Evaluate every run, reusing what is finished, at the same lengths, and compare them. Reports go into the runs'
    folders, and the comparison to --json."""
    # What cannot be compared is refused before the work. The models are opened again, one at a time
    opened = [(s.about, s.data) for s in (open_run(run, args.checkpoint, args.data) for run in args.compare)]
    configs, datas = [about["config"] for about, _ in opened], [data for _, data in opened]
    arms_of(configs)
    trained = [training_length(data, config["block_size"], options.protocol) for data, config in zip(datas, configs)]
    asked, sizes = tokens_for_all(options.asked, trained)
    options = dataclasses.replace(options, lengths=[*asked, *sizes])
    targets, text = choose_text(datas, options.resolved(max(asked)), bool(args.key_tokens))
    evaluator = open_evaluator(args.key_tokens, datas[0], options.resolved(max(asked)))
    outputs = []
    for run, length, (about, data) in zip(args.compare, trained, opened):
        more = sorted(sizes - {length})  # lengths that --run would not add
        own = dataclasses.replace(options, lengths=[*asked, *more])
        outputs.append(output_of(run, about, data, args, own, text))
    comparison = Path(args.json) if args.json else None
    check_outputs(outputs, comparison, compute.ranks)
    reports = []
    for run, output, own in zip(args.compare, outputs, targets):
        subject = open_run(run, args.checkpoint, args.data)
        reports.append(make_report(subject, args, options, compute, output, evaluator, own) | {"text_sha256": text})
    rows = compare(reports)
    runs = [{name: report[name] for name in CONDITIONS} for report in reports]
    found = {"comparison": rows, "runs": runs, "command": vars(args)}
    show_and_write(comparison_table(rows, reports), [*zip(outputs, reports), (comparison, found)], compute.ranks)
    for report in reports if compute.ranks.main else ():
        log_to_wandb(report)


def output_of(
    run: str, about: dict, data: Data, args: argparse.Namespace, options: Options, text: str | None = None
) -> Path | None:
    """Where the report of a run goes: into its folder. None for a run that is given by its checkpoint file."""
    trained = training_length(data, about["config"]["block_size"], options.protocol)
    lengths = lengths_in_tokens(options.lengths or [], trained)
    name = report_name(args, make_parser().get_default, lengths, about["step"], data, text)
    return Path(run) / "eval" / name if Path(run).is_dir() else None


def make_report(
    subject: Subject,
    args: argparse.Namespace,
    options: Options,
    compute: Compute,
    output: Path | None,
    evaluator: Evaluator | None,
    targets: Targets | None = None,
) -> dict:
    """The report of a model, with rows reused that are kept beside `output` (None: nothing is kept)."""
    conditions = {"weights": subject.sha256, "data": subject.data.hash, "sources": source_hashes(subject.model)}
    conditions |= {"dtype": args.dtype, "device": compute.device.type, "torch": torch.__version__}
    parts = Parts(output.parent / FOLDER if output else None, conditions, compute.ranks)
    report = evaluate(subject.model.to(compute.device), subject.data, options, compute, parts, targets, evaluator)
    return report | subject.about | {"command": vars(args)}


def evaluate(
    model: Model,
    data: Data,
    options: Options,
    compute: Compute | None = None,
    parts: Parts | None = None,
    given: Targets | None = None,
    evaluator: Evaluator | None = None,
) -> dict:
    """Figures of a model at each length by each protocol: {"results": rows, and the conditions they were taken under}.

    The training length is added to the lengths where it is shorter than the longest. Its row is the cropping baseline:
    the same tokens with no more context than in training, and never with scaled frequencies. A length that the scheme
    cannot reach, or a scaling that it does not have, has null figures and a reason. per-position has one row, at the
    longest length that the scheme can do. "probe" holds the recall of options.probe trials, "shift" the figures of the
    protocol shift, "effective_context" the lengths that are enough, and "attention" where the model looks in
    options.attention windows. `given` are targets in the place of those that a protocol chooses. `evaluator` chooses
    the key tokens of same-targets. ValueError for lengths below 1, a stride beyond the shortest, or lengths beyond any
    document.
    """
    compute, parts, block_size = compute or Compute(), parts or Parts(), model.config.block_size
    options = options.resolved(training_length(data, block_size, options.protocol))
    tokenizer = checked_tokenizer(data, model.lm_head.weight.size(0))
    by_windows = [protocol for protocol in options.protocol if protocol not in ("shift", "task")]
    longest = options.lengths[-1] if by_windows else 0
    tokens, documents, spans = spans_of(data, options.split, options.stream, longest)
    variants = scaled_models(model, options.scaling, options.factor)
    asked = [variant for variant in variants if variant.asked]
    results, hashes, chosen = [], {}, {}
    for protocol in by_windows:
        limits = longest, options.stride, options.max_targets
        intended = given or choose_targets(tokens, documents, spans, protocol, *limits)
        hashes[protocol] = intended.sha256
        judged = evaluator and protocol == "same-targets"
        keys = evaluator.choose(tokens, intended, options.lengths, options.stride, compute) if judged else None
        chosen |= {"key_tokens": keys.about} if keys else {}
        for variant in variants:
            for length, reason in variant.lengths(protocol, options.lengths, block_size).items():
                row = {"length": length, "protocol": protocol, **variant.label}
                row["cropping_baseline"] = length == block_size and variant.scaling == "none"
                if reason:
                    results.append(row | dict.fromkeys(FIGURES + KEY_FIGURES * bool(keys)) | {"reason": reason})
                    continue
                targets = intended.shortened(longest, length) if protocol == "per-position" else intended
                key = row | {"targets": targets.sha256, "stride": options.stride, "keys": keys and keys.about["sha256"]}
                found = parts.get(key)
                if found is None:
                    found = measure(variant.model, tokens, tokenizer, targets, row, options, compute, keys)
                    parts.keep(key, found)
                results.append(row | found)
    report = {"results": results, "targets_sha256": hashes, "split": options.split, "stream": options.stream}
    count = len({*given.document}) if given else len(documents if options.stream else spans)
    report |= {"stride": options.stride, "documents": count}
    report |= {"max_targets": options.max_targets, "seed": options.seed, "interval": METHOD}
    report |= {"block_size": block_size, "data_hash": data.hash, "tokenizer": data.manifest["tokenizer"]}
    report |= compute.conditions(model, options.lengths)
    report |= {"effective_context": effective_contexts(results, options.epsilon)} | chosen
    if "task" in options.protocol:
        results += evaluate_task(model, asked, data, options, compute, parts)
        report |= {"task": data.manifest["task"], "interval": "95 % Wilson interval over examples"}
    if "shift" in options.protocol:
        shifts = evaluate_shift(model, data, tokenizer, options, compute)
        results += shifts
        report["shift"] = shift_figures(shifts)
    if options.attention:
        report["attention"] = [row for v in asked for row in evaluate_attention(v, data, options, compute, parts)]
    if options.probe:
        report["probe"] = [row for v in asked for row in evaluate_probe(v, data, block_size, options, compute, parts)]
    return report


def measure(
    model: Model,
    tokens: Split,
    tokenizer: Tokenizer,
    targets: Targets,
    row: dict,
    options: Options,
    compute: Compute,
    keys: KeyTokens | None = None,
) -> dict:
    """The figures of one row: a model, a protocol and a length; with those of key tokens where they are given. Null
    figures and a reason where the loss is not finite, or beyond MOST_NATS."""
    protocol, length, scaling = row["protocol"], row["length"], row["scaling"]
    windows = windows_of(targets, protocol, length, options.stride)
    assert np.array_equal(windows.targets(), targets.positions), "every length scores the same tokens"
    label = f"{protocol} {length}" + (f" {scaling}" if scaling != "none" else "")
    nll, hits = score(model, tokens, windows, compute, label)
    if not nll.mean() < MOST_NATS:
        reason = f"its loss is {nll.mean():.4g} nats a token: the model has diverged"
        return dict.fromkeys(FIGURES + KEY_FIGURES * bool(keys)) | {"reason": reason}
    found = row_figures(nll, hits, tokenizer.token_bytes[targets.ids], targets.document)
    found["targets_sha256"] = targets.sha256
    if keys:
        found |= keys.figures(nll, targets)
    if protocol == "per-position":
        found["curve"] = position_curve(nll, targets.document, length)
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    main()
