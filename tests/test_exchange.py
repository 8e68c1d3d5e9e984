"""Exchange tensors and what follows from them, against Hamiltonians that were put in."""

import numpy as np
import pytest
import spglib
import xarray as xr
from ase import Atoms
from ase.build import bulk
from ase.io import write
from mmace_props.base import write_dataset
from mmace_props.errors import ConvergenceError, MomentError, OptionError, StructureError
from mmace_props.exchange import Exchange, SpinModel
from mmace_props.magnon import Magnon
from mmace_props.protocol import SpinCalculator, with_moments
from mmace_props.spiral import SpinSpiral
from mmace_props.supercell import Coverage, Pairs, Supercell, reach_of
from scipy.spatial.transform import Rotation

from mmace.calculator import MMACECalculator

from .potentials import random_model
from .test_suite_protocol import EnergyToy
from .toys import (
    DMI,
    Biquadratic,
    CapableToy,
    CommitteeToy,
    Heisenberg,
    Landau,
    PseudoDipolar,
    Toy,
    Uniaxial,
)

BOLTZMANN = 8.617333262e-5
J, M = 2e-3, 1.9
WATSON = {"sc": 1.5163860591519780, "bcc": 1.3932039296856769, "fcc": 1.3446610732469220}
"""Means of 1/(1 - γ(q)) over the Brillouin zone, in closed form through elliptic integrals and gamma functions."""


def ferromagnet(atoms, m=M):
    return with_moments(atoms, np.tile([0, 0, m], (len(atoms), 1)))


def quick(**options):
    return Exchange(**{"states": 0, "points": 11, "mesh": 8, **options})


@pytest.mark.parametrize("cell", [(2.4, 2.4, 6.0), (2.4, 6.0, 6.0)], ids=["layer", "chain"])
def test_no_temperature_of_layers_and_chains(cell):
    """Their RPA average has no end (Mermin and Wagner), which no mesh may hide."""
    atoms = with_moments(Atoms("Fe", cell=cell, pbc=True), [[0, 0, 2.0]])
    data = Exchange(states=0, points=5, radius=2.6).run(atoms, CapableToy(Heisenberg(4e-3, 2.5), soc=False))
    assert np.isfinite(float(data["tc_mean_field"]))
    assert np.isnan(float(data["tc_rpa"]))
    assert "does not converge with the mesh" in data.attrs["note"]


@pytest.mark.parametrize(("lattice", "neighbours", "a"), [("sc", 6, 2.4), ("bcc", 8, 2.8), ("fcc", 12, 3.5)])
def test_bravais_ferromagnets(lattice, neighbours, a):
    """J of each shell, Σ J, mean-field and RPA temperatures (Watson's integrals), and the stiffness."""
    atoms = bulk("Fe", lattice, a=a)
    distance = {"sc": a, "bcc": a * np.sqrt(3) / 2, "fcc": a / np.sqrt(2)}[lattice]
    dataset = quick(mesh=16).run(ferromagnet(atoms), CapableToy(Heisenberg(J, distance + 0.1), soc=False))
    exchange = J * M**2
    near = np.abs(dataset["distance"].values - distance) < 1e-3
    assert near.sum() == neighbours
    np.testing.assert_allclose(dataset["J"].values, np.where(near, 1e3 * exchange, 0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        dataset["tensor"].values[near], np.broadcast_to(1e3 * exchange * np.eye(3), (neighbours, 3, 3)), atol=1e-9
    )
    assert float(dataset["J_zero"]) == pytest.approx(1e3 * neighbours * exchange, rel=1e-9)
    mean_field = 2 / 3 * neighbours * exchange / BOLTZMANN
    assert float(dataset["tc_mean_field"]) == pytest.approx(mean_field, rel=1e-6)
    assert float(dataset["tc_rpa"]) == pytest.approx(mean_field / WATSON[lattice], rel=1e-6)
    stiffness = 2 / 3 / M * neighbours * exchange * distance**2 * 1e3
    assert float(dataset["stiffness_sum"]) == pytest.approx(stiffness, rel=1e-6)
    assert float(dataset["stiffness"]) == pytest.approx(stiffness, rel=1e-5)
    assert float(dataset["left_out"]) < 1e-9
    assert dataset["shell_count"].values[0].tolist() == [neighbours] * 2


def test_two_sublattices_of_different_moments():
    """B2: J_ij = J m_i m_j between and within the sublattices, the mean field of a 2×2 matrix, its acoustic magnon."""
    atoms = Atoms("FeCr", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.8] * 3, pbc=True)
    moments = np.array([2.1, 1.3])
    terms = (Heisenberg(J, 2.5), Heisenberg(0.4e-3, 2.9))
    dataset = quick().run(with_moments(atoms, moments), CapableToy(*terms, soc=False))
    tables = {"Cr-Fe": (J + 0.4e-3) * moments[0] * moments[1], "Fe-Fe": 0.4e-3 * 2.1**2, "Cr-Cr": 0.4e-3 * 1.3**2}
    counts = {"Cr-Fe": 8, "Fe-Fe": 6, "Cr-Cr": 6}
    for k in range(3):
        label = str(dataset["shell_pair"].values[k])
        assert float(dataset["shell_J"][k]) == pytest.approx(1e3 * tables.pop(label), rel=1e-9)
        assert dataset["shell_count"].values[k].tolist() == [counts[label]] * 2
    assert not tables
    matrix = np.array([[6 * 0.4e-3 * 2.1**2, 8 * 2.4e-3 * 2.73], [8 * 2.4e-3 * 2.73, 6 * 0.4e-3 * 1.3**2]])
    expected = 2 / 3 * np.linalg.eigvalsh(matrix)[-1] / BOLTZMANN
    assert float(dataset["tc_mean_field"]) == pytest.approx(expected, rel=1e-6)
    # long waves carry both sublattices along: D = (2/3) Σ J R² / (m₁ + m₂)
    weight = 2 * 8 * 2.4e-3 * 2.73 * (2.8**2 * 0.75) + 6 * 0.4e-3 * (2.1**2 + 1.3**2) * 2.8**2
    assert float(dataset["stiffness_sum"]) == pytest.approx(2e3 / 3 * weight / 3.4, rel=1e-6)
    assert float(dataset["stiffness"]) == pytest.approx(2e3 / 3 * weight / 3.4, rel=1e-5)
    assert 0.6 * expected < float(dataset["tc_rpa"]) < expected
    # where only unlike atoms interact the lattice is bcc with one J
    unlike = quick().run(with_moments(atoms, moments), CapableToy(Heisenberg(J, 2.5), soc=False))
    bcc = 2 / 3 * 8 * J * 2.1 * 1.3 / BOLTZMANN
    assert float(unlike["tc_mean_field"]) == pytest.approx(bcc, rel=1e-6)
    assert float(unlike["tc_rpa"]) == pytest.approx(bcc / WATSON["bcc"], rel=1e-4)


@pytest.mark.parametrize("lattice", ["sc", "bcc"])
def test_antiferromagnets_of_two_sublattices_order_like_ferromagnets(lattice):
    """Classical spins turned over on every other site have the same temperatures, mean field and RPA."""
    if lattice == "sc":
        cell = 2.4 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
        atoms, near, count = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=cell, pbc=True), 2.5, 6
    else:
        atoms, near, count = bulk("Fe", cubic=True, a=2.8), 2.6, 8
    data = quick(mesh=16).run(with_moments(atoms, [M, -M]), CapableToy(Heisenberg(-J, near), soc=False))
    mean_field = 2 / 3 * count * J * M**2 / BOLTZMANN
    assert float(data["tc_mean_field"]) == pytest.approx(mean_field, rel=1e-6)
    assert not data["ordering_q"].values.any()
    assert "note" not in data.attrs
    assert float(data["tc_rpa"]) == pytest.approx(mean_field / WATSON[lattice], rel=1e-4)


def test_mean_field_of_a_spiral():
    """A chain with J1 > 0 > J2: the largest J(q) lies where cos 2πq = -J1/4J2, between the points of the mesh."""
    chain = with_moments(Atoms("Fe", cell=[9.0, 9.5, 2.5], pbc=True), [[0, 0, M]])
    j1, j2 = 2e-3, -1.1e-3
    data = quick(radius=5.1).run(chain, CapableToy(Heisenberg(j1 - j2, 2.6), Heisenberg(j2, 5.1), soc=False))
    wave = np.arccos(-j1 / 4 / j2) / 2 / np.pi
    np.testing.assert_allclose(data["ordering_q"], [0, 0, wave], atol=1e-5)
    largest = 2 * M**2 * (j1 * np.cos(2 * np.pi * wave) + j2 * np.cos(4 * np.pi * wave))
    assert float(data["tc_mean_field"]) == pytest.approx(2 / 3 * largest / BOLTZMANN, rel=1e-6)
    assert "J(q) is largest at q = (0, 0, " in data.attrs["note"]


def test_no_temperature_where_a_spiral_between_the_points_of_the_mesh_is_lower():
    """Strong planes on weak, frustrated chains: J(q) is largest at q = (0, 0, 0.02), next to the first points."""
    atoms = with_moments(Atoms("Fe", cell=[3.6, 3.6, 1.6], pbc=True), [[0, 0, M]])
    plane, j1, q = 3e-3, 5e-4, 0.02
    j2 = -j1 / 4 / np.cos(2 * np.pi * q)
    toy = CapableToy(Heisenberg(j1 - j2, 1.7), Heisenberg(j2 - plane, 3.3), Heisenberg(plane, 3.7), soc=False)
    data = quick(radius=3.7, mesh=16).run(atoms, toy)
    np.testing.assert_allclose(data["ordering_q"], [0, 0, q], atol=1e-4)
    assert "not the lowest state" in data.attrs["note"]
    assert np.isnan(float(data["tc_rpa"]))


def test_the_wrong_order_of_one_cell_is_said_to_be_wrong():
    """Parallel sublattices of an antiferromagnet share q = 0 with the right order, which is not theirs."""
    atoms = Atoms("FeCr", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.8] * 3, pbc=True)
    data = quick().run(with_moments(atoms, [M, M]), CapableToy(Heisenberg(-J, 2.6), soc=False))
    assert "another order of the cell's own moments" in data.attrs["note"]
    assert float(data["tc_mean_field"]) == pytest.approx(2 / 3 * 8 * J * M**2 / BOLTZMANN, rel=1e-6)
    assert np.isnan(float(data["tc_rpa"]))


def by_vector(dataset):
    """Tensors by the elements of the two atoms and the vector between them."""
    names = dict(zip(dataset["site"].values.tolist(), dataset["element"].values.tolist(), strict=True))
    rows = zip(
        dataset["i"].values, dataset["j"].values, dataset["vector"].values, dataset["tensor"].values, strict=True
    )
    return {(names[int(i)], names[int(j)], *(np.round(r, 4) + 0.0)): t for i, j, r, t in rows}


@pytest.mark.parametrize("cells", [(5, 0, 0), (9, 0, -21), (-2, 40, 3)])
def test_an_atom_of_another_cell_is_the_same_atom(cells):
    """Positions that left the cell, as after molecular dynamics, change neither pairs nor tensors nor magnons."""
    atoms = with_moments(chiral(), [2.1, 1.4])
    away = atoms.copy()
    away.positions[1] += np.array(cells) @ atoms.cell[:]
    toy = CapableToy(Heisenberg(2e-3, 3.0), DMI(4e-4, 3.0))
    toy.reach = 3.0
    here, there = (quick().run(a, toy) for a in (atoms, away))
    assert there.attrs["supercell"] == here.attrs["supercell"]
    expected, found = by_vector(here), by_vector(there)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), atol=1e-9)
    magnons = [Magnon(points=5, mesh=2).run(a, toy.replace(soc=False)) for a in (atoms, away)]
    np.testing.assert_allclose(magnons[1]["energy"], magnons[0]["energy"], atol=1e-6)
    boxes = [Supercell(a, np.arange(2), (1, 1, 1)) for a in (atoms, away)]
    coverages = [
        Coverage.of(b, SpinCalculator(toy), b.cell.get_initial_magnetic_moments(), np.zeros((2, 2, 2, 2)))
        for b in boxes
    ]
    assert coverages[1].pairs == coverages[0].pairs > 0


def test_nearest_images_in_sheared_supercells():
    """Every pair in its shortest vectors, whatever the vectors of the cell."""
    atoms = chiral()
    sheared = atoms.copy()
    sheared.set_cell(np.array([[1, 0, 0], [4, 1, 0], [-3, 5, 1]]) @ atoms.cell[:])
    box = Supercell(sheared, np.arange(2), (2, 2, 2))
    images = box.images()
    vectors = images.shift @ sheared.cell[:] + sheared.positions[images.column % 2] - sheared.positions[images.first]
    steps = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) @ (2 * atoms.cell[:])
    for first, column, vector in zip(images.first, images.column, vectors, strict=True):
        whole = np.rint(np.linalg.solve(2 * atoms.cell[:].T, vector)) @ (2 * atoms.cell[:])
        shortest = np.linalg.norm(vector - whole + steps, axis=1).min()
        assert np.linalg.norm(vector) == pytest.approx(shortest, abs=1e-3), (first, column)


def test_stiffness_beyond_the_supercell():
    """Frozen spirals have all of (2/3m) Σ J R²; the sum over the supercell's J's lacks a part."""
    atoms = bulk("Fe", a=2.8)
    toy = CapableToy(Heisenberg(J, 8.1, 0.5), soc=False)
    data = quick(radius=3.0, tolerance=1.0).run(ferromagnet(atoms), toy)
    steps = np.stack(np.meshgrid(*[np.arange(-5, 6)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    r = np.linalg.norm(steps @ atoms.cell[:], axis=1)
    r = r[(r > 0) & (r < 8.1)]
    expected = 2e3 / 3 / M * J * M**2 * (np.exp(-0.5 * (r - 2.5)) * r**2).sum()
    assert float(data["stiffness"]) == pytest.approx(expected, rel=1e-4)
    assert float(data["stiffness_sum"]) < 0.7 * expected
    labels = [r.label for r in Exchange().summary(data)]
    assert f"stiffness, J truncated at {data.attrs['unique_radius']:.1f} Å" in labels
    on = quick(radius=3.0, tolerance=1.0).run(ferromagnet(atoms), toy.replace(soc=True))
    assert "stiffness" not in on


def test_stiffness_of_sublattices_that_yield():
    """A chain with two springs in a row: the weaker bond turns more, D_zz = (2/m) J_a J_b c²/(J_a + J_b)."""
    atoms = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0, 0, 0.4]], cell=[9.0, 9.5, 5.0], pbc=True)
    toy = CapableToy(Heisenberg(J, 3.1, 2.0, 2.0), soc=False)
    data = quick(radius=4.0).run(ferromagnet(atoms), toy)
    a, b = J * M**2, J * M**2 * np.exp(-2.0)
    expected = 1e3 * 2 / M * a * b / (a + b) * 25 / 3
    assert float(data["stiffness"]) == pytest.approx(expected, rel=1e-4)
    assert float(data["stiffness_sum"]) == pytest.approx(expected, rel=1e-6)
    waves = Magnon(radius=4.0, points=5, mesh=2, moments="fixed").run(ferromagnet(atoms), toy)
    assert float(waves["stiffness_frozen"]) == pytest.approx(expected, rel=1e-4)
    assert float(waves["stiffness"]) == pytest.approx(expected, rel=1e-5)


def heusler():
    """DO3 Fe3Al with two inequivalent sites of Fe."""
    places = [[0.25] * 3, [0.75] * 3, [0.5] * 3, [0, 0, 0]]
    cell = 2.9 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    return with_moments(Atoms("Fe3Al", scaled_positions=places, cell=cell, pbc=True), [1.9, 1.9, 2.4, 0.0])


def test_shells_of_unequal_coordination():
    """Every atom of DO3's first site has 4 of the second at hand, and one of the second 8 of the first."""
    dataset = quick().run(heusler(), CapableToy(Heisenberg(J, 3.0), soc=False))
    shells = {str(n): k for k, n in reversed(list(enumerate(dataset["shell_pair"].values)))}
    assert dataset["shell_count"].values[shells["Fe0-Fe2"]].tolist() == [4, 8]
    assert float(dataset["shell_J"][shells["Fe0-Fe2"]]) == pytest.approx(1e3 * J * 1.9 * 2.4, rel=1e-9)
    assert dataset["shell_count"].values[shells["Fe0-Fe0"]].tolist() == [6, 6]
    assert float(dataset["shell_J"][shells["Fe0-Fe0"]]) == pytest.approx(1e3 * J * 1.9**2, rel=1e-9)
    assert "J Fe0-Fe2, 2.511 Å, 4 and 8 neighbours" in [r.label for r in Exchange().summary(dataset)]


def test_pairs_that_symmetry_does_not_relate_are_different_shells():
    """Parallel and antiparallel neighbours at one distance, with a biquadratic term that tells them apart."""
    cell = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0, 0, 0.5]], cell=[2.5, 2.5, 5.0], pbc=True)
    b = 2e-4
    toy = CapableToy(Heisenberg(-J, 2.6), Biquadratic(b, 2.6), soc=False)
    dataset = quick().run(with_moments(cell, [M, -M]), toy)
    near = np.flatnonzero(dataset["shell_distance"].values < 2.6)
    assert dataset["shell_count"].values[near, 0].tolist() in ([4, 2], [2, 4])
    for k in near:
        sign = float(dataset["shell_cosine"][k])
        assert float(dataset["shell_J"][k]) == pytest.approx(1e3 * (-J * M**2 + 2 * sign * b), rel=1e-6)
    labels = [r.label for r in Exchange().summary(dataset)]
    assert "J Fe-Fe, 2.500 Å parallel, 4 neighbours" in labels
    assert "J Fe-Fe, 2.500 Å antiparallel, 2 neighbours" in labels


def test_rocksalt_antiferromagnet():
    """Layers up and down: the reference does not bias J, non-magnetic sites stay out."""
    atoms = bulk("CrN", "rocksalt", a=4.1, cubic=True)
    layers = np.where(np.isclose(atoms.get_scaled_positions()[:, 2] % 1, 0), 1.0, -1.0)
    atoms = with_moments(atoms, np.where(atoms.numbers == 24, 2.5 * layers, 0.0))
    dataset = quick(radius=4.0).run(atoms, CapableToy(Heisenberg(-J, 3.0), soc=False))
    assert set(dataset["element"].values) == {"Cr"}
    near = dataset["distance"].values < 3.0
    np.testing.assert_allclose(dataset["J"].values[near], -1e3 * J * 2.5**2, rtol=1e-9)
    np.testing.assert_allclose(dataset["J"].values[~near], 0, atol=1e-9)
    assert near.sum() == 12 * dataset.sizes["site"]
    # 8 of 12 neighbours are antiparallel
    assert float(dataset["J_zero"]) == pytest.approx(1e3 * J * 2.5**2 * 4, rel=1e-9)


def chiral():
    """A triclinic cell of two different atoms: no symmetry but the lattice."""
    cell = [[2.6, 0.1, 0.0], [0.3, 2.9, -0.2], [0.2, 0.4, 3.3]]
    return Atoms("FeCr", scaled_positions=[[0.02, 0.0, 0.01], [0.48, 0.55, 0.35]], cell=cell, pbc=True)


def test_full_tensors_without_symmetry():
    """Isotropic, symmetric anisotropic and Dzyaloshinskii-Moriya parts of every pair, with signs and factors."""
    atoms = with_moments(chiral(), [2.1, 1.4])
    isotropic, dipolar, dmi = 2e-3, 3e-4, 4e-4
    toy = CapableToy(Heisenberg(isotropic, 3.0), PseudoDipolar(dipolar, 3.0, 1.0), DMI(dmi, 3.0))
    dataset = quick().run(atoms, toy)
    lengths = np.array([2.1, 1.4])
    signs = np.array(
        [[[0, 0, 0], [0, 0, 1], [0, -1, 0]], [[0, 0, -1], [0, 0, 0], [1, 0, 0]], [[0, 1, 0], [-1, 0, 0], [0, 0, 0]]]
    )
    found = 0
    for p in range(dataset.sizes["pair"]):
        vector, distance = dataset["vector"].values[p], float(dataset["distance"][p])
        unit, size = vector / distance, lengths[int(dataset["i"][p])] * lengths[int(dataset["j"][p])]
        inside = distance < 3.0
        found += inside
        expected = np.zeros((3, 3))
        if inside:
            expected = isotropic * np.eye(3) + dipolar * np.exp(-(distance - 2.5)) * np.outer(unit, unit)
            expected = size * (expected + dmi * np.einsum("c,cab->ab", unit, signs))
        np.testing.assert_allclose(dataset["tensor"].values[p], 1e3 * expected, atol=1e-8)
        even = (expected + expected.T) / 2 - np.trace(expected) / 3 * np.eye(3)
        np.testing.assert_allclose(dataset["anisotropic"].values[p], 1e3 * even, atol=1e-8)
        if inside:
            np.testing.assert_allclose(dataset["D"].values[p], 1e3 * size * dmi * unit, atol=1e-8)
            again = dataset["i"].values[p] * 2 + dataset["j"].values[p]
            assert again in (0, 1, 2, 3)
    assert found > 8
    assert float(dataset["direction_residual"]) < 1e-8
    np.testing.assert_allclose(dataset["single_ion"], 0, atol=1e-7)


def test_canted_reference_gives_the_same_tensors():
    """A bilinear Hamiltonian has one set of tensors, whatever state they are read from."""
    toy = CapableToy(Heisenberg(2e-3, 3.0), PseudoDipolar(3e-4, 3.0, 1.0), DMI(4e-4, 3.0))
    flat = quick().run(with_moments(chiral(), [2.1, 1.4]), toy)
    canted = quick().run(with_moments(chiral(), [[0.3, -0.4, 2.04], [1.2, 0.7, -0.16]]), toy)
    assert canted.attrs["collinear"] == "no"
    order = np.lexsort(np.round(canted["vector"].values, 4).T)
    other = np.lexsort(np.round(flat["vector"].values, 4).T)
    lengths = canted["moments"].values[canted["i"].values] * canted["moments"].values[canted["j"].values]
    scale = (np.array([2.1, 1.4])[flat["i"].values] * np.array([2.1, 1.4])[flat["j"].values])[other] / lengths[order]
    np.testing.assert_allclose(
        canted["tensor"].values[order] * scale[:, None, None], flat["tensor"].values[other], atol=1e-8
    )
    assert float(canted["direction_residual"]) < 1e-8
    np.testing.assert_allclose(canted["single_ion"], 0, atol=1e-7)
    uniaxial = CapableToy(Heisenberg(2e-3, 3.2), Uniaxial(3e-4, numbers=(26,)))
    atoms = Atoms("FeCr", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.8, 2.8, 3.1], pbc=True)
    found = quick(radius=3.3).run(with_moments(atoms, [[0.3, 0.2, 2.0], [1.2, 0, 0.4]]), uniaxial)
    np.testing.assert_allclose(found["single_ion"].values[0], 0.3 * np.diag([-1, -1, 2]) / 3, atol=1e-7)
    np.testing.assert_allclose(found["onsite_offset"], 0, atol=1e-7)


def test_several_references_share_one_model(tmp_path):
    """Tensors of a bilinear Hamiltonian from states whose cells differ are those put in; no state misses anything."""
    toy = CapableToy(
        Heisenberg(2e-3, 3.0), PseudoDipolar(3e-4, 3.0, 1.0), DMI(4e-4, 3.0), Uniaxial(2e-4, numbers=(26,))
    )
    start = with_moments(chiral(), [2.1, 1.4])
    canted = chiral().repeat((1, 3, 1))
    canted.positions += [0.3, -0.1, 0.2]
    moments = np.random.default_rng(0).normal(size=(6, 3))
    moments *= (np.array([2.1, 1.4] * 3) / np.linalg.norm(moments, axis=1))[:, None]
    write(tmp_path / "canted.extxyz", with_moments(canted, moments))
    one = quick().run(start, toy)
    names = ("fm", "afm", str(tmp_path / "canted.extxyz"))
    several = quick(references=names, states=10).run(start, toy)
    assert several["state"].values.tolist() == list(names)
    assert several["state_supercell"].values[2] != several["state_supercell"].values[0]
    assert several.sizes["pair"] == one.sizes["pair"]
    np.testing.assert_array_equal(several["shift"], one["shift"])
    np.testing.assert_allclose(several["tensor"], one["tensor"], atol=1e-8)
    np.testing.assert_allclose(several["single_ion"], one["single_ion"], atol=1e-7)
    for name in ("state_residual", "shell_J_spread", "model_error", "state_model_error"):
        np.testing.assert_allclose(several[name], 0, atol=2e-6)
    np.testing.assert_allclose(several["state_energy_model"], several["state_energy"], atol=2e-5)
    assert np.all(several["state_energy"].values[1:] > 1)
    write_dataset(several, tmp_path / "x.nc")
    with xr.open_dataset(tmp_path / "x.nc") as again:
        xr.testing.assert_identical(again.load(), several)


def test_references_that_disagree():
    """With a biquadratic term the ferromagnet says J + 2B, the antiferromagnet J - 2B, both together J."""
    b = 3e-4
    toy = CapableToy(Heisenberg(J, 2.6), Biquadratic(b, 2.6), soc=False)
    atoms = ferromagnet(bulk("Fe", cubic=True, a=2.8))
    for names in (("fm", "afm"), ("AFM", "given")):
        data = quick(references=names).run(atoms, toy)
        signs = np.array([1 if name in ("fm", "given") else -1 for name in data["state"].values])
        assert float(data["shell_J"][0]) == pytest.approx(1e3 * J * M**2, rel=1e-6)
        np.testing.assert_allclose(data["shell_J_state"].values[:, 0], 1e3 * (J * M**2 + 2 * signs * b), rtol=1e-6)
        # two values 4B apart
        assert float(data["shell_J_spread"][0]) == pytest.approx(1e3 * 4 * b / np.sqrt(2), rel=1e-6)
        np.testing.assert_allclose(data["state_residual"], 1e3 * 2 * b, rtol=1e-6)
        # eight bonds in the sum from either end, turned over
        expected = -signs * 8 * 1e3 * J * M**2
        np.testing.assert_allclose(data["state_energy"], expected - expected[0], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(data["state_energy_model"], expected - expected[0], rtol=1e-6, atol=1e-9)
        assert data["shell_count"].values[0].tolist() == [8, 8]
    # one state counts as much as another, though its cell holds more sites
    rows = {r.label: r.value for r in Exchange().summary(data)}
    assert rows["afm alone: J Fe-Fe, 2.425 Å"] == pytest.approx(1e3 * (J * M**2 - 2 * b), rel=1e-6)
    assert rows["spread between states: J Fe-Fe, 2.425 Å"] == pytest.approx(1e3 * 4 * b / np.sqrt(2), rel=1e-6)
    alone = quick(references=("afm",)).run(atoms, toy)
    assert "state" not in alone
    assert float(alone["shell_J"][0]) == pytest.approx(1e3 * (J * M**2 - 2 * b), rel=1e-6)


def test_references_that_are_refused(tmp_path):
    """Names, files and crystals that do not belong together, each in one sentence."""
    toy = CapableToy(Heisenberg(J, 2.6), soc=False)
    atoms = ferromagnet(bulk("Fe", cubic=True, a=2.8))
    other = ferromagnet(bulk("Fe", cubic=True, a=2.9))
    write(tmp_path / "other.extxyz", other)
    write(tmp_path / "bare.extxyz", Atoms("Fe", cell=bulk("Fe", a=2.8).cell, pbc=True))
    half = with_moments(bulk("Fe", cubic=True, a=2.8), [M, 0.0])
    write(tmp_path / "half.extxyz", half)
    for names, error, sentence in (
        (("fm", "afn"), OptionError, "did you mean 'afm'"),
        (("fm", "FM"), OptionError, "'fm' is given twice"),
        (("fm", str(tmp_path / "other.extxyz")), StructureError, "is not the crystal of the others"),
        (("fm", str(tmp_path / "bare.extxyz")), MomentError, "carries no moments"),
        (("fm", str(tmp_path / "half.extxyz")), MomentError, "loses its moment"),
    ):
        with pytest.raises(error, match=sentence):
            quick(references=names).run(atoms, toy)


def test_triangular_reference():
    """120° order without spin-orbit coupling: J itself, the energy of each bond -½ of it, q = 0 not favoured."""
    a = 2.6
    cell = np.array([[1.5, np.sqrt(3) / 2, 0], [0, np.sqrt(3), 0], [0, 0, 3.0]]) * a
    atoms = Atoms("Fe3", cell=cell, scaled_positions=[[0, 0, 0], [1 / 3, 1 / 3, 0], [2 / 3, 2 / 3, 0]], pbc=True)
    angles = 2 * np.pi / 3 * np.arange(3)
    moments = M * np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    data = Exchange(points=5, mesh=4, radius=3.0, states=20).run(
        with_moments(atoms, moments), CapableToy(Heisenberg(-J, 2.7), soc=False)
    )
    assert data["shell_J"].values[0] == pytest.approx(-1e3 * J * M**2, rel=1e-9)
    assert data["shell_count"].values[0].tolist() == [6, 6]
    assert float(data["J_zero"]) == pytest.approx(3e3 * J * M**2, rel=1e-9)
    np.testing.assert_allclose(np.linalg.norm(data["direction"], axis=1), 1)
    np.testing.assert_allclose(data["model_error"], 0, atol=1e-8)
    assert np.isnan(float(data["stiffness_sum"]))
    assert "stiffness" not in data


def test_bilinear_and_biquadratic_exchange_of_a_canted_reference():
    """At 120° every Hessian mixes J and B, since (e·e)² has curvature there; the joint fit gives back both."""
    cell = 2.6 * np.array([[1.5, np.sqrt(3) / 2, 0], [0, np.sqrt(3), 0], [0, 0, 3.0]])
    atoms = Atoms("Fe3", cell=cell, scaled_positions=[[0, 0, 0], [1 / 3, 1 / 3, 0], [2 / 3, 2 / 3, 0]], pbc=True)
    angles = 2 * np.pi / 3 * np.arange(3)
    moments = M * np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    b = 2e-4
    toy = CapableToy(Heisenberg(-J, 2.7), Biquadratic(b, 2.7), soc=False)
    data = Exchange(points=5, mesh=4, radius=3.0, states=20).run(with_moments(atoms, moments), toy)
    assert float(data["direction_residual"]) > 0.05
    assert float(data["model_error"].max()) > 0.1
    np.testing.assert_allclose(data["biquadratic"], [1e3 * b], rtol=1e-6)
    np.testing.assert_allclose(data["bilinear"], [-1e3 * J * M**2], rtol=1e-6)
    np.testing.assert_allclose(data["model_error_biquadratic"], 0, atol=1e-6)
    assert float(data["direction_residual_biquadratic"]) < 1e-6
    rows = {r.label: r.value for r in Exchange().summary(data)}
    assert rows["B Fe-Fe, 2.600 Å"] == pytest.approx(0.2, rel=1e-6)
    assert rows["J beside B Fe-Fe, 2.600 Å"] == pytest.approx(-1e3 * J * M**2, rel=1e-6)


def test_biquadratic_exchange_beside_anisotropy():
    """Next to two-ion and single-ion anisotropy, from a canted reference: own blocks hold a part of B as well."""
    b = 3e-4
    terms = (Heisenberg(2e-3, 2.7), PseudoDipolar(3e-4, 2.7, 1.0), DMI(4e-4, 2.7), Uniaxial(2e-4, numbers=(26,)))
    canted = [[0.3, -0.4, 2.04], [1.2, 0.7, -0.16]]
    canted *= (np.array([2.1, 1.4]) / np.linalg.norm(canted, axis=1))[:, None]
    options = {"points": 5, "mesh": 4, "states": 40, "biquadratic": 7}
    data = Exchange(**options).run(with_moments(chiral(), canted), CapableToy(*terms, Biquadratic(b, 2.7)))
    inside = data["shell_distance"].values[:7] < 2.7
    assert 3 < inside.sum() < 7
    np.testing.assert_allclose(data["biquadratic"], np.where(inside, 1e3 * b, 0), atol=1e-6)
    np.testing.assert_allclose(data["model_error_biquadratic"], 0, atol=1e-6)
    bare = quick().run(with_moments(chiral(), canted), CapableToy(*terms))
    np.testing.assert_allclose(data["bilinear"], bare["shell_J"].values[:7], atol=1e-6)


def test_bilinear_and_biquadratic_exchange_of_several_references():
    """Ferromagnet, antiferromagnet and a canted state together give back J and B, and miss nothing."""
    b = 3e-4
    toy = CapableToy(Heisenberg(J, 2.9), Biquadratic(b, 2.6), soc=False)
    atoms = ferromagnet(bulk("Fe", cubic=True, a=2.8))
    data = Exchange(points=5, mesh=4, states=30, references=("fm", "afm")).run(atoms, toy)
    np.testing.assert_allclose(data["bilinear"], [1e3 * J * M**2] * 2, rtol=1e-6)
    np.testing.assert_allclose(data["biquadratic"], [1e3 * b, 0], atol=1e-6)
    assert float(data["direction_residual"]) == pytest.approx(1e3 * 2 * b, rel=1e-6)
    assert float(data["direction_residual_biquadratic"]) < 1e-6
    np.testing.assert_allclose(data["model_error_biquadratic"], 0, atol=1e-6)


def test_single_ion_tensor():
    """K sin²θ is -e·A·e with A = K (ĉĉ - 1/3), next to two-ion terms that must not leak into it."""
    atoms = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.8, 2.8, 3.1], pbc=True)
    toy = CapableToy(Heisenberg(J, 3.2), PseudoDipolar(2e-4, 3.2), Uniaxial(3e-4, numbers=(26,)))
    dataset = quick().run(with_moments(atoms, [2.0, 0.0]), toy)
    np.testing.assert_allclose(dataset["single_ion"].values[0], 0.3 * np.diag([-1, -1, 2]) / 3, atol=1e-7)
    np.testing.assert_allclose(dataset["onsite_offset"], 0, atol=1e-7)
    without = Exchange().summary(quick().run(with_moments(atoms, [2.0, 0.0]), toy.replace(soc=False)))
    assert not any("anisotrop" in r.label for r in without)
    rows = {r.label: r.value for r in Exchange().summary(dataset)}
    assert rows["single-ion anisotropy of Fe 0, hard less easy"] == pytest.approx(0.3, rel=1e-5)
    # D m² (r̂r̂ - 1/3) of the pair at 2.8 Å is the largest
    strongest = 2e-4 * np.exp(-0.3) * 4 * 2 / 3
    assert rows["largest symmetric anisotropic exchange"] == pytest.approx(1e3 * strongest, rel=1e-5)


def test_no_symmetry_is_an_error_of_the_suite(monkeypatch):
    """What spglib cannot find is said with what to change."""
    monkeypatch.setattr(spglib, "get_magnetic_symmetry", lambda *_, **__: None)
    with pytest.raises(StructureError, match="choose another --symprec"):
        quick().run(ferromagnet(bulk("Fe", a=2.8)), CapableToy(Heisenberg(J, 2.6), soc=False))


def test_moments_off_their_minimum_do_not_leak():
    """A Landau term off its minimum has a longitudinal force, which the sphere takes out of the own block."""
    toy = CapableToy(Heisenberg(J, 2.6), Landau(0.05, 0.005), Uniaxial(3e-4))
    dataset = quick().run(ferromagnet(bulk("Fe", a=2.8)), toy)
    np.testing.assert_allclose(dataset["onsite_offset"], 0, atol=1e-6)
    relaxed = quick(moments="magnitudes").run(ferromagnet(bulk("Fe", a=2.8)), toy)
    assert float(relaxed["moments"][0]) == pytest.approx(np.sqrt((0.05 + 8 * J) / 0.01), rel=1e-6)
    assert float(relaxed["shell_J"][0]) == pytest.approx(1e3 * J * (0.05 + 8 * J) / 0.01, rel=1e-6)


def test_own_blocks_of_antiferromagnets_and_hexagonal_lattices():
    """Signs of the reference in the own block, and axes that the lattice does not map onto each other."""
    terms = (Heisenberg(-J, 2.6), Landau(0.05, 0.005), Uniaxial(3e-4))
    afm = quick().run(with_moments(bulk("Fe", cubic=True, a=2.8), [M, -M]), CapableToy(*terms))
    np.testing.assert_allclose(afm["onsite_offset"], 0, atol=1e-6)
    hexagonal = ferromagnet(bulk("Co", "hcp", a=2.5, c=4.1), 1.6)
    toy = CapableToy(Heisenberg(J, 2.6), PseudoDipolar(2e-4, 2.6), Uniaxial(3e-4), elements=None, default_moments=None)
    dataset = quick().run(hexagonal, toy)
    for key in ("symmetry_removed", "direction_residual"):
        assert float(dataset[key]) < 1e-8
    expected = 0.3 * np.diag([-1, -1, 2]) / 3
    np.testing.assert_allclose(dataset["single_ion"].values, [expected, expected], atol=1e-6)


def test_spin_model_gives_the_energies_of_its_hamiltonian():
    """On random states at every cone the bilinear model is exact where the Hamiltonian is bilinear."""
    atoms = with_moments(chiral(), [2.1, 1.4])
    toy = CapableToy(Heisenberg(2e-3, 3.0), PseudoDipolar(3e-4, 3.0), DMI(4e-4, 3.0), Uniaxial(3e-4))
    dataset = Exchange(points=5, mesh=4, states=100).run(atoms, toy)
    assert dataset["cone"].values.tolist() == [5, 20, 60, 180]
    assert np.all(dataset["model_scale"].values > 0.1)
    np.testing.assert_allclose(dataset["model_error"], 0, atol=1e-8)


def test_where_the_heisenberg_picture_ends():
    """A biquadratic term gives J + 2B on the ferromagnet, J - 2B on the antiferromagnet, and an error that grows."""
    b = 3e-4
    toy = CapableToy(Heisenberg(J, 2.6), Biquadratic(b, 2.6), soc=False)
    atoms = bulk("Fe", cubic=True, a=2.8)
    fm = Exchange(points=5, mesh=8).run(ferromagnet(atoms), toy)
    assert float(fm["shell_J"][0]) == pytest.approx(1e3 * (J * M**2 + 2 * b), rel=1e-6)
    afm = quick().run(with_moments(atoms, [M, -M]), toy)
    assert float(afm["shell_J"][0]) == pytest.approx(1e3 * (J * M**2 - 2 * b), rel=1e-6)
    for data, sign in ((fm, 1), (Exchange(points=5, mesh=8).run(with_moments(atoms, [M, -M]), toy), -1)):
        # -J e·e - B (e·e)² is -(J + 2Bσ) e·e - B (e·e - σ)² and a number
        np.testing.assert_allclose(data["biquadratic"], [1e3 * b, 0], atol=1e-6)
        np.testing.assert_allclose(data["bilinear"], [1e3 * J * M**2, 0], atol=1e-6)
        np.testing.assert_allclose(data["model_error_biquadratic"], 0, atol=1e-6)
        assert float(data["shell_J"][0]) == pytest.approx(1e3 * (J * M**2 + 2 * sign * b), rel=1e-6)
    assert any(r.label == "B Fe-Fe, 2.425 Å" and r.value == pytest.approx(0.3) for r in Exchange().summary(fm))
    relative = (fm["model_error"] / fm["model_scale"]).values
    assert np.all(np.diff(relative) > 0)
    assert relative[0] < 1e-2
    assert relative[-1] > 2e-2


def test_exchange_in_reciprocal_space_is_the_spiral():
    """J(0) - J(q) from the tensors is E(q) - E(0) of flat spirals in the primitive cell."""
    toy = CapableToy(Heisenberg(J, 3.5, 1.5), soc=False)
    atoms = ferromagnet(bulk("Fe", a=2.8))
    exchange = quick(points=25).run(atoms, toy)
    spiral = SpinSpiral(points=25, mesh=0).run(atoms, toy)
    np.testing.assert_allclose(exchange["q"], spiral["q"], atol=1e-12)
    difference = exchange["J_q"].values[0] - exchange["J_q"].values
    np.testing.assert_allclose(difference, spiral["energy"], rtol=1e-9, atol=1e-9)


def test_symmetry_and_turned_crystals():
    """Tensors turn with the crystal, and symmetrisation removes nothing from a symmetric Hamiltonian."""
    atoms = ferromagnet(bulk("Fe", a=2.8))
    toy = CapableToy(Heisenberg(J, 3.0), PseudoDipolar(3e-4, 3.0))
    plain = quick().run(atoms, toy)
    assert float(plain["symmetry_removed"]) < 1e-9
    rotation = Rotation.from_rotvec([0.4, -0.7, 0.2])
    turned = Atoms("Fe", cell=rotation.apply(atoms.cell[:]), pbc=True)
    other = quick().run(with_moments(turned, [rotation.apply([0, 0, M])]), toy)
    matrix = rotation.as_matrix()
    for p in range(0, plain.sizes["pair"], 7):
        image = np.linalg.norm(other["vector"].values - matrix @ plain["vector"].values[p], axis=1).argmin()
        expected = matrix @ plain["tensor"].values[p] @ matrix.T
        np.testing.assert_allclose(other["tensor"].values[image], expected, atol=1e-8)


def test_symmetrisation_measures_what_it_removes():
    """A chiral term on a centrosymmetric lattice is forbidden there: its size is reported."""
    dataset = quick().run(ferromagnet(bulk("Fe", a=2.8)), CapableToy(Heisenberg(J, 2.6), DMI(2e-4, 2.6)))
    assert float(dataset["symmetry_removed"]) == pytest.approx(1e3 * 2e-4 * M**2 / np.sqrt(3), rel=1e-6)
    assert np.abs(dataset["D"]).max() < 1e-9


def test_the_supercell_grows_until_nothing_is_left():
    """A longer interaction takes a larger cell; a limit below what it needs is an error that says how much is left."""
    atoms = ferromagnet(bulk("Fe", a=2.8))
    short = quick(radius=3.0).run(atoms, CapableToy(Heisenberg(J, 2.6), soc=False))
    long = quick(radius=3.0).run(atoms, CapableToy(Heisenberg(J, 5.7, 0.5), soc=False))
    assert short.attrs["unique_radius"] < long.attrs["unique_radius"]
    assert long.attrs["unique_radius"] > 5.7
    inside = long["distance"].values < 5.7
    expected = J * M**2 * np.exp(-0.5 * (long["distance"].values - 2.5))
    np.testing.assert_allclose(long["J"].values, np.where(inside, 1e3 * expected, 0), rtol=1e-8, atol=1e-9)
    with pytest.raises(ConvergenceError, match=r"of the largest is left at 4\.\d Å; raise max_atoms"):
        quick(radius=3.0, max_atoms=100).run(atoms, CapableToy(Heisenberg(J, 5.7, 0.5), soc=False))


class Stating(CapableToy):
    """A toy that states how far it couples two atoms."""

    reach = 5.7


def test_a_supercell_says_whether_it_exceeds_twice_the_reach():
    """Beyond twice the reach nothing is folded; below it, how many pairs and how much of Σ |J| are."""
    atoms = ferromagnet(bulk("Fe", a=2.8))
    terms = (Heisenberg(J, 5.7, 0.5),)
    steps = np.stack(np.meshgrid(*[np.arange(-6, 7)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    r = np.linalg.norm(steps @ atoms.cell[:], axis=1)
    r = r[(r > 0) & (r < 5.7)]
    total = 1e3 * J * M**2 * np.exp(-0.5 * (r - 2.5)).sum()

    whole = quick(radius=3.0, tolerance=1e-10).run(atoms, Stating(*terms, soc=False))
    assert whole.attrs["reach"] == 5.7
    assert whole.attrs["supercell_beyond_twice_the_reach"] == "yes"
    assert whole.attrs["unique_radius"] > 5.7
    assert float(whole["folded_pairs"]) == 0
    assert float(whole["folded"]) < 1e-9
    assert ("larger than twice the reach", "yes") in [(row.label, row.value) for row in Exchange().summary(whole)]

    # no larger than that takes: six cells of 1.98 Å between the planes
    assert whole.attrs["supercell"] == "[6, 6, 6]"

    part = quick(radius=3.0, tolerance=1.0).run(atoms, Stating(*terms, soc=False))
    radius = part.attrs["unique_radius"]
    assert part.attrs["supercell_beyond_twice_the_reach"] == "no"
    count = int((r > radius - 1e-3).sum())
    assert count > 20
    assert float(part["folded_pairs"]) == count
    # folding moves couplings and loses none
    assert float(part["folded"]) == pytest.approx(total - float(part["J"].sum()), rel=1e-9)
    assert float(part["folded"]) > 0.2 * total
    rows = {row.label: row.value for row in Exchange().summary(part)}
    assert rows["larger than twice the reach"] == f"no, of 5.7 Å: {count} pairs of a site are folded"
    # pairs at r hold couplings beyond 2R - r alone
    near = quick(radius=4.2, tolerance=1.0).run(atoms, Stating(*terms, soc=False))
    clean = near["distance"].values < 2 * near.attrs["unique_radius"] - 5.7
    assert clean.sum() == 8 + 6 + 12
    expected = 1e3 * J * M**2 * np.exp(-0.5 * (near["distance"].values - 2.5))
    np.testing.assert_allclose(near["J"].values[clean], expected[clean], rtol=1e-9)
    assert near.attrs["supercell_beyond_twice_the_reach"] == "no"

    waves = Magnon(radius=3.0, tolerance=1.0, points=5, mesh=2).run(atoms, Stating(*terms, soc=False))
    assert waves.attrs["supercell_beyond_twice_the_reach"] == "no"
    assert float(waves["folded"]) == pytest.approx(float(part["folded"]), rel=1e-9)
    assert ("larger than twice the reach", rows["larger than twice the reach"]) in [
        (row.label, row.value) for row in Magnon().summary(waves)
    ]

    silent = quick(radius=3.0, tolerance=1.0).run(atoms, CapableToy(*terms, soc=False))
    assert silent.attrs["reach"] == "not stated by the calculator"
    assert silent.attrs["supercell_beyond_twice_the_reach"] == "not known"
    assert np.isnan(float(silent["folded_pairs"]))


def test_the_reach_of_the_potential_is_that_of_its_messages():
    """Two atoms meet at a third that both send messages to: through every layer, and tilts of one axis through one."""
    calculator = MMACECalculator(random_model(), soc=False)
    assert calculator.reach == pytest.approx(2 * 2 * calculator.cutoff)
    assert calculator.tilt_reach == pytest.approx(2 * calculator.cutoff)
    assert calculator.replace(soc=True).tilt_reach == calculator.reach
    count, spacing = 27, 1.3
    chain = Atoms(f"Fe{count}", positions=[[0, 0, spacing * k] for k in range(count)], cell=[9, 9.5, count * spacing])
    chain = with_moments(chain, [[0, 0, 1.0]] * count)
    chain.pbc = True
    row = calculator.hessian(chain, ("mm",), rows=[0])["mm"][0]
    size, tilts = np.abs(row).max(axis=(0, 2)), np.abs(row)[:2, :, :2].max(axis=(0, 2))
    distance = spacing * np.minimum(np.arange(count), count - np.arange(count))
    assert distance.max() > calculator.reach
    assert size[distance > calculator.reach].max() == 0
    # atoms that no path of one layer's messages less could join
    assert size[distance > calculator.reach - calculator.cutoff].max() > 0
    assert size[distance > calculator.tilt_reach + 1].max() > 1e-11 * size.max()
    assert tilts[distance > calculator.tilt_reach].max() == 0
    assert tilts[distance > calculator.cutoff + 1].max() > 1e-9 * tilts.max()
    spins = SpinCalculator(calculator)
    assert reach_of(spins, np.array([[0, 0, 1.0], [0, 0, -1.0]])) == calculator.tilt_reach
    assert reach_of(spins, np.array([[0, 0, 1.0], [0, 1.0, 0]])) == calculator.reach
    turned = np.tile([0, 0, 1.0], (count, 1))
    turned[1::2] = [0, 0.6, 0.8]
    row = calculator.hessian(with_moments(chain, turned), ("mm",), rows=[0])["mm"][0]
    assert np.abs(row[0, distance > calculator.tilt_reach + 1]).max() == 0
    assert np.abs(row[1, distance > calculator.tilt_reach + 1, 1]).max() > 1e-12 * tilts.max()


def test_an_unstable_reference_is_said_to_be_one():
    """Ferromagnetic order of an antiferromagnet: the temperature of the better wave vector, and a note with it."""
    dataset = quick(points=31).run(ferromagnet(bulk("Fe", a=2.8)), CapableToy(Heisenberg(-J, 2.6), soc=False))
    assert "not the lowest state" in dataset.attrs["note"]
    assert float(dataset["tc_mean_field"]) == pytest.approx(2 / 3 * 8 * J * M**2 / BOLTZMANN, rel=1e-6)
    np.testing.assert_allclose(np.abs(dataset["ordering_q"]), 0.5, atol=1e-6)
    assert np.isnan(float(dataset["tc_rpa"]))
    assert float(dataset["stiffness"]) < 0
    assert float(dataset["stiffness_sum"]) < 0


def test_calculators_without_capabilities():
    """Energies and magnetic forces one structure at a time give the same tensors."""
    terms = (Heisenberg(J, 2.6), PseudoDipolar(3e-4, 2.6))
    atoms = ferromagnet(bulk("Fe", a=2.8))
    fast = quick(radius=2.6).run(atoms, CapableToy(*terms))
    slow = quick(radius=2.6).run(atoms, Toy(*terms))
    np.testing.assert_allclose(slow["tensor"], fast["tensor"], atol=1e-9)


def test_calculators_that_give_energies_alone():
    """Differences of differences of the energy give the tensors to a part in 10⁶."""
    terms = (Heisenberg(J, 2.6), PseudoDipolar(3e-4, 2.6))
    atoms = with_moments(Atoms("Fe", cell=[2.5, 3.2, 3.2], pbc=True), [[0, 0, M]])
    fast = quick(radius=2.6).run(atoms, CapableToy(*terms))
    slow = quick(radius=2.6).run(atoms, EnergyToy(*terms))
    np.testing.assert_allclose(slow["tensor"], fast["tensor"], atol=1e-6 * float(np.abs(fast["tensor"]).max()))


def test_committee_and_dataset(tmp_path):
    """Mean and spread of every J, a file that opens plainly, a picture."""
    toys = CommitteeToy([CapableToy(Heisenberg(j, 2.6), soc=False) for j in (1e-3, 2e-3, 4e-3)])
    dataset = quick().run(ferromagnet(bulk("Fe", a=2.8)), toys)
    assert float(dataset["shell_J"][0]) == pytest.approx(7e-3 / 3 * 1e3 * M**2, rel=1e-9)
    assert float(dataset["shell_J_std"][0]) == pytest.approx(np.std([1, 2, 4], ddof=1) * M**2, rel=1e-9)
    chiral_toys = CommitteeToy([CapableToy(Heisenberg(J, 2.6), DMI(d, 2.6)) for d in (1e-4, 3e-4)])
    told = Exchange(points=5, mesh=4, states=5).run(with_moments(chiral(), [2.1, 1.4]), chiral_toys)
    for row in Exchange().summary(told):
        if not isinstance(row.value, str) and row.label != "pairs within":
            assert row.spread is not None, row.label
    strongest = next(r for r in Exchange().summary(told) if r.label == "largest |D|")
    assert strongest.spread == pytest.approx(strongest.value / np.sqrt(2), rel=1e-6)
    write_dataset(dataset, tmp_path / "x.nc")
    with xr.open_dataset(tmp_path / "x.nc") as again:
        xr.testing.assert_identical(again.load(), dataset)
    Exchange().plot(dataset).savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_temperatures_of_the_members_that_have_one():
    """A member whose reference is not the lowest state has no RPA temperature: the others' mean, with their number."""
    toys = CommitteeToy([CapableToy(Heisenberg(j, 2.6), soc=False) for j in (1e-3, 2e-3, -1e-3)])
    data = quick().run(ferromagnet(bulk("Fe", a=2.8)), toys)
    assert np.isfinite(float(data["tc_rpa"]))
    assert int(data["tc_rpa_count"]) == 2
    assert any(r.label == "Tc, RPA, 2 of 3 members" and r.spread > 0 for r in Exchange().summary(data))
    assert data.attrs["ordering"] == "the members of the committee disagree"


def test_spin_model_energy_of_two_spins():
    """Both ij and ji are in the sum: turning one of two spins over changes the energy by 4 J."""
    cell = Atoms("Fe", cell=[3.0, 9.0, 9.0], pbc=True)
    pairs = Pairs(
        np.zeros(2, int), np.zeros(2, int), np.array([[1, 0, 0], [-1, 0, 0]]), np.array([[3.0, 0, 0], [-3.0, 0, 0]])
    )
    model = SpinModel(cell, np.array([0]), pairs, np.array([np.eye(3)] * 2) * J, np.zeros((1, 3, 3)))
    box = Supercell(cell, np.array([0]), (4, 1, 1))
    up = np.tile([0.0, 0, 1], (4, 1))
    down = up.copy()
    down[0] *= -1
    energies = model.energy(np.array([up, down]), box)
    # a ring of four: eight terms of -J, and two bonds of two terms each turned over
    assert energies == pytest.approx([-8 * J, -8 * J + 8 * J])


def test_refusals():
    """References and options that give no exchange."""
    atoms = bulk("Fe", cubic=True, a=2.8)
    toy = CapableToy(Heisenberg(J, 2.6), soc=False)
    with pytest.raises(MomentError, match="no atom carries a moment"):
        quick().run(with_moments(atoms, np.zeros((2, 3))), toy)
    with pytest.raises(MomentError, match="vanish"):
        quick(moments="magnitudes").run(ferromagnet(atoms, 1.0), CapableToy(Landau(-0.05, 0.001), soc=False))
    with pytest.raises(OptionError, match=r"no two moments are within 5\.5 Å"):
        quick().run(with_moments(Atoms("Fe", cell=[11.0, 11.5, 12.0], pbc=True), [[0, 0, M]]), toy)
    with pytest.raises(OptionError, match="no path 'GQQ'"):
        quick(path="GQQ").run(ferromagnet(atoms), toy)
    with pytest.raises(OptionError, match="radius"):
        Exchange(radius=0.1)
    for idle in ({"biquadratic": 3}, {"seed": 1}):
        with pytest.raises(OptionError, match="does nothing where there are no random states"):
            Exchange(states=0, **idle)
    Exchange(states=0, biquadratic=0)
    with pytest.raises(OptionError, match="tolerance"):
        Exchange(tolerance=0.0)
