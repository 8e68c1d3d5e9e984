"""Extended XYZ whose quantities have other names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms

from ..errors import LabelError
from ..structures import as_vectors
from .importing import UNITS, as_name, make_frame, stem_of, voigt, with_parents
from .labels import read_frames

NAMES = {
    "energy": "energy",
    "forces": "forces",
    "stress": "stress",
    "virials": "virials",
    "moments": "magmoms",
    "magnetic_forces": "magnetic_forces",
    "magnetic_forces_parallel": "magnetic_forces_parallel",
    "parent": "parent",
    "name": "name",
    "code": "code",
    "recipe": "recipe",
    "soc": "soc",
    "anisotropy_group": "anisotropy_group",
}
STRESS_UNITS = {unit: UNITS["stress"][unit] for unit in ("eV/A3", "GPa", "kbar")}


def read_renamed(
    path: str | os.PathLike[str], names: Mapping[str, str] | None = None, stress_unit: str = "eV/A3"
) -> list[Atoms]:
    """Read extended XYZ by a table of names.

    Parameters
    ----------
    path : path
    names : mapping, optional
        What the file calls `energy`, `forces`, `stress` (or, instead, `virials`, -V σ in eV), `moments`,
        `magnetic_forces`, `magnetic_forces_parallel` (-dE/d|m|), `parent`, `name`, `code`, `recipe`,
        `soc`, `anisotropy_group`. Those left out keep ASE's names, the moments `magmoms`. A quantity that is named
        must be in every frame.
    stress_unit : str
        eV/A3, GPa or kbar.

    Returns
    -------
    list of Atoms
        Frames of the label contract.

    Raises
    ------
    LabelError
        The file cannot be read, a name is not known, or a frame lacks what was named or its moments.
    """
    given = dict(names or {})
    unknown = sorted(set(given) - set(NAMES))
    if unknown:
        raise LabelError(f"there is no quantity {unknown[0]} to name: choose among {', '.join(NAMES)}.")
    if stress_unit not in STRESS_UNITS:
        raise LabelError(f"there is no unit {stress_unit} of stress: choose among {', '.join(STRESS_UNITS)}.")
    if "stress" in given and "virials" in given:
        raise LabelError("stress and virials say the same: name only one of them.")
    stem = stem_of(path)
    frames = []
    orphans = []
    for index, atoms in enumerate(read_frames(path)):
        frame = _frame(atoms, given, STRESS_UNITS[stress_unit], f"frame {index} of {path}", stem, index)
        frames.append(frame)
        if "parent" not in frame.info:
            orphans.append(frame)
    with_parents(orphans, stem)
    return frames


def _frame(atoms: Atoms, given: Mapping[str, str], unit: float, where: str, stem: str, index: int) -> Atoms:
    results = {} if atoms.calc is None else atoms.calc.results

    def find(quantity: str) -> Any:
        key = given.get(quantity, NAMES[quantity])
        for source in (atoms.arrays, atoms.info, results):
            if key in source:
                return source[key]
        if quantity in given:
            raise LabelError(f"{where} has no {key}: name what the file calls its {quantity.replace('_', ' ')}.")
        return None

    moments = find("moments")
    if moments is None:
        raise LabelError(f"{where} has no magmoms: say what the moments are called, such as --map moments=REF_magmom.")
    if "virials" in given and atoms.cell.rank < 3:
        stress = None
    elif "virials" in given:
        stress = -voigt(find("virials"), where) / atoms.get_volume()
    else:
        stress = find("stress")
        stress = None if stress is None else unit * voigt(stress, where)
    notes = {"name": f"{stem}-{index}", "code": "unknown"}
    for key in ("parent", "name", "code", "recipe", "anisotropy_group"):
        value = find(key)
        if value is not None:
            notes[key] = as_name(value, stem)
    soc = find("soc")
    if soc is not None and (np.ndim(soc) or soc not in (0, 1)):
        raise LabelError(f"{where} has soc={soc}: give 0 without or 1 with spin-orbit coupling.")
    magnetic, along = find("magnetic_forces"), find("magnetic_forces_parallel")
    if magnetic is not None and np.ndim(magnetic) == 1:
        if np.ndim(moments) == 2 and np.any(np.asarray(moments)[:, :2]):
            raise LabelError(
                f"{where} has one magnetic force for each atom, but moments that are not along z: name them "
                "magnetic_forces_parallel where they are -dE/d|m|, or leave them out."
            )
        magnetic = as_vectors(magnetic)
    frame = make_frame(
        atoms.get_chemical_symbols(),
        atoms.positions,
        atoms.cell.array,
        bool(atoms.pbc.all()),
        moments,
        {"energy": find("energy"), "forces": find("forces"), "stress": stress},
        along if magnetic is None else magnetic,
        notes,
        where,
    )
    if magnetic is not None and along is not None:
        frame.arrays["magnetic_forces_parallel"] = np.asarray(along)
    frame.pbc = atoms.pbc
    frame.info["soc"] = 0 if soc is None else int(soc)
    return frame
