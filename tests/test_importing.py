"""Labels of other formats: units and signs against finite differences, missing quantities, bad input."""

import gzip
import json

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from ase.units import GPa
from scipy.stats import norm, t

from mmace.cli import main
from mmace.data import read_labels
from mmace.data.cli import HOW
from mmace.data.deepmd import read_deepmd
from mmace.data.importing import make_frame, refuse_other_units, settle_signs, sign_evidence, with_parents
from mmace.data.matpes import read_matpes
from mmace.data.mlip import read_mlip
from mmace.data.renamed import STRESS_UNITS, read_renamed
from mmace.errors import LabelError
from mmace.labels.files import read_checked, write_labels

CELL = np.array([[4.1, 0.1, 0.0], [0.0, 4.0, 0.2], [0.1, 0.0, 4.3]])
SYMBOLS = ["Fe", "Al", "Fe"]
SCALED = np.array([[0.02, 0.0, 0.03], [0.5, 0.47, 0.1], [0.1, 0.5, 0.55]])
VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


def toy_energy(positions, cell, moments):
    """A smooth E(r, cell, m), coupled in all three, with images of every neighbour so that it is periodic."""
    total = 3.0 * np.sum((np.sum(moments**2, 1) - 3.0) ** 2) / 30
    shifts = np.array([(i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]) @ cell
    for i in range(len(positions)):
        for j in range(len(positions)):
            distance = np.linalg.norm(positions[j] + shifts - positions[i], axis=1)
            distance = distance[(distance > 1e-6) & (distance < 5.0)]
            shape = (1 - (distance / 5.0) ** 2) ** 3
            pair = 4.0 * np.exp(-1.2 * (distance - 2.2)) - 1.2 * np.exp(-0.6 * (distance - 2.2))
            total += np.sum(shape * (pair - 0.15 * np.exp(-0.8 * (distance - 2.5)) * (moments[i] @ moments[j])))
    return float(total)


def slope(function, x, h=1e-4):
    result = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        result[index] = (function(x + step) - function(x - step)) / (2 * h)
    return result


def toy_label(scaled, cell, moments):
    """Energy, forces, dE/dε (3, 3) in eV and -dE/dm of the toy, by finite differences."""
    positions = scaled @ cell

    def strained(strain):
        deformation = np.eye(3) + 0.5 * (strain + strain.T)
        return toy_energy(positions @ deformation, cell @ deformation, moments)

    return {
        "positions": positions,
        "cell": cell,
        "moments": moments,
        "energy": toy_energy(positions, cell, moments) - 500.0,
        "forces": -slope(lambda r: toy_energy(r, cell, moments), positions),
        "virial": slope(strained, np.zeros((3, 3))),
        "magnetic_forces": -slope(lambda m: toy_energy(positions, cell, m), moments),
    }


def toy_labels(count=8, seed=0, collinear=False, size=1.0):
    rng = np.random.default_rng(seed)
    labels = []
    for _ in range(count):
        strain = size * rng.uniform(-0.02, 0.02, (3, 3))
        moments = rng.uniform(-0.15, 0.15, (3, 3)) + np.array([[0.3, 0.2, 1.7], [0.0, 0.1, 0.4], [-0.2, 0.4, 1.5]])
        if collinear:
            moments[:, :2] = 0.0
        cell = CELL @ (np.eye(3) + 0.5 * (strain + strain.T))
        labels.append(toy_label(SCALED + size * rng.uniform(-0.01, 0.01, (3, 3)), cell, moments))
    return labels


@pytest.fixture(scope="module")
def labels():
    return toy_labels()


@pytest.fixture(scope="module")
def collinear():
    return toy_labels(collinear=True, seed=1)


def write_cfg(path, labels, stress_factor=-1.0, magnetic_factor=1.0, direct=False):
    """`stress_factor` -1: PlusStress is -V σ, in eV; `magnetic_factor` 1: en_der is -dE/dm."""
    names = "direct" if direct else "cartes"
    lines = []
    for label in labels:
        lines += ["BEGIN_CFG", " Size", f"    {len(SYMBOLS)}", " Supercell"]
        lines += ["    " + " ".join(f"{x:.10f}" for x in row) for row in label["cell"]]
        lines.append(
            f" AtomData:  id type  {names}_x {names}_y {names}_z  fx fy fz  magmom_x magmom_y magmom_z "
            " en_der_mx en_der_my en_der_mz"
        )
        places = label["positions"] @ np.linalg.inv(label["cell"]) if direct else label["positions"]
        for k, symbol in enumerate(SYMBOLS):
            derivative = magnetic_factor * label["magnetic_forces"][k]
            numbers = [*places[k], *label["forces"][k], *label["moments"][k], *derivative]
            lines.append(f"    {k + 1} {1 if symbol == 'Fe' else 0} " + " ".join(f"{x:.9f}" for x in numbers))
        lines += [" Energy", f"    {label['energy']:.9f}"]
        lines.append(" PlusStress:  xx          yy          zz          yz          xz          xy")
        lines.append("    " + " ".join(f"{stress_factor * label['virial'][a, b]:.9f}" for a, b in VOIGT))
        lines += [" Feature   EFS_by\tABINIT", " Feature   mindist\t2.344293", "END_CFG", ""]
    path.write_text("\n".join(lines))
    return path


def matpes_document(label, index, **changes):
    sites = [
        {"species": [{"element": s, "occu": 1}], "abc": list(abc), "xyz": list(xyz), "properties": {"magmom": 5.0}}
        for s, abc, xyz in zip(
            SYMBOLS, label["positions"] @ np.linalg.inv(label["cell"]), label["positions"], strict=True
        )
    ]
    volume = abs(np.linalg.det(label["cell"]))
    kbar = -np.array([label["virial"][a, b] for a, b in VOIGT]) / volume / (0.1 * GPa)
    return {
        "nsites": 3,
        "structure": {"@class": "Structure", "lattice": {"matrix": label["cell"].tolist()}, "sites": sites},
        "energy": label["energy"],
        "forces": label["forces"].tolist(),
        "stress": kbar.tolist(),
        "matpes_id": f"matpes-1_{index}",
        "functional": "PBE",
        "bader_magmoms": label["moments"][:, 2].tolist(),
        "ddec6": {"spin_moments": (0.9 * label["moments"][:, 2]).tolist(), "partial_charges": [0.0, 0.0, 0.0]},
        "provenance": {"original_mp_id": f"mp-{index // 2}", "md_temperature": 300.0},
        **changes,
    }


def write_deepmd(folder, labels, spin_unit=1.0, magnetic_factor=1.0, virial_factor=-1.0):
    (folder / "set.000").mkdir(parents=True)
    (folder / "type.raw").write_text("0\n1\n0\n")
    (folder / "type_map.raw").write_text("Fe\nAl\n")
    count = len(labels)
    arrays = {
        "coord": [x["positions"] for x in labels],
        "box": [x["cell"] for x in labels],
        "energy": [x["energy"] for x in labels],
        "force": [x["forces"] for x in labels],
        "spin": [x["moments"] / spin_unit for x in labels],
        "force_mag": [magnetic_factor * x["magnetic_forces"] * spin_unit for x in labels],
        "virial": [virial_factor * x["virial"] for x in labels],
    }
    for name, values in arrays.items():
        array = np.array(values)
        np.save(folder / "set.000" / f"{name}.npy", array if array.ndim == 1 else array.reshape(count, -1))
    return folder


def renamed_frames(labels, stress_factor=1.0, magnetic_factor=1.0, unit=1.0):
    frames = []
    for label in labels:
        atoms = Atoms(SYMBOLS, positions=label["positions"], cell=label["cell"], pbc=True)
        atoms.info["REF_energy"] = label["energy"]
        atoms.info["REF_stress"] = stress_factor * label["virial"] / abs(np.linalg.det(label["cell"])) / unit
        atoms.arrays["REF_forces"] = label["forces"]
        atoms.arrays["REF_magmom"] = label["moments"]
        atoms.arrays["REF_magforces"] = magnetic_factor * label["magnetic_forces"]
        frames.append(atoms)
    return frames


def assert_uphill_work(frame, magnetic=True):
    """Energy, forces, stress and magnetic forces of a frame are those of the toy, by its energies alone."""
    positions, cell = frame.positions, frame.cell.array
    moments = frame.get_initial_magnetic_moments()
    results = frame.calc.results
    rng = np.random.default_rng(9)

    def change(shift=0.0, strain=0.0, turn=0.0):
        there, back = np.eye(3) + strain, np.eye(3) - strain
        upper = toy_energy((positions + shift) @ there, cell @ there, moments + turn)
        return upper - toy_energy((positions - shift) @ back, cell @ back, moments - turn)

    assert results["energy"] == pytest.approx(toy_energy(positions, cell, moments) - 500.0, abs=1e-6)
    shift = 1e-3 * rng.normal(size=(3, 3))
    assert -2.0 * (results["forces"] * shift).sum() == pytest.approx(change(shift=shift), rel=1e-3)
    strain = 1e-3 * rng.normal(size=(3, 3))
    strain = 0.5 * (strain + strain.T)
    stress = results["stress"][[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3)
    assert 2.0 * frame.get_volume() * (stress * strain).sum() == pytest.approx(change(strain=strain), rel=1e-3)
    if magnetic:
        turn = 1e-3 * rng.normal(size=(3, 3))
        assert -2.0 * (frame.arrays["magnetic_forces"] * turn).sum() == pytest.approx(change(turn=turn), rel=1e-3)


def run(*words):
    return main(["convert", *map(str, words)])


# Evidence from energies


def test_energies_tell_signs_and_units(labels, tmp_path):
    right = read_renamed_as_ref(renamed_frames(labels), tmp_path)
    for evidence in sign_evidence(right).values():
        assert evidence.factor == pytest.approx(1.0, abs=0.05)
        assert evidence.sign == 1
    wrong = sign_evidence(read_renamed_as_ref(renamed_frames(labels, -1.0, -1.0), tmp_path))
    assert (wrong["forces"].sign, wrong["stress"].sign, wrong["magnetic_forces"].sign) == (1, -1, -1)
    halved = sign_evidence(read_renamed_as_ref(renamed_frames(labels, 1.0, 0.5), tmp_path))
    assert halved["magnetic_forces"].factor == pytest.approx(2.0, abs=0.1)
    assert halved["magnetic_forces"].sign == 0
    assert sign_evidence(right[:1])["stress"].sign == 0
    assert sign_evidence([])["stress"].pairs == 0


def read_renamed_as_ref(frames, tmp_path):
    write(tmp_path / "ref.extxyz", frames)
    names = {"energy": "REF_energy", "forces": "REF_forces", "stress": "REF_stress", "moments": "REF_magmom"}
    return read_renamed(tmp_path / "ref.extxyz", {**names, "magnetic_forces": "REF_magforces"})


def test_noise_settles_nothing(labels, tmp_path):
    frames = read_renamed_as_ref(renamed_frames(labels), tmp_path)
    rng = np.random.default_rng(3)
    for atoms in frames:
        atoms.calc.results["energy"] = float(rng.normal())
    assert all(evidence.sign == 0 for evidence in sign_evidence(frames).values())


# MLIP


@pytest.mark.parametrize("signs", [(-1.0, 1.0), (1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)])
def test_mlip_signs_are_found(labels, tmp_path, signs, capsys):
    path = write_cfg(tmp_path / "set.cfg", labels, *signs)
    assert run("mlip", path, "--types", "0=Al", "1=Fe", "-o", tmp_path / "out.extxyz") == 0
    assert "stress: agree with the energies" in capsys.readouterr().out
    for frame in read_checked(tmp_path / "out.extxyz"):
        assert_uphill_work(frame)
        assert frame.get_chemical_symbols() == SYMBOLS
        assert frame.info["code"] == "ABINIT"
    assert len({label.parent for label in read_labels(tmp_path / "out.extxyz")}) == len(labels)


def test_mlip_single_frames_need_the_signs(labels, tmp_path, capsys):
    path = write_cfg(tmp_path / "one.cfg", labels[:1], 1.0, -1.0, direct=True)
    command = ["mlip", path, "--types", "0=Al", "1=Fe", "-o", tmp_path / "out.extxyz"]
    assert run(*command) == 2
    assert "say --stress-sign" in capsys.readouterr().err
    assert run(*command, "--stress-sign", "ase") == 2
    assert "say --magnetic-sign" in capsys.readouterr().err
    assert not (tmp_path / "out.extxyz").exists()
    assert run(*command, "--stress-sign", "ase", "--magnetic-sign", "derivative") == 0
    assert_uphill_work(read_checked(tmp_path / "out.extxyz")[0])
    assert run(*command, "--drop", "stress", "magnetic_forces") == 0
    (label,) = read_labels(tmp_path / "out.extxyz")
    assert np.isnan(label.stress).all()
    assert np.isnan(label.magnetic_forces).all()
    assert np.isfinite(label.forces).all()


def test_a_sign_that_contradicts_the_energies_is_refused(labels, tmp_path, capsys):
    path = write_cfg(tmp_path / "set.cfg", labels)
    command = ["mlip", path, "--types", "0=Al", "1=Fe", "-o", tmp_path / "out.extxyz"]
    assert run(*command, "--stress-sign", "ase") == 2
    assert "contradict the sign given for stress" in capsys.readouterr().err
    assert run(*command, "--magnetic-sign", "derivative") == 2
    assert "contradict the sign given for magnetic forces" in capsys.readouterr().err
    uphill = [{**label, "forces": -label["forces"]} for label in labels]
    assert run("mlip", write_cfg(tmp_path / "up.cfg", uphill), *command[2:]) == 2
    assert "uphill" in capsys.readouterr().err
    assert run(*command, "--stress-sign", "pressure", "--magnetic-sign", "force") == 0


def test_atoms_without_a_calculated_moment_stay_unknown(labels, tmp_path):
    empty = [dict(label) for label in labels[:1]]
    empty[0]["moments"] = labels[0]["moments"] * [[1], [0], [1]]
    empty[0]["magnetic_forces"] = labels[0]["magnetic_forces"] * [[1], [0], [1]]
    (frame,) = read_mlip(write_cfg(tmp_path / "a.cfg", empty), {0: "Al", 1: "Fe"})
    assert np.isnan(frame.arrays["magnetic_forces"]).all(1).tolist() == [False, True, False]
    (frame,) = read_deepmd(write_deepmd(tmp_path / "b", empty))
    assert np.isnan(frame.arrays["magnetic_forces"]).all(1).tolist() == [False, True, False]


def test_one_geometry_is_one_parent(labels, tmp_path):
    turned = {**labels[0], "moments": -labels[0]["moments"]}
    frames = read_mlip(write_cfg(tmp_path / "a.cfg", [labels[0], labels[1], turned]), {0: "Al", 1: "Fe"})
    assert [frame.info["parent"] for frame in frames] == ["a-0", "a-1", "a-0"]


# MatPES


@pytest.mark.parametrize("zipped", [False, True])
def test_matpes_signs_and_moments(collinear, tmp_path, zipped):
    documents = [matpes_document(label, k) for k, label in enumerate(collinear)]
    documents.append(matpes_document(collinear[0], 99, bader_magmoms=None, ddec6=None))
    path = tmp_path / ("MatPES-PBE.json.gz" if zipped else "MatPES-PBE.json")
    with (gzip.open if zipped else open)(path, "wt") as file:
        json.dump(documents, file)
    frames, skipped = read_matpes(path, "bader")
    assert (len(frames), skipped) == (len(collinear), 1)
    for frame, label in zip(frames, collinear, strict=True):
        assert_uphill_work(frame, magnetic=False)
        assert frame.get_initial_magnetic_moments() == pytest.approx(label["moments"])
        assert "magnetic_forces" not in frame.arrays
    assert frames[0].info["recipe"] == "MatPES-PBE PBE, bader moments"
    assert [frame.info["parent"] for frame in frames[:3]] == ["mp-0", "mp-0", "mp-1"]
    other, _ = read_matpes(path, "ddec6")
    assert other[0].get_initial_magnetic_moments() == pytest.approx(0.9 * collinear[0]["moments"])


def test_matpes_through_the_command_line(labels, collinear, tmp_path, capsys):
    path = tmp_path / "m.json"
    path.write_text(json.dumps([matpes_document(collinear[0], 0)]))
    assert run("matpes", path, "--moments", "bader", "-o", tmp_path / "m.extxyz") == 0
    assert_uphill_work(read_checked(tmp_path / "m.extxyz")[0], magnetic=False)
    assert run("matpes", path, "-o", tmp_path / "m.extxyz") == 2
    assert "--moments bader or ddec6" in capsys.readouterr().err
    # the same crystal at two volumes, moments held: VASP's sign can be told from the energies
    moments = collinear[0]["moments"]
    series = [toy_label(SCALED, CELL * scale, moments) for scale in (0.98, 0.99, 1.0, 1.01, 1.02)]
    documents = [matpes_document(label, k) for k, label in enumerate(series)]
    path.write_text(json.dumps(documents))
    assert run("matpes", path, "--moments", "bader", "-o", tmp_path / "m.extxyz") == 0
    assert "stress: agree" in capsys.readouterr().out
    turned = [{**document, "stress": [-x for x in document["stress"]]} for document in documents]
    path.write_text(json.dumps(turned))
    assert run("matpes", path, "--moments", "bader", "-o", tmp_path / "m.extxyz") == 2
    assert "contradict" in capsys.readouterr().err


def test_plain_arrays_and_r2scan(collinear, tmp_path):
    document = matpes_document(collinear[0], 0, functional="r2SCAN")
    del document["structure"]
    document |= {
        "cell": collinear[0]["cell"].tolist(),
        "atomic_numbers": [26, 13, 26],
        "cart_coords": collinear[0]["positions"].tolist(),
    }
    (tmp_path / "mp-aloe.json").write_text(json.dumps({"a": document}))
    (frame,), _ = read_matpes(tmp_path / "mp-aloe.json", "bader")
    assert_uphill_work(frame, magnetic=False)
    assert frame.info["recipe"] == "mp-aloe r2SCAN, bader moments"
    del document["functional"]
    (tmp_path / "mp-aloe.json").write_text(json.dumps([document]))
    with pytest.raises(LabelError, match="--functional"):
        read_matpes(tmp_path / "mp-aloe.json", "bader")
    (frame,), _ = read_matpes(tmp_path / "mp-aloe.json", "bader", functional="r2SCAN")
    assert "r2SCAN" in frame.info["recipe"]


def test_what_matpes_lacks_stays_unknown(collinear, tmp_path):
    document = matpes_document(collinear[0], 0, stress=None, forces=None)
    (tmp_path / "m.json").write_text(json.dumps([document]))
    (frame,), _ = read_matpes(tmp_path / "m.json", "bader")
    assert set(frame.calc.results) == {"energy"}


# DeePMD


@pytest.mark.parametrize("spin_unit", [1.0, 2.0])
def test_deepmd_signs_and_units(labels, tmp_path, spin_unit):
    folder = write_deepmd(tmp_path / "system", labels, spin_unit)
    command = ["deepmd", folder, "-o", tmp_path / "out.extxyz"]
    assert run(*command, *([] if spin_unit == 1.0 else ["--spin-unit", spin_unit])) == 0
    for frame in read_checked(tmp_path / "out.extxyz"):
        assert_uphill_work(frame)


def test_deepmd_wrong_signs_are_refused(labels, tmp_path, capsys):
    folder = write_deepmd(tmp_path / "a", labels, magnetic_factor=-1.0)
    assert run("deepmd", folder, "-o", tmp_path / "a.extxyz") == 2
    assert "magnetic forces" in capsys.readouterr().err
    assert run("deepmd", folder, "--magnetic-sign", "derivative", "-o", tmp_path / "a.extxyz") == 0
    assert_uphill_work(read_checked(tmp_path / "a.extxyz")[0])
    folder = write_deepmd(tmp_path / "b", labels, virial_factor=1.0)
    assert run("deepmd", folder, "-o", tmp_path / "b.extxyz") == 2
    assert "stress" in capsys.readouterr().err


def test_deepmd_files_that_are_missing_or_pickled(labels, tmp_path):
    folder = write_deepmd(tmp_path / "a", labels)
    (folder / "set.000" / "force_mag.npy").unlink()
    (folder / "set.000" / "virial.npy").unlink()
    assert all("magnetic_forces" not in f.arrays and "stress" not in f.calc.results for f in read_deepmd(folder))
    np.save(folder / "set.000" / "spin.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(LabelError, match="not a plain array"):
        read_deepmd(folder)
    np.save(folder / "set.000" / "spin.npy", np.zeros((3, 9)))
    with pytest.raises(LabelError, match="shape"):
        read_deepmd(folder)
    (folder / "set.000" / "spin.npy").unlink()
    with pytest.raises(LabelError, match=r"spin\.npy"):
        read_deepmd(folder)
    (folder / "type_map.raw").unlink()
    with pytest.raises(LabelError, match="--types"):
        read_deepmd(folder)


# Extended XYZ


def test_other_names(labels, tmp_path, capsys):
    write(tmp_path / "a.xyz", renamed_frames(labels, stress_factor=-1.0, unit=0.1 * GPa))
    names = ["energy=REF_energy", "forces=REF_forces", "stress=REF_stress", "magnetic_forces=REF_magforces"]
    command = ["extxyz", tmp_path / "a.xyz", "-o", tmp_path / "b.extxyz", "--stress-unit", "kbar", "--map", *names]
    assert run(*command) == 2
    assert "moments=" in capsys.readouterr().err
    command.append("moments=REF_magmom")
    assert run(*command) == 2
    assert "contradict" in capsys.readouterr().err
    assert run(*command, "--stress-sign", "pressure") == 0
    for frame in read_checked(tmp_path / "b.extxyz"):
        assert_uphill_work(frame)
    assert run(*command, "energy=nothing") == 2
    assert "has no nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("true", "given"), [("eV/A3", "GPa"), ("GPa", "eV/A3"), ("kbar", "GPa"), ("GPa", "kbar")])
def test_a_unit_that_contradicts_the_energies_is_refused(labels, tmp_path, capsys, true, given):
    write(tmp_path / "a.xyz", renamed_frames(labels, unit=STRESS_UNITS[true]))
    names = ["energy=REF_energy", "forces=REF_forces", "stress=REF_stress", "moments=REF_magmom"]
    names.append("magnetic_forces=REF_magforces")
    command = ["extxyz", tmp_path / "a.xyz", "-o", tmp_path / "b.extxyz", "--map", *names]
    assert run(*command, "--stress-unit", given) == 2
    assert f"the unit of the stress is {true} (factor 1.0" in capsys.readouterr().err
    assert not (tmp_path / "b.extxyz").exists()
    assert run(*command, "--stress-unit", true) == 0
    assert run(*command, "--stress-unit", given, "--drop", "stress") == 0


@pytest.mark.parametrize("count", [4, 5, 6, 8])
def test_noisy_energies_accuse_no_unit(count):
    """Forces, stress and magnetic forces are right; the energies are off by 30 meV, as between two branches."""
    rng = np.random.default_rng(count)
    for seed in range(6):
        few = toy_labels(count, seed)
        frames = [
            make_frame(
                SYMBOLS, x["positions"], x["cell"], True, x["moments"], results_of(x), x["magnetic_forces"], {}, ""
            )
            for x in few
        ]
        for _ in range(12):
            for atoms, label in zip(frames, few, strict=True):
                atoms.calc.results["energy"] = label["energy"] + 0.03 * rng.normal()
            refuse_other_units(frames, {"forces": "eV/A", "stress": "eV/A3", "magnetic_forces": "eV/muB"})
            settle_signs(frames, 1, 1, HOW)


def results_of(label):
    stress = np.array([label["virial"][a, b] for a, b in VOIGT]) / abs(np.linalg.det(label["cell"]))
    return {"energy": label["energy"], "forces": label["forces"], "stress": stress}


def test_errors_count_frames_not_pairs(labels, tmp_path):
    """The error that is stated is that of many repetitions: noise of one energy is in all pairs of its frame."""
    frames = read_renamed_as_ref(renamed_frames(toy_labels(20, 3)), tmp_path)
    exact = [atoms.calc.results["energy"] for atoms in frames]
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        for atoms, energy in zip(frames, exact, strict=True):
            atoms.calc.results["energy"] = energy + 0.01 * rng.normal()
        found.append(sign_evidence(frames))
    for name in ("forces", "stress", "magnetic_forces"):
        scatter = np.std([evidence[name].factor for evidence in found])
        stated = np.sqrt(np.mean([evidence[name].error ** 2 for evidence in found]))
        widened = t.isf(norm.sf(3.0), 20 - 1 - 3) / 3.0
        assert stated / widened == pytest.approx(scatter, rel=0.25)


def test_magnetic_forces_along_the_moments_alone(tmp_path, capsys):
    """One number for each atom is along z only where the moments are; along other moments it has a name of its own."""
    few = toy_labels(8, 4)
    for label in few[1:]:
        size = np.linalg.norm(label["moments"], axis=1, keepdims=True)
        axis = few[0]["moments"] / np.linalg.norm(few[0]["moments"], axis=1, keepdims=True)
        label.update(toy_label(label["positions"] @ np.linalg.inv(label["cell"]), label["cell"], size * axis))
    frames = renamed_frames(few)
    for atoms, label in zip(frames, few, strict=True):
        axis = label["moments"] / np.linalg.norm(label["moments"], axis=1, keepdims=True)
        atoms.arrays["along"] = -(label["magnetic_forces"] * axis).sum(1)
        atoms.arrays["REF_along"] = -atoms.arrays["along"]
    write(tmp_path / "a.xyz", frames)
    names = ["energy=REF_energy", "forces=REF_forces", "stress=REF_stress", "moments=REF_magmom"]
    command = ["extxyz", tmp_path / "a.xyz", "-o", tmp_path / "b.extxyz", "--map", *names]
    assert run(*command, "magnetic_forces=along") == 2
    assert "magnetic_forces_parallel" in capsys.readouterr().err
    assert run(*command, "magnetic_forces=REF_magforces", "magnetic_forces_parallel=REF_along") == 0
    assert run("extxyz", tmp_path / "b.extxyz", "-o", tmp_path / "c.extxyz", "--map", "moments=initial_magmoms") == 0
    for file in ("b", "c"):
        both = read_labels(tmp_path / f"{file}.extxyz")[0]
        assert np.allclose(both.magnetic_forces, few[0]["magnetic_forces"], atol=1e-7)
        assert np.allclose(both.magnetic_forces_parallel, -frames[0].arrays["along"], atol=1e-7)
    assert run(*command, "magnetic_forces_parallel=along") == 2
    assert "contradict the sign given for magnetic forces" in capsys.readouterr().err
    assert run(*command, "magnetic_forces_parallel=along", "--magnetic-sign", "derivative") == 0
    found = read_labels(tmp_path / "b.extxyz")
    expected = [-atoms.arrays["along"] for atoms in frames]
    assert np.allclose([label.magnetic_forces_parallel for label in found], expected, atol=1e-7)
    assert not np.isfinite([label.magnetic_forces for label in found]).any()


def test_frames_without_energy_are_left_out(labels, tmp_path, capsys):
    documents = [matpes_document(label, k) for k, label in enumerate(labels)]
    documents[2]["energy"] = None
    (tmp_path / "m.json").write_text(json.dumps(documents))
    command = ["matpes", tmp_path / "m.json", "--moments", "bader", "-o", tmp_path / "b.extxyz", "--drop", "stress"]
    assert run(*command, "--drop", "forces", "stress") == 0
    assert "7 labels of 4 parents, 0 without moments and 1 without energy left out" in capsys.readouterr().out
    assert [atoms.info["name"] for atoms in read_checked(tmp_path / "b.extxyz")][1:3] == ["matpes-1_1", "matpes-1_3"]
    (tmp_path / "m.json").write_text(json.dumps([documents[2]]))
    assert run(*command) == 2
    assert "no frame of" in capsys.readouterr().err


def test_ids_that_are_numbers_stay_names(labels, tmp_path, capsys):
    documents = [matpes_document(x, k, matpes_id=str(10**k), provenance={}) for k, x in enumerate(labels)]
    (tmp_path / "m.json.gz").write_bytes(gzip.compress(json.dumps(documents).encode()))
    command = ["matpes", tmp_path / "m.json.gz", "--moments", "bader", "-o", tmp_path / "b.extxyz"]
    command += ["--drop", "forces", "stress"]
    assert run(*command) == 0
    assert read_checked(tmp_path / "b.extxyz")[1].info["parent"] == "m-10"
    assert run(*command, "--code", "6.4") == 2
    assert "--code 6.4 would be read back as a number" in capsys.readouterr().err


def test_parents_of_many_frames_are_those_of_every_comparison():
    """Frames that differ by less than formats round are one parent, wherever the numbers are cut for the search."""
    rng = np.random.default_rng(5)
    places = rng.uniform(0.0, 3.0, (40, 2, 3))
    frames = []
    for _ in range(6):
        for place in places:
            shift = rng.uniform(-4e-6, 4e-6, (2, 3))
            frames.append(Atoms("Fe2", positions=place + shift, cell=3.0 * np.eye(3), pbc=True))
    parents = [atoms.info["parent"] for atoms in with_parents(frames, "x")]
    assert parents == 6 * [f"x-{k}" for k in range(40)]


def test_other_wrong_sizes(labels, tmp_path, capsys):
    """Factors that no unit explains are refused too, unless moments without magnetic forces may explain them."""
    doubled = [{**label, "magnetic_forces": 2 * label["magnetic_forces"]} for label in labels]
    folder = write_deepmd(tmp_path / "a", doubled)
    assert run("deepmd", folder, "-o", tmp_path / "a.extxyz") == 2
    assert "contradict the size of the magnetic forces (factor 0.5" in capsys.readouterr().err
    assert run("deepmd", folder, "-o", tmp_path / "a.extxyz", "--drop", "magnetic_forces") == 0
    rydbergs = [{**label, "forces": label["forces"] / (13.605693 / 0.529177)} for label in labels]
    folder = write_deepmd(tmp_path / "b", rydbergs)
    assert run("deepmd", folder, "-o", tmp_path / "b.extxyz") == 2
    assert "the unit of the forces is Ry/Bohr" in capsys.readouterr().err


def test_virials(labels, tmp_path):
    frames = renamed_frames(labels)
    for atoms, label in zip(frames, labels, strict=True):
        atoms.info["REF_virial"] = -label["virial"]
    write(tmp_path / "a.xyz", frames)
    names = ["energy=REF_energy", "forces=REF_forces", "virials=REF_virial", "moments=REF_magmom"]
    names.append("magnetic_forces=REF_magforces")
    assert run("extxyz", tmp_path / "a.xyz", "-o", tmp_path / "b.extxyz", "--map", *names) == 0
    assert_uphill_work(read_checked(tmp_path / "b.extxyz")[0])


def test_virials_of_a_molecule_are_no_stress(labels, tmp_path):
    frames = renamed_frames(labels[:2])
    for atoms in frames:
        atoms.info["REF_virial"] = np.zeros((3, 3))
    frames[1].set_cell(None)
    frames[1].pbc = False
    write(tmp_path / "a.xyz", frames)
    crystal, molecule = read_renamed(
        tmp_path / "a.xyz",
        {"energy": "REF_energy", "forces": "REF_forces", "virials": "REF_virial", "moments": "REF_magmom"},
    )
    assert "stress" in crystal.calc.results
    assert "stress" not in molecule.calc.results


def test_numbers_become_names_that_stay_text(labels, tmp_path):
    """A parent of digits would be read back as a number, which no splits file holds."""
    frames = renamed_frames(labels)
    for k, atoms in enumerate(frames):
        atoms.info["config_id"] = k // 2
        atoms.info["kind"] = "bcc"
    write(tmp_path / "a.xyz", frames)
    names = ["energy=REF_energy", "forces=REF_forces", "moments=REF_magmom", "parent=config_id", "name=kind"]
    assert run("extxyz", tmp_path / "a.xyz", "-o", tmp_path / "b.extxyz", "--map", *names) == 0
    assert [x.info["parent"] for x in read_checked(tmp_path / "b.extxyz")[:3]] == ["a-0", "a-0", "a-1"]
    assert {x.info["name"] for x in read_checked(tmp_path / "b.extxyz")} == {"bcc"}
    spoilt = read_checked(tmp_path / "b.extxyz")
    spoilt[0].info["parent"] = 3
    with pytest.raises(LabelError, match="'parent' is 3, which is no name"):
        write_labels(tmp_path / "c.extxyz", spoilt)


# Bad input


def test_bad_input_is_one_sentence(labels, tmp_path, capsys):
    cfg = write_cfg(tmp_path / "a.cfg", labels[:2])
    (tmp_path / "cut.cfg").write_text(cfg.read_text()[:-400])
    (tmp_path / "bare.cfg").write_text(cfg.read_text().replace("magmom_x", "charge"))
    (tmp_path / "stress.cfg").write_text(cfg.read_text().replace("PlusStress:", "Stress:"))
    (tmp_path / "text.cfg").write_text("hello")
    (tmp_path / "m.json").write_text("{")
    (tmp_path / "n.json").write_text("[3]")
    (tmp_path / "o.json").write_text(json.dumps([{"bader_magmoms": [1.0], "energy": 1.0, "functional": "PBE"}]))
    (tmp_path / "empty").mkdir()
    types = ["--types", "0=Al", "1=Fe"]
    names = ["--map", "energy=REF_energy", "moments=REF_magmom"]
    (tmp_path / "a.txt").write_text(cfg.read_text())
    for name, changes in (("bader", {"bader_magmoms": ["a"] * 3}), ("ragged", {"stress": [[1, 2], [3]]})):
        (tmp_path / f"{name}.json").write_text(json.dumps([matpes_document(labels[0], 0, **changes)]))
    (tmp_path / "scalar.json").write_text(json.dumps([matpes_document(labels[0], 0, bader_magmoms=2.0)]))
    frame = renamed_frames(labels[:1])[0]
    frame.info["soc"] = "yes"
    write(tmp_path / "soc.xyz", frame)
    write_deepmd(tmp_path / "spins", labels[:2])
    cases = [
        (["mlip", cfg], "--types"),
        (["mlip", cfg, "--types", "0=Al"], "type 1"),
        (["mlip", cfg, "--types", "0=Qq", "1=Fe"], "element"),
        (["mlip", tmp_path / "none.cfg", *types], "no file"),
        (["mlip", tmp_path / "cut.cfg", *types], "END_CFG"),
        (["mlip", tmp_path / "bare.cfg", *types], "magmom_x"),
        (["mlip", tmp_path / "stress.cfg", *types], "Stress:"),
        (["mlip", tmp_path / "text.cfg", *types], "BEGIN_CFG"),
        (["mlip", cfg, *types, "--moments", "bader"], "matpes alone"),
        (["mlip", cfg, cfg, *types], "same name"),
        (["mlip", cfg, tmp_path / "a.txt", *types], "same name"),
        (["matpes", tmp_path / "bader.json", "--moments", "bader"], "moments are not numbers"),
        (["matpes", tmp_path / "ragged.json", "--moments", "bader"], "stress are not numbers"),
        (["matpes", tmp_path / "scalar.json", "--moments", "bader"], "moments has shape ()"),
        (["extxyz", tmp_path / "soc.xyz", *names], "soc=yes: give 0"),
        (["extxyz", tmp_path / "soc.xyz", *names, "stress=a", "virials=b"], "name only one of them"),
        (["extxyz", tmp_path / "soc.xyz", *names, "virials=b", "--stress-unit", "GPa"], "not for virials"),
        (["deepmd", tmp_path / "spins", "--types", "0=Al"], "leave out --types"),
        (["matpes", tmp_path / "m.json", "--moments", "bader"], "not JSON"),
        (["matpes", tmp_path / "n.json", "--moments", "bader"], "list of documents"),
        (["matpes", tmp_path / "o.json", "--moments", "bader"], "structure"),
        (["matpes", tmp_path / "o.json", "--moments", "ddec6"], "no document"),
        (["deepmd", tmp_path / "empty"], r"type.raw"),
        (["extxyz", tmp_path / "text.cfg"], "cannot be read"),
        (["extxyz", tmp_path / "text.cfg", "--map", "energy"], "NAME=NAME"),
        (["extxyz", cfg, "--map", "spin=x"], "no quantity spin"),
    ]
    for command, message in cases:
        assert run(*command, "-o", tmp_path / "out.extxyz") == 2, command
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert len(error.strip().splitlines()) == 1
        assert not (tmp_path / "out.extxyz").exists()
    assert run("mlip", cfg, *types, "-o", tmp_path / "nowhere" / "out.extxyz") == 2
    assert "does not exist" in capsys.readouterr().err
    before = (tmp_path / "soc.xyz").read_bytes()
    assert run("extxyz", tmp_path / "soc.xyz", *names, "-o", tmp_path / "soc.xyz") == 2
    assert "name another file" in capsys.readouterr().err
    assert (tmp_path / "soc.xyz").read_bytes() == before
