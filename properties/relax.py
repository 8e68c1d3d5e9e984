"""Structure and moments relaxed together, and the collinear orders of a crystal ranked by their relaxed energies."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.filters import FrechetCellFilter
from ase.io import write
from ase.io.jsonio import encode
from ase.optimize import BFGS, FIRE, LBFGS
from numpy.typing import NDArray

from .base import Options, Progress, Property, Row, option, refuse_idle, spread_of, variable
from .conventions import GPA
from .errors import CalculatorError, ConvergenceError, OptionError, PropertyError
from .files import check_writable, write_whole
from .orders import KEPT, LOST_ORDER, CollinearOrder, collinear_orders, order_is_kept, rank
from .protocol import (
    SMALLEST_MOMENT,
    ZERO_MOMENT,
    MomentMode,
    SpinCalculator,
    bare,
    moments_of,
    with_moments,
)
from .provenance import magnetic_space_group
from .stiffness import from_six, to_six
from .structures import check_structure, closest_pair
from .symmetry import SiteSymmetry, site_symmetry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

OPTIMIZERS: dict[str, Any] = {"bfgs": BFGS, "lbfgs": LBFGS, "fire": FIRE}
CELLS = ("full", "volume", "shape", "fixed")
MOMENT_RESIDUAL = 1e-5
"""Largest magnetic force in eV/µB that relaxed moments may keep, or the calculator's tolerance where that is larger."""
LONGEST_STEP = 0.1
"""Å of one step of the optimiser."""
NEAREST = 0.7
"""Shortest distance as a part of the sum of covalent radii: V=O in V2O5 has 0.72, iron at 1 TPa as much."""
NEARER = 0.9
"""Part of the start's own shortest distance that counts as no collapse where the start is shorter still."""
VOLUMES = (0.5, 2.0)
"""Bounds of the volume as a part of the start's."""
COHESION = 10.0
"""Most that atoms gain by coming closer, eV/atom: no solid is bound by more (tungsten has 8.9)."""
FILES = (".extxyz", ".mcif")
XYZ = ("x", "y", "z")
STRAINS = ("xx", "yy", "zz", "yz", "xz", "xy")


@dataclass(frozen=True)
class Freedom:
    """What is relaxed, and how tightly.

    Parameters
    ----------
    ions : whether atoms move against the cell.
    cell : ``full``; ``volume``, the shape of the cell kept; ``shape``, its volume kept; ``fixed``.
    pressure : hydrostatic, eV/Å³.
    fmax : largest force left on an atom, eV/Å.
    smax : largest component of stress plus pressure left, among those that are relaxed, eV/Å³.
    steps : of the optimiser.
    optimizer : a key of `OPTIMIZERS`.
    symmetry : keep the symmetry of the crystal with its moments, to `symprec` in Å and `mag_symprec` in µB.
    """

    ions: bool = True
    cell: str = "full"
    pressure: float = 0.0
    fmax: float = 1e-4
    smax: float = 1e-3 / GPA
    steps: int = 500
    optimizer: str = "bfgs"
    symmetry: bool = True
    symprec: float = 1e-3
    mag_symprec: float = 1e-2


@dataclass(frozen=True)
class Relaxed:
    """A relaxed structure.

    Parameters
    ----------
    atoms : with the moments reached, (N, 3) in µB.
    energy : eV.
    forces, stress : left over, shape (N, 3) in eV/Å and (6,) in eV/Å³.
    residual : largest magnetic force left on what was relaxed of the moments, eV/µB.
    trajectory : of each step ``energy`` (eV), ``force`` (eV/Å), ``stress`` (eV/Å³), ``volume`` (Å³), ``moment``
        (mean |m| in µB).
    """

    atoms: Atoms
    energy: float
    forces: Array
    stress: Array
    residual: float
    trajectory: dict[str, Array]


class _Follower(Calculator):
    """The potential with moments that follow the atoms, as the optimisers of ASE see it.

    At relaxed moments dE/dm vanishes along everything they relax in, so the forces at fixed moments are those of the
    relaxed energy (Hellmann and Feynman).
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress"]

    def __init__(
        self, calculator: SpinCalculator, mode: MomentMode, moments: Array, ions: bool, group: SiteSymmetry | None
    ) -> None:
        super().__init__()
        self.calculator, self.mode, self.moments = calculator, mode, moments
        self.ions, self.group = ions, group
        self.raw_forces, self.raw_stress, self.broken = np.zeros((0, 3)), np.zeros(6), 0.0

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = ()) -> None:
        """Relax the moments from those of the last step, and evaluate there."""
        super().calculate(atoms, properties, system_changes)
        image = with_moments(atoms, self.moments)
        self.moments = self.calculator.relax_moments([image], self.mode)[0]
        forces, stress = self.calculator.forces(image, self.moments), self.calculator.stress(image, self.moments)
        self.raw_forces, self.raw_stress, self.broken = forces, stress, 0.0
        if self.group is not None:
            forces = self.group.vectors(forces)
            stress = to_six(self.group.tensor(from_six(stress)))
            self.broken = float(np.abs(forces - self.raw_forces).max())
        if not self.ions:
            forces = np.zeros_like(forces)
        energy = self.calculator.energy(image, self.moments)
        self.results = {"energy": energy, "free_energy": energy, "forces": forces, "stress": stress}


def relax_structure(
    atoms: Atoms,
    calculator: SpinCalculator,
    mode: MomentMode,
    freedom: Freedom,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Relaxed:
    """Relax ions, cell and moments together.

    Parameters
    ----------
    atoms : with the moments to start from; it is not changed.
    calculator : a single model.
    mode : how moments are relaxed at each step.
    freedom : what is relaxed.
    tell : called with the steps made and the most there may be.

    Raises
    ------
    ConvergenceError : not relaxed in the steps allowed, moments that do not converge, or a fall into a hole of the
        potential: `refuse_collapse`; the message holds the residual.
    CalculatorError : forces that break the symmetry that is to be kept.
    """
    moments = moments_of(atoms)
    group = None
    image = with_moments(atoms, moments)
    if freedom.symmetry:
        soc = calculator.soc is not False
        group = site_symmetry(atoms, moments, soc, freedom.symprec, freedom.mag_symprec)
        image = group.structure(image)
    follower = _Follower(calculator, mode, moments, freedom.ions, group)
    mobile = bare(image)
    mobile.set_initial_magnetic_moments(None)
    mobile.calc = follower
    target: Any = mobile
    if freedom.cell != "fixed":
        target = FrechetCellFilter(
            mobile,
            hydrostatic_strain=freedom.cell == "volume",
            constant_volume=freedom.cell == "shape",
            scalar_pressure=freedom.pressure,
        )
    extra = {"maxstep": LONGEST_STEP}
    optimizer = OPTIMIZERS[freedom.optimizer](target, logfile=None, **extra)
    path: dict[str, list[float]] = {k: [] for k in ("energy", "force", "stress", "volume", "moment")}
    for step, _ in enumerate(optimizer.irun(fmax=0.0, steps=freedom.steps)):
        found = {k: np.asarray(mobile.calc.get_property(k, mobile)) for k in ("energy", "forces", "stress")}
        force = float(np.linalg.norm(found["forces"], axis=1).max())
        left = float(np.abs(unbalanced(found["stress"], freedom)).max())
        carrying = np.linalg.norm(follower.moments, axis=1)
        path["energy"].append(float(found["energy"]))
        path["force"].append(force)
        path["stress"].append(left)
        path["volume"].append(mobile.get_volume())
        path["moment"].append(
            float(carrying[carrying > SMALLEST_MOMENT].mean()) if (carrying > SMALLEST_MOMENT).any() else 0.0
        )
        tell(step, freedom.steps)
        refuse_collapse(image, mobile, path["energy"][0] - path["energy"][-1], step)
        if force <= freedom.fmax and left <= freedom.smax:
            break
    else:
        raise ConvergenceError(
            f"the structure did not relax in {freedom.steps} steps: a force of {force:.1e} eV/Å (above "
            f"{freedom.fmax:.0e}) or a stress of {left * GPA:.1e} GPa (above {freedom.smax * GPA:.0e}) is left; raise "
            "steps, or start from another structure"
        )
    if follower.broken > max(10 * freedom.fmax, 1e-6):
        raise CalculatorError(
            f"the calculator's forces break the symmetry of the crystal by {follower.broken:.1e} eV/Å; relax without it"
        )
    final = with_moments(mobile, follower.moments)
    residual = magnetic_residual(final, calculator, mode)
    allowed = max(MOMENT_RESIDUAL, calculator.moment_tolerance)
    if residual > allowed:
        raise ConvergenceError(
            f"the moments kept a magnetic force of {residual:.1e} eV/µB, above {allowed:.0e}; use a calculator that "
            "relaxes them more tightly"
        )
    return Relaxed(
        final,
        path["energy"][-1],
        follower.raw_forces,
        follower.raw_stress,
        residual,
        {k: np.array(v) for k, v in path.items()},
    )


def refuse_collapse(start: Atoms, reached: Atoms, gain: float, step: int) -> None:
    """Refuse a structure that no crystal relaxes to: the potential has a hole there.

    Refused are two atoms nearer than `NEAREST` of the sum of their covalent radii (and than `NEARER` of the start's
    closest pair), a volume outside `VOLUMES` of the start's, and more than `COHESION` gained while atoms came closer.

    Parameters
    ----------
    start, reached : of the relaxation.
    gain : energy of the start above that reached, eV.
    step : of the optimiser.

    Raises
    ------
    ConvergenceError : the structure is one of these.
    """
    after = f"after {step} steps of relaxation"
    remedy = "start from a structure nearer to equilibrium, or use another model"
    volume = reached.get_volume() / start.get_volume()
    if not VOLUMES[0] < volume < VOLUMES[1]:
        raise ConvergenceError(f"the cell went to {volume:.2g} of its volume {after}; {remedy}")
    first, (part, distance, a, b) = closest_pair(start)[0], closest_pair(reached)
    if part < min(NEAREST, NEARER * first):
        symbols = reached.get_chemical_symbols()
        raise ConvergenceError(
            f"atoms {a} ({symbols[a]}) and {b} ({symbols[b]}) ran into each other {after}: they are {distance:.2f} Å "
            f"apart, {part:.2f} of the sum of their covalent radii; {remedy}"
        )
    if gain > COHESION * len(reached) and part < first:
        raise ConvergenceError(
            f"the energy fell by {gain / len(reached):.3g} eV/atom {after} while atoms came closer, more than any "
            f"solid is bound by; {remedy}"
        )


def unbalanced(stress: Array, freedom: Freedom) -> Array:
    """Return the part of stress plus pressure that the cell is free to relax, shape (6,), in the unit of both."""
    excess = stress + freedom.pressure * np.array([1.0, 1, 1, 0, 0, 0])
    mean = excess[:3].mean() * np.array([1.0, 1, 1, 0, 0, 0])
    return {"full": excess, "volume": mean, "shape": excess - mean, "fixed": 0 * excess}[freedom.cell]


def magnetic_residual(atoms: Atoms, calculator: SpinCalculator, mode: MomentMode) -> float:
    """Return the largest magnetic force, in eV/µB, on what the mode relaxes of the moments."""
    if mode == "fixed":
        return 0.0
    moments = moments_of(atoms)
    slope = calculator.magnetic_forces(atoms, moments)
    if mode == "full":
        return float(np.linalg.norm(slope, axis=1).max())
    lengths = np.linalg.norm(moments, axis=1)
    carrying = lengths > ZERO_MOMENT
    along = np.einsum("ix,ix->i", slope[carrying], moments[carrying]) / lengths[carrying]
    return float(np.abs(along).max(initial=0.0))


@dataclass(frozen=True)
class RelaxOptions(Options):
    """Options of the relaxation.

    Parameters
    ----------
    ions : whether atoms move against the cell.
    cell : what of the cell is relaxed.
    pressure : hydrostatic, GPa.
    fmax : largest force left, eV/Å.
    smax : largest stress left, GPa.
    steps : of the optimiser.
    optimizer : of ASE.
    symmetry : keep the symmetry of the crystal with its moments.
    orders : relax the moments given, or every collinear order.
    max_cells : primitive cells of the largest supercell of an order.
    max_orders : most orders.
    write : file of the relaxed structure with its moments.
    """

    ions: bool = option(True, "let atoms move against the cell")
    cell: str = option("full", "what of the cell is relaxed; volume keeps its shape, and shape keeps its volume", CELLS)
    pressure: float = option(0.0, "hydrostatic pressure, GPa")
    fmax: float = option(1e-4, "largest force left, eV/Å")
    smax: float = option(1e-3, "largest stress left, GPa")
    steps: int = option(500, "most steps of the optimiser")
    optimizer: str = option("bfgs", "optimiser of ASE", tuple(OPTIMIZERS))
    symmetry: bool = option(True, "keep the symmetry of the crystal with its moments")
    orders: str = option(
        "given", "relax the moments given, or every collinear order in small supercells, ranked", ("given", "auto")
    )
    max_cells: int = option(2, "primitive cells of the largest supercell of an order")
    max_orders: int = option(20, "most orders to try")
    write: str = option("", f"file of the relaxed structure, the best order's with orders auto: {', '.join(FILES)}")

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for name, low, high in (
            ("fmax", 1e-9, 1.0),
            ("smax", 1e-7, 100.0),
            ("pressure", -100.0, 1000.0),
            ("steps", 1, 100000),
            ("max_cells", 1, 16),
            ("max_orders", 2, 1000),
        ):
            if not low <= getattr(self, name) <= high:
                raise OptionError(f"{name} cannot be {getattr(self, name):g}; it lies between {low:g} and {high:g}")
        if self.write and Path(self.write).suffix not in FILES:
            raise OptionError(
                f"a structure cannot be written as '{self.write}'; name a file ending in {' or '.join(FILES)}"
            )
        if not self.ions and self.cell == "fixed":
            raise OptionError("with the ions and the cell fixed nothing is left to relax; let one of them go")
        if self.pressure and self.cell in ("fixed", "shape"):
            raise OptionError(
                f"a pressure does nothing where the cell is '{self.cell}'; relax it in full, or its volume"
            )
        if self.orders == "given":
            refuse_idle(self, ("max_cells", "max_orders"), "the order is given, not auto")

    def freedom(self) -> Freedom:
        """Return what is relaxed, in eV and Å."""
        return Freedom(
            self.ions,
            self.cell,
            self.pressure / GPA,
            self.fmax,
            self.smax / GPA,
            self.steps,
            self.optimizer,
            self.symmetry,
            self.symprec,
            self.mag_symprec,
        )


class Relaxation(Property):
    """Ions, cell and moments at their common minimum; of the moments given, or of every collinear order."""

    name = "relax"
    title = "relaxed structure and moments"
    options_type: ClassVar[type[Options]] = RelaxOptions
    soc = False

    def written(self) -> list[str]:
        """Return the file of the structure that was reached."""
        return [self.options.write] if self.options.write else []

    def check(self, atoms: Atoms, calculator: SpinCalculator) -> None:
        """Refuse a place that cannot be written, and a crystal without orders to try."""
        super().check(atoms, calculator)
        if self.options.write:
            check_writable(self.options.write)
        if self.options.orders == "auto":
            self._orders(atoms)

    def _orders(self, atoms: Atoms) -> list[CollinearOrder]:
        moments = moments_of(atoms)
        lengths = np.linalg.norm(moments, axis=1)
        axis = moments[int(np.argmax(lengths > ZERO_MOMENT))]
        options = self.options
        limits = options.max_cells, options.max_orders, options.symprec, options.mag_symprec
        return collinear_orders(atoms, lengths, axis, *limits)

    def compute(self, atoms: Atoms, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Relax with one model."""
        if self.options.orders == "auto":
            return self._ranked(self._orders(atoms), calculator, progress)
        mode = self.mode(calculator)
        found = relax_structure(
            atoms, calculator, mode, self.options.freedom(), lambda done, total: progress("relax", done, total)
        )
        n = len(atoms)
        path = found.trajectory
        start = moments_of(atoms)
        data: dict[str, Any] = {
            "energy": variable((), found.energy / n, "eV/atom", "energy"),
            "enthalpy": variable(
                (),
                (found.energy + self.options.pressure / GPA * found.atoms.get_volume()) / n,
                "eV/atom",
                "energy plus pressure times volume",
            ),
            "gain": variable(
                (),
                1e3 * (path["energy"][0] - found.energy) / n,
                "meV/atom",
                "energy of the start, its moments relaxed, above the end",
            ),
            "volume": variable((), found.atoms.get_volume() / n, "Å³/atom", "volume"),
            "cell": variable(("vector", "xyz"), found.atoms.cell[:], "Å", "lattice vectors"),
            "lengths": variable("vector", found.atoms.cell.lengths(), "Å", "lengths of the lattice vectors"),
            "angles": variable("vector", found.atoms.cell.angles(), "degree", "angles of the cell: α, β, γ"),
            "positions": variable(("site", "xyz"), found.atoms.positions, "Å", "positions"),
            "moments": variable(("site", "xyz"), moments_of(found.atoms), "µB", "moments"),
            "forces": variable(("site", "xyz"), found.forces, "eV/Å", "forces left"),
            "stress": variable("strain", found.stress * GPA, "GPa", "stress, minus the pressure in equilibrium"),
            "magnetic_residual": variable(
                (), found.residual, "eV/µB", "largest magnetic force left on what was relaxed of the moments"
            ),
            "order_kept": variable(
                (),
                float(order_is_kept(start, moments_of(found.atoms))),
                "1",
                KEPT,
            ),
            "step_energy": variable("step", path["energy"] / n, "eV/atom", "energy of each step"),
            "step_force": variable("step", path["force"], "eV/Å", "largest force of each step"),
            "step_stress": variable("step", path["stress"] * GPA, "GPa", "largest unbalanced stress of each step"),
            "step_volume": variable("step", path["volume"] / n, "Å³/atom", "volume of each step"),
            "step_moment": variable("step", path["moment"], "µB", "mean |m| of each step"),
        }
        coords: dict[str, Any] = {
            "vector": variable("vector", np.array(["a", "b", "c"]), "1", "lattice vector"),
            "xyz": variable("xyz", np.array(XYZ), "1", "Cartesian axis"),
            "strain": variable("strain", np.array(STRAINS), "1", "Voigt component"),
            "site": variable("site", np.arange(n), "1", "index of the atom"),
            "element": variable("site", np.array(atoms.get_chemical_symbols()), "1", "chemical symbol"),
            "step": variable("step", np.arange(len(path["energy"])), "1", "step of the optimiser"),
        }
        return xr.Dataset(data, coords)

    def _ranked(self, orders: list[CollinearOrder], calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Relax every order; one that fails keeps its sentence and no numbers."""
        most = max(len(o.atoms) for o in orders)
        count = len(orders)
        scalars = {k: np.full(count, np.nan) for k in ("energy", "volume", "moment", "net", "kept")}
        cells = np.full((count, 3, 3), np.nan)
        positions, moments = np.full((count, most, 3), np.nan), np.full((count, most, 3), np.nan)
        failures = [""] * count
        for k, order in enumerate(orders):
            progress("orders", k, count)
            mode: MomentMode = "fixed" if order.name == "nm" else self.mode(calculator)
            try:
                found = relax_structure(check_structure(order.atoms), calculator, mode, self.options.freedom())
            except PropertyError as error:
                failures[k] = str(error)
                continue
            n, reached = len(order.atoms), moments_of(found.atoms)
            lengths = np.linalg.norm(reached, axis=1)
            carrying = np.linalg.norm(moments_of(order.atoms), axis=1) > SMALLEST_MOMENT
            scalars["energy"][k] = (found.energy + self.options.pressure / GPA * found.atoms.get_volume()) / n
            scalars["volume"][k] = found.atoms.get_volume() / n
            scalars["moment"][k] = lengths[carrying].mean() if carrying.any() else 0.0
            scalars["net"][k] = np.linalg.norm(reached.sum(axis=0)) / n
            scalars["kept"][k] = order_is_kept(moments_of(order.atoms), reached)
            cells[k], positions[k, :n], moments[k, :n] = found.atoms.cell[:], found.atoms.positions, reached
        progress("orders", count, count)
        if all(failures):
            raise ConvergenceError(f"no order relaxed; of {orders[0].name}: {failures[0]}")
        numbers = np.zeros((count, most), dtype=np.int32)
        for k, order in enumerate(orders):
            numbers[k, : len(order.atoms)] = order.atoms.numbers
        data: dict[str, Any] = {
            "energy": variable(
                "order", scalars["energy"], "eV/atom", "energy, plus pressure times volume, NaN where it failed"
            ),
            "volume": variable("order", scalars["volume"], "Å³/atom", "volume"),
            "moment": variable("order", scalars["moment"], "µB", "mean |m| of the atoms that began with a moment"),
            "net_moment": variable("order", scalars["net"], "µB/atom", "length of the net moment"),
            "order_kept": variable("order", scalars["kept"], "1", KEPT),
            "cell": variable(("order", "vector", "xyz"), cells, "Å", "lattice vectors"),
            "positions": variable(("order", "site", "xyz"), positions, "Å", "positions, NaN beyond the cell's atoms"),
            "moments": variable(("order", "site", "xyz"), moments, "µB", "moments, NaN beyond the cell's atoms"),
            "numbers": variable(("order", "site"), numbers, "1", "atomic numbers, 0 beyond the cell's atoms"),
            "cells": variable(
                "order", np.array([o.cells for o in orders], dtype=np.int32), "1", "primitive cells of the crystal"
            ),
            "failure": variable("order", np.array(failures), "1", "why the order did not relax; empty where it did"),
        }
        coords = {
            "order": variable("order", np.array([o.name for o in orders]), "1", "magnetic order"),
            "vector": variable("vector", np.array(["a", "b", "c"]), "1", "lattice vector"),
            "xyz": variable("xyz", np.array(XYZ), "1", "Cartesian axis"),
            "site": variable("site", np.arange(most), "1", "index of the atom"),
        }
        return xr.Dataset(data, coords)

    def align(self, parts: list[xr.Dataset]) -> list[xr.Dataset]:
        """Let a member that needed fewer steps rest at its end."""
        if "step" not in parts[0].dims:
            return parts
        longest = max(parts, key=lambda p: p.sizes["step"])["step"]
        return [p.reindex(step=longest.values, method="ffill").assign_coords(step=longest) for p in parts]

    def finish(self, dataset: xr.Dataset, calculator: SpinCalculator) -> xr.Dataset:
        """Rank the orders, name the symmetry reached, and write the structure."""
        tolerances = self.options.symprec, self.options.mag_symprec
        if "order" in dataset.dims:
            dataset = _with_ranks(dataset, *tolerances)
        best = relaxed_structure(dataset)
        group = magnetic_space_group(best, *tolerances)
        dataset.attrs["relaxed_structure_json"] = encode(best)
        dataset.attrs["relaxed_space_group"] = group["space_group"]
        dataset.attrs["relaxed_magnetic_space_group"] = group["magnetic_space_group"]
        if self.options.write:
            write_structure(best, self.options.write)
        return dataset

    def summary(self, dataset: xr.Dataset) -> list[Row]:
        """Return the relaxed cell and moments, or the ranking of the orders."""
        return _ranking_rows(dataset) if "order" in dataset.dims else _single_rows(dataset)

    def plot(self, dataset: xr.Dataset) -> "Figure":
        """Draw the trajectory, or the ranking of the orders."""
        from .plot import plot_relax

        return plot_relax(dataset)


def _with_ranks(dataset: xr.Dataset, symprec: float, mag_symprec: float) -> xr.Dataset:
    """Sort the orders by energy, and add the energy above the best and the space groups."""
    energies = np.nan_to_num(dataset["energy"].values, nan=np.inf)
    ranks = rank(energies, np.nan_to_num(dataset["order_kept"].values))
    dataset = dataset.isel(order=np.argsort(ranks, kind="stable"))
    above = 1e3 * (dataset["energy"].values - dataset["energy"].values[0])
    dataset["above"] = variable("order", above, "meV/atom", "energy above the best order")
    if "energy_member" in dataset:
        members = dataset["energy_member"].values
        each = 1e3 * (members - members[:, :1])
        text = dataset["above"].attrs["long_name"]
        dataset["above_std"] = variable("order", each.std(axis=0, ddof=1), "meV/atom", f"{text}, committee spread")
        dataset["above_member"] = variable(("member", "order"), each, "meV/atom", f"{text}, per member")
    groups = []
    for name in dataset["order"].values:
        if np.isnan(float(dataset["energy"].sel(order=name))):
            groups.append(("none", "none"))
            continue
        found = magnetic_space_group(relaxed_structure(dataset, str(name)), symprec, mag_symprec)
        groups.append((str(found["space_group"]), str(found["magnetic_space_group"])))
    dataset["space_group"] = variable("order", np.array([g[0] for g in groups]), "1", "space group of the atoms alone")
    dataset["magnetic_space_group"] = variable("order", np.array([g[1] for g in groups]), "1", "magnetic space group")
    dataset.attrs["best_order"] = str(dataset["order"].values[0])
    return dataset


def _single_rows(dataset: xr.Dataset) -> list[Row]:
    rows = [
        Row("energy", float(dataset["energy"]), "eV/atom", spread_of(dataset, "energy")),
        Row("gained by relaxing", float(dataset["gain"]), "meV/atom", spread_of(dataset, "gain")),
        Row("volume", float(dataset["volume"]), "Å³/atom", spread_of(dataset, "volume")),
    ]
    for k, name in enumerate("abc"):
        spread = spread_of(dataset, "lengths", vector=name)
        rows.append(Row(name, float(dataset["lengths"][k]), "Å", spread))
    for k, name in enumerate(("α", "β", "γ")):
        rows.append(Row(name, float(dataset["angles"][k]), "°", spread_of(dataset, "angles", vector="abc"[k])))
    for site in range(dataset.sizes["site"]):
        moment = dataset["moments"].values[site]
        if np.linalg.norm(moment) > SMALLEST_MOMENT:
            text = " ".join(f"{x:.3f}" for x in moment)
            rows.append(Row(f"moment of {dataset['element'].values[site]} {site}", text, "µB"))
    if float(dataset["order_kept"]) < 1:
        rows.append(Row("order", LOST_ORDER))
    rows += [
        Row("magnetic space group", str(dataset.attrs["relaxed_magnetic_space_group"])),
        Row("largest force left", float(np.abs(dataset["forces"].values).max()), "eV/Å"),
        Row("largest stress left", float(dataset["step_stress"].values[-1]), "GPa"),
        Row("magnetic force left", float(dataset["magnetic_residual"]), "eV/µB"),
        Row("steps", float(dataset.sizes["step"] - 1)),
    ]
    return rows


def _ranking_rows(dataset: xr.Dataset) -> list[Row]:
    rows = []
    for name in dataset["order"].values:
        one = dataset.sel(order=name)
        if np.isnan(float(one["energy"])):
            rows.append(Row(str(name), str(one["failure"].values) or "failed with one of the models"))
            continue
        about = f"{int(one['cells'])} cell{'s' if int(one['cells']) > 1 else ''}, |m| {float(one['moment']):.3f} µB"
        lost = "" if float(one["order_kept"]) == 1 else ", order lost"
        label = f"{name} ({about}, {one['magnetic_space_group'].values}{lost})"
        spread = spread_of(dataset, "above", order=name)
        rows.append(Row(label, float(one["above"]), "meV/atom above", spread, str(name)))
    return rows


def relaxed_structure(dataset: xr.Dataset, order: str | None = None) -> Atoms:
    """Return the relaxed structure of a dataset with its moments (N, 3) in µB; with a committee the members' mean.

    Parameters
    ----------
    dataset : of this property.
    order : its name, where orders were ranked; the best by default.
    """
    if "order" not in dataset.dims:
        atoms = Atoms(
            [str(s) for s in dataset["element"].values],
            positions=dataset["positions"].values,
            cell=dataset["cell"].values,
            pbc=True,
        )
        return with_moments(atoms, dataset["moments"].values)
    one = dataset.sel(order=order) if order is not None else dataset.isel(order=0)
    there = one["numbers"].values > 0
    atoms = Atoms(one["numbers"].values[there], positions=one["positions"].values[there], pbc=True)
    atoms.set_cell(one["cell"].values)
    return with_moments(atoms, one["moments"].values[there])


def write_structure(atoms: Atoms, path: str | Path) -> None:
    """Write a structure with its moments, in one piece, as extxyz or magCIF.

    Raises
    ------
    OptionError : another suffix.
    OutputError : the place cannot be written.
    """
    suffix = Path(path).suffix
    if suffix == ".extxyz":
        write_whole(path, lambda name: write(name, atoms, format="extxyz"))
    elif suffix == ".mcif":
        write_whole(path, lambda name: Path(name).write_text(_magcif(atoms)))
    else:
        raise OptionError(f"a structure cannot be written as '{path}'; name a file ending in {' or '.join(FILES)}")


def _magcif(atoms: Atoms) -> str:
    from pymatgen.core import Lattice, Structure
    from pymatgen.electronic_structure.core import Magmom
    from pymatgen.io.cif import CifWriter

    structure = Structure(
        Lattice(atoms.cell[:]),
        atoms.get_chemical_symbols(),
        atoms.get_scaled_positions(),
        site_properties={"magmom": [Magmom(list(m)) for m in moments_of(atoms)]},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = str(CifWriter(structure, write_magmoms=True, significant_figures=10))
    # zero moments are left out, and a loop without rows cannot be read
    return text if moments_of(atoms).any() else f"{text}  {atoms.symbols[0]}0  0.0  0.0  0.0\n"
