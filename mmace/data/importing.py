"""What readers of other formats share: the frame they build, parents, and signs checked against energies."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import key_val_str_to_dict
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from ase.units import Bohr, GPa, Hartree, Rydberg
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import norm, t

from ..errors import LabelError
from ..structures import as_vectors
from .labels import SAME_GEOMETRY

TERMS = ("forces", "stress", "magnetic_forces")
MAGNETIC = ("magnetic_forces", "magnetic_forces_parallel")  # whole, or known along the moments alone
NEIGHBOURS = 4
MAX_FRAMES = 1000  # of one composition in the check of signs
MAX_STRAIN, MAX_SHIFT, MAX_TURN = 0.08, 0.3, 0.8  # logarithmic strain, Å, µB between two frames of a pair
SMALL_WORK = 1e-3  # eV; pairs with less say little
ACCEPTED = 0.35  # a coefficient this close to ±1, and a standard error below a third of it, settles a sign
CERTAIN = 5.0  # standard errors from ±1 that, beyond ACCEPTED, tell another unit
FEWEST_PAIRS = 6
SIGMAS = 3.0  # at which the standard errors of few frames are widened to be as rarely exceeded as those of many
UNMODELLED = 8.0  # a factor that constrained moments whose magnetic forces are not in the file may explain
UNITS = {
    "forces": {"eV/A": 1.0, "eV/Bohr": 1 / Bohr, "Ry/Bohr": Rydberg / Bohr, "Ha/Bohr": Hartree / Bohr},
    "stress": {
        "eV/A3": 1.0,
        "GPa": GPa,
        "kbar": 0.1 * GPa,
        "Ry/Bohr3": Rydberg / Bohr**3,
        "Ha/Bohr3": Hartree / Bohr**3,
    },
    "magnetic_forces": {"eV/muB": 1.0, "meV/muB": 1e-3, "Ry/muB": Rydberg, "Ha/muB": Hartree},
}
"""Units that files are found to be in, in those of the label contract."""


@dataclass(frozen=True)
class SignEvidence:
    """Factor on one quantity that makes it the derivative of the energies, fitted to pairs of nearby frames.

    Attributes
    ----------
    factor : float
        About 1 where sign and unit are right, about -1 where the sign is turned round; NaN without pairs.
    error : float
        Standard error by energies that are off independently of each other, widened where the frames are few.
    pairs : int
        Pairs of frames that were compared.
    """

    factor: float
    error: float
    pairs: int

    @property
    def sign(self) -> int:
        """1 or -1 where the data settle it, 0 where they do not."""
        settled = abs(abs(self.factor) - 1.0) < ACCEPTED and self.error < ACCEPTED / 3
        return int(np.sign(self.factor)) if settled else 0

    @property
    def contradicts(self) -> bool:
        """Whether the factor is certainly neither 1 nor -1."""
        distance = abs(abs(self.factor) - 1.0)
        return self.pairs >= FEWEST_PAIRS and distance > max(ACCEPTED, CERTAIN * self.error)

    def __str__(self) -> str:
        return f"factor {self.factor:.2f} ± {self.error:.2f} from {self.pairs} pairs of frames"


def make_frame(
    symbols: Sequence[str],
    positions: np.ndarray,
    cell: np.ndarray,
    pbc: bool,
    moments: np.ndarray,
    results: Mapping[str, Any],
    magnetic_forces: np.ndarray | None,
    info: Mapping[str, Any],
    where: str,
) -> Atoms:
    """A frame of the label contract.

    Parameters
    ----------
    symbols : sequence of str
    positions : ndarray (N, 3)
        Å.
    cell : ndarray (3, 3)
        Rows are lattice vectors, Å.
    pbc : bool
    moments : ndarray (N,) or (N, 3)
        µB; (N,) is along z.
    results : mapping
        `energy` eV, `forces` (N, 3) eV/Å, `stress` (6,) eV/Å^3 in ASE's sign; what is None is not known.
    magnetic_forces : ndarray (N, 3) or (N,), or None
        eV/µB, NaN where not known; (N,) is -dE/d|m|, the component along the moments alone.
    info : mapping
        `parent`, `name`, `code`, `recipe`.
    where : str
        File and frame, for messages.

    Raises
    ------
    LabelError
        An array has the wrong shape or is not finite where it must be.
    """
    n_atoms = len(symbols)
    shapes = {"energy": (), "forces": (n_atoms, 3), "stress": (6,)}
    known: dict[str, Any] = {}
    for key, value in results.items():
        if value is not None:
            known[key] = _finite(value, shapes[key], key, where)
    vectors = as_vectors(_numbers(moments, "moments", where))
    try:
        atoms = Atoms(symbols, positions=_finite(positions, (n_atoms, 3), "positions", where), cell=cell, pbc=pbc)
    except (KeyError, ValueError) as error:
        raise LabelError(f"{where} does not hold a structure ({error}): mend the file.") from None
    atoms.set_initial_magnetic_moments(_finite(vectors, (n_atoms, 3), "moments", where))
    if "energy" in known:
        known["energy"] = float(known["energy"])
    atoms.calc = SinglePointCalculator(atoms, **known)
    if magnetic_forces is not None:
        array = _numbers(magnetic_forces, "magnetic forces", where)
        if array.shape not in ((n_atoms, 3), (n_atoms,)):
            raise LabelError(f"{where}: magnetic forces have shape {array.shape}, but ({n_atoms}, 3) is needed.")
        atoms.arrays[MAGNETIC[0 if array.ndim == 2 else 1]] = array
    atoms.info.update({"soc": 0, **info})
    return atoms


def stem_of(path: str | os.PathLike[str]) -> str:
    """Name of a file without its ending, or of a folder: what names of labels and parents begin with."""
    place = Path(path).resolve()
    return place.name if place.is_dir() else Path(place.name.removesuffix(".gz")).stem


def as_name(value: Any, stem: str) -> str:
    """A value as a name: `stem` is put before one that would be read back as a number or truth value."""
    text = str(value)
    is_text = isinstance(key_val_str_to_dict(f"x={text}")["x"], str)
    return text if is_text else f"{stem}-{text}"


def unknown_where_empty(magnetic_forces: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """NaN for atoms whose moment and magnetic force are exactly zero: formats fill in what was not calculated."""
    empty = ~(np.any(magnetic_forces, axis=-1) | np.any(moments, axis=-1))
    return np.where(empty[..., None], np.nan, magnetic_forces)


def with_parents(frames: Sequence[Atoms], stem: str) -> list[Atoms]:
    """Frames of one geometry get one parent, so that a split cannot put one crystal on both sides."""
    known: dict[tuple[tuple[str, ...], int], list[tuple[np.ndarray, str]]] = defaultdict(list)
    count = 0
    for atoms in frames:
        kind = tuple(atoms.get_chemical_symbols())
        geometry = np.concatenate([atoms.cell.array, atoms.positions]).ravel()
        # equal geometries have nearly equal means, so that only a few have to be compared
        place = int(np.floor(geometry.mean() / SAME_GEOMETRY))
        near = [entry for step in (-1, 0, 1) for entry in known.get((kind, place + step), ())]
        name = next((name for other, name in near if np.abs(other - geometry).max() < SAME_GEOMETRY), None)
        if name is None:
            name = f"{stem}-{count}"
            known[kind, place].append((geometry, name))
            count += 1
        atoms.info["parent"] = name
    return list(frames)


def sign_evidence(frames: Sequence[Atoms]) -> dict[str, SignEvidence]:
    """Factors on forces, stress and magnetic forces that fit the energies.

    Between two nearby frames of the same atoms the trapezoidal rule gives the difference of the energies from the mean
    of the derivatives at both ends, with an error of third order. The three factors are the least-squares solution over
    the pairs of nearest frames, each pair relative to the sum of its terms.

    Parameters
    ----------
    frames : sequence of Atoms
        Frames of the label contract.

    Returns
    -------
    dict of SignEvidence
        For `forces`, `stress` and `magnetic_forces`.
    """
    return _fitted(_work_of_pairs(frames))


def refuse_other_units(frames: Sequence[Atoms], read_as: Mapping[str, str]) -> None:
    """Refuse forces, stress or magnetic forces whose size the energies contradict.

    Parameters
    ----------
    frames : sequence of Atoms
        Frames as they were read.
    read_as : mapping
        For some of `forces`, `stress` and `magnetic_forces`, the unit (of `UNITS`) in which they were read.

    Raises
    ------
    LabelError
        Names the quantity and the unit that it appears to be in, where one of `UNITS` fits.
    """
    pairs = _work_of_pairs(frames)
    evidence = _fitted(pairs)
    held = [name for name in ("stress", "magnetic_forces", "forces") if any(_holds(atoms, name) for atoms in frames)]
    trials = {name: _in_other_units(pairs, name, read_as.get(name)) for name in held if not evidence[name].sign}
    for name, trial in trials.items():
        for unit, found in trial.items():
            if found.sign:
                raise LabelError(_wrong_unit(name, read_as[name], unit, found))
    for name, trial in trials.items():
        explained = "magnetic_forces" not in held and 1 / UNMODELLED < abs(evidence[name].factor) < UNMODELLED
        if evidence[name].contradicts and not explained:
            for unit, found in trial.items():
                if abs(abs(found.factor) - 1.0) < ACCEPTED:
                    raise LabelError(_wrong_unit(name, read_as[name], unit, found))
            raise LabelError(
                f"the energies contradict the size of the {name.replace('_', ' ')} ({evidence[name]}), and no unit "
                f"known here explains it: mend the data, or leave it out with --drop {name}."
            )


def _in_other_units(pairs: _Pairs, name: str, read_as: str | None) -> dict[str, SignEvidence]:
    """Evidence on one quantity, were the file in each of the other units; none where its unit has no name."""
    if read_as is None:
        return {}
    trial = {}
    for unit, value in UNITS[name].items():
        scales = np.ones(1 + len(TERMS))
        scales[1 + TERMS.index(name)] = value / UNITS[name][read_as]
        if unit != read_as:
            trial[unit] = _fitted(replace(pairs, work=pairs.work * scales))[name]
    return trial


def _wrong_unit(name: str, read_as: str, unit: str, found: SignEvidence) -> str:
    return (
        f"by the energies the unit of the {name.replace('_', ' ')} is {unit} ({found}), not {read_as}: give or convert "
        f"to the right one, or leave it out with --drop {name}."
    )


def settle_signs(frames: Sequence[Atoms], stress: int | None, magnetic: int | None, how: Mapping[str, str]) -> None:
    """Give stress and magnetic forces of frames the contract's sign, in place.

    Parameters
    ----------
    frames : sequence of Atoms
        Frames as they were read.
    stress, magnetic : int or None
        1 keeps a sign, -1 turns it round, None leaves it to the energies of the frames.
    how : mapping
        For `stress` and `magnetic_forces`, what the user should say where the energies do not settle a sign.

    Raises
    ------
    LabelError
        The energies do not settle a sign that was left to them, or contradict one that was given, or the forces.
    """
    evidence = sign_evidence(frames)
    if evidence["forces"].sign < 0:
        raise LabelError(
            f"the forces point uphill ({evidence['forces']}): the file holds gradients, turn their sign first."
        )
    for name, wanted in (("stress", stress), ("magnetic_forces", magnetic)):
        if not any(_holds(atoms, name) for atoms in frames):
            continue
        found = evidence[name]
        if wanted is None and not found.sign:
            raise LabelError(f"the energies do not settle the sign of {name.replace('_', ' ')} ({found}): {how[name]}.")
        if wanted is not None and found.sign * wanted < 0:
            raise LabelError(
                f"the energies contradict the sign given for {name.replace('_', ' ')} ({found}): {how[name]}."
            )
        if (found.sign if wanted is None else wanted) < 0:
            for atoms in frames:
                if name == "stress" and "stress" in atoms.calc.results:
                    atoms.calc.results["stress"] *= -1.0
                elif name == "magnetic_forces":
                    for kind in MAGNETIC:
                        if kind in atoms.arrays:
                            atoms.arrays[kind] *= -1.0


def voigt(stress: Any, where: str) -> np.ndarray:
    """Components xx, yy, zz, yz, xz, xy of six numbers in that order, nine, or 3 × 3."""
    array = _numbers(stress, "stress", where)
    if array.shape == (9,):
        array = array.reshape(3, 3)
    if array.shape == (3, 3):
        return full_3x3_to_voigt_6_stress(array)
    if array.shape != (6,):
        raise LabelError(f"{where}: stress has shape {array.shape}, but (6,) or (3, 3) is needed.")
    return array


def text_of(path: str | os.PathLike[str], opener: Callable[..., Any] = open) -> str:
    """Content of a text file, or a LabelError that names it."""
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise LabelError(f"there is no file {Path(path)}: give an existing one.") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise LabelError(f"{Path(path)} cannot be read as text ({error}): give another file.") from None


def _holds(atoms: Atoms, name: str) -> bool:
    if name == "magnetic_forces":
        return any(kind in atoms.arrays and bool(np.nan_to_num(atoms.arrays[kind]).any()) for kind in MAGNETIC)
    return name in atoms.calc.results


def _numbers(values: Any, what: str, where: str) -> np.ndarray:
    try:
        return np.array(values, dtype=float)
    except (TypeError, ValueError):
        raise LabelError(f"{where}: {what} are not numbers: mend the file.") from None


def _finite(values: Any, shape: tuple[int, ...], what: str, where: str) -> np.ndarray:
    array = _numbers(values, what, where)
    if array.shape != shape:
        raise LabelError(f"{where}: {what} has shape {array.shape}, but {shape} is needed.")
    if not np.isfinite(array).all():
        raise LabelError(f"{where}: {what} is not finite: leave out what is not known.")
    return array


@dataclass(frozen=True)
class _Pairs:
    """Pairs of nearby frames: energy difference and work (eV) by forces, stress and magnetic forces, (P, 4)."""

    work: np.ndarray
    frames: np.ndarray  # (P, 2) numbers of the two


def _work_of_pairs(frames: Sequence[Atoms]) -> _Pairs:
    """Energy differences and work of pairs of nearby frames of the same atoms."""
    groups: dict[tuple[str, ...], list[Atoms]] = defaultdict(list)
    for atoms in frames:
        if "energy" in atoms.calc.results and atoms.pbc.all() and abs(np.linalg.det(atoms.cell.array)) > 0:
            groups[tuple(atoms.get_chemical_symbols())].append(atoms)
    constrained = any(name in atoms.arrays for name in MAGNETIC for atoms in frames)
    work: list[list[float]] = []
    numbers: list[tuple[int, int]] = []
    first = 0
    for group in groups.values():
        step = -(-len(group) // MAX_FRAMES)
        for (one, other), row in _pairs(group[::step], constrained):
            work.append(row)
            numbers.append((first + one, first + other))
        first += len(group)
    return _Pairs(np.array(work).reshape(-1, 4), np.array(numbers, dtype=int).reshape(-1, 2))


def _fitted(pairs: _Pairs) -> dict[str, SignEvidence]:
    """Factors on the three kinds of work that give the energy differences best.

    The energy of a frame is in all pairs of it, so that the errors of pairs are not independent: those of the frames
    are taken to be, and around a ring of frames the energies say nothing.
    """
    unknown = {name: SignEvidence(np.nan, np.nan, 0) for name in TERMS}
    size = np.abs(pairs.work[:, 1:]).sum(1)
    kept = size > SMALL_WORK
    table = pairs.work[kept] / size[kept, None]
    present = [k for k in range(3) if np.any(np.abs(table[:, 1 + k]) > 0.05)]
    if not present:
        return unknown
    numbers = np.unique(pairs.frames[kept], return_inverse=True)[1].reshape(-1, 2)
    order = np.repeat(np.arange(len(table)), 2)
    signs = np.array([-1.0, 1.0]) / size[kept, None]
    incidence = coo_array((signs.ravel(), (order, numbers.ravel()))).tocsr()
    parts = connected_components(abs(incidence.T @ incidence), directed=False)[0]
    freedom = incidence.shape[1] - parts - len(present)
    design = table[:, [1 + k for k in present]]
    factors, _, rank, _ = np.linalg.lstsq(design, table[:, 0], rcond=1e-6)
    if rank < len(present) or freedom < 1:
        return unknown
    basis = np.linalg.qr(design)[0]
    explained = incidence.T @ basis
    variance = np.sum((table[:, 0] - design @ factors) ** 2) / (incidence.power(2).sum() - np.sum(explained**2))
    few = t.isf(norm.sf(SIGMAS), freedom) / SIGMAS
    errors = few * np.sqrt(variance) * np.linalg.norm(incidence.T @ np.linalg.pinv(design).T, axis=0)
    for k, factor, error in zip(present, factors, errors, strict=True):
        count = int(np.sum(np.abs(table[:, 1 + k]) > 0.05))
        unknown[TERMS[k]] = SignEvidence(float(factor), float(error), count)
    return unknown


def _pairs(group: Sequence[Atoms], constrained: bool) -> Iterator[tuple[tuple[int, int], list[float]]]:
    """Numbers of each frame and its nearest ones, with energy difference and the three terms of work (eV)."""
    done = set()
    cells = np.array([atoms.cell.array for atoms in group])
    scaled = np.array([atoms.cell.scaled_positions(atoms.positions) for atoms in group])
    moments = np.array([atoms.get_initial_magnetic_moments() for atoms in group])
    for k in range(len(group)):
        step = scaled - scaled[k]
        step -= np.round(step)
        shift = np.einsum("gna,gab->gnb", step, 0.5 * (cells + cells[k]))
        stretch = np.abs(np.linalg.solve(cells[k], cells) - np.eye(3)).max((1, 2))
        distance = stretch / MAX_STRAIN + np.abs(shift).max((1, 2)) / MAX_SHIFT
        distance += np.abs(moments - moments[k]).max((1, 2)) / MAX_TURN
        distance[k] = np.inf
        for other in np.argsort(distance)[:NEIGHBOURS]:
            pair = (min(k, int(other)), max(k, int(other)))
            if pair in done or not distance[other] < 1.5:
                continue
            done.add(pair)
            work = _work(group[k], group[other], shift[other], moments[other] - moments[k], constrained)
            if work is not None:
                yield (k, int(other)), work


def _work(a: Atoms, b: Atoms, shift: np.ndarray, turn: np.ndarray, constrained: bool) -> list[float] | None:
    """Difference of energies and work by forces, stress and magnetic forces from a to b; None where one is unknown."""
    deformation = np.linalg.solve(a.cell.array, b.cell.array)
    values, axes = np.linalg.eigh(deformation @ deformation.T)
    strain = (axes * (0.5 * np.log(values))) @ axes.T
    rotation = np.linalg.solve((axes * np.sqrt(values)) @ axes.T, deformation)
    if np.abs(rotation - np.eye(3)).max() > 0.01:
        return None
    by_forces = by_stress = by_moments = 0.0
    if np.abs(shift).max() > 1e-6:
        if not (_holds(a, "forces") and _holds(b, "forces")):
            return None
        by_forces = -0.5 * float(((a.calc.results["forces"] + b.calc.results["forces"]) * shift).sum())
    if np.abs(strain).max() > 1e-7:
        if not (_holds(a, "stress") and _holds(b, "stress")):
            return None
        mean = 0.5 * (a.calc.results["stress"] * a.get_volume() + b.calc.results["stress"] * b.get_volume())
        by_stress = float((voigt_6_to_full_3x3_stress(mean) * strain).sum())
    turned = np.abs(turn).max(1) > 1e-7
    if constrained and turned.any():
        at_a, at_b = _magnetic_forces_toward(a, turn), _magnetic_forces_toward(b, turn)
        if at_a is None or at_b is None:
            return None
        by_moments = -float((0.5 * (at_a + at_b) * turn)[turned].sum())
    row = [b.calc.results["energy"] - a.calc.results["energy"], by_forces, by_stress, by_moments]
    return row if np.isfinite(row).all() else None


def _magnetic_forces_toward(atoms: Atoms, turn: np.ndarray) -> np.ndarray | None:
    """Magnetic forces (N, 3), eV/µB, for changes `turn` of the moments; None where they are not known that way."""
    if "magnetic_forces" in atoms.arrays:
        return atoms.arrays["magnetic_forces"]
    if "magnetic_forces_parallel" not in atoms.arrays:
        return None
    moments = atoms.get_initial_magnetic_moments()
    size = np.linalg.norm(moments, axis=1, keepdims=True)
    axis = np.divide(moments, size, out=np.zeros_like(moments), where=size > 0)
    across = turn - (turn * axis).sum(1, keepdims=True) * axis
    if np.abs(across).max() > 1e-6:
        return None
    return atoms.arrays["magnetic_forces_parallel"][:, None] * axis
