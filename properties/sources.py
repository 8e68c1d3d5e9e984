"""Digests of the code and the files that decide a number."""

import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path


def identity(factory: str, model: str) -> dict[str, str]:
    """Return what decides a number besides structure and options: the calculator, and the suite that ran it.

    A calculator need not say what it is, so the factory's name counts, with the source it is made of and the model's
    file; so does the source of the suite, since a changed property is a changed number.

    Parameters
    ----------
    factory : ``module:function``, or ``file.py:function``.
    model : handed to the factory; a file's content counts, not its name alone.

    Returns
    -------
    ``factory``, ``factory_source`` (empty where it is not found), ``model``, ``model_file`` and ``suite``.
    """
    place = factory.rpartition(":")[0]
    return {
        "factory": factory,
        "factory_source": digest(Path(place)) if place.endswith(".py") else package_source(place.partition(".")[0]),
        "model": model,
        "model_file": digest(Path(model), "*") if model and Path(model).exists() else "",
        "suite": package_source(__name__.partition(".")[0]),
    }


@lru_cache
def package_source(name: str) -> str:
    """Return the digest of a module, or of a package with all below it; empty where there is none.

    It is that of the first call: a process goes on with the code that it has loaded, whatever becomes of the files.
    """
    try:
        with working_directory_searched():
            spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return ""
    found = [digest(Path(place)) for place in spec.submodule_search_locations or [spec.origin or ""] if place]
    return " ".join(found)


def digest(path: Path, names: str = "*.py") -> str:
    """Return the SHA-256 of a file, or of the files of some names below a folder; empty where there is neither."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob(names) if p.is_file())
    whole = hashlib.sha256()
    for file in files:
        whole.update(str(file.relative_to(path)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest() if files else ""


@contextmanager
def working_directory_searched() -> Iterator[None]:
    """Let modules of the working directory be found, after all others."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
