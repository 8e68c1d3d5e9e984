"""Phonons with moments that are held, follow, or point anywhere: bands, densities, thermal properties, shifts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from ase import Atoms
from numpy.typing import NDArray
from phonopy import Phonopy
from phonopy.qha.core import QHA
from phonopy.qha.eos import get_eos
from scipy.optimize import least_squares, linear_sum_assignment

from .base import Options, Progress, Property, Row, option, spread_of, variable
from .errors import MomentError, OptionError, OutputError, StructureError
from .files import check_writable, write_whole
from .lattice import (
    FILES,
    METHODS,
    Lattice,
    Method,
    Response,
    ase_atoms,
    check_folder,
    check_symmetry,
    edge,
    operations,
    primitive_matrix,
    random_moments,
    read_setup,
    solve,
    supercell_matrix,
    unit_index,
    write_files,
    write_force_sets,
)
from .protocol import ZERO_MOMENT, MomentMode, SpinCalculator, moments_of, with_moments
from .structures import antiferromagnetic_signs, read_moments
from .symmetry import Pattern, band_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

IMAGINARY = 1e-2
"""A frequency below minus this, in THz, is imaginary; phonopy writes such frequencies as negative numbers."""
STILL = 1e-3
"""Modes below this, in THz, take no part in thermal properties: the acoustic modes at Γ."""
LEAST_VOLUMES = 5
"""Fewest volumes that the four parameters of an equation of state are fitted to."""
DEGENERATE = 1e-4
"""Modes closer than this, in THz, are mixed before they are compared."""
DOS_STEP = 0.05
SLOPE_STEP = 0.01
LISTED = 6
KJ_PER_MOL = 96.48533212
"""kJ/mol in one eV."""
SECOND = ("fm", "afm", "nm", "pm")


@dataclass(frozen=True)
class PhononOptions(Options):
    """Options of the phonons.

    Parameters
    ----------
    dim : the supercell, three repeats or the nine integers of a matrix; none makes it as large as `length` says.
    length : least height of the supercell in Å where dim is not given.
    max_atoms : largest supercell.
    method : where force constants come from; ``auto`` is the Hessian where the calculator has one.
    distance : length of a displacement, Å.
    clamp : hold the moments of the undisplaced crystal while atoms are displaced.
    paramagnetic : random states of the moments that force constants are averaged over; 0 keeps the order.
    seed : of the random states.
    second : another order, whose frequencies are compared.
    slopes : compute the change of frequencies with |m| of each element.
    volumes : volumes of the quasi-harmonic approximation; 0 leaves it out.
    strain : largest expansion among these volumes, relative; the largest compression is half of it.
    path : special points of the bands.
    points : wave vectors along the path.
    mesh : wave vectors per direction of the mesh of densities and thermal properties.
    t_max, t_step : temperatures, K.
    phonopy : folder for phonopy's files.
    source : a file of phonopy's with displacements, in place of a structure.
    """

    dim: tuple[int, ...] = option((), "supercell, three repeats or nine integers (default: from length)")
    length: float = option(10.0, "least height of the supercell in Å where dim is not given")
    max_atoms: int = option(1000, "largest supercell, in atoms")
    method: str = option("auto", "where force constants come from", ("auto", *METHODS, "both"))
    distance: float = option(0.01, "length of a displacement, Å")
    clamp: bool = option(False, "hold the moments of the undisplaced crystal while atoms are displaced")
    paramagnetic: int = option(0, "random states of the moments to average force constants over; 0 keeps the order")
    seed: int = option(0, "seed of the random states")
    second: str = option("", f"another order to compare: {', '.join(SECOND)}, or a file of moments")
    slopes: bool = option(False, "compute the change of frequencies with |m| of each element")
    volumes: int = option(0, "volumes of the quasi-harmonic approximation, 5 or more; 0 leaves it out")
    strain: float = option(0.08, "largest expansion among them, relative; the largest compression is half of it")
    path: str = option("auto", "special points of the bands; auto is that of seekpath")
    points: int = option(101, "wave vectors along the path")
    mesh: int = option(16, "wave vectors per direction of the mesh of densities and thermal properties")
    t_max: float = option(1000.0, "highest temperature, K")
    t_step: float = option(10.0, "step of temperature, K")
    phonopy: str = option("", "folder to write phonopy's files to")
    source: str = field(
        default="",
        metadata={"help": "phonopy_disp.yaml to compute forces for, in place of a structure", "flag": "--from"},
    )

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for name, low, high in (
            ("length", 1.0, 200.0),
            ("max_atoms", 1, 100000),
            ("distance", 1e-5, 0.5),
            ("points", 2, 20000),
            ("mesh", 1, 200),
            ("strain", 1e-4, 0.3),
            ("t_max", 0.0, 1e5),
            ("t_step", 1e-3, 1e5),
        ):
            if not low <= getattr(self, name) <= high:
                raise OptionError(f"{name} cannot be {getattr(self, name):g}; it lies between {low:g} and {high:g}")
        if self.paramagnetic != 0 and not 2 <= self.paramagnetic <= 10000:
            raise OptionError(f"paramagnetic cannot be {self.paramagnetic}; it is 0, or at least 2 states")
        if self.volumes != 0 and not LEAST_VOLUMES <= self.volumes <= 51:
            raise OptionError(f"volumes cannot be {self.volumes}; it is 0, or lies between {LEAST_VOLUMES} and 51")
        if self.source and self.dim:
            raise OptionError("the supercell stands in the file of phonopy; leave dim out")


@dataclass(frozen=True)
class Plan:
    """What committee members share.

    Parameters
    ----------
    lattice : cells.
    first : moments to start from, shape (N, 3), µB; None for random ones.
    second : those of the order that is compared, or None.
    compared : whether there is a second order.
    lengths : |m| of random moments, shape (N,), µB.
    order : displacements and number of operations that go with the first order.
    """

    lattice: Lattice
    first: Array | None
    second: Array | None
    compared: bool
    lengths: Array
    operations: int


@dataclass(frozen=True)
class Harmonic:
    """Force constants of one order.

    Parameters
    ----------
    phonon : phonopy's object with forces and force constants.
    moments : of the unit cell, shape (N, 3), µB; for random moments their lengths along z.
    states : force constants of each random state, or none.
    """

    phonon: Phonopy
    moments: Array
    states: list[Array]


class Phonon(Property):
    """Phonons through phonopy, from displaced supercells or the Hessian of a magnetic calculator."""

    name = "phonon"
    title = "phonons"
    options_type: ClassVar[type[Options]] = PhononOptions
    soc = False
    structure_option = "source"

    def __init__(self, options: Options | None = None, plan: Plan | None = None, **named: Any) -> None:
        super().__init__(options, **named)
        self._plan = plan

    def written(self) -> list[str]:
        """Return phonopy's folder, or the forces beside the displacements that it made."""
        if self.options.phonopy:
            return [self.options.phonopy]
        return [str(Path(self.options.source).parent / FILES[1])] if self.options.source else []

    def check(self, atoms: Atoms, calculator: SpinCalculator) -> None:
        """Refuse options that do not fit the moments, and places that files cannot go to."""
        super().check(atoms, calculator)
        if self.options.phonopy:
            check_folder(self.options.phonopy)
        elif self.options.source:
            forces = self.written()[0]
            check_writable(forces)
            if Path(forces).exists():
                raise OutputError(f"'{forces}' is there already; move it away, or name a folder with phonopy")
        carrying = bool(np.linalg.norm(moments_of(atoms), axis=1).max() > ZERO_MOMENT)
        random = self.options.paramagnetic > 0
        if self.options.second == "pm" and not random:
            raise OptionError("a paramagnetic second order needs random states; say how many with paramagnetic")
        if not carrying and (random or self.options.slopes or self.options.second in ("fm", "afm", "pm")):
            raise MomentError("no atom carries a moment, so there are no orders to compare; give moments in µB")
        if random and self.mode(calculator) == "full":
            raise OptionError("moments relaxed in full would leave their random directions; relax magnitudes instead")
        if self.options.volumes and self.options.source:
            raise OptionError("displacements in a file belong to one volume; leave volumes out")

    def prepare(self, atoms: Atoms, members: Sequence[SpinCalculator], progress: Progress) -> "Phonon":
        """Fix cells, displacements and starting moments."""
        given = moments_of(atoms)
        random_first = self.options.paramagnetic > 0 and self.options.second != "pm"
        soc = members[0].soc is not False
        second = self._second(atoms, given)
        patterns = ([] if random_first else [given]) + ([] if second is None else [second])
        symprec = self.options.symprec
        if self.options.source:
            setup = read_setup(self.options.source, symprec)
            lattice, wanted = setup.lattice, setup.operations
            same = len(lattice.atoms) == len(atoms) and np.array_equal(lattice.atoms.numbers, atoms.numbers)
            if not same or np.abs(lattice.atoms.positions - atoms.positions).max() > symprec:
                raise StructureError(f"the structure is not that of '{self.options.source}'; leave it out")
        else:
            lattice = Lattice(
                atoms,
                supercell_matrix(atoms, self.options.dim, self.options.length, self.options.max_atoms),
                primitive_matrix(atoms, patterns, symprec, self.options.mag_symprec),
                symprec,
                distance=self.options.distance,
                mag_symprec=self.options.mag_symprec,
            ).compact([*patterns, *([None] if self.options.paramagnetic else [])], soc)
            wanted = 0
        first = None if random_first else given
        if not random_first:
            phonon = lattice.displaced(first, soc)
            wanted = max(wanted, operations(phonon))
            check_symmetry(phonon, wanted)
            lattice = replace(lattice, dataset=phonon.dataset)
        lengths = np.linalg.norm(given, axis=1)
        plan = Plan(lattice, first, second, bool(self.options.second), lengths, wanted)
        return Phonon(self.options, plan)

    def _second(self, atoms: Atoms, given: Array) -> Array | None:
        """Return the moments of the order to compare with, None where there is none or it is random."""
        wanted = self.options.second
        if wanted in ("", "pm"):
            return None
        if wanted == "nm":
            return np.zeros_like(given)
        if wanted in ("fm", "afm"):
            lengths = np.linalg.norm(given, axis=1)
            signs = np.ones(len(atoms)) if wanted == "fm" else antiferromagnetic_signs(atoms, lengths)
            return np.asarray((signs * lengths)[:, None] * Pattern.of(given).axis)
        if not Path(wanted).is_file():
            raise OptionError(f"the second order cannot be '{wanted}'; it is {', '.join(SECOND)}, or a file of moments")
        return read_moments(wanted, atoms)

    def compute(self, atoms: Atoms, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Compute force constants and everything that follows from them with one model."""
        if self._plan is None:
            raise OptionError("the cells are missing; call run, which makes them")
        plan, mode = self._plan, self.mode(calculator)
        method = self._method(calculator)
        work = Work(self.options, calculator, mode, method, progress)
        found = work.harmonic(plan.lattice, plan.first, plan.lengths, plan.operations, "force constants")
        q, position, labels = band_path(
            ase_atoms(found.phonon.primitive), self.options.path, self.options.points, self.options.symprec
        )
        data, coords = self._bands(found, q, position)
        if self.options.method == "both":
            other = Work(self.options, calculator, mode, "displacements", progress)
            twin = other.harmonic(plan.lattice, plan.first, plan.lengths, plan.operations, "displacements")
            difference = np.abs(frequencies(twin.phonon, q) - frequencies(found.phonon, q)).max()
            data["method_difference"] = variable(
                (), difference, "THz", "largest difference of frequencies by displacements and by the Hessian"
            )
        density, thermal, mesh = self._mesh(found.phonon)
        data.update(density)
        data.update(thermal)
        coords.update(mesh)
        if found.states:
            data["frequency_error"] = variable(
                ("wave", "branch"), jackknife(found, q), "THz", "standard error of the mean over random states"
            )
        if plan.compared:
            data.update(self._compare(work, plan, found, q))
        if self.options.slopes:
            slopes, elements = self._slopes(work, plan, found, q)
            data["frequency_slope"] = variable(
                ("element", "wave", "branch"),
                slopes,
                "THz/µB",
                "change of frequency with |m| of an element, moments held",
            )
            coords["element"] = variable("element", np.array(elements), "1", "chemical symbol")
        if self.options.volumes:
            quasi, volumes = self._quasi_harmonic(work, plan)
            data.update(quasi)
            coords["volume_point"] = variable("volume_point", volumes, "Å³/atom", "volume")
        attrs: dict[str, Any] = {
            "method": method,
            "moments_follow": "fixed" if self.options.clamp else mode,
            "supercell_matrix": plan.lattice.supercell_matrix.tolist(),
            "supercell_atoms": len(found.phonon.supercell),
            "primitive_matrix": plan.lattice.primitive_matrix.tolist(),
            "primitive_cell": np.asarray(found.phonon.primitive.cell).tolist(),
            "symmetry_operations": operations(found.phonon),
            "displacements": len(found.phonon.forces),
            "order": "paramagnetic" if plan.first is None else "given",
            "path_labels": [list(x) for x in labels],
        }
        return xr.Dataset(data, coords, attrs)

    def _method(self, calculator: SpinCalculator) -> Method:
        if self.options.method == "displacements":
            return "displacements"
        return "hessian" if self.options.method in ("hessian", "both") or calculator.has("hessian") else "displacements"

    def _bands(self, found: Harmonic, q: Array, position: Array) -> tuple[dict[str, Any], dict[str, Any]]:
        phonon = found.phonon
        primitive = phonon.primitive
        constants = np.asarray(phonon.force_constants)
        if len(constants) == len(phonon.supercell):
            constants = constants[primitive.p2s_map]
        values = frequencies(phonon, q)
        data = {
            "frequency": variable(("wave", "branch"), values, "THz", "frequency, negative where imaginary"),
            "force_constants": variable(
                ("site", "supercell_atom", "xyz", "xyz_2"), constants, "eV/Å²", "force constants, in phonopy's order"
            ),
            "forces": variable(
                ("displacement", "supercell_atom", "xyz"),
                phonon.forces,
                "eV/Å",
                "forces that the displacements cause, as in FORCE_SETS",
            ),
            "moments": variable(("atom", "xyz"), found.moments, "µB", "moments of the unit cell, undisplaced"),
            "edge": variable((), edge(phonon), "1", "force constants half a supercell away, relative to the largest"),
        }
        axes = np.array(["x", "y", "z"])
        coords = {
            "q": variable(("wave", "xyz"), q, "1", "wave vector in the reciprocal lattice of the primitive cell"),
            "position": variable("wave", position, "1/Å", "place along the path"),
            "branch": variable("branch", np.arange(values.shape[1]), "1", "branch, by frequency"),
            "site": variable("site", np.arange(len(primitive)), "1", "atom of the primitive cell"),
            "site_element": variable("site", np.array(primitive.symbols), "1", "chemical symbol"),
            "atom": variable("atom", np.arange(len(found.moments)), "1", "atom of the unit cell"),
            "xyz": variable("xyz", axes, "1", "Cartesian axis, or lattice vector"),
            "xyz_2": variable("xyz_2", axes, "1", "Cartesian axis of the second atom"),
        }
        return data, coords

    def _temperatures(self) -> Array:
        return np.arange(0.0, self.options.t_max + 1e-6, self.options.t_step)

    def _mesh(self, phonon: Phonopy) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return density of states, thermal properties and the mesh they come from."""
        temperatures, count = self._temperatures(), len(phonon.primitive)
        free, entropy, capacity, zero = thermal_properties(phonon, self.options.mesh, temperatures)
        mesh = phonon.mesh
        low = np.floor(min(float(mesh.frequencies.min()), 0.0) / DOS_STEP - 1) * DOS_STEP
        high = np.ceil(float(mesh.frequencies.max()) / DOS_STEP + 1) * DOS_STEP
        phonon.run_total_dos(freq_min=low, freq_max=high + DOS_STEP / 2, freq_pitch=DOS_STEP)
        dos = phonon.get_total_dos_dict()
        grid = np.round(np.asarray(dos["frequency_points"]) / DOS_STEP) * DOS_STEP
        density = {
            "dos": variable("dos_frequency", dos["total_dos"], "1/THz", "density of states per primitive cell"),
            "mesh_frequency": variable(
                ("mesh_wave", "branch"), mesh.frequencies, "THz", "frequency on the irreducible mesh"
            ),
        }
        thermal = {
            "zero_point": variable((), zero / count * 1e3, "meV/atom", "zero-point energy"),
            "free_energy": variable("temperature", free / count * 1e3, "meV/atom", "vibrational free energy"),
            "entropy": variable("temperature", entropy / count, "J/K/mol", "vibrational entropy per mole of atoms"),
            "heat_capacity": variable(
                "temperature", capacity / count, "J/K/mol", "heat capacity at fixed volume per mole of atoms"
            ),
        }
        coords = {
            "dos_frequency": variable("dos_frequency", grid, "THz", "frequency"),
            "temperature": variable("temperature", temperatures, "K", "temperature"),
            "mesh_q": variable(
                ("mesh_wave", "xyz"), mesh.qpoints, "1", "wave vector of the mesh, reciprocal lattice units"
            ),
            "mesh_weight": variable("mesh_wave", mesh.weights, "1", "wave vectors that one stands for"),
        }
        return density, thermal, coords

    def _compare(self, work: "Work", plan: Plan, found: Harmonic, q: Array) -> dict[str, Any]:
        """Return frequencies of the second order and the shift of each mode of the first."""
        lattice = replace(plan.lattice, dataset=None)
        other = work.harmonic(lattice, plan.second, plan.lengths, 0, "second order")
        shifts = mode_shifts(found.phonon, other.phonon, q)
        data: dict[str, Any] = {}
        if other.states:
            data["frequency_second_error"] = variable(
                ("wave", "branch"), jackknife(other, q), "THz", "standard error of the second order over random states"
            )
        return {
            **data,
            "frequency_second": variable(
                ("wave", "branch"), frequencies(other.phonon, q), "THz", "frequency in the second order"
            ),
            "frequency_shift": variable(
                ("wave", "branch"), shifts, "THz", "frequency in the second order less that in the first, same mode"
            ),
            "moments_second": variable(
                ("atom", "xyz"), other.moments, "µB", "moments of the unit cell in the second order, undisplaced"
            ),
        }

    def _slopes(self, work: "Work", plan: Plan, found: Harmonic, q: Array) -> tuple[Array, list[str]]:
        """Return ∂ω/∂|m| of each element that carries moments, shape (elements, Q, branches), THz/µB."""
        symbols = np.array(plan.lattice.atoms.get_chemical_symbols())
        lengths = np.linalg.norm(found.moments, axis=1)
        carrying = lengths > SLOPE_STEP
        elements = [str(s) for s in dict.fromkeys(symbols[carrying].tolist())]
        held = Work(self.options, work.calculator, "fixed", work.method, work.progress)
        unit = found.moments / np.where(carrying, lengths, 1.0)[:, None]
        slopes = []
        for element in elements:
            moved = (carrying & (symbols == element)).astype(float)
            matrices = []
            for sign in (1, -1):
                changed = lengths + sign * SLOPE_STEP * moved
                start = None if plan.first is None else unit * changed[:, None]
                part = held.harmonic(plan.lattice, start, changed, plan.operations, f"slope with m of {element}")
                matrices.append(dynamical_matrices(part.phonon, q))
            slopes.append(mode_slopes(found.phonon, (matrices[0] - matrices[1]) / (2 * SLOPE_STEP), q))
        return np.array(slopes), elements

    def _quasi_harmonic(self, work: "Work", plan: Plan) -> tuple[dict[str, Any], Array]:
        """Return V(T), expansion, bulk modulus and C_p from free energies at several volumes.

        Volumes with imaginary modes, and those beyond them, are left out. All is NaN where fewer than five remain,
        and where V(T) lies outside the volumes that remain.
        """
        scales = np.linspace(1 - self.options.strain / 2, 1 + self.options.strain, self.options.volumes)
        step = self.options.t_step
        temperatures = np.append(self._temperatures(), self._temperatures()[-1] + step * np.array([1.0, 2.0, 3.0]))
        volumes, energies, thermal, lowest = [], [], [], []
        for scale in scales:
            lattice = replace(plan.lattice, dataset=None).scaled(scale ** (1 / 3))
            found = work.harmonic(lattice, plan.first, plan.lengths, plan.operations, f"volume {scale:.3f}")
            count, cells = len(found.phonon.primitive), len(lattice.atoms)
            volumes.append(lattice.atoms.get_volume() / cells)
            energies.append(work.energy(lattice, plan, found) / cells)
            thermal.append([x / count for x in thermal_properties(found.phonon, self.options.mesh, temperatures)[:3]])
            lowest.append(float(found.phonon.mesh.frequencies.min()))
        free, entropy, capacity = (np.array([t[k] for t in thermal]).T for k in range(3))
        count = len(self._temperatures())
        keys = ("volume", "expansion", "bulk_modulus", "heat_capacity_p", "gibbs")
        values = {key: np.full(count, np.nan) for key in keys}
        used = _stable_run(energies, lowest)
        if used.stop - used.start >= LEAST_VOLUMES:
            quasi = QHA(
                volumes[used],
                energies[used],
                temperatures,
                capacity[:, used],
                entropy[:, used],
                free[:, used] * KJ_PER_MOL,
                eos="vinet",
            )
            if _has_curves(quasi):
                for key, attribute in (
                    ("volume", "volume_temperature"),
                    ("expansion", "thermal_expansion"),
                    ("bulk_modulus", "bulk_modulus_temperature"),
                    ("heat_capacity_p", "heat_capacity_P_polyfit"),
                    ("gibbs", "gibbs_temperature"),
                ):
                    part = np.asarray(getattr(quasi, attribute), dtype=float)[:count]
                    values[key][: len(part)] = part
                # phonopy's fit stops within 1e-6 of the volume, too far for differences over a step of temperature
                exact = _equilibrium_volumes(volumes[used], np.add(free[:, used], energies[used]))
                values["volume"][:] = exact[:count]
                slope = (exact[2:] - exact[:-2]) / (temperatures[2:] - temperatures[:-2]) / exact[1:-1]
                values["expansion"][:] = np.concatenate([[0.0], slope])[:count]
                outside = (values["volume"] < volumes[used][0]) | (values["volume"] > volumes[used][-1])
                for part in values.values():
                    part[outside] = np.nan
        label = ("temperature",)
        return {
            "static_energy": variable("volume_point", energies, "eV/atom", "energy without vibrations"),
            "lowest_of_volume": variable("volume_point", lowest, "THz", "lowest frequency on the mesh"),
            "volume": variable(label, values["volume"], "Å³/atom", "volume at zero pressure"),
            "expansion": variable(label, values["expansion"], "1/K", "volumetric thermal expansion"),
            "bulk_modulus": variable(label, values["bulk_modulus"], "GPa", "isothermal bulk modulus"),
            "heat_capacity_p": variable(
                label, values["heat_capacity_p"], "J/K/mol", "heat capacity at zero pressure per mole of atoms"
            ),
            "gibbs": variable(label, values["gibbs"], "eV/atom", "Gibbs free energy at zero pressure"),
        }, np.array(volumes)

    def align(self, parts: list[xr.Dataset]) -> list[xr.Dataset]:
        """Bring the members' densities to one range of frequencies."""
        low = min(float(p["dos_frequency"].min()) for p in parts)
        high = max(float(p["dos_frequency"].max()) for p in parts)
        grid = DOS_STEP * np.arange(round(low / DOS_STEP), round(high / DOS_STEP) + 1)
        return [p.reindex(dos_frequency=grid, method="nearest", tolerance=DOS_STEP / 10, fill_value=0.0) for p in parts]

    def finish(self, dataset: xr.Dataset, calculator: SpinCalculator) -> xr.Dataset:
        """Name the lowest mode of every model, and write phonopy's files."""
        committee = "member" in dataset.coords
        tail = "_member" if committee else ""
        parts = [dataset[f"{name}{tail}"].values for name in ("frequency", "mesh_frequency")]
        path, mesh = parts if committee else [x[None] for x in parts]
        everything = np.concatenate([path[:, :, 0], mesh[:, :, 0]], axis=1)
        waves = np.concatenate([dataset["q"].values, dataset["mesh_q"].values])
        places, lowest = waves[everything.argmin(axis=1)], everything.min(axis=1)
        weights = dataset["mesh_weight"].values
        share = (mesh < -IMAGINARY).mean(axis=2) @ weights / weights.sum()
        for name, values, unit, text in (
            ("lowest", lowest, "THz", "lowest frequency of path and mesh"),
            ("imaginary_share", share, "1", "share of imaginary modes on the mesh"),
        ):
            dataset[name] = variable((), values.mean(), unit, text)
            if committee:
                dataset[f"{name}_std"] = variable((), values.std(ddof=1), unit, f"{text}, committee spread")
                dataset[f"{name}_member"] = variable("member", values, unit, f"{text}, per member")
        worst, unstable = int(lowest.argmin()), int((lowest < -IMAGINARY).sum())
        text = "wave vector of the lowest frequency, reciprocal lattice units"
        dataset["lowest_q"] = variable(
            "xyz", places[worst], "1", text + (", of the lowest member" if committee else "")
        )
        if committee:
            dataset["lowest_q_member"] = variable(("member", "xyz"), places, "1", f"{text}, per member")
        dataset["unstable_members"] = variable((), unstable, "1", "models with imaginary modes")
        if unstable:
            place = ", ".join(f"{x:.3g}" for x in places[worst])
            who, where = "imaginary modes", ""
            if committee:
                verb, those = ("has", "this member") if unstable == 1 else ("have", "these members")
                who = f"{unstable} of the committee's {len(lowest)} members {verb} imaginary modes"
                where = "in all of them " if unstable == len(lowest) else f"in {those} "
            dataset.attrs["note"] = (
                f"{who}, the lowest {lowest[worst]:.3g} THz at q = ({place}): {where}this order of this crystal is no "
                "minimum of the energy; thermal properties leave them out"
            )
        elif "volume" in dataset and not np.isfinite(dataset["volume"].values).all():
            dataset.attrs["note"] = (
                "V(T) leaves the range of volumes without imaginary modes above some temperature; there the "
                "quasi-harmonic results are left out"
            )
        if self._plan is not None:
            self._write(dataset, calculator, self._plan)
        return dataset

    def _write(self, dataset: xr.Dataset, calculator: SpinCalculator, plan: Plan) -> None:
        soc = calculator.soc is not False

        def restored(forces: Array, moments: Array) -> Phonopy:
            return solve(plan.lattice.displaced(None if plan.first is None else moments, soc), forces)

        mean = restored(dataset["forces"].values, dataset["moments"].values)
        if self.options.phonopy:
            phonons = {"": mean}
            if "forces_member" in dataset:
                for k in range(dataset.sizes["member"]):
                    values = (dataset[f"{name}_member"].values[k] for name in ("forces", "moments"))
                    phonons[f"member-{k + 1}"] = restored(*values)
            write_files(phonons, self.options.phonopy)
        elif self.options.source:
            write_whole(self.written()[0], lambda path: write_force_sets(mean, path))

    def summary(self, dataset: xr.Dataset) -> list[Row]:
        """Return extremes, thermal properties and shifts as a short table."""
        attrs = dataset.attrs
        rows = [
            Row("supercell", f"{attrs['supercell_atoms']} atoms"),
            Row("force constants", f"{attrs['method']}, {attrs['displacements']} displacements"),
            Row("moments while atoms move", "held" if attrs["moments_follow"] == "fixed" else attrs["moments_follow"]),
        ]
        if "method_difference" in dataset:
            rows.append(_row(dataset, "method_difference", "displacements against Hessian"))
        top = int(np.argmax(dataset["frequency"].values[:, -1]))
        spread = None if "frequency_std" not in dataset else float(dataset["frequency_std"][top, -1])
        rows.append(Row("highest frequency", float(dataset["frequency"][top, -1]), "THz", spread))
        place = ", ".join(f"{x:.3g}" for x in dataset["lowest_q"].values)
        rows.append(_row(dataset, "lowest", f"lowest frequency, q = ({place})", "lowest frequency"))
        if "member" in dataset.coords and int(dataset["unstable_members"]):
            count = f"{int(dataset['unstable_members'])} of {dataset.sizes['member']}"
            rows.append(Row("members with imaginary modes", count))
        if float(dataset["imaginary_share"]) > 0:
            share = spread_of(dataset, "imaginary_share")
            rows.append(
                Row(
                    "imaginary modes of the mesh",
                    100 * float(dataset["imaginary_share"]),
                    "%",
                    None if share is None else 100 * share,
                )
            )
        for key, label in (("frequency_error", ""), ("frequency_second_error", " of the second order")):
            if key in dataset:
                rows.append(Row(f"largest standard error{label}", float(dataset[key].max()), "THz"))
        rows.append(_row(dataset, "zero_point", "zero-point energy"))
        near = float(dataset["temperature"].sel(temperature=300.0, method="nearest"))
        for key, label in (("free_energy", "F"), ("entropy", "S"), ("heat_capacity", "C_v")):
            rows.append(_row(dataset, key, f"{label}, {near:g} K", temperature=near))
        if "frequency_shift" in dataset:
            flat = np.abs(dataset["frequency_shift"].values)
            wave, branch = np.unravel_index(int(flat.argmax()), flat.shape)
            q = ", ".join(f"{x:.3g}" for x in dataset["q"].values[wave])
            spread = (
                None if "frequency_shift_std" not in dataset else float(dataset["frequency_shift_std"][wave, branch])
            )
            shift = float(dataset["frequency_shift"][wave, branch])
            rows.append(Row(f"largest shift, q = ({q})", shift, "THz", spread, "largest shift"))
            rows.extend(_centre_shifts(dataset))
        if "frequency_slope" in dataset:
            for k, element in enumerate(dataset["element"].values):
                slope = dataset["frequency_slope"].values[k]
                wave, branch = np.unravel_index(int(np.abs(slope).argmax()), slope.shape)
                q = ", ".join(f"{x:.3g}" for x in dataset["q"].values[wave])
                one, key = dataset.isel(wave=wave, branch=branch, element=k), f"largest ∂ω/∂m of {element}"
                rows.append(_row(one, "frequency_slope", f"{key}, q = ({q})", key))
        if "volume" in dataset:
            for key, label in (("volume", "V"), ("expansion", "expansion"), ("bulk_modulus", "B")):
                rows.append(_row(dataset, key, f"{label}, {near:g} K", temperature=near))
        rows.append(_row(dataset, "edge", "force constants at the edge"))
        return rows

    def plot(self, dataset: xr.Dataset) -> "Figure":
        """Draw bands, density of states and heat capacity."""
        from .plot import plot_phonon

        return plot_phonon(dataset)


def _centre_shifts(dataset: xr.Dataset) -> list[Row]:
    """Return the shifts of the optical modes at Γ, one row for each frequency."""
    centre = np.flatnonzero(np.abs(dataset["q"].values).max(axis=1) < 1e-9)
    if not len(centre):
        return []
    values = dataset["frequency"].values[centre[0]]
    rows: dict[str, Row] = {}
    for branch in np.flatnonzero(np.abs(values) > IMAGINARY):
        shift = float(dataset["frequency_shift"][centre[0], branch])
        spread = None
        if "frequency_shift_std" in dataset:
            spread = float(dataset["frequency_shift_std"][centre[0], branch])
        name = f"{values[branch]:.3f} {shift:.3f}"
        label, key = f"shift of {values[branch]:.3f} THz at Γ", f"shift at Γ, mode {len(rows) + 1}"
        rows.setdefault(name, Row(label, shift, "THz", spread, key))
    return list(rows.values())[:LISTED]


def _row(dataset: xr.Dataset, name: str, label: str, key: str = "", **where: Any) -> Row:
    value = dataset[name].sel(**where)
    return Row(label, float(value), str(dataset[name].attrs["units"]), spread_of(dataset, name, **where), key)


@dataclass(frozen=True)
class Work:
    """Computes force constants of one model.

    Parameters
    ----------
    options : the property's.
    calculator : a single model.
    mode : how moments relax; with `clamp` they are relaxed before atoms move, and held then.
    method : where force constants come from.
    progress : to be told about finished parts.
    """

    options: Any
    calculator: SpinCalculator
    mode: MomentMode
    method: Method
    progress: Progress

    def harmonic(self, lattice: Lattice, start: Array | None, lengths: Array, wanted: int, stage: str) -> Harmonic:
        """Return force constants of an order, or averaged over random states.

        Parameters
        ----------
        lattice : cells, with displacements where they are fixed already.
        start : moments of the unit cell to start from, shape (N, 3), µB; None for random directions.
        lengths : |m| of random moments, shape (N,), µB.
        wanted : symmetry operations that the displacements were made for.
        stage : what progress is told.
        """
        if start is None:
            return self._random(lattice, lengths, stage)
        soc = self.calculator.soc is not False
        moments = self.calculator.relax_moments([with_moments(lattice.atoms, start)], self.mode)[0]
        phonon = lattice.displaced(moments, soc)
        check_symmetry(phonon, wanted)
        forces = self._response(stage).forces(phonon, moments[unit_index(phonon)])
        return Harmonic(solve(phonon, forces), moments, [])

    def _response(self, stage: str) -> Response:
        follow: MomentMode = "fixed" if self.options.clamp else self.mode
        return Response(self.calculator, follow, self.method, lambda done, total: self.progress(stage, done, total))

    def _states(self, phonon: Phonopy, lengths: Array) -> list[Array]:
        """Return random states of the supercell, each (N, 3) in µB, magnitudes relaxed where that is asked for."""
        rng = np.random.default_rng(self.options.seed)
        cell, everywhere = ase_atoms(phonon.supercell), lengths[unit_index(phonon)]
        starts = [random_moments(everywhere, rng) for _ in range(self.options.paramagnetic)]
        return [self.calculator.relax_moments([with_moments(cell, m)], self.mode)[0] for m in starts]

    def _random(self, lattice: Lattice, lengths: Array, stage: str) -> Harmonic:
        phonon = lattice.displaced(None, soc=False)
        states = self._states(phonon, lengths)
        response = self._response(stage)
        forces = []
        for k, moments in enumerate(states):
            self.progress(stage, k, len(states))
            forces.append(replace(response, tell=lambda done, total: None).forces(phonon, moments))
        self.progress(stage, len(states), len(states))
        index = unit_index(phonon)
        mean = np.linalg.norm(np.array(states), axis=2).mean(axis=0)
        unit = np.array([mean[index == k].mean() for k in range(len(lattice.atoms))])
        constants = [np.asarray(solve(lattice.displaced(None, soc=False), f).force_constants) for f in forces]
        moments = np.stack([np.zeros_like(unit), np.zeros_like(unit), unit], axis=1)
        return Harmonic(solve(phonon, np.mean(forces, axis=0)), moments, constants)

    def energy(self, lattice: Lattice, plan: Plan, found: Harmonic) -> float:
        """Return the energy of the unit cell in eV, of random moments the mean over their states."""
        if plan.first is not None:
            return self.calculator.energy(lattice.atoms, found.moments)
        cell = ase_atoms(found.phonon.supercell)
        energies = [self.calculator.energy(cell, m) for m in self._states(found.phonon, plan.lengths)]
        return float(np.mean(energies)) * len(lattice.atoms) / len(cell)


def frequencies(phonon: Phonopy, q: Array) -> Array:
    """Return frequencies in THz at wave vectors (Q, 3), shape (Q, branches), imaginary ones negative."""
    phonon.run_qpoints(q)
    return np.array(phonon.qpoints.frequencies)


def dynamical_matrices(phonon: Phonopy, q: Array) -> Complex:
    """Return dynamical matrices whose eigenvalues are squares of THz, shape (Q, n, n)."""
    factor = phonon.unit_conversion_factor**2
    return np.array([phonon.get_dynamical_matrix_at_q(x) * factor for x in q])


def _signed_root(squares: Array) -> Array:
    return np.sign(squares) * np.sqrt(np.abs(squares))


def _groups(values: Array) -> list[NDArray[np.intp]]:
    """Return runs of frequencies that are equal within `DEGENERATE`."""
    return np.split(np.arange(len(values)), np.flatnonzero(np.diff(values) > DEGENERATE) + 1)


def mode_shifts(first: Phonopy, second: Phonopy, q: Array) -> Array:
    """Return ω in the second order less ω in the first of the modes that resemble each other most, THz.

    Degenerate modes of the first order are mixed so that the second does not couple them, before modes are paired by
    their overlap.
    """
    shifts = []
    for one, two in zip(dynamical_matrices(first, q), dynamical_matrices(second, q), strict=True):
        squares, modes = np.linalg.eigh(one)
        other_squares, others = np.linalg.eigh(two)
        before, after = _signed_root(squares), _signed_root(other_squares)
        for group in _groups(before):
            part = modes[:, group]
            modes[:, group] = part @ np.linalg.eigh(part.conj().T @ two @ part)[1]
        rows, columns = linear_sum_assignment(-(np.abs(modes.conj().T @ others) ** 2))
        shifts.append((after[columns] - before)[np.argsort(rows)])
    return np.array(shifts)


def mode_slopes(phonon: Phonopy, slopes: Complex, q: Array) -> Array:
    """Return ∂ω = e†∂D e / 2ω of every mode for changes of the dynamical matrix (Q, n, n) in THz² per unit.

    Modes without frequency, the acoustic ones at Γ, have none.
    """
    found = []
    for matrix, slope in zip(dynamical_matrices(phonon, q), slopes, strict=True):
        squares, modes = np.linalg.eigh(matrix)
        values, rates = _signed_root(squares), np.zeros(len(squares))
        for group in _groups(values):
            part = modes[:, group]
            rates[group] = np.linalg.eigvalsh(part.conj().T @ slope @ part)
        moving = np.abs(values) > STILL
        found.append(np.where(moving, rates / (2 * np.where(moving, np.abs(values), 1.0)), 0.0))
    return np.array(found)


def jackknife(found: Harmonic, q: Array) -> Array:
    """Return the standard error of frequencies of force constants averaged over states, THz, shape (Q, branches)."""
    phonon, states = found.phonon, np.array(found.states)
    kept, count = np.array(phonon.force_constants), len(found.states)
    left = []
    for state in states:
        phonon.force_constants = (states.sum(axis=0) - state) / (count - 1)
        left.append(frequencies(phonon, q))
    phonon.force_constants = kept
    return np.sqrt((count - 1) * np.var(left, axis=0))


def _stable_run(energies: list[float], lowest: list[float]) -> slice:
    """Return the volumes without imaginary modes on both sides of the lowest energy; none where that one has some."""
    centre = int(np.argmin(energies))
    imaginary = np.flatnonzero(np.array(lowest) < -IMAGINARY)
    start = int(max(imaginary[imaginary <= centre], default=-1)) + 1
    stop = int(min(imaginary[imaginary >= centre], default=len(lowest)))
    return slice(start, max(start, stop))


def _has_curves(quasi: QHA) -> bool:
    """Say whether phonopy fits the free energies: it refuses those without a minimum near the volumes."""
    try:
        quasi.run()
    except RuntimeError:
        return False
    return True


def _equilibrium_volumes(volumes: list[float], energies: Array) -> Array:
    """Return the volume of least energy, Å³, of the Vinet curve through energies (T, V) in eV at each temperature."""
    curve = get_eos("vinet")
    x, level = np.array(volumes), energies.min()
    start = np.array([0.0, 1.0, 4.0, x[energies[0].argmin()]])
    found = []
    for energy in energies:
        start = least_squares(
            lambda p, e=energy: curve(x, p) - (e - level),  # type: ignore[misc]
            start,
            jac="3-point",
            x_scale=np.array([1.0, 1.0, 4.0, x.mean()]),
            ftol=1e-15,
            xtol=1e-15,
            gtol=1e-15,
        ).x
        found.append(start[3])
    return np.array(found)


def thermal_properties(phonon: Phonopy, mesh: int, temperatures: Array) -> tuple[Array, Array, Array, float]:
    """Return F (eV), S and C_v (J/K/mol) at temperatures in K, and the zero-point energy (eV), per primitive cell."""
    phonon.run_mesh([mesh] * 3, is_gamma_center=True)
    phonon.run_thermal_properties(temperatures=temperatures, cutoff_frequency=STILL)
    found = phonon.get_thermal_properties_dict()
    zero = float(phonon.thermal_properties.zero_point_energy) / KJ_PER_MOL
    return np.asarray(found["free_energy"]) / KJ_PER_MOL, found["entropy"], found["heat_capacity"], zero
