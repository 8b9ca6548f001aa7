"""nanope/config.py: fields from defaults, a YAML file and the command line."""

import dataclasses
from pathlib import Path

import pytest

import nanope.config as config_file
from nanope import REPO
from nanope.config import RunConfig, check, parse, write_yaml


def test_fields_come_from_defaults_the_file_and_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 6e-4\nn_layer: 3\npos: comrope\npos_options: {block: 4, unit: 64}\n")
    given = ["--n_layer", "5", "--min_lr=1e-5", "--bias", "true", "--micro_batch_size", "null"]
    config = parse(["--config", str(path), *given])
    assert (config.learning_rate, config.min_lr, config.bias) == (6e-4, 1e-5, True)
    assert (config.n_layer, config.n_head) == (5, 12)
    assert config.pos_options == {"block": 4, "unit": 64} and config.micro_batch_size is None
    assert parse(["--config", str(path), "--pos_options.block", "2"]).pos_options["block"] == 2
    options = parse(["--pos", "comrope", "--pos_options.init", "gaussian", "--pos_options.base", "1e3"]).pos_options
    assert options == {"init": "gaussian", "base": 1000.0}
    assert parse(["--pos_options", "{base: 500}"]).pos_options == {"base": 500}
    assert parse([]) == RunConfig()


PATTERN = ["rope", "rope", "none"]


@pytest.mark.parametrize(
    "text, pos",
    [
        ("rope", "rope"),
        ("none", "none"),
        ("rope+alibi", "rope+alibi"),
        ("my_file.py:MyScheme", "my_file.py:MyScheme"),
        ("a folder/my_file.py:My", "a folder/my_file.py:My"),
        ("1", "1"),
        ("on", "on"),
        ("null", "null"),
        ("[rope,rope,none]", PATTERN),
        ("[rope, rope, none]", PATTERN),
        ('["rope", "rope", "none"]', PATTERN),
        ("[rope+alibi, my_file.py:MyScheme]", ["rope+alibi", "my_file.py:MyScheme"]),
    ],
)
def test_pos_of_a_command_line(text, pos):
    assert parse(["--pos", text]).pos == pos and parse([f"--pos={text}"]).pos == pos


@pytest.mark.parametrize(
    "text, fields",
    [
        ("pos: rope+alibi", dict(pos="rope+alibi")),
        ("pos: [rope, rope, none]", dict(pos=PATTERN)),
        ("pos:\n- rope\n- rope\n- none", dict(pos=PATTERN)),
        ("window: 64", dict(window=64)),
        ("window: [64, 0]", dict(window=[64, 0])),
        ("pos: my_file.py:MyScheme\nwindow: 0", dict(pos="my_file.py:MyScheme", window=0)),
        (
            "pos: rope+alibi\npos_options: {rope: {base: 5e5}, alibi: {}}",
            dict(pos="rope+alibi", pos_options={"rope": {"base": 5e5}, "alibi": {}}),
        ),
    ],
)
def test_pos_and_window_of_a_file(tmp_path, text, fields):
    (tmp_path / "c.yaml").write_text(text)
    assert parse(["--config", str(tmp_path / "c.yaml")]) == RunConfig(**fields)


def test_window_and_options_by_name_of_a_command_line():
    assert parse(["--window", "64"]).window == 64 and parse(["--window", "[64,0]"]).window == [64, 0]
    config = parse(["--pos", "rope+alibi", "--pos_options.rope.base", "5e5", "--pos_options.rope.fraction", "0.5"])
    assert config.pos_options == {"rope": {"base": 5e5, "fraction": 0.5}}
    options = parse(
        ["--pos_options", "{rope: {base: 2, fraction: 0.5}, fox: {}}", "--pos_options.rope.base=3"]
    ).pos_options
    assert options == {"rope": {"base": 3, "fraction": 0.5}, "fox": {}}
    with pytest.raises(SystemExit):
        parse(["--pos_options.rope.base"])


@pytest.mark.slow
def test_a_config_survives_its_file(tmp_path):
    some = dict(learning_rate=1e-5, bias=True, out_dir="runs/ünï: x", micro_batch_size=3)
    one = dict(pos="comrope", pos_options={"block": 4, "init": "rope", "unit": 64.0})
    several = dict(pos=["rope", "my_file.py:My+none"], pos_options={"rope": {"base": 500.0}}, window=[64, 0])
    for config in (RunConfig(**some, **one), RunConfig(**some, **several)):
        write_yaml(config, tmp_path / "config.yaml")
        assert parse(["--config", str(tmp_path / "config.yaml")]) == config
    for path in (REPO / "configs").glob("*.yaml"):
        check(parse(["--config", str(path)]))


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as info:
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    explained = text.split("options:")[1]
    assert info.value.code == 0
    docs = Path(config_file.__file__).read_text()
    for field in dataclasses.fields(RunConfig):
        doc = " ".join(docs.split(f"\n    {field.name}: ")[1].split('"""')[1].split())
        assert len(doc) > 10 and f"--{field.name} " in explained and doc in explained, field.name


WHOLE = ["1E6", "1e6", "+1e6", "1.0e6", "1_000_000", "1000000"]
REAL = [".5e6", "5E5", "5e+5", "500000.", "500000"]


@pytest.mark.parametrize("text", WHOLE)
def test_whole_numbers_may_have_an_exponent(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"max_steps: {text}\nmicro_batch_size: {text}\nwindow: [{text}, 0]\n")
    for given in (
        ["--config", str(tmp_path / "c.yaml")],
        ["--max_steps", text, f"--micro_batch_size={text}", "--window", f"[{text}, 0]"],
    ):
        config = parse(given)
        assert (config.max_steps, config.micro_batch_size, config.window) == (10**6, 10**6, [10**6, 0])
        assert type(config.max_steps) is int
    with pytest.raises(SystemExit):
        parse(["--max_steps", "1.5"])
    assert parse(["--seed", "12345678901234567891"]).seed == 12345678901234567891  # to the last digit


@pytest.mark.parametrize("text", REAL)
def test_numbers_are_written_as_people_do(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"learning_rate: {text}\npos_options: {{base: {text}}}\n")
    for given in (
        ["--config", str(tmp_path / "c.yaml")],
        ["--learning_rate", text, "--pos_options.base", text],
        [f"--learning_rate={text}", "--pos_options", f"{{base: {text}}}"],
    ):
        config = parse(given)
        assert config.learning_rate == config.pos_options["base"] == 5e5 and type(config.learning_rate) is float


@pytest.mark.parametrize("text", ["1e-5", "0.00001", "1e20", "-1e-07", ".inf"])
def test_options_given_at_once_are_those_given_one_by_one(text):
    (one,) = parse(["--pos_options.a", text]).pos_options.values()
    assert type(one) is float
    assert parse(["--pos_options", f"{{a: {text}, s: {{b: [{text}]}}}}"]).pos_options == {"a": one, "s": {"b": [one]}}


@pytest.mark.parametrize(
    "name, text, words",
    [("max_steps", "1:30", "base of 60")]
    + [
        (name, "010", "octal")
        for name in ("max_steps", "learning_rate", "micro_batch_size", "pos_options.base", "window")
    ],
)
def test_numbers_that_yaml_reads_as_others_are_refused(tmp_path, capsys, name, text, words):
    outer, _, inner = name.partition(".")
    (tmp_path / "c.yaml").write_text(f"{outer}: {{{inner}: {text}}}" if inner else f"{name}: {text}")
    for given in (["--config", str(tmp_path / "c.yaml")], [f"--{name}", text], [f"--{name}={text}"]):
        with pytest.raises(SystemExit):
            parse(given)
        err = capsys.readouterr().err
        assert f"{text} is " in err and words in err and err.count("\n") == 1
        assert "c.yaml: line 1" in err or f"--{name}: " in err


def test_the_choice_off_is_no_truth_value(tmp_path):
    for text in ("off", "no", "'off'", "false"):
        (tmp_path / "c.yaml").write_text(f"wandb: {text}")
        assert parse(["--config", str(tmp_path / "c.yaml")]).wandb == "off"
    assert parse(["--wandb", "off"]).wandb == "off"


@pytest.mark.parametrize("text", ["", "# n_layer: 3\n", "\n"])
def test_a_config_of_comments_alone_changes_nothing(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert parse(["--config", str(tmp_path / "c.yaml")]) == RunConfig()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data_dir", "out_dir", "init_from"])
def test_paths_are_what_a_shell_makes_of_them(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "some/where")
    monkeypatch.delenv("NOWHERE", raising=False)
    meant = {"~/x": f"{tmp_path}/x", "$HOME/x": f"{tmp_path}/x", "${PLACE}/x": "some/where/x", "a~/x": "a~/x"}
    wrong = {"": "an empty path", " ": "an empty path", "~nobody-here/x": "no such user", "$NOWHERE/x": "not set"}
    ways = 4 if name == "out_dir" else 1
    for text, path in meant.items():
        (tmp_path / "c.yaml").write_text(f"{name}: '{text}'")
        for given in ([f"--{name}", text], ["--config", "~/c.yaml"], [f"--{name}={text}"])[:ways]:
            assert getattr(parse(given), name) == path
    for text, words in wrong.items():
        (tmp_path / "c.yaml").write_text(f"{name}: '{text}'")
        given_ways = ([f"--{name}", text], ["--config", "$HOME/c.yaml"], [f"--{name}={text}"], ["--config", text])
        for given in given_ways[:ways]:
            with pytest.raises(SystemExit):
                parse(given)
            assert words in (err := capsys.readouterr().err) and err.count("\n") == 1
    if name != "init_from":
        with pytest.raises(ValueError, match=f"{name} must name a folder"):
            check(RunConfig(**{name: ""}))


OF_ROPE = "pos: rope\npos_options: {base: 500.0, fraction: 1.0, explicit: false, qkv: dense}\n"


@pytest.mark.parametrize(
    "text, given, options, left_out",
    [
        (OF_ROPE, ["--pos", "alibi"], {}, "base, fraction, explicit, qkv"),
        (OF_ROPE, ["--pos", "crope"], {"base": 500.0, "fraction": 1.0}, "explicit, qkv"),
        (OF_ROPE, ["--pos=crope", "--pos_options.base=3"], {"base": 3, "fraction": 1.0}, "explicit, qkv"),
        (OF_ROPE, ["--pos", "alibi", "--pos_options", "{}"], {}, None),
        (OF_ROPE, ["--pos", "rope"], {"base": 500.0, "fraction": 1.0, "explicit": False, "qkv": "dense"}, None),
        (
            OF_ROPE,
            ["--pos", "[rope, none]"],
            {"rope": {"base": 500.0, "fraction": 1.0, "explicit": False, "qkv": "dense"}},
            None,
        ),
        ("pos: rope+alibi\npos_options: {rope: {base: 3.0}}", ["--pos", "rope"], {"base": 3.0}, None),
        ("pos: rope+alibi\npos_options: {rope: {base: 3.0}}", ["--pos", "learned"], {}, "rope"),
        ("pos_options: {bse: 3.0}", ["--n_layer", "3"], {"bse": 3.0}, None),  # a mistake stays one
    ],
)
def test_options_of_a_files_scheme_do_not_stand_in_the_way_of_another(tmp_path, capsys, text, given, options, left_out):
    (tmp_path / "c.yaml").write_text(text)
    assert parse(["--config", str(tmp_path / "c.yaml"), *given]).pos_options == options
    err = capsys.readouterr().err
    assert err.startswith(f"note: {left_out} of the file's pos_options") and "left out" in err if left_out else not err
