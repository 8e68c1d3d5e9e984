"""Files that appear only when whole, and never in place of what was read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MMACEError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`; what was written there takes the place of `path` when the block ends well.

    The name ends in `.tmp`, so that no search by suffix finds it, and the new file has the permissions of any new file.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_inputs(output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raise MMACEError where `output` is one of the files that the same command reads."""
    if Path(output).resolve() in {Path(path).resolve() for path in inputs}:
        raise MMACEError(f"{output} is read by this command, and would be written over: name another file to write.")
