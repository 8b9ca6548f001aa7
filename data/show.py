"""Look into a data folder: python data/show.py DIR [--split val] [--document N | --window J | --longest K | --verify]

Without an option, the manifest as a table. A document or a window is counted from 0 through the whole split.
"""

import argparse
import os
import sys

import _root
import numpy as np

from data.prepare import summary
from data.shards import DataError, Split, open_data
from data.tokenizer import load_tokenizer


def document(data, split, number):
    """Tokens of a document without its end-of-text: (n,) int64. Reads only its shard."""
    data.split(split)  # an error where there is none
    before = 0
    for record in data.manifest["splits"][split]:
        if 0 <= number - before < record["documents"]:
            shard = Split(data.folder, [record], data.manifest["dtype"], data.vocab_size, data.eot)
            start, length = shard.documents()[number - before]
            return shard.read(int(start), int(start + length))
        before += record["documents"]
    raise DataError(f"no document {number} in {split}: it has {before:,}, numbered from 0")


def longest(data, split, count):
    """[(tokens, number)] of the longest documents of a split, the longest first. Reads it all, a shard at a time."""
    best, before = np.empty((0, 2), np.int64), 0
    data.split(split)
    for record in data.manifest["splits"][split]:
        lengths = Split(data.folder, [record], data.manifest["dtype"], data.vocab_size, data.eot).documents()[:, 1]
        best = np.concatenate([best, np.stack([lengths, before + np.arange(len(lengths))], axis=1)])
        best = best[np.argsort(-best[:, 0], kind="stable")[:count]]
        before += len(lengths)
    return [(int(tokens), int(number)) for tokens, number in best]


def table(data):
    """The manifest for people."""
    manifest = data.manifest
    tokenizer, name = manifest["tokenizer"], " / ".join(filter(None, (manifest["dataset"], manifest["subset"])))
    lines = [
        f"{name} at {manifest['revision'] or 'no published revision'}; licence: {manifest['licence']}",
        f"tokenizer {tokenizer['name']} ({tokenizer['version'] or 'built in'}, {data.vocab_size:,} ids, sha256 "
        f"{data.tokenizer_hash[:12]}…), {manifest['dtype']}; validation: {manifest['val_rule']['kind']}; manifest {data.hash[:12]}…",
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


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="data/show.py", description="Look into a data folder.", allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help="what data/prepare.py made")
    parser.add_argument("--split", default="train", help="train, val or test (default: train)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--document", metavar="N", type=int, help="decode document N")
    action.add_argument("--window", metavar="J", type=int, help="decode the J-th window of block_size tokens")
    action.add_argument("--longest", metavar="K", type=int, help="the K longest documents and their numbers")
    action.add_argument("--verify", action="store_true", help="hash every shard again")
    parser.add_argument("--block_size", metavar="T", type=int, default=1024, help="of --window (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        data = open_data(args.folder, verify=args.verify)
        decode = load_tokenizer(data.manifest["tokenizer"]["name"]).decode
        if args.document is not None:
            print(decode(document(data, args.split, args.document)))
        elif args.window is not None:
            split, start = data.split(args.split), args.window * args.block_size
            if args.window < 0 or args.block_size < 1 or start >= len(split):
                raise DataError(
                    f"no window {args.window} of {args.block_size} tokens in {args.split}, which has {len(split):,} tokens"
                )
            tokens = split.read(start, min(start + args.block_size, len(split)))
            ends = np.flatnonzero(tokens == data.eot)
            print("\n<|endoftext|>\n".join(decode(part) for part in np.split(tokens, ends)))
        elif args.longest is not None:
            for tokens, number in longest(data, args.split, args.longest):
                print(f"document {number}: {tokens:,} tokens, {decode(document(data, args.split, number)[:20])!r}")
        elif args.verify:
            print(f"{data.folder}: every shard is what the manifest says")
        else:
            print(table(data))
    except DataError as error:
        sys.exit(f"show: {error}")
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
