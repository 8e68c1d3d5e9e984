"""Ordering temperatures of spin models whose temperatures are known, and one engine against the other."""

import os
import tempfile

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from ase.build import bulk
from ase.io.jsonio import decode
from mmace_props import curie
from mmace_props.base import silent, write_dataset
from mmace_props.curie import Curie, measured_temperature, spirit_is_installed, spirit_walk
from mmace_props.errors import CalculatorError, MomentError, OptionError
from mmace_props.exchange import Exchange
from mmace_props.export import spin_table, spirit
from mmace_props.journal import Journal
from mmace_props.protocol import SpinCalculator, with_moments
from mmace_props.relax import Relaxation
from mmace_props.sampling import Walkers, statistics
from mmace_props.supercell import Supercell

from .test_suite_protocol import EnergyToy
from .toys import CapableToy, CommitteeToy, Heisenberg, Landau, Springs, Uniaxial

BOLTZMANN = 8.617333262e-5
J, M = 3e-3, 2.0
BOND = 2 * J * M**2
"""Energy of a bond, both ij and ji."""
SIMPLE_CUBIC = 1.44292
"""k_B T_c over the energy of a bond, classical Heisenberg model (Chen, Ferrenberg & Landau, Phys. Rev. B 48, 3249)."""

needs_spirit = pytest.mark.skipif(not spirit_is_installed(), reason="Spirit is not installed")


def cubic(m=M):
    return with_moments(bulk("Fe", "sc", a=2.4), [[0, 0, m]])


def toy():
    return CapableToy(Heisenberg(J, 2.5), soc=False)


def sampled(temperature, size=4, samples=400):
    """Energy per atom in kT and order of the simple cubic model by hybrid Monte Carlo of the calculator."""
    box = Supercell(cubic(), np.array([0]), (size,) * 3)
    start = box.tiled(np.array([[0, 0, M]]))
    walk = Walkers(box.atoms, start, box.magnetic, SpinCalculator(toy()), temperature, "directions", 8, seed=1)
    ground = walk.slope.energy[0]
    found = walk.run(60, samples, 6)
    return statistics(found["energy"] - ground, found["moments"].mean(axis=2) / M, BOLTZMANN * temperature)


@needs_spirit
def test_two_engines_on_one_model():
    """Spirit's thermal motion under the exported J and hybrid Monte Carlo of the Hamiltonian itself agree."""
    exchange = Exchange(states=0, points=5, mesh=4, radius=2.6).run(cubic(), toy())
    temperature = 0.8 * SIMPLE_CUBIC * BOND / BOLTZMANN
    here = sampled(temperature, 3, 250)
    there = spirit_walk(exchange, 3, temperature, 6000, 3)
    there = statistics(there["energy"], there["order"], BOLTZMANN * temperature)
    for name in ("energy", "order", "heat", "binder"):
        (a, da), (b, db) = getattr(here, name), getattr(there, name)
        assert abs(a - b) < 4.5 * np.hypot(da, db), name
        assert np.hypot(da, db) < 0.1 * abs(a), name


def metropolis(exchange, size, temperature, samples, seed, **cone):
    """Energies (S, 1) in eV above the start by Spirit's Metropolis sweeps, five apart."""
    from spirit import simulation, state, system
    from spirit.parameters import mc

    text = spirit(spin_table(exchange), drop=True)["spirit.cfg"]
    text = text.replace("n_basis_cells 8 8 8", f"n_basis_cells {size} {size} {size}")
    energies = []
    with tempfile.TemporaryDirectory() as folder, curie._silence():
        path = os.path.join(folder, "spirit.cfg")
        with open(path, "w") as file:
            file.write(text + f"log_to_file 0\nlog_to_console 0\nmc_seed {seed}\n")
        with state.State(path, quiet=True) as handle:
            system.get_spin_directions(handle)[:] = np.tile([0.0, 0.0, 1.0], (size**3, 1))
            system.update_data(handle)
            start = system.get_energy(handle)
            mc.set_temperature(handle, temperature)
            mc.set_metropolis_cone(handle, **cone)
            limit = 12 * samples
            simulation.start(handle, simulation.METHOD_MC, n_iterations=limit, n_iterations_log=limit, single_shot=True)
            simulation.n_shot(handle, samples)
            for _ in range(samples):
                simulation.n_shot(handle, 5)
                system.update_data(handle)
                energies.append((system.get_energy(handle) - start) * 1e-3)
            simulation.stop(handle)
    return np.array(energies)[:, None]


@needs_spirit
@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="Spirit 2.2.0's Metropolis sweeps do not sample the Boltzmann distribution",
)
@pytest.mark.parametrize(
    "cone",
    [
        {"use_cone": True, "use_adaptive_cone": True},
        {"use_cone": True, "cone_angle": 80, "use_adaptive_cone": False},
        {"use_cone": False, "use_adaptive_cone": False},
    ],
    ids=["adaptive", "cone", "sphere"],
)
def test_spirit_metropolis_on_a_chain(cone):
    """What thermal motion gives right on the chain; should sweeps do so one day, they are the better engine."""
    atoms = with_moments(Atoms("Fe", cell=[2.4, 4.0, 4.0], pbc=True), [[0, 0, M]])
    exchange = Exchange(states=0, points=5, mesh=4, radius=2.6).run(atoms, toy())
    temperature = 0.7 * BOND / BOLTZMANN
    energy = metropolis(exchange, 10, temperature, 150, 3, **cone)
    found = statistics(energy, np.ones((*energy.shape, 3)), BOLTZMANN * temperature)
    expected = 1000 * BOND * (1 - 1 / np.tanh(1 / 0.7) + 0.7)
    assert abs(found.energy[0] - expected) < 4.5 * found.energy[1] + 1e-2 * expected


@needs_spirit
def test_spirit_on_a_chain():
    """⟨e·e'⟩ of the chain is Langevin's function: factors of two, the unit of J and the temperature in one number."""
    atoms = with_moments(Atoms("Fe", cell=[2.4, 4.0, 4.0], pbc=True), [[0, 0, M]])
    exchange = Exchange(states=0, points=5, mesh=4, radius=2.6).run(atoms, toy())
    temperature = 0.7 * BOND / BOLTZMANN
    found = spirit_walk(exchange, 10, temperature, 2500, 5)
    found = statistics(found["energy"], found["order"], BOLTZMANN * temperature)
    x = 1 / 0.7
    expected = 1000 * BOND * (1 - 1 / np.tanh(x) + 1 / x)
    assert abs(found.energy[0] - expected) < 4.5 * found.energy[1] + 5e-3 * expected
    assert found.energy[1] < 3e-3 * expected
    again = spirit_walk(exchange, 4, temperature, 20, 5)["energy"]
    np.testing.assert_array_equal(spirit_walk(exchange, 4, temperature, 20, 5)["energy"], again)


def test_high_temperature_series():
    """Far above T_c the energy of a bond is -bond²/3kT (1 + …): from the series of the Langevin function."""
    temperature = 12 * BOND / BOLTZMANN
    found = sampled(temperature, size=3, samples=150)
    # 3 bonds per atom; ⟨e·e'⟩ = L(K) + four-cycles of order K³, K = bond/kT; three sites around close cycles too: L³/K
    k = 1 / 12
    langevin = 1 / np.tanh(k) - 1 / k
    energy = 27 * 3 * BOND * (1 - langevin - langevin**2)
    assert abs(found.energy[0] - energy) < 4.5 * found.energy[1] + 2e-3 * energy
    assert found.energy[1] < 3e-3 * energy
    assert found.binder[0] == pytest.approx(4 / 9, abs=0.03)


@needs_spirit
def test_simple_cubic_temperatures():
    """Mean field, RPA through Watson's integral, and the Binder crossing of the known transition."""
    exact = SIMPLE_CUBIC * BOND / BOLTZMANN
    temperatures = tuple(float(round(x * exact)) for x in (0.9, 1.0, 1.1))
    data = Curie(ways=("model",), temperatures=temperatures, model_sizes=(4, 8), model_samples=2000, radius=2.6).run(
        cubic(), toy()
    )
    mean_field = 2 / 3 * 6 * J * M**2 / BOLTZMANN
    assert float(data["tc_mean_field"]) == pytest.approx(mean_field, rel=1e-6)
    assert float(data["tc_rpa"]) == pytest.approx(mean_field / 1.5163860591519780, rel=1e-4)
    crossing, error = float(data["tc_binder"][0]), float(data["tc_binder_error"][0])
    assert error < 0.05 * exact
    assert abs(crossing - exact) < 3 * error
    assert np.all(np.diff(data["order"].values, axis=1) < 0)
    assert data["run_atoms"].values.tolist() == [64, 512]


def test_sampling_of_the_potential():
    """Small boxes of a calculator: order falls with temperature, moments that change length hold more energy."""
    exact = SIMPLE_CUBIC * BOND / BOLTZMANN
    options = {
        "ways": ("directions", "moments"),
        "temperatures": tuple(float(round(x * exact)) for x in (0.3, 1.0, 1.7)),
        "sizes": (2, 3),
        "trajectories": 40,
        "radius": 2.6,
        "moments": "magnitudes",
    }
    terms = (Heisenberg(J, 2.5), Landau(0.08, 0.012))
    data = Curie(**options).run(cubic(), CapableToy(*terms, soc=False))
    assert data["run_way"].values.tolist() == ["directions", "directions", "moments", "moments"]
    assert data["run_atoms"].values.tolist() == [8, 27, 8, 27]
    order = data["order"].values
    assert np.all(np.diff(order, axis=1) < 0)
    assert np.all((data["acceptance"].values > 0.5) & (data["acceptance"].values < 0.99))
    # three directions and one magnitude hold more energy than two directions
    assert np.all(data["energy"].values[2:, 0] > data["energy"].values[:2, 0])
    assert np.all(data["heat"].values > 0)
    again = Curie(**options).run(cubic(), CapableToy(*terms, soc=False))
    xr.testing.assert_identical(again, data)


def test_antiferromagnets_order_by_their_signs():
    """Layers of rocksalt: the order vector counts every moment with its sign, non-magnetic atoms stay out."""
    atoms = bulk("CrN", "rocksalt", a=4.1, cubic=True)
    layers = np.where(np.isclose(atoms.get_scaled_positions()[:, 2] % 1, 0), 1.0, -1.0)
    atoms = with_moments(atoms, np.where(atoms.numbers == 24, 2.5 * layers, 0.0))
    model = CapableToy(Heisenberg(-4e-3, 3.0), Heisenberg(1.5e-3, 4.2), soc=False)
    options = {"temperatures": (20.0, 3000.0), "sizes": (2,), "trajectories": 30, "radius": 4.2}
    data = Curie(ways=("directions",), **options).run(atoms, model)
    # layers cost nothing to turn into other layers of the same kind, so the order is soft
    assert float(data["order"][0, 0]) > 0.75
    assert float(data["order"][0, 1]) < 0.6
    assert data.attrs["measured"] == "CrN"
    assert float(data["tc_measured"]) == 280
    assert data["run_atoms"].values.tolist() == [16]


@pytest.mark.parametrize("second", [2.2, 2.0])
def test_sites_that_relax_to_one_count_as_one(second):
    """The cell is primitive for the moments that are sampled, whatever they began with."""
    model = CapableToy(Landau(0.08, 0.01, (26,)), Heisenberg(4e-3, 2.6), soc=False)
    atoms = with_moments(bulk("Fe", cubic=True, a=2.85), [2.2, second])
    options = {"ways": ("directions",), "sizes": (2,), "trajectories": 8, "steps": 1, "temperatures": (300.0,)}
    data = Curie(**options, radius=3.0, moments="magnitudes").run(atoms, model)
    assert data["run_atoms"].values.tolist() == [8]


def test_orders_that_lose_themselves_do_not_win():
    """A small moment that follows the large ones ends on their side, in a larger cell with the ferromagnet's energy."""
    atoms = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[2.9] * 3, pbc=True)
    atoms = with_moments(atoms, [2.0, 0.1])
    options = {"orders": "auto", "moments": "magnitudes", "max_orders": 30}
    for terms in ((), (Springs(3.0, 2.511, 2.7),), (Springs(2.3, 2.48, 2.7),)):
        model = CapableToy(Landau(0.08, 0.01, (26,)), Heisenberg(4e-3, 3.0), *terms, soc=False)
        order, ahead = Curie(**options)._lowest(atoms, [SpinCalculator(model)], silent)
        assert order.name == "fm"
        assert ahead > 1e-3
    model = CapableToy(Landau(0.08, 0.01, (26,)), Heisenberg(4e-3, 3.0), soc=False)
    assert Relaxation(cell="fixed", **options).run(atoms, model).attrs["best_order"] == "fm"


def test_default_temperatures_are_apart_however_weak_the_exchange():
    """Seven temperatures between half and nearly twice the mean-field estimate, at 2 K as at 2000."""
    for strength in (3e-6, 3e-3):
        options = {"ways": ("directions",), "sizes": (1,), "trajectories": 8, "steps": 1, "radius": 2.6}
        found = Curie(**options).run(cubic(), CapableToy(Heisenberg(strength, 2.5), soc=False))
        np.testing.assert_allclose(
            found["temperature"], float(found["tc_mean_field"]) * np.array(curie.AUTO), rtol=0.01
        )


@needs_spirit
@pytest.mark.parametrize("axis", [(0, 0, 1.0), (1.0, 0, 0)])
def test_spirit_starts_from_the_reference(axis):
    """Without heat the energy stays that of the reference along its easy axis, whichever that is."""
    a, c = 2.4, 2.45
    cell = [[a, 0, 0], [0, a, 0], [0, 0, c]] if axis[2] else [[0, a, 0], [0, 0, a], [c, 0, 0]]
    atoms = with_moments(Atoms("Fe", cell=cell, pbc=True), [M * np.array(axis)])
    exchange = Exchange(states=0, points=5, mesh=4, radius=2.6, moments="fixed").run(
        atoms, CapableToy(Heisenberg(J, 2.5), Uniaxial(5e-3), soc=True)
    )
    energy = spirit_walk(exchange, 3, 1e-6, 8, 1)["energy"]
    assert np.abs(energy).max() / 27 < 1e-6


def test_the_lowest_order_is_the_reference():
    """Second neighbours of rocksalt make layers along [111], not the [001] of its nearest antiferromagnet."""
    atoms = bulk("CrN", "rocksalt", a=4.1)
    model = CapableToy(Heisenberg(-2e-3, 3.0), Heisenberg(-3e-3, 4.2), soc=False)
    atoms = with_moments(atoms, [2.5, 0.0])
    options = {"ways": ("directions",), "sizes": (1,), "trajectories": 8, "steps": 1, "radius": 4.2}
    data = Curie(orders="auto", **options).run(atoms, model)
    assert data.attrs["order"].startswith("afm")
    assert "note" not in data.attrs
    # the Hamiltonian's second term reaches both shells; nearest neighbours are half up, half down
    mean_field = 2 / 3 * 6 * 3e-3 * 2.5**2 / BOLTZMANN
    assert float(data["tc_mean_field"]) == pytest.approx(mean_field, rel=1e-6)
    assert data.attrs["ordering"] == "q = (0, 0, 0)"
    # [001]: four of twelve nearest neighbours and all six next ones are parallel; [111]: six, and none
    low, high = -6 * 3e-3 * 2.5**2, -(4 * 5e-3 - 6 * 3e-3) * 2.5**2
    assert float(data.attrs["order_ahead"]) == pytest.approx(1e3 * (high - low) / 2, rel=1e-6)
    assert len(decode(data.attrs["order_structure"])) == 4
    labels = {row.label: row.value for row in Curie().summary(data)}
    assert labels["lowest order"] == f"{data.attrs['order']}, {1e3 * (high - low) / 2:.3g} meV/atom below the next"
    fm = Curie(temperatures=(100.0,), **options).run(atoms, model)
    assert "order" not in fm.attrs
    assert "J(q) is largest at q = " in fm.attrs["note"]
    with pytest.raises(OptionError, match="there are more than 2 orders"):
        Curie(orders="auto", max_orders=2, **options).run(atoms, model)
    with pytest.raises(MomentError, match="the state without moments is the lowest"):
        Curie(orders="auto", **options).run(
            with_moments(cubic(), [[0, 0, 1.0]]), CapableToy(Landau(-0.5, 0.01), soc=False)
        )


def test_an_order_that_is_not_the_lowest_is_said_to_be_none():
    """A layered order next to a better spiral is sampled from the mean-field temperature of that, with a note."""
    model = CapableToy(Heisenberg(3e-3, 2.5), Heisenberg(-1e-3, 4.9), soc=False)
    chain = with_moments(Atoms("Fe", cell=[5.5, 5.5, 2.4], pbc=True), [[0, 0, M]])
    data = Curie(ways=("directions",), trajectories=8, steps=1, radius=4.9).run(chain, model)
    assert "J(q) is largest at q = (0, 0, " in data.attrs["note"]
    assert data.sizes["temperature"] == len(curie.AUTO)


def test_atoms_that_move():
    """The lattice way runs, and its springs hold three halves of kT for every atom but the centre."""
    atoms = cubic()
    model = CapableToy(Heisenberg(J, 2.9, 1.0), Landau(0.08, 0.012), Springs(9.0, 2.4, 3.0), soc=False)
    data = Curie(ways=("lattice",), temperatures=(100.0,), sizes=(2,), trajectories=20, radius=3.0, walkers=1).run(
        atoms, model
    )
    # 24 coordinates of moments and 21 of atoms share the energy
    assert 10 < float(data["energy"][0, 0]) * 8 / (BOLTZMANN * 1e5) < 40
    assert 0.4 < float(data["acceptance"][0, 0]) <= 1


def test_calculators_that_give_energies_alone():
    """The same walk by differences of the energy."""
    atoms = with_moments(Atoms("Fe", cell=[2.4, 3.2, 3.2], pbc=True), [[0, 0, M]])
    options = {"ways": ("directions",), "temperatures": (100.0,), "trajectories": 8, "steps": 2, "radius": 2.5}
    fast = Curie(**options).run(atoms, toy())
    slow = Curie(**options).run(atoms, EnergyToy(Heisenberg(J, 2.5), soc=False))
    np.testing.assert_allclose(slow["order"], fast["order"], rtol=1e-6)


def test_restart(tmp_path):
    """Walks that are finished are read back: nothing is asked of the calculator, and the numbers are the same."""
    asked = []

    class Counting(CapableToy):
        def evaluate_spins(self, *args, **named):
            asked.append(1)
            return super().evaluate_spins(*args, **named)

    model = Counting(Heisenberg(J, 2.5), soc=False)
    options = {"ways": ("directions",), "temperatures": (200.0, 400.0), "trajectories": 10, "radius": 2.6}
    one = Curie(**options).run(cubic(), model, journal=Journal(tmp_path / "parts", 0.0))
    first = len(asked)
    again = Curie(**options).run(cubic(), model, journal=Journal(tmp_path / "parts", 0.0))
    assert first > 50
    assert len(asked) == first
    xr.testing.assert_identical(again, one)
    other = Curie(seed=1, **options).run(cubic(), model, journal=Journal(tmp_path / "parts", 0.0))
    assert np.abs(other["order"] - one["order"]).max() > 0


def test_committee_and_dataset(tmp_path):
    """The first member alone unless all are asked for; a file that opens plainly, a table, a picture."""
    toys = CommitteeToy([CapableToy(Heisenberg(j, 2.5), soc=False) for j in (2e-3, 4e-3)])
    options = {"ways": ("directions",), "temperatures": (200.0, 400.0, 600.0), "trajectories": 10, "radius": 2.6}
    one = Curie(**options).run(cubic(), toys)
    assert float(one["tc_mean_field"]) == pytest.approx(2 / 3 * 6 * 2e-3 * M**2 / BOLTZMANN, rel=1e-6)
    both = Curie(committee=True, **options).run(cubic(), toys)
    assert float(both["tc_mean_field"]) == pytest.approx(2 / 3 * 6 * 3e-3 * M**2 / BOLTZMANN, rel=1e-6)
    assert both.sizes["member"] == 2
    write_dataset(one, tmp_path / "x.nc")
    with xr.open_dataset(tmp_path / "x.nc") as again:
        xr.testing.assert_identical(again.load(), one)
    labels = [r.label for r in Curie().summary(one)]
    assert "mean field of J, q = (0, 0, 0)" in labels
    assert "potential, directions, peak of χ, 8 moments" in labels
    cold = Curie(**{**options, "temperatures": (20.0, 40.0, 60.0), "sizes": (2, 3)}).run(cubic(), toys)
    assert np.isnan(float(cold["tc_peak"][0]))
    assert np.isnan(float(cold["tc_binder"][0]))
    assert "above 60, still ordered there" in [r.value for r in Curie().summary(cold)]
    np.testing.assert_allclose(cold["length"], M)
    Curie().plot(one).savefig(tmp_path / "x.png")
    assert os.path.getsize(tmp_path / "x.png") > 1000


def test_members_that_have_a_temperature(monkeypatch):
    """Mean and spread are over the members whose susceptibility peaks, beside the statistical error of that mean."""
    toys = CommitteeToy([CapableToy(Heisenberg(j, 2.5), soc=False) for j in (2e-3, 3e-3, 4e-3)])
    found = iter([(500.0, 30.0), (np.nan, np.nan), (600.0, 40.0)])
    monkeypatch.setattr(curie, "with_error", lambda *_: next(found))
    monkeypatch.setattr(curie, "ORDERED", 2.0)
    options = {"ways": ("directions",), "committee": True, "trajectories": 8, "radius": 2.6}
    data = Curie(**options).run(cubic(), toys)
    # temperatures are those of the first member for all
    expected = np.round(2 / 3 * 6 * 2e-3 * M**2 / BOLTZMANN * np.array(curie.AUTO))
    np.testing.assert_array_equal(data["temperature"], expected)
    assert float(data["tc_peak"][0]) == pytest.approx(550)
    assert float(data["tc_peak_std"][0]) == pytest.approx(100 / np.sqrt(2))
    assert float(data["tc_peak_error"][0]) == pytest.approx(25)
    assert int(data["tc_peak_count"][0]) == 2
    rows = {r.label: r for r in Curie().summary(data)}
    row = rows["potential, directions, peak of χ, 8 moments, 2 of 3 members"]
    assert (row.value, row.error, row.spread) == pytest.approx((550, 25, 100 / np.sqrt(2)))
    assert row.key == "potential, directions, peak of χ"
    assert " ± " in rows["M(T), potential, directions, 8 moments"].value
    assert rows["moment of the reference"].spread == pytest.approx(0)


def test_measured_values():
    """Known crystals in any cell; nothing for others."""
    assert measured_temperature(bulk("Fe", cubic=True, a=2.85)) == (1043.0, "bcc Fe")
    assert np.isnan(measured_temperature(bulk("Fe", "fcc", a=3.6))[0])


def test_refusals(monkeypatch):
    """What gives no temperature, each in one sentence."""
    with pytest.raises(MomentError, match="no magnetic order"):
        Curie(ways=("directions",)).run(with_moments(cubic(), [[0, 0, 0]]), toy())
    atoms = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.8] * 3, pbc=True)
    with pytest.raises(MomentError, match="collinear"):
        Curie(ways=("directions",)).run(with_moments(atoms, [[0, 0, M], [0, M, 0]]), toy())
    with pytest.raises(OptionError, match="give --temperatures"):
        Curie(ways=("directions",), radius=2.6).run(cubic(), CapableToy(Heisenberg(-J, 2.5), soc=False))
    monkeypatch.setattr(curie, "spirit_is_installed", lambda: False)
    with pytest.raises(CalculatorError, match="install it"):
        Curie(ways=("model",)).run(cubic(), toy())
    for bad in ({"ways": ("magic",)}, {"temperatures": (300.0, 200.0)}, {"sizes": (3, 2)}, {"measure": "area"}):
        with pytest.raises(OptionError):
            Curie(**bad)
    for idle in (
        {"ways": ("directions",), "model_sizes": (4, 8)},
        {"ways": ("moments",), "model_samples": 2000},
        {"ways": ("model",), "sizes": (3,)},
        {"ways": ("model",), "walkers": 4},
        {"ways": ("model", "directions"), "measure": "line"},
    ):
        with pytest.raises(OptionError, match="does nothing where"):
            Curie(**idle)
