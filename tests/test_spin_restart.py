"""Spin properties that were killed and begun again: nothing that was finished is computed twice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from matscipy.neighbours import neighbour_list
from mmace_props.base import load_property
from mmace_props.journal import Journal
from mmace_props.protocol import SpinCalculator, with_moments
from mmace_props.sampling import Walkers
from mmace_props.supercell import Supercell

ROOT = Path(__file__).parent.parent
J, K = 3e-3, 2e-4
OPTIONS = {
    "exchange": {"states": 4, "points": 5, "mesh": 4, "radius": 2.6},
    "magnon": {"points": 5, "mesh": 2, "radius": 2.6},
    "spiral": {"points": 300, "mesh": 8},
    "curie": {"ways": ("directions",), "temperatures": (200.0,), "trajectories": 30, "steps": 1, "radius": 2.6},
}


class MarkedChain(Calculator):
    """``-Σ J m_i·m_j - Σ K m_z²`` without torch; every call leaves a line in a file.

    A call that begins when `fatal`, a folder and a number, holds so many finished parts kills the process.
    """

    implemented_properties = ("energy", "magnetic_forces")
    log, fatal = None, None

    def __init__(self, soc=False, log=None, fatal=None):
        super().__init__()
        self.soc, self.log, self.fatal = soc, log, fatal

    def provenance(self):
        return {"name": "chain", "hash": "0"}

    def marked(self, what):
        if self.fatal is not None and len(finished(self.fatal[0])) >= self.fatal[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.log is not None:
            with Path(self.log).open("a") as log:
                log.write(f"{what}\n")

    def couplings(self, atoms):
        i, j, shift = neighbour_list("ijS", positions=atoms.positions, cell=atoms.cell[:], pbc=[True] * 3, cutoff=2.5)
        return i, j, shift

    def matrix(self, atoms):
        i, j, _ = self.couplings(atoms)
        matrix = np.zeros((len(atoms), len(atoms)))
        np.add.at(matrix, (i, j), J)
        return matrix

    def evaluated(self, atoms, moments):
        field = 2 * np.einsum("ij,bjx->bix", self.matrix(atoms), moments)
        energy = -0.5 * np.einsum("bix,bix->b", field, moments)
        if self.soc:
            energy -= K * (moments[..., 2] ** 2).sum(axis=1)
            field[..., 2] += 2 * K * moments[..., 2]
        return {"energy": energy, "magnetic_forces": field}

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        found = self.evaluated(atoms, atoms.get_initial_magnetic_moments()[None])
        self.results = {"energy": float(found["energy"][0]), "magnetic_forces": found["magnetic_forces"][0]}

    def evaluate_spins(self, atoms, moments, magnetic_forces=True):
        self.marked(f"spins {len(moments)}")
        return self.evaluated(atoms, moments)

    def hessian(self, atoms, blocks=("mm",), rows=None):
        self.marked("hessian")
        matrix = -2 * np.einsum("ij,xy->ixjy", self.matrix(atoms), np.eye(3))
        if self.soc:
            for i in range(len(atoms)):
                matrix[i, 2, i, 2] -= 2 * K
        return {"mm": matrix[list(range(len(atoms)) if rows is None else rows)]}

    def evaluate_spirals(self, atoms, q, axis, moments=None):
        self.marked(f"spirals {len(q)}")
        i, j, shift = self.couplings(atoms)
        phases = 2 * np.pi * np.asarray(q) @ shift.T
        along = (moments @ axis)[..., None] * axis
        across = np.cross(axis, moments)
        there = (
            along[:, j] + np.cos(phases)[..., None] * (moments - along)[:, j] + np.sin(phases)[..., None] * across[:, j]
        )
        field = np.zeros_like(moments)
        for k, home in enumerate(i):
            field[:, home] += 2 * J * there[:, k]
        return {"energy": -0.5 * np.einsum("qix,qix->q", field, moments), "magnetic_forces": field}


def compute(name, calculator, folder=None):
    atoms = with_moments(Atoms("Fe", cell=[2.4] * 3, pbc=True), [[0, 0, 2.0]])
    journal = None if folder is None else Journal(folder, 0.0)
    return load_property(name)(**OPTIONS[name]).run(atoms, SpinCalculator(calculator), journal=journal)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def finished(folder):
    """Names and times of the parts that are complete."""
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.npz") if not p.name.startswith(".")}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_killed_run_goes_on(name, tmp_path):
    """What the killed run finished is left alone by the second, which makes the other calls of a whole one, no more."""
    parts, soc = tmp_path / "parts", name in ("exchange", "magnon")
    script = (
        "from tests.test_spin_restart import MarkedChain, compute; import sys;"
        "from pathlib import Path; parts = Path(sys.argv[4]);"
        "compute(sys.argv[1], MarkedChain(sys.argv[2] == 'True', sys.argv[3], (parts, int(sys.argv[5]))), parts)"
    )
    whole = compute(name, MarkedChain(soc, tmp_path / "whole.log"), tmp_path / "whole")
    needed = finished(tmp_path / "whole")
    enough = 6 if name == "curie" else 2
    command = [sys.executable, "-c", script, name, str(soc), str(tmp_path / "first.log"), str(parts), str(enough)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    broken = subprocess.run(command, env=environment, cwd=tmp_path)
    assert broken.returncode == -signal.SIGKILL
    kept = finished(parts)
    assert enough <= len(kept) < len(needed)

    again = compute(name, MarkedChain(soc, tmp_path / "again.log"), parts)
    xr.testing.assert_identical(again.drop_attrs(), whole.drop_attrs())
    assert kept.items() <= finished(parts).items()
    assert finished(parts).keys() == needed.keys()
    assert 0 < len(lines(tmp_path / "again.log")) < len(lines(tmp_path / "whole.log"))
    last = compute(name, MarkedChain(soc, tmp_path / "last.log"), parts)
    xr.testing.assert_identical(last.drop_attrs(), whole.drop_attrs())
    assert lines(tmp_path / "last.log") == []


def test_a_walk_is_kept_in_blocks(tmp_path):
    """Taken up after some of its blocks, a walk goes on as if it had never stopped, bit by bit."""
    atoms = with_moments(Atoms("Fe", cell=[2.4] * 3, pbc=True), [[0, 0, 2.0]])
    box = Supercell(atoms, np.array([0]), (2, 2, 2))
    start, calculator = box.tiled(np.array([[0, 0, 2.0]])), SpinCalculator(MarkedChain())
    known, walked = {}, []

    def keep(block, walk):
        if block not in known:
            walked.append(block)
            known[block] = walk()
        return known[block]

    def run(kind, keep):
        walk = Walkers(box.atoms, start, box.magnetic, calculator, 300.0, kind, 2, seed=1)
        return walk.run(15, 20, 2, keep=keep)

    for kind in ("directions", "moments"):
        known.clear()
        whole = run(kind, lambda block, walk: walk())
        run(kind, keep)
        for block in (2, 3):
            del known[block]
        walked.clear()
        again = run(kind, keep)
        assert walked == [2, 3]
        for name in ("energy", "moments", "acceptance", "step"):
            np.testing.assert_array_equal(again[name], whole[name])
