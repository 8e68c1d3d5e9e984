"""Sampling: what a system's plan is made of, written as data and expanded into a plan.

A sampling file (JSON) holds a recipe and families. A family is one lattice and what is done to it; each of its
parents is one distorted structure with the moments it is labelled at. Families are shuffled within themselves and
interleaved, so that every prefix of the plan samples all of them. `docs/labels.md` lists the keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_strain
from spglib import get_symmetry_dataset

from ..errors import LabelError
from .abinit import kpoint_mesh
from .plan import Job, Plan, Recipe, make_job

TEST_FRACTION, VALID_FRACTION = 0.15, 0.10
SAMPLING_KEYS = ("name", "seed", "recipe", "families")
RECIPE_KEYS = ("name", "engine", "carriers", "settings")
SETTING_KEYS = {
    "abinit": (
        *("noncollinear", "ecut", "pawecutdg", "ecutsm", "occopt", "tsmear", "k_spacing", "kmesh", "tolvrs", "nstep"),
        *("magcon_lambda", "ratsph", "ratsm", "valence", "constrained", "stress"),
    ),
    "gpaw-soc": ("xc", "cutoff", "width", "directions", "kmesh", "gamma"),
}
FAMILY_KEYS = ("tag", "lattice", "parents", "start", "delay", "train_only", "k_spacing")
STRUCTURE_KEYS = ("type", "species", "a", "moments")
TYPE_KEYS: dict[str, tuple[str, ...]] = {
    "bcc": (),
    "fcc": (),
    "b2": ("c",),
    "rocksalt": (),
    "l12": (),
    "fcc-body": (),
    "stack": ("c",),
    "cell": ("cell", "scaled_positions"),
}
"""Lattice types and the keys that they alone read."""


def read_sampling(path: str | Path) -> Plan:
    """Expand a sampling file into a plan.

    Parameters
    ----------
    path : path

    Returns
    -------
    Plan

    Raises
    ------
    LabelError
        The file is missing or cannot be understood; names the family.
    """
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise LabelError(f"cannot read the sampling file {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise LabelError(f"{str(path)!r} is not JSON ({error})") from None
    try:
        return expand(data)
    except LabelError as error:
        raise LabelError(f"{str(path)!r}: {error}") from None


def expand(data: Any) -> Plan:
    """Plan of a sampling: parents split, jobs shuffled within families and interleaved.

    `k_spacing` (1/Å, of the sampling or of a family) fixes each job's mesh; without it the engine takes its mesh from
    the recipe. A family's jobs are spread evenly over the plan from `start` (0) to `start` + `delay` (1), where 1 is
    the end of a family with neither; both leave the splits alone. Parents of families marked `train_only` (undistorted
    reference crystals) are always trained on; of the others 15 % go to the test split and 10 % to the validation
    split.

    Raises
    ------
    LabelError
        Names the family that cannot be understood.
    """
    _check_keys("the sampling", data, (*SAMPLING_KEYS, "k_spacing"), SAMPLING_KEYS)
    _check_keys("the recipe of the sampling", data["recipe"], RECIPE_KEYS, RECIPE_KEYS)
    settings = SETTING_KEYS.get(data["recipe"]["engine"])
    if settings is not None:
        _check_keys("the settings of the recipe", data["recipe"]["settings"], settings)
    recipe = Recipe(**{**data["recipe"], "carriers": tuple(data["recipe"]["carriers"])})
    name, seed, families = data["name"], data["seed"], data["families"]
    if not isinstance(data["recipe"]["carriers"], list):
        raise LabelError(f'the recipe\'s carriers are {data["recipe"]["carriers"]!r}: write them as ["Fe"]')
    if not isinstance(families, list):
        raise LabelError("the families of the sampling are no list: write them as [{...}, {...}]")
    for part in (data, *(family for family in families if isinstance(family, Mapping))):
        if not part.get("k_spacing", 1.0) > 0:
            raise LabelError(f"the sampling's k_spacing is {part['k_spacing']}; it must be above 0")
    rng = np.random.default_rng(seed)
    owed = {"test": 0.0, "valid": 0.0}
    keyed: list[tuple[float, int, Job]] = []
    for number, family in enumerate(families):
        _check_family(family, number, f"the sampling {name!r}")
        try:
            jobs = _family_jobs(family, recipe.carriers, rng, owed)
            start, delay = float(family.get("start", 0.0)), float(family.get("delay", 1.0))
            spacing = family.get("k_spacing", data.get("k_spacing"))
            if spacing is not None:
                mesh = anisotropy_mesh if recipe.engine == "gpaw-soc" else fixed_mesh
                jobs = [replace(job, settings=mesh(np.array(job.cell), spacing)) for job in jobs]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise LabelError(
                f"family {family['tag']!r} of the sampling {name!r} cannot be understood: {error}"
            ) from None
        order = rng.permutation(len(jobs))
        keyed += [(start + delay * (k + rng.random()) / len(jobs), number, jobs[i]) for k, i in enumerate(order)]
    keyed.sort(key=lambda entry: entry[:2])
    return Plan(name, recipe, tuple(job for _, _, job in keyed))


def _check_keys(where: str, entry: Any, allowed: Sequence[str], needed: Sequence[str] = ()) -> None:
    if not isinstance(entry, Mapping):
        raise LabelError(f"{where} is not a JSON object: write it as {{...}} with the keys {', '.join(allowed)}")
    unknown = sorted(set(entry) - set(allowed))
    if unknown:
        raise LabelError(f"{where} has the unknown key {unknown[0]!r}: use only {', '.join(allowed)}")
    missing = [key for key in needed if key not in entry]
    if missing:
        raise LabelError(f"{where} lacks {missing[0]!r}: it needs {', '.join(needed)}")


def _check_family(family: Any, number: int, sampling: str) -> None:
    """Refuse keys that nothing reads: a distortion whose name is wrong would leave the crystal undistorted."""
    _check_keys(f"family {number} of {sampling}", family, FAMILY_KEYS, ("tag", "lattice", "parents"))
    where = f"family {family['tag']!r} of {sampling}"
    if not isinstance(family["parents"], list):
        raise LabelError(f"the parents of {where} are no list: write them as [{{...}}, {{...}}]")
    distortions = ("scale", *STRAINS, "random", "move")
    anything = (*STRUCTURE_KEYS, "c", "cell", "scaled_positions", *distortions)
    _check_keys(f"the lattice of {where}", family["lattice"], anything)
    for index, parent in enumerate(family["parents"]):
        place = f"parent {index} of {where}"
        _check_keys(place, parent, anything)
        options = {**family["lattice"], **parent}
        kind = options.get("type")
        if kind not in TYPE_KEYS:
            raise LabelError(f"{place} has the lattice type {kind!r}: use one of {', '.join(TYPE_KEYS)}")
        needed = (*STRUCTURE_KEYS, *(TYPE_KEYS[kind] if kind != "b2" else ()))
        _check_keys(
            f"{place}, with its lattice of type {kind!r},", options, (*needed, *TYPE_KEYS[kind], *distortions), needed
        )


def _family_jobs(
    family: Mapping[str, Any], carriers: Sequence[str], rng: np.random.Generator, owed: dict[str, float]
) -> list[Job]:
    jobs: list[Job] = []
    parents = family["parents"]
    for index in rng.permutation(len(parents)):
        split = "train"
        if not family.get("train_only", False):
            owed["test"] += TEST_FRACTION
            owed["valid"] += VALID_FRACTION
            split = next((key for key, due in owed.items() if due >= 1), "train")
            if split != "train":
                owed[split] -= 1
        tag = f"{family['tag']}-{index}"
        options = {**family["lattice"], **parents[index]}
        atoms = build(options)
        for count, state in enumerate(options["moments"]):
            jobs.append(make_job(f"{tag}-m{count}", tag, split, atoms, site_moments(atoms, carriers, state)))
    return jobs


def fixed_mesh(cell: np.ndarray, spacing: float) -> dict[str, Any]:
    """Settings that pin a job's Γ-centred mesh."""
    return {"kmesh": list(kpoint_mesh(cell, spacing))}


def anisotropy_mesh(cell: np.ndarray, spacing: float) -> dict[str, Any]:
    """Mesh of an anisotropy job: even and half a step off Γ where that keeps the lattice's symmetry, else through Γ.

    Degenerate levels at points of high symmetry make meshes through Γ converge more slowly (docs/labels.md).

    Parameters
    ----------
    cell : array, shape=(3, 3)
        Å.
    spacing : float
        1/Å.

    Returns
    -------
    dict
        `kmesh` (3 int), `gamma` (bool).
    """
    mesh = np.array(kpoint_mesh(cell, spacing))
    even = mesh + mesh % 2
    rotations = get_symmetry_dataset((cell, [(0.0, 0.0, 0.0)], [1]), 1e-5).rotations
    offsets = np.array([(rotation.T @ (0.5 / even) - 0.5 / even) * even for rotation in rotations])
    if np.allclose(offsets, np.round(offsets), atol=1e-6):
        return {"kmesh": even.tolist(), "gamma": False}
    return {"kmesh": mesh.tolist(), "gamma": True}


def site_moments(atoms: Atoms, carriers: Sequence[str], state: float | Sequence[Any]) -> np.ndarray:
    """Moments of all atoms from those of the carriers.

    Parameters
    ----------
    atoms : Atoms
    carriers : sequence of str
    state : float or sequence
        One moment for all carriers, or one for each in their order; a number (along z) or three. µB.

    Returns
    -------
    array, shape=(N, 3)
        µB.
    """
    held = np.isin(list(atoms.symbols), carriers)
    values = [state] * int(held.sum()) if isinstance(state, (int, float)) else list(state)
    if not held.any() and np.any(np.asarray(state, dtype=float)):
        raise ValueError(f"a moment is asked for, but no carrier ({', '.join(carriers)}) is there")
    if len(values) != held.sum():
        raise ValueError(f"{len(values)} moments for {held.sum()} carriers")
    moments = np.zeros((len(atoms), 3))
    moments[held] = np.array([value if np.ndim(value) else (0.0, 0.0, value) for value in values]).reshape(-1, 3)
    return moments


def build(options: Mapping[str, Any]) -> Atoms:
    """Structure from a lattice and distortions, applied in the order of the parameters below.

    Parameters
    ----------
    options : mapping
        `type`, `species`, `a` (Å) and what the lattice needs besides (see `lattice`); `scale` of all lengths;
        strains `axial_ratio`, `tetragonal`, `orthorhombic`, `shear`, `trigonal`, `strain` (six components of
        Voigt, shears twice those of the tensor); `random` = (seed, strain, Å);
        `move` = (atom, (x, y, z) Å).

    Returns
    -------
    Atoms
    """
    atoms = lattice(options)
    if "scale" in options:
        atoms.set_cell(options["scale"] * atoms.cell.array, scale_atoms=True)
    for name, make in STRAINS.items():
        if name in options:
            atoms.set_cell(atoms.cell.array @ make(options[name]), scale_atoms=True)
    if "random" in options:
        _randomise(atoms, *options["random"])
    if "move" in options:
        index, vector = options["move"]
        atoms.positions[index] += vector
    return atoms


def lattice(options: Mapping[str, Any]) -> Atoms:
    """Undistorted lattice.

    Parameters
    ----------
    options : mapping
        `type` is one of: `bcc`, `fcc` (primitive, 1 atom), `b2` (2), `rocksalt` (primitive, 2), `l12` (4: corner,
        faces), `fcc-body` (4 along the body diagonal of a primitive fcc cell: DO3, B32), `stack` (body-centred
        layers along z, `c` between layers of one column, "-" for an empty layer), `cell` (`cell` and
        `scaled_positions` in units of `a`).

    Returns
    -------
    Atoms
    """
    kind, species, a = options["type"], list(options["species"]), float(options["a"])
    fcc = a / 2 * (np.ones((3, 3)) - np.eye(3))
    if kind == "stack":
        return _stack(species, a, float(options["c"]))
    if kind == "bcc":
        cell, places = a / 2 * (np.ones((3, 3)) - 2 * np.eye(3)), [(0.0, 0.0, 0.0)]
    elif kind == "fcc":
        cell, places = fcc, [(0.0, 0.0, 0.0)]
    elif kind == "b2":
        cell, places = np.diag([a, a, float(options.get("c", a))]), [(0.0, 0.0, 0.0), (0.5, 0.5, 0.5)]
    elif kind == "rocksalt":
        cell, places = fcc, [(0.0, 0.0, 0.0), (0.5, 0.5, 0.5)]
    elif kind == "l12":
        cell, places = a * np.eye(3), [(0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0)]
    elif kind == "fcc-body":
        cell, places = fcc, [(k / 4, k / 4, k / 4) for k in range(4)]
    elif kind == "cell":
        cell, places = a * np.array(options["cell"]), options["scaled_positions"]
    else:
        raise ValueError(f"unknown lattice type {kind!r}")
    return Atoms(species, cell=cell, scaled_positions=places, pbc=True)


def _stack(species: Sequence[str], a: float, c: float) -> Atoms:
    n = len(species)
    cell = np.diag([a, a, n * c / 2])
    if n % 2:
        cell[2, :2] = a / 2
    kept = [(s, (a / 2 * (k % 2), a / 2 * (k % 2), k * c / 2)) for k, s in enumerate(species) if s != "-"]
    return Atoms([s for s, _ in kept], positions=[place for _, place in kept], cell=cell, pbc=True)


def _axial_ratio(ratio: float) -> np.ndarray:
    """c/a multiplied by `ratio` at constant volume."""
    return np.diag([ratio ** (-1 / 3), ratio ** (-1 / 3), ratio ** (2 / 3)])


def _tetragonal(e: float) -> np.ndarray:
    """c multiplied by 1 + e at constant volume."""
    return np.diag([(1 + e) ** -0.5, (1 + e) ** -0.5, 1 + e])


def _orthorhombic(e: float) -> np.ndarray:
    """a multiplied and b divided by 1 + e."""
    return np.diag([1 + e, 1 / (1 + e), 1.0])


def _shear(e: float) -> np.ndarray:
    """The diagonals of the xy plane multiplied by 1 + e and 1 − e."""
    return np.array([(1.0, e, 0.0), (e, 1.0, 0.0), (0.0, 0.0, 1.0)])


def _trigonal(e: float) -> np.ndarray:
    """All three shears alike: [111] multiplied by 1 + 2e."""
    return np.eye(3) + e * (np.ones((3, 3)) - np.eye(3))


def _strain(components: Sequence[float]) -> np.ndarray:
    if np.shape(components) != (6,):
        raise ValueError(f"a strain of {np.size(components)} components; give xx, yy, zz, yz, xz, xy")
    return np.asarray(voigt_6_to_full_3x3_strain(components))


STRAINS: dict[str, Callable[[Any], np.ndarray]] = {
    "axial_ratio": _axial_ratio,
    "tetragonal": _tetragonal,
    "orthorhombic": _orthorhombic,
    "shear": _shear,
    "trigonal": _trigonal,
    "strain": _strain,
}


def _randomise(atoms: Atoms, seed: int, strain: float, move: float) -> None:
    """Random symmetric strain (components up to `strain`) and displacements of 0.3 to 1 times `move` Å, in place."""
    rng = np.random.default_rng(seed)
    matrix = rng.uniform(-strain, strain, (3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (matrix + matrix.T) / 2), scale_atoms=True)
    directions = rng.normal(size=(len(atoms), 3))
    lengths = rng.uniform(0.3, 1.0, (len(atoms), 1)) * move
    atoms.positions += lengths * directions / np.linalg.norm(directions, axis=1, keepdims=True)
