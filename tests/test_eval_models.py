"""Export to the transformers library, and eval.py --model, against plain transformers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import eval as evaluation
from data.prepare import prepare
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from nanope import REPO, checkpoint


@pytest.fixture(scope="module", params=["byte", "gpt2"])
def data(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(6):
        words = np.random.default_rng(i).choice(
            "and the of light — Wörter darkness\nwater, earth heaven day's it1 was  good".split(" "), 150 + 20 * i
        )
        (folder / f"{i}.txt").write_text(" ".join(words))
    return prepare(
        "files", tmp_path_factory.mktemp("data") / "it", source=folder, tokenizer_name=request.param, val_tokens=1500
    )


def save(folder, data, pos, **options):
    """A run's checkpoint with random weights, larger than initial ones, so that positions matter."""
    c = {
        "block_size": 24,
        "vocab_size": -(-data.vocab_size // 64) * 64,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "bias": pos != "crope",
        "pos": pos,
        "pos_options": options,
    }
    model = GPT(GPTConfig(**c), seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.2)
    c |= {"data_dir": str(data.folder), "dropout": 0.0, "seed": 0, "data_seed": 0}
    path = folder / pos / "checkpoints" / "step_1.pt"
    checkpoint.save(
        path,
        {
            "model": model.state_dict(),
            "config": c | {"pos_options": model.config.pos_options},
            "step": 1,
            "tokenizer": dict(data.manifest["tokenizer"]),
        },
    )
    (folder / pos / "last.pt").symlink_to(path.relative_to(folder / pos))
    return folder / pos, model.eval()


def export(*arguments):
    return subprocess.run(
        [sys.executable, str(REPO / "scripts" / "export.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def straightforward(folder, data, length, stride):
    """Mean NLL of all tokens of the long documents in windows every `stride` tokens, one at a time, by plain transformers."""
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


def figures(report):
    return {(r["protocol"], r["length"]): r for r in report["results"]}


@pytest.mark.parametrize("pos, options", [("learned", {}), ("rope", {"fraction": 0.5, "base": 500.0}), ("crope", {})])
def test_exported_model_is_the_same_and_agrees_with_a_straightforward_computation(data, tmp_path, pos, options, capsys):
    run, model = save(tmp_path, data, pos, **options)
    out = tmp_path / "hf"
    done = export(run, "--to", "hf", "--out", out)
    assert done.returncode == 0, done.stderr
    net = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(net).__name__ == ("GPT2LMHeadModel" if pos == "learned" else "GPTNeoXForCausalLM")
    idx = torch.randint(data.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (net(input_ids=idx).logits - model(idx)[0]).abs().max() < 1e-4
    tokenizer, ours = (
        transformers.AutoTokenizer.from_pretrained(out),
        load_tokenizer(data.manifest["tokenizer"]["name"]),
    )
    text = "Hello  world, it's — 漢字\n\n\x00 day"
    assert tokenizer(text)["input_ids"] == ours.encode(text).tolist() and tokenizer.decode(ours.encode(text)) == text
    assert tokenizer.eos_token_id == ours.eot == net.config.eos_token_id

    common = [
        "--lengths",
        "24",
        "48",
        "--protocol",
        "nonoverlapping",
        "sliding",
        "same-targets",
        "--stride",
        "10",
        "--max_targets",
        "0",
        "--device",
        "cpu",
    ]
    evaluation.main(["--model", str(out), "--data", str(data.folder), *common, "--json", str(tmp_path / "model.json")])
    evaluation.main(["--run", str(run), *common, "--json", str(tmp_path / "run.json")])
    theirs, mine = (figures(json.loads((tmp_path / f"{n}.json").read_text())) for n in ("model", "run"))
    assert theirs.keys() == mine.keys()
    for key, row in mine.items():
        if pos == "learned" and key[1] == 48:
            assert (
                row["nats_per_token"] is None
                and theirs[key]["nats_per_token"] is None
                and "48" in theirs[key]["reason"]
            )
            continue
        assert theirs[key]["nats_per_token"] == pytest.approx(row["nats_per_token"], abs=1e-5)
        assert theirs[key]["targets_sha256"] == row["targets_sha256"]
        if key[0] != "same-targets":
            expected, tokens = straightforward(out, data, key[1], key[1] if key[0] == "nonoverlapping" else 10)
            assert tokens == row["tokens"] and expected == pytest.approx(theirs[key]["nats_per_token"], abs=1e-5)
    capsys.readouterr()


def test_interpolated_positions_are_transformers_linear_scaling(data, tmp_path):
    run, model = save(tmp_path, data, "rope")
    assert export(run, "--out", tmp_path / "hf").returncode == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 4.0}
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", config=config)
    idx = torch.randint(data.vocab_size, (1, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(model.scaled("pi", 4.0)(idx)[0], net(input_ids=idx).logits, atol=1e-4)


def test_what_cannot_be_exported_or_loaded_is_said(data, tmp_path, monkeypatch):
    if data.manifest["tokenizer"]["name"] != "byte":
        pytest.skip("once is enough")
    import importlib.util

    spec = importlib.util.spec_from_file_location("export", REPO / "scripts" / "export.py")
    export_module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(export_module)
    for pos in ("comrope", "carope", "alibi", "sinusoidal", "none"):
        run, _ = save(tmp_path, data, pos)
        with pytest.raises(ValueError, match=f"{pos} cannot be exported: .*learned, rope and crope can"):
            export_module.export(str(run), "last", tmp_path / "x")
    run, _ = save(tmp_path, data, "rope")
    with pytest.raises(ValueError, match="exists"):
        export_module.export(str(run), "last", tmp_path)
    monkeypatch.setattr(export_module, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match="do not use it"):
        export_module.export(str(run), "last", tmp_path / "hf")

    lengths = ["--lengths", "48", "--device", "cpu"]
    foreign = prepare(
        "files", tmp_path / "foreign", source=data_source(tmp_path), tokenizer_name="gpt2", val_tokens=300
    )
    for arguments, words in (
        (["--model", str(tmp_path / "nothing"), "--data", str(data.folder)], "no model folder"),
        (["--model", str(tmp_path), "--data", str(data.folder)], "cannot be loaded"),
        (["--model", str(tmp_path / "hf"), "--data", str(foreign.folder)], "vocabulary|tokenizer"),
        (
            [
                "--model",
                str(tmp_path / "hf"),
                "--data",
                str(data.folder),
                "--max_targets",
                "50",
                "--scaling",
                "pi",
                "--factor",
                "2",
            ],
            None,
        ),
    ):
        if words is None:
            evaluation.main([*arguments, *lengths, "--json", str(tmp_path / "r.json")])
            scaled = [r for r in json.loads((tmp_path / "r.json").read_text())["results"] if r["scaling"] == "pi"]
            assert scaled and all("runs of train.py" in r["reason"] for r in scaled)
            continue
        with pytest.raises(SystemExit, match=words) as stopped:
            evaluation.main([*arguments, *lengths])
        assert "\n" not in str(stopped.value)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    with pytest.raises(SystemExit, match="tokenizer"):
        evaluation.main(["--model", str(tmp_path / "hf"), "--data", str(data.folder), *lengths])


def data_source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text("light and darkness " * (60 + i))
    return folder


def test_bench_of_evaluation_runs():
    done = subprocess.run(
        [sys.executable, str(REPO / "scripts" / "bench.py"), "eval", "--lengths", "64", "--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--vocab_size", "128", "--batch_tokens", "128", "--rounds", "1", "--threads", "1"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "| nonoverlapping | 64 |" in done.stdout and "| sliding | 64 |" in done.stdout, (
        done.stderr
    )


def test_exported_model_runs_in_lm_evaluation_harness(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    lm_eval = pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not among the requirements: pip install lm-eval"
    )
    from lm_eval.tasks import TaskManager

    run, model = save(tmp_path, data, "rope")
    assert export(run, "--out", tmp_path / "hf").returncode == 0
    ids = data.split("val").read(0, 72)  # three windows of 24, each predicted from what is before
    text = load_tokenizer(data.manifest["tokenizer"]["name"]).decode(ids)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    task = {
        "task": "local_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "text.jsonl")}},
        "test_split": "test",
    }
    task |= {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(json.dumps(task))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    arguments = {
        "model": "hf",
        "model_args": f"pretrained={tmp_path / 'hf'}",
        "tasks": ["local_text"],
        "device": "cpu",
        "batch_size": 1,
        "bootstrap_iters": 0,
    }
    found = lm_eval.simple_evaluate(**arguments, task_manager=manager)["results"]["local_text"]["bits_per_byte,none"]
    inputs = np.concatenate(([data.eot], ids[:-1])).reshape(3, 24)
    with torch.no_grad():
        nll = (
            model(torch.from_numpy(inputs), torch.from_numpy(ids.reshape(3, 24)), reduction="none")[1]
            .double()
            .sum()
            .item()
        )
    assert found == pytest.approx(nll / np.log(2) / len(text.encode()), abs=1e-4)
