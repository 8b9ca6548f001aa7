"""Who may import whom, and what no file does. CONTRIBUTING.md says it in words."""

import ast
import functools
import subprocess

import pytest

from nanope import REPO

COMMANDS = ("train", "eval", "data.prepare", "data.show", "scripts")
# Module or package → what it may import of the project; the longest name that fits decides
ALLOWED = {
    "nanope.ops": (),
    "nanope.errors": (),
    "nanope": ("nanope", "model", "schemes", "data.shards", "data.tokenizer"),
    "nanope.loss": ("nanope.ops",),
    "nanope.pairs": (),
    "nanope.cpu_attention": ("nanope.ops", "nanope.pairs"),
    "nanope.attention": ("nanope.ops", "nanope.pairs", "nanope.cpu_attention"),
    "nanope.block_masks": ("nanope.pairs", "nanope.attention"),
    "nanope.coordinates": (),
    "nanope.checks": ("schemes",),
    "nanope.convert": ("nanope.ops", "nanope.errors"),
    "nanope.hf": ("nanope.errors",),
    "nanope.bench": ("nanope", "model", "schemes", "data"),  # measures preparation too
    "nanope.study": ("nanope", "model", "schemes", "data.shards", "data.corpora", "data.tasks"),  # a grid names these
    "nanope.evaluation": ("nanope", "model", "schemes", "data.shards", "data.tokenizer", "data.tasks"),
    "schemes": ("nanope.ops", "nanope.errors", "schemes"),
    "model": (
        "nanope.ops",
        "nanope.loss",
        "nanope.attention",
        "nanope.pairs",
        "nanope.block_masks",
        "nanope.convert",
        "nanope.coordinates",
        "nanope.hf",
        "nanope.checks",
        "schemes",
    ),
    "data": ("data",),
    "train": ("nanope", "model", "schemes", "data.shards", "data.tokenizer"),
    "plan": (),  # says what took its place
    "eval": ("nanope", "model", "schemes", "data.shards", "data.tokenizer"),
    "scripts": ("nanope", "model", "schemes", "data"),
}
# Rooms that do not know one another
FORBIDDEN = {
    "nanope.evaluation": ("nanope.optim", "nanope.feed", "nanope.run_folder", "nanope.study", "nanope.bench"),
    "nanope.study": ("nanope.feed", "nanope.run_folder", "nanope.bench"),
}


def tracked(pattern):
    done = subprocess.run(["git", "ls-files", pattern], cwd=REPO, capture_output=True, text=True, check=True)
    return [REPO / name for name in done.stdout.split()]


FILES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for path in tracked("*.py")
    if path.is_file() and "tests" not in path.relative_to(REPO).parts and path.name != "_root.py"
}


@functools.cache
def imports(module):
    """Modules of the project that a file imports anywhere, as names in FILES."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return {name for name in found if name in FILES and name != module}


def within(module, places):
    return any(module == place or module.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_what_its_room_may(module):
    room = max((place for place in ALLOWED if within(module, [place])), key=len)
    for name in imports(module) - {"nanope"}:  # the package itself holds the repository's path, and nothing else
        assert within(name, ALLOWED[room]), f"{module} imports {name}; {room} may import {', '.join(ALLOWED[room])}"
        if module != "data.show":
            assert not within(name, COMMANDS), f"{module} imports {name}, a command: only tests do that"
    for place, others in FORBIDDEN.items():
        if within(module, [place]):
            assert not [name for name in imports(module) if within(name, others)]


def test_no_imports_run_in_a_circle():
    done = set()

    def visit(module, path):
        assert module not in path, f"a circle: {' → '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for name in sorted(imports(module)):
                visit(name, [*path, module])
            done.add(module)

    for module in FILES:
        visit(module, [])


def test_the_path_is_edited_in_one_way_and_nothing_is_patched():
    roots = [REPO / folder / "_root.py" for folder in ("scripts", "data")]
    assert roots[0].read_text() == roots[1].read_text()
    for path in FILES.values():
        text = path.read_text()
        assert "sys.path" not in text, f"{path} edits sys.path: import _root does"
        assert "mock" not in text, f"{path} patches: what varies is a parameter"
        assert path.name != "utils.py"


def test_a_command_that_is_started_by_its_file_finds_the_repository():
    for path in [*tracked("scripts/*.py"), REPO / "data/prepare.py", REPO / "data/show.py"]:
        text = path.read_text()
        if path.name != "_root.py" and ("from nanope" in text or "from data" in text):
            assert text.count("import _root") == 1, f"{path} lacks `import _root`"
