"""Compare numbers with references and with stored results. Nothing is computed and nothing is printed here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .calculate import Outcome
from .errors import BenchmarkError
from .systems import KINDS, Quantity, Reference, System, Task

NOISE = 0.01
"""Change that counts as numerical noise, in units of the tolerance: rounding differs between machines by far less."""

OK, MISS, UNKNOWN, FAILED = "ok", "miss", "no reference", "not computed"


@dataclass(frozen=True)
class Line:
    """A quantity with its numbers and its verdict.

    Parameters
    ----------
    quantity : what was compared.
    task : that computed it.
    value : mean over the committee, None where there is none.
    spread : standard deviation over the committee, None without one.
    verdict : one of `OK`, `MISS`, `UNKNOWN`, `FAILED`.
    note : why there is no value.
    """

    quantity: Quantity
    task: str
    value: float | None
    spread: float | None
    verdict: str
    note: str = ""

    def reference(self, kind: str) -> Reference | None:
        """The first reference of a kind."""
        return next((r for r in self.quantity.references if r.kind == kind), None)

    @property
    def deviation(self) -> float | None:
        """Value less the reference that decides."""
        if self.value is None or not self.quantity.references:
            return None
        return self.value - self.quantity.references[0].value


def lines_of(system: System, outcomes: Mapping[str, Outcome]) -> list[Line]:
    """Lines of all quantities of the tasks that were run, in the order of the tasks."""
    tasks = {task.name: task for task in system.tasks}
    return [_line(system, tasks[name], outcome, q) for name, outcome in outcomes.items() for q in tasks[name].numbers]


def _line(system: System, task: Task, outcome: Outcome, name: str) -> Line:
    quantity = system.quantities[name]
    if outcome.failed:
        return Line(quantity, task.name, None, None, FAILED, outcome.failed)
    members = np.array(outcome.numbers[name])
    value = float(members.mean())
    spread = float(members.std(ddof=1)) if len(members) > 1 else None
    if not np.isfinite(value):
        return Line(quantity, task.name, None, None, FAILED, "the property gives no number here")
    return Line(quantity, task.name, value, spread, verdict(quantity, value))


def verdict(quantity: Quantity, value: float) -> str:
    """`OK` within tolerance plus uncertainty of any reference of the first of `KINDS` that there is."""
    for kind in KINDS:
        known = [r for r in quantity.references if r.kind == kind]
        if known:
            near = any(abs(value - r.value) <= quantity.tolerance + r.uncertainty for r in known)
            return OK if near else MISS
    return UNKNOWN


def counts(lines: Sequence[Line]) -> dict[str, int]:
    """How many lines have each verdict."""
    return {name: sum(line.verdict == name for line in lines) for name in (OK, MISS, UNKNOWN, FAILED)}


def record(lines: Mapping[str, Sequence[Line]], about: Mapping[str, Any], message: str = "") -> dict[str, Any]:
    """Everything of a run as JSON types, by system."""
    return {
        "message": message,
        "calculator": {str(k): str(v) for k, v in about.items()},
        "systems": {
            system: {
                line.quantity.name: {
                    "value": line.value,
                    "spread": line.spread,
                    "unit": line.quantity.unit,
                    "tolerance": line.quantity.tolerance,
                    "verdict": line.verdict,
                    **({"note": line.note} if line.note else {}),
                }
                for line in part
            }
            for system, part in lines.items()
        },
    }


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
        elif entry["value"] is not None:
            change = entry["value"] - before["value"]
            if abs(change) > NOISE * entry["tolerance"]:
                found.append(f"{name}: {_text(before)} became {_text(entry)} ({change:+.3g})")
    return found


def _text(entry: Mapping[str, Any]) -> str:
    return str(entry.get("note", "nothing")) if entry["value"] is None else f"{entry['value']:.6g} {entry['unit']}"


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Rows of two records side by side: quantity, unit, first, second, difference in units of the tolerance.

    Raises
    ------
    BenchmarkError : one of them is no record, or they have no quantity in common.
    """
    rows = []
    try:
        for system, entries in first["systems"].items():
            others = second["systems"].get(system, {})
            for name in (n for n in entries if n in others):
                a, b = entries[name], others[name]
                known = a["value"] is not None and b["value"] is not None
                gap = f"{(b['value'] - a['value']) / a['tolerance']:+.2f}" if known else ""
                rows.append((name, a["unit"], _number(a), _number(b), gap))
    except (KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError("a file to compare holds no results of mmace-bench; write them with --json") from error
    if not rows:
        raise BenchmarkError("the two results have no quantity in common; run the same system with both")
    return rows


def _number(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return entry["verdict"]
    return f"{entry['value']:.4g}" + ("" if entry["spread"] is None else f" ± {entry['spread']:.2g}")
