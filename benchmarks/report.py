"""Present results: a table for the terminal, Markdown with pictures for the documentation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import ase.io
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from mmace_props.files import write_whole
from mmace_props.plot import save_figure
from rich.console import Console
from rich.table import Table

from .analyse import FAILED, MISS, OK, Line, counts
from .systems import KINDS, Reference, System

HEAD = ("quantity", "unit", "value", *KINDS, "deviation", "allowed", "verdict")
STYLE = {OK: "green", MISS: "red"}


def cells(line: Line) -> tuple[str, ...]:
    """Texts of one line of the table."""
    quantity = line.quantity
    value = "" if line.value is None else _value(line.value, line.spread)
    found = line.deviation
    deviation = "" if found is None else f"{found:+.3g}"
    known = [_reference(line.reference(kind)) for kind in KINDS]
    return (quantity.text, quantity.unit, value, *known, deviation, f"{quantity.tolerance:.3g}", line.verdict)


def _value(value: float, spread: float | None) -> str:
    return f"{value:.4g}" + ("" if spread is None else f" ± {spread:.2g}")


def _reference(reference: Reference | None) -> str:
    if reference is None:
        return ""
    return f"{reference.value:.4g}" + (f" ± {reference.uncertainty:.2g}" if reference.uncertainty else "")


def print_table(console: Console, title: str, lines: Sequence[Line]) -> None:
    """Print one system."""
    table = Table(title=title)
    for k, name in enumerate(HEAD):
        table.add_column(name, justify="left" if k < 2 or k == len(HEAD) - 1 else "right")
    for line in lines:
        table.add_row(*cells(line), style=STYLE.get(line.verdict))
    console.print(table)
    for note in dict.fromkeys(f"{line.task}: {line.note}" for line in lines if line.note):
        console.print(note)
    console.print(", ".join(f"{number} {name}" for name, number in counts(lines).items() if number))


def write_report(
    path: Path, systems: Sequence[System], lines: Mapping[str, Sequence[Line]], work: Path, about: Mapping[str, str]
) -> None:
    """Write the report as Markdown, its pictures into the folder ``images`` beside it."""
    images = path.parent / "images"
    images.mkdir(exist_ok=True)
    text = ["# Benchmark against DFT and experiment", "", _introduction(about), ""]
    for system in systems:
        part = lines[system.name]
        text += [f"## {system.name}", "", *_markdown(part), "", *_notes(part)]
        for name, caption, figure in figures(system, work / system.name):
            save_figure(figure, images / f"benchmark-{system.name}-{name}.png")
            text += [f"![{caption}](images/benchmark-{system.name}-{name}.png)", "", f"*{caption}*", ""]
        text += ["### Sources and tolerances", "", *_sources(part), ""]
    content = "\n".join(text).rstrip() + "\n"
    write_whole(path, lambda temporary: Path(temporary).write_text(content))


def _introduction(about: Mapping[str, str]) -> str:
    return (
        f"Written by `mmace-bench run all --report`; calculator {about.get('calculator', '')} "
        f"{about.get('name', '')} {about.get('hash', '')[:16]}. A value is the mean of the committee with its spread. "
        "It is compared with own DFT where there is some, else with published DFT, else with experiment; the verdict "
        "is *ok* within the tolerance plus the reference's own uncertainty. Tolerances come from the spread of DFT "
        "between codes and settings or of experiments, never from what a model reaches."
    )


def _markdown(lines: Sequence[Line]) -> list[str]:
    rows = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for line in lines:
        texts = list(cells(line))
        texts[-1] = f"**{texts[-1]}**" if line.verdict == MISS else texts[-1]
        rows.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    return rows


def _notes(lines: Sequence[Line]) -> list[str]:
    tally = ", ".join(f"{number} {name}" for name, number in counts(lines).items() if number)
    notes = dict.fromkeys(f"- {line.task}: {line.note}" for line in lines if line.verdict == FAILED)
    return [f"{tally}.", "", *notes, *([""] if notes else [])]


def _sources(lines: Sequence[Line]) -> list[str]:
    rows = []
    for line in lines:
        quantity = line.quantity
        known = "; ".join(f"{r.value:g} ({r.kind}: {r.source})" for r in quantity.references) or "none"
        rows.append(f"- {quantity.text}: {known}. Allowed {quantity.tolerance:g} {quantity.unit}: {quantity.reason}.")
    return rows


def figures(system: System, folder: Path) -> list[tuple[str, str, Figure]]:
    """Pictures of the datasets there are: name, caption, figure."""
    found = []
    for task in system.tasks:
        path = folder / f"{task.name}.nc"
        if task.property not in ("eos", "phonon", "spiral") or not path.exists():
            continue
        with xr.open_dataset(path) as opened:
            dataset = opened.load()
        formula = dataset.attrs["formula"]
        if task.property == "eos":
            found.append(
                (task.name, f"E(V) of {formula}; points are own DFT.", _eos_figure(system, task.name, dataset))
            )
        elif task.property == "phonon":
            found.append((task.name, f"Phonons of {formula}.", _curves(dataset, "frequency", "frequency, THz")))
        else:
            found.append(
                (task.name, f"Spin spirals of {formula}.", _curves(dataset, "energy", "E(q) − E(0), meV/atom"))
            )
    return found


def _eos_figure(system: System, task: str, dataset: xr.Dataset) -> Figure:
    """E(V) of every state above the lowest; DFT points of the same states, above their own lowest."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    lowest = float(np.nanmin(dataset["energy"]))
    for k, state in enumerate(dataset["state"].values):
        energy = 1e3 * (dataset["energy"].sel(state=state) - lowest)
        axes.plot(dataset["volume"], energy, color=f"C{k}", label=str(state))
    points = _reference_points(system, task.removesuffix("-eos"))
    floor = min((energy for curve in points.values() for _, energy in curve), default=0.0)
    for k, state in enumerate(dataset["state"].values):
        curve = points.get(str(state), [])
        axes.plot([v for v, _ in curve], [1e3 * (e - floor) for _, e in curve], "o", color=f"C{k}")
    axes.set(xlabel="volume, Å³/atom", ylabel="energy, meV/atom")
    axes.legend()
    return figure


def _reference_points(system: System, crystal: str) -> dict[str, list[tuple[float, float]]]:
    """Volume and energy per atom of own DFT, by state."""
    path = system.folder / "references" / "dft.extxyz"
    points: dict[str, list[tuple[float, float]]] = {}
    if not path.exists():
        return points
    for atoms in ase.io.read(path, ":"):
        tag = str(atoms.info["parent"]).rsplit("-", 1)[0]
        if tag.startswith(f"{crystal}-") and tag.endswith("-eos"):
            state = tag.removeprefix(f"{crystal}-").removesuffix("-eos")
            point = (atoms.get_volume() / len(atoms), atoms.get_potential_energy() / len(atoms))
            points.setdefault("afm" if state.startswith("afm") else state, []).append(point)
    return points


def _curves(dataset: xr.Dataset, name: str, label: str) -> Figure:
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
    axes.axhline(0, color="0.7", linewidth=0.5)
    axes.set(xlabel="wave vector along the path, 1/Å", ylabel=label, xlim=(place[0], place[-1]))
    return figure
