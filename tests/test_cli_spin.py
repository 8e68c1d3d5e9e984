"""The spin side from the command line, on the structures and with the model that are shipped."""

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from ase.io.jsonio import decode
from mmace_props.cli import main

from mmace.calculator import MMACECalculator

TOP = Path(__file__).parent.parent
MEMBER = str(TOP / "mmace" / "weights" / "default-0.safetensors")
SMALL = ("--radius", "3", "--tolerance", "1")
CHEAP = {
    "exchange": ("--no-soc", *SMALL, "--states", "4", "--points", "20", "--mesh", "4"),
    "magnon": ("--no-soc", *SMALL, "--points", "20", "--mesh", "3"),
    "spiral": ("--points", "20", "--mesh", "3"),
    "curie": (*SMALL, "--ways", "directions", "--temperatures", "300", "600", "--sizes", "1", "--trajectories", "8",
              "--steps", "1"),
}  # fmt: skip
CRYSTALS = {"Fe": (), "FeAl": (), "CrN": ("--order", "afm")}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Dataset of a command, made on the first question."""
    folder, known = tmp_path_factory.mktemp("spin"), {}

    def ask(name, crystal, *more, model=MEMBER):
        key = (name, crystal, model, *more)
        if key not in known:
            output = folder / f"{len(known)}.nc"
            command = [
                name,
                str(TOP / "examples" / f"{crystal}.cif"),
                "--model",
                model,
                *CHEAP[name],
                "-o",
                str(output),
            ]
            assert main([*command, "--plot", str(output.with_suffix(".png")), "--quiet", *more]) == 0
            assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
            with xr.open_dataset(output) as found:
                known[key] = found.load()
        return known[key]

    return ask


@pytest.mark.parametrize("crystal", CRYSTALS)
@pytest.mark.parametrize("name", CHEAP)
def test_provenance(results, name, crystal):
    """Every dataset opens plainly and says what it is of: units, structure, moments, model, versions, options."""
    data = results(name, crystal, *CRYSTALS[crystal])
    for key, item in data.variables.items():
        assert item.attrs["units"], key
        assert item.attrs["long_name"], key
        assert item.dtype.kind in "fiuUO", key
    attrs = data.attrs
    assert attrs["property"] == name
    assert attrs["structure_file"] == f"{crystal}.cif"
    assert attrs["model_hash"] == MMACECalculator(MEMBER, soc=False).provenance()["hash"]
    assert f"{'afm' if crystal == 'CrN' else 'fm'} guess" in attrs["initial_moments_origin"]
    given = decode(attrs["structure_json"])
    assert given.get_initial_magnetic_moments().shape == (len(given), 3)
    assert attrs["magnetic_space_group"]
    assert json.loads(attrs["options"])["moments"] == "magnitudes"


@pytest.mark.parametrize(("crystal", "sites", "nearest"), [("Fe", 1, 8), ("FeAl", 1, 6), ("CrN", 2, 12)])
def test_exchange(results, crystal, sites, nearest):
    """Tensors without spin-orbit coupling are numbers, alike from both ends; J(q) is their sum."""
    data = results("exchange", crystal, *CRYSTALS[crystal])
    pairs = data.sizes["pair"]
    assert data.sizes["site"] == sites
    assert data["tensor"].shape == (pairs, 3, 3)
    np.testing.assert_allclose(data["tensor"], data["J"].values[:, None, None] * np.eye(3), atol=1e-12)
    assert set(data["element"].values) == {"Cr" if crystal == "CrN" else "Fe"}
    first = data["shell_distance"].values < data["shell_distance"].values.min() + 0.01
    assert data["shell_count"].values[first, 0].sum() == nearest
    assert data["J_q"].shape == (20,)
    assert data["model_error"].dims == ("cone",)
    assert np.all((data["model_error"].values > 0) & (np.diff(data["model_scale"].values, prepend=0) > 0))
    assert 0.5 < np.abs(data["moments"].values).min() < 3
    assert data.attrs["reach"] == MMACECalculator(MEMBER, soc=False).tilt_reach
    assert data.attrs["supercell_beyond_twice_the_reach"] == "no"
    assert float(data["folded_pairs"]) > 50


@pytest.mark.parametrize(("crystal", "branches"), [("Fe", 1), ("FeAl", 1), ("CrN", 2)])
def test_magnon(results, crystal, branches):
    """One branch per moment of the primitive cell, and a mode without energy at Γ."""
    data = results("magnon", crystal, *CRYSTALS[crystal])
    assert data["energy"].shape == (20, branches)
    assert data["mesh_energy"].shape == (27, branches)
    assert np.isfinite(data["energy"]).all()
    assert abs(float(data["gap"])) < 1e-6
    width = np.diff(data["dos_energy"])[0]
    assert float(data["dos"].sum()) * width == pytest.approx(branches, rel=0.02)
    assert "frozen" in data if branches == 1 else "velocity" in data


@pytest.mark.parametrize("crystal", CRYSTALS)
def test_spiral(results, crystal):
    """The spiral at Γ is the order itself, and no wave vector lies below the lowest."""
    data = results("spiral", crystal, *CRYSTALS[crystal])
    assert data["energy"].shape == (20,)
    assert not data["q"].values[0].any()
    assert data["length"].shape[0] == 20
    assert np.ptp(data["energy"].values) > 0.1
    assert json.loads(data.attrs["path_labels"])[0] == ["G", 0.0]


@pytest.mark.parametrize("crystal", CRYSTALS)
def test_curie(results, crystal):
    """One run at two temperatures, its order between none and all of it."""
    data = results("curie", crystal, *CRYSTALS[crystal])
    assert data["temperature"].values.tolist() == [300, 600]
    for name in ("order", "susceptibility", "heat", "binder", "energy", "length"):
        assert data[name].shape == (1, 2), name
    assert np.all((data["order"].values > 0) & (data["order"].values <= 1))
    assert np.all((data["acceptance"].values >= 0) & (data["acceptance"].values <= 1))
    assert bool(np.isnan(data["tc_measured"])) == (crystal == "FeAl")


def test_agreement_on_iron(results):
    """Spin waves from the exchange are those of the Hessian: the same supercell, (4/m)(J(0) - J(q))."""
    exchange, waves = results("exchange", "Fe"), results("magnon", "Fe")
    np.testing.assert_allclose(exchange["q"], waves["q"], atol=1e-12)
    expected = 4 / exchange["moments"].values[0] * (exchange["J_q"].values[0] - exchange["J_q"].values)
    assert exchange.attrs["supercell"] == waves.attrs["supercell"]
    # couplings to equally near images of the supercell's faces belong to the waves alone
    assert np.abs(expected - waves["energy"].values[:, 0]).max() < 4 / 2.2 * 2 * float(exchange["folded"])


def test_committee_of_the_shipped_model(results):
    """The name of the model alone asks its members, and every number carries their spread."""
    data = results("spiral", "Fe", model="default")
    assert data.sizes["member"] == len(MMACECalculator(soc=False).models)
    away = data["q"].values.any(axis=1)
    assert np.all((data["energy_std"].values > 0) == away)


def test_winning_order_of_chromium_nitride(results):
    """The lowest order of larger cells is the reference, not the layers that the cell of the file holds."""
    data = results("curie", "CrN", "--order", "auto")
    assert data.attrs["order"].startswith("afm")
    assert float(data.attrs["order_ahead"]) > 0
    winner = decode(data.attrs["order_structure"])
    moments = winner.get_initial_magnetic_moments()[:, 2]
    assert abs(moments.sum()) < 1e-9
    assert np.abs(moments[winner.numbers == 24]).min() > 1
    assert data["order"].shape == (1, 2)
