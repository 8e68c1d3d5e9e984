"""Ordering temperatures: mean field and RPA of exchange, its spin model at a temperature, the potential itself."""

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import spglib
import xarray as xr
from ase import Atoms
from ase.io.jsonio import encode
from numpy.typing import NDArray

from .base import Options, Progress, Property, Row, of_members, option, over_members, refuse_idle, spread_of, variable
from .conventions import BOLTZMANN, G_FACTOR, HBAR
from .errors import CalculatorError, ConvergenceError, MomentError, OptionError
from .exchange import Exchange
from .export import spin_table, spirit
from .orders import SAME_ENERGY, CollinearOrder, collinear_orders, order_is_kept, rank
from .protocol import SMALLEST_MOMENT, ZERO_MOMENT, SpinCalculator, moments_of, with_moments
from .sampling import KINDS, Kind, Measure, Statistics, Walkers, crossing, peak, statistics, with_error
from .supercell import Supercell
from .symmetry import Pattern, primitive_cell, searched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

WAYS = ("model", *KINDS)
CHOICES = ("given", "auto")
AUTO = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1)
"""Temperatures where none are given, parts of the mean-field temperature."""
BURN = 0.4
"""Trajectories before the first sample, as a part of those that are kept."""
STEPS_BETWEEN = 10
TIME_STEP = 0.08
"""Step of the thermal motion of the spin model, in radian of the fastest precession."""
DAMPING = 0.5
ORDERED = 0.6
"""A Binder cumulant above this at the highest temperature means that the order was never lost."""
TEMPERATURES = ("tc_mean_field", "tc_rpa", "tc_peak", "tc_binder")
FIELDS = ("order", "susceptibility", "heat", "binder", "energy")
MEASURED = {("Fe", 229): (1043.0, "bcc Fe"), ("Ni", 225): (627.0, "fcc Ni"), ("CrN", 225): (280.0, "CrN")}
"""Measured ordering temperatures in K by primitive formula and space group."""


@dataclass(frozen=True)
class CurieOptions(Options):
    """Options of the ordering temperature.

    Parameters
    ----------
    ways : ``model`` is the bilinear spin model at a temperature in Spirit; ``directions``, ``moments`` and ``lattice``
        sample the potential itself: directions at fixed |m|, magnitudes too, atoms too.
    temperatures : K; by default parts of the mean-field temperature.
    sizes : repeats of the primitive cell along each vector, the smaller first, where the potential is sampled.
    trajectories : kept per walker and temperature.
    steps : leapfrog steps of a trajectory.
    walkers : side by side at each temperature.
    model_sizes : repeats of the primitive cell where the spin model is sampled.
    model_samples : samples of it, ten steps apart.
    measure : volume element of moments whose magnitudes move: ``volume`` d³m, ``line`` d|m| dΩ.
    seed : of all random numbers.
    committee : every member of a committee, or its first alone.
    radius : least distance within which exchange is wanted, Å.
    tolerance : largest |J| that may be left beyond the supercell of the exchange, relative to the largest.
    max_atoms : largest supercell of the exchange.
    orders : sample the order given, or the collinear one of lowest energy, positions fixed.
    max_cells : primitive cells of the largest supercell of an order.
    max_orders : most orders.
    """

    ways: tuple[str, ...] = option(
        ("directions", "moments"), "what is sampled beside mean field and RPA; model needs Spirit", WAYS
    )
    temperatures: tuple[float, ...] = option((), "temperatures in K; by default parts of the mean-field one")
    sizes: tuple[int, ...] = option((2,), "repeats of the primitive cell where the potential is sampled")
    trajectories: int = option(80, "trajectories kept per walker and temperature")
    steps: int = option(6, "leapfrog steps of a trajectory")
    walkers: int = option(1, "walkers at each temperature")
    model_sizes: tuple[int, ...] = option((6, 10), "repeats of the primitive cell where the spin model is sampled")
    model_samples: int = option(500, "samples of that walk, ten steps apart")
    measure: str = option("volume", "volume element of moments: d³m (volume) or d|m| dΩ (line)", ("volume", "line"))
    seed: int = option(0, "seed of all random numbers")
    committee: bool = option(False, "every member of a committee, or its first alone")
    radius: float = option(5.0, "least distance within which exchange is wanted, Å")
    tolerance: float = option(1e-2, "largest |J| left beyond the exchange's supercell, relative to the largest")
    max_atoms: int = option(1000, "largest supercell of the exchange, in atoms")
    orders: str = option(
        "given", "order that is sampled, or auto for the lowest collinear one; --order auto asks for that", CHOICES
    )
    max_cells: int = option(2, "primitive cells of the largest supercell of an order")
    max_orders: int = option(20, "most orders to try")

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if any(t <= 0 for t in self.temperatures) or list(self.temperatures) != sorted(set(self.temperatures)):
            raise OptionError("temperatures must be positive, rising and distinct, in K")
        if len(set(self.ways)) < len(self.ways):
            raise OptionError("ways holds one twice; name each once")
        for name in ("sizes", "model_sizes"):
            sizes = getattr(self, name)
            if not sizes or list(sizes) != sorted(set(sizes)) or not 1 <= sizes[0] <= sizes[-1] <= 100:
                raise OptionError(f"{name} must be rising and distinct whole numbers between 1 and 100")
        for name, low, high in (
            ("trajectories", 8, 10**7),
            ("steps", 1, 1000),
            ("walkers", 1, 1000),
            ("max_cells", 1, 16),
            ("max_orders", 2, 1000),
        ):
            if not low <= getattr(self, name) <= high:
                raise OptionError(f"{name} cannot be {getattr(self, name)}; it lies between {low} and {high}")
        if self.model_samples < 8:
            raise OptionError(f"model_samples cannot be {self.model_samples}; give 8 or more")
        if self.orders == "given":
            refuse_idle(self, ("max_cells", "max_orders"), "the order is given, not auto")
        if "model" not in self.ways:
            refuse_idle(self, ("model_sizes", "model_samples"), "model is not among the ways")
        if set(self.ways) <= {"model"}:
            refuse_idle(self, ("sizes", "trajectories", "steps", "walkers"), "only the spin model is sampled")
        if not {"moments", "lattice"} & set(self.ways):
            refuse_idle(self, ("measure",), "|m| does not move")


class Curie(Property):
    """Ordering temperature of a collinear order, several ways side by side."""

    name = "curie"
    title = "ordering temperature"
    options_type: ClassVar[type[Options]] = CurieOptions
    soc = False

    def __init__(self, options: Options | None = None, **named: Any) -> None:
        super().__init__(options, **named)
        self._temperatures: Array | None = None
        self._order: tuple[CollinearOrder, float] | None = None

    def prepare(self, atoms: Atoms, members: Sequence[SpinCalculator], progress: Progress) -> "Curie":
        """Return a property with the order that all members share.

        Temperatures, where none are given, are those of the first member for all.
        """
        shared = Curie(self.options)
        if self.options.orders == "auto":
            shared._order = self._lowest(atoms, members, progress)
        return shared

    def _orders(self, atoms: Atoms) -> list[CollinearOrder]:
        """Return the collinear orders to try."""
        moments, options = moments_of(atoms), self.options
        limits = options.max_cells, options.max_orders, options.symprec, options.mag_symprec
        return collinear_orders(atoms, np.linalg.norm(moments, axis=1), Pattern.of(moments).axis, *limits)

    def _lowest(
        self, atoms: Atoms, members: Sequence[SpinCalculator], progress: Progress
    ) -> tuple[CollinearOrder, float]:
        """Return the order of the lowest mean energy over the members, and how far the next lies above in eV/atom."""
        orders = self._orders(atoms)
        found, failures = [], []
        for k, order in enumerate(orders):
            progress("orders", k, len(orders))
            try:
                moments = [m.relax_moments([order.atoms], self.mode(m))[0] for m in members]
                energies = [m.energy(order.atoms, x) for m, x in zip(members, moments, strict=True)]
            except ConvergenceError as error:
                failures.append(f"{order.name}: {error}")
                continue
            kept = np.mean([order_is_kept(moments_of(order.atoms), x) for x in moments])
            energy = float(np.mean(energies)) / len(order.atoms)
            found.append((float(rank(energy, kept)), energy, k))
        progress("orders", len(orders), len(orders))
        if not found:
            raise ConvergenceError(f"no order has moments that converge; of {failures[0]}")
        found.sort()
        _, lowest, best = found[0]
        if orders[best].name == "nm":
            raise MomentError("the state without moments is the lowest, so there is no order; give another structure")
        return orders[best], min((e - lowest for _, e, _ in found if e - lowest > SAME_ENERGY), default=np.nan)

    def run(self, structure: Atoms, calculator: Any, *args: Any, **named: Any) -> xr.Dataset:
        """Compute the property, with the first member of a committee alone unless the whole is asked for."""
        asked = calculator if isinstance(calculator, SpinCalculator) else SpinCalculator(calculator)
        return super().run(structure, asked if self.options.committee else asked.members[0], *args, **named)

    def check(self, atoms: Atoms, calculator: SpinCalculator) -> None:
        """Refuse orders that are not collinear, and the spin model where its engine is missing."""
        super().check(atoms, calculator)
        moments = moments_of(atoms)
        if np.linalg.norm(moments, axis=1).max() <= ZERO_MOMENT:
            raise MomentError("no atom carries a moment, so there is no magnetic order; give moments in µB")
        if not Pattern.of(moments).collinear:
            raise MomentError("an ordering temperature is that of a collinear order; give moments along one axis")
        if self.options.orders == "auto":
            self._orders(atoms)
        if "model" in self.options.ways and not spirit_is_installed():
            raise CalculatorError(
                "the spin model is sampled with Spirit, which is not installed; "
                "install it (pip install spirit), or leave model out of --ways"
            )

    def compute(self, atoms: Atoms, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Compute every way with one model."""
        options = self.options
        if self._order is not None:
            atoms = self._order[0].atoms
        start = Pattern.of(moments_of(atoms))
        cell, along = primitive_cell(atoms, start.along, options.symprec, options.mag_symprec)
        reference = with_moments(cell, along[:, None] * start.axis)
        moments = calculator.relax_moments([reference], self.mode(calculator))[0]
        reached = Pattern.of(moments) if np.abs(moments).max() > ZERO_MOMENT else None
        if reached is not None and reached.collinear:
            # sites that began apart may have become one
            cell, along = primitive_cell(cell, reached.along, options.symprec, options.mag_symprec)
            moments = along[:, None] * reached.axis
        exchange = Exchange(
            states=0,
            points=11,
            radius=options.radius,
            tolerance=options.tolerance,
            max_atoms=options.max_atoms,
            moments="fixed",
            symprec=options.symprec,
            mag_symprec=options.mag_symprec,
        ).run(with_moments(cell, moments), calculator, progress)
        mean_field = float(exchange["tc_mean_field"])
        if self._temperatures is None:
            if not options.temperatures and not (np.isfinite(mean_field) and float(exchange["J_zero"]) > 0):
                reason = exchange.attrs.get("note", "there is no exchange")
                raise OptionError(f"no temperature to start from, as {reason}; give --temperatures in K")
            self._temperatures = np.array(options.temperatures or _around(mean_field), dtype=float)
        temperatures = self._temperatures

        runs: list[tuple[str, int, int]] = []
        tables: list[list[Statistics]] = []
        rates: list[list[list[float]]] = []
        for way in options.ways:
            for size in options.model_sizes if way == "model" else options.sizes:
                found = []
                for k, temperature in enumerate(temperatures):
                    stage = f"{way}, {size} cells, {temperature:g} K"
                    ask = self._model if way == "model" else self._potential
                    key = {
                        "options": {
                            name: getattr(options, name)
                            for name in ("trajectories", "steps", "walkers", "measure", "model_samples", "seed")
                        },
                        "cell": with_moments(cell, moments),
                        "way": way,
                        "size": size,
                        "temperature": [float(temperature), k],
                        "exchange": exchange["tensor"].values if way == "model" else 0,
                    }
                    part = calculator.part(
                        "walk",
                        key,
                        lambda a=ask, w=way, s=size, t=temperature, n=stage, i=k, y=key: a(  # type: ignore[misc]
                            w, s, float(t), cell, moments, exchange, calculator, i, y, lambda d, f: progress(n, d, f)
                        ),
                    )
                    found.append(part)
                tables.append(
                    [
                        statistics(p["energy"], p["order"], BOLTZMANN * t)
                        for p, t in zip(found, temperatures, strict=True)
                    ]
                )
                rates.append([[float(p[k].mean()) for p in found] for k in ("acceptance", "length", "longest")])
                count = int((np.linalg.norm(moments, axis=1) >= SMALLEST_MOMENT).sum())
                runs.append((way, size, size**3 * count))
        return self._dataset(cell, moments, exchange, temperatures, runs, tables, rates)

    def _potential(
        self,
        way: str,
        size: int,
        temperature: float,
        cell: Atoms,
        moments: Array,
        exchange: xr.Dataset,
        calculator: SpinCalculator,
        index: int,
        key: dict[str, Any],
        tell: Callable[[int, int], None],
    ) -> dict[str, Array]:
        """Walk in the potential itself; the order vector is Σ σ_i m_i over Σ |m_i| of the reference."""
        options = self.options
        sites = np.flatnonzero(np.linalg.norm(moments, axis=1) >= SMALLEST_MOMENT)
        box = Supercell(cell, sites, (size, size, size))
        repeated = box.tiled(moments)
        seed = [options.seed, WAYS.index(way), size, index]
        walk = Walkers(
            box.atoms,
            repeated,
            box.magnetic,
            calculator,
            temperature,
            cast(Kind, way),
            options.walkers,
            int(np.random.SeedSequence(seed).generate_state(1)[0]),
            cast(Measure, options.measure),
        )
        start = walk.slope.energy[0]
        with warnings.catch_warnings():
            # how far the moments reach is recorded; a warning at every step of a walk would say it a hundred times
            warnings.simplefilter("ignore", UserWarning)
            found = walk.run(
                int(np.ceil(BURN * options.trajectories)),
                options.trajectories,
                options.steps,
                tell,
                lambda block, ask: calculator.part("trajectories", {**key, "block": block}, ask),
            )
        signs = np.sign(repeated[box.magnetic] @ Pattern.of(moments).axis)
        total = np.linalg.norm(repeated[box.magnetic], axis=1).sum()
        return {
            "energy": found["energy"] - start,
            "order": np.einsum("i,sbix->sbx", signs, found["moments"]) / total,
            "acceptance": found["acceptance"],
            "length": np.linalg.norm(found["moments"], axis=-1).mean(axis=-1),
            "longest": np.linalg.norm(found["moments"], axis=-1).max(),
        }

    def _model(
        self,
        way: str,
        size: int,
        temperature: float,
        cell: Atoms,
        moments: Array,
        exchange: xr.Dataset,
        calculator: SpinCalculator,
        index: int,
        key: dict[str, Any],
        tell: Callable[[int, int], None],
    ) -> dict[str, Array]:
        """Walk in the spin model with Spirit."""
        seed = int(np.random.SeedSequence([self.options.seed, size, index]).generate_state(1)[0] % 2**30)
        return spirit_walk(exchange, size, temperature, self.options.model_samples, seed, tell)

    def _dataset(
        self,
        cell: Atoms,
        moments: Array,
        exchange: xr.Dataset,
        temperatures: Array,
        runs: list[tuple[str, int, int]],
        tables: list[list[Statistics]],
        rates: list[list[list[float]]],
    ) -> xr.Dataset:
        lengths = np.linalg.norm(moments, axis=1)
        magnetic = lengths >= SMALLEST_MOMENT
        count = np.array([n for _, _, n in runs])[:, None]
        kt = BOLTZMANN * temperatures
        values = {k: np.array([[getattr(s, k)[0] for s in row] for row in tables]) for k in FIELDS}
        errors = {k: np.array([[getattr(s, k)[1] for s in row] for row in tables]) for k in FIELDS}
        squared = (lengths[magnetic].sum() / magnetic.sum()) ** 2
        scales = {
            "order": 1.0,
            "susceptibility": squared * count,
            "heat": 1 / count,
            "binder": 1.0,
            "energy": 1e3 / count,
        }
        texts = {
            "order": ("1", "|Σ σ_i m_i| over the sum of |m_i| of the reference"),
            "susceptibility": ("µB²/eV", "N (⟨M²⟩ - ⟨|M|⟩²)/kT per magnetic atom"),
            "heat": ("1", "configurational heat capacity per magnetic atom, in k_B"),
            "binder": ("1", "1 - ⟨M⁴⟩/3⟨M²⟩²"),
            "energy": ("meV", "energy above the reference per magnetic atom"),
        }
        dims = ("run", "temperature")
        data: dict[str, Any] = {}
        for key in FIELDS:
            units, text = texts[key]
            data[key] = variable(dims, values[key] * scales[key], units, text)
            data[f"{key}_error"] = variable(dims, errors[key] * scales[key], units, f"{text}, standard error")
        data["correlation"] = variable(
            dims, np.array([[s.time for s in row] for row in tables]), "1", "autocorrelation time in samples"
        )
        for k, (key, units, text) in enumerate(
            (
                ("acceptance", "1", "share of trajectories that were accepted"),
                ("length", "µB", "mean |m|"),
                ("longest", "µB", "largest |m| of all samples"),
            )
        ):
            data[key] = variable(dims, np.array([row[k] for row in rates]), units, text)
        by_peak, by_crossing = [], []
        for way in self.options.ways:
            mine = [k for k, (w, _, _) in enumerate(runs) if w == way]
            last = mine[-1]
            if values["binder"][last][-1] > ORDERED:
                by_peak.append((np.nan, np.nan))
                by_crossing.append((np.nan, np.nan))
                continue
            chi = (data["susceptibility"].values[last], data["susceptibility_error"].values[last])
            by_peak.append(with_error(lambda x: peak(temperatures, x), [chi]))
            curves = [(values["binder"][k], errors["binder"][k]) for k in mine[-2:]]
            by_crossing.append(
                with_error(lambda a, b: crossing(temperatures, a, b), curves) if len(mine) > 1 else (np.nan, np.nan)
            )
        for key, found, text in (
            ("tc_peak", by_peak, "where the susceptibility of the largest size peaks"),
            ("tc_binder", by_crossing, "where the Binder cumulants of the two largest sizes cross"),
        ):
            data[key] = variable("way", np.array([v for v, _ in found]), "K", text)
            data[f"{key}_error"] = variable("way", np.array([e for _, e in found]), "K", f"{text}, standard error")
        for key in ("tc_mean_field", "tc_rpa"):
            data[key] = exchange[key].variable
        data["moment"] = variable((), lengths[magnetic].mean(), "µB", "mean |m| of the reference")
        data["thermal_energy"] = variable("temperature", kt * 1e3, "meV", "kT")
        measured = measured_temperature(cell)
        data["tc_measured"] = variable((), measured[0], "K", "measured ordering temperature, NaN where none is known")
        coords: dict[str, Any] = {
            "temperature": variable("temperature", temperatures, "K", "temperature"),
            "run_way": variable("run", np.array([w for w, _, _ in runs]), "1", "what is sampled"),
            "run_size": variable("run", np.array([s for _, s, _ in runs]), "1", "repeats of the primitive cell"),
            "run_atoms": variable("run", np.array([n for _, _, n in runs]), "1", "magnetic atoms"),
            "way": variable("way", np.array(self.options.ways), "1", "what is sampled"),
        }
        attrs = {
            "primitive_cell": cell.cell[:].tolist(),
            "measured": measured[1],
            "ordering": str(exchange.attrs["ordering"]),
            **self._order_attributes(),
            **({"note": exchange.attrs["note"]} if "note" in exchange.attrs else {}),
        }
        return xr.Dataset(data, coords, attrs)

    def _order_attributes(self) -> dict[str, Any]:
        """Return what says which order was sampled, where it was looked for."""
        if self._order is None:
            return {}
        order, ahead = self._order
        return {"order": order.name, "order_ahead": 1e3 * ahead, "order_structure": encode(order.atoms)}

    def finish(self, dataset: xr.Dataset, calculator: SpinCalculator) -> xr.Dataset:
        """Average over the members that have a temperature, and the statistical errors as those of a mean."""
        dataset = over_members(dataset, TEMPERATURES)
        for name in (*FIELDS, "tc_peak", "tc_binder"):
            if f"{name}_member" in dataset:
                errors = dataset[f"{name}_error_member"].values
                finite = np.isfinite(errors)
                total = np.sqrt((np.where(finite, errors, 0.0) ** 2).sum(axis=0))
                count = finite.sum(axis=0)
                mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
                dataset[f"{name}_error"] = dataset[f"{name}_error"].copy(data=mean)
        return dataset

    def summary(self, dataset: xr.Dataset) -> list[Row]:
        """Return the ordering temperatures side by side."""
        rows = []
        if "order" in dataset.attrs:
            ahead = f"{dataset.attrs['order']}, {float(dataset.attrs['order_ahead']):.3g} meV/atom below the next"
            rows.append(Row("lowest order", ahead))
        rows += [Row("moment of the reference", float(dataset["moment"]), "µB", spread_of(dataset, "moment"))]
        for name, key, detail in (
            ("tc_mean_field", "mean field of J", f", {dataset.attrs['ordering']}"),
            ("tc_rpa", "RPA of J", ""),
        ):
            if np.isfinite(float(dataset[name])):
                label = f"{key}{detail}{of_members(dataset, name)}"
                rows.append(Row(label, float(dataset[name]), "K", spread_of(dataset, name), key))
        names = {
            "model": "spin model of J",
            "directions": "potential, directions",
            "moments": "potential, directions and |m|",
            "lattice": "potential, moments and atoms",
        }
        for k, way in enumerate(dataset["way"].values):
            sizes = dataset["run_atoms"].values[dataset["run_way"].values == way]
            for key, label in (("tc_peak", "peak of χ"), ("tc_binder", "Binder crossing")):
                if key == "tc_binder" and len(sizes) < 2:
                    continue
                used = f"{sizes[-1]}" if key == "tc_peak" else f"{sizes[-2]} and {sizes[-1]}"
                about = f"{names[str(way)]}, {label}"
                value, error = float(dataset[key][k]), float(dataset[f"{key}_error"][k])
                if np.isfinite(value):
                    spread = float(dataset[f"{key}_std"][k]) if f"{key}_std" in dataset else None
                    some = of_members(dataset, key, way=k)
                    rows.append(Row(f"{about}, {used} moments{some}", value, "K", spread, about, error))
                    continue
                ordered = float(dataset["binder"].values[dataset["run_way"].values == way][-1, -1]) > ORDERED
                nothing = (
                    f"above {dataset['temperature'].values[-1]:g}, still ordered there" if ordered else "none seen"
                )
                rows.append(Row(f"{about}, {used} moments", nothing, "K", key=about))
        if np.isfinite(float(dataset["tc_measured"])):
            label = f"measured, {dataset.attrs['measured']}"
            rows.append(Row(label, float(dataset["tc_measured"]), "K", key="measured"))
        ways = [names[str(way)] for way in dataset["run_way"].values]
        for run, way_name in enumerate(ways):
            low, high = float(dataset["acceptance"][run].min()), float(dataset["acceptance"][run].max())
            label = f"{way_name}, {dataset['run_atoms'].values[run]} moments"
            size = f"{way_name}, size {ways[: run + 1].count(way_name)}"
            rows.append(Row(f"M(T), {label}", _series(dataset, "order", run), key=f"M(T), {size}"))
            if np.isfinite(low):
                rows.append(Row(f"|m|(T), {label}", _series(dataset, "length", run), "µB", key=f"|m|(T), {size}"))
                rows.append(Row(f"accepted, {label}", f"{low:.2f} to {high:.2f}", key=f"accepted, {size}"))
        return rows

    def plot(self, dataset: xr.Dataset) -> "Figure":
        """Draw M, χ, C and the Binder cumulant against temperature."""
        from .plot import plot_curie

        return plot_curie(dataset)


def _around(mean_field: float) -> Array:
    """Return the default temperatures for a mean-field estimate in K: whole ones, or to its third digit."""
    return np.round(mean_field * np.array(AUTO), max(0, 2 - int(np.floor(np.log10(mean_field)))))


def _series(dataset: xr.Dataset, name: str, run: int) -> str:
    """Return the values of one run at all temperatures, each with its committee spread."""
    values = [f"{x:.2f}" for x in dataset[name].values[run]]
    if f"{name}_std" in dataset:
        values = [f"{x} ± {s:.2f}" for x, s in zip(values, dataset[f"{name}_std"].values[run], strict=True)]
    return "  ".join(values)


def measured_temperature(cell: Atoms) -> tuple[float, str]:
    """Return the measured ordering temperature of a crystal in K and its name, NaN where none is known."""
    data = searched(
        spglib.get_symmetry_dataset, (cell.cell[:], cell.get_scaled_positions(), cell.numbers), symprec=1e-2
    )
    if data is None:
        return np.nan, "nothing known"
    reduced = cell.symbols.formula.reduce()[0].format("metal")
    return MEASURED.get((str(reduced), int(data.number)), (np.nan, "nothing known"))


def spirit_is_installed() -> bool:
    """Say whether Spirit can be imported."""
    try:
        import_module("spirit.state")
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what a shared library prints off standard output."""
    sys.stdout.flush()
    saved, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nothing)


def spirit_walk(
    exchange: xr.Dataset,
    size: int,
    temperature: float,
    samples: int,
    seed: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Array]:
    """Sample the spin model of an exchange dataset with Spirit's thermal Landau-Lifshitz-Gilbert motion.

    Its Metropolis sweeps (2.2.0) are not used: they miss ⟨e·e'⟩ of a chain whatever their cone, 0.38 where it is 0.42.

    Parameters
    ----------
    exchange : dataset of `Exchange`; symmetric anisotropic parts are left out.
    size : cells along each vector.
    temperature : K.
    samples : ten steps apart, after a third as many that are not kept.
    seed : of Spirit's random numbers.
    tell : called with samples done and their total.

    Returns
    -------
    ``energy`` (S, 1) in eV above the reference, ``order`` (S, 1, 3) as Σ σ_i m_i over Σ |m_i|, ``acceptance`` NaN.
    """
    simulation, state, system, llg = (
        import_module(f"spirit.{name}") for name in ("simulation", "state", "system", "parameters.llg")
    )
    text = spirit(spin_table(exchange), drop=True, cells=size)["spirit.cfg"]
    text += f"log_to_file 0\nlog_to_console 0\nllg_seed {seed}\n"
    signs, weights = np.sign(exchange["moments"].values), np.abs(exchange["moments"].values)
    sums = np.bincount(np.searchsorted(exchange["site"], exchange["i"]), np.abs(exchange["J"]), len(signs))
    fastest = float((2 * G_FACTOR * sums / weights).max()) / (HBAR * 1e15)
    energies, orders = [], []
    with tempfile.TemporaryDirectory() as folder, _silence():
        path = Path(folder) / "spirit.cfg"
        path.write_text(text)
        with state.State(str(path), quiet=True) as handle:
            reference = signs[:, None] * exchange["direction"].values
            system.get_spin_directions(handle)[:] = np.tile(reference, (size**3, 1))
            system.update_data(handle)
            start = system.get_energy(handle)
            llg.set_temperature(handle, temperature)
            llg.set_damping(handle, DAMPING)
            llg.set_timestep(handle, TIME_STEP / fastest)
            llg.set_convergence(handle, -1.0)
            burn = samples // 3
            limit = 2 * STEPS_BETWEEN * (samples + burn)
            method, solver = simulation.METHOD_LLG, simulation.SOLVER_SIB
            simulation.start(handle, method, solver, n_iterations=limit, n_iterations_log=limit, single_shot=True)
            simulation.n_shot(handle, STEPS_BETWEEN * burn)
            for k in range(samples):
                simulation.n_shot(handle, STEPS_BETWEEN)
                system.update_data(handle)
                energies.append((system.get_energy(handle) - start) * 1e-3)
                spins = np.array(system.get_spin_directions(handle), dtype=float).reshape(-1, len(signs), 3)
                orders.append(np.einsum("i,cix->x", signs * weights, spins) / (len(spins) * weights.sum()))
                if k % 100 == 99:
                    tell(k + 1, samples)
            simulation.stop(handle)
    return {
        "energy": np.array(energies)[:, None],
        "order": np.array(orders)[:, None],
        "acceptance": np.array(np.nan),
        "length": np.array([np.nan]),
        "longest": np.array(np.nan),
    }
