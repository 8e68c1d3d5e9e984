"""Anisotropy of the model against the GPAW force-theorem labels, group by group, in a table.

`python benchmarks/anisotropy_against_labels.py FeAl CrN [--model M]` writes `benchmarks/*/anisotropy.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mmace.calculator import MMACECalculator
from mmace.data import LabelledStructure, groups_of, read_labels, read_splits
from mmace.files import whole_file

HERE = Path(__file__).parent


def compare(group: list[LabelledStructure], calculator: MMACECalculator) -> dict[str, float | bool]:
    """Energies about the mean over the labelled directions, at the labelled moments, µeV/atom."""
    n_atoms = len(group[0])
    labels = np.array([label.energy for label in group]) / n_atoms * 1e6
    moments = np.stack([label.moments for label in group])
    spins = [m.evaluate_spins(group[0].atoms(), moments, False)["energy"] / n_atoms * 1e6 for m in calculator.members]
    members = np.array([e - e.mean() for e in spins])
    labels = labels - labels.mean()
    model = members.mean(0)
    return {
        "label_range": float(np.ptp(labels)),
        "model_range": float(np.ptp(model)),
        "spread": float(members.std(0, ddof=1).max()) if len(members) > 1 else float("nan"),
        "rmse": float(np.sqrt(np.mean((model - labels) ** 2))),
        "correlation": float(np.corrcoef(labels, model)[0, 1]),
        "same_easy": bool(labels[np.argmin(model)] < labels.min() + 0.1 * np.ptp(labels)),
    }


def page(system: str, model: str) -> str:
    """Table of every group of directions of a system's labels, by part of the splits, in Markdown."""
    calculator = MMACECalculator(model, soc=True)
    folder = HERE / system
    splits = read_splits(folder / "splits.json")
    labels = read_labels(sorted((folder / "data").glob("gpaw_soc*.extxyz")))
    lines = [
        f"# Anisotropy: model against labels of {system}",
        "",
        f"Model `{model}`, SHA-256 `{calculator.provenance()['hash']}`.",
        "Energies in µeV/atom over the labelled directions at the labelled moments; range is the largest less the",
        "smallest energy, spread the committee's largest, r the correlation over directions. *easy* says whether the",
        "model's easiest direction lies within a tenth of the label's range of the label's easiest.",
        f"Made by `python benchmarks/anisotropy_against_labels.py {system}`.",
    ]
    for part in ("test", "valid", "train"):
        groups = sorted(groups_of(splits.select(labels, part)), key=lambda group: group[0].parent)
        lines += ["", f"## {part}", "", *table({group[0].parent: compare(list(group), calculator) for group in groups})]
    return "\n".join(lines) + "\n"


def table(found: dict[str, dict[str, float | bool]]) -> list[str]:
    """Lines of one part: a row for each parent, and what they come to."""
    if not found:
        return ["No groups."]
    lines = ["| parent | DFT range | model range | spread | RMSE | r | easy |", "|---|---|---|---|---|---|---|"]
    for parent, row in found.items():
        numbers = " | ".join(f"{row[key]:.1f}" for key in ("label_range", "model_range", "spread", "rmse"))
        lines.append(f"| {parent} | {numbers} | {row['correlation']:.2f} | {'yes' if row['same_easy'] else 'no'} |")
    errors = np.array([row["rmse"] for row in found.values()])
    easy = sum(row["same_easy"] for row in found.values())
    summary = f"RMSE {np.sqrt(np.mean(errors**2)):.1f}, median {np.median(errors):.1f} µeV/atom"
    return [*lines, "", f"All {len(found)}: {summary}; easy direction right in {easy}."]


def main() -> None:
    """Write the page of one system or more."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("systems", nargs="+", choices=["FeAl", "CrN"])
    parser.add_argument("--model", default="default")
    options = parser.parse_args()
    for system in options.systems:
        text = page(system, options.model)
        with whole_file(HERE / system / "anisotropy.md") as temporary:
            temporary.write_text(text)
        print(system, *(line for line in text.splitlines() if line.startswith("All ")), sep="\n")


if __name__ == "__main__":
    main()
