"""The command line: `lora-lab COMMAND`. Wrong input is one line and exit status 2.

What a command works with is imported where it works: completing a word must not wait for pandas.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lora_lab import browsing, helping, syncing, weights
from lora_lab.policies import MARGIN
from lora_lab.registry import StoreError, WrongInput, did_you_mean

if TYPE_CHECKING:
    from lora_lab.config import Host
    from lora_lab.hydra_bridge import Planned

OK, FAILED, WRONG, STOPPED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and leaving."""
        raise WrongInput(f"{message.replace(chr(10), ' ')}. See {self.prog} --help.")


def parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `lora-lab` and those of its commands, by name."""
    top = Parser(prog="lora-lab", allow_abbrev=False)
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
        about = (
            "for example adapter=lora adapter.r=1,2,4 seed=0,1,2 size=demo; `lora-lab help`: all"
        )
        word = one.add_argument("overrides", nargs="*", metavar="key=value", help=about)
        helping.completes(word, helping.complete_override)

    overrides(add("demo", "the embedded sweep, its analysis and report", demo))
    overrides(add("train", "one run (or a few: key=1,2,3)", train))
    for name, about, run in (
        ("sweep", "a preset of conf/sweep with overrides; run again to resume", sweep),
        ("plan", "what a sweep would run: count, time, disk, memory", plan),
    ):
        one = add(name, about, run)
        word = one.add_argument("name", metavar="NAME", nargs="?", help="a file of conf/sweep")
        helping.completes(word, helping.complete_sweep)
        overrides(one)
    one = add("suggest-rank", "the r that LoRA needs for your model and data, and why", suggest)
    about = "the model and data to probe, or ids of finished full runs"
    word = one.add_argument("words", nargs="*", metavar="key=value|RUN", help=about)
    helping.completes(word, helping.complete_override)
    one.add_argument("--base", metavar="DIR", help="instead: folder of a base model, and")
    one.add_argument("--tuned", metavar="DIR", help="of the model that was tuned from it")
    about = f"score that a truncation, and LoRA, may lose (default: {MARGIN:g})"
    one.add_argument("--margin", metavar="X", type=float, default=MARGIN, help=about)
    about = "folder for adapter_config.json (default: suggestion)"
    one.add_argument("--out", metavar="DIR", default="suggestion", help=about)
    one.add_argument("--verify", action="store_true", help="train LoRA with it: PASS or FAIL")
    add("measure", "take missing measures of finished runs, without training", measure)
    add("pack", "write finished runs' tables to results/ledger", pack_runs)
    browsing.enter(add)
    add("report", "write results/report.html", report)
    syncing.enter(add)
    weights.enter(add)
    one = add("claims", "decide claims about LoRA: run what is missing, verdict, figure", claims)
    one.add_argument("words", nargs="*", metavar="ID", help="such as A1 C4 (none: all); host.KEY=…")
    about = "paper (default): what is committed; smoke: seconds, says nothing about a claim"
    one.add_argument("--size", metavar="SIZE", default="paper", help=about)
    one.add_argument("--list", action="store_true", help="what is decided, and what is left to run")
    helping.enter(add)
    return top, commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 some runs failed, 2 wrong input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        top, commands = parser()
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete

            argcomplete.autocomplete(top, always_complete_options=False)
        if not argv or argv[0] in ("-h", "--help"):
            print(helping.page(commands), end="")
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


def host_overrides(given: argparse.Namespace) -> list[str]:
    """`--results DIR` as the override that it stands for."""
    words = list(given.overrides)
    if given.results is not None:
        if any(word.startswith("host.results=") for word in words):
            raise WrongInput("give --results DIR or host.results=DIR, not both.")
        words.append(f"host.results={given.results}")
    return words


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
    from lora_lab.display import console
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
    from lora_lab.display import console, plan_table

    planned, host = _planned(given.name, host_overrides(given))
    console().print(plan_table(given.name, planned, host))
    return OK


def claims(given: argparse.Namespace) -> int:
    """Decide claims, or list them."""
    from lora_lab.deciding import decide

    given.overrides = [word for word in given.words if "=" in word]
    ids = [word for word in given.words if "=" not in word]
    return decide(ids, given.size, host_overrides(given), only_list=given.list)


def suggest(given: argparse.Namespace) -> int:
    """Suggest a rank, and on request prove it."""
    from lora_lab import suggesting
    from lora_lab.display import console, heard, notes, policy_table
    from lora_lab.progress import Display
    from lora_lab.store import Store

    ids = [word for word in given.words if "=" not in word]
    given.overrides = [word for word in given.words if "=" in word]
    words, screen, pair = host_overrides(given), console(), given.tuned is not None
    if (given.base is None) == pair or (pair and given.words) or (ids and given.overrides):
        raise WrongInput(
            "suggest-rank needs one of: key=value of a model and data, ids of full runs, "
            "--base DIR --tuned DIR."
        )
    if given.verify and (pair or ids):
        raise WrongInput("--verify trains: give the model and data as key=value.")
    if pair:
        with heard(notes(), "suggest-rank") as progress:
            advice = suggesting.from_pair(given.base, given.tuned, progress)
    else:
        with Display(notes()) as display:
            ids, host = suggesting.probe(ids, words, display)
        advice = suggesting.from_runs(Store(host.results), ids, host, given.margin)
    screen.print(policy_table(advice))
    path = suggesting.write_config(advice, Path(given.out))
    for line in [*suggesting.said(advice), f"written for PEFT: {path}"]:
        screen.print(line, markup=False)
    if not given.verify:
        return OK
    with Display(notes()) as display:
        tried = suggesting.verify(advice, words, display)
    for trial in tried:
        screen.print(trial.said(given.margin), markup=False)
    own = suggesting.overall(advice.recommended)
    return OK if any(t.r == own and t.passed(given.margin) for t in tried) else FAILED


# ---- commands that read -----------------------------------------------------------------------


def measure(given: argparse.Namespace) -> int:
    """Take missing measures, and compare runs with their other seeds."""
    from lora_lab.display import counted
    from lora_lab.measuring import measure_missing
    from lora_lab.replication import replicate_missing, seed_measures
    from lora_lab.store import Store

    store = Store(browsing.folder_of(given))
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
    from lora_lab.store import Store, pack

    for path in pack(Store(browsing.folder_of(given))):
        print(f"{path} ({path.stat().st_size / 1e3:.1f} kB)")
    return OK


def report(given: argparse.Namespace) -> int:
    """Write the report."""
    _report(browsing.folder_of(given))
    return OK


def _report(results: Path) -> None:
    from lora_lab.report import write
    from lora_lab.store import load

    print(f"report: {write(load(results), results / 'report.html').resolve()}")


if __name__ == "__main__":
    sys.exit(main())
