"""First and second derivatives of the potential by automatic differentiation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .blocks import Geometry
from .errors import ConvergenceError
from .graph import Graph
from .model import MagneticMACE

BLOCKS = ("rr", "rm", "mm", "ee", "er", "em")
VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
HESSIAN_ROWS_AT_ONCE = 24
HESSIAN_EDGES_AT_ONCE = 50_000  # rows times edges; bounds the memory of large supercells
SPINS_AT_ONCE = 64


@dataclass(frozen=True)
class Evaluation:
    """Energies and first derivatives of G structures with N atoms in all; None where not asked for.

    Attributes
    ----------
    energy : Tensor (G,)
        eV.
    site_energies : Tensor (N,)
        eV.
    forces : Tensor (N, 3) or None
        -dE/dr, eV/Å.
    stress : Tensor (G, 6) or None
        dE/dε / V, Voigt xx, yy, zz, yz, xz, xy, eV/Å^3.
    magnetic_forces : Tensor (N, 3) or None
        -dE/dm, eV/µB.
    """

    energy: torch.Tensor
    site_energies: torch.Tensor
    forces: torch.Tensor | None = None
    stress: torch.Tensor | None = None
    magnetic_forces: torch.Tensor | None = None


def evaluate(
    model: MagneticMACE,
    graph: Graph,
    forces: bool = False,
    stress: bool = False,
    magnetic_forces: bool = False,
    create_graph: bool = False,
) -> Evaluation:
    """Energies of a batch of structures with the derivatives asked for.

    Parameters
    ----------
    model : MagneticMACE
        The potential.
    graph : Graph
        Structures with their moments.
    forces, stress, magnetic_forces : bool
        Which derivatives to compute.
    create_graph : bool
        Keep the results differentiable, for training.

    Returns
    -------
    Evaluation
        In float64 energies, derivatives in the model's type; the stress of a structure without a volume is NaN.
    """
    positions = graph.positions.detach().clone().requires_grad_(forces)
    moments = graph.moments.detach().clone().requires_grad_(magnetic_forces)
    strain = torch.zeros_like(graph.cell).requires_grad_(stress)
    wanted = [x for x in (positions, strain, moments) if x.requires_grad]
    with torch.set_grad_enabled(bool(wanted) or create_graph):
        geometry = model.geometry(graph, positions, _symmetric(strain) if stress else None)
        site_energies = model.spin_energies(geometry, moments[None])[0]
        energy = graph.per_structure(site_energies)
    slopes = _gradients(energy.sum(), wanted, create_graph)
    by_variable = {id(x): slope for x, slope in zip(wanted, slopes, strict=True)}
    if not create_graph:
        energy, site_energies = energy.detach(), site_energies.detach()
    return Evaluation(
        energy=energy,
        site_energies=site_energies,
        forces=-by_variable[id(positions)] if forces else None,
        stress=_per_volume(_voigt(by_variable[id(strain)]), graph.volume) if stress else None,
        magnetic_forces=-by_variable[id(moments)] if magnetic_forces else None,
    )


def evaluate_spins(
    model: MagneticMACE, geometry: Geometry, moments: torch.Tensor, magnetic_forces: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Many spin configurations on one geometry.

    Parameters
    ----------
    model : MagneticMACE
        The potential.
    geometry : Geometry
        From `model.geometry`; for spirals it holds one wave vector for each configuration, or one for all.
    moments : Tensor (B, N, 3)
        µB.
    magnetic_forces : bool
        Compute -dE/dm too.

    Returns
    -------
    site_energies : Tensor (B, N)
        eV.
    magnetic_forces : Tensor (B, N, 3) or None
        eV/µB.
    """
    energies, slopes = [], []
    for chunk in torch.split(moments.detach(), SPINS_AT_ONCE):
        leaf = chunk.clone().requires_grad_(magnetic_forces)
        with torch.set_grad_enabled(magnetic_forces):
            site_energies = model.spin_energies(geometry, leaf)
        energies.append(site_energies.detach())
        if magnetic_forces:
            slopes.append(_gradients(site_energies.sum(), [leaf], create_graph=False)[0])
    return torch.cat(energies), -torch.cat(slopes) if magnetic_forces else None


def hessian(
    model: MagneticMACE, graph: Graph, blocks: Sequence[str] = BLOCKS, rows: Sequence[int] | None = None
) -> dict[str, torch.Tensor]:
    """Second derivatives of the energy of one structure at fixed moments.

    Parameters
    ----------
    model : MagneticMACE
        The potential.
    graph : Graph
        One structure.
    blocks : sequence of str
        Among rr, rm, mm, ee, er, em: r positions (Å), m moments (µB), e strain (Voigt, engineering: γ = 2ε).
    rows : sequence of int, optional
        Atoms whose rows of rr, rm and mm are wanted, R of them; all by default. One cell's rows are all that the
        couplings of a large supercell need.

    Returns
    -------
    dict of Tensor
        rr, rm, mm (R, 3, N, 3), ee (6, 6), er, em (6, N, 3); eV over the units of the two variables.

    Raises
    ------
    ValueError
        An unknown block, or a graph with more than one structure.
    """
    unknown = [block for block in blocks if block not in BLOCKS]
    if unknown:
        raise ValueError(f"there is no Hessian block {unknown[0]}: choose among {', '.join(BLOCKS)}.")
    if graph.n_graphs != 1:
        raise ValueError(f"a Hessian is of one structure, but the graph holds {graph.n_graphs}: evaluate one by one.")
    n_atoms = len(graph.species)
    wanted = list(range(n_atoms)) if rows is None else list(rows)
    variables = {
        "r": graph.positions.detach().clone().requires_grad_(),
        "m": graph.moments.detach().clone().requires_grad_(),
        "e": graph.positions.new_zeros(6).requires_grad_(),
    }
    with torch.enable_grad():
        geometry = model.geometry(graph, variables["r"], _strain_from_voigt(variables["e"])[None])
        energy = model.spin_energies(geometry, variables["m"][None]).sum()
    at_once = max(1, min(HESSIAN_ROWS_AT_ONCE, HESSIAN_EDGES_AT_ONCE // max(len(graph.sender), 1)))
    result = {}
    for row in dict.fromkeys(block[0] for block in blocks):
        columns = [block[1] for block in blocks if block[0] == row]
        slope = _gradients(energy, [variables[row]], create_graph=True)[0]
        if row != "e":
            slope = slope[wanted]
        for column, matrix in zip(columns, _jacobian(slope, [variables[c] for c in columns], at_once), strict=True):
            first = (6,) if row == "e" else (len(wanted), 3)
            second = (6,) if column == "e" else (n_atoms, 3)
            result[row + column] = matrix.reshape(*first, *second)
    return result


def relaxed_response(
    fixed: torch.Tensor,
    coupling_left: torch.Tensor,
    inner: torch.Tensor,
    coupling_right: torch.Tensor,
    noise: float = 0.0,
) -> torch.Tensor:
    """Schur complement H_ab - H_ax H_xx⁻¹ H_xb: the response when the inner variables x follow.

    Zero modes of H_xx, such as a rotation of all spins without spin-orbit coupling, do not couple and are left out.

    Parameters
    ----------
    fixed : Tensor (A, B)
        H_ab at fixed x.
    coupling_left, coupling_right : Tensor (A, X), (X, B)
        H_ax and H_xb.
    inner : Tensor (X, X)
        H_xx.
    noise : float
        Curvature, eV/µB², by which a zero mode may be negative: the force that relaxation left over the moment.

    Raises
    ------
    ConvergenceError
        The inner variables are at a saddle point, so that nothing follows adiabatically.
    """
    eigenvalues, modes = torch.linalg.eigh(0.5 * (inner + inner.T))
    floor = max(1e-9, 10 * torch.finfo(inner.dtype).eps) * eigenvalues.abs().max()
    if eigenvalues[0] < -floor - noise:
        raise ConvergenceError(
            f"the moments sit at a saddle point (lowest curvature {eigenvalues[0].item():.3e} eV/µB²): "
            "start from another magnetic order."
        )
    kept = eigenvalues > floor
    left = coupling_left @ modes[:, kept] / eigenvalues[kept]
    return fixed - left @ (modes[:, kept].T @ coupling_right)


def _gradients(energy: torch.Tensor, variables: list[torch.Tensor], create_graph: bool) -> list[torch.Tensor]:
    """Gradients, zero for variables that the energy does not depend on."""
    if not variables:
        return []
    if not energy.requires_grad:
        return [torch.zeros_like(x) for x in variables]
    found = torch.autograd.grad(energy, variables, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, variables, strict=True)]


def _jacobian(slope: torch.Tensor, variables: list[torch.Tensor], rows_at_once: int) -> list[torch.Tensor]:
    """Derivatives of a flattened gradient by each variable, (size of slope, size of variable)."""
    rows: list[list[torch.Tensor]] = []
    size = slope.numel()
    if not slope.requires_grad:
        return [slope.new_zeros(size, x.numel()) for x in variables]
    unit = torch.eye(size, dtype=slope.dtype, device=slope.device).view(size, *slope.shape)
    for chunk in torch.split(unit, rows_at_once):
        found = torch.autograd.grad(
            slope, variables, chunk, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        rows.append(
            [
                slope.new_zeros(len(chunk), x.numel()) if g is None else g.reshape(len(chunk), -1)
                for g, x in zip(found, variables, strict=True)
            ]
        )
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def _symmetric(strain: torch.Tensor) -> torch.Tensor:
    return 0.5 * (strain + strain.transpose(-1, -2))


def _voigt(tensors: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensors[..., a, b] for a, b in VOIGT], dim=-1)


def _per_volume(values: torch.Tensor, volume: torch.Tensor) -> torch.Tensor:
    """Values (G, 6) over volumes (G,); NaN without a volume, of which gradients of the others learn nothing."""
    known = volume > 0
    return torch.where(known[:, None], values / torch.where(known, volume, 1.0)[:, None], torch.nan)


def _strain_from_voigt(voigt: torch.Tensor) -> torch.Tensor:
    """Strain (3, 3) from engineering components (6,)."""
    xx, yy, zz, yz, xz, xy = voigt
    rows = (xx, xy / 2, xz / 2, xy / 2, yy, yz / 2, xz / 2, yz / 2, zz)
    return torch.stack(rows).view(3, 3)
