"""The plan of a data folder: what is to be made, as plan.json and then the manifest record it."""

import itertools
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from data.corpora import CORPORA, Corpus, Subset, named, subset_of
from data.documents import king_james_file
from data.readers import File, estimated_bytes
from data.shards import DataError, cores
from data.sources import check_reading, identity_of, source_files
from data.split import validation_rule
from data.tokenizer import Tokenizer, load_tokenizer
from data.units import Sizes, group_files

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
    options: dict  # shard_tokens, val_tokens, long_tokens, skip_bad: with these the bytes change

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
    ) -> "Request":
        """The request, its names looked up. DataError for what cannot be."""
        corpus = named(name, field, separator)
        for option, value in options.items():
            if value is not None and value < 1 and option != "skip_bad":
                raise DataError(f"--{option} must be at least 1, not {value}")
        if corpus.local and source is None:
            raise DataError(f"corpus {name} needs --source PATH: {corpus.description}")
        if name == "builtin" and source is not None:
            raise DataError("corpus builtin takes no --source; for your own text take the corpus `files`")
        return cls(
            name, corpus, *subset_of(corpus, subset), source, load_tokenizer(tokenizer or corpus.tokenizer), options
        )

    def reading(self) -> dict[str, str]:
        """The --field and --separator that differ from the corpus's own: plans and manifests have no others."""
        now, own = (vars(corpus) for corpus in (self.corpus, named(self.name)))
        return {key: now[key] for key in ("field", "separator") if now[key] != own[key]}

    def files(self, revision: str | None) -> tuple[str | None, list[File]]:
        """Revision and files of what is to be read: those of the hub at `revision`."""
        return source_files(self.corpus, self.subset, self.source, revision)

    def check(self, plan: dict, folder: Path, read_source: bool) -> list[File] | None:
        """DataError where the request is not what `folder` was planned for. Returns the source's files, if read."""
        files, differ = None, self._differences(plan)
        if read_source and not differ:
            _, files = self.files(plan["revision"])
            if identity_of(files) != plan["source"]["identity"]:
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
        for key in ("field", "separator"):
            now[key], there[key] = repr(self.reading().get(key)), repr(plan.get(key))
        differ = [f"{key} {there[key]} there, {now[key]} now" for key in there if key in now and there[key] != now[key]]
        if plan["tokenizer"]["sha256"] != self.tokenizer.sha256:
            differ.append(f"another vocabulary of {self.tokenizer.name}")
        return differ


def make_plan(request: Request, revision: str | None, files: list[File], sizes: Sizes) -> dict:
    """The plan for a request. It settles every byte of the shards."""
    corpus, tokenizer, options = request.corpus, request.tokenizer, request.options
    check_reading(files, request.reading())
    if request.subset and request.source is None:
        text_bytes = request.subset.tokens * GPT2_BYTES
        expected, text_bytes = max(1, round(text_bytes / tokenizer.bytes_per_token)), round(text_bytes)
    else:
        expected, text_bytes = None, estimated_bytes(files, corpus.field)
    unit_bytes = min(max(text_bytes // 64, sizes.least_unit), sizes.unit)
    rule = validation_rule(
        corpus, files, tokenizer, options["val_tokens"], text_bytes, expected, options["skip_bad"], sizes.survey
    )
    return {
        "dataset": request.name,
        "subset": request.subset_name,
        "revision": revision,
        "licence": corpus.licence,
        "source": {
            "files": len(files),
            "file_bytes": sum(file.bytes for file in files),
            "identity": identity_of(files),
        },
        "tokenizer": {key: getattr(tokenizer, key) for key in ("name", "sha256", "n_vocab", "eot", "version")},
        "vocab_size": tokenizer.n_vocab,
        "dtype": tokenizer.dtype.name,
        **options,
        **request.reading(),
        "text_bytes": text_bytes,
        "unit_bytes": unit_bytes,
        "groups": len(group_files(files, corpus, unit_bytes)),
        "val_rule": rule,
    }


def unfinished_plan(folder: Path) -> dict | None:
    """The plan of an interrupted run in `folder`. None where there is none. DataError where something else is there."""
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
) -> str:
    """Tokens, disk space and minutes on this machine for a corpus, in a sentence. Nothing is downloaded or written."""
    request = Request.checked(name, subset_name, source, tokenizer_name, {}, field, separator)
    corpus, subset, tokenizer = request.corpus, request.subset, request.tokenizer
    if source is None and (subset or corpus.archive):
        text_bytes, megabytes = (subset.tokens * GPT2_BYTES, subset.megabytes) if subset else (76e6, 30)
        where = f"; {megabytes:,} MB to download, a file at a time, take their own time"
    else:
        text_bytes, where = estimated_bytes(request.files(None)[1], corpus.field), ""
    tokens, rate = text_bytes / tokenizer.bytes_per_token, _bytes_per_second(tokenizer, workers)
    return (
        f"{name}: about {tokens:,.0f} tokens ({text_bytes / 1e6:,.0f} MB of text), "
        f"{tokens * tokenizer.dtype.itemsize / 1e9:,.2f} GB on disk, {text_bytes / rate / 60:,.1f} minutes "
        f"with {workers} workers at {rate / 1e6:.1f} MB/s{where}"
    )


def _bytes_per_second(tokenizer: Tokenizer, workers: int) -> float:
    """How many bytes of text this machine tokenizes in a second, measured for a second."""
    books = CORPORA["builtin"].reader(king_james_file())
    sample = "".join(text for _, text in itertools.islice(books, 12))
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < 1:
        for i in range(0, len(sample), 4096):
            tokenizer.encode(sample[i : i + 4096])
        done += len(sample.encode())
    seconds = time.perf_counter() - started
    return done / seconds * min(workers, cores()) * 0.9  # reading, hashing and writing take the rest
