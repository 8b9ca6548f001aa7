"""What is evaluated: lengths that a scheme cannot do, scaled copies, and what is refused."""

import hashlib

import pytest
from evaluating import evaluate, model, rows, save_run

from nanope import REPO
from nanope.evaluation.models import open_run
from nanope.evaluation.parts import source_hashes
from nanope.evaluation.report import table


def test_learned_is_not_available_beyond_its_table_and_says_why(data):
    report = evaluate(model("learned"), data, [32, 64], ["same-targets"])
    assert [r["length"] for r in report["results"]] == [16, 32, 64]  # the training length is added
    base, beyond = rows(report)[16], rows(report)[64]
    assert base["cropping_baseline"] and base["nats_per_token"] > 0
    assert beyond["nats_per_token"] is None and beyond["tokens"] is None
    assert "learned" in beyond["reason"] and "16" in beyond["reason"] and "64" in beyond["reason"]
    assert "n/a" in table(report)


def test_report_has_the_cropping_baseline_beside_scaled_rows_and_na_elsewhere(data):
    scalings = {"scaling": ["pi", "yarn"], "factor": 4.0, "max_targets": 500}
    report = evaluate(model("comrope"), data, [32, 64], ["same-targets"], **scalings)
    scaled = [(s, n) for s in ("pi", "yarn") for n in (16, 32, 64)]
    assert [(r["scaling"], r["length"]) for r in report["results"]] == [("none", 16), *scaled]
    assert [r["cropping_baseline"] for r in report["results"]] == [True] + [False] * 6
    plain = evaluate(model("comrope"), data, [32, 64], ["same-targets"], max_targets=500)
    assert rows(plain)[16]["nats_per_token"] == rows(report)[16]["nats_per_token"]
    assert rows(plain)[64]["nats_per_token"] != rows(report, scaling="pi")[64]["nats_per_token"]
    for pos in ("carope", "alibi", "learned"):
        found = evaluate(model(pos), data, [32], ["same-targets"], scaling=["ntk"], factor=2.0, max_targets=500)
        assert rows(found)[16]["nats_per_token"] > 0
        assert all(r["nats_per_token"] is None and pos in r["reason"] for r in rows(found, scaling="ntk").values())


@pytest.mark.parametrize(
    "lengths, options, words",
    [
        ([100_000], {}, "longest of the"),
        ([64], {"stride": 40}, "stride 40 exceeds the shortest length 16"),
        ([0, 64], {}, "at least 1"),
        ([64], {"scaling": ["pi"], "factor": 0.5}, "factor must be at least 1"),
        ([64], {"split": "val_long", "stream": True}, "val_long is a list of documents"),
    ],
)
def test_what_cannot_be_evaluated_is_said(data, lengths, options, words):
    with pytest.raises(ValueError, match=words):
        evaluate(model(), data, lengths, ["same-targets"], **options)


def test_runs_of_several_schemes_are_evaluated(data, tmp_path):
    save_run(tmp_path / "run", data, pos=["rope+alibi", "none"], pos_options={"rope": {"base": 500.0}}, n_layer=3)
    subject = open_run(str(tmp_path / "run"), "last", None)
    report = evaluate(subject.model, data, [32], ["same-targets"])
    assert subject.about["pos"] == ["rope+alibi", "none"] and rows(report)[32]["nats_per_token"] > 0


def test_a_scheme_from_outside_changes_the_hash_of_what_figures_depend_on(tmp_path):
    path = tmp_path / "mine.py"
    source = "from schemes.base import Scheme\n\n\nclass Mine(Scheme):\n    pass\n"
    path.write_text(source)
    gpt = model(f"{path}:Mine")
    before = source_hashes(gpt)
    path.write_text(source + "# changed\n")
    assert source_hashes(gpt) != before and source_hashes(model()) != before
    for part in ("nanope/cpu_attention.py", "nanope/loss.py", "nanope/evaluation/scoring.py", "data/shards.py"):
        assert hashlib.sha256((REPO / part).read_bytes()).hexdigest() in before
