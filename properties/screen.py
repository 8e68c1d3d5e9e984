"""One property of many structures, in parallel: a row for each, failures with their sentence, one table at the end."""

import argparse
import csv
import io
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from logging import ERROR
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import xarray as xr
from ase import Atoms
from rich.console import Console
from rich.table import Table

from .base import LOST, Property, Row, load_property, named_files, plugins, silent, variable, write_dataset
from .cli import (
    WIDTH,
    Parser,
    add_setup,
    guessed_order,
    inputs,
    load_calculator,
    moments_arguments,
    named_options,
    progress_bar,
)
from .errors import OptionError, PropertyError
from .files import check_dataset_place, check_writable, refuse_others, write_whole
from .journal import Journal, fingerprint
from .protocol import SpinCalculator
from .provenance import attribute, versions
from .sources import digest, identity
from .structures import formula, read_structure, start_structure

SUFFIXES = (".cif", ".mcif", ".vasp", ".poscar", ".extxyz", ".xyz")
"""Files taken from a directory; names that begin with POSCAR or CONTCAR too."""
KEY_LENGTH = 16
SAID = "warnings"
"""Attribute of a structure's dataset with what was warned of when it was computed."""
PRINTED = 4
"""Numbers of each structure that are printed; all are written."""
COLUMN = 18
NO_WORKERS = 10
"""Seconds after which a scheduler without workers is given up."""
ONE_AT_A_TIME = threading.Lock()
"""Calculators, warnings and netCDF are shared by the threads of a process."""


@dataclass(frozen=True)
class Setup:
    """Everything but the structure that decides a result.

    Parameters
    ----------
    name : of the property.
    options : its options by name.
    mode : how moments are relaxed.
    order : initial order, None as the command line has it.
    table : |m| in µB per element, over the calculator's own.
    factory, model, soc, device, dtype : of the calculator.
    """

    name: str
    options: Mapping[str, Any]
    mode: str
    order: str | None = None
    table: Mapping[str, float] | None = None
    factory: str = ""
    model: str = "default"
    soc: bool = True
    device: str = "cpu"
    dtype: str = "float64"


@dataclass(frozen=True)
class Outcome:
    """What came of one structure.

    Parameters
    ----------
    file : the structure's file.
    formula : chemical formula, empty where the file could not be read.
    origin : where the initial moments came from.
    rows : the table of the result, none where it failed.
    failure : the sentence of the error, empty where there was none.
    dataset : file of the result.
    note : what the property says about its result, and warnings on the way there.
    members_without_result : of a committee, and why.
    """

    file: str
    formula: str = ""
    origin: str = ""
    rows: tuple[Row, ...] = ()
    failure: str = ""
    dataset: str = ""
    note: str = ""
    members_without_result: str = ""


def structure_files(paths: Sequence[str | Path]) -> list[str]:
    """Return structure files: those named, and those inside directories that are named.

    Raises
    ------
    OptionError : a path that does not exist, a directory without structures, or a file named twice.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [
                str(p)
                for p in sorted(path.iterdir())
                if p.is_file() and (p.suffix.lower() in SUFFIXES or p.name.upper().startswith(("POSCAR", "CONTCAR")))
            ]
            if not inside:
                raise OptionError(f"the directory '{path}' holds no structure ({', '.join(SUFFIXES)}, POSCAR)")
            found += inside
        elif path.is_file():
            found.append(str(path))
        else:
            raise OptionError(f"there is no structure file '{path}'; check the path")
    twice = [f for f in found if found.count(f) > 1]
    if twice:
        raise OptionError(f"the structure '{twice[0]}' is named twice")
    return found


@lru_cache(maxsize=2)
def _calculator(origin: tuple[tuple[str, str], ...], soc: bool, mode: str, device: str, dtype: str) -> SpinCalculator:
    """Return the calculator of an `identity`, for a changed source or model is another."""
    return load_calculator(dict(origin)["factory"], dict(origin)["model"], soc, mode, device, dtype)


def run_one(file: str, setup: Setup, folder: str, origin: Mapping[str, str] | None = None, place: str = ".") -> Outcome:
    """Compute the property of one structure, or find it done.

    Parameters
    ----------
    file : the structure.
    setup : everything else.
    folder : where each result is kept as a dataset of its own, named after the structure and the hash of everything
        that decides it.
    origin : `identity` of calculator and suite, which this process must share; None takes its own.
    place : directory that all paths are relative to.

    Returns
    -------
    The outcome; an error becomes its sentence.
    """
    with ONE_AT_A_TIME:
        try:
            with chdir(place):
                return _run_here(file, setup, folder, origin)
        except OSError as error:
            return Outcome(file, failure=f"the worker does not see '{error.filename}' ({error.strerror})")


def _run_here(file: str, setup: Setup, folder: str, origin: Mapping[str, str] | None) -> Outcome:
    symbols = ""
    try:
        prop = load_property(setup.name)(moments=setup.mode, **setup.options)
        here = identity(setup.factory, setup.model)
        differing = [k.replace("_", " ") for k in here if origin is not None and here[k] != origin[k]]
        if differing:
            raise PropertyError(f"the worker has another {' and '.join(differing)} than the command; restart it")
        with warnings.catch_warnings():
            # the command loads the calculator itself, and has told them
            warnings.simplefilter("ignore")
            calculator = _calculator(tuple(here.items()), setup.soc, setup.mode, setup.device, setup.dtype)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            atoms = read_structure(file)
            symbols = formula(atoms)
            start = start_structure(
                atoms, calculator, order=setup.order, table=setup.table, guess=guessed_order(setup.options)
            )
            target = Path(folder) / f"{Path(file).stem}-{_key(prop, setup, start.atoms, calculator, here)}.nc"
            journal = Journal.beside(target)
            known = calculator.has("provenance") or here["factory_source"]
            if not known or _read(target) is None:
                dataset = prop.run(start.atoms, calculator, silent, journal)
                dataset.attrs["initial_moments_origin"] = start.origin
                dataset.attrs["structure_file"] = Path(file).name
                if texts := _sentences(said, str(dataset.attrs.get(LOST, ""))):
                    dataset.attrs[SAID] = "; ".join(texts)
                write_dataset(dataset, target)
        journal.clear()
        done = _read(target)
        if done is None:
            raise PropertyError(f"the dataset '{target}' cannot be read back; remove it")
        note = "; ".join(str(done.attrs[k]) for k in ("note", SAID) if done.attrs.get(k))
        lost = str(done.attrs.get(LOST, ""))
        rows = tuple(prop.summary(done))
        return Outcome(file, symbols, start.origin, rows, dataset=target.name, note=note, members_without_result=lost)
    except PropertyError as error:
        return Outcome(file, symbols, failure=" ".join(str(error).split()))
    except Exception as error:
        text = " ".join(str(error).split())
        return Outcome(file, symbols, failure=f"unexpected {type(error).__name__}: {text}")


def _key(prop: Property, setup: Setup, atoms: Atoms, calculator: SpinCalculator, origin: Mapping[str, str]) -> str:
    """Return the hash of everything that decides a result."""
    key = {
        "atoms": atoms,
        "property": setup.name,
        "options": asdict(prop.options),
        "files": {name: digest(Path(name)) for name in named_files(prop.options)},
        "calculator": calculator.provenance(),
        "setup": [setup.soc, setup.mode, setup.dtype],
        "origin": origin,
    }
    return fingerprint(key)[:KEY_LENGTH]


def _sentences(said: Sequence[warnings.WarningMessage], lost: str) -> list[str]:
    """Return what was warned of, once each, without what the dataset says of lost members."""
    texts = [" ".join(str(w.message).split()) for w in said if issubclass(w.category, UserWarning)]
    return [text for text in dict.fromkeys(texts) if not (lost and lost in text)]


def _read(path: Path) -> xr.Dataset | None:
    try:
        with xr.open_dataset(path) as found:
            return found.load()
    except (OSError, ValueError):
        return None


def screen(
    files: Sequence[str],
    setup: Setup,
    folder: str | Path,
    jobs: int | None = None,
    dask: str = "",
    tell: Callable[[str, int, int], None] = silent,
) -> list[Outcome]:
    """Compute a property of many structures in parallel, and leave each result on disk as soon as it is there.

    Called again after a kill, it reads what is finished and goes on inside what is not; structures that failed are
    tried again.

    Parameters
    ----------
    files : structures.
    setup : everything else that decides the results.
    folder : of the datasets; made where it does not exist.
    jobs : processes on this machine, None for one; a scheduler has workers of its own.
    dask : ``local`` for a Dask cluster of `jobs` workers here, or the address of a scheduler, whose workers see the
        same files under the same paths; empty for joblib's own.
    tell : called as ``tell(stage, done, total)``.

    Returns
    -------
    One outcome for each file, in their order.

    Raises
    ------
    OptionError : options that name one place for all structures, or engines that are not there.
    """
    _check_options(setup.options)
    found: dict[str, Outcome] = {}
    origin, place = identity(setup.factory, setup.model), str(Path.cwd())
    tasks = [joblib.delayed(run_one)(file, setup, str(folder), origin, place) for file in files]
    tell("structures", 0, len(files))
    with _engine(jobs, dask) as workers:
        Path(folder).mkdir(exist_ok=True)
        for torn in Path(folder).glob(".*.nc"):
            torn.unlink()
        for outcome in joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)(tasks):
            found[outcome.file] = outcome
            tell("structures", len(found), len(files))
    return [found[file] for file in files]


@contextmanager
def _engine(jobs: int | None, dask: str) -> Iterator[int]:
    """Choose what runs the tasks, and yield how many at once."""
    if not dask:
        with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
            yield jobs or 1
        return
    if dask != "local" and jobs is not None:
        raise OptionError(f"the scheduler at '{dask}' has as many jobs as it has workers; leave --jobs out")
    try:
        from dask.distributed import Client, LocalCluster
    except ImportError:
        raise OptionError("--dask needs Dask; install mmace[dask], or leave --dask out") from None
    try:
        if dask == "local":
            cluster = LocalCluster(
                n_workers=jobs or 1, threads_per_worker=1, dashboard_address=None, silence_logs=ERROR
            )
        else:
            cluster = None
        client = Client(dask, timeout="5s") if cluster is None else Client(cluster)
    except (OSError, ValueError, TimeoutError) as error:
        raise OptionError(f"no Dask scheduler answers at '{dask}' ({' '.join(str(error).split())[:120]})") from error
    try:
        try:
            client.wait_for_workers(1, timeout=NO_WORKERS)
        except TimeoutError:
            raise OptionError(
                f"the Dask scheduler at '{dask}' has no workers; start some with dask worker {dask}"
            ) from None
        with joblib.parallel_config(backend="dask"):
            yield -1
    finally:
        client.close()
        if cluster is not None:
            # the results are there; workers that a busy machine does not end in time are killed
            with suppress(TimeoutError):
                cluster.close()


def outcome_table(outcomes: Sequence[Outcome], setup: Setup) -> xr.Dataset:
    """Return one dataset with a row for each structure.

    Parameters
    ----------
    outcomes : of the structures.
    setup : what decided the results.

    Returns
    -------
    Dimension ``structure``; a variable for each key of the results' tables (NaN or empty where a structure has no such
    line), ``_std`` with committees, ``_error`` where values are drawn at random, and file, formula, origin of the
    moments, failure and dataset of each.
    """
    count = len(outcomes)
    data: dict[str, xr.Variable] = {}
    columns: dict[tuple[str, str, bool], str] = {}
    for outcome in outcomes:
        for row in outcome.rows:
            text = isinstance(row.value, str)
            kind = (row.key, row.unit, text)
            if kind not in columns:
                columns[kind] = _column(row.key, set(columns.values()))
    for (key, unit, text), name in columns.items():
        rows = [
            next((r for r in o.rows if (r.key, r.unit, isinstance(r.value, str)) == (key, unit, text)), None)
            for o in outcomes
        ]
        if text:
            values: Any = np.array([str(r.value) if r is not None else "" for r in rows])
            data[name] = variable("structure", values, unit or "1", key)
            continue
        numbers = [float(r.value) if r is not None else np.nan for r in rows]
        data[name] = variable("structure", np.array(numbers), unit or "1", key)
        spreads = [np.nan if r is None or r.spread is None else r.spread for r in rows]
        if not np.all(np.isnan(spreads)):
            data[f"{name}_std"] = variable("structure", np.array(spreads), unit or "1", f"{key}, committee spread")
        errors = [np.nan if r is None or r.error is None else r.error for r in rows]
        if not np.all(np.isnan(errors)):
            data[f"{name}_error"] = variable("structure", np.array(errors), unit or "1", f"{key}, statistical error")
    for name, text_ in (
        ("formula", "chemical formula"),
        ("origin", "where the initial moments came from"),
        ("failure", "why there is no result; empty where there is one"),
        ("dataset", "file of the structure's own dataset"),
        ("note", "what the property says about its result, and warnings"),
        (LOST, "members of the committee that gave no result, and why"),
    ):
        data[f"structure_{name}"] = variable("structure", np.array([getattr(o, name) for o in outcomes]), "1", text_)
    files = variable("structure", np.array([o.file for o in outcomes]), "1", "file of the structure")
    failed = sum(bool(o.failure) for o in outcomes)
    attrs = {
        "property": setup.name,
        "title": f"screening: {load_property(setup.name).title}",
        "structures": count,
        "failures": failed,
        "setup": asdict(setup),
        "versions": versions(),
    }
    return xr.Dataset(data, {"structure": files}, {k: attribute(v) for k, v in attrs.items()})


def _column(key: str, taken: set[str]) -> str:
    """Return a variable name for a line of a table."""
    name = re.sub(r"\W+", "_", key).strip("_") or "value"
    name = f"n_{name}" if name[0].isdigit() else name
    candidate, k = name, 2
    while candidate in taken or candidate.startswith("structure"):
        candidate, k = f"{name}_{k}", k + 1
    return candidate


def csv_text(table: xr.Dataset) -> str:
    """Return the table as comma-separated values with units in its header."""
    names = [str(k) for k in table.data_vars]
    names = [n for n in names if n.startswith("structure_")] + [n for n in names if not n.startswith("structure_")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = ["file"]
    for name in names:
        item = table[name]
        head = name.removeprefix("structure_") if name.startswith("structure_") else str(item.attrs["long_name"])
        header.append(head if item.attrs["units"] == "1" else f"{head} ({item.attrs['units']})")
    writer.writerow(header)
    for k, file in enumerate(table["structure"].values):
        cells = [table[name].values[k] for name in names]
        writer.writerow([file, *("" if isinstance(c, float) and np.isnan(c) else c for c in cells)])
    return buffer.getvalue()


def screen_command(arguments: Sequence[str]) -> int:
    """Run ``mmace-props screen``; return the exit status: 0 where any structure gave a result, else 2."""
    name = _property_name(arguments)
    if not name and {"-h", "--help"} & set(arguments):
        _parser("each property").print_help()
        return 0
    if not name:
        raise OptionError(f"name the property to screen with --property ({', '.join(sorted(plugins()))})")
    kind = load_property(name)
    parser = _parser(kind.name)
    add_setup(parser, kind)
    args = parser.parse_all(arguments, "name all structures before the options")
    output = Path(args.output or f"screen_{kind.name}.nc")
    table_file = Path(args.csv) if args.csv else output.with_suffix(".csv")
    folder = output.with_suffix("")
    _check(args, output, table_file, folder)
    mode, table, moments_file = moments_arguments(args.moments, kind.default_mode)
    if moments_file is not None:
        raise OptionError("a file of moments fits one structure alone; give a table such as Fe=2.2, or an order")
    named = named_options(args)
    _check_options(named)
    prop = kind(moments=mode, **named)
    files = structure_files(args.structures)
    read = inputs(args, prop) | {f"the structure '{file}'": file for file in files}
    refuse_others(output, read, "the dataset")
    refuse_others(table_file, read, "the table")
    places = args.calculator, args.model, args.soc, mode, args.device, args.dtype
    load_calculator(*places)
    setup = Setup(
        kind.name, named, mode, args.order, table, args.calculator, args.model, args.soc, args.device, args.dtype
    )
    console = Console(quiet=args.quiet, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
    if folder.is_dir():
        done = [p for p in folder.glob("*.nc") if not p.name.startswith(".")]
        console.print(f"restart    {len(done)} finished structures of an earlier run are at hand")
    with progress_bar(args.quiet) as report:
        outcomes = screen(files, setup, folder, args.jobs, args.dask, report)
    result = outcome_table(outcomes, setup)
    write_dataset(result, output)
    write_whole(table_file, lambda name: Path(name).write_text(csv_text(result), encoding="utf-8"))
    _print_outcomes(console, outcomes, f"{len(outcomes)} structures: {kind.title}")
    failed = sum(bool(o.failure) for o in outcomes)
    console.print(f"wrote {output} and {table_file}, {len(outcomes) - failed} results and {failed} failures; {folder}/")
    if failed == len(outcomes):
        raise PropertyError(f"no structure gave a result; of the first: {outcomes[0].failure}")
    return 0


def _parser(name: str) -> Parser:
    """Return the parser of what every property takes."""
    parser = Parser(
        prog="mmace-props screen",
        description=f"Compute {name} of many structures.",
        epilog="`mmace-props screen --property NAME -h` shows the options of a property too.",
        allow_abbrev=False,
    )
    parser.add_argument("structures", nargs="+", metavar="PATH", help="structure files, or directories of them")
    parser.add_argument("--property", required=True, metavar="NAME", help=", ".join(sorted(plugins())))
    parser.add_argument("-o", "--output", help="netCDF file to write (default: screen_NAME.nc here)")
    parser.add_argument("--csv", help="the same as comma-separated values (default: beside the output)")
    parser.add_argument("--jobs", type=int, help="structures at once, without an address of --dask (default: 1)")
    parser.add_argument("--dask", default="", help="'local', or the address of a Dask scheduler (default: neither)")
    return parser


def _property_name(arguments: Sequence[str]) -> str:
    """Return what --property says, before the property's own options are known; empty where it is not given."""
    parser = Parser(prog="mmace-props screen", add_help=False, allow_abbrev=False)
    parser.add_argument("--property", default="")
    return str(parser.parse_known_args(list(arguments))[0].property)


def _check_options(named: Mapping[str, Any]) -> None:
    """Refuse options of the property that name one place for all structures, or a structure of their own."""
    for name, text in (
        ("write", "every structure would write to the same file; leave write out, each dataset holds its own"),
        ("phonopy", "every structure would write phonopy's files to the same folder; leave phonopy out of a screening"),
        ("source", "a file of phonopy's holds one structure alone; leave --from out of a screening"),
    ):
        if named.get(name):
            raise OptionError(text)


def _check(args: argparse.Namespace, output: Path, table_file: Path, folder: Path) -> None:
    """Refuse places that cannot be written and numbers of jobs that make no sense, before anything is computed."""
    check_dataset_place(output, {})
    check_writable(table_file)
    if output.resolve() == table_file.resolve():
        raise OptionError("the dataset and the table cannot be the same file; name two")
    if folder == output:
        raise OptionError(f"name an output with a suffix, such as {output}.nc")
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"'{folder}' is a file, but the structures' datasets go into a folder of that name")
    if args.jobs is not None and not 1 <= args.jobs <= 4096:
        raise OptionError(f"jobs cannot be {args.jobs}; it lies between 1 and 4096")


def _print_outcomes(console: Console, outcomes: Sequence[Outcome], title: str) -> None:
    """Print the first numbers of each structure, or why there are none."""
    shown = list(dict.fromkeys((r.key, r.unit) for o in outcomes for r in o.rows if not isinstance(r.value, str)))
    shown = shown[:PRINTED]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("structure", no_wrap=True)
    table.add_column("formula", no_wrap=True)
    for key, unit in shown:
        table.add_column(key if unit in ("", "1") else f"{key}, {unit}", justify="right", max_width=COLUMN)
    for outcome in outcomes:
        numbers = {(r.key, r.unit): r.value for r in outcome.rows if not isinstance(r.value, str)}
        cells = [f"{numbers[kind]:.6g}" if kind in numbers else "" for kind in shown]
        table.add_row(Path(outcome.file).name, outcome.formula, *cells)
    console.print(table)
    for outcome in outcomes:
        for word, text in (
            ("failed", outcome.failure),
            ("note", outcome.note),
            ("left out", outcome.members_without_result),
        ):
            if text:
                console.print(f"{word:10} {Path(outcome.file).name}: {text}")
