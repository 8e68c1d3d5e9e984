"""The model before training: all constants that are measured from the training labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from ase.data import atomic_numbers

from ..blocks import MomentBasis
from ..data import LabelledStructure, groups_of
from ..errors import LabelError
from ..graph import Graph
from ..model import MagneticMACE, ModelConfig, is_spin_orbit
from .batches import DirectionBatch
from .loss import direction_energies
from .recipe import Recipe

ONE_BODY_PRIOR = 0.1  # residual energy per atom over the size expected of E1's coefficients
MIN_ENERGY_SCALE = 1e-3  # eV


def initial_model(labels: Sequence[LabelledStructure], recipe: Recipe, seed: int) -> MagneticMACE:
    """Random model with reference energies, moment scales and units fitted to the training labels.

    Parameters
    ----------
    labels : sequence of LabelledStructure
        Training labels alone; without any that have spin-orbit coupling, neither has the model.
    recipe : Recipe
        Settings of the model.
    seed : int
        Seed of the random weights.

    Raises
    ------
    LabelError
        No label holds an energy.
    """
    elements = sorted({s for label in labels for s in label.symbols}, key=atomic_numbers.__getitem__)
    largest = _largest_moments(labels, elements)
    settings = dict(recipe.model)
    if not any(label.soc for label in labels):
        settings["spin_orbit"] = False
    config = ModelConfig(
        elements=tuple(elements),
        moment_scale={z: 1.2 * largest[z] + 0.1 if largest[z] > 0 else 1.0 for z in elements},
        carriers=tuple(z for z in elements if largest[z] > 0),
        **settings,
    )
    energies, one_body, residual = reference_energies(labels, config)
    config = replace(
        config,
        atomic_energies=energies,
        energy_scale=max(residual, MIN_ENERGY_SCALE),
        avg_num_neighbors=_mean_neighbours(labels, config),
    )
    model = _seeded(config, seed)
    groups = groups_of(labels)
    if groups and config.has_spin_orbit:
        config = replace(config, spin_orbit_scale=_spin_orbit_scale(model, groups, recipe))
        model = _seeded(config, seed)
    with torch.no_grad():
        model.one_body.weight.copy_(torch.tensor(one_body))
    return model.to(torch.float64 if recipe.dtype == "float64" else torch.float32)


def restart_spin_orbit(model: MagneticMACE, seed: int) -> None:
    """Replace a model's weights of spin-orbit coupling by random ones of the same size.

    Parameters
    ----------
    model : MagneticMACE
        Keeps all other weights.
    seed : int
        Seed of the random weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if is_spin_orbit(name):
                size = weights.square().mean().sqrt()
                weights.copy_(size * torch.randn(weights.shape, generator=generator, dtype=torch.float64))


def reference_energies(
    labels: Sequence[LabelledStructure], config: ModelConfig
) -> tuple[dict[str, float], np.ndarray, float]:
    """Least-squares energies of single atoms and of their moments.

    Parameters
    ----------
    labels : sequence of LabelledStructure
        Training labels; those of anisotropy groups have no absolute energy and are left out.
    config : ModelConfig
        Elements, moment scales and number of Chebyshev polynomials.

    Returns
    -------
    energies : dict
        E0 of each element, eV.
    one_body : ndarray (Z, P)
        Coefficients of E1, eV.
    residual : float
        Root mean square of what is left, eV/atom.

    Raises
    ------
    LabelError
        No label holds an energy.
    """
    usable = [label for label in labels if np.isfinite(label.energy) and label.anisotropy_group is None]
    if not usable:
        raise LabelError("no training label holds an energy: a model needs labels with energies.")
    n_elements, degree = len(config.elements), config.num_chebyshev
    basis = MomentBasis(
        torch.tensor([config.moment_scale[z] for z in config.elements], dtype=torch.float64),
        torch.tensor([z in config.carriers for z in config.elements]),
        degree,
    )
    rows = []
    for label in usable:
        species = torch.tensor([config.elements.index(s) for s in label.symbols])
        polynomials = basis(torch.tensor(label.moments)[None], species).chebyshev[0].numpy()
        membership = np.eye(n_elements)[species.numpy()]
        terms = np.einsum("nz,np->zp", membership, polynomials)
        rows.append(np.concatenate([membership.sum(0), terms.ravel()]) / len(label))
    design = np.array(rows)
    target = np.array([label.energy / len(label) for label in usable])
    prior = np.concatenate([np.zeros(n_elements), np.full(n_elements * degree, ONE_BODY_PRIOR)])
    solution = np.linalg.lstsq(
        np.concatenate([design, np.diag(prior)]), np.concatenate([target, np.zeros(len(prior))]), rcond=None
    )[0]
    residual = float(np.sqrt(np.mean((design @ solution - target) ** 2)))
    energies = {z: float(e) for z, e in zip(config.elements, solution[:n_elements], strict=True)}
    return energies, solution[n_elements:].reshape(n_elements, degree), residual


def _seeded(config: ModelConfig, seed: int) -> MagneticMACE:
    """Model with random weights that depend on `seed` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MagneticMACE(config)


def _largest_moments(labels: Sequence[LabelledStructure], elements: Sequence[str]) -> dict[str, float]:
    largest = dict.fromkeys(elements, 0.0)
    for label in labels:
        for symbol, moment in zip(label.symbols, np.linalg.norm(label.moments, axis=1), strict=True):
            largest[symbol] = max(largest[symbol], float(moment))
    return largest


def _mean_neighbours(labels: Sequence[LabelledStructure], config: ModelConfig) -> float:
    graphs = [Graph.from_atoms(label.atoms(), config.elements, config.cutoff) for label in labels]
    return max(1.0, sum(len(g.sender) for g in graphs) / sum(len(g.species) for g in graphs))


def _spin_orbit_scale(model: MagneticMACE, groups: Sequence[Sequence[LabelledStructure]], recipe: Recipe) -> float:
    """Size of the spin-orbit features that gives random weights the anisotropy of the labels, on average."""
    predicted, labelled = 0.0, 0.0
    for group in groups:
        batch = DirectionBatch.of(group, model, recipe.tolerances)
        with torch.no_grad():
            energies = direction_energies(model, batch)
        predicted += float((energies - energies.mean(0)).square().mean())
        labelled += float((batch.energy.weight * batch.energy.value.square()).sum())
    if predicted == 0.0 or labelled == 0.0:
        return model.config.spin_orbit_scale
    return model.config.spin_orbit_scale * float(np.sqrt(labelled / predicted))
