"""Find the functions and classes that a config names as `package.module:name`."""

from __future__ import annotations

import importlib
from typing import Any


def find_named(name: str, key: str) -> Any:
    """Return the function or class of a module.

    Args:
        name: `package.module:name`.
        key: of the config, for the error.

    Raises:
        ValueError: if the module cannot be imported, or has no such name.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"{key}={name!r}: package.module:name expected")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(
            f"{key}={name!r}: {error}; it must be installed, or on PYTHONPATH, on every machine"
        ) from error
    except AttributeError as error:
        raise ValueError(f"{key}={name!r}: {error}") from error
