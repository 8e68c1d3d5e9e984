"""Exchange as files of other programs: energies of random states from what is written, and programs that read it."""

import os
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from ase import Atoms
from ase.build import bulk
from mmace_props.base import write_dataset
from mmace_props.cli import main
from mmace_props.errors import ConventionError, OptionError, OutputError
from mmace_props.exchange import Exchange, SpinModel
from mmace_props.export import export, spin_table, spirit
from mmace_props.protocol import with_moments
from mmace_props.supercell import Pairs, Supercell

from .test_exchange import chiral
from .toys import DMI, CapableToy, Heisenberg, PseudoDipolar, Uniaxial

JOULE = 6.241509074e18
RYDBERG = 13.605693122990
SIZE = 4


@pytest.fixture(scope="module")
def plain():
    """Isotropic and Dzyaloshinskii-Moriya exchange of a cell without symmetry, with a third, non-magnetic atom."""
    two = chiral()
    atoms = Atoms("AlFeCr", cell=two.cell, pbc=True, scaled_positions=[[0.5, 0.02, 0.7], *two.get_scaled_positions()])
    toy = CapableToy(Heisenberg(2e-3, 3.0), DMI(4e-4, 3.0))
    return Exchange(states=0, points=5, mesh=4).run(with_moments(atoms, [0.0, 2.1, 1.4]), toy)


@pytest.fixture(scope="module")
def full():
    """All terms at once: symmetric anisotropic exchange and a uniaxial site on a tetragonal cell."""
    atoms = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.8, 2.8, 3.1], pbc=True)
    toy = CapableToy(Heisenberg(2e-3, 3.2), PseudoDipolar(2e-4, 3.2), Uniaxial(3e-4, numbers=(26,)))
    return Exchange(states=0, points=5, mesh=4).run(with_moments(atoms, [2.0, 0.0]), toy)


def random_spins(sites, seed=0):
    spins = np.random.default_rng(seed).normal(size=(SIZE**3 * sites, 3))
    return spins / np.linalg.norm(spins, axis=1)[:, None]


def expected_energy(dataset, spins):
    """Energy in meV of spins, ordered by cell (a slowest) and site, in the project's own convention."""
    t = spin_table(dataset)
    cell = Atoms("H" * len(t.elements), scaled_positions=t.scaled, cell=t.cell, pbc=True)
    pairs = Pairs(t.first, t.second, t.shift, np.zeros((len(t.first), 3)))
    sites = np.arange(len(t.elements))
    return SpinModel(cell, sites, pairs, t.tensor, t.onsite).energy(spins[None], Supercell(cell, sites, (SIZE,) * 3))[0]


def partners(spins, sites, i, j, shift):
    """Spins of site i of every cell, and of site j of the cells shifted."""
    lattice = spins.reshape(SIZE, SIZE, SIZE, sites, 3)
    rolled = np.roll(lattice[..., j, :], tuple(-int(x) for x in shift), axis=(0, 1, 2))
    return lattice[..., i, :].reshape(-1, 3), rolled.reshape(-1, 3)


@pytest.mark.parametrize("name", ["plain", "full"])
def test_vampire(name, request, tmp_path):
    """Tensors in joule, ij and ji, each pair's energy once over both: -½ Σ S·J·S, uniaxial -k (S·e)²."""
    dataset = request.getfixturevalue(name)
    export(dataset, "vampire", tmp_path)
    lines = [x for x in (tmp_path / "vampire.UCF").read_text().splitlines() if not x.startswith("#")]
    lengths = np.array(lines[0].split(), float)
    cell = np.array([x.split() for x in lines[1:4]], float) * lengths[:, None]
    np.testing.assert_allclose(cell, spin_table(dataset).cell, rtol=1e-10, atol=1e-10)
    sites = int(lines[4].split()[0])
    spins, energy = random_spins(sites), 0.0
    count, kind = lines[5 + sites].split()
    assert kind == "tensorial"
    rows = lines[6 + sites :]
    assert len(rows) == int(count)
    for row in rows:
        _, i, j, *rest = row.split()
        here, there = partners(spins, sites, int(i), int(j), rest[:3])
        energy -= 0.5 * np.einsum("sx,xy,sy->", here, np.array(rest[3:], float).reshape(3, 3), there)
    material = dict(x.split("=", 1) for x in (tmp_path / "vampire.mat").read_text().splitlines())
    for site in range(sites):
        axis = np.array(material[f"material[{site + 1}]:uniaxial-anisotropy-direction"].split(","), float)
        constant = float(material[f"material[{site + 1}]:uniaxial-anisotropy-constant"])
        energy -= constant * ((spins.reshape(-1, sites, 3)[:, site] @ axis) ** 2).sum()
    # a traceless tensor and K (n·e)² differ by a constant
    shift = sum(np.linalg.eigvalsh(a).max() / 2 for a in spin_table(dataset).onsite) * SIZE**3
    assert energy * JOULE * 1e3 == pytest.approx(expected_energy(dataset, spins) - shift, rel=1e-8)
    moment = float(material["material[1]:atomic-spin-moment"].split()[0])
    assert moment == pytest.approx(abs(float(dataset["moments"][0])))


def test_vampire_keeps_the_cell_of_an_atom_on_its_boundary(plain, tmp_path):
    """A coordinate of -1e-17 is 0, not 1 in the cell before."""
    scaled = plain["scaled"].values.copy()
    scaled[0, 1] = -1e-17
    moved = plain.assign_coords(scaled=plain["scaled"].variable.copy(data=scaled))
    export(moved, "vampire", tmp_path)
    rows = [x.split() for x in (tmp_path / "vampire.UCF").read_text().splitlines() if not x.startswith("#")]
    assert float(rows[5][2]) == 0
    table = spin_table(moved)
    shifts = [[int(x) for x in row[3:6]] for row in rows[5 + len(table.elements) + 1 :]]
    np.testing.assert_array_equal(shifts, table.shift)


def uppasd_bonds(folder, name):
    """Sites, vector in Å and values of each pair, as the program makes them from maptype 2 and posfiletype D.

    Its input handler folds the basis into the first cell with a tolerance of 1e-7, and the vector of a pair is
    Bas(j) - Bas(i) + C1 r1 + C2 r2 + C3 r3.
    """
    head = (folder / "inpsd.dat").read_text().splitlines()
    start = next(k for k, x in enumerate(head) if x.startswith("cell"))
    cell = np.array([x.split()[-3:] for x in head[start : start + 3]], float)
    assert {"maptype 2", "posfiletype D", "Sym 0"} <= set(head)
    direct = np.loadtxt(folder / "posfile", ndmin=2)[:, 2:]
    basis = (direct - np.floor(direct + 1e-7)) @ cell
    rows = np.loadtxt(folder / name, ndmin=2)
    first, second = rows[:, 0].astype(int) - 1, rows[:, 1].astype(int) - 1
    return cell, basis, first, second, basis[second] - basis[first] + rows[:, 2:5] @ cell, rows[:, 5:]


def check_uppasd(dataset, folder):
    """Every pair is there with its own vector and ends on its second atom; the energy is that of the dataset."""
    export(dataset, "uppasd", folder)
    table = spin_table(dataset)
    sites = len(table.elements)
    expected = (table.shift + table.scaled[table.second] - table.scaled[table.first]) @ table.cell
    spins, energy = random_spins(sites), 0.0
    names = ["jfile"] + ["dmfile"] * (folder / "dmfile").exists()
    for name in names:
        cell, basis, first, second, bonds, values = uppasd_bonds(folder, name)
        np.testing.assert_allclose(cell, table.cell, atol=1e-9)
        np.testing.assert_array_equal(first, table.first)
        np.testing.assert_allclose(bonds, expected, atol=1e-8)
        for i, j, bond, value in zip(first, second, bonds, values, strict=True):
            places = np.linalg.solve(cell.T, (basis[i] + bond - basis).T).T
            off = np.abs(places - np.rint(places)).max(axis=1)
            assert np.flatnonzero(off < 1e-6).tolist() == [j]
            # spins are those of the dataset's cells, which the basis need not lie in
            shift = np.rint(np.linalg.solve(cell.T, bond) - table.scaled[j] + table.scaled[i])
            here, there = partners(spins, sites, i, j, shift)
            if name == "jfile":
                energy -= value[0] * (here * there).sum()
            else:
                energy += (np.cross(here, there) @ value).sum()
    assert energy * RYDBERG == pytest.approx(expected_energy(dataset, spins), rel=1e-8)
    return names


def test_uppasd(plain, tmp_path):
    """Energy of its code, -Σ_{i≠j} J S·S and +Σ D·(S×S) in mRy, with the bonds that it makes of the files."""
    assert check_uppasd(plain, tmp_path) == ["jfile", "dmfile"]
    moments = np.loadtxt(tmp_path / "momfile")
    np.testing.assert_allclose(moments[:, 2], np.linalg.norm(spin_table(plain).moments, axis=1))
    assert "dm ./dmfile" in (tmp_path / "inpsd.dat").read_text()


def test_uppasd_bonds_between_sublattices(tmp_path):
    """Two sites of an antiferromagnetic bcc cell: the nearest neighbours are on the other one."""
    atoms = with_moments(bulk("Fe", cubic=True, a=2.83), [[0, 0, 2.2], [0, 0, -2.2]])
    dataset = Exchange(states=0, points=5, mesh=4).run(atoms, CapableToy(Heisenberg(-2e-3, 2.6)))
    assert check_uppasd(dataset, tmp_path) == ["jfile"]
    _, _, first, second, bonds, _ = uppasd_bonds(tmp_path, "jfile")
    lengths = np.linalg.norm(bonds[first != second], axis=1)
    assert np.count_nonzero(np.isclose(lengths, 2.83 * np.sqrt(3) / 2)) == 16


def test_uppasd_folds_the_basis_as_the_program_does(plain, tmp_path):
    """Sites outside the first cell, or below its boundary by rounding, keep their bonds."""
    scaled = plain["scaled"].values.copy()
    scaled[0] += [1, 0, -1]
    scaled[1, 1] = -1e-17
    check_uppasd(plain.assign_coords(scaled=plain["scaled"].variable.copy(data=scaled)), tmp_path)


def spirit_tables(text):
    """Return the pairs and the anisotropy of a configuration."""
    lines = text.splitlines()
    found = {}
    for key in ("n_interaction_pairs", "n_anisotropy"):
        start = next(k for k, x in enumerate(lines) if x.startswith(key + " "))
        count = int(lines[start].split()[1])
        found[key] = np.array([x.split() for x in lines[start + 2 : start + 2 + count]], float)
    return found["n_interaction_pairs"], found["n_anisotropy"]


def test_spirit(plain, tmp_path):
    """Every pair once: -Σ J S·S - Σ D·(S×S) in meV."""
    export(plain, "spirit", tmp_path)
    pairs, _ = spirit_tables((tmp_path / "spirit.cfg").read_text())
    sites = len(spin_table(plain).elements)
    assert 2 * len(pairs) == plain.sizes["pair"]
    spins, energy = random_spins(sites), 0.0
    for row in pairs:
        here, there = partners(spins, sites, int(row[0]), int(row[1]), row[2:5])
        energy -= row[5] * (here * there).sum() + row[6] * (np.cross(here, there) @ row[7:10]).sum()
    assert energy == pytest.approx(expected_energy(plain, spins), rel=1e-8)


def test_spirit_itself_gives_the_energy(plain, full, tmp_path, monkeypatch):
    """The program reads the file and computes the same energy, single-ion terms included."""
    state = pytest.importorskip("spirit.state")
    from spirit import system

    monkeypatch.chdir(tmp_path)
    for dataset in (plain, full):
        export(dataset, "spirit", tmp_path, drop=True)
        table = spin_table(dataset)
        sites = len(table.elements)
        config = (
            (tmp_path / "spirit.cfg").read_text().replace("n_basis_cells 8 8 8", f"n_basis_cells {SIZE} {SIZE} {SIZE}")
        )
        (tmp_path / "spirit.cfg").write_text(config)
        spins = random_spins(sites)
        with state.State("spirit.cfg", quiet=True) as handle:
            order = spins.reshape(SIZE, SIZE, SIZE, sites, 3).transpose(2, 1, 0, 3, 4).reshape(-1, 3)
            system.get_spin_directions(handle)[:] = order
            system.update_data(handle)
            energy = system.get_energy(handle)
        kept = dataset.copy()
        kept["tensor"] = dataset["tensor"] - xr.DataArray(table.anisotropic, dims=dataset["tensor"].dims)
        shift = sum(np.linalg.eigvalsh(a).max() / 2 for a in table.onsite) * SIZE**3
        assert energy == pytest.approx(expected_energy(kept, spins) - shift, rel=1e-6)


def test_spirit_in_boxes_smaller_than_the_pairs_reach(tmp_path, monkeypatch):
    """Spirit leaves out pairs that reach farther than across its box; folded into it, they have their energy."""
    state = pytest.importorskip("spirit.state")
    from spirit import system

    monkeypatch.chdir(tmp_path)
    atoms = with_moments(chiral(), [2.1, 1.4])
    dataset = Exchange(states=0, points=5, mesh=4, radius=6.0).run(
        atoms, CapableToy(Heisenberg(2e-3, 6.5, 0.5), DMI(4e-4, 3.0))
    )
    table = spin_table(dataset)
    reach = int(np.abs(table.shift).max())
    assert reach > 1
    bare = Pairs(table.first, table.second, table.shift, np.zeros((len(table.first), 3)))
    kept = table.tensor - table.anisotropic
    for size in range(1, reach + 2):
        (tmp_path / "spirit.cfg").write_text(spirit(table, drop=True, cells=size)["spirit.cfg"])
        spins = np.random.default_rng(size).normal(size=(2, size**3 * 2, 3))
        spins /= np.linalg.norm(spins, axis=2)[..., None]
        found = []
        with state.State("spirit.cfg", quiet=True) as handle:
            for one in spins:
                order = one.reshape(size, size, size, 2, 3).transpose(2, 1, 0, 3, 4).reshape(-1, 3)
                system.get_spin_directions(handle)[:] = order
                system.update_data(handle)
                found.append(system.get_energy(handle))
        model = SpinModel(chiral(), np.arange(2), bare, kept, table.onsite)
        expected = model.energy(spins, Supercell(chiral(), np.arange(2), (size,) * 3))
        # pairs of a moment with itself are constant
        assert np.ptp(found) == pytest.approx(np.ptp(expected), rel=1e-5)


def test_spirit_has_room_for_every_pair(plain):
    """A box of eight cells, or more where pairs reach across more."""
    table = spin_table(plain)
    far = replace(table, shift=table.shift * np.array([1, 1, 11]))
    for one, size in ((table, 8), (far, 11 * int(np.abs(table.shift[:, 2]).max()))):
        assert f"n_basis_cells {size} {size} {size}" in spirit(one, drop=True)["spirit.cfg"]


def test_tb2j(plain, tmp_path):
    """J, D and the anisotropic part of exchange.out add up to the tensor, for every pair."""
    export(plain, "tb2j", tmp_path)
    table = spin_table(plain)
    blocks = (tmp_path / "exchange.out").read_text().split("-" * 88)[1:]
    assert len(blocks) == len(table.first)
    for k, block in enumerate(blocks):
        lines = block.strip().splitlines()
        isotropic = float(lines[1].split()[-1])
        d = np.array(lines[2].split("(")[1].strip(")").split(), float)
        rows = np.array([x.strip("[] ").split() for x in lines[4:7]], float)
        chiral_part = np.array([[0, d[2], -d[1]], [-d[2], 0, d[0]], [d[1], -d[0], 0]])
        np.testing.assert_allclose(isotropic * np.eye(3) + chiral_part + rows, table.tensor[k], atol=1e-8)


def test_magnopy_reads_it(plain, tmp_path):
    """magnopy takes exchange.out and gives the energy of two random spins of the cell."""
    magnopy = pytest.importorskip("magnopy")
    export(plain, "magnopy", tmp_path)
    hamiltonian = magnopy.io.load_tb2j(tmp_path / "exchange.out")
    spins = random_spins(2)[:2]
    everywhere = np.tile(spins, (SIZE**3, 1))
    energy = magnopy.Energy(hamiltonian).E_0(spins)
    assert energy == pytest.approx(expected_energy(plain, everywhere) / SIZE**3, rel=1e-7)


def test_vampire_without_moments_that_it_does_not_read(tmp_path):
    """Moments below 0.1 µB are refused, or left out with their pairs; what stays has the energy that it had."""
    atoms = Atoms("AlFeCr", positions=[[0, 0, 0], [1.2, 0, 0], [0, 1.7, 0]], cell=[2.8, 2.9, 3.1], pbc=True)
    dataset = Exchange(states=0, points=5, mesh=4).run(
        with_moments(atoms, [0.04, 2.0, 1.5]), CapableToy(Heisenberg(2e-3, 3.2))
    )
    with pytest.raises(ConventionError, match=r"no moments below 0.1 µB, here site 0 \(Al, 0.04 µB\)"):
        export(dataset, "vampire", tmp_path)
    assert os.listdir(tmp_path) == []
    export(dataset, "vampire", tmp_path, drop=True)
    material = (tmp_path / "vampire.mat").read_text()
    assert "num-materials=2" in material
    assert "Al" not in material
    rows = [x.split() for x in (tmp_path / "vampire.UCF").read_text().splitlines() if not x.startswith("#")]
    start = next(k for k, row in enumerate(rows) if row[-1] == "tensorial") + 1
    written = sum(float(row[6]) for row in rows[start:]) / 1.602176634e-22 / 2
    table = spin_table(dataset)
    kept = (table.first > 0) & (table.second > 0)
    assert len(rows) - start == kept.sum()
    assert written == pytest.approx(table.isotropic[kept].sum(), rel=1e-9)


def test_what_a_program_does_not_hold_is_refused(full, plain, tmp_path):
    """Nothing is left out silently, nothing is half-written."""
    for program, word in (
        ("uppasd", "symmetric anisotropic"),
        ("spirit", "symmetric anisotropic"),
        ("tb2j", "single-ion"),
    ):
        with pytest.raises(ConventionError, match=word):
            export(full, program, tmp_path)
    assert os.listdir(tmp_path) == []
    assert export(full, "uppasd", tmp_path, drop=True)
    single_ion = Exchange(states=0, points=5, mesh=4).run(
        with_moments(Atoms("Fe", cell=[2.8, 2.8, 3.1], pbc=True), [2.0]),
        CapableToy(Heisenberg(2e-3, 3.2), Uniaxial(3e-4)),
    )
    with pytest.raises(ConventionError, match="single-ion anisotropy has no place"):
        export(single_ion, "uppasd", tmp_path)
    with pytest.raises(OptionError, match="did you mean 'vampire'"):
        export(plain, "vampir", tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        export(plain, "vampire", tmp_path / "no")
    with pytest.raises(OptionError, match="only datasets of 'exchange'"):
        export(xr.Dataset(), "vampire", tmp_path)


def test_command_line(plain, tmp_path, monkeypatch, capsys):
    """mmace-props export, and its bad input."""
    monkeypatch.chdir(tmp_path)
    write_dataset(plain, "x.nc")
    (tmp_path / "out").mkdir()
    assert main(["export", "x.nc", "--to", "vampire", "-o", "out"]) == 0
    assert sorted(os.listdir("out")) == ["vampire.UCF", "vampire.mat"]
    (tmp_path / "bad.nc").write_text("nonsense")
    for arguments, word in (
        (["bad.nc", "--to", "vampire"], "cannot be read as a dataset"),
        (["missing.nc", "--to", "vampire"], "there is no dataset 'missing.nc'"),
        (["x.nc", "--to", "vampir"], "did you mean 'vampire'"),
        (["x.nc"], "--to"),
    ):
        capsys.readouterr()
        assert main(["export", *arguments]) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1
        assert word in errors[0]
