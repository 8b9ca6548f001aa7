"""scripts/lm_eval.py, and equality with models that scripts/export.py wrote for the harness's own model `hf`."""

import functools
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import export
import numpy as np
import pytest
from exporting import byte_data, save  # noqa: F401
from test_docs import HARNESS

from nanope import REPO

pytest.importorskip("lm_eval.api", reason="needs lm-eval, of requirements-dev.txt")  # scripts/ has a lm_eval too
import lm_eval  # noqa: E402

SENTENCES = [
    ("the light of day", [" was good", " darkness", " it was so"], 0),
    ("and earth and heaven and water and the night", [" and the day", " was"], 1),
    ("", ["in the beginning", "of the"], 1),
    ("of ", ["light", "the"], 0),
]
# One file for each form that the documented tasks have
TASKS = {
    "choices": {  # hellaswag, piqa, arc_easy
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_word": {  # lambada_openai
        "output_type": "loglikelihood",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{choices[0]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "text": {  # wikitext
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "needle": {  # niah_single_1
        "output_type": "generate_until",
        "doc_to_text": "The magic number is {{number}}. {{page}}. The magic number is",
        "doc_to_target": "{{number}}",
        "generation_kwargs": {"do_sample": False, "temperature": 0.0, "max_gen_toks": 10, "until": ["e", "\n\n"]},
        "metric_list": [{"metric": "exact_match"}],
    },
    "empty": {
        "output_type": "generate_until",
        "doc_to_text": "",
        "doc_to_target": "{{number}}",
        "generation_kwargs": {"max_gen_toks": 10, "until": ["e"]},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files, with their documents beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for number, (query, choices, label) in enumerate(SENTENCES):
        page = " ".join([query, *choices]) * (number + 1)
        rows.append({"query": query, "choices": choices, "label": label, "page": page, "number": str(number)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
        file = {"task": f"own_{name}", "test_split": "test", **where, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(file))
    return folder


def evaluated(model, tasks, names, **model_args):
    """Its results, and what the model answered to each request."""
    from lm_eval.tasks import TaskManager

    import nanope.evaluation.harness  # noqa: F401

    found = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=[f"own_{name}" for name in names],
        device="cpu",
        batch_size=1 if model == "hf" else 3,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    answers = {}
    for name in names:
        for sample in found["samples"][f"own_{name}"]:
            for i, answer in enumerate(sample["filtered_resps"]):
                answers[name, sample["doc_id"], i] = answer
    return found["results"], answers


@pytest.mark.slow
@pytest.mark.parametrize("pos", ["learned", "rope", "crope"])
def test_answers_are_those_of_the_exported_model(byte_data, tasks, tmp_path, monkeypatch, pos):  # noqa: F811
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    run, _ = save(tmp_path, byte_data, pos)
    export.export(str(run), "last", tmp_path / "hf")
    names = [name for name in TASKS if name != "empty"]
    results, ours = evaluated("nanope", tasks, names, run=str(run))
    theirs_results, theirs = evaluated("hf", tasks, names, pretrained=str(tmp_path / "hf"))
    assert ours.keys() == theirs.keys() and len(ours) == 9 + 3 * 4
    for key, answer in ours.items():
        if key[0] == "needle":
            assert answer == theirs[key]
        elif key[0] == "text":
            assert answer == pytest.approx(theirs[key], abs=1e-5, rel=1e-6)
        else:
            assert answer[0] == pytest.approx(theirs[key][0], abs=1e-5, rel=1e-6) and answer[1] == theirs[key][1]
    for name, row in results.items():
        for metric, value in row.items():
            if isinstance(value, float):
                assert value == pytest.approx(theirs_results[name][metric], rel=1e-5, nan_ok=True), (name, metric)


# ---- the command


@pytest.fixture
def run_command(monkeypatch):
    """command(arguments): the command in this process, with the tasks of --include_path alone: to read the harness's
    own takes seconds."""
    spec = importlib.util.spec_from_file_location("lm_eval_command", REPO / "scripts" / "lm_eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["scripts/lm_eval.py", *map(str, arguments)])
        module.main()

    return command


@pytest.mark.slow
def test_command_as_a_program(byte_data, tasks, tmp_path):  # noqa: F811
    """It is not its own harness, whose name it has, whatever PYTHONPATH; a run's path may hold what separates
    model_args."""
    run, _ = save(tmp_path / "a,b=c", byte_data, "alibi")
    line = [sys.executable, REPO / "scripts" / "lm_eval.py", "--run", run, "--max_length", 48]
    line += ["--tasks", "own_choices,own_text,own_needle", "--include_path", tasks, "--limit", 3]
    line += ["--batch_size", "auto", "--output_path", tmp_path / "out.json"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\|own_choices *\|.*\|acc +\|", done.stdout) and "|Metric" in done.stdout.replace(" ", "")
    (report,) = tmp_path.glob("out*.json")
    report = json.loads(report.read_text())
    assert report["config"]["pos"] == "alibi" and report["config"]["max_length"] == 48
    _, ours = evaluated("nanope", tasks, ["text"], run=str(run), max_length=48)
    pages = [json.loads(line)["page"] for line in (tasks / "rows.jsonl").read_text().splitlines()][:3]
    bits = -sum(ours["text", i, 0] for i in range(3)) / np.log(2) / sum(len(page.encode()) for page in pages)
    assert report["results"]["own_text"]["bits_per_byte,none"] == pytest.approx(bits)


@pytest.mark.slow
def test_the_harness_own_program_finds_the_model(byte_data, tasks, tmp_path):  # noqa: F811
    """By scripts/lm_eval.yaml among its tasks, from any folder."""
    run, _ = save(tmp_path, byte_data, "rope")
    line = [sys.executable, "-m", "lm_eval", "--model", "nanope", "--include_path", tasks]
    line += ["--model_args", f"run={run},batch_size=2,device=cpu"]
    line += ["--tasks", f"{REPO / 'scripts' / 'lm_eval.yaml'},own_last_word", "--output_path", tmp_path / "out.json"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert done.returncode == 0 and "|own_last_word|" in done.stdout, done.stderr
    (report,) = tmp_path.glob("out*.json")
    assert json.loads(report.read_text())["config"]["pos"] == "rope"


@pytest.mark.slow
def test_it_is_the_harness_own_command(byte_data, tasks, tmp_path, run_command, capsys):  # noqa: F811
    run, _ = save(tmp_path, byte_data, "rope")
    own = ["--model", "nanope", "--model_args", f"run={run},batch_size=2,device=cpu", "--tasks", "own_last_word"]
    run_command(*own, "--include_path", tasks)
    assert "|own_last_word|" in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_one_line(byte_data, tasks, tmp_path, run_command, monkeypatch):  # noqa: F811
    run, _ = save(tmp_path, byte_data, "learned")
    for own, tasks_asked, message in (
        (["--run", "nowhere"], "own_text", "error: no run nowhere"),
        (["--run", run], "own_nothing", "error: Tasks not found: own_nothing"),
        (["--run", run, "--max_length", 48], "own_text", "error: learned positions end at block_size 24"),
        (["--run", run, "--dtype", "tf32", "--device", "cpu"], "own_text", "error: dtype tf32 needs a CUDA device"),
        (["--run", run], "own_empty", "error: task own_empty wants generation from an empty context"),
        (["--run", run, "--apply_chat_template"], "own_text", "error: a run of train.py has no chat template"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_command("--tasks", tasks_asked, *own, "--include_path", tasks)


def test_the_harness_has_the_options_that_the_documentation_names():
    text = (Path(lm_eval.__file__).parent / "_cli" / "run.py").read_text()
    assert [flag for flag in HARNESS if f'"{flag}"' not in text] == []


@pytest.mark.slow
def test_arguments_that_do_not_go_together(run_command, monkeypatch, capsys):
    for arguments, message in (
        (["--max_length", 48, "--tasks", "x"], "--max_length goes with --run"),
        (["--run", "x", "--model", "hf"], "--run is --model nanope"),
    ):
        with pytest.raises(SystemExit):
            run_command(*arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "nanope.evaluation.harness", None)  # as without the package
    with pytest.raises(SystemExit, match="needs lm-evaluation-harness.*: pip install lm-eval"):
        run_command("--run", "x", "--tasks", "x")


@pytest.mark.slow
def test_ruler_measures_by_the_runs_own_tokenizer(byte_data, tmp_path, run_command):  # noqa: F811
    """A task whose documents a function makes of the metadata, as those of RULER."""
    (tmp_path / "made.py").write_text(
        "import datasets, transformers\n"
        "def made(max_seq_lengths, tokenizer, **_):\n"
        "    encode = transformers.AutoTokenizer.from_pretrained(tokenizer)\n"
        "    rows = [{'input': 'a' * n, 'size': len(encode('é' * n).input_ids)} for n in max_seq_lengths]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
    )
    task = (
        "task: own_made\ndataset_path: ''\ntest_split: test\noutput_type: generate_until\n"
        "custom_dataset: !function made.made\ndoc_to_text: '{{input}}'\ndoc_to_target: '{{size}}'\n"
        "generation_kwargs: {max_gen_toks: 4, until: []}\nmetric_list: [{metric: exact_match}]\n"
    )
    (tmp_path / "made.yaml").write_text(task)
    run, _ = save(tmp_path, byte_data, "alibi")
    metadata = json.dumps({"max_seq_lengths": [24, 48]})
    options = ["--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples", "--metadata", metadata]
    run_command("--run", run, "--tasks", "own_made", *options)
    (samples,) = (tmp_path / "out").rglob("samples*.jsonl")
    assert [json.loads(line)["doc"]["size"] for line in samples.read_text().splitlines()] == [48, 96]  # bytes
