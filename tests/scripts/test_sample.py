"""scripts/sample.py as a command."""

import subprocess
import sys

import pytest
import sample as script
from evaluating import data, save_run  # noqa: F401

from nanope import REPO


@pytest.fixture
def sample(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    """sample(…): what the command prints, or its error, for a rope model of length 16, or another scheme's."""

    def run(*arguments, pos="rope"):
        if not (tmp_path / pos).exists():
            save_run(tmp_path / pos, data, pos=pos)
        monkeypatch.setattr(sys, "argv", ["sample.py", "--run", str(tmp_path / pos), *map(str, arguments)])
        try:
            script.main()
        except SystemExit as error:
            return f"{error.code} {capsys.readouterr().err}"
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_sample_continues_the_prompt_and_is_repeatable(sample, tmp_path):
    """In this process and another."""
    arguments = ["--prompt", "the light", "--tokens", "40", "--seed", "1"]
    here = sample(*arguments)
    command = [sys.executable, str(REPO / "scripts" / "sample.py"), "--run", str(tmp_path / "rope"), *arguments]
    there = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert there.returncode == 0 and there.stdout == here and here.startswith("the light")
    failed = sample("--run", tmp_path / "none")
    assert failed.startswith("error: ") and "none" in failed


def test_temperatures_at_the_ends_of_what_a_number_can_be(sample):
    coldest = sample("--temperature", 0, "--tokens", 12)
    for cold in ("1e-40", "1e-320", "1e-300"):
        assert sample("--temperature", cold, "--tokens", 12) == coldest
    hottest = sample("--temperature", "1e30", "--tokens", 40)
    for hot in ("1e40", "1e300"):
        assert sample("--temperature", hot, "--tokens", 40) == hottest != coldest
        assert sample("--temperature", hot, "--tokens", 5, "--top_k", 0)
    for wrong in ("inf", "nan", "-1", "-inf"):
        assert f"--temperature must be finite and not negative, unlike {wrong}" in sample(f"--temperature={wrong}")
    assert "--seed must have at most 64 bits" in sample("--seed", 10**30)
    assert "--top_k must be" in sample("--top_k", -1) and "--tokens must be" in sample("--tokens", -1)
    assert "an empty path" in sample("--run", "")


def test_an_empty_prompt_begins_after_an_end_of_text(sample):
    assert len(sample("--prompt", "", "--tokens", 30)) > 1
    assert sample("--prompt", "", "--tokens", 16, pos="learned")
    assert "use --tokens 16 or fewer" in sample("--prompt", "", "--tokens", 17, pos="learned")


def test_advice_on_length_can_be_followed(sample):
    """A learned model of length 16 takes prompts of up to 16 tokens, and computes 16 tokens at most."""
    for prompt, tokens in ((1, 300), (5, 13), (16, 2)):
        said = sample("--prompt", "x" * prompt, "--tokens", tokens, pos="learned")
        assert f"use --tokens {17 - prompt} or fewer" in said
        assert sample("--prompt", "x" * prompt, "--tokens", 17 - prompt, pos="learned").startswith("x" * prompt)
    for prompt, tokens in ((17, 1), (40, 5), (40, 300), (18, 0)):
        said = sample("--prompt", "x" * prompt, "--tokens", tokens, pos="learned")
        assert f"has {prompt} tokens: shorten it to 16 or fewer; with --tokens it may have 17 together" in said
