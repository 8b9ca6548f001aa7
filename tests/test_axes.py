"""A run with coordinates in the text: trained, resumed, evaluated, sampled. The checkpoint holds what tokens are."""

import json
import signal
import sys

import pytest
import sample
import torch
from training import at_step, kill, last, same_run, words

import eval as evaluation
from data.prepare import prepare
from data.tokenizer import load_tokenizer
from nanope import coordinates
from nanope.config import RunConfig
from train import main, train


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["byte", "gpt2"])
def test_a_run_with_several_axes(tokenizer, tmp_path, monkeypatch, capsys):
    prepare("builtin", tmp_path / "data", tokenizer_name=tokenizer)
    fields = dict(data_dir=str(tmp_path / "data"), pos="comrope", block_size=64, n_layer=1, n_head=2, n_embd=32)
    fields |= dict(pos_options={"axes": ["token", "line", "byte"], "kind": "ld", "jitter": 0.1}, max_steps=3)
    fields |= dict(batch_tokens=256, micro_batch_size=2, warmup_steps=1, eval_tokens=256, log_interval=1, device="cpu")
    main(words(fields | {"out_dir": tmp_path / "whole"}))
    cut = RunConfig(**fields, out_dir=str(tmp_path / "cut"))
    assert train(cut, at_step({1: kill(signal.SIGTERM)}))["step"] == 2
    main(words(fields | {"out_dir": tmp_path / "cut", "resume": True}))
    assert same_run(tmp_path / "whole", tmp_path / "cut")
    own, table = load_tokenizer(tokenizer), last(tmp_path / "whole")["model"]["token_text"]
    assert torch.equal(table, coordinates.table(own.tokens, len(table), own.eot))

    evaluation.main(
        ["--run", str(tmp_path / "whole"), "--lengths", "1x", "2x", "--max_targets", "256", "--device", "cpu"]
    )
    report = json.loads(next((tmp_path / "whole" / "eval").glob("*.json")).read_text())
    assert [row["length"] for row in report["results"]] == [64, 128]
    assert all(row["nats_per_token"] > 0 for row in report["results"])
    monkeypatch.setattr(
        sys, "argv", ["sample.py", "--run", str(tmp_path / "cut"), "--prompt", "In the", "--tokens", "9"]
    )
    capsys.readouterr()
    sample.main()
    assert capsys.readouterr().out.startswith("In the")
