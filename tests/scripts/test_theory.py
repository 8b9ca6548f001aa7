"""nanope/theory.py: each measurement says yes and no where it must; scripts/theory.py and docs/theory.md."""

import importlib
import json
import math

import pytest
import torch
from evaluating import data, save_run  # noqa: F401

from model import GPT, SCHEMES, GPTConfig
from nanope import REPO, attention, theory
from nanope.conformance import Case
from nanope.theory_report import MARK, page_with, parts_of, write_figure

TOYS = REPO / "tests" / "schemes" / "toys.py"
NUMBERS = json.loads((REPO / "results" / "theory" / "numbers.json").read_text())


def small(pos, seed=0, dtype=torch.float64, **options):
    return GPT(GPTConfig(16, 61, 2, 2, 32, pos=pos, pos_options=options), seed).to(dtype).eval()


def text(T, seed=0):
    return torch.randint(61, (1, T), generator=torch.Generator().manual_seed(seed))


# ---- relative, and on what a score depends


@pytest.mark.parametrize(
    "pos,shift,before,between,turn",
    [
        ("rope", False, False, False, False),
        ("comrope", False, False, False, False),
        ("carope", False, False, True, True),
        ("learned", True, True, False, None),
        ("alibi", False, False, False, None),
        (f"{TOYS}:Forget", False, False, True, None),  # gates of the tokens between
        ("sinusoidal", True, True, False, None),
        (f"{TOYS}:WideSlope", False, False, False, None),  # encode adds channels, and is not linear
    ],
)
def test_experiments_tell_on_what_a_score_depends(pos, shift, before, between, turn):
    found = theory.structure(pos)
    expected = {"shift": shift, "before": before, "between": between}
    assert {key: found[key] > 1e-9 for key in expected} == expected
    assert (found["turn"] is None) == (turn is None) and (turn is None or (found["turn"] > 1e-9) == turn)


def test_carope_is_as_far_from_relative_as_its_phases_say():
    """M(m, m-d) and M(d, 0) are rotations, whose difference has the norm √Σ 8 sin²(δ/2) of D channels."""
    model = Case("carope").model()
    seen = theory.layers_of(model, text(20))[0]
    log_f = seen.scheme.log_frequencies(seen.x)[0]  # (T, H)
    phases = (log_f.unsqueeze(-1) * torch.arange(8)).exp().cumsum(0)  # (T, H, D/2)
    for d in (1, 6):
        gap = (phases[d:] - phases[:-d]) - (phases[d] - phases[0])
        expected = ((8 * (gap / 2).sin().square()).sum(-1) / 16).sqrt()[1:].mean()
        assert math.isclose(theory.distance_from_relative(seen, [d])[0], expected, rel_tol=1e-9)


def test_unrelated_rotations_are_the_root_of_two_apart():
    model = small("carope", std=3.0)
    found = theory.distance_from_relative(theory.layers_of(model, text(200))[0], [100])[0]
    assert 1.1 < found < 1.42  # pair 0 turns alike in all


# ---- comrope, frequencies, decay


@pytest.mark.parametrize("kind", theory.COMROPES)
def test_comrope_is_rope_with_learned_frequencies(kind):
    assert theory.comrope_gap(theory.COMROPES[kind]) < 1e-11


def test_comropes_gap_is_not_zero_for_another_model(monkeypatch):
    real = theory.layers_of
    monkeypatch.setattr(theory, "layers_of", lambda model, idx: real(model, idx, offset=0.5))
    assert theory.comrope_gap({}) < 1e-11  # relative: a shift is no difference
    monkeypatch.setattr(theory, "layers_of", lambda model, idx: real(small("rope"), idx))
    assert theory.comrope_gap({}) > 0.1


def test_frequencies_are_those_that_were_set():
    """Twice rope's in comrope, rope's own, and carope's with a bias that was moved."""
    for pos, factor in (("rope", 1.0), ("crope", 1.0), ("comrope", 0.7)):
        model = small(pos, **({"block": 2} if pos == "comrope" else {}))
        if pos == "comrope":
            with torch.no_grad():
                for block in model.transformer["h"]:
                    block.attn.pos.P *= factor
        found = theory.frequency_ratios(theory.layers_of(model, text(30)))
        for key in ("median", "least", "largest"):
            assert torch.allclose(torch.tensor(found[key]), torch.tensor(factor), rtol=1e-6), pos
        assert max(found["spread"]) < 1e-6
    moved = theory.frequency_ratios(theory.layers_of(Case("carope").model(), text(30)))
    assert moved["median"][0] == pytest.approx(1) and max(moved["spread"]) > 1e-3


def test_similarity_is_the_mean_cosine_and_decays_as_a_logarithm():
    seen = theory.layers_of(small("rope"), text(60))[0]
    frequencies = seen.scheme.frequencies()
    expected = [float((d * frequencies).cos().mean()) for d in (1, 7, 40)]
    assert theory.similarity(seen, [1, 7, 40]) == pytest.approx(expected)
    wide = theory.rope_decay(width=4096)
    assert wide["mean_gap"] < 0.5 * theory.rope_decay(width=64)["mean_gap"]  # the integral is of many pairs
    assert 0.3 < wide["rises"] < 0.6


# ---- CRoPE's projection


def test_the_conjugate_share_is_that_of_the_parts():
    """0 of a complex-linear matrix, 1 of a conjugate, what was put in of a sum, and about 0.5 of a random one."""
    assert max(sum(theory.conjugate_shares(small("crope")), [])) < 1e-12
    flip = torch.diag(torch.tensor([1.0, -1.0] * 16, dtype=torch.float64))  # x̃ → conj(x̃)
    linear = small("crope").transformer["h"][0].attn.c_attn.weight.detach()
    assert theory.conjugate_share(linear @ flip) == pytest.approx(1)
    assert theory.conjugate_share(linear + 0.5 * linear @ flip) == pytest.approx(0.2)
    drawn = torch.randn(60, 32, 32, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([theory.conjugate_share(matrix) for matrix in drawn])
    assert abs(shares.mean() - 0.5) < 4 * theory.share_deviation(32) / 60**0.5
    assert 0.7 < shares.std() / theory.share_deviation(32) < 1.3


# ---- beyond the training length


def test_biases_by_distance():
    model = small("alibi")
    found = theory.bias_by_distance(theory.layers_of(model, text(200)), [1, 16, 136])
    slope = model.transformer["h"][0].attn.pos.slopes().mean()
    assert found == pytest.approx([float(-slope * d) for d in (1, 16, 136)])
    assert theory.bias_by_distance(theory.layers_of(small("rope"), text(200)), [1]) is None


@pytest.mark.parametrize("pos", ["rope", "alibi", f"{TOYS}:DenseSlope"])
def test_attention_beyond_a_distance_is_the_sum_of_its_weights(pos):
    model, idx = small(pos), text(100)
    m, n = torch.arange(100).view(-1, 1), torch.arange(100)
    whole = torch.stack(attention.weights_by_layer(model, idx))[:, 0, :, -50:]  # of the last queries
    expected = [float((whole * (m - n >= d)[-50:]).sum(-1).mean()) for d in (0, 3, 60)]
    found = theory.attention_beyond(model, idx, [0, 3, 60])
    assert found == pytest.approx(expected) and found[0] == pytest.approx(1) and found[2] < found[1] < 1


# ---- the command and the page


@pytest.mark.slow
def test_the_command_writes_numbers_page_and_figure(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    script = importlib.import_module("theory")
    runs = tmp_path / "runs"
    for pos in ("rope", "carope", "alibi", "learned"):
        save_run(runs / pos, data, pos=pos, seed=1, n_layer=2)
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text((REPO / "docs" / "theory.md").read_text())
    monkeypatch.setattr(theory, "exact_claims", lambda: NUMBERS["exact"])  # tested above, and slower
    script.main(["--runs", str(runs), "--out", str(out), "--page", str(page)])
    shown = capsys.readouterr().out
    assert "no run of none" in shown and "sinusoidal" in shown
    numbers = json.loads((out / "numbers.json").read_text())
    assert set(numbers["runs"]) == {"rope", "carope", "alibi", "learned"}
    assert set(numbers["missing"]) == set(SCHEMES) - set(numbers["runs"])
    assert page.read_text() == page_with(page.read_text(), numbers) != (REPO / "docs" / "theory.md").read_text()
    for kind in ("png", "pdf"):
        assert (out / f"figure.{kind}").stat().st_size > 10_000
    assert numbers["runs"]["learned"]["trained"]["beyond_16x"] is None
    assert numbers["runs"]["carope"]["trained"]["turn"][-1] > 1e-3
    assert numbers["runs"]["rope"]["trained"]["beyond_16x"][0] == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="nothing to draw"):
        write_figure({"runs": {}}, out)
    with pytest.raises(SystemExit):
        script.main(["--runs", str(tmp_path / "none")])
    assert "is no folder" in capsys.readouterr().err


def test_the_page_says_what_the_numbers_hold():
    page = (REPO / "docs" / "theory.md").read_text()
    assert page == page_with(page, NUMBERS)
    assert {mark[2] for mark in MARK.finditer(page)} == set(parts_of(NUMBERS))
    zero = [found["turn"] for name, found in NUMBERS["exact"]["structure"].items() if name in ("rope", "comrope")]
    assert max(zero) < 1e-12 < NUMBERS["exact"]["structure"]["carope"]["turn"]
