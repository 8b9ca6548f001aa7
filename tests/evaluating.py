"""Tiny data and runs for the tests of evaluation, and the slow computations that they compare with."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as command
from data.prepare import prepare
from model import GPT, GPTConfig
from nanope import checkpoint
from nanope.config import RunConfig, padded_vocabulary
from nanope.evaluation.options import Options

WORDS = "and the of light darkness water earth heaven day night was it so good".split()
SHAPE = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}


def prepare_texts(folder, texts, tokenizer="byte", val_tokens=6000):
    """A data folder of these texts."""
    source = folder / "texts"
    source.mkdir(parents=True)
    for i, text in enumerate(texts):
        (source / f"{i}.txt").write_text(text)
    return prepare("files", folder / "data", source=source, tokenizer_name=tokenizer, val_tokens=val_tokens)


def random_text(seed: int, length: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, length // 2))[:length]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twelve documents of 300 to 1,800 letters; the long ones are in val."""
    return prepare_texts(tmp_path_factory.mktemp("byte"), [random_text(i, 300 + 137 * i) for i in range(12)])


@pytest.fixture(scope="session")
def gpt2_data(tmp_path_factory):
    """The same in GPT-2's tokens."""
    texts = [random_text(i, 900) for i in range(4)]
    return prepare_texts(tmp_path_factory.mktemp("gpt2"), texts, "gpt2", val_tokens=400)


@pytest.fixture(scope="session")
def runs(data, tmp_path_factory):
    """A folder of runs: two schemes by two seeds."""
    out = tmp_path_factory.mktemp("runs")
    for pos in ("rope", "none"):
        for seed in (1, 2):
            save_run(out / f"{pos}{seed}", data, pos=pos, seed=seed, data_seed=seed)
    return out


def save_run(folder, data, **fields):
    """A run's folder with one checkpoint, of step 4, without any training: random weights, larger than initial ones,
    so that positions matter. Returns its model."""
    config = RunConfig(**{"data_dir": str(data.folder), "out_dir": str(folder), "device": "cpu", **SHAPE, **fields})
    config.vocab_size = padded_vocabulary(data.vocab_size)
    shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(GPTConfig) if hasattr(config, f.name)}
    gpt = GPT(GPTConfig(**shape), seed=config.seed).eval()
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    state = {
        "model": gpt.state_dict(),
        "step": 4,
        "tokenizer": dict(data.manifest["tokenizer"]),
        "data_hash": data.hash,
    }
    state["config"] = dataclasses.asdict(config) | {"pos_options": gpt.config.pos_options}
    checkpoint.save_step(folder, state, keep=1)
    return gpt


def model(pos="rope", block_size=16, **options):
    return GPT(GPTConfig(block_size, 320, 2, 2, 16, pos=pos, pos_options=options), seed=3)


def evaluate(gpt, data, lengths, protocol, compute=None, parts=None, **options):
    return command.evaluate(gpt, data, Options(lengths, protocol, **options), compute, parts)


def documents(data):
    """The validation documents as token arrays, read without our reader, and the ids of the whole split."""
    files = [data.folder / record["file"] for record in data.manifest["splits"]["val"]]
    ids = np.concatenate([np.fromfile(file, "<u2") for file in files]).astype(np.int64)
    return [part[part != data.eot] for part in np.split(ids, np.flatnonzero(ids == data.eot))][:-1], ids


def log_probabilities(gpt, ids):
    """(T, V) float64, after each of ids (T,)."""
    with torch.no_grad():
        return F.log_softmax(gpt(torch.from_numpy(ids)[None])[0][0].double(), -1)


def nll_of_windows(gpt, ids, length):
    """NLL of every token but the first of ids (T,), in consecutive windows."""
    nll = []
    for start in range(0, len(ids) - 1, length):
        stop = min(start + length, len(ids) - 1)
        table = log_probabilities(gpt, ids[start:stop])
        nll += [-table[j, ids[start + j + 1]].item() for j in range(stop - start)]
    return nll


def rows(report, protocol="same-targets", scaling="none"):
    """Length → row."""
    return {r["length"]: r for r in report["results"] if (r["protocol"], r["scaling"]) == (protocol, scaling)}
