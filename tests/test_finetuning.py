"""Fine-tuning from trained weights, and training by several processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from mmace.cli import main
from mmace.data import read_labels
from mmace.derivatives import evaluate
from mmace.errors import LabelError, UnknownElementError
from mmace.graph import Graph
from mmace.io import file_hash, load_model, model_files, read_metadata, save_model
from mmace.model import MagneticMACE, ModelConfig
from mmace.training import Recipe, errors_of, predict, train
from mmace.training.batches import LabelBatch
from mmace.training.cli import _hashes
from mmace.training.distributed import Processes, part_of_probe
from mmace.training.finetune import check_labels, energy_shifts, finetune_recipe, shifted, starting_model
from mmace.training.loop import Start
from mmace.training.recipe import RecipeError
from mmace.training.restraint import make_probe, restraint_loss, spin_orbit_loss

CONFIG = ModelConfig(
    elements=("Al", "Fe"),
    moment_scale={"Al": 1.0, "Fe": 3.0},
    carriers=("Fe",),
    atomic_energies={"Al": -50.0, "Fe": -600.0},
    avg_num_neighbors=6.0,
    num_chebyshev=2,
    channels=2,
    max_ell=1,
    correlation=2,
    num_layers=1,
    num_bessel=3,
    radial_mlp=(4,),
    cutoff=3.2,
    readout_hidden=4,
)
RECIPE = Recipe(epochs=2, batch_size=3, groups_per_step=2, validate_every=1, warmup_steps=2, restrain_every=2)


def random_model(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MagneticMACE(CONFIG).requires_grad_(False)


def frames_of(model, symbols, count, parent, seed, soc=False):
    """Labels of a random potential: two atoms, non-collinear; with `soc`, energies of four directions each."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        atoms = Atoms(symbols, scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.48]], cell=[2.8, 2.9, 3.0], pbc=True)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.uniform(-0.03, 0.03, (3, 3))), scale_atoms=True)
        size = np.where(atoms.numbers == 26, 1.8, 0.0)
        for d in range(4 if soc else 1):
            axis = rng.normal(size=3)
            frame = atoms.copy()
            frame.set_initial_magnetic_moments(np.outer(size, axis / np.linalg.norm(axis)))
            graph = Graph.from_atoms(frame, model.elements, model.config.cutoff, soc=float(soc))
            result = evaluate(model, graph, forces=True, stress=True, magnetic_forces=True)
            frame.info.update({"soc": int(soc), "parent": parent, "name": f"{parent}-{k}-{d}"})
            if soc:
                # random weights have an anisotropy that is hardly above rounding
                change = float(result.energy - evaluate(model, replace(graph, soc=0 * graph.soc)).energy)
                frame.info["anisotropy_group"] = f"{parent}-group-{k}"
                frame.calc = SinglePointCalculator(frame, energy=1e7 * change)
            else:
                frame.calc = SinglePointCalculator(
                    frame,
                    energy=float(result.energy),
                    forces=result.forces.numpy(),
                    stress=result.stress[0].numpy(),
                )
                frame.arrays["magnetic_forces"] = result.magnetic_forces.numpy()
            yield frame


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    teacher = random_model(1)
    parts = {
        "old": [*frames_of(teacher, "FeFe", 5, "old", 0), *frames_of(teacher, "FeFe", 2, "old", 1, soc=True)],
        "train": [*frames_of(teacher, "FeAl", 5, "new", 2), *frames_of(teacher, "FeAl", 3, "new", 3, soc=True)],
        "valid": [*frames_of(teacher, "FeAl", 3, "val", 4), *frames_of(teacher, "FeAl", 1, "val", 5, soc=True)],
    }
    for name, frames in parts.items():
        write(folder / f"{name}.extxyz", frames)
    save_model(random_model(2), folder / "start.safetensors", {"recipe": json.dumps(Recipe(clip=50.0).to_dict())})
    return folder


@pytest.fixture(scope="module")
def labels(files):
    return {part: read_labels(files / f"{part}.extxyz") for part in ("old", "train", "valid")}


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# Fine-tuning


def test_recipe_is_ten_times_slower(files):
    recipe = finetune_recipe(read_metadata(files / "start.safetensors"))
    assert recipe.learning_rate == Recipe().learning_rate / 10
    assert recipe.final_learning_rate == Recipe().final_learning_rate / 10
    assert recipe.clip == 5.0
    assert recipe.patience < Recipe().patience
    assert finetune_recipe({}).clip == Recipe().clip / 10


def test_rates_are_those_of_the_fastest_stage_of_all_weights():
    stages = [Recipe(learning_rate=0.02, clip=70.0), Recipe(learning_rate=0.001, clip=900.0, batch_size=24)]
    part = Recipe(learning_rate=0.5, clip=1e5, part="spin_orbit")
    notes = {
        "recipe": json.dumps(part.to_dict()),
        "earlier": json.dumps([{"recipe": json.dumps(s.to_dict())} for s in stages]),
    }
    found = finetune_recipe(notes)
    assert (found.learning_rate, found.clip, found.batch_size) == (0.002, 90.0, Recipe().batch_size)


def test_few_labels_are_gone_through_more_often(labels):
    """8 labels in batches of 24 made a hundred steps, which moved nothing."""
    single = [label for label in labels["train"] if label.anisotropy_group is None]
    group = [replace(single[0], soc=True, anisotropy_group="a"), replace(single[1], soc=True, anisotropy_group="a")]

    def steps(labels, replay_fraction=0.0):
        recipe = finetune_recipe({}, labels, replay_fraction)
        assert recipe.epochs // recipe.validate_every == pytest.approx(100, abs=20)
        assert recipe.patience == round(0.3 * recipe.epochs)
        return recipe.epochs

    assert steps(single[:1]) == steps(single[:1] * 6) == steps(group * 3) == 1600
    assert steps(single[:1] * 8) == 800
    assert steps(single[:1] * 8, 0.5) == 534
    assert steps(single[:1] * 600) == steps(single[:1] * 6000) == 100


def test_a_stage_of_the_spin_orbit_part_is_no_recipe_for_all_weights():
    whole = Recipe(learning_rate=0.02, restrain_every=7)
    part = Recipe(learning_rate=0.5, part="spin_orbit", restart=True)
    stages = [{"recipe": json.dumps(Recipe(learning_rate=0.001).to_dict())}, {"recipe": json.dumps(whole.to_dict())}]
    found = finetune_recipe({"recipe": json.dumps(part.to_dict()), "earlier": json.dumps(stages)})
    assert (found.learning_rate, found.restrain_every, found.part, found.restart) == (0.002, 7, "all", False)


def test_what_was_chosen_for_the_own_labels_is_not_passed_on():
    crystals = {"CrN": 4.0, "others": 1.0}
    own = Recipe(least_stiffness=crystals, shake_weight=crystals, canted_repeats=10)
    recipe = finetune_recipe({"recipe": json.dumps(own.to_dict())})
    assert (recipe.least_stiffness, recipe.shake_weight) == (Recipe().least_stiffness, Recipe().shake_weight)
    assert recipe.canted_repeats == 1


def test_validation_chooses_when_the_shipped_models_are_tuned():
    """Their own training kept the last weights, over a floor that was chosen for their crystals."""
    for file in model_files("default"):
        recipe = finetune_recipe(read_metadata(file))
        assert recipe.keep == "best"
        assert recipe.least_stiffness == Recipe().least_stiffness


def test_moments_on_elements_without_moments_are_refused(labels):
    label = next(x for x in labels["train"] if not x.soc)
    moments = label.moments.copy()
    moments[label.symbols.index("Al")] = [0.0, 0.0, 0.05]
    check_labels(random_model(2), [replace(label, moments=moments)])
    moments[label.symbols.index("Al")] = [0.0, 0.0, 0.4]
    with pytest.raises(LabelError, match=r"0\.40 µB on Al, whose moments the model does not know"):
        check_labels(random_model(2), [replace(label, moments=moments)])


def test_start_from_weights_and_exact_resume(labels, tmp_path):
    model = random_model(2)
    before = weights_of(model)
    start = Start(model, labels["old"], 0.5)
    still = replace(RECIPE, learning_rate=1e-12, final_learning_rate=1e-12, epochs=1)
    outcome = train(labels["train"], labels["valid"], still, tmp_path / "still", start=start)
    moved = weights_of(outcome.model)
    assert all(torch.allclose(moved[k], before[k], atol=1e-9) for k in before)
    moving = replace(RECIPE, keep="last")
    whole = train(labels["train"], labels["valid"], moving, tmp_path / "whole", start=start)
    train(labels["train"], labels["valid"], moving, tmp_path / "parts", start=start, stop_after=1)
    parts = train(labels["train"], labels["valid"], moving, tmp_path / "parts", start=start)
    assert same(weights_of(whole.model), weights_of(parts.model))
    assert not same(weights_of(whole.model), before)
    assert same(weights_of(model), before)
    with pytest.raises(ValueError, match="other labels, recipe or seed"):
        train(labels["train"], labels["valid"], moving, tmp_path / "parts", start=Start(random_model(3)))
    with pytest.raises(ValueError, match="other labels, recipe or seed"):
        train(labels["train"], labels["valid"], moving, tmp_path / "parts", start=Start(model))


def test_the_start_is_kept_where_no_epoch_is_better(files, tmp_path, capsys):
    """Labels that validate are the start's own, those that train come from another potential."""
    model = random_model(5)
    frames = frames_of(model, "Fe2", 3, "own", 8)
    write(tmp_path / "valid.extxyz", frames)
    save_model(model, tmp_path / "start.safetensors", {})
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE.to_dict()))
    command = ["finetune", "--from", str(tmp_path / "start.safetensors"), "--train", str(files / "train.extxyz")]
    command += ["--valid", str(tmp_path / "valid.extxyz"), "--recipe", str(tmp_path / "recipe.json")]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert "none better than the start" in " ".join(capsys.readouterr().out.split())
    assert same(weights_of(load_model(tmp_path / "run" / "model.safetensors")), weights_of(model))
    assert read_metadata(tmp_path / "run" / "model.safetensors")["best_epoch"] == "0"


def strong_spin_orbit(seed):
    """A random potential with spin-orbit features as large as the others; `seed` changes these alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = MagneticMACE(replace(CONFIG, spin_orbit_scale=1.0)).requires_grad_(False)
        torch.manual_seed(seed)
        for name, weights in model.named_parameters():
            if ".spin_orbit." in name:
                weights.copy_(torch.randn(weights.shape))
    return model


def judged_by(model, labels, factor=1.0):
    """Labels whose groups have the anisotropy of a potential, times a factor."""
    groups = [x for x in labels if x.anisotropy_group is not None]
    found = predict(model, groups)
    return [
        *(x for x in labels if x.anisotropy_group is None),
        *(replace(x, energy=factor * p.energy) for x, p in zip(groups, found, strict=True)),
    ]


def anisotropy_error(model, labels):
    groups = [x for x in labels if x.anisotropy_group is not None]
    return errors_of(groups, predict(model, groups)).to_dict()["anisotropy_rmse_ueV_per_atom"]


def test_the_spin_orbit_part_alone(labels, tmp_path):
    """Whatever the model says without spin-orbit coupling stays to the last bit; anisotropy is learned."""
    model, target = strong_spin_orbit(3), strong_spin_orbit(4)
    known, valid = judged_by(target, labels["train"]), judged_by(target, labels["valid"])
    before = weights_of(model)
    recipe = replace(RECIPE, part="spin_orbit", epochs=60, learning_rate=0.05, spin_orbit_decay=0.0, restrain_every=0)
    outcome = train(known, valid, recipe, tmp_path / "run", start=Start(model))
    after = weights_of(outcome.model)
    moved = [name for name in before if ".spin_orbit." in name]
    assert moved
    assert all(torch.equal(before[name], after[name]) != (name in moved) for name in before)
    assert anisotropy_error(outcome.model, known) < 0.3 * anisotropy_error(model, known)
    train(known, valid, recipe, tmp_path / "parts", start=Start(model), stop_after=30)
    parts = train(known, valid, recipe, tmp_path / "parts", start=Start(model))
    assert same(after, weights_of(parts.model))


def test_the_spin_orbit_part_alone_keeps_its_bound_elsewhere(labels, tmp_path):
    """Structures without anisotropy labels stay near the largest anisotropy that labels have."""
    model = strong_spin_orbit(3)
    known = judged_by(model, labels["train"], 1e-2)
    recipe = replace(RECIPE, part="spin_orbit", epochs=40, learning_rate=0.02, keep="last", patience=100)
    elsewhere = [x for x in labels["old"] if not x.soc]
    largest = []
    for every in (0, 1):
        settings = replace(recipe, restrain_every=every)
        start = Start(model, elsewhere, 0.5)
        tuned = train(known, labels["valid"], settings, tmp_path / str(every), start=start).model
        with_coupling = predict(tuned, [replace(x, soc=True) for x in elsewhere])
        without = predict(tuned, elsewhere)
        largest.append(max(abs(a.energy - b.energy) for a, b in zip(with_coupling, without, strict=True)))
    assert largest[1] < 0.7 * largest[0]


def test_spin_orbit_energies_are_bounded_in_shaken_crystals_too(labels, tmp_path, monkeypatch):
    seen = []

    def recorded(model, graph, bound, generator):
        seen.append(graph.counts.tolist())
        return spin_orbit_loss(model, graph, bound, generator)

    monkeypatch.setattr("mmace.training.loop.spin_orbit_loss", recorded)
    for part in ("all", "spin_orbit"):
        recipe = replace(RECIPE, part=part, epochs=1, restrain_every=1)
        train(labels["train"], labels["valid"], recipe, tmp_path / part, start=Start(strong_spin_orbit(3)))
        assert seen
        for counts in seen:
            assert sum(count == 2 for count in counts) == sum(count >= 4 for count in counts) == len(counts) / 2
        seen.clear()


def test_a_restart_forgets_the_spin_orbit_weights_alone(labels, tmp_path):
    model = strong_spin_orbit(3)
    before = weights_of(model)
    still = replace(RECIPE, part="spin_orbit", restart=True, epochs=2, learning_rate=1e-12, final_learning_rate=0.0)

    def restarted(folder, seed, **options):
        start = Start(model)
        return weights_of(
            train(labels["train"], labels["valid"], still, folder, seed=seed, start=start, **options).model
        )

    first, other = restarted(tmp_path / "0", 0), restarted(tmp_path / "1", 1)
    for name in before:
        if ".spin_orbit." in name:
            assert len({float(w[name].flatten()[0]) for w in (before, first, other)}) == 3
            assert 0.5 < float(first[name].std() / before[name].std()) < 2.0
        else:
            assert torch.equal(first[name], before[name])
    restarted(tmp_path / "parts", 0, stop_after=1)
    assert same(restarted(tmp_path / "parts", 0), first)
    assert same(weights_of(model), before)
    with pytest.raises(RecipeError, match="restarts all weights"):
        replace(RECIPE, restart=True)
    with pytest.raises(RecipeError, match="restart is 1: give true or false"):
        replace(RECIPE, part="spin_orbit", restart=1)


def test_training_the_spin_orbit_part_alone_is_refused_where_it_cannot_be(labels, tmp_path):
    recipe = replace(RECIPE, part="spin_orbit")
    with pytest.raises(RecipeError, match="needs a trained model around it"):
        train(labels["train"], labels["valid"], recipe, tmp_path)
    without = MagneticMACE(replace(CONFIG, spin_orbit=False))
    with pytest.raises(RecipeError, match="the model is without spin-orbit coupling"):
        train(labels["train"], labels["valid"], recipe, tmp_path, start=Start(without))
    single = [x for x in labels["train"] if not x.soc]
    with pytest.raises(LabelError, match="no training label has spin-orbit coupling"):
        train(single, labels["valid"], recipe, tmp_path, start=Start(random_model(2)))
    with pytest.raises(RecipeError, match="choose all or spin_orbit"):
        replace(RECIPE, part="spin-orbit")


def test_replay_has_its_share_and_changes_from_epoch_to_epoch(labels, tmp_path):
    from mmace.training.loop import _Run

    def run_of(fraction):
        start = Start(random_model(2), labels["old"], fraction)
        folder = tmp_path / str(fraction)
        folder.mkdir()
        device = torch.device("cpu")
        return _Run(labels["train"], labels["valid"], RECIPE, folder, 0, False, device, {}, start)

    run = run_of(0.25)  # 5 labels and 3 groups are new: a third as many, 5 : 2, are old
    assert (run.replayed, run.replayed_groups) == (2, 1)
    seen = []
    for run.epoch in range(4):
        batches = run._epoch_batches()
        drawn = [label for part, _ in batches for label in part]
        assert sum(any(label is x for x in run.labels) for label in drawn) == 5
        seen.append(tuple(k for k, x in enumerate(run.replay) if any(label is x for label in drawn)))
        assert len(seen[-1]) == 2
    assert len(set(seen)) > 1
    assert run_of(0.0)._replay_counts() == (0, 0)
    few = run_of(0.9)  # nine times as many as the 8 new ones, more than there are
    drawn = [x for labels_of_step, groups in few._epoch_batches() for x in (*labels_of_step, *groups)]
    assert len(drawn) == 80
    times = [sum(x is known for x in drawn) for known in few.replay]
    assert max(times) - min(times) <= 1 < min(times)


def test_labels_a_model_cannot_learn_are_refused(labels):
    model = random_model(2)
    nickel = replace(labels["train"][0], symbols=("Ni", "Al"))
    with pytest.raises(UnknownElementError, match="Ni"):
        starting_model(model, [nickel], False, [])
    long = replace(labels["train"][0], moments=2.0 * labels["train"][0].moments)
    with pytest.raises(LabelError, match="µB on Fe"):
        starting_model(model, [long], False, [])
    with pytest.raises(LabelError, match="only one of the two"):
        starting_model(model, labels["train"], True, labels["old"])
    without = MagneticMACE(replace(CONFIG, spin_orbit=False)).requires_grad_(False)
    with pytest.raises(LabelError, match="spin-orbit"):
        starting_model(without, labels["train"], True, [])


def test_another_zero_of_energy_is_seen_and_fitted(labels):
    teacher = random_model(1)
    single = [x for x in [*labels["old"], *labels["train"]] if not x.soc]
    offset = {"Fe": 7.0, "Al": -3.0}
    moved = [replace(x, energy=x.energy + sum(offset[s] for s in x.symbols)) for x in single]
    shifts, _ = energy_shifts(teacher, moved)
    assert shifts == {z: pytest.approx(offset[z], abs=1e-4) for z in offset}
    predicted = predict(shifted(teacher, shifts), moved)
    assert [p.energy for p in predicted] == pytest.approx([x.energy for x in moved], abs=1e-3)
    with pytest.raises(LabelError, match="--shift-energies"):
        starting_model(teacher, moved, False, [])
    assert starting_model(teacher, single, False, []) is teacher
    iron = [x for x in moved if "Al" not in x.symbols]
    assert energy_shifts(teacher, iron)[0]["Al"] == 0.0


def test_command_line_tunes_every_member(files, tmp_path, capsys):
    save_model(random_model(3), tmp_path / "b.safetensors", {})
    members = [str(files / "start.safetensors"), str(tmp_path / "b.safetensors")]
    (tmp_path / "committee.json").write_text(json.dumps({"members": members}))
    (tmp_path / "recipe.json").write_text(json.dumps(replace(RECIPE, epochs=1, keep="last").to_dict()))
    new = [
        "--train",
        str(files / "train.extxyz"),
        "--valid",
        str(files / "valid.extxyz"),
        "--out",
        str(tmp_path / "run"),
    ]
    command = ["finetune", "--from", str(tmp_path / "committee.json"), *new, "--recipe", str(tmp_path / "recipe.json")]
    replay = ["--replay", str(files / "old.extxyz"), "--replay-fraction", "0.5"]
    assert main([*command, *replay[:2], "--replay-fraction", "1.0"]) == 2
    assert "give at least 0 and below 1" in capsys.readouterr().err
    for option in (["--replay-fraction", "0.5"], ["--replay-splits", "s.json"]):
        assert main([*command, *option]) == 2
        assert f"{option[0]} is for replayed labels" in capsys.readouterr().err
    assert main([*command, *replay, "--shift-energies"]) == 2
    assert "only one of the two" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--replay", str(files / "valid.extxyz")]) == 2
    assert "is replayed, but validates or tests" in capsys.readouterr().err
    assert main([*command, *replay]) == 0
    notes = read_metadata(tmp_path / "run" / "member-1" / "model.safetensors")
    assert json.loads(notes["finetuned_from"]).keys() == {"b.safetensors"}
    first = read_metadata(tmp_path / "run" / "member-0" / "model.safetensors")
    assert [json.loads(stage["recipe"])["clip"] for stage in json.loads(first["earlier"])] == [50.0]
    assert json.loads(notes["replay"])["fraction"] == 0.5
    assert json.loads((tmp_path / "run" / "committee.json").read_text())["members"][1].startswith("member-1")
    again = [
        *command,
        "--from",
        str(tmp_path / "run" / "committee.json"),
        "--out",
        str(tmp_path / "again"),
        "--seed",
        "7",
    ]
    assert main(again) == 0
    last = read_metadata(tmp_path / "again" / "member-0" / "model.safetensors")
    stages = json.loads(last["earlier"])
    assert [stage.get("seed") for stage in stages] == [None, "0"]
    assert stages[1]["finetuned_from"] == first["finetuned_from"]
    assert last["seed"] == "7"
    assert main([*command, *replay, "--out", str(tmp_path / "anisotropy"), "--part", "spin_orbit"]) == 0
    for number, file in enumerate(members):
        tuned = tmp_path / "anisotropy" / f"member-{number}" / "model.safetensors"
        assert json.loads(read_metadata(tuned)["recipe"])["part"] == "spin_orbit"
        before, after = weights_of(load_model(file)), weights_of(load_model(tuned))
        assert all(torch.equal(before[name], after[name]) for name in before if ".spin_orbit." not in name)
        assert not same(before, after)


def test_hashes_tell_files_of_one_name_apart(tmp_path):
    for system in ("FeAl", "CrN"):
        (tmp_path / system / "data").mkdir(parents=True)
        (tmp_path / system / "data" / "labels.extxyz").write_text(system)
    paths = [str(tmp_path / system / "data" / "labels.extxyz") for system in ("FeAl", "CrN")]
    assert _hashes(paths) == {
        f"{system}/data/labels.extxyz": file_hash(path) for system, path in zip(("FeAl", "CrN"), paths, strict=True)
    }
    assert _hashes(paths[:1] * 2).keys() == {"labels.extxyz"}


# Several processes


def test_a_part_of_a_probe_is_the_probe_of_the_part(labels):
    model = random_model(2)
    singles = [LabelBatch.of(x, model, RECIPE.tolerances) for x in [*labels["train"], *labels["old"]] if not x.soc]
    probe = make_probe(model, LabelBatch.collate(singles), torch.Generator().manual_seed(4))
    shares = [Processes(rank, 3).share(range(len(singles))) for rank in range(3)]
    assert sorted(k for share in shares for k in share) == list(range(len(singles)))
    parts = [part_of_probe(probe, share) for share in shares]
    sizes = [len(share) for share in shares]
    losses = [float(restraint_loss(model, part)) * size for part, size in zip(parts, sizes, strict=True)]
    whole = float(restraint_loss(model, probe)) * len(singles)
    assert whole > 0.0
    assert sum(losses) == pytest.approx(whole, rel=1e-10)


def run_processes(count, files, out, recipe):
    command = [
        "train",
        "--train",
        str(files / "train.extxyz"),
        "--valid",
        str(files / "valid.extxyz"),
        "--out",
        str(out),
    ]
    code = "import sys; from mmace.cli import main; sys.exit(main(sys.argv[1:]))"
    script = out.parent / "run.py"
    script.write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [*launch, str(script), *command, "--recipe", str(recipe), "--threads", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return records, load_model(out / "model.safetensors")


@pytest.mark.timeout(900)
def test_two_processes_follow_the_curve_of_one(files, labels, tmp_path):
    settings = {k: v for k, v in vars(CONFIG).items() if k in ("channels", "max_ell", "correlation", "num_layers")}
    small = {**settings, "num_bessel": 3, "radial_mlp": (4,), "cutoff": 3.2, "readout_hidden": 4, "num_chebyshev": 2}
    recipe = replace(RECIPE, model=small, epochs=3)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    one = train(labels["train"], labels["valid"], recipe, tmp_path / "one")
    records = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    both, model = run_processes(2, files, tmp_path / "two", tmp_path / "recipe.json")
    assert len(both) == len(records) == 3
    for ours, theirs in zip(records, both, strict=True):
        for key in ("train_loss", "valid_loss"):
            assert theirs[key] == {name: pytest.approx(value, rel=1e-8, abs=1e-12) for name, value in ours[key].items()}
        assert theirs["valid_score"] == pytest.approx(ours["valid_score"], rel=1e-8)
    first, second = weights_of(one.model), weights_of(model)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=1e-7, atol=1e-10), name
