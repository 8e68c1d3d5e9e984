"""Sampling plans of the shipped systems.

A family is one kind of structure (a lattice and what is done to it). Families are interleaved, and shuffled within
themselves, so that every prefix of a plan samples all of them; the costly ones are spread over the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from ase import Atoms

from .abinit import kpoint_mesh
from .plan import Job, Plan, Recipe, make_job

TEST_FRACTION, VALID_FRACTION = 0.15, 0.10
FE_AL_ABINIT = {
    "noncollinear": False,
    "ecut": 18,
    "pawecutdg": 36,
    "ecutsm": 0.5,
    "occopt": 6,
    "tsmear": 0.02,
    "k_spacing": 0.25,
    "tolvrs": 1e-6,
    "nstep": 80,
    "magcon_lambda": 0.1,
    "ratsph": {"Fe": 2.2, "Al": 2.2},
    "ratsm": 0.05,
}
NONCOLLINEAR = {"noncollinear": True, "tolvrs": 1e-5, "magcon_lambda": 0.01}
CR_N_ABINIT = {**FE_AL_ABINIT, "ecut": 28, "pawecutdg": 56, "ratsph": {"Cr": 2.36, "N": 1.5}}
GPAW_SOC = {"xc": "PBE", "cutoff": 400, "width": 0.1}
HIGH_SYMMETRY = [(0, 0, 1), (1, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]


@dataclass(frozen=True)
class Parent:
    """One structure with the moments it is labelled at.

    Attributes
    ----------
    name : str
    atoms : Atoms
    moments : list of array, shape=(N,) or (N, 3)
        µB.
    """

    name: str
    atoms: Atoms
    moments: list[np.ndarray]


@dataclass(frozen=True)
class Family:
    """Parents of one kind.

    Attributes
    ----------
    parents : list of Parent
    delay : float
        Above 1 moves the family's jobs towards the end of the plan.
    train_only : bool
        The undistorted reference crystals are always trained on.
    """

    parents: list[Parent]
    delay: float = 1.0
    train_only: bool = False


def assemble(name: str, recipe: Recipe, families: Sequence[Family], seed: int) -> Plan:
    """Plan of several families: parents split, jobs shuffled within families and interleaved.

    Parameters
    ----------
    name : str
    recipe : Recipe
    families : sequence of Family
    seed : int

    Returns
    -------
    Plan
    """
    rng = np.random.default_rng(seed)
    keyed: list[tuple[float, int, Job]] = []
    owed = {"test": 0.0, "valid": 0.0}
    for number, family in enumerate(families):
        jobs: list[Job] = []
        for index in rng.permutation(len(family.parents)):
            parent = family.parents[index]
            split = "train"
            if not family.train_only:
                owed["test"] += TEST_FRACTION
                owed["valid"] += VALID_FRACTION
                split = next((key for key, due in owed.items() if due >= 1), "train")
                if split != "train":
                    owed[split] -= 1
            for count, moments in enumerate(parent.moments):
                jobs.append(make_job(f"{parent.name}-m{count}", parent.name, split, parent.atoms, moments))
        order = rng.permutation(len(jobs))
        keyed += [(family.delay * (k + rng.random()) / len(jobs), number, jobs[i]) for k, i in enumerate(order)]
    keyed.sort(key=lambda entry: entry[:2])
    return Plan(name, recipe, tuple(job for _, _, job in keyed))


# Lattices. Lengths in Å.


def b2(a: float, first: str = "Fe", second: str = "Al") -> Atoms:
    """CsCl structure, 2 atoms."""
    return Atoms([first, second], cell=a * np.eye(3), scaled_positions=[(0, 0, 0), (0.5, 0.5, 0.5)], pbc=True)


def bcc_primitive(a: float, symbol: str) -> Atoms:
    """Body-centred cubic, 1 atom."""
    return Atoms(symbol, cell=a / 2 * (np.ones((3, 3)) - 2 * np.eye(3)), pbc=True)


def fcc_primitive(a: float, symbol: str) -> Atoms:
    """Face-centred cubic, 1 atom."""
    return Atoms(symbol, cell=a / 2 * (np.ones((3, 3)) - np.eye(3)), pbc=True)


def fcc_body(a: float, symbols: Sequence[str]) -> Atoms:
    """Four atoms along the body diagonal of a face-centred cubic cell: DO3 (Fe Fe Al Fe) and B32 (Fe Fe Al Al)."""
    cell = a / 2 * (np.ones((3, 3)) - np.eye(3))
    return Atoms(list(symbols), cell=cell, scaled_positions=[(k / 4, k / 4, k / 4) for k in range(4)], pbc=True)


def l12(a: float, corner: str, faces: str) -> Atoms:
    """Cu3Au structure, 4 atoms."""
    places = [(0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)]
    return Atoms([corner] + [faces] * 3, cell=a * np.eye(3), scaled_positions=places, pbc=True)


def stack(a: float, c: float, layers: Sequence[str]) -> Atoms:
    """Body-centred layers along z, one atom each, `c` between layers of the same column; "-" leaves a layer empty."""
    n = len(layers)
    cell = np.diag([a, a, n * c / 2])
    if n % 2:
        cell[2, :2] = a / 2
    atoms = [(s, (a / 2 * (k % 2), a / 2 * (k % 2), k * c / 2)) for k, s in enumerate(layers) if s != "-"]
    return Atoms([s for s, _ in atoms], positions=[p for _, p in atoms], cell=cell, pbc=True)


def strained(atoms: Atoms, strain: np.ndarray) -> Atoms:
    """Copy under a symmetric strain (3, 3), positions following."""
    out = atoms.copy()
    out.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return out


def tetragonal(e: float) -> np.ndarray:
    """Strain that changes c/a at constant volume: c grows by a factor 1 + e."""
    return np.diag([(1 + e) ** -0.5 - 1, (1 + e) ** -0.5 - 1, e])


def orthorhombic(e: float) -> np.ndarray:
    """Strain that makes a and b differ at constant volume."""
    return np.diag([e, 1 / (1 + e) - 1, 0.0])


def shear(e: float) -> np.ndarray:
    """Shear of the xy plane, the square's diagonals changing by factors 1 ± e."""
    return np.array([(0.0, e, 0.0), (e, 0.0, 0.0), (0.0, 0.0, 0.0)])


def trigonal(e: float) -> np.ndarray:
    """All three shears: [111] changes by a factor 1 + 2e."""
    return e * (np.ones((3, 3)) - np.eye(3))


def displaced(atoms: Atoms, index: int, vector: Sequence[float]) -> Atoms:
    """Copy with one atom moved by a vector (3,), Å."""
    out = atoms.copy()
    out.positions[index] += vector
    return out


def generic(atoms: Atoms, rng: np.random.Generator, strain: float, move: float) -> Atoms:
    """Copy with a random strain (components up to `strain`) and displacements up to `move` Å."""
    matrix = rng.uniform(-strain, strain, (3, 3))
    out = strained(atoms, (matrix + matrix.T) / 2)
    directions = rng.normal(size=(len(atoms), 3))
    lengths = rng.uniform(0.3, 1, (len(atoms), 1)) * move
    out.positions += lengths * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return out


# Fe-Al.

Distortion = Callable[[float], np.ndarray]


def _cycle(values: Sequence[float]) -> Callable[[Atoms, int], list[np.ndarray]]:
    """Moments for all Fe alike, taken in turn from a list."""
    turn = itertools.cycle(values)

    def moments(atoms: Atoms, count: int) -> list[np.ndarray]:
        carriers = np.array(atoms.symbols) == "Fe"
        return [np.where(carriers, next(turn), 0.0) for _ in range(count)]

    return moments


def _sited(atoms: Atoms, *sets: Sequence[float]) -> list[np.ndarray]:
    """Moments given for the Fe atoms in their order."""
    out = []
    for values in sets:
        moments = np.zeros(len(atoms))
        moments[np.array(atoms.symbols) == "Fe"] = values
        out.append(moments)
    return out


def fe_al_collinear() -> Plan:
    """Collinear Fe-Al configurations: B2 FeAl and bcc Fe under every strain first, then the other orderings."""
    rng = np.random.default_rng(20)
    feal = _cycle([0.7, 1.1, 0.4, 1.6, 0.9, 0.0, 0.55, 2.2, 0.8, 1.3, 0.2, 2.7])
    iron = _cycle([2.2, 1.6, 2.6, 1.0, 2.35, 0.3, 1.9, 2.8, 0.0])
    families: list[Family] = []

    def strains(
        tag: str, cell: Atoms, distortion: Distortion, cases: list[tuple[float, float]], moments: Callable, count: int
    ) -> Family:
        parents = []
        for k, (scale, e) in enumerate(cases):
            atoms = cell.copy()
            atoms.set_cell(scale * cell.cell.array, scale_atoms=True)
            atoms = strained(atoms, distortion(e))
            parents.append(Parent(f"{tag}-{k}", atoms, moments(atoms, count)))
        return Family(parents)

    b2_cell, bcc = b2(2.87), bcc_primitive(2.83, "Fe")
    tetra = [(1, -0.06), (1, -0.03), (1, 0.03), (1, 0.06), (1, 0.08), (0.97, -0.045), (0.97, 0.02), (0.97, 0.06)]
    tetra += [(1.03, -0.06), (1.03, -0.02), (1.03, 0.045), (1.015, 0.015), (0.985, -0.015)]
    families.append(strains("FeAl-B2-tetragonal", b2_cell, tetragonal, tetra, feal, 2))
    ortho = [(1, 0.02), (1, 0.04), (1, 0.06), (0.975, 0.03), (0.985, 0.05), (1.02, 0.045), (1.035, 0.025)]
    families.append(strains("FeAl-B2-orthorhombic", b2_cell, orthorhombic, ortho, feal, 2))
    sheared = [(1, 0.015), (1, 0.03), (1, 0.05), (0.975, 0.02), (0.98, 0.045), (1.02, 0.04), (1.035, 0.025)]
    families.append(strains("FeAl-B2-shear", b2_cell, shear, sheared, feal, 2))
    trig = [(1, -0.04), (1, -0.02), (1, 0.02), (1, 0.04), (0.975, 0.03), (0.98, -0.03), (1.025, 0.025), (1.03, -0.03)]
    families.append(strains("FeAl-B2-trigonal", b2_cell, trigonal, trig, feal, 2))

    moves = [
        (d * np.array(v) / np.linalg.norm(v)) for v in ((0, 0, 1), (1, 1, 1), (1, 1, 0)) for d in (0.06, 0.11, 0.15)
    ]
    parents = []
    for k, move in enumerate(moves):
        cell = strained(b2(2.87 * (1, 0.97, 1.025)[k % 3]), tetragonal((0.0, 0.03, -0.02)[k // 3]))
        atoms = displaced(cell, 1, move)
        parents.append(Parent(f"FeAl-B2-displaced-{k}", atoms, feal(atoms, 2)))
    families.append(Family(parents, delay=1.05))

    parents = []
    for k, scale in enumerate((0.92, 0.95, 0.975, 1.0, 1.02, 1.045, 1.075)):
        atoms = bcc_primitive(2.83 * scale, "Fe")
        parents.append(Parent(f"Fe-bcc-volume-{k}", atoms, iron(atoms, 4)))
    families.append(Family(parents, train_only=True))
    bain = [(1, 0.03), (1, 0.06), (1, -0.04), (0.98, -0.07), (1.02, 0.1), (1, 0.16), (1.01, 0.22), (0.99, 0.04)]
    families.append(strains("Fe-bcc-tetragonal", bcc, tetragonal, bain, iron, 3))
    families.append(
        strains("Fe-bcc-trigonal", bcc, trigonal, [(1, 0.03), (1, -0.03), (0.98, 0.05), (1.02, 0.04)], iron, 2)
    )
    families.append(strains("Fe-bcc-shear", bcc, shear, [(1, 0.03), (1, 0.055), (0.975, 0.04), (1.02, 0.02)], iron, 2))
    families.append(strains("Fe-bcc-orthorhombic", bcc, orthorhombic, [(1, 0.03), (0.98, 0.05)], iron, 2))

    ferri = [(2.4, 1.6), (2.2, 0.0), (2.3, -1.2), (2.0, 2.6), (1.2, -1.2), (2.5, 0.8), (1.8, -0.6), (2.2, -2.2)]
    ferri += [(2.7, -2.0), (0.6, -0.6), (1.0, 2.2), (1.6, -1.6)]
    parents = []
    for k in range(6):
        cell = b2((2.83, 2.76, 2.9, 2.83, 2.86, 2.8)[k], "Fe", "Fe")
        atoms = strained(cell, tetragonal((0.0, 0.0, 0.0, 0.04, -0.05, 0.08)[k]))
        parents.append(Parent(f"Fe-bcc-ferri-{k}", atoms, _sited(atoms, ferri[2 * k], ferri[2 * k + 1])))
    families.append(Family(parents))

    parents = []
    for k, (move, pair) in enumerate(
        [((0, 0, 0.08), (2.2, 2.2)), ((0, 0, 0.15), (1.8, 1.8)), ((0.06,) * 3, (2.4, 2.4)), ((0.085,) * 3, (2.0, -2.0)),
         ((0.07, 0.07, 0), (2.2, 1.5)), ((0.1, 0.1, 0), (2.6, 2.6))]
    ):  # fmt: skip
        atoms = displaced(b2((2.83, 2.88, 2.79)[k % 3], "Fe", "Fe"), 1, move)
        parents.append(Parent(f"Fe-bcc-displaced-{k}", atoms, _sited(atoms, pair)))
    families.append(Family(parents, delay=1.1))

    # Orderings beyond one conventional cell: bcc N point, double layers, and wave vectors of the Fe lattice of FeAl.
    parents = []
    for k, (scale, pairs) in enumerate(
        [(1.0, [(2.2, -2.2), (2.2, 1.2)]), (0.97, [(1.4, -1.4), (2.0, -1.0)]), (1.025, [(2.4, -2.4), (2.4, 0.4)])]
    ):
        a = 2.83 * scale
        cell = np.array([(a, 0, 0), (0, a, -a), (a / 2, a / 2, a / 2)])
        atoms = Atoms("Fe2", cell=cell, scaled_positions=[(0, 0, 0), (0, 0.5, 0)], pbc=True)
        atoms.positions[1] = (a / 2, a / 2, -a / 2)
        parents.append(Parent(f"Fe-bcc-N-{k}", atoms, _sited(atoms, *pairs)))
    families.append(Family(parents, delay=1.1))
    parents = []
    for k, (a, c, sets) in enumerate(
        [
            (2.83, 2.83, [(2.2, 2.2, -2.2, -2.2)]),
            (2.88, 2.88, [(2.3, -2.3, 2.3, 1.8)]),
            (2.8, 2.9, [(2.0, 2.4, 2.0, -1.2)]),
        ]
    ):
        atoms = stack(a, c, ["Fe"] * 4)
        parents.append(Parent(f"Fe-bcc-layers-{k}", atoms, _sited(atoms, *sets)))
    families.append(Family(parents, delay=1.25))
    parents = []
    for k, (a, c, sets) in enumerate(
        [(2.87, 2.87, [(0.7, -0.7), (1.2, 0.3)]), (2.95, 2.95, [(1.0, -1.0), (0.8, 1.8)]),
         (2.8, 2.8, [(0.6, -0.6), (1.6, -0.5)]), (2.84, 2.98, [(0.8, -0.8), (0.8, 0.0)])]
    ):  # fmt: skip
        atoms = stack(a, c, ["Fe", "Al", "Fe", "Al"])
        parents.append(Parent(f"FeAl-B2-doubled-{k}", atoms, _sited(atoms, *sets)))
    families.append(Family(parents, delay=1.1))
    parents = []
    for k, (a, sets) in enumerate([(2.87, [(0.7, -0.7), (1.3, 0.4)]), (2.94, [(1.1, -1.1), (0.3, 0.9)])]):
        cell = np.array([(a, a, 0), (-a, a, 0), (0, 0, a)])
        places = [(0, 0, 0), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]
        atoms = Atoms("Fe2Al2", cell=cell, scaled_positions=places, pbc=True)
        parents.append(Parent(f"FeAl-B2-diagonal-{k}", atoms, _sited(atoms, *sets)))
    families.append(Family(parents, delay=1.15))

    # Other orderings.
    parents = []
    do3 = [(2.4, 1.9, 1.9), (2.6, 1.2, 1.2), (2.3, -1.5, -1.5), (1.8, 2.3, 2.3), (2.2, 2.0, -2.0), (2.5, 1.6, 1.6),
           (0.8, 0.6, 0.6), (2.4, 1.9, 1.0), (2.0, 1.8, 1.8), (2.7, 2.4, 2.4), (1.4, 1.4, 1.4), (2.4, 0.4, 0.4)]  # fmt: skip
    cases = [(5.74, np.zeros((3, 3))), (5.6, np.zeros((3, 3))), (5.88, np.zeros((3, 3))), (6.0, np.zeros((3, 3)))]
    cases += [(5.74, tetragonal(0.04)), (5.74, tetragonal(-0.05)), (5.7, trigonal(0.03)), (5.8, trigonal(-0.025))]
    for k, (a, strain) in enumerate(cases):
        atoms = strained(fcc_body(a, ["Fe", "Fe", "Al", "Fe"]), strain)
        parents.append(Parent(f"Fe3Al-DO3-{k}", atoms, _sited(atoms, do3[k], do3[(k + 5) % 12])))
    families.append(Family(parents))
    parents = []
    for k, (a, strain) in enumerate([(5.78, np.zeros((3, 3))), (5.65, np.zeros((3, 3))), (5.9, tetragonal(0.04))]):
        atoms = strained(fcc_body(a, ["Fe", "Fe", "Al", "Al"]), strain)
        parents.append(
            Parent(f"FeAl-B32-{k}", atoms, _sited(atoms, (1.8, 1.8), ((1.2, 1.2), (1.6, -1.6), (2.3, 1.0))[k]))
        )
    families.append(Family(parents, delay=1.05))
    parents = []
    for k, (a, e, sets) in enumerate(
        [(3.65, 0, [(2.3,) * 3, (1.6,) * 3]), (3.55, 0, [(1.8,) * 3, (2.0, -2.0, -2.0)]), (3.75, 0, [(2.5,) * 3]),
         (3.65, 0.05, [(2.2, 2.0, 2.0), (1.0,) * 3])]
    ):  # fmt: skip
        atoms = strained(l12(a, "Al", "Fe"), tetragonal(e))
        parents.append(Parent(f"Fe3Al-L12-{k}", atoms, _sited(atoms, *sets)))
    for k, (a, e, sets) in enumerate(
        [(3.78, 0, [(0.5,), (1.5,)]), (3.68, 0, [(0.0,)]), (3.9, 0, [(2.0,)]), (3.78, 0.05, [(1.0,)])]
    ):
        atoms = strained(l12(a, "Fe", "Al"), tetragonal(e))
        parents.append(Parent(f"FeAl3-L12-{k}", atoms, _sited(atoms, *sets)))
    families.append(Family(parents, delay=1.05))
    parents = []
    for k, (volume, ratio) in enumerate(
        [(1, 1.15), (1.02, 1.28), (0.98, 1.41), (1.03, 1.5), (1.05, 1.38), (1.0, 1.34)]
    ):
        atoms = strained(
            b2(2.87 * volume), np.diag([ratio ** (-1 / 3), ratio ** (-1 / 3), ratio ** (2 / 3)]) - np.eye(3)
        )
        parents.append(Parent(f"FeAl-L10-{k}", atoms, feal(atoms, 2)))
    families.append(Family(parents))
    layered = {
        "Fe2Al2-layers": ["Fe", "Fe", "Al", "Al"],
        "Fe3Al-layers": ["Fe", "Fe", "Fe", "Al"],
        "FeAl3-layers": ["Fe", "Al", "Al", "Al"],
        "Fe2Al-vacancy": ["Fe", "Al", "Fe", "-"],
        "FeAl2-vacancy": ["Fe", "Al", "-", "Al"],
        "Fe2Al-layers": ["Fe", "Fe", "Al"],
        "FeAl2-layers": ["Fe", "Al", "Al"],
    }
    choices = {
        "Fe2Al2-layers": [(1.9, 1.9), (2.2, 1.2), (1.4, -1.4), (2.5, 2.5), (0.6, 0.6), (2.1, 1.7)],
        "Fe3Al-layers": [(2.2, 2.4, 2.2), (1.8, 2.6, 1.8), (2.2, 2.0, -2.2), (1.2, 1.2, 1.2), (2.4, 1.4, 2.4), (2.0, -2.0, 2.0)],
        "FeAl3-layers": [(0.6,), (1.4,), (2.1,), (0.0,), (0.3,), (1.8,)],
        "Fe2Al-vacancy": [(2.0, 2.0), (1.4, 0.8), (2.5, 1.5), (1.6, -1.6), (2.3, 2.3), (0.7, 0.7)],
        "FeAl2-vacancy": [(0.8,), (1.6,), (2.3,), (0.3,), (1.2,), (2.0,)],
        "Fe2Al-layers": [(2.1, 2.1), (1.7, 2.3), (1.2, -1.2), (2.5, 2.5), (2.2, 0.8), (1.5, 1.5)],
        "FeAl2-layers": [(0.5,), (1.2,), (2.0,), (0.0,), (0.8,), (1.6,)],
    }  # fmt: skip
    for tag, layers in layered.items():
        parents = []
        for k, (a, c) in enumerate([(2.87, 2.87), (2.8, 2.95), (2.95, 2.86)]):
            atoms = stack(a, c, layers)
            picks = choices[tag][2 * k : 2 * k + 2]
            parents.append(Parent(f"{tag}-{k}", atoms, _sited(atoms, *picks)))
        families.append(Family(parents, delay=1.2 if len(layers) == 4 else 1.05))

    # Pure elements away from bcc Fe.
    parents = [
        Parent(f"Al-fcc-{k}", strained(fcc_primitive(a, "Al"), s), [np.zeros(1)])
        for k, (a, s) in enumerate(
            [(4.04, tetragonal(0)), (3.87, tetragonal(0)), (4.2, tetragonal(0)), (3.95, tetragonal(0)), (4.04, tetragonal(0.05)),
             (4.04, tetragonal(-0.05)), (4.04, trigonal(0.03)), (4.1, shear(0.04)), (4.04, tetragonal(-0.2))]
        )
    ]  # fmt: skip
    families.append(Family(parents))
    parents = []
    for k, a in enumerate((3.4, 3.48, 3.56, 3.64, 3.75)):
        atoms = fcc_primitive(a, "Fe")
        parents.append(Parent(f"Fe-fcc-{k}", atoms, [np.array([m]) for m in ((0.0, 1.2, 2.5), (0.9, 2.0, 2.7))[k % 2]]))
    for k, (a, ratio, pair) in enumerate(
        [(2.46, 1.42, (1.2, -1.2)), (2.52, 1.41, (1.9, -1.9)), (2.55, 1.45, (2.3, -1.4)), (2.5, 1.3, (2.0, 1.0))]
    ):
        atoms = Atoms("Fe2", cell=np.diag([a, a, a * ratio]), scaled_positions=[(0, 0, 0), (0.5, 0.5, 0.5)], pbc=True)
        parents.append(Parent(f"Fe-fcc-AFM-{k}", atoms, _sited(atoms, pair)))
    families.append(Family(parents))

    # No symmetry at all: few, late, and worth the most per label.
    parents = []
    for k in range(14):
        atoms = generic(b2(2.87 * rng.uniform(0.965, 1.035)), rng, 0.05, 0.12)
        parents.append(Parent(f"FeAl-random-{k}", atoms, feal(atoms, 1)))
    for k in range(6):
        atoms = generic(b2(2.83 * rng.uniform(0.97, 1.03), "Fe", "Fe"), rng, 0.045, 0.1)
        pair = [(2.2, 2.3), (2.4, 1.7), (2.0, -1.8), (1.2, 1.4), (2.6, 2.5), (2.2, 0.6)][k]
        parents.append(Parent(f"Fe-random-{k}", atoms, _sited(atoms, pair)))
    families.append(Family(parents, delay=1.3))

    recipe = Recipe("abinit-pbe-18Ha-collinear", "abinit", ("Fe",), FE_AL_ABINIT)
    return assemble("FeAl-collinear", recipe, families, seed=1)


SOC_SPACING = 0.14


def soc_mesh(atoms: Atoms) -> list[int]:
    """Mesh for an anisotropy job: 16³ for B2 FeAl at its lattice constant, in proportion elsewhere."""
    return list(kpoint_mesh(atoms.cell.array, SOC_SPACING))


def soc_directions(count: int = 6) -> list[tuple[float, ...]]:
    """Seven directions of high symmetry and `count` general ones, no two equivalent in an orthorhombic crystal."""
    k = np.arange(count)
    height = (k + 0.5) / count * 0.9 + 0.05
    turn = (k * (np.sqrt(5) - 1) / 2 + 0.13) % 1 * (np.pi / 2)
    ring = np.sqrt(1 - height**2)
    general = np.round(np.stack([ring * np.cos(turn), ring * np.sin(turn), height], axis=1), 6)
    return [tuple(float(x) for x in n) for n in (*HIGH_SYMMETRY, *general)]


def fe_al_anisotropy() -> Plan:
    """Strained B2 FeAl, layered Fe/Al cells and strained bcc Fe, each with its own self-consistent moments."""
    rng = np.random.default_rng(31)
    families: list[Family] = []

    def add(tag: str, structures: Sequence[Atoms], start: dict[str, float], delay: float = 1.0) -> None:
        parents = []
        for k, atoms in enumerate(structures):
            moments = np.array([start.get(symbol, 0.0) for symbol in atoms.symbols])
            parents.append(Parent(f"soc-{tag}-{k}", atoms, [moments]))
        families.append(Family(parents, delay))

    def grid(cell: Atoms, distortion: Distortion, cases: Sequence[tuple[float, float]]) -> list[Atoms]:
        out = []
        for scale, e in cases:
            atoms = cell.copy()
            atoms.set_cell(scale * cell.cell.array, scale_atoms=True)
            out.append(strained(atoms, distortion(e)))
        return out

    b2_cell, bcc = b2(2.87), bcc_primitive(2.83, "Fe")
    soft, strong = {"Fe": 0.9}, {"Fe": 2.2}
    tetra = [(1, 0.05), (1, -0.05), (1, 0.02), (1, -0.025), (1, 0.08), (1.02, 0.06), (1.02, -0.06), (1.02, 0.03)]
    tetra += [(1.03, -0.03), (1.035, 0.045), (0.99, 0.04), (0.985, 0.065), (0.99, -0.04), (1.01, 0.1), (1.015, -0.08)]
    add("FeAl-B2-tetragonal", grid(b2_cell, tetragonal, tetra), soft)
    ortho = [(1, 0.025), (1, 0.045), (1, 0.065), (1.02, 0.035), (1.03, 0.055), (0.99, 0.05), (1.01, 0.015)]
    add("FeAl-B2-orthorhombic", grid(b2_cell, orthorhombic, ortho), soft)
    sheared = [(1, 0.02), (1, 0.04), (1.02, 0.03), (1.03, 0.05), (0.99, 0.035)]
    add("FeAl-B2-shear", grid(b2_cell, shear, sheared), soft)
    add("FeAl-B2-trigonal", grid(b2_cell, trigonal, [(1, 0.025), (1, -0.025), (1.02, 0.04), (1.02, -0.035)]), soft)
    mixed = [(0.02, 0.05), (-0.03, 0.04), (0.05, 0.03), (0.035, -0.02)]
    both = [
        strained(strained(b2(a), tetragonal(t)), orthorhombic(o))
        for (t, o), a in zip(mixed, (2.87, 2.9, 2.93, 2.86), strict=True)
    ]
    add("FeAl-B2-mixed", both, soft, 1.1)
    ratios = [(2.87, 1.2), (2.9, 1.3), (2.87, 1.41), (2.92, 1.46)]
    cube_root = [np.array([r ** (-1 / 3), r ** (-1 / 3), r ** (2 / 3)]) for _, r in ratios]
    add(
        "FeAl-L10",
        [strained(b2(a), np.diag(f) - np.eye(3)) for (a, _), f in zip(ratios, cube_root, strict=True)],
        {"Fe": 1.6},
    )
    for tag, layers in {
        "Fe2Al2-layers": ["Fe", "Fe", "Al", "Al"],
        "Fe3Al-layers": ["Fe", "Fe", "Fe", "Al"],
        "FeAl3-layers": ["Fe", "Al", "Al", "Al"],
        "Fe2Al-layers": ["Fe", "Fe", "Al"],
        "FeAl2-layers": ["Fe", "Al", "Al"],
    }.items():
        add(
            tag,
            [stack(a, c, layers) for a, c in ((2.87, 2.87), (2.82, 2.96), (2.94, 2.82))[: 2 + (len(layers) == 4)]],
            {"Fe": 1.9},
            1.0,
        )
    bain = [
        (1, 0.04),
        (1, -0.04),
        (1, 0.02),
        (1, -0.06),
        (1.01, 0.07),
        (0.99, 0.05),
        (1.02, -0.03),
        (0.98, 0.03),
        (1, 0.12),
    ]
    add("Fe-bcc-tetragonal", grid(bcc, tetragonal, bain), strong)
    add("Fe-bcc-orthorhombic", grid(bcc, orthorhombic, [(1, 0.03), (1, 0.05), (1.015, 0.04), (0.985, 0.025)]), strong)
    add("Fe-bcc-shear", grid(bcc, shear, [(1, 0.03), (1, 0.05), (1.01, 0.02)]), strong)
    add("Fe-bcc-trigonal", grid(bcc, trigonal, [(1, 0.03), (1, -0.03), (1.01, 0.045)]), strong)
    strained_do3 = [
        strained(fcc_body(5.76, ["Fe", "Fe", "Al", "Fe"]), s)
        for s in (tetragonal(0.05), tetragonal(-0.05), trigonal(0.03))
    ]
    add("Fe3Al-DO3", strained_do3, {"Fe": 2.1}, 1.1)
    moved = [
        displaced(strained(b2(2.9), tetragonal(e)), 1, (0, 0, d)) for e, d in ((0.04, 0.1), (-0.04, 0.12), (0.0, 0.15))
    ]
    add("FeAl-B2-displaced", moved, soft, 1.1)
    add("FeAl-random", [generic(b2(2.9), rng, 0.05, 0.1) for _ in range(4)], soft, 1.4)

    settings = {**GPAW_SOC, "directions": soc_directions()}
    recipe = Recipe("gpaw-pbe-400eV-force-theorem", "gpaw-soc", ("Fe",), settings)
    plan = assemble("FeAl-anisotropy", recipe, families, seed=2)
    jobs = tuple(replace(job, settings={"kmesh": soc_mesh(job.atoms())}) for job in plan.jobs)
    return Plan(plan.name, plan.recipe, jobs)


PLANS: dict[str, Callable[[], Plan]] = {
    "FeAl-collinear": fe_al_collinear,
    "FeAl-anisotropy": fe_al_anisotropy,
}
