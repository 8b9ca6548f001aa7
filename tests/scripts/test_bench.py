"""scripts/bench.py, as the command line calls it, and what its kinds share."""

import functools
import importlib
import json
import operator
import pickle
import subprocess
import sys

import pytest

import nanope.bench
from data.prepare import prepare
from model import SCHEMES
from nanope.bench.data import CUT, documents, memory_of, table
from nanope.bench.train import DENSE, TARGETS, groups, parse, record, scheme_of, table_of
from nanope.bench.turns import Worker, heading, ratios, row, spread, take_turns, workers
from nanope.study.seed_statistics import speed_ratios

SHAPE = "--n_layer 1 --n_head 2 --n_embd 16 --vocab_size 64 --block_size 16 --batch 2".split()


@pytest.fixture
def bench(monkeypatch, capsys):
    """bench(*arguments): what the command prints."""

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
        importlib.import_module("bench").main()
        return capsys.readouterr().out

    return run


class Here:
    """A Worker in this process, which is sent nothing that a process of its own could not get."""

    def __init__(self, name, build, *arguments):
        build, arguments = pickle.loads(pickle.dumps((build, arguments)))
        self.name, self.build, self.answer = name, build, build(*arguments)

    def send(self, message):
        self.answered = self.answer(message)

    def receive(self):
        return pickle.loads(pickle.dumps(self.answered))

    def ask(self, message):
        self.send(message)
        return self.receive()

    def stop(self):
        pass


@pytest.fixture
def workers_here(monkeypatch):
    """Workers take no processes, whose start-up would be most of the time."""
    for kind in ("train", "eval", "data"):
        monkeypatch.setattr(importlib.import_module(f"nanope.bench.{kind}"), "Worker", Here)


# ---- what the kinds share


def test_workers_answer_and_a_dead_one_ends_the_program(capfd):
    adders = (Worker(name, functools.partial, operator.add, base) for name, base in (("ten", 10), ("twenty", 20)))
    with workers(adders) as (ten, twenty):
        ten.send(1)
        assert twenty.ask(2) == 22 and ten.receive() == 11
        processes = [ten.process, twenty.process]
    assert [process.exitcode for process in processes] == [0, 0]
    worker = Worker("ten", functools.partial, operator.add, 10)
    with pytest.raises(SystemExit, match="error: ten failed; its message is above"):
        worker.ask("one")
    worker.process.join()
    assert "TypeError: unsupported operand" in capfd.readouterr().err


def test_take_turns():
    """Each way once a round, in order; the warm-up is round 0, and its answers are there too."""
    calls = []
    ways = {name: lambda number, name=name: calls.append((number, name)) or number for name in "ab"}
    assert take_turns(ways, 2) == {"a": [0, 1, 2], "b": [0, 1, 2]}
    assert calls == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]


def test_text():
    assert ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]
    assert spread([1.0, 4.0, 2.5], 1) == "2.5 (1.0 … 4.0)"
    assert spread([1.0, 4.0, 2.5], 2, " ×", " over 3") == "2.50 × (1.00 … 4.00 over 3)"
    assert row("a", "", 3) == "| a | | 3 |"
    assert heading(1, "a", "b") == "| a | b |\n|---|--:|"


# ---- train


def test_variants():
    assert scheme_of("comrope block=2 kind=ld") == {"pos": "comrope", "pos_options": {"block": 2, "kind": "ld"}}
    assert scheme_of('[rope+alibi,none] rope={"base":5000.0} window=[64,0]') == {
        "pos": ["rope+alibi", "none"],
        "pos_options": {"rope": {"base": 5000.0}},
        "window": [64, 0],
    }
    switches = {"document_mask": True, "qk_norm": True, "logit_scale": "log", "logit_scale_start": None}
    words = "qk_norm=true logit_scale=log logit_scale_start=null document_mask=true"
    assert scheme_of(f"rope {words}") == {"pos": "rope", "pos_options": {}, "eot": 0, **switches}


def test_all_schemes_in_groups():
    """Each has a target at shape small, and is measured once, beside a rope of its group."""
    args, shapes, _ = parse(["--schemes", "all", "--no_peer"])
    assert args.schemes == list(SCHEMES) and [*shapes] == ["small"]
    assert set(SCHEMES) <= {"rope", *TARGETS["small"], *DENSE}
    found = groups(["rope", *SCHEMES], args.together)
    assert all(group[0] == "rope" and len(group) <= 8 for group in found)
    assert [scheme for group in found for scheme in group[1:]] == [s for s in SCHEMES if s != "rope"]
    assert groups(["rope", *"abcdefgh"], 7) == [["rope", *"abcd"], ["rope", *"efgh"]]
    assert groups(["rope", *"abcdefg"], 7) == [["rope", *"abcdefg"]] and groups(["rope"], 7) == [["rope"]]


def test_record_of_groups():
    """A ratio is of the rounds of a variant's own group, in the table and in the reports of sweeps."""
    args, shapes, _ = parse(["--device", "cpu", "--no_peer"])
    first = {"rope": [2.0, 4.0, 6.0], "t5": [4.0, 4.0, 12.0]}, {}, {"rope": 800_000_000, "t5": 1_000_000_000}
    second = {"rope": [1.0, 1.0, 3.0], "cope": [2.0, 2.0, 2.0]}, {}, {"rope": 900_000_000, "cope": 2_000_000_000}
    found = json.loads(json.dumps(record(shapes["small"], 2, [first, second], args)))
    assert found["seconds"]["rope"] == [2.0, 4.0, 6.0] and found["memory"]["rope"] == 800_000_000
    assert found["rope_seconds"] == {"t5": [2.0, 4.0, 6.0], "cope": [1.0, 1.0, 3.0]}
    assert "rope_seconds" not in record(shapes["small"], 2, [first], args)
    assert table_of(found).splitlines()[2:] == [
        "| cope | 0.50 (0.50 … 1.50) | | 2,000 | 2.50 | < 3 |",
        "| t5 | 0.50 (0.50 … 1.00) | ≥ 0.9 | 1,000 | 1.25 | |",
    ]
    assert speed_ratios(found, "cope")[0] == speed_ratios(found, "t5")[0] == 0.5


def test_train(bench, workers_here, tmp_path):
    """A row for each variant, once, and every round's seconds in the file."""
    options = ["--rounds", 2, "--steps", 1, "--no_peer", "--device", "cpu", "--json", tmp_path / "b.json"]
    schemes = ["--schemes", "comrope block=2", "comrope block=2", "none"]
    shown = bench("train", *SHAPE, *options, "--together", 1, *schemes)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in shown.splitlines()
        if line.startswith("| n_layer 1")
    ]
    assert [row[1] for row in rows] == ["rope", "comrope block=2", "none"] and rows[0][3] == "1.000 (1.000 … 1.000)"
    report = json.loads((tmp_path / "b.json").read_text())
    assert {variant: len(seconds) for variant, seconds in report["seconds"].items()} == {
        "rope": 2,
        "comrope block=2": 2,
        "none": 2,
    }
    assert report["rope_seconds"].keys() == {"comrope block=2", "none"}
    again = bench("train", "--from", tmp_path / "b.json")
    assert again.count("\n") == 4 and "| none | " in again
    assert report["tokens_a_step"] == 32
    assert report["device"].startswith("cpu (") and report["threads"] == 1


@pytest.mark.slow
def test_train_in_processes_of_their_own(bench, tmp_path):
    bench("train", *SHAPE, "--rounds", 1, "--no_peer", "--device", "cpu", "--schemes", "--json", tmp_path / "b.json")
    report = json.loads((tmp_path / "b.json").read_text())
    assert len(report["seconds"]["rope"]) == 1 and report["memory"]["rope"] > 1e7


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--schemes", "rop"], "did you mean rope?"),
        (["--schemes", "comrope block=3"], "block of comrope cannot be 3"),
        (["--schemes", "comrope block"], "'block' is no option=value"),
        (
            ["--schemes", "alibi", "--n_embd", "18", "--n_head", "6"],
            "n_embd/n_head = 3 must be even",
        ),  # rope's, beside it
        (["--schemes", "", "--no_peer"], "pos must be a scheme's name"),
        (["--together", "0"], "--together must be at least 1"),
        (["--from", "nowhere"], "--from nowhere: no such file"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["train", "--json", "x", "--shape", "all"], "--json takes one shape, not all"),
        (["--shape", "all"], "--n_layer changes one shape"),
        (["--nanogpt", "nowhere"], "--nanogpt nowhere: no model.py there"),
        (["evl"], "unrecognized arguments: evl"),
        (["data"], "required: --source"),
        (["feed", "--data_dir", "nowhere"], "no data folder nowhere"),
    ],
)
def test_refuses_before_anything_starts(arguments, words, monkeypatch, capsys):
    kind = arguments[:1] if arguments[0] in ("train", "data", "feed") else []
    shape = SHAPE if kind in ([], ["train"]) else []
    monkeypatch.setattr(sys, "argv", ["bench.py", *kind, *shape, *arguments[len(kind) :]])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("bench").main()
    assert words in capsys.readouterr().err + str(stopped.value)


# ---- eval


@pytest.mark.slow
def test_eval(bench, workers_here):
    shape = "--lengths 64 --n_layer 1 --n_embd 16 --n_head 2 --vocab_size 128 --batch_tokens 128".split()
    shown = bench("eval", *shape, "--rounds", 1, "--threads", 1)
    assert "| nonoverlapping | 64 |" in shown and "| sliding | 64 |" in shown


# ---- data and feed


def test_copies_of_the_corpus_differ():
    novels = ["".join(chr(200 + i) for i in range(5 * CUT // 2))]
    for texts in documents(novels, 3).values():
        assert len(texts) == len(set(texts)) and all(text.strip() for text in texts)
    assert "".join(documents(novels, 1)["documents of 4 kB"]) == "".join(novels)


def test_table_of_data():
    """100 tokens, prepare in 2 s of which 1 is its start-up, everything else in half a second."""
    ways = ("threads", "processes", "arrays", "loop")
    lines = table("novels", {"prepare": [2.0, 2.0], "start-up": [1.0, 1.0], **dict.fromkeys(ways, [0.5, 0.5])}, 100)
    assert lines[0] == "| novels | prepare | 50 | | |"
    assert lines[3] == "| novels | tiktoken, the better | 200 | 0.25 (0.25 … 0.25) | 0.50 |"


def test_memory_of_a_process_and_its_children():
    child = "x = bytearray(10**8); print(1, flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    assert 1e8 < memory_of(process.pid) < 2e8
    process.communicate("\n")
    assert memory_of(process.pid) == 0


@pytest.mark.slow
def test_data_and_feed(bench, workers_here, monkeypatch, tmp_path):
    text = "the light and the darkness upon the deep "
    lines = [json.dumps({"id": f"novel_{i}", "text": f"{i} {text * 600}"}) for i in range(4)]
    (tmp_path / "novels.jsonl").write_text("\n".join(lines))
    kinds = nanope.bench.data.documents
    one = lambda *given: dict([kinds(*given).popitem()])  # noqa: E731 - of two that are measured alike
    monkeypatch.setattr(nanope.bench.data, "documents", one)
    shown = bench("data", "--source", tmp_path / "novels.jsonl", "--rounds", 1, "--workers", 1)
    assert shown.count("| whole novels |") == 6 and "4 documents, 0.1 MB" in shown
    data = prepare("files", tmp_path / "data", tmp_path / "novels.jsonl", "byte", val_tokens=1000)
    monkeypatch.setattr("nanope.bench.feed.TOKENS", 2**15)
    shown = bench("feed", "--data_dir", data.folder, "--block_size", 64, "--batch_tokens", 4096)
    assert "M tokens/s (" in shown
