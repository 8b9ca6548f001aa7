"""Make a data folder of token shards from a corpus: python data/prepare.py CORPUS --out DIR [--source PATH] …
or from examples of a task: python data/prepare.py task copy

Interrupted, the same command continues. How that works: data/build.py.
"""

import argparse
import re
import shlex
import sys

import _root

from data.build import LONG_TOKENS, SHARD_TOKENS, prepare
from data.corpora import CORPORA, listing
from data.library import Wanted
from data.plan import estimate
from data.shards import DataError, cores, given_path, output, unknown
from data.split import VAL_FRACTION
from data.summary import summary
from data.tasks import TASKS, Examples
from data.tokenizer import TOKENIZERS
from data.units import SIZES, Sizes


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="data/prepare.py",
        description="Make a data folder of token shards from a corpus. Interrupted, it continues.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="corpora (--list tells more):\n"
        + "\n".join(f"  {name}: {corpus.description}" for name, corpus in CORPORA.items()),
    )
    add = parser.add_argument
    add("corpus", nargs="?", metavar="CORPUS", help=f"one of {', '.join(CORPORA)}; see below")
    add("task", nargs="?", metavar="TASK", help=f"of the corpus task: one of {', '.join(TASKS)}")
    add(
        "--out",
        metavar="DIR",
        type=given_path,
        help="folder to make (default: data/CORPUS-TOKENIZER or data/task-TASK in this repository)",
    )
    add(
        "--source",
        metavar="PATH",
        type=given_path,
        help="file or folder of .txt, .jsonl, .json (also .gz, .bz2, .xz, .zst) or .parquet to read, links followed, "
        "instead of downloading it",
    )
    add(
        "--field",
        metavar="NAME",
        help="field or column that holds the text of a row; a.b is field b in field a (default: the corpus's own)",
    )
    add(
        "--separator",
        metavar="TEXT",
        help=r"text that stands between the documents of a .txt file, for example '<|endoftext|>' or '\n\n\n' "
        r"(\n, \t, \x1e and so on are read as such; default: a file is one document)",
    )
    add("--subset", metavar="NAME", help="of the corpus, as --list has them (default: the first)")
    hub = parser.add_argument_group("only for the corpus hub").add_argument
    hub(
        "--dataset",
        metavar="NAME",
        type=given_path,
        help="what datasets.load_dataset loads: a name on the hub, or a folder",
    )
    hub("--config", metavar="C", help="of a data set that has several")
    hub(
        "--split",
        metavar="S",
        help="read this split alone, or for example train[:10%%]; some of it is validation (default: the data set's "
        "own train, validation and test, or else train)",
    )
    hub("--revision", metavar="R", help="commit, branch or tag (default: the newest; the manifest has the commit)")
    hub("--streaming", action="store_true", help="read over the network as it goes, and keep nothing of it")
    bytewise = ", ".join(name for name, corpus in CORPORA.items() if corpus.tokenizer == "byte")
    task = parser.add_argument_group("only for the corpus task").add_argument
    defaults = ", ".join(f"{name} {of.length} {of.unit}" for name, of in TASKS.items())
    task("--length", metavar="L", type=int, help=f"examples have up to this length (default: {defaults})")
    task("--examples", metavar="N", type=int, help="how many, validation among them (default: 100,000)")
    task("--seed", metavar="S", type=int, help="another seed makes other examples (default: 0)")
    add("--tokenizer", metavar="NAME", help=f"{', '.join(TOKENIZERS)} (default: gpt2; byte for {bytewise})")
    add(
        "--shard_tokens",
        metavar="N",
        type=int,
        default=SHARD_TOKENS,
        help="start a new shard rather than exceed this many tokens; a longer document has a shard to itself "
        "(default: %(default)s)",
    )
    add(
        "--val_bytes",
        metavar="N",
        type=int,
        help="bytes of text to aim at for validation, which takes whole documents by the hash of their text, the same "
        f"for every tokenizer; not for corpora that have their own validation (default: {VAL_FRACTION:.0%}% of an "
        "estimate; fineweb-edu 430 MB and openwebtext 43 MB at most)",
    )
    add("--val_tokens", metavar="N", type=int, help="likewise in tokens; then another tokenizer takes other documents")
    add(
        "--long_tokens",
        metavar="N",
        type=int,
        default=LONG_TOKENS,
        help="list validation documents of at least this many tokens as val_long (default: %(default)s)",
    )
    add(
        "--workers",
        metavar="N",
        type=int,
        default=cores(),
        help="threads, or for much text processes, that tokenize; any number makes the same bytes (default: the cores, "
        "here %(default)s)",
    )
    add("--part", metavar="I/N", help="do only the I-th of N parts, for N machines or an array of jobs; then --merge")
    add("--merge", action="store_true", help="join what all parts made in DIR.partial; nothing else is read")
    add("--skip_bad", action="store_true", help="count and leave out what cannot be read, instead of stopping")
    add("--keep_downloads", action="store_true", help="keep downloaded files, in DIR.downloads")
    add(
        "--verify",
        choices=("quick", "full"),
        help="for a folder that is complete: sizes and fingerprints, or every sha256 (default: full up to 1 GiB)",
    )
    add("--dry_run", action="store_true", help="only estimate tokens, disk and minutes on this machine")
    add("--list", action="store_true", help="only print where each corpus comes from")
    return parser


def unescaped(separator: str) -> str:
    r"""The text that --separator means: the escapes \n \t \r \f \v \0 \x1e \u2028 \\ replaced. DataError for others."""

    def character(escape: re.Match) -> str:
        if not escape[1]:
            raise DataError(
                f"--separator {separator}: no escape begins with {separator[escape.start() :][:2]}; a backslash is \\\\"
            )
        return escape[1].encode().decode("unicode_escape")

    return re.sub(r"(\\(?:[\\ntrfv0]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}))|\\", character, separator)


def examples_of(args: argparse.Namespace) -> Examples | None:
    """What the corpus `task` is to hold. DataError for what it cannot, and for its options with another corpus."""
    if args.corpus == "task":
        if args.task is None:
            raise DataError(f"which task? One of {', '.join(TASKS)}: python data/prepare.py task copy")
        return Examples.checked(args.task, args.length, args.examples, args.seed or 0)
    for name in ("task", "length", "examples", "seed"):
        if (value := getattr(args, name)) is not None:
            raise DataError(f"{value if name == 'task' else f'--{name}'}: only for the corpus task, not {args.corpus}")
    return None


def run(args: argparse.Namespace, sizes: Sizes) -> None:
    """Do what the arguments ask for. DataError for what the user can put right."""
    if args.list:
        output(listing())
        return
    if args.corpus is None:
        raise DataError(f"which corpus? One of {', '.join(CORPORA)}")
    separator = None if args.separator is None else unescaped(args.separator)
    hub = {name: getattr(args, name) for name in ("dataset", "config", "split", "revision", "streaming")}
    wanted = Wanted(**hub) if any(hub.values()) else None
    examples = examples_of(args)
    if args.dry_run:
        rows = {"field": args.field, "separator": separator, "wanted": wanted, "examples": examples}
        output(estimate(args.corpus, args.source, args.tokenizer, args.workers, args.subset, **rows))
        return
    part = None
    if args.part is not None:
        if args.merge:
            raise DataError("--part and --merge do not go together: first every part, then --merge")
        if not (match := re.fullmatch(r"(\d+)/(\d+)", args.part)):
            raise DataError(f"--part must be i/n, for example 1/4, not {args.part!r}")
        part = int(match[1]), int(match[2])
    data = prepare(
        args.corpus,
        args.out,
        args.source,
        args.tokenizer,
        args.shard_tokens,
        args.val_tokens,
        args.workers,
        subset=args.subset,
        long_tokens=args.long_tokens,
        skip_bad=args.skip_bad,
        keep_downloads=args.keep_downloads,
        part=part,
        merge=args.merge,
        verify={None: None, "quick": False, "full": True}[args.verify],
        field=args.field,
        separator=separator,
        val_bytes=args.val_bytes,
        wanted=wanted,
        examples=examples,
        sizes=sizes,
    )
    if data:
        output(summary(data))


def main(arguments: list[str] | None = None, sizes: Sizes = SIZES) -> None:
    """The command. Ends the process with a message where something is wrong."""
    args, extra = make_parser().parse_known_args(arguments)
    try:
        if extra:
            raise unknown("argument", extra[0].split("=")[0], [f"--{name}" for name in vars(args) if name != "corpus"])
        run(args, sizes)
    except DataError as error:
        sys.exit(f"prepare: {error}")
    except KeyboardInterrupt:
        command = shlex.join(["python", "data/prepare.py", *(sys.argv[1:] if arguments is None else arguments)])
        sys.exit(f"\nprepare: interrupted; the same command continues from what is finished: {command}")


if __name__ == "__main__":
    main()
