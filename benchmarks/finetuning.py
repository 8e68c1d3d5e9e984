"""Fine-tuning on a new compound against training from scratch, for few labels and the same number of steps.

`python benchmarks/finetuning.py [--seeds N] [--work FOLDER] [-o results.json]` pretrains on the elements alone (Fe and
Al) and goes on with labels of FeAl with two atoms, once for each seed, which draws the weights, the order and the
labels that are learned from. The validation parents of `benchmarks/FeAl/splits.json` choose the epoch; errors are those
on training parents that are set aside, the same ones for every seed, so nothing that is judged was learned from or
chose. The project's test parents are not read. Each run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from mmace.data import LabelledStructure, Splits, read_labels, read_splits
from mmace.files import whole_file
from mmace.model import MagneticMACE
from mmace.training import Recipe, errors_of, predict, train
from mmace.training.finetune import finetune_recipe
from mmace.training.loop import Start

DATA = Path(__file__).parent / "FeAl"
SMALL = {"channels": 8, "max_ell": 2, "correlation": 2, "num_chebyshev": 3, "radial_mlp": (32, 32)}
FIRST = Recipe(model=SMALL, batch_size=5, restrain_every=0, warmup_steps=20, ema=0.97, patience=10**6)
JUDGING = 40  # labels set aside
LARGEST_PARENT = 5  # labels; a larger parent would make most of what is set aside
VALIDATIONS = 20
SCRATCH, TUNED, REPLAYED = "from scratch", "fine-tuned", "fine-tuned, half of each epoch replayed"
KEYS = {
    "energy_rmse_meV_per_atom": "energy meV/atom",
    "forces_rmse_meV_per_A": "forces meV/Å",
    "magnetic_forces_rmse_meV_per_muB": "magnetic forces meV/µB",
}

Labels = list[LabelledStructure]


@dataclass(frozen=True)
class Study:
    """Labels by what they are for.

    Attributes
    ----------
    elements, elements_valid : list of LabelledStructure
        Fe and Al alone: what pretraining learns from, and what chooses its epoch.
    pool : list of LabelledStructure
        FeAl: what the new labels are drawn from.
    choosing, judging : list of LabelledStructure
        FeAl: what chooses the epoch, and what errors are measured on.
    """

    elements: Labels
    elements_valid: Labels
    pool: Labels
    choosing: Labels
    judging: Labels


def study_of(labels: Sequence[LabelledStructure], splits: Splits) -> Study:
    """Sort labels, all of them without spin-orbit coupling."""
    elements = [x for x in labels if len(set(x.symbols)) == 1]
    compound = [x for x in labels if sorted(x.symbols) == ["Al", "Fe"]]
    pool, judging = set_aside(splits.select(compound, "train"), JUDGING)
    return Study(
        elements=splits.select(elements, "train"),
        elements_valid=splits.select(elements, "valid"),
        pool=pool,
        choosing=splits.select(compound, "valid"),
        judging=judging,
    )


def set_aside(labels: Sequence[LabelledStructure], count: int) -> tuple[Labels, Labels]:
    """The labels left and at least `count` set aside, by parents in a fixed random order."""
    of_parent: dict[str, Labels] = {}
    for label in labels:
        of_parent.setdefault(label.parent, []).append(label)
    small = sorted(parent for parent, own in of_parent.items() if len(own) <= LARGEST_PARENT)
    aside: set[str] = set()
    for k in np.random.default_rng(0).permutation(len(small)):
        if sum(len(of_parent[parent]) for parent in aside) >= count:
            break
        aside.add(small[k])
    return [x for x in labels if x.parent not in aside], [x for x in labels if x.parent in aside]


def with_steps(recipe: Recipe, labels: int, steps: int) -> Recipe:
    """The recipe with the epochs that make about `steps` steps, validated some twenty times."""
    epochs = max(1, round(steps / -(-labels // recipe.batch_size)))
    return replace(recipe, epochs=epochs, validate_every=max(1, epochs // VALIDATIONS))


def rows_of_seed(
    study: Study, sizes: Sequence[int], pretraining_steps: int, steps: int, seed: int, work: Path
) -> list[dict[str, Any]]:
    """Train in every way with one seed and judge."""

    def trained(name: str, labels: Labels, valid: Labels, recipe: Recipe, start: Start | None) -> MagneticMACE:
        return train(labels, valid, recipe, work / f"seed-{seed}" / name, seed=seed, start=start).model

    first = with_steps(FIRST, len(study.elements), pretraining_steps)
    pretrained = trained("pretrained", study.elements, study.elements_valid, first, None)
    rows = [row("pretrained on the elements", 0, seed, pretrained, study)]
    order = np.random.default_rng(seed).permutation(len(study.pool))
    slower = replace(finetune_recipe({"recipe": json.dumps(FIRST.to_dict())}), patience=FIRST.patience)
    for size in sizes:
        labels = [study.pool[k] for k in order[:size]]
        ways: dict[str, tuple[Recipe, int, Start | None]] = {
            SCRATCH: (FIRST, size, None),
            TUNED: (slower, size, Start(pretrained)),
            REPLAYED: (slower, 2 * size, Start(pretrained, study.elements, 0.5)),
        }
        for name, (recipe, in_epoch, start) in ways.items():
            folder = f"{name.replace(',', '').replace(' ', '-')}-{size}"
            model = trained(folder, labels, study.choosing, with_steps(recipe, in_epoch, steps), start)
            rows.append(row(name, size, seed, model, study))
    return rows


def row(way: str, size: int, seed: int, model: MagneticMACE, study: Study) -> dict[str, Any]:
    """Errors on the labels of the compound that are set aside, and on those that pretraining learned from."""
    errors = {
        part: errors_of(labels, predict(model, labels)).to_dict()
        for part, labels in (("compound", study.judging), ("elements", study.elements))
    }
    return {"way": way, "labels": size, "seed": seed} | {
        part: {key: found[key] for key in KEYS} for part, found in errors.items()
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean over seeds, and lowest to highest, in Markdown."""
    titles = ["labels", "way", *KEYS.values(), "energy of the elements meV/atom"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for size, way in dict.fromkeys((r["labels"], r["way"]) for r in rows):
        seeds = [r for r in rows if (r["labels"], r["way"]) == (size, way)]
        cells = [over_seeds([r["compound"][key] for r in seeds]) for key in KEYS]
        # a model from scratch has not seen the elements, so it has nothing to forget
        elements = [r["elements"]["energy_rmse_meV_per_atom"] for r in seeds]
        cells.append("" if way == SCRATCH else over_seeds(elements))
        lines.append(f"| {size} | {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def over_seeds(values: Sequence[float], digits: int = 0) -> str:
    """Mean, and lowest to highest where there are several."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def study_results(study: Study, args: argparse.Namespace, report: Callable[[str], None]) -> dict[str, Any]:
    """Everything that goes into the results file, written after each seed."""
    result: dict[str, Any] = {
        "settings": {key: getattr(args, key) for key in ("sizes", "pretraining_steps", "steps", "seeds")},
        "counts": {name: len(labels) for name, labels in vars(study).items()},
        "judging_parents": sorted({label.parent for label in study.judging}),
        "rows": [],
    }
    for seed in range(args.seeds):
        report(f"seed {seed}, {seed + 1} of {args.seeds}")
        result["rows"] += rows_of_seed(study, args.sizes, args.pretraining_steps, args.steps, seed, args.work)
        if args.output:
            with whole_file(args.output) as temporary:
                temporary.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 50, 100], metavar="N", help="numbers of labels")
    parser.add_argument("--pretraining-steps", type=int, default=3000, metavar="N")
    parser.add_argument("--steps", type=int, default=1600, metavar="N", help="of each way (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("finetuning-work"), help="folder of the runs")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the results; the table is printed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    labels = [x for x in read_labels(sorted(DATA.glob("data/*abinit*.extxyz"))) if x.anisotropy_group is None]
    study = study_of(labels, read_splits(DATA / "splits.json"))
    if max(args.sizes) > len(study.pool):
        parser.error(f"--sizes asks for {max(args.sizes)} labels, but there are {len(study.pool)}.")
    print(table(study_results(study, args, Console(stderr=True).print)["rows"]))


if __name__ == "__main__":
    main()
