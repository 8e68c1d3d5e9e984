"""The command `mmace`: labels, training, evaluation, and what a model file holds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .errors import MMACEError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for errors of input."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except MMACEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what is finished is kept, run the same command again to go on", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    from .data.cli import add_parser as add_convert_parser
    from .labels.cli import add_parser as add_label_parser
    from .training.cli import add_parsers as add_training_parsers

    parser = argparse.ArgumentParser(
        prog="mmace", description="Make labels for, train, evaluate and inspect magnetic potentials."
    )
    parser.add_argument("--version", action="version", version=f"mmace {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    add_label_parser(subparsers)
    add_convert_parser(subparsers)
    add_training_parsers(subparsers)
    info = subparsers.add_parser("info", help="what a model holds: elements, settings, hash, notes")
    info.add_argument("model", nargs="?", default="default", help="shipped name, .safetensors or .json file")
    info.set_defaults(run=_info)
    return parser


def _info(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from .io import file_hash, load_model, model_files, read_metadata

    files = model_files(options.model)
    for path in files:
        model = load_model(path)
        table = Table("setting", "value", title=path.name, title_justify="left")
        for key, value in model.config.to_dict().items():
            table.add_row(key, str(value))
        table.add_row("weights", str(sum(p.numel() for p in model.parameters())))
        table.add_row("SHA-256", file_hash(path))
        for key, value in read_metadata(path).items():
            table.add_row(key, value)
        Console().print(table)
    return 0
