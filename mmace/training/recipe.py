"""Settings of a training run, read from JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ase.formula import Formula

from ..data import Composition, composition
from ..errors import MMACEError
from ..model import ModelConfig

MEASURED = ("elements", "moment_scale", "carriers", "atomic_energies", "energy_scale", "avg_num_neighbors")
REST = "others"
MODEL_SETTINGS = tuple(f.name for f in fields(ModelConfig) if f.name not in MEASURED)

PARTS = ("all", "spin_orbit")
BOUNDS: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (
        ("epochs", "batch_size", "groups_per_step", "validate_every", "canted_repeats", "patience"),
        lambda x: x >= 1,
        "at least 1",
    ),
    (("learning_rate", "clip"), lambda x: x > 0, "above 0"),
    (
        ("final_learning_rate", "warmup_steps", "weight_decay", "spin_orbit_decay", "restrain_every"),
        lambda x: x >= 0,
        "at least 0",
    ),
)


class RecipeError(MMACEError):
    """A recipe cannot be read or asks for something that does not exist."""


@dataclass(frozen=True)
class Tolerances:
    """Errors that count as one: the loss is quadratic below `outlier` of them and linear above.

    Attributes
    ----------
    energy : float
        eV/atom.
    forces : float
        eV/Å.
    stress : float
        eV/Å^3.
    magnetic_forces : float
        eV/µB.
    anisotropy : float
        Energy differences between directions, eV/atom.
    relative : float
        Added to the tolerances of derivatives, as a fraction of the label.
    relative_anisotropy : float
        Added to the tolerance of anisotropy, as a fraction of the group's root mean square.
    transverse : float
        Weight of magnetic forces across the moment; those of constrained non-collinear calculations are less exact.
    above_ground : float
        Growth of all tolerances of a structure but that of anisotropy, relative, for every eV/atom that its energy lies
        above the lowest training label of its composition: properties follow from the bottom of the surface.
    outlier : float
        Tolerances beyond which an error counts linearly.
    """

    energy: float = 0.002
    forces: float = 0.03
    stress: float = 0.003
    magnetic_forces: float = 0.015
    anisotropy: float = 2e-6
    relative: float = 0.02
    relative_anisotropy: float = 0.05
    transverse: float = 0.2
    above_ground: float = 0.0
    outlier: float = 5.0


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes
    ----------
    model : mapping
        Settings of the model that are not measured from the labels, such as `channels`, `max_ell`, `cutoff`.
    tolerances : Tolerances
        Weights of the loss.
    epochs : int
        Passes over the training labels; the learning rate falls to its end over them.
    batch_size : int
        Labels in one step.
    groups_per_step : int
        Largest number of anisotropy groups in one step.
    learning_rate, final_learning_rate : float
        Adam's, at the start and at the end of the cosine schedule.
    warmup_steps : int
        Steps over which the learning rate rises from zero.
    weight_decay : float
        Decoupled decay of the weights; the one-body energy has none.
    spin_orbit_decay : float
        The same for the spin-orbit features, of which labels determine fewer.
    clip : float
        Largest norm of the gradient.
    ema : float
        Memory of the exponential moving average of the weights; the averaged weights are the result.
    validate_every : int
        Epochs between validations.
    restrain_every : int
        Steps between those that restrain the surface beyond the labels; 0 never does.
    least_stiffness : float or mapping of str to float
        Curvature in eV/Å² by which the energy of randomly displaced atoms rises at least, one for all or one for each
        formula and one for the `others`; below that of the softest mode at the zone boundary, since the lowest point
        of a walk downhill is held.
    shake_weight : float or mapping of str to float
        Chance of each labelled crystal to be the one displaced, relative to others, one number or one for each formula
        and one for the `others`: more where the surface still falls below that floor.
    canted_repeats : int
        Times that an epoch holds each label whose moments are not all along one axis: such labels are dear and few, and
        energies between canted moments follow from nothing else.
    part : str
        Which weights change: `all`, or those of the `spin_orbit` part alone, which leaves everything that the model
        says without spin-orbit coupling as it is.
    restart : bool
        Begin that part with random weights of the seed: members of a committee that have learned from all labels do
        not differ by what each of them is shown afterwards.
    keep : str
        Which averaged weights are the result: `best` on the validation labels, or `last`, for few or noisy ones.
    patience : int
        Stop at the validation that comes more than this many epochs after the best one.
    dtype : str
        float64 or float32.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    tolerances: Tolerances = field(default_factory=Tolerances)
    epochs: int = 250
    batch_size: int = 6
    groups_per_step: int = 6
    learning_rate: float = 0.01
    final_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 3e-3
    spin_orbit_decay: float = 0.1
    clip: float = 100.0
    ema: float = 0.99
    validate_every: int = 5
    restrain_every: int = 2
    least_stiffness: float | Mapping[str, float] = 0.5
    shake_weight: float | Mapping[str, float] = 1.0
    canted_repeats: int = 1
    part: str = "all"
    restart: bool = False
    keep: str = "best"
    patience: int = 200
    dtype: str = "float64"

    def __post_init__(self) -> None:
        _check_types(asdict(self), Recipe, "the recipe's")
        _check_types(asdict(self.tolerances), Tolerances, "the recipe's tolerance")
        unknown = sorted(set(self.model) - set(MODEL_SETTINGS))
        if unknown:
            raise RecipeError(
                f"the recipe's model has no setting {unknown[0]}: choose among {', '.join(MODEL_SETTINGS)}."
            )
        _check_types(self.model, ModelConfig, "the recipe's model setting")
        try:
            ModelConfig(elements=(), moment_scale={}, carriers=(), **self.model)
        except ValueError as error:
            raise RecipeError(f"the recipe's model cannot be built: {error}") from None
        if self.part not in PARTS:
            raise RecipeError(f"the recipe trains the part {self.part}: choose {' or '.join(PARTS)}.")
        if self.restart and self.part == "all":
            raise RecipeError(
                "the recipe restarts all weights: use `mmace train`, or restart the part spin_orbit alone."
            )
        if self.keep not in ("best", "last"):
            raise RecipeError(f"the recipe keeps the {self.keep} weights: choose best or last.")
        if self.dtype not in ("float64", "float32"):
            raise RecipeError(f"the recipe's dtype is {self.dtype}: choose float64 or float32.")
        for names, holds, wanted in BOUNDS:
            for name in names:
                if not holds(getattr(self, name)):
                    raise RecipeError(f"the recipe's {name} is {getattr(self, name)}: it must be {wanted}.")
        for name in ("energy", "forces", "stress", "magnetic_forces", "anisotropy", "outlier"):
            if not getattr(self.tolerances, name) > 0.0:
                raise RecipeError(
                    f"the recipe's tolerance {name} is {getattr(self.tolerances, name)}: it must be above 0."
                )
        for name in ("relative", "relative_anisotropy", "transverse", "above_ground"):
            if not getattr(self.tolerances, name) >= 0.0:
                raise RecipeError(
                    f"the recipe's tolerance {name} is {getattr(self.tolerances, name)}: it must be at least 0."
                )
        if not 0.0 <= self.ema < 1.0:
            raise RecipeError(f"the recipe's ema is {self.ema}: it must be at least 0 and below 1.")
        for name in ("least_stiffness", "shake_weight"):
            _check_formulas(name, getattr(self, name))

    def stiffness_of(self, kind: Composition) -> float:
        """`least_stiffness` of a composition, eV/Å²."""
        return _of_formula(self.least_stiffness, kind)

    def shake_weight_of(self, kind: Composition) -> float:
        """`shake_weight` of a composition."""
        return _of_formula(self.shake_weight, kind)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; what is left out keeps its default.

        Raises
        ------
        RecipeError
            A setting does not exist or has an impossible value.
        """
        values = dict(settings)
        _check_names(values, cls, "the recipe")
        for name in ("tolerances", "model"):
            if not isinstance(values.get(name, {}), Mapping):
                raise RecipeError(f"the recipe's {name} is {values[name]!r}: give an object with settings.")
        tolerances = dict(values.get("tolerances", {}))
        _check_names(tolerances, Tolerances, "the recipe's tolerances")
        model = {k: tuple(v) if isinstance(v, list) else v for k, v in values.get("model", {}).items()}
        return cls(**{**values, "tolerances": Tolerances(**tolerances), "model": model})


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe, a JSON object with settings of `Recipe`.

    Raises
    ------
    RecipeError
        The file is missing or not JSON, or a setting does not exist.
    """
    file = Path(path)
    try:
        settings = json.loads(file.read_text())
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {file}: give an existing JSON file.") from None
    except OSError as error:
        raise RecipeError(f"the recipe {file} cannot be read ({error.strerror}): give another file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is not JSON ({error}): mend the recipe.") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"{file} does not hold a JSON object: mend the recipe.")
    return Recipe.from_dict(settings)


def _composition_of(formula: str) -> Composition:
    """Composition of a formula; empty for a text that is none."""
    try:
        return composition(Formula(formula))
    except ValueError:
        return frozenset()


def _of_formula(setting: float | Mapping[str, float], kind: Composition) -> float:
    """Number of a setting that has one for all compositions or one for each formula."""
    if not isinstance(setting, Mapping):
        return setting
    return next((value for key, value in setting.items() if _composition_of(key) == kind), setting[REST])


def _check_formulas(name: str, setting: Any) -> None:
    """Raise unless a setting is a number above 0, or one for each formula and one for the others."""
    if isinstance(setting, Mapping) and REST not in setting:
        raise RecipeError(f"the recipe's {name} has no {REST!r}: give the number for all other formulas.")
    for key, value in setting.items() if isinstance(setting, Mapping) else ((REST, setting),):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
            raise RecipeError(f"the recipe's {name} is {value!r}: give a number above 0, or one for each formula.")
        if key != REST and not _composition_of(key):
            raise RecipeError(f"the recipe's {name} has {key!r}: give formulas such as FeAl, or {REST!r}.")


def _check_types(values: Mapping[str, Any], settings: type, what: str) -> None:
    """Raise unless those of some settings that should be numbers, texts or rows of numbers are."""
    kinds: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
    for setting in fields(settings):
        if setting.name not in values:
            continue
        value, kind = values[setting.name], str(setting.type)
        if kind == "tuple[int, ...]" and not (isinstance(value, tuple) and all(type(x) is int for x in value)):
            raise RecipeError(f"{what} {setting.name} is {value!r}: give a list of whole numbers.")
        if kind in kinds and (isinstance(value, bool) != (kind == "bool") or not isinstance(value, kinds[kind])):
            wanted = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}[kind]
            raise RecipeError(f"{what} {setting.name} is {value!r}: give {wanted}.")
        if kind == "float" and not math.isfinite(value):
            raise RecipeError(f"{what} {setting.name} is {value}: give a finite number.")


def _check_names(values: Mapping[str, Any], kind: type, what: str) -> None:
    names = [f.name for f in fields(kind)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise RecipeError(f"{what} has no setting {unknown[0]}: choose among {', '.join(names)}.")
