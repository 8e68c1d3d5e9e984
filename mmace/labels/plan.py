"""Plans: what is to be labelled, with which recipe, and which parents are kept for validation and testing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from ..data.importing import as_name
from ..data.splits import PARTS, Splits
from ..errors import LabelError
from ..structures import as_vectors
from .files import write_text

ENGINES = ("abinit", "gpaw-soc")
ABINIT_SETTINGS = ("noncollinear", "ecut", "pawecutdg", "ecutsm", "occopt", "tsmear", "tolvrs", "nstep", "valence")
"""What a job of ABINIT cannot do without; one that holds carriers needs spheres, and a constraint its strength."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Recipe:
    """Settings shared by every job of a plan.

    Attributes
    ----------
    name : str
        Goes into the provenance of every frame.
    engine : str
        `abinit` or `gpaw-soc`.
    carriers : tuple of str
        Elements whose moments are constrained (ABINIT) or reported (GPAW); the others are left free.
    settings : mapping
        What the engine reads; see `abinit.write_input` and `gpaw_soc.compute`.
    """

    name: str
    engine: str
    carriers: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One configuration to label.

    Attributes
    ----------
    name : str
        Unique in its plan; also the name of its folder.
    parent : str
        The structure that splits go by: frames that differ only in their moments share it.
    split : str
        `train`, `valid` or `test`; the same for all jobs of a parent.
    symbols : tuple of str, shape=(N,)
    cell : nested tuple of float, shape=(3, 3)
        Å.
    scaled_positions : nested tuple of float, shape=(N, 3)
    moments : nested tuple of float, shape=(N, 3)
        Target moments of the carriers, µB; zero for the other elements.
    settings : mapping
        Overrides of the recipe's settings.
    """

    name: str
    parent: str
    split: str
    symbols: tuple[str, ...]
    cell: tuple[tuple[float, ...], ...]
    scaled_positions: tuple[tuple[float, ...], ...]
    moments: tuple[tuple[float, ...], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def atoms(self) -> Atoms:
        """Structure with its target moments as `initial_magmoms` (N, 3), µB."""
        return Atoms(
            list(self.symbols),
            cell=np.array(self.cell),
            scaled_positions=np.array(self.scaled_positions),
            pbc=True,
            magmoms=np.array(self.moments),
        )


@dataclass(frozen=True)
class Plan:
    """Jobs in the order they are run, so that every prefix is a sensible data set."""

    name: str
    recipe: Recipe
    jobs: tuple[Job, ...]

    def settings(self, job: Job) -> dict[str, Any]:
        """Settings of one job: the recipe's, with the job's own on top."""
        return {**self.recipe.settings, **job.settings}

    def parents(self, split: str) -> list[str]:
        """Names of the parents of one split, in the order of the plan."""
        return list(dict.fromkeys(job.parent for job in self.jobs if job.split == split))


def make_job(name: str, parent: str, split: str, atoms: Atoms, moments: np.ndarray, **settings: Any) -> Job:
    """Job from a structure and its moments, (N,) along z or (N, 3), in µB."""
    moments = as_vectors(moments)

    def rows(array: np.ndarray) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(float(x) for x in row + 0.0) for row in np.round(array, 8))

    return Job(
        name,
        parent,
        split,
        tuple(atoms.get_chemical_symbols()),
        rows(atoms.cell.array),
        rows(atoms.get_scaled_positions(wrap=False)),
        rows(moments),
        settings,
    )


def check_plan(plan: Plan) -> None:
    """Check a plan for what would make it unusable.

    Raises
    ------
    LabelError
        Names the job and the fault.
    """
    if plan.recipe.engine not in ENGINES:
        raise LabelError(f"plan {plan.name!r}: unknown engine {plan.recipe.engine!r}; use one of {', '.join(ENGINES)}")
    strange = [symbol for symbol in plan.recipe.carriers if symbol not in atomic_numbers]
    if isinstance(plan.recipe.carriers, str) or strange:
        raise LabelError(
            f"plan {plan.name!r}: the recipe's carriers are {plan.recipe.carriers!r}; give a list of elements"
        )
    seen: set[str] = set()
    split_of: dict[str, str] = {}
    for job in plan.jobs:
        where = f"plan {plan.name!r}, job {job.name!r}"
        check_name(job.name, where)
        _check_text(job.parent, f"{where}, its parent")
        if job.name in seen:
            raise LabelError(f"{where}: the name occurs twice; give every job its own")
        seen.add(job.name)
        if job.split not in PARTS:
            raise LabelError(f"{where}: split is {job.split!r}; use one of {', '.join(PARTS)}")
        if split_of.setdefault(job.parent, job.split) != job.split:
            raise LabelError(f"{where}: parent {job.parent!r} is in two splits; a parent belongs to one")
        unknown = sorted(set(job.symbols) - set(atomic_numbers))
        if unknown:
            raise LabelError(f"{where}: unknown element {unknown[0]!r}")
        n = len(job.symbols)
        for key, shape in (("cell", (3, 3)), ("scaled_positions", (n, 3)), ("moments", (n, 3))):
            array = np.array(getattr(job, key), dtype=float)
            if array.shape != shape or not np.isfinite(array).all():
                raise LabelError(f"{where}: {key} must be {shape[0]}×{shape[1]} finite numbers")
        if any(np.any(m) and s not in plan.recipe.carriers for s, m in zip(job.symbols, job.moments, strict=True)):
            raise LabelError(f"{where}: an element that is no carrier has a target moment; set it to zero")
        if plan.recipe.engine == "abinit":
            _check_abinit(job, plan.settings(job), plan.recipe.carriers, where)


def check_name(name: str, where: str) -> None:
    """Check that a name can stand in file names and is read back from a label file as it is.

    Raises
    ------
    LabelError
        Says at `where` what is wrong with it.
    """
    if not _NAME.fullmatch(name):
        raise LabelError(f"{where}: a name may hold letters, digits and _ . + - only, unlike {name!r}")
    _check_text(name, where)


def _check_text(name: str, where: str) -> None:
    if as_name(name, "") != name:
        raise LabelError(f"{where}: the name {name!r} would be read back as a number or truth value; add a letter")


def _check_abinit(job: Job, settings: Mapping[str, Any], carriers: Sequence[str], where: str) -> None:
    """Raise LabelError where ABINIT's input would lack a setting, or moments do not go with it."""
    needed, by_element = list(ABINIT_SETTINGS), ["valence"]
    if set(job.symbols) & set(carriers):
        needed += ["ratsm", "ratsph"] + ["magcon_lambda"] * bool(settings.get("constrained", True))
        by_element += ["ratsph"]
    missing = [key for key in needed if key not in settings]
    if not missing and "kmesh" not in settings and "k_spacing" not in settings:
        missing = ["k_spacing"]
    if missing:
        raise LabelError(f"{where}: the recipe has no {missing[0]}; add it to its settings")
    if not settings.get("k_spacing", 1.0) > 0:
        raise LabelError(f"{where}: the recipe's k_spacing is {settings['k_spacing']}; it must be above 0")
    for key in by_element:
        without = [symbol for symbol in job.symbols if symbol not in settings[key]]
        if without:
            raise LabelError(f"{where}: the recipe's {key} has no entry for {without[0]}; add one")
    if not settings["noncollinear"] and np.any(np.array(job.moments)[:, :2]):
        raise LabelError(f"{where}: moments off the z axis need a non-collinear recipe")


def write_plan(path: str | Path, plan: Plan) -> None:
    """Write a plan as JSON, one job a line, atomically."""
    check_plan(plan)
    head = {"name": plan.name, "recipe": asdict(plan.recipe)}
    lines = [json.dumps(asdict(job), separators=(",", ":")) for job in plan.jobs]
    text = json.dumps(head, indent=1)[:-2] + ',\n "jobs": [\n' + ",\n".join(lines) + "\n]}\n"
    write_text(path, text)


def read_plan(path: str | Path) -> Plan:
    """Read a plan.

    Raises
    ------
    LabelError
        The file is missing, no plan, or breaks a rule of `check_plan`.
    """
    try:
        data = json.loads(Path(path).read_text())
        recipe = Recipe(**{**data["recipe"], "carriers": tuple(data["recipe"]["carriers"])})
        jobs = tuple(_job(entry) for entry in data["jobs"])
        plan = Plan(data["name"], recipe, jobs)
    except OSError as error:
        raise LabelError(f"cannot read the plan {str(path)!r}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise LabelError(f"{str(path)!r} is not a plan ({error}); write one with `mmace label plan`") from None
    check_plan(plan)
    return plan


def _job(entry: Mapping[str, Any]) -> Job:
    def rows(value: Iterable[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(row) for row in value)

    nested = {key: rows(entry[key]) for key in ("cell", "scaled_positions", "moments")}
    return Job(**{**entry, **nested, "symbols": tuple(entry["symbols"])})


def write_splits(path: str | Path, plans: Iterable[Plan], given: Splits | None = None) -> Splits:
    """Write the splits of several plans and of parents that come with no plan to one JSON file, and return them.

    Parameters
    ----------
    path : path
    plans : iterable of Plan
    given : Splits, optional
        Parents of label files that were not made from a plan.

    Raises
    ------
    LabelError
        A parent is in two splits.
    """
    parents = {part: set() if given is None else set(getattr(given, part)) for part in PARTS}
    for plan in plans:
        for part in PARTS:
            parents[part].update(plan.parents(part))
    splits = Splits(**{part: frozenset(names) for part, names in parents.items()})
    write_text(path, json.dumps({part: sorted(names) for part, names in parents.items()}, indent=1) + "\n")
    return splits
