"""Supercells whose sites know where they came from, and what the Hessian says about tilts of their moments."""

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry.minkowski_reduction import minkowski_reduce
from numpy.typing import NDArray

from .base import Progress
from .errors import ConvergenceError
from .protocol import STENCIL, SpinCalculator, with_moments
from .symmetry import Pattern

Array = NDArray[np.float64]

STEP = 0.01
"""Displacement of a moment in the central differences, µB."""
GROWTH = 1.3
CHUNK = 16
SAME_DISTANCE = 1e-3


@dataclass(frozen=True)
class Pairs:
    """Pairs of magnetic sites, each counted from both ends.

    Parameters
    ----------
    first, second : indices into the magnetic sites, shape (P,).
    shift : lattice vector of the second, in units of the cell, shape (P, 3).
    vector : from the first to the second, Å, shape (P, 3).
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    shift: NDArray[np.int64]
    vector: Array

    def keys(self) -> list[tuple[int, int, int, int, int]]:
        """Return each pair as integers that name it."""
        rows = np.column_stack([self.first, self.second, self.shift]).tolist()
        return [(int(a), int(b), int(x), int(y), int(z)) for a, b, x, y, z in rows]


class Supercell:
    """A supercell of repeated cells whose magnetic sites know where they came from.

    Parameters
    ----------
    cell : the primitive cell.
    sites : indices of its magnetic atoms.
    repeats : cells along each vector.
    """

    def __init__(self, cell: Atoms, sites: NDArray[np.intp], repeats: tuple[int, int, int]) -> None:
        self.cell, self.sites, self.repeats = cell, sites, repeats
        shifts = np.array(list(itertools.product(*(range(r) for r in repeats))))
        positions = (cell.positions[None] + (shifts @ cell.cell[:])[:, None]).reshape(-1, 3)
        lattice = cell.cell[:] * np.array(repeats)[:, None]
        self.atoms = Atoms(np.tile(cell.numbers, len(shifts)), positions=positions, cell=lattice, pbc=True)
        self.shifts = shifts
        n = len(cell)
        self.magnetic = (np.arange(len(shifts))[:, None] * n + sites[None]).ravel()
        self.radius = unique_radius(lattice)

    def tiled(self, moments: Array) -> Array:
        """Return moments (n, 3) of the cell repeated over the supercell."""
        return np.tile(moments, (len(self.shifts), 1))

    def pairs(self) -> tuple[Pairs, NDArray[np.intp], NDArray[np.intp]]:
        """Return the pairs with a unique nearest image, their columns among the magnetic sites, and the other columns.

        The last are given as home site · M + column, M the number of magnetic sites of the supercell.
        """
        lattice, count = self.atoms.cell[:], len(self.sites)
        home, inverse = self.cell.positions[self.sites], np.linalg.inv(lattice)
        first, second, shift, vector, columns, others = [], [], [], [], [], []
        for i in range(count):
            for column in range(len(self.magnetic)):
                cell, j = divmod(column, count)
                base = home[j] + self.shifts[cell] @ self.cell.cell[:] - home[i]
                # within the radius every coordinate in the supercell is below one half
                image = -np.rint(base @ inverse).astype(np.int64)
                near = base + image @ lattice
                length = np.linalg.norm(near)
                if length < 1e-6:
                    continue
                if length < self.radius - SAME_DISTANCE:
                    first.append(i)
                    second.append(j)
                    shift.append(self.shifts[cell] + image * np.array(self.repeats))
                    vector.append(near)
                    columns.append(column)
                else:
                    others.append(i * len(self.magnetic) + column)
        found = Pairs(
            np.array(first, dtype=np.int64),
            np.array(second, dtype=np.int64),
            np.array(shift, dtype=np.int64).reshape(-1, 3),
            np.array(vector).reshape(-1, 3),
        )
        return found, np.array(columns, dtype=np.intp), np.array(others, dtype=np.intp)

    def images(self) -> "Images":
        """Return every pair of a home site with a magnetic site of the supercell in all its nearest images."""
        count = len(self.sites)
        home = self.cell.positions[self.sites]
        # with compact vectors the nearest images are among the next ones
        lattice, compact = minkowski_reduce(self.atoms.cell[:])
        steps = np.array(list(itertools.product((-2, -1, 0, 1, 2), repeat=3)))
        first, column, shift, weight = [], [], [], []
        for i in range(count):
            there = self.cell.positions[np.tile(self.sites, len(self.shifts))]
            there = there + np.repeat(self.shifts, count, axis=0) @ self.cell.cell[:] - home[i]
            whole = np.rint(there @ np.linalg.inv(lattice)).astype(np.int64)
            sizes = np.linalg.norm((there - whole @ lattice)[:, None] + (steps @ lattice)[None], axis=2)
            near = sizes < sizes.min(axis=1, keepdims=True) + SAME_DISTANCE
            columns, which = np.nonzero(near)
            first.append(np.full(len(columns), i))
            column.append(columns)
            taken = (steps[which] - whole[columns]) @ compact
            shift.append(self.shifts[columns // count] + taken * np.array(self.repeats))
            weight.append(1 / near.sum(axis=1)[columns])
        return Images(*(np.concatenate(x) for x in (first, column, shift, weight)))


@dataclass(frozen=True)
class Images:
    """Nearest images of the pairs between the home cell and a supercell.

    Parameters
    ----------
    first : home site, shape (K,).
    column : magnetic site of the supercell, shape (K,).
    shift : cell of the image, in lattice vectors of the home cell, shape (K, 3).
    weight : one over the number of equally near images, shape (K,).
    """

    first: NDArray[np.int64]
    column: NDArray[np.int64]
    shift: NDArray[np.int64]
    weight: Array


@dataclass(frozen=True)
class Coverage:
    """What a supercell holds of the couplings that a calculator has.

    A coupling farther than half the supercell is folded onto a nearer image. Those of pairs within the sphere of unique
    images, radius R, at a distance r hold couplings beyond 2R - r alone.

    Parameters
    ----------
    reach : distance up to which the calculator couples tilts of two moments, Å; None where it does not say.
    beyond : whether the supercell is larger than twice that in every direction; None where that is not known.
    pairs : pairs of a magnetic site, mean over sites, within reach and beyond the unique images; NaN where not known.
    folded : Σ |J| of one site at images that are not unique, eV, the largest over sites.
    """

    reach: float | None
    beyond: bool | None
    pairs: float
    folded: float

    @classmethod
    def of(cls, box: Supercell, calculator: SpinCalculator, moments: Array, tensors: Array) -> "Coverage":
        """Compare a supercell with the reach that a calculator states.

        Parameters
        ----------
        box : the supercell.
        calculator : a single model.
        moments : of the home cell in µB, shape (N, 3).
        tensors : what couples the home sites to the magnetic sites of the supercell, eV, shape (n, M, 2, 2).
        """
        sizes = np.linalg.norm(tensors, ord=2, axis=(2, 3)).ravel()
        others = box.pairs()[2]
        sums = np.bincount(others // len(box.magnetic), sizes[others], minlength=len(box.sites))
        reach = reach_of(calculator, moments)
        if reach is None:
            return cls(None, None, np.nan, float(sums.max()))
        beyond = box.radius > reach
        return cls(reach, beyond, 0.0 if beyond else _pairs_between(box, box.radius, reach), float(sums.max()))

    @property
    def attributes(self) -> dict[str, str | float]:
        """What a dataset's attributes say about it."""
        answer = {None: "not known", True: "yes", False: "no"}[self.beyond]
        reach = "not stated by the calculator" if self.reach is None else self.reach
        return {"reach": reach, "supercell_beyond_twice_the_reach": answer}


def unique_radius(lattice: Array) -> float:
    """Return half the least height of a supercell in Å: within it a pair has one nearest image.

    Parameters
    ----------
    lattice : vectors of the supercell in rows, Å, shape (3, 3).
    """
    heights = 1 / np.linalg.norm(np.linalg.inv(lattice), axis=0)
    return float(heights.min()) / 2


def reach_of(calculator: SpinCalculator, moments: Array) -> float | None:
    """Return the distance in Å up to which a calculator says that tilts of moments (N, 3) couple, None without word.

    It is `tilt_reach` where the moments are collinear and the calculator states one, and else `reach`.
    """
    value = getattr(calculator.calculator, "reach", None)
    if Pattern.of(moments).collinear:
        value = getattr(calculator.calculator, "tilt_reach", value)
    return None if value is None else float(value)


def _pairs_between(box: Supercell, low: float, high: float) -> float:
    """Return the mean number of magnetic neighbours of a site between two distances in Å, the first left to it."""
    cell, home = box.cell.cell[:], box.cell.positions[box.sites]
    counts = np.ceil(high * np.linalg.norm(np.linalg.inv(cell), axis=0)).astype(int) + 1
    steps = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in counts], indexing="ij"), axis=-1).reshape(-1, 3) @ cell
    found = 0
    for here, there in itertools.product(home, repeat=2):
        between = there - here
        between = between - np.rint(between @ np.linalg.inv(cell)) @ cell
        apart = np.linalg.norm(steps + between, axis=1)
        found += int(((apart >= low - SAME_DISTANCE) & (apart <= high)).sum())
    return found / len(home)


def row_of_coverage(attributes: Mapping[str, Any], pairs: float) -> tuple[str, str]:
    """Return label and text of the row that says whether a supercell is larger than twice the reach."""
    answer = str(attributes["supercell_beyond_twice_the_reach"])
    label = "larger than twice the reach"
    if answer != "no":
        return label, f"{answer}: the calculator states none" if answer == "not known" else answer
    return label, f"no, of {float(attributes['reach']):.3g} Å: {pairs:.0f} pairs of a site are folded"


def transverse(axis: Array) -> Array:
    """Return two unit vectors x, y across an axis with x × y along it, rows, shape (2, 3)."""
    x, y = np.linalg.svd(axis[None])[2][1:]
    return np.array([x, y if np.cross(x, y) @ axis > 0 else -y])


def tilts(
    box: Supercell, calculator: SpinCalculator, moments: Array, across: Array | None = None
) -> tuple[Array, Array]:
    """Return the second derivatives of E by tilts of the moments of the home cell and of any other.

    A tilt z = (x, y) turns e to ``x a + y b + sqrt(1 - z²) e``, |m| kept. Rows of the Hessian come from the calculator
    where it gives rows, and from central differences of fourth order of the magnetic forces where not.

    Parameters
    ----------
    box : the supercell.
    calculator : a single model.
    moments : of the home cell in µB, shape (N, 3).
    across : vectors a, b of every magnetic site, shape (n, 2, 3); by default `transverse` of the moments.

    Returns
    -------
    ``|m_i||m_j| t_i·H_ij·t_j`` in eV, without what the sphere adds to the own block, shape (n, 2, M, 2); and that,
    ``|m_i| B_i·e_i`` with the magnetic force B, in eV, shape (n,).
    """
    own = moments[box.sites]
    lengths = np.linalg.norm(own, axis=1)
    units = own / lengths[:, None]
    frames = np.array([transverse(e) for e in units]) if across is None else across
    repeated = box.tiled(moments)
    if knows_rows(calculator):
        atoms = with_moments(box.atoms, repeated)
        rows = calculator.hessian(atoms, ("mm",), rows=box.sites.tolist())["mm"][:, :, box.magnetic]
        blocks = np.einsum("iax,ixjy->iajy", frames, rows)
        field = calculator.evaluate_spins(box.atoms, repeated[None])["magnetic_forces"][0][box.sites]
    else:
        blocks, field = _differences(box, calculator, repeated, frames)
    count = len(box.shifts)
    result = np.einsum("iajy,jby->iajb", blocks, np.tile(frames, (count, 1, 1)))
    result *= lengths[:, None, None, None] * np.tile(lengths, count)[None, None, :, None]
    return result, lengths * np.einsum("ix,ix->i", field, units)


def knows_rows(calculator: SpinCalculator) -> bool:
    """Say whether the calculator itself gives the rows of single atoms of its Hessian."""
    return calculator.has("hessian") and "rows" in inspect.signature(calculator.calculator.hessian).parameters


def _differences(box: Supercell, calculator: SpinCalculator, moments: Array, frames: Array) -> tuple[Array, Array]:
    """Return T_i H_ij, shape (n, 2, M, 3), and the magnetic forces of the home cell from differences."""
    batch = [moments]
    for site, frame in zip(box.sites, frames, strict=True):
        for t, (k, _) in itertools.product(frame, STENCIL):
            shifted = moments.copy()
            shifted[site] += k * STEP * t
            batch.append(shifted)
    parts = []
    for begin in range(0, len(batch), CHUNK):
        found = calculator.evaluate_spins(box.atoms, np.array(batch[begin : begin + CHUNK]))
        parts.append(found["magnetic_forces"])
    field = np.concatenate(parts)[:, box.magnetic]
    n = len(box.sites)
    shifted_fields = field[1:].reshape(n, 2, len(STENCIL), -1, 3)
    blocks = -np.einsum("k,iakjx->iajx", [w for _, w in STENCIL], shifted_fields) / STEP
    return blocks, field[0, :n]


def grown(
    cell: Atoms,
    sites: NDArray[np.intp],
    moments: Array,
    calculator: SpinCalculator,
    radius: float,
    tolerance: float,
    max_atoms: int,
    progress: Progress,
) -> tuple[int, int, int]:
    """Return the repeats of a supercell beyond whose unique images little is left, or that exceeds twice the reach.

    A pair farther than half the supercell is folded back into it. The sphere of unique images fills at most half of
    the cell, so the neighbours of a far shell, folded back, do not all hide inside it. `Coverage` says which it is.

    Parameters
    ----------
    cell, sites, moments : the primitive cell, its magnetic atoms and its moments in µB, shape (N, 3).
    calculator : a single model; where it states its reach, a supercell of more than twice that is enough.
    radius : least distance within which pairs are wanted, Å.
    tolerance : largest |J| that may be left, relative to the largest.
    max_atoms : largest supercell.
    progress : told about every supercell.

    Raises
    ------
    ConvergenceError : the supercell would exceed `max_atoms`.
    """
    reach = reach_of(calculator, moments)
    done = 0
    repeats: tuple[int, int, int] | None = None
    left, place = np.inf, 0.0
    while True:
        heights = 1 / np.linalg.norm(np.linalg.inv(cell.cell[:]), axis=0)
        counts = [int(np.ceil(2 * (radius + 2 * SAME_DISTANCE) / h)) for h in heights]
        wanted = (counts[0], counts[1], counts[2])
        size = int(np.prod(wanted)) * len(cell)
        if size > max_atoms:
            last = f"; |J| of {left:.2g} of the largest is left at {place:.1f} Å" if repeats else ""
            raise ConvergenceError(
                f"the exchange needs a supercell of {size} atoms for pairs within {radius:.1f} Å, above the limit "
                f"of {max_atoms}{last}; raise max_atoms, or tolerance"
            )
        if wanted != repeats:
            repeats = wanted
            progress("grow supercell", done, done + 1)
            box = Supercell(cell, sites, repeats)
            left, place = _left(box, calculator, moments), box.radius
            done += 1
            progress("grow supercell", done, done)
        if left <= tolerance or (reach is not None and box.radius > reach):
            return repeats
        # not farther than where the reach ends
        radius = radius * GROWTH if reach is None else min(radius * GROWTH, reach + SAME_DISTANCE)


def _left(box: Supercell, calculator: SpinCalculator, moments: Array) -> float:
    """Return the largest coupling beyond the unique images relative to the largest."""
    blocks, _ = tilts(box, calculator, moments)
    own = np.arange(len(box.sites))
    blocks[own, :, own] = 0.0
    sizes = np.abs(blocks).max(axis=(1, 3))
    _, _, others = box.pairs()
    largest = float(sizes.max(initial=0.0))
    return float(sizes.ravel()[others].max() / largest) if len(others) and largest > 0 else 0.0
