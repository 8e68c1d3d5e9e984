"""What is computed for a system, and what it is compared with; all of it read from JSON beside this file."""

import json
from collections.abc import Mapping
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
KINDS = ("own DFT", "published DFT", "experiment")
"""Kinds of references, the one that decides the verdict first."""


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
    """

    name: str
    crystal: str
    property: str
    options: Mapping[str, Any]
    soc: bool
    moments: str
    quick: bool
    numbers: Mapping[str, Number]


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
    """

    name: str
    text: str
    unit: str
    tolerance: float
    reason: str
    references: tuple[Reference, ...]


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
        quantities = {key: _quantity(key, value, derived) for key, value in known.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise BenchmarkError(f"the benchmark in '{folder}' cannot be read ({error!r}); mend its JSON files") from error
    for task in tasks:
        if task.property not in ("labels", "difference", "combination") and task.crystal not in crystals:
            raise BenchmarkError(f"the task '{task.name}' has no crystal '{task.crystal}'; add it to benchmark.json")
        for quantity in task.numbers:
            if quantity not in quantities:
                raise BenchmarkError(f"the quantity '{quantity}' of the task '{task.name}' is not in references.json")
    return System(name, folder, crystals, tasks, quantities)


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
    )


def _quantity(name: str, entry: Mapping[str, Any], derived: Mapping[str, Any]) -> Quantity:
    given = [Reference(**reference) for reference in entry.get("references", [])]
    own = derived["values"].get(name)
    if own is not None:
        given.append(Reference(own["value"], own["uncertainty"], "own DFT", own["source"]))
    given.sort(key=lambda reference: KINDS.index(reference.kind))
    if entry["tolerance"] <= 0 or not entry["reason"]:
        raise ValueError(f"{name} needs a positive tolerance and its reason")
    return Quantity(name, entry["text"], entry["unit"], entry["tolerance"], entry["reason"], tuple(given))
