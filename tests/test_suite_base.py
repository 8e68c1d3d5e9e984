"""The base of properties: options, committees, datasets, writing, plugins."""

import dataclasses
import importlib
import os
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from ase.build import bulk
from mmace_props.base import (
    Options,
    Property,
    as_json,
    checked,
    combine,
    derived,
    load_property,
    option,
    plugins,
    variable,
    write_dataset,
)
from mmace_props.cli import main
from mmace_props.errors import (
    CalculatorError,
    ConvergenceError,
    OptionError,
    OutputError,
    PropertyError,
    did_you_mean,
)
from mmace_props.exchange import Exchange
from mmace_props.files import write_whole
from mmace_props.magnon import Magnon
from mmace_props.protocol import SpinCalculator, moments_of, with_moments
from mmace_props.provenance import attribute, magnetic_space_group

from .toys import CapableToy, CommitteeToy, Heisenberg, Landau, Uniaxial


@dataclass(frozen=True)
class ScaledOptions(Options):
    factor: float = option(1.0, "what the energy is multiplied with")
    names: tuple[str, ...] = option((), "some names")
    exact: bool = option(False, "a switch")


class ScaledEnergy(Property):
    name = "scaled"
    title = "scaled energy"
    options_type: ClassVar[type[Options]] = ScaledOptions

    def compute(self, atoms, calculator, progress):
        progress("energy", 1, 1)
        energy = self.options.factor * calculator.energy(atoms, atoms.get_initial_magnetic_moments())
        return xr.Dataset(
            {"energy": variable((), energy, "eV", "scaled energy"), "count": variable((), len(atoms), "1", "atoms")}
        )


def iron():
    return with_moments(bulk("Fe", cubic=True, a=2.83), [[0, 0, 2.2]] * 2)


def test_options_are_typed_and_frozen():
    """Unknown names, wrong types, and assignments are refused."""
    assert ScaledEnergy(factor=2).options.factor == 2
    with pytest.raises(OptionError, match="did you mean 'factor'"):
        ScaledEnergy(factr=2.0)
    for names in (["a", "b"], np.array(["a", "b"])):
        assert ScaledEnergy(names=names).options.names == ("a", "b")
    assert type(ScaledEnergy(factor=np.float64(2)).options.factor) is float
    for bad in ({"factor": "2"}, {"factor": float("nan")}, {"names": [1]}, {"names": (1,)}, {"exact": 1}):
        with pytest.raises(OptionError, match="it takes"):
            ScaledEnergy(**bad)
    with pytest.raises(OptionError, match="symprec must be positive"):
        ScaledEnergy(symprec=-1.0)
    with pytest.raises(OptionError, match="not both"):
        ScaledEnergy(ScaledOptions(), factor=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ScaledEnergy().options.factor = 3.0


def test_a_run_changes_nothing_and_depends_on_nothing_before():
    """The structure stays, and the second answer is the first."""
    atoms, toy = iron(), CapableToy(Heisenberg(2e-3, 3.0))
    before = atoms.copy()
    first = ScaledEnergy().run(atoms, toy)
    ScaledEnergy().run(with_moments(atoms, [[0, 0, 2.2], [0, 0, -2.2]]), toy)
    xr.testing.assert_identical(ScaledEnergy().run(atoms, toy), first)
    assert atoms == before
    np.testing.assert_array_equal(atoms.get_initial_magnetic_moments(), before.get_initial_magnetic_moments())


def test_mode_is_the_option_or_the_calculators():
    """A relaxing calculator's mode is used where the option leaves it, and written down."""
    toy = CapableToy(Heisenberg(2e-3, 3.0), moments="magnitudes")
    assert ScaledEnergy().mode(SpinCalculator(toy)) == "magnitudes"
    assert ScaledEnergy(moments="fixed").mode(SpinCalculator(toy)) == "fixed"
    assert '"moments": "magnitudes"' in ScaledEnergy().run(iron(), toy).attrs["options"]


def test_committee():
    """Mean, spread and members; whole numbers are left alone."""
    toys = [CapableToy(Heisenberg(j, 3.0)) for j in (1e-3, 2e-3, 4e-3)]
    single = np.array([float(ScaledEnergy().run(iron(), t)["energy"]) for t in toys])
    dataset = ScaledEnergy().run(iron(), CommitteeToy(toys))
    assert float(dataset["energy"]) == pytest.approx(single.mean())
    assert float(dataset["energy_std"]) == pytest.approx(single.std(ddof=1))
    np.testing.assert_allclose(dataset["energy_member"], single)
    assert "count_std" not in dataset
    assert dataset.attrs["committee_members"] == 3


class BelowLimit(ScaledEnergy):
    """Refuses an energy below one of the calculator's own: members differ in it."""

    error: ClassVar[type[PropertyError]] = ConvergenceError
    limit = 0.0

    def compute(self, atoms, calculator, progress):
        dataset = super().compute(atoms, calculator, progress)
        if dataset["energy"] < self.limit:
            raise self.error(f"an energy of {float(dataset['energy']):.3f} eV is too low")
        return dataset


def test_a_member_without_result_is_left_out_and_named():
    """Mean and spread over the others, a warning, the sentence in the file; not where half of them fail."""
    toys = [CapableToy(Heisenberg(j, 3.0)) for j in (1e-3, 4e-3, 2e-3)]
    single = np.array([float(ScaledEnergy().run(iron(), t)["energy"]) for t in toys])
    assert single[1] < single[2] < single[0]
    prop = BelowLimit()
    prop.limit = (single[1] + single[2]) / 2
    with pytest.warns(UserWarning, match=r"2 of 3 members of the committee \(member 2: an energy of"):
        dataset = prop.run(iron(), CommitteeToy(toys))
    assert float(dataset["energy"]) == pytest.approx((single[0] + single[2]) / 2)
    assert float(dataset["energy_std"]) == pytest.approx(abs(single[0] - single[2]) / np.sqrt(2))
    assert dataset["member"].values.tolist() == [0, 2]
    assert dataset.attrs["members_without_result"].startswith("member 2: an energy of")
    prop.limit = (single[0] + single[2]) / 2
    with pytest.raises(ConvergenceError, match="too low"):
        prop.run(iron(), CommitteeToy(toys))


def test_bad_input_is_no_matter_of_a_member():
    """What is wrong with an option or a structure is said at once, also where one member alone meets it."""
    toys = [CapableToy(Heisenberg(j, 3.0)) for j in (1e-3, 4e-3, 2e-3)]
    prop = BelowLimit()
    prop.limit = 0.99 * float(ScaledEnergy().run(iron(), toys[1])["energy"])
    prop.error = OptionError
    with pytest.raises(OptionError, match="too low"):
        prop.run(iron(), CommitteeToy(toys))


def mixed(*carriers):
    """A committee on FeCr whose members let the moments of the other elements vanish."""
    return CommitteeToy(
        [
            CapableToy(Landau(0.05, 0.005 + 1e-4 * k, numbers), Heisenberg(1e-4, 2.6), soc=False, moments="magnitudes")
            for k, numbers in enumerate(carriers)
        ]
    )


@pytest.mark.parametrize("prop", [Magnon(points=5, mesh=4), Exchange(points=5, mesh=4, states=0)])
def test_a_member_with_other_magnetic_sites_is_left_out_and_named(prop):
    """Mean and spread over most members, also where the first is the odd one; an error where no majority agrees."""
    atoms = Atoms("FeCr", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[2.9] * 3, pbc=True)
    atoms = with_moments(atoms, [[0, 0, 2.0], [0, 0, 2.0]])
    for odd in (0, 3):
        carriers = [(26, 24)] * 4
        carriers[odd] = (26,)
        warned = rf"3 of 4 members of the committee \(member {odd + 1}: its result differs .* in .*site"
        with pytest.warns(UserWarning, match=warned):
            dataset = prop.run(atoms, mixed(*carriers))
        assert dataset["site"].values.tolist() == [0, 1]
        assert dataset["member"].values.tolist() == [k for k in range(4) if k != odd]
        assert dataset.attrs["members_without_result"].startswith(f"member {odd + 1}: its result differs")
    with pytest.raises(CalculatorError, match=r"differ in .*site.*no majority agrees.*keep the moments fixed"):
        prop.run(atoms, mixed((26, 24), (26,), (26, 24), (26,)))


def test_one_site_instead_of_another():
    """Sizes agree, sites do not; numbers that follow the moments may differ."""
    parts = [
        xr.Dataset(
            {"x": variable("site", [x], "eV", "x")},
            {"site": variable("site", [site], "1", "site"), "angle": variable("site", [x], "degree", "angle")},
        )
        for site, x in ((0, 1.0), (1, 2.0), (0, 3.0))
    ]

    class Given(ScaledEnergy):
        def compute(self, atoms, calculator, progress):
            return parts.pop(0)

    with pytest.warns(UserWarning, match=r"member 2: its result differs from that of most members in site\)"):
        dataset = Given().run(iron(), CommitteeToy([CapableToy(Heisenberg(1e-3, 3.0))] * 3))
    assert dataset["x_member"].values.tolist() == [[1.0], [3.0]]


def test_datasets_without_units_or_of_strange_types_are_refused():
    """Every variable explains itself, and netCDF can hold it."""
    with pytest.raises(PropertyError, match="'x' has no units"):
        checked(xr.Dataset({"x": ("a", [1.0])}))
    with pytest.raises(PropertyError, match="'x' has the type complex128"):
        checked(xr.Dataset({"x": variable("a", [1j], "eV", "x")}))
    with pytest.raises(PropertyError, match="'x' has the type bool"):
        checked(xr.Dataset({"x": variable("a", [True], "1", "x")}))
    assert attribute(None) == "none"
    assert attribute(True) == 1
    assert attribute({"a": None}) == '{"a": null}'
    assert attribute(np.float64(2.5)) == 2.5


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    """A failure in the middle leaves the old file and no temporary one."""
    dataset = ScaledEnergy().run(iron(), CapableToy(Heisenberg(2e-3, 3.0)))
    target = tmp_path / "x.nc"
    write_dataset(dataset, target)
    old = target.read_bytes()

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", fails)
    with pytest.raises(OutputError, match="No space left"):
        write_dataset(dataset, target)
    assert target.read_bytes() == old
    assert os.listdir(tmp_path) == ["x.nc"]
    with pytest.raises(OutputError, match="does not exist"):
        write_dataset(dataset, tmp_path / "no" / "x.nc")
    with pytest.raises(OutputError, match="is a directory"):
        write_dataset(dataset, tmp_path)


def test_a_full_disk_is_one_sentence(tmp_path):
    """NetCDF raises a RuntimeError; nothing is left behind."""

    def full(temporary):
        raise RuntimeError("NetCDF: HDF error")

    with pytest.raises(OutputError, match=r"a.nc' cannot be written \(NetCDF: HDF error\); choose another output"):
        write_whole(tmp_path / "a.nc", full)
    assert not list(tmp_path.iterdir())


def test_combine_keeps_coordinates():
    """Named dimensions survive."""
    part = xr.Dataset({"x": variable("a", [1.0, 2.0], "eV", "x")}, {"a": variable("a", [0, 1], "1", "a")})
    both = combine([part, part.copy(deep=True)], [0, 2])
    assert both["x_member"].dims == ("member", "a")
    assert both["a"].values.tolist() == [0, 1]
    assert both["member"].values.tolist() == [0, 2]


def test_magnetic_space_groups():
    """Known groups of ferro- and antiferromagnetic iron."""
    found = magnetic_space_group(iron(), 1e-4, 1e-2)
    assert found["space_group"] == "Im-3m (229)"
    assert found["magnetic_space_group"] == "I4/mm'm' (139.537)"
    assert found["magnetic_space_group_type"] == 3
    afm = magnetic_space_group(with_moments(iron(), [[0, 0, 2.2], [0, 0, -2.2]]), 1e-4, 1e-2)
    assert afm["magnetic_space_group_type"] == 4


def test_magnetic_space_group_of_an_oblique_cell():
    """The group is that of the crystal, however oblique the cell, and whether or not phonopy is imported."""
    importlib.import_module("phonopy")
    oblique = iron()
    oblique.set_cell(np.array([[1, 0, 0], [2, 1, 0], [1, 3, 1]]) @ oblique.cell[:])
    assert magnetic_space_group(oblique, 1e-4, 1e-2)["magnetic_space_group"] == "I4/mm'm' (139.537)"
    assert magnetic_space_group(oblique, 2.5, 1e-2)["magnetic_space_group"] == "unknown"


def test_did_you_mean():
    """Near names are suggested, far ones listed."""
    assert "did you mean 'anisotropy'" in did_you_mean("anisotrpy", ["anisotropy", "eos"])
    assert did_you_mean("zzz", ["b", "a"]) == "; known: a, b"


def test_json_has_no_nan():
    """A number that does not exist is null."""
    dataset = ScaledEnergy().run(iron(), CapableToy(Heisenberg(2e-3, 3.0)))
    dataset["energy"].values[...] = np.nan
    assert '"value": null' in as_json(dataset, ScaledEnergy().summary(dataset))


class SpinFlip(Property):
    """Turns a moment over in what it is handed, as a plugin may."""

    name = "flip"
    title = "spin-flip energy"

    def compute(self, atoms, calculator, progress):
        moments = moments_of(atoms)
        before = calculator.energy(atoms, moments)
        moments[1] *= -1
        atoms.positions += 1.0
        return xr.Dataset({"flip": variable((), calculator.energy(atoms, moments) - before, "eV", "energy")})


def test_what_a_plugin_changes_is_its_own():
    """The second member sees the structure that the first one saw, and so does the provenance."""
    atoms = with_moments(bulk("Fe", cubic=True, a=2.85), [2.0, 2.0])
    committee = CommitteeToy([CapableToy(Heisenberg(j, 2.6), soc=False) for j in (2e-3, 2e-3)])
    found = SpinFlip().run(atoms, committee)
    np.testing.assert_allclose(found["flip_member"], 2 * 16 * 2e-3 * 4.0)
    np.testing.assert_array_equal(moments_of(atoms)[:, 2], [2.0, 2.0])
    assert "-2" not in str(found.attrs["initial_moments"])


def test_our_own_plugins():
    """The properties of the suite are found by name."""
    for name in ("anisotropy", "eos"):
        assert load_property(name).name == name
    with pytest.raises(OptionError, match="did you mean 'eos'"):
        load_property("eoss")


PLUGIN = """
import xarray as xr
from dataclasses import dataclass
from mmace_props.base import Options, Property, option, variable

@dataclass(frozen=True)
class TwiceOptions(Options):
    offset: float = option(0.0, "added to the result, eV")
    labels: tuple[str, ...] = option((), "labels")

class Twice(Property):
    name = "twice"
    title = "twice the energy"
    options_type = TwiceOptions

    def compute(self, atoms, calculator, progress):
        value = 2 * calculator.energy(atoms, atoms.get_initial_magnetic_moments()) + self.options.offset
        found = xr.Dataset({"twice": variable((), value, "eV", "twice the energy")})
        return found.assign_attrs(labels="".join(self.options.labels))

class NotOne:
    pass
"""


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """An installed distribution that adds properties, two of them broken."""
    site = tmp_path / "site"
    info = site / "twice_props-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "twice_props.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: twice-props\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mmace.properties]\ntwice = twice_props:Twice\nbroken = no_such_module:X\nwrong = twice_props:NotOne\n"
    )
    monkeypatch.syspath_prepend(str(site))
    yield site
    sys.modules.pop("twice_props", None)


def test_third_party_plugin(third_party, tmp_path, monkeypatch, capsys):
    """A property installed by somebody else is listed and runs from the command line with its own options."""
    monkeypatch.chdir(tmp_path)
    assert {"twice", "anisotropy"} <= set(plugins())
    here = os.path.dirname(__file__)
    structure = os.path.join(here, "..", "examples", "Fe.cif")
    toy = f"{os.path.join(here, 'toys.py')}:from_options"
    common = [structure, "--calculator", toy, "--order", "fm", "--moments", "fixed", "--quiet"]
    assert main(["twice", *common, "-o", "a.nc"]) == 0
    assert main(["twice", *common, "-o", "b.nc", "--offset", "1.5", "--labels", "x", "y"]) == 0
    with xr.open_dataset("a.nc") as a, xr.open_dataset("b.nc") as b:
        assert float(b["twice"]) == pytest.approx(float(a["twice"]) + 1.5)
        assert b.attrs["labels"] == "xy"
    capsys.readouterr()
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for word in ("anisotropy", "eos", "twice", "cannot be loaded"):
        assert word in listed
    assert main(["broken", structure]) == 2
    assert main(["wrong", structure]) == 2
    assert "is not a Property" in capsys.readouterr().err


def test_progress_is_reported():
    """Stages, with the member in front where there is a committee."""
    seen = []
    toys = CommitteeToy([CapableToy(Uniaxial(1e-4)), CapableToy(Uniaxial(2e-4))])
    ScaledEnergy().run(iron(), toys, lambda stage, done, total: seen.append((stage, done, total)))
    assert seen == [("member 1/2, energy", 1, 1), ("member 2/2, energy", 1, 1)]


def test_derived_numbers_go_through_the_members():
    """The mean of a quotient, with its spread, not the quotient of the means; one model has no spread."""
    parts = [
        xr.Dataset({"a": variable((), a, "eV", "a"), "b": variable((), b, "eV", "b")})
        for a, b in ((1.0, 2.0), (3.0, 4.0), (2.0, 8.0))
    ]

    def quotient(dataset):
        return float(dataset["a"] / dataset["b"])

    assert derived(combine(parts, range(3)), quotient) == pytest.approx((0.5, 0.25))
    assert derived(parts[1], quotient) == (0.75, None)
