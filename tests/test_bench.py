"""The benchmark on a crystal with a closed-form answer, its comparisons, its references and its stored results."""

import json
import sys
import textwrap
from base64 import b64decode
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import mmace_bench
import mmace_props
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.stress import voigt_6_to_full_3x3_strain
from matplotlib.figure import Figure
from mmace_bench import calculate, cli, systems
from mmace_bench.analyse import COARSE, INCOMPLETE, MISS, OK, SHOWN, UNKNOWN, changes, compare, lines_of, verdict
from mmace_bench.calculate import (
    Outcome,
    anisotropy_errors,
    curve_at,
    errors_of,
    identity,
    parity,
    refitted,
    robust_shift,
    shares,
    state_energies,
    values,
)
from mmace_bench.cli import main
from mmace_bench.derivation import Crystal, Derivation, read_derivation
from mmace_bench.derive import (
    all_values,
    anisotropy_values,
    axis_energies,
    derived_values,
    equation_of_state,
    frozen_phonon,
    hill_shear,
    magnetoelastic,
)
from mmace_bench.errors import BenchmarkError
from mmace_bench.rendering import html
from mmace_bench.report import Entry, Picture, Report, Section, aligned_points, curve_of, figures, reference_points
from mmace_bench.systems import JUDGES, SUMS, SYSTEMS, Number, Quantity, Reference, System, Task, read_system, terms_of
from mmace_props import sources
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
    return {**sum_of(value), "tolerance": tolerance, "reason": "a test"}


def sum_of(value):
    """Entry of a quantity whose tolerance follows from its terms."""
    known = [{"value": value, "uncertainty": 0.0, "kind": "own DFT", "source": "closed form"}]
    return {"text": "q", "unit": "u", "references": known}


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
        "gap": sum_of(2 * (v0 - GPA * b0)),
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


class Page(HTMLParser):
    """Texts of the cells by row, addresses, and what a page would fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.ids, self.links, self.images, self.foreign = [], set(), set(), [], []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        elif tag == "img":
            self.images.append(known["src"])
        elif tag in ("script", "link", "iframe", "object"):
            self.foreign.append(tag)
        self.ids |= {known["id"]} if "id" in known else set()
        self.links |= {known["href"]} if "href" in known else set()

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data


def test_html_report_is_one_page_with_the_cells_of_the_markdown(toy_system):
    for name in ("report.md", "report.html"):
        assert run("--calculator", "factory.py:make", "--report", name) == 0
    page = Page(Path("report.html").read_text())
    rows = [line.strip("|").split("|") for line in Path("report.md").read_text().splitlines() if line.startswith("| ")]
    assert [[c.strip() for c in row] for row in page.rows] == [[c.strip(" *") for c in row] for row in rows]
    assert len(page.images) == 1
    picture = b64decode(page.images[0].removeprefix("data:image/png;base64,"), validate=True)
    assert picture.startswith(b"\x89PNG")
    assert page.foreign == []
    assert page.links == {"#FeAl", "#FeAl-pictures", "#FeAl-sources"}
    assert {link[1:] for link in page.links} <= page.ids


def test_html_report_escapes_its_texts():
    text = "<script>alert('a')</script> & \"b\""
    entry = Entry((text, "u", "1", "", "", "", "", "1", MISS), MISS)
    picture = Picture("p", text, Figure(figsize=(1, 1)))
    page = html(Report(text, [Section("X", [entry], {MISS: 1}, [text], [picture], [text])]))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 6
    assert Page(page).rows[1][0] == text


def test_report_of_an_unknown_format_is_refused_before_anything_is_computed(toy_system, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run_system", None)
    assert run("--calculator", "factory.py:make", "--report", "report.pdf") == 2
    assert "ending in .md or .html" in capsys.readouterr().err


def test_quick_leaves_out_the_rest_and_a_second_run_reads_what_the_first_made(toy_system, monkeypatch):
    assert run("--calculator", "factory.py:make", "--quick", "--json", "one.json") == 0
    assert set(json.loads(Path("one.json").read_text())["systems"]["FeAl"]) == {"V0", "B0", "nm"}

    def refuse(name):
        raise AssertionError(f"{name} was computed again")

    monkeypatch.setattr("mmace_bench.calculate.load_property", refuse)
    assert run("--calculator", "factory.py:make", "--quick", "--json", "two.json") == 0
    assert Path("one.json").read_text() == Path("two.json").read_text()


ANONYMOUS = """
from tests.toys import CapableToy, MagneticEquationOfState

class Nameless(CapableToy):
    def provenance(self):
        return {}

def make(model, soc, moments, device, dtype):
    return Nameless(MagneticEquationOfState(%r), soc=soc, moments=moments)

def other(model, soc, moments, device, dtype):
    return Nameless(MagneticEquationOfState(%r), soc=soc, moments=moments)
"""


def test_work_of_another_factory_or_of_changed_code_is_not_taken_over(toy_system, monkeypatch):
    """A calculator without provenance is told from another of its class by its factory, and by the factory's code."""
    changed = {**CURVES, "fm": (-8.1, 11.7, 1.15, 5.1)}
    Path("nameless.py").write_text(ANONYMOUS % (CURVES, changed))
    Path("edited.py").write_text(ANONYMOUS % (CURVES, CURVES))

    def volume(factory):
        assert run("--calculator", factory, "--quick", "--json", "out.json") == 0
        return json.loads(Path("out.json").read_text())["systems"]["FeAl"]["V0"]["value"]

    assert volume("nameless.py:make") == pytest.approx(11.3, rel=1e-6)
    assert volume("nameless.py:other") == pytest.approx(11.7, rel=1e-6)
    assert volume("edited.py:make") == pytest.approx(11.3, rel=1e-6)
    Path("edited.py").write_text(ANONYMOUS % (changed, CURVES))
    assert volume("edited.py:make") == pytest.approx(11.7, rel=1e-6)


def test_key_of_the_work_folder_holds_the_source_of_the_suite(tmp_path, monkeypatch):
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "__init__.py").write_text("")
    (suite / "eos.py").write_text("one = 1")
    monkeypatch.setattr(mmace_props.__spec__, "submodule_search_locations", [str(suite)])
    sources.package_source.cache_clear()
    before = identity("mmace.calculator:load", "default")
    assert before["factory_source"]
    (suite / "eos.py").write_text("one = 2")
    assert identity("mmace.calculator:load", "default") == before, "a process goes on with what it loaded"
    sources.package_source.cache_clear()
    after = identity("mmace.calculator:load", "default")
    assert {k for k in before if before[k] != after[k]} == {"suite"}
    sources.package_source.cache_clear()


def test_a_factory_in_the_working_directory_has_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "lying_here.py").write_text("def make(**options):\n    return None\n")
    found = identity("lying_here:make", "default")["factory_source"]
    assert found
    assert found == identity("lying_here.py:make", "default")["factory_source"]


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quick"], "whole results"),
        (["--model", "other.json"], "shipped model"),
        (["--calculator", "factory.py:make"], "shipped model"),
    ],
)
def test_only_whole_results_of_the_shipped_model_are_stored(toy_system, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(cli, "run_system", None)
    assert run("--update", "why", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (toy_system / "FeAl/results").exists()


def test_a_work_folder_that_cannot_be_made_is_named(toy_system, capsys):
    Path("taken").write_text("")
    assert run("--calculator", "factory.py:make", "--work", "taken") == 2
    message = capsys.readouterr().err
    assert "taken" in message
    assert message.count("\n") == 1


def test_change_beyond_noise_counts_either_way():
    def entry(value):
        return {"value": value, "unit": "u", "tolerance": 2.0, "verdict": OK}

    assert changes({"a": entry(1.0)}, {"a": entry(1.019), "b": entry(3.0)}) == []
    assert len(changes({"a": entry(1.0)}, {"a": entry(1.021)})) == 1
    assert len(changes({"a": entry(1.0)}, {"a": entry(0.979)})) == 1
    assert len(changes({"a": entry(1.0)}, {})) == 1
    lost = {**entry(None), "note": "moments vanished"}
    assert "moments vanished" in changes({"a": lost}, {"a": entry(1.0)})[0]
    fewer = {**entry(1.0), "members": "3 of 4"}
    assert changes({"a": fewer}, {"a": entry(1.0)}) == ["a: all members became 3 of 4"]


def of(*references, tolerance=0.5, zero=""):
    return Quantity("q", "q", "u", tolerance, "a test", references, zero)


def test_verdict_takes_the_first_kind_there_is():
    own, paper = Reference(10.0, 0.0, "own DFT", "a"), Reference(20.0, 1.0, "published DFT", "b")
    assert verdict(of(own, paper), 10.49) == OK
    assert verdict(of(own, paper), 20.0) == MISS
    assert verdict(of(paper), 21.49) == OK
    assert verdict(of(paper), 21.51) == MISS
    assert verdict(of(), 1.0) == UNKNOWN


@pytest.mark.parametrize("kind", ["training label", "experiment", "quoted value"])
def test_labels_of_the_training_measurements_and_quotations_give_no_verdict(kind):
    shown = Reference(10.0, 0.0, kind, "a")
    assert verdict(of(shown), 10.0) == verdict(of(shown), 99.0) == SHOWN
    assert verdict(of(Reference(20.0, 0.0, "published DFT", "b"), shown), 10.0) == MISS


def test_what_zero_would_nearly_pass_is_no_ok():
    weak = Reference(1.0, 0.1, "own DFT", "a")
    assert verdict(of(weak), 1.0) == COARSE
    assert verdict(of(weak), 9.0) == MISS
    assert verdict(of(weak, tolerance=0.4), 1.0) == OK
    assert verdict(of(Reference(0.0, 0.0, "own DFT", "a"), zero="an error"), 0.1) == OK


def test_members_without_a_number_are_counted_and_named(toy_system):
    """Sums pair members by their number in the committee, and what is left of one has no plain ok."""
    system = read_system("FeAl", toy_system / "FeAl")
    e0, v0, b0, _ = CURVES["fm"]
    eos = {
        "V0": dict.fromkeys(range(4), v0),
        "B0": {0: GPA * b0, 2: GPA * b0 - 2.0, 3: GPA * b0 + 2.0},
        "nm": {1: 1000 * (CURVES["nm"][0] - e0)},
    }
    outcome = Outcome(eos, 4, lost="member 2: it fell apart")
    lines = {line.quantity.name: line for line in lines_of(system, {"Fe-eos": outcome})}
    assert (lines["V0"].verdict, lines["V0"].note) == (OK, "")
    assert lines["nm"].value is None
    assert lines["nm"].note == "1 of 4 members; member 2: it fell apart"
    task = system.tasks[1]
    total = calculate._sum(task, {"Fe-eos": outcome})
    assert total.numbers["gap"] == pytest.approx({k: 2 * (v0 - eos["B0"][k]) for k in (0, 2, 3)})
    found = lines_of(system, {task.name: total})[0]
    assert found.verdict == INCOMPLETE
    assert (found.members, found.committee, found.note) == (3, 4, "3 of 4 members; member 2: it fell apart")


def test_values_of_a_committee_come_member_by_member():
    from mmace_props.eos import EquationOfState

    shifted = {**CURVES, "fm": (-8.1, 11.5, 1.15, 5.1)}
    atoms = bulk("Fe", "bcc", 2.83, cubic=True)
    atoms.set_initial_magnetic_moments([2.2, 2.2])
    committee = CommitteeToy([CapableToy(MagneticEquationOfState(c)) for c in (CURVES, shifted)])
    dataset = EquationOfState(moments="magnitudes", states=("fm",)).run(atoms, committee)
    assert values(dataset, Number(**NUMBERS["V0"])) == pytest.approx({0: 11.3, 1: 11.5}, rel=1e-6)
    with pytest.raises(BenchmarkError, match="no variable 'V1'"):
        values(dataset, Number("V1"))
    with pytest.raises(BenchmarkError, match="has the dimension"):
        values(dataset, Number("V0", {"state": "fm"}))


def test_curves_are_fitted_through_the_volumes_of_the_reference():
    """Fits of one state are replaced; a member without a curve there has no fit and is named."""
    from mmace_props.eos import EquationOfState

    volumes = (9.7, 10.7, 11.3, 12.0, 12.9)
    atoms = bulk("Fe", "bcc", 2.83, cubic=True)
    atoms.set_initial_magnetic_moments([2.2, 2.2])
    shifted = {**CURVES, "fm": (-8.1, 11.5, 1.15, 5.1)}

    def committee_of(*curves):
        return CommitteeToy([CapableToy(MagneticEquationOfState(c), moments="magnitudes") for c in curves])

    committee = committee_of(CURVES, shifted)
    curve = curve_at(atoms, SpinCalculator(committee), "fm", volumes[::-1])
    assert curve["volume"].values == pytest.approx(volumes)
    wrong = committee_of(*({**c, "fm": (-8.1, 10.9, 1.5, 4.0)} for c in (CURVES, shifted)))
    dataset = EquationOfState().run(atoms, wrong)
    found = refitted(dataset, "fm", curve)
    assert values(found, Number("V0", NUMBERS["V0"]["where"])) == pytest.approx({0: 11.3, 1: 11.5}, rel=1e-6)
    assert float(found["V0_std"].sel(state="fm", **FIT)) == pytest.approx(np.sqrt(0.02), rel=1e-4)
    assert float(found["V0"].sel(state="nm", **FIT)) == float(dataset["V0"].sel(state="nm", **FIT))
    partial = refitted(dataset, "fm", curve.isel(member=[1]).assign_attrs(members_without_result="member 1: gone"))
    assert values(partial, Number("V0", NUMBERS["V0"]["where"])) == pytest.approx({0: np.nan, 1: 11.5}, nan_ok=True)
    assert partial.attrs["members_without_result"] == "member 1: gone"


def test_energies_of_states_relax_only_the_moments_that_there_are():
    """E = −a m² + b m⁴ for each atom, lowest at √(a/2b)."""
    landau = Landau(0.5, 0.05)
    atoms = Atoms("FeFe", scaled_positions=[[0] * 3, [0.5] * 3], cell=[2.8] * 3, pbc=True)
    toy = SpinCalculator(CapableToy(landau))
    fixed = state_energies(atoms, [[0, 0], [1.0, 1.0], [[1.0, 0, 0], [0, 0, 1.0]]], toy)
    assert fixed["length"].values == pytest.approx([0, 1, 1])
    assert fixed["angle"].values == pytest.approx([0, 0, 90])
    expected = [toy.energy(atoms, np.outer([m, m], [0, 0, 1])) / 2 for m in (0.0, 1.0)]
    assert fixed["energy"].values[:2] == pytest.approx(expected)
    relaxed = state_energies(atoms, [[0, 0], [1.0, 1.0]], toy, "magnitudes")
    assert float(relaxed["energy"][0]) == pytest.approx(expected[0])
    assert float(relaxed["energy"][1]) < expected[1]
    gone = state_energies(atoms, [[0, 0], [1.0, 1.0]], SpinCalculator(CapableToy(Landau(-0.5, 0.05))), "magnitudes")
    assert np.isnan(gone["energy"].values).tolist() == [False, True]
    assert gone.attrs["members_without_result"].startswith("member 1: a moment of state 1 [1.0, 1.0] vanishes")
    assert fixed.attrs["members_without_result"] == ""
    assert relaxed["site_length"].values == pytest.approx(np.outer([0, 1], [np.sqrt(5)] * 2), abs=1e-5)


def test_sum_of_quantities_and_a_volume_between_points(toy_system):
    plan = json.loads((toy_system / "FeAl/benchmark.json").read_text())
    plan["tasks"][0]["numbers"]["moment"] = {"variable": "moment", "where": {"state": "fm", "volume": 11.0}}
    terms = {"V0": 2.0, "B0": -0.5}
    plan["tasks"].append(
        {"name": "sum", "property": "combination", "options": {"terms": terms}, "numbers": {"sum": {"variable": ""}}}
    )
    (toy_system / "FeAl/benchmark.json").write_text(json.dumps(plan))
    known = json.loads((toy_system / "FeAl/references.json").read_text())
    (toy_system / "FeAl/references.json").write_text(json.dumps({**known, "sum": sum_of(0), "moment": quantity(0)}))
    assert run("--calculator", "factory.py:make", "--json", "out.json") == 0
    found = json.loads(Path("out.json").read_text())["systems"]["FeAl"]
    assert found["sum"]["value"] == pytest.approx(2 * found["V0"]["value"] - 0.5 * found["B0"]["value"])
    assert found["moment"]["value"] > 0
    plan["tasks"][0]["numbers"]["moment"]["where"]["volume"] = 30.5
    (toy_system / "FeAl/benchmark.json").write_text(json.dumps(plan))
    assert run("--calculator", "factory.py:make", "--json", "far.json") == 0, "other numbers do not suffer"
    far = json.loads(Path("far.json").read_text())["systems"]["FeAl"]
    assert far["moment"]["verdict"] == "not computed"
    assert far["sum"] == found["sum"]


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
    """Constants of the elements that another code has are found in spite of a frame that is far off."""
    toy = CapableToy(Landau(0.5, 0.05))
    frames = []
    for k, symbols in enumerate(("FeFe", "FeAl") * 5):
        atoms = Atoms(symbols, scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.8 + 0.02 * k] * 3, pbc=True)
        atoms.set_initial_magnetic_moments([[0, 0, 2.0], [0, 0.3, 0.1]])
        zero = -3.0 * symbols.count("Fe") + 5.0 * symbols.count("Al")
        wrong = 2.0 if k == 3 else 0.02 * (k // 2 - 2)
        frames.append(labelled(atoms, toy, zero + wrong, 0.03, 0.001, 0.005))
    found = errors_of(frames, SpinCalculator(toy))
    assert found["energy_median"] == pytest.approx(0.01, rel=1e-6)
    assert found["energy"] > 0.3
    assert found["forces"] == pytest.approx(0.03, rel=1e-6)
    assert found["forces_median"] == pytest.approx(0.03, rel=1e-6)
    assert found["stress"] == pytest.approx(0.001 * GPA, rel=1e-6)
    assert found["magnetic_forces"] == pytest.approx(0.005, rel=1e-6)


class MMACECalculator(CapableToy):
    """A toy that claims to be the calculator that was fitted to the labels' total energies."""


def test_a_model_of_the_labels_has_no_constants_of_its_own():
    toy = MMACECalculator(Landau(0.5, 0.05))
    atoms = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.8] * 3, pbc=True)
    atoms.set_initial_magnetic_moments([[0, 0, 2.0], [0, 0.3, 0.1]])
    assert errors_of([labelled(atoms, toy, 0.08)], SpinCalculator(toy))["energy"] == pytest.approx(0.04, rel=1e-6)


def test_robust_constants_pass_by_bad_frames():
    rng = np.random.default_rng(0)
    fractions = rng.dirichlet([1, 1], 41)
    errors = fractions @ [0.3, -0.7]
    errors[:8] += 5.0
    assert robust_shift(fractions, errors) == pytest.approx([0.3, -0.7], abs=1e-9)


def test_components_that_symmetry_holds_at_zero_leave_the_median_alone():
    label, predicted = np.array([0.0, 0.0, 0.0, 1.0, 2.0]), np.array([0.0, 1e-12, 0.0, 1.5, 2.1])
    found = calculate._errors({"forces": (label, predicted), "anisotropy": (label, predicted)})
    assert found["forces_median"] == pytest.approx(0.3)
    assert found["anisotropy_median"] == pytest.approx(0.0, abs=1e-9)


def test_shares_of_the_squared_error_name_the_parents_that_hold_most():
    pairs = [(np.zeros(2), np.full(2, x)) for x in (1.0, 3.0, np.nan, 2.0)]
    text = shares("energy", "parents", ["a", "b", "b", "c"], [pairs])
    assert text == "squared error of energy over 3 parents, the most of it in b (64 %)"


def test_pictures_hold_the_references_of_bands_scans_and_labels(tmp_path):
    """Every dataset that has one is drawn, with its references at their wave vector or state."""
    import xarray as xr

    q = np.linspace([0, 0, 0], [0.5, 0, 0], 11)
    bands = xr.Dataset(
        {"frequency": (("wave", "branch"), np.random.default_rng(0).random((11, 3))), "q": (("wave", "xyz"), q)},
        {"position": ("wave", np.linspace(0, 1, 11))},
        attrs={"formula": "Fe"},
    )
    energies = 0.1 * np.array([0.0, 1, 4, 9])
    scan = xr.Dataset(
        {"energy": ("state", energies), "angle": ("state", np.zeros(4)), "length": ("state", np.arange(4.0))},
        attrs={"formula": "Fe"},
    )
    pairs = {name: (np.arange(5.0), np.arange(5.0) + 0.1) for name in ("energy", "forces", "stress", "magnetic_forces")}
    datasets = {
        "bands": bands,
        "scan": scan,
        "labels": parity([pairs, pairs]),
        "directions": parity([{"anisotropy": pairs["energy"]}]),
    }
    numbers = {
        "bands": {"f": Number("frequency", {"q": [0.5, 0, 0], "branch": 0})},
        "scan": {"e": Number("energy", {"state": 3}, {"state": 1}, 1000)},
    }
    properties = {"bands": "phonon", "scan": "states", "labels": "labels", "directions": "labels"}
    tasks = tuple(
        Task(name, "", kind, {}, False, "fixed", True, numbers.get(name, {})) for name, kind in properties.items()
    )
    known = {
        "f": Quantity("f", "f", "THz", 1.0, "a test", (Reference(0.7, 0.1, "own DFT", "s"),)),
        "e": Quantity("e", "e", "meV", 1.0, "a test", (Reference(810.0, 0.1, "own DFT", "s"),)),
    }
    drawn = {name: figure for name, _, figure in figures(System("X", tmp_path, {}, tasks, known), datasets)}
    assert set(drawn) == set(properties)

    def points(name):
        return [line.get_xydata()[0].tolist() for line in drawn[name].axes[0].lines if line.get_marker() == "o"]

    assert points("bands") == [[1.0, 0.7]]
    assert points("scan")[0] == pytest.approx([3.0, 910.0])
    assert len(drawn["labels"].axes) == 4


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
    atoms.set_initial_magnetic_moments(np.broadcast_to(moment, len(atoms)))
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
    size, h = 2.83**3 / 2, 1e-3
    curve = birch_murnaghan(size + h * np.array([-1, 0, 1]), e0, v0, b0, b1)
    bulk = size * float(curve @ [1, -2, 1]) / h**2
    symbols, count = ("Fe", 1) if primitive else ("FeAl", 2)
    ideal = np.array([[-0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.5, 0.5, -0.5]]) if primitive else np.eye(3)
    scaled = [[0, 0, 0], [0.5, 0.5, 0.5]][:count]
    groups = {"X-fm-eos": [], "X-fm-tetragonal": [], "X-fm-shear": []}
    for k, volume in enumerate(np.linspace(0.94, 1.06, 7) * v0):
        a = (2 * volume) ** (1 / 3)
        energy = count * float(birch_murnaghan(volume, e0, v0, b0, b1))
        h = 1e-4 * volume
        slope = (birch_murnaghan(volume + h, e0, v0, b0, b1) - birch_murnaghan(volume - h, e0, v0, b0, b1)) / (2 * h)
        stress, moment = float(slope) * np.array([1, 1, 1, 0, 0, 0]), 2 + 0.1 * (volume - v0)
        groups["X-fm-eos"].append(
            frame(symbols, a * ideal, scaled, f"X-fm-eos-{k}", energy, stress=stress, moment=moment)
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
    found = derived_values(groups, Derivation())
    assert found["X.fm.V0"]["value"] == pytest.approx(v0, rel=1e-6)
    assert found["X.fm.B0"]["value"] == pytest.approx(GPA * b0, rel=1e-5)
    assert found["X.fm.m0"]["value"] == pytest.approx(2.0, abs=1e-6)
    assert abs(bulk / b0 - 1) > 0.01
    assert found["X.fm.C11"]["value"] == pytest.approx(GPA * (bulk + 2 / 3 * (c11 - c12)), rel=1e-3)
    assert found["X.fm.C12"]["value"] == pytest.approx(GPA * (bulk - 1 / 3 * (c11 - c12)), rel=1e-3)
    assert found["X.fm.K"]["value"] == pytest.approx(GPA * bulk, rel=1e-3)
    voigt, reuss = (c11 - c12 + 3 * c44) / 5, 5 * (c11 - c12) * c44 / (4 * c44 + 3 * (c11 - c12))
    assert found["X.fm.G"]["value"] == pytest.approx(GPA * (voigt + reuss) / 2, rel=1e-3)
    assert found["X.fm.C44"]["value"] == pytest.approx(GPA * c44, rel=1e-3)
    assert "X-fm-eos-0-m0" in found["X.fm.V0"]["source"]
    assert found["X.fm.B0_prime"]["value"] == pytest.approx(b1, rel=1e-4)
    assert found["X.fm.m_high"]["value"] == pytest.approx(2 + 0.1 * 0.06 * v0, rel=1e-6)
    assert all(entry["uncertainty"] > 0 for key, entry in found.items() if not {"V0", "B0", "K"} & set(key.split(".")))
    assert {entry["kind"] for entry in found.values()} == {"own DFT"}


def test_a_curve_is_as_uncertain_as_its_ends_make_it():
    """One energy at an end that is off by 10 meV moves the curve without it by more than the scatter about the fit."""
    frames = []
    for k, volume in enumerate(np.linspace(0.94, 1.06, 5) * CURVES["fm"][1]):
        energy = float(birch_murnaghan(volume, *CURVES["fm"])) + (0.01 if k == 4 else 0.0)
        frames.append(frame("Fe", volume ** (1 / 3) * np.eye(3), [[0] * 3], f"X-fm-eos-{k}", energy))
        frames[-1].calc.results.pop("stress")
    curve = equation_of_state(frames)
    assert curve.others[1] == pytest.approx(CURVES["fm"], rel=1e-6)
    assert curve.errors[2] >= abs(curve.fit[2] - CURVES["fm"][2])
    value, error = curve.bulk_modulus(CURVES["fm"][1])
    assert error >= abs(value - CURVES["fm"][2])


def test_hill_modulus_of_an_isotropic_crystal_is_its_shear_constant():
    value, error = hill_shear([3.0, 1.0, 1.0], [0.4, 0.2, 0.0])
    assert value == pytest.approx(1.0)
    assert error == pytest.approx(2 / 5 * np.sqrt(0.75 * (0.4**2 - 0.2**2)), rel=0.1)


def test_no_strain_gives_no_elastic_constants():
    e0, v0, b0, b1 = CURVES["fm"]
    groups = {"X-fm-eos": [], "X-fm-tetragonal": [], "X-fm-shear": []}
    for k, volume in enumerate(np.linspace(0.94, 1.06, 7) * v0):
        cell = volume ** (1 / 3) * np.eye(3)
        groups["X-fm-eos"].append(
            frame("Fe", cell, [[0] * 3], f"X-fm-eos-{k}", float(birch_murnaghan(volume, e0, v0, b0, b1)))
        )
    for tag in ("tetragonal", "shear"):
        groups[f"X-fm-{tag}"] = [frame("FeAl", 2.83 * np.eye(3), [[0] * 3, [0.5] * 3], f"X-fm-{tag}-0")] * 2
    found = derived_values(groups, Derivation())
    assert "X.fm.V0" in found
    assert not {"X.fm.C11", "X.fm.C44", "X.fm.C66"} & set(found)


@pytest.mark.parametrize("turned", [False, True])
def test_shear_constant_and_distortion_come_from_the_cartesian_strain(turned):
    """Cells whose vectors do not lie along the strained axes: a·b of the turned one is zero under ε_xy."""
    c66, spontaneous, a = 0.6, -0.03, 4.1
    cell = a * (np.array([[1, 1, 0], [-0.5, 0.5, 0], [0, 0, 1]]) if turned else np.eye(3))
    places = [[0, 0, 0], [0.5, 0, 0]] if turned else [[0, 0, 0], [0.5, 0.5, 0.5]]
    frames = []
    for k, e in enumerate((-0.015, 0.015)):
        strain = np.array([[1, e, 0], [e, 1, 0], [0, 0, 1]])
        stress = np.array([0, 0, 0, 0, 0, c66 * (2 * e - spontaneous)])
        name = f"X-afm110-shear-{k}"
        frames.append(frame("CrCr", cell @ strain, places, name, stress=stress, moment=[2.0, -2.0]))
    found = derived_values({"X-afm110-shear": frames}, Derivation())
    assert found["X.afm110.C66"]["value"] == pytest.approx(GPA * c66, rel=1e-6)
    assert found["X.afm110.distortion"]["value"] == pytest.approx(np.sqrt(2) * a * spontaneous, rel=1e-6)
    # one strain says nothing where layers along [110] let the crystal shear by itself
    assert ("X.afm110.C66" in derived_values({"X-afm110-shear": frames[:1]}, Derivation())) is not turned


def test_constants_of_a_fourfold_crystal_come_from_opposite_strains():
    """The stress of the unstrained crystal, which it need not be free of, drops out."""
    c, a = {"C11": 3.1, "C12": 0.9, "C13": 0.7, "C33": 2.6, "C44": 0.5, "C66": 0.8}, 4.13
    stiffness = np.diag([c["C11"], c["C11"], c["C33"], c["C44"], c["C44"], c["C66"]])
    stiffness[0, 1] = stiffness[1, 0] = c["C12"]
    stiffness[:2, 2] = stiffness[2, :2] = c["C13"]
    cell, places = a * np.array([[0.5, 0.5, 0], [-0.5, 0.5, 0], [0, 0, 1]]), [[0, 0, 0], [0.5, 0.5, 0.5]]
    frames = []
    for k, (column, size) in enumerate([(2, 0.01), (2, -0.01), (0, 0.01), (0, -0.01), (3, 0.02), (3, -0.01)]):
        strain = size * np.eye(6)[column]
        stress = stiffness @ strain + [0.1, 0.1, -0.05, 0, 0, 0]
        strained = cell @ voigt_6_to_full_3x3_strain(strain)
        frames.append(frame("CrCr", strained, places, f"X-afm001-strain-{k}", stress=stress, moment=[2.0, -2.0]))
    found = derived_values({"X-afm001-strain": frames[:5]}, Derivation())
    assert set(found) == {"X.afm001.C11", "X.afm001.C12", "X.afm001.C13", "X.afm001.C33"}
    found = derived_values({"X-afm001-strain": frames}, Derivation())
    assert {k: found[f"X.afm001.{k}"]["value"] for k in ("C11", "C12", "C13", "C33", "C44")} == pytest.approx(
        {k: GPA * c[k] for k in ("C11", "C12", "C13", "C33", "C44")}, rel=1e-5
    )
    assert found["X.afm001.C44"]["uncertainty"] == pytest.approx(np.sqrt(2) * 0.1 / 0.03, rel=1e-3)
    volumes = []
    for k, scale in enumerate(np.linspace(0.96, 1.04, 5)):
        energy = 2 * float(birch_murnaghan(scale * a**3 / 4, -8.0, a**3 / 4, 1.2, 4.0))
        volumes.append(frame("CrCr", scale ** (1 / 3) * cell, places, f"X-afm001-eos-{k}", energy, moment=[2.0, -2.0]))
    groups = {"X-afm001-eos": volumes, "X-afm001-strain": frames}
    assert "X.afm001.V0" in (known := derived_values(groups, Derivation()))
    assert "X.afm001.G" not in known  # Hill's average of three constants is that of cubic crystals


def test_formation_energy_of_a_vacancy():
    """Eight formula units less an atom that went into the crystal of its element; errors are those of whole cells."""
    tables = Derivation(
        {"FeAl": Crystal(2.87, 2, 2.0), "Fe": Crystal(2.83, 2, 1.0)},
        sums={"vacancy": {"FeAl-fm-vacancy-0-m0": 1.0, "FeAl-fm-eos-3-m0": -8.0, "Fe-fm-eos-1-m0": 1.0}},
    )
    groups = {
        "FeAl-fm-vacancy": [frame("Fe7Al8", np.eye(3), np.zeros((15, 3)), "FeAl-fm-vacancy-0", -70.0)],
        "FeAl-fm-eos": [frame("FeAl", np.eye(3), [[0] * 3, [0.5] * 3], "FeAl-fm-eos-3", -10.0)],
        "Fe-fm-eos": [],
    }
    assert "vacancy" not in derived_values(groups, tables)
    groups["Fe-fm-eos"] = [frame("Fe", np.eye(3), [[0] * 3], "Fe-fm-eos-1", -9.0)]
    found = derived_values(groups, tables)["vacancy"]
    assert found["value"] == pytest.approx(1.0)
    assert found["uncertainty"] == pytest.approx(1e-3 * np.linalg.norm([15 * 2.0, 8 * 2 * 2.0, 1.0]))


def springs(symbols, cell, scaled, index, shift, name, stiff=5.0, cross=1.2):
    """Frame whose atoms are held by springs to their sites and, across elements, by `cross` to the displaced one."""
    atoms = frame(symbols, cell, scaled, name)
    atoms.positions[index] += shift
    forces = np.zeros((len(atoms), 3))
    forces[index] = -stiff * np.array(shift)
    for other in np.flatnonzero(atoms.numbers != atoms.numbers[index]):
        same = (other % 2) == (index % 2)
        forces[other] = (cross if same else -cross) * np.array(shift) / 2
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=forces)
    return atoms


def test_modes_do_not_depend_on_which_jobs_are_finished():
    """A zone-boundary mode keeps the number of its job in the plan; points of pairs wait for all of them."""
    cell, places = 2.83 * np.diag([1, 1, 2]), [[0, 0, 0], [0, 0, 0.5]]
    last = springs("FeFe", cell, places, 1, (0, 0, 0.03), "X-fm-N-2")
    assert list(derived_values({"X-fm-N": [last]}, Derivation())) == ["X.fm.N.2"]
    four = [[0, 0, 0], [0, 0, 0.5], [0.5, 0.5, 0.25], [0.5, 0.5, 0.75]]
    moves = [(0, (0, 0, 0.04)), (2, (0, 0, 0.04)), (0, (0.04, 0, 0)), (2, (0.04, 0, 0))]
    frames = [springs("FeFeAlAl", cell, four, i, u, f"X-fm-X-{k}") for k, (i, u) in enumerate(moves)]
    assert derived_values({"X-fm-X": frames[:3]}, Derivation()) == {}
    found = derived_values({"X-fm-X": frames}, Derivation())
    fe, al = frames[0].get_masses()[[0, 2]]
    coupled = np.array([[5.0 / fe, -1.2 / np.sqrt(fe * al)], [-1.2 / np.sqrt(fe * al), 5.0 / al]])
    modes = np.sqrt(np.linalg.eigvalsh(coupled)) * units.second * 1e-12 / (2 * np.pi)
    expected = sorted([*modes] * 3)
    assert [found[f"X.fm.X.{k}"]["value"] for k in range(6)] == pytest.approx(expected, rel=1e-4)


def test_orders_at_one_volume_need_no_curve():
    """Energies of orders at the volume of the tables, and first and second neighbours' exchange from three orders."""
    j1, j2, a = -9.0, 1.5, 4.12
    energies = {"fm": -12 * j1 - 6 * j2, "afm001": 4 * j1 - 6 * j2, "afm110": 2 * j2}
    groups = {}
    for state, energy in energies.items():
        moments = [2.0, 2.0] if state == "fm" else [2.0, -2.0]
        atoms = frame("Cr2N2", a * np.eye(3) / 2 ** (1 / 3), [[0, 0, 0], [0.5] * 3, [0, 0, 0.5], [0.5, 0, 0]], "n")
        atoms.info |= {"parent": f"CrN-{state}-eos-0", "name": f"{state}-m0"}
        atoms.set_initial_magnetic_moments([*moments, 0, 0])
        atoms.calc = SinglePointCalculator(atoms, energy=2e-3 * energy, forces=np.zeros((4, 3)), stress=np.zeros(6))
        groups[f"CrN-{state}-eos"] = [atoms]
    found = derived_values(groups, read_derivation(read_system("CrN")))
    assert found["CrN.afm001.above_fm_fixed"]["value"] == pytest.approx(8 * j1)
    assert found["CrN.J1_orders"]["value"] == pytest.approx(j1)
    assert found["CrN.J2_orders"]["value"] == pytest.approx(j2)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"label": {}}, "'label' of 'the tables'"),
        ({"labels": {"Fe.angle.61": ["f", "a", "b"]}}, "'Fe.angle.61' of 'labels'"),
        ({"labels": {"Fe.angle.60": ["f", "a"]}}, "no list of 3 names"),
        ({"spirals": {"Fe.spiral.H": ["Fe", "afm"]}}, "'Fe' of 'spirals'"),
        ({"crystals": {"Fe": {"a": 2.83, "atoms": 0, "mesh_noise": 2.6}}}, "positive"),
        ({"crystals": {"Fe": {"a": 2.83}}}, "missing"),
        ({"combinations": {"Fe.spiral.H": {"Fe.angle.60": "much"}}}, "much"),
        ({"moments": {"Fe.spiral.H": ["a"]}}, "unpack"),
        ({"anisotropy": {"Fe.spiral.H": ["a", "x", "w"]}}, "none of x, y, z"),
        ([], "cannot be read"),
    ],
)
def test_broken_tables_of_the_derivation_are_refused(tmp_path, tables, words):
    """A mistyped name would otherwise give one value less, silently."""
    system = read_system("FeAl")
    (tmp_path / "references").mkdir()
    (tmp_path / "references/derivation.json").write_text(json.dumps(tables))
    with pytest.raises(BenchmarkError, match=words):
        read_derivation(System(system.name, tmp_path, {}, (), system.quantities))


def test_every_label_in_the_tables_is_there():
    """A label or a group that is missing would give one value less, silently."""
    for name in SYSTEMS:
        tables, found = read_derivation(read_system(name)), all_values(read_system(name))
        assert {*tables.labels, *tables.moments, *tables.anisotropy, *tables.magnetoelastic} <= set(found)


@pytest.mark.parametrize("name", SYSTEMS)
def test_rows_of_the_labels_count_every_test_parent(name):
    """Canted labels alone are left out: they have another mesh, and their energies another zero."""
    system = read_system(name)
    counted = {file for task in system.tasks if task.property == "labels" for file in task.options["files"]}
    for path in system.folder.glob("data/*.extxyz"):
        tested = [a for a in read(path, ":") if a.info["parent"] in system.test_parents]
        if any("noncollinear" not in a.info["recipe"] for a in tested):
            assert path.name in counted


@pytest.mark.parametrize("name", SYSTEMS)
def test_sums_of_the_model_have_the_factors_of_those_of_dft(name):
    system = read_system(name)
    sums = {quantity: terms_of(t) for t in system.tasks if t.property in SUMS for quantity in t.numbers}
    for quantity, terms in read_derivation(system).combinations.items():
        assert sums[quantity] == terms


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_atom_is_lost_in_a_formation_energy(name):
    """Every element cancels between the cells of a sum, and each phase counts alike in DFT and in the model."""
    system = read_system(name)
    plan = json.loads((system.folder / "references/dft.json").read_text())
    symbols = {job["name"]: Counter(job["symbols"]) for job in plan["jobs"]}
    tasks = {quantity: t for t in system.tasks for quantity in t.numbers}
    for quantity, terms in read_derivation(system).sums.items():
        left: Counter = Counter()
        for frame_name, factor in terms.items():
            left.update({element: factor * count for element, count in symbols[frame_name].items()})
        assert not any(left.values()), quantity
        model = []
        for key, factor in terms_of(tasks[quantity]).items():
            crystal = system.crystals[tasks[key].crystal]
            cells = tasks[key].numbers[key].scale / len(crystal)
            model.append(Counter({e: factor * cells * n for e, n in Counter(crystal.symbols).items()}))
        phases = [Counter({e: factor * n for e, n in symbols[key].items()}) for key, factor in terms.items()]
        assert sorted(map(sorted, (m.items() for m in model))) == sorted(map(sorted, (p.items() for p in phases)))


def test_values_from_labels_of_the_training_are_told_from_own_dft():
    found = all_values(read_system("FeAl"))
    assert {found[key]["kind"] for key in ("Fe.angle.60", "FeAl.moment.1.20", "Fe.B1")} == {"training label"}
    assert {found[key]["kind"] for key in ("Fe.fm.B0", "Fe.stretched.anisotropy")} == {"own DFT"}


def test_groups_that_trained_give_no_reference_of_the_anisotropy():
    quantity, system = "CrN.fm.stretched.anisotropy", read_system("CrN")
    assert list(anisotropy_values(system, Derivation(anisotropy={quantity: ("soc-CrN-FM-0", "x", "z")}))) == [quantity]
    assert anisotropy_values(system, Derivation(anisotropy={quantity: ("soc-CrN-FM-1", "x", "z")})) == {}


def test_energies_along_the_axes_are_those_of_their_directions():
    """A biaxial crystal whose directions come in any order; the sign of a direction does not matter."""
    hard = np.array([3e-6, 8e-6, 1e-6])
    frames = []
    for n in (np.eye(3)[1], -np.eye(3)[0], np.array([0.6, 0.0, 0.8]), np.eye(3)[2]):
        atoms = Atoms("CrN", cell=[3, 4, 5], scaled_positions=[[0] * 3, [0.5] * 3], pbc=True, info={"parent": "p"})
        atoms.set_initial_magnetic_moments([2.4 * n, np.zeros(3)])
        atoms.calc = SinglePointCalculator(atoms, energy=-7.0 + n**2 @ hard)
        frames.append(atoms)
    energies = axis_energies(frames)
    assert energies - energies[2] == pytest.approx([2.0, 7.0, 0.0], abs=1e-6)
    with pytest.raises(BenchmarkError, match="no direction along"):
        axis_energies(frames[1:])


def test_magnetoelastic_slope_is_that_without_strain():
    strain = np.array([0.03, -0.04])
    value, error = magnetoelastic(strain, -2.0 * strain + 5.0 * strain**2)
    assert value == pytest.approx(2.0)
    assert error > 0.2


def test_reference_points_keep_orders_apart_and_one_point_draws_nothing():
    import xarray as xr

    volume = np.linspace(8, 10, 21)
    energy = np.stack([(volume - 9) ** 2, (volume - 9) ** 2 - 0.05])
    dataset = xr.Dataset({"energy": (("state", "volume"), energy)}, {"state": ["fm", "afm"], "volume": volume})
    assert aligned_points({"afm001": [(9.0, -70.0)]}, dataset) == {}
    found = aligned_points({"afm001": [(9.0, -70.0)], "afm110": [(9.0, -70.02)], "fm": [(9.5, -69.6)]}, dataset)
    assert found["afm001"][0] == pytest.approx((9.0, -0.05))
    assert found["afm110"][0] == pytest.approx((9.0, -0.07))
    assert found["fm"][0] == pytest.approx((9.5, 0.35))


def test_frozen_phonon_frequency():
    """Two masses on a spring: ω² = k (1/m1 + 1/m2), in ASE's own units of time."""
    atoms = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.87] * 3, pbc=True)
    shift = np.array([0.03, 0.0, 0.04])
    atoms.positions[1] += shift
    k = 7.0
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.array([k * shift, -k * shift]))
    omega = np.sqrt(k * (1 / atoms.get_masses()).sum())
    assert frozen_phonon(atoms) == pytest.approx(omega * units.second * 1e-12 / (2 * np.pi), rel=1e-6)


def result(value, verdict=OK, reference=None):
    entry = {"value": value, "spread": None, "unit": "u", "tolerance": 0.5, "verdict": verdict}
    if reference is not None:
        entry["reference"] = {"value": reference, "uncertainty": 0.0, "kind": "own DFT"}
    return {"systems": {"FeAl": {"a": entry}}}


def test_compare_says_what_moved_and_which_way():
    plain = compare(result(1.0), result(2.0))[0]
    assert (plain.first, plain.second, plain.moved, plain.towards, plain.verdicts) == ("1", "2", 2.0, "", OK)
    closer = compare(result(1.0, MISS), result(2.0, OK, 2.2))[0]
    assert (closer.towards, closer.reference, closer.verdicts) == ("closer", "2.2 (own DFT)", "miss → ok")
    assert compare(result(2.0), result(1.0, MISS, 2.2))[0].towards == "farther"
    assert np.isnan(compare(result(None), result(1.0))[0].moved)


def test_compare_names_what_one_result_alone_has(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = result(1.0), result(1.1)
    first["systems"]["FeAl"]["gone"] = first["systems"]["FeAl"]["a"]
    second["systems"]["CrN"] = {"new": first["systems"]["FeAl"]["a"], "newer": first["systems"]["FeAl"]["a"]}
    Path("a.json").write_text(json.dumps(first))
    Path("b.json").write_text(json.dumps(second))
    assert main(["compare", "a.json", "b.json", "--markdown", "t.md"]) == 0
    assert "only in a.json: gone\nonly in b.json: new, newer\n" in capsys.readouterr().out
    assert Path("t.md").read_text().endswith("\nonly in a.json: gone\n\nonly in b.json: new, newer\n")
    assert main(["compare", "a.json", "b.json", "--markdown", "a.json"]) == 2
    assert "'a.json' is the first result already" in capsys.readouterr().err


def test_compare_writes_a_table_of_what_moved(tmp_path, capsys):
    first, second, empty = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    first.write_text(json.dumps(result(1.0, OK, 1.0)))
    second.write_text(json.dumps(result(1.1, OK, 1.0)))
    empty.write_text("{}")
    table = tmp_path / "table.md"
    assert main(["compare", str(first), str(second), "--markdown", str(table)]) == 0
    assert table.read_text().splitlines()[2] == "| a | u | 1 | 1.1 | 1 (own DFT) | +0.20 | farther | ok |"
    assert main(["compare", str(first), str(second), "--least", "0.5", "--markdown", str(table)]) == 0
    assert len(table.read_text().splitlines()) == 2
    assert main(["compare", str(first), str(empty)]) == 2
    assert main(["compare", str(first), str(tmp_path / "none.json")]) == 2
    assert main(["compare", str(first), str(second), "--markdown", "/nowhere/table.md"]) == 2


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
        assert not any(r.kind in JUDGES and "quoted" in r.source for r in known.references)


@pytest.mark.parametrize("name", SYSTEMS)
def test_curves_of_the_model_have_the_volumes_of_own_dft(name):
    system = read_system(name)
    for task in (t for t in system.tasks if t.fit):
        for state, points in reference_points(system, task.name.removesuffix("-eos")).items():
            mine = curve_of(state, list(task.fit))
            if mine is None:
                assert len(points) < 5, "own DFT has a curve of this state, and the task has none"
            else:
                assert all(np.abs(np.array(task.fit[mine]) - volume).min() < 1e-3 for volume, _ in points)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_ok_could_have_been_a_miss(name):
    """What is allowed about a reference is no more than half of it, or a value that meets it is no ok."""
    for known in read_system(name).quantities.values():
        for reference in known.deciding:
            wide = 2 * (known.tolerance + reference.uncertainty) > abs(reference.value) and not known.zero
            assert verdict(known, reference.value) == (COARSE if wide else OK)
            assert known.zero or verdict(known, 0.0) != OK


@pytest.mark.parametrize("name", SYSTEMS)
def test_tolerances_of_sums_follow_from_their_terms(name):
    system = read_system(name)
    for task in (t for t in system.tasks if t.property in SUMS):
        squares = [(factor * system.quantities[term].tolerance) ** 2 for term, factor in terms_of(task).items()]
        for quantity, number in task.numbers.items():
            expected = abs(number.scale) * np.sqrt(sum(squares))
            assert system.quantities[quantity].tolerance == pytest.approx(expected)


def test_a_tolerance_by_hand_is_refused_where_it_follows_from_terms(toy_system, capsys):
    known = json.loads((toy_system / "FeAl/references.json").read_text())
    (toy_system / "FeAl/references.json").write_text(json.dumps({**known, "gap": quantity(0)}))
    assert run("--calculator", "factory.py:make") == 2
    assert "follows from its terms" in capsys.readouterr().err


def test_a_relative_tolerance_is_of_the_reference_and_no_less_than_the_absolute(toy_system):
    known = json.loads((toy_system / "FeAl/references.json").read_text())
    known["V0"] |= {"tolerance": 0.01, "relative": 0.1}
    known["B0"] |= {"tolerance": 99.0, "relative": 0.1}
    (toy_system / "FeAl/references.json").write_text(json.dumps(known))
    found = read_system("FeAl", toy_system / "FeAl").quantities
    assert found["V0"].tolerance == pytest.approx(1.13)
    assert found["B0"].tolerance == 99.0


@pytest.mark.parametrize("name", SYSTEMS)
def test_own_dft_is_what_its_frames_give(name):
    """The values beside the frames are those that `mmace-bench derive` computes from them."""
    folder = Path(mmace_bench.__file__).parent / name / "references"
    stored = json.loads((folder / "values.json").read_text())["values"]
    again = all_values(read_system(name))
    assert set(stored) == set(again)
    for key, entry in stored.items():
        assert again[key]["value"] == pytest.approx(entry["value"], rel=1e-6)
        assert again[key]["kind"] == entry["kind"]
        assert entry["uncertainty"] >= 0


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

    folder = toy_system / "FeAl"
    (folder / "data").mkdir()
    (folder / "splits.json").write_text(json.dumps({"train": ["a"], "valid": [], "test": ["b"]}))
    frames = [frame("Fe", np.eye(3) * 2.5, [[0, 0, 0]], name) for name in ("a", "b")]
    write(folder / "data" / "x.extxyz", frames)
    task = Task("labels", "", "labels", {"files": ("x.extxyz",), "kind": "energies"}, False, "fixed", True, {})
    found = label_frames(System("FeAl", folder, {}, (task,), {}), task)
    assert [a.info["parent"] for a in found] == ["b"]
    for broken in ({"train": ["a"]}, {"train": ["a"], "valid": [], "test": ["a"]}):
        (folder / "splits.json").write_text(json.dumps(broken))
        with pytest.raises(BenchmarkError):
            label_frames(System("FeAl", folder, {}, (task,), {}), task)
