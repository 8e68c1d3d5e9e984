"""Small random models and low-symmetry structures for the tests of the potential."""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms

from mmace.graph import Graph
from mmace.model import MagneticMACE, ModelConfig

ELEMENTS = ("Al", "Cr", "Fe")
CARRIERS = ("Cr", "Fe")
MOMENT_SCALE = {"Al": 1.0, "Cr": 3.1, "Fe": 3.4}


def random_model(seed: int = 0, **options: object) -> MagneticMACE:
    """A random model whose spin-orbit part is as strong as its exchange part, so that no error hides."""
    settings = {
        "elements": ELEMENTS,
        "moment_scale": MOMENT_SCALE,
        "carriers": CARRIERS,
        "channels": 8,
        "cutoff": 4.0,
        "radial_mlp": (16,),
        "energy_scale": 20.0,
        "avg_num_neighbors": 10.0,
        "spin_orbit_scale": 1.0,
        "wall": 5.0,
    }
    torch.manual_seed(seed)
    model = MagneticMACE(ModelConfig(**{**settings, **options}))
    with torch.no_grad():
        model.one_body.weight.normal_(std=0.1)
    return model


def triclinic(seed: int = 0) -> Atoms:
    """Fe2Al without any symmetry, non-collinear moments on both iron atoms."""
    rng = np.random.default_rng(seed)
    cell = [[3.1, 0.1, 0.0], [0.5, 3.3, -0.2], [0.2, 0.4, 4.9]]
    scaled = [[0.02, 0.0, 0.01], [0.48, 0.55, 0.35], [0.1, 0.02, 0.64]]
    atoms = Atoms("FeAlFe", scaled_positions=scaled, cell=cell, pbc=True)
    moments = rng.normal(size=(3, 3))
    moments[1] = 0.0
    atoms.set_initial_magnetic_moments(moments)
    return atoms


def pair(seed: int = 1) -> Atoms:
    """CrFe in a sheared cell."""
    rng = np.random.default_rng(seed)
    atoms = Atoms(
        "CrFe",
        scaled_positions=[[0, 0, 0], [0.52, 0.47, 0.5]],
        cell=[[2.9, 0, 0.1], [0.2, 2.8, 0], [0, 0, 3.0]],
        pbc=True,
    )
    atoms.set_initial_magnetic_moments(rng.normal(size=(2, 3)))
    return atoms


def graph_of(structures: list[Atoms], soc: float = 1.0, cutoff: float = 4.0) -> Graph:
    """One batch of structures."""
    return Graph.collate([Graph.from_atoms(a, ELEMENTS, cutoff, soc) for a in structures])


def batch(soc: float = 1.0) -> Graph:
    """Two structures with different numbers of atoms."""
    graph = graph_of([triclinic(), pair()], soc)
    assert len({len(graph.receiver), len(graph.species), graph.n_graphs}) == 3
    return graph
