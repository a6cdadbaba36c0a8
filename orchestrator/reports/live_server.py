"""Live pages of runs and sweeps over HTTP, read from their folders only.

    /                     all runs and sweeps of the given places
    /runs/NAME            a run: progress, newest figures, checkpoint, events, then the content of its report
    /sweeps/NAME          a sweep: the same, and its trials (tuning/live_page.py, as imports point one way)
    /runs/NAME/report.html    the page that was written at the end
    /api/...              the same as JSON; the page requests it every few seconds and replaces its content

NAME is a path below one of the places, such as demo or batch_size/trials/trial-003. Its folder must hold the file that
makes it a run. The server gives out only the files of a folder that a `Kind` names.

A page is drawn again only if its content has changed. The curves of a run take a second or two, so a page rests for ten
times as long: all viewers together cost a tenth of a core.
"""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sigray.orchestrator import formatting as words
from sigray.orchestrator.reports.http_server import HTML, JSON, TEXT, Answer
from sigray.orchestrator.reports.run_files import RunFiles, find_text, read_run_files
from sigray.orchestrator.reports.run_page import draw_run
from sigray.orchestrator.reports.template import content_policy, page, render
from sigray.orchestrator.run_folder import CONFIG, EVENTS, METRICS, REPORT
from sigray.workers.checkpoint.index import newest_checkpoint
from sigray.workers.checkpoint.lease import is_driven
from sigray.workers.storage import Storage

PLACES = ("~/sigray-runs", "runs", "sweeps")
"""Default places: of jobs on a head, and of commands started here."""
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a name; it cannot lead out of a folder
_MAX_PARTS = 4
_MAX_ENTRIES = 100  # of a kind in the list
_MAX_EVENTS = 40
_KEEP_S = 3.0  # for which an answer is kept at least
_REST = 10  # an answer is kept this many times as long as it took to make
_NOT_FOUND = Answer("not found\n", TEXT, 404)


@dataclass(frozen=True)
class Look:
    """The state of a folder at one time."""

    status: str
    says: str  # one line, for the list
    updated_at: float | None  # Unix time
    content: dict[str, Any]  # for programs; if it changes, the page is drawn again
    draw: Callable[[], Markup]


@dataclass(frozen=True)
class Kind:
    """Folders that have a page.

    Attributes:
        name: first part of their addresses.
        mark: the file that makes a folder one of them.
        files: pattern of the files that the server gives out.
        look: receives the folder and its address; raises ConfigError if it cannot read the folder.
        css: of their pages, besides the style of all pages.
    """

    name: str
    mark: str
    files: str
    look: Callable[[Storage, str], Look]
    css: str = ""


def clock(at: float) -> str:
    """Return a time for browsers that run no script."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


# ------------------------------------------------------------------------------------------------- a run


def look_at_run(storage: Storage, address: str) -> Look:
    """Read a run from its local folder or its storage."""
    run = read_run_files(storage)
    home = _home(run)
    run.is_driven = is_driven(home)
    newest = newest_checkpoint(home)
    times = [*map(storage.modified, (METRICS, EVENTS)), newest[1] if newest else None]
    events = _events(storage)
    content = {
        "name": run.name,
        "status": run.status,
        "step": run.step,
        "samples_seen": run.samples_seen,
        "planned_samples": run.planned_samples,
        "left_s": run.left_s if run.is_driven else None,
        "updated_at": max((at for at in times if at), default=None),
        "metrics": run.newest_line,
        "checkpoint": {"name": newest[0].name, "step": newest[0].step, "at": newest[1]} if newest else None,
        "num_restarts": sum(event["kind"] == "restart" for event in events),
        "events": events[:_MAX_EVENTS],
        "num_evaluations": len(run.evaluations),
        "zero_shot": run.zero_shot,
        "retrieval": run.retrieval,
        "has_report": storage.exists(REPORT),
        "unreadable": run.unreadable,
    }
    draw = partial(_draw, run, content, address)
    return Look(run.status, _place(run), content["updated_at"], content, draw)


def _home(run: RunFiles) -> Storage:
    """Return the storage of a run's lease and checkpoints.

    It is the folder itself, unless the config names a storage.
    """
    place, name = (find_text(run.config, "run", key) for key in ("storage", "name"))
    return Storage(f"{place.rstrip('/')}/{name}") if place else run.storage


def _events(storage: Storage) -> list[dict[str, Any]]:
    """Return the events, newest first."""
    events = []
    for text in storage.read(EVENTS).decode(errors="replace").splitlines() if storage.exists(EVENTS) else []:
        try:
            event = json.loads(text)
            events.append({"time": float(event["time"]), "kind": str(event["kind"]), "text": str(event["text"])})
        except (ValueError, KeyError, TypeError):
            continue  # a crash cut it short
    return events[::-1]


def _place(run: RunFiles) -> str:
    """Return 'step 120 of 400, 30,720 of 102,400 pairs'."""
    planned, batch = run.planned_samples, run.global_batch_size
    steps = f"step {words.count(run.step)}" + (f" of {words.count(planned / batch)}" if planned and batch else "")
    return f"{steps}, {words.count(run.samples_seen)}" + (f" of {words.count(planned)}" if planned else "") + " pairs"


def _draw(run: RunFiles, content: dict[str, Any], address: str) -> Markup:
    line, left_s, checkpoint = content["metrics"], content["left_s"], content["checkpoint"]
    tiles = [
        ("time left, about", words.duration(left_s) if left_s is not None else None),
        ("loss per image", _figure(line, "train/loss")),
        ("scale", _figure(line, "train/logit_scale")),
        ("bias", _figure(line, "train/logit_bias")),
        ("pairs per second", _figure(line, "throughput/samples_per_s", words.count)),
        ("data wait", _figure(line, "data/wait_pct", lambda value: words.percent(value / 100))),
        ("restarts", str(content["num_restarts"])),
    ]
    saved = (f"Newest checkpoint: step {words.count(checkpoint['step'])}", checkpoint["at"]) if checkpoint else None
    now = draw_moment(
        percent=round(100 * run.samples_seen / run.planned_samples, 1) if run.planned_samples else None,
        place=_place(run),
        updated_at=content["updated_at"],
        tiles=[(label, value) for label, value in tiles if value is not None],
        facts=[saved or ("No checkpoint yet", None)],
        links=[("the report, with held-out images", f"{address}/{REPORT}")] if content["has_report"] else [],
        events=content["events"],
    )
    return draw_run(run, now)


def draw_moment(**values: Any) -> Markup:
    """Return the current state for a live page; see now.html.j2."""
    return render("now.html.j2", clock=clock, **values)


def _figure(line: dict[str, Any], key: str, say: Callable[[float], str] = words.decimal) -> str | None:
    value = line.get(key)
    return say(value) if isinstance(value, int | float) else None


RUNS = Kind("runs", CONFIG, re.escape(REPORT), look_at_run)


# ------------------------------------------------------------------------------------------------- all of them


_Found = tuple[str, dict[str, Any], Callable[[], Markup]]  # title, content, and what draws it


@dataclass
class _Kept:
    """The last answer for an address."""

    content: dict[str, Any]
    answer: dict[str, Any]  # with title and html
    until: float = 0.0  # of time.monotonic


class Pages:
    """Answers GETs.

    Args:
        places: local folders or s3://bucket/prefix of runs and sweeps. The first place that has a name counts.
        kinds: of pages.

    Raises:
        StorageError: for a malformed place.
    """

    def __init__(self, places: Sequence[str], kinds: Sequence[Kind]) -> None:
        self._given = list(places)
        self._places = [Storage(Path(place).expanduser() if "://" not in place else place) for place in places]
        self._kinds = {kind.name: kind for kind in kinds}
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()  # matplotlib draws one figure at a time

    def answer(self, path: str) -> Answer:
        """Answer a path; its query is ignored."""
        try:
            parts = [part for part in urllib.parse.unquote(urllib.parse.urlsplit(path).path).split("/") if part]
            if not all(_PART.fullmatch(part) for part in parts):
                return _NOT_FOUND
            is_api = parts[:1] == ["api"]
            parts = parts[is_api:]
            with self._lock:
                if len(parts) <= 1:
                    return self._page("/" + "".join(parts), lambda: self._list(parts), "", is_api)
                kind = self._kinds.get(parts[0])
                if kind is None:
                    return _NOT_FOUND
                name = "/".join(parts[1:])
                file = re.fullmatch(rf"(.+?)/({kind.files})", name)
                if file and not is_api:
                    return self._file(kind, file[1], file[2])
                return self._page(f"/{kind.name}/{name}", partial(self._look, kind, name), kind.css, is_api)
        except (OSError, ValueError, KeyError) as error:  # an unreachable storage, a foreign file
            return Answer(f"{error}\n", TEXT, 502)

    def _find(self, kind: Kind, name: str) -> Storage | None:
        if name.count("/") >= _MAX_PARTS:
            return None
        for place in self._places:
            storage = Storage(f"{place.uri}/{name}")
            if _is_inside(storage, place) and storage.exists(kind.mark):
                return storage
        return None

    def _page(self, address: str, look: Callable[[], _Found | None], css: str, is_api: bool) -> Answer:
        """Return the kept answer, or look again if the kept answer is too old."""
        kept = self._kept.get(address)
        begin = time.monotonic()
        if kept is None or begin >= kept.until:
            found = look()
            if found is None:
                self._kept.pop(address, None)
                return _NOT_FOUND
            title, content, draw = found
            if kept is None or kept.content != content:
                kept = self._kept[address] = _Kept(content, {**content, "title": title, "html": draw()})
            kept.until = time.monotonic() + max(_KEEP_S, _REST * (time.monotonic() - begin))
        if is_api:
            return Answer(json.dumps(kept.answer), JSON)
        whole = page(kept.answer["title"], kept.answer["html"], css=css, is_live=True)
        return Answer(whole, policy=content_policy())

    def _look(self, kind: Kind, name: str) -> _Found | None:
        storage = self._find(kind, name)
        if storage is None:
            return None
        found = kind.look(storage, f"/{kind.name}/{name}")
        return f"{name} ({found.status})", found.content, found.draw

    def _list(self, parts: list[str]) -> _Found | None:
        names = parts or list(self._kinds)
        if names[0] not in self._kinds:
            return None
        content: dict[str, Any] = {name: self._entries(self._kinds[name]) for name in names}
        title = " and ".join(names).capitalize()

        def draw() -> Markup:
            kinds = {name: entries[:_MAX_ENTRIES] for name, entries in content.items()}
            left_out = {name: max(len(entries) - _MAX_ENTRIES, 0) for name, entries in content.items()}
            places = ", ".join(self._given)
            return render("index.html.j2", title=title, places=places, kinds=kinds, left_out=left_out, clock=clock)

        return title, content, draw

    def _entries(self, kind: Kind) -> list[dict[str, Any]]:
        """Return the folders of a kind in all places, newest first."""

        def entry(place: tuple[Storage, str]) -> dict[str, Any] | None:
            storage, name = place
            address = f"/{kind.name}/{name}"
            try:
                if not storage.exists(kind.mark):
                    return None
                look = kind.look(storage, address)
            except (OSError, ValueError, KeyError) as error:
                look = Look("unreadable", str(error), None, {}, Markup)
            state = {"status": look.status, "says": look.says, "updated_at": look.updated_at}
            return {"name": name, "address": address, **state}

        found = [
            (storage, name)
            for place in self._places
            for name in place.list("")
            if _PART.fullmatch(name) and _is_inside(storage := Storage(f"{place.uri}/{name}"), place)
        ]
        with ThreadPoolExecutor(8) as pool:  # an entry takes a few round trips if the place is a bucket
            entries = [one for one in pool.map(entry, found) if one is not None]
        first = {one["name"]: one for one in reversed(entries)}
        return sorted(first.values(), key=lambda one: -(one["updated_at"] or 0))

    def _file(self, kind: Kind, name: str, file: str) -> Answer:
        storage = self._find(kind, name)
        if storage is None or not storage.exists(file) or not _is_inside(Storage(f"{storage.uri}/{file}"), storage):
            return _NOT_FOUND
        return Answer(storage.read(file), {".html": HTML, ".png": "image/png"}.get(Path(file).suffix, TEXT))


def _is_inside(storage: Storage, place: Storage) -> bool:
    """Return whether a folder is in a place: links out of it are not followed."""
    return not storage.is_local or Path(storage.uri).resolve().is_relative_to(Path(place.uri).resolve())
