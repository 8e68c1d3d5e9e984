"""Folders of DeePMD-kit with spins: type.raw, type_map.raw and set.*/*.npy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ase import Atoms

from ..errors import LabelError
from .importing import make_frame, text_of, unknown_where_empty, with_parents


def read_deepmd(
    path: str | os.PathLike[str], types: Mapping[int, str] | None = None, spin_unit: float = 1.0
) -> list[Atoms]:
    """Read one system.

    `spin` is the moment and `force_mag` is -dE/dspin; `virial` is -V σ in eV. Atoms whose spin and magnetic force are
    exactly zero carry no spin variable, and their magnetic force is not known.

    Parameters
    ----------
    path : path
        Folder with `type.raw` and `set.*`.
    types : mapping int → str, optional
        Element of each number in `type.raw`, where there is no `type_map.raw`.
    spin_unit : float
        Moment in µB of a spin of length one: moments are multiplied by it, magnetic forces divided.

    Returns
    -------
    list of Atoms
        Frames of the label contract.

    Raises
    ------
    LabelError
        A file is missing, damaged or of the wrong shape, or a type has no element.
    """
    folder = Path(path)
    kinds = [_whole(word, folder / "type.raw") for word in text_of(folder / "type.raw").split()]
    if (folder / "type_map.raw").exists():
        if types:
            raise LabelError(f"{folder} has a type_map.raw, which names the elements: leave out --types.")
        names: Mapping[int, str] = dict(enumerate(text_of(folder / "type_map.raw").split()))
    elif types:
        names = types
    else:
        raise LabelError(f"{folder} has no type_map.raw: name the elements, such as --types 0=Fe 1=Al.")
    unknown = sorted(set(kinds) - set(names))
    if unknown:
        raise LabelError(f"{folder / 'type.raw'} has the type {unknown[0]}, which has no element in type_map.raw.")
    symbols = [names[kind] for kind in kinds]
    sets = sorted(folder.glob("set.*"))
    if not sets:
        raise LabelError(f"{folder} has no folder set.*: give a DeePMD system.")
    periodic = not (folder / "nopbc").exists()
    frames: list[Atoms] = []
    for part in sets:
        if (part / "real_atom_types.npy").exists():
            raise LabelError(f"{part} mixes compositions in one system: convert it to one system for each first.")
        frames += _frames(part, symbols, spin_unit, periodic, f"{folder.resolve().name}-{part.name}")
    return with_parents(frames, folder.resolve().name)


def _frames(part: Path, symbols: list[str], spin_unit: float, periodic: bool, stem: str) -> list[Atoms]:
    atoms = len(symbols)
    coordinates = _load(part / "coord.npy", None, 3 * atoms, required=True)
    assert coordinates is not None
    count = len(coordinates)
    cells = _load(part / "box.npy", count, 9, required=periodic)
    spins = _load(part / "spin.npy", count, 3 * atoms, required=True)
    assert spins is not None
    energies = _load(part / "energy.npy", count, 1)
    forces = _load(part / "force.npy", count, 3 * atoms)
    magnetic = _load(part / "force_mag.npy", count, 3 * atoms)
    virials = _load(part / "virial.npy", count, 9)
    moments = spin_unit * spins.reshape(count, atoms, 3)
    if magnetic is not None:
        magnetic = unknown_where_empty(magnetic.reshape(count, atoms, 3) / spin_unit, moments)
    frames = []
    for k in range(count):
        cell = np.zeros((3, 3)) if cells is None else cells[k].reshape(3, 3)
        stress = None
        if virials is not None and periodic:
            tensor = -virials[k].reshape(3, 3) / abs(np.linalg.det(cell))
            stress = (0.5 * (tensor + tensor.T))[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        frames.append(
            make_frame(
                symbols,
                coordinates[k].reshape(atoms, 3),
                cell,
                periodic,
                moments[k],
                {
                    "energy": None if energies is None else energies[k, 0],
                    "forces": None if forces is None else forces[k].reshape(atoms, 3),
                    "stress": stress,
                },
                None if magnetic is None else magnetic[k],
                {"name": f"{stem}-{k}", "code": "unknown"},
                f"frame {k} of {part}",
            )
        )
    return frames


def _load(file: Path, count: int | None, width: int, required: bool = False) -> np.ndarray | None:
    """An array of `count` rows with `width` numbers; files that would run code are refused."""
    if not file.exists():
        if required:
            raise LabelError(f"{file.parent} has no {file.name}: a DeePMD system with spins needs it.")
        return None
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LabelError(f"{file} is not a plain array ({error}): give another.") from None
    try:
        return np.asarray(array, dtype=float).reshape(len(array) if count is None else count, width)
    except (TypeError, ValueError):
        rows = "frames" if count is None else f"{count}"
        raise LabelError(f"{file} has shape {array.shape}, but {rows} × {width} numbers are needed.") from None


def _whole(word: str, file: Path) -> int:
    try:
        return int(word)
    except ValueError:
        raise LabelError(f"{file} holds {word!r}, which is no type: give whole numbers.") from None
