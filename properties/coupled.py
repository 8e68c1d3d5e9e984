"""Coupled magnon-phonon bands: positions and moments in one eigenproblem, and the gaps where they mix."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from ase import Atoms
from numpy.typing import NDArray
from phonopy import Phonopy
from scipy import constants
from scipy.optimize import brentq, minimize_scalar

from .base import Options, Progress, Property, Row, derived, option, over_finite, spread_of, variable
from .bosons import Modes, normal_modes
from .conventions import G_FACTOR
from .errors import ConvergenceError, MomentError, OptionError
from .lattice import Lattice, ase_atoms, full_pairs, primitive_matrix, supercell_matrix, unit_index
from .magnon import rounding_of, settled
from .protocol import SMALLEST_MOMENT, ZERO_MOMENT, SpinCalculator, moments_of, with_moments
from .supercell import SAME_DISTANCE, Coverage, reach_of, transverse, unique_radius
from .symmetry import band_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

MEV_PER_THZ = constants.h * 1e15 / constants.e
"""ħω in meV of a frequency of one THz."""
SADDLE = 1e-9
SAME_ENERGY = 1e-4
"""Phonons closer than this, in meV, cross a magnon together."""
ALIKE = 2.0
"""Factor within which a gap is that of a phonon and a magnon themselves, not of others between them."""
VISIBLE = 1e-4
"""Gaps smaller than this, in meV, are crossings."""
LISTED = 6
HALVINGS = 6
BY_BRANCHES = ("segment", "phonon_branch", "magnon_branch")


@dataclass(frozen=True)
class CoupledOptions(Options):
    """Options of the coupled bands.

    Parameters
    ----------
    dim : the supercell, three repeats or the nine integers of a matrix; none makes it as large as `length` says.
    length : least height of the supercell in Å where dim is not given.
    max_atoms : largest supercell.
    path : special points of the bands.
    points : wave vectors along the path.
    """

    dim: tuple[int, ...] = option((), "supercell, three repeats or nine integers (default: from length)")
    length: float = option(10.0, "least height of the supercell in Å where dim is not given")
    max_atoms: int = option(1000, "largest supercell, in atoms")
    path: str = option("auto", "special points of the bands; auto is that of seekpath")
    points: int = option(201, "wave vectors along the path")

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for name, low, high in (("length", 1.0, 200.0), ("max_atoms", 1, 100000), ("points", 2, 20000)):
            if not low <= getattr(self, name) <= high:
                raise OptionError(f"{name} cannot be {getattr(self, name):g}; it lies between {low:g} and {high:g}")


class SpinLattice:
    """The quadratic form of displacements and tilts of a crystal, and its modes.

    Coordinates of a Bloch wave are z = (s⁻¹u, p, tilts): u displacements, s = ħ/√(Mε) with a fixed energy ε, p the
    conjugate of s⁻¹u, and the tilts of every moment along `transverse` of it. The form is in eV; lengths of moments
    that follow are eliminated in the supercell, so that the phonons are those of force constants with magnitudes that
    follow.

    Parameters
    ----------
    phonon : phonopy's object, for cells and nearest images.
    moments : the stationary reference in the primitive cell, µB, shape (n, 3).
    calculator : a single model.
    follow : whether lengths of moments follow at once.
    """

    def __init__(self, phonon: Phonopy, moments: Array, calculator: SpinCalculator, follow: bool) -> None:
        primitive = phonon.primitive
        home = [int(k) for k in primitive.p2s_map]
        index = {k: place for place, k in enumerate(home)}
        self.partner = np.array([index[int(k)] for k in primitive.s2p_map])
        lengths = np.linalg.norm(moments, axis=1)
        self.sites = np.flatnonzero(lengths >= SMALLEST_MOMENT)
        self.lengths, self.count = lengths[self.sites], len(home)
        units = moments[self.sites] / self.lengths[:, None]
        self.zero = rounding_of(calculator)
        self._images(phonon)

        image = with_moments(ase_atoms(phonon.supercell), moments[self.partner])
        blocks = calculator.hessian(image, ("rr", "rm", "mm"), home)
        field = calculator.evaluate_spins(image, moments[self.partner][None])["magnetic_forces"][0][home]
        self.inward = self.lengths * np.einsum("ix,ix->i", field[self.sites], units)
        # ħω = √eigenvalue for a frequency in phonopy's own unit
        quantum = MEV_PER_THZ * 1e-3 * phonon.unit_conversion_factor / np.sqrt(np.asarray(primitive.masses))
        onsite = np.array([np.trace(blocks["rr"][i, :, home[i]]) / 3 for i in range(self.count)])
        self.scale = float(np.sqrt(np.mean(np.abs(onsite) * quantum**2)))
        self.steps = np.repeat(quantum / np.sqrt(self.scale), 3)

        across = np.array([transverse(e) for e in units]) * self.lengths[:, None, None]
        turned = np.zeros((self.count, 3, 3))
        turned[self.sites] = np.concatenate([across, units[:, None]], axis=1)
        everywhere = turned[self.partner]
        rm: Array = np.einsum("iajx,jbx->iajb", blocks["rm"], everywhere)
        mm: Array = np.einsum("iax,ixjy,jby->iajb", turned, blocks["mm"], everywhere)
        parts = self._follow(phonon, blocks["rr"], rm, mm) if follow else (blocks["rr"], rm, mm)
        self.couplings = [self._couplings(part) for part in parts]
        self.coverage = self._coverage(phonon, parts[2], calculator, moments)
        self.spin_scale = float(np.abs(self.inward).max() + np.abs(parts[2][self.sites][:, :2]).max())

    def _coverage(self, phonon: Phonopy, mm: Array, calculator: SpinCalculator, moments: Array) -> Coverage:
        """Return what the supercell holds of the couplings between tilts, J = -H/2."""
        radius = unique_radius(np.asarray(phonon.supercell.cell))
        apart = np.linalg.norm(self.between @ np.asarray(phonon.primitive.cell), axis=1)
        sizes = np.linalg.norm(mm[:, :2, :, :2].transpose(0, 2, 1, 3), ord=2, axis=(2, 3))[self.first, self.second] / 2
        beyond = apart >= radius - SAME_DISTANCE
        sums = np.bincount(self.first, sizes * self.weight * beyond, minlength=self.count)
        reach = reach_of(calculator, moments)
        return Coverage(reach, None if reach is None else radius > reach, np.nan, float(sums.max()))

    def _follow(self, phonon: Phonopy, rr: Array, rm: Array, mm: Array) -> tuple[Array, Array, Array]:
        """Eliminate the lengths of all moments of the supercell, the third of their coordinates.

        Raises
        ------
        ConvergenceError : they are at a saddle point, so that they do not follow.
        """
        carrying = np.flatnonzero(np.isin(self.partner, self.sites))
        coupling, moments = full_pairs(phonon, rm)[:, :, carrying, 2], full_pairs(phonon, mm)[:, :, carrying, 2]
        inner = moments[carrying, 2]
        lowest = float(np.linalg.eigvalsh((inner + inner.T) / 2)[0])
        if lowest <= SADDLE * float(np.abs(inner).max()):
            raise ConvergenceError(
                f"the lengths of the moments sit at a saddle point (lowest curvature {lowest:.3e} eV/µB²), so they "
                "cannot follow; start from another magnetic order, or keep them fixed"
            )
        response = np.linalg.inv(inner)
        u, m = rm[:, :, carrying, 2] @ response, mm[:, :, carrying, 2] @ response
        return (
            rr - np.einsum("iaf,jbf->iajb", u, coupling),
            rm - np.einsum("iaf,jbf->iajb", u, moments),
            mm - np.einsum("iaf,jbf->iajb", m, moments),
        )

    def _images(self, phonon: Phonopy) -> None:
        """List every pair of a primitive atom with an atom of the supercell in all its nearest images."""
        vectors, multiplicity = phonon.primitive.get_smallest_vectors()
        first, second, between, weight = [], [], [], []
        for k in range(len(phonon.supercell)):
            for i in range(self.count):
                number, start = (int(x) for x in multiplicity[k, i])
                first += [i] * number
                second += [k] * number
                between.append(vectors[start : start + number])
                weight += [1 / number] * number
        self.first, self.second = np.array(first), np.array(second)
        self.between, self.weight = np.concatenate(between), np.array(weight)
        pair = self.first * self.count + self.partner[self.second]
        self.groups = [np.flatnonzero(pair == k) for k in range(self.count**2)]

    def _couplings(self, block: Array) -> list[Array]:
        """Return a block (n, 3, N, 3) by pairs of primitive atoms, each shape (images, 9)."""
        values = block[self.first, :, self.second] * self.weight[:, None, None]
        return [values[group].reshape(-1, 9) for group in self.groups]

    def blocks(self, q: Array) -> tuple[Complex, Complex, Complex]:
        """Return H_uu (eV/Å²), H_ut (eV/Å) and H_tt (eV) at wave vectors (Q, 3)."""
        n = self.count
        phases = [np.exp(2j * np.pi * q @ self.between[group].T) for group in self.groups]
        uu, um, mm = (
            np.array([p @ values for p, values in zip(phases, couplings, strict=True)])
            .reshape(n, n, len(q), 3, 3)
            .transpose(2, 0, 3, 1, 4)
            .reshape(len(q), 3 * n, 3 * n)
            for couplings in self.couplings
        )
        tilts = (3 * self.sites[:, None] + np.arange(2)).ravel()
        tt = mm[:, tilts][:, :, tilts] + np.kron(np.diag(self.inward), np.eye(2))
        return _hermitian(uu), um[:, :, tilts], _hermitian(tt)

    @property
    def bracket(self) -> Array:
        """Brackets of (s⁻¹u, p, tilts), shape (6n + 2S, 6n + 2S)."""
        size = 3 * self.count
        result = np.zeros((2 * size + 2 * len(self.sites),) * 2)
        result[:size, size : 2 * size] = np.eye(size)
        result[size : 2 * size, :size] = -np.eye(size)
        result[2 * size :, 2 * size :] = self.spin_bracket
        return result

    @property
    def spin_bracket(self) -> Array:
        """Brackets of the tilts, ħż = Γ ∂H/∂z with g = 2, shape (2S, 2S)."""
        return np.kron(np.diag(G_FACTOR / self.lengths), np.array([[0.0, -1.0], [1.0, 0.0]]))

    def form(self, q: Array) -> Complex:
        """Return the form in eV at wave vectors (Q, 3), shape (Q, 6n + 2S, 6n + 2S)."""
        uu, ut, tt = self.blocks(q)
        size = 3 * self.count
        result = np.zeros((len(q), *self.bracket.shape), dtype=complex)
        result[:, :size, :size] = uu * self.steps[:, None] * self.steps
        result[:, size : 2 * size, size : 2 * size] = self.scale * np.eye(size)
        result[:, :size, 2 * size :] = ut * self.steps[:, None]
        result[:, 2 * size :, :size] = result[:, :size, 2 * size :].conj().swapaxes(1, 2)
        result[:, 2 * size :, 2 * size :] = tt
        return result

    def modes(self, q: Array, coupled: bool = True) -> Modes:
        """Return modes at wave vectors (Q, 3), energies in eV, with what couples displacements and tilts or without."""
        form = self.form(q)
        if not coupled:
            tilts = 6 * self.count
            form[:, :tilts, tilts:] = 0.0
            form[:, tilts:, :tilts] = 0.0
        return normal_modes(form, self.bracket, self.zero)

    def magnon_fraction(self, modes: Modes) -> Array:
        """Return the part of each mode's energy in the tilts, shape (Q, 3n + S); of zero modes that of |z|²."""
        start = 6 * self.count
        metric = np.linalg.inv(1j * self.spin_bracket)
        spins = modes.vectors[:, start:]
        norms = np.einsum("qak,ab,qbk->qk", spins.conj(), metric, spins).real
        everything = np.linalg.inv(1j * self.bracket)
        total = np.einsum("qak,ab,qbk->qk", modes.vectors.conj(), everything, modes.vectors).real
        squares = (np.abs(spins) ** 2).sum(axis=1) / (np.abs(modes.vectors) ** 2).sum(axis=1)
        return np.where(np.abs(total - 1) < 1e-6, norms, squares)

    def uncoupled(self, q: Array) -> tuple[Array, Array]:
        """Return energies of phonons (Q, 3n) and magnons (Q, S) without what couples them, eV."""
        uu, _, tt = self.blocks(q)
        squares = np.linalg.eigvalsh(uu * (self.steps[:, None] * self.steps) * self.scale)
        phonons = np.sign(squares) * np.sqrt(np.abs(squares))
        magnons = normal_modes(tt, self.spin_bracket, self.zero, self.spin_scale).energies
        return phonons, magnons


def _hermitian(matrices: Complex) -> Complex:
    return np.asarray((matrices + matrices.conj().swapaxes(1, 2)) / 2)


@dataclass(frozen=True)
class Crossing:
    """Where a magnon and a phonon would cross: wave vector, energy without coupling, and gap, both in meV."""

    q: Array
    energy: float
    gap: float


class Coupled(Property):
    """Magnons and phonons from the rr, rm and mm blocks of the Hessian in one eigenproblem."""

    name = "coupled"
    title = "coupled magnon-phonon bands"
    options_type: ClassVar[type[Options]] = CoupledOptions

    def __init__(self, options: Options | None = None, lattice: Lattice | None = None, **named: Any) -> None:
        super().__init__(options, **named)
        self._lattice = lattice

    def check(self, atoms: Atoms, calculator: SpinCalculator) -> None:
        """Refuse structures without moments."""
        super().check(atoms, calculator)
        if np.linalg.norm(moments_of(atoms), axis=1).max() <= ZERO_MOMENT:
            raise MomentError("no atom carries a moment, so there are no magnons; give moments in µB")

    def prepare(self, atoms: Atoms, members: Sequence[SpinCalculator], progress: Progress) -> "Coupled":
        """Fix the cells."""
        symprec = self.options.symprec
        matrix = supercell_matrix(atoms, self.options.dim, self.options.length, self.options.max_atoms)
        primitive = primitive_matrix(atoms, [moments_of(atoms)], symprec, self.options.mag_symprec)
        soc = members[0].soc is not False
        lattice = Lattice(atoms, matrix, primitive, symprec, mag_symprec=self.options.mag_symprec).compact(
            [moments_of(atoms)], soc
        )
        return Coupled(self.options, lattice)

    def compute(self, atoms: Atoms, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Compute bands, characters and gaps with one model."""
        if self._lattice is None:
            raise OptionError("the cells are missing; call run, which makes them")
        mode = self.mode(calculator)
        soc = calculator.soc is not False
        phonon = self._lattice.phonon(moments_of(atoms), soc)
        cell = ase_atoms(phonon.primitive)
        start = moments_of(atoms)[unit_index(phonon)][phonon.primitive.p2s_map]
        relaxed = calculator.relax_moments([with_moments(cell, start)], mode)[0]
        sites = np.flatnonzero(np.linalg.norm(relaxed, axis=1) >= SMALLEST_MOMENT)
        if not len(sites):
            raise MomentError("the moments vanish when they are relaxed, so there are no magnons; start elsewhere")
        moments, torque = settled(cell, sites, relaxed, calculator)
        progress("Hessian", 0, 1)
        crystal = SpinLattice(phonon, moments, calculator, mode != "fixed")
        progress("Hessian", 1, 1)
        q, position, labels = band_path(cell, self.options.path, self.options.points, self.options.symprec)
        modes = crystal.modes(q)
        phonons, magnons = crystal.uncoupled(q)
        crossings = find_crossings(crystal, q, position, labels)
        names = [f"{a}-{b}" for a, b in _segments(labels)]
        milli = 1e3
        data: dict[str, Any] = {
            "energy": variable(("wave", "branch"), modes.energies * milli, "meV", "energy of the coupled mode"),
            "frequency": variable(
                ("wave", "branch"), modes.energies * milli / MEV_PER_THZ, "THz", "frequency of the coupled mode"
            ),
            "growth": variable(
                ("wave", "branch"), modes.growth * milli, "meV", "imaginary part of the energy, growing modes"
            ),
            "magnon_fraction": variable(
                ("wave", "branch"), crystal.magnon_fraction(modes), "1", "part of the mode's energy in the moments"
            ),
            "phonon_energy": variable(("wave", "phonon_branch"), phonons * milli, "meV", "phonon without coupling"),
            "phonon_frequency": variable(
                ("wave", "phonon_branch"), phonons * milli / MEV_PER_THZ, "THz", "phonon without coupling"
            ),
            "magnon_energy": variable(("wave", "magnon_branch"), magnons * milli, "meV", "magnon without coupling"),
            "instability": variable(
                (),
                0.0 if modes.stable.all() else float(modes.lowest.min()) * milli,
                "meV",
                "lowest eigenvalue of the quadratic form on the path where it is negative, else 0",
            ),
            "moments": variable(("site", "xyz"), moments, "µB", "moment of the reference"),
            "folded": variable(
                (),
                crystal.coverage.folded * milli,
                "meV",
                "Σ |J| of a site at images that are not unique in the supercell, the largest over sites",
            ),
            "torque": variable((), torque, "eV", "largest torque on a moment of the reference as relaxed or given"),
            "gap": variable(
                BY_BRANCHES, crossings["gap"], "meV", "gap where phonon and magnon would cross, NaN if not"
            ),
            "gap_energy": variable(BY_BRANCHES, crossings["energy"], "meV", "energy where they would cross"),
            "gap_q": variable(
                (*BY_BRANCHES, "xyz"),
                crossings["q"],
                "1",
                "wave vector where they would cross, reciprocal lattice units",
            ),
        }
        coords: dict[str, Any] = {
            "q": variable(("wave", "xyz"), q, "1", "wave vector in the reciprocal lattice of the primitive cell"),
            "position": variable("wave", position, "1/Å", "place along the path"),
            "segment": variable("segment", np.array(names), "1", "part of the path between special points"),
            "branch": variable("branch", np.arange(modes.energies.shape[1]), "1", "branch, the lowest first"),
            "phonon_branch": variable("phonon_branch", np.arange(phonons.shape[1]), "1", "phonon, the lowest first"),
            "magnon_branch": variable("magnon_branch", np.arange(magnons.shape[1]), "1", "magnon, the lowest first"),
            "site": variable("site", np.arange(len(cell)), "1", "atom of the primitive cell"),
            "element": variable("site", np.array(cell.get_chemical_symbols()), "1", "chemical symbol"),
            "xyz": variable("xyz", np.array(["x", "y", "z"]), "1", "Cartesian axis, or reciprocal lattice vector"),
        }
        attrs: dict[str, Any] = {
            "lengths_follow": int(mode != "fixed"),
            "supercell_matrix": self._lattice.supercell_matrix.tolist(),
            "supercell_atoms": len(phonon.supercell),
            "primitive_cell": cell.cell[:].tolist(),
            "path_labels": [list(x) for x in labels],
            **crystal.coverage.attributes,
        }
        return xr.Dataset(data, coords, attrs)

    def finish(self, dataset: xr.Dataset, calculator: SpinCalculator) -> xr.Dataset:
        """Average each gap over the members that have it, and say where the reference state is not stable."""
        count = dataset.sizes.get("member", 1)
        tail = "_member" if "member" in dataset.coords else ""
        if tail:
            for name in ("gap", "gap_energy", "gap_q"):
                item = dataset[name]
                mean, spread, _ = over_finite(dataset[f"{name}_member"].values)
                dataset[name] = xr.Variable(item.dims, mean, item.attrs)
                dataset[f"{name}_std"] = xr.Variable(item.dims, spread, dataset[f"{name}_std"].attrs)
        gaps = dataset[f"gap{tail}"].values.reshape(count, *dataset["gap"].shape)
        dataset["gap_members"] = variable(
            BY_BRANCHES, np.isfinite(gaps).sum(axis=0), "1", "models in which they would cross"
        )
        unstable = int((dataset[f"instability{tail}"].values < 0).sum())
        if unstable:
            where = f" in {unstable} of the committee's {count} members" if tail else ""
            dataset.attrs["note"] = (
                f"the reference state is not stable{where}: some displacements or tilts lower its energy, so energies "
                "may be negative or complex; growth holds the imaginary part"
            )
        return dataset

    def summary(self, dataset: xr.Dataset) -> list[Row]:
        """Return extremes and the largest gaps as a short table."""
        rows = [
            Row("supercell", f"{dataset.attrs['supercell_atoms']} atoms"),
            Row("larger than twice the reach", str(dataset.attrs["supercell_beyond_twice_the_reach"])),
            Row("Σ |J| of a site beyond the supercell", float(dataset["folded"]), "meV", spread_of(dataset, "folded")),
            Row("lengths of moments", "follow at once" if dataset.attrs["lengths_follow"] else "held"),
        ]
        for name, label in (("phonon_energy", "phonon"), ("magnon_energy", "magnon")):
            values = dataset[name].values
            place = np.unravel_index(int(values.argmax()), values.shape)
            spread = None if f"{name}_std" not in dataset else float(dataset[f"{name}_std"].values[place])
            rows.append(Row(f"highest {label} without coupling", float(values[place]), "meV", spread))
        if float(dataset["instability"]) < 0:
            growth, spread = derived(dataset, lambda d: float(d["growth"].max()))
            rows.append(Row("not stable, fastest growth on the path", growth, "meV", spread))
        shift, spread = derived(dataset, _largest_shift)
        rows.append(Row("largest change by coupling", shift, "meV", spread))
        gaps, members, count = dataset["gap"].values, dataset["gap_members"].values, dataset.sizes.get("member", 1)
        order = np.argsort(-np.where(np.isfinite(gaps), gaps, -1.0), axis=None)
        met = int(np.isfinite(gaps).sum())
        some = int(((members > 0) & (members < count)).sum())
        rows.append(Row("crossings on the path", f"{met}, {some} of them not in every member" if some else str(met)))
        found: dict[str, Row] = {}
        for flat in order[:met]:
            place = np.unravel_index(int(flat), gaps.shape)
            if gaps[place] <= VISIBLE or len(found) == LISTED:
                break
            q = ", ".join(f"{x:.3f}" for x in dataset["gap_q"].values[place])
            energy = float(dataset["gap_energy"].values[place])
            spread = None if members[place] < 2 else float(dataset["gap_std"].values[place])
            ends = str(dataset["segment"].values[place[0]]).split("-")
            segment = "-".join("Γ" if end == "G" else end for end in ends)
            label = f"gap on {segment} at q = ({q}), {energy:.2f} meV"
            label += "" if members[place] == count else f", in {members[place]} of {count} members"
            found.setdefault(label, Row(label, float(gaps[place]), "meV", spread, f"gap {len(found) + 1}"))
        return [*rows, *found.values()]

    def plot(self, dataset: xr.Dataset) -> "Figure":
        """Draw the bands, coloured by character."""
        from .plot import plot_coupled

        return plot_coupled(dataset)


def _largest_shift(dataset: xr.Dataset) -> float:
    """Return the largest difference between the sorted energies with and without coupling, meV."""
    phonons = np.maximum(dataset["phonon_energy"].values, 0.0)
    apart = np.concatenate([phonons, dataset["magnon_energy"].values], axis=1)
    return float(np.abs(np.sort(dataset["energy"].values, axis=1) - np.sort(apart, axis=1)).max())


def _segments(labels: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """Return the pairs of special points that the path runs between."""
    return [(a, b) for (a, x), (b, y) in itertools.pairwise(labels) if y > x]


def find_crossings(
    crystal: SpinLattice, q: Array, position: Array, labels: list[tuple[str, float]]
) -> dict[str, Array]:
    """Find where uncoupled magnons and phonons cross between special points, and the gap that coupling opens there.

    Parameters
    ----------
    crystal : the quadratic form.
    q : wave vectors of the path, shape (Q, 3).
    position : their places, shape (Q,).
    labels : special points with their places.

    Returns
    -------
    ``gap`` and ``energy`` in meV, shape (segments, phonons, magnons), NaN where there is no crossing, and of several
    the one with the largest gap; ``q`` of the same shape with three components.
    """
    ends = [(x, y) for (_, x), (_, y) in itertools.pairwise(labels) if y > x]
    shape = len(ends), 3 * crystal.count, len(crystal.sites)
    gap, energy, place = np.full(shape, np.nan), np.full(shape, np.nan), np.full((*shape, 3), np.nan)
    for number, (low, high) in enumerate(ends):
        # the end of a part of the path may share its place with the start of the next
        after, last = np.searchsorted(position, [low + 1e-9, high - 1e-9])
        waves = _refined(q[after - 1 : last + 1])
        phonons, magnons = crystal.uncoupled(waves)
        for b, c in np.ndindex(*shape[1:]):
            difference = phonons[:, b] - magnons[:, c]
            apart = np.flatnonzero(np.abs(difference) > SAME_ENERGY * 1e-3)
            for start, end in itertools.pairwise(apart):
                if difference[start] * difference[end] > 0:
                    continue
                found = _crossing(crystal, waves[start], waves[end], b, c)
                if not found.gap <= gap[number, b, c]:
                    gap[number, b, c], energy[number, b, c], place[number, b, c] = found.gap, found.energy, found.q
    return {"gap": gap, "energy": energy, "q": place}


def _refined(q: Array) -> Array:
    """Add wave vectors ever closer to both ends of a line, where magnons and sound meet at small energies."""
    if len(q) < 2:
        return q
    parts = (0.5 ** np.arange(HALVINGS, 0, -1))[:, None]
    first, last = q[0] + parts * (q[1] - q[0]), q[-1] + parts[::-1] * (q[-2] - q[-1])
    middle = q[1:-1]
    return np.concatenate([q[:1], first, middle, last, q[-1:]]) if len(q) > 2 else np.concatenate([q[:1], first, q[1:]])


def _crossing(crystal: SpinLattice, start: Array, end: Array, branch: int, magnon: int) -> Crossing:
    """Return the crossing of a phonon and a magnon between two wave vectors, and the gap that their coupling opens.

    Phonons of the same energy cross together. The gap is the least distance of the outermost of the modes that are the
    most like them: other phonons may lie inside it. Where those modes are others' hybrids, it is what the coupling of
    phonon and magnon alone splits them by.
    """

    def at(x: float) -> Array:
        return (start + x * (end - start))[None]

    def difference(x: float) -> float:
        phonons, magnons = crystal.uncoupled(at(x))
        return float(phonons[0, branch] - magnons[0, magnon])

    x = float(brentq(difference, 0.0, 1.0, xtol=1e-12))
    level = float(crystal.uncoupled(at(x))[1][0, magnon])
    apart = crystal.modes(at(x), coupled=False)
    crossing = apart.vectors[0][:, np.abs(apart.energies[0] - level) <= SAME_ENERGY * 1e-3]
    dual = np.linalg.inv(1j * crystal.bracket) @ crossing

    def distance(shift: float) -> float:
        modes = crystal.modes(at(x + shift))
        likeness = (np.abs(dual.conj().T @ modes.vectors[0]) ** 2).sum(axis=0)
        energies = modes.energies[0][np.argsort(-likeness)[: crossing.shape[1]]]
        return float(energies.max() - energies.min())

    alone = np.linalg.eigvalsh(crossing.conj().T @ crystal.form(at(x))[0] @ crossing)
    first_order = float(alone[-1] - alone[0])
    found = minimize_scalar(distance, bounds=(-1.0, 1.0), method="bounded", options={"xatol": 1e-9})
    gap = min(float(found.fun), distance(0.0))
    own = first_order / ALIKE <= gap <= first_order * ALIKE
    return Crossing(at(x)[0], level * 1e3, (gap if own else first_order) * 1e3)
