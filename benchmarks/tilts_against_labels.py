"""Energy of tilted sublattices against the parallel state: model and non-collinear labels of iron, in a table.

`python benchmarks/tilts_against_labels.py [--model M]` writes `benchmarks/FeAl/tilts.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmace.calculator import MMACECalculator
from mmace.data import LabelledStructure, read_labels, read_splits
from mmace.files import whole_file

SYSTEM = Path(__file__).parent / "FeAl"
SAME_LENGTH = 5e-3  # Å
SAME_MOMENT = 5e-3  # µB
SAME_DIRECTION = 1.0  # degrees


@dataclass(frozen=True)
class Tilt:
    """A label of two equal moments at an angle, and the label of one cell and mesh where they are parallel.

    Attributes
    ----------
    label, parallel : LabelledStructure
        The two states; their difference is free of what meshes of different cells differ by.
    angle : float
        Between the two moments, degrees.
    """

    label: LabelledStructure
    parallel: LabelledStructure
    angle: float

    @property
    def energy(self) -> float:
        """Energy of the label above the parallel state, meV/atom."""
        return (self.label.energy - self.parallel.energy) / len(self.label) * 1e3

    def energies_of(self, calculator: MMACECalculator) -> np.ndarray:
        """The same of each member of a committee, shape (M,), meV/atom."""
        moments = np.stack([self.label.moments, self.parallel.moments])
        spins = [m.evaluate_spins(self.label.atoms(), moments, False)["energy"] for m in calculator.members]
        return np.array([tilted - parallel for tilted, parallel in spins]) / len(self.label) * 1e3

    @property
    def stiffness_factor(self) -> float:
        """1 − cos of the angle, by which a Heisenberg model's energies go."""
        return float(1.0 - np.cos(np.radians(self.angle)))


def angle_between(moments: np.ndarray) -> float:
    """Angle between two moments, shape (2, 3), degrees."""
    first, second = moments / np.linalg.norm(moments, axis=1, keepdims=True)
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(first, second)), first @ second)))


def tilts(labels: Sequence[LabelledStructure], ends: Sequence[LabelledStructure]) -> list[Tilt]:
    """Labels of two equal tilted moments whose parallel state is among `ends`, by cell and angle."""
    parallel = [end for end in ends if angle_between(end.moments) < SAME_DIRECTION]
    found = []
    for label in labels:
        lengths = np.linalg.norm(label.moments, axis=1)
        if len(label) != 2 or abs(lengths[0] - lengths[1]) > SAME_MOMENT:
            continue
        angle = angle_between(label.moments)
        for end in parallel:
            same_cell = end.symbols == label.symbols and np.allclose(end.cell, label.cell, atol=SAME_LENGTH)
            same_length = abs(np.linalg.norm(end.moments[0]) - lengths[0]) < SAME_MOMENT
            if same_cell and same_length and angle > SAME_DIRECTION:
                found.append(Tilt(label, end, angle))
    return sorted(found, key=lambda tilt: (tilt.label.parent, tilt.angle))


def page(model: str) -> str:
    """Table of every tilt, in Markdown."""
    calculator = MMACECalculator(model)
    splits = read_splits(SYSTEM / "splits.json")
    ends = read_labels([SYSTEM / "checks" / "canted_ends.extxyz"])
    labels = read_labels(sorted((SYSTEM / "data").glob("abinit_noncollinear*.extxyz")))
    lines = [
        "# Tilted moments: model against labels of Fe",
        "",
        f"Model `{model}`, SHA-256 `{calculator.provenance()['hash']}`.",
        "Energies above the parallel state in meV/atom at the labelled moments, volume in Å³/atom, moment in µB,",
        "angle θ between the sublattices in degrees. Both states have one cell and one mesh. A Heisenberg model has",
        "one energy over 1 − cos θ in each cell: with first and second neighbours 8 J1 in the cubic cell (`bcc`, `H`)",
        "and 4 J1 + 4 J2 between layers along [110] (`N`), with J as `mmace-props exchange` counts it.",
        "Made by `python benchmarks/tilts_against_labels.py`.",
        "",
        "| label | part | volume | moment | θ | DFT | model | DFT/(1 − cos θ) | model/(1 − cos θ) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    deviations: dict[str, list[float]] = {}
    for tilt in tilts(labels, ends):
        members = tilt.energies_of(calculator)
        mean, spread, factor = members.mean(), members.std(ddof=1), tilt.stiffness_factor
        volume = abs(np.linalg.det(tilt.label.cell)) / len(tilt.label)
        moment = np.linalg.norm(tilt.label.moments[0])
        part = splits.part_of(tilt.label)
        deviations.setdefault(part, []).append(mean - tilt.energy)
        lines.append(
            f"| {tilt.label.name} | {part} | {volume:.2f} | {moment:.1f} | {tilt.angle:.0f} | "
            f"{tilt.energy:.1f} | {mean:.1f} ± {spread:.1f} | {tilt.energy / factor:.0f} | {mean / factor:.0f} |"
        )
    errors = [f"{len(some)} of {part} {np.sqrt(np.mean(np.square(some))):.1f}" for part, some in deviations.items()]
    return "\n".join([*lines, "", f"Root mean square errors in meV/atom: {', '.join(errors)}."]) + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="default")
    text = page(parser.parse_args().model)
    with whole_file(SYSTEM / "tilts.md") as temporary:
        temporary.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
