"""Pictures of datasets. Each function takes a dataset and returns a figure; none keeps global state."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .errors import OptionError
from .files import write_whole

GREEK = {"Delta": "Δ", "Lambda": "Λ", "Sigma": "Σ"}
FORMATS = (".png", ".pdf", ".svg")
COLOURS = ("#0b6e99", "#c8553d", "#5b8c5a", "#7a5195")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, with its own canvas."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_format(path: str | Path) -> None:
    """Refuse a picture format that is not one of ours.

    Raises
    ------
    OptionError : unknown suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise OptionError(f"a plot cannot be written as '{suffix or path}'; name a file ending in {', '.join(FORMATS)}")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in one piece."""
    check_format(path)
    write_whole(path, lambda name: figure.savefig(name, dpi=160))


def plot_anisotropy(dataset: xr.Dataset) -> Figure:
    """Draw E(n) over the sphere in an equal-area map, and along great circles through the lattice axes."""
    figure = new_figure(10.0, 4.2)
    sphere: Any = figure.add_subplot(1, 2, 1, projection="mollweide")
    frame = dataset["frame"].values
    local = dataset["n"].values @ frame.T
    energy = dataset["energy"]
    values = energy.min("turn").values if "turn" in energy.dims else energy.values
    longitude, latitude = np.arctan2(local[:, 1], local[:, 0]), np.arcsin(np.clip(local[:, 2], -1, 1))
    if "harmonics" in dataset:
        grid_lon, grid_lat = np.meshgrid(np.linspace(-np.pi, np.pi, 181), np.linspace(-np.pi / 2, np.pi / 2, 91))
        mesh = sphere.pcolormesh(
            grid_lon, grid_lat, _expanded(dataset, _unit(grid_lon, grid_lat)), cmap="viridis", shading="gouraud"
        )
        sphere.scatter(longitude, latitude, s=3, color="white", alpha=0.6)
    else:
        mesh = sphere.scatter(longitude, latitude, c=values, s=40, cmap="viridis")
    figure.colorbar(mesh, ax=sphere, shrink=0.7, label="E(n) − min E  (µeV/atom)")
    sphere.set_xticklabels([])
    sphere.set_title(
        f"{dataset.attrs.get('formula', '')}  {dataset.attrs.get('magnetic_space_group', '')}", fontsize=10
    )
    for axis, marker, label in (("easy_axis", "o", "easy"), ("hard_axis", "X", "hard")):
        if axis in dataset and np.all(np.isfinite(dataset[axis].values)):
            x, y, z = frame @ dataset[axis].values
            sphere.plot(
                np.arctan2(y, x),
                np.arcsin(np.clip(z, -1, 1)),
                marker,
                ms=9,
                mfc="none",
                mec="red",
                mew=1.8,
                label=label,
            )
    sphere.legend(loc="lower right", fontsize=8, framealpha=0.9) if sphere.get_legend_handles_labels()[0] else None
    lines: Any = figure.add_subplot(1, 2, 2)
    angle = np.linspace(0, np.pi / 2, 91)
    corners = {"x'": [1, 0, 0], "y'": [0, 1, 0], "z'": [0, 0, 1]}
    if "harmonics" in dataset:
        circles = (("z'", "x'", "-"), ("z'", "y'", "--"), ("x'", "y'", "-"))
        for (a, b, style), colour in zip(circles, COLOURS, strict=False):
            n = np.outer(np.cos(angle), corners[a]) + np.outer(np.sin(angle), corners[b])
            lines.plot(np.rad2deg(angle), _expanded(dataset, n), style, color=colour, label=f"{a} → {b}")
        lines.set_xlabel("angle from the first axis (degree)")
    else:
        turns = dataset["turn"].values
        for k, colour in zip(np.argsort(values)[[0, len(values) // 2, -1]], COLOURS, strict=False):
            lines.plot(turns, energy.values[k], "o-", color=colour, label=f"n = {np.round(local[k], 2)}")
        lines.set_xlabel("turn about n (degree)")
    lines.set_ylabel("E(n) − min E  (µeV/atom)")
    lines.legend(fontsize=8, frameon=False)
    lines.set_title(_constants(dataset), fontsize=9)
    return figure


def _unit(longitude: np.ndarray, latitude: np.ndarray) -> np.ndarray:
    return np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=-1
    )


def _expanded(dataset: xr.Dataset, directions: np.ndarray) -> np.ndarray:
    """Sum the spherical harmonics of a dataset at directions (..., 3) in the lattice's frame, µeV/atom."""
    from .anisotropy import real_harmonics

    basis, _ = real_harmonics(directions.reshape(-1, 3))
    return np.asarray(basis @ dataset["harmonics"].values).reshape(directions.shape[:-1])


def _constants(dataset: xr.Dataset) -> str:
    if "K" not in dataset:
        return f"E(hard) − E(easy) = {float(dataset['mae']):.3g} µeV/atom"
    parts = []
    visible = 1e-3 * float(np.abs(dataset["K"]).max())
    for name in dataset["constant"].values:
        value = float(dataset["K"].sel(constant=name))
        if abs(value) < visible:
            continue
        spread = f" ± {float(dataset['K_std'].sel(constant=name)):.1g}" if "K_std" in dataset else ""
        parts.append(f"{name} = {value:.3g}{spread}")
    return ", ".join(parts) + "  µeV/atom"


def plot_eos(dataset: xr.Dataset) -> Figure:
    """Draw E(V) of every state with its Birch-Murnaghan fit, and m(V)."""
    from .eos import birch_murnaghan

    figure = new_figure(6.0, 6.5)
    upper: Any = figure.add_subplot(2, 1, 1)
    lower: Any = figure.add_subplot(2, 1, 2, sharex=upper)
    volumes = dataset["volume"].values
    fine = np.linspace(volumes[0], volumes[-1], 200)
    ground = float(dataset["E0"].sel(fit="birch_murnaghan").min())
    for state, colour in zip(dataset["state"].values, COLOURS, strict=False):
        one = dataset.sel(state=state)
        fit = one.sel(fit="birch_murnaghan")
        e0, v0, b0, b1 = (float(fit[k]) for k in ("E0", "V0", "B0", "B0_prime"))
        from .conventions import GPA

        upper.plot(volumes, 1e3 * (one["energy"].values - ground), "o", ms=4, color=colour, label=str(state))
        upper.plot(fine, 1e3 * (birch_murnaghan(fine, e0, v0, b0 / GPA, b1) - ground), "-", color=colour, lw=1)
        lower.plot(volumes, one["moment"].values, "o-", ms=4, color=colour, label=str(state))
        if "energy_std" in dataset:
            lower.fill_between(
                volumes,
                one["moment"].values - one["moment_std"].values,
                one["moment"].values + one["moment_std"].values,
                color=colour,
                alpha=0.2,
                lw=0,
            )
    upper.set_ylabel("E − E0  (meV/atom)")
    upper.set_title(dataset.attrs.get("formula", ""), fontsize=10)
    upper.legend(frameon=False)
    lower.set_xlabel("volume (Å³/atom)")
    lower.set_ylabel("|m|  (µB)")
    return figure


def _mark(axes: Any, labels: list[list[Any]], offset: float) -> None:
    """Draw the special points of a path; two at one place share it."""
    merged: dict[float, list[str]] = {}
    for name, x in labels:
        letter = str(name).rstrip("0123456789")
        shown = "Γ" if name == "G" else str(name).replace(letter, GREEK.get(letter, letter))
        merged.setdefault(round(float(x), 6), []).append(shown)
    for x, names in merged.items():
        axes.axvline(x, color="0.8", lw=0.8, zorder=0)
        if offset:
            where = axes.get_xaxis_transform()
            axes.text(x, offset, "|".join(dict.fromkeys(names)), transform=where, ha="center", va="top")
    axes.tick_params(labelbottom=False, bottom=False)


def _broken(place: np.ndarray, *curves: np.ndarray) -> tuple[np.ndarray, ...]:
    """Insert NaN where a path jumps from one point to another at the same place."""
    jumps = np.flatnonzero(np.diff(place) <= 0) + 1
    return tuple(np.insert(np.asarray(v, dtype=float), jumps, np.nan, axis=0) for v in (place, *curves))


def plot_spiral(dataset: xr.Dataset) -> Figure:
    """Draw E(q) with its magnon scale where there is one, and |m|(q)."""
    figure = new_figure(7.0, 6.0)
    upper: Any = figure.add_subplot(2, 1, 1)
    lower: Any = figure.add_subplot(2, 1, 2, sharex=upper)
    labels = json.loads(dataset.attrs["path_labels"])
    marker = "-" if labels else "o"
    spread = dataset["energy_std"].values if "energy_std" in dataset else np.zeros(dataset.sizes["wave"])
    jumping = (dataset["energy"].values, spread, dataset["length"].values)
    if labels:
        place, energy, spread, lengths = _broken(dataset["position"].values, *jumping)
    else:
        place, (energy, spread, lengths) = dataset["position"].values, jumping
    upper.plot(place, energy, marker, color=COLOURS[0])
    upper.fill_between(place, energy - spread, energy + spread, color=COLOURS[0], alpha=0.2, lw=0)
    if "asymmetry" in dataset:
        upper.plot(place, dataset["asymmetry"].values, "s", ms=3, color=COLOURS[1], label="E(q) − E(−q)")
        upper.legend(frameon=False)
    upper.set_ylabel("E(q) − E(0)  (meV/atom)")
    upper.set_title(f"{dataset.attrs.get('formula', '')}, {dataset.attrs['route']}", fontsize=10)
    carrying = [k for k in range(lengths.shape[1]) if np.nanmax(lengths[:, k]) > 0]
    for k, colour in zip(carrying, COLOURS * len(carrying), strict=False):
        lower.plot(place, lengths[:, k], marker, color=colour, label=f"{dataset['element'].values[k]} {k}")
    lower.set_ylabel("|m|  (µB)")
    lower.legend(frameon=False, fontsize=8)
    if labels:
        _mark(upper, labels, 0.0)
        _mark(lower, labels, -0.04)
    else:
        lower.set_xlabel("wave vector number")
    return figure


def plot_exchange(dataset: xr.Dataset) -> Figure:
    """Draw J and |D| of every pair against distance, and the largest eigenvalue of J(q)."""
    figure = new_figure(10.0, 4.0)
    left: Any = figure.add_subplot(1, 2, 1)
    right: Any = figure.add_subplot(1, 2, 2)
    distance = dataset["distance"].values
    left.axhline(0, color="0.8", lw=0.8)
    left.plot(distance, dataset["J"].values, "o", ms=4, color=COLOURS[0], label="J")
    if "J_std" in dataset:
        left.errorbar(distance, dataset["J"].values, dataset["J_std"].values, fmt="none", ecolor=COLOURS[0], lw=0.8)
    strength = np.linalg.norm(dataset["D"].values, axis=1)
    if strength.max(initial=0.0) > 1e-6:
        left.plot(distance, strength, "s", ms=3, color=COLOURS[1], label="|D|")
    left.set_xlabel("distance (Å)")
    left.set_ylabel("meV")
    left.legend(frameon=False)
    left.set_title(dataset.attrs.get("formula", ""), fontsize=10)
    right.plot(*_broken(dataset["position"].values, dataset["J_q"].values), color=COLOURS[0])
    right.set_ylabel("J(q)  (meV)")
    _mark(right, json.loads(dataset.attrs["path_labels"]), -0.02)
    return figure


def plot_magnon(dataset: xr.Dataset) -> Figure:
    """Draw magnon bands, growth of unstable modes as negative energies, and the density of states."""
    figure = new_figure(9.0, 4.2)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    labels = json.loads(dataset.attrs["path_labels"])
    spread = dataset["energy_std"].values if "energy_std" in dataset else np.zeros(dataset["energy"].shape)
    columns = (dataset["energy"].values, dataset["growth"].values, spread)
    place, energy, growth, spread = _broken(dataset["position"].values, *columns)
    left.axhline(0, color="0.8", lw=0.8)
    for k in range(energy.shape[1]):
        left.plot(place, energy[:, k], color=COLOURS[0], lw=1.4)
        left.fill_between(
            place, energy[:, k] - spread[:, k], energy[:, k] + spread[:, k], color=COLOURS[0], alpha=0.2, lw=0
        )
        if np.nanmax(growth[:, k]) > 0:
            left.plot(place, -np.where(growth[:, k] > 0, growth[:, k], np.nan), "--", color=COLOURS[1], lw=1.2)
    if "frozen" in dataset:
        frozen = _broken(dataset["position"].values, dataset["frozen"].values)[1]
        left.plot(place, frozen, ":", color=COLOURS[1], lw=1.4, label="frozen spirals")
        left.legend(frameon=False, fontsize=8)
    left.set_ylabel("ħω  (meV)")
    left.set_title(dataset.attrs.get("formula", ""), fontsize=10)
    _mark(left, labels, -0.02)
    right.plot(dataset["dos"].values, dataset["dos_energy"].values, color=COLOURS[0])
    right.set_xlabel("states/meV/cell")
    right.set_xlim(left=0)
    return figure


def plot_phonon(dataset: xr.Dataset) -> Figure:
    """Draw bands with their errors and a second order, the density of states, and the heat capacity."""
    figure = new_figure(10.0, 4.2)
    grid = figure.add_gridspec(1, 3, width_ratios=(5, 1.4, 2.6))
    bands: Any = figure.add_subplot(grid[0])
    density: Any = figure.add_subplot(grid[1], sharey=bands)
    heat: Any = figure.add_subplot(grid[2])
    values = dataset["frequency"].values
    errors = [dataset[k].values for k in ("frequency_std", "frequency_error") if k in dataset]
    error = errors[-1] if errors else np.zeros_like(values)
    place, middle, width = _broken(dataset["position"].values, values, error)
    for branch in range(middle.shape[1]):
        low, high = middle[:, branch] - width[:, branch], middle[:, branch] + width[:, branch]
        bands.plot(place, middle[:, branch], color=COLOURS[0], lw=1.2)
        bands.fill_between(place, low, high, color=COLOURS[0], alpha=0.25, lw=0)
    if "frequency_second" in dataset:
        place, second = _broken(dataset["position"].values, dataset["frequency_second"].values)
        bands.plot(
            place, second, "--", color=COLOURS[1], lw=1.0, label=[*["second order"], *[None] * (second.shape[1] - 1)]
        )
        bands.legend(frameon=False, fontsize=8)
    bands.axhline(0, color="0.8", lw=0.8, zorder=0)
    bands.set_ylabel("frequency (THz)")
    order = "paramagnetic, " if dataset.attrs.get("order") == "paramagnetic" else ""
    follow = {"fixed": "moments held", "magnitudes": "|m| follows", "full": "moments follow"}
    title = f"{dataset.attrs.get('formula', '')}, {order}{follow[dataset.attrs['moments_follow']]}"
    bands.set_title(title, fontsize=10)
    _mark(bands, json.loads(dataset.attrs["path_labels"]), -0.02)
    bands.set_xlim(place[0], np.nanmax(place))
    density.plot(dataset["dos"].values, dataset["dos_frequency"].values, color=COLOURS[0], lw=1.2)
    density.set_xlabel("DOS (1/THz)")
    density.tick_params(labelleft=False)
    heat.plot(dataset["temperature"].values, dataset["heat_capacity"].values, color=COLOURS[0], label="C_v")
    heat.plot(dataset["temperature"].values, dataset["entropy"].values, "--", color=COLOURS[2], label="S")
    heat.set_xlabel("T (K)")
    heat.set_ylabel("J/K per mole of atoms")
    heat.legend(frameon=False, fontsize=8)
    return figure


def plot_relax(dataset: xr.Dataset) -> Figure:
    """Draw energy, residuals and moment of each step; or the energies of the orders above the best."""
    if "order" in dataset.dims:
        ranked = dataset.where(np.isfinite(dataset["above"]), drop=True)
        names = [f"{n}, {m:.2f} µB" for n, m in zip(ranked["order"].values, ranked["moment"].values, strict=True)]
        figure = new_figure(6.0, 1.2 + 0.35 * len(names))
        bars: Any = figure.add_subplot(1, 1, 1)
        spread = ranked["above_std"].values if "above_std" in ranked else None
        bars.barh(names, ranked["above"].values, xerr=spread, color=COLOURS[0])
        bars.invert_yaxis()
        bars.set_xlabel("E − E(best)  (meV/atom)")
        bars.set_title(dataset.attrs.get("formula", ""), fontsize=10)
        return figure
    figure = new_figure(6.5, 6.5)
    step = dataset["step"].values
    upper: Any = figure.add_subplot(3, 1, 1)
    middle: Any = figure.add_subplot(3, 1, 2, sharex=upper)
    lower: Any = figure.add_subplot(3, 1, 3, sharex=upper)
    energy = dataset["step_energy"].values
    upper.plot(step, 1e3 * (energy - energy[-1]), "o-", ms=3, color=COLOURS[0])
    upper.set_ylabel("E − E(end)  (meV/atom)")
    upper.set_title(dataset.attrs.get("formula", ""), fontsize=10)
    for name, label, colour in (("step_force", "force, eV/Å", 0), ("step_stress", "stress, GPa", 1)):
        values = dataset[name].values
        if values.max() > 0:
            middle.semilogy(step, np.where(values > 0, values, np.nan), "o-", ms=3, color=COLOURS[colour], label=label)
    middle.set_ylabel("largest residual")
    if middle.lines:
        middle.legend(frameon=False, fontsize=8)
    lower.plot(step, dataset["step_moment"].values, "o-", ms=3, color=COLOURS[2])
    lower.set_ylabel("mean |m|  (µB)")
    lower.set_xlabel("step")
    return figure


def plot_coupled(dataset: xr.Dataset) -> Figure:
    """Draw coupled bands coloured by their magnon part, over the bands without coupling."""
    figure = new_figure(8.0, 4.6)
    axes: Any = figure.add_subplot(1, 1, 1)
    apart = np.concatenate([dataset["phonon_energy"].values, dataset["magnon_energy"].values], axis=1)
    place, apart = _broken(dataset["position"].values, apart)
    axes.plot(place, apart, "-", color="0.75", lw=0.8, zorder=1)
    energy, part = dataset["energy"].values, dataset["magnon_fraction"].values
    positions = np.broadcast_to(dataset["position"].values[:, None], energy.shape)
    order = np.argsort(part, axis=None)
    shown = axes.scatter(
        positions.ravel()[order],
        energy.ravel()[order],
        c=np.clip(part.ravel()[order], 0, 1),
        s=6,
        cmap="coolwarm",
        vmin=0,
        vmax=1,
        zorder=2,
    )
    figure.colorbar(shown, ax=axes, label="magnon part")
    top = 1.25 * max(float(dataset["phonon_energy"].max()), 1e-6)
    axes.set_ylim(min(1.05 * float(energy.min()), 0.0), max(top, min(1.05 * float(energy.max()), 2 * top)))
    axes.set_ylabel("energy (meV)")
    axes.set_title(f"{dataset.attrs.get('formula', '')}  {dataset.attrs.get('magnetic_space_group', '')}", fontsize=10)
    _mark(axes, json.loads(dataset.attrs["path_labels"]), -0.02)
    axes.set_xlim(place[0], np.nanmax(place))
    return figure


def plot_elastic(dataset: xr.Dataset) -> Figure:
    """Draw the constants of each level with those from finite strain, and Young's modulus in the lattice's planes."""
    from .elastic import INDEPENDENT
    from .stiffness import to_tensor, voigt_rotation

    figure = new_figure(10.0, 4.2)
    left: Any = figure.add_subplot(1, 2, 1)
    right: Any = figure.add_subplot(1, 2, 2, projection="polar")
    labels = INDEPENDENT[dataset.attrs["system"]].split()
    levels = [str(x) for x in dataset["level"].values]
    place = np.arange(len(labels))
    width = 0.8 / len(levels)
    rows, columns = ([int(label[k]) - 1 for label in labels] for k in (0, 1))
    for k, (level, colour) in enumerate(zip(levels, COLOURS, strict=False)):
        values = dataset["C_lattice"].sel(level=level).values[rows, columns]
        spread = dataset["C_lattice_std"].sel(level=level).values[rows, columns] if "C_lattice_std" in dataset else None
        left.bar(place + (k - (len(levels) - 1) / 2) * width, values, width, yerr=spread, color=colour, label=level)
    left.set_xticks(place, [f"C{label}" for label in labels])
    left.set_ylabel("GPa")
    left.set_title(dataset.attrs.get("formula", ""), fontsize=10)
    left.legend(frameon=False, fontsize=8)
    matrix = voigt_rotation(dataset["frame"].values)
    inverse = np.linalg.inv(matrix)
    compliance = inverse.T @ dataset["S"].values[-1] @ inverse
    half = np.array([1.0, 1, 1, 0.5, 0.5, 0.5])
    tensor = to_tensor(compliance * np.outer(half, half))
    angle = np.linspace(0, 2 * np.pi, 241)
    axes = np.eye(3)
    for (a, b), colour, style in zip(((0, 1), (0, 2), (1, 2)), COLOURS, ("-", "--", ":"), strict=False):
        n = np.outer(np.cos(angle), axes[a]) + np.outer(np.sin(angle), axes[b])
        young = 1 / np.einsum("ijkl,bi,bj,bk,bl->b", tensor, n, n, n, n)
        name = "x'y'z'"[2 * a : 2 * a + 2] + " → " + "x'y'z'"[2 * b : 2 * b + 2]
        right.plot(angle, young, style, color=colour, label=name)
    right.set_title(f"Young's modulus (GPa), {levels[-1]}", fontsize=10)
    right.legend(loc="lower right", fontsize=8)
    return figure


def plot_curie(dataset: xr.Dataset) -> Figure:
    """Draw order, susceptibility, heat and Binder cumulant of every run against temperature."""
    figure = new_figure(9.0, 6.5)
    panels = figure.subplots(2, 2, sharex=True)
    axes = {"order": panels[0, 0], "susceptibility": panels[0, 1], "heat": panels[1, 0], "binder": panels[1, 1]}
    labels = {"order": "|M| / M(0)", "susceptibility": "χ  (µB²/eV)", "heat": "C  (k_B)", "binder": "Binder cumulant"}
    ways = list(dict.fromkeys(dataset["run_way"].values.tolist()))
    temperature = dataset["temperature"].values
    for run in range(dataset.sizes["run"]):
        way, atoms = str(dataset["run_way"].values[run]), int(dataset["run_atoms"].values[run])
        first = int(np.flatnonzero(dataset["run_way"].values == way)[0]) == run
        for key, panel in axes.items():
            panel.errorbar(
                temperature,
                dataset[key].values[run],
                dataset[f"{key}_error"].values[run],
                fmt="o-" if first else "s--",
                ms=3.5,
                lw=1.1,
                capsize=2,
                color=COLOURS[ways.index(way) % len(COLOURS)],
                label=f"{way}, {atoms} moments",
            )
    measured = float(dataset["tc_measured"])
    for key, panel in axes.items():
        panel.set_ylabel(labels[key])
        if temperature[0] <= measured <= temperature[-1]:
            panel.axvline(measured, color="0.7", lw=0.8, zorder=0)
    axes["order"].legend(frameon=False, fontsize=8)
    axes["order"].set_title(dataset.attrs.get("formula", ""), fontsize=10)
    for key in ("heat", "binder"):
        axes[key].set_xlabel("temperature (K)")
    return figure
