"""The command ``mmace-bench``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmace_props.cli import DEFAULT_FACTORY, Parser, add_calculator, load_calculator, progress_bar
from mmace_props.errors import PropertyError
from mmace_props.files import check_writable, write_whole
from mmace_props.protocol import SpinCalculator
from rich.console import Console

from .analyse import Line, changes, compare, lines_of, record
from .calculate import identity, run_system
from .derive import derive
from .errors import BenchmarkError
from .rendering import check_format, write_report
from .report import build_report, print_table
from .systems import SYSTEMS, System, read_json, read_system

WORK = ".mmace-bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    0; 1 where results differ from the stored ones; 2 for anything the user can mend.
    """
    try:
        args = _parser().parse_args(arguments)
        return int(args.run(args))
    except PropertyError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr)
        return 130


def _parser() -> Parser:
    parser = Parser(prog="mmace-bench", description="Hold the property suite against DFT and experiment.")
    actions = parser.add_subparsers(dest="action", required=True)

    run = actions.add_parser("run", help="compute, compare and report a system")
    run.add_argument("system", choices=(*SYSTEMS, "all"))
    add_calculator(run)
    run.add_argument("--quick", action="store_true", help="leave out what takes more than seconds")
    run.add_argument("--json", metavar="FILE", help="write the results there")
    run.add_argument(
        "--report",
        metavar="FILE",
        help="write a report there: .html is one page that holds all, .md has its pictures in images beside it",
    )
    run.add_argument("--work", default=WORK, metavar="DIR", help=f"datasets and finished parts (default: {WORK})")
    run.add_argument("--update", metavar="MESSAGE", help="store the results as the ones to keep, and why they changed")
    run.set_defaults(run=_run)

    side = actions.add_parser("compare", help="two results side by side")
    side.add_argument("first", help="file of mmace-bench run --json")
    side.add_argument("second", help="another")
    side.set_defaults(run=_compare)

    own = actions.add_parser("derive", help="derive values of own DFT from the reference calculations")
    own.add_argument("system", choices=SYSTEMS)
    own.set_defaults(run=_derive)
    return parser


def _run(args: argparse.Namespace) -> int:
    for path in (args.json, args.report):
        if path is not None:
            check_writable(path)
    if args.report is not None:
        check_format(Path(args.report))
    if args.update is not None and not args.update.strip():
        raise BenchmarkError("--update needs a message that says why the results changed")
    systems = [read_system(name) for name in (SYSTEMS if args.system == "all" else (args.system,))]

    def make(soc: bool, moments: str) -> SpinCalculator:
        return load_calculator(args.calculator, args.model, soc, moments, args.device, "float64")

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    work = Path(args.work)
    lines: dict[str, list[Line]] = {}
    about: dict[str, Any] = {}
    origin = identity(args.calculator, args.model)
    with progress_bar(False) as report:
        for system in systems:
            outcomes, about = run_system(system, make, work, args.quick, report, origin)
            lines[system.name] = lines_of(system, outcomes)
    for system in systems:
        print_table(console, system.name, lines[system.name])
    results = record(lines, about, args.update or "")
    if args.json is not None:
        _write_json(Path(args.json), results)
        console.print(f"wrote {args.json}")
    if args.report is not None:
        write_report(build_report(systems, lines, work, results["calculator"]), Path(args.report))
        console.print(f"wrote {args.report}")
    if args.update is not None:
        for system in systems:
            _store(system, results)
            console.print(f"stored {system.stored}")
        return 0
    if args.calculator != DEFAULT_FACTORY or args.model != "default":
        return 0
    return _regression(console, systems, results)


def _store(system: System, results: dict[str, Any]) -> None:
    """Store one system's results; quantities that the run left out keep their stored values."""
    old = read_json(system.stored)["systems"][system.name] if system.stored.exists() else {}
    entries = {**old, **results["systems"][system.name]}
    system.stored.parent.mkdir(exist_ok=True)
    _write_json(system.stored, {**results, "systems": {system.name: entries}})


def _regression(console: Console, systems: Sequence[System], results: dict[str, Any]) -> int:
    """Say what changed against the stored results of the shipped model."""
    found = []
    for system in systems:
        if not system.stored.exists():
            raise BenchmarkError(f"no results are stored for {system.name}; store these with --update MESSAGE")
        stored = read_json(system.stored)["systems"][system.name]
        found += changes(results["systems"][system.name], stored)
    for change in found:
        console.print(f"changed: {change}")
    if found:
        console.print("results differ from the stored ones; if that is meant, store them with --update MESSAGE")
        return 1
    console.print("as stored")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from rich.table import Table

    first, second = (read_json(Path(path)) for path in (args.first, args.second))
    table = Table()
    for name in ("quantity", "unit", args.first, args.second, "difference / tolerance"):
        table.add_column(name)
    for row in compare(first, second):
        table.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def _derive(args: argparse.Namespace) -> int:
    values = derive(read_system(args.system))
    for name, entry in values.items():
        print(f"{name:32} {entry['value']:.5g} ± {entry['uncertainty']:.2g}")
    return 0


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: Path(temporary).write_text(text))
