"""eval.py --model against plain transformers, one window at a time."""

import json

import numpy as np
import pytest
import torch
import transformers
from evaluating import prepare_texts
from export import export
from exporting import any_data, byte_data, save  # noqa: F401

from eval import main
from nanope.evaluation import key_tokens

LENGTHS = ["--lengths", "24", "48", "--device", "cpu"]


def straightforward(folder, data, length, stride):
    """Mean NLL of all tokens of the long documents in windows every `stride` tokens, one at a time, and their
    number."""
    net = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = np.fromfile(data.folder / "val_00000.bin", "<u2").astype(np.int64)
    nll = []
    for doc in np.split(ids, np.flatnonzero(ids == data.eot)):
        doc, done = doc[doc != data.eot], 0
        for begin in range(0, len(doc) - 1, stride) if len(doc) > 48 else ():
            end = min(begin + length, len(doc) - 1)
            window = torch.tensor(doc[begin : end + 1])
            with torch.no_grad():
                table = net(input_ids=window[None, :-1]).logits[0].double().log_softmax(-1)
            nll += [-table[t - 1 - begin, doc[t]].item() for t in range(max(done, begin) + 1, end + 1)]
            done = end
            if end == len(doc) - 1:
                break
    return np.mean(nll), len(nll)


def figures(path):
    return {(r["protocol"], r["length"]): r for r in json.loads(path.read_text())["results"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "pos, options", [("rope", {"fraction": 0.5, "base": 500.0}), pytest.param("learned", {}, marks=pytest.mark.slow)]
)
def test_an_exported_run_has_the_runs_figures(any_data, tmp_path, pos, options):  # noqa: F811
    run, _ = save(tmp_path, any_data, pos, **options)
    out = tmp_path / "hf"
    export(str(run), "last", out)
    protocols = ["--protocol", "nonoverlapping", "sliding", "same-targets", "--stride", "10", "--max_targets", "0"]
    common = [*LENGTHS, *protocols, "--json"]
    main(["--model", str(out), "--data", str(any_data.folder), *common, str(tmp_path / "model.json")])
    main(["--run", str(run), *common, str(tmp_path / "run.json")])
    theirs, mine = figures(tmp_path / "model.json"), figures(tmp_path / "run.json")
    assert theirs.keys() == mine.keys()
    for (protocol, length), row in mine.items():
        other = theirs[protocol, length]
        if pos == "learned" and length == 48:
            assert row["nats_per_token"] is None and other["nats_per_token"] is None and "48" in other["reason"]
            continue
        assert other["nats_per_token"] == pytest.approx(row["nats_per_token"], abs=1e-5)
        assert other["targets_sha256"] == row["targets_sha256"]
        if protocol != "same-targets":
            expected, tokens = straightforward(out, any_data, length, length if protocol == "nonoverlapping" else 10)
            assert tokens == row["tokens"] and expected == pytest.approx(other["nats_per_token"], abs=1e-5)


def test_what_such_models_cannot_do_is_said(byte_data, tmp_path):  # noqa: F811
    run, _ = save(tmp_path, byte_data, "rope")
    hf = tmp_path / "hf"
    export(str(run), "last", hf)
    given = ["--data", str(byte_data.folder), *LENGTHS, "--max_targets", "50", "--json", str(tmp_path / "r.json")]
    main(["--model", str(hf), *given, "--scaling", "pi", "--factor", "2", "--protocol", "same-targets", "shift"])
    report = json.loads((tmp_path / "r.json").read_text())
    reasons = [r["reason"] for r in report["results"] if r["scaling"] == "pi" or r["protocol"] == "shift"]
    assert len(reasons) == 2 + 4 and all("runs of train.py" in reason for reason in reasons)
    assert report["backend"].startswith("transformers")

    foreign = prepare_texts(tmp_path / "foreign", ["light and darkness " * (60 + i) for i in range(3)], "gpt2", 300)

    def refused(folder, data, words):
        with pytest.raises(SystemExit, match=words) as stopped:
            main(["--model", str(folder), "--data", str(data.folder), *LENGTHS])
        assert "\n" not in str(stopped.value)

    refused(tmp_path / "nothing", byte_data, "no model folder")
    refused(tmp_path, byte_data, "cannot be loaded")
    refused(hf, foreign, "vocabulary|tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hf / name).unlink()
    refused(hf, byte_data, "tokenizer")


def test_key_tokens_may_be_chosen_by_a_model_of_transformers(byte_data, tmp_path, monkeypatch):  # noqa: F811
    """The exported run chooses what the run chooses. Its attention weights are not to be had."""
    monkeypatch.setattr(key_tokens, "FALL", 0.02)  # random weights do not predict
    monkeypatch.setattr(key_tokens, "BELOW", 9.0)
    run, _ = save(tmp_path, byte_data, "rope")
    export(str(run), "last", tmp_path / "hf")
    made = []
    for judge in (run, tmp_path / "hf"):
        given = ["--max_targets", "200", "--json", str(tmp_path / "r.json"), "--key_tokens", str(judge)]
        main(["--model", str(tmp_path / "hf"), "--data", str(byte_data.folder), "--attention", "2", *LENGTHS, *given])
        made.append(json.loads((tmp_path / "r.json").read_text()))
    assert made[0]["key_tokens"]["sha256"] == made[1]["key_tokens"]["sha256"] and made[0]["key_tokens"]["tokens"] > 0
    assert {row["reason"] for row in made[0]["attention"]} == {
        "attention weights are there for runs of train.py, not for models of transformers"
    }
