"""The potential as an ASE calculator, with the derivatives that magnetic properties need."""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import ase
import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from . import __version__
from .blocks import Geometry
from .derivatives import evaluate, evaluate_spins, hessian, relaxed_response
from .errors import ConvergenceError, MMACEError, MomentError, MomentRangeWarning, StructureError
from .graph import Graph
from .io import file_hash, load_model, model_files, weights_hash
from .model import MagneticMACE
from .moments import MODES, relax_moments
from .structures import check_moments, moments_of

DTYPES = {"float64": torch.float64, "float32": torch.float32}
RELAX_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # eV/µB
STRUCTURES_AT_ONCE = 32
SPIRALS_AT_ONCE = 32
IN_MEMORY = "in memory"
NEGLIGIBLE = 1e-3  # µB
GUESS = 0.5  # starting moment over M_z where a caller has none

ArrayLike = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class _CachedGeometry:
    key: tuple[bytes, ...]
    geometries: list[Geometry]


class MMACECalculator(Calculator):
    """ASE calculator of a committee of magnetic potentials; a single model is a committee of one.

    Moments are read from the structure's own `initial_magmoms`, (N,) along z or (N, 3), in µB, and the caller's Atoms
    are never changed. Results: `energy`, `free_energy` (eV), `energies` (N,), `forces` (N, 3), `stress` (6,), `magmoms`
    (N, 3) in µB as used or relaxed, `magnetic_forces` (N, 3) = -dE/dm in eV/µB; for committees of two or more also the
    standard deviations `energy_std`, `forces_std`, `magnetic_forces_std` over the members.

    Parameters
    ----------
    model : str, path, MagneticMACE or sequence of MagneticMACE
        A shipped name, a .safetensors file, a .json list of members, or models at hand.
    device : str
        "cpu", "cuda" or "cuda:N".
    dtype : str
        "float64" or "float32".
    soc : bool
        Spin-orbit coupling.
    moments : str
        "fixed": as given; "magnitudes": relaxed along the axes given; "full": relaxed.
    committee : bool
        False: use the first member only.
    tolerance : float, optional
        Of moment relaxation, eV/µB.

    Raises
    ------
    ModelFileError
        The model cannot be read.
    MMACEError
        An unknown option, a device that this machine does not have, or spin-orbit coupling asked of a model without it.
    """

    implemented_properties: ClassVar[list[str]] = [
        "energy",
        "free_energy",
        "energies",
        "forces",
        "stress",
        "magmoms",
        "magnetic_forces",
    ]
    ignored_changes: ClassVar[set[str]] = {"initial_charges"}

    def __init__(
        self,
        model: str | os.PathLike[str] | MagneticMACE | Sequence[MagneticMACE] = "default",
        device: str = "cpu",
        dtype: str = "float64",
        soc: bool = True,
        moments: str = "fixed",
        committee: bool = True,
        tolerance: float | None = None,
    ) -> None:
        super().__init__()
        _check_options(device, dtype, moments)
        self._hashes: list[str] = []
        if isinstance(model, MagneticMACE):
            self.models, self._name = [model], IN_MEMORY
        elif isinstance(model, str | os.PathLike):
            files = model_files(model)[: None if committee else 1]
            self.models = [load_model(path) for path in files]
            self._name = str(model) if not os.path.exists(model) else os.path.basename(model)
            self._hashes = [file_hash(path) for path in files]
        else:
            self.models, self._name = list(model)[: None if committee else 1], IN_MEMORY
        if not self.models:
            raise MMACEError("the committee has no members: give at least one model.")
        first = self.models[0].config
        if any((m.config.elements, m.config.cutoff) != (first.elements, first.cutoff) for m in self.models):
            raise MMACEError("the members of the committee differ in elements or cut-off: use models of one kind.")
        if soc and not all(m.config.has_spin_orbit for m in self.models):
            raise MMACEError("the model was trained without spin-orbit coupling: use soc=False, or another model.")
        self.models = [_placed(m, device, DTYPES[dtype]) for m in self.models]
        self.device, self.dtype = device, dtype
        if not isinstance(soc, bool | np.bool_):
            raise MMACEError(f"soc is {soc!r}: give True with or False without spin-orbit coupling.")
        if tolerance is not None and not 0.0 < tolerance < np.inf:
            raise MMACEError(f"the tolerance is {tolerance}: give magnetic forces above 0 in eV/µB.")
        self._soc, self._moments = bool(soc), moments
        self.tolerance = RELAX_TOLERANCE[DTYPES[dtype]] if tolerance is None else tolerance
        self._cached: _CachedGeometry | None = None

    @property
    def soc(self) -> bool:
        """Whether spin-orbit coupling is on; `replace` gives a calculator with another choice."""
        return self._soc

    @property
    def moments(self) -> str:
        """What moments do: "fixed", "magnitudes" or "full"; `replace` gives a calculator with another choice."""
        return self._moments

    def set(self, **options: Any) -> dict[str, Any]:
        """Refuse ASE's way to change options of a calculator: results and geometries that are kept belong to them.

        Raises
        ------
        MMACEError
            Always, unless there is nothing to change.
        """
        if options:
            raise MMACEError(
                f"{next(iter(options))} cannot be set on this calculator: take calculator.replace(soc=…, moments=…), "
                "or make another one."
            )
        return {}

    @property
    def elements(self) -> tuple[str, ...]:
        """Elements the model knows."""
        return self.models[0].config.elements

    @property
    def cutoff(self) -> float:
        """Radius of one layer's neighbour sphere, Å."""
        return self.models[0].config.cutoff

    @property
    def reach(self) -> float:
        """Distance up to which two atoms can interact, Å: each layer passes messages over the cut-off."""
        return 2 * self.models[0].config.num_layers * self.cutoff

    @property
    def tilt_reach(self) -> float:
        """Distance up to which tilts of collinear moments can couple, Å.

        Without spin-orbit coupling the energy is a function of the products of moments that send messages to one atom.
        Tilts change each product in second order alone, so further layers carry them no farther.
        """
        return self.reach if self.soc else 2 * self.cutoff

    @property
    def default_moments(self) -> dict[str, float]:
        """A moment to start from for each element, µB; 0 for elements that carry none."""
        config = self.models[0].config
        return {z: GUESS * config.moment_scale[z] if z in config.carriers else 0.0 for z in config.elements}

    @property
    def members(self) -> list[MMACECalculator]:
        """One calculator for each member of the committee, with the same options."""
        return [self._with(slice(k, k + 1)) for k in range(len(self.models))]

    def replace(self, **options: Any) -> MMACECalculator:
        """A calculator on the same weights with other `soc` or `moments`.

        Raises
        ------
        MMACEError
            An option that cannot be replaced, or an unknown moment mode.
        """
        unknown = sorted(set(options) - {"soc", "moments"})
        if unknown:
            raise MMACEError(f"{unknown[0]} cannot be replaced on a calculator: only soc and moments can.")
        return self._with(**options)

    def provenance(self) -> dict[str, str | float | int]:
        """What identifies this calculator in a dataset."""
        return {
            "name": self._name,
            "hash": self._hash(),
            "members": len(self.models),
            "elements": " ".join(self.elements),
            "cutoff": self.cutoff,
            "dtype": self.dtype,
            "soc": int(self.soc),
            "moments": self.moments,
            "moment_tolerance": self.tolerance,
            "mmace_version": __version__,
            "torch_version": torch.__version__,
            "ase_version": ase.__version__,
        }

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill `results`; called by ASE.

        Raises
        ------
        MomentError, UnknownElementError, StructureError
            The structure cannot be evaluated.
        ConvergenceError
            Moments were to be relaxed and did not converge.
        """
        super().calculate(atoms, list(properties), list(system_changes))
        periodic = bool(self.atoms.pbc.all())
        if "stress" in properties and not periodic:
            raise StructureError("stress needs a structure that is periodic in all three directions: set pbc and cell.")
        graph = self._graph(self.atoms)
        if self.moments != "fixed":
            graph = graph.with_moments(self._relaxed(graph, self.moments))
        slopes = bool(set(properties) & {"forces", "stress", "magnetic_forces"})
        found = [
            evaluate(model, graph, forces=slopes, stress=slopes and periodic, magnetic_forces=slopes)
            for model in self.models
        ]
        parts: dict[str, list[torch.Tensor | None]] = {
            "energy": [e.energy[0] for e in found],
            "energies": [e.site_energies for e in found],
            "forces": [e.forces for e in found],
            "stress": [None if e.stress is None else e.stress[0] for e in found],
            "magnetic_forces": [e.magnetic_forces for e in found],
        }
        stacked = {
            name: torch.stack([value for value in values if value is not None])
            for name, values in parts.items()
            if values[0] is not None
        }
        results = {name: values.mean(0) for name, values in stacked.items()}
        if len(found) > 1:
            for name in ("energy", "forces", "magnetic_forces"):
                if name in stacked:
                    results[f"{name}_std"] = stacked[name].std(0)
        self.results = {name: _to_numpy(value) for name, value in results.items()}
        self.results["free_energy"] = self.results["energy"]
        self.results["magmoms"] = _to_numpy(graph.moments)

    def evaluate_spins(self, atoms: Atoms, moments: ArrayLike, magnetic_forces: bool = True) -> dict[str, np.ndarray]:
        """Many spin configurations on one geometry, at the cost of one geometry.

        Parameters
        ----------
        atoms : Atoms
            Structure; its own moments are not used.
        moments : array (B, N, 3)
            µB; taken as they are, whatever the calculator's `moments` option.
        magnetic_forces : bool
            Compute -dE/dm too.

        Returns
        -------
        dict
            `energy` (B,) eV, `energies` (B, N) eV, `magnetic_forces` (B, N, 3) eV/µB.

        Raises
        ------
        MomentError
            Wrong shape or numbers that are not finite.
        """
        batch = self._spin_batch(atoms, moments)
        geometries = self._geometries(atoms)
        found = [
            evaluate_spins(model, geometry, batch, magnetic_forces)
            for model, geometry in zip(self.models, geometries, strict=True)
        ]
        return _spin_results(found)

    def evaluate_spirals(
        self,
        atoms: Atoms,
        q: ArrayLike,
        axis: ArrayLike = (0.0, 0.0, 1.0),
        moments: ArrayLike | None = None,
        magnetic_forces: bool = True,
    ) -> dict[str, np.ndarray]:
        """Spin spirals in this cell by the generalised Bloch theorem.

        The moment of an atom in the cell at lattice vector S is the one given here, turned about `axis` by 2π q·S.

        Parameters
        ----------
        atoms : Atoms
            Structure with the moments of the home cell.
        q : array (Q, 3)
            Wave vectors in units of the reciprocal lattice vectors.
        axis : array (3,)
            Rotation axis; need not be normalised.
        moments : array (Q, N, 3) or (N, 3), optional
            Moments of the home cell in µB, in place of the structure's own.
        magnetic_forces : bool
            Compute -dE/dm of the home cell too.

        Returns
        -------
        dict
            `energy` (Q,) eV per cell, `energies` (Q, N) eV, `magnetic_forces` (Q, N, 3) eV/µB.

        Raises
        ------
        MMACEError
            Spin-orbit coupling is on, for which the theorem does not hold.
        MomentError
            Wrong shape or numbers that are not finite.
        """
        if self.soc:
            raise MMACEError(
                "a spiral in the primitive cell needs spin-orbit coupling off: use calculator.replace(soc=False), "
                "or a supercell."
            )
        wave_vectors = np.atleast_2d(np.asarray(q, dtype=float))
        direction = np.asarray(axis, dtype=float)
        if wave_vectors.shape[1:] != (3,) or direction.shape != (3,) or not np.linalg.norm(direction) > 0:
            raise MMACEError("a spiral needs wave vectors of shape (Q, 3) and an axis of three numbers, not all zero.")
        home = moments_of(atoms) if moments is None else np.asarray(moments, dtype=float)
        if home.ndim == 2:
            home = np.broadcast_to(home, (len(wave_vectors), *home.shape))
        if len(home) != len(wave_vectors):
            raise MomentError(f"{len(wave_vectors)} wave vectors need as many sets of moments, not {len(home)}.")
        batch = self._spin_batch(atoms, home)
        graph = self._graph(atoms, home[0])
        turn_axis = self._tensor(direction / np.linalg.norm(direction))
        waves = self._tensor(wave_vectors)
        found = []
        for model in self.models:
            parts = []
            for start in range(0, len(waves), SPIRALS_AT_ONCE):
                some = slice(start, start + SPIRALS_AT_ONCE)
                with torch.no_grad():
                    geometry = model.geometry(graph, wave_vectors=waves[some], axis=turn_axis)
                parts.append(evaluate_spins(model, geometry, batch[some], magnetic_forces))
            energies, slopes = zip(*parts, strict=True)
            found.append((torch.cat(energies), torch.cat(slopes) if magnetic_forces else None))
        return _spin_results(found)

    def hessian(
        self, atoms: Atoms, blocks: Sequence[str] = ("rr", "rm", "mm"), rows: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Second derivatives of the energy, at the structure's moments or, if the calculator relaxes, at the relaxed.

        Parameters
        ----------
        atoms : Atoms
            Structure with moments.
        blocks : sequence of str
            At fixed moments: rr, rm, mm (N, 3, N, 3), ee (6, 6), er, em (6, N, 3). With moments that follow as the
            calculator's `moments` option says: rr_relaxed, ee_relaxed, er_relaxed. Here r are positions (Å), m
            moments (µB), e engineering Voigt strains (γ = 2ε); eV over these units.
        rows : sequence of int, optional
            Atoms whose rows of rr, rm and mm are wanted, for shapes (R, 3, N, 3); all by default.

        Raises
        ------
        MMACEError
            A relaxed block of a calculator with fixed moments or of some rows alone, or an unknown block.
        ConvergenceError
            Moments that are not at a minimum cannot follow.
        """
        relaxed = [block for block in blocks if block.endswith("_relaxed")]
        if relaxed and self.moments == "fixed":
            raise MMACEError(f'{relaxed[0]} needs moments that follow: use calculator.replace(moments="full").')
        if relaxed and rows is not None:
            raise MMACEError(f"{relaxed[0]} needs the rows of all atoms: leave rows out.")
        if rows is not None and not all(0 <= row < len(atoms) for row in rows):
            raise MMACEError(f"the rows of a Hessian are atoms 0 to {len(atoms) - 1}: {list(rows)} holds others.")
        plain = {block.removesuffix("_relaxed") for block in blocks}
        for block in relaxed:
            plain |= {"mm", *(f"{v}m" for v in block[:2])}
        graph = self._graph(atoms)
        if self.moments != "fixed":
            graph = graph.with_moments(self._relaxed(graph, self.moments))
        try:
            found = [hessian(model, graph, sorted(plain), rows) for model in self.models]
        except ValueError as error:
            raise MMACEError(str(error)) from None
        mean = {name: torch.stack([f[name] for f in found]).mean(0).double() for name in found[0]}
        for block in relaxed:
            mean[block] = self._follow(mean, block, graph.moments.double())
        return {block: _to_numpy(mean[block]) for block in blocks}

    def relax_moments(self, images: Sequence[Atoms], mode: str = "full") -> list[np.ndarray]:
        """Relaxed moments of many structures at fixed positions, all at once.

        Parameters
        ----------
        images : sequence of Atoms
            Structures with the moments to start from; they are not changed.
        mode : str
            "magnitudes" or "full".

        Returns
        -------
        list of ndarray (N, 3)
            µB.

        Raises
        ------
        ConvergenceError
            The tolerance was not reached; the message holds the residual.
        """
        if mode not in MODES:
            raise MMACEError(f"there is no moment mode {mode}: choose among {', '.join(MODES)}.")
        moments: list[np.ndarray] = []
        for start in range(0, len(images), STRUCTURES_AT_ONCE):
            graph = Graph.collate([self._graph(atoms) for atoms in images[start : start + STRUCTURES_AT_ONCE]])
            relaxed = self._relaxed(graph, mode, first=start)
            moments += [_to_numpy(part) for part in torch.split(relaxed, graph.counts.tolist())]
        return moments

    def _hash(self) -> str:
        """SHA-256 of the model: that of its file, or for a committee that of its members' hashes."""
        if not self._hashes:
            self._hashes = [weights_hash(model) for model in self.models]
        if len(self._hashes) == 1:
            return self._hashes[0]
        return hashlib.sha256(" ".join(self._hashes).encode()).hexdigest()

    def _with(self, members: slice = slice(None), **options: Any) -> MMACECalculator:
        settings: dict[str, Any] = {"soc": self.soc, "moments": self.moments, **options}
        new = MMACECalculator(self.models[members], self.device, self.dtype, tolerance=self.tolerance, **settings)
        new._name, new._hashes = self._name, self._hashes[members]
        return new

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values, dtype=DTYPES[self.dtype], device=self.device)

    def _graph(self, atoms: Atoms, moments: np.ndarray | None = None) -> Graph:
        graph = Graph.from_atoms(atoms, self.elements, self.cutoff, float(self.soc), DTYPES[self.dtype], moments)
        self._warn_beyond_range(atoms, _to_numpy(graph.moments)[None])
        return graph.to(self.device)

    def _spin_batch(self, atoms: Atoms, moments: ArrayLike) -> torch.Tensor:
        batch = np.asarray(moments, dtype=float)
        if batch.ndim != 3:
            raise MomentError(f"spin configurations have shape {batch.shape}: give (B, N, 3) in µB.")
        if not len(batch):
            raise MomentError("there are no spin configurations: give at least one.")
        check_moments(batch, len(atoms))
        self._warn_beyond_range(atoms, batch)
        return self._tensor(batch)

    def _warn_beyond_range(self, atoms: Atoms, moments: np.ndarray) -> None:
        config = self.models[0].config
        largest = np.linalg.norm(moments, axis=2).max(axis=0, initial=0.0)
        for i, (symbol, moment) in enumerate(zip(atoms.get_chemical_symbols(), largest, strict=True)):
            if symbol not in config.carriers and moment > NEGLIGIBLE:
                warnings.warn(
                    f"atom {i} ({symbol}) has a moment of {moment:.2f} µB, but {symbol} carries none in this model: "
                    "its moment is held down by a penalty, set it to zero.",
                    MomentRangeWarning,
                    stacklevel=4,
                )
                return
            if symbol in config.carriers and moment > config.moment_scale[symbol]:
                warnings.warn(
                    f"the moment of atom {i} ({symbol}), {moment:.2f} µB, is beyond the trained range of "
                    f"{config.moment_scale[symbol]:.2f} µB: its energy is an extrapolation.",
                    MomentRangeWarning,
                    stacklevel=4,
                )
                return

    def _geometries(self, atoms: Atoms) -> list[Geometry]:
        """Geometries of the members, kept until the structure changes: spin dynamics asks for one many times."""
        arrays = (atoms.positions, atoms.cell.array, atoms.numbers, atoms.pbc)
        key = tuple(np.ascontiguousarray(x).tobytes() for x in arrays)
        if self._cached is None or self._cached.key != key:
            graph = self._graph(atoms, np.zeros((len(atoms), 3)))
            with torch.no_grad():
                self._cached = _CachedGeometry(key, [model.geometry(graph) for model in self.models])
        return self._cached.geometries

    def _relaxed(self, graph: Graph, mode: str, first: int = 0) -> torch.Tensor:
        potential = self.models[0] if len(self.models) == 1 else _MeanPotential(self.models)
        try:
            return relax_moments(potential, graph, mode, self.tolerance).moments
        except ConvergenceError as error:
            if first == 0:
                raise
            raise ConvergenceError(f"{error} (counted from structure {first})") from None

    def _follow(self, found: dict[str, torch.Tensor], block: str, moments: torch.Tensor) -> torch.Tensor:
        """A block of the Hessian with the moments eliminated."""
        row, column = block[0], block[1]
        n_atoms = len(moments)
        if self.moments == "magnitudes":
            axes = torch.nn.functional.normalize(moments, dim=1)
            carries = axes.norm(dim=1) > 0
            basis = torch.zeros(n_atoms, 3, n_atoms, dtype=moments.dtype, device=moments.device)
            index = torch.arange(n_atoms, device=moments.device)
            basis[index, :, index] = axes
            basis = basis.view(3 * n_atoms, n_atoms)[:, carries]
        else:
            basis = torch.eye(3 * n_atoms, dtype=moments.dtype, device=moments.device)

        def flat(name: str) -> torch.Tensor:
            size = 6 if name[0] == "e" else 3 * n_atoms
            return found[name].reshape(size, -1)

        inner = basis.T @ flat("mm") @ basis
        fixed = flat(block[:2])
        if basis.shape[1] == 0:
            return found[block[:2]]
        lengths = moments.norm(dim=1)
        carried = lengths[lengths > NEGLIGIBLE]
        noise = self.tolerance / float(carried.min()) if len(carried) else 0.0
        response = relaxed_response(fixed, flat(f"{row}m") @ basis, inner, (flat(f"{column}m") @ basis).T, noise)
        return response.reshape(found[block[:2]].shape)


class _MeanPotential:
    """The mean of a committee, as far as moment relaxation needs a potential."""

    def __init__(self, models: list[MagneticMACE]) -> None:
        self.models = models

    def geometry(self, graph: Graph) -> list[Geometry]:
        return [model.geometry(graph) for model in self.models]

    def spin_energies(self, geometry: list[Geometry], moments: torch.Tensor) -> torch.Tensor:
        energies = [model.spin_energies(g, moments) for model, g in zip(self.models, geometry, strict=True)]
        return torch.stack(energies).mean(0)


def from_options(
    model: str = "default", soc: bool = True, moments: str = "fixed", device: str = "cpu", dtype: str = "float64"
) -> MMACECalculator:
    """The calculator that command lines ask for; parameters as in `MMACECalculator`."""
    return MMACECalculator(model=model, soc=soc, moments=moments, device=device, dtype=dtype)


def _check_options(device: str, dtype: str, moments: str) -> None:
    if dtype not in DTYPES:
        raise MMACEError(f"there is no dtype {dtype}: choose float64 or float32.")
    if moments not in MODES:
        raise MMACEError(f"there is no moment mode {moments}: choose among {', '.join(MODES)}.")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise MMACEError(f"the device {device} cannot be used ({reason}): use device='cpu'.") from None


def _placed(model: MagneticMACE, device: str, dtype: torch.dtype) -> MagneticMACE:
    """The model on a device and in a type; a copy where that changes it, for `Module.to` works in place."""
    if model.dtype == dtype and model.device == torch.device(device):
        return model
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def _to_numpy(tensor: torch.Tensor) -> Any:
    array = tensor.detach().cpu().double().numpy()
    return float(array) if array.ndim == 0 else array


def _spin_results(found: list[tuple[torch.Tensor, torch.Tensor | None]]) -> dict[str, np.ndarray]:
    """Committee means of site energies and magnetic forces."""
    energies = torch.stack([sites for sites, _ in found]).mean(0)
    results = {"energy": _to_numpy(energies.sum(1)), "energies": _to_numpy(energies)}
    slopes = [slope for _, slope in found if slope is not None]
    if slopes:
        results["magnetic_forces"] = _to_numpy(torch.stack(slopes).mean(0))
    return results
