"""Band energies with spin-orbit coupling for many directions, against GPAW's own."""

from __future__ import annotations

import inspect
import os
import subprocess

import numpy as np
import pytest

from mmace.labels import gpaw_soc
from mmace.labels.gpaw_soc import turned_spin_matrices


@pytest.mark.parametrize("direction", [(0, 0, 1), (1, 0, 0), (0.3, -0.5, 0.8), (-0.2, 0.1, -3.0)])
def test_spin_matrices_point_along_the_direction(direction: tuple[float, ...]) -> None:
    unit = np.array(direction) / np.linalg.norm(direction)
    turned = turned_spin_matrices(np.array(direction))
    np.testing.assert_allclose(np.einsum("v,vst->st", unit, turned), np.diag([1, -1]), atol=1e-14)
    for a in range(3):
        b, c = (a + 1) % 3, (a + 2) % 3
        np.testing.assert_allclose(turned[a] @ turned[b], 1j * turned[c], atol=1e-14)


COMPARISON = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from ase import Atoms
from gpaw import GPAW, PW, FermiDirac
from gpaw.spinorbit import soc_eigenstates
from gpaw_soc import DirectionEnergies
atoms = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[[2.83, 0, 0], [0.05, 2.9, 0], [0, 0, 3]],
              pbc=True, magmoms=[1, 0])
settings = {"mode": PW(250), "xc": "PBE"}
atoms.calc = GPAW(**settings, kpts={"size": (4, 4, 3), "gamma": True}, occupations=FermiDirac(0.1), txt=None)
atoms.get_potential_energy()
ours = DirectionEnergies(atoms.calc)
for n, scale in (((0, 0, 1), 0), ((0, 0, 1), 1), ((0.3, -0.5, 0.8), 1), ((-0.3, -0.7, -0.1), 1)):
    x, y, z = np.array(n) / np.linalg.norm(n)
    angles = {"theta": np.degrees(np.arccos(z)), "phi": np.degrees(np.arctan2(y, x))}
    theirs = soc_eigenstates(atoms.calc, scale=scale, **angles).calculate_band_energy()
    assert abs(ours(np.array(n), scale) - theirs) < 1e-10, (n, scale)
"""


@pytest.mark.skipif("MMACE_GPAW_PYTHON" not in os.environ, reason="needs GPAW, named by MMACE_GPAW_PYTHON")
def test_energies_are_those_of_gpaw() -> None:
    folder = os.path.dirname(inspect.getfile(gpaw_soc))
    done = subprocess.run(
        [os.environ["MMACE_GPAW_PYTHON"], "-c", COMPARISON, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
