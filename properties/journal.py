"""Finished parts of a calculation on disk, so that a run that was killed goes on where it was."""

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from .errors import OutputError
from .files import write_whole

MIN_SECONDS = 0.2
"""Parts that took less are computed again rather than stored."""

Part = dict[str, NDArray[Any]]


class Journal:
    """Folder of finished parts, each under the hash of everything that decides it.

    Parameters
    ----------
    folder : made with the first part; one folder for each result.
    min_seconds : parts that took less are not stored.
    """

    def __init__(self, folder: str | Path, min_seconds: float = MIN_SECONDS) -> None:
        self.folder = Path(folder)
        self.min_seconds = min_seconds

    @classmethod
    def beside(cls, output: str | Path) -> "Journal":
        """Return the journal that belongs to an output file: a hidden folder beside it."""
        path = Path(output)
        return cls(path.parent / f".{path.name}.parts")

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.npz")))

    def part(self, key: Mapping[str, Any], compute: Callable[[], Part]) -> Part:
        """Return a part from the folder, or compute and store it.

        Parameters
        ----------
        key : everything that decides the part: numbers, text, arrays, structures, and lists or mappings of them.
        compute : called without arguments where the folder does not have the part.

        Returns
        -------
        Arrays by name.

        Raises
        ------
        OutputError : the folder cannot be written.
        """
        path = self.folder / f"{fingerprint(key)}.npz"
        known = _read(path)
        if known is not None:
            return known
        start = time.monotonic()
        part = compute()
        if time.monotonic() - start >= self.min_seconds:
            self._store(path, part)
        return part

    def _store(self, path: Path, part: Part) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"finished parts cannot be kept in '{self.folder}' ({error.strerror}); choose another output"
            ) from error
        write_whole(path, lambda temporary: np.savez(temporary, allow_pickle=False, **part))

    def clear(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def fingerprint(key: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a key; arrays count to the last bit, structures with cell, positions and moments."""
    digest = hashlib.sha256()
    _feed(digest, key)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Atoms):
        moments = value.arrays.get("initial_magmoms")
        value = [value.numbers, value.cell.array, value.pbc, value.positions, "none" if moments is None else moments]
    if isinstance(value, Mapping):
        value = ["mapping", *([str(k), value[k]] for k in sorted(value, key=str))]
    if isinstance(value, list | tuple):
        digest.update(f"list {len(value)};".encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, np.ndarray):
        digest.update(f"array {value.dtype.str} {value.shape};".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update((json.dumps(value) + ";").encode())


def _read(path: Path) -> Part | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
