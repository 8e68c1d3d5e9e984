"""What each idea of the potential buys: the same labels and steps, one thing changed at a time.

`python benchmarks/ablations.py FeAl [--steps N] [--seeds N] [--work FOLDER] [-o results.json]` trains one model for
each variant and seed with the default model's recipe and prints the errors on the test parents as a table. Every
variant makes exactly N steps of as many labels, and of one anisotropy group where it has groups: labels are repeated
until they fill the steps, so fewer labels are seen more often. Validation chooses among as many averages of each
variant. A run that was stopped goes on where it was.

Nothing is restrained beyond the labels: the floor under shaken crystals and longer moments would give each variant
other knowledge besides its labels, and a model without moments less of it.

Without exact spin rotation, the features that couple moments to the lattice are as large as the others from the
start, and the labels without spin-orbit coupling are trained at λ = 1 with all their moments turned together at random,
each repeat in its own way: the model has to learn that nothing depends on the turn. It is tested on copies turned in
other ways, and compares with the line without the spin-orbit part, which has the same labels.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmace_bench.finetuning import over_seeds
from rich.console import Console
from scipy.spatial.transform import Rotation

from mmace.data import LabelledStructure, Splits, groups_of, read_labels, read_splits
from mmace.files import whole_file
from mmace.training import Recipe, errors_of, predict, train
from mmace.training.evaluate import Prediction

HERE = Path(__file__).parent
TURNS = 4  # of each label that tests learned spin rotation
ROUNDS = 4  # validations of a run
COLUMNS = (
    ("energy_rmse_meV_per_atom", "energy meV/atom"),
    ("energy_mae_meV_per_atom", "mean absolute"),
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
    Variant("without the spin-orbit part and its labels", {"spin_orbit": False}, spin_orbit=False),
    Variant(
        "the same labels, spin rotation learned from turned copies",
        {"spin_orbit_scale": 1.0},
        turned=True,
        spin_orbit=False,
    ),
    Variant("half of the training parents", {}, fraction=0.5),
    Variant("a quarter of the training parents", {}, fraction=0.25),
)


def single(labels: Sequence[LabelledStructure]) -> list[LabelledStructure]:
    """Labels that are in no anisotropy group."""
    return [label for label in labels if label.anisotropy_group is None]


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


def filled(labels: Sequence[LabelledStructure], steps: int, batch_size: int) -> list[LabelledStructure]:
    """Labels repeated in turn until they fill `steps` steps, and groups until there is one for each step."""
    rng = np.random.default_rng(0)
    alone, groups = single(labels), groups_of(labels)
    result = [alone[k] for k in repeats(len(alone), steps * batch_size, rng)]
    for copy_of, k in enumerate(repeats(len(groups), steps, rng) if groups else []):
        result += [replace(label, anisotropy_group=f"{label.anisotropy_group} {copy_of}") for label in groups[k]]
    return result


def repeats(count: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """`wanted` of `count` items, none of them more than once more than another."""
    orders = [rng.permutation(count) for _ in range(-(-wanted // count))]
    return np.concatenate(orders)[:wanted]


def run(
    variant: Variant,
    labels: Sequence[LabelledStructure],
    splits: Splits,
    recipe: Recipe,
    steps: int,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Train a variant from the random weights of a seed and test it."""
    parts = {part: splits.select(labels, part) for part in ("train", "valid", "test")}
    if not variant.spin_orbit:
        parts = {part: single(some) for part, some in parts.items()}
    known = thinned(parts["train"], variant.fraction)
    parts["train"] = filled(known, steps // ROUNDS, recipe.batch_size)
    if variant.turned:
        copies = {"train": 1, "valid": 1, "test": TURNS}
        parts = {part: turned(some, copies[part], k) for k, (part, some) in enumerate(parts.items())}
    settings = replace(
        recipe,
        model={**recipe.model, **variant.model},
        epochs=ROUNDS,
        validate_every=1,
        patience=ROUNDS,
        restrain_every=0,
    )
    outcome = train(parts["train"], parts["valid"], settings, folder, seed=seed)
    predicted = predict(copy.deepcopy(outcome.model).double(), parts["test"])
    errors = errors_of(parts["test"], predicted).to_dict()
    if not outcome.model.config.has_spin_orbit:
        errors["anisotropy_rmse_ueV_per_atom"] = None
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    groups = len(groups_of(known))
    return {
        "variant": variant.name,
        "seed": seed,
        "labels": len(single(known)),
        "groups": groups,
        "steps": last["step"],
        "label_passes": last["step"] * recipe.batch_size,
        "group_passes": last["step"] if groups else 0,
        "best_round": outcome.best_epoch,
        "minutes": last["minutes"],
        "change_when_turned_meV_per_atom": change_when_turned(parts["test"], predicted) if variant.turned else 0.0,
        "test": errors,
    }


def change_when_turned(labels: Sequence[LabelledStructure], predicted: Sequence[Prediction]) -> float:
    """Root mean square of energies about the mean over the copies of each label, meV/atom."""
    energies = np.array([p.energy / len(label) for label, p in zip(labels, predicted, strict=True)])
    return 1000 * float(np.sqrt(energies.reshape(-1, TURNS).var(axis=1, ddof=1).mean()))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean over seeds, and lowest to highest, in Markdown."""
    titles = ["model", "training labels, groups", *(title for _, title in COLUMNS)]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    changes = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        seeds = [row for row in rows if row["variant"] == name]
        found = [[row["test"][key] for row in seeds] for key, _ in COLUMNS]
        cells = ["" if None in values else over_seeds(values, 1) for values in found]
        lines.append(f"| {name} | {seeds[0]['labels']}, {seeds[0]['groups']} | " + " | ".join(cells) + " |")
        changes += [row["change_when_turned_meV_per_atom"] for row in seeds if row["change_when_turned_meV_per_atom"]]
    if changes:
        lines.append(f"\nEnergies change by {over_seeds(changes, 2)} meV/atom when all moments are turned.")
    sizes = [row["test"]["anisotropy_label_rms_ueV_per_atom"] for row in rows if row["test"]["n_groups"]]
    lines += [f"\nThe anisotropy labels have a root mean square of {size:.1f} µeV/atom." for size in sizes[:1]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train all variants and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system", choices=("FeAl", "CrN"))
    parser.add_argument("--steps", type=int, default=1000, help="of each variant (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repetitions (default %(default)s)")
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
    if args.steps < ROUNDS or args.steps % ROUNDS:
        parser.error(f"--steps is {args.steps}, but must be a multiple of {ROUNDS}.")
    torch.set_num_threads(1)
    folder = HERE / args.system
    labels = read_labels(sorted((folder / "data").glob("*.extxyz")))
    splits = read_splits(folder / "splits.json")
    recipe = Recipe.from_dict(json.loads((HERE / "recipe.json").read_text()))
    console = Console(stderr=True)
    result: dict[str, Any] = {"steps": args.steps, "rows": []}
    for seed, (number, variant) in itertools.product(range(args.seeds), enumerate(VARIANTS)):
        if args.only and number + 1 not in args.only:
            continue
        console.print(f"seed {seed}, {number + 1} of {len(VARIANTS)}: {variant.name}")
        work = args.work / args.system / f"{args.steps}-steps" / f"seed-{seed}" / str(number)
        result["rows"].append(run(variant, labels, splits, recipe, args.steps, seed, work))
        if args.output:
            with whole_file(args.output) as temporary:
                temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
