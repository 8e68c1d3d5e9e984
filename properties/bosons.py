"""Normal modes of quadratic forms in coordinates with a bracket: phonons, spin waves, and what couples them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import PropertyError

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

ZERO = 1e-12
ASYMMETRY = 1e-8
REAL = 1e-7
"""Growth below this part of the largest frequency is rounding of a real frequency."""


@dataclass(frozen=True)
class Modes:
    """Normal modes, the lowest first.

    Parameters
    ----------
    energies : ħω of the modes of positive norm, shape (..., n/2); negative where exciting the mode lowers the energy.
    growth : imaginary part of ħω, at least zero, shape (..., n/2); the amplitude of an unstable mode grows as
        exp(growth t/ħ).
    vectors : amplitudes z of the modes in columns, z(t) = v exp(-iωt), shape (..., n, n/2). Norms are
        v†(iΓ)⁻¹v = 1; modes whose norm vanishes (zero modes such as translations, and growing ones) have |v| = 1.
    lowest : lowest eigenvalue of the form itself, shape (...).
    stable : whether no eigenvalue of the form is negative beyond rounding, shape (...).
    """

    energies: Array
    growth: Array
    vectors: Complex
    lowest: Array
    stable: NDArray[np.bool_]


def normal_modes(hamiltonian: ArrayLike, bracket: ArrayLike, zero: float = ZERO, scale: float | None = None) -> Modes:
    """Diagonalise Hermitian quadratic forms ½ z†Hz with the equation of motion ħż = Γ ∂H/∂z = Γ H z.

    With H = S² the matrix S iΓ S is Hermitian and has the frequencies as eigenvalues (Colpa, Physica A 93, 327 (1978),
    with the root in place of Cholesky's factor, so that forms with zero modes need no shift). A form with negative
    eigenvalues is diagonalised as S iΓ S sign(H), which is not Hermitian: frequencies become negative or complex.

    Parameters
    ----------
    hamiltonian : H of Bloch amplitudes, shape (..., n, n).
    bracket : real antisymmetric Γ = ħ{z, z}, shape (n, n): for canonical pairs (q, p) blocks ħ [[0, 1], [-1, 0]]; for
        the tilts (x, y) of a moment along e = x × y, blocks (2/|m|) [[0, -1], [1, 0]] (ħė = (2/|m|) e × ∂E/∂e,
        g = 2, |m| in µB).
    zero : eigenvalues of H smaller than this part of `scale` are taken as zero.
    scale : size of the terms that H is a sum of; by default the largest eigenvalue of all forms given.

    Returns
    -------
    Modes.

    Raises
    ------
    PropertyError : shapes that do not fit, a form that is not Hermitian, or a bracket that is no bracket.
    """
    form: Complex = np.asarray(hamiltonian, dtype=complex)
    gamma = np.asarray(bracket, dtype=float)
    _check(form, gamma)
    n, leading = len(gamma), form.shape[:-2]
    form = form.reshape(-1, n, n)
    form = (form + form.conj().swapaxes(-1, -2)) / 2
    values, axes = np.linalg.eigh(form)
    lowest = values[:, 0].copy()
    values[np.abs(values) <= zero * (np.abs(values).max(initial=0.0) if scale is None else scale)] = 0.0
    stable = values[:, 0] >= 0
    poisson = 1j * gamma
    metric: Complex = np.asarray(np.linalg.inv(poisson), dtype=complex)

    root = axes * np.sqrt(np.abs(values))[:, None, :]
    inner = root.conj().swapaxes(-1, -2) @ poisson @ root
    energies, growth = np.zeros((len(form), n // 2)), np.zeros((len(form), n // 2))
    vectors = np.zeros((len(form), n, n // 2), dtype=complex)
    frequencies, columns = np.linalg.eigh(inner)
    largest = np.abs(frequencies).max(axis=1)
    for k in range(len(form)):
        signs = np.sign(values[k])
        free = np.asarray(axes[k][:, signs == 0])
        if stable[k]:
            chosen = np.flatnonzero(frequencies[k] > ZERO * max(largest[k], 1e-300))
            omega, amplitudes = frequencies[k, chosen].astype(complex), columns[k][:, chosen]
        else:
            omega, amplitudes, slow = _indefinite(inner[k] * signs, signs, largest[k])
            slow = poisson @ (root[k] * signs) @ slow
            free = np.concatenate([free, slow / np.linalg.norm(slow, axis=0)], axis=1)
        found = np.asarray(poisson @ (root[k] * signs) @ amplitudes)
        missing = n // 2 - len(omega)
        null = _null_modes(free, metric, missing)
        everything = np.concatenate([omega, np.zeros(missing)])
        order = np.lexsort([everything.imag, everything.real])
        energies[k], growth[k] = everything.real[order], everything.imag[order]
        vectors[k] = np.concatenate([_normalised(found, metric), null], axis=1)[:, order]
    half = (*leading, n // 2)
    return Modes(
        energies.reshape(half),
        growth.reshape(half),
        vectors.reshape(*leading, n, n // 2),
        lowest.reshape(leading),
        stable.reshape(leading),
    )


def _check(form: Complex, gamma: Array) -> None:
    n = gamma.shape[0]
    if gamma.shape != (n, n) or n % 2 or form.shape[-2:] != (n, n):
        raise PropertyError(
            f"a quadratic form {form.shape[-2:]} and a bracket {gamma.shape} do not fit; both have shape (n, n), n even"
        )
    if not (np.all(np.isfinite(form)) and np.all(np.isfinite(gamma))):
        raise PropertyError("the quadratic form or its bracket holds a number that is not finite")
    if np.abs(gamma + gamma.T).max() > ASYMMETRY * np.abs(gamma).max() or np.linalg.cond(gamma) > 1 / ZERO:
        raise PropertyError("the bracket of the coordinates is not antisymmetric, or leaves a coordinate out")
    asymmetry = np.abs(form - form.conj().swapaxes(-1, -2)).max(initial=0.0)
    if asymmetry > ASYMMETRY * max(np.abs(form).max(initial=0.0), 1e-300):
        raise PropertyError(f"the quadratic form is not Hermitian: the largest difference is {asymmetry:.1e}")


def _indefinite(matrix: Complex, signs: Array, scale: float) -> tuple[Complex, Complex, Complex]:
    """Return frequencies and eigenvectors x of B sign(H): those of positive norm, and of complex pairs the growing one.

    The norm of the mode of x is ω x† sign(H) x; within a degenerate eigenvalue x is chosen to make it diagonal. Third
    are the eigenvectors too slow to have a norm.
    """
    kept = np.flatnonzero(signs)
    values, vectors = np.linalg.eig(matrix[np.ix_(kept, kept)])
    full = np.zeros((len(signs), len(kept)), dtype=complex)
    full[kept] = vectors
    omega, chosen = [], []
    threshold = REAL * scale
    for k in np.flatnonzero(values.imag > threshold):
        omega.append(values[k])
        chosen.append(full[:, k])
    real = np.flatnonzero((np.abs(values.imag) <= threshold) & (np.abs(values) > threshold))
    real = real[np.argsort(values.real[real])]
    breaks = np.flatnonzero(np.diff(values.real[real]) > threshold) + 1
    for group in np.split(real, breaks):
        if not len(group):
            continue
        space = np.linalg.qr(full[:, group])[0]
        mean = float(values.real[group].mean())
        norms, mixed = np.linalg.eigh(mean * (space.conj().T * signs) @ space)
        for k in np.flatnonzero(norms > 0):
            omega.append(complex(mean))
            chosen.append(space @ mixed[:, k])
    amplitudes = np.array(chosen, dtype=complex).reshape(len(omega), len(signs)).T
    return np.array(omega, dtype=complex), amplitudes, full[:, np.abs(values) <= threshold]


def _null_modes(space: Complex, metric: Complex, count: int) -> Complex:
    """Return modes without frequency: of a space of them those of the largest norm, shape (n, count)."""
    _, mixed = np.linalg.eigh(space.conj().T @ metric @ space)
    return _normalised((space @ mixed[:, ::-1])[:, :count], metric)


def _normalised(vectors: Complex, metric: Complex) -> Complex:
    lengths = np.linalg.norm(vectors, axis=0)
    vectors = vectors / np.where(lengths > 0, lengths, 1.0)
    norms = np.einsum("ak,ab,bk->k", vectors.conj(), metric, vectors).real
    largest = np.abs(metric).max()
    return np.asarray(vectors / np.sqrt(np.where(norms > REAL * largest, norms, 1.0)))
