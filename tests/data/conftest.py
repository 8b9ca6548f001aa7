"""Corpora and folders that several tests of data/ read."""

import pytest
from preparing import SMALL, TEXTS, verses, write_jsonl, write_parquet

import data.publish
from data.prepare import prepare
from data.summary import lengths_figure


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
    """What an uninterrupted run with small units makes of that corpus, as the command `start` does, with its figure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.publish, "lengths_figure", lengths_figure)
        return prepare("fineweb-edu", tmp_path_factory.mktemp("whole") / "data", corpus[0], **SMALL)
