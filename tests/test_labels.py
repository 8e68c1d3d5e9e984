"""Plans, runner, quality gate, label files; a stand-in program replays recorded ABINIT outputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read

from mmace.cli import main
from mmace.data import Splits, read_splits
from mmace.errors import LabelError, MissingProgramError
from mmace.labels.abinit import find_datasets, find_program, kpoint_mesh, parse_output, write_input
from mmace.labels.check import (
    compare_differences,
    compare_labels,
    compare_reproduction,
    difference_plan,
    refined_plan,
    reproduction_plan,
)
from mmace.labels.collecting import collect, earlier_labels, earlier_rejections
from mmace.labels.files import check_checksums, read_checked, write_checksums, write_labels
from mmace.labels.gate import find_duplicates, fingerprint, job_frames, judge
from mmace.labels.plan import Job, Plan, Recipe, check_plan, make_job, read_plan, write_plan, write_splits
from mmace.labels.run import Programs, find_programs, job_key, read_result, run_plan
from mmace.labels.sampling import anisotropy_mesh, build, expand, read_sampling, site_moments

RECORDED = Path(__file__).parent / "test_labels_data"
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HARTREE, BOHR = 27.211386, 0.52917721
SETTINGS = {
    "noncollinear": False, "ecut": 18, "pawecutdg": 36, "ecutsm": 0.5, "occopt": 6, "tsmear": 0.02, "k_spacing": 0.25,
    "tolvrs": 1e-6, "nstep": 45, "magcon_lambda": 0.02, "ratsph": {"Fe": 2.2, "Al": 2.2}, "ratsm": 0.05,
    "valence": {"Fe": 8, "Al": 3},
}  # fmt: skip
COLLINEAR = Recipe("test-collinear", "abinit", ("Fe",), SETTINGS)
NONCOLLINEAR = Recipe("test-noncollinear", "abinit", ("Fe",), {**SETTINGS, "noncollinear": True})
SOC = Recipe("test-soc", "gpaw-soc", ("Fe",), {"directions": [[0, 0, 1], [2, 0, 0]], "kmesh": [2, 2, 2]})


def feal(name: str = "feal", moment: float = 2.7, shift: float = 0.06) -> Job:
    atoms = Atoms("FeAl", positions=[(0, 0, 0), (1.435, 1.435, 1.435 + shift)], cell=2.87 * np.eye(3), pbc=True)
    return make_job(name, f"parent-{name}", "train", atoms, np.array([moment, 0.0]))


def iron(name: str = "canted") -> Job:
    moments = np.array([(0, 0, 2.2), (1.5556349, 0, 1.5556349)])
    return make_job(name, "parent-canted", "train", bulk("Fe", "bcc", 2.85, cubic=True), moments)


def recorded(name: str) -> str:
    return (RECORDED / f"{name}.abo").read_text()


def values(text: str, key: str) -> list[str]:
    """Words on the lines that start with a variable's name, up to the next variable."""
    words: list[str] = []
    lines = iter(text.splitlines())
    for line in lines:
        if line.split()[:1] == [key]:
            words += line.split()[1:]
            for following in lines:
                if not following.startswith("  "):
                    break
                words += following.split()
    return words


def stand_in(tmp_path: Path, body: str = "") -> Programs:
    """Program that counts its calls and replays the recorded collinear run."""
    script = tmp_path / "program.py"
    script.write_text(
        f"import pathlib, shutil, sys, time\nwith open({str(tmp_path / 'calls')!r}, 'a') as f: f.write('x')\n"
        f"text = pathlib.Path(sys.argv[1]).read_text()\n{body}\n"
        f"shutil.copy({str(RECORDED / 'collinear.abo')!r}, 'job.abo')\n"
    )
    return Programs((sys.executable, str(script)), tmp_path)


def calls(tmp_path: Path) -> int:
    return len((tmp_path / "calls").read_text()) if (tmp_path / "calls").exists() else 0


# Input


def test_collinear_input_says_what_the_job_asks() -> None:
    text = write_input(feal(), SETTINGS, ("Fe",), "/paw")
    assert 'pseudos "Fe.GPAW.PBE.xml, Al.GPAW.PBE.xml"' in text
    assert "nsppol 2 nspden 2" in text
    assert values(text, "constraint_kind") == ["1", "0"]
    assert [float(x) for x in values(text, "spinat")] == [0, 0, 2.7, 0, 0, 0]
    assert values(text, "ngkpt")[:3] == ["9", "9", "9"]
    assert [float(x) for x in values(text, "xred")][3:] == pytest.approx([0.5, 0.5, 0.5 + 0.06 / 2.87])


def test_noncollinear_input_turns_spin_orbit_coupling_off() -> None:
    text = write_input(iron(), dict(NONCOLLINEAR.settings), ("Fe",), "/paw")
    assert "nspinor 2 nspden 4 nsppol 1" in text
    assert "pawspnorb 0" in text
    assert [float(x) for x in values(text, "spinat")] == pytest.approx([0, 0, 2.2, 1.5556349, 0, 1.5556349])


def test_atoms_without_carriers_are_not_constrained() -> None:
    job = make_job("al", "al", "train", bulk("Al", "fcc", 4.04), np.zeros(1))
    text = write_input(job, SETTINGS, ("Fe",), "/paw")
    assert "nsppol 1 nspden 1" in text
    assert "constraint_kind" not in text


@pytest.mark.parametrize(
    ("moments", "shift", "spins"),
    [((1.8, -1.8), 0.0, 1), ((1.8, -1.7), 0.0, 2), ((1.8, 1.8), 0.0, 2), ((0.0, 0.0), 0.0, 2), ((1.8, -1.8), 0.1, 1)],
)
def test_antiferromagnets_are_run_with_one_spin(moments: tuple[float, float], shift: float, spins: int) -> None:
    atoms = bulk("Fe", "bcc", 2.83, cubic=True)
    atoms.positions[1] += shift
    job = make_job("pair", "pair", "train", atoms, np.array(moments))
    assert f"nsppol {spins} nspden 2" in write_input(job, SETTINGS, ("Fe",), "/paw")


def test_bands_allow_for_moments_that_cancel() -> None:
    def bands(symbols: str, moments: list[float], settings: dict) -> int:
        atoms = Atoms(symbols, scaled_positions=np.random.default_rng(0).random((len(moments), 3)), cell=4 * np.eye(3))
        text = write_input(make_job("x", "x", "train", atoms, np.array(moments)), settings, ("Fe",), "/paw")
        return int(values(text, "nband")[0])

    assert bands("Fe2", [2.2, 2.2], SETTINGS) == bands("Fe2", [2.2, -2.2], SETTINGS) == 11 + 1 + 4
    assert bands("FeAl", [0.0, 0.0], SETTINGS) == 6 + 1 + 2
    assert bands("Al2", [0.0, 0.0], SETTINGS) == 3 + 1 + 2
    spinors = dict(NONCOLLINEAR.settings)
    assert bands("Fe2", [2.2, -2.2], spinors) == 2 * bands("Fe2", [2.2, 2.2], SETTINGS)
    assert bands("Fe2", [0.0, 0.0], spinors) == 2 * bands("Fe2", [0.0, 0.0], SETTINGS)


def test_opposite_moments_on_sites_that_differ_keep_both_spins() -> None:
    atoms = Atoms("Fe2Al", scaled_positions=[(0, 0, 0), (0, 0, 0.4), (0, 0, 0.7)], cell=[2.8, 2.8, 6.0], pbc=True)
    job = make_job("pair", "pair", "train", atoms, np.array([1.8, -1.8, 0.0]))
    assert "nsppol 1" in write_input(job, SETTINGS, ("Fe",), "/paw")
    atoms.positions[2, 2] += 0.1
    job = make_job("pair", "pair", "train", atoms, np.array([1.8, -1.8, 0.0]))
    assert "nsppol 2" in write_input(job, SETTINGS, ("Fe",), "/paw")


@pytest.mark.parametrize(
    "atoms", [bulk("Fe", "bcc", 2.83), bulk("Al", "fcc", 4.04), bulk("Fe", "bcc", 2.83, cubic=True)]
)
def test_mesh_keeps_symmetry_and_spacing(atoms: Atoms) -> None:
    atoms.set_cell(atoms.cell.array @ np.diag([1, 1, 1.07]), scale_atoms=True)
    mesh = np.array(kpoint_mesh(atoms.cell.array, 0.25))
    reciprocal = 2 * np.pi * np.linalg.inv(atoms.cell.array).T
    assert np.all(np.linalg.norm(reciprocal, axis=1) / mesh <= 0.25 + 1e-6)
    turned = (reciprocal / mesh[:, None]) @ np.array([(0, 1, 0), (-1, 0, 0), (0, 0, 1)])
    steps = turned @ np.linalg.inv(reciprocal / mesh[:, None])
    assert np.allclose(steps, np.round(steps))


@pytest.mark.parametrize(
    ("atoms", "gamma"),
    [(bulk("Fe", "bcc", 2.83, cubic=True), False), (bulk("Fe", "bcc", 2.83), False), (bulk("Al", "fcc", 4.04), True)],
)
def test_anisotropy_meshes_avoid_gamma_only_where_symmetry_allows(atoms: Atoms, gamma: bool) -> None:
    mesh = anisotropy_mesh(atoms.cell.array, 0.3)
    assert mesh["gamma"] is gamma
    sizes = np.array(mesh["kmesh"])
    points = (np.indices(sizes).reshape(3, -1).T + (0.0 if gamma else 0.5)) / sizes
    reciprocal = 2 * np.pi * np.linalg.inv(atoms.cell.array).T
    turned = points @ reciprocal @ np.array([(0, 1, 0), (-1, 0, 0), (0, 0, 1)]) @ np.linalg.inv(reciprocal)
    steps = turned * sizes - (0.0 if gamma else 0.5)
    assert np.allclose(steps, np.round(steps))


# Output


def test_recorded_collinear_output() -> None:
    result = parse_output(recorded("collinear"), 2)
    assert (result["code"], result["converged"], result["scf_steps"]) == ("abinit-9.6.2", True, 15)
    assert result["energy"] == pytest.approx(-24.105928834 * HARTREE, rel=1e-7)
    assert np.array(result["forces"])[:, 2] == pytest.approx(np.array([1, -1]) * 1.1044841411e-2 * HARTREE / BOHR)
    assert result["stress"][:3] == pytest.approx(
        np.array([-8.4092486719e-4, -8.4092486719e-4, -8.2413039619e-4]) * HARTREE / BOHR**3
    )
    assert np.array(result["moments"])[:, 2] == pytest.approx([2.699989, -0.122535])
    assert result["magnetic_forces"][0][2] == pytest.approx(-3.7358644392e-2 * HARTREE)


def test_recorded_noncollinear_output() -> None:
    result = parse_output(recorded("noncollinear"), 2)
    assert np.array(result["moments"]) == pytest.approx(np.array([(0.000424, 0, 2.199628), (1.555633, 0, 1.555934)]))
    assert result["magnetic_forces"][1] == pytest.approx(
        np.array([-1.1957609869e-3, -2.8901409578e-7, 5.0268698459e-3]) * HARTREE
    )


def test_output_that_ends_early_is_an_error() -> None:
    text = recorded("collinear")
    for broken in (text[: len(text) // 2], text.replace("fcart", "other"), ""):
        with pytest.raises(LabelError):
            parse_output(broken, 2)


# Gate and contract


def good_result(**changes: object) -> dict:
    return {**parse_output(recorded("collinear"), 2), **changes}


def test_gate_takes_good_results_and_says_why_not() -> None:
    job = feal()
    assert judge(job, good_result(), ("Fe",)) is None
    assert judge(job, good_result(converged=False), ("Fe",)) == "scf"
    assert judge(replace(job, moments=((0, 0, 2.6975), (0, 0, 0))), good_result(), ("Fe",)) == "moment"
    assert judge(replace(job, moments=((0, 0, 2.6985), (0, 0, 0))), good_result(), ("Fe",)) is None
    assert judge(job, {"failed": "no output"}, ("Fe",)) == "failed"
    assert judge(job, good_result(stress=[float("nan")] * 6), ("Fe",)) == "not finite"
    pair = make_job("pair", "p", "train", bulk("Fe", "bcc", 2.83, cubic=True), np.array([2.2, 2.2]))
    result = good_result(moments=[(0, 0, 2.2)] * 2, magnetic_forces=[(0, 0, 0.01), (0, 0, 0.014)])
    assert judge(pair, result, ("Fe",)) is None
    result["magnetic_forces"][1] = (0, 0, 0.0301)
    assert judge(pair, result, ("Fe",)) == "asymmetry"
    collapsed = {"converged": True, "soc_energies": [0.0, 0.0], "moments": [0.01, 0.0]}
    assert judge(job, collapsed, ("Fe",)) == "collapsed"


def test_free_moments_start_at_their_targets_and_give_no_gradients(tmp_path: Path) -> None:
    job = feal()
    text = write_input(job, {**SETTINGS, "constrained": False}, ("Fe",), tmp_path)
    assert "constraint_kind" not in text
    assert "magcon_lambda" not in text
    assert values(text, "prtdensph") == ["1"]
    assert "spinat" in text
    result = good_result(moments=[(0, 0, 1.1), (0, 0, 0)])
    assert judge(job, result, ("Fe",)) == "moment"
    del result["magnetic_forces"]
    assert judge(job, result, ("Fe",)) is None
    (frame,) = job_frames(Plan("test", COLLINEAR, (job,)), job, result)
    assert np.isnan(frame.arrays["magnetic_forces"]).all()
    assert frame.get_initial_magnetic_moments()[0, 2] == 1.1


def test_equivalent_atoms_share_their_magnetic_force() -> None:
    pair = make_job("pair", "p", "train", bulk("Fe", "bcc", 2.83, cubic=True), np.array([2.2, 2.2]))
    gradients = [(0, 0, 0.01), (0, 0, 0.02)]
    result = good_result(moments=[(0, 0, 2.2)] * 2, magnetic_forces=gradients)
    (frame,) = job_frames(Plan("test", COLLINEAR, (pair,)), pair, result)
    assert np.allclose(frame.arrays["magnetic_forces"][:, 2], 0.015)
    unlike = replace(pair, moments=((0, 0, 2.2), (0, 0, 1.0)))
    (frame,) = job_frames(Plan("test", COLLINEAR, (unlike,)), unlike, result)
    assert np.allclose(frame.arrays["magnetic_forces"][:, 2], (0.01, 0.02))


def test_stretched_and_compressed_crystals_are_no_duplicates() -> None:
    prints = []
    for strain in (0.01, -0.01):
        atoms = bulk("Fe", "bcc", 2.83)
        atoms.set_cell(atoms.cell.array @ np.diag([1 - strain / 2, 1 - strain / 2, 1 + strain]), scale_atoms=True)
        atoms.set_initial_magnetic_moments(None)
        atoms.set_initial_magnetic_moments([[0.0, 0.0, 2.2]])
        turned = atoms.copy()
        turned.rotate(70, (1, 2, 3), rotate_cell=True)
        assert np.allclose(fingerprint(atoms), fingerprint(turned), rtol=1e-8)
        prints.append(fingerprint(atoms))
    assert np.abs(prints[0] - prints[1]).max() > 2 * 4e-3


def test_unconverged_recording_is_seen(tmp_path: Path) -> None:
    text = recorded("collinear").replace("< tolvrs=  1.00E-06 =>converged.", "")
    assert parse_output(text, 2)["converged"] is False


def test_frames_keep_the_contract_through_a_file(tmp_path: Path) -> None:
    plan = Plan("test", COLLINEAR, (feal(),))
    (frame,) = job_frames(plan, plan.jobs[0], good_result())
    write_labels(tmp_path / "labels.extxyz", [frame])
    atoms = read(tmp_path / "labels.extxyz")
    assert atoms.get_potential_energy() == frame.get_potential_energy()
    assert np.allclose(atoms.get_forces(), frame.get_forces(), atol=1e-8)
    assert np.allclose(atoms.get_stress(), frame.get_stress())
    assert np.allclose(atoms.get_initial_magnetic_moments(), [(0, 0, 2.699989), (0, 0, 0)])
    assert np.isnan(atoms.arrays["magnetic_forces"][1]).all()
    assert atoms.info["parent"] == "parent-feal"
    assert len(read_checked(tmp_path / "labels.extxyz")) == 1


def test_noncollinear_frames_give_only_what_was_confirmed() -> None:
    plan = Plan("test", NONCOLLINEAR, (iron(),))
    result = parse_output(recorded("noncollinear"), 2)
    (frame,) = job_frames(plan, plan.jobs[0], result)
    assert set(frame.calc.results) == {"energy"}
    gradients = np.array(result["magnetic_forces"])
    assert frame.arrays["magnetic_forces"][0, 2] == pytest.approx(gradients[0, 2])
    assert np.isnan(frame.arrays["magnetic_forces"][0, :2]).all()
    assert np.isnan(frame.arrays["magnetic_forces"][1, [0, 2]]).all()
    axis = np.array(result["moments"][1]) / np.linalg.norm(result["moments"][1])
    assert frame.arrays["magnetic_forces_parallel"][1] == pytest.approx(gradients[1] @ axis)


def test_stress_is_left_out_where_the_cut_off_is_too_low() -> None:
    plan = Plan("test", replace(COLLINEAR, settings={**SETTINGS, "stress": False}), (feal(),))
    (frame,) = job_frames(plan, plan.jobs[0], good_result())
    assert set(frame.calc.results) == {"energy", "forces"}


def test_anisotropy_frames_turn_the_moments_and_share_a_group() -> None:
    plan = Plan("test", SOC, (feal(),))
    result = {
        "converged": True,
        "code": "gpaw-0",
        "energy": -1.0,
        "moments": [0.8, -0.03],
        "soc_energies": [-1.5, -1.6],
    }
    first, second = job_frames(plan, plan.jobs[0], result)
    assert np.allclose(first.arrays["initial_magmoms"], [(0, 0, 0.8), (0, 0, 0)])
    assert np.allclose(second.arrays["initial_magmoms"], [(0.8, 0, 0), (0, 0, 0)])
    assert first.info["anisotropy_group"] == second.info["anisotropy_group"]
    assert (first.info["soc"], second.get_potential_energy()) == (1, -1.6)


def labelled(**info: object) -> Atoms:
    atoms = bulk("Fe", "bcc", 2.83)
    atoms.set_initial_magnetic_moments(None)
    atoms.set_initial_magnetic_moments(np.array([(0.0, 0.0, 2.2)]))
    atoms.info.update({"parent": "p", "name": "n", "code": "c", "recipe": "r", "soc": 0} | info)
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    return atoms


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: a.info.pop("parent"), "parent"),
        (lambda a: a.info.pop("soc"), "'soc' is missing"),
        (lambda a: a.info.update(soc=2), "soc"),
        (lambda a: a.info.update(soc=1), "anisotropy_group"),
        (lambda a: a.calc.results.update(energy=float("nan")), "energy"),
        (lambda a: a.calc.results.update(stress=np.full(6, np.nan)), "stress"),
        (lambda a: a.arrays.pop("initial_magmoms"), "initial_magmoms"),
        (lambda a: a.arrays.update(initial_magmoms=np.array([2.2])), "1×3 numbers"),
        (lambda a: a.arrays.update(initial_magmoms=np.full((1, 3), np.nan)), "not finite"),
        (lambda a: a.calc.results.update(forces=np.zeros((1, 2))), "forces has shape"),
        (lambda a: a.arrays.update(magnetic_forces=np.full((1, 3), np.inf)), "magnetic_forces"),
    ],
)
def test_broken_frames_are_not_written(tmp_path: Path, spoil: Callable, words: str) -> None:
    atoms = labelled()
    spoil(atoms)
    with pytest.raises(LabelError, match=words):
        write_labels(tmp_path / "labels.extxyz", [labelled(), atoms])
    assert not list(tmp_path.iterdir())


def test_fingerprint_sees_equal_states_and_tells_others_apart() -> None:
    primitive, cubic = bulk("Fe", "bcc", 2.83), bulk("Fe", "bcc", 2.83, cubic=True)
    for atoms, moments in ((primitive, [2.2]), (cubic, [-2.2, -2.2])):
        atoms.set_initial_magnetic_moments(None)
        atoms.set_initial_magnetic_moments([(m, 0.0, 0.0) for m in moments])
    one, two = fingerprint(primitive), fingerprint(cubic)
    assert np.allclose(one, two)
    cubic.set_initial_magnetic_moments([(2.2, 0, 0), (-2.2, 0, 0)])
    assert not np.allclose(one, fingerprint(cubic), atol=1e-3)
    primitive.numbers[:] = 27
    assert not np.allclose(one, fingerprint(primitive), atol=1e-2)


# Runner


def test_run_keeps_finished_jobs_and_reruns_changed_ones(tmp_path: Path) -> None:
    programs = stand_in(tmp_path)
    plan = Plan("test", COLLINEAR, (feal("one"), feal("two")))
    assert run_plan(plan, tmp_path / "work", programs, workers=2)["done"] == 2
    assert run_plan(plan, tmp_path / "work", programs)["kept"] == 2
    assert calls(tmp_path) == 2
    changed = Plan("test", COLLINEAR, (feal("one"), feal("two", shift=0.07)))
    assert read_result(changed, changed.jobs[1], tmp_path / "work") is None
    assert run_plan(changed, tmp_path / "work", programs) == {"done": 1, "failed": 0, "kept": 1, "busy": 0}


def test_run_that_was_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    stand_in(
        tmp_path, "if (pathlib.Path(sys.argv[0]).parent / 'slow').exists() and '2.5000000000' in text: time.sleep(250)"
    )
    plan = Plan("test", COLLINEAR, (feal("one"), feal("two", moment=2.5)))
    write_plan(tmp_path / "plan.json", plan)
    (tmp_path / "slow").touch()
    code = (
        "import sys; from pathlib import Path; from mmace.labels.plan import read_plan; "
        "from mmace.labels.run import Programs, run_plan; folder = Path(sys.argv[1]); "
        "run_plan(read_plan(folder / 'plan.json'), folder / 'work', "
        "Programs((sys.executable, str(folder / 'program.py')), folder))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], start_new_session=True)
    deadline = time.monotonic() + 240
    while calls(tmp_path) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert calls(tmp_path) == 2
    assert read_result(plan, plan.jobs[0], tmp_path / "work") is not None
    assert read_result(plan, plan.jobs[1], tmp_path / "work") is None
    (tmp_path / "slow").unlink()
    counts = run_plan(plan, tmp_path / "work", Programs((sys.executable, str(tmp_path / "program.py")), tmp_path))
    assert counts == {"done": 1, "failed": 0, "kept": 1, "busy": 0}


def test_jobs_whose_program_somebody_ended_are_not_recorded(tmp_path: Path) -> None:
    """An interrupted run must run them again, and a crash is no interruption."""
    plan = Plan("test", COLLINEAR, (feal("one"),))
    for ended in ("os.kill(os.getpid(), signal.SIGTERM)", "sys.exit(128 + signal.SIGINT)"):
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, tmp_path / "work", stand_in(tmp_path, "import os, signal; " + ended))
        assert read_result(plan, plan.jobs[0], tmp_path / "work") is None
    crashed = stand_in(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert run_plan(plan, tmp_path / "work", crashed)["failed"] == 1


def test_failed_and_late_jobs_are_recorded_and_can_be_retried(tmp_path: Path) -> None:
    plan = Plan("test", COLLINEAR, (feal("one"),))
    assert run_plan(plan, tmp_path / "work", stand_in(tmp_path, "sys.exit(3)"))["failed"] == 1
    assert run_plan(plan, tmp_path / "work", stand_in(tmp_path))["kept"] == 1
    late = stand_in(tmp_path, "time.sleep(250)")
    assert run_plan(plan, tmp_path / "work", late, retry=True, limit_s=0.5)["failed"] == 1
    result = read_result(plan, plan.jobs[0], tmp_path / "work")
    assert result is not None
    assert "within" in result["failed"]
    assert run_plan(plan, tmp_path / "work", stand_in(tmp_path), retry=True)["done"] == 1


def test_two_runs_share_a_folder(tmp_path: Path) -> None:
    plan = Plan("test", COLLINEAR, (feal("one"),))
    waiting = stand_in(tmp_path, "time.sleep(5)")
    code = (
        "import sys; from pathlib import Path; from mmace.labels.plan import read_plan; "
        "from mmace.labels.run import Programs, run_plan; folder = Path(sys.argv[1]); "
        "run_plan(read_plan(folder / 'plan.json'), folder / 'work', Programs((sys.executable, sys.argv[2]), folder))"
    )
    write_plan(tmp_path / "plan.json", plan)
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), waiting.command[1]])
    deadline = time.monotonic() + 240
    while calls(tmp_path) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run_plan(plan, tmp_path / "work", waiting)["busy"] == 1
    assert other.wait(240) == 0
    assert calls(tmp_path) == 1


def test_collect_counts_what_was_rejected(tmp_path: Path) -> None:
    off = feal("off", moment=2.4)
    plan = Plan("test", COLLINEAR, (feal("one"), feal("again"), off, feal("missing", shift=0.1)))
    run_plan(plan, tmp_path / "work", stand_in(tmp_path), only=["one", "again", "off"])
    frames, report = collect(plan, tmp_path / "work")
    assert [atoms.info["name"] for atoms in frames] == ["one"]
    assert report.rejected == {"duplicate": ["again"], "moment": ["off"]}
    assert (report.accepted, report.unfinished) == (1, 1)


def test_a_label_stays_where_its_job_fails_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan("test", COLLINEAR, (feal("one"),))
    write_plan(tmp_path / "plan.json", plan)
    run_plan(plan, tmp_path / "work", stand_in(tmp_path))
    run_plan(plan, tmp_path / "broken", stand_in(tmp_path, "sys.exit(3)"))
    collecting = ["label", "collect", str(tmp_path / "plan.json"), "-o", str(tmp_path / "labels.extxyz"), "--work"]
    assert main([*collecting, str(tmp_path / "work")]) == 0
    before = (tmp_path / "labels.extxyz").read_bytes()
    assert main([*collecting, str(tmp_path / "broken")]) == 0
    assert "earlier label stays: 1 (one)" in capsys.readouterr().out
    assert (tmp_path / "labels.extxyz").read_bytes() == before


def test_reasons_are_told_where_nothing_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan("test", COLLINEAR, (feal("off", moment=2.4),))
    write_plan(tmp_path / "plan.json", plan)
    run_plan(plan, tmp_path / "work", stand_in(tmp_path))
    collecting = ["label", "collect", str(tmp_path / "plan.json"), "--work", str(tmp_path / "work")]
    collecting += ["-o", str(tmp_path / "labels.extxyz"), "--report", str(tmp_path / "report.json")]
    assert main(collecting) == 2
    assert "no label of 'test' passed (1 moment)" in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())["rejected"] == {"moment": ["off"]}
    assert not (tmp_path / "labels.extxyz").exists()


def test_a_small_displacement_is_no_duplicate() -> None:
    """Invariants change by its square and are divided by the number of atoms; forces tell."""
    frames = []
    for shift in (0.0, 0.005):
        atoms = bulk("Fe", "bcc", 2.83, cubic=True) * (2, 2, 2)
        atoms.set_initial_magnetic_moments(None)
        atoms.set_initial_magnetic_moments(np.outer(np.full(16, 2.2), [0, 0, 1.0]))
        atoms.positions[0, 0] += shift
        forces = np.zeros((16, 3))
        forces[0, 0] = -10.0 * shift
        atoms.calc = SinglePointCalculator(atoms, energy=-100.0 + 5.0 * shift**2, forces=forces)
        atoms.info.update(soc=0, name=f"displaced-{shift}")
        frames.append(atoms)
    assert find_duplicates(frames) == []
    del frames[1].calc.results["forces"]
    assert find_duplicates(frames) == [(0, 1)]


def test_a_script_without_its_first_line_is_one_sentence(tmp_path: Path) -> None:
    script = tmp_path / "abinit"
    script.write_text('exec true "$@"\n')
    script.chmod(0o755)
    programs = replace(stand_in(tmp_path), command=(str(script),))
    with pytest.raises(MissingProgramError, match=r"cannot be started .* a script needs its first line"):
        run_plan(Plan("test", COLLINEAR, (feal(),)), tmp_path / "work", programs)


def test_collecting_does_not_vouch_for_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan("test", COLLINEAR, (feal("one"),))
    write_plan(tmp_path / "plan.json", plan)
    run_plan(plan, tmp_path / "work", stand_in(tmp_path))
    collecting = ["label", "collect", str(tmp_path / "plan.json"), "--work", str(tmp_path / "work"), "-o"]
    data = tmp_path / "data"
    assert main([*collecting, str(data / "a.extxyz")]) == 0
    (data / "b.extxyz").write_bytes((data / "a.extxyz").read_bytes())
    write_checksums(data)
    (data / "b.extxyz").write_text((data / "b.extxyz").read_text().replace("parent-one", "parent-two"))
    sums = (data / "SHA256SUMS").read_bytes()
    assert main([*collecting, str(data / "a.extxyz")]) == 2
    assert "b.extxyz' does not match" in capsys.readouterr().err
    assert (data / "SHA256SUMS").read_bytes() == sums


def test_equal_labels_of_one_name_in_two_parts_are_a_leak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan("test", COLLINEAR, (feal(),))
    for file, parent in (("a", "here"), ("b", "there")):
        frames = job_frames(plan, feal(), good_result())
        frames[0].info["parent"] = parent
        write_labels(tmp_path / f"{file}.extxyz", frames)
    write_checksums(tmp_path)
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["here"], "valid": [], "test": ["there"]}))
    assert main(["label", "check", str(tmp_path), "--splits", str(tmp_path / "splits.json")]) == 2
    assert "feal of a.extxyz and feal of b.extxyz" in capsys.readouterr().err


def test_label_files_are_enough_to_go_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the folder of the runs: labels stay, rejections are remembered, a changed job is run again."""
    plan = Plan("test", COLLINEAR, (feal("one"), feal("off", moment=2.4), feal("open", shift=0.1)))
    write_plan(tmp_path / "plan.json", plan)
    run_plan(plan, tmp_path / "work", stand_in(tmp_path), only=["one", "off"])
    labels, report = str(tmp_path / "labels.extxyz"), str(tmp_path / "report.json")
    arguments = ["label", "collect", str(tmp_path / "plan.json"), "-o", labels, "--report", report, "--work"]
    assert main([*arguments, str(tmp_path / "work")]) == 0
    before = [Path(path).read_bytes() for path in (labels, report)]
    assert main([*arguments, str(tmp_path / "lost")]) == 0
    assert [Path(path).read_bytes() for path in (labels, report)] == before

    monkeypatch.setattr("mmace.labels.cli.find_programs", lambda *_: stand_in(tmp_path))
    started = calls(tmp_path)
    again = ["label", "run", str(tmp_path / "plan.json"), "--work", str(tmp_path / "lost"), "--nice", "0"]
    assert main([*again, "--labels", labels, "--report", report]) == 0
    assert calls(tmp_path) == started + 1
    assert earlier_labels(plan, read_checked(labels)).keys() == {"one"}

    run_plan(plan, tmp_path / "broken", stand_in(tmp_path, "sys.exit(3)"), only=["open"])
    assert main([*arguments, str(tmp_path / "broken")]) == 0
    stand_in(tmp_path)
    again[again.index("--work") + 1] = str(tmp_path / "elsewhere")
    started = calls(tmp_path)
    assert main([*again, "--labels", labels, "--report", report]) == 0
    assert calls(tmp_path) == started
    assert main([*again, "--labels", labels, "--report", report, "--retry"]) == 0
    assert calls(tmp_path) == started + 1, "what the gate rejected stays so, what failed is tried again"
    for changed in (feal("one", shift=0.0601), feal("one", moment=2.703)):
        assert not earlier_labels(Plan("test", COLLINEAR, (changed,)), read_checked(labels))
    assert not earlier_labels(Plan("test", NONCOLLINEAR, (feal("one"),)), read_checked(labels))


def ran(tmp_path: Path, plan: Plan, shifts: dict[str, float] | None = None) -> Path:
    """Folder with a result for each job of a plan, whose energies are moved by `shifts` (eV)."""
    for job in plan.jobs:
        result = good_result(moments=job.moments, key=job_key(plan, job))
        result["energy"] += (shifts or {}).get(job.name, 0.0)
        folder = tmp_path / "ran" / plan.name / job.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(result))
    return tmp_path / "ran"


def test_labels_of_other_plans_stay_in_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second plan joins the first one's labels, in either order, and finds duplicates among them."""
    plans = Plan("one", COLLINEAR, (feal("a"), feal("b", 2.5))), Plan("two", COLLINEAR, (feal("c", 2.3), feal("d")))
    output = tmp_path / "data" / "labels.extxyz"
    for plan in plans:
        write_plan(tmp_path / f"{plan.name}.json", plan)
        work = ran(tmp_path, plan)

    def gathered(name: str, folder: Path) -> set[str]:
        assert main(["label", "collect", str(tmp_path / f"{name}.json"), "-o", str(output), "--work", str(folder)]) == 0
        return {atoms.info["name"] for atoms in read_checked(output)}

    assert gathered("one", work) == {"a", "b"}
    assert gathered("two", work) == {"a", "b", "c"}
    printed = capsys.readouterr().out
    assert "1 labels of the plan, and 2 that it held before" in printed
    assert "rejected, duplicate: 1 (d)" in printed
    assert gathered("one", work) == gathered("two", tmp_path / "lost") == {"a", "b", "c"}


def test_another_label_of_the_same_name_is_never_replaced(tmp_path: Path) -> None:
    old = Plan("next", COLLINEAR, (feal("next-1"),))
    frames, _ = collect(old, ran(tmp_path, old))
    new = Plan("next", COLLINEAR, (feal("next-1", 2.5),))
    kept, report = collect(new, tmp_path / "lost", frames)
    assert kept == frames
    assert (report.accepted, report.kept, report.unfinished) == (0, 1, 1)
    with pytest.raises(LabelError, match=r"label 'next-1' of another structure.*another file"):
        collect(new, ran(tmp_path, new, {"next-1": 0.1}), frames)
    again, report = collect(old, ran(tmp_path, old), frames)
    assert (len(again), report.accepted, report.kept) == (1, 1, 0)


def test_labels_answer_jobs_of_the_same_settings_only(tmp_path: Path) -> None:
    plan = Plan("test", COLLINEAR, (feal("one"),))
    fine = refined_plan(plan, ["one"], 0.18)
    coarse, _ = collect(plan, ran(tmp_path, plan))
    assert earlier_labels(plan, coarse).keys() == {"one"}
    assert not earlier_labels(fine, coarse)
    dense, _ = collect(fine, ran(tmp_path, fine))
    assert earlier_labels(fine, [*coarse, *dense]) == {"one": dense}
    for atoms in (*coarse, *dense):
        del atoms.info["job_key"]
    assert earlier_labels(plan, coarse).keys() == {"one"}
    assert not earlier_labels(fine, coarse)
    work = ran(tmp_path, fine)
    assert collect(fine, work, dense)[1].kept == 0
    with pytest.raises(LabelError, match="another file"):
        collect(fine, ran(tmp_path, fine, {"one": 0.1}), coarse)


def test_directions_answer_by_the_moments_that_lie_along_them(tmp_path: Path) -> None:
    plan = Plan("test", SOC, (feal(),))
    result = {"converged": True, "code": "g", "energy": -1.0, "moments": [0.8, 0.0], "soc_energies": [-1.5, -1.6]}
    frames = job_frames(plan, plan.jobs[0], result)
    for atoms in frames:
        del atoms.info["job_key"]
    assert earlier_labels(plan, frames).keys() == {"feal"}
    turned = replace(SOC, settings={**SOC.settings, "directions": [[0, 0, 1], [1, 1, 0]]})
    assert not earlier_labels(Plan("test", turned, plan.jobs), frames)


def test_rejections_answer_the_job_that_was_rejected(tmp_path: Path) -> None:
    """By key, whatever the name; reports of older versions hold names, which count for their own plan alone."""
    old, new = (Plan("next", COLLINEAR, (feal("next-1", moment),)) for moment in (2.4, 2.3))
    run_plan(old, tmp_path / "work", stand_in(tmp_path))
    write_plan(tmp_path / "old.json", old)
    write_plan(tmp_path / "new.json", new)
    good = Plan("good", COLLINEAR, (feal("good"),))
    write_plan(tmp_path / "good.json", good)
    ran(tmp_path, good)
    run_plan(good, tmp_path / "work", stand_in(tmp_path))
    path = str(tmp_path / "report.json")
    collected = ["-o", str(tmp_path / "labels.extxyz"), "--report", path, "--work", str(tmp_path / "work")]
    for name in ("good", "old"):
        assert main(["label", "collect", str(tmp_path / f"{name}.json"), *collected]) == 0
    report = json.loads(Path(path).read_text())
    assert report["rejected"] == {"moment": ["next-1"]}
    assert earlier_rejections(old, report) == {"next-1": "moment"}
    assert earlier_rejections(new, report) == {}
    assert main(["label", "collect", str(tmp_path / "good.json"), *collected]) == 0
    assert earlier_rejections(old, json.loads(Path(path).read_text())) == {"next-1": "moment"}
    del report["rejected_keys"]
    assert earlier_rejections(old, report) == {"next-1": "moment"}
    assert earlier_rejections(replace(old, name="other"), report) == {}


def test_displacements_of_one_size_and_energy_are_no_duplicates() -> None:
    """An ion of a doubled cell moved along it and across it: pair sums differ by less than moments are known to."""
    frames = []
    for axis in (2, 0, 1):
        atoms = bulk("FeAl", "cesiumchloride", a=2.87) * (1, 1, 2)
        atoms.positions[0, axis] += 0.04
        atoms.set_initial_magnetic_moments(np.zeros((4, 3)))
        atoms.info |= {"name": f"moved-{axis}", "soc": 0}
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
        frames.append(atoms)
    assert find_duplicates(frames) == [(1, 2)]


def test_duplicates_are_found_across_files_and_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan("one", COLLINEAR, (feal("a"), feal("b", 2.5)))
    twin = replace(feal("twin"), scaled_positions=((0.1, 0, 0), (0.6, 0.5, 0.5 + 0.06 / 2.87)), parent="parent-twin")
    other = Plan("two", COLLINEAR, (twin, feal("c", 2.3)))
    frames = [*collect(plan, ran(tmp_path, plan))[0], *collect(other, ran(tmp_path, other))[0]]
    assert find_duplicates(frames) == [(0, 2)]
    report = collect(other, tmp_path / "ran", beside=frames[:2])[1]
    assert report.rejected == {"duplicate": ["twin"]}
    assert len(collect(other, tmp_path / "ran", earlier=frames[2:], beside=frames[:2])[0]) == 2
    for name, part in (("a", frames[:2]), ("b", frames[2:])):
        write_labels(tmp_path / "data" / f"{name}.extxyz", part)
    write_checksums(tmp_path / "data")
    check = ["label", "check", str(tmp_path / "data")]
    assert main(check) == 0
    assert "equal: a of a.extxyz and twin of b.extxyz" in capsys.readouterr().out
    splits = {"train": ["parent-a", "parent-b"], "valid": ["parent-c"], "test": ["parent-twin"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    assert main([*check, "--splits", str(tmp_path / "splits.json")]) == 2
    printed = capsys.readouterr()
    assert "2 / 0 / 0 in train / valid / test" in printed.out
    assert "also trained on: a of a.extxyz and twin of b.extxyz" in printed.err


# Differences


def test_differences_recover_a_known_gradient(tmp_path: Path) -> None:
    plan = difference_plan(Plan("test", COLLINEAR, (feal(),)), "feal")
    names = {job.name for job in plan.jobs}
    assert {"base", "force-plus", "stress-minus", "parallel-plus"} <= names
    stiffness, base = 0.7, feal()

    def energy(job: Job) -> float:
        atoms, start = job.atoms(), base.atoms()
        return float(
            3.0 * 2.87 * (atoms.get_scaled_positions() - start.get_scaled_positions())[1, 2]
            + stiffness * (job.moments[0][2] - 2.7)
            + 2.0 * (atoms.cell[2, 2] / start.cell[2, 2] - 1)
        )

    for job in plan.jobs:
        folder = tmp_path / plan.name / job.name
        folder.mkdir(parents=True)
        volume = base.atoms().get_volume()
        result = good_result(
            energy=energy(job), moments=job.moments, forces=[[0, 0, 3.0], [0, 0, -3.0]],
            stress=[0, 0, 2.0 / volume, 0, 0, 0], magnetic_forces=[[0, 0, -stiffness], [0, 0, 0]],
        )  # fmt: skip
        (folder / "result.json").write_text(json.dumps({**result, "key": job_key(plan, job)}))
    rows = compare_differences(plan, tmp_path)
    by_name = {row[0]: (float(row[1]), float(row[2])) for row in rows}
    assert by_name["force z"] == pytest.approx((-3.0, -3.0))
    assert by_name["magnetic force, parallel"] == pytest.approx((-stiffness, -stiffness))
    assert by_name["stress zz"] == pytest.approx(
        (2.0 / base.atoms().get_volume(), 2.0 / base.atoms().get_volume()), abs=2e-3
    )


def test_reproduction_compares_what_both_hold(tmp_path: Path) -> None:
    plan = Plan("test", COLLINEAR, (feal(),))
    reference = job_frames(plan, plan.jobs[0], good_result())[0]
    again = reproduction_plan(plan, [reference], ["feal"])
    meshed = replace(plan, jobs=(replace(feal(), settings={"kmesh": [3, 4, 5]}),))
    assert reproduction_plan(meshed, [reference], ["feal"]).jobs[0].settings == {"kmesh": [3, 4, 5]}
    with pytest.raises(LabelError, match="has no job 'feal', whose mesh is needed"):
        reproduction_plan(replace(plan, jobs=(feal("other"),)), [reference], ["feal"])
    folder = tmp_path / again.name / "feal"
    folder.mkdir(parents=True)
    result = good_result(energy=good_result()["energy"] + 2e-3)
    (folder / "result.json").write_text(json.dumps({**result, "key": job_key(again, again.jobs[0])}))
    assert compare_reproduction(again, tmp_path, [reference])[0][1:] == ("1.0000", "0.000", "0.0000", "0.000")
    for key in ("forces", "stress"):
        del reference.calc.results[key]
    assert compare_reproduction(again, tmp_path, [reference])[0][1:] == ("1.0000", "", "", "0.000")
    with pytest.raises(LabelError, match="makes groups of directions"):
        reproduction_plan(Plan("test", SOC, (feal(),)), [reference], ["feal"])


def test_differences_without_moments_leave_them_out() -> None:
    plan = difference_plan(Plan("test", COLLINEAR, (feal(moment=0.0),)), "feal")
    assert {job.name for job in plan.jobs} == {
        "base", "force-plus", "force-minus", "stress-plus", "stress-minus"
    }  # fmt: skip


def test_differences_of_canted_moments_turn_them_too() -> None:
    plan = difference_plan(Plan("test", NONCOLLINEAR, (iron(),)), "canted")
    plus = next(job for job in plan.jobs if job.name == "transverse-plus")
    assert plus.moments[0] == pytest.approx((0.05, 0, 2.2))


def test_refined_plan_keeps_jobs_and_refuses_coarser_meshes() -> None:
    plan = Plan("test", COLLINEAR, (feal("a"), feal("b"), feal("c")))
    fine = refined_plan(plan, ["c", "a"], 0.18)
    assert [job.name for job in fine.jobs] == ["c", "a"]
    assert fine.settings(fine.jobs[0])["kmesh"] == [13, 13, 13]
    assert replace(fine.jobs[1], settings={}) == plan.jobs[0]
    with pytest.raises(LabelError, match=r"job 'a'.*smaller"):
        refined_plan(plan, ["a"], 0.26)
    with pytest.raises(LabelError, match="no job 'x'"):
        refined_plan(plan, ["x"], 0.18)


def test_refined_plan_of_anisotropy_avoids_gamma() -> None:
    plan = Plan("test", SOC, (feal("a"),))
    fine = refined_plan(plan, ["a"], 0.2)
    assert fine.settings(fine.jobs[0])["kmesh"] == [12, 12, 12]
    assert fine.settings(fine.jobs[0])["gamma"] is False


def test_comparison_of_two_label_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan("test", COLLINEAR, (feal("a"), feal("b", shift=0.07)))
    frames, others = [], []
    for job, shift in zip(plan.jobs, (0.002, 0.006), strict=True):
        result = good_result()
        frames += job_frames(plan, job, result)
        changed = {
            "energy": result["energy"] - shift,
            "forces": result["forces"] + np.array([[0, 0, 0.003], [0, 0, -0.003]]),
            "stress": np.array(result["stress"]) + 1e-3,
            "magnetic_forces": np.array(result["magnetic_forces"]) + shift,
        }
        others += job_frames(plan, job, {**result, **changed})
    rows = {row[0]: row for row in compare_labels(frames, others)}
    assert rows["energy, mean"][2:] == ("2.000", "", "meV/atom")
    assert rows["energy"][1:] == ("2 of 2", "1.000", "1.000", "meV/atom")
    assert rows["forces"][1:] == ("4 of 12", "3.000", "3.000", "meV/Å")
    assert rows["stress"][1:] == ("12 of 12", "0.160", "0.160", "GPa")
    assert rows["magnetic forces"][1:] == ("6 of 6", f"{np.sqrt(20):.3f}", "6.000", "meV/µB")
    others[1].positions[1] += 0.01
    with pytest.raises(LabelError, match=r"'b'.*differ"):
        compare_labels(frames, others)
    with pytest.raises(LabelError, match="no frame"):
        compare_labels(frames[:1], others[1:])
    write_labels(tmp_path / "a.extxyz", frames)
    assert main(["label", "compare", str(tmp_path / "a.extxyz"), str(tmp_path / "a.extxyz")]) == 0
    assert "meV/µB" in capsys.readouterr().out


def test_comparison_of_anisotropy_is_about_the_mean_of_a_group() -> None:
    """Total energies and the lengths of self-consistent moments may differ; directions and structures may not."""
    plan = Plan("test", SOC, (feal("a"), feal("b")))
    frames, others = [], []
    for job, change in zip(plan.jobs, (2e-6, -8e-6), strict=True):
        result = {"converged": True, "code": "g", "energy": -1.0, "moments": [0.8, 0.0], "soc_energies": [-1.5, -1.6]}
        frames += job_frames(plan, job, result)
        other = {**result, "energy": -3.0, "moments": [0.83, 0.0], "soc_energies": [-2.5, -2.6 + change]}
        others += job_frames(plan, job, other)
    rows = {row[0]: row for row in compare_labels(frames, others)}
    # two atoms and two directions: a quarter of the change each
    assert rows.keys() == {"anisotropy"}
    assert rows["anisotropy"][1:] == ("4 of 4", f"{np.sqrt((0.5**2 + 2**2) / 2):.3f}", "2.000", "µeV/atom")
    others[1].arrays["initial_magmoms"] = others[0].arrays["initial_magmoms"]
    with pytest.raises(LabelError, match=r"'a-d1'.*differ"):
        compare_labels(frames, others)


# Programs and data sets


def test_missing_programs_and_data_sets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMACE_PAW", raising=False)
    with pytest.raises(MissingProgramError, match=r"no-such-abinit.*apt-get install abinit.*--abinit"):
        find_program("no-such-abinit")
    with pytest.raises(MissingProgramError, match=r"PAW data set for Zz.*gpaw-data.*--paw"):
        find_datasets(["Zz"], tmp_path, tmp_path / "paw")
    with pytest.raises(MissingProgramError, match=r"no GPAW.*--gpaw-python"):
        find_programs(Plan("test", SOC, (feal(),)), tmp_path, gpaw_python=str(tmp_path / "no-python"))


def test_compressed_data_sets_are_unpacked(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "Fe.PBE.gz").write_bytes(gzip.compress(b"<paw/>"))
    folder = find_datasets(["Fe"], tmp_path, tmp_path / "paw")
    assert (folder / "Fe.GPAW.PBE.xml").read_text() == "<paw/>"
    assert find_datasets(["Fe"], tmp_path, tmp_path / "paw") == folder
    (tmp_path / "Fe.PBE.gz").write_bytes(gzip.compress(b"<other/>"))
    with pytest.raises(LabelError, match="take another --work folder"):
        find_datasets(["Fe"], tmp_path, tmp_path / "paw")
    (tmp_path / "Fe.PBE.gz").unlink()
    assert find_datasets(["Fe"], tmp_path, tmp_path / "paw") == folder


def test_programs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in folders of their own, where a relative path leads nowhere."""
    (tmp_path / "abinit.sh").write_text("#!/bin/sh\n")
    (tmp_path / "abinit.sh").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert find_program("./abinit.sh") == str(tmp_path / "abinit.sh")


def test_a_late_job_leaves_nothing_running(tmp_path: Path) -> None:
    """A program may be a script around the one that computes."""
    body = "import subprocess; print(subprocess.Popen(['sleep', '300']).pid, flush=True); time.sleep(300)"
    plan = Plan("test", COLLINEAR, (feal("one"),))
    assert run_plan(plan, tmp_path / "work", stand_in(tmp_path, body), limit_s=5.0)["failed"] == 1
    child = int((tmp_path / "work/test/one/log").read_text())
    state = Path(f"/proc/{child}/stat")
    # a signal takes its time on a busy machine
    deadline = time.monotonic() + 20
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan(tmp_path / "plan.json", Plan("test", COLLINEAR, (feal(),)))
    status = main(["label", "run", str(tmp_path / "plan.json"), "--work", str(tmp_path), "--abinit", "no-such-abinit"])
    printed = capsys.readouterr()
    assert status == 2
    assert printed.err.startswith("error: the program 'no-such-abinit'")
    assert printed.err.count("\n") == 1


# Plans, sampling, splits


def test_plan_survives_its_file(tmp_path: Path) -> None:
    plan = Plan("test", NONCOLLINEAR, (iron(), feal()))
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == replace(plan, recipe=read_plan(tmp_path / "plan.json").recipe)
    assert job_key(read_plan(tmp_path / "plan.json"), iron()) == job_key(plan, iron())


@pytest.mark.parametrize(
    ("jobs", "words"),
    [
        ((feal(), feal()), "twice"),
        ((feal(), replace(feal("b"), parent="parent-feal", split="test")), "two splits"),
        ((replace(feal(), name="../escape"),), "name"),
        ((replace(feal(), name="001"),), "read back as a number"),
        ((replace(feal(), name="T"),), "read back as a number"),
        ((replace(feal(), parent="1e5"),), "its parent: the name '1e5' would be read back"),
        ((replace(feal(), split="other"),), "split"),
        ((replace(feal(), symbols=("Fe", "Qq")),), "unknown element"),
        ((replace(feal(), moments=((0, 0, float("nan")), (0, 0, 0))),), "finite"),
        ((replace(feal(), moments=((0, 0, 1), (0, 0, 1))),), "no carrier"),
        ((iron(),), "off the z axis need a non-collinear recipe"),
        ((replace(feal(), symbols=("Fe", "Ni")),), "valence has no entry for Ni"),
        ((replace(feal(), settings={"ratsph": {"Al": 2.2}}),), "ratsph has no entry for Fe"),
    ],
)
def test_bad_plans_are_refused(jobs: tuple[Job, ...], words: str) -> None:
    with pytest.raises(LabelError, match=words):
        check_plan(Plan("test", COLLINEAR, jobs))


def test_recipes_that_would_mean_something_else_are_refused() -> None:
    for recipe, words in (
        (replace(COLLINEAR, carriers="Fe"), "give a list of elements"),
        (replace(COLLINEAR, carriers=("fe",)), "give a list of elements"),
        (replace(COLLINEAR, settings={**SETTINGS, "k_spacing": -0.25}), "k_spacing is -0.25; it must be above 0"),
    ):
        with pytest.raises(LabelError, match=words):
            check_plan(Plan("test", recipe, (feal(),)))
    with pytest.raises(ValueError, match=r"a moment is asked for, but no carrier \(Co\) is there"):
        site_moments(bulk("Fe"), ("Co",), 2.2)
    assert not site_moments(bulk("Al"), ("Fe",), 0.0).any()


def test_a_recipe_without_a_setting_is_refused() -> None:
    for key in ("nstep", "magcon_lambda", "k_spacing"):
        recipe = replace(COLLINEAR, settings={k: v for k, v in SETTINGS.items() if k != key})
        with pytest.raises(LabelError, match=f"the recipe has no {key}"):
            check_plan(Plan("test", recipe, (feal(),)))


def test_sampling_builds_what_it_says() -> None:
    do3 = build({"type": "fcc-body", "species": ["Fe", "Fe", "Al", "Fe"], "a": 5.74})
    distances = np.sort(do3.get_distances(2, [0, 1, 3], mic=True))
    assert distances[:2] == pytest.approx([5.74 * np.sqrt(3) / 4] * 2)
    assert distances[2] == pytest.approx(5.74 / 2)
    squeezed = build({"type": "b2", "species": ["Fe", "Al"], "a": 2.87, "tetragonal": 0.06})
    assert squeezed.get_volume() == pytest.approx(2.87**3)
    assert squeezed.cell[2, 2] == pytest.approx(2.87 * 1.06)
    strained = build({"type": "b2", "species": ["Fe", "Al"], "a": 2.0, "strain": [0.01, 0, 0, 0.02, 0, 0]})
    assert strained.cell.array == pytest.approx(np.array([[2.02, 0, 0], [0, 2, 0.02], [0, 0.02, 2]]))
    layers = build({"type": "stack", "species": ["Fe", "Al", "-", "Al"], "a": 2.8, "c": 3.0})
    assert layers.get_chemical_formula() == "Al2Fe"
    assert layers.cell[2, 2] == pytest.approx(6.0)


def test_sampling_splits_by_parent_and_names_its_faults() -> None:
    lattice = {"type": "b2", "species": ["Fe", "Al"], "a": 2.87}
    family = {
        "tag": "x",
        "lattice": lattice,
        "parents": [{"scale": 1 + k / 100, "moments": [0.5, 1.0]} for k in range(44)],
    }
    data = {
        "name": "s",
        "seed": 0,
        "recipe": {"name": "r", "engine": "abinit", "carriers": ["Fe"], "settings": SETTINGS},
    }
    plan = expand({**data, "families": [family]})
    check_plan(plan)
    assert (len(plan.parents("test")), len(plan.parents("valid"))) == (6, 4)
    assert expand({**data, "families": [family]}) == plan
    assert not expand({**data, "families": [{**family, "train_only": True}]}).parents("test")
    broken = {**family, "parents": [{"moments": [[0.5, 0.5]]}]}
    with pytest.raises(LabelError, match=r"family 'x'.*2 moments for 1 carriers"):
        expand({**data, "families": [broken]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["families"][0]["parents"][1].update(shaer=0.1), r"parent 1 of family 'x'.*'shaer': use only type"),
        (lambda d: d["families"][0]["lattice"].update(scaled=1.1), r"the lattice of family 'x'.*'scaled'"),
        (lambda d: d["families"][0]["lattice"].update(cell=[[1, 0, 0]]), r"parent 0 of family 'x'.*type 'b2'.*'cell'"),
        (lambda d: d["families"][0]["lattice"].update(type="b3"), r"parent 0 of family 'x'.*type 'b3': use one of"),
        (lambda d: d["families"][0]["parents"][1].pop("moments"), r"parent 1 of family 'x'.*lacks 'moments'"),
        (lambda d: d["families"][0].update(trian_only=True), r"family 0 of the sampling 's'.*'trian_only'"),
        (lambda d: d["families"][0]["parents"][1].update(strain=[0.01, 0.0]), r"a strain of 2 components; give xx"),
        (lambda d: d["families"].insert(0, 3), r"family 0 of the sampling 's' is not a JSON object"),
        (lambda d: d["recipe"]["settings"].update(constrianed=False), r"settings of the recipe.*'constrianed'"),
        (lambda d: d.pop("seed"), r"sampling lacks 'seed'"),
        (lambda d: d.update(families={}), r"families .* no list"),
    ],
)
def test_what_a_sampling_cannot_mean_is_refused(tmp_path: Path, change: Callable, words: str) -> None:
    data = {
        "name": "s",
        "seed": 0,
        "recipe": {"name": "r", "engine": "abinit", "carriers": ["Fe"], "settings": dict(SETTINGS)},
        "families": [
            {
                "tag": "x",
                "lattice": {"type": "b2", "species": ["Fe", "Al"], "a": 2.87},
                "parents": [{"moments": [1.0]}, {"shear": 0.1, "moments": [1.0]}],
            }
        ],
    }
    (tmp_path / "s.json").write_text(json.dumps(data))
    assert len(read_sampling(tmp_path / "s.json").jobs) == 2
    change(data)
    (tmp_path / "s.json").write_text(json.dumps(data))
    with pytest.raises(LabelError, match=rf"s\.json': .*{words}"):
        read_sampling(tmp_path / "s.json")
    (tmp_path / "s.json").write_text("[1]")
    with pytest.raises(LabelError, match="the sampling is not a JSON object"):
        read_sampling(tmp_path / "s.json")


def test_a_plan_does_not_replace_its_sampling_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.json"
    path.write_text((BENCHMARKS / "FeAl" / "plans" / "modes.sampling.json").read_text())
    before = path.read_bytes()
    assert main(["label", "plan", str(path), "-o", str(path)]) == 2
    assert "name another file to write" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_start_and_delay_move_a_family_and_change_nothing_else() -> None:
    recipe = {"name": "r", "engine": "abinit", "carriers": ["Fe"], "settings": SETTINGS}
    lattice = {"type": "bcc", "species": ["Fe"], "a": 2.83}
    parents = [{"scale": 1 + k / 100, "moments": [2.2]} for k in range(20)]
    families = [{"tag": tag, "lattice": lattice, "parents": parents} for tag in ("a", "b")]
    by_name = attrgetter("name")

    def jobs(**changes: float) -> list[Job]:
        data = {"name": "s", "seed": 0, "recipe": recipe, "families": [families[0], {**families[1], **changes}]}
        return list(expand(data).jobs)

    usual, late, early = ([job.name for job in jobs(**changes)] for changes in ({}, {"start": 0.5}, {"delay": 0.5}))
    assert {name[0] for name in usual[:5]} == {"a", "b"}
    assert all(name.startswith("b") for name in late[-10:])
    assert not any(name.startswith("b") for name in late[:9])
    assert all(name.startswith("a") for name in early[-9:])
    assert sorted(jobs(start=0.5, delay=0.5), key=by_name) == sorted(jobs(), key=by_name)


def test_splits_refuse_a_parent_in_two(tmp_path: Path) -> None:
    plan = Plan("test", COLLINEAR, (feal(),))
    with pytest.raises(LabelError, match="parent-feal"):
        write_splits(tmp_path / "splits.json", [plan], Splits(frozenset(), frozenset(), frozenset({"parent-feal"})))
    assert not (tmp_path / "splits.json").exists()


def test_splits_come_back_from_their_file(tmp_path: Path) -> None:
    """What the plans give joins what is given, in an order that depends on neither."""
    other = Splits(frozenset({"z"}), frozenset({"c"}), frozenset({"b", "a"}))
    splits = write_splits(tmp_path / "splits.json", [Plan("test", COLLINEAR, (feal(),))], other)
    assert splits == read_splits(tmp_path / "splits.json")
    assert splits == Splits(frozenset({"parent-feal", "z"}), other.valid, other.test)
    found = json.loads((tmp_path / "splits.json").read_text())
    assert found == {"train": ["parent-feal", "z"], "valid": ["c"], "test": ["a", "b"]}


# The data that is shipped


SYSTEMS = [path.parent for path in sorted(BENCHMARKS.glob("*/splits.json"))]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda path: path.name)
def test_shipped_labels_keep_contract_checksums_and_splits(system: Path) -> None:
    splits = read_splits(system / "splits.json")
    for name in check_checksums(system / "data"):
        frames = read_checked(system / "data" / name)
        assert {atoms.info["parent"] for atoms in frames} <= splits.train | splits.valid | splits.test
        names = [atoms.info["name"] for atoms in frames]
        assert len(names) == len(set(names))


def test_shipped_labels_answer_their_plans_and_no_finer_mesh() -> None:
    frames = read_checked(BENCHMARKS / "FeAl/data/abinit_collinear.extxyz")
    found = earlier_labels(read_plan(BENCHMARKS / "FeAl/plans/collinear.json"), frames)
    assert len(found) == len(frames)
    assert not earlier_labels(read_plan(BENCHMARKS / "FeAl/checks/mesh.json"), frames)


def test_shipped_plans_come_from_their_sampling() -> None:
    found = sorted(BENCHMARKS.glob("*/plans/*.sampling.json"))
    assert found
    for path in found:
        plan = read_plan(path.with_name(path.name.replace(".sampling", "")))
        again = read_sampling(path)
        assert [(job.name, job.split) for job in again.jobs] == [(job.name, job.split) for job in plan.jobs]
        for job, same in zip(plan.jobs, again.jobs, strict=True):
            assert np.allclose(job.atoms().positions, same.atoms().positions, atol=1e-6)
            assert job.symbols == same.symbols


def test_changed_label_file_is_noticed(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.extxyz", [labelled()])
    write_checksums(tmp_path)
    assert check_checksums(tmp_path) == ["a.extxyz"]
    (tmp_path / "a.extxyz").write_text((tmp_path / "a.extxyz").read_text().replace("2.2", "2.3"))
    with pytest.raises(LabelError, match=r"a\.extxyz.*does not match"):
        check_checksums(tmp_path)
    write_labels(tmp_path / "b.extxyz", [labelled()])
    with pytest.raises(LabelError):
        check_checksums(tmp_path)
    (tmp_path / "a.extxyz").unlink()
    with pytest.raises(LabelError, match="not there"):
        check_checksums(tmp_path)
