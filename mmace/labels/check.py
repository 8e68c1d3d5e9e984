"""Checks of a recipe: labels made again, finer meshes, and analytic derivatives against differences of energies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.units import GPa

from ..errors import LabelError
from .abinit import kpoint_mesh
from .gate import MOMENT_TOLERANCE, judge
from .plan import Job, Plan, make_job
from .run import read_result
from .sampling import anisotropy_mesh, fixed_mesh

ZERO = 1e-4  # meV/Å, GPa, meV/µB: below what label files hold
STEPS = {"force": 0.01, "stress": 0.005, "magnetic": 0.05}
COMPARED = {
    "energy": ("energy", 1e-3, "meV/atom"),
    "forces": ("forces", 1e-3, "meV/Å"),
    "stress": ("stress", GPa, "GPa"),
    "magnetic_forces": ("magnetic forces", 1e-3, "meV/µB"),
    "anisotropy": ("anisotropy", 1e-6, "µeV/atom"),
}


def reproduction_plan(plan: Plan, references: Sequence[Atoms], names: Sequence[str]) -> Plan:
    """Plan that labels frames of a file again, at the moments they reached, with a plan's recipe.

    Raises
    ------
    LabelError
        A frame is not in the file, or its job with its mesh not in the plan, or the recipe is one of anisotropy groups,
        whose frames are made together.
    """
    if plan.recipe.engine != "abinit":
        raise LabelError(f"the plan {plan.name!r} makes groups of directions; only single frames can be made again")
    frames = {atoms.info["name"]: atoms for atoms in references}
    missing = [name for name in names if name not in frames]
    if missing:
        raise LabelError(f"the reference labels hold no frame named {missing[0]!r}")
    settings = {job.name: job.settings for job in plan.jobs}
    strange = [name for name in names if name not in settings]
    if strange:
        raise LabelError(f"the plan {plan.name!r} has no job {strange[0]!r}, whose mesh is needed; give its own plan")
    jobs = [
        make_job(name, atoms.info["parent"], "train", atoms, atoms.arrays["initial_magmoms"], **settings[name])
        for name, atoms in ((name, frames[name]) for name in names)
    ]
    return Plan(f"{plan.name}-reproduction", plan.recipe, tuple(jobs))


def compare_reproduction(plan: Plan, work: str | Path, references: Sequence[Atoms]) -> list[tuple[str, ...]]:
    """Largest differences between reproduced and reference labels, of what both hold.

    Returns
    -------
    list of tuple of str
        Name, energy (meV/atom), forces (meV/Å), stress (GPa), magnetic forces (meV/µB).
    """
    frames = {atoms.info["name"]: atoms for atoms in references}
    rows: list[tuple[str, ...]] = []
    for job in plan.jobs:
        result = _good_result(plan, job, work)
        atoms = frames[job.name]
        known = {**atoms.arrays, **atoms.calc.results}
        row = [job.name, f"{1e3 * (result['energy'] - atoms.get_potential_energy()) / len(atoms):.4f}"]
        for key, digits in (("forces", 3), ("stress", 4), ("magnetic_forces", 3)):
            again, before = _both(result, known, key)
            largest = np.abs(again - before).max(initial=-1.0) / COMPARED[key][1]
            row.append(f"{largest:.{digits}f}" if largest >= 0 else "")
        rows.append(tuple(row))
    return rows


def refined_plan(plan: Plan, names: Sequence[str], spacing: float) -> Plan:
    """Plan that runs jobs of a plan again on a finer mesh.

    Parameters
    ----------
    plan : Plan
    names : sequence of str
        Jobs of the plan.
    spacing : float
        Largest distance between neighbours in the mesh, 1/Å.

    Returns
    -------
    Plan
        The jobs keep their names, so that `compare_labels` finds the pairs.

    Raises
    ------
    LabelError
        Names the job that the plan does not have, or whose mesh would be no finer.
    """
    mesh_of = fixed_mesh if plan.recipe.engine == "abinit" else anisotropy_mesh
    jobs = []
    for name in names:
        job = _find_job(plan, name)
        settings, cell = plan.settings(job), np.array(job.cell)
        fine, before = mesh_of(cell, spacing), settings.get("kmesh") or kpoint_mesh(cell, settings["k_spacing"])
        if np.prod(fine["kmesh"]) <= np.prod(before):
            raise LabelError(f"job {name!r} of {plan.name!r} has as fine a mesh already; make the spacing smaller")
        jobs.append(replace(job, settings={**job.settings, **fine}))
    return Plan(f"{plan.name}-refined", plan.recipe, tuple(jobs))


def compare_labels(first: Sequence[Atoms], second: Sequence[Atoms]) -> list[tuple[str, ...]]:
    """Differences between labels of the same names in two files, as root mean squares and largest values.

    Energies by frame, in anisotropy groups about the mean of the group; forces, stress and magnetic forces by
    component, where both files know them. A component that is zero in both is left out: symmetry makes it so, and its
    difference says nothing about the settings. The mean of the energies' differences is taken out of their root mean
    square (it shifts no energy difference) and stated by itself.

    Returns
    -------
    list of tuple of str
        Quantity, how many values count of how many, RMS, largest, unit.

    Raises
    ------
    LabelError
        The files have no frame in common, or one that differs in its structure or moments.
    """
    others = {atoms.info["name"]: atoms for atoms in second}
    pairs = [(atoms, others[atoms.info["name"]]) for atoms in first if atoms.info["name"] in others]
    if not pairs:
        raise LabelError("the two label files have no frame of the same name")
    found: dict[str, list[np.ndarray]] = {key: [np.zeros((2, 0))] for key in COMPARED}
    groups: dict[str, list[list[float]]] = {}
    for one, other in pairs:
        if not _alike(one, other):
            raise LabelError(f"the frames {one.info['name']!r} of the two label files differ in structure or moments")
        energies = [atoms.get_potential_energy() / len(atoms) for atoms in (one, other)]
        if "anisotropy_group" in one.info:
            groups.setdefault(one.info["anisotropy_group"], []).append(energies)
            continue
        found["energy"].append(np.array(energies)[:, None])
        for key in ("forces", "stress"):
            found[key].append(_both(one.calc.results, other.calc.results, key))
        found["magnetic_forces"].append(_both(one.arrays, other.arrays, "magnetic_forces"))
    found["anisotropy"] += [np.array(group).T - np.mean(group, axis=0)[:, None] for group in groups.values()]
    rows: list[tuple[str, ...]] = []
    for key, (name, factor, unit) in COMPARED.items():
        first_values, second_values = np.concatenate(found[key], axis=1) / factor
        counts = np.maximum(np.abs(first_values), np.abs(second_values)) > ZERO
        values = (first_values - second_values)[counts]
        if not len(values):
            continue
        if key == "energy":
            mean = float(values.mean())
            rows.append(("energy, mean", str(len(values)), f"{mean:.3f}", "", unit))
            values = values - mean
        number = f"{len(values)} of {len(counts)}"
        rows.append((name, number, f"{np.sqrt(np.mean(values**2)):.3f}", f"{np.abs(values).max():.3f}", unit))
    return rows


def _both(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    """Components (2, F) of a quantity that both hold and know."""
    if key not in one or key not in other:
        return np.zeros((2, 0))
    values = np.array([np.ravel(one[key]), np.ravel(other[key])], dtype=float)
    return values[:, np.isfinite(values).all(axis=0)]


def difference_plan(plan: Plan, name: str) -> Plan:
    """Plan of the displaced, strained and turned copies that central differences around one job need.

    Along: z of the last atom's position, zz strain, the length of the first carrier's moment, and (where the moments
    are non-collinear) its angle towards another moment. All copies keep the job's mesh.

    Parameters
    ----------
    plan : Plan
    name : str
        Job of the plan.
    """
    job = _find_job(plan, name)
    if plan.recipe.engine != "abinit":
        raise LabelError(f"the plan {plan.name!r} has no forces to check; differences are for ABINIT plans")
    settings = plan.settings(job)
    mesh = {"kmesh": list(settings.get("kmesh") or kpoint_mesh(np.array(job.cell), settings["k_spacing"]))}
    jobs = [replace(job, name="base", settings={**job.settings, **mesh})]
    for sign, tag in ((-1, "minus"), (1, "plus")):
        moved, strained = job.atoms(), job.atoms()
        moved.positions[-1, 2] += sign * STEPS["force"]
        strained.set_cell(strained.cell.array @ np.diag([1, 1, 1 + sign * STEPS["stress"]]), scale_atoms=True)
        moments = np.array(job.moments)
        jobs.append(make_job(f"force-{tag}", job.parent, job.split, moved, moments, **mesh))
        jobs.append(make_job(f"stress-{tag}", job.parent, job.split, strained, moments, **mesh))
        for kind, direction in _moment_directions(job):
            turned = moments.copy()
            turned[_first_carrier(job)] += sign * STEPS["magnetic"] * direction
            jobs.append(make_job(f"{kind}-{tag}", job.parent, job.split, job.atoms(), turned, **mesh))
    return Plan(f"{plan.name}-differences-{name}", plan.recipe, tuple(jobs))


def compare_differences(plan: Plan, work: str | Path) -> list[tuple[str, ...]]:
    """Label against central difference of energies, for every derivative of a `difference_plan`.

    Returns
    -------
    list of tuple of str
        Derivative, label, difference, unit.
    """
    jobs = {job.name: job for job in plan.jobs}
    base = jobs["base"]
    result = _good_result(plan, base, work)

    def slope(kind: str, step: float) -> float:
        plus, minus = (_good_result(plan, jobs[f"{kind}-{tag}"], work)["energy"] for tag in ("plus", "minus"))
        return (plus - minus) / (2 * step)

    volume = base.atoms().get_volume()
    rows = [
        ("force z", result["forces"][-1][2], -slope("force", STEPS["force"]), "eV/Å"),
        ("stress zz", result["stress"][2], slope("stress", STEPS["stress"]) / volume, "eV/Å³"),
    ]
    for kind, direction in _moment_directions(base):
        label = float(np.dot(result["magnetic_forces"][_first_carrier(base)], direction))
        rows.append((f"magnetic force, {kind}", label, -slope(kind, STEPS["magnetic"]), "eV/µB"))
    return [(what, f"{label:.5f}", f"{difference:.5f}", unit) for what, label, difference, unit in rows]


def _find_job(plan: Plan, name: str) -> Job:
    job = next((job for job in plan.jobs if job.name == name), None)
    if job is None:
        raise LabelError(f"the plan {plan.name!r} has no job {name!r}")
    return job


def _alike(one: Atoms, other: Atoms) -> bool:
    """Whether two frames have the same structure and moments; in anisotropy groups, moments along the same direction.

    The lengths of self-consistent moments follow the settings that are compared.
    """
    moments = [atoms.arrays["initial_magmoms"] for atoms in (one, other)]
    if "anisotropy_group" in one.info:
        moments = [m / np.linalg.norm(m) for m in moments]
    return (
        list(one.numbers) == list(other.numbers)
        and bool(np.allclose(one.cell.array, other.cell.array, atol=1e-6))
        and bool(np.allclose(one.positions, other.positions, atol=1e-6))
        and bool(np.allclose(moments[0], moments[1], atol=2 * MOMENT_TOLERANCE))
    )


def _first_carrier(job: Job) -> int:
    return int(np.argmax(np.linalg.norm(job.moments, axis=1) > 0))


def _moment_directions(job: Job) -> list[tuple[str, np.ndarray]]:
    """Unit vectors along the first carrier's moment, and across it towards the most different; none without moments."""
    moments = np.array(job.moments)
    if not moments.any():
        return []
    axis = moments[_first_carrier(job)] / np.linalg.norm(moments[_first_carrier(job)])
    across = moments - np.outer(moments @ axis, axis)
    largest = across[np.argmax(np.linalg.norm(across, axis=1))]
    directions = [("parallel", axis)]
    if np.linalg.norm(largest) > 1e-6:
        directions.append(("transverse", largest / np.linalg.norm(largest)))
    return directions


def _good_result(plan: Plan, job: Job, work: str | Path) -> dict:
    result = read_result(plan, job, work)
    if result is None:
        raise LabelError(f"job {job.name!r} of {plan.name!r} has no result; run it again")
    reason = judge(job, result, plan.recipe.carriers)
    if reason is not None:
        raise LabelError(f"job {job.name!r} of {plan.name!r} was rejected by the quality gate ({reason})")
    return result
