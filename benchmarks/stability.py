"""How a model behaves far from its labels: random perturbed cells, walks downhill, and molecular dynamics.

`python benchmarks/stability.py FeAl [--model M] [-o results.json]` does all three for a system and prints tables.

Random cells come in two sets. The asked one has the crystals of the labels with volumes within ±20 %, displacements up
to 0.4 Å and moments up to 1.5 M_z in any direction; training keeps such cells above a floor, so it checks what training
was asked for. The harder one reaches further than training does (volumes from −35 to +40 %, displacements up to 0.6 Å)
and adds crystals that no label has. Every member of the committee sees the same cells; a hole is a cell that a member
puts more than 50 meV/atom below the ground state, which is the lowest energy of the stable crystal of the composition
over volumes and collinear orders, or of the crystal itself where the composition has no other.

Walks downhill look for holes that chance does not find. They start from the crystals' primitive cells, doubled and
shaken as training does it (`mmace.training.restraint.shake`: half of them with another volume), with collinear moments
of the crystal's own length, half of the time ferromagnetic, else with signs at random; each member takes 50 steps of up
to 0.15 Å along its own forces. A walk has a hole where its lowest point lies in one. Training keeps the lowest points
of such walks, of at most 20 steps from labelled cells, above the floor.

Dynamics are 20 ps of the first member, or with `--mean` of the committee's mean as the calculator gives it, with a
Langevin thermostat at 300 K and 1,000 K, moments held. Displacements and
temperatures are looked at after every step; the structure is kept every picosecond, and the same command goes on where
it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk, make_supercell
from ase.constraints import FixCom
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from rich.progress import track
from spglib import find_primitive

from mmace.calculator import MMACECalculator
from mmace.derivatives import Evaluation, evaluate
from mmace.errors import StructureError
from mmace.files import whole_file
from mmace.graph import Graph
from mmace.io import weights_hash
from mmace.model import MagneticMACE
from mmace.training.batches import graph_of
from mmace.training.restraint import Crystal as ShakenCrystal
from mmace.training.restraint import ShakenCell, random_directions, shake, walk_downhill

HOLE = 0.05  # eV/atom
CELLS_AT_ONCE = 25
STEPS_DOWNHILL = 50
TIME_STEP = 2.0  # fs
PICOSECOND = 500  # steps
FRICTION = 0.01 / units.fs
TEMPERATURES = (300, 1000)  # K


@dataclass(frozen=True)
class Ranges:
    """How far random cells go.

    Attributes
    ----------
    compression, expansion : float
        Of the volume, relative.
    displacement : float
        Å.
    moment : float
        In units of M_z.
    """

    compression: float
    expansion: float
    displacement: float
    moment: float


ASKED = Ranges(0.2, 0.2, 0.4, 1.5)
HARDER = Ranges(0.35, 0.4, 0.6, 1.5)


@dataclass(frozen=True)
class Crystal:
    """A crystal to perturb.

    Attributes
    ----------
    atoms : Atoms
        Cell of 4 to 8 atoms.
    moment : float
        Of its carriers, µB.
    stable : str
        Name of the stable crystal of its composition, if that is another one.
    """

    atoms: Atoms
    moment: float
    stable: str = ""


def labelled_crystals(system: str) -> dict[str, Crystal]:
    """Crystals that the labels have."""
    if system == "FeAl":
        b2 = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.88] * 3, pbc=True)
        return {
            "bcc Fe": Crystal(make_supercell(bulk("Fe", "bcc", 2.84), 2 * np.eye(3)), 2.2),
            "B2 FeAl": Crystal(b2 * (2, 2, 1), 0.7),
            "DO3 Fe3Al": Crystal(_do3(), 2.2),
        }
    return {
        "rocksalt CrN": Crystal(bulk("CrN", "rocksalt", 4.15, cubic=True), 2.5),
        "bcc Cr": Crystal(bulk("Cr", "bcc", 2.87, cubic=True) * (2, 1, 1), 0.8),
    }


def other_crystals(system: str) -> dict[str, Crystal]:
    """Crystals that no label has."""
    if system == "FeAl":
        antisites = _do3() * (2, 1, 1)
        antisites.symbols[[2, 3]] = antisites.symbols[[3, 2]]
        return {
            "hcp Fe": Crystal(bulk("Fe", "hcp", 2.46, c=3.94) * (2, 2, 1), 2.2, "bcc Fe"),
            "DO3 Fe3Al with a pair of antisites": Crystal(antisites, 2.2, "DO3 Fe3Al"),
        }
    vacancy = bulk("CrN", "rocksalt", 4.15, cubic=True)
    del vacancy[int(np.flatnonzero(vacancy.symbols == "N")[0])]
    b2 = Atoms("CrN", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.6] * 3, pbc=True)
    return {
        "CrN with a vacancy of N": Crystal(vacancy, 2.5),
        "B2 CrN": Crystal(b2 * (2, 2, 1), 2.5, "rocksalt CrN"),
    }


def _do3() -> Atoms:
    sites = [[k / 4] * 3 for k in range(4)]
    return Atoms("Fe3Al", scaled_positions=sites, cell=bulk("Fe", "fcc", 5.75).cell, pbc=True)


def perturbed(crystal: Atoms, ranges: Ranges, calculator: MMACECalculator, rng: np.random.Generator) -> Atoms:
    """A copy with random volume, displacements and moments."""
    atoms = crystal.copy()
    atoms.set_initial_magnetic_moments(None)
    scale = (1 + rng.uniform(-ranges.compression, ranges.expansion)) ** (1 / 3)
    atoms.set_cell(scale * atoms.cell.array, scale_atoms=True)
    lengths = ranges.displacement * rng.random((len(atoms), 1)) ** (1 / 3)
    atoms.positions += lengths * random_directions(len(atoms), rng)
    config = calculator.models[0].config
    longest = np.array([config.moment_scale[s] if s in config.carriers else 0.0 for s in atoms.symbols])
    size = ranges.moment * longest * rng.random(len(atoms))
    atoms.set_initial_magnetic_moments(size[:, None] * random_directions(len(atoms), rng))
    return atoms


def ground_state(crystal: Crystal, calculator: MMACECalculator) -> float:
    """Lowest energy per atom over volumes and collinear orders with moments relaxed, eV."""
    cell = crystal.atoms
    carriers = np.flatnonzero(np.isin(list(cell.symbols), calculator.models[0].config.carriers))
    layers = np.argsort(cell.positions[carriers, 2], kind="stable")
    images = []
    for scale in np.linspace(0.96, 1.04, 17):
        for signs in (np.ones(len(carriers)), np.zeros(len(carriers)), (-1.0) ** np.argsort(layers)):
            atoms = cell.copy()
            atoms.set_cell(scale * atoms.cell.array, scale_atoms=True)
            moments = np.zeros((len(atoms), 3))
            moments[carriers, 2] = crystal.moment * signs
            atoms.set_initial_magnetic_moments(None)
            atoms.set_initial_magnetic_moments(moments)
            images.append(atoms)
    energies = []
    for atoms, relaxed in zip(images, calculator.relax_moments(images, "magnitudes"), strict=True):
        energies.append(calculator.evaluate_spins(atoms, relaxed[None], magnetic_forces=False)["energy"][0])
    return float(min(energies) / len(cell))


def random_cells(
    crystals: Mapping[str, Crystal],
    grounds: Mapping[str, float],
    ranges: Ranges,
    calculator: MMACECalculator,
    count: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Counts over random cells of every crystal, `count` of each; `grounds` are ground states, eV/atom."""
    result = {}
    for name, crystal in crystals.items():
        rng = np.random.default_rng(seed)
        reference = grounds[crystal.stable or name]
        above, finite, redrawn = [], [], 0
        for start in track(range(0, count, CELLS_AT_ONCE), f"{name}, random cells"):
            graph, refused = _drawn(crystal.atoms, ranges, calculator, min(CELLS_AT_ONCE, count - start), rng)
            redrawn += refused
            found = [evaluate(m, graph, forces=True, stress=True, magnetic_forces=True) for m in calculator.models]
            above.append(np.stack([(f.energy / graph.counts).detach().numpy() - reference for f in found]))
            finite.append(np.stack([_finite(f, graph) for f in found]))
        result[name] = _counts(np.concatenate(above, axis=1), np.concatenate(finite, axis=1)) | {
            "redrawn_because_atoms_overlap": redrawn,
            "crystal_above_ground_state_eV_per_atom": grounds[name] - reference,
        }
    return result


def walks_downhill(
    crystals: Mapping[str, Crystal],
    grounds: Mapping[str, float],
    calculator: MMACECalculator,
    count: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Counts over walks from random cells of every crystal, `count` of each; `grounds` are ground states, eV/atom."""
    result = {}
    for name, crystal in crystals.items():
        rng = np.random.default_rng(seed)
        first = calculator.models[0]
        level = ShakenCrystal(primitive(crystal.atoms), ground=0.0, stiffness=0.0)
        cells = (shake(level, first, rng).atoms for _ in range(count))
        starts = [collinear(cell, crystal.moment, first.config.carriers, rng) for cell in cells]
        lowest = np.empty((len(calculator.models), count))
        batches = [range(k, min(k + CELLS_AT_ONCE, count)) for k in range(0, count, CELLS_AT_ONCE)]
        for member, k in track(list(np.ndindex(len(lowest), len(batches))), f"{name}, walks downhill"):
            batch = batches[k]
            lowest[member, batch] = lowest_on_the_way(calculator.models[member], [starts[i] for i in batch])
        above = lowest - grounds[crystal.stable or name]
        result[name] = _counts(above, np.isfinite(above))
    return result


def primitive(atoms: Atoms) -> Atoms:
    """Primitive cell of a crystal, without moments."""
    found = find_primitive((atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers))
    assert found is not None
    cell, positions, numbers = found
    return Atoms(numbers, cell=cell, scaled_positions=positions, pbc=True, magmoms=np.zeros((len(numbers), 3)))


def collinear(atoms: Atoms, moment: float, carriers: tuple[str, ...], rng: np.random.Generator) -> Atoms:
    """A copy with moments on its carriers along z, all up or, in half of the cases, up or down."""
    atoms = atoms.copy()
    signs = rng.choice([-1.0, 1.0], len(atoms)) if rng.random() < 0.5 else np.ones(len(atoms))
    carries = np.isin(list(atoms.symbols), carriers)
    atoms.set_initial_magnetic_moments((moment * signs * carries)[:, None] * np.array([0.0, 0.0, 1.0]))
    return atoms


def lowest_on_the_way(model: MagneticMACE, starts: list[Atoms]) -> np.ndarray:
    """Lowest energy of each structure on its walk down the model's forces, eV/atom."""
    # One level for all sites and displacements: the point that lies lowest against it is the one of the lowest energy.
    level = ShakenCrystal(starts[0], ground=0.0, stiffness=0.0)
    cells = [ShakenCell(atoms, atoms.positions, level, graph_of(atoms, model)) for atoms in starts]
    graph = Graph.collate([cell.graph for cell in walk_downhill(model, cells, STEPS_DOWNHILL)])
    found = evaluate(model, graph, forces=False, stress=False, magnetic_forces=False)
    return (found.energy / graph.counts).detach().numpy()


def _drawn(
    atoms: Atoms, ranges: Ranges, calculator: MMACECalculator, count: int, rng: np.random.Generator
) -> tuple[Graph, int]:
    """A batch of perturbed cells, and how many were drawn again because atoms overlapped."""
    graphs: list[Graph] = []
    refused = 0
    while len(graphs) < count:
        cell = perturbed(atoms, ranges, calculator, rng)
        try:
            graphs.append(Graph.from_atoms(cell, calculator.elements, calculator.cutoff))
        except StructureError:
            refused += 1
    return Graph.collate(graphs), refused


def _finite(found: Evaluation, graph: Graph) -> np.ndarray:
    """Whether everything that was computed of each structure is finite, (G,)."""
    result = torch.isfinite(found.energy)
    if found.stress is not None:
        result = result & torch.isfinite(found.stress).all(1)
    for part in (found.forces, found.magnetic_forces):
        if part is not None:
            result[graph.batch[~torch.isfinite(part).all(1)]] = False
    return result.numpy()


def _counts(above: np.ndarray, finite: np.ndarray) -> dict[str, Any]:
    """Summary of energies above the ground state (M, C), eV/atom, of C cells seen by M members."""
    holes = above < -HOLE
    return {
        "cells": above.shape[1],
        "members": above.shape[0],
        "not_finite": int((~finite).sum()),
        "holes": int(holes.sum()),
        "cells_with_a_hole": int(holes.any(axis=0).sum()),
        "lowest_above_ground_state_eV_per_atom": float(np.nanmin(above)),
    }


def dynamics(system: str, calculator: MMACECalculator, picoseconds: int, folder: Path) -> dict[str, Any]:
    """Largest displacement and mean temperature of dynamics of every labelled crystal, resumed from `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    for name, crystal in labelled_crystals(system).items():
        for temperature in TEMPERATURES:
            file = folder / f"{name.replace(' ', '-')}-{temperature}.traj"
            frames = ase.io.read(file, ":") if file.exists() else [started(crystal, calculator, temperature)]
            failure = ""
            for _ in track(range(len(frames) - 1, picoseconds), f"{name}, {temperature} K"):
                rng = np.random.default_rng([temperature, len(frames)])
                try:
                    frames.append(moved(frames[-1], frames[0].positions, calculator, temperature, PICOSECOND, rng))
                except StructureError as error:
                    failure = str(error)
                    break
                with whole_file(file) as temporary:
                    ase.io.write(temporary, frames, format="traj")
            result[f"{name}, {temperature} K"] = summary(frames, failure)
    return result


def started(crystal: Crystal, calculator: MMACECalculator, temperature: float) -> Atoms:
    """At least eight atoms on their sites, with moments along z and random velocities."""
    atoms = crystal.atoms.copy() * ((2, 1, 1) if len(crystal.atoms) < 8 else (1, 1, 1))
    atoms.set_initial_magnetic_moments(None)
    carriers = np.isin(list(atoms.symbols), calculator.models[0].config.carriers)
    atoms.set_initial_magnetic_moments(np.where(carriers, crystal.moment, 0.0)[:, None] * np.array([0.0, 0.0, 1.0]))
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=np.random.default_rng(0))
    return atoms


def moved(
    atoms: Atoms, sites: np.ndarray, calculator: Any, temperature: float, steps: int, rng: np.random.Generator
) -> Atoms:
    """The structure some steps later; its `info` holds their mean temperature and the largest displacement in any.

    The centre of mass is fixed by a constraint, not by the thermostat's own `fixcm`: that shares the momentum out
    evenly, whatever the masses, which heats the light atoms (CrN by 7 %).
    """
    atoms = atoms.copy()
    atoms.set_constraint(FixCom())
    atoms.set_momenta(atoms.get_momenta())
    atoms.calc = calculator
    temperatures: list[float] = []
    displacements: list[float] = []

    def look() -> None:
        temperatures.append(atoms.get_temperature())
        displacements.append(float(np.linalg.norm(atoms.positions - sites, axis=1).max()))

    motion = Langevin(atoms, TIME_STEP * units.fs, temperature_K=temperature, friction=FRICTION, rng=rng, fixcm=False)
    motion.attach(look, interval=1)
    motion.run(steps)
    atoms.calc = None
    atoms.info = {"mean_temperature_K": float(np.mean(temperatures)), "farthest_A": float(np.max(displacements))}
    return atoms


def summary(frames: list[Atoms], failure: str) -> dict[str, Any]:
    """What came out of a run; the temperature is that of its second half, with the standard error of the mean."""
    farthest = [frame.info["farthest_A"] for frame in frames[1:]]
    late = [frame.info["mean_temperature_K"] for frame in frames[1 + len(frames) // 2 :]]
    return {
        "picoseconds": len(farthest),
        "mean_temperature_K": float(np.mean(late)) if late else None,
        "standard_error_K": float(np.std(late, ddof=1) / len(late) ** 0.5) if len(late) > 1 else None,
        "largest_displacement_A": float(np.max(farthest)) if farthest else None,
        "finite": bool(np.isfinite(farthest).all()),
        "failure": failure,
    }


def table_of_cells(title: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """One set of random cells or walks in Markdown."""
    lines = [f"| {title} | cells, members | not finite | holes | lowest energy above the ground state, eV/atom |"]
    lines.append("|" + "---|" * 5)
    for name, row in found.items():
        lowest = row["lowest_above_ground_state_eV_per_atom"]
        counts = f"{row['cells']}, {row['members']} | {row['not_finite']} | {row['holes']}"
        lines.append(f"| {name} | {counts} | {lowest:.2f} |")
    return "\n".join(lines) + "\n"


def table_of_dynamics(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Runs in Markdown."""
    lines = ["| dynamics | ps | mean temperature of the second half, K | largest displacement, Å |", "|" + "---|" * 4]
    for name, row in found.items():
        mean, error, farthest = (
            row[key] for key in ("mean_temperature_K", "standard_error_K", "largest_displacement_A")
        )
        temperature = "" if mean is None else f"{mean:.0f}" + ("" if error is None else f" ± {error:.0f}")
        distance = row["failure"] or ("" if farthest is None else f"{farthest:.2f}")
        lines.append(f"| {name} | {row['picoseconds']} | {temperature} | {distance} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all parts and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("system", choices=("FeAl", "CrN"))
    parser.add_argument("--model", default="default")
    parser.add_argument("--cells", type=int, default=1000, help="asked cells of each crystal (default %(default)s)")
    parser.add_argument(
        "--harder-cells", type=int, default=250, help="harder cells of each crystal (default %(default)s)"
    )
    parser.add_argument("--walks", type=int, default=250, help="walks downhill from each crystal (default %(default)s)")
    parser.add_argument("--picoseconds", type=int, default=20, help="of each run; 0 for none (default %(default)s)")
    parser.add_argument("--mean", action="store_true", help="dynamics of the committee's mean, not of its first member")
    parser.add_argument("--work", type=Path, default=Path("stability-work"), help="folder of the trajectories")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the results; tables are printed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    calculator = MMACECalculator(args.model, soc=False)
    result: dict[str, Any] = {
        "system": args.system,
        "model": calculator.provenance()["hash"],
        "weights_without_spin_orbit": [weights_hash(model, spin_orbit=False) for model in calculator.models],
    }
    labelled, others = labelled_crystals(args.system), other_crystals(args.system)
    wanted = (labelled if args.cells or args.walks else {}) | (labelled | others if args.harder_cells else {})
    grounds = {name: ground_state(crystal, calculator) for name, crystal in wanted.items()}
    if args.cells:
        result["asked_cells"] = random_cells(labelled, grounds, ASKED, calculator, args.cells)
        print(table_of_cells("asked", result["asked_cells"]))
    if args.harder_cells:
        result["harder_cells"] = random_cells(labelled | others, grounds, HARDER, calculator, args.harder_cells)
        print(table_of_cells("harder", result["harder_cells"]))
    if args.walks:
        result["walks_downhill"] = walks_downhill(labelled, grounds, calculator, args.walks)
        print(table_of_cells("downhill", result["walks_downhill"]))
    if args.picoseconds:
        folder = args.work / args.system / (result["model"][:12] + ("-mean" if args.mean else ""))
        moving = calculator if args.mean else calculator.members[0]
        result["dynamics_of"] = "mean" if args.mean else "first member"
        result["dynamics"] = dynamics(args.system, moving, args.picoseconds, folder)
        print(table_of_dynamics(result["dynamics"]))
    if args.output:
        with whole_file(args.output) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
