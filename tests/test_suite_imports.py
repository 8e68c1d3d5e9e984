"""The potential and the suite know each other through the protocol alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(file):
    """Return the top-level names that a file imports anywhere in its text."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("folder", ["properties", "mmace"])
def test_import_direction(folder):
    """Neither package imports the other, at any depth of any function."""
    forbidden = {"properties": {"mmace"}, "mmace": {"mmace_props", "properties"}}[folder]
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 5
    for file in files:
        assert not imported(file) & forbidden, file


def test_the_check_sees_what_it_looks_for(tmp_path):
    """An import hidden in a function is found."""
    (tmp_path / "x.py").write_text("def f():\n    from mmace.calculator import from_options\n    return from_options\n")
    assert "mmace" in imported(tmp_path / "x.py")


def test_the_suite_runs_without_the_potential():
    """Every module of the suite imports where the potential cannot be imported."""
    modules = [f"mmace_props.{f.stem}" for f in sorted((ROOT / "properties").glob("*.py")) if f.stem != "__init__"]
    code = "import sys, importlib\nsys.modules['mmace'] = None\n" + "".join(
        f"importlib.import_module('{m}')\n" for m in modules
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
