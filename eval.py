"""Perplexity of a run, or of a model of the transformers library, at context lengths far beyond its training length.

    python eval.py --run runs/NAME --lengths 256 512 1024 2048
    python eval.py --run runs/NAME --lengths 2048 --protocol same-targets per-position --scaling none yarn --factor 8
    python eval.py --compare runs/rope-seed1 runs/rope-seed2 runs/crope-seed1 runs/crope-seed2 --lengths 1024
    python eval.py --model gpt2 --data data/novels-gpt2 --lengths 512 1024
    torchrun --standalone --nproc_per_node=8 -- eval.py --run …       # the same figures, sooner; the -- keeps --run from torchrun

Whole documents of the validation split that are longer than the longest length, or with --stream the split as one text. The
scored tokens are the same for every length, and their hash stands in the report. Means are token-weighted, sums float64,
intervals a bootstrap over documents. The training length is evaluated too: it is the cropping baseline.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data.shards import Data, Split, open_data
from data.tokenizer import load_tokenizer
from model import GPT
from nanope import REPO, checkpoint
from nanope.config import RunConfig
from nanope.convert import SCALINGS
from nanope.distributed import Ranks, autocast, ranks_of
from nanope.errors import nearest
from nanope.evaluation.probe import KEY, VALUE, filler_tokens, make_trials
from nanope.evaluation.protocols import PROTOCOLS, Windows, choose_targets, windows_of
from nanope.evaluation.statistics import document_interval, paired_difference, position_curve, row_figures
from nanope.hf import Pretrained
from nanope.log import start_wandb
from nanope.ops import by_onednn, chunk_rows, head_dtype, linear, no_autocast, wide

FIGURES = (
    "nats_per_token",
    "perplexity",
    "bits_per_byte",
    "accuracy",
    "tokens",
    "documents",
    "interval",
    "per_document",
)
# Fields of a run that two seeds of one experiment may differ in
NOT_THE_EXPERIMENT = {"out_dir", "seed", "data_seed", "resume", "device", "wandb", "micro_batch_size", "log_interval", "checkpoint_interval", "keep_checkpoints", "eval_interval", "eval_tokens"}  # fmt: skip
SOURCES = [REPO / "model.py", REPO / "eval.py", *sorted((REPO / "schemes").glob("*.py"))]
SOURCES += [REPO / "nanope" / f"{name}.py" for name in ("attention", "convert", "hf", "ops")]
SOURCES += sorted((REPO / "nanope" / "evaluation").glob("*.py"))


# ---- scoring


@torch.no_grad()
def score_head(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL in nats and whether the likeliest token is the target: h (n, C), weight (V, C), targets (n,) → (n,) float32
    (h's dtype if wider) and (n,) bool. Logits exist for a chunk of rows at a time."""
    dtype, exact, rows = head_dtype(h), wide(h.dtype), chunk_rows(weight.size(0), h.device)
    nll, hits = (
        torch.empty(len(h), dtype=exact, device=h.device),
        torch.empty(len(h), dtype=torch.bool, device=h.device),
    )
    with no_autocast(h.device):
        head = weight.to(dtype)
        fast = dtype == h.dtype and by_onednn(h)
        rows = max(1, rows // 2) if fast else rows  # at full speed with half of them, and it holds packed copies
        buffer = (
            None if fast else torch.empty(min(rows, len(h)), len(head), dtype=dtype, device=h.device)
        )  # one for all chunks: new memory is slow
        for i in range(0, len(h), rows):
            part, target = slice(i, i + rows), targets[i : i + rows]
            logits = (
                linear(h[part], head)
                if fast
                else torch.mm(h[part].to(dtype), head.t(), out=buffer[: len(target)]).to(exact)
            )  # (rows, V)
            peak, ours = logits.amax(1), logits.gather(1, target[:, None]).squeeze(1)
            hits[part] = ours == peak
            level = (
                hits[part].nonzero().squeeze(1)
            )  # right, or one of several that are equal: then the first of them counts
            hits[i + level] = logits[level].argmax(1) == target[level]
            nll[part] = logits.sub_(peak[:, None]).exp_().sum(1).log() + (peak - ours)
    return nll, hits


@torch.no_grad()
def score_tokens(
    model: GPT | Pretrained, tokens: np.ndarray, scored: np.ndarray, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """NLL and hits of the last `scored` (B,) tokens of each row of tokens (B, L+1): (Σ scored,) float64 and bool, row by row."""
    device = model.lm_head.weight.device
    tokens = torch.from_numpy(tokens)
    keep = torch.arange(tokens.size(1) - 1) >= tokens.size(1) - 1 - torch.from_numpy(scored)[:, None]  # (B, L)
    with autocast(device, dtype):
        h = model.hidden(tokens[:, :-1].to(device))  # (B, L, C)
        nll, hits = score_head(h[keep.to(device)], model.lm_head.weight, tokens[:, 1:][keep].to(device))
    return nll.cpu().double().numpy(), hits.cpu().numpy()


def score(
    model: GPT | Pretrained,
    split: Split,
    windows: Windows,
    batch_tokens: int,
    dtype: torch.dtype,
    ranks: Ranks,
    progress: tqdm,
) -> tuple[np.ndarray, np.ndarray]:
    """NLL in nats and hits of every scored token, in the order of `windows.targets()`: (tokens,) float64 and bool, on every
    rank. The batches are the same for any number of ranks, and so is each figure."""
    edges = np.concatenate(([0], np.cumsum(windows.scored)))
    figures = np.zeros((2, edges[-1]))
    for number, part in enumerate(windows.batches(batch_tokens)):
        if number % ranks.world == ranks.rank:
            size = int(windows.size[part[0]])
            tokens = np.stack([split.read(s, s + size + 1) for s in windows.start[part].tolist()])  # (B, L+1)
            where = np.concatenate([np.arange(edges[i], edges[i + 1]) for i in part])
            figures[:, where] = score_tokens(model, tokens, windows.scored[part], dtype)
        progress.update(int(windows.size[part].sum()))
    nll, hits = sum_over_ranks(figures, model.lm_head.weight.device, ranks)
    return nll, hits > 0


def sum_over_ranks(values: np.ndarray, device: torch.device, ranks: Ranks) -> np.ndarray:
    return ranks.sum(torch.from_numpy(values).to(device)).cpu().numpy() if ranks.world > 1 else values


class Parts:
    """Finished rows of evaluations, so that one that was interrupted continues: a JSON file a row, in `folder` (None: none are
    kept), named by the hash of everything that the row depends on, this program's source included."""

    def __init__(self, folder: Path | None = None, conditions: dict | None = None, ranks: Ranks | None = None):
        self.folder, self.ranks = folder, ranks or Ranks()
        self.conditions = [conditions, [hashlib.sha256(path.read_bytes()).hexdigest() for path in SOURCES]]

    def get(self, key: dict, make: Callable[[], dict]) -> dict:
        """The row of this key: read, or else made and kept."""
        digest = hashlib.sha256(json.dumps([self.conditions, key], sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{digest[:32]}.json" if self.folder else None
        row = [None]
        if path and self.ranks.main:
            with contextlib.suppress(OSError, ValueError):
                row = [json.loads(path.read_text())]
        if self.ranks.world > 1:  # one rank's file decides for all
            dist.broadcast_object_list(row)
        if row[0] is None:
            row = [make()]
            if path and self.ranks.main:
                write_json(path, row[0])
        return row[0]


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


# ---- the evaluation


def spans_of(data: Data, split: str, stream: bool, longest: int) -> tuple[Split, np.ndarray, np.ndarray]:
    """The split's tokens, all its documents, and what windows must stay inside: the documents of more than `longest`
    tokens, or the whole; (n, 2), start and size of each. `val_long` is the part of val that the manifest lists. ValueError where nothing is long enough."""
    tokens = data.split("val" if split == "val_long" else split)
    documents = tokens.documents()
    spans = np.array([[0, len(tokens)]]) if stream else documents
    if split == "val_long":
        spans = spans[np.isin(spans[:, 0], [d["start"] for d in data.manifest.get("val_long") or []])]
    found = spans[spans[:, 1] >= longest + 1]
    if stream and split == "val_long":
        raise ValueError("--stream takes a whole split, and val_long is a list of documents: take --split val")
    if not len(found):
        what = "the stream" if stream else f"the longest of the {len(spans):,} documents"
        raise ValueError(
            f"length {longest} needs {'a stream' if stream else 'a document'} of {longest + 1:,} tokens, and {what} "
            f"in {data.folder} ({split}) has {spans[:, 1].max(initial=0):,}: take smaller --lengths, or --data with longer documents"
        )
    return tokens, documents, found


def evaluate(
    model: GPT | Pretrained, data: Data, lengths: list[int], protocols: list[str], *, split: str = "val", stride: int | None = None,
    max_targets: int = 50_000, batch_tokens: int = 4096, dtype: torch.dtype = torch.float32, resamples: int = 2000, seed: int = 0,
    stream: bool = False, scalings: list[str] = ("none",), factor: float = 1.0, probe: int = 0, parts: Parts | None = None, ranks: Ranks | None = None,
) -> dict:  # fmt: skip
    """Figures of a model at each length by each protocol: {"results": rows, and the conditions they were taken under}.

    The training length is added to the lengths where it is missing: its row is the cropping baseline, the same tokens with
    no more context than in training, and never with scaled frequencies. A length that the scheme cannot reach, or a scaling
    that it does not have, has null figures and a reason. per-position has one row, at the longest length the scheme can do. With
    `probe` trials, "probe" holds the recall at 1, 2, 4 and 8 times the training length. ValueError for lengths below 1,
    a stride beyond the shortest, or lengths beyond any document.
    """
    ranks, parts = ranks or Ranks(), parts or Parts()
    block_size = model.config.block_size
    lengths = sorted({*lengths, block_size} if block_size < max(lengths) else set(lengths))
    longest = lengths[-1]
    if lengths[0] < 1:
        raise ValueError(f"lengths must be at least 1, not {lengths[0]}")
    stride = stride or max(1, lengths[0] // 2)
    if stride > lengths[0]:
        raise ValueError(
            f"stride {stride} exceeds the shortest length {lengths[0]}: its tokens would have no context in the window"
        )
    tokenizer = load_tokenizer(data.manifest["tokenizer"]["name"])
    if tokenizer.sha256 != data.tokenizer_hash:
        raise ValueError(
            f"{data.folder} was made with another {tokenizer.name} tokenizer than this version has; prepare it again"
        )
    if model.lm_head.weight.size(0) < data.vocab_size:
        raise ValueError(
            f"the model has a vocabulary of {model.lm_head.weight.size(0)}, and {data.folder} one of {data.vocab_size}"
        )
    tokens, documents, spans = spans_of(data, split, stream, longest)
    variants = scaled_models(model, list(scalings), factor)
    results, hashes = [], {}
    for protocol in dict.fromkeys(protocols):
        intended = choose_targets(tokens, documents, spans, protocol, longest, stride, max_targets)
        hashes[protocol] = intended.sha256
        for scaling, (scaled, reason) in variants.items():
            able, reasons = able_lengths(scaled or model, lengths, reason)
            if scaling not in scalings:  # the unscaled model is the cropping baseline, and that alone
                able, reasons = [n for n in able if n == block_size and protocol != "per-position"], {}
            if protocol == "per-position":  # by causality, shorter lengths have the same curve up to their end
                able, reasons = able[-1:], {n: r for n, r in reasons.items() if n == longest}
            for length in sorted([*able, *reasons]):
                row = {
                    "length": length,
                    "protocol": protocol,
                    "scaling": scaling,
                    "factor": factor if scaling != "none" else 1.0,
                }
                row["cropping_baseline"] = length == block_size and scaling == "none"
                if length in reasons:
                    results.append(row | dict.fromkeys(FIGURES) | {"reason": reasons[length]})
                    continue
                targets = intended
                if protocol == "per-position" and length < longest:
                    targets = choose_targets(tokens, documents, spans, protocol, longest, stride, max_targets, length)
                windows = windows_of(targets, protocol, length, stride)
                assert np.array_equal(windows.targets(), targets.positions), "every length scores the same tokens"

                def figures():  # called at once, by parts.get
                    label = f"{protocol} {length}" + (f" {scaling}" if scaling != "none" else "")
                    with tqdm(
                        total=int(windows.size.sum()),
                        desc=label,
                        unit="token",
                        unit_scale=True,
                        disable=None if ranks.main else True,
                    ) as bar:
                        nll, hits = score(scaled, tokens, windows, batch_tokens, dtype, ranks, bar)
                    found = row_figures(
                        nll, hits, tokenizer.token_bytes[targets.ids], targets.document, resamples, seed
                    )
                    curve = (
                        {"curve": position_curve(nll, targets.document, length, resamples, seed)}
                        if protocol == "per-position"
                        else {}
                    )
                    return found | {"targets_sha256": targets.sha256} | curve

                key = row | {"targets": targets.sha256, "stride": stride, "resamples": resamples, "seed": seed}
                results.append(row | parts.get(key, figures))
    report = {
        "results": results,
        "split": split,
        "stream": stream,
        "stride": stride,
        "documents": len(documents) if stream else len(spans),
        "max_targets": max_targets,
        "targets_sha256": hashes,
        "interval": f"95 % percentile bootstrap over documents, {resamples} resamples, nats per token",
        "resamples": resamples,
        "seed": seed,
        "block_size": block_size,
        "data_hash": data.hash,
        "tokenizer": data.manifest["tokenizer"],
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(model.lm_head.weight.device),
        "backend": backend(model),
        "batch_tokens": batch_tokens,
        "ranks": ranks.world,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if probe:
        report["probe"] = [
            row
            for scaling, (scaled, reason) in variants.items()
            if scaling in scalings
            for row in evaluate_probe(scaled or model, reason, data, split, probe, seed, resamples, batch_tokens, dtype, parts, ranks, {"scaling": scaling, "factor": factor if scaling != "none" else 1.0})
        ]  # fmt: skip
    return report


def scaled_models(model: GPT | Pretrained, scalings: list[str], factor: float) -> dict[str, tuple]:
    """Scaling → (model, None), or (None, the reason why there is none); the unscaled model is always among them."""
    if not 1 <= factor < float("inf"):
        raise ValueError(f"factor must be at least 1, not {factor}: it is the new context over the training length")
    model.eval()
    found = {"none": (model, None)}
    for scaling in scalings:
        if scaling != "none":
            try:
                found[scaling] = (model.scaled(scaling, factor), None)
            except ValueError as error:
                found[scaling] = (None, f"no {scaling} scaling: {error}")
    return found


def able_lengths(model: GPT | Pretrained, lengths: list[int], reason: str | None) -> tuple[list[int], dict[int, str]]:
    """The lengths that the model can do, and the reasons why not the others; `reason` is one for all."""
    able, reasons = [], {}
    for length in lengths:
        try:
            if reason:
                raise ValueError(reason)
            model.check_length(length)
            able.append(length)
        except ValueError as error:
            reasons[length] = str(error)
    return able, reasons


def backend(model: GPT | Pretrained) -> str:
    if isinstance(model, Pretrained):
        return "transformers, scaled_dot_product_attention"
    biased = any(block.attn.pos.claims("bias") for block in model.transformer["h"])
    return "flex_attention" if biased and model.lm_head.weight.is_cuda else "scaled_dot_product_attention"


def evaluate_probe(
    model, reason, data, split, count, seed, resamples, batch_tokens, dtype, parts, ranks, variant
) -> list[dict]:
    """Rows of the retrieval probe (probe.py) at 1, 2, 4 and 8 times the training length: recall, the NLL of the value
    without less with its key in context, in nats per token, with its 95 % bootstrap interval over trials."""
    tokens, _, spans = spans_of(data, split, False, 0)
    rows = []
    able, reasons = able_lengths(model, [n * model.config.block_size for n in (1, 2, 4, 8)], reason)
    reasons |= {
        n: f"two times {KEY} + {VALUE} tokens do not fit into a length of {n}" for n in able if filler_tokens(n) < 1
    }
    for length in [n for n in able if n not in reasons][
        ::-1
    ]:  # the trials are those of the longest length that has documents, the same for all
        try:
            trials = make_trials(tokens, spans, length, count, seed)
            break
        except ValueError as error:
            reasons[length] = str(error)
    for length in sorted({*able, *reasons}):
        row = {"length": length, **variant}
        if length in reasons:
            rows.append(
                row
                | dict.fromkeys(("recall", "interval", "with_key", "without_key", "accuracy", "trials"))
                | {"reason": reasons[length]}
            )
            continue

        def figures():  # called at once, by parts.get
            size = max(1, batch_tokens // length)
            nll, hits = (
                np.zeros((2, count)),
                np.zeros((2, count)),
            )  # with the key, without; mean over the value's tokens
            jobs = [(k, i) for k in (0, 1) for i in range(0, count, size)]
            for number, (k, i) in enumerate(
                tqdm(jobs, desc=f"probe {length}", unit="batch", disable=None if ranks.main else True)
            ):
                if number % ranks.world == ranks.rank:
                    batch = np.stack([t.tokens(length, k == 0) for t in trials[i : i + size]])
                    found = score_tokens(model, batch, np.full(len(batch), VALUE), dtype)
                    nll[k, i : i + size], hits[k, i : i + size] = (f.reshape(-1, VALUE).mean(1) for f in found)
            nll, hits = sum_over_ranks(np.stack((nll, hits)), model.lm_head.weight.device, ranks)
            recall = nll[1] - nll[0]
            interval = document_interval(recall, np.ones(count), resamples, seed)
            means = {
                "with_key": float(nll[0].mean()),
                "without_key": float(nll[1].mean()),
                "accuracy": float(hits[0].mean()),
            }
            return {
                "recall": float(recall.mean()),
                "interval": interval,
                **means,
                "trials": count,
                "key_tokens": KEY,
                "value_tokens": VALUE,
            }

        rows.append(
            row
            | parts.get(
                row
                | {
                    "probe": count,
                    "seed": seed,
                    "resamples": resamples,
                    "split": split,
                    "longest": int(len(trials[0].filler)),
                },
                figures,
            )
        )
    return rows


# ---- comparing runs


def arms_of(configs: list[dict]) -> list[str]:
    """The name of each run's experiment: runs whose configs differ in nothing but seeds and housekeeping share one. It is
    the scheme where that tells the experiments apart, else the fields that differ. ValueError unless there are two or more."""
    keys = [{k: v for k, v in c.items() if k not in NOT_THE_EXPERIMENT} for c in configs]
    distinct = [k for i, k in enumerate(keys) if k not in keys[:i]]
    if len(distinct) < 2:
        raise ValueError(
            "the runs differ in their seeds at most: they are one experiment, and there is nothing to compare"
        )
    fields = [f for f in distinct[0] if any(d.get(f) != distinct[0][f] for d in distinct)]
    if len({k["pos"] for k in distinct}) == len(distinct):
        fields = ["pos"]
    names = [" ".join(f"{k[f]}" if f == "pos" else f"{f}={k[f]}" for f in fields) for k in keys]
    seeds = [(name, c["seed"], c["data_seed"]) for name, c in zip(names, configs)]
    if len(set(seeds)) < len(seeds):
        raise ValueError("two of the runs have the same config and the same seeds: name each run once")
    return names


def compare(reports: list[dict]) -> list[dict]:
    """Each experiment against that of the first report, row by row: mean difference in nats per token on the same tokens,
    negative where it is better than the first, with interval and p-value (intervals.paired_difference)."""
    names = arms_of([r["config"] for r in reports])
    arms = {
        name: {(r["config"]["seed"], r["config"]["data_seed"]): r for r, n in zip(reports, names) if n == name}
        for name in names
    }
    first, *others = arms
    paired = {name: arms[name].keys() == arms[first].keys() for name in others}
    rows = []
    for name in others:
        ours, theirs = ([arms[n][seed] for seed in sorted(arms[n])] for n in (first, name))
        for key in [(r["protocol"], r["length"], r["scaling"]) for r in ours[0]["results"]]:
            a, b = (
                [
                    next((r for r in report["results"] if (r["protocol"], r["length"], r["scaling"]) == key), None)
                    for report in arm
                ]
                for arm in (ours, theirs)
            )
            row = dict(zip(("protocol", "length", "scaling"), key)) | {"first": first, "second": name}
            if not all(r and r["nats_per_token"] is not None for r in a + b):
                rows.append(
                    row
                    | {
                        "difference": None,
                        "reason": next(
                            (r["reason"] for r in a + b if r and r.get("reason")), "not there for every run"
                        ),
                    }
                )
                continue
            if len({r["targets_sha256"] for r in a + b}) > 1:
                raise ValueError(
                    f"the runs' evaluations by {key[0]} at length {key[1]} scored different tokens: evaluate all on the same data"
                )
            sums = [np.array([r["per_document"]["nll"] for r in arm]) for arm in (a, b)]
            rows.append(row | paired_difference(*sums, np.array(a[0]["per_document"]["tokens"]), paired[name]))
    return rows


def comparison_table(rows: list[dict]) -> str:
    """The comparison as a Markdown table, and what its intervals can tell."""
    lines = [
        "| protocol | length | scaling | compared | difference, nats/token | 95 % interval | p | seeds |",
        "|---|--:|---|---|--:|:-:|--:|:-:|",
    ]
    notes = []
    for r in rows:
        head = f"| {r['protocol']} | {r['length']} | {r['scaling']} | {r['second']} less {r['first']} |"
        if r["difference"] is None:
            lines.append(f"{head} n/a | | | |")
            notes.append(f"n/a at {r['length']}: {r['reason']}")
            continue
        interval = (
            f"{r['interval'][0]:+.4f} … {r['interval'][1]:+.4f} | {r['p_value']:.2g}"
            if r["interval"]
            else "one document, one seed | "
        )
        lines.append(
            f"{head} {r['difference']:+.4f} | {interval} | {r['seeds'][0]}, {r['seeds'][1]}{', paired' if r['paired_seeds'] else ''} |"
        )
    if any(r.get("levels") == ["documents"] for r in rows):
        notes.append(
            "One seed in an arm: interval and p-value are over documents, for these checkpoints. They say nothing about other seeds."
        )
    if any("seeds" in r.get("levels", ()) for r in rows):
        notes.append("Intervals and p-values are over seeds and documents.")
    return "\n".join([*lines, "", *dict.fromkeys(notes)])


# ---- tables and reports


def table(report: dict) -> str:
    """The report's rows as a Markdown table."""
    lines = [
        "| protocol | length | nats/token | 95 % interval | perplexity | bits/byte | top-1 | tokens |",
        "|---|--:|--:|:-:|--:|--:|--:|--:|",
    ]
    reasons = []
    for r in report["results"]:
        scaling = f" {r['scaling']} ×{r['factor']:g}" if r["scaling"] != "none" else ""
        length = f"{r['length']}{scaling}{' (cropping baseline)' if r['cropping_baseline'] else ''}"
        if r["nats_per_token"] is None:
            lines.append(f"| {r['protocol']} | {length} | n/a | | | | | |")
            reasons.append(f"n/a at {r['length']}{scaling}: {r['reason']}")
            continue
        interval = "one document" if r["interval"] is None else f"{r['interval'][0]:.4f} … {r['interval'][1]:.4f}"
        figures = f"{r['nats_per_token']:.4f} | {interval} | {r['perplexity']:.3f} | {r['bits_per_byte']:.4f} | {r['accuracy']:.1%} | {r['tokens']:,}"
        lines.append(f"| {r['protocol']} | {length} | {figures} |")
    if report.get("probe"):
        lines += [
            "",
            "| probe length | recall, nats/token | 95 % interval | NLL with key | without | top-1 with key |",
            "|--:|--:|:-:|--:|--:|--:|",
        ]
        for r in report["probe"]:
            length = f"{r['length']}" + (f" {r['scaling']} ×{r['factor']:g}" if r["scaling"] != "none" else "")
            if r["recall"] is None:
                lines.append(f"| {length} | n/a | | | | |")
                reasons.append(f"probe n/a at {length}: {r['reason']}")
            else:
                interval = f"{r['interval'][0]:.4f} … {r['interval'][1]:.4f}" if r["interval"] else "one trial"
                lines.append(
                    f"| {length} | {r['recall']:.4f} | {interval} | {r['with_key']:.4f} | {r['without_key']:.4f} | {r['accuracy']:.1%} |"
                )
    return "\n".join(lines + reasons)


def flat_figures(report: dict) -> dict[str, float]:
    """The report's figures by name, for wandb: eval/PROTOCOL/LENGTH[/SCALING]/FIGURE."""
    found = {}
    for r in [*report["results"], *({"protocol": "probe", **p} for p in report.get("probe", ()))]:
        name = f"eval/{r['protocol']}/{r['length']}" + (f"/{r['scaling']}" if r["scaling"] != "none" else "")
        figures = ("nats_per_token", "perplexity", "bits_per_byte", "accuracy", "recall")
        found |= {f"{name}/{f}": r[f] for f in figures if r.get(f) is not None}
    return found


def log_to_wandb(config: dict, run: Path, figures: dict[str, float]) -> None:
    """Add the figures to the summary of the wandb run that training made, where it made one."""
    fields = RunConfig.__dataclass_fields__
    if config.get("wandb", "off") == "off" or not run.is_dir():
        return
    try:
        logged = start_wandb(RunConfig(**{k: v for k, v in config.items() if k in fields}), run, resumed=True)
        logged.summary.update(figures)
        logged.finish()
    except Exception as error:  # the report is written; whatever wandb has is no reason to fail
        print(f"warning: the figures are not in wandb: {str(error).partition(chr(10))[0]}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse whose errors name the nearest valid option."""

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            message += nearest(message.split()[2], self._option_string_actions)
        super().error(message)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="eval.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="protocols:\n" + "\n".join(f"  {name}: {what}" for name, what in PROTOCOLS.items()),
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="a run's folder, or a checkpoint file")
    what.add_argument(
        "--compare",
        nargs="+",
        metavar="RUN",
        help="two or more runs: paired differences to the first's experiment; seeds of one experiment are found by their configs",
    )
    what.add_argument(
        "--model",
        help="a transformers causal LM: a local folder or a hub name such as gpt2; needs --data made with its tokenizer",
    )
    parser.add_argument("--checkpoint", default="last", help="last, best, or a step number (default: last)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", required=True, help="context lengths in tokens; the training length is added"
    )
    parser.add_argument(
        "--protocol",
        nargs="+",
        choices=PROTOCOLS,
        default=["same-targets"],
        help="one or more, see below (default: same-targets)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="S: targets a block of same-targets, tokens between windows of sliding (default: half the shortest length)",
    )
    parser.add_argument("--data", help="data folder (default: the run's own)")
    parser.add_argument(
        "--split", default="val", help="split of the data folder, or val_long, the long documents of val (default: val)"
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="the split as one text, documents joined by end-of-text tokens, as most papers do",
    )
    parser.add_argument(
        "--max_targets",
        type=int,
        default=50_000,
        help="scored tokens, spread evenly over all; 0 for all (default: 50,000)",
    )
    parser.add_argument(
        "--scaling",
        nargs="+",
        choices=("none", *SCALINGS),
        default=["none"],
        help="frequency scaling, one or more (rope, crope, comrope; default: none)",
    )
    parser.add_argument(
        "--factor", type=float, help="of --scaling: the new context over the training length, the same for every length"
    )
    parser.add_argument(
        "--probe",
        type=int,
        default=0,
        metavar="TRIALS",
        help="trials of the retrieval probe at 1, 2, 4, 8 times the training length (default: 0, none; 200 is a good number)",
    )
    parser.add_argument(
        "--batch_tokens", type=int, help="input tokens a forward pass (default: 4,096 on a CPU, else 65,536)"
    )
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap resamples of documents (default: 2,000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap and of the probe (default: 0)")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="autocast dtype (default: float32)",
    )
    parser.add_argument(
        "--json",
        help="where to write the report, and its table as .md (default: in RUN/eval/, or nowhere for a file, --model or --compare)",
    )
    args = parser.parse_args(arguments)
    for name, lowest in (
        ("stride", 1),
        ("max_targets", 0),
        ("batch_tokens", 1),
        ("resamples", 1000),
        ("seed", 0),
        ("probe", 0),
        ("factor", 1),
    ):
        value = getattr(args, name)
        if value is not None and not value >= lowest:
            parser.error(f"--{name} must be at least {lowest}, not {value}")
    if (args.factor is None) != (args.scaling == ["none"]):
        parser.error(
            "--scaling needs a --factor, for example 8"
            if args.factor is None
            else "--factor is for --scaling pi, ntk or yarn"
        )
    if args.model and not args.data:
        parser.error("--model needs --data, a folder prepared with the model's tokenizer")
    if args.compare and len(args.compare) < 2:
        parser.error("--compare needs two runs or more")
    args.parser = parser
    return args


def report_name(args: argparse.Namespace, step: int) -> str:
    """The name of a report, which tells what in the command was not the default."""
    parts = [f"step_{step}", "+".join(args.protocol), "-".join(map(str, args.lengths))]
    if args.scaling != ["none"]:
        parts.append(f"{'+'.join(args.scaling)}-{args.factor:g}")
    for name in ("stride", "data", "split", "stream", "max_targets", "probe", "resamples", "seed", "dtype"):
        value = getattr(args, name)
        if value != args.parser.get_default(name):
            parts.append(name if value is True else f"{name}-{Path(value).name if name == 'data' else value}")
    return "_".join(parts) + ".json"


def options(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> dict:
    return {
        **{
            name: getattr(args, name)
            for name in ("split", "stride", "max_targets", "resamples", "seed", "stream", "probe")
        },
        **{"scalings": args.scaling, "factor": args.factor or 1.0, "dtype": getattr(torch, args.dtype), "ranks": ranks},
        "batch_tokens": args.batch_tokens or (4096 if device.type == "cpu" else 65536),
    }


def finish(report: dict, output: Path | None, args: argparse.Namespace, ranks: Ranks) -> dict:
    """Add the command to a report and write it, with its table beside it."""
    report["command"] = {k: v for k, v in vars(args).items() if k != "parser"}
    if output and ranks.main:
        write_json(output, report)
        checkpoint.write_atomically(output.with_suffix(".md"), lambda file: file.write((table(report) + "\n").encode()))
    return report


def evaluate_run(
    run: str, args: argparse.Namespace, lengths: list[int], ranks: Ranks, device: torch.device, output: str | None
) -> dict:
    """Evaluate one run of train.py, reusing what is finished, and write its report."""
    path = checkpoint.find(run, args.checkpoint)
    state = checkpoint.load(path)
    data = open_data(args.data or state["config"]["data_dir"])
    if state["tokenizer"]["sha256"] != data.tokenizer_hash:
        theirs, ours = data.manifest["tokenizer"]["name"], state["tokenizer"]["name"]
        raise ValueError(
            f"{run} was trained with tokenizer {ours}; {data.folder} has another, {theirs}: their perplexities do not compare"
        )
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = (
        Path(output)
        if output
        else Path(run) / "eval" / report_name(args, state["step"])
        if Path(run).is_dir()
        else None
    )
    conditions = {
        "checkpoint": digest,
        "data": data.hash,
        "dtype": args.dtype,
        "device": device.type,
        "torch": torch.__version__,
    }
    parts = Parts(target.parent / ".parts" if target else None, conditions, ranks)
    model = checkpoint.build_model(state).to(device)
    report = evaluate(model, data, lengths, args.protocol, parts=parts, **options(args, ranks, device))
    report |= {"run": str(run), "step": state["step"], "checkpoint_sha256": digest, "data_dir": str(data.folder)}
    report |= {
        "pos": model.config.pos,
        "pos_options": model.config.pos_options,
        "parameters": model.parameter_count(),
        "config": state["config"],
    }
    finish(report, target, args, ranks)
    if ranks.main:
        log_to_wandb(state["config"], Path(run), flat_figures(report))
    return report


def evaluate_model(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> dict:
    """Evaluate a model of the transformers library."""
    data = open_data(args.data)
    model = Pretrained(args.model).to(device)
    model.check_tokenizer(data, "val" if args.split == "val_long" else args.split)
    digest = model.sha256()
    target = Path(args.json) if args.json else None
    conditions = {
        "weights": digest,
        "data": data.hash,
        "dtype": args.dtype,
        "device": device.type,
        "torch": torch.__version__,
    }
    parts = Parts(target.parent / ".parts" if target else None, conditions, ranks)
    report = evaluate(model, data, args.lengths, args.protocol, parts=parts, **options(args, ranks, device))
    report |= {
        "model": args.model,
        "weights_sha256": digest,
        "data_dir": str(data.folder),
        "pos": model.config.pos,
        "parameters": model.parameter_count(),
    }
    return finish(report, target, args, ranks)


def compare_runs(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> str:
    """Evaluate every run, reusing what is finished, and compare them."""
    configs = [checkpoint.load(checkpoint.find(run, args.checkpoint))["config"] for run in args.compare]
    arms_of(configs)
    lengths = sorted({*args.lengths, *(c["block_size"] for c in configs if c["block_size"] < max(args.lengths))})
    reports = [evaluate_run(run, args, lengths, ranks, device, None) for run in args.compare]
    rows = compare(reports)
    if args.json and ranks.main:
        keep = (
            "run",
            "step",
            "checkpoint_sha256",
            "data_hash",
            "targets_sha256",
            "stride",
            "split",
            "stream",
            "dtype",
            "device",
            "torch",
        )
        runs = [{k: r[k] for k in keep} for r in reports]
        write_json(
            Path(args.json),
            {"comparison": rows, "runs": runs, "command": {k: v for k, v in vars(args).items() if k != "parser"}},
        )
    return comparison_table(rows)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    main_rank = os.environ.get("RANK", "0") == "0"
    try:
        with ranks_of(args.device) as (ranks, device):
            torch.set_float32_matmul_precision("highest")  # evaluation in float32 is float32
            if args.compare:
                text = compare_runs(args, ranks, device)
            else:
                text = table(
                    evaluate_model(args, ranks, device)
                    if args.model
                    else evaluate_run(args.run, args, args.lengths, ranks, device, args.json)
                )
        if main_rank:
            print(text)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}" if main_rank else 1)
    except KeyboardInterrupt:
        print(
            "\ninterrupted: what was finished is kept beside the report, and the same command goes on from there"
            if main_rank
            else "",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    main()
