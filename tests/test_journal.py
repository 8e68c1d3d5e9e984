"""Finished parts: what decides them, when they are stored, and a run that was killed and begun again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from ase.build import bulk
from mmace_props.coupled import Coupled
from mmace_props.elastic import Elastic
from mmace_props.errors import OutputError
from mmace_props.journal import Journal, fingerprint
from mmace_props.phonon import Phonon
from mmace_props.protocol import SpinCalculator, with_moments
from mmace_props.relax import Relaxation

from .toys import DMI, CapableToy, CommitteeToy, Heisenberg, Landau, Springs, Uniaxial, from_options

ROOT = Path(__file__).parent.parent
ATOMS = with_moments(Atoms("FeAl", [[0, 0, 0], [1.4, 1.4, 1.4]], cell=[2.8, 2.8, 2.8], pbc=True), [2.0, 0.0])


def moved(atoms, **changes):
    copy = atoms.copy()
    for name, values in changes.items():
        copy.set_array(name, None)
        copy.set_array(name, np.asarray(values))
    return copy


@pytest.mark.parametrize(
    "other",
    [
        {"atoms": ATOMS, "mode": "fixed"},
        {"atoms": with_moments(ATOMS, [2.0, 1e-12]), "mode": "full"},
        {"atoms": with_moments(ATOMS, [[2.0, 0, 0], [0, 0, 0]]), "mode": "full"},
        {"atoms": moved(ATOMS, positions=[[0, 0, 1e-12], [1.4, 1.4, 1.4]]), "mode": "full"},
        {"atoms": moved(ATOMS, numbers=[26, 14]), "mode": "full"},
        {"atoms": Atoms(ATOMS, cell=[2.8, 2.8, 2.81]), "mode": "full"},
        {"atoms": Atoms(ATOMS, pbc=[True, True, False]), "mode": "full"},
        {"atoms": [ATOMS], "mode": "full"},
        {"atoms": ATOMS, "mode": "full", "more": []},
    ],
)
def test_everything_that_decides_a_part_is_in_its_name(other):
    assert fingerprint(other) != fingerprint({"atoms": ATOMS, "mode": "full"})
    assert fingerprint({"mode": "full", "atoms": ATOMS.copy()}) == fingerprint({"atoms": ATOMS, "mode": "full"})


def test_arrays_of_other_shapes_and_types_are_other_parts():
    flat = np.zeros(4)
    names = {fingerprint({"x": x}) for x in (flat, flat.reshape(2, 2), flat.astype(np.float32), [flat, flat], 0.0, 0)}
    assert len(names) == 6


def test_stored_once_and_read_back(tmp_path):
    journal, calls = Journal(tmp_path / "parts", min_seconds=0.0), []

    def compute():
        calls.append(1)
        return {"x": np.arange(3.0), "n": np.array(7)}

    for _ in range(2):
        part = journal.part({"a": 1}, compute)
        assert part["x"].tolist() == [0, 1, 2]
        assert int(part["n"]) == 7
    assert len(calls) == 1
    assert len(journal) == 1
    assert os.listdir(tmp_path / "parts") == [f"{fingerprint({'a': 1})}.npz"]


def test_quick_parts_leave_nothing_behind(tmp_path):
    journal = Journal(tmp_path / "parts", min_seconds=10.0)
    assert journal.part({"a": 1}, lambda: {"x": np.ones(1)})["x"] == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"nonsense"])
def test_a_damaged_part_is_computed_again(tmp_path, content):
    journal = Journal(tmp_path / "parts", min_seconds=0.0)
    journal.part({"a": 1}, lambda: {"x": np.ones(1)})
    (file,) = (tmp_path / "parts").iterdir()
    file.write_bytes(content)
    assert journal.part({"a": 1}, lambda: {"x": np.full(1, 2.0)})["x"] == 2


def test_nothing_in_a_part_can_run_code(tmp_path):
    """Objects that would need pickle are neither written nor read."""
    journal = Journal(tmp_path / "parts", min_seconds=0.0)
    with pytest.raises(ValueError, match="allow_pickle"):
        journal.part({"a": 1}, lambda: {"x": np.array([print], dtype=object)})
    np.savez(tmp_path / "parts" / f"{fingerprint({'b': 1})}.npz", x=np.array([print], dtype=object))
    assert journal.part({"b": 1}, lambda: {"x": np.ones(1)})["x"] == 1


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another output"):
        Journal(tmp_path / "file" / "parts", 0.0).part({"a": 1}, lambda: {"x": np.ones(1)})


def test_members_and_options_do_not_share_parts(tmp_path):
    """Two models, or one with and without spin-orbit coupling, never read each other's parts."""
    other = from_options()
    committee = CommitteeToy([from_options(), CapableToy(Landau(0.07, 0.004), *other.options.terms, soc=True)])
    asked = SpinCalculator(committee, Journal(tmp_path / "parts", min_seconds=0.0))
    moments = [[1.5, 0, 0], [0, 0, 0]]
    first, second = (m.energy(ATOMS, moments) for m in asked.members)
    assert first != second
    assert asked.members[0].replace(soc=False).energy(ATOMS, moments) != first
    assert len(asked.journal) == 3
    assert [m.energy(ATOMS, moments) for m in asked.members] == [first, second]
    assert len(asked.journal) == 3


def test_a_calculator_that_cannot_say_what_it_is_keeps_nothing(tmp_path):
    bare = from_options()
    bare.provenance = None
    SpinCalculator(bare, Journal(tmp_path / "parts", min_seconds=0.0)).energy(ATOMS, [1.5, 0.0])
    assert os.listdir(tmp_path) == []


def test_a_killed_run_goes_on(tmp_path):
    """Killed in the middle, the command repeats nothing that was finished, and the result is the same."""
    command = [sys.executable, "-m", "mmace_props.cli", "anisotropy", str(ROOT / "examples" / "FeAl_strained.cif")]
    command += ["--calculator", "tests.slow_toy:from_options", "--strain"]

    def finish(output, log, **more):
        environment = {**os.environ, "SLOW_TOY_LOG": str(tmp_path / log), "PYTHONPATH": str(ROOT), **more}
        done = subprocess.run(
            [*command, "-o", str(tmp_path / output)], env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )
        return done, len((tmp_path / log).read_text().split())

    _, needed = finish("whole.nc", "whole.log")
    parts = tmp_path / ".x.nc.parts"
    broken, begun = finish("x.nc", "x.log", SLOW_TOY_FATAL=f"{parts}:2")
    assert broken.returncode == -signal.SIGKILL
    assert not (tmp_path / "x.nc").exists()
    assert 0 < begun < needed
    kept = len(Journal(parts))
    assert kept == 2

    again, left = finish("x.nc", "again.log")
    assert again.returncode == 0
    assert f"{kept} finished parts" in again.stdout
    assert left == needed - begun
    assert not parts.exists()
    with xr.open_dataset(tmp_path / "whole.nc") as a, xr.open_dataset(tmp_path / "x.nc") as b:
        assert a.drop_attrs().identical(b.drop_attrs())


class Counted(CapableToy):
    """A toy that writes down every evaluation, and kills its own process when `fatal` of them have begun."""

    log: Path
    begun, fatal = 0, 0

    def begin(self, what, atoms, *more):
        Counted.begun += 1
        if Counted.begun == Counted.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        with Counted.log.open("a") as file:
            file.write(fingerprint({"what": what, "atoms": atoms, "more": list(more)}) + "\n")

    def get_property(self, name, atoms=None, allow_calculation=True):
        self.begin(name, atoms)
        return super().get_property(name, atoms, allow_calculation)

    def evaluate_spins(self, atoms, moments, magnetic_forces=True):
        self.begin("spins", atoms, np.asarray(moments))
        return super().evaluate_spins(atoms, moments, magnetic_forces)

    def hessian(self, atoms, blocks=("rr", "rm", "mm"), rows=None):
        self.begin("hessian", atoms, list(blocks), [] if rows is None else list(rows))
        return super().hessian(atoms, blocks, rows)


def case(name):
    """A property, a structure and a model, of a second at most."""
    fcc = with_moments(bulk("Fe", "fcc", a=3.65), [[0, 0, 1.9]])
    soft = Counted(Springs(3.0, 3.6 / np.sqrt(2), 3.0), Landau(0.05, 0.006), soc=False)
    chain = with_moments(Atoms("Fe", cell=[2.5, 6, 6.5], pbc=True), [[0, 0, 1.8]])
    terms = Springs(10.0, 2.4, 2.6), Heisenberg(6e-4, 2.6, 2.0, 2.5), DMI(1e-3, 2.6), Uniaxial(5e-4)
    bands = {"dim": (4, 1, 1), "path": "GX", "points": 9, "moments": "fixed"}
    if name == "elastic":
        return Elastic(relax="none", moments="fixed"), fcc, soft
    if name == "relax":
        return Relaxation(moments="magnitudes"), fcc, soft
    if name == "phonon":
        return Phonon(**bands, paramagnetic=2, mesh=2, method="displacements"), chain, Counted(*terms[:2], soc=False)
    return Coupled(**bands), chain, Counted(*terms)


def evaluated(name, folder, parts, fatal=0):
    """Run a case with its parts in a folder; return its dataset and the evaluations made."""
    Counted.log, Counted.begun, Counted.fatal = Path(folder) / "log", 0, fatal
    Counted.log.write_text("")
    prop, atoms, calculator = case(name)
    dataset = prop.run(atoms, calculator, journal=Journal(Path(folder) / parts, 0.0))
    return dataset, Counted.log.read_text().split()


@pytest.mark.parametrize("name", ["elastic", "relax", "phonon", "coupled"])
def test_a_killed_property_repeats_no_finished_part(tmp_path, name):
    """Killed in its last third, another process makes the evaluations that are missing and none of the others."""
    whole, needed = evaluated(name, tmp_path, "whole")
    assert len(set(needed)) == len(needed) >= 3
    fatal = 1 + 2 * len(needed) // 3
    order = f"from tests.test_journal import evaluated; evaluated({name!r}, {str(tmp_path)!r}, 'parts', {fatal})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", order], env=environment, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    finished = (tmp_path / "log").read_text().split()
    assert finished == needed[: fatal - 1]
    again, repeated = evaluated(name, tmp_path, "parts")
    assert repeated == needed[fatal - 1 :]
    assert again.drop_attrs().identical(whole.drop_attrs())
