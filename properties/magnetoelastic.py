"""Magnetoelastic constants and magnetostriction from finite strains of the anisotropy."""

from collections.abc import Callable

import numpy as np
import xarray as xr
from ase import Atoms
from numpy.typing import NDArray
from scipy.integrate import lebedev_rule

from .base import variable
from .conventions import GPA, MJ_PER_M3, VOIGT
from .protocol import STENCIL, SpinCalculator, pulled_back, strained, voigt_strain
from .stiffness import birch, from_six, lagrangian, voigt_rotation
from .symmetry import PatternSymmetry

Array = NDArray[np.float64]

DEGREE = 11

CUBIC = {
    "B1": ("MJ/m³", "magnetoelastic constant B1"),
    "B2": ("MJ/m³", "magnetoelastic constant B2"),
    "lambda100": ("1", "magnetostriction along [100]"),
    "lambda111": ("1", "magnetostriction along [111]"),
}
"""Magnetoelastic constants of a cubic lattice with units and long names."""

SOFTEST = 1e-6
"""Stiffness against the largest below which a lattice does not resist a strain."""


def magnetoelastic(
    atoms: Atoms,
    calculator: SpinCalculator,
    pattern_at: Callable[[Atoms], Array],
    energies: Callable[[Atoms, Array, Array], Array],
    symmetry: PatternSymmetry,
    step: float,
    tell: Callable[[int, int], None],
) -> dict[str, xr.Variable]:
    """Differentiate E(n) and the stress with respect to strain, ions moving with the cell.

    With ε in Voigt order (engineering shear) along the lattice axes x', y', z', the energy density is
    ``f = ½ Σ C_vw ε_v ε_w + Σ_v ε_v n·T_v·n`` with traceless T_v. In a cubic lattice T has two numbers:
    ``f = B1 Σ ε_a n_a² + B2 (ε_4 n_y n_z + ε_5 n_x n_z + ε_6 n_x n_y)``, and
    ``λ100 = -2/3 B1/(C11 - C12)``, ``λ111 = -1/3 B2/C44`` (Kittel, Rev. Mod. Phys. 21, 541 (1949)). T is a change of
    Cauchy's stress, so C are the stress-strain coefficients: the strain is that under a constant load.

    Parameters
    ----------
    atoms : the structure.
    calculator : a single model.
    pattern_at : gives the moments (N, 3) in µB of a strained structure.
    energies : gives E in eV of a structure with moments turned to directions (B, 3), shape (B,).
    symmetry : frame and system of the lattice.
    step : strain.
    tell : called with the strains done and their number.

    Returns
    -------
    Variables of a dataset: ``magnetoelastic_tensor`` (MJ/m³), ``magnetostriction_tensor``, ``elastic`` (GPa),
    and for cubic lattices ``B1``, ``B2`` (MJ/m³), ``lambda100``, ``lambda111``.
    """
    points, weights = lebedev_rule(DEGREE)
    local = points.T
    directions = local @ symmetry.frame
    volume = atoms.get_volume()
    slopes, stiffness = np.zeros((6, len(local))), np.zeros((6, 6))
    to_voigt = voigt_rotation(symmetry.frame)
    done = 0
    for v in range(6):
        for k, weight in STENCIL:
            strain = symmetry.frame.T @ voigt_strain(v, k * step) @ symmetry.frame
            cell = strained(atoms, strain)
            moments = pattern_at(cell)
            slopes[v] += weight / step * energies(cell, moments, directions) / volume
            gradient = pulled_back(calculator.strain_gradient(cell, moments), strain)
            stiffness[v] += weight / step * (to_voigt @ gradient) / volume
            done += 1
            tell(done, 6 * len(STENCIL))
    # The mean over directions, since the stress of one of them is what T adds.
    stress = from_six(np.average(slopes, axis=1, weights=weights))
    stiffness = birch(lagrangian((stiffness + stiffness.T) / 2, stress), stress)
    moment = np.einsum("b,vb,bx,by->vxy", weights, slopes, local, local) / weights.sum()
    tensors = 7.5 * (moment - np.trace(moment, axis1=1, axis2=2)[:, None, None] * np.eye(3) / 3)
    striction = np.full(tensors.shape, np.nan)
    if is_stable(stiffness):
        striction = -np.tensordot(np.linalg.inv(stiffness), tensors, axes=1)
    dims = ("strain", "frame_axis", "frame_axis_2")
    found = {
        "strain": variable("strain", np.array(["1", "2", "3", "4", "5", "6"]), "1", "Voigt strain along x', y', z'"),
        "frame_axis_2": variable("frame_axis_2", np.array(["x'", "y'", "z'"]), "1", "axis of the lattice"),
        "magnetoelastic_tensor": variable(
            dims, tensors * MJ_PER_M3, "MJ/m³", "magnetoelastic coupling T of f = Σ ε_v n·T_v·n, in the lattice's axes"
        ),
        "magnetostriction_tensor": variable(
            dims,
            striction,
            "1",
            "magnetostriction M of ε_v = n·M_v·n, in the lattice's axes; NaN where the lattice is not stable",
        ),
        "elastic": variable(
            ("strain", "strain_2"),
            stiffness * GPA,
            "GPa",
            "stress-strain coefficients, ions moving with the cell, lattice's axes",
        ),
        "strain_2": variable(
            "strain_2", np.array(["1", "2", "3", "4", "5", "6"]), "1", "Voigt strain along x', y', z'"
        ),
    }
    if symmetry.system == "cubic":
        cubic = cubic_constants(tensors, stiffness)
        for key, (units, text) in CUBIC.items():
            scale = MJ_PER_M3 if units == "MJ/m³" else 1.0
            found[key] = variable((), cubic[key] * scale, units, text)
    return found


def is_stable(stiffness: Array) -> bool:
    """Return whether every strain costs energy, so that a constant load leaves a strain that is finite."""
    values = np.linalg.eigvalsh(stiffness)
    return bool(values[0] > SOFTEST * np.abs(values).max())


def cubic_constants(tensors: Array, stiffness: Array) -> dict[str, float]:
    """Return B1, B2 and the magnetostriction of a cubic lattice.

    Parameters
    ----------
    tensors : T of each Voigt strain in the lattice's axes, shape (6, 3, 3), energy per volume.
    stiffness : in the lattice's axes and the same unit, shape (6, 6).

    Returns
    -------
    ``B1``, ``B2`` in the unit of T; ``lambda100``, ``lambda111``, NaN where the lattice is not stable.
    """
    first = float(np.mean([1.5 * tensors[a, a, a] for a in range(3)]))
    second = float(np.mean([2 * tensors[v, i, j] for v, (i, j) in enumerate(VOIGT) if v > 2]))
    c11, c44 = np.diag(stiffness)[:3].mean(), np.diag(stiffness)[3:].mean()
    c12 = (stiffness[0, 1] + stiffness[0, 2] + stiffness[1, 2]) / 3
    if not is_stable(stiffness):
        return {"B1": first, "B2": second, "lambda100": np.nan, "lambda111": np.nan}
    return {
        "B1": first,
        "B2": second,
        "lambda100": float(-2 / 3 * first / (c11 - c12)),
        "lambda111": float(-1 / 3 * second / c44),
    }


def projected(directions: Array, weights: Array, slopes: Array) -> Array:
    """Return T from the change of dE/dε with the direction of the moments.

    For ``g = n·T·n`` the mean over directions of ``s_a n_b + s_b n_a``, s the tangential derivative of g, is 4/5 T,
    and harmonics of other degrees drop out of it.

    Parameters
    ----------
    directions : unit vectors, one of each ±n, shape (B, 3).
    weights : of a quadrature, shape (B,).
    slopes : s of each Voigt strain, energy per volume, shape (6, B, 3).

    Returns
    -------
    T of each Voigt strain, traceless, shape (6, 3, 3).
    """
    mean = np.einsum("b,vba,bc->vac", weights, slopes, directions) / weights.sum()
    return 1.25 * (mean + mean.transpose(0, 2, 1))
