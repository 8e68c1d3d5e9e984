"""The label reader: units and signs, missing quantities, anisotropy groups, splits."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from mmace.cli import main
from mmace.data import Splits, groups_of, label_from_atoms, read_labels, read_splits
from mmace.errors import LabelError
from mmace.labels.files import read_checked, write_checksums, write_labels

BASE = np.array([[0.02, -0.01, 0.03], [1.46, 1.4, 1.5]])
CELL = np.array([[2.9, 0.05, 0.0], [0.0, 2.85, 0.1], [0.02, 0.0, 3.0]])
MOMENTS = np.array([[0.3, -0.5, 1.9], [0.0, 0.2, 2.1]])


def energy_surface(positions, cell, moments):
    """A smooth E(r, cell, m) with known derivatives, standing in for an electronic-structure code."""
    bond = positions[1] - positions[0]
    volume = np.linalg.det(cell)
    return (
        2.0 * bond @ bond
        + 0.03 * (volume - 24.0) ** 2
        + 0.2 * np.trace(cell @ cell.T)
        - 0.4 * moments[0] @ moments[1]
        + 0.1 * (moments**2).sum() ** 2 / 10
    )


def central_difference(function, x, h=1e-4):
    slope = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        slope[index] = (function(x + step) - function(x - step)) / (2 * h)
    return slope


def labelled_frame(**info):
    atoms = Atoms("FeAl", positions=BASE, cell=CELL, pbc=True)
    atoms.set_initial_magnetic_moments(MOMENTS)

    def strained(strain):
        deformation = np.eye(3) + 0.5 * (strain + strain.T)
        return energy_surface(BASE @ deformation, CELL @ deformation, MOMENTS)

    strain_slope = central_difference(strained, np.zeros((3, 3)))
    voigt = np.array([strain_slope[a, b] for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))])
    atoms.calc = SinglePointCalculator(
        atoms,
        energy=energy_surface(BASE, CELL, MOMENTS),
        forces=-central_difference(lambda r: energy_surface(r, CELL, MOMENTS), BASE),
        stress=voigt / atoms.get_volume(),
    )
    atoms.arrays["magnetic_forces"] = -central_difference(lambda m: energy_surface(BASE, CELL, m), MOMENTS)
    atoms.info.update({"soc": 0, "parent": "p", "name": "n", **info})
    return atoms


def direction_frames(group="g", parent="p"):
    frames = []
    for k, axis in enumerate(np.eye(3)):
        atoms = Atoms("FeAl", positions=BASE, cell=CELL, pbc=True)
        atoms.set_initial_magnetic_moments(np.outer([2.0, 0.0], axis))
        atoms.calc = SinglePointCalculator(atoms, energy=-7.0 + 1e-5 * k)
        atoms.info.update({"soc": 1, "parent": parent, "name": f"{group}-{k}", "anisotropy_group": group})
        frames.append(atoms)
    return frames


def test_derivatives_keep_units_and_signs(tmp_path):
    write(tmp_path / "labels.extxyz", labelled_frame())
    (label,) = read_labels(tmp_path / "labels.extxyz")
    shift = 1e-3 * np.array([[0.3, -0.2, 0.5], [-0.1, 0.4, 0.2]])
    change = energy_surface(BASE + shift, CELL, MOMENTS) - energy_surface(BASE - shift, CELL, MOMENTS)
    assert -2.0 * (label.forces * shift).sum() == pytest.approx(change, rel=1e-6)
    turn = 1e-3 * np.array([[0.5, 0.1, -0.7], [0.2, -0.6, 0.4]])
    change = energy_surface(BASE, CELL, MOMENTS + turn) - energy_surface(BASE, CELL, MOMENTS - turn)
    assert -2.0 * (label.magnetic_forces * turn).sum() == pytest.approx(change, rel=1e-5)
    voigt = 1e-4 * np.array([1.0, -0.5, 0.7, 0.4, -0.8, 0.6])  # engineering shear
    xx, yy, zz, yz, xz, xy = voigt
    strain = np.array([[xx, xy / 2, xz / 2], [xy / 2, yy, yz / 2], [xz / 2, yz / 2, zz]])
    there, back = np.eye(3) + strain, np.eye(3) - strain
    change = energy_surface(BASE @ there, CELL @ there, MOMENTS) - energy_surface(BASE @ back, CELL @ back, MOMENTS)
    assert 2.0 * np.linalg.det(CELL) * label.stress @ voigt == pytest.approx(change, rel=1e-5)
    assert label.energy == pytest.approx(energy_surface(BASE, CELL, MOMENTS), rel=1e-9)


def test_what_is_absent_is_not_known(tmp_path):
    bare = Atoms("Fe2", positions=BASE, cell=CELL, pbc=True)
    bare.set_initial_magnetic_moments([2.0, -2.0])
    partial = labelled_frame(name="partial")
    partial.arrays["magnetic_forces"][1] = np.nan
    write(tmp_path / "labels.extxyz", [bare, partial])
    empty, half = read_labels(tmp_path / "labels.extxyz")
    assert np.isnan(empty.energy)
    assert np.isnan(empty.forces).all()
    assert np.isnan(empty.stress).all()
    assert np.isnan(empty.magnetic_forces).all()
    assert empty.moments.tolist() == [[0, 0, 2], [0, 0, -2]]
    assert np.isfinite(half.magnetic_forces[0]).all()
    assert np.isnan(half.magnetic_forces[1]).all()


def test_labels_cannot_be_changed():
    label = label_from_atoms(labelled_frame(), "here")
    with pytest.raises(ValueError, match="read-only"):
        label.forces[0, 0] = 1.0
    structure = label.atoms()
    structure.positions += 1.0
    structure.arrays["initial_magmoms"] *= -1.0
    assert np.array_equal(label.positions, BASE)
    assert np.array_equal(label.moments, MOMENTS)


def test_groups_hold_one_structure_in_many_directions(tmp_path):
    frames = [*direction_frames("a"), labelled_frame(), *direction_frames("b")]
    write(tmp_path / "labels.extxyz", frames)
    groups = groups_of(read_labels(tmp_path / "labels.extxyz"))
    assert [[x.name for x in group] for group in groups] == [["a-0", "a-1", "a-2"], ["b-0", "b-1", "b-2"]]
    moved = direction_frames("a")
    moved[1].positions[0] += 0.1
    write(tmp_path / "moved.extxyz", moved)
    with pytest.raises(LabelError, match="anisotropy group a"):
        read_labels(tmp_path / "moved.extxyz")
    write(tmp_path / "parents.extxyz", [direction_frames("a")[0], direction_frames("a", parent="q")[1]])
    with pytest.raises(LabelError, match="parent"):
        read_labels(tmp_path / "parents.extxyz")


def test_directions_of_two_recipes_are_not_mixed(tmp_path):
    """Two calculations of one direction count from different zeros; the same file twice does not."""
    coarse, fine = direction_frames("a"), direction_frames("a")
    for atoms in fine:
        atoms.calc.results["energy"] += 5e-3
    write(tmp_path / "coarse.extxyz", coarse)
    write(tmp_path / "fine.extxyz", fine)
    with pytest.raises(LabelError, match="but not the energy"):
        read_labels([tmp_path / "coarse.extxyz", tmp_path / "fine.extxyz"])
    twice = read_labels([tmp_path / "coarse.extxyz", tmp_path / "coarse.extxyz"])
    assert [len(group) for group in groups_of(twice)] == [6]


def test_moments_of_elements_without_any_are_left_out():
    atoms = labelled_frame()
    label = label_from_atoms(atoms, "frame 0")
    assert np.abs(label.moments[1]).max() > 0
    assert label.carried_by(("Fe", "Al")) is label
    iron = label.carried_by(("Fe",))
    np.testing.assert_array_equal(iron.moments, [label.moments[0], np.zeros(3)])
    np.testing.assert_array_equal(iron.magnetic_forces[0], label.magnetic_forces[0])
    assert np.isnan(iron.magnetic_forces[1]).all()
    assert iron.energy == label.energy
    with pytest.raises(ValueError, match="read-only"):
        iron.moments[0] = 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.arrays.pop("initial_magmoms"), "initial_magmoms"),
        (lambda a: a.arrays["initial_magmoms"].__setitem__((0, 0), np.nan), "not finite"),
        (lambda a: a.info.update(soc=2), "soc=2"),
        (lambda a: a.info.update(anisotropy_group="g"), "soc=0"),
        (lambda a: a.arrays.update(magnetic_forces=np.zeros(2)), "magnetic_forces"),
    ],
)
def test_broken_labels_are_errors_that_name_the_frame(change, message):
    atoms = labelled_frame()
    change(atoms)
    with pytest.raises(LabelError, match=message) as error:
        label_from_atoms(atoms, "frame 3 of x.extxyz")
    assert "frame 3 of x.extxyz" in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(LabelError, match="no label file"):
        read_labels(tmp_path / "nowhere.extxyz")
    (tmp_path / "broken.extxyz").write_text("two\nnothing here\n")
    with pytest.raises(LabelError, match="cannot be read"):
        read_labels(tmp_path / "broken.extxyz")


def test_splits_are_disjoint_and_complete(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": ["p", "q"], "valid": ["v"], "test": ["t"]}))
    splits = read_splits(path)
    label = label_from_atoms(labelled_frame(), "here")
    labels = [replace(label, parent=parent, name=parent) for parent in ("t", "p", "v", "q")]
    assert {part: [x.name for x in splits.select(labels, part)] for part in ("train", "valid", "test")} == {
        "train": ["p", "q"],
        "valid": ["v"],
        "test": ["t"],
    }
    with pytest.raises(LabelError, match="stranger"):
        splits.select([replace(label, parent="stranger")], "train")
    with pytest.raises(LabelError, match="in train and in test"):
        Splits(frozenset("ab"), frozenset("c"), frozenset("b"))
    path.write_text(json.dumps({"train": "p", "valid": [], "test": []}))
    with pytest.raises(LabelError, match="does not hold splits"):
        read_splits(path)


def test_splits_of_several_systems_are_joined(tmp_path):
    for name, parts in (("a", (["a1"], ["a2"], ["a3"])), ("b", (["b1"], [], ["b3"])), ("c", (["a2"], [], []))):
        content = dict(zip(("train", "valid", "test"), parts, strict=True))
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    joined = read_splits([tmp_path / "a.json", tmp_path / "b.json"])
    assert joined == Splits(frozenset({"a1", "b1"}), frozenset({"a2"}), frozenset({"a3", "b3"}))
    assert read_splits(tmp_path / "a.json") == read_splits([tmp_path / "a.json"])
    with pytest.raises(LabelError, match="a2 is in train and in valid"):
        read_splits([tmp_path / "a.json", tmp_path / "c.json"])


def test_labels_are_read_without_torch():
    """It takes seconds to import, and whoever reads or makes labels needs none of it."""
    code = "import sys, mmace.data, mmace.labels.cli\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_moments_a_calculation_was_started_from_are_no_label(tmp_path):
    """ASE writes both kinds of moments; a label's are those that were reached."""
    atoms = labelled_frame(code="c", recipe="r")
    atoms.calc.results["magmoms"] = MOMENTS + 1e-4
    write(tmp_path / "near.extxyz", atoms)
    assert np.allclose(read_labels(tmp_path / "near.extxyz")[0].moments, MOMENTS)
    atoms.calc.results["magmoms"] = np.array([2.2, 2.2])
    write(tmp_path / "started.extxyz", atoms)
    with pytest.raises(LabelError, match=r"frame 0 of .* has other magmoms than initial_magmoms"):
        read_labels(tmp_path / "started.extxyz")
    with pytest.raises(LabelError, match="other magmoms"):
        read_checked(tmp_path / "started.extxyz")


@pytest.mark.parametrize(
    ("key", "value", "message"), [("energy", "abc", "no number"), ("soc", "0 1", "give 0 without")]
)
def test_texts_in_place_of_numbers(tmp_path, key, value, message):
    atoms = labelled_frame()
    write(tmp_path / "a.extxyz", atoms)
    text = (tmp_path / "a.extxyz").read_text()
    (tmp_path / "a.extxyz").write_text(re.sub(rf"\b{key}=\S+", f'{key}="{value}"', text, count=1))
    with pytest.raises(LabelError, match=message):
        read_labels(tmp_path / "a.extxyz")


def test_groups_are_checked_wherever_labels_are(tmp_path, capsys):
    """Directions of one group in two files of a folder, in cells that differ."""
    frames = direction_frames()
    for atoms in frames:
        atoms.info.update(code="c", recipe="r")
    write_labels(tmp_path / "a.extxyz", frames[:2])
    frames[2].set_cell(1.01 * CELL)
    with pytest.raises(LabelError, match="but not the structure"):
        write_labels(tmp_path / "b.extxyz", frames)
    write_labels(tmp_path / "b.extxyz", frames[2:])
    write_checksums(tmp_path)
    assert main(["label", "check", str(tmp_path)]) == 2
    assert "g-2 and g-0 share the anisotropy group g but not the structure" in capsys.readouterr().err
    sums = (tmp_path / "SHA256SUMS").read_text()
    (tmp_path / "SHA256SUMS").write_text(sums.replace("  ", " *"))
    assert main(["label", "check", str(tmp_path)]) == 2
    assert "share the anisotropy group" in capsys.readouterr().err
    (tmp_path / "SHA256SUMS").write_text(sums + "0123\n")
    assert main(["label", "check", str(tmp_path)]) == 2
    assert "has a line '0123' without a name" in capsys.readouterr().err
