"""Elastic constants against closed forms, finite strain, and each other."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import xarray as xr
from ase import Atoms
from ase.build import bulk
from mmace_props.base import write_dataset
from mmace_props.cli import main
from mmace_props.conventions import GPA, MJ_PER_M3
from mmace_props.elastic import Elastic, Expansion, averages, christoffel, debye_temperature
from mmace_props.errors import ConvergenceError, OptionError
from mmace_props.protocol import STENCIL, SpinCalculator, strained, voigt_strain, with_moments
from mmace_props.stiffness import birch, lagrangian, to_tensor, to_voigt, voigt_rotation
from mmace_props.structures import read_structure
from pymatgen.core import Lattice, Structure
from pymatgen.core.elasticity import ElasticTensor
from scipy.optimize import root
from scipy.spatial.transform import Rotation

from mmace.calculator import MMACECalculator

from .test_cli_props import EXAMPLES, TOY
from .toys import (
    F64,
    AnisotropicLength,
    CapableToy,
    CommitteeToy,
    Cubic,
    Heisenberg,
    Landau,
    Magnetoelastic,
    PseudoDipolar,
    Springs,
    Toy,
    as_tensor,
    scatter,
)

K, A = 3.0, 3.6
NEIGHBOUR = A / np.sqrt(2)


def taper(r, cutoff):
    """Weight that takes a pair function to zero with two derivatives, so that no shell enters with a jump."""
    return (1 - (r / cutoff) ** 2) ** 3


@dataclass
class Morse:
    """``½ Σ_{i≠j} D [exp(-2α(r - r0)) - 2 exp(-α(r - r0))]``, tapered to zero at the cut-off."""

    D: float = 0.4
    alpha: float = 1.9
    r0: float = 2.6
    cutoff: float = 6.5
    soc = False

    def slopes(self, r):
        """First and second derivative of a pair's energy."""
        x = np.exp(-self.alpha * (r - self.r0))
        parts = self.D * np.array([x**2 - 2 * x, 2 * self.alpha * (x - x**2), 2 * self.alpha**2 * (2 * x**2 - x)])
        u, c = 1 - (r / self.cutoff) ** 2, self.cutoff**2
        weights = np.array([u**3, -6 * r / c * u**2, -6 / c * u**2 + 24 * r**2 / c**2 * u])
        first = parts[0] * weights[1] + parts[1] * weights[0]
        return first, parts[0] * weights[2] + 2 * parts[1] * weights[1] + parts[2] * weights[0]

    def sites(self, s):
        i, _, r, _ = s.pairs(self.cutoff)
        d = torch.linalg.norm(r, dim=1)
        x = torch.exp(-self.alpha * (d - self.r0))
        energy = self.D / 2 * (x**2 - 2 * x) * taper(d, self.cutoff)
        return scatter(energy.expand(s.moments.shape[0], -1), i, len(s.positions))


@dataclass
class Exchange:
    """``-Σ_{i≠j} J exp(-decay (r - r0)) m_i·m_j``, tapered to zero at the cut-off."""

    J: float
    cutoff: float
    decay: float
    r0: float
    soc = False

    def sites(self, s):
        i, j, r, shift = s.pairs(self.cutoff)
        d = torch.linalg.norm(r, dim=1)
        strength = self.J * torch.exp(-self.decay * (d - self.r0)) * taper(d, self.cutoff)
        return scatter(-strength * (s.moments[:, i] * s.neighbours(j, shift)).sum(-1), i, len(s.positions))


@dataclass
class MagnetoVolume:
    """``Σ_i g (m² - m0²) tr ε`` plus cubic elasticity per reference volume; ε is the strain from the reference."""

    reference: np.ndarray
    g: float
    m0: float
    C11: float
    C12: float
    C44: float
    soc = False

    def sites(self, s):
        ref = as_tensor(self.reference)
        deformation = torch.linalg.inv(ref) @ s.cell
        strain = (deformation + deformation.T) / 2 - torch.eye(3, dtype=F64)
        d, o = torch.diagonal(strain), torch.stack([strain[1, 2], strain[0, 2], strain[0, 1]])
        elastic = (
            0.5 * self.C11 * (d**2).sum()
            + self.C12 * (d[0] * d[1] + d[1] * d[2] + d[0] * d[2])
            + 2 * self.C44 * (o**2).sum()
        )
        volume = torch.abs(torch.linalg.det(ref))
        m2 = (s.moments**2).sum(-1)
        return self.g * (m2 - self.m0**2) * d.sum() + volume * elastic / len(s.positions)


def constants(dataset, level, name="C"):
    """C11, C12 and C44 of a level, in eV/Å³."""
    c = dataset[name].sel(level=level).values / GPA
    return c[0, 0], c[0, 1], c[3, 3]


def still(atoms):
    """The structure without moments, which every toy accepts."""
    return with_moments(atoms, np.zeros(len(atoms)))


def cubic_matrix(c11, c12, c44):
    matrix = np.diag([c11 - c12] * 3 + [c44] * 3)
    matrix[:3, :3] += c12
    return matrix


@pytest.mark.parametrize("cls", [CapableToy, Toy])
def test_springs_between_nearest_neighbours_in_fcc(cls):
    """C11 = 2k/a and C12 = C44 = k/a, and every average, velocity and eigenvalue that follows by hand."""
    dataset = Elastic(relax="none").run(still(bulk("Fe", "fcc", a=A)), cls(Springs(K, NEIGHBOUR, 3.0)))
    unit = K / A
    for level in ("clamped", "ions"):
        assert constants(dataset, level) == pytest.approx((2 * unit, unit, unit), rel=1e-8)
    assert dataset["disagreement"].values == pytest.approx(0, abs=1e-4)
    unit *= GPA
    one = dataset.sel(level="ions")
    assert float(one["bulk_modulus"]) == pytest.approx(4 / 3 * unit, rel=1e-8)
    assert float(one["shear_modulus_voigt"]) == pytest.approx(4 / 5 * unit, rel=1e-8)
    assert float(one["shear_modulus_reuss"]) == pytest.approx(5 / 7 * unit, rel=1e-8)
    assert float(one["universal_anisotropy"]) == pytest.approx(0.6, rel=1e-7)
    assert one["eigenvalues"].values == pytest.approx(unit * np.array([1, 1, 2, 2, 2, 4]), rel=1e-8)
    assert float(one["stable"]) == 1
    density = 55.845 * 1.66053906660e-27 / (A**3 / 4 * 1e-30)
    assert float(dataset["density"]) == pytest.approx(density, rel=1e-4)
    squares = one["velocity"].sel(direction="100").values ** 2 * density / 1e9 / unit
    assert squares == pytest.approx([1, 1, 2], rel=1e-4)
    squares = one["velocity"].sel(direction="110").values ** 2 * density / 1e9 / unit
    assert squares == pytest.approx([0.5, 1, 2.5], rel=1e-4)
    assert dataset.attrs["system"] == "cubic"


def test_a_turned_crystal_has_turned_constants():
    """The tensor turns with the crystal; in the lattice's own axes it stays."""
    atoms = still(bulk("Fe", "fcc", a=A))
    turn = Rotation.from_rotvec([0.4, 0.9, -0.3]).as_matrix()
    turned = atoms.copy()
    turned.set_cell(atoms.cell[:] @ turn.T, scale_atoms=True)
    model = CapableToy(Springs(K, NEIGHBOUR, 3.0))
    before = Elastic(relax="none", finite_strain=False).run(atoms, model)
    after = Elastic(relax="none", finite_strain=True).run(turned, model)
    expected = np.einsum(
        "ai,bj,ck,dl,ijkl->abcd", turn, turn, turn, turn, to_tensor(before["C"].values[0]), optimize=True
    )
    np.testing.assert_allclose(after["C"].values[0], to_voigt(expected), atol=1e-8)
    np.testing.assert_allclose(after["C_lattice"].values, before["C_lattice"].values, atol=1e-8)
    assert np.abs(after["C"].values[0] - before["C"].values[0]).max() > 1
    assert after["disagreement"].values == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("cls", [CapableToy, Toy])
def test_internal_strain_of_diamond(cls):
    """Springs k between neighbours give k/3a to each constant; sublattices that move by -aγ/4 take it back in shear.

    The second springs, between equal sublattices, add 4k'/a and 2k'/a. Kleinman's parameter is 1 for stretching alone.
    """
    second = 0.7
    a = 4.2
    atoms = still(bulk("Fe", "diamond", a=a))
    near, far = np.sqrt(3) * a / 4, a / np.sqrt(2)

    @dataclass
    class Shells:
        soc = False

        def sites(self, s):
            i, _, r, _ = s.pairs(far + 0.3)
            d = torch.linalg.norm(r, dim=1)
            close = d < (near + far) / 2
            energy = torch.where(close, K / 4 * (d - near) ** 2, second / 4 * (d - far) ** 2)
            return scatter(energy.expand(s.moments.shape[0], -1), i, len(s.positions))

    dataset = Elastic(relax="none").run(atoms, cls(Shells()))
    first, more = K / (3 * a), second / a
    assert constants(dataset, "clamped") == pytest.approx(
        (first + 4 * more, first + 2 * more, first + 2 * more), rel=1e-7
    )
    assert constants(dataset, "ions") == pytest.approx((first + 4 * more, first + 2 * more, 2 * more), rel=1e-7)
    moved = dataset["internal_strain"].values[:, 1] - dataset["internal_strain"].values[:, 0]
    expected = np.zeros((6, 3))
    expected[[3, 4, 5], [0, 1, 2]] = -a / 4
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    assert dataset["disagreement"].values == pytest.approx(0, abs=1e-3)


def pair_sums(atoms, pair):
    """Stress and Lagrangian constants of a central force by sums over neighbours, eV/Å³."""
    from ase.neighborlist import neighbor_list

    d, r = neighbor_list("dD", atoms, pair.cutoff)
    first, second = pair.slopes(d)
    volume = 2 * atoms.get_volume()
    stress = np.einsum("p,pi,pj->ij", first / d, r, r) / volume
    weight = second / d**2 - first / d**3
    return stress, to_voigt(np.einsum("p,pi,pj,pk,pl->ijkl", weight, r, r, r, r) / volume)


def test_pressure_of_a_central_force():
    """Under pressure the Lagrangian constants keep Cauchy's relation, and those that are measured differ by 2P."""
    pair = Morse()
    dataset = Elastic(pressure=30.0, finite_strain=True).run(still(bulk("Fe", "fcc", a=3.6)), CapableToy(pair))
    state = Atoms("Fe", positions=dataset["positions"].values, cell=dataset["cell"].values, pbc=True)
    stress, expected = pair_sums(state, pair)
    assert stress[0, 0] * GPA == pytest.approx(-30, abs=1e-3)
    np.testing.assert_allclose(dataset["C_lagrangian"].values[0] / GPA, expected, atol=1e-9)
    c11, c12, c44 = (x * GPA for x in constants(dataset, "ions", "C_lagrangian"))
    assert c12 == pytest.approx(c44, abs=1e-6)
    b11, b12, b44 = (x * GPA for x in constants(dataset, "ions"))
    assert (b11, b12, b44) == pytest.approx((c11 - 30, c12 + 30, c44 - 30), abs=2e-3)
    assert dataset["disagreement"].values == pytest.approx(0, abs=1e-3)
    volumes = state.get_volume() * np.array([0.9999, 1.0001])
    pressures = []
    for v in volumes:
        image = state.copy()
        image.set_cell(state.cell[:] * (v / state.get_volume()) ** (1 / 3), scale_atoms=True)
        pressures.append(-np.trace(pair_sums(image, pair)[0]) / 3 * GPA)
    bulk_modulus = -state.get_volume() * np.diff(pressures)[0] / np.diff(volumes)[0]
    assert float(dataset["bulk_modulus"].sel(level="ions")) == pytest.approx(bulk_modulus, rel=1e-5)


def test_coefficients_are_the_slopes_of_the_stress_in_a_crystal_under_any_stress():
    """dσ/dε by finite differences of Cauchy's stress, with shear in the cell: no symmetry is left to hide behind."""
    atoms = still(bulk("Fe", "fcc", a=3.5, cubic=True))
    atoms.set_cell(
        atoms.cell[:] @ np.array([[1, 0.02, 0.03], [0.02, 1.03, -0.01], [0.03, -0.01, 0.96]]), scale_atoms=True
    )
    pair = Morse()
    calculator = SpinCalculator(CapableToy(pair))
    zero = np.zeros((4, 3))
    dataset = Elastic(relax="none").run(atoms, calculator)
    slopes, h = np.zeros((6, 6)), 1e-3
    for w in range(6):
        for k, weight in STENCIL:
            slopes[:, w] += weight / h * calculator.stress(strained(atoms, voigt_strain(w, k * h)), zero)
    assert np.abs(dataset["stress"].values).max() > 5
    assert np.abs(slopes - slopes.T).max() * GPA > 1
    np.testing.assert_allclose(dataset["C"].sel(level="clamped"), slopes * GPA, atol=2e-5)
    _, expected = pair_sums(atoms, pair)
    np.testing.assert_allclose(dataset["C_lagrangian"].sel(level="clamped"), expected * GPA, atol=1e-7)
    assert dataset["disagreement"].values == pytest.approx(0, abs=1e-3)


def test_sound_in_a_stressed_crystal():
    """Velocities of long waves in the chain of planes of a stressed fcc crystal, from its dynamical matrix."""
    pair = Morse()
    atoms = bulk("Fe", "fcc", a=3.4)
    stress, second = pair_sums(atoms, pair)
    from ase.neighborlist import neighbor_list

    d, r = neighbor_list("dD", atoms, pair.cutoff)
    first, curved = pair.slopes(d)
    e = r / d[:, None]
    springs = np.einsum("p,pi,pj->pij", curved - first / d, e, e) + (first / d)[:, None, None] * np.eye(3)
    direction = np.array([1.0, 2.0, -0.5]) / np.linalg.norm([1.0, 2.0, -0.5])
    q = 1e-3
    dynamical = np.einsum("p,pij->ij", 2 * np.sin(q * r @ direction / 2) ** 2, springs)
    density = 7900.0
    expected = np.sqrt(np.linalg.eigvalsh(dynamical) / q**2 / atoms.get_volume() * GPA * 1e9 / density)
    found = christoffel(second * GPA, stress * GPA, direction[None], density)[0]
    assert np.abs(stress).max() * GPA > 10
    np.testing.assert_allclose(found, expected, rtol=1e-5)


REFERENCE = 2.85 * np.eye(3)
SOFT = {"a": 0.08, "b": 0.01}
M0 = np.sqrt(SOFT["a"] / (2 * SOFT["b"]))
STIFF = (1.5, 0.9, 0.7)


def soft_iron(g, cls=CapableToy, **options):
    return cls(Landau(SOFT["a"], SOFT["b"]), MagnetoVolume(REFERENCE, g, M0, *STIFF), **options)


def iron(moment=M0):
    return with_moments(bulk("Fe", cubic=True, a=2.85), [[0, 0, moment]] * 2)


@pytest.mark.parametrize("cls", [CapableToy, Toy])
@pytest.mark.parametrize("g", [0.09, -0.09])
def test_moments_soften_the_crystal(cls, g):
    """Moments that follow take g²/2b per atom from C11 and C12 alone, and change by -g/(4 b m0) per volume strain."""
    compare = cls is CapableToy
    dataset = Elastic(moments="magnitudes", relax="none", finite_strain=compare).run(iron(), soft_iron(g, cls))
    c11, c12, c44 = STIFF
    assert constants(dataset, "clamped") == pytest.approx(STIFF, rel=1e-8)
    drop = 2 * g**2 / (2 * SOFT["b"]) / 2.85**3
    assert drop > 0.03
    assert constants(dataset, "relaxed") == pytest.approx((c11 - drop, c12 - drop, c44), rel=1e-7)
    response = dataset["moment_response"].values
    np.testing.assert_allclose(response[:3, :, 2], -g / (4 * SOFT["b"] * M0), rtol=1e-6)
    assert np.abs(response[3:]).max() < 1e-8
    assert not compare or dataset["disagreement"].values == pytest.approx(0, abs=1e-3)
    assert float(dataset["magnetic_residual"]) < 1e-6


def test_moments_that_are_held_do_not_follow():
    """With fixed moments there is no third level."""
    dataset = Elastic(moments="fixed", relax="none").run(iron(), soft_iron(0.09))
    assert dataset["level"].values.tolist() == ["clamped", "ions"]


def crooked():
    """A low crystal of two iron atoms whose ions and moments all couple to every strain."""
    cell = [[2.5, 0.1, 0.0], [0.0, 2.6, 0.15], [0.1, 0.0, 3.9]]
    atoms = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0.45, 0.52, 0.44]], cell=cell, pbc=True)
    return with_moments(atoms, [[0.3, 0.2, 1.8]] * 2)


def coupled(cls=CapableToy, **options):
    return cls(Morse(0.5, 1.6, 2.3, 5.0), Landau(0.05, 0.006, (26,)), Exchange(1e-2, 4.5, 1.5, 2.4), **options)


@pytest.mark.parametrize("mode", ["magnitudes", "full"])
def test_everything_coupled_agrees_with_finite_strain(mode):
    """Ions and moments follow every strain; without spin-orbit coupling the free turn of all moments is left out."""
    dataset = Elastic(moments=mode, relax="ions").run(crooked(), coupled(soc=False))
    clamped, ions, relaxed = dataset["C"].values
    assert np.abs(clamped - ions).max() > 1
    assert np.abs(relaxed - ions).max() > 0.1
    assert np.abs(dataset["C"].values[:, 0, 4]).min() > 0.1
    assert dataset["disagreement"].values == pytest.approx(0, abs=2e-3)
    lagrangian_ = dataset["C_lagrangian"].values
    assert np.all(np.linalg.eigvalsh(lagrangian_[0] - lagrangian_[1]) > -1e-6)
    assert np.all(np.linalg.eigvalsh(lagrangian_[1] - lagrangian_[2]) > -1e-6)


def test_a_calculator_that_does_not_state_its_spin_orbit_coupling():
    """The free turn of all moments is then found from the energy; differences make no more of it than it is."""
    terms = [*soft_iron(0.09).options.terms, Heisenberg(3e-4, 2.6)]
    found = Elastic(moments="full", relax="none", finite_strain=False).run(iron(), Toy(*terms))
    exact = Elastic(moments="magnitudes", relax="none").run(iron(), CapableToy(*terms, soc=False))
    assert constants(exact, "relaxed")[0] < constants(exact, "ions")[0] - 0.01
    np.testing.assert_allclose(found["C"].values, exact["C"].values, atol=1e-5)


def test_a_wrong_derivative_is_seen():
    """A coupling of moments and strain that is half too large shows in the comparison, noise as broken symmetry."""

    class Wrong(CapableToy):
        def hessian(self, atoms, blocks=("rr", "rm", "mm"), rows=None):
            found = super().hessian(atoms, blocks, rows)
            found["em"] = 1.5 * found["em"]
            found["ee"][0, 0] += 0.1
            return found

    wrong = Elastic(moments="magnitudes", relax="none").run(iron(), soft_iron(0.09, Wrong, soc=False))
    drop = 2 * 0.09**2 / (2 * SOFT["b"]) / 2.85**3
    excess = 0.1 / 2.85**3
    assert wrong["symmetry_removed"].values / GPA == pytest.approx(2 / 3 * excess, rel=1e-3)
    expected = [abs(excess / 3), abs(excess / 3), abs(excess / 3 - 1.25 * drop)]
    assert wrong["disagreement"].values[:2] / GPA == pytest.approx(expected[:2], rel=1e-3)
    assert wrong["disagreement"].values[2] / GPA == pytest.approx(max(expected[2], 1.25 * drop), rel=1e-3)


def test_saddle_points_are_refused():
    """Ions or moments on top of a hill do not follow anything, and the sentence says which."""
    basis = np.eye(12)[:, [0, 7]]
    for inner, what in ((np.diag([-1.0, 2.0]), "the ions"), (np.diag([1.0, -2.0]), "the moments")):
        with pytest.raises(ConvergenceError, match=f"{what} are not at a minimum"):
            Expansion(np.eye(6), np.ones((6, 2)), inner, basis).followed()
    up_down = with_moments(bulk("Fe", cubic=True, a=2.85), [[0, 0, 2.0], [0, 0, -2.0]])
    model = CapableToy(Springs(K, 2.85 * np.sqrt(3) / 2, 2.7), Landau(0.08, 0.01), Heisenberg(1e-3, 2.6), soc=False)
    with pytest.raises(ConvergenceError, match="moments are not at a minimum"):
        Elastic(moments="full", relax="none").run(up_down, model)


B1, B2 = -0.02, 0.013


@pytest.mark.parametrize("axis", [(0, 0, 1.0), (1.0, 1.0, 0)])
def test_magnetoelastic_constants(axis):
    """B1, B2 and the magnetostriction of the closed form, from ∂²E/∂ε∂n, whichever way the moments point."""
    unit = np.array(axis) / np.linalg.norm(axis)
    atoms = with_moments(bulk("Fe", cubic=True, a=2.85), np.tile(M0 * unit, (2, 1)))
    model = CapableToy(Landau(**SOFT), Magnetoelastic(REFERENCE, *STIFF, B1, B2))
    dataset = Elastic(moments="magnitudes", relax="none").run(atoms, model)
    c11, c12, c44 = STIFF
    for level in ("clamped", "ions", "relaxed"):
        one = dataset.sel(level=level)
        assert float(one["B1"]) == pytest.approx(B1 * MJ_PER_M3, rel=1e-6)
        assert float(one["B2"]) == pytest.approx(B2 * MJ_PER_M3, rel=1e-6)
        assert float(one["lambda100"]) == pytest.approx(-2 / 3 * B1 / (c11 - c12), rel=0.02)
        assert float(one["lambda111"]) == pytest.approx(-1 / 3 * B2 / c44, rel=0.02)
    assert float(dataset["magnetoelastic_disagreement"]) == pytest.approx(0, abs=1e-4)


def pressed(axis=(0, 0, 1.0)):
    """Fcc iron of one atom with a magnetoelastic coupling in its nearest bonds."""
    model = CapableToy(Morse(), PseudoDipolar(2e-5, 3.0, 2.0, NEIGHBOUR))
    return with_moments(bulk("Fe", "fcc", a=3.5), [2.0 * np.array(axis) / np.linalg.norm(axis)]), model


def test_magnetostriction_under_pressure():
    """λ100 and λ111 are those of the crystal that finds its shape under 40 GPa with moments along [001] and [111]."""
    atoms, model = pressed()
    dataset = Elastic(pressure=40.0, finite_strain=False).run(atoms, model)
    state = Atoms("Fe", positions=dataset["positions"].values, cell=dataset["cell"].values, pbc=True)
    calculator = SpinCalculator(model)

    def shape(axis):
        moments = [2.0 * np.array(axis) / np.linalg.norm(axis)]

        def excess(six):
            strain = sum(voigt_strain(v, x) for v, x in enumerate(six))
            return calculator.stress(strained(state, strain), moments) + 40 / GPA * np.array([1.0, 1, 1, 0, 0, 0])

        found = root(excess, np.zeros(6), tol=1e-13)
        assert np.abs(found.fun).max() < 1e-10
        return found.x

    along, across, diagonal = shape((0, 0, 1)), shape((1, 0, 0)), shape((1, 1, 1))
    expected = {"lambda100": 2 / 3 * (along[2] - across[2]), "lambda111": diagonal[3:].mean()}
    for name, value in expected.items():
        assert abs(value) > 1e-6
        assert dataset[name].values == pytest.approx(value, rel=2e-3)
    c = dataset["C_lagrangian"].sel(level="ions").values
    assert c[3, 3] > 1.1 * float(dataset["C"].sel(level="ions")[3, 3])


def test_moments_that_follow_change_the_magnetoelastic_coupling():
    """Anisotropy that depends on |m|, and |m| that depends on volume, make a coupling g g'/(2 b V) (n_z² - 1/3)."""
    g, other = 0.05, 1e-6
    model = CapableToy(Landau(**SOFT), MagnetoVolume(REFERENCE, g, M0, *STIFF), AnisotropicLength(other, M0))
    dataset = Elastic(moments="magnitudes", relax="none", finite_strain=False).run(iron(), model)
    tensor = dataset["magnetoelastic_tensor"].sel(level="relaxed").values / MJ_PER_M3
    unit = 2 * g * other / (2 * SOFT["b"]) / 2.85**3
    for v in range(3):
        np.testing.assert_allclose(tensor[v], unit * np.diag([-1 / 3, -1 / 3, 2 / 3]), rtol=1e-4, atol=1e-4 * unit)
    assert np.abs(tensor[3:]).max() < 1e-6 * unit
    assert np.abs(dataset["magnetoelastic_tensor"].sel(level="ions").values / MJ_PER_M3).max() < 1e-6 * unit


def hexagonal():
    return with_moments(bulk("Fe", "hcp", a=2.6, c=4.2), np.outer([M0, M0], [1.0, 0, 0]))


@pytest.mark.parametrize(
    "atoms", [with_moments(bulk("Fe", "fcc", a=3.5), [M0 / 3**0.5 * np.ones(3)]), hexagonal()], ids=["fcc 111", "hcp x"]
)
def test_magnetoelastic_tensor_is_written_in_the_axes_of_the_constants(atoms):
    """``frame`` takes T back to Cartesian stresses of moments along any direction, whatever that of the state."""
    exchange, dipolar = Heisenberg(2e-3, 3.0, 1.0, 2.6), PseudoDipolar(4e-5, 3.0, 2.0, 2.6)
    toy = CapableToy(Morse(cutoff=6.0), Landau(0.08, 0.01), exchange, dipolar)
    dataset = Elastic(moments="magnitudes", relax="ions", finite_strain=False).run(atoms, toy)
    frame, tensor = dataset["frame"].values, dataset["magnetoelastic_tensor"].sel(level="clamped").values / MJ_PER_M3
    state = atoms.copy()
    state.set_cell(dataset["cell"].values)
    state.positions = dataset["positions"].values
    lengths = np.linalg.norm(dataset["moments"].values, axis=1)
    spins = SpinCalculator(toy)
    stresses, expected = [], []
    for n in np.array([[0, 0, 1.0], [1.0, 0, 0], [0.6, 0.48, 0.64], [0, 0.8, -0.6]]):
        stresses.append(spins.stress(state, np.outer(lengths, n)))
        inside = np.einsum("x,vxy,y->v", frame @ n, tensor, frame @ n)
        expected.append(voigt_rotation(frame.T) @ inside)
    stresses, expected = np.diff(stresses, axis=0), np.diff(expected, axis=0)
    np.testing.assert_allclose(expected, stresses, atol=1e-5 * np.abs(stresses).max())
    assert dataset.attrs["system"] != "cubic"


@pytest.mark.parametrize("soc", [False, True])
def test_a_supercell_has_the_constants_of_its_crystal(soc):
    """Its lattice keeps fewer rotations than the crystal, which is no less cubic for that."""
    near = 3.5 / np.sqrt(2)
    toy = CapableToy(
        Morse(cutoff=5.0), Landau(0.08, 0.01), Heisenberg(1e-3, 3.0, 1.0, near), PseudoDipolar(2e-5, 3.0, 2.0, near)
    ).replace(soc=soc)
    small = with_moments(bulk("Fe", "fcc", a=3.5), [[0, 0, M0]])
    options = {"moments": "magnitudes", "relax": "none", "finite_strain": False}
    one, two = (Elastic(**options).run(x, toy) for x in (small, small.repeat((2, 1, 1))))
    assert two.attrs["system"] == one.attrs["system"]
    assert two.attrs["rotations"] == one.attrs["rotations"]
    np.testing.assert_allclose(two["C_lattice"], one["C_lattice"], atol=1e-6)
    if soc:
        for key in ("B1", "B2", "lambda100", "lambda111"):
            np.testing.assert_allclose(two[key], one[key], rtol=1e-6)


@pytest.mark.parametrize(
    ("cell", "odd"),
    [
        ([[1.5, 0.866, 2.3], [-1.5, 0.866, 2.3], [0, -1.732, 2.3]], (0, 3)),
        ([[3.0, 0, 0], [0.35, 2.6, 0], [0, 0, 3.3]], (0, 5)),
    ],
    ids=["trigonal", "monoclinic"],
)
def test_signs_of_constants_turn_with_the_crystal(cell, odd):
    """C14 of trigonal and C16 of monoclinic crystals have signs that the cell decides, and no Cartesian axis."""
    found = []
    for vector in ([0, 0, 0], [0, 0, np.pi], [0, 0, np.pi / 3], [np.pi, 0, 0], [0.4, 0.9, -0.3], [1.4, -0.9, 2.3]):
        atoms = still(Atoms("Fe", cell=cell @ Rotation.from_rotvec(vector).as_matrix().T, pbc=True))
        dataset = Elastic(relax="none", finite_strain=False).run(atoms, CapableToy(Morse()))
        found.append(dataset["C_lattice"].values[0])
    assert abs(found[0][odd]) > 0.5
    np.testing.assert_allclose(found, np.broadcast_to(found[0], (6, 6, 6)), atol=1e-6)


@pytest.mark.parametrize("moment", [2.0, 2.01])
def test_moments_that_turn_at_no_cost_and_are_moved_by_strain_give_no_constants(moment):
    """The energy of the cubic crystal is the same for all directions, and a shear decides between them."""
    near = 3.5 / np.sqrt(2)
    toy = CapableToy(Morse(), Landau(0.08, 0.01), Heisenberg(1e-3, 3.0, 1.0, near), PseudoDipolar(2e-5, 3.0, 2.0, near))
    atoms = with_moments(bulk("Fe", "fcc", a=3.5), [moment * np.array([1.0, 1.0, 0]) / np.sqrt(2)])
    with pytest.raises(ConvergenceError, match="nothing follows"):
        Elastic(moments="full", relax="none", finite_strain=False).run(atoms, toy)


def test_averages_are_those_of_pymatgen():
    """A triclinic stiffness through an independent implementation; its Young's modulus is by the formula instead."""
    rng = np.random.default_rng(3)
    root = rng.normal(size=(6, 6))
    stiffness = 100 * np.eye(6) + 40 * (root + root.T) / 2 + np.pad(np.full((3, 3), 60.0), (0, 3))
    assert np.linalg.eigvalsh(stiffness)[0] > 5
    theirs = ElasticTensor.from_voigt(stiffness)
    ours = averages(stiffness)
    assert ours.bulk == pytest.approx(float(theirs.k_vrh), rel=1e-9)
    assert ours.shear == pytest.approx(float(theirs.g_vrh), rel=1e-9)
    assert ours.poisson == pytest.approx(float(theirs.homogeneous_poisson), rel=1e-9)
    assert ours.anisotropy == pytest.approx(float(theirs.universal_anisotropy), rel=1e-9)
    assert ours.young == pytest.approx(9 * ours.bulk * ours.shear / (3 * ours.bulk + ours.shear), rel=1e-12)
    assert ours.young == pytest.approx(2 * ours.shear * (1 + ours.poisson), rel=1e-12)


def test_debye_temperature():
    """An isotropic solid, over all directions and from the averages; and pymatgen's number for it."""
    atoms = still(bulk("Fe", "fcc", a=3.6))
    c44 = 80.0
    matrix = cubic_matrix(200.0, 200.0 - 2 * c44, c44)

    class Isotropic(CapableToy):
        def hessian(self, image, blocks=("rr", "rm", "mm"), rows=None):
            found = super().hessian(image, blocks, rows)
            found["ee"] = matrix / GPA * image.get_volume()
            return found

    dataset = Elastic(relax="none", finite_strain=False).run(atoms, Isotropic(Springs(K, NEIGHBOUR, 3.0)))
    one = dataset.sel(level="clamped")
    assert float(one["universal_anisotropy"]) == pytest.approx(0, abs=1e-9)
    assert float(one["debye_temperature"]) == pytest.approx(float(one["debye_temperature_hill"]), rel=1e-9)
    structure = Structure(Lattice(atoms.cell[:]), ["Fe"], [[0, 0, 0]])
    theirs = float(ElasticTensor.from_voigt(matrix).debye_temperature(structure))
    assert float(one["debye_temperature"]) == pytest.approx(theirs, rel=2e-3)
    assert debye_temperature(3000.0, 0.08) == pytest.approx(3000 * 7.638233e-12 * (6 * np.pi**2 * 0.08e30) ** (1 / 3))


def test_unstable_crystals_say_so():
    """Springs between nearest neighbours alone do not hold bcc iron against shear."""
    dataset = Elastic(relax="none", finite_strain=False).run(
        still(bulk("Fe", a=2.8)), CapableToy(Springs(K, 2.8 * np.sqrt(3) / 2 + 0.01, 2.6))
    )
    assert float(dataset["stable"].sel(level="ions")) == 0
    assert np.isnan(float(dataset["debye_temperature"].sel(level="ions")))
    rows = {row.label: row.value for row in Elastic().summary(dataset)}
    assert rows["Born stability"].startswith("unstable: ions and moments clamped")


def test_layers_that_nothing_holds_together():
    """A layer of springs resists no strain out of it: C is what it is, and no average over soft strains is made up."""
    layer = Atoms("Fe", cell=[NEIGHBOUR, NEIGHBOUR, 15.0], pbc=True)
    dataset = Elastic(relax="none", finite_strain=False).run(still(layer), CapableToy(Springs(K, NEIGHBOUR, 3.0)))
    c = dataset["C"].sel(level="ions").values / GPA
    np.testing.assert_allclose(c, np.diag([K / 15.0, K / 15.0, 0, 0, 0, 0]), atol=1e-9)
    for name in ("S", "bulk_modulus_reuss", "bulk_modulus", "young_modulus"):
        assert np.isnan(dataset[name]).all()
    assert float(dataset["bulk_modulus_voigt"].sel(level="ions")) == pytest.approx(2 * K / 15 / 9 * GPA)
    assert not dataset["stable"].values.any()


def test_an_order_that_is_lost_is_told():
    """A short moment turns over when it is relaxed, and the constants are those of another order."""
    crystal = with_moments(bulk("Fe", cubic=True, a=2.85), [2.0, -0.3])
    model = CapableToy(Springs(3.0, 2.4, 2.7), Landau(0.05, 0.005), Heisenberg(2e-3, 2.7, 2.0, 2.4), soc=False)
    dataset = Elastic(moments="magnitudes", relax="none", finite_strain=False).run(crystal, model)
    assert int(dataset["order_kept"]) == 0
    assert {row.label: row.value for row in Elastic().summary(dataset)}["order"].startswith("lost")


def test_conversions_undo_nothing_at_zero_stress():
    """Without stress all constants are one."""
    matrix = cubic_matrix(3.0, 1.0, 0.7)
    np.testing.assert_array_equal(lagrangian(matrix, np.zeros((3, 3))), matrix)
    np.testing.assert_array_equal(birch(matrix, np.zeros((3, 3))), matrix)
    np.testing.assert_array_equal(to_voigt(to_tensor(matrix)), matrix)


def test_committee_spread():
    """Members with known constants: mean and spread of each derived number."""
    springs = np.array([2.0, 3.0, 3.7])
    members = [CapableToy(Springs(k, NEIGHBOUR, 3.0)) for k in springs]
    dataset = Elastic().run(still(bulk("Fe", "fcc", a=A)), CommitteeToy(members))
    modulus = 4 / 3 * springs / A * GPA
    assert float(dataset["bulk_modulus"].sel(level="ions")) == pytest.approx(modulus.mean(), rel=1e-6)
    assert float(dataset["bulk_modulus_std"].sel(level="ions")) == pytest.approx(modulus.std(ddof=1), rel=1e-6)


def test_the_shipped_potential_agrees_with_finite_strain():
    """Slopes of the stress go to the second derivatives with the fourth power of the step, ions and |m| relaxed.

    No shell of neighbours lies within a step of the cut-off, where the envelope is smooth to second order only.
    """
    atoms = with_moments(read_structure(EXAMPLES / "FeAl_strained.cif"), [0.8, 0.0])
    atoms.set_cell(1.015 * atoms.cell[:], scale_atoms=True)
    calculator = MMACECalculator("default", soc=False, moments="magnitudes", committee=False, tolerance=1e-10)
    coarse, fine = (Elastic(relax="ions", strain_step=step).run(atoms, calculator) for step in (2e-3, 1e-3))
    assert np.abs(fine["stress"].values).max() > 1
    assert fine["disagreement"].values == pytest.approx(0, abs=1e-4)
    assert coarse["disagreement"].values / fine["disagreement"].values == pytest.approx(16, rel=0.2)
    assert np.abs(fine["C"].sel(level="clamped") - fine["C"].sel(level="relaxed")).max() > 2


def test_dataset_opens_plainly(tmp_path):
    """Plain xarray reads it, with units and names."""
    dataset = Elastic(relax="none").run(iron(), soft_iron(0.09))
    write_dataset(dataset, tmp_path / "e.nc")
    with xr.open_dataset(tmp_path / "e.nc") as again:
        xr.testing.assert_identical(again.load(), dataset)
        assert all(v.attrs["units"] and v.attrs["long_name"] for v in again.variables.values())


def test_command_line(tmp_path, monkeypatch, capsys):
    """Table, dataset and picture."""
    monkeypatch.chdir(tmp_path)
    arguments = ["elastic", str(EXAMPLES / "Fe.cif"), "--calculator", TOY, "--relax", "none", "--no-finite-strain"]
    assert main([*arguments, "--moments", "Fe=2.2", "--order", "fm", "--plot", "e.png"]) == 0
    out = capsys.readouterr().out
    assert "C11, ions and moments relaxed" in out
    assert "Born stability" in out
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


def test_refusals():
    """Options and states that make no sense, each with its sentence."""
    for options, sentence in (
        ({"relax": "ion"}, "did you mean 'ions'"),
        ({"strain_step": 0.5}, "strain_step cannot be 0.5"),
        ({"relax": "none", "pressure": 3.0}, "a pressure needs a cell that is relaxed"),
        ({"finite_strain": False, "strain_step": 1e-3}, "strain_step does nothing"),
    ):
        with pytest.raises(OptionError, match=sentence):
            Elastic(**options)
    atoms = bulk("Fe", "fcc", a=A, cubic=True)
    atoms.positions[0, 0] += 0.1
    with pytest.raises(ConvergenceError, match="the ions are not at rest; use relax ions"):
        Elastic(relax="none").run(still(atoms), CapableToy(Springs(K, NEIGHBOUR, 3.0)))


@pytest.mark.parametrize("mode", ["magnitudes", "full"])
def test_magnetostriction_where_moments_may_turn(mode):
    """Moments that turn with a shear make it softer, by B2²/2k, but λ is the strain at directions that are held."""
    stiffness = 2e-3
    model = CapableToy(Landau(**SOFT), Magnetoelastic(REFERENCE, *STIFF, B1, B2), Cubic(stiffness * 2.85**3 / 2))
    dataset = Elastic(moments=mode, relax="none", finite_strain=False).run(iron(), model)
    one = dataset.sel(level="relaxed")
    c11, c12, c44 = STIFF
    if mode == "full":
        assert float(one["C"].sel(strain="yz", strain_2="yz")) < 0.97 * c44 * GPA
    assert float(one["lambda100"]) == pytest.approx(-2 / 3 * B1 / (c11 - c12), rel=0.02)
    assert float(one["lambda111"]) == pytest.approx(-1 / 3 * B2 / c44, rel=0.02)


def test_no_magnetostriction_of_a_lattice_that_is_not_stable():
    """C44 < 0: B2 is what it is, and no strain answers a constant load."""
    model = CapableToy(Magnetoelastic(REFERENCE, 1.5, 0.9, -0.3, B1, B2), Cubic(1e-4))
    dataset = Elastic(relax="none", finite_strain=False).run(iron(), model)
    assert float(dataset["B2"].isel(level=-1)) == pytest.approx(B2 * MJ_PER_M3, rel=1e-3)
    assert np.isnan(dataset["lambda111"].values).all()
    assert not [row.label for row in Elastic().summary(dataset) if "magnetostriction" in row.label]
