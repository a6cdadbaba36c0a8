"""A sweep as a job: its study with its base run, and the files that both name."""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import replace
from typing import Any

from sigray.orchestrator.cluster.job_files import JobFiles
from sigray.orchestrator.cluster.jobs import FILE, Job, can_read, drop_local, place_job
from sigray.orchestrator.config import ConfigError, RunConfig
from sigray.tuning.study import StudyConfig, parse_study, read_study, read_study_file


def sweep_job(options: Namespace) -> Job:
    """Return a sweep as a job.

    Raises:
        ConfigError: `sigray sweep` would refuse the study, or the cluster cannot read a file that it names.
    """
    if options.report or options.plan:
        raise ConfigError("sigray sweep --plan and --report start no trial: run them without `sigray submit`")
    flags = [f"--{name}" for name in ("retry", "overwrite") if getattr(options, name)]
    if options.resume:
        job = place_job("sweep --resume", options.resume, "sweep", options.overrides, flags)
        has_storage = can_read(job.storage) and read_study(job.storage, options.overrides).config.storage
        return replace(job, result=_result(job.storage), home="dir" if has_storage else "")
    path, *overrides = options.overrides or [""]
    if not path or "=" in path:
        raise ConfigError("give a study, as `sigray submit -- sweep STUDY.yaml`, or --resume s3://bucket/sweeps/NAME")
    content = read_study_file(path, overrides)
    study = parse_study(copy.deepcopy(content), path)
    config = study.config
    files = JobFiles()
    home = "dir" if drop_local(content) else ""
    if home and config.storage is None:
        remedy = "set storage=s3://bucket/sweeps or a folder that all hosts see"
        raise ConfigError(f"{path}: storage is not set: the hosts of a cluster need one place for results; {remedy}")
    content = settle_study(files, content)
    files.check(path)
    name = config.name
    place = config.storage_uri
    job = Job(name, ["sweep", FILE, *flags], f"/sweeps/{name}", place, _result(place), content, files, home)
    return replace(job, trackers=(study.base.get("run") or {}).get("trackers", ()))


def _result(place: str) -> list[str]:
    return ["submit", "--", "train", f"{place}/best.yaml"]


def settle_study(files: JobFiles, content: dict[str, Any]) -> dict[str, Any]:
    """Return a study's content, its base run and scale in it, for the cluster."""
    content = {name: value for name, value in content.items() if name not in ("scale", "scales")}
    base = content["base"]
    overrides = content.get("overrides") or {}
    for name in ("dir", "storage"):  # the study gives those of its trials
        drop_local(base.get("run") or {}, name)
    space = {key: _settle_dimension(files, key, dimension) for key, dimension in content["space"].items()}
    renamed = [key for key, dimension in content["space"].items() if dimension != space[key]]
    for key, dimension in space.items():
        read = f"{dimension.get('expr')} {dimension.get('when')}"
        for other in (other for other in renamed if other in read):
            files.problems.append(f"space.{key} compares {other}, whose files a job renames: compare another key")
    # Claims and figures name values of the space.
    named = {
        section: [
            {name: files.settle_keys(part) if isinstance(part, dict) else part for name, part in entry.items()}
            for entry in content.get(section) or []
        ]
        for section in ("expect", "figures")
    }
    settled = {"base": files.settle(RunConfig, base, "base"), "overrides": files.settle_keys(overrides), "space": space}
    return files.settle(StudyConfig, content) | settled | named


def _settle_dimension(files: JobFiles, key: str, dimension: dict[str, Any]) -> dict[str, Any]:
    probe = JobFiles()
    probe.settle_keys({key: "?.pt"})
    if probe.problems and dimension.get("expr") is not None:
        files.problems.append(f"space.{key} computes the name of a file: write grid or cases")
    settled: dict[str, Any] = {
        name: [files.settle_keys({key: value})[key] for value in dimension[name]]
        for name in ("grid", "choice")
        if dimension.get(name)
    }
    if dimension.get("cases"):
        settled["cases"] = {name: files.settle_keys(case) for name, case in dimension["cases"].items()}
    return dimension | settled
