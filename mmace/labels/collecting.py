"""From finished jobs to label files, and from label files back to the jobs that they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from ..errors import LabelError
from .abinit import kpoint_mesh
from .gate import FAILED, MOMENT_TOLERANCE, State, job_frames, job_name, judge, one_of_each_job
from .plan import Job, Plan
from .run import job_key, read_result

SAME_ENERGY = 1e-6  # eV: two labels of one result, read from files


@dataclass
class Report:
    """What the gate let through and what it did not.

    Attributes
    ----------
    accepted, kept, unfinished : int
        Frames of the plan, frames of the output that are of other plans, jobs without a result yet.
    rejected : dict reason → names of jobs
    rejected_keys : dict key of a job → reason
    stayed : list of str
        Jobs that were run again without an answer, so that their earlier label stays.
    """

    accepted: int = 0
    kept: int = 0
    unfinished: int = 0
    rejected: dict[str, list[str]] = field(default_factory=dict)
    rejected_keys: dict[str, str] = field(default_factory=dict)
    stayed: list[str] = field(default_factory=list)


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
        One frame, or one for each direction of an anisotropy job. A frame answers the job of its name where parent,
        recipe and info `job_key` agree. Frames without a key, of older files, answer by structure and moments, but no
        job whose mesh is finer than the recipe's: they do not say which mesh they are from.
    """
    by_name: dict[str, list[Atoms]] = {}
    for atoms in frames:
        by_name.setdefault(job_name(atoms), []).append(atoms)
    found = {}
    for job in plan.jobs:
        count = len(plan.settings(job).get("directions", [None]))
        labels = {atoms.info["name"]: atoms for atoms in by_name.get(job.name, []) if _answers(plan, job, atoms)}
        if len(labels) == count:
            found[job.name] = list(labels.values())
    return found


def earlier_rejections(plan: Plan, report: Mapping[str, Any]) -> dict[str, str]:
    """Reasons for which an earlier run rejected jobs of a plan.

    Parameters
    ----------
    plan : Plan
    report : mapping
        Content of a report of `mmace label collect`. One without `rejected_keys`, of an older version, holds names
        alone, which say something about the jobs of its own plan only.

    Returns
    -------
    dict name of a job → reason
    """
    if "rejected_keys" in report:
        keys = {job_key(plan, job): job.name for job in plan.jobs}
        return {keys[key]: reason for key, reason in report["rejected_keys"].items() if key in keys}
    if report.get("plan") != plan.name:
        return {}
    reasons = {name: reason for reason, names in report["rejected"].items() for name in names}
    return {job.name: reasons[job.name] for job in plan.jobs if job.name in reasons}


def collect(
    plan: Plan,
    work: str | Path,
    earlier: Sequence[Atoms] = (),
    rejected: Mapping[str, str] | None = None,
    beside: Sequence[Atoms] = (),
) -> tuple[list[Atoms], Report]:
    """Labels of all finished jobs of a plan that pass the gate, after those that the output holds of other plans.

    Parameters
    ----------
    plan : Plan
    work : path
        Where the plan was run.
    earlier : sequence of Atoms
        Labels of the output: those of the plan stand for jobs without a result in `work`, the others are kept.
    rejected : mapping name of a job → reason, optional
        What an earlier run rejected (`earlier_rejections`), of jobs without a result in `work`.
    beside : sequence of Atoms
        Labels of other files. A new label that equals one of them under another name is a duplicate.

    Returns
    -------
    frames : list of Atoms
        In the label contract: those that were kept, then those of the plan in its order.
    report : Report

    Raises
    ------
    LabelError
        The output holds another label with the name of an accepted one: names the job.
    """
    report, before = Report(), earlier_labels(plan, earlier)
    own = {id(atoms) for labels in before.values() for atoms in labels}
    others = [atoms for atoms in earlier if id(atoms) not in own]
    elsewhere = [(job_name(atoms), State.of(atoms)) for atoms in one_of_each_job(beside)]
    known = [(job_name(atoms), State.of(atoms)) for atoms in one_of_each_job(others)]
    frames: list[Atoms] = []
    for job in plan.jobs:
        result = read_result(plan, job, work)
        if result is not None:
            reason = judge(job, result, plan.recipe.carriers)
            if reason in (FAILED, "scf") and job.name in before:
                report.stayed.append(job.name)
                result, reason = None, None
        elif job.name in before:
            reason = None
        elif job.name in (rejected or {}):
            reason = (rejected or {})[job.name]
        else:
            report.unfinished += 1
            continue
        if reason is None:
            labels = before[job.name] if result is None else job_frames(plan, job, result)
            others = _without_repeats(others, job, labels)
            state = State.of(labels[0])
            rivals = known if job.name in before else [*known, *elsewhere]
            if any(state.equals(other) for name, other in rivals if name != job.name):
                reason = "duplicate"
            else:
                known.append((job.name, state))
                frames += labels
        if reason is not None:
            report.rejected.setdefault(reason, []).append(job.name)
            report.rejected_keys[job_key(plan, job)] = reason
    report.accepted, report.kept = len(frames), len(others)
    return [*others, *frames], report


def _answers(plan: Plan, job: Job, atoms: Atoms) -> bool:
    if atoms.info["recipe"] != plan.recipe.name or atoms.info["parent"] != job.parent:
        return False
    if "job_key" in atoms.info:
        return bool(atoms.info["job_key"] == job_key(plan, job))
    asked = job.atoms()
    return (
        tuple(atoms.symbols) == job.symbols
        and bool(np.allclose(atoms.cell.array, asked.cell.array, atol=1e-6))
        and bool(np.allclose(atoms.positions, asked.positions, atol=1e-6))
        and _has_moments(plan, job, atoms.arrays["initial_magmoms"])
        and not _is_finer(plan, job)
    )


def _has_moments(plan: Plan, job: Job, reached: np.ndarray) -> bool:
    """Whether moments are the targets, or lie along one of the directions; free moments may be any."""
    settings = plan.settings(job)
    if plan.recipe.engine == "abinit":
        targets = np.array(job.moments)
        return not settings.get("constrained", True) or bool(np.allclose(reached, targets, atol=MOMENT_TOLERANCE))
    directions = np.array(settings["directions"], dtype=float)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    longest = reached[np.argmax(np.linalg.norm(reached, axis=1))]
    return bool(np.abs(directions @ longest).max() > (1 - 1e-4) * np.linalg.norm(longest))


def _is_finer(plan: Plan, job: Job) -> bool:
    """Whether a job's mesh was set to a finer one than its recipe's."""
    mesh, spacing = job.settings.get("kmesh"), plan.recipe.settings.get("k_spacing")
    if mesh is None or spacing is None:
        return False
    return bool(np.prod(mesh) > np.prod(kpoint_mesh(np.array(job.cell), spacing)))


def _without_repeats(others: list[Atoms], job: Job, labels: Sequence[Atoms]) -> list[Atoms]:
    """The frames of the output less older copies of a job's labels; another label of the same name is an error."""
    energies = {atoms.info["name"]: atoms.get_potential_energy() for atoms in labels}
    for atoms in others:
        if job_name(atoms) == job.name and (
            abs(energies.get(atoms.info["name"], np.inf) - atoms.get_potential_energy()) > SAME_ENERGY
        ):
            raise LabelError(
                f"the output holds a label {atoms.info['name']!r} of another structure, moments or settings than the "
                f"plan's job {job.name!r}: collect into another file, or take that label out of this one"
            )
    return [atoms for atoms in others if job_name(atoms) != job.name]
