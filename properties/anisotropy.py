"""Magnetocrystalline anisotropy: E(n) on the sphere, its constants, axes, torques, and its change with strain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from ase import Atoms
from numpy.typing import NDArray
from scipy.integrate import lebedev_rule
from scipy.spatial.transform import Rotation
from scipy.special import sph_harm_y

from .base import Options, Progress, Property, Row, option, refuse_idle, spread_of, variable
from .conventions import MICRO_EV, MJ_PER_M3
from .errors import CalculatorError, ConvergenceError, MomentError, OptionError
from .magnetoelastic import magnetoelastic
from .orders import KEPT, LOST_ORDER, order_is_kept
from .protocol import ZERO_MOMENT, SpinCalculator, moments_of, with_moments
from .symmetry import (
    Pattern,
    PatternSymmetry,
    nearest_rotation,
    orbit,
    pattern_symmetry,
    shortest_rotation,
    site_symmetry,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

LEBEDEV = {86: 15, 110: 17, 146: 19, 170: 21, 194: 23, 302: 29, 350: 31, 434: 35, 590: 41, 770: 47, 974: 53}
"""Number of directions and degree of the quadratures with positive weights that keep l ≤ 6 apart."""
DEGREES = (0, 2, 4, 6)
CHUNK = 64
SAME_AXIS = float(np.cos(np.deg2rad(20)))
"""Two axes with a larger cosine between them are one."""
ZERO_NOTE = {
    True: "E(n) is constant to rounding: no anisotropy, as it must be without spin-orbit coupling",
    False: "E(n) is constant to rounding: the anisotropy, if there is any, lies below the calculator's precision",
}


@dataclass(frozen=True)
class AnisotropyOptions(Options):
    """Options of the anisotropy.

    Parameters
    ----------
    directions : points of the Lebedev quadrature.
    relax : moments are relaxed ``"once"``, at the initial direction, or at ``"each"`` direction.
    expansion : constants to fit; ``"auto"`` takes those of the lattice.
    strain : also compute magnetoelastic constants and magnetostriction.
    strain_step : step of their finite differences.
    turns : turns of a non-collinear pattern about each direction.
    """

    directions: int = option(194, f"directions of the quadrature, one of {', '.join(map(str, LEBEDEV))}")
    relax: str = option("once", "relax moments once, or at each direction (magnitudes only)", ("once", "each"))
    expansion: str = option("auto", "constants to fit", ("auto", "uniaxial", "cubic", "general"))
    strain: bool = option(False, "also compute magnetoelastic constants and magnetostriction")
    strain_step: float = option(2e-3, "strain step of the magnetoelastic constants")
    turns: int = option(12, "turns of a non-collinear pattern about each direction")

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.directions not in LEBEDEV:
            raise OptionError(f"directions cannot be {self.directions}; it is one of {', '.join(map(str, LEBEDEV))}")
        if not 1e-5 <= self.strain_step <= 0.02:
            raise OptionError(f"strain_step cannot be {self.strain_step:g}; it lies between 1e-5 and 0.02")
        if self.turns < 4:
            raise OptionError(f"turns cannot be {self.turns}; it is at least 4")
        if not self.strain:
            refuse_idle(self, ("strain_step",), "strain is off")


class Surface:
    """The energy of a moment pattern turned rigidly, with its torque.

    Parameters
    ----------
    atoms : the structure.
    calculator : a single model.
    moments : the pattern, shape (N, 3), µB.
    each : relax the magnitudes again at each orientation.
    """

    def __init__(self, atoms: Atoms, calculator: SpinCalculator, moments: Array, each: bool = False) -> None:
        self.atoms, self.calculator, self.moments, self.each = atoms, calculator, moments, each

    def __call__(
        self, rotations: Array, tell: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, Array]:
        """Evaluate orientations.

        Parameters
        ----------
        rotations : shape (B, 3, 3).
        tell : called with the number done and the total.

        Returns
        -------
        ``energy`` (B,) in eV, ``torque`` -dE/dω = Σ m_i × B_i (B, 3) in eV, ``energies`` (B, N) where the
        calculator has site energies.
        """
        parts: list[dict[str, Array]] = []
        for begin in range(0, len(rotations), CHUNK):
            moments = np.einsum("bxy,iy->bix", rotations[begin : begin + CHUNK], self.moments)
            if self.each:
                images = [with_moments(self.atoms, m) for m in moments]
                moments = np.array(self.calculator.relax_moments(images, "magnitudes"))
            found = self.calculator.evaluate_spins(self.atoms, moments)
            part = {
                "energy": found["energy"],
                "torque": np.cross(moments, found["magnetic_forces"]).sum(axis=1),
            }
            if "energies" in found:
                part["energies"] = found["energies"]
            parts.append(part)
            tell(min(begin + CHUNK, len(rotations)), len(rotations))
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def refine(surface: Surface, start: Array, freedom: Array, sign: int, spread: float) -> tuple[Array, float, float]:
    """Turn a pattern to the nearest minimum (or maximum) of its energy by Newton steps on the torque.

    Parameters
    ----------
    surface : the energy.
    start : rotation matrix.
    freedom : turning axes carried with the pattern, shape (d, 3): two across the axis where it is collinear.
    sign : +1 for the minimum, -1 for the maximum.
    spread : range of the energy in eV; it sets the scale of the tolerance.

    Returns
    -------
    Rotation matrix, energy in eV, largest torque left in eV.

    Raises
    ------
    ConvergenceError : the torque left is more than a hundredth of the range.
    """
    step_size, rotation = 5e-3, start
    best = (np.inf, start, 0.0)
    for _ in range(40):
        axes = freedom @ rotation.T
        turns = [np.zeros(3)] + [s * step_size * a for a in axes for s in (1, -1)]
        found = surface(_turned(rotation, turns))
        slope = -sign * found["torque"] @ axes.T
        energy, residual = float(found["energy"][0]), float(np.abs(slope[0]).max())
        if residual < best[0]:
            best = (residual, rotation, energy)
        hessian = (slope[1::2] - slope[2::2]) / (2 * step_size)
        values, modes = np.linalg.eigh((hessian + hessian.T) / 2)
        if residual <= 1e-8 * spread:
            if values[0] > -1e-3 * spread:
                break
            best = (np.inf, rotation, energy)
            step = 0.1 * modes[:, 0]
        else:
            size = np.maximum(np.abs(values), 1e-6 * spread)
            step = -modes @ ((modes.T @ slope[0]) / size)
            step *= min(1.0, 0.3 / np.linalg.norm(step))
        scales = (1.0, 0.5, 0.25, 0.1)
        trials = _turned(rotation, [s * step @ axes for s in scales])
        gains = sign * (surface(trials)["energy"] - energy)
        accepted = np.flatnonzero(gains <= 1e-9 * spread)
        rotation = trials[accepted[0] if len(accepted) else -1]
    residual, rotation, energy = best
    if not residual <= 1e-2 * spread:
        raise ConvergenceError(
            f"the {'easy' if sign > 0 else 'hard'} axis did not converge: a torque of {residual:.1e} eV is left of an "
            f"energy range of {spread:.1e} eV; is the calculator's magnetic force the derivative of its energy?"
        )
    return rotation, energy, residual


def _turned(rotation: Array, vectors: Sequence[Array]) -> Array:
    return Rotation.from_rotvec(np.array(vectors)).as_matrix() @ rotation


def real_harmonics(directions: Array) -> tuple[Array, list[tuple[int, int]]]:
    """Evaluate the orthonormal real spherical harmonics of even degree up to 6.

    Parameters
    ----------
    directions : unit vectors, shape (B, 3).

    Returns
    -------
    Values, shape (B, 28), and (l, m) of the columns; m < 0 goes with sin |m|φ.
    """
    theta = np.arccos(np.clip(directions[:, 2], -1, 1))
    phi = np.arctan2(directions[:, 1], directions[:, 0])
    columns, labels = [], []
    for degree in DEGREES:
        for m in range(-degree, degree + 1):
            value = sph_harm_y(degree, abs(m), theta, phi)
            part = value.real if m >= 0 else value.imag
            columns.append(part * (np.sqrt(2) * (-1) ** m if m else 1.0))
            labels.append((degree, m))
    return np.array(columns).T, labels


def basis_of(kind: str, system: str, n: Array) -> tuple[list[str], Array]:
    """Return the functions that the anisotropy constants multiply.

    Parameters
    ----------
    kind : ``"uniaxial"`` or ``"cubic"``.
    system : the crystal system, which decides on the in-plane term.
    n : unit vectors in the frame of the lattice, shape (B, 3).

    Returns
    -------
    Names of the constants, and values of their functions, shape (B, K).
    """
    x, y, z = n.T
    if kind == "cubic":
        a, b, c = x**2, y**2, z**2
        return ["K1", "K2"], np.array([a * b + b * c + c * a, a * b * c]).T
    sin2 = x**2 + y**2
    names, columns = ["K1", "K2", "K3"], [sin2, sin2**2, sin2**3]
    if system == "tetragonal":
        names.append("K4phi")
        columns.append(x**4 - 6 * x**2 * y**2 + y**4)
    elif system in ("hexagonal", "trigonal"):
        names.append("K6phi")
        columns.append(x**6 - 15 * x**4 * y**2 + 15 * x**2 * y**4 - y**6)
    return names, np.array(columns).T


class Anisotropy(Property):
    """E(n) of the rigidly turned moment pattern, with the constants of the lattice's own symmetry."""

    name = "anisotropy"
    title = "magnetocrystalline anisotropy"
    options_type: ClassVar[type[Options]] = AnisotropyOptions

    def check(self, atoms: Atoms, calculator: SpinCalculator) -> None:
        """Refuse structures without moments, and moments that cannot be held at a direction."""
        super().check(atoms, calculator)
        if np.linalg.norm(moments_of(atoms), axis=1).max() <= ZERO_MOMENT:
            raise MomentError("no atom carries a moment, so there is no anisotropy; give moments in µB")
        mode = self.mode(calculator)
        if self.options.relax == "each" and mode != "magnitudes":
            raise OptionError(
                f"relax each and moments {mode} do not go together: at each direction it is magnitudes that are "
                "relaxed; choose moments magnitudes, or relax once"
            )

    def compute(self, atoms: Atoms, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Compute E(n), constants, axes and torques with one model."""
        progress("relax moments", 0, 1)
        moments = calculator.relax_moments([atoms], self.mode(calculator))[0]
        progress("relax moments", 1, 1)
        if np.linalg.norm(moments, axis=1).max() <= 1e-3:
            raise MomentError("the moments vanish when they are relaxed, so there is no anisotropy; start elsewhere")
        pattern = Pattern.of(moments)
        if self.options.strain and not pattern.collinear:
            raise OptionError("magnetoelastic constants need a collinear pattern of moments; leave strain out")
        symmetry = pattern_symmetry(atoms, pattern.along, self.options.symprec, self.options.mag_symprec)
        surface = Surface(atoms, calculator, moments, self.options.relax == "each")
        points, weights = lebedev_rule(LEBEDEV[self.options.directions])
        local = points.T
        directions = local @ symmetry.frame
        if pattern.collinear:
            dataset = self._collinear(pattern, symmetry, surface, local, directions, weights, progress)
        else:
            dataset = self._general(pattern, symmetry, surface, directions, weights, progress)
            dataset.attrs["images"] = _images_of(atoms, moments, self.options.symprec, self.options.mag_symprec)
        dataset = dataset.assign_coords(_site_coords(atoms))
        dataset["moments"] = variable(("site", "xyz"), moments, "µB", "moments that were turned")
        dataset["order_kept"] = variable((), float(order_is_kept(moments_of(atoms), moments)), "1", KEPT)
        dataset["frame"] = variable(("frame_axis", "xyz"), symmetry.frame, "1", "axes x', y', z' of the lattice")
        dataset.attrs["system"] = symmetry.system
        dataset.attrs["rotations"] = symmetry.rotations
        if self.options.strain:
            dataset.update(self._strain(atoms, calculator, moments, symmetry, progress))
        return dataset

    def _collinear(
        self,
        pattern: Pattern,
        symmetry: PatternSymmetry,
        surface: Surface,
        local: Array,
        directions: Array,
        weights: Array,
        progress: Progress,
    ) -> xr.Dataset:
        atoms, n_atoms = surface.atoms, len(surface.atoms)
        found = surface(pattern.towards(directions), lambda d, t: progress("directions", d, t))
        energy = found["energy"]
        spread = float(np.ptp(energy))
        zero = spread <= 1e-12 * max(1.0, float(np.abs(energy).max()))
        harmonics, labels = real_harmonics(local)
        broken = _asymmetry(harmonics.T @ (weights * (energy - energy.mean())), symmetry, local, weights)
        if broken > 1e-2 * spread and not zero:
            symmetry = replace(symmetry, rotations=np.eye(3)[None])
        easy, hard = np.full(3, np.nan), np.full(3, np.nan)
        bottom, top, residual = float(energy.min()), float(energy.max()), 0.0
        if not zero:
            easy, bottom, residual = self._extremum(pattern, symmetry, surface, directions, energy, 1, spread, progress)
            hard, top, _ = self._extremum(pattern, symmetry, surface, directions, energy, -1, spread, progress)
        axes = surface(pattern.towards(symmetry.frame))["energy"]

        micro = 1.0 / (MICRO_EV * n_atoms)
        per_volume = MJ_PER_M3 / atoms.get_volume()
        relative = energy - bottom
        kind = self._kind(symmetry.system)
        coefficients = harmonics.T @ (weights * relative)
        data: dict[str, Any] = {
            "energy": variable("direction", relative * micro, "µeV/atom", "E(n) - min E"),
            "torque": variable(
                ("direction", "xyz"), found["torque"] * micro, "µeV/atom", "torque -dE/dω on the moments"
            ),
            "mae": variable((), (top - bottom) * micro, "µeV/atom", "anisotropy energy, hard - easy"),
            "mae_volume": variable((), (top - bottom) * per_volume, "MJ/m³", "anisotropy energy, hard - easy"),
            "easy_axis": variable("xyz", easy, "1", "easy axis, Cartesian"),
            "hard_axis": variable("xyz", hard, "1", "hard axis, Cartesian"),
            "easy_energy": variable((), bottom, "eV", "total energy at the easy axis"),
            "easy_residual": variable((), residual * micro, "µeV/atom", "torque left at the easy axis"),
            "axis_energy": variable(
                "frame_axis", (axes - bottom) * micro, "µeV/atom", "E along the lattice axes - min E"
            ),
            "harmonics": variable(
                "harmonic", coefficients * micro, "µeV/atom", "coefficients of orthonormal real spherical harmonics"
            ),
            "harmonic_residual": variable(
                (),
                _rms(relative - harmonics @ coefficients, weights) * micro,
                "µeV/atom",
                "rms of E(n) beyond degree 6",
            ),
            "symmetry_residual": variable(
                (), broken * micro, "µeV/atom", "rms part of E(n) that the symmetry of lattice and moments forbids"
            ),
            "reversal_residual": variable(
                (),
                np.abs(surface(pattern.towards(-directions[:8]))["energy"] - energy[:8]).max() * micro,
                "µeV/atom",
                "largest |E(n) - E(-n)|",
            ),
            "tensor": variable(
                ("xyz", "xyz_2"),
                _second_rank(directions, relative, weights) * micro,
                "µeV/atom",
                "second-rank part A of E(n) = n·A·n, traceless, Cartesian",
            ),
            "is_zero": variable((), np.int32(zero), "1", "1 where E(n) is constant to rounding"),
        }
        if kind != "general":
            names, functions = basis_of(kind, symmetry.system if kind == "uniaxial" else "cubic", local)
            matrix = np.column_stack([np.ones(len(local)), functions])
            root = np.sqrt(weights)[:, None]
            constants = np.linalg.lstsq(matrix * root, relative * root[:, 0], rcond=None)[0]
            data["K"] = variable("constant", constants[1:] * micro, "µeV/atom", "anisotropy constant")
            data["K_volume"] = variable("constant", constants[1:] * per_volume, "MJ/m³", "anisotropy constant")
            data["K_residual"] = variable(
                (), _rms(relative - matrix @ constants, weights) * micro, "µeV/atom", "rms of E(n) beyond the constants"
            )
        if "energies" in found:
            sites = found["energies"] - found["energies"][int(np.argmin(energy))]
            data["site_energy"] = variable(
                ("direction", "site"), sites / MICRO_EV, "µeV", "site energy, less that of the lowest direction"
            )
            if kind != "general":
                per_site = np.linalg.lstsq(matrix * root, sites * root, rcond=None)[0][1:]
                data["K_site"] = variable(
                    ("constant", "site"), per_site / MICRO_EV, "µeV", "site's part of the constant"
                )
        coords: dict[str, Any] = {
            "n": variable(("direction", "xyz"), directions, "1", "direction of the moments, Cartesian"),
            "weight": variable("direction", weights, "sr", "weight of the quadrature, their sum is 4π"),
            "l": variable("harmonic", np.array([a for a, _ in labels]), "1", "degree"),
            "m": variable("harmonic", np.array([b for _, b in labels]), "1", "order; negative goes with sin"),
        }
        if kind != "general":
            coords["constant"] = variable("constant", np.array(names), "1", "name of the constant")
        attrs: dict[str, Any] = {"expansion": kind, "collinear": 1}
        if not zero:
            attrs["easy_axes"] = len(orbit(easy, symmetry.rotations))
        return xr.Dataset(data, {**coords, **_cartesian_coords()}, attrs)

    def _kind(self, system: str) -> str:
        if self.options.expansion != "auto":
            return str(self.options.expansion)
        if system == "cubic":
            return "cubic"
        return "uniaxial" if system in ("hexagonal", "tetragonal", "trigonal") else "general"

    @staticmethod
    def _extremum(
        pattern: Pattern,
        symmetry: PatternSymmetry,
        surface: Surface,
        directions: Array,
        energy: Array,
        sign: int,
        spread: float,
        progress: Progress,
    ) -> tuple[Array, float, float]:
        stage = "easy axis" if sign > 0 else "hard axis"
        progress(stage, 0, 1)
        starts: list[Array] = []
        for k in np.argsort(sign * energy, kind="stable"):
            images = symmetry.rotations @ directions[k]
            if all(np.abs(images @ s).max() < SAME_AXIS for s in starts):
                starts.append(directions[k])
            if len(starts) == 2:
                break
        freedom = np.linalg.svd(pattern.axis[None])[2][1:]
        results = [refine(surface, shortest_rotation(pattern.axis, s), freedom, sign, spread) for s in starts]
        rotation, value, residual = min(results, key=lambda r: sign * r[1])
        axis = rotation @ pattern.axis
        candidates = orbit(axis, symmetry.rotations)
        score = np.round(candidates @ symmetry.frame.T, 6)
        axis = candidates[np.lexsort((score[:, 1], score[:, 0], score[:, 2]))[-1]]
        progress(stage, 1, 1)
        return axis, value, residual

    def _general(
        self,
        pattern: Pattern,
        symmetry: PatternSymmetry,
        surface: Surface,
        directions: Array,
        weights: Array,
        progress: Progress,
    ) -> xr.Dataset:
        micro = 1.0 / (MICRO_EV * len(surface.atoms))
        angles = 2 * np.pi * np.arange(self.options.turns) / self.options.turns
        towards = pattern.towards(directions)
        turned = Rotation.from_rotvec((angles[None, :, None] * directions[:, None, :]).reshape(-1, 3)).as_matrix()
        rotations = turned @ np.repeat(towards, len(angles), axis=0)
        found = surface(rotations, lambda d, t: progress("orientations", d, t))
        energy = found["energy"]
        spread = float(np.ptp(energy))
        zero = spread <= 1e-12 * max(1.0, float(np.abs(energy).max()))
        easy = hard = np.full((3, 3), np.nan)
        bottom, top, residual = float(energy.min()), float(energy.max()), 0.0
        if not zero:
            easy, bottom, residual = refine(surface, rotations[int(energy.argmin())], np.eye(3), 1, spread)
            hard, top, _ = refine(surface, rotations[int(energy.argmax())], np.eye(3), -1, spread)
        shape = (len(directions), len(angles))
        per_volume = MJ_PER_M3 / surface.atoms.get_volume()
        data = {
            "energy": variable(
                ("direction", "turn"), (energy - bottom).reshape(shape) * micro, "µeV/atom", "E(n, turn) - min E"
            ),
            "torque": variable(
                ("direction", "turn", "xyz"),
                found["torque"].reshape(*shape, 3) * micro,
                "µeV/atom",
                "torque -dE/dω on the moments",
            ),
            "mae": variable((), (top - bottom) * micro, "µeV/atom", "anisotropy energy, hard - easy"),
            "mae_volume": variable((), (top - bottom) * per_volume, "MJ/m³", "anisotropy energy, hard - easy"),
            "easy_rotation": variable(("xyz", "xyz_2"), easy, "1", "rotation of the moments to their easy orientation"),
            "hard_rotation": variable(("xyz", "xyz_2"), hard, "1", "rotation of the moments to their hard orientation"),
            "easy_energy": variable((), bottom, "eV", "total energy at the easy orientation"),
            "easy_residual": variable((), residual * micro, "µeV/atom", "torque left at the easy orientation"),
            "is_zero": variable((), np.int32(zero), "1", "1 where E is constant to rounding"),
        }
        coords = {
            "n": variable(("direction", "xyz"), directions, "1", "direction of the pattern's axis, Cartesian"),
            "weight": variable("direction", weights, "sr", "weight of the quadrature, their sum is 4π"),
            "turn": variable("turn", np.rad2deg(angles), "degree", "turn of the pattern about its axis"),
            **_cartesian_coords(),
        }
        return xr.Dataset(data, coords, {"expansion": "none", "collinear": 0})

    def _strain(
        self,
        atoms: Atoms,
        calculator: SpinCalculator,
        moments: Array,
        symmetry: PatternSymmetry,
        progress: Progress,
    ) -> dict[str, xr.Variable]:
        mode = self.mode(calculator)

        def pattern_at(cell: Atoms) -> Array:
            return calculator.relax_moments(
                [with_moments(cell, moments)], "fixed" if mode == "fixed" else "magnitudes"
            )[0]

        def energies(cell: Atoms, pattern_moments: Array, directions: Array) -> Array:
            pattern = Pattern.of(pattern_moments)
            surface = Surface(cell, calculator, pattern_moments, self.options.relax == "each")
            return surface(pattern.towards(directions))["energy"]

        return magnetoelastic(
            atoms,
            calculator,
            pattern_at,
            energies,
            symmetry,
            self.options.strain_step,
            lambda d, t: progress("strain", d, t),
        )

    def finish(self, dataset: xr.Dataset, calculator: SpinCalculator) -> xr.Dataset:
        """Restore the length of axes and the orthogonality of rotations that were averaged; say in words what holds."""
        dataset.attrs.pop("rotations")
        dataset.attrs.pop("images", None)
        for name in ("easy_axis", "hard_axis"):
            if name in dataset:
                if (alike := _alike(dataset, name)) is not None:
                    dataset[name].values[...] = dataset[f"{name}_member"].values[alike].mean(axis=0)
                length = np.linalg.norm(dataset[name].values)
                dataset[name].values[...] = dataset[name].values / length
        for name in ("easy_rotation", "hard_rotation"):
            if name in dataset and np.isfinite(dataset[name].values).all():
                dataset[name].values[...] = nearest_rotation(dataset[name].values)
        if int(dataset["is_zero"]):
            dataset.attrs["note"] = ZERO_NOTE[calculator.soc is False]
        elif float(dataset.get("symmetry_residual", xr.DataArray(0.0))) > 1e-2 * float(dataset["mae"]):
            dataset.attrs["note"] = (
                f"E(n) breaks the lattice's symmetry by {float(dataset['symmetry_residual']):.2g} µeV/atom "
                "(rms): the constants do not describe it; is the calculator symmetric?"
            )
        elif "elastic" in dataset and not np.isfinite(dataset["magnetostriction_tensor"].values).all():
            lowest = float(np.linalg.eigvalsh(dataset["elastic"].values)[0])
            dataset.attrs["note"] = (
                f"no magnetostriction: the lattice is not stable (lowest stiffness {lowest:.3g} GPa), so no strain "
                "answers a constant load; relax the cell, or take another order"
            )
        return dataset

    def align(self, parts: list[xr.Dataset]) -> list[xr.Dataset]:
        """Choose among each member's equivalent axes the one closest to that of most members.

        Of equivalent orientations it is the one closest to the first member's.
        """
        if len({(p.attrs["expansion"], p.attrs["system"], p.attrs["collinear"]) for p in parts}) > 1:
            raise CalculatorError(
                "the members of the committee relax to moments of different symmetry; keep the moments fixed"
            )
        for name in ("easy_axis", "hard_axis"):
            if name not in parts[0]:
                continue
            images = [self._images(part, part[name].values) for part in parts]
            axes = np.array([part[name].values for part in parts])
            closest = np.array([np.abs(image @ axes.T).max(axis=0) for image in images])
            first = int((closest > SAME_AXIS).sum(axis=0).argmax())
            for part, image in zip(parts, images, strict=True):
                overlaps = image @ axes[first]
                if np.all(np.isfinite(overlaps)):
                    best = int(np.argmax(np.abs(overlaps)))
                    part[name].values[...] = image[best] * (1 if overlaps[best] >= 0 else -1)
            if name == "easy_axis" and "easy_axes" in parts[first].attrs:
                parts[0].attrs["easy_axes"] = parts[first].attrs["easy_axes"]
        for name in ("easy_rotation", "hard_rotation"):
            if name not in parts[0]:
                continue
            for part in parts[1:]:
                left, right = part.attrs["images"]
                images = left @ part[name].values @ right
                overlaps = np.einsum("gxy,xy->g", images, parts[0][name].values)
                if np.all(np.isfinite(overlaps)):
                    part[name].values[...] = images[int(np.argmax(overlaps))]
        return parts

    @staticmethod
    def _images(part: xr.Dataset, axis: Array) -> Array:
        images: Array = part.attrs["rotations"] @ axis
        return images

    def summary(self, dataset: xr.Dataset) -> list[Row]:
        """Return constants, energies and axes as a short table."""
        rows = [Row("lattice", f"{dataset.attrs['system']}, expansion {dataset.attrs['expansion']}")]
        lengths = np.linalg.norm(dataset["moments"].values, axis=1)
        for symbol in dict.fromkeys(dataset["element"].values.tolist()):
            mean = float(lengths[dataset["element"].values == symbol].mean())
            rows.append(Row(f"|m| of {symbol}", mean, "µB"))
        if float(dataset["order_kept"]) < 1:
            rows.append(Row("order", LOST_ORDER))
        if "K" in dataset:
            for name in dataset["constant"].values:
                where = {"constant": name}
                for key in ("K", "K_volume"):
                    units = dataset[key].attrs["units"]
                    rows.append(
                        Row(str(name), float(dataset[key].sel(**where)), units, spread_of(dataset, key, **where))
                    )
        for key, label in (
            ("mae", "E(hard) - E(easy)"),
            ("mae_volume", "E(hard) - E(easy)"),
            ("B1", "B1"),
            ("B2", "B2"),
            ("lambda100", "λ100"),
            ("lambda111", "λ111"),
        ):
            if key in dataset and np.isfinite(float(dataset[key])):
                rows.append(Row(label, float(dataset[key]), dataset[key].attrs["units"], spread_of(dataset, key)))
        if "axis_energy" in dataset:
            for k, name in enumerate(dataset["frame_axis"].values):
                vector = _written(dataset["frame"].values[k])
                value, spread = float(dataset["axis_energy"][k]), spread_of(dataset, "axis_energy", frame_axis=name)
                rows.append(Row(f"E({name} = {vector}) - min E", value, "µeV/atom", spread))
        if int(dataset["is_zero"]):
            rows.append(Row("easy axis", "none: E(n) is constant"))
        elif "easy_axis" in dataset:
            count = dataset.attrs.get("easy_axes", 1)
            easy, hard = (_written(dataset[name].values) for name in ("easy_axis", "hard_axis"))
            rows.append(Row("easy axis", f"{easy}, {count} equivalent{_who_agrees(dataset, 'easy_axis')}"))
            rows.append(Row("hard axis", f"{hard}{_who_agrees(dataset, 'hard_axis')}"))
        if "easy_rotation" in dataset and not int(dataset["is_zero"]):
            first = int(np.argmax(lengths > ZERO_MOMENT))
            easy = dataset["easy_rotation"].values @ dataset["moments"].values[first] / lengths[first]
            rows.append(Row(f"easy orientation, moment of atom {first} along", _written(easy)))
        if "K_residual" in dataset:
            rows.append(Row("rms beyond the constants", float(dataset["K_residual"]), "µeV/atom"))
        return rows

    def plot(self, dataset: xr.Dataset) -> "Figure":
        """Draw E(n) on the sphere, and along great circles with its expansion."""
        from .plot import plot_anisotropy

        return plot_anisotropy(dataset)


def _images_of(atoms: Atoms, moments: Array, symprec: float, mag_symprec: float) -> tuple[Array, Array]:
    """Return what takes an orientation of moments to those of the same energy.

    An operation g of the crystal takes the moments R m_i to det(g) g R m_i at another atom j. Where a rotation Q takes
    every m_j to m_i, or every one to -m_i, that is the pattern turned by det(g) g R Q, or its time reverse.

    Parameters
    ----------
    atoms : the structure.
    moments : not collinear, shape (N, 3), µB.
    symprec, mag_symprec : tolerances in Å and µB.

    Returns
    -------
    Rotations det(g) g and Q, shapes (G, 3, 3): the images of R are their products on its left and right.
    """
    crystal = site_symmetry(atoms, np.zeros_like(moments), False, symprec, mag_symprec)
    left, right = [], []
    for rotation, image in zip(crystal.rotations, crystal.images, strict=True):
        for sign in (1, -1):
            turn = nearest_rotation(sign * moments.T @ moments[image])
            if np.linalg.norm(moments[image] @ turn.T - sign * moments, axis=1).max() <= mag_symprec:
                left.append(np.linalg.det(rotation) * rotation)
                right.append(turn)
    return np.array(left), np.array(right)


def _alike(dataset: xr.Dataset, name: str) -> NDArray[np.bool_] | None:
    """Return which members of a committee share the axis that most of them have, None where there is none."""
    if f"{name}_member" not in dataset:
        return None
    axes = dataset[f"{name}_member"].values
    close = axes @ axes.T > SAME_AXIS
    return close[int(close.sum(axis=1).argmax())] if close.any() else None


def _who_agrees(dataset: xr.Dataset, name: str) -> str:
    """Return ``", k of n members"`` where some members have another axis, else nothing."""
    alike = _alike(dataset, name)
    return "" if alike is None or alike.all() else f", {alike.sum()} of {len(alike)} members"


def _rms(values: Array, weights: Array) -> float:
    return float(np.sqrt((weights * values**2).sum() / weights.sum()))


def _asymmetry(coefficients: Array, symmetry: PatternSymmetry, local: Array, weights: Array) -> float:
    """Return the rms of what averaging an expansion over the symmetry removes, in its unit."""
    values = real_harmonics(local)[0] @ coefficients
    turned = np.einsum("ax,gxy,by->gab", symmetry.frame, symmetry.rotations, symmetry.frame)
    images = np.einsum("gab,nb->gna", turned, local)
    mean = np.mean([real_harmonics(image)[0] @ coefficients for image in images], axis=0)
    return _rms(values - mean, weights)


def _second_rank(directions: Array, energy: Array, weights: Array) -> Array:
    """Return the traceless symmetric A of the second-rank part n·A·n of E(n), shape (3, 3)."""
    moment = np.einsum("b,bx,by->xy", weights * energy, directions, directions) / weights.sum()
    return 7.5 * (moment - np.eye(3) * np.trace(moment) / 3)


def _written(vector: Array) -> str:
    return "[" + " ".join(f"{x:.4g}" for x in np.where(np.abs(vector) < 5e-7, 0.0, vector)) + "]"


def _cartesian_coords() -> dict[str, Any]:
    return {
        "xyz": variable("xyz", np.array(["x", "y", "z"]), "1", "Cartesian axis"),
        "xyz_2": variable("xyz_2", np.array(["x", "y", "z"]), "1", "Cartesian axis"),
        "frame_axis": variable("frame_axis", np.array(["x'", "y'", "z'"]), "1", "axis of the lattice"),
    }


def _site_coords(atoms: Atoms) -> dict[str, Any]:
    return {
        "site": variable("site", np.arange(len(atoms)), "1", "index of the atom"),
        "element": variable("site", np.array(atoms.get_chemical_symbols()), "1", "chemical symbol"),
    }
