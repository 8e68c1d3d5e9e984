"""Relaxation of structure and moments against closed forms, and the enumeration and ranking of collinear orders."""

import itertools
import warnings

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from ase.build import bulk
from ase.data import covalent_radii
from mmace_props.base import write_dataset
from mmace_props.cli import main
from mmace_props.conventions import GPA
from mmace_props.elastic import Elastic
from mmace_props.errors import CalculatorError, ConvergenceError, MomentError, OptionError
from mmace_props.orders import collinear_orders, order_is_kept
from mmace_props.protocol import with_moments
from mmace_props.relax import Relaxation, relaxed_structure, write_structure
from mmace_props.structures import read_structure
from scipy.optimize import brentq, minimize
from scipy.spatial.transform import Rotation

from mmace.calculator import MMACECalculator

from .test_cli_props import EXAMPLES, TOY
from .toys import (
    CapableToy,
    CommitteeToy,
    Heisenberg,
    Hole,
    Landau,
    MagneticEquationOfState,
    Springs,
    Toy,
    birch_murnaghan,
)

CURVES = {
    "nm": (-7.6, 10.2, 1.7, 4.6),
    "fm": (-8.1, 11.3, 1.15, 5.1),
    "afm": (-8.02, 10.8, 1.25, 4.4),
}
JR = {"J": 2e-3, "cutoff": 2.7, "decay": 2.0, "r0": 2.4}
LANDAU = (0.05, 0.005)
SPRING = (3.0, 2.4)


def iron(a=2.85, moments=(2.0, 2.0)):
    return with_moments(bulk("Fe", cubic=True, a=a), np.outer(moments, [0, 0, 1.0]))


def coupled(cls=CapableToy, **options):
    """Springs, moments of soft length, and an exchange that falls with distance: everything hangs together."""
    return cls(Springs(*SPRING, 2.7), Landau(*LANDAU), Heisenberg(**JR), **options)


def coupled_energy(x, pressure=0.0):
    """The same for ferromagnetic bcc iron per atom, by hand; x is (a, m)."""
    a, m = x
    d = np.sqrt(3) / 2 * a
    exchange = -8 * JR["J"] * np.exp(-JR["decay"] * (d - JR["r0"])) * m**2
    landau = -LANDAU[0] * m**2 + LANDAU[1] * m**4
    return 8 * SPRING[0] / 4 * (d - SPRING[1]) ** 2 + exchange + landau + pressure * a**3 / 2


@pytest.mark.parametrize("pressure", [0.0, 3.0])
@pytest.mark.parametrize("cls", [CapableToy, Toy])
def test_cell_and_moments_at_their_common_minimum(cls, pressure):
    """Lattice constant and moment of the coupled crystal, at zero and finite pressure, against a search by hand."""
    dataset = Relaxation(moments="magnitudes", pressure=pressure, smax=1e-5).run(iron(), coupled(cls))
    options = {"xatol": 1e-11, "fatol": 1e-15, "maxiter": 4000}
    a, m = minimize(coupled_energy, [2.8, 2.0], (pressure / GPA,), method="Nelder-Mead", options=options).x
    assert m > 2.2
    assert dataset["lengths"].values == pytest.approx([a] * 3, abs=1e-7)
    assert dataset["moments"].values[:, 2] == pytest.approx([m, m], abs=1e-6)
    assert float(dataset["energy"]) == pytest.approx(coupled_energy((a, m)), abs=1e-8)
    assert float(dataset["enthalpy"]) == pytest.approx(coupled_energy((a, m), pressure / GPA), abs=1e-10)
    assert dataset["stress"].values[:3] == pytest.approx([-pressure] * 3, abs=1e-4)
    frozen = Relaxation(moments="fixed", pressure=pressure, smax=1e-5).run(iron(), coupled(cls))
    assert abs(float(frozen["lengths"][0]) - a) > 1e-3


def test_volume_under_pressure_on_a_birch_murnaghan_crystal():
    """V(P) with the moment that belongs to it, P of the curve's own formula."""
    e0, v0, b0, b1 = CURVES["fm"]

    def excess(v, wanted):
        x = v0 / v
        return 1.5 * b0 * (x ** (7 / 3) - x ** (5 / 3)) * (1 + 0.75 * (b1 - 4) * (x ** (2 / 3) - 1)) - wanted

    for pressure in (-5.0, 40.0):
        volume = brentq(excess, 8.0, 14.0, (pressure / GPA,), xtol=1e-13)
        dataset = Relaxation(moments="magnitudes", pressure=pressure, smax=1e-5).run(
            iron(), CapableToy(MagneticEquationOfState(CURVES))
        )
        assert float(dataset["volume"]) == pytest.approx(volume, rel=1e-6)
        assert float(dataset["energy"]) == pytest.approx(birch_murnaghan(volume, e0, v0, b0, b1), abs=1e-7)
        assert dataset["moments"].values[:, 2] == pytest.approx([2.2 + 0.1 * (volume - 11.0)] * 2, abs=1e-6)


def tetragonal():
    """B2 with an atom off its place along z, so that ions have somewhere to go."""
    atoms = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.47]], cell=[2.9, 2.9, 3.1], pbc=True)
    return with_moments(atoms, [[0, 0, 2.0], [0, 0, 0]])


def test_what_is_free_and_what_is_kept():
    """Ions alone, the volume alone, the shape alone, everything: what each leaves and what it moves."""
    springs = CapableToy(Springs(3.0, 2.4, 2.9), Springs(0.5, 2.7, 3.5), elements=("Fe", "Al"))
    start = tetragonal()

    def relaxed(**options):
        found = Relaxation(moments="fixed", fmax=1e-7, smax=1e-5, **options).run(start, springs)
        return found, relaxed_structure(found)

    found, atoms = relaxed(cell="fixed")
    np.testing.assert_allclose(atoms.cell[:], start.cell[:], atol=1e-12)
    assert np.diff(atoms.get_scaled_positions()[:, 2]) % 1 == pytest.approx(0.5, abs=1e-7)
    assert np.abs(found["forces"].values).max() < 1e-7
    assert np.abs(found["stress"].values).max() > 1
    found, atoms = relaxed(cell="volume")
    assert atoms.cell.lengths()[2] / atoms.cell.lengths()[0] == pytest.approx(3.1 / 2.9, abs=1e-12)
    assert found["stress"].values[:3].mean() == pytest.approx(0, abs=1e-5)
    assert np.ptp(found["stress"].values[:3]) > 0.1
    found, atoms = relaxed(cell="shape")
    assert atoms.get_volume() == pytest.approx(start.get_volume(), rel=1e-10)
    assert np.ptp(found["stress"].values[:3]) < 1e-5
    assert abs(found["stress"].values[:3].mean()) > 0.1
    found, atoms = relaxed()
    assert np.abs(found["stress"].values).max() < 1e-5
    found, atoms = relaxed(ions=False)
    assert np.diff(atoms.get_scaled_positions()[:, 2]) % 1 == pytest.approx(0.47, abs=1e-9)
    assert np.abs(found["forces"].values).max() > 1e-3


@pytest.mark.parametrize("optimizer", ["lbfgs", "fire"])
def test_other_optimisers_find_the_same(optimizer):
    """One minimum, whichever way leads there."""
    dataset = Relaxation(moments="magnitudes", optimizer=optimizer).run(iron(), coupled())
    reference = Relaxation(moments="magnitudes").run(iron(), coupled())
    assert float(dataset["volume"]) == pytest.approx(float(reference["volume"]), rel=1e-5)
    path = dataset["step_energy"].values
    assert path[0] - path[-1] == pytest.approx(float(dataset["gain"]) / 1e3)
    assert float(dataset["gain"]) > 1


def test_symmetry_is_kept_where_it_is_asked_for():
    """Noise within the tolerance goes at once with symmetry, and stays in the file without."""
    start = iron()
    start.set_cell(start.cell[:] @ (np.eye(3) + 1e-4 * np.random.default_rng(0).normal(size=(3, 3))), scale_atoms=True)
    fixed = {"moments": "magnitudes", "cell": "volume", "symprec": 5e-3}
    kept = Relaxation(**fixed).run(start, coupled(soc=False))
    assert np.ptp(kept["lengths"].values) < 1e-12
    assert kept.attrs["relaxed_space_group"] == "Im-3m (229)"
    free = Relaxation(symmetry=False, **fixed).run(start, coupled(soc=False))
    assert np.ptp(free["lengths"].values) > 1e-4


def test_a_calculator_that_breaks_the_symmetry_is_refused():
    """A uniform push on one atom is no symmetric force."""

    class Pushed(CapableToy):
        def calculate(self, *arguments, **named):
            super().calculate(*arguments, **named)
            self.results["forces"] = self.results["forces"] + np.array([[0.1, 0, 0], [0, 0, 0]])

    with pytest.raises(CalculatorError, match=r"break the symmetry of the crystal by 1\.0e-01 eV/Å"):
        Relaxation(moments="fixed").run(iron(), coupled(Pushed))


def test_not_converged_is_an_error_with_the_residual():
    """Too few steps; a cell that runs away; a calculator whose moments are not at rest."""
    with pytest.raises(ConvergenceError, match=r"did not relax in 2 steps: .* stress of \d\.\de[-+]\d\d GPa"):
        Relaxation(moments="magnitudes", steps=2).run(iron(a=3.0), coupled())
    with pytest.raises(ConvergenceError, match="of its volume after"):
        Relaxation(moments="fixed", pressure=-80.0).run(iron(), CapableToy(MagneticEquationOfState(CURVES)))

    class Careless(CapableToy):
        def relax_moments(self, images, mode):
            return [a.get_initial_magnetic_moments() for a in images]

    with pytest.raises(ConvergenceError, match="kept a magnetic force of"):
        Relaxation(moments="magnitudes").run(iron(), coupled(Careless))


@pytest.mark.parametrize("task", [Relaxation(), Elastic()], ids=["relax", "elastic"])
def test_single_precision_is_enough(task):
    """What the calculator relaxes moments to is what may be left, with results that agree with double precision."""
    atoms = with_moments(read_structure(EXAMPLES / "Fe.cif"), [2.2, 2.2])
    single, double = (
        task.run(atoms, MMACECalculator(dtype=dtype, committee=False, moments="magnitudes", soc=False))
        for dtype in ("float32", "float64")
    )
    name = "cell" if isinstance(task, Relaxation) else "C"
    np.testing.assert_allclose(single[name], double[name], rtol=5e-3, atol=0.1 if name == "C" else 1e-3)


@pytest.mark.parametrize(
    ("hole", "options", "words"),
    [
        (Hole(5.0, 1.6, 0.45), {"cell": "fixed", "symmetry": False}, r"\(Fe\) ran into each other after .* Å apart"),
        (Hole(0.4, 1.8, 0.4), {}, r"the cell went to 0\.\d+ of its volume after"),
        (Hole(20.0, 2.05, 0.3), {}, r"the energy fell by [\d.]+ eV/atom after .* closer"),
    ],
)
def test_a_fall_into_a_hole_of_the_potential_is_no_result(hole, options, words):
    """Wells at short distances that the optimiser reaches without a barrier, each with its own minimum inside."""
    start = iron(2.75)
    start.positions[1] += 0.02 if options else 0.0
    toy = CapableToy(Springs(0.1, 2.4, 2.7), hole)
    with pytest.raises(ConvergenceError, match=words) as error:
        Relaxation(moments="fixed", **options).run(start, toy)
    assert str(error.value).count("; ") == 1


def test_a_member_with_a_hole_is_left_out():
    sound = [CapableToy(Springs(3.0, r, 2.7)) for r in (2.40, 2.42, 2.44)]
    members = [sound[0], CapableToy(Springs(0.1, 2.4, 2.7), Hole(20.0, 2.05, 0.3)), *sound[1:]]
    with pytest.warns(UserWarning, match=r"over 3 of 4 members .*member 2: the energy fell by"):
        dataset = Relaxation(moments="fixed").run(iron(2.75), CommitteeToy(members))
    lengths = dataset["lengths_member"].sel(vector="a")
    assert lengths["member"].values.tolist() == [0, 2, 3]
    assert lengths.values == pytest.approx(np.array([2.40, 2.42, 2.44]) * 2 / np.sqrt(3), abs=1e-5)


def test_short_bonds_of_the_start_and_cells_that_open_are_results():
    """Atoms at 0.65 of their covalent radii that stay there, and a compressed crystal that gains 18 eV/atom."""
    short = 0.65 * 2 * covalent_radii[26]
    dataset = Relaxation(moments="fixed").run(iron(2 / np.sqrt(3) * short), CapableToy(Springs(3.0, 0.98 * short, 1.9)))
    assert float(dataset["lengths"][0]) == pytest.approx(0.98 * short * 2 / np.sqrt(3), abs=1e-5)
    stiff = {**CURVES, "fm": (-8.1, 11.3, 20.0, 5.1)}
    dataset = Relaxation(moments="fixed").run(iron(2.4), CapableToy(MagneticEquationOfState(stiff)))
    assert float(dataset["gain"]) > 1.8e4
    assert float(dataset["volume"]) == pytest.approx(11.3, rel=2e-3)


def test_committee_spread():
    """Members with known minima and different numbers of steps."""
    shifts = np.array([0.0, 0.4, -0.05])
    members = [
        CapableToy(
            MagneticEquationOfState({k: (c[0], c[1] + d, *c[2:]) for k, c in CURVES.items()}), moments="magnitudes"
        )
        for d in shifts
    ]
    dataset = Relaxation(smax=1e-4).run(iron(), CommitteeToy(members))
    volumes = CURVES["fm"][1] + shifts
    assert float(dataset["volume"]) == pytest.approx(volumes.mean(), rel=1e-5)
    assert float(dataset["volume_std"]) == pytest.approx(volumes.std(ddof=1), rel=1e-4)
    assert dataset["step_volume_member"].values[:, -1] == pytest.approx(volumes, rel=1e-5)


@pytest.mark.parametrize(
    ("crystal", "a", "counts"),
    [("fcc", 3.6, (2, 2, 3, 12, 14)), ("bcc", 2.85, (2, 2, 3, 12, 14)), ("sc", 2.6, (2, 3, 3, 15, 14))],
)
def test_as_many_orders_as_there_are(crystal, a, counts):
    """Two-colourings of a Bravais lattice by size of their cell (Hart and Forcade, Phys. Rev. B 77, 224115 (2008))."""
    atoms = bulk("Fe", crystal, a=a)
    found = collinear_orders(atoms, np.array([2.0]), np.array([0, 0, 1.0]), 5, 1000, 1e-3, 1e-2)
    sizes = [o.cells for o in found]
    assert tuple(sizes.count(n) for n in range(1, 6)) == counts
    assert [o.name for o in found][:: len(found) - 1] == ["fm", "nm"]
    for order in found:
        assert order.atoms.get_volume() == pytest.approx(order.cells * atoms.get_volume())
        total = order.atoms.get_initial_magnetic_moments()[:, 2].sum()
        assert (abs(total) < 1e-9) == order.name.startswith(("afm", "nm"))


def test_orders_do_not_depend_on_the_cell_given():
    """The conventional cell gives what the primitive one gives; sites without moment stay without."""
    for atoms, lengths in (
        (bulk("Fe", cubic=True, a=2.85), [2.0, 2.0]),
        (bulk("Fe", "fcc", a=3.6, cubic=True), [2.0] * 4),
    ):
        found = collinear_orders(atoms, np.array(lengths), np.array([0, 0, 1.0]), 4, 1000, 1e-3, 1e-2)
        assert len(found) == 2 + 2 + 3 + 12
    feal = read_structure(EXAMPLES / "FeAl.cif")
    found = collinear_orders(feal, np.array([2.0, 0.0]), np.array([1.0, 0, 0]), 2, 100, 1e-3, 1e-2)
    assert [o.name for o in found] == ["fm", "afm-1", "afm-2", "afm-3", "nm"]
    for order in found:
        moments = order.atoms.get_initial_magnetic_moments()
        assert np.all(moments[order.atoms.numbers == 13] == 0)
        assert np.all(moments[:, 1:] == 0)


def test_orders_do_not_depend_on_rounding():
    """Lengths within mag_symprec are one, as they are where the cell given is a supercell."""
    cobalt, axis = bulk("Co", "hcp", a=2.5, c=4.07), np.array([0, 0, 1.0])
    expected = [o.name for o in collinear_orders(cobalt, np.array([1.6, 1.6]), axis, 2, 100, 1e-3, 1e-2)]
    for atoms, lengths in ((cobalt, [1.6, 1.604]), (cobalt.repeat((1, 1, 2)), [1.6, 1.604] * 2)):
        assert [o.name for o in collinear_orders(atoms, np.array(lengths), axis, 2, 100, 1e-3, 1e-2)] == expected
    many = bulk("Fe", a=2.85).repeat((3, 3, 2))
    many.numbers = np.arange(21, 39)
    with pytest.raises(OptionError, match="the crystal has 18 magnetic sites, too many orders to try"):
        collinear_orders(many, np.full(18, 2.0), axis, 1, 100, 1e-3, 1e-2)


@pytest.mark.parametrize("J", [2e-3, -2e-3])
def test_ranking_of_a_heisenberg_magnet(J):
    """fcc with one J: bonds counted by hand give 0, 12, 12 and 16 J m² above the ferromagnet."""
    model = CapableToy(Heisenberg(J, 2.7), Springs(3.0, 2.5, 2.7))
    start = with_moments(bulk("Fe", "fcc", a=np.sqrt(2) * 2.52), [[0, 0, 1.5]])
    dataset = Relaxation(moments="fixed", orders="auto").run(start, model)
    energies = dict(zip(dataset["order"].values, dataset["energy"].values, strict=True))
    unit = J * 1.5**2
    layered, alternating = sorted((energies["afm-1"], energies["afm-2"]), reverse=J < 0)
    assert layered - energies["fm"] == pytest.approx(12 * unit, abs=1e-7)
    assert alternating - energies["fm"] == pytest.approx(16 * unit, abs=1e-7)
    assert energies["nm"] - energies["fm"] == pytest.approx(12 * unit, abs=1e-7)
    assert dataset.attrs["best_order"] == ("fm" if J > 0 else str(dataset["order"].values[0]))
    above = dataset["above"].values
    assert above[0] == 0
    assert np.all(np.diff(above) >= 0)
    assert above[-1] == pytest.approx(16e3 * abs(unit), abs=1e-4)
    best = relaxed_structure(dataset)
    total = best.get_initial_magnetic_moments().sum(axis=0)
    assert (np.linalg.norm(total) > 1) == (J > 0)
    assert "above the best" in dataset["above"].attrs["long_name"]
    assert Relaxation().plot(dataset).axes


def test_an_order_that_fails_is_named_and_skipped():
    """A calculator that refuses compensated moments leaves the others in place."""

    class Choosy(CapableToy):
        def calculate(self, atoms, *arguments, **named):
            moments = atoms.get_initial_magnetic_moments()
            if np.abs(moments).max() > 0 and np.abs(moments.sum(axis=0)).max() < 1e-6:
                raise ValueError("compensated moments are beyond this model")
            super().calculate(atoms, *arguments, **named)

    property_ = Relaxation(moments="magnitudes", orders="auto")
    dataset = property_.run(iron(), coupled(Choosy))
    failures = dict(zip(dataset["order"].values, dataset["failure"].values, strict=True))
    assert failures["afm-1"] == "compensated moments are beyond this model"
    assert failures["fm"] == ""
    assert np.isnan(dataset["energy"].sel(order="afm-1"))
    assert any(row.value == failures["afm-1"] for row in property_.summary(dataset))


def test_structures_are_written_with_their_moments(tmp_path):
    """extxyz and magCIF give back a hexagonal cell with moments in all directions."""
    atoms = bulk("Co", "hcp", a=2.5, c=4.1) * (2, 1, 1)
    moments = np.random.default_rng(2).normal(size=(4, 3))
    atoms = with_moments(atoms, moments)
    for name in ("a.extxyz", "a.mcif"):
        write_structure(atoms, tmp_path / name)
        again = read_structure(tmp_path / name)
        assert again.cell.cellpar() == pytest.approx(atoms.cell.cellpar(), abs=1e-7)
        turn = np.linalg.solve(atoms.cell[:], again.cell[:])
        np.testing.assert_allclose(again.get_initial_magnetic_moments(), moments @ turn, atol=1e-5)
        np.testing.assert_allclose(again.get_all_distances(mic=True), atoms.get_all_distances(mic=True), atol=1e-7)
    with pytest.raises(OptionError, match="cannot be written"):
        write_structure(atoms, tmp_path / "a.poscar")


@pytest.mark.parametrize("name", ["a.extxyz", "a.mcif"])
def test_a_crystal_without_moments_comes_back_without_moments(name, tmp_path):
    """Zero moments are moments that are known: no guess takes their place."""
    write_structure(iron(moments=(0.0, 0.0)), tmp_path / name)
    again = read_structure(tmp_path / name)
    assert again.has("initial_magmoms")
    assert not again.get_initial_magnetic_moments().any()


def test_an_order_is_kept_that_turns_as_a_whole():
    """Moments that turn together keep their order; one that turns over, or vanishes, does not; traces do not count."""
    start = np.outer([2.0, 1.5, -1.2, 1.0, -0.8], [0, 0.6, 0.8])
    turned = 1.1 * start @ Rotation.random(random_state=5).as_matrix().T
    assert order_is_kept(start, turned)
    for k, factor in itertools.product(range(5), (-1.0, 0.0)):
        changed = turned.copy()
        changed[k] *= factor
        assert not order_is_kept(start, changed)
    pair = np.array([[0, 0, 2.0], [0, 0, -2.0]])
    assert not order_is_kept(pair, np.abs(pair))
    assert order_is_kept(pair * [[1], [2e-3]], pair * [[1], [0]])


def test_dataset_opens_plainly_and_the_structure_starts_the_next_run(tmp_path):
    """Plain xarray reads both kinds; a second relaxation from the file written has nothing left to do."""
    target = tmp_path / "fe.extxyz"
    dataset = Relaxation(moments="magnitudes", write=str(target)).run(iron(), coupled())
    ranked = Relaxation(moments="magnitudes", orders="auto").run(iron(), coupled())
    for k, one in enumerate((dataset, ranked)):
        write_dataset(one, tmp_path / f"{k}.nc")
        with xr.open_dataset(tmp_path / f"{k}.nc") as again:
            assert all(v.attrs["units"] and v.attrs["long_name"] for v in again.variables.values())
            assert set(again.variables) == set(one.variables)
    second = Relaxation(moments="magnitudes").run(read_structure(target), coupled())
    assert second.sizes["step"] == 1
    assert float(second["gain"]) == pytest.approx(0, abs=1e-9)
    assert Relaxation().plot(dataset).axes


def test_command_line(tmp_path, monkeypatch, capsys):
    """One structure; --order auto ranks orders; both write what they were asked to."""
    monkeypatch.chdir(tmp_path)
    one = ["relax", str(EXAMPLES / "Fe.cif"), "--calculator", TOY]
    assert main([*one, "--order", "fm", "--write", "fe.mcif", "--plot", "a.png"]) == 0
    assert "magnetic space group" in capsys.readouterr().out
    assert read_structure("fe.mcif").has("initial_magmoms")
    assert main([*one, "--order", "auto", "-o", "o.nc", "--plot", "b.png"]) == 0
    assert "meV/atom above" in capsys.readouterr().out
    with xr.open_dataset("o.nc") as data:
        assert set(data["order"].values) == {"fm", "afm-1", "afm-2", "nm"}
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_anything_left_has_no_legend():
    """A crystal at rest in a fixed cell has neither forces nor stress to draw."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Relaxation().plot(Relaxation(moments="fixed", cell="fixed").run(iron(), coupled())).axes


def test_refusals():
    """Options that make no sense, each with its sentence."""
    for options, sentence in (
        ({"cell": "ful"}, "did you mean 'full'"),
        ({"optimizer": "bfg"}, "did you mean 'bfgs'"),
        ({"fmax": 0.0}, "fmax cannot be 0"),
        ({"ions": False, "cell": "fixed"}, "nothing is left to relax"),
        ({"cell": "shape", "pressure": 3.0}, "a pressure does nothing"),
        ({"write": "a.cif"}, "cannot be written as 'a.cif'"),
    ):
        with pytest.raises(OptionError, match=sentence):
            Relaxation(**options)
    with pytest.raises(MomentError, match="no orders to try"):
        Relaxation(orders="auto").run(iron(moments=(0.0, 0.0)), coupled())
    with pytest.raises(OptionError, match="more than 5 orders within 4 cells"):
        Relaxation(orders="auto", max_cells=4, max_orders=5).run(iron(), coupled())
    with pytest.raises(OptionError, match="the product is at most 16"):
        Relaxation(orders="auto", max_cells=16).run(
            with_moments(bulk("Fe", "hcp", a=2.5), [[0, 0, 1.6]] * 2), coupled()
        )
