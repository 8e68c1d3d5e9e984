"""Relaxation of atomic moments at fixed positions: second order, all structures of a batch together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .errors import ConvergenceError
from .graph import Graph

MODES = ("fixed", "magnitudes", "full")
TRUST_START = 0.3  # µB
TRUST_MAX = 1.0  # µB
SHORTEST = 1e-12  # µB; steps this short no longer change anything
SMALL = 0.05  # µB; shorter moments step along straight lines
FLAT = 1e-9  # eV/µB²; softer modes are treated as this stiff, so that noise along them is not amplified


class SpinPotential(Protocol):
    """What relaxation needs of a potential."""

    def geometry(self, graph: Graph) -> Any:
        """All that moments do not change."""

    def spin_energies(self, geometry: Any, moments: torch.Tensor) -> torch.Tensor:
        """Site energies (B, N) in eV of moments (B, N, 3) in µB."""


@dataclass(frozen=True)
class RelaxedMoments:
    """Moments at a stationary point of the energy.

    Attributes
    ----------
    moments : Tensor (N, 3)
        µB.
    residual : Tensor (G,)
        Largest projected magnetic force, eV/µB.
    lowest_curvature : Tensor (G,)
        Smallest eigenvalue of the Hessian in the relaxed components, eV/µB²; negative at a saddle point that
        symmetry keeps the start on.
    condition : Tensor (G,)
        Ratio of the largest to the smallest curvature that is not zero, absolute values.
    steps : int
        Newton steps taken.
    """

    moments: torch.Tensor
    residual: torch.Tensor
    lowest_curvature: torch.Tensor
    condition: torch.Tensor
    steps: int


def relax_moments(
    model: SpinPotential, graph: Graph, mode: str, tolerance: float = 1e-6, max_steps: int = 200
) -> RelaxedMoments:
    """Minimise the energy over the moments, starting from the graph's own.

    Parameters
    ----------
    model : MagneticMACE or another SpinPotential
        The potential.
    graph : Graph
        Structures with the moments to start from.
    mode : str
        "fixed": nothing changes; "magnitudes": each moment keeps the axis it has, zero moments stay zero and a moment
        may pass through zero; "full": all components.
    tolerance : float
        Largest allowed component of the projected magnetic force, eV/µB; float32 models stop at 1e-3 at best.
    max_steps : int
        Newton steps.

    Returns
    -------
    RelaxedMoments

    Raises
    ------
    ConvergenceError
        The tolerance was not reached; the message holds the residual.
    """
    if mode not in MODES:
        raise ValueError(f"there is no moment mode {mode}: choose among {', '.join(MODES)}.")
    start = graph.moments.detach()
    with torch.no_grad():
        geometry = model.geometry(graph)
    coordinates: _Coordinates = _Axes(start) if mode == "magnitudes" else _Vectors()

    def energies(x: torch.Tensor) -> torch.Tensor:
        return graph.per_structure(model.spin_energies(geometry, coordinates.moments(x)[None])[0])

    problem = _BatchedProblem(energies, graph)
    x = coordinates.start(start)
    if mode == "fixed":
        gradient, matrix = problem.expand(x)
        return RelaxedMoments(start, gradient.abs().amax(1), *_curvatures(matrix, graph.counts.tolist()), steps=0)
    return problem.minimise(x, coordinates, tolerance, max_steps)


class _Coordinates(Protocol):
    """How moments are written as variables x (N, d), and how a step is taken."""

    def start(self, moments: torch.Tensor) -> torch.Tensor:
        """Variables of the moments to start from."""

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Moments (N, 3) of variables."""

    def move(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Variables after a step (..., d)."""

    def bend(self, x: torch.Tensor, gradient: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Hessian (G, n, n) along `move`, from the plain one, for x and gradient (G, width, d)."""


class _Axes(_Coordinates):
    """Signed lengths along fixed axes."""

    def __init__(self, moments: torch.Tensor) -> None:
        self.axes = torch.nn.functional.normalize(moments, dim=1, eps=torch.finfo(moments.dtype).tiny)

    def start(self, moments: torch.Tensor) -> torch.Tensor:
        return moments.norm(dim=1, keepdim=True)

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.axes

    def move(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return x + step

    def bend(self, x: torch.Tensor, gradient: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return matrix


class _Vectors(_Coordinates):
    """Vectors that a step turns and stretches, so that the soft valley of joint rotations is followed as it bends."""

    def start(self, moments: torch.Tensor) -> torch.Tensor:
        return moments

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def move(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        length, axis, turns = self._polar(x)
        along = (step * axis).sum(-1, keepdim=True)
        across = step - along * axis
        size = across.norm(dim=-1, keepdim=True)
        angle = size / length.clamp_min(SMALL)
        turned = axis * torch.cos(angle) + across / size.clamp_min(1e-300) * torch.sin(angle)
        return torch.where(turns, (length + along) * turned, x + step)

    def bend(self, x: torch.Tensor, gradient: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        length, axis, turns = self._polar(x)
        along = (gradient * axis).sum(-1, keepdim=True)
        across = gradient - along * axis
        identity = torch.eye(3, dtype=x.dtype, device=x.device)
        transverse = identity - axis[..., :, None] * axis[..., None, :]
        mixed = axis[..., :, None] * across[..., None, :]
        blocks = mixed + mixed.transpose(-1, -2) - along[..., None] * transverse
        blocks = torch.where(turns[..., None], blocks / length.clamp_min(SMALL)[..., None], torch.zeros_like(blocks))
        return matrix + _block_diagonal(blocks)

    @staticmethod
    def _polar(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Lengths, axes, and whether a moment is long enough to be turned."""
        length = x.norm(dim=-1, keepdim=True)
        return length, x / length.clamp_min(SMALL), length > SMALL


class _BatchedProblem:
    """Independent minimisations, one for each structure, as padded dense blocks (G, n)."""

    def __init__(self, energies: Callable[[torch.Tensor], torch.Tensor], graph: Graph) -> None:
        self.energies = energies
        self.batch = graph.batch
        self.n_graphs = graph.n_graphs
        counts = graph.counts
        first = torch.cumsum(counts, 0) - counts
        self.slot = torch.arange(len(graph.batch), device=graph.batch.device) - first[graph.batch]
        self.width = int(counts.max())
        self.counts = counts.tolist()
        self.root_count = counts.double().sqrt()

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(N, d) → (G, width, d), zero where a structure has fewer atoms."""
        return x.new_zeros(self.n_graphs, self.width, x.shape[1]).index_put((self.batch, self.slot), x)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        return packed[self.batch, self.slot]

    def expand(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient (G, n) and Hessian (G, n, n), in float64.

        Structures do not interact, so one backward pass gives the same column of every block.
        """
        leaf = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            energy = self.energies(leaf).sum()
            slope = torch.autograd.grad(energy, leaf, create_graph=True)[0]
            packed = self.pack(slope)
        columns = []
        for slot in range(self.width):
            for d in range(x.shape[1]):
                seed = torch.zeros_like(packed)
                seed[:, slot, d] = 1.0
                column = torch.autograd.grad(packed, leaf, seed, retain_graph=True)[0]
                columns.append(self.pack(column).flatten(1))
        return packed.detach().flatten(1).double(), torch.stack(columns, dim=2).double()

    def minimise(
        self,
        x: torch.Tensor,
        coordinates: _Coordinates,
        tolerance: float,
        max_steps: int,
    ) -> RelaxedMoments:
        """Newton's method on |eigenvalues| inside a trust radius for each structure."""
        radius = torch.full((self.n_graphs,), TRUST_START, dtype=torch.float64, device=x.device)
        energy = self._energy(x)
        gradient, matrix = self.expand(x)
        steps = 0
        while steps < max_steps:
            active = (gradient.abs().amax(1) > tolerance) & (radius > SHORTEST)
            if not bool(active.any()):
                break
            packed = self.pack(x).double()
            bent = coordinates.bend(packed, gradient.view_as(packed), matrix)
            step = _newton_step(gradient, bent, radius * self.root_count) * active[:, None]
            predicted = (gradient * step).sum(1) + 0.5 * torch.einsum("gi,gij,gj->g", step, bent, step)
            trial = self.unpack(coordinates.move(packed, step.view_as(packed))).to(x.dtype)
            trial_energy = self._energy(trial)
            trial_gradient, trial_matrix = self.expand(trial)
            noise = 1e-13 * energy.abs() + 1e-12
            change = trial_energy - energy
            ratio = change / predicted.clamp_max(-1e-300)
            shrinks = trial_gradient.abs().amax(1) < gradient.abs().amax(1)
            accepted = active & ((ratio > 0.05) | ((change.abs() <= noise) & shrinks))
            length = step.norm(dim=1) / self.root_count
            radius = torch.where(accepted & (ratio > 0.7), (2.0 * length).clamp_min(radius), radius)
            radius = torch.where(active & (~accepted | (ratio < 0.25)), 0.3 * length, radius).clamp_max(TRUST_MAX)
            x = torch.where(accepted[self.batch][:, None], trial, x)
            energy = torch.where(accepted, trial_energy, energy)
            gradient = torch.where(accepted[:, None], trial_gradient, gradient)
            matrix = torch.where(accepted[:, None, None], trial_matrix, matrix)
            steps += 1
        residual = gradient.abs().amax(1)
        if bool((residual > tolerance).any()):
            worst = int(residual.argmax())
            raise ConvergenceError(
                f"the moments of structure {worst} did not converge in {steps} steps: the magnetic force is "
                f"{residual[worst].item():.2e} eV/µB, asked were {tolerance:.1e}; start nearer to a stable state "
                "or raise the tolerance."
            )
        curvatures = _curvatures(matrix, self.counts)
        return RelaxedMoments(coordinates.moments(x).detach(), residual, *curvatures, steps=steps)

    def _energy(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.energies(x)


def _newton_step(gradient: torch.Tensor, matrix: torch.Tensor, longest: torch.Tensor) -> torch.Tensor:
    """Downhill step (G, n): -Σ_v v (v·g)/(|λ_v| + σ), σ ≥ 0 as small as the longest allowed norm (G,) permits."""
    eigenvalues, modes = torch.linalg.eigh(0.5 * (matrix + matrix.transpose(1, 2)))
    along = torch.einsum("giv,gi->gv", modes, gradient)
    stiffness = eigenvalues.abs().clamp_min(FLAT)
    low = torch.zeros_like(longest)
    high = gradient.norm(dim=1) / longest
    for _ in range(60):
        middle = 0.5 * (low + high)
        too_long = (along / (stiffness + middle[:, None])).norm(dim=1) > longest
        low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
    shift = torch.where((along / stiffness).norm(dim=1) > longest, high, torch.zeros_like(high))
    return -torch.einsum("giv,gv->gi", modes, along / (stiffness + shift[:, None]))


def _block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    """(G, n, d, d) → (G, n d, n d)."""
    n_graphs, n, d, _ = blocks.shape
    full = blocks.new_zeros(n_graphs, n, d, n, d)
    index = torch.arange(n, device=blocks.device)
    full[:, index, :, index] = blocks.transpose(0, 1)
    return full.view(n_graphs, n * d, n * d)


def _curvatures(matrix: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest eigenvalue (G,) of each block (G, n, n), and its condition number (G,) apart from zero modes."""
    per_atom = matrix.shape[1] // max(counts)
    lowest, condition = [], []
    for block, count in zip(matrix, counts, strict=True):
        own = block[: count * per_atom, : count * per_atom]
        eigenvalues = torch.linalg.eigvalsh(0.5 * (own + own.T))
        size = eigenvalues.abs()
        lowest.append(eigenvalues[0])
        condition.append(size.max() / torch.where(size > 1e-9 * size.max(), size, torch.inf).min())
    return torch.stack(lowest), torch.stack(condition)
