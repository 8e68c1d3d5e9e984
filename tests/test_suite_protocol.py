"""The protocol: fallbacks against exact derivatives, relaxation, spirals, committees, refusals."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from mmace_props.errors import CalculatorError, ConvergenceError, MomentError, OptionError
from mmace_props.protocol import (
    SpinCalculator,
    minimise,
    moments_of,
    spiral_supercell,
    strained,
    vectors,
    voigt_strain,
    with_moments,
)

from .toys import CapableToy, CommitteeToy, Heisenberg, Landau, PseudoDipolar, Springs, Toy, Uniaxial

TERMS = (
    Landau(0.05, 0.005),
    Heisenberg(2e-3, 3.3, 1.0),
    PseudoDipolar(3e-4, 3.3),
    Uniaxial(4e-4, -5e-5),
    Springs(3.0, 2.5, 3.3),
)
BLOCKS = ("rr", "rm", "mm", "ee", "er", "em")


class EnergyToy(Toy):
    """A toy that gives energies alone, of many spin configurations at once."""

    implemented_properties = ("energy",)

    @property
    def soc(self):
        return self.options.soc

    def evaluate_spins(self, atoms, moments):
        return {"energy": self.evaluate(atoms, moments)[0].sum(1).detach().numpy()}


@pytest.fixture
def atoms():
    crystal = bulk("Fe", cubic=True, a=2.83)
    crystal.rattle(0.05, seed=1)
    return with_moments(crystal, np.random.default_rng(0).normal(scale=1.5, size=(2, 3)))


def test_first_derivatives_from_energies(atoms):
    """Forces, stress and magnetic forces of a calculator that gives the energy alone."""
    exact, bare = SpinCalculator(CapableToy(*TERMS)), SpinCalculator(Toy(*TERMS, gives=("energy",)))
    m = moments_of(atoms)
    for name in ("forces", "stress", "magnetic_forces"):
        wanted = getattr(exact, name)(atoms, m)
        np.testing.assert_allclose(getattr(bare, name)(atoms, m), wanted, rtol=1e-7, atol=1e-9 * np.abs(wanted).max())


def test_spin_batches_without_forces(atoms):
    """A calculator whose batches hold energies alone: differences of them, or its own forces one by one."""
    batch = np.random.default_rng(1).normal(size=(3, 2, 3))
    wanted = SpinCalculator(CapableToy(*TERMS)).evaluate_spins(atoms, batch)["magnetic_forces"]
    spin = SpinCalculator(EnergyToy(*TERMS))
    assert spin.differs_twice
    assert not spin.has("magnetic_forces")
    np.testing.assert_allclose(spin.evaluate_spins(atoms, batch)["magnetic_forces"], wanted, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(spin.magnetic_forces(atoms, batch[0]), wanted[0], rtol=1e-7, atol=1e-10)
    bare = SpinCalculator(Toy(*TERMS, gives=("energy",)))
    np.testing.assert_allclose(bare.evaluate_spins(atoms, batch)["magnetic_forces"], wanted, rtol=1e-7, atol=1e-10)


def test_hessian_from_gradients(atoms):
    """Every block by central differences against automatic differentiation."""
    exact = SpinCalculator(CapableToy(*TERMS)).hessian(atoms, BLOCKS)
    bare = SpinCalculator(Toy(*TERMS)).hessian(atoms, BLOCKS)
    for block in BLOCKS:
        scale = np.abs(exact[block]).max()
        np.testing.assert_allclose(bare[block], exact[block], rtol=1e-6, atol=1e-7 * scale, err_msg=block)


def test_hessian_rows_of_some_atoms(atoms):
    """The rows asked for, in their order, of calculators that know rows and of those that do not."""
    for toy in (CapableToy, Toy):
        spin = SpinCalculator(toy(*TERMS))
        whole, some = spin.hessian(atoms), spin.hessian(atoms, rows=[1, 0])
        for block in ("rr", "rm", "mm"):
            np.testing.assert_allclose(some[block], whole[block][[1, 0]], rtol=1e-6, atol=1e-7)
        assert spin.hessian(atoms, ("rm",), rows=[1])["rm"].shape == (1, 3, 2, 3)


def test_spin_batches_by_loop(atoms):
    """Batches with and without the fast path agree, site energies too."""
    batch = np.random.default_rng(1).normal(size=(5, 2, 3))
    fast, slow = (SpinCalculator(t).evaluate_spins(atoms, batch) for t in (CapableToy(*TERMS), Toy(*TERMS)))
    for key in ("energy", "energies", "magnetic_forces"):
        np.testing.assert_allclose(slow[key], fast[key], rtol=1e-12, atol=1e-14)
    with pytest.raises(MomentError, match=r"\(B, 2, 3\)"):
        SpinCalculator(Toy(*TERMS)).evaluate_spins(atoms, batch[:, :1])


@pytest.mark.parametrize("toy", [CapableToy, Toy])
def test_moments_relax_to_the_stationary_point(atoms, toy):
    """Magnitudes keep their directions; in full nothing is left of the magnetic force; zero stays zero."""
    spin = SpinCalculator(toy(*TERMS[:2]))
    lone = with_moments(Atoms("Fe", cell=[3, 3, 4], pbc=True), [[0.9, -0.4, 0.8]])
    pulled = SpinCalculator(toy(TERMS[0], TERMS[3])).relax_moments([lone], "full")[0]
    np.testing.assert_allclose(pulled, [[0, 0, np.sqrt(5.0)]], atol=1e-6)
    start = moments_of(atoms)
    lengths = spin.relax_moments([atoms], "magnitudes")[0]
    np.testing.assert_allclose(np.cross(start, lengths), 0, atol=1e-12)
    unit = start / np.linalg.norm(start, axis=1)[:, None]
    assert np.abs((spin.magnetic_forces(atoms, lengths) * unit).sum(axis=1)).max() < 1e-7
    half = with_moments(atoms, [[0, 0, 2.0], [0, 0, 0]])
    np.testing.assert_array_equal(spin.relax_moments([half], "magnitudes")[0][1], 0)
    np.testing.assert_array_equal(spin.relax_moments([atoms], "fixed")[0], start)
    with pytest.raises(OptionError, match="did you mean 'magnitudes'"):
        spin.relax_moments([atoms], "magnitude")


def test_lone_moment_has_its_closed_form():
    """The Landau moment relaxes to sqrt(a / 2b) from above and below."""
    atoms = Atoms("Fe", cell=[3, 3, 3], pbc=True)
    for start in (0.6, 3.5):
        found = SpinCalculator(Toy(Landau(0.05, 0.005))).relax_moments(
            [with_moments(atoms, [[0, start, 0]])], "magnitudes"
        )
        np.testing.assert_allclose(found[0], [[0, np.sqrt(5.0), 0]], rtol=1e-7)


def test_relaxation_without_minimum_says_so():
    """A moment that grows without bound is an error with the residual in it."""
    atoms = with_moments(Atoms("Fe", cell=[3, 3, 3], pbc=True), [[0, 0, 1.0]])
    with pytest.raises(ConvergenceError, match=r"the largest residual is \d\.\de"):
        SpinCalculator(Toy(Landau(0.05, -0.005))).relax_moments([atoms], "magnitudes")


def test_minimise_leaves_saddles_and_uses_few_steps():
    """Newton steps on the Rosenbrock valley; a start with negative curvature goes down."""
    calls = []

    def energy(x):
        return float((1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2)

    def gradient(x):
        calls.append(1)
        return np.array([-2 * (1 - x[0]) - 400 * x[0] * (x[1] - x[0] ** 2), 200 * (x[1] - x[0] ** 2)])

    def hessian(x):
        return np.array([[2 - 400 * (x[1] - 3 * x[0] ** 2), -400 * x[0]], [-400 * x[0], 200.0]])

    found = minimise(
        energy, gradient, hessian, np.array([-1.2, 1.0]), tolerance=1e-9, max_step=1.0, what="x", unit="eV"
    )
    np.testing.assert_allclose(found, [1, 1], atol=1e-9)
    assert len(calls) < 60


def test_spirals_by_supercell():
    """The supercell route against the closed form of a spiral on a simple cubic Heisenberg lattice."""
    exchange, m = 2e-3, 1.7
    atoms = with_moments(Atoms("Fe", cell=[2.5, 2.5, 2.5], pbc=True), [[m, 0, 0]])
    spin = SpinCalculator(Toy(Heisenberg(exchange, 2.6)))
    waves = np.array([[0, 0, 0], [0, 0, 0.25], [0.5, 0, 0.2], [1 / 3, 1 / 3, 0]])
    found = spin.evaluate_spirals(atoms, waves, [0, 0, 1])
    expected = -2 * exchange * m**2 * np.cos(2 * np.pi * waves).sum(axis=1)
    np.testing.assert_allclose(found["energy"], expected, rtol=1e-10, atol=1e-14)
    cone = with_moments(atoms, [[m * np.sin(0.4), 0, m * np.cos(0.4)]])
    energy = spin.evaluate_spirals(cone, waves[1:2], [0, 0, 1])["energy"][0]
    turns = 2 + np.cos(0.4) ** 2
    assert energy == pytest.approx(-2 * exchange * m**2 * turns, rel=1e-10)
    with pytest.raises(CalculatorError, match="fits no supercell"):
        spin.evaluate_spirals(atoms, [[0.12345678, 0, 0]], [0, 0, 1])


def test_spiral_supercell_turns_by_the_lattice_vector():
    """Both atoms of a cell turn by the same angle from cell to cell."""
    atoms = with_moments(bulk("Fe", cubic=True, a=2.8), [[1.0, 0, 0], [0, 2.0, 0]])
    cell, count = spiral_supercell(atoms, [0.25, 0.25, 0.5], [0, 0, 1])
    assert count == 4
    cell, count = spiral_supercell(atoms, [0, 0, 0.25], [0, 0, 1])
    assert count == 4
    moments = moments_of(cell).reshape(4, 2, 3)
    np.testing.assert_allclose(moments[1], [[0, 1, 0], [-2, 0, 0]], atol=1e-12)
    assert cell.cell[2, 2] == pytest.approx(4 * 2.8)


def test_relaxing_calculators_are_asked_at_fixed_moments(atoms):
    """The adapter keeps the mode and evaluates where it is told."""
    toy = CapableToy(*TERMS, moments="magnitudes")
    spin = SpinCalculator(toy)
    assert spin.mode == "magnitudes"
    assert spin.calculator.moments == "fixed"
    assert spin.replace(soc=False).mode == "magnitudes"
    assert spin.replace(soc=False).soc is False
    bare = Toy(*TERMS)
    bare.moments = "full"
    with pytest.raises(CalculatorError, match="relaxes moments"):
        SpinCalculator(bare)
    with pytest.raises(CalculatorError, match="make one with soc=False"):
        SpinCalculator(Toy(*TERMS)).replace(soc=False)


def test_members():
    """A committee of one is no committee."""
    toys = [CapableToy(*TERMS), CapableToy(*TERMS[:3])]
    assert len(SpinCalculator(CommitteeToy(toys)).members) == 2
    assert len(SpinCalculator(CommitteeToy(toys[:1])).members) == 1
    assert len(SpinCalculator(toys[0]).members) == 1


def test_what_a_calculator_lacks_is_named(atoms):
    """A calculator's own refusal keeps its sentence; a missing property is named."""
    unknown = with_moments(Atoms("Xe", cell=[5, 5, 5], pbc=True), [[0, 0, 1.0]])
    with pytest.raises(CalculatorError, match="does not know Xe"):
        SpinCalculator(Toy(*TERMS)).energy(unknown, moments_of(unknown))
    with pytest.raises(CalculatorError, match="does not give energy"):
        SpinCalculator(Toy(*TERMS, gives=("forces",))).energy(atoms, moments_of(atoms))
    with pytest.raises(OptionError, match="no Hessian block 'xy'"):
        SpinCalculator(Toy(*TERMS)).hessian(atoms, ("xy",))


def test_a_plain_ase_calculator_fits():
    """Any ASE calculator has the protocol, with moments that do nothing where it knows none."""
    spin = SpinCalculator(EMT())
    atoms = with_moments(bulk("Cu", cubic=True), np.zeros((4, 3)))
    assert spin.soc is None
    assert spin.default_moments is None
    assert np.abs(spin.magnetic_forces(atoms, moments_of(atoms))).max() < 1e-12
    assert spin.provenance() == {"calculator": "EMT"}


def test_copies_leave_the_structure_alone(atoms):
    """Constraints do not bind the copies, and the caller's structure is never changed."""
    atoms.set_constraint(FixAtoms([0, 1]))
    before = (atoms.positions.copy(), atoms.cell[:].copy(), moments_of(atoms).copy())
    bigger = strained(atoms, voigt_strain(0, 0.01))
    assert bigger.cell[0, 0] == pytest.approx(1.01 * atoms.cell[0, 0])
    np.testing.assert_allclose(bigger.positions[:, 0], 1.01 * atoms.positions[:, 0])
    SpinCalculator(Toy(*TERMS)).hessian(atoms, ("rm", "er"))
    for old, new in zip(before, (atoms.positions, atoms.cell[:], moments_of(atoms)), strict=True):
        np.testing.assert_array_equal(old, new)
    scalar = bulk("Fe")
    np.testing.assert_array_equal(moments_of(with_moments(scalar, [[1.0, 0, 0]])), [[1, 0, 0]])


def test_moments_are_checked():
    """Shapes and numbers."""
    np.testing.assert_array_equal(vectors([1.0, -1.0], 2), [[0, 0, 1], [0, 0, -1]])
    with pytest.raises(MomentError, match=r"shape \(3,\)"):
        vectors([1, 2, 3], 2)
    with pytest.raises(MomentError, match="atom 1 is not a finite number"):
        vectors([1, np.nan], 2)
    with pytest.raises(MomentError, match="carries no magnetic moments"):
        moments_of(Atoms("Fe"))
