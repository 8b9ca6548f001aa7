"""The plan of a data folder: what is to be made, as plan.json and then the manifest record it."""

import dataclasses
import itertools
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from data.corpora import CORPORA, Corpus, Subset, named, subset_of
from data.documents import king_james_file
from data.files import File
from data.library import Wanted, expected_bytes, loaded_files
from data.readers import estimated_bytes
from data.shards import DataError, cores
from data.sources import check_reading, contents_of, identity_of, source_files
from data.split import validation_rule
from data.tasks import Examples
from data.tokenizer import Tokenizer, load_tokenizer
from data.units import Sizes, group_files

GIVEN = ("field", "separator", "val_bytes", "hub", "task")  # plans hold these only where they were given
GPT2_BYTES = 4.3  # bytes of text per GPT-2 token, for the counts in the table of corpora
# Files of DIR.partial that the published folder does not keep
RECORD = re.compile(r"\d{5}-\d{5}-of-\d{5}(\.unit|\.[a-z]+_\d{5})\.json|plan\.json|.*\.tmp|lock.*")


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    name: str
    corpus: Corpus
    subset_name: str | None
    subset: Subset | None
    source: Path | str | None
    tokenizer: Tokenizer
    options: dict  # shard_tokens, val_tokens, val_bytes, long_tokens, skip_bad: with these the bytes change
    wanted: Wanted | None = None  # of the corpus `hub`
    examples: Examples | None = None  # of the corpus `task`

    @classmethod
    def checked(
        cls,
        name: str,
        subset: str | None,
        source: Path | str | None,
        tokenizer: str | None,
        options: dict,
        field: str | None = None,
        separator: str | None = None,
        wanted: Wanted | None = None,
        examples: Examples | None = None,
    ) -> "Request":
        """The request, its names looked up. DataError for what cannot be."""
        corpus = named(name, field, separator, examples)
        for option, value in options.items():
            if value is not None and value < 1 and option != "skip_bad":
                raise DataError(f"--{option} must be at least 1, not {value}")
        if corpus.local and source is None:
            raise DataError(f"corpus {name} needs --source PATH: {corpus.description}")
        if options.get("val_tokens") is not None and options.get("val_bytes") is not None:
            raise DataError("--val_tokens and --val_bytes both say how much validation to aim at; give one")
        if name in ("builtin", "builtin-verses", "hub", "task") and source is not None:
            raise DataError(f"corpus {name} takes no --source; for your own text take the corpus `files`")
        if name == "hub" and not (wanted and wanted.dataset):
            raise DataError("corpus hub needs --dataset NAME, a name on the hub or a folder")
        if name == "hub" and separator is not None:
            raise DataError("--separator does not apply: a data set of the hub has rows")
        if name != "hub" and wanted:
            given = ", ".join(f"--{option}" for option, value in vars(wanted).items() if value)
            raise DataError(f"{given}: only for the corpus hub, not for {name}")
        if name == "task" and tokenizer not in (None, corpus.tokenizer):
            raise DataError(f"--tokenizer {tokenizer}: tasks have tokenizer {corpus.tokenizer}, a token a character")
        tokenizer = load_tokenizer(tokenizer or corpus.tokenizer)
        return cls(name, corpus, *subset_of(corpus, subset), source, tokenizer, options, wanted, examples)

    def given(self) -> dict:
        """The options of GIVEN that were given.

        Plans and manifests hold no others, so those of commands without them are as they were before these existed.
        """
        now, own = (vars(corpus) for corpus in (self.corpus, named(self.name)))
        given = {key: now[key] for key in GIVEN[:2] if now[key] != own[key]}
        if self.options.get("val_bytes") is not None:
            given["val_bytes"] = self.options["val_bytes"]
        given |= {"hub": dict(vars(self.wanted))} if self.wanted else {}
        return given | ({"task": dataclasses.asdict(self.examples)} if self.examples else {})

    def val_bytes(self) -> int | None:
        """Bytes of text to aim at for validation, if any number was given."""
        if self.options["val_tokens"] is not None:
            return round(self.options["val_tokens"] * self.tokenizer.bytes_per_token)
        return self.options["val_bytes"]

    @property
    def is_here(self) -> bool:
        """Whether what is to be read is on this machine: a --source, a folder as --dataset, or made here."""
        return self.source is not None or bool(self.examples or (self.wanted and self.wanted.is_folder))

    def files(self, revision: str | None) -> tuple[str | None, list[File]]:
        """Revision and files of what is to be read: those of the hub at `revision`."""
        if self.wanted:
            return loaded_files(self.wanted, revision, self.corpus.field)
        if self.examples:
            return None, [self.examples.file()]
        return source_files(self.corpus, self.subset, self.source, revision)

    def check(self, plan: dict, folder: Path, read_source: bool) -> list[File] | None:
        """DataError where the request is not what `folder` was planned for. Returns the source's files, if read."""
        files, differ = None, self._differences(plan)
        if read_source and not differ:
            _, files = self.files(plan["revision"])
            contents = plan["source"].get("files_sha256")
            if identity_of(files) != plan["source"]["identity"] or contents and contents_of(files) != contents:
                differ = ["other text in the source"]
        if differ:
            raise DataError(
                f"{folder} was made with other options or from other text ({'; '.join(differ)}); "
                f"give another --out, or delete it"
            )
        return files

    def _differences(self, plan: dict) -> list[str]:
        """How the request differs from a plan, the text of the source left aside."""
        now = {"dataset": self.name, "subset": self.subset_name, "tokenizer": self.tokenizer.name} | self.options
        there = plan | {"tokenizer": plan["tokenizer"]["name"]}
        given = self.given()
        if self.wanted and self.wanted.is_folder and "hub" in plan:  # whatever way it is named, its text is compared
            given["hub"] |= {"dataset": plan["hub"]["dataset"]}
        for key in GIVEN:
            now[key], there[key] = repr(given.get(key)), repr(plan.get(key))
        differ = [f"{key} {there[key]} there, {now[key]} now" for key in there if key in now and there[key] != now[key]]
        if plan["tokenizer"]["sha256"] != self.tokenizer.sha256:
            differ.append(f"another vocabulary of {self.tokenizer.name}")
        return differ


def make_plan(request: Request, revision: str | None, files: list[File], sizes: Sizes) -> dict:
    """The plan for a request. It settles every byte of the shards."""
    corpus, tokenizer, options = request.corpus, request.tokenizer, request.options
    survey = sizes.survey
    check_reading(files, request.given())
    if request.subset and request.source is None:
        text_bytes, survey = round(request.subset.tokens * GPT2_BYTES), 0  # it is not downloaded yet
    elif all(file.bytes or not file.stream for file in files):
        text_bytes = estimated_bytes(files, corpus.field)
    else:
        text_bytes = None
    unit_bytes = sizes.unit if text_bytes is None else min(max(text_bytes // 64, sizes.least_unit), sizes.unit)
    rule = validation_rule(corpus, files, request.val_bytes(), text_bytes, options["skip_bad"], survey)
    fingerprints = dict(file.fingerprint for file in files if file.fingerprint)  # of the library `datasets`
    contents = contents_of(files) if request.source is not None else None
    licences = {file.table.info.license for file in files if file.table is not None}
    return {
        "dataset": request.name,
        "subset": request.subset_name,
        "revision": revision,
        "licence": ", ".join(sorted(filter(None, licences))) or corpus.licence,
        "source": {"files": len(files), "file_bytes": sum(file.bytes for file in files), "identity": identity_of(files)}
        | ({"fingerprint": fingerprints} if fingerprints else {})
        | ({"files_sha256": contents} if contents else {}),
        "tokenizer": {key: getattr(tokenizer, key) for key in ("name", "sha256", "n_vocab", "eot", "version")},
        "vocab_size": tokenizer.n_vocab,
        "dtype": tokenizer.dtype.name,
        **{key: value for key, value in options.items() if key not in GIVEN},
        **request.given(),
        "text_bytes": text_bytes,
        "unit_bytes": unit_bytes,
        "groups": len(group_files(files, corpus, unit_bytes)),
        "val_rule": rule,
    }


def unfinished_plan(folder: Path) -> dict | None:
    """The plan of an interrupted run in `folder`. None where there is none. DataError where something else is there."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is in the way: it is not a folder; give another --out")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if (folder / "plan.json").is_file():
        return json.loads((folder / "plan.json").read_text())
    if (folder / "manifest.json").is_file() and (folder / "COMPLETE").exists():
        return json.loads((folder / "manifest.json").read_text())
    if all(RECORD.fullmatch(path.name) for path in folder.iterdir()):
        return None  # stopped before it began
    raise DataError(f"{folder} is in the way: it holds files that data/prepare.py did not write; give another --out")


def estimate(
    name: str,
    source: Path | str | None = None,
    tokenizer_name: str | None = None,
    workers: int = 1,
    subset_name: str | None = None,
    field: str | None = None,
    separator: str | None = None,
    wanted: Wanted | None = None,
    examples: Examples | None = None,
) -> str:
    """Tokens, disk space and minutes on this machine for a corpus, in a sentence. Nothing is downloaded or written."""
    check_workers(workers)
    request = Request.checked(name, subset_name, source, tokenizer_name, {}, field, separator, wanted, examples)
    corpus, subset, tokenizer = request.corpus, request.subset, request.tokenizer
    if source is None and (subset or corpus.archive):
        text_bytes, megabytes = (subset.tokens * GPT2_BYTES, subset.megabytes) if subset else (76e6, 30)
        where = f"; {megabytes:,} MB to download, a file at a time, take their own time"
    elif wanted:
        text_bytes, where = expected_bytes(wanted), "; that is of all columns and splits, and loading takes its time"
    else:
        text_bytes, where = estimated_bytes(request.files(None)[1], corpus.field), ""
    documents = request.examples.documents() if examples else CORPORA["builtin"].reader(king_james_file())
    sample = "".join(text for _, text in itertools.islice(documents, 10_000 if examples else 12))
    tokens, rate = text_bytes / tokenizer.bytes_per_token, _bytes_per_second(tokenizer, workers, sample)
    return (
        f"{name}: about {tokens:,.0f} tokens ({text_bytes / 1e6:,.0f} MB of text), "
        f"{tokens * tokenizer.dtype.itemsize / 1e9:,.2f} GB on disk, {text_bytes / rate / 60:,.1f} minutes "
        f"with {workers} workers at {rate / 1e6:.1f} MB/s{where}"
    )


def check_workers(workers: int) -> None:
    """DataError for none."""
    if workers < 1:
        raise DataError(f"--workers must be at least 1, not {workers}")


def _bytes_per_second(tokenizer: Tokenizer, workers: int, sample: str) -> float:
    """How many bytes of text like `sample` this machine tokenizes in a second, measured for a second."""
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < 1:
        for i in range(0, len(sample), 4096):
            tokenizer.encode(sample[i : i + 4096])
        done += len(sample.encode())
    seconds = time.perf_counter() - started
    return done / seconds * min(workers, cores()) * 0.9  # reading, hashing and writing take the rest
