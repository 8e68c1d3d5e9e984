"""Exchange tensors of every pair from the transverse Hessian of a supercell, and what follows from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from ase import Atoms
from ase.io.jsonio import encode
from numpy.typing import NDArray
from scipy.optimize import minimize

from .base import (
    Options,
    Progress,
    Property,
    Row,
    derived,
    of_members,
    option,
    over_members,
    refuse_idle,
    spread_of,
    variable,
)
from .conventions import BOLTZMANN
from .errors import MomentError, OptionError
from .protocol import ZERO_MOMENT, SpinCalculator, moments_of
from .references import Crystal, Fit, Joined, Reference, measure, named_states, orbits, relaxed_reference
from .spiral import canonical, frozen_stiffness
from .supercell import Pairs, Supercell, grown, row_of_coverage
from .symmetry import band_path, shortest_rotation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

CHUNK = 64
"""Spin configurations evaluated at once."""
DIVERGING = 0.6
"""Growth of the RPA's average from a mesh of 1.5 n to one of 2 n, over that from n to 1.5 n: 0.5 where it converges as
1/n, 0.71 where it is a logarithm, one in a chain."""
ROUNDING = 1e-9
"""Anisotropic terms below this, in meV, are zero."""
CONES = (5.0, 20.0, 60.0, 180.0)
_SIMPLEX = np.concatenate([np.zeros((1, 3)), np.eye(3)])
LEVI_CIVITA = np.array(
    [[[0, 0, 0], [0, 0, 1], [0, -1, 0]], [[0, 0, -1], [0, 0, 0], [1, 0, 0]], [[0, 1, 0], [-1, 0, 0], [0, 0, 0]]],
    dtype=float,
)


@dataclass(frozen=True)
class ExchangeOptions(Options):
    """Options of the exchange.

    Parameters
    ----------
    references : reference states that one model is fitted to: ``given``, ``fm``, ``afm``, or files of the same
        crystal with moments; by default the one given.
    tolerance : largest |J| that may be left beyond the unique images of the supercell, relative to the largest.
    max_atoms : largest supercell.
    radius : least distance within which pairs are wanted, Å.
    states : random states per cone angle that the spin model is compared on.
    seed : of the random states.
    path : special points of J(q); ``auto`` is that of seekpath.
    points : wave vectors along the path.
    mesh : points per direction of the meshes of the RPA average and of the largest J(q).
    biquadratic : shells, the nearest first, whose bilinear and biquadratic exchange are fitted together.
    """

    references: tuple[str, ...] = option(
        (), "reference states that share one model: given, fm, afm, files with moments; by default the one given"
    )
    tolerance: float = option(1e-3, "largest |J| left beyond the supercell's unique images, relative to the largest")
    max_atoms: int = option(1000, "largest supercell, in atoms")
    radius: float = option(5.0, "least distance within which pairs are wanted, Å")
    states: int = option(100, "random states per cone angle that the spin model is compared on; 0 leaves them out")
    seed: int = option(0, "seed of the random states")
    path: str = option("auto", "special points of J(q); auto is that of seekpath")
    points: int = option(101, "wave vectors along the path")
    mesh: int = option(24, "points per direction of the meshes of the RPA average and of the largest J(q)")
    biquadratic: int = option(2, "nearest shells whose J and biquadratic B are fitted together; 0 for none")

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
        if not self.states:
            idle = ("seed", "biquadratic") if self.biquadratic else ("seed",)
            refuse_idle(self, idle, "there are no random states")


class Exchange(Property):
    """J_ij around a reference, collinear or not, from the Hessian of a supercell."""

    name = "exchange"
    title = "exchange interactions"
    options_type: ClassVar[type[Options]] = ExchangeOptions

    def __init__(
        self, options: Options | None = None, repeats: dict[str, tuple[int, int, int]] | None = None, **named: Any
    ) -> None:
        super().__init__(options, **named)
        self._repeats = repeats

    def check(self, atoms: Atoms, calculator: SpinCalculator) -> None:
        """Refuse structures without moments."""
        super().check(atoms, calculator)
        moments = moments_of(atoms)
        if np.linalg.norm(moments, axis=1).max() <= ZERO_MOMENT:
            raise MomentError("no atom carries a moment, so there is no exchange; give moments in µB")
        named_states(atoms, self.options.references, calculator)

    def _references(self, atoms: Atoms, calculator: SpinCalculator) -> dict[str, Reference]:
        """Return the relaxed reference states in their primitive cells."""
        mode, tolerances = self.mode(calculator), (self.options.symprec, self.options.mag_symprec)
        states = named_states(atoms, self.options.references, calculator)
        return {name: relaxed_reference(state, calculator, mode, *tolerances) for name, state in states.items()}

    def prepare(self, atoms: Atoms, members: Sequence[SpinCalculator], progress: Progress) -> "Exchange":
        """Size the supercells."""
        limits = self.options.radius, self.options.tolerance, self.options.max_atoms
        found = {
            name: grown(state.cell, state.sites, state.moments, members[0], *limits, progress)
            for name, state in self._references(atoms, members[0]).items()
        }
        return Exchange(self.options, found)

    def compute(self, atoms: Atoms, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Compute tensors, on-site terms, and what follows from them with one model."""
        if self._repeats is None:
            raise OptionError("the supercell is missing; call run, which sizes it")
        references = self._references(atoms, calculator)
        soc = calculator.soc is not False
        tolerances = self.options.symprec, self.options.mag_symprec
        crystal = Crystal.of(references, atoms, soc, *tolerances)
        measured = {}
        for name, reference in references.items():
            turns = reference.turns(*tolerances) if soc else np.eye(3)[None]
            stage = "Hessian" if len(references) == 1 else f"Hessian, {name}"
            measured[name] = measure(reference, self._repeats[name], turns, calculator, progress, stage)
        joined = Joined(crystal, measured, soc)
        if not len(joined.pairs.first):
            raise OptionError(f"no two moments are within {joined.radius:.3g} Å, half the supercell; raise radius")
        dataset = self._dataset(joined, calculator, progress)
        if self.options.references:
            states = named_states(atoms, self.options.references, calculator)
            dataset.attrs["reference_structures"] = [encode(state) for state in states.values()]
        return dataset

    def _dataset(self, joined: Joined, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        tolerances = self.options.symprec, self.options.mag_symprec
        fit = joined.fit()
        models = [_model_of(joined, fit, k) for k in range(len(joined.names))]
        # what belongs to one state is that of the first
        model, box, reference = models[0], joined.measured[0].box, joined.measured[0].reference
        cell, sites, pairs, tensor = model.cell, model.sites, model.pairs, model.tensor
        classes, kinds = orbits(joined.pairs, joined.crystal.operations)
        shells = shells_of(model, classes[joined.pairs_of(0)[1]], kinds[joined.sites[0]])
        along, lengths, units = reference.along, np.abs(reference.along[sites]), reference.units
        cosines = np.einsum("px,px->p", units[pairs.first], units[pairs.second])
        coverages = [m.coverage for m in joined.measured]
        milli = 1e3
        isotropic = np.trace(tensor, axis1=1, axis2=2) / 3
        dmi = 0.5 * np.einsum("cab,pab->pc", LEVI_CIVITA, tensor)
        distance = np.linalg.norm(pairs.vector, axis=1)
        symbols = np.array(cell.get_chemical_symbols())
        q, position, labels = band_path(cell, self.options.path, self.options.points, self.options.symprec)
        eigen = np.linalg.eigvalsh(model.isotropic_at(q))[:, -1]
        rotations = np.array([o[0] for o in reference.operations(joined.soc, *tolerances)])
        ordering, strongest = self._ordering(model, q, rotations)
        favoured = not ordering.any() and _favours(model.isotropic_at(np.zeros((1, 3)))[0].real, units)
        data: dict[str, Any] = {
            "tensor": variable(("pair", "xyz", "xyz_2"), tensor * milli, "meV", "exchange tensor J_ij"),
            "J": variable("pair", isotropic * milli, "meV", "isotropic exchange, a third of the trace"),
            "anisotropic": variable(
                ("pair", "xyz", "xyz_2"),
                ((tensor + tensor.transpose(0, 2, 1)) / 2 - isotropic[:, None, None] * np.eye(3)) * milli,
                "meV",
                "symmetric anisotropic exchange, traceless",
            ),
            "D": variable(("pair", "xyz"), dmi * milli, "meV", "Dzyaloshinskii-Moriya vector of -Σ D·(e_i×e_j)"),
            "single_ion": variable(
                ("site", "xyz", "xyz_2"), model.onsite * milli, "meV", "single-ion tensor A of -Σ e·A·e, traceless"
            ),
            "onsite_offset": variable(
                "site",
                fit.offset[0][joined.sites[0]] * milli,
                "meV",
                "isotropic part of the own block that no bilinear model explains",
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
                (),
                2 / 3 * strongest / BOLTZMANN if strongest > 0 else np.nan,
                "K",
                "mean-field ordering temperature, from the largest eigenvalue of J(q) at any q",
            ),
            "ordering_q": variable(
                "xyz", ordering, "1", "where that eigenvalue is, reciprocal lattice of the primitive cell"
            ),
            "tc_rpa": variable(
                (),
                self._rpa(model, np.sign(along[sites]), ordering) if reference.collinear else np.nan,
                "K",
                "RPA ordering temperature of the reference, NaN where it is not collinear or not the lowest state",
            ),
            **self._stiffness(model, reference, lengths, calculator),
            "left_out": variable(
                (),
                max(m.left for m in joined.measured) * milli,
                "meV",
                "largest |J| at pairs beyond the unique images of the supercell",
            ),
            "folded": variable(
                (),
                max(c.folded for c in coverages) * milli,
                "meV",
                "Σ_j |J_ij| of one site beyond the unique images of the supercell, the largest",
            ),
            "folded_pairs": variable(
                (),
                max(c.pairs for c in coverages),
                "1",
                "pairs of a site beyond the unique images and within reach, NaN where the reach is not stated",
            ),
            "symmetry_removed": variable((), fit.removed * milli, "meV", "largest part that symmetrisation removed"),
            "direction_residual": variable(
                (),
                fit.misfit.max() * milli,
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
                ("shell", "end"),
                np.array([s.count for s in shells]).reshape(-1, 2),
                "1",
                "neighbours of one atom of either end",
            ),
            "shell_pair": variable("shell", np.array([s.label for s in shells]), "1", "elements of the shell"),
            "shell_cosine": variable(
                "shell", np.array([cosines[s.pairs].mean() for s in shells]), "1", "mean e_i·e_j of the reference"
            ),
            "end": variable("end", np.array(["first", "second"]), "1", "end of a pair"),
            "q": variable(("wave", "xyz"), q, "1", "wave vector in the reciprocal lattice of the primitive cell"),
            "position": variable("wave", position, "1/Å", "place along the path"),
            "xyz": variable("xyz", np.array(["x", "y", "z"]), "1", "Cartesian axis, or lattice vector"),
            "xyz_2": variable("xyz_2", np.array(["x", "y", "z"]), "1", "Cartesian axis"),
        }
        if self.options.states:
            coords["cone"] = variable("cone", np.array(CONES), "degree", "largest angle to the reference")
            data.update(self._compare(joined, models, shells, calculator, progress))
        if len(models) > 1:
            coords["state"] = variable("state", np.array(joined.names), "1", "reference state")
            data.update(self._of_states(joined, fit, models, shells, calculator))
        attrs: dict[str, Any] = {
            "primitive_cell": cell.cell[:].tolist(),
            "supercell": list(box.repeats),
            "supercell_atoms": len(box.atoms),
            "unique_radius": joined.radius,
            **min(coverages, key=lambda c: c.beyond is True).attributes,
            "reference_axes": len(joined.measured[0].own),
            "collinear": "yes" if reference.collinear else "no",
            "favoured": "yes" if favoured else "no",
            "path_labels": [list(x) for x in labels],
        }
        return xr.Dataset(data, coords, attrs)

    def _of_states(
        self,
        joined: Joined,
        fit: Fit,
        models: list["SpinModel"],
        shells: list["Shell"],
        calculator: SpinCalculator,
    ) -> dict[str, xr.Variable]:
        """Return what each of several reference states says by itself, against what they share."""
        rows = joined.pairs_of(0)[1]
        alone = []
        for k in range(len(models)):
            isotropic = np.trace(joined.fit([k]).tensor, axis1=1, axis2=2) / 3
            alone.append([float(isotropic[rows[shell.pairs]].mean()) for shell in shells])
        energies, predicted = [], []
        for measured, model in zip(joined.measured, models, strict=True):
            reference = measured.reference
            one = Supercell(model.cell, model.sites, (1, 1, 1))
            energies.append(calculator.energy(reference.cell, reference.moments) / len(model.sites))
            predicted.append(float(model.energy(reference.units[None], one)[0]) / len(model.sites))
        text = "energy of the state less that of the first"
        return {
            "shell_J_state": variable(
                ("state", "shell"), np.array(alone) * 1e3, "meV", "mean isotropic exchange, from one state alone"
            ),
            "shell_J_spread": variable(
                "shell", np.std(alone, axis=0, ddof=1) * 1e3, "meV", "standard deviation of it between the states"
            ),
            "state_residual": variable(
                "state", fit.misfit * 1e3, "meV", "largest part of the state's Hessian that the common tensors miss"
            ),
            "state_supercell": variable(
                "state", np.array([len(m.box.atoms) for m in joined.measured]), "1", "atoms of the state's supercell"
            ),
            "state_energy": variable(
                "state", (np.array(energies) - energies[0]) * 1e3, "meV/magnetic atom", f"{text}, moments as relaxed"
            ),
            "state_energy_model": variable(
                "state", (np.array(predicted) - predicted[0]) * 1e3, "meV/magnetic atom", f"{text}, of the spin model"
            ),
        }

    def _ordering(self, model: "SpinModel", q: Array, rotations: Array) -> tuple[Array, float]:
        """Return the wave vector of the largest eigenvalue of J(q), from path and mesh, refined, and that in eV."""
        steps = np.arange(self.options.mesh) / self.options.mesh
        mesh = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
        everything = np.concatenate([np.zeros((1, 3)), mesh, q])
        values = np.concatenate(
            [np.linalg.eigvalsh(model.isotropic_at(part))[:, -1] for part in np.array_split(everything, 16)]
        )
        scale = max(float(np.abs(values).max()), 1e-300)
        best = int(np.argmax(np.round(values / scale, 9)))
        found, value = everything[best], float(values[best])

        def largest(x: Array) -> float:
            return float(np.linalg.eigvalsh(model.isotropic_at(x[None]))[0, -1])

        simplex = found + 0.5 / self.options.mesh * _SIMPLEX
        refined = minimize(
            lambda x: -largest(x) / scale,
            found,
            method="Nelder-Mead",
            options={"xatol": 1e-7, "fatol": 1e-14, "initial_simplex": simplex},
        ).x
        # along directions in which J(q) is flat the mesh is as good
        for axis in range(3):
            trial = refined.copy()
            trial[axis] = found[axis]
            if largest(trial) >= largest(refined) - 1e-7 * scale:
                refined = trial
        if largest(refined) > value + 1e-7 * scale:
            found, value = refined, largest(refined)
        if value - values[0] <= 1e-6 * scale:
            return np.zeros(3), float(values[0])
        return canonical(found, model.cell, rotations), value

    def _rpa(self, model: "SpinModel", signs: Array, ordering: Array) -> float:
        """Return the RPA ordering temperature of collinear classical spins in K.

        With ⟨e_i⟩ = σ_i a_i, ``A(q) = diag(f) - J(q)`` and ``f_i = Σ_j J_ij σ_i σ_j a_j / a_i``, it is
        ``k_B T = ⅔ / ⟨A⁻¹⟩_ii``, the same for all sites i, which fixes the a_i; ``⅔ / ⟨1/(J(0) - J(q))⟩`` for one site.
        NaN where the average grows with the mesh, as in layers and chains (N. D. Mermin and H. Wagner, Phys. Rev. Lett.
        17, 1133 (1966)), and where A is negative on the mesh or at the wave vector of the largest J(q), which may lie
        between its points.
        """
        sizes = [self.options.mesh, 3 * self.options.mesh // 2, 2 * self.options.mesh]
        zero = model.isotropic_at(np.zeros((1, 3)))[0].real * np.outer(signs, signs)
        shares = np.ones(len(signs))
        averages = []
        for size in sizes:
            steps = (np.arange(size) + 0.5) / size
            q = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
            if not size % 2:
                # q and -q are alike
                q = q[: len(q) // 2]
            for _ in range(60):
                field = zero @ shares / shares
                inverses = np.zeros(len(signs))
                for part in np.array_split(q, len(q) // 4096 + 1):
                    values, vectors = np.linalg.eigh(np.diag(field) - model.isotropic_at(part))
                    if values.min() <= 0:
                        return np.nan
                    inverses += np.einsum("qik,qk->i", np.abs(vectors) ** 2, 1 / values) / len(q)
                if np.ptp(inverses) <= 1e-8 * inverses.mean():
                    break
                shares = shares * np.sqrt(inverses.mean() / inverses)
            else:
                return np.nan
            softest = np.linalg.eigvalsh(np.diag(field) - model.isotropic_at(ordering[None])[0])[0]
            if softest < -1e-6 * np.abs(field).max():
                return np.nan
            averages.append(float(inverses.mean()))
        first, second = np.diff(averages)
        if second > DIVERGING * first > 0:
            return np.nan
        orders = np.array([[1.0, 1 / n, 1 / n**3] for n in sizes])
        return 2 / 3 / float(np.linalg.solve(orders, averages)[0]) / BOLTZMANN

    @staticmethod
    def _stiffness(
        model: "SpinModel", reference: "Reference", lengths: Array, calculator: SpinCalculator
    ) -> dict[str, xr.Variable]:
        """Return D of ħω = D q² in meV Å², mean over three directions: from the J's, and where it can be without them.

        The sum over J's does not converge with distance; frozen spirals reach as far as the calculator does.
        """
        along = reference.along[reference.sites]
        parallel = reference.collinear and bool(np.all(along * along[0] > 0))
        text = "spin-wave stiffness, NaN but for ferromagnets"
        total = Exchange._summed_stiffness(model, lengths) if parallel else np.nan
        data = {"stiffness_sum": variable((), total, "meV Å²", f"{text}, from the J_ij of the supercell")}
        if parallel and calculator.soc is False and calculator.has("evaluate_spirals"):
            tensor = frozen_stiffness(reference.cell, reference.along, reference.directions[0], calculator)
            value = float(np.trace(tensor)) / 3 * 1e3
            data["stiffness"] = variable((), value, "meV Å²", f"{text}, from frozen spirals at q to 0")
        return data

    @staticmethod
    def _summed_stiffness(model: "SpinModel", lengths: Array) -> float:
        zero = model.isotropic_at(np.zeros((1, 3)))[0].real
        scale = 4 / np.sqrt(np.outer(lengths, lengths))
        found = []
        for direction in np.eye(3):
            energies, squares = [], []
            for size in (0.01, 0.02, 0.03):
                q = model.cell.cell[:] @ (size * direction) / (2 * np.pi)
                matrix = scale * (np.diag(zero.sum(axis=1)) - model.isotropic_at(q[None])[0])
                energies.append(float(np.linalg.eigvalsh(matrix)[0]))
                squares.append(size**2)
            x = np.array(squares)
            found.append(np.linalg.lstsq(np.column_stack([x, x**2, x**3]), np.array(energies), rcond=None)[0][0])
        return float(np.mean(found)) * 1e3

    def _compare(
        self,
        joined: Joined,
        models: list["SpinModel"],
        shells: list["Shell"],
        calculator: SpinCalculator,
        progress: Progress,
    ) -> dict[str, xr.Variable]:
        """Compare the spin model with the calculator on random states of small supercells, and fit J and B together.

        For any B of a shell the bilinear part is what the Hessians then say, linear in B; B is that of the least
        energies missed on the random states.
        """
        rows = joined.pairs_of(0)[1]
        groups = [np.unique(rows[shell.pairs]) for shell in shells[: self.options.biquadratic]]
        alone = joined.fit()
        beside = [joined.fit(biquadratic=np.isin(np.arange(len(joined.pairs.first)), g).astype(float)) for g in groups]
        # per state and cone: predicted less actual energies (states,), in eV, and per site the rms of the actual ones
        misses: list[list[Array]] = []
        sizes: list[list[float]] = []
        designs = []
        for k, (measured, model) in enumerate(zip(joined.measured, models, strict=True)):
            rng = np.random.default_rng(self.options.seed)
            box = Supercell(model.cell, model.sites, (3, 3, 3))
            moments = box.tiled(measured.reference.moments)
            unit = np.tile(measured.reference.units, (len(box.shifts), 1))
            start = calculator.evaluate_spins(box.atoms, moments[None])["energy"][0]
            start_model = model.energy(unit[None], box)[0]
            changes = [_per_strength(joined, alone, other, k, g) for other, g in zip(beside, groups, strict=True)]
            starts = np.array([change(unit[None], box)[0] for change in changes])
            misses.append([])
            sizes.append([])
            for n, cone in enumerate(CONES):
                progress("random states", k * len(CONES) + n, len(models) * len(CONES))
                spins, actual = _random_states(rng, self.options.states, cone, unit, moments, box, calculator)
                change = actual - start
                misses[k].append((change - (model.energy(spins, box) - start_model)) / len(unit))
                sizes[k].append(float(np.sqrt(np.mean(change**2))) / len(unit))
                if groups:
                    predicted = np.array([change(spins, box) for change in changes])
                    designs.append((predicted.T - starts) / len(unit))
        progress("random states", len(models) * len(CONES), len(models) * len(CONES))

        def rms(values: Any) -> Array:
            return np.asarray(np.sqrt(np.mean(np.square(values), axis=-1))) * 1e3

        text, units = "rms of predicted less actual energy of random states", "meV/magnetic atom"
        pooled = np.concatenate(np.array(misses), axis=-1)
        data = {
            "model_error": variable("cone", rms(pooled), units, text),
            "model_scale": variable(
                "cone", rms(np.array(sizes).T), units, "rms of the actual energy of random states, less the reference"
            ),
        }
        if len(models) > 1:
            data["state_model_error"] = variable(("state", "cone"), rms(misses), units, f"{text} around one state")
        if groups:
            # every cone of every state counts alike
            missed = np.array(misses).reshape(len(designs), -1)
            weights = 1 / np.maximum(np.array(sizes).reshape(-1, 1), 1e-300)
            design, target = np.array(designs) * weights[:, :, None], missed * weights
            strengths = np.linalg.lstsq(design.reshape(-1, len(groups)), target.ravel(), rcond=None)[0]
            left = (missed - np.array(designs) @ strengths).reshape(len(models), len(CONES), -1)
            every = np.zeros(len(joined.pairs.first))
            for group, strength in zip(groups, strengths, strict=True):
                every[group] = strength
            both = joined.fit(biquadratic=every)
            isotropic = np.trace(both.tensor, axis1=1, axis2=2) / 3
            data["biquadratic"] = variable(
                "fitted_shell", strengths * 1e3, "meV", "B of -Σ J e_i·e_j - Σ B (e_i·e_j)², fitted together with J"
            )
            data["bilinear"] = variable(
                "fitted_shell",
                np.array([isotropic[group].mean() for group in groups]) * 1e3,
                "meV",
                "J of -Σ J e_i·e_j - Σ B (e_i·e_j)², fitted together with B",
            )
            data["direction_residual_biquadratic"] = variable(
                (), both.misfit.max() * 1e3, "meV", "largest part of the Hessian that J and B together miss"
            )
            data["model_error_biquadratic"] = variable(
                "cone", rms(np.concatenate(left, axis=-1)), units, f"{text}, J and B fitted together"
            )
        return data

    def finish(self, dataset: xr.Dataset, calculator: SpinCalculator) -> xr.Dataset:
        """Average temperatures over the members that have one, and say so where another state is favoured."""
        dataset = over_members(dataset, ("tc_mean_field", "tc_rpa"))
        agreed = "ordering_q_std" not in dataset or float(dataset["ordering_q_std"].max()) < 1e-3
        place = ", ".join(f"{x:.4g}" for x in dataset["ordering_q"].values)
        where = f"J(q) is largest at q = ({place})" if agreed else "members find J(q) largest at different q"
        dataset.attrs["ordering"] = f"q = ({place})" if agreed else "the members of the committee disagree"
        if not agreed:
            dataset.attrs["favoured"] = "no"
        if dataset.attrs["favoured"] == "no":
            if agreed and not dataset["ordering_q"].values.any():
                where = "another order of the cell's own moments has a larger J(0)"
            dataset.attrs["note"] = f"the reference is not the lowest state of this exchange: {where}"
        elif np.ptp(dataset["direction"].values, axis=0).max() < ROUNDING and np.isnan(float(dataset["tc_rpa"])):
            dataset.attrs["note"] = (
                "no temperature in the RPA: its average over the zone does not converge with the mesh"
            )
        return dataset

    def summary(self, dataset: xr.Dataset) -> list[Row]:
        """Return shells, temperatures and checks as a short table."""
        rows = [
            Row("supercell", f"{dataset.attrs['supercell_atoms']} atoms"),
            Row("pairs within", float(dataset.attrs["unique_radius"]), "Å"),
            Row(*row_of_coverage(dataset.attrs, float(dataset["folded_pairs"]))),
        ]
        for k, (site, element) in enumerate(zip(dataset["site"].values, dataset["element"].values, strict=True)):
            spread = None if "moments_std" not in dataset else float(dataset["moments_std"][k])
            rows.append(Row(f"moment of {element} {site}", float(dataset["moments"][k]), "µB", spread))
        for k in range(min(8, dataset.sizes["shell"])):
            label = f"J {_shell_name(dataset, k)}"
            here, there = dataset["shell_count"].values[k].tolist()
            count = f"{here}" if here == there else f"{here} and {there}"
            spread = None if "shell_J_std" not in dataset else float(dataset["shell_J_std"][k])
            value, key = float(dataset["shell_J"][k]), f"J {_shell_key(dataset, k)}"
            rows.append(Row(f"{label}, {count} neighbours", value, "meV", spread, key))
        strongest = derived(dataset, lambda d: float(np.linalg.norm(d["D"].values, axis=1).max(initial=0.0)))
        rows.append(Row("largest |D|", strongest[0], "meV", strongest[1]))
        if np.abs(dataset["anisotropic"]).max() > ROUNDING:
            symmetric = derived(dataset, lambda d: float(np.abs(np.linalg.eigvalsh(d["anisotropic"])).max(initial=0.0)))
            rows.append(Row("largest symmetric anisotropic exchange", symmetric[0], "meV", symmetric[1]))
        for k, (site, element) in enumerate(zip(dataset["site"].values, dataset["element"].values, strict=True)):
            if np.abs(dataset["single_ion"][k]).max() > ROUNDING:
                width = derived(dataset, lambda d, k=k: float(np.ptp(np.linalg.eigvalsh(d["single_ion"][k]))))  # type: ignore[misc]
                rows.append(
                    Row(f"single-ion anisotropy of {element} {site}, hard less easy", width[0], "meV", width[1])
                )
        for name, key, detail in (
            ("J_zero", "Σ J of the reference", ""),
            ("tc_mean_field", "Tc, mean field", f", {dataset.attrs['ordering']}"),
            ("tc_rpa", "Tc, RPA", ""),
            ("stiffness", "stiffness, frozen spirals", ""),
            ("stiffness_sum", "stiffness, J truncated", f" at {dataset.attrs['unique_radius']:.1f} Å"),
            ("left_out", "|J| beyond the supercell", ""),
            ("folded", "Σ |J| of a site beyond the supercell", ""),
            ("symmetry_removed", "removed by symmetry", ""),
            ("direction_residual", "not common to all axes", ""),
            ("direction_residual_biquadratic", "not common to all axes, with B", ""),
        ):
            if name in dataset and np.isfinite(value := float(dataset[name])):
                label = f"{key}{detail}{of_members(dataset, name)}"
                rows.append(Row(label, value, dataset[name].attrs["units"], spread_of(dataset, name), key))
        rows += _rows_of_states(dataset)
        if "model_error" in dataset:
            for cone in dataset["cone"].values:
                scale = float(dataset["model_scale"].sel(cone=cone))
                for key, words in (("model_error", ""), ("model_error_biquadratic", " with B")):
                    if key in dataset:
                        name = f"model error{words} at {cone:g}°"
                        error, spread = float(dataset[key].sel(cone=cone)), spread_of(dataset, key, cone=cone)
                        rows.append(Row(f"{name}, of {scale:.3g}", error, "meV/magnetic atom", spread, name))
        for k in range(dataset.sizes.get("fitted_shell", 0)):
            for key, label in (("biquadratic", "B"), ("bilinear", "J beside B")):
                spread = None if f"{key}_std" not in dataset else float(dataset[f"{key}_std"][k])
                value, name = float(dataset[key][k]), f"{label} {_shell_key(dataset, k)}"
                rows.append(Row(f"{label} {_shell_name(dataset, k)}", value, "meV", spread, name))
        return rows

    def plot(self, dataset: xr.Dataset) -> "Figure":
        """Draw J and |D| against distance, and J(q)."""
        from .plot import plot_exchange

        return plot_exchange(dataset)


def _model_of(joined: Joined, fit: Fit, state: int) -> "SpinModel":
    """Return a fitted model in the cell of one of its states."""
    pairs, rows = joined.pairs_of(state)
    reference = joined.measured[state].reference
    return SpinModel(reference.cell, reference.sites, pairs, fit.tensor[rows], fit.onsite[joined.sites[state]])


def _per_strength(
    joined: Joined, alone: Fit, beside: Fit, state: int, group: NDArray[np.int64]
) -> Callable[[Array, Supercell], Array]:
    """Return the change of the energy of spins (S, M, 3) in the cell of a state per B of a group of pairs.

    Parameters
    ----------
    joined : the states.
    alone, beside : bilinear parts with B = 0 and with B = 1 eV in the group, which differ in the group alone.
    state : by number.
    group : rows of the crystal's pairs.
    """
    pairs, rows = joined.pairs_of(state)
    inside = np.isin(rows, group)
    kept = Pairs(pairs.first[inside], pairs.second[inside], pairs.shift[inside], pairs.vector[inside])
    reference = joined.measured[state].reference
    tensor = (beside.tensor - alone.tensor)[rows[inside]]
    onsite = (beside.onsite - alone.onsite)[joined.sites[state]]
    model = SpinModel(reference.cell, reference.sites, kept, tensor, onsite)
    return lambda spins, box: model.energy(spins, box) + model.quadratic(spins, box)


def _random_states(
    rng: np.random.Generator,
    count: int,
    cone: float,
    unit: Array,
    moments: Array,
    box: Supercell,
    calculator: SpinCalculator,
) -> tuple[Array, Array]:
    """Return random spins (S, M, 3) within a cone around directions (M, 3), and their energies in eV, shape (S,).

    Lengths are those of the moments (N, 3) of the supercell.
    """
    cosines = rng.uniform(np.cos(np.deg2rad(cone)), 1.0, (count, len(unit)))
    turns = rng.uniform(0, 2 * np.pi, (count, len(unit)))
    sines = np.sqrt(1 - cosines**2)
    local = np.stack([sines * np.cos(turns), sines * np.sin(turns), cosines], axis=-1)
    frames = np.array([shortest_rotation(np.array([0.0, 0.0, 1.0]), e) for e in unit])
    spins = np.einsum("ixy,siy->six", frames, local)
    turned = np.tile(moments, (count, 1, 1))
    turned[:, box.magnetic] = spins * np.linalg.norm(moments[box.magnetic], axis=1)[None, :, None]
    found = [
        calculator.evaluate_spins(box.atoms, turned[begin : begin + CHUNK], magnetic_forces=False)["energy"]
        for begin in range(0, count, CHUNK)
    ]
    return spins, np.concatenate(found)


def _favours(zero: Array, units: Array) -> bool:
    """Say whether unit vectors (n, 3) are among the orders of the largest eigenvalue of J(0), up to their lengths."""
    values, vectors = np.linalg.eigh(zero)
    top = vectors[:, values > values[-1] - 1e-6 * max(np.abs(values).max(), 1e-300)]
    return bool(np.all(np.einsum("ix,ix->i", top @ (top.T @ units), units) > 0))


def _rows_of_states(dataset: xr.Dataset) -> list[Row]:
    """Return what several reference states say, each by itself."""
    rows = []
    for k, name in enumerate(dataset["state"].values if "state" in dataset else ()):
        for shell in range(min(2, dataset.sizes["shell"])):
            spread = None if "shell_J_state_std" not in dataset else float(dataset["shell_J_state_std"][k, shell])
            value = float(dataset["shell_J_state"][k, shell])
            label, key = (f"{name} alone: J {text(dataset, shell)}" for text in (_shell_name, _shell_key))
            rows.append(Row(label, value, "meV", spread, key))
        for key, label in (
            ("state_residual", "Hessian missed by the common J"),
            ("state_energy", "energy, moments as relaxed"),
            ("state_energy_model", "energy of the spin model"),
        ):
            spread = None if f"{key}_std" not in dataset else float(dataset[f"{key}_std"][k])
            if k or key == "state_residual":
                rows.append(Row(f"{name}: {label}", float(dataset[key][k]), dataset[key].attrs["units"], spread))
    for shell in range(min(2, dataset.sizes["shell"]) if rows else 0):
        label, key = (f"spread between states: J {text(dataset, shell)}" for text in (_shell_name, _shell_key))
        spread = None if "shell_J_spread_std" not in dataset else float(dataset["shell_J_spread_std"][shell])
        rows.append(Row(label, float(dataset["shell_J_spread"][shell]), "meV", spread, key))
    return rows


def _shell_name(dataset: xr.Dataset, k: int) -> str:
    """Return elements and distance of a shell, and whether its moments are parallel where some are not."""
    turn = _shell_turn(dataset, k)
    return f"{dataset['shell_pair'].values[k]}, {dataset['shell_distance'].values[k]:.3f} Å{turn}"


def _shell_key(dataset: xr.Dataset, k: int) -> str:
    """Return elements of a shell, whether its moments are parallel, and its number among such shells by distance."""
    kinds = [f"{pair}{_shell_turn(dataset, n)}" for n, pair in enumerate(dataset["shell_pair"].values[: k + 1])]
    return f"{kinds[k]}, shell {kinds.count(kinds[k])}"


def _shell_turn(dataset: xr.Dataset, k: int) -> str:
    """Return whether the moments of a shell are parallel, where some are not."""
    cosines = dataset["shell_cosine"].values
    if dataset.attrs["collinear"] == "no" or "state" in dataset or cosines.min() > 0:
        return ""
    return " parallel" if cosines[k] > 0 else " antiparallel"


@dataclass(frozen=True)
class Shell:
    """Symmetry-equivalent pairs: elements, distance in Å, number per atom of either end, mean J in eV, and which."""

    label: str
    distance: float
    count: tuple[int, int]
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
        """Return the matrices of isotropic J_ij(q) in eV at wave vectors (Q, 3), shape (Q, n, n)."""
        n = len(self.sites)
        spread = np.zeros((n * n, len(self.tensor)))
        spread[self.pairs.first * n + self.pairs.second, np.arange(len(self.tensor))] = (
            np.trace(self.tensor, axis1=1, axis2=2) / 3
        )
        parts = [spread @ self._phases(part) for part in np.array_split(q, len(q) // 4096 + 1)]
        return np.asarray(np.concatenate(parts, axis=1).T.reshape(-1, n, n))

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

    def quadratic(self, spins: Array, box: Supercell) -> Array:
        """Return -Σ (e_i·e_j)² over the pairs of unit spins (S, M, 3), shape (S,)."""
        result = np.zeros(len(spins))
        for p in range(len(self.tensor)):
            here, there = self._ends(box, p)
            result -= (np.einsum("smx,smx->sm", spins[:, here], spins[:, there]) ** 2).sum(axis=1)
        return result


def shells_of(model: SpinModel, pair_orbits: NDArray[np.int64], site_orbits: NDArray[np.int64]) -> list[Shell]:
    """Return the shells of symmetry-equivalent pairs in the order of their distances.

    Parameters
    ----------
    model : the spin model.
    pair_orbits, site_orbits : from `orbits`, shapes (P,) and (n,).
    """
    pairs, sites = model.pairs, model.sites
    names = [str(model.cell.symbols[site]) for site in sites]
    kinds = {name: {int(k) for other, k in zip(names, site_orbits, strict=True) if other == name} for name in names}
    labels = [
        name if len(kinds[name]) == 1 else f"{name}{sites[int(np.flatnonzero(site_orbits == orbit)[0])]}"
        for name, orbit in zip(names, site_orbits, strict=True)
    ]
    distance = np.linalg.norm(pairs.vector, axis=1)
    isotropic = np.trace(model.tensor, axis1=1, axis2=2) / 3
    found = []
    for orbit in np.unique(pair_orbits):
        group = np.flatnonzero(pair_orbits == orbit)
        ends = sorted({(labels[i], int(site_orbits[i])) for i in pairs.first[group]})
        counts = [
            int((site_orbits[pairs.first[group]] == kind).sum()) // int((site_orbits == kind).sum()) for _, kind in ends
        ]
        label = "-".join([ends[0][0], ends[-1][0]])
        found.append(
            Shell(
                label,
                float(distance[group].mean()),
                (counts[0], counts[-1]),
                float(isotropic[group].mean()),
                np.asarray(group, dtype=np.intp),
            )
        )
    return sorted(found, key=lambda s: (round(s.distance, 3), s.label, int(s.pairs[0])))
