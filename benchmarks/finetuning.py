"""Fine-tuning on a new compound against training from scratch, for few labels and the same number of steps.

Pretraining sees the elements alone (Fe and Al); the new labels are FeAl with two atoms. Parents as in
`benchmarks/FeAl/splits.json`: labels of training parents train, those of validation parents select and judge.

    python benchmarks/finetuning.py --out DIR
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mmace.data import LabelledStructure, read_labels, read_splits
from mmace.files import whole_file
from mmace.training import Recipe, errors_of, predict, train
from mmace.training.finetune import finetune_recipe
from mmace.training.loop import Start

DATA = Path(__file__).parent / "FeAl"
SMALL = {"channels": 8, "max_ell": 2, "correlation": 2, "num_chebyshev": 3, "radial_mlp": (32, 32)}
BATCH = 5
KEYS = ("energy_rmse_meV_per_atom", "forces_rmse_meV_per_A", "magnetic_forces_rmse_meV_per_muB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--pretraining-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    labels = [x for x in read_labels(sorted(DATA.glob("data/*abinit*.extxyz"))) if x.anisotropy_group is None]
    splits = read_splits(DATA / "splits.json")
    old = [x for x in labels if len(set(x.symbols)) == 1]
    new = [x for x in labels if sorted(x.symbols) == ["Al", "Fe"]]
    old_train, new_train, new_valid = (
        splits.select(old, "train"),
        splits.select(new, "train"),
        splits.select(new, "valid"),
    )
    order = np.random.default_rng(0).permutation(len(new_train))
    first = replace(Recipe(model=SMALL, batch_size=BATCH, restrain_every=0, warmup_steps=20, ema=0.97), patience=10**6)
    pretrained = train(
        old_train,
        splits.select(old, "valid"),
        with_steps(first, len(old_train), args.pretraining_steps),
        args.out / "old",
    ).model
    slower = finetune_recipe({"recipe": json.dumps(first.to_dict())})
    rows = [row("pretrained", 0, pretrained, new_valid, old_train, 0.0)]
    for size in args.sizes:
        chosen = [new_train[k] for k in order[:size]]
        slow = with_steps(replace(slower, patience=10**6), len(chosen), args.steps)
        ways = {
            "scratch": (with_steps(first, len(chosen), args.steps), None),
            "fine-tuned": (slow, Start(pretrained)),
            "fine-tuned, replay": (
                with_steps(replace(slower, patience=10**6), 2 * len(chosen), args.steps),
                Start(pretrained, old_train, 0.5),
            ),
        }
        for name, (recipe, start) in ways.items():
            began = time.perf_counter()
            model = train(chosen, new_valid, recipe, args.out / f"{name}-{size}", start=start).model
            rows.append(row(name, len(chosen), model, new_valid, old_train, time.perf_counter() - began))
            with whole_file(args.out / "finetuning.json") as temporary:
                temporary.write_text(json.dumps({"settings": vars(args) | {"out": ""}, "rows": rows}, indent=1) + "\n")


def with_steps(recipe: Recipe, labels: int, steps: int) -> Recipe:
    """The recipe with the epochs that make about `steps` steps, validated some twenty times."""
    epochs = max(1, round(steps / -(-labels // recipe.batch_size)))
    return replace(recipe, epochs=epochs, validate_every=max(1, epochs // 20))


def row(
    name: str,
    size: int,
    model: torch.nn.Module,
    new: Sequence[LabelledStructure],
    old: Sequence[LabelledStructure],
    seconds: float,
) -> dict[str, object]:
    """Errors on the new compound's validation labels and on the labels of pretraining."""
    errors = {
        part: errors_of(labels, predict(model, labels)).to_dict() for part, labels in (("new", new), ("old", old))
    }
    found = {part: {key: errors[part][key] for key in KEYS} for part in errors}
    print(name, size, json.dumps(found), f"{seconds:.0f} s", flush=True)
    return {"way": name, "labels": size, "seconds": round(seconds), **found}


if __name__ == "__main__":
    main()
