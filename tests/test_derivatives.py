"""Derivatives against central differences, also at m = 0 and beyond the trained range of moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from mmace.derivatives import Evaluation, evaluate, evaluate_spins, hessian, relaxed_response
from mmace.errors import ConvergenceError
from mmace.graph import Graph

from .potentials import MOMENT_SCALE, batch, graph_of, pair, random_model, triclinic

STEP = 1e-4
MODEL = random_model()


def with_special_moments(graph: Graph) -> dict[str, Graph]:
    """The random moments, all of them zero, and each at 1.3 M_z (never on an element without moments)."""
    scale = torch.tensor([MOMENT_SCALE[z] for z in MODEL.elements])[graph.species][:, None]
    carries = MODEL.moment_basis.carriers[graph.species][:, None]
    directions = torch.nn.functional.normalize(graph.moments, dim=1)
    return {
        "random": graph,
        "zero": graph.with_moments(torch.zeros_like(graph.moments)),
        "beyond": graph.with_moments(torch.where(carries, 1.3 * scale * directions, 0.0)),
    }


CASES = with_special_moments(batch())


def difference(value: Callable[[float], torch.Tensor]) -> torch.Tensor:
    """Central difference of fourth order."""
    inner = value(STEP) - value(-STEP)
    outer = value(2 * STEP) - value(-2 * STEP)
    return (8 * inner - outer) / (12 * STEP)


def strained(graph: Graph, strain: torch.Tensor) -> Graph:
    deformation = torch.eye(3).to(strain) + strain
    return replace(graph, positions=graph.positions @ deformation, cell=graph.cell @ deformation)


def shifted(graph: Graph, name: str, index: tuple[int, ...], step: float) -> Graph:
    tensor = getattr(graph, name).clone()
    tensor[index] += step
    return replace(graph, **{name: tensor})


def strain_of(component: int, step: float) -> torch.Tensor:
    """Engineering Voigt strain as a matrix."""
    a, b = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))[component]
    strain = torch.zeros(3, 3, dtype=torch.float64)
    strain[a, b] += 0.5 * step
    strain[b, a] += 0.5 * step
    return strain


def gradients(graph: Graph) -> Evaluation:
    return evaluate(MODEL, graph, forces=True, stress=True, magnetic_forces=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("soc", [0.0, 1.0])
def test_first_derivatives(case: str, soc: float) -> None:
    graph = replace(CASES[case], soc=torch.full((2,), soc, dtype=torch.float64))
    found = gradients(graph)
    assert found.forces is not None
    assert found.stress is not None
    assert found.magnetic_forces is not None
    for atom in range(len(graph.species)):
        for axis in range(3):
            for name, derivative in (("positions", found.forces), ("moments", found.magnetic_forces)):
                numeric = difference(lambda d, n=name, i=(atom, axis): evaluate(MODEL, shifted(graph, n, i, d)).energy)
                own = graph.batch[atom]
                assert_close(-derivative[atom, axis], numeric[own], derivative)
                assert float(numeric[1 - own].abs()) == 0.0
    for component in range(6):
        numeric = difference(lambda d, c=component: evaluate(MODEL, strained(graph, strain_of(c, d))).energy)
        assert_close(found.stress[:, component] * graph.volume, numeric, found.stress * graph.volume[:, None])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("structure", [0, 1])
def test_second_derivatives(case: str, structure: int) -> None:
    whole = CASES[case]
    graph = graph_of([(triclinic, pair)[structure]()])
    graph = graph.with_moments(whole.moments[whole.batch == structure])
    found = hessian(MODEL, graph)
    n = len(graph.species)

    def slope(moved: Graph, variable: str) -> torch.Tensor:
        at = gradients(moved)
        assert at.forces is not None
        assert at.stress is not None
        assert at.magnetic_forces is not None
        return {"r": -at.forces, "m": -at.magnetic_forces, "e": at.stress[0] * moved.volume}[variable]

    for atom in range(n):
        for axis in range(3):
            for column, name in (("r", "positions"), ("m", "moments")):
                for row in "rm" if column == "m" else "r":
                    numeric = difference(lambda d, n=name, i=(atom, axis), v=row: slope(shifted(graph, n, i, d), v))
                    assert_close(found[row + column][..., atom, axis], numeric, found[row + column])
    turn = torch.eye(3, dtype=torch.float64)
    for component in range(6):
        stretched = partial(strained_along, graph, component)
        assert_close(found["em"][component], difference(lambda d, at=stretched: slope(at(d), "m")), found["em"])
        # Positions stretch with the frame, so a force at strain ε is (1 + ε)⁻¹ times the slope by the unstrained ones.
        mixed = difference(lambda d, at=stretched, c=component: slope(at(d), "r") @ (turn + strain_of(c, d)))
        assert_close(found["er"][component], mixed, found["er"])
        numeric = difference(lambda d, c=component: energy_slopes(graph, c, d))
        assert_close(found["ee"][component], numeric, found["ee"])


def strained_along(graph: Graph, component: int, step: float) -> Graph:
    return strained(graph, strain_of(component, step))


def energy_slopes(graph: Graph, component: int, step: float) -> torch.Tensor:
    """dE/dη_b at strain `step` along one component, strains added, not multiplied."""
    return torch.stack(
        [
            difference(
                lambda d, b=b: evaluate(MODEL, strained(graph, strain_of(component, step) + strain_of(b, d))).energy
            )[0]
            for b in range(6)
        ]
    )


def assert_close(found: torch.Tensor, numeric: torch.Tensor, scale: torch.Tensor) -> None:
    """Relative 1e-6 of the largest element of the whole quantity, plus rounding of the differences."""
    allowed = 1e-6 * float(scale.abs().max()) + 1e-9
    assert float((found - numeric).abs().max()) <= allowed


def test_hessian_is_symmetric_and_knows_its_blocks() -> None:
    found = hessian(MODEL, graph_of([triclinic()]))
    assert {name: tuple(block.shape) for name, block in found.items()} == {
        "rr": (3, 3, 3, 3),
        "rm": (3, 3, 3, 3),
        "mm": (3, 3, 3, 3),
        "ee": (6, 6),
        "er": (6, 3, 3),
        "em": (6, 3, 3),
    }
    for name in ("rr", "mm"):
        torch.testing.assert_close(found[name], found[name].permute(2, 3, 0, 1))
    assert float(found["rr"].sum(2).abs().max()) < 1e-9
    with pytest.raises(ValueError, match="xy"):
        hessian(MODEL, graph_of([triclinic()]), ["xy"])
    with pytest.raises(ValueError, match="one structure"):
        hessian(MODEL, batch())


def test_rows_of_some_atoms_are_those_of_the_whole() -> None:
    whole = hessian(MODEL, graph_of([triclinic()]))
    some = hessian(MODEL, graph_of([triclinic()]), rows=[2, 0])
    for name, block in whole.items():
        torch.testing.assert_close(some[name], block if name[0] == "e" else block[[2, 0]])


def test_without_moment_branches_magnetic_derivatives_are_zero() -> None:
    model = random_model(magnetic=False)
    graph = graph_of([triclinic()])
    assert float(evaluate(model, graph, magnetic_forces=True).magnetic_forces.abs().max()) == 0.0
    assert float(hessian(model, graph, ["mm"])["mm"].abs().max()) == 0.0


def test_spin_batch_agrees_with_single_evaluations() -> None:
    graph = batch()
    moments = torch.randn(70, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        geometry = MODEL.geometry(graph)
    energies, forces = evaluate_spins(MODEL, geometry, moments)
    for k in (0, 63, 64, 69):
        single = evaluate(MODEL, graph.with_moments(moments[k]), magnetic_forces=True)
        torch.testing.assert_close(energies[k], single.site_energies, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(forces[k], single.magnetic_forces, rtol=1e-10, atol=1e-12)


def test_relaxed_response_of_a_known_quadratic_form() -> None:
    generator = torch.Generator().manual_seed(2)
    square = torch.randn(7, 7, dtype=torch.float64, generator=generator)
    form = square @ square.T + torch.eye(7)
    eliminated = relaxed_response(form[:3, :3], form[:3, 3:], form[3:, 3:], form[3:, :3])
    torch.testing.assert_close(eliminated, torch.linalg.inv(torch.linalg.inv(form)[:3, :3]))
    with pytest.raises(ConvergenceError, match="saddle"):
        relaxed_response(form[:3, :3], form[:3, 3:], -form[3:, 3:], form[3:, :3])
    values, modes = torch.linalg.eigh(form[3:, 3:])
    free = form[:3, 3:] @ modes[:, 1:] @ modes[:, 1:].T  # nothing couples to the lowest mode
    turned = form[3:, 3:] - (values[0] + 4e-7) * torch.outer(modes[:, 0], modes[:, 0])
    response = relaxed_response(form[:3, :3], free, turned, free.T, noise=5e-7)
    expected = form[:3, :3] - (free @ modes[:, 1:] / values[1:]) @ (modes[:, 1:].T @ free.T)
    torch.testing.assert_close(response, expected)
    with pytest.raises(ConvergenceError, match="saddle"):
        relaxed_response(form[:3, :3], free, turned, free.T, noise=3e-7)
