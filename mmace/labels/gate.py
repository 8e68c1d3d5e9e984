"""Quality gate: which results become labels, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list
from spglib import get_symmetry_dataset

from ..errors import LabelError
from .plan import Job, Plan, Recipe
from .run import read_result

MOMENT_TOLERANCE = 2e-3
COLLAPSED_MOMENT = 0.1
SPREAD_TOLERANCE = 2e-2
DUPLICATE_TOLERANCE = 1e-5
DUPLICATE_ENERGY = 1e-4
_RANGE = 5.0


@dataclass
class Report:
    """What the gate let through and what it did not.

    Attributes
    ----------
    accepted, unfinished : int
        Frames written, jobs without a result yet.
    rejected : dict reason → names of jobs
    """

    accepted: int = 0
    unfinished: int = 0
    rejected: dict[str, list[str]] = field(default_factory=dict)


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
        `failed`, `scf` (did not converge), `moment` (off its target by more than 2e-3 µB), `asymmetry`
        (equivalent atoms differ in their magnetic forces by more than 20 meV/µB: the SCF settled beside the symmetry),
        `collapsed` (an anisotropy job whose moments vanished), or None.
    """
    if "failed" in result:
        return "failed"
    if not result["converged"]:
        return "scf"
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


def earlier_labels(plan: Plan, frames: Sequence[Atoms]) -> dict[str, list[Atoms]]:
    """Labels of an earlier run that still answer the jobs of a plan, so that label files are enough to go on from.

    Parameters
    ----------
    plan : Plan
    frames : sequence of Atoms
        From label files.

    Returns
    -------
    dict name of a job → list of Atoms
        One frame, or one for each direction of an anisotropy job. A frame whose recipe, structure or moments are not
        those of the job of its name is left out.
    """
    by_name: dict[str, list[Atoms]] = {}
    for atoms in frames:
        if atoms.info["recipe"] == plan.recipe.name:
            by_name.setdefault(atoms.info.get("anisotropy_group", atoms.info["name"]), []).append(atoms)
    found = {}
    for job in plan.jobs:
        labels = by_name.get(job.name, [])
        directions = plan.settings(job).get("directions", [None])
        if len(labels) == len(directions) and all(_answers(job, atoms, plan.recipe) for atoms in labels):
            found[job.name] = labels
    return found


def _answers(job: Job, atoms: Atoms, recipe: Recipe) -> bool:
    asked = job.atoms()
    if tuple(atoms.symbols) != job.symbols or atoms.info["parent"] != job.parent:
        return False
    if not np.allclose(atoms.cell.array, asked.cell.array, atol=1e-6):
        return False
    if not np.allclose(atoms.positions, asked.positions, atol=1e-6):
        return False
    if recipe.engine != "abinit" or not recipe.settings.get("constrained", True):
        return True
    reached, targets = atoms.arrays["initial_magmoms"], np.array(job.moments)
    return bool(np.allclose(reached, targets, atol=MOMENT_TOLERANCE))


def collect(
    plan: Plan, work: str | Path, earlier: Sequence[Atoms] = (), rejected: Mapping[str, Sequence[str]] | None = None
) -> tuple[list[Atoms], Report]:
    """Labels of all finished jobs of a plan that pass the gate.

    Parameters
    ----------
    plan : Plan
    work : path
        Where the plan was run.
    earlier : sequence of Atoms
        Labels that an earlier run collected: they stand for jobs without a result in `work`.
    rejected : mapping reason → names of jobs, optional
        What an earlier run rejected, of jobs without a result in `work`.

    Returns
    -------
    frames : list of Atoms
        In the label contract, in the order of the plan.
    report : Report
    """
    frames: list[Atoms] = []
    report = Report()
    known: list[tuple[np.ndarray, float]] = []
    before = earlier_labels(plan, earlier)
    refused = {name: reason for reason, names in (rejected or {}).items() for name in names}
    for job in plan.jobs:
        result = read_result(plan, job, work)
        if result is not None:
            reason = judge(job, result, plan.recipe.carriers)
        elif job.name in before or job.name in refused:
            reason = None if job.name in before else refused[job.name]
        else:
            report.unfinished += 1
            continue
        if reason is None:
            labels = before[job.name] if result is None else job_frames(plan, job, result)
            print_of = fingerprint(labels[0])
            energy = labels[0].get_potential_energy() / len(labels[0])
            if any(_same(print_of, energy, *other) for other in known):
                reason = "duplicate"
            else:
                known.append((print_of, energy))
                frames += labels
        if reason is not None:
            report.rejected.setdefault(reason, []).append(job.name)
    report.accepted = len(frames)
    return frames, report


def job_frames(plan: Plan, job: Job, result: dict[str, Any]) -> list[Atoms]:
    """Frames of one accepted result: one, or one for each direction of an anisotropy job.

    Non-collinear frames carry no forces and no stress: ABINIT's are wrong there (docs/labels.md). The setting
    `stress` leaves out a stress whose cut-off is too low. Equivalent atoms get the mean of their magnetic forces: the
    spheres are integrated on a grid, on whose points atoms lie or do not.
    """
    info = {"parent": job.parent, "code": result["code"], "recipe": plan.recipe.name}
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

    Sums over pairs of elements within 5 Å of powers of the distance, with and without m_i·m_j, of |m|², and the
    principal values of the sum of r⊗r, which tell a stretched cubic crystal from a compressed one.

    Parameters
    ----------
    atoms : Atoms
        `initial_magmoms` (N, 3), µB.

    Returns
    -------
    array, shape=(F,)
        Unitless (Å and µB left out); F depends on the elements.
    """
    moments = atoms.arrays["initial_magmoms"]
    first, second, distance, vector = neighbor_list("ijdD", atoms, _RANGE)
    products = np.einsum("ec,ec->e", moments[first], moments[second])
    window = (1 - (distance / _RANGE) ** 2) ** 3
    numbers = atoms.numbers
    shape = np.einsum("e,ei,ej->ij", window * (2.5 / distance) ** 6, vector, vector)
    values: list[float] = []
    elements = np.unique(numbers)
    for i, z in enumerate(elements):
        values += [float(z), float(np.sum(numbers == z)), float(np.sum(moments[numbers == z] ** 2))]
        for other in elements[i:]:
            pair = ((numbers[first] == z) & (numbers[second] == other)) | (
                (numbers[first] == other) & (numbers[second] == z)
            )
            for power in range(4):
                weight = window[pair] * (2.5 / distance[pair]) ** power
                values += [float(weight.sum()), float((weight * products[pair]).sum())]
    return np.array([*values, *np.linalg.eigvalsh(shape)]) / len(atoms)


def _same(a: np.ndarray, energy_a: float, b: np.ndarray, energy_b: float) -> bool:
    return (
        a.shape == b.shape
        and abs(energy_a - energy_b) < DUPLICATE_ENERGY
        and bool(np.allclose(a, b, rtol=DUPLICATE_TOLERANCE, atol=2 * MOMENT_TOLERANCE))
    )


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
