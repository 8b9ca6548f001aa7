"""Describes a finished data folder: its summary in a few lines, and the figure of document lengths."""

import collections
import io
import math

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
    """The histogram of document lengths, as shares of each split's documents: {split: {bin: documents}} → PNG.

    Two bars per doubling. Drawn with Pillow: matplotlib takes longer to import than a small corpus to prepare.
    """
    from PIL import Image, ImageDraw, ImageFont

    left, right, top, bottom, colours = 64, 724, 16, 324, ("#1f77b4", "#ff7f0e", "#2ca02c")  # pixels
    image, font = Image.new("RGB", (768, 384), "white"), ImageFont.load_default(15)
    draw = ImageDraw.Draw(image, "RGBA")
    totals = {split: sum(counts.values()) for split, counts in lengths.items()}
    shares = {split: collections.Counter() for split in lengths}  # by log2 of the tokens, in halves
    for split, counts in lengths.items():
        for b, count in counts.items():
            shares[split][math.floor((int(b) + 0.5) / OCTAVE * 2)] += count / totals[split]
    low = min(min(bars) for bars in shares.values()) // 2
    high = max(max(bars) for bars in shares.values()) // 2 + 1
    most = max(max(bars.values()) for bars in shares.values())

    def x(doublings: float) -> float:
        return left + (right - left) * (doublings - low) / (high - low)

    def y(share: float) -> float:
        return bottom - (bottom - top) * share / (1.05 * most)

    for number, (split, bars) in enumerate(shares.items()):
        for bar, share in bars.items():
            draw.rectangle((x(bar / 2), y(share), x((bar + 1) / 2) - 1, bottom), f"{colours[number]}80")
        label, at = f"{split} ({totals[split]:,})", top + 8 + 22 * number
        draw.rectangle((right - 150, at, right - 132, at + 12), f"{colours[number]}80")
        draw.text((right - 124, at + 6), label, "black", font, "lm")
    draw.rectangle((left, top, right, bottom), outline="black")
    for doublings in range(low, high + 1, -(-(high - low) // 12)):
        draw.line((x(doublings), bottom, x(doublings), bottom + 5), "black")
        draw.text((x(doublings), bottom + 8), f"{2**doublings:,}", "black", font, "mt")
    for share in (most * i / 4 for i in range(5)):
        draw.line((left - 5, y(share), left, y(share)), "black")
        draw.text((left - 8, y(share)), f"{share:.1%}", "black", font, "rm")
    draw.text(
        ((left + right) / 2, bottom + 34),
        "tokens in a document; bars: share of the split's documents",
        "black",
        font,
        "mt",
    )
    png = io.BytesIO()
    image.save(png, "PNG")
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
