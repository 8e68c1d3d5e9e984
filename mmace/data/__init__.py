"""Labels to learn from and how they are split."""

from .labels import (
    Composition,
    LabelledStructure,
    check_groups,
    composition,
    fingerprint,
    groups_of,
    label_from_atoms,
    read_labels,
)
from .splits import PARTS, Splits, read_splits

__all__ = [
    "PARTS",
    "Composition",
    "LabelledStructure",
    "Splits",
    "check_groups",
    "composition",
    "fingerprint",
    "groups_of",
    "label_from_atoms",
    "read_labels",
    "read_splits",
]
