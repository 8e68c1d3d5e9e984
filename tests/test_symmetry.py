"""Each generator of the symmetry group alone, on random weights, on trained weights, and on broken models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st

from mmace.graph import Graph
from mmace.io import load_model, model_files
from mmace.model import MagneticMACE
from mmace.symmetry import assert_symmetries, symmetry_errors

from .potentials import ELEMENTS, batch, graph_of, random_model, triclinic


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_random_weights_keep_every_symmetry(seed: int, layers: int) -> None:
    assert_symmetries(random_model(seed, num_layers=layers), batch(), seed=seed)


@pytest.mark.parametrize("member", [0, -1])
def test_shipped_weights_keep_every_symmetry(member: int) -> None:
    model = load_model(model_files("default")[member])
    atoms = triclinic()
    graph = Graph.collate(
        [Graph.from_atoms(a, model.elements, model.config.cutoff) for a in (atoms, atoms[[0, 2]], atoms[[0]])]
    )
    assert_symmetries(model, graph)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(0.0, 6.0))
def test_symmetries_hold_for_any_moments(seed: int, scale: float) -> None:
    graph = batch()
    moments = torch.tensor(np.random.default_rng(seed).normal(size=(5, 3))) * scale
    assert_symmetries(random_model(), graph.with_moments(moments), seed=seed)


def test_another_cell_of_the_same_crystal_gives_the_same_energy() -> None:
    model, atoms = random_model(), triclinic()
    other = Atoms(
        atoms.numbers,
        positions=atoms.positions,
        cell=np.array([[1, 1, 0], [0, 1, 0], [0, 2, 1]]) @ atoms.cell,
        pbc=True,
    )
    other.set_initial_magnetic_moments(atoms.get_initial_magnetic_moments())
    other.wrap()
    double = atoms.repeat((2, 1, 1))
    energies = [float(model.site_energies(graph_of([a])).sum().detach()) for a in (atoms, other, double)]
    np.testing.assert_allclose(energies[1:], [energies[0], 2 * energies[0]], rtol=1e-12)


def test_spin_orbit_coupling_is_felt_and_switched_off_exactly() -> None:
    model, graph = random_model(), batch()
    turn = torch.linalg.qr(torch.tensor(np.random.default_rng(3).normal(size=(3, 3))))[0]
    change = {}
    for soc in (0.0, 1.0):
        at = replace(graph, soc=torch.full_like(graph.soc, soc))
        change[soc] = float(
            (model.site_energies(at.with_moments(at.moments @ turn.T)) - model.site_energies(at)).detach().abs().max()
        )
    assert change[0.0] < 1e-12
    assert change[1.0] > 1e-4


class _PolarMoments(MagneticMACE):
    """Adds m·(Σ_j r_ij): right for rotations and for polar moments only."""

    def site_energies(self, graph: Graph, moments: torch.Tensor | None = None) -> torch.Tensor:
        vectors = graph.edge_vectors(graph.positions)
        field = torch.zeros_like(graph.moments).index_add(0, graph.receiver, vectors * vectors.norm(dim=1)[:, None])
        return (
            super().site_energies(graph, moments)
            + 1e-3 * (graph.moments * field).sum(-1) ** 2
            + 1e-4 * (graph.moments * field).sum(-1)
        )


class _LongAxis(MagneticMACE):
    """Adds an energy that knows the laboratory's z axis."""

    def site_energies(self, graph: Graph, moments: torch.Tensor | None = None) -> torch.Tensor:
        return super().site_energies(graph, moments) + 1e-6 * graph.moments[:, 2] ** 2


class _FirstAtom(MagneticMACE):
    """Adds an energy to whichever atom comes first."""

    def site_energies(self, graph: Graph, moments: torch.Tensor | None = None) -> torch.Tensor:
        energies = super().site_energies(graph, moments)
        return energies + 1e-6 * torch.nn.functional.one_hot(torch.tensor(0), energies.shape[1])


class _Origin(MagneticMACE):
    """Adds an energy that knows where the origin is."""

    def site_energies(self, graph: Graph, moments: torch.Tensor | None = None) -> torch.Tensor:
        return super().site_energies(graph, moments) + 1e-6 * graph.positions.square().sum(-1)


@pytest.mark.parametrize(
    ("broken", "named", "not_named"),
    [
        (
            _PolarMoments,
            ["inversion with axial moments", "time reversal"],
            ["permutation", "translation", "space rotation with moments"],
        ),
        (
            _LongAxis,
            ["space rotation with moments", "; spin rotation"],
            ["time reversal", "translation", "permutation"],
        ),
        (_FirstAtom, ["permutation"], ["time reversal", "rotation", "translation", "cell"]),
        (_Origin, ["translation", "cell choice"], ["time reversal", "spin rotation", "permutation"]),
    ],
)
def test_a_broken_generator_is_named(broken: type[MagneticMACE], named: list[str], not_named: list[str]) -> None:
    model = broken(random_model().config)
    with pytest.raises(AssertionError) as caught:
        assert_symmetries(model, batch())
    text = str(caught.value)
    assert all(name in text for name in named), text
    assert not any(name in text for name in not_named), text


def test_every_generator_is_checked_with_and_without_spin_orbit_coupling() -> None:
    names = [error.generator for error in symmetry_errors(random_model(), batch())]
    assert len(names) == len(set(names)) == 16
    assert random_model().elements == ELEMENTS
