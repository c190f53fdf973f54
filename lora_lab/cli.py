"""The command line: `lora-lab COMMAND`. Wrong input is one line and exit status 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from lora_lab.registry import WrongInput, did_you_mean
from lora_lab.store import Store, StoreError, load, pack

if TYPE_CHECKING:
    from lora_lab.config import Host
    from lora_lab.hydra_bridge import Planned

OK, FAILED, WRONG, STOPPED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise WrongInput(f"{message.replace(chr(10), ' ')}. See {self.prog} --help.")


def parser() -> Parser:
    """All commands and their options."""
    top = Parser(
        prog="lora-lab",
        description="What does fine-tuning do to a weight, and how much rank does it need?",
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def add(name: str, about: str, run: Any, results: bool = True) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        one.set_defaults(run=run)
        if results:
            one.add_argument("--results", metavar="DIR", help="results folder (default: ./results)")
        return one

    def overrides(one: argparse.ArgumentParser) -> None:
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
        one.add_argument("name", metavar="NAME", help="a file of conf/sweep")
        overrides(one)
    add("measure", "take missing measures of finished runs, without training", measure)
    add("pack", "write finished runs' tables to results/ledger", pack_runs)
    add("status", "how many runs are done, running, failed …", status)
    add("runs", "the table of runs", runs)
    add("report", "write results/report.html", report)
    one = add("analyze", "measures of weights from outside; no training", analyze, results=False)
    one.add_argument("--base", metavar="DIR", help="folder of the base model")
    one.add_argument("--tuned", metavar="DIR", help="folder of the fine-tuned model")
    one.add_argument("--adapter", metavar="DIR", help="folder of a PEFT LoRA adapter")
    how = one.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON list of rows on stdout")
    how.add_argument("--out", metavar="FILE", help="write rows to .parquet or .csv")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 some runs failed, 2 wrong input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        top = parser()
        names = list(top._subparsers._group_actions[0].choices)  # type: ignore[union-attr,arg-type]
        word = next((a for a in argv if not a.startswith("-")), None)
        if word is not None and word not in names:
            raise WrongInput(
                f"unknown command {word!r}; commands: {', '.join(names)}."
                f"{did_you_mean(word, names)}"
            )
        given = top.parse_args(argv)
        if given.command is None:
            top.print_help()
            return OK
        return int(given.run(given))
    except (WrongInput, StoreError) as error:
        print(f"lora-lab: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG if isinstance(error, WrongInput) else FAILED
    except KeyboardInterrupt:
        again = " ".join(["lora-lab", *argv])
        print(f"stopped; what was done stays. Resume with: {again}", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def console() -> Console:
    """Where people read: tables go here."""
    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen.width = 200  # a file or a pipe has no width to keep to
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
    from lora_lab.config import literal_path

    return literal_path(given.results or "results")


# ---- commands that train ----------------------------------------------------------------------

SWEEP_DEFAULTS = ["host.keep=top"]
"""Sweeps keep the leading directions and the exact spectrum of full updates, not all of them."""


def _planned(name: str, words: list[str]) -> tuple[list[Planned], Host]:
    from lora_lab.hydra_bridge import plan as make_plan
    from lora_lab.hydra_bridge import preset

    return make_plan(preset(name), words, SWEEP_DEFAULTS)


def _run(name: str, planned: list[Planned], host: Host) -> int:
    """Sweep, with a display, and end with the table of its runs."""
    from lora_lab import engine
    from lora_lab.display import Display, summary_table

    screen = console()
    with Display(screen) as display:
        summary = engine.sweep(name, planned, host, display)
    screen.print(summary_table(load(host.results), planned, summary))
    bad = [i for i, s in summary.status.items() if s != "done"]
    for run_id in bad:
        screen.print(
            f"{summary.status[run_id]} {run_id}: {summary.errors.get(run_id, '')}"
            f" (log: {Path(host.results) / 'runs' / run_id / 'log.txt'})",
            markup=False,
        )
    return FAILED if summary.failed else OK


def sweep(given: argparse.Namespace) -> int:
    planned, host = _planned(given.name, host_overrides(given))
    return _run(given.name, planned, host)


def train(given: argparse.Namespace) -> int:
    from lora_lab.hydra_bridge import plan as make_plan

    planned, host = make_plan([[]], host_overrides(given))
    return _run("train", planned, host)


def demo(given: argparse.Namespace) -> int:
    planned, host = _planned("demo", host_overrides(given))
    code = _run("demo", planned, host)
    _report(Path(host.results))
    return code


def plan(given: argparse.Namespace) -> int:
    from lora_lab.display import plan_table

    planned, host = _planned(given.name, host_overrides(given))
    console().print(plan_table(given.name, planned, host))
    return OK


# ---- commands that read -----------------------------------------------------------------------


def measure(given: argparse.Namespace) -> int:
    from lora_lab.analysis import measure_missing

    done = measure_missing(Store(results_of(given)))
    names = sorted({name for taken in done.values() for name in taken})
    print(f"{len(done)} runs measured" + (f": {', '.join(names)}" if names else ""))
    return OK


def pack_runs(given: argparse.Namespace) -> int:
    for path in pack(Store(results_of(given))):
        print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")
    return OK


def status(given: argparse.Namespace) -> int:
    from lora_lab.display import status_lines

    store = Store(results_of(given))
    for line in status_lines(store, load(store.root)):
        print(line)
    return OK


def runs(given: argparse.Namespace) -> int:
    from lora_lab.display import runs_table

    console().print(runs_table(load(results_of(given)).runs))
    return OK


def report(given: argparse.Namespace) -> int:
    _report(results_of(given))
    return OK


def _report(results: Path) -> None:
    from lora_lab.report import write

    print(f"report: {write(load(results), results / 'report.html').resolve()}")


def analyze(given: argparse.Namespace) -> int:
    from lora_lab.analysis import analyze as table_of

    if given.tuned is None and given.adapter is None:
        raise WrongInput("analyze needs --tuned DIR (with --base DIR) or --adapter DIR.")
    if given.out is not None and Path(given.out).suffix not in (".parquet", ".csv"):
        raise WrongInput(f"--out must end in .parquet or .csv; got {given.out!r}.")
    table = table_of(base=given.base, tuned=given.tuned, adapter=given.adapter)
    if given.json:
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        print(json.dumps(rows, allow_nan=False))
    elif given.out is not None:
        write = table.to_parquet if given.out.endswith(".parquet") else table.to_csv
        write(given.out, index=False)
        print(f"{len(table)} rows: {given.out}", file=sys.stderr)
    else:
        from lora_lab.display import layer_table

        console().print(layer_table(table))
    return OK


if __name__ == "__main__":
    sys.exit(main())
