"""The command ``mmace-props``: one property of one structure, printed as a table and written as a dataset."""

import argparse
import dataclasses
import importlib
import importlib.util
import math
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import numpy as np
import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from .base import Options, Progress, Property, Row, as_json, load_property, named_files, plugins, write_dataset
from .errors import CalculatorError, OptionError, PropertyError, did_you_mean
from .files import check_dataset_place, check_writable, refuse_others
from .journal import Journal, fingerprint
from .protocol import MODES, SpinCalculator, moments_of
from .provenance import magnetic_space_group
from .sources import digest, working_directory_searched
from .structures import ORDERS, Order, Start, formula, parse_moments, read_moments, read_structure, start_structure

DEFAULT_FACTORY = "mmace.calculator:from_options"
WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""
MOST_DECIMALS = 5
"""Longer numbers are written with an exponent."""
SMALL_SPREAD = 1e-9
"""A spread below this is rounding, and says nothing about the digits of a value."""
IMPORTING = threading.RLock()
"""Held while a file is executed as a module."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are errors of the suite, with a suggestion."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise OptionError(message)

    def parse_all(self, arguments: Sequence[str], stray: str = "one structure at a time") -> argparse.Namespace:
        """Parse, and suggest the nearest option for one that does not exist; `stray` tells one argument too many."""
        found, rest = self.parse_known_args(list(arguments))
        if rest:
            known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            mistyped = rest[0].split("=")[0]
            if mistyped.startswith("-"):
                raise OptionError(f"there is no option {mistyped}{did_you_mean(mistyped, known)}")
            raise OptionError(f"'{mistyped}' is one argument too many; {stray}")
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status (0, or 2 for anything the user can mend)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _plain_warnings():
            return _main(given)
    except PropertyError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print the warnings meant for users as one line each."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def _main(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        _help()
        return 0 if given else 2
    if given[0] == "--version":
        try:
            print(f"mmace-props {version('mmace')}")
        except PackageNotFoundError:
            print("mmace-props, not installed")
        return 0
    if given[0] == "list":
        _list()
        return 0
    if given[0] == "export":
        return _export(given[1:])
    if given[0] == "screen":
        from .screen import screen_command

        return screen_command(given[1:])
    if given[0].startswith("-"):
        raise OptionError(f"name a property first, not {given[0]}{did_you_mean('', [*plugins(), 'list'])}")
    return _property(load_property(given[0]), given[1:])


def _help() -> None:
    print("usage: mmace-props NAME STRUCTURE [options]   compute a property (NAME -h shows its options)")
    print("       mmace-props list                       show the properties installed")
    print("       mmace-props screen PATHS --property NAME [--jobs N] the same of many structures, as one table")
    print("       mmace-props export DATASET --to PROGRAM write an exchange dataset for another program")
    print(f"properties: {', '.join(sorted(plugins()))}")


def _list() -> None:
    found = sorted(plugins().items())
    width = max((len(name) for name, _ in found), default=0)
    for name, entry in found:
        try:
            title = load_property(name).title
        except PropertyError as error:
            title = str(error)
        print(f"{name:{width}}  {title} ({entry.dist.name if entry.dist is not None else entry.value})")


def _export(arguments: Sequence[str]) -> int:
    from .export import PROGRAMS, export

    parser = Parser(prog="mmace-props export", description="Write an exchange dataset for another program.")
    parser.add_argument("dataset", help="netCDF file of mmace-props exchange")
    parser.add_argument("--to", required=True, metavar="PROGRAM", help=", ".join(PROGRAMS))
    parser.add_argument("-o", "--output", default=".", help="directory to write to (default: here)")
    parser.add_argument("--drop", action="store_true", help="leave out terms that the program does not hold")
    args = parser.parse_all(arguments, "one dataset at a time")
    if not Path(args.dataset).exists():
        raise OptionError(f"there is no dataset '{args.dataset}'; check the path")
    try:
        with xr.open_dataset(args.dataset) as found:
            dataset = found.load()
    except (OSError, ValueError) as error:
        raise OptionError(f"'{args.dataset}' cannot be read as a dataset; give a file of mmace-props") from error
    for path in export(dataset, args.to, args.output, args.drop):
        print(f"wrote {path}")
    return 0


def _parser(kind: type[Property]) -> Parser:
    parser = Parser(prog=f"mmace-props {kind.name}", description=f"Compute the {kind.title}.", allow_abbrev=False)
    parser.add_argument(
        "structure",
        nargs="?" if kind.structure_option else None,
        help="CIF, magCIF, POSCAR, extxyz, a yaml file of phonopy, or another format of ASE",
    )
    parser.add_argument("-o", "--output", help=f"netCDF file to write (default: STRUCTURE_{kind.name}.nc here)")
    parser.add_argument("--plot", help="picture to write: .png, .pdf or .svg")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    add_setup(parser, kind)
    return parser


def add_calculator(parser: argparse.ArgumentParser) -> None:
    """Add what says which calculator is asked, and where it runs."""
    parser.add_argument("--model", default="default", help="model name or file, for the calculator (default: default)")
    parser.add_argument(
        "--calculator",
        default=DEFAULT_FACTORY,
        help=f"factory, module:function or file.py:function (default: {DEFAULT_FACTORY})",
    )
    parser.add_argument("--device", default="cpu", help="device of the calculator (default: cpu)")


def add_setup(parser: Parser, kind: type[Property]) -> None:
    """Add what says how a property is computed: calculator, moments, order, and the property's own options."""
    add_calculator(parser)
    parser.add_argument("--dtype", default="float64", help="precision of the calculator (default: float64)")
    parser.add_argument(
        "--soc",
        action=argparse.BooleanOptionalAction,
        default=kind.soc,
        help=f"spin-orbit coupling (default: {'on' if kind.soc else 'off'})",
    )
    parser.add_argument(
        "--moments",
        action="append",
        default=[],
        metavar="WHAT",
        help="initial moments as Fe=2.2,Al=0 (µB), or a file of rows or a structure with moments; or how they are "
        f"relaxed: {', '.join(MODES)} (default: {kind.default_mode}); may be given twice",
    )
    parser.add_argument("--order", help=f"initial order: {', '.join(ORDERS)} (default: the file's moments, else auto)")
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings alone")
    _add_options(parser, kind.options_type)


def _add_options(parser: Parser, options: type[Options]) -> None:
    hints = get_type_hints(options)
    group = parser.add_argument_group("options of the property")
    for item in dataclasses.fields(options):
        if item.name == "moments":
            continue
        hint, flag = hints[item.name], item.metadata.get("flag", "--" + item.name.replace("_", "-"))
        text, choices = item.metadata.get("help", ""), item.metadata.get("choices")
        if choices:
            text += f": {', '.join(choices)}"
        common: dict[str, Any] = {"dest": f"option_{item.name}", "default": item.default}
        if hint is bool:
            text += f" (default: {'on' if item.default else 'off'})"
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, **common)
        elif get_origin(hint) is tuple:
            text += f" (default: {' '.join(map(str, common['default']))})" if item.default else ""
            group.add_argument(flag, nargs="+", type=get_args(hint)[0], metavar="X", help=text, **common)
        else:
            kind = hint if hint in (int, float, str) else str
            text += f" (default: {item.default})" if item.default != "" else ""
            group.add_argument(flag, type=kind, metavar="X", help=text, **common)


def _property(kind: type[Property], arguments: Sequence[str]) -> int:
    args = _parser(kind).parse_all(arguments)
    stream = sys.stderr if args.json else sys.stdout
    console = Console(
        file=stream, quiet=args.quiet, highlight=False, soft_wrap=True, width=None if stream.isatty() else WIDTH
    )
    mode, table, moments_file = moments_arguments(args.moments, kind.default_mode)
    named = named_options(args)
    prop = kind(moments=mode, **named)
    source = _source(args.structure, kind, prop)
    output = Path(args.output if args.output is not None else f"{Path(source).stem}_{kind.name}.nc")
    read = {"the structure": source, "the file of the moments": moments_file or "", **inputs(args, prop)}
    check_dataset_place(output, read | {f"what {kind.name} writes": path for path in prop.written()})
    for path in prop.written():
        refuse_others(path, read, f"what {kind.name} writes")
    if args.plot is not None:
        from .plot import check_format

        if type(prop).plot is Property.plot:
            raise OptionError(f"{kind.name} has no plot; leave --plot out")

        check_format(args.plot)
        check_writable(args.plot)
        refuse_others(args.plot, read, "the plot")
        if Path(args.plot).resolve() == output.resolve():
            raise OptionError("the plot and the dataset cannot be the same file; name two")
    structure = read_structure(source)
    calculator = load_calculator(args.calculator, args.model, args.soc, mode, args.device, args.dtype)
    start = start_structure(
        structure,
        calculator,
        order=args.order,
        table=table,
        guess=guessed_order(named),
        moments=None if moments_file is None else read_moments(moments_file, structure),
    )
    _print_start(console, start, calculator, mode, named)
    journal = Journal.beside(output)
    if len(journal):
        console.print(f"restart    {len(journal)} finished parts of an earlier run are at hand")
    with progress_bar(args.quiet) as report:
        dataset = prop.run(start.atoms, calculator, report, journal)
    dataset.attrs["initial_moments_origin"] = start.origin
    dataset.attrs["structure_file"] = Path(source).name
    rows = prop.summary(dataset)
    write_dataset(dataset, output)
    journal.clear()
    if args.plot is not None:
        from .plot import save_figure

        save_figure(prop.plot(dataset), args.plot)
    _print_table(console, rows, f"{dataset.attrs['formula']}: {kind.title}")
    if "note" in dataset.attrs:
        console.print(dataset.attrs["note"])
    written = [str(output), *prop.written(), *([args.plot] if args.plot is not None else [])]
    first = ", ".join(written[:-1])
    console.print("wrote " + (f"{first} and " if first else "") + written[-1])
    if args.json:
        print(as_json(dataset, rows))
    return 0


def _source(structure: str | None, kind: type[Property], prop: Property) -> str:
    """Return the file of the structure: the one named, or that of the option which may stand in for it."""
    named = str(getattr(prop.options, kind.structure_option)) if kind.structure_option else ""
    if structure is None and not named:
        raise OptionError("no structure is named; give one")
    if structure is not None and named:
        raise OptionError(f"'{named}' holds a structure already; leave '{structure}' out")
    return structure or named


def named_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the property by name; where it enumerates orders, ``--order auto`` asks for that.

    Raises
    ------
    OptionError : orders are enumerated, and one is named.
    """
    named = {k.removeprefix("option_"): v for k, v in vars(args).items() if k.startswith("option_")}
    named = {k: tuple(v) if isinstance(v, list) else v for k, v in named.items()}
    if args.order == "auto" and "orders" in named:
        named["orders"], args.order = "auto", None
    if args.order is not None and named.get("orders") == "auto":
        raise OptionError(f"with --orders auto every order is tried; leave --order {args.order} out")
    return named


def guessed_order(options: Mapping[str, Any]) -> Order:
    """Return the order in which moments are guessed: where orders are enumerated, their lengths alone count."""
    return "fm" if options.get("orders") == "auto" else "auto"


def inputs(args: argparse.Namespace, prop: Property) -> dict[str, str]:
    """Return the files that a command reads beside its structures, by what they are."""
    place = args.calculator.rpartition(":")[0]
    found = {"the calculator": place, "the model": args.model}
    found |= {f"what an option reads, '{f}'": f for f in named_files(prop.options) if f not in prop.written()}
    return {what: path for what, path in found.items() if Path(path).is_file()}


def moments_arguments(given: Sequence[str], default: str) -> tuple[str, dict[str, float] | None, str | None]:
    """Tell apart the three things that --moments takes: a mode, a table, a file."""
    mode: str | None = None
    table: dict[str, float] | None = None
    file: str | None = None
    for value in given:
        if value in MODES:
            if mode is not None:
                raise OptionError("--moments says twice how moments are relaxed; say it once")
            mode = value
        elif table is not None or file is not None:
            raise OptionError("--moments gives initial moments twice; give them once")
        elif Path(value).is_file():
            file = value
        elif "=" in value:
            table = parse_moments(value)
        else:
            raise OptionError(
                f"--moments cannot be '{value}'{did_you_mean(value, MODES)} (a mode, a table such as Fe=2.2, or a file)"
            )
    return mode or default, table, file


def load_calculator(factory: str, model: str, soc: bool, moments: str, device: str, dtype: str) -> SpinCalculator:
    """Make a calculator from the name of a factory.

    Parameters
    ----------
    factory : ``module:function``, or ``file.py:function``; the working directory is searched too.
    model, soc, moments, device, dtype : handed to the factory by name.

    Returns
    -------
    The calculator, seen through the protocol.

    Raises
    ------
    CalculatorError : no such factory, or it refuses; its own sentence is kept.
    """
    place, _, function = factory.rpartition(":")
    if not place or not function:
        raise CalculatorError(f"'{factory}' names no factory; write module:function or file.py:function")
    try:
        module = _import(place)
    except Exception as error:
        raise CalculatorError(f"the calculator's module '{place}' cannot be imported ({_first(error)})") from error
    make = getattr(module, function, None)
    if not callable(make):
        public = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise CalculatorError(f"'{place}' has no function '{function}'{did_you_mean(function, public)}")
    try:
        made = make(model=model, soc=soc, moments=moments, device=device, dtype=dtype)
        if not hasattr(made, "get_property"):
            raise CalculatorError(f"'{factory}' made {type(made).__name__!r}, which is no ASE calculator")
        return SpinCalculator(made)
    except PropertyError:
        raise
    except Exception as error:
        raise CalculatorError(_first(error)) from error


def _import(place: str) -> Any:
    """Return a module; a file is executed once for each content it has."""
    if not place.endswith(".py"):
        with working_directory_searched():
            return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {place}")
    name = f"_mmace_props_{path.stem}_{fingerprint({'path': str(path.resolve()), 'source': digest(path)})[:12]}"
    # dataclasses look their module up while it is executed, so it is registered before; no other thread may see it then
    with IMPORTING:
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{place} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module


def _first(error: BaseException) -> str:
    """Return what an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    bar = ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("start", total=None)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield report


def _print_start(
    console: Console, start: Start, calculator: SpinCalculator, mode: str, options: dict[str, Any]
) -> None:
    atoms = start.atoms
    group = magnetic_space_group(atoms, options["symprec"], options["mag_symprec"])
    model = calculator.provenance()
    about = " ".join(str(model[k])[:16] for k in ("name", "hash") if k in model)
    members = len(calculator.members)
    lengths = np.linalg.norm(moments_of(atoms), axis=1)
    console.print(f"structure  {formula(atoms)}, {len(atoms)} atoms, {group['space_group']}")
    console.print(f"moments    {start.origin}; |m| up to {lengths.max():.3g} µB, relaxed: {mode}")
    console.print(f"symmetry   magnetic space group {group['magnetic_space_group']}")
    console.print(f"model      {model['calculator']} {about}" + (f", committee of {members}" if members > 1 else ""))


def _print_table(console: Console, rows: Sequence[Row], title: str) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    errors = {"error": "± statistics", "spread": "± committee"}
    shown = [name for name in errors if any(getattr(r, name) is not None for r in rows)]
    table.add_column("quantity", no_wrap=True)
    for heading in ("value", *(errors[name] for name in shown)):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for row in rows:
        if isinstance(row.value, str):
            cells = [row.value, *("" for _ in shown)]
        else:
            cells = _with_errors(row.value, [getattr(row, name) for name in shown])
        table.add_row(row.label, *cells, "" if row.unit == "1" else row.unit)
    console.print(table)


def _with_errors(value: float, errors: Sequence[float | None]) -> list[str]:
    """Return all with the decimals of the second digit of the largest error."""
    known = [e for e in errors if e is not None]
    largest = max((e for e in known if SMALL_SPREAD < e < np.inf), default=0.0)
    decimals = 1 - math.floor(math.log10(largest)) if largest else None
    if decimals is None or decimals > MOST_DECIMALS or not np.isfinite(value):
        digits = max(3, len(f"{abs(value) / largest:.0f}") + 1) if largest and np.isfinite(value) else None
        shown = f"{value:.{digits}g}" if digits else _number(value)
        return [shown, *("" if e is None else f"{e:.2g}" for e in errors)]
    return [f"{x:.{max(0, decimals)}f}" if x is not None else "" for x in (value, *errors)]


def _number(value: float) -> str:
    return "0" if abs(value) < 1e-9 else f"{value:.6g}"


if __name__ == "__main__":
    sys.exit(main())
