"""The page: one template, one stylesheet, one script, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lora_lab.stats import t_factor

SCRIPTS = ("core", "plot", "runs", "overview", "run", "compare", "layers", "claims", "main")
"""Files of the page's script, in their order."""
FACTORS = 200
"""Degrees of freedom whose Student factors the script is given; above, it uses a series."""
EMPTY = "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="
"""Of the empty style element that Plotly makes and fills through the CSS object model."""


@cache
def environment() -> Environment:
    """Templates that escape all text."""
    return Environment(
        loader=PackageLoader("lora_lab", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )


def fragment(name: str, values: Mapping[str, Any]) -> Markup:
    """A template of the words, filled."""
    return Markup(environment().get_template(f"{name}.html.j2").render(**values))


def _text(*names: str) -> str:
    folder = files("lora_lab.report")
    return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)


@cache
def script() -> str:
    """The page's own script."""
    body = _text(*(f"pages/{name}.js" for name in SCRIPTS))
    factors = [round(t_factor(n), 12) for n in range(1, FACTORS + 1)]
    return f'"use strict";\n(() => {{\nconst T_FACTORS = {factors};\n{body}\n}})();\n'


@cache
def plotly() -> str:
    """Plotly's script, from its package."""
    return str(get_plotlyjs())


@cache
def policy(served: bool, active: bool = True) -> str:
    """Content-Security-Policy: the page's own style and scripts by their hashes, nothing else.

    Parameters
    ----------
    served : bool
        May ask the server that it came from for data.
    active : bool
        Has scripts.
    """
    rules = ["default-src 'none'", "base-uri 'none'", "form-action 'none'"]
    styles = f"style-src '{_hash(_text('page.css'))}'"
    pictures = "img-src data:"
    if active:
        styles += f" '{EMPTY}'"
        pictures += " blob:"
        # Plotly sets attributes; elements of style stay those of the hashes.
        rules.append("style-src-attr 'unsafe-inline'")
        rules.append(f"script-src '{_hash(script())}' '{_hash(plotly())}'")
    if served:
        pictures += " 'self'"
        rules.append("connect-src 'self'")
    return "; ".join([*rules, styles, pictures])


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def packed(data: bytes) -> str:
    """Bytes as they stand inside of the file: gzip, base64; equal bytes give equal text."""
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode("ascii")


def inert(values: Mapping[str, Any]) -> str:
    """A page of words and pictures alone."""
    return _shell(values, policy(served=False, active=False), active=False)


@cache
def _packed_plotly() -> str:
    return packed(plotly().encode())


def alone(values: Mapping[str, Any], parts: Mapping[str, str]) -> str:
    """The pages as one file, with their words and all of their data inside, `packed`."""
    inside = {**parts, "plotly": _packed_plotly()}
    return _shell(values, policy(served=False), active=True, parts=inside)


def served() -> str:
    """The pages as the server gives them: words and data are asked for."""
    return _shell(None, policy(served=True), active=True)


def _shell(
    values: Mapping[str, Any] | None,
    rules: str,
    active: bool,
    parts: Mapping[str, str] | None = None,
) -> str:
    words = {
        name: fragment(name, values) if values is not None else Markup("")
        for name in ("findings", "words")
    }
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            policy=Markup(rules),
            style=Markup(_text("page.css")),
            script=Markup(script()) if active else None,
            parts=parts or {},
            **words,
        )
    )
