"""What is known without labels: long moments, expansion and shaken atoms cost energy; spin-orbit energies are small.

Polynomials and networks say anything beyond their data. Four inequalities keep that part of the surface sane:
dE/d|m| of a moment longer than any label's is positive; dE/dV of a crystal that is under tension already stays
positive when it is expanded further; a crystal whose atoms are displaced at random lies above what its composition can
have at the lowest; and spin-orbit coupling changes the energy of a structure without anisotropy labels by no more than
it does in the labels that have it. All are one-sided, so a surface that obeys them is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase import Atoms
from ase.build import make_supercell
from ase.build.supercells import lattice_points_in_supercell
from matscipy.neighbours import neighbour_list

from ..data import Composition, LabelledStructure, composition
from ..derivatives import evaluate
from ..errors import StructureError
from ..graph import Graph
from ..model import MagneticMACE
from .batches import LabelBatch, graph_of, lowest_labels

LEAST_SLOPE = 0.2  # eV/µB, dE/d|m| beyond the labels' range
SLOPE_TOLERANCE = 0.1  # eV/µB
TENSION_TOLERANCE = 0.02  # eV/atom, dE/dlnV
LONGEST_MOMENT = 1.3  # of M_z
LARGEST_EXPANSION = 0.5  # of lengths
FLOOR_TOLERANCE = 0.02  # eV/atom
HIGHEST_FLOOR = 0.15  # eV/atom above the ground, where a walk may have reached another crystal
LARGEST_DISPLACEMENT = 0.4  # Å
HIGHEST_WAVE = 0.6  # Å
LONGEST_PAIR, CLOSEST_PAIR = 3.5, 0.8  # Å
LARGEST_FORCE = 0.5  # eV/Å
LARGEST_COMPRESSION, LARGEST_EXPANSION_OF_SHAKEN = 0.35, 0.2  # of the volume
PUSH = 0.15  # Å
LONGER, SHORTER = 1.2, 0.5
LONGEST_WALK = 20  # steps
SMALLEST_FORCE = 1e-3  # eV/Å
LONGEST_SHAKEN_MOMENT = 1.5  # of M_z
FEWEST_ATOMS, MOST_ATOMS = 4, 8
OUTLIER = 5.0
ROTATIONS = 3


@dataclass(frozen=True)
class Probe:
    """Structures with moments stretched and cells expanded at random.

    Attributes
    ----------
    batch : LabelBatch
        Structures with the new cells and moments.
    stretched : Tensor (N,)
        1 for atoms whose moment was stretched beyond the range of the labels.
    expanded : Tensor (G,)
        1 for structures that were expanded.
    """

    batch: LabelBatch
    stretched: torch.Tensor
    expanded: torch.Tensor


def make_probe(model: MagneticMACE, batch: LabelBatch, generator: torch.Generator) -> Probe:
    """Change half of the structures of a batch in the moments, the others in the volume.

    Parameters
    ----------
    model : MagneticMACE
        Gives M_z and the elements that carry moments.
    batch : LabelBatch
        Labels; only those under tension are expanded.
    generator : torch.Generator
        Source of randomness, on the CPU.
    """
    graph, basis = batch.graph, model.moment_basis
    n_atoms, n_graphs = len(graph.species), graph.n_graphs

    def random(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64).to(graph.positions)

    by_moments = random(n_graphs) < 0.5
    tension = (batch.stress.value * batch.stress.weight)[:, :3].sum(1) > 0
    expanded = ~by_moments & tension
    factor = 1.0 + LARGEST_EXPANSION * random(n_graphs).square() * expanded

    scale = basis.moment_scale[graph.species]
    longest_label = (scale - 0.1) / 1.2
    length = longest_label + (LONGEST_MOMENT * scale - longest_label) * random(n_atoms)
    stretched = by_moments[graph.batch] & basis.carriers[graph.species] & (random(n_atoms) < 0.7)
    up = torch.zeros_like(graph.moments)
    up[:, 2] = 1.0
    axis = torch.where(batch.axis.abs().amax(1, keepdim=True) > 0, batch.axis, up)
    moments = torch.where(stretched[:, None], length[:, None] * axis, graph.moments)
    graph = replace(
        graph,
        positions=graph.positions * factor[graph.batch][:, None],
        cell=graph.cell * factor[:, None, None],
        moments=moments,
    )
    kind = graph.positions.dtype
    return Probe(replace(batch, graph=graph, axis=axis), stretched.to(kind), expanded.to(kind))


def restraint_loss(model: MagneticMACE, probe: Probe) -> torch.Tensor:
    """Penalty for energies that fall where they must rise, per structure.

    Parameters
    ----------
    model : MagneticMACE
        The potential.
    probe : Probe
        From `make_probe`.
    """
    graph = probe.batch.graph
    result = evaluate(model, graph, stress=True, magnetic_forces=True, create_graph=True)
    assert result.stress is not None
    assert result.magnetic_forces is not None
    slope = -(result.magnetic_forces * probe.batch.axis).sum(1)
    too_flat = torch.relu(LEAST_SLOPE - slope) / SLOPE_TOLERANCE
    tension = torch.where(probe.expanded > 0, result.stress[:, :3].mean(1) * graph.volume / graph.counts, 0.0)
    falling = torch.relu(-tension) / TENSION_TOLERANCE
    return ((probe.stretched * _penalty(too_flat)).sum() + (probe.expanded * _penalty(falling)).sum()) / graph.n_graphs


@dataclass(frozen=True)
class Crystal:
    """A structure to shake.

    Attributes
    ----------
    atoms : Atoms
        Labelled structure; `shake` repeats it.
    ground : float
        What its composition lies above at least, from `floor_energies`, eV/atom.
    stiffness : float
        Least curvature of the energy in the displacement of an atom, eV/Å².
    weight : float
        Chance of being drawn, relative to the other crystals.
    """

    atoms: Atoms
    ground: float
    stiffness: float
    weight: float = 1.0


@dataclass(frozen=True)
class ShakenCell:
    """A crystal with other positions, volume and moments.

    Attributes
    ----------
    atoms : Atoms
        The structure with its moments.
    sites : ndarray (N, 3)
        Positions without the displacements, Å.
    crystal : Crystal
        What was shaken.
    graph : Graph
        The structure for the model.
    """

    atoms: Atoms
    sites: np.ndarray
    crystal: Crystal
    graph: Graph

    def moved(self, step: np.ndarray, model: MagneticMACE) -> ShakenCell:
        """The same cell with all atoms moved by `step` (N, 3), Å; StructureError where atoms overlap then."""
        atoms = self.atoms.copy()
        atoms.positions += step - step.mean(0)
        return replace(self, atoms=atoms, graph=graph_of(atoms, model))

    def floor(self) -> float:
        """Energy that the cell lies above, eV/atom; far from the sites it may be another crystal, which costs less."""
        squares = float(((self.atoms.positions - self.sites) ** 2).sum(1).mean())
        return self.crystal.ground + min(0.5 * self.crystal.stiffness * squares, HIGHEST_FLOOR)


def floor_energies(
    labels: Iterable[LabelledStructure], stiffness: Callable[[Composition], float]
) -> dict[Composition, float]:
    """What no structure of a composition should lie below, eV/atom.

    That is the lowest label, less what its own forces and pressure could still release: F²/2k for each atom and
    P²V/2B, with B = k / V^(1/3).

    Parameters
    ----------
    labels : iterable of LabelledStructure
        Training labels; those of anisotropy groups have no absolute energy and are left out.
    stiffness : callable
        k of a composition, least curvature of the energy in the displacement of an atom, eV/Å².
    """
    lowest = lowest_labels(labels)
    return {key: label.energy / len(label) - _release(label, stiffness(key)) for key, label in lowest.items()}


def crystals_to_shake(
    labels: Sequence[LabelledStructure],
    stiffness: Callable[[Composition], float],
    weight: Callable[[Composition], float],
) -> list[Crystal]:
    """Crystals among the labels that have an energy of their own, but for those whose forces show displaced atoms.

    Parameters
    ----------
    labels : sequence of LabelledStructure
        Training labels.
    stiffness : callable
        Least curvature of the energy in the displacement of an atom, eV/Å², of a composition.
    weight : callable
        Chance of being drawn of each crystal of a composition, relative to others.
    """
    periodic = [label for label in labels if all(label.pbc)]
    ground = floor_energies(periodic, stiffness)
    crystals = []
    for label in periodic:
        kind = composition(label.symbols)
        displaced = bool((np.abs(label.forces) > LARGEST_FORCE).any())
        if label.anisotropy_group is None and kind in ground and not displaced:
            crystals.append(Crystal(label.atoms(), ground[kind], stiffness(kind), weight(kind)))
    return crystals


def shake(crystal: Crystal, model: MagneticMACE, rng: np.random.Generator) -> ShakenCell:
    """Displace all atoms, bring two neighbours together or freeze in a wave; half of the time change the volume too.

    Half of the cells with another volume also get other moments.

    Crystals of up to three atoms and half of those of four are first doubled, in one to three directions, so that
    neighbouring cells move against each other with wave vectors from the zone boundary.

    Parameters
    ----------
    crystal : Crystal
        Where to start.
    model : MagneticMACE
        Gives M_z and the elements that carry moments.
    rng : numpy.random.Generator
        Source of randomness.
    """
    config = model.config
    while True:
        repetition = _repetition(len(crystal.atoms), rng)
        atoms = make_supercell(crystal.atoms, repetition)
        n_atoms = len(atoms)
        if rng.random() >= 0.5:
            volume = rng.uniform(1.0 - LARGEST_COMPRESSION, 1.0 + LARGEST_EXPANSION_OF_SHAKEN)
            atoms.set_cell(volume ** (1 / 3) * atoms.cell.array, scale_atoms=True)
            if rng.random() < 0.5:
                longest = [config.moment_scale[s] if s in config.carriers else 0.0 for s in atoms.symbols]
                lengths = LONGEST_SHAKEN_MOMENT * np.array(longest) * rng.random(n_atoms)
                atoms.set_initial_magnetic_moments(lengths[:, None] * random_directions(n_atoms, rng))
        sites = atoms.positions.copy()
        kind = rng.integers(3)
        if kind == 0:
            displacement = _approach(atoms, rng)
        elif kind == 1:
            displacement = _everywhere(n_atoms, rng)
        else:
            displacement = _wave(repetition, len(crystal.atoms), rng)
        atoms.positions += displacement - displacement.mean(0)
        try:
            return ShakenCell(atoms, sites, crystal, graph_of(atoms, model))
        except StructureError:
            continue


def walk_downhill(model: MagneticMACE, cells: Sequence[ShakenCell], steps: int) -> list[ShakenCell]:
    """Where each cell lies lowest against its floor while it walks along its forces.

    A walk finds minima that should not be there sooner than chance does. A step that leads up is taken back and the
    next one halved, so that walks end in narrow minima instead of leaping from wall to wall. Steps that would bring
    atoms on top of each other count as leading up; an energy that is not a number counts as the lowest.

    Parameters
    ----------
    model : MagneticMACE
        The potential.
    cells : sequence of ShakenCell
        From `shake`; not changed.
    steps : int
        Steps of at most 0.15 Å of the atom with the largest force.
    """
    tried, stands, lowest = list(cells), list(cells), list(cells)
    energy, margin = np.full((2, len(cells)), np.inf)
    reach = np.full(len(cells), PUSH)
    forces = [np.zeros_like(cell.sites) for cell in cells]
    ends = np.cumsum([len(cell.atoms) for cell in cells])[:-1]
    for step in range(steps + 1):
        graph = Graph.collate([cell.graph for cell in tried]).to(model.device)
        found = evaluate(model, graph, forces=step < steps, stress=False, magnetic_forces=False)
        new_energy = (found.energy / graph.counts).detach().cpu().double().numpy()
        new_margin = new_energy - np.array([cell.floor() for cell in tried])

        below = np.isnan(new_margin) | (new_margin < margin)
        lowest = [new if better else old for new, old, better in zip(tried, lowest, below, strict=True)]
        margin = np.where(below, new_margin, margin)
        if found.forces is None:
            break

        new_forces = np.split(found.forces.detach().cpu().double().numpy(), ends)
        down = new_energy < energy
        stands = [new if better else old for new, old, better in zip(tried, stands, down, strict=True)]
        forces = [new if better else old for new, old, better in zip(new_forces, forces, down, strict=True)]
        energy = np.where(down, new_energy, energy)
        reach = np.where(down, np.minimum(LONGER * reach, PUSH), SHORTER * reach)
        tried = [_pushed(*cell, model) for cell in zip(stands, forces, reach, strict=True)]
    return lowest


def _pushed(cell: ShakenCell, forces: np.ndarray, reach: float, model: MagneticMACE) -> ShakenCell:
    """The cell after a step of length `reach` along its forces, or itself where atoms would overlap."""
    longest = np.linalg.norm(forces, axis=1).max()
    try:
        return cell.moved(reach * forces / max(longest, SMALLEST_FORCE), model)
    except StructureError:
        return cell


def floor_loss(model: MagneticMACE, cells: Sequence[ShakenCell]) -> torch.Tensor:
    """Penalty for shaken cells below their floor, per structure.

    Parameters
    ----------
    model : MagneticMACE
        The potential.
    cells : sequence of ShakenCell
        From `shake` or `walk_downhill`.
    """
    graph = Graph.collate([cell.graph for cell in cells]).to(model.device)
    floors = torch.tensor([cell.floor() for cell in cells], dtype=torch.float64, device=model.device)
    energies = graph.per_structure(model.site_energies(graph))[0] / graph.counts
    return _penalty(torch.relu(floors - energies) / FLOOR_TOLERANCE).mean()


def spin_orbit_loss(model: MagneticMACE, graph: Graph, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Penalty for spin-orbit energies beyond `bound`, per structure, with all moments turned together at random.

    Parameters
    ----------
    model : MagneticMACE
        The potential.
    graph : Graph
        Structures.
    bound : float
        Largest energy of spin-orbit coupling that is not penalised, eV/atom.
    generator : torch.Generator
        Source of randomness, on the CPU.
    """
    normal = torch.randn(ROTATIONS, 3, 3, generator=generator, dtype=torch.float64)
    rotations = torch.linalg.qr(normal).Q.to(graph.positions)
    geometry = model.geometry(replace(graph, soc=torch.ones_like(graph.soc)))
    without = replace(geometry, soc=torch.zeros_like(graph.soc))
    change = model.spin_energies(geometry, torch.einsum("rab,nb->rna", rotations, graph.moments))
    change = change - model.spin_energies(without, graph.moments[None])
    per_graph = graph.per_structure(change) / graph.counts
    return _penalty(torch.relu(per_graph.abs() / bound - 1.0)).mean()


def _release(label: LabelledStructure, stiffness: float) -> float:
    """Energy that a label's forces and pressure could release in a crystal that is as soft as allowed, eV/atom."""
    volume = label.atoms().get_volume() / len(label)
    pressure = float(np.nan_to_num(label.stress[:3]).mean())
    forces = float((np.nan_to_num(label.forces) ** 2).sum(1).mean())
    return pressure**2 * volume ** (4 / 3) / (2 * stiffness) + forces / (2 * stiffness)


def _penalty(x: torch.Tensor) -> torch.Tensor:
    return 2.0 * OUTLIER**2 * (torch.sqrt(1.0 + (x / OUTLIER).square()) - 1.0)


def _repetition(n_atoms: int, rng: np.random.Generator) -> np.ndarray:
    """Supercell of four to eight atoms, or of one cell where that is larger, with zone-boundary modes alone.

    Twice each lattice vector is a vector of the supercell then. Waves that are longer, in supercells of more cells in a
    row, may be softer than any stiffness that holds at the boundary.
    """
    sizes = [n for n in (1, 2, 4, 8) if FEWEST_ATOMS <= n * n_atoms <= MOST_ATOMS] or [1]
    cells = int(rng.choice(sizes))
    parts = [d for d in (1, 2) if cells % d == 0]
    diagonals = [(a, b, c) for a in parts for b in parts for c in parts if a * b * c == cells]
    forms = [np.array(((a, 0, 0), (x, b, 0), (y, z, c))) for a, b, c in diagonals for x, y, z in np.ndindex(a, a, b)]
    halves = [2 * np.linalg.inv(form) for form in forms]
    doubling = [form for form, half in zip(forms, halves, strict=True) if np.allclose(half, half.round())]
    return doubling[rng.integers(len(doubling))]


def _everywhere(n_atoms: int, rng: np.random.Generator) -> np.ndarray:
    """Displacements in balls of one radius for all atoms."""
    lengths = LARGEST_DISPLACEMENT * rng.random() * rng.random((n_atoms, 1)) ** (1 / 3)
    return lengths * random_directions(n_atoms, rng)


def _wave(repetition: np.ndarray, n_atoms: int, rng: np.random.Generator) -> np.ndarray:
    """Displacements that are those of one cell of `n_atoms`, up in some of the cells and down in others.

    The signs are those of a wave at the zone boundary that fits into the supercell; a single cell has none, and its
    atoms are displaced at random.
    """
    cells = lattice_points_in_supercell(repetition) @ repetition
    waves = [q for q in np.ndindex(2, 2, 2) if any(q) and not (repetition @ q % 2).any()]
    shape = _everywhere(n_atoms, rng)
    if not waves:
        return shape
    signs = (-1.0) ** (cells.round() @ waves[rng.integers(len(waves))])
    shape *= HIGHEST_WAVE * rng.random() / np.linalg.norm(shape, axis=1).max()
    return (signs[:, None, None] * shape).reshape(-1, 3)


def _approach(atoms: Atoms, rng: np.random.Generator) -> np.ndarray:
    """Displacements that bring two neighbours to any distance down to the closest, each on half of the way."""
    first, second, vectors = neighbour_list("ijD", atoms, LONGEST_PAIR)
    displacement = np.zeros((len(atoms), 3))
    pairs = np.flatnonzero(first != second)
    if len(pairs):
        pair = rng.choice(pairs)
        vector = vectors[pair]
        distance = float(np.linalg.norm(vector))
        way = rng.random() * max(distance - CLOSEST_PAIR, 0.0) / distance
        displacement[first[pair]] += 0.5 * way * vector
        displacement[second[pair]] -= 0.5 * way * vector
    return displacement


def random_directions(count: int, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors, evenly spread over the sphere, shape (count, 3)."""
    vectors = rng.normal(size=(count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
