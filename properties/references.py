"""Reference states of the exchange: their symmetry, what their Hessians say, and the crystal that they share."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import spglib
from ase import Atoms
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .base import Progress
from .errors import MomentError, OptionError, StructureError, did_you_mean
from .protocol import SMALLEST_MOMENT, MomentMode, SpinCalculator, moments_of, with_moments
from .structures import antiferromagnetic_signs, check_structure, nearest_atoms, read_structure
from .supercell import SAME_DISTANCE, Coverage, Pairs, Supercell, tilts, transverse
from .symmetry import Pattern, pattern_symmetry, primitive_cell, searched, shortest_rotation

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
# a rotation, Cartesian and fractional, the image of each magnetic site, and the cell that the image is in
Operation = tuple[Array, Integers, Integers, Integers]

NAMES = ("given", "fm", "afm")
SAME_PLACE = 0.02
"""Atoms of two states closer than this, in Å, are one atom of the crystal."""
TRACELESS = np.array(
    [
        [[1, 0, 0], [0, -1, 0], [0, 0, 0]],
        [[1, 0, 0], [0, 1, 0], [0, 0, -2]],
        [[0, 1, 0], [1, 0, 0], [0, 0, 0]],
        [[0, 0, 1], [0, 0, 0], [1, 0, 0]],
        [[0, 0, 0], [0, 0, 1], [0, 1, 0]],
    ],
    dtype=float,
)


def named_states(atoms: Atoms, names: Sequence[str], calculator: SpinCalculator) -> dict[str, Atoms]:
    """Return the structures of reference states.

    Parameters
    ----------
    atoms : the structure with moments (N, 3) in µB; their lengths are those of ``fm`` and ``afm``.
    names : ``given``, ``fm``, ``afm``, or files of the same crystal with moments; none stands for ``given``.
    calculator : bounds what is accepted.

    Raises
    ------
    OptionError : a name that is neither an order nor a file, or one that is given twice.
    StructureError, MomentError : a file that cannot be read, or without moments; a cell without such an order.
    """
    pattern = Pattern.of(moments_of(atoms))
    lengths = np.linalg.norm(pattern.moments, axis=1)
    found: dict[str, Atoms] = {}
    for name in names or ("given",):
        order = name.lower()
        if order in NAMES:
            name = order
        if name in found:
            raise OptionError(f"the reference state '{name}' is given twice; give every state once")
        if order == "given":
            found[name] = atoms
        elif order in NAMES:
            signs = np.ones(len(atoms)) if order == "fm" else antiferromagnetic_signs(atoms, lengths)
            found[name] = with_moments(atoms, (signs * lengths)[:, None] * pattern.axis)
        elif Path(name).is_file():
            found[name] = check_structure(read_structure(name), calculator)
            if not found[name].has("initial_magmoms"):
                raise MomentError(f"the reference state in '{name}' carries no moments; give a file that holds them")
        else:
            raise OptionError(
                f"no reference state '{name}'{did_you_mean(order, NAMES)} (it is one of {', '.join(NAMES)}, or a file)"
            )
    return found


@dataclass(frozen=True)
class Reference:
    """A reference state in its primitive cell.

    Parameters
    ----------
    cell : the primitive cell.
    along : moments along their directions, signed where they share one axis, µB, shape (N,).
    directions : unit vectors, shape (N, 3).
    collinear : whether the moments share one axis.
    """

    cell: Atoms
    along: Array
    directions: Array
    collinear: bool

    @property
    def moments(self) -> Array:
        """Moments in µB, shape (N, 3)."""
        return self.along[:, None] * self.directions

    @property
    def sites(self) -> NDArray[np.intp]:
        """Atoms that take part."""
        return np.flatnonzero(np.abs(self.along) >= SMALLEST_MOMENT)

    @property
    def units(self) -> Array:
        """Directions of the moments of these atoms, shape (n, 3)."""
        return self.directions[self.sites] * np.sign(self.along[self.sites])[:, None]

    def operations(self, soc: bool, symprec: float, mag_symprec: float) -> list[Operation]:
        """Return the symmetry operations of crystal and reference.

        The axis of collinear moments turns freely, because tensors are put together from several of its directions;
        without spin-orbit coupling so do other moments, and only the angles between them count.
        """
        if self.collinear:
            return operations_of(self.cell, self.sites, self.along, symprec, mag_symprec)
        if soc:
            return operations_of(self.cell, self.sites, self.moments, symprec, mag_symprec)
        units = self.directions[self.sites]
        cosines = units @ units.T
        return [
            operation
            for operation in operations_of(self.cell, self.sites, np.abs(self.along), symprec, mag_symprec)
            if np.abs(cosines[np.ix_(operation[2], operation[2])] - cosines).max() < 1e-3
        ]

    def turns(self, symprec: float, mag_symprec: float) -> Array:
        """Return rotations of the whole reference that together show all components of a tensor, shape (K, 3, 3)."""
        if self.collinear:
            frame = pattern_symmetry(self.cell, self.along, symprec, mag_symprec).frame
            return np.array([shortest_rotation(self.directions[0], e) for e in frame])
        # quarter turns and their products bring every moment near every axis of the cell
        frame = np.linalg.qr(self.cell.cell[:].T)[0]
        thirds = [np.eye(3)[[k % 3, (k + 1) % 3, (k + 2) % 3]] for k in range(3)]
        quarters = [np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ t for t in thirds]
        return np.array([frame @ t @ frame.T for t in (*thirds, *quarters)])


def relaxed_reference(
    atoms: Atoms, calculator: SpinCalculator, mode: MomentMode, symprec: float, mag_symprec: float
) -> Reference:
    """Return a state with relaxed moments in its primitive cell.

    Parameters
    ----------
    atoms : the state, moments (N, 3) in µB.
    calculator : a single model.
    mode : how moments are relaxed.
    symprec, mag_symprec : tolerances in Å and µB.

    Raises
    ------
    MomentError : the moments leave their common axis, or vanish.
    """
    given = moments_of(atoms)
    start = Pattern.of(given)
    values = start.along if start.collinear else given
    cell, found = primitive_cell(atoms, values, symprec, mag_symprec)
    image = with_moments(cell, found[:, None] * start.axis if start.collinear else found)
    moments = calculator.relax_moments([image], mode)[0]
    pattern = Pattern.of(moments)
    if start.collinear and not pattern.collinear:
        raise MomentError("the moments leave the collinear reference when they are relaxed; relax magnitudes instead")
    lengths = np.linalg.norm(moments, axis=1)
    if lengths.max() < SMALLEST_MOMENT:
        raise MomentError("the moments vanish when they are relaxed, so there is no exchange; start elsewhere")
    if pattern.collinear:
        return Reference(cell, pattern.along, np.tile(pattern.axis, (len(cell), 1)), True)
    units = moments / np.where(lengths > 0, lengths, 1.0)[:, None]
    return Reference(cell, lengths, units, False)


@dataclass(frozen=True)
class OwnBlock:
    """What one orientation of a reference says about the blocks of its sites with themselves.

    Parameters
    ----------
    units : directions of the moments, shape (n, 3).
    frames : vectors across them, shape (n, 2, 3).
    block : ``-½ |m|² t·H·t'`` in eV, shape (n, 2, 2).
    inward : ``|m| B·e`` in eV, shape (n,).
    """

    units: Array
    frames: Array
    block: Array
    inward: Array


@dataclass(frozen=True)
class Measured:
    """What the Hessian of one reference state says about the pairs of its cell, K orientations of the reference.

    Parameters
    ----------
    reference : the state.
    box : its supercell.
    pairs : those with a unique image in it, P of them.
    design : target per component of a pair's tensor, shape (P, 4K, 9).
    target : ``-½ |m_i||m_j| t·H·t'`` in eV, shape (P, 4K).
    biquadratic : target per B of the pair in ``-Σ B (e_i·e_j)²``, shape (P, 4K).
    own : one per orientation.
    left : largest |J| at other images, eV.
    coverage : the supercell against the calculator's reach.
    """

    reference: Reference
    box: Supercell
    pairs: Pairs
    design: Array
    target: Array
    biquadratic: Array
    own: list[OwnBlock]
    left: float
    coverage: Coverage


def measure(
    reference: Reference,
    repeats: tuple[int, int, int],
    turns: Array,
    calculator: SpinCalculator,
    progress: Progress,
    stage: str,
) -> Measured:
    """Return what the Hessian in a supercell says about the pairs of a reference that is turned as a whole.

    Parameters
    ----------
    reference : the state.
    repeats : cells of the supercell along each vector.
    turns : rotations of the reference, shape (K, 3, 3).
    calculator : a single model.
    progress : told about every rotation, under the name `stage`.
    """
    sites, box = reference.sites, Supercell(reference.cell, reference.sites, repeats)
    pairs, kept, others = box.pairs()
    total, own = len(box.magnetic), np.arange(len(sites))
    left = 0.0
    coverages = []
    designs, targets, quadratics, blocks_of_own = [], [], [], []
    for k, turn in enumerate(turns):
        progress(stage, k, len(turns))
        axes = (reference.directions @ turn.T)[sites]
        frames = np.array([transverse(e) for e in axes])
        blocks, inward = tilts(box, calculator, reference.moments @ turn.T, frames)
        tensors = -0.5 * blocks.transpose(0, 2, 1, 3)
        flat = tensors.reshape(-1, 2, 2)
        targets.append(flat[pairs.first * total + kept].reshape(-1, 4))
        coverages.append(Coverage.of(box, calculator, reference.moments, tensors))
        if len(others):
            left = max(left, float(np.abs(flat[others]).max()))
        here, there, units = frames[pairs.first], frames[pairs.second], reference.units @ turn.T
        designs.append(np.einsum("pax,pby->pabxy", here, there).reshape(-1, 4, 9))
        cosines = np.einsum("px,px->p", units[pairs.first], units[pairs.second])
        straight = cosines[:, None, None] * np.einsum("pax,pbx->pab", here, there)
        crossed = np.einsum("pax,px,pby,py->pab", here, units[pairs.second], there, units[pairs.first], optimize=True)
        quadratics.append(2 * (straight + crossed).reshape(-1, 4))
        blocks_of_own.append(OwnBlock(units, frames, tensors[own, own], inward))
    progress(stage, len(turns), len(turns))
    design, target, quadratic = (np.concatenate(x, axis=1) for x in (designs, targets, quadratics))
    coverage = max(coverages, key=lambda c: c.folded)
    return Measured(reference, box, pairs, design, target, quadratic, blocks_of_own, left, coverage)


@dataclass(frozen=True)
class Crystal:
    """The smallest cell that several reference states share.

    Parameters
    ----------
    cell : the cell.
    sites : its magnetic atoms.
    operations : its symmetry.
    """

    cell: Atoms
    sites: NDArray[np.intp]
    operations: list[Operation]

    @classmethod
    def of(
        cls, references: dict[str, Reference], atoms: Atoms, soc: bool, symprec: float, mag_symprec: float
    ) -> "Crystal":
        """Return the crystal of reference states: the cell of a single one, with its own symmetry, as it is.

        Several share the primitive cell of the atoms without moments and its space group, since exchange tensors are
        even under time reversal.
        """
        first = next(iter(references.values()))
        if len(references) == 1:
            return cls(first.cell, first.sites, first.operations(soc, symprec, mag_symprec))
        cell, _ = primitive_cell(atoms, np.zeros(len(atoms)), symprec, mag_symprec)
        atom, _ = _places(first.cell, cell, next(iter(references)))
        sites = np.unique(atom[first.sites])
        pattern = np.isin(np.arange(len(cell)), sites).astype(float)
        return cls(cell, sites, operations_of(cell, sites, pattern, symprec, mag_symprec))

    def sites_and_pairs(self, reference: Reference, pairs: Pairs, name: str) -> tuple[Integers, Pairs]:
        """Return what the magnetic sites (n,) and the pairs (P,) of a state are in this crystal.

        Raises
        ------
        StructureError : the state is none of this crystal.
        MomentError : other atoms of it carry moments.
        """
        atom, cells = _places(reference.cell, self.cell, name)
        place = {int(site): k for k, site in enumerate(self.sites)}
        if sorted(set(atom[reference.sites].tolist())) != sorted(place):
            raise MomentError(
                f"the reference state '{name}' has its moments on other atoms than the first state; leave it out"
            )
        silent = np.setdiff1d(np.arange(len(reference.cell)), reference.sites)
        if np.isin(atom[silent], self.sites).any():
            raise MomentError(f"an atom of the reference state '{name}' loses its moment; leave this state out")
        site = np.array([place[int(a)] for a in atom[reference.sites]], dtype=np.int64)
        own = cells[reference.sites]
        lattice = np.rint(reference.cell.cell[:] @ np.linalg.inv(self.cell.cell[:])).astype(np.int64)
        shift = own[pairs.second] - own[pairs.first] + pairs.shift @ lattice
        return site, Pairs(site[pairs.first], site[pairs.second], shift, pairs.vector)


def _places(atoms: Atoms, cell: Atoms, name: str) -> tuple[Integers, Integers]:
    """Return which atom of a smaller cell each atom is, and in which cell, up to a shift of the whole.

    Raises
    ------
    StructureError : the atoms are no repetition of the cell.
    """
    lattice = atoms.cell[:] @ np.linalg.inv(cell.cell[:])
    repeated = np.abs((lattice - np.rint(lattice)) @ cell.cell[:]).max() < SAME_PLACE
    scaled = cell.get_scaled_positions(wrap=False)
    here = np.linalg.solve(cell.cell[:].T, atoms.positions.T).T
    if repeated and round(abs(np.linalg.det(lattice))) * len(cell) == len(atoms):
        for start in np.flatnonzero(cell.numbers == atoms.numbers[0]):
            atom, cells, distance = nearest_atoms(here - here[0] + scaled[start], atoms.numbers, cell)
            if distance.max() < SAME_PLACE:
                return atom, cells
    raise StructureError(
        f"the reference state '{name}' is not the crystal of the others; give the same lattice in the same "
        "orientation, or a supercell of it"
    )


@dataclass(frozen=True)
class Fit:
    """The bilinear part of a model of a crystal.

    Parameters
    ----------
    tensor : J of every pair in eV, shape (P, 3, 3).
    onsite : A of every site in eV, traceless, shape (n, 3, 3).
    offset : isotropic part of the own blocks that no bilinear model explains, eV, one array (n,) per state.
    misfit : largest part of the Hessian of each state that the tensors do not explain, eV, shape (S,).
    removed : largest part of a tensor that symmetrisation removed, eV.
    """

    tensor: Array
    onsite: Array
    offset: list[Array]
    misfit: Array
    removed: float


class Joined:
    """Measured states on the pairs of their crystal.

    Parameters
    ----------
    crystal : the crystal.
    measured : states by name.
    soc : whether tensors have more than an isotropic part.
    """

    def __init__(self, crystal: Crystal, measured: dict[str, Measured], soc: bool) -> None:
        self.crystal, self.soc = crystal, soc
        self.names, self.measured = list(measured), list(measured.values())
        placed = [crystal.sites_and_pairs(m.reference, m.pairs, name) for name, m in measured.items()]
        self.sites = [site for site, _ in placed]
        self.radius = min(m.box.radius for m in self.measured)
        first = placed[0][1]
        index: dict[tuple[int, int, int, int, int], int] = {}
        kept = []
        for k, key in enumerate(first.keys()):
            if key not in index and np.linalg.norm(first.vector[k]) < self.radius - SAME_DISTANCE:
                index[key] = len(index)
                kept.append(k)
        self.pairs = Pairs(first.first[kept], first.second[kept], first.shift[kept], first.vector[kept])
        keys = [pairs.keys() for _, pairs in placed]
        self.rows = [np.array([index.get(key, -1) for key in own], dtype=np.int64) for own in keys]

    def pairs_of(self, state: int) -> tuple[Pairs, Integers]:
        """Return the pairs of a state that the crystal holds, and which of the crystal's they are."""
        rows, pairs = self.rows[state], self.measured[state].pairs
        inside = rows >= 0
        held = Pairs(pairs.first[inside], pairs.second[inside], pairs.shift[inside], pairs.vector[inside])
        return held, rows[inside]

    def fit(self, states: Sequence[int] | None = None, biquadratic: Array | None = None) -> Fit:
        """Fit one bilinear model to the Hessians of some states by least squares; every state counts alike.

        Parameters
        ----------
        states : by number; all by default.
        biquadratic : B of ``-Σ B (e_i·e_j)²`` beside it in eV, shape (P,); none by default.
        """
        chosen = list(range(len(self.measured)) if states is None else states)
        count = len(self.pairs.first)
        strengths = np.zeros(count) if biquadratic is None else biquadratic
        normal, right = np.zeros((count, 9, 9)), np.zeros((count, 9))
        parts = []
        for state in chosen:
            measured, rows = self.measured[state], self.rows[state]
            inside = rows >= 0
            rows, design = rows[inside], measured.design[inside]
            target = measured.target[inside] - strengths[rows][:, None] * measured.biquadratic[inside]
            parts.append((rows, design, target))
            weight = 1 / np.bincount(rows, minlength=count)[rows]
            np.add.at(normal, rows, weight[:, None, None] * np.einsum("pkn,pkm->pnm", design, design))
            np.add.at(right, rows, weight[:, None] * np.einsum("pkn,pk->pn", design, target))
        if self.soc:
            tensor = np.einsum("pnm,pm->pn", np.linalg.pinv(normal, 1e-9, hermitian=True), right).reshape(-1, 3, 3)
        else:
            one = np.eye(3).ravel()
            tensor = (right @ one / np.einsum("n,pnm,m->p", one, normal, one))[:, None, None] * np.eye(3)
        misfit = [
            np.abs(target - np.einsum("pkn,pn->pk", design, tensor[rows].reshape(-1, 9))).max(initial=0.0)
            for rows, design, target in parts
        ]
        symmetric = symmetrised(tensor, self.pairs, self.crystal.operations)
        removed = float(np.abs(symmetric - tensor).max(initial=0.0))
        onsite, offset = self._onsite(symmetric, strengths, chosen)
        onsite = symmetrised_sites(onsite, self.crystal.operations)
        return Fit(symmetric, onsite, offset, np.array(misfit), removed)

    def _onsite(self, tensor: Array, strengths: Array, states: list[int]) -> tuple[Array, list[Array]]:
        """Solve the own blocks for A_i, traceless, and for what no bilinear model explains in each state, eV.

        On the sphere the own block is ``-½ (|m|² t·H·t' + |m| B·e δ) = t·A·t' - (e·A·e + Σ_j e_i·J_ij·e_j) δ``, and
        -Σ B (e_i·e_j)² adds ``2 Σ_j B (t·e_j e_j·t' - (e_i·e_j)² δ)``.
        """
        count = len(self.crystal.sites)
        onsite, offset = np.zeros((count, 3, 3)), [np.zeros(count) for _ in states]
        for site in range(count):
            rows, values, state_of = [], [], []
            for k, state in enumerate(states):
                pairs, which = self.pairs_of(state)
                for own, home in itertools.product(self.measured[state].own, np.flatnonzero(self.sites[state] == site)):
                    e, across, mine = own.units[home], own.frames[home], pairs.first == home
                    molecular = np.einsum("x,pxy,py->", e, tensor[which[mine]], own.units[pairs.second[mine]])
                    near, strength = own.units[pairs.second[mine]], strengths[which[mine]]
                    quadratic = np.einsum("p,pa,pb->ab", strength, near @ across.T, near @ across.T)
                    quadratic -= (strength @ (near @ e) ** 2) * np.eye(2)
                    block = own.block[home] + (molecular - 0.5 * own.inward[home]) * np.eye(2) - 2 * quadratic
                    values.append(block.ravel())
                    columns = [across @ b @ across.T - (e @ b @ e) * np.eye(2) for b in TRACELESS]
                    rows.append(np.array([c.ravel() for c in columns]).T)
                    state_of.append(k)
            place = np.eye(len(states))[state_of]
            isotropic = np.einsum("rk,x->rxk", place, np.eye(2).ravel()).reshape(-1, len(states))
            vector = np.concatenate(values)
            if self.soc:
                solution = np.linalg.lstsq(np.hstack([np.concatenate(rows), isotropic]), vector, rcond=None)[0]
                onsite[site] = np.tensordot(solution[:5], TRACELESS, axes=1)
                left = solution[5:]
            else:
                left = np.linalg.lstsq(isotropic, vector, rcond=None)[0]
            for k in range(len(states)):
                offset[k][site] = left[k]
        return onsite, offset


def operations_of(
    cell: Atoms, sites: NDArray[np.intp], pattern: Array, symprec: float, mag_symprec: float
) -> list[Operation]:
    """Return the operations that keep signed lengths (N,) up to a global sign, or moments (N, 3).

    Raises
    ------
    StructureError : spglib finds no symmetry at this tolerance.
    """
    scaled = cell.get_scaled_positions(wrap=False)
    found = searched(
        spglib.get_magnetic_symmetry,
        (cell.cell[:], scaled, cell.numbers, pattern),
        symprec=symprec,
        mag_symprec=mag_symprec,
        is_axial=pattern.ndim == 2,
    )
    if found is None:
        raise StructureError(f"spglib finds no symmetry at symprec {symprec:g} Å; choose another --symprec")
    operations = []
    to_cartesian = cell.cell[:].T
    for w, t in zip(found["rotations"], found["translations"], strict=True):
        target, shift, _ = nearest_atoms(scaled[sites] @ w.T + t, cell.numbers[sites], cell[sites])
        rotation = to_cartesian @ w @ np.linalg.inv(to_cartesian)
        operations.append((rotation, np.asarray(w, dtype=np.int64), target, shift))
    return operations


def symmetrised(tensor: Array, pairs: Pairs, operations: list[Operation]) -> Array:
    """Average pair tensors (P, 3, 3) over symmetry operations, and over J_ji = J_ijᵀ."""
    total, count = np.zeros_like(tensor), np.zeros(len(tensor))
    for operation in operations:
        rotation = operation[0]
        turned = np.einsum("xa,pab,yb->pxy", rotation, tensor, rotation)
        for rows, values in zip(_images(pairs, operation), (turned, turned.transpose(0, 2, 1)), strict=True):
            good = rows >= 0
            np.add.at(total, rows[good], values[good])
            np.add.at(count, rows[good], 1.0)
    return total / count[:, None, None]


def _images(pairs: Pairs, operation: Operation) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what an operation makes of each pair, and of each reversed one: indices, -1 where it is not among them."""
    index = {key: k for k, key in enumerate(pairs.keys())}
    _, w, target, shift = operation
    first, second = target[pairs.first], target[pairs.second]
    moved = pairs.shift @ w.T + shift[pairs.second] - shift[pairs.first]
    keys = Pairs(first, second, moved, pairs.vector).keys()
    reverse = Pairs(second, first, -moved, pairs.vector).keys()
    forth, back = (np.array([index.get(name, -1) for name in names], dtype=np.int64) for names in (keys, reverse))
    return forth, back


def orbits(pairs: Pairs, operations: list[Operation]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the classes of pairs (P,), either way round, and of sites (n,) that symmetry maps onto each other."""
    images = [rows for operation in operations for rows in _images(pairs, operation)]
    return _classes(len(pairs.first), images), _classes(len(operations[0][2]), [o[2] for o in operations])


def _classes(count: int, images: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Number the connected classes of things that are mapped onto each other; an image of -1 is none."""
    start = np.tile(np.arange(count), len(images))
    end = np.concatenate(images)
    good = end >= 0
    links = coo_array((np.ones(int(good.sum())), (start[good], end[good])), shape=(count, count))
    return np.asarray(connected_components(links, directed=False)[1], dtype=np.int64)


def symmetrised_sites(tensor: Array, operations: list[Operation]) -> Array:
    """Average site tensors (n, 3, 3) over symmetry operations."""
    total = np.zeros_like(tensor)
    for rotation, _, target, _ in operations:
        total[target] += np.einsum("xa,pab,yb->pxy", rotation, tensor, rotation)
    return total / len(operations)
