"""eval.py against independent slow computations, and the scripts that use it."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from data.prepare import prepare
from data.shards import open_data
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from nanope import REPO
from nanope.config import RunConfig
from nanope.evaluation.statistics import row_figures
from train import train


def text(seed: int, length: int) -> str:
    words = "and the of light darkness water earth heaven day night was it so good".split()
    generator = np.random.default_rng(seed)
    return " ".join(generator.choice(words, length // 4))[:length]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten documents of different lengths, of which some are validation."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(10):
        (folder / f"{i}.txt").write_text(text(i, 300 + 137 * i))
    return prepare("files", folder.parent / "data", source=folder, tokenizer_name="byte", val_tokens=5000)


def model(pos="rope", block_size=16, **options):
    return GPT(GPTConfig(block_size, 320, 2, 2, 16, pos=pos, pos_options=options), seed=3)


def documents(data):
    """The validation documents as token arrays, read without our reader."""
    ids = np.concatenate([np.fromfile(data.folder / r["file"], "<u2") for r in data.manifest["splits"]["val"]]).astype(
        np.int64
    )
    ends = np.flatnonzero(ids == 256)
    return [part[part != 256] for part in np.split(ids, ends)][:-1]


def log_probabilities(gpt, ids):
    with torch.no_grad():
        return F.log_softmax(gpt(torch.from_numpy(ids)[None])[0].double(), -1)[0]


def row(report, length, protocol="same-targets"):
    (found,) = [r for r in report["results"] if (r["length"], r["protocol"]) == (length, protocol)]
    return found


@pytest.mark.parametrize("pos", ["rope", "carope", "alibi"])
def test_same_targets_is_what_the_specification_says(data, pos):
    gpt, longest, stride = model(pos), 128, 8
    report = evaluation.evaluate(
        gpt, data, [16, 48, 128], ["same-targets"], stride=stride, max_targets=0, batch_tokens=300
    )
    for length in (16, 48, 128):
        nll, per_document = [], []
        for ids in documents(data):
            if len(ids) < longest + 1:
                continue
            mine = []
            for end in range(longest, len(ids), stride):  # the block's last target
                scores = log_probabilities(gpt, ids[end - length : end])
                for j in range(length - stride, length):
                    mine.append(-scores[j, ids[end - length + j + 1]].item())
            nll += mine
            per_document.append(np.mean(mine))
        got = row(report, length)
        assert got["tokens"] == len(nll)
        assert got["nats_per_token"] == pytest.approx(np.mean(nll), abs=1e-6)
        assert got["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)
        assert got["bits_per_byte"] == pytest.approx(np.mean(nll) / math.log(2), abs=1e-6)
        assert (
            min(per_document) <= got["interval"][0] <= got["nats_per_token"] <= got["interval"][1] <= max(per_document)
        )


def test_nonoverlapping_scores_every_token_of_the_documents_at_every_length(data):
    gpt = model()
    report = evaluation.evaluate(gpt, data, [16, 48, 128], ["nonoverlapping"], max_targets=0, batch_tokens=1000)
    long = [ids for ids in documents(data) if len(ids) >= 129]
    for length in (16, 48, 128):
        nll = []
        for ids in long:
            for start in range(0, len(ids) - 1, length):
                stop = min(start + length, len(ids) - 1)
                scores = log_probabilities(gpt, ids[start:stop])
                nll += [-scores[j, ids[start + j + 1]].item() for j in range(stop - start)]
        got = row(report, length, "nonoverlapping")
        assert got["tokens"] == len(nll) == sum(len(ids) - 1 for ids in long)
        assert got["nats_per_token"] == pytest.approx(np.mean(nll), abs=1e-6)


def test_the_scored_tokens_and_their_hash_depend_on_neither_scheme_nor_batch(data):
    reports = [
        evaluation.evaluate(
            model(pos), data, [32, 64], ["same-targets", "nonoverlapping"], max_targets=400, batch_tokens=budget
        )
        for pos, budget in (("rope", 64), ("none", 4096))
    ]
    assert reports[0]["targets_sha256"] == reports[1]["targets_sha256"]
    assert len({r["tokens"] for r in reports[0]["results"] if r["protocol"] == "same-targets"}) == 1
    other = evaluation.evaluate(model(), data, [32, 64], ["same-targets"], max_targets=200)
    assert other["targets_sha256"]["same-targets"] != reports[0]["targets_sha256"]["same-targets"]


def test_batches_do_not_change_the_figures(data):
    gpt = model("carope")
    figures = [
        evaluation.evaluate(gpt, data, [16, 64], ["same-targets"], batch_tokens=n)["results"][1]["nats_per_token"]
        for n in (64, 10_000)
    ]
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)


def test_learned_is_not_available_beyond_its_table_and_says_why(data):
    report = evaluation.evaluate(model("learned"), data, [32, 64], ["same-targets"])
    assert [r["length"] for r in report["results"]] == [16, 32, 64]  # the training length is added
    base = row(report, 16)
    assert base["cropping_baseline"] and base["nats_per_token"] > 0
    beyond = row(report, 64)
    assert beyond["nats_per_token"] is None and beyond["tokens"] is None
    assert "learned" in beyond["reason"] and "16" in beyond["reason"] and "64" in beyond["reason"]
    assert "n/a" in evaluation.table(report)


def test_means_weight_tokens_not_documents():
    nll, document = np.array([1.0, 1.0, 1.0, 5.0]), np.array([0, 0, 0, 2])
    figures = row_figures(nll, np.array([True, True, False, False]), np.array([1, 2, 1, 4]), document, 1000, 0)
    assert figures["nats_per_token"] == 2.0 and figures["documents"] == 2 and figures["accuracy"] == 0.5
    assert figures["bits_per_byte"] == pytest.approx(8 / math.log(2) / 8)
    assert figures["interval"] == [1.0, 5.0]  # two documents: resamples reach both extremes
    assert row_figures(nll, nll > 2, nll, np.zeros(4, int), 1000, 0)["interval"] is None
    assert figures["per_document"] == {"document": [0, 2], "nll": [3.0, 5.0], "tokens": [3, 1]}


def test_bootstrap_interval_covers_as_it_says():
    # The mean of documents drawn from a known distribution lies in the 95 % interval about 95 times of 100
    generator, hits = np.random.default_rng(0), 0
    for trial in range(100):
        means = generator.normal(2.0, 0.3, 40)
        nll = np.repeat(means, 5)
        low, high = row_figures(nll, nll > 2, np.ones(200), np.repeat(np.arange(40), 5), 1000, trial)["interval"]
        hits += low <= 2.0 <= high
    assert 86 <= hits <= 100


def test_bits_per_byte_counts_the_bytes_of_scored_tokens(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(text(i, 900))
    data = prepare("files", tmp_path / "data", source=folder, tokenizer_name="gpt2", val_tokens=400)
    gpt = GPT(GPTConfig(16, 50304, 1, 2, 16), seed=0)
    report = evaluation.evaluate(gpt, data, [16, 32], ["nonoverlapping"], max_targets=0)
    tokenizer, split = load_tokenizer("gpt2"), data.split("val")
    n_bytes = sum(len(tokenizer.decode(split.read(s + 1, s + n)).encode()) for s, n in split.documents())
    got = row(report, 32, "nonoverlapping")
    assert got["bits_per_byte"] * n_bytes * math.log(2) == pytest.approx(
        got["nats_per_token"] * got["tokens"], rel=1e-9
    )


def test_what_cannot_be_evaluated_is_said(data):
    with pytest.raises(ValueError, match="longest of the"):
        evaluation.evaluate(model(), data, [100_000], ["same-targets"])
    with pytest.raises(ValueError, match="stride 40 exceeds the shortest length 16"):
        evaluation.evaluate(model(), data, [64], ["same-targets"], stride=40)
    with pytest.raises(ValueError, match="at least 1"):
        evaluation.evaluate(model(), data, [0, 64], ["same-targets"])


# ---- commands


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    shape = {
        "block_size": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "batch_tokens": 64,
        "max_steps": 4,
        "warmup_steps": 1,
        "eval_tokens": 64,
    }
    train(RunConfig(data_dir=str(data.folder), out_dir=str(out), device="cpu", **shape))
    return out


def test_command_writes_a_report_that_names_its_conditions(run, data, capsys):
    evaluation.main(["--run", str(run), "--lengths", "32", "64", "--protocol", "same-targets", "nonoverlapping"])
    printed = capsys.readouterr().out
    (path,) = (run / "eval").glob("*.json")
    report = json.loads(path.read_text())
    assert {(r["length"], r["protocol"]) for r in report["results"]} == {
        (n, p) for n in (16, 32, 64) for p in ("same-targets", "nonoverlapping")
    }
    assert f"{row(report, 64)['nats_per_token']:.4f}" in printed
    assert report["data_hash"] == open_data(data.folder).hash and report["step"] == 4
    assert report["checkpoint_sha256"] == (run / "checkpoints" / "step_4.pt.sha256").read_text().strip()
    assert {"stride", "dtype", "backend", "seed", "targets_sha256"} <= report.keys()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--run", "RUN/nowhere", "--lengths", "32"], ["nowhere"]),
        (["--run", "RUN", "--lengths", "32", "--checkpoint", "7"], ["7", "step_4.pt"]),
        (["--run", "RUN", "--lengths", "99999"], ["99999", "longest"]),
        (["--run", "RUN", "--lengths", "32", "--protocol", "same-target"], ["same-target", "same-targets"]),
        (["--run", "RUN", "--lengths", "32", "--strde", "4"], ["--strde", "--stride"]),
        (["--run", "RUN", "--lengths", "x"], ["x"]),
        (["--run", "RUN", "--lengths", "32", "--resamples", "10"], ["resamples", "1000"]),
        (["--run", "RUN", "--lengths", "32", "--split", "vall"], ["vall", "val"]),
        (["--run", "RUN", "--lengths", "32", "--data", "RUN/none"], ["RUN/none", "prepare.py"]),
    ],
)
def test_careless_commands_get_one_clear_message(run, arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([a.replace("RUN", str(run)) for a in arguments])
    message = str(stopped.value) if isinstance(stopped.value.code, str) else capsys.readouterr().err
    assert stopped.value.code != 0 and "Traceback" not in message
    for word in words:
        assert word.replace("RUN", str(run)) in message


def test_damaged_checkpoint_and_foreign_data_are_refused(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    path = copy / "checkpoints" / "step_4.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="step_4.pt is truncated or altered"):
        evaluation.main(["--run", str(copy), "--lengths", "32"])
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(text(i, 900))
    prepare("files", tmp_path / "gpt2", source=folder, tokenizer_name="gpt2")
    with pytest.raises(SystemExit, match="trained with tokenizer byte.*gpt2"):
        evaluation.main(["--run", str(run), "--lengths", "32", "--data", str(tmp_path / "gpt2")])


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=REPO, capture_output=True, text=True, timeout=300, **options
    )


def test_sample_continues_the_prompt_and_is_repeatable(run):
    first, second = (
        command("scripts/sample.py", "--run", run, "--prompt", "the light", "--tokens", 40, "--seed", 1)
        for _ in range(2)
    )
    assert first.returncode == 0 and first.stdout.startswith("the light") and first.stdout == second.stdout
    failed = command("scripts/sample.py", "--run", run / "none")
    assert failed.returncode and "none" in failed.stderr and "Traceback" not in failed.stderr
