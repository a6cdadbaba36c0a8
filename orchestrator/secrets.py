"""Find secrets in a config, which is saved with runs, sent with jobs and printed.

Credentials come from the environment, a profile (`data.stores.profile`) or the role of a machine. A config with a
secret is refused; the message repeats the key and never the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

AMAZON_KEY = re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b")
PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY")
_VALUES = {
    "an Amazon access key": AMAZON_KEY,
    "a private key": PRIVATE_KEY,
    "name and password in a URL": re.compile(r"://[^/?#\s]*@"),
    "a signature in a URL": re.compile(r"(?i)[?&](x-(amz|goog)-(signature|credential|security-token)|signature)="),
    "a secret in a URL": re.compile(r"(?i)[?&](access_?key|secret_?key|password|token|sig)="),
}
_KEY = re.compile(r"(?i)secret|passw|credential|(access|api)[_-]?key|(auth|session|access|hf)[_-]?token(?!iz)")


def secrets_of(content: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted key and the kind of each secret in a nested mapping."""
    if isinstance(content, dict):
        for name, value in content.items():
            if isinstance(value, str) and value and _KEY.search(str(name)):
                yield f"{key}{name}: a secret by its name"
                continue
            # The key itself may hold a secret, for example as a source of captions.
            found = list(secrets_of(str(name)))
            yield from (f"{key[:-1] or 'the config'}: a key holds{line.partition(':')[2]}" for line in found)
            if not found:
                yield from secrets_of(value, f"{key}{name}.")
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from secrets_of(value, f"{key}{number}.")
    elif isinstance(content, str):
        for what, pattern in _VALUES.items():
            if pattern.search(content):
                yield f"{key[:-1]}: {what}"
                return


def secret_in_file(content: bytes) -> str:
    """Return the kind of a key in a file that a job carries; empty if there is none.

    A vocabulary may look like a URL with a password, so only keys are looked for.
    """
    text = content.decode(errors="replace")
    return next((what for what in list(_VALUES)[:2] if _VALUES[what].search(text)), "")
