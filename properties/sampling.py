"""Sampling of moments, and of moments with atoms, at a temperature by hybrid Monte Carlo, and its statistics."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from .conventions import BOLTZMANN
from .journal import Part
from .protocol import SpinCalculator, bare

Array = NDArray[np.float64]
Kind = Literal["directions", "moments", "lattice"]
KINDS: tuple[Kind, ...] = ("directions", "moments", "lattice")
Measure = Literal["volume", "line"]

ACCEPTANCE = 0.8
JITTER = 0.2
ADAPTATION = 0.5
BLOCK = 10
"""Trajectories that are kept together as a finished part."""
PROBE = 0.02
"""Size of the displacement that curvatures are estimated with, µB and Å."""


@dataclass
class State:
    """Walkers side by side.

    Parameters
    ----------
    moments : of the magnetic sites, µB, shape (B, n, 3).
    positions : of all atoms, Å, shape (B, N, 3).
    """

    moments: Array
    positions: Array


@dataclass
class Slope:
    """Energy in eV, shape (B,), and its gradients in eV/µB and eV/Å, shapes of the state."""

    energy: Array
    moments: Array
    positions: Array


class Walkers:
    """Hybrid Monte Carlo (Duane et al., Phys. Lett. B 195, 216 (1987)) of several walkers at one temperature.

    Coordinates move by leapfrog steps under momenta drawn anew for every trajectory, and the end is accepted
    with min(1, exp(-ΔH/kT)): the canonical distribution, whatever the step. Directions move along great circles
    (Byrne & Girolami, Scand. J. Stat. 40, 825 (2013)); moments and atoms in straight lines, the atoms' centre held.

    Parameters
    ----------
    atoms : the supercell.
    moments : where all walkers start, µB, shape (N, 3).
    sites : atoms whose moments move.
    calculator : gives energies and their gradients.
    temperature : K.
    kind : ``"directions"`` at fixed |m|, ``"moments"`` with their magnitudes, ``"lattice"`` with the atoms too.
    walkers : how many.
    seed : of every random number.
    measure : volume element of moments whose magnitudes move: ``"volume"`` d³m, ``"line"`` d|m| dΩ.
    """

    def __init__(
        self,
        atoms: Atoms,
        moments: Array,
        sites: NDArray[np.intp],
        calculator: SpinCalculator,
        temperature: float,
        kind: Kind,
        walkers: int = 1,
        seed: int = 0,
        measure: Measure = "volume",
    ) -> None:
        self.atoms, self.rest, self.sites, self.kind, self.measure = bare(atoms), moments, sites, kind, measure
        self.calculator = SpinCalculator(calculator.calculator)
        self.kt = BOLTZMANN * temperature
        self.rng = np.random.default_rng(seed)
        self.lengths = np.linalg.norm(moments[sites], axis=1)[:, None]
        self.state = State(np.tile(moments[sites], (walkers, 1, 1)), np.tile(atoms.positions, (walkers, 1, 1)))
        self.slope = self.evaluate(self.state)
        self.step = 0.3
        self.tried: list[float] = []
        self.scales = self._scales()

    def evaluate(self, state: State) -> Slope:
        """Return the energies of all walkers with their gradients."""
        everything = np.tile(self.rest, (len(state.moments), 1, 1))
        everything[:, self.sites] = state.moments
        if self.kind != "lattice":
            found = self.calculator.evaluate_spins(self.atoms, everything)
            return Slope(found["energy"], -found["magnetic_forces"][:, self.sites], np.zeros_like(state.positions))
        energy, by_moments, by_positions = [], [], []
        for positions, m in zip(state.positions, everything, strict=True):
            image = self.atoms.copy()
            image.set_positions(positions)
            by_positions.append(-self.calculator.forces(image, m))
            by_moments.append(-self.calculator.magnetic_forces(image, m)[self.sites])
            energy.append(self.calculator.energy(image, m))
        return Slope(np.array(energy), np.array(by_moments), np.array(by_positions))

    def _scales(self) -> tuple[float, float]:
        """Return lengths in µB and Å over which the energy rises by about kT, from curvatures at the start."""
        if self.kind == "directions":
            return 1.0, 0.0
        units = self.rest[self.sites] / self.lengths
        moved = State(self.state.moments + PROBE * units, self.state.positions)
        radial = np.einsum("bix,ix->", self.evaluate(moved).moments - self.slope.moments, units)
        curvature = radial / (PROBE * self.state.moments[..., 0].size)
        by_moment = float(np.sqrt(self.kt / max(curvature, 0.05)))
        if self.kind != "lattice":
            return by_moment, 0.0
        shift = self.rng.normal(size=self.state.positions.shape)
        moved = State(self.state.moments, self.state.positions + PROBE * shift)
        change = float(np.sum((self.evaluate(moved).positions - self.slope.positions) * shift))
        return by_moment, float(np.sqrt(self.kt / max(change / (PROBE * np.sum(shift**2)), 0.05)))

    def potential(self, state: State, slope: Slope) -> tuple[Array, Array, Array]:
        """Return the potential over kT, and its gradients by the scaled coordinates."""
        value, by_moments = slope.energy / self.kt, slope.moments / self.kt
        if self.kind == "directions":
            units = state.moments / self.lengths
            pull = by_moments * self.lengths
            return value, pull - np.sum(pull * units, axis=2, keepdims=True) * units, slope.positions
        if self.measure == "line":
            squares = np.sum(state.moments**2, axis=2, keepdims=True)
            value = value + np.log(squares).sum(axis=(1, 2))
            by_moments = by_moments + 2 * state.moments / squares
        return value, by_moments * self.scales[0], slope.positions / self.kt * self.scales[1]

    def momenta(self) -> tuple[Array, Array]:
        """Draw momenta of moments and atoms."""
        p = self.rng.normal(size=self.state.moments.shape)
        if self.kind == "directions":
            units = self.state.moments / self.lengths
            p -= np.sum(p * units, axis=2, keepdims=True) * units
        if self.kind != "lattice":
            return p, np.zeros_like(self.state.positions)
        v = self.rng.normal(size=self.state.positions.shape)
        return p, v - v.mean(axis=1, keepdims=True)

    def drift(self, state: State, p: Array, v: Array, step: float) -> tuple[State, Array]:
        """Move the coordinates for one step; momenta of directions turn along."""
        if self.kind != "directions":
            return State(state.moments + step * self.scales[0] * p, state.positions + step * self.scales[1] * v), p
        units = state.moments / self.lengths
        speed = np.linalg.norm(p, axis=2, keepdims=True)
        ahead = p / np.maximum(speed, 1e-300)
        cosine, sine = np.cos(step * speed), np.sin(step * speed)
        moved = cosine * units + sine * ahead
        moved /= np.linalg.norm(moved, axis=2, keepdims=True)
        return State(moved * self.lengths, state.positions), speed * (cosine * ahead - sine * units)

    def leapfrog(
        self, state: State, slope: Slope, p: Array, v: Array, step: float, steps: int
    ) -> tuple[State, Slope, Array, Array]:
        """Follow the motion for some steps: symplectic and reversible."""
        _, pull, push = self.potential(state, slope)
        for _ in range(steps):
            p, v = p - step / 2 * pull, v - step / 2 * (push - push.mean(axis=1, keepdims=True))
            state, p = self.drift(state, p, v, step)
            slope = self.evaluate(state)
            _, pull, push = self.potential(state, slope)
            p, v = p - step / 2 * pull, v - step / 2 * (push - push.mean(axis=1, keepdims=True))
        return state, slope, p, v

    def total(self, state: State, slope: Slope, p: Array, v: Array) -> Array:
        """Return potential and kinetic energy over kT, shape (B,)."""
        return self.potential(state, slope)[0] + ((p**2).sum(axis=(1, 2)) + (v**2).sum(axis=(1, 2))) / 2

    def trajectory(self, steps: int) -> float:
        """Move all walkers by one trajectory each; return the mean probability that it was accepted with."""
        step = self.step * (1 + JITTER * self.rng.uniform(-1, 1))
        p, v = self.momenta()
        before = self.total(self.state, self.slope, p, v)
        end, slope, p, v = self.leapfrog(self.state, self.slope, p, v, step, steps)
        change = self.total(end, slope, p, v) - before
        probability = np.exp(-np.maximum(np.where(np.isfinite(change), change, np.inf), 0.0))
        accepted = self.rng.uniform(size=len(change)) < probability
        for mine, new in (
            (self.state.moments, end.moments),
            (self.state.positions, end.positions),
            (self.slope.energy, slope.energy),
            (self.slope.moments, slope.moments),
            (self.slope.positions, slope.positions),
        ):
            mine[accepted] = new[accepted]
        return float(probability.mean())

    def snapshot(self) -> Part:
        """Return everything that decides how the walk goes on."""
        return {
            "moments": self.state.moments.copy(),
            "positions": self.state.positions.copy(),
            "slope_energy": self.slope.energy.copy(),
            "slope_moments": self.slope.moments.copy(),
            "slope_positions": self.slope.positions.copy(),
            "step": np.array(self.step),
            "tried": np.array(self.tried),
            "scales": np.array(self.scales),
            "random": np.array(json.dumps(self.rng.bit_generator.state)),
        }

    def resume(self, part: Part) -> None:
        """Go on from a snapshot."""
        self.state = State(part["moments"].copy(), part["positions"].copy())
        slopes = (part[f"slope_{name}"].copy() for name in ("energy", "moments", "positions"))
        self.slope = Slope(*slopes)
        self.step, self.tried = float(part["step"]), part["tried"].tolist()
        self.scales = float(part["scales"][0]), float(part["scales"][1])
        self.rng.bit_generator.state = json.loads(str(part["random"]))

    def run(
        self,
        burn: int,
        samples: int,
        steps: int,
        tell: Callable[[int, int], None] = lambda done, total: None,
        keep: Callable[[int, Callable[[], Part]], Part] = lambda block, walk: walk(),
    ) -> dict[str, Array]:
        """Walk, and keep a sample after every trajectory.

        Parameters
        ----------
        burn : trajectories before the first sample; the step is fitted to an acceptance of 0.8 in these alone.
        samples : trajectories that are kept.
        steps : leapfrog steps of a trajectory.
        tell : called with trajectories done and their total.
        keep : returns a block of trajectories that is known by its number, or calls what walks it.

        Returns
        -------
        ``energy`` (S, B) in eV, ``moments`` (S, B, n, 3) in µB, and ``acceptance`` and ``step``, shape ().
        """
        total = burn + samples

        def walk(begin: int) -> Part:
            energies, moments, rates = [], [], []
            for k in range(begin, min(begin + BLOCK, total)):
                if k == burn and burn:
                    self.step = float(np.exp(np.mean(np.log(self.tried[burn // 2 :]))))
                rate = self.trajectory(steps)
                if k < burn:
                    change = ADAPTATION / np.sqrt(1 + k / 5) * (rate - ACCEPTANCE)
                    self.step = float(np.clip(self.step * np.exp(change), 1e-4, 1.5))
                    self.tried.append(self.step)
                else:
                    rates.append(rate)
                    energies.append(self.slope.energy.copy())
                    moments.append(self.state.moments.copy())
                tell(k + 1, total)
            walkers = self.state.moments.shape
            return {
                "energies": np.array(energies).reshape(-1, walkers[0]),
                "samples": np.array(moments).reshape(-1, *walkers),
                "rates": np.array(rates),
                **self.snapshot(),
            }

        blocks = []
        for number, begin in enumerate(range(0, total, BLOCK)):
            blocks.append(keep(number, lambda b=begin: walk(b)))  # type: ignore[misc]
            self.resume(blocks[-1])
            tell(min(begin + BLOCK, total), total)
        return {
            "energy": np.concatenate([block["energies"] for block in blocks]),
            "moments": np.concatenate([block["samples"] for block in blocks]),
            "acceptance": np.array(np.mean(np.concatenate([block["rates"] for block in blocks]))),
            "step": np.array(self.step),
        }


def autocorrelation_time(series: Array) -> float:
    """Return the integrated autocorrelation time of series (S, B) in samples, at least ½.

    The window is Sokal's: the sum ends where it is a fifth of the window.
    """
    x = series - series.mean()
    variance = float(np.mean(x**2))
    if variance <= 0:
        return 0.5
    time = 0.5
    for lag in range(1, len(x)):
        time += float(np.mean(x[lag:] * x[:-lag])) / variance
        if lag >= 5 * time:
            break
    return max(time, 0.5)


@dataclass(frozen=True)
class Statistics:
    """Averages of a walk with their errors.

    Parameters
    ----------
    order, susceptibility, heat, binder, energy : pairs of value and standard error: ⟨|M|⟩ of the order vector M, the
        variance of |M| over kT, the variance of E over (kT)², 1 - ⟨M⁴⟩/3⟨M²⟩², ⟨E⟩ in eV.
    time : autocorrelation time of |M| in samples.
    """

    order: tuple[float, float]
    susceptibility: tuple[float, float]
    heat: tuple[float, float]
    binder: tuple[float, float]
    energy: tuple[float, float]
    time: float


def statistics(energy: Array, order: Array, kt: float) -> Statistics:
    """Average a walk; errors by the jackknife over blocks longer than the autocorrelation.

    Parameters
    ----------
    energy : eV, shape (S, B).
    order : order vectors, shape (S, B, 3).
    kt : temperature in eV.
    """
    size = np.linalg.norm(order, axis=2)
    time = max(autocorrelation_time(size), autocorrelation_time(energy))
    length = int(np.clip(np.ceil(5 * time), 1, max(len(size) // 4, 1)))
    blocks = len(size) // length
    kept = slice(len(size) - blocks * length, None)
    columns = np.stack([size, size**2, size**4, energy - energy.mean(), (energy - energy.mean()) ** 2], axis=-1)[kept]
    means = columns.reshape(blocks, length, size.shape[1], 5).mean(axis=1).reshape(-1, 5)

    def derived(average: Array) -> Array:
        first, second, fourth, offset, square = average
        return np.array(
            [first, (second - first**2) / kt, (square - offset**2) / kt**2, 1 - fourth / (3 * second**2), offset]
        )

    values = derived(means.mean(axis=0))
    count = len(means)
    left_out = np.array([derived((means.sum(axis=0) - row) / max(count - 1, 1)) for row in means])
    error = np.sqrt((count - 1) / count * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))
    values[4] += energy.mean()
    found = [(float(v), float(e)) for v, e in zip(values, error, strict=True)]
    return Statistics(found[0], found[1], found[2], found[3], found[4], time)


def peak(temperature: Array, values: Array) -> float:
    """Return where the parabola through the largest value and its neighbours has its top; NaN at the ends."""
    k = int(np.argmax(values))
    if not np.all(np.isfinite(values)) or k in (0, len(values) - 1):
        return np.nan
    a, b, _ = np.polyfit(temperature[k - 1 : k + 2] - temperature[k], values[k - 1 : k + 2], 2)
    return float(temperature[k] - b / (2 * a)) if a < 0 else np.nan


def crossing(temperature: Array, small: Array, large: Array) -> float:
    """Return where the curve of the larger size last falls below that of the smaller, NaN where it never does."""
    difference = large - small
    falls = np.flatnonzero((difference[:-1] > 0) & (difference[1:] <= 0))
    if not len(falls):
        return np.nan
    k = falls[-1]
    share = difference[k] / (difference[k] - difference[k + 1])
    return float(temperature[k] + share * (temperature[k + 1] - temperature[k]))


def with_error(function: Callable[..., float], curves: list[tuple[Array, Array]], seed: int = 0) -> tuple[float, float]:
    """Return a number drawn from curves with errors, and its spread when they are drawn from their errors.

    Parameters
    ----------
    function : of the curves.
    curves : values and standard errors.
    seed : of the draws.

    Returns
    -------
    The number and its standard error, NaN where fewer than half of the draws have one.
    """
    rng = np.random.default_rng(seed)
    value = function(*(v for v, _ in curves))
    draws = np.array([function(*(rng.normal(v, e) for v, e in curves)) for _ in range(200)])
    good = draws[np.isfinite(draws)]
    return value, float(good.std(ddof=1)) if len(good) > 100 else np.nan
