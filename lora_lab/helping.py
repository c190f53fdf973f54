"""`lora-lab help`, the first page of `lora-lab --help`, and what completes a word in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_lab.fields import Catalogue, Field, catalogue
from lora_lab.registry import WrongInput, did_you_mean

if TYPE_CHECKING:
    from lora_lab.weights import Add

ABOUT = "What does fine-tuning do to a weight, and how much rank does it need?"

SIX = {
    "run": "one training with one config; its name is the hash of what changes its numbers",
    "update": "what training did to one weight: dW = W_T - W_0, kept as factors or dense",
    "spectrum": "an update decomposed once",
    "measure": "spectrum to number: effective_rank, energy_rank, amplification …",
    "table": "the numbers in tidy rows",
    "claim": "a sentence about fine-tuning with its sweep, figure and verdict",
}

FIRST = {
    "lora-lab train model=planted data=planted size=smoke": "one run, on a problem of known rank",
    "lora-lab analyze --adapter DIR --html page.html": "spectra of your own adapter",
    "lora-lab help adapter.r": "what a key means; without a key: all of them",
}

SECTIONS = {
    "Train": ("train", "sweep", "plan", "demo", "suggest-rank"),
    "Look": ("status", "runs", "diff", "report", "dashboard"),
    "Weights from outside": ("analyze", "extract", "truncate", "merge"),
    "Claims": ("claims",),
    "Keep": ("measure", "pack", "sync", "rm", "doctor", "help"),
}


def page(commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """The text of `lora-lab --help`: what it is, a first example, six words, the commands."""
    lines = ["usage: lora-lab COMMAND [key=value ...] [options]", "", ABOUT]
    lines += _listed("First steps", FIRST) + _listed("Six words", SIX)
    left = {name: str(one.description) for name, one in commands.items()}
    for title, names in SECTIONS.items():
        lines += _listed(title, {n: left.pop(n) for n in names if n in left})
    lines += _listed("More", left) if left else []
    return "\n".join([*lines, "", "lora-lab COMMAND --help: the options of a command", ""])


def _listed(title: str, rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows))
    return ["", title, *(f"  {name:<{width}}  {about}" for name, about in rows.items())]


def enter(add: Add) -> None:
    """Enter the command of this file."""
    one = add("help", "what a config key, or a group of keys, means", explain, False)
    about = "adapter.r, train, adapter=lora, sweep …; none: all groups and keys"
    completes(one.add_argument("key", metavar="KEY", nargs="?", help=about), complete_key)


def explain(given: argparse.Namespace) -> int:
    """Show what is known of a key, a choice or a group."""
    from lora_lab.display import console, fields_table

    known, screen, word = catalogue(), console(), given.key
    if word is None:
        for group, choices in known.choices.items():
            screen.print(f"{group}: {', '.join(choices)}", markup=False)
        screen.print(fields_table([f for f in known.fields if not f.owner]))
        screen.print(
            "keys of a choice: lora-lab help adapter=lora; one key: lora-lab help adapter.r"
        )
    elif word in known.choices:
        for name, said in known.choices[word].items():
            screen.print(f"{word}={name}: {said}", markup=False)
    else:
        group, _, name = word.partition("=")
        if about := known.choices.get(group, {}).get(name):
            screen.print(about, markup=False)
        if fields := meant(known, word):
            screen.print(fields_table(fields))
        elif not about:
            words = [*known.keys(), *known.choices, "train", "host"]
            raise WrongInput(
                f"unknown key {word!r}; `lora-lab help` lists all.{did_you_mean(word, words)}"
            )
    return 0


def meant(known: Catalogue, word: str) -> list[Field]:
    """Fields of a choice (`adapter=lora`), of a group (`train`), or of a key (`adapter.r`, `r`)."""
    return [
        f
        for f in known.fields
        if word in (f.owner, f.key, f.key.partition(".")[0], f.key.rpartition(".")[2])
    ]


# ---- completion ---------------------------------------------------------------------------------


def completes(action: argparse.Action, how: Any) -> None:
    """Let `how(prefix, ...)` give the words of an argument."""
    action.completer = how  # type: ignore[attr-defined]


def complete_key(prefix: str, **_: Any) -> list[str]:
    """Groups, choices and keys that `lora-lab help` knows."""
    known = catalogue()
    words = [f"{group}={name}" for group, names in known.choices.items() for name in names]
    return [w for w in [*known.choices, *words, *known.keys()] if w.startswith(prefix)]


def complete_sweep(prefix: str, **_: Any) -> list[str]:
    """Presets."""
    return [name for name in catalogue().choices["sweep"] if name.startswith(prefix)]


def complete_override(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """`key=` of the choices made so far, and after `=` the values, also behind a comma."""
    known = catalogue()
    key, equals, typed = prefix.partition("=")
    if not equals:
        words = [group for group in known.choices if group != "sweep"]
        owners = _owners(known, vars(parsed_args))
        words += [f.key for f in known.fields if not f.owner or f.owner in owners]
        return [f"{word}=" for word in dict.fromkeys(words) if word.startswith(key)]
    values = list(known.choices.get(key, {}))
    values += [word for f in known.fields if f.key == key for word in f.words]
    before = typed[: len(typed) - len(typed.rpartition(",")[2])]
    return [f"{key}={before}{v}" for v in dict.fromkeys(values) if f"{before}{v}".startswith(typed)]


def _owners(known: Catalogue, given: Mapping[str, Any]) -> set[str]:
    """The choices of a command line, `adapter=lora`, and the defaults of the other groups."""
    chosen = dict(known.chosen)
    for word in given.get("overrides") or given.get("words") or ():
        group, _, names = word.partition("=")
        if group in chosen:
            chosen[group] = names
    return {f"{group}={name}" for group, names in chosen.items() for name in names.split(",")}
