"""Files that appear complete or not at all."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import OutputError

DATASETS = (b"\x89HDF", b"CDF")
"""How netCDF files begin."""


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
    except (OSError, RuntimeError) as error:
        # netCDF says by a RuntimeError that the disk is full
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"'{path}' cannot be written ({reason}); choose another output") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def check_dataset_place(path: str | Path, others: Mapping[str, str | Path]) -> None:
    """Check that a dataset can be written at a place, and that it replaces nothing but a dataset.

    Parameters
    ----------
    path : of the dataset.
    others : files that the same command reads or writes, by what they are.

    Raises
    ------
    OutputError : the place cannot be written, or holds something else.
    """
    check_writable(path)
    refuse_others(path, others, "the dataset")
    target = Path(path)
    if target.is_file() and target.stat().st_size:
        with target.open("rb") as file:
            if not file.read(4).startswith(DATASETS):
                raise OutputError(f"'{path}' is there and is no dataset; name another file, or remove it")


def refuse_others(path: str | Path, others: Mapping[str, str | Path], purpose: str) -> None:
    """Refuse a place that the same command reads or writes already.

    Parameters
    ----------
    path : of a file to write.
    others : files that the command reads or writes, by what they are.
    purpose : what the file is for.

    Raises
    ------
    OutputError : the place is one of the others.
    """
    for what, other in others.items():
        if other and Path(other).resolve() == Path(path).resolve():
            raise OutputError(f"'{path}' is {what} already; name another file for {purpose}")


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
