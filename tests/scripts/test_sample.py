"""scripts/sample.py as a command."""

import subprocess
import sys

import pytest
from evaluating import data, save_run  # noqa: F401

from nanope import REPO


@pytest.mark.slow
def test_sample_continues_the_prompt_and_is_repeatable(data, tmp_path):  # noqa: F811
    def sample(*arguments):
        command = [sys.executable, str(REPO / "scripts" / "sample.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    run = tmp_path / "run"
    save_run(run, data)
    first, second = (sample("--run", run, "--prompt", "the light", "--tokens", 40, "--seed", 1) for _ in range(2))
    assert first.returncode == 0 and first.stdout.startswith("the light") and first.stdout == second.stdout
    failed = sample("--run", run / "none")
    assert failed.returncode and "none" in failed.stderr and "Traceback" not in failed.stderr
