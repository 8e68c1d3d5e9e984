"""Configurations of the MLIP package (.cfg), with the columns of magnetic moment tensor potentials."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ase import Atoms

from ..errors import LabelError
from .importing import make_frame, stem_of, text_of, unknown_where_empty, with_parents

COLUMNS = {
    "forces": ("fx", "fy", "fz"),
    "moments": ("magmom_x", "magmom_y", "magmom_z"),
    "magnetic_forces": ("en_der_mx", "en_der_my", "en_der_mz"),
}
STRESS = ("xx", "yy", "zz", "yz", "xz", "xy")


def read_mlip(path: str | os.PathLike[str], types: Mapping[int, str]) -> list[Atoms]:
    """Read a .cfg file; signs are those of the MLIP package and not checked yet.

    `PlusStress` is taken as the force on the cell, -V σ in eV, and `en_der_m` as -dE/dm in eV/µB. Published files
    disagree on both: `mmace.data.importing.settle_signs` compares them with the energies.

    Parameters
    ----------
    path : path
    types : mapping int → str
        Element of each number in the column `type`.

    Returns
    -------
    list of Atoms
        Frames of the label contract. Atoms whose moment and derivative are exactly zero have no known derivative.

    Raises
    ------
    LabelError
        The file is not of this form, holds no moments, or has a type that `types` does not name.
    """
    blocks = list(_blocks(text_of(path), str(path)))
    if not blocks:
        raise LabelError(f"{path} holds no BEGIN_CFG: give a .cfg file of the MLIP package.")
    stem = stem_of(path)
    frames = [
        _frame(lines, types, f"configuration {index} of {path}", f"{stem}-{index}")
        for index, lines in enumerate(blocks)
    ]
    return with_parents(frames, stem)


def _blocks(text: str, where: str) -> Iterator[list[str]]:
    block: list[str] | None = None
    for line in text.splitlines():
        word = line.strip()
        if word == "BEGIN_CFG":
            if block is not None:
                raise LabelError(f"{where}: a configuration has no END_CFG: the file is not whole.")
            block = []
        elif word == "END_CFG":
            if block is None:
                raise LabelError(f"{where}: an END_CFG has no BEGIN_CFG: the file is not whole.")
            yield block
            block = None
        elif block is not None and word:
            block.append(word)
    if block is not None:
        raise LabelError(f"{where}: the last configuration has no END_CFG: the file is not whole.")


def _frame(lines: list[str], types: Mapping[int, str], where: str, name: str) -> Atoms:
    try:
        content = _content(lines, where)
        table: dict[str, np.ndarray] = content["table"]
        kinds = [int(kind) for kind in table["type"]]
    except (ValueError, IndexError, KeyError) as error:
        raise LabelError(f"{where} cannot be read ({error}): mend the file.") from None
    unknown = sorted(set(kinds) - set(types))
    if unknown:
        raise LabelError(f"{where} has the type {unknown[0]}: name its element, such as --types {unknown[0]}=Fe.")
    columns = {key: _vectors(table, names) for key, names in COLUMNS.items()}
    moments, derivatives = columns["moments"], columns["magnetic_forces"]
    if moments is None:
        raise LabelError(f"{where} has no columns magmom_x, magmom_y, magmom_z: a label needs moments.")
    positions = _vectors(table, ("cartes_x", "cartes_y", "cartes_z"))
    if positions is None:
        direct = _vectors(table, ("direct_x", "direct_y", "direct_z"))
        if direct is None:
            raise LabelError(f"{where} has no positions: mend the file.")
        positions = direct @ content["cell"]
    stress = content["stress"]
    if stress is not None:
        stress = -stress / abs(np.linalg.det(content["cell"]))
    features = content["features"]
    return make_frame(
        [types[kind] for kind in kinds],
        positions,
        content["cell"],
        True,
        moments,
        {"energy": content["energy"], "forces": columns["forces"], "stress": stress},
        None if derivatives is None else unknown_where_empty(derivatives, moments),
        {"name": name, "code": features.get("EFS_by", features.get("EF_by", "unknown"))},
        where,
    )


def _content(lines: list[str], where: str) -> dict[str, Any]:
    """Fields of one configuration."""
    found: dict[str, Any] = {"energy": None, "stress": None, "features": {}}
    size = 0
    k = 0
    while k < len(lines):
        field, *names = lines[k].split()
        k += 1
        if field == "Size":
            size = int(lines[k])
            k += 1
        elif field in ("Supercell", "SuperCell"):
            found["cell"] = np.array([[float(x) for x in line.split()] for line in lines[k : k + 3]])
            if found["cell"].shape != (3, 3):
                raise LabelError(f"{where}: Supercell needs three vectors: only periodic crystals can be imported.")
            k += 3
        elif field == "AtomData:":
            rows = [line.split() for line in lines[k : k + size]]
            if len(rows) < size or any(len(row) != len(names) for row in rows):
                raise LabelError(f"{where}: AtomData does not hold {size} rows of {len(names)} numbers: mend the file.")
            found["table"] = {name: np.array([float(row[column]) for row in rows]) for column, name in enumerate(names)}
            k += size
        elif field == "Energy":
            found["energy"] = float(lines[k])
            k += 1
        elif field == "PlusStress:":
            numbers = dict(zip(names, map(float, lines[k].split()), strict=True))
            found["stress"] = np.array([numbers[name] for name in STRESS])
            k += 1
        elif field == "Feature":
            found["features"][names[0]] = " ".join(names[1:])
        else:
            raise LabelError(f"{where} has the field {field}, which is not of this format: use files with PlusStress.")
    if "cell" not in found or "table" not in found:
        raise LabelError(f"{where} has no Supercell or no AtomData: only periodic crystals can be imported.")
    return found


def _vectors(table: Mapping[str, np.ndarray], names: tuple[str, str, str]) -> np.ndarray | None:
    if not all(name in table for name in names):
        return None
    return np.stack([table[name] for name in names], axis=1)
