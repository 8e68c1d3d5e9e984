"""Folders that one process uses at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def sole_use(path: str | os.PathLike[str]) -> Iterator[bool]:
    """Hold the lock file `path`, or yield False where another process holds it.

    The system releases it when the process ends, however it ends.
    """
    with Path(path).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
