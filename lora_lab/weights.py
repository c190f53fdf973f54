"""Commands on weights from disk: `analyze`, `extract`, `truncate`, `merge`. No training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from lora_lab.registry import WrongInput

if TYPE_CHECKING:
    import pandas as pd

    from lora_lab.outside import Outside
    from lora_lab.tasks import Tell

Run = Callable[[argparse.Namespace], int]
"""A command: the parsed words to the exit status."""

Add = Callable[[str, str, Run, bool], argparse.ArgumentParser]
"""Enters a command: name, what it does, what runs, whether it takes `--results`."""


def enter(add: Add) -> None:
    """Enter the commands of this file and their options."""
    _enter_analyze(add)
    one = add("extract", "a base and a tuned model to a LoRA adapter", extract, False)
    one.add_argument("--base", metavar="DIR", required=True, help="folder of the base model")
    one.add_argument("--tuned", metavar="DIR", required=True, help="folder of the tuned model")
    _size(one).add_argument("--ranks", metavar="FILE", help="JSON file: {layer: directions, ...}")
    about = "of the factors: float32 (default), float64, float16, bfloat16"
    one.add_argument("--dtype", metavar="NAME", default="float32", help=about)
    _written(one)
    one = add("truncate", "an adapter to a smaller one", truncate, False)
    one.add_argument("--adapter", metavar="DIR", required=True, help="folder of a PEFT adapter")
    about = "folder of the base model: for pissa and olora, which changed it"
    one.add_argument("--base", metavar="DIR", help=about)
    _size(one)
    _written(one)
    one = add("merge", "a base model with adapters added to it", merge, False)
    one.add_argument("--base", metavar="DIR", required=True, help="folder of the base model")
    about = "folder of a PEFT adapter; several: --adapter A --adapter B"
    one.add_argument("--adapter", metavar="DIR", action="append", required=True, help=about)
    _written(one)


def _size(one: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    size = one.add_mutually_exclusive_group(required=True)
    size.add_argument("--r", metavar="N", type=int, help="directions kept of each layer")
    about = "share of ||dW||^2 kept of each layer, by as few directions as hold it"
    size.add_argument("--energy", metavar="SHARE", type=float, help=about)
    return size


def _written(one: argparse.ArgumentParser) -> None:
    one.add_argument("--out", metavar="DIR", required=True, help="new folder to write")
    one.add_argument("--json", action="store_true", help="one JSON list of rows on stdout")


def _enter_analyze(add: Add) -> None:
    one = add("analyze", "measures of weights from outside; no training", analyze, False)
    one.add_argument("--base", metavar="DIR", help="folder of the base model")
    one.add_argument("--tuned", metavar="DIR", help="folder of the fine-tuned model")
    about = "folder of a PEFT adapter; several: --adapter A --adapter B"
    one.add_argument("--adapter", metavar="DIR", action="append", help=about)
    one.add_argument("--measures", metavar="A,B", help="only these measures")
    about = "what values are compared with: usual, none, or a file of lora_lab/nulls"
    one.add_argument("--null", metavar="NAME", default="usual", help=about)
    how = one.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON list of rows on stdout")
    how.add_argument("--out", metavar="FILE", help="write rows to .parquet or .csv")
    how.add_argument("--html", metavar="FILE", help="write a report")


def analyze(given: argparse.Namespace) -> int:
    """Measure weights from outside."""
    from lora_lab.display import heard, notes
    from lora_lab.outside import left_out, study, whole

    if (given.tuned is None) == (given.adapter is None):
        raise WrongInput("analyze needs either --base DIR --tuned DIR or --adapter DIR.")
    if given.tuned is not None and given.base is None:
        raise WrongInput("--tuned DIR needs --base DIR, the model that it was tuned from.")
    out = _file("--out", given.out, ".parquet", ".csv") or _file("--html", given.html, ".html")
    names = None if given.measures is None else given.measures.split(",")
    screen = notes()
    with heard(screen, "analyze") as progress:
        null = None if given.null == "none" else given.null
        found = study(given.base, given.tuned, given.adapter, names, null, progress)
    for sentence in left_out(found.measures):
        screen.print(sentence, markup=False)
    table = whole(found)
    if given.json:
        _print_json(table)
    elif given.html is not None:
        from lora_lab.report.outside import write

        folders = {"base": given.base, "tuned": given.tuned, "adapter": given.adapter}
        words = {k: v if isinstance(v, str) else ", ".join(v) for k, v in folders.items() if v}
        print(f"report: {write(found, given.html, words)}")
    elif out is not None:
        save = table.to_parquet if out.suffix == ".parquet" else table.to_csv
        save(out, index=False)
        print(f"{len(table)} rows: {out}", file=sys.stderr)
    else:
        _show(found)
    return 0


def _file(option: str, given: str | None, *suffixes: str) -> Path | None:
    """A file to write: of a known kind, in an existing folder."""
    if given is None:
        return None
    path = Path(given)
    if path.suffix not in suffixes:
        raise WrongInput(f"{option} must end in {' or '.join(suffixes)}; got {given!r}.")
    if not path.parent.is_dir():
        raise WrongInput(f"{option} must be in an existing folder; {str(path.parent)!r} is none.")
    return path


def _show(found: Outside) -> None:
    """Tables of layers, one for each source, and of pairs."""
    from lora_lab.display import console, layer_table, pair_table

    screen = console()
    sources = found.measures.groupby("source", sort=False)
    for source, own in sources:
        if len(sources) > 1:
            screen.print(Text(str(source), style="bold"))
        screen.print(layer_table(own, screen.width))
    if len(found.pairs):
        screen.print(pair_table(found.pairs, screen.width))


def extract(given: argparse.Namespace) -> int:
    """Write the adapter of a tuned model."""
    from lora_lab import convert
    from lora_lab.tensorfile import read_json

    ranks = None if given.ranks is None else read_json(Path(given.ranks))
    size = convert.Size(given.r, given.energy, ranks)
    return _convert(
        given,
        lambda tell: convert.extract(given.base, given.tuned, given.out, size, given.dtype, tell),
    )


def truncate(given: argparse.Namespace) -> int:
    """Write a smaller adapter."""
    from lora_lab import convert

    size = convert.Size(given.r, given.energy)
    return _convert(
        given, lambda tell: convert.truncate(given.adapter, given.out, size, given.base, tell)
    )


def merge(given: argparse.Namespace) -> int:
    """Write a merged model."""
    from lora_lab import convert

    return _convert(given, lambda tell: convert.merge(given.base, given.adapter, given.out, tell))


def _convert(given: argparse.Namespace, work: Callable[[Tell], pd.DataFrame]) -> int:
    """Do the work and show its rows, as JSON or as a table."""
    from lora_lab.display import console, converted_table, heard, notes

    with heard(notes(), "layers") as progress:
        rows = work(progress)
    if given.json:
        _print_json(rows)
        return 0
    screen = console()
    screen.print(converted_table(rows, screen.width))
    print(f"written: {given.out}")
    return 0


def _print_json(table: pd.DataFrame) -> None:
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    print(json.dumps(rows, allow_nan=False))
