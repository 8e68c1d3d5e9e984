"""Crystals in supercells as phonopy sees them: displacements, forces with moments that follow, force constants."""

import copy
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import spglib
from ase import Atoms
from ase.geometry.minkowski_reduction import minkowski_reduce
from numpy.typing import ArrayLike, NDArray
from phonopy import Phonopy
from phonopy.file_IO import write_FORCE_SETS
from phonopy.interface.phonopy_yaml import PhonopyYaml
from phonopy.structure.atoms import PhonopyAtoms

from .errors import ConvergenceError, MomentError, OptionError, OutputError, StructureError
from .protocol import ZERO_MOMENT, MomentMode, SpinCalculator, bare, free_axes, with_moments
from .symmetry import Pattern, searched

Array = NDArray[np.float64]
Method = Literal["displacements", "hessian"]
METHODS: tuple[Method, ...] = ("displacements", "hessian")

SADDLE = 1e-9
"""Curvatures below this part of the largest are zero modes of the moments."""
FILES = ("phonopy_disp.yaml", "FORCE_SETS", "phonopy_params.yaml")
ROUNDED = 6
"""Decimals of moments (µB) in phonopy's files, so that its tolerance does not tell apart what symmetry makes equal."""


@dataclass(frozen=True)
class Lattice:
    """A crystal, its supercell and its primitive cell, whatever its moments.

    Parameters
    ----------
    atoms : the unit cell; its moments are not used.
    supercell_matrix, primitive_matrix : shape (3, 3); phonopy's, columns are the vectors in those of the unit cell.
    symprec : tolerance of phonopy's symmetry search, Å.
    dataset : displacements that were given, in phonopy's form; None lets phonopy choose them.
    distance : length of a displacement, Å.
    mag_symprec : moments of one element that are closer than this, in µB, are equal to phonopy.
    """

    atoms: Atoms
    supercell_matrix: NDArray[np.int64]
    primitive_matrix: Array
    symprec: float
    dataset: dict[str, Any] | None = None
    distance: float = 0.01
    mag_symprec: float = 0.0

    def phonon(self, moments: Array | None, soc: bool) -> Phonopy:
        """Return phonopy's object with moments in place.

        Parameters
        ----------
        moments : of the unit cell, shape (N, 3) in µB; None for the symmetry of the atoms alone.
        soc : whether moments are tied to the lattice; if not, collinear ones enter the symmetry search as numbers.

        Raises
        ------
        StructureError : no symmetry is found at this tolerance, or in cells as oblique as these.
        """
        found: Phonopy | None = searched(
            Phonopy,
            phonopy_atoms(self.atoms, None if moments is None else self._evened(moments), soc),
            supercell_matrix=self.supercell_matrix,
            primitive_matrix=self.primitive_matrix,
            symprec=self.symprec,
            log_level=0,
        )
        if found is None:
            raise StructureError(
                f"no symmetry of the supercell with its moments is found at symprec {self.symprec:g} Å; choose another "
                "--symprec, or a supercell that is less oblique"
            )
        return found

    def compact(self, patterns: Sequence[Array | None], soc: bool) -> "Lattice":
        """Return the lattice, its cells by their shortest vectors where no symmetry is found in them as they are.

        Parameters
        ----------
        patterns : moments of the unit cell, each of shape (N, 3) in µB; None for those without symmetry.
        soc : whether moments are tied to the lattice.
        """
        cell = self.atoms.cell[:]
        supercell = self.supercell_matrix @ _shortest(self.supercell_matrix.T @ cell).T
        primitive = self.primitive_matrix @ _shortest(self.primitive_matrix.T @ cell).T
        if np.array_equal(supercell, self.supercell_matrix) and np.array_equal(primitive, self.primitive_matrix):
            return self
        try:
            for moments in patterns:
                self.phonon(moments, soc)
        except StructureError:
            return replace(self, supercell_matrix=supercell, primitive_matrix=primitive)
        return self

    def _evened(self, moments: Array) -> Array:
        """Return moments (N, 3) in µB, those that are equal within the tolerance as the first of them."""
        close = np.abs(moments[:, None] - moments).max(axis=2) <= self.mag_symprec
        close &= self.atoms.numbers[:, None] == self.atoms.numbers
        leader = np.arange(len(moments))
        for k in range(len(moments)):
            leader[k] = next((j for j in range(k) if close[k, j] and leader[j] == j), k)
        return moments[leader]

    def displaced(self, moments: Array | None, soc: bool) -> Phonopy:
        """Return phonopy's object with displacements: those given, or as many as needed.

        For moments that is the fewest that their symmetry allows; without them, for an average over states that have
        no symmetry, every independent atom along three axes and back.
        """
        phonon = self.phonon(moments, soc)
        if self.dataset is not None:
            phonon.dataset = copy.deepcopy(self.dataset)
        elif moments is not None:
            phonon.generate_displacements(distance=self.distance)
        else:
            phonon.dataset = _along_axes(phonon, self.distance)
        return phonon

    def scaled(self, factor: float) -> "Lattice":
        """Return the lattice with its vectors and positions multiplied by a factor."""
        atoms = bare(self.atoms)
        atoms.set_cell(atoms.cell[:] * factor, scale_atoms=True)
        return replace(self, atoms=atoms)


def phonopy_atoms(atoms: Atoms, moments: Array | None, soc: bool) -> PhonopyAtoms:
    """Return a structure in phonopy's form; moments (N, 3) in µB become numbers where they are collinear and free."""
    magnetic: Array | None = None
    if moments is not None and np.abs(moments).max(initial=0.0) > ZERO_MOMENT:
        pattern = Pattern.of(moments)
        magnetic = np.round(pattern.along if pattern.collinear and not soc else moments, ROUNDED)
    return PhonopyAtoms(
        symbols=atoms.get_chemical_symbols(),
        cell=atoms.cell[:],
        scaled_positions=atoms.get_scaled_positions(),
        masses=atoms.get_masses() if atoms.has("masses") else None,
        magnetic_moments=magnetic,
    )


def _shortest(vectors: Array) -> NDArray[np.int64]:
    """Return the shortest vectors of a lattice in its given ones, both in rows and of one handedness, shape (3, 3)."""
    steps = np.rint(np.linalg.solve(vectors.T, minkowski_reduce(vectors)[0].T).T).astype(np.int64)
    return np.asarray(steps * round(np.linalg.det(steps)))


def ase_atoms(cell: PhonopyAtoms) -> Atoms:
    """Return a structure of phonopy's with its masses as ASE's, without moments."""
    return Atoms(
        numbers=cell.numbers, cell=cell.cell, scaled_positions=cell.scaled_positions, masses=cell.masses, pbc=True
    )


def supercell_matrix(atoms: Atoms, repeats: Sequence[int], length: float, max_atoms: int) -> NDArray[np.int64]:
    """Return the matrix of a supercell: repeats as three or nine integers, or enough of them for a least height in Å.

    Raises
    ------
    OptionError : another number of integers, no positive determinant, or more atoms than allowed.
    """
    if len(repeats) not in (0, 3, 9):
        raise OptionError(f"dim holds {len(repeats)} numbers; give three repeats or the nine of a matrix")
    if len(repeats) == 0:
        heights = 1 / np.linalg.norm(np.linalg.inv(atoms.cell[:]), axis=0)
        repeats = [int(np.ceil(length / h - 1e-6)) for h in heights]
    matrix = np.array(repeats, dtype=np.int64)
    matrix = np.diag(matrix) if matrix.size == 3 else matrix.reshape(3, 3)
    cells = round(np.linalg.det(matrix))
    if cells < 1 or (len(repeats) == 3 and min(repeats) < 1):
        raise OptionError("dim spans no supercell; its determinant must be positive")
    if cells * len(atoms) > max_atoms:
        raise OptionError(
            f"the supercell has {cells * len(atoms)} atoms, above the limit of {max_atoms}; lower dim or length, "
            "or raise max_atoms"
        )
    return matrix


def primitive_matrix(atoms: Atoms, patterns: Sequence[Array], symprec: float, mag_symprec: float) -> Array:
    """Return phonopy's primitive matrix of the smallest cell that repeats the atoms and every pattern of moments.

    Parameters
    ----------
    atoms : the unit cell.
    patterns : moments, each of shape (N, 3), µB.
    symprec, mag_symprec : tolerances in Å and µB.
    """
    kinds: list[tuple[int, list[Array]]] = []
    types = []
    for k, number in enumerate(atoms.numbers):
        mine = [p[k] for p in patterns]
        for index, (other, theirs) in enumerate(kinds):
            close = all(np.abs(a - b).max() <= mag_symprec for a, b in zip(mine, theirs, strict=True))
            if other == number and close:
                types.append(index + 1)
                break
        else:
            kinds.append((int(number), mine))
            types.append(len(kinds))
    cell = (atoms.cell[:], atoms.get_scaled_positions(), types)
    found = searched(spglib.standardize_cell, cell, to_primitive=True, no_idealize=True, symprec=symprec)
    if found is None or len(found[2]) == len(atoms):
        return np.eye(3)
    matrix = np.linalg.solve(atoms.cell[:].T, np.asarray(found[0]).T)
    # spglib turns left-handed vectors round
    matrix *= np.sign(np.linalg.det(matrix))
    cells = len(atoms) // len(found[2])
    for denominator in range(1, 4 * cells + 1):
        whole = np.rint(matrix * denominator)
        if np.abs(matrix - whole / denominator).max() < 1e-3:
            return np.asarray(whole / denominator)
    return np.eye(3)


@dataclass(frozen=True)
class Setup:
    """What ``phonopy -d`` left.

    Parameters
    ----------
    lattice : cells and displacements.
    moments : as they stand in the file, shape (N,) or (N, 3) in µB; None where it has none.
    operations : symmetry operations that the displacements were made for.
    """

    lattice: Lattice
    moments: Array | None
    operations: int


def read_setup(path: str | Path, symprec: float) -> Setup:
    """Read what ``phonopy -d`` or ``phonopy-init -d`` left.

    Raises
    ------
    StructureError : no such file, no phonopy file, or one without displacements.
    """
    found = _read_yaml(path)
    if found.dataset is None:
        raise StructureError(f"'{path}' holds no displacements; write it with phonopy-init -d")
    if found.primitive_matrix is None or isinstance(found.primitive_matrix, str):
        raise StructureError(f"'{path}' holds no primitive_matrix; write it with phonopy-init -d --pa auto")
    dataset = copy.deepcopy(dict(found.dataset))
    for item in dataset.get("first_atoms", [dataset]):
        item.pop("forces", None)
    matrix = np.asarray(found.supercell_matrix, dtype=np.int64)
    primitive = np.asarray(found.primitive_matrix, dtype=float)
    phonon = Phonopy(found.unitcell, matrix, primitive, symprec=symprec, log_level=0)
    lattice = Lattice(ase_atoms(found.unitcell), matrix, primitive, symprec, dataset)
    return Setup(lattice, found.unitcell.magnetic_moments, operations(phonon))


def read_unit_cell(path: str | Path) -> Atoms:
    """Return the unit cell of a phonopy file, with its moments where it has them.

    Raises
    ------
    StructureError : no such file, or no phonopy file.
    """
    cell = _read_yaml(path).unitcell
    atoms = ase_atoms(cell)
    return atoms if cell.magnetic_moments is None else with_moments(atoms, cell.magnetic_moments)


def _read_yaml(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise StructureError(f"there is no file '{path}' of phonopy; check the path")
    try:
        found = PhonopyYaml()
        found.read(path)
    except Exception as error:
        raise StructureError(f"'{path}' cannot be read as a file of phonopy; give phonopy_disp.yaml") from error
    if found.unitcell is None:
        raise StructureError(f"'{path}' holds no unit cell of phonopy; give phonopy_disp.yaml")
    if found.calculator not in (None, "vasp"):
        raise StructureError(
            f"'{path}' is in the units of {found.calculator}; write it in Å and eV, as phonopy does without that option"
        )
    return found


def operations(phonon: Phonopy) -> int:
    """Return the number of symmetry operations in the supercell that phonopy found."""
    return len(phonon.symmetry.symmetry_operations["rotations"])


def unit_index(phonon: Phonopy) -> NDArray[np.intp]:
    """Return the atom of the unit cell that each atom of the supercell repeats."""
    to_unit = phonon.supercell.u2u_map
    return np.array([to_unit[k] for k in phonon.supercell.s2u_map], dtype=np.intp)


def full_pairs(phonon: Phonopy, compact: Array) -> Array:
    """Repeat pair tensors of the primitive atoms over the supercell by its translations.

    Parameters
    ----------
    phonon : phonopy's object.
    compact : rows of the primitive atoms, shape (n, 3, N, 3).

    Returns
    -------
    Shape (N, 3, N, 3).
    """
    primitive = phonon.primitive
    row = {int(s): k for k, s in enumerate(primitive.p2s_map)}
    permutations = np.asarray(primitive.atomic_permutations)
    count = compact.shape[2]
    full = np.empty((count, 3, count, 3))
    for atom, home in enumerate(primitive.s2p_map):
        moved = permutations[int(np.flatnonzero(permutations[:, atom] == home)[0])]
        full[atom] = compact[row[int(home)]][:, moved]
    return full


def followed(rr: Array, left: Array, mm: Array, right: Array, axes: Array) -> Array:
    """Return H_rr - H_rm H_mm⁻¹ H_mr with the moments free along some axes; zero modes of H_mm are left out.

    Parameters
    ----------
    rr : shape (A, B).
    left, right : H_rm of the displacements of both sides, shape (A, 3N) and (B, 3N).
    mm : shape (3N, 3N).
    axes : from `free_axes`, shape (3N, F).

    Raises
    ------
    ConvergenceError : the moments are at a saddle point, so that they do not follow.
    """
    if axes.shape[1] == 0:
        return rr
    inner = axes.T @ mm @ axes
    values, modes = np.linalg.eigh((inner + inner.T) / 2)
    floor = SADDLE * np.abs(values).max()
    if values[0] < -floor:
        raise ConvergenceError(
            f"the moments sit at a saddle point (lowest curvature {values[0]:.3e} eV/µB²), so they cannot follow; "
            "start from another magnetic order, or keep them fixed"
        )
    kept = values > floor
    basis = axes @ modes[:, kept]
    return np.asarray(rr - (left @ basis / values[kept]) @ (right @ basis).T)


@dataclass(frozen=True)
class Response:
    """How forces on displaced atoms are found.

    Parameters
    ----------
    calculator : a single model.
    mode : which moments follow the displacements.
    method : displaced supercells, or the analytic Hessian.
    tell : called with the number of finished parts and their total.
    """

    calculator: SpinCalculator
    mode: MomentMode
    method: Method
    tell: Callable[[int, int], None]

    def forces(self, phonon: Phonopy, moments: Array) -> Array:
        """Return the forces that displacements cause, those of the undisplaced supercell taken off.

        Parameters
        ----------
        phonon : phonopy's object with displacements.
        moments : of the undisplaced supercell, shape (N, 3), µB.

        Returns
        -------
        Forces in eV/Å, shape (displacements, N, 3).
        """
        if self.method == "displacements":
            return self._displaced(phonon, moments)
        shifts = displacements(phonon)
        moving = np.flatnonzero(np.abs(shifts).max(axis=(0, 2)) > 0)
        rows = self._rows(phonon, moments, moving)
        return -np.einsum("dra,ranb->dnb", shifts[:, moving], rows)

    def _displaced(self, phonon: Phonopy, moments: Array) -> Array:
        base = ase_atoms(phonon.supercell)
        shifts = displacements(phonon)
        images = [with_moments(base, moments)]
        for shift in shifts:
            moved = with_moments(base, moments)
            moved.positions += shift
            images.append(moved)
        found = []
        for k, image in enumerate(images):
            self.tell(k, len(images))
            found.append(self.calculator.forces(image, self.calculator.relax_moments([image], self.mode)[0]))
        self.tell(len(images), len(images))
        return np.array(found[1:]) - found[0]

    def _rows(self, phonon: Phonopy, moments: Array, moving: NDArray[np.intp]) -> Array:
        """Return rows of the force constants, moments following, shape (R, 3, N, 3)."""
        image = with_moments(ase_atoms(phonon.supercell), moments)
        turning = self.mode == "full" and self.calculator.turns_freely(image)
        axes = free_axes(moments, self.mode, turning)
        self.tell(0, 1)
        if axes.shape[1] == 0:
            rows = self.calculator.hessian(image, ("rr",), [int(k) for k in moving])["rr"]
        elif self._periodic(phonon, moments):
            home = [int(k) for k in phonon.primitive.p2s_map]
            blocks = self.calculator.hessian(image, ("rr", "rm", "mm"), home)
            whole = {name: full_pairs(phonon, block) for name, block in blocks.items()}
            rows = self._follow(whole["rr"][moving], whole["rm"], whole["mm"], axes, moving)
        else:
            blocks = {
                "rr": self.calculator.hessian(image, ("rr",), [int(k) for k in moving])["rr"],
                **self.calculator.hessian(image, ("rm", "mm")),
            }
            rows = self._follow(blocks["rr"], blocks["rm"], blocks["mm"], axes, moving)
        self.tell(1, 1)
        return rows

    @staticmethod
    def _periodic(phonon: Phonopy, moments: Array) -> bool:
        home = np.asarray(phonon.primitive.s2p_map)
        return bool(np.abs(moments - moments[home]).max() <= 1e-5)

    @staticmethod
    def _follow(rr: Array, rm: Array, mm: Array, axes: Array, moving: NDArray[np.intp]) -> Array:
        size = 3 * len(mm)
        coupling = rm.reshape(size, size)
        left = rm[moving].reshape(-1, size)
        return followed(rr.reshape(-1, size), left, mm.reshape(size, size), coupling, axes).reshape(rr.shape)


def displacements(phonon: Phonopy) -> Array:
    """Return the displacements of every atom of the supercell in Å, shape (displacements, N, 3)."""
    dataset = phonon.dataset
    if "first_atoms" not in dataset:
        return np.array(dataset["displacements"], dtype=float)
    shifts = np.zeros((len(dataset["first_atoms"]), len(phonon.supercell), 3))
    for k, item in enumerate(dataset["first_atoms"]):
        shifts[k, item["number"]] = item["displacement"]
    return shifts


def _along_axes(phonon: Phonopy, distance: float) -> dict[str, Any]:
    items = [
        {"number": int(atom), "displacement": sign * distance * axis}
        for atom, axis, sign in itertools.product(phonon.symmetry.get_independent_atoms(), np.eye(3), (1.0, -1.0))
    ]
    return {"natom": len(phonon.supercell), "first_atoms": items}


def random_moments(lengths: Array, rng: np.random.Generator) -> Array:
    """Return moments of given lengths (N,) in random directions, shape (N, 3), µB."""
    directions = rng.normal(size=(len(lengths), 3))
    return np.asarray(lengths[:, None] * directions / np.linalg.norm(directions, axis=1)[:, None])


def solve(phonon: Phonopy, forces: ArrayLike) -> Phonopy:
    """Give phonopy's object forces (displacements, N, 3) and let it find symmetrised force constants."""
    phonon.forces = np.asarray(forces, dtype=float)
    scattered = "first_atoms" not in phonon.dataset
    phonon.produce_force_constants(
        calculate_full_force_constants=False, fc_calculator="symfc" if scattered else None, show_drift=False
    )
    if not scattered:
        phonon.symmetrize_force_constants(show_drift=False, use_symfc_projector=True)
    return phonon


def edge(phonon: Phonopy) -> float:
    """Return the largest force constant at pairs half a supercell apart, relative to the largest of all pairs."""
    constants = np.asarray(phonon.force_constants)
    if len(constants) == len(phonon.supercell):
        constants = constants[phonon.primitive.p2s_map]
    strength = np.abs(constants).max(axis=(2, 3)).T
    _, multiplicity = phonon.primitive.get_smallest_vectors()
    shared = np.asarray(multiplicity)[..., 0] > 1
    between = strength.copy()
    for k, atom in enumerate(phonon.primitive.p2s_map):
        between[atom, k] = 0.0
    return float(strength[shared].max(initial=0.0) / between.max()) if between.max() > 0 else 0.0


def write_force_sets(phonon: Phonopy, path: str) -> None:
    """Write phonopy's FORCE_SETS of an object with forces."""
    write_FORCE_SETS(phonon.dataset, filename=path)


def write_files(phonons: dict[str, Phonopy], folder: str | Path) -> None:
    """Write what phonopy's own commands read, moments in place, as a folder that appears complete or not at all.

    Parameters
    ----------
    phonons : objects with forces and force constants, by the name of their subfolder; the empty name is the folder.
    folder : is made; one that holds nothing but earlier files of this kind is replaced.

    Raises
    ------
    OutputError : the folder holds other files, or cannot be written.
    """
    target = Path(folder)
    check_folder(target)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.resolve().parent))
        try:
            for name, phonon in phonons.items():
                place = temporary / name
                place.mkdir(exist_ok=True)
                phonon.save(
                    place / FILES[0], settings={"force_sets": False, "displacements": True, "force_constants": False}
                )
                write_force_sets(phonon, str(place / FILES[1]))
                phonon.save(place / FILES[2], settings={"force_sets": True, "force_constants": True})
            os.chmod(temporary, 0o755)
            if target.is_dir():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.resolve().parent))
                os.replace(target, old)
                os.replace(temporary, target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"the folder '{folder}' cannot be written ({error.strerror or error}); choose another"
        ) from error


def check_folder(folder: str | Path) -> None:
    """Check, without leaving anything behind, that a folder of phonopy's files can be made at a place.

    Raises
    ------
    OutputError : no such parent, no permission, or something else is there.
    """
    target = Path(folder)
    parent = target.resolve().parent
    if not parent.is_dir():
        raise OutputError(f"the directory '{target.parent}' of the folder '{folder}' does not exist; make it first")
    if Path.cwd().is_relative_to(target.resolve()):
        raise OutputError(f"'{folder}' is the working directory or above it; name a folder of its own")
    if target.exists():
        others = (
            [p.name for p in target.rglob("*") if p.name not in FILES and not p.is_dir()] if target.is_dir() else [""]
        )
        if others:
            what = f"holds '{others[0]}'" if others[0] else "is a file"
            raise OutputError(f"'{folder}' {what}; name a new folder for phonopy's files")
        missing = [name for name in FILES if not (target / name).exists()]
        if missing and any(target.iterdir()):
            raise OutputError(f"'{folder}' holds files of phonopy, but not of this command; name a new folder")
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise OutputError(f"the folder '{folder}' cannot be made ({error.strerror}); choose another place") from error


def check_symmetry(phonon: Phonopy, wanted: int) -> None:
    """Refuse moments whose symmetry is lower than that which displacements were made for.

    Raises
    ------
    MomentError : names both numbers of operations.
    """
    if operations(phonon) < wanted:
        raise MomentError(
            f"the moments keep {operations(phonon)} of the {wanted} symmetry operations that the displacements were "
            "made for; make them with these moments in place"
        )
