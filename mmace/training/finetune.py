"""Fine-tuning: what a trained model needs before it goes on with other labels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..data import LabelledStructure, groups_of
from ..errors import LabelError, UnknownElementError
from ..model import MagneticMACE
from .evaluate import predict
from .recipe import Recipe

SLOWER = 10.0  # learning rate and clip against those of the training
EPOCHS, WARMUP = 100, 20
LEAST_STEPS = 1600  # as in benchmarks/finetuning.py; a hundred epochs of a few labels hardly move the weights
PATIENCE = 0.3  # of the epochs
OTHER_REFERENCE = 0.5  # eV/atom; energies further off on average are on another zero
SMALL_INDUCED = 0.1  # µB, below it a moment follows its neighbours and says nothing of its own
SHIFT_PRIOR = 1e-3  # keeps the shift of elements that no label determines at zero


def finetune_recipe(
    notes: Mapping[str, str], labels: Sequence[LabelledStructure] = (), replay_fraction: float = 0.0
) -> Recipe:
    """Recipe of a model's training, ten times slower and less patient; validation chooses the weights.

    It is that of the last stage that changed all weights, with a tenth of the largest learning rate and clip that any
    of these stages had, and with the usual small steps. Few labels are gone through more often. The floor under
    shaken crystals is the general one: that of the model's training was chosen for its own crystals. Nor are canted
    labels repeated as often as its own were.

    Parameters
    ----------
    notes : mapping
        Notes saved with the model; without a recipe in them the default one is taken.
    labels : sequence of LabelledStructure
        What is learned from.
    replay_fraction : float
        Share of replayed labels in an epoch.
    """
    stages = [notes, *reversed(json.loads(notes.get("earlier", "[]")))]
    recipes = [Recipe.from_dict(json.loads(stage["recipe"])) for stage in stages if "recipe" in stage]
    whole = [recipe for recipe in recipes if recipe.part == "all"] or [Recipe()]
    last, fastest = whole[0], max(whole, key=lambda recipe: recipe.learning_rate)
    batch_size = min(last.batch_size, Recipe.batch_size)
    groups_per_step = min(last.groups_per_step, Recipe.groups_per_step)
    single = sum(label.anisotropy_group is None for label in labels)
    steps = max(single / batch_size, len(groups_of(labels)) / groups_per_step) / (1.0 - replay_fraction)
    epochs = max(EPOCHS, math.ceil(LEAST_STEPS / math.ceil(steps))) if labels else EPOCHS
    return replace(
        last,
        model={},
        learning_rate=fastest.learning_rate / SLOWER,
        final_learning_rate=fastest.final_learning_rate / SLOWER,
        clip=max(recipe.clip for recipe in whole) / SLOWER,
        batch_size=batch_size,
        groups_per_step=groups_per_step,
        epochs=epochs,
        patience=round(PATIENCE * epochs),
        warmup_steps=WARMUP,
        validate_every=epochs // EPOCHS,
        canted_repeats=Recipe.canted_repeats,
        keep="best",
        least_stiffness=Recipe.least_stiffness,
        shake_weight=Recipe.shake_weight,
    )


def check_labels(model: MagneticMACE, labels: Sequence[LabelledStructure]) -> None:
    """Raise unless the model can learn from labels.

    Raises
    ------
    UnknownElementError
        An element that the model has no weights for.
    LabelError
        A moment beyond the model's range or on an element without moments, or spin-orbit labels for a model without
        spin-orbit coupling.
    """
    for label in labels:
        new = sorted(set(label.symbols) - set(model.elements))
        if new:
            raise UnknownElementError(
                f"{label.name} holds {new[0]}, for which the model has no weights ({', '.join(model.elements)}): "
                "train a model on these labels and the old ones together with `mmace train`."
            )
        for symbol, moment in zip(label.symbols, np.linalg.norm(label.moments, axis=1), strict=True):
            if symbol not in model.config.carriers and moment > SMALL_INDUCED:
                raise LabelError(
                    f"{label.name} has {moment:.2f} µB on {symbol}, whose moments the model does not know (it has "
                    f"{', '.join(model.config.carriers)}): set them to zero in the labels, or train a model on these "
                    "labels and the old ones together with `mmace train`."
                )
            limit = model.config.moment_scale[symbol]
            if symbol in model.config.carriers and moment > limit:
                raise LabelError(
                    f"{label.name} has {moment:.2f} µB on {symbol}, beyond the model's range of {limit:.2f} µB: "
                    "train a model on these labels and the old ones together with `mmace train`."
                )
        if label.soc and not model.config.has_spin_orbit:
            raise LabelError(
                f"{label.name} has spin-orbit coupling, which the model is without: leave such labels out or train a "
                "model with `mmace train`."
            )


def energy_shifts(model: MagneticMACE, labels: Sequence[LabelledStructure]) -> tuple[dict[str, float], float]:
    """Changes of the energies of single atoms that bring the model to the labels' zero of energy.

    Parameters
    ----------
    model : MagneticMACE
        The potential.
    labels : sequence of LabelledStructure
        Training labels; those of anisotropy groups have no absolute energy and are left out.

    Returns
    -------
    shifts : dict
        eV for each element; least squares of the model's errors on the compositions, zero where nothing determines it.
    offset : float
        Median of the absolute error before, eV/atom.
    """
    usable = [label for label in labels if np.isfinite(label.energy) and label.anisotropy_group is None]
    if not usable:
        return dict.fromkeys(model.elements, 0.0), 0.0
    predicted = predict(model, usable)
    error = np.array([(x.energy - p.energy) / len(x) for x, p in zip(usable, predicted, strict=True)])
    content = np.array([[label.symbols.count(z) / len(label) for z in model.elements] for label in usable])
    # centred: elements share an offset that their composition does not determine
    mean = float(np.median(error))
    prior = SHIFT_PRIOR * np.eye(len(model.elements))
    solution = np.linalg.lstsq(
        np.concatenate([content, prior]), np.concatenate([error - mean, np.zeros(len(prior))]), rcond=None
    )[0]
    present = content.sum(0) > 0
    shifts = {z: float(s + mean) if p else 0.0 for z, s, p in zip(model.elements, solution, present, strict=True)}
    return shifts, float(np.median(np.abs(error)))


def shifted(model: MagneticMACE, shifts: Mapping[str, float]) -> MagneticMACE:
    """The same potential with other energies of single atoms, eV."""
    energies = {z: model.config.atomic_energies.get(z, 0.0) + shifts.get(z, 0.0) for z in model.elements}
    other = MagneticMACE(replace(model.config, atomic_energies=energies)).to(model.dtype)
    other.load_state_dict(model.state_dict())
    return other.to(model.device).requires_grad_(False).eval()


def starting_model(
    model: MagneticMACE, labels: Sequence[LabelledStructure], shift: bool, replay: Sequence[LabelledStructure]
) -> MagneticMACE:
    """The model that fine-tuning on `labels` starts from.

    Parameters
    ----------
    model : MagneticMACE
        As it was trained.
    labels : sequence of LabelledStructure
        New training labels.
    shift : bool
        Fit the energies of single atoms to the new labels' zero of energy.
    replay : sequence of LabelledStructure
        Old labels to be learned along, on the old zero.

    Raises
    ------
    LabelError
        The labels are on another zero of energy and `shift` is off, or it is on beside replayed labels.
    UnknownElementError
        An element that the model does not know.
    """
    check_labels(model, [*labels, *replay])
    if shift and replay:
        raise LabelError(
            "--shift-energies moves the zero of energy away from that of the replayed labels: give only one of the two."
        )
    shifts, offset = energy_shifts(model, labels)
    if shift:
        return shifted(model, shifts)
    if offset > OTHER_REFERENCE:
        raise LabelError(
            f"the labels' energies are {offset:.2f} eV/atom off the model's, so they count from another zero: give "
            "--shift-energies, or labels of the recipe that the model was trained on."
        )
    return model
