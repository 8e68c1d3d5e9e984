"""Checks that a model obeys each symmetry of magnetism on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .graph import Graph
from .model import MagneticMACE


@dataclass(frozen=True)
class SymmetryError:
    """How badly one generator is broken: largest change of a site energy over the energy scale."""

    generator: str
    error: float


def symmetry_errors(model: MagneticMACE, graph: Graph, seed: int = 0) -> list[SymmetryError]:
    """Relative change of the energy under each generator of the symmetry group.

    With spin-orbit coupling (λ = 1): rotations of space and moments together, inversion and a rotary reflection with
    axial moments, time reversal, translations, permutations, choice of the cell. Without (λ = 0) also rotations of
    the moments alone and of space alone.

    Parameters
    ----------
    model : MagneticMACE
        Any model; trained weights deserve the check as much as random ones.
    graph : Graph
        One or more periodic structures with non-collinear moments.
    seed : int
        Of the random rotations.

    Returns
    -------
    list of SymmetryError
        The energy scale is the largest change of a site energy when all moments are set to zero, or the spread of
        site energies about their mean if that is larger.
    """
    with torch.no_grad():
        return [
            error
            for soc in (0.0, 1.0)
            for error in _errors_at(model, replace(graph, soc=torch.full_like(graph.soc, soc)), seed)
        ]


def assert_symmetries(model: MagneticMACE, graph: Graph, tolerance: float = 1e-10, seed: int = 0) -> None:
    """Raise AssertionError naming every generator that the model breaks.

    Parameters
    ----------
    model, graph, seed
        As for `symmetry_errors`.
    tolerance : float
        Allowed error relative to the energy scale; 1e-10 suits float64.
    """
    broken = [e for e in symmetry_errors(model, graph, seed) if not e.error <= tolerance]
    if broken:
        found = "; ".join(f"{e.generator} (relative error {e.error:.1e})" for e in broken)
        raise AssertionError(f"the model breaks {found}.")


def _errors_at(model: MagneticMACE, graph: Graph, seed: int) -> list[SymmetryError]:
    generator = torch.Generator().manual_seed(seed)
    reference = _site_energies(model, graph)
    bare = _site_energies(model, graph.with_moments(torch.zeros_like(graph.moments)))
    scale = max(float((reference - bare).abs().max()), float((reference - reference.mean()).abs().max()), 1e-12)
    soc = bool(graph.soc.any())
    rotation = _random_rotation(generator).to(graph.positions)
    identity = torch.eye(3).to(graph.positions)
    rotary_reflection = rotation @ torch.diag(torch.tensor([1.0, 1.0, -1.0])).to(graph.positions)
    order = torch.randperm(len(graph.species), generator=generator).to(graph.species.device)
    shift = torch.randn(3, generator=generator).to(graph.positions)

    moved: dict[str, Callable[[], torch.Tensor]] = {
        "space rotation with moments": lambda: _site_energies(model, _turn(graph, rotation, rotation)),
        "inversion with axial moments": lambda: _site_energies(model, _turn(graph, -identity, identity)),
        "rotary reflection with axial moments": lambda: _site_energies(
            model, _turn(graph, rotary_reflection, -rotary_reflection)
        ),
        "time reversal": lambda: _site_energies(model, _turn(graph, identity, -identity)),
        "permutation": lambda: _site_energies(model, _permute(graph, order))[torch.argsort(order)],
        "translation": lambda: _site_energies(model, replace(graph, positions=graph.positions + shift)),
        "cell choice": lambda: _site_energies(model, _other_cell(graph)),
    }
    if not soc:
        moved["spin rotation"] = lambda: _site_energies(model, _turn(graph, identity, rotation))
        moved["space rotation"] = lambda: _site_energies(model, _turn(graph, rotation, identity))
    label = "with spin-orbit coupling" if soc else "without spin-orbit coupling"
    return [
        SymmetryError(f"{name} {label}", float((energies() - reference).abs().max()) / scale)
        for name, energies in moved.items()
    ]


def _site_energies(model: MagneticMACE, graph: Graph) -> torch.Tensor:
    return model.site_energies(graph)[0]


def _random_rotation(generator: torch.Generator) -> torch.Tensor:
    """A rotation matrix, uniform over SO(3)."""
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    q = q * torch.sign(torch.diagonal(r))
    return q * torch.sign(torch.linalg.det(q))


def _turn(graph: Graph, space: torch.Tensor, spin: torch.Tensor) -> Graph:
    return replace(
        graph, positions=graph.positions @ space.T, cell=graph.cell @ space.T, moments=graph.moments @ spin.T
    )


def _permute(graph: Graph, order: torch.Tensor) -> Graph:
    """The atoms in another order."""
    new_index = torch.argsort(order)
    return replace(
        graph,
        positions=graph.positions[order],
        moments=graph.moments[order],
        species=graph.species[order],
        batch=graph.batch[order],
        receiver=new_index[graph.receiver],
        sender=new_index[graph.sender],
    )


def _other_cell(graph: Graph) -> Graph:
    """Each first atom moved into another image, and another basis of the same lattice."""
    image = torch.tensor([1.0, -2.0, 0.0]).to(graph.positions)
    first = torch.cat([graph.batch.new_ones(1), graph.batch.diff()]).bool()
    offsets = first[:, None] * image
    positions = graph.positions + torch.einsum("ns,nsc->nc", offsets, graph.cell[graph.batch])
    shifts = graph.unit_shifts - offsets[graph.sender] + offsets[graph.receiver]
    basis = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 2.0, 1.0]]).to(graph.positions)
    return replace(
        graph,
        positions=positions,
        cell=basis @ graph.cell,
        unit_shifts=shifts @ torch.linalg.inv(basis),
    )
