"""Examples on the pages and stored results: the model that is shipped made them."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from mmace_props.cli import main

from mmace.calculator import MMACECalculator
from mmace.io import weights_hash

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("examples", DOCS / "examples.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["examples"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["examples"]


def test_every_example_is_of_the_shipped_model(runner):
    found = runner.examples()
    assert {e.arguments[0] for e in found} >= {
        *("anisotropy", "coupled", "curie", "elastic", "eos", "exchange", "magnon", "phonon", "relax", "spiral")
    }
    stale = [e.command for e in found if not runner.is_current(e)]
    assert not stale, "run docs/examples.py"


def test_stored_results_are_of_the_shipped_model():
    """Commands of their own make errors, stability and anisotropy against labels: new weights can leave them behind."""
    calculator = MMACECalculator("default", soc=False)
    whole = calculator.provenance()["hash"]
    benchmarks = DOCS.parent / "benchmarks"
    members = {f"default-{k}.safetensors": member.provenance()["hash"] for k, member in enumerate(calculator.members)}
    spin_free = [weights_hash(model, spin_orbit=False) for model in calculator.models]
    tilts = (benchmarks / "FeAl" / "tilts.md").read_text()
    assert whole in tilts, "run benchmarks/tilts_against_labels.py"
    for system in ("FeAl", "CrN"):
        page = (benchmarks / system / "anisotropy.md").read_text()
        assert whole in page, "run benchmarks/anisotropy_against_labels.py"
        results = benchmarks / system / "results"
        stability = json.loads((results / "stability.json").read_text())
        assert stability["weights_without_spin_orbit"] == spin_free, "run benchmarks/stability.py"
        assert json.loads((results / "errors.json").read_text())["model"] == members, "run mmace eval"


def test_an_example_is_replaced_on_its_page(runner, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n\n```\n$ mmace-props eos \\\n    a.cif\nold\n```\n\n```\n$ mmace-props eos b.cif\nkept\n```\n"
    )
    monkeypatch.setattr(runner, "PAGES", tmp_path)
    first, second = runner.examples()
    assert first.arguments == ["eos", "a.cif"]
    assert (first.output, second.output) == ("old\n", "kept\n")
    runner.put(first, "new\nlines\n")
    assert [e.output for e in runner.examples()] == ["new\nlines\n", "kept\n"]
    assert page.read_text().startswith("before\n")
    assert not runner.is_current(second)


def test_a_command_that_fails_says_so(runner, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "WORK", tmp_path)
    with pytest.raises(RuntimeError, match="nowhere"):
        runner.run(runner.Example(tmp_path, "mmace-props eos nowhere.cif", ""))


def test_python_about_calculators_datasets_and_plugins_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "properties" / "README.md").read_text()
    dataset, calculator, plugin = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "single_ion.py").write_text(calculator)
    (command,) = re.findall(r"^    mmace-props (.*single_ion.py.*)$", page, re.MULTILINE)
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    assert main(command.split()) == 0
    found = {}
    exec(compile(dataset, "dataset", "exec"), found)
    assert found["k1"].item() == pytest.approx(1e6 * 1e-4 * 2.2**2 / 2, rel=1e-6)
    (tmp_path / "flip_plugin.py").write_text(plugin)
    monkeypatch.syspath_prepend(tmp_path)
    flip = importlib.import_module("flip_plugin").SpinFlip(site=1)
    spin = importlib.import_module("single_ion").make(None, True, "fixed", "cpu", "float64")
    assert flip.run(found["atoms"], spin)["flip"].item() == 0.0
