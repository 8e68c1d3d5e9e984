"""What each idea of the potential buys: the same labels and budget, one thing changed at a time.

`python benchmarks/ablations.py FeAl [--epochs N] [--work FOLDER] [-o results.json]` trains one model for each variant
with the default model's recipe and prints the errors on the test parents as a table. Each run is resumed where it was
stopped.

Without exact spin rotation, labels without spin-orbit coupling are trained at λ = 1 with their moments turned at
random, `TURNS` copies of each and as many epochs fewer, so that the model has to learn that nothing depends on the
turn; it is tested on copies turned in other ways.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy.spatial.transform import Rotation

from mmace.data import LabelledStructure, Splits, read_labels, read_splits
from mmace.files import whole_file
from mmace.training import Recipe, errors_of, predict, train

HERE = Path(__file__).parent
TURNS = 4
COLUMNS = (
    ("energy_rmse_meV_per_atom", "energy meV/atom"),
    ("energy_mae_meV_per_atom", "MAE"),
    ("forces_rmse_meV_per_A", "forces meV/Å"),
    ("stress_rmse_GPa", "stress GPa"),
    ("magnetic_forces_rmse_meV_per_muB", "magnetic forces meV/µB"),
    ("anisotropy_rmse_ueV_per_atom", "anisotropy µeV/atom"),
)


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes
    ----------
    name : str
        What was changed.
    model : dict
        Settings of the model that differ.
    fraction : float
        Part of the training parents that is used.
    turned : bool
        Spin rotation learned from turned copies.
    spin_orbit : bool
        Whether labels with spin-orbit coupling are used.
    """

    name: str
    model: dict[str, Any]
    fraction: float = 1.0
    turned: bool = False
    spin_orbit: bool = True


VARIANTS = (
    Variant("all", {}),
    Variant("without moments (a plain MACE)", {"magnetic": False}),
    Variant("without the exchange products", {"products": False}),
    Variant("without the spin-orbit part", {"spin_orbit": False}, spin_orbit=False),
    Variant("spin rotation learned, not exact", {}, turned=True),
    Variant("half of the training parents", {}, fraction=0.5),
    Variant("a quarter of the training parents", {}, fraction=0.25),
)


def turned(labels: Sequence[LabelledStructure], copies: int, seed: int) -> list[LabelledStructure]:
    """Labels without spin-orbit coupling as if they had it, all moments turned together; the others as they are."""
    rng = np.random.default_rng(seed)
    result = []
    for label in labels:
        if label.soc:
            result.append(label)
            continue
        for rotation in Rotation.random(copies, rng=rng).as_matrix():
            result.append(
                replace(
                    label,
                    moments=label.moments @ rotation.T,
                    magnetic_forces=label.magnetic_forces @ rotation.T,
                    soc=True,
                )
            )
    return result


def thinned(labels: Sequence[LabelledStructure], fraction: float) -> list[LabelledStructure]:
    """Labels of the first parents of a fixed random order."""
    parents = sorted({label.parent for label in labels})
    order = np.random.default_rng(0).permutation(len(parents))
    kept = {parents[k] for k in order[: round(fraction * len(parents))]}
    return [label for label in labels if label.parent in kept]


def run(
    variant: Variant, labels: Sequence[LabelledStructure], splits: Splits, recipe: Recipe, folder: Path
) -> dict[str, Any]:
    """Train a variant and test it."""
    parts = {part: splits.select(labels, part) for part in ("train", "valid", "test")}
    if not variant.spin_orbit:
        parts = {part: [label for label in some if not label.soc] for part, some in parts.items()}
    settings = replace(recipe, model={**recipe.model, **variant.model})
    parts["train"] = thinned(parts["train"], variant.fraction)
    if variant.fraction < 1:
        settings = replace(settings, epochs=round(settings.epochs / variant.fraction))
    if variant.turned:
        copies = {"train": TURNS, "valid": 1, "test": TURNS}
        parts = {part: turned(some, copies[part], seed) for seed, (part, some) in enumerate(parts.items())}
        settings = replace(settings, epochs=max(1, settings.epochs // TURNS), validate_every=2)
    settings = replace(settings, patience=settings.epochs)
    start = time.monotonic()
    outcome = train(parts["train"], parts["valid"], settings, folder)
    return {
        "variant": variant.name,
        "labels": len(parts["train"]),
        "minutes": (time.monotonic() - start) / 60,
        "test": errors_of(parts["test"], predict(copy.deepcopy(outcome.model).double(), parts["test"])).to_dict(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | training labels | " + " | ".join(title for _, title in COLUMNS) + " |",
        "|" + "---|" * (len(COLUMNS) + 2),
    ]
    for row in rows:
        cells = ["–" if row["test"][key] is None else f"{row['test'][key]:.1f}" for key, _ in COLUMNS]
        lines.append(f"| {row['variant']} | {row['labels']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train all variants and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system", choices=("FeAl", "CrN"))
    parser.add_argument("--epochs", type=int, default=60, help="epochs of the whole training set (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("ablations-work"), help="folder of the runs")
    parser.add_argument(
        "--only",
        type=int,
        nargs="+",
        metavar="K",
        help="train these lines of the table alone, from 1",
    )
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the results; the table is printed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = HERE / args.system
    labels = read_labels(sorted((folder / "data").glob("*.extxyz")))
    splits = read_splits(folder / "splits.json")
    recipe = replace(Recipe.from_dict(json.loads((HERE / "recipe.json").read_text())), epochs=args.epochs)
    console, rows = Console(stderr=True), []
    for number, variant in enumerate(VARIANTS):
        if args.only and number + 1 not in args.only:
            continue
        console.print(f"{number + 1}/{len(VARIANTS)} {variant.name}")
        rows.append(run(variant, labels, splits, recipe, args.work / args.system / str(number)))
    print(table(rows))
    if args.output:
        with whole_file(args.output) as temporary:
            temporary.write_text(json.dumps({"epochs": args.epochs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
