"""Says what a file holds that is not what its name says, and what to do about it."""

import codecs
import re

MAGIC = {  # first bytes → what the file is, and its suffix where data/readers.py reads it under that
    b"\x1f\x8b": ("compressed by gzip", ".gz"),
    b"BZh": ("compressed by bzip2", ".bz2"),
    b"\xfd7zXZ\0": ("compressed by xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", ".zst"),
    b"PAR1": ("a parquet file", ".parquet"),
    b"ARROW1": ("an Arrow file", None),
    b"PK\x03\x04": ("a zip archive (as .docx, .odt and .epub are too)", None),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", None),
    b"Rar!": ("a rar archive", None),
    b"%PDF-": ("a PDF", None),
    b"\xd0\xcf\x11\xe0": ("a document of an old Office", None),
    b"SQLite format 3": ("an SQLite data base", None),
}
POINTERS = {  # first bytes of a small file that stands for one that was not fetched → how to fetch that
    b"version https://git-lfs.github.com/spec/": ("Git LFS", "git lfs pull"),
    b"version https://hawser.github.com/spec/": ("Git LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}
BYTE_ORDER_MARKS = {  # UTF-32's little-endian mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Bytes that Windows-1252 has not, and its capitals or signs within a word: those are letters of DOS and old Macs
NOT_1252 = re.compile(
    rb"[\x81\x8d\x8f\x90\x9d]|[a-z](?:[\x8a\x8c\x8e\x9f]|[\x80\x82-\x84\x86-\x89\x8b\x91\x93-\x95\x98\x99\x9b][a-z])"
)
KINDS = (".txt", ".jsonl", ".json", ".parquet")  # of content, whose suffix is not that of a compression
HEAD = 4096  # bytes; a pointer has fewer


def mistaken_file(head: bytes, suffix: str) -> str | None:
    """What a file is, by its first HEAD bytes, where it is not what its last suffix says. None where it may be.

    suffix: of the content, or of the compression that a file has as a whole.
    """
    if problem := pointer(head):
        return problem
    if suffix in KINDS[1:] and head.lstrip().startswith(b"<"):
        return "is a web page (HTML or XML), perhaps an error message that was saved in its place; fetch it again"
    for start, (what, own) in MAGIC.items():
        if head.startswith(start) and own != suffix and _is_binary(head):
            advice = "end its name in .parquet" if own == ".parquet" else "unpack it, or convert it to text"
            return f"is {what}, not what its name says; {advice}"
    if head[257:262] == b"ustar" and _is_binary(head):
        return "is a tar archive, not what its name says; unpack it"
    if suffix == ".parquet" and not head.startswith(b"PAR"):  # PARE, where it is encrypted
        return f"is not parquet: it begins with {head[:40]!r}" if head else "is not parquet: it is empty"
    return _wide_text(head) if suffix in KINDS and suffix != ".parquet" else None


def pointer(head: bytes) -> str | None:
    """What a file is, by its first HEAD bytes, where it only stands for one that was not fetched. Else None."""
    for start, (name, command) in POINTERS.items():
        if head.startswith(start) and len(head) < 1024:
            return f"is a pointer of {name}, not the text itself; fetch that: {command}"
    return None


def _is_binary(head: bytes) -> bool:
    """Whether bytes have a NUL, or are not UTF-8 up to a last character that is not complete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return b"\0" in head


def _wide_text(head: bytes) -> str | None:
    """Whether text is UTF-16 or UTF-32: by its byte-order mark, or by where its low bytes are."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return f"is {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8"
    if b"\0" not in head:  # every space and line break has one
        return None
    # A letter of a Western, Greek, Cyrillic, Hebrew or Arabic alphabet has a second byte of at most 6, or three such
    low = [len(re.findall(rb"[\x00-\x08]", head[i::4])) for i in range(4)]  # by their place in groups of four bytes
    even, odd, groups = low[0] + low[2], low[1] + low[3], len(head) // 4
    if 5 * sum(low) <= len(head):
        return None
    if groups and groups == low[0] == low[1]:
        encoding = "UTF-32BE"
    elif groups and groups == low[2] == low[3]:
        encoding = "UTF-32LE"
    elif 10 * min(even, odd) < max(even, odd):
        encoding = "UTF-16LE" if odd > even else "UTF-16BE"
    else:
        return "has many control bytes, as files have that are not text; see what it is: file NAME"
    return f"has many NUL bytes, as {encoding} has; if it is that, convert it: iconv -f {encoding} -t UTF-8"


def encoding_advice(content: bytes) -> str:
    """What to do with text that is not UTF-8, by the bytes around the first that is not.

    An encoding is named only where they speak for it.
    """
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(content)
    wrong = text.count("\ufffd")
    right = sum(map(len, re.findall(r"[^\x00-\x7f\ufffd]+", text)))
    if right > wrong:
        return (
            "the rest is UTF-8, so this place is damaged or from another file; mend it, or leave such bytes out: "
            "iconv -c -f UTF-8 -t UTF-8"
        )
    if b"\0" in content:
        return "it has NUL bytes too, so it may be UTF-16 or no text at all; see what it is: file NAME"
    high = re.findall(rb"[\x80-\xff]+", content)
    # In Western text most letters with accents stand alone among ASCII letters
    if sum(map(len, high)) < 0.15 * len(content) and 2 * sum(len(run) == 1 for run in high) >= len(high):
        if not re.search(rb"[\x80-\x9f]", content):
            return "if it is Western European text, convert it: iconv -f latin1 -t UTF-8"
        if not NOT_1252.search(content):
            return "if it is Western European text, convert it: iconv -f WINDOWS-1252 -t UTF-8"
    return (
        "convert it from the encoding that it was written in, which the bytes do not tell: iconv -f ENCODING -t UTF-8"
    )
