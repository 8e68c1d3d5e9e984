"""What is computed for a system, and what it is compared with; all of it read from JSON beside this file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from mmace_props.errors import did_you_mean

from mmace.data import read_splits
from mmace.errors import LabelError

from .errors import BenchmarkError

HERE = Path(__file__).parent
SYSTEMS = ("FeAl", "CrN")
JUDGES = ("own DFT", "published DFT")
"""Kinds of references that give a verdict; the first that there is decides."""
KINDS = (*JUDGES, "training label", "experiment", "quoted value")
"""All kinds; labels a model may have seen, measurements, and values without a source of their own decide nothing."""
SUMS = ("difference", "combination")
"""Tasks that add up quantities of earlier ones."""


@dataclass(frozen=True)
class Number:
    """How a quantity is read from a dataset: ``scale * variable[where]``, less ``minus`` before scaling.

    Parameters
    ----------
    variable : name in the dataset.
    where : label of each dimension; lists of numbers are a wave vector ``q``; a ``volume`` in Å³/atom that is no
        integer is interpolated to.
    minus : the same for a value that is taken off.
    scale : of the result.
    """

    variable: str
    where: Mapping[str, Any] = field(default_factory=dict)
    minus: Mapping[str, Any] | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Task:
    """One property of one crystal, or one comparison with labels.

    Parameters
    ----------
    name : unique in its system.
    crystal : key of the system's crystals.
    property : of the suite; ``labels`` compares with DFT frames instead, ``states`` takes energies of the ``moments``
        given at fixed cell and positions, ``difference`` and ``combination`` add up quantities of earlier tasks.
    options : of the property; ``files`` and ``kind`` of labels; ``first`` and ``second``; ``terms``.
    soc : spin-orbit coupling.
    moments : how moments are relaxed.
    quick : whether ``--quick`` computes it.
    numbers : quantities by their names.
    fit : volumes in Å³/atom, by state, through which E(V) is fitted: those of own DFT.
    """

    name: str
    crystal: str
    property: str
    options: Mapping[str, Any]
    soc: bool
    moments: str
    quick: bool
    numbers: Mapping[str, Number]
    fit: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """One known value of a quantity.

    Parameters
    ----------
    value, uncertainty : in the quantity's unit.
    kind : one of `KINDS`.
    source : citation, or the settings of own DFT.
    """

    value: float
    uncertainty: float
    kind: str
    source: str


@dataclass(frozen=True)
class Quantity:
    """What is compared.

    Parameters
    ----------
    name : as in the tasks.
    text : what it is.
    unit : of everything about it.
    tolerance : largest deviation beyond the reference's own uncertainty that is no miss.
    reason : where the tolerance comes from.
    references : the one that decides first.
    zero : why a reference of zero is one that a value can miss; empty where zero is no answer.
    """

    name: str
    text: str
    unit: str
    tolerance: float
    reason: str
    references: tuple[Reference, ...]
    zero: str = ""

    @property
    def deciding(self) -> list[Reference]:
        """References of the first of `JUDGES` that there is."""
        kind = next((k for k in JUDGES if any(r.kind == k for r in self.references)), None)
        return [r for r in self.references if r.kind == kind]

    def decisive(self, reference: Reference) -> bool:
        """Whether what is allowed leaves out zero by as much again."""
        return bool(self.zero) or 2 * (self.tolerance + reference.uncertainty) <= abs(reference.value)


@dataclass(frozen=True)
class System:
    """A system with its crystals, tasks and quantities, and the folder of its data."""

    name: str
    folder: Path
    crystals: Mapping[str, Atoms]
    tasks: tuple[Task, ...]
    quantities: Mapping[str, Quantity]

    @property
    def stored(self) -> Path:
        """File of the stored results."""
        return self.folder / "results" / "benchmark.json"

    @property
    def test_parents(self) -> frozenset[str]:
        """Parents of the labels that no model may have trained on.

        Raises
        ------
        BenchmarkError : the splits are missing or broken.
        """
        try:
            return read_splits(self.folder / "splits.json").test
        except LabelError as error:
            raise BenchmarkError(str(error)) from error


def read_system(name: str, folder: Path | None = None) -> System:
    """Read a system.

    Parameters
    ----------
    name : one of `SYSTEMS`, or any where a folder is given.
    folder : with ``benchmark.json`` and ``references.json``, and ``references/values.json`` where own DFT was derived.

    Raises
    ------
    BenchmarkError : no such system, a file is missing or breaks a rule.
    """
    if folder is None:
        if name not in SYSTEMS:
            raise BenchmarkError(f"there is no system '{name}'{did_you_mean(name, SYSTEMS)}")
        folder = HERE / name
    plan, known = read_json(folder / "benchmark.json"), read_json(folder / "references.json")
    derived_file = folder / "references" / "values.json"
    derived = read_json(derived_file) if derived_file.exists() else {"values": {}}
    try:
        crystals = {key: _crystal(value) for key, value in plan["crystals"].items()}
        tasks = tuple(_task(entry) for entry in plan["tasks"])
        quantities = _quantities(known, derived, tasks)
    except (KeyError, TypeError, ValueError) as error:
        raise BenchmarkError(f"the benchmark in '{folder}' cannot be read ({error!r}); mend its JSON files") from error
    for task in tasks:
        if task.property not in ("labels", *SUMS) and task.crystal not in crystals:
            raise BenchmarkError(f"the task '{task.name}' has no crystal '{task.crystal}'; add it to benchmark.json")
        for quantity in task.numbers:
            if quantity not in quantities:
                raise BenchmarkError(f"the quantity '{quantity}' of the task '{task.name}' is not in references.json")
    return System(name, folder, crystals, tasks, quantities)


def terms_of(task: Task) -> dict[str, float]:
    """Factors of the quantities that a task adds up: the ``first`` less the ``second``, or ``terms``."""
    options = task.options
    return dict(options.get("terms") or {str(options["first"]): 1.0, str(options["second"]): -1.0})


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    BenchmarkError : it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise BenchmarkError(f"'{path}' cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BenchmarkError(f"'{path}' is not JSON ({error}); mend it") from error


def _crystal(entry: Mapping[str, Any]) -> Atoms:
    return Atoms(
        entry["symbols"],
        cell=np.array(entry["cell"], dtype=float),
        scaled_positions=entry["scaled_positions"],
        magmoms=np.array(entry["moments"], dtype=float),
        pbc=True,
    )


def _task(entry: Mapping[str, Any]) -> Task:
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.get("options", {}).items()}
    return Task(
        entry["name"],
        entry.get("crystal", ""),
        entry["property"],
        options,
        bool(entry.get("soc", False)),
        entry.get("moments", "magnitudes"),
        bool(entry.get("quick", False)),
        {key: Number(**value) for key, value in entry["numbers"].items()},
        {state: tuple(volumes) for state, volumes in entry.get("fit", {}).items()},
    )


def _quantities(known: Mapping[str, Any], derived: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, Quantity]:
    """Quantities by name; the tolerance of a sum follows from those of its terms, as independent errors add up."""
    sums = {name: (task, number) for task in tasks if task.property in SUMS for name, number in task.numbers.items()}
    found = {key: _quantity(key, value, derived) for key, value in known.items() if key not in sums}
    for key, (task, number) in sums.items():
        if {"tolerance", "reason"} & set(known[key]):
            raise ValueError(f"the tolerance of {key} follows from its terms; leave it out")
        terms = terms_of(task)
        errors = [factor * found[term].tolerance for term, factor in terms.items()]
        tolerance = abs(number.scale) * float(np.linalg.norm(errors))
        reason = f"tolerances of its terms in quadrature: {', '.join(f'{f:g} × {t}' for t, f in terms.items())}"
        found[key] = _quantity(key, {**known[key], "tolerance": tolerance, "reason": reason}, derived)
    return {key: found[key] for key in known}


def _quantity(name: str, entry: Mapping[str, Any], derived: Mapping[str, Any]) -> Quantity:
    given = [Reference(**reference) for reference in entry.get("references", [])]
    own = derived["values"].get(name)
    if own is not None:
        given.append(Reference(own["value"], own["uncertainty"], own["kind"], own["source"]))
    given.sort(key=lambda reference: KINDS.index(reference.kind))
    if entry["tolerance"] <= 0 or not entry["reason"]:
        raise ValueError(f"{name} needs a positive tolerance and its reason")
    first = abs(given[0].value) if given else 0.0
    tolerance = max(entry["tolerance"], entry.get("relative", 0.0) * first)
    return Quantity(name, entry["text"], entry["unit"], tolerance, entry["reason"], tuple(given), entry.get("zero", ""))
