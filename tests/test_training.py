"""Training: constants from the labels, loss, masks, exact resume, evaluation, command line."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.units import GPa

from mmace.cli import main
from mmace.data import composition, fingerprint, label_from_atoms, read_labels
from mmace.derivatives import Evaluation, evaluate
from mmace.errors import LabelError, MMACEError, ModelFileError, StructureError
from mmace.graph import Graph
from mmace.io import load_model, model_files, save_model
from mmace.locks import sole_use
from mmace.model import MagneticMACE, ModelConfig
from mmace.training import (
    Recipe,
    RecipeError,
    Tolerances,
    errors_of,
    initial_model,
    mean_prediction,
    predict,
    read_recipe,
    report,
    spread_calibration,
    train,
)
from mmace.training.batches import DirectionBatch, LabelBatch, ground_energies
from mmace.training.checkpoint import read_checkpoint
from mmace.training.evaluate import _binned_ratios
from mmace.training.loop import Start, _redrawn
from mmace.training.loss import direction_loss, label_loss
from mmace.training.restraint import floor_energies
from mmace.training.setup import reference_energies

SMALL = {"channels": 4, "max_ell": 2, "correlation": 2, "num_bessel": 4, "radial_mlp": (8,), "cutoff": 3.5}
TOLERANCES = Tolerances()
REFERENCE = {"Al": -50.0, "Fe": -600.0}


def recipe(**settings):
    defaults = {"epochs": 4, "batch_size": 4, "groups_per_step": 2, "validate_every": 1, "warmup_steps": 2}
    return Recipe(**{**defaults, "model": SMALL, **settings})


@pytest.fixture(scope="module")
def teacher():
    """A random potential whose energies, derivatives and anisotropies are the labels."""
    torch.manual_seed(5)
    config = ModelConfig(
        elements=("Al", "Fe"),
        moment_scale={"Al": 1.0, "Fe": 3.0},
        carriers=("Fe",),
        atomic_energies=REFERENCE,
        energy_scale=2.0,
        avg_num_neighbors=6.0,
        num_chebyshev=2,
        spin_orbit_scale=0.05,
        **SMALL,
    )
    model = MagneticMACE(config).requires_grad_(False)
    model.one_body.weight[1] = torch.tensor([0.2, -0.05])
    return model


def structures(rng, count):
    """Distorted cells with one to three atoms, non-collinear moments on iron."""
    cells = [
        Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[2.9, 2.9, 2.9], pbc=True),
        bulk("Fe", "bcc", a=2.85),
        Atoms("Fe2Al", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.3], [0, 0, 0.6]], cell=[2.9, 2.9, 5.2], pbc=True),
    ]
    for k in range(count):
        atoms = cells[k % 3].copy()
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.uniform(-0.04, 0.04, (3, 3))), scale_atoms=True)
        atoms.positions += rng.uniform(-0.08, 0.08, atoms.positions.shape)
        moments = rng.uniform(-1.3, 1.3, (len(atoms), 3))
        moments[atoms.numbers == 13] = 0.0
        atoms.set_initial_magnetic_moments(None)
        atoms.set_initial_magnetic_moments(moments)
        yield atoms


def label_frames(model, seed, count, parent):
    rng = np.random.default_rng(seed)
    for k, atoms in enumerate(structures(rng, count)):
        graph = Graph.from_atoms(atoms, model.elements, model.config.cutoff)
        result = evaluate(model, graph, forces=True, stress=True, magnetic_forces=True)
        atoms.calc = SinglePointCalculator(
            atoms, energy=float(result.energy), forces=result.forces.numpy(), stress=result.stress[0].numpy()
        )
        atoms.arrays["magnetic_forces"] = result.magnetic_forces.numpy()
        atoms.arrays["magnetic_forces"][atoms.numbers == 13] = np.nan
        atoms.info.update({"soc": 0, "parent": parent, "name": f"{parent}-{k}"})
        yield atoms


def direction_frames(model, seed, count, parent, directions=5):
    rng = np.random.default_rng(seed)
    for k, atoms in enumerate(structures(rng, count)):
        graph = Graph.from_atoms(atoms, model.elements, model.config.cutoff, soc=1.0)
        size = np.where(atoms.numbers == 26, 1.8, 0.0)
        for d in range(directions):
            axis = rng.normal(size=3)
            moments = np.outer(size, axis / np.linalg.norm(axis))
            frame = atoms.copy()
            frame.set_initial_magnetic_moments(moments)
            energy = evaluate(model, graph.with_moments(torch.tensor(moments))).energy
            frame.calc = SinglePointCalculator(frame, energy=float(energy) + 77.7)
            group = f"{parent}-group-{k}"
            frame.info.update({"soc": 1, "parent": parent, "name": f"{group}-{d}", "anisotropy_group": group})
            yield frame


@pytest.fixture(scope="module")
def files(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("labels")
    write(folder / "train.extxyz", [*label_frames(teacher, 0, 9, "a"), *direction_frames(teacher, 1, 3, "a")])
    write(folder / "valid.extxyz", [*label_frames(teacher, 2, 4, "v"), *direction_frames(teacher, 3, 2, "v", 4)])
    write(folder / "test.extxyz", [*label_frames(teacher, 4, 3, "t"), *direction_frames(teacher, 6, 1, "t")])
    return folder


@pytest.fixture(scope="module")
def labels(files):
    return {part: read_labels(files / f"{part}.extxyz") for part in ("train", "valid", "test")}


def batch_of(labels, model, tolerances=TOLERANCES):
    return LabelBatch.collate([LabelBatch.of(x, model, tolerances) for x in labels if x.anisotropy_group is None])


def directions_of(labels, model, tolerances=TOLERANCES):
    groups = {x.anisotropy_group for x in labels} - {None}
    members = [[x for x in labels if x.anisotropy_group == group] for group in sorted(groups)]
    return DirectionBatch.collate([DirectionBatch.of(group, model, tolerances) for group in members])


# Loss


def test_a_perfect_model_has_no_loss_and_signs_matter(teacher, labels):
    single = [x for x in labels["train"] if x.anisotropy_group is None]
    loss = label_loss(teacher, batch_of(single, teacher), TOLERANCES)
    assert float(loss.total().detach()) < 1e-8
    for quantity in ("forces", "stress", "magnetic_forces"):
        flipped = [replace(x, **{quantity: -getattr(x, quantity)}) for x in single]
        loss = label_loss(teacher, batch_of(flipped, teacher), TOLERANCES)
        assert float(getattr(loss, quantity).detach()) > 1.0
        assert float((loss.total() - getattr(loss, quantity)).detach()) < 1e-8
    perfect = direction_loss(teacher, directions_of(labels["train"], teacher), TOLERANCES)
    assert float(perfect.total()) < 1e-8
    backwards = [replace(x, energy=-x.energy) for x in labels["train"]]
    assert float(direction_loss(teacher, directions_of(backwards, teacher), TOLERANCES).anisotropy.detach()) > 1.0


def test_missing_labels_carry_no_weight(teacher, labels):
    torch.manual_seed(1)
    model = MagneticMACE(teacher.config)
    label = next(x for x in labels["train"] if len(x) == 3)
    whole = label_loss(model, batch_of([label], model), TOLERANCES)
    nothing = {
        "energy": np.nan,
        "forces": np.full((3, 3), np.nan),
        "stress": np.full(6, np.nan),
        "magnetic_forces": np.full((3, 3), np.nan),
    }
    for quantity in nothing:
        part = replace(label, **{k: v for k, v in nothing.items() if k != quantity})
        loss = label_loss(model, batch_of([part], model), TOLERANCES)
        assert float(loss.total().detach()) == pytest.approx(float(getattr(whole, quantity).detach()), rel=1e-12)
    empty = label_loss(model, batch_of([replace(label, **nothing)], model), TOLERANCES).total()
    empty.backward()
    assert float(empty.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    together = label_loss(model, batch_of([label, replace(label, **nothing)], model), TOLERANCES)
    assert float(together.total().detach()) == pytest.approx(float(whole.total().detach()), rel=1e-12)


def test_groups_of_different_length_weigh_what_they_weigh_alone(teacher, labels):
    torch.manual_seed(1)
    model = MagneticMACE(teacher.config)
    groups = [[x for x in labels[part] if x.anisotropy_group is not None] for part in ("train", "valid")]
    alone = [float(direction_loss(model, directions_of(group, model), TOLERANCES).anisotropy) for group in groups]
    assert min(alone) > 0
    together = direction_loss(model, directions_of([*groups[0], *groups[1]], model), TOLERANCES)
    assert float(together.anisotropy) == pytest.approx(sum(alone), rel=1e-10)
    shifted = [replace(x, energy=x.energy + 3.0) for x in groups[0]]
    assert float(direction_loss(model, directions_of(shifted, model), TOLERANCES).anisotropy) == pytest.approx(
        alone[0], rel=1e-6
    )


def test_transverse_magnetic_forces_weigh_less(teacher, labels):
    label = next(x for x in labels["train"] if x.symbols == ("Fe",))
    axis = label.moments / np.linalg.norm(label.moments)
    across = np.cross(axis, [0.0, 0.0, 1.0])
    losses = [
        float(
            label_loss(
                teacher, batch_of([replace(label, magnetic_forces=label.magnetic_forces + error)], teacher), TOLERANCES
            ).magnetic_forces
        )
        for error in (1e-3 * axis, 1e-3 * across / np.linalg.norm(across))
    ]
    assert losses[1] == pytest.approx(TOLERANCES.transverse**2 * losses[0], rel=0.05)


def test_what_is_not_known_of_a_magnetic_force_does_not_enter(teacher, labels):
    """A component that is NaN changes neither the others' tolerances to NaN nor their error along the moment."""
    label = next(x for x in labels["train"] if x.symbols == ("Fe",))
    length = float(np.linalg.norm(label.moments))
    known = replace(label, moments=np.array([[0.0, 0.0, length]]))
    exact = evaluate(teacher, batch_of([known], teacher).graph, magnetic_forces=True).magnetic_forces.numpy()
    partly = exact + np.array([[np.nan, np.nan, 0.0]])
    assert np.isfinite(partly).sum() == 1
    exactly, wrong = (
        label_loss(teacher, batch_of([replace(known, magnetic_forces=partly + error)], teacher), TOLERANCES)
        for error in (0.0, 0.01)
    )
    assert float(exactly.magnetic_forces) == pytest.approx(0.0, abs=1e-10)
    assert float(wrong.magnetic_forces) > 1e-3


def test_tolerances_grow_above_the_ground_of_a_composition(teacher, labels):
    """Every error counts 1 + a ΔE times less; ΔE, per atom, is from the lowest label of the composition, not of all."""
    usable = [x for x in labels["train"] if x.symbols == ("Fe", "Fe", "Al") and not x.soc]
    low, *_, high = sorted(usable, key=lambda x: x.energy)
    doubled = replace(low, symbols=low.symbols * 2, energy=2 * low.energy - 6.0)
    ground = ground_energies([low, high, replace(high, symbols=("Fe", "Al", "Al"), energy=low.energy - 3.0)])
    assert sorted(ground.values()) == pytest.approx([(low.energy - 3.0) / 3, low.energy / 3])
    assert min(ground_energies([low, doubled]).values()) == pytest.approx(low.energy / 3 - 1.0)
    excess = (high.energy - low.energy) / 3
    assert excess > 0.05
    tolerances = Tolerances(relative=0.0, above_ground=5.0, outlier=1e6)
    wrong = replace(
        high,
        energy=high.energy + 0.01,
        forces=high.forces + 0.1,
        stress=high.stress + 0.01,
        magnetic_forces=high.magnetic_forces + 0.05,
    )
    plain, grown = (
        label_loss(teacher, LabelBatch.of(wrong, teacher, tolerances, given), tolerances) for given in (None, ground)
    )
    factor = (1 + 5.0 * (excess + 0.01 / 3)) ** 2
    for name in ("energy", "forces", "stress", "magnetic_forces"):
        assert getattr(plain, name).item() > 0.1
        assert getattr(plain, name).item() == pytest.approx(factor * getattr(grown, name).item(), rel=1e-3), name


def test_gradients_along_the_moment_alone(teacher, labels, tmp_path):
    """Where −dE/d|m| is all that is known it is fitted with its sign, and nothing across the moment is."""
    whole = next(x for x in labels["train"] if x.symbols == ("Fe", "Fe", "Al"))
    axis = whole.moments[0] / np.linalg.norm(whole.moments[0])
    unknown = np.full(2, np.nan)
    parallel = np.array([whole.magnetic_forces[0] @ axis, *unknown])
    assert abs(parallel[0]) > 0.01
    alone = replace(whole, magnetic_forces=np.full((3, 3), np.nan), magnetic_forces_parallel=parallel)

    def loss(label, model=teacher):
        return float(label_loss(model, batch_of([label], model), TOLERANCES).magnetic_forces)

    assert loss(alone) < 1e-8
    tolerance = TOLERANCES.magnetic_forces + TOLERANCES.relative * abs(parallel[0])
    flipped = loss(replace(alone, magnetic_forces_parallel=-parallel))
    assert flipped == pytest.approx((2 * parallel[0] / tolerance) ** 2 / 3, rel=0.05)
    torch.manual_seed(1)
    other = MagneticMACE(teacher.config)
    predicted = predict(other, [alone])[0].magnetic_forces[0]
    assert np.linalg.norm(predicted - (predicted @ axis) * axis) > 1e-3
    assert loss(replace(alone, magnetic_forces_parallel=np.array([predicted @ axis, *unknown])), other) < 1e-8
    off = replace(alone, magnetic_forces_parallel=parallel + 0.01)
    assert errors_of([off], predict(teacher, [off])).magnetic_forces_along_rmse_meV_per_muB == pytest.approx(10.0)
    assert errors_of([off], predict(teacher, [off])).magnetic_forces_rmse_meV_per_muB is None
    assert fingerprint([off]) != fingerprint([alone])

    atoms = alone.atoms()
    atoms.arrays["magnetic_forces_parallel"] = parallel
    atoms.calc = SinglePointCalculator(atoms, energy=1.0)
    write(tmp_path / "one.extxyz", atoms)
    assert read_labels(tmp_path / "one.extxyz")[0].magnetic_forces_parallel == pytest.approx(parallel, nan_ok=True)


def test_every_parameter_gets_gradient_and_soc_free_labels_leave_spin_orbit_alone(labels):
    model = initial_model(labels["train"], recipe(model={**SMALL, "correlation": 3, "num_layers": 3}), seed=0)
    label_loss(model, batch_of(labels["train"], model), TOLERANCES).total().backward()
    spin_orbit = [p for name, p in model.named_parameters() if ".spin_orbit." in name]
    assert spin_orbit
    assert all(p.grad is None or not p.grad.any() for p in spin_orbit)
    direction_loss(model, directions_of(labels["train"], model), TOLERANCES).total().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    al = model.elements.index("Al")
    assert not model.one_body.weight.grad[al].any()


def test_restraint_asks_for_rising_energies_beyond_the_labels_only(teacher, labels):
    from mmace.training.restraint import make_probe, restraint_loss

    batch = batch_of(labels["train"], teacher)
    batch = LabelBatch.collate([batch, batch, batch])
    probe = make_probe(teacher, batch, torch.Generator().manual_seed(0))
    again = make_probe(teacher, batch, torch.Generator().manual_seed(0))
    assert torch.equal(probe.batch.graph.moments, again.batch.graph.moments)
    graph, old = probe.batch.graph, batch.graph
    stretched, expanded = probe.stretched.bool(), probe.expanded.bool()
    assert stretched.any()
    assert expanded.any()
    assert torch.equal(graph.moments[~stretched], old.moments[~stretched])
    assert (graph.moments[stretched].norm(dim=1) >= (3.0 - 0.1) / 1.2 - 1e-12).all()
    assert not stretched[graph.species == teacher.elements.index("Al")].any()
    assert (graph.volume[expanded] > old.volume[expanded]).all()
    assert torch.equal(graph.cell[~expanded], old.cell[~expanded])
    assert (batch.stress.value[expanded, :3].sum(1) > 0).all()

    quiet = MagneticMACE(teacher.config)
    with torch.no_grad():
        for readout in quiet.readouts.parameters():
            readout.zero_()
        quiet.one_body.weight[1] = torch.tensor([-5.0, 0.0])  # E1 = 10 |m|²/M_z²
    assert float(restraint_loss(quiet, probe).detach()) == 0.0
    with torch.no_grad():
        quiet.one_body.weight[1] *= -1.0
    assert float(restraint_loss(quiet, probe).detach()) > 1.0


def test_shaken_crystals_lie_above_the_ground_energy_and_the_floor_is_one_sided(teacher, labels):
    from mmace.training.restraint import Crystal, ShakenCell, crystals_to_shake, floor_loss, shake, walk_downhill

    def stiffness(kind):
        return 2.0 if kind == composition(["Fe"]) else 0.5

    def weight(kind):
        return 2 * stiffness(kind)

    ground = floor_energies(labels["train"], stiffness)
    crystals = crystals_to_shake(labels["train"], stiffness, weight)
    molecule = replace(next(x for x in labels["train"] if x.anisotropy_group is None), pbc=(False, False, False))
    assert crystals_to_shake([molecule], stiffness, weight) == []
    quiet = [x for x in labels["train"] if x.anisotropy_group is None and not (np.abs(x.forces) > 0.5).any()]
    assert len(crystals) == len(quiet) > 0
    pushed = replace(quiet[0], forces=np.full((len(quiet[0]), 3), 0.6))
    assert crystals_to_shake([pushed], stiffness, weight) == []
    kinds = [composition(x.symbols) for x in quiet]
    assert [(c.ground, c.stiffness, c.weight) for c in crystals] == [
        (ground[kind], stiffness(kind), weight(kind)) for kind in kinds
    ]
    assert {c.stiffness for c in crystals} == {0.5, 2.0}

    def drawn(seed=3):
        rng = np.random.default_rng(seed)
        return [shake(c, teacher, rng) for c in crystals]

    harmonics = []
    for crystal, cell in zip(crystals * 20, [cell for seed in range(20) for cell in drawn(seed)], strict=True):
        assert 4 <= len(cell.atoms) <= 8
        cells, rest = divmod(len(cell.atoms), len(crystal.atoms))
        assert rest == 0
        scale = (cell.atoms.get_volume() / (cells * crystal.atoms.get_volume())) ** (1 / 3)
        inside = np.linalg.solve(scale * crystal.atoms.cell.array.T, (cell.sites - cell.sites[0]).T).T
        own = np.linalg.solve(crystal.atoms.cell.array.T, (crystal.atoms.positions - crystal.atoms.positions[0]).T).T
        apart = inside[:, None] - own
        same = (np.abs(apart - apart.round()).max(2) < 1e-9) & (cell.atoms.numbers[:, None] == crystal.atoms.numbers)
        assert (same.sum(0) == cells).all()
        moved = cell.atoms.positions - cell.sites
        assert moved.mean(0) == pytest.approx(np.zeros(3), abs=1e-12)
        assert np.linalg.norm(moved, axis=1).max() < 0.5 * 3.5 * 1.2 ** (1 / 3)
        harmonics.append(0.5 * crystal.stiffness * (moved**2).sum(1).mean())
        assert cell.floor() == pytest.approx(crystal.ground + min(harmonics[-1], 0.15))
    assert min(harmonics) < 0.15 < max(harmonics)
    assert all(a.atoms == b.atoms for a, b in zip(drawn(), drawn(), strict=True))
    graphs = [Graph.from_atoms(c.atoms, teacher.elements, 3.5) for s in range(20) for c in drawn(s)]
    distances = [float(g.edge_vectors(g.positions).norm(dim=1).min()) for g in graphs]
    assert 0.7 < min(distances) < 1.5
    assert max(distances) > 2.2

    cells = drawn()
    lower = walk_downhill(teacher, cells, 1)

    def energies(some):
        graph = Graph.collate([Graph.from_atoms(c.atoms, teacher.elements, teacher.config.cutoff) for c in some])
        return (graph.per_structure(teacher.site_energies(graph))[0] / graph.counts).detach().numpy()

    beside = Atoms("FeAl", positions=[[0, 0, 0], [0, 0, 0.55]], cell=[9.0] * 3, pbc=True, magmoms=[0.0, 0.0])
    crystal = Crystal(beside, 0.0, 0.0)
    near = ShakenCell(
        beside, beside.positions, crystal, Graph.from_atoms(beside, teacher.elements, teacher.config.cutoff)
    )
    with pytest.raises(StructureError, match="overlap"):
        near.moved(np.array([[0, 0, 0.1], [0, 0, -0.1]]), teacher)

    steps = [
        np.linalg.norm(a.atoms.positions - b.atoms.positions, axis=1).max() for a, b in zip(lower, cells, strict=True)
    ]
    assert {round(step, 6) for step in steps} <= {0.0, 0.15}
    assert np.mean(energies(lower) < energies(cells)) > 0.5

    def margins(some):
        return energies(some) - [cell.floor() for cell in some]

    path = [walk_downhill(teacher, cells, count) for count in range(6)]
    assert path[0] == cells
    for alone, together in zip([walk_downhill(teacher, [cell], 5)[0] for cell in cells], path[5], strict=True):
        assert alone.atoms.positions == pytest.approx(together.atoms.positions, abs=1e-7)
    assert (np.diff([margins(some) for some in path], axis=0) <= 1e-12).all()
    assert np.mean(margins(path[5]) < margins(path[1])) > 0.5

    def loss_at(offset):
        same = [replace(cell, crystal=crystal) for cell in cells]
        config = replace(teacher.config, pair_repulsion=False, atomic_energies={"Fe": offset, "Al": offset})
        flat = MagneticMACE(config)
        with torch.no_grad():
            for parameter in flat.parameters():
                parameter.zero_()
            flat.one_body.wall = 0.0
        return float(floor_loss(flat, same).detach())

    assert loss_at(0.01) == 0.0
    assert loss_at(-0.02) == pytest.approx(2 * 5.0**2 * (np.sqrt(1 + 1 / 5.0**2) - 1))


def test_shaken_supercells_double_the_crystal_in_every_way(teacher):
    from mmace.training.restraint import Crystal, shake

    primitive = bulk("Fe", "fcc", a=3.6)
    primitive.set_initial_magnetic_moments([[0.1, 0.2, 0.3]])
    rng = np.random.default_rng(0)
    lattices: dict[int, list[np.ndarray]] = {}
    for _ in range(400):
        atoms = shake(Crystal(primitive, 0.0, 0.5), teacher, rng).atoms
        moments = atoms.get_initial_magnetic_moments()
        assert len({tuple(m) for m in moments}) == len(atoms) or (moments == [0.1, 0.2, 0.3]).all()
        scale = (atoms.get_volume() / len(atoms) / primitive.get_volume()) ** (1 / 3)
        cell = atoms.cell.array / scale @ np.linalg.inv(primitive.cell.array)
        assert cell == pytest.approx(cell.round(), abs=1e-9)
        doubled = 2 * np.linalg.inv(cell)
        assert doubled == pytest.approx(doubled.round(), abs=1e-9)
        found = lattices.setdefault(len(atoms), [])
        change = [other @ np.linalg.inv(cell) for other in found]
        if not any(np.allclose(c, c.round()) for c in change):
            found.append(cell)
    # Sublattices that hold twice the lattice: one for each pair of boundary waves that are there together, 7 of them.
    assert {count: len(found) for count, found in lattices.items()} == {4: 7, 8: 1}


@pytest.mark.parametrize(("atoms", "allowed"), [(1, {4, 8}), (2, {4, 8}), (3, {6}), (4, {4, 8}), (7, {7}), (9, {9})])
def test_sizes_of_shaken_supercells(atoms, allowed):
    from mmace.training.restraint import _repetition

    rng = np.random.default_rng(1)
    assert {round(np.linalg.det(_repetition(atoms, rng))) * atoms for _ in range(40)} == allowed


def test_frozen_waves_alternate_between_cells():
    from mmace.training.restraint import _repetition, _wave

    primitive = bulk("CrN", "rocksalt", a=4.15)
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(300):
        repetition = _repetition(2, rng)
        atoms = make_supercell(primitive, repetition)
        wave = _wave(repetition, 2, rng).reshape(-1, 2, 3)
        signs = np.sign(wave[:, 0, 0] * wave[0, 0, 0])
        assert wave == pytest.approx(signs[:, None, None] * wave[0])
        assert signs.sum() == 0
        assert np.linalg.norm(wave, axis=2).max() <= 0.6

        def sign(step, atoms=atoms, signs=signs):
            apart = atoms.positions[::2] - atoms.positions[0] - step @ primitive.cell.array
            inside = np.linalg.solve(atoms.cell.array.T, apart.T).T
            (cell,) = np.flatnonzero(np.abs(inside - inside.round()).max(1) < 1e-9)
            return signs[cell]

        first, second = rng.integers(-3, 4, (2, 3))
        assert sign(first + second) == sign(first) * sign(second)
        seen.add(tuple(sign(step) for step in np.eye(3)))
    assert len(seen) == 7


def shaken_cells(labels, teacher, count, seed=0):
    from mmace.training.restraint import crystals_to_shake, shake

    crystals = crystals_to_shake(labels["train"], lambda kind: 1.0, lambda kind: 1.0)
    rng = np.random.default_rng(seed)
    return [shake(crystals[k % len(crystals)], teacher, rng) for k in range(count)]


def test_an_energy_that_is_not_a_number_is_the_lowest_of_its_walk(teacher, labels, monkeypatch):
    from mmace.training import restraint

    first, second = shaken_cells(labels, teacher, 2)
    seen = []

    def evaluate(model, graph, **wanted):
        found = original(model, graph, **wanted)
        seen.append(graph.positions[: len(first.atoms)].clone())
        if len(seen) == 2:
            found.energy[0] = np.nan
            found.forces[: len(first.atoms)] = np.nan
        return found

    original = restraint.evaluate
    alone = restraint.walk_downhill(teacher, [second], 5)[0]
    monkeypatch.setattr(restraint, "evaluate", evaluate)
    broken, other = restraint.walk_downhill(teacher, [first, second], 5)
    assert broken.atoms.positions == pytest.approx(seen[1].numpy())
    assert np.abs(seen[1].numpy() - first.atoms.positions).max() > 0.01
    assert other.atoms.positions == pytest.approx(alone.atoms.positions, abs=1e-7)
    assert np.abs(other.atoms.positions - second.atoms.positions).max() > 0.01


def test_walks_end_in_valleys_that_are_narrower_than_their_steps(teacher, labels, monkeypatch):
    from mmace.training import restraint

    (start,) = shaken_cells(labels, teacher, 1)
    centre = start.atoms.positions[0] - start.atoms.positions[1] - [0.0, 0.1, 0.0]

    def evaluate(model, graph, **wanted):
        apart = graph.positions[0] - graph.positions[1] - torch.as_tensor(centre)
        forces = torch.zeros_like(graph.positions)
        forces[0], forces[1] = -1000.0 * apart, 1000.0 * apart
        energy = 500.0 * apart.square().sum().reshape(1)
        return Evaluation(energy, energy, forces if wanted["forces"] else None, None, None)

    monkeypatch.setattr(restraint, "evaluate", evaluate)
    (end,) = restraint.walk_downhill(teacher, [start], 12)
    apart = end.atoms.positions[0] - end.atoms.positions[1] - centre
    assert np.linalg.norm(apart) < 0.01


def test_half_of_the_shaken_cells_keep_volume_and_moments_and_a_third_are_waves(teacher):
    from mmace.training.restraint import Crystal, shake

    primitive = bulk("Fe", "fcc", a=3.6)
    primitive.set_initial_magnetic_moments([[0.1, 0.2, 0.3]])
    rng = np.random.default_rng(4)
    cells = [shake(Crystal(primitive, 0.0, 0.5), teacher, rng) for _ in range(600)]
    volume = np.array([cell.atoms.get_volume() / len(cell.atoms) / primitive.get_volume() for cell in cells])
    own = np.abs(volume - 1) < 1e-9
    moments = np.array([(cell.atoms.get_initial_magnetic_moments() == [0.1, 0.2, 0.3]).all() for cell in cells])
    assert own.mean() == pytest.approx(0.5, abs=0.06)
    assert moments[own].all()
    assert moments.mean() == pytest.approx(0.75, abs=0.06)
    lengths = [np.linalg.norm(cell.atoms.positions - cell.sites, axis=1) for cell in cells]
    waves = [length for length in lengths if np.ptp(length) < 1e-9]
    assert len(waves) / len(cells) == pytest.approx(1 / 3, abs=0.06)
    assert 0.55 < np.concatenate(waves).max() < 0.6


def test_restraint_of_spin_orbit_energies_starts_at_its_bound(teacher, labels):
    from mmace.training.restraint import spin_orbit_loss

    batch = batch_of(labels["train"], teacher)
    sizes = []
    for bound in (1e-9, 1e-6, 1.0):
        loss = spin_orbit_loss(teacher, batch.graph, bound, torch.Generator().manual_seed(0))
        sizes.append(float(loss))
    assert sizes[0] > sizes[1] > 0.0
    assert sizes[2] == 0.0
    without = MagneticMACE(replace(teacher.config, spin_orbit=False))
    loss = spin_orbit_loss(without, batch.graph, 1e-9, torch.Generator().manual_seed(0))
    assert float(loss.detach()) < 1e-4


# Constants


def test_constants_come_from_the_training_labels(labels):
    model = initial_model(labels["train"], recipe(), seed=0)
    assert model.elements == ("Al", "Fe")
    assert model.config.carriers == ("Fe",)
    largest = max(np.linalg.norm(x.moments, axis=1).max() for x in labels["train"])
    assert model.config.moment_scale == {"Al": 1.0, "Fe": pytest.approx(1.2 * largest + 0.1)}
    graphs = [Graph.from_atoms(x.atoms(), model.elements, 3.5) for x in labels["train"]]
    mean = sum(len(g.sender) for g in graphs) / sum(len(g.species) for g in graphs)
    assert model.config.avg_num_neighbors == pytest.approx(mean)
    groups = directions_of(labels["train"], model)
    labelled = (groups.energy.weight * groups.energy.value.square()).sum()
    from mmace.training.loss import direction_energies

    energies = direction_energies(model, groups).detach()
    assert (energies - energies.mean(0)).square().mean(0).sum().item() == pytest.approx(labelled.item(), rel=0.3)


def test_without_spin_orbit_labels_the_model_has_no_spin_orbit_part(labels):
    single = [x for x in labels["train"] if not x.soc]
    assert initial_model(labels["train"], recipe(), seed=0).config.spin_orbit
    assert not initial_model(single, recipe(), seed=0).config.spin_orbit


def test_reference_energies_are_the_least_squares_solution():
    config = ModelConfig(elements=("Al", "Fe"), moment_scale={"Al": 1.0, "Fe": 3.0}, carriers=("Fe",), num_chebyshev=2)
    one_body = np.array([[0.0, 0.0], [0.3, -0.1]])
    frames = []
    for k, size in enumerate(np.linspace(0.0, 2.4, 12)):
        atoms = [bulk("Fe", "bcc", a=2.9), Atoms("FeAl", positions=[[0, 0, 0], [1.4, 1.4, 1.4]], cell=[2.9] * 3)][k % 2]
        moments = np.zeros((len(atoms), 3))
        moments[0] = size * np.array([0.6, 0.0, 0.8])
        atoms.set_initial_magnetic_moments(None)
        atoms.set_initial_magnetic_moments(moments)
        x = 1 - 2 * (size / 3.0) ** 2
        energy = sum(REFERENCE[s] for s in atoms.get_chemical_symbols()) + one_body[1] @ [x - 1, 2 * x**2 - 2]
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
        frames.append(atoms)
    from mmace.data import label_from_atoms

    energies, found, residual = reference_energies([label_from_atoms(a, "x") for a in frames], config)
    assert residual < 5e-3
    assert energies == {z: pytest.approx(e, abs=0.02) for z, e in REFERENCE.items()}
    assert found == pytest.approx(one_body, abs=0.03)
    with pytest.raises(LabelError, match="energy"):
        reference_energies([replace(label_from_atoms(frames[0], "x"), energy=np.nan)], config)


# The loop


@pytest.fixture(scope="module")
def whole_run(labels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(labels["train"], labels["valid"], recipe(), folder, seed=3)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_floor_leaves_room_for_what_the_lowest_label_can_still_release(labels):
    """A harmonic crystal of stiffness k, displaced by u and strained by ε in volume, has ½ku² + ½BVε² to give."""
    label = next(x for x in labels["train"] if x.symbols == ("Fe", "Fe", "Al"))
    atoms = label.atoms()
    stiffness, strain, displacement = 1.5, 0.04, 0.1
    volume = atoms.get_volume() / 3
    bulk = stiffness / volume ** (1 / 3)
    held = replace(
        label,
        energy=3 * (-5.0 + 0.5 * stiffness * displacement**2 + 0.5 * bulk * volume * strain**2),
        forces=np.full((3, 3), -stiffness * displacement / np.sqrt(3)),
        stress=np.array([bulk * strain] * 3 + [0.0] * 3),
    )
    higher = replace(held, energy=held.energy + 3.0, forces=np.full((3, 3), 9.0))
    kind = composition(label.symbols)

    def of_this_kind(other):
        return stiffness if other == kind else np.nan

    assert floor_energies([higher, held], of_this_kind) == {kind: pytest.approx(-5.0)}
    unknown = replace(held, forces=np.full((3, 3), np.nan), stress=np.full(6, np.nan))
    assert floor_energies([unknown], of_this_kind) == {kind: pytest.approx(held.energy / 3)}


def test_crystals_are_shaken_as_often_as_their_weights_say(labels, tmp_path, monkeypatch):
    from mmace.training import loop

    drawn = []

    def shake(crystal, model, rng):
        drawn.append(crystal.atoms)
        return original(crystal, model, rng)

    original = loop.shake
    monkeypatch.setattr(loop, "shake", shake)
    train(labels["train"], labels["valid"], recipe(shake_weight={"FeAl": 9.0, "others": 1.0}), tmp_path / "run")
    iron_aluminium = [len(set(atoms.symbols)) == 2 and len(atoms) == 2 for atoms in drawn]
    assert len(drawn) >= 16
    assert 0.65 < np.mean(iron_aluminium) < 1


@pytest.mark.parametrize(
    ("name", "read"), [("least_stiffness", Recipe.stiffness_of), ("shake_weight", Recipe.shake_weight_of)]
)
def test_settings_of_each_formula(name, read):
    assert read(recipe(**{name: 2.0}), composition(["Fe", "Al"])) == 2.0
    given = recipe(**{name: {"Fe": 4.0, "Fe2Cr2": 3.0, "others": 1.5}})
    assert [read(given, composition(x)) for x in (["Fe"], ["Cr", "Fe"], ["Fe", "Al"])] == [4.0, 3.0, 1.5]


def test_training_lowers_the_loss_and_leaves_the_labels_alone(labels, tmp_path):
    before = {part: fingerprint(labels[part]) for part in labels}
    random_state = torch.random.get_rng_state()
    records = []
    loose = Tolerances(energy=0.02, forces=0.3, stress=0.03, magnetic_forces=0.1, anisotropy=2e-4)
    settings = recipe(epochs=25, learning_rate=0.02, tolerances=loose)
    outcome = train(labels["train"], labels["valid"], settings, tmp_path, report=records.append)
    assert outcome.finished
    assert sum(records[-1]["train_loss"].values()) < 0.3 * sum(records[0]["train_loss"].values())
    assert outcome.best_score == min(record["valid_score"] for record in records)
    assert records[-1]["train_loss"]["anisotropy"] < records[0]["train_loss"]["anisotropy"]
    assert {part: fingerprint(labels[part]) for part in labels} == before
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert torch.get_default_dtype() == torch.float32


def test_time_is_looked_at_after_every_step(labels, whole_run, tmp_path, monkeypatch):
    """A clock that moves by a second each time it is read stops the run inside an epoch, again and again."""
    whole = whole_run[1]
    clock = itertools.count()
    monkeypatch.setattr("mmace.training.loop.time.monotonic", lambda: float(next(clock)))
    inside = 0
    for _ in range(100):
        part = train(labels["train"], labels["valid"], recipe(), tmp_path, seed=3, max_minutes=3.5 / 60)
        if part.finished:
            break
        inside += read_checkpoint(tmp_path / "checkpoint.safetensors")[1]["steps_of_epoch"] > 0
    assert part.finished
    assert inside > 1
    assert part.best_score == whole.best_score
    assert same(weights_of(part.model), weights_of(whole.model))


def test_patience_counts_from_the_best_validation_whatever_is_kept(labels, tmp_path):
    settings = recipe(epochs=40, learning_rate=2.0, clip=1e6, patience=2, keep="last", restrain_every=0)
    outcome = train(labels["train"], labels["valid"], settings, tmp_path, seed=3)
    assert outcome.finished
    assert outcome.epoch < 40
    assert outcome.best_epoch == outcome.epoch


def test_patience_waits_for_a_validation(labels, tmp_path):
    """A run does not end before anything was validated, or between two validations."""
    settings = recipe(epochs=9, learning_rate=2.0, clip=1e6, patience=1, validate_every=3, restrain_every=0)
    outcome = train(labels["train"], labels["valid"], settings, tmp_path, seed=3)
    assert outcome.epoch in (6, 9)
    assert outcome.best_epoch >= 3
    assert np.isfinite(outcome.best_score)


def test_induced_moments_do_not_shift_energies(teacher, labels):
    """What a code finds on aluminium follows from iron: the label is that of a model without moments there."""
    plain = [x for x in labels["valid"] if "Al" in x.symbols and x.anisotropy_group is None]
    induced = []
    for label in plain:
        moments = label.moments.copy()
        moments[np.array(label.symbols) == "Al"] = [0.0, 0.03, -0.08]
        forces = np.where(np.isnan(label.magnetic_forces), 0.0, label.magnetic_forces)
        induced.append(replace(label, moments=moments, magnetic_forces=forces))
    errors = errors_of(induced, predict(teacher, induced))
    assert errors.energy_rmse_meV_per_atom < 1e-4
    assert errors.magnetic_forces_rmse_meV_per_muB < 1e-4


def test_labels_without_a_cell_train_beside_crystals(labels, tmp_path):
    """Molecules have no stress and are not shaken; gradients stay finite."""
    rng = np.random.default_rng(2)
    molecules = []
    for k in range(3):
        atoms = Atoms("Fe2", positions=[[0, 0, 0], [0, 0, 2.0 + 0.1 * k]])
        atoms.set_initial_magnetic_moments(rng.normal(size=(2, 3)))
        atoms.calc = SinglePointCalculator(atoms, energy=2 * REFERENCE["Fe"] + 0.1 * k, forces=np.zeros((2, 3)))
        atoms.info.update({"soc": 0, "parent": "molecule", "name": f"molecule-{k}"})
        molecules.append(label_from_atoms(atoms, "molecule"))
    settings = recipe(epochs=2, restrain_every=1)
    outcome = train([*molecules, *labels["train"]], labels["valid"], settings, tmp_path, seed=3)
    assert all(torch.isfinite(x).all() for x in outcome.model.parameters())
    predicted = predict(outcome.model, molecules)
    assert all(np.isnan(p.stress).all() and np.isfinite(p.forces).all() for p in predicted)


def test_a_loss_that_is_not_finite_ends_training_with_a_sentence(labels, tmp_path):
    broken = [replace(x, energy=1e308) for x in labels["train"] if x.anisotropy_group is None]
    with pytest.raises(MMACEError, match="not finite"):
        train(broken, labels["valid"], recipe(), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_stopped_run_goes_on_to_the_same_numbers(labels, whole_run, tmp_path):
    folder, whole = whole_run
    first = train(labels["train"], labels["valid"], recipe(), tmp_path, seed=3, stop_after=1)
    assert not first.finished
    assert first.epoch == 1
    untouched = train(labels["train"], labels["valid"], recipe(), tmp_path, seed=3, max_minutes=0.0)
    assert untouched.epoch == 1
    second = train(labels["train"], labels["valid"], recipe(), tmp_path, seed=3)
    assert second.finished
    assert second.best_score == whole.best_score
    assert same(weights_of(second.model), weights_of(whole.model))
    assert same(weights_of(load_model(tmp_path / "model.safetensors")), weights_of(whole.model))

    def records(path):
        lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "minutes"} for line in lines]

    assert [record["epoch"] for record in records(tmp_path)] == [1, 2, 3, 4]
    assert records(tmp_path) == records(folder)
    other_seed = train(labels["train"], labels["valid"], recipe(), tmp_path / "other", seed=4)
    assert not same(weights_of(other_seed.model), weights_of(whole.model))


def test_a_folder_with_another_run_is_refused(labels, whole_run, tmp_path):
    folder, _ = whole_run
    with pytest.raises(MMACEError, match="other labels, recipe or seed"):
        train(labels["train"], labels["valid"], recipe(), folder, seed=4)
    with pytest.raises(MMACEError, match="other labels, recipe or seed"):
        train(labels["train"][1:], labels["valid"], recipe(), folder, seed=3)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelFileError, match="damaged"):
        train(labels["train"], labels["valid"], recipe(), tmp_path)


def test_validation_labels_only_select(labels, whole_run, tmp_path):
    _, whole = whole_run
    shifted = [replace(x, energy=x.energy + 5.0) for x in labels["valid"]]
    outcome = train(labels["train"], shifted, recipe(), tmp_path, seed=3)
    assert outcome.model.config == whole.model.config
    if outcome.best_epoch == whole.best_epoch:
        assert same(weights_of(outcome.model), weights_of(whole.model))
    assert outcome.best_score != whole.best_score


def test_bootstrap_trains_on_other_draws(labels, whole_run, tmp_path):
    many = [replace(x, parent=x.anisotropy_group or x.name) for x in labels["train"]]
    outcomes = [train(many, labels["valid"], recipe(), tmp_path / str(b), seed=3, bootstrap=b) for b in (False, True)]
    assert not same(*(weights_of(outcome.model) for outcome in outcomes))
    of_one_parent = train(labels["train"], labels["valid"], recipe(), tmp_path / "one", seed=3, bootstrap=True)
    assert same(weights_of(of_one_parent.model), weights_of(whole_run[1].model))


def test_canted_labels_repeat_within_an_epoch(teacher, labels, tmp_path):
    """Three times each canted label is what a list that holds it three times gives, to the last bit."""
    canted = [x for x in labels["train"] if x.symbols == ("Fe", "Fe", "Al") and x.anisotropy_group is None]
    listed = [*labels["train"], *canted, *canted]

    def weights(train_labels, **settings):
        settings = recipe(restrain_every=0, learning_rate=1e-3, keep="last", **settings)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return weights_of(train(train_labels, labels["valid"], settings, folder, start=Start(teacher)).model)

    repeated = weights(labels["train"], canted_repeats=3)
    assert len(canted) == 3
    assert same(repeated, weights(listed))
    assert not same(repeated, weights(labels["train"]))


@pytest.mark.parametrize(
    ("second", "canted"), [((0, 0, 1.5), False), ((0, 0, -2), False), ((0, 0, 0), False), ((0.1, 0, 1.5), True)]
)
def test_antiparallel_moments_are_not_canted(teacher, labels, second, canted):
    label = next(x for x in labels["train"] if x.symbols == ("Fe", "Fe", "Al"))
    moments = np.array([(0, 0, 1.2), second, (0, 0, 0)])
    assert LabelBatch.of(replace(label, moments=moments), teacher, TOLERANCES).canted == canted


def test_bootstrap_draws_whole_parents():
    parents = ["a"] * 3 + ["b"] * 2 + ["c", "d", "e", "f"]
    draws = [_redrawn(list(range(9)), parents, np.random.default_rng(seed)) for seed in range(20)]
    for draw in draws:
        counts = [draw.count(k) for k in range(9)]
        assert counts[0] == counts[1] == counts[2]
        assert counts[3] == counts[4]
        assert counts[0] + counts[3] + sum(counts[5:]) == 6
    assert len({tuple(draw) for draw in draws}) > 15
    assert _redrawn([], [], np.random.default_rng(0)) == []


def test_float32_and_early_stop(labels, tmp_path):
    patient = recipe(dtype="float32", learning_rate=1e-9, final_learning_rate=1e-9, patience=1, epochs=50)
    outcome = train(labels["train"], labels["valid"], patient, tmp_path)
    assert outcome.model.dtype == torch.float32
    assert outcome.finished
    assert outcome.epoch < 50


def test_last_weights_are_kept_on_request(labels, tmp_path):
    unstable = {"learning_rate": 0.3, "final_learning_rate": 0.3, "warmup_steps": 0, "epochs": 4, "restrain_every": 0}
    best, last = (
        train(labels["train"], labels["valid"], recipe(keep=keep, **unstable), tmp_path / keep)
        for keep in ("best", "last")
    )
    scores = [json.loads(line)["valid_score"] for line in (tmp_path / "best" / "log.jsonl").read_text().splitlines()]
    assert best.best_score == min(scores) < scores[-1] == last.best_score
    assert last.best_epoch == 4
    with pytest.raises(MMACEError, match="choose best or last"):
        recipe(keep="worst")


def test_training_needs_both_kinds_of_labels(labels, tmp_path):
    with pytest.raises(LabelError, match="give both"):
        train(labels["train"], [], recipe(), tmp_path)


# Evaluation


def test_errors_are_in_the_units_they_name(teacher, labels):
    test = labels["test"]
    exact = errors_of(test, predict(teacher, test))
    for key, value in exact.to_dict().items():
        if "rmse" in key or "mae" in key:
            assert value == pytest.approx(0.0, abs=1e-3)
    moved = [
        replace(
            x,
            energy=x.energy + 0.003 * len(x) * (1.0 if x.anisotropy_group is None else float(x.name[-1]) * 1e-3),
            forces=x.forces - 0.05,
            stress=x.stress + 2.0 * GPa,
            magnetic_forces=x.magnetic_forces + 0.01,
        )
        for x in test
    ]
    errors = errors_of(moved, predict(teacher, moved))
    assert errors.n_frames == len(test)
    assert errors.n_groups == 1
    assert errors.energy_rmse_meV_per_atom == pytest.approx(3.0, rel=1e-4)
    assert errors.energy_mae_meV_per_atom == pytest.approx(3.0, rel=1e-4)
    assert errors.forces_rmse_meV_per_A == pytest.approx(50.0, rel=1e-4)
    assert errors.stress_rmse_GPa == pytest.approx(2.0, rel=1e-4)
    assert errors.magnetic_forces_rmse_meV_per_muB == pytest.approx(10.0, rel=1e-4)
    assert errors.anisotropy_rmse_ueV_per_atom == pytest.approx(3.0 * np.std(np.arange(5.0)), rel=1e-4)
    group = np.array([x.energy for x in test if x.anisotropy_group is not None])
    size = next(len(x) for x in test if x.anisotropy_group is not None)
    assert exact.anisotropy_label_rms_ueV_per_atom == pytest.approx(1e6 * group.std() / size)
    without = errors_of([x for x in test if x.anisotropy_group is None], predict(teacher, test)[:3])
    assert without.anisotropy_rmse_ueV_per_atom is None


def test_committee_mean_and_spread(teacher, labels):
    test = labels["test"]
    exact = predict(teacher, test)
    rng = np.random.default_rng(0)

    def noisy(size):
        return [
            replace(
                p,
                energy=p.energy + size * len(p.forces) * rng.normal(),
                forces=p.forces + size * rng.normal(size=p.forces.shape),
            )
            for p in exact
        ]

    members = [noisy(0.1) for _ in range(200)]
    mean = mean_prediction(members)
    assert mean[0].energy == pytest.approx(np.mean([m[0].energy for m in members]))
    offset = [replace(x, forces=x.forces + 0.3) for x in test]
    calibration = spread_calibration(offset, members)
    assert calibration["forces"]["rms_spread"] == pytest.approx(100.0, rel=0.1)
    assert calibration["forces"]["error_over_spread"] == pytest.approx(3.0, rel=0.1)
    assert calibration["energy"]["rms_error"] < 20.0
    results = report(test, members[:2], lambda label: "test")
    assert results["n_members"] == 2
    assert results["by_split"]["test"]["n_frames"] == len(test) == results["by_parent"]["t"]["n_frames"]
    assert results["committee"]["test"] == results["committee"]["all"]


def test_calibration_by_size_of_the_spread():
    """Errors drawn from the spread itself give one in every bin; a spread that says nothing gives a slope."""
    rng = np.random.default_rng(1)
    spread = np.exp(rng.normal(size=8000))
    honest = _binned_ratios(np.abs(rng.normal(size=8000)) * spread, spread)
    assert honest == pytest.approx([1.0] * 4, rel=0.06)
    blind = _binned_ratios(np.abs(rng.normal(size=8000)), spread)
    assert blind[0] > 2.0
    assert blind[3] < 0.5
    with_zeros = _binned_ratios(np.append(np.ones(4), np.zeros(40)), np.append(np.full(4, 2.0), np.full(40, 1e-17)))
    assert with_zeros == pytest.approx([0.5] * 4)


# Recipes and command line


def test_recipes_round_trip_and_refuse_what_they_do_not_know(tmp_path):
    settings = recipe(tolerances=Tolerances(energy=0.5))
    assert Recipe.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    for content, message in (
        ({"epocs": 3}, "no setting epocs"),
        ({"tolerances": {"force": 1}}, "no setting force"),
        ({"model": {"moment_scale": {"Fe": 1}}}, "no setting moment_scale"),
        ({"epochs": 0}, "at least 1"),
        ({"dtype": "float16"}, "float64 or float32"),
        ({"epochs": "ten"}, "epochs is 'ten': give a whole number"),
        ({"tolerances": 3}, "tolerances is 3: give an object"),
        ({"tolerances": {"energy": 0.0}}, "energy is 0.0: it must be above 0"),
        ({"learning_rate": -1}, "learning_rate is -1: it must be above 0"),
        ({"least_stiffness": 0}, "least_stiffness is 0: give a number above 0"),
        ({"canted_repeats": 0}, "canted_repeats is 0: it must be at least 1"),
        ({"shake_weight": -1.0}, "shake_weight is -1.0: give a number above 0"),
        ({"least_stiffness": [1.0]}, r"least_stiffness is \[1.0\]: give a number above 0"),
        ({"least_stiffness": {"Al": "soft", "others": 1}}, "least_stiffness is 'soft': give a number above 0"),
        ({"least_stiffness": {"Al": 1.5}}, "least_stiffness has no 'others'"),
        ({"least_stiffness": {"al": 1.5, "others": 1}}, "least_stiffness has 'al': give formulas"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: give a finite number"),
        ({"tolerances": {"transverse": -0.1}}, "transverse is -0.1: it must be at least 0"),
        ({"model": {"channels": 0}}, "channels is 0, but must be at least 1"),
        ({"model": {"channels": "16"}}, "channels is '16': give a whole number"),
        ({"model": {"channels": 2.5}}, "channels is 2.5: give a whole number"),
        ({"model": {"cutoff": "5"}}, "cutoff is '5': give a number"),
        ({"model": {"cutoff": -1}}, "cutoff is -1, but must be above 0"),
        ({"model": {"wall": -5}}, "wall is -5, but must be above 0"),
        ({"model": {"radial_mlp": 64}}, "radial_mlp is 64: give a list of whole numbers"),
        ({"model": {"radial_mlp": [64, 0]}}, "radial_mlp is .64, 0., but must be widths of at least 1"),
        ({"model": {"magnetic": "no"}}, "magnetic is 'no': give true or false"),
    ):
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(content))
        with pytest.raises(RecipeError, match=message):
            read_recipe(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path)
    with pytest.raises(RecipeError, match="no recipe"):
        read_recipe(tmp_path / "nowhere.json")


def test_command_line_trains_a_committee_and_evaluates_it(files, labels, tmp_path, capsys):
    together = tmp_path / "all.extxyz"
    together.write_text("".join((files / f"{part}.extxyz").read_text() for part in labels))
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a"], "valid": ["v"], "test": ["t"]}))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(epochs=2).to_dict()))
    common = ["--splits", str(tmp_path / "splits.json")]
    out = tmp_path / "run"
    command = ["train", "--train", str(together), *common, "--out", str(out), "--members", "2", "--seed", "3"]
    assert main([*command, "--recipe", str(tmp_path / "recipe.json")]) == 0
    assert (out / "member-1" / "log.png").stat().st_size > 1000
    direct = train(labels["train"], labels["valid"], recipe(epochs=2), tmp_path / "direct", seed=4)
    members = [load_model(file) for file in model_files(out / "committee.json")]
    assert same(weights_of(members[1]), weights_of(direct.model))
    capsys.readouterr()
    model = ["--model", str(out / "committee.json"), "--json", str(tmp_path / "errors.json")]
    assert main(["eval", str(together), *model, *common]) == 0
    assert "meV" in capsys.readouterr().out
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert errors["n_frames"] == sum(len(part) for part in labels.values())
    wanted = errors_of(labels["test"], mean_prediction([predict(m, labels["test"]) for m in members])).to_dict()
    assert errors["by_split"]["test"] == {k: pytest.approx(v) for k, v in wanted.items()}
    for key in (
        "energy_rmse_meV_per_atom",
        "forces_rmse_meV_per_A",
        "stress_rmse_GPa",
        "magnetic_forces_rmse_meV_per_muB",
        "anisotropy_rmse_ueV_per_atom",
    ):
        assert errors[key] > 0
    assert errors["committee"]["test"]["energy"]["error_over_spread"] > 0


def test_a_file_named_twice_counts_twice(files, tmp_path):
    settings = tmp_path / "recipe.json"
    settings.write_text(json.dumps(recipe(epochs=1, batch_size=1).to_dict()))
    steps = []
    for times in (1, 2):
        folder = tmp_path / str(times)
        train_files = [str(files / "train.extxyz")] * times
        command = ["train", "--train", *train_files, "--valid", str(files / "valid.extxyz"), "--out", str(folder)]
        assert main([*command, "--recipe", str(settings)]) == 0
        steps.append(json.loads((folder / "log.jsonl").read_text())["step"])
    assert steps[1] == 2 * steps[0]


def test_a_folder_holds_one_training_run_at_a_time(labels, tmp_path):
    with sole_use(tmp_path / "lock") as mine:
        assert mine
        with pytest.raises(MMACEError, match="another training run is at work"):
            train(labels["train"], labels["valid"], recipe(epochs=1), tmp_path)
    assert train(labels["train"], labels["valid"], recipe(epochs=1), tmp_path).finished


def test_bad_input_is_one_sentence(files, teacher, tmp_path, capsys):
    good = str(files / "train.extxyz")
    save_model(teacher, tmp_path / "model.safetensors", {})
    nickel = bulk("Ni", "fcc", a=3.5)
    nickel.set_initial_magnetic_moments([0.6])
    write(tmp_path / "nickel.extxyz", nickel)
    (tmp_path / "file").write_text("")
    evaluation = ["--model", str(tmp_path / "model.safetensors")]
    cases = [
        (["train", "--train", good, "--valid", good, "--out", str(tmp_path / "x")], "keep it in one"),
        (["train", "--train", good, "--valid", str(files / "no"), "--out", str(tmp_path / "x")], "no label file"),
        (
            ["train", "--train", good, "--valid", str(files / "valid.extxyz"), "--out", str(tmp_path / "file" / "x")],
            "cannot be made",
        ),
        (["eval", str(tmp_path / "nickel.extxyz"), *evaluation], "Ni"),
        (["eval", good, "--model", str(tmp_path / "file.safetensors")], "no model file"),
        (["eval", good, *evaluation, "--json", str(tmp_path / "nowhere" / "x.json")], "nothing can be written"),
        (["eval", good, *evaluation, "--device", "abacus"], "device"),
        (["eval", good, *evaluation, "--json", good], "name another file"),
        (["eval", good, *evaluation, "--json", evaluation[1]], "name another file"),
    ]
    for command, message in cases:
        assert main(command) == 2, command
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert message in captured.err
        assert len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
