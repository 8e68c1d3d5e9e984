"""The suite on the potential itself, through the command line's own factory: a random model in a file."""

import json
import os

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from mmace_props.anisotropy import Anisotropy
from mmace_props.cli import main
from mmace_props.exchange import Exchange
from mmace_props.protocol import SpinCalculator, spiral_supercell, with_moments
from mmace_props.spiral import SpinSpiral
from scipy.spatial.transform import Rotation

from mmace.calculator import MMACECalculator
from mmace.io import save_model

from .potentials import random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the file of a small random model."""
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    save_model(random_model(3, cutoff=3.5, spin_orbit_scale=0.1), path)
    return path


def strained():
    atoms = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.83, 2.83, 3.06], pbc=True)
    return with_moments(atoms, [[0, 0, 1.9], [0, 0, 0]])


def test_command_line_with_a_model_file(model, tmp_path, monkeypatch, capsys):
    """The default factory takes a model file; the dataset knows its hash."""
    monkeypatch.chdir(tmp_path)
    structure = os.path.join(os.path.dirname(__file__), "..", "examples", "FeAl_strained.cif")
    arguments = ["anisotropy", structure, "--model", str(model), "--moments", "fixed", "--order", "fm", "-o", "a.nc"]
    assert main([*arguments, "--json"]) == 0
    attributes = json.loads(capsys.readouterr().out)["attributes"]
    assert attributes["model_calculator"] == "MMACECalculator"
    assert attributes["model_hash"]
    with xr.open_dataset("a.nc") as data:
        assert abs(float(data["K"].sel(constant="K1"))) > 1e-3
        assert float(data["reversal_residual"]) < 1e-6
        assert float(data["symmetry_residual"]) < 1e-6
    assert main([*arguments, "--no-soc"]) == 0
    with xr.open_dataset("a.nc") as data:
        assert np.ptp(data["energy"].values) * 2e-6 < 1e-12
    assert "must be without spin-orbit coupling" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["foreign", "truncated", "missing"])
def test_damaged_model_files(damage, model, tmp_path, monkeypatch, capsys):
    """A foreign, a truncated and a missing model file: one sentence, status 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.safetensors"
    if damage == "foreign":
        bad.write_bytes(b"this is not a model" * 50)
    elif damage == "truncated":
        bad.write_bytes(model.read_bytes()[:-200])
    before = sorted(os.listdir(tmp_path))
    structure = os.path.join(os.path.dirname(__file__), "..", "examples", "Fe.cif")
    assert main(["anisotropy", structure, "--model", str(bad)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert sorted(os.listdir(tmp_path)) == before


def test_turning_crystal_and_moments_changes_nothing(model):
    """Constants of the potential's anisotropy do not depend on how the crystal lies."""
    calculator = MMACECalculator(model)
    atoms = strained()
    rotation = Rotation.from_rotvec([0.4, -0.9, 0.3])
    turned = Atoms(atoms.numbers, rotation.apply(atoms.positions), cell=rotation.apply(atoms.cell[:]), pbc=True)
    turned = with_moments(turned, rotation.apply(atoms.get_initial_magnetic_moments()))
    one, other = (Anisotropy(directions=86).run(a, calculator) for a in (atoms, turned))
    scale = float(one["mae"])
    np.testing.assert_allclose(other["K"], one["K"], atol=1e-6 * scale)
    overlap = abs(one["easy_axis"].values @ rotation.inv().apply(other["easy_axis"].values))
    if float(one["K"][0]) > 0:
        assert overlap == pytest.approx(1, abs=1e-6)


def test_torque_is_the_slope_of_the_map(model):
    """The torque along a meridian against differences of the potential's energy."""
    calculator = SpinCalculator(MMACECalculator(model))
    atoms = strained()
    data = Anisotropy(directions=86).run(atoms, calculator)
    k = int(np.abs(data["torque"].values[:, 0]).argmax())
    n = data["n"].values[k]
    energies = [
        calculator.energy(atoms, [Rotation.from_rotvec([angle, 0, 0]).apply(1.9 * n), [0, 0, 0]])
        for angle in (-2e-2, -1e-2, 1e-2, 2e-2)
    ]
    slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / 12e-2
    assert float(data["torque"][k, 0]) == pytest.approx(-slope / 2 * 1e6, rel=1e-5)


def test_spirals_of_the_potential_are_its_supercells(model):
    """Energies of the primitive cell by the Bloch theorem and of the supercell agree."""
    calculator = SpinCalculator(MMACECalculator(model, soc=False))
    atoms = with_moments(Atoms("Fe", cell=[2.5, 2.5, 2.6], pbc=True), [[1.9, 0, 0]])
    bloch = SpinSpiral(q=(0.0, 0.25, 0.5), mesh=0).run(atoms, calculator)
    cell, count = spiral_supercell(atoms, [0, 0.25, 0.5], [0, 0, 1])
    flat, _ = spiral_supercell(atoms, [0, 0, 0], [0, 0, 1])
    moments = cell.get_initial_magnetic_moments()
    expected = calculator.energy(cell, moments) / count - calculator.energy(flat, flat.get_initial_magnetic_moments())
    assert float(bloch["energy"][0]) == pytest.approx(1e3 * expected, abs=1e-9)


def test_exchange_of_the_potential_is_its_spirals(model):
    """For small cones J(0) - J(q) from the supercell's Hessian is the spiral's energy over sin²θ."""
    calculator = MMACECalculator(model, soc=False)
    atoms = with_moments(Atoms("Fe", cell=[2.6, 2.7, 2.8], pbc=True), [[0, 0, 1.9]])
    exchange = Exchange(states=0, radius=4.2, points=5, path="GX", mesh=4, tolerance=1e-6).run(atoms, calculator)
    angle = 0.5
    spiral = SpinSpiral(points=5, path="GX", mesh=0, cone=angle).run(atoms, calculator)
    difference = exchange["J_q"].values[0] - exchange["J_q"].values
    expected = spiral["energy"].values / np.sin(np.deg2rad(angle)) ** 2
    np.testing.assert_allclose(difference, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert np.abs(expected).max() > 0.1
