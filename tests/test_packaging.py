"""What an installation holds, by the lists in pyproject.toml."""

import tomllib
from pathlib import Path

import mmace_bench
import pytest
from mmace_bench.rendering import TEMPLATE
from mmace_bench.systems import SYSTEMS, read_system

BENCH = Path(mmace_bench.__file__).parent
ROOT = BENCH.parent
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder(package):
    """Folder of a package, from the mapping of its first part."""
    first, *rest = package.split(".")
    return ROOT.joinpath(SETUP["package-dir"][first], *rest)


DATA = {path for package, globs in SETUP["package-data"].items() for g in globs for path in folder(package).glob(g)}


def test_folders_with_installed_data_are_packages():
    """Setuptools says of others that they are importable and yet absent, and will leave their data out one day."""
    known = {folder(package) for package in SETUP["packages"]}
    assert {path.parent for path in DATA} <= known
    assert set(SETUP["package-data"]) <= set(SETUP["packages"])


def test_every_package_with_code_is_installed():
    known = {folder(package) for package in SETUP["packages"]}
    assert {path.parent for top in SETUP["package-dir"].values() for path in (ROOT / top).rglob("__init__.py")} <= known


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_installation_holds_what_a_run_of_the_benchmark_reads(name):
    own = BENCH / name
    labels = {own / "data" / file for task in read_system(name).tasks for file in task.options.get("files", ())}
    known = {own / "benchmark.json", own / "references.json", own / "splits.json", own / "results/benchmark.json"}
    derived = {own / "references" / file for file in ("derivation.json", "dft.extxyz", "values.json")}
    derived |= set((own / "references").glob("anisotropy*.extxyz"))
    assert labels
    assert {*labels, *known, *derived, TEMPLATE} <= DATA


def test_patterns_of_data_match_something():
    for package, globs in SETUP["package-data"].items():
        for pattern in globs:
            assert list(folder(package).glob(pattern)), (package, pattern)
