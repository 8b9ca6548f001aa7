"""scripts/export.py: models in the layout of transformers, and what runs on them."""

import json
import subprocess
import sys

import export as command
import numpy as np
import pytest
import torch
import transformers
from exporting import any_data, byte_data, save  # noqa: F401

from data.tokenizer import load_tokenizer
from nanope import REPO


@pytest.mark.parametrize(
    "pos, options",
    [
        ("learned", {}),
        pytest.param("rope", {"fraction": 0.5, "base": 500.0}, marks=pytest.mark.slow),
        pytest.param("crope", {}, marks=pytest.mark.slow),
    ],
)
def test_exported_model_and_tokenizer_are_the_same(any_data, tmp_path, pos, options):  # noqa: F811
    run, model = save(tmp_path, any_data, pos, **options)
    out = tmp_path / "hf"
    command.export(str(run), "last", out)
    net = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(net).__name__ == ("GPT2LMHeadModel" if pos == "learned" else "GPTNeoXForCausalLM")
    idx = torch.randint(any_data.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (net(input_ids=idx).logits - model(idx)[0]).abs().max() < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours = load_tokenizer(any_data.manifest["tokenizer"]["name"])
    text = "Hello  world, it's — 漢字\n\n\x00 day"
    assert tokenizer(text)["input_ids"] == ours.encode(text).tolist() and tokenizer.decode(ours.encode(text)) == text
    assert tokenizer.eos_token_id == ours.eot == net.config.eos_token_id


@pytest.mark.slow
def test_interpolated_positions_are_transformers_linear_scaling(byte_data, tmp_path):  # noqa: F811
    run, model = save(tmp_path, byte_data, "rope")
    command.export(str(run), "last", tmp_path / "hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 4.0}
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", config=config)
    idx = torch.randint(byte_data.vocab_size, (1, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(model.scaled("pi", 4.0)(idx)[0], net(input_ids=idx).logits, atol=1e-4)


@pytest.mark.slow
def test_command(byte_data, tmp_path):  # noqa: F811
    def run(*arguments):
        line = [sys.executable, str(REPO / "scripts" / "export.py"), *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=300)

    done = run(save(tmp_path, byte_data, "rope")[0], "--to", "hf", "--out", tmp_path / "hf")
    assert done.returncode == 0 and (tmp_path / "hf" / "config.json").is_file(), done.stderr
    failed = run(save(tmp_path, byte_data, "alibi")[0], "--out", tmp_path / "x")
    assert failed.returncode and "cannot be exported" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.slow
def test_what_cannot_be_written_is_said(byte_data, tmp_path):  # noqa: F811
    run, _ = save(tmp_path, byte_data, "rope")
    with pytest.raises(ValueError, match="exists"):
        command.export(str(run), "last", tmp_path)
    with pytest.raises(ValueError, match="do not use it"):
        command.export(str(run), "last", tmp_path / "hf", tolerance=0.0)


def test_exported_model_runs_in_lm_evaluation_harness(byte_data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    lm_eval = pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not among the requirements: pip install lm-eval"
    )
    from lm_eval.tasks import TaskManager

    run, model = save(tmp_path, byte_data, "rope")
    command.export(str(run), "last", tmp_path / "hf")
    ids = byte_data.split("val").read(0, 72)  # three windows of 24, each predicted from what is before
    text = load_tokenizer("byte").decode(ids)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    task = {
        "task": "local_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "text.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(json.dumps(task))
    arguments = {
        "model": "hf",
        "model_args": f"pretrained={tmp_path / 'hf'}",
        "tasks": ["local_text"],
        "device": "cpu",
        "batch_size": 1,
        "bootstrap_iters": 0,
        "task_manager": TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    }
    found = lm_eval.simple_evaluate(**arguments)["results"]["local_text"]["bits_per_byte,none"]
    inputs = torch.from_numpy(np.concatenate(([byte_data.eot], ids[:-1])).reshape(3, 24))
    with torch.no_grad():
        nll = model(inputs, torch.from_numpy(ids.reshape(3, 24)), reduction="none")[1].double().sum().item()
    assert found == pytest.approx(nll / np.log(2) / len(text.encode()), abs=1e-4)
