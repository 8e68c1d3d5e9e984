"""Run the tasks of a system: datasets on disk, numbers in memory. No comparison is made here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import ase.io
import numpy as np
import xarray as xr
from ase import Atoms
from mmace_props import sources
from mmace_props.base import LOST, load_property, write_dataset
from mmace_props.eos import EosOptions, EquationOfState
from mmace_props.errors import PropertyError
from mmace_props.journal import Journal, fingerprint
from mmace_props.protocol import MomentMode, SpinCalculator, bare, moments_of, with_moments
from scipy.optimize import linprog

from .errors import BenchmarkError, BeyondVolumesError
from .systems import SUMS, Number, System, Task, terms_of

GPA = 160.21766208  # GPa in eV/Å³
NEAR = 1e-6
VANISHED = 0.01
"""A moment below this, in µB, has vanished."""
SAME_ZEROS = "MMACECalculator"
"""The calculator that was fitted to the labels' own total energies."""
WIDE = 0.3
"""Half-width of a window of volumes that leaves no point of a reference's curve out of the fit."""
DERIVATIVES = ("forces", "stress", "magnetic_forces")
MEDIAN = "_median"
"""Ending of the median absolute error of what the label errors give the root mean square of."""
MakeCalculator = Callable[[bool, str], SpinCalculator]
"""Called with spin-orbit coupling and the mode of the moments."""
Progress = Callable[[str, int, int], None]
Pair = tuple[np.ndarray, np.ndarray]
"""Labels, and what was predicted."""
UNITS = {"energy": "eV/atom", "forces": "eV/Å", "stress": "GPa", "magnetic_forces": "eV/µB", "anisotropy": "eV/atom"}


@dataclass(frozen=True)
class Outcome:
    """What a task came to.

    Parameters
    ----------
    numbers : finite values of each quantity by committee member.
    committee : how many members were asked.
    failed : why there are none, one sentence; empty where there are.
    lost : why members have none.
    notes : what the property says about its result.
    dataset : of the property, where it has one.
    """

    numbers: Mapping[str, Mapping[int, float]]
    committee: int = 1
    failed: str = ""
    lost: str = ""
    notes: Sequence[str] = ()
    dataset: xr.Dataset | None = field(default=None, repr=False)


def identity(factory: str, model: str) -> dict[str, str]:
    """Return what decides a number besides structure and options: calculator, suite, and the code of the benchmark."""
    return {**sources.identity(factory, model), "benchmark": sources.digest(Path(__file__))}


def run_system(
    system: System, make: MakeCalculator, work: Path, quick: bool, progress: Progress, origin: Mapping[str, str]
) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Run all tasks, or the quick ones; what an earlier run of the same calculator finished is read from `work`.

    Parameters
    ----------
    system : what to run.
    make : makes calculators.
    work : folder for datasets and finished parts; made if missing.
    quick : leave out what takes long.
    progress : called with stage, parts done, and their total.
    origin : `identity` of the calculator and the code.

    Returns
    -------
    outcomes : by task.
    provenance : of the calculator.
    """
    folder = work / system.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(
            f"the folder '{folder}' cannot be made ({error.strerror}); name another folder as --work"
        ) from error
    tasks = [task for task in system.tasks if task.quick or not quick]
    about = make(False, "fixed").provenance()
    key = {**origin, **{f"calculator_{k}": str(v) for k, v in about.items()}}
    outcomes: dict[str, Outcome] = {}
    for count, task in enumerate(tasks):
        progress(f"{system.name} {task.name}", count, len(tasks))
        if task.property in SUMS:
            outcomes[task.name] = _sum(task, outcomes)
        else:
            outcomes[task.name] = _run(system, task, make, folder, key)
    progress(system.name, len(tasks), len(tasks))
    return outcomes, about


def _run(system: System, task: Task, make: MakeCalculator, folder: Path, origin: Mapping[str, str]) -> Outcome:
    calculator = make(task.soc, task.moments)
    committee = len(calculator.members)
    try:
        if task.property == "labels":
            return compare_labels(system, task, calculator)
        dataset = dataset_of(system, task, calculator, folder, origin)
    except BenchmarkError:
        raise
    except PropertyError as error:
        return Outcome({}, committee, " ".join(str(error).split()))
    notes = [str(dataset.attrs["note"])] if "note" in dataset.attrs else []
    found: dict[str, dict[int, float]] = {}
    for name, number in task.numbers.items():
        try:
            found[name] = _finite(values(dataset, number))
        except BeyondVolumesError as error:
            found[name] = {}
            notes.append(f"{name} is not computed: {error}")
    return Outcome(found, committee, "", str(dataset.attrs.get(LOST, "")), notes, dataset)


def _finite(members: Mapping[int, float]) -> dict[int, float]:
    return {member: value for member, value in members.items() if np.isfinite(value)}


def _sum(task: Task, outcomes: Mapping[str, Outcome]) -> Outcome:
    """Quantities of earlier tasks added up over the members that have all of them."""
    terms = terms_of(task)
    sources = {name: outcome for outcome in outcomes.values() for name in outcome.numbers if name in terms}
    missing = [name for name in terms if name not in sources]
    if missing:
        return Outcome({}, failed=f"{' or '.join(missing)} was not computed")
    known = {name: sources[name].numbers[name] for name in terms}
    shared = sorted(set.intersection(*(set(members) for members in known.values())))
    total = {k: sum(factor * known[name][k] for name, factor in terms.items()) for k in shared}
    found = {name: {k: number.scale * x for k, x in total.items()} for name, number in task.numbers.items()}
    lost = "; ".join(dict.fromkeys(s.lost for s in sources.values() if s.lost))
    return Outcome(found, max(s.committee for s in sources.values()), "", lost)


def state_energies(
    atoms: Atoms, states: Sequence[Sequence[Any]], calculator: SpinCalculator, mode: MomentMode = "fixed"
) -> xr.Dataset:
    """Energies of magnetic states at fixed positions and cell.

    Parameters
    ----------
    atoms : the structure.
    states : moments of each state in µB, (N,) along z or (N, 3).
    calculator : whose members each give an energy.
    mode : how the moments of states that have any are relaxed; the energy is NaN where one vanishes or turns over,
        since that is another state.
    """
    start = np.array([_vectors(state) for state in states])
    members = list(calculator.members)
    energy = np.zeros((len(members), len(start)))
    reached = np.zeros((len(members), *start.shape))
    for k, member in enumerate(members):
        for j, m in enumerate(start):
            moving = mode != "fixed" and np.abs(m).max() > NEAR
            reached[k, j] = member.relax_moments([with_moments(bare(atoms), m)], mode)[0] if moving else m
            along = np.einsum("nx,nx->n", m, reached[k, j]) / np.fmax(np.linalg.norm(m, axis=1), NEAR)
            kept = bool((along[np.linalg.norm(m, axis=1) > NEAR] > VANISHED).all()) or not moving
            energy[k, j] = member.energy(bare(atoms), reached[k, j]) / len(atoms) if kept else np.nan
    lost = [_lost(j, states[j], np.flatnonzero(np.isnan(energy[:, j]))) for j in range(len(start))]
    lengths = np.linalg.norm(reached, axis=3)
    first = lengths[0].argmax(axis=1)
    axis = start[np.arange(len(start)), first]
    overlap = np.einsum("snx,sx->sn", start, axis)
    scale = np.linalg.norm(start, axis=2) * np.linalg.norm(axis, axis=1)[:, None]
    cosine = np.where(scale > NEAR, overlap / np.fmax(scale, NEAR), 1.0).min(axis=1)
    unit = {"units": "eV/atom", "long_name": "energy"}
    site = {"units": "µB", "long_name": "|m|"}
    return xr.Dataset(
        {
            "energy": ("state", energy.mean(axis=0), unit),
            "energy_member": (("member", "state"), energy, unit),
            "site_length": (("state", "site"), lengths.mean(axis=0), site),
            "site_length_member": (("member", "state", "site"), lengths, site),
            "length": ("state", lengths.mean(axis=0).max(axis=1), site),
            "angle": (
                "state",
                np.rad2deg(np.arccos(np.clip(cosine, -1, 1))),
                {"units": "degree", "long_name": "largest angle between a moment and the longest"},
            ),
        },
        attrs={
            "property": "states",
            "formula": atoms.get_chemical_formula(),
            LOST: "; ".join(sentence for sentence in lost if sentence),
        },
    )


def _lost(number: int, state: Sequence[Any], members: np.ndarray) -> str:
    """Say which members have no energy of a state; nothing where all have."""
    if not len(members):
        return ""
    which = f"member{'s' if len(members) > 1 else ''} {', '.join(str(k + 1) for k in members)}"
    return f"{which}: a moment of state {number} {[*state]} vanishes or turns over when its length is relaxed"


def _mode(task: Task) -> MomentMode:
    if task.moments not in get_args(MomentMode):
        raise BenchmarkError(f"the task '{task.name}' relaxes moments by '{task.moments}'; mend it")
    return cast(MomentMode, task.moments)


def _vectors(state: Sequence[Any]) -> np.ndarray:
    m = np.array(state, dtype=float)
    return np.column_stack([0 * m, 0 * m, m]) if m.ndim == 1 else m


def dataset_of(
    system: System, task: Task, calculator: SpinCalculator, folder: Path, origin: Mapping[str, str]
) -> xr.Dataset:
    """Dataset of a task, from the folder if the same calculator and code made it there before."""
    atoms = system.crystals[task.crystal]
    key = fingerprint(
        {
            "structure": atoms,
            "property": task.property,
            "options": {k: list(v) if isinstance(v, tuple) else v for k, v in task.options.items()},
            "soc": task.soc,
            "moments": task.moments,
            "fit": {state: list(volumes) for state, volumes in task.fit.items()},
            "origin": dict(origin),
        }
    )
    path = folder / f"{task.name}.nc"
    if path.exists():
        with xr.open_dataset(path) as found:
            if found.attrs.get("benchmark_key") == key:
                return found.load()
    journal = Journal(folder / f".{task.name}.{key[:16]}.parts")
    if task.property == "states":
        dataset = state_energies(atoms, task.options["moments"], calculator, _mode(task))
    else:
        dataset = load_property(task.property)(**task.options).run(atoms, calculator, journal=journal)
    for state, volumes in task.fit.items():
        dataset = refitted(dataset, state, curve_at(atoms, calculator, state, volumes))
    dataset.attrs["benchmark_key"] = key
    write_dataset(dataset, path)
    journal.clear()
    return dataset


class CurveAt(EquationOfState):
    """An equation of state at the volumes it is given."""

    def prepare(self, atoms: Atoms, members: Sequence[SpinCalculator], progress: Callable[..., None]) -> "CurveAt":
        """Lay no grid."""
        return self


def curve_at(atoms: Atoms, calculator: SpinCalculator, state: str, volumes: Sequence[float]) -> xr.Dataset:
    """Equation of state of one magnetic state through volumes in Å³/atom, all of which enter the fit."""
    options = EosOptions(states=(state,), volume_range=WIDE)
    return CurveAt(options, len(atoms) * np.array(sorted(volumes))).run(atoms, calculator)


def refitted(dataset: xr.Dataset, state: str, curve: xr.Dataset) -> xr.Dataset:
    """Return an equation of state whose Birch-Murnaghan fit of one state is that of another curve.

    What a fit says depends on its volumes, so that the model's goes through those of the reference.
    """
    place = {"state": state, "fit": "birch_murnaghan"}
    changed = {}
    for name in (f"{n}{end}" for n in ("E0", "V0", "B0", "B0_prime") for end in ("", "_std", "_member")):
        if name not in dataset:
            continue
        item, new = dataset[name].copy(deep=True), curve[name].sel(place)
        item.loc[place] = new.reindex(member=dataset["member"]) if "member" in new.dims else new
        changed[name] = item
    lost = [d.attrs[LOST] for d in (dataset, curve) if d.attrs.get(LOST)]
    found = dataset.assign(changed)
    return found.assign_attrs({LOST: "; ".join(dict.fromkeys(lost))}) if lost else found


def values(dataset: xr.Dataset, number: Number) -> dict[int, float]:
    """Values of one number by committee member.

    Raises
    ------
    BenchmarkError : the dataset has no such variable or place.
    BeyondVolumesError : the place is a volume that the calculator's curve does not reach.
    """
    name = f"{number.variable}_member" if f"{number.variable}_member" in dataset else number.variable
    if name not in dataset:
        raise BenchmarkError(f"the dataset of {dataset.attrs.get('property')} has no variable '{number.variable}'")
    found = _at(dataset, name, number.where)
    if number.minus is not None:
        found = found - _at(dataset, name, {**number.where, **number.minus})
    numbers = number.scale * np.atleast_1d(found)
    labels = dataset["member"].values if "member" in dataset.coords else np.arange(len(numbers))
    return {int(member): float(x) for member, x in zip(labels, numbers, strict=True)}


def _at(dataset: xr.Dataset, name: str, where: Mapping[str, Any]) -> np.ndarray:
    picked = dataset[name]
    for dimension, label in where.items():
        if dimension == "q":
            distance = np.linalg.norm(dataset["q"].values - np.array(label, dtype=float), axis=1)
            if distance.min() > NEAR:
                raise BenchmarkError(f"the wave vector {list(label)} is not on the path of {name}; mend the task")
            picked = picked.isel(wave=int(distance.argmin()))
        elif dimension == "volume" and isinstance(label, float):
            known = picked["volume"]
            if not float(known.min()) <= label <= float(known.max()):
                ends = f"{float(known.min()):.2f} and {float(known.max()):.2f}"
                raise BeyondVolumesError(f"{name} ends at {ends} Å³/atom, {label:.2f} is asked")
            picked = picked.interp(volume=label)
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


def compare_labels(system: System, task: Task, calculator: SpinCalculator) -> Outcome:
    """Errors against the DFT labels of test parents: root mean squares and medians for each committee member.

    For ``kind`` ``anisotropy`` energies count about the mean of each group of directions.
    """
    frames = label_frames(system, task)
    pairs_of = anisotropy_pairs if task.options["kind"] == "anisotropy" else label_pairs
    found = [pairs_of(frames, member) for member in calculator.members]
    errors = [_errors({name: joined(pairs) for name, pairs in member.items()}) for member in found]
    numbers = {name: {k: n.scale * e[n.variable] for k, e in enumerate(errors)} for name, n in task.numbers.items()}
    dataset = parity([{name: joined(pairs) for name, pairs in member.items()} for member in found])
    kind, key = ("groups", "anisotropy_group") if task.options["kind"] == "anisotropy" else ("parents", "parent")
    owners = [str(a.info[key]) for a in frames]
    owners = list(dict.fromkeys(owners)) if kind == "groups" else owners
    notes = [shares(name, kind, owners, [member[name] for member in found]) for name in found[0]]
    return Outcome(numbers, len(found), notes=notes, dataset=dataset)


def shares(name: str, kind: str, owners: Sequence[str], members: Sequence[Sequence[Pair]]) -> str:
    """Say which owners hold the squared error: as few as hold half of it, at most three.

    Parameters
    ----------
    name, kind : of the quantity, and of its owners.
    owners : of each pair.
    members : labels and predictions of each committee member.
    """
    squares: dict[str, float] = {}
    for pairs in members:
        for owner, (label, predicted) in zip(owners, pairs, strict=True):
            squares[owner] = squares.get(owner, 0.0) + float(np.nansum((predicted - label) ** 2))
    total = sum(squares.values()) or 1.0
    ranked = sorted(squares, key=lambda p: -squares[p])
    count = 1 + int(np.searchsorted(np.cumsum([squares[p] for p in ranked]) / total, 0.5))
    most = ", ".join(f"{p} ({100 * squares[p] / total:.0f} %)" for p in ranked[: min(count, 3)])
    return f"squared error of {name.replace('_', ' ')} over {len(squares)} {kind}, the most of it in {most}"


def parity(members: Sequence[Mapping[str, Pair]]) -> xr.Dataset:
    """Labels beside the mean of what the members predict, each quantity along a dimension of its own."""
    data = {}
    for name in members[0]:
        labels, units = members[0][name][0], {"units": UNITS[name]}
        mean = np.mean([pairs[name][1] for pairs in members], axis=0)
        data[f"{name}_label"] = (f"{name}_component", labels, {**units, "long_name": f"{name} of the labels"})
        data[f"{name}_model"] = (f"{name}_component", mean, {**units, "long_name": f"{name} of the model"})
    return xr.Dataset(data, attrs={"property": "labels"})


def label_frames(system: System, task: Task) -> list[Atoms]:
    """Frames of the parents that the splits keep for testing.

    Raises
    ------
    BenchmarkError : there are none, or no splits.
    """
    keep = system.test_parents
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


def label_pairs(frames: Sequence[Atoms], calculator: SpinCalculator) -> dict[str, list[Pair]]:
    """Labels and predictions of each frame: energy (eV/atom), forces (eV/Å), stress (GPa), magnetic forces (eV/µB).

    Energies of both are without the labels' own constants of the elements, for the pictures' sake. A calculator with
    zeros of its own has its difference to them taken off, as `robust_shift` has it.
    """
    found = predictions(frames, calculator)
    elements = sorted({s for a in frames for s in a.symbols})
    fractions = np.array([[np.mean(a.symbols == z) for z in elements] for a in frames])
    labels = np.array([a.get_potential_energy() / len(a) for a in frames])
    energies = np.array([p["energy"] / len(a) for p, a in zip(found, frames, strict=True)])
    zeros = fractions @ np.linalg.lstsq(fractions, labels, rcond=None)[0]
    if calculator.provenance()["calculator"] != SAME_ZEROS:
        energies = energies - fractions @ robust_shift(fractions, energies - labels)
    pairs: dict[str, list[Pair]] = {
        "energy": [(np.array([e]), np.array([p])) for e, p in zip(labels - zeros, energies - zeros, strict=True)]
    }
    empty = np.zeros(0)
    for name, unit in (("forces", 1.0), ("stress", GPA)):
        pairs[name] = [
            (unit * a.calc.results[name].ravel(), unit * p[name].ravel()) if name in a.calc.results else (empty, empty)
            for p, a in zip(found, frames, strict=True)
        ]
    pairs["magnetic_forces"] = [
        (a.arrays["magnetic_forces"].ravel(), p["magnetic_forces"].ravel()) for p, a in zip(found, frames, strict=True)
    ]
    return pairs


def robust_shift(fractions: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Constant of each element with the least sum of absolute deviations: a few bad frames do not move it.

    Parameters
    ----------
    fractions : of each element in each frame, shape (n, z).
    errors : predicted less label, eV/atom, shape (n,).
    """
    n, z = fractions.shape
    slack = np.eye(n)
    upper = np.block([[fractions, -slack], [-fractions, -slack]])
    found = linprog(
        np.concatenate([np.zeros(z), np.ones(n)]),
        A_ub=upper,
        b_ub=np.concatenate([errors, -errors]),
        bounds=[(None, None)] * z + [(0, None)] * n,
    )
    return np.asarray(found.x[:z])


def joined(pairs: Sequence[Pair]) -> Pair:
    """All labels and all predictions, frame after frame."""
    return np.concatenate([label for label, _ in pairs]), np.concatenate([predicted for _, predicted in pairs])


def errors_of(frames: Sequence[Atoms], calculator: SpinCalculator) -> dict[str, float]:
    """Root mean square and median errors of energies (eV/atom) and first derivatives (eV/Å, GPa, eV/µB)."""
    return _errors({name: joined(pairs) for name, pairs in label_pairs(frames, calculator).items()})


def anisotropy_pairs(frames: Sequence[Atoms], calculator: SpinCalculator) -> dict[str, list[Pair]]:
    """Labels and predictions of E(n) about the mean, for each group of directions, eV/atom."""
    groups: dict[str, list[Atoms]] = {}
    for atoms in frames:
        groups.setdefault(atoms.info["anisotropy_group"], []).append(atoms)
    pairs = []
    for group in groups.values():
        moments = np.stack([moments_of(a) for a in group])
        energies = calculator.evaluate_spins(bare(group[0]), moments, False)["energy"] / len(group[0])
        labels = np.array([a.get_potential_energy() for a in group]) / len(group[0])
        pairs.append((labels - labels.mean(), energies - energies.mean()))
    return {"anisotropy": pairs}


def anisotropy_errors(frames: Sequence[Atoms], calculator: SpinCalculator) -> dict[str, float]:
    """Root mean square and median error of E(n) about its mean, eV/atom, and the size of the labels."""
    pair = joined(anisotropy_pairs(frames, calculator)["anisotropy"])
    return {**_errors({"anisotropy": pair}), "size": _rms(pair[0])}


def _errors(pairs: Mapping[str, Pair]) -> dict[str, float]:
    """Root mean square of each quantity under its name, and its median absolute error."""
    medians = {f"{name}{MEDIAN}": _median(name, *pair) for name, pair in pairs.items()}
    return {name: _rms(predicted - label) for name, (label, predicted) in pairs.items()} | medians


def _median(name: str, label: np.ndarray, predicted: np.ndarray) -> float:
    """Median absolute error; components of derivatives that are zero in both, by symmetry, say nothing."""
    there = np.isfinite(label)
    if name in DERIVATIVES:
        there &= np.fmax(np.abs(label), np.abs(predicted)) > NEAR
    return float(np.median(np.abs(predicted - label)[there])) if there.any() else 0.0


def _rms(x: np.ndarray) -> float:
    known = x[np.isfinite(x)]
    return float(np.sqrt(np.mean(known**2)))
