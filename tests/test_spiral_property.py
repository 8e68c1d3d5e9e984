"""Spirals against the closed forms of Heisenberg, Landau and Dzyaloshinskii-Moriya lattices."""

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from ase.build import bulk
from mmace_props.base import write_dataset
from mmace_props.errors import CalculatorError, MomentError, OptionError
from mmace_props.protocol import SpinCalculator, with_moments
from mmace_props.spiral import SpinSpiral, name_of, wave_classes
from mmace_props.symmetry import primitive_cell

from .toys import DMI, CapableToy, CommitteeToy, Heisenberg, Landau, Toy

J1, M = 2e-3, 1.9


def iron(cubic=True):
    atoms = bulk("Fe", cubic=cubic, a=2.8)
    return with_moments(atoms, [[0, 0, M]] * len(atoms))


def shells(atoms, cutoff):
    """Vectors and lengths of the neighbours of atom 0 on the same Bravais lattice."""
    found = []
    for shift in np.ndindex(9, 9, 9):
        r = (np.array(shift) - 4) @ atoms.cell[:]
        if 1e-6 < np.linalg.norm(r) < cutoff:
            found.append(r)
    return np.array(found)


def heisenberg(**options):
    return CapableToy(Heisenberg(J1, 3.2, 2.0), soc=False, **options)


def closed_form(k, cutoff=3.2, decay=2.0):
    """E(k) in eV per atom of the bcc toy."""
    r = shells(iron(cubic=False), cutoff)
    strength = J1 * np.exp(-decay * (np.linalg.norm(r, axis=1) - 2.5))
    return -(M**2) * (strength * np.cos(k @ r.T)).sum(axis=-1)


@pytest.mark.parametrize("cubic", [True, False])
def test_energy_and_magnons_of_a_ferromagnet(cubic):
    """E(q) of a flat spiral and ħω = (4/m)(J(0) - J(q)), from the primitive or the conventional cell."""
    dataset = SpinSpiral(points=41).run(iron(cubic), heisenberg())
    k = dataset["k"].values
    expected = closed_form(k) - closed_form(np.zeros(3))
    assert dataset.attrs["primitive_atoms"] == 1
    np.testing.assert_allclose(dataset["energy"], 1e3 * expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dataset["magnon"], 4e3 / M * expected, rtol=1e-9, atol=1e-9)
    assert dataset.attrs["minimum"] == "the order given, q = 0"
    assert float(dataset["minimum_energy"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("cone", [5.0, 40.0])
def test_cone_spirals_give_the_same_magnons(cone):
    """The cone angle divides out, and so does the axis."""
    flat = SpinSpiral(points=15, mesh=0).run(iron(), heisenberg())
    conical = SpinSpiral(points=15, mesh=0, cone=cone, axis=(1.0, -2.0, 0.5)).run(iron(), heisenberg())
    np.testing.assert_allclose(conical["magnon"], flat["magnon"], rtol=1e-7, atol=1e-7)
    factor = np.sin(np.deg2rad(cone)) ** 2
    np.testing.assert_allclose(conical["energy"], factor * flat["energy"], rtol=1e-7, atol=1e-9)


def test_moments_follow_the_wave_vector():
    """With -a m² + b m⁴ the length is m² = (a + J(q))/2b, where E = -(a + J(q))²/4b."""
    a, b = 0.05, 0.005
    toy = CapableToy(Landau(a, b), Heisenberg(J1, 3.2, 2.0), soc=False)
    dataset = SpinSpiral(points=21, moments="magnitudes").run(iron(), toy)
    total = a - closed_form(dataset["k"].values) / M**2
    zero = a - closed_form(np.zeros(3)) / M**2
    np.testing.assert_allclose(dataset["length"].values[:, 0], np.sqrt(total / 2 / b), rtol=1e-6)
    np.testing.assert_allclose(dataset["energy"], 1e3 * (zero**2 - total**2) / 4 / b, rtol=1e-6, atol=1e-6)


def test_supercells_agree_with_the_bloch_theorem():
    """A calculator without spirals gives the same at commensurate wave vectors."""
    q = (0.0, 0.0, 0.25, 0.5, 0.5, 0.0, 1 / 3, 0.0, 0.0, 0.25, 0.25, 0.5)
    bloch = SpinSpiral(q=q, mesh=0).run(iron(), heisenberg())
    cells = SpinSpiral(q=q, mesh=0).run(iron(), Toy(Heisenberg(J1, 3.2, 2.0), soc=False))
    np.testing.assert_allclose(cells["energy"], bloch["energy"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(bloch["k"].values[0], [0, 0, 0.25 * 2 * np.pi / 2.8], atol=1e-12)


def test_native_spirals_and_supercells_have_the_same_forces():
    """Energies and magnetic forces of the home cell, two atoms, moments of any direction."""
    atoms = with_moments(bulk("Fe", cubic=True, a=2.8), [[1.0, 0.3, 0.2], [-0.5, 1.1, 0.7]])
    waves = [[0, 0.25, 0], [0.5, 0, 1 / 3]]
    fast = SpinCalculator(heisenberg()).evaluate_spirals(atoms, waves, [1, 2, 3])
    slow = SpinCalculator(Toy(Heisenberg(J1, 3.2, 2.0))).evaluate_spirals(atoms, waves, [1, 2, 3])
    np.testing.assert_allclose(fast["energy"], slow["energy"], rtol=1e-10)
    np.testing.assert_allclose(fast["magnetic_forces"], slow["magnetic_forces"], rtol=1e-9, atol=1e-12)


def test_lowest_spiral_is_found_and_named():
    """A chain with J1 > 0 > J2 is incommensurate where cos 2πq = -J1/4J2, between the points of the mesh."""
    chain = with_moments(Atoms("Fe", cell=[9.0, 9.5, 2.5], pbc=True), [[0, 0, M]])
    j1, j2 = 2e-3, -1.1e-3
    near, far = Heisenberg(j1 - j2, 2.6), Heisenberg(j2, 5.1)
    dataset = SpinSpiral(points=30).run(chain, CapableToy(near, far, soc=False))
    wave = np.arccos(-j1 / 4 / j2) / 2 / np.pi
    np.testing.assert_allclose(np.abs(dataset["minimum_q"].values[2]), wave, rtol=1e-6)
    assert dataset.attrs["minimum"] == "incommensurate"
    expected = 2e3 * M**2 * (j1 + j2 - j1 * np.cos(2 * np.pi * wave) - j2 * np.cos(4 * np.pi * wave))
    assert float(dataset["minimum_energy"]) == pytest.approx(expected, rel=1e-6)
    anti = SpinSpiral(points=30).run(iron(), CapableToy(Heisenberg(-J1, 2.6), soc=False))
    assert anti.attrs["minimum"].startswith("antiferromagnetic at (1/2, ")


def test_shallow_minimum_next_to_the_origin():
    """A wave vector far below the spacing of the mesh: q = 0 is a maximum there, and is left."""
    chain = with_moments(Atoms("Fe", cell=[9.0, 9.5, 2.5], pbc=True), [[0, 0, M]])
    j1, j2 = 2e-3, -0.51e-3
    toy = CapableToy(Heisenberg(j1 - j2, 2.6), Heisenberg(j2, 5.1), soc=False)
    dataset = SpinSpiral(points=3, path="GZ", mesh=4).run(chain, toy)
    wave = np.arccos(-j1 / 4 / j2) / 2 / np.pi
    assert wave < 0.04
    np.testing.assert_allclose(np.abs(dataset["minimum_q"].values[2]), wave, rtol=1e-5)


def test_names():
    """Names of wave vectors."""
    assert name_of(np.array([0.0, 1.0, 0])) == "the order given, q = 0"
    assert name_of(np.array([0.5, 0.5, 0])) == "antiferromagnetic at (1/2, 1/2, 0)"
    assert name_of(np.array([0, 0, 1 / 3])) == "commensurate, period 3, at (0, 0, 1/3)"
    assert name_of(np.array([0, 0, 0.2137])) == "incommensurate"
    body, one, two = np.array([[0, 0, 0], [0.5, 0.5, 0.5]]), np.array([1.0, 0, 0]), np.array([2.0, 0, 0])
    assert name_of(one, body, np.array([M, -M])) == "ferromagnetic at (1, 0, 0)"
    assert name_of(two, body, np.array([M, -M])) == "the order given, q = 0"
    assert name_of(one, body, np.array([M, M])) == "antiferromagnetic at (1, 0, 0)"
    assert name_of(one, body, np.array([M, 2 * M])) == "ferrimagnetic at (1, 0, 0)"
    assert name_of(one, body, np.array([M, 0.0])) == "the order given, q = 0"
    layers = np.array([[0, 0, 0], [1 / 3, 1 / 3, 0], [2 / 3, 2 / 3, 0]])
    assert name_of(one, layers, np.full(3, M)) == "non-collinear within the cell at (1, 0, 0)"
    assert name_of(one / 2, layers, np.full(3, M)) == "commensurate, period 2, at (1/2, 0, 0)"


@pytest.mark.parametrize("sign", [1, -1])
def test_the_other_order_of_two_sublattices_is_no_q_zero(sign):
    """From the antiferromagnet the lowest spiral of a ferromagnet lies a reciprocal lattice vector away, and back."""
    atoms = with_moments(bulk("Fe", cubic=True, a=2.8), [[0, 0, M], [0, 0, -M]])
    toy = CapableToy(Heisenberg(sign * J1, 2.6), soc=False)
    dataset = SpinSpiral(path="GX", points=5, mesh=2).run(atoms, toy)
    expected, name = (
        (-1e3 * 16 * J1 * M**2, "ferromagnetic at (1, 0, 0)") if sign > 0 else (0, "the order given, q = 0")
    )
    assert float(dataset["minimum_energy"]) == pytest.approx(expected, abs=1e-6)
    assert dataset.attrs["minimum"] == name


def test_the_search_reaches_the_true_period():
    """A chain of two layers: q and q + c* are different spirals, and the lowest may lie in the second zone alone."""
    places = np.array([[0, 0, 0], [0, 0, 0.5]])
    classes, nothing = wave_classes(places)
    assert classes.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert np.all(nothing[:, 2] % 2 == 0)
    assert len(wave_classes(np.array([[0, 0, 0], [1 / 3, 2 / 3, 0.25]]))[0]) == 12
    assert wave_classes(places[:1])[0].tolist() == [[0, 0, 0]]
    atoms = Atoms("FeCr", scaled_positions=places, cell=[9.0, 9.5, 5.0], pbc=True)
    # nearest layers antiparallel by J1, next ones by J2 into a spiral: 2πq/2 = π - arccos(J1/4J2)
    j1, j2 = 2e-3, 1.1e-3
    toy = CapableToy(Heisenberg(-j1 + j2, 2.6), Heisenberg(-j2, 5.1), soc=False)
    dataset = SpinSpiral(path="GX", points=3).run(with_moments(atoms, [M, M]), toy)
    turn = np.arccos(-j1 / 4 / j2) / np.pi
    assert 0.5 < turn < 1
    np.testing.assert_allclose(np.abs(dataset["minimum_q"].values), [0, 0, turn], atol=1e-5)
    assert dataset.attrs["minimum"] == "incommensurate"


def test_chirality_with_spin_orbit_coupling():
    """Dzyaloshinskii-Moriya coupling along the bonds: E(q) - E(-q) = -2 Σ D (r̂·axis) m² sin(q·r)."""
    coupling = 3e-4
    atoms = with_moments(Atoms("Fe", cell=[2.5, 2.5, 2.5], pbc=True), [[0, 0, M]])
    toy = CapableToy(Heisenberg(J1, 2.6), DMI(coupling, 2.6))
    q = (0.0, 0.0, 0.25, 0.0, 0.0, 0.125, 0.25, 0.0, 0.0)
    dataset = SpinSpiral(q=q).run(atoms, toy)
    expected = [-4e3 * coupling * M**2 * np.sin(2 * np.pi * x) for x in (0.25, 0.125)]
    np.testing.assert_allclose(dataset["asymmetry"], [*expected, 0.0], rtol=1e-9, atol=1e-9)
    assert dataset.attrs["route"].startswith("supercells")
    assert "magnon" not in dataset
    off = SpinSpiral(q=q).run(atoms, toy.replace(soc=False))
    assert "asymmetry" not in off


def test_antiferromagnet_keeps_its_signs():
    """With the pattern up-down as reference, q = 0 is the antiferromagnet and H the ferromagnet."""
    atoms = with_moments(bulk("Fe", cubic=True, a=2.8), [[0, 0, M], [0, 0, -M]])
    dataset = SpinSpiral(q=(0.0, 0.0, 1.0)).run(atoms, heisenberg())
    assert dataset.attrs["primitive_atoms"] == 2
    r = shells(iron(cubic=False), 3.2)
    strength = J1 * np.exp(-2.0 * (np.linalg.norm(r, axis=1) - 2.5))
    near = strength[np.linalg.norm(r, axis=1) < 2.6].sum()
    # turning by 2π per cell length turns the body centre by π: all moments parallel
    assert float(dataset["energy"][0]) == pytest.approx(-2e3 * M**2 * near, rel=1e-9)


def test_the_choice_of_the_cell_does_not_matter():
    """The same crystal with an atom described in the next cell has the same spirals."""
    cell = [[2.6, 0.1, 0.0], [0.3, 2.9, -0.2], [0.2, 0.4, 3.3]]
    q = (0.13, -0.21, 0.37, 0.4, 0.1, 0.0)
    found = []
    for shift in ([0, 0, 0], [1, 0, 0], [0, -1, 2]):
        scaled = np.array([[0.02, 0.0, 0.01], [0.48, 0.55, 0.35]]) + np.array([[0, 0, 0], shift])
        atoms = with_moments(Atoms("FeCr", cell=cell, scaled_positions=scaled, pbc=True), [2.1, 1.4])
        found.append(SpinSpiral(q=q, mesh=0).run(atoms, heisenberg())["energy"].values)
    assert np.abs(found[0]).min() > 1.0
    np.testing.assert_allclose(found[1:], [found[0], found[0]], rtol=1e-9)


def test_primitive_cell_keeps_moments_and_orientation():
    """A rotated supercell of a ferromagnet reduces to one atom, of an antiferromagnet to two."""
    large = bulk("Fe", cubic=True, a=2.8) * (2, 1, 1)
    large.rotate(33, (1, 2, 3), rotate_cell=True)
    small, along = primitive_cell(large, np.full(4, M), 1e-4, 1e-2)
    assert len(small) == 1
    steps = small.cell[:] @ np.linalg.inv(large.cell[:]) @ np.diag([4, 2, 2])
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-6)
    small, along = primitive_cell(large, np.array([M, -M, M, -M]), 1e-4, 1e-2)
    assert sorted(along) == [-M, M]


def test_committee_and_dataset(tmp_path):
    """Mean and spread of E(q), and a file that opens plainly."""
    toys = CommitteeToy([CapableToy(Heisenberg(j, 2.6), soc=False) for j in (1e-3, 2e-3, 4e-3)])
    dataset = SpinSpiral(points=11, mesh=4).run(iron(), toys)
    one = SpinSpiral(points=11, mesh=4).run(iron(), toys.members[0])
    np.testing.assert_allclose(dataset["energy"], one["energy"] * np.mean([1, 2, 4]), atol=1e-9)
    np.testing.assert_allclose(dataset["energy_std"], np.abs(one["energy"]) * np.std([1, 2, 4], ddof=1), atol=1e-9)
    split = CommitteeToy([CapableToy(Heisenberg(j, 2.6), soc=False) for j in (1e-3, 2e-3, -1e-3)])
    mixed = SpinSpiral(points=5, mesh=4).run(iron(), split)
    assert mixed.attrs["minimum"].startswith("members disagree: the order given, q = 0 (2 of 3), antiferromagnetic at")
    assert SpinSpiral().summary(mixed)[2].value == mixed.attrs["minimum"]
    chiral = CommitteeToy([CapableToy(Heisenberg(J1, 2.6), DMI(d, 2.6)) for d in (1e-4, 3e-4)])
    told = SpinSpiral(q=(0.0, 0.0, 0.25)).run(iron(), chiral)
    for row in [*SpinSpiral().summary(dataset), *SpinSpiral().summary(told)]:
        assert isinstance(row.value, str) or row.spread is not None, row.label
    write_dataset(dataset, tmp_path / "s.nc")
    with xr.open_dataset(tmp_path / "s.nc") as again:
        xr.testing.assert_identical(again.load(), dataset)
    figure = SpinSpiral().plot(dataset)
    figure.savefig(tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_moments_that_collapse_have_no_magnons():
    """4 ΔE / m means nothing where m is the rounding of a relaxation; other members keep their say."""
    with pytest.raises(MomentError, match="the moments vanish when they are relaxed"):
        SpinSpiral(points=5, mesh=0, moments="magnitudes").run(iron(), CapableToy(Landau(-0.1, 0.01), soc=False))

    def member(a, j):
        return CapableToy(Landau(a, 0.01), Heisenberg(j, 2.6), soc=False)

    ways = {"points": 7, "mesh": 0, "moments": "magnitudes"}
    one = SpinSpiral(**ways).run(iron(), member(-0.012, 3e-3))
    assert float(one["length"].min()) < 0.01, "antiferromagnetic waves lose their moments"
    assert np.isnan(one["magnon"]).any()
    stiff = SpinSpiral(**ways).run(iron(), member(0.08, 1e-4))
    assert np.isfinite(stiff["magnon"]).all()
    both = SpinSpiral(**ways).run(iron(), CommitteeToy([member(-0.012, 3e-3), member(0.08, 1e-4)]))
    alone = np.isnan(one["magnon"].values)
    np.testing.assert_allclose(both["magnon"].values[alone], stiff["magnon"].values[alone], atol=1e-9)
    assert both["magnon_count"].values[alone].max() == 1
    assert SpinSpiral().summary(one.assign(magnon=one["magnon"] * np.nan))


def test_refusals():
    """Patterns, modes and options that make no spiral."""
    with pytest.raises(MomentError, match="no atom carries a moment"):
        SpinSpiral().run(with_moments(iron(), np.zeros((2, 3))), heisenberg())
    with pytest.raises(MomentError, match="collinear"):
        SpinSpiral().run(with_moments(iron(), [[0, 0, 1], [0, 1, 0]]), heisenberg())
    with pytest.raises(OptionError, match="relaxed in full"):
        SpinSpiral(moments="full").run(iron(), heisenberg())
    with pytest.raises(OptionError, match="differ from cell to cell"):
        SpinSpiral(moments="magnitudes").run(iron(), CapableToy(Heisenberg(J1, 2.6)))
    with pytest.raises(CalculatorError, match="--q"):
        SpinSpiral().run(iron(), Toy(Heisenberg(J1, 2.6)))
    with pytest.raises(CalculatorError, match="fits no supercell"):
        SpinSpiral(q=(0.1234, 0.0, 0.0)).run(iron(), Toy(Heisenberg(J1, 2.6)))
    with pytest.raises(OptionError, match="no path 'GQQ'"):
        SpinSpiral(path="GQQ").run(iron(), heisenberg())
    with pytest.raises(OptionError, match="three for each"):
        SpinSpiral(q=(0.1, 0.2))
    with pytest.raises(OptionError, match="cone"):
        SpinSpiral(cone=0.0)
    with pytest.raises(OptionError, match="axis"):
        SpinSpiral(axis=(0.0, 0.0, 0.0))
