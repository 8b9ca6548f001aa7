"""Grid files: what they ask for, what is wrong with them, and how learning rates are tuned."""

import itertools
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml
from studies import EVAL, SWEEPS, arguments_of, diverge, finish, write_grid

from model import resolve
from nanope import REPO
from nanope.config import RunConfig
from nanope.study import report
from nanope.study.costs import model_cost
from nanope.study.files import RunFolders
from nanope.study.grid import Grid, bench_variants
from nanope.study.options import grid_of, parser_of
from nanope.study.results import Study
from nanope.study.slurm import write_script
from nanope.study.status import state_of
from nanope.study.sweep import told

GRIDS = [path for path in sorted(SWEEPS.glob("*.yaml")) if path.stem != "wandb"]
CASES = [(path, scale) for path in GRIDS for scale in [None, *yaml.safe_load(path.read_text()).get("scales", {})]]


# ---- runs


def test_runs_are_paired_and_named_by_what_they_are(tmp_path):
    arms = {"rope": {"pos": "rope"}, "rope, base 5e5": {"pos": "rope", "pos_options": {"base": 5e5}}}
    settings, product = {"short": {}, "long": {"block_size": 32}}, {"weight_decay": [0, "1e-1"]}
    path = write_grid(tmp_path / "g.yaml", settings=settings, grid=product, arms=arms, eval=EVAL)
    runs = Grid.read(path).runs(RunFolders(tmp_path))
    assert len(runs) == len({r.name for r in runs}) == 2 * 2 * 2 * 2
    assert all(r.fields["seed"] == r.fields["data_seed"] == r.seed for r in runs)
    assert {r.setting for r in runs} == {f"{s}, weight_decay {w}" for s in ("short", "long") for w in ("0", "1e-1")}
    lengths = {(r.fields["block_size"], tuple(r.evaluations["far"]["lengths"])) for r in runs}
    assert lengths == {(16, (16, 32)), (32, (32, 64))}
    assert {r.fields["weight_decay"] for r in runs} == {0.0, 0.1}  # 1e-1 is a text in YAML
    assert re.fullmatch(r"short-weight-decay-0-rope-base-5e5-seed1-[0-9a-f]{8}", runs[1].name)
    assert {r.seed for r in runs[:8]} == {1}  # seed by seed


def test_a_changed_field_is_another_run(tmp_path):
    path = write_grid(tmp_path / "g.yaml", eval=EVAL)

    def runs(**changes):
        return Grid.read(path, changes=changes).runs(RunFolders(tmp_path))

    names = {run.name for run in runs()}
    assert len(names) == 4
    for field, value in {"learning_rate": 1e-3, "max_steps": 31, "weight_decay": 0.2, "window": 8}.items():
        other = {run.name for run in runs(fields={field: value})}
        assert len(other) == 4 and not other & names
    for field, value in {"dropout": 0.0, "window": 0, "device": "cpu", "wandb": "offline"}.items():
        assert {run.name for run in runs(fields={field: value})} == names  # a default written out; where it runs
    for run in runs():
        finish(run, 2.0)
    assert not any(run.missing_reports() for run in runs())
    evaluated = runs(eval={"far": {**EVAL["far"], "max_targets": 32}})
    assert {run.name for run in evaluated} == names and all(r.missing_reports() == ["far"] for r in evaluated)


def test_arms_are_whatever_pos_can_be(tmp_path):
    arms = ["rope", "rope+alibi", ["rope", "none"]]
    grid = Grid.read(write_grid(tmp_path / "g.yaml", arms=arms, seeds=1, baseline="rope+alibi"))
    assert grid.arms == {"rope": {"pos": "rope"}, "rope+alibi": {"pos": "rope+alibi"}, "rope, none": {"pos": arms[2]}}
    names = [run.name.rpartition("-")[0] for run in grid.runs(RunFolders(tmp_path))]
    assert names == ["rope-seed1", "rope-alibi-seed1", "rope-none-seed1"]
    assert list(Grid.read(SWEEPS / "schemes.yaml", changes={"arms": ["none+alibi", "rope"]}).arms) == [
        "none+alibi",
        "rope",
    ]
    for arm in grid.arms:
        assert model_cost(RunConfig(vocab_size=320, **grid.fields_of("", arm)))[0] > 0


@pytest.mark.parametrize("fields,variant", [
    ({}, "rope"),
    ({"pos": "comrope", "pos_options": {"block": 2, "kind": "ld"}}, "comrope block=2 kind=ld"),
    ({"pos": "rope+alibi", "pos_options": {"rope": {"base": 5e5}}}, 'rope+alibi rope={"base":500000.0}'),
    ({"pos": ["rope", "none"], "window": [64, 0]}, "[rope,none] window=[64,0]"),
    ({"qk_norm": True, "logit_scale": "log"}, "rope qk_norm=true logit_scale=log"),
    ({"document_mask": True, "logit_scale_start": None}, "rope document_mask=true logit_scale_start=null"),
])  # fmt: skip
def test_arms_as_the_benchmark_takes_them(fields, variant):
    """scripts/bench.py splits at spaces and reads values as YAML."""
    grid = Grid("g", arms={"a": fields}, throughput={"rounds": 1})
    assert bench_variants(grid) == {"a": variant}
    pos, *options = variant.split()
    assert yaml.safe_load(pos) == fields.get("pos", "rope")
    read = {k: yaml.safe_load(v) for k, v in (option.split("=", 1) for option in options)}
    assert read == fields.get("pos_options", {}) | {k: v for k, v in fields.items() if k not in ("pos", "pos_options")}


@pytest.mark.parametrize("keys,words", [
    ({"arm": ["rope"]}, "unknown key 'arm'; did you mean arms"),
    ({"arms": ["crop"]}, "'crop' is no scheme; did you mean crope"),
    ({"fields": {"learning_rte": 1.0}}, "learning_rte: no field of train.py; did you mean learning_rate"),
    ({"fields": {"seed": 1}}, "seed: a grid sets it itself"),
    ({"fields": {"learning_rate": -1.0}}, "rope: learning_rate must be positive"),
    ({"fields": {"learning_rate": "fast"}}, "could not convert .*fast"),
    ({"arms": ["rope"], "baseline": "rpe"}, "baseline 'rpe' is no arm; did you mean rope"),
    ({"seeds": [1, 1]}, "seeds must be .* different"),
    ({"tune": {"rates": [1]}}, "tune takes learning_rate"),
    ({"tune": {"learning_rate": [1e-3], "fields": {"max_step": 3}}},
     "tune: fields: max_step is no field .*did you mean max_steps"),
    ({"eval": {"far": {"protocol": "sliding"}}}, "'far' of eval lacks lengths"),
    ({"eval": {"far": {"program": "scripts/shift.py"}}}, "scripts/shift.py is now `protocol: shift`"),
    ({"eval": {"lengths": ["1x"]}}, "eval: 'lengths' must be a mapping"),
    ({"eval": {"far": {"lengths": ["1x"], "max_target": 5}}}, "max_target is no argument of eval.py; .* max_targets"),
    ({"seeds": 2.5}, "seeds must be a number"),
    ({"data": "novels"}, "data must be a mapping, not 'novels'"),
    ({"settings": {"short": 256}}, "settings: short must be a mapping"),
    ({"fields": [1]}, "fields must be a mapping"),
    ({"tune": [1e-3]}, "tune must be a mapping"),
    ({"tune": {"learning_rate": [1e-3], "seeds": 3}}, "tune: seeds is a list"),
    ({"figure": "bits"}, "figure must be nats or perplexity"),
    ({"cropped": "1x"}, "cropped must be true or false, not '1x'"),
    ({"arms": {"rope a": {}, "rope, a": {}}}, "differ in punctuation only"),
    ({"settings": {"a": {"data": {"corpus": "novel"}}}}, "unknown corpus 'novel'; did you mean 'novels'"),
    ({"settings": {"a": {"data": {"tokenizer": "byte"}}}}, "unknown corpus None"),
])  # fmt: skip
def test_grids_that_are_wrong_say_where(tmp_path, keys, words):
    with pytest.raises(ValueError, match=f"^{tmp_path}/g.yaml: .*{words}"):
        Grid.read(write_grid(tmp_path / "g.yaml", **keys))


def test_a_grid_is_read_as_a_config_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    fields = "{data_dir: ~/small, max_steps: 1E3, learning_rate: 1e-3, min_lr: 1e-4, wandb: off, warmup_steps: 1}"
    (tmp_path / "base.yaml").write_text("pos: rope\npos_options: {base: 5.0, qkv: dense}\n")
    path = tmp_path / "g.yaml"
    path.write_text(f"base: base.yaml\nfields: {fields}\narms: [rope, alibi]\n")
    rope, alibi = (run.config for run in Grid.read(path).runs(RunFolders(tmp_path)))
    assert (rope.data_dir, rope.max_steps, rope.learning_rate, rope.wandb) == ("/home/x/small", 1000, 1e-3, "off")
    assert rope.pos_options == {"base": 5.0, "qkv": "dense"} and alibi.pos_options == {}
    for text, words in (
        ("seeds: 1\nseeds: 2", "'seeds' stands twice"),
        ("fields: {max_steps: 010}", "octal"),
        ("fields: {data_dir: ''}", "an empty path"),
        ("fields: {schedule: wsd, max_steps: 100, warmup_steps: 95}", "the learning rate jumps"),
    ):
        path.write_text(f"arms: [rope]\n{text}\n")
        with pytest.raises(ValueError, match=f"g.yaml: .*{words}"):
            Grid.read(path)
    (tmp_path / "grid.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="grid.yaml: expected names and values"):
        Grid.of_folder(tmp_path)


def test_scales_and_selections(tmp_path):
    scales = {"cpu": {"fields": {"max_steps": 7}, "arms": ["crope"], "reduced": "fewer"}}
    path = write_grid(tmp_path / "g.yaml", scales=scales)
    grid = Grid.read(path, "cpu")
    assert list(grid.arms) == [grid.baseline] == ["crope"] and grid.reduced == "fewer"
    assert grid.fields["max_steps"] == 7 and grid.fields["n_layer"] == 2
    assert list(Grid.read(path, changes={"arms": ["alibi", "rope"]}).arms) == ["alibi", "rope"]
    for scale, changes, words in [
        ("gpu", {}, "no scale 'gpu'.*cpu"),
        (None, {"settings": ["x"]}, "settings has no 'x'"),
    ]:
        with pytest.raises(ValueError, match=words):
            Grid.read(path, scale, changes)


@pytest.mark.slow
def test_a_grid_is_read_back_as_it_was_written(tmp_path):
    for path, scale in CASES:
        grid = Grid.read(path, scale)
        grid.write(tmp_path)
        assert Grid.of_folder(tmp_path) == grid


def test_a_grid_from_before_there_was_a_choice_of_order_keeps_its_runs(tmp_path):
    """A folder whose grid.yaml says nothing of it has the old order, whose runs have the names of then. A grid that is
    begun now has other names: the two never mix."""
    grid = Grid.read(write_grid(tmp_path / "g.yaml"))
    grid.write(tmp_path)
    path = tmp_path / "grid.yaml"
    content = yaml.safe_load(path.read_text())
    assert content["fields"].pop("data_order") == "feistel"
    path.write_text(yaml.safe_dump(content))
    then, files = Grid.of_folder(tmp_path), RunFolders(tmp_path)
    drawn = Grid.read(tmp_path / "g.yaml", changes={"fields": {"data_order": "drawn"}})
    assert {r.fields["data_order"] for r in then.runs(files)} == {"drawn"}
    assert {r.name for r in then.runs(files)} == {r.name for r in drawn.runs(files)}
    assert not {r.name for r in then.runs(files)} & {r.name for r in grid.runs(files)}
    assert [*{r.name for r in Study.read(REPO / "results" / "quickstart").runs["", "rope"].values()}] == [
        "rope-seed1-f34ca368"
    ]


# ---- the grids of configs/sweeps


@pytest.mark.parametrize("path,scale", CASES, ids=lambda v: v.stem if isinstance(v, Path) else str(v))
def test_every_grid_can_be_built_and_its_published_arms_exist(path, scale):
    grid = Grid.read(path, scale)
    for run in grid.runs(RunFolders(Path("runs"))):
        parameters, flops = model_cost(RunConfig(**{"vocab_size": 320, "eot": 0, **run.fields}))
        assert parameters > 0 and flops > 0
        assert not Path(run.fields["data_dir"]).is_absolute() and "-" in Path(run.fields["data_dir"]).name
    everything = Grid.read(path)  # a scale may have fewer settings
    for row in (everything.published or {}).get("rows", ()):
        assert row["setting"] in everything.settings and set(row["values"]) <= set(everything.arms)
    if where := (grid.published or {}).get("from"):
        assert where["protocol"] in grid.eval[where["report"]]["protocol"]
    if grid.throughput:
        shape = {"schemes", "n_layer", "n_head", "n_embd", "vocab_size", "block_size", "batch"}
        assert bench_variants(grid) and {*grid.throughput} <= shape | {"rounds", "steps", "threads", "compile"}
    assert grid.reduced or not scale


def test_the_controls_that_papers_lack_are_there():
    names = ("crope-1", "crope-2", "carope-1", "comrope-text", "cable-4")
    arms = {name: Grid.read(SWEEPS / f"{name}.yaml").arms for name in names}

    def cost(arm):
        return model_cost(RunConfig(vocab_size=50304, n_layer=4, n_head=4, n_embd=128, **arm))[0]

    for name in ("crope-1", "crope-2"):
        for control in [arm for label, arm in arms[name].items() if "Q/K/V" in label]:
            assert control["pos"] == "rope"
            assert cost(control) == cost(arms[name]["crope"]) == cost(arms[name]["rope"]) - 4 * 3 * 128**2 // 2
    assert {"rope, grouped Q/K/V", "rope, low-rank Q/K/V"} < arms["crope-2"].keys()
    # as large as the embeddings, beside Vaswani's amplitude of 1
    for name in ("crope-1", "crope-2", "carope-1", "cable-4"):
        assert arms[name]["sinusoidal, scale 0.02"] == {"pos": "sinusoidal", "pos_options": {"scale": 0.02}}
    found = [(a["pos"], a.get("pos_options", {})) for a in arms["carope-1"].values()]
    for control in (("rope", {"base": 5e5}), ("carope", {"content": False}), ("alibi", {})):
        assert control in found
    # f = 1/(1 + ln 2), carope's W = 0 without a bias, is another base at another head width: 64, 32 in the reduction
    for scale, base in ((None, 2.081e7), ("cpu", 4562)):
        runs = Grid.read(SWEEPS / "carope-1.yaml", scale).runs(RunFolders(Path("nowhere")))
        configs = [RunConfig(**{**run.fields, "vocab_size": 320}) for run in runs if run.arm == "rope, f = 0.59"]
        bases = {resolve(config.model_config()).pos_options["base"] for config in configs}
        assert [*bases] == [pytest.approx(base, rel=1e-3)]
    assert {a.get("pos_options", {}).get("block") for a in arms["comrope-text"].values()} == {None, 2, 4, 8}


@pytest.mark.parametrize("scale", [None, "cpu"])
def test_cable_4_asks_what_its_table_leaves_open(scale):
    """Three seeds, the same targets at every length, the training length among them (cropping), all to 15 times it."""
    grid = Grid.read(SWEEPS / "cable-4.yaml", scale)
    runs = grid.runs(RunFolders(Path("nowhere")))
    assert len(grid.seeds) == 3 and len(grid.arms) == 12 and len(runs) == 36
    for run in runs:
        paper, far = run.evaluations["paper"], run.evaluations["far"]
        length = run.config.block_size
        assert paper["lengths"] == [length // 2, *far["lengths"]] == [length * n // 2 for n in (1, 2, 4, 8, 16, 30)]
        assert "protocol" not in far and not far.get("stream")  # same-targets, in documents
        assert run.fields["compile"] is (scale is None)
    published = {(row["length"], arm): v for row in grid.published["rows"] for arm, v in row["values"].items()}
    assert len(published) == 6 * 8 - 4  # no learned beyond its table
    assert published[15360, "cable"] == 19.28 and published[2048, "kerple"] == 20.38
    assert min(published, key=published.get) == (4096, "cable")


def test_a_set_up_that_the_command_line_changes_is_no_longer_the_papers():
    def reduced(*words, name="crope-1"):
        return grid_of(SWEEPS / f"{name}.yaml", parser_of("", "").parse_args([*words]))[0].reduced

    assert reduced("--set", "device=cpu", "micro_batch_size=8") is None
    assert reduced("--scale", "paper", "--seeds", "5", "--arms", "rope") is None
    assert reduced("--set", "max_steps=100", "device=cpu") == "Changed on the command line: --set max_steps=100."
    assert reduced("--corpus", "novels") == "Changed on the command line: --corpus novels."
    both = reduced("--scale", "cpu", "--set", "max_steps=100")
    assert both.startswith("one corpus, novels") and both.endswith("Changed on the command line: --set max_steps=100.")
    assert reduced("--set", "max_steps=5", name="schemes") is None  # no paper's


def test_what_the_command_line_sets_is_of_all_runs(tmp_path):
    tune = {"learning_rate": [1e-3], "fields": {"max_steps": 1e2}}
    settings = {"short": {}, "long": {"max_steps": 90, "block_size": 32}}
    path = write_grid(tmp_path / "g.yaml", settings=settings, tune=tune)
    steps = lambda grid: {run.max_steps for run in grid.planned_runs(RunFolders(tmp_path))}  # noqa: E731
    assert steps(Grid.read(path)) == {30, 90, 100}
    assert steps(Grid.read(path, changes={"fields": {"max_steps": 20}})) == {20}
    with pytest.raises(ValueError, match="block_size set for all runs makes settings equal"):
        Grid.read(write_grid(path, settings={"a": {}, "b": {"block_size": 32}}), changes={"fields": {"block_size": 8}})
    path = write_grid(path, settings=settings, tune=tune)
    with pytest.raises(ValueError, match="learning_rate is tuned"):
        Grid.read(path, changes={"fields": {"learning_rate": 1e-3}})


def test_a_settings_pos_places_the_arms_scheme_in_a_pattern(tmp_path):
    keys = {
        "arms": {"rope": {}, "alibi": {"pos": "alibi", "pos_options": {"slopes": 0.5}}},
        "settings": {"plain": {}, "mixed": {"pos": ["arm", "arm+none", "none"]}},
    }
    grid = Grid.read(write_grid(tmp_path / "g.yaml", **keys))
    assert grid.fields_of("mixed", "rope")["pos"] == ["rope", "rope+none", "none"]
    mixed, plain = grid.fields_of("mixed", "alibi"), grid.fields_of("plain", "alibi")
    assert mixed["pos"] == ["alibi", "alibi+none", "none"] and mixed["pos_options"] == {"alibi": {"slopes": 0.5}}
    assert plain["pos"] == "alibi" and plain["pos_options"] == {"slopes": 0.5}
    with pytest.raises(ValueError, match="arms of one scheme"):
        Grid.read(write_grid(tmp_path / "g.yaml", arms=["rope+alibi"], settings={"a": {"pos": ["arm"]}}))


@pytest.mark.parametrize("keys,pos,options", [
    # an arm without a scheme of its own has the base's, with its options
    ({"fields": {"pos": "alibi", "pos_options": {"slopes": 0.5}}, "arms": {"a": {"qk_norm": True}}},
     ["alibi", "none"], {"alibi": {"slopes": 0.5}}),
    # what the base's options are made for stays with its scheme
    ({"fields": {"pos": "rope", "pos_options": {"base": 5.0}}, "arms": {"a": {"pos": "rope"}}},
     ["rope", "none"], {"rope": {"base": 5.0}}),
    ({"fields": {"pos": "rope", "pos_options": {"base": 5.0}}, "arms": {"a": {"pos": "alibi"}}},
     ["alibi", "none"], {}),
    # the setting's options of the schemes that it adds stay beside the arm's
    ({"settings": {"s": {"pos": "arm+comrope", "pos_options": {"comrope": {"block": 4}}}},
      "arms": {"a": {"pos": "alibi", "pos_options": {"slopes": 0.5}}}},
     "alibi+comrope", {"alibi": {"slopes": 0.5}, "comrope": {"block": 4}}),
    # alone it is the arm as it stands
    ({"settings": {"s": {"pos": "arm"}}, "arms": {"a": {"pos": "alibi", "pos_options": {"slopes": 0.5}}}},
     "alibi", {"slopes": 0.5}),
])  # fmt: skip
def test_a_pattern_keeps_the_options_of_the_base_the_setting_and_the_arm(tmp_path, keys, pos, options):
    keys = {"settings": {"s": {"pos": ["arm", "none"]}}, **keys}
    fields = {"block_size": 16, "data_dir": "data/nowhere", **keys.pop("fields", {})}
    run = Grid.read(write_grid(tmp_path / "g.yaml", seeds=1, **keys, fields=fields)).runs(RunFolders(tmp_path))[0]
    assert run.config.pos == pos and run.config.pos_options == options


# ---- tuning


def test_tuning_gives_every_arm_the_same_budget_and_takes_the_best_on_validation(tmp_path):
    tune = {"learning_rate": ["5e-4", 1e-3, 2e-3], "seeds": [7, 8], "fields": {"max_steps": 12}}
    grid, files = Grid.read(write_grid(tmp_path / "g.yaml", tune=tune)), RunFolders(tmp_path)
    trials = grid.runs(files)
    budget = {arm: sorted((t.tuning, t.seed, t.max_steps) for t in trials if t.arm == arm) for arm in grid.arms}
    assert budget["rope"] == budget["crope"] == sorted(itertools.product((5e-4, 1e-3, 2e-3), (7, 8), (12,)))
    assert all(t.fields["learning_rate"] == t.tuning for t in trials)
    assert all(math.isclose(t.fields["min_lr"], t.tuning / 10) for t in trials)  # as in the grid: 2e-3 to 2e-4
    best = {"rope": 1e-3, "crope": 5e-4}
    *others, last = sorted(trials, key=lambda t: (t.arm, t.seed, t.tuning) == ("crope", 8, 1e-3))
    for t in others:
        diverged = t.tuning == 2e-3 and t.seed == 8
        finish(t, None if diverged else 3.0 - (t.tuning == best[t.arm]) + 0.1 * t.seed)
    assert grid.best_rate(files, "", "rope") == 1e-3 and grid.best_rate(files, "", "crope") is None
    assert {(r.arm, r.fields["learning_rate"]) for r in grid.runs(files) if r.tuning is None} == {("rope", 1e-3)}
    write_script(tmp_path / "a.sbatch", grid, files, arguments_of("--slurm", "x"), ["made"], ["run"])
    assert "for the 2 main runs" in (tmp_path / "a.sbatch").read_text()

    finish(last, 3.0)
    main = [r for r in grid.runs(files) if r.tuning is None]
    found = {(r.arm, r.fields["learning_rate"], r.seed) for r in main}
    assert found == {(arm, rate, seed) for arm, rate in best.items() for seed in (1, 2)}
    for run in main:
        finish(run, 2.0)
    grid.write(tmp_path)
    text = report.markdown(Study.read(tmp_path))
    assert "tuned for each arm with the same budget: 0.0005, 0.001, 0.002 with seed(s) 7, 8, max_steps 12" in text
    assert "At the end of the range, so perhaps not the best: crope." in text
    assert "| rope | 34,976 | 2 | 0.001 |" in text and "host x" in text


def test_a_learning_rate_that_diverges_is_out_and_holds_nothing_up(tmp_path):
    grid = Grid.read(write_grid(tmp_path / "g.yaml", arms=["rope"], tune={"learning_rate": [1e-3, 1.0]}))
    files = RunFolders(tmp_path)
    low, high = grid.runs(files)
    finish(low, 3.0)
    diverge(high, 9)
    assert not high.done() and grid.best_rate(files, "", "rope") is None  # may still go on
    shutil.rmtree(high.folder)
    diverge(high, 10, gap=1)  # a good step, not logged, between them
    assert not high.done()
    shutil.rmtree(high.folder)
    diverge(high)
    assert high.done() and state_of(high) == "diverged" and grid.best_rate(files, "", "rope") == 1e-3


def test_an_arm_that_diverges_at_every_rate_is_told(tmp_path, capsys):
    grid = Grid.read(write_grid(tmp_path / "g.yaml", arms=["rope", "crope"], seeds=1, tune={"learning_rate": [1.0]}))
    files = RunFolders(tmp_path / "out")
    for trial in grid.runs(files):
        diverge(trial) if trial.arm == "crope" else finish(trial, 3.0)
    finish(grid.runs(files)[-1], 3.0)
    assert told(grid, files, {}) == 1 and told(grid, files, {}, whole=False) == 0  # an element of SLURM's array
    assert "1 wait for a learning rate: trials failed, or diverged at every rate" in capsys.readouterr().err
    grid.write(files.folder)
    assert Study.read(files.folder).missing == ["crope, seed 1 (all trials diverged)"]
    assert (
        told(grid, files, {"tune-crope": "x", **{run.name: "bad" for run in grid.runs(files) if run.diverged()}}) == 1
    )
    assert "1 run(s) failed: the same command tries them again; 1 diverged, and are not" in capsys.readouterr().err
