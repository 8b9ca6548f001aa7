"""Files that are written atomically: a reader finds the old content or the new, never a part of it."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class HashingFile:
    """A binary file for writing that hashes what passes through."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def check_writable(path: Path) -> None:
    """Make the folder of `path`. OSError unless write_atomically can write there now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    temporary.touch()
    temporary.unlink()


def temporary_of(path: Path) -> Path:
    """The file that is written before it becomes `path`."""
    return path.with_name(f".{path.name}.partial")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) for a temporary file, fsync it, and rename it to `path`. This holds after a power loss too.
    OSError (disk full, no permission), which names `path`, leaves the old file as it was and no temporary one."""
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None:  # an error in the middle of a write does not know the name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
