"""What holds for every test process."""

import json
import os
import signal
import sys
import threading

import pytest

from nanope import REPO

# Tests import commands by their names. Behind installed packages: scripts/lm_eval.py runs one of its name
sys.path.append(str(REPO / "scripts"))

# The suite runs in two processes (pyproject.toml), and more threads than cores slow both down
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with Ctrl-C ignored, which would pass on to the programs that the tests interrupt
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOWEST = ("test_train.py", "test_sweep.py", "test_train_ranks.py", "test_fsdp.py", "test_conformance.py")
SLOWEST += ("test_interruptions.py",)


def pytest_collection_modifyitems(items):
    """The longest files first: each is one process's work, and the last one to start must not be the longest."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


@pytest.fixture(scope="session", autouse=True)
def figures_as_text():
    """Data folders made in this process have what their figure shows, as text: to draw it takes longer than the rest.

    Folders made by commands that tests start have the figure.
    """
    import data.publish

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.publish, "lengths_figure", lambda lengths: json.dumps(lengths).encode())
        yield


@pytest.fixture
def drawn_figures(monkeypatch):
    """Figures are drawn in this test, which compares a folder made here with one that a command made."""
    import data.publish
    import data.summary

    monkeypatch.setattr(data.publish, "lengths_figure", data.summary.lengths_figure)
