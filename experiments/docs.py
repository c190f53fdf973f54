"""Write the generated parts of docs/: from registries, docstrings, dataclasses and verdicts.

python -m experiments.docs
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from experiments.findings import families, grounds, open_claims, surprises
from experiments.markdown import described, flowing, plain, table
from experiments.readme import ROOT, replaced
from lora_lab import schema
from lora_lab.adapters import ADAPTERS
from lora_lab.data import DATA
from lora_lab.fields import Field, asked, summary
from lora_lab.figures import FIGURES
from lora_lab.inits import INITS
from lora_lab.linalg import Spectrum
from lora_lab.measures import MEASURES, Measure
from lora_lab.models import MODELS
from lora_lab.nulls import NULLS
from lora_lab.probes import PROBES
from lora_lab.registry import Registry
from lora_lab.scalings import SCALINGS


def measures() -> str:
    """Every measure: formula, range, invariances, k, sides, reference; by what it looks at."""
    kinds: dict[str, list[str]] = {
        "Of the singular values": [],
        "Against the base weight or the inputs": [],
        "Of two updates, or across seeds": [],
    }
    own, base, pairs = kinds.values()
    for name in MEASURES:
        needs = set(MEASURES[name].needs)
        two = needs & {"pair", "pair_update", "seeds"}
        home = pairs if two else own if needs <= {"values", "r"} else base
        home.append(_measure(name, MEASURES[name]))
    return "\n\n".join(f"### {title}\n\n" + "\n\n".join(body) for title, body in kinds.items())


def _measure(name: str, m: Measure) -> str:
    formula, rest, reference = described(m.function)
    facts = [m.kind]
    if m.grid is not None:
        facts.append(f"k: {_grid(m)}")
    if m.sides:
        facts.append("side: " + ", ".join(f"`{side}`" for side in m.sides))
    facts += {"end": ["of the final update"], "later": ["by `lora-lab measure`"]}.get(m.at, [])
    lines = [f"#### {name}", f"{plain(summary(m.function))} *({'; '.join(facts)})*"]
    lines += ["```text\n" + formula.replace("`", "") + "\n```", flowing(rest)]
    lines += [f"Reference: {plain(reference)}"] if reference else []
    return "\n\n".join(line for line in lines if line)


def _grid(m: Measure) -> str:
    """The values of k; those that depend on the update are told in the text."""
    assert m.grid is not None
    few, many = (Spectrum.of_values([1.0] * n, shape=(n, n)) for n in (3, 40))
    same = m.grid(few) == m.grid(many) != ()
    return (
        ", ".join(f"{k:g}" for k in m.grid(few)) if same else "as far as the update has directions"
    )


def listed(registry: Registry[Any]) -> str:
    """Members of a registry: name, what the file says first, what the docstring says."""
    rows = []
    for name in registry:
        member = registry[name]
        inner = next((v for v in vars(member).values() if inspect.isfunction(v)), member)
        first, rest, reference = described(inner)
        own = " ".join([*first.split(), *rest.split()])
        cited = f" ({plain(reference)})" if reference else ""
        rows.append((f"`{name}`", plain(summary(inner)), plain(own) + cited))
    return table(("name", "what", "exactly"), rows)


def figures() -> str:
    """The report's figures in their order."""
    order = sorted((FIGURES[name] for name in FIGURES), key=lambda figure: figure.place)
    return table(
        ("figure", "what to look for"), [(plain(f.title), plain(f.look_for)) for f in order]
    )


@lru_cache(maxsize=1)
def known() -> Any:
    """Every config field, asked once."""
    return asked()


def _rows(fields: Iterable[Field]) -> str:
    heads = ("key", "value", "default", "meaning")
    return table(heads, [(f"`{f.key}`", plain(f.value), f"`{f.default}`" * bool(f.default),
                          plain(f.meaning)) for f in fields])  # fmt: skip


def common() -> str:
    """Keys that every run has."""
    return _rows(f for f in known().fields if not f.owner)


def group(name: str, registry: Registry[Any]) -> str:
    """Choices of a group: what each is, and the keys that no choice before it has."""
    first = known().chosen[name]
    order = sorted(registry, key=lambda n: (n != first, len(registry[n].__mro__), n))
    seen: dict[tuple[str, ...], str] = {}
    parts = []
    for choice in order:
        own: list[Field] = []
        shared: dict[str, list[str]] = {}
        for field in known().fields:
            if field.owner != f"{name}={choice}":
                continue
            content = (field.key, field.value, field.default, field.meaning)
            if content in seen:
                shared.setdefault(seen[content], []).append(f"`{field.key}`")
            else:
                seen[content] = choice
                own.append(field)
        lines = [f"#### `{name}={choice}`", plain(summary(registry[choice]))]
        lines += [_rows(own)] if own else []
        lines += [f"As of `{other}`: {', '.join(keys)}." for other, keys in shared.items()]
        parts.append("\n\n".join(lines))
    return "\n\n".join(parts)


def columns() -> str:
    """The tables' columns."""
    parts = []
    for name in ("runs", "measures", "traces", "spectra", "examples"):
        rows = [(f"`{c}`", plain(about)) for c, (_, about) in getattr(schema, name.upper()).items()]
        parts.append(f"#### {name}\n\n{table(('column', 'what'), rows)}")
    return "\n\n".join(parts)


# ---- pages --------------------------------------------------------------------------------------

PAGES = {
    "reference": {
        "common": common,
        "adapters": lambda: group("adapter", ADAPTERS),
        "models": lambda: group("model", MODELS),
        "data": lambda: group("data", DATA),
        "inits": lambda: listed(INITS),
        "scalings": lambda: listed(SCALINGS),
        "measures": measures,
        "nulls": lambda: listed(NULLS),
        "traces": lambda: listed(PROBES),
        "figures": figures,
        "columns": columns,
    },
    "findings": {"families": families, "surprises": surprises, "open": open_claims},
    "validity": {"grounds": grounds},
}


def written(page: str, text: str) -> str:
    """The page with its generated blocks replaced."""
    for block, content in PAGES[page].items():
        text = replaced(text, block, content())
    return text


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / "docs" / f"{page}.md"
        path.write_text(written(page, path.read_text()))
