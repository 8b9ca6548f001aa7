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
