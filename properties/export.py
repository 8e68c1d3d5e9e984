"""Exchange datasets as input files of other programs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .conventions import CONVENTIONS, MMACE
from .errors import ConventionError, OptionError, OutputError, did_you_mean
from .files import write_whole

Array = NDArray[np.float64]

NEGLIGIBLE = 1e-6
"""Parameters below this, in meV, are zero."""
SHORTEST_IN_VAMPIRE = 0.1
"""Least `atomic-spin-moment` in µB that Vampire reads."""
BOUNDARY = 1e-6
"""Fractional coordinates closer to a whole number than this are that number."""


@dataclass(frozen=True)
class SpinTable:
    """A spin Hamiltonian in the project's own convention.

    Parameters
    ----------
    cell : lattice vectors, Å, shape (3, 3).
    elements : of the magnetic sites, n of them.
    scaled : their fractional positions, shape (n, 3).
    moments : µB, shape (n, 3).
    first, second : sites of each pair, both ij and ji, shape (P,).
    shift : cell of the second, shape (P, 3).
    tensor : J_ij in meV, shape (P, 3, 3).
    onsite : A_i in meV, traceless, shape (n, 3, 3).
    """

    cell: Array
    elements: list[str]
    scaled: Array
    moments: Array
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    shift: NDArray[np.int64]
    tensor: Array
    onsite: Array

    @property
    def isotropic(self) -> Array:
        """A third of the trace, meV, shape (P,)."""
        return np.asarray(np.trace(self.tensor, axis1=1, axis2=2) / 3)

    @property
    def dmi(self) -> Array:
        """Vectors of -Σ D·(e_i×e_j), meV, shape (P, 3)."""
        t = self.tensor
        return 0.5 * np.stack([t[:, 1, 2] - t[:, 2, 1], t[:, 2, 0] - t[:, 0, 2], t[:, 0, 1] - t[:, 1, 0]], axis=1)

    @property
    def anisotropic(self) -> Array:
        """Symmetric traceless parts, meV, shape (P, 3, 3)."""
        symmetric = (self.tensor + self.tensor.transpose(0, 2, 1)) / 2
        return np.asarray(symmetric - self.isotropic[:, None, None] * np.eye(3))

    def in_first_cell(self) -> tuple[Array, NDArray[np.int64]]:
        """Return fractional positions within [0, 1), shape (n, 3), and the cells of the second that go with them.

        Positions closer to a boundary than `BOUNDARY` lie on it, so that a program that folds them does not move them.
        """
        whole = np.floor(self.scaled + BOUNDARY).astype(np.int64)
        return np.maximum(self.scaled - whole, 0.0), self.shift + whole[self.second] - whole[self.first]

    def without_short(self, program: str, least: float, drop: bool) -> "SpinTable":
        """Return the table without the sites whose moments are shorter than a program takes.

        Raises
        ------
        ConventionError : there are such sites, and they are not to be dropped.
        """
        lengths = np.linalg.norm(self.moments, axis=1)
        keep = lengths >= least
        if keep.all():
            return self
        if not drop:
            sites = ", ".join(f"{k} ({self.elements[k]}, {lengths[k]:.3g} µB)" for k in np.flatnonzero(~keep))
            raise ConventionError(
                f"{program} takes no moments below {least:g} µB, here site {sites}; "
                "leave them and their pairs out with --drop"
            )
        pairs = keep[self.first] & keep[self.second]
        place = np.cumsum(keep) - 1
        return SpinTable(
            cell=self.cell,
            elements=[e for e, kept in zip(self.elements, keep, strict=True) if kept],
            scaled=self.scaled[keep],
            moments=self.moments[keep],
            first=place[self.first[pairs]],
            second=place[self.second[pairs]],
            shift=self.shift[pairs],
            tensor=self.tensor[pairs],
            onsite=self.onsite[keep],
        )

    def uniaxial(self, program: str, drop: bool) -> tuple[Array, Array]:
        """Return K in meV and n of -Σ K (n·e)² for every site, shapes (n,) and (n, 3).

        Raises
        ------
        ConventionError : a site's tensor is not of that form, and it is not to be dropped.
        """
        sizes, axes = np.zeros(len(self.onsite)), np.tile([0.0, 0.0, 1.0], (len(self.onsite), 1))
        for site, tensor in enumerate(self.onsite):
            values, vectors = np.linalg.eigh(tensor)
            if np.abs(values).max() <= NEGLIGIBLE:
                continue
            unique = 2 if values[1] - values[0] < values[2] - values[1] else 0
            others = np.delete(values, unique)
            if abs(others[1] - others[0]) > max(NEGLIGIBLE, 1e-6 * np.abs(values).max()):
                if not drop:
                    raise ConventionError(
                        f"the single-ion tensor of site {site} has three different values, which {program} does not "
                        "hold; leave it out with --drop"
                    )
                continue
            sizes[site], axes[site] = values[unique] - others.mean(), vectors[:, unique]
        return sizes, axes

    def refuse_anisotropic(self, program: str, drop: bool) -> None:
        """Refuse symmetric anisotropic exchange where a program does not hold it."""
        largest = float(np.abs(self.anisotropic).max(initial=0.0))
        if largest > NEGLIGIBLE and not drop:
            raise ConventionError(
                f"symmetric anisotropic exchange of up to {largest:.3g} meV has no place in the files for {program}; "
                "leave it out with --drop"
            )


def spin_table(dataset: xr.Dataset) -> SpinTable:
    """Read the spin Hamiltonian of an exchange dataset.

    Raises
    ------
    OptionError : the dataset is not one of exchange.
    """
    if dataset.attrs.get("property") != "exchange":
        raise OptionError("only datasets of 'exchange' can be exported; compute one with mmace-props exchange")
    sites = dataset["site"].values.tolist()
    number = {int(s): k for k, s in enumerate(sites)}
    return SpinTable(
        cell=np.array(json.loads(dataset.attrs["primitive_cell"])),
        elements=[str(e) for e in dataset["element"].values],
        scaled=np.asarray(dataset["scaled"].values, dtype=float),
        moments=dataset["moments"].values[:, None] * dataset["direction"].values,
        first=np.array([number[int(x)] for x in dataset["i"].values], dtype=np.int64),
        second=np.array([number[int(x)] for x in dataset["j"].values], dtype=np.int64),
        shift=np.asarray(dataset["shift"].values, dtype=np.int64),
        tensor=np.asarray(dataset["tensor"].values, dtype=float),
        onsite=np.asarray(dataset["single_ion"].values, dtype=float),
    )


def vampire(table: SpinTable, drop: bool) -> dict[str, str]:
    """Return ``vampire.UCF`` (full tensors) and ``vampire.mat``, joule."""
    target = CONVENTIONS["vampire"]
    table = table.without_short("Vampire", SHORTEST_IN_VAMPIRE, drop)
    lengths = np.linalg.norm(table.cell, axis=1)
    tensors = MMACE.convert(table.tensor, target)
    sizes, axes = table.uniaxial("Vampire", drop)
    constants = MMACE.convert(sizes, target, "onsite")
    lines = ["# Unit cell size (Angstrom):", _row(lengths), "# Unit cell lattice vectors:"]
    lines += [_row(v) for v in table.cell / lengths[:, None]]
    lines += ["# Atoms", f"{len(table.elements)} {len(table.elements)}"]
    positions, shifts = table.in_first_cell()
    lines += [f"{k} {_row(p)} {k} {k} {k}" for k, p in enumerate(positions)]
    lines += ["# Interactions", f"{len(table.first)} tensorial"]
    for k, (i, j) in enumerate(zip(table.first, table.second, strict=True)):
        a, b, c = shifts[k]
        lines.append(f"{k} {i} {j} {a} {b} {c} {_row(tensors[k].ravel())}")
    materials = [f"material:num-materials={len(table.elements)}"]
    for k, element in enumerate(table.elements):
        length = float(np.linalg.norm(table.moments[k]))
        prefix = f"material[{k + 1}]:"
        spin = ", ".join(f"{x:.10f}" for x in table.moments[k] / length)
        axis = ", ".join(f"{x:.10f}" for x in axes[k])
        materials += [
            f"{prefix}material-name={element}{k + 1}",
            f"{prefix}material-element={element}",
            f"{prefix}damping-constant=1.0",
            f"{prefix}atomic-spin-moment={length:.8f} !muB",
            f"{prefix}uniaxial-anisotropy-constant={constants[k]:.10e}",
            f"{prefix}uniaxial-anisotropy-direction={axis}",
            f"{prefix}initial-spin-direction={spin}",
            f"{prefix}unit-cell-category={k + 1}",
        ]
    return {"vampire.UCF": _text(lines), "vampire.mat": _text(materials)}


def uppasd(table: SpinTable, drop: bool) -> dict[str, str]:
    """Return ``posfile``, ``momfile``, ``jfile``, ``dmfile`` and the head of ``inpsd.dat``, mRy.

    Pairs are lattice translations (``maptype 2``), to which the program adds the difference of the positions that it
    has folded into the first cell.
    """
    target = CONVENTIONS["uppasd"]
    table.refuse_anisotropic("UppASD", drop)
    if np.abs(table.onsite).max(initial=0.0) > NEGLIGIBLE and not drop:
        raise ConventionError(
            "the single-ion anisotropy has no place in these files of UppASD; leave it out with --drop"
        )
    exchange, dmi = MMACE.convert(table.isotropic, target), MMACE.convert(table.dmi, target, "dmi")
    positions, shifts = table.in_first_cell()
    pairs = [f"{i + 1} {j + 1} {a} {b} {c}" for i, j, (a, b, c) in zip(table.first, table.second, shifts, strict=True)]
    files = {
        "posfile": [f"{k + 1} {k + 1} {_row(p)}" for k, p in enumerate(positions)],
        "momfile": [
            f"{k + 1} 1 {np.linalg.norm(m):.10f} {_row(m / np.linalg.norm(m))}" for k, m in enumerate(table.moments)
        ],
        "jfile": [f"{pair} {value:.12e}" for pair, value in zip(pairs, exchange, strict=True)],
    }
    chiral = bool(np.abs(table.dmi).max(initial=0.0) > NEGLIGIBLE)
    if chiral:
        files["dmfile"] = [f"{pair} {_row(value)}" for pair, value in zip(pairs, dmi, strict=True)]
    head = ["simid mmace", "ncell 12 12 12", "BC P P P", "cell " + _row(table.cell[0])]
    head += ["     " + _row(v) for v in table.cell[1:]]
    head += ["alat 1.0e-10", "Sym 0", "posfiletype D", "maptype 2"]
    head += ["posfile ./posfile", "momfile ./momfile", "exchange ./jfile"]
    head += ["dm ./dmfile"] if chiral else []
    files["inpsd.dat"] = [*head, "Initmag 3"]
    return {name: _text(lines) for name, lines in files.items()}


def spirit(table: SpinTable, drop: bool, cells: int | None = None) -> dict[str, str]:
    """Return ``spirit.cfg`` with every pair in one direction; meV.

    Parameters
    ----------
    table : the spin Hamiltonian.
    drop : leave out terms that the program does not hold, instead of refusing.
    cells : cells along each vector of a periodic box that pairs are folded into, since the program leaves out those
        that reach farther than across it; pairs of a site with itself, which are constant, have no place there. By
        default pairs stay as they are, in a box of eight cells, or as many as they reach across.
    """
    target = CONVENTIONS["spirit"]
    table.refuse_anisotropic("Spirit", drop)
    exchange, dmi = MMACE.convert(table.isotropic, target), MMACE.convert(table.dmi, target, "dmi")
    sizes, axes = table.uniaxial("Spirit", drop)
    pairs = ["i j da db dc Jij Dij Dijx Dijy Dijz"]
    for k, (i, j) in enumerate(zip(table.first, table.second, strict=True)):
        direction = (*table.shift[k].tolist(), int(j - i))
        if direction < (0, 0, 0, 0):
            continue
        strength = float(np.linalg.norm(dmi[k]))
        unit = dmi[k] / strength if strength > 0 else np.zeros(3)
        a, b, c = table.shift[k] if cells is None else (table.shift[k] + cells // 2) % cells - cells // 2
        if (i, a, b, c) == (j, 0, 0, 0):
            continue
        pairs.append(f"{i} {j} {a} {b} {c} {exchange[k]:.12e} {strength:.12e} {_row(unit)}")
    anisotropy = ["i K Kx Ky Kz"] + [
        f"{k} {s:.12e} {_row(a)}" for k, (s, a) in enumerate(zip(sizes, axes, strict=True))
    ]
    lengths = " ".join(f"{x:.10f}" for x in np.linalg.norm(table.moments, axis=1))
    lines = ["lattice_constant 1.0", "bravais_vectors", *(_row(v) for v in table.cell)]
    lines += ["basis", str(len(table.elements)), *(_row(p) for p in table.scaled)]
    size = max(8, int(np.abs(table.shift).max(initial=0))) if cells is None else cells
    lines += [f"n_basis_cells {size} {size} {size}", "boundary_conditions 1 1 1", "hamiltonian heisenberg_pairs"]
    lines += [f"mu_s {lengths}", "external_field_magnitude 0", "external_field_normal 0 0 1"]
    lines += ["ddi_method none", f"n_anisotropy {len(sizes)}", *anisotropy]
    lines += [f"n_interaction_pairs {len(pairs) - 1}", *pairs]
    return {"spirit.cfg": _text(lines)}


def tb2j(table: SpinTable, drop: bool) -> dict[str, str]:
    """Return ``exchange.out`` as TB2J writes it and magnopy reads it, meV; single-ion terms are no part of it."""
    if np.abs(table.onsite).max(initial=0.0) > NEGLIGIBLE and not drop:
        raise ConventionError("exchange.out of TB2J holds no single-ion tensor; leave it out with --drop")
    target = CONVENTIONS["tb2j"]
    exchange, dmi = MMACE.convert(table.isotropic, target), MMACE.convert(table.dmi, target, "dmi")
    anisotropic = MMACE.convert(table.anisotropic, target)
    counts: dict[str, int] = {}
    names = []
    for element in table.elements:
        counts[element] = counts.get(element, 0) + 1
        names.append(f"{element}{counts[element]}")
    positions = table.scaled @ table.cell
    lines = ["=" * 90, "Information:", "E = -sum_{i!=j} e_i.J_ij.e_j, unit vectors, both ij and ji, meV", "=" * 90]
    lines += ["Cell (Angstrom):", *(_row(v) for v in table.cell), "", "=" * 90, "Atoms:", "(magnetic atoms)"]
    lines.append("Atom_number x y z w_charge M(x) M(y) M(z)")
    lines += [f"{n} {_row(p)} 0.0 {_row(m)}" for n, p, m in zip(names, positions, table.moments, strict=True)]
    lines += [f"Total 0.0 {_row(table.moments.sum(axis=0))}", "", "=" * 90, "Exchange:"]
    lines.append("    i      j          R        J_iso(meV)          vector          distance(A)")
    for k, (i, j) in enumerate(zip(table.first, table.second, strict=True)):
        vector = (table.shift[k] + table.scaled[j] - table.scaled[i]) @ table.cell
        a, b, c = table.shift[k]
        where = f"({vector[0]:.8f}, {vector[1]:.8f}, {vector[2]:.8f}) {np.linalg.norm(vector):.8f}"
        lines += ["-" * 88, f"{names[i]} {names[j]} ({a}, {b}, {c}) {exchange[k]:.10f} {where}"]
        lines += [f"J_iso: {exchange[k]:.10f}", "DMI: ({:.10f} {:.10f} {:.10f})".format(*dmi[k]), "J_ani:"]
        rows = ["[" + " ".join(f"{x:.10f}" for x in row) + "]" for row in anisotropic[k]]
        lines += [f"[{rows[0]}", f" {rows[1]}", f" {rows[2]}]"]
    return {"exchange.out": _text(lines)}


PROGRAMS: dict[str, Callable[[SpinTable, bool], dict[str, str]]] = {
    "tb2j": tb2j,
    "magnopy": tb2j,
    "vampire": vampire,
    "uppasd": uppasd,
    "spirit": spirit,
}


def export(dataset: xr.Dataset, program: str, directory: str | Path, drop: bool = False) -> list[Path]:
    """Write the files of one program.

    Parameters
    ----------
    dataset : an exchange dataset.
    program : a key of `PROGRAMS`.
    directory : where to write; it must exist.
    drop : leave out terms that the program does not hold, instead of refusing.

    Returns
    -------
    The files written.

    Raises
    ------
    OptionError : no such program, or no exchange dataset.
    ConventionError : a term that the program does not hold.
    OutputError : the place cannot be written.
    """
    if program not in PROGRAMS:
        raise OptionError(f"there is no export to '{program}'{did_you_mean(program, PROGRAMS)}")
    files = PROGRAMS[program](spin_table(dataset), drop)
    folder = Path(directory)
    if not folder.is_dir():
        raise OutputError(f"the directory '{directory}' of the output does not exist; make it first")
    written = []
    for name, text in files.items():
        write_whole(folder / name, lambda place, text=text: Path(place).write_text(text))  # type: ignore[misc]
        written.append(folder / name)
    return written


def _row(values: Array) -> str:
    return " ".join(f"{float(x):.12g}" for x in values)


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
