"""Exchange tensors of every pair from the transverse Hessian of a supercell, and what follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import spglib
import xarray as xr
from ase import Atoms
from numpy.typing import NDArray

from .base import Options, Progress, Property, Row, option, spread_of, variable
from .conventions import BOLTZMANN
from .errors import CalculatorError, MomentError, OptionError
from .protocol import ZERO_MOMENT, SpinCalculator, moments_of, with_moments
from .spiral import primitive_cell
from .supercell import SAME_DISTANCE, Pairs, Supercell, grown, tilts, transverse
from .symmetry import Pattern, band_path, pattern_symmetry, shortest_rotation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

CHUNK = 64
"""Spin configurations evaluated at once."""
SMALLEST_MOMENT = 0.01
"""A site with less, in µB, takes no part in the spin model."""
CONES = (5.0, 20.0, 60.0, 180.0)
LEVI_CIVITA = np.array(
    [[[0, 0, 0], [0, 0, 1], [0, -1, 0]], [[0, 0, -1], [0, 0, 0], [1, 0, 0]], [[0, 1, 0], [-1, 0, 0], [0, 0, 0]]],
    dtype=float,
)


@dataclass(frozen=True)
class ExchangeOptions(Options):
    """Options of the exchange.

    Parameters
    ----------
    tolerance : largest |J| that may be left beyond the unique images of the supercell, relative to the largest.
    max_atoms : largest supercell.
    radius : least distance within which pairs are wanted, Å.
    states : random states per cone angle that the spin model is compared on.
    seed : of the random states.
    path : special points of J(q); ``auto`` is the path of the Bravais lattice.
    points : wave vectors along the path.
    mesh : points per direction of the mesh of the RPA average.
    biquadratic : shells, the nearest first, whose biquadratic exchange is fitted to the random states.
    """

    tolerance: float = option(1e-3, "largest |J| left beyond the supercell's unique images, relative to the largest")
    max_atoms: int = option(1000, "largest supercell, in atoms")
    radius: float = option(5.0, "least distance within which pairs are wanted, Å")
    states: int = option(100, "random states per cone angle that the spin model is compared on; 0 leaves them out")
    seed: int = option(0, "seed of the random states")
    path: str = option("auto", "special points of J(q); auto is the path of the Bravais lattice")
    points: int = option(101, "wave vectors along the path")
    mesh: int = option(24, "points per direction of the mesh of the RPA average")
    biquadratic: int = option(2, "nearest shells whose biquadratic exchange is fitted to the random states; 0 for none")

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for name, low, high in (
            ("tolerance", 1e-10, 1.0),
            ("radius", 1.0, 50.0),
            ("max_atoms", 2, 100000),
            ("states", 0, 100000),
            ("points", 2, 20000),
            ("mesh", 4, 200),
            ("biquadratic", 0, 20),
        ):
            if not low <= getattr(self, name) <= high:
                raise OptionError(f"{name} cannot be {getattr(self, name):g}; it lies between {low:g} and {high:g}")


@dataclass(frozen=True)
class Reference:
    """A reference state in its primitive cell.

    Parameters
    ----------
    cell : the primitive cell.
    along : moments along their directions, signed where they share one axis, µB, shape (N,).
    directions : unit vectors, shape (N, 3).
    collinear : whether the moments share one axis.
    """

    cell: Atoms
    along: Array
    directions: Array
    collinear: bool

    @property
    def moments(self) -> Array:
        """Moments in µB, shape (N, 3)."""
        return self.along[:, None] * self.directions

    @property
    def sites(self) -> NDArray[np.intp]:
        """Atoms that take part."""
        return np.flatnonzero(np.abs(self.along) >= SMALLEST_MOMENT)

    @property
    def pattern(self) -> Array:
        """What symmetry keeps: signed lengths (N,) where collinear, moments (N, 3) where not."""
        return self.along if self.collinear else self.moments

    def turns(self, symprec: float, mag_symprec: float) -> Array:
        """Return rotations of the whole reference that together show all components of a tensor, shape (K, 3, 3)."""
        if self.collinear:
            frame = pattern_symmetry(self.cell, self.along, symprec, mag_symprec).frame
            return np.array([shortest_rotation(self.directions[0], e) for e in frame])
        # quarter turns and their products bring every moment near every axis of the cell
        frame = np.linalg.qr(self.cell.cell[:].T)[0]
        thirds = [np.eye(3)[[k % 3, (k + 1) % 3, (k + 2) % 3]] for k in range(3)]
        quarters = [np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ t for t in thirds]
        return np.array([frame @ t @ frame.T for t in (*thirds, *quarters)])


class Exchange(Property):
    """J_ij around a reference, collinear or not, from the Hessian of a supercell."""

    name = "exchange"
    title = "exchange interactions"
    options_type: ClassVar[type[Options]] = ExchangeOptions

    def __init__(
        self, options: Options | None = None, repeats: tuple[int, int, int] | None = None, **named: Any
    ) -> None:
        super().__init__(options, **named)
        self._repeats = repeats

    def check(self, atoms: Atoms, calculator: SpinCalculator) -> None:
        """Refuse references that are no collinear order, and calculators that give energies alone."""
        super().check(atoms, calculator)
        if not calculator.has("evaluate_spins") and not calculator.has("magnetic_forces"):
            raise CalculatorError("exchange needs a calculator that gives magnetic_forces, or evaluate_spins")
        moments = moments_of(atoms)
        if np.linalg.norm(moments, axis=1).max() <= ZERO_MOMENT:
            raise MomentError("no atom carries a moment, so there is no exchange; give moments in µB")

    def _reference(self, atoms: Atoms, calculator: SpinCalculator) -> "Reference":
        """Return the relaxed reference in its primitive cell."""
        given = moments_of(atoms)
        start = Pattern.of(given)
        values = start.along if start.collinear else given
        cell, found = primitive_cell(atoms, values, self.options.symprec, self.options.mag_symprec)
        image = with_moments(cell, found[:, None] * start.axis if start.collinear else found)
        moments = calculator.relax_moments([image], self.mode(calculator))[0]
        pattern = Pattern.of(moments)
        if start.collinear and not pattern.collinear:
            raise MomentError(
                "the moments leave the collinear reference when they are relaxed; relax magnitudes instead"
            )
        lengths = np.linalg.norm(moments, axis=1)
        if lengths.max() < SMALLEST_MOMENT:
            raise MomentError("the moments vanish when they are relaxed, so there is no exchange; start elsewhere")
        if pattern.collinear:
            return Reference(cell, pattern.along, np.tile(pattern.axis, (len(cell), 1)), True)
        units = moments / np.where(lengths > 0, lengths, 1.0)[:, None]
        return Reference(cell, lengths, units, False)

    def prepare(self, atoms: Atoms, members: Sequence[SpinCalculator], progress: Progress) -> "Exchange":
        """Size the supercell."""
        reference = self._reference(atoms, members[0])
        limits = self.options.radius, self.options.tolerance, self.options.max_atoms
        repeats = grown(reference.cell, reference.sites, reference.moments, members[0], *limits, progress)
        return Exchange(self.options, repeats)

    def compute(self, atoms: Atoms, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Compute tensors, on-site terms, and what follows from them with one model."""
        if self._repeats is None:
            raise OptionError("the supercell is missing; call run, which sizes it")
        reference = self._reference(atoms, calculator)
        cell, sites = reference.cell, reference.sites
        box = Supercell(cell, sites, self._repeats)
        pairs, kept, others = box.pairs()
        soc = calculator.soc is not False
        tolerances = self.options.symprec, self.options.mag_symprec
        turns = reference.turns(*tolerances) if soc else np.eye(3)[None]
        total, own = len(box.magnetic), np.arange(len(sites))
        left = 0.0
        designs, targets, fields = [], [], []
        for k, turn in enumerate(turns):
            progress("Hessian", k, len(turns))
            moments = reference.moments @ turn.T
            units = (reference.directions @ turn.T)[sites]
            frames = np.array([transverse(e) for e in units])
            blocks, inward = tilts(box, calculator, moments, frames)
            tensors = -0.5 * blocks.transpose(0, 2, 1, 3)
            flat = tensors.reshape(-1, 2, 2)
            targets.append(flat[pairs.first * total + kept].reshape(-1, 4))
            if len(others):
                left = max(left, float(np.abs(flat[others]).max()))
            outer = np.einsum("pax,pby->pabxy", frames[pairs.first], frames[pairs.second])
            designs.append(outer.reshape(-1, 4, 9))
            fields.append((units * np.sign(reference.along[sites])[:, None], frames, tensors[own, own], inward))
        progress("Hessian", len(turns), len(turns))
        design, target = np.concatenate(designs, axis=1), np.concatenate(targets, axis=1)
        if soc:
            tensor = np.einsum("pkn,pn->pk", np.linalg.pinv(design), target).reshape(-1, 3, 3)
        else:
            column = design @ np.eye(3).ravel()
            values = (target * column).sum(axis=1) / (column**2).sum(axis=1)
            tensor = values[:, None, None] * np.eye(3)
        misfit = np.abs(target - np.einsum("pnk,pk->pn", design, tensor.reshape(-1, 9))).max(initial=0.0)
        symmetric = symmetrised(tensor, pairs, cell, sites, reference.pattern, *tolerances)
        removed = float(np.abs(symmetric - tensor).max(initial=0.0))
        onsite, offset = self._onsite(fields, symmetric, pairs, soc)
        onsite = symmetrised_sites(onsite, cell, sites, reference.pattern, *tolerances)
        model = SpinModel(cell, sites, pairs, symmetric, onsite)
        return self._dataset(model, box, calculator, reference, len(turns), left, misfit, removed, offset, progress)

    @staticmethod
    def _onsite(
        fields: list[tuple[Array, Array, Array, Array]],
        tensor: Array,
        pairs: Pairs,
        soc: bool,
    ) -> tuple[Array, Array]:
        """Solve the own blocks for A_i, traceless, and for what no bilinear model explains, eV.

        On the sphere the own block is ``-½ (|m|² t·H·t' + |m| B·e δ) = t·A·t' - (e·A·e + Σ_j e_i·J_ij·e_j) δ``.
        """
        count = len(fields[0][0])
        onsite, offset = np.zeros((count, 3, 3)), np.zeros(count)
        basis = np.array(
            [
                [[1, 0, 0], [0, -1, 0], [0, 0, 0]],
                [[1, 0, 0], [0, 1, 0], [0, 0, -2]],
                [[0, 1, 0], [1, 0, 0], [0, 0, 0]],
                [[0, 0, 1], [0, 0, 0], [1, 0, 0]],
                [[0, 0, 0], [0, 0, 1], [0, 1, 0]],
            ],
            dtype=float,
        )
        for site in range(count):
            mine = pairs.first == site
            rows, values = [], []
            for units, frames, own, inward in fields:
                e, across = units[site], frames[site]
                molecular = float(np.einsum("x,pxy,py->", e, tensor[mine], units[pairs.second[mine]]))
                left = own[site] + (molecular - 0.5 * inward[site]) * np.eye(2)
                columns = [across @ b @ across.T - (e @ b @ e) * np.eye(2) for b in basis]
                rows.append(np.array([c.ravel() for c in [*columns, np.eye(2)]]).T)
                values.append(left.ravel())
            matrix, vector = np.concatenate(rows), np.concatenate(values)
            if soc:
                solution = np.linalg.lstsq(matrix, vector, rcond=None)[0]
                onsite[site] = np.tensordot(solution[:5], basis, axes=1)
                offset[site] = solution[5]
            else:
                offset[site] = matrix[:, 5] @ vector / (matrix[:, 5] @ matrix[:, 5])
        return onsite, offset

    def _dataset(
        self,
        model: "SpinModel",
        box: Supercell,
        calculator: SpinCalculator,
        reference: "Reference",
        axes: int,
        left: float,
        misfit: float,
        removed: float,
        offset: Array,
        progress: Progress,
    ) -> xr.Dataset:
        cell, sites, pairs, tensor = model.cell, model.sites, model.pairs, model.tensor
        along, lengths = reference.along, np.abs(reference.along[sites])
        units = reference.directions[sites] * np.sign(along[sites])[:, None]
        cosines = np.einsum("px,px->p", units[pairs.first], units[pairs.second])
        milli = 1e3
        isotropic = np.trace(tensor, axis1=1, axis2=2) / 3
        dmi = 0.5 * np.einsum("cab,pab->pc", LEVI_CIVITA, tensor)
        distance = np.linalg.norm(pairs.vector, axis=1)
        shells = model.shells()
        symbols = np.array(cell.get_chemical_symbols())
        q, position, labels = band_path(cell, self.options.path, self.options.points)
        eigen = np.array([np.linalg.eigvalsh(model.isotropic_at(x))[-1] for x in q])
        zero = model.isotropic_at(np.zeros(3)).real
        strongest = float(np.linalg.eigvalsh(zero)[-1])
        data: dict[str, Any] = {
            "tensor": variable(("pair", "xyz", "xyz_2"), tensor * milli, "meV", "exchange tensor J_ij"),
            "J": variable("pair", isotropic * milli, "meV", "isotropic exchange, a third of the trace"),
            "D": variable(("pair", "xyz"), dmi * milli, "meV", "Dzyaloshinskii-Moriya vector of -Σ D·(e_i×e_j)"),
            "single_ion": variable(
                ("site", "xyz", "xyz_2"), model.onsite * milli, "meV", "single-ion tensor A of -Σ e·A·e, traceless"
            ),
            "onsite_offset": variable(
                "site", offset * milli, "meV", "isotropic part of the own block that no bilinear model explains"
            ),
            "moments": variable("site", along[sites], "µB", "moment along its direction in the reference"),
            "direction": variable(
                ("site", "xyz"),
                reference.directions[sites],
                "1",
                "direction of the reference, one axis where collinear",
            ),
            "shell_J": variable(
                "shell", np.array([s.mean for s in shells]) * milli, "meV", "mean isotropic exchange of the shell"
            ),
            "J_q": variable("wave", eigen * milli, "meV", "largest eigenvalue of J(q)"),
            "J_zero": variable(
                (),
                float(isotropic @ cosines) / len(sites) * milli,
                "meV",
                "Σ_j J_ij e_i·e_j of the reference, mean over sites",
            ),
            "tc_mean_field": variable(
                (), 2 / 3 * strongest / BOLTZMANN if strongest > 0 else np.nan, "K", "mean-field ordering temperature"
            ),
            "tc_rpa": variable(
                (), self._rpa(model, units), "K", "RPA Curie temperature, NaN but for one ferromagnetic site"
            ),
            "stiffness": variable(
                (), self._stiffness(model, units, lengths), "meV Å²", "spin-wave stiffness, NaN but for ferromagnets"
            ),
            "left_out": variable(
                (), left * milli, "meV", "largest |J| at pairs beyond the unique images of the supercell"
            ),
            "symmetry_removed": variable((), removed * milli, "meV", "largest part that symmetrisation removed"),
            "direction_residual": variable(
                (),
                misfit * milli,
                "meV",
                "largest part of the Hessian that no tensor common to all reference axes explains",
            ),
        }
        coords: dict[str, Any] = {
            "i": variable("pair", sites[pairs.first], "1", "first atom, in the primitive cell"),
            "j": variable("pair", sites[pairs.second], "1", "second atom, in the primitive cell"),
            "shift": variable(("pair", "xyz"), pairs.shift, "1", "cell of the second atom, in lattice vectors"),
            "vector": variable(("pair", "xyz"), pairs.vector, "Å", "from the first to the second atom"),
            "distance": variable("pair", distance, "Å", "distance"),
            "site": variable("site", sites, "1", "atom of the primitive cell"),
            "element": variable("site", symbols[sites], "1", "chemical symbol"),
            "scaled": variable(
                ("site", "xyz"),
                cell.get_scaled_positions(wrap=False)[sites],
                "1",
                "fractional position in the primitive cell",
            ),
            "shell_distance": variable("shell", np.array([s.distance for s in shells]), "Å", "distance of the shell"),
            "shell_count": variable(
                "shell", np.array([s.count for s in shells]), "1", "neighbours of one first atom in the shell"
            ),
            "shell_pair": variable("shell", np.array([s.label for s in shells]), "1", "elements of the shell"),
            "q": variable(("wave", "xyz"), q, "1", "wave vector in the reciprocal lattice of the primitive cell"),
            "position": variable("wave", position, "1/Å", "place along the path"),
            "xyz": variable("xyz", np.array(["x", "y", "z"]), "1", "Cartesian axis, or lattice vector"),
            "xyz_2": variable("xyz_2", np.array(["x", "y", "z"]), "1", "Cartesian axis"),
        }
        if self.options.states:
            coords["cone"] = variable("cone", np.array(CONES), "degree", "largest angle to the reference")
            data.update(self._compare(model, calculator, reference.moments, progress))
        attrs: dict[str, Any] = {
            "primitive_cell": cell.cell[:].tolist(),
            "supercell": list(box.repeats),
            "supercell_atoms": len(box.atoms),
            "unique_radius": box.radius,
            "reference_axes": axes,
            "collinear": "yes" if reference.collinear else "no",
            "path_labels": [list(x) for x in labels],
        }
        best = int(np.argmax(eigen))
        if eigen[best] > strongest + 1e-6:
            place = ", ".join(f"{x:.3g}" for x in q[best])
            attrs["note"] = (
                f"the reference is not the lowest state of this exchange: J(q) is largest at q = ({place}), by "
                f"{(eigen[best] - strongest) * milli:.3g} meV"
            )
        return xr.Dataset(data, coords, attrs)

    def _rpa(self, model: "SpinModel", units: Array) -> float:
        """Return the RPA Curie temperature of one ferromagnetic sublattice, K: k_B T = ⅔ / <1/(J(0) - J(q))>."""
        if len(units) != 1:
            return np.nan
        zero = float(model.isotropic_at(np.zeros(3))[0, 0].real)
        sizes = [self.options.mesh, 3 * self.options.mesh // 2, 2 * self.options.mesh]
        averages = []
        for size in sizes:
            steps = (np.arange(size) + 0.5) / size
            q = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
            gap = zero - model.scalar_at(q)
            if gap.min() <= 0:
                return np.nan
            averages.append(float(np.mean(1 / gap)))
        orders = np.array([[1.0, 1 / n, 1 / n**3] for n in sizes])
        return 2 / 3 / float(np.linalg.solve(orders, averages)[0]) / BOLTZMANN

    @staticmethod
    def _stiffness(model: "SpinModel", units: Array, lengths: Array) -> float:
        """Return D of ħω = D q² in meV Å² from the lowest magnon at small q, mean over three directions."""
        if np.any(units @ units[0] < 1 - 1e-6):
            return np.nan
        zero = model.isotropic_at(np.zeros(3)).real
        scale = 4 / np.sqrt(np.outer(lengths, lengths))
        found = []
        for direction in np.eye(3):
            energies, squares = [], []
            for size in (0.01, 0.02, 0.03):
                q = model.cell.cell[:] @ (size * direction) / (2 * np.pi)
                matrix = scale * (np.diag(zero.sum(axis=1)) - model.isotropic_at(q))
                energies.append(float(np.linalg.eigvalsh(matrix)[0]))
                squares.append(size**2)
            x = np.array(squares)
            found.append(np.linalg.lstsq(np.column_stack([x, x**2, x**3]), np.array(energies), rcond=None)[0][0])
        return float(np.mean(found)) * 1e3

    def _compare(
        self, model: "SpinModel", calculator: SpinCalculator, moments: Array, progress: Progress
    ) -> dict[str, xr.Variable]:
        """Compare the spin model with the calculator on random states of a small supercell, and fit what is missing."""
        rng = np.random.default_rng(self.options.seed)
        box = Supercell(model.cell, model.sites, (3, 3, 3))
        reference = box.tiled(moments)
        unit = reference[box.magnetic] / np.linalg.norm(reference[box.magnetic], axis=1)[:, None]
        count, states = len(box.magnetic), self.options.states
        start = calculator.evaluate_spins(box.atoms, reference[None])["energy"][0]
        start_model = model.energy(unit[None], box)[0]
        shells = model.shells()[: self.options.biquadratic]
        misses, sizes, designs = [], [], []
        for k, cone in enumerate(CONES):
            progress("random states", k, len(CONES))
            cosines = rng.uniform(np.cos(np.deg2rad(cone)), 1.0, (states, count))
            turns = rng.uniform(0, 2 * np.pi, (states, count))
            sines = np.sqrt(1 - cosines**2)
            local = np.stack([sines * np.cos(turns), sines * np.sin(turns), cosines], axis=-1)
            frames = np.array([shortest_rotation(np.array([0.0, 0.0, 1.0]), e) for e in unit])
            spins = np.einsum("ixy,siy->six", frames, local)
            turned = np.tile(reference, (states, 1, 1))
            turned[:, box.magnetic] = spins * np.linalg.norm(reference[box.magnetic], axis=1)[None, :, None]
            actual = []
            for begin in range(0, states, CHUNK):
                part = turned[begin : begin + CHUNK]
                actual.append(calculator.evaluate_spins(box.atoms, part, magnetic_forces=False)["energy"])
            change = np.concatenate(actual) - start
            misses.append(change - (model.energy(spins, box) - start_model))
            sizes.append(float(np.sqrt(np.mean(change**2))))
            designs.append(np.array([model.turned(spins, unit, box, shell.pairs) for shell in shells]).T)
        progress("random states", len(CONES), len(CONES))
        scale = 1e3 / count
        data = {
            "model_error": variable(
                "cone",
                np.array([np.sqrt(np.mean(x**2)) for x in misses]) * scale,
                "meV/magnetic atom",
                "rms of predicted less actual energy of random states",
            ),
            "model_scale": variable(
                "cone",
                np.array(sizes) * scale,
                "meV/magnetic atom",
                "rms of the actual energy of random states, less the reference",
            ),
        }
        if shells:
            # every cone counts alike
            weights = np.repeat([1 / max(x, 1e-300) for x in sizes], states)
            design, target = np.concatenate(designs) * weights[:, None], np.concatenate(misses) * weights
            strengths = np.linalg.lstsq(design, target, rcond=None)[0]
            left = [m - d @ strengths for m, d in zip(misses, designs, strict=True)]
            data["biquadratic"] = variable(
                "fitted_shell", strengths * 1e3, "meV", "B of -Σ B (e_i·e_j - σ_ij)², σ that product in the reference"
            )
            data["model_error_biquadratic"] = variable(
                "cone",
                np.array([np.sqrt(np.mean(x**2)) for x in left]) * scale,
                "meV/magnetic atom",
                "rms of predicted less actual energy of random states, biquadratic exchange included",
            )
        return data

    def summary(self, dataset: xr.Dataset) -> list[Row]:
        """Return shells, temperatures and checks as a short table."""
        rows = [
            Row("supercell", f"{dataset.attrs['supercell_atoms']} atoms"),
            Row("pairs within", float(dataset.attrs["unique_radius"]), "Å"),
        ]
        for site, element, moment in zip(
            dataset["site"].values, dataset["element"].values, dataset["moments"].values, strict=True
        ):
            rows.append(Row(f"moment of {element} {site}", float(moment), "µB"))
        for k in range(min(8, dataset.sizes["shell"])):
            label = f"J {dataset['shell_pair'].values[k]}, {dataset['shell_distance'].values[k]:.3f} Å"
            count = int(dataset["shell_count"].values[k])
            spread = None if "shell_J_std" not in dataset else float(dataset["shell_J_std"][k])
            rows.append(Row(f"{label}, {count} neighbours", float(dataset["shell_J"][k]), "meV", spread))
        strongest = np.linalg.norm(dataset["D"].values, axis=1).max(initial=0.0)
        rows.append(Row("largest |D|", float(strongest), "meV"))
        for key, label in (
            ("J_zero", "Σ J of the reference"),
            ("tc_mean_field", "Tc, mean field"),
            ("tc_rpa", "Tc, RPA"),
            ("stiffness", "stiffness"),
            ("left_out", "|J| beyond the supercell"),
            ("symmetry_removed", "removed by symmetry"),
            ("direction_residual", "not common to all axes"),
        ):
            value = float(dataset[key])
            if np.isfinite(value):
                rows.append(Row(label, value, dataset[key].attrs["units"], spread_of(dataset, key)))
        if "model_error" in dataset:
            for cone in dataset["cone"].values:
                error, scale = (float(dataset[k].sel(cone=cone)) for k in ("model_error", "model_scale"))
                text = f"{error:.3g} of {scale:.3g}"
                if "biquadratic" in dataset:
                    text += f"; {float(dataset['model_error_biquadratic'].sel(cone=cone)):.3g} with B"
                rows.append(Row(f"model error at {cone:g}°", text, "meV/magnetic atom"))
        for k in range(dataset.sizes.get("fitted_shell", 0)):
            label = f"B {dataset['shell_pair'].values[k]}, {dataset['shell_distance'].values[k]:.3f} Å"
            spread = None if "biquadratic_std" not in dataset else float(dataset["biquadratic_std"][k])
            rows.append(Row(label, float(dataset["biquadratic"][k]), "meV", spread))
        return rows

    def plot(self, dataset: xr.Dataset) -> "Figure":
        """Draw J and |D| against distance, and J(q)."""
        from .plot import plot_exchange

        return plot_exchange(dataset)


@dataclass(frozen=True)
class Shell:
    """Pairs of the same elements at one distance: mean J in eV, number per first atom, and which they are."""

    label: str
    distance: float
    count: int
    mean: float
    pairs: NDArray[np.intp]


@dataclass(frozen=True)
class SpinModel:
    """``E = -Σ_{i≠j} e_i·J_ij·e_j - Σ_i e_i·A_i·e_i`` of a crystal.

    Parameters
    ----------
    cell : the primitive cell.
    sites : its magnetic atoms.
    pairs : P pairs.
    tensor : J in eV, shape (P, 3, 3).
    onsite : A in eV, shape (n, 3, 3).
    """

    cell: Atoms
    sites: NDArray[np.intp]
    pairs: Pairs
    tensor: Array
    onsite: Array

    def _phases(self, q: Array) -> NDArray[np.complex128]:
        scaled = self.cell.get_scaled_positions(wrap=False)[self.sites]
        between = self.pairs.shift + scaled[self.pairs.second] - scaled[self.pairs.first]
        return np.asarray(np.exp(2j * np.pi * between @ np.asarray(q).T))

    def isotropic_at(self, q: Array) -> NDArray[np.complex128]:
        """Return the matrix of isotropic J_ij(q) in eV, shape (n, n), q in reciprocal lattice units."""
        n = len(self.sites)
        matrix = np.zeros((n, n), dtype=complex)
        values = np.trace(self.tensor, axis1=1, axis2=2) / 3 * self._phases(q)
        np.add.at(matrix, (self.pairs.first, self.pairs.second), values)
        return matrix

    def scalar_at(self, q: Array) -> Array:
        """Return J(q) in eV of a single sublattice at many wave vectors (Q, 3), shape (Q,)."""
        isotropic = np.trace(self.tensor, axis1=1, axis2=2) / 3
        return np.concatenate([isotropic @ self._phases(part).real for part in np.array_split(q, len(q) // 4096 + 1)])

    def _ends(self, box: Supercell, pair: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the two ends of a pair in every cell, as magnetic sites of a supercell."""
        n, count = len(self.sites), len(box.shifts)
        target = (box.shifts + self.pairs.shift[pair]) % np.array(box.repeats)
        strides = np.array([box.repeats[1] * box.repeats[2], box.repeats[2], 1])
        return np.arange(count) * n + self.pairs.first[pair], target @ strides * n + self.pairs.second[pair]

    def energy(self, spins: Array, box: Supercell) -> Array:
        """Return energies in eV of unit spins (S, M, 3) on the magnetic sites of a supercell, shape (S,)."""
        result = -np.einsum("smx,mxy,smy->s", spins, np.tile(self.onsite, (len(box.shifts), 1, 1)), spins)
        for p, tensor in enumerate(self.tensor):
            here, there = self._ends(box, p)
            result -= np.einsum("smx,xy,smy->s", spins[:, here], tensor, spins[:, there])
        return np.asarray(result)

    def turned(self, spins: Array, reference: Array, box: Supercell, pairs: NDArray[np.intp]) -> Array:
        """Return -Σ (e_i·e_j - σ_ij)² over some pairs of unit spins (S, M, 3), σ that of the reference, shape (S,).

        It has no second derivative at the reference, so J_ij from there stays as it is beside a biquadratic term.
        """
        result = np.zeros(len(spins))
        for p in pairs:
            here, there = self._ends(box, int(p))
            signs = np.einsum("mx,mx->m", reference[here], reference[there])
            result -= ((np.einsum("smx,smx->sm", spins[:, here], spins[:, there]) - signs) ** 2).sum(axis=1)
        return result

    def shells(self) -> list[Shell]:
        """Return the shells in the order of their distances."""
        symbols = np.array(self.cell.get_chemical_symbols())[self.sites]
        distance = np.linalg.norm(self.pairs.vector, axis=1)
        isotropic = np.trace(self.tensor, axis1=1, axis2=2) / 3
        found: list[Shell] = []
        ends = zip(symbols[self.pairs.first], symbols[self.pairs.second], strict=True)
        labels = np.array(["-".join(sorted(pair)) for pair in ends])
        for label in sorted(set(labels.tolist())):
            chosen = np.flatnonzero(labels == label)
            chosen = chosen[np.argsort(distance[chosen], kind="stable")]
            breaks = np.flatnonzero(np.diff(distance[chosen]) > 5 * SAME_DISTANCE) + 1
            for group in np.split(chosen, breaks):
                firsts = len(set(self.pairs.first[group].tolist()))
                mean = float(isotropic[group].mean())
                size = round(len(group) / firsts)
                found.append(Shell(str(label), float(distance[group].mean()), size, mean, group))
        return sorted(found, key=lambda s: (round(s.distance, 3), s.label))


def _operations(
    cell: Atoms, sites: NDArray[np.intp], pattern: Array, symprec: float, mag_symprec: float
) -> list[tuple[Array, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Return each operation as rotation (Cartesian and fractional), image of each magnetic site, and its cell."""
    scaled = cell.get_scaled_positions(wrap=False)
    found = spglib.get_magnetic_symmetry(
        (cell.cell[:], scaled, cell.numbers, pattern),
        symprec=symprec,
        mag_symprec=mag_symprec,
        is_axial=pattern.ndim == 2,
    )
    operations = []
    to_cartesian = cell.cell[:].T
    for w, t in zip(found["rotations"], found["translations"], strict=True):
        images = scaled[sites] @ w.T + t
        difference = images[:, None] - scaled[sites][None]
        whole = np.rint(difference)
        error = np.linalg.norm((difference - whole) @ cell.cell[:], axis=2)
        error[cell.numbers[sites][:, None] != cell.numbers[sites][None]] = np.inf
        target = error.argmin(axis=1)
        shift = whole[np.arange(len(sites)), target].astype(np.int64)
        rotation = to_cartesian @ w @ np.linalg.inv(to_cartesian)
        operations.append((rotation, np.asarray(w, dtype=np.int64), target.astype(np.int64), shift))
    return operations


def symmetrised(
    tensor: Array,
    pairs: Pairs,
    cell: Atoms,
    sites: NDArray[np.intp],
    pattern: Array,
    symprec: float,
    mag_symprec: float,
) -> Array:
    """Average pair tensors over the symmetry of crystal and reference, and over J_ji = J_ijᵀ.

    Parameters
    ----------
    tensor : shape (P, 3, 3).
    pairs, cell, sites : what they belong to.
    pattern : moments in µB, along their common axis, shape (N,), or (N, 3).
    symprec, mag_symprec : tolerances in Å and µB.
    """
    index = {key: k for k, key in enumerate(pairs.keys())}
    total, count = np.zeros_like(tensor), np.zeros(len(tensor))
    for rotation, w, target, shift in _operations(cell, sites, pattern, symprec, mag_symprec):
        first, second = target[pairs.first], target[pairs.second]
        moved = pairs.shift @ w.T + shift[pairs.second] - shift[pairs.first]
        turned = np.einsum("xa,pab,yb->pxy", rotation, tensor, rotation)
        keys = Pairs(first, second, moved, pairs.vector).keys()
        reverse = Pairs(second, first, -moved, pairs.vector).keys()
        for names, values in ((keys, turned), (reverse, turned.transpose(0, 2, 1))):
            rows = np.array([index.get(name, -1) for name in names], dtype=int)
            good = rows >= 0
            np.add.at(total, rows[good], values[good])
            np.add.at(count, rows[good], 1.0)
    return total / count[:, None, None]


def symmetrised_sites(
    tensor: Array, cell: Atoms, sites: NDArray[np.intp], pattern: Array, symprec: float, mag_symprec: float
) -> Array:
    """Average site tensors (n, 3, 3) over the symmetry of crystal and reference."""
    operations = _operations(cell, sites, pattern, symprec, mag_symprec)
    total = np.zeros_like(tensor)
    for rotation, _, target, _ in operations:
        total[target] += np.einsum("xa,pab,yb->pxy", rotation, tensor, rotation)
    return total / len(operations)
