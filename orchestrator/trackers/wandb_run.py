"""Keep a run in Weights & Biases: on a server, or in files for `wandb sync`."""

from __future__ import annotations

import io
import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sigray.orchestrator.run_folder import TrackedAs, read_run
from sigray.orchestrator.trackers.feed import Image, Row, Shown

_WRITER_S = 30.0  # for a wandb-core whose process died to write its last records
_BLOCK = 32768  # bytes, of the log's format: that of LevelDB
_HEADER = 7  # bytes, of the file, and of each record: checksum, length, kind
_FULL, _FIRST, _LAST = 1, 2, 4  # kinds of a record; 3 is a part in between
_EXIT_CODE = {"finished": 0, "stopped": 0}


class WandB:
    """A run of W&B; the x axis is samples seen.

    Each row is a record of history, which counts as shown if it is in the run's file (offline) or on the server.
    wandb-core, a process that wandb starts, writes the file. After a kill it may still write, so `open` waits for it.
    """

    def __init__(self, folder: Path, tracked: TrackedAs) -> None:
        self._folder, self._tracked = folder, tracked
        self._run: Any = None
        self._next = 0  # W&B's own count of rows

    @staticmethod
    def check() -> None:
        """Raise if wandb can neither log in nor write offline."""
        import wandb

        if wandb.setup().settings.mode in ("offline", "dryrun", "disabled", "shared"):
            return
        if not wandb.login(verify=True, timeout=20):
            raise RuntimeError("no API key: set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline")

    def open(self) -> Shown:
        import wandb

        if self._run is not None:
            wandb.teardown()
        files = self._folder / "wandb"
        _wait_for_writers(files)
        found = _Found()
        for path in sorted(files.glob("offline-run-*/*.wandb")):
            for row in read_history(path):
                found.add(row)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "sigray"),
            id=self._tracked.id,
            name=self._tracked.name,
            group=self._tracked.group or None,
            dir=str(self._folder),
            config=read_run(str(self._folder)).model_dump(mode="json"),
            resume="allow",
            allow_val_change=True,
            # Nothing of this process or its machine: the training workers run elsewhere.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_stats=True,
                init_timeout=60,
            ),
        )
        if not self._run.offline and self._run.resumed:
            place = f"{self._run.entity}/{self._run.project}/{self._run.id}"
            for row in wandb.Api(timeout=30).run(place).scan_history():
                found.add(row)
        self._next = max(found.next_row, self._run.step)
        self._run.define_metric("*", step_metric="samples_seen")
        return found.shown

    def send(self, rows: list[Row]) -> None:
        for row in rows:
            self._send(row)

    def _send(self, row: Row) -> None:
        content: dict[str, Any] = {**row.figures, "samples_seen": row.samples_seen}
        if not row.is_evaluation:
            content["step"] = row.step
        for key, images in row.images.items():
            content[key] = _captioned(images)
        self._run.log(content, step=self._next, commit=True)
        self._next += 1

    def note(self, notes: dict[str, str]) -> None:
        self._run.summary.update(notes)

    def close(self, status: str) -> None:
        import wandb

        self._run.finish(exit_code=_EXIT_CODE.get(status, 1))
        wandb.teardown()


class _Found:
    """What rows of history show."""

    def __init__(self) -> None:
        self.shown = Shown()
        self.next_row = 0

    def add(self, row: dict[str, Any]) -> None:
        self.next_row = max(self.next_row, int(row.get("_step", -1)) + 1)
        if row.get("samples_seen") is not None:
            self.shown.add_keys(int(row["samples_seen"]), [key for key, value in row.items() if value is not None])


def _captioned(images: list[Image]) -> Any:
    """Return images with their right and best names as captions.

    A table would keep the images outside of the run's folder.
    """
    import wandb
    from PIL.Image import open as decode

    captions = [f"{image.truth}: {', '.join(image.best)}" for image in images]
    return [
        wandb.Image(decode(io.BytesIO(image.png)), caption=caption)
        for image, caption in zip(images, captions, strict=True)
    ]


def read_history(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of history of a .wandb file, up to where a crash cut it short.

    wandb 0.31 has no reader in Python. The file is a log as LevelDB's, of protobuf records.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data = path.read_bytes()
    at = _HEADER
    parts = b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:
            at += _BLOCK - at % _BLOCK  # the rest of the block is padding
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += _HEADER
        body = data[at : at + length]
        if kind == 0 or len(body) < length:
            return
        at += length
        parts = body if kind in (_FULL, _FIRST) else parts + body
        if kind in (_FULL, _LAST):
            record = Record()
            try:
                record.ParseFromString(parts)
            except DecodeError:
                return
            if record.WhichOneof("record_type") == "history":
                yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}


def _wait_for_writers(folder: Path) -> None:
    """Wait until no process has a file of a folder open.

    Raises:
        RuntimeError: one has it open for too long.
    """
    deadline = time.monotonic() + _WRITER_S
    while pid := _writer_in(folder):
        if time.monotonic() > deadline:
            raise RuntimeError(f"process {pid} still writes to {folder}")
        time.sleep(0.2)


def _writer_in(folder: Path) -> str:
    """Return the id of another process with an open file in a folder, or ""."""
    inside = f"{folder.resolve()}/"
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link).startswith(inside) and link.parts[2] != str(os.getpid()):
                return link.parts[2]
        except OSError:
            continue  # it has ended, or belongs to another user
    return ""
