"""The equation of state on crystals whose curves, moments and transitions are known."""

import numpy as np
import pytest
import torch
import xarray as xr
from ase import Atoms
from ase.build import bulk
from mmace_props.base import combine, write_dataset
from mmace_props.eos import EquationOfState, birch_murnaghan, fit_birch_murnaghan, fit_vinet, vinet
from mmace_props.errors import ConvergenceError, MomentError, OptionError
from mmace_props.protocol import SpinCalculator, with_moments
from scipy.optimize import fsolve

from .toys import CapableToy, CommitteeToy, Landau, MagneticEquationOfState, Springs, Toy
from .toys import birch_murnaghan as toy_birch_murnaghan
from .toys import vinet as toy_vinet

GPA = 160.21766208

CURVES = {
    "nm": (-7.6, 10.2, 1.7, 4.6),
    "fm": (-8.1, 11.3, 1.15, 5.1),
    "afm": (-8.02, 10.8, 1.25, 4.4),
}


def iron(a=2.85):
    return with_moments(bulk("Fe", cubic=True, a=a), [[0, 0, 2.0]] * 2)


@pytest.fixture(scope="module")
def result():
    """The three states of a Birch-Murnaghan crystal, through the fallbacks alone."""
    return EquationOfState(moments="magnitudes").run(iron(), Toy(MagneticEquationOfState(CURVES)))


def test_birch_murnaghan_crystal(result):
    """Minimum, bulk modulus and its derivative of each state, with moments relaxed at each volume."""
    dataset = result
    assert dataset["state"].values.tolist() == ["fm", "afm", "nm"]
    for state, (e0, v0, b0, b1) in CURVES.items():
        one = dataset.sel(state=state, fit="birch_murnaghan")
        assert float(one["E0"]) == pytest.approx(e0, rel=1e-6)
        assert float(one["V0"]) == pytest.approx(v0, rel=1e-6)
        assert float(one["B0"]) == pytest.approx(b0 * GPA, rel=1e-6)
        assert float(one["B0_prime"]) == pytest.approx(b1, rel=1e-6)
        assert float(one["fit_rms"]) < 1e-9
    for state in ("fm", "afm"):
        expected = 2.2 + 0.1 * (dataset["volume"].values - 11.0)
        np.testing.assert_allclose(dataset["moment"].sel(state=state), expected, rtol=1e-6)
    assert np.all(dataset["order_kept"] == 1)
    assert dataset.attrs["ground_state"] == "fm"
    signs = np.sign(dataset["site_moments"].sel(state="afm", xyz="z").values[0])
    assert signs.tolist() == [1, -1]


def test_vinet_crystal():
    """The Vinet fit of a Vinet crystal, where the Birch-Murnaghan fit of the same points is off."""
    model = CapableToy(MagneticEquationOfState(CURVES, form=toy_vinet))
    dataset = EquationOfState(moments="magnitudes", states=("fm",), volume_range=0.15).run(iron(), model)
    e0, v0, b0, b1 = CURVES["fm"]
    one = dataset.sel(state="fm", fit="vinet")
    found = [float(one[k]) for k in ("E0", "V0", "B0", "B0_prime")]
    assert found == pytest.approx([e0, v0, b0 * GPA, b1], rel=1e-6)
    other = dataset.sel(state="fm", fit="birch_murnaghan")
    assert abs(float(other["B0_prime"]) / b1 - 1) > 1e-4


def test_transition_between_orders(result):
    """Pressure and volumes of equal enthalpy, and the volume of equal energy, against independent equations."""
    dataset = result

    def pressure(v, e0, v0, b0, b1):
        x = v0 / v
        return 1.5 * b0 * (x ** (7 / 3) - x ** (5 / 3)) * (1 + 0.75 * (b1 - 4) * (x ** (2 / 3) - 1))

    def equations(volumes):
        energies = [toy_birch_murnaghan(v, *CURVES[k]) for v, k in zip(volumes, ("fm", "afm"), strict=True)]
        pressures = [pressure(v, *CURVES[k]) for v, k in zip(volumes, ("fm", "afm"), strict=True)]
        return [
            pressures[0] - pressures[1],
            energies[0] + pressures[0] * volumes[0] - energies[1] - pressures[1] * volumes[1],
        ]

    v_fm, v_afm = fsolve(equations, [10.3, 10.0], xtol=1e-14)
    one = dataset.sel(transition="fm-afm")
    assert float(one["transition_volume_1"]) == pytest.approx(v_fm, rel=1e-6)
    assert float(one["transition_volume_2"]) == pytest.approx(v_afm, rel=1e-6)
    assert float(one["transition_pressure"]) == pytest.approx(pressure(v_fm, *CURVES["fm"]) * GPA, rel=1e-6)
    same = fsolve(lambda v: toy_birch_murnaghan(v, *CURVES["fm"]) - toy_birch_murnaghan(v, *CURVES["afm"]), 10.3)[0]
    assert float(one["crossing_volume"]) == pytest.approx(same, rel=1e-6)
    assert np.isnan(float(dataset["transition_pressure"].sel(transition="fm-nm")))


def test_far_start_finds_the_minimum():
    """A structure a fifth too large still gives the curve about its minimum."""
    model = CapableToy(MagneticEquationOfState(CURVES))
    dataset = EquationOfState(moments="magnitudes", states=("fm",)).run(iron(a=3.05), model)
    one = dataset.sel(state="fm", fit="birch_murnaghan")
    assert float(one["V0"]) == pytest.approx(CURVES["fm"][1], rel=1e-6)


def test_fits_are_inverses_of_their_curves():
    """Each fit recovers the parameters of its own curve; shifted energies change E0 alone."""
    volumes = np.linspace(9.5, 12.5, 9)
    for fit, form in ((fit_birch_murnaghan, birch_murnaghan), (fit_vinet, vinet)):
        for shift in (0.0, -5e4):
            found = fit(volumes, form(volumes, -8.1 + shift, 11.2, 1.1, 4.9))
            assert [found.v0, found.b0, found.b1] == pytest.approx([11.2, 1.1, 4.9], rel=1e-6)
            assert found.e0 - shift == pytest.approx(-8.1, rel=1e-6)
            h = 1e-3
            slope = (found.energy(10 + h) - found.energy(10 - h)) / (2 * h)
            assert float(found.pressure(10.0)) == pytest.approx(-float(slope), rel=1e-6)


def test_our_curves_are_the_published_ones():
    """The curves against their pressures, P(V) of the papers, integrated numerically."""
    from scipy.integrate import quad

    e0, v0, b0, b1 = -8.0, 11.0, 1.2, 5.0

    def birch(v):
        x = v0 / v
        return 1.5 * b0 * (x ** (7 / 3) - x ** (5 / 3)) * (1 + 0.75 * (b1 - 4) * (x ** (2 / 3) - 1))

    def rose(v):
        x = (v / v0) ** (1 / 3)
        return 3 * b0 * (1 - x) / x**2 * np.exp(1.5 * (b1 - 1) * (1 - x))

    for form, pressure in ((birch_murnaghan, birch), (vinet, rose)):
        work = -quad(pressure, v0, 9.7, epsabs=1e-13)[0]
        assert float(form(np.array(9.7), e0, v0, b0, b1)) == pytest.approx(e0 + work, rel=1e-9)


def test_committee_spread():
    """Three curves with known minima: mean and spread of V0."""
    shifts = np.array([0.0, 0.05, -0.02])
    members = [
        CapableToy(
            MagneticEquationOfState({k: (c[0], c[1] + d, *c[2:]) for k, c in CURVES.items()}), moments="magnitudes"
        )
        for d in shifts
    ]
    dataset = EquationOfState(states=("fm", "nm")).run(iron(), CommitteeToy(members))
    where = {"state": "fm", "fit": "birch_murnaghan"}
    volumes = CURVES["fm"][1] + shifts
    assert float(dataset["V0"].sel(**where)) == pytest.approx(volumes.mean(), rel=1e-6)
    assert float(dataset["V0_std"].sel(**where)) == pytest.approx(volumes.std(ddof=1), rel=1e-4)


def test_transitions_of_the_members_that_have_one():
    """A member without transition in the window: the others' mean, with their number; none where no member has one."""
    shifted = {**CURVES, "afm": (-7.8, *CURVES["afm"][1:])}
    models = [MagneticEquationOfState(curves) for curves in (CURVES, CURVES, CURVES, shifted)]
    prop = EquationOfState()
    dataset = prop.run(iron(), CommitteeToy([CapableToy(model, moments="magnitudes") for model in models]))
    pressures = dataset["transition_pressure_member"].sel(transition="fm-afm").values
    assert np.isfinite(pressures).tolist() == [True, True, True, False]
    one = dataset.sel(transition="fm-afm")
    for name in ("transition_pressure", "transition_volume_1", "transition_volume_2", "crossing_volume"):
        assert float(one[name]) == pytest.approx(np.nanmean(one[f"{name}_member"]))
        assert float(one[f"{name}_std"]) == pytest.approx(0, abs=1e-6)
        assert int(one[f"{name}_count"]) == 3
    rows = {row.label: row for row in prop.summary(dataset)}
    assert rows["fm-afm transition, 3 of 4 members"].value == pytest.approx(pressures[0])
    assert rows["fm-nm transition"].value == "none in the window"


def test_order_lost_in_some_members(result):
    """The share of members that keep the order, and their number in the table."""
    parts = [result.copy(deep=True) for _ in range(4)]
    for part in parts[1:]:
        part["order_kept"].loc[{"state": "afm"}] = 0
    prop, calculator = EquationOfState(), SpinCalculator(Toy(MagneticEquationOfState(CURVES)))
    dataset = prop.finish(combine(parts, range(4)), calculator)
    assert np.all(dataset["order_kept"].sel(state="afm") == 0.25)
    rows = {row.label: row.value for row in prop.summary(dataset)}
    assert rows["afm order"] == "lost at some volumes, 3 of 4 members"
    assert "fm order" not in rows
    assert {row.label: row.value for row in prop.summary(parts[1])}["afm order"] == "lost at some volumes"


def test_a_sublattice_that_loses_its_moment_is_told():
    """Iron of a ferrimagnet keeps its own, chromium has none of its own: the mean says nothing of it."""

    class Lone(Landau):
        def sites(self, s):
            m2 = (s.moments**2).sum(-1)
            return torch.where(torch.as_tensor(s.numbers == 26), -self.a * m2, self.a * m2) + self.b * m2**2

    cell = Atoms("FeCr", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.9] * 3, pbc=True)
    model = CapableToy(Lone(0.05, 0.005), Springs(3.0, 2.5, 3.3), soc=False)
    prop = EquationOfState(moments="magnitudes", states=("given",))
    dataset = prop.run(with_moments(cell, [2.2, -1.0]), model)
    assert float(dataset["moment"].min()) > 1
    assert np.all(dataset["order_kept"] == 0)
    assert {row.label: row.value for row in prop.summary(dataset)}["given order"] == "lost at some volumes"


def test_traces_of_moments_on_other_atoms_make_no_states():
    """An atom with 0.004 µB takes no part in an antiferromagnet, in the mean |m|, or in the order that is kept."""
    cell = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.9] * 3, pbc=True)
    prop = EquationOfState(moments="fixed")
    dataset = prop.run(with_moments(cell, [2.2, 0.004]), CapableToy(Springs(3.0, 2.5, 3.3), soc=False))
    assert list(dataset["state"].values) == ["fm", "nm"]
    np.testing.assert_allclose(dataset["moment"].sel(state="fm"), 2.2)
    assert np.all(dataset["order_kept"] == 1)


def test_dataset_opens_plainly(tmp_path, result):
    """Plain xarray reads it, with units and names."""
    dataset = result
    write_dataset(dataset, tmp_path / "e.nc")
    with xr.open_dataset(tmp_path / "e.nc") as again:
        xr.testing.assert_identical(again.load(), dataset)
        assert all(v.attrs["units"] and v.attrs["long_name"] for v in again.variables.values())


def test_refusals():
    """States the cell does not hold, a curve without minimum, and bad options."""
    model = CapableToy(MagneticEquationOfState(CURVES))
    single = with_moments(bulk("Fe", a=2.85), [[0, 0, 2.0]])
    with pytest.raises(MomentError, match="afm is not possible: a cell with 1 magnetic site"):
        EquationOfState(states=("afm",)).run(single, model)
    with pytest.raises(ConvergenceError, match="no minimum"):
        EquationOfState(states=("nm",)).run(
            iron(), CapableToy(MagneticEquationOfState(CURVES, form=lambda v, *parameters: -0.1 * v))
        )
    runaway = CapableToy(MagneticEquationOfState(CURVES), Landau(0.0, -1.0))
    with pytest.raises(ConvergenceError, match=r"the fm state at \d+\.\d\d to \d+\.\d\d Å³/atom: the moments did not"):
        EquationOfState(moments="magnitudes", states=("fm",)).run(iron(), runaway)
    with pytest.raises(OptionError, match="did you mean 'afm'"):
        EquationOfState(states=("afn",))
    with pytest.raises(OptionError, match="volume_range"):
        EquationOfState(volume_range=0.9)
    with pytest.raises(OptionError, match="points"):
        EquationOfState(points=3)
