"""Training by several processes: torch's DistributedDataParallel under `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import MMACEError
from ..graph import Graph
from .batches import LabelBatch, Target
from .restraint import Probe

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes
    ----------
    rank : int
        Number of this process; process 0 writes files and reports.
    count : int
        Processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list that all of them hold."""
        return list(items[self.rank :: self.count])

    def gathered(self, parts: Any) -> list[Any]:
        """What every process passed, in the order of the processes."""
        if self.count == 1:
            return [parts]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, parts)
        return found

    def agreed(self, value: Any) -> Any:
        """The value of process 0, on every process."""
        return self.gathered(value)[0]


def current_processes() -> Processes:
    """The process group that `process_group` made, or one process alone."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes()


@contextmanager
def process_group(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes that `torchrun` started; without `torchrun` there is one.

    Parameters
    ----------
    device : str
        `cpu`, or `cuda` for one GPU to each process of a machine.

    Returns
    -------
    Processes
        This process.
    str
        Its device.

    Raises
    ------
    MMACEError
        The processes cannot find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(), device
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MMACEError(f"the processes cannot be joined ({reason}): start them with torchrun.") from None
    try:
        yield current_processes(), device
    finally:
        dist.destroy_process_group()


def part_of_probe(probe: Probe, kept: Sequence[int]) -> Probe:
    """The probe of some of its structures.

    Parameters
    ----------
    probe : Probe
        From `make_probe`, of a whole batch, so that its random numbers do not depend on how the batch is shared.
    kept : sequence of int
        Structures to keep, in rising order.
    """
    batch = probe.batch
    chosen = torch.zeros(batch.graph.n_graphs, dtype=torch.bool, device=batch.graph.batch.device)
    chosen[list(kept)] = True
    atoms = chosen[batch.graph.batch]
    part = LabelBatch(
        graph=_part_of_graph(batch.graph, chosen, atoms),
        energy=_rows(batch.energy, chosen),
        forces=_rows(batch.forces, atoms),
        stress=_rows(batch.stress, chosen),
        magnetic_forces=_rows(batch.magnetic_forces, atoms),
        axis=batch.axis[atoms],
        transverse=batch.transverse[atoms],
    )
    return Probe(part, probe.stretched[atoms], probe.expanded[chosen])


def _part_of_graph(graph: Graph, chosen: torch.Tensor, atoms: torch.Tensor) -> Graph:
    edges = atoms[graph.receiver]
    number = torch.cumsum(atoms.long(), 0) - 1
    structure = torch.cumsum(chosen.long(), 0) - 1
    return replace(
        graph,
        positions=graph.positions[atoms],
        cell=graph.cell[chosen],
        moments=graph.moments[atoms],
        species=graph.species[atoms],
        receiver=number[graph.receiver[edges]],
        sender=number[graph.sender[edges]],
        unit_shifts=graph.unit_shifts[edges],
        batch=structure[graph.batch[atoms]],
        soc=graph.soc[chosen],
    )


def _rows(target: Target, chosen: torch.Tensor) -> Target:
    return Target(*(getattr(target, f.name)[chosen] for f in fields(Target)))
