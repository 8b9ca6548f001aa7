"""nanope/values.py: YAML without what it silently reads as something else."""

import pytest
import yaml

from nanope import REPO
from nanope.values import number, read_yaml, read_yaml_file


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, words",
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: 'a' stands twice, here and in line 1"),
        ("x: {a: 1, 'a': 2}", "'a' stands twice"),
        ("a: 010", "line 1, column 4: 010 is an octal number"),
        ("a: -07", "-07 is an octal number"),
        ("a: 09", "09 is an octal number"),
        ("a: [1, 0_10]", "octal"),
        ("010: a", "octal"),
        ("a: 1:30", "1:30 is a number to the base of 60"),
        ("a: 12:30:45", "base of 60"),
        ("a: 1:30.5", "base of 60"),
        ("a: [1\nb: 2", "line 2, column 2: while parsing a flow sequence, expected"),
        ("\ta: 1", "line 1, column 1: .* cannot start any token"),
        ("\x00", "unacceptable character"),
        ("a: !!bool x", "no YAML that can be read"),
        ("[" * 1000, "no YAML that can be read"),
    ],
)
def test_what_yaml_would_misread_is_refused_with_the_reason(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as info:
        read_yaml(text)
    assert "\n" not in str(info.value)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/a.yaml: .*{words}"):
        read_yaml_file(tmp_path / "a.yaml")


def test_what_is_meant_is_read():
    assert read_yaml("{a: 10, b: 0, c: 0.5, d: 0x10, e: '010', f: \"1:30\", g: 2024-01-01, h: my.py:30}") == {
        **dict(a=10, b=0, c=0.5, d=16, e="010"),
        **dict(f="1:30", g="2024-01-01", h="my.py:30"),
    }
    merged = read_yaml("a: &a {x: 1, y: 1}\nb: {<<: *a, x: 2}\nc: {<<: *a}")
    assert merged["b"] == {"x": 2, "y": 1} and merged["c"] == merged["a"]
    for path in (REPO / "configs").rglob("*.yaml"):
        assert read_yaml_file(path) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize("text", ["", "\n\n", "# n_layer: 3\n", "---\n"])
def test_a_file_without_values_is_empty(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml_file(tmp_path / "a.yaml") == {}


@pytest.mark.parametrize("text", ["- 1", "words", "3"])
def test_a_file_without_names_is_none(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match="a.yaml: expected names and values"):
        read_yaml_file(tmp_path / "a.yaml")


def test_numbers_that_yaml_leaves_as_texts():
    texts = {"1e6": 1e6, "1E6": 1e6, ".5e6": 5e5, "5E-4": 5e-4, "+1e3": 1e3, "-1.5e-3": -1.5e-3, "1.": 1.0, ".5": 0.5}
    assert number({text: text for text in texts}) == texts and number([*texts]) == [*texts.values()]
    for text in ("e6", "1e", "12345678901234567891", "1e6x", ".", "off", "1:30", ""):
        assert number(text) == text
