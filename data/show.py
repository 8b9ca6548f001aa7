"""Look into a data folder: python data/show.py DIR [--split val] [--document N | --window J | --longest K | --verify]

Without an option, the manifest as a table. Documents and windows are counted from 0 through the whole split.
"""

import argparse
import sys

import _root
import numpy as np

from data.shards import Data, DataError, given_path, open_data, output
from data.summary import summary
from data.tokenizer import load_tokenizer


def document(data: Data, split: str, number: int) -> np.ndarray:
    """Tokens of a document without its end-of-text: (n,) int64. Reads only its shard."""
    before = 0
    for record in data.records(split):
        if 0 <= number - before < record["documents"]:
            shard = data.stream([record])
            start, length = shard.documents()[number - before]
            return shard.read(int(start), int(start + length))
        before += record["documents"]
    raise DataError(f"no document {number} in {split}: it has {before:,}, numbered from 0")


def longest(data: Data, split: str, count: int) -> list[tuple[int, int]]:
    """Tokens and number of the longest documents of a split, the longest first. Reads it all, a shard at a time."""
    best, before = np.empty((0, 2), np.int64), 0
    for record in data.records(split):
        lengths = data.stream([record]).documents()[:, 1]
        best = np.concatenate([best, np.stack([lengths, before + np.arange(len(lengths))], axis=1)])
        best = best[np.argsort(-best[:, 0], kind="stable")[:count]]
        before += len(lengths)
    return [(int(tokens), int(number)) for tokens, number in best]


def window(data: Data, split: str, number: int, block_size: int) -> np.ndarray:
    """Tokens of the split's window that begins at number * block_size: (n,) int64. The last one may be short."""
    stream, start = data.split(split), number * block_size
    if number < 0 or block_size < 1 or start >= len(stream):
        raise DataError(f"no window {number} of {block_size} tokens in {split}, which has {len(stream):,} tokens")
    return stream.read(start, min(start + block_size, len(stream)))


def table(data: Data) -> str:
    """The manifest for people."""
    manifest, tokenizer = data.manifest, data.manifest["tokenizer"]
    name = " / ".join(filter(None, (manifest["dataset"], manifest["subset"], manifest.get("task", {}).get("name"))))
    lines = [
        f"{name} at {manifest['revision'] or 'no published revision'}; licence: {manifest['licence']}",
        f"tokenizer {tokenizer['name']} ({tokenizer['version'] or 'built in'}, {data.vocab_size:,} ids, "
        f"sha256 {data.tokenizer_hash[:12]}…), {manifest['dtype']}; validation: {manifest['val_rule']['kind']}; "
        f"hash {data.hash[:12]}…",
        summary(data),
        "",
        f"{'shard':<18}{'tokens':>14}{'documents':>12}{'bytes of text':>16}  sha256",
    ]
    for records in manifest["splits"].values():
        lines += [
            f"{r['file']:<18}{r['tokens']:>14,}{r['documents']:>12,}{r['bytes']:>16,}  {r['sha256'][:16]}…"
            for r in records
        ]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Print what the arguments ask for. DataError where it is not there."""
    data = open_data(args.folder, verify=args.verify)
    decode = load_tokenizer(data.manifest["tokenizer"]["name"]).decode
    if args.document is not None:
        output(decode(document(data, args.split, args.document)))
    elif args.window is not None:
        tokens = window(data, args.split, args.window, args.block_size)
        ends = np.flatnonzero(tokens == data.eot)
        output("\n<|endoftext|>\n".join(decode(part) for part in np.split(tokens, ends)))
    elif args.longest is not None:
        for tokens, number in longest(data, args.split, args.longest):
            output(f"document {number}: {tokens:,} tokens, {decode(document(data, args.split, number)[:20])!r}")
    elif args.verify:
        output(f"{data.folder}: every shard is what the manifest says")
    else:
        output(table(data))


def main(arguments: list[str] | None = None) -> None:
    """The command. Ends the process with a message where something is wrong."""
    parser = argparse.ArgumentParser(prog="data/show.py", description="Look into a data folder.", allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", type=given_path, help="what data/prepare.py made")
    parser.add_argument("--split", default="train", help="train, val or test (default: train)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--document", metavar="N", type=int, help="decode document N")
    action.add_argument("--window", metavar="J", type=int, help="decode the J-th window of block_size tokens")
    action.add_argument("--longest", metavar="K", type=int, help="the K longest documents and their numbers")
    action.add_argument("--verify", action="store_true", help="hash every shard again")
    parser.add_argument("--block_size", metavar="T", type=int, default=1024, help="of --window (default: %(default)s)")
    try:
        run(parser.parse_args(arguments))
    except DataError as error:
        sys.exit(f"show: {error}")


if __name__ == "__main__":
    main()
