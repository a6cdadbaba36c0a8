"""Run folders as an attacker would write them, by name: each stands for a kind of content."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.run_folders import CONFIG, HOSTILE, SUMMARY, evaluation, made, metrics_line, write_run
from tests.helpers.sweeps import study_content

CANARY = "canary-of-a-file-outside"
_DEEP = 100_000

Draw = Callable[[Path, Path, str], None]  # folder of a good run to be spoiled, a foreign file, address of a store


def _linked(name: str) -> Draw:
    def draw(folder: Path, secret: Path, _: str) -> None:
        file = folder / name
        file.unlink(missing_ok=True)
        file.symlink_to(secret)

    return draw


def _linked_folder(name: str) -> Draw:
    """The foreign file is found as `config.yaml`, `step-0000000001.json` and so on in the folder of the link."""

    def draw(folder: Path, secret: Path, _: str) -> None:
        (folder / name).rename(folder / "moved") if (folder / name).exists() else None
        (folder / name).symlink_to(secret.parent)

    return draw


def _fifo(name: str) -> Draw:
    def draw(folder: Path, *_: Any) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return draw


def _socket(name: str) -> Draw:
    def draw(folder: Path, *_: Any) -> None:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket has at most 108 bytes
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
        os.chdir(here)

    return draw


def _sparse(name: str, size: int) -> Draw:
    def draw(folder: Path, *_: Any) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return draw


def _text(name: str, content: str | bytes) -> Draw:
    def draw(folder: Path, *_: Any) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return draw


def _config(**sections: Any) -> Draw:
    def draw(folder: Path, _: Path, store: str) -> None:
        text = yaml.safe_dump(CONFIG | sections).replace("STORE", store)
        (folder / "config.yaml").write_text(text)

    return draw


def _summary(**changes: Any) -> Draw:
    return _text("summary.json", json.dumps(SUMMARY | changes))


def _sweep(**changes: Any) -> Draw:
    def draw(folder: Path, _: Path, store: str) -> None:
        text = yaml.safe_dump(study_content(**changes)).replace("STORE", store)
        (folder / "study.yaml").write_text(text)

    return draw


def _many_files(folder: Path, *_: Any) -> None:
    for number in range(1500):
        (folder / "evaluations" / f"step-{number:010d}.json").write_text(json.dumps({"step": number}))


def _unreadable(folder: Path, *_: Any) -> None:
    (folder / "config.yaml").chmod(0)


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(10 * [f'*{before}'])}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
_SUMMARY = SUMMARY | {"zero_shot": {}}  # without charts, which take a second each
_HUGE: Any = {key: 10**300 for key in ("steps", "samples_seen", "train_s", "total_s")}
_RUN = CONFIG["run"]
_FORMULA = {"languages": {"$\\frac{": {"$x$": {"retrieval": {"image_to_text_r1": 0.5, "image_to_text_chance1": 0.1}}}}}

RUNS: dict[str, Draw] = {
    **{f"link-{Path(name).stem}": _linked(name) for name in (
        "config.yaml", "metrics.jsonl", "summary.json", "events.jsonl", "lease.json", "report.html",
        "evaluations/step-0000000332.json")},
    **{f"link-folder-{name}": _linked_folder(name) for name in ("evaluations", "checkpoints", "metrics")},
    **{f"fifo-{name.partition('.')[0]}": _fifo(name) for name in (
        "config.yaml", "metrics.jsonl", "summary.json", "events.jsonl", "lease.json", "report.html")},
    "fifo-evaluation": _fifo("evaluations/step-0000000400.json"),
    "socket": _socket("metrics.jsonl"),
    "folder-as-file": lambda folder, *_: ((folder / "summary.json").unlink(), (folder / "summary.json").mkdir())[0],
    "file-as-folder": _text("checkpoints", "x"),
    "huge-metrics": _sparse("metrics.jsonl", 10 << 30),
    "huge-config": _sparse("config.yaml", 10 << 30),
    "huge-summary": _sparse("summary.json", 10 << 30),
    "huge-report": _sparse("report.html", 10 << 30),
    "unreadable": _unreadable,
    "many-files": _many_files,
    "yaml-bad": _text("config.yaml", "run: ["),
    "yaml-tag": _text("config.yaml", "!!python/object/apply:os.system [echo]"),
    "yaml-bomb": _text("config.yaml", _BOMB),
    "yaml-deep": _text("config.yaml", "[" * 1000),
    "yaml-list": _text("config.yaml", "[1, 2]"),
    "yaml-long": _text("config.yaml", "run: {name: " + "x" * 10_000_000 + "}"),
    "yaml-types": _text("config.yaml", "{run: [1], train: 7, eval: x, model: null, optim: {lr: {}}}"),
    "json-deep": _text("summary.json", '{"a":' * _DEEP),
    "json-types": _text("summary.json", json.dumps({key: [[]] for key in SUMMARY})),
    "json-digits": _text("summary.json", '{"steps": ' + "9" * 5000 + "}"),
    "json-not-utf8": _text("summary.json", b'{"name": "\xff\xfe"}'),
    "lines-deep": _text("metrics.jsonl", "[" * _DEEP + "\n" + json.dumps(metrics_line(332)) + "\n"),
    "lines-nan": _text("metrics.jsonl", '{"step": NaN, "samples_seen": Infinity, "train/loss": -Infinity}\n'),
    "lease-deep": _text("lease.json", "[" * _DEEP),
    "lease-types": _text("lease.json", '{"owner": 1, "host": [], "boot": {}, "pid": 1e99, "expires": "x"}'),
    "numbers-huge": _summary(**_HUGE),
    "numbers-nan": _text("summary.json", json.dumps(SUMMARY | {"steps": float("nan"), "samples_seen": float("inf")})),
    "text-long": _summary(name="n" * 10_000_000, status="s" * 1_000_000),
    "text-markup": _summary(name=HOSTILE, status=HOSTILE, environment={HOSTILE: HOSTILE}),
    "text-breaks": _config(run=_RUN | {"name": "../../a\nb</script>"}),
    "formula": _text("evaluations/step-0000000400.json", json.dumps(evaluation(400, 0.1, 0.2) | _FORMULA)),
    "event-times": _text("events.jsonl", '{"time": 1e99, "kind": "x", "text": "y"}\n{"time": 1, "kind": []}'),
    "storage-query": _config(run=_RUN | {"storage": "s3://bucket", "name": "x?scheme=http&endpoint_override=STORE"}),
    "storage-s3": _config(run=_RUN | {"storage": "s3://bucket/runs"}),
    "storage-outside": _config(run=_RUN | {"storage": "/", "name": "etc"}),
    "storage-up": _config(run=_RUN | {"storage": "..", "name": ".."}),
}  # fmt: skip

SWEEPS: dict[str, Draw] = {
    "sweep-storage": _sweep(storage="s3://bucket/runs?scheme=http&endpoint_override=STORE"),
    "sweep-outside": _sweep(storage="/etc"),
    "sweep-types": _text("study.yaml", "[1]"),
    "sweep-base": _sweep(base="/etc/passwd"),
    "sweep-link": _linked("study.yaml"),
    "sweep-grid": _sweep(space={f"optim.k{number}": {"grid": list(range(10))} for number in range(12)}),
    "sweep-power": _sweep(space={"optim.lr": {"expr": "((((9**64)**64)**64)**64)**64"}, "optim.b": {"grid": [1]}}),
    "sweep-list": _sweep(space={"optim.lr": {"expr": "[0] * 10**10"}, "optim.b": {"grid": [1]}}),
    "sweep-results": lambda folder, *rest: (_sweep()(folder, *rest), _text("results.jsonl", "[" * _DEEP)(folder))[0],
}  # fmt: skip


def draw_all(place: Path, secret: Path, store: str) -> list[str]:
    """Write every folder into a place; return their names.

    Args:
        secret: a file outside of the place; the function writes CANARY into it, as YAML, JSON and HTML.
        store: host and port that an S3 client would be sent to.
    """
    secret.write_text(json.dumps({"name": CANARY, "status": CANARY, "run": {"name": CANARY}, "text": CANARY}))
    for name in ("config.yaml", "step-0000000001.json"):
        (secret.parent / name).write_text(secret.read_text())
    for name, draw in (RUNS | SWEEPS).items():
        folder = write_run(made(place / name), metrics=[], evaluations=[{"step": 332}], summary=_SUMMARY)
        (folder / "report.html").write_text("a report")
        draw(folder, secret, store)
    outside = write_run(made(secret.parent / "outside"), metrics=[], config=CONFIG | {"run": {"name": CANARY}})
    (place / "link-run").symlink_to(outside)
    (place / "link-loop").symlink_to("link-loop")
    os.mkfifo(place / "fifo")
    (place / "file").write_text("x")
    return [*RUNS, *SWEEPS]


class Listener:
    """Accepts and counts connections in place of an S3 store; closes each at once."""

    def __init__(self) -> None:
        self.num_connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        url = f"http://{self.address}"
        self.variables = {"AWS_ENDPOINT_URL": url, "AWS_ENDPOINT_URL_S3": url, "HTTP_PROXY": url, "HTTPS_PROXY": url}
        self.variables |= {"AWS_EC2_METADATA_SERVICE_ENDPOINT": url, "AWS_ACCESS_KEY_ID": "k"}
        self.variables |= {"AWS_SECRET_ACCESS_KEY": "s"}

    def __enter__(self) -> Listener:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.num_connections += 1
            connection.close()
