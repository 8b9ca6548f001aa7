"""scripts/reproduce.py: the papers' tables as grids, and one of them from a text file to its table."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import plot
import pytest
import quickstart
import report
import reproduce
import sweep
import yaml
from grid import Grid, bench_variants, model_cost
from report import Study

from model import GPT
from nanope import REPO
from nanope.config import RunConfig

GRIDS = [path for path in sorted((REPO / "configs" / "sweeps").glob("*.yaml")) if path.stem != "wandb"]
CASES = [(path, scale) for path in GRIDS for scale in [None, *yaml.safe_load(path.read_text()).get("scales", {})]]


@pytest.mark.parametrize("path,scale", CASES, ids=lambda v: v.stem if isinstance(v, Path) else str(v))
def test_every_grid_can_be_built_and_its_published_arms_exist(path, scale, monkeypatch):
    monkeypatch.setattr(GPT, "initialise", lambda self, seed: None)
    grid = Grid.read(path, scale)
    for run in grid.runs(Path("runs")):
        parameters, flops = model_cost(RunConfig(**{"vocab_size": 320, **run.fields}))
        assert parameters > 0 and flops > 0
        assert not Path(run.fields["data_dir"]).is_absolute() and "-" in Path(run.fields["data_dir"]).name
    everything = Grid.read(path)  # a scale may have fewer settings
    for row in (everything.published or {}).get("rows", ()):
        assert row["setting"] in everything.settings and set(row["values"]) <= set(everything.arms)
    where = (grid.published or {}).get("from")
    if where:
        assert where["protocol"] in grid.eval[where["report"]]["protocol"]
    if grid.throughput:
        assert bench_variants(grid)
        assert set(grid.throughput) <= set(
            "schemes n_layer n_head n_embd vocab_size block_size batch rounds steps threads compile".split()
        )
    if scale:
        assert grid.reduced


def test_every_table_has_its_grid_and_a_reduction():
    assert set(reproduce.TABLES) <= {path.stem for path in GRIDS} and all(
        (path, "cpu") in CASES for path in GRIDS if path.stem in reproduce.TABLES
    )


def test_the_readmes_hours_and_cost_are_what_plan_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "local", lambda path: str(tmp_path / path))  # no data, as on a fresh machine
    rows = re.findall(r"^\| `python (scripts/reproduce\.py [^`]*)` \| (.*) \|$", (REPO / "README.md").read_text(), re.M)
    assert {command.split()[1] for command, _ in rows} == set(reproduce.TABLES)
    for command, cells in rows:
        monkeypatch.setattr(
            sys,
            "argv",
            [*command.split(), "--plan", "--gpu", "H100", "--price_per_hour", "2.5", "--out", str(tmp_path / "out")],
        )
        with pytest.raises(SystemExit):
            reproduce.main()
        text = capsys.readouterr().out
        found = re.search(
            r"^(\d+) runs, 0 done. Still to train: (\S+) FLOPs, (\S+) run-hours .*?, (\S+) hours with .*^Cost: (\S+) at",
            text,
            re.M | re.S,
        )
        assert found and cells == " | ".join(found.groups()), f"{command}: {' | '.join(found.groups())}"


def test_the_controls_that_papers_lack_are_there():
    arms = {
        name: Grid.read(REPO / "configs" / "sweeps" / f"{name}.yaml").arms
        for name in reproduce.TABLES
        if name != "carope-throughput"
    }
    cost = lambda arm, **shape: model_cost(RunConfig(vocab_size=50304, n_layer=4, n_head=4, n_embd=128, **arm))[0]  # noqa: E731
    for name in ("crope-1", "crope-2"):
        control = arms[name]["rope, grouped Q/K/V"]
        assert (
            control["pos"] == "rope"
            and cost(control) == cost(arms[name]["crope"]) == cost(arms[name]["rope"]) - 4 * 3 * 128**2 // 2
        )
    for name in (
        "crope-1",
        "crope-2",
        "carope-1",
    ):  # sinusoids as large as the embeddings, beside Vaswani's amplitude of 1
        assert arms[name]["sinusoidal, scale 0.02"] == {"pos": "sinusoidal", "pos_options": {"scale": 0.02}}
    found = [(a["pos"], a.get("pos_options", {})) for a in arms["carope-1"].values()]
    for control in (("rope", {"base": 5e5}), ("rope", {"base": 2e7}), ("carope", {"content": False}), ("alibi", {})):
        assert control in found
    assert {a.get("pos_options", {}).get("block") for a in arms["comrope-text"].values()} == {None, 2, 4, 8}


@pytest.fixture(scope="module")
def study_of(tmp_path_factory):
    """Makes a study of a grid whose runs end with given validation losses: {arm: [a seed each]}, and given rows of a report."""

    def make(path, losses, scale=None, rows=None, **changes):
        folder = tmp_path_factory.mktemp("study")
        n = len(next(iter(losses.values())))
        grid = Grid.read(path, scale, {"arms": list(losses), "seeds": n, **changes})
        for run in grid.runs(folder):
            (run.folder / "eval").mkdir(parents=True)
            (run.folder / "config.yaml").write_text(yaml.safe_dump({"vocab_size": 50304, **run.fields}))
            lines = [
                {
                    "step": s,
                    "tokens": s,
                    "train/loss": 7.0,
                    "val/loss": losses[run.arm][run.seed - 1],
                    "tokens_per_s": 1.0,
                }
                for s in (1, run.max_steps)
            ]
            (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            for name in run.reports:
                there = [r for r in rows(run) if r] if rows else []
                about = {
                    "tokenizer": {"name": "gpt2"},
                    "split": "val",
                    "stream": True,
                    "documents": 2,
                    "stride": 8,
                    "dtype": "float32",
                }
                run.path_of(name).write_text(json.dumps({"results": there, **about}))
        grid.content["command"] = "c"
        sweep.write_grid(grid, folder)
        return Study.read(folder)

    return make


def test_published_figures_stand_beside_measured_ones(study_of):
    """CRoPE, table 1, WikiText-2: RoPE as published, CRoPE 0.1 better where the paper has it 0.0086 worse; one arm that it has not."""
    losses = {
        "sinusoidal": [5.7, 5.8],
        "rope": [5.36, 5.37],
        "crope": [5.261, 5.269],
        "rope, grouped Q/K/V": [5.3, 5.3],
    }
    study = study_of(REPO / "configs/sweeps/crope-1.yaml", losses, settings=["WikiText-2"])
    (table,) = [t for t in report.tables(study) if t.title.startswith("Lou & Xu")]
    rows = {row[1]: dict(zip(table.head, row)) for row in table.rows}
    assert list(rows) == list(losses) and all(
        row["setting"] == "WikiText-2" and row["seeds"] == "2" for row in rows.values()
    )
    assert (
        rows["rope"]["published"] == "5.3644 ± 0.0279"
        and rows["rope"]["verdict"] == "within interval"
        and rows["rope"]["less published"] == f"{5.365 - 5.3644:+.4f}"
    )
    crope = rows["crope"]
    assert (
        crope["verdict"] == "differs"
        and crope["published less rope, nats"] == "+0.0086"
        and crope["measured less rope, nats"].startswith("**-0.1000 [")
    )
    assert crope["verdict on the difference"] == "differs"
    control = rows["rope, grouped Q/K/V"]
    assert (
        control["published"] == "–"
        and control["verdict"] == control["verdict on the difference"] == ""
        and control["measured"].startswith("5.3000 [")
    )
    assert "all of PG-19's training books" in report.markdown(study) and r"5.3644 $\pm$ 0.0279" in report.latex_text(
        study
    )


def test_a_reduced_set_up_compares_directions_only(study_of):
    losses = {"sinusoidal": [9.0, 9.2], "rope": [8.0, 8.1], "crope": [8.1, 8.0]}
    study = study_of(REPO / "configs/sweeps/crope-2.yaml", losses, "cpu")
    (table,) = [t for t in report.tables(study) if t.title.startswith("Lou & Xu")]
    rows = {row[1]: dict(zip(table.head, row)) for row in table.rows}
    assert len(table.rows) == 3  # one setting is left
    assert {row["verdict"] for row in rows.values()} == {"not comparable"} and {
        row["less published"] for row in rows.values()
    } == {""}
    assert (
        rows["sinusoidal"]["verdict on the difference"] == "same direction"
        or "≈" in rows["sinusoidal"]["measured less rope, nats"]
    )
    assert (
        rows["crope"]["verdict on the difference"] == "inside noise"
        and "≈" in rows["crope"]["measured less rope, nats"]
    )
    text = report.markdown(study)
    assert "measured in a reduced set-up" in text and "2,000 of 10,000 steps" in text


def test_a_set_up_that_the_command_line_changes_is_no_longer_the_papers():
    path = REPO / "configs/sweeps/crope-1.yaml"
    grid_of = lambda *words, path=path: sweep.grid_of(path, sweep.parser_of("", "").parse_args([*words]))[0]  # noqa: E731
    assert (
        grid_of("--set", "device=cpu", "micro_batch_size=8").reduced is None
        and grid_of("--scale", "paper", "--seeds", "5", "--arms", "rope").reduced is None
    )
    assert (
        grid_of("--set", "max_steps=100", "device=cpu").reduced == "Changed on the command line: --set max_steps=100."
    )
    assert grid_of("--corpus", "novels").reduced == "Changed on the command line: --corpus novels."
    both = grid_of("--scale", "cpu", "--set", "max_steps=100").reduced
    assert both.startswith("one corpus, novels") and both.endswith("Changed on the command line: --set max_steps=100.")
    assert grid_of("--set", "max_steps=5", path=REPO / "configs/sweeps/schemes.yaml").reduced is None  # no paper's


def test_perplexities_are_compared_as_such_and_differences_in_nats(study_of):
    """CARoPE, table 1: rows of a report, at multiples of the training length, null figures as n/a."""

    def rows(run):
        for length in (512, 1024):
            base = {
                "rope": {512: 3.06, 1024: 4.0},
                "carope": {512: 3.05, 1024: 3.1},
                "learned": {512: 3.1, 1024: None},
            }[run.arm][length]
            row = {
                "protocol": "nonoverlapping",
                "length": length,
                "scaling": "none",
                "factor": 1.0,
                "tokens": 300,
                "interval": None,
                "targets_sha256": "t",
            }
            if base is None:
                yield row | {"nats_per_token": None, "reason": "too long"}
            else:
                nll = np.array([100, 200]) * (base + 0.001 * run.seed)
                yield row | {
                    "nats_per_token": float(nll.sum() / 300),
                    "per_document": {"nll": nll.tolist(), "tokens": [100, 200]},
                }

    study = study_of(
        REPO / "configs/sweeps/carope-1.yaml",
        {"rope": [1.0] * 3, "carope": [1.0] * 3, "learned": [1.0] * 3},
        rows=rows,
        settings=["Small"],
    )
    table = report.published_table(study)
    found = {(row[0], row[1]): dict(zip(table.head, row)) for row in table.rows}
    far = found["Small, 2× the training length", "carope"]
    assert far["published"] == "21.39" and far["measured"].startswith(f"{math.exp(3.102):.2f} [")
    assert far["published less rope, nats"] == f"{math.log(21.39 / 56.61):+.4f}" and far[
        "measured less rope, nats"
    ].startswith("**-0.9000 [")
    assert far["verdict"] == "differs" and found["Small, 2× the training length", "learned"]["measured"] == "n/a"
    assert found["Small, 1× the training length", "rope"]["less published"] == f"{math.exp(3.062) - 21.31:+.2f}"


@pytest.mark.parametrize(("scale", "judged"), [("paper", "differs"), ("cpu", "other direction")])
def test_speeds_are_compared_by_their_ratio(scale, judged, tmp_path):
    grid = Grid.read(REPO / "configs/sweeps/carope-throughput.yaml", scale)
    grid.content["command"] = "c"
    sweep.write_grid(grid, tmp_path / "out")
    seconds = {"rope": [1.0, 2.0, 1.0], "carope": [1.1, 2.2, 1.1], "carope content=false": [1.0, 2.0, 1.0]}
    there = {
        "seconds": seconds,
        "memory": dict.fromkeys(seconds, 1e6),
        "tokens_a_step": 1000,
        "rounds": 3,
        "device": "cpu",
        "threads": 1,
    }
    report.throughput_path(grid, tmp_path / "out").write_text(json.dumps(there))
    (table,) = report.tables(Study.read(tmp_path / "out"))
    rows = {row[0]: row for row in table.rows}
    assert rows["rope"][1:4] == ["1,000", "1", "1"] and rows["carope"][2].startswith("0.909 [0.909, 0.909]")
    assert rows["carope"][-3:] == ["760,000", "1.206", judged] and rows["carope content=false"][-3:] == ["–", "", ""]
    sweep.collect(grid, tmp_path / "out", tmp_path / "results")
    report.write(tmp_path / "results")
    readme = (tmp_path / "results" / "README.md").read_text()
    assert "Made by `c` (device cpu, threads 1)." in readme and "figure.png" not in readme  # there are no runs to draw


def test_the_panel_of_speed_shows_ratios_within_a_round_and_their_intervals(study_of):
    """The machine slows down by half; crope takes 1.25 times rope's time in every round but one."""
    study = study_of(REPO / "configs/sweeps/schemes.yaml", {"rope": [1.5, 1.7], "crope": [1.6, 1.6]})
    there = {
        "seconds": {"rope": [1.0, 1.0, 2.0, 2.0, 2.0], "crope": [1.25, 1.25, 2.5, 2.5, 2.0]},
        "tokens_a_step": 1000,
    }
    report.throughput_path(study.grid, study.folder).write_text(json.dumps(there))
    axes = plot.plt.figure().add_subplot()
    assert plot.draw_speed(axes, study, "", plot.styles_of(study.grid.arms))
    shown = {bar.get_label(): bar.lines for bar in axes.containers}
    at = {arm: (float(point.get_xdata()[0]), float(point.get_ydata()[0])) for arm, (point, _, _) in shown.items()}
    assert at["rope"] == pytest.approx((1.0, 1.6)) and at["crope"] == pytest.approx((0.8, 1.6))
    ends = [tuple(line.get_segments()[0][:, axis]) for axis, line in enumerate(shown["crope"][2])]
    ratio, interval = report.speed_ratios(there, "crope")
    assert (
        ratio == pytest.approx(0.8)
        and ends[0] == pytest.approx(interval)
        and interval[0] == pytest.approx(0.8)
        and interval[1] > 0.85
    )
    plot.plt.close(axes.figure)


def test_quickstart_is_a_sweep_of_the_schemes_asked_for(monkeypatch, capsys):
    for arguments, arms in (
        ([], ["learned", "rope", "crope", "comrope", "carope"]),
        (["--schemes", "alibi", "none"], ["alibi", "none"]),
    ):
        monkeypatch.setattr(
            sys, "argv", ["quickstart.py", "--plan", "--seeds", "2", "--tokens_per_s", "5600", *arguments]
        )
        with pytest.raises(SystemExit) as stopped:
            quickstart.main()
        names = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "-seed" in line]
        assert not stopped.value.code and [name.rpartition("-")[0] for name in names] == [
            f"{arm}-seed{seed}" for seed in (1, 2) for arm in arms
        ]


def test_styles_tell_arms_apart():
    for path in GRIDS:
        if arms := Grid.read(path).arms:
            styles = plot.styles_of(arms)
            assert (
                len({s["color"] for s in styles.values()}) == len({s["marker"] for s in styles.values()}) == len(arms)
            )


def test_long_curves_can_be_told_apart_without_colours():
    figure = plot.plt.figure()
    for n in (3, 50, 500):
        plot.band(
            axes := figure.add_subplot(),
            np.arange(n),
            np.ones((2, n)),
            {"color": "k", "marker": "s", "linestyle": "-"},
            "rope",
        )
        (line,) = axes.lines
        assert (
            line.get_marker() == "s"
            and 3 <= len(range(0, n, line.get_markevery())) <= 15
            and len(axes.collections) == 1
        )  # and the seeds' band
    plot.plt.close(figure)


def test_from_a_text_to_the_table(tmp_path, monkeypatch, capsys):
    """crope-2 --scale cpu with a corpus, width and steps of its own: the data are prepared, runs trained and evaluated, the table printed."""
    words = "and the of light darkness water earth heaven day night was it so good".split()
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(np.random.default_rng(i).choice(words, 100)))
    monkeypatch.setattr(sweep, "local", lambda path: str(tmp_path / path))
    small = ["max_steps=3", "eval_interval=1", "eval_tokens=64", "n_layer=1", "n_head=2", "n_embd=8"]
    content = yaml.safe_load((REPO / "configs/sweeps/crope-2.yaml").read_text())
    content["base"] = str(REPO / "configs" / "crope_paper.yaml")
    content["scales"]["cpu"] |= {
        "settings": {
            "2 × 512, width 128, γ 0.9 each 1,000": {"block_size": 16, "batch_tokens": 32, "micro_batch_size": 2}
        }
    }
    content["scales"]["cpu"]["data"] = {"corpus": "files", "tokenizer": "byte"}
    content["eval"] = {}
    (tmp_path / "configs" / "sweeps").mkdir(parents=True)
    (tmp_path / "configs" / "sweeps" / "crope-2.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(reproduce, "REPO", tmp_path)
    where = ["--source", str(tmp_path / "texts"), "--out", str(tmp_path / "out"), "--threads", "1"]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "reproduce.py",
            "crope-2",
            "--scale",
            "cpu",
            *where,
            "--arms",
            "rope",
            "crope",
            "--seeds",
            "1",
            "--set",
            *small,
        ],
    )
    with pytest.raises(SystemExit) as stopped:
        reproduce.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 0, printed.err
    assert printed.out.startswith("Reduced: one row") and (tmp_path / "data" / "files-byte" / "manifest.json").is_file()
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| 2 × 512, width 128, γ 0.9 each 1,000 | crope | 6.584 ± 0.106 |" in table and "one seed" in table
    assert "python scripts/reproduce.py crope-2 --scale cpu --arms rope crope --seeds 1" in table
    assert str(tmp_path) not in table  # where it was made is nobody's business
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "crope-2", "--from", str(tmp_path / "out")])
    reproduce.main()
    assert capsys.readouterr().out.strip() == table.strip()
