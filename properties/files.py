"""Files that appear complete or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import OutputError


def write_whole(path: str | Path, write: Callable[[str], Any]) -> None:
    """Call `write` on a temporary name beside `path` and rename it when it is complete.

    Raises
    ------
    OutputError : the place cannot be written.
    """
    target = Path(path)
    check_writable(target)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
        os.close(handle)
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written ({error.strerror or error}); choose another output") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def check_writable(path: str | Path) -> None:
    """Check, without leaving anything behind, that a file can be made at a place.

    Raises
    ------
    OutputError : no such directory, a directory of that name, or no permission.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"'{path}' is a directory; name a file for the output")
    if not target.parent.is_dir():
        raise OutputError(f"the directory '{target.parent}' of the output does not exist; make it first")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written ({error.strerror}); choose another output") from error
