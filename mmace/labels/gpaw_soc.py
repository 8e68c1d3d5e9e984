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
        `kmesh` (3,), `cutoff` (eV), `width` (Fermi-Dirac, eV), `xc`, `directions` (D, 3).

    Returns
    -------
    dict
        `converged`, `scf_steps`, `code`, `energy` (SCF, eV), `moments` (N,) reached in the PAW spheres, µB,
        `soc_energies` (D,) eV: SCF energy plus the change of the band energy by spin-orbit coupling.
    """
    import gpaw
    from ase import Atoms
    from gpaw import GPAW, PW, FermiDirac
    from gpaw.spinorbit import soc_eigenstates

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
        kpts={"size": job["kmesh"], "gamma": True},
        occupations=FermiDirac(job["width"]),
        txt="scf.txt",
    )
    atoms.calc = calc
    energy = atoms.get_potential_energy(force_consistent=True)

    def band_energy(direction: np.ndarray, scale: float) -> float:
        x, y, z = direction / np.linalg.norm(direction)
        theta, phi = np.degrees(np.arccos(np.clip(z, -1, 1))), np.degrees(np.arctan2(y, x))
        return float(soc_eigenstates(calc, scale=scale, theta=theta, phi=phi).calculate_band_energy())

    directions = np.array(job["directions"], dtype=float)
    reference = band_energy(directions[0], 0.0)
    return {
        "converged": True,
        "scf_steps": int(calc.get_number_of_iterations()),
        "code": f"gpaw-{gpaw.__version__}",
        "energy": float(energy),
        "moments": atoms.get_magnetic_moments().tolist(),
        "soc_energies": [float(energy) + band_energy(n, 1.0) - reference for n in directions],
    }


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
