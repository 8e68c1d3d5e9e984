"""Spin spirals: E(q) and |m|(q) along a path, the wave vector of the lowest one, magnon energies, chirality."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from ase import Atoms
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from .base import (
    Options,
    Progress,
    Property,
    Row,
    of_members,
    option,
    over_members,
    refuse_idle,
    spread_of,
    variable,
)
from .errors import CalculatorError, ConvergenceError, MomentError, OptionError
from .protocol import (
    MOMENT_TOLERANCE,
    SMALLEST_MOMENT,
    ZERO_MOMENT,
    MomentMode,
    SpinCalculator,
    minimise,
    moments_of,
    with_moments,
)
from .symmetry import Pattern, band_path, pattern_symmetry, primitive_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

CHUNK = 256
LENGTH_STEP = 1e-3
WAVE_STEP = 3e-3
MAX_CELLS = 64
SMALL_WAVES = (0.01, 0.02, 0.03)
"""Lengths of the wave vectors that a stiffness is fitted on, 1/Å."""
SMALL_CONES = (1.0, 2.0)
"""Cone angles of frozen magnons, degrees."""
PHASE_STEP = 1e-3
"""Turn of one sublattice against the others in the differences of torques, radian."""
MAX_PERIOD = 4
"""Largest multiple of a reciprocal lattice vector that is tried as a period of E(q)."""


@dataclass(frozen=True)
class SpiralOptions(Options):
    """Options of the spirals.

    Parameters
    ----------
    path : special points such as ``GHPGN``; ``auto`` is that of seekpath.
    points : wave vectors along the path.
    q : wave vectors instead of a path, three numbers each, in the reciprocal lattice of the structure given.
    axis : what the moments turn about, Cartesian.
    cone : angle between moments and axis in degrees; 90 is a flat spiral.
    mesh : points per direction of the mesh on which the lowest spiral is looked for; 0 leaves it out.
    """

    path: str = option("auto", "special points such as GHPGN; auto is that of seekpath")
    points: int = option(61, "wave vectors along the path")
    q: tuple[float, ...] = option((), "wave vectors instead of a path, three numbers each, reciprocal lattice units")
    axis: tuple[float, ...] = option((0.0, 0.0, 1.0), "axis the moments turn about, Cartesian")
    cone: float = option(90.0, "angle between moments and axis in degrees; 90 is flat")
    mesh: int = option(8, "mesh on which the lowest spiral is looked for; 0 leaves it out")

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if len(self.q) % 3:
            raise OptionError(f"q holds {len(self.q)} numbers; give three for each wave vector")
        if len(self.axis) != 3 or not np.linalg.norm(self.axis) > 0:
            raise OptionError("axis must be three numbers, not all zero")
        if not 0 < self.cone <= 90:
            raise OptionError(f"cone cannot be {self.cone:g}; it lies above 0 and up to 90 degrees")
        if not 2 <= self.points <= 20000:
            raise OptionError(f"points cannot be {self.points}; it lies between 2 and 20000")
        if self.mesh != 0 and not 2 <= self.mesh <= 64:
            raise OptionError(f"mesh cannot be {self.mesh}; it is 0, or lies between 2 and 64")


@dataclass(frozen=True)
class Waves:
    """Wave vectors to compute.

    Parameters
    ----------
    q : fractional coordinates in the reciprocal lattice of the primitive cell, shape (Q, 3).
    position : place along the path in 1/Å, shape (Q,).
    labels : names of special points and their places.
    """

    q: Array
    position: Array
    labels: list[tuple[str, float]]


class SpinSpiral(Property):
    """E(q) of spirals in the primitive cell by the generalised Bloch theorem; with spin-orbit, in supercells."""

    name = "spiral"
    title = "spin spirals"
    options_type: ClassVar[type[Options]] = SpiralOptions
    soc = False

    def check(self, atoms: Atoms, calculator: SpinCalculator) -> None:
        """Refuse patterns that no spiral can be made of."""
        super().check(atoms, calculator)
        moments = moments_of(atoms)
        if np.linalg.norm(moments, axis=1).max() <= ZERO_MOMENT:
            raise MomentError("no atom carries a moment, so there is no spiral; give moments in µB")
        if not Pattern.of(moments).collinear:
            raise MomentError("a spiral is made of collinear moments; give moments along one axis")
        if calculator.soc is True and self.mode(calculator) != "fixed":
            raise OptionError(
                "with spin-orbit coupling moments differ from cell to cell; keep them fixed: --moments fixed"
            )
        if self.mode(calculator) == "full":
            raise OptionError("moments relaxed in full would leave the spiral; relax magnitudes, or keep them fixed")
        if self.options.q:
            refuse_idle(self.options, ("path", "points"), "wave vectors are given with q")
        elif calculator.soc is True:
            refuse_idle(self.options, ("path", "points"), "spin-orbit coupling makes wave vectors fit supercells")
        if self.options.mesh:
            if calculator.soc is True:
                refuse_idle(self.options, ("mesh",), "spin-orbit coupling leaves no lowest spiral to look for")
            elif not calculator.has("evaluate_spirals"):
                refuse_idle(self.options, ("mesh",), "the calculator has no evaluate_spirals")
        if not calculator.has("evaluate_spirals") and not self.options.q:
            raise CalculatorError(
                "the calculator has no evaluate_spirals; give commensurate wave vectors with --q, which fit supercells"
            )

    def _waves(self, given: Atoms, cell: Atoms, soc: bool) -> Waves:
        transform = cell.cell[:] @ np.linalg.inv(given.cell[:])
        if self.options.q:
            q = np.array(self.options.q).reshape(-1, 3) @ transform.T
            return Waves(q, np.arange(len(q), dtype=float), [])
        if soc:
            steps = np.arange(-4, 5) / 8
            q = np.concatenate([np.outer(steps, unit) for unit in np.eye(3)])
            return Waves(q, np.arange(len(q), dtype=float), [])
        return Waves(*band_path(cell, self.options.path, self.options.points, self.options.symprec))

    def compute(self, atoms: Atoms, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Compute E(q), moments, and the lowest spiral with one model."""
        pattern = Pattern.of(moments_of(atoms))
        soc = calculator.soc is True
        cell, along = primitive_cell(atoms, pattern.along, self.options.symprec, self.options.mag_symprec)
        cone, mode = float(np.deg2rad(self.options.cone)), self.mode(calculator)
        spirals = Spirals(cell, along, calculator, self.options.axis, cone, mode)
        waves = self._waves(atoms, cell, soc)
        values = spirals(np.concatenate([np.zeros((1, 3)), waves.q]), lambda d, t: progress("wave vectors", d, t))
        energy, lengths = values
        magnetic = np.abs(along) > ZERO_MOMENT
        if lengths.max() < SMALLEST_MOMENT:
            raise MomentError("the moments vanish when they are relaxed, so there is no spiral; start elsewhere")
        n = len(cell)
        relative = energy[1:] - energy[0]
        reciprocal = 2 * np.pi * cell.cell.reciprocal()[:]
        data: dict[str, Any] = {
            "energy": variable("wave", relative * 1e3 / n, "meV/atom", "E(q) - E(0)"),
            "length": variable(("wave", "site"), lengths[1:], "µB", "|m|"),
            "energy_zero": variable((), energy[0] / n, "eV/atom", "E(0)"),
        }
        coords: dict[str, Any] = {
            "q": variable(("wave", "xyz"), waves.q, "1", "wave vector in the reciprocal lattice of the primitive cell"),
            "k": variable(("wave", "xyz"), waves.q @ reciprocal, "1/Å", "wave vector, Cartesian"),
            "position": variable("wave", waves.position, "1/Å" if waves.labels else "1", "place along the path"),
            "site": variable("site", np.arange(n), "1", "index of the atom in the primitive cell"),
            "element": variable("site", np.array(cell.get_chemical_symbols()), "1", "chemical symbol"),
            "scaled": variable(("site", "xyz"), spirals.scaled, "1", "fractional position in the primitive cell"),
            "moment": variable("site", along, "µB", "moment along the common axis in the order given"),
            "xyz": variable("xyz", np.array(["x", "y", "z"]), "1", "Cartesian axis, or reciprocal lattice vector"),
        }
        if magnetic.sum() == 1 and not soc:
            moment = lengths[1:, magnetic][:, 0]
            magnon = 4 * relative / np.where(moment >= SMALLEST_MOMENT, moment, np.nan) / np.sin(spirals.cone) ** 2
            data["magnon"] = variable("wave", magnon * 1e3, "meV", "magnon energy (4/m)(E(q) - E(0))/sin²θ")
        if soc:
            mirrored, _ = spirals(-waves.q, lambda d, t: progress("opposite chirality", d, t))
            data["asymmetry"] = variable("wave", (energy[1:] - mirrored) * 1e3 / n, "meV/atom", "E(q) - E(-q)")
        attrs: dict[str, Any] = {
            "route": "supercells, spin-orbit coupling on" if soc else "generalised Bloch theorem",
            "primitive_cell": cell.cell[:].tolist(),
            "primitive_atoms": n,
            "path_labels": [list(x) for x in waves.labels],
        }
        if self.options.mesh and not soc and calculator.has("evaluate_spirals"):
            symmetry = pattern_symmetry(cell, along, self.options.symprec, self.options.mag_symprec)
            lowest, bottom = self._lowest(spirals, waves.q, energy[1:], progress)
            nothing = wave_classes(spirals.scaled[magnetic])[1] if magnetic.sum() > 1 else None
            lowest = canonical(lowest, cell, symmetry.rotations, nothing)
            data["minimum_q"] = variable(
                "xyz", lowest, "1", "wave vector of the lowest spiral, reciprocal lattice of the primitive cell"
            )
            data["minimum_energy"] = variable(
                (), min(bottom - energy[0], 0.0) * 1e3 / n, "meV/atom", "E - E(0) of the lowest spiral"
            )
        return xr.Dataset(data, coords, attrs)

    def _lowest(self, spirals: "Spirals", q: Array, energy: Array, progress: Progress) -> tuple[Array, float]:
        """Return wave vector and energy (eV) of the lowest spiral, refined from the best of path and mesh."""
        scaled = spirals.scaled[spirals.carrying]
        mesh = _search_mesh(self.options.mesh, wave_classes(scaled)[0], scaled)
        found, _ = spirals(mesh, lambda d, t: progress("mesh", d, t))
        everything, energies = np.concatenate([mesh, q]), np.concatenate([found, energy])
        spread = float(np.ptp(energies))
        start = everything[int(np.argmin(np.round(energies, 12)))]
        if spread <= 1e-12 * max(1.0, float(np.abs(energies).max())):
            return np.zeros(3), float(energies.min())
        progress("refine", 0, 1)
        units = WAVE_STEP * np.eye(3)
        weights = np.array([1 / 12, -8 / 12, 8 / 12, -1 / 12]) / WAVE_STEP
        shifts = np.array([k * u for u in units for k in (-2, -1, 1, 2)])

        def gradient(x: Array) -> Array:
            slopes: Array = spirals(x + shifts)[0].reshape(3, 4) @ weights
            return slopes / spread

        def hessian(x: Array) -> Array:
            corners = np.array([[u + v, u - v, v - u, -u - v] for u in units for v in units]).reshape(-1, 3)
            values = spirals(x + corners)[0].reshape(3, 3, 4)
            return values @ np.array([1, -1, -1, 1]) / (4 * WAVE_STEP**2 * spread)

        best = start
        for _ in range(3):
            best = minimise(
                lambda x: float(spirals(x[None])[0][0]) / spread,
                gradient,
                hessian,
                best,
                tolerance=1e-8,
                max_step=0.05,
                what="the wave vector of the lowest spiral",
                unit="band widths per reciprocal lattice vector",
            )
            curvature, modes = np.linalg.eigh(hessian(best))
            if curvature[0] > -1e-2:
                break
            best = best + 0.02 * modes[:, 0]
        progress("refine", 1, 1)
        return best, float(spirals(best[None])[0][0])

    def finish(self, dataset: xr.Dataset, calculator: SpinCalculator) -> xr.Dataset:
        """Name the lowest spiral, and take magnon energies over the members that have them."""
        dataset = over_members(dataset, ("magnon",))
        if "minimum_q" in dataset:
            cone = f", cone of {self.options.cone:g}°" if self.options.cone < 90 else ""
            agreed = "minimum_q_std" not in dataset or float(dataset["minimum_q_std"].max()) < 1e-3
            waves = dataset["minimum_q"].values[None] if agreed else dataset["minimum_q_member"].values
            names = [f"{name_of(q, dataset['scaled'].values, dataset['moment'].values)}{cone}" for q in waves]
            counted = ", ".join(f"{name} ({count} of {len(names)})" for name, count in Counter(names).most_common())
            dataset.attrs["minimum"] = names[0] if agreed else f"members disagree: {counted}"
        return dataset

    def summary(self, dataset: xr.Dataset) -> list[Row]:
        """Return the lowest spiral and the extent of E(q) as a short table."""
        rows = [Row("route", dataset.attrs["route"]), Row("wave vectors", str(dataset.sizes["wave"]))]
        if "minimum_q" in dataset:
            q = "  ".join(f"{x:.4f}" for x in dataset["minimum_q"].values)
            name = str(dataset.attrs["minimum"])
            # a mean of different wave vectors is none
            rows.append(Row("lowest spiral", name if name.startswith("members") else f"q = ({q}), {name}"))
            spread = spread_of(dataset, "minimum_energy")
            rows.append(Row("E(lowest) - E(0)", float(dataset["minimum_energy"]), "meV/atom", spread))
        for word, k in (
            ("lowest", int(dataset["energy"].values.argmin())),
            ("highest", int(dataset["energy"].values.argmax())),
        ):
            q = ", ".join(f"{x:.3g}" for x in dataset["q"].values[k])
            rows.append(
                Row(
                    f"{word} of these, q = ({q})",
                    float(dataset["energy"][k]),
                    "meV/atom",
                    spread_of(dataset, "energy", wave=k),
                    f"{word} of these",
                )
            )
        if "magnon" in dataset and np.isfinite(dataset["magnon"]).any():
            k = int(np.nanargmax(dataset["magnon"].values))
            key = "highest magnon energy"
            label = f"{key}{of_members(dataset, 'magnon', wave=k)}"
            rows.append(Row(label, float(dataset["magnon"][k]), "meV", spread_of(dataset, "magnon", wave=k), key))
        if "asymmetry" in dataset:
            k = int(np.abs(dataset["asymmetry"].values).argmax())
            q = ", ".join(f"{x:.3g}" for x in dataset["q"].values[k])
            key, spread = "largest E(q) - E(-q)", spread_of(dataset, "asymmetry", wave=k)
            rows.append(Row(f"{key}, q = ({q})", float(dataset["asymmetry"][k]), "meV/atom", spread, key))
        lengths = dataset["length"].values
        for site in np.flatnonzero(lengths.max(axis=0) > ZERO_MOMENT):
            for word, k in (("smallest", int(lengths[:, site].argmin())), ("largest", int(lengths[:, site].argmax()))):
                spread = None if "length_std" not in dataset else float(dataset["length_std"][k, site])
                label = f"{word} |m| of {dataset['element'].values[site]} {site}"
                rows.append(Row(label, float(lengths[k, site]), "µB", spread))
        return rows

    def plot(self, dataset: xr.Dataset) -> "Figure":
        """Draw E(q) and |m|(q)."""
        from .plot import plot_spiral

        return plot_spiral(dataset)


class Spirals:
    """Energies of spirals of one pattern.

    The moment of site i in the cell at S turns by 2π q·(S + τ_i), τ_i its fractional position, so that the
    spiral does not depend on the choice of the cell.

    Parameters
    ----------
    cell : the primitive cell.
    along : signed lengths in µB, shape (n,).
    calculator : a single model.
    axis : what the moments turn about.
    cone : angle to the axis in radian.
    mode : ``"fixed"`` or ``"magnitudes"``.
    """

    def __init__(
        self,
        cell: Atoms,
        along: Array,
        calculator: SpinCalculator,
        axis: Sequence[float],
        cone: float,
        mode: MomentMode,
    ) -> None:
        self.cell, self.along, self.calculator, self.cone, self.mode = cell, along, calculator, cone, mode
        self.axis = np.asarray(axis, dtype=float) / np.linalg.norm(axis)
        self.across = np.linalg.svd(self.axis[None])[2][1]
        self.scaled = cell.get_scaled_positions(wrap=False)
        self.carrying = np.flatnonzero(np.abs(along) > ZERO_MOMENT)
        self.tolerance = calculator.moment_tolerance if calculator.single_precision else MOMENT_TOLERANCE

    def directions(self, q: Array) -> Array:
        """Return unit vectors of the cell S = 0, shape (Q, n, 3)."""
        phases = 2 * np.pi * q @ self.scaled.T
        turned = Rotation.from_rotvec(phases.reshape(-1, 1) * self.axis).apply(self.across).reshape(*phases.shape, 3)
        unit = np.sin(self.cone) * turned + np.cos(self.cone) * self.axis
        return np.asarray(unit)

    def __call__(self, q: Array, tell: Any = lambda done, total: None) -> tuple[Array, Array]:
        """Return energies (Q,) in eV per primitive cell and |m| (Q, n) in µB at wave vectors (Q, 3)."""
        energies, lengths = [], []
        for begin in range(0, len(q), CHUNK):
            part = q[begin : begin + CHUNK]
            unit = self.directions(part)
            signed = np.tile(self.along, (len(part), 1))
            if self.mode == "magnitudes":
                signed = self._relaxed(part, unit, signed)
            energies.append(self._evaluate(part, unit * signed[..., None], False)["energy"])
            lengths.append(np.abs(signed))
            tell(min(begin + CHUNK, len(q)), len(q))
        return np.concatenate(energies), np.concatenate(lengths)

    def _evaluate(self, q: Array, moments: Array, forces: bool) -> dict[str, Array]:
        start = with_moments(self.cell, moments[0])
        return self.calculator.evaluate_spirals(start, q, self.axis, moments, MAX_CELLS, forces)

    def _relaxed(self, q: Array, unit: Array, signed: Array) -> Array:
        """Relax the lengths of all spirals together by Newton steps."""
        sites, count = self.carrying, len(self.carrying)

        def slopes(rows: NDArray[np.intp], values: Array) -> tuple[Array, Array]:
            """Return energies and dE/d(length) of the carrying sites for some of the spirals."""
            found = self._evaluate(q[rows], unit[rows] * values[..., None], True)
            slope = -np.einsum("qic,qic->qi", found["magnetic_forces"], unit[rows])[:, sites]
            return found["energy"], slope

        rows = np.arange(len(q))
        energy, slope = slopes(rows, signed)
        for _ in range(60):
            open_ = np.flatnonzero(np.abs(slope).max(axis=1) > self.tolerance)
            if not len(open_):
                return signed
            hessian = np.zeros((len(open_), count, count))
            for k, site in enumerate(sites):
                for sign in (1, -1):
                    shifted = signed[open_].copy()
                    shifted[:, site] += sign * LENGTH_STEP
                    hessian[:, k] += sign * slopes(open_, shifted)[1] / (2 * LENGTH_STEP)
            values, modes = np.linalg.eigh((hessian + hessian.transpose(0, 2, 1)) / 2)
            size = np.maximum(np.abs(values), 1e-6)
            step = -np.einsum("qab,qb->qa", modes, np.einsum("qba,qb->qa", modes, slope[open_]) / size)
            step *= np.minimum(1.0, 0.3 / np.maximum(np.linalg.norm(step, axis=1), 1e-300))[:, None]
            for _ in range(20):
                trial = signed[open_].copy()
                trial[:, sites] += step
                new_energy, new_slope = slopes(open_, trial)
                worse = new_energy > energy[open_] + 1e-12 * np.maximum(1.0, np.abs(energy[open_]))
                if not worse.any():
                    break
                step[worse] /= 2
            signed[open_], energy[open_], slope[open_] = trial, new_energy, new_slope
        residual = np.abs(slope).max()
        raise ConvergenceError(
            "the magnitudes of the moments did not converge in 60 steps: the largest residual is "
            f"{residual:.1e} eV/µB; start from other moments, or keep them fixed"
        )

    def yielding(self, q: Array) -> Array:
        """Return the energy in eV that sublattices gain by turning against each other at small wave vectors, (Q,)."""
        count = len(self.carrying)
        if count == 1:
            return np.zeros(len(q))

        def torques(waves: Array, phases: Array) -> Array:
            """Return dE/dφ of the carrying sites, φ their turns about the axis beside that of the spiral."""
            unit = self.directions(waves)
            for site, turns in zip(self.carrying, phases.T, strict=True):
                unit[:, site] = Rotation.from_rotvec(turns[:, None] * self.axis).apply(unit[:, site])
            moments = unit * self.along[:, None]
            found = self._evaluate(waves, moments, True)["magnetic_forces"]
            across = np.cross(self.axis, moments)
            return -np.einsum("qic,qic->qi", found, across)[:, self.carrying]

        steps = PHASE_STEP * np.concatenate([np.eye(count), -np.eye(count)])
        up, down = np.split(torques(np.zeros((2 * count, 3)), steps), 2)
        hessian = (up - down) / (2 * PHASE_STEP)
        slopes = np.concatenate(
            [torques(part, np.zeros((len(part), count))) for part in np.array_split(q, -(-len(q) // CHUNK))]
        )
        # all turned together is the spiral itself
        inverse = np.linalg.pinv((hessian + hessian.T) / 2, rcond=1e-6, hermitian=True)
        return 0.5 * np.einsum("qi,ij,qj->q", slopes, inverse, slopes)


def frozen_magnons(cell: Atoms, along: Array, axis: Array, calculator: SpinCalculator, q: Array) -> Array:
    """Return (4/|Σm|)(E(q) - E(0))/sin²θ in eV of spirals of vanishing cone, which reach as far as the calculator does.

    Magnon energies of one sublattice at every q; of several parallel ones to second order in q, their turns against
    each other relaxed.

    Parameters
    ----------
    cell : the primitive cell.
    along : moments along their axis, µB, shape (n,).
    axis : shape (3,).
    calculator : a single model without spin-orbit coupling.
    q : reciprocal lattice units, shape (Q, 3).
    """
    found = []
    for cone in SMALL_CONES:
        angle = float(np.deg2rad(cone))
        spirals = Spirals(cell, along, calculator, axis.tolist(), angle, "fixed")
        energy, _ = spirals(np.concatenate([np.zeros((1, 3)), q]))
        change = energy[1:] - energy[0] - spirals.yielding(q)
        found.append(4 / abs(along.sum()) * change / np.sin(angle) ** 2)
    # errors go with θ²
    a, b = (x**2 for x in SMALL_CONES)
    return np.asarray((b * found[0] - a * found[1]) / (b - a))


def frozen_stiffness(cell: Atoms, along: Array, axis: Array, calculator: SpinCalculator) -> Array:
    """Return the stiffness tensor of parallel moments in eV Å², shape (3, 3), from frozen magnons at q to 0."""
    k = np.concatenate([size * six_directions() for size in SMALL_WAVES])
    energies = frozen_magnons(cell, along, axis, calculator, k @ cell.cell[:].T / (2 * np.pi))
    return from_six(leading(energies.reshape(len(SMALL_WAVES), -1)))


def six_directions() -> Array:
    """Return six directions that fix a symmetric tensor, shape (6, 3)."""
    raw = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]], dtype=float)
    return raw / np.linalg.norm(raw, axis=1)[:, None]


def from_six(values: Array) -> Array:
    """Return the symmetric tensor with n·T·n = values in the six directions, shape (3, 3)."""
    n = six_directions()
    design = np.stack(
        [n[:, 0] ** 2, n[:, 1] ** 2, n[:, 2] ** 2, 2 * n[:, 1] * n[:, 2], 2 * n[:, 0] * n[:, 2], 2 * n[:, 0] * n[:, 1]],
        axis=1,
    )
    a, b, c, d, e, f = np.linalg.solve(design, values)
    return np.array([[a, f, e], [f, b, d], [e, d, c]])


def leading(values: Array) -> Array:
    """Return c of c q² + d q⁴ + e q⁶ through values at the small wave vectors, shape (S, ...) to (...)."""
    x = np.array(SMALL_WAVES) ** 2
    matrix = np.stack([x, x**2, x**3], axis=1)
    return np.asarray(np.linalg.solve(matrix, values.reshape(len(x), -1))[0].reshape(values.shape[1:]))


def wave_classes(scaled: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return reciprocal lattice vectors whose addition to q makes different spirals, and those that change nothing.

    Adding G to q turns the sublattices against each other by 2π G·(τ_i - τ_j). Where the positions are general, no G
    but 0 changes nothing, and the vectors next to 0 are returned.

    Parameters
    ----------
    scaled : fractional positions of the sites with a moment, shape (n, 3).

    Returns
    -------
    The shortest vector of each class, 0 first, shape (K, 3), and the vectors without effect near 0, shape (G, 3).
    """
    between = scaled[1:] - scaled[:1]
    periods = []
    for column in between.T:
        fits = [n for n in range(1, MAX_PERIOD + 1) if np.abs(n * column - np.rint(n * column)).max(initial=0.0) < 1e-3]
        periods.append(fits[0] if fits else 3)
    reach = [np.arange(-max(n, 2), max(n, 2) + 1) for n in periods]
    vectors = np.stack(np.meshgrid(*reach, indexing="ij"), axis=-1).reshape(-1, 3)
    vectors = vectors[np.lexsort([*(-vectors.T[::-1]), (vectors**2).sum(axis=1)])]
    turns = vectors @ between.T
    nothing = vectors[np.abs(turns - np.rint(turns)).max(axis=1, initial=0.0) < 1e-3]
    found: list[int] = []
    for k in np.flatnonzero((2 * np.abs(vectors) <= np.array(periods)).all(axis=1)):
        apart = turns[found] - turns[k]
        if not (np.abs(apart - np.rint(apart)).max(axis=1, initial=0.0) < 1e-3).any():
            found.append(int(k))
    return vectors[found], nothing


def _search_mesh(size: int, classes: NDArray[np.int64], scaled: Array) -> Array:
    """Return the points of a mesh over -½ … ½ around every class of reciprocal lattice vectors.

    Of each pair q, -q there is one: E(q) = E(-q) without spin-orbit coupling.
    """
    steps = np.arange(-(size // 2), size // 2 + 1)
    index = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    rank = index @ np.array([4 * size * size, 2 * size, 1])
    points = index / (2 * (size // 2))
    turns = classes @ (scaled[1:] - scaled[:1]).T
    parts = []
    for k, vector in enumerate(classes):
        opposite = turns + turns[k]
        partner = np.flatnonzero(np.abs(opposite - np.rint(opposite)).max(axis=1, initial=0.0) < 1e-3)
        if not len(partner) or partner[0] > k:
            parts.append(points + vector)
        elif partner[0] == k:
            parts.append(points[rank >= 0] + vector)
    return np.concatenate(parts)


def canonical(q: Array, cell: Atoms, rotations: Array, nothing: NDArray[np.int64] | None = None) -> Array:
    """Return the symmetry-equivalent of a wave vector with the largest leading coordinates.

    Wave vectors that differ by one of the reciprocal lattice vectors `nothing` are one; by any of them where there is
    no such list.
    """
    reciprocal = cell.cell.reciprocal()[:]
    images = np.concatenate([rotations, -rotations]) @ (q @ reciprocal) @ cell.cell[:].T
    if nothing is None:
        images = images - np.ceil(images - 0.5 - 1e-6)
    else:
        images = (images[:, None] - nothing[None]).reshape(-1, 3)
        lengths = np.linalg.norm(images @ reciprocal, axis=1)
        images = images[lengths < lengths.min() + 1e-6]
    images[np.abs(images) < 1e-9] = 0.0
    best: Array = images[np.lexsort(np.round(images, 5).T[::-1])[-1]]
    return best


def name_of(q: Array, scaled: Array | None = None, along: Array | None = None) -> str:
    """Name a spiral by the angles between all its moments.

    Parameters
    ----------
    q : wave vector in reciprocal lattice units of the primitive cell, shape (3,).
    scaled : fractional positions of the atoms, shape (n, 3); a single atom by default.
    along : their moments along the common axis in the order given, µB, shape (n,).
    """
    places = np.zeros((1, 3)) if scaled is None else np.asarray(scaled)
    moments = np.ones(len(places)) if along is None else np.asarray(along)
    carrying = np.flatnonzero(np.abs(moments) > ZERO_MOMENT)
    places, moments = places[carrying], moments[carrying]
    turns = (places - places[0]) @ q
    period = next((p for p in range(1, 9) if np.abs(q * p - np.rint(q * p)).max() < 1e-3 * p), None)
    if period is None:
        return "incommensurate"
    written = ", ".join(_fraction(int(x), period) for x in np.rint(q * period))
    if period == 1 and np.abs(turns - np.rint(turns)).max() < 2e-3:
        return "the order given, q = 0"
    if period > 2 or np.abs(2 * turns - np.rint(2 * turns)).max() > 4e-3:
        kind = f"commensurate, period {period}," if period > 1 else "non-collinear within the cell"
        return f"{kind} at ({written})"
    final = moments * (1 - 2 * (np.rint(2 * turns) % 2))
    net = abs(final.sum()) if period == 1 else 0.0
    if period == 1 and np.all(final * final[0] > 0):
        return f"ferromagnetic at ({written})"
    kind = "ferrimagnetic" if net > 1e-2 * np.abs(final).sum() else "antiferromagnetic"
    return f"{kind} at ({written})"


def _fraction(number: int, period: int) -> str:
    whole = Fraction(number, period)
    return str(whole.numerator) if whole.denominator == 1 else f"{number}/{period}"
