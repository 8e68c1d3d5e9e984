"""Values of own DFT, derived from the frames of the reference calculations: none is typed by hand.

Frames come from `references/dft.json` (a plan of `mmace label`) through `references/dft.extxyz`. A parent's name tells
what it is for: `<crystal>-<state>-eos-3`, `-fixed-` (one volume), `-tetragonal-`, `-shear-`, `-strain-` (pairs of
opposite strains), the name of a defect, or the point of a phonon.
Which of them make which quantity stands in `references/derivation.json`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.data import atomic_masses
from ase.stress import full_3x3_to_voigt_6_strain
from ase.units import _amu, _e
from mmace_props.eos import birch_murnaghan, fit_birch_murnaghan
from mmace_props.files import write_whole
from mmace_props.protocol import moments_of
from mmace_props.symmetry import pattern_symmetry
from scipy.optimize import curve_fit

from .calculate import GPA
from .derivation import AXES, Crystal, Derivation, read_derivation
from .errors import BenchmarkError
from .systems import System

SETTINGS = "ABINIT, PBE, PAW, moments free, mesh 0.18 Å⁻¹, Methfessel-Paxton smearing 0.01 Ha"
THZ = 1e-12 / (2 * np.pi) * np.sqrt(_e * 1e20 / _amu)
"""√(eV/Å²/u) as an ordinary frequency in THz."""
MEGAJOULE = 1e3 * GPA
"""MJ/m³ in eV/Å³."""
SAME_CELL = 1.3
"""meV/atom between two moments of one cell and mesh: what 18³ instead of 9³ moved them against each other in bcc Fe."""
STRESS_NOISE = 0.1
"""GPa that the mesh leaves open: finer meshes moved stresses by 0.1 to 0.3 GPa from those of the labels."""
MOMENT_NOISE = 0.02
SYMPREC = 1e-4
HARMONIC = 0.03
LEAST_STRAIN = 1e-6
LEAST_FORCE = 0.005
"""eV/Å; below it a site's symmetry, not its luck, holds the ion."""
COLUMNS = {0: {"C11": 0, "C12": 1}, 2: {"C13": 0, "C33": 2}, 3: {"C44": 3}, 5: {"C66": 5}}
"""Rows of the constants that a column (Voigt) gives in a crystal with a fourfold axis along z."""
DEGENERACY = {"X": (1, 2), "M": (1, 2), "R": (3,)}
"""How often each pair of displacements of a plan occurs at the point: along the axis first, then across."""
OWN, SEEN = "own DFT", "training label"
CURVE = "largest of the fit's standard error, what either end changes, and what the fit of the stresses differs by"
SPHERES = "0.02 µB, by which the mesh moves moments in spheres, and that of the volume"
MESHES = "mesh noise between cells of different size"
CELLS = "mesh noise of an atom times the atoms of each cell, in quadrature"
EQUAL = "1.3 meV/atom, mesh noise between two moments of one cell (FeAl/checks/mesh.extxyz)"
STRESSES = "mesh noise of the stress (0.1 GPa) over the strain, and B at the frames' volume"
OPPOSITE = "mesh noise of the stress (0.1 GPa) over the strain"
FINITE = "finite displacement: frequency from the force against that from the energy, at least 1 %; 3 % without it"
FORCE_THEOREM = "GPAW, PBE, force theorem"
FORCE_MESH = "none of its own, the mesh stands in the tolerance"


def derive(system: System) -> dict[str, dict[str, Any]]:
    """Write `references/values.json`.

    Returns
    -------
    ``value``, ``uncertainty`` (what fit, mesh or finite strain leave open), ``kind`` and ``source`` by quantity.

    Raises
    ------
    BenchmarkError : the frames or the tables beside them are missing, or the tables break a rule.
    """
    values = all_values(system)
    content = json.dumps({"settings": SETTINGS, "values": values}, indent=1) + "\n"
    path = system.folder / "references" / "values.json"
    write_whole(path, lambda temporary: Path(temporary).write_text(content))
    return values


def all_values(system: System) -> dict[str, dict[str, Any]]:
    """Values that the reference frames and the labels of a system give.

    Raises
    ------
    BenchmarkError : the frames or the tables beside them are missing, or the tables break a rule.
    """
    path = system.folder / "references" / "dft.extxyz"
    if not path.exists():
        raise BenchmarkError(f"'{path}' is missing; run the plan beside it with mmace label, and collect it there")
    tables = read_derivation(system)
    labels = {**anisotropy_values(system, tables), **label_values(system, tables)}
    return {**derived_values(by_tag(ase.io.read(path, ":")), tables), **labels}


def by_tag(frames: Sequence[Atoms]) -> dict[str, list[Atoms]]:
    """Frames by the tag of their family, in the order of their names: the order of a run is no part of a result."""
    groups: dict[str, list[Atoms]] = {}
    for atoms in sorted(frames, key=lambda a: str(a.info["name"])):
        groups.setdefault(str(atoms.info["parent"]).rsplit("-", 1)[0], []).append(atoms)
    return groups


class Derived:
    """Values of own DFT by quantity, with their frames named in the source."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Any]] = {}

    def add(self, name: str, value: float, uncertainty: float, frames: Sequence[Atoms], reason: str) -> None:
        """Add one value.

        Parameters
        ----------
        name : of the quantity.
        value, uncertainty : in its unit.
        frames : that it comes from.
        reason : of the uncertainty.
        """
        names = ", ".join(str(a.info["name"]) for a in frames)
        self.values[name] = _entry(value, uncertainty, OWN, f"{SETTINGS}; {names}; uncertainty: {reason}")


def _entry(value: float, uncertainty: float, kind: str, source: str) -> dict[str, Any]:
    return {"value": float(value), "uncertainty": float(uncertainty), "kind": kind, "source": source}


def derived_values(groups: Mapping[str, Sequence[Atoms]], tables: Derivation) -> dict[str, dict[str, Any]]:
    """Quantities from frames by tag; a curve with too few frames, or strains without extent, give none."""
    found = Derived()
    curves = _curves(found, groups)
    _above_ferromagnet(found, groups, tables, curves)
    _at_one_volume(found, groups, tables)
    _sums(found, groups, tables)
    _combinations(found, tables)
    for name, curve in curves.items():
        _tetragonal_constants(found, groups, name, curve)
    for tag, frames in groups.items():
        if tag.endswith("-shear"):
            _shear_constants(found, tag, frames)
        if tag.endswith("-strain"):
            _strain_constants(found, tag, frames)
    for name in curves:
        _hill(found, groups, name)
    for tag in groups:
        _modes(found, groups, tag)
    return found.values


def _curves(found: Derived, groups: Mapping[str, Sequence[Atoms]]) -> dict[str, "Curve"]:
    """Add what E(V) and m(V) give, and return the curves by name."""
    curves: dict[str, Curve] = {}
    for tag, frames in sorted(groups.items()):
        if not tag.endswith("-eos") or len(frames) < 5:
            continue
        name = tag.removesuffix("-eos").replace("-", ".")
        curve = curves[name] = equation_of_state(frames)
        fit, errors = curve.fit, curve.errors
        found.add(f"{name}.V0", fit[1], errors[1], frames, CURVE)
        found.add(f"{name}.B0", GPA * fit[2], GPA * errors[2], frames, CURVE)
        found.add(f"{name}.B0_prime", fit[3], errors[3], frames, CURVE)
        volumes, lengths = _moments(frames)
        if lengths.max() <= 0.01:
            continue
        slope = np.abs(np.gradient(lengths, volumes)).max() * errors[1]
        at_rest = float(np.interp(fit[1], volumes, lengths))
        found.add(f"{name}.m0", at_rest, float(np.hypot(slope, MOMENT_NOISE)), frames, SPHERES)
        order = sorted(frames, key=lambda a: a.get_volume() / len(a))
        for end, place in (("low", 0), ("high", -1)):
            found.add(f"{name}.m_{end}", lengths[place], MOMENT_NOISE, [order[place]], SPHERES)
    return curves


def _above_ferromagnet(
    found: Derived, groups: Mapping[str, Sequence[Atoms]], tables: Derivation, curves: Mapping[str, "Curve"]
) -> None:
    """Add the energies of the minima of other states above the ferromagnet's."""
    for name, curve in curves.items():
        crystal, _, state = name.partition(".")
        lowest = curves.get(f"{crystal}.fm")
        if state == "fm" or lowest is None:
            continue
        frames = [*groups[f"{crystal}-fm-eos"], *groups[_eos(name)]]
        open_ = np.hypot(lowest.errors[0], curve.errors[0])
        noise, reason = _noise(tables, crystal, frames[0], frames[-1])
        gap = 1e3 * (curve.fit[0] - lowest.fit[0])
        found.add(f"{name}.above_fm", gap, float(np.hypot(1e3 * open_, noise)), frames, f"both fits; {reason}")


def _at_one_volume(found: Derived, groups: Mapping[str, Sequence[Atoms]], tables: Derivation) -> None:
    """Add the energies of orders at the crystals' volumes, and moments of single frames."""
    spirals = {place: quantity for quantity, place in tables.spirals.items()}
    for crystal, state, (frame, other) in fixed_pairs(groups, tables.crystals):
        gap = 1e3 * (frame.get_potential_energy() / len(frame) - other.get_potential_energy() / len(other))
        noise, reason = _noise(tables, crystal, frame, other)
        found.add(f"{crystal}.{state}.above_fm_fixed", gap, noise, [frame, other], reason)
        if (crystal, state) in spirals:
            found.add(spirals[crystal, state], gap, noise, [frame, other], reason)
    by_name = _by_name(groups)
    for quantity, (place, site) in tables.moments.items():
        if place in by_name:
            length = float(np.linalg.norm(moments_of(by_name[place])[site]))
            found.add(quantity, length, MOMENT_NOISE, [by_name[place]], SPHERES)


def _sums(found: Derived, groups: Mapping[str, Sequence[Atoms]], tables: Derivation) -> None:
    """Add sums of the energies of whole cells, eV."""
    by_name = _by_name(groups)
    for quantity, terms in tables.sums.items():
        if not set(terms) <= set(by_name):
            continue
        frames = [by_name[name] for name in terms]
        factors = np.array(list(terms.values()))
        noise = [1e-3 * tables.crystals[_crystal_of(a)].mesh_noise * len(a) for a in frames]
        value = float(factors @ [a.get_potential_energy() for a in frames])
        found.add(quantity, value, float(np.linalg.norm(factors * noise)), frames, CELLS)


def _by_name(groups: Mapping[str, Sequence[Atoms]]) -> dict[str, Atoms]:
    return {str(a.info["name"]): a for frames in groups.values() for a in frames}


def _crystal_of(atoms: Atoms) -> str:
    return str(atoms.info["parent"]).partition("-")[0]


def _combinations(found: Derived, tables: Derivation) -> None:
    """Add sums of values that there are."""
    for name, terms in tables.combinations.items():
        known = [found.values[key] for key in terms if key in found.values]
        if len(known) < len(terms):
            continue
        factors = np.array(list(terms.values()))
        found.values[name] = _entry(
            float(factors @ [p["value"] for p in known]),
            float(np.linalg.norm(factors * [p["uncertainty"] for p in known])),
            OWN,
            "; ".join(f"{f:+g} × ({p['source']})" for f, p in zip(factors, known, strict=True)),
        )


def _tetragonal_constants(found: Derived, groups: Mapping[str, Sequence[Atoms]], name: str, curve: "Curve") -> None:
    """Add C11 and C12 from strains at constant volume and the bulk modulus of E(V) at that volume.

    Under that volume's pressure these are Birch's coefficients of stress by strain; their bulk modulus is V d²E/dV².
    """
    tag = name.replace(".", "-")
    frames = groups.get(f"{tag}-tetragonal", [])
    strained = np.array([_tetragonal(a) for a in frames]).reshape(-1, 2)
    if len(strained) < 2 or np.ptp(strained[:, 0]) <= LEAST_STRAIN:
        return
    c_prime = np.polyfit(strained[:, 0], strained[:, 1], 1)[0] / 2
    spread = np.sqrt(2) * STRESS_NOISE / GPA / np.ptp(strained[:, 0]) / 2
    bulk, open_ = curve.bulk_modulus(float(np.mean([a.get_volume() / len(a) for a in frames])))
    for key, factor in (("C11", 4 / 3), ("C12", -2 / 3)):
        error = float(np.hypot(open_, factor * spread))
        found.add(f"{name}.{key}", GPA * (bulk + factor * c_prime), GPA * error, frames, STRESSES)
    curve_frames = [*groups[_eos(name)], *frames]
    found.add(
        f"{name}.K", GPA * bulk, GPA * open_, curve_frames, f"of E(V) at the volume of the strained cells, {CURVE}"
    )


def _shear_constants(found: Derived, tag: str, frames: Sequence[Atoms]) -> None:
    """Add Voigt's 66 in the cubic axes, or C44 where no moments single out an axis, and the distortion."""
    name = tag.removesuffix("-shear").replace("-", ".")
    constants = [(float(a.get_stress()[5]), _shear(a)) for a in frames]
    if len(constants) == 1 and abs(constants[0][1]) > LEAST_STRAIN and not _may_shear_itself(frames[0]):
        stress, strain = constants[0]
        value, error = GPA * stress / strain, STRESS_NOISE / abs(strain)
    elif len(constants) > 1 and np.ptp([c[1] for c in constants]) > LEAST_STRAIN:
        # A state without a fourfold axis has a stress of this kind when unstrained, so it is the slope that counts.
        strains = np.array([c[1] for c in constants])
        slope, rest = np.polyfit(strains, [c[0] for c in constants], 1)
        value, error = GPA * slope, float(np.sqrt(2) * STRESS_NOISE / np.ptp(strains))
        length = np.sqrt(2) * np.abs(frames[0].cell.array[:, 2]).max()
        open_ = float(length * np.hypot(STRESS_NOISE / np.sqrt(2) / value, error * rest * GPA / value**2))
        reason = f"linear in the strain; {STRESSES}"
        found.add(f"{name}.distortion{_clamped(frames)}", -length * rest / slope, open_, frames, reason)
    else:
        return
    found.add(f"{name}.{'C44' if _aligned(frames[0]) else 'C66'}{_clamped(frames)}", value, error, frames, STRESSES)


def _strain_constants(found: Derived, tag: str, frames: Sequence[Atoms]) -> None:
    """Add constants of a crystal with a fourfold axis along z, by differences of the stress."""
    name = tag.removesuffix("-strain").replace("-", ".")
    for pair in _pairs(frames):
        cells = [a.cell.array for a in pair]
        # The mean of both cells stands for the unstrained one: what strains are not opposite by enters in second order.
        strain = full_3x3_to_voigt_6_strain(np.eye(3) + 2 * np.linalg.solve(sum(cells), cells[1] - cells[0]))
        column = int(np.abs(strain).argmax())
        if abs(strain[column]) <= LEAST_STRAIN:
            continue
        slope = GPA * (pair[1].get_stress() - pair[0].get_stress()) / strain[column]
        error = np.sqrt(2) * STRESS_NOISE / abs(strain[column])
        for constant, row in COLUMNS.get(column, {}).items():
            found.add(f"{name}.{constant}{_clamped(pair)}", slope[row], error, pair, OPPOSITE)


def _hill(found: Derived, groups: Mapping[str, Sequence[Atoms]], name: str) -> None:
    """Add Hill's shear modulus of a cubic crystal whose three constants are known."""
    known = [found.values[key] for key in (f"{name}.{c}" for c in ("C11", "C12", "C44")) if key in found.values]
    if len(known) < 3 or f"{name}.C33" in found.values:
        return
    shear, open_ = hill_shear([c["value"] for c in known], [c["uncertainty"] for c in known])
    frames = [a for kind in ("tetragonal", "shear") for a in groups[f"{name.replace('.', '-')}-{kind}"]]
    found.add(f"{name}.G", shear, open_, frames, "those of C11, C12 and C44")


def _modes(found: Derived, groups: Mapping[str, Sequence[Atoms]], tag: str) -> None:
    """Add the phonons of a family that is named after its point of the zone."""
    crystal, _, point = tag.rpartition("-")
    name, frames = tag.replace("-", "."), groups[tag]
    if point in DEGENERACY:
        _zone_boundary_modes(found, crystal.replace("-", "."), point, frames)
    elif point in ("H", "N", "Gamma"):
        for atoms in frames:
            single = frozen_phonon(atoms)
            if single is not None:
                error = _anharmonicity(atoms, single, groups.get(f"{crystal}-eos", []))
                found.add(f"{name}.{_index(atoms)}", single, error, [atoms], FINITE)


def _zone_boundary_modes(found: Derived, crystal: str, point: str, frames: Sequence[Atoms]) -> None:
    pairs = _pairs(frames)
    if len(pairs) != len(DEGENERACY[point]):
        return
    modes = [m for p, d in zip(pairs, DEGENERACY[point], strict=True) for m in zone_boundary(*p) * d]
    for k, mode in enumerate(sorted(modes)):
        found.add(f"{crystal}.{point}.{k}", mode, HARMONIC * abs(mode), frames, FINITE)
    # A cell of [001] layers holds the cubic Γ and X at its own Γ; time reversal keeps them apart.
    if crystal.endswith(".afm001"):
        uniform = [m for m in (frozen_phonon(second) for _, second in pairs) if m is not None]
        for key, choose in (("lowest", min), ("highest", max)):
            mode = choose([*modes, *uniform])
            found.add(f"{crystal}.Gamma.{key}", mode, HARMONIC * abs(mode), frames, FINITE)


@dataclass(frozen=True)
class Curve:
    """A Birch-Murnaghan curve per atom: E0 (eV), V0 (Å³), B0 (eV/Å³), B0'.

    Parameters
    ----------
    fit : through all energies.
    errors : standard errors of the fit, or what the others differ by where that is more.
    others : without the smallest volume, without the largest, and through the stresses (which have no E0).
    """

    fit: np.ndarray
    errors: np.ndarray
    others: np.ndarray

    def bulk_modulus(self, volume: float) -> tuple[float, float]:
        """V d²E/dV² at a volume, and its uncertainty, eV/Å³."""
        value = _bulk_modulus(self.fit, volume)
        return value, max(self.errors[2], *(abs(_bulk_modulus(other, volume) - value) for other in self.others))


def _bulk_modulus(fit: np.ndarray, volume: float) -> float:
    h = 1e-3 * volume
    low, middle, high = birch_murnaghan(volume + h * np.array([-1.0, 0.0, 1.0]), 0.0, *fit[1:])
    return float(volume * (low - 2 * middle + high) / h**2)


def equation_of_state(frames: Sequence[Atoms]) -> Curve:
    """Birch-Murnaghan curve through the frames' energies, and what it depends on."""
    order = sorted(frames, key=lambda a: a.get_volume() / len(a))
    volume = np.array([a.get_volume() / len(a) for a in order])
    energy = np.array([a.get_potential_energy() / len(a) for a in order])
    start = (energy.min(), volume[energy.argmin()], 1.0, 4.5)
    fit, covariance = curve_fit(birch_murnaghan, volume, energy, p0=start)
    ends = [fit_birch_murnaghan(volume[kept], energy[kept]) for kept in (slice(1, None), slice(None, -1))]
    rows = [[end.e0, end.v0, end.b0, end.b1] for end in ends]
    if all("stress" in a.calc.results for a in frames):
        rows.append([fit[0], *from_stresses(frames, fit)])
    others = np.array(rows)
    return Curve(fit, np.fmax(np.sqrt(np.diag(covariance)), np.abs(others - fit).max(axis=0)), others)


def hill_shear(constants: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Hill's shear modulus of a cubic crystal from C11, C12 and C44, and its uncertainty.

    C11 and C12 are B + 4/3 and B − 2/3 of (C11 − C12)/2, which enters without B.
    """
    c11, c12, c44 = constants
    tetragonal = (c11 - c12) / 2
    open_ = float(np.sqrt(0.75 * max(errors[0] ** 2 - errors[1] ** 2, 0.0)))

    def hill(t: float, s: float) -> float:
        return ((2 * t + 3 * s) / 5 + 5 * t * s / (2 * s + 3 * t)) / 2

    value = hill(tetragonal, c44)
    return value, float(np.hypot(hill(tetragonal + open_, c44) - value, hill(tetragonal, c44 + errors[2]) - value))


def from_stresses(frames: Sequence[Atoms], start: np.ndarray) -> np.ndarray:
    """V0 (Å³), B0 (eV/Å³) and B0' of the Birch-Murnaghan curve through the stresses."""
    volume = np.array([a.get_volume() / len(a) for a in frames])
    slope = np.array([a.get_stress()[:3].mean() for a in frames])

    def derivative(v: np.ndarray, v0: float, b0: float, b1: float) -> np.ndarray:
        h = 1e-4 * v
        return (birch_murnaghan(v + h, 0.0, v0, b0, b1) - birch_murnaghan(v - h, 0.0, v0, b0, b1)) / (2 * h)

    return np.asarray(curve_fit(derivative, volume, slope, p0=start[1:])[0])


def _noise(tables: Derivation, crystal: str, first: Atoms, second: Atoms) -> tuple[float, str]:
    """Mesh noise of a difference of energies, meV/atom, and its reason."""
    if len(first) == len(second):
        return SAME_CELL, EQUAL
    if crystal not in tables.crystals:
        raise BenchmarkError(f"derivation.json has no crystal '{crystal}' of the reference frames; add its mesh noise")
    return tables.crystals[crystal].mesh_noise, MESHES


def _clamped(frames: Sequence[Atoms]) -> str:
    """Ending of quantities of strained crystals whose ions would move: their frames hold them at ideal sites."""
    return "_clamped" if any(np.abs(a.get_forces()).max() > LEAST_FORCE for a in frames) else ""


def _aligned(atoms: Atoms) -> bool:
    """Whether no moment points down."""
    return bool((moments_of(atoms)[:, 2] > -0.01).all())


def fixed_pairs(
    groups: Mapping[str, Sequence[Atoms]], crystals: Mapping[str, Crystal]
) -> list[tuple[str, str, tuple[Atoms, Atoms]]]:
    """Crystal, state, and a frame of the state with one of the ferromagnet at the crystal's volume.

    A ferromagnet in the same cell, on the same mesh, is preferred: most of the mesh's noise cancels.
    """
    found: dict[tuple[str, str], list[Atoms]] = {}
    for tag, frames in sorted(groups.items()):
        crystal, _, rest = tag.partition("-")
        state = rest.removesuffix("-eos").removesuffix("-fixed")
        for atoms in frames:
            volume = crystals[crystal].volume if crystal in crystals else np.nan
            if "-" in state or abs(atoms.get_volume() / len(atoms) - volume) > 1e-3:
                continue
            ferromagnet = _aligned(atoms) and moments_of(atoms)[:, 2].max() > 0.01
            found.setdefault((crystal, "fm" if ferromagnet else state), []).append(atoms)
    pairs = []
    for (crystal, state), frames in found.items():
        others = found.get((crystal, "fm"), [])
        if state != "fm" and others:
            best = [(a, b) for a in frames for b in others]
            pairs.append((crystal, state, min(best, key=lambda p: (len(p[0]) != len(p[1]), len(p[0])))))
    return pairs


def frozen_phonon(atoms: Atoms) -> float | None:
    """Frequency in THz of the mode that the displacement of one atom excites, from the forces it causes.

    Two atoms of one element move against each other; one of an element moves with its like against the other element.
    """
    moved = displacement(atoms)
    if moved is None:
        return None
    index, shift = moved
    alike = np.flatnonzero(atoms.numbers == atoms.numbers[index])
    masses = [atomic_masses[z] for z in sorted(set(atoms.numbers))]
    if len(masses) == 1:
        if len(atoms) != 2:
            return None
        signs, mass = np.where(alike == index, 1.0, -1.0), masses[0]
    else:
        signs, mass = np.ones(len(alike)), masses[0] * masses[1] / sum(masses)
    force = signs @ (atoms.get_forces()[alike] @ shift) / (shift @ shift)
    return _frequency(-force / mass)


def displacement(atoms: Atoms) -> tuple[int, np.ndarray] | None:
    """Number of the atom off its site, whose coordinates are quarters of the cell's, and its displacement in Å."""
    scaled = atoms.get_scaled_positions(wrap=False)
    shifts = (scaled - np.round(4 * scaled) / 4) @ atoms.cell.array
    lengths = np.linalg.norm(shifts, axis=1)
    index = int(lengths.argmax())
    return (index, shifts[index]) if lengths[index] > 1e-3 else None


def zone_boundary(first: Atoms, second: Atoms) -> list[float]:
    """Frequencies in THz of the two modes in which like atoms of a doubled cell move against each other.

    Parameters
    ----------
    first, second : one atom of either element displaced; the directions are those that couple.
    """
    frames = (first, second)
    moved = [displacement(a) for a in frames]
    if moved[0] is None or moved[1] is None:
        raise BenchmarkError("a frame of a zone-boundary phonon has no atom off its site; mend its plan")
    known = [m for m in moved if m is not None]
    signs = np.zeros(len(first))
    for z in set(first.numbers):
        signs[np.flatnonzero(first.numbers == z)] = (1.0, -1.0)
    elements = [first.numbers[index] for index, _ in known]
    units = [shift / np.linalg.norm(shift) for _, shift in known]
    matrix = np.zeros((2, 2))
    for k, (atoms, (index, shift)) in enumerate(zip(frames, known, strict=True)):
        for j in range(2):
            rows = np.flatnonzero(first.numbers == elements[j])
            force = signs[rows] @ (atoms.get_forces()[rows] @ units[j]) * signs[index]
            root = np.sqrt(atomic_masses[elements[j]] * atomic_masses[elements[k]])
            matrix[j, k] = -force / np.linalg.norm(shift) / root
    return [_frequency(x) for x in np.linalg.eigvalsh((matrix + matrix.T) / 2)]


def _pairs(frames: Sequence[Atoms]) -> list[tuple[Atoms, Atoms]]:
    """Frames 0 and 1, 2 and 3, ... of a plan, where both are there."""
    known = {_index(a): a for a in frames}
    return [(known[k], known[k + 1]) for k in sorted(known) if k % 2 == 0 and k + 1 in known]


def _frequency(square: float) -> float:
    return float(np.sign(square) * THZ * np.sqrt(abs(square)))


def _anharmonicity(atoms: Atoms, frequency: float, undisplaced: Sequence[Atoms]) -> float:
    """Half of what the frequency from the force differs from that of the energy; `HARMONIC` of it without an energy."""
    moved = displacement(atoms)
    volume = atoms.get_volume() / len(atoms)
    alike = (a for a in undisplaced if len(a) == len(atoms))
    rest = next((a for a in alike if abs(a.get_volume() / len(a) - volume) < 1e-3), None)
    if moved is None or rest is None:
        return HARMONIC * abs(frequency)
    index, shift = moved
    rise = atoms.get_potential_energy() - len(atoms) * rest.get_potential_energy() / len(rest)
    ratio = 2 * rise / max(-float(atoms.get_forces()[index] @ shift), 1e-12)
    return float(max(abs(frequency) * abs(np.sqrt(max(ratio, 0.0)) - 1) / 2, 0.01 * abs(frequency)))


def _index(atoms: Atoms) -> int:
    """Number of a frame in the family of its plan; it does not depend on which others are finished."""
    return int(str(atoms.info["parent"]).rsplit("-", 1)[1])


def _eos(name: str) -> str:
    return f"{name.replace('.', '-')}-eos"


def _moments(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Volume per atom and mean |m| of the atoms that carry a moment, by volume."""
    volumes = np.array([a.get_volume() / len(a) for a in frames])
    lengths = np.linalg.norm(np.array([moments_of(a) for a in frames]), axis=2)
    carrying = lengths.max(axis=0) > 0.01
    mean = lengths[:, carrying].mean(axis=1) if carrying.any() else lengths.mean(axis=1)
    return _sorted(volumes, mean)


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
    """Engineering shear γ_xy of the strain applied, from the Cartesian cell: it need not lie along the cubic axes."""
    ideal = _unstrained(atoms)
    strain = np.linalg.solve(ideal, atoms.cell.array) - np.eye(3)
    return float(strain[0, 1] + strain[1, 0])


def _may_shear_itself(atoms: Atoms) -> bool:
    """Whether no symmetry of the unstrained crystal with its moments turns σ_xy over, so that it may have one."""
    ideal = atoms.copy()
    ideal.set_cell(_unstrained(atoms), scale_atoms=True)
    turns = pattern_symmetry(ideal, moments_of(atoms)[:, 2], SYMPREC, MOMENT_NOISE).rotations
    return not any(np.isclose(r[0, 0] * r[1, 1] + r[0, 1] * r[1, 0], -1.0) for r in turns)


def _unstrained(atoms: Atoms) -> np.ndarray:
    """The cubic crystal's lattice vectors: Cartesian components are half-integer multiples of one length.

    The length is that of z, which a shear in the plane leaves alone.
    """
    cell = atoms.cell.array
    a = np.abs(cell[:, 2]).max()
    return a * np.round(2 * cell / a) / 2


def anisotropy_values(system: System, tables: Derivation) -> dict[str, dict[str, Any]]:
    """Differences of E(n) from groups of directions that no model learned from, and B1 from groups at one volume."""
    groups = _groups(system.folder.glob("data/gpaw_soc*.extxyz"))
    references = _groups(system.folder.glob("references/anisotropy.extxyz"))
    tested = system.test_parents
    unseen = {**{p: frames for p, frames in groups.items() if p in tested}, **references}
    values: dict[str, dict[str, Any]] = {}
    for name, (parent, first, last) in tables.anisotropy.items():
        if parent in unseen:
            energies = axis_energies(unseen[parent])
            gap = energies[AXES.index(first)] - energies[AXES.index(last)]
            share = len(unseen[parent][0]) if system.quantities[name].unit.endswith("/atom") else 1
            what = "reference" if parent in references else "label of a test parent"
            source = f"{FORCE_THEOREM}; {what}, {parent}; uncertainty: {FORCE_MESH}"
            values[name] = _entry(gap / share, 0.0, OWN, source)
    for name, parents in tables.magnetoelastic.items():
        if all(p in groups for p in parents):
            strains = np.array([_axial_strain(groups[p][0]) for p in parents])
            energies = np.array([axis_energies(groups[p]) for p in parents])
            volume = groups[parents[0]][0].get_volume()
            value, error = magnetoelastic(strains, 1e-6 * (energies[:, 0] - energies[:, 2]) / volume)
            which = ", ".join(f"{p} ({'test' if p in tested else 'training'})" for p in parents)
            kind = OWN if all(p in tested for p in parents) else SEEN
            source = (
                f"{FORCE_THEOREM}; label settings: {which}; uncertainty: term of second order, and a tenth for meshes"
            )
            values[name] = _entry(MEGAJOULE * value, MEGAJOULE * error, kind, source)
    return values


def label_values(system: System, tables: Derivation) -> dict[str, dict[str, Any]]:
    """Energies of constrained moments from labels; the model saw those of training parents."""
    tested = system.test_parents
    values: dict[str, dict[str, Any]] = {}
    for file in sorted({entry[0] for entry in tables.labels.values()}):
        path = system.folder / "data" / file
        if not path.exists():
            continue
        frames = {str(a.info["name"]): a for a in ase.io.read(path, ":")}
        for name, (place, first, second) in tables.labels.items():
            if place != file or first not in frames or second not in frames:
                continue
            pair = [frames[first], frames[second]]
            kind = OWN if all(a.info["parent"] in tested for a in pair) else SEEN
            gap = 1e3 * (pair[0].get_potential_energy() - pair[1].get_potential_energy()) / len(pair[0])
            recipe = pair[0].info.get("recipe", "labels")
            source = f"label settings ({recipe}), {first} less {second}; uncertainty: {EQUAL}"
            values[name] = _entry(gap, SAME_CELL, kind, source)
    return values


def axis_energies(frames: Sequence[Atoms]) -> np.ndarray:
    """Energies (3,) with the moments along x, y and z above the lowest of all directions, µeV/cell.

    Raises
    ------
    BenchmarkError : the group has no such direction.
    """
    moments = np.array([moments_of(a) for a in frames])
    site = int(np.linalg.norm(moments[0], axis=1).argmax())
    n = moments[:, site] / np.linalg.norm(moments[:, site], axis=1)[:, None]
    energy = np.array([a.get_potential_energy() for a in frames])
    energy -= energy.min()
    along = np.abs(n) > 0.999
    if not along.any(axis=0).all():
        raise BenchmarkError(f"group '{frames[0].info['parent']}' has no direction along x, y or z; add it to its plan")
    return np.array([1e6 * energy[chosen].mean() for chosen in along.T])


def _axial_strain(atoms: Atoms) -> float:
    """ln(c/a) of a tetragonal crystal."""
    x, z = _extents(atoms)
    return float(np.log(z / x))


def _groups(paths: Iterable[Path]) -> dict[str, list[Atoms]]:
    """Frames of the anisotropy groups in some files, by parent."""
    groups: dict[str, list[Atoms]] = {}
    for path in sorted(paths):
        for atoms in ase.io.read(path, ":"):
            groups.setdefault(str(atoms.info["parent"]), []).append(atoms)
    return groups


def magnetoelastic(strain: np.ndarray, energy: np.ndarray) -> tuple[float, float]:
    """B1 = −d(E[100] − E[001])/d(ε_zz − ε_xx) / V at no strain, and what the quadratic term leaves open.

    Parameters
    ----------
    strain : ε_zz − ε_xx.
    energy : E[100] − E[001] over the volume, eV/Å³; zero without strain, by symmetry.
    """
    quadratic = np.linalg.lstsq(np.column_stack([strain, strain**2]), energy, rcond=None)[0]
    linear = (strain @ energy) / (strain @ strain)
    return float(-quadratic[0]), float(abs(quadratic[0] - linear) + 0.1 * abs(quadratic[0]))
