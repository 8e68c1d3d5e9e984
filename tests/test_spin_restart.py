"""Spin properties that were killed and begun again: nothing that was finished is computed twice."""

import os
import signal
import subprocess
import sys
import time
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


class SlowChain(Calculator):
    """``-Σ J m_i·m_j - Σ K m_z²`` without torch; every call takes a while, and leaves a line in a file."""

    implemented_properties = ("energy", "magnetic_forces")
    pause = 0.0
    log = None

    def __init__(self, soc=False, pause=0.0, log=None):
        super().__init__()
        self.soc, self.pause, self.log = soc, pause, log

    def provenance(self):
        return {"name": "chain", "hash": "0"}

    def marked(self, what, pause=None):
        time.sleep(self.pause if pause is None else pause)
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
        self.marked(f"spins {len(moments)}", min(self.pause, 0.03) if len(atoms) == 8 else None)
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
        "from tests.test_spin_restart import SlowChain, compute; import sys;"
        "compute(sys.argv[1], SlowChain(sys.argv[2] == 'True', 0.08, sys.argv[3]), sys.argv[4])"
    )
    whole = compute(name, SlowChain(soc, 0.0, tmp_path / "whole.log"), tmp_path / "whole")
    needed = finished(tmp_path / "whole")
    enough = 6 if name == "curie" else 2
    command = [sys.executable, "-c", script, name, str(soc), str(tmp_path / "first.log"), str(parts)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    broken = subprocess.Popen(command, env=environment, cwd=tmp_path)
    while broken.poll() is None and len(finished(parts)) < enough:
        time.sleep(0.01)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    assert broken.returncode == -signal.SIGKILL
    kept = finished(parts)
    assert enough <= len(kept) < len(needed)

    again = compute(name, SlowChain(soc, 0.0, tmp_path / "again.log"), parts)
    xr.testing.assert_identical(again.drop_attrs(), whole.drop_attrs())
    assert kept.items() <= finished(parts).items()
    assert finished(parts).keys() == needed.keys()
    assert 0 < len(lines(tmp_path / "again.log")) < len(lines(tmp_path / "whole.log"))
    last = compute(name, SlowChain(soc, 0.0, tmp_path / "last.log"), parts)
    xr.testing.assert_identical(last.drop_attrs(), whole.drop_attrs())
    assert lines(tmp_path / "last.log") == []


def test_a_walk_is_kept_in_blocks(tmp_path):
    """Taken up after some of its blocks, a walk goes on as if it had never stopped, bit by bit."""
    atoms = with_moments(Atoms("Fe", cell=[2.4] * 3, pbc=True), [[0, 0, 2.0]])
    box = Supercell(atoms, np.array([0]), (2, 2, 2))
    start, calculator = box.tiled(np.array([[0, 0, 2.0]])), SpinCalculator(SlowChain())
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
