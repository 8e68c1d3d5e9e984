"""Reading structures with their moments, checking them, and stating a guess where moments are missing."""

import itertools
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.io import read
from ase.neighborlist import neighbor_list
from numpy.typing import NDArray

from .errors import MomentError, OptionError, StructureError, did_you_mean
from .protocol import SMALLEST_MOMENT, ZERO_MOMENT, SpinCalculator, bare, moments_of, vectors, with_moments

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Order = Literal["fm", "afm", "auto"]
ORDERS: tuple[Order, ...] = ("fm", "afm", "auto")

OVERLAP = 0.4
"""Two atoms closer than this part of the sum of their covalent radii overlap."""
LARGEST_MOMENT = 12.0
"""No atom carries more, in µB."""
ENUMERATED_SITES = 16
SAME_ATOM = 0.5
"""An atom of a file with moments is closer than this, in Å, to the atom of the structure that it stands for."""
SAME_CELL = 0.1
"""Largest strain between the cell of a file with moments and that of the structure."""


@dataclass(frozen=True)
class Start:
    """A structure to compute, with its moments and where they came from.

    Parameters
    ----------
    atoms : structure with moments of shape (N, 3) in µB.
    origin : one sentence about the moments, printed and stored.
    order : ``fm``, ``afm``, or ``given``.
    """

    atoms: Atoms
    origin: str
    order: str


def formula(atoms: Atoms) -> str:
    """Return the chemical formula with the elements in the order of the structure."""
    symbols = atoms.get_chemical_symbols()
    counts = {s: symbols.count(s) for s in dict.fromkeys(symbols)}
    return "".join(f"{s}{k if k > 1 else ''}" for s, k in counts.items())


def read_structure(path: str | Path) -> Atoms:
    """Read a structure with its moments from CIF, magCIF, POSCAR, extxyz, phonopy's yaml, or anything else ASE reads.

    Parameters
    ----------
    path : the file; of several images the last is taken.

    Returns
    -------
    The structure; it carries initial moments where the file does (in µB, Cartesian).

    Raises
    ------
    StructureError : no such file, not readable, or sites with partial occupancy.
    """
    atoms, moments = _read_file(path)
    return atoms if moments is None else with_moments(atoms, moments)


def _read_file(path: str | Path) -> tuple[Atoms, Array | None]:
    """Return a structure without moments, and those of the file as they are there, shape (N, 3) or (N,), µB."""
    file = Path(path)
    if file.is_dir():
        raise StructureError(f"'{path}' is a directory; name one structure file (screen takes directories)")
    if not file.is_file():
        raise StructureError(f"there is no structure file '{path}'; check the path")
    if not file.stat().st_size:
        raise StructureError(f"the structure file '{path}' is empty; give CIF, POSCAR, extxyz or another format of ASE")
    try:
        is_cif = file.suffix.lower() in (".cif", ".mcif")
        text = file.read_text(errors="replace") if is_cif else ""
        if "_atom_site_moment" in text:
            atoms = _read_magcif(text)
        elif file.suffix.lower() in (".yaml", ".yml"):
            from .lattice import read_unit_cell

            atoms = read_unit_cell(file)
        else:
            found = read(file, format="cif" if is_cif else None, index=":")
            if not found:
                raise ValueError("it holds no structure")
            if len(found) > 1:
                warnings.warn(f"'{path}' holds {len(found)} structures; the last one is taken", stacklevel=2)
            atoms = found[-1]
            if is_cif:
                _refuse_partial(atoms, file)
    except StructureError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StructureError(
            f"the structure file '{path}' cannot be read ({reason[:160]}); "
            "give CIF, POSCAR, extxyz or another format of ASE"
        ) from error
    if not isinstance(atoms, Atoms) or len(atoms) == 0:
        raise StructureError(f"the structure file '{path}' holds no atoms")
    clean = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    return clean, _file_moments(atoms)


def _file_moments(atoms: Atoms) -> Array | None:
    if atoms.has("initial_magmoms"):
        return np.asarray(atoms.arrays["initial_magmoms"], dtype=float)
    results = getattr(atoms.calc, "results", {}) if atoms.calc is not None else {}
    return np.asarray(results["magmoms"], dtype=float) if "magmoms" in results else None


def _refuse_partial(atoms: Atoms, file: Path) -> None:
    for site, kinds in (atoms.info.get("occupancy") or {}).items():
        if len(kinds) > 1 or abs(sum(kinds.values()) - 1.0) > 1e-3:
            species = " + ".join(f"{symbol} {share:g}" for symbol, share in kinds.items())
            raise StructureError(
                f"site {site} of '{file}' is partially occupied ({species}); give an ordered structure"
            )


def _read_magcif(text: str) -> Atoms:
    from pymatgen.io.cif import CifParser

    if not re.search(r"_atom_site_moment[._]crystalaxis_x", text):
        raise StructureError("its moments are not along the crystal axes; give them as _atom_site_moment.crystalaxis_x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = CifParser.from_str(text)
        structure = parser.parse_structures(primitive=False)[0]
        if any("No magnetic symmetry" in w for w in parser.warnings):
            # operations without time reversal were passed over
            plain = CifParser.from_str(text.replace("_atom_site_moment", "_moment"))
            if len(plain.parse_structures(primitive=False)[0]) != len(structure):
                raise StructureError(
                    "its symmetry operations are not those of a magnetic space group, so they say nothing about "
                    "moments; give _space_group_symop_magn_operation.xyz, or all atoms of the cell"
                )
    if not structure.is_ordered:
        site = next(s for s in structure if not s.is_ordered)
        raise StructureError(f"the site {site.species_string} is partially occupied; give an ordered structure")
    atoms = Atoms(
        symbols=[site.specie.symbol for site in structure],
        positions=structure.cart_coords,
        cell=structure.lattice.matrix,
        pbc=True,
    )
    moments = [site.properties.get("magmom") for site in structure]
    if any(m is not None for m in moments):
        atoms.set_initial_magnetic_moments([_global_moment(m) for m in moments])
    return atoms


def _global_moment(moment: Any) -> Array:
    if moment is None:
        return np.zeros(3)
    if hasattr(moment, "global_moment"):
        return np.asarray(moment.global_moment, dtype=float)
    return (
        np.broadcast_to(np.asarray(moment, dtype=float), (3,)) if np.ndim(moment) else np.array([0, 0, float(moment)])
    )


def check_structure(atoms: Atoms, calculator: SpinCalculator | None = None) -> Atoms:
    """Check that a structure can carry a bulk property and that its moments are within range.

    Parameters
    ----------
    atoms : the structure; it is not changed.
    calculator : its elements and typical moments bound what is accepted.

    Returns
    -------
    A clean copy without calculator and constraints.

    Raises
    ------
    StructureError : no cell, not periodic, positions that are not finite, overlapping atoms, unknown element.
    MomentError : moments of wrong shape, not finite, or far out of range.
    """
    if len(atoms) == 0:
        raise StructureError("the structure holds no atoms")
    if not np.all(np.isfinite(atoms.positions)):
        bad = int(np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))[0])
        raise StructureError(f"the position of atom {bad} is not a finite number; correct the structure file")
    if not np.all(np.isfinite(atoms.cell[:])):
        raise StructureError("the cell holds a number that is not finite; correct the structure file")
    if atoms.cell.rank < 3 or abs(np.linalg.det(atoms.cell[:])) < 1e-3:
        raise StructureError("the structure has no cell in three dimensions, which a bulk property needs; give one")
    if not all(atoms.pbc):
        raise StructureError("the structure is not periodic in all three directions; set pbc for a bulk property")
    if calculator is not None and calculator.elements is not None:
        for symbol in dict.fromkeys(atoms.get_chemical_symbols()):
            if symbol not in calculator.elements:
                raise StructureError(
                    f"the model does not know the element {symbol}; it knows {', '.join(calculator.elements)}"
                )
    _refuse_overlap(atoms)
    copy = bare(atoms)
    copy.info = {}
    if atoms.has("initial_magmoms"):
        copy = with_moments(copy, moments_of(atoms))
        _refuse_far_moments(copy, calculator)
    return copy


def closest_pair(atoms: Atoms) -> tuple[float, float, int, int]:
    """Return the two atoms that are nearest to each other for their size.

    Covalent radii are those of B. Cordero et al., Dalton Trans. 2832 (2008), which ASE holds.

    Returns
    -------
    Distance as a part of the sum of the covalent radii, distance in Å, and the indices of both atoms; infinite where
    no two atoms are within that sum.
    """
    i, j, d = neighbor_list("ijd", bare(atoms), covalent_radii[atoms.numbers])
    if not len(d):
        return np.inf, np.inf, 0, 0
    part = d / (covalent_radii[atoms.numbers[i]] + covalent_radii[atoms.numbers[j]])
    nearest = int(part.argmin())
    return float(part[nearest]), float(d[nearest]), int(i[nearest]), int(j[nearest])


def _refuse_overlap(atoms: Atoms) -> None:
    part, distance, a, b = closest_pair(atoms)
    if part < OVERLAP:
        symbols = atoms.get_chemical_symbols()
        raise StructureError(
            f"atoms {a} ({symbols[a]}) and {b} ({symbols[b]}) overlap: they are {distance:.2f} Å apart; "
            "correct the positions or the cell"
        )


def _refuse_far_moments(atoms: Atoms, calculator: SpinCalculator | None) -> None:
    typical = (calculator.default_moments if calculator is not None else None) or {}
    for k, (symbol, length) in enumerate(
        zip(atoms.get_chemical_symbols(), np.linalg.norm(moments_of(atoms), axis=1), strict=True)
    ):
        limit = min(3.0 * typical[symbol] + 1.0, LARGEST_MOMENT) if symbol in typical else LARGEST_MOMENT
        if length > limit:
            raise MomentError(
                f"the moment of atom {k} ({symbol}) is {length:g} µB, far outside the range of {limit:g} µB; "
                "give moments in µB"
            )


def parse_moments(text: str) -> dict[str, float]:
    """Read a table of moments such as ``Fe=2.2,Al=0``.

    Returns
    -------
    |m| in µB per element; negative turns the moments of that element round where no order is named.

    Raises
    ------
    OptionError : not of that form, or not an element.
    """
    table: dict[str, float] = {}
    for part in text.split(","):
        symbol, _, value = (x.strip() for x in part.partition("="))
        if symbol not in chemical_symbols[1:]:
            raise OptionError(f"'{part.strip()}' names no element; write moments as Fe=2.2,Al=0")
        try:
            table[symbol] = float(value)
        except ValueError:
            raise OptionError(f"'{part.strip()}' gives no number in µB; write moments as Fe=2.2,Al=0") from None
        if not np.isfinite(table[symbol]):
            raise OptionError(f"the moment of {symbol} is not a finite number")
    return table


def nearest_atoms(scaled: Array, numbers: NDArray[np.integer[Any]], cell: Atoms) -> tuple[Integers, Integers, Array]:
    """Return the atoms of a periodic cell that are nearest to points, each of the point's element.

    Parameters
    ----------
    scaled : the points in fractions of the cell, shape (N, 3).
    numbers : their atomic numbers, shape (N,).
    cell : the cell.

    Returns
    -------
    Index of the atom, shape (N,), its cell, shape (N, 3), and its distance in Å, infinite without that element.
    """
    apart = scaled[:, None] - cell.get_scaled_positions(wrap=False)[None]
    whole = np.rint(apart)
    distance = np.linalg.norm((apart - whole) @ cell.cell[:], axis=2)
    distance[numbers[:, None] != cell.numbers[None]] = np.inf
    atom, points = distance.argmin(axis=1), np.arange(len(scaled))
    return atom.astype(np.int64), whole[points, atom].astype(np.int64), distance[points, atom]


def _correspondence(found: Atoms, atoms: Atoms, path: str | Path) -> tuple[Integers, Array]:
    """Return the atom of a structure that each atom of a file is, and the rotation R of its frame, v → v R.

    Fractional positions decide, modulo lattice vectors; cells may be strained and atoms displaced a little.

    Raises
    ------
    StructureError : other atoms, or another cell.
    """
    reason = ""
    if len(found) != len(atoms):
        reason = f"it has {len(found)} atoms instead of {len(atoms)}"
    elif min(found.cell.volume, atoms.cell.volume) < 1e-3:
        reason = "one of them has no cell in three dimensions"
    else:
        deformation = np.linalg.solve(found.cell[:], atoms.cell[:])
        left, stretch, right = np.linalg.svd(deformation)
        if np.linalg.det(deformation) < 0 or np.abs(stretch - 1).max() > SAME_CELL:
            reason = "its cell vectors are others"
        else:
            atom, _, distance = nearest_atoms(found.get_scaled_positions(wrap=False), found.numbers, atoms)
            if distance.max() < SAME_ATOM and len(set(atom.tolist())) == len(atoms):
                return atom, left @ right
            far = int(distance.argmax())
            reason = f"its atom {far} ({found.symbols[far]}) is at no such atom of the structure"
    raise StructureError(
        f"the moments in '{path}' are of another crystal than the structure: {reason}; give a file with the same atoms "
        "in the same cell"
    )


def read_moments(path: str | Path, atoms: Atoms) -> Array:
    """Read the moments of a structure from a text file of rows, or from a structure file of the same crystal.

    Parameters
    ----------
    path : N rows of one number, or x y z, in µB, in the order and frame of the structure; or a structure file, whose
        atoms may stand in another order and whose cell may be turned, which turns its vectors with it. Single numbers
        are collinear along z of the structure.
    atoms : the structure, N atoms.

    Returns
    -------
    Moments in µB, shape (N, 3).

    Raises
    ------
    MomentError : unreadable, or of wrong length.
    StructureError : the file's structure is another.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError):
        return _moments_of_file(path, atoms)
    if not rows.size:
        raise MomentError(f"the file of the moments '{path}' is empty; give one or three numbers in µB for each atom")
    if len(rows) != len(atoms) or rows.shape[1] not in (1, 3):
        raise MomentError(
            f"'{path}' holds {len(rows)} x {rows.shape[1]} numbers, but {len(atoms)} atoms need {len(atoms)} rows of "
            "one or three; give a row for each atom"
        )
    return vectors(rows[:, 0] if rows.shape[1] == 1 else rows, len(atoms))


def _moments_of_file(path: str | Path, atoms: Atoms) -> Array:
    """Return the moments (N, 3) of a structure file on the atoms and in the frame of a structure, µB."""
    try:
        found, own = _read_file(path)
    except StructureError as error:
        raise MomentError(
            f"no moments can be read from '{path}'; give rows of numbers in µB, or a structure with moments"
        ) from error
    if own is None:
        raise MomentError(f"the structure in '{path}' carries no moments")
    place, rotation = _correspondence(found, atoms, path)
    moments = np.zeros((len(atoms), 3))
    # single numbers have no frame; vectors are axial, and the rotation is proper
    moments[place] = vectors(own, len(found)) if own.ndim == 1 else vectors(own, len(found)) @ rotation
    return moments


def start_structure(
    atoms: Atoms,
    calculator: SpinCalculator,
    *,
    order: str | None = None,
    table: Mapping[str, float] | None = None,
    moments: Array | None = None,
    guess: Order = "auto",
) -> Start:
    """Decide the moments that a calculation starts from, and say how.

    Parameters
    ----------
    atoms : the structure, with or without moments.
    calculator : gives typical |m| per element, and the energies that ``auto`` compares.
    order : ``fm``, ``afm``, ``auto``; None keeps moments that are given, and where there are none takes signs of the
        table, or `guess` where it has none.
    table : |m| in µB per element, over the calculator's own; a negative one turns the moments of its element round
        where no order is named.
    moments : moments in µB, shape (N, 3) or (N,), over those of the structure.
    guess : order where none is named.

    Raises
    ------
    MomentError : nothing says how large the moments are, or the cell holds no such order.
    OptionError : no such order, or an order together with explicit moments.
    """
    if order is not None and order not in ORDERS:
        raise OptionError(f"no magnetic order '{order}'{did_you_mean(order, ORDERS)}")
    atoms = check_structure(atoms, calculator)
    if moments is not None:
        if order is not None or table is not None:
            raise OptionError("moments from a file leave no room for an order or a table of moments; give one of them")
        return Start(check_structure(with_moments(atoms, moments), calculator), "moments from the file given", "given")
    if order is None and table is None and atoms.has("initial_magmoms"):
        return Start(atoms, "moments of the structure file", "given")
    signed = _lengths(atoms, calculator, table)
    if order is None and (signed < 0).any():
        start = check_structure(with_moments(atoms, signed), calculator)
        return Start(start, f"moments along z with {_spelled(atoms, signed)}", "given")
    lengths = np.abs(signed)
    source = _spelled(atoms, lengths)
    wanted = order or guess
    if not np.any(lengths > ZERO_MOMENT):
        return Start(with_moments(atoms, np.zeros((len(atoms), 3))), f"no element carries a moment ({source})", "nm")
    if wanted != "auto":
        return _guess(atoms, calculator, lengths, wanted, source)
    fm = _guess(atoms, calculator, lengths, "fm", source)
    try:
        afm = _guess(atoms, calculator, lengths, "afm", source)
    except MomentError:
        return replace(fm, origin=f"{fm.origin}; the cell holds no antiferromagnetic order")
    energies = [calculator.energy(s.atoms, moments_of(s.atoms)) / len(atoms) for s in (fm, afm)]
    lower = fm if energies[0] <= energies[1] else afm
    return replace(
        lower, origin=f"{lower.origin}, the lower of fm and afm by {1e3 * abs(energies[0] - energies[1]):.3g} meV/atom"
    )


def _lengths(atoms: Atoms, calculator: SpinCalculator, table: Mapping[str, float] | None) -> Array:
    """Return what table and calculator say of each atom, shape (N,), µB, with the signs of the table."""
    known = dict(calculator.default_moments or {})
    symbols = atoms.get_chemical_symbols()
    for symbol in table or {}:
        if symbol not in symbols:
            raise OptionError(f"moments are given for {symbol}, which the structure does not hold")
    known.update(table or {})
    missing = [s for s in dict.fromkeys(symbols) if s not in known]
    if missing:
        raise MomentError(
            f"nothing says how large the moment of {missing[0]} is; give it, for example --moments {missing[0]}=2.0"
        )
    return np.array([known[s] for s in symbols])


def _spelled(atoms: Atoms, values: Array) -> str:
    """Return the moment of each element as text."""
    known = dict(zip(atoms.get_chemical_symbols(), values, strict=True))
    return ", ".join(f"{symbol} {value:g}" for symbol, value in known.items()) + " µB"


def _guess(atoms: Atoms, calculator: SpinCalculator, lengths: Array, order: str, source: str) -> Start:
    signs = np.ones(len(atoms)) if order == "fm" else antiferromagnetic_signs(atoms, lengths)
    guessed = check_structure(with_moments(atoms, signs * lengths), calculator)
    return Start(guessed, f"{order} guess along z with {source}", order)


def antiferromagnetic_signs(atoms: Atoms, lengths: Array) -> Array:
    """Return the compensated collinear order with the most antiparallel near neighbours.

    Pairs of magnetic sites count with the weight (d_min / d)¹², so that the nearest shell decides and farther
    ones break ties; periodic images of a site count as parallel.

    Parameters
    ----------
    atoms : the structure.
    lengths : |m| in µB, shape (N,); sites where it has vanished are left out.

    Returns
    -------
    Signs, shape (N,), +1 on the first magnetic site and on sites without moment.

    Raises
    ------
    MomentError : the cell has no even number of magnetic sites, or too many to try.
    """
    magnetic = np.flatnonzero(np.abs(lengths) > SMALLEST_MOMENT)
    n = len(magnetic)
    if n < 2 or n % 2:
        raise MomentError(
            f"a cell with {n} magnetic site{'s' if n != 1 else ''} holds no antiferromagnetic order; "
            "give a cell with an even number, or moments"
        )
    sub = bare(atoms)[magnetic]
    reach = 1.0
    while not len(neighbor_list("i", sub, reach)):
        reach *= 1.3
    i, j, d = neighbor_list("ijd", sub, 2.0 * reach)
    weights = np.zeros((n, n))
    np.add.at(weights, (i, j), (d.min() / d) ** 12)
    if n <= ENUMERATED_SITES:
        flipped = itertools.combinations(range(1, n), n // 2)
        patterns = np.ones((comb(n - 1, n // 2), n))
        for row, chosen in enumerate(flipped):
            patterns[row, list(chosen)] = -1.0
    else:
        patterns = _coloured(weights)
    energies = np.einsum("pi,ij,pj->p", patterns, weights, patterns)
    signs = np.ones(len(atoms))
    signs[magnetic] = patterns[int(np.argmin(np.round(energies, 9)))]
    return signs


def _coloured(weights: Array) -> Array:
    """Two-colour the graph of nearest neighbours, shape (1, n)."""
    n = len(weights)
    near = weights > 0.3 * weights.max()
    colour = np.zeros(n)
    for root in range(n):
        if colour[root]:
            continue
        colour[root] = 1.0
        stack = [root]
        while stack:
            a = stack.pop()
            for b in np.flatnonzero(near[a]):
                if colour[b] == 0:
                    colour[b] = -colour[a]
                    stack.append(int(b))
                elif colour[b] == colour[a]:
                    raise MomentError(
                        f"the {n} magnetic sites have no order with all neighbours antiparallel; give the moments"
                    )
    if abs(colour.sum()) > 0:
        raise MomentError(f"the {n} magnetic sites have no compensated order of neighbours; give the moments")
    return colour[None]
