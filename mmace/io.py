"""Model files: weights and settings in one safetensors file; nothing loaded can run code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import ModelFileError
from .files import whole_file
from .model import MagneticMACE, ModelConfig, is_spin_orbit

FORMAT = "mmace-model-1"


def save_model(model: MagneticMACE, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a model as safetensors, its settings in the header; the file appears only when whole.

    Parameters
    ----------
    model : MagneticMACE
        The potential.
    path : path
        Name of the file.
    metadata : mapping str → str, optional
        Notes to keep with the weights, such as the data they were trained on.
    """
    header = {**(metadata or {}), "format": FORMAT, "config": json.dumps(model.config.to_dict())}
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_model(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
) -> MagneticMACE:
    """Read a model that `save_model` wrote.

    Parameters
    ----------
    path : path
        Name of the file.
    device : torch.device or str
        Where to put the weights.
    dtype : torch.dtype
        float64 or float32.

    Raises
    ------
    ModelFileError
        The file is missing, damaged, or not one of ours.
    """
    metadata, tensors = _read(path)
    try:
        model = MagneticMACE(_config_of(json.loads(metadata["config"]), tensors))
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelFileError(f"{path} does not hold a whole model ({reason}): it is damaged, get it again.") from None
    model.requires_grad_(False)
    return model.to(device=device, dtype=dtype).eval()


def _config_of(settings: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> ModelConfig:
    """Settings of a saved model."""
    config = ModelConfig.from_dict(settings)
    # files from when a model without the products had no spin-orbit part either, whatever its settings say
    if not config.products and not any(map(is_spin_orbit, tensors)):
        return replace(config, spin_orbit=False)
    return config


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The notes that were saved with a model.

    Raises
    ------
    ModelFileError
        The file is missing, damaged, or not one of ours.
    """
    metadata, _ = _read(path)
    return {key: value for key, value in metadata.items() if key not in ("format", "config")}


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ModelFileError(f"there is no model file {path}: give an existing .safetensors file.") from None
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path} cannot be read as safetensors ({error}): it is damaged, get it again.") from None
    if metadata.get("format") != FORMAT:
        raise ModelFileError(f"{path} is not an mMACE model: use a file that `mmace train` wrote.")
    return metadata, tensors


def model_files(model: str | os.PathLike[str]) -> list[Path]:
    """Files of a model or committee, one for each member.

    Parameters
    ----------
    model : str or path
        A shipped name such as "default", a .safetensors file, or a .json file {"members": [file names]}.

    Raises
    ------
    ModelFileError
        No such model, or a list of members that cannot be read.
    """
    path = Path(model)
    if path.suffix == ".safetensors":
        return [path]
    if path.suffix != ".json":
        weights = Path(str(resources.files("mmace.weights")))
        path = weights / f"{model}.json"
        if not path.exists():
            shipped = ", ".join(sorted(p.stem for p in weights.glob("*.json")))
            wrong = f"{model} is no model file" if os.path.exists(model) else f"there is no model {model}"
            inside = " in it" if os.path.isdir(model) else ""
            raise ModelFileError(f"{wrong}: give a .safetensors or .json file{inside}, or one of {shipped}.")
    try:
        members = json.loads(path.read_text())["members"]
    except FileNotFoundError:
        raise ModelFileError(f"there is no model file {path}: give an existing file.") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise ModelFileError(f'{path} does not list a committee: it needs {{"members": [file names]}}.') from None
    if not isinstance(members, list) or not members or not all(isinstance(member, str) for member in members):
        raise ModelFileError(f"{path} lists no files of members: a committee needs at least one.")
    return [path.parent / member for member in members]


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def weights_hash(model: MagneticMACE, spin_orbit: bool = True) -> str:
    """SHA-256 over the settings and weights of a model that is in no file.

    Parameters
    ----------
    model : MagneticMACE
        The potential.
    spin_orbit : bool
        Whether the weights of spin-orbit coupling count; without them the hash tells whether two models agree on
        everything that has none.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        if is_spin_orbit(name) and not spin_orbit:
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
