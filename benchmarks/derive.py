"""Values of own DFT, derived from the frames of the reference calculations: none is typed by hand.

Frames come from `references/dft.json` (a plan of `mmace label`) through `references/dft.extxyz`. A parent's name tells
what it is for: `<crystal>-<state>-eos-3`, `-tetragonal-`, `-shear-`, or the point of a zone-boundary phonon.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers
from ase.units import _amu, _e
from mmace_props.eos import birch_murnaghan
from mmace_props.files import write_whole
from scipy.optimize import curve_fit

from .calculate import GPA
from .errors import BenchmarkError
from .systems import System

SETTINGS = "ABINIT, PBE, PAW, moments free, mesh 0.18 Å⁻¹, Methfessel-Paxton smearing 0.01 Ha"
THZ = 1e-12 / (2 * np.pi) * np.sqrt(_e * 1e20 / _amu)
"""√(eV/Å²/u) as an ordinary frequency in THz."""


def derive(system: System) -> dict[str, dict[str, Any]]:
    """Write `references/values.json`.

    Returns
    -------
    ``value``, ``uncertainty`` (what the fit leaves open) and ``source`` by quantity.

    Raises
    ------
    BenchmarkError : the frames are missing.
    """
    path = system.folder / "references" / "dft.extxyz"
    if not path.exists():
        raise BenchmarkError(f"'{path}' is missing; run the plan beside it with mmace label, and collect it there")
    groups: dict[str, list[Atoms]] = {}
    for atoms in ase.io.read(path, ":"):
        groups.setdefault(str(atoms.info["parent"]).rsplit("-", 1)[0], []).append(atoms)
    values = derived_values(groups)
    content = json.dumps({"settings": SETTINGS, "values": values}, indent=1) + "\n"
    write_whole(path.with_name("values.json"), lambda temporary: Path(temporary).write_text(content))
    return values


def derived_values(groups: Mapping[str, Sequence[Atoms]]) -> dict[str, dict[str, Any]]:
    """Quantities from frames by tag; a curve with too few frames gives none."""
    values: dict[str, dict[str, Any]] = {}

    def add(name: str, value: float, uncertainty: float, frames: Sequence[Atoms]) -> None:
        source = f"{SETTINGS}; {', '.join(str(a.info['name']) for a in frames)}"
        values[name] = {"value": float(value), "uncertainty": float(uncertainty), "source": source}

    minima: dict[str, tuple[float, float, float]] = {}
    for tag, frames in sorted(groups.items()):
        if tag.endswith("-eos") and len(frames) >= 5:
            name = tag.removesuffix("-eos").replace("-", ".")
            fit, errors = equation_of_state(frames)
            minima[name] = (fit[0], fit[1], fit[2])
            add(f"{name}.V0", fit[1], errors[1], frames)
            add(f"{name}.B0", GPA * fit[2], GPA * errors[2], frames)
            volumes = np.array([a.get_volume() / len(a) for a in frames])
            lengths = np.array([np.abs(a.get_initial_magnetic_moments()).max() for a in frames])
            add(f"{name}.m0", np.interp(fit[1], *_sorted(volumes, lengths)), 0.0, frames)
    for name, (energy, _, _) in minima.items():
        crystal, _, state = name.partition(".")
        others = [key for key in minima if key.startswith(f"{crystal}.") and key != name]
        if state == "fm":
            for key in others:
                frames = [*groups[f"{name.replace('.', '-')}-eos"], *groups[f"{key.replace('.', '-')}-eos"]]
                add(f"{key}.above_fm", 1e3 * (minima[key][0] - energy), 0.0, frames)
    for name, (_, _, bulk) in minima.items():
        tag = name.replace(".", "-")
        tetragonal, shear = groups.get(f"{tag}-tetragonal", []), groups.get(f"{tag}-shear", [])
        if len(tetragonal) >= 2:
            slopes = np.array([_tetragonal(a) for a in tetragonal])
            c_prime = np.polyfit(slopes[:, 0], slopes[:, 1], 1)[0] / 2
            add(f"{name}.C11", GPA * (bulk + 4 / 3 * c_prime), 0.0, tetragonal)
            add(f"{name}.C12", GPA * (bulk - 2 / 3 * c_prime), 0.0, tetragonal)
        if shear:
            constants = [GPA * a.get_stress()[5] / _shear(a) for a in shear]
            add(f"{name}.C44", np.mean(constants), np.ptp(constants) / 2, shear)
    for tag, frames in groups.items():
        for atoms in frames:
            found = frozen_phonon(atoms)
            if found is not None and tag.rsplit("-", 1)[-1] in ("H", "N", "Gamma"):
                add(f"{tag.replace('-', '.')}.{_index(tag, found, frames)}", found, 0.0, [atoms])
    return values


def equation_of_state(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Birch-Murnaghan fit per atom: E0 (eV), V0 (Å³), B0 (eV/Å³), B0', and their standard errors."""
    volume = np.array([a.get_volume() / len(a) for a in frames])
    energy = np.array([a.get_potential_energy() / len(a) for a in frames])
    start = (energy.min(), volume[energy.argmin()], 1.0, 4.5)
    found, covariance = curve_fit(birch_murnaghan, volume, energy, p0=start)
    return found, np.sqrt(np.diag(covariance))


def frozen_phonon(atoms: Atoms) -> float | None:
    """Frequency in THz of the mode that a displacement of one of two atoms excites, from the force it causes."""
    if len(atoms) != 2:
        return None
    scaled = atoms.get_scaled_positions()
    ideal = np.round(2 * (scaled[1] - scaled[0])) / 2
    shift = (scaled[1] - scaled[0] - ideal) @ atoms.cell.array
    length = np.linalg.norm(shift)
    if length < 1e-3:
        return None
    masses = [atomic_masses[atomic_numbers[s]] for s in atoms.symbols]
    reduced = masses[0] * masses[1] / sum(masses)
    constant = -(atoms.get_forces()[1] @ shift) / length**2
    return float(np.sign(constant) * THZ * np.sqrt(abs(constant) / reduced))


def _index(tag: str, frequency: float, frames: Sequence[Atoms]) -> int:
    """Number of a mode among those of its wave vector, from the lowest."""
    known = sorted(f for f in (frozen_phonon(a) for a in frames) if f is not None)
    return known.index(frequency)


def _sorted(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(x)
    return x[order], y[order]


def _tetragonal(atoms: Atoms) -> tuple[float, float]:
    """ε_zz − ε_xx of a cell stretched along z, and σ_zz − σ_xx in eV/Å³; their slope is C11 − C12."""
    x, z = _extents(atoms)
    stress = atoms.get_stress()
    size = (x * x * z) ** (1 / 3)
    return z / size - x / size, float(stress[2] - stress[0])


def _extents(atoms: Atoms) -> tuple[float, float]:
    """Lengths of the cubic axes x and z of a cell of body-centred or CsCl type."""
    cell = np.abs(atoms.cell.array)
    return float(cell[:, 0].max()), float(cell[:, 2].max())


def _shear(atoms: Atoms) -> float:
    """Engineering shear γ_xy of a cell whose cubic axes were sheared by a symmetric strain."""
    metric = _cubic_axes(atoms)
    return float((metric[0] @ metric[1]) / (np.linalg.norm(metric[0]) * np.linalg.norm(metric[1])))


def _cubic_axes(atoms: Atoms) -> np.ndarray:
    """Axes along the sheared x, y, z: sums of primitive vectors for one body-centred atom, else the cell's own."""
    cell = atoms.cell.array
    if len(atoms) == 1:
        return np.array([cell[1] + cell[2], cell[0] + cell[2], cell[0] + cell[1]])
    return cell
