"""Label files: atomic writes, reading with the contract checked, checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read, write

from ..errors import LabelError
from ..files import whole_file

CHECKSUMS = "SHA256SUMS"


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name in the same folder, then rename it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text)


def write_labels(path: str | Path, frames: Sequence[Atoms]) -> None:
    """Write frames as extended XYZ, atomically, after checking each against the contract."""
    for index, atoms in enumerate(frames):
        check_frame(atoms, f"frame {index} for {str(path)!r}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        write(temporary, list(frames), format="extxyz")


def read_labels(path: str | Path) -> list[Atoms]:
    """Read a label file and check every frame against the contract.

    Raises
    ------
    LabelError
        Names file, frame and fault.
    """
    try:
        frames = read(path, index=":", format="extxyz")
    except OSError as error:
        raise LabelError(f"cannot read the labels {str(path)!r}: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, StopIteration) as error:
        raise LabelError(f"{str(path)!r} is not an extended XYZ file ({error})") from None
    for index, atoms in enumerate(frames):
        check_frame(atoms, f"{str(path)!r}, frame {index}")
    return frames


def check_frame(atoms: Atoms, where: str) -> None:
    """Check one frame against the label contract.

    Parameters
    ----------
    atoms : Atoms
    where : str
        File and frame, for the message.

    Raises
    ------
    LabelError
        Something is missing, has the wrong shape, or is not finite where it must be.
    """
    for key in ("parent", "name", "code", "recipe"):
        if not isinstance(atoms.info.get(key), str):
            raise LabelError(f"{where}: info {key!r} is missing; every label needs its provenance")
    soc = atoms.info.get("soc")
    if soc not in (0, 1):
        raise LabelError(f"{where}: info 'soc' must be 0 or 1, not {soc!r}")
    if soc == 1 and not isinstance(atoms.info.get("anisotropy_group"), str):
        raise LabelError(f"{where}: a label with spin-orbit coupling needs info 'anisotropy_group'")
    results = atoms.calc.results if atoms.calc is not None else {}
    if not np.isfinite(results.get("energy", np.nan)):
        raise LabelError(f"{where}: no finite energy")
    for key in ("forces", "stress"):
        if key in results and not np.isfinite(results[key]).all():
            raise LabelError(f"{where}: {key} are not finite; leave them out where unknown")
    moments = atoms.arrays.get("initial_magmoms")
    if moments is None or moments.shape != (len(atoms), 3) or not np.isfinite(moments).all():
        raise LabelError(f"{where}: initial_magmoms must be {len(atoms)}×3 finite numbers, in µB")
    gradients = atoms.arrays.get("magnetic_forces")
    if gradients is not None and (gradients.shape != (len(atoms), 3) or np.isinf(gradients).any()):
        raise LabelError(f"{where}: magnetic_forces must be {len(atoms)}×3 numbers, NaN where not known")


def write_checksums(folder: str | Path) -> None:
    """Write the SHA-256 sums of the label files of a folder to its `SHA256SUMS` (as `sha256sum` does)."""
    folder = Path(folder)
    lines = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.glob("*.extxyz"))]
    write_text(folder / CHECKSUMS, "".join(lines))


def check_checksums(folder: str | Path) -> list[str]:
    """Check the label files of a folder against its `SHA256SUMS`.

    Returns
    -------
    list of str
        Names of the files that were checked.

    Raises
    ------
    LabelError
        A file is missing, changed, or not listed.
    """
    folder = Path(folder)
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
    except OSError as error:
        raise LabelError(f"cannot read {str(folder / CHECKSUMS)!r}: {error.strerror}") from None
    sums = {line.split(maxsplit=1)[1]: line.split()[0] for line in lines if line.strip()}
    for name in sorted(sums.keys() | {path.name for path in folder.glob("*.extxyz")}):
        if name not in sums:
            raise LabelError(f"{str(folder / name)!r} is not in {CHECKSUMS}; collect the labels again")
        if not (folder / name).is_file():
            raise LabelError(f"{str(folder / name)!r} is in {CHECKSUMS} but not there; fetch the data again")
        if _sha256(folder / name) != sums[name]:
            raise LabelError(f"{str(folder / name)!r} does not match {CHECKSUMS}; fetch or collect the data again")
    return sorted(sums)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
