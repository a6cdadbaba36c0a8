"""C of our own, compiled where it runs: at the first use, for that processor, into the user's cache.

Knows neither torch nor anything of sigray: processes that must start quickly use it too.
"""

from __future__ import annotations

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


def compiled(
    sources: Sequence[Path], *, headers: Sequence[Path] = (), flags: Sequence[str] = (), without: str
) -> ctypes.CDLL | None:
    """A library of C sources; None, with a warning, where this machine has no C compiler that can make it.

    Args:
        sources: the first one names the library.
        headers: that they include, besides the system's.
        flags: of the compiler, besides those that all have.
        without: what it means to be without it, for the warning.
    """
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    if compiler is None:
        warnings.warn(f"{without}: no C compiler was found", stacklevel=3)
        return None
    try:
        # RTLD_NOW: a runtime that lacks a symbol fails here and not in the first step.
        return ctypes.CDLL(str(build(compiler, sources, headers, flags)), mode=os.RTLD_NOW)
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(f"{without}: {compiler} failed: {detail}", stacklevel=3)
        return None


def build(compiler: str, sources: Sequence[Path], headers: Sequence[Path], flags: Sequence[str]) -> Path:
    """The library's file, made unless it is there.

    Raises:
        OSError, subprocess.SubprocessError: where it cannot be made.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    # -march=native: a home folder may be shared by unlike machines.
    machine = f"{platform.machine()} {sorted(cpu_flags())} {[*_FLAGS, *flags]}".encode()
    content = b"".join(path.read_bytes() for path in (*sources, *headers))
    name = f"{sources[0].stem}-{hashlib.sha256(content + version + machine).hexdigest()[:16]}.so"
    folder = _folder()
    library = folder / name
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built, objects = Path(temporary, name), [Path(temporary, f"{source.stem}.o") for source in sources]
            # -shared alone, without the runtime of -fopenmp: the library finds torch's own, with its one pool of
            # threads, and torch.set_num_threads counts for both.
            for source, made in zip(sources, objects, strict=True):
                _run([compiler, *_FLAGS, *flags, "-c", source, "-o", made])
            _run([compiler, "-shared", *objects, "-o", built])
            built.replace(library)  # at once: other processes may be compiling too
    return library


def _run(command: Sequence[str | Path]) -> None:
    subprocess.run(list(map(str, command)), capture_output=True, check=True, text=True)


def _folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sigray")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):
        writable = False
    if not writable:
        folder = Path(tempfile.gettempdir(), f"sigray-{os.getuid()}")
        folder.mkdir(exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.getuid():
            raise OSError(f"{folder} belongs to another user")
    return folder


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets as Linux names them (`flags` on x86, `Features` on ARM); empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()
    )
