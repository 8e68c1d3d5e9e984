"""The command line: results, what it prints, and every kind of bad input."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from ase.build import bulk
from ase.io import write
from mmace_props.cli import _with_errors, load_calculator, main
from mmace_props.errors import CalculatorError
from mmace_props.protocol import with_moments

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
TOY = f"{HERE / 'toys.py'}:from_options"


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    """Every command runs where nothing else is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return main([str(a) for a in arguments])


def test_anisotropy_of_strained_iron_aluminium(capsys):
    """The main job: table, dataset at its default place, plot; numbers of the toy's closed form."""
    status = run("anisotropy", EXAMPLES / "FeAl_strained.cif", "--calculator", TOY, "--plot", "a.png")
    out = capsys.readouterr()
    assert status == 0
    for text in ("FeAl, 2 atoms, P4/mmm", "fm guess along z with Fe 2.2, Al 0", "P4/mm'm'", "K1", "µeV/atom", "MJ/m³"):
        assert text in out.out
    with xr.open_dataset("FeAl_strained_anisotropy.nc") as data:
        assert float(data["K"].sel(constant="K1")) == pytest.approx(200.0, rel=1e-6)
        assert data.attrs["structure_file"] == "FeAl_strained.cif"
        assert "fm guess" in data.attrs["initial_moments_origin"]
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir()) == ["FeAl_strained_anisotropy.nc", "a.png"]


def test_committee_spread_is_printed(capsys):
    """A committee adds a column."""
    assert run("anisotropy", EXAMPLES / "FeAl_strained.cif", "--calculator", TOY, "--model", "committee") == 0
    out = capsys.readouterr().out
    assert "± committee" in out
    assert "committee of 3" in out


@pytest.mark.parametrize(
    ("value", "errors", "printed"),
    [
        (10.3564, [0.4612], ["10.36", "0.46"]),
        (1256.17, [141.2], ["1256", "141"]),
        (-36.3, [7.81], ["-36.3", "7.8"]),
        (2.9e-7, [4.4e-8], ["2.9e-07", "4.4e-08"]),
        (-598.729451, [9.9e-5], ["-598.72945", "9.9e-05"]),
        (0.123456, [9.9e-5], ["0.12346", "9.9e-05"]),
        (0.0, [9.9e-5], ["0", "9.9e-05"]),
        (21.987654, [0.0], ["21.9877", "0"]),
        (1.0, [float("nan")], ["1", "nan"]),
        (21.987654, [None], ["21.9877", ""]),
        (553.37, [24.61, 70.7], ["553", "25", "71"]),
        (21.987654, [None, 0.52], ["21.99", "", "0.52"]),
        (float("nan"), [0.52], ["nan", "0.52"]),
    ],
)
def test_values_are_rounded_to_their_largest_error(value, errors, printed):
    assert _with_errors(value, errors) == printed


def test_json_on_standard_output(capsys):
    """With --json standard output is JSON alone."""
    assert run("anisotropy", EXAMPLES / "FeAl_strained.cif", "--calculator", TOY, "--json", "-o", "x.nc") == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(r["label"], r["unit"]): r["value"] for r in found["results"]}
    assert rows["K1", "µeV/atom"] == pytest.approx(200.0, rel=1e-6)
    assert found["attributes"]["property"] == "anisotropy"


def test_soc_off_says_that_there_is_none(capsys):
    """Without spin-orbit coupling one clear message."""
    assert run("anisotropy", EXAMPLES / "FeAl_strained.cif", "--calculator", TOY, "--no-soc") == 0
    assert "no anisotropy, as it must be without spin-orbit coupling" in capsys.readouterr().out


def test_equation_of_state(capsys):
    """E(V) with its own options and plot."""
    status = run(
        "eos", EXAMPLES / "Fe.cif", "--calculator", TOY, "--states", "fm", "nm", "--points", "7", "--plot", "e.pdf"
    )
    assert status == 0
    assert "ground state" in capsys.readouterr().out
    with xr.open_dataset("Fe_eos.nc") as data:
        assert data["state"].values.tolist() == ["fm", "nm"]
    assert Path("e.pdf").read_bytes().startswith(b"%PDF")


def test_exchange_of_several_references(capsys):
    """States by name on the command line, in capitals too, each with its row."""
    options = ("--no-soc", "--states", "5", "--points", "5", "--mesh", "4", "--calculator", TOY)
    assert run("exchange", EXAMPLES / "Fe.cif", "--references", "FM", "AFM", *options) == 0
    out = capsys.readouterr().out
    assert "afm: Hessian missed by the common J" in out
    with xr.open_dataset("Fe_exchange.nc") as data:
        assert data["state"].values.tolist() == ["fm", "afm"]
        assert json.loads(data.attrs["options"])["references"] == ["FM", "AFM"]
        assert len(json.loads(data.attrs["reference_structures"])) == 2


def test_moments_from_everywhere(capsys):
    """A table, a file, a structure's own moments, and how they are relaxed."""
    fixed = ("--moments", "fixed", "--quiet", "-o", "x.nc", "--calculator", TOY)

    def used(*arguments):
        assert run("anisotropy", *arguments, *fixed) == 0
        with xr.open_dataset("x.nc") as data:
            return data["moments"].values

    np.testing.assert_allclose(used(EXAMPLES / "Fe.cif", "--moments", "Fe=1.7", "--order", "fm")[:, 2], [1.7, 1.7])
    np.testing.assert_allclose(used(EXAMPLES / "Fe.cif", "--moments", "Fe=1.7", "--order", "afm")[:, 2], [1.7, -1.7])
    Path("m.txt").write_text("0 1.5 0\n0 -1.5 0\n")
    np.testing.assert_allclose(used(EXAMPLES / "Fe.cif", "--moments", "m.txt")[:, 1], [1.5, -1.5])
    write("own.extxyz", with_moments(bulk("Fe", cubic=True, a=2.83), [[2.0, 0, 0], [2.0, 0, 0]]))
    np.testing.assert_allclose(used("own.extxyz")[:, 0], [2.0, 2.0])
    assert capsys.readouterr().out == ""


def test_calculators_without_capabilities(capsys):
    """Energies and magnetic forces, one structure at a time, are enough."""
    factory = f"{HERE / 'toys.py'}:bare_factory"
    status = run(
        "anisotropy", EXAMPLES / "FeAl_strained.cif", "--calculator", factory, "--moments", "fixed",
        "--moments", "Fe=2.2,Al=0", "--order", "fm", "--directions", "86",
    )  # fmt: skip
    assert status == 0
    with xr.open_dataset("FeAl_strained_anisotropy.nc") as data:
        assert float(data["K"].sel(constant="K1")) == pytest.approx(200.0, rel=1e-6)


def test_help_list_and_version(capsys):
    """The informative forms."""
    assert run("list") == 0
    assert "magnetocrystalline anisotropy" in capsys.readouterr().out
    assert run("--help") == 0
    assert "anisotropy" in capsys.readouterr().out
    assert run("--version") == 0
    with pytest.raises(SystemExit) as stop:
        run("anisotropy", "-h")
    assert stop.value.code == 0
    assert "--expansion" in capsys.readouterr().out
    for name, said in (("relax", "with its moments (default: on)"), ("spiral", "Cartesian (default: 0.0 0.0 1.0)")):
        with pytest.raises(SystemExit):
            run(name, "-h")
        text = " ".join(capsys.readouterr().out.split())
        assert said in text
        assert "(default: )" not in text
    assert run("screen", "-h") == 0
    assert "--property NAME" in capsys.readouterr().out


def bad_structures(folder):
    """Files with one fault each."""
    iron = bulk("Fe", cubic=True, a=2.83)
    iron.set_initial_magnetic_moments(None)
    write(folder / "xenon.cif", bulk("Xe"))
    nan = iron.copy()
    nan.positions[1, 2] = np.nan
    write(folder / "nan.extxyz", nan)
    write(folder / "molecule.xyz", Atoms("Fe2", positions=[[0, 0, 0], [0, 0, 2.2]]))
    near = iron.copy()
    near.positions[1] = [0.1, 0.1, 0.1]
    write(folder / "near.cif", near)
    write(folder / "far.extxyz", with_moments(iron, [[0, 0, 60.0], [0, 0, 2.2]]))
    (folder / "noise.cif").write_bytes(bytes(range(256)))
    partial = (EXAMPLES / "FeAl.cif").read_text().replace("Al1 Al 0.5 0.5 0.5 1.0", "Al1 Al 0.5 0.5 0.5 0.5")
    (folder / "partial.cif").write_text(partial)
    (folder / "short.txt").write_text("2.2\n2.2\n2.2\n")
    (folder / "none.txt").write_text("")
    (folder / "none.cif").write_text("")
    write(folder / "mine.cif", iron)
    write(folder / "rows.extxyz", with_moments(iron, [2.2, 2.2]))
    write(folder / "odd.png", with_moments(iron, [2.2, 2.2]), format="extxyz")
    (folder / "three.py").write_text("def make(**options):\n    return 3\n")


GOOD = str(EXAMPLES / "Fe.cif")
BAD = [
    (["anisotropy", "xenon.cif"], "does not know the element Xe"),
    (["anisotropy", GOOD, "--moments", "short.txt"], "'short.txt' holds 3 x 1 numbers, but 2 atoms need 2 rows"),
    (["anisotropy", GOOD, "--moments", "none.txt"], "the file of the moments 'none.txt' is empty"),
    (["anisotropy", "none.cif"], "the structure file 'none.cif' is empty"),
    (["anisotropy", str(EXAMPLES)], "is a directory; name one structure file"),
    (["anisotropy", "nan.extxyz"], "position of atom 1 is not a finite number"),
    (["anisotropy", "molecule.xyz"], "no cell"),
    (["anisotropy", "near.cif"], "overlap"),
    (["anisotropy", "far.extxyz"], "far outside the range"),
    (["anisotropy", GOOD, "--moments", "Fe=50"], "far outside the range"),
    (["anisotropy", "partial.cif"], "partially occupied"),
    (["anisotropy", "noise.cif"], "noise.cif' cannot be read"),
    (["anisotropy", "missing.cif"], "no structure file"),
    (["anisotropy", GOOD, "-o", "no/such/place.nc"], "does not exist"),
    (["anisotropy", GOOD, "-o", "."], "is a directory"),
    (["anisotropy", GOOD, "--model", "broken"], "the model file broken is damaged"),
    (["anisotropy", GOOD, "--moments", "Fe=0"], "no atom carries a moment"),
    (["anisotropy", GOOD, "--order", "affm"], "did you mean 'afm'"),
    (["anisotropy", GOOD, "--ordr", "fm"], "did you mean '--order'"),
    (["anisotropy", GOOD, "--moments", "magnitude"], "did you mean 'magnitudes'"),
    (["anisotropy", GOOD, "--expansion", "cubik"], "did you mean 'cubic'"),
    (["anisotropy", GOOD, "--directions", "many"], "invalid int value"),
    (["anisotropy", GOOD, "--plot", "a.bmp"], "a plot cannot be written as '.bmp'"),
    (["anisotropy", GOOD, "--plot", "x.png", "-o", "x.png"], "cannot be the same file"),
    (["anisotropy", "mine.cif", "-o", "mine.cif"], "'mine.cif' is the structure already"),
    (["anisotropy", GOOD, "-o", "mine.cif"], "'mine.cif' is there and is no dataset"),
    (["anisotropy", GOOD, "--moments", "rows.extxyz", "-o", "rows.extxyz"], "is the file of the moments already"),
    (
        ["relax", GOOD, "--write", "r.extxyz", "-o", "r.extxyz"],
        "'r.extxyz' is what relax writes already",
    ),
    (["relax", "rows.extxyz", "--write", "rows.extxyz"], "'rows.extxyz' is the structure already"),
    (["relax", GOOD, "--moments", "rows.extxyz", "--write", "./rows.extxyz"], "is the file of the moments already"),
    (["exchange", GOOD, "--references", "fm", "odd.png", "--plot", "odd.png"], "is what an option reads, 'odd.png'"),
    (["exchange", GOOD, "--seed", "-1"], "the option seed cannot be negative"),
    (["curie", GOOD, "--ways", "moments", "moments"], "ways holds one twice"),
    (["spiral", GOOD, "--path", "GH,", "--order", "fm"], "no path 'GH,' in this lattice"),
    (["spiral", GOOD, "--path", "", "--order", "fm"], "no path '' in this lattice"),
    (["spiral", GOOD, "--path", "GH", "--q", "0", "0", "0.5", "--order", "fm"], "path does nothing where wave vectors"),
    (["spiral", GOOD, "--soc", "--moments", "fixed", "--order", "fm", "--points", "200"], "points does nothing where"),
    (["spiral", GOOD, "--soc", "--moments", "fixed", "--order", "fm", "--mesh", "12"], "mesh does nothing where"),
    (["relax", GOOD, "--order", "fm", "--max-cells", "4"], "max_cells does nothing where the order is given"),
    (["curie", GOOD, "--order", "fm", "--max-orders", "4"], "max_orders does nothing where the order is given"),
    (["relax", GOOD, "--orders", "auto", "--order", "afm"], "leave --order afm out"),
    (["phonon", GOOD, "--order", "fm", "--phonopy", "."], "'.' is the working directory"),
    (["anisotropy", GOOD, "--calculator", "three.py:make"], "which is no ASE calculator"),
    (["anisotropy", GOOD, GOOD], "one argument too many"),
    (["anisotropy"], "structure"),
    (["anisotrpy", GOOD], "did you mean 'anisotropy'"),
    (["--quiet"], "name a property first"),
    (["eos", GOOD, "--states", "afn"], "did you mean 'afm'"),
    (["anisotropy", GOOD, "--calculator", "nonsense"], "names no factory"),
    (["anisotropy", GOOD, "--calculator", "no_such_module:f"], "cannot be imported"),
    (["anisotropy", GOOD, "--calculator", "missing.py:f"], "no file missing.py"),
    (["anisotropy", GOOD, "--calculator", f"{HERE / 'toys.py'}:from_option"], "did you mean 'from_options'"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[f"{k}-{b[1][:24]}" for k, b in enumerate(BAD)])
def test_bad_input(arguments, sentence, tmp_path, capsys):
    """One sentence on standard error, status 2, no traceback, and nothing written."""
    bad_structures(tmp_path)
    before = sorted(os.listdir(tmp_path))
    if "--calculator" not in arguments and len(arguments) > 1:
        arguments = [*arguments, "--calculator", TOY]
    assert run(*arguments) == 2
    out = capsys.readouterr()
    assert sentence in out.err
    lines = out.err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in out.err
    assert sorted(os.listdir(tmp_path)) == before


def test_the_installed_command_exits_with_two(tmp_path):
    """The same through a process: status, standard error, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "mmace_props.cli", "anisotropy", "missing.cif"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: there is no structure file 'missing.cif'; check the path\n"
    assert done.stdout == ""


@pytest.mark.parametrize("where", ["structure", "file"])
def test_moments_that_are_there_are_kept_where_orders_are_enumerated(where):
    """Lengths of a file, not the typical ones; from a structure and from a file of moments."""
    write("own.extxyz", with_moments(bulk("Fe", cubic=True, a=2.83), [[1.1, 0, 0], [1.1, 0, 0]]))
    source = ["own.extxyz"] if where == "structure" else [EXAMPLES / "Fe.cif", "--moments", "own.extxyz"]
    ways = ("--order", "auto", "--moments", "fixed", "--cell", "volume", "--calculator", TOY, "-o", "r.nc")
    assert run("relax", *source, *ways) == 0
    with xr.open_dataset("r.nc") as data:
        assert float(data["moment"].sel(order="fm")) == pytest.approx(1.1, abs=1e-6)
        assert abs(data["moments"].sel(order="fm").values[0, 0]) == pytest.approx(1.1, abs=1e-6)


def test_enumerated_orders_begin_from_typical_lengths(capsys):
    """Without moments anywhere the guess is one of lengths."""
    assert run("relax", EXAMPLES / "Fe.cif", "--orders", "auto", "--calculator", TOY) == 0
    assert "moments    fm guess along z with Fe 2.2 µB; |m|" in capsys.readouterr().out


def test_a_table_with_signs_is_a_ferrimagnet():
    """Signs count where no order is named; a named order prints lengths alone."""
    cell = Atoms("FeCr", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.9] * 3, pbc=True)
    write("fecr.cif", cell)
    ways = ("--moments", "Fe=2.2,Cr=-1.0", "--moments", "fixed", "--calculator", TOY, "-o", "e.nc", "--quiet")
    assert run("eos", "fecr.cif", "--states", "given", *ways) == 0
    with xr.open_dataset("e.nc") as data:
        np.testing.assert_allclose(data["site_moments"].values[0, 0, :, 2], [2.2, -1.0])
        assert data.attrs["initial_moments_origin"] == "moments along z with Fe 2.2, Cr -1 µB"
    assert run("eos", "fecr.cif", "--states", "fm", "--order", "fm", *ways) == 0
    with xr.open_dataset("e.nc") as data:
        assert data.attrs["initial_moments_origin"] == "fm guess along z with Fe 2.2, Cr 1 µB"


def test_a_calculator_that_fails_at_run_time_is_one_sentence(capsys):
    """Torch says that memory ran out by a RuntimeError."""
    Path("full.py").write_text(
        "from ase.calculators.calculator import Calculator\n"
        "class Full(Calculator):\n"
        "    implemented_properties = ['energy', 'forces', 'stress']\n"
        "    def calculate(self, *args, **named):\n        raise RuntimeError('out of memory')\n"
        "def make(**options):\n    return Full()\n"
    )
    ways = ("--calculator", "full.py:make", "--moments", "fixed", "--moments", "Fe=2", "--order", "fm")
    assert run("relax", EXAMPLES / "Fe.cif", *ways) == 2
    assert capsys.readouterr().err == "error: out of memory\n"


def test_a_file_factory_is_executed_once_and_whole(tmp_path):
    """Threads that ask while it is executed wait; another content is another module; so is another folder."""
    file, log = tmp_path / "slow_factory.py", tmp_path / "log.txt"
    source = (
        "import time\nfrom pathlib import Path\nfrom ase.calculators.emt import EMT\n"
        f"with Path({str(log)!r}).open('a') as f:\n    f.write('x')\n"
        "time.sleep(0.3)\n"
        "def make(**options):\n    return EMT()\n"
    )
    file.write_text(source)
    places = f"{file}:make", "default", True, "fixed", "cpu", "float64"
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: load_calculator(*places), range(4)))
    assert len(made) == 4
    assert log.read_text() == "x"
    file.write_text(source.replace("return EMT()", "raise ValueError('edited')"))
    with pytest.raises(CalculatorError, match="edited"):
        load_calculator(*places)


def test_factories_by_module_name(tmp_path, monkeypatch):
    """A module in the working directory is found, and the path is left as it was."""
    (tmp_path / "my_factory.py").write_text(
        "from ase.calculators.emt import EMT\ndef make(**options):\n    return EMT()\n"
    )
    before = list(sys.path)
    calculator = load_calculator("my_factory:make", "default", True, "fixed", "cpu", "float64")
    assert calculator.provenance() == {"calculator": "EMT"}
    assert sys.path == before
    (tmp_path / "bad_factory.py").write_text("def make(**options):\n    raise OSError('weights are missing')\n")
    with pytest.raises(CalculatorError, match="weights are missing"):
        load_calculator("bad_factory:make", "default", True, "fixed", "cpu", "float64")
