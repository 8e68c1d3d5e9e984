"""MatPES, MP-ALOE and other files of that schema: JSON documents with a structure and results of VASP."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.units import GPa

from ..errors import LabelError
from .importing import as_name, make_frame, stem_of, text_of, voigt

MOMENTS = {"bader": ("bader_magmoms",), "ddec6": ("ddec6", "spin_moments")}


def read_matpes(path: str | os.PathLike[str], moments: str, functional: str | None = None) -> tuple[list[Atoms], int]:
    """Read a JSON file, gzipped or not: a list of documents, or documents by their id.

    The moments are those computed from the density. The `magmom` of the structure's sites are what a calculation was
    started from and are never read.

    Parameters
    ----------
    path : path
    moments : str
        `bader` for `bader_magmoms`, `ddec6` for `ddec6.spin_moments`.
    functional : str, optional
        Functional for documents that do not name theirs.

    Returns
    -------
    frames : list of Atoms
        Frames of the label contract; `recipe` names data set and functional, `parent` the crystal of origin.
    skipped : int
        Documents without these moments.

    Raises
    ------
    LabelError
        The file is not of this form, or no document has these moments.
    """
    if moments not in MOMENTS:
        raise LabelError(f"there are no moments {moments}: choose among {', '.join(MOMENTS)}.")
    text = text_of(path, gzip.open if str(path).endswith(".gz") else open)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise LabelError(f"{path} is not JSON ({error}): give a MatPES file.") from None
    if isinstance(content, Mapping):
        content = [content] if "energy" in content else list(content.values())
    if not isinstance(content, list) or not all(isinstance(entry, Mapping) for entry in content):
        raise LabelError(f"{path} does not hold a list of documents: give a MatPES file.")
    frames = []
    for index, entry in enumerate(content):
        values = _looked_up(entry, MOMENTS[moments])
        if values is None or (isinstance(values, list) and None in values):
            continue
        frames.append(_frame(entry, values, moments, functional, f"document {index} of {path}", stem_of(path), index))
    if not frames:
        raise LabelError(
            f"{path} has no document with {'.'.join(MOMENTS[moments])}: choose other moments, or another release."
        )
    return frames, len(content) - len(frames)


def _frame(
    entry: Mapping[str, Any],
    moments: Any,
    kind: str,
    functional: str | None,
    where: str,
    stem: str,
    index: int,
) -> Atoms:
    stress = entry.get("stress")
    functional = entry.get("functional") or functional
    if functional is None:
        raise LabelError(f"{where} does not name its functional: give --functional, such as r2SCAN.")
    name = entry.get("matpes_id") or entry.get("material_id") or f"{stem}-{index}"
    origin = _looked_up(entry, ("provenance", "original_mp_id"))
    symbols, positions, cell = _structure(entry, where)
    return make_frame(
        symbols,
        positions,
        cell,
        True,
        moments,
        {
            "energy": entry.get("energy"),
            "forces": entry.get("forces"),
            "stress": None if stress is None else -0.1 * GPa * voigt(stress, where),
        },
        None,
        {
            "name": as_name(name, stem),
            "parent": as_name(origin or name, stem),
            "code": "VASP",
            "recipe": f"{stem} {functional}, {kind} moments",
        },
        where,
    )


def _structure(entry: Mapping[str, Any], where: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Symbols, positions and cell of a serialized structure with one element on each site, or of plain arrays."""
    try:
        if "structure" not in entry:
            symbols = [chemical_symbols[number] for number in entry["atomic_numbers"]]
            return symbols, np.array(entry["cart_coords"], dtype=float), np.array(entry["cell"], dtype=float)
        cell = np.array(entry["structure"]["lattice"]["matrix"], dtype=float)
        sites = entry["structure"]["sites"]
        if any(len(site["species"]) != 1 or site["species"][0].get("occu", 1) != 1 for site in sites):
            raise LabelError(f"{where} has sites that are occupied in part: only ordered structures can be imported.")
        symbols = [site["species"][0]["element"] for site in sites]
        return symbols, np.array([site["abc"] for site in sites], dtype=float) @ cell, cell
    except (KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, LabelError):
            raise
        raise LabelError(f"{where} does not hold a structure ({error}): give a MatPES file.") from None


def _looked_up(entry: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = entry
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
