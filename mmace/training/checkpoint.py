"""State of a training run on disk: tensors as safetensors, everything else as JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ModelFileError
from ..files import whole_file

FORMAT = "mmace-checkpoint-2"


def write_checkpoint(path: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint; the file appears only when whole.

    Parameters
    ----------
    path : Path
        Name of the file.
    tensors : dict of Tensor
        Weights, averages, optimiser moments.
    state : dict
        Plain JSON types.
    """
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with whole_file(path) as temporary:
        save_file(plain, temporary, metadata={"format": FORMAT, "state": json.dumps(state)})


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_checkpoint` wrote.

    Raises
    ------
    ModelFileError
        The file is damaged or not a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise ModelFileError(f"{path} is not a checkpoint: choose another --out or remove the file.")
        return tensors, json.loads(metadata["state"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ModelFileError(
            f"{path} cannot be read ({error}): it is damaged, choose another --out or remove the file."
        ) from None
