"""nanope/schedule.py: warm-ups that do not fit the run. tests/test_train.py has the rates."""

import pytest

from nanope.config import RunConfig, check
from nanope.schedule import learning_rate, warning

FIELDS = dict(learning_rate=1e-3, min_lr=1e-4, max_steps=100)


@pytest.mark.parametrize("schedule", ["cosine", "step", "wsd", "constant"])
def test_a_warm_up_as_long_as_the_run_says_what_the_rate_will_be(schedule):
    config = RunConfig(**FIELDS, schedule=schedule, warmup_steps=400)
    check(config)  # a short trial of a long recipe is a run like others
    assert "warmup_steps 400 is as long as the run of 100 step(s)" in warning(config)
    assert learning_rate(99, config) == pytest.approx(2.5e-4)
    assert "only rises, to 0.00025 in the last step, and never reaches 0.001" in warning(config)
    equal = warning(RunConfig(**FIELDS, schedule=schedule, warmup_steps=100))
    assert equal.endswith("only rises, to 0.001 in the last step")
    for most in (0, 1, 50):
        assert warning(RunConfig(**FIELDS, schedule=schedule, warmup_steps=most)) is None
    assert warning(RunConfig(**{**FIELDS, "max_steps": 1}, warmup_steps=1)) is None


@pytest.mark.parametrize("fields, most", [({}, 81), (dict(decay_fraction=0.5), 51), (dict(decay_fraction=1.0), 1)])
def test_a_warm_up_within_the_decay_of_wsd_is_refused(fields, most):
    """There the rate would jump: the largest change of a step is at most that of the warm-up or of the decay."""
    for warmup in range(1, 100):
        config = RunConfig(**FIELDS, **fields, schedule="wsd", warmup_steps=warmup)
        rates = [learning_rate(step, config) for step in range(100)]
        decay = 9e-4 / (config.decay_fraction * 100)
        falls = max(a - b for a, b in zip(rates, rates[1:]))
        assert (falls > decay * (1 + 1e-9)) == (warmup > most)
        if warmup > most:
            words = f"warmup_steps {warmup} reaches .* from 0.001 in step {warmup} to .*; with at most {most} steps"
            with pytest.raises(ValueError, match=words):
                check(config)
        else:
            check(config)


def test_a_warm_up_over_decays_of_the_step_schedule_is_said():
    fields = dict(schedule="step", lr_step=20, lr_gamma=0.5)
    assert warning(RunConfig(**FIELDS, **fields, warmup_steps=20)) is None
    text = warning(config := RunConfig(**FIELDS, **fields, warmup_steps=45))
    check(config)
    assert "jumps from 0.001 in step 45 to 0.00025 in the next; with at most 20 steps" in text
