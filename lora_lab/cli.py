"""The command line: `lora-lab COMMAND`. Wrong input is one line and exit status 2."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.text import Text

from lora_lab.registry import WrongInput, did_you_mean
from lora_lab.store import Store, StoreError, load, pack

if TYPE_CHECKING:
    from lora_lab.config import Host
    from lora_lab.hydra_bridge import Planned
    from lora_lab.outside import Outside

OK, FAILED, WRONG, STOPPED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and leaving."""
        raise WrongInput(f"{message.replace(chr(10), ' ')}. See {self.prog} --help.")


def parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `lora-lab` and those of its commands, by name."""
    top = Parser(
        prog="lora-lab",
        description="What does fine-tuning do to a weight, and how much rank does it need?",
        allow_abbrev=False,
    )
    adder = top.add_subparsers(metavar="COMMAND", parser_class=Parser)
    commands: dict[str, Parser] = {}

    def add(name: str, about: str, run: Any, results: bool = True) -> Parser:
        one = adder.add_parser(name, help=about, description=about, allow_abbrev=False)
        commands[name] = one
        one.set_defaults(run=run)
        if results:
            one.add_argument("--results", metavar="DIR", help="results folder (default: ./results)")
        return one

    def overrides(one: Parser) -> None:
        one.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="for example adapter=lora adapter.r=1,2,4 seed=0,1,2 size=demo",
        )

    overrides(add("demo", "the embedded sweep, its analysis and report", demo))
    overrides(add("train", "one run (or a few: key=1,2,3)", train))
    for name, about, run in (
        ("sweep", "a preset of conf/sweep with overrides; run again to resume", sweep),
        ("plan", "what a sweep would run: count, time, disk, memory", plan),
    ):
        one = add(name, about, run)
        one.add_argument("name", metavar="NAME", nargs="?", help="a file of conf/sweep")
        overrides(one)
    add("measure", "take missing measures of finished runs, without training", measure)
    add("pack", "write finished runs' tables to results/ledger", pack_runs)
    add("status", "how many runs are done, running, failed …", status)
    add("runs", "the table of runs", runs)
    add("report", "write results/report.html", report)
    one = add("analyze", "measures of weights from outside; no training", analyze, results=False)
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
    return top, commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 some runs failed, 2 wrong input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        top, commands = parser()
        if not argv or argv[0] in ("-h", "--help"):
            top.print_help()
            return OK
        word = argv[0]
        if word not in commands:
            what = "the command comes first; got" if word.startswith("-") else "unknown command"
            raise WrongInput(
                f"{what} {word!r}; commands: {', '.join(commands)}.{did_you_mean(word, commands)}"
            )
        # Intermixed: overrides may also stand after an option.
        given = commands[word].parse_intermixed_args(argv[1:])
        return int(given.run(given))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (WrongInput, StoreError, OSError) as error:
        print(f"lora-lab: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG if isinstance(error, WrongInput) else FAILED
    except KeyboardInterrupt:
        again = shlex.join(["lora-lab", *argv])
        print(f"stopped; what was done stays. Resume with: {again}", file=sys.stderr)
        return STOPPED


def console() -> Console:
    """Where people read: tables go here."""
    screen = Console(highlight=False)
    if not screen.is_terminal and "COLUMNS" not in os.environ:
        screen.width = 1000  # a file or a pipe has no width to keep to
    return screen


def host_overrides(given: argparse.Namespace) -> list[str]:
    """`--results DIR` as the override that it stands for."""
    words = list(given.overrides)
    if given.results is not None:
        if any(word.startswith("host.results=") for word in words):
            raise WrongInput("give --results DIR or host.results=DIR, not both.")
        words.append(f"host.results={given.results}")
    return words


def results_of(given: argparse.Namespace) -> Path:
    """The results folder of a command that takes no overrides."""
    from lora_lab.config import Host, literal_path

    return literal_path(Host().results if given.results is None else Host(given.results).results)


# ---- commands that train ----------------------------------------------------------------------

SWEEP_DEFAULTS = ["host.keep=top"]
"""Sweeps keep the leading directions and the exact spectrum of full updates, not all of them."""


def _planned(name: str | None, words: list[str]) -> tuple[list[Planned], Host]:
    from lora_lab.hydra_bridge import choices, preset
    from lora_lab.hydra_bridge import plan as make_plan

    if name is None:
        raise WrongInput(f"a sweep needs a NAME: {', '.join(choices('sweep'))}.")
    return make_plan(preset(name), words, SWEEP_DEFAULTS)


def _run(name: str, planned: list[Planned], host: Host) -> int:
    """Sweep, with a display, and end with the table of its runs."""
    from lora_lab import engine
    from lora_lab.progress import Display, show

    screen = console()
    with Display(screen) as display:
        summary = engine.sweep(name, planned, host, display)
    show(screen, summary, host)
    return FAILED if summary.failed else OK


def sweep(given: argparse.Namespace) -> int:
    """Run what is missing of a preset."""
    planned, host = _planned(given.name, host_overrides(given))
    return _run(given.name, planned, host)


def train(given: argparse.Namespace) -> int:
    """Run one config, or the combinations of a few values."""
    from lora_lab.hydra_bridge import plan as make_plan

    planned, host = make_plan([[]], host_overrides(given))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Under `accelerate launch` the processes are there already and train together.
        from lora_lab.engine import run_here

        return OK if all(run_here(one, host) in ("done", "diverged") for one in planned) else FAILED
    return _run("train", planned, host)


def demo(given: argparse.Namespace) -> int:
    """The preset `demo`, then the report."""
    planned, host = _planned("demo", host_overrides(given))
    code = _run("demo", planned, host)
    _report(Path(host.results))
    return code


def plan(given: argparse.Namespace) -> int:
    """Show what a preset would run."""
    from lora_lab.display import plan_table

    planned, host = _planned(given.name, host_overrides(given))
    console().print(plan_table(given.name, planned, host))
    return OK


# ---- commands that read -----------------------------------------------------------------------


def measure(given: argparse.Namespace) -> int:
    """Take missing measures, and compare runs with their other seeds."""
    from lora_lab.display import counted
    from lora_lab.measuring import measure_missing
    from lora_lab.replication import replicate_missing, seed_measures

    store = Store(results_of(given))
    done = measure_missing(store)
    names = sorted({name for taken in done.values() for name in taken})
    if done:
        what = ", ".join(names) if len(names) < 6 else counted(len(names), "measure")
        print(f"{what}: taken of {counted(len(done), 'run')}", flush=True)
    compared = replicate_missing(store)
    if compared:
        print(f"{', '.join(seed_measures())}: taken of {counted(len(compared), 'run')}")
    if not done and not compared:
        print("nothing to measure: every finished run has every measure")
    return OK


def pack_runs(given: argparse.Namespace) -> int:
    """Write the ledger."""
    for path in pack(Store(results_of(given))):
        print(f"{path} ({path.stat().st_size / 1e3:.1f} kB)")
    return OK


def status(given: argparse.Namespace) -> int:
    """Count runs by status."""
    from lora_lab.display import status_lines

    store = Store(results_of(given))
    for line in status_lines(store, load(store.root)):
        print(line)
    return OK


def runs(given: argparse.Namespace) -> int:
    """Show the table of runs."""
    from lora_lab.display import runs_table

    screen, found = console(), load(results_of(given)).runs
    screen.print(runs_table(found, screen.width) if len(found) else "no runs yet")
    return OK


def report(given: argparse.Namespace) -> int:
    """Write the report."""
    _report(results_of(given))
    return OK


def _report(results: Path) -> None:
    from lora_lab.report import write

    print(f"report: {write(load(results), results / 'report.html').resolve()}")


def analyze(given: argparse.Namespace) -> int:
    """Measure weights from outside."""
    from lora_lab.display import LayerProgress
    from lora_lab.outside import left_out, study, whole

    if (given.tuned is None) == (given.adapter is None):
        raise WrongInput("analyze needs either --base DIR --tuned DIR or --adapter DIR.")
    if given.tuned is not None and given.base is None:
        raise WrongInput("--tuned DIR needs --base DIR, the model that it was tuned from.")
    out = _file("--out", given.out, ".parquet", ".csv") or _file("--html", given.html, ".html")
    names = None if given.measures is None else given.measures.split(",")
    screen = Console(stderr=True, highlight=False, soft_wrap=True)
    with warnings.catch_warnings(), LayerProgress(screen) as progress:
        warnings.showwarning = lambda message, *_: screen.print(f"warning: {message}", markup=False)
        null = None if given.null == "none" else given.null
        found = study(given.base, given.tuned, given.adapter, names, null, progress)
    for sentence in left_out(found.measures):
        screen.print(sentence, markup=False)
    table = whole(found)
    if given.json:
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        print(json.dumps(rows, allow_nan=False))
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
    return OK


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
    from lora_lab.display import layer_table, pair_table

    screen = console()
    sources = found.measures.groupby("source", sort=False)
    for source, own in sources:
        if len(sources) > 1:
            screen.print(Text(str(source), style="bold"))
        screen.print(layer_table(own, screen.width))
    if len(found.pairs):
        screen.print(pair_table(found.pairs, screen.width))


if __name__ == "__main__":
    sys.exit(main())
