"""Perplexity of a run at context lengths far beyond its training length.

    python eval.py --run runs/NAME --lengths 256 512 1024 2048

Whole documents of the validation split that are longer than the longest length; the scored tokens are the same for every
length, and their hash stands in the report. Means are token-weighted, sums float64, intervals a bootstrap over documents.
"""

import argparse
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from tqdm import tqdm

import checkpoint
from data.shards import Data, Split, open_data
from data.tokenizer import load_tokenizer
from model import GPT, SCHEMES, Attention, nearest
from train import autocast, pick_device

PROTOCOLS = {
    "same-targets": "the same target tokens for every length L, each with L-S+1 … L tokens of context (S: --stride)",
    "nonoverlapping": "consecutive windows of L tokens from a document's start, every token scored",
}


@dataclass
class Windows:
    """Windows of one protocol at one length: inputs start … start+size-1 of the split, of which the last `scored`
    positions are scored, each predicting the token after it. All arrays (n,) int64."""

    document: np.ndarray
    start: np.ndarray
    size: np.ndarray
    scored: np.ndarray

    def targets(self) -> np.ndarray:
        """Positions in the split of all scored tokens, in order."""
        ends = self.start + self.size
        return np.concatenate([np.arange(e - s + 1, e + 1) for e, s in zip(ends, self.scored)])


def units(documents: np.ndarray, longest: int, stride: int, protocol: str, max_targets: int) -> np.ndarray:
    """The scored blocks, the same for every length: (n, 3) of document, first and last target position.

    same-targets: blocks of `stride` targets, the first of a document ending at token index `longest`. nonoverlapping:
    blocks of `longest` targets from a document's second token on, the last one short. Beyond max_targets, blocks spread
    evenly over all are kept.
    """
    found = []
    for d, (start, length) in enumerate(documents):
        if protocol == "same-targets":
            lasts = np.arange(longest, length, stride)
            firsts = lasts - stride + 1
        else:
            firsts = np.arange(1, length, longest)
            lasts = np.minimum(firsts + longest - 1, length - 1)
        found.append(np.stack((np.full(len(firsts), d), start + firsts, start + lasts), 1))
    blocks = np.concatenate(found)
    count = max(1, round(len(blocks) * max_targets / (blocks[:, 2] - blocks[:, 1] + 1).sum())) if max_targets else len(blocks)
    return blocks[np.arange(count) * len(blocks) // count] if count < len(blocks) else blocks


def windows_of(blocks: np.ndarray, length: int, protocol: str) -> Windows:
    """The windows of one length that score the targets of `blocks`."""
    document, first, last = blocks.T
    if protocol == "same-targets":  # one window a block, which ends before the block's last target
        return Windows(document, last - length, np.full(len(blocks), length), last - first + 1)
    parts = [np.arange(f, e + 1, length) for f, e in zip(first, last)]  # each block cut into windows of `length`
    counts = [len(p) for p in parts]
    firsts = np.concatenate(parts)
    size = np.minimum(firsts + length, np.repeat(last, counts) + 1) - firsts
    return Windows(np.repeat(document, counts), firsts - 1, size, size)


@torch.no_grad()
def score(model: GPT, split: Split, windows: Windows, batch_tokens: int, dtype: torch.dtype, progress: tqdm) -> np.ndarray:
    """NLL in nats of every scored token, in the order of `windows.targets()`: (tokens,) float64."""
    device = next(model.parameters()).device
    edges = np.concatenate(([0], np.cumsum(windows.scored)))
    nll = np.empty(edges[-1])
    for size in np.unique(windows.size):  # only a document's last windows are short
        members = np.flatnonzero(windows.size == size)
        for part in np.split(members, range(0, len(members), max(1, batch_tokens // size))[1:]):
            tokens = torch.from_numpy(np.stack([split.read(s, s + size + 1) for s in windows.start[part].tolist()]))  # (B, L+1)
            targets = tokens[:, 1:].clone()
            for row, scored in enumerate(windows.scored[part]):
                targets[row, : size - scored] = -1
            with autocast(device, dtype):
                _, loss = model(tokens[:, :-1].to(device), targets.to(device), reduction="none")
            loss = loss.cpu().double().numpy()
            for row, i in enumerate(part):
                nll[edges[i] : edges[i + 1]] = loss[row, size - windows.scored[i] :]
            progress.update(len(part) * int(size))
    return nll


def document_interval(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> list[float] | None:
    """95 % percentile bootstrap of Σ sums / Σ counts over documents, (n,) each; None for a single document."""
    if len(sums) < 2:
        return None
    drawn = scipy.stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True, vectorized=True, n_resamples=resamples, confidence_level=0.95, method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    return [float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)]


def statistics(nll: np.ndarray, n_bytes: np.ndarray, document: np.ndarray, resamples: int, seed: int) -> dict:
    """Figures of one row from the scored tokens: nll (n,) nats, n_bytes (n,) bytes of text, document (n,) indices."""
    mean = nll.sum() / len(nll)
    sums, counts = np.bincount(document, nll), np.bincount(document)
    sums, counts = sums[counts > 0], counts[counts > 0]
    return {
        "nats_per_token": float(mean),
        "perplexity": float(np.exp(mean)),
        "bits_per_byte": float(nll.sum() / math.log(2) / n_bytes.sum()),
        "tokens": len(nll),
        "documents": len(sums),
        "interval": document_interval(sums, counts, resamples, seed),
        "per_document": {"document": np.flatnonzero(np.bincount(document)).tolist(), "nll": sums.tolist(), "tokens": counts.tolist()},
    }


def evaluate(
    model: GPT, data: Data, lengths: list[int], protocols: list[str], *, split: str = "val", stride: int | None = None,
    max_targets: int = 50_000, batch_tokens: int = 8192, dtype: torch.dtype = torch.float32, resamples: int = 2000, seed: int = 0,
) -> dict:  # fmt: skip
    """Figures of a model at each length by each protocol: {"results": rows, and the conditions they were taken under}.

    The training length is added to the lengths where it is missing: its row is the cropping baseline, the same tokens with
    no more context than in training. A length that the scheme cannot reach has null figures and a reason. ValueError for
    lengths below 1 or longer than any document.
    """
    block_size = model.config.block_size
    lengths = sorted({*lengths, block_size} if block_size < max(lengths) else set(lengths))
    if lengths[0] < 1:
        raise ValueError(f"lengths must be at least 1, not {lengths[0]}")
    stride = stride or max(1, lengths[0] // 2)
    if stride > lengths[0]:
        raise ValueError(f"stride {stride} exceeds the shortest length {lengths[0]}: its tokens would have no context in the window")
    stream, tokenizer = data.split(split), load_tokenizer(data.manifest["tokenizer"]["name"])
    if tokenizer.sha256 != data.tokenizer_hash:
        raise ValueError(f"{data.folder} was made with another {tokenizer.name} tokenizer than this version has; prepare it again")
    everything = stream.documents()
    documents = everything[everything[:, 1] >= lengths[-1] + 1]
    if not len(documents):
        raise ValueError(
            f"length {lengths[-1]} needs a document of {lengths[-1] + 1:,} tokens, and the longest of the {len(everything):,} documents "
            f"in {data.folder} ({split}) has {everything[:, 1].max(initial=0):,}: take smaller --lengths, or --data with longer documents"
        )
    results, hashes = [], {}
    model.eval()
    for protocol in protocols:
        blocks = units(documents, lengths[-1], stride, protocol, max_targets)
        plans, reasons = {}, {}
        for length in lengths:
            try:
                model.check_length(length)
                plans[length] = windows_of(blocks, length, protocol)
            except ValueError as error:
                reasons[length] = str(error)
        positions = np.concatenate([np.arange(first, last + 1) for _, first, last in blocks])
        ids = np.concatenate([stream.read(first, last + 1) for _, first, last in blocks.tolist()])
        hashes[protocol] = hashlib.sha256(positions.tobytes() + ids.tobytes()).hexdigest()
        document = np.repeat(blocks[:, 0], blocks[:, 2] - blocks[:, 1] + 1)
        with tqdm(total=sum(int(p.size.sum()) for p in plans.values()), desc=protocol, unit="token", unit_scale=True, disable=None) as progress:
            for length in lengths:
                row = {"length": length, "protocol": protocol, "cropping_baseline": length == block_size}
                if length in reasons:
                    figures = dict.fromkeys(("nats_per_token", "perplexity", "bits_per_byte", "tokens", "documents", "interval", "per_document"))
                    results.append(row | figures | {"reason": reasons[length]})
                    continue
                assert np.array_equal(plans[length].targets(), positions), "every length scores the same tokens"
                nll = score(model, stream, plans[length], batch_tokens, dtype, progress)
                results.append(row | statistics(nll, tokenizer.token_bytes[ids], document, resamples, seed))
    device, biased = next(model.parameters()).device, SCHEMES[model.config.pos].score_bias is not Attention.score_bias
    return {
        "results": results,
        "split": split,
        "stride": stride,
        "documents": len(documents),
        "targets_sha256": hashes,
        "interval": f"95 % percentile bootstrap over documents, {resamples} resamples, nats per token",
        "seed": seed,
        "block_size": block_size,
        "data_hash": data.hash,
        "tokenizer": data.manifest["tokenizer"],
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "backend": "flex_attention" if biased and device.type == "cuda" else "scaled_dot_product_attention",
        "torch": torch.__version__,
    }


def table(report: dict) -> str:
    """The report's rows as a Markdown table."""
    lines = ["| protocol | length | nats/token | 95 % interval | perplexity | bits/byte | tokens |", "|---|--:|--:|:-:|--:|--:|--:|"]
    reasons = []
    for r in report["results"]:
        length = f"{r['length']}{' (cropping baseline)' if r['cropping_baseline'] else ''}"
        if r["nats_per_token"] is None:
            lines.append(f"| {r['protocol']} | {length} | n/a | | | | |")
            reasons.append(f"n/a at {r['length']}: {r['reason']}")
            continue
        interval = "one document" if r["interval"] is None else f"{r['interval'][0]:.4f} … {r['interval'][1]:.4f}"
        figures = f"{r['nats_per_token']:.4f} | {interval} | {r['perplexity']:.3f} | {r['bits_per_byte']:.4f} | {r['tokens']:,}"
        lines.append(f"| {r['protocol']} | {length} | {figures} |")
    return "\n".join(lines + reasons)


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
    parser.add_argument("--run", required=True, help="a run's folder, or a checkpoint file")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a step number (default: last)")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="context lengths in tokens; the training length is added")
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, default=["same-targets"], help="one or more, see below (default: same-targets)")
    parser.add_argument("--stride", type=int, help="S, targets a block for same-targets (default: half the shortest length)")
    parser.add_argument("--data", help="data folder (default: the run's own)")
    parser.add_argument("--split", default="val", help="split of the data folder (default: val)")
    parser.add_argument("--max_targets", type=int, default=50_000, help="scored tokens, spread evenly over all; 0 for all (default: 50,000)")
    parser.add_argument("--batch_tokens", type=int, help="input tokens a forward pass (default: 8,192 on a CPU, else 65,536)")
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap resamples of documents (default: 2,000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="autocast dtype (default: float32)")
    parser.add_argument("--json", help="where to write the report (default: in RUN/eval/, or nowhere for a file)")
    args = parser.parse_args(arguments)
    for name, lowest in (("stride", 1), ("max_targets", 0), ("batch_tokens", 1), ("resamples", 1000), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < lowest:
            parser.error(f"--{name} must be at least {lowest}, not {value}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        path = checkpoint.find(args.run, args.checkpoint)
        state = checkpoint.load(path)
        data = open_data(args.data or state["config"]["data_dir"])
        if state["tokenizer"]["sha256"] != data.tokenizer_hash:
            theirs, ours = data.manifest["tokenizer"]["name"], state["tokenizer"]["name"]
            raise ValueError(f"{args.run} was trained with tokenizer {ours}; {data.folder} has another, {theirs}: their perplexities do not compare")
        device = pick_device(args.device)
        model = checkpoint.build_model(state).to(device)
        report = evaluate(
            model, data, args.lengths, args.protocol, split=args.split, stride=args.stride, max_targets=args.max_targets,
            batch_tokens=args.batch_tokens or (8192 if device.type == "cpu" else 65536), dtype=getattr(torch, args.dtype),
            resamples=args.resamples, seed=args.seed,
        )  # fmt: skip
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        report |= {"run": str(args.run), "step": state["step"], "checkpoint_sha256": digest, "data_dir": str(data.folder)}
        report |= {"pos": model.config.pos, "pos_options": model.config.pos_options, "parameters": model.parameter_count()}
        name = f"step_{state['step']}_{'+'.join(args.protocol)}_{'-'.join(map(str, args.lengths))}.json"
        output = Path(args.json) if args.json else Path(args.run) / "eval" / name if Path(args.run).is_dir() else None
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomically(output, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))
        print(table(report))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
