"""How a model behaves far from its labels: random perturbed cells, and molecular dynamics.

`python benchmarks/stability.py FeAl [--model M] [-o results.json]` does both for the crystals of a system. Cells have
volumes within ±20 %, moments up to 1.5 M_z in any direction and displacements up to 0.4 Å; a hole is an energy more
than 50 meV/atom below the crystal's ground state. Dynamics are 20 ps of the first member with a Langevin
thermostat at 300 K and 1,000 K, moments held; they are kept every picosecond, and the same command goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk, make_supercell
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from rich.progress import track

from mmace.calculator import MMACECalculator
from mmace.derivatives import evaluate
from mmace.errors import StructureError
from mmace.files import whole_file
from mmace.graph import Graph
from mmace.training.restraint import random_directions

HOLE = 0.05  # eV/atom
VOLUME_CHANGE, LONGEST_MOMENT, DISPLACEMENT = 0.2, 1.5, 0.4
CELLS_AT_ONCE = 25
TIME_STEP = 2.0  # fs
PICOSECOND = 500  # steps
FRICTION = 0.01 / units.fs


def crystals(system: str) -> dict[str, tuple[Atoms, float]]:
    """Crystals of a system: a cell of 4 to 8 atoms, and the moment of its carriers in µB."""
    if system == "FeAl":
        b2 = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.88] * 3, pbc=True)
        do3 = Atoms(
            "Fe3Al", scaled_positions=[[k / 4] * 3 for k in range(4)], cell=bulk("Fe", "fcc", 5.75).cell, pbc=True
        )
        return {
            "bcc Fe": (make_supercell(bulk("Fe", "bcc", 2.84), 2 * np.eye(3)), 2.2),
            "B2 FeAl": (b2 * (2, 2, 1), 0.7),
            "DO3 Fe3Al": (do3, 2.2),
        }
    return {
        "rocksalt CrN": (bulk("CrN", "rocksalt", 4.15, cubic=True), 2.5),
        "bcc Cr": (bulk("Cr", "bcc", 2.87, cubic=True) * (2, 1, 1), 0.8),
    }


def perturbed(crystal: Atoms, calculator: MMACECalculator, rng: np.random.Generator) -> Atoms:
    """A copy with random volume, displacements and moments."""
    atoms = crystal.copy()
    atoms.set_initial_magnetic_moments(None)
    scale = (1 + rng.uniform(-VOLUME_CHANGE, VOLUME_CHANGE)) ** (1 / 3)
    atoms.set_cell(scale * atoms.cell.array, scale_atoms=True)
    lengths = DISPLACEMENT * rng.random((len(atoms), 1)) ** (1 / 3)
    atoms.positions += lengths * random_directions(len(atoms), rng)
    config = calculator.models[0].config
    longest = np.array([config.moment_scale[s] if s in config.carriers else 0.0 for s in atoms.symbols])
    size = LONGEST_MOMENT * longest * rng.random(len(atoms))
    atoms.set_initial_magnetic_moments(size[:, None] * random_directions(len(atoms), rng))
    return atoms


def ground_state(crystal: Atoms, moment: float, calculator: MMACECalculator) -> float:
    """Lowest energy per atom over volumes and collinear orders with moments relaxed, eV."""
    carriers = np.flatnonzero(np.isin(list(crystal.symbols), calculator.models[0].config.carriers))
    layers = np.argsort(crystal.positions[carriers, 2], kind="stable")
    images = []
    for scale in np.linspace(0.96, 1.04, 17):
        for signs in (np.ones(len(carriers)), np.zeros(len(carriers)), (-1.0) ** np.argsort(layers)):
            atoms = crystal.copy()
            atoms.set_cell(scale * atoms.cell.array, scale_atoms=True)
            moments = np.zeros((len(atoms), 3))
            moments[carriers, 2] = moment * signs
            atoms.set_initial_magnetic_moments(None)
            atoms.set_initial_magnetic_moments(moments)
            images.append(atoms)
    energies = []
    for atoms, relaxed in zip(images, calculator.relax_moments(images, "magnitudes"), strict=True):
        energies.append(calculator.evaluate_spins(atoms, relaxed[None], magnetic_forces=False)["energy"][0])
    return float(min(energies) / len(crystal))


def random_cells(system: str, calculator: MMACECalculator, count: int, seed: int = 0) -> dict[str, Any]:
    """Counts over random cells of every crystal."""
    result = {}
    for name, (crystal, moment) in crystals(system).items():
        rng = np.random.default_rng(seed)
        reference = ground_state(crystal, moment, calculator)
        lowest, broken, holes = np.inf, 0, 0
        for _ in track(range(0, count, CELLS_AT_ONCE), f"{name}, random cells"):
            images = [perturbed(crystal, calculator, rng) for _ in range(CELLS_AT_ONCE)]
            graph = Graph.collate([Graph.from_atoms(a, calculator.elements, calculator.cutoff) for a in images])
            for model in calculator.models:
                found = evaluate(model, graph, forces=True, stress=True, magnetic_forces=True)
                above = found.energy / graph.counts - reference
                parts = (found.energy, found.forces, found.stress, found.magnetic_forces)
                finite = all(bool(torch.isfinite(part).all()) for part in parts if part is not None)
                broken += 0 if finite else int((~torch.isfinite(found.energy)).sum()) or 1
                holes += int((above < -HOLE).sum())
                lowest = min(lowest, float(above.min()))
        result[name] = {
            "cells": count,
            "members": len(calculator.models),
            "not_finite": broken,
            "holes": holes,
            "lowest_above_ground_state_eV_per_atom": lowest,
        }
    return result


def dynamics(system: str, calculator: MMACECalculator, picoseconds: int, folder: Path) -> dict[str, Any]:
    """Largest displacement, temperature and energy of dynamics of every crystal, resumed from `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    for name, (crystal, moment) in crystals(system).items():
        for temperature in (300, 1000):
            file = folder / f"{name.replace(' ', '-')}-{temperature}.traj"
            frames = ase.io.read(file, ":") if file.exists() else [_start(crystal, moment, calculator, temperature)]
            failure = ""
            for _ in track(range(len(frames) - 1, picoseconds), f"{name}, {temperature} K"):
                atoms = frames[-1].copy()
                atoms.calc = calculator
                rng = np.random.default_rng([temperature, len(frames)])
                motion = Langevin(atoms, TIME_STEP * units.fs, temperature_K=temperature, friction=FRICTION, rng=rng)
                try:
                    motion.run(PICOSECOND)
                except StructureError as error:
                    failure = str(error)
                    break
                atoms.calc = None
                frames.append(atoms)
                with whole_file(file) as temporary:
                    ase.io.write(temporary, frames, format="traj")
            moved = [
                np.linalg.norm(
                    a.positions - a.positions.mean(0) - (frames[0].positions - frames[0].positions.mean(0)), axis=1
                )
                for a in frames
            ]
            result[f"{name}, {temperature} K"] = {
                "picoseconds": len(frames) - 1,
                "mean_temperature_K": float(np.mean([a.get_temperature() for a in frames[len(frames) // 4 :]])),
                "largest_displacement_A": float(max(m.max() for m in moved)),
                "finite": bool(all(np.isfinite(a.positions).all() for a in frames)),
                "failure": failure,
            }
    return result


def _start(crystal: Atoms, moment: float, calculator: MMACECalculator, temperature: float) -> Atoms:
    atoms = crystal.copy() * ((2, 1, 1) if len(crystal) < 8 else (1, 1, 1))
    atoms.set_initial_magnetic_moments(None)
    carriers = np.isin(list(atoms.symbols), calculator.models[0].config.carriers)
    atoms.set_initial_magnetic_moments(np.where(carriers, moment, 0.0)[:, None] * np.array([0.0, 0.0, 1.0]))
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=np.random.default_rng(0))
    return atoms


def main() -> None:
    """Run both parts and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("system", choices=("FeAl", "CrN"))
    parser.add_argument("--model", default="default")
    parser.add_argument("--cells", type=int, default=1000, help="of each crystal; 0 for none (default %(default)s)")
    parser.add_argument("--picoseconds", type=int, default=20, help="of each run; 0 for none (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("stability-work"), help="folder of the trajectories")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    calculator = MMACECalculator(args.model, soc=False)
    result: dict[str, Any] = {"system": args.system, "model": calculator.provenance()["hash"]}
    if args.cells:
        result["random_cells"] = random_cells(args.system, calculator, args.cells)
    if args.picoseconds:
        folder = args.work / args.system / result["model"][:12]
        result["dynamics"] = dynamics(args.system, calculator.members[0], args.picoseconds, folder)
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if args.output:
        with whole_file(args.output) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
