"""Values as people write them, in YAML files and on command lines: YAML 1.1 without what it silently reads as something
else, and numbers that it does not know, such as 1e6."""

import re
from pathlib import Path

import yaml

# With a point, an exponent, or both: a whole number stays exact
FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+)")
TRAPS = {
    re.compile(r"[-+]?0[\d_]*\d"): "{0} is an octal number in YAML, and elsewhere a decimal one: write it without the "
    "zero in front, or in quotes where it is a text",
    re.compile(r"[-+]?\d[\d_]*(?::[0-5]?\d)+(?:\.[\d_]*)?"): "{0} is a number to the base of 60 in YAML: write out the "
    "number that is meant, or put it in quotes where it is a text",
}


def number(value):
    """A text such as 1e6, 1E6 or .5e6, which YAML 1.1 leaves as one, as a float. Other values are returned as they
    are, and those in dicts and lists likewise."""
    if isinstance(value, dict):
        return {k: number(v) for k, v in value.items()}
    if isinstance(value, list):
        return [number(v) for v in value]
    return float(value) if isinstance(value, str) and FLOAT.fullmatch(value) else value


class Loader(yaml.SafeLoader):
    """Refuses keys that stand twice, and the numbers in TRAPS. A date is a text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_scalar_node(self, anchor):
        event = self.peek_event()
        for pattern, why in TRAPS.items():
            if event.implicit[0] and pattern.fullmatch(event.value):  # plain: neither quoted nor with a tag
                raise yaml.composer.ComposerError(None, None, why.format(event.value), event.start_mark)
        return super().compose_scalar_node(anchor)

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (first := seen.setdefault((key.tag, key.value), key)) is not key:
                problem = f"{key.value!r} stands twice, here and in line {first.start_mark.line + 1}: keep one of them"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
        return node


def read_yaml(text: str):
    """The value of a YAML text; None where it holds none. ValueError, one line, for what is wrong with it."""
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(where + ", ".join(filter(None, (error.context, error.problem)))) from None
    except yaml.YAMLError as error:  # such as of a character that is none
        raise ValueError(" ".join(str(error).split())) from None
    except (KeyError, RecursionError) as error:  # of a truth value such as !!bool x, of a thousand brackets
        raise ValueError(f"no YAML that can be read: {error}") from None


def read_yaml_file(path: Path) -> dict:
    """The mapping in a YAML file; {} where it is empty, or comments alone. ValueError, which names the file, for what
    is wrong with it, OSError where it cannot be read."""
    try:
        value = read_yaml(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: expected names and values, such as seed: 1, not {str(value)[:40]!r}")
    return value or {}
