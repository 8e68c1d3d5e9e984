"""The ASE calculator: what ASE users do with it, and the faults of other magnetic calculators it must not have."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

from mmace.calculator import MMACECalculator, from_options
from mmace.derivatives import evaluate
from mmace.errors import (
    ConvergenceError,
    MMACEError,
    ModelFileError,
    MomentError,
    MomentRangeWarning,
    StructureError,
    UnknownElementError,
)
from mmace.graph import Graph
from mmace.io import save_model
from mmace.model import MagneticMACE

from .potentials import MOMENT_SCALE, graph_of, pair, random_model, triclinic

MODEL = random_model(energy_scale=0.5)


def with_calculator(atoms: Atoms, **options: object) -> Atoms:
    atoms.calc = MMACECalculator(MODEL, **options)  # type: ignore[arg-type]
    return atoms


def state_of(atoms: Atoms) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in atoms.arrays.items()} | {"cell": atoms.cell.array.copy()}


def test_results_are_the_potential() -> None:
    atoms = with_calculator(triclinic())
    exact = evaluate(MODEL, graph_of([atoms]), forces=True, stress=True, magnetic_forces=True)
    assert atoms.get_potential_energy() == pytest.approx(float(exact.energy), rel=1e-14)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    np.testing.assert_allclose(atoms.get_potential_energies().sum(), atoms.get_potential_energy())
    np.testing.assert_allclose(atoms.get_forces(), exact.forces)
    np.testing.assert_allclose(atoms.get_stress(), exact.stress[0])  # type: ignore[index]
    np.testing.assert_allclose(atoms.calc.get_property("magnetic_forces", atoms), exact.magnetic_forces)
    np.testing.assert_allclose(atoms.get_magnetic_moments(), atoms.get_initial_magnetic_moments())


def test_missing_moments_are_an_error_that_says_how_to_give_them() -> None:
    with pytest.raises(MomentError, match="set_initial_magnetic_moments"):
        with_calculator(Atoms("Fe", cell=[2.5] * 3, pbc=True)).get_potential_energy()


def test_scalar_moments_lie_along_z() -> None:
    scalar, vector = pair(), pair()
    scalar.set_array("initial_magmoms", None)
    scalar.set_initial_magnetic_moments([1.0, -2.0])
    vector.set_initial_magnetic_moments([[0, 0, 1.0], [0, 0, -2.0]])
    assert with_calculator(scalar).get_potential_energy() == with_calculator(vector).get_potential_energy()
    np.testing.assert_array_equal(scalar.calc.results["magmoms"], vector.get_initial_magnetic_moments())
    assert scalar.get_initial_magnetic_moments().shape == (2,)


def test_any_collinear_axis_will_do() -> None:
    energies = []
    for axis in ([0, 0, 1], [0.6, 0, -0.8]):
        atoms = pair()
        atoms.set_initial_magnetic_moments(np.outer([1.0, -2.0], axis))
        calculator = MMACECalculator(MODEL, soc=False, moments="magnitudes")
        energies.append(calculator.get_property("energy", atoms))
        reached = calculator.results["magmoms"]
        np.testing.assert_allclose(np.cross(reached, axis), 0.0, atol=1e-12)
    assert energies[0] == pytest.approx(energies[1], abs=1e-9)


def test_nothing_is_answered_from_a_stale_cache() -> None:
    atoms = with_calculator(pair())
    energies = [atoms.get_potential_energy()]
    moments = atoms.get_initial_magnetic_moments()
    moments[0] *= -1
    atoms.set_initial_magnetic_moments(moments)
    energies.append(atoms.get_potential_energy())
    atoms.set_cell(atoms.cell * 1.01)
    energies.append(atoms.get_potential_energy())
    atoms.positions[0, 0] += 0.01
    energies.append(atoms.get_potential_energy())
    atoms.symbols[0] = "Fe"
    energies.append(atoms.get_potential_energy())
    assert len(set(energies)) == 5
    fresh = with_calculator(atoms.copy()).get_potential_energy()
    assert energies[-1] == fresh
    spins = np.random.default_rng(0).normal(size=(2, 2, 3))
    first = atoms.calc.evaluate_spins(atoms, spins)["energy"]
    atoms.set_cell(atoms.cell * 1.01)
    assert np.all(np.abs(atoms.calc.evaluate_spins(atoms, spins)["energy"] - first) > 1e-6)


@pytest.mark.parametrize("moments", ["fixed", "magnitudes", "full"])
def test_the_callers_atoms_never_change_and_history_does_not_matter(moments: str) -> None:
    atoms = triclinic()
    before = state_of(atoms)
    calculator = MMACECalculator(MODEL, moments=moments)
    first = calculator.get_property("energy", atoms)
    calculator.get_property("forces", atoms)
    calculator.evaluate_spins(atoms, np.ones((1, 3, 3)) * [[[0.1], [0], [0.1]]])
    calculator.hessian(atoms, ["mm"])
    calculator.relax_moments([atoms], "magnitudes")
    after = state_of(atoms)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    other = pair()
    calculator.get_property("energy", other)
    assert calculator.get_property("energy", atoms) == first


def test_relaxed_moments_are_reached_and_reported() -> None:
    atoms = with_calculator(triclinic(), moments="full")
    fixed = MMACECalculator(MODEL)
    energy = atoms.get_potential_energy()
    assert energy < fixed.get_property("energy", triclinic())
    reached = triclinic()
    reached.set_initial_magnetic_moments(atoms.get_magnetic_moments())
    assert np.abs(fixed.get_property("magnetic_forces", reached)).max() <= 1e-6
    np.testing.assert_allclose(atoms.get_forces(), fixed.get_property("forces", reached), atol=1e-9)
    with pytest.raises(ConvergenceError, match="eV/µB"):
        MMACECalculator(MODEL, moments="full", tolerance=1e-30).get_property("energy", triclinic())


def test_relaxing_many_structures_at_once_equals_one_by_one() -> None:
    calculator = MMACECalculator(MODEL)
    images = [triclinic(), pair(), triclinic(3)]
    together = calculator.relax_moments(images, "magnitudes")
    for moments, atoms in zip(together, images, strict=True):
        np.testing.assert_allclose(moments, calculator.relax_moments([atoms], "magnitudes")[0], atol=1e-6)


@pytest.mark.parametrize("mode", ["magnitudes", "full"])
def test_relaxed_second_derivatives_are_those_of_the_relaxed_energy(mode: str) -> None:
    """Differences of forces with moments relaxed at each point, less those at fixed moments: the part that follows."""
    atoms = triclinic()
    follows = MMACECalculator(random_model(energy_scale=2.0), moments=mode, tolerance=1e-10)
    atoms.set_initial_magnetic_moments(follows.relax_moments([atoms], mode)[0])
    found = follows.hessian(atoms, ["rr", "rr_relaxed", "ee", "ee_relaxed", "er_relaxed"])
    step = 1e-3
    numeric = {}
    for name, calculator in (("relaxed", follows), ("fixed", follows.replace(moments="fixed"))):

        def slope(d: float, calculator: MMACECalculator = calculator) -> np.ndarray:
            moved = atoms.copy()
            moved.positions[0, 0] += d
            return -calculator.get_property("forces", moved)

        numeric[name] = (8 * (slope(step) - slope(-step)) - slope(2 * step) + slope(-2 * step)) / (12 * step)
    response = (found["rr_relaxed"] - found["rr"])[..., 0, 0]
    assert np.abs(response).max() > 1e-4
    np.testing.assert_allclose(response, numeric["relaxed"] - numeric["fixed"], atol=2e-3 * np.abs(response).max())
    assert np.linalg.eigvalsh(found["ee"] - found["ee_relaxed"])[0] > -1e-9
    assert found["er_relaxed"].shape == (6, 3, 3)


def test_hessian_options() -> None:
    calculator = MMACECalculator(MODEL)
    with pytest.raises(MMACEError, match="rr_relaxed needs moments that follow"):
        calculator.hessian(triclinic(), ["rr_relaxed"])
    assert calculator.hessian(triclinic(), ["mm"], rows=[1])["mm"].shape == (1, 3, 3, 3)
    with pytest.raises(MMACEError, match="atoms 0 to 2"):
        calculator.hessian(triclinic(), ["mm"], rows=[3])
    with pytest.raises(MMACEError, match="needs the rows of all atoms"):
        calculator.replace(moments="full").hessian(triclinic(), ["rr_relaxed"], rows=[0])
    with pytest.raises(MMACEError, match="block xy"):
        calculator.hessian(triclinic(), ["xy"])


def test_moments_out_of_range_warn_and_keep_a_restoring_force() -> None:
    atoms = pair()
    atoms.set_initial_magnetic_moments([[0, 0, 1.5 * MOMENT_SCALE["Cr"]], [0, 0, 1.0]])
    with pytest.warns(MomentRangeWarning, match=r"atom 0 \(Cr\), 4\.65 µB, is beyond the trained range of 3\.10"):
        with_calculator(atoms).get_potential_energy()
    with pytest.warns(MomentRangeWarning):
        assert atoms.calc.get_property("magnetic_forces", atoms)[0, 2] < -0.1
    aluminium = triclinic()
    aluminium.set_initial_magnetic_moments(np.full((3, 3), 0.3))
    with pytest.warns(MomentRangeWarning, match=r"atom 1 \(Al\) .* carries none"):
        with_calculator(aluminium).get_potential_energy()


def test_clear_errors() -> None:
    nickel = bulk("Ni")
    with pytest.raises(UnknownElementError, match=r"element Ni .* trained on Al, Cr, Fe"):
        with_calculator(nickel).get_potential_energy()
    overlapping = pair()
    overlapping.positions[1] = overlapping.positions[0] + 0.1
    with pytest.raises(StructureError, match="overlap"):
        with_calculator(overlapping).get_potential_energy()
    for bad, error in ((np.nan, MomentError), (np.inf, MomentError)):
        atoms = pair()
        atoms.set_initial_magnetic_moments([[0, 0, bad], [0, 0, 1]])
        with pytest.raises(error, match="not finite"):
            with_calculator(atoms).get_potential_energy()
    flat = pair()
    flat.cell[2] = 0
    with pytest.raises(StructureError, match="cell"):
        with_calculator(flat).get_potential_energy()
    slab = Atoms("Fe", cell=[[3, 0, 0], [6, 0, 0], [0, 0, 9]], pbc=[True, True, False])
    with pytest.raises(StructureError, match="the cell has no volume: set independent cell vectors"):
        with_calculator(slab).get_potential_energy()
    nowhere = pair()
    nowhere.positions[1, 1] = np.nan
    with pytest.raises(StructureError, match="atom 1 is not finite"):
        with_calculator(nowhere).get_potential_energy()
    with pytest.raises(StructureError, match="no atoms"):
        with_calculator(Atoms()).get_potential_energy()
    with pytest.raises(MomentError, match=r"\(B, N, 3\)"):
        MMACECalculator(MODEL).evaluate_spins(pair(), np.ones((2, 3)))
    with pytest.raises(MomentError, match=r"2 atoms need \(2, 3\)"):
        MMACECalculator(MODEL).evaluate_spins(pair(), np.ones((1, 3, 3)))
    molecule = Atoms("Fe2", positions=[[0, 0, 0], [0, 0, 2.2]], magmoms=[1, 1])
    with_calculator(molecule).get_forces()
    with pytest.raises(StructureError, match="periodic"):
        molecule.get_stress()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "float16"}, "no dtype float16"),
        ({"moments": "sideways"}, "no moment mode sideways"),
        ({"device": "abacus"}, "device abacus cannot be used"),
    ],
)
def test_wrong_options(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(MMACEError, match=sentence):
        MMACECalculator(MODEL, **options)  # type: ignore[arg-type]


def test_wrong_models(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no model nothing"):
        MMACECalculator("nothing")
    with pytest.raises(MMACEError, match="differ in elements or cut-off"):
        MMACECalculator([MODEL, random_model(cutoff=3.0)])
    with pytest.raises(MMACEError, match="no members"):
        MMACECalculator([])
    with pytest.raises(MMACEError, match="dtype cannot be replaced"):
        MMACECalculator(MODEL).replace(dtype="float32")


def test_options_do_not_change_under_results_that_are_kept() -> None:
    calculator = MMACECalculator(MODEL, soc=False)
    with pytest.raises(MMACEError, match="soc cannot be set on this calculator"):
        calculator.set(soc=True)
    for name, value in (("soc", True), ("moments", "full")):
        with pytest.raises(AttributeError):
            setattr(calculator, name, value)
    assert calculator.set() == {}


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        ([[0, 0, 20], [2.87, 0, 0], [0, 2.87, 0]], [False, True, True]),
        ([[2.87, 0, 0], [0, 0, 2.87], [0, 20, 0]], [True, True, False]),
        ([[0, 0, 4.4], [0, 0, 0], [0, 0, 0]], [True, False, False]),
        ([[2.87, 0, 0], [0.4, 2.87, 0], [1.0, 0.5, 9.0]], [True, True, False]),
    ],
)
def test_partly_periodic_structures_have_the_neighbours_ase_finds(cell: list[list[float]], pbc: list[bool]) -> None:
    """Whichever cell vector stands across the slab or along the chain, and wherever the atoms are."""
    atoms = Atoms("Fe2", cell=cell, positions=[[0, 0, 0], [1.4, 1.3, -1.45]], pbc=pbc, magmoms=[1.0, -0.5])
    atoms.positions += [30.0, -40.0, 50.0]
    graph = Graph.from_atoms(atoms, MODEL.elements, MODEL.config.cutoff)
    found = np.column_stack([graph.receiver, graph.sender, graph.unit_shifts]).astype(int)
    expected = np.column_stack(neighbor_list("ijS", atoms, MODEL.config.cutoff))
    assert len(found) > 2
    assert sorted(found.tolist()) == sorted(expected.tolist())
    assert np.isfinite(with_calculator(atoms).get_forces()).all()


def test_spin_orbit_coupling_is_not_asked_of_a_model_without_it() -> None:
    for switch in ("spin_orbit", "magnetic"):
        plain = random_model(**{switch: False})
        with pytest.raises(MMACEError, match="trained without spin-orbit coupling: use soc=False"):
            MMACECalculator(plain)
        MMACECalculator(plain, soc=False).get_property("energy", pair())


def test_replace_shares_weights_and_leaves_the_first_alone() -> None:
    first = MMACECalculator(MODEL)
    second = first.replace(soc=False, moments="magnitudes")
    assert (first.soc, first.moments, second.soc, second.moments) == (True, "fixed", False, "magnitudes")
    assert second.models[0] is first.models[0]
    single = MMACECalculator(MODEL, dtype="float32")
    assert MODEL.dtype == torch.float64
    assert single.get_property("energy", pair()) == pytest.approx(first.get_property("energy", pair()), abs=1e-4)


def test_committee_gives_mean_spread_and_members(tmp_path: Path) -> None:
    models = [random_model(seed, energy_scale=0.5) for seed in range(3)]
    calculator = MMACECalculator(models)
    parts = [member.get_property("forces", pair()) for member in calculator.members]
    np.testing.assert_allclose(calculator.get_property("forces", pair()), np.mean(parts, axis=0))
    np.testing.assert_allclose(calculator.results["forces_std"], np.std(parts, axis=0, ddof=1))
    assert calculator.results["energy_std"] > 0
    spins = np.random.default_rng(0).normal(size=(3, 2, 3))
    np.testing.assert_allclose(
        calculator.evaluate_spins(pair(), spins)["energy"],
        np.mean([m.evaluate_spins(pair(), spins)["energy"] for m in calculator.members], axis=0),
    )
    relaxed = calculator.replace(moments="full")
    reached = pair()
    reached.set_initial_magnetic_moments(relaxed.relax_moments([pair()], "full")[0])
    assert np.abs(calculator.get_property("magnetic_forces", reached)).max() <= 1e-6
    for k, model in enumerate(models):
        save_model(model, tmp_path / f"{k}.safetensors")
    (tmp_path / "three.json").write_text('{"members": ["0.safetensors", "1.safetensors", "2.safetensors"]}')
    loaded = from_options(model=str(tmp_path / "three.json"))
    assert loaded.get_property("energy", pair()) == calculator.get_property("energy", pair())
    provenance = loaded.provenance()
    assert provenance["members"] == 3
    assert len(str(provenance["hash"])) == 64
    assert provenance["name"] == "three.json"
    assert all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in provenance.values())
    assert len(MMACECalculator(tmp_path / "three.json", committee=False).models) == 1


def test_structure_optimisation_with_cell() -> None:
    atoms = with_calculator(pair(), moments="magnitudes")
    start = atoms.get_potential_energy()
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.05, steps=15)
    assert atoms.get_potential_energy() < start


def test_molecular_dynamics_conserves_energy() -> None:
    atoms = with_calculator(triclinic().repeat((1, 2, 1)))
    MaxwellBoltzmannDistribution(atoms, temperature_K=100, rng=np.random.default_rng(0))
    dynamics = VelocityVerlet(atoms, timestep=0.5 * units.fs)
    totals = []
    dynamics.attach(lambda: totals.append(atoms.get_total_energy()))
    dynamics.run(40)
    kinetic = atoms.get_kinetic_energy()
    assert kinetic > 0
    assert np.ptp(totals) < 0.02 * max(kinetic, 0.1)


def test_phonopy_displacements_keep_their_moments() -> None:
    atoms = triclinic()
    moments = atoms.get_initial_magnetic_moments()
    cell = PhonopyAtoms(
        symbols=atoms.get_chemical_symbols(),
        cell=atoms.cell.array,
        scaled_positions=atoms.get_scaled_positions(),
        magnetic_moments=moments,
    )
    phonon = Phonopy(cell, supercell_matrix=[2, 1, 1], primitive_matrix="P", log_level=0)
    phonon.generate_displacements(distance=1e-3, is_plusminus=True)
    calculator = MMACECalculator(MODEL)
    forces = []
    for displaced in phonon.supercells_with_displacements:
        image = Atoms(displaced.symbols, positions=displaced.positions, cell=displaced.cell, pbc=True)
        image.set_initial_magnetic_moments(displaced.magnetic_moments)
        forces.append(calculator.get_property("forces", image))
    phonon.forces = forces
    phonon.produce_force_constants()
    supercell = Atoms(
        phonon.supercell.symbols, positions=phonon.supercell.positions, cell=phonon.supercell.cell, pbc=True
    )
    supercell.set_initial_magnetic_moments(phonon.supercell.magnetic_moments)
    exact = calculator.hessian(supercell, ["rr"])["rr"].transpose(0, 2, 1, 3)
    np.testing.assert_allclose(phonon.force_constants, exact, atol=1e-4 * np.abs(exact).max())


def test_moments_survive_the_formats_that_carry_them(tmp_path: Path) -> None:
    atoms = with_calculator(triclinic())
    energy = atoms.get_potential_energy()
    for name in ("a.extxyz", "a.traj", "a.json"):
        write(tmp_path / name, atoms)
        back = read(tmp_path / name)
        back.calc = MMACECalculator(MODEL)
        assert back.get_potential_energy() == pytest.approx(energy, abs=1e-6), name


def test_no_warning_within_range() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_calculator(triclinic()).get_forces()


def test_default_moments_name_carriers() -> None:
    assert MMACECalculator(MODEL).default_moments == {"Al": 0.0, "Cr": 1.55, "Fe": 1.7}
    assert MMACECalculator(MODEL).reach == pytest.approx(16.0)
    assert isinstance(MMACECalculator(MODEL).models[0], MagneticMACE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu() -> None:
    there = MMACECalculator(MODEL, device="cuda", moments="magnitudes")
    here = MMACECalculator(MODEL, moments="magnitudes")
    assert there.get_property("energy", triclinic()) == pytest.approx(
        here.get_property("energy", triclinic()), abs=1e-8
    )
