"""scripts/export.py: models in the layout of transformers, and what runs on them."""

import base64
import dataclasses
import functools
import hashlib
import json
import random
import subprocess
import sys

import export as command
import numpy as np
import pytest
import torch
import transformers
from exporting import any_data, byte_data, prepared, save  # noqa: F401
from training import small_files

from data.tokenizer import PUBLISHED, TOKENIZERS, Published, load_tokenizer, published_tokenizer
from nanope import REPO
from nanope.hf_tokenizer import ODD


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


def a_vocabulary(name, folder, pattern, tokens, eot, n_vocab):
    """A published tokenizer of that name, with a file of these tokens, id by id (b"" leaves a gap), in the folder."""
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens) if token]
    (folder / f"{name}.tiktoken").write_bytes(b"".join(lines))
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    return Published(f"{name}.tiktoken", digest, pattern, eot, n_vocab)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """published(name, tokens, eot, n_vocab): a run with a tokenizer of PUBLISHED whose vocabulary is a small one."""

    def run(name, tokens, eot, n_vocab, pos="learned"):
        row = a_vocabulary(name, tmp_path, PUBLISHED[name].pattern, tokens, eot, n_vocab)
        monkeypatch.setitem(PUBLISHED, name, row)
        monkeypatch.setitem(TOKENIZERS, name, functools.partial(published_tokenizer, name, tmp_path))
        load_tokenizer.cache_clear()
        return save(tmp_path, prepared(tmp_path / f"data{len(tokens)}", name), pos)[0], load_tokenizer(name)

    yield run
    load_tokenizer.cache_clear()


SMALL = load_tokenizer("gpt2").tokens[:2000]  # the first merges are a vocabulary too
SPACES = [b" " * n for n in range(3, 26)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, tokens, eot, n_vocab",
    [
        pytest.param("cl100k_base", SMALL, 2000, 2020, marks=pytest.mark.slow),
        ("o200k_base", SMALL, 2001, 2021),  # a gap before the end of text
        pytest.param("o200k_harmony", SMALL[:900] + [b""] + SMALL[900:], 2050, 2090, marks=pytest.mark.slow),
        pytest.param("p50k_base", [*SMALL, b"", *SPACES], 2000, 2025, marks=pytest.mark.slow),  # tokens after it
        pytest.param("p50k_edit", [*SMALL, b"", *SPACES], 2000, 2028, marks=pytest.mark.slow),
        pytest.param("r50k_base", SMALL, 2000, 2001, marks=pytest.mark.slow),
    ],
)
def test_an_exported_tokenizer_is_the_runs(published, tmp_path, name, tokens, eot, n_vocab):
    run, ours = published(name, tokens, eot, n_vocab)
    command.export(str(run), "last", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    parts = [
        *" \n\t\r\u3000\xa0ab'sS1２.!日é\u0301😀ǅſKK/_-",
        "  ",
        "'S",
        "'LL",
        "'re",
        "12345",
        "<|endoftext|>",
        " the",
    ]
    draw = random.Random(0)
    for text in [*ODD, *("".join(draw.choices(parts, k=draw.randrange(40))) for _ in range(2000))]:
        assert theirs(text)["input_ids"] == ours.encode(text).tolist(), text
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == theirs.convert_tokens_to_ids("<|endoftext|>") == eot
    assert len(theirs("in the of and")["input_ids"]) == 4  # merged


def test_a_tokenizer_that_transformers_would_read_differently_is_refused(published, tmp_path, monkeypatch):
    """Such as one whose pattern has another meaning there. What was there before stays, and nothing new does."""
    monkeypatch.setitem(
        PUBLISHED, "cl100k_base", dataclasses.replace(PUBLISHED["cl100k_base"], pattern=r"\p{N}{1,3}+3|\p{N}|[^\p{N}]+")
    )
    run, _ = published("cl100k_base", SMALL, 2000, 2020)
    before = {*tmp_path.iterdir()}
    with pytest.raises(ValueError, match="cl100k_base cannot be exported: that of transformers reads .* differently"):
        command.export(str(run), "last", tmp_path / "some" / "where")
    assert {*tmp_path.iterdir()} == before
    (tmp_path / "empty" / ".partial").mkdir(parents=True)  # of an export that was killed
    with pytest.raises(ValueError, match="differently"):
        command.export(str(run), "last", tmp_path / "empty")
    assert [*(tmp_path / "empty").iterdir()] == []


def test_a_run_whose_vocabulary_is_another_by_now_is_refused(published, tmp_path):
    run, _ = published("cl100k_base", SMALL, 2000, 2020)
    published("cl100k_base", SMALL[:1500], 2000, 2020, pos="rope")
    with pytest.raises(ValueError, match="tokenizer cl100k_base had another vocabulary"):
        command.export(str(run), "last", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_full_disk_leaves_nothing(byte_data, tmp_path):  # noqa: F811
    run, _ = save(tmp_path, byte_data, "rope")
    with small_files(20_000), pytest.raises(OSError, match="cannot write .*hf"):
        command.export(str(run), "last", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


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
def test_command(byte_data, tmp_path, monkeypatch):  # noqa: F811
    line = [
        REPO / "scripts" / "export.py",
        save(tmp_path, byte_data, "rope")[0],
        "--to",
        "hf",
        "--out",
        tmp_path / "hf",
    ]
    done = subprocess.run([sys.executable, *map(str, line)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (tmp_path / "hf" / "config.json").is_file(), done.stderr
    line = ["export.py", str(save(tmp_path, byte_data, "alibi")[0]), "--out", str(tmp_path / "x")]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit, match="^error: .*cannot be exported"):
        command.main()


@pytest.mark.slow
def test_what_cannot_be_written_is_said(byte_data, tmp_path):  # noqa: F811
    run, _ = save(tmp_path, byte_data, "rope")
    with pytest.raises(ValueError, match="exists"):
        command.export(str(run), "last", tmp_path)
    with pytest.raises(ValueError, match="removed again, so that you do not use it"):
        command.export(str(run), "last", tmp_path / "hf", tolerance=0.0)
    assert not (tmp_path / "hf").exists() and (run / "last.pt").exists()


@pytest.mark.slow
def test_exported_model_runs_in_lm_evaluation_harness(byte_data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    pytest.importorskip("lm_eval.api", reason="needs lm-eval, of requirements-dev.txt")
    import lm_eval
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
