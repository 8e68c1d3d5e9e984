"""Spin waves against closed forms, the equations of motion themselves, frozen spirals, and another program."""

import json

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from ase.build import bulk
from mmace_props.base import write_dataset
from mmace_props.errors import ConvergenceError, MomentError, OptionError
from mmace_props.exchange import Exchange
from mmace_props.export import export
from mmace_props.magnon import Magnon, SpinWaves, settled
from mmace_props.protocol import SpinCalculator, with_moments
from mmace_props.spiral import SpinSpiral
from mmace_props.supercell import Supercell, transverse
from scipy.integrate import solve_ivp
from scipy.spatial.transform import Rotation

from mmace.calculator import MMACECalculator

from .potentials import pair, random_model
from .test_suite_protocol import EnergyToy
from .toys import DMI, CapableToy, CommitteeToy, Heisenberg, Landau, PseudoDipolar, Toy, Uniaxial

J, M = 2e-3, 1.9
BCC = 1e3 * 4 / M * 8 * J * M**2


def ferromagnet(atoms, m=M):
    return with_moments(atoms, np.tile([0, 0, m], (len(atoms), 1)))


def quick(**options):
    return Magnon(**{"points": 21, "mesh": 4, "moments": "fixed", **options})


def shell(cell, cutoff):
    """Lattice vectors of the neighbours of one atom: integers and Cartesian."""
    steps = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    length = np.linalg.norm(steps @ cell, axis=1)
    near = (length > 0) & (length < cutoff)
    return steps[near], (steps @ cell)[near]


@pytest.mark.parametrize(("lattice", "a", "near"), [("sc", 2.4, 2.5), ("bcc", 2.8, 2.5), ("fcc", 3.5, 2.6)])
def test_ferromagnets(lattice, a, near):
    """ħω = (4/m) Σ J (1 - cos q·R) at every q, its stiffness (2/3m) Σ J R², and nothing at q = 0."""
    atoms = bulk("Fe", lattice, a=a)
    data = quick().run(ferromagnet(atoms), CapableToy(Heisenberg(J, near), soc=False))
    steps, vectors = shell(atoms.cell[:], near)
    expected = 1e3 * 4 / M * J * M**2 * (1 - np.cos(2 * np.pi * data["q"].values @ steps.T)).sum(axis=1)
    np.testing.assert_allclose(data["energy"].values[:, 0], expected, atol=1e-9)
    np.testing.assert_allclose(data["frozen"], expected, atol=1e-6)
    assert abs(float(data["gap"])) < 1e-6
    stiffness = 1e3 * 2 / 3 / M * J * M**2 * (vectors**2).sum()
    assert float(data["stiffness"]) == pytest.approx(stiffness, rel=1e-6)
    assert float(data["stiffness_frozen"]) == pytest.approx(stiffness, rel=1e-5)
    np.testing.assert_allclose(data["stiffness_tensor"], stiffness * np.eye(3), atol=1e-4)
    assert float(data["instability"]) == 0
    np.testing.assert_allclose(data["drift"], 0, atol=1e-6)
    assert np.isnan(float(data["velocity"]))
    counted = np.trapezoid(data["dos"].values, data["dos_energy"].values)
    assert counted == pytest.approx(1, abs=1e-3)


def test_antiferromagnet_with_anisotropy():
    """bcc, two sublattices: (2/m) sqrt(A² - B²), A = 16|J| + 2K, B = 16|J| γ; at q = 0 sqrt(H_A (2H_E + H_A))."""
    atoms = bulk("Fe", cubic=True, a=2.8)
    anisotropy, pair_energy = 3e-4, J * M**2
    toy = CapableToy(Heisenberg(-J, 2.5), Uniaxial(anisotropy))
    data = quick(path="GXM").run(with_moments(atoms, [M, -M]), toy)
    q = data["q"].values
    gamma = np.prod(np.cos(np.pi * q), axis=1)
    own, other = 16 * pair_energy + 2 * anisotropy, 16 * pair_energy * gamma
    expected = 1e3 * 2 / M * np.sqrt(own**2 - other**2)
    np.testing.assert_allclose(data["energy"], np.stack([expected, expected], axis=1), rtol=1e-8)
    assert float(data["gap"]) == pytest.approx(
        1e3 * 2 / M * np.sqrt(2 * anisotropy * (2 * 16 * pair_energy + 2 * anisotropy)), rel=1e-8
    )
    # without spin-orbit coupling the gap closes: to 1e-6 meV, where a plain root of the rounding leaves 1e-4
    free = quick(path="GXM").run(with_moments(atoms, [M, -M]), CapableToy(Heisenberg(-J, 2.5), soc=False))
    assert abs(float(free["gap"])) < 1e-6
    assert float(free["instability"]) == 0
    # ħω = c q with 1 - γ² = q²a²/4
    velocity = 1e3 * 2 / M * 16 * pair_energy * 2.8 / 2
    assert float(free["velocity"]) == pytest.approx(velocity, rel=1e-6)
    assert np.isnan(float(free["stiffness"]))


def test_easy_plane_ferromagnet_has_a_velocity():
    """(2/m) sqrt(A (A + 2K)) with A = m D q²/2: linear at small q, with c² = 4 D K / m, and no stiffness."""
    atoms, hard = bulk("Fe", "sc", a=2.4), 2e-4
    free = quick().run(ferromagnet(atoms), CapableToy(Heisenberg(J, 2.5), soc=False))
    flat = quick().run(with_moments(atoms, [[M, 0, 0]]), CapableToy(Heisenberg(J, 2.5), Uniaxial(-hard)))
    assert abs(float(flat["gap"])) < 1e-4
    assert float(flat["velocity"]) == pytest.approx(np.sqrt(4 * float(free["stiffness"]) * 1e3 * hard / M), rel=1e-4)
    assert np.isnan(float(flat["stiffness"]))
    steep = quick().run(with_moments(atoms, [[0, 0, M]]), CapableToy(Heisenberg(J, 2.5), Uniaxial(hard)))
    assert float(steep["stiffness"]) == pytest.approx(float(free["stiffness"]), rel=1e-6)
    assert np.isnan(float(steep["velocity"]))


def test_velocity_does_not_depend_on_the_frame():
    cell = Atoms("Cr2", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[2.9, 2.9, 3.3], pbc=True)
    toy = CapableToy(Heisenberg(-J, 3.0), soc=False)
    found = []
    for turn in (Rotation.identity(), Rotation.from_rotvec([0.3, 0.7, -0.4])):
        atoms = cell.copy()
        atoms.set_cell(cell.cell[:] @ turn.as_matrix().T, scale_atoms=True)
        found.append(float(quick(path="GX").run(with_moments(atoms, [M, -M]), toy)["velocity"]))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_single_precision_is_no_instability():
    """Rounding of the curvature has a sign; the stiffness agrees with that of double precision."""
    atoms = with_moments(bulk("Fe", a=2.83), [2.2])
    few = {"radius": 2.5, "tolerance": 0.9, "points": 7, "mesh": 2, "moments": "magnitudes"}
    single, double = (
        Magnon(**few).run(atoms, MMACECalculator(dtype=dtype, committee=False, soc=False))
        for dtype in ("float32", "float64")
    )
    assert "note" not in single.attrs
    assert float(single["stiffness"]) == pytest.approx(float(double["stiffness"]), rel=0.02)
    assert "stiffness_frozen" not in single
    spiral = SpinSpiral(points=5, mesh=0, moments="magnitudes")
    single, double = (
        spiral.run(atoms, MMACECalculator(dtype=dtype, committee=False, soc=False)) for dtype in ("float32", "float64")
    )
    np.testing.assert_allclose(single["energy"], double["energy"], atol=0.5)


def test_rocksalt_antiferromagnet():
    """Layers of Cr up and down in rocksalt, non-magnetic N left out: sqrt of own and opposite sublattice sums."""
    atoms = bulk("CrN", "rocksalt", a=4.1, cubic=True)
    layers = np.where(np.isclose(atoms.get_scaled_positions()[:, 2] % 1, 0), 1.0, -1.0)
    m = 2.5
    atoms = with_moments(atoms, np.where(atoms.numbers == 24, m * layers, 0.0))
    near, second, anisotropy = -4e-3, 1.5e-3, 2e-4
    terms = (Heisenberg(near, 3.0), Heisenberg(second, 4.2), Uniaxial(anisotropy, numbers=(24,)))
    data = quick(radius=4.2, path="GXM").run(atoms, CapableToy(*terms))
    assert set(data["element"].values) == {"Cr"}
    assert data.sizes["branch"] == 2
    lattice = np.array(json.loads(data.attrs["primitive_cell"]))
    k = 2 * np.pi * data["q"].values @ np.linalg.inv(lattice).T
    half = 4.1 / 2
    offsets = np.array([[x, y, 0] for x in (-1, 1) for y in (-1, 1)]) * half
    across = np.array([[x, 0, z] for x in (-1, 1) for z in (-1, 1)] + [[0, y, z] for y in (-1, 1) for z in (-1, 1)])
    six = np.concatenate([np.eye(3), -np.eye(3)]) * 4.1
    both, own = (near + second) * m**2, second * m**2
    within = both * np.cos(k @ offsets.T).sum(axis=1) + own * np.cos(k @ six.T).sum(axis=1)
    opposite = both * np.cos(k @ (across * half).T).sum(axis=1)
    mine = 2 * (4 * both + 6 * own - 8 * both) - 2 * within + 2 * anisotropy
    expected = 1e3 * 2 / m * np.sqrt(mine**2 - 4 * opposite**2)
    np.testing.assert_allclose(data["energy"].values[:, 0], expected, rtol=1e-7)
    np.testing.assert_allclose(data["energy"].values[:, 1], expected, rtol=1e-7)
    exchange = Exchange(radius=4.2, states=0, points=5, mesh=4).run(atoms, CapableToy(*terms[:2], soc=False))
    shells = dict(zip(np.round(exchange["shell_distance"].values, 2), exchange["shell_J"].values, strict=True))
    assert shells[2.90] == pytest.approx(1e3 * both, rel=1e-8)
    assert shells[4.10] == pytest.approx(1e3 * own, rel=1e-8)


def test_chiral_magnet_tells_the_sense():
    """ħω(q) = (4/m) [J(0) - J(q) + Σ D_z sin q·R] for moments along +z, and the opposite shift for -z."""
    atoms, d = bulk("Fe", "sc", a=2.4), 3e-4
    toy = CapableToy(Heisenberg(J, 2.5), DMI(d, 2.5), Uniaxial(1e-3))
    for sign in (1, -1):
        waves = SpinWaves(Supercell(atoms, np.array([0]), (4, 4, 4)), np.array([[0, 0, sign * M]]), SpinCalculator(toy))
        q = np.array([[0.1, 0.0, 0.2], [-0.1, 0.0, -0.2], [0, 0, 0.3]])
        steps, vectors = shell(atoms.cell[:], 2.5)
        phases = 2 * np.pi * q @ steps.T
        symmetric = J * M**2 * (1 - np.cos(phases)).sum(axis=1)
        chiral = d * M**2 * (np.sin(phases) * vectors[:, 2] / 2.4).sum(axis=1)
        expected = 4 / M * (symmetric + sign * chiral) + 4 / M * 1e-3
        np.testing.assert_allclose(waves.modes(q).energies[:, 0], expected, rtol=1e-7)


def triangular(a=2.6):
    """Three sublattices of a triangular layer at 120° in the plane."""
    cell = np.array([[1.5, np.sqrt(3) / 2, 0], [0, np.sqrt(3), 0], [0, 0, 9.0 / a]]) * a
    atoms = Atoms("Fe3", cell=cell, scaled_positions=[[0, 0, 0], [1 / 3, 1 / 3, 0], [2 / 3, 2 / 3, 0]], pbc=True)
    angles = 2 * np.pi / 3 * np.arange(3)
    return with_moments(atoms, M * np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1))


def test_triangular_lattice_at_120_degrees():
    """ħω = (12|J|/m) sqrt((1 - γ)(1 + 2γ)) at q, q + K, q - K; three modes without energy at q = 0."""
    atoms, a = triangular(), 2.6
    assert np.linalg.norm(atoms.positions[1] - atoms.positions[0]) == pytest.approx(a)
    data = quick(path="GMKG", radius=3.0).run(atoms, CapableToy(Heisenberg(-J, 2.7), soc=False))
    lattice = np.array(json.loads(data.attrs["primitive_cell"]))
    assert data.sizes["branch"] == 3
    k = 2 * np.pi * data["q"].values @ np.linalg.inv(lattice).T
    turn = np.array([[0.5, -np.sqrt(3) / 2, 0], [np.sqrt(3) / 2, 0.5, 0], [0, 0, 1]])
    bond = [atoms.positions[1] - atoms.positions[0]]
    for _ in range(5):
        bond.append(turn @ bond[-1])
    bond = np.array(bond)
    # K is where a bond has the phase 120°, and the next one -120°
    corner = np.linalg.solve(np.array([bond[0], bond[1], [0, 0, 1]]), [2 * np.pi / 3, -2 * np.pi / 3, 0])
    rotated = [np.zeros(3), corner, -corner]
    expected = []
    for shift in rotated:
        gamma = np.cos((k + shift) @ bond.T).mean(axis=1)
        expected.append(1e3 * 12 * J * M**2 / M * np.sqrt(np.clip((1 - gamma) * (1 + 2 * gamma), 0, None)))
    np.testing.assert_allclose(data["energy"], np.sort(np.array(expected).T, axis=1), atol=1e-5)
    gamma_point = data["energy"].values[int(np.argmin(np.linalg.norm(data["q"].values, axis=1)))]
    np.testing.assert_allclose(gamma_point, 0, atol=1e-6)
    assert float(data["instability"]) == 0


def test_gap_and_instability_of_one_anisotropy():
    """K > 0 gives the ferromagnet the gap 4K/m; K < 0 makes it a maximum, which is said with its place."""
    atoms = ferromagnet(bulk("Fe", "sc", a=2.4))
    good = quick().run(atoms, CapableToy(Heisenberg(J, 2.5), Uniaxial(5e-4)))
    assert float(good["gap"]) == pytest.approx(1e3 * 4 * 5e-4 / M, rel=1e-9)
    bad = quick(moments="fixed").run(atoms, CapableToy(Heisenberg(J, 2.5), Uniaxial(-5e-4)))
    assert float(bad["gap"]) == pytest.approx(-1e3 * 4 * 5e-4 / M, rel=1e-9)
    assert float(bad["instability"]) == pytest.approx(-1.0, rel=1e-9)
    np.testing.assert_allclose(bad["instability_q"], 0)
    assert "not stable" in bad.attrs["note"]
    assert np.isnan(float(bad["stiffness"]))
    rows = {r.label: r.value for r in Magnon().summary(bad)}
    assert rows["not stable, lowest curvature at q = (0, 0, 0)"] == pytest.approx(-1.0)


def test_ferromagnet_of_an_antiferromagnet():
    """The worst tilt is found at the zone corner, with the negative energy of the wrong order."""
    data = quick(path="GHN").run(ferromagnet(bulk("Fe", a=2.8)), CapableToy(Heisenberg(-J, 2.5), soc=False))
    assert float(data["energy"].min()) == pytest.approx(-2 * BCC, rel=1e-6)
    corner = data["instability_q"].values
    np.testing.assert_allclose(np.cos(2 * np.pi * corner @ shell(bulk("Fe", a=2.8).cell[:], 2.5)[0].T), -1, atol=1e-9)
    np.testing.assert_array_equal(data["growth"], 0)


def test_frustrated_antiferromagnet_grows():
    """bcc two-sublattice order with stronger antiferromagnetic second neighbours: some waves grow."""
    atoms = with_moments(bulk("Fe", cubic=True, a=2.8), [M, -M])
    near, second = -1e-3, -2e-3
    toy = CapableToy(Heisenberg(near - second, 2.5), Heisenberg(second, 2.9), soc=False)
    data = quick(path="GXMR").run(atoms, toy)
    q = data["q"].values
    opposite = 8 * near * M**2 * np.prod(np.cos(np.pi * q), axis=1)
    own = 2 * second * M**2 * np.cos(2 * np.pi * q).sum(axis=1)
    mine = 2 * (6 * second * M**2 - 8 * near * M**2) - 2 * own
    squares = mine**2 - 4 * opposite**2
    np.testing.assert_allclose(data["growth"].values[:, 0], 1e3 * 2 / M * np.sqrt(np.maximum(-squares, 0)), atol=1e-5)
    assert float(data["growth"].max()) > 1
    low = float(data["instability"])
    assert low < -0.1
    assert low == pytest.approx(1e3 * float((mine - 2 * np.abs(opposite)).min()), rel=0.1)


def test_states_that_are_not_stationary():
    """A canted moment, and moments off the easy axis, are refused with the torque that is left."""
    atoms = bulk("Fe", cubic=True, a=2.8)
    toy = CapableToy(Heisenberg(J, 2.5), Uniaxial(5e-4))
    with pytest.raises(MomentError, match=r"torque on atom \d \(Fe\) is .* eV, above 1e-05; relax the directions"):
        quick().run(with_moments(atoms, [[0, 0, M], [0, 0.5, M]]), toy)
    off = Magnon(mesh=4, points=5, moments="full")
    free = CapableToy(Heisenberg(J, 2.5), Landau(0.05, 0.005), Uniaxial(5e-4))
    data = off.run(with_moments(atoms, [[0, 0.2, 2.2], [0, 0.4, 2.3]]), free)
    np.testing.assert_allclose(data["moments"].values[:, :2], 0, atol=1e-9)
    assert float(data["torque"]) < 1e-6


def test_small_torques_are_settled():
    """A triangle turned out of its order by 1e-6 keeps its modes without energy."""
    atoms = triangular()
    rng = np.random.default_rng(2)
    moments = atoms.get_initial_magnetic_moments() + 1e-7 * rng.normal(size=(3, 3))
    toy = CapableToy(Heisenberg(-J, 2.7), soc=False)
    data = quick(path="GM", radius=3.0).run(with_moments(atoms, moments), toy)
    assert 1e-10 < float(data["torque"]) < 1e-5
    np.testing.assert_allclose(data["energy"].values[0], 0, atol=1e-6)
    assert float(data["instability"]) == 0


def test_cells_and_orientations():
    """The conventional cell gives the bands of the primitive one, and a turned triangle those of the flat one."""
    toy = CapableToy(Heisenberg(J, 2.5), Heisenberg(-3e-4, 2.9), soc=False)
    one = quick().run(ferromagnet(bulk("Fe", a=2.8)), toy)
    other = quick().run(ferromagnet(bulk("Fe", cubic=True, a=2.8)), toy)
    assert other.attrs["primitive_atoms"] == 1
    assert float(other["stiffness"]) == pytest.approx(float(one["stiffness"]), rel=1e-9)
    atoms, toy = triangular(), CapableToy(Heisenberg(-J, 2.7), soc=False)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    flat, tilted = (
        quick(path="GM", radius=3.0).run(with_moments(atoms, moments), toy)
        for moments in (atoms.get_initial_magnetic_moments(), atoms.get_initial_magnetic_moments() @ turn.T)
    )
    np.testing.assert_allclose(tilted["energy"], flat["energy"], atol=1e-6)


def motion(calculator, atoms, moments):
    """Return de/dt in eV/ħ of the equation of motion, straight from the magnetic forces."""
    lengths = np.linalg.norm(moments, axis=1, keepdims=True)
    field = calculator.evaluate_spins(atoms, moments[None])["magnetic_forces"][0]
    # ħė = (2/m) e × ∂E/∂e with ∂E/∂e = -|m| B
    return -2 * np.cross(moments / lengths, field)


def test_linearised_motion_of_the_potential():
    """A random potential with spin-orbit coupling, canted moments: eigenvalues of the Jacobian of the motion."""
    calculator = SpinCalculator(MMACECalculator(random_model(0, cutoff=3.6, spin_orbit_scale=0.3)))
    atoms = pair()
    sites = np.arange(2)
    relaxed = calculator.relax_moments([with_moments(atoms, 1.5 * atoms.get_initial_magnetic_moments())], "full")[0]
    settled_moments, _ = settled(atoms, sites, relaxed, calculator)
    assert np.linalg.norm(np.cross(*settled_moments)) > 0.1
    waves = SpinWaves(Supercell(atoms, sites, (2, 1, 1)), settled_moments, calculator)
    modes = waves.modes(np.array([[0, 0, 0], [0.5, 0, 0]]))
    big = atoms.repeat((2, 1, 1))
    start = np.tile(settled_moments, (2, 1))
    unit = start / np.linalg.norm(start, axis=1)[:, None]
    lengths = np.linalg.norm(start, axis=1)
    step, jacobian = 1e-4, np.zeros((12, 12))
    for column in range(12):
        rates = []
        for sign in (1, -1):
            turned = unit.copy()
            turned.ravel()[column] += sign * step
            turned /= np.linalg.norm(turned, axis=1)[:, None]
            rates.append(motion(calculator, big, turned * lengths[:, None]))
        jacobian[:, column] = ((rates[0] - rates[1]) / (2 * step)).ravel()
    # z(t) = exp((growth - iω)t/ħ); the two moments along themselves add zeros
    found, scale = np.linalg.eigvals(jacobian), float(modes.energies.max())
    np.testing.assert_allclose(np.sort(found.imag)[-4:], np.sort(modes.energies.ravel()), atol=1e-5 * scale)
    np.testing.assert_allclose(np.sort(found.real)[-4:], np.sort(modes.growth.ravel()), atol=1e-5 * scale)
    assert modes.growth.max() > 5e-3 * scale
    assert np.sort(modes.energies.ravel())[1] > 0.1 * scale


def test_a_wave_runs_as_its_energy_says():
    """Integrated in time, the wave exp(i(q·R - ωt)) of a chiral magnet turns by its own ω and no other."""
    atoms, d, cells = bulk("Fe", "sc", a=2.4), 4e-4, 5
    toy = CapableToy(Heisenberg(J, 2.5), DMI(d, 2.5), Uniaxial(1e-3))
    calculator, up = SpinCalculator(toy), np.array([[0, 0, M]])
    box = Supercell(atoms, np.array([0]), (1, 1, cells))
    waves = SpinWaves(Supercell(atoms, np.array([0]), (3, 3, cells)), up, calculator)
    q = 2 / cells
    found = waves.modes(np.array([[0, 0, q], [0, 0, -q]]))
    assert found.energies[0, 0] > 1.05 * found.energies[1, 0]
    frame, size = transverse(np.array([0.0, 0, 1])), 1e-4
    phase = np.exp(2j * np.pi * q * box.shifts[:, 2])
    tilt = (phase[:, None] * found.vectors[0, :, 0]).real
    start = np.array([0, 0, 1.0]) + size * tilt @ frame
    start /= np.linalg.norm(start, axis=1)[:, None]

    def rate(_, x):
        return motion(calculator, box.atoms, M * x.reshape(-1, 3)).ravel()

    duration = 0.7 * 2 * np.pi / found.energies[0, 0]
    end = solve_ivp(rate, (0, duration), start.ravel(), rtol=1e-9, atol=1e-12).y[:, -1].reshape(-1, 3)
    turned = (phase[:, None] * found.vectors[0, :, 0] * np.exp(-1j * found.energies[0, 0] * duration)).real
    np.testing.assert_allclose((end @ frame.T) / size, turned, atol=1e-5)


def test_small_cones_of_the_potential():
    """The bands of a random potential without spin-orbit coupling are the spirals' energies at small cones."""
    calculator = MMACECalculator(random_model(3, cutoff=3.5), soc=False)
    atoms = with_moments(Atoms("Fe", cell=[2.6, 2.7, 2.8], pbc=True), [[0, 0, 1.9]])
    data = quick(radius=4.2, points=7, path="GXS", tolerance=1e-7).run(atoms, calculator)
    spiral = SpinSpiral(path="GXS", points=7, cone=0.5, mesh=0, moments="fixed").run(atoms, calculator)
    scale = float(np.abs(spiral["magnon"]).max())
    np.testing.assert_allclose(data["energy"].values[:, 0], spiral["magnon"], atol=2e-4 * scale)
    np.testing.assert_allclose(data["frozen"], data["energy"].values[:, 0], atol=1e-6 * scale)
    assert abs(float(data["gap"])) < 1e-6


@pytest.mark.parametrize(
    ("symbols", "a", "moments"), [("Fe2", 2.84, [2.2, 2.2]), ("Fe2", 2.8, [1.8, -1.8]), ("FeAl", 2.88, [0.8, 0.0])]
)
def test_shipped_potential_has_no_gap_without_spin_orbit_coupling(symbols, a, moments):
    """Turning all moments together costs nothing: every branch that it makes is below 1e-6 meV at q = 0."""
    calculator = MMACECalculator("default", committee=False, soc=False)
    atoms = Atoms(symbols, scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[a] * 3, pbc=True)
    options = {"radius": 2.6, "tolerance": 1.0, "points": 2, "mesh": 2, "moments": "magnitudes"}
    data = Magnon(**options).run(with_moments(atoms, moments), calculator)
    assert abs(float(data["gap"])) <= 1e-6
    if min(moments) < 0:
        box = Supercell(atoms, np.array([0, 1]), (2, 2, 2))
        waves = SpinWaves(box, data["moments"].values, SpinCalculator(calculator))
        np.testing.assert_allclose(waves.modes(np.zeros((1, 3))).energies, 0, atol=1e-6)


@pytest.mark.parametrize(("a", "ratio", "sign"), [(2.90, 0.941, 1), (2.83, 1.08, -1)])
def test_gap_of_the_shipped_potential_is_its_anisotropy(a, ratio, sign):
    """With spin-orbit coupling ħω = (4/m) K of small tilts: positive where c is easy, negative where it is hard.

    DFT has c easy in the first crystal by 76 µeV a cell and hard in the second by 85.
    """
    calculator = MMACECalculator("default", committee=False, soc=True)
    atoms = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[a, a, a * ratio], pbc=True)
    options = {"radius": 2.6, "tolerance": 1.0, "points": 2, "mesh": 2, "moments": "magnitudes"}
    data = Magnon(**options).run(with_moments(atoms, [0.77, 0.0]), calculator)
    m, angles = float(np.linalg.norm(data["moments"][0])), np.deg2rad([0.0, 4.0, 8.0])
    tilted = np.array([[[m * np.sin(x), 0, m * np.cos(x)], [0, 0, 0]] for x in angles])
    energy = SpinCalculator(calculator).evaluate_spins(atoms, tilted, False)["energy"]
    square = np.sin(angles[1:]) ** 2
    constant = np.linalg.solve(np.stack([square, square**2], axis=1), energy[1:] - energy[0])[0]
    assert np.sign(float(data["gap"])) == sign
    assert abs(float(data["gap"])) > 0.01
    assert float(data["gap"]) == pytest.approx(4e3 * constant / m, rel=1e-4)


def test_calculators_without_derivatives_of_second_order():
    """Differences of magnetic forces give the same bands, and no gap where there is none."""
    terms = (Heisenberg(-J, 2.5),)
    atoms = with_moments(bulk("Fe", cubic=True, a=2.8), [M, -M])
    fast = quick(radius=2.6, path="GXM").run(atoms, CapableToy(*terms, soc=False))
    slow = quick(radius=2.6, path="GXM").run(atoms, Toy(*terms, soc=False))
    np.testing.assert_allclose(slow["energy"], fast["energy"], atol=1e-6)
    assert abs(float(slow["gap"])) < 1e-6
    chain = with_moments(
        Atoms("Fe2", scaled_positions=[[0, 0, 0], [0, 0, 0.5]], cell=[3.2, 3.2, 4.8], pbc=True), [M, -M]
    )
    fast = quick(radius=2.5, path="GZ").run(chain, CapableToy(*terms, soc=False))
    energies = quick(radius=2.5, path="GZ").run(chain, EnergyToy(*terms, soc=False))
    np.testing.assert_allclose(energies["energy"], fast["energy"], atol=1e-4)
    assert energies.attrs["hessian"] == "differences of energies"


def test_from_the_tensors_of_the_exchange():
    """Bands straight from the Hessian are those of the exchange's own J_ij, D_ij and A_i."""
    atoms = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.8, 2.8, 3.1], pbc=True)
    atoms = with_moments(atoms, [M, -M])
    toy = CapableToy(Heisenberg(-J, 2.6), PseudoDipolar(2e-4, 2.6), Uniaxial(4e-4))
    data = quick(path="GX", points=5).run(atoms, toy)
    exchange = Exchange(states=0, points=5, mesh=4).run(atoms, toy)
    lengths = np.abs(exchange["moments"].values)
    signs = np.sign(exchange["moments"].values)
    flip = [np.diag([1.0, s, s]) for s in signs]
    # frames with x × y along each moment
    tensor = exchange["tensor"].values / 1e3
    first, second = exchange["i"].values, exchange["j"].values
    for k, q in enumerate(data["q"].values):
        form = np.zeros((2, 2, 2, 2), dtype=complex)
        for i, j, shift, t in zip(first, second, exchange["shift"].values, tensor, strict=True):
            local = flip[i] @ t @ flip[j]
            form[i, :, j] += -2 * local[:2, :2] * np.exp(2j * np.pi * shift @ q)
            form[i, :, i] += 2 * local[2, 2] * np.eye(2)
        for i in range(2):
            single = flip[i] @ exchange["single_ion"].values[i] @ flip[i] / 1e3
            form[i, :, i] += -2 * single[:2, :2] + 2 * single[2, 2] * np.eye(2)
        bracket = np.kron(np.diag(2 / lengths), [[0, -1], [1, 0]])
        values = np.sort(np.linalg.eigvals(1j * bracket @ form.reshape(4, 4)).real)[2:]
        np.testing.assert_allclose(data["energy"].values[k], 1e3 * values, rtol=1e-6)


def test_magnopy_agrees(tmp_path):
    """Another program's linear spin waves from the exported tensors."""
    magnopy = pytest.importorskip("magnopy")
    atoms = Atoms("FeCr", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.8] * 3, pbc=True)
    atoms = with_moments(atoms, [2.1, 1.3])
    toy = CapableToy(Heisenberg(J, 2.5), Heisenberg(4e-4, 2.9), soc=False)
    data = quick(path="GXM", points=7).run(atoms, toy)
    export(Exchange(states=0, points=5, mesh=4).run(atoms, toy), "magnopy", tmp_path)
    hamiltonian = magnopy.io.load_tb2j(tmp_path / "exchange.out")
    lattice = np.array(json.loads(data.attrs["primitive_cell"]))
    waves = magnopy.LSWT(hamiltonian, [[0, 0, 1], [0, 0, 1]])
    for q, energies in zip(data["q"].values, data["energy"].values, strict=True):
        omega = np.sort(np.real(waves.omega(2 * np.pi * q @ np.linalg.inv(lattice).T)))
        np.testing.assert_allclose(omega, energies, atol=1e-3)


def test_committee_and_dataset(tmp_path):
    """Mean and spread of bands, one axis for the density of states, a file that opens plainly, a picture."""
    toys = CommitteeToy([CapableToy(Heisenberg(j, 2.5), soc=False) for j in (1e-3, 2e-3, 4e-3)])
    data = quick().run(ferromagnet(bulk("Fe", a=2.8)), toys)
    top = 1e3 * 4 / M * 16 * M**2 * np.array([1e-3, 2e-3, 4e-3])
    k = int(data["energy"].values[:, 0].argmax())
    assert float(data["energy"][k, 0]) == pytest.approx(top.mean(), rel=1e-9)
    mixed = CommitteeToy([CapableToy(Heisenberg(j, 2.5), soc=False) for j in (1e-3, -2e-3)])
    split = quick(path="GHN").run(ferromagnet(bulk("Fe", a=2.8)), mixed)
    assert "for 1 of 2 members" in split.attrs["note"]
    assert int(split["stiffness_count"]) == 1
    assert float(split["stiffness"]) == pytest.approx(float(data["stiffness_member"][0]), rel=1e-6)
    assert "stiffness, 1 of 2 members" in {row.label for row in Magnon().summary(split)}
    np.testing.assert_allclose(np.abs(split["instability_q"]), 0.5)
    assert float(data["energy_std"][k, 0]) == pytest.approx(top.std(ddof=1), rel=1e-9)
    assert np.trapezoid(data["dos"].values, data["dos_energy"].values) == pytest.approx(1, abs=2e-2)
    for row in [*Magnon().summary(data), *Magnon().summary(split)]:
        if not isinstance(row.value, str) and row.label != "pairs within":
            assert row.spread is not None, row.label
    write_dataset(data, tmp_path / "x.nc")
    with xr.open_dataset(tmp_path / "x.nc") as again:
        xr.testing.assert_identical(again.load(), data)
    Magnon().plot(data).savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_refusals():
    """States and options that give no spin waves."""
    atoms = bulk("Fe", cubic=True, a=2.8)
    toy = CapableToy(Heisenberg(J, 2.6), soc=False)
    with pytest.raises(MomentError, match="no atom carries a moment"):
        quick().run(with_moments(atoms, np.zeros((2, 3))), toy)
    with pytest.raises(MomentError, match="vanish"):
        quick(moments="magnitudes").run(ferromagnet(atoms, 1.0), CapableToy(Landau(-0.05, 0.001), soc=False))
    with pytest.raises(ConvergenceError, match="max_atoms"):
        quick(max_atoms=20).run(ferromagnet(atoms), toy)
    with pytest.raises(OptionError, match="no path 'GQQ'"):
        quick(path="GQQ").run(ferromagnet(atoms), toy)
    with pytest.raises(OptionError, match="mesh"):
        Magnon(mesh=1)


@pytest.mark.parametrize("shorter", [1.0, 1.9, 1.96, 1.99])
def test_stiffness_of_nearly_compensated_ferrimagnets(shorter):
    """D is 4/(m1 - m2) times a sixth of Σ J r² of both sublattices, however soon the parabola ends."""
    a, coupling = 2.85, 0.010
    atoms = Atoms("FeFe", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[a] * 3, pbc=True)
    toy = CapableToy(Heisenberg(-coupling / (2 * shorter), 2.6), soc=False)
    dataset = Magnon(mesh=2, points=5).run(with_moments(atoms, [[0, 0, 2.0], [0, 0, -shorter]]), toy)
    expected = 4 / (2 - shorter) * 2 * 8 * coupling * 1e3 * 0.75 * a**2 / 6
    assert float(dataset["stiffness"]) == pytest.approx(expected, rel=2e-3)
    assert np.isnan(float(dataset["velocity"]))


def test_no_velocity_where_branches_are_shifted_apart():
    """Dzyaloshinskii-Moriya exchange along an antiferromagnet's axis makes a cusp of the lowest branch at q = 0."""
    atoms = Atoms("FeFe", scaled_positions=[[0, 0, 0], [0.5, 0, 0]], cell=[5.4, 2.9, 2.5], pbc=True)
    atoms = with_moments(atoms, [[0, 0, 2.0], [0, 0, -2.0]])
    terms = [Heisenberg(-1e-3, 2.75), Heisenberg(2e-3, 2.6), Uniaxial(1e-3)]
    plain = Magnon(mesh=2, points=5).run(atoms, CapableToy(*terms))
    chiral = Magnon(mesh=2, points=5).run(atoms, CapableToy(*terms, DMI(2e-4, 2.6)))
    assert float(plain["velocity"]) > 1
    assert float(chiral["gap"]) == pytest.approx(float(plain["gap"]), rel=1e-6)
    assert np.isnan(float(chiral["velocity"]))
