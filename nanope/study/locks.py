"""Locks on runs and on what all runs share. A process that is started with a lock's file holds it too, so that it keeps
the lock where the sweep that started it is killed."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from data.shards import output
from nanope.study.run import Run


def lock_path(run: Run) -> Path:
    return run.files.folder / "logs" / f"{run.name}.lock"


def held(run: Run) -> str | None:
    """Who works on this run now, "HOST SLOT PID"; None where nobody does."""
    with contextlib.suppress(OSError), open(lock_path(run)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another process"
    return None


def take(run: Run, slot: int) -> TextIO | None:
    """The lock on a run, a file to keep open; None where another process has it."""
    lock_path(run).parent.mkdir(parents=True, exist_ok=True)
    file = open(lock_path(run), "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    file.write(f"{socket.gethostname()} {slot} {os.getpid()}\n")
    file.flush()
    return file


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[TextIO]:
    """Hold the lock `path`, a file. Wait for another process that has it and is doing `what`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            output(f"waiting for another process that is {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
