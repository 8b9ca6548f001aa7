"""eval.py as a command: what it writes, compares, keeps and refuses."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from evaluating import data, gpt2_data, prepare_texts, random_text, rows, runs, save_run  # noqa: F401
from torch.nn.modules.module import register_module_forward_pre_hook

from data.prepare import prepare
from data.shards import open_data
from eval import main
from model import GPT
from nanope import REPO
from nanope.evaluation.protocols import PROTOCOLS

FEW = ("--max_targets", "300")


def arguments(run, *more):
    return ["--run", str(run), "--lengths", "32", "64", *map(str, more)]


def report_of(run):
    (path,) = (run / "eval").glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
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


def test_tf32_is_of_gpus(data, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    save_run(run, data)
    with pytest.raises(SystemExit, match="^error: dtype tf32 needs a CUDA device, not cpu: choose float32$"):
        main(arguments(run, "--dtype", "tf32", "--device", "cpu"))


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
    of_text = [protocol for protocol in PROTOCOLS if protocol != "task"]
    protocols = ("--protocol", *of_text, "--probe", 3, "--batch_tokens", 300)
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


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forbid_work(monkeypatch):
    monkeypatch.setattr(GPT, "hidden", lambda *_, **__: pytest.fail("the model runs"))


@pytest.mark.parametrize(
    "target, words",
    [
        ("rep.md", "rep.json"),  # its own table
        ("RUN/last.pt", "step_4.pt was not written"),
        ("RUN/../notes.txt", "notes.txt was not written"),
        ("RUN/../README.json", "README.md was not written"),  # the table would
        ("DATA/manifest.json", "manifest.json was not written"),
        ("RUN/../comparison.json", "comparison.json was not written"),  # that of --compare
        ("RUN/../other.json", "other.json was not written"),  # another program's results
        ("RUN/../mine.json", "mine.md was not written"),  # the table would
        ("RUN", "folder report.json"),
        (".", "folder report.json"),
        ("new/", "file's name"),
        ("RUN/../notes.txt/rep.json", "notes.txt/rep.json folder"),
        (f"RUN/{'x' * 250}.json", "cannot be written long"),
        ("/dev/null", "/dev/null was not written"),
    ],
)
def test_nothing_is_overwritten_targets_come_first(data, tmp_path, target, words, monkeypatch, capsys):  # noqa: F811
    run = tmp_path / "run"
    save_run(run, data)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("# Mine\n")
    (tmp_path / "mine.md").write_text("| my | table |\n|--|--|\n")
    (tmp_path / "comparison.json").write_text('{"comparison": []}')
    (tmp_path / "other.json").write_text('{"results": {"hellaswag": 0.3}, "config": {}}')
    before = files_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    forbid_work(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(run, "--json", target.replace("RUN", str(run)).replace("DATA", str(data.folder))))
    message = str(stopped.value.code) + capsys.readouterr().err
    assert stopped.value.code != 0 and all(word in message for word in words.split())
    assert files_of(tmp_path) == before


def test_comparisons_and_reports_do_not_overwrite_each_other(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    names = [tmp_path / pos for pos in ("rope", "none")]
    for name in names:
        save_run(name, data, pos=name.name)
    command = ["--compare", *map(str, names), "--lengths", "64", *FEW, "--json"]
    main([*command, str(tmp_path / "c.json")])
    printed = capsys.readouterr().out
    assert (tmp_path / "c.md").read_text() == printed and "not for all at once" in printed
    main([*command, str(tmp_path / "c.json")])  # again, over its own
    own = names[0] / "eval" / "step_4_same-targets_64_max_targets-300.json"
    assert own.exists()
    forbid_work(monkeypatch)
    for target in (own, own.with_suffix("")):  # a run's report; its table
        with pytest.raises(SystemExit, match="two files would be written to"):
            main([*command, str(target)])


def test_an_own_report_and_an_empty_file_may_be_overwritten(data, tmp_path):  # noqa: F811
    run, report = tmp_path / "run", tmp_path / "rep.v1"
    save_run(run, data)
    report.touch()  # mktemp makes such files
    for _ in range(2):
        main(arguments(run, *FEW, "--json", report))
    assert "results" in json.loads(report.read_text())
    for more in (("--protocol", "shift"), ("--protocol", "shift", "--probe", "2")):  # other tables
        for _ in range(2):
            main(["--run", str(run), *more, "--windows", "2", "--json", str(report)])
    main(arguments(run, *FEW, "--json", tmp_path / "rep.v2"))
    assert {path.name for path in tmp_path.glob("rep.*")} == {"rep.v1", "rep.v1.md", "rep.v2", "rep.v2.md"}


def test_a_link_to_a_report_stays_a_link(data, tmp_path):  # noqa: F811
    run, link = tmp_path / "run", tmp_path / "rep.json"
    save_run(run, data)
    (tmp_path / "far").mkdir()
    link.symlink_to("far/report.json")
    main(arguments(run, *FEW, "--json", link))
    assert link.is_symlink() and "results" in json.loads((tmp_path / "far" / "report.json").read_text())


@pytest.mark.slow
def test_what_differs_has_names_that_differ(data, tmp_path):  # noqa: F811
    run, folders = tmp_path / "run", [tmp_path / name / "set" for name in "AB"]
    save_run(run, data)
    for folder in folders:
        shutil.copytree(data.folder, folder)
    for more in (
        *(("--data", folder) for folder in folders),
        ("--data", f"{folders[0]}/"),  # the first again
        *(("--scaling", "yarn", "--factor", factor) for factor in ("8", "8.0000001")),
    ):
        main(arguments(run, *FEW, *more))
    names = sorted(path.name for path in (run / "eval").glob("*.json"))
    assert len(names) == 4 and "step_4_same-targets_32-64_yarn-8_max_targets-300.json" in names
    lengths = [*range(17, 97)]
    for first in (17, 16):
        lengths[0] = first
        main(["--run", str(run), "--max_targets", "50", "--lengths", *map(str, lengths)])
    names = [path.name for path in (run / "eval").glob("step_4_same-targets_1*.json")]
    assert len(names) == 2 and all(len(name) < 200 for name in names)


def test_the_table_is_shown_although_it_cannot_be_written(data, tmp_path, capsys):  # noqa: F811
    run, target = tmp_path / "run", tmp_path / "rep.json"
    save_run(run, data)
    # The target becomes a folder while the model runs
    watching = register_module_forward_pre_hook(lambda *_: target.mkdir(exist_ok=True))
    try:
        with pytest.raises(SystemExit, match="rep.json"):
            main(arguments(run, *FEW, "--json", target))
    finally:
        watching.remove()
    assert "| same-targets | 64 |" in capsys.readouterr().out


def test_lengths_are_also_multiples_of_the_training_length(data, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "run"
    save_run(run, data)
    main(["--run", str(run), *FEW, "--lengths", "2x", "4x"])
    first = capsys.readouterr().out
    main(arguments(run, *FEW))
    assert capsys.readouterr().out == first and len(list((run / "eval").glob("*.json"))) == 1
    save_run(tmp_path / "other", data, block_size=32)
    with pytest.raises(SystemExit, match="training lengths of the runs differ"):
        main(["--compare", str(run), str(tmp_path / "other"), "--lengths", "2x"])


# ---- the run's data


def test_other_data_than_the_runs_are_refused_unless_asked_for(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    run, folder = tmp_path / "run", tmp_path / "data"
    shutil.copytree(data.folder, folder)
    save_run(run, data, data_dir=str(folder))
    save_run(tmp_path / "none", data, data_dir=str(folder), pos="none")
    main(arguments(run, *FEW))
    assert report_of(run)["other_data"] is False and "Other data" not in capsys.readouterr().out
    shutil.rmtree(folder)
    shutil.copytree(prepare_texts(tmp_path / "more", [random_text(i, 900) for i in range(20, 26)]).folder, folder)
    both = ["--compare", str(run), str(tmp_path / "none"), "--lengths", "32", *FEW]
    with monkeypatch.context() as patch:
        forbid_work(patch)
        for command in (arguments(run, *FEW), both):
            with pytest.raises(SystemExit, match="trained on other data than .* --data"):
                main(command)
    main(arguments(run, *FEW, "--data", folder, "--json", tmp_path / "rep.json"))
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "rep.json").read_text())
    assert f"Other data than the run was trained on: {folder}" in printed
    assert report["other_data"] and report["training_data_hash"] == data.hash != report["data_hash"]
    main([*both, "--data", str(folder), "--json", str(tmp_path / "c.json")])
    assert capsys.readouterr().out.count("Other data than") == 2
    assert all(about["other_data"] for about in json.loads((tmp_path / "c.json").read_text())["runs"])


def test_a_relative_data_folder_from_elsewhere_gets_advice(data, tmp_path, monkeypatch):  # noqa: F811
    there = tmp_path / "there"
    shutil.copytree(data.folder, there / "set")
    save_run(there / "runs" / "a", data, data_dir="set", out_dir="runs/a")
    monkeypatch.chdir(there)
    main(["--run", "runs/a", "--lengths", "32", *FEW])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=rf"on set, .* it is {tmp_path}/set, .* give --data {there}/set"):
        main(["--run", str(there / "runs" / "a"), "--lengths", "32"])
    with pytest.raises(SystemExit, match=f"give --data {there}/set"):  # by the file of a checkpoint
        main(["--run", str(there / "runs" / "a" / "last.pt"), "--lengths", "32"])
    save_run(there / "b", data, data_dir="set", out_dir=str(there / "b"))  # which does not tell where train.py was
    with pytest.raises(SystemExit, match="start eval.py where train.py was started, or give --data"):
        main(["--run", str(there / "b"), "--lengths", "32"])
    shutil.copytree(there / "runs" / "a", tmp_path / "copy")
    with pytest.raises(SystemExit, match="start eval.py where train.py was started, or give --data"):
        main(["--run", "copy", "--lengths", "32"])
    save_run(tmp_path / "copy", data, data_dir="/nowhere/set")
    with pytest.raises(SystemExit, match="on /nowhere/set, which is not there: give --data"):
        main(["--run", "copy", "--lengths", "32"])


def test_runs_whose_data_are_cut_into_other_shards_compare(data, tmp_path, capsys):  # noqa: F811
    source, sizes = data.folder.parent / "texts", {"val_tokens": 6000, "shard_tokens": 1500}
    cut = prepare("files", tmp_path / "cut", source=source, tokenizer_name="byte", **sizes)
    assert len(cut.records("val")) > len(data.records("val"))
    save_run(tmp_path / "a", data)
    save_run(tmp_path / "b", cut, pos="none")
    main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--lengths", "32", *FEW])
    assert "none less rope" in capsys.readouterr().out


def test_runs_whose_data_hold_different_text_are_refused_before_the_work(data, tmp_path, monkeypatch):  # noqa: F811
    other = prepare_texts(tmp_path / "more", [random_text(i, 900) for i in range(20, 26)])
    save_run(tmp_path / "a", data)
    save_run(tmp_path / "b", other, pos="none")
    forbid_work(monkeypatch)
    with pytest.raises(SystemExit, match="different text in val .* --data"):
        main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--lengths", "32"])


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
    ("--run RUN --lengths 2y", "'2y' 4x"),
    ("--run RUN --lengths 0x", "at least 1"),
    ("--run RUN --protocol shift --stream", "--stream shift"),
    ("--run RUN --protocol shift --scaling pi --factor 2", "--scaling shift"),
    ("--run RUN --protocol shift --stride 4", "--stride shift"),
    ("--run RUN --protocol shift --lengths 4x", "--lengths shift"),
    ("--run RUN --protocol shift --split val_long", "val_long shift"),
    ("--run RUN --lengths 16 --attention 2 --split val_long", "val_long --attention"),
    ("--run RUN --lengths 32 --json=", "--json empty"),
    ("--run RUN --lengths 32 --data=", "--data empty"),
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
