"""The equations of the potential: bounded moments, magnetic message basis, spin-orbit couplings.

Everything a moment does enters through polynomials in the dot products m_i·m_j, which are exactly the invariants
of spin rotations with time reversal, and, with spin-orbit coupling, through tensors built from them and the
lattice. Moments never enter the radial networks: |m| acts through gates on the messages, so the geometry of a
structure is worth computing once for any number of moments, directions and magnitudes alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ase.data import covalent_radii
from torch import nn

from ._backends import FullyConnectedNet, RadialEmbeddingBlock, o3

SATURATION_WIDTH = 0.05


def ell_of_component(max_ell: int) -> list[int]:
    """The degree l of each component lm, in e3nn's order."""
    return [ell for ell in range(max_ell + 1) for _ in range(2 * ell + 1)]


def natural_irreps(max_ell: int, channels: int = 1) -> o3.Irreps:
    """Irreps of spherical harmonics up to `max_ell`, each `channels` times."""
    return o3.Irreps([(channels, (ell, (-1) ** ell)) for ell in range(max_ell + 1)])


@dataclass(frozen=True)
class MomentFeatures:
    """What the network sees of the moments; B spin configurations of N atoms.

    Attributes
    ----------
    direction : Tensor (B, N, 3)
        μ = m / M_z, smoothly bounded beyond the trained range, zero for elements without moments.
    chebyshev : Tensor (B, N, P)
        T_p(1 - 2 s) - T_p(1) with s = |μ|²: zero where the moment is zero.
    reduced : Tensor (B, N)
        |m|² / M_z², not bounded.
    """

    direction: torch.Tensor
    chebyshev: torch.Tensor
    reduced: torch.Tensor


class MomentBasis(nn.Module):
    """Moments in units of M_z and their magnitudes as Chebyshev polynomials, bounded beyond |m| = M_z.

    Within the trained range all of it is polynomial in m. Beyond it, s = |μ|² saturates twice continuously
    differentiably, so that no product of messages can pull the energy down without bound.

    Parameters
    ----------
    moment_scale : Tensor (Z,)
        M_z in µB.
    carriers : Tensor (Z,), bool
        Elements whose moment the network may see.
    degree : int
        Highest Chebyshev polynomial P.
    """

    moment_scale: torch.Tensor
    carriers: torch.Tensor

    def __init__(self, moment_scale: torch.Tensor, carriers: torch.Tensor, degree: int) -> None:
        super().__init__()
        self.register_buffer("moment_scale", moment_scale)
        self.register_buffer("carriers", carriers)
        self.degree = degree

    def forward(self, moments: torch.Tensor, species: torch.Tensor) -> MomentFeatures:
        """Features of moments (B, N, 3) in µB on atoms of `species` (N,)."""
        scaled = moments / self.moment_scale[species][:, None]
        reduced = scaled.square().sum(-1)
        beyond = reduced > 1.0
        inside = torch.where(beyond, torch.ones_like(reduced), reduced)
        outside = torch.where(beyond, reduced, torch.ones_like(reduced))
        excess = SATURATION_WIDTH * torch.tanh((outside - 1.0) / SATURATION_WIDTH)
        bounded = inside + excess
        carries = self.carriers[species].to(moments.dtype)
        factor = ((1.0 + excess) / outside).sqrt() * carries
        bounded = bounded * carries
        x = 1.0 - 2.0 * bounded
        polynomials = [torch.ones_like(x), x]
        for _ in range(2, self.degree + 1):
            polynomials.append(2.0 * x * polynomials[-1] - polynomials[-2])
        return MomentFeatures(
            direction=scaled * factor[..., None],
            chebyshev=torch.stack(polynomials[1 : self.degree + 1], dim=-1) - 1.0,
            reduced=reduced,
        )


class OneBodyEnergy(nn.Module):
    """E1_z(|m|²): a learned polynomial within the trained range, a rising wall beyond it.

    Elements without moments are held at m = 0 by a parabola. E1(0) = 0.
    """

    def __init__(self, n_elements: int, degree: int, wall: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_elements, degree))
        self.wall = wall

    def forward(self, features: MomentFeatures, species: torch.Tensor, carriers: torch.Tensor) -> torch.Tensor:
        """Energies (B, N) in eV."""
        learned = torch.einsum("bnp,np->bn", features.chebyshev, self.weight[species])
        wall = self.wall * torch.relu(features.reduced - 1.0) ** 3
        pinned = self.wall * features.reduced
        return learned + wall + torch.where(carriers[species], torch.zeros_like(pinned), pinned)


class MomentGate(nn.Module):
    """A factor 1 + Σ_p w_p (T_p - T_p(1)) for each channel and degree: how |m| scales a message."""

    def __init__(self, n_elements: int, degree: int, channels: int, max_ell: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(n_elements, degree, channels, max_ell + 1))
        self.register_buffer("ell", torch.tensor(ell_of_component(max_ell)), persistent=False)

    ell: torch.Tensor

    def forward(self, chebyshev: torch.Tensor, species: torch.Tensor) -> torch.Tensor:
        """Factors (B, N, K, LM)."""
        weight = self.weight[species][..., self.ell]
        return 1.0 + torch.einsum("bnp,npkm->bnkm", chebyshev, weight)


class DegreewiseLinear(nn.Module):
    """Mixes channels with one matrix for each degree l; the only linear map that keeps the symmetry."""

    def __init__(self, channels: int, max_ell: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(max_ell + 1, channels, channels))
        self.norm = channels**-0.5
        self.register_buffer("ell", torch.tensor(ell_of_component(max_ell)), persistent=False)

    ell: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, N, K, LM) → the same shape."""
        return torch.einsum("bnkm,mkc->bncm", x, self.norm * self.weight[self.ell])


@dataclass(frozen=True)
class Geometry:
    """Everything of a batch of structures that moments do not change.

    Edges that join the same two atoms through different images are summed once, so small cells cost a few pairs.

    Attributes
    ----------
    receiver, sender : Tensor (P,)
        Ordered pairs of atoms.
    scalar_filters : list of Tensor (P, K, LM), one for each layer
        R_kl(r) Y_lm(r̂) summed over the images of a pair, over the average number of neighbours.
    vector_filters : list of Tensor (Q, P, C, K, LM)
        The same for the spin-vector basis; Q = C = 1, or for spirals one for each of Q wave vectors with the parts
        C = (along the axis, cosine, sine).
    axis : Tensor (3,) or None
        Rotation axis of spirals.
    repulsion : Tensor (N,)
        Short-range pair repulsion, eV.
    """

    species: torch.Tensor
    batch: torch.Tensor
    soc: torch.Tensor
    receiver: torch.Tensor
    sender: torch.Tensor
    scalar_filters: list[torch.Tensor]
    vector_filters: list[torch.Tensor]
    axis: torch.Tensor | None
    repulsion: torch.Tensor

    def neighbour_moments(self, direction: torch.Tensor) -> torch.Tensor:
        """Moments as the C parts that `vector_filters` turns, shape (B, N, C, 3)."""
        if self.axis is None:
            return direction[:, :, None]
        along = (direction @ self.axis)[..., None] * self.axis
        turned = torch.linalg.cross(self.axis.expand_as(direction), direction)
        return torch.stack([along, direction - along, turned], dim=2)


class RadialFilters(nn.Module):
    """R_kl(r) for the spin-free and the spin-vector basis of one layer, zero at the cut-off."""

    def __init__(self, num_bessel: int, hidden: tuple[int, ...], channels: int, max_ell: int, bases: int) -> None:
        super().__init__()
        self.network = FullyConnectedNet(
            [num_bessel, *hidden, bases * channels * (max_ell + 1)], torch.nn.functional.silu
        )
        self.shape = (bases, channels, max_ell + 1)
        self.register_buffer("ell", torch.tensor(ell_of_component(max_ell)), persistent=False)

    ell: torch.Tensor

    def forward(self, radial: torch.Tensor, harmonics: torch.Tensor) -> torch.Tensor:
        """Filters (E, bases, K, LM) from radial functions (E, n) and harmonics (E, LM)."""
        weights = self.network(radial).view(-1, *self.shape)
        return weights[..., self.ell] * harmonics[:, None, None, :]


class RadialBasis(nn.Module):
    """Bessel functions with a polynomial envelope (mace-torch)."""

    def __init__(self, cutoff: float, num_bessel: int, order: int) -> None:
        super().__init__()
        self.embedding = RadialEmbeddingBlock(r_max=cutoff, num_bessel=num_bessel, num_polynomial_cutoff=order)

    def forward(self, lengths: torch.Tensor) -> torch.Tensor:
        """Radial functions (E, n) of lengths (E,) in Å."""
        nothing = lengths.new_zeros(0)
        return self.embedding(lengths[:, None], nothing, nothing, nothing)[0]


class PairRepulsion(nn.Module):
    """Screened nuclear repulsion, smoothly cut off at the sum of the covalent radii.

    The universal potential of Ziegler, Biersack and Littmark (1985). mace-torch has it too, but evaluates it in torch's
    global default type.

    Parameters
    ----------
    numbers : sequence of int
        Atomic numbers of the elements.
    """

    screening: torch.Tensor
    strength: torch.Tensor
    radius: torch.Tensor

    COEFFICIENTS = (0.1818, 0.5099, 0.2802, 0.02817)
    EXPONENTS = (3.2, 0.9423, 0.4028, 0.2016)
    COULOMB = 14.3996454  # e²/4πε0, eV Å
    BOHR = 0.529177211  # Å

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__()
        z = torch.tensor(numbers, dtype=torch.float64)
        radii = torch.tensor([covalent_radii[n] for n in numbers], dtype=torch.float64)
        power = z**0.23
        self.register_buffer("screening", 0.88534 * self.BOHR / (power[:, None] + power[None, :]), persistent=False)
        self.register_buffer("strength", self.COULOMB * z[:, None] * z[None, :], persistent=False)
        self.register_buffer("radius", radii[:, None] + radii[None, :], persistent=False)

    def forward(
        self, lengths: torch.Tensor, species: torch.Tensor, receiver: torch.Tensor, sender: torch.Tensor
    ) -> torch.Tensor:
        """Energies (N,) in eV, half of each pair's on either atom, from edge lengths (E,) in Å."""
        pair = species[receiver], species[sender]
        reduced = lengths / self.screening[pair]
        screened = sum(c * torch.exp(-x * reduced) for c, x in zip(self.COEFFICIENTS, self.EXPONENTS, strict=True))
        u = (lengths / self.radius[pair]).clamp_max(1.0)
        envelope = 1.0 - 28.0 * u**6 + 48.0 * u**7 - 21.0 * u**8
        energies = 0.5 * self.strength[pair] / lengths * screened * envelope
        return energies.new_zeros(len(species)).index_add(0, receiver, energies)


class ExchangeBasis(nn.Module):
    """The spin-rotation invariant features X of one layer, and the spin-free and spin-vector bases they use.

    X = W_a A + W_v (V·μ) + W_vv (V_lm·V_00) + self terms in |μ|², each gated by |m| of sender and receiver. Without
    `products` the terms in V are left out; without `vectors` so is V, which the spin-orbit part needs too.
    """

    def __init__(
        self, n_elements: int, channels: int, max_ell: int, degree: int, products: bool, vectors: bool
    ) -> None:
        super().__init__()
        self.sender_gate = MomentGate(n_elements, degree, channels, max_ell)
        self.receiver_gate = MomentGate(n_elements, degree, channels, max_ell)
        self.self_terms = nn.Parameter(0.1 * torch.randn(n_elements, degree, channels))
        self.products, self.vectors = products, vectors
        if vectors:
            self.vector_sender_gate = MomentGate(n_elements, degree, channels, max_ell)
        if products:
            self.vector_receiver_gate = MomentGate(n_elements, degree, channels, max_ell)
            self.mix_dot = DegreewiseLinear(channels, max_ell)
            self.mix_square = DegreewiseLinear(channels, max_ell)

    def messages(
        self, geometry: Geometry, layer: int, h: torch.Tensor, features: MomentFeatures
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A (B, N, K, LM) and V (B, N, K, LM, 3) from node features h (B, N, K)."""
        n_atoms = len(geometry.species)
        gated = h[..., None] * self.sender_gate(features.chebyshev, geometry.species)
        scalar = gather(geometry.scalar_filters[layer] * gated[:, geometry.sender], geometry.receiver, n_atoms)
        if not self.vectors:
            return scalar, None
        gated = h[..., None] * self.vector_sender_gate(features.chebyshev, geometry.species)
        parts = geometry.neighbour_moments(features.direction)
        filters = geometry.vector_filters[layer]
        vector = sum(
            (filters[:, :, c] * gated[:, geometry.sender])[..., None]
            * parts[:, geometry.sender, c][:, :, None, None, :]
            for c in range(filters.shape[2])
        )
        return scalar, gather(vector, geometry.receiver, n_atoms)

    def forward(
        self,
        scalar: torch.Tensor,
        vector: torch.Tensor | None,
        mixed_scalar: torch.Tensor,
        features: MomentFeatures,
        species: torch.Tensor,
    ) -> torch.Tensor:
        """X (B, N, K, LM); `mixed_scalar` is W_a A."""
        x = mixed_scalar * self.receiver_gate(features.chebyshev, species)
        own = torch.einsum("bnp,npk->bnk", features.chebyshev, self.self_terms[species])
        x = torch.cat([x[..., :1] + own[..., None], x[..., 1:]], dim=-1)
        if vector is None or not self.products:
            return x
        dot = torch.einsum("bnkma,bna->bnkm", vector, features.direction)
        dot = dot * self.vector_receiver_gate(features.chebyshev, species)
        square = torch.einsum("bnkma,bnka->bnkm", vector, vector[..., 0, :])
        return x + self.mix_dot(dot) + self.mix_square(square)


class SpinOrbitBasis(nn.Module):
    """Spin-orbit features: single-ion A ⊗ (μ_i μ_i)_2 and two-ion V ⊗ μ_i, coupled to the lattice jointly.

    The rank of the spin tensor is 2 for the single-ion part and 1 (Dzyaloshinskii-Moriya) or 2 (symmetric
    anisotropic exchange) for the two-ion part; only couplings of natural parity survive, as axial moments demand.
    """

    def __init__(self, channels: int, max_ell: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        single = _coupling_tensors(max_ell, spin_ranks=(2,))
        double = _coupling_tensors(max_ell, spin_ranks=(1, 2))
        self.register_buffer("single_coupling", single, persistent=False)
        self.register_buffer("double_coupling", double, persistent=False)
        self.register_buffer("square_products", _spin_products((2,)), persistent=False)
        self.register_buffer("pair_products", _spin_products((1, 2)), persistent=False)
        self.single_weight = nn.Parameter(torch.randn(len(single), channels))
        self.double_weight = nn.Parameter(torch.randn(len(double), channels))
        self.mix = DegreewiseLinear(channels, max_ell)

    single_coupling: torch.Tensor
    double_coupling: torch.Tensor
    square_products: torch.Tensor
    pair_products: torch.Tensor

    def forward(self, scalar: torch.Tensor, vector: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """Features (B, N, K, LM) from A (B, N, K, LM), V (B, N, K, LM, 3) and μ (B, N, 3)."""
        quadrupole = torch.einsum("bna,bnc,acs->bns", direction, direction, self.square_products)
        own_filter = torch.einsum("bns,pxsy,pk->bnkxy", quadrupole, self.single_coupling, self.single_weight)
        own = torch.einsum("bnkx,bnkxy->bnky", scalar, own_filter)
        partner = torch.einsum("bnc,acs->bnas", direction, self.pair_products)
        pair_filter = torch.einsum("bnas,pxsy,pk->bnkaxy", partner, self.double_coupling, self.double_weight)
        pair = torch.einsum("bnkxa,bnkaxy->bnky", vector, pair_filter)
        return self.scale * self.mix(own + pair)


def gather(messages: torch.Tensor, receiver: torch.Tensor, n_atoms: int) -> torch.Tensor:
    """Sum messages (B, P, ...) into their receivers (B, N, ...)."""
    total = messages.new_zeros(messages.shape[0], n_atoms, *messages.shape[2:])
    return total.index_add(1, receiver, messages)


def _spin_products(ranks: tuple[int, ...]) -> torch.Tensor:
    """Coefficients (3, 3, S) that couple two axial vectors to spin tensors of the given ranks, side by side."""
    return torch.cat([o3.wigner_3j(1, 1, rank, dtype=torch.float64) * (2 * rank + 1) ** 0.5 for rank in ranks], dim=-1)


def _coupling_tensors(max_ell: int, spin_ranks: tuple[int, ...]) -> torch.Tensor:
    """All couplings l ⊗ rank → l' of natural parity, shape (paths, LM, S, LM)."""
    size = (max_ell + 1) ** 2
    spin_size = sum(2 * rank + 1 for rank in spin_ranks)
    paths = []
    spin_start = 0
    for rank in spin_ranks:
        for ell in range(max_ell + 1):
            for out in range(abs(ell - rank), min(ell + rank, max_ell) + 1):
                if (ell + out) % 2:
                    continue
                tensor = torch.zeros(size, spin_size, size, dtype=torch.float64)
                tensor[ell**2 : (ell + 1) ** 2, spin_start : spin_start + 2 * rank + 1, out**2 : (out + 1) ** 2] = (
                    o3.wigner_3j(ell, rank, out, dtype=torch.float64) * (2 * out + 1) ** 0.5
                )
                paths.append(tensor)
        spin_start += 2 * rank + 1
    return torch.stack(paths)
