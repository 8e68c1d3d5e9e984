"""Present results: a table for the terminal, and what a report says in any format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ase.io
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .analyse import COARSE, FAILED, INCOMPLETE, MISS, OK, SHOWN, UNKNOWN, Line, counts
from .calculate import NEAR, Outcome
from .systems import JUDGES, KINDS, Quantity, Reference, System, Task

HEAD = ("quantity", "unit", "value", *JUDGES, "for information", "deviation", "allowed", "verdict")
MARKS = {"own DFT": "o", "published DFT": "s", "training label": "D", "experiment": "x", "quoted value": "+"}
STYLE = {OK: "green", MISS: "red"}
LEGEND = {
    OK: "within the tolerance plus the reference's own uncertainty, together no more than half of the reference",
    MISS: "beyond both",
    COARSE: "within both, but they exceed half of the reference, so that hardly any value would miss",
    INCOMPLETE: "within both, but members of the committee gave no number; which and why stands below the table",
    SHOWN: "beside it stand only labels a model may have seen, measurements, or values without a source of their own",
    UNKNOWN: "nothing to compare with",
    FAILED: "half of the committee or more gave no number; the reason stands below the table",
}
"""What each verdict means."""


@dataclass(frozen=True)
class Entry:
    """One row of a table: texts in the order of `HEAD`, and the verdict that marks it."""

    cells: tuple[str, ...]
    verdict: str


@dataclass(frozen=True)
class Picture:
    """A figure with the stem of its file and its caption."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    """What a report says of one system.

    Parameters
    ----------
    name : of the system.
    entries : of its table.
    tally : how many entries have each verdict that occurs.
    notes : why numbers are missing, and what properties say about their results, once for each reason.
    pictures : drawn from its datasets.
    sources : references and tolerance of each quantity, a sentence each.
    """

    name: str
    entries: list[Entry]
    tally: dict[str, int]
    notes: list[str]
    pictures: list[Picture]
    sources: list[str]


@dataclass(frozen=True)
class Report:
    """What a report says; every text is plain, and the formats add their own marks."""

    introduction: str
    sections: list[Section]


def cells(line: Line) -> tuple[str, ...]:
    """Texts of one line of the table."""
    quantity = line.quantity
    value = "" if line.value is None else _value(line.value, line.spread)
    if line.value is not None and line.members < line.committee:
        value += f" ({line.members} of {line.committee})"
    found = line.deviation
    deviation = "" if found is None else f"{found:+.3g}"
    known = [_reference(line.reference(kind)) for kind in JUDGES]
    others = [(kind, line.reference(kind)) for kind in KINDS if kind not in JUDGES]
    shown = "; ".join(f"{_reference(reference)} ({kind})" for kind, reference in others if reference is not None)
    return (quantity.text, quantity.unit, value, *known, shown, deviation, f"{quantity.tolerance:.3g}", line.verdict)


def _value(value: float, spread: float | None) -> str:
    return f"{value:.4g}" + ("" if spread is None else f" ± {spread:.2g}")


def _reference(reference: Reference | None) -> str:
    if reference is None:
        return ""
    return f"{reference.value:.4g}" + (f" ± {reference.uncertainty:.2g}" if reference.uncertainty else "")


def print_table(console: Console, title: str, lines: Sequence[Line], outcomes: Mapping[str, Outcome]) -> None:
    """Print one system."""
    table = Table(title=title)
    for k, name in enumerate(HEAD):
        table.add_column(name, justify="left" if k < 2 or k == len(HEAD) - 1 else "right")
    for line in lines:
        table.add_row(*cells(line), style=STYLE.get(line.verdict))
    console.print(table)
    for note in notes_of(lines, outcomes):
        console.print(note)
    console.print(", ".join(f"{number} {name}" for name, number in counts(lines).items() if number))


def notes_of(lines: Sequence[Line], outcomes: Mapping[str, Outcome]) -> list[str]:
    """Why numbers or members are missing, and what the properties say about their results."""
    missing = [f"{line.task}: {line.note}" for line in lines if line.note]
    said = [f"{task}: {note}" for task, outcome in outcomes.items() for note in outcome.notes]
    return list(dict.fromkeys([*missing, *said]))


def build_report(
    systems: Sequence[System],
    lines: Mapping[str, Sequence[Line]],
    outcomes: Mapping[str, Mapping[str, Outcome]],
    about: Mapping[str, str],
) -> Report:
    """Gather what a report says, whatever its format.

    Parameters
    ----------
    systems : in the order of the report.
    lines : of each system.
    outcomes : of each system by task; the pictures are drawn from their datasets.
    about : the calculator.
    """
    return Report(_introduction(about), [_section(s, lines[s.name], outcomes[s.name]) for s in systems])


def _introduction(about: Mapping[str, str]) -> str:
    parts = (about.get("calculator", ""), about.get("name", ""), about.get("hash", "")[:16])
    calculator = " ".join(part for part in parts if part)
    return (
        f"Written by mmace-bench; calculator {calculator}. A value is the mean of the committee with its spread. Own "
        "DFT decides where there is some, else published DFT; the deviation is from the first value that stands beside "
        "it. Tolerances come from the spread of DFT between codes and settings, never from what a model reaches."
    )


def _section(system: System, lines: Sequence[Line], outcomes: Mapping[str, Outcome]) -> Section:
    datasets = {task: outcome.dataset for task, outcome in outcomes.items() if outcome.dataset is not None}
    return Section(
        system.name,
        [Entry(cells(line), line.verdict) for line in lines],
        {name: number for name, number in counts(lines).items() if number},
        notes_of(lines, outcomes),
        [Picture(f"benchmark-{system.name}-{name}", text, image) for name, text, image in figures(system, datasets)],
        [_source(line.quantity) for line in lines],
    )


def _source(quantity: Quantity) -> str:
    known = "; ".join(f"{r.value:g} ({r.kind}: {r.source})" for r in quantity.references) or "none"
    return f"{quantity.text}: {known}. Allowed {quantity.tolerance:.4g} {quantity.unit}: {quantity.reason}."


def figures(system: System, datasets: Mapping[str, xr.Dataset]) -> list[tuple[str, str, Figure]]:
    """Pictures of the datasets of a run, by task: name, caption, figure."""
    found = []
    for task in system.tasks:
        if task.property not in ("eos", "phonon", "spiral", "states", "labels") or task.name not in datasets:
            continue
        dataset = datasets[task.name]
        if task.property == "labels":
            caption, figure = _labels_figure(dataset)
            found.append((task.name, caption, figure))
            continue
        formula = dataset.attrs["formula"]
        if task.property == "eos":
            caption = f"E(V) of {formula}; points are own DFT, the lowest of them laid on the curve of its state."
            found.append((task.name, caption, _eos_figure(system, task.name, dataset)))
        elif task.property == "states":
            scan = _states_figure(system, task, dataset)
            if scan is not None:
                found.append((task.name, f"Energy of {formula} against its moments; points are DFT.", scan))
        elif task.property == "phonon":
            figure = _curves(dataset, "frequency", "frequency, THz", _waves(system, task, dataset))
            found.append((task.name, f"Phonons of {formula}; points are the references.", figure))
        else:
            figure = _curves(dataset, "energy", "E(q) − E(0), meV/atom", _waves(system, task, dataset))
            found.append((task.name, f"Spin spirals of {formula}; points are the references.", figure))
    return found


def _waves(system: System, task: Task, dataset: xr.Dataset) -> dict[str, list[tuple[float, float]]]:
    """Place along the path and value of every reference at a wave vector, by kind."""
    points: dict[str, list[tuple[float, float]]] = {}
    for name, number in task.numbers.items():
        if "q" not in number.where:
            continue
        distance = np.linalg.norm(dataset["q"].values - np.array(number.where["q"], dtype=float), axis=1)
        for place in dataset["position"].values[distance < NEAR]:
            for reference in system.quantities[name].references:
                points.setdefault(reference.kind, []).append((float(place), reference.value))
    return points


def _states_figure(system: System, task: Task, dataset: xr.Dataset) -> Figure | None:
    """E against |m|, or against the angle where that is what changes; none where neither is a scan."""
    axis = "angle" if float(np.ptp(dataset["angle"].values)) > 1 else "length"
    places = dataset[axis].values
    if len(np.unique(places.round(6))) < 4:
        return None
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    energy = 1e3 * (dataset["energy"].values - dataset["energy"].values.min())
    axes.plot(places, energy, "-", color="C0")
    if "energy_member" in dataset and dataset.sizes["member"] > 1:
        members = 1e3 * dataset["energy_member"].values
        spread = (members - members.mean(axis=1, keepdims=True)).std(axis=0, ddof=1)
        axes.fill_between(places, energy - spread, energy + spread, color="C0", alpha=0.2)
    for name, number in task.numbers.items():
        for reference in system.quantities[name].references:
            if number.minus is not None and number.variable == "energy":
                first, base = int(number.where["state"]), int(number.minus["state"])
                value = energy[base] + 1e3 * reference.value / number.scale
                axes.plot(places[first], value, MARKS[reference.kind], color="C1")
    axes.set(xlabel="angle, °" if axis == "angle" else "|m|, µB", ylabel="energy, meV/atom")
    return figure


def _labels_figure(dataset: xr.Dataset) -> tuple[str, Figure]:
    """Predicted against label for every quantity; E(n) along the directions of the test groups."""
    if "anisotropy_label" in dataset:
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(1e6 * dataset["anisotropy_label"].values, "o", color="C1", label="DFT", markersize=3)
        axes.plot(1e6 * dataset["anisotropy_model"].values, "x", color="C0", label="model", markersize=3)
        axes.set(xlabel="directions of one group after another", ylabel="E(n) about its mean, µeV/atom")
        axes.legend()
        return "E(n) of the test groups.", figure
    names = [str(v).removesuffix("_label") for v in dataset.data_vars if str(v).endswith("_label")]
    figure = Figure(figsize=(7, 6), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, names, strict=False):
        label, model = dataset[f"{name}_label"].values, dataset[f"{name}_model"].values
        ends = [np.nanmin(label), np.nanmax(label)]
        axes.plot(ends, ends, color="0.7", linewidth=0.8)
        axes.plot(label, model, ".", color="C0", markersize=3)
        unit = dataset[f"{name}_label"].attrs["units"]
        axes.set(title=name.replace("_", " "), xlabel=f"DFT, {unit}", ylabel=f"model, {unit}")
    return "Parity of the test labels; energies less the constant of each element.", figure


def _eos_figure(system: System, task: str, dataset: xr.Dataset) -> Figure:
    """E(V) of every state above the lowest; DFT points meet the model's curve at the lowest of them."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    lowest = float(np.nanmin(dataset["energy"]))
    states = [str(s) for s in dataset["state"].values]
    for k, state in enumerate(states):
        energy = 1e3 * (dataset["energy"].sel(state=state) - lowest)
        axes.plot(dataset["volume"], energy, color=f"C{k}", label=state)
    points = aligned_points(reference_points(system, task.removesuffix("-eos")), dataset)
    for k, (state, curve) in enumerate(points.items()):
        mine = curve_of(state, states)
        color = f"C{states.index(mine)}" if mine is not None else f"C{len(states) + k}"
        label = None if mine == state else f"{state}, own DFT"
        volumes, energies = zip(*curve, strict=True)
        axes.plot(volumes, 1e3 * (np.array(energies) - lowest), "o", color=color, label=label)
    axes.set(xlabel="volume, Å³/atom", ylabel="energy, meV/atom")
    axes.legend()
    return figure


def curve_of(state: str, states: Sequence[str]) -> str | None:
    """The model's state that a reference's state is: [001] layers are the antiferromagnet of these cells."""
    name = "afm" if state == "afm001" else state
    return name if name in states else None


def reference_points(system: System, crystal: str) -> dict[str, list[tuple[float, float]]]:
    """Volume and energy per atom of own DFT, by magnetic order."""
    path = system.folder / "references" / "dft.extxyz"
    points: dict[str, list[tuple[float, float]]] = {}
    if not path.exists():
        return points
    for atoms in ase.io.read(path, ":"):
        tag = str(atoms.info["parent"]).rsplit("-", 1)[0]
        if tag.startswith(f"{crystal}-") and tag.endswith("-eos"):
            state = tag.removeprefix(f"{crystal}-").removesuffix("-eos")
            point = (atoms.get_volume() / len(atoms), atoms.get_potential_energy() / len(atoms))
            points.setdefault(state, []).append(point)
    return {state: sorted(curve) for state, curve in points.items()}


def aligned_points(
    points: Mapping[str, Sequence[tuple[float, float]]], dataset: xr.Dataset
) -> dict[str, list[tuple[float, float]]]:
    """Points on the model's scale of energy: the lowest of those that have a curve lies on it.

    Codes have their own zero, so one point alone says nothing, and gives none.
    """
    states = [str(s) for s in dataset["state"].values]
    known = [(e, v, curve_of(state, states)) for state, curve in points.items() for v, e in curve]
    there = [(e, v, mine) for e, v, mine in known if mine is not None]
    if len(known) < 2 or not there:
        return {}
    energy, volume, mine = min(there)
    shift = float(np.interp(volume, dataset["volume"], dataset["energy"].sel(state=mine))) - energy
    return {state: [(v, e + shift) for v, e in curve] for state, curve in points.items()}


def _curves(dataset: xr.Dataset, name: str, label: str, points: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Lines along the path, one for each branch, with the committee's spread."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    values = np.asarray(dataset[name].values).reshape(dataset.sizes["wave"], -1)
    place = dataset["position"].values
    axes.plot(place, values, color="C0", linewidth=1)
    if f"{name}_std" in dataset:
        spread = np.asarray(dataset[f"{name}_std"].values).reshape(values.shape)
        for k in range(values.shape[1]):
            axes.fill_between(place, values[:, k] - spread[:, k], values[:, k] + spread[:, k], color="C0", alpha=0.2)
    for kind, known in points.items():
        axes.plot(*zip(*known, strict=True), MARKS[kind], color="C1", label=kind)
    if points:
        axes.legend()
    axes.axhline(0, color="0.7", linewidth=0.5)
    axes.set(xlabel="wave vector along the path, 1/Å", ylabel=label, xlim=(place[0], place[-1]))
    return figure
