"""What the suite asks of an ASE calculator, and what it does where a calculator has less.

Required is an ASE calculator with `energy` that reads `initial_magmoms`. Everything else (`forces`, `stress`,
`magnetic_forces`, and the optional `evaluate_spins`, `evaluate_spirals`, `hessian`, `relax_moments`, `replace`,
`members`, `default_moments`, `elements`, `reach`, `tilt_reach`, `tolerance`, `provenance`) is used where present and
otherwise replaced by loops and central differences.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from math import lcm
from typing import Any, Literal, cast

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, CalculatorError, PropertyNotImplementedError
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import null_space
from scipy.spatial.transform import Rotation

from . import errors
from .conventions import VOIGT
from .journal import Journal, Part
from .stiffness import from_six, to_six

Array = NDArray[np.float64]
MomentMode = Literal["fixed", "magnitudes", "full"]
MODES: tuple[MomentMode, ...] = ("fixed", "magnitudes", "full")

MOMENT_STEP = 2e-3
POSITION_STEP = 2e-3
STRAIN_STEP = 1e-3
MOMENT_TOLERANCE = 1e-7
ZERO_MOMENT = 1e-8
SMALLEST_MOMENT = 0.01
"""Moments below this, in µB, have vanished: what is divided by them means nothing."""
CHUNK = 16
"""Components of moments whose differences are evaluated at once."""

STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))
"""Offsets and weights of the five-point central difference, error of order h⁴."""


def bare(atoms: Atoms) -> Atoms:
    """Return a copy of a structure without calculator and constraints."""
    copy = atoms.copy()
    copy.set_constraint()
    return copy


def with_moments(atoms: Atoms, moments: ArrayLike) -> Atoms:
    """Return a copy of a structure that carries other moments.

    Parameters
    ----------
    atoms : the structure; it is not changed.
    moments : shape (N, 3), or (N,) for collinear along z, in µB.
    """
    copy = bare(atoms)
    copy.set_initial_magnetic_moments(None)
    copy.set_initial_magnetic_moments(vectors(moments, len(atoms)))
    return copy


def vectors(moments: ArrayLike, n_atoms: int) -> Array:
    """Return moments as vectors.

    Parameters
    ----------
    moments : shape (N, 3), or (N,) for collinear along z, in µB.
    n_atoms : N.

    Returns
    -------
    Moments in µB, shape (N, 3).

    Raises
    ------
    MomentError : wrong shape, or a value that is not finite.
    """
    array = np.array(moments, dtype=float)
    if array.shape == (n_atoms,):
        array = np.stack([np.zeros(n_atoms), np.zeros(n_atoms), array], axis=1)
    if array.shape != (n_atoms, 3):
        raise errors.MomentError(
            f"moments have the shape {array.shape}, but {n_atoms} atoms need ({n_atoms},) or ({n_atoms}, 3)"
        )
    if not np.all(np.isfinite(array)):
        bad = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise errors.MomentError(f"the moment of atom {bad} is not a finite number; give every atom a moment in µB")
    return array


def moments_of(atoms: Atoms) -> Array:
    """Return the initial moments of a structure as vectors, shape (N, 3), in µB.

    Raises
    ------
    MomentError : where the structure carries none.
    """
    if not atoms.has("initial_magmoms"):
        raise errors.MomentError(
            "the structure carries no magnetic moments; set them with atoms.set_initial_magnetic_moments"
        )
    return vectors(atoms.arrays["initial_magmoms"], len(atoms))


def free_axes(moments: Array, mode: MomentMode, turning: bool) -> Array:
    """Return orthonormal directions in which moments may relax.

    Parameters
    ----------
    moments : shape (N, 3), µB.
    mode : which of their components follow.
    turning : leave out turns of all moments together, which cost nothing without spin-orbit coupling: their curvature
        is the rounding of the relaxation, of either sign.

    Returns
    -------
    Shape (3N, F).
    """
    lengths = np.linalg.norm(moments, axis=1)
    if mode == "full":
        if not turning or not lengths.max(initial=0.0) > ZERO_MOMENT:
            return np.eye(moments.size)
        turns = np.array([np.cross(axis, moments).ravel() for axis in np.eye(3)])
        return np.asarray(null_space(turns, rcond=1e-6))
    carrying = np.flatnonzero(lengths > ZERO_MOMENT) if mode == "magnitudes" else np.array([], dtype=np.intp)
    axes = np.zeros((*moments.shape, len(carrying)))
    axes[carrying, :, np.arange(len(carrying))] = moments[carrying] / lengths[carrying, None]
    return axes.reshape(moments.size, -1)


def strained(atoms: Atoms, strain: Array) -> Atoms:
    """Return a copy with cell and positions multiplied by 1 + ε, moments unchanged; `strain` has shape (3, 3)."""
    copy = bare(atoms)
    copy.set_cell(atoms.cell[:] @ (np.eye(3) + strain).T)
    copy.set_positions(atoms.positions @ (np.eye(3) + strain).T)
    return copy


def voigt_strain(component: int, size: float) -> Array:
    """Return the symmetric strain tensor, shape (3, 3), of one Voigt component (engineering shear γ = 2ε)."""
    strain = np.zeros((3, 3))
    i, j = VOIGT[component]
    strain[i, j] += size / 2
    strain[j, i] += size / 2
    return strain


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Turn a calculator's refusal into an error of the suite that keeps its sentence."""
    try:
        yield
    except errors.PropertyError:
        raise
    except PropertyNotImplementedError as error:
        raise errors.CalculatorError(f"the calculator does not give {what}") from error
    except (ValueError, RuntimeError, CalculatorError, CalculationFailed) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise errors.CalculatorError(message) from error


class SpinCalculator:
    """An ASE calculator seen through the protocol, with fallbacks for what it lacks.

    Evaluations are always at the moments given: a calculator that relaxes moments by itself is asked for a
    copy that does not, and its mode is kept in `mode`.

    Parameters
    ----------
    calculator : an ASE calculator.
    journal : keeps what was evaluated, for a calculator whose `provenance` identifies it; None keeps nothing.
    """

    def __init__(self, calculator: Any, journal: Journal | None = None) -> None:
        mode = getattr(calculator, "moments", "fixed")
        self.mode: MomentMode = cast(MomentMode, mode) if mode in MODES else "fixed"
        if self.mode != "fixed":
            if not hasattr(calculator, "replace"):
                raise errors.CalculatorError(
                    f"the calculator relaxes moments ('{mode}') and has no replace(moments='fixed'); "
                    "give one that keeps them"
                )
            calculator = calculator.replace(moments="fixed")
        self.calculator = calculator
        self.journal = journal
        self._scratch: Any = None

    def has(self, capability: str) -> bool:
        """Say whether the calculator itself has an optional capability, or gives an ASE property."""
        if capability in ("energy", "forces", "stress", "magnetic_forces"):
            return capability in getattr(self.calculator, "implemented_properties", ())
        return callable(getattr(self.calculator, capability, None))

    @property
    def differs_twice(self) -> bool:
        """Whether second derivatives by moments are differences of differences, because only energies are given."""
        if self.has("hessian") or self.has("magnetic_forces"):
            return False
        ask = getattr(self.calculator, "evaluate_spins", None)
        return ask is None or "magnetic_forces" not in inspect.signature(ask).parameters

    @property
    def soc(self) -> bool | None:
        """Whether spin-orbit coupling is on; None where the calculator does not say."""
        value = getattr(self.calculator, "soc", None)
        return None if value is None else bool(value)

    def turns_freely(self, atoms: Atoms) -> bool:
        """Say whether all moments together turn at no cost: what the calculator says, or what its energy does."""
        if self.soc is not None:
            return not self.soc
        moments = moments_of(atoms)
        turned = moments @ Rotation.from_rotvec([0.7, -1.1, 0.4]).as_matrix().T
        before = self.energy(atoms, moments)
        return abs(self.energy(atoms, turned) - before) <= 1e-10 * max(1.0, abs(before))

    @property
    def single_precision(self) -> bool:
        """Whether the calculator says that it computes in single precision."""
        return self.has("provenance") and self.calculator.provenance().get("dtype") == "float32"

    @property
    def moment_tolerance(self) -> float:
        """Magnetic force that relaxed moments may keep, eV/µB: the calculator's own tolerance, or that of the suite."""
        return float(getattr(self.calculator, "tolerance", MOMENT_TOLERANCE))

    @property
    def elements(self) -> tuple[str, ...] | None:
        """Elements the calculator knows; None where it does not say."""
        value = getattr(self.calculator, "elements", None)
        return None if value is None else tuple(value)

    @property
    def default_moments(self) -> dict[str, float] | None:
        """Typical |m| in µB per element; None where the calculator does not say."""
        value = getattr(self.calculator, "default_moments", None)
        return None if value is None else {str(k): float(v) for k, v in dict(value).items()}

    @property
    def members(self) -> list["SpinCalculator"]:
        """The committee as single calculators; the calculator alone where it has none."""
        members = getattr(self.calculator, "members", None)
        if members is None or len(members) < 2:
            return [self]
        wrapped = [SpinCalculator(m, self.journal) for m in members]
        for member in wrapped:
            member.mode = self.mode
        return wrapped

    def provenance(self) -> dict[str, str | float | int]:
        """What the calculator says about itself, and its class."""
        own = self.calculator.provenance() if self.has("provenance") else {}
        return {"calculator": type(self.calculator).__name__, **own}

    def replace(self, **changes: Any) -> "SpinCalculator":
        """Return a calculator that shares the model and has options changed.

        Raises
        ------
        CalculatorError : where the calculator cannot do it.
        """
        if not self.has("replace"):
            wanted = ", ".join(f"{k}={v}" for k, v in changes.items())
            raise errors.CalculatorError(f"the calculator has no replace(); make one with {wanted} yourself")
        with _asking("replace"):
            other = SpinCalculator(self.calculator.replace(**changes), self.journal)
        if "moments" not in changes:
            other.mode = self.mode
        return other

    def part(self, name: str, key: Mapping[str, Any], compute: Callable[[], Part]) -> Part:
        """Return a part of a calculation with this calculator from the journal, or compute it.

        Parameters
        ----------
        name : what the part is.
        key : everything besides the calculator that decides the part.
        compute : called without arguments where the journal does not have the part.
        """
        if self.journal is None or not self.has("provenance"):
            return compute()
        return self.journal.part({"part": name, "calculator": self.provenance(), "soc": self.soc, **key}, compute)

    def _property(self, name: str, atoms: Atoms, moments: Array) -> Array:
        def ask() -> Part:
            with _asking(name):
                found = np.asarray(self.calculator.get_property(name, copy), dtype=float)
            if not np.isfinite(found).all():
                raise errors.CalculatorError(f"the calculator gives {name} that are not finite numbers")
            return {name: found}

        copy = with_moments(atoms, moments)
        return self.part(name, {"atoms": copy}, ask)[name]

    def energy(self, atoms: Atoms, moments: ArrayLike) -> float:
        """Return the energy in eV at moments of shape (N, 3) in µB."""
        return float(self._property("energy", atoms, vectors(moments, len(atoms))))

    def forces(self, atoms: Atoms, moments: ArrayLike) -> Array:
        """Return the forces, shape (N, 3), in eV/Å, at moments of shape (N, 3) in µB."""
        m = vectors(moments, len(atoms))
        if self.has("forces"):
            return self._property("forces", atoms, m)
        return -self._gradient(lambda x: self.energy(_at_positions(atoms, x), m), atoms.positions, POSITION_STEP)

    def stress(self, atoms: Atoms, moments: ArrayLike) -> Array:
        """Return the stress dE/dε/V, Voigt, shape (6,), in eV/Å³, at moments of shape (N, 3) in µB."""
        m = vectors(moments, len(atoms))
        if self.has("stress"):
            value = self._property("stress", atoms, m)
            return value if value.shape == (6,) else np.array([value[i, j] for i, j in VOIGT])
        return np.array(
            [
                sum(w * self.energy(strained(atoms, voigt_strain(v, k * STRAIN_STEP)), m) for k, w in STENCIL)
                for v in range(6)
            ]
        ) / (STRAIN_STEP * atoms.get_volume())

    def strain_gradient(self, atoms: Atoms, moments: ArrayLike) -> Array:
        """Return dE/dε (engineering Voigt strain), shape (6,), in eV, at moments of shape (N, 3) in µB."""
        return self.stress(atoms, moments) * atoms.get_volume()

    def magnetic_forces(self, atoms: Atoms, moments: ArrayLike) -> Array:
        """Return -dE/dm, shape (N, 3), in eV/µB, at moments of shape (N, 3) in µB."""
        m = vectors(moments, len(atoms))
        if self.has("magnetic_forces"):
            return self._property("magnetic_forces", atoms, m)
        if self.has("evaluate_spins"):
            return self.evaluate_spins(atoms, m[None])["magnetic_forces"][0]
        return -self._gradient(lambda x: self.energy(atoms, x), m, MOMENT_STEP)

    def _field_by_differences(self, atoms: Atoms, moments: Array) -> Array:
        """Return -dE/dm, shape (N, 3), by differences of energies that are evaluated side by side."""
        units = MOMENT_STEP * np.eye(moments.size).reshape(-1, *moments.shape)
        weights = np.array([w for _, w in STENCIL]) / MOMENT_STEP
        slopes = []
        for begin in range(0, len(units), CHUNK):
            shifted = np.array([moments + k * u for u in units[begin : begin + CHUNK] for k, _ in STENCIL])
            slopes.append(self.evaluate_spins(atoms, shifted, False)["energy"].reshape(-1, len(STENCIL)) @ weights)
        return -np.concatenate(slopes).reshape(moments.shape)

    @staticmethod
    def _gradient(function: Callable[[Array], float], x: Array, step: float) -> Array:
        gradient = np.zeros(x.shape)
        for index in np.ndindex(*x.shape):
            for k, weight in STENCIL:
                shifted = x.copy()
                shifted[index] += k * step
                gradient[index] += weight * function(shifted) / step
        return gradient

    def evaluate_spins(self, atoms: Atoms, moments: ArrayLike, magnetic_forces: bool = True) -> dict[str, Array]:
        """Evaluate many spin configurations on one geometry.

        Parameters
        ----------
        atoms : the structure.
        moments : shape (B, N, 3), in µB.
        magnetic_forces : whether they are wanted.

        Returns
        -------
        ``energy`` (B,) in eV, ``magnetic_forces`` (B, N, 3) in eV/µB, and where the calculator has site
        energies ``energies`` (B, N) in eV.
        """
        m = np.asarray(moments, dtype=float)
        if m.ndim != 3 or m.shape[1:] != (len(atoms), 3):
            raise errors.MomentError(f"moments have the shape {m.shape}, but must be (B, {len(atoms)}, 3)")
        if self.has("evaluate_spins"):
            key = {"atoms": bare(atoms), "moments": m, "magnetic_forces": magnetic_forces}
            found = self.part("evaluate_spins", key, lambda: self._native_spins(atoms, m, magnetic_forces))
            if magnetic_forces and "magnetic_forces" not in found:
                ask = self.magnetic_forces if self.has("magnetic_forces") else self._field_by_differences
                found = {**found, "magnetic_forces": np.array([ask(atoms, x) for x in m])}
            return found
        result = {"energy": np.array([self.energy(atoms, x) for x in m])}
        if magnetic_forces:
            result["magnetic_forces"] = np.array([self.magnetic_forces(atoms, x) for x in m])
        if "energies" in getattr(self.calculator, "implemented_properties", ()):
            result["energies"] = np.array([self._property("energies", atoms, x) for x in m])
        return result

    def _native_spins(self, atoms: Atoms, moments: Array, magnetic_forces: bool) -> dict[str, Array]:
        ask = self.calculator.evaluate_spins
        known = inspect.signature(ask).parameters
        extra = {"magnetic_forces": magnetic_forces} if "magnetic_forces" in known else {}
        with _asking("evaluate_spins"):
            found = ask(with_moments(atoms, moments[0]), moments, **extra)
        return {k: np.asarray(v, dtype=float) for k, v in found.items()}

    def evaluate_spirals(
        self,
        atoms: Atoms,
        q: ArrayLike,
        axis: ArrayLike,
        moments: ArrayLike | None = None,
        max_cells: int = 64,
        magnetic_forces: bool = True,
    ) -> dict[str, Array]:
        """Evaluate spirals whose moments turn by 2π q·S about `axis` in the cell shifted by S.

        Parameters
        ----------
        atoms : the primitive cell; its initial moments are those of S = 0 (their part along `axis` is the cone).
        q : wave vectors in fractional reciprocal coordinates, shape (Q, 3).
        axis : shape (3,).
        moments : moments of the cell S = 0 for each wave vector, shape (Q, N, 3) in µB, in place of the structure's.
        max_cells : largest supercell where the calculator has no spirals of its own and a commensurate
            supercell replaces them.
        magnetic_forces : whether they are wanted.

        Returns
        -------
        ``energy`` (Q,) in eV per given cell, ``magnetic_forces`` (Q, N, 3) in eV/µB of the cell S = 0. With
        spin-orbit coupling on, the theorem does not hold, and supercells are used.

        Raises
        ------
        CalculatorError : a q that fits no supercell of `max_cells` cells and a calculator without spirals.
        """
        waves = np.asarray(q, dtype=float).reshape(-1, 3)
        direction = np.asarray(axis, dtype=float) / np.linalg.norm(axis)
        home = np.broadcast_to(
            moments_of(atoms) if moments is None else np.asarray(moments), (len(waves), len(atoms), 3)
        )
        if self.has("evaluate_spirals") and self.soc is not True:
            key = {"atoms": bare(atoms), "q": waves, "axis": direction, "moments": np.array(home)}
            return self.part(
                "evaluate_spirals",
                {**key, "magnetic_forces": magnetic_forces},
                lambda: self._native_spirals(atoms, waves, direction, home, magnetic_forces),
            )
        energies, fields = [], []
        for wave, start in zip(waves, home, strict=True):
            cell, count = spiral_supercell(with_moments(atoms, start), wave, direction, max_cells)
            moments = moments_of(cell)
            energies.append(self.energy(cell, moments) / count)
            if magnetic_forces:
                fields.append(self.magnetic_forces(cell, moments)[: len(atoms)])
        result = {"energy": np.array(energies)}
        return {**result, "magnetic_forces": np.array(fields)} if magnetic_forces else result

    def _native_spirals(
        self, atoms: Atoms, waves: Array, axis: Array, home: Array, magnetic_forces: bool
    ) -> dict[str, Array]:
        ask = self.calculator.evaluate_spirals
        known = inspect.signature(ask).parameters
        extra = {"magnetic_forces": magnetic_forces} if "magnetic_forces" in known else {}
        with _asking("evaluate_spirals"):
            if "moments" in known:
                parts = [ask(with_moments(atoms, home[0]), waves, axis, moments=home, **extra)]
            else:
                parts = [ask(with_moments(atoms, m), q[None], axis, **extra) for m, q in zip(home, waves, strict=True)]
        return {k: np.concatenate([np.asarray(p[k], dtype=float) for p in parts]) for k in parts[0]}

    def hessian(
        self, atoms: Atoms, blocks: Sequence[str] = ("rr", "rm", "mm"), rows: Sequence[int] | None = None
    ) -> dict[str, Array]:
        """Return blocks of second derivatives of E at the structure's moments.

        Parameters
        ----------
        atoms : the structure with its moments.
        blocks : among rr, rm, mm, ee, er, em (r positions, m moments, e engineering Voigt strain).
        rows : atoms whose rows of rr, rm and mm are wanted, R of them; all by default.

        Returns
        -------
        rr, rm, mm of shape (R, 3, N, 3); ee (6, 6); er, em (6, N, 3); in eV per Å, µB and unit strain. The
        second derivative with strain is that of E(ε) under the cell matrix 1 + ε with ε symmetric.
        """
        unknown = set(blocks) - {"rr", "rm", "mm", "ee", "er", "em"}
        if unknown:
            name = sorted(unknown)[0]
            raise errors.OptionError(f"no Hessian block '{name}'; known: rr, rm, mm, ee, er, em")
        if self.has("hessian"):
            key = {"atoms": with_moments(atoms, moments_of(atoms)), "blocks": list(blocks)}
            if rows is not None:
                key["rows"] = [int(row) for row in rows]
            return self.part("hessian", key, lambda: self._native_hessian(atoms, blocks, rows))
        m, n = moments_of(atoms), len(atoms)
        wanted = range(n) if rows is None else rows
        result: dict[str, Array] = {}
        for block in blocks:
            if block in ("rr", "mm", "rm"):
                out = np.zeros((len(wanted), 3, n, 3))
                for row, a in itertools.product(range(len(wanted)), range(3)):
                    i = wanted[row]
                    for k, weight in STENCIL:
                        if block == "mm":
                            shifted = m.copy()
                            shifted[i, a] += k * MOMENT_STEP
                            out[row, a] -= weight / MOMENT_STEP * self.magnetic_forces(atoms, shifted)
                        else:
                            positions = atoms.positions.copy()
                            positions[i, a] += k * POSITION_STEP
                            moved = _at_positions(atoms, positions)
                            force = self.forces(moved, m) if block == "rr" else self.magnetic_forces(moved, m)
                            out[row, a] -= weight / POSITION_STEP * force
                if block != "rm" and rows is None:
                    out = (out + out.transpose(2, 3, 0, 1)) / 2
            else:
                out = np.zeros((6, 6) if block == "ee" else (6, n, 3))
                for v in range(6):
                    for k, weight in STENCIL:
                        strain = voigt_strain(v, k * STRAIN_STEP)
                        cell = strained(atoms, strain)
                        factor = weight / STRAIN_STEP
                        if block == "ee":
                            out[v] += factor * pulled_back(self.strain_gradient(cell, m), strain)
                        elif block == "er":
                            out[v] -= factor * self.forces(cell, m) @ (np.eye(3) + strain)
                        else:
                            out[v] -= factor * self.magnetic_forces(cell, m)
                if block == "ee":
                    out = (out + out.T) / 2
            result[block] = out
        return result

    def _native_hessian(
        self, atoms: Atoms, blocks: Sequence[str], rows: Sequence[int] | None = None
    ) -> dict[str, Array]:
        ask = self.calculator.hessian
        known = "rows" in inspect.signature(ask).parameters
        extra = {"rows": list(rows)} if known and rows is not None else {}
        with _asking("hessian"):
            found = {k: np.asarray(v, dtype=float) for k, v in ask(atoms, blocks=tuple(blocks), **extra).items()}
        if rows is None or known:
            return {k: found[k] for k in blocks}
        return {k: found[k] if "e" in k else found[k][list(rows)] for k in blocks}

    def relax_moments(self, images: Sequence[Atoms], mode: MomentMode) -> list[Array]:
        """Relax the moments of many structures, positions fixed, from their initial moments.

        Parameters
        ----------
        images : structures with moments; they are not changed.
        mode : ``"fixed"`` returns the moments given, ``"magnitudes"`` keeps the directions (a moment that is zero
            stays zero), ``"full"`` relaxes every component.

        Returns
        -------
        Moments in µB, one array (N, 3) per structure.

        Raises
        ------
        ConvergenceError : where the projected magnetic force stays above 1e-7 eV/µB.
        """
        if mode not in MODES:
            raise errors.OptionError(f"no moment mode '{mode}'{errors.did_you_mean(mode, MODES)}")
        if mode == "fixed":
            return [moments_of(a) for a in images]
        if self.has("relax_moments"):
            key = {"images": list(images), "mode": mode}
            found = self.part("relax_moments", key, lambda: self._native_relaxation(images, mode))
            return [found[str(k)] for k in range(len(images))]
        return [self._relax_one(a, mode) for a in images]

    def _native_relaxation(self, images: Sequence[Atoms], mode: MomentMode) -> Part:
        with _asking("relax_moments"):
            found = self.calculator.relax_moments(list(images), mode)
        return {str(k): np.asarray(m, dtype=float) for k, m in enumerate(found)}

    def _relax_one(self, atoms: Atoms, mode: MomentMode) -> Array:
        start = moments_of(atoms)
        if mode == "full":
            basis = np.eye(start.size).reshape(start.size, *start.shape)
        else:
            lengths = np.linalg.norm(start, axis=1)
            carrying = np.flatnonzero(lengths > ZERO_MOMENT)
            basis = np.zeros((len(carrying), *start.shape))
            basis[np.arange(len(carrying)), carrying] = start[carrying] / lengths[carrying, None]

        def moments(x: Array) -> Array:
            return start + np.tensordot(x, basis, axes=1)

        def gradient(x: Array) -> Array:
            return -np.tensordot(basis, self.magnetic_forces(atoms, moments(x)), axes=2)

        def hessian(x: Array) -> Array:
            shifts = np.array([k * MOMENT_STEP * unit for unit in np.eye(len(x)) for k, _ in STENCIL])
            fields = self.evaluate_spins(atoms, moments(x) + np.tensordot(shifts, basis, axes=1))["magnetic_forces"]
            slopes = -np.tensordot(fields, basis, axes=([1, 2], [1, 2])).reshape(len(x), len(STENCIL), len(x))
            matrix = np.einsum("k,akb->ab", [w for _, w in STENCIL], slopes) / MOMENT_STEP
            return (matrix + matrix.T) / 2

        x = minimise(
            lambda y: self.energy(atoms, moments(y)),
            gradient,
            hessian,
            np.zeros(len(basis)),
            tolerance=MOMENT_TOLERANCE,
            max_step=0.3,
            what="the moments",
            unit="eV/µB",
        )
        return moments(x)


def minimise(
    energy: Callable[[Array], float],
    gradient: Callable[[Array], Array],
    hessian: Callable[[Array], Array],
    start: Array,
    *,
    tolerance: float,
    max_step: float,
    what: str,
    unit: str,
    max_iterations: int = 100,
) -> Array:
    """Minimise by Newton steps on the Hessian with its negative curvatures turned round.

    Parameters
    ----------
    energy, gradient, hessian : functions of x, shape (n,).
    start : shape (n,).
    tolerance : largest absolute gradient component accepted.
    max_step : longest step.
    what, unit : for the message of the error.
    max_iterations : steps before giving up.

    Returns
    -------
    x at the minimum, shape (n,).

    Raises
    ------
    ConvergenceError : holds the residual.
    """
    x = np.array(start, dtype=float)
    if x.size == 0:
        return x
    value, slope = energy(x), gradient(x)
    for _ in range(max_iterations):
        if np.abs(slope).max() <= tolerance:
            return x
        curvature, modes = np.linalg.eigh(hessian(x))
        floor = 1e-6 * max(np.abs(curvature).max(), 1e-12)
        amplitudes = modes.T @ slope
        step = -modes @ np.where(np.abs(curvature) > floor, amplitudes / np.maximum(np.abs(curvature), floor), 0.0)
        length = np.linalg.norm(step)
        if length > max_step:
            step *= max_step / length
        for _ in range(30):
            trial = energy(x + step)
            if trial <= value + 1e-4 * slope @ step + 1e-12 * max(1.0, abs(value)):
                break
            step = step / 2
        x = x + step
        value, slope = trial, gradient(x)
    residual = np.abs(slope).max()
    if residual <= tolerance:
        return x
    raise errors.ConvergenceError(
        f"{what} did not converge in {max_iterations} steps: the largest residual is {residual:.1e} {unit}, "
        f"above {tolerance:.0e}; start from other moments"
    )


def spiral_supercell(atoms: Atoms, q: ArrayLike, axis: ArrayLike, max_cells: int = 64) -> tuple[Atoms, int]:
    """Return the smallest and most compact supercell that holds a commensurate spiral.

    Parameters
    ----------
    atoms : the primitive cell with the moments of S = 0.
    q : fractional reciprocal coordinates, shape (3,).
    axis : shape (3,).
    max_cells : largest number of cells.

    Returns
    -------
    The supercell with its moments (the cell S = 0 first), and the number of cells.
    """
    wave = np.asarray(q, dtype=float)
    fractions = [Fraction(float(x)).limit_denominator(max_cells) for x in wave]
    count = lcm(*(f.denominator for f in fractions))
    if count > max_cells or not np.allclose([float(f) for f in fractions], wave, atol=1e-9):
        raise errors.CalculatorError(
            f"the spiral q = ({', '.join(f'{x:g}' for x in wave)}) fits no supercell of {max_cells} cells, and the "
            "calculator has no evaluate_spirals for it; choose a commensurate q or a larger limit"
        )
    steps = np.array([int(f * count) for f in fractions])
    shape = min(
        (h for h in superlattices(count) if not np.any(h @ steps % count)),
        key=lambda h: float(np.sum((h @ atoms.cell[:]) ** 2)),
    )
    moments = moments_of(atoms)
    unit = np.asarray(axis, dtype=float) / np.linalg.norm(axis)
    positions, turned = [], []
    for shift in itertools.product(*(range(int(n)) for n in np.diag(shape))):
        rotation = Rotation.from_rotvec(2 * np.pi * (wave @ np.array(shift)) * unit)
        positions.append(atoms.positions + np.array(shift) @ atoms.cell[:])
        turned.append(rotation.apply(moments))
    cell = Atoms(
        numbers=np.tile(atoms.numbers, count),
        positions=np.concatenate(positions),
        cell=shape @ atoms.cell[:],
        pbc=True,
    )
    return with_moments(cell, np.concatenate(turned)), count


def superlattices(count: int) -> Iterator[NDArray[np.int64]]:
    """Yield the Hermite normal forms of all superlattices of `count` cells, rows as lattice vectors, shape (3, 3)."""
    for a in (x for x in range(1, count + 1) if count % x == 0):
        for d in (x for x in range(1, count // a + 1) if (count // a) % x == 0):
            f = count // (a * d)
            for b, c, e in itertools.product(range(d), range(f), range(f)):
                yield np.array([[a, b, c], [0, d, e], [0, 0, f]])


def _at_positions(atoms: Atoms, positions: Array) -> Atoms:
    copy = bare(atoms)
    copy.set_positions(positions)
    return copy


def pulled_back(gradient: Array, strain: Array) -> Array:
    """Turn dE/dη on top of a strain ε into dE/dε, both engineering Voigt, shape (6,)."""
    pulled = from_six(gradient) @ np.linalg.inv(np.eye(3) + strain)
    return to_six(pulled + pulled.T) / 2
