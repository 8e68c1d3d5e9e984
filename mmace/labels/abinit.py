"""Constrained-moment total energies with ABINIT (PAW, PBE): input, programs and data sets, output.

The constraint is ABINIT's Lagrange-multiplier one (`constraint_kind`): the integral of the magnetisation over a
sphere around each carrier is held at its target, and the multiplier is dE/dm. X. Gonze et al., J. Chem. Theory
Comput. 18, 6099 (2022).
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers
from ase.units import Bohr, Hartree
from spglib import get_symmetry_dataset

from ..errors import LabelError, MissingProgramError
from .files import write_text
from .plan import Job

PAW_VARIABLE = "MMACE_PAW"
OUTPUT = "job.abo"
SPHERES = "Integrated electronic and magnetization densities in atomic spheres"


def find_program(command: str = "abinit") -> str:
    """Path of the ABINIT program.

    Raises
    ------
    MissingProgramError
        It is not there.
    """
    path = shutil.which(command)
    if path is None:
        raise MissingProgramError(
            f"the program {command!r} is not installed: get ABINIT 9 (`apt-get install abinit` or "
            "`conda install -c conda-forge abinit`), or name it with --abinit"
        )
    return os.path.abspath(path)


def find_datasets(elements: Sequence[str], folder: str | Path | None, unpacked: str | Path) -> Path:
    """Folder with the GPAW PBE data sets of some elements as `El.GPAW.PBE.xml`.

    They are looked for in `folder`, in the folder that the variable MMACE_PAW names, and in an installed
    `gpaw_data` package; compressed sets are unpacked.

    Parameters
    ----------
    elements : sequence of str
    folder : path, optional
    unpacked : path
        Folder for the unpacked sets.

    Returns
    -------
    Path
        `unpacked`, with one file for each element.

    Raises
    ------
    MissingProgramError
        Names the first element whose data set is missing.
    LabelError
        The set found is another than the one unpacked before.
    """
    unpacked = Path(unpacked)
    places = [Path(place) for place in (folder, os.environ.get(PAW_VARIABLE)) if place]
    package = importlib.util.find_spec("gpaw_data")
    if package is not None:
        places += [Path(place) / "setups" for place in package.submodule_search_locations or ()]
    for element in sorted(set(elements)):
        target = unpacked / f"{element}.GPAW.PBE.xml"
        names = (f"{element}.GPAW.PBE.xml", f"{element}.PBE", f"{element}.PBE.gz")
        found = next((place / name for place in places for name in names if (place / name).is_file()), None)
        if found is None:
            if target.is_file():
                continue
            raise MissingProgramError(
                f"no PAW data set for {element}: `pip install gpaw-data`, or name a folder that holds "
                f"{element}.PBE.gz or {element}.GPAW.PBE.xml with --paw or the variable {PAW_VARIABLE}"
            )
        content = gzip.decompress(found.read_bytes()).decode() if found.suffix == ".gz" else found.read_text()
        if not target.is_file():
            write_text(target, content)
        elif target.read_text() != content:
            raise LabelError(
                f"the PAW data set {str(found)!r} is not the one that {str(target)!r} was made from: take another "
                "--work folder for other data sets"
            )
    return unpacked


def kpoint_mesh(cell: np.ndarray, spacing: float) -> tuple[int, int, int]:
    """Smallest mesh with neighbours no further apart than `spacing` (1/Å, with 2π) that keeps the lattice's symmetry.

    Reciprocal vectors that are not at right angles get equal numbers: a symmetry may mix them.

    Parameters
    ----------
    cell : array, shape=(3, 3)
        Å.
    spacing : float
        1/Å.

    Returns
    -------
    tuple of int, shape=(3,)
    """
    reciprocal = 2 * np.pi * np.linalg.inv(cell).T
    lengths = np.linalg.norm(reciprocal, axis=1)
    mesh = np.maximum(1, np.ceil(lengths / spacing - 1e-6).astype(int))
    directions = reciprocal / lengths[:, None]
    coupled = np.abs(directions @ directions.T) > 1e-6
    for _ in range(2):
        mesh = np.array([mesh[row].max() for row in coupled])
    return int(mesh[0]), int(mesh[1]), int(mesh[2])


def is_antiferromagnet(job: Job) -> bool:
    """Whether a symmetry of the structure turns all moments of a collinear job round.

    One spin then gives the other: ABINIT treats one of the two (`nsppol 1 nspden 2`), and the SCF cannot leave the
    symmetry.
    """
    moments = np.array(job.moments)[:, 2]
    if not np.any(moments):
        return False
    numbers = np.array([atomic_numbers[symbol] for symbol in job.symbols])
    kinds = np.unique(np.stack([numbers, np.round(1e6 * np.abs(moments))]), axis=1, return_inverse=True)[1].ravel()
    cell, places = np.array(job.cell), np.array(job.scaled_positions)
    symmetry = get_symmetry_dataset((cell, places, kinds + 1), 1e-5)
    for rotation, translation in zip(symmetry.rotations, symmetry.translations, strict=True):
        steps = (places @ rotation.T + translation)[:, None] - places
        distances = np.linalg.norm((steps - np.round(steps)) @ cell, axis=2)
        if np.allclose(moments[distances.argmin(axis=1)], -moments, atol=1e-6):
            return True
    return False


def band_count(job: Job, settings: dict[str, Any], carriers: Sequence[str]) -> int:
    """Number of bands that leaves the highest one empty at every k-point.

    ABINIT's own number allows for the sum of the moments alone: where they cancel, partly filled bands are cut off, and
    antiferromagnetic Fe comes out 5 meV/atom wrong.

    Parameters
    ----------
    job : Job
    settings : dict
        `valence`, `noncollinear`.
    carriers : sequence of str

    Returns
    -------
    int
        Of one spin; of two-component spinors in a non-collinear run.
    """
    electrons = sum(settings["valence"][symbol] for symbol in job.symbols)
    filled = (electrons + float(np.linalg.norm(job.moments, axis=1).sum())) / 2
    held = int(np.isin(job.symbols, carriers).sum())
    bands = int(np.ceil(filled - 1e-6)) + 1 + max(2 * held, len(job.symbols))
    return 2 * bands if settings["noncollinear"] and held else bands


def write_input(job: Job, settings: dict[str, Any], carriers: Sequence[str], datasets: str | Path) -> str:
    """ABINIT input of a job.

    Parameters
    ----------
    job : Job
    settings : dict
        `noncollinear` (bool), `ecut`, `pawecutdg`, `ecutsm`, `tsmear` (Hartree), `occopt`, `k_spacing` (1/Å),
        `tolvrs`, `nstep`, `magcon_lambda`, `ratsph` (Bohr) and `valence` (electrons), one for each element, `ratsm`
        (Bohr); optional `kmesh`, and `constrained` (bool, true), without which the moments only start at their targets.
    carriers : sequence of str
        Elements under the constraint.
    datasets : path
        Folder with `El.GPAW.PBE.xml`.

    Returns
    -------
    str
    """
    elements = sorted(set(job.symbols), key=job.symbols.index)
    moments = np.array(job.moments)
    noncollinear = bool(settings["noncollinear"])
    magnetic = [element in carriers for element in elements]
    if not any(magnetic):
        spin = "nsppol 1 nspden 1"
    elif noncollinear:
        spin = "nspinor 2 nspden 4 nsppol 1 kptopt 4 pawspnorb 0"
    else:
        spin = f"nsppol {1 if is_antiferromagnet(job) else 2} nspden 2"
    mesh = settings.get("kmesh") or kpoint_mesh(np.array(job.cell), settings["k_spacing"])

    def block(rows: Any) -> str:
        return "\n  ".join(" ".join(f"{x:.10f}" for x in row) for row in rows)

    lines = [
        f'pp_dirpath "{datasets}"',
        'pseudos "' + ", ".join(f"{element}.GPAW.PBE.xml" for element in elements) + '"',
        f"natom {len(job.symbols)} ntypat {len(elements)}",
        "znucl " + " ".join(str(atomic_numbers[element]) for element in elements),
        "typat " + " ".join(str(1 + elements.index(symbol)) for symbol in job.symbols),
        "acell 3*1.0 angstrom",
        "rprim\n  " + block(job.cell),
        "xred\n  " + block(job.scaled_positions),
        "chkprim 0 chksymtnons 0",
        spin,
    ]
    if any(magnetic):
        lines += [
            "spinat\n  " + block(moments),
            f"ratsm {settings['ratsm']} ratsph " + " ".join(str(settings["ratsph"][element]) for element in elements),
        ]
        if settings.get("constrained", True):
            lines += [
                "constraint_kind " + " ".join("1" if held else "0" for held in magnetic),
                f"magcon_lambda {settings['magcon_lambda']}",
            ]
        else:
            lines += ["prtdensph 1"]
    lines += [
        f"ecut {settings['ecut']} pawecutdg {settings['pawecutdg']} ecutsm {settings['ecutsm']}",
        f"nband {band_count(job, settings, carriers)} occopt {settings['occopt']} tsmear {settings['tsmear']}",
        "ngkpt {} {} {} nshiftk 1 shiftk 0 0 0".format(*mesh),
        f"fftalg 401 iscf 7 tolvrs {settings['tolvrs']} nstep {settings['nstep']}",
        "prtwf 0 prtden 0 prteig 0 prtebands 0 prtgsr 0",
    ]
    return "\n".join(lines) + "\n"


def parse_output(text: str, n: int) -> dict[str, Any]:
    """What a finished ABINIT output says.

    Parameters
    ----------
    text : str
    n : int
        Number of atoms.

    Returns
    -------
    dict
        `converged` (bool), `scf_steps` (int), `code` (str), `energy` (free energy, eV), `forces` (n, 3) eV/Å,
        `stress` (6,) eV/Å³ in ASE's sign and order, with spin `moments` (n, 3) µB in the spheres, and under a
        constraint `magnetic_forces` (n, 3) eV/µB.

    Raises
    ------
    LabelError
        A quantity is not in the output.
    """
    version = re.search(r"\.Version\s+(\S+)\s+of ABINIT", text)
    tail = text[text.rfind("-outvars: echo values of variables after computation") :]
    energy = re.search(r"^\s+etotal\s+(\S+)", tail, re.M)
    if energy is None or "== END DATASET(S) ==" not in text:
        raise LabelError("the ABINIT output ends before its results; look at the job's log")
    result: dict[str, Any] = {
        "code": "abinit-" + (version[1] if version else "unknown"),
        "converged": "=>converged" in text,
        "scf_steps": len(re.findall(r"^ ETOT", text, re.M)),
        "energy": float(energy[1]) * Hartree,
        "forces": (_table(tail, "fcart", n, 3) * (Hartree / Bohr)).tolist(),
    }
    stress = _table(tail, "strten", 1, 6)[0] * (Hartree / Bohr**3)
    result["stress"] = stress.tolist()
    if SPHERES in text:
        result["moments"] = _sphere_moments(text, n).tolist()
    if re.search(r"^\s+grspin\s", tail, re.M):
        result["magnetic_forces"] = (-_table(tail, "grspin", n, 3) * Hartree).tolist()
    return result


def _sphere_moments(text: str, n: int) -> np.ndarray:
    """Moments (n, 3) in the spheres, µB, from the table that ABINIT prints after the SCF."""
    table = text[text.rfind(SPHERES) :]
    moments = np.zeros((n, 3))
    noncollinear = "mag(x)" in table[: table.find("Gradient")]
    for atom in range(n):
        row = re.search(rf"^\s+{atom + 1}((?:\s+-?\d+\.\d+){{5}})", table, re.M)
        if row is None:
            raise LabelError(f"the ABINIT output gives no moment for atom {atom + 1}")
        numbers = [float(x) for x in row[1].split()]
        if noncollinear:
            moments[atom] = numbers[2:5]
        else:
            moments[atom, 2] = numbers[4]
    return moments


def _table(text: str, key: str, rows: int, columns: int) -> np.ndarray:
    """Numbers that follow a variable's name in ABINIT's echo."""
    match = re.search(rf"^\s+{key}\s+((?:[-+]?\d\.\d+E[-+]\d+\s+)+)", text, re.M)
    numbers = match[1].split() if match else []
    if len(numbers) != rows * columns:
        raise LabelError(f"the ABINIT output has {len(numbers)} numbers for {key}, not {rows * columns}")
    return np.array(numbers, dtype=float).reshape(rows, columns)
