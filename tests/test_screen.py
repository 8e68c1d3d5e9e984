"""Many structures at once: rows, failures, restarts, engines, and what is written."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from ase.build import bulk
from ase.io import write
from mmace_props.base import Row
from mmace_props.cli import main
from mmace_props.eos import EquationOfState
from mmace_props.errors import OptionError
from mmace_props.exchange import Exchange
from mmace_props.magnon import Magnon
from mmace_props.phonon import Phonon
from mmace_props.protocol import with_moments
from mmace_props.screen import Outcome, Setup, _calculator, outcome_table, run_one, screen, structure_files
from mmace_props.sources import identity
from mmace_props.structures import read_structure

from . import toys
from .test_cli_props import HERE, TOY

EOS = ("--property", "eos", "--states", "fm", "--points", "6")
OWN_FACTORY = f"""import sys
sys.path.insert(0, {str(HERE.parent)!r})
from tests.toys import CapableToy, CommitteeToy, Heisenberg, Springs
terms = [Heisenberg(%g, 2.6), Springs(3.0, 2.5, 3.3)]
def make(model="toy", soc=True, moments="fixed", device="cpu", dtype="float64"):
    return CapableToy(*terms, soc=soc, moments=moments)
"""


@pytest.fixture
def crystals(tmp_path, monkeypatch):
    """A directory with three good structures and two bad ones, and nothing else around."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    folder.mkdir()
    for k, a in enumerate((2.78, 2.83, 2.88)):
        write(folder / f"fe{k}.extxyz", with_moments(bulk("Fe", cubic=True, a=a), [[0, 0, 2.0]] * 2))
    write(folder / "xe.cif", bulk("Xe"))
    (folder / "zz.cif").write_text("this is no crystal\n")
    (folder / "notes.txt").write_text("not a structure\n")
    return folder


def run(*arguments):
    return main([str(a) for a in arguments])


def single(path):
    """The same property of one structure, alone."""
    prop = EquationOfState(moments="magnitudes", states=("fm",), points=6)
    return prop.run(read_structure(path), toys.from_options(soc=False, moments="magnitudes"))


def test_one_row_per_structure_and_failures_with_their_sentence(crystals, capsys):
    """Numbers are those of single runs; what fails is named, recorded, and skipped."""
    assert run("screen", crystals, *EOS, "--calculator", TOY) == 0
    out = capsys.readouterr().out
    assert "3 results and 2 failures" in out
    assert "does not know the element Xe" in out
    with xr.open_dataset("screen_eos.nc") as table:
        assert [Path(f).name for f in table["structure"].values] == [
            "fe0.extxyz", "fe1.extxyz", "fe2.extxyz", "xe.cif", "zz.cif",
        ]  # fmt: skip
        assert table.attrs["failures"] == 2
        assert all(v.attrs["units"] and v.attrs["long_name"] for v in table.variables.values())
        failures = table["structure_failure"].values
        assert failures[0] == ""
        assert "does not know the element Xe" in failures[3]
        assert "cannot be read" in failures[4]
        for k in range(3):
            alone = single(crystals / f"fe{k}.extxyz")["V0"].sel(state="fm", fit="birch_murnaghan")
            assert float(table["fm_V0"][k]) == pytest.approx(float(alone), rel=1e-12)
            with xr.open_dataset(Path("screen_eos") / str(table["structure_dataset"].values[k])) as own:
                assert float(own["V0"].sel(state="fm", fit="birch_murnaghan")) == float(table["fm_V0"][k])
                assert own.attrs["structure_file"] == f"fe{k}.extxyz"
        assert np.isnan(table["fm_V0"].values[3:]).all()
    with Path("screen_eos.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert float(rows[1]["fm V0 (Å³/atom)"]) == pytest.approx(float(rows[1]["fm V0 (Å³/atom)"]))
    assert rows[3]["fm V0 (Å³/atom)"] == ""
    assert "element Xe" in rows[3]["failure"]
    assert rows[0]["formula"] == "Fe2"


def test_processes_give_what_one_gives(crystals):
    """Two processes of joblib."""
    assert run("screen", crystals, *EOS, "--calculator", TOY, "-o", "a.nc", "--quiet") == 0
    assert run("screen", crystals, *EOS, "--calculator", TOY, "-o", "b.nc", "--jobs", 2, "--quiet") == 0
    with xr.open_dataset("a.nc") as a, xr.open_dataset("b.nc") as b:
        xr.testing.assert_identical(a.load(), b.load())


def test_a_dask_cluster_gives_what_one_gives(crystals, monkeypatch):
    """Two workers of a local cluster, which are shut down afterwards, however long that takes them."""
    distributed = pytest.importorskip("distributed")
    command = ("screen", crystals, *EOS, "--calculator", TOY, "--quiet")
    assert run(*command, "-o", "a.nc") == 0
    close = distributed.LocalCluster.close

    def late(cluster, timeout=None):
        close(cluster, timeout)
        raise TimeoutError

    with monkeypatch.context() as patched:
        patched.setattr(distributed.LocalCluster, "close", late)
        assert run(*command, "-o", "b.nc", "--jobs", 2, "--dask", "local") == 0
    with xr.open_dataset("a.nc") as a, xr.open_dataset("b.nc") as b:
        xr.testing.assert_identical(a.load(), b.load())
    with pytest.raises(ValueError, match="No global client"):
        distributed.get_client()


def test_workers_elsewhere_give_what_one_gives(crystals, monkeypatch):
    """Two processes in another directory, that know the paths, factory and files of the command alone."""
    distributed = pytest.importorskip("distributed")
    (crystals.parent / "mine.py").write_text(OWN_FACTORY % 2e-3)
    write("ref.extxyz", with_moments(bulk("Fe", cubic=True, a=2.83), [[0, 0, 2.0], [0, 0, -2.0]]))
    for length in (1.8, 2.0):
        write(f"in/m{length}.extxyz", with_moments(bulk("Fe", cubic=True, a=2.83), [[0, 0, length]] * 2))
    options = ("--states", "2", "--points", "5", "--mesh", "4", "--references", "given", "ref.extxyz")
    files = ("in/m1.8.extxyz", "in/m2.0.extxyz", "--moments", "fixed")
    command = ("screen", *files, "--property", "exchange", "--no-soc", *options, "--calculator", "mine.py:make")
    assert run(*command, "-o", "a.nc") == 0
    elsewhere = crystals.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        monkeypatch.chdir(crystals.parent)
        assert run(*command, "-o", "b.nc", "--dask", cluster.scheduler_address) == 0
    with xr.open_dataset("a.nc") as a, xr.open_dataset("b.nc") as b:
        assert a.attrs["failures"] == 0
        xr.testing.assert_identical(a.load(), b.load())
    assert not list(elsewhere.iterdir())


def test_threads_of_a_worker_take_turns(crystals, capsys):
    """A calculator that two threads may not ask at once, whose module takes a while to execute."""
    distributed = pytest.importorskip("distributed")
    (crystals.parent / "alone.py").write_text(
        OWN_FACTORY % 2e-3 + "import time\ntime.sleep(0.3)\nasked = []\n"
        "class Alone(CapableToy):\n"
        "    def evaluate(self, *args, **named):\n"
        "        asked.append(1)\n        time.sleep(0.01)\n"
        "        crowd = len(asked)\n        asked.pop()\n"
        "        if crowd > 1:\n            raise ValueError('two at once')\n"
        "        return super().evaluate(*args, **named)\n"
        "def make(model='toy', soc=True, moments='fixed', device='cpu', dtype='float64'):\n"
        "    return Alone(*terms, soc=soc, moments=moments)\n"
    )
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=4, processes=False, dashboard_address=None
    ) as cluster:
        ways = ("--calculator", "alone.py:make", "--moments", "fixed", "--dask", cluster.scheduler_address)
        assert run("screen", crystals, *EOS, *ways) == 0
    assert "3 results and 2 failures" in capsys.readouterr().out


def test_a_scheduler_without_workers_is_one_sentence(crystals, monkeypatch, capsys):
    """What is missing, and how to start it; a number of jobs beside an address does nothing."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("mmace_props.screen.NO_WORKERS", 0.2)
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        assert run("screen", crystals, *EOS, "--calculator", TOY, "--dask", address) == 2
        assert f"the Dask scheduler at '{address}' has no workers" in capsys.readouterr().err
        assert run("screen", crystals, *EOS, "--calculator", TOY, "--dask", address, "--jobs", 2) == 2
        assert "leave --jobs out" in capsys.readouterr().err


def test_finished_structures_are_not_computed_again(crystals, capsys):
    """A second run reads; another option, another structure, or a damaged file computes."""
    command = ("screen", crystals, *EOS, "--calculator", TOY)
    assert run(*command) == 0
    before = {p.name: p.stat().st_mtime_ns for p in Path("screen_eos").iterdir()}
    assert len(before) == 3
    assert run(*command) == 0
    assert "3 finished structures of an earlier run" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in Path("screen_eos").iterdir()} == before
    damaged = sorted(before)[0]
    (Path("screen_eos") / damaged).write_bytes(b"cut off")
    write(crystals / "fe1.extxyz", with_moments(bulk("Fe", cubic=True, a=2.84), [[0, 0, 2.0]] * 2))
    assert run(*command) == 0
    after = {p.name: p.stat().st_mtime_ns for p in Path("screen_eos").iterdir()}
    assert len(after) == 4
    assert after[damaged] != before[damaged]
    unchanged = [name for name in before if name != damaged]
    assert all(after[name] == before[name] for name in unchanged)
    assert run(*command, "--volume-range", "0.08") == 0
    assert len(list(Path("screen_eos").iterdir())) == 7


def test_changed_files_are_other_results(crystals, capsys):
    """A factory, a reference that an option names, and a model file, each edited between two runs of one command."""
    one = crystals / "fe0.extxyz"
    source, reference, model = (crystals.parent / name for name in ("own.py", "ref.extxyz", "model.txt"))
    source.write_text(OWN_FACTORY % 2e-3)
    write(reference, with_moments(bulk("Fe", cubic=True, a=2.78), [[0, 0, 2.0], [0, 0, -2.0]]))
    model.write_text("1")
    options = ("--states", "2", "--points", "5", "--mesh", "4", "--references", "given", "ref.extxyz", "--no-soc")
    command = ("screen", one, "--property", "exchange", *options, "--calculator", "own.py:make", "--model", "model.txt")

    def results():
        assert run(*command, "--moments", "fixed") == 0
        return {p.name for p in Path("screen_exchange").iterdir()}

    first = results()
    assert len(first) == 1
    assert results() == first
    write(reference, with_moments(bulk("Fe", cubic=True, a=2.78), [[0, 0, 2.0], [2.0, 0, 0]]))
    assert len(results()) == 2
    model.write_text("2")
    assert len(results()) == 3
    source.write_text(OWN_FACTORY % 4e-3)
    assert len(results()) == 4
    with xr.open_dataset("screen_exchange.nc") as table, xr.open_dataset(_own(table)) as own:
        alone = Exchange(states=0, points=5, mesh=4, moments="fixed").run(
            read_structure(one), toys.CapableToy(toys.Heisenberg(4e-3, 2.6), toys.Springs(3.0, 2.5, 3.3), soc=False)
        )
        assert float(own["J"].max()) == pytest.approx(float(alone["J"].max()), rel=1e-6)


def _own(table):
    return Path("screen_exchange") / str(table["structure_dataset"].values[0])


def test_a_calculator_that_nothing_is_known_of_is_asked_again(crystals, monkeypatch):
    """Neither provenance nor source: a finished dataset may be another calculator's."""
    monkeypatch.setattr("mmace_props.sources.package_source", lambda name: "")
    strength = [2e-3]
    factory = ModuleType("made_here")
    factory.make = lambda **options: toys.Toy(
        toys.Heisenberg(strength[0], 2.6, 1.0), toys.Springs(3.0, 2.5, 3.3), elements=None
    )
    monkeypatch.setitem(sys.modules, "made_here", factory)
    setup = Setup("eos", {"states": ("fm",), "points": 6}, "fixed", factory="made_here:make")

    def found():
        _calculator.cache_clear()
        outcome = screen([str(crystals / "fe0.extxyz")], setup, "parts")[0]
        return next(row.value for row in outcome.rows if row.label == "fm V0")

    before = found()
    strength[0] = 4e-3
    assert abs(found() - before) > 0.01


def test_a_worker_with_other_code_says_so(crystals):
    """A process that loaded an older suite or another factory computes nothing."""
    setup = Setup("eos", {"states": ("fm",), "points": 6}, "fixed", factory=TOY)
    origin = {**identity(TOY, "default"), "suite": "older"}
    outcome = run_one(str(crystals / "fe0.extxyz"), setup, ".", origin)
    assert outcome.failure == "the worker has another suite than the command; restart it"
    assert "does not see" in run_one("a.cif", setup, ".", None, "/no/such/place").failure


def test_notes_lost_members_and_warnings_stand_with_their_structure(crystals, capfd):
    """In the table and in print, from processes too, and again where results are read."""
    (crystals.parent / "three.py").write_text(
        OWN_FACTORY % 2e-3 + "import warnings\n"
        "class Bad(CapableToy):\n"
        "    def evaluate(self, *args, **named):\n        raise ValueError('hole in the potential')\n"
        "class Far(CapableToy):\n"
        "    def evaluate(self, *args, **named):\n"
        "        warnings.warn('far from the data', stacklevel=2)\n        return super().evaluate(*args, **named)\n"
        "def make(model='toy', soc=True, moments='fixed', device='cpu', dtype='float64'):\n"
        "    kinds = CapableToy, Far, Bad\n"
        "    return CommitteeToy([kind(*terms, soc=soc, moments=moments) for kind in kinds])\n"
    )
    good = [crystals / "fe0.extxyz", crystals / "fe1.extxyz"]
    ways = ("--property", "anisotropy", "--directions", "86", "--moments", "fixed", "--calculator", "three.py:make")
    for jobs in (1, 2, 2):
        assert run("screen", *good, *ways, "-o", "t.nc", "--jobs", jobs) == 0
        out, err = capfd.readouterr()
        assert "arning" not in err
        assert "left out   fe0.extxyz: member 3: hole in the potential" in out
        assert "note       fe1.extxyz: " in out
        assert "far from the data" in out
        with xr.open_dataset("t.nc") as table:
            assert table["structure_members_without_result"].values.tolist() == ["member 3: hole in the potential"] * 2
            assert all("far from the data" in text for text in table["structure_note"].values)
        header = Path("t.csv").read_text().splitlines()[0].split(",")
        assert {"note", "members_without_result"} <= set(header)
    assert run("screen", *good, *ways[:-1], TOY, "-o", "plain.nc") == 0
    with xr.open_dataset("plain.nc") as table:
        assert table["structure_members_without_result"].values.tolist() == ["", ""]


def test_a_killed_screen_goes_on_where_it_was(crystals, tmp_path):
    """Killed in the middle without warning; what was finished is read, nothing half-written is left behind."""
    log = tmp_path / "log.txt"
    slow = "tests.slow_toy:from_options"
    command = [sys.executable, "-m", "mmace_props.cli", "screen", "in", *EOS, "--calculator", slow, "--quiet"]
    environment = {**os.environ, "SLOW_TOY_LOG": str(log), "PYTHONPATH": str(HERE.parent)}
    folder = tmp_path / "screen_eos"
    fatal = {**environment, "SLOW_TOY_FATAL": f"{folder}:1"}
    broken = subprocess.run(command, env=fatal, cwd=tmp_path, stderr=subprocess.DEVNULL)
    assert broken.returncode == -signal.SIGKILL
    finished = {p.name: p.stat().st_mtime_ns for p in folder.glob("[!.]*.nc")}
    assert len(finished) == 1
    assert not (tmp_path / "screen_eos.nc").exists()
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
    after = {p.name: p.stat().st_mtime_ns for p in folder.glob("[!.]*.nc")}
    assert all(after[name] == finished[name] for name in finished)
    assert len(after) == 3
    assert sorted(p.name for p in folder.iterdir()) == sorted(after)
    with xr.open_dataset(tmp_path / "screen_eos.nc") as table:
        assert table.attrs["failures"] == 2


def test_from_python_with_other_tables(tmp_path):
    """Lines that only some results have, text, spread, labels that make one name, and one key of two labels."""
    outcomes = [
        Outcome("a", "Fe", rows=(Row("bulk modulus", 170.0, "GPa", 2.0), Row("ground state", "fm")), dataset="a.nc"),
        Outcome("b", "Al", rows=(Row("bulk modulus", 76.0, "GPa", error=3.0), Row("bulk-modulus", 1.0, "eV"))),
        Outcome("d", rows=(Row("bulk modulus, q = (0, 0)", 50.0, "GPa", key="bulk modulus"),)),
        Outcome("c", failure="no"),
    ]
    table = outcome_table(outcomes, Setup("eos", {}, "fixed"))
    assert table["bulk_modulus"].values[:3].tolist() == [170.0, 76.0, 50.0]
    assert np.isnan(table["bulk_modulus"].values[3])
    assert table["bulk_modulus"].attrs["long_name"] == "bulk modulus"
    assert table["bulk_modulus"].attrs["units"] == "GPa"
    assert table["bulk_modulus_2"].values[1] == 1.0
    assert table["bulk_modulus_std"].values[0] == 2.0
    assert np.isnan(table["bulk_modulus_std"].values[1])
    np.testing.assert_array_equal(table["bulk_modulus_error"].values, [np.nan, 3.0, np.nan, np.nan])
    assert table["ground_state"].values.tolist() == ["fm", "", "", ""]


@pytest.mark.parametrize(
    ("prop", "quantities"),
    [
        (
            Exchange(states=4, points=5, mesh=4),
            {"J_Cr_Fe_shell_1", "J_Fe_Fe_shell_1", "Tc_mean_field", "stiffness_J_truncated", "model_error_at_5"},
        ),
        (Magnon(mesh=4, points=10), {"highest_energy"}),
        (
            Phonon(dim=(2, 2, 2), mesh=4, points=5, second="nm", slopes=True, moments="fixed"),
            {"lowest_frequency", "largest_shift", "shift_at_Γ_mode_1", "largest_ω_m_of_Fe"},
        ),
    ],
    ids=["exchange", "magnon", "phonon"],
)
def test_a_quantity_is_one_column_whatever_its_label_says(prop, quantities):
    """Distances, wave vectors and frequencies in the labels of two structures make no columns of their own."""
    outcomes = []
    for a in (2.78, 2.88):
        cell = Atoms("FeCr", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[a] * 3, pbc=True)
        calculator = toys.CapableToy(toys.Heisenberg(2e-3, 3.1), toys.Springs(4.0, 2.5, 3.1), soc=False)
        dataset = prop.run(with_moments(cell, [[0, 0, 2.0], [0, 0, 1.5]]), calculator)
        outcomes.append(Outcome(f"{a}", "FeCr", rows=tuple(prop.summary(dataset))))
    for row in (row for outcome in outcomes for row in outcome.rows):
        assert not any(text in row.key for text in ("q = (", " Å", " THz"))
    table = outcome_table(outcomes, Setup(prop.name, {}, "fixed"))
    numbers = {str(k): v.values for k, v in table.data_vars.items() if v.dtype.kind == "f"}
    assert quantities <= set(numbers)
    assert all(np.isfinite(v).all() for v in numbers.values())
    assert len(numbers) == sum(not isinstance(r.value, str) for r in outcomes[0].rows)


def test_shells_are_numbered_for_elements_and_order():
    """An antiferromagnet counts parallel and antiparallel neighbours apart."""
    crystal = with_moments(bulk("Fe", cubic=True, a=2.83), [[0, 0, 2.0], [0, 0, -2.0]])
    rows = Exchange(states=0, points=5, mesh=4).run(crystal, toys.CapableToy(toys.Heisenberg(-2e-3, 4.2)))
    keys = [r.key for r in Exchange().summary(rows) if r.key.startswith("J ")]
    assert keys[:3] == ["J Fe-Fe antiparallel, shell 1", "J Fe-Fe parallel, shell 1", "J Fe-Fe parallel, shell 2"]
    assert keys[3:] == ["J Fe-Fe antiparallel, shell 2", "J Fe-Fe parallel, shell 3"]


def test_an_unexpected_error_of_one_structure_does_not_stop_the_others(crystals):
    """A calculator that breaks on one volume: its type and text are recorded."""
    factory = crystals.parent / "fragile.py"
    factory.write_text(
        f"import sys\nsys.path.insert(0, {str(HERE.parent)!r})\n"
        "from tests import toys\n"
        "class Fragile(toys.CapableToy):\n"
        "    def evaluate_spins(self, atoms, moments, magnetic_forces=True):\n"
        "        if abs(atoms.cell[0, 0] - 2.88) < 0.02:\n"
        "            raise ZeroDivisionError('a bug')\n"
        "        return super().evaluate_spins(atoms, moments, magnetic_forces)\n"
        "def make(model='toy', soc=True, moments='fixed', device='cpu', dtype='float64'):\n"
        "    full = toys.from_options(model, soc, moments)\n"
        "    return Fragile(*full.options.terms, soc=soc, moments=moments)\n"
    )
    options = {"strain": False, "directions": 86}
    setup = Setup("anisotropy", options, "fixed", factory=f"{factory}:make")
    files = structure_files([crystals / "fe0.extxyz", crystals / "fe2.extxyz"])
    found = screen(files, setup, crystals.parent / "parts")
    assert found[0].failure == ""
    assert found[1].failure == "unexpected ZeroDivisionError: a bug"


def test_one_place_for_all_structures_is_refused_from_python_too(crystals):
    """Nothing is computed, and no folder is made."""
    setup = Setup("phonon", {"phonopy": "p"}, "fixed", factory=TOY)
    with pytest.raises(OptionError, match="the same folder"):
        screen(structure_files([crystals]), setup, crystals.parent / "parts")
    assert [p.name for p in crystals.parent.iterdir()] == ["in"]


BAD = [
    (["screen", "in"], "name the property to screen with --property"),
    (["screen", "in", "--property", "eoss"], "did you mean 'eos'"),
    (["screen", "--property", "eos"], "PATH"),
    (["screen", "in", "in/fe0.extxyz", "--property", "eos"], "is named twice"),
    (["screen", "nowhere", "--property", "eos"], "no structure file 'nowhere'"),
    (["screen", "empty", "--property", "eos"], "holds no structure"),
    (["screen", "in", "--property", "eos", "--jobs", "0"], "jobs cannot be 0"),
    (["screen", "in", "--property", "eos", "--points", "3"], "points cannot be 3"),
    (["screen", "in", "--property", "eos", "--moments", "m.txt"], "fits one structure alone"),
    (["screen", "in", "--property", "relax", "--write", "a.mcif"], "write to the same file"),
    (["screen", "in", "--property", "phonon", "--phonopy", "p"], "write phonopy's files to the same folder"),
    (["screen", "in", "--property", "phonon", "--from", "phonopy_disp.yaml"], "holds one structure alone"),
    (["screen", "in", "--property", "eos", "-o", "no/a.nc"], "does not exist"),
    (["screen", "in", "--property", "eos", "-o", "a"], "name an output with a suffix"),
    (["screen", "in", "--property", "eos", "--points", "9", "in/xe.cif"], "name all structures before the options"),
    (["screen", "in", "--property", "eos", "--csv", "in/zz.cif"], "'in/zz.cif' is the structure 'in/zz.cif' already"),
    (["screen", "in", "--property", "eos", "--csv", "model.csv", "--model", "model.csv"], "is the model already"),
    (["screen", "in", "--property", "eos", "--poins", "9"], "did you mean '--points'"),
    (["screen", "in", "--property", "eos", "--model", "broken"], "the model file broken is damaged"),
    (["screen", "in/xe.cif", "--property", "eos"], "no structure gave a result; of the first: the model does not know"),
    (["screen", "in", "--property", "eos", "--dask", "tcp://127.0.0.1:9"], "no Dask scheduler answers"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[b[1][:24] for b in BAD])
def test_bad_input(arguments, sentence, crystals, capsys):
    """One sentence and status 2."""
    if "--dask" in arguments:
        pytest.importorskip("distributed")
    Path("empty").mkdir()
    Path("m.txt").write_text("2\n2\n")
    Path("model.csv").write_text("weights\n")
    assert run(*arguments, "--calculator", TOY) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert sentence in lines[-1]
