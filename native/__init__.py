"""Compile C of ours at its first use, for this processor, into the user's cache.

Imports neither torch nor anything of sigray: processes that must start quickly use it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]


def compiled(source: Path, *, flags: Sequence[str] = (), without: str) -> ctypes.CDLL | None:
    """The library of a C file; None, with a warning, if it cannot be compiled.

    Args:
        source: includes headers of the system only.
        flags: compiler flags besides `_FLAGS`.
        without: what the lack of the library means, for the warning.
    """
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    if compiler is None:
        warnings.warn(f"{without}: no C compiler was found", stacklevel=3)
        return None
    try:
        # RTLD_NOW: a runtime that lacks a symbol fails here and not in the first step.
        return ctypes.CDLL(str(build(compiler, source, flags)), mode=os.RTLD_NOW)
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(f"{without}: {compiler} failed: {detail}", stacklevel=3)
        return None


def build(compiler: str, source: Path, flags: Sequence[str]) -> Path:
    """The library's file, compiled if the cache does not have it.

    Raises:
        OSError, subprocess.SubprocessError: the library cannot be built.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    # -march=native: a home folder may be shared by unlike machines.
    machine = f"{platform.machine()} {sorted(cpu_flags())} {[*_FLAGS, *flags]}".encode()
    name = f"{source.stem}-{hashlib.sha256(source.read_bytes() + version + machine).hexdigest()[:16]}.so"
    folder = _folder()
    library = folder / name
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            compiled_object = Path(temporary, f"{source.stem}.o")
            built = Path(temporary, name)
            # -shared without -fopenmp, so without its runtime: the library finds torch's own with its one thread pool,
            # and torch.set_num_threads counts for both.
            for command in (
                [compiler, *_FLAGS, *flags, "-c", source, "-o", compiled_object],
                [compiler, "-shared", compiled_object, "-o", built],
            ):
                subprocess.run(list(map(str, command)), capture_output=True, check=True, text=True)
            built.replace(library)  # atomic: other processes may be compiling too
    return library


def _folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sigray")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.gettempdir(), f"sigray-{os.getuid()}")
    folder.mkdir(exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to another user")
    return folder


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets as Linux names them; empty if it does not say.

    Linux lists them as `flags` on x86 and as `Features` on ARM.
    """
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                found.update(line.split(":")[1].split())
    return frozenset(found)
