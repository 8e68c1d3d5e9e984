"""Seconds and memory of a training step by model size: what a plan of a large run starts from.

On a CPU the seconds are those the process computed, on one thread, so that a busy machine says much the same; on a
GPU they are of the clock.

python benchmarks/speed/training.py [--device cuda] [--dtype float32] [--elements 89]
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols

from mmace.data import LabelledStructure, label_from_atoms
from mmace.model import MagneticMACE, ModelConfig
from mmace.training import Tolerances
from mmace.training.batches import LabelBatch
from mmace.training.loss import label_loss

SIZES = {
    "small (16 channels, l 2, correlation 2)": {"channels": 16, "max_ell": 2, "correlation": 2, "num_chebyshev": 3},
    "large (64 channels, l 3, correlation 3)": {"channels": 64, "max_ell": 3, "correlation": 3, "num_chebyshev": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--elements", type=int, default=89)
    parser.add_argument("--structures", type=int, default=4, help="of 8 atoms in one step")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, size in SIZES.items():
        model = model_of(args, size)
        batch = LabelBatch.collate(
            [LabelBatch.of(label_of(k, model), model, Tolerances()) for k in range(args.structures)]
        )
        batch = batch.to(args.device)
        atoms, edges = len(batch.graph.species), len(batch.graph.sender)
        times = [step_seconds(model, batch, args.device) for _ in range(args.steps + 1)][1:]
        print(
            f"{name}: {sum(p.numel() for p in model.parameters())} weights, {atoms} atoms, {edges / atoms:.0f} edges "
            f"per atom, {1e3 * min(times) / atoms:.2f} ms per atom and step (least of {args.steps}), "
            f"graph and targets {size_of(batch) / atoms / 1e3:.2f} kB per atom, "
            f"{peak_memory(args.device):.2f} GB at most"
        )


def model_of(args: argparse.Namespace, size: dict[str, int]) -> MagneticMACE:
    elements = tuple(chemical_symbols[1 : args.elements + 1])
    config = ModelConfig(
        elements=elements, moment_scale=dict.fromkeys(elements, 3.0), carriers=elements, spin_orbit=False, **size
    )
    torch.manual_seed(0)
    return MagneticMACE(config).to(getattr(torch, args.dtype)).to(args.device)


def label_of(seed: int, model: MagneticMACE) -> LabelledStructure:
    """A distorted cell of eight atoms at 15 Å^3 an atom, with labels of the right shapes."""
    rng = np.random.default_rng(seed)
    corners = np.array([(i, j, k) for i in (0, 0.5) for j in (0, 0.5) for k in (0, 0.5)])
    symbols = rng.choice(model.elements, 3)
    length = (8 * 15.0) ** (1 / 3)
    atoms = Atoms(rng.choice(symbols, 8), scaled_positions=corners, cell=[length] * 3, pbc=True)
    atoms.positions += rng.normal(0.0, 0.1, (8, 3))
    atoms.set_initial_magnetic_moments(rng.normal(0.0, 1.0, (8, 3)))
    atoms.arrays["magnetic_forces"] = np.zeros((8, 3))
    atoms.calc = SinglePointCalculator(atoms, energy=-5.0, forces=np.zeros((8, 3)), stress=np.zeros(6))
    return label_from_atoms(atoms, "a cell")


def step_seconds(model: MagneticMACE, batch: LabelBatch, device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    model.zero_grad()
    label_loss(model, batch, Tolerances()).total().backward()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began


def size_of(item: object) -> int:
    """Bytes of all tensors in nested dataclasses."""
    if isinstance(item, torch.Tensor):
        return item.numel() * item.element_size()
    return sum(size_of(value) for value in vars(item).values())


def peak_memory(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
