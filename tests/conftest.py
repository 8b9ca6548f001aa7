"""What holds for every test process."""

import os
import signal
import threading

# The suite runs in two processes (pyproject.toml), and more threads than cores slow both down
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with Ctrl-C ignored, which would pass on to the programs that the tests interrupt
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOWEST = ("test_train_ranks.py", "test_compile.py", "test_sweep.py", "test_train_faults.py")


def pytest_collection_modifyitems(items):
    """The longest files first: each is one process's work, and the last one to start must not be the longest."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
