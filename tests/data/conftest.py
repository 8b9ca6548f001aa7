"""Corpora and folders that several tests of data/ read."""

import pytest
from preparing import TEXTS, finish, start, verses, write_jsonl, write_parquet

from data.shards import open_data


@pytest.fixture
def source(tmp_path):
    """A .jsonl file of TEXTS."""
    return write_jsonl(tmp_path / "texts.jsonl", TEXTS)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """(folder of three files, their texts in order): 750 documents, some empty, some several times."""
    folder = tmp_path_factory.mktemp("fineweb")
    texts = list(verses(740))
    texts[5:5] = [None, "", " \n", texts[40], texts[40]]
    texts[600:600] = [texts[2]] * 5
    for i, name in enumerate(("000_00000", "001_00000", "002_00000")):
        write_parquet(folder / f"{name}.parquet", texts[i * 250 : (i + 1) * 250])
    return folder, texts


@pytest.fixture(scope="session")
def whole(corpus, tmp_path_factory):
    """What an uninterrupted run with small units makes of that corpus."""
    out = tmp_path_factory.mktemp("whole") / "data"
    finish(start(out, source=corpus[0]))
    return open_data(out)
