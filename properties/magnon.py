"""Linear spin waves from the second derivatives of the energy by tilts of the moments of a reference state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from ase import Atoms
from numpy.typing import NDArray

from .base import Options, Progress, Property, Row, derived, of_members, option, over_members, spread_of, variable
from .bosons import Modes, normal_modes
from .conventions import G_FACTOR
from .errors import MomentError, OptionError
from .protocol import SMALLEST_MOMENT, ZERO_MOMENT, SpinCalculator, moments_of, with_moments
from .spiral import SMALL_WAVES, from_six, frozen_magnons, frozen_stiffness, leading, six_directions
from .supercell import Coverage, Supercell, grown, knows_rows, row_of_coverage, tilts, transverse
from .symmetry import Pattern, band_path, primitive_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

STATIONARY = 1e-5
"""Largest torque on a moment of a reference state, eV."""
ROUNDING = 1e-12
"""Curvatures below this part of the largest are zero, where the Hessian is exact."""
ROUGH = 1e-9
"""The same where it comes from differences of magnetic forces."""
ROUGHEST = 1e-6
"""The same where it comes from differences of energies."""
SINGLE = 1e-5
"""The same in single precision."""
FLAT = 1e-7
"""A branch that rises by less than this, in eV, at the largest of `SMALL_WAVES` has no power law."""
DOS_POINTS = 401
LONG_WAVES = ("stiffness", "stiffness_frozen", "velocity")
SHORTER_WAVES = (1 / 3, 1 / 9, 1 / 27, 1 / 81)
"""Factors on `SMALL_WAVES` where a parabola may end before them, as in nearly compensated ferrimagnets."""
PARABOLA = 3.95
LINE = 3.0
"""A parabola rises four times as much at twice the wave vector, at least by the first; below the second is a line."""
CUSP = 1e-2
"""Share of (ħω)² that a term in |q| may have."""
COMPENSATED = 1e-3
"""An order whose net moment is below this part of the sum of |m| is an antiferromagnet."""


@dataclass(frozen=True)
class MagnonOptions(Options):
    """Options of the spin waves.

    Parameters
    ----------
    tolerance : largest coupling that may be left beyond the unique images of the supercell, relative to the largest.
    max_atoms : largest supercell.
    radius : least distance within which pairs are wanted, Å.
    path : special points; ``auto`` is that of seekpath.
    points : wave vectors along the path.
    mesh : points per direction of the mesh of the density of states.
    width : Gaussian width of the density of states, meV; 0 takes a hundredth of the band width.
    """

    tolerance: float = option(1e-3, "largest coupling left beyond the supercell's unique images, relative")
    max_atoms: int = option(1000, "largest supercell, in atoms")
    radius: float = option(5.0, "least distance within which pairs are wanted, Å")
    path: str = option("auto", "special points such as GHPGN; auto is that of seekpath")
    points: int = option(101, "wave vectors along the path")
    mesh: int = option(16, "points per direction of the mesh of the density of states")
    width: float = option(0.0, "Gaussian width of the density of states, meV; 0 takes 1/100 of the band width")

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for name, low, high in (
            ("tolerance", 1e-10, 1.0),
            ("radius", 1.0, 50.0),
            ("max_atoms", 1, 100000),
            ("points", 2, 20000),
            ("mesh", 2, 100),
            ("width", 0.0, 1000.0),
        ):
            if not low <= getattr(self, name) <= high:
                raise OptionError(f"{name} cannot be {getattr(self, name):g}; it lies between {low:g} and {high:g}")


class SpinWaves:
    """The quadratic form of tilts ``½ Σ z_i*·H_ij(q)·z_j`` around a reference state, and its modes.

    Tilts are Bloch waves z(R) = z exp(2πi q·R), R the cell; those of one moment are along `transverse` of it.

    Parameters
    ----------
    box : the supercell.
    moments : the stationary reference in the home cell, µB, shape (N, 3).
    calculator : a single model.
    """

    def __init__(self, box: Supercell, moments: Array, calculator: SpinCalculator) -> None:
        self.cell, self.sites = box.cell, box.sites
        self.lengths = np.linalg.norm(moments[box.sites], axis=1)
        self.zero = rounding_of(calculator)
        blocks, inward = tilts(box, calculator, moments)
        self.coverage = Coverage.of(box, calculator, moments, -0.5 * blocks.transpose(0, 2, 1, 3))
        n, images = len(box.sites), box.images()
        shifts, rows = np.unique(images.shift, axis=0, return_inverse=True)
        self.shifts: NDArray[np.int64] = shifts
        couplings = np.zeros((len(shifts), n, n, 2, 2))
        values = blocks[images.first, :, images.column] * images.weight[:, None, None]
        np.add.at(couplings, (rows.ravel(), images.first, images.column % n), values)
        home = int(np.flatnonzero(~shifts.any(axis=1))[0])
        couplings[home, np.arange(n), np.arange(n)] += inward[:, None, None] * np.eye(2)
        self.scale = float(np.abs(inward).max() + np.abs(blocks).max())
        self.couplings = couplings.transpose(0, 1, 3, 2, 4).reshape(len(shifts), -1)

    @property
    def bracket(self) -> Array:
        """Brackets of the tilts, ħż = Γ ∂H/∂z with g = 2, shape (2n, 2n)."""
        return np.kron(np.diag(G_FACTOR / self.lengths), np.array([[0.0, -1.0], [1.0, 0.0]]))

    def form(self, q: Array) -> Complex:
        """Return H(q) in eV at wave vectors (Q, 3) of the reciprocal lattice, shape (Q, 2n, 2n)."""
        size = 2 * len(self.sites)
        phases = np.exp(2j * np.pi * q @ self.shifts.T)
        matrix = (phases @ self.couplings).reshape(len(q), size, size)
        return np.asarray((matrix + matrix.conj().swapaxes(1, 2)) / 2)

    def modes(self, q: Array) -> Modes:
        """Return the spin waves at wave vectors (Q, 3), energies in eV."""
        return normal_modes(self.form(q), self.bracket, self.zero, self.scale)


def rounding_of(calculator: SpinCalculator) -> float:
    """Return the part of the largest curvature by tilts below which a curvature is zero."""
    if not knows_rows(calculator):
        return ROUGHEST if calculator.differs_twice else ROUGH
    return SINGLE if calculator.single_precision else ROUNDING


def settled(cell: Atoms, sites: NDArray[np.intp], moments: Array, calculator: SpinCalculator) -> tuple[Array, float]:
    """Return moments turned to where the torques m × B vanish, and the largest torque that was found before, eV.

    What a relaxation leaves of the torques would be a gap of the size of its root; Newton steps on the directions
    take it to rounding.

    Raises
    ------
    MomentError : the moments are not stationary to begin with.
    """

    def field(at: Array) -> Array:
        return calculator.evaluate_spins(cell, at[None])["magnetic_forces"][0]

    magnetic_force = field(moments)
    sizes = np.linalg.norm(np.cross(moments, magnetic_force), axis=1)
    start = float(sizes.max())
    if start > STATIONARY:
        worst = int(sizes.argmax())
        raise MomentError(
            f"the reference state is not stationary: the torque on atom {worst} ({cell.symbols[worst]}) is "
            f"{start:.1e} eV, above {STATIONARY:.0e}; relax the directions too (--moments full), or give others"
        )
    box, best, n = Supercell(cell, sites, (1, 1, 1)), start, len(sites)
    lengths = np.linalg.norm(moments[sites], axis=1)[:, None]
    for _ in range(4):
        if best < 1e-15:
            break
        frames = np.array([transverse(e) for e in moments[sites] / lengths])
        blocks, inward = tilts(box, calculator, moments, frames)
        form = blocks.reshape(2 * n, 2 * n) + np.kron(np.diag(inward), np.eye(2))
        slope = -lengths * np.einsum("ix,iax->ia", magnetic_force[sites], frames)
        step = -np.linalg.pinv((form + form.T) / 2, rcond=1e-7, hermitian=True) @ slope.ravel()
        turned = moments.copy()
        turned[sites] += lengths * np.einsum("ia,iax->ix", step.reshape(n, 2), frames)
        turned[sites] *= lengths / np.linalg.norm(turned[sites], axis=1)[:, None]
        new_force = field(turned)
        left = float(np.linalg.norm(np.cross(turned, new_force), axis=1).max())
        if left >= best:
            break
        moments, magnetic_force, best = turned, new_force, left
    return moments, start


class Magnon(Property):
    """Spin waves of a stationary reference state, collinear or not, from the Hessian in a supercell."""

    name = "magnon"
    title = "spin waves"
    options_type: ClassVar[type[Options]] = MagnonOptions

    def __init__(
        self, options: Options | None = None, repeats: tuple[int, int, int] | None = None, **named: Any
    ) -> None:
        super().__init__(options, **named)
        self._repeats = repeats

    def check(self, atoms: Atoms, calculator: SpinCalculator) -> None:
        """Refuse structures without moments."""
        super().check(atoms, calculator)
        if np.linalg.norm(moments_of(atoms), axis=1).max() <= ZERO_MOMENT:
            raise MomentError("no atom carries a moment, so there are no spin waves; give moments in µB")

    def _reference(self, atoms: Atoms, calculator: SpinCalculator) -> tuple[Atoms, NDArray[np.intp], Array, float]:
        """Return the primitive cell, its magnetic sites, the stationary moments, and the torque before settling."""
        cell, start = primitive_cell(atoms, moments_of(atoms), self.options.symprec, self.options.mag_symprec)
        moments = calculator.relax_moments([with_moments(cell, start)], self.mode(calculator))[0]
        sites = np.flatnonzero(np.linalg.norm(moments, axis=1) >= SMALLEST_MOMENT)
        if not len(sites):
            raise MomentError("the moments vanish when they are relaxed, so there are no spin waves; start elsewhere")
        moments, residual = settled(cell, sites, moments, calculator)
        return cell, sites, moments, residual

    def prepare(self, atoms: Atoms, members: Sequence[SpinCalculator], progress: Progress) -> "Magnon":
        """Size the supercell."""
        if self._repeats is not None:
            return self
        cell, sites, moments, _ = self._reference(atoms, members[0])
        limits = self.options.radius, self.options.tolerance, self.options.max_atoms
        return Magnon(self.options, grown(cell, sites, moments, members[0], *limits, progress))

    def compute(self, atoms: Atoms, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Compute bands, density of states, stiffness and stability with one model."""
        if self._repeats is None:
            raise OptionError("the supercell is missing; call run, which sizes it")
        cell, sites, moments, residual = self._reference(atoms, calculator)
        box = Supercell(cell, sites, self._repeats)
        progress("Hessian", 0, 1)
        waves = SpinWaves(box, moments, calculator)
        progress("Hessian", 1, 1)
        q, position, labels = band_path(cell, self.options.path, self.options.points, self.options.symprec)
        bands = waves.modes(q)
        steps = np.arange(self.options.mesh) / self.options.mesh
        mesh = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
        found = []
        for begin in range(0, len(mesh), 512):
            progress("mesh", begin, len(mesh))
            found.append(waves.modes(mesh[begin : begin + 512]))
        progress("mesh", len(mesh), len(mesh))
        everywhere = np.concatenate([mesh, q])
        lowest = np.concatenate([*(m.lowest for m in found), bands.lowest])
        stable = np.concatenate([*(m.stable for m in found), bands.stable])
        worst = int(np.argmin(lowest))
        milli = 1e3
        gamma = waves.modes(np.zeros((1, 3)))
        energies = np.concatenate([m.energies for m in found]) * milli
        data: dict[str, Any] = {
            "energy": variable(("wave", "branch"), bands.energies * milli, "meV", "magnon energy"),
            "growth": variable(
                ("wave", "branch"), bands.growth * milli, "meV", "imaginary part of the magnon energy, growing modes"
            ),
            "curvature": variable("wave", bands.lowest * milli, "meV", "lowest eigenvalue of E'' by tilts"),
            "gap": variable((), gamma.energies[0, 0] * milli, "meV", "lowest magnon energy at q = 0"),
            "mesh_energy": variable(("mesh", "branch"), energies, "meV", "magnon energy on the mesh"),
            "instability": variable(
                (),
                0.0 if stable.all() else lowest[worst] * milli,
                "meV",
                "lowest eigenvalue of E'' by tilts on path and mesh where it is negative, else 0",
            ),
            "instability_q": variable(
                "xyz",
                np.full(3, np.nan) if stable.all() else everywhere[worst],
                "1",
                "where that is, reciprocal lattice of the primitive cell",
            ),
            "moments": variable(("site", "xyz"), moments[sites], "µB", "moment of the reference"),
            "folded": variable(
                (),
                waves.coverage.folded * milli,
                "meV",
                "Σ_j |J_ij| of one site beyond the unique images of the supercell, the largest",
            ),
            "folded_pairs": variable(
                (),
                waves.coverage.pairs,
                "1",
                "pairs of a site beyond the unique images and within reach, NaN where the reach is not stated",
            ),
            "torque": variable((), residual, "eV", "largest torque on a moment of the reference as relaxed or given"),
            **_long_waves(waves, moments),
        }
        data.update(self._density(energies))
        data.update(self._frozen(cell, sites, moments, calculator, q))
        coords: dict[str, Any] = {
            "q": variable(("wave", "xyz"), q, "1", "wave vector in the reciprocal lattice of the primitive cell"),
            "position": variable("wave", position, "1/Å", "place along the path"),
            "branch": variable("branch", np.arange(len(sites)), "1", "branch, the lowest first"),
            "site": variable("site", sites, "1", "atom of the primitive cell"),
            "element": variable("site", np.array(cell.get_chemical_symbols())[sites], "1", "chemical symbol"),
            "mesh_q": variable(("mesh", "xyz"), mesh, "1", "wave vector of the mesh, reciprocal lattice units"),
            "xyz": variable("xyz", np.array(["x", "y", "z"]), "1", "Cartesian axis, or reciprocal lattice vector"),
            "xyz_2": variable("xyz_2", np.array(["x", "y", "z"]), "1", "Cartesian axis"),
        }
        differences = "energies" if calculator.differs_twice else "magnetic forces"
        attrs: dict[str, Any] = {
            "primitive_cell": cell.cell[:].tolist(),
            "primitive_atoms": len(cell),
            "supercell": list(box.repeats),
            "supercell_atoms": len(box.atoms),
            "unique_radius": box.radius,
            **waves.coverage.attributes,
            "path_labels": [list(x) for x in labels],
            "hessian": "rows of the calculator" if knows_rows(calculator) else f"differences of {differences}",
        }
        return xr.Dataset(data, coords, attrs)

    def _density(self, energies: Array) -> dict[str, xr.Variable]:
        """Return the density of states per primitive cell of energies (Q, n) in meV."""
        low, high = float(energies.min()), float(energies.max())
        width = self.options.width or max((high - min(low, 0.0)) / 100, 1e-6)
        axis = np.linspace(min(low, 0.0) - 4 * width, high + 4 * width, DOS_POINTS)
        offsets = (axis[:, None] - energies.ravel()[None]) / width
        dos = np.exp(-0.5 * offsets**2).sum(axis=1) / (width * np.sqrt(2 * np.pi) * len(energies))
        return {
            "dos": variable("level", dos, "states/meV/cell", "density of magnon states"),
            "dos_energy": variable("level", axis, "meV", "energy of the density of states"),
        }

    def align(self, parts: list[xr.Dataset]) -> list[xr.Dataset]:
        """Give the densities of states of all members one axis."""
        ends = np.array([(p["dos_energy"].values[0], p["dos_energy"].values[-1]) for p in parts])
        axis = np.linspace(ends[:, 0].min(), ends[:, 1].max(), DOS_POINTS)
        return [
            p.assign(
                dos=p["dos"].variable.copy(data=np.interp(axis, p["dos_energy"], p["dos"], left=0.0, right=0.0)),
                dos_energy=p["dos_energy"].variable.copy(data=axis),
            )
            for p in parts
        ]

    def _frozen(
        self, cell: Atoms, sites: NDArray[np.intp], moments: Array, calculator: SpinCalculator, q: Array
    ) -> dict[str, xr.Variable]:
        """Return magnon energies and stiffness by frozen spirals, which reach as far as the calculator does.

        Their small differences of energies are lost in single precision.
        """
        pattern = Pattern.of(moments)
        signs = pattern.along[sites]
        if calculator.soc is not False or not calculator.has("evaluate_spirals") or not pattern.collinear:
            return {}
        if calculator.single_precision:
            return {}
        if np.any(signs * signs[0] < 0):
            return {}
        tensor = frozen_stiffness(cell, pattern.along, pattern.axis, calculator)
        data = {
            "stiffness_frozen": variable(
                (), float(np.trace(tensor)) / 3 * 1e3, "meV Å²", "stiffness from frozen spirals"
            )
        }
        if len(sites) == 1:
            energies = frozen_magnons(cell, pattern.along, pattern.axis, calculator, q)
            data["frozen"] = variable("wave", energies * 1e3, "meV", "(4/m)(E(q) - E(0))/sin²θ of frozen spirals")
        return data

    def finish(self, dataset: xr.Dataset, calculator: SpinCalculator) -> xr.Dataset:
        """Take stiffness and velocity over the members that have them; say so where the reference is not stable."""
        dataset = over_members(dataset, LONG_WAVES)
        if float(dataset["instability"]) >= 0:
            return dataset
        who = ""
        if "instability_member" in dataset:
            values = dataset["instability_member"].values
            dataset["instability_q"] = dataset["instability_q"].copy(
                data=dataset["instability_q_member"].values[int(values.argmin())]
            )
            who = f" for {int((values < 0).sum())} of {len(values)} members"
        dataset.attrs["note"] = (
            f"the reference state is not stable{who}: some tilts lower its energy, so magnon energies may be negative "
            "or complex"
        )
        return dataset

    def summary(self, dataset: xr.Dataset) -> list[Row]:
        """Return energies, stiffness and stability as a short table."""
        rows = [
            Row("supercell", f"{dataset.attrs['supercell_atoms']} atoms"),
            Row("pairs within", float(dataset.attrs["unique_radius"]), "Å"),
            Row(*row_of_coverage(dataset.attrs, float(dataset["folded_pairs"]))),
        ]
        for k, (site, element) in enumerate(zip(dataset["site"].values, dataset["element"].values, strict=True)):
            place = "  ".join(f"{x:.3f}" for x in dataset["moments"].values[k])
            length = derived(dataset, lambda d, k=k: float(np.linalg.norm(d["moments"].values[k])))  # type: ignore[misc]
            rows.append(Row(f"moment of {element} {site}", place, "µB"))
            if length[1] is not None:
                rows.append(Row(f"|m| of {element} {site}", length[0], "µB", length[1]))
        if float(dataset["instability"]) < 0:
            q = ", ".join(f"{x:.3g}" for x in dataset["instability_q"].values)
            value = float(dataset["instability"])
            rows.append(
                Row(
                    f"not stable, lowest curvature at q = ({q})",
                    value,
                    "meV",
                    spread_of(dataset, "instability"),
                    "not stable, lowest curvature",
                )
            )
            fastest = derived(dataset, lambda d: float(d["growth"].max()))
            rows.append(Row("fastest growth on the path", fastest[0], "meV", fastest[1]))
        else:
            rows.append(Row("stable", "at every q of path and mesh"))
        rows.append(Row("lowest energy at q = 0", float(dataset["gap"]), "meV", spread_of(dataset, "gap")))
        top = np.unravel_index(int(dataset["energy"].values.argmax()), dataset["energy"].shape)
        spread = None if "energy_std" not in dataset else float(dataset["energy_std"].values[top])
        q = ", ".join(f"{x:.3g}" for x in dataset["q"].values[top[0]])
        highest = float(dataset["energy"].values[top])
        rows.append(Row(f"highest energy, q = ({q})", highest, "meV", spread, "highest energy"))
        for key, label in (
            ("stiffness", "stiffness"),
            ("stiffness_frozen", "stiffness, frozen spirals"),
            ("velocity", "velocity"),
        ):
            if key in dataset and np.isfinite(float(dataset[key])):
                name = f"{label}{of_members(dataset, key)}"
                rows.append(Row(name, float(dataset[key]), dataset[key].attrs["units"], spread_of(dataset, key), label))
        if "frozen" in dataset:
            difference = derived(dataset, lambda d: float(np.abs(d["frozen"] - d["energy"][:, 0]).max()))
            rows.append(Row("largest difference to frozen spirals", difference[0], "meV", difference[1]))
        slope = derived(dataset, lambda d: float(np.linalg.norm(d["drift"].values)))
        if slope[0] > 1e-6:
            rows.append(Row("slope at q = 0", slope[0], "meV Å", slope[1]))
        return rows

    def plot(self, dataset: xr.Dataset) -> "Figure":
        """Draw bands and density of states."""
        from .plot import plot_magnon

        return plot_magnon(dataset)


@dataclass(frozen=True)
class _LongWaves:
    """The lowest branch at small q of six directions and their opposites.

    Parameters
    ----------
    power : least ratio of what it rises by at twice a wave vector and at that one.
    tensor : D of Δ + q·D·q, eV Å², shape (3, 3); NaN where the modes are not stable.
    drift : slope at q = 0, odd in q, eV Å, shape (3,).
    velocity : eV Å; NaN where (ħω)² has a term in |q|, as where Dzyaloshinskii-Moriya exchange shifts the two
        branches of an antiferromagnet apart.
    """

    power: float
    tensor: Array
    drift: Array
    velocity: float

    @classmethod
    def of(cls, waves: SpinWaves, start: Modes, shorter: float) -> "_LongWaves":
        """Fit the branch, of modes `start` at q = 0, at `shorter` times `SMALL_WAVES`."""
        n = six_directions()
        x = shorter * np.array(SMALL_WAVES)
        k = np.array([[sign * size * n for sign in (1, -1)] for size in x])
        modes = waves.modes((k @ waves.cell.cell[:].T / (2 * np.pi)).reshape(-1, 3))
        energy = modes.energies[:, 0].reshape(len(x), 2, len(n))
        zero = float(start.energies[0, 0])
        rise = energy.mean(axis=1) - zero
        rises = rise[-1] > shorter**2 * FLAT
        power = float(np.min(rise[1, rises] / rise[0, rises], initial=4.0))
        if not (modes.stable.all() and start.stable.all()):
            return cls(power, np.full((3, 3), np.nan), np.full(3, np.nan), np.nan)
        difference = (energy[:, 0] - energy[:, 1])[:, :3] / 2
        squares = ((energy**2).mean(axis=1) - zero**2)[:, :3]
        even = leading(squares) / shorter**2
        cusp = np.linalg.solve(np.stack([x, x**2, x**4], axis=1), squares)[0]
        smooth = bool((np.abs(cusp) * x[0] <= CUSP * np.abs(squares).max()).all())
        return cls(
            power,
            from_six(leading(rise)) / shorter**2,
            np.linalg.solve(np.stack([x, x**3, x**5], axis=1), difference)[0],
            float(np.sqrt(even.mean())) if smooth and even.mean() > 0 else np.nan,
        )


def _long_waves(waves: SpinWaves, moments: Array) -> dict[str, xr.Variable]:
    """Return what the lowest branch does at small q: stiffness and slope, or a velocity where it is no parabola.

    That is so in antiferromagnets, and in orders with a net moment whose lowest branch is linear in q: easy-plane
    ferromagnets and canted antiferromagnets.
    """
    own = moments[waves.sites]
    ferro = bool(np.linalg.norm(own.sum(axis=0)) > COMPENSATED * np.linalg.norm(own, axis=1).sum())
    start = waves.modes(np.zeros((1, 3)))
    found = _LongWaves.of(waves, start, 1.0)
    for shorter in SHORTER_WAVES:
        if not ferro or found.power > PARABOLA:
            break
        found = _LongWaves.of(waves, start, shorter)
    tensor = found.tensor if ferro and found.power > PARABOLA else np.full((3, 3), np.nan)
    velocity = found.velocity if not ferro or found.power < LINE else np.nan
    return {
        "stiffness_tensor": variable(
            ("xyz", "xyz_2"), tensor * 1e3, "meV Å²", "D of ħω = Δ + v·q + q·D·q, NaN where that does not hold"
        ),
        "stiffness": variable(
            (), np.trace(tensor) / 3 * 1e3, "meV Å²", "spin-wave stiffness, a third of the trace of D"
        ),
        "drift": variable("xyz", found.drift * 1e3, "meV Å", "slope v of the lowest branch at q = 0, odd in q"),
        "velocity": variable(
            (),
            velocity * 1e3,
            "meV Å",
            "root of a third of the trace of c² in (ħω)² = Δ² + q·c²·q, NaN for parabolas and for cusps at q = 0",
        ),
    }
