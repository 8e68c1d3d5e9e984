"""Relaxation of moments: second order, batched, converged or an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from mmace.derivatives import evaluate, hessian
from mmace.errors import ConvergenceError
from mmace.graph import Graph
from mmace.moments import relax_moments

from .potentials import MOMENT_SCALE, batch, graph_of, pair, random_model, triclinic


class _Quartic:
    """E = Σ a (|m|² - m0²)² - J m_i·m_j + K m_z², site-local apart from the pair term; minima known in closed form."""

    def __init__(self, exchange: float, axial: float) -> None:
        self.exchange, self.axial = exchange, axial

    def geometry(self, graph: Graph) -> Graph:
        return graph

    def spin_energies(self, geometry: Graph, moments: torch.Tensor) -> torch.Tensor:
        same = geometry.batch[:, None] == geometry.batch[None, :]
        same = (same & ~torch.eye(len(same), dtype=torch.bool)).to(moments.dtype)
        field = torch.einsum("ij,bja->bia", same, moments)
        square = moments.square().sum(-1)
        local = 0.05 * (square - 4.0) ** 2 + self.axial * moments[..., 2] ** 2
        return local - 0.5 * self.exchange * (moments * field).sum(-1)


def minimum(neighbours: int, exchange: float, axial: float) -> float:
    """|m| of the ferromagnet along z: 0.2 (m² - 4) + 2K - J z = 0."""
    return float(np.sqrt(4.0 + (exchange * neighbours - 2 * axial) / 0.2))


@pytest.mark.parametrize(("exchange", "axial"), [(0.02, -0.01), (0.05, -1e-5)])
def test_full_relaxation_reaches_the_closed_form(exchange: float, axial: float) -> None:
    graph = batch()
    found = relax_moments(_Quartic(exchange, axial), graph, "full")
    assert float(found.residual.max()) <= 1e-6
    assert float(found.lowest_curvature.min()) > 0
    for k, n in ((0, 3), (1, 2)):
        moments = found.moments[graph.batch == k]
        expected = minimum(n - 1, exchange, axial)
        sign = torch.sign(moments[0, 2])
        tilt = 1e-6 / abs(2 * axial)
        torch.testing.assert_close(
            moments, sign * torch.tensor([[0, 0, expected]] * n).double(), rtol=0, atol=5e-6 + 5 * tilt
        )


def test_magnitudes_keep_their_axes_and_the_other_sign_is_allowed() -> None:
    graph = batch()
    start = graph.moments.clone()
    start[1] = 0.0
    found = relax_moments(_Quartic(0.02, 0.0), graph.with_moments(start), "magnitudes")
    assert float(torch.linalg.cross(found.moments, start).abs().max()) < 1e-12
    assert float(found.moments[1].abs().max()) == 0.0
    free = evaluate_quartic_slope(graph.with_moments(found.moments))
    along = (free * torch.nn.functional.normalize(start, dim=1)).sum(1)
    assert float(along.abs().max()) <= 1e-6


def evaluate_quartic_slope(graph: Graph) -> torch.Tensor:
    leaf = graph.moments.clone().requires_grad_()
    return torch.autograd.grad(_Quartic(0.02, 0.0).spin_energies(graph, leaf[None]).sum(), leaf)[0]


@pytest.mark.parametrize("mode", ["magnitudes", "full"])
@pytest.mark.parametrize("soc", [0.0, 1.0])
def test_potential_converges_in_few_steps_and_batches_agree(mode: str, soc: float) -> None:
    model = random_model(energy_scale=0.5)
    together = relax_moments(model, batch(soc), mode)
    assert together.steps <= 40
    graph = batch(soc).with_moments(together.moments)
    slopes = evaluate(model, graph, magnetic_forces=True).magnetic_forces
    assert slopes is not None
    if mode == "full":
        assert float(slopes.abs().max()) <= 1e-6
    for k, atoms in enumerate((triclinic(), pair())):
        alone = relax_moments(model, graph_of([atoms], soc), mode)
        energy = evaluate(model, graph_of([atoms], soc).with_moments(alone.moments)).energy[0]
        # Minima of one energy may differ by a joint rotation where spin-orbit coupling is off.
        assert abs(float(energy - evaluate(model, graph).energy[k])) < 1e-7


def test_noise_in_the_start_does_not_grow() -> None:
    model = random_model(energy_scale=0.5)
    graph = batch(1.0)
    first = relax_moments(model, graph, "magnitudes", tolerance=1e-9)
    nudged = graph.moments * (1 + 1e-9)
    second = relax_moments(model, graph.with_moments(nudged), "magnitudes", tolerance=1e-9)
    assert float((first.moments - second.moments).abs().max()) < 1e-7
    assert torch.isfinite(first.condition).all()


def test_rotating_the_start_rotates_the_result() -> None:
    model = random_model(energy_scale=0.5)
    turn = torch.tensor(Rotation.from_rotvec([0.3, 1.1, -0.4]).as_matrix())
    graph = graph_of([triclinic()], soc=0.0)
    plain = relax_moments(model, graph, "full").moments
    turned = relax_moments(model, graph.with_moments(graph.moments @ turn.T), "full").moments
    torch.testing.assert_close(turned, plain @ turn.T, rtol=0, atol=1e-5)


def test_forces_at_relaxed_moments_are_those_of_the_relaxed_energy() -> None:
    """Hellmann-Feynman: the moments may follow or stay, the force is the same."""
    model = random_model(energy_scale=0.5)
    graph = graph_of([triclinic()])
    found = relax_moments(model, graph, "full", tolerance=1e-9)
    forces = evaluate(model, graph.with_moments(found.moments), forces=True).forces
    step = 1e-3

    def energy(d: float) -> float:
        atoms = triclinic()
        atoms.positions[2, 1] += d
        moved = graph_of([atoms]).with_moments(found.moments)
        return float(evaluate(model, moved.with_moments(relax_moments(model, moved, "full", 1e-9).moments)).energy)

    numeric = (8 * (energy(step) - energy(-step)) - energy(2 * step) + energy(-2 * step)) / (12 * step)
    assert forces is not None
    assert abs(float(forces[2, 1]) + numeric) < 1e-7


def test_not_converged_is_an_error_with_the_residual() -> None:
    with pytest.raises(ConvergenceError, match=r"structure \d .* 2 steps: the magnetic force is .*eV/µB"):
        relax_moments(random_model(), batch(), "full", max_steps=2)


def test_zero_moments_stay_and_are_known_as_a_saddle() -> None:
    graph = graph_of([pair()])
    found = relax_moments(_Quartic(0.02, 0.0), graph.with_moments(torch.zeros_like(graph.moments)), "full")
    assert float(found.moments.abs().max()) == 0.0
    assert float(found.lowest_curvature) < 0


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="sideways"):
        relax_moments(random_model(), batch(), "sideways")


def test_fixed_reports_and_changes_nothing() -> None:
    graph = batch()
    found = relax_moments(random_model(), graph, "fixed")
    assert torch.equal(found.moments, graph.moments)
    assert found.steps == 0
    curvature = torch.linalg.eigvalsh(hessian(random_model(), graph_of([pair()]), ["mm"])["mm"].view(6, 6))[0]
    torch.testing.assert_close(found.lowest_curvature[1], curvature)
    assert MOMENT_SCALE["Fe"] > 0
