"""A spiral in the primitive cell equals its commensurate supercell."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from scipy.spatial.transform import Rotation

from mmace.calculator import MMACECalculator
from mmace.errors import MMACEError, MomentError

from .potentials import pair, random_model, triclinic

AXIS = np.array([0.3, -0.5, 0.8]) / np.linalg.norm([0.3, -0.5, 0.8])


def turned_supercell(atoms, q, repeats):  # type: ignore[no-untyped-def]
    """Supercell in which the moments of cell S are turned by 2π q·S about AXIS."""
    cell_of_atom = np.repeat(
        [[a, b, c] for a in range(repeats[0]) for b in range(repeats[1]) for c in range(repeats[2])], len(atoms), axis=0
    )
    supercell = atoms.repeat(repeats)
    turns = Rotation.from_rotvec(2 * np.pi * (cell_of_atom @ np.asarray(q))[:, None] * AXIS)
    supercell.set_initial_magnetic_moments(turns.apply(supercell.get_initial_magnetic_moments()))
    return supercell


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("q", "repeats"),
    [
        ((1 / 4, 0, 0), (4, 1, 1)),
        ((0, 1 / 3, 0), (1, 3, 1)),
        ((1 / 2, 0, 1 / 3), (2, 1, 3)),
        ((0, 0, -2 / 3), (1, 1, 3)),
    ],
)
def test_spiral_equals_supercell(layers: int, q: tuple[float, ...], repeats: tuple[int, ...]) -> None:
    calculator = MMACECalculator(random_model(num_layers=layers), soc=False)
    atoms = triclinic()
    primitive = calculator.evaluate_spirals(atoms, [q], AXIS)
    supercell = turned_supercell(atoms, q, repeats)
    whole = calculator.evaluate_spins(supercell, supercell.get_initial_magnetic_moments()[None])
    n_cells = int(np.prod(repeats))
    assert abs(primitive["energy"][0] - whole["energy"][0] / n_cells) < 1e-10
    # The home cell comes first in the supercell; its magnetic forces need no turning.
    np.testing.assert_allclose(primitive["magnetic_forces"][0], whole["magnetic_forces"][0, :3], atol=1e-10)
    ferro = calculator.evaluate_spins(atoms, atoms.get_initial_magnetic_moments()[None])["energy"][0]
    assert abs(primitive["energy"][0] - ferro) > 1e-4


def test_many_wave_vectors_and_their_limits() -> None:
    calculator = MMACECalculator(random_model(), soc=False)
    atoms = pair()
    q = np.concatenate([[[0, 0, 0], [1, -2, 3]], np.random.default_rng(0).uniform(-1, 1, (40, 3))])
    found = calculator.evaluate_spirals(atoms, q, AXIS)
    collinear = calculator.evaluate_spins(atoms, atoms.get_initial_magnetic_moments()[None])["energy"][0]
    np.testing.assert_allclose(found["energy"][:2], collinear, atol=1e-12)
    backwards = calculator.evaluate_spirals(atoms, -q, -AXIS)
    np.testing.assert_allclose(found["energy"], backwards["energy"], atol=1e-12)
    one = calculator.evaluate_spirals(atoms, q[41:], 5 * AXIS)
    np.testing.assert_allclose(found["energy"][41], one["energy"][0], atol=1e-12)


def test_spirals_refuse_what_they_cannot_do() -> None:
    calculator = MMACECalculator(random_model())
    with pytest.raises(MMACEError, match="soc=False"):
        calculator.evaluate_spirals(pair(), [[0, 0, 0.1]])
    calculator = calculator.replace(soc=False)
    with pytest.raises(MMACEError, match="axis"):
        calculator.evaluate_spirals(pair(), [[0, 0, 0.1]], axis=(0, 0, 0))
    with pytest.raises(MomentError, match="2 wave vectors"):
        calculator.evaluate_spirals(pair(), np.zeros((2, 3)), moments=np.zeros((3, 2, 3)))


def test_a_spiral_of_a_single_atom_has_its_energy() -> None:
    atom = Atoms("Fe", positions=[[0.0, 0.0, 0.0]])
    atom.set_initial_magnetic_moments([[1.0, 0.0, 0.0]])
    calculator = MMACECalculator(model=random_model(), soc=False)
    found = calculator.evaluate_spirals(atom, [(0.25, 0.0, 0.0)], AXIS)
    alone = calculator.evaluate_spins(atom, atom.get_initial_magnetic_moments()[None])
    assert found["energy"][0] == pytest.approx(alone["energy"][0])
