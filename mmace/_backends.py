"""The parts of e3nn and mace-torch that the potential is built from, imported without side effects.

e3nn 0.4.4 keeps a `slice` in a data file that torch >= 2.6 only loads once `slice` is declared safe, and importing
`mace` switches torch's weights-only guard off for the whole process. The first is declared here, the second undone.
"""

import contextlib
import io
import logging
import os

import torch

torch.serialization.add_safe_globals([slice])

_GUARD = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_guard_before = os.environ.get(_GUARD)

from e3nn import o3  # noqa: E402
from e3nn.nn import FullyConnectedNet  # noqa: E402

# mace reports missing GPU kernels to the root logger and to standard output while it is imported.
_disabled_before = logging.root.manager.disable
logging.disable(logging.WARNING)
try:
    with contextlib.redirect_stdout(io.StringIO()):
        from mace.modules.blocks import RadialEmbeddingBlock
        from mace.modules.symmetric_contraction import SymmetricContraction
        from mace.tools.cg import U_matrix_real
finally:
    logging.disable(_disabled_before)
    if _guard_before is None:
        os.environ.pop(_GUARD, None)
    else:
        os.environ[_GUARD] = _guard_before

__all__ = [
    "FullyConnectedNet",
    "RadialEmbeddingBlock",
    "SymmetricContraction",
    "U_matrix_real",
    "o3",
]
