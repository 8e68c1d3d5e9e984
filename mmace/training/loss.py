"""The loss: errors in units of their tolerances, quadratic for small ones, linear for outliers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..derivatives import evaluate
from ..model import MagneticMACE
from .batches import DirectionBatch, LabelBatch, Target
from .recipe import Tolerances


@dataclass(frozen=True)
class LossTerms:
    """Sums over the structures of a batch, one number for each kind of label.

    Attributes
    ----------
    energy, forces, stress, magnetic_forces, anisotropy : Tensor ()
        Dimensionless; a kind that the batch has no labels of is zero.
    """

    energy: torch.Tensor
    forces: torch.Tensor
    stress: torch.Tensor
    magnetic_forces: torch.Tensor
    anisotropy: torch.Tensor

    def total(self) -> torch.Tensor:
        """Sum of all terms."""
        return self.energy + self.forces + self.stress + self.magnetic_forces + self.anisotropy


def label_loss(model: MagneticMACE, batch: LabelBatch, tolerances: Tolerances, create_graph: bool = True) -> LossTerms:
    """Loss of energies and first derivatives.

    Parameters
    ----------
    model : MagneticMACE
        The potential.
    batch : LabelBatch
        Structures and targets.
    tolerances : Tolerances
        The outlier limit; the tolerances themselves are in the targets.
    create_graph : bool
        Keep the loss differentiable in the weights.
    """
    result = evaluate(model, batch.graph, forces=True, stress=True, magnetic_forces=True, create_graph=create_graph)
    assert result.forces is not None
    assert result.stress is not None
    assert result.magnetic_forces is not None
    known = batch.magnetic_forces.weight > 0
    error = torch.where(known, result.magnetic_forces - batch.magnetic_forces.value, 0.0)
    along = (error * batch.axis).sum(1, keepdim=True) * batch.axis
    has_axis = batch.axis.abs().amax(1, keepdim=True) > 0
    error = torch.where(has_axis, along + batch.transverse * (error - along), error)
    limit = tolerances.outlier
    return LossTerms(
        energy=_penalty(result.energy - batch.energy.value, batch.energy, limit),
        forces=_penalty(result.forces - batch.forces.value, batch.forces, limit),
        stress=_penalty(result.stress - batch.stress.value, batch.stress, limit),
        magnetic_forces=_penalty(error, batch.magnetic_forces, limit),
        anisotropy=result.energy.new_zeros(()),
    )


def direction_loss(model: MagneticMACE, batch: DirectionBatch, tolerances: Tolerances) -> LossTerms:
    """Loss of energy differences between directions of the moments on one geometry."""
    energies = direction_energies(model, batch)
    weight = batch.energy.weight
    mean = (weight * energies).sum(0) / weight.sum(0).clamp_min(torch.finfo(weight.dtype).tiny)
    zero = energies.new_zeros(())
    return LossTerms(
        energy=zero,
        forces=zero,
        stress=zero,
        magnetic_forces=zero,
        anisotropy=_penalty(energies - mean - batch.energy.value, batch.energy, tolerances.outlier),
    )


def direction_energies(model: MagneticMACE, batch: DirectionBatch) -> torch.Tensor:
    """Energies (D, G) in eV of every direction of every structure."""
    graph = batch.graph
    return graph.per_structure(model.spin_energies(model.geometry(graph), batch.moments))


def _penalty(error: torch.Tensor, target: Target, limit: float) -> torch.Tensor:
    """Pseudo-Huber penalty, summed with the targets' weights."""
    x = torch.where(target.weight > 0, error * target.inverse_tolerance, 0.0)
    penalty = 2.0 * limit**2 * (torch.sqrt(1.0 + (x / limit).square()) - 1.0)
    return (target.weight * penalty).sum().double()
