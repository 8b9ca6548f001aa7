"""Key tokens against a slow loop, what is shared and kept, and evaluators that cannot be."""

import json
import re

import numpy as np
import pytest
import torch
from evaluating import model, rows, runs, save_run  # noqa: F401
from test_probe import Oracle

import eval as command
from nanope.evaluation import key_tokens
from nanope.evaluation.compare import compare
from nanope.evaluation.key_tokens import Evaluator, key_rows, open_evaluator
from nanope.evaluation.models import Subject
from nanope.evaluation.options import Options
from nanope.evaluation.report import flat_figures, table

LENGTHS = [8, 16, 64]


def evaluator_of(gpt, data):
    return Evaluator(Subject(gpt, data, "weights", {}), "judge")


def evaluated(gpt, data, evaluator, lengths=LENGTHS):
    options = Options(lengths, ["same-targets"], max_targets=256)
    return command.evaluate(gpt, data, options, evaluator=evaluator)


def test_key_tokens_and_their_figures_are_those_of_a_slow_loop(data):
    judge, gpt = Oracle(64, 3), model("rope", 16)
    report = evaluated(gpt, data, evaluator_of(judge, data))
    split, stride = data.split("val"), report["stride"]
    spans = [span for span in split.documents().tolist() if span[1] > 64]
    blocks = [(start, end) for start, size in spans for end in range(start + 64, start + size, stride)]
    kept = [blocks[i * len(blocks) // round(256 / stride)] for i in range(round(256 / stride))]

    def loss(gpt, end, length):
        ids = split.read(end - length, end + 1).astype(np.int64)
        with torch.no_grad():
            h = gpt.hidden(torch.from_numpy(ids[:-1])[None])[0]  # (T, C)
            table = torch.log_softmax((h @ gpt.lm_head.weight.t()).double(), -1)
        return [-table[j, ids[j + 1]].item() for j in range(length - stride, length)]

    chosen, documents = [], []
    for start, end in kept:
        for i, (short, long) in enumerate(zip(loss(judge, end, 8), loss(judge, end, 64))):
            if short - long > 2 and long < 2:
                chosen.append((end, i))
                documents.append(start)
    assert 3 < len(chosen) < 128  # those that only the long context repeats
    about = report["key_tokens"]
    assert (about["tokens"], about["of"], about["lengths"]) == (len(chosen), stride * len(kept), [8, 64])
    for length, row in rows(report).items():
        nll = [loss(gpt, end, length)[i] for end, i in chosen]
        assert row["key_tokens"] == len(chosen) and row["key_nats_per_token"] == pytest.approx(np.mean(nll), abs=1e-5)
        each = row["key_per_document"]
        assert sum(each["tokens"]) == len(chosen) and len(each["nll"]) == len(set(documents))
        assert each["nll"] == pytest.approx(
            [sum(v for v, d in zip(nll, documents) if d == x) for x in sorted({*documents})], abs=1e-4
        )
        low, high = row["key_interval"]
        assert low < row["key_nats_per_token"] < high
    assert "| key tokens, length |" in table(report) and "Key tokens: " in table(report)
    assert flat_figures(report)["eval/key-tokens/16/nats_per_token"] == rows(report)[16]["key_nats_per_token"]


def test_every_model_shares_the_set_and_the_evaluator_is_asked_once(data, monkeypatch):
    calls, score = [], key_tokens.score
    monkeypatch.setattr(key_tokens, "score", lambda *args: calls.append(args[-1]) or score(*args))
    evaluator = evaluator_of(Oracle(64, 3), data)
    a, b = (evaluated(model(pos, 16), data, evaluator) for pos in ("rope", "learned"))
    assert a["key_tokens"] == b["key_tokens"] and calls == ["key tokens 8", "key tokens 64"]
    row = rows(b)[64]
    assert row["key_nats_per_token"] is None and "learned" in row["reason"]
    assert "learned" in key_rows([row])[0]["reason"]
    assert "key_tokens" not in evaluated(model("rope", 16), data, None)


def test_no_key_token_is_null_with_a_reason(data):
    blind = model("none", 64)
    with torch.no_grad():
        for block in blind.transformer["h"]:
            block.attn.c_proj.weight.zero_()  # no token sees another, so no context helps
    report = evaluated(model("rope", 16), data, evaluator_of(blind, data))
    for row in rows(report).values():
        assert row["key_nats_per_token"] is row["key_interval"] is None and row["key_tokens"] == 0
        assert "no token whose loss falls" in row["key_reason"]
    assert "key tokens n/a: no token" in table(report)


def test_compare_has_differences_of_key_tokens_and_they_are_kept(runs, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(key_tokens, "FALL", 0.1)  # random weights do not predict
    monkeypatch.setattr(key_tokens, "BELOW", 6.0)
    judge = tmp_path / "judge"
    save_run(judge, data, seed=7, n_layer=2, block_size=64)
    found, lengths = tmp_path / "found.json", ["8", "64"]
    names = [str(runs / name) for name in ("rope1", "rope2", "none1", "none2")]
    arguments = ["--lengths", *lengths, "--max_targets", "256", "--key_tokens", str(judge), "--json", str(found)]
    command.main(["--compare", *names, *arguments])
    made = json.loads(found.read_text())["comparison"]
    assert [row["length"] for row in made if row["protocol"] == "key tokens"] == [8, 16, 64]
    reports = [
        json.loads(path.read_text())
        for name in names
        for path in (runs / name.rpartition("/")[2]).glob("eval/*key_tokens*.json")
    ]
    assert len(reports) == 4 and len({json.dumps(report["key_tokens"]) for report in reports}) == 1
    assert [row for row in compare(reports) if row["protocol"] == "key tokens"] == [
        row for row in made if row["protocol"] == "key tokens"
    ]
    assert len([*(judge / "eval" / ".parts").glob("*.json")]) == 1  # of the evaluator, for the next command
    means = [np.mean([rows(r)[64]["key_nats_per_token"] for r in pair]) for pair in (reports[:2], reports[2:])]
    assert made[-1]["difference"] == pytest.approx(means[1] - means[0])


def test_a_model_that_is_its_own_evaluator_is_told(runs, data, capsys, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(key_tokens, "FALL", 0.1)
    monkeypatch.setattr(key_tokens, "BELOW", 6.0)
    run = str(runs / "rope1")
    command.main(
        [
            "--run",
            run,
            "--lengths",
            "4",
            "16",
            "--max_targets",
            "64",
            "--key_tokens",
            run,
            "--json",
            f"{tmp_path}/a.json",
        ]
    )
    assert f"{run} is judged by itself" in capsys.readouterr().out


@pytest.mark.parametrize("fields,lengths,message", [
    ({"pos": "learned"}, [16, 64], r"--key_tokens .*judge cannot score the longest length: learned positions end at"),
    ({}, [16], "--key_tokens compares two contexts: give --lengths another one than 16"),
])  # fmt: skip
def test_an_evaluator_that_cannot_is_one_line(data, tmp_path, fields, lengths, message):
    save_run(tmp_path / "judge", data, **fields)
    with pytest.raises(ValueError, match=message):
        open_evaluator(str(tmp_path / "judge"), data, Options(lengths))


def test_an_evaluator_of_another_tokenizer_or_none_is_one_line(data, gpt2_data, tmp_path):
    save_run(tmp_path / "judge", gpt2_data)
    for name, message in ((tmp_path / "judge", "tokenizer"), (tmp_path / "nowhere", "no model folder")):
        with pytest.raises(ValueError, match=rf"^--key_tokens {re.escape(str(name))}: .*{message}"):
            open_evaluator(str(name), data, Options([16, 64]))
