"""Elastic tensors: their Voigt form, and the constants of a crystal under stress."""

import numpy as np
from numpy.typing import NDArray

from .conventions import VOIGT

Array = NDArray[np.float64]


def from_six(six: Array) -> Array:
    """Return the symmetric tensor, shape (3, 3), of components in Voigt order that are not doubled."""
    tensor = np.zeros((3, 3))
    for value, (i, j) in zip(six, VOIGT, strict=True):
        tensor[i, j] = tensor[j, i] = value
    return tensor


def to_six(tensor: Array) -> Array:
    """Return a symmetric tensor in Voigt order, shape (6,)."""
    return np.array([tensor[i, j] for i, j in VOIGT])


def voigt_rotation(frame: Array) -> Array:
    """Return the matrix that takes stress-like Voigt components to the axes of the frame, shape (6, 6)."""
    matrix = np.zeros((6, 6))
    for w, (i, j) in enumerate(VOIGT):
        tensor = np.zeros((3, 3))
        tensor[i, j] = tensor[j, i] = 1.0
        turned = frame @ tensor @ frame.T
        matrix[:, w] = [turned[a, b] for a, b in VOIGT]
    return matrix


def to_tensor(matrix: Array) -> Array:
    """Return a stiffness in Voigt form (6, 6) as a tensor, shape (3, 3, 3, 3)."""
    tensor = np.zeros((3, 3, 3, 3))
    for v, (i, j) in enumerate(VOIGT):
        for w, (k, m) in enumerate(VOIGT):
            tensor[i, j, k, m] = tensor[j, i, k, m] = tensor[i, j, m, k] = tensor[j, i, m, k] = matrix[v, w]
    return tensor


def to_voigt(tensor: Array) -> Array:
    """Return a stiffness tensor in Voigt form, shape (6, 6)."""
    return np.array([[tensor[i, j, k, m] for k, m in VOIGT] for i, j in VOIGT])


def _mixed(stress: Array) -> Array:
    """Return ``σ_ik δ_jl + σ_il δ_jk + σ_jk δ_il + σ_jl δ_ik``, shape (3, 3, 3, 3)."""
    one = np.eye(3)
    terms = ("ik,jl->ijkl", "il,jk->ijkl", "jk,il->ijkl", "jl,ik->ijkl")
    return np.sum([np.einsum(term, stress, one) for term in terms], axis=0)


def lagrangian(second: Array, stress: Array) -> Array:
    """Turn second derivatives by ε of the cell 1 + ε into those by the Lagrangian strain η = ε + ½ε².

    Parameters
    ----------
    second : ``(1/V) ∂²E/∂ε∂ε``, Voigt, shape (6, 6).
    stress : of the state, shape (3, 3), in the same unit.

    Returns
    -------
    ``C_ijkl = (1/V) ∂²E/∂η_ij∂η_kl``, Voigt, shape (6, 6), with the symmetry of an energy at any stress.
    """
    return second - to_voigt(_mixed(stress)) / 4


def birch(constants: Array, stress: Array) -> Array:
    """Turn Lagrangian constants into stress-strain coefficients, dσ_ij = B_ijkl dε_kl.

    ``B_ijkl = C_ijkl + ½(σ_ik δ_jl + σ_il δ_jk + σ_jk δ_il + σ_jl δ_ik) - σ_ij δ_kl`` (D. C. Wallace, Phys. Rev. 162,
    776 (1967)); under a pressure P, where σ = -P, B11 = C11 - P, B12 = C12 + P, B44 = C44 - P.

    Parameters
    ----------
    constants : Lagrangian, Voigt, shape (6, 6).
    stress : of the state, shape (3, 3), in the same unit.
    """
    flat = np.array([stress[i, j] for i, j in VOIGT])
    return constants + to_voigt(_mixed(stress)) / 2 - np.outer(flat, [1.0, 1, 1, 0, 0, 0])
