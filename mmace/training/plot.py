"""A picture of a training log."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..files import whole_file

PANELS = (
    ("energy_rmse_meV_per_atom", "energy, meV/atom"),
    ("forces_rmse_meV_per_A", "forces, meV/Å"),
    ("stress_rmse_GPa", "stress, GPa"),
    ("magnetic_forces_rmse_meV_per_muB", "magnetic forces, meV/µB"),
    ("anisotropy_rmse_ueV_per_atom", "anisotropy, µeV/atom"),
)


def plot_log(log: str | os.PathLike[str], picture: str | os.PathLike[str]) -> None:
    """Draw loss and validation errors against epochs.

    Parameters
    ----------
    log : path
        `log.jsonl` of a training run.
    picture : path
        PNG file to write.
    """
    records = [json.loads(line) for line in Path(log).read_text().splitlines()]
    epochs = [record["epoch"] for record in records]
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    axes[0].plot(epochs, [sum(record["train_loss"].values()) for record in records], label="training")
    axes[0].plot(
        epochs, [sum(record["valid_loss"].values()) for record in records], label="validation, averaged weights"
    )
    axes[0].set_title("loss")
    axes[0].legend(frameon=False)
    for axis, (key, title) in zip(axes[1:], PANELS, strict=True):
        values = [record["valid"][key] for record in records]
        axis.plot(epochs, [np.nan if value is None else value for value in values], color="tab:orange")
        axis.set_title(f"RMSE of {title}")
    for axis in axes:
        axis.set_yscale("log")
        axis.set_xlabel("epoch")
    with whole_file(picture) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
