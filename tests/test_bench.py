"""The benchmark on a crystal with a closed-form answer, its comparisons, its references and its stored results."""

import json
import textwrap
from pathlib import Path

import mmace_bench
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from mmace_bench import cli, systems
from mmace_bench.analyse import MISS, OK, UNKNOWN, changes, compare, verdict
from mmace_bench.calculate import anisotropy_errors, errors_of, values
from mmace_bench.cli import main
from mmace_bench.derive import derived_values, frozen_phonon
from mmace_bench.errors import BenchmarkError
from mmace_bench.systems import SYSTEMS, Number, Quantity, Reference, read_system
from mmace_props.protocol import SpinCalculator, bare, moments_of

from .toys import CapableToy, CommitteeToy, Landau, MagneticEquationOfState, Uniaxial, birch_murnaghan

GPA = 160.21766208
CURVES = {"nm": (-7.6, 10.2, 1.7, 4.6), "fm": (-8.1, 11.3, 1.15, 5.1), "afm": (-8.02, 10.8, 1.25, 4.4)}
FIT = {"fit": "birch_murnaghan"}
NUMBERS = {
    "V0": {"variable": "V0", "where": {"state": "fm", **FIT}},
    "B0": {"variable": "B0", "where": {"state": "fm", **FIT}},
    "nm": {"variable": "E0", "where": {"state": "nm", **FIT}, "minus": {"state": "fm"}, "scale": 1000},
}


def quantity(value, tolerance=0.01):
    known = [{"value": value, "uncertainty": 0.0, "kind": "own DFT", "source": "closed form"}]
    return {"text": "q", "unit": "u", "tolerance": tolerance, "reason": "a test", "references": known}


@pytest.fixture
def toy_system(tmp_path, monkeypatch):
    """A folder `FeAl` with one crystal, and a factory of its toy."""
    folder = tmp_path / "FeAl"
    folder.mkdir()
    crystal = {
        "symbols": ["Fe", "Fe"],
        "cell": [[2.83, 0, 0], [0, 2.83, 0], [0, 0, 2.83]],
        "scaled_positions": [[0, 0, 0], [0.5, 0.5, 0.5]],
        "moments": [2.2, 2.2],
    }
    task = {"name": "Fe-eos", "crystal": "Fe", "property": "eos", "quick": True, "numbers": NUMBERS}
    difference = {
        "name": "gap",
        "property": "difference",
        "options": {"first": "V0", "second": "B0"},
        "numbers": {"gap": {"variable": "", "scale": 2.0}},
    }
    (folder / "benchmark.json").write_text(json.dumps({"crystals": {"Fe": crystal}, "tasks": [task, difference]}))
    e0, v0, b0, _ = CURVES["fm"]
    references = {
        "V0": quantity(v0),
        "B0": quantity(GPA * b0 + 1.0),
        "nm": quantity(1000 * (CURVES["nm"][0] - e0)),
        "gap": quantity(2 * (v0 - GPA * b0)),
    }
    (folder / "references.json").write_text(json.dumps(references))
    factory = tmp_path / "factory.py"
    factory.write_text(
        textwrap.dedent(
            f"""
            from tests.toys import CapableToy, MagneticEquationOfState

            def make(model, soc, moments, device, dtype):
                return CapableToy(MagneticEquationOfState({CURVES!r}), soc=soc, moments=moments)
            """
        )
    )
    monkeypatch.setattr(systems, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return main(["run", "FeAl", *arguments])


def test_closed_form_through_the_command(toy_system, capsys):
    assert run("--calculator", "factory.py:make", "--json", "out.json", "--report", "report.md") == 0
    found = json.loads(Path("out.json").read_text())["systems"]["FeAl"]
    e0, v0, b0, _ = CURVES["fm"]
    assert found["V0"]["value"] == pytest.approx(v0, rel=1e-6)
    assert found["B0"]["value"] == pytest.approx(GPA * b0, rel=1e-6)
    assert found["nm"]["value"] == pytest.approx(1000 * (CURVES["nm"][0] - e0), rel=1e-6)
    assert found["gap"]["value"] == pytest.approx(2 * (v0 - GPA * b0), rel=1e-6)
    assert [found[k]["verdict"] for k in ("V0", "B0", "nm", "gap")] == [OK, MISS, OK, OK]
    report = Path("report.md").read_text()
    assert "**miss**" in report
    assert "closed form" in report
    assert Path("images/benchmark-FeAl-Fe-eos.png").stat().st_size > 1000
    assert "1 miss" in capsys.readouterr().out


def test_quick_leaves_out_the_rest_and_a_second_run_reads_what_the_first_made(toy_system, monkeypatch):
    assert run("--calculator", "factory.py:make", "--quick", "--json", "one.json") == 0
    assert set(json.loads(Path("one.json").read_text())["systems"]["FeAl"]) == {"V0", "B0", "nm"}

    def refuse(name):
        raise AssertionError(f"{name} was computed again")

    monkeypatch.setattr("mmace_bench.calculate.load_property", refuse)
    assert run("--calculator", "factory.py:make", "--quick", "--json", "two.json") == 0
    assert Path("one.json").read_text() == Path("two.json").read_text()


def test_stored_results_hold_until_they_are_updated(toy_system, monkeypatch, capsys):
    curves = dict(CURVES)

    def make(factory, model, soc, moments, device, dtype):
        toy = CapableToy(MagneticEquationOfState(curves), soc=soc, moments=moments, name=str(curves["fm"]))
        return SpinCalculator(toy)

    monkeypatch.setattr(cli, "load_calculator", make)
    assert run() == 2
    assert "no results are stored" in capsys.readouterr().err
    assert run("--update", "the first") == 0
    assert json.loads((toy_system / "FeAl/results/benchmark.json").read_text())["message"] == "the first"
    assert run() == 0
    curves["fm"] = (-8.1, 11.3 + 2e-5, 1.15, 5.1)
    assert run() == 0
    curves["fm"] = (-8.1, 11.3 + 2e-3, 1.15, 5.1)
    assert run() == 1
    assert "changed: V0" in capsys.readouterr().out
    assert run("--update", " ") == 2


def test_change_beyond_noise_counts_either_way():
    def entry(value):
        return {"value": value, "unit": "u", "tolerance": 2.0, "verdict": OK}

    assert changes({"a": entry(1.0)}, {"a": entry(1.019), "b": entry(3.0)}) == []
    assert len(changes({"a": entry(1.0)}, {"a": entry(1.021)})) == 1
    assert len(changes({"a": entry(1.0)}, {"a": entry(0.979)})) == 1
    assert len(changes({"a": entry(1.0)}, {})) == 1
    lost = {**entry(None), "note": "moments vanished"}
    assert "moments vanished" in changes({"a": lost}, {"a": entry(1.0)})[0]


def test_verdict_takes_the_first_kind_there_is():
    own, paper = Reference(10.0, 0.0, "own DFT", "a"), Reference(20.0, 1.0, "published DFT", "b")

    def of(*references):
        return Quantity("q", "q", "u", 0.5, "a test", references)

    assert verdict(of(own, paper), 10.49) == OK
    assert verdict(of(own, paper), 20.0) == MISS
    assert verdict(of(paper), 21.49) == OK
    assert verdict(of(paper), 21.51) == MISS
    assert verdict(of(), 1.0) == UNKNOWN


def test_values_of_a_committee_come_member_by_member():
    from mmace_props.eos import EquationOfState

    shifted = {**CURVES, "fm": (-8.1, 11.5, 1.15, 5.1)}
    atoms = bulk("Fe", "bcc", 2.83, cubic=True)
    atoms.set_initial_magnetic_moments([2.2, 2.2])
    committee = CommitteeToy([CapableToy(MagneticEquationOfState(c)) for c in (CURVES, shifted)])
    dataset = EquationOfState(moments="magnitudes", states=("fm",)).run(atoms, committee)
    assert values(dataset, Number(**NUMBERS["V0"])) == pytest.approx([11.3, 11.5], rel=1e-6)
    with pytest.raises(BenchmarkError, match="no variable 'V1'"):
        values(dataset, Number("V1"))
    with pytest.raises(BenchmarkError, match="has the dimension"):
        values(dataset, Number("V0", {"state": "fm"}))


def labelled(atoms, toy, energy=0.0, force=0.0, stress=0.0, magnetic=0.0, **info):
    """Frame with the toy's own values, made wrong by constants."""
    spin, m = SpinCalculator(toy), moments_of(atoms)
    frame = atoms.copy()
    frame.arrays["magnetic_forces"] = spin.magnetic_forces(bare(atoms), m) + magnetic
    frame.info |= info
    frame.calc = SinglePointCalculator(
        frame,
        energy=spin.energy(bare(atoms), m) + energy,
        forces=spin.forces(bare(atoms), m) + force,
        stress=spin.stress(bare(atoms), m) + stress,
    )
    return frame


def test_errors_against_labels_are_those_that_were_put_in():
    toy = CapableToy(Landau(0.5, 0.05))
    frames = []
    for k, symbols in enumerate(("FeFe", "FeAl") * 4):
        atoms = Atoms(symbols, scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.8 + 0.02 * k] * 3, pbc=True)
        atoms.set_initial_magnetic_moments([[0, 0, 2.0], [0, 0.3, 0.1]])
        zero = -3.0 * symbols.count("Fe") + 5.0 * symbols.count("Al")
        wrong = 0.02 * (1 if k < 4 else -1)
        frames.append(labelled(atoms, toy, zero + wrong, 0.03, 0.001, 0.005))
    found = errors_of(frames, SpinCalculator(toy))
    assert found["energy"] == pytest.approx(0.01, rel=1e-6)
    assert found["forces"] == pytest.approx(0.03, rel=1e-6)
    assert found["stress"] == pytest.approx(0.001 * GPA, rel=1e-6)
    assert found["magnetic_forces"] == pytest.approx(0.005, rel=1e-6)


def test_anisotropy_error_is_about_the_mean_of_each_group():
    atoms = bulk("Fe", "bcc", 2.83, cubic=True)
    frames = []
    for group, offset in (("a", 1.0), ("b", -7.0)):
        for k, n in enumerate(((0, 0, 1), (1, 0, 0), (0, 1, 0), (0.6, 0, 0.8))):
            turned = atoms.copy()
            turned.set_initial_magnetic_moments(None)
            turned.set_initial_magnetic_moments(np.outer([2.2, 2.2], n))
            wrong = 2e-5 * (-1) ** k
            frames.append(labelled(turned, CapableToy(Uniaxial(1e-4)), offset + wrong, anisotropy_group=group))
    found = anisotropy_errors(frames, SpinCalculator(CapableToy(Uniaxial(1e-4))))
    assert found["anisotropy"] == pytest.approx(1e-5, rel=1e-5)
    assert found["size"] > 1e-5


def frame(symbols, cell, scaled, name, energy=0.0, forces=None, stress=None, moment=2.0):
    atoms = Atoms(symbols, cell=cell, scaled_positions=scaled, pbc=True)
    atoms.set_initial_magnetic_moments([moment] * len(atoms))
    atoms.info |= {"parent": name, "name": f"{name}-m0"}
    forces = np.zeros((len(atoms), 3)) if forces is None else forces
    atoms.calc = SinglePointCalculator(
        atoms, energy=energy, forces=forces, stress=np.zeros(6) if stress is None else stress
    )
    return atoms


@pytest.mark.parametrize("primitive", [True, False])
def test_derived_values_of_a_crystal_with_known_constants(primitive):
    """Birch-Murnaghan curve, cubic elastic constants under pressure, in a bcc and in a CsCl cell."""
    e0, v0, b0, b1 = CURVES["fm"]
    c11, c12, c44 = 1.5, 0.9, 0.7
    symbols, count = ("Fe", 1) if primitive else ("FeAl", 2)
    ideal = np.array([[-0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.5, 0.5, -0.5]]) if primitive else np.eye(3)
    scaled = [[0, 0, 0], [0.5, 0.5, 0.5]][:count]
    groups = {"X-fm-eos": [], "X-fm-tetragonal": [], "X-fm-shear": []}
    for k, volume in enumerate(np.linspace(0.94, 1.06, 7) * v0):
        a = (2 * volume) ** (1 / 3)
        energy = count * float(birch_murnaghan(volume, e0, v0, b0, b1))
        groups["X-fm-eos"].append(
            frame(symbols, a * ideal, scaled, f"X-fm-eos-{k}", energy, moment=2 + 0.1 * (volume - v0))
        )
    pressure = 0.02
    for k, e in enumerate((0.01, -0.01)):
        strain = np.diag([-e / 2, -e / 2, e])
        stress = np.array([c11 * strain[i, i] + c12 * (np.trace(strain) - strain[i, i]) for i in range(3)] + [0] * 3)
        cell = 2.83 * ideal @ (np.eye(3) + strain)
        groups["X-fm-tetragonal"].append(
            frame(
                symbols, cell, scaled, f"X-fm-tetragonal-{k}", stress=stress - pressure * np.array([1, 1, 1, 0, 0, 0])
            )
        )
    strain = np.zeros((3, 3))
    strain[0, 1] = strain[1, 0] = 0.005
    stress = np.array([0, 0, 0, 0, 0, c44 * 2 * 0.005])
    groups["X-fm-shear"].append(
        frame(symbols, 2.83 * ideal @ (np.eye(3) + strain), scaled, "X-fm-shear-0", stress=stress)
    )
    found = derived_values(groups)
    assert found["X.fm.V0"]["value"] == pytest.approx(v0, rel=1e-6)
    assert found["X.fm.B0"]["value"] == pytest.approx(GPA * b0, rel=1e-5)
    assert found["X.fm.m0"]["value"] == pytest.approx(2.0, abs=1e-6)
    assert found["X.fm.C11"]["value"] == pytest.approx(GPA * (b0 + 2 / 3 * (c11 - c12)), rel=1e-3)
    assert found["X.fm.C12"]["value"] == pytest.approx(GPA * (b0 - 1 / 3 * (c11 - c12)), rel=1e-3)
    assert found["X.fm.C44"]["value"] == pytest.approx(GPA * c44, rel=1e-3)
    assert "X-fm-eos-0-m0" in found["X.fm.V0"]["source"]


def test_frozen_phonon_frequency():
    """Two masses on a spring: ω² = k (1/m1 + 1/m2), in ASE's own units of time."""
    atoms = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.87] * 3, pbc=True)
    shift = np.array([0.03, 0.0, 0.04])
    atoms.positions[1] += shift
    k = 7.0
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.array([k * shift, -k * shift]))
    omega = np.sqrt(k * (1 / atoms.get_masses()).sum())
    assert frozen_phonon(atoms) == pytest.approx(omega * units.second * 1e-12 / (2 * np.pi), rel=1e-6)


def test_compare_puts_two_results_side_by_side(tmp_path):
    def result(value):
        entry = {"value": value, "spread": None, "unit": "u", "tolerance": 0.5, "verdict": OK}
        return {"systems": {"FeAl": {"a": entry}}}

    assert compare(result(1.0), result(2.0)) == [("a", "u", "1", "2", "+2.00")]
    first = tmp_path / "a.json"
    first.write_text(json.dumps(result(1.0)))
    second = tmp_path / "b.json"
    second.write_text("{}")
    assert main(["compare", str(first), str(first)]) == 0
    assert main(["compare", str(first), str(second)]) == 2
    assert main(["compare", str(first), str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize("name", SYSTEMS)
def test_shipped_references_are_complete(name):
    system = read_system(name)
    computed = [q for task in system.tasks for q in task.numbers]
    assert sorted(computed) == sorted(system.quantities)
    assert len({task.name for task in system.tasks}) == len(system.tasks)
    for known in system.quantities.values():
        assert known.unit
        assert known.reason
        assert all(r.source and r.uncertainty >= 0 for r in known.references)


@pytest.mark.parametrize("name", SYSTEMS)
def test_own_dft_is_what_its_frames_give(name):
    """The values beside the frames are those that `mmace-bench derive` computes from them."""
    folder = Path(mmace_bench.__file__).parent / name / "references"
    stored = json.loads((folder / "values.json").read_text())["values"]
    import ase.io

    groups = {}
    for atoms in ase.io.read(folder / "dft.extxyz", ":"):
        groups.setdefault(atoms.info["parent"].rsplit("-", 1)[0], []).append(atoms)
    again = derived_values(groups)
    assert set(stored) == set(again)
    for key, entry in stored.items():
        assert again[key]["value"] == pytest.approx(entry["value"], rel=1e-6)


def test_shipped_model_gives_the_stored_results(tmp_path, capsys):
    status = main(["run", "all", "--quick", "--work", str(tmp_path / "work")])
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "FeNi"], "FeNi"),
        (["run", "FeAl", "--json", "/nowhere/out.json"], "nowhere"),
        (["run", "FeAl", "--calculator", "nothing"], "names no factory"),
        (["derive", "X"], "X"),
    ],
)
def test_refusals_are_one_sentence(arguments, words, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_broken_reference_file_is_named(toy_system, capsys):
    (toy_system / "FeAl/references.json").write_text(json.dumps({"V0": {**quantity(1.0), "tolerance": 0.0}}))
    assert run("--calculator", "factory.py:make") == 2
    assert "positive tolerance" in capsys.readouterr().err


def test_labels_of_test_parents_alone_are_compared(toy_system):
    from mmace_bench.calculate import label_frames
    from mmace_bench.systems import System, Task

    folder = toy_system / "FeAl"
    (folder / "data").mkdir()
    (folder / "splits.json").write_text(json.dumps({"train": ["a"], "valid": [], "test": ["b"]}))
    frames = [frame("Fe", np.eye(3) * 2.5, [[0, 0, 0]], name) for name in ("a", "b")]
    write(folder / "data" / "x.extxyz", frames)
    task = Task("labels", "", "labels", {"files": ("x.extxyz",), "kind": "energies"}, False, "fixed", True, {})
    found = label_frames(System("FeAl", folder, {}, (task,), {}), task)
    assert [a.info["parent"] for a in found] == ["b"]
