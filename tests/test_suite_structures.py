"""Reading structures and moments, guesses of orders, and refusals."""

import itertools

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.calculators.singlepoint import SinglePointCalculator
from ase.dft.kpoints import parse_path_string
from ase.io import write
from mmace_props.errors import MomentError, OptionError, StructureError
from mmace_props.protocol import SpinCalculator, moments_of, with_moments
from mmace_props.relax import write_structure
from mmace_props.structures import (
    antiferromagnetic_signs,
    check_structure,
    formula,
    parse_moments,
    read_moments,
    read_structure,
    start_structure,
)
from mmace_props.symmetry import band_path, orbit, pattern_symmetry, special_points
from scipy.spatial.transform import Rotation

from .toys import CapableToy, Heisenberg, Landau, Toy

MAGCIF = """data_x
_parent_space_group.name_H-M_alt 'P m -3 m'
_space_group_magn.name_BNS "P4/mm'm'"
_cell_length_a 2.9
_cell_length_b 2.9
_cell_length_c 2.9
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_space_group_symop_magn_operation.id
_space_group_symop_magn_operation.xyz
1 x,y,z,+1
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Fe1 Fe 0 0 0 1
Fe2 Fe 0.5 0.5 0.5 1
loop_
_atom_site_moment.label
_atom_site_moment.crystalaxis_x
_atom_site_moment.crystalaxis_y
_atom_site_moment.crystalaxis_z
Fe1 0 0 2.2
Fe2 1.0 0 -2.0
"""


def toy():
    return SpinCalculator(CapableToy(Landau(0.05, 0.005), Heisenberg(2e-3, 3.3)))


def test_magcif_moments(tmp_path):
    """Moments of a magCIF arrive as Cartesian vectors."""
    file = tmp_path / "x.mcif"
    file.write_text(MAGCIF)
    atoms = read_structure(file)
    assert sorted(map(tuple, np.round(moments_of(atoms), 8))) == [(0, 0, 2.2), (1.0, 0, -2.0)]


def test_moments_of_magcif_that_cannot_be_read_are_no_zeros(tmp_path):
    """Moments along Cartesian axes, and operations without time reversal, which would leave atoms out."""
    file = tmp_path / "x.mcif"
    file.write_text(MAGCIF.replace("crystalaxis", "Cartn"))
    with pytest.raises(StructureError, match="not along the crystal axes"):
        read_structure(file)
    head, atoms = (
        MAGCIF.split("loop_\n_space_group_symop", 1)[0],
        "loop_\n_atom_site_label" + MAGCIF.split("_atom_site_label")[1],
    )
    plain = (
        head.replace("_space_group_magn.name_BNS \"P4/mm'm'\"\n", "") + "loop_\n_symmetry_equiv_pos_as_xyz\n{}" + atoms
    )
    file.write_text(plain.format("x,y,z\n-x+1/4,y,z\n"))
    with pytest.raises(StructureError, match="not those of a magnetic space group"):
        read_structure(file)
    file.write_text(plain.format("x,y,z\n"))
    assert len(read_structure(file)) == 2


@pytest.mark.parametrize("name", ["x.extxyz", "x.traj", "x.json"])
def test_formats_that_carry_moments(tmp_path, name):
    """Vector moments come back from ASE's own formats, whether given or computed."""
    atoms = with_moments(bulk("Fe", cubic=True), [[0, 1.0, 2.0], [0.5, 0, -2.0]])
    write(tmp_path / name, atoms)
    np.testing.assert_allclose(moments_of(read_structure(tmp_path / name)), moments_of(atoms), atol=1e-8)


def test_computed_moments_are_taken(tmp_path):
    """Where a file holds results alone, its computed moments are the moments."""
    atoms = bulk("Fe", cubic=True)
    atoms.set_initial_magnetic_moments(None)
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, magmoms=[2.1, -2.1])
    write(tmp_path / "x.extxyz", atoms)
    np.testing.assert_allclose(moments_of(read_structure(tmp_path / "x.extxyz"))[:, 2], [2.1, -2.1])


def test_poscar_has_none(tmp_path):
    """A format without moments gives a structure without moments."""
    write(tmp_path / "POSCAR", bulk("Fe", cubic=True), format="vasp")
    assert not read_structure(tmp_path / "POSCAR").has("initial_magmoms")


def test_of_several_structures_the_last_is_taken_and_said(tmp_path):
    """Frames of a relaxation, one of which is meant."""
    frames = [bulk("Fe", cubic=True, a=a) for a in (2.8, 2.9)]
    write(tmp_path / "run.extxyz", frames)
    with pytest.warns(UserWarning, match="run.extxyz' holds 2 structures; the last one is taken"):
        atoms = read_structure(tmp_path / "run.extxyz")
    assert atoms.cell[0, 0] == pytest.approx(2.9)


def test_unreadable_files(tmp_path):
    """No file, nonsense, nothing in it, partial occupancies: one sentence each."""
    with pytest.raises(StructureError, match="there is no structure file"):
        read_structure(tmp_path / "no.cif")
    (tmp_path / "bad.cif").write_text("this is not a structure")
    with pytest.raises(StructureError, match=r"bad\.cif"):
        read_structure(tmp_path / "bad.cif")
    (tmp_path / "bad.xyz").write_bytes(b"\x00\xff\x17nonsense")
    with pytest.raises(StructureError, match="cannot be read"):
        read_structure(tmp_path / "bad.xyz")
    (tmp_path / "half.mcif").write_text(MAGCIF.replace("0.5 0.5 0.5 1", "0.5 0.5 0.5 0.4"))
    with pytest.raises(StructureError, match="partially occupied"):
        read_structure(tmp_path / "half.mcif")
    plain = MAGCIF.split("loop_\n_atom_site_moment")[0].replace("0 0 0 1", "0 0 0 0.7")
    (tmp_path / "half.cif").write_text(plain)
    with pytest.raises(StructureError, match=r"partially occupied \(Fe 0.7\)"):
        read_structure(tmp_path / "half.cif")


def test_structures_that_cannot_be_computed():
    """Positions, cells, overlaps, elements, moments."""
    good = bulk("Fe", cubic=True)
    good.set_initial_magnetic_moments(None)
    nan = good.copy()
    nan.positions[1, 0] = np.nan
    with pytest.raises(StructureError, match="position of atom 1"):
        check_structure(nan)
    with pytest.raises(StructureError, match="no cell"):
        check_structure(Atoms("Fe2", positions=[[0, 0, 0], [0, 0, 2.5]]))
    slab = good.copy()
    slab.pbc = [True, True, False]
    with pytest.raises(StructureError, match="not periodic"):
        check_structure(slab)
    near = good.copy()
    near.positions[1] = [0.3, 0, 0]
    with pytest.raises(StructureError, match=r"atoms 0 \(Fe\) and 1 \(Fe\) overlap: they are 0\.30"):
        check_structure(near)
    tiny = Atoms("Fe", cell=[0.7, 3, 3], pbc=True)
    with pytest.raises(StructureError, match="overlap"):
        check_structure(tiny)
    with pytest.raises(StructureError, match="does not know the element Xe; it knows Fe, Al"):
        check_structure(bulk("Xe"), toy())
    with pytest.raises(StructureError, match="holds no atoms"):
        check_structure(Atoms(cell=[1, 1, 1], pbc=True))
    with pytest.raises(MomentError, match=r"moment of atom 1.*far outside"):
        check_structure(with_moments(good, [[0, 0, 2], [0, 0, 40.0]]), toy())
    with pytest.raises(MomentError, match="far outside"):
        check_structure(with_moments(good, [[0, 0, 2], [0, 0, 13.0]]))


def test_moment_tables_and_files(tmp_path):
    """Tables by element, and files of one or three columns."""
    assert parse_moments("Fe=2.2, Al=0") == {"Fe": 2.2, "Al": 0.0}
    for bad in ("Fe", "Fe=x", "Qq=1", "Fe=nan", ""):
        with pytest.raises(OptionError):
            parse_moments(bad)
    one, two, three = (
        Atoms("Fe" * n, scaled_positions=[[k / n, 0, 0] for k in range(n)], cell=[8] * 3) for n in (1, 2, 3)
    )
    (tmp_path / "a.txt").write_text("2.0\n-1.5\n")
    np.testing.assert_array_equal(read_moments(tmp_path / "a.txt", two), [[0, 0, 2.0], [0, 0, -1.5]])
    (tmp_path / "b.txt").write_text("1 0 2\n0 0 -1\n")
    np.testing.assert_array_equal(read_moments(tmp_path / "b.txt", two), [[1, 0, 2.0], [0, 0, -1]])
    (tmp_path / "one.txt").write_text("2.0\n")
    np.testing.assert_array_equal(read_moments(tmp_path / "one.txt", one), [[0, 0, 2.0]])
    with pytest.raises(MomentError, match=r"a.txt' holds 2 x 1 numbers, but 3 atoms need 3 rows"):
        read_moments(tmp_path / "a.txt", three)
    with pytest.raises(MomentError, match="no moments can be read"):
        read_moments(tmp_path / "no.txt", three)


@pytest.mark.parametrize("suffix", ["extxyz", "json", "traj"])
def test_moments_of_the_same_structure_in_a_file(suffix, tmp_path):
    """Vectors and single numbers of a file that holds the structure itself, as they are."""
    crystal = bulk("Fe", cubic=True)
    write(tmp_path / f"c.{suffix}", with_moments(crystal, [[0, 0, 1], [0, 1, 0]]))
    np.testing.assert_array_equal(read_moments(tmp_path / f"c.{suffix}", crystal), [[0, 0, 1], [0, 1, 0]])
    crystal.set_initial_magnetic_moments([2.0, -1.0])
    write(tmp_path / f"d.{suffix}", crystal)
    np.testing.assert_array_equal(read_moments(tmp_path / f"d.{suffix}", crystal), [[0, 0, 2], [0, 0, -1]])
    crystal.set_initial_magnetic_moments(None)
    write(tmp_path / f"e.{suffix}", crystal)
    with pytest.raises(MomentError, match="carries no moments"):
        read_moments(tmp_path / f"e.{suffix}", crystal)


def feal():
    cell = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.9] * 3, pbc=True)
    return with_moments(cell, [[0.1, 0.2, 0.8], [0, 0, 0]])


def skewed():
    """Three iron atoms and a nitrogen in a triclinic cell, each with a moment of its own."""
    scaled = [[0, 0, 0.02], [0.5, 0.48, 0], [0.1, 0.55, 0.5], [0.98, 0.02, 0.5]]
    cell = Atoms("Fe2NFe", scaled_positions=scaled, cell=[[0.3, 3.9, 0.2], [0, 0.4, 4.1], [3.8, 0.2, 0.1]], pbc=True)
    return with_moments(cell, [[2, 0.3, 0], [-1.8, 0.2, 0.4], [0, 0.1, 0.1], [0.2, 1.1, -1]])


@pytest.mark.parametrize("structure", [feal(), with_moments(bulk("Fe", a=2.83), [[0, 0, 2.2]]), skewed()])
def test_moments_of_magcif_come_back_on_their_atoms_and_in_their_frame(structure, tmp_path):
    """magCIF sorts atoms and has a frame of its own, which a primitive bcc cell is turned into."""
    write_structure(structure, tmp_path / "m.mcif")
    again = read_structure(tmp_path / "m.mcif")
    changed = not np.array_equal(again.numbers, structure.numbers)
    assert changed or not np.allclose(again.cell[:], structure.cell[:], atol=0.1)
    np.testing.assert_allclose(read_moments(tmp_path / "m.mcif", structure), moments_of(structure), atol=1e-7)


def test_moments_of_a_relaxed_file_that_is_turned_and_sorted_otherwise(tmp_path):
    """A few percent of strain and displaced atoms: vectors turn by the rotation alone, single numbers stay along z."""
    structure = skewed()
    rotation = Rotation.from_euler("xyz", [20, 70, 130], degrees=True).as_matrix()
    strain = np.eye(3) + np.array([[0.03, 0.01, 0], [0.01, -0.02, 0.005], [0, 0.005, 0.01]])
    order = [3, 0, 2, 1]
    relaxed = structure.copy()
    relaxed.set_cell(structure.cell[:] @ strain, scale_atoms=True)
    relaxed.positions += np.random.default_rng(0).normal(0, 0.05, (4, 3)) + relaxed.cell[2]
    relaxed.set_cell(relaxed.cell[:] @ rotation.T)
    relaxed.positions = relaxed.positions @ rotation.T
    file = with_moments(relaxed[order], (moments_of(structure) @ rotation.T)[order])
    write(tmp_path / "r.extxyz", file)
    np.testing.assert_allclose(read_moments(tmp_path / "r.extxyz", structure), moments_of(structure), atol=0.02)
    lengths = np.array([2.0, -1.8, 0.0, 1.5])
    numbers = relaxed[order]
    numbers.set_initial_magnetic_moments(None)
    numbers.set_initial_magnetic_moments(lengths[order])
    write(tmp_path / "n.extxyz", numbers)
    np.testing.assert_array_equal(read_moments(tmp_path / "n.extxyz", structure)[:, 2], lengths)


def test_moments_of_another_crystal_are_refused(tmp_path):
    """Other numbers of atoms, other elements, other places, other cells, and a mirror image."""
    structure = feal()
    swapped, far, stretched, mirrored = (structure.copy() for _ in range(4))
    swapped.numbers = [13, 13]
    far.positions[1] += [0.6, 0, 0]
    stretched.set_cell([2.9, 2.9, 3.3], scale_atoms=True)
    mirrored.set_cell([2.9, 2.9, -2.9], scale_atoms=True)
    for other, reason in (
        (structure.repeat((2, 1, 1)), "it has 4 atoms instead of 2"),
        (swapped, r"its atom 0 \(Al\) is at no such atom"),
        (far, r"its atom 1 \(Al\) is at no such atom"),
        (stretched, "its cell vectors are others"),
        (mirrored, "its cell vectors are others"),
    ):
        write(tmp_path / "o.extxyz", other)
        with pytest.raises(StructureError, match=f"are of another crystal than the structure: {reason}"):
            read_moments(tmp_path / "o.extxyz", structure)
    structure.set_cell(None)
    with pytest.raises(StructureError, match="no cell in three dimensions"):
        read_moments(tmp_path / "o.extxyz", structure)


def test_orders_and_where_they_came_from():
    """The file's moments, a guess of an order, the lower of two, and what is refused."""
    spin, iron = toy(), bulk("Fe", cubic=True, a=2.83)
    iron.set_initial_magnetic_moments(None)
    auto = start_structure(iron, spin)
    assert auto.order == "fm"
    assert "lower of fm and afm" in auto.origin
    afm = start_structure(iron, SpinCalculator(CapableToy(Heisenberg(-2e-3, 2.6))))
    assert afm.order == "afm"
    np.testing.assert_array_equal(moments_of(afm.atoms)[:, 2], [2.2, -2.2])
    table = start_structure(iron, spin, order="fm", table={"Fe": 1.8})
    np.testing.assert_array_equal(moments_of(table.atoms)[:, 2], [1.8, 1.8])
    assert "Fe 1.8" in table.origin
    signed = bulk("Fe", cubic=True, a=2.83)
    signed.symbols[1] = "Cr"
    for order, along in (("fm", [2.0, 1.0]), ("afm", [2.0, -1.0])):
        named = start_structure(signed, spin, order=order, table={"Fe": 2.0, "Cr": -1.0})
        np.testing.assert_array_equal(moments_of(named.atoms)[:, 2], along)
    given = start_structure(with_moments(iron, [[1, 0, 1], [0, 1, 0]]), spin)
    assert given.order == "given"
    np.testing.assert_array_equal(moments_of(given.atoms), [[1, 0, 1], [0, 1, 0]])
    filed = start_structure(iron, spin, moments=np.array([[0, 0, 1.0], [0, 0, -1.0]]))
    assert filed.origin == "moments from the file given"
    with pytest.raises(OptionError, match="did you mean 'afm'"):
        start_structure(iron, spin, order="affm")
    with pytest.raises(OptionError, match="leave no room"):
        start_structure(iron, spin, order="fm", moments=np.zeros((2, 3)))
    with pytest.raises(OptionError, match="given for Cr"):
        start_structure(iron, spin, table={"Cr": 2.0})
    with pytest.raises(MomentError, match="nothing says how large the moment of Fe is"):
        start_structure(iron, SpinCalculator(Toy(Landau(1, 1))))


def test_antiferromagnetic_patterns():
    """Rocksalt layers, a bipartite supercell, and cells that hold no such order."""
    bcc = bulk("Fe", cubic=True)
    np.testing.assert_array_equal(antiferromagnetic_signs(bcc, np.ones(2)), [1, -1])
    large = make_supercell(bcc, 3 * np.eye(3))
    signs = antiferromagnetic_signs(large, np.ones(54))
    i_body = np.rint(large.get_scaled_positions()[:, 0] * 6).astype(int) % 2
    assert set(signs[i_body == 0]) in ({1.0}, {-1.0})
    assert signs.sum() == 0
    salt = bulk("CrN", "rocksalt", a=4.2, cubic=True)
    lengths = np.where(salt.numbers == 24, 2.8, 0.0)
    signs = antiferromagnetic_signs(salt, lengths)
    assert signs[salt.numbers == 24].sum() == 0
    assert np.all(signs[salt.numbers == 7] == 1)
    with pytest.raises(MomentError, match="1 magnetic site holds"):
        antiferromagnetic_signs(bulk("Fe"), np.ones(1))
    with pytest.raises(MomentError, match="3 magnetic sites hold"):
        antiferromagnetic_signs(bulk("Fe") * (3, 1, 1), np.ones(3))
    with pytest.raises(MomentError, match="neighbours"):
        antiferromagnetic_signs(bulk("Cu") * (3, 3, 2), np.ones(18))


@pytest.mark.parametrize(
    ("cell", "signs", "system"),
    [
        (bulk("Fe", cubic=True), [1, 1], "cubic"),
        (bulk("Fe"), [1], "cubic"),
        (bulk("Fe", cubic=True), [1, -1], "cubic"),
        (bulk("Co", "hcp", a=2.5, c=4.1), [1, 1], "hexagonal"),
        (bulk("Fe", cubic=True) * (1, 1, 2), [1, 1, -1, -1], "tetragonal"),
        (Atoms("Fe", cell=[2.6, 2.8, 3.0], pbc=True), [1], "orthorhombic"),
        (Atoms("Fe", cell=[2.6, 2.8, 3.0, 90, 100, 90], pbc=True), [1], "monoclinic"),
        (Atoms("Fe", cell=[2.6, 2.8, 3.0, 80, 100, 95], pbc=True), [1], "triclinic"),
        (Atoms("Fe", cell=[2.6, 2.6, 2.6, 70, 70, 70], pbc=True), [1], "trigonal"),
    ],
)
def test_symmetry_of_patterns(cell, signs, system):
    """The crystal system of E(n) follows lattice and order, with a right-handed frame."""
    found = pattern_symmetry(cell, np.array(signs, float), 1e-4, 1e-2)
    assert found.system == system
    np.testing.assert_allclose(found.frame @ found.frame.T, np.eye(3), atol=1e-10)
    assert np.linalg.det(found.frame) == pytest.approx(1)
    np.testing.assert_allclose(
        found.rotations @ found.rotations.transpose(0, 2, 1), np.eye(3)[None].repeat(len(found.rotations), 0), atol=1e-8
    )
    if system == "cubic":
        np.testing.assert_allclose(found.frame, np.eye(3), atol=1e-8)
        assert len(orbit(np.array([1.0, 1, 1]) / np.sqrt(3), found.rotations)) == 4
        assert len(orbit(np.array([0, 0, 1.0]), found.rotations)) == 3
    if system in ("hexagonal", "tetragonal"):
        np.testing.assert_allclose(np.abs(found.frame[2]), [0, 0, 1], atol=1e-8)


def test_path_is_measured_in_radians_per_angstrom():
    """Γ to H of a bcc lattice is 2π/a long, and every step along it as long as its wave vector says."""
    cell = bulk("Fe", a=2.83)
    q, position, labels = band_path(cell, "GHN", 30)
    assert dict(labels)["H"] == pytest.approx(2 * np.pi / 2.83)
    steps = np.linalg.norm(np.diff(q, axis=0) @ cell.cell.reciprocal()[:], axis=1) * 2 * np.pi
    np.testing.assert_allclose(np.diff(position), steps, atol=1e-12)
    with pytest.raises(OptionError, match="no path 'XYZW'"):
        band_path(cell, "XYZW", 30)


@pytest.mark.parametrize(
    ("cell", "path", "points"),
    [
        # Y-C0 and E0-T are next to nothing long
        (Atoms("Fe", cell=[[2, 2.02, 0], [2, -2.02, 0], [0, 0, 3]], pbc=True), "auto", 101),
        (bulk("Fe", a=2.83), "auto", 8),
        (bulk("Co", "hcp", a=2.5, c=4.1), "HKH2", 20),
    ],
    ids=["short", "few", "straight"],
)
def test_places_along_the_path_are_sums_of_its_steps(cell, path, points):
    """Every special point is named where it stands, next to others and on a straight line too; jumps have no length."""
    known, usual = special_points(cell, 1e-3)
    place, expected = 0.0, []
    for part in parse_path_string(usual if path == "auto" else path):
        expected.append((part[0], place))
        for a, b in itertools.pairwise(part):
            place += 2 * np.pi * np.linalg.norm((known[b] - known[a]) @ cell.cell.reciprocal()[:])
            expected.append((b, place))
    q, position, labels = band_path(cell, path, points)
    assert [name for name, _ in labels] == [name for name, _ in expected]
    np.testing.assert_allclose([x for _, x in labels], [x for _, x in expected], atol=1e-8)
    assert len(q) == len(position)
    assert (np.diff(position) >= 0).all()


@pytest.mark.parametrize(
    ("atoms", "segments"),
    [
        (bulk("Fe", a=2.83), "GH HN NG GP PH PN"),
        (bulk("Ni", a=3.5), "GX XU KG GL LW WX"),
        (bulk("Co", "hcp", a=2.5, c=4.1), "GM MK KG GA AL LH HA LM HK"),
        (Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.9] * 3, pbc=True), "GX XM MG GR RX RM"),
    ],
    ids=["bcc", "fcc", "hcp", "B2"],
)
def test_paths_of_seekpath(atoms, segments):
    """Hinuma's paths; their points lie where the lattice's other tables have those of the same name."""
    points, path = special_points(atoms, 1e-3)
    found = [a + b for part in path.split(",") for a, b in itertools.pairwise(part)]
    assert sorted("".join(sorted(x)) for x in found) == sorted("".join(sorted(x)) for x in segments.split())
    for name, q in atoms.cell.bandpath().special_points.items():
        lengths = [np.linalg.norm(x @ atoms.cell.reciprocal()[:]) for x in (q, points[name])]
        assert lengths[0] == pytest.approx(lengths[1], abs=1e-9)


def test_path_is_that_of_the_crystal_and_not_of_its_lattice():
    """A layered crystal in a cell that is cubic by chance has the points of a tetragonal one."""
    layered = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0]], cell=[3.0] * 3, pbc=True)
    points, _ = special_points(layered, 1e-3)
    assert {"Z", "A", "M", "R", "X"} <= set(points)
    np.testing.assert_allclose(points["Z"], [0, 0, 0.5])
    # atoms that an order alone tells apart: the path of the enlarged cell
    enlarged, _ = special_points(bulk("Fe", cubic=True, a=2.83), 1e-3)
    np.testing.assert_allclose(enlarged["R"], [0.5, 0.5, 0.5])


def test_path_of_a_skewed_primitive_cell():
    """Any primitive cell in any orientation has the same path through space."""
    cell = bulk("Fe", a=2.83)
    turn = Rotation.from_rotvec([0.3, -0.5, 0.7])
    skewed = cell.copy()
    skewed.set_cell(turn.apply(np.array([[1, 2, 0], [0, 1, -1], [0, 0, 1]]) @ cell.cell[:]))
    straight, other = (band_path(atoms, "auto", 60) for atoms in (cell, skewed))
    assert [name for name, _ in straight[2]] == [name for name, _ in other[2]]
    np.testing.assert_allclose(straight[1], other[1], atol=1e-8)
    q = np.linalg.norm(straight[0] @ cell.cell.reciprocal()[:], axis=1)
    np.testing.assert_allclose(np.linalg.norm(other[0] @ skewed.cell.reciprocal()[:], axis=1), q, atol=1e-8)


def test_two_points_called_g():
    """Γ is G; another point that the tables call G is G1."""
    cell = Atoms("Fe", cell=[[-1.4, 1.4, 2.2], [1.4, -1.4, 2.2], [1.4, 1.4, -2.2]], pbc=True)
    points, path = special_points(cell, 1e-3)
    assert not points["G"].any()
    assert points["G1"].any()
    assert "G1" in path
    with pytest.raises(OptionError, match=r"its points are G, G1, .*, and its path is G"):
        band_path(cell, "GW", 20)


def test_formula_keeps_the_order_of_the_elements():
    """FeAl stays FeAl."""
    assert formula(Atoms("FeAlFe")) == "Fe2Al"
