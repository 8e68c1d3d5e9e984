"""Structures as tensors: neighbours, batches of structures, generalised Bloch phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from ase import Atoms
from ase.geometry import complete_cell
from matscipy.neighbours import neighbour_list

from .errors import StructureError, UnknownElementError
from .structures import check_moments, moments_of

MIN_DISTANCE = 0.5  # Å; atoms closer than this are one atom entered twice


def check_structure(atoms: Atoms, elements: Sequence[str]) -> None:
    """Raise a clear error where a structure cannot be evaluated by a model that knows `elements`."""
    if len(atoms) == 0:
        raise StructureError("the structure holds no atoms: give at least one.")
    unknown = sorted(set(atoms.get_chemical_symbols()) - set(elements))
    if unknown:
        raise UnknownElementError(
            f"the model does not know the element {unknown[0]} in {atoms.get_chemical_formula()}: "
            f"it was trained on {', '.join(elements)}; use another model or structure."
        )
    bad = np.argwhere(~np.isfinite(atoms.positions))
    if len(bad):
        raise StructureError(f"the position of atom {bad[0][0]} is not finite: mend the structure.")
    if not np.all(np.isfinite(atoms.cell.array)):
        raise StructureError("the cell is not finite: mend the structure.")
    if atoms.pbc.any() and np.any(atoms.cell.lengths()[atoms.pbc] < MIN_DISTANCE):
        raise StructureError("the structure is periodic along a direction without a cell vector: set the cell.")
    periodic = atoms.cell.array[atoms.pbc]
    if np.linalg.det(periodic @ periodic.T) < MIN_DISTANCE ** (2 * len(periodic)):
        raise StructureError("the cell has no volume: set independent cell vectors.")


@dataclass(frozen=True)
class Graph:
    """A batch of structures as tensors; an edge runs from sender j, in image S, to receiver i.

    Attributes
    ----------
    positions : Tensor (N, 3)
        Å.
    cell : Tensor (G, 3, 3)
        Rows are the lattice vectors, Å.
    moments : Tensor (N, 3)
        µB.
    species : Tensor (N,)
        Index into the model's elements.
    receiver, sender : Tensor (E,)
        The edge vector is r_sender - r_receiver + unit_shifts · cell.
    unit_shifts : Tensor (E, 3)
        Image S of the sender in lattice vectors.
    batch : Tensor (N,)
        Structure an atom belongs to.
    soc : Tensor (G,)
        Spin-orbit switch λ: 0 or 1.
    """

    positions: torch.Tensor
    cell: torch.Tensor
    moments: torch.Tensor
    species: torch.Tensor
    receiver: torch.Tensor
    sender: torch.Tensor
    unit_shifts: torch.Tensor
    batch: torch.Tensor
    soc: torch.Tensor

    @property
    def n_graphs(self) -> int:
        """Number of structures."""
        return self.cell.shape[0]

    @property
    def counts(self) -> torch.Tensor:
        """Atoms in each structure, shape (G,)."""
        return torch.bincount(self.batch, minlength=self.n_graphs)

    @property
    def volume(self) -> torch.Tensor:
        """Cell volumes, shape (G,), Å^3."""
        return torch.linalg.det(self.cell).abs()

    @classmethod
    def from_atoms(
        cls,
        atoms: Atoms,
        elements: Sequence[str],
        cutoff: float,
        soc: float = 0.0,
        dtype: torch.dtype = torch.float64,
        moments: np.ndarray | None = None,
    ) -> Graph:
        """Graph of one structure.

        Parameters
        ----------
        atoms : Atoms
            Structure with `initial_magmoms` (N,) or (N, 3) in µB, unless `moments` is given.
        elements : sequence of str
            Elements that the model knows; fixes the species index.
        cutoff : float
            Radius of the neighbour sphere, Å.
        soc : float
            Spin-orbit switch λ.
        dtype : torch.dtype
            Type of the floating tensors.
        moments : ndarray (N, 3), optional
            Moments in µB to use in place of the structure's own.

        Raises
        ------
        MomentError, UnknownElementError, StructureError
            Missing or wrong moments, an unknown element, overlapping atoms or a broken cell.
        """
        check_structure(atoms, elements)
        if moments is None:
            moments = moments_of(atoms)
        else:
            check_moments(np.asarray(moments), len(atoms))
        receiver, sender, unit_shifts = _neighbours(atoms, cutoff)
        vectors = atoms.positions[sender] - atoms.positions[receiver] + unit_shifts @ atoms.cell.array
        lengths = np.linalg.norm(vectors, axis=1)
        if len(lengths) and lengths.min() < MIN_DISTANCE:
            k = int(lengths.argmin())
            raise StructureError(
                f"atoms {receiver[k]} and {sender[k]} overlap ({lengths[k]:.3f} Å apart): mend the structure."
            )
        index = {symbol: z for z, symbol in enumerate(elements)}
        species = [index[symbol] for symbol in atoms.get_chemical_symbols()]
        return cls(
            positions=torch.tensor(atoms.positions, dtype=dtype),
            cell=torch.tensor(atoms.cell.array[None], dtype=dtype),
            moments=torch.tensor(np.asarray(moments), dtype=dtype),
            species=torch.tensor(species, dtype=torch.long),
            receiver=torch.tensor(receiver, dtype=torch.long),
            sender=torch.tensor(sender, dtype=torch.long),
            unit_shifts=torch.tensor(unit_shifts, dtype=dtype),
            batch=torch.zeros(len(atoms), dtype=torch.long),
            soc=torch.tensor([float(soc)], dtype=dtype),
        )

    @classmethod
    def collate(cls, graphs: Sequence[Graph]) -> Graph:
        """One graph that holds all of `graphs` as separate structures."""
        atom_offsets = np.cumsum([0] + [len(g.positions) for g in graphs])
        graph_offsets = np.cumsum([0] + [g.n_graphs for g in graphs])
        shifted = {
            "receiver": atom_offsets,
            "sender": atom_offsets,
            "batch": graph_offsets,
        }
        return cls(
            **{
                f.name: torch.cat(
                    [
                        getattr(g, f.name) + int(shifted[f.name][k]) if f.name in shifted else getattr(g, f.name)
                        for k, g in enumerate(graphs)
                    ]
                )
                for f in fields(cls)
            }
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Graph:
        """The same graph on another device or in another floating type."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def per_structure(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the atoms of each structure: (..., N) → (..., G)."""
        return values.new_zeros(*values.shape[:-1], self.n_graphs).index_add(-1, self.batch, values)

    def with_moments(self, moments: torch.Tensor) -> Graph:
        """The same graph with other moments, shape (N, 3), µB."""
        return replace(self, moments=moments)

    def edge_vectors(self, positions: torch.Tensor, strain: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors from receiver to sender, shape (E, 3), Å.

        Parameters
        ----------
        positions : Tensor (N, 3)
            Å; passed in so that it can carry a gradient.
        strain : Tensor (G, 3, 3), optional
            Symmetric strain ε that takes every vector v to v + v·ε.
        """
        edge_graph = self.batch[self.receiver]
        shifts = torch.einsum("es,esc->ec", self.unit_shifts, self.cell[edge_graph])
        vectors = positions[self.sender] - positions[self.receiver] + shifts
        if strain is not None:
            vectors = vectors + torch.einsum("ec,ecd->ed", vectors, strain[edge_graph])
        return vectors


def _neighbours(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Receivers, senders (E,) and images of the senders (E, 3) within the cut-off, Å."""
    cell, positions, open_ends = atoms.cell.array.copy(), atoms.positions, ~atoms.pbc
    # The search needs three independent vectors and all atoms between them; across open ends they stand upright.
    cell[open_ends] = 0.0
    cell = complete_cell(cell)
    for k in np.flatnonzero(open_ends):
        along = positions @ cell[k]
        positions = positions + (cutoff - along.min()) * cell[k]
        cell[k] *= np.ptp(along) + 2.0 * cutoff
    receiver, sender, shifts = neighbour_list("ijS", positions=positions, cell=cell, pbc=atoms.pbc, cutoff=cutoff)
    other = (receiver != sender) | shifts.any(axis=1)
    return receiver[other], sender[other], shifts[other]
