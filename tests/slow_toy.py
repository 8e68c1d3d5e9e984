"""A toy of which one evaluation in eight takes a while and leaves a mark in a file, and that can kill its process."""

import os
import signal
import time
import zlib
from pathlib import Path

import numpy as np

from . import toys


class SlowToy(toys.CapableToy):
    """Sleeps before some evaluations, always the same, and writes a line into the file that SLOW_TOY_LOG names.

    An evaluation that begins when SLOW_TOY_FATAL, a folder and a number, holds so many finished files is the last.
    """

    def evaluate_spins(self, atoms, moments, magnetic_forces=True):
        if "SLOW_TOY_FATAL" in os.environ:
            folder, enough = os.environ["SLOW_TOY_FATAL"].rsplit(":", 1)
            if len(list(Path(folder).glob("[!.]*"))) >= int(enough):
                os.kill(os.getpid(), signal.SIGKILL)
        if zlib.crc32(np.ascontiguousarray(moments).tobytes() + atoms.cell.array.tobytes()) % 8 == 0:
            time.sleep(0.3)
            with Path(os.environ["SLOW_TOY_LOG"]).open("a") as log:
                log.write(f"{len(moments)}\n")
        return super().evaluate_spins(atoms, moments, magnetic_forces)


def from_options(model="toy", soc=True, moments="fixed", device="cpu", dtype="float64"):
    fast = toys.from_options(model, soc, moments)
    return SlowToy(*fast.options.terms, soc=soc, moments=moments, name=model)
