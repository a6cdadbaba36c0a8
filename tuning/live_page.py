"""The live page of a sweep: its report, with links to the pages of its trials."""

from __future__ import annotations

import contextlib
import re
from collections import Counter

from markupsafe import Markup

from sigray.orchestrator import formatting as words
from sigray.orchestrator.config import ConfigError
from sigray.orchestrator.reports.foreign_folder import ForeignFolder
from sigray.orchestrator.reports.live_server import RUNS, Kind, Look, draw_moment, look_at_run
from sigray.orchestrator.run_folder import CONFIG, REPORT
from sigray.tuning.report import BEST, TRIALS, Trial, best_figure, draw_sweep, read_losses, sweep_css, sweep_status
from sigray.tuning.study import STUDY, read_study, trial_name
from sigray.tuning.table import RESULTS, Table, read_table
from sigray.workers.checkpoint.lease import is_driven


def look_at_sweep(storage: ForeignFolder, address: str, for_list: bool = False) -> Look:
    """Read a sweep from its local folder or its storage."""
    study = read_study(storage)
    home = storage.at(study.config.storage_uri) or storage
    table = read_table(home)
    status = "running" if is_driven(home) else sweep_status(study, table)
    looks = {} if for_list else _trials_at_work(storage, home, table)
    losses = {} if for_list else read_losses(table, [storage, home])
    pages = f"/{RUNS.name}/{address.partition('/sweeps/')[2]}/trials"
    trials = {}
    for number, row in table.rows.items():
        look = looks.get(number)
        trials[number] = Trial(
            f"{pages}/{trial_name(number)}" if row.results or look else "",
            look.status if look else row.status,
            max(row.samples_seen, look.content["samples_seen"] if look else 0),
        )
    times = [home.modified(RESULTS), *(look.updated_at for look in looks.values())]
    updated_at = max((at for at in times if at), default=None)
    spent = sum(trial.samples_seen for trial in trials.values())
    has_report = storage.exists(REPORT)
    content = {
        "name": study.config.name,
        "status": status,
        "updated_at": updated_at,
        "trials": {
            number: {
                "values": row.values,
                "seed": row.seed,
                "status": trials[number].status,
                "samples_seen": trials[number].samples_seen,
                "results": [(result.samples_seen, result.value, result.answer) for result in row.results],
            }
            for number, row in table.rows.items()
        },
        "has_report": has_report,
    }

    def draw() -> Markup:
        counts = Counter(trial.status for trial in trials.values())
        tiles = [(outcome, str(count)) for outcome, count in sorted(counts.items())]
        now = draw_moment(
            percent=_percent(table, spent),
            place=_place(table),
            updated_at=updated_at,
            tiles=[*tiles, ("pairs seen, all trials", words.count(spent))],
            facts=[],
            links=[("the report, with figures as PNG", f"{address}/{REPORT}")] if has_report else [],
            events=[],
        )
        return draw_sweep(study, table, None, losses, now, status, trials)

    return Look(status, _place(table), updated_at, content, draw, best_figure(study, table))


def _trials_at_work(storage: ForeignFolder, home: ForeignFolder, table: Table) -> dict[int, Look]:
    """Trials that have begun and are not over, if their folders can be found."""
    looks = {}
    for row in table.rows.values():
        for place in (storage, home) if not row.is_over else ():
            folder = place.below(f"trials/{trial_name(row.number)}")
            with contextlib.suppress(ConfigError):
                if folder.exists(CONFIG):
                    looks[row.number] = look_at_run(folder, "", True)
                    break
    return looks


def _place(table: Table) -> str:
    over = sum(row.is_over for row in table.rows.values())
    return f"{words.count(over)} of {words.counted(len(table.rows), 'trial')} over"


def _percent(table: Table, spent: int) -> float | None:
    """Progress in percent of all budgets; a trial that ended early counts whole."""
    whole = sum(row.budget for row in table.rows.values())
    saved = sum(max(row.budget - row.samples_seen, 0) for row in table.rows.values() if row.is_over)
    return round(min(100 * (spent + saved) / whole, 100), 1) if whole else None


SWEEPS = Kind(
    "sweeps",
    STUDY,
    rf"{re.escape(REPORT)}|{re.escape(TRIALS)}|{re.escape(BEST)}|figures/[a-z0-9_]+\.png",
    look_at_sweep,
    sweep_css(),
)
