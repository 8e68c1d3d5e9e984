"""Run the tasks of a system: datasets on disk, numbers in memory. No comparison is made here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import xarray as xr
from ase import Atoms
from mmace_props.base import load_property, write_dataset
from mmace_props.errors import PropertyError
from mmace_props.journal import Journal, fingerprint
from mmace_props.protocol import SpinCalculator, bare, moments_of

from .errors import BenchmarkError
from .systems import Number, System, Task, read_json

GPA = 160.21766208  # GPa in eV/Å³
NEAR = 1e-6
MakeCalculator = Callable[[bool, str], SpinCalculator]
"""Called with spin-orbit coupling and the mode of the moments."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What a task came to.

    Parameters
    ----------
    numbers : values of each quantity, one for each committee member.
    failed : why there are none, one sentence; empty where there are.
    """

    numbers: Mapping[str, Sequence[float]]
    failed: str = ""


def run_system(
    system: System, make: MakeCalculator, work: Path, quick: bool, progress: Progress
) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Run all tasks, or the quick ones; what an earlier run of the same calculator finished is read from `work`.

    Parameters
    ----------
    system : what to run.
    make : makes calculators.
    work : folder for datasets and finished parts; made if missing.
    quick : leave out what takes long.
    progress : called with stage, parts done, and their total.

    Returns
    -------
    outcomes : by task.
    provenance : of the calculator.
    """
    folder = work / system.name
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [task for task in system.tasks if task.quick or not quick]
    about = make(False, "fixed").provenance()
    outcomes: dict[str, Outcome] = {}
    for count, task in enumerate(tasks):
        progress(f"{system.name} {task.name}", count, len(tasks))
        if task.property == "difference":
            outcomes[task.name] = _difference(task, outcomes)
        else:
            outcomes[task.name] = _run(system, task, make, folder, about)
    progress(system.name, len(tasks), len(tasks))
    return outcomes, about


def _run(system: System, task: Task, make: MakeCalculator, folder: Path, about: Mapping[str, Any]) -> Outcome:
    calculator = make(task.soc, task.moments)
    try:
        if task.property == "labels":
            return Outcome(compare_labels(system, task, calculator))
        dataset = dataset_of(system, task, calculator, folder, about)
        return Outcome({name: values(dataset, number) for name, number in task.numbers.items()})
    except BenchmarkError:
        raise
    except PropertyError as error:
        return Outcome({}, " ".join(str(error).split()))


def _difference(task: Task, outcomes: Mapping[str, Outcome]) -> Outcome:
    """Quantities of earlier tasks, the ``first`` less the ``second``, member by member."""
    known = {name: members for outcome in outcomes.values() for name, members in outcome.numbers.items()}
    pair = [known.get(str(task.options[key])) for key in ("first", "second")]
    if pair[0] is None or pair[1] is None:
        return Outcome({}, f"{task.options['first']} or {task.options['second']} was not computed")
    gap = np.array(pair[0]) - np.array(pair[1])
    return Outcome({name: list(number.scale * gap) for name, number in task.numbers.items()})


def dataset_of(
    system: System, task: Task, calculator: SpinCalculator, folder: Path, about: Mapping[str, Any]
) -> xr.Dataset:
    """Dataset of a task, from the folder if the same calculator made it there before."""
    atoms = system.crystals[task.crystal]
    key = fingerprint(
        {
            "structure": atoms,
            "property": task.property,
            "options": {k: list(v) if isinstance(v, tuple) else v for k, v in task.options.items()},
            "soc": task.soc,
            "moments": task.moments,
            "calculator": {k: str(v) for k, v in about.items()},
        }
    )
    path = folder / f"{task.name}.nc"
    if path.exists():
        with xr.open_dataset(path) as found:
            if found.attrs.get("benchmark_key") == key:
                return found.load()
    journal = Journal.beside(path)
    dataset = load_property(task.property)(**task.options).run(atoms, calculator, journal=journal)
    dataset.attrs["benchmark_key"] = key
    write_dataset(dataset, path)
    journal.clear()
    return dataset


def values(dataset: xr.Dataset, number: Number) -> list[float]:
    """Values of one number, one for each committee member.

    Raises
    ------
    BenchmarkError : the dataset has no such variable or place.
    """
    name = f"{number.variable}_member" if f"{number.variable}_member" in dataset else number.variable
    if name not in dataset:
        raise BenchmarkError(f"the dataset of {dataset.attrs.get('property')} has no variable '{number.variable}'")
    found = _at(dataset, name, number.where)
    if number.minus is not None:
        found = found - _at(dataset, name, {**number.where, **number.minus})
    return [float(x) for x in number.scale * np.atleast_1d(found)]


def _at(dataset: xr.Dataset, name: str, where: Mapping[str, Any]) -> np.ndarray:
    picked = dataset[name]
    for dimension, label in where.items():
        if dimension == "q":
            distance = np.linalg.norm(dataset["q"].values - np.array(label, dtype=float), axis=1)
            if distance.min() > NEAR:
                raise BenchmarkError(f"the wave vector {list(label)} is not on the path of {name}; mend the task")
            picked = picked.isel(wave=int(distance.argmin()))
        elif isinstance(label, str) or dimension in ("cone",):
            if label not in dataset[dimension].values:
                raise BenchmarkError(f"{name} has no {dimension} '{label}'; mend the task")
            picked = picked.sel({dimension: label})
        else:
            picked = picked.isel({dimension: int(label)})
    rest = [d for d in picked.dims if d != "member"]
    if rest:
        raise BenchmarkError(f"{name} is no number but has the dimension {rest[0]}; say where it is read")
    return np.asarray(picked.values, dtype=float)


def compare_labels(system: System, task: Task, calculator: SpinCalculator) -> dict[str, list[float]]:
    """Root mean square errors against the DFT labels of test parents, for each committee member.

    Energies count after the least-squares constant of each element is taken off, since every code has its own zero.
    For ``kind`` ``anisotropy`` they count about the mean of each group of directions.
    """
    frames = label_frames(system, task)
    errors: dict[str, list[float]] = {name: [] for name in task.numbers}
    for member in calculator.members:
        parts = anisotropy_errors(frames, member) if task.options["kind"] == "anisotropy" else errors_of(frames, member)
        for name, number in task.numbers.items():
            errors[name].append(number.scale * parts[number.variable])
    return errors


def label_frames(system: System, task: Task) -> list[Atoms]:
    """Frames of the parents that the splits keep for testing.

    Raises
    ------
    BenchmarkError : there are none.
    """
    keep = set(read_json(system.folder / "splits.json")["test"])
    files = task.options["files"]
    paths = [system.folder / "data" / name for name in ((files,) if isinstance(files, str) else files)]
    frames = [a for path in paths if path.exists() for a in ase.io.read(path, ":") if a.info["parent"] in keep]
    if not frames:
        raise BenchmarkError(f"no labels of test parents are in {', '.join(str(p) for p in paths)}")
    return frames


def predictions(frames: Sequence[Atoms], calculator: SpinCalculator) -> list[dict[str, np.ndarray]]:
    """Energy, forces, stress and magnetic forces of each frame at its own moments."""
    found = []
    for frame in frames:
        atoms, m = bare(frame), moments_of(frame)
        found.append(
            {
                "energy": np.asarray(calculator.energy(atoms, m)),
                "forces": calculator.forces(atoms, m),
                "stress": calculator.stress(atoms, m),
                "magnetic_forces": calculator.magnetic_forces(atoms, m),
            }
        )
    return found


def errors_of(frames: Sequence[Atoms], calculator: SpinCalculator) -> dict[str, float]:
    """Root mean square errors of energies (eV/atom) and first derivatives (eV/Å, GPa, eV/µB)."""
    found = predictions(frames, calculator)
    elements = sorted({s for a in frames for s in a.symbols})
    shares = np.array([[np.mean(a.symbols == z) for z in elements] for a in frames])
    difference = np.array(
        [(p["energy"] - a.get_potential_energy()) / len(a) for p, a in zip(found, frames, strict=True)]
    )
    shift = np.linalg.lstsq(shares, difference, rcond=None)[0]
    result = {"energy": _rms(difference - shares @ shift)}
    for name, unit in (("forces", 1.0), ("stress", GPA)):
        result[name] = unit * _rms(
            np.concatenate(
                [
                    (p[name] - a.calc.results[name]).ravel()
                    for p, a in zip(found, frames, strict=True)
                    if name in a.calc.results
                ]
            )
        )
    result["magnetic_forces"] = _rms(
        np.concatenate(
            [(p["magnetic_forces"] - a.arrays["magnetic_forces"]).ravel() for p, a in zip(found, frames, strict=True)]
        )
    )
    return result


def anisotropy_errors(frames: Sequence[Atoms], calculator: SpinCalculator) -> dict[str, float]:
    """Root mean square error of E(n) about its mean, eV/atom, and the size of the labels."""
    groups: dict[str, list[Atoms]] = {}
    for atoms in frames:
        groups.setdefault(atoms.info["anisotropy_group"], []).append(atoms)
    errors, sizes = [], []
    for group in groups.values():
        moments = np.stack([moments_of(a) for a in group])
        energies = calculator.evaluate_spins(bare(group[0]), moments, False)["energy"] / len(group[0])
        labels = np.array([a.get_potential_energy() for a in group]) / len(group[0])
        errors.append((energies - energies.mean()) - (labels - labels.mean()))
        sizes.append(labels - labels.mean())
    return {"anisotropy": _rms(np.concatenate(errors)), "size": _rms(np.concatenate(sizes))}


def _rms(x: np.ndarray) -> float:
    known = x[np.isfinite(x)]
    return float(np.sqrt(np.mean(known**2)))
