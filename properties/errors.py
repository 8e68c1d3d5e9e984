"""Errors of the suite. Each message says what is wrong, where, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class PropertyError(ValueError):
    """Base of every error that the suite raises on purpose."""


class StructureError(PropertyError):
    """A structure cannot be read, or cannot carry the property."""


class MomentError(PropertyError):
    """Moments are missing, have the wrong shape, or are out of range."""


class OptionError(PropertyError):
    """An option has a value that it cannot take."""


class CalculatorError(PropertyError):
    """A calculator cannot be made, refuses a structure, or lacks what a property needs."""


class ConvergenceError(PropertyError):
    """An iteration did not reach its tolerance; the message holds the residual."""


class ConventionError(PropertyError):
    """A spin Hamiltonian's convention is not fully defined."""


class OutputError(PropertyError):
    """A result cannot be written."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the tail of a message about a mistyped name.

    Parameters
    ----------
    name : what was given.
    known : the names that exist.

    Returns
    -------
    ``"; did you mean 'x'?"`` with the closest name, or ``"; known: a, b"`` where nothing is close.
    """
    names = sorted(known)
    close = get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names) or 'none'}"
