"""Decides which document goes to which split.

A corpus may have its own splits, or name its validation documents. Otherwise the sha256 of a document's text decides:
equal texts are never on two sides, and the rule does not depend on the order of documents.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from data.corpora import Corpus
from data.files import File, kind_of
from data.progress import note
from data.readers import Bad, Documents
from data.shards import DataError
from data.units import cut_group, group_files, read_unit

VAL_FRACTION = 0.05  # unless the corpus has its own validation, or --val_bytes or --val_tokens is given
FEW = 200  # documents; by chance none of them is among 5 % with a probability of 0.95^200 = 3e-5

Assigned = Iterator[tuple[str, str, str, bytes]]  # split, name, text, sha256 of the document's text


@dataclass
class Survey:
    """What a first reading of a small source finds."""

    documents: int = 0
    empty: int = 0
    bytes: int = 0
    low: tuple[float, int] = (1.0, 0)  # extremes of `fraction` over the documents, with their bytes
    high: tuple[float, int] = (0.0, 0)


def text_sha256(text: str) -> bytes:
    """sha256 of a text in UTF-8: 32 bytes."""
    return hashlib.sha256(text.encode()).digest()


def fraction(digest: bytes) -> float:
    """A sha256 as a float in [0, 1): its first 53 bits, so that the float is exact."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def survey(corpus: Corpus, files: list[File], bad: Bad, survey_bytes: int, most: float) -> Survey | None:
    """Read the documents of a small source once. None where they have more than `most` bytes."""
    seen = Survey()
    for number, group in enumerate(group_files(files, corpus, survey_bytes)):
        for unit in cut_group(number, group, corpus, survey_bytes):
            for _, text in read_unit(unit, corpus, bad):
                if not text or text.isspace():
                    seen.empty += 1
                else:
                    place = fraction(text_sha256(text)), len(text.encode())
                    seen.documents, seen.bytes = seen.documents + 1, seen.bytes + place[1]
                    seen.low, seen.high = min(seen.low, place), max(seen.high, place)
                    if seen.bytes > most:
                        return None
    if not seen.documents:
        what = f"every document is empty ({seen.empty:,})" if seen.empty else "it has no documents"
        left_out = [f"{count:,} bad {kind} left out" for kind, count in bad.counts.items()]
        raise DataError("; ".join([f"there is no text in the source: {what}", *left_out, *bad.messages]))
    return seen


def validation_rule(
    corpus: Corpus, files: list[File], asked: int | None, text_bytes: int | None, skip_bad: bool, survey_bytes: int
) -> dict:
    """The rule that sends a document to validation, as the manifest records it. Its `kind` is own, names, hash or cut.

    asked: bytes of text to aim at. text_bytes: of the whole corpus, about; None where nobody knows. The share of bytes
    decides, so that every tokenizer has the same validation documents. A source of at most `survey_bytes` is read
    before, so that each side gets a document. So is one of few .txt files, which are one document each. So is one of
    unknown size, until it turns out to be larger.
    """
    own = any(file.split == "val" for file in files)
    if own or corpus.val:
        if asked is not None:
            why = "names its validation documents" if corpus.val else "has a validation split of its own"
            raise DataError(f"--val_bytes or --val_tokens does not apply: this corpus {why}")
        return {"kind": "names", "documents": list(corpus.val)} if corpus.val else {"kind": "own"}
    seen = None
    texts = [file for file in files if file.table is None and kind_of(file.name)[0] == ".txt"]
    few = 0 < len(texts) == len(files) <= FEW and corpus.separator is None
    if text_bytes is None or text_bytes <= survey_bytes or few:
        most = survey_bytes if text_bytes is None else math.inf
        seen = survey(corpus, files, Bad(skip_bad), survey_bytes, most)
        text_bytes = seen.bytes if seen else None
    share = VAL_FRACTION
    if text_bytes is None and asked is not None:
        raise DataError(
            "--val_bytes or --val_tokens does not apply: nobody knows how large the source is; without it, 5 % is taken"
        )
    if asked is not None:
        share = asked / text_bytes
    elif corpus.val_bytes:
        share = min(share, corpus.val_bytes / text_bytes)
    counts = {"val_bytes": None if text_bytes is None else round(share * text_bytes), "text_bytes": text_bytes}
    if seen and seen.documents == 1:
        note("there is a single document: its end, from a line break near it on, is the validation document")
        return {"kind": "cut"} | counts | {"share": min(share, 0.5)}
    return {"kind": "hash"} | counts | {"sha256_fraction_below": _threshold(share, counts["val_bytes"], seen)}


def _threshold(share: float, asked: int | None, seen: Survey | None) -> float:
    """Texts whose `fraction` is below this go to validation. It is `share`, unless a side would be empty."""
    if seen and seen.low == seen.high:
        raise DataError(f"all {seen.documents} documents are the same, so none can be kept for validation")
    if seen and share <= seen.low[0]:
        note(
            f"{asked:,} bytes of validation would take no document; the one with the smallest hash is taken, "
            f"{seen.low[1]:,} of {seen.bytes:,} bytes"
        )
        return math.nextafter(seen.low[0], 1)
    if seen and share > seen.high[0]:
        note(
            f"{asked:,} bytes of validation would take every document; the one with the largest hash is left for "
            f"training, {seen.high[1]:,} of {seen.bytes:,} bytes"
        )
        return seen.high[0]
    if share >= 1:
        raise DataError(f"so much validation, {asked:,} bytes of text, is the whole corpus; take less")
    return share


def assigned(documents: Documents, rule: dict, own_split: str | None) -> Assigned:
    """Send each document to its split, in order. `own_split`: of the corpus's own, that of the file it is from."""
    for name, text in documents:
        digest, split = text_sha256(text), own_split
        if rule["kind"] == "names":
            split = "val" if name in rule["documents"] else "train"
        elif rule["kind"] == "hash":
            split = "val" if fraction(digest) < rule["sha256_fraction_below"] else "train"
        elif rule["kind"] == "cut" and text and not text.isspace():  # others are counted and left out
            middle = round(len(text) * (1 - rule["share"]))
            least = round(len(text) * (1 - 1.5 * rule["share"]))  # no line is so long that validation takes most of it
            cut = text.rfind("\n", least, middle) + 1 or text.rfind(" ", least, middle) + 1 or middle
            if not text[:cut].strip() or not text[cut:].strip():
                raise DataError(f"{name} is too little text for training and validation")
            yield "train", name, text[:cut], digest
            split, text = "val", text[cut:]
        yield split, name, text, digest
