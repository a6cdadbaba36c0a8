"""Decide on each file that a job's config names: carry, keep the path, or refuse.

The types of the config say which keys name files (`Place` in workers/config.py). A URL or an absolute path is a place
that all hosts see. A relative path is a file of this machine.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from sigray.orchestrator.carried_files import carried_name
from sigray.orchestrator.config import ConfigError, RunConfig, put
from sigray.orchestrator.secrets import secret_in_file
from sigray.workers.config import Place, Section
from sigray.workers.texts import ten_lines
from sigray.workers.urls import URL, is_remote, local_path

_MAX_MIB = 16  # of a file that a job carries


def is_shared(path: str | None) -> bool:
    """Return whether a path is a URL, or absolute: all hosts of a cluster may see it."""
    return path is not None and (is_remote(path) or os.path.isabs(path))


class JobFiles:
    """The files that a job carries, collected key by key.

    Attributes:
        carried: content by place in the job's folder.
        problems: lines about files that the cluster could not read.
    """

    def __init__(self) -> None:
        self.carried: dict[str, bytes] = {}
        self.problems: list[str] = []

    def check(self, source: str) -> None:
        """Raise ConfigError if the cluster could not read a file."""
        if self.problems:
            raise ConfigError(f"{source} cannot be submitted:\n  {ten_lines(self.problems)}")

    def settle(self, kind: Any, value: Any, key: str = "") -> Any:
        """Return a value that the cluster can use; its files are carried.

        Args:
            kind: a section, or the type of the key.
            value: not yet checked, as a check makes paths absolute.
        """
        members = get_args(kind)
        place = None
        if get_origin(kind) is Annotated:
            place = next((one for one in members if isinstance(one, Place)), None)
            members = members[:1]
        if place is not None and isinstance(value, str):
            return self._settle_path(place, value, key)
        if isinstance(value, list):
            inner = Annotated[Any, place] if place else members[0] if members else None
            return [self.settle(inner, one, key) for one in value]
        if not isinstance(value, dict):  # one member of a union takes a text
            for member in members if isinstance(value, str) else ():
                value = self.settle(member, value, key)
            return value
        if isinstance(kind, type) and issubclass(kind, Section):
            types = get_type_hints(kind, include_extras=True)
        elif get_origin(kind) is dict or (place is not None and members[0] in (Any, dict[str, Any])):
            types = dict.fromkeys(value, Annotated[Any, place] if place else members[1])
        else:
            for member in members:
                value = self.settle(member, value, key)
            return value
        return {name: self.settle(types.get(name), one, f"{key}.{name}".lstrip(".")) for name, one in value.items()}

    def settle_keys(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return a mapping of dotted keys of a run that the cluster can use."""
        settled = {}
        for key, value in content.items():
            nested: Any = {}
            put(nested, key, value, key)
            nested = self.settle(RunConfig, nested)
            for part in key.split("."):
                nested = nested[part]
            settled[key] = nested
        return settled

    def _settle_path(self, place: Place, value: str, key: str) -> str:
        path = place.path_of(value)
        if path is None:
            return value
        why = "is a path on this machine, which the hosts of the cluster do not see"
        if place.kind == "file" and not is_remote(path):
            file = Path(local_path(path))
            why = "is a folder" if file.is_dir() else "is no file"
            if file.is_file() and file.stat().st_size > _MAX_MIB << 20:
                why = f"is larger than {_MAX_MIB} MiB, the most that a job carries"
            elif file.is_file():
                data = file.read_bytes()
                if what := secret_in_file(data):
                    self.problems.append(f"{key}={value} holds {what}")
                self.carried[name := carried_name(data, file.name)] = data
                return name
        if not is_shared(path):
            self.problems.append(f"{key}={value} {why}: give {URL} or an absolute path that all hosts see")
        return value
