"""Splits by parent structure: what trains, what selects the model, what is kept for testing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LabelError
from .labels import LabelledStructure

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Splits:
    """Parents of each part; no parent is in two parts.

    Attributes
    ----------
    train, valid, test : frozenset of str
        Names of parents.
    """

    train: frozenset[str]
    valid: frozenset[str]
    test: frozenset[str]

    def __post_init__(self) -> None:
        for first, second in (("train", "valid"), ("train", "test"), ("valid", "test")):
            shared = sorted(getattr(self, first) & getattr(self, second))
            if shared:
                raise LabelError(f"the parent {shared[0]} is in {first} and in {second}: keep it in one of them.")

    def part_of(self, label: LabelledStructure) -> str:
        """The part that a label's parent is in.

        Raises
        ------
        LabelError
            The parent is in no part.
        """
        for part in PARTS:
            if label.parent in getattr(self, part):
                return part
        raise LabelError(f"the parent {label.parent} of {label.name} is in no part of the splits: add it to one.")

    def select(self, labels: Iterable[LabelledStructure], part: str) -> list[LabelledStructure]:
        """The labels of one part, in their order; every label must belong to some part."""
        return [label for label in labels if self.part_of(label) == part]


def read_splits(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Splits:
    """Read splits files, JSON {"train": [parents], "valid": [parents], "test": [parents]}, and join them.

    Parameters
    ----------
    paths : path or sequence of paths

    Raises
    ------
    LabelError
        A file is missing or has another form, or a parent is in two parts.
    """
    files = [paths] if isinstance(paths, str | os.PathLike) else paths
    contents = [_read(Path(file)) for file in files]
    return Splits(**{part: frozenset().union(*(content[part] for content in contents)) for part in PARTS})


def _read(file: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(file.read_text())
        return {part: _names(content[part]) for part in PARTS}
    except FileNotFoundError:
        raise LabelError(f"there is no splits file {file}: give an existing JSON file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise LabelError(
            f'{file} does not hold splits: it needs {{"train": [parents], "valid": [parents], "test": [parents]}}.'
        ) from None


def _names(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError
    return value
