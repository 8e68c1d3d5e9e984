"""Label files: atomic writes, reading with the contract checked, checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import write

from ..data import LabelledStructure, check_groups, label_from_atoms
from ..data.labels import read_frames
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
    check_groups(check_frame(atoms, f"frame {index} for {str(path)!r}") for index, atoms in enumerate(frames))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        write(temporary, list(frames), format="extxyz")


def read_checked(path: str | Path) -> list[Atoms]:
    """Read a label file and check every frame against the contract.

    Raises
    ------
    LabelError
        Names file, frame and fault.
    """
    frames = read_frames(path)
    check_groups(check_frame(atoms, f"{str(path)!r}, frame {index}") for index, atoms in enumerate(frames))
    return frames


def check_frame(atoms: Atoms, where: str) -> LabelledStructure:
    """Label of one frame that meets the contract: what training reads, provenance, and no number that is not finite.

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
        if key not in atoms.info:
            raise LabelError(f"{where}: info {key!r} is missing; every label needs its provenance")
        if not isinstance(atoms.info[key], str):
            raise LabelError(f"{where}: info {key!r} is {atoms.info[key]!r}, which is no name; put letters before it")
    if "soc" not in atoms.info:
        raise LabelError(f"{where}: info 'soc' is missing; give 0 without or 1 with spin-orbit coupling")
    label = label_from_atoms(atoms, where)
    if label.soc and label.anisotropy_group is None:
        raise LabelError(f"{where}: a label with spin-orbit coupling needs info 'anisotropy_group'")
    if not np.isfinite(label.energy):
        raise LabelError(f"{where}: no finite energy")
    for key in ("forces", "stress"):
        if key in atoms.calc.results and not np.isfinite(getattr(label, key)).all():
            raise LabelError(f"{where}: {key} are not finite; leave them out where unknown")
    if atoms.arrays["initial_magmoms"].ndim != 2:
        raise LabelError(f"{where}: initial_magmoms must be {len(atoms)}×3 numbers, in µB")
    if np.isinf(label.magnetic_forces).any():
        raise LabelError(f"{where}: magnetic_forces are infinite; give NaN where they are not known")
    return label


def write_checksums(folder: str | Path) -> None:
    """Write the SHA-256 sums of the label files of a folder to its `SHA256SUMS` (as `sha256sum` does)."""
    folder = Path(folder)
    lines = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.glob("*.extxyz"))]
    write_text(folder / CHECKSUMS, "".join(lines))


def check_checksums(folder: str | Path, renewed: str = "") -> list[str]:
    """Check the label files of a folder against its `SHA256SUMS`.

    Parameters
    ----------
    folder : path
    renewed : str
        Name of a file that is about to be written, whatever it holds.

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
    sums = {}
    for line in lines:
        match line.split(maxsplit=1):
            case [digest, name]:
                sums[name.removeprefix("*")] = digest
            case [_]:
                raise LabelError(f"{str(folder / CHECKSUMS)!r} has a line {line!r} without a name; fetch it again")
    for name in sorted((sums.keys() | {path.name for path in folder.glob("*.extxyz")}) - {renewed}):
        if name not in sums:
            raise LabelError(f"{str(folder / name)!r} is not in {CHECKSUMS}; collect the labels again")
        if not (folder / name).is_file():
            raise LabelError(f"{str(folder / name)!r} is in {CHECKSUMS} but not there; fetch the data again")
        if _sha256(folder / name) != sums[name]:
            raise LabelError(f"{str(folder / name)!r} does not match {CHECKSUMS}; fetch or collect the data again")
    return sorted(sums)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
