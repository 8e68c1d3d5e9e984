"""Moment patterns, the symmetry of one that turns freely against the lattice, and its frame."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import seekpath
import spglib
from ase import Atoms
from ase.dft.kpoints import BandPath, parse_path_string
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from .errors import OptionError, StructureError
from .protocol import bare

Array = NDArray[np.float64]

CANTING = 1e-3
"""Largest part of a moment across the common axis, relative to the largest moment, of a collinear pattern."""
ANGLE = 1e-3
"""Two unit vectors closer than this are one."""


def searched(search: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return what a search of spglib finds, None where it finds nothing: phonopy, once imported, makes it raise."""
    with warnings.catch_warnings():
        # before that, spglib warns at every search that it does not raise
        warnings.filterwarnings("ignore", "Set OLD_ERROR_HANDLING", DeprecationWarning)
        try:
            return search(*arguments, **options)
        except getattr(spglib, "SpglibError", RuntimeError):
            return None


@dataclass(frozen=True)
class Pattern:
    """A moment pattern that is turned as a rigid body.

    Parameters
    ----------
    moments : shape (N, 3), µB.
    axis : the common direction, or the principal one, shape (3,).
    along : components along it, shape (N,), µB.
    collinear : whether nothing stands across the axis.
    """

    moments: Array
    axis: Array
    along: Array
    collinear: bool

    @classmethod
    def of(cls, moments: Array) -> "Pattern":
        """Find the axis of moments of shape (N, 3) in µB."""
        _, vectors = np.linalg.eigh(moments.T @ moments)
        axis = vectors[:, -1]
        along = moments @ axis
        net = along.sum()
        largest = np.abs(along).max()
        leading = net if abs(net) > 1e-6 * largest else along[np.flatnonzero(np.abs(along) > 1e-3 * largest)[0]]
        axis, along = axis * np.sign(leading), along * np.sign(leading)
        across = np.abs(moments - along[:, None] * axis).max()
        return cls(moments, axis, along, bool(across <= CANTING * largest))

    def towards(self, directions: Array) -> Array:
        """Return the shortest rotations of the axis to directions (B, 3), shape (B, 3, 3)."""
        return np.array([shortest_rotation(self.axis, n) for n in directions])


def shortest_rotation(start: Array, end: Array) -> Array:
    """Return the shortest rotation of one unit vector to another, shape (3, 3)."""
    cross, dot = np.cross(start, end), float(start @ end)
    if dot < -1 + 1e-12:
        across = np.linalg.svd(start[None])[2][1]
        return 2 * np.outer(across, across) - np.eye(3)
    k = np.array([[0, -cross[2], cross[1]], [cross[2], 0, -cross[0]], [-cross[1], cross[0], 0]])
    return np.eye(3) + k + k @ k / (1 + dot)


def nearest_rotation(matrix: Array) -> Array:
    """Return the proper rotation closest to a matrix (3, 3)."""
    u, _, v = np.linalg.svd(matrix)
    return np.asarray(u @ np.diag([1.0, 1.0, np.linalg.det(u @ v)]) @ v)


@dataclass(frozen=True)
class PatternSymmetry:
    """Point symmetry of E(n) for a pattern with signs ±: rotations that keep the pattern up to a global sign.

    Parameters
    ----------
    rotations : shape (G, 3, 3), proper or not, Cartesian.
    system : cubic, hexagonal, tetragonal, trigonal, orthorhombic, monoclinic or triclinic.
    frame : orthonormal right-handed rows x', y', z', Cartesian; z' is the principal axis, cubic axes where cubic.
    """

    rotations: Array
    system: str
    frame: Array


def primitive_cell(atoms: Atoms, moments: Array, symprec: float, mag_symprec: float) -> tuple[Atoms, Array]:
    """Return the smallest cell that repeats the crystal with its moments.

    Parameters
    ----------
    atoms : the structure.
    moments : in µB, shape (N, 3), or along their common axis, shape (N,).
    symprec, mag_symprec : tolerances in Å and µB.

    Returns
    -------
    The cell, in the orientation of the structure, and its moments, shape (n, 3) or (n,).
    """
    kinds: list[tuple[int, Array]] = []
    types = []
    for number, moment in zip(atoms.numbers, moments, strict=True):
        match = [k for k, (z, m) in enumerate(kinds) if z == number and np.abs(m - moment).max() <= mag_symprec]
        if not match:
            kinds.append((int(number), moment))
            match = [len(kinds) - 1]
        types.append(match[0] + 1)
    cell = (atoms.cell[:], atoms.get_scaled_positions(), types)
    found = searched(spglib.standardize_cell, cell, to_primitive=True, no_idealize=True, symprec=symprec)
    if found is None or len(found[2]) == len(atoms):
        return bare(atoms), moments
    lattice, scaled, types = found
    small = Atoms([kinds[t - 1][0] for t in types], scaled_positions=scaled, cell=lattice, pbc=True)
    return small, np.array([kinds[t - 1][1] for t in types])


def pattern_symmetry(atoms: Atoms, signs: Array, symprec: float, mag_symprec: float) -> PatternSymmetry:
    """Find the symmetry of the energy of a collinear pattern as a function of its direction.

    Parameters
    ----------
    atoms : the structure.
    signs : moments along the common axis in µB, shape (N,).
    symprec, mag_symprec : tolerances in Å and µB.

    Raises
    ------
    StructureError : spglib finds no symmetry at this tolerance.
    """
    # a supercell keeps only those rotations that map its own lattice onto itself
    small, along = primitive_cell(atoms, np.asarray(signs, dtype=float), symprec, mag_symprec)
    lattice = small.cell[:]
    cell = (lattice, small.get_scaled_positions(), small.numbers, along)
    found = searched(spglib.get_magnetic_symmetry, cell, symprec=symprec, mag_symprec=mag_symprec, is_axial=False)
    if found is None:
        raise StructureError(f"spglib finds no symmetry at symprec {symprec:g} Å; choose another --symprec")
    integer = np.unique(np.asarray(found["rotations"], dtype=int), axis=0)
    to_cartesian = lattice.T
    rotations = np.array([to_cartesian @ w @ np.linalg.inv(to_cartesian) for w in integer])
    primitive = searched(spglib.standardize_cell, cell[:3], to_primitive=True, no_idealize=True, symprec=symprec)
    basis = lattice if primitive is None else np.asarray(primitive[0])
    system, frame = _frame(rotations, basis, atoms.cell[:])
    return PatternSymmetry(rotations, system, frame)


def _axes(rotations: Array) -> dict[int, list[Array]]:
    """Return the distinct rotation axes by their highest order."""
    axes: list[tuple[Array, int]] = []
    for matrix in rotations:
        proper = matrix * np.sign(np.linalg.det(matrix))
        order = {3: 1, 2: 6, 1: 4, 0: 3, -1: 2}[round(float(np.trace(proper)))]
        if order == 1:
            continue
        values, vectors = np.linalg.eigh((proper + proper.T) / 2)
        axis = _positive(vectors[:, int(np.argmax(values))])
        for k, (other, highest) in enumerate(axes):
            if abs(abs(axis @ other) - 1) < ANGLE:
                axes[k] = (other, max(order, highest))
                break
        else:
            axes.append((axis, order))
    return {order: [a for a, highest in axes if highest == order] for order in (2, 3, 4, 6)}


def _positive(axis: Array) -> Array:
    """Turn an axis so that its largest component is positive."""
    leading = np.flatnonzero(np.abs(axis) > np.abs(axis).max() - 1e-6)[0]
    return axis / np.linalg.norm(axis) * np.sign(axis[leading])


def _sense(axis: Array, cell: Array) -> Array:
    """Turn an axis so that its first component along vectors of the cell that does not vanish is positive.

    Unlike a sense by Cartesian components it turns with the crystal.
    """
    along = cell @ axis / np.linalg.norm(cell, axis=1)
    return axis * np.sign(along[np.flatnonzero(np.abs(along) > ANGLE)[0]])


def _foremost(axes: Sequence[Array], cell: Array) -> Array:
    """Return the axis that lies closest to the first vector of the cell, or to the next where several do."""
    signed = [_sense(a, cell) for a in axes]
    return max(signed, key=lambda a: tuple(np.round(cell @ a, 4)))


def _lattice_vectors(basis: Array) -> tuple[Array, Array]:
    """Return the short vectors of a lattice as unit vectors (V, 3), and their lengths (V,)."""
    grid = np.array([c for c in itertools.product(range(-4, 5), repeat=3) if any(c)])
    vectors = grid @ basis
    lengths = np.linalg.norm(vectors, axis=1)
    return vectors / lengths[:, None], np.round(lengths, 4)


def _period(axis: Array, basis: Array) -> float:
    """Return the length of the shortest lattice vector along an axis, infinite where there is none."""
    vectors, lengths = _lattice_vectors(basis)
    return float(lengths[np.abs(vectors @ axis) > 1 - ANGLE**2].min(initial=np.inf))


def _shortest_across(axis: Array, basis: Array, cell: Array) -> Array:
    """Return the direction of the shortest lattice vector perpendicular to an axis."""
    vectors, lengths = _lattice_vectors(basis)
    across = np.abs(vectors @ axis) < ANGLE
    if not across.any():
        return axis
    return _foremost(list(vectors[across & (lengths == lengths[across].min())]), cell)


def _frame(rotations: Array, basis: Array, cell: Array) -> tuple[str, Array]:
    """Return the system of a point group and its axes: lengths count in the basis, senses are those of the cell."""
    axes = _axes(rotations)
    if len(axes[3]) == 4:
        cubic = axes[4] if len(axes[4]) == 3 else axes[2][:3]
        order = [int(np.argmax([abs(c[k]) for c in cubic])) for k in range(3)]
        rows = [cubic[k] for k in (order if len(set(order)) == 3 else range(3))]
        return "cubic", _right_handed(np.array(rows))
    for order_, system in ((6, "hexagonal"), (4, "tetragonal"), (3, "trigonal")):
        if len(axes[order_]) == 1:
            z = _sense(axes[order_][0], cell[::-1])
            candidates = [a for a in axes[2] if abs(a @ z) < ANGLE]
            if not candidates:
                return system, _completed(_shortest_across(z, basis, cell), z)
            periods = [_period(a, basis) for a in candidates]
            shortest = [a for a, period in zip(candidates, periods, strict=True) if period == min(periods)]
            return system, _completed(_foremost(shortest, cell), z)
    if len(axes[2]) == 3:
        rows = [axes[2][k] for k in np.argsort([_period(a, basis) for a in axes[2]], kind="stable")]
        return "orthorhombic", _right_handed(np.array(rows))
    if len(axes[2]) == 1:
        z = _sense(axes[2][0], cell[::-1])
        return "monoclinic", _completed(_shortest_across(z, basis, cell), z)
    return "triclinic", _completed(basis[0] / np.linalg.norm(basis[0]), np.cross(basis[0], basis[1]))


def _completed(x: Array, z: Array) -> Array:
    z = z / np.linalg.norm(z)
    x = x - (x @ z) * z
    x = x / np.linalg.norm(x)
    return np.array([x, np.cross(z, x), z])


def _right_handed(rows: Array) -> Array:
    u, _, v = np.linalg.svd(rows)
    frame = u @ v
    if np.linalg.det(frame) < 0:
        frame = frame * np.array([[1.0], [1.0], [-1.0]])
    return frame


def orbit(axis: Array, rotations: Array) -> Array:
    """Return the distinct axes (sign left open) that the rotations make from one, shape (K, 3)."""
    found: list[Array] = []
    for image in rotations @ axis:
        if not any(abs(abs(image @ f) - 1) < ANGLE for f in found):
            found.append(_positive(image))
    return np.array(found)


def special_points(cell: Atoms, symprec: float) -> tuple[dict[str, Array], str]:
    """Return the special points of a crystal and the path through them.

    They are those of Y. Hinuma et al., Comput. Mater. Sci. 128, 140 (2017), by seekpath, in the cell as it is. An order
    that enlarges the cell of the crystal has the path of its own lattice, which the atoms alone do not show.

    Parameters
    ----------
    cell : the primitive cell of crystal and order.
    symprec : tolerance in Å.

    Returns
    -------
    Points in the reciprocal lattice of the cell, shape (3,), by name, G for Γ; and the path as names, a comma where it
    jumps.

    Raises
    ------
    StructureError : no symmetry is found at this tolerance.
    """
    lattice = cell.cell[:]
    with warnings.catch_warnings():
        # enlarged and edge cases: both are paths of this cell
        warnings.simplefilter("ignore")
        try:
            crystal = (lattice, cell.get_scaled_positions(), cell.numbers)
            found = seekpath.get_path_orig_cell(crystal, symprec=symprec)
            if found["is_supercell"]:
                found = seekpath.get_path_orig_cell((lattice, [[0.0, 0.0, 0.0]], [1]), symprec=symprec)
        except (seekpath.hpkot.SymmetryDetectionError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise StructureError(f"no path is found in this lattice ({reason}); choose another --symprec") from error
    points = {_point_name(name): np.round(q, 12) + 0.0 for name, q in found["point_coords"].items()}
    path, last = "", None
    for start, end in found["path"]:
        if start != last:
            path += ("," if path else "") + _point_name(start)
        path += _point_name(end)
        last = end
    return points, path


def _point_name(name: str) -> str:
    """Return the name of a special point as a capital, small letters and a digit: G for Γ, G1 for another G."""
    letter, _, number = name.partition("_")
    if name in ("GAMMA", "G"):
        return "G" if name == "GAMMA" else "G1"
    return letter.capitalize() + number


def band_path(
    cell: Atoms, path: str, points: int, symprec: float = 1e-3
) -> tuple[Array, Array, list[tuple[str, float]]]:
    """Return wave vectors along a path through special points of a lattice.

    Parameters
    ----------
    cell : the primitive cell.
    path : special points such as ``GHPGN``; ``auto`` is the path of the crystal, see `special_points`.
    points : number of wave vectors.
    symprec : tolerance in Å.

    Returns
    -------
    Wave vectors in the reciprocal lattice of the cell, shape (Q, 3); their places along the path in 1/Å, shape (Q,);
    names of the special points with their places.

    Raises
    ------
    OptionError : the lattice has no such path.
    StructureError : no symmetry is found at this tolerance.
    """
    known, usual = special_points(cell, symprec)
    try:
        found = cell.cell.bandpath(usual if path == "auto" else path, points, special_points=known)
        if not len(found.kpts):
            raise ValueError
    except (KeyError, IndexError, ValueError, RuntimeError, AssertionError) as error:
        raise OptionError(
            f"no path '{path}' in this lattice; its points are {', '.join(sorted(known))}, and its path is {usual}"
        ) from error
    return np.asarray(found.kpts, dtype=float), *_linear_axis(found)


def _linear_axis(path: BandPath) -> tuple[Array, list[tuple[str, float]]]:
    """Return places along a path in 1/Å, shape (Q,), and its special points with theirs; a jump has no length.

    ASE's own axis finds the special points where the path bends, so it takes the steps between neighbours on the path
    for jumps.
    """
    q = np.asarray(path.kpts, dtype=float)
    steps = np.append(0.0, np.linalg.norm(np.diff(q, axis=0) @ path.icell, axis=1)) * 2 * np.pi
    waves: list[int] = []
    names: list[str] = []
    for part in parse_path_string(path.path):
        for number, name in enumerate(part):
            start = waves[-1] + 1 if waves else 0
            apart = np.abs(q[start:] - path.special_points[name]).max(axis=1)
            waves.append(start + int(np.flatnonzero(apart < 1e-9)[0]))
            names.append(name)
            if number == 0:
                steps[waves[-1]] = 0.0
    position = np.cumsum(steps)
    return position, [(name, float(position[wave])) for name, wave in zip(names, waves, strict=True)]


@dataclass(frozen=True)
class SiteSymmetry:
    """Operations that keep a crystal with its moments, as they act on atoms and Cartesian tensors.

    Parameters
    ----------
    rotations : orthogonal matrices, proper or not, Cartesian, shape (G, 3, 3).
    images : atom that each atom is taken to, shape (G, N).
    integer, translations : the operations on fractional coordinates, shapes (G, 3, 3) and (G, 3).
    group : what the operations keep, in words.
    """

    rotations: Array
    images: NDArray[np.int64]
    integer: NDArray[np.int64]
    translations: Array
    group: str

    def vectors(self, values: Array) -> Array:
        """Average polar vectors of the atoms over the group, shape (N, 3)."""
        mean = np.zeros_like(values)
        for rotation, image in zip(self.rotations, self.images, strict=True):
            mean[image] += values @ rotation.T
        return mean / len(self.rotations)

    def tensor(self, value: Array) -> Array:
        """Average a Cartesian tensor of any even rank over the group."""
        mean = np.zeros_like(value)
        for rotation in self.rotations:
            turned = value
            for axis in range(value.ndim):
                turned = np.moveaxis(np.tensordot(rotation, turned, axes=(1, axis)), 0, axis)
            mean += turned
        return mean / len(self.rotations)

    def structure(self, atoms: Atoms) -> Atoms:
        """Return the structure with cell and positions made exactly symmetric, without turning it."""
        lattice, scaled = atoms.cell[:], atoms.get_scaled_positions(wrap=False)
        metric = np.mean([w.T @ (lattice @ lattice.T) @ w for w in self.integer], axis=0)
        inverse = np.linalg.inv(lattice)
        stretch = sqrtm(inverse @ metric @ inverse.T).real
        mean = np.zeros_like(scaled)
        for w, t, image in zip(self.integer, self.translations, self.images, strict=True):
            moved = scaled @ w.T + t
            mean[image] += moved - np.round(moved - scaled[image])
        copy = atoms.copy()
        copy.set_cell(lattice @ stretch)
        copy.set_scaled_positions(mean / len(self.images))
        return copy


def site_symmetry(atoms: Atoms, moments: Array, soc: bool, symprec: float, mag_symprec: float) -> SiteSymmetry:
    """Find the operations that keep a crystal with its moments.

    Without spin-orbit coupling a collinear pattern turns freely, so every rotation counts that keeps it up to a global
    sign; otherwise those of the magnetic space group.

    Parameters
    ----------
    atoms : the structure.
    moments : shape (N, 3), µB.
    soc : whether moments are tied to the lattice.
    symprec, mag_symprec : tolerances in Å and µB.

    Raises
    ------
    StructureError : spglib finds no symmetry at this tolerance.
    """
    free = not soc and bool(np.abs(moments).max(initial=0.0) <= mag_symprec)
    pattern = None if soc or free else Pattern.of(moments)
    collinear = free or (pattern is not None and pattern.collinear)
    spins = (np.zeros(len(atoms)) if pattern is None else pattern.along) if collinear else moments
    lattice, scaled = atoms.cell[:], atoms.get_scaled_positions(wrap=False)
    found = searched(
        spglib.get_magnetic_symmetry,
        (lattice, scaled, atoms.numbers, spins),
        symprec=symprec,
        mag_symprec=mag_symprec,
        is_axial=not collinear,
    )
    if found is None:
        raise StructureError(f"spglib finds no symmetry at symprec {symprec:g} Å; choose another --symprec")
    integer, translations = np.asarray(found["rotations"], dtype=np.int64), np.asarray(found["translations"])
    rotations, images = [], []
    for w, t in zip(integer, translations, strict=True):
        apart = (scaled @ w.T + t)[:, None] - scaled[None]
        distance = np.linalg.norm((apart - np.round(apart)) @ lattice, axis=2)
        distance[atoms.numbers[:, None] != atoms.numbers[None]] = np.inf
        images.append(distance.argmin(axis=1))
        u, _, v = np.linalg.svd(lattice.T @ w @ np.linalg.inv(lattice.T))
        rotations.append(u @ v)
    names = {True: "rotations that keep the collinear pattern up to its sign", False: "magnetic space group"}
    return SiteSymmetry(np.array(rotations), np.array(images), integer, translations, names[collinear])


def lattice_frame(atoms: Atoms, rotations: Array, symprec: float) -> tuple[str, Array]:
    """Return the crystal system of a point group and the lattice's own axes.

    Parameters
    ----------
    atoms : the structure.
    rotations : Cartesian, shape (G, 3, 3).
    symprec : tolerance in Å.

    Returns
    -------
    The system, and orthonormal right-handed rows x', y', z'; cubic axes where cubic, z' the principal one elsewhere.
    """
    cell = (atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers)
    primitive = searched(spglib.standardize_cell, cell, to_primitive=True, no_idealize=True, symprec=symprec)
    distinct: list[Array] = []
    for rotation in rotations:
        if not any(np.abs(rotation - other).max() < ANGLE for other in distinct):
            distinct.append(rotation)
    return _frame(np.array(distinct), atoms.cell[:] if primitive is None else np.asarray(primitive[0]), atoms.cell[:])
