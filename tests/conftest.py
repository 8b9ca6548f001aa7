"""One thread a process: the suite runs in two processes (pytest.ini), and more threads than cores slow both down."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
