"""What is known without labels: long moments and expansion cost energy, and spin-orbit energies are small.

Polynomials and networks say anything beyond their data. Three inequalities keep that part of the surface sane:
dE/d|m| of a moment longer than any label's is positive; dE/dV of a crystal that is under tension already stays
positive when it is expanded further; and spin-orbit coupling changes the energy of a structure without anisotropy
labels by no more than it does in the labels that have it. All are one-sided, so a surface that obeys them is not
touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..derivatives import evaluate
from ..model import MagneticMACE
from .batches import LabelBatch

LEAST_SLOPE = 0.2  # eV/µB, dE/d|m| beyond the labels' range
SLOPE_TOLERANCE = 0.1  # eV/µB
TENSION_TOLERANCE = 0.02  # eV/atom, dE/dlnV
LONGEST_MOMENT = 1.3  # of M_z
LARGEST_EXPANSION = 0.5  # of lengths
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
    tension = result.stress[:, :3].mean(1) * graph.volume / graph.counts
    falling = torch.relu(-tension) / TENSION_TOLERANCE
    return ((probe.stretched * _penalty(too_flat)).sum() + (probe.expanded * _penalty(falling)).sum()) / graph.n_graphs


def spin_orbit_loss(model: MagneticMACE, batch: LabelBatch, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Penalty for spin-orbit energies beyond `bound`, per structure, with all moments turned together at random.

    Parameters
    ----------
    model : MagneticMACE
        The potential.
    batch : LabelBatch
        Structures.
    bound : float
        Largest energy of spin-orbit coupling that is not penalised, eV/atom.
    generator : torch.Generator
        Source of randomness, on the CPU.
    """
    graph = batch.graph
    normal = torch.randn(ROTATIONS, 3, 3, generator=generator, dtype=torch.float64)
    rotations = torch.linalg.qr(normal).Q.to(graph.positions)
    geometry = model.geometry(replace(graph, soc=torch.ones_like(graph.soc)))
    without = replace(geometry, soc=torch.zeros_like(graph.soc))
    change = model.spin_energies(geometry, torch.einsum("rab,nb->rna", rotations, graph.moments))
    change = change - model.spin_energies(without, graph.moments[None])
    per_graph = graph.per_structure(change) / graph.counts
    return _penalty(torch.relu(per_graph.abs() / bound - 1.0)).mean()


def _penalty(x: torch.Tensor) -> torch.Tensor:
    return 2.0 * OUTLIER**2 * (torch.sqrt(1.0 + (x / OUTLIER).square()) - 1.0)
