"""The command ``mmace-bench``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmace_props.cli import DEFAULT_FACTORY, Parser, add_calculator, load_calculator, progress_bar
from mmace_props.errors import PropertyError
from mmace_props.files import check_writable, refuse_others, write_whole
from mmace_props.protocol import SpinCalculator
from rich.console import Console
from rich.table import Table

from .analyse import CHANGE_HEAD, Change, Line, cells_of, changes, compare, lines_of, record, unshared
from .calculate import Outcome, identity, run_system
from .derive import derive
from .errors import BenchmarkError
from .rendering import check_format, markdown_table, write_report
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
    side.add_argument("first", help="file of mmace-bench run --json, or stored results")
    side.add_argument("second", help="another")
    side.add_argument(
        "--least",
        type=float,
        default=0.0,
        metavar="TOLERANCES",
        help="leave out what moved by less and kept its verdict (default: 0)",
    )
    side.add_argument("--markdown", metavar="FILE", help="write the table there")
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
    if args.update is not None:
        _check_update(args)
    systems = [read_system(name) for name in (SYSTEMS if args.system == "all" else (args.system,))]

    def make(soc: bool, moments: str) -> SpinCalculator:
        return load_calculator(args.calculator, args.model, soc, moments, args.device, "float64")

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    work = Path(args.work)
    lines: dict[str, list[Line]] = {}
    outcomes: dict[str, dict[str, Outcome]] = {}
    about: dict[str, Any] = {}
    origin = identity(args.calculator, args.model)
    with progress_bar(False) as report:
        for system in systems:
            outcomes[system.name], about = run_system(system, make, work, args.quick, report, origin)
            lines[system.name] = lines_of(system, outcomes[system.name])
    for system in systems:
        print_table(console, system.name, lines[system.name], outcomes[system.name])
    results = record(lines, about, args.update or "")
    if args.json is not None:
        _write_json(Path(args.json), results)
        console.print(f"wrote {args.json}")
    if args.report is not None:
        write_report(build_report(systems, lines, outcomes, results["calculator"]), Path(args.report))
        console.print(f"wrote {args.report}")
    if args.update is not None:
        for system in systems:
            _store(system, results)
            console.print(f"stored {system.stored}")
        return 0
    return _regression(console, systems, results) if _shipped(args) else 0


def _shipped(args: argparse.Namespace) -> bool:
    return bool(args.calculator == DEFAULT_FACTORY and args.model == "default")


def _check_update(args: argparse.Namespace) -> None:
    """Refuse to store what are no whole results of the shipped model."""
    if not args.update.strip():
        raise BenchmarkError("--update needs a message that says why the results changed")
    if not _shipped(args):
        raise BenchmarkError(
            "--update stores results of the shipped model; leave --calculator and --model out, or write with --json"
        )
    if args.quick:
        raise BenchmarkError("--update stores whole results, so that none is older than the rest; leave --quick out")


def _store(system: System, results: dict[str, Any]) -> None:
    system.stored.parent.mkdir(exist_ok=True)
    _write_json(system.stored, {**results, "systems": {system.name: results["systems"][system.name]}})


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
    if args.markdown is not None:
        check_writable(args.markdown)
        refuse_others(args.markdown, {"the first result": args.first, "the second result": args.second}, "the table")
    first, second = (read_json(Path(path)) for path in (args.first, args.second))
    rows = [cells_of(change) for change in compare(first, second) if _counts(change, args.least)]
    table = Table(*CHANGE_HEAD)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
    missing = [
        f"only in {file}: {', '.join(names)}"
        for file, names in zip((args.first, args.second), unshared(first, second), strict=True)
        if names
    ]
    for line in missing:
        console.print(line, soft_wrap=True)
    if args.markdown is not None:
        text = markdown_table(CHANGE_HEAD, rows) + "".join(f"\n{line}\n" for line in missing)
        write_whole(args.markdown, lambda temporary: Path(temporary).write_text(text))
        console.print(f"wrote {args.markdown}")
    return 0


def _counts(change: Change, least: float) -> bool:
    """Whether a quantity moved enough, got another verdict, or lost or gained its value."""
    lost = np.isnan(change.moved) and change.first != change.second
    return bool(lost or abs(change.moved) >= least or "→" in change.verdicts)


def _derive(args: argparse.Namespace) -> int:
    values = derive(read_system(args.system))
    for name, entry in values.items():
        print(f"{name:32} {entry['value']:.5g} ± {entry['uncertainty']:.2g}")
    return 0


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: Path(temporary).write_text(text))
