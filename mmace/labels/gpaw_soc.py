"""Magnetic anisotropy by the force theorem with GPAW; this file is run by the Python that GPAW is installed in.

`python gpaw_soc.py JOB.json RESULT.json`: one collinear SCF without spin-orbit coupling, then the band energy with
it for every direction of the moments. It imports nothing of this package, so that GPAW may live elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np


def compute(job: dict[str, Any]) -> dict[str, Any]:
    """Energies of one structure with its moments along several directions.

    Parameters
    ----------
    job : dict
        `symbols`, `cell` (3, 3) Å, `scaled_positions` (N, 3), `moments` (N,) start moments along one axis, µB;
        `kmesh` (3,), `gamma` (whether the mesh holds Γ), `cutoff` (eV), `width` (Fermi-Dirac, eV), `xc`,
        `directions` (D, 3).

    Returns
    -------
    dict
        `converged`, `scf_steps`, `code`, `energy` (SCF, eV), `moments` (N,) reached in the PAW spheres, µB,
        `soc_energies` (D,) eV: SCF energy plus the change of the band energy by spin-orbit coupling.
    """
    import gpaw
    from ase import Atoms
    from gpaw import GPAW, PW, FermiDirac

    atoms = Atoms(
        job["symbols"],
        cell=job["cell"],
        scaled_positions=job["scaled_positions"],
        pbc=True,
        magmoms=job["moments"],
    )
    calc = GPAW(
        mode=PW(job["cutoff"]),
        xc=job["xc"],
        kpts={"size": job["kmesh"], "gamma": job["gamma"]},
        occupations=FermiDirac(job["width"]),
        txt="scf.txt",
    )
    atoms.calc = calc
    energy = atoms.get_potential_energy(force_consistent=True)

    energies = DirectionEnergies(calc)
    reference = energies(np.array([0.0, 0.0, 1.0]), scale=0.0)
    return {
        "converged": True,
        "scf_steps": int(calc.get_number_of_iterations()),
        "code": f"gpaw-{gpaw.__version__}",
        "energy": float(energy),
        "moments": atoms.get_magnetic_moments().tolist(),
        "soc_energies": [float(energy) + energies(np.array(n)) - reference for n in job["directions"]],
    }


class DirectionEnergies:
    """Band energy with spin-orbit coupling for any direction of the moments.

    The same numbers as GPAW's `soc_eigenstates(calc, theta=…, phi=…).calculate_band_energy()`, which transforms the
    projections of every k-point again for each direction; here the matrix elements of the orbital operators between
    bands are made once, and a direction turns only the spin they are multiplied with.

    Parameters
    ----------
    calc : GPAW
        Finished collinear, spin-polarised calculation.
    """

    K_POINTS_AT_ONCE = 256

    def __init__(self, calc: Any) -> None:
        from ase.units import Ha
        from gpaw.ibz2bz import IBZ2BZMaps
        from gpaw.spinorbit import WaveFunction, extract_ibz_wave_functions, get_both_spins, soc

        wfs = calc.wfs
        couplings = {
            a: Ha * soc(wfs.setups[a], calc.hamiltonian.xc, density) for a, density in calc.density.D_asp.items()
        }
        maps = IBZ2BZMaps.from_calculator(calc)
        waves = extract_ibz_wave_functions(get_both_spins(wfs), wfs.bd, wfs.gd, 0, calc.get_number_of_bands())
        self.calc, self.wave_type = calc, WaveFunction
        self.projections: dict[int, Any] = {}
        bands, orbital = {}, {}
        for ibz_index, wave in waves:
            for k in np.flatnonzero(maps.kd.bz2ibz_k == ibz_index):
                turned = wave.transform(maps[k], k)
                self.projections[int(k)] = turned.projections
                bands[int(k)] = turned.eig_m
                # Bands alternate between up and down: each projects on one spin alone.
                orbital[int(k)] = sum(
                    np.einsum("mi,vij,nj->vmn", p.conj(), couplings[a], p, optimize=True)
                    for a, p in ((a, turned.projections[a].sum(axis=1)) for a in couplings)
                )
        self.order = sorted(bands)
        self.bands = np.array([bands[k] for k in self.order])
        self.orbital = np.array([orbital[k] for k in self.order])

    def __call__(self, direction: np.ndarray, scale: float = 1.0) -> float:
        """Band energy in eV with the moments along `direction` (3,), spin-orbit coupling times `scale`."""
        from gpaw.spinorbit import BZWaveFunctions

        wfs = self.calc.wfs
        spin = np.tile(turned_spin_matrices(direction), (1, self.bands.shape[1] // 2, self.bands.shape[1] // 2))
        diagonal = np.eye(self.bands.shape[1])
        values = np.concatenate(
            [
                np.linalg.eigvalsh(
                    scale * np.einsum("kvmn,vmn->kmn", self.orbital[part], spin) + self.bands[part, :, None] * diagonal
                )
                for part in np.array_split(np.arange(len(self.order)), 1 + len(self.order) // self.K_POINTS_AT_ONCE)
            ]
        )
        occupations = wfs.occupations.copy(bz2ibzmap=list(range(wfs.kd.nbzkpts)))
        states = {k: self.wave_type(v, self.projections[k], k) for k, v in zip(self.order, values, strict=True)}
        levels = [setup.n_j for setup in wfs.setups], [setup.l_j for setup in wfs.setups]
        return float(BZWaveFunctions(wfs.kd, states, occupations, wfs.nvalence, *levels).calculate_band_energy())


def turned_spin_matrices(direction: np.ndarray) -> np.ndarray:
    """Pauli matrices (3, 2, 2) in the basis of spins up and down along `direction` (3,)."""
    x, y, z = direction / np.linalg.norm(direction)
    theta, phi = np.arccos(np.clip(z, -1, 1)), np.arctan2(y, x)
    turn = np.array(
        [
            [np.cos(theta / 2) * np.exp(-0.5j * phi), -np.sin(theta / 2) * np.exp(-0.5j * phi)],
            [np.sin(theta / 2) * np.exp(0.5j * phi), np.cos(theta / 2) * np.exp(0.5j * phi)],
        ]
    )
    pauli = np.array([[[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]])
    return turn.conj().T @ pauli @ turn


def main() -> None:
    """Read a job, compute it, write the result under its final name when it is whole."""
    job_path, result_path = sys.argv[1:3]
    with open(job_path) as file:
        job = json.load(file)
    result = compute(job)
    with open(result_path + ".tmp", "w") as file:
        json.dump(result, file)
    os.replace(result_path + ".tmp", result_path)


if __name__ == "__main__":
    main()
