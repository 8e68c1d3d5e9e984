"""The studies behind the pages on training: equal budgets, honest judging, and what dynamics report."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import FixCom
from mmace_bench import ablations, finetuning, stability

from mmace.calculator import MMACECalculator
from mmace.data import LabelledStructure, Splits, groups_of, read_labels, read_splits
from mmace.derivatives import Evaluation
from mmace.graph import Graph
from mmace.training import Recipe
from mmace.training.evaluate import Prediction

FEAL = Path(ablations.__file__).parent / "FeAl"
SMALL = {"channels": 2, "max_ell": 1, "correlation": 2, "num_layers": 1, "num_chebyshev": 2, "radial_mlp": (4,)}
RECIPE = Recipe(model={**SMALL, "cutoff": 3.2}, batch_size=2, warmup_steps=2, restrain_every=2)


def label(parent: str, seed: int, group: str | None = None) -> LabelledStructure:
    rng = np.random.default_rng(seed)
    moments = rng.normal(size=(2, 3))
    return LabelledStructure(
        symbols=("Fe", "Fe"),
        positions=np.array([[0, 0, 0], [1.4, 1.4, 1.4 + 0.05 * rng.random()]]),
        cell=2.85 * np.eye(3),
        pbc=(True, True, True),
        moments=moments,
        energy=float(rng.normal(scale=1e-5 if group else 0.1)),
        forces=np.full((2, 3), np.nan) if group else rng.normal(size=(2, 3)),
        stress=np.full(6, np.nan) if group else 0.01 * rng.normal(size=6),
        magnetic_forces=np.full((2, 3), np.nan) if group else 0.1 * rng.normal(size=(2, 3)),
        magnetic_forces_parallel=np.full(2, np.nan),
        soc=group is not None,
        parent=parent,
        name=f"{parent}-{seed}",
        anisotropy_group=group,
    )


def group(parent: str, seed: int) -> list[LabelledStructure]:
    first = label(parent, seed, parent)
    other = label(parent, seed + 1, parent)
    return [first, replace(first, moments=first.moments[:, [1, 2, 0]], energy=other.energy)]


def toy_labels() -> tuple[list[LabelledStructure], Splits]:
    parents = [f"p{k}" for k in range(9)]
    labels = [label(parent, k) for k, parent in enumerate(parents)]
    labels += [x for k in range(3) for x in group(f"g{k}", 20 + 2 * k)] + group("gt", 40)
    train = frozenset([*parents[:7], "g0", "g1", "g2"])
    return labels, Splits(train, frozenset([parents[7]]), frozenset([parents[8], "gt"]))


@pytest.mark.parametrize("n_groups", [0, 3])
def test_labels_and_groups_fill_the_steps_exactly(n_groups: int) -> None:
    labels = [label("p", k) for k in range(7)] + [x for k in range(n_groups) for x in group(f"g{k}", 20 + k)]
    found = ablations.filled(labels, 10, 2)
    alone = ablations.single(found)
    assert len(alone) == 20
    counts = [sum(x is y for y in alone) for x in labels[:7]]
    assert max(counts) - min(counts) <= 1
    groups = groups_of(found)
    assert len(groups) == (10 if n_groups else 0)
    assert all(len(members) == 2 for members in groups)


def test_every_variant_makes_the_same_steps_and_passes(tmp_path: Path) -> None:
    labels, splits = toy_labels()
    rows = [
        ablations.run(variant, labels, splits, RECIPE, 8, 0, tmp_path / str(k))
        for k, variant in enumerate(ablations.VARIANTS)
    ]
    assert {row["steps"] for row in rows} == {8}
    assert {row["label_passes"] for row in rows} == {16}
    assert {row["group_passes"] for row in rows if row["groups"]} == {8}
    known = {row["variant"]: row["test"]["anisotropy_rmse_ueV_per_atom"] is not None for row in rows}
    assert known["without the exchange products"]
    assert not known["without moments (a plain MACE)"]
    learned = next(row for row in rows if "turned" in row["variant"])
    assert learned["change_when_turned_meV_per_atom"] > 0
    lines = ablations.table(rows).splitlines()
    assert [line.count("|") for line in lines[:9]] == [9] * 9
    assert "root mean square" in lines[-1]


def test_change_when_turned_is_that_of_the_energies() -> None:
    labels = [label("p", 0)] * 2 * ablations.TURNS
    nothing = np.zeros(0)
    energies = [1.0, 1.0, 1.0, 1.0, 5.002, 4.998, 5.002, 4.998]
    predicted = [Prediction(energy, nothing, nothing, nothing) for energy in energies]
    expected = 1.0 * np.sqrt(4 / 3 / 2)
    assert ablations.change_when_turned(labels, predicted) == pytest.approx(expected)


def test_a_number_of_steps_that_does_not_divide_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["ablations.py", "FeAl", "--steps", "915"])
    with pytest.raises(SystemExit):
        ablations.main()
    assert "multiple of 4" in capsys.readouterr().err


@pytest.mark.parametrize("system", ["FeAl", "CrN"])
def test_crystals_of_the_stability_study(system: str) -> None:
    labelled, others = stability.labelled_crystals(system), stability.other_crystals(system)
    assert not labelled.keys() & others.keys()
    for crystal in (labelled | others).values():
        assert 4 <= len(crystal.atoms) <= 8
        assert crystal.atoms.get_all_distances(mic=True)[np.triu_indices(len(crystal.atoms), 1)].min() > 1.8
        if crystal.stable:
            own, stable = crystal.atoms, labelled[crystal.stable].atoms
            for symbol in set(own.symbols):
                assert own.symbols.count(symbol) / len(own) == stable.symbols.count(symbol) / len(stable)


def test_the_harder_cells_leave_the_asked_ranges_and_keep_their_own() -> None:
    class Calculator:
        class Model:
            class config:
                moment_scale = {"Fe": 3.0}  # noqa: RUF012
                carriers = ("Fe",)

        models = (Model(),)

    crystal = stability.labelled_crystals("FeAl")["bcc Fe"].atoms
    for ranges in (stability.ASKED, stability.HARDER):
        rng = np.random.default_rng(0)
        cells = [stability.perturbed(crystal, ranges, Calculator(), rng) for _ in range(300)]
        volumes = np.array([cell.get_volume() for cell in cells]) / crystal.get_volume()
        assert 1 - ranges.compression < volumes.min() < 1 - 0.9 * ranges.compression
        assert 1 + 0.9 * ranges.expansion < volumes.max() < 1 + ranges.expansion
        sites = [crystal.positions * volume ** (1 / 3) for volume in volumes]
        moved = [np.linalg.norm(c.positions - s, axis=1).max() for c, s in zip(cells, sites, strict=True)]
        assert 0.95 * ranges.displacement < max(moved) < ranges.displacement
        moments = [np.linalg.norm(cell.get_initial_magnetic_moments(), axis=1).max() for cell in cells]
        assert 0.95 * ranges.moment * 3.0 < max(moments) < ranges.moment * 3.0


def test_holes_are_counted_by_member_and_by_cell() -> None:
    above = np.array([[0.1, -0.1, 0.3], [-0.06, -2.0, -0.04]])
    found = stability._counts(above, np.array([[True, True, False], [True, True, True]]))
    assert (found["cells"], found["members"]) == (3, 2)
    assert (found["holes"], found["cells_with_a_hole"], found["not_finite"]) == (3, 2, 1)
    assert found["lowest_above_ground_state_eV_per_atom"] == -2.0
    assert "| 3, 2 | 1 | 3 | -2.00 |" in stability.table_of_cells("asked", {"bcc Fe": found})


def test_walks_start_collinear_and_end_low() -> None:
    calculator = MMACECalculator("default", soc=False)
    crystal = stability.labelled_crystals("FeAl")["B2 FeAl"]
    carriers = calculator.models[0].config.carriers
    rng = np.random.default_rng(1)
    ranges = stability.Ranges(0.1, 0.1, 0.4, 0.0)
    cells = [stability.perturbed(crystal.atoms, ranges, calculator, rng) for _ in range(6)]
    starts = [stability.collinear(cell, crystal.moment, carriers, rng) for cell in cells]
    moments = np.array([start.get_initial_magnetic_moments() for start in starts])
    iron = np.array(list(crystal.atoms.symbols)) == "Fe"
    assert not moments[:, :, :2].any()
    assert not moments[:, ~iron].any()
    assert np.abs(moments[:, iron, 2]) == pytest.approx(crystal.moment)
    ferromagnetic = (moments[:, iron, 2] > 0).all(1)
    assert 0 < ferromagnetic.sum() < len(starts)

    def energies(some):
        graph = Graph.collate([Graph.from_atoms(a, calculator.elements, calculator.cutoff) for a in some])
        return (calculator.models[0].site_energies(graph).reshape(len(some), -1).mean(1)).detach().numpy()

    ideal = [crystal.atoms.copy() for _ in starts]
    for atoms, start in zip(ideal, starts, strict=True):
        atoms.set_cell(start.cell, scale_atoms=True)
        atoms.set_initial_magnetic_moments(start.get_initial_magnetic_moments())
    gain = energies(starts) - stability.lowest_on_the_way(calculator.models[0], starts)
    assert gain.min() > 0
    assert gain == pytest.approx(energies(starts) - energies(ideal), abs=0.05)


def test_walks_start_from_primitive_cells() -> None:
    crystals = stability.labelled_crystals("FeAl") | stability.labelled_crystals("CrN")
    found = {name: stability.primitive(crystal.atoms) for name, crystal in crystals.items()}
    sizes = {"bcc Fe": 1, "B2 FeAl": 2, "DO3 Fe3Al": 4, "rocksalt CrN": 2, "bcc Cr": 1}
    assert {name: len(atoms) for name, atoms in found.items()} == sizes
    for name, atoms in found.items():
        whole = crystals[name].atoms
        assert atoms.get_volume() / len(atoms) == pytest.approx(whole.get_volume() / len(whole))


def test_walks_are_counted_by_member_against_the_stable_crystal(monkeypatch) -> None:
    monkeypatch.setattr(stability, "CELLS_AT_ONCE", 2)
    monkeypatch.setattr(stability, "STEPS_DOWNHILL", 1)
    calculator = MMACECalculator("default", soc=False)
    crystals = {"hcp Fe": stability.other_crystals("FeAl")["hcp Fe"]}
    seen = []

    def lowest(model, starts):
        seen.append((model, len(starts)))
        assert {len(atoms) for atoms in starts} <= {4, 8}
        assert {abs(m[2]) for atoms in starts for m in atoms.get_initial_magnetic_moments()} == {2.2}
        return np.full(len(starts), -8.0 - 0.06 * calculator.models.index(model))

    monkeypatch.setattr(stability, "lowest_on_the_way", lowest)
    found = stability.walks_downhill(crystals, {"bcc Fe": -8.0, "hcp Fe": -7.0}, calculator, 3)["hcp Fe"]
    assert [(calculator.models.index(model), count) for model, count in seen] == [
        (k, n) for k in range(4) for n in (2, 1)
    ]
    assert (found["cells"], found["members"], found["holes"], found["not_finite"]) == (3, 4, 9, 0)
    assert found["lowest_above_ground_state_eV_per_atom"] == pytest.approx(-0.18)


def test_one_number_that_is_not_finite_marks_its_structure() -> None:
    atoms = stability.labelled_crystals("FeAl")["DO3 Fe3Al"].atoms
    atoms.set_initial_magnetic_moments(np.zeros((4, 3)))
    graph = Graph.collate([Graph.from_atoms(atoms, ("Al", "Fe"), 3.0)] * 3)
    forces = graph.positions.clone()
    forces[5, 1] = np.nan
    energy = graph.positions.new_zeros(3)
    found = Evaluation(energy=energy, site_energies=energy, forces=forces, stress=None, magnetic_forces=None)
    assert stability._finite(found, graph).tolist() == [True, False, True]


class Springs(Calculator):
    """Atoms held to their sites, their mean left free."""

    implemented_properties = ("energy", "forces")
    stiffness = 0.5

    def __init__(self, sites: np.ndarray) -> None:
        super().__init__()
        self.sites = sites

    def calculate(self, atoms=None, properties=None, system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        u = atoms.positions - self.sites
        u = u - u.mean(0)
        self.results = {"energy": 0.5 * self.stiffness * (u**2).sum(), "forces": -self.stiffness * u}


def test_the_thermostat_holds_its_temperature_with_unequal_masses() -> None:
    atoms = Atoms("UHUHUHUH", positions=3.0 * np.arange(24).reshape(8, 3))
    rng = np.random.default_rng(0)
    sites = atoms.positions.copy()
    for _ in range(2):
        atoms = stability.moved(atoms, sites, Springs(sites), 300.0, 2500, rng)
    assert atoms.info["mean_temperature_K"] == pytest.approx(300.0, rel=0.15)
    assert np.abs(atoms.get_momenta().sum(0)).max() < 1e-8


def test_the_largest_displacement_is_that_of_any_step() -> None:
    sites = np.array([[0.0, 0, 0], [3.0, 0, 0]])
    atoms = Atoms("Fe2", positions=sites)
    speed = 0.05 / units.fs
    atoms.set_momenta(atoms.get_masses()[:, None] * speed * np.array([[1.0, 0, 0], [-1.0, 0, 0]]))
    period = 2 * np.pi * np.sqrt(atoms.get_masses()[0] / Springs.stiffness)
    steps = round(period / 2 / (stability.TIME_STEP * units.fs))
    ended = stability.moved(atoms, sites, Springs(sites), 0.0, steps, np.random.default_rng(0))
    assert ended.info["farthest_A"] > 1.5 * np.linalg.norm(ended.positions - sites, axis=1).max()
    assert isinstance(ended.constraints[0], FixCom)


def test_the_temperature_of_a_run_is_that_of_its_second_half() -> None:
    frames = [Atoms("Fe") for _ in range(5)]
    for frame, temperature, farthest in zip(frames[1:], (900, 800, 290, 310), (0.1, 0.4, 0.2, 0.3), strict=True):
        frame.info = {"mean_temperature_K": temperature, "farthest_A": farthest}
    found = stability.summary(frames, "")
    assert (found["picoseconds"], found["mean_temperature_K"], found["standard_error_K"]) == (4, 300.0, 10.0)
    assert found["largest_displacement_A"] == 0.4
    assert "| bcc Fe, 300 K | 4 | 300 ± 10 | 0.40 |" in stability.table_of_dynamics({"bcc Fe, 300 K": found})
    empty = stability.summary(frames[:1], "atoms overlap")
    assert "atoms overlap" in stability.table_of_dynamics({"x": empty})


def test_parts_of_the_fine_tuning_study_share_no_parent() -> None:
    labels = [x for x in read_labels(sorted(FEAL.glob("data/*abinit*.extxyz"))) if x.anisotropy_group is None]
    splits = read_splits(FEAL / "splits.json")
    study = finetuning.study_of(labels, splits)
    assert len(study.judging) >= finetuning.JUDGING
    assert len(study.pool) >= 100
    parents = [{x.parent for x in part} for part in (study.pool, study.choosing, study.judging)]
    assert sum(map(len, parents)) == len(set.union(*parents))
    assert not set.union(*parents) & splits.test
    assert parents[1] <= splits.valid
    assert parents[2] <= splits.train


def test_labels_are_set_aside_by_small_parents() -> None:
    labels = [label(f"p{k}", 10 * k + n) for k in range(6) for n in range(2)] + [label("large", n) for n in range(9)]
    left, aside = finetuning.set_aside(labels, 5)
    assert len(aside) == 6
    assert not {x.parent for x in left} & {x.parent for x in aside}
    assert "large" not in {x.parent for x in aside}


@pytest.mark.parametrize("size", [20, 50, 100])
def test_ways_of_fine_tuning_have_the_same_number_of_steps(size: int) -> None:
    for in_epoch in (size, 2 * size):
        recipe = finetuning.with_steps(finetuning.FIRST, in_epoch, 1600)
        assert recipe.epochs * -(-in_epoch // recipe.batch_size) == 1600


def test_a_seed_of_the_fine_tuning_study_is_resumed_to_the_same_rows(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(finetuning, "FIRST", replace(finetuning.FIRST, model={**SMALL, "cutoff": 3.2}))
    some = [label("p", k) for k in range(8)]
    study = finetuning.Study(some, some[:1], some[:6], some[6:7], some[7:])
    first = finetuning.rows_of_seed(study, [4], 4, 2, 1, tmp_path)
    assert first == finetuning.rows_of_seed(study, [4], 4, 2, 1, tmp_path)
    assert [row["labels"] for row in first] == [0, 4, 4, 4]
    other = finetuning.rows_of_seed(study, [4], 4, 2, 2, tmp_path)
    lines = finetuning.table([*first, *other]).splitlines()
    assert len(lines) == 6
    assert " to " in lines[-1]
    assert lines[3].endswith("|  |")
