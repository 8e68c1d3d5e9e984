"""Values of own DFT, derived from the frames of the reference calculations: none is typed by hand.

Frames come from `references/dft.json` (a plan of `mmace label`) through `references/dft.extxyz`. A parent's name tells
what it is for: `<crystal>-<state>-eos-3`, `-fixed-` (one volume), `-tetragonal-`, `-shear-`, or the point of a phonon.
Which of them make which quantity stands in `references/derivation.json`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.data import atomic_masses
from ase.units import _amu, _e
from mmace_props.eos import birch_murnaghan
from mmace_props.files import write_whole
from mmace_props.protocol import moments_of
from scipy.optimize import curve_fit

from .calculate import GPA
from .derivation import Crystal, Derivation, read_derivation
from .errors import BenchmarkError
from .systems import System

SETTINGS = "ABINIT, PBE, PAW, moments free, mesh 0.18 Å⁻¹, Methfessel-Paxton smearing 0.01 Ha"
THZ = 1e-12 / (2 * np.pi) * np.sqrt(_e * 1e20 / _amu)
"""√(eV/Å²/u) as an ordinary frequency in THz."""
MEGAJOULE = 1e3 * GPA
"""MJ/m³ in eV/Å³."""
SAME_CELL = 0.5
STRESS_NOISE = 0.1
"""GPa that the mesh leaves open: finer meshes moved stresses by 0.1 to 0.3 GPa from those of the labels."""
MOMENT_NOISE = 0.02
HARMONIC = 0.03
LEAST_STRAIN = 1e-6
LEAST_FORCE = 0.005
"""eV/Å; below it a site's symmetry, not its luck, holds the ion."""
DEGENERACY = {"X": (1, 2), "M": (1, 2), "R": (3,)}
"""How often each pair of displacements of a plan occurs at the point: along the axis first, then across."""
CURVE = "standard error of the fit, or what the fit of the stresses differs by"
SPHERES = "0.02 µB, by which mesh and smearing move moments in spheres, and that of the volume"
MESHES = "mesh noise between cells of different size"
EQUAL = "0.5 meV/atom, one cell and one mesh: most of the noise cancels"
STRESSES = "mesh noise of the stress (0.1 GPa) over the strain, and the fit of B0"
FINITE = "finite displacement: frequency from the force against that from the energy, at least 1 %; 3 % without it"
FORCE_THEOREM = "GPAW, PBE, force theorem"
FORCE_MESH = "a tenth, what meshes leave open, at least 2 µeV"


def derive(system: System) -> dict[str, dict[str, Any]]:
    """Write `references/values.json`.

    Returns
    -------
    ``value``, ``uncertainty`` (what fit, mesh or finite strain leave open) and ``source`` by quantity.

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


def derived_values(groups: Mapping[str, Sequence[Atoms]], tables: Derivation) -> dict[str, dict[str, Any]]:
    """Quantities from frames by tag; a curve with too few frames, or strains without extent, give none."""
    values: dict[str, dict[str, Any]] = {}

    def add(name: str, value: float, uncertainty: float, frames: Sequence[Atoms], reason: str) -> None:
        names = ", ".join(str(a.info["name"]) for a in frames)
        source = f"{SETTINGS}; {names}; uncertainty: {reason}"
        values[name] = {"value": float(value), "uncertainty": float(uncertainty), "source": source}

    minima: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for tag, frames in sorted(groups.items()):
        if tag.endswith("-eos") and len(frames) >= 5:
            name = tag.removesuffix("-eos").replace("-", ".")
            fit, errors = minima[name] = equation_of_state(frames)
            crossed = np.abs(from_stresses(frames, fit) - fit[1:])
            errors[1:] = np.fmax(errors[1:], crossed)
            add(f"{name}.V0", fit[1], errors[1], frames, CURVE)
            add(f"{name}.B0", GPA * fit[2], GPA * errors[2], frames, CURVE)
            add(f"{name}.B0_prime", fit[3], errors[3], frames, CURVE)
            volumes, lengths = _moments(frames)
            if lengths.max() > 0.01:
                slope = np.abs(np.gradient(lengths, volumes)).max() * errors[1]
                add(f"{name}.m0", np.interp(fit[1], volumes, lengths), np.hypot(slope, MOMENT_NOISE), frames, SPHERES)
                order = sorted(frames, key=lambda a: a.get_volume() / len(a))
                for end, place in (("low", 0), ("high", -1)):
                    add(f"{name}.m_{end}", lengths[place], MOMENT_NOISE, [order[place]], SPHERES)
    for name, (fit, errors) in minima.items():
        crystal, _, state = name.partition(".")
        for key in minima:
            if state == "fm" and key.startswith(f"{crystal}.") and key != name:
                frames = [*groups[_eos(name)], *groups[_eos(key)]]
                gap, open_ = minima[key][0][0] - fit[0], np.hypot(errors[0], minima[key][1][0])
                noise, reason = _noise(tables, crystal, frames[0], frames[-1])
                add(f"{key}.above_fm", 1e3 * gap, np.hypot(1e3 * open_, noise), frames, f"both fits; {reason}")
    spirals = {place: quantity for quantity, place in tables.spirals.items()}
    for crystal, state, (frame, other) in fixed_pairs(groups, tables.crystals):
        gap = 1e3 * (frame.get_potential_energy() / len(frame) - other.get_potential_energy() / len(other))
        noise, reason = _noise(tables, crystal, frame, other)
        add(f"{crystal}.{state}.above_fm_fixed", gap, noise, [frame, other], reason)
        if (crystal, state) in spirals:
            add(spirals[crystal, state], gap, noise, [frame, other], reason)
    for name, terms in tables.combinations.items():
        parts = [values.get(key) for key in terms]
        known = [p for p in parts if p is not None]
        if len(known) == len(terms):
            factors = np.array(list(terms.values()))
            values[name] = {
                "value": float(factors @ [p["value"] for p in known]),
                "uncertainty": float(np.linalg.norm(factors * [p["uncertainty"] for p in known])),
                "source": "; ".join(f"{f:+g} × ({p['source']})" for f, p in zip(factors, known, strict=True)),
            }
    for name, (fit, errors) in minima.items():
        bulk, open_ = fit[2], errors[2]
        tag = name.replace(".", "-")
        tetragonal = groups.get(f"{tag}-tetragonal", [])
        strained = np.array([_tetragonal(a) for a in tetragonal]).reshape(-1, 2)
        if len(strained) >= 2 and np.ptp(strained[:, 0]) > LEAST_STRAIN:
            c_prime = np.polyfit(strained[:, 0], strained[:, 1], 1)[0] / 2
            spread = np.sqrt(2) * STRESS_NOISE / GPA / np.ptp(strained[:, 0]) / 2
            for key, factor in (("C11", 4 / 3), ("C12", -2 / 3)):
                error = np.hypot(open_, factor * spread)
                add(f"{name}.{key}", GPA * (bulk + factor * c_prime), GPA * error, tetragonal, STRESSES)
    for tag, frames in groups.items():
        constants = [(float(a.get_stress()[5]), _shear(a)) for a in frames if tag.endswith("-shear")]
        if len(constants) == 1 and abs(constants[0][1]) > LEAST_STRAIN:
            stress, strain = constants[0]
            value, error = GPA * stress / strain, STRESS_NOISE / abs(strain)
        elif len(constants) > 1 and np.ptp([c[1] for c in constants]) > LEAST_STRAIN:
            # A state without a fourfold axis has a stress of this kind when unstrained, so it is the slope that counts.
            strains = np.array([c[1] for c in constants])
            slope, rest = np.polyfit(strains, [c[0] for c in constants], 1)
            value, error = GPA * slope, np.sqrt(2) * STRESS_NOISE / np.ptp(strains)
            length = np.sqrt(2) * np.abs(frames[0].cell.array[:, 2]).max()
            open_ = length * np.hypot(STRESS_NOISE / np.sqrt(2) / value, error * rest * GPA / value**2)
            name = tag.removesuffix("-shear").replace("-", ".")
            add(
                f"{name}.distortion{_clamped(frames)}",
                -length * rest / slope,
                open_,
                frames,
                f"linear in the strain; {STRESSES}",
            )
        else:
            continue
        # Voigt's 66 in the cubic axes; where no moments single out an axis it is C44.
        name = tag.removesuffix("-shear").replace("-", ".")
        add(f"{name}.{'C44' if _aligned(frames[0]) else 'C66'}{_clamped(frames)}", value, error, frames, STRESSES)
    for tag, frames in groups.items():
        crystal, _, point = tag.rpartition("-")
        name = tag.replace("-", ".")
        if point in DEGENERACY:
            pairs = _pairs(frames)
            if len(pairs) == len(DEGENERACY[point]):
                modes = [m for p, d in zip(pairs, DEGENERACY[point], strict=True) for m in zone_boundary(*p) * d]
                for k, found in enumerate(sorted(modes)):
                    add(f"{name}.{k}", found, HARMONIC * abs(found), frames, FINITE)
                # A cell of [001] layers holds the cubic Γ and X at its own Γ; time reversal keeps them apart.
                uniform = [m for m in (frozen_phonon(second) for _, second in pairs) if m is not None]
                if crystal.endswith("-afm001"):
                    for key, choose in (("lowest", min), ("highest", max)):
                        found = choose([*modes, *uniform])
                        add(f"{crystal.replace('-', '.')}.Gamma.{key}", found, HARMONIC * abs(found), frames, FINITE)
        elif point in ("H", "N", "Gamma"):
            for atoms in frames:
                single = frozen_phonon(atoms)
                if single is not None:
                    error = _anharmonicity(atoms, single, groups.get(f"{crystal}-eos", []))
                    add(f"{name}.{_index(atoms)}", single, error, [atoms], FINITE)
    return values


def equation_of_state(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Birch-Murnaghan fit per atom: E0 (eV), V0 (Å³), B0 (eV/Å³), B0', and their standard errors."""
    volume = np.array([a.get_volume() / len(a) for a in frames])
    energy = np.array([a.get_potential_energy() / len(a) for a in frames])
    start = (energy.min(), volume[energy.argmin()], 1.0, 4.5)
    found, covariance = curve_fit(birch_murnaghan, volume, energy, p0=start)
    return found, np.sqrt(np.diag(covariance))


def from_stresses(frames: Sequence[Atoms], start: np.ndarray) -> np.ndarray:
    """V0 (Å³), B0 (eV/Å³) and B0' of the Birch-Murnaghan curve through the stresses; NaN without stresses."""
    volume = np.array([a.get_volume() / len(a) for a in frames])
    if not all("stress" in a.calc.results for a in frames):
        return np.full(3, np.nan)
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


def _unstrained(atoms: Atoms) -> np.ndarray:
    """The cubic crystal's lattice vectors: Cartesian components are half-integer multiples of one length.

    The length is that of z, which a shear in the plane leaves alone.
    """
    cell = atoms.cell.array
    a = np.abs(cell[:, 2]).max()
    return a * np.round(2 * cell / a) / 2


def anisotropy_values(system: System, tables: Derivation) -> dict[str, dict[str, Any]]:
    """E[100] − E[001] of groups of directions of test parents, and B1 from groups at one volume, in label settings."""
    path = system.folder / "data" / "gpaw_soc.extxyz"
    if not path.exists():
        return {}
    groups: dict[str, list[Atoms]] = {}
    for atoms in ase.io.read(path, ":"):
        groups.setdefault(str(atoms.info["parent"]), []).append(atoms)
    tested = system.test_parents
    values: dict[str, dict[str, Any]] = {}
    for name, parent in tables.anisotropy.items():
        if parent in groups and parent in tested:
            _, gap = axial_anisotropy(groups[parent])
            source = f"{FORCE_THEOREM}; label of a test parent, {parent}; uncertainty: {FORCE_MESH}"
            values[name] = {"value": gap, "uncertainty": max(2.0, 0.1 * abs(gap)), "source": source}
    for name, parents in tables.magnetoelastic.items():
        if all(p in groups for p in parents):
            points = np.array([axial_anisotropy(groups[p]) for p in parents])
            volume = groups[parents[0]][0].get_volume()
            value, error = magnetoelastic(points[:, 0], 1e-6 * points[:, 1] / volume)
            which = ", ".join(f"{p} ({'test' if p in tested else 'training'})" for p in parents)
            source = (
                f"{FORCE_THEOREM}; label settings, not independent of the training: {which}; uncertainty: quadratic"
            )
            values[name] = {"value": MEGAJOULE * value, "uncertainty": MEGAJOULE * error, "source": source}
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
            kind = "test" if all(a.info["parent"] in tested for a in pair) else "training"
            gap = 1e3 * (pair[0].get_potential_energy() - pair[1].get_potential_energy()) / len(pair[0])
            recipe = pair[0].info.get("recipe", "labels")
            source = f"label settings ({recipe}), {kind} labels {first} less {second}; uncertainty: {EQUAL}"
            values[name] = {"value": float(gap), "uncertainty": SAME_CELL, "source": source}
    return values


def axial_anisotropy(frames: Sequence[Atoms]) -> tuple[float, float]:
    """ln(c/a) of a tetragonal crystal, and E[100] − E[001] of its directions in µeV/cell."""
    x, z = _extents(frames[0])
    moments = np.array([moments_of(a) for a in frames])
    site = int(np.linalg.norm(moments[0], axis=1).argmax())
    n = moments[:, site] / np.linalg.norm(moments[:, site], axis=1)[:, None]
    energy = np.array([a.get_potential_energy() for a in frames])
    first, last = np.abs(n[:, 0]) > 0.999, np.abs(n[:, 2]) > 0.999
    return float(np.log(z / x)), float(1e6 * (energy[first].mean() - energy[last].mean()))


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
