"""`mmace convert`: labels of other formats into the label contract."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ase import Atoms
from ase.data import atomic_numbers

from ..errors import LabelError
from ..files import refuse_inputs
from .deepmd import read_deepmd
from .importing import MAGNETIC, as_name, refuse_other_units, settle_signs, sign_evidence, stem_of
from .matpes import MOMENTS, read_matpes
from .mlip import read_mlip
from .renamed import NAMES, STRESS_UNITS, read_renamed

FORMATS = ("mlip", "matpes", "deepmd", "extxyz")
HOW = {
    "stress": "say --stress-sign pressure where the file's numbers are positive under compression, ase where they are "
    "positive under tension, or leave it out with --drop stress",
    "magnetic_forces": "say --magnetic-sign force where the file holds -dE/dm, derivative where it holds dE/dm, or "
    "leave them out with --drop magnetic_forces",
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register `mmace convert`."""
    convert = subparsers.add_parser(
        "convert",
        help="labels of other formats into the label contract",
        description="Read labels of another format, check their signs against their energies, and write extended XYZ.",
    )
    convert.add_argument("format", choices=FORMATS, help="mlip .cfg, MatPES JSON, DeePMD folders, other extended XYZ")
    convert.add_argument("inputs", nargs="+", metavar="INPUT", help="files, or folders of DeePMD systems")
    convert.add_argument("-o", "--output", required=True, metavar="FILE", help="labels in extended XYZ")
    convert.add_argument("--types", nargs="+", metavar="N=EL", default=[], help="mlip, deepmd: element of each type")
    convert.add_argument("--moments", choices=tuple(MOMENTS), help="matpes: which computed moments")
    convert.add_argument("--functional", help="matpes: functional where the file does not name it")
    convert.add_argument("--spin-unit", type=float, metavar="M", help="deepmd: moment of a spin of length one, µB (1)")
    convert.add_argument("--map", nargs="+", metavar="OURS=THEIRS", default=[], help=f"extxyz: {', '.join(NAMES)}")
    convert.add_argument("--stress-unit", choices=tuple(STRESS_UNITS), help="extxyz: unit of the stress (eV/A3)")
    convert.add_argument("--stress-sign", choices=("ase", "pressure"), help="positive under tension or compression")
    convert.add_argument("--magnetic-sign", choices=("force", "derivative"), help="the file holds -dE/dm or dE/dm")
    convert.add_argument(
        "--drop", nargs="+", default=[], choices=("forces", "stress", "magnetic_forces"), help="leave out"
    )
    convert.add_argument("--code", help="program the labels come from, for the record")
    convert.add_argument("--recipe", help="settings of that program, for the record")
    convert.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from ..labels.files import write_labels

    _refuse_options_of_others(args)
    if len({stem_of(path) for path in args.inputs}) < len(args.inputs):
        raise LabelError("two inputs have the same name, so their parents would be mixed: convert them one by one.")
    if not Path(args.output).resolve().parent.is_dir():
        raise LabelError(f"the folder of {args.output} does not exist: make it first.")
    if Path(args.output).is_dir():
        raise LabelError(f"{args.output} is a folder: give a file for the labels.")
    refuse_inputs(args.output, args.inputs)
    frames: list[Atoms] = []
    skipped = 0
    for path in args.inputs:
        read, left = _read(args, path)
        frames, skipped = [*frames, *read], skipped + left
    found = len(frames)
    frames = [atoms for atoms in frames if "energy" in atoms.calc.results]
    if not frames:
        raise LabelError(f"no frame of {' '.join(args.inputs)} has an energy, which a label needs: give other files.")
    for atoms in frames:
        for name in args.drop:
            for kind in MAGNETIC if name == "magnetic_forces" else (name,):
                atoms.arrays.pop(kind, None)
                atoms.calc.results.pop(kind, None)
        atoms.info["code"] = args.code or atoms.info.get("code", "unknown")
        atoms.info["recipe"] = args.recipe or atoms.info.get("recipe", f"imported from {args.format}")
    refuse_other_units(frames, _units(args))
    stress, magnetic = _signs(args)
    settle_signs(frames, stress, magnetic, HOW)
    write_labels(args.output, frames)
    parents = {atoms.info["parent"] for atoms in frames}
    print(
        f"{args.output}: {len(frames)} labels of {len(parents)} parents, {skipped} without moments and "
        f"{found - len(frames)} without energy left out."
    )
    for name, evidence in sign_evidence(frames).items():
        if evidence.pairs:
            verdict = "agree with the energies" if evidence.sign > 0 else "not settled by the energies"
            print(f"{name.replace('_', ' ')}: {verdict}, {evidence}.")
    return 0


def _read(args: argparse.Namespace, path: str) -> tuple[list[Atoms], int]:
    if args.format == "mlip":
        if not args.types:
            raise LabelError("a .cfg file numbers its elements: name them, such as --types 0=Al 1=Fe.")
        return read_mlip(path, _types(args.types)), 0
    if args.format == "matpes":
        if args.moments is None:
            raise LabelError(f"MatPES has several computed moments: give --moments {' or '.join(MOMENTS)}.")
        return read_matpes(path, args.moments, args.functional)
    if args.format == "deepmd":
        return read_deepmd(path, _types(args.types), 1.0 if args.spin_unit is None else args.spin_unit), 0
    return read_renamed(path, _split(args.map, "--map"), args.stress_unit or "eV/A3"), 0


def _signs(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """Factors on stress and magnetic forces as the readers give them; None leaves them to the energies."""
    convention = "pressure"
    if args.format == "extxyz" and "virials" not in _split(args.map, "--map"):
        convention = "ase"
    settled = None if args.format == "mlip" else 1
    stress = settled if args.stress_sign is None else (1 if args.stress_sign == convention else -1)
    magnetic = settled if args.magnetic_sign is None else (1 if args.magnetic_sign == "force" else -1)
    return stress, magnetic


def _units(args: argparse.Namespace) -> dict[str, str]:
    """Units that the readers took forces, stress and magnetic forces to be in; virials have none of a stress."""
    units = {"forces": "eV/A", "magnetic_forces": "eV/muB"}
    if args.format == "matpes":
        units["stress"] = "kbar"
    elif args.format == "extxyz" and "virials" not in _split(args.map, "--map"):
        units["stress"] = args.stress_unit or "eV/A3"
    return units


def _refuse_options_of_others(args: argparse.Namespace) -> None:
    owners = {
        "types": ("mlip", "deepmd"),
        "moments": ("matpes",),
        "functional": ("matpes",),
        "spin_unit": ("deepmd",),
        "map": ("extxyz",),
        "stress_unit": ("extxyz",),
    }
    for name, formats in owners.items():
        if getattr(args, name) and args.format not in formats:
            raise LabelError(f"--{name.replace('_', '-')} is for {' and '.join(formats)} alone: leave it out.")
    if args.stress_unit and "virials" in _split(args.map, "--map"):
        raise LabelError("--stress-unit is for a stress, not for virials, which are energies: leave it out.")
    for name in ("code", "recipe"):
        given = getattr(args, name)
        if given and as_name(given, name) != given:
            raise LabelError(f"--{name} {given} would be read back as a number: put a word before it.")


def _types(words: Sequence[str]) -> dict[int, str]:
    types = {}
    for number, symbol in _split(words, "--types").items():
        if not number.isdigit() or symbol not in atomic_numbers or symbol == "X":
            raise LabelError(f"--types {number}={symbol} is not a type and an element: give such as 0=Fe.")
        types[int(number)] = symbol
    return types


def _split(words: Sequence[str], option: str) -> dict[str, str]:
    for word in words:
        if word.count("=") != 1 or word.startswith("=") or word.endswith("="):
            raise LabelError(f"{option} {word} has no form NAME=NAME: mend it.")
    return dict(word.split("=") for word in words)
