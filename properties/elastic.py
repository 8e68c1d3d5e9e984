"""Elastic constants with ions and moments held, ions relaxed, and both relaxed, and what follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from ase import Atoms, units
from numpy.typing import NDArray
from scipy.integrate import lebedev_rule
from scipy.linalg import block_diag, null_space

from .base import Options, Progress, Property, Row, option, refuse_idle, spread_of, variable
from .conventions import BOLTZMANN, GPA, HBAR, MJ_PER_M3, VOIGT
from .errors import ConvergenceError, OptionError
from .journal import Part
from .magnetoelastic import CUBIC, DEGREE, SOFTEST, cubic_constants, magnetoelastic, projected
from .orders import KEPT, LOST_ORDER, order_is_kept
from .protocol import ZERO_MOMENT, MomentMode, SpinCalculator, bare, free_axes, moments_of, with_moments
from .relax import Freedom, magnetic_residual, relax_structure
from .stiffness import birch, from_six, lagrangian, to_six, to_tensor, to_voigt, voigt_rotation
from .symmetry import (
    Pattern,
    PatternSymmetry,
    SiteSymmetry,
    lattice_frame,
    pattern_symmetry,
    primitive_cell,
    site_symmetry,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

LEVELS = ("clamped", "ions", "relaxed")
STRAINS = ("xx", "yy", "zz", "yz", "xz", "xy")
DIRECTIONS = ("100", "010", "001", "110", "101", "011", "111")
LEVEL_TEXT = {"clamped": "ions and moments clamped", "ions": "ions relaxed", "relaxed": "ions and moments relaxed"}
STATIONARY = 5e-3
"""Largest force in eV/Å at which the ions count as relaxed."""
SADDLE = 1e-9
"""Curvatures below this part of the largest count as none."""
UNMOVED = 1e-7
"""Couplings to strain below this, in eV/Å or eV/µB, count as none."""
SPHERE = 41
"""Degree of the quadrature over directions of sound."""
OFFSETS = (-2, -1, 1, 2)
STRAINED_FORCE = 1e-7
"""Largest force in eV/Å that a strained crystal keeps."""
KELVIN = np.array([[1.0, 1, 1, 2**0.5, 2**0.5, 2**0.5]])
"""Factors that make eigenvalues of a Voigt matrix those of the tensor."""
AVERAGES = {
    "bulk_voigt": ("bulk_modulus_voigt", "GPa", "bulk modulus, Voigt"),
    "bulk_reuss": ("bulk_modulus_reuss", "GPa", "bulk modulus, Reuss"),
    "bulk": ("bulk_modulus", "GPa", "bulk modulus, Hill"),
    "shear_voigt": ("shear_modulus_voigt", "GPa", "shear modulus, Voigt"),
    "shear_reuss": ("shear_modulus_reuss", "GPa", "shear modulus, Reuss"),
    "shear": ("shear_modulus", "GPa", "shear modulus, Hill"),
    "young": ("young_modulus", "GPa", "Young's modulus, Hill"),
    "poisson": ("poisson_ratio", "1", "Poisson's ratio, Hill"),
    "anisotropy": ("universal_anisotropy", "1", "universal anisotropy index"),
}
RESULTS = (
    "bulk_modulus",
    "shear_modulus",
    "young_modulus",
    "poisson_ratio",
    "universal_anisotropy",
    "debye_temperature",
    "velocity_longitudinal",
    "velocity_transverse",
)
INDEPENDENT = {
    "cubic": "11 12 44",
    "hexagonal": "11 12 13 33 44",
    "tetragonal": "11 12 13 33 44 66 16",
    "trigonal": "11 12 13 33 44 14 15",
    "orthorhombic": "11 22 33 12 13 23 44 55 66",
    "monoclinic": "11 22 33 12 13 23 44 55 66 16 26 36 45",
    "triclinic": "11 22 33 44 55 66 12 13 14 15 16 23 24 25 26 34 35 36 45 46 56",
}
"""Constants of each crystal system in the lattice's axes, z' the principal or unique one."""


@dataclass(frozen=True)
class ElasticOptions(Options):
    """Options of the elastic constants.

    Parameters
    ----------
    relax : what is relaxed first.
    pressure : that the cell is relaxed to, GPa.
    finite_strain : compute everything again from stresses of strained crystals.
    strain_step : of those, relative.
    """

    relax: str = option(
        "full", "relax first: cell, ions and moments; ions and moments; or moments alone", ("full", "ions", "none")
    )
    pressure: float = option(0.0, "hydrostatic pressure that the cell is relaxed to, GPa")
    finite_strain: bool = option(True, "compute everything again from stresses of strained crystals, and compare")
    strain_step: float = option(2e-3, "step of the finite strains")

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not 1e-5 <= self.strain_step <= 0.02:
            raise OptionError(f"strain_step cannot be {self.strain_step:g}; it lies between 1e-5 and 0.02")
        if not -100 <= self.pressure <= 1000:
            raise OptionError(f"pressure cannot be {self.pressure:g}; it lies between -100 and 1000")
        if self.pressure and self.relax != "full":
            raise OptionError("a pressure needs a cell that is relaxed; leave pressure out, or use relax full")
        if not self.finite_strain:
            refuse_idle(self, ("strain_step",), "no finite strains are computed")


@dataclass(frozen=True)
class Expansion:
    """Second derivatives of the energy by strain and by the inner variables that follow it.

    Parameters
    ----------
    strain : ∂²E/∂ε∂ε, eV, shape (6, 6).
    coupling : ∂²E/∂ε∂x, shape (6, X).
    inner : ∂²E/∂x∂x, shape (X, X).
    basis : the inner variables in terms of displacements (Å) and moments (µB), shape (6N, X).
    """

    strain: Array
    coupling: Array
    inner: Array
    basis: Array

    def followed(self) -> tuple[Array, Array]:
        """Let the inner variables follow the strain.

        Returns
        -------
        The Schur complement ``E_εε - E_εx E_xx⁻¹ E_xε`` (6, 6) in eV, and displacements and moments that a unit
        strain brings about, shape (6, 6N).

        Raises
        ------
        ConvergenceError : the state is no minimum, so nothing follows adiabatically.
        """
        answer = -self.solve(self.coupling.T).T
        return self.strain + answer @ self.coupling.T, answer @ self.basis.T

    def solve(self, right: Array) -> Array:
        """Return E_xx⁻¹ of columns, shape (X, C); a mode that costs nothing and that no strain moves is left out."""
        if not self.inner.size:
            return np.zeros_like(right)
        curvature, modes = np.linalg.eigh(self.inner)
        floor = SADDLE * max(float(np.abs(curvature).max()), 1.0)
        flat = np.abs(curvature) <= floor
        moved = np.abs(self.coupling @ modes).max(axis=0) > UNMOVED
        bad = np.flatnonzero((curvature < -floor) | (flat & moved))
        if len(bad):
            mode = self.basis @ modes[:, bad[0]]
            share = float(np.sum(mode[: len(mode) // 2] ** 2) / np.sum(mode**2))
            what, unit = ("ions", "Å²") if share > 0.5 else ("moments", "µB²")
            raise ConvergenceError(
                f"the {what} are not at a minimum (a curvature of {curvature[bad[0]]:.1e} eV/{unit}), so nothing "
                "follows a strain; relax without symmetry, or start from another order"
            )
        kept = modes[:, ~flat]
        return kept @ ((kept.T @ right) / curvature[~flat, None])


def expand(
    atoms: Atoms, calculator: SpinCalculator, mode: MomentMode, ions: bool, blocks: dict[str, Array] | None = None
) -> Expansion:
    """Collect the second derivatives at a structure with its moments, null modes left out.

    Rigid translations cost nothing, and without spin-orbit coupling neither do rotations of all moments together; both
    are projected out exactly, whatever rounding or finite differences make of them.

    Parameters
    ----------
    atoms : with moments (N, 3) in µB.
    calculator : a single model.
    mode : which components of the moments follow: none, those along the moments, or all.
    ions : whether the ions follow.
    blocks : ee, er, em, rr, rm, mm of the calculator, where they are at hand.
    """
    n = len(atoms)
    found = calculator.hessian(atoms, ("ee", "er", "em", "rr", "rm", "mm")) if blocks is None else blocks
    size = 3 * n
    full = np.zeros((2 * size, 2 * size))
    full[:size, :size] = found["rr"].reshape(size, size)
    full[:size, size:] = found["rm"].reshape(size, size)
    full[size:, :size] = full[:size, size:].T
    full[size:, size:] = found["mm"].reshape(size, size)
    coupling = np.concatenate([found["er"].reshape(6, size), found["em"].reshape(6, size)], axis=1)
    moves = null_space(np.tile(np.eye(3), n)) if ions else np.zeros((size, 0))
    moments = moments_of(atoms)
    if mode == "full":
        # moments turn along spheres: what is left of dE/d|m| would pass for a stiffness against turning
        lengths = np.linalg.norm(moments, axis=1)
        pull = -np.einsum("ix,ix->i", calculator.magnetic_forces(atoms, moments), moments)
        for i in np.flatnonzero(lengths > ZERO_MOMENT):
            axis = moments[i] / lengths[i]
            at = slice(size + 3 * i, size + 3 * i + 3)
            full[at, at] -= pull[i] / lengths[i] ** 2 * (np.eye(3) - np.outer(axis, axis))
    turning = mode == "full" and calculator.turns_freely(atoms)
    turns = free_axes(moments, mode, turning)
    basis = block_diag(moves, turns)
    inner = basis.T @ full @ basis
    return Expansion(found["ee"], coupling @ basis, (inner + inner.T) / 2, basis)


def christoffel(constants: Array, stress: Array, directions: Array, density: float) -> Array:
    """Return the sound velocities along directions.

    The waves of a stressed crystal obey ``ρ v² u_i = (C_ijkl + σ_jl δ_ik) n_j n_l u_k``.

    Parameters
    ----------
    constants : Lagrangian, GPa, shape (6, 6).
    stress : GPa, shape (3, 3).
    directions : unit vectors, shape (B, 3).
    density : kg/m³.

    Returns
    -------
    Velocities in m/s, slowest first, shape (B, 3); NaN where a wave is unstable.
    """
    matrix = np.einsum("ijkl,bj,bl->bik", to_tensor(constants), directions, directions)
    matrix = matrix + np.einsum("jl,bj,bl->b", stress, directions, directions)[:, None, None] * np.eye(3)
    squares = np.linalg.eigvalsh(matrix) * 1e9 / density
    return np.sqrt(np.where(squares > 0, squares, np.nan))


@dataclass(frozen=True)
class Averages:
    """Isotropic averages of a stiffness in GPa; units of the parts as their names in a dataset say."""

    bulk_voigt: float
    bulk_reuss: float
    bulk: float
    shear_voigt: float
    shear_reuss: float
    shear: float
    young: float
    poisson: float
    anisotropy: float


def compliance(stiffness: Array) -> Array:
    """Return the inverse of a symmetric stiffness, shape (6, 6); NaN where some strain costs nothing."""
    scale = np.abs(np.linalg.eigvalsh(stiffness))
    if scale.min() <= SOFTEST * scale.max():
        return np.full((6, 6), np.nan)
    return np.asarray(np.linalg.inv(stiffness), dtype=float)


def averages(stiffness: Array) -> Averages:
    """Average a stiffness over orientations after Voigt, Reuss and Hill.

    Young's modulus is ``9 K G / (3 K + G)``; the anisotropy index is ``5 G_V/G_R + K_V/K_R - 6`` (S. I. Ranganathan and
    M. Ostoja-Starzewski, Phys. Rev. Lett. 101, 055504 (2008)).

    Parameters
    ----------
    stiffness : Voigt, GPa, shape (6, 6).
    """
    c = (stiffness + stiffness.T) / 2
    s = compliance(c)
    bulk_voigt = c[:3, :3].sum() / 9
    bulk_reuss = 1 / s[:3, :3].sum()
    pairs = c[0, 1] + c[0, 2] + c[1, 2]
    shear_voigt = (np.trace(c[:3, :3]) - pairs + 3 * np.trace(c[3:, 3:])) / 15
    pairs = s[0, 1] + s[0, 2] + s[1, 2]
    shear_reuss = 15 / (4 * np.trace(s[:3, :3]) - 4 * pairs + 3 * np.trace(s[3:, 3:]))
    k, g = (bulk_voigt + bulk_reuss) / 2, (shear_voigt + shear_reuss) / 2
    return Averages(
        bulk_voigt,
        bulk_reuss,
        k,
        shear_voigt,
        shear_reuss,
        g,
        9 * k * g / (3 * k + g),
        (3 * k - 2 * g) / (6 * k + 2 * g),
        5 * shear_voigt / shear_reuss + bulk_voigt / bulk_reuss - 6,
    )


def debye_temperature(velocity: float, number_density: float) -> float:
    """Return ``(ħ/k_B) (6π² N/V)^⅓ v`` in K; velocity in m/s, density of atoms in 1/Å³."""
    return float(HBAR / BOLTZMANN * (6 * np.pi**2 * number_density * 1e30) ** (1 / 3) * velocity)


class Elastic(Property):
    """C_ij from second derivatives and from finite strains, with moduli, stability, sound and magnetostriction."""

    name = "elastic"
    title = "elastic constants"
    options_type: ClassVar[type[Options]] = ElasticOptions
    soc = False

    def compute(self, atoms: Atoms, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Relax, differentiate, strain, and derive with one model."""
        mode, start = self.mode(calculator), moments_of(atoms)
        atoms = self._stationary(atoms, calculator, mode, progress)
        moments, volume, n = moments_of(atoms), atoms.get_volume(), len(atoms)
        forces, stress = calculator.forces(atoms, moments), from_six(calculator.stress(atoms, moments))
        soc = not calculator.turns_freely(atoms)
        tolerances = self.options.symprec, self.options.mag_symprec
        group = site_symmetry(*primitive_cell(atoms, moments, *tolerances), soc, *tolerances)
        system, frame = lattice_frame(atoms, group.rotations, self.options.symprec)
        levels = _levels(mode)
        progress("second derivatives", 0, 1)
        blocks = calculator.hessian(atoms, ("ee", "er", "em", "rr", "rm", "mm"))
        expansions = {k: expand(atoms, calculator, m, ions, blocks) for k, (m, ions) in levels.items()}
        answers = {k: x.followed() for k, x in expansions.items()}
        progress("second derivatives", 1, 1)
        raw = np.array([lagrangian(answers[k][0] / volume, stress) for k in levels]) * GPA
        constants = np.array([_symmetric(c, group) for c in raw])
        held = raw[-1]
        if soc and mode == "full":
            followed, _ = expand(atoms, calculator, "magnitudes", True, blocks).followed()
            held = lagrangian(followed / volume, stress) * GPA
        stress = group.tensor(stress) * GPA
        coefficients = np.array([birch(c, stress) for c in constants])
        data = _variables(constants, coefficients, stress, atoms, frame)
        response = answers[list(levels)[-1]][1].reshape(6, 2, n, 3)
        data |= {
            "symmetry_removed": variable(
                "level", np.abs(raw - constants).max(axis=(1, 2)), "GPa", "largest part that symmetrisation removed"
            ),
            "internal_strain": variable(
                ("strain", "site", "xyz"), response[:, 0], "Å", "displacement beyond the strain's own, by unit strain"
            ),
            "moment_response": variable(
                ("strain", "site", "xyz"), response[:, 1], "µB", "change of the moments by unit strain"
            ),
            "cell": variable(("vector", "xyz"), atoms.cell[:], "Å", "lattice vectors of the state"),
            "positions": variable(("site", "xyz"), atoms.positions, "Å", "positions of the state"),
            "moments": variable(("site", "xyz"), moments, "µB", "moments of the state"),
            "order_kept": variable((), float(order_is_kept(start, moments)), "1", KEPT),
            "force_residual": variable(
                (), float(np.linalg.norm(forces, axis=1).max()), "eV/Å", "largest force of the state"
            ),
            "magnetic_residual": variable(
                (), magnetic_residual(atoms, calculator, mode), "eV/µB", "largest magnetic force on what follows"
            ),
        }
        if self.options.finite_strain:
            strained = self.compare_strains(atoms, calculator, stress, group, levels, progress)
            data["C_finite_strain"] = variable(
                ("level", "strain", "strain_2"), strained, "GPa", "Lagrangian constants from stresses at finite strain"
            )
            data["disagreement"] = variable(
                "level",
                np.abs(strained - constants).max(axis=(1, 2)),
                "GPa",
                "largest difference between second derivatives and finite strain",
            )
        pattern = Pattern.of(moments) if np.abs(moments).max() > ZERO_MOMENT else None
        if soc and pattern is not None and pattern.collinear:
            local = pattern_symmetry(atoms, pattern.along, self.options.symprec, self.options.mag_symprec)
            steady = np.array([*coefficients[:-1], birch(_symmetric(held, group), stress)])
            data |= self._magnetoelastic(atoms, calculator, pattern, local, frame, levels, steady, progress)
        coords = _coordinates(atoms, list(levels), frame)
        attrs = {"system": system, "symmetry_used": group.group, "rotations": len(group.rotations)}
        return xr.Dataset(data, coords, attrs)

    def _stationary(self, atoms: Atoms, calculator: SpinCalculator, mode: MomentMode, progress: Progress) -> Atoms:
        """Return the state whose constants are wanted."""
        options = self.options
        if options.relax == "none":
            state = with_moments(atoms, calculator.relax_moments([atoms], mode)[0])
            force = np.linalg.norm(calculator.forces(state, moments_of(state)), axis=1).max()
            if force > STATIONARY:
                raise ConvergenceError(
                    f"a force of {force:.1e} eV/Å acts on an atom, above {STATIONARY:.0e}, so the ions are not at "
                    "rest; use relax ions, or relax full"
                )
            return state
        freedom = Freedom(
            cell="full" if options.relax == "full" else "fixed",
            pressure=options.pressure / GPA,
            fmax=1e-5,
            symprec=options.symprec,
            mag_symprec=options.mag_symprec,
        )
        return relax_structure(atoms, calculator, mode, freedom, lambda d, t: progress("relax", d, t)).atoms

    def compare_strains(
        self,
        atoms: Atoms,
        calculator: SpinCalculator,
        stress: Array,
        group: SiteSymmetry,
        levels: dict[str, tuple[MomentMode, bool]],
        progress: Progress,
    ) -> Array:
        """Return the Lagrangian constants of each level from the stresses of strained crystals, GPa, (levels, 6, 6).

        Lagrangian strains and second Piola-Kirchhoff stresses go into pymatgen's fit, which is the central difference
        of fourth order on these points.
        """
        from pymatgen.core.elasticity.elastic import diff_fit
        from pymatgen.core.elasticity.strain import Strain
        from pymatgen.core.elasticity.stress import Stress

        strains, gradients = [], []
        for i, j in VOIGT:
            for k in OFFSETS:
                strain = Strain.from_index_amount((i, j), k * self.options.strain_step / (1 if i == j else 2))
                strains.append(strain)
                gradients.append(np.asarray(strain.get_deformation_matrix("symmetric"), dtype=float))
        found = []
        total, done = len(levels) * len(strains), 0
        for mode, ions in levels.values():
            kirchhoff = []
            for gradient in gradients:
                cauchy = _strained_stress(atoms, calculator, gradient, mode, ions) * GPA
                kirchhoff.append(Stress(cauchy).piola_kirchoff_2(gradient))
                done += 1
                progress("finite strain", done, total)
            fitted = diff_fit(strains, kirchhoff, eq_stress=Stress(stress), order=2)[0]
            found.append(_symmetric(np.asarray(fitted.voigt, dtype=float), group))
        return np.array(found)

    def _magnetoelastic(
        self,
        atoms: Atoms,
        calculator: SpinCalculator,
        pattern: Pattern,
        local: PatternSymmetry,
        frame: Array,
        levels: dict[str, tuple[MomentMode, bool]],
        coefficients: Array,
        progress: Progress,
    ) -> dict[str, xr.Variable]:
        """Return the magnetoelastic constants from ∂²E/∂ε∂n of the pattern turned rigidly, ions and |m| following.

        T is a change of Cauchy's stress, so the strain that takes it back under a constant load is ``-B⁻¹ T``, with the
        stress-strain coefficients B (levels, 6, 6) in GPa at directions of the moments that are held: the softening by
        moments that turn with a strain is no part of the strain at given directions. The axes of `local` are those of
        E(n), whose symmetry the direction of the moments does not lower; T is written in the dataset's, those of C.
        """
        points, weights = lebedev_rule(DEGREE)
        upper = [k for k, n in enumerate(points.T) if tuple(np.sign(np.round(n[::-1], 9))) > (0, 0, 0)]
        n_local, weights = points.T[upper], weights[upper]
        directions = n_local @ local.frame
        to_voigt_frame = voigt_rotation(local.frame)
        slopes = np.zeros((len(levels), 6, len(directions), 3))
        for b, rotation in enumerate(pattern.towards(directions)):
            turned = with_moments(atoms, pattern.moments @ rotation.T)
            blocks = calculator.hessian(turned, ("ee", "er", "em", "rr", "rm", "mm"))
            tilt = np.einsum("i,xy->xiy", pattern.along, np.eye(3) - np.outer(directions[b], directions[b]))
            by_moment = np.concatenate([blocks["rm"].reshape(-1, tilt[0].size), blocks["mm"].reshape(-1, tilt[0].size)])
            for level, (mode, ions) in enumerate(levels.values()):
                follow = expand(turned, calculator, "magnitudes" if mode != "fixed" else "fixed", ions, blocks)
                across = tilt.reshape(3, -1).T
                mixed = blocks["em"].reshape(6, -1) @ across
                mixed = mixed - follow.coupling @ follow.solve(follow.basis.T @ by_moment @ across)
                slopes[level, :, b] = to_voigt_frame @ mixed @ local.frame.T
            progress("magnetoelastic", b + 1, len(directions))
        volume = atoms.get_volume()
        tensors = np.array([projected(n_local, weights, s / volume) for s in slopes])
        stiffness = np.array([to_voigt_frame @ c @ to_voigt_frame.T for c in coefficients]) / GPA
        between = frame @ local.frame.T
        written = np.einsum("vw,lwab,xa,yb->lvxy", voigt_rotation(between), tensors, between, between)
        data = {
            "magnetoelastic_tensor": variable(
                ("level", "strain", "frame_axis", "frame_axis_2"),
                written * MJ_PER_M3,
                "MJ/m³",
                "magnetoelastic coupling T of f = Σ ε_v n·T_v·n, in the lattice's axes",
            )
        }
        if self.options.finite_strain:
            check = magnetoelastic(
                atoms,
                calculator,
                lambda cell: pattern.moments,
                lambda cell, m, n: calculator.evaluate_spins(
                    cell, np.einsum("bxy,iy->bix", pattern.towards(n), m), magnetic_forces=False
                )["energy"],
                local,
                self.options.strain_step,
                lambda done, total: progress("magnetoelastic, finite strain", done, total),
            )
            difference = np.abs(check["magnetoelastic_tensor"].values - tensors[0] * MJ_PER_M3).max()
            data["magnetoelastic_disagreement"] = variable(
                (), difference, "MJ/m³", "largest difference to T from finite strains, ions and moments clamped"
            )
        if local.system == "cubic":
            found = [cubic_constants(t, c) for t, c in zip(tensors, stiffness, strict=True)]
            for key, (unit, text) in CUBIC.items():
                scale = MJ_PER_M3 if unit == "MJ/m³" else 1.0
                data[key] = variable("level", np.array([f[key] for f in found]) * scale, unit, text)
        return data

    def summary(self, dataset: xr.Dataset) -> list[Row]:
        """Return the independent constants of each level, and what follows from the last."""
        return _rows(dataset)

    def plot(self, dataset: xr.Dataset) -> "Figure":
        """Draw the constants of each level, and Young's modulus over directions."""
        from .plot import plot_elastic

        return plot_elastic(dataset)


def _levels(mode: MomentMode) -> dict[str, tuple[MomentMode, bool]]:
    """Return how moments follow at each level, and whether ions do."""
    found: dict[str, tuple[MomentMode, bool]] = {"clamped": ("fixed", False), "ions": ("fixed", True)}
    return found if mode == "fixed" else {**found, "relaxed": (mode, True)}


def _symmetric(stiffness: Array, group: SiteSymmetry) -> Array:
    return to_voigt(group.tensor(to_tensor(stiffness)))


def _strained_stress(atoms: Atoms, calculator: SpinCalculator, gradient: Array, mode: MomentMode, ions: bool) -> Array:
    """Return the Cauchy stress in eV/Å³, shape (3, 3), after a deformation, with everything relaxed that follows it."""
    image = bare(atoms)
    image.set_cell(atoms.cell[:] @ gradient.T)
    image.set_positions(atoms.positions @ gradient.T)

    def compute() -> Part:
        state = image
        if ions:
            force = max(STRAINED_FORCE, 0.1 * calculator.moment_tolerance)
            freedom = Freedom(cell="fixed", fmax=force, symmetry=False)
            state = relax_structure(image, calculator, mode, freedom).atoms
        else:
            state = with_moments(image, calculator.relax_moments([image], mode)[0])
        return {"stress": from_six(calculator.stress(state, moments_of(state)))}

    return calculator.part("strained stress", {"atoms": image, "mode": mode, "ions": ions}, compute)["stress"]


def _variables(
    constants: Array, coefficients: Array, stress: Array, atoms: Atoms, frame: Array
) -> dict[str, xr.Variable]:
    """Return constants of all levels, and moduli, stability and sound that follow, as variables."""
    count, volume = len(atoms), atoms.get_volume()
    density = float(atoms.get_masses().sum() / units.kg / volume * 1e30)
    matrix = voigt_rotation(frame)
    two = ("level", "strain", "strain_2")
    lattice = np.array([matrix @ c @ matrix.T for c in coefficients])
    found = {
        "C": variable(two, coefficients, "GPa", "elastic constants dσ/dε: Birch's stress-strain coefficients"),
        "C_lagrangian": variable(two, constants, "GPa", "Lagrangian constants (1/V) ∂²E/∂η∂η; C at zero stress"),
        "C_lattice": variable(two, lattice, "GPa", "elastic constants dσ/dε in the lattice's axes"),
        "stress": variable("strain", to_six(stress), "GPa", "stress of the state"),
        "density": variable((), density, "kg/m³", "mass density"),
    }
    halves = (coefficients + coefficients.transpose(0, 2, 1)) / 2
    eigenvalues = np.array([np.linalg.eigvalsh(KELVIN * c * KELVIN.T) for c in halves])
    stable = eigenvalues[:, 0] > SOFTEST * np.abs(eigenvalues).max(axis=1)
    found["S"] = variable(
        two, np.array([compliance(c) for c in halves]), "1/GPa", "elastic compliances, NaN where a strain costs nothing"
    )
    found["eigenvalues"] = variable(
        ("level", "mode"), eigenvalues, "GPa", "eigenvalues of C as a tensor, all positive where it is stable (Born)"
    )
    found["stable"] = variable("level", stable.astype(float), "1", "1 where every eigenvalue of C is positive")
    mean = [averages(c) for c in halves]
    for key, (name, unit, text) in AVERAGES.items():
        found[name] = variable("level", np.array([getattr(a, key) for a in mean]), unit, text)
    longitudinal = np.array([_root((a.bulk + 4 / 3 * a.shear) * 1e9 / density) for a in mean])
    transverse = np.array([_root(a.shear * 1e9 / density) for a in mean])
    found["velocity_longitudinal"] = variable("level", longitudinal, "m/s", "longitudinal velocity, Hill's average")
    found["velocity_transverse"] = variable("level", transverse, "m/s", "transverse velocity, Hill's average")
    hill = (3 / (longitudinal**-3 + 2 * transverse**-3)) ** (1 / 3)
    points, weights = lebedev_rule(SPHERE)
    waves = np.array([christoffel(c, stress, points.T, density) for c in constants])
    exact = (3 * weights.sum() / np.einsum("b,lbk->l", weights, waves**-3)) ** (1 / 3)
    for name, speed, text in (
        ("debye_temperature", exact, "Debye temperature, over all directions of sound"),
        ("debye_temperature_hill", hill, "Debye temperature, from Hill's average"),
    ):
        found[name] = variable("level", np.array([debye_temperature(v, count / volume) for v in speed]), "K", text)
    along = _directions(frame)
    found["velocity"] = variable(
        ("level", "direction", "branch"),
        np.array([christoffel(c, stress, along, density) for c in constants]),
        "m/s",
        "sound velocities along directions of the lattice's axes, slowest first",
    )
    return found


def _root(square: float) -> float:
    return float(np.sqrt(square)) if square > 0 else float("nan")


def _directions(frame: Array) -> Array:
    indices = np.array([[int(x) for x in d] for d in DIRECTIONS], dtype=float)
    return indices / np.linalg.norm(indices, axis=1)[:, None] @ frame


def _coordinates(atoms: Atoms, levels: Sequence[str], frame: Array) -> dict[str, xr.Variable]:
    return {
        "level": variable("level", np.array(levels), "1", "what follows the strain"),
        "strain": variable("strain", np.array(STRAINS), "1", "Voigt component, engineering shear"),
        "strain_2": variable("strain_2", np.array(STRAINS), "1", "Voigt component, engineering shear"),
        "mode": variable("mode", np.arange(6), "1", "eigenvalue number"),
        "direction": variable("direction", np.array(DIRECTIONS), "1", "direction in the lattice's axes x', y', z'"),
        "branch": variable("branch", np.arange(3), "1", "branch of sound"),
        "vector": variable("vector", np.array(["a", "b", "c"]), "1", "lattice vector"),
        "xyz": variable("xyz", np.array(["x", "y", "z"]), "1", "Cartesian axis"),
        "frame_axis": variable("frame_axis", np.array(["x'", "y'", "z'"]), "1", "axis of the lattice"),
        "frame_axis_2": variable("frame_axis_2", np.array(["x'", "y'", "z'"]), "1", "axis of the lattice"),
        "frame": variable(("frame_axis", "xyz"), frame, "1", "axes x', y', z' of the lattice, Cartesian"),
        "site": variable("site", np.arange(len(atoms)), "1", "index of the atom"),
        "element": variable("site", np.array(atoms.get_chemical_symbols()), "1", "chemical symbol"),
    }


def _rows(dataset: xr.Dataset) -> list[Row]:
    rows = []
    levels = [str(x) for x in dataset["level"].values]
    for level in reversed(levels):
        for label in INDEPENDENT[dataset.attrs["system"]].split():
            where: dict[str, Any] = {
                "level": level,
                "strain": STRAINS[int(label[0]) - 1],
                "strain_2": STRAINS[int(label[1]) - 1],
            }
            value = float(dataset["C_lattice"].sel(**where))
            rows.append(Row(f"C{label}, {LEVEL_TEXT[level]}", value, "GPa", spread_of(dataset, "C_lattice", **where)))
    last: dict[str, Any] = {"level": levels[-1]}
    for name in RESULTS:
        item = dataset[name]
        rows.append(
            Row(
                str(item.attrs["long_name"]),
                float(item.sel(**last)),
                item.attrs["units"],
                spread_of(dataset, name, **last),
            )
        )
    if float(dataset["order_kept"]) < 1:
        rows.append(Row("order", LOST_ORDER))
    unstable = [LEVEL_TEXT[k] for k in levels if float(dataset["stable"].sel(level=k)) < 1]
    rows.append(Row("Born stability", f"unstable: {', '.join(unstable)}" if unstable else "stable"))
    lowest = dataset["eigenvalues"].sel(**last, mode=0)
    rows.append(
        Row("smallest eigenvalue of C", float(lowest), "GPa", spread_of(dataset, "eigenvalues", **last, mode=0))
    )
    if "disagreement" in dataset:
        for level in levels:
            text = f"derivatives against finite strain, {LEVEL_TEXT[level]}"
            rows.append(Row(text, float(dataset["disagreement"].sel(level=level)), "GPa"))
    for name in CUBIC:
        if name in dataset and np.isfinite(float(dataset[name].sel(**last))):
            item = dataset[name].sel(**last)
            rows.append(
                Row(item.attrs["long_name"], float(item), item.attrs["units"], spread_of(dataset, name, **last))
            )
    if "magnetoelastic_disagreement" in dataset:
        rows.append(
            Row("magnetoelastic T against finite strain", float(dataset["magnetoelastic_disagreement"]), "MJ/m³")
        )
    rows += [
        Row("removed by symmetry", float(dataset["symmetry_removed"].max()), "GPa"),
        Row("largest stress of the state", float(np.abs(dataset["stress"].values).max()), "GPa"),
        Row("largest force of the state", float(dataset["force_residual"]), "eV/Å"),
        Row("magnetic force of the state", float(dataset["magnetic_residual"]), "eV/µB"),
    ]
    return rows
