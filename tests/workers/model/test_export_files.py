"""The files of an export have the modes that the user's umask gives."""

from __future__ import annotations

import os
import stat

import pytest

from sigray.workers.config import ModelConfig
from sigray.workers.model.export import EXPORTERS
from sigray.workers.model.towers import build_model
from tests.helpers.data import TOWERS


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
@pytest.mark.parametrize("form", ["open_clip", "safetensors"])
def test_exported_files_have_ordinary_modes(form, umask, mode, tmp_path):
    model = ModelConfig(towers=TOWERS)
    before = os.umask(umask)
    try:
        EXPORTERS[form](build_model(model), model, tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert any(name.endswith(".safetensors") for name in modes)
    assert set(modes.values()) == {mode}, modes
