"""Collinear magnetic orders of a crystal in small supercells, one of each kind."""

import itertools
from dataclasses import dataclass

import numpy as np
import spglib
from ase import Atoms
from ase.geometry.minkowski_reduction import minkowski_reduce
from numpy.typing import ArrayLike, NDArray

from .errors import MomentError, OptionError, StructureError
from .protocol import SMALLEST_MOMENT, superlattices, with_moments
from .symmetry import nearest_rotation, primitive_cell, searched

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

MOST_SITES = 16
"""Magnetic sites in a supercell whose sign patterns are still enumerated."""
COMPENSATED = 1e-6

KEPT = "1 where no moment vanished or turned over against the others"
LOST_ORDER = "lost: a moment vanished or turned over"

SAME_ENERGY = 1e-6
"""Energies per atom in eV that differ by no more belong to one state."""


@dataclass(frozen=True)
class CollinearOrder:
    """A collinear order in its smallest cell.

    Parameters
    ----------
    name : ``fm``, ``nm``, ``afm-1``, ... where the moments cancel, ``ferri-1``, ... where they do not.
    atoms : the cell with its moments (N, 3) in µB.
    cells : number of primitive cells of the crystal in it.
    """

    name: str
    atoms: Atoms
    cells: int


def collinear_orders(
    atoms: Atoms,
    lengths: Array,
    axis: Array,
    max_cells: int,
    max_orders: int,
    symprec: float,
    mag_symprec: float,
) -> list[CollinearOrder]:
    """Return every collinear order with a cell of at most `max_cells` primitive cells, up to symmetry.

    Orders that a space-group operation of the crystal or a reversal of all moments takes into each other are one; an
    order that a smaller cell holds appears there alone. Superlattices are counted as Hermite normal forms (G. L. W.
    Hart and R. W. Forcade, Phys. Rev. B 77, 224115 (2008)).

    Parameters
    ----------
    atoms : the crystal.
    lengths : |m| of its atoms in µB, shape (N,); those that have vanished stay without.
    axis : of the moments, shape (3,).
    max_cells : size of the largest supercell.
    max_orders : most orders to return.
    symprec, mag_symprec : tolerances in Å and µB.

    Returns
    -------
    ``fm`` first, then the others by size of their cell, ``nm`` last.

    Raises
    ------
    MomentError : no atom carries a moment.
    OptionError : more orders than `max_orders`, or more than 16 magnetic sites in a supercell.
    StructureError : spglib finds no symmetry at this tolerance.
    """
    small, sizes = primitive_cell(atoms, _merged(atoms, np.abs(lengths), mag_symprec), symprec, mag_symprec)
    sites = np.flatnonzero(sizes > SMALLEST_MOMENT)
    if not len(sites):
        raise MomentError("no atom carries a moment, so there are no orders to try; give moments in µB")
    if len(sites) > MOST_SITES:
        raise OptionError(
            f"the crystal has {len(sites)} magnetic sites, too many orders to try; the most is {MOST_SITES}, so give "
            "an order as a structure file with moments"
        )
    if max_cells * len(sites) > MOST_SITES:
        raise OptionError(
            f"max_cells cannot be {max_cells}: {max_cells} cells with {len(sites)} magnetic sites each have too many "
            f"orders to try; the product is at most {MOST_SITES}"
        )
    rotations, images, shifts = _operations(small, sizes, symprec)
    found: list[CollinearOrder] = []
    counts = {"afm": 0, "ferri": 0}
    direction = axis / np.linalg.norm(axis)
    for count in range(1, max_cells + 1):
        for shape in _distinct_shapes(count, rotations):
            for pattern in _distinct_patterns(shape, sites, rotations, images, shifts):
                signed = pattern * sizes[sites][:, None]
                if (pattern > 0).all():
                    name = "fm"
                else:
                    kind = "afm" if abs(signed.sum()) <= COMPENSATED * np.abs(signed).sum() else "ferri"
                    counts[kind] += 1
                    name = f"{kind}-{counts[kind]}"
                if len(found) == max_orders - 1:
                    way = "lower max_cells, or raise max_orders" if max_cells > 1 else "raise max_orders"
                    raise OptionError(f"there are more than {max_orders} orders within {max_cells} cells; {way}")
                found.append(CollinearOrder(name, _cell(small, sites, shape, signed, direction), count))
    nonmagnetic = with_moments(small, np.zeros((len(small), 3)))
    return [*found, CollinearOrder("nm", nonmagnetic, 1)]


def _merged(atoms: Atoms, lengths: Array, tolerance: float) -> Array:
    """Give lengths of one element that differ by no more than the tolerance the same value, that of the first."""
    merged = lengths.copy()
    for k, (number, length) in enumerate(zip(atoms.numbers, lengths, strict=True)):
        alike = (atoms.numbers[:k] == number) & (np.abs(merged[:k] - length) <= tolerance)
        if alike.any():
            merged[k] = merged[:k][alike][0]
    return merged


def order_is_kept(start: Array, reached: Array) -> bool:
    """Say whether every moment that was there still is, on the same side up to a turn of all; both (N, 3) in µB."""
    lengths = np.linalg.norm(start, axis=1)
    carrying = lengths > SMALLEST_MOMENT
    turned = reached @ nearest_rotation(start.T @ reached).T
    along = np.einsum("ix,ix->i", start[carrying], turned[carrying]) / lengths[carrying]
    return bool((along > SMALLEST_MOMENT).all())


def rank(energies: ArrayLike, kept: ArrayLike) -> Array:
    """Return what to sort orders by, from energies per atom in eV and the share of members in which each is kept.

    An order that lost itself ends in the state of another, which then is the one to name.
    """
    return np.asarray(energies) + SAME_ENERGY * (1 - np.asarray(kept, dtype=float))


def _operations(cell: Atoms, sizes: Array, symprec: float) -> tuple[Integers, Integers, Integers]:
    """Return rotations (G, 3, 3), images of atoms (G, N), and the cells these lie in (G, N, 3)."""
    kinds = np.unique(np.column_stack([cell.numbers, np.round(sizes, 6)]), axis=0, return_inverse=True)[1].ravel()
    scaled = cell.get_scaled_positions(wrap=False)
    found = searched(spglib.get_symmetry, (cell.cell[:], scaled, kinds + 1), symprec=symprec)
    if found is None:
        raise StructureError(f"spglib finds no symmetry at symprec {symprec:g} Å; choose another --symprec")
    images, shifts = [], []
    for w, t in zip(found["rotations"], found["translations"], strict=True):
        apart = (scaled @ w.T + t)[:, None] - scaled[None]
        distance = np.linalg.norm((apart - np.round(apart)) @ cell.cell[:], axis=2)
        distance[kinds[:, None] != kinds[None]] = np.inf
        image = distance.argmin(axis=1)
        images.append(image)
        shifts.append(np.rint(apart[np.arange(len(cell)), image]).astype(np.int64))
    return np.asarray(found["rotations"], dtype=np.int64), np.array(images), np.array(shifts)


def _normal_form(rows: Integers) -> Integers:
    """Return the Hermite normal form of a superlattice: upper triangular rows, entries above a pivot reduced."""
    h = rows.astype(np.int64).copy()
    for column in range(3):
        while True:
            below = [r for r in range(column, 3) if h[r, column]]
            pivot = min(below, key=lambda r: abs(int(h[r, column])))
            h[[column, pivot]] = h[[pivot, column]]
            if h[column, column] < 0:
                h[column] *= -1
            for r in range(column + 1, 3):
                h[r] -= (h[r, column] // h[column, column]) * h[column]
            if not h[column + 1 :, column].any():
                break
        for r in range(column):
            h[r] -= (h[r, column] // h[column, column]) * h[column]
    return h


def _distinct_shapes(count: int, rotations: Integers) -> list[Integers]:
    """Return one superlattice of each kind that the point group makes equivalent."""
    shapes: list[Integers] = []
    seen: set[bytes] = set()
    points = np.unique(rotations, axis=0)
    for shape in superlattices(count):
        if shape.tobytes() in seen:
            continue
        seen.update(_normal_form(shape @ w.T).tobytes() for w in points)
        shapes.append(shape)
    return shapes


def _members(shape: Integers) -> Integers:
    """Return the lattice points in one cell of a superlattice, shape (n, 3)."""
    return np.array(list(itertools.product(*(range(int(d)) for d in np.diag(shape)))), dtype=np.int64)


def _places(points: Integers, shape: Integers) -> Integers:
    """Return which of `_members` lattice points (..., 3) are, up to the superlattice."""
    rest = points.copy()
    for k in range(3):
        rest -= (rest[..., k] // shape[k, k])[..., None] * shape[k]
    d = np.diag(shape)
    return (rest[..., 0] * d[1] + rest[..., 1]) * d[2] + rest[..., 2]


def _distinct_patterns(
    shape: Integers, sites: NDArray[np.intp], rotations: Integers, images: Integers, shifts: Integers
) -> list[Array]:
    """Return one sign pattern of each kind, shape (sites, cells), leaving out those that a smaller cell holds."""
    members = _members(shape)
    count, number = len(sites), len(members)
    column = {int(site): k for k, site in enumerate(sites)}
    still = []
    for t in members:
        place = _places(members + t, shape)
        still.append((np.arange(count)[:, None] * number + place[None]).ravel())
    moves = []
    for w, image, shift in zip(rotations, images, shifts, strict=True):
        if not np.array_equal(_normal_form(shape @ w.T), shape):
            continue
        first = np.array([column[int(image[s])] for s in sites])
        place = np.array([_places(members @ w.T + shift[s], shape) for s in sites])
        moves.append((first[:, None] * number + place).ravel())
    size = count * number
    codes = np.arange(2 ** (size - 1), dtype=np.int64)
    signs = (codes[:, None] >> np.arange(size)) & 1
    smaller = np.zeros(len(codes), dtype=bool)
    for move in still[1:]:
        smaller |= (signs[:, move] == signs).all(axis=1)
    weights = 1 << np.arange(size, dtype=np.int64)
    lowest = codes.copy()
    for move, shift in itertools.product(moves, still):
        turned = signs[:, move[shift]] @ weights
        lowest = np.minimum(lowest, np.minimum(turned, 2**size - 1 - turned))
    kept = codes[(lowest == codes) & ~smaller]
    flips = [min(int(c).bit_count(), size - int(c).bit_count()) for c in kept]
    order = np.argsort(flips, kind="stable")
    patterns = 1.0 - 2.0 * signs[kept[order]]
    return list((patterns * patterns[:, :1]).reshape(-1, count, number))


def _cell(small: Atoms, sites: NDArray[np.intp], shape: Integers, signed: Array, axis: Array) -> Atoms:
    """Return the supercell with compact vectors and its moments."""
    members = _members(shape)
    moments = np.zeros((len(members), len(small), 3))
    moments[:, sites] = signed.T[:, :, None] * axis
    lattice = minkowski_reduce(shape @ small.cell[:])[0]
    if np.linalg.det(lattice) < 0:
        lattice = -lattice
    positions = (small.positions[None] + (members @ small.cell[:])[:, None]).reshape(-1, 3)
    cell = Atoms(np.tile(small.numbers, len(members)), positions=positions, cell=lattice, pbc=True)
    cell.wrap(eps=1e-6)
    return with_moments(cell, moments.reshape(-1, 3))
