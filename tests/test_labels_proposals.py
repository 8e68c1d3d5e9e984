"""Proposals: where they come from, what they may not touch, and that disagreement chooses them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from mmace.cli import main
from mmace.errors import LabelError
from mmace.graph import Graph
from mmace.io import save_model
from mmace.labels import proposals
from mmace.labels.gate import fingerprint
from mmace.labels.plan import Plan, Recipe, make_job, read_plan, write_plan
from mmace.labels.proposals import propose
from mmace.model import MagneticMACE, ModelConfig

SETTINGS = {
    "noncollinear": False, "ecut": 18, "pawecutdg": 36, "ecutsm": 0.5, "occopt": 6, "tsmear": 0.02, "k_spacing": 0.25,
    "tolvrs": 1e-6, "nstep": 45, "magcon_lambda": 0.02, "ratsph": {"Fe": 2.2, "Al": 2.2}, "ratsm": 0.05,
    "valence": {"Fe": 8, "Al": 3},
}  # fmt: skip
RECIPE = Recipe("collinear", "abinit", ("Fe",), SETTINGS)
CELL = np.diag([2.9, 2.9, 2.9])


def model(slope=0.0):
    """A random potential; `slope` adds slope·(m/M_z)² of every Fe moment to the energy."""
    torch.manual_seed(3)
    config = ModelConfig(
        elements=("Al", "Fe"),
        moment_scale={"Al": 1.0, "Fe": 3.0},
        carriers=("Fe",),
        atomic_energies={"Al": -50.0, "Fe": -600.0},
        energy_scale=0.5,
        avg_num_neighbors=6.0,
        num_chebyshev=2,
        channels=4,
        num_bessel=4,
        radial_mlp=(8,),
        cutoff=3.5,
    )
    made = MagneticMACE(config).requires_grad_(False)
    made.one_body.weight[1, 0] += slope
    return made


def energy(member, atoms):
    return float(member.site_energies(Graph.from_atoms(atoms, member.elements, member.config.cutoff)).sum())


def frame(parent, shift=0.0, moment=1.5, **info):
    atoms = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=CELL * (1 + shift), pbc=True)
    atoms.set_initial_magnetic_moments([[0, 0, moment], [0, 0, 0]])
    atoms.arrays["magnetic_forces"] = np.zeros((2, 3))
    results = {"energy": -1.0, "forces": np.zeros((2, 3)), "stress": np.zeros(6)}
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info.update({"parent": parent, "name": f"{parent}-{moment}", "soc": 0, "code": "c", "recipe": "r", **info})
    return atoms


FRAMES = [frame(f"p{k}", 0.02 * k, m) for k in range(6) for m in (0.5, 2.0)]
TRAIN = ("p0", "p1", "p2", "p3")


def test_only_training_parents_are_used():
    plan, chosen = propose(FRAMES, TRAIN, [model(), model(0.1)], RECIPE, "next", 12, candidates=64)
    assert len(plan.jobs) == 12
    assert {job.parent for job in plan.jobs} == set(TRAIN)
    assert {job.split for job in plan.jobs} == {"train"}
    assert [job.parent for job in plan.jobs] == [c.parent for c in chosen]
    assert len({c.origin for c in chosen}) >= 3


def test_disagreement_chooses():
    """Members that differ in their one-body term disagree most where the moment is long, and that is proposed."""
    members = [model(), model(0.5)]
    _, everything = propose(FRAMES, TRAIN, members, RECIPE, "all", 1000, candidates=96, per_parent=1000)
    _, chosen = propose(FRAMES, TRAIN, members, RECIPE, "some", 8, candidates=96, per_parent=1000)
    moments = np.array([abs(c.atoms.arrays["initial_magmoms"][0, 2]) for c in everything])
    assert len(everything) > 30
    assert [c.score for c in everything] == sorted((c.score for c in everything), reverse=True)
    assert np.corrcoef(moments, [c.spread["energy"] for c in everything])[0, 1] > 0.9
    assert [c.score for c in chosen] == [c.score for c in everything[:8]]
    for candidate in chosen:
        one, other = (energy(member, candidate.atoms) / 2 for member in members)
        assert candidate.spread["energy"] == pytest.approx(abs(one - other) / np.sqrt(2), rel=1e-9)
        assert candidate.energy == pytest.approx((one + other) / 2, rel=1e-12)


def test_a_cap_for_each_parent_and_no_state_twice():
    members = [model(), model(0.1)]
    _, chosen = propose(FRAMES, TRAIN, members, RECIPE, "next", 100, candidates=96, per_parent=2)
    assert {[c.parent for c in chosen].count(parent) for parent in TRAIN} == {2}
    _, again = propose([*FRAMES, *(labelled(c) for c in chosen)], TRAIN, members, RECIPE, "next", 100, 96, 2)
    states = [fingerprint(c.atoms) for c in (*chosen, *again)]
    for k, one in enumerate(states):
        for other in states[:k]:
            assert one.shape != other.shape or np.linalg.norm(one - other) > 0.02 * np.linalg.norm(one)


def labelled(candidate):
    atoms = candidate.atoms.copy()
    atoms.info.update(parent=candidate.parent, name="known already")
    return atoms


def test_what_is_kept_for_testing_changes_nothing():
    """Neither the moments nor the states of frames that are not trained on steer the proposals."""
    members = [model(), model(0.1)]
    plan, chosen = propose(FRAMES, TRAIN, members, RECIPE, "next", 12, candidates=64)
    others = [frame(parent, 0.05, 2.9) for parent in ("p4", "p5")]
    others += [labelled(replace(candidate, parent="p5")) for candidate in chosen]
    again, _ = propose([*FRAMES[:8], *others], TRAIN, members, RECIPE, "next", 12, candidates=64)
    assert again == plan


def test_numbers_go_on_after_those_of_labels_at_hand():
    known = [*FRAMES, frame("p0", 0.001, 1.0, name="next-6"), frame("p1", 0.001, 1.0, name="next-8-d1")]
    plan, _ = propose(known, TRAIN, [model(), model(0.1)], RECIPE, "next", 3, candidates=32)
    assert [job.name for job in plan.jobs] == ["next-7", "next-8", "next-9"]


def test_window_leaves_out_high_energies():
    members = [model(), model(0.1)]
    _, wide = propose(FRAMES, TRAIN, members, RECIPE, "all", 1000, candidates=96, per_parent=1000)
    by_formula = {}
    for c in wide:
        by_formula.setdefault(c.atoms.get_chemical_formula("hill", empirical=True), []).append(c.energy)
    window = 0.5 * max(max(energies) - min(energies) for energies in by_formula.values())
    _, near = propose(FRAMES, TRAIN, members, RECIPE, "all", 1000, candidates=96, per_parent=1000, window=window)
    lowest = {formula: min(energies) for formula, energies in by_formula.items()}
    above = [c.energy - lowest[c.atoms.get_chemical_formula("hill", empirical=True)] for c in near]
    assert 0 < len(near) < len(wide)
    assert max(above) <= window + 1e-9


def test_the_seed_decides():
    members = [model(), model(0.1)]
    plans = [propose(FRAMES, TRAIN, members, RECIPE, "next", 6, 32, seed=seed)[0] for seed in (1, 1, 2)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


@pytest.mark.parametrize("noncollinear", [False, True])
def test_directions_follow_the_recipe(noncollinear):
    recipe = Recipe("r", "abinit", ("Fe",), {**SETTINGS, "noncollinear": noncollinear})
    plan, _ = propose(FRAMES, TRAIN, [model(), model(0.1)], recipe, "next", 12, 64)
    tilted = [np.abs(np.array(job.moments)[:, :2]).max() > 1e-3 for job in plan.jobs]
    assert any(tilted) == noncollinear
    assert all(job.moments[1] == (0.0, 0.0, 0.0) for job in plan.jobs)
    longest = max(np.linalg.norm(job.moments[0]) for job in plan.jobs)
    assert 1.0 < longest <= 2.0 + 1e-8


def test_collinear_proposals_from_canted_labels():
    """A displaced structure keeps the moments of its label, unless the recipe has no place for them."""
    canted = [frame(f"p{k}", 0.02 * k) for k in range(4)]
    for atoms in canted:
        atoms.set_initial_magnetic_moments([[1.0, 0.5, 1.0], [0, 0, 0]])
    plan, chosen = propose(canted, TRAIN, [model(), model(0.1)], RECIPE, "next", 12, 64)
    assert "displacement" in {candidate.origin for candidate in chosen}
    assert all(np.abs(np.array(job.moments)[:, :2]).max() == 0.0 for job in plan.jobs)


def test_walks_go_downhill_without_temperature(monkeypatch):
    """Steps along forces and magnetic forces lower the energy; a wrong sign of either would raise it."""
    monkeypatch.setattr(proposals, "WALK_TEMPERATURE", 0.0)
    monkeypatch.setattr(proposals, "WALK_STEPS", 3)
    one = model(1.0)
    start = frame("p0", 0.0, 1.2)
    start.positions[1] += [0.25, 0.1, 0.0]
    candidate = proposals.Candidate(start, "p0", "walk")
    (walked,) = proposals._walked([candidate], [one], {"Fe": 2.0}, np.random.default_rng(0))
    moved, turned = start.copy(), start.copy()
    moved.positions = walked.atoms.positions
    turned.arrays["initial_magmoms"] = walked.atoms.arrays["initial_magmoms"]
    assert energy(one, moved) < energy(one, start) - 1e-5
    assert energy(one, turned) < energy(one, start) - 1e-5


def test_unsound_candidates_are_left_out(monkeypatch):
    monkeypatch.setattr(proposals, "CLOSEST", 1.2)
    plan, _ = propose(FRAMES, TRAIN, [model(), model(0.1)], RECIPE, "next", 12, 32)
    assert plan.jobs == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": [model()]}, "two or more models"),
        ({"train_parents": ("other",)}, "nothing to start from"),
        ({"recipe": Recipe("s", "gpaw-soc", ("Fe",), {})}, "not for gpaw-soc"),
    ],
)
def test_refusals(change, message):
    arguments = {"frames": FRAMES, "train_parents": TRAIN, "models": [model(), model(0.1)], "recipe": RECIPE}
    with pytest.raises(LabelError, match=message):
        propose(**{**arguments, **change}, name="next", count=3)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("labels.extxyz", FRAMES)
    (tmp_path / "splits.json").write_text(json.dumps({"train": TRAIN, "valid": ["p4"], "test": ["p5"]}))
    write_plan("old.json", Plan("old", RECIPE, (make_job("j", "p0", "train", FRAMES[0], np.array([1.0, 0])),)))
    for k, member in enumerate([model(), model(0.1)]):
        save_model(member, f"{k}.safetensors")
    (tmp_path / "committee.json").write_text(json.dumps({"members": ["0.safetensors", "1.safetensors"]}))
    command = "label propose labels.extxyz --splits splits.json --recipe old.json --model committee.json --count 5"
    assert main([*command.split(), "--candidates", "32", "--report", "why.json", "-o", "next.json"]) == 0
    assert "5 jobs" in capsys.readouterr().out
    plan, why = read_plan("next.json"), json.loads((tmp_path / "why.json").read_text())
    assert plan.recipe == RECIPE
    assert [job.name for job in plan.jobs] == [f"next-{k}" for k in range(5)] == [row["job"] for row in why]
    assert main([*command.split(), "--candidates", "0", "-o", "x.json"]) == 2
    assert "--candidates is 0" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
