"""Which tokens are scored, in which windows, against what each protocol's definition says, written out slowly."""

import json
import math

import numpy as np
import pytest
import torch
from evaluating import documents, evaluate, log_probabilities, model, nll_of_windows, rows

from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from nanope.evaluation.protocols import choose_targets, spans_of, windows_of
from nanope.evaluation.scoring import Compute, score

slow = pytest.mark.slow


@slow
@pytest.mark.parametrize("pos, stride", [("rope", 16), ("rope", 8), ("alibi", 8)])
def test_same_targets_is_what_the_specification_says(data, pos, stride):
    gpt, longest = model(pos), 128
    compute = Compute(batch_tokens=300)
    report = evaluate(gpt, data, [16, 48, 128], ["same-targets"], compute, stride=stride, max_targets=0)
    for length in (16, 48, 128):
        nll, per_document = [], []
        for ids in documents(data)[0]:
            if len(ids) < longest + 1:
                continue
            mine = []
            for end in range(longest, len(ids), stride):  # the block's last target
                table = log_probabilities(gpt, ids[end - length : end])
                mine += [-table[j, ids[end - length + j + 1]].item() for j in range(length - stride, length)]
            nll += mine
            per_document.append(np.mean(mine))
        got = rows(report)[length]
        assert got["tokens"] == len(nll)
        assert got["nats_per_token"] == pytest.approx(np.mean(nll), abs=1e-6)
        assert got["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)
        assert got["bits_per_byte"] == pytest.approx(np.mean(nll) / math.log(2), abs=1e-6)
        low, high = got["interval"]
        assert min(per_document) <= low <= got["nats_per_token"] <= high <= max(per_document)


@pytest.mark.slow
def test_nonoverlapping_scores_every_token_of_the_documents_at_every_length(data):
    gpt = model()
    report = evaluate(gpt, data, [16, 48, 128], ["nonoverlapping"], Compute(batch_tokens=1000), max_targets=0)
    long = [ids for ids in documents(data)[0] if len(ids) >= 129]
    for length in (16, 48, 128):
        nll = [n for ids in long for n in nll_of_windows(gpt, ids, length)]
        got = rows(report, "nonoverlapping")[length]
        assert got["tokens"] == len(nll) == sum(len(ids) - 1 for ids in long)
        assert got["nats_per_token"] == pytest.approx(np.mean(nll), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "length, stride", [pytest.param(64, 8, marks=slow), pytest.param(24, 10, marks=slow), (33, 16)]
)
def test_sliding_is_what_its_definition_says(data, length, stride):
    gpt = model("carope")
    report = evaluate(gpt, data, [length], ["sliding"], stride=stride, max_targets=0)
    expected = []
    for ids in documents(data)[0]:
        done = 0
        for start in range(0, len(ids) - 1, stride) if len(ids) >= length + 1 else ():
            stop = min(start + length, len(ids) - 1)
            table = log_probabilities(gpt, ids[start:stop])
            for t in range(max(done, start) + 1, stop + 1):
                scores = table[t - 1 - start]
                expected.append((-scores[ids[t]].item(), scores.argmax().item() == ids[t]))
            done = stop
            if stop == len(ids) - 1:
                break
    got = rows(report, "sliding")[length]
    assert got["tokens"] == len(expected)
    assert got["nats_per_token"] == pytest.approx(np.mean([n for n, _ in expected]), abs=1e-6)
    assert got["accuracy"] == pytest.approx(np.mean([h for _, h in expected]), abs=1e-12)


def test_per_position_is_the_mean_by_position_with_bins_and_bands(data):
    gpt = model("alibi")
    (got,) = evaluate(gpt, data, [32, 200], ["per-position"], max_targets=0)["results"]
    nll = []
    for ids in documents(data)[0]:
        for start in range(0, len(ids) - 200, 200) if len(ids) >= 201 else ():
            table = log_probabilities(gpt, ids[start : start + 200])
            nll.append([-table[j, ids[start + j + 1]].item() for j in range(200)])
    means, curve = np.array(nll), got["curve"]  # (windows, 200)
    assert got["length"] == 200 and curve["first"][0] == 1 and curve["last"][-1] == 200
    assert curve["first"][1:] == [n + 1 for n in curve["last"][:-1]]
    for i, (low, high) in enumerate(zip(curve["first"], curve["last"])):
        assert curve["nats"][i] == pytest.approx(means[:, low - 1 : high].mean(), abs=1e-6)
        assert curve["tokens"][i] == means[:, low - 1 : high].size
        assert curve["low"][i] <= curve["nats"][i] <= curve["high"][i]
    widths = np.array(curve["last"]) - np.array(curve["first"]) + 1
    assert widths[0] == 1 and widths.max() > 16  # log-spaced
    assert got["nats_per_token"] == pytest.approx(means.mean(), abs=1e-6)


def test_a_diverged_model_has_null_figures_and_a_reason(data):
    for scale in 1e4, 1e30, float("nan"):  # perplexity is beyond float64, logits beyond float32, no number at all
        gpt = model("rope")
        with torch.no_grad():
            gpt.lm_head.weight.mul_(scale)
        report = evaluate(gpt, data, [32], ["same-targets", "per-position"])
        json.dumps(report["results"], allow_nan=False)
        assert all(row["nats_per_token"] is None and "diverged" in row["reason"] for row in report["results"])


def test_per_position_of_a_table_ends_where_the_table_does(data):
    report = evaluate(model("learned"), data, [32, 64], ["per-position"])
    short, long = report["results"]
    assert (short["length"], short["curve"]["last"][-1]) == (16, 16)
    assert long["length"] == 64 and long["nats_per_token"] is None and "learned" in long["reason"]
    # It cannot claim the tokens that it did not score
    assert short["targets_sha256"] != report["targets_sha256"]["per-position"]


@pytest.mark.slow
def test_stream_runs_over_documents_and_scores_the_end_of_text_too(data):
    gpt, (_, ids) = model(), documents(data)
    report = evaluate(gpt, data, [100], ["nonoverlapping"], stream=True, max_targets=0)
    nll, got = nll_of_windows(gpt, ids, 100), rows(report, "nonoverlapping")[100]
    assert got["tokens"] == len(nll) == len(ids) - 1
    assert got["nats_per_token"] == pytest.approx(np.mean(nll), abs=1e-6)
    assert got["bits_per_byte"] == pytest.approx(np.sum(nll) / math.log(2) / (ids[1:] != 256).sum(), rel=1e-6)
    assert got["documents"] == (ids == 256).sum() and sum(got["per_document"]["tokens"]) == len(nll)


def test_val_long_is_the_documents_that_the_manifest_lists(data):
    listed = data.manifest["val_long"]
    data.manifest["val_long"] = [{"start": int(s), "tokens": int(n)} for s, n in data.split("val").documents()[:1]]
    try:
        report = evaluate(model(), data, [32], ["nonoverlapping"], split="val_long", max_targets=0)
        assert rows(report, "nonoverlapping")[32]["tokens"] == data.manifest["val_long"][0]["tokens"] - 1
    finally:
        data.manifest["val_long"] = listed


@pytest.mark.slow
def test_the_scored_tokens_and_their_hash_depend_on_neither_scheme_nor_batch(data):
    protocols = ["same-targets", "nonoverlapping"]
    first, second = (
        evaluate(model(pos), data, [32, 64], protocols, Compute(batch_tokens=budget), max_targets=400)
        for pos, budget in (("rope", 64), ("none", 4096))
    )
    assert first["targets_sha256"] == second["targets_sha256"]
    assert len({r["tokens"] for r in first["results"] if r["protocol"] == "same-targets"}) == 1
    other = evaluate(model(), data, [32, 64], ["same-targets"], max_targets=200)
    assert other["targets_sha256"]["same-targets"] != first["targets_sha256"]["same-targets"]


def test_a_subset_of_targets_has_the_scores_that_it_has_among_all(data):
    # Blocks of 50 tokens do not fit windows of 16 and 20: where a window lies must not depend on what is scored
    gpt, ids = model("none"), documents(data)[1]
    tokens, all_documents, spans = spans_of(data, "val", False, 50)
    for protocol in ("nonoverlapping", "sliding"):
        for length in (16, 20, 50):
            found = {}
            for limit in (0, 300):
                targets = choose_targets(tokens, all_documents, spans, protocol, 50, 7, limit)
                windows = windows_of(targets, protocol, length, 7)
                assert np.array_equal(windows.targets(), targets.positions)
                assert np.array_equal(ids[targets.positions], targets.ids)
                assert windows.size.max() <= length and (windows.scored >= 1).all()
                nll, _ = score(gpt, tokens, windows, Compute(batch_tokens=500))
                found[limit] = dict(zip(targets.positions.tolist(), nll))
            assert 250 < len(found[300]) < len(found[0])
            assert all(abs(found[0][p] - n) < 1e-5 for p, n in found[300].items())


def test_bits_per_byte_counts_the_bytes_of_scored_tokens(gpt2_data):

    report = evaluate(
        GPT(GPTConfig(16, 50304, 1, 2, 16), seed=0), gpt2_data, [16, 32], ["nonoverlapping"], max_targets=0
    )
    tokenizer, split = load_tokenizer("gpt2"), gpt2_data.split("val")
    n_bytes = sum(len(tokenizer.decode(split.read(s + 1, s + n)).encode()) for s, n in split.documents())
    got = rows(report, "nonoverlapping")[32]
    nats = got["nats_per_token"] * got["tokens"]
    assert got["bits_per_byte"] * n_bytes * math.log(2) == pytest.approx(nats, rel=1e-9)
