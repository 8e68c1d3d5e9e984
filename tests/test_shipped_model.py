"""The shipped Fe-Al committee against physics that its labels hold; every member on its own."""

import numpy as np
import pytest
import torch
from ase import Atoms

from mmace.calculator import MMACECalculator
from mmace.derivatives import evaluate
from mmace.graph import Graph

MEMBERS = MMACECalculator(soc=False).models


@pytest.fixture(params=range(len(MEMBERS)))
def model(request):
    return MEMBERS[request.param]


def cubic(symbols, a, moments, c_over_a=1.0):
    atoms = Atoms(symbols, scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[a, a, a * c_over_a], pbc=True)
    atoms.set_initial_magnetic_moments(moments)
    return atoms


def relaxed(model, atoms):
    """Energy per atom (eV) and moments (N, 3) with magnitudes relaxed, without spin-orbit coupling."""
    atoms.calc = MMACECalculator(model=model, soc=False, moments="magnitudes")
    return atoms.get_potential_energy() / len(atoms), atoms.calc.results["magmoms"]


def minima(lengths, energies):
    inside = (energies[1:-1] < energies[:-2]) & (energies[1:-1] < energies[2:])
    return lengths[1:-1][inside]


def test_orders_of_bcc_iron(model):
    energies = {
        name: relaxed(model, cubic("Fe2", 2.85, moments))[0]
        for name, moments in (("fm", [2.2, 2.2]), ("afm", [1.8, -1.8]), ("nm", [0.0, 0.0]))
    }
    assert energies["afm"] - energies["fm"] == pytest.approx(0.43, abs=0.05)
    assert energies["nm"] - energies["fm"] == pytest.approx(0.50, abs=0.08)


@pytest.mark.parametrize(
    ("symbols", "start", "length"), [("Fe2", [2.2, 2.2], 2.84), ("FeAl", [0.9, 0.0], 2.88), ("Fe2", [1.8, -1.8], 2.78)]
)
def test_equation_of_state_has_one_minimum(model, symbols, start, length):
    lengths = np.arange(2.5, 3.11, 0.05)
    energies = np.array([relaxed(model, cubic(symbols, a, start))[0] for a in lengths])
    assert minima(lengths, energies) == pytest.approx([length], abs=0.06)


def test_moment_of_ordered_iron_aluminium(model):
    _, moments = relaxed(model, cubic("FeAl", 2.90, [0.9, 0.0]))
    assert moments[0, 2] == pytest.approx(0.8, abs=0.15)
    assert moments[1] == pytest.approx(np.zeros(3), abs=1e-9)


@pytest.mark.parametrize("a", [2.75, 2.9, 3.05])
@pytest.mark.parametrize("symbols", ["Fe2", "FeAl"])
def test_energy_rises_beyond_the_longest_moment(model, symbols, a):
    scale = model.config.moment_scale["Fe"]
    lengths = np.linspace((scale - 0.1) / 1.2, 1.5 * scale, 15)
    graphs = [
        Graph.from_atoms(cubic(symbols, a, [m, m if symbols == "Fe2" else 0.0]), model.elements, model.config.cutoff)
        for m in lengths
    ]
    energies = evaluate(model, Graph.collate(graphs)).energy.numpy()
    assert (np.diff(energies) > 0).all()


def test_anisotropy_of_strained_iron_aluminium(model):
    """GPAW's force theorem gives E[100] - E[001] = -86.5 µeV per formula unit."""
    graph = Graph.from_atoms(cubic("FeAl", 2.83, [0.77, 0.0], 1.08), model.elements, model.config.cutoff, soc=1.0)
    moments = torch.zeros(3, 2, 3, dtype=torch.float64)
    moments[:, 0] = 0.77 * torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.5**0.5, 0.0, 0.5**0.5]])
    with torch.no_grad():
        along_c, along_a, between = (1e6 * model.spin_energies(model.geometry(graph), moments).sum(1)).tolist()
    assert -130.0 < along_a - along_c < -43.0
    assert between - along_c == pytest.approx(0.5 * (along_a - along_c), rel=0.1)


def test_moments_that_follow_are_at_no_saddle(model):
    """Without spin-orbit coupling nothing holds the direction of all moments, whatever force relaxation left over."""
    for moment in (1.9, 2.0, 2.3):
        atoms = cubic("Fe2", 2.83, [moment, moment])
        usual = MMACECalculator(model, soc=False, moments="full").hessian(atoms, ["ee_relaxed"])["ee_relaxed"]
        sharp = MMACECalculator(model, soc=False, moments="full", tolerance=1e-9)
        assert usual == pytest.approx(sharp.hessian(atoms, ["ee_relaxed"])["ee_relaxed"], rel=1e-4, abs=1e-3)
