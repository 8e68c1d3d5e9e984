"""Anisotropy of the model against the GPAW force-theorem labels, group by group, in a table.

`python benchmarks/FeAl/anisotropy_against_labels.py [-o benchmarks/FeAl/anisotropy.md] [--model M]`
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from mmace.calculator import MMACECalculator
from mmace.data import LabelledStructure, groups_of, read_labels, read_splits

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


def main() -> None:
    """Compare every group of the label files and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default=str(HERE / "anisotropy.md"))
    parser.add_argument("--model", default="default")
    options = parser.parse_args()
    calculator = MMACECalculator(options.model, soc=True)
    splits = read_splits(HERE / "splits.json")
    labels = read_labels(sorted((HERE / "data").glob("gpaw_soc*.extxyz")))
    lines = [
        "# Anisotropy: model against labels",
        "",
        f"Model `{options.model}`, SHA-256 `{calculator.provenance()['hash']}`.",
        "Energies in µeV/atom over the labelled directions at the labelled moments; range is the largest less the",
        "smallest energy, spread the committee's largest, r the correlation over directions. *easy* says whether the",
        "model's easiest direction lies within a tenth of the label's range of the label's easiest.",
        "Made by `python benchmarks/FeAl/anisotropy_against_labels.py`.",
    ]
    for part in ("test", "valid", "train"):
        groups = sorted(groups_of(splits.select(labels, part)), key=lambda group: group[0].parent)
        found = [(group[0].parent, compare(list(group), calculator)) for group in groups]
        lines += [
            "",
            f"## {part}",
            "",
            "| parent | DFT range | model range | spread | RMSE | r | easy |",
            "|---|---|---|---|---|---|---|",
        ]
        for parent, row in found:
            numbers = " | ".join(f"{row[key]:.1f}" for key in ("label_range", "model_range", "spread", "rmse"))
            easy_axis = "yes" if row["same_easy"] else "no"
            lines.append(f"| {parent} | {numbers} | {row['correlation']:.2f} | {easy_axis} |")
        rmse = np.sqrt(np.mean([row["rmse"] ** 2 for _, row in found]))
        median = np.median([row["rmse"] for _, row in found])
        easy = sum(row["same_easy"] for _, row in found)
        lines.append(
            f"\nAll {len(found)}: RMSE {rmse:.1f}, median {median:.1f} µeV/atom; easy direction right in {easy}."
        )
        print(part, lines[-1].strip())
    temporary = Path(f"{options.output}.tmp")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, options.output)


if __name__ == "__main__":
    main()
