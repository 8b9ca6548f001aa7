"""Readers: every kind of file, ranges of a file, and what is said of files that cannot be read."""

import bz2
import collections
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pyarrow
import pytest
from preparing import (
    TEXTS,
    all_documents,
    contents,
    files,
    parquet,
    shard_contents,
    verses,
    with_damaged_row_group,
    write_jsonl,
    zstd,
)

from data.corpora import CORPORA
from data.files import File, find_files
from data.prepare import prepare
from data.readers import Bad, read_file
from data.shards import DataError
from data.units import Sizes, cut_group, group_files, read_unit

FILES = CORPORA["files"]


def test_every_kind_of_file_gives_the_same_folder(tmp_path):
    texts = TEXTS[:12] + ["naïve\nend", " \n ", ""]  # the last two are empty: skipped and counted
    lines = "".join(json.dumps({"other": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    made = {}
    for kind in ("txt", "txt.gz", "jsonl", "jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet", "NDJSON.Bz2", "json"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / ".hidden.txt").write_text("passed over")
        (folder / "notes.md").write_text("passed over")
        if kind.startswith("txt"):
            for i, text in enumerate(texts):
                sub = folder / f"part{i // 10}"
                sub.mkdir(exist_ok=True)
                content = text.encode("utf-8-sig" if i == 3 else "utf-8")  # a byte-order mark is not text
                (sub / f"{i:02d}.{kind}").write_bytes(gzip.compress(content) if kind == "txt.gz" else content)
        elif kind == "parquet":
            (folder / "a.parquet").write_bytes(parquet(id=range(len(texts)), text=texts[:-1] + [None]))
        else:
            pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd, ".Bz2": bz2.compress}
            (folder / f"a.{kind}").write_bytes(pack.get(Path(kind).suffix, bytes)(lines))
        made[kind] = files(tmp_path, folder, f"out-{kind}", shard_tokens=3000)
    for kind, data in made.items():
        assert shard_contents(data.folder) == shard_contents(made["jsonl"].folder), kind
        for key in ("documents", "empty", "bytes", "sha256"):
            assert data.manifest["source"][key] == made["jsonl"].manifest["source"][key], kind
    manifest = made["txt"].manifest
    assert manifest["source"]["documents"] == 13 and manifest["source"]["empty"] == 2
    assert all_documents(made["txt"]) == sorted(texts[:13])


BAD_FILES = {
    "latin1.txt": ("first\nsecond caf\u00e9\n".encode("latin1"), "latin1.txt, line 2: byte 0xe9.*iconv"),
    "latin1.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "latin1.jsonl, line 2: byte 0xe9"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', "broken.jsonl, line 3: not JSON"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}\n', "field.jsonl, line 2: no field 'text', only body, id"),
    "list.jsonl": (b"[1]\n", "list.jsonl, line 1: no field 'text', but list; an array is read where the name ends in"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}\n', "twice.jsonl, line 1: two fields are called 'text'"),
    "twice.json": (b'[{"text": "a", "text": "b"}]', "twice.json: two fields are called 'text'"),
    "object.json": (
        b'{"data": [{"text": "a"}], "v": 1}',
        "object.json, item 1: no field 'text', only data, v; --field",
    ),
    "number.json": (b"3", "number.json, item 1: no field 'text', but int"),
    "broken.json": (b'[{"text": "a"}', "broken.json: not JSON"),
    "number.jsonl": (b'{"text": 3}\n', "number.jsonl, line 1: 'text' is not text but int"),
    "short.txt.gz": (gzip.compress(b"abc" * 1000)[:-5], "short.txt.gz is damaged"),
    "not.txt.gz": (b"plain", "not.txt.gz is damaged"),
    "short.txt.xz": (lzma.compress(bytes(range(256)) * 99)[:-40], "short.txt.xz is damaged"),
    "short.txt.zst": (zstd(bytes(range(256)) * 99)[:-9], "short.txt.zst is damaged"),
    "short.txt.bz2": (bz2.compress(bytes(range(256)) * 99)[:-20], "short.txt.bz2 is damaged"),
    "empty.txt.gz": (b"", "empty.txt.gz is empty, without even the header"),
    "not.txt.zst": (b"plain text", "not.txt.zst is damaged"),
    "not.parquet": (b"PAR1 nothing", "not.parquet cannot be read"),
    "column.parquet": (
        parquet(id=[1], body=["x"]),
        r"column.parquet: no text column 'text'; it has id \(int64\), body \(string\); --field NAME",
    ),
    "twice.parquet": (
        parquet(pyarrow.table([["a"], ["b"]], ["text", "text"])),
        "twice.parquet: two columns are called 'text'",
    ),
    "error.parquet": (b'{"error": "no such file"}', 'error.parquet is not parquet: it begins with b\'{"error": '),
    "damaged.parquet": (
        with_damaged_row_group(parquet(text=TEXTS), 1),
        "damaged.parquet, row group 1 cannot be read.*--skip_bad goes on without it",
    ),
    "image.png": (b"", "no .txt, .jsonl, .parquet file .*there is 1 .png"),
    "a.parquet.gz": (b"", "no .txt, .jsonl, .parquet file .*there is 1 .parquet.gz"),
    "empty.txt": (b" \n", r"no text in the source: every document is empty \(1\)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("folder", [False, True])
def test_bad_files(tmp_path, name, folder):
    content, message = BAD_FILES[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        files(tmp_path, tmp_path / "in" if folder else tmp_path / "in" / name)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ---- files that are not what their names say ----

WESTERN, RUSSIAN = "The caf\u00e9.\nIt was open.\n" * 9, "\u041c\u0438\u0440, \u0434\u0430.\n" * 9
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 123456\n"


def jsonl(text):
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32", "UTF-32LE", "UTF-32BE"])
@pytest.mark.parametrize("text", [WESTERN, RUSSIAN], ids=["western", "russian"])
def test_wide_text_is_named_with_a_conversion_that_is_right(tmp_path, encoding, text):
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
    for kind, content in ((".txt", text), (".jsonl", jsonl(text)), (".json", json.dumps([text]))):
        for packed in pack:
            path = tmp_path / f"a{kind}{packed}"
            path.write_bytes(pack[packed](content.encode(encoding)))
            with pytest.raises(
                DataError, match=f"a{kind}{packed} .*{encoding}.*iconv -f {encoding} -t UTF-8 "
            ) as error:
                files(tmp_path, path)
        wide = content.encode(encoding)
        command = re.search(r"iconv -f \S+ -t UTF-8", str(error.value))[0].split()
        if shutil.which("iconv"):
            assert subprocess.run(command, input=wide, capture_output=True, check=True).stdout.decode() == content


@pytest.mark.parametrize(
    "content, advice",
    [
        (WESTERN.encode("latin1"), "iconv -f latin1 -t UTF-8"),
        (WESTERN.replace(".", "\u2026").encode("cp1252"), "iconv -f WINDOWS-1252 -t UTF-8"),
        (WESTERN.encode("mac_roman"), "iconv -f ENCODING"),  # 0x8e is no letter of Windows-1252
        (RUSSIAN.encode("koi8-r"), "iconv -f ENCODING"),
        ("\u3053\u3093\u306b\u3061\u306f\u4e16\n".encode("shift-jis"), "iconv -f ENCODING"),
        ((WESTERN * 20).encode() + b"caf\xe9\n" + WESTERN.encode(), "the rest is UTF-8, .*iconv -c -f UTF-8"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "see what it is: file NAME"),
    ],
    ids=["latin1", "cp1252", "mac", "koi8", "shift-jis", "damaged", "image"],
)
def test_advice_never_makes_garbage(tmp_path, content, advice):
    """An encoding is named only where the bytes speak for it."""
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"a.txt, line \d+: byte 0x.. is not UTF-8; .*{advice}"):
        files(tmp_path, tmp_path / "a.txt")


def test_a_line_of_another_encoding_among_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes((jsonl(WESTERN) * 3).encode() + jsonl("caf\u00e9").encode("latin1"))
    with pytest.raises(DataError, match="a.jsonl, line 4: byte 0xe9 is not UTF-8; the rest is UTF-8"):
        files(tmp_path, tmp_path / "a.jsonl")


def zipped(text):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as z:
        z.writestr("a.txt", text)
    return stream.getvalue()


@pytest.mark.parametrize(
    "names, content, message",
    [
        ("txt jsonl json parquet txt.gz jsonl.zst json.xz", POINTER, "is a pointer of Git LFS, .*: git lfs pull"),
        ("txt parquet", b"/annex/objects/SHA256E-s1--aa.txt\n", "is a pointer of git-annex, .*: git annex get"),
        ("parquet jsonl json", b" \n<!DOCTYPE html><html></html>", "is a web page"),
        ("txt jsonl parquet txt.xz", gzip.compress(b"text"), "is compressed by gzip, not what its name says; unpack"),
        ("txt jsonl txt.gz", lzma.compress(b"text"), "is compressed by xz"),
        ("txt jsonl txt.gz", zipped("text"), "is a zip archive"),
        ("txt json txt.gz", parquet(text=["a"]), "is a parquet file, .* end its name in .parquet"),
        ("txt", b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", "is a PDF"),
    ],
    ids=["lfs", "annex", "web", "gzip", "xz", "zip", "parquet", "pdf"],
)
def test_mistaken_files(tmp_path, names, content, message):
    for name in names.split():
        (tmp_path / f"a.{name}").write_bytes(content)
        with pytest.raises(DataError, match=f"a.{name} {message}"):
            files(tmp_path, tmp_path / f"a.{name}")


def test_text_that_only_begins_like_something_else(tmp_path):
    """Prose on Git LFS, PDF's header in ASCII, and NUL bytes that separate words are text."""
    texts = [
        POINTER.decode() + "is what a pointer looks like. " * 40,
        "%PDF-1.4 begins a PDF",
        "PAR1, a gene",
        "a\0b c",
    ]
    folder = tmp_path / "in"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    assert all_documents(files(tmp_path, folder)) == sorted(texts)


def test_a_mistaken_file_of_many_units_is_counted_once(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes((jsonl(WESTERN) * 200).encode("utf-16"))
    (folder / "b.parquet").write_bytes(parquet(body=TEXTS))
    write_jsonl(folder / "c.jsonl", TEXTS)
    data = files(tmp_path, folder, skip_bad=True, sizes=Sizes(unit=5000, least_unit=5000))
    assert data.manifest["source"]["bad"] == {"files": 2} and all_documents(data) == sorted(TEXTS)


def test_reasons_where_all_was_skipped(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(parquet(body=["x"]))
    (folder / "b.jsonl").write_text("{\n")
    (folder / "c.txt").write_text("")
    reasons = "a.parquet: no text column 'text'.*b.jsonl, line 1: not JSON"
    with pytest.raises(DataError, match=f"no text in the source: every document is empty.*1 bad files.*{reasons}"):
        files(tmp_path, folder, skip_bad=True)
    with pytest.raises(DataError, match="there is no train document"):  # of a source that is not read beforehand
        files(tmp_path, folder, skip_bad=True, sizes=Sizes(survey=0))
    assert re.search("skipped: .*a.parquet: no text column.*\n.*skipped: .*b.jsonl, line 1", capsys.readouterr().err)


# ---- fields and columns ----


def column(values, kind):
    return pyarrow.array(values, kind)


STRINGS = ["one", None, "three", ""]


@pytest.mark.parametrize(
    "values",
    [
        column(STRINGS, pyarrow.large_string()),
        column(STRINGS, pyarrow.string_view()),
        column(STRINGS, pyarrow.string()).dictionary_encode(),
        column([s and s.encode() for s in STRINGS], pyarrow.binary()),
        column([s and s.encode() for s in STRINGS], pyarrow.large_binary()),
        column([["one"], None, ["three"], []], pyarrow.list_(pyarrow.string())),
    ],
    ids=lambda values: str(values.type),
)
def test_types_of_columns(tmp_path, values):
    (tmp_path / "a.parquet").write_bytes(parquet(other=range(4), text=values))
    data = files(tmp_path, tmp_path / "a.parquet")
    assert all_documents(data) == ["one", "three"] and data.manifest["source"]["empty"] == 2


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet(text=[b"fine", b"caf\xe9", b"also"]))
    with pytest.raises(DataError, match="a.parquet, row 2: not UTF-8"):
        files(tmp_path, tmp_path / "a.parquet")
    data = files(tmp_path, tmp_path / "a.parquet", skip_bad=True)
    assert all_documents(data) == ["also", "fine"] and data.manifest["source"]["bad"] == {"rows": 1}


def test_a_column_of_nulls_is_of_empty_documents(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(parquet(text=pyarrow.nulls(5)))
    (folder / "b.parquet").write_bytes(parquet(text=["one", "two"]))
    data = files(tmp_path, folder)
    assert all_documents(data) == ["one", "two"] and data.manifest["source"]["empty"] == 5
    (folder / "b.parquet").unlink()
    with pytest.raises(DataError, match=r"every document is empty \(5\)"):
        files(tmp_path, folder, "none")


def test_fields_within_fields_and_lists(tmp_path):
    rows = [
        {"id": 1, "meta": {"body": "one"}, "meta.x": "flat"},
        {"id": 2, "meta": {"body": None}, "meta.x": "flat too"},
        {"id": 3, "meta": None, "meta.x": ""},
        {"id": 4, "meta": {"body": "four"}, "meta.x": "x"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.parquet").write_bytes(parquet(**{key: [row[key] for row in rows] for key in rows[0]}))
    lists = json.dumps({"text": ["a", None, "b"]}) + "\n" + json.dumps({"text": ["c"]})
    (tmp_path / "lists.jsonl").write_text(lists)
    for kind in ("jsonl", "json", "parquet"):
        data = files(tmp_path, tmp_path / f"a.{kind}", f"nested-{kind}", field="meta.body")
        assert all_documents(data) == ["four", "one"] and data.manifest["source"]["empty"] == 2
        assert all_documents(files(tmp_path, tmp_path / f"a.{kind}", kind, field="meta.x")) == ["flat", "flat too", "x"]
        with pytest.raises(DataError, match=r"no (field|text column) 'meta.txt'.*(only body|has id \(int64\), meta)"):
            files(tmp_path, tmp_path / f"a.{kind}", "wrong", field="meta.txt")
    assert all_documents(files(tmp_path, tmp_path / "lists.jsonl", "lists")) == ["a\nb", "c"]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "one"}, {"text": "two", "x": 1}, {"text": null}]',
        '["one", "two", ""]',
        '{"text": ["one", "two", ""], "x": [1, 2, 3]}',
        '{\n "x": [1, 2, 3],\n "text": ["one", "two", ""]\n}',
        '\ufeff{"text": "one"}\n\n{"text": "two", "x": 1}\n{"text": ""}\n',
    ],
    ids=["objects", "strings", "columns", "columns over lines", "lines"],
)
def test_json_files(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    data = files(tmp_path, tmp_path / "a.json")
    assert all_documents(data) == ["one", "two"] and data.manifest["source"]["empty"] == 1


def test_json_files_of_one_document_each(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.json").write_text(json.dumps({"text": f"text {i}", "tags": ["a", "b"]}, indent=1))
    (folder / "bad.json").write_text('[{"text": "fine"}, {"body": "no"}, 3]')
    data = files(tmp_path, folder, skip_bad=True)
    assert all_documents(data) == ["fine", "text 0", "text 1", "text 2"]
    assert data.manifest["source"]["bad"] == {"rows": 2}


# ---- separators ----


def test_separator(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>one<|endoftext|>\n<|endoftext|>two\n<|endoftext|>\n", encoding="utf-8")
    data = files(tmp_path, path, separator="<|endoftext|>")
    assert all_documents(data) == ["one", "two\n"]
    assert data.manifest["source"]["empty"] == 1  # between two separators, not at the ends of the file
    assert "endoftext" not in capsys.readouterr().err
    files(tmp_path, path, "whole")
    assert "documents contain <|endoftext|>, which is text here" in capsys.readouterr().err
    assert [name for name, _ in read_file(find_files(path)[0], separator="two")] == ["a.txt:1", "a.txt:2"]


def test_options_that_would_change_nothing(tmp_path, source):
    (tmp_path / "a.txt").write_text("text\r\n\r\n\r\nmore")
    for path, options, message in (
        (tmp_path / "a.txt", {"separator": "\n\n\n"}, r"--separator '\\n\\n\\n' is in none of the source's 1 .txt"),
        (tmp_path / "a.txt", {"field": "body"}, "--field is for rows"),
        (source, {"separator": "x"}, "--separator is for .txt files, and the source has none"),
        (source, {"separator": ""}, "--separator is empty"),
        (source, {"field": ""}, "--field is empty"),
    ):
        with pytest.raises(DataError, match=message):
            files(tmp_path, path, **options)
    with pytest.raises(DataError, match="--field does not apply: corpus novels"):
        prepare("novels", tmp_path / "out", source, field="body")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


# ---- which files ----


def test_links_and_names_of_any_case(tmp_path, capsys):
    """Each folder is read once, whatever links lead to it, and what is not read is counted."""
    source, other = tmp_path / "in", tmp_path / "other"
    for folder in (source / "sub", source / "folder.txt", source / ".git", other / "deep"):
        folder.mkdir(parents=True)
    texts = ["A.TXT", "B.Jsonl", "sub/c.txt", "folder.txt/d.text", "linked/e.txt", "linked/deep/f.txt", "sub/file.txt"]
    (source / "A.TXT").write_text("A.TXT")
    (source / "B.Jsonl").write_text(jsonl("B.Jsonl"))
    (source / "sub" / "c.txt").write_text("sub/c.txt")
    (source / "folder.txt" / "d.text").write_text("folder.txt/d.text")
    (other / "e.txt").write_text("linked/e.txt")
    (other / "deep" / "f.txt").write_text("linked/deep/f.txt")
    (tmp_path / "file").write_text("sub/file.txt")
    for link, target in {
        "linked": other,
        "same": other,
        "sub/up": source,
        "self": ".",
        "sub/file.txt": tmp_path / "file",
        "gone.txt": "nowhere",
        "loop": "loop",
    }.items():
        (source / link).symlink_to(target)
    (other / "back").symlink_to(source / "sub")
    for name in ("a.md", "b.MD", "c.pdf", ".hidden.txt", ".git/x.txt", "README", "dataset_infos.json", "d.txt.lz4"):
        (source / name).write_text("passed over")
    os.mkfifo(source / "pipe.txt")
    data = files(tmp_path, source)
    assert all_documents(data) == sorted(texts)
    assert [file.name for file in find_files(source)] == sorted(texts)
    said = capsys.readouterr().err
    for part in (
        *("2 .md", "1 .pdf", "2 hidden", "1 without a suffix", "1 dataset_infos.json", "1 .lz4", "1 pipes or devices"),
        *("broken links: gone.txt -> nowhere, loop -> loop", "read already: linked/back/, same/, self/, sub/up/"),
    ):
        assert part in said, part
    (source / "again.txt").symlink_to("sub/c.txt")
    files(tmp_path, source, "two")
    assert "links to another are read again: sub/c.txt (again.txt)" in capsys.readouterr().err


def test_what_is_there_where_nothing_is_read(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    with pytest.raises(DataError, match="no .txt, .jsonl, .parquet file .*there is no file at all"):
        files(tmp_path, source)
    for name in ("a.csv", "b.CSV", "c.docx", ".x"):
        (source / name).write_text("x")
    with pytest.raises(DataError, match="there is 2 .csv, 1 hidden, 1 .docx"):
        files(tmp_path, source)
    (source / "gone.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match="gone.txt does not exist .it is a broken link"):
        files(tmp_path, source / "gone.txt")
    os.mkfifo(source / "pipe.txt")
    with pytest.raises(DataError, match="pipe.txt is a pipe"):
        files(tmp_path, source / "pipe.txt")


def test_a_data_folder_within_its_source_is_no_source(tmp_path, source):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(source, folder)
    made = files(folder, folder)
    assert contents(files(folder, folder).folder) == contents(made.folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path, source):
    for name in ("folder", "file.txt"):
        path = tmp_path / name
        path.mkdir() if name == "folder" else path.write_text("x")
        path.chmod(0)
        with pytest.raises(DataError, match=f"{name} cannot be read: Permission denied"):
            files(tmp_path, tmp_path)
        path.chmod(0o700)


def test_parquet_that_is_not_utf8(tmp_path):
    values = pyarrow.array([b"fine", b"caf\xe9", None, b"also fine"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 4, values.buffers())
    (tmp_path / "a.parquet").write_bytes(parquet(text=text))
    with pytest.raises(DataError, match="a.parquet, row 2: not UTF-8"):
        files(tmp_path, tmp_path / "a.parquet")
    data = files(tmp_path, tmp_path / "a.parquet", skip_bad=True)
    assert all_documents(data) == ["also fine", "fine"]
    assert data.manifest["source"]["bad"] == {"rows": 1} and data.manifest["source"]["empty"] == 2


@pytest.mark.slow
def test_skipped_row_groups_and_files(corpus, tmp_path, capsys):
    folder, texts = tmp_path / "in", corpus[1]
    shutil.copytree(corpus[0], folder)
    damaged = folder / "001_00000.parquet"
    damaged.write_bytes(with_damaged_row_group(damaged.read_bytes(), 2))
    (folder / "003_00000.parquet").write_bytes(b"PAR1 not at all")
    data = prepare("fineweb-edu", tmp_path / "skipped", folder, val_tokens=20_000, skip_bad=True)
    assert all_documents(data) == sorted(t for i, t in enumerate(texts) if t and t.strip() and not 350 <= i < 400)
    assert data.manifest["source"]["bad"] == {"row groups": 1, "files": 1}
    assert "skipped: " in capsys.readouterr().err
    with pytest.raises(DataError, match="skip_bad True there, False now"):
        prepare("fineweb-edu", tmp_path / "skipped", folder, val_tokens=20_000)


def test_skipped_lines_and_documents(tmp_path):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(9)]
    lines[3], lines[6] = "{", json.dumps({"text": "x" + " " * 1_500_000 + "y"})  # which tiktoken cannot encode
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "c.jsonl").write_text("\n".join(lines))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:3] * 9).encode())[:-12])
    data = files(tmp_path, folder, tokenizer="gpt2", skip_bad=True, shard_tokens=4, val_tokens=20)
    assert data.manifest["source"]["bad"] == {"documents": 1, "lines": 1, "files": 1}
    assert set(all_documents(data)) == {f"text {i}" for i in range(9) if i not in (3, 6)}


def test_reading_does_not_hold_the_corpus(tmp_path):
    """The first document is there before the last line, which is broken, has been read."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 1000}) + "\n" + "broken")
    rows = read_file(File(path.name, 0, "", path=str(path)))
    assert next(rows) == ("a.jsonl:1", "x" * 1000)
    with pytest.raises(DataError):
        next(rows)


def test_lone_surrogates_are_replaced_before_anything_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "one \ud83d\ude00 \ud800."}' + "\n" + r'{"text": "two"}' + "\n")
    data = files(tmp_path, tmp_path / "a.jsonl")
    assert all_documents(data) == ["one 😀 \ufffd.", "two"]
    assert data.manifest["source"]["bytes"] == 4 + 4 + 1 + 3 + 1 + 3


# ---- ranges of a file ----


@pytest.mark.parametrize("end", ["\n", ""])
def test_ranges_of_a_jsonl_file_are_the_file(tmp_path, end):
    rng = random.Random(0)
    lines = [json.dumps({"text": "é" * rng.randrange(1, 60)}, ensure_ascii=False) for _ in range(50)]
    lines[7:7] = ["", "  "]
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n".join(lines) + end, encoding="utf-8")
    file = File("a.jsonl", path.stat().st_size, "", path=str(path))
    expected = list(read_file(file))
    assert len(expected) == 50
    for size in (7, 40, 100, 1000, 10**6):
        cut = cut_group(0, [file], FILES, size)
        assert (len(cut) > 1) == (size < file.bytes)
        assert [row for unit in cut for row in read_unit(unit, FILES, Bad())] == expected
    path.write_text("\n".join([*lines, "broken"]))
    bad = Bad(skip=True)
    for unit in cut_group(0, [File("a.jsonl", path.stat().st_size, "", path=str(path))], FILES, 100):
        collections.deque(read_unit(unit, FILES, bad), 0)
    assert bad.counts == {"lines": 1} and "line 53: not JSON" in bad.messages[0]


def test_small_files_share_a_unit_and_large_ones_have_several(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"text {i}\n" * 20)
    write_jsonl(folder / "big.jsonl", verses(200))
    listed = find_files(folder)
    groups = group_files(listed, FILES, 6000)
    assert [len(group) for group in groups] == [13, 12, 5, 1]  # of 7 or 8 bytes × 20 each, 2,000 together at most
    assert len(cut_group(3, groups[3], FILES, 100_000)) == round(listed[-1].bytes / 100_000) > 2
    assert sum(groups, []) == listed
