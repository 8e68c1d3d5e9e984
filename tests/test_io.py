"""Model files: whole, safe, and refused with one sentence when they are not."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmace.calculator import MMACECalculator
from mmace.errors import ModelFileError
from mmace.io import file_hash, load_model, model_files, read_metadata, save_model, weights_hash

from .potentials import batch, random_model


def test_round_trip(tmp_path: Path) -> None:
    model = random_model(atomic_energies={"Fe": -3456.7, "Cr": -2345.6})
    save_model(model, tmp_path / "model.safetensors", {"data": "none"})
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert torch.equal(loaded.site_energies(batch()), model.site_energies(batch()))
    assert read_metadata(tmp_path / "model.safetensors") == {"data": "none"}
    assert not any(p.requires_grad for p in loaded.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_model(tmp_path / "model.safetensors", dtype=torch.float32).dtype == torch.float32


def test_others_may_read_a_model_as_any_new_file(tmp_path: Path) -> None:
    save_model(random_model(), tmp_path / "model.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_writing_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model.safetensors"
    save_model(random_model(), target)
    before = file_hash(target)

    def broken(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("mmace.io.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_model(random_model(1), target)
    assert file_hash(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_refused_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_model(random_model(), whole)
    with pytest.raises(ModelFileError, match="no model file"):
        load_model(tmp_path / "absent.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(ModelFileError, match="damaged"):
        load_model(cut)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    with pytest.raises(ModelFileError, match="not an mMACE model"):
        load_model(foreign)
    lacking = tmp_path / "lacking.safetensors"
    save_file(
        {"x": torch.zeros(2)},
        lacking,
        metadata={"format": "mmace-model-1", "config": json.dumps(random_model().config.to_dict())},
    )
    with pytest.raises(ModelFileError, match="whole model"):
        load_model(lacking)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (tmp_path / "ran",))

    for name in ("trap.safetensors", "trap.json"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(ModelFileError):
            [load_model(p) for p in model_files(tmp_path / name)]
    assert not (tmp_path / "ran").exists()


def test_committees(tmp_path: Path) -> None:
    for k in range(2):
        save_model(random_model(k), tmp_path / f"member-{k}.safetensors")
    listing = tmp_path / "committee.json"
    listing.write_text(json.dumps({"members": ["member-0.safetensors", "member-1.safetensors"]}))
    files = model_files(listing)
    assert [f.name for f in files] == ["member-0.safetensors", "member-1.safetensors"]
    committee, turned = MMACECalculator(listing), MMACECalculator([load_model(f) for f in files[::-1]])
    assert [m.provenance()["hash"] for m in committee.members] == [file_hash(f) for f in files]
    assert committee.provenance()["hash"] != committee.members[0].provenance()["hash"]
    hashes = [m.provenance()["hash"] for m in turned.members]
    assert len({*hashes, turned.provenance()["hash"]}) == 3
    assert [m.provenance()["hash"] for m in turned.replace(moments="full").members] == hashes
    for wrong in ("[]", '{"members": []}', "{"):
        listing.write_text(wrong)
        with pytest.raises(ModelFileError):
            model_files(listing)
    (tmp_path / "notes.txt").write_text("")
    for path, place in ((tmp_path / "notes.txt", "file"), (tmp_path, "file in it")):
        with pytest.raises(ModelFileError, match=rf"is no model file: give a .* or .json {place}, or one of default\."):
            model_files(path)
    with pytest.raises(ModelFileError, match="there is no model nonsense"):
        model_files("nonsense")
    with pytest.raises(ModelFileError, match="no model file"):
        model_files(tmp_path / "absent.json")


def test_a_hash_may_leave_out_spin_orbit_coupling() -> None:
    model = random_model()
    whole, without = weights_hash(model), weights_hash(model, spin_orbit=False)
    assert whole != without
    weights = dict(model.named_parameters())
    with torch.no_grad():
        next(value for name, value in weights.items() if ".spin_orbit." in name).add_(0.1)
        assert weights_hash(model) != whole
        assert weights_hash(model, spin_orbit=False) == without
        next(value for name, value in weights.items() if ".spin_orbit." not in name).add_(0.1)
    assert weights_hash(model, spin_orbit=False) != without
