"""The anisotropy against closed forms of toy Hamiltonians, its invariances, and its datasets."""

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from ase.build import bulk
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmace_props.anisotropy import Anisotropy, _images_of, real_harmonics
from mmace_props.base import write_dataset
from mmace_props.elastic import Elastic
from mmace_props.errors import MomentError, OptionError
from mmace_props.protocol import SpinCalculator, moments_of, strained, with_moments
from mmace_props.symmetry import Pattern
from scipy.integrate import lebedev_rule
from scipy.spatial.transform import Rotation

from .toys import (
    DMI,
    AnisotropicLength,
    CapableToy,
    CommitteeToy,
    Cubic,
    Heisenberg,
    Landau,
    Magnetoelastic,
    Orthorhombic,
    PseudoDipolar,
    Toy,
    Uniaxial,
    Zeeman,
)

MJ_PER_M3 = 1.602176634e5
"""MJ/m³ in one eV/Å³."""


def tetragonal(symbols="FeAl", c_over_a=1.08, a=2.83):
    return Atoms(symbols, scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[a, a, a * c_over_a], pbc=True)


def iron():
    return with_moments(bulk("Fe", cubic=True, a=2.83), [[0, 0, 2.2]] * 2)


def constants(dataset, key="K"):
    return {str(n): float(dataset[key].sel(constant=n)) for n in dataset["constant"].values}


def turned(atoms, rotation):
    moments = rotation.apply(atoms.get_initial_magnetic_moments())
    copy = Atoms(atoms.numbers, rotation.apply(atoms.positions), cell=rotation.apply(atoms.cell[:]), pbc=True)
    return with_moments(copy, moments)


@pytest.mark.parametrize("toy", [CapableToy, Toy])
def test_uniaxial_constants(toy):
    """Single-ion constants on one of two atoms, in µeV per atom of the cell and in MJ/m³."""
    atoms = with_moments(tetragonal(), [[0, 0, 2.2], [0, 0, 0]])
    terms = (Uniaxial(3e-4, -8e-5, 2e-5, 6e-6, numbers=(26,)), Heisenberg(1e-3, 3.2))
    dataset = Anisotropy(directions=86).run(atoms, toy(*terms))
    assert dataset.attrs["system"] == "tetragonal"
    found = constants(dataset)
    expected = {"K1": 150.0, "K2": -40.0, "K3": 10.0, "K4phi": 3.0}
    assert found == pytest.approx(expected, rel=1e-6)
    density = {k: v * 1e-6 * 2 / atoms.get_volume() * MJ_PER_M3 for k, v in expected.items()}
    assert constants(dataset, "K_volume") == pytest.approx(density, rel=1e-6)
    assert float(dataset["mae"]) == pytest.approx(150 - 40 + 10 + 3, rel=1e-6)
    np.testing.assert_allclose(np.abs(dataset["easy_axis"]), [0, 0, 1], atol=1e-6)
    assert float(dataset["K_residual"]) < 1e-6
    assert float(dataset["symmetry_residual"]) < 1e-6


def test_hexagonal_constants():
    """The sixfold term in the basal plane, with x' along the shortest lattice vector."""
    atoms = with_moments(bulk("Co", "hcp", a=2.5, c=4.1), [[0, 0, 1.6]] * 2)
    toy = CapableToy(Uniaxial(6e-5, 2e-5, K6phi=-3e-6), elements=None, default_moments=None)
    dataset = Anisotropy().run(atoms, toy)
    assert dataset.attrs["system"] == "hexagonal"
    found = constants(dataset)
    assert found == pytest.approx({"K1": 60.0, "K2": 20.0, "K3": 0.0, "K6phi": -3.0}, rel=1e-6, abs=1e-6)


def test_easy_cone_is_refined_between_grid_points():
    """K1 < 0 < K2 puts the easy direction on a cone with sin²θ = -K1/2K2, where no grid point lies."""
    atoms = with_moments(tetragonal(), [[0, 0, 2.2], [0, 0, 0]])
    dataset = Anisotropy().run(atoms, CapableToy(Uniaxial(-2e-5, 5e-4, numbers=(26,))))
    sin2 = float(1 - dataset["easy_axis"].values[2] ** 2)
    assert sin2 == pytest.approx(2e-5 / 1e-3, rel=1e-6)
    assert float(dataset["mae"]) == pytest.approx((5e-4 - 2e-5 + 2e-5**2 / 2e-3) / 2 * 1e6, rel=1e-6)


@pytest.mark.parametrize(("k1", "k2"), [(3e-5, -2e-5), (-3e-5, 2e-5), (2e-5, -3e-4)])
def test_cubic_constants(k1, k2):
    """Cubic K1 and K2 on both sites, and the easy and hard axes they make."""
    dataset = Anisotropy().run(iron(), CapableToy(Cubic(k1, k2), Heisenberg(1e-3, 3.0)))
    assert dataset.attrs["system"] == "cubic"
    assert constants(dataset) == pytest.approx({"K1": k1 * 1e6, "K2": k2 * 1e6}, rel=1e-6)
    axes = {"100": [1, 0, 0], "110": [1, 1, 0], "111": [1, 1, 1]}
    energies = {"100": 0.0, "110": k1 / 4, "111": k1 / 3 + k2 / 27}
    for key, value in (("easy_axis", min(energies, key=energies.get)), ("hard_axis", max(energies, key=energies.get))):
        expected = np.sort(np.array(axes[value]) / np.linalg.norm(axes[value]))
        np.testing.assert_allclose(np.sort(np.abs(dataset[key])), expected, atol=1e-6)
    assert float(dataset["mae"]) == pytest.approx(1e6 * np.ptp(list(energies.values())), rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_two_ion_anisotropy(sign):
    """Pseudo-dipolar coupling on a tetragonal lattice, both ferro- and antiferromagnetic, against its lattice sum."""
    atoms = with_moments(tetragonal("Fe2"), [[0, 0, 2.0], [0, 0, sign * 2.0]])
    strength, decay, cutoff = 5e-5, 0.7, 4.5
    dataset = Anisotropy().run(atoms, CapableToy(PseudoDipolar(strength, cutoff, decay), Heisenberg(1e-3, 3.0)))
    total = 0.0
    for i in range(2):
        for j in range(2):
            for shift in np.ndindex(9, 9, 9):
                r = atoms.positions[j] - atoms.positions[i] + (np.array(shift) - 4) @ atoms.cell[:]
                d = np.linalg.norm(r)
                if 1e-6 < d < cutoff:
                    parity = 1.0 if i == j else sign
                    across, along = (r[0] ** 2 + r[1] ** 2) / 2 / d**2, r[2] ** 2 / d**2
                    total += -parity * strength * np.exp(-decay * (d - 2.5)) * 4.0 * (across - along)
    found = constants(dataset)
    assert found["K1"] == pytest.approx(total / 2 * 1e6, rel=1e-6)
    assert max(abs(found[k]) for k in ("K2", "K3", "K4phi")) < 1e-6 * abs(found["K1"])


def test_orthorhombic_tensor_and_axes():
    """A lattice without principal axis gets the second-rank tensor and its easy axis."""
    atoms = Atoms("Fe", cell=[2.7, 2.9, 3.2], pbc=True)
    dataset = Anisotropy().run(with_moments(atoms, [[0, 0, 2.0]]), CapableToy(Orthorhombic(2e-4, 7e-5)))
    assert dataset.attrs["expansion"] == "general"
    full = np.diag([200.0, 70.0, 0.0])
    np.testing.assert_allclose(dataset["tensor"], full - np.eye(3) * np.trace(full) / 3, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.abs(dataset["easy_axis"]), [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(np.abs(dataset["hard_axis"]), [1, 0, 0], atol=1e-6)
    assert dataset.attrs["system"] == "orthorhombic"
    assert "K" not in dataset


def test_torque_is_the_derivative_of_the_energy():
    """The torque against central differences of the energy under small rotations."""
    atoms = with_moments(tetragonal("Fe2"), [[0, 0, 2.0], [0, 0, 2.0]])
    toy = CapableToy(Uniaxial(3e-4, -8e-5, 2e-5, 6e-6), PseudoDipolar(5e-5, 4.5), Heisenberg(1e-3, 3.0))
    dataset = Anisotropy().run(atoms, toy)
    spin = SpinCalculator(toy)
    for k in (3, 40, 101):
        n = dataset["n"].values[k]
        for axis in range(3):
            energies = []
            for angle in (-2e-3, -1e-3, 1e-3, 2e-3):
                rotated = Rotation.from_rotvec(angle * np.eye(3)[axis]).apply(2.0 * n)
                energies.append(spin.energy(atoms, [rotated, rotated]))
            slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / 12e-3
            assert float(dataset["torque"][k, axis]) == pytest.approx(-slope / 2 * 1e6, rel=1e-6, abs=1e-4)


def test_torque_of_a_known_function():
    """For K1 sin²θ the torque on the moments pulls towards the axis with K1 sin 2θ."""
    atoms = with_moments(tetragonal(), [[0, 0, 2.2], [0, 0, 0]])
    dataset = Anisotropy().run(atoms, CapableToy(Uniaxial(2e-4, numbers=(26,))))
    n = dataset["n"].values
    expected = 2 * 100.0 * n[:, 2:] * np.cross(n, [0, 0, 1])
    np.testing.assert_allclose(dataset["torque"], expected, rtol=1e-6, atol=1e-7)


def test_per_site_parts():
    """Site energies and the sites' parts of the constants belong to the atom that carries the term."""
    atoms = with_moments(tetragonal(), [[0, 0, 2.2], [0, 0, 0]])
    dataset = Anisotropy().run(atoms, CapableToy(Uniaxial(3e-4, -8e-5, numbers=(26,))))
    per_site = dataset["K_site"].sel(constant="K1").values
    assert per_site == pytest.approx([300.0, 0.0], rel=1e-6, abs=1e-8)
    assert dataset["element"].values.tolist() == ["Fe", "Al"]
    total = dataset["site_energy"].sum("site").values
    expected = 2 * (dataset["energy"].values - dataset["energy"].values.min())
    np.testing.assert_allclose(total, expected, atol=1e-6)


def test_magnetoelastic_constants_and_magnetostriction():
    """B1, B2 and elastic constants put in come out; λ100 and λ111 follow Kittel's formulas.

    The coupling's mean over directions is a stress B1/3, under which the coefficients are taken.
    """
    atoms = iron()
    c11, c12, c44, b1, b2 = 1.4, 0.8, 0.7, -2e-4, 3e-4
    toy = CapableToy(Cubic(3e-7), Magnetoelastic(atoms.cell[:], c11, c12, c44, b1, b2))
    dataset = Anisotropy(strain=True).run(atoms, toy)
    assert float(dataset["B1"]) == pytest.approx(b1 * MJ_PER_M3, rel=1e-6)
    assert float(dataset["B2"]) == pytest.approx(b2 * MJ_PER_M3, rel=1e-6)
    gpa = 160.21766208
    voigt = dataset["elastic"].values
    c12, c44 = c12 - b1 / 3, c44 + b1 / 6
    assert [voigt[0, 0], voigt[0, 1], voigt[3, 3]] == pytest.approx([c11 * gpa, c12 * gpa, c44 * gpa], rel=1e-6)
    assert float(dataset["lambda100"]) == pytest.approx(-2 / 3 * b1 / (c11 - c12), rel=1e-6)
    assert float(dataset["lambda111"]) == pytest.approx(-1 / 3 * b2 / c44, rel=1e-6)
    tensor = dataset["magnetostriction_tensor"].values
    assert tensor[0, 0, 0] == pytest.approx(float(dataset["lambda100"]), rel=1e-6)


@pytest.mark.parametrize(("c11", "c12", "c44"), [(1.5, 0.9, 0.0), (1.5, 0.9, -0.3), (0.8, 1.0, 0.7)])
def test_no_magnetostriction_without_a_stable_lattice(c11, c12, c44):
    """A lattice that does not resist a strain has no strain under a constant load; B1 and B2 are what they are."""
    atoms = iron()
    toy = CapableToy(Cubic(3e-7), Magnetoelastic(atoms.cell[:], c11, c12, c44, -2e-4, 3e-4))
    dataset = Anisotropy(strain=True).run(atoms, toy)
    assert float(dataset["B2"]) == pytest.approx(3e-4 * MJ_PER_M3, rel=1e-6)
    for name in ("lambda100", "lambda111", "magnetostriction_tensor"):
        assert np.isnan(dataset[name].values).all()
    assert "the lattice is not stable" in dataset.attrs["note"]


@pytest.mark.parametrize("rotation", [None, Rotation.from_rotvec([0.3, -0.5, 0.8])])
def test_magnetostriction_under_pressure(rotation):
    """The strain that minimises the enthalpy of a quadratic crystal at 0.97 of its lattice constant, 15 GPa.

    Of ``E + P V`` by volume, with E quadratic in the strain from the reference: C/s for E, and of V the second
    derivatives 1 by ε1 ε2 and -1/2 by ε4 ε4; the coupling is B/s².
    """
    free = iron() if rotation is None else turned(iron(), rotation)
    c11, c12, c44, b1, b2, s = 1.4, 0.8, 0.7, -2e-4, 3e-4, 0.97
    toy = CapableToy(Cubic(3e-7), Magnetoelastic(free.cell[:], c11, c12, c44, b1, b2))
    atoms = with_moments(strained(free, (s - 1) * np.eye(3)), moments_of(free))
    pressure = ((c11 + 2 * c12) * (1 - s) - b1 / 3) / s**2
    assert -SpinCalculator(toy).stress(atoms, moments_of(atoms))[:3].mean() == pytest.approx(pressure, rel=1e-9)
    dataset = Anisotropy(strain=True).run(atoms, toy)
    prime, shear = c11 / s - (c12 / s + pressure), c44 / s - pressure / 2
    assert float(dataset["B1"]) == pytest.approx(b1 / s**2 * MJ_PER_M3, rel=1e-6)
    assert float(dataset["lambda100"]) == pytest.approx(-2 / 3 * b1 / s**2 / prime, rel=1e-6)
    assert float(dataset["lambda111"]) == pytest.approx(-1 / 3 * b2 / s**2 / shear, rel=1e-6)
    elastic = Elastic(moments="fixed", relax="none", finite_strain=False).run(atoms, toy).sel(level="clamped")
    for name in ("B1", "B2", "lambda100", "lambda111"):
        assert float(dataset[name]) == pytest.approx(float(elastic[name]), rel=1e-3)


def test_magnetoelastic_constants_of_a_turned_crystal():
    """The same numbers where the crystal does not lie along the Cartesian axes."""
    atoms = turned(iron(), Rotation.from_rotvec([0.3, -0.5, 0.8]))
    toy = CapableToy(Cubic(3e-7), Magnetoelastic(atoms.cell[:], 1.4, 0.8, 0.7, -2e-4, 3e-4))
    dataset = Anisotropy(strain=True).run(atoms, toy)
    assert float(dataset["B1"]) == pytest.approx(-2e-4 * MJ_PER_M3, rel=1e-6)
    assert float(dataset["B2"]) == pytest.approx(3e-4 * MJ_PER_M3, rel=1e-6)
    assert float(dataset["lambda111"]) == pytest.approx(-1 / 3 * 3e-4 / (0.7 - 2e-4 / 6), rel=1e-6)


@settings(max_examples=8, deadline=None)
@given(
    st.tuples(*[st.floats(-1, 1)] * 3),
    st.floats(1e-5, 1e-3),
    st.floats(-2e-5, 2e-5),
)
def test_rotating_crystal_and_moments_changes_nothing(vector, k1, k2):
    """Constants stay and axes turn with the crystal."""
    rotation = Rotation.from_rotvec(3 * np.array(vector))
    atoms = with_moments(tetragonal(), [[0, 0.5, 2.2], [0, 0, 0]])
    toy = CapableToy(Uniaxial(k1, k2, numbers=(26,)), Heisenberg(1e-3, 3.0))
    dataset = Anisotropy().run(turned(atoms, rotation), toy)
    found = constants(dataset)
    assert [found["K1"], found["K2"]] == pytest.approx([k1 / 2 * 1e6, k2 / 2 * 1e6], rel=1e-6, abs=1e-6 * k1 * 1e6)
    along = abs(dataset["easy_axis"].values @ rotation.apply([0, 0, 1]))
    assume(abs(k1 + k2) > 1e-7)
    assert along == pytest.approx(1.0 if k1 + k2 > 0 else 0.0, abs=1e-6)


def test_soc_off_is_exactly_zero_and_said_so():
    """Without spin-orbit coupling the energy does not depend on the direction."""
    toy = CapableToy(Uniaxial(3e-4), Heisenberg(1e-3, 3.0), soc=False)
    dataset = Anisotropy().run(with_moments(tetragonal("Fe2"), [[0, 0, 2.0]] * 2), toy)
    assert np.ptp(dataset["energy"].values) * 2e-6 < 1e-12
    assert int(dataset["is_zero"]) == 1
    assert "no anisotropy" in dataset.attrs["note"]
    assert np.isnan(dataset["easy_axis"]).all()


def test_collinear_moments_of_shape_n():
    """Moments of shape (N,) mean z."""
    atoms = tetragonal()
    atoms.set_initial_magnetic_moments([2.2, 0.0])
    dataset = Anisotropy().run(atoms, CapableToy(Uniaxial(3e-4, numbers=(26,))))
    assert constants(dataset)["K1"] == pytest.approx(150, rel=1e-6)
    assert atoms.get_initial_magnetic_moments().shape == (2,)


def test_magnitudes_relaxed_once_and_at_each_direction():
    """Where the anisotropy feeds back on |m|, relaxing each direction lowers the hard one by the closed form."""
    a, b, g = 0.05, 0.005, 1e-3
    m0 = np.sqrt(a / 2 / b)
    atoms = with_moments(Atoms("Fe", cell=[2.8, 2.8, 3.1], pbc=True), [[0, 0, 1.8]])
    toy = CapableToy(Landau(a, b), AnisotropicLength(g, m0), Uniaxial(2e-4))
    once = Anisotropy(moments="magnitudes").run(atoms, toy)
    assert np.linalg.norm(once["moments"].values[0]) == pytest.approx(m0, rel=1e-6)
    assert float(once["mae"]) == pytest.approx(200.0, rel=1e-6)
    each = Anisotropy(moments="magnitudes", relax="each", directions=86).run(atoms, toy)
    # the hard direction gains the minimum over u = m² of b (u - u0)² + g (u - u0)
    assert float(each["mae"]) == pytest.approx(200.0 - g**2 / (4 * b) * 1e6, rel=1e-6)
    fixed = Anisotropy().run(atoms, toy)
    assert float(fixed["mae"]) == pytest.approx(abs(2e-4 + g * (1.8**2 - m0**2)) * 1e6, rel=1e-6)


def test_non_collinear_pattern_turns_in_three_angles():
    """Two moments at right angles: uniaxial sites, so the best orientation lies between, at a known energy."""
    atoms = with_moments(tetragonal("Fe2"), [[2.0, 0, 0], [0, 0, 2.0]])
    dataset = Anisotropy(directions=86).run(atoms, CapableToy(Uniaxial(2e-4)))
    assert dataset.attrs["collinear"] == 0
    assert dataset["energy"].dims == ("direction", "turn")
    # Σ sin²θ of two perpendicular moments ranges from 1 (one along z, or both in a plane with z) to 2
    assert float(dataset["mae"]) == pytest.approx(100.0, rel=1e-6)
    rotation = dataset["easy_rotation"].values
    e = (rotation @ np.array([[1.0, 0, 0], [0, 0, 1.0]]).T).T
    assert (1 - e[:, 2] ** 2).sum() == pytest.approx(1.0, abs=1e-8)


def test_weak_dmi_does_not_touch_collinear_constants():
    """The antisymmetric exchange vanishes on a collinear pattern."""
    atoms = with_moments(tetragonal("Fe2"), [[0, 0, 2.0]] * 2)
    dataset = Anisotropy().run(atoms, CapableToy(Uniaxial(1e-4), DMI(1e-3, 3.0)))
    assert constants(dataset)["K1"] == pytest.approx(100.0, rel=1e-6)


def test_committee_mean_and_spread():
    """Three members with known constants: mean, spread, and members side by side."""
    values = np.array([1e-4, 1.2e-4, 1.7e-4])
    atoms = with_moments(tetragonal(), [[0, 0, 2.2], [0, 0, 0]])
    toys = CommitteeToy([CapableToy(Uniaxial(k, numbers=(26,))) for k in values])
    dataset = Anisotropy().run(atoms, toys)
    where = {"constant": "K1"}
    assert float(dataset["K"].sel(**where)) == pytest.approx(values.mean() / 2 * 1e6, rel=1e-6)
    assert float(dataset["K_std"].sel(**where)) == pytest.approx(values.std(ddof=1) / 2 * 1e6, rel=1e-6)
    assert dataset["K_member"].sel(**where).values == pytest.approx(values / 2 * 1e6, rel=1e-6)
    assert np.linalg.norm(dataset["easy_axis"]) == pytest.approx(1, abs=1e-12)
    rows = {r.label: r for r in Anisotropy().summary(dataset) if r.unit == "µeV/atom"}
    assert rows["K1"].spread == pytest.approx(values.std(ddof=1) / 2 * 1e6, rel=1e-6)


def test_committee_members_with_other_equivalent_axes_agree():
    """Members whose easy axes are equivalent give one axis, not the mean of different ones."""
    toys = CommitteeToy([CapableToy(Cubic(-k)) for k in (2e-5, 3e-5)])
    dataset = Anisotropy().run(iron(), toys)
    np.testing.assert_allclose(np.abs(dataset["easy_axis"]), np.ones(3) / np.sqrt(3), atol=1e-6)
    np.testing.assert_allclose(dataset["easy_axis_std"], 0, atol=1e-6)


@pytest.mark.parametrize("values", [(-1e-4, 4e-4, 5e-4, 3e-4), (4e-4, -1e-4, 5e-4, 3e-4)])
def test_axes_of_a_committee_are_those_of_most_members(values):
    """One member has an easy plane and three an easy axis, across it: the axis is named, whoever comes first."""
    atoms = with_moments(tetragonal(), [[0, 0, 2.2], [0, 0, 0]])
    dataset = Anisotropy().run(atoms, CommitteeToy([CapableToy(Uniaxial(k, numbers=(26,))) for k in values]))
    np.testing.assert_allclose(np.linalg.norm(dataset["easy_axis_member"], axis=1), 1, atol=1e-9)
    np.testing.assert_allclose(np.abs(dataset["easy_axis"]), [0, 0, 1], atol=1e-6)
    assert abs(float(dataset["hard_axis"][2])) < 1e-6
    rows = {row.label: row.value for row in Anisotropy().summary(dataset)}
    assert rows["easy axis"] == "[0 0 1], 1 equivalent, 3 of 4 members"


def test_an_order_that_is_lost_is_told():
    """A short moment turns over when it is relaxed, and nothing more is said of the order asked for."""
    model = CapableToy(Landau(0.05, 0.005), Heisenberg(2e-3, 2.7), Uniaxial(1e-4))
    for moment, kept in ((-0.3, 0), (-1.8, 1)):
        dataset = Anisotropy(moments="magnitudes").run(with_moments(tetragonal("Fe2"), [2.0, moment]), model)
        assert int(dataset["order_kept"]) == kept
        assert ("order" in {row.label for row in Anisotropy().summary(dataset)}) == (not kept)


def test_committee_members_with_other_equivalent_orientations_agree():
    """A canted pair that a vanishing field along ±z tells apart: one rotation, which is lowest for every member."""
    atoms = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[2.7, 2.9, 3.2], pbc=True)
    atoms = with_moments(atoms, [[1.0, 0, 2.0], [-1.0, 0, 2.0]])
    toys = [
        CapableToy(Orthorhombic(2e-4 + k * 1e-5, 7e-5), Zeeman(sign * 1e-9)) for k, sign in enumerate((1, -1, 1, -1))
    ]
    dataset = Anisotropy(directions=86).run(atoms, CommitteeToy(toys))
    assert dataset["easy_rotation_member"].shape == (4, 3, 3)
    assert not {"rotations", "images"} & set(dataset.attrs)
    for name, lowest in (("easy_rotation", True), ("hard_rotation", False)):
        rotation = dataset[name].values
        assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(dataset[f"{name}_std"], 0, atol=1e-4)
        for k, toy in enumerate(toys):
            energy = SpinCalculator(toy).energy(atoms, moments_of(atoms) @ rotation.T)
            above = 0.0 if lowest else float(dataset["mae_member"][k]) * 2e-6
            assert energy - float(dataset["easy_energy_member"][k]) == pytest.approx(above, abs=1e-8)


def test_images_of_an_orientation_have_its_energy():
    """Whatever the orientation: canted moments on a crystal with eight rotations of its own."""
    atoms = with_moments(tetragonal("Fe2"), [[1.0, 0.3, 2.0], [-1.0, 0.3, 2.0]])
    spin = SpinCalculator(CapableToy(Uniaxial(3e-4, -8e-5, 2e-5, 6e-6), PseudoDipolar(5e-5, 4.5)))
    left, right = _images_of(atoms, moments_of(atoms), 1e-3, 1e-2)
    start = Rotation.from_rotvec([0.4, -0.7, 0.2]).as_matrix()
    images = left @ start @ right
    np.testing.assert_allclose(np.linalg.det(images), 1, atol=1e-12)
    assert len({tuple(image.round(6).ravel() + 0.0) for image in images}) == 32
    energies = [spin.energy(atoms, moments_of(atoms) @ image.T) for image in images]
    np.testing.assert_allclose(energies, spin.energy(atoms, moments_of(atoms) @ start.T), atol=1e-12)


def test_dataset_opens_plainly_and_explains_itself(tmp_path):
    """Plain xarray reads it; every variable has a unit and a name; the attributes repeat the run."""
    atoms = with_moments(tetragonal(), [[0, 0, 2.2], [0, 0, 0]])
    dataset = Anisotropy().run(atoms, CapableToy(Uniaxial(3e-4, numbers=(26,))))
    write_dataset(dataset, tmp_path / "a.nc")
    with xr.open_dataset(tmp_path / "a.nc") as again:
        xr.testing.assert_identical(again.load(), dataset)
        for name, item in again.variables.items():
            assert item.attrs["units"], name
            assert item.attrs["long_name"], name
        attrs = again.attrs
    assert attrs["magnetic_space_group"].startswith("P4/mm'm'")
    for key in ("structure_json", "structure_cif", "initial_moments", "options", "versions", "hamiltonian_convention"):
        assert isinstance(attrs[key], str)
        assert attrs[key]
    assert attrs["model_hash"]
    assert attrs["mag_symprec"] == 1e-2
    assert attrs["spin_orbit_coupling"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.nc"]


def test_a_symmetry_breaking_calculator_is_reported():
    """Uniaxial terms on a cubic lattice are not what cubic constants describe, and the dataset says so."""
    dataset = Anisotropy().run(iron(), CapableToy(Uniaxial(1e-4)))
    assert float(dataset["symmetry_residual"]) > 10
    assert "breaks the lattice's symmetry" in dataset.attrs["note"]
    np.testing.assert_allclose(np.abs(dataset["easy_axis"]), [0, 0, 1], atol=1e-6)
    assert abs(float(dataset["hard_axis"][2])) < 1e-6


def test_refusals():
    """No moments, moments that vanish, and options that contradict each other."""
    atoms = tetragonal()
    toy = CapableToy(Uniaxial(1e-4))
    with pytest.raises(MomentError, match="carries no magnetic moments"):
        Anisotropy().run(atoms, toy)
    with pytest.raises(MomentError, match="no atom carries a moment"):
        Anisotropy().run(with_moments(atoms, np.zeros((2, 3))), toy)
    with pytest.raises(MomentError, match="vanish"):
        Anisotropy(moments="magnitudes").run(
            with_moments(atoms, [[0, 0, 1.0], [0, 0, 0]]), CapableToy(Landau(-0.05, 0.0))
        )
    for mode in ("fixed", "full"):
        with pytest.raises(OptionError, match=f"relax each and moments {mode} do not go together"):
            Anisotropy(moments=mode, relax="each").run(with_moments(atoms, [[0, 0, 1.0], [0, 0, 0]]), toy)
    with pytest.raises(OptionError, match="directions"):
        Anisotropy(directions=100)
    with pytest.raises(OptionError, match="did you mean 'directions'"):
        Anisotropy(direction=194)
    with pytest.raises(OptionError, match="did you mean 'uniaxial'"):
        Anisotropy(expansion="uniaxal")
    with pytest.raises(OptionError, match="strain_step does nothing where strain is off"):
        Anisotropy(strain_step=1e-3)
    stages = []
    with pytest.raises(OptionError, match="need a collinear pattern"):
        Anisotropy(strain=True).run(
            with_moments(atoms, [[0, 0, 1.0], [1.0, 0, 0]]), toy, lambda stage, done, total: stages.append(stage)
        )
    assert set(stages) == {"relax moments"}


def test_harmonics_are_orthonormal():
    """The quadrature integrates products of all harmonics used."""
    points, weights = lebedev_rule(15)
    values, labels = real_harmonics(points.T)
    np.testing.assert_allclose(values.T @ (weights[:, None] * values), np.eye(28), atol=1e-12)
    x = labels.index((2, 0))
    np.testing.assert_allclose(values[:, x], np.sqrt(5 / 16 / np.pi) * (3 * points[2] ** 2 - 1), atol=1e-12)


def test_pattern_finds_axis_and_canting():
    """Ferrimagnet, antiferromagnet and a canted pair."""
    assert Pattern.of(np.array([[0, 0, -3.0], [0, 0, 1.0]])).axis[2] == pytest.approx(-1)
    afm = Pattern.of(np.array([[0, -2.0, 0], [0, 2.0, 0]]))
    assert afm.collinear
    assert afm.axis[1] == pytest.approx(-1)
    assert not Pattern.of(np.array([[0.1, 0, 2.0], [-0.1, 0, 2.0]])).collinear
