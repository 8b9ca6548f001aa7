"""Comparisons of runs: which runs are one experiment, and differences on the same tokens."""

import pytest
from evaluating import evaluate, model

from nanope.evaluation.compare import arms_of, compare, comparison_table


def config(**fields):
    return {"n_layer": 1, "pos": "rope", "seed": 1, "data_seed": 1, "out_dir": "a"} | fields


def test_runs_that_differ_in_seeds_are_one_experiment():
    assert arms_of([config(), config(seed=2, out_dir="b"), config(pos="none")]) == ["rope", "rope", "none"]
    for neutral in (dict(sample_interval=5), dict(rank_timeout=1.0), dict(verify_data=True), dict(log_interval=7)):
        assert arms_of([config(), config(seed=2, **neutral), config(pos="none")]) == ["rope", "rope", "none"]
    # More than the scheme differs, so the names tell which fields do
    configs = [config(), config(n_layer=2), config(pos="none")]
    assert arms_of(configs) == ["n_layer=1 rope", "n_layer=2 rope", "n_layer=1 none"]
    masked = config(document_mask=True, eot=256)
    assert arms_of([config(), masked]) == ["document_mask=False", "document_mask=True"]
    combined, patterned = {"pos": "rope+alibi", "n_layer": 2}, {"pos": ["rope", "none"], "n_layer": 2}
    patterns = [config(**patterned), config(**combined), config(**patterned, seed=2)]
    assert arms_of(patterns) == ["rope, none", "rope+alibi", "rope, none"]


def test_a_field_that_came_later_has_its_default_in_older_configs():
    assert arms_of([config(), config(dropout=0.0, seed=2), config(pos="none")]) == ["rope", "rope", "none"]
    before, now = {"content": True}, {"content": True, "first_power": 0, "share_layers": False}
    shape = {"pos": "carope", "n_head": 1, "n_embd": 4}
    carope = [config(**shape, pos_options=options, seed=seed) for seed, options in ((1, before), (2, now))]
    assert len({*arms_of([*carope, config()])}) == 2


@pytest.mark.parametrize(
    "configs, words",
    [
        ([config(), config(seed=2)], "one experiment"),
        ([config(), config(pos="none"), config(out_dir="b")], "name each run once"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(configs, words):
    with pytest.raises(ValueError, match=words):
        arms_of(configs)


def test_rows_that_a_run_lacks_have_a_reason_and_other_tokens_are_refused(data):
    def report(pos, **options):
        options = {"max_targets": 200} | options
        return evaluate(model(pos), data, [32], ["same-targets"], **options) | {"config": config(pos=pos)}

    found = compare([report("rope"), report("learned")])
    assert [r["difference"] is None for r in found] == [False, True] and "learned" in found[1]["reason"]
    text = comparison_table(found)
    assert "| same-targets | 16 | none | learned less rope |" in text and "n/a at 32: learned" in text
    with pytest.raises(ValueError, match="scored different tokens"):
        compare([report("rope"), report("none", max_targets=100)])
