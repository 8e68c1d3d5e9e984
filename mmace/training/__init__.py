"""Loss, training loop, evaluation."""

from .evaluate import Errors, Prediction, errors_of, mean_prediction, predict, report, spread_calibration, table
from .loop import Outcome, train
from .plot import plot_log
from .recipe import Recipe, RecipeError, Tolerances, read_recipe
from .setup import initial_model

__all__ = [
    "Errors",
    "Outcome",
    "Prediction",
    "Recipe",
    "RecipeError",
    "Tolerances",
    "errors_of",
    "initial_model",
    "mean_prediction",
    "plot_log",
    "predict",
    "read_recipe",
    "report",
    "spread_calibration",
    "table",
    "train",
]
