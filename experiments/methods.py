"""Write the table of methods in docs/reference.md, from the registry, from checks on MiniLM and
from the tests.

python -m experiments.methods
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import peft
import torch
import transformers

from experiments.readme import ROOT, replaced
from lora_lab.adapters import ADAPTERS
from lora_lab.config import Host, RunConfig, run_id
from lora_lab.execution import identity, provenance, record_update
from lora_lab.hydra_bridge import plan
from lora_lab.preparation import Setup, prepare
from lora_lab.store import Store

BLOCK = "methods"
EXTRA = {"peft": ["adapter.config={peft_type:LORA,r:8,use_dora:true}"]}
"""What a method needs beside its defaults."""

LAWS = ("tests/test_adapters.py", "tests/test_peft_bridge.py", "tests/test_interop.py")


def updates() -> dict[str, str]:
    """What each method's file says first: its name and its dW."""
    modules = {name: importlib.import_module(f"lora_lab.adapters.{name}") for name in ADAPTERS}
    return {name: (m.__doc__ or "").strip().splitlines()[0] for name, m in modules.items()}


def built(name: str, cache: Path) -> Setup:
    """The method on MiniLM with its defaults, every trainable number moved."""
    (one,), host = plan([["size=smoke", "train.precision=float32", f"adapter={name}"]],
                        EXTRA.get(name, []))  # fmt: skip
    setup = prepare(one.config, host, cache)
    generator = torch.Generator().manual_seed(1)
    for parameter in setup.model.base.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return setup


def exchanged(setup: Setup, results: Path) -> tuple[str, str]:
    """Whether the run's files are an adapter, and how far PEFT's outputs with it are from ours."""
    config: RunConfig = setup.config
    host = Host()
    run = Store(results, create=True).run(run_id(config))
    with run.lock():
        run.begin(identity(config), provenance(config, host, {}))
        record_update(setup, run, {}, host)
    if not run.has_tensors("adapter_model"):
        return "dense", "–"
    batch = setup.splits["test"].collate(range(16))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    base = transformers.AutoModel.from_pretrained(config.model.source())
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, run.path).eval()(**inputs).last_hidden_state
        ours = setup.model.eval().base(**inputs).last_hidden_state
    real = batch["attention_mask"].bool()
    apart = float((theirs - ours)[real].abs().max() / ours[real].abs().max())
    assert apart < 1e-5, f"PEFT computes something else: {apart:.1g}"
    return "yes", f"yes (to {apart:.0e})"


def laws() -> dict[str, tuple[int, int]]:
    """(passed, run) law tests of each method."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "laws.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junitxml={path}", *LAWS]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    sys.path.insert(0, str(ROOT / "tests"))
    ways = {way: name for way, (name, _) in importlib.import_module("test_adapters").WAYS.items()}
    passed, run = Counter[str](), Counter[str]()
    for case in cases:
        name = _method(case.get("classname", ""), case.get("name", ""), ways)
        run[name] += 1
        passed[name] += case.find("failure") is None and case.find("error") is None
    return {name: (passed[name], run[name]) for name in ADAPTERS}


def _method(module: str, test: str, ways: dict[str, str]) -> str:
    """The method that a test is about; '' for tests of several."""
    if module.endswith("test_peft_bridge"):
        return "peft"
    words = test.partition("[")[2].removesuffix("]")
    return ways.get(words) or next((n for n in ADAPTERS if words.split("-")[0] == n), "")


def table() -> str:
    """The table in Markdown."""
    said = updates()
    lines = [
        "| method | the update | trains (MiniLM) | FLOPs/token | PEFT save | PEFT load | laws |",
        "|---|---|---|---|---|---|---|",
    ]
    exchanges = {}
    for name in ADAPTERS:
        with tempfile.TemporaryDirectory() as folder:
            setup = built(name, Path(folder))
            shapes = setup.config.model.shapes(setup.config.data)
            save, load = exchanged(setup, Path(folder) / "r") if setup.adapted else ("none", "–")
            method = setup.config.adapter
            numbers = f"{method.parameters(shapes):,} | {method.flops(shapes):,}"
            exchanges[name] = f"{numbers} | {save} | {load}"
    for name, (passed, run) in laws().items():
        lines.append(f"| `{name}` | {said[name]} | {exchanges[name]} | {passed} of {run} |")
    return "\n".join(lines)


if __name__ == "__main__":
    path = ROOT / "docs" / "reference.md"
    path.write_text(replaced(path.read_text(), BLOCK, table()))
