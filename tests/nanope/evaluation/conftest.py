"""Fixtures of the tests of evaluation."""

from evaluating import data, gpt2_data, runs  # noqa: F401
