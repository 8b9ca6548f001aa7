"""nanope/conformance.py: every scheme passes every check, and each check finds what is wrong."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from nanope import REPO
from nanope.conformance import CHECKS, Case, run
from schemes import SCHEMES

TOYS = Path(__file__).with_name("toys.py")
GOOD = ("Slope", "WideSlope", "DenseSlope", "Forget", "Sigmoid", "Jitter", "Stretch", "Penalty", "Halved")
WRONG = {
    "SeesTheFuture": "causality",
    "ForgetsTheCache": "cached_decoding",
    "MixesRows": "separate_rows",
    "Draws": "determinism",
    "NoInitialValue": "initial_values",
    "Unused": "gradients",
    "WrongGradient": "gradients",
    "ChunksAlone": "chunks",
    "KeysInVain": "evaluation",
    "ByLayer": "compilation",
    "Breaks": "compilation",
    "Untyped": "options_are_announced",
    "KeepsATensor": "saving",
}
CASES = {name: Case(name) for name in SCHEMES}
CASES |= {name: Case(f"{TOYS}:{name}") for name in GOOD}
CASES |= {
    "comrope ld-shared": Case("comrope", {"kind": "ld-shared", "init": "gaussian", "unit": 100.0}),
    "carope shared, none": Case(["carope+alibi", "none", "carope"], {"carope": {"share_layers": True}}),
    "rope+alibi": Case("rope+alibi"),
    "comrope+Forget": Case(f"comrope+{TOYS}:Forget"),
    "WideSlope+Forget+Sigmoid": Case(f"{TOYS}:WideSlope+{TOYS}:Forget+{TOYS}:Sigmoid"),
    "learned+carope": Case("learned+carope"),
    "rope+Forget, none in windows": Case([f"rope+{TOYS}:Forget", "none"], {}, {"window": [5, 0]}),
    "comrope axes ld": Case("comrope", {"axes": ["token", "line", "byte"], "kind": "ld"}),
    "comrope axes+Forget, none": Case(
        [f"comrope+{TOYS}:Forget", "none"], {"comrope": {"axes": ["token", "sentence"], "jitter": 0.2}}
    ),
    "rope in a window": Case("rope", {}, {"window": 7}),
    "DenseSlope in a window": Case(f"{TOYS}:DenseSlope", {}, {"window": 7}),
    "gape+alibi": Case("gape+alibi"),
    "path+fox": Case("path+fox"),
    "lerope, none": Case(["lerope+alibi", "none", "lerope"]),
    "selective all options": Case("selective", {"rank": 0, "silu": True, "gate": True, "phase_bias": True}),
}
QUICK = {*SCHEMES, "Forget", "DenseSlope", "rope+Forget, none in windows"}
SLOW = {"lengths", "compilation"}
# What test_schemes.py has for every scheme of the registry and every option, against slow references
ELSEWHERE = {"shared_initial_values", "causality", "cached_decoding", "gradients", "low_precision"}


# Combinations that are compiled: one of each way in which layers differ, or schemes act together
COMPILED = {*SCHEMES, "carope shared, none", "rope+Forget, none in windows", "comrope axes ld", "path+fox"}
COMPILED |= {"comrope axes+Forget, none", "DenseSlope in a window", "selective all options"}


def is_slow(check, name):
    """The quick tests leave it out for this case."""
    return name not in QUICK or check in SLOW or name in SCHEMES and check in ELSEWHERE


@pytest.mark.parametrize("name", [name for name in CASES if name in QUICK])
def test_every_scheme(name):
    for check, run_check in CHECKS.items():
        if not is_slow(check, name):
            run_check(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_scheme_passes_the_other_checks(name):
    for check, run_check in CHECKS.items():
        if is_slow(check, name) and (check != "compilation" or name in COMPILED):
            run_check(CASES[name])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if check in SLOW else n for n, check in WRONG.items()]
)
def test_what_is_wrong_is_found(name):
    with pytest.raises(AssertionError):
        CHECKS[WRONG[name]](Case(f"{TOYS}:{name}"))


def test_a_scheme_that_raises_is_reported_by_the_checks(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from schemes import Scheme\n"
        "class Mine(Scheme):\n"
        "    def encode(self, qk, x, ctx):\n"
        "        return qk + ctx.position\n"
    )
    found = run(Case(f"{file}:Mine"))
    assert (
        "has no attribute 'position' (mine.py, line 4)" in found["causality"] and found["options_are_announced"] is None
    )


@pytest.mark.slow
@pytest.mark.parametrize(("pos", "status", "text"), [
    (f"{TOYS}:Forget", 0, f"{len(CHECKS)} of {len(CHECKS)} checks passed"),
    (f"{TOYS}:SeesTheFuture", 1, "FAIL  causality: token"),
])  # fmt: skip
def test_the_command(pos, status, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_scheme.py", pos])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("check_scheme").main()
    assert stopped.value.code == status and text in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_as_a_process():
    done = subprocess.run([sys.executable, "scripts/check_scheme.py", "rop"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1 and "did you mean rope?" in done.stderr
