"""The potential E(r, m): configuration and forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from ase.data import atomic_numbers
from torch import nn

from ._backends import SymmetricContraction, U_matrix_real, o3
from .blocks import (
    DegreewiseLinear,
    ExchangeBasis,
    Geometry,
    MomentBasis,
    MomentFeatures,
    OneBodyEnergy,
    PairRepulsion,
    RadialBasis,
    RadialFilters,
    SpinOrbitBasis,
    gather,
    natural_irreps,
)
from .graph import Graph

AT_LEAST_ONE = (
    "num_layers",
    "correlation",
    "num_chebyshev",
    "max_ell",
    "channels",
    "num_bessel",
    "num_polynomial_cutoff",
    "readout_hidden",
)


@dataclass(frozen=True)
class ModelConfig:
    """Settings of a model; all of it is stored with the weights.

    Attributes
    ----------
    elements : tuple of str
        Elements the model knows.
    moment_scale : mapping str → float
        M_z in µB for each element, about 1.2 max|m| + 0.1 of the training moments.
    carriers : tuple of str
        Elements whose moments the model learned; moments of the others are held at zero.
    atomic_energies : mapping str → float
        E0_z, eV.
    energy_scale : float
        Unit of the readouts, eV.
    cutoff : float
        Å.
    wall : float
        Strength of the energy that rises beyond |m| = M_z, eV.
    spin_orbit_scale : float
        Size of the untrained spin-orbit features against the exchange features.
    magnetic, products, spin_orbit : bool
        Switches for whole branches: all of magnetism, the exchange products with V, the spin-orbit part.
    """

    elements: tuple[str, ...]
    moment_scale: Mapping[str, float]
    carriers: tuple[str, ...]
    atomic_energies: Mapping[str, float] = field(default_factory=dict)
    energy_scale: float = 1.0
    cutoff: float = 5.0
    num_bessel: int = 8
    num_polynomial_cutoff: int = 5
    max_ell: int = 3
    correlation: int = 3
    channels: int = 32
    num_layers: int = 2
    radial_mlp: tuple[int, ...] = (64, 64)
    num_chebyshev: int = 4
    readout_hidden: int = 16
    avg_num_neighbors: float = 40.0
    pair_repulsion: bool = True
    wall: float = 5.0
    spin_orbit_scale: float = 0.02
    magnetic: bool = True
    products: bool = True
    spin_orbit: bool = True

    def __post_init__(self) -> None:
        missing = [z for z in self.elements if z not in self.moment_scale]
        if missing:
            raise ValueError(f"moment_scale has no entry for {missing[0]}: give M_z in µB for each element.")
        unknown = [z for z in self.elements if z not in atomic_numbers]
        if unknown:
            raise ValueError(f"{unknown[0]} is not an element: give chemical symbols.")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if not self.radial_mlp or min(self.radial_mlp) < 1:
            raise ValueError(f"radial_mlp is {self.radial_mlp}, but must be widths of at least 1.")
        # without a wall the energy has no lower bound at large moments
        for name in ("cutoff", "wall", "energy_scale", "avg_num_neighbors"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be above 0.")

    @property
    def has_spin_orbit(self) -> bool:
        """Whether the spin-orbit switch λ changes anything."""
        return self.magnetic and self.spin_orbit

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return cls(**values)


class Layer(nn.Module):
    """One message-passing layer: bases, symmetric contraction, update of the node features."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n_elements = len(config.elements)
        k, max_ell = config.channels, config.max_ell
        self.vectors = config.magnetic and (config.products or config.spin_orbit)
        self.filters = RadialFilters(config.num_bessel, tuple(config.radial_mlp), k, max_ell, 2 if self.vectors else 1)
        self.mix_scalar = DegreewiseLinear(k, max_ell)
        self.exchange: ExchangeBasis | None = None
        self.spin_orbit: SpinOrbitBasis | None = None
        if config.magnetic:
            self.exchange = ExchangeBasis(n_elements, k, max_ell, config.num_chebyshev, config.products, self.vectors)
            if config.has_spin_orbit:
                self.spin_orbit = SpinOrbitBasis(k, max_ell, config.spin_orbit_scale)
        self.contraction = _exact_contraction(
            natural_irreps(max_ell, k), o3.Irreps(f"{k}x0e"), config.correlation, n_elements
        )
        self.update = nn.Linear(k, k, bias=False)
        self.skip = nn.Parameter(torch.randn(n_elements, k, k) * k**-0.5)

    def forward(
        self,
        geometry: Geometry,
        layer: int,
        h: torch.Tensor,
        features: MomentFeatures,
        node_attrs: torch.Tensor,
    ) -> torch.Tensor:
        """Node features (B, N, K) → (B, N, K)."""
        n_spins, n_atoms, k = h.shape
        if self.exchange is None:
            messages = geometry.scalar_filters[layer] * h[:, geometry.sender][..., None]
            x = self.mix_scalar(gather(messages, geometry.receiver, n_atoms))
        else:
            scalar, vector = self.exchange.messages(geometry, layer, h, features)
            x = self.exchange(scalar, vector, self.mix_scalar(scalar), features, geometry.species)
            if self.spin_orbit is not None and vector is not None and bool(geometry.soc.any()):
                strength = geometry.soc[geometry.batch][:, None, None]
                x = x + strength * self.spin_orbit(scalar, vector, features.direction)
        contracted = self.contraction(x.flatten(0, 1), node_attrs.repeat(n_spins, 1))
        kept = torch.einsum("bnk,nkc->bnc", h, self.skip[geometry.species])
        return self.update(contracted.view(n_spins, n_atoms, k)) + kept


def is_spin_orbit(name: str) -> bool:
    """Whether a weight of a model, by its name, belongs to the part that only spin-orbit coupling asks for."""
    return ".spin_orbit." in name


class MagneticMACE(nn.Module):
    """Equivariant potential of positions and atomic moments.

    E = Σ_i E0_z + E1_z(|m_i|²) + pair repulsion + energy_scale · Σ_layers readout(h_i)

    Exact by construction: translations, permutations, joint O(3) with axial moments, time reversal, and, with
    spin-orbit coupling off, rotations of the spins alone. Messages and symmetric contraction follow MACE (Batatia
    et al., NeurIPS 2022); the idea of moments as inputs follows Ho et al., arXiv:2604.08143.

    Parameters
    ----------
    config : ModelConfig
        Settings; the weights are random until loaded or trained. The model is built in float64.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        elements = config.elements
        scale = torch.tensor([config.moment_scale[z] for z in elements], dtype=torch.float64)
        carriers = torch.tensor([z in config.carriers for z in elements])
        self.moment_basis = MomentBasis(scale, carriers, config.num_chebyshev)
        self.one_body = OneBodyEnergy(len(elements), config.num_chebyshev, config.wall)
        self.radial = RadialBasis(config.cutoff, config.num_bessel, config.num_polynomial_cutoff)
        numbers = [atomic_numbers[z] for z in elements]
        self.repulsion = PairRepulsion(numbers) if config.pair_repulsion else None
        self.embedding = nn.Parameter(torch.randn(len(elements), config.channels))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        k = config.channels
        self.readouts = nn.ModuleList(nn.Linear(k, 1, bias=False) for _ in range(config.num_layers - 1))
        self.readouts.append(
            nn.Sequential(
                nn.Linear(k, config.readout_hidden, bias=False),
                nn.SiLU(),
                nn.Linear(config.readout_hidden, 1, bias=False),
            )
        )
        self.double()

    @property
    def elements(self) -> tuple[str, ...]:
        """Elements the model knows."""
        return self.config.elements

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedding.device

    def geometry(
        self,
        graph: Graph,
        positions: torch.Tensor | None = None,
        strain: torch.Tensor | None = None,
        wave_vectors: torch.Tensor | None = None,
        axis: torch.Tensor | None = None,
    ) -> Geometry:
        """All that moments do not change.

        Parameters
        ----------
        graph : Graph
            Structures.
        positions : Tensor (N, 3), optional
            Positions in Å that carry a gradient, in place of the graph's own.
        strain : Tensor (G, 3, 3), optional
            Symmetric strain.
        wave_vectors : Tensor (Q, 3), optional
            Spirals, in units of the reciprocal lattice vectors: the moment of image S is turned by 2π q·S.
        axis : Tensor (3,), optional
            Unit vector the spirals turn about.
        """
        vectors = graph.edge_vectors(graph.positions if positions is None else positions, strain)
        lengths = vectors.norm(dim=1)
        # The harmonics are TorchScript; its profiling would make the first calls several times slower than the rest.
        with torch.jit.optimized_execution(False):
            harmonics = o3.spherical_harmonics(
                list(range(self.config.max_ell + 1)), vectors, normalize=True, normalization="component"
            )
        radial = self.radial(lengths)
        n_atoms = len(graph.species)
        pairs, pair_of_edge = torch.unique(graph.receiver * n_atoms + graph.sender, return_inverse=True)
        turns = None if wave_vectors is None else 2 * torch.pi * graph.unit_shifts @ wave_vectors.T
        scalar_filters, vector_filters = [], []
        for layer in (cast(Layer, module) for module in self.layers):
            filters = layer.filters(radial, harmonics) / self.config.avg_num_neighbors
            scalar_filters.append(_sum_images(filters[:, 0], pair_of_edge, len(pairs)))
            if layer.vectors:
                vector_filters.append(_turned_sums(filters[:, 1], turns, pair_of_edge, len(pairs)))
        return Geometry(
            species=graph.species,
            batch=graph.batch,
            soc=graph.soc,
            receiver=pairs // n_atoms,
            sender=pairs % n_atoms,
            scalar_filters=scalar_filters,
            vector_filters=vector_filters,
            axis=axis,
            repulsion=self._repulsion(graph, lengths),
        )

    def spin_energies(self, geometry: Geometry, moments: torch.Tensor) -> torch.Tensor:
        """Site energies (B, N) in eV, in float64, of moments (B, N, 3) in µB on one geometry."""
        species = geometry.species
        features = self.moment_basis(moments, species)
        node_attrs = torch.nn.functional.one_hot(species, len(self.elements)).to(self.dtype)
        h = self.embedding[species].expand(len(moments), -1, -1)
        readout = torch.zeros_like(features.reduced)
        for t, layer in enumerate(self.layers):
            h = layer(geometry, t, h, features, node_attrs)
            readout = readout + self.readouts[t](h)[..., 0]
        local = self.config.energy_scale * readout + geometry.repulsion
        if self.config.magnetic:
            local = local + self.one_body(features, species, self.moment_basis.carriers)
        references = torch.tensor(
            [self.config.atomic_energies.get(z, 0.0) for z in self.elements],
            dtype=torch.float64,
            device=species.device,
        )
        return local.double() + references[species]

    def site_energies(self, graph: Graph, moments: torch.Tensor | None = None) -> torch.Tensor:
        """Site energies (B, N) in eV of moments (B, N, 3) in µB, by default the graph's own with B = 1."""
        return self.spin_energies(self.geometry(graph), graph.moments[None] if moments is None else moments)

    forward = site_energies

    def _repulsion(self, graph: Graph, lengths: torch.Tensor) -> torch.Tensor:
        if self.repulsion is None:
            return lengths.new_zeros(len(graph.species))
        return self.repulsion(lengths, graph.species, graph.receiver, graph.sender)


def _sum_images(filters: torch.Tensor, pair_of_edge: torch.Tensor, n_pairs: int) -> torch.Tensor:
    """Sum edge filters (E, ...) over the images of each pair (P, ...)."""
    return filters.new_zeros(n_pairs, *filters.shape[1:]).index_add(0, pair_of_edge, filters)


def _turned_sums(
    filters: torch.Tensor, turns: torch.Tensor | None, pair_of_edge: torch.Tensor, n_pairs: int
) -> torch.Tensor:
    """Sums over images (Q, P, C, K, LM), with the image's turn (E, Q) as cosine and sine parts."""
    plain = _sum_images(filters, pair_of_edge, n_pairs)
    if turns is None:
        return plain[None, :, None]
    member = (pair_of_edge[:, None] == torch.arange(n_pairs, device=filters.device)).to(filters.dtype)
    cosine = torch.einsum("ep,eq,ekm->qpkm", member, torch.cos(turns), filters)
    sine = torch.einsum("ep,eq,ekm->qpkm", member, torch.sin(turns), filters)
    return torch.stack([plain.expand_as(cosine), cosine, sine], dim=2)


def _exact_contraction(
    irreps_in: o3.Irreps, irreps_out: o3.Irreps, correlation: int, n_elements: int
) -> SymmetricContraction:
    """mace-torch's symmetric contraction with coupling coefficients good to float64.

    The library takes their type from torch's global default; they are computed again instead of changing it.
    """
    module = SymmetricContraction(irreps_in, irreps_out, correlation, num_elements=n_elements)
    couplings = o3.Irreps([ir for _, ir in irreps_in])
    for contraction, (_, ir_out) in zip(module.contractions, irreps_out, strict=True):
        for order in range(1, correlation + 1):
            exact = U_matrix_real(couplings, o3.Irreps([(1, ir_out)]), order, dtype=torch.float64, use_cueq_cg=False)[
                -1
            ]
            contraction.register_buffer(f"U_matrix_{order}", exact)
    return module
