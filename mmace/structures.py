"""Moments of ASE's structures."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike

from .errors import MomentError


def as_vectors(values: ArrayLike) -> np.ndarray:
    """Moments or magnetic forces as vectors: one number for each atom, shape (N,), is along z."""
    array = np.asarray(values, dtype=float)
    # an outer product would write -0.0, which digests of labels and jobs tell from 0.0
    return np.stack([np.zeros_like(array), np.zeros_like(array), array], axis=1) if array.ndim == 1 else array


def moments_of(atoms: Atoms) -> np.ndarray:
    """Moments of a structure as vectors.

    Parameters
    ----------
    atoms : Atoms
        Structure with ASE's `initial_magmoms`, shape (N,) meaning collinear along z, or (N, 3), in µB.

    Returns
    -------
    ndarray
        Moments, shape (N, 3), in µB.

    Raises
    ------
    MomentError
        The structure holds no moments, or they are not finite.
    """
    if not atoms.has("initial_magmoms"):
        raise MomentError(
            f"{atoms.get_chemical_formula()} holds no magnetic moments: give them with "
            "atoms.set_initial_magnetic_moments(...), zeros for a non-magnetic state."
        )
    moments = as_vectors(atoms.get_initial_magnetic_moments())
    check_moments(moments, len(atoms))
    return moments


def check_moments(moments: np.ndarray, n_atoms: int) -> None:
    """Raise MomentError unless `moments` has a trailing shape (n_atoms, 3) and is finite."""
    if moments.shape[-2:] != (n_atoms, 3):
        raise MomentError(
            f"moments have shape {moments.shape}, but {n_atoms} atoms need ({n_atoms}, 3): "
            "give one vector in µB for each atom."
        )
    bad = np.argwhere(~np.isfinite(moments))
    if len(bad):
        raise MomentError(f"the moment of atom {bad[0][-2]} is not finite: give every moment as a number in µB.")
