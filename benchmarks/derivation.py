"""Which frames give which value of own DFT: tables in `references/derivation.json` of each system."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mmace_props.errors import did_you_mean

from .errors import BenchmarkError
from .systems import System, read_json

AXES = ("x", "y", "z")


@dataclass(frozen=True)
class Crystal:
    """The volume at which orders of a crystal are compared, and how well.

    Parameters
    ----------
    a : lattice constant, Å.
    atoms : in the cube of that length.
    mesh_noise : largest that was seen between cells of different size, meV/atom, on meshes coarser than these
        (docs/labels.md, Meshes).
    """

    a: float
    atoms: int
    mesh_noise: float

    @property
    def volume(self) -> float:
        """Å³/atom."""
        return self.a**3 / self.atoms


@dataclass(frozen=True)
class Derivation:
    """Tables of one system.

    Parameters
    ----------
    crystals : by the name that begins the tag of a family.
    spirals : crystal and state whose energy is that of a flat spiral at a zone boundary, by quantity: layers of
        alternating sign are one.
    combinations : factors of other values, by quantity.
    labels : file, first label, and the one at the same positions that is taken off, by quantity.
    moments : frame and site whose moment it is, by quantity.
    anisotropy : group of directions, and the two Cartesian axes (x, y or z) whose energies are compared, the second
        taken off, by quantity.
    magnetoelastic : groups at one volume under small tetragonal strains, by quantity.
    sums : factors of the energies of whole cells, by frame, by quantity: formation energies of defects.
    """

    crystals: Mapping[str, Crystal] = field(default_factory=dict)
    spirals: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    combinations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    moments: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    anisotropy: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    magnetoelastic: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sums: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def read_derivation(system: System) -> Derivation:
    """Read the tables of a system.

    Raises
    ------
    BenchmarkError : the file is missing, has an entry of the wrong form, or names a quantity or crystal that there is
        not.
    """
    path = system.folder / "references" / "derivation.json"
    tables = read_json(path)

    def check(table: str, key: Any, known: Iterable[str]) -> None:
        if key not in known:
            raise BenchmarkError(f"'{key}' of '{table}' in '{path}' is unknown{did_you_mean(str(key), known)}")

    try:
        for name in tables:
            check("the tables", name, [f.name for f in fields(Derivation)])
        found = Derivation(
            {key: _crystal(**entry) for key, entry in tables.get("crystals", {}).items()},
            {key: _texts(entry, 2) for key, entry in tables.get("spirals", {}).items()},
            _factors(tables.get("combinations", {})),
            {key: _texts(entry, 3) for key, entry in tables.get("labels", {}).items()},
            {key: (str(frame), int(site)) for key, (frame, site) in tables.get("moments", {}).items()},
            {key: _pair_of_axes(entry) for key, entry in tables.get("anisotropy", {}).items()},
            {key: _texts(entry, len(entry)) for key, entry in tables.get("magnetoelastic", {}).items()},
            _factors(tables.get("sums", {})),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise BenchmarkError(f"'{path}' cannot be read ({error}); mend it") from error
    for table in ("spirals", "combinations", "labels", "moments", "anisotropy", "magnetoelastic", "sums"):
        for quantity in getattr(found, table):
            check(table, quantity, system.quantities)
    for crystal, _ in found.spirals.values():
        check("spirals", crystal, found.crystals)
    return found


def _crystal(a: float, atoms: int, mesh_noise: float) -> Crystal:
    if min(a, atoms, mesh_noise) <= 0:
        raise ValueError("a crystal needs a positive lattice constant, number of atoms and mesh noise")
    return Crystal(float(a), int(atoms), float(mesh_noise))


def _factors(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {key: {k: float(v) for k, v in entry.items()} for key, entry in table.items()}


def _pair_of_axes(entry: Any) -> tuple[Any, ...]:
    group, *axes = _texts(entry, 3)
    if not set(axes) <= set(AXES):
        raise ValueError(f"{entry!r} names axes that are none of {', '.join(AXES)}")
    return (group, *axes)


def _texts(entry: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(entry, list) or len(entry) != count or not all(isinstance(text, str) for text in entry):
        raise ValueError(f"{entry!r} is no list of {count} names")
    return tuple(entry)
