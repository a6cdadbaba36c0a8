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

The folders may be of unknown origin (`foreign_folder.py`). Threads in the background read them for the list, together
for a tenth of their time. The list waits for at most 1 s and names the folders that take longer. Each page has a lock
of its own, and no other lock is held while a folder is read.
"""

from __future__ import annotations

import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pydantic_core import to_json

from sigray.orchestrator import formatting as words
from sigray.orchestrator.reports.drawing import sparkline
from sigray.orchestrator.reports.foreign_folder import MAX_NAMES, ForeignFolder, LinkError
from sigray.orchestrator.reports.http_server import HTML, JSON, TEXT, Answer
from sigray.orchestrator.reports.run_charts import curve
from sigray.orchestrator.reports.run_files import RunFiles, find_number, find_text, read_run_files
from sigray.orchestrator.reports.run_page import draw_run, newest_figure
from sigray.orchestrator.reports.template import content_policy, page, render
from sigray.orchestrator.run_folder import CONFIG, EVENTS, METRICS, REPORT
from sigray.workers.checkpoint.index import newest_checkpoint
from sigray.workers.checkpoint.lease import is_driven
from sigray.workers.storage import Storage
from sigray.workers.texts import first_ten

PLACES = ("~/sigray-runs", "~/sigray-sweeps", "runs", "sweeps")
"""Default places: of jobs on a head, and of commands started here."""
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a name; it cannot lead out of a folder
_TRIAL = re.compile(r"(.+)/trials/trial-(\d{1,9})")  # the name of a run of a sweep
_MAX_PARTS = 4
_MAX_ENTRIES = 100  # of a kind in the list
_MAX_EVENTS = 40
_MAX_TEXT = 300
_MAX_FILE_BYTES = 64 << 20  # of a report with its images
_WAIT_S = 1.0  # for which the list waits for folders
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
    figures: str = ""  # the newest, for the list
    curve: Sequence[tuple[float, float]] = ()  # for the list


@dataclass(frozen=True)
class Kind:
    """Folders that have a page.

    Attributes:
        name: first part of their addresses.
        mark: the file that makes a folder one of them.
        files: pattern of the files that the server gives out.
        look: receives the folder, its address, and whether only the list needs the answer.
        css: of their pages, besides the style of all pages.
    """

    name: str
    mark: str
    files: str
    look: Callable[[ForeignFolder, str, bool], Look]
    css: str = ""


def clock(at: float) -> str:
    """Return a time for browsers that run no script, between the years 1970 and 9999."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(max(at, 0), 253_402_300_799)))


# ------------------------------------------------------------------------------------------------- a run


def look_at_run(storage: ForeignFolder, address: str, for_list: bool = False) -> Look:
    """Read a run from its local folder or its storage."""
    run = read_run_files(storage, for_list=for_list)
    place, name = (find_text(run.config, "run", key) for key in ("storage", "name"))
    # Lease and checkpoints are in the run's storage, if the config names one.
    elsewhere = storage.at(f"{place.rstrip('/')}/{name}") if place else storage
    home = elsewhere or storage
    run.is_driven = is_driven(home)
    newest = run.checkpoint = newest_checkpoint(home)
    times = [*map(storage.modified, (METRICS, EVENTS)), newest[1] if newest else None]
    content = {
        "name": run.name,
        "status": run.status,
        "step": run.step,
        "samples_seen": run.samples_seen,
        "planned_samples": run.planned_samples,
        "left_s": run.left_s if run.is_driven else None,
        "updated_at": max((at for at in times if at), default=None),
        "metrics": {key: value for key in run.newest_line if (value := find_number(run.newest_line, key)) is not None},
        "checkpoint": {"name": newest[0].name, "step": newest[0].step, "at": newest[1]} if newest else None,
        "num_restarts": sum(event["kind"] == "restart" for event in run.events),
        "events": run.events[:_MAX_EVENTS],
        "num_evaluations": len(run.evaluations),
        "zero_shot": run.zero_shot,
        "retrieval": run.retrieval,
        "has_report": storage.exists(REPORT),
        "storage": place and place[:_MAX_TEXT],
        "is_storage_read": elsewhere is not None,
        "unreadable": run.unreadable,
    }
    says = "; ".join([_place(run), *run.unreadable[:1]])
    loss, last = curve(run.metrics, "train/loss"), find_number(run.newest_line, "train/loss")
    figures = [f"loss {words.decimal(last)}"] if last is not None else []
    figures += [figure] if (figure := newest_figure(run)) else []
    draw = partial(_draw, run, content, address)
    few = loss[:: 1 + len(loss) // 60]
    return Look(run.status, says, content["updated_at"], content, draw, ", ".join(figures), few)


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
    facts = [saved or ("No checkpoint yet", None)]
    if not content["is_storage_read"]:
        facts = [(f"Lease and checkpoints are in {content['storage']}, which is below no place of these pages", None)]
    now = draw_moment(
        percent=round(100 * run.samples_seen / run.planned_samples, 1) if run.planned_samples else None,
        place=_place(run),
        updated_at=content["updated_at"],
        tiles=[(label, value) for label, value in tiles if value is not None],
        facts=facts,
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

    content: Any = None
    answer: dict[str, Any] = field(default_factory=dict)  # with title and html
    problem: str = ""  # if the last look failed
    until: float = 0.0  # of time.monotonic
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _Job:
    """Work in the background, and its last result."""

    result: Any = None
    until: float = 0.0  # of time.monotonic: the result is kept
    future: Future[None] = field(default_factory=Future)


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
        self._jobs: dict[tuple[str, ...], _Job] = {}
        # An entry takes a few round trips if the place is a bucket, else processor time that a page may need.
        self._num_threads = 2 if all(place.is_local for place in self._places) else 8
        self._pool = ThreadPoolExecutor(self._num_threads, "pages")
        self._lock = threading.Lock()  # of the two dicts
        self._drawing = threading.Lock()  # matplotlib draws one figure at a time

    def answer(self, path: str) -> Answer:
        """Answer a path; its query is ignored."""
        try:
            parts = [part for part in urllib.parse.unquote(urllib.parse.urlsplit(path).path).split("/") if part]
        except ValueError:
            return _NOT_FOUND
        if not all(_PART.fullmatch(part) for part in parts):
            return _NOT_FOUND
        is_api = parts[:1] == ["api"]
        parts = parts[is_api:]
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

    def _find(self, kind: Kind, name: str) -> ForeignFolder | None:
        if name.count("/") >= _MAX_PARTS:
            return None
        folders = (ForeignFolder(place, name, self._places) for place in self._places)
        return next((folder for folder in folders if folder.exists(kind.mark)), None)

    def _page(self, address: str, look: Callable[[], _Found | None], css: str, is_api: bool) -> Answer:
        """Return the kept answer, or look again if the kept answer is too old."""
        with self._lock:
            kept = self._kept.setdefault(address, _Kept())
        with kept.lock:
            begin = time.monotonic()
            if begin >= kept.until:
                try:
                    found = look()
                    if found is None:
                        with self._lock:
                            self._kept.pop(address, None)
                        return _NOT_FOUND
                    title, content, draw = found
                    if kept.problem or kept.content != content:
                        kept.answer = {**content, "title": title, "html": draw()}
                    kept.content = content
                    kept.problem = ""
                except Exception as error:  # an unreachable storage, content that nothing foresaw
                    kept.problem = _reason(error)
                kept.until = time.monotonic() + _rest(begin)
            if kept.problem:
                return Answer(f"{kept.problem}\n", TEXT, 502)
            answer = kept.answer
        if is_api:
            return Answer(to_json(answer, inf_nan_mode="null"), JSON)
        return Answer(page(answer["title"], answer["html"], css=css, is_live=True), policy=content_policy())

    def _look(self, kind: Kind, name: str) -> _Found | None:
        folder = self._find(kind, name)
        if folder is None:
            return None
        found = kind.look(folder, f"/{kind.name}/{name}", False)

        def draw() -> Markup:
            with self._drawing:
                return self._links(kind, name) + found.draw()

        return f"{name} ({found.status})", found.content, draw

    def _links(self, kind: Kind, name: str) -> Markup:
        """Return links to the list; of a trial, to its sweep and neighbours too."""
        pages = []
        if trial := _TRIAL.fullmatch(name):
            before, after = (f"{trial[1]}/trials/trial-{int(trial[2]) + step:03d}" for step in (-1, 1))
            sweeps = [
                (other, trial[1], f"{other.name} / {trial[1]}") for other in self._kinds.values() if other != kind
            ]
            pages = [*sweeps, (kind, before, "previous trial"), (kind, after, "next trial")]
        found = [(f"/{of.name}/{path}", text) for of, path, text in pages if self._find(of, path)]
        links = [Markup('<a href="{}">{}</a>').format(*link) for link in [("/", "all runs and sweeps"), *found]]
        return Markup('<nav class="note">{}</nav>\n').format(Markup(" \u00b7 ").join(links))

    def _list(self, parts: list[str]) -> _Found | None:
        names = parts or list(self._kinds)
        if names[0] not in self._kinds:
            return None
        deadline = time.monotonic() + _WAIT_S
        listings = [self._begin((place.uri,), partial(self._names, place)) for place in self._places]
        wait([job.future for job in listings], _WAIT_S)
        notes, jobs = [], []
        for place, listing in zip(self._places, listings, strict=True):
            found, note = listing.result or ([], f"{place.uri} has not answered yet")
            notes += [note] if note else []
            jobs += [(name, self._begin((place.uri, name), partial(self._states, place, name))) for name in found]
        wait([job.future for _, job in jobs], max(deadline - time.monotonic(), 0))
        late = list(dict.fromkeys(name for name, job in jobs if job.result is None))
        if late:
            notes.append(f"not read yet: {first_ten(late)}")
        content: dict[str, Any] = {"notes": notes}
        for kind in names:
            states = {name: job.result[kind] for name, job in reversed(jobs) if job.result and kind in job.result}
            content[kind] = sorted(states.values(), key=lambda state: -(state["updated_at"] or 0))
        title = " and ".join(names).capitalize()
        draw = partial(
            render, "index.html.j2", title=title, kinds=names, content=content, most=_MAX_ENTRIES, clock=clock
        )
        return title, content, partial(draw, places=", ".join(self._given), sparkline=sparkline)

    def _begin(self, key: tuple[str, ...], work: Callable[[], Any]) -> _Job:
        """Return a job; its work begins if the last result is too old."""

        def run() -> None:
            begin = time.monotonic()
            try:
                job.result = work()
            finally:
                job.until = time.monotonic() + _rest(begin, len(self._jobs) / self._num_threads)

        with self._lock:
            job = self._jobs.setdefault(key, _Job())
            if time.monotonic() >= job.until:
                job.until = float("inf")
                job.future = self._pool.submit(run)
            return job

    def _names(self, place: Storage) -> tuple[list[str], str]:
        """Return the names in a place, and a note on others."""
        try:
            names = ForeignFolder(place).list("")
        except OSError as error:
            return [], f"{place.uri}: {_reason(error)}"
        note = f"{place.uri} has {len(names):,} entries or more: others are left out" if len(names) >= MAX_NAMES else ""
        return [name for name in names if _PART.fullmatch(name)], note

    def _states(self, place: Storage, name: str) -> dict[str, dict[str, Any]]:
        """Return the entries of a folder by kind."""
        states = {}
        for kind in self._kinds.values():
            folder = ForeignFolder(place, name, self._places)
            address = f"/{kind.name}/{name}"
            try:
                if not folder.exists(kind.mark):
                    continue
                look = kind.look(folder, address, True)
            except Exception as error:  # content that nothing foresaw: the entry says it
                look = Look("unreadable", _reason(error), None, {}, Markup)
            state = {key: getattr(look, key) for key in ("status", "says", "figures", "curve", "updated_at")}
            states[kind.name] = {"name": name, "address": address, **state}
        return states

    def _file(self, kind: Kind, name: str, file: str) -> Answer:
        try:
            folder = self._find(kind, name)
            if folder is None:
                return _NOT_FOUND
            content = folder.read(file, _MAX_FILE_BYTES)
        except (FileNotFoundError, NotADirectoryError, LinkError):
            return _NOT_FOUND
        except OSError as error:
            return Answer(f"{_reason(error)}\n", TEXT, 502)
        return Answer(content, {".html": HTML, ".png": "image/png"}.get(Path(file).suffix, TEXT))


def _rest(begin: float, num_turns: float = 1) -> float:
    """Return the seconds for which the result of work that began at a time is kept."""
    return max(_KEEP_S, _REST * num_turns * (time.monotonic() - begin))


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
    return text[:_MAX_TEXT]
