"""Limits and structure of the potential."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmace.derivatives import evaluate
from mmace.io import load_model, model_files, save_model
from mmace.model import MagneticMACE, ModelConfig
from mmace.symmetry import assert_symmetries

from .potentials import CARRIERS, MOMENT_SCALE, batch, graph_of, pair, random_model, triclinic


def test_at_zero_moment_the_model_is_its_plain_part() -> None:
    model = random_model()
    plain = MagneticMACE(ModelConfig.from_dict({**model.config.to_dict(), "magnetic": False}))
    weights = model.state_dict()
    # The magnetic network makes filters for two bases side by side; the plain one has the first alone.
    for name in plain.state_dict():
        if name.endswith(f"filters.network.layer{len(model.config.radial_mlp)}.weight"):
            weights[name] = weights[name][:, : weights[name].shape[1] // 2]
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    graph = batch()
    bare = graph.with_moments(torch.zeros_like(graph.moments))
    torch.testing.assert_close(model.site_energies(bare), plain.site_energies(graph), rtol=1e-12, atol=1e-12)
    assert float((model.site_energies(graph) - plain.site_energies(graph)).detach().abs().max()) > 1e-3


def test_every_weight_gets_a_gradient_in_one_step() -> None:
    model = random_model()
    found = evaluate(model, batch(), forces=True, stress=True, magnetic_forces=True, create_graph=True)
    terms = (found.energy, found.forces, found.stress, found.magnetic_forces)
    loss = sum(term.square().sum() for term in terms if term is not None)
    names, parameters = zip(*model.named_parameters(), strict=True)
    carriers = model.moment_basis.carriers
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        live = gradient != 0
        if "gate" in name or "self_terms" in name or name == "one_body.weight":
            # Elements without moments have moment weights that nothing can reach, by construction.
            assert not live[~carriers].any() or "receiver" in name or "sender" in name
            live = live[carriers]
        assert live.all(), f"{name}: {int((~live).sum())} of {live.numel()} weights get no gradient"


@pytest.mark.parametrize("seed", range(3))
def test_energy_rises_with_large_moments_for_random_weights(seed: int) -> None:
    assert_rises(random_model(seed, energy_scale=1.0))


def test_energy_rises_with_large_moments_for_shipped_weights() -> None:
    for path in model_files("default"):
        assert_rises(load_model(path))


def assert_rises(model: MagneticMACE) -> None:
    """Each element's moment alone, and all together, from inside the range to 3 M_z."""
    symbols = [z for z in model.elements if z in ("Al", "Fe", "Cr", "N")]
    for symbol in symbols:
        atoms = pair()
        atoms.symbols[:] = symbol
        for both in (True, False):
            rises = []
            for reduced in (1.0, 1.25, 1.5, 2.0, 2.5, 3.0):
                moment = reduced * model.config.moment_scale[symbol]
                atoms.set_initial_magnetic_moments([[0, 0, moment], [moment * both, 0, 0]])
                graph = graph_of_model(model, atoms)
                found = evaluate(model, graph, magnetic_forces=True)
                rises.append(float(found.energy))
                assert found.magnetic_forces is not None
                assert torch.isfinite(found.magnetic_forces).all()
                if reduced >= 1.5:
                    assert float(found.magnetic_forces[0, 2]) < 0.0, "the force must push the moment back"
            assert np.all(np.diff(rises[1:]) > 0), (symbol, rises)
            assert rises[-1] > rises[0] + 1.0


def graph_of_model(model: MagneticMACE, atoms):  # type: ignore[no-untyped-def]
    from mmace.graph import Graph

    return Graph.from_atoms(atoms, model.elements, model.config.cutoff, 1.0)


GRID = list(
    itertools.product(
        (1, 2, 3),
        (1, 2, 3),
        (1, 2, 3),
        ((True, True, True), (True, True, False), (True, False, True), (True, False, False), (False, False, False)),
    )
)


@pytest.mark.parametrize(("layers", "correlation", "max_ell", "switches"), GRID)
def test_every_combination_of_options_builds_and_runs(
    layers: int, correlation: int, max_ell: int, switches: tuple[bool, bool, bool]
) -> None:
    magnetic, products, spin_orbit = switches
    model = random_model(
        num_layers=layers,
        correlation=correlation,
        max_ell=max_ell,
        channels=4,
        magnetic=magnetic,
        products=products,
        spin_orbit=spin_orbit,
        pair_repulsion=layers != 2,
    )
    found = evaluate(model, graph_of([pair()]), forces=True, magnetic_forces=True)
    assert found.forces is not None
    assert torch.isfinite(found.forces).all()
    assert float(found.forces.abs().max()) > 0


def test_the_spin_orbit_part_does_not_need_the_exchange_products() -> None:
    model = random_model(products=False)
    assert model.config.has_spin_orbit
    assert_symmetries(model, batch())
    atoms = pair()
    energies = {}
    for soc in (0.0, 1.0):
        graph = graph_of([atoms], soc)
        turned = graph.with_moments(graph.moments[:, [1, 2, 0]])
        flipped = graph.with_moments(graph.moments * torch.tensor([[1.0], [-1.0]]))
        energies[soc] = [float(evaluate(model, g).energy) for g in (graph, turned, flipped)]
    assert energies[0.0] == pytest.approx([energies[0.0][0]] * 3, abs=1e-10)
    assert np.abs(np.diff(energies[1.0])).min() > 1e-6


def test_old_files_without_products_have_no_spin_orbit_part(tmp_path: Path) -> None:
    model = random_model(products=False, spin_orbit=False)
    graph = batch(soc=0.0)
    energies = model.site_energies(graph)
    model.config = replace(model.config, spin_orbit=True)
    save_model(model, tmp_path / "old.safetensors")
    old = load_model(tmp_path / "old.safetensors")
    assert not old.config.has_spin_orbit
    torch.testing.assert_close(old.site_energies(graph), energies.detach())


def test_float32_agrees_with_float64() -> None:
    graph = batch()
    exact = evaluate(random_model(), graph, forces=True, stress=True, magnetic_forces=True)
    single = evaluate(
        random_model().float(), graph.to(dtype=torch.float32), forces=True, stress=True, magnetic_forces=True
    )
    for name in ("energy", "forces", "stress", "magnetic_forces"):
        a, b = getattr(exact, name), getattr(single, name).double()
        assert float((a - b).abs().max()) < 2e-5 * float(a.abs().max()) + 1e-6, name


def test_a_batch_equals_its_structures_one_by_one() -> None:
    model = random_model()
    together = evaluate(model, batch(), forces=True, stress=True, magnetic_forces=True)
    for k, atoms in enumerate((triclinic(), pair())):
        alone = evaluate(model, graph_of([atoms]), forces=True, stress=True, magnetic_forces=True)
        mine = batch().batch == k
        torch.testing.assert_close(together.energy[k], alone.energy[0])
        for name in ("forces", "magnetic_forces"):
            torch.testing.assert_close(getattr(together, name)[mine], getattr(alone, name))
        torch.testing.assert_close(together.stress[k], alone.stress[0])  # type: ignore[index]


def test_soc_can_differ_within_a_batch() -> None:
    from mmace.graph import Graph

    model = random_model()
    mixed = Graph.collate([graph_of([triclinic()], 0.0), graph_of([pair()], 1.0)])
    energies = evaluate(model, mixed).energy
    expected = [evaluate(model, graph_of([a], s)).energy[0] for a, s in ((triclinic(), 0.0), (pair(), 1.0))]
    torch.testing.assert_close(energies, torch.stack(expected))


def test_importing_changes_no_global_state() -> None:
    code = """
import os, torch, logging
before = (torch.get_default_dtype(), dict(os.environ), logging.root.level, logging.root.manager.disable)
import mmace.calculator
from mmace.model import MagneticMACE, ModelConfig
from mmace.symmetry import assert_symmetries
MagneticMACE(ModelConfig(elements=("Fe",), moment_scale={"Fe": 3.0}, carriers=("Fe",), channels=4))
after = (torch.get_default_dtype(), dict(os.environ), logging.root.level, logging.root.manager.disable)
assert before == after, (before, after)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_results_do_not_depend_on_the_default_dtype(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from mmace.io import save_model

    save_model(random_model(), tmp_path / "model.safetensors")
    energies = []
    for dtype in (torch.float32, torch.float64):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            energies.append(load_model(tmp_path / "model.safetensors").site_energies(batch()))
        finally:
            torch.set_default_dtype(before)
    assert torch.equal(energies[0], energies[1])


def test_config_refuses_a_missing_moment_scale() -> None:
    with pytest.raises(ValueError, match="Cr"):
        ModelConfig(elements=("Fe", "Cr"), moment_scale={"Fe": 3.0}, carriers=CARRIERS)
    with pytest.raises(ValueError, match="Xx"):
        ModelConfig(elements=("Xx",), moment_scale={"Xx": 3.0}, carriers=())
    with pytest.raises(ValueError, match="max_ell is 0"):
        random_model(max_ell=0)
    assert ModelConfig.from_dict(random_model().config.to_dict()) == random_model().config
    assert random_model().config.moment_scale == MOMENT_SCALE
