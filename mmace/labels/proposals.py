"""Proposals: what to label next, chosen where the members of a committee disagree.

Candidates are training structures after random strains, displacements, changes of moments, and short random walks of
positions and moments at a temperature on the committee's own surface. Those on which the members disagree most are
taken, not too many from one parent and none twice. Labels of other than training parents are never looked at, not even
to leave out what they hold already, and a proposal keeps the parent it came from, so the splits stay what they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list
from ase.units import kB

from ..derivatives import evaluate
from ..errors import LabelError
from ..graph import Graph
from ..io import load_model, model_files
from ..model import MagneticMACE
from .gate import fingerprint
from .plan import Job, Plan, Recipe, make_job

LARGEST_STRAIN = 0.06
LARGEST_VOLUME_CHANGE = 0.12
LARGEST_DISPLACEMENT = 0.15  # Å
CLOSEST = 0.7  # of the sum of covalent radii
SAME = 0.02  # relative distance of fingerprints of two states that are too alike
WALK_STEPS = 20
WALK_TEMPERATURE = 800.0  # K
POSITION_MOBILITY = 0.01  # Å²/eV per step
MOMENT_MOBILITY = 0.1  # µB²/eV per step
GRAPHS_AT_ONCE = 32
SCALES = {"energy": 0.002, "forces": 0.03, "magnetic_forces": 0.015}
"""Spread that counts as one: eV/atom, eV/Å, eV/µB."""


@dataclass(frozen=True)
class Candidate:
    """A structure that might be labelled.

    Attributes
    ----------
    atoms : Atoms
        With `initial_magmoms` (N, 3), µB.
    parent : str
        The training parent it came from.
    origin : str
        `strain`, `displacement`, `moments` or `walk`.
    energy : float
        Mean of the committee, eV/atom.
    spread : mapping
        Standard deviations over the members: `energy` eV/atom, `forces` eV/Å and `magnetic_forces` eV/µB, the largest
        over atoms.
    """

    atoms: Atoms
    parent: str
    origin: str
    energy: float = np.nan
    spread: Mapping[str, float] | None = None

    @property
    def score(self) -> float:
        """Disagreement of the committee in units of the loss' tolerances."""
        assert self.spread is not None
        return float(np.sqrt(np.mean([(self.spread[key] / scale) ** 2 for key, scale in SCALES.items()])))


def propose(
    frames: Sequence[Atoms],
    train_parents: Collection[str],
    models: Sequence[MagneticMACE],
    recipe: Recipe,
    name: str,
    count: int,
    candidates: int = 400,
    per_parent: int = 3,
    max_atoms: int = 8,
    window: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Plan, list[Candidate]]:
    """Plan of the next labels.

    Parameters
    ----------
    frames : sequence of Atoms
        Labels at hand, with info `parent` and `name`; those with spin-orbit coupling are left out.
    train_parents : collection of str
        Parents that may be used.
    models : sequence of MagneticMACE
        The committee.
    recipe : labels.Recipe
        Recipe of the plan; a collinear one gets moments along z.
    name : str
        Name of the plan, and the beginning of its jobs' names; their numbers go on after those of the labels at hand.
    count : int
        Labels wanted.
    candidates : int
        Structures to choose from.
    per_parent : int
        Largest number of proposals from one parent.
    max_atoms : int
        Larger structures are left out.
    window : float
        Largest energy above the lowest candidate of the same composition, eV/atom.
    seed : int
    progress : callable
        Called with the number of candidates done and their total.

    Returns
    -------
    Plan
        Jobs in falling order of disagreement; every one of the split `train`.
    list of Candidate
        The chosen ones, in the same order.

    Raises
    ------
    LabelError
        The committee has fewer than two members, or no frame can be used.
    """
    if len(models) < 2:
        raise LabelError("proposals need a committee of two or more models: give a .json list of members")
    if recipe.engine != "abinit":
        raise LabelError(f"proposals are for constrained moments (engine abinit), not for {recipe.engine}")
    allowed = set(train_parents)
    known = [atoms for atoms in frames if not atoms.info.get("soc", 0) and atoms.info.get("parent") in allowed]
    bases = [atoms for atoms in known if len(atoms) <= max_atoms]
    if not bases:
        raise LabelError(f"no label of a training parent has at most {max_atoms} atoms: nothing to start from")
    rng = np.random.default_rng(seed)
    longest = _longest_moments(known, recipe.carriers)
    drawn = [_draw(bases, longest, bool(recipe.settings["noncollinear"]), rng) for _ in range(candidates)]
    rated: list[Candidate] = []
    for start in range(0, len(drawn), GRAPHS_AT_ONCE):
        chunk = _walked(drawn[start : start + GRAPHS_AT_ONCE], models, longest, rng)
        rated += _rated([c for c in chunk if _is_sound(c.atoms)], models)
        progress(min(start + GRAPHS_AT_ONCE, len(drawn)), len(drawn))
    chosen = _choose(rated, bases, count, per_parent, window)
    start = _next_number(name, known)
    jobs = tuple(_job(candidate, f"{name}-{number}") for number, candidate in enumerate(chosen, start))
    return Plan(name, recipe, jobs), chosen


def _next_number(name: str, known: Sequence[Atoms]) -> int:
    """First number that no label of an earlier plan of the same name has."""
    found = [re.fullmatch(rf"{re.escape(name)}-(\d+)", atoms.info["name"]) for atoms in known]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _longest_moments(frames: Sequence[Atoms], carriers: Sequence[str]) -> dict[str, float]:
    """Longest labelled |m| of each carrier, µB."""
    longest = dict.fromkeys(carriers, 0.0)
    for atoms in frames:
        lengths = np.linalg.norm(atoms.arrays["initial_magmoms"], axis=1)
        for symbol, length in zip(atoms.symbols, lengths, strict=True):
            if symbol in longest:
                longest[symbol] = max(longest[symbol], float(length))
    return longest


def _draw(
    bases: Sequence[Atoms], longest: Mapping[str, float], noncollinear: bool, rng: np.random.Generator
) -> Candidate:
    """One candidate: a parent drawn evenly, one of its labels, and one kind of change."""
    parents = sorted({atoms.info["parent"] for atoms in bases})
    parent = parents[rng.integers(len(parents))]
    of_parent = [atoms for atoms in bases if atoms.info["parent"] == parent]
    base = of_parent[rng.integers(len(of_parent))]
    moments = np.array(base.arrays["initial_magmoms"], dtype=float)
    atoms = Atoms(base.symbols, cell=base.cell, positions=base.positions, pbc=True)
    origin = str(rng.choice(["strain", "displacement", "moments", "walk"]))
    if origin == "strain":
        matrix = rng.uniform(-LARGEST_STRAIN, LARGEST_STRAIN, (3, 3))
        stretch = (1 + rng.uniform(-LARGEST_VOLUME_CHANGE, LARGEST_VOLUME_CHANGE)) ** (1 / 3)
        atoms.set_cell(stretch * atoms.cell.array @ (np.eye(3) + (matrix + matrix.T) / 2), scale_atoms=True)
    elif origin == "displacement":
        atoms.positions += rng.uniform(-1, 1, (len(atoms), 3)) * LARGEST_DISPLACEMENT
    if origin != "displacement" or (not noncollinear and moments[:, :2].any()):
        moments = _changed_moments(atoms, moments, longest, noncollinear, rng)
    atoms.set_initial_magnetic_moments(moments)
    return Candidate(atoms, parent, origin)


def _changed_moments(
    atoms: Atoms, moments: np.ndarray, longest: Mapping[str, float], noncollinear: bool, rng: np.random.Generator
) -> np.ndarray:
    """New lengths, and new directions: signs along z, or any direction for a non-collinear recipe."""
    changed = np.zeros_like(moments)
    for site, symbol in enumerate(atoms.symbols):
        if symbol not in longest:
            continue
        near = float(np.linalg.norm(moments[site])) * (1 + 0.3 * rng.normal())
        length = np.clip(near if rng.random() < 0.7 else rng.random() * longest[symbol], 0, longest[symbol])
        direction = rng.normal(size=3) if noncollinear else np.array([0.0, 0.0, rng.choice([-1.0, 1.0])])
        changed[site] = length * direction / np.linalg.norm(direction)
    return changed


def _walked(
    candidates: Sequence[Candidate],
    models: Sequence[MagneticMACE],
    longest: Mapping[str, float],
    rng: np.random.Generator,
) -> list[Candidate]:
    """The candidates, those of the kind `walk` after overdamped Langevin steps of positions and moment lengths."""
    walkers = [candidate for candidate in candidates if candidate.origin == "walk"]
    images = [candidate.atoms.copy() for candidate in walkers]
    for _ in range(WALK_STEPS if images else 0):
        graph = _graph(images, models[0])
        model = models[int(rng.integers(len(models)))]
        found = evaluate(model, graph, forces=True, magnetic_forces=True)
        assert found.forces is not None
        assert found.magnetic_forces is not None
        parts = graph.counts.tolist()
        for atoms, force, slope in zip(
            images, torch.split(found.forces, parts), torch.split(found.magnetic_forces, parts), strict=True
        ):
            _step(atoms, force.numpy(), slope.numpy(), longest, rng)
    walked = iter(images)
    return [replace(c, atoms=next(walked)) if c.origin == "walk" else c for c in candidates]


def _step(
    atoms: Atoms, forces: np.ndarray, slopes: np.ndarray, longest: Mapping[str, float], rng: np.random.Generator
) -> None:
    noise = np.sqrt(2 * kB * WALK_TEMPERATURE * np.array([POSITION_MOBILITY, MOMENT_MOBILITY]))
    atoms.positions += np.clip(POSITION_MOBILITY * forces, -0.05, 0.05) + noise[0] * rng.normal(size=(len(atoms), 3))
    moments = np.array(atoms.arrays["initial_magmoms"])
    lengths = np.linalg.norm(moments, axis=1)
    for site, symbol in enumerate(atoms.symbols):
        if symbol in longest and lengths[site] > 0:
            axis = moments[site] / lengths[site]
            change = float(np.clip(MOMENT_MOBILITY * slopes[site] @ axis, -0.1, 0.1)) + noise[1] * rng.normal()
            moments[site] = np.clip(lengths[site] + change, 0.05, longest[symbol]) * axis
    atoms.arrays["initial_magmoms"] = moments


def _is_sound(atoms: Atoms) -> bool:
    """No two atoms closer than chemistry allows."""
    radii = covalent_radii[atoms.numbers]
    first, second, distance = neighbor_list("ijd", atoms, 2 * CLOSEST * radii.max())
    return bool(np.all(distance > CLOSEST * (radii[first] + radii[second])))


def _rated(candidates: Sequence[Candidate], models: Sequence[MagneticMACE]) -> list[Candidate]:
    """The candidates with the committee's mean energy and spreads."""
    if not candidates:
        return []
    graph = _graph([c.atoms for c in candidates], models[0])
    found = [evaluate(model, graph, forces=True, magnetic_forces=True) for model in models]
    counts = graph.counts.numpy()
    energies = np.array([one.energy.numpy() for one in found]) / counts
    parts = np.cumsum(counts)[:-1]

    def largest(values: Sequence[torch.Tensor | None]) -> list[float]:
        stacked = np.stack([value.numpy() for value in values if value is not None])
        per_atom = np.sqrt((stacked.std(axis=0, ddof=1) ** 2).mean(axis=1))
        return [float(part.max()) for part in np.split(per_atom, parts)]

    forces, slopes = largest([one.forces for one in found]), largest([one.magnetic_forces for one in found])
    spread = energies.std(axis=0, ddof=1)
    return [
        replace(
            candidate,
            energy=float(energies[:, k].mean()),
            spread={"energy": float(spread[k]), "forces": forces[k], "magnetic_forces": slopes[k]},
        )
        for k, candidate in enumerate(candidates)
    ]


def _choose(
    rated: Sequence[Candidate], known: Sequence[Atoms], count: int, per_parent: int, window: float
) -> list[Candidate]:
    """The candidates of largest disagreement, within the energy window, none like another or like a label at hand."""
    lowest: dict[str, float] = {}
    for candidate in rated:
        formula = candidate.atoms.get_chemical_formula("hill", empirical=True)
        lowest[formula] = min(lowest.get(formula, np.inf), candidate.energy)
    prints = [fingerprint(atoms) for atoms in known]
    taken: dict[str, int] = {}
    chosen: list[Candidate] = []
    for candidate in sorted(rated, key=lambda c: -c.score):
        formula = candidate.atoms.get_chemical_formula("hill", empirical=True)
        if candidate.energy > lowest[formula] + window or taken.get(candidate.parent, 0) >= per_parent:
            continue
        mark = fingerprint(candidate.atoms)
        if any(_alike(mark, other) for other in prints):
            continue
        prints.append(mark)
        taken[candidate.parent] = taken.get(candidate.parent, 0) + 1
        chosen.append(candidate)
        if len(chosen) == count:
            break
    return chosen


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and float(np.linalg.norm(a - b)) < SAME * float(np.linalg.norm(a))


def _job(candidate: Candidate, name: str) -> Job:
    return make_job(name, candidate.parent, "train", candidate.atoms, candidate.atoms.arrays["initial_magmoms"])


def _graph(images: Sequence[Atoms], model: MagneticMACE) -> Graph:
    return Graph.collate([Graph.from_atoms(atoms, model.elements, model.config.cutoff) for atoms in images])


def read_models(path: str | Path) -> list[MagneticMACE]:
    """Models of a shipped name, a .safetensors file or a .json list, in float64."""
    return [load_model(file) for file in model_files(path)]


def as_json(chosen: Sequence[Candidate], plan: Plan) -> str:
    """What was chosen and why, as JSON."""
    rows = [
        {"job": job.name, "parent": c.parent, "origin": c.origin, "energy": c.energy, "spread": dict(c.spread or {})}
        for job, c in zip(plan.jobs, chosen, strict=True)
    ]
    return json.dumps(rows, indent=1) + "\n"
