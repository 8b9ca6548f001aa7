"""Protocols, statistics, scaling, probe and reports of eval.py against independent computations."""

import json
import math
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml

import eval as evaluation
from data.prepare import prepare
from model import GPT, SCHEMES, GPTConfig
from nanope import REPO, checkpoint
from nanope.config import RunConfig
from nanope.evaluation.probe import KEY, VALUE, make_trials
from nanope.evaluation.protocols import PROTOCOLS
from nanope.evaluation.statistics import paired_difference
from train import train

SCALED = ("rope", "crope", "comrope")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve documents of 300 to 1,800 letters; the long ones are in val."""
    folder, words = (
        tmp_path_factory.mktemp("corpus"),
        "and the of light darkness water earth heaven day night was it so good".split(),
    )
    for i in range(12):
        text = " ".join(np.random.default_rng(i).choice(words, 400))
        (folder / f"{i}.txt").write_text(text[: 300 + 137 * i])
    return prepare(
        "files", tmp_path_factory.mktemp("data") / "byte", source=folder, tokenizer_name="byte", val_tokens=6000
    )


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Two schemes by two seeds, a few steps each."""
    out, shape = (
        tmp_path_factory.mktemp("runs"),
        {
            "block_size": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_embd": 16,
            "batch_tokens": 64,
            "max_steps": 6,
            "warmup_steps": 1,
            "eval_tokens": 64,
        },
    )
    for pos in ("rope", "none"):
        for seed in (1, 2):
            train(
                RunConfig(
                    data_dir=str(data.folder),
                    out_dir=str(out / f"{pos}{seed}"),
                    device="cpu",
                    pos=pos,
                    seed=seed,
                    data_seed=seed,
                    **shape,
                )
            )
    return out


def model(pos="rope", block_size=16, seed=3, **options):
    return GPT(GPTConfig(block_size, 320, 2, 2, 16, pos=pos, pos_options=options), seed=seed)


def documents(data):
    ids = np.concatenate([np.fromfile(data.folder / r["file"], "<u2") for r in data.manifest["splits"]["val"]]).astype(
        np.int64
    )
    return ids, [part[part != 256] for part in np.split(ids, np.flatnonzero(ids == 256))][:-1]


def scores(gpt, ids):
    """log-probabilities (T, V) after each of ids (T,)."""
    with torch.no_grad():
        return F.log_softmax(gpt(torch.from_numpy(ids)[None])[0][0].double(), -1)


def rows(report, protocol="same-targets", scaling="none"):
    return {r["length"]: r for r in report["results"] if (r["protocol"], r["scaling"]) == (protocol, scaling)}


@pytest.mark.parametrize("length, stride", [(64, 8), (24, 10), (33, 16)])
def test_sliding_is_what_its_definition_says(data, length, stride):
    gpt = model("carope")
    report = evaluation.evaluate(gpt, data, [length], ["sliding"], stride=stride, max_targets=0)
    expected = []
    for ids in documents(data)[1]:
        if len(ids) >= length + 1:
            done = 0
            for start in range(0, len(ids) - 1, stride):
                stop = min(start + length, len(ids) - 1)
                table = scores(gpt, ids[start:stop])
                expected += [
                    (-table[t - 1 - start, ids[t]].item(), table[t - 1 - start].argmax().item() == ids[t])
                    for t in range(max(done, start) + 1, stop + 1)
                ]
                done = stop
                if stop == len(ids) - 1:
                    break
    got = rows(report, "sliding")[length]
    assert got["tokens"] == len(expected)
    assert got["nats_per_token"] == pytest.approx(np.mean([n for n, _ in expected]), abs=1e-6)
    assert got["accuracy"] == pytest.approx(np.mean([h for _, h in expected]), abs=1e-12)


def test_a_subset_of_targets_has_the_scores_that_it_has_among_all(data):
    # blocks of 50 tokens that do not fit the windows of 16 and 20: where a window lies must not depend on what is scored
    gpt = model("none")
    ids = documents(data)[0]
    everything = evaluation.spans_of(data, "val", False, 50)
    for protocol in ("nonoverlapping", "sliding"):
        for length in (16, 20, 50):
            found = {}
            for limit in (0, 300):
                targets = evaluation.choose_targets(*everything, protocol, 50, 7, limit)
                windows = evaluation.windows_of(targets, protocol, length, 7)
                assert np.array_equal(windows.targets(), targets.positions) and np.array_equal(
                    ids[targets.positions], targets.ids
                )
                assert windows.size.max() <= length and (windows.scored >= 1).all()
                nll, _ = evaluation.score(
                    gpt, everything[0], windows, 500, torch.float32, evaluation.Ranks(), evaluation.tqdm(disable=True)
                )
                found[limit] = dict(zip(targets.positions.tolist(), nll))
            assert 250 < len(found[300]) < len(found[0])
            assert all(abs(found[0][p] - n) < 1e-5 for p, n in found[300].items())


def test_per_position_is_the_mean_by_position_with_bins_and_bands(data):
    gpt = model("alibi")
    report = evaluation.evaluate(gpt, data, [32, 200], ["per-position"], max_targets=0)
    (got,) = [r for r in report["results"]]
    nll = {}
    for d, ids in enumerate(documents(data)[1]):
        for start in range(0, len(ids) - 200, 200) if len(ids) >= 201 else ():
            table = scores(gpt, ids[start : start + 200])
            nll.setdefault(d, []).append([-table[j, ids[start + j + 1]].item() for j in range(200)])
    means = np.concatenate([np.array(n) for n in nll.values()])  # (windows, 200)
    curve = got["curve"]
    assert got["length"] == 200 and curve["first"][0] == 1 and curve["last"][-1] == 200
    assert curve["first"][1:] == [n + 1 for n in curve["last"][:-1]]
    for i, (low, high) in enumerate(zip(curve["first"], curve["last"])):
        assert curve["nats"][i] == pytest.approx(means[:, low - 1 : high].mean(), abs=1e-6)
        assert curve["tokens"][i] == means[:, low - 1 : high].size
        assert curve["low"][i] <= curve["nats"][i] <= curve["high"][i]
    widths = np.array(curve["last"]) - np.array(curve["first"]) + 1
    assert widths[0] == 1 and widths.max() > 16  # log-spaced
    assert got["nats_per_token"] == pytest.approx(means.mean(), abs=1e-6)


def test_per_position_of_a_table_ends_where_the_table_does(data):
    report = evaluation.evaluate(model("learned"), data, [32, 64], ["per-position"])
    short, long = report["results"]
    assert (short["length"], short["curve"]["last"][-1]) == (16, 16)
    assert long["length"] == 64 and long["nats_per_token"] is None and "learned" in long["reason"]
    assert (
        short["targets_sha256"] != report["targets_sha256"]["per-position"]
    )  # it cannot claim the tokens that it did not score


def test_stream_runs_over_documents_and_scores_the_end_of_text_too(data):
    gpt, (ids, _) = model("rope"), documents(data)
    report = evaluation.evaluate(gpt, data, [100], ["nonoverlapping"], stream=True, max_targets=0)
    nll = []
    for start in range(0, len(ids) - 1, 100):
        stop = min(start + 100, len(ids) - 1)
        table = scores(gpt, ids[start:stop])
        nll += [-table[j, ids[start + j + 1]].item() for j in range(stop - start)]
    got = rows(report, "nonoverlapping")[100]
    assert got["tokens"] == len(nll) == len(ids) - 1
    assert got["nats_per_token"] == pytest.approx(np.mean(nll), abs=1e-6)
    assert got["bits_per_byte"] == pytest.approx(np.sum(nll) / math.log(2) / (ids[1:] != 256).sum(), rel=1e-6)
    assert got["documents"] == (ids == 256).sum() and sum(got["per_document"]["tokens"]) == len(nll)


def test_val_long_is_the_documents_that_the_manifest_lists(data):
    listed = data.manifest["val_long"]
    data.manifest["val_long"] = [{"start": int(s), "tokens": int(n)} for s, n in data.split("val").documents()[:1]]
    try:
        report = evaluation.evaluate(model(), data, [32], ["nonoverlapping"], split="val_long", max_targets=0)
        assert rows(report, "nonoverlapping")[32]["tokens"] == data.manifest["val_long"][0]["tokens"] - 1
    finally:
        data.manifest["val_long"] = listed


def test_equal_likeliest_tokens_count_as_argmax_has_them():
    h, weight = torch.ones(6, 4), torch.tensor([[0.0], [1.0], [1.0], [0.5]]).expand(4, 4).clone()  # tokens 1 and 2 tie
    nll, hits = evaluation.score_head(h, weight, torch.tensor([1, 2, 3, 1, 0, 2]))
    assert hits.tolist() == [True, False, False, True, False, False]
    assert torch.allclose(nll, F.cross_entropy(h @ weight.t(), torch.tensor([1, 2, 3, 1, 0, 2]), reduction="none"))


# ---- length


@pytest.mark.parametrize("pos", [name for name, scheme in SCHEMES.items() if scheme.extends])
def test_causal_at_8192_positions(pos):
    gpt = GPT(GPTConfig(16, 64, 1, 2, 16, pos=pos), seed=0)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 8193))
    changed = tokens.copy()
    changed[0, 8000] = (changed[0, 8000] + 1) % 64
    before, after = (evaluation.score_tokens(gpt, t, np.array([8192]), torch.float32)[0] for t in (tokens, changed))
    assert np.array_equal(before[:7999], after[:7999])  # up to the target 7,999
    assert np.abs(before[8000:] - after[8000:]).max() > 1e-6


def test_memory_is_linear_in_length():
    # scores of 24,576 positions would be 2.4 GB a head, and the logits of all 2.4 GB
    code = """
import resource, sys, torch, numpy as np, eval as evaluation
from model import GPT, GPTConfig
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
gpt = GPT(GPTConfig(16, 24576, 1, 1, 16, pos="rope"), seed=0)
before = peak()
evaluation.score_tokens(gpt, np.zeros((1, 24577), np.int64), np.array([2048]), torch.float32)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400  # MB


# ---- statistics of comparisons


def draw(generator, seeds, sd_seed, sd_document, paired):
    """Two arms with no true difference: NLL sums (seeds, documents) of each, and tokens."""
    tokens, base = generator.integers(1000, 6000, 12), generator.normal(2, 0.3, 12)
    common = generator.normal(0, 0.05, seeds)
    arms = []
    for sd in (0, sd_document):
        seed = (common if paired else generator.normal(0, 0.05, seeds)) + generator.normal(0, sd_seed, seeds)
        arms.append(
            (base + generator.normal(0, sd, 12) + seed[:, None] + generator.normal(0, 0.005, (seeds, 12))) * tokens
        )
    return *arms, tokens


@pytest.mark.parametrize(
    "sd_seed, sd_document, paired", [(0.02, 0.001, True), (0.001, 0.02, True), (0.02, 0.02, True), (0.02, 0.02, False)]
)
def test_comparison_of_three_seeds_errs_as_often_as_it_says(sd_seed, sd_document, paired):
    generator = np.random.default_rng(0)
    results = [paired_difference(*draw(generator, 3, sd_seed, sd_document, paired), paired) for _ in range(400)]
    inside = np.mean([r["interval"][0] <= 0 <= r["interval"][1] for r in results])
    assert 0.92 <= inside <= 0.995  # a percentile bootstrap has 0.76 in the first case
    assert all((r["p_value"] < 0.05) == (not r["interval"][0] <= 0 <= r["interval"][1]) for r in results)
    assert results[0]["levels"] == ["seeds", "documents"]


def test_pairing_removes_what_documents_and_seeds_share():
    generator, tokens = np.random.default_rng(1), np.full(10, 1000)
    base = generator.normal(2, 1, 10) + generator.normal(0, 0.5, (3, 1))
    other = base + 0.01 + generator.normal(0, 0.001, (3, 10))
    got = paired_difference(base * tokens, other * tokens, tokens, True)
    assert got["difference"] == pytest.approx(0.01, abs=0.001) and got["p_value"] < 0.001
    assert paired_difference(base * tokens, other * tokens, tokens, False)["p_value"] > 0.5


def test_one_seed_is_a_paired_t_test_over_equal_documents():
    import scipy.stats

    generator = np.random.default_rng(2)
    a, b = generator.normal(2, 0.3, (2, 9))
    got = paired_difference(a[None] * 500, b[None] * 500, np.full(9, 500), True)
    reference = scipy.stats.ttest_rel(b, a)
    assert got["p_value"] == pytest.approx(reference.pvalue) and got["levels"] == ["documents"]
    assert got["interval"] == pytest.approx(list(reference.confidence_interval()))
    alone = paired_difference(a[None, :1], b[None, :1], np.ones(1), True)
    assert alone["interval"] is None and alone["p_value"] is None


def test_compare_command_groups_seeds_and_evaluates_on_the_same_tokens(runs, tmp_path, capsys):
    names = [str(runs / n) for n in ("rope1", "rope2", "none1", "none2")]
    evaluation.main(["--compare", *names, "--lengths", "64", "--json", str(tmp_path / "c.json")])
    printed = capsys.readouterr().out
    assert "none less rope" in printed and "2, 2, paired" in printed and "over seeds and documents" in printed
    found = json.loads((tmp_path / "c.json").read_text())["comparison"]
    reports = [json.loads(next((Path(n) / "eval").glob("*.json")).read_text()) for n in names]
    means = [rows(r)[64]["nats_per_token"] for r in reports]
    (at_64,) = [r for r in found if r["length"] == 64]
    assert at_64["difference"] == pytest.approx((means[2] + means[3] - means[0] - means[1]) / 2) and at_64["seeds"] == [
        2,
        2,
    ]
    evaluation.main(["--compare", names[0], names[2], "--lengths", "64"])
    assert "say nothing about other seeds" in capsys.readouterr().out


# ---- frequency scaling


def turned(ids, gpt, frequencies, logits=1.0):
    """Logits of a one-layer model whose head h turns pair i by frequencies[h, i], in float64, written out."""
    p = {k: v.double() for k, v in gpt.state_dict().items()}
    H, C = gpt.config.n_head, gpt.config.n_embd
    x = p["transformer.wte.weight"][ids]
    normed = lambda x, n: F.layer_norm(x, (C,), p[f"transformer.{n}.weight"])  # noqa: E731
    q, k, v = (
        (normed(x, "h.0.ln_1") @ p["transformer.h.0.attn.c_attn.weight"].t()).view(-1, 3, H, C // H).permute(1, 2, 0, 3)
    )
    angle = torch.arange(len(ids), dtype=torch.float64)[None, :, None] * frequencies[:, None]
    spin = lambda a: torch.view_as_real(
        torch.view_as_complex(a.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    ).flatten(-2)  # noqa: E731
    weights = (
        logits * spin(q) @ spin(k).mT / (C // H) ** 0.5
        + torch.full((len(ids),) * 2, -torch.inf, dtype=torch.float64).triu(1)
    ).softmax(-1)
    x = x + (weights @ v).transpose(0, 1).reshape(-1, C) @ p["transformer.h.0.attn.c_proj.weight"].t()
    x = (
        x
        + F.gelu(normed(x, "h.0.ln_2") @ p["transformer.h.0.mlp.c_fc.weight"].t(), approximate="tanh")
        @ p["transformer.h.0.mlp.c_proj.weight"].t()
    )
    return normed(x, "ln_f") @ p["lm_head.weight"].t()


@pytest.mark.parametrize("rule", ["pi", "ntk", "yarn"])
def test_scaled_frequencies_are_the_papers_formulas(rule):
    gpt, s, D, length = GPT(GPTConfig(256, 64, 1, 2, 64, pos="rope"), seed=0), 4.0, 32, 256
    theta = [10000 ** (-2 * i / D) for i in range(D // 2)]
    if rule == "pi":
        expected, logits = [t / s for t in theta], 1.0
    elif rule == "ntk":
        expected, logits = [(10000 * s ** (D / (D - 2))) ** (-2 * i / D) for i in range(D // 2)], 1.0
    else:
        ratio = [length / (2 * math.pi / t) for t in theta]
        gamma = [0 if r < 1 else 1 if r > 32 else (r - 1) / 31 for r in ratio]
        expected, logits = [(1 - g) * t / s + g * t for g, t in zip(gamma, theta)], (0.1 * math.log(s) + 1) ** 2
        assert 0 < sum(0 < g < 1 for g in gamma)
    ids = torch.randint(64, (600,), generator=torch.Generator().manual_seed(0))
    got = gpt.double().scaled(rule, s)(ids[None])[0][0]
    assert torch.allclose(
        got, turned(ids, gpt, torch.tensor(expected, dtype=torch.float64).expand(2, -1), logits), atol=1e-9
    )
    assert not torch.allclose(got, gpt(ids[None])[0][0], atol=1e-4)
    assert torch.allclose(gpt.scaled(rule, 1.0)(ids[None])[0], gpt(ids[None])[0], atol=1e-9)  # factor 1 changes nothing


@pytest.mark.parametrize("pos", SCALED)
def test_trained_and_explicit_frequencies_scale_alike(pos):
    gpt = GPT(GPTConfig(64, 64, 2, 2, 32, pos=pos), seed=0).double()
    plain = gpt.to_rope()
    ids = torch.randint(64, (1, 200), generator=torch.Generator().manual_seed(0))
    before = [block.attn.freqs.clone() for block in plain.transformer["h"]]
    for rule, expected in (
        ("pi", lambda f: f / 2),
        ("ntk", lambda f: f * 2 ** -(f.log() / math.log(10000 ** (-14 / 16))).clamp(0, 1)),
    ):
        scaled = gpt.scaled(rule, 2.0)
        for block, f in zip(scaled.transformer["h"], before):
            assert torch.allclose(block.attn.freqs, expected(f), atol=1e-12)
        assert torch.isfinite(scaled(ids)[0]).all()
    assert torch.allclose(gpt(ids)[0], plain(ids)[0])  # the model itself is left as it was


def test_report_has_the_cropping_baseline_beside_scaled_rows_and_na_elsewhere(data):
    report = evaluation.evaluate(
        model("comrope"), data, [32, 64], ["same-targets"], scalings=["pi", "yarn"], factor=4.0
    )
    assert [(r["scaling"], r["length"]) for r in report["results"]] == [
        ("none", 16),
        *[(s, n) for s in ("pi", "yarn") for n in (16, 32, 64)],
    ]
    assert [r["cropping_baseline"] for r in report["results"]] == [True] + [False] * 6
    plain = evaluation.evaluate(model("comrope"), data, [32, 64], ["same-targets"])
    assert rows(plain)[16]["nats_per_token"] == rows(report)[16]["nats_per_token"]
    assert rows(plain)[64]["nats_per_token"] != rows(report, scaling="pi")[64]["nats_per_token"]
    for pos in ("carope", "alibi", "learned"):
        found = evaluation.evaluate(model(pos), data, [32], ["same-targets"], scalings=["ntk"], factor=2.0)
        assert rows(found)[16]["nats_per_token"] > 0
        assert all(r["nats_per_token"] is None and pos in r["reason"] for r in rows(found, scaling="ntk").values())


# ---- the probe


class Oracle(nn.Module):
    """Says what followed the last occurrence of the last `reach` tokens, where the context holds one: V = C = 320 one-hot."""

    def __init__(self, block_size, reach):
        super().__init__()
        self.lm_head, self.reach = nn.Linear(320, 320, bias=False), reach
        self.lm_head.weight = nn.Parameter(torch.eye(320), requires_grad=False)
        self.config = types.SimpleNamespace(block_size=block_size, pos="none", pos_options={})

    def hidden(self, idx):
        h = torch.zeros(*idx.shape, 320)
        for row, ids in enumerate(idx.tolist()):
            for t in range(self.reach, len(ids)):
                for at in range(t - self.reach - 1, -1, -1):
                    if ids[at : at + self.reach] == ids[t - self.reach + 1 : t + 1]:
                        h[row, t, ids[at + self.reach]] = 9.0
                        break
        return h

    def check_length(self, length):
        pass


def test_probe_sees_recall_where_there_is_one_and_none_where_there_is_none(data):
    report = evaluation.evaluate(Oracle(80, KEY), data, [80], ["same-targets"], max_targets=100, probe=6)
    assert [r["length"] for r in report["probe"]] == [80, 160, 320, 640]
    for r in report["probe"]:
        assert r["recall"] > 4 and r["interval"][0] > 4 and r["accuracy"] == 1.0
        assert r["recall"] == pytest.approx(r["without_key"] - r["with_key"])
    nothing = GPT(GPTConfig(80, 320, 1, 2, 16, pos="none"), seed=0)
    with torch.no_grad():
        nothing.transformer["h"][0].attn.c_proj.weight.zero_()  # no token sees another
    for r in evaluation.evaluate(nothing, data, [80], ["same-targets"], max_targets=100, probe=4)["probe"]:
        assert r["recall"] == pytest.approx(0, abs=1e-6)


def test_probe_is_paired_over_lengths_and_seeded(data):
    split = data.split("val")
    trials, again, other = (make_trials(split, split.documents(), 640, 5, seed) for seed in (0, 0, 1))
    for a, b in zip(trials, again):
        assert np.array_equal(a.tokens(640, True), b.tokens(640, True))
    assert any(not np.array_equal(a.tokens(640, True), b.tokens(640, True)) for a, b in zip(trials, other))
    for trial in trials:
        short, long, control = trial.tokens(80, True), trial.tokens(640, True), trial.tokens(640, False)
        assert len(short) == 81 and len(long) == len(control) == 641
        assert np.array_equal(short[-KEY - VALUE :], long[-KEY - VALUE :]) and np.array_equal(
            long[-VALUE:], trial.value
        )
        assert (long != control).sum() == (trial.key != trial.other).sum()  # nothing but the key differs
    with pytest.raises(ValueError, match="needs a document of"):
        make_trials(split, split.documents(), 100_000, 5, 0)
    learned = evaluation.evaluate(model("learned", 80), data, [80], ["same-targets"], probe=3)["probe"]
    assert learned[0]["recall"] is not None and all(
        r["recall"] is None and "learned" in r["reason"] for r in learned[1:]
    )


# ---- commands


def arguments(run, *more):
    return ["--run", str(run), "--lengths", "32", "64", *map(str, more)]


def test_ranks_give_the_same_figures(runs, tmp_path):
    command = [
        str(REPO / "eval.py"),
        *arguments(runs / "rope1", "--protocol", *PROTOCOLS, "--probe", 3, "--batch_tokens", 300),
    ]
    alone = subprocess.run(
        [sys.executable, *command, "--json", str(tmp_path / "1" / "r.json")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    both = subprocess.run(
        [*launch, *command, "--json", str(tmp_path / "2" / "r.json")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert alone.returncode == 0 and both.returncode == 0, alone.stderr + both.stderr
    first, second = (json.loads((tmp_path / n / "r.json").read_text()) for n in "12")
    assert second["ranks"] == 2 and first["results"] == second["results"] and first["probe"] == second["probe"]
    assert [r["recall"] is None for r in first["probe"]] == [True, True, False, False]  # of 16, 32, 64, 128
    assert both.stdout.count("| same-targets | 64 |") == 1


def test_interrupted_evaluation_says_one_line_and_goes_on_where_it_was(runs, tmp_path, monkeypatch, capsys):
    run, real, calls = tmp_path / "run", evaluation.score, []
    shutil.copytree(runs / "rope1", run, symlinks=True)
    shutil.rmtree(run / "eval", ignore_errors=True)

    def score(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(evaluation, "score", score)
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(arguments(run))
    assert (
        stopped.value.code == 130
        and "interrupted" in capsys.readouterr().err
        and not list((run / "eval").glob("*.json"))
    )
    evaluation.main(arguments(run))
    assert len(calls) == 4  # the third length alone
    whole = json.loads(next((run / "eval").glob("*.json")).read_text())
    evaluation.main(arguments(run))
    assert len(calls) == 4 and json.loads(next((run / "eval").glob("*.json")).read_text()) == whole
    evaluation.main(arguments(run, "--max_targets", "200"))
    assert len(calls) == 7  # other tokens are other figures
    assert len(list((run / "eval").glob("*.json"))) == 2  # and another report


@pytest.mark.parametrize(
    "more, words",
    [
        (["--stride", "40"], ["stride 40", "shortest length 16"]),
        (["--scaling", "pi"], ["--factor"]),
        (["--scaling", "pi", "--factor", "0.5"], ["factor", "at least 1"]),
        (["--scaling", "pi", "--factor", "nan"], ["factor", "at least 1"]),
        (["--factor", "2"], ["--scaling"]),
        (["--scaling", "yarm", "--factor", "2"], ["yarm", "yarn"]),
        (["--protocol", "sliding", "--split", "test"], ["test", "val"]),
        (["--probe", "-1"], ["probe"]),
        (["--stream", "--split", "val_long"], ["val_long"]),
    ],
)
def test_wrong_use_gets_one_line(runs, more, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(arguments(runs / "rope1", *more))
    message = stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code not in (0, None) and all(word in message for word in words) and "\n" not in message


def test_comparisons_that_make_no_sense_are_refused(runs, capsys):
    for names, words in (
        (["rope1", "rope2"], "one experiment"),
        (["rope1", "none1", "rope1"], "name each run once"),
        (["rope1"], "two runs"),
        (["rope1", "gone"], "no run"),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluation.main(["--compare", *(str(runs / n) for n in names), "--lengths", "32"])
        message = stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err
        assert words in message


def test_figures_go_into_the_summary_of_the_runs_wandb(runs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(runs / "rope1", run, symlinks=True)
    path = checkpoint.find(run)
    state = checkpoint.load(path)
    state["config"]["wandb"] = "offline"
    checkpoint.save(Path(path).resolve(), state)
    asked, summary = {}, {}
    fake = types.ModuleType("wandb")
    fake.Error = RuntimeError
    fake.init = lambda **k: (
        asked.update(k) or types.SimpleNamespace(summary=summary, finish=lambda: asked.update(finished=True))
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    evaluation.main(arguments(run))
    report = json.loads(next((run / "eval").glob("*.json")).read_text())
    assert asked["resume"] == "allow" and asked["finished"] and asked["mode"] == "offline"
    assert summary["eval/same-targets/64/nats_per_token"] == rows(report)[64]["nats_per_token"]


def test_reports_are_gathered_and_drawn(runs, tmp_path):
    for pos in ("rope1", "none1"):
        evaluation.main(
            arguments(runs / pos, "--protocol", "same-targets", "per-position", "--json", tmp_path / f"{pos}.json")
        )
    reports = [str(tmp_path / f"{pos}.json") for pos in ("rope1", "none1")]
    assert "| same-targets | 64 |" in (tmp_path / "rope1.md").read_text()

    def script(name, *arguments):
        return subprocess.run(
            [sys.executable, str(REPO / "scripts" / name), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
        )

    gathered = script("report.py", "--csv", "all.csv", *reports)
    assert gathered.returncode == 0, gathered.stderr
    import csv

    lines = list(csv.DictReader(open(tmp_path / "all.csv")))
    report = json.loads(Path(reports[0]).read_text())
    assert len(lines) == 8 and {line["pos"] for line in lines} == {"rope", "none"}
    (cell,) = [
        line for line in lines if (line["pos"], line["protocol"], line["length"]) == ("rope", "same-targets", "64")
    ]
    assert float(cell["nats_per_token"]) == rows(report)[64]["nats_per_token"]
    assert "config.n_embd" not in cell and "config.pos" in cell  # what all runs share is left out
    drawn = script("plot_eval.py", *reports, "--out", "figure.png")
    assert drawn.returncode == 0 and (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG"), drawn.stderr
    (tmp_path / "other.json").write_text(yaml.safe_dump({"a": 1}))
    for name in ("plot_eval.py",):
        wrong = script(name, str(tmp_path / "other.json"), "--out", "x.png")
        assert wrong.returncode and wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr
