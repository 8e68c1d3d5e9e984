"""Operations of a crystal with its moments: how many there are, and what averaging over them keeps."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from mmace_props.protocol import with_moments
from mmace_props.symmetry import lattice_frame, site_symmetry
from scipy.spatial.transform import Rotation

from .toys import CapableToy, Heisenberg, PseudoDipolar, Springs


def iron(signs, axis=(0, 0, 1.0)):
    return with_moments(bulk("Fe", cubic=True, a=2.85), np.outer(signs, axis) * 2.0)


def test_orders_of_the_groups():
    """bcc iron: 96 operations of the free pattern; tied to the lattice, 32 along [001] and 24 along [111]."""
    ferro = np.array([1.0, 1.0])
    for axis, soc, count, system in (
        ((0, 0, 1), False, 96, "cubic"),
        ((1, 2, 3), False, 96, "cubic"),
        ((0, 0, 1), True, 32, "tetragonal"),
        ((1, 1, 1), True, 24, "trigonal"),
    ):
        unit = np.array(axis) / np.linalg.norm(axis)
        atoms = iron(ferro, unit)
        group = site_symmetry(atoms, atoms.get_initial_magnetic_moments(), soc, 1e-3, 1e-2)
        assert len(group.rotations) == count
        assert lattice_frame(atoms, group.rotations, 1e-3)[0] == system
    anti = iron(np.array([1.0, -1.0]))
    assert len(site_symmetry(anti, anti.get_initial_magnetic_moments(), False, 1e-3, 1e-2).rotations) == 96


@pytest.mark.parametrize("soc", [False, True])
def test_forces_and_stress_of_an_equivariant_model_are_left_alone(soc):
    """What the symmetry allows survives, what it forbids goes, in a cell that is turned and has two kinds of atoms."""
    turn = Rotation.from_rotvec([0.3, -0.8, 0.5]).as_matrix()
    cell = np.diag([3.0, 3.0, 3.6]) @ turn.T
    atoms = Atoms("FeAlFe", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.31], [0, 0, 0.53]], cell=cell, pbc=True)
    moments = np.outer([2.0, 0.0, 1.4], turn @ np.array([0, 0, 1.0]))
    atoms = with_moments(atoms, moments)
    calculator = CapableToy(Springs(2.0, 2.3, 3.7), Heisenberg(0.01, 3.7, 1.0), PseudoDipolar(0.01, 3.7), soc=soc)
    group = site_symmetry(atoms, moments, soc, 1e-4, 1e-3)
    assert len(group.rotations) == 8
    calculator.calculate(atoms)
    forces, stress = calculator.results["forces"], calculator.results["stress"]
    tensor = stress[[[0, 5, 4], [5, 1, 3], [4, 3, 2]]]
    assert np.abs(forces).max() > 0.1
    np.testing.assert_allclose(group.vectors(forces), forces, atol=1e-12)
    np.testing.assert_allclose(group.tensor(tensor), tensor, atol=1e-13)
    noise = np.random.default_rng(0).normal(size=(3, 3))
    across = group.vectors(noise) @ turn
    assert np.abs(across[:, :2]).max() < 1e-12
    assert np.abs(group.tensor(noise + noise.T) - np.trace(noise) * 2 / 3 * np.eye(3)).max() > 0.1


def test_a_noisy_crystal_becomes_symmetric():
    """Cell and positions within the tolerance of a hexagonal crystal are made exact, and are left so."""
    exact = bulk("Co", "hcp", a=2.5, c=4.1)
    rng = np.random.default_rng(1)
    noisy = exact.copy()
    noisy.set_cell(exact.cell[:] @ (np.eye(3) + 1e-4 * rng.normal(size=(3, 3))), scale_atoms=True)
    noisy.positions += 1e-4 * rng.normal(size=(2, 3))
    moments = np.tile([0, 0, 1.6], (2, 1))
    group = site_symmetry(noisy, moments, False, 5e-3, 1e-2)
    assert len(group.rotations) == 24
    again = group.structure(noisy)
    assert np.abs(again.cell[:] - noisy.cell[:]).max() < 2e-3
    lengths = again.cell.lengths()
    assert abs(lengths[0] - lengths[1]) < 1e-12
    assert again.cell.angles() == pytest.approx([90, 90, 120], abs=1e-9)
    twice = group.structure(again)
    np.testing.assert_allclose(twice.positions, again.positions, atol=1e-12)
    np.testing.assert_allclose(twice.cell[:], again.cell[:], atol=1e-12)
    assert len(site_symmetry(again, moments, False, 1e-9, 1e-9).rotations) == 24
