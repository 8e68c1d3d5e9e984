"""`mmace train`, `mmace finetune` and `mmace eval`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import __version__
from ..data import LabelledStructure, Splits, read_labels, read_splits
from ..errors import LabelError, MMACEError
from ..files import refuse_inputs, whole_file
from ..io import file_hash, load_model, model_files, read_metadata
from .distributed import Processes, process_group
from .evaluate import predict, report, table
from .finetune import finetune_recipe, starting_model
from .loop import Outcome, Start, train
from .plot import plot_log
from .recipe import PARTS, Recipe, read_recipe

REPLAYED = 0.5  # share of an epoch
STAGE_NOTES = ("mmace_version", "recipe", "seed", "bootstrap", "labels", "replay", "finetuned_from", "best_epoch")


@dataclass(frozen=True)
class _Member:
    """What trains one model: settings, where it starts from, and notes that are stored with it."""

    recipe: Recipe
    start: Start | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("a seed is a whole number that is not negative")
    return int(text)


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Register `mmace train`, `mmace finetune` and `mmace eval`."""
    fit = subparsers.add_parser(
        "train",
        help="train a model or a committee on labels",
        description="Train on labels in extended XYZ. A stopped run goes on where it was, to the same numbers.",
    )
    _add_label_options(fit)
    fit.add_argument("--recipe", metavar="FILE", help="settings as JSON (default: those of mmace.training.Recipe)")
    fit.add_argument("--seed", type=_seed, default=0, help="of weights and order (default %(default)s)")
    fit.add_argument(
        "--members", type=int, default=1, help="committee of one model for each of so many seeds (default %(default)s)"
    )
    fit.set_defaults(run=_train)

    tune = subparsers.add_parser(
        "finetune",
        help="train a model or a committee further on other labels",
        description="Go on from trained weights, ten times slower; each member of a committee is a run of its own.",
    )
    tune.add_argument(
        "--from", dest="model", default="default", metavar="MODEL", help="shipped name or file (default: %(default)s)"
    )
    _add_label_options(tune)
    tune.add_argument("--recipe", metavar="FILE", help="settings as JSON (default: the model's own, ten times slower)")
    tune.add_argument("--part", choices=PARTS, help="weights to change (default: the recipe's choice, or all)")
    tune.add_argument("--seed", type=_seed, default=0, help="of the order of labels (default %(default)s)")
    tune.add_argument("--replay", nargs="+", metavar="FILE", default=[], help="labels that must not be forgotten")
    tune.add_argument("--replay-splits", nargs="+", metavar="FILE", help="replay the training parents of these alone")
    tune.add_argument(
        "--replay-fraction", type=float, metavar="X", help=f"their share of an epoch (default {REPLAYED})"
    )
    tune.add_argument("--shift-energies", action="store_true", help="fit the atoms' energies to another zero of energy")
    tune.set_defaults(run=_finetune)

    check = subparsers.add_parser(
        "eval",
        help="errors of a model or committee on labels",
        description="Compare a model with labels: errors over all of them, for each part of the splits and parent.",
    )
    check.add_argument("labels", nargs="+", metavar="FILE", help="labels in extended XYZ")
    check.add_argument(
        "--model", default="default", help="shipped name, .safetensors or committee .json (default: %(default)s)"
    )
    check.add_argument("--splits", nargs="+", metavar="FILE", help="report each part of these splits too")
    check.add_argument("--json", metavar="FILE", help="write the errors there")
    _add_machine_options(check)
    check.set_defaults(run=_evaluate)


def _add_label_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--train",
        nargs="+",
        required=True,
        metavar="FILE",
        help="labels to train on; those of a file that is named twice count twice, but for anisotropy groups",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--valid", nargs="+", metavar="FILE", help="labels that select the best weights")
    source.add_argument(
        "--splits", nargs="+", metavar="FILE", help="JSON with the parents to train on, validate on and leave alone"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for model, checkpoint and log")
    parser.add_argument("--bootstrap", action="store_true", help="draw the training parents with replacement")
    parser.add_argument(
        "--max-minutes", type=float, metavar="M", help="stop each model after so long; run again to go on"
    )
    _add_machine_options(parser)


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


def _train(args: argparse.Namespace) -> int:
    _set_machine(args)
    if args.members < 1:
        raise MMACEError(f"--members is {args.members}: give at least 1.")
    recipe = read_recipe(args.recipe) if args.recipe else Recipe()
    train_labels, valid_labels = _labels(args)
    with process_group(args.device) as (processes, args.device):
        runs = [_Member(recipe)] * args.members
        return _train_all(args, runs, train_labels, valid_labels, processes)


def _finetune(args: argparse.Namespace) -> int:
    _set_machine(args)
    for name in ("replay_splits", "replay_fraction"):
        if getattr(args, name) is not None and not args.replay:
            raise MMACEError(f"--{name.replace('_', '-')} is for replayed labels: give them with --replay.")
    replay_fraction = REPLAYED if args.replay_fraction is None else args.replay_fraction
    if not 0.0 <= replay_fraction < 1.0:
        raise MMACEError(f"--replay-fraction is {replay_fraction}: give at least 0 and below 1.")
    train_labels, valid_labels = _labels(args)
    replay = read_labels(args.replay) if args.replay else []
    if args.replay_splits:
        replay = read_splits(args.replay_splits).select(replay, "train")
    test_parents = read_splits(args.splits).test if args.splits else frozenset()
    _check_replay(replay, {label.parent for label in valid_labels} | test_parents)
    fraction = replay_fraction if replay else 0.0
    runs = []
    for file in model_files(args.model):
        model, earlier = (
            starting_model(load_model(file), train_labels, args.shift_energies, replay),
            read_metadata(file),
        )
        recipe = read_recipe(args.recipe) if args.recipe else finetune_recipe(earlier, train_labels, fraction)
        if args.part:
            recipe = replace(recipe, part=args.part)
        notes = {
            "finetuned_from": json.dumps({file.name: file_hash(file)}),
            "earlier": json.dumps(_stages(earlier)),
            "replay": json.dumps(_hashes(args.replay) | {"fraction": fraction}),
        }
        runs.append(_Member(recipe, Start(model, replay, fraction), notes))
    with process_group(args.device) as (processes, args.device):
        return _train_all(args, runs, train_labels, valid_labels, processes)


def _check_replay(replay: Sequence[LabelledStructure], held_out: Set[str]) -> None:
    """Raise where a parent that validates or tests would be replayed."""
    both = sorted(held_out & {label.parent for label in replay})
    if both:
        raise LabelError(
            f"the parent {both[0]} is replayed, but validates or tests: leave its labels out, or give the splits that "
            "it belongs to as --replay-splits."
        )


def _stages(notes: Mapping[str, str]) -> list[dict[str, Any]]:
    """Recipes, seeds and labels of all trainings that led to a model with these notes, the first one first."""
    own = {name: notes[name] for name in STAGE_NOTES if name in notes}
    return [*json.loads(notes.get("earlier", "[]")), own]


def _labels(args: argparse.Namespace) -> tuple[list[LabelledStructure], list[LabelledStructure]]:
    """Labels to train and to validate on."""
    labels = read_labels(args.train)
    if args.splits:
        splits = read_splits(args.splits)
        return splits.select(labels, "train"), splits.select(labels, "valid")
    valid_labels = read_labels(args.valid)
    Splits(
        frozenset(x.parent for x in labels), frozenset(x.parent for x in valid_labels), frozenset()
    )  # raises where a parent is in both
    return labels, valid_labels


def _train_all(
    args: argparse.Namespace,
    runs: Sequence[_Member],
    train_labels: Sequence[LabelledStructure],
    valid_labels: Sequence[LabelledStructure],
    processes: Processes,
) -> int:
    """Train one model for each of `runs`, and list them as a committee if there are several."""
    out = _writable_folder(args.out)
    console = Console(quiet=not processes.first)
    console.print(f"{len(train_labels)} labels to train on, {len(valid_labels)} to validate on.")
    notes = {
        "mmace_version": __version__,
        "labels": json.dumps(_hashes([*args.train, *(args.valid or [])])),
    }
    for number, member in enumerate(runs):
        folder = out if len(runs) == 1 else out / f"member-{number}"
        own_notes = {**notes, **member.notes, "recipe": json.dumps(member.recipe.to_dict())}
        outcome = _train_one(args, member, train_labels, valid_labels, folder, args.seed + number, own_notes, console)
        if not processes.first:
            continue
        if (folder / "log.jsonl").stat().st_size:
            plot_log(folder / "log.jsonl", folder / "log.png")
        state = "finished" if outcome.finished else "stopped; the same command goes on"
        console.print(
            f"{folder / 'model.safetensors'}: {state}, epoch {outcome.epoch} of {member.recipe.epochs}, "
            + (
                "none better than the start."
                if member.start and not outcome.best_epoch
                else f"best at {outcome.best_epoch}."
            )
        )
    if len(runs) > 1 and processes.first:
        files = [f"member-{k}/model.safetensors" for k in range(len(runs))]
        _write_json(out / "committee.json", {"members": files})
        console.print(f"{out / 'committee.json'}: {len(runs)} members.")
    return 0


def _train_one(
    args: argparse.Namespace,
    member: _Member,
    train_labels: Sequence[LabelledStructure],
    valid_labels: Sequence[LabelledStructure],
    folder: Path,
    seed: int,
    notes: dict[str, str],
    console: Console,
) -> Outcome:
    columns = (
        TextColumn("seed {task.fields[seed]}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[errors]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=member.recipe.epochs, seed=seed, errors="")

        def show(record: dict[str, Any]) -> None:
            progress.update(task, completed=record["epoch"], errors=_short(record["valid"]))

        return train(
            train_labels,
            valid_labels,
            member.recipe,
            folder,
            seed=seed,
            bootstrap=args.bootstrap,
            max_minutes=args.max_minutes,
            device=args.device,
            metadata=notes,
            report=show,
            start=member.start,
        )


def _short(errors: dict[str, Any]) -> str:
    """Validation errors in one line."""
    parts = (
        ("E", "energy_rmse_meV_per_atom", "meV/at"),
        ("F", "forces_rmse_meV_per_A", "meV/Å"),
        ("H", "magnetic_forces_rmse_meV_per_muB", "meV/µB"),
        ("K", "anisotropy_rmse_ueV_per_atom", "µeV/at"),
    )
    return " ".join(f"{name} {errors[key]:.3g} {unit}" for name, key, unit in parts if errors[key] is not None)


def _evaluate(args: argparse.Namespace) -> int:
    _set_machine(args)
    if args.json:
        _writable_folder(Path(args.json).parent, create=False)
        if Path(args.json).is_dir():
            raise MMACEError(f"{args.json} is a folder: give a file for the errors.")
    labels = read_labels(args.labels)
    splits = read_splits(args.splits) if args.splits else None
    files = model_files(args.model)
    if args.json:
        refuse_inputs(args.json, [*args.labels, *(args.splits or []), *files, args.model])
    models = [load_model(file, device=args.device) for file in files]
    if len({model.elements for model in models}) > 1:
        raise MMACEError("the members of the committee differ in elements: use models of one kind.")
    predictions = [predict(model, labels) for model in models]
    results = report(labels, predictions, splits.part_of if splits else None)
    print(table(results))
    if args.json:
        results["model"] = _hashes(files)
        results["labels"] = _hashes(args.labels)
        _write_json(Path(args.json), results)
    return 0


def _hashes(paths: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """SHA-256 of files by the shortest ends of their paths that tell all of them apart."""
    files = [Path(path).resolve() for path in dict.fromkeys(paths)]
    length = 1
    while len({file.parts[-length:] for file in files}) < len(set(files)):
        length += 1
    return {"/".join(file.parts[-length:]): file_hash(file) for file in files}


def _set_machine(args: argparse.Namespace) -> None:
    if args.threads is not None:
        if args.threads < 1:
            raise MMACEError(f"--threads is {args.threads}: give at least 1.")
        torch.set_num_threads(args.threads)
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise MMACEError(f"the device {args.device} cannot be used ({reason}): choose another --device.") from None


def _writable_folder(path: str | os.PathLike[str], create: bool = True) -> Path:
    folder = Path(path)
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MMACEError(f"the folder {folder} cannot be made ({error.strerror}): choose another.") from None
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise MMACEError(f"nothing can be written to the folder {folder}: choose another.")
    return folder


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
