"""Runs and exports of them for the tests of export.py and of models of the transformers library."""

import numpy as np
import pytest
from evaluating import prepare_texts, save_run

WORDS = "and the of light — Wörter darkness\nwater, earth heaven day's it1 was  good".split(" ")


def prepared(folder, tokenizer):
    texts = [" ".join(np.random.default_rng(i).choice(WORDS, 150 + 20 * i)) for i in range(6)]
    return prepare_texts(folder, texts, tokenizer, val_tokens=1500)


@pytest.fixture(scope="module", params=["byte", pytest.param("gpt2", marks=pytest.mark.slow)])
def any_data(request, tmp_path_factory):
    """A data folder, once for each tokenizer."""
    return prepared(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def byte_data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("byte"), "byte")


def save(folder, data, pos, **options):
    """A run's folder and its model; crope has no biases, and the others do."""
    run = folder / pos
    return run, save_run(run, data, pos=pos, pos_options=options, block_size=24, n_layer=2, bias=pos != "crope")
