"""`sigray fetch`: a folder of a bucket on this machine."""

from __future__ import annotations

from pathlib import Path

from sigray.orchestrator.cli.main import main
from sigray.workers.storage import Storage
from tests.helpers.s3 import BUCKET


def test_a_folder_of_a_bucket_is_copied(s3_variables, monkeypatch, tmp_path, capsys):
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    place = f"s3://{BUCKET}/models/fetched"
    assert main(["fetch", place]) == 2
    assert "holds no files" in capsys.readouterr().err
    for name in ("README.md", "deep/model"):
        Storage(place).write(name, name.encode())
    assert main(["fetch", place]) == 0
    assert main(["fetch", f"{place}/", "other"]) == 0
    for folder in (Path("fetched"), Path("other")):
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert found == {"README.md", "deep/model"}
    assert Path("fetched/deep/model").read_text() == "deep/model"
    assert main(["fetch", place]) == 2
    assert "fetched exists: give another DIR" in capsys.readouterr().err


def test_a_name_that_leads_out_is_refused(monkeypatch, tmp_path, capsys):
    """An object of S3 may have any name; a store of the tests takes none of these."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Storage, "walk", lambda self: ["../out"])
    assert main(["fetch", str(tmp_path / "place"), "here"]) == 2
    assert "../out would lead out of here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
