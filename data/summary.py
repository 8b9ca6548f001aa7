"""Describes a finished data folder: its summary in a few lines, and the figure of document lengths."""

import io

import numpy as np

from data.shard_writer import OCTAVE
from data.shards import Data


def quantile(lengths: dict[str, int], share: float) -> int:
    """The length in tokens below which that share of the documents is, to within a bin of the histogram `lengths`."""
    total, seen = sum(lengths.values()), 0
    for b, count in sorted((int(b), count) for b, count in lengths.items()):
        seen += count
        if seen >= share * total:
            return round(2 ** ((b + 0.5) / OCTAVE))
    return 0


def lengths_figure(lengths: dict[str, dict]) -> bytes:
    """The histogram of document lengths, as shares of each split's documents: {split: {bin: documents}} → PNG."""
    from matplotlib.figure import Figure  # here: it takes longer to import than a small corpus to prepare

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for split, counts in lengths.items():
        tokens = 2 ** ((np.array([int(b) for b in counts]) + 0.5) / OCTAVE)
        documents = np.array(list(counts.values()))
        low, high = np.floor(np.log2(tokens.min())), np.ceil(np.log2(tokens.max()) + 1e-9)
        edges = 2 ** np.arange(low, high + 0.5, 0.5)  # two bars per doubling
        axes.hist(tokens, edges, weights=documents / documents.sum(), alpha=0.5, label=f"{split} ({documents.sum():,})")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in a document", ylabel="share of the split's documents")
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def summary(data: Data) -> str:
    """Documents, tokens, their quantiles, bytes a token and what was left out, in a few lines."""
    manifest = data.manifest
    rule, source = manifest["val_rule"], manifest["source"]
    lines = [f"{data.folder}"]
    for split, shards in manifest["splits"].items():
        total = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes")}
        lengths = ", ".join(
            f"{share:.0%} {quantile(manifest['lengths'][split], share):,}" for share in (0.05, 0.25, 0.5, 0.75, 0.95)
        )
        asked = rule.get("val_bytes") if split == "val" else None
        aimed = f"; {asked:,} bytes of text were aimed at" if asked else ""
        lines.append(
            f"  {split} {total['tokens']:,} tokens in {total['documents']:,} documents and {len(shards)} shards "
            f"({total['bytes'] / (total['tokens'] - total['documents']):.3f} bytes a token); "
            f"tokens a document: {lengths}{aimed}"
        )
    lines.append(f"  val_long {len(manifest['val_long'])} documents of at least {manifest['val_long_tokens']:,} tokens")
    left_out = [f"{count:,} bad {kind}" for kind, count in source["bad"].items()]
    if source["empty"]:
        left_out = [f"{source['empty']:,} empty documents", *left_out]
    if left_out:
        lines.append(f"  left out: {', '.join(left_out)}")
    return "\n".join([*lines, f"  lengths of documents: {data.folder / 'lengths.png'}"])
