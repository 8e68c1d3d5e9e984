"""Phonons against spring lattices and exchange that depends on distance, and against phonopy's own commands."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from ase import Atoms
from ase.build import bulk
from mmace_props.base import write_dataset
from mmace_props.cli import main
from mmace_props.errors import ConvergenceError, MomentError, OptionError, OutputError, StructureError
from mmace_props.journal import Journal
from mmace_props.lattice import Lattice, random_moments, read_setup
from mmace_props.phonon import Phonon
from mmace_props.protocol import SpinCalculator, with_moments
from phonopy.structure.atomic_data import get_atomic_data
from scipy import constants

from mmace.calculator import MMACECalculator

from .toys import CapableToy, CommitteeToy, Heisenberg, Landau, Springs, Toy, Uniaxial, scatter

IRON = get_atomic_data().atom_data[26][3]
TERAHERTZ = np.sqrt(constants.e / 1e-20 / constants.atomic_mass) / (2 * np.pi) * 1e-12
"""√(eV/Å²/amu) as a frequency in THz."""
K, A = 4.0, 2.8
NEAR = A * np.sqrt(3) / 2
J, DECAY, M = 3e-3, 2.2, 1.8
BIN = Path(sys.executable).parent


def bcc(signs=(1, 1), m=M):
    return with_moments(bulk("Fe", cubic=True, a=A), np.outer(signs, [0, 0, m]))


def bonds(a=A):
    corners = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    return corners * a / 2


def closed_form(k, curvature, slope, squares=False):
    """Frequencies (THz) of a Bravais lattice with the pair potential φ of its bonds: φ'' along, φ'/r across.

    ``D(q) = Σ_R [φ'' R̂R̂ᵀ + φ'/R (1 - R̂R̂ᵀ)] (1 - cos k·R) / M`` at Cartesian wave vectors k (Q, 3) in 1/Å.
    """
    vectors = bonds()
    unit = vectors / np.linalg.norm(vectors, axis=1)[:, None]
    along = np.einsum("ra,rb->rab", unit, unit)
    tensor = curvature * along + slope / NEAR * (np.eye(3) - along)
    matrices = np.einsum("qr,rab->qab", 1 - np.cos(k @ vectors.T), tensor) / IRON * TERAHERTZ**2
    if squares:
        return matrices
    values = np.linalg.eigvalsh(matrices)
    return np.sign(values) * np.sqrt(np.abs(values))


EXCHANGE = -2 * J * DECAY**2 * M**2, 2 * J * DECAY * M**2
"""φ'' and φ' of ``-2 J exp(-decay (r - r0)) m²`` at r0, the energy of one bond of parallel moments."""


def ferromagnet(order=1.0):
    return K + order * EXCHANGE[0], order * EXCHANGE[1]


def toy(*more, kind=CapableToy, springs=K, **options):
    terms = Springs(springs, NEAR, NEAR + 0.1), Heisenberg(J, NEAR + 0.1, DECAY, NEAR)
    return kind(*terms, *more, soc=False, **options)


def quick(**options):
    return Phonon(**{"dim": (2, 2, 2), "points": 40, "mesh": 4, "t_step": 100.0, **options})


def cartesian(dataset):
    cell = np.array(json.loads(dataset.attrs["primitive_cell"]))
    return 2 * np.pi * dataset["q"].values @ np.linalg.inv(cell).T


@pytest.mark.parametrize("method", ["hessian", "displacements"])
def test_lattice_of_springs_and_exchange(method):
    """Every frequency of a ferromagnet on its path, from the analytic dynamical matrix, with its unit."""
    dataset = quick(method=method, distance=1e-3, mesh=16).run(bcc(), toy())
    expected = closed_form(cartesian(dataset), *ferromagnet())
    accuracy = 1e-6 if method == "hessian" else 2e-4
    np.testing.assert_allclose(dataset["frequency"].values, expected, atol=accuracy)
    assert dataset.sizes["site"] == 1
    top = 2 * np.sqrt(8 / 3 * (K + EXCHANGE[0] + 2 * EXCHANGE[1] / NEAR) / IRON / 2) * TERAHERTZ
    assert dataset["frequency"].values.max() == pytest.approx(top, rel=1e-3)
    assert dataset["frequency"].attrs["units"] == "THz"
    assert abs(float(dataset["lowest"])) < 1e-4
    assert np.trapezoid(dataset["dos"].values, dataset["dos_frequency"].values) == pytest.approx(3, rel=0.01)


def chain(m=0.0):
    return with_moments(Atoms("Fe", cell=[2.5, 6, 6.5], pbc=True), [[0, 0, m]])


@pytest.mark.parametrize("shape", [[[0, 1, 0], [1, 0, 0], [0, 0, 1]], [[1, 0, 0], [2, 1, 0], [1, 3, -1]]])
def test_any_cell_of_the_crystal_has_its_phonons(shape):
    """Left-handed vectors, and vectors so oblique that spglib finds no magnetic group, are as good as the cube's."""
    atoms = bcc()
    atoms.set_cell(np.array(shape) @ atoms.cell[:])
    dataset = quick(method="hessian", mesh=8).run(atoms, toy())
    assert dataset.sizes["site"] == 1
    np.testing.assert_allclose(dataset["frequency"].values, closed_form(cartesian(dataset), *ferromagnet()), atol=1e-5)
    assert dataset.attrs["magnetic_space_group"] == "I4/mm'm' (139.537)"
    assert float(dataset["zero_point"]) == pytest.approx(39.349, abs=1e-3)


def test_a_search_without_result_is_one_sentence():
    """Where spglib finds no magnetic group in a cell, the error is one of ours."""
    atoms = bcc()
    atoms.set_cell(np.array([[1, 0, 0], [2, 1, 0], [1, 3, 1]]) @ atoms.cell[:])
    lattice = Lattice(atoms, np.diag([2, 2, 2]), np.eye(3), 1e-3)
    with pytest.raises(StructureError, match="no symmetry of the supercell"):
        lattice.phonon(atoms.get_initial_magnetic_moments(), soc=False)
    assert (
        len(lattice.compact([atoms.get_initial_magnetic_moments()], soc=False).phonon(None, soc=False).supercell) == 16
    )


def test_moments_equal_within_their_tolerance_are_one():
    """Moments that differ by less than mag_symprec repeat as the atoms do; those that differ by more do not."""
    atoms = with_moments(bcc(), [[0, 0, M], [0, 0, M + 5e-3]])
    one, two = (quick(method="hessian", mag_symprec=tolerance).run(atoms, toy()) for tolerance in (1e-2, 2e-3))
    assert (one.sizes["site"], two.sizes["site"]) == (1, 2)
    np.testing.assert_allclose(one["frequency"].values, closed_form(cartesian(one), *ferromagnet()), atol=5e-3)


def test_chain_with_a_known_frequency():
    """The zone boundary of a chain lies at √(k/M)/π: 8.37 THz for iron and 4 eV/Å²."""
    dataset = Phonon(dim=(6, 1, 1), path="GX", points=11, mesh=2).run(chain(), CapableToy(Springs(4.0, 2.5, 2.6)))
    edge = np.sqrt(4.0 * constants.e / 1e-20 / (IRON * constants.atomic_mass)) / np.pi * 1e-12
    q = dataset["q"].values[:, 0]
    np.testing.assert_allclose(dataset["frequency"].values[:, 2], edge * np.sin(np.pi * q), atol=1e-5)
    np.testing.assert_allclose(dataset["frequency"].values[:, :2], 0, atol=1e-3)
    assert q[-1] == 0.5
    assert float(dataset["frequency"][-1, 2]) == pytest.approx(8.37, abs=0.005)


def test_antiferromagnet_stiffens_where_the_ferromagnet_softens():
    """Turning every bond turns the sign of φ'' and φ' of exchange: frequencies, and the shift of each mode."""
    dataset = quick(second="afm", path="GX").run(bcc(), toy())
    assert dataset.sizes["site"] == 2
    k = cartesian(dataset)
    fold = np.array([2 * np.pi / A, 0, 0])
    for name, order in (("frequency", 1.0), ("frequency_second", -1.0)):
        both = np.sort(np.concatenate([closed_form(x, *ferromagnet(order)) for x in (k, k + fold)], axis=1), axis=1)
        np.testing.assert_allclose(dataset[name].values, both, atol=1e-5)
    along, across = [], []
    for x in (k, k + fold):
        one, two = (closed_form(x, *ferromagnet(s), squares=True) for s in (1.0, -1.0))
        along.append(np.stack([np.sqrt(np.abs(one[:, 0, 0])), np.sqrt(np.abs(two[:, 0, 0]))]))
        across.append(np.stack([np.sqrt(np.abs(one[:, 1, 1])), np.sqrt(np.abs(two[:, 1, 1]))]))
    modes = np.stack([along[0], across[0], across[0], along[1], across[1], across[1]])
    for wave in range(len(k)):
        pairs = sorted((b, a - b) for b, a in modes[:, :, wave])
        expected = sorted(round(s, 4) for _, s in pairs)
        assert sorted(np.round(dataset["frequency_shift"].values[wave], 4)) == pytest.approx(expected, abs=2e-4)
    signs = np.sign(dataset["moments_second"].values[:, 2])
    assert signs[0] == -signs[1]


def test_antiferromagnetic_cell_is_kept_whole():
    """The order given decides the primitive cell: two atoms for ↑↓, one for ↑↑."""
    assert quick().run(bcc((1, -1)), toy()).sizes["branch"] == 6
    assert quick().run(bcc((1, 1)), toy()).sizes["branch"] == 3


@pytest.mark.parametrize("method", ["hessian", "displacements"])
@pytest.mark.parametrize("kind", [CapableToy, Toy])
def test_moments_that_follow_soften_the_lattice(method, kind):
    """M ω² = 2(k + φ'')(1 - cos qa) - (4 J' m sin qa)² / (-2a + 12 b m² - 4 J cos qa) with Landau moments."""
    a, b, size, strength, decay = 0.02, 0.003, 2.5, 0.01, 3.0
    calculator = kind(Springs(K, size, 2.6), Heisenberg(strength, 2.6, decay, size), Landau(a, b), soc=False)
    m = np.sqrt((a + 2 * strength) / (2 * b))
    options = {"dim": (8, 1, 1), "path": "GX", "points": 5, "mesh": 2, "method": method, "distance": 1e-3}
    found = {}
    for clamp in (False, True):
        found[clamp] = Phonon(moments="magnitudes", clamp=clamp, **options).run(chain(1.5), calculator)
    np.testing.assert_allclose(found[False]["moments"].values, [[0, 0, m]], atol=1e-5)
    q = 2 * np.pi * found[False]["q"].values[:, 0]
    held = 2 * (K - 2 * strength * decay**2 * m**2) * (1 - np.cos(q))
    curvature = -2 * a + 12 * b * m**2 - 4 * strength * np.cos(q)
    softening = (4 * strength * decay * m * np.sin(q)) ** 2 / curvature
    assert softening.max() > 0.02 * held.max()
    accuracy = 1e-4 if method == "hessian" else 1e-3
    for clamp, square in ((True, held), (False, held - softening)):
        expected = np.sqrt(np.abs(square) / IRON) * TERAHERTZ
        np.testing.assert_allclose(found[clamp]["frequency"].values[:, -1], expected, atol=accuracy)


def test_paramagnet_is_the_mean_over_its_states():
    """Frequencies are those of the mean of e·e' over the bonds drawn; the error covers their distance to none."""
    states, dim = 6, (2, 2, 2)
    dataset = quick(dim=dim, paramagnetic=states, seed=3, method="hessian").run(bcc((1, -1)), toy())
    assert dataset.sizes["site"] == 1
    rng = np.random.default_rng(3)
    spins = np.array([random_moments(np.full(16, M), rng) for _ in range(states)]) / M
    cell = bulk("Fe", cubic=True, a=A)
    setup = read_supercell(cell, dim)
    distances = setup.get_all_distances(mic=True)[0]
    near = np.flatnonzero(np.abs(distances - NEAR) < 1e-6)
    assert len(near) == 8
    order = np.einsum("sx,snx->s", spins[:, 0], spins[:, near]) / 8
    expected = closed_form(cartesian(dataset), *ferromagnet(order.mean()))
    np.testing.assert_allclose(dataset["frequency"].values, expected, atol=1e-5)
    top = np.unravel_index(expected.argmax(), expected.shape)
    slope = (closed_form(cartesian(dataset), *ferromagnet(1e-4)) - closed_form(cartesian(dataset), *ferromagnet(0)))[
        top
    ]
    error = abs(slope) / 1e-4 * order.std(ddof=1) / np.sqrt(states)
    assert float(dataset["frequency_error"].values[top]) == pytest.approx(error, rel=2e-2)
    unpolarised = closed_form(cartesian(dataset), *ferromagnet(0.0))[top]
    assert abs(float(dataset["frequency"].values[top]) - unpolarised) < 4 * error
    again = quick(dim=dim, paramagnetic=states, seed=3, method="hessian", second="pm").run(bcc(), toy())
    np.testing.assert_allclose(again["frequency"].values, closed_form(cartesian(again), *ferromagnet()), atol=1e-5)
    np.testing.assert_allclose(again["frequency_second"].values, expected, atol=1e-5)
    np.testing.assert_allclose(again["frequency_second_error"], dataset["frequency_error"], atol=1e-9)


def read_supercell(cell, dim):
    """The supercell in phonopy's order of atoms."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    unit = PhonopyAtoms(cell.get_chemical_symbols(), cell=cell.cell[:], scaled_positions=cell.get_scaled_positions())
    found = Phonopy(unit, np.diag(dim), "P").supercell
    return Atoms(found.symbols, cell=found.cell, scaled_positions=found.scaled_positions, pbc=True)


def test_paramagnet_by_displacements_agrees():
    """The average of forces in displaced supercells is the average of the Hessians, with relaxed magnitudes too."""
    calculator = toy(Landau(0.05, 0.05 / (2 * M**2)))
    settings = {"dim": (2, 2, 2), "paramagnetic": 2, "points": 12, "distance": 2e-3}
    for mode in ("fixed", "magnitudes"):
        found = [quick(method=m, moments=mode, **settings).run(bcc(), calculator) for m in ("hessian", "displacements")]
        for name in ("frequency", "frequency_error"):
            np.testing.assert_allclose(found[0][name].values, found[1][name].values, atol=1e-4)


def test_slope_with_the_length_of_the_moments():
    """ω² = s + m² x, so ∂ω/∂m = m x / ω."""
    dataset = quick(slopes=True).run(bcc(), toy())
    k = cartesian(dataset)
    held = closed_form(k, *ferromagnet())
    step = 1e-4
    ends = []
    for m in (M - step, M + step):
        scale = m**2 / M**2
        ends.append(closed_form(k, K + scale * EXCHANGE[0], scale * EXCHANGE[1]))
    expected = (ends[1] - ends[0]) / (2 * step)
    moving = held.min(axis=1) > 0.1
    np.testing.assert_allclose(dataset["frequency_slope"].values[0][moving], expected[moving], atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_thermal_properties_of_the_modes():
    """Zero-point energy, F, S and C_v summed over the closed form of every mode of the mesh."""
    dataset = quick(mesh=5, t_max=400.0).run(bcc(), toy())
    reciprocal = 2 * np.pi * np.linalg.inv(bulk("Fe", a=A).cell[:]).T
    steps = np.stack(np.meshgrid(*[np.arange(5) / 5] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[1:]
    hv = closed_form(steps @ reciprocal, *ferromagnet()).ravel() * constants.h * 1e12 / constants.e
    kt = constants.k * 400 / constants.e
    x = hv / kt
    assert float(dataset["zero_point"]) == pytest.approx(1e3 * hv.sum() / 2 / 125, rel=1e-5)
    at = dataset.sel(temperature=400.0)
    free = np.sum(hv / 2 + kt * np.log(1 - np.exp(-x))) / 125
    assert float(at["free_energy"]) == pytest.approx(1e3 * free, rel=1e-5)
    heat = np.sum(x**2 * np.exp(x) / np.expm1(x) ** 2) / 125 * constants.R
    assert float(at["heat_capacity"]) == pytest.approx(heat, rel=1e-5)
    entropy = np.sum(x / np.expm1(x) - np.log(1 - np.exp(-x))) / 125 * constants.R
    assert float(at["entropy"]) == pytest.approx(entropy, rel=1e-5)


def test_imaginary_modes_are_named():
    """A lattice whose exchange outweighs its springs: the mode, its wave vector, and a note."""
    dataset = quick().run(bcc(m=6.0), toy(springs=0.5))
    assert float(dataset["lowest"]) < -1
    worst = np.unravel_index(dataset["frequency"].values.argmin(), dataset["frequency"].shape)[0]
    assert float(dataset["lowest"]) <= float(dataset["frequency"].values[worst, 0])
    assert "imaginary modes" in dataset.attrs["note"]
    assert 0 < float(dataset["imaginary_share"]) <= 1


def test_thermal_expansion_follows_the_grueneisen_parameters():
    """α = Σ γ C_v / (B V) of a lattice of springs, γ and B from its closed form."""
    push, decay, near, far = 0.01, 3.0, 2.0, 2.0

    def born(length):
        return 2 * push * M**2 * np.exp(-decay * (length - NEAR))

    # the springs of the far shell reach the near one too; their length makes the pressure vanish at A
    pressure = 8 * NEAR * (far * NEAR - decay * born(NEAR)) + 6 * A * (far * A - decay * born(A))
    rest = pressure / (far * (8 * NEAR + 6 * A))
    terms = Springs(near, NEAR, NEAR + 0.2), Springs(far, rest, A + 0.2), Heisenberg(-push, A + 0.2, decay, NEAR)
    settings = {"volumes": 7, "strain": 0.03, "t_max": 300.0, "t_step": 5.0, "mesh": 6}
    atoms = with_moments(bulk("Fe", a=A), [[0, 0, M]])
    dataset = quick(method="hessian", **settings).run(atoms, CapableToy(*terms, soc=False))

    def modes(size):
        steps = np.stack(np.meshgrid(*[np.arange(6) / 6] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[1:]
        q = steps @ (2 * np.pi * np.linalg.inv(bulk("Fe", a=size).cell[:]).T)
        total = 0
        for vectors, k in ((bonds(size), near), (size * np.vstack([np.eye(3), -np.eye(3)]), 0.0)):
            length = np.linalg.norm(vectors[0])
            along = np.einsum("ra,rb->rab", vectors, vectors) / length**2
            second = k + far + decay**2 * born(length)
            first = k * (length - NEAR) + far * (length - rest) - decay * born(length)
            tensor = second * along + first / length * (np.eye(3) - along)
            total = total + np.einsum("qr,rab->qab", 1 - np.cos(q @ vectors.T), tensor)
        return np.sqrt(np.linalg.eigvalsh(total / IRON)) * TERAHERTZ

    at = dataset.sel(temperature=100.0)
    volume = float(at["volume"])
    size, h = (2 * volume) ** (1 / 3), 1e-3
    omega = modes(size)
    gamma = -(np.log(modes(size * (1 + h))) - np.log(modes(size * (1 - h)))) / (6 * h)
    x = constants.h * 1e12 * omega / (constants.k * 100)
    heat = x**2 * np.exp(x) / np.expm1(x) ** 2 * constants.k / 216
    expansion = (gamma * heat).sum() / (float(at["bulk_modulus"]) * 1e9 * volume * 1e-30)
    assert float(at["expansion"]) == pytest.approx(expansion, rel=0.02)
    assert abs(expansion) > 1e-6
    settings |= {"volumes": 5, "strain": 1e-4}
    narrow = quick(method="hessian", **settings).run(atoms, CapableToy(*terms, soc=False))
    assert np.isnan(narrow["volume"].values).any()
    assert "leaves the range" in narrow.attrs["note"]


def test_last_temperature_does_not_depend_on_where_the_range_ends():
    """The same steps of temperature give the same expansion, whether the range ends on the last of them or after it."""
    near, far, short = 2.0, 0.05, 0.97 * NEAR
    pressure = 8 * NEAR * (near * (NEAR - short) + far * NEAR) + 6 * A * far * A
    terms = Springs(near, short, NEAR + 0.2), Springs(far, pressure / (far * (8 * NEAR + 6 * A)), A + 0.2)
    atoms = with_moments(bulk("Fe", a=A), [[0, 0, M]])
    settings = {"volumes": 5, "strain": 0.06, "t_step": 100.0, "mesh": 3, "points": 8, "method": "hessian"}
    on, after = (quick(t_max=t, **settings).run(atoms, CapableToy(*terms, soc=False)) for t in (200.0, 290.0))
    assert after["temperature"].values.tolist() == [0.0, 100.0, 200.0]
    for name in ("volume", "expansion", "heat_capacity_p"):
        assert np.isfinite(on[name].values[-1])
        np.testing.assert_allclose(on[name].values, after[name].values, rtol=1e-6)


def test_no_thermal_expansion_far_from_the_equilibrium():
    """Volumes that the free energy falls over without a minimum leave the quasi-harmonic results out."""
    pressed = CapableToy(Springs(4.0, 0.99 * NEAR, NEAR + 0.4), soc=False)
    settings = {"volumes": 5, "strain": 0.03, "t_max": 300.0, "mesh": 3, "points": 8, "method": "hessian"}
    dataset = quick(**settings).run(with_moments(bulk("Fe", a=A), [[0, 0, M]]), pressed)
    assert np.isnan(dataset["volume"].values).all()
    assert np.isfinite(dataset["static_energy"].values).all()


def test_thermal_expansion_leaves_unstable_volumes_out():
    """A crystal that shears by itself when compressed: its stable volumes give what a range without others gives."""
    near, far, short = 2.0, 0.05, 0.97 * NEAR
    pressure = 8 * NEAR * (near * (NEAR - short) + far * NEAR) + 6 * A * far * A
    terms = Springs(near, short, NEAR + 0.2), Springs(far, pressure / (far * (8 * NEAR + 6 * A)), A + 0.2)
    atoms = with_moments(bulk("Fe", a=A), [[0, 0, M]])
    settings = {"volumes": 13, "t_max": 300.0, "t_step": 20.0, "mesh": 6}
    wide, narrow = (
        quick(method="hessian", strain=strain, **settings)
        .run(atoms, CapableToy(*terms, soc=False))
        .sel(temperature=100.0)
        for strain in (0.2, 0.06)
    )
    assert (wide["lowest_of_volume"].values < -0.5).tolist() == [True] * 2 + [False] * 11
    assert narrow["lowest_of_volume"].values.min() > -1e-3
    assert float(wide["volume"]) == pytest.approx(float(narrow["volume"]), rel=2e-3)
    assert float(wide["bulk_modulus"]) == pytest.approx(float(narrow["bulk_modulus"]), rel=0.05)


def test_committee_goes_through_the_whole_property():
    """The mean of two members' frequencies and their spread, not the frequency of the mean; files for both."""
    members = [toy(springs=3.0), toy(springs=5.0)]
    dataset = quick().run(bcc(), CommitteeToy(members))
    k = cartesian(dataset)
    each = [closed_form(k, s + EXCHANGE[0], EXCHANGE[1]) for s in (3.0, 5.0)]
    np.testing.assert_allclose(dataset["frequency"].values, np.mean(each, axis=0), atol=1e-5)
    np.testing.assert_allclose(dataset["frequency_std"].values, np.std(each, axis=0, ddof=1), atol=1e-5)
    assert dataset["dos_member"].shape[0] == 2


def test_one_unstable_member_is_seen():
    """The mean of two members has no imaginary mode, but one member has: it is counted, and its mode is named."""
    members = [toy(springs=0.5), toy(Springs(10.0, NEAR - 0.3, NEAR + 0.1))]
    prop = quick(slopes=True)
    dataset = prop.run(bcc(m=6.0), CommitteeToy(members))
    single = [quick().run(bcc(m=6.0), member) for member in members]
    assert min(dataset[name].values.min() for name in ("frequency", "mesh_frequency")) > -1e-2
    for name in ("lowest", "imaginary_share"):
        each = np.array([float(one[name]) for one in single])
        assert np.ptp(each) > 0.05
        np.testing.assert_allclose(dataset[f"{name}_member"].values, each, atol=1e-9)
        assert float(dataset[name]) == pytest.approx(each.mean(), abs=1e-9)
        assert float(dataset[f"{name}_std"]) == pytest.approx(each.std(ddof=1), abs=1e-9)
    assert int(dataset["unstable_members"]) == 1
    np.testing.assert_allclose(dataset["lowest_q"].values, single[0]["lowest_q"].values)
    assert dataset.attrs["note"].startswith("1 of the committee's 2 members has imaginary modes")
    rows = {r.label: r for r in prop.summary(dataset)}
    largest = int(np.abs(dataset["frequency_slope"].values).argmax())
    assert rows["members with imaginary modes"].value == "1 of 2"
    lowest, slope = (next(r for k, r in rows.items() if k.startswith(x)) for x in ("lowest freq", "largest ∂ω/∂m"))
    assert lowest.spread == pytest.approx(float(dataset["lowest_std"]))
    assert slope.spread == pytest.approx(float(dataset["frequency_slope_std"].values.ravel()[largest]))


def bands_by_phonopy(folder, q, *arguments):
    """Frequencies at wave vectors by phonopy's command line in a folder."""
    points = " ".join(f"{x:.12f}" for x in q.ravel())
    command = [str(BIN / "phonopy"), *arguments, f"--qpoints={points}"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = yaml.safe_load((folder / "qpoints.yaml").read_text())
    return np.array([[band["frequency"] for band in point["band"]] for point in found["phonon"]]), ran.stdout


@pytest.mark.parametrize("signs", [(1, 1), (1, -1)])
def test_phonopy_reads_the_folder(tmp_path, signs):
    """phonopy's own command gives the same bands from displacements and FORCE_SETS, and from phonopy_params.yaml."""
    folder = tmp_path / "phonopy"
    calculator = toy(Landau(0.05, 0.05 / (2 * M**2)))
    dataset = quick(phonopy=str(folder), points=9, moments="magnitudes").run(bcc(signs), calculator)
    assert sorted(p.name for p in folder.iterdir()) == ["FORCE_SETS", "phonopy_disp.yaml", "phonopy_params.yaml"]
    q = dataset["q"].values
    for name in ("phonopy_disp.yaml", "phonopy_params.yaml"):
        place = tmp_path / name.split(".")[0]
        place.mkdir()
        shutil.copy(folder / name, place)
        if name == "phonopy_disp.yaml":
            shutil.copy(folder / "FORCE_SETS", place)
        found, said = bands_by_phonopy(place, q, name)
        np.testing.assert_allclose(found, dataset["frequency"].values, atol=2e-5)
        assert "agnetic space group" in said
        stored = yaml.safe_load((place / name).read_text())["unit_cell"]["points"]
        lengths = [p["magnetic_moment"] for p in stored]
        np.testing.assert_allclose(lengths, dataset["moments"].values[:, 2] * signs[0], atol=1e-5)
        assert np.sign(lengths[0] * lengths[1]) == signs[1]


def test_phonopy_drives(tmp_path):
    """phonopy-init -d, then forces for its displacements, then phonopy: the same bands as the other way round."""
    write_poscar(tmp_path / "POSCAR")
    command = [str(BIN / "phonopy-init"), "-d", "--dim", "2", "2", "2", "--pa", "P", "--magmom", "1.8", "-1.8"]
    ran = subprocess.run([*command, "-c", "POSCAR"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    source = tmp_path / "phonopy_disp.yaml"
    before = source.read_bytes()
    setup = read_setup(source, 1e-5)
    np.testing.assert_allclose(setup.moments, [1.8, -1.8])
    structure = with_moments(setup.lattice.atoms, setup.moments)
    from_file = quick(dim=(), source=str(source), method="displacements").run(structure, toy())
    assert source.read_bytes() == before
    ours = quick(method="displacements").run(bcc((1, -1)), toy())
    q = from_file["q"].values
    np.testing.assert_allclose(from_file["frequency"].values, ours["frequency"].values, atol=1e-6)
    found, said = bands_by_phonopy(tmp_path, q)
    assert "FORCE_SETS" in said
    np.testing.assert_allclose(found, ours["frequency"].values, atol=2e-5)


def write_poscar(path):
    bulk("Fe", cubic=True, a=A).write(path, format="vasp", direct=True)


def test_displacements_for_another_symmetry_are_refused(tmp_path):
    """Displacements made without moments do not do for an order that breaks the symmetry."""
    write_poscar(tmp_path / "POSCAR")
    command = [str(BIN / "phonopy-init"), "-d", "--dim", "2", "2", "2", "--pa", "P", "-c", "POSCAR"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    source = str(tmp_path / "phonopy_disp.yaml")
    tilted = with_moments(bulk("Fe", cubic=True, a=A), [[M, 0, 0], [0, M, 0]])
    with pytest.raises(MomentError, match="symmetry operations that the displacements were made for"):
        quick(dim=(), source=source).run(tilted, toy())
    assert not (tmp_path / "FORCE_SETS").exists()
    with pytest.raises(StructureError, match="not that of"):
        quick(dim=(), source=source).run(bcc().repeat((1, 1, 2)), toy())


def test_spin_orbit_coupling_enters_the_symmetry(tmp_path):
    """Vectors in phonopy's files where moments are tied to the lattice, numbers where they are free."""
    counts = {}
    for soc in (False, True):
        calculator = CapableToy(Springs(K, NEAR, NEAR + 0.1), Uniaxial(1e-4), soc=soc)
        dataset = quick(phonopy=str(tmp_path / str(soc))).run(bcc(), calculator)
        counts[soc] = int(dataset.attrs["symmetry_operations"])
        points = yaml.safe_load((tmp_path / str(soc) / "phonopy_disp.yaml").read_text())["unit_cell"]["points"]
        assert points[0]["magnetic_moment"] == ([0, 0, M] if soc else M)
    assert counts[False] == 3 * counts[True]


@pytest.mark.parametrize("mode", ["fixed", "magnitudes", "full"])
def test_potential_by_both_methods(mode):
    """The shipped model on strained bcc Fe along its easy axis, with spin-orbit coupling: Hessian and displacements."""
    cell = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.78, 2.85, 2.92], pbc=True)
    single = MMACECalculator(soc=True, committee=False)
    orders = [with_moments(cell, [2.2 * axis] * 2) for axis in np.eye(3)]
    atoms = min(orders, key=lambda order: single.get_property("energy", order))
    calculator = single.replace(moments=mode)
    dataset = quick(dim=(2, 1, 1), method="both", distance=1e-3, points=8).run(atoms, calculator)
    assert float(dataset["method_difference"]) < 1e-3
    if mode != "fixed":
        held = quick(dim=(2, 1, 1), method="hessian", points=8, clamp=True).run(atoms, calculator)
        change = np.abs(held["frequency"].values - dataset["frequency"].values).max()
        assert change > 10 * float(dataset["method_difference"])


def test_saddle_of_the_moments_is_said():
    """Moments at the top of their energy cannot follow adiabatically."""
    calculator = CapableToy(Springs(K, NEAR, NEAR + 0.1), Landau(0.05, 0.005), Heisenberg(4e-3, NEAR + 0.1), soc=False)
    with pytest.raises(ConvergenceError, match="saddle point"):
        quick(moments="magnitudes", method="hessian").run(bcc((1, -1), 1.3), calculator)


@pytest.mark.parametrize("off", [1e-6, -1e-6])
def test_turns_of_all_moments_are_no_saddle(off):
    """Without spin-orbit coupling they cost nothing, but at moments not quite at rest their curvature has a sign."""

    class Rough(CapableToy):
        def relax_moments(self, images, mode):
            return [a.get_initial_magnetic_moments() * (1 + off) for a in images]

    terms = Springs(K, NEAR, NEAR + 0.1), Landau(0.05, 0.025 / M**2), Heisenberg(4e-3, NEAR + 0.1, DECAY, NEAR)
    rest = SpinCalculator(CapableToy(*terms, soc=False)).relax_moments([bcc()], "magnitudes")[0]
    atoms = with_moments(bcc(), rest)
    rough = quick(moments="full", method="hessian").run(atoms, Rough(*terms, soc=False))
    exact = quick(moments="magnitudes", method="hessian").run(atoms, CapableToy(*terms, soc=False))
    np.testing.assert_allclose(rough["frequency"], exact["frequency"], atol=1e-4)


def test_what_does_not_fit_is_refused(tmp_path):
    """One sentence each, and nothing written."""
    with pytest.raises(OptionError, match="three repeats or the nine"):
        quick(dim=(2, 2)).run(bcc(), toy())
    with pytest.raises(OptionError, match="above the limit"):
        quick(dim=(9, 9, 9)).run(bcc(), toy())
    with pytest.raises(OptionError, match="spans no supercell"):
        quick(dim=(2, 0, 2)).run(bcc(), toy())
    with pytest.raises(OptionError, match="at least 2 states"):
        quick(paramagnetic=1)
    with pytest.raises(OptionError, match="random directions"):
        quick(paramagnetic=4, moments="full").run(bcc(), toy())
    with pytest.raises(OptionError, match="second order cannot be 'ferri'"):
        quick(second="ferri").run(bcc(), toy())
    with pytest.raises(MomentError, match="no atom carries"):
        quick(second="afm").run(bcc(m=0.0), toy())
    with pytest.raises(StructureError, match="no file"):
        quick(dim=(), source="absent.yaml").run(bcc(), toy())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds 'notes.txt'"):
        quick(phonopy=str(tmp_path / "full")).run(bcc(), toy())
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "notes.txt"]
    (tmp_path / "full" / "notes.txt").rename(tmp_path / "full" / "FORCE_SETS")
    with pytest.raises(OutputError, match="holds files of phonopy, but not of this command"):
        quick(phonopy=str(tmp_path / "full")).run(bcc(), toy())
    assert (tmp_path / "full" / "FORCE_SETS").read_text() == "mine"


def test_dataset_and_picture_and_table(tmp_path):
    """The dataset opens again, and every row and the picture are made."""
    from mmace_props.plot import save_figure

    prop = quick(second="afm", slopes=True)
    dataset = prop.run(bcc(), toy())
    write_dataset(dataset, tmp_path / "a.nc")
    with xr.open_dataset(tmp_path / "a.nc") as again:
        assert again["frequency"].attrs["units"] == "THz"
        rows = {r.label: r for r in prop.summary(again.load())}
    assert rows["highest frequency"].value == pytest.approx(dataset["frequency"].values[:, -1].max())
    assert any("largest shift" in label for label in rows)
    save_figure(prop.plot(dataset), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10000


class Stopping(CapableToy):
    """A toy that is interrupted at one of its Hessians."""

    asked, stop = 0, 0

    def hessian(self, atoms, blocks=("rr", "rm", "mm"), rows=None):
        Stopping.asked += 1
        if Stopping.asked == Stopping.stop:
            raise KeyboardInterrupt
        whole = super().hessian(atoms, blocks)
        return {k: v if rows is None else v[rows] for k, v in whole.items()}


def test_interrupted_run_goes_on(tmp_path):
    """Of three random states two were done when the run stopped: the next computes one, to the same result."""
    journal = Journal(tmp_path / "parts", min_seconds=0.0)
    calculator = toy(kind=Stopping)
    prop = quick(paramagnetic=3, points=6, mesh=2)
    Stopping.asked, Stopping.stop = 0, 3
    with pytest.raises(KeyboardInterrupt):
        prop.run(bcc(), calculator, journal=journal)
    Stopping.asked, Stopping.stop = 0, 0
    again = prop.run(bcc(), calculator, journal=journal)
    assert Stopping.asked == 1
    whole = prop.run(bcc(), toy())
    np.testing.assert_allclose(again["frequency"].values, whole["frequency"].values, atol=1e-9)


FACTORY = "tests.toys:from_options"


def test_command_line_both_ways(tmp_path, capsys):
    """A structure, and phonopy's displacements in its place: the same dataset, and files where phonopy looks."""
    write_poscar(tmp_path / "POSCAR")
    settings = ["--calculator", FACTORY, "--points", "9", "--mesh", "4", "--t-step", "100", "--moments", "fixed"]
    named = ["--dim", "2", "2", "2", "--order", "fm", "--phonopy", str(tmp_path / "files")]
    assert main(["phonon", str(tmp_path / "POSCAR"), *named, *settings, "-o", str(tmp_path / "a.nc")]) == 0
    assert "highest frequency" in capsys.readouterr().out
    source = tmp_path / "phonopy_disp.yaml"
    shutil.copy(tmp_path / "files" / "phonopy_disp.yaml", source)
    assert main(["phonon", "--from", str(source), *settings, "-o", str(tmp_path / "b.nc")]) == 0
    assert f"wrote {tmp_path / 'b.nc'} and {tmp_path / 'FORCE_SETS'}" in capsys.readouterr().out
    assert (tmp_path / "FORCE_SETS").read_text() == (tmp_path / "files" / "FORCE_SETS").read_text()
    with xr.open_dataset(tmp_path / "a.nc") as a, xr.open_dataset(tmp_path / "b.nc") as b:
        np.testing.assert_allclose(a["frequency"].values, b["frequency"].values, atol=1e-6)
        np.testing.assert_allclose(a["moments"].values, [[0, 0, 2.2]] * 2)
    found, _ = bands_by_phonopy(tmp_path, np.array([[0.0, 0.0, 0.5]]))
    assert found.shape == (1, 3)
    assert main(["phonon", "--from", str(source), *settings, "-o", str(tmp_path / "c.nc")]) == 2
    assert "FORCE_SETS' is there already" in capsys.readouterr().err
    (tmp_path / "FORCE_SETS").unlink()
    for arguments, sentence in (
        (["phonon", *settings], "no structure is named"),
        (["phonon", str(tmp_path / "POSCAR"), "--from", str(source), *settings], "leave"),
        (["phonon", "--from", str(tmp_path / "POSCAR"), *settings], "file of phonopy"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1


def test_rocksalt_stable_by_disorder_alone():
    """CrN's case: without moments a mode is imaginary, with disordered moments none is; nitrogen carries none."""
    size = 4.1
    cell = bulk("CrN", "rocksalt", a=size, cubic=True)
    atoms = with_moments(cell, np.outer(cell.symbols == "Cr", [0, 0, 2.5]))
    # springs under pressure bend outwards; moments stiffen them by their length, in whatever direction they point
    calculator = CapableToy(
        Springs(6.0, size / 2 + 0.06, size / 2 + 0.1), LengthSprings(0.5, size / np.sqrt(2), 3.1), soc=False
    )
    options = {"dim": (1, 1, 1), "points": 12, "second": "nm", "paramagnetic": 3, "moments": "fixed"}
    dataset = quick(**options).run(atoms, calculator)
    assert dataset.sizes["site"] == 2
    assert dataset["frequency_second"].values.min() < -1
    assert dataset["frequency"].values.min() > -1e-3
    assert dataset["frequency_error"].values.max() < 1e-6
    assert dataset.attrs["order"] == "paramagnetic"


@dataclass
class LengthSprings:
    """``Σ_{i≠j} k/4 m_i² m_j² (r - r0)²`` inside the cut-off: bonds that moments make stiff."""

    k: float
    r0: float
    cutoff: float
    soc = False

    def sites(self, s):
        i, j, r, _ = s.pairs(self.cutoff)
        square = (s.moments**2).sum(-1)
        stretch = (torch.linalg.norm(r, dim=1) - self.r0) ** 2
        return scatter(self.k / 4 * square[:, i] * square[:, j] * stretch, i, len(s.positions))
