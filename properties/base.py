"""The base of every property: typed options, committees, provenance, and datasets written in one piece."""

import dataclasses
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
import xarray as xr
from ase import Atoms
from numpy.typing import ArrayLike, NDArray

from . import provenance
from .errors import CalculatorError, OptionError, PropertyError, StructureError, did_you_mean
from .files import write_whole
from .journal import Journal
from .protocol import MODES, MomentMode, SpinCalculator, moments_of
from .structures import check_structure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Progress = Callable[[str, int, int], None]
"""Called with the stage, the number of parts done, and their total."""

GROUP = "mmace.properties"
LOST = "members_without_result"
"""Attribute of a dataset that names members of a committee without a result, and why."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Declare a field of an options class: its default, one line of help, and the values it may take."""
    metadata = {"help": text, "choices": tuple(choices) if choices is not None else None}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """What every property takes.

    Parameters
    ----------
    moments : how moments are relaxed; ``"calculator"`` takes the calculator's own mode.
    symprec : tolerance of the symmetry search on positions, in Å.
    mag_symprec : tolerance of the symmetry search on moments, in µB.
    """

    moments: str = option("calculator", "how moments are relaxed", ("calculator", *MODES))
    symprec: float = option(1e-3, "tolerance of the symmetry search on positions, in Å")
    mag_symprec: float = option(1e-2, "tolerance of the symmetry search on moments, in µB")

    def __post_init__(self) -> None:
        """Check every field against its type and choices.

        Raises
        ------
        OptionError : names the option, what it got and what it takes.
        """
        hints = get_type_hints(type(self))
        for item in fields(self):
            object.__setattr__(self, item.name, _plain(getattr(self, item.name)))
            value, hint, choices = getattr(self, item.name), hints[item.name], item.metadata.get("choices")
            for part in value if isinstance(value, tuple) else (value,):
                if choices is not None and part not in choices:
                    raise OptionError(
                        f"the option {item.name} cannot be '{part}'{did_you_mean(str(part), choices)}"
                        f" (it is one of {', '.join(choices)})"
                    )
            if not _fits(value, hint):
                raise OptionError(f"the option {item.name} cannot be {value!r}; it takes {_spelled(hint)}")
        for name in ("symprec", "mag_symprec"):
            if not getattr(self, name) > 0:
                raise OptionError(f"the option {name} must be positive")
        if getattr(self, "seed", 0) < 0:
            raise OptionError("the option seed cannot be negative")


def refuse_idle(options: Options, names: Sequence[str], why: str) -> None:
    """Refuse options that were changed from their defaults where they do nothing.

    Raises
    ------
    OptionError : names the option, and `why` it does nothing.
    """
    defaults = {item.name: item.default for item in fields(options)}
    for name in names:
        if getattr(options, name) != defaults[name]:
            raise OptionError(f"{name} does nothing where {why}; leave {name} out")


def named_files(options: Options) -> list[str]:
    """Return the files that options name."""
    values = [getattr(options, item.name) for item in fields(options)]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [part for part in parts if isinstance(part, str) and Path(part).is_file()]


def _plain(value: Any) -> Any:
    """Return lists and arrays as tuples and numpy's numbers as Python's, so that options can be hashed and written."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(_plain(part) for part in value) if isinstance(value, list | tuple) else value


def _fits(value: Any, hint: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(hint)[0]) for v in value)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _spelled(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"a list, each {_spelled(get_args(hint)[0])}"
    return {float: "a finite number", int: "a whole number", bool: "true or false", str: "text"}.get(hint, str(hint))


@dataclass(frozen=True)
class Row:
    """One line of a result's table.

    Parameters
    ----------
    label : what it is.
    value : number, or text.
    unit : unit of value and spread.
    spread : standard deviation over the committee, None without one.
    key : what it is in the tables of any structure, for a label that holds what differs between them; the label by
        default.
    error : statistical error of the value, in its unit, None where it is not drawn at random.
    """

    label: str
    value: float | str
    unit: str = ""
    spread: float | None = None
    key: str = ""
    error: float | None = None

    def __post_init__(self) -> None:
        """Take the label as the key where there is none."""
        object.__setattr__(self, "key", self.key or self.label)


def variable(dims: Sequence[str] | str, data: ArrayLike, units: str, long_name: str) -> xr.Variable:
    """Return a variable with its unit and long name; a number without unit has the unit ``1``."""
    return xr.Variable(dims, np.asarray(data), {"units": units, "long_name": long_name})


class Property(ABC):
    """A quantity computed from a structure and a calculator, as one dataset.

    A plugin derives from this class, sets the class attributes, writes `compute`, and names itself in the entry
    points of the group ``mmace.properties``. Options are a frozen dataclass derived from `Options`; the command
    line reads its arguments from it.

    Parameters
    ----------
    options : the options; or give them by name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    options_type: ClassVar[type[Options]] = Options
    default_mode: ClassVar[MomentMode] = "magnitudes"
    """How the command line relaxes moments where it is not told."""
    soc: ClassVar[bool] = True
    """Whether the command line asks for spin-orbit coupling where it is not told."""
    structure_option: ClassVar[str] = ""
    """An option whose file may stand in for that of the structure."""

    def __init__(self, options: Options | None = None, **named: Any) -> None:
        if options is not None and named:
            raise OptionError("give options as one object or by name, not both")
        known = [f.name for f in fields(self.options_type)]
        for key in named:
            if key not in known:
                raise OptionError(f"{self.name} has no option '{key}'{did_you_mean(key, known)}")
        self.options: Any = options if options is not None else self.options_type(**named)

    @abstractmethod
    def compute(self, atoms: Atoms, calculator: SpinCalculator, progress: Progress) -> xr.Dataset:
        """Compute the property with one model.

        Parameters
        ----------
        atoms : checked structure with moments (N, 3) in µB.
        calculator : a single model.
        progress : to be told about finished parts.

        Returns
        -------
        A dataset whose every variable has ``units`` and ``long_name``.
        """

    def check(self, atoms: Atoms, calculator: SpinCalculator) -> None:
        """Refuse a structure or calculator that the property cannot work on, before anything is computed.

        Raises
        ------
        PropertyError : here, where the structure carries no moments.
        """
        moments_of(atoms)

    def prepare(self, atoms: Atoms, members: Sequence[SpinCalculator], progress: Progress) -> "Property":
        """Return the property with everything fixed that all committee members must share."""
        return self

    def align(self, parts: list[xr.Dataset]) -> list[xr.Dataset]:
        """Bring the members' datasets to one choice among equivalent ones, before they are averaged."""
        return parts

    def finish(self, dataset: xr.Dataset, calculator: SpinCalculator) -> xr.Dataset:
        """Restore what averaging over members does not keep, such as the length of an axis."""
        return dataset

    def written(self) -> list[str]:
        """Return what the property writes beside its dataset, as its options say."""
        return []

    def summary(self, dataset: xr.Dataset) -> list[Row]:
        """Return the short table of a dataset."""
        return [
            Row(str(v.attrs["long_name"]), float(v), str(v.attrs["units"]), spread_of(dataset, str(k)))
            for k, v in dataset.data_vars.items()
            if v.ndim == 0 and not str(k).endswith("_std") and np.issubdtype(v.dtype, np.number)
        ]

    def plot(self, dataset: xr.Dataset) -> "Figure":
        """Draw a dataset.

        Raises
        ------
        OptionError : where the property has no picture.
        """
        raise OptionError(f"{self.name} has no plot; leave --plot out")

    def mode(self, calculator: SpinCalculator) -> MomentMode:
        """Return how moments are relaxed: the option, or the calculator's own mode."""
        return calculator.mode if self.options.moments == "calculator" else self.options.moments

    def run(
        self, structure: Atoms, calculator: Any, progress: Progress = silent, journal: Journal | None = None
    ) -> xr.Dataset:
        """Compute the property.

        Parameters
        ----------
        structure : periodic structure with initial moments, (N, 3) or (N,) in µB; it is not changed.
        calculator : an ASE calculator of the protocol, or one wrapped already.
        progress : called as ``progress(stage, done, total)``.
        journal : keeps finished parts, so that the same run, begun again, goes on where it was.

        Returns
        -------
        The dataset. With a committee every number is the mean over its members, ``<name>_std`` the spread, and
        ``<name>_member`` the members' own values.

        Raises
        ------
        PropertyError : bad structure, moments, options or calculator, or half of a committee's members or more give
            no result, or none like the others'; no result is returned half-done. Fewer are left out with a warning, and
            named in the attribute ``members_without_result``.
        """
        asked = calculator if isinstance(calculator, SpinCalculator) else SpinCalculator(calculator)
        if journal is not None:
            asked.journal = journal
        atoms = check_structure(structure, asked)
        self.check(atoms, asked)
        members = asked.members
        shared = self.prepare(atoms, members, progress)
        parts, failed = _of_members(shared, atoms, members, progress)
        dataset = parts[0]
        if len(members) > 1:
            kept = [k for k in range(len(members)) if k not in failed]
            aligned = dict(zip(kept, shared.align(parts), strict=True))
            failed |= _unlike(aligned, len(members))
            kept = [k for k in kept if k not in failed]
            dataset = combine([aligned[k] for k in kept], kept)
        dataset = shared.finish(dataset, asked)
        if failed:
            sentences = "; ".join(f"member {k + 1}: {' '.join(str(failed[k]).split())}" for k in sorted(failed))
            dataset.attrs[LOST] = sentences
            warnings.warn(
                f"mean and spread are over {len(kept)} of {len(members)} members of the committee ({sentences})",
                stacklevel=2,
            )
        options = {**dataclasses.asdict(self.options), "moments": self.mode(asked)}
        attrs = provenance.attributes(
            atoms, asked, symprec=self.options.symprec, mag_symprec=self.options.mag_symprec, options=options
        )
        dataset.attrs = {"property": self.name, "title": self.title, **dataset.attrs, **attrs}
        return checked(dataset)


def checked(dataset: xr.Dataset) -> xr.Dataset:
    """Return the dataset after checking that it will open anywhere and explain itself.

    Raises
    ------
    PropertyError : a variable without unit or long name, or of a type that netCDF refuses.
    """
    for name, item in dataset.variables.items():
        for key in ("units", "long_name"):
            if not item.attrs.get(key):
                raise PropertyError(f"the variable '{name}' has no {key}; every variable of a dataset needs one")
        if item.dtype.kind not in "fiuUO":
            raise PropertyError(f"the variable '{name}' has the type {item.dtype}, which datasets do not hold")
    dataset.attrs = {k: provenance.attribute(v) for k, v in dataset.attrs.items()}
    return dataset


def _of_members(
    prop: Property, atoms: Atoms, members: Sequence[SpinCalculator], progress: Progress
) -> tuple[list[xr.Dataset], dict[int, PropertyError]]:
    """Compute a property with every member of a committee: datasets, and the errors of members that gave none.

    Raises
    ------
    PropertyError : half of the members or more give no result, or the input is at fault, whatever the member.
    """
    parts: list[xr.Dataset] = []
    failed: dict[int, PropertyError] = {}
    for k, member in enumerate(members):
        prefix = f"member {k + 1}/{len(members)}, " if len(members) > 1 else ""
        try:
            parts.append(prop.compute(atoms.copy(), member, lambda s, d, t, p=prefix: progress(p + s, d, t)))  # type: ignore[misc]
        except (OptionError, StructureError):
            raise
        except PropertyError as error:
            failed[k] = error
            if 2 * len(failed) >= len(members):
                raise
    return parts, failed


def _unlike(parts: Mapping[int, xr.Dataset], total: int) -> dict[int, PropertyError]:
    """Return which datasets cannot be averaged with those of most members, as an error each.

    Parameters
    ----------
    parts : aligned datasets by the members' numbers.
    total : size of the committee, with members that gave no dataset.

    Raises
    ------
    CalculatorError : half of the committee or fewer have datasets that go together.
    """
    alike = {k: [j for j, other in parts.items() if not _differences(part, other)] for k, part in parts.items()}
    most = max(alike.values(), key=len)
    unlike = {k: ", ".join(_differences(part, parts[most[0]])) for k, part in parts.items() if k not in most}
    if unlike and 2 * len(most) <= total:
        raise CalculatorError(
            f"the results of the committee's members differ in {next(iter(unlike.values()))}, and no majority agrees; "
            "where their moments relax to different states, keep the moments fixed"
        )
    return {
        k: CalculatorError(f"its result differs from that of most members in {names}") for k, names in unlike.items()
    }


def _differences(one: xr.Dataset, other: xr.Dataset) -> list[str]:
    """Return why two datasets cannot be averaged: names of dimensions, or variables, or coordinates that differ.

    Coordinates are compared where they are names or indices; those that are numbers may follow a member's moments.
    """
    sizes = [str(d) for d in {**one.sizes, **other.sizes} if one.sizes.get(d) != other.sizes.get(d)]
    names = sorted(str(name) for name in one.variables.keys() ^ other.variables.keys())
    labels = [
        str(name)
        for name, item in one.coords.items()
        if name in other.coords
        and not np.issubdtype(item.dtype, np.floating)
        and not np.array_equal(item.values, other[name].values)
    ]
    return sizes or names or labels


def combine(parts: Sequence[xr.Dataset], members: Sequence[int]) -> xr.Dataset:
    """Average the members' datasets.

    Parameters
    ----------
    parts : one dataset per member, with the same variables, dimensions and coordinates.
    members : their numbers in the committee, from 0.

    Returns
    -------
    Floating-point variables as mean, ``_std`` (standard deviation over members, ddof = 1) and ``_member`` (the values,
    dimension ``member``); other variables as they are in the first member.
    """
    first = parts[0]
    variables: dict[str, xr.Variable] = {}
    for key, item in first.data_vars.items():
        name = str(key)
        if not np.issubdtype(item.dtype, np.floating):
            variables[name] = item.variable
            continue
        values = np.stack([np.asarray(p[name].values) for p in parts])
        units, text = item.attrs["units"], item.attrs["long_name"]
        dims = [str(d) for d in item.dims]
        variables[name] = xr.Variable(dims, values.mean(axis=0), item.attrs)
        variables[f"{name}_std"] = variable(dims, values.std(axis=0, ddof=1), units, f"{text}, committee spread")
        variables[f"{name}_member"] = variable(("member", *dims), values, units, f"{text}, per member")
    coords: dict[Any, Any] = dict(first.coords)
    coords["member"] = variable("member", np.asarray(members), "1", "committee member")
    return xr.Dataset(variables, coords, first.attrs)


def over_finite(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return mean, spread (ddof = 1) and number of the finite values along the first axis.

    The mean is NaN where there is none, the spread where there is one alone.
    """
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    mean = np.where(finite, values, 0.0).sum(axis=0) / np.where(count > 0, count, np.nan)
    squares = (np.where(finite, values - mean, 0.0) ** 2).sum(axis=0)
    return mean, np.sqrt(squares / np.where(count > 1, count - 1, np.nan)), count


def over_members(dataset: xr.Dataset, names: Sequence[str]) -> xr.Dataset:
    """Return a committee's dataset with some means and spreads taken over the members that have a finite value.

    Their number is added as ``<name>_count``. A dataset of one model is returned as it is.
    """
    changed: dict[str, xr.Variable] = {}
    for name in names:
        if f"{name}_member" not in dataset:
            continue
        mean, spread, count = over_finite(dataset[f"{name}_member"].values)
        changed[name] = dataset[name].variable.copy(data=mean)
        changed[f"{name}_std"] = dataset[f"{name}_std"].variable.copy(data=spread)
        text = f"{dataset[name].attrs['long_name']}, members that have one"
        changed[f"{name}_count"] = variable([str(d) for d in dataset[name].dims], count, "1", text)
    return dataset.assign(changed)


def of_members(dataset: xr.Dataset, name: str, **where: Any) -> str:
    """Return ``", k of n members"`` for a number that only some members have, else nothing."""
    if f"{name}_count" not in dataset:
        return ""
    count, total = int(dataset[f"{name}_count"].isel(**where)), dataset.sizes["member"]
    return f", {count} of {total} members" if count < total else ""


def spread_of(dataset: xr.Dataset, name: str, **where: Any) -> float | None:
    """Return the committee spread of one number of a dataset, None without a committee."""
    if f"{name}_std" not in dataset:
        return None
    return float(dataset[f"{name}_std"].sel(**where))


def derived(dataset: xr.Dataset, number: Callable[[xr.Dataset], float]) -> tuple[float, float | None]:
    """Return a number that follows from a dataset: its mean over the committee, and its spread.

    Parameters
    ----------
    dataset : of a committee, or of one model, which has no spread.
    number : takes a dataset whose variables are those of one member.
    """
    if "member" not in dataset.coords:
        return number(dataset), None
    values = []
    for k in range(dataset.sizes["member"]):
        one = dataset.isel(member=k)
        names = [str(name) for name in dataset.data_vars if f"{name}_member" in dataset]
        values.append(number(one.assign({name: one[f"{name}_member"] for name in names})))
    return float(np.mean(values)), float(np.std(values, ddof=1))


def write_dataset(dataset: xr.Dataset, path: str | Path) -> None:
    """Write a dataset as netCDF, in one piece: the file appears complete or not at all.

    Raises
    ------
    OutputError : the place cannot be written.
    """
    write_whole(path, lambda temporary: dataset.to_netcdf(temporary, engine="netcdf4", format="NETCDF4"))


def plugins() -> dict[str, EntryPoint]:
    """Return the entry points of every installed property by name."""
    return {e.name: e for e in entry_points(group=GROUP)}


def load_property(name: str) -> type[Property]:
    """Return the class of a property by its name.

    Raises
    ------
    OptionError : no such property.
    PropertyError : the plugin cannot be loaded, or is none.
    """
    known = plugins()
    if name not in known:
        raise OptionError(f"there is no property '{name}'{did_you_mean(name, known)}")
    try:
        found = known[name].load()
    except Exception as error:
        raise PropertyError(f"the property '{name}' of {known[name].value} cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Property)):
        raise PropertyError(f"{known[name].value} is not a Property; the plugin '{name}' must be mended")
    return found


def as_json(dataset: xr.Dataset, rows: Sequence[Row]) -> str:
    """Return the table of a result with its attributes as JSON text."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not np.isfinite(value):
            return None
        return value

    table = [{k: plain(v) for k, v in dataclasses.asdict(row).items()} for row in rows]
    attrs: Mapping[Any, Any] = dataset.attrs
    return json.dumps({"results": table, "attributes": {str(k): plain(v) for k, v in attrs.items()}}, indent=1)
