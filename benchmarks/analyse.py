"""Compare numbers with references and with stored results. Nothing is computed and nothing is printed here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .calculate import Outcome
from .errors import BenchmarkError
from .systems import Quantity, Reference, System, Task

NOISE = 0.01
"""Change that counts as numerical noise, in units of the tolerance: rounding differs between machines by far less."""

OK, MISS, COARSE, INCOMPLETE = "ok", "miss", "undecided", "incomplete"
SHOWN, UNKNOWN, FAILED = "no verdict", "no reference", "not computed"
VERDICTS = (OK, MISS, COARSE, INCOMPLETE, SHOWN, UNKNOWN, FAILED)


@dataclass(frozen=True)
class Line:
    """A quantity with its numbers and its verdict.

    Parameters
    ----------
    quantity : what was compared.
    task : that computed it.
    value : mean over the members that have one, None where less than half of them have.
    spread : standard deviation over these members, None without a committee.
    verdict : one of `VERDICTS`.
    note : why there is no value, or why members have none.
    members, committee : how many members have a value, and how many were asked.
    """

    quantity: Quantity
    task: str
    value: float | None
    spread: float | None
    verdict: str
    note: str = ""
    members: int = 1
    committee: int = 1

    def reference(self, kind: str) -> Reference | None:
        """The first reference of a kind."""
        return next((r for r in self.quantity.references if r.kind == kind), None)

    @property
    def deviation(self) -> float | None:
        """Value less the first reference, which decides where any does."""
        if self.value is None or not self.quantity.references:
            return None
        return self.value - self.quantity.references[0].value


def lines_of(system: System, outcomes: Mapping[str, Outcome]) -> list[Line]:
    """Lines of all quantities of the tasks that were run, in the order of the tasks."""
    tasks = {task.name: task for task in system.tasks}
    return [_line(system, tasks[name], outcome, q) for name, outcome in outcomes.items() for q in tasks[name].numbers]


def _line(system: System, task: Task, outcome: Outcome, name: str) -> Line:
    quantity, total = system.quantities[name], outcome.committee
    if outcome.failed:
        return Line(quantity, task.name, None, None, FAILED, outcome.failed, 0, total)
    members = np.array(list(outcome.numbers[name].values()))
    count = len(members)
    lost = outcome.lost or "the property gives no number here"
    note = "" if count == total else f"{count} of {total} members; {lost}" if total > 1 else lost
    if 2 * count <= total and count < total:
        return Line(quantity, task.name, None, None, FAILED, note, count, total)
    value = float(members.mean())
    spread = float(members.std(ddof=1)) if count > 1 else None
    found = verdict(quantity, value)
    if found == OK and count < total:
        found = INCOMPLETE
    return Line(quantity, task.name, value, spread, found, note, count, total)


def verdict(quantity: Quantity, value: float) -> str:
    """`OK` within tolerance plus uncertainty of a reference that decides, if they are no more than half of it."""
    known = quantity.deciding
    if not known:
        return SHOWN if quantity.references else UNKNOWN
    near = [r for r in known if abs(value - r.value) <= quantity.tolerance + r.uncertainty]
    if not near:
        return MISS
    return OK if any(quantity.decisive(r) for r in near) else COARSE


def counts(lines: Sequence[Line]) -> dict[str, int]:
    """How many lines have each verdict."""
    return {name: sum(line.verdict == name for line in lines) for name in VERDICTS}


def record(lines: Mapping[str, Sequence[Line]], about: Mapping[str, Any], message: str = "") -> dict[str, Any]:
    """Everything of a run as JSON types, by system."""
    return {
        "message": message,
        "calculator": {str(k): str(v) for k, v in about.items()},
        "systems": {system: {line.quantity.name: _entry(line) for line in part} for system, part in lines.items()},
    }


def _entry(line: Line) -> dict[str, Any]:
    first = next(iter(line.quantity.references), None)
    entry: dict[str, Any] = {
        "value": line.value,
        "spread": line.spread,
        "unit": line.quantity.unit,
        "tolerance": line.quantity.tolerance,
        "verdict": line.verdict,
    }
    if first is not None:
        entry["reference"] = {"value": first.value, "uncertainty": first.uncertainty, "kind": first.kind}
    if line.members < line.committee:
        entry["members"] = f"{line.members} of {line.committee}"
    return entry | ({"note": line.note} if line.note else {})


def changes(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """What differs beyond noise between a run and the stored results; quantities that the run left out do not count.

    Parameters
    ----------
    new, old : entries of one system in a `record`.
    """
    found = []
    for name, entry in new.items():
        before = old.get(name)
        if before is None:
            found.append(f"{name} is new: {_text(entry)}")
        elif (entry["value"] is None) != (before["value"] is None):
            found.append(f"{name}: {_text(before)} became {_text(entry)}")
        elif entry.get("members") != before.get("members"):
            found.append(f"{name}: {before.get('members', 'all')} members became {entry.get('members', 'all')}")
        elif entry["value"] is not None:
            change = entry["value"] - before["value"]
            if abs(change) > NOISE * entry["tolerance"]:
                found.append(f"{name}: {_text(before)} became {_text(entry)} ({change:+.3g})")
    return found


def _text(entry: Mapping[str, Any]) -> str:
    return str(entry.get("note", "nothing")) if entry["value"] is None else f"{entry['value']:.6g} {entry['unit']}"


@dataclass(frozen=True)
class Change:
    """A quantity in two results.

    Parameters
    ----------
    name, unit : of the quantity.
    first, second : values with their spreads, or why there is none.
    reference : the one that decides, or the first of those that do not; empty where there is none.
    moved : difference in units of the tolerance, NaN where a value is missing.
    towards : "closer" or "farther" from the reference by more than noise, else empty.
    verdicts : one, or that of the first and that of the second.
    """

    name: str
    unit: str
    first: str
    second: str
    reference: str
    moved: float
    towards: str
    verdicts: str


CHANGE_HEAD = ("quantity", "unit", "first", "second", "reference", "change / tolerance", "", "verdict")


def cells_of(change: Change) -> tuple[str, ...]:
    """Texts of a change, in the order of `CHANGE_HEAD`."""
    moved = "" if np.isnan(change.moved) else f"{change.moved:+.2f}"
    return (
        change.name,
        change.unit,
        change.first,
        change.second,
        change.reference,
        moved,
        change.towards,
        change.verdicts,
    )


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Change]:
    """Every quantity of two records side by side; references and tolerances are those of the second.

    Raises
    ------
    BenchmarkError : one of them is no record, or they have no quantity in common.
    """
    found = []
    try:
        for system, entries in first["systems"].items():
            others = second["systems"].get(system, {})
            found += [_change(name, entries[name], others[name]) for name in entries if name in others]
    except (KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError("a file to compare holds no results of mmace-bench; write them with --json") from error
    if not found:
        raise BenchmarkError("the two results have no quantity in common; run the same system with both")
    return found


def unshared(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the quantities that only the first of two records has, and of those that only the second has."""
    kept = [[(s, name) for s, entries in r["systems"].items() for name in entries] for r in (first, second)]
    only = [[name for s, name in own if (s, name) not in other] for own, other in (kept, kept[::-1])]
    return only[0], only[1]


def _change(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Change:
    moved, towards, known = float("nan"), "", b.get("reference")
    if a["value"] is not None and b["value"] is not None:
        moved = (b["value"] - a["value"]) / b["tolerance"]
        before, after = (abs(x["value"] - known["value"]) if known else 0.0 for x in (a, b))
        nearer = (after - before) / b["tolerance"]
        towards = "" if abs(nearer) <= NOISE else "closer" if nearer < 0 else "farther"
    verdicts = b["verdict"] if a["verdict"] == b["verdict"] else f"{a['verdict']} → {b['verdict']}"
    reference = f"{known['value']:.4g} ({known['kind']})" if known else ""
    return Change(name, b["unit"], _number(a), _number(b), reference, moved, towards, verdicts)


def _number(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return str(entry["verdict"])
    spread = "" if entry["spread"] is None else f" ± {entry['spread']:.2g}"
    return f"{entry['value']:.4g}{spread}" + (f" ({entry['members']})" if "members" in entry else "")
