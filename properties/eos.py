"""Equation of state: E(V) and m(V) of each magnetic state, their fits, and transitions between states."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from ase import Atoms
from numpy.typing import NDArray
from scipy.optimize import brentq, least_squares

from .base import Options, Progress, Property, Row, derived, of_members, option, over_members, spread_of, variable
from .conventions import GPA
from .errors import CalculatorError, ConvergenceError, MomentError, OptionError
from .orders import KEPT, order_is_kept
from .protocol import (
    SMALLEST_MOMENT,
    ZERO_MOMENT,
    MomentMode,
    SpinCalculator,
    bare,
    moments_of,
    with_moments,
)
from .structures import antiferromagnetic_signs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

STATES = ("fm", "afm", "nm", "given")
FITS = ("birch_murnaghan", "vinet")
TIE = 1e-8
"""Energies in eV/atom closer than this are one."""
TRANSITIONS = {
    "transition_pressure": ("GPa", "pressure of equal enthalpy, NaN where there is none in the window"),
    "transition_volume_1": ("Å³/atom", "volume of the first state at that pressure"),
    "transition_volume_2": ("Å³/atom", "volume of the second state at that pressure"),
    "crossing_volume": ("Å³/atom", "volume of equal energy, NaN where there is none in the window"),
}
WIDEST = (0.4, 2.5)
"""Volumes, relative to that of the structure, between which a minimum is looked for."""


@dataclass(frozen=True)
class EosOptions(Options):
    """Options of the equation of state.

    Parameters
    ----------
    states : magnetic states; empty takes every one the cell holds.
    volume_range : half-width of the window about each minimum, relative to its volume.
    points : volumes per window.
    """

    states: tuple[str, ...] = option((), "magnetic states; all that the cell holds where left out", STATES)
    volume_range: float = option(0.1, "half-width of the volume window about each minimum")
    points: int = option(11, "volumes per window")

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not 0.01 <= self.volume_range <= 0.3:
            raise OptionError(f"volume_range cannot be {self.volume_range:g}; it lies between 0.01 and 0.3")
        if not 6 <= self.points <= 201:
            raise OptionError(f"points cannot be {self.points}; it lies between 6 and 201")
        if len(set(self.states)) != len(self.states):
            raise OptionError("a magnetic state is named twice in states")


@dataclass(frozen=True)
class Fit:
    """A fitted curve E(V), in eV, Å³ and eV/Å³, per atom.

    Parameters
    ----------
    e0, v0, b0, b1 : minimum, its volume, bulk modulus and its pressure derivative.
    rms : root mean square of the misfit, eV.
    form : the curve.
    """

    e0: float
    v0: float
    b0: float
    b1: float
    rms: float
    form: Callable[..., Array]

    def energy(self, volume: Array | float) -> Array:
        """Return E in eV at volumes in Å³."""
        return self.form(np.asarray(volume, dtype=float), self.e0, self.v0, self.b0, self.b1)

    def pressure(self, volume: Array | float) -> Array:
        """Return -dE/dV in eV/Å³ at volumes in Å³."""
        v = np.asarray(volume, dtype=float)
        h = 1e-4 * v
        return (self.energy(v - 2 * h) - 8 * self.energy(v - h) + 8 * self.energy(v + h) - self.energy(v + 2 * h)) / (
            -12 * h
        )


def birch_murnaghan(v: Array, e0: float, v0: float, b0: float, b1: float) -> Array:
    """Return the third-order Birch-Murnaghan energy (Birch, Phys. Rev. 71, 809 (1947)); eV, Å³, eV/Å³."""
    x = (v0 / v) ** (2 / 3) - 1
    return e0 + 9 * v0 * b0 / 16 * (x**3 * b1 + x**2 * (2 - 4 * x))


def vinet(v: Array, e0: float, v0: float, b0: float, b1: float) -> Array:
    """Return the Vinet energy (Vinet et al., J. Phys. Condens. Matter 1, 1941 (1989)); eV, Å³, eV/Å³."""
    x = 1 - (v / v0) ** (1 / 3)
    k = 1.5 * (b1 - 1)
    return e0 + 9 * b0 * v0 / k**2 * (1 - (1 - k * x) * np.exp(k * x))


def fit_birch_murnaghan(volumes: Array, energies: Array) -> Fit:
    """Fit the third-order Birch-Murnaghan curve, which is a cubic in V^(-2/3), by linear least squares.

    Parameters
    ----------
    volumes : Å³ per atom, shape (n,).
    energies : eV per atom, shape (n,).

    Raises
    ------
    ConvergenceError : the points have no minimum.
    """
    scale, shift = float(volumes.mean()), float(energies.min())
    x = (scale / volumes) ** (2 / 3) - 1
    d, c, b, a = np.polyfit(x, energies - shift, 3)
    roots = np.roots([3 * d, 2 * c, b]) if abs(d) > 0 else np.array([-b / (2 * c)])
    real = [float(r.real) for r in roots if abs(r.imag) < 1e-12 and 6 * d * r.real + 2 * c > 0 and r.real > -0.9]
    if not real:
        raise ConvergenceError("E(V) has no minimum between the volumes; choose a wider volume_range or another start")
    x0 = min(real, key=abs)
    y = 1 + x0
    v0 = scale * y**-1.5
    second, third = 6 * d * x0 + 2 * c, 6 * d
    dx, ddx = -2 / 3 * y / v0, 10 / 9 * y / v0**2
    curvature = second * dx**2
    slope = third * dx**3 + 3 * second * dx * ddx
    e0 = a + b * x0 + c * x0**2 + d * x0**3 + shift
    b0, b1 = v0 * curvature, -1 - v0 * slope / curvature
    rms = float(np.sqrt(np.mean((birch_murnaghan(volumes, e0, v0, b0, b1) - energies) ** 2)))
    return Fit(float(e0), float(v0), float(b0), float(b1), rms, birch_murnaghan)


def fit_vinet(volumes: Array, energies: Array) -> Fit:
    """Fit the Vinet curve by non-linear least squares, starting from Birch-Murnaghan; units as there."""
    start = fit_birch_murnaghan(volumes, energies)
    shift = float(energies.min())
    unit = max(float(np.ptp(energies)), 1e-12)
    guess = np.array([(start.e0 - shift) / unit, 1.0, 1.0, start.b1])

    def misfit(p: Array) -> Array:
        curve = vinet(volumes, p[0] * unit, p[1] * start.v0, p[2] * start.b0, p[3])
        return (curve - (energies - shift)) / unit

    found = least_squares(misfit, guess, method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=2000)
    if found.status <= 0:
        raise ConvergenceError(f"the Vinet fit did not converge: the misfit is {unit * found.cost:.1e} eV")
    e0, v0, b0, b1 = found.x * np.array([unit, start.v0, start.b0, 1.0]) + np.array([shift, 0, 0, 0])
    rms = float(np.sqrt(np.mean(found.fun**2))) * unit
    return Fit(float(e0), float(v0), float(b0), float(b1), rms, vinet)


def crossing(difference: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function changes sign between two bounds, nearest to zero argument; NaN where it does not."""
    if not low < high:
        return np.nan
    grid = np.linspace(low, high, 201)
    values = np.array([difference(x) for x in grid])
    changes = np.flatnonzero(values[:-1] * values[1:] < 0)
    if not len(changes):
        return np.nan
    roots = [brentq(difference, grid[k], grid[k + 1], xtol=1e-13, rtol=1e-14) for k in changes]
    return float(min(roots, key=abs))


class EquationOfState(Property):
    """E(V) and m(V) of each magnetic state, with fits and transitions."""

    name = "eos"
    title = "equation of state"
    options_type: ClassVar[type[Options]] = EosOptions
    soc = False

    def __init__(self, options: Options | None = None, volumes: Array | None = None, **named: Any) -> None:
        super().__init__(options, **named)
        self._volumes = volumes

    def check(self, atoms: Atoms, calculator: SpinCalculator) -> None:
        """Refuse states that the cell does not hold."""
        super().check(atoms, calculator)
        self._states(atoms)

    def _states(self, atoms: Atoms) -> dict[str, Array]:
        """Return the initial moments of every state asked for."""
        moments = moments_of(atoms)
        lengths = np.linalg.norm(moments, axis=1)
        magnetic = bool(lengths.max() > ZERO_MOMENT)
        along = np.array([0.0, 0.0, 1.0])
        if magnetic:
            first = int(np.flatnonzero(lengths > ZERO_MOMENT)[0])
            along = moments[first] / lengths[first]
        found: dict[str, Array] = {"nm": np.zeros_like(moments)}
        reason = "the structure has no atom with a moment"
        if magnetic:
            found["given"] = moments
            found["fm"] = lengths[:, None] * along
            try:
                found["afm"] = (antiferromagnetic_signs(atoms, lengths) * lengths)[:, None] * along
            except MomentError as error:
                reason = str(error)
        if self.options.states:
            for state in self.options.states:
                if state not in found:
                    raise MomentError(f"the state {state} is not possible: {reason}")
            return {state: found[state] for state in self.options.states}
        known = [found[s] for s in ("fm", "afm") if s in found]
        if magnetic and any(np.allclose(moments, k) or np.allclose(moments, -k) for k in known):
            del found["given"]
        return {state: found[state] for state in STATES if state in found}

    def _state_mode(self, state: str, calculator: SpinCalculator) -> MomentMode:
        return "fixed" if state == "nm" else self.mode(calculator)

    def _curve(
        self, atoms: Atoms, calculator: SpinCalculator, state: str, start: Array, volumes: Array
    ) -> tuple[Array, Array]:
        """Return energies (n,) in eV and relaxed moments (n, N, 3) in µB at volumes of the cell."""
        images = [with_moments(_at_volume(atoms, v), start) for v in volumes]
        try:
            moments = calculator.relax_moments(images, self._state_mode(state, calculator))
            energies = [calculator.energy(image, m) for image, m in zip(images, moments, strict=True)]
        except (CalculatorError, ConvergenceError) as error:
            span = f"{volumes.min() / len(atoms):.2f} to {volumes.max() / len(atoms):.2f} Å³/atom"
            raise type(error)(f"the {state} state at {span}: {error}") from error
        return np.array(energies), np.array(moments)

    def prepare(self, atoms: Atoms, members: Sequence[SpinCalculator], progress: Progress) -> "EquationOfState":
        """Find the minimum of every state, and lay one grid of volumes over all of them."""
        states = self._states(atoms)
        minima = []
        for k, (state, start) in enumerate(states.items()):
            progress("find volumes", k, len(states))
            minima.append(self._coarse_minimum(atoms, members[0], state, start))
        progress("find volumes", len(states), len(states))
        width = self.options.volume_range
        low, high = min(minima) * (1 - width), max(minima) * (1 + width)
        spacing = 2 * width * float(np.mean(minima)) / (self.options.points - 1)
        count = max(self.options.points, int(np.ceil((high - low) / spacing - 1e-9)) + 1)
        return EquationOfState(self.options, np.linspace(low, high, count))

    def _coarse_minimum(self, atoms: Atoms, calculator: SpinCalculator, state: str, start: Array) -> float:
        volume = atoms.get_volume()
        factor = 1 + self.options.volume_range
        exponents = [-1, 0, 1]
        energies = dict(
            zip(
                exponents,
                self._curve(atoms, calculator, state, start, volume * factor ** np.array([-1.0, 0.0, 1.0]))[0],
                strict=True,
            )
        )
        while True:
            lowest = min(energies, key=lambda k: energies[k])
            if lowest - 1 in energies and lowest + 1 in energies:
                break
            new = lowest - 1 if lowest - 1 not in energies else lowest + 1
            if not WIDEST[0] <= factor**new <= WIDEST[1]:
                raise ConvergenceError(
                    f"E(V) of the {state} state has no minimum between {WIDEST[0]:g} and {WIDEST[1]:g} of the volume "
                    "given; start from a structure nearer to equilibrium, or leave the state out"
                )
            energies[new] = self._curve(atoms, calculator, state, start, np.array([volume * factor**new]))[0][0]
        left, middle, right = (energies[lowest + k] for k in (-1, 0, 1))
        bend = left - 2 * middle + right
        offset = 0.5 * (left - right) / bend if bend > 0 else 0.0
        return float(volume * factor ** (lowest + offset))

    def compute(self, atoms: Atoms, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Compute curves, fits and transitions with one model."""
        if self._volumes is None:
            raise OptionError("the grid of volumes is missing; call run, which lays it")
        n, states = len(atoms), self._states(atoms)
        volumes = self._volumes
        energies, moments, kept = [], [], []
        fits: dict[str, dict[str, Fit]] = {}
        for k, (state, start) in enumerate(states.items()):
            progress("states", k, len(states))
            curve, reached = self._curve(atoms, calculator, state, start, volumes)
            energies.append(curve / n)
            moments.append(reached)
            kept.append([order_is_kept(start, m) for m in reached])
            fits[state] = self._fits(state, volumes / n, curve / n)
        progress("states", len(states), len(states))
        names = list(states)
        field = {
            key: np.array([[getattr(fits[s][f], key) for f in FITS] for s in names])
            for key in Fit.__annotations__
            if key != "form"
        }
        lengths = np.linalg.norm(np.array(moments), axis=-1)
        carrying = np.linalg.norm(moments_of(atoms), axis=1) > SMALLEST_MOMENT
        mean = lengths[:, :, carrying].mean(axis=-1) if carrying.any() else lengths.mean(axis=-1)
        both, one = ("state", "volume"), ("state", "fit")
        data: dict[str, Any] = {
            "energy": variable(both, np.array(energies), "eV/atom", "energy"),
            "moment": variable(both, mean, "µB", "mean |m| of the atoms that carry a moment"),
            "site_moments": variable((*both, "site", "xyz"), np.array(moments), "µB", "moments reached"),
            "order_kept": variable(both, np.array(kept, dtype=float), "1", KEPT),
            "E0": variable(one, field["e0"], "eV/atom", "energy at the minimum"),
            "V0": variable(one, field["v0"], "Å³/atom", "volume at the minimum"),
            "B0": variable(one, field["b0"] * GPA, "GPa", "bulk modulus"),
            "B0_prime": variable(one, field["b1"], "1", "pressure derivative of the bulk modulus"),
            "fit_rms": variable(one, field["rms"], "eV/atom", "root mean square misfit"),
        }
        coords: dict[str, Any] = {
            "state": variable("state", np.array(names), "1", "magnetic state"),
            "fit": variable("fit", np.array(FITS), "1", "form of the fitted curve"),
            "volume": variable("volume", volumes / n, "Å³/atom", "volume"),
            "site": variable("site", np.arange(n), "1", "index of the atom"),
            "element": variable("site", np.array(atoms.get_chemical_symbols()), "1", "chemical symbol"),
            "xyz": variable("xyz", np.array(["x", "y", "z"]), "1", "Cartesian axis"),
        }
        pairs = list(itertools.combinations(names, 2))
        if pairs:
            found = np.array(
                [transition(fits[a][FITS[0]], fits[b][FITS[0]], volumes[0] / n, volumes[-1] / n) for a, b in pairs]
            )
            coords["transition"] = variable(
                "transition", np.array([f"{a}-{b}" for a, b in pairs]), "1", "pair of states"
            )
            for column, (key, (units, text)) in enumerate(TRANSITIONS.items()):
                factor = GPA if units == "GPa" else 1.0
                data[key] = variable("transition", found[:, column] * factor, units, text)
        return xr.Dataset(data, coords)

    def _fits(self, state: str, volumes: Array, energies: Array) -> dict[str, Fit]:
        centre = float(volumes[int(np.argmin(energies))])
        near = np.abs(volumes / centre - 1) <= 1.2 * self.options.volume_range
        if near.sum() < 6:
            near = np.zeros(len(volumes), dtype=bool)
            near[np.argsort(np.abs(volumes - centre))[:6]] = True
        fits = {
            "birch_murnaghan": fit_birch_murnaghan(volumes[near], energies[near]),
            "vinet": fit_vinet(volumes[near], energies[near]),
        }
        for fit in fits.values():
            if not volumes[0] < fit.v0 < volumes[-1]:
                raise ConvergenceError(
                    f"the minimum of the {state} state at {fit.v0:.3f} Å³/atom lies outside the volumes computed; "
                    "widen volume_range"
                )
        return fits

    def finish(self, dataset: xr.Dataset, calculator: SpinCalculator) -> xr.Dataset:
        """Average transitions over the members that have one, and name the ground state.

        It is nm where a state with moments has lost them.
        """
        dataset = over_members(dataset, list(TRANSITIONS))
        energies = dataset["E0"].sel(fit=FITS[0])
        lowest = energies["state"].values[energies.values <= energies.values.min() + TIE]
        dataset.attrs["ground_state"] = "nm" if "nm" in lowest else str(lowest[0])
        return dataset

    def summary(self, dataset: xr.Dataset) -> list[Row]:
        """Return fits and transitions as a short table."""
        rows = [Row("ground state", dataset.attrs["ground_state"])]
        ground = dataset.attrs["ground_state"]
        for state in dataset["state"].values:
            where = {"state": state, "fit": FITS[0]}
            for key, label in (("V0", "V0"), ("B0", "B0"), ("B0_prime", "B0'")):
                item = dataset[key]
                rows.append(
                    Row(
                        f"{state} {label}",
                        float(item.sel(**where)),
                        item.attrs["units"],
                        spread_of(dataset, key, **where),
                    )
                )
            vinet = {"state": state, "fit": "vinet"}
            rows.append(
                Row(f"{state} B0, Vinet", float(dataset["B0"].sel(**vinet)), "GPa", spread_of(dataset, "B0", **vinet))
            )
            if state != ground:
                above, spread = derived(dataset, partial(_above, state=state, ground=ground))
                rows.append(Row(f"{state} E0 above {ground}", above, "meV/atom", spread))
            if state != "nm":
                moment, spread = derived(dataset, partial(_moment_at_rest, state=state))
                rows.append(Row(f"{state} |m| at V0", moment, "µB", spread))
            if state != "nm" and float(dataset["moment"].sel(state=state).min()) < SMALLEST_MOMENT:
                rows.append(Row(f"{state} moments", "vanish at some volumes"))
            if (dataset["order_kept"].sel(state=state) < 1).any():
                rows.append(Row(f"{state} order", f"lost at some volumes{_who_lost(dataset, state)}"))
        for k, pair in enumerate(dataset["transition"].values if "transition" in dataset.coords else ()):
            pressure = float(dataset["transition_pressure"].sel(transition=pair))
            key, spread = f"{pair} transition", spread_of(dataset, "transition_pressure", transition=pair)
            label = f"{key}{of_members(dataset, 'transition_pressure', transition=k)}"
            rows.append(
                Row(label, pressure, "GPa", spread, key) if np.isfinite(pressure) else Row(key, "none in the window")
            )
        return rows

    def plot(self, dataset: xr.Dataset) -> "Figure":
        """Draw E(V) with its fits, and m(V)."""
        from .plot import plot_eos

        return plot_eos(dataset)


def transition(a: Fit, b: Fit, low: float, high: float) -> tuple[float, float, float, float]:
    """Find where two states change places.

    Parameters
    ----------
    a, b : curves per atom.
    low, high : the volumes computed, Å³ per atom.

    Returns
    -------
    Pressure of equal enthalpy in eV/Å³, the volumes of both there, and the volume of equal energy in Å³; NaN where
    there is none between the volumes computed.
    """

    def volume_at(fit: Fit, p: float) -> float:
        return float(brentq(lambda v: float(fit.pressure(v)) - p, low, high, xtol=1e-13, rtol=1e-14))

    def enthalpy(fit: Fit, p: float) -> float:
        v = volume_at(fit, p)
        return float(fit.energy(v)) + p * v

    same = crossing(lambda v: float(a.energy(v) - b.energy(v)), low, high)
    span = [(float(f.pressure(high)), float(f.pressure(low))) for f in (a, b)]
    margin = 1e-9 * max(abs(x) for s in span for x in s)
    least, most = max(s[0] for s in span) + margin, min(s[1] for s in span) - margin
    pressure = crossing(lambda p: enthalpy(a, p) - enthalpy(b, p), least, most)
    if not np.isfinite(pressure):
        return np.nan, np.nan, np.nan, same
    return pressure, volume_at(a, pressure), volume_at(b, pressure), same


def _above(dataset: xr.Dataset, state: str, ground: str) -> float:
    energies = dataset["E0"].sel(fit=FITS[0])
    return 1e3 * float(energies.sel(state=state) - energies.sel(state=ground))


def _moment_at_rest(dataset: xr.Dataset, state: str) -> float:
    volume = float(dataset["V0"].sel(state=state, fit=FITS[0]))
    return float(np.interp(volume, dataset["volume"], dataset["moment"].sel(state=state)))


def _who_lost(dataset: xr.Dataset, state: str) -> str:
    """Return ``", k of n members"`` where only some members lose the order of a state, else nothing."""
    if "order_kept_member" not in dataset:
        return ""
    lost = (dataset["order_kept_member"].sel(state=state) < 1).any("volume").values
    return f", {lost.sum()} of {len(lost)} members" if not lost.all() else ""


def _at_volume(atoms: Atoms, volume: float) -> Atoms:
    copy = bare(atoms)
    copy.set_cell(atoms.cell[:] * (volume / atoms.get_volume()) ** (1 / 3), scale_atoms=True)
    return copy
