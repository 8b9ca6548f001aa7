"""eval.py as a command: what it writes, compares, keeps and refuses."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from evaluating import data, gpt2_data, rows, runs, save_run  # noqa: F401
from torch.nn.modules.module import register_module_forward_pre_hook

from data.shards import open_data
from eval import main
from nanope import REPO
from nanope.evaluation.protocols import PROTOCOLS

FEW = ("--max_targets", "300")


def arguments(run, *more):
    return ["--run", str(run), "--lengths", "32", "64", *map(str, more)]


def report_of(run):
    (path,) = (run / "eval").glob("*.json")
    return json.loads(path.read_text())


def test_report_names_its_conditions(data, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "run"
    save_run(run, data)
    main(arguments(run, "--protocol", "same-targets", "nonoverlapping"))
    printed, report = capsys.readouterr().out, report_of(run)
    expected = {(n, p) for n in (16, 32, 64) for p in ("same-targets", "nonoverlapping")}
    assert {(r["length"], r["protocol"]) for r in report["results"]} == expected
    assert f"{rows(report)[64]['nats_per_token']:.4f}" in printed
    (table,) = (run / "eval").glob("*.md")
    assert table.name == "step_4_same-targets+nonoverlapping_32-64.md" and table.read_text() == printed
    assert report["data_hash"] == open_data(data.folder).hash and report["step"] == 4
    assert report["checkpoint_sha256"] == (run / "checkpoints" / "step_4.pt.sha256").read_text().strip()
    assert {"stride", "dtype", "backend", "seed", "targets_sha256"} <= report.keys()


def test_shift_needs_no_lengths(data, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "run"
    save_run(run, data)
    main(["--run", str(run), "--protocol", "shift", "--windows", "3"])
    assert "| 65,536 | 16 |" in capsys.readouterr().out
    assert [r["offset"] for r in report_of(run)["shift"]] == [0, 256, 4096, 65536]
    main(["--run", str(run), "--protocol", "shift", "--offsets", "0", "7"])
    assert {path.name for path in (run / "eval").glob("*.json")} == {
        "step_4_shift_windows-3.json",
        "step_4_shift_offsets-0-7.json",
    }


def test_compare_groups_seeds_and_evaluates_on_the_same_tokens(runs, tmp_path, capsys):  # noqa: F811
    names = [str(runs / n) for n in ("rope1", "rope2", "none1", "none2")]
    main(["--compare", *names, "--lengths", "64", *FEW, "--json", str(tmp_path / "c.json")])
    printed = capsys.readouterr().out
    assert "none less rope" in printed and "2, 2, paired" in printed and "over seeds and documents" in printed
    found = json.loads((tmp_path / "c.json").read_text())
    means = [rows(report_of(Path(n)))[64]["nats_per_token"] for n in names]
    (at_64,) = [r for r in found["comparison"] if r["length"] == 64]
    assert at_64["difference"] == pytest.approx((means[2] + means[3] - means[0] - means[1]) / 2)
    assert at_64["seeds"] == [2, 2] and [r["run"] for r in found["runs"]] == names
    main(["--compare", names[0], names[2], "--lengths", "64", *FEW])
    assert "say nothing about other seeds" in capsys.readouterr().out


@pytest.mark.slow
def test_ranks_give_the_same_figures(runs, tmp_path):  # noqa: F811
    protocols = ("--protocol", *PROTOCOLS, "--probe", 3, "--batch_tokens", 300)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    reports, printed = [], []
    for ranks, how in ((1, []), (2, launch)):
        path = tmp_path / str(ranks) / "r.json"
        command = [sys.executable, *how, str(REPO / "eval.py"), *arguments(runs / "rope1", *protocols, "--json", path)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(path.read_text()))
        printed.append(done.stdout)
    alone, both = reports
    assert both["ranks"] == 2
    assert all(alone[part] == both[part] for part in ("results", "probe", "shift"))
    assert [r["recall"] is None for r in alone["probe"]] == [True, True, False, False]  # of 16, 32, 64, 128
    assert printed[0] == printed[1] and printed[1].count("| same-targets | 64 |") == 1


def test_interrupted_evaluation_says_one_line_and_goes_on_where_it_was(data, tmp_path, capsys):  # noqa: F811
    run, lengths = tmp_path / "run", []
    save_run(run, data)

    def evaluated(*more, stop_at=None):
        """The lengths at which the model runs while the command does; Ctrl-C arrives with a window of `stop_at`."""

        def watch(module, inputs):
            if inputs[0].dim() == 2:  # the embedding of tokens (B, T)
                lengths.append(inputs[0].size(1))
                if lengths[-1] == stop_at:
                    raise KeyboardInterrupt

        lengths.clear()
        watching = register_module_forward_pre_hook(watch)
        try:
            main(arguments(run, *more))
        finally:
            watching.remove()
        return {*lengths}

    with pytest.raises(SystemExit) as stopped:
        evaluated(stop_at=64)
    assert stopped.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert {*lengths} == {16, 32, 64} and not list((run / "eval").glob("*.json"))
    assert evaluated() == {64}  # the third length alone
    whole = report_of(run)
    assert evaluated() == set() and report_of(run) == whole
    assert evaluated("--max_targets", "200") == {16, 32, 64}  # other tokens are other figures
    assert len(list((run / "eval").glob("*.json"))) == 2  # and another report


MESSAGES = [
    ("--run RUN/nowhere --lengths 32", "nowhere"),
    ("--run RUN --lengths 32 --checkpoint 7", "'7' step_4.pt"),
    ("--run RUN --lengths 99999", "99999 longest"),
    ("--run RUN --lengths 32 --protocol same-target", "same-target same-targets"),
    ("--run RUN --lengths 32 --strde 4", "--strde --stride"),
    ("--run RUN --lengths x", "'x'"),
    ("--run RUN", "required: --lengths"),
    ("--run RUN --protocol shift sliding", "required: --lengths"),
    ("--run RUN --protocol shift --offsets 0 -1", "--offsets -1"),
    ("--run RUN --protocol shift --windows 0", "--windows 1"),
    ("--run RUN --lengths 32 --resamples 10", "resamples 1000"),
    ("--run RUN --lengths 32 --split vall", "vall val"),
    ("--run RUN --lengths 32 --data RUN/none", "RUN/none prepare.py"),
    ("--run RUN --lengths 32 --data GPT2", "tokenizer byte gpt2"),
    ("--run RUN --lengths 32 64 --stride 40", "stride 40 shortest length 16"),
    ("--run RUN --lengths 32 --scaling pi", "--factor"),
    ("--run RUN --lengths 32 --scaling pi --factor 0.5", "factor at least 1"),
    ("--run RUN --lengths 32 --scaling pi --factor nan", "factor at least 1"),
    ("--run RUN --lengths 32 --factor 2", "--scaling"),
    ("--run RUN --lengths 32 --scaling yarm --factor 2", "yarm yarn"),
    ("--run RUN --lengths 32 --protocol sliding --split test", "test val"),
    ("--run RUN --lengths 32 --probe -1", "probe"),
    ("--run RUN --lengths 32 --stream --split val_long", "val_long"),
    ("--compare RUN --lengths 32", "two runs"),
    ("--compare RUN RUN/gone --lengths 32", "no run gone"),
    ("--compare RUN RUN --lengths 32", "one experiment"),
    ("--compare RUN RUN --lengths 32 --protocol shift", "--compare shift"),
    ("--model RUN --lengths 32", "--data"),
]


@pytest.mark.parametrize("command, words", MESSAGES)
def test_careless_commands_get_one_clear_line(runs, gpt2_data, command, words, capsys):  # noqa: F811
    places = {"RUN": str(runs / "rope1"), "GPT2": str(gpt2_data.folder)}

    def placed(text):
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    with pytest.raises(SystemExit) as stopped:
        main(placed(command).split())
    code = stopped.value.code
    message = code if isinstance(code, str) else capsys.readouterr().err.splitlines()[-1]
    assert code not in (0, None) and "\n" not in message
    assert all(word in message for word in placed(words).split())


def test_damaged_checkpoint_is_refused(data, tmp_path):  # noqa: F811
    save_run(tmp_path / "run", data)
    path = tmp_path / "run" / "checkpoints" / "step_4.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="step_4.pt is truncated or altered"):
        main(arguments(tmp_path / "run"))


def test_figures_go_into_the_summary_of_the_runs_wandb(data, tmp_path, monkeypatch):  # noqa: F811
    run, asked, summary = tmp_path / "run", {}, {}
    save_run(run, data, wandb="offline")

    def init(**given):
        asked.update(given)
        return types.SimpleNamespace(summary=summary, finish=lambda: asked.update(finished=True))

    wandb = types.ModuleType("wandb")
    wandb.Error, wandb.init = RuntimeError, init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    main(arguments(run, *FEW))
    assert asked["resume"] == "allow" and asked["finished"] and asked["mode"] == "offline"
    assert summary["eval/same-targets/64/nats_per_token"] == rows(report_of(run))[64]["nats_per_token"]
