"""HTML pages with one frame and one style; templates escape all text from data."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Template

_LIVE_S = 5  # between two requests of a live page


def render(template: str, *, package: str = "sigray.orchestrator.reports", **values: Any) -> Markup:
    """Fill a template of a package."""
    return Markup(_template(template, package).render(**values))


@cache
def _template(name: str, package: str) -> Template:
    """Compile a template, which takes 50 ms."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_file(name, package))


def page(title: str, body: Markup, *, css: str = "", is_live: bool = False) -> str:
    """Return a whole page; it loads nothing else.

    Args:
        body: its content.
        css: besides the style of all pages.
        is_live: the page requests /api + its own path repeatedly and shows the "html" of the answer.
    """
    css = Markup(_file("page.css") + css)
    return render("page.html.j2", title=title, body=body, css=css, script=Markup(_script()) if is_live else "")


def content_policy() -> str:
    """Return the Content-Security-Policy of live pages: own script, styles, pictures."""
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    own = f"script-src 'sha256-{digest}'; connect-src 'self'; style-src 'unsafe-inline'; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _script() -> str:
    return _file("live.js").replace("LIVE_MS", str(1000 * _LIVE_S))


@cache
def _file(name: str, package: str = "sigray.orchestrator.reports") -> str:
    return importlib.resources.files(package).joinpath(name).read_text(encoding="utf-8")
