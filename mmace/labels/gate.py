"""Quality gate: which results become labels, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list
from spglib import get_symmetry_dataset

from ..errors import LabelError
from .plan import Job, Plan
from .run import job_key

MOMENT_TOLERANCE = 2e-3
FAILED = "failed"
COLLAPSED_MOMENT = 0.1
SPREAD_TOLERANCE = 2e-2
DUPLICATE_FORCE = 0.01  # eV/Å; the invariants are of second order in a displacement, forces of first
DUPLICATE_TOLERANCE = 1e-5
DUPLICATE_ENERGY = 1e-4
_RANGE = 5.0
_ELEMENT_WEIGHT = 0.1  # more than the tolerance of a fingerprint, less than what the structure weighs


def judge(job: Job, result: dict[str, Any], carriers: Sequence[str]) -> str | None:
    """Reason to reject a result, or None.

    Parameters
    ----------
    job : Job
    result : dict
        As `run.read_result` gives it.
    carriers : sequence of str

    Returns
    -------
    str or None
        `failed`, `scf` (did not converge), `not finite` (energy, forces or stress), `moment` (off its target by more
        than 2e-3 µB), `asymmetry` (equivalent atoms differ in their magnetic forces by more than 20 meV/µB: the SCF
        settled beside the symmetry), `collapsed` (an anisotropy job whose moments vanished), or None.
    """
    if "failed" in result:
        return FAILED
    if not result["converged"]:
        return "scf"
    if not all(np.isfinite(result[key]).all() for key in ("energy", "forces", "stress") if key in result):
        return "not finite"
    held = np.isin(job.symbols, carriers)
    if "soc_energies" in result:
        if np.abs(np.array(result["moments"])[held]).max() < COLLAPSED_MOMENT:
            return "collapsed"
    elif "magnetic_forces" in result and held.any():
        reached = np.array(result["moments"])[held]
        if np.abs(reached - np.array(job.moments)[held]).max() > MOMENT_TOLERANCE:
            return "moment"
        if gradient_spread(job, result, carriers) > SPREAD_TOLERANCE:
            return "asymmetry"
    return None


def gradient_spread(job: Job, result: dict[str, Any], carriers: Sequence[str]) -> float:
    """Largest difference of the magnetic forces of carriers that a symmetry of a collinear job maps on each other.

    Returns
    -------
    float
        eV/µB; zero for non-collinear jobs, whose symmetries are not looked for.
    """
    gradients = np.array(result["magnetic_forces"])[:, 2]
    return float(max((np.ptp(gradients[members]) for members in _equivalent(job, carriers)), default=0.0))


def _equivalent(job: Job, carriers: Sequence[str]) -> list[np.ndarray]:
    """Masks of the carriers that symmetries of a collinear job map on each other; none for a non-collinear one."""
    moments = np.array(job.moments)
    if np.any(moments[:, :2]):
        return []
    atoms = job.atoms()
    kinds = [1000 * number + round(100 * moment) for number, moment in zip(atoms.numbers, moments[:, 2], strict=True)]
    classes = get_symmetry_dataset((atoms.cell.array, atoms.get_scaled_positions(), kinds), 1e-4).equivalent_atoms
    held = np.isin(job.symbols, carriers)
    return [(classes == k) & held for k in np.unique(classes[held])]


def job_frames(plan: Plan, job: Job, result: dict[str, Any]) -> list[Atoms]:
    """Frames of one accepted result: one, or one for each direction of an anisotropy job.

    Non-collinear frames carry no forces and no stress: ABINIT's are wrong there (docs/labels.md). The setting
    `stress` leaves out a stress whose cut-off is too low. Equivalent atoms get the mean of their magnetic forces: the
    spheres are integrated on a grid, on whose points atoms lie or do not.
    """
    info = {"parent": job.parent, "code": result["code"], "recipe": plan.recipe.name, "job_key": job_key(plan, job)}
    held = np.isin(job.symbols, plan.recipe.carriers)
    if plan.recipe.engine == "abinit":
        settings = plan.settings(job)
        atoms = job.atoms()
        moments = np.zeros((len(atoms), 3))
        gradients = np.full((len(atoms), 3), np.nan)
        if held.any():
            moments[held] = np.array(result["moments"])[held]
        if "magnetic_forces" in result:
            gradients[held] = np.array(result["magnetic_forces"])[held]
            for members in _equivalent(job, plan.recipe.carriers):
                gradients[members] = gradients[members].mean(0)
        results = {"energy": result["energy"]}
        if settings["noncollinear"]:
            _keep_parallel(atoms, moments, gradients)
        else:
            results["forces"] = np.array(result["forces"])
            if settings.get("stress", True):
                results["stress"] = np.array(result["stress"])
        return [_frame(atoms, moments, gradients, results, info | {"name": job.name, "soc": 0})]
    frames = []
    directions = np.array(plan.settings(job)["directions"], dtype=float)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    for k, (direction, energy) in enumerate(zip(directions, result["soc_energies"], strict=True)):
        moments = np.outer(np.where(held, result["moments"], 0.0), direction)
        extra = {"name": f"{job.name}-d{k}", "soc": 1, "anisotropy_group": job.name}
        frames.append(_frame(job.atoms(), moments, None, {"energy": energy}, info | extra))
    return frames


def fingerprint(atoms: Atoms) -> np.ndarray:
    """Smooth invariants of a structure with its moments, per atom; equal for equivalent descriptions of one state.

    Atomic numbers, and per atom: sums over pairs of elements within 5 Å of powers of the distance, with and without
    m_i·m_j, of |m|², and the principal values of the sum of r⊗r, which tell a stretched cubic crystal from a compressed
    one.

    Parameters
    ----------
    atoms : Atoms
        `initial_magmoms` (N, 3), µB.

    Returns
    -------
    array, shape=(F,)
        Unitless (Å and µB left out); F depends on the elements.
    """
    return np.concatenate(_invariants(atoms))


def _invariants(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Those of the structure alone, and those that the moments enter."""
    moments = atoms.arrays["initial_magmoms"]
    first, second, distance, vector = neighbor_list("ijdD", atoms, _RANGE)
    products = np.einsum("ec,ec->e", moments[first], moments[second])
    window = (1 - (distance / _RANGE) ** 2) ** 3
    numbers = atoms.numbers
    elements = np.unique(numbers)
    structure: list[float] = []
    magnetism: list[float] = []
    for i, z in enumerate(elements):
        structure.append(float(np.sum(numbers == z)))
        magnetism.append(float(np.sum(moments[numbers == z] ** 2)))
        for other in elements[i:]:
            pair = ((numbers[first] == z) & (numbers[second] == other)) | (
                (numbers[first] == other) & (numbers[second] == z)
            )
            for power in range(4):
                weight = window[pair] * (2.5 / distance[pair]) ** power
                structure.append(float(weight.sum()))
                magnetism.append(float((weight * products[pair]).sum()))
    extent = np.linalg.eigvalsh(np.einsum("e,ei,ej->ij", window * (2.5 / distance) ** 6, vector, vector))
    per_atom = np.array([*structure, *extent]) / len(atoms)
    return np.concatenate([_ELEMENT_WEIGHT * elements, per_atom]), np.array(magnetism) / len(atoms)


@dataclass(frozen=True)
class State:
    """What tells whether two labels are equivalent.

    Attributes
    ----------
    structure : array, shape=(F,)
        Invariants of the crystal without its moments. Its positions are exact, so that they tell displacements apart
        which differ by less than the moments' tolerance lets pass.
    magnetism : array, shape=(G,)
        Invariants that the moments enter.
    energy : float
        eV/atom.
    soc : bool
    largest_force : float
        eV/Å; NaN where forces are not known.
    """

    structure: np.ndarray
    magnetism: np.ndarray
    energy: float
    soc: bool
    largest_force: float

    @classmethod
    def of(cls, atoms: Atoms) -> State:
        """State of a label."""
        structure, magnetism = _invariants(atoms)
        forces = atoms.calc.results.get("forces", np.full((1, 3), np.nan))
        largest = float(np.linalg.norm(forces, axis=1).max())
        energy = atoms.get_potential_energy() / len(atoms)
        return cls(structure, magnetism, energy, bool(atoms.info["soc"]), largest)

    def equals(self, other: State) -> bool:
        """Whether structures agree to 1e-5, moments to twice the gate's tolerance, energies to 0.1 meV/atom.

        Where both have forces, the largest ones agree to 0.01 eV/Å too.
        """
        exact = DUPLICATE_TOLERANCE
        return (
            self.soc == other.soc
            and self.structure.shape == other.structure.shape
            and abs(self.energy - other.energy) < DUPLICATE_ENERGY
            and not abs(self.largest_force - other.largest_force) > DUPLICATE_FORCE
            and bool(np.allclose(self.structure, other.structure, rtol=exact, atol=exact))
            and bool(np.allclose(self.magnetism, other.magnetism, rtol=exact, atol=2 * MOMENT_TOLERANCE))
        )


def job_name(atoms: Atoms) -> str:
    """Name of the job that a label came from; all directions of an anisotropy job share it."""
    return str(atoms.info.get("anisotropy_group", atoms.info["name"]))


def one_of_each_job(frames: Iterable[Atoms]) -> list[Atoms]:
    """Labels with one direction of each anisotropy job, whose directions are one state; names of others may repeat."""
    first: dict[object, Atoms] = {}
    for atoms in frames:
        first.setdefault(atoms.info.get("anisotropy_group", id(atoms)), atoms)
    return list(first.values())


def find_duplicates(frames: Sequence[Atoms]) -> list[tuple[int, int]]:
    """Pairs of labels of different jobs that are equivalent, by their places in the sequence."""
    first = {id(atoms) for atoms in one_of_each_job(frames)}
    states = [(State.of(atoms), place) for place, atoms in enumerate(frames) if id(atoms) in first]
    states.sort(key=lambda entry: entry[0].energy)
    pairs = []
    for k, (state, place) in enumerate(states):
        for other, there in states[k + 1 :]:
            if other.energy - state.energy >= DUPLICATE_ENERGY:
                break
            if state.equals(other):
                pairs.append((min(place, there), max(place, there)))
    return sorted(pairs)


def _keep_parallel(atoms: Atoms, moments: np.ndarray, gradients: np.ndarray) -> None:
    """Store −dE/d|m| by atom, and blank the Cartesian components that the transverse gradients enter.

    Their accuracy is not that of the rest (see docs/labels.md); a component along a Cartesian axis stays where the
    moment lies along that axis.
    """
    lengths = np.linalg.norm(moments, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        directions = moments / lengths[:, None]
    atoms.arrays["magnetic_forces_parallel"] = np.einsum("ic,ic->i", gradients, directions)
    gradients[~(np.abs(directions) > 1 - 1e-6)] = np.nan


def _frame(
    atoms: Atoms,
    moments: np.ndarray,
    gradients: np.ndarray | None,
    results: dict[str, Any],
    info: dict[str, Any],
) -> Atoms:
    if moments.shape != (len(atoms), 3):
        raise LabelError(f"label {info['name']!r}: moments of shape {moments.shape}")
    atoms.set_initial_magnetic_moments(moments)
    if gradients is not None:
        atoms.arrays["magnetic_forces"] = gradients
    atoms.info.update(info)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms
