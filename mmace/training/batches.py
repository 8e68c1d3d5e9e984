"""Labels as tensors: targets with the weight each component carries, and batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from ase import Atoms

from ..data import Composition, LabelledStructure, composition
from ..graph import Graph
from ..model import MagneticMACE
from .recipe import Tolerances

SMALL_MOMENT = 1e-3  # µB; below it a moment has no direction


@dataclass(frozen=True)
class Target:
    """What a quantity should be.

    Attributes
    ----------
    value : Tensor (..., C)
        Labels, zero where not known.
    inverse_tolerance : Tensor (..., C)
        One over the error that counts as one.
    weight : Tensor (..., C)
        Weight in the loss, zero where the label is not known; the weights of one structure sum to one.
    """

    value: torch.Tensor
    inverse_tolerance: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(cls, label: np.ndarray, tolerance: np.ndarray | float, dtype: torch.dtype) -> Target:
        """Target of one structure; NaN in `label` means not known."""
        known = np.isfinite(label)
        weight = known / max(known.sum(), 1)
        tolerance = np.where(known, np.broadcast_to(tolerance, label.shape), 1.0)
        return cls(
            value=torch.tensor(np.where(known, label, 0.0), dtype=dtype),
            inverse_tolerance=torch.tensor(1.0 / tolerance, dtype=dtype),
            weight=torch.tensor(weight, dtype=dtype),
        )

    @classmethod
    def collate(cls, targets: Sequence[Target]) -> Target:
        """Targets one after the other."""
        return cls(*(torch.cat([getattr(t, f.name) for t in targets]) for f in fields(cls)))

    def to(self, device: torch.device | str) -> Target:
        """The same target on another device."""
        return Target(*(getattr(self, f.name).to(device) for f in fields(self)))


def lowest_labels(labels: Iterable[LabelledStructure]) -> dict[Composition, LabelledStructure]:
    """Label with the lowest energy per atom of each composition; those of anisotropy groups have no absolute energy."""
    lowest: dict[Composition, LabelledStructure] = {}
    for label in labels:
        if label.anisotropy_group is None and np.isfinite(label.energy):
            kind = composition(label.symbols)
            other = lowest.setdefault(kind, label)
            if label.energy / len(label) < other.energy / len(other):
                lowest[kind] = label
    return lowest


def ground_energies(labels: Iterable[LabelledStructure]) -> dict[Composition, float]:
    """Lowest energy of each composition among labels, eV/atom."""
    return {key: label.energy / len(label) for key, label in lowest_labels(labels).items()}


@dataclass(frozen=True)
class LabelBatch:
    """G structures with targets for energies and first derivatives.

    Attributes
    ----------
    graph : Graph
        Structures with their moments.
    energy, forces, stress, magnetic_forces : Target
        Shapes (G,), (N, 3), (G, 6), (N, 3).
    axis : Tensor (N, 3)
        Direction of each moment, zero where it has none.
    transverse : Tensor (N, 1)
        Weight of the magnetic force across the moment; zero where the label holds its part along the moment alone.
    """

    graph: Graph
    energy: Target
    forces: Target
    stress: Target
    magnetic_forces: Target
    axis: torch.Tensor
    transverse: torch.Tensor

    @classmethod
    def of(
        cls,
        label: LabelledStructure,
        model: MagneticMACE,
        tolerances: Tolerances,
        ground: Mapping[Composition, float] | None = None,
    ) -> LabelBatch:
        """Batch of one label; `tolerances.above_ground` counts from the lowest energies in `ground`, eV/atom."""
        dtype = model.dtype
        relative = tolerances.relative
        wider = 1.0 + tolerances.above_ground * _excess(label, ground or {})
        magnitude = np.linalg.norm(label.moments, axis=1, keepdims=True)
        axis = np.where(magnitude > SMALL_MOMENT, label.moments / np.maximum(magnitude, SMALL_MOMENT), 0.0)
        along = label.magnetic_forces_parallel[:, None] * axis
        along_alone = np.isfinite(along).all(1, keepdims=True) & (magnitude > SMALL_MOMENT)
        magnetic_forces = np.where(along_alone, along, label.magnetic_forces)
        return cls(
            graph=graph_of(label.atoms(), model, float(label.soc)),
            energy=Target.of(np.array([label.energy]), wider * tolerances.energy * len(label), torch.float64),
            forces=Target.of(label.forces, _widened(wider * tolerances.forces, relative, label.forces), dtype),
            stress=Target.of(
                label.stress[None], _widened(wider * tolerances.stress, relative, label.stress[None]), dtype
            ),
            magnetic_forces=Target.of(
                magnetic_forces, _widened(wider * tolerances.magnetic_forces, relative, magnetic_forces), dtype
            ),
            axis=torch.tensor(axis, dtype=dtype),
            transverse=torch.tensor(np.where(along_alone, 0.0, tolerances.transverse), dtype=dtype),
        )

    @property
    def canted(self) -> bool:
        """Whether the moments of this one structure span more than an axis."""
        return bool((torch.linalg.svdvals(self.graph.moments)[1:] > SMALL_MOMENT).any())

    @classmethod
    def collate(cls, batches: Sequence[LabelBatch]) -> LabelBatch:
        """One batch that holds all of `batches`."""
        names = ("energy", "forces", "stress", "magnetic_forces")
        targets = {name: Target.collate([getattr(b, name) for b in batches]) for name in names}
        axis, transverse = torch.cat([b.axis for b in batches]), torch.cat([b.transverse for b in batches])
        return cls(Graph.collate([b.graph for b in batches]), axis=axis, transverse=transverse, **targets)

    def to(self, device: torch.device | str) -> LabelBatch:
        """The same batch on another device."""
        return LabelBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class DirectionBatch:
    """G structures, each with energies of its moments turned to up to D directions.

    Attributes
    ----------
    graph : Graph
        Structures; the moments in it are those of the first direction.
    moments : Tensor (D, N, 3)
        µB; structures with fewer directions repeat their first.
    energy : Target (D, G)
        Energies about the mean of their group; weights vanish on repeats.
    """

    graph: Graph
    moments: torch.Tensor
    energy: Target

    @classmethod
    def of(cls, group: Sequence[LabelledStructure], model: MagneticMACE, tolerances: Tolerances) -> DirectionBatch:
        """Batch of one group."""
        energies = np.array([label.energy for label in group])
        relative = energies - np.nanmean(energies)
        size = np.sqrt(np.nanmean(relative**2))
        tolerance = tolerances.anisotropy * len(group[0]) + tolerances.relative_anisotropy * size
        return cls(
            graph=graph_of(group[0].atoms(), model, float(group[0].soc)),
            moments=torch.tensor(np.stack([label.moments for label in group]), dtype=model.dtype),
            energy=Target.of(relative[:, None], tolerance, torch.float64),
        )

    @classmethod
    def collate(cls, batches: Sequence[DirectionBatch]) -> DirectionBatch:
        """One batch that holds all of `batches`."""
        longest = max(len(b.moments) for b in batches)
        padded = [b._padded(longest) for b in batches]
        return cls(
            graph=Graph.collate([b.graph for b in padded]),
            moments=torch.cat([b.moments for b in padded], dim=1),
            energy=Target(*(torch.cat([getattr(b.energy, f.name) for b in padded], dim=1) for f in fields(Target))),
        )

    def _padded(self, length: int) -> DirectionBatch:
        """Repeats of the first direction, without weight, up to `length` directions."""
        missing = length - len(self.moments)
        energy = Target(
            value=_repeat_first(self.energy.value, missing),
            inverse_tolerance=_repeat_first(self.energy.inverse_tolerance, missing),
            weight=torch.cat([self.energy.weight, self.energy.weight.new_zeros(missing, 1)]),
        )
        return DirectionBatch(self.graph, _repeat_first(self.moments, missing), energy)

    def to(self, device: torch.device | str) -> DirectionBatch:
        """The same batch on another device."""
        return DirectionBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


def graph_of(atoms: Atoms, model: MagneticMACE, soc: float = 0.0) -> Graph:
    """Graph of a structure with moments for a model, with spin-orbit switch `soc`."""
    config = model.config
    return Graph.from_atoms(atoms, config.elements, config.cutoff, soc=soc, dtype=model.dtype)


def _excess(label: LabelledStructure, ground: Mapping[Composition, float]) -> float:
    """Energy above the ground, eV/atom; zero where label or composition has no energy."""
    energy = label.energy / len(label)
    if not np.isfinite(energy):
        return 0.0
    return max(0.0, energy - ground.get(composition(label.symbols), energy))


def _widened(tolerance: float, relative: float, label: np.ndarray) -> np.ndarray:
    """Tolerance plus a fraction of the length of each row of the label, of the components that are known."""
    return tolerance + relative * np.sqrt(np.nansum(label**2, axis=-1, keepdims=True))


def _repeat_first(values: torch.Tensor, times: int) -> torch.Tensor:
    return torch.cat([values, values[:1].expand(times, *values.shape[1:])])
