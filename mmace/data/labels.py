"""Labels as immutable records: what a calculation says about one structure with given moments."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms

from ..errors import LabelError
from ..structures import as_vectors, moments_of

SAME_GEOMETRY = 1e-5  # Å; file formats round
SAME_MOMENT = 1e-6  # µB
REACHED = 2e-3  # µB; how far moments of a label may be from those that were calculated
SAME_ENERGY = 1e-7  # eV

Composition = frozenset[tuple[str, int]]


def composition(symbols: Iterable[str]) -> Composition:
    """Smallest whole numbers of each element among chemical symbols."""
    counts = Counter(symbols)
    common = math.gcd(*counts.values())
    return frozenset((symbol, count // common) for symbol, count in counts.items())


@dataclass(frozen=True)
class LabelledStructure:
    """One label. A quantity that was not calculated is NaN; arrays cannot be written to.

    Attributes
    ----------
    symbols : tuple of str
        Chemical symbols of the N atoms.
    positions : ndarray (N, 3)
        Å.
    cell : ndarray (3, 3)
        Rows are lattice vectors, Å.
    pbc : tuple of bool
        Periodic directions.
    moments : ndarray (N, 3)
        Moments that the calculation reached, µB.
    energy : float
        eV; within an `anisotropy_group` only differences mean anything.
    forces : ndarray (N, 3)
        eV/Å.
    stress : ndarray (6,)
        Voigt xx, yy, zz, yz, xz, xy; eV/Å^3, ASE's sign.
    magnetic_forces : ndarray (N, 3)
        -dE/dm, eV/µB.
    magnetic_forces_parallel : ndarray (N,)
        -dE/d|m|, eV/µB, where that component alone is known; NaN elsewhere.
    soc : bool
        With spin-orbit coupling.
    parent : str
        Structure that splits go by.
    name : str
        Label's own name.
    anisotropy_group : str or None
        Labels of one structure that differ in the direction of the moments alone.
    """

    symbols: tuple[str, ...]
    positions: np.ndarray
    cell: np.ndarray
    pbc: tuple[bool, bool, bool]
    moments: np.ndarray
    energy: float
    forces: np.ndarray
    stress: np.ndarray
    magnetic_forces: np.ndarray
    magnetic_forces_parallel: np.ndarray
    soc: bool
    parent: str
    name: str
    anisotropy_group: str | None

    def __len__(self) -> int:
        return len(self.symbols)

    def atoms(self) -> Atoms:
        """The structure with its moments, without results."""
        structure = Atoms(self.symbols, positions=self.positions, cell=self.cell, pbc=self.pbc)
        structure.set_initial_magnetic_moments(self.moments.copy())
        return structure

    def carried_by(self, carriers: Collection[str]) -> LabelledStructure:
        """The label for a model whose `carriers` alone have moments: others have none, and no magnetic force is known.

        What a calculation finds on other elements is induced by the carriers and follows them in such a model too.
        """
        other = np.array([symbol not in carriers for symbol in self.symbols])
        if not other.any():
            return self
        return replace(
            self,
            moments=_with(self.moments, other, 0.0),
            magnetic_forces=_with(self.magnetic_forces, other, np.nan),
            magnetic_forces_parallel=_with(self.magnetic_forces_parallel, other, np.nan),
        )


def read_labels(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[LabelledStructure]:
    """Read labels from extended XYZ files.

    Parameters
    ----------
    paths : path or sequence of paths
        Files with ASE's `energy`, `forces`, `stress`, arrays `initial_magmoms` (N, 3) or (N,) in µB and
        `magnetic_forces` (N, 3) or `magnetic_forces_parallel` (N,) in eV/µB, and info `soc`, `parent`, `name`,
        `anisotropy_group`. A quantity that is absent or NaN is not known.

    Returns
    -------
    list of LabelledStructure
        In the order of the files.

    Raises
    ------
    LabelError
        A file that cannot be read, moments that are missing, an array of the wrong shape, or a group of
        directions that does not hold one structure.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    labels = [
        label_from_atoms(atoms, f"frame {index} of {os.fspath(path)}")
        for path in paths
        for index, atoms in enumerate(read_frames(path))
    ]
    check_groups(labels)
    return labels


def label_from_atoms(atoms: Atoms, where: str) -> LabelledStructure:
    """Label that a structure with results holds; `where` names it in messages.

    Raises
    ------
    LabelError
        Moments are missing, not finite or not those that were calculated, a quantity has the wrong shape, or `soc` is
        neither 0 nor 1.
    """
    n_atoms = len(atoms)
    if not atoms.has("initial_magmoms"):
        raise LabelError(f"{where} holds no initial_magmoms: a label needs the moments that were reached, in µB.")
    try:
        moments = moments_of(atoms)
    except ValueError as error:
        raise LabelError(f"{where}: {error}") from None
    soc = atoms.info.get("soc", 0)
    if np.ndim(soc) or soc not in (0, 1):
        raise LabelError(f"{where} has soc={soc}: give 0 without or 1 with spin-orbit coupling.")
    group = atoms.info.get("anisotropy_group")
    if group is not None and not soc:
        raise LabelError(f"{where} is in an anisotropy_group but has soc=0: directions differ only with soc=1.")
    results = {} if atoms.calc is None else atoms.calc.results
    _check_reached(moments, results.get("magmoms"), where)
    try:
        energy = float(results.get("energy", np.nan))
    except (TypeError, ValueError):
        raise LabelError(f"{where}: the energy is {results['energy']!r}, which is no number.") from None
    name = str(atoms.info.get("name", where))
    return LabelledStructure(
        symbols=tuple(atoms.get_chemical_symbols()),
        positions=_frozen(atoms.positions, (n_atoms, 3), "positions", where),
        cell=_frozen(atoms.cell.array, (3, 3), "the cell", where),
        pbc=(bool(atoms.pbc[0]), bool(atoms.pbc[1]), bool(atoms.pbc[2])),
        moments=_frozen(moments, (n_atoms, 3), "initial_magmoms", where),
        energy=energy,
        forces=_frozen(results.get("forces"), (n_atoms, 3), "forces", where),
        stress=_frozen(results.get("stress"), (6,), "stress", where),
        magnetic_forces=_frozen(atoms.arrays.get("magnetic_forces"), (n_atoms, 3), "magnetic_forces", where),
        magnetic_forces_parallel=_frozen(
            atoms.arrays.get("magnetic_forces_parallel"), (n_atoms,), "magnetic_forces_parallel", where
        ),
        soc=bool(soc),
        parent=str(atoms.info.get("parent", name)),
        name=name,
        anisotropy_group=None if group is None else str(group),
    )


def groups_of(labels: Iterable[LabelledStructure]) -> list[list[LabelledStructure]]:
    """Labels that belong to an anisotropy group, group by group."""
    groups: dict[str, list[LabelledStructure]] = {}
    for label in labels:
        if label.anisotropy_group is not None:
            groups.setdefault(label.anisotropy_group, []).append(label)
    return list(groups.values())


def check_groups(labels: Iterable[LabelledStructure]) -> None:
    """Check that each anisotropy group is one structure of one parent.

    Raises
    ------
    LabelError
        Names two labels that share a group and nothing else.
    """
    for members in groups_of(labels):
        _check_group(members)


def fingerprint(labels: Iterable[LabelledStructure]) -> str:
    """SHA-256 of everything that training sees of the labels, in order."""
    digest = hashlib.sha256()
    for label in labels:
        text = (label.symbols, label.pbc, label.energy, label.soc, label.parent, label.name, label.anisotropy_group)
        digest.update(repr(text).encode())
        for array in (label.positions, label.cell, label.moments, label.forces, label.stress, label.magnetic_forces):
            digest.update(array.tobytes())
        if np.isfinite(label.magnetic_forces_parallel).any():
            digest.update(label.magnetic_forces_parallel.tobytes())
    return digest.hexdigest()


def read_frames(path: str | os.PathLike[str]) -> list[Atoms]:
    """All structures of an extended XYZ file, at least one, as they stand there.

    Raises
    ------
    LabelError
        There is no such file, it cannot be read, or it is empty.
    """
    file = Path(path)
    if not file.exists():
        raise LabelError(f"there is no label file {file}: give an existing extended XYZ file.")
    try:
        frames = ase.io.read(file, index=":", format="extxyz")
    except Exception as error:  # ASE raises whatever its parser trips over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LabelError(f"{file} cannot be read as extended XYZ ({reason}): mend the file.") from None
    if not frames:
        raise LabelError(f"{file} holds no structures: give a file with labels.")
    return frames


def _frozen(values: np.ndarray | None, shape: tuple[int, ...], what: str, where: str) -> np.ndarray:
    try:
        array = np.full(shape, np.nan) if values is None else np.array(values, dtype=float)
    except (TypeError, ValueError):
        raise LabelError(f"{where}: {what} are not numbers.") from None
    if array.shape != shape:
        raise LabelError(f"{where}: {what} has shape {array.shape}, but {shape} is needed.")
    array.flags.writeable = False
    return array


def _check_reached(moments: np.ndarray, calculated: np.ndarray | None, where: str) -> None:
    """Raise where a file holds calculated moments beside those that it calls the label's."""
    if calculated is None:
        return
    vectors = as_vectors(calculated)
    if vectors.shape != moments.shape or np.abs(vectors - moments).max() > REACHED:
        raise LabelError(
            f"{where} has other magmoms than initial_magmoms: a label needs the moments that were reached; "
            "`mmace convert extxyz` takes the magmoms."
        )


def _with(values: np.ndarray, atoms: np.ndarray, value: float) -> np.ndarray:
    """A copy with another value for some atoms, that cannot be written to."""
    changed = values.copy()
    changed[atoms] = value
    changed.flags.writeable = False
    return changed


def _check_group(members: Sequence[LabelledStructure]) -> None:
    first = members[0]
    for label in members[1:]:
        same = label.symbols == first.symbols and (
            np.abs(label.cell - first.cell).max() < SAME_GEOMETRY
            and np.abs(label.positions - first.positions).max() < SAME_GEOMETRY
        )
        if label.parent != first.parent:
            raise LabelError(
                f"{label.name} and {first.name} share the anisotropy group {first.anisotropy_group} but not the "
                "parent: give all directions of a structure the same parent."
            )
        if not same:
            raise LabelError(
                f"{label.name} and {first.name} share the anisotropy group {first.anisotropy_group} but not the "
                "structure: one group is one structure with its moments in different directions."
            )
    _check_zero(members)


def _check_zero(members: Sequence[LabelledStructure]) -> None:
    """Raise where labels of a group with the same moments have two energies, which count from different zeros then."""
    moments = np.array([label.moments.ravel() for label in members])
    energies = np.array([label.energy for label in members])
    for k in range(1, len(members)):
        same = np.abs(moments[:k] - moments[k]).max(axis=1) < SAME_MOMENT
        other = np.flatnonzero(same & (np.abs(energies[:k] - energies[k]) > SAME_ENERGY))
        if len(other):
            raise LabelError(
                f"{members[other[0]].name} and {members[k].name} share the anisotropy group "
                f"{members[k].anisotropy_group} and the moments but not the energy: give the group's labels of one "
                "recipe alone."
            )
