"""The command `mmace`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmace.cli import main
from mmace.io import save_model

from .potentials import random_model


def test_info_shows_settings_and_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(random_model(), tmp_path / "model.safetensors", {"data": "a note"})
    assert main(["info", str(tmp_path / "model.safetensors")]) == 0
    shown = capsys.readouterr().out
    for word in ("moment_scale", "cutoff", "SHA-256", "a note"):
        assert word in shown


def test_errors_are_one_sentence_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"not a model")
    for model in ("broken.safetensors", "absent.safetensors", "absent.json"):
        assert main(["info", str(tmp_path / model)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("label", "train", "eval", "info"))
