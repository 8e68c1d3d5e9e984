"""Sampling at a temperature against integrals that are known."""

import numpy as np
import pytest
from ase import Atoms
from mmace_props.protocol import SpinCalculator
from mmace_props.sampling import (
    Walkers,
    autocorrelation_time,
    crossing,
    peak,
    statistics,
    with_error,
)

from .toys import CapableToy, Heisenberg, Landau, Tether, Uniaxial, Zeeman

BOLTZMANN = 8.617333262e-5
T = 600.0
KT = BOLTZMANN * T


def lone(count=4):
    """Atoms too far from each other to interact."""
    return Atoms("Fe" * count, positions=[[4.0 * k, 0, 0] for k in range(count)], cell=[4.0 * count, 4, 4], pbc=True)


def walkers(atoms, moments, toy, kind, **options):
    return Walkers(atoms, np.array(moments, float), np.arange(len(atoms)), SpinCalculator(toy), T, kind, **options)


def agrees(samples, expected, sigmas=4.5, resolution=0.03):
    """Check a mean over samples (S, ...) against its expected value in units of its error, and that this is small."""
    flat = samples.reshape(len(samples), -1)
    time = autocorrelation_time(flat)
    error = flat.std() * np.sqrt(2 * time / flat.size)
    assert error < resolution * max(abs(expected), flat.std())
    assert abs(flat.mean() - expected) < sigmas * error


def langevin(x):
    return 1 / np.tanh(x) - 1 / x


def test_moments_in_a_field():
    """⟨cos θ⟩ is Langevin's function, the energy its field, and the heat its derivative."""
    field, m = 0.05, 2.0
    walk = walkers(lone(), np.tile([0, 0, m], (4, 1)), CapableToy(Zeeman(field)), "directions", walkers=32)
    found = walk.run(60, 600, 5)
    x = field * m / KT
    agrees(found["moments"][..., 2] / m, langevin(x))
    agrees(found["moments"][..., 0] / m + 1, 1.0)
    np.testing.assert_allclose(found["energy"], -field * found["moments"][..., 2].sum(axis=2), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(found["moments"], axis=-1), m, rtol=1e-12)
    heat = statistics(found["energy"], found["moments"].sum(axis=2), KT).heat
    assert abs(heat[0] - 4 * (1 - x**2 / np.sinh(x) ** 2)) < 4.5 * heat[1]
    assert heat[1] < 0.1
    assert 0.6 < float(found["acceptance"]) < 0.95


def test_two_spins():
    """A Heisenberg pair: ⟨e₁·e₂⟩ = coth x - 1/x with x = 2J m²/kT, both ij and ji in the sum."""
    atoms = Atoms("Fe2", positions=[[0, 0, 0], [2.0, 0, 0]], cell=[9, 9, 9], pbc=True)
    j, m = 9e-3, 2.0
    walk = walkers(
        atoms, np.tile([0, 0, m], (2, 1)), CapableToy(Heisenberg(j, 2.5), soc=False), "directions", walkers=64, seed=4
    )
    found = walk.run(60, 500, 5)["moments"] / m
    agrees(np.sum(found[:, :, 0] * found[:, :, 1], axis=-1), langevin(2 * j * m**2 / KT))


@pytest.mark.parametrize("measure", ["volume", "line"])
def test_magnitudes_in_their_well(measure):
    """A Landau well: ⟨m²⟩ and ⟨E⟩ by quadrature, with the volume element that is asked for."""
    a, b = 0.08, 0.012
    walk = walkers(
        lone(), np.tile([0, 0, 1.8], (4, 1)), CapableToy(Landau(a, b)), "moments", walkers=32, measure=measure, seed=7
    )
    found = walk.run(80, 800, 5)
    m = np.linspace(1e-6, 6, 20001)
    energy = -a * m**2 + b * m**4
    weight = np.exp(-energy / KT) * (m**2 if measure == "volume" else 1.0)
    squares = np.trapezoid(weight * m**2, m) / np.trapezoid(weight, m)
    agrees((found["moments"] ** 2).sum(axis=-1), squares)
    agrees(found["energy"] / 4, np.trapezoid(weight * energy, m) / np.trapezoid(weight, m))
    # the two measures differ by far more than the errors
    other = np.exp(-energy / KT) * (1.0 if measure == "volume" else m**2)
    assert abs(np.trapezoid(other * m**2, m) / np.trapezoid(other, m) - squares) > 0.2


def test_atoms_and_moments_together():
    """Tethered atoms whose place couples to their moments: integrating the atoms out leaves -g²/k (m_z²)² in all."""
    home = np.array([[0.0, 0, 0], [4.0, 0, 0]])
    atoms = Atoms("Fe2", positions=home, cell=[8, 4, 4], pbc=True)
    k, g, a, b = 1.5, 0.08, 0.08, 0.012
    terms = (Tether(home, k, g), Landau(a, b))
    walk = walkers(atoms, np.tile([0, 0, 1.8], (2, 1)), CapableToy(*terms), "lattice", walkers=4, seed=3)
    found = walk.run(40, 500, 4)
    # the centre is held, so u₁ = -u₂ = u: E = k u² - g u (m₁² + m₂²) → -g² (m₁z² + m₂z²)²/4k
    r = np.linspace(0.02, 4, 60)
    c = np.linspace(-1, 1, 41)
    grid = np.stack(np.meshgrid(r, c, indexing="ij"), axis=-1).reshape(-1, 2)
    square, z2 = grid[:, 0] ** 2, (grid[:, 0] * grid[:, 1]) ** 2
    ends = np.where(np.isclose(np.abs(grid[:, 1]), 1), 0.5, 1.0)
    own = -a * square + b * square**2
    joint = own[:, None] + own[None] - g**2 * (z2[:, None] + z2[None]) ** 2 / (4 * k)
    weight = (square * ends)[:, None] * (square * ends)[None] * np.exp(-joint / KT)
    expected = float((weight * z2[:, None]).sum() / weight.sum())
    free = np.exp(-own / KT) * square * ends
    assert abs(expected - (free * z2).sum() / free.sum()) > 0.1
    agrees(found["moments"][..., 2] ** 2, expected, resolution=0.06)
    mean_energy = float((weight * joint).sum() / weight.sum()) + 1.5 * KT
    agrees(found["energy"], mean_energy, resolution=0.06)


def test_harmonic_atoms_have_their_share():
    """½kT for every coordinate but the three of the centre."""
    home = lone(3).positions
    walk = walkers(lone(3), np.tile([0, 0, 1.0], (3, 1)), CapableToy(Tether(home, 2.0)), "lattice", walkers=4, seed=5)
    found = walk.run(20, 160, 6)
    agrees(found["energy"], 3 * KT, resolution=0.08)
    np.testing.assert_allclose(walk.state.positions.mean(axis=1), np.tile(home.mean(axis=0), (4, 1)), atol=1e-12)


@pytest.mark.parametrize("kind", ["directions", "moments", "lattice"])
def test_motion_without_damping(kind):
    """The steps are reversible, their energy error falls with the square of the step, and does not drift."""
    atoms = Atoms("Fe2", positions=[[0, 0, 0], [2.1, 0, 0]], cell=[9, 9, 9], pbc=True)
    toy = CapableToy(
        Heisenberg(3e-3, 5.0, 1.0), Landau(0.05, 0.005), Uniaxial(5e-3), Tether(atoms.positions, 6.0), soc=True
    )
    walk = walkers(atoms, [[0, 0.3, 2.2], [0.2, 0, 2.3]], toy, kind, walkers=3)
    p, v = walk.momenta()
    end, slope, p1, v1 = walk.leapfrog(walk.state, walk.slope, p, v, 0.1, 25)
    back, _, p2, _ = walk.leapfrog(end, slope, -p1, -v1, 0.1, 25)
    assert np.abs(end.moments - walk.state.moments).max() > 0.1
    np.testing.assert_allclose(back.moments, walk.state.moments, atol=1e-10)
    np.testing.assert_allclose(back.positions, walk.state.positions, atol=1e-10)
    np.testing.assert_allclose(-p2, p, atol=1e-9)
    start = walk.total(walk.state, walk.slope, p, v)
    errors = []
    for step, steps in ((0.1, 10), (0.05, 20), (0.025, 40)):
        end, slope, p1, v1 = walk.leapfrog(walk.state, walk.slope, p, v, step, steps)
        errors.append(np.abs(walk.total(end, slope, p1, v1) - start).max())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.3)
    state, slope, history = walk.state, walk.slope, []
    for _ in range(80):
        state, slope, p, v = walk.leapfrog(state, slope, p, v, 0.1, 5)
        history.append(walk.total(state, slope, p, v) - start)
    history = np.array(history)
    early, late = np.abs(history[:40]).max(), np.abs(history[40:]).max()
    assert late < 2 * early
    assert abs(history[40:].mean() - history[:40].mean()) < early


def test_seeds():
    """The same seed walks the same way, another another."""
    one, again, other = (
        walkers(lone(2), np.tile([0, 0, 2.0], (2, 1)), CapableToy(Zeeman(0.05)), "directions", seed=s).run(5, 5, 3)
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one["moments"], again["moments"])
    assert np.abs(one["moments"] - other["moments"]).max() > 1e-3


def test_errors_of_correlated_series():
    """The jackknife over blocks gives the known error of an autoregressive series, and τ its sum."""
    rng = np.random.default_rng(0)
    memory, count = 0.9, 40000
    noise = rng.normal(size=count) * np.sqrt(1 - memory**2)
    x = np.zeros(count)
    for k in range(1, count):
        x[k] = memory * x[k - 1] + noise[k]
    time = 0.5 + memory / (1 - memory)
    assert autocorrelation_time(x[:, None]) == pytest.approx(time, rel=0.15)
    order = np.stack([np.zeros(count), np.zeros(count), 10 + x], axis=1)[:, None]
    found = statistics(x[:, None], order, 0.5)
    assert found.order[1] == pytest.approx(np.sqrt(2 * time / count), rel=0.25)
    assert found.susceptibility[0] == pytest.approx(2, rel=0.1)
    assert found.heat[0] == pytest.approx(4, rel=0.1)
    free = statistics(x[:, None], rng.normal(size=(count, 1, 3)), 0.5)
    assert free.binder[0] == pytest.approx(4 / 9, abs=5 * free.binder[1])
    assert free.binder[1] < 0.01


def test_where_curves_peak_and_cross():
    """A parabola's top, lines that cross, and no number where there is none."""
    t = np.linspace(500, 1500, 6)
    assert peak(t, 7 - (t - 930) ** 2 / 1e4) == pytest.approx(930)
    assert np.isnan(peak(t, t))
    small, large = 0.6 - 1e-4 * (t - 500), 0.65 - 2e-4 * (t - 500)
    assert crossing(t, small, large) == pytest.approx(1000)
    assert np.isnan(crossing(t, large - 1, small))
    flat = np.full(6, 1e-3)
    value, error = with_error(lambda a, b: crossing(t, a, b), [(small, flat), (large, flat)])
    assert value == pytest.approx(1000)
    # a shift of either line by 1e-3 moves the crossing by 10 K
    assert 4 < error < 20
