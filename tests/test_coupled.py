"""Coupled magnons and phonons: a chain in closed form, equations of motion in real space, and uncoupled limits."""

from dataclasses import dataclass

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from ase.build import bulk
from mmace_props.base import write_dataset
from mmace_props.bosons import normal_modes
from mmace_props.cli import main
from mmace_props.coupled import MEV_PER_THZ, Coupled, SpinLattice
from mmace_props.errors import ConvergenceError, MomentError, OptionError
from mmace_props.lattice import Lattice
from mmace_props.magnon import Magnon
from mmace_props.phonon import Phonon
from mmace_props.plot import save_figure
from mmace_props.protocol import SpinCalculator, moments_of, with_moments
from phonopy.structure.atomic_data import get_atomic_data
from scipy import constants
from scipy.optimize import linear_sum_assignment, minimize_scalar

from mmace.calculator import MMACECalculator

from .potentials import pair, random_model, triclinic
from .toys import DMI, CapableToy, CommitteeToy, Heisenberg, Landau, Springs, Toy, Uniaxial, scatter

MASSES = {z: get_atomic_data().atom_data[z][3] for z in (13, 24, 26)}
QUANTUM = constants.hbar * np.sqrt(constants.e / 1e-20 / constants.atomic_mass) / constants.e

SIZE, M = 2.5, 1.8
STIFF, TENSION, J, DECAY, D, K1 = 10.0, 1.0, 6e-4, 2.0, 1e-3, 5e-4


def chain(length=M):
    """Iron along x, moments along z."""
    return with_moments(Atoms("Fe", cell=[SIZE, 6, 6.5], pbc=True), [[0, 0, length]])


def springs():
    return Springs(STIFF, SIZE - TENSION / STIFF, 2.6)


def toy(*more, kind=CapableToy, dmi=D, **options):
    terms = springs(), Heisenberg(J, 2.6, DECAY, SIZE), DMI(dmi, 2.6), Uniaxial(K1)
    return kind(*terms, *more, **options)


def closed_form(q, dmi=D):
    """Energies in meV at q in reciprocal lattice units: u_x and u_z alone, and u_y with the spin wave.

    Bonds: ``k/2 (r - r0)² - 2 J(r) m² e·e' - 2 D m² r̂·(e×e')``. With φ'' and φ' of the first two, w = 1 - cos 2πq,
    stiffness ``2w φ''`` along and ``2w φ'/a`` across, tilts ``4 J m² w + 2 K1``, and ``c = -4 w D m²/a`` between u_y
    and the tilt t_x: ``(E² - E_p²)(E² - E_m²) = (ħ²/M)(2/m) E_m c²``.
    """
    w = 1 - np.cos(2 * np.pi * np.asarray(q))
    second, first = STIFF - 2 * J * DECAY**2 * M**2, TENSION + 2 * J * DECAY * M**2
    phonon = (1e3 * QUANTUM) ** 2 / MASSES[26]
    along, across = phonon * 2 * w * second, phonon * 2 * w * first / SIZE
    magnon = 2 / M * (4 * J * M**2 * w + 2 * K1) * 1e3
    coupling = 4 * w * dmi * M**2 / SIZE
    middle, product = (across + magnon**2) / 2, phonon * (2 / M) * 1e3 * magnon * coupling**2
    root = np.sqrt((across - magnon**2) ** 2 / 4 + product)
    return np.sqrt(np.stack([along, across, middle + root, np.maximum(middle - root, 0.0)], axis=-1))


def quick(**options):
    return Coupled(**{"dim": (4, 1, 1), "path": "GX", "points": 41, **options})


@pytest.mark.parametrize("kind", [CapableToy, Toy])
def test_chain_with_dzyaloshinskii_coupling(kind):
    """Every branch of the chain, with its units, for a calculator with a Hessian and for one with forces alone."""
    dataset = quick(moments="fixed").run(chain(), toy(kind=kind))
    q = dataset["q"].values[:, 0]
    assert q[-1] == 0.5
    expected = np.sort(closed_form(q), axis=1)
    # phonopy's table of units is 1e-7 away from CODATA's
    accuracy = 1e-5 if kind is CapableToy else 1e-4
    np.testing.assert_allclose(dataset["energy"].values, expected, atol=accuracy)
    np.testing.assert_allclose(dataset["frequency"].values * constants.h * 1e15 / constants.e, expected, atol=accuracy)
    apart = np.sort(closed_form(q, dmi=0.0), axis=1)
    assert np.abs(expected - apart).max() > 0.1
    both = np.concatenate([dataset["phonon_energy"].values, dataset["magnon_energy"].values], axis=1)
    np.testing.assert_allclose(np.sort(both, axis=1), apart, atol=1e-3)
    assert dataset["energy"].attrs["units"] == "meV"


@pytest.mark.parametrize("gives", [("energy", "magnetic_forces", "forces"), ("energy",)])
def test_rounding_is_no_instability(gives):
    """A ferromagnet is stable, whatever its curvatures are differences of."""
    atoms = with_moments(bulk("Fe", "sc", a=SIZE), [[0, 0, 2.0]])
    magnet = Toy(Heisenberg(2e-3, 2.6, 1.0), Springs(3.0, SIZE, 4.4), gives=gives, soc=False)
    dataset = Coupled(dim=(2, 2, 2), points=9, moments="fixed").run(atoms, magnet)
    assert float(dataset["instability"]) == 0.0
    assert float(dataset["growth"].max()) == 0.0


def test_gap_of_the_chain():
    """The gap is the least distance of the two branches of the closed form, near where they would cross."""
    dataset = quick().run(chain(), toy())
    gaps = dataset["gap"].values
    assert np.isfinite(gaps).sum() == 3

    def distance(q):
        return closed_form(q)[2] - closed_form(q)[3]

    found = minimize_scalar(distance, bounds=(0.12, 0.22), method="bounded", options={"xatol": 1e-10})
    assert found.fun > 0.1
    place = np.unravel_index(np.nanargmax(gaps), gaps.shape)
    assert gaps[place] == pytest.approx(found.fun, rel=1e-6)
    where = float(dataset["gap_q"].values[place][0])
    apart = closed_form(where, dmi=0.0)
    assert apart[2] == pytest.approx(apart[3], rel=1e-6)
    assert float(dataset["gap_energy"].values[place]) == pytest.approx(apart[2], rel=1e-6)
    # u_y and u_z are degenerate and open one gap; u_x crosses the spin wave without
    np.testing.assert_allclose(np.sort(gaps.ravel()), [0, gaps[place], gaps[place]], atol=1e-6)


@dataclass
class AcrossSprings:
    """``k/2 (z_i - z_j)²`` of a chain along x: u_z a little stiffer than u_y."""

    k: float
    soc = False

    def sites(self, s):
        i, _, r, _ = s.pairs(2.6)
        return scatter((self.k / 4 * r[:, 2] ** 2).expand(s.moments.shape[0], -1), i, len(s.positions))


@pytest.mark.parametrize("stiffer", [1e-5, 1e-4, 1e-2])
def test_gap_with_another_phonon_inside_it(stiffer):
    """u_z does not couple and lies within the gap of u_y: the gap stays what it is, and u_z has none."""
    alone = float(np.nanmax(quick().run(chain(), toy())["gap"].values))
    gaps = np.sort(quick().run(chain(), toy(AcrossSprings(stiffer)))["gap"].values.ravel())
    assert gaps[-1] == pytest.approx(alone, rel=1e-4)
    if stiffer > 1e-5:
        np.testing.assert_allclose(gaps[:-1], 0, atol=1e-6)


@pytest.mark.parametrize(("cutoff", "pairs"), [(4.9, 0), (5.2, 6)])
def test_exchange_beyond_the_supercell_is_told(cutoff, pairs):
    """A simple cubic cell of 10 Å has its unique images within 5 Å; the six pairs there are folded."""
    atoms = with_moments(Atoms("Fe", cell=[2.5] * 3, pbc=True), [2.0])
    exchange = Heisenberg(1e-3, cutoff, 0.3, 5.0)
    dataset = Coupled(dim=(4, 4, 4), path="GX", points=5).run(
        atoms, CapableToy(exchange, Springs(3.0, 2.4, 4.0), soc=False)
    )
    assert float(dataset["folded"]) == pytest.approx(pairs * 1e-3 * 4 * 1e3, abs=1e-6)
    rows = {row.label: row.value for row in Coupled().summary(dataset)}
    assert rows["Σ |J| of a site beyond the supercell"] == pytest.approx(pairs * 4.0, abs=1e-6)


def test_character_of_the_modes():
    """Half and half where they would cross, one or the other far from there, and every wave vector holds one magnon."""
    dataset = quick(points=401).run(chain(), toy())
    part = dataset["magnon_fraction"].values
    np.testing.assert_allclose(part.sum(axis=1)[1:], 1.0, atol=1e-6)
    gaps = dataset["gap"].values
    where = float(dataset["gap_q"].values[np.unravel_index(np.nanargmax(gaps), gaps.shape)][0])
    near = int(np.abs(dataset["q"].values[:, 0] - where).argmin())
    mixed = np.sort(part[near])[-2:]
    np.testing.assert_allclose(mixed, 0.5, atol=0.05)
    assert np.sort(part[-1])[-1] > 0.99
    assert part.min() > -0.01
    assert part.max() < 1.01


def test_crossings_between_two_points():
    """The ends of a part of the path are enough to find where bands cross on it."""
    few, many = (quick(points=points).run(chain(), toy()) for points in (2, 41))
    assert few.sizes["wave"] == 2
    assert few["segment"].values.tolist() == ["G-X"]
    np.testing.assert_allclose(few["gap"].values, many["gap"].values, atol=1e-6)


@pytest.mark.parametrize("mode", ["fixed", "magnitudes"])
def test_uncoupled_limits_are_those_of_the_two_properties(mode):
    """Without spin-orbit coupling nothing couples: phonons of the one property, magnons of the other, parts 0 and 1."""
    cell = with_moments(bulk("Fe", cubic=True, a=2.8), [[0, 0, 1.5], [0, 0, -1.5]])
    terms = Springs(4.0, 2.42, 2.55), Heisenberg(-2e-3, 2.55, 2.0, 2.42), Landau(0.05, 0.01)
    calculator = CapableToy(*terms, soc=False, moments=mode)
    dataset = Coupled(dim=(3, 3, 3), points=25).run(cell, calculator)
    assert dataset.sizes["branch"] == 8
    phonons = Phonon(dim=(3, 3, 3), points=25, mesh=2, t_step=500.0).run(cell, calculator)
    np.testing.assert_allclose(dataset["q"].values, phonons["q"].values, atol=1e-12)
    np.testing.assert_allclose(dataset["phonon_frequency"].values, phonons["frequency"].values, atol=1e-5)
    moved = with_moments(cell, dataset["moments"].values)
    magnons = Magnon(points=25, mesh=2, moments="fixed", radius=3.0).run(moved, calculator)
    np.testing.assert_allclose(dataset["magnon_energy"].values, magnons["energy"].values, atol=1e-6)
    both = np.concatenate([dataset["phonon_energy"].values, dataset["magnon_energy"].values], axis=1)
    np.testing.assert_allclose(dataset["energy"].values[1:], np.sort(both, axis=1)[1:], atol=1e-6)
    part = dataset["magnon_fraction"].values[1:]
    np.testing.assert_allclose(np.minimum(np.abs(part), np.abs(1 - part)), 0, atol=1e-9)
    assert np.nanmax(np.append(dataset["gap"].values, 0.0)) < 1e-6


def test_frequencies_and_energies_are_one_thing():
    """4.1357 meV for a THz."""
    assert pytest.approx(4.135667696, rel=1e-9) == MEV_PER_THZ


def motion(calculator, atoms, moments, follow):
    """Eigenvalues (eV) of the linearised equations of motion of a supercell, by differences of forces and torques.

    ħu̇ = v, ħv̇ = (ħ²/M) F, ħė = 2 e × ∂E/∂m, with lengths held or relaxed at every step.
    """
    lengths = np.linalg.norm(moments, axis=1)
    sites = np.flatnonzero(lengths > 1e-3)
    units = moments[sites] / lengths[sites, None]
    frames = np.array([np.linalg.svd(e[None])[2][1:] for e in units])
    masses = np.array([MASSES[z] for z in atoms.numbers])
    n, s = len(atoms), len(sites)

    def rates(state):
        shifted = atoms.copy()
        shifted.positions += state[: 3 * n].reshape(n, 3)
        turned = moments.copy()
        tilted = units + np.einsum("ia,iax->ix", state[6 * n :].reshape(s, 2), frames)
        directions = tilted / np.linalg.norm(tilted, axis=1)[:, None]
        turned[sites] = lengths[sites, None] * directions
        if follow:
            turned = calculator.relax_moments([with_moments(shifted, turned)], "magnitudes")[0]
        force = calculator.forces(shifted, turned)
        torque = -2 * np.cross(directions, calculator.magnetic_forces(shifted, turned)[sites])
        turns = np.einsum("ix,iax->ia", torque, frames)
        kicks = QUANTUM**2 * force / masses[:, None]
        return np.concatenate([state[3 * n : 6 * n], kicks.ravel(), turns.ravel()])

    size, step = 6 * n + 2 * s, 2e-4
    jacobian = np.zeros((size, size))
    jacobian[: 3 * n, 3 * n : 6 * n] = np.eye(3 * n)
    for k in [*range(3 * n), *range(6 * n, size)]:
        unit = step * np.eye(size)[k]
        jacobian[:, k] = (rates(unit) - rates(-unit)) / (2 * step)
    return np.linalg.eigvals(jacobian)


@pytest.mark.parametrize(
    ("structure", "seed", "follow", "stable"),
    [(pair, 3, False, True), (pair, 3, True, True), (triclinic, 1, False, False)],
)
def test_equations_of_motion_in_real_space(structure, seed, follow, stable):
    """A random potential with spin-orbit coupling, canted moments: the supercell's motion has the same frequencies.

    That of an unstable state has complex ones.
    """
    calculator = SpinCalculator(MMACECalculator(random_model(seed), soc=True, tolerance=1e-10))
    cell = structure()
    moments = calculator.relax_moments([cell], "full")[0]
    assert np.linalg.norm(np.cross(moments[0], moments[-1])) > 0.01
    phonon = Lattice(cell, np.diag([2, 1, 1]), np.eye(3), 1e-5).phonon(moments, True)
    crystal = SpinLattice(phonon, moments, calculator, follow)
    waves = np.array([[0.0, 0, 0], [0.5, 0, 0]])
    modes = crystal.modes(waves)
    assert modes.stable.all() == stable
    assert (modes.growth.max() > 1e-3) == (not stable)
    assert np.abs(crystal.blocks(waves)[1]).max() > 0.01
    whole = phonon.supercell
    supercell = Atoms(whole.symbols, positions=whole.positions, cell=whole.cell, pbc=True)
    found = motion(calculator, supercell, moments[crystal.partner], follow)
    ours = (modes.growth - 1j * modes.energies).ravel()
    ours = np.concatenate([ours, np.where(modes.growth.ravel() > 1e-9, -ours, ours.conj())])
    assert len(ours) == len(found)
    rows, columns = linear_sum_assignment(np.abs(ours[:, None] - found[None]))
    # translations are a double zero, whose eigenvalues go with the root of rounding
    error, still = np.abs(ours[rows] - found[columns]), np.abs(ours[rows]) < 1e-9
    assert still.sum() == 6
    assert error[still].max() < 1e-3 * np.abs(found).max()
    assert error[~still].max() < 1e-6 * np.abs(found).max()
    held = crystal.form(waves)
    start = 6 * len(cell)
    held[:, :start, start:] = held[:, start:, :start] = 0
    apart = normal_modes(held, crystal.bracket)
    assert np.abs(np.sort(apart.energies) - np.sort(modes.energies)).max() > 1e-5 * np.abs(found).max()


def test_committee_unstable_states_and_refusals(tmp_path):
    """Spread over members; an unstable state is said; dataset, table and picture; refusals."""
    members = [toy(), CapableToy(springs(), Heisenberg(0.9 * J, 2.6, DECAY, SIZE), DMI(D, 2.6), Uniaxial(K1))]
    prop = quick()
    dataset = prop.run(chain(), CommitteeToy(members))
    single = [quick().run(chain(), t)["energy"].values for t in members]
    np.testing.assert_allclose(dataset["energy"].values, np.mean(single, axis=0), atol=1e-9)
    np.testing.assert_allclose(dataset["energy_std"].values, np.std(single, axis=0, ddof=1), atol=1e-9)
    write_dataset(dataset, tmp_path / "a.nc")
    with xr.open_dataset(tmp_path / "a.nc") as again:
        rows = [r.label for r in prop.summary(again.load())]
    assert any(label.startswith("gap on Γ-X") for label in rows)
    save_figure(prop.plot(dataset), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10000
    hard = quick().run(chain(), CapableToy(springs(), Heisenberg(J, 2.6, DECAY, SIZE), Uniaxial(-K1)))
    assert float(hard["instability"]) == pytest.approx(-2 * K1 * 1e3, rel=1e-6)
    assert "not stable" in hard.attrs["note"]
    with pytest.raises(MomentError, match="no magnons"):
        quick().run(chain(0.0), toy())
    with pytest.raises(OptionError, match="three repeats"):
        quick(dim=(2,)).run(chain(), toy())
    saddle = CapableToy(springs(), Landau(0.05, 0.005), Heisenberg(0.02, 2.6), soc=False)
    two = with_moments(chain().repeat((2, 1, 1)), [[0, 0, 1.0], [0, 0, -1.0]])
    with pytest.raises(ConvergenceError, match="saddle point"):
        quick(moments="magnitudes").run(two, saddle)
    assert moments_of(two)[1, 2] == -1.0


def test_a_crossing_that_one_member_lacks():
    """Means and spreads over the members that have the crossing, how many they are, and shifts member by member."""
    stiff = CapableToy(springs(), Heisenberg(1.3 * J, 2.6, DECAY, SIZE), DMI(2 * D, 2.6), Uniaxial(K1))
    high = CapableToy(springs(), Heisenberg(J, 2.6, DECAY, SIZE), DMI(D, 2.6), Uniaxial(0.05))
    members, prop = [toy(), stiff, high], quick()
    dataset = prop.run(chain(), CommitteeToy(members))
    single = [quick().run(chain(), t) for t in members]
    each = np.array([one["gap"].values for one in single])
    place = np.unravel_index(np.nanargmax(each[0]), each[0].shape)
    assert np.isfinite(each[:, *place]).tolist() == [True, True, False]
    assert int(dataset["gap_members"].values[place]) == 2
    for name in ("gap", "gap_energy", "gap_q"):
        two = np.array([one[name].values[place] for one in single[:2]])
        np.testing.assert_allclose(dataset[name].values[place], two.mean(axis=0), atol=1e-9)
        np.testing.assert_allclose(dataset[f"{name}_std"].values[place], two.std(axis=0, ddof=1), atol=1e-9)
    assert not dataset["gap_members"].values[~np.isfinite(each).any(axis=0)].any()
    assert single[0]["gap_members"].values[place] == 1
    rows = {r.label: r for r in prop.summary(dataset)}
    assert "not in every member" in rows["crossings on the path"].value
    named = [r for label, r in rows.items() if label.endswith("in 2 of 3 members")]
    assert named[0].value == pytest.approx(np.nanmax(dataset["gap"].values))
    assert named[0].spread > 0
    shifts = [{r.label: r for r in prop.summary(one)}["largest change by coupling"].value for one in single]
    assert np.ptp(shifts) > 0.05
    assert rows["largest change by coupling"].value == pytest.approx(np.mean(shifts))
    assert rows["largest change by coupling"].spread == pytest.approx(np.std(shifts, ddof=1))


def test_command_line(tmp_path, capsys):
    """The command prints its table and writes its dataset."""
    chain().write(tmp_path / "POSCAR", format="vasp", direct=True)
    command = ["coupled", str(tmp_path / "POSCAR"), "--calculator", "tests.toys:from_options", "--moments", "fixed"]
    command += ["--order", "fm", "--dim", "3", "1", "1", "--points", "9", "-o", str(tmp_path / "a.nc")]
    assert main(command) == 0
    assert "highest magnon without coupling" in capsys.readouterr().out
    with xr.open_dataset(tmp_path / "a.nc") as dataset:
        assert dataset.sizes["branch"] == 4
        np.testing.assert_allclose(dataset["moments"].values, [[0, 0, 2.2]])
