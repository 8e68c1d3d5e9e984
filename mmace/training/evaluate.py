"""Errors of a model or committee on labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from ase.units import GPa

from ..data import LabelledStructure, groups_of
from ..derivatives import evaluate
from ..graph import Graph
from ..model import MagneticMACE
from .batches import DirectionBatch
from .loss import direction_energies
from .recipe import Tolerances

ATOMS_AT_ONCE = 64
SPREAD_BINS = 4
NO_SPREAD = 1e-9


@dataclass(frozen=True)
class Prediction:
    """What a model says about one label, in the units of the label; shapes as in `LabelledStructure`."""

    energy: float
    forces: np.ndarray
    stress: np.ndarray
    magnetic_forces: np.ndarray


@dataclass(frozen=True)
class Errors:
    """Root mean square and mean absolute errors over some labels; None where there is nothing to compare.

    Attributes
    ----------
    n_frames : int
        Labels, directions of anisotropy groups included.
    n_groups : int
        Anisotropy groups.
    energy_* : float or None
        meV/atom, labels outside anisotropy groups.
    forces_* : float or None
        meV/Å, per component.
    stress_* : float or None
        GPa, per component.
    magnetic_forces_* : float or None
        meV/µB, per component.
    magnetic_forces_along_* : float or None
        meV/µB, component along the moment.
    anisotropy_* : float or None
        Energy about the mean of its group, µeV/atom.
    anisotropy_label_rms_ueV_per_atom : float or None
        Size of the labels that `anisotropy_rmse_ueV_per_atom` is to be compared with.
    """

    n_frames: int
    n_groups: int
    energy_rmse_meV_per_atom: float | None
    energy_mae_meV_per_atom: float | None
    forces_rmse_meV_per_A: float | None
    forces_mae_meV_per_A: float | None
    stress_rmse_GPa: float | None
    stress_mae_GPa: float | None
    magnetic_forces_rmse_meV_per_muB: float | None
    magnetic_forces_mae_meV_per_muB: float | None
    magnetic_forces_along_rmse_meV_per_muB: float | None
    magnetic_forces_along_mae_meV_per_muB: float | None
    anisotropy_rmse_ueV_per_atom: float | None
    anisotropy_mae_ueV_per_atom: float | None
    anisotropy_label_rms_ueV_per_atom: float | None

    def to_dict(self) -> dict[str, int | float | None]:
        """The errors as plain JSON types."""
        return asdict(self)


Quantity = Callable[[LabelledStructure, Any], np.ndarray]


def _energy(label: LabelledStructure, source: LabelledStructure | Prediction) -> np.ndarray:
    value = np.nan if label.anisotropy_group is not None else source.energy / len(label) * 1e3
    return np.array([value])


def _forces(label: LabelledStructure, source: LabelledStructure | Prediction) -> np.ndarray:
    return 1e3 * source.forces.ravel()


def _stress(label: LabelledStructure, source: LabelledStructure | Prediction) -> np.ndarray:
    return source.stress / GPa


def _magnetic_forces(label: LabelledStructure, source: LabelledStructure | Prediction) -> np.ndarray:
    return 1e3 * source.magnetic_forces.ravel()


def _along(label: LabelledStructure, source: LabelledStructure | Prediction) -> np.ndarray:
    size = np.linalg.norm(label.moments, axis=1, keepdims=True)
    axis = np.divide(label.moments, size, out=np.full_like(label.moments, np.nan), where=size > 0)
    along = (source.magnetic_forces * axis).sum(1)
    if isinstance(source, LabelledStructure):
        along = np.where(np.isfinite(along), along, source.magnetic_forces_parallel)
    return 1e3 * along


QUANTITIES: dict[str, tuple[Quantity, str]] = {
    "energy": (_energy, "meV_per_atom"),
    "forces": (_forces, "meV_per_A"),
    "stress": (_stress, "GPa"),
    "magnetic_forces": (_magnetic_forces, "meV_per_muB"),
    "magnetic_forces_along": (_along, "meV_per_muB"),
}


def predict(model: MagneticMACE, labels: Sequence[LabelledStructure]) -> list[Prediction]:
    """Predictions for labels, in their order.

    Energies of labels in an anisotropy group are given about the mean over the labels of that group. Elements without
    moments in the model have none here, whatever the label induced there, and NaN as magnetic force.

    Parameters
    ----------
    model : MagneticMACE
        The potential; each label is evaluated with or without spin-orbit coupling as it was calculated.
    labels : sequence of LabelledStructure
        Labels.
    """
    labels = [label.carried_by(model.config.carriers) for label in labels]
    found: dict[int, Prediction] = {}
    single = [k for k, label in enumerate(labels) if label.anisotropy_group is None]
    for chunk in _chunks(single, labels):
        found.update(zip(chunk, _predict_together(model, [labels[k] for k in chunk]), strict=True))
    index = {id(label): k for k, label in enumerate(labels)}
    for group in groups_of(labels):
        batch = DirectionBatch.of(group, model, Tolerances()).to(model.device)
        with torch.no_grad():
            energies = direction_energies(model, batch)[:, 0].cpu().numpy()
        n_atoms = len(group[0])
        for label, energy in zip(group, energies - energies.mean(), strict=True):
            unknown = np.full((n_atoms, 3), np.nan)
            found[index[id(label)]] = Prediction(float(energy), unknown, np.full(6, np.nan), unknown)
    return [found[k] for k in range(len(labels))]


def errors_of(labels: Sequence[LabelledStructure], predictions: Sequence[Prediction]) -> Errors:
    """Errors of predictions, over what the labels hold.

    Parameters
    ----------
    labels : sequence of LabelledStructure
        Labels.
    predictions : sequence of Prediction
        From `predict`, in the same order; of a committee, the mean.
    """
    values: dict[str, float | None] = {}
    for name, (quantity, unit) in QUANTITIES.items():
        error = _differences(quantity, labels, predictions)
        values[f"{name}_rmse_{unit}"] = _rms(error)
        values[f"{name}_mae_{unit}"] = float(np.abs(error).mean()) if len(error) else None
    labelled, error = _anisotropy(labels, predictions)
    return Errors(
        n_frames=len(labels),
        n_groups=len(groups_of(labels)),
        **values,  # type: ignore[arg-type]
        anisotropy_rmse_ueV_per_atom=_rms(error),
        anisotropy_mae_ueV_per_atom=float(np.abs(error).mean()) if len(error) else None,
        anisotropy_label_rms_ueV_per_atom=_rms(labelled),
    )


def mean_prediction(members: Sequence[Sequence[Prediction]]) -> list[Prediction]:
    """Mean over the members of a committee, label by label."""
    return [
        Prediction(
            energy=float(np.mean([p.energy for p in of_label])),
            forces=np.mean([p.forces for p in of_label], axis=0),
            stress=np.mean([p.stress for p in of_label], axis=0),
            magnetic_forces=np.mean([p.magnetic_forces for p in of_label], axis=0),
        )
        for of_label in zip(*members, strict=True)
    ]


def spread_calibration(
    labels: Sequence[LabelledStructure], members: Sequence[Sequence[Prediction]]
) -> dict[str, dict[str, Any]]:
    """How far a committee's spread tells its error.

    Parameters
    ----------
    labels : sequence of LabelledStructure
        Labels.
    members : sequence of sequence of Prediction
        Predictions of each member.

    Returns
    -------
    dict
        For each kind of label `rms_spread` and `rms_error` of the mean in the units of `Errors`,
        `error_over_spread`, 1 for an honest spread, `correlation` of |error| with the spread, and `binned`, error over
        spread of the labels in quarters from the smallest spread to the largest.
    """
    by_member = {
        name: np.array([_differences(quantity, labels, predictions) for predictions in members])
        for name, (quantity, _) in QUANTITIES.items()
    }
    by_member["anisotropy"] = np.array([_anisotropy(labels, predictions)[1] for predictions in members])
    result = {}
    for name, errors in by_member.items():
        error, spread = np.abs(errors.mean(0)), errors.std(0, ddof=1)
        if len(error) > 1 and spread.std() > 0:
            rms_error, rms_spread = float(np.sqrt((error**2).mean())), float(np.sqrt((spread**2).mean()))
            result[name] = {
                "rms_error": rms_error,
                "rms_spread": rms_spread,
                "error_over_spread": rms_error / rms_spread,
                "correlation": float(np.corrcoef(error, spread)[0, 1]) if error.std() > 0 else 0.0,
                "binned": _binned_ratios(error, spread),
            }
    return result


def _binned_ratios(error: np.ndarray, spread: np.ndarray) -> list[float]:
    """RMS error over RMS spread in bins of equal number from the smallest spread to the largest.

    Components that symmetry makes zero in every member are left out: they have neither error nor spread.
    """
    order = np.argsort(spread, kind="stable")
    order = order[spread[order] > NO_SPREAD * spread.max()]
    return [
        float(np.sqrt((error[part] ** 2).mean() / (spread[part] ** 2).mean()))
        for part in np.array_split(order, SPREAD_BINS)
        if len(part)
    ]


def report(
    labels: Sequence[LabelledStructure],
    members: Sequence[Sequence[Prediction]],
    part_of: Callable[[LabelledStructure], str] | None = None,
) -> dict[str, Any]:
    """Errors over all labels, for each part of the splits and each parent, and the committee's calibration.

    Parameters
    ----------
    labels : sequence of LabelledStructure
        Labels.
    members : sequence of sequence of Prediction
        Predictions of each member; one member is an ordinary model.
    part_of : callable, optional
        Part of the splits that a label is in.
    """
    mean = mean_prediction(members)

    def by(key: Callable[[LabelledStructure], str]) -> dict[str, dict[str, int | float | None]]:
        places: dict[str, list[int]] = {}
        for k, label in enumerate(labels):
            places.setdefault(key(label), []).append(k)
        return {
            name: errors_of([labels[k] for k in kept], [mean[k] for k in kept]).to_dict()
            for name, kept in sorted(places.items())
        }

    result: dict[str, Any] = {**errors_of(labels, mean).to_dict(), "n_members": len(members)}
    if part_of is not None:
        result["by_split"] = by(part_of)
    result["by_parent"] = by(lambda label: label.parent)
    if len(members) > 1:
        result["committee"] = {"all": spread_calibration(labels, members)}
        if part_of is not None:
            for part in result["by_split"]:
                kept = [k for k, label in enumerate(labels) if part_of(label) == part]
                chosen = [[member[k] for k in kept] for member in members]
                result["committee"][part] = spread_calibration([labels[k] for k in kept], chosen)
    return result


def table(results: Mapping[str, Any]) -> str:
    """The errors of `report` as text for the terminal."""
    columns = (
        ("frames", "n_frames", "{:d}"),
        ("E meV/at", "energy_rmse_meV_per_atom", "{:.2f}"),
        ("F meV/Å", "forces_rmse_meV_per_A", "{:.1f}"),
        ("stress GPa", "stress_rmse_GPa", "{:.2f}"),
        ("H meV/µB", "magnetic_forces_rmse_meV_per_muB", "{:.1f}"),
        ("E(n) µeV/at", "anisotropy_rmse_ueV_per_atom", "{:.2f}"),
        ("size of E(n)", "anisotropy_label_rms_ueV_per_atom", "{:.2f}"),
    )
    rows = [("all labels", results)]
    rows += list(results.get("by_split", {}).items())
    rows += list(results["by_parent"].items())
    width = max(len(name) for name, _ in rows)
    lines = [" ".join([f"{'RMSE':{width}}", *(f"{title:>10}" for title, _, _ in columns)])]
    for name, values in rows:
        cells = ["-" if values[key] is None else form.format(values[key]) for _, key, form in columns]
        lines.append(" ".join([f"{name:{width}}", *(f"{cell:>10}" for cell in cells)]))
    for part, kinds in results.get("committee", {}).items():
        lines.append(f"committee of {results['n_members']}, {part}: error / spread, correlation, ratio by spread")
        lines += [
            f"  {kind:22} {values['error_over_spread']:6.2f} {values['correlation']:6.2f}   "
            + " ".join(f"{ratio:.2f}" for ratio in values["binned"])
            for kind, values in kinds.items()
        ]
    return "\n".join(lines)


def _predict_together(model: MagneticMACE, labels: Sequence[LabelledStructure]) -> list[Prediction]:
    config = model.config
    graphs = [
        Graph.from_atoms(x.atoms(), config.elements, config.cutoff, soc=float(x.soc), dtype=model.dtype) for x in labels
    ]
    graph = Graph.collate(graphs).to(model.device)
    result = evaluate(model, graph, forces=True, stress=True, magnetic_forces=True)
    assert result.forces is not None
    assert result.stress is not None
    assert result.magnetic_forces is not None
    ends = np.cumsum([len(label) for label in labels])[:-1]
    forces = np.split(result.forces.double().cpu().numpy(), ends)
    carried = np.isin([symbol for x in labels for symbol in x.symbols], config.carriers)[:, None]
    magnetic_forces = np.split(np.where(carried, result.magnetic_forces.double().cpu().numpy(), np.nan), ends)
    stress = result.stress.double().cpu().numpy()
    return [
        Prediction(float(e), f, s, m)
        for e, f, s, m in zip(result.energy.tolist(), forces, stress, magnetic_forces, strict=True)
    ]


def _chunks(indices: Sequence[int], labels: Sequence[LabelledStructure]) -> list[list[int]]:
    """Indices in runs of about ATOMS_AT_ONCE atoms."""
    chunks: list[list[int]] = []
    atoms = ATOMS_AT_ONCE
    for k in indices:
        if atoms + len(labels[k]) > ATOMS_AT_ONCE:
            chunks.append([])
            atoms = 0
        chunks[-1].append(k)
        atoms += len(labels[k])
    return chunks


def _differences(
    quantity: Quantity, labels: Sequence[LabelledStructure], predictions: Sequence[Prediction]
) -> np.ndarray:
    """All known components of predicted minus labelled."""
    parts = [quantity(x, p) - quantity(x, x) for x, p in zip(labels, predictions, strict=True)]
    error = np.concatenate(parts) if parts else np.zeros(0)
    return error[np.isfinite(error)]


def _anisotropy(
    labels: Sequence[LabelledStructure], predictions: Sequence[Prediction]
) -> tuple[np.ndarray, np.ndarray]:
    """Labelled energies about their group's mean and errors, µeV/atom."""
    predicted = {id(x): p.energy for x, p in zip(labels, predictions, strict=True)}
    labelled_parts, error_parts = [np.zeros(0)], [np.zeros(0)]
    for group in groups_of(labels):
        known = [x for x in group if np.isfinite(x.energy)]
        if len(known) < 2:
            continue
        reference = np.array([x.energy for x in known])
        found = np.array([predicted[id(x)] for x in known])
        unit = 1e6 / len(known[0])
        labelled_parts.append((reference - reference.mean()) * unit)
        error_parts.append((found - found.mean() - reference + reference.mean()) * unit)
    return np.concatenate(labelled_parts), np.concatenate(error_parts)


def _rms(values: np.ndarray) -> float | None:
    return float(np.sqrt((values**2).mean())) if len(values) else None
