"""Ratios of time between the suite's way and the plain way to the same numbers, each measured within one run.

`python benchmarks/speed/measure.py [-o docs/speed.md] [--model M]`; every case runs in a process of its own, so that
the peak memory is its own too. Numbers of both ways are compared before their times are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from mmace_props.base import silent
from mmace_props.conventions import GPA
from mmace_props.elastic import Elastic, expand
from mmace_props.lattice import Lattice, Method, Response, solve, unit_index
from mmace_props.protocol import MomentMode, SpinCalculator, with_moments
from mmace_props.stiffness import from_six, lagrangian
from mmace_props.symmetry import site_symmetry
from scipy.integrate import lebedev_rule
from scipy.spatial.transform import Rotation

from mmace.calculator import MMACECalculator

Case = tuple[Callable[[], np.ndarray], Callable[[], np.ndarray], float]


def strained_feal() -> Atoms:
    """B2 FeAl, a = 2.83 Å, c/a = 1.08, ferromagnetic."""
    atoms = Atoms("FeAl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.83, 2.83, 1.08 * 2.83], pbc=True)
    atoms.set_initial_magnetic_moments([[0, 0, 0.8], [0, 0, 0]])
    return atoms


def anisotropy_map(model: str) -> Case:
    """E(n) on 194 directions: one batch of spins, or an ASE energy for each."""
    calculator = MMACECalculator(model)
    atoms = strained_feal()
    directions = lebedev_rule(23)[0].T
    moments = np.zeros((len(directions), 2, 3))
    moments[:, 0] = 0.8 * directions

    def batch() -> np.ndarray:
        return calculator.evaluate_spins(atoms, moments, magnetic_forces=False)["energy"]

    def loop() -> np.ndarray:
        energies = []
        for m in moments:
            image = atoms.copy()
            image.set_initial_magnetic_moments(m)
            image.calc = calculator
            energies.append(image.get_potential_energy())
        return np.array(energies)

    return batch, loop, 1.0


def spirals(model: str) -> Case:
    """E(q) at 100 wave vectors of bcc Fe: the primitive cell, or 20-fold supercells (5 of them, times 20)."""
    calculator = MMACECalculator(model, soc=False)
    atoms = bulk("Fe", a=2.83)
    atoms.set_initial_magnetic_moments(None)
    atoms.set_initial_magnetic_moments([[2.2, 0, 0]])
    waves = np.outer(np.arange(100) / 20 % 1, [1.0, 0, 0])
    sample = 5

    def primitive() -> np.ndarray:
        return calculator.evaluate_spirals(atoms, waves, magnetic_forces=False)["energy"]

    def supercells() -> np.ndarray:
        energies = []
        for q in waves[:sample]:
            cell = atoms.repeat((20, 1, 1))
            turns = Rotation.from_rotvec(2 * np.pi * q[0] * np.outer(np.arange(20), [0, 0, 1]))
            cell.set_initial_magnetic_moments(turns.apply([2.2, 0, 0]))
            cell.calc = calculator
            energies.append(cell.get_potential_energy() / 20)
        return np.array(energies)

    return primitive, supercells, len(waves) / sample


def exchange_tensors(model: str) -> Case:
    """All J tensors of B2 FeAl within 5.6 Å, three axes: rows of the Hessian, or four states (1 of 189, times 189)."""
    calculator = MMACECalculator(model, committee=False)
    atoms = strained_feal().repeat((4, 4, 4))
    moment, angle = 0.8, 0.01
    iron = np.flatnonzero(atoms.numbers == 26)
    axes = np.eye(3)[[2, 0, 1]]

    def states(axis: np.ndarray) -> np.ndarray:
        moments = np.zeros((len(atoms), 3))
        moments[iron] = moment * axis
        return moments

    def hessian() -> np.ndarray:
        tensors = []
        for k in range(3):
            image = atoms.copy()
            image.set_initial_magnetic_moments(states(axes[k]))
            rows = calculator.hessian(image, ("mm",), rows=[int(iron[0])])["mm"][0][:, iron[1:]]
            across = axes[[(k + 1) % 3, (k + 2) % 3]]
            tensors.append(-0.5 * moment**2 * np.einsum("ax,xjy,by->jab", across, rows, across))
        return np.array(tensors).ravel()

    def four_states() -> np.ndarray:
        """One pair and one axis: the four tilts of both moments for each of four components."""
        batch, across = [], axes[[1, 2]]
        for a, b, first, second in itertools.product(range(2), range(2), (1, -1), (1, -1)):
            moments = states(axes[0])
            for site, sign, t in ((iron[0], first, across[a]), (iron[1], second, across[b])):
                moments[site] = moment * (np.cos(angle) * axes[0] + sign * np.sin(angle) * t)
            batch.append(moments)
        energy = calculator.evaluate_spins(atoms, np.array(batch), magnetic_forces=False)["energy"].reshape(4, 4)
        return -0.5 * energy @ np.array([1, -1, -1, 1]) / (4 * np.sin(angle) ** 2)

    return hessian, four_states, 3.0 * (len(iron) - 1)


def force_constants(model: str) -> Case:
    """Force constants of bcc Fe, 27 atoms, |m| following: rows of the Hessian of one atom, or a displaced supercell."""
    calculator = SpinCalculator(MMACECalculator(model, soc=False, committee=False))
    atoms = bulk("Fe", a=2.83)
    start = with_moments(atoms, [[0, 0, 2.2]])
    moments = calculator.relax_moments([start], "magnitudes")[0]
    lattice = Lattice(atoms, np.diag([3, 3, 3]), np.eye(3), 1e-5)

    def way(method: Method) -> Callable[[], np.ndarray]:
        def constants() -> np.ndarray:
            phonon = lattice.displaced(moments, soc=False)
            response = Response(calculator, "magnitudes", method, lambda done, total: None)
            forces = response.forces(phonon, moments[unit_index(phonon)])
            return np.asarray(solve(phonon, forces).force_constants).ravel()

        return constants

    return way("hessian"), way("displacements"), 1.0


def elastic_constants(model: str) -> Case:
    """Elastic constants of strained FeAl, ions and |m| following: second derivatives, or 24 strained crystals."""
    calculator = SpinCalculator(MMACECalculator(model, soc=False, committee=False))
    start = with_moments(strained_feal(), [[0, 0, 0.8], [0, 0, 0]])
    moments = calculator.relax_moments([start], "magnitudes")[0]
    state = with_moments(start, moments)
    group = site_symmetry(state, moments, False, 1e-3, 1e-2)
    stress = from_six(calculator.stress(state, moments))

    def derivatives() -> np.ndarray:
        second = expand(state, calculator, "magnitudes", ions=True).followed()[0]
        return lagrangian(second / state.get_volume(), stress).ravel()

    def strains() -> np.ndarray:
        level: dict[str, tuple[MomentMode, bool]] = {"relaxed": ("magnitudes", True)}
        prop = Elastic(relax="none", strain_step=1e-3)
        found = prop.compare_strains(state, calculator, stress * GPA, group, level, silent)
        return found.ravel() / GPA

    return derivatives, strains, 1.0


CASES: dict[str, Callable[[str], Case]] = {
    "anisotropy_map": anisotropy_map,
    "spirals": spirals,
    "exchange_tensors": exchange_tensors,
    "force_constants": force_constants,
    "elastic_constants": elastic_constants,
}
TOLERANCE = {"exchange_tensors": 1e-6, "force_constants": 2e-3, "elastic_constants": 1e-5}
"""Largest difference in eV, eV/Å² or eV/Å³ where the plain way has an error of its own; 1e-9 for the others."""


def run_case(name: str, model: str, way: int) -> dict[str, object]:
    """Time one way of one case, after one unmeasured call, in this process."""
    case = CASES[name](model)
    case[way]()
    start = time.perf_counter()
    values = case[way]()
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds * (case[2] if way == 1 else 1.0), "memory_MiB": memory, "values": values.tolist()}


def first_and_tenth_call(model: str) -> list[float]:
    """Seconds of the first and the tenth call for forces and stress of a fresh calculator, in this process."""
    atoms = strained_feal()
    atoms.calc = MMACECalculator(model)
    seconds = []
    for k in range(10):
        atoms.rattle(0.01, seed=k)
        start = time.perf_counter()
        atoms.get_forces()
        seconds.append(time.perf_counter() - start)
    return [seconds[0], seconds[9]]


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default="docs/speed.md")
    parser.add_argument("--model", default="default")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--way", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case == "calls":
        print(json.dumps(first_and_tenth_call(options.model)))
        return
    if options.case:
        print(json.dumps(run_case(options.case, options.model, options.way)))
        return
    rows = []
    for name, case in CASES.items():
        command = [sys.executable, __file__, "--model", options.model, "--case", name, "--way"]
        fast, plain = (json.loads(subprocess.check_output([*command, str(way)], text=True)) for way in (0, 1))
        shared = len(plain["values"])
        np.testing.assert_allclose(fast["values"][:shared], plain["values"], atol=TOLERANCE.get(name, 1e-9))
        ratio = plain["seconds"] / fast["seconds"]
        summary = (case.__doc__ or "").rstrip(".")
        rows.append(
            f"| {summary} | {fast['seconds']:.3f} s, {fast['memory_MiB']:.0f} MiB "
            f"| {plain['seconds']:.2f} s, {plain['memory_MiB']:.0f} MiB | {ratio:.0f} |"
        )
        print(rows[-1])
    calls = subprocess.check_output([sys.executable, __file__, "--model", options.model, "--case", "calls"], text=True)
    first, tenth = (1e3 * seconds for seconds in json.loads(calls))
    text = "\n".join(
        [
            "# Speed",
            "",
            "Ratios within one run, second call of each way, with the peak memory of its process. Made by",
            f"`python benchmarks/speed/measure.py` on {os.cpu_count()} logical cores ({platform.machine()}), model "
            f"`{options.model}`, after both gave the same numbers to 1e-9 eV (J to 1e-6 eV, force "
            "constants to 1e-2 eV/Å², the plain way's errors).",
            "",
            "| what | the suite's way | the plain way | ratio |",
            "|---|---|---|---|",
            *rows,
            "",
            f"First call of a fresh calculator for the forces of two atoms: {first:.0f} ms; tenth: {tenth:.0f} ms.",
            "",
        ]
    )
    temporary = Path(f"{options.output}.tmp")
    temporary.write_text(text)
    os.replace(temporary, options.output)


if __name__ == "__main__":
    main()
