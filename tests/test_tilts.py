"""Tilts of two sublattices against their parallel state, from labels of a Heisenberg model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from benchmarks.tilts_against_labels import angle_between, tilts
from mmace.data import read_labels

J1 = 0.021  # eV
MOMENT = 2.2


def frame(angle, name, a=2.83, moment=MOMENT):
    """Two sublattices at an angle in degrees; each atom has eight neighbours on the other one."""
    atoms = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[a, a, a], pbc=True)
    half = np.radians(angle) / 2
    atoms.set_initial_magnetic_moments(
        moment * np.array([[np.sin(half), 0, np.cos(half)], [-np.sin(half), 0, np.cos(half)]])
    )
    energy = -100.0 - 2 * 8 * J1 * np.cos(np.radians(angle))
    atoms.calc = SinglePointCalculator(atoms, energy=energy)
    atoms.info.update({"soc": 0, "parent": "p", "name": name})
    return atoms


@pytest.fixture
def labels(tmp_path):
    frames = [frame(0, "parallel"), frame(180, "opposed"), frame(40, "tilted")]
    frames += [frame(40, "wider", a=2.86), frame(40, "longer", moment=2.4)]
    write(tmp_path / "labels.extxyz", frames)
    return {label.name: label for label in read_labels(tmp_path / "labels.extxyz")}


def test_energy_over_one_minus_cosine_is_eight_times_the_exchange(labels):
    found = tilts([labels["tilted"], labels["opposed"]], [labels["parallel"], labels["opposed"]])
    assert [tilt.label.name for tilt in found] == ["tilted", "opposed"]
    assert [tilt.parallel.name for tilt in found] == ["parallel", "parallel"]
    assert [tilt.angle for tilt in found] == pytest.approx([40, 180])
    assert [tilt.energy / tilt.stiffness_factor for tilt in found] == pytest.approx([8e3 * J1] * 2)


@pytest.mark.parametrize("other", ["parallel", "wider", "longer"])
def test_states_of_other_cells_or_moments_are_no_pair(labels, other):
    assert not tilts([labels[other]], [labels["parallel"]])


def test_unequal_moments_and_larger_cells_are_left_out(labels):
    uneven = replace(labels["tilted"], moments=labels["tilted"].moments * np.array([[1.0], [0.7]]))
    larger = replace(
        labels["tilted"],
        symbols=("Fe", "Fe", "Al"),
        positions=np.vstack([labels["tilted"].positions, [[1.4, 0, 0]]]),
        moments=np.vstack([labels["tilted"].moments, np.zeros(3)]),
    )
    assert not tilts([uneven, larger], [labels["parallel"]])


def test_angles_have_their_whole_precision_at_both_ends():
    for angle in (1e-6, 1.0, 90.0, 179.0, 180.0 - 1e-6):
        radians = np.radians(angle)
        assert angle_between(np.array([[2, 0, 0], [np.cos(radians), np.sin(radians), 0]])) == pytest.approx(
            angle, rel=1e-9
        )
