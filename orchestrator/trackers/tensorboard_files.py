"""Write a run as TensorBoard events, without torch and without TensorFlow."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from sigray.orchestrator.trackers.feed import Row, Shown

FOLDER = "tensorboard"


class TensorBoard:
    """A folder of event files, one for each process; x axis in samples seen.

    A row is one event, and an event has a checksum. So a row is in a file as a whole, or is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._file: Any = None

    def open(self) -> Shown:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        shown = Shown()
        self._folder.mkdir(exist_ok=True)
        for path in sorted(self._folder.glob("events.out.tfevents.*")):
            for event in EventFileLoader(str(path)).Load():
                if keys := [value.tag for value in event.summary.value]:
                    shown.add_keys(event.step, keys)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter((self._folder / name).open("wb"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        return shown

    def send(self, rows: list[Row]) -> None:
        for row in rows:
            self._send(row)

    def _send(self, row: Row) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in row.figures.items()]
        for key, images in row.images.items():
            for number, image in enumerate(images):
                tag = key if not number else f"{key}/{number}"
                width, height = (int.from_bytes(image.png[at : at + 4], "big") for at in (16, 20))
                content = Summary.Image(encoded_image_string=image.png, width=width, height=height)
                values.append(Summary.Value(tag=tag, image=content))
        self._write(Event(wall_time=time.time(), step=row.samples_seen, summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        self._file.write(event.SerializeToString())
        self._file.flush()

    def note(self, notes: dict[str, str]) -> None:
        """TensorBoard shows no facts of a run."""

    def close(self, status: str) -> None:
        self._file.close()
