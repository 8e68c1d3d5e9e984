"""What a dataset says about where it came from."""

import io
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import spglib
from ase import Atoms
from ase.geometry.minkowski_reduction import minkowski_reduce
from ase.io import write
from ase.io.jsonio import encode

from .conventions import HAMILTONIAN
from .protocol import SpinCalculator, moments_of
from .structures import formula
from .symmetry import searched

PACKAGES = ("mmace", "numpy", "scipy", "ase", "spglib", "seekpath", "phonopy", "xarray", "netCDF4")


def magnetic_space_group(atoms: Atoms, symprec: float, mag_symprec: float) -> dict[str, str | int | float]:
    """Find the magnetic space group of a structure with its moments.

    Parameters
    ----------
    atoms : structure with moments in µB.
    symprec : tolerance on positions in Å.
    mag_symprec : tolerance on moments in µB.

    Returns
    -------
    ``space_group`` of the atoms alone, BNS number and symbol, UNI number, type (1 to 4), the tolerances.
    """
    cell = (atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers)
    found: dict[str, str | int | float] = {"symprec": float(symprec), "mag_symprec": float(mag_symprec)}
    plain = searched(spglib.get_symmetry_dataset, cell, symprec=symprec)
    found["space_group"] = "unknown" if plain is None else f"{plain.international} ({plain.number})"
    magnetic = _magnetic_dataset(atoms, symprec, mag_symprec)
    if magnetic is None:
        return {**found, "magnetic_space_group": "unknown"}
    bns = searched(spglib.get_magnetic_spacegroup_type, magnetic.uni_number).bns_number
    return {
        **found,
        "magnetic_space_group": f"{_bns_symbol(bns)} ({bns})",
        "magnetic_space_group_uni": int(magnetic.uni_number),
        "magnetic_space_group_type": int(magnetic.msg_type),
    }


def _magnetic_dataset(atoms: Atoms, symprec: float, mag_symprec: float) -> Any:
    """Return what spglib says of the magnetic symmetry, None where it says nothing.

    It does not know the group of many an oblique cell, and knows it by the shortest vectors of the same lattice.
    """
    for lattice in (atoms.cell[:], minkowski_reduce(atoms.cell[:])[0]):
        scaled = np.linalg.solve(lattice.T, atoms.positions.T).T
        found = searched(
            spglib.get_magnetic_symmetry_dataset,
            (lattice, scaled % 1.0, atoms.numbers, moments_of(atoms)),
            symprec=symprec,
            mag_symprec=mag_symprec,
        )
        if found is not None:
            return found
    return None


def _bns_symbol(number: str) -> str:
    from pymatgen.symmetry.maggroups import MagneticSpaceGroup

    try:
        return str(MagneticSpaceGroup([int(x) for x in number.split(".")]).sg_symbol)
    except (ValueError, KeyError, TypeError):
        return "BNS"


def cif_text(atoms: Atoms) -> str:
    """Return the structure as CIF; moments are not part of it."""
    buffer = io.BytesIO()
    write(buffer, atoms, format="cif")
    return buffer.getvalue().decode()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def attribute(value: Any) -> str | int | float | np.ndarray:
    """Return a value in a form that netCDF attributes can hold; None, bool, mappings and lists become text or int."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, np.integer | np.floating):
        return value.item()
    if value is None:
        return "none"
    return json.dumps(value, default=str, sort_keys=True)


def attributes(
    atoms: Atoms,
    calculator: SpinCalculator,
    *,
    symprec: float,
    mag_symprec: float,
    options: Mapping[str, Any],
) -> dict[str, str | int | float | np.ndarray]:
    """Collect what lets anyone repeat a calculation.

    Parameters
    ----------
    atoms : structure with the moments the calculation started from.
    calculator : asked for its provenance; its entries get the prefix ``model_``.
    symprec, mag_symprec : tolerances in Å and µB.
    options : the property's options.

    Returns
    -------
    Attributes that netCDF can hold.
    """
    soc = calculator.soc
    found: dict[str, Any] = {
        "formula": formula(atoms),
        "structure_json": encode(atoms),
        "structure_cif": cif_text(atoms),
        "initial_moments": moments_of(atoms).tolist(),
        **magnetic_space_group(atoms, symprec, mag_symprec),
        "hamiltonian_convention": HAMILTONIAN,
        "spin_orbit_coupling": "unknown" if soc is None else int(soc),
        "committee_members": len(calculator.members),
        "options": dict(options),
        "versions": versions(),
    }
    found.update({f"model_{k}": v for k, v in calculator.provenance().items()})
    return {k: attribute(v) for k, v in found.items()}
