"""Write docs/config.md from the config's schema: `python -m dev.config_md`.

The sentences are the docstrings of the fields in `workers/config.py` and `orchestrator/config.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sigray.orchestrator.config import RunConfig

PATH = Path("docs/config.md")
_HEAD = """\
# Configuration

A run is one YAML file, such as [examples/emoji_cpu.yaml](../examples/emoji_cpu.yaml). An argument `section.key=value`
overrides a key, and an unknown key is an error. `sigray config FILE` prints a config with every default.
`sigray config --schema` prints the JSON schema, for completion in an editor. Relative paths count from the working
directory.

`python -m dev.config_md` writes this page from the schema.

Sections: """


def text() -> str:
    """Return the page."""
    schema = RunConfig.model_json_schema()
    sections = [(name, schema["$defs"][_reference(field) or ""]) for name, field in schema["properties"].items()]
    lines = [_HEAD + ", ".join(f"[{name}](#{name})" for name, _ in sections)]
    for name, section in sections:
        lines += _tables(name, section, schema["$defs"], "##")
    return "\n".join(lines) + "\n"


def _tables(path: str, section: dict[str, Any], definitions: dict[str, Any], mark: str) -> Iterator[str]:
    """Yield the table of a section, then the tables of the sections inside."""
    yield f"\n{mark} {path}\n\n| key | type | default | meaning |\n|---|---|---|---|"
    inner: dict[str, str] = {}
    for key, field in section["properties"].items():
        name = _reference(field)
        if name is not None:
            inner[f"{path}.{key}{_ANY[_kind(field)]}"] = name
        default = "required" if key in section.get("required", []) else _code(field.get("default"))
        if name is not None and isinstance(field.get("default"), dict):
            default = ""  # the defaults of the keys inside
        meaning = " ".join(field.get("description", "").split()).replace("|", "\\|")
        yield f"| `{key}` | {_type(field, path + '.' + key)} | {default} | {meaning} |"
    for inner_path, name in inner.items():
        yield from _tables(inner_path, definitions[name], definitions, "###")


_ANY = {"section": "", "mapping": ".NAME", "list": "[]"}


def _kind(field: dict[str, Any]) -> str:
    """Return how a field holds a section: by itself, in a mapping or in a list."""
    shown = json.dumps(field)
    return "mapping" if "additionalProperties" in shown else "list" if "items" in shown else "section"


def _reference(field: dict[str, Any]) -> str | None:
    """Return the name of the section that a field holds; None if it holds a value."""
    _, mark, rest = json.dumps(field).partition('"$ref": "#/$defs/')
    return rest.partition('"')[0] if mark else None


def _type(field: dict[str, Any], path: str) -> str:
    """Return the type of a field in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(one, path) for one in field["anyOf"]))
    if "$ref" in field:
        return f"[section](#{re.sub('[^a-z_]', '', path.lower())})"
    if "enum" in field or "const" in field:
        return " or ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = field.get("type", "any")
    if kind == "array" and "prefixItems" in field:
        return f"[{', '.join(_type(item, path) for item in field['prefixItems'])}]"
    if kind == "array":
        return f"list of {_type(field['items'], path + '[]')}"
    if kind == "object":
        values = field.get("additionalProperties")
        return f"mapping to {_type(values, path + '.NAME')}" if isinstance(values, dict) else "mapping"
    signs = {"exclusiveMinimum": "> ", "minimum": "≥ ", "exclusiveMaximum": "< ", "maximum": "≤ "}
    limits = [f"{sign}{field[name]:g}" for name, sign in signs.items() if name in field]
    return " ".join([kind, ", ".join(limits)]).strip()


def _code(value: Any) -> str:
    """Return a default as YAML; floats with six digits."""
    if isinstance(value, list):
        return f"`[{', '.join(_code(item).strip('`') for item in value)}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{json.dumps(value)}`".replace('"', "")


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
