"""The house keeps its floors: who may import whom, and where each outside library lives."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lora_lab.registry import Registry

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_lab"

FLOORS = {
    1: "registry config schema stats layers targets tensorfile embedded orphans gradual linalg"
    " where",
    2: "measures nulls probes inits scalings models data figures trackers store checkpoints batches"
    " injection causal",
    3: "adapters analysis measuring tasks comparison replication policies standing mirroring",
    4: "material preparation training evaluation execution hydra_bridge outside convert"
    " composition",
    5: "engine report dashboard fields",
    6: "cli claims deciding suggesting weights display progress browsing doctor helping syncing",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}

HOMES = {
    "hydra": ("lora_lab/hydra_bridge.py", "experiments/", "hydra_plugins/"),
    "omegaconf": ("lora_lab/hydra_bridge.py", "experiments/", "hydra_plugins/"),
    "wandb": ("lora_lab/trackers/",),
    "PIL": ("lora_lab/trackers/",),
    "seaborn": ("lora_lab/figures/",),
    "matplotlib": ("lora_lab/figures/",),
    "transformers": ("lora_lab/models/", "experiments/"),
    "datasets": ("lora_lab/data/",),
    "accelerate": ("lora_lab/preparation.py",),
    "pebble": ("lora_lab/engine.py",),
    "jinja2": ("lora_lab/report/",),
    "plotly": ("lora_lab/report/",),
    "playwright": ("experiments/pictures.py",),
    "rich": (
        "lora_lab/weights.py",
        "lora_lab/deciding.py",
        "lora_lab/display.py",
        "lora_lab/progress.py",
    ),
    "scipy": (
        "lora_lab/linalg/",
        "lora_lab/measures/",
        "lora_lab/nulls/",
        "lora_lab/stats/",
        "lora_lab/evaluation",
        "experiments/claims/",
    ),
    "powerlaw": ("lora_lab/measures/",),
    # Its file format is known in checkpoints/.
    "peft": ("lora_lab/injection.py", "experiments/"),
    "gguf": ("lora_lab/checkpoints/",),
    "argcomplete": ("lora_lab/cli.py",),
    "docstring_parser": ("lora_lab/fields.py", "experiments/markdown.py"),
    "nbformat": ("experiments/notebooks/",),
    "nbclient": ("experiments/notebooks/",),
    "torch": (
        *("lora_lab/models/", "lora_lab/inits/", "lora_lab/probes/", "lora_lab/adapters/"),
        *("lora_lab/training.py", "lora_lab/preparation.py", "lora_lab/material.py"),
        *("lora_lab/evaluation.py", "lora_lab/execution.py", "lora_lab/causal.py"),
        *("lora_lab/engine.py", "lora_lab/composition/", "lora_lab/injection.py"),
        *("lora_lab/doctor.py", "experiments/"),
    ),
}

SOURCES = sorted(
    path
    for folder in ("lora_lab", "experiments", "hydra_plugins")
    for path in (ROOT / folder).rglob("*.py")
)
OURS = [path for path in SOURCES if path.is_relative_to(PACKAGE)]


class Imports(NamedTuple):
    """Dotted names that a file imports: at its own import, inside functions, for type checkers."""

    early: set[str]
    late: set[str]
    typing: set[str]

    @property
    def real(self) -> set[str]:
        return self.early | self.late


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in OURS}


def named(node: ast.AST) -> Iterator[str]:
    """What one import statement imports: modules of ours, or the module that holds the name."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        assert node.module is not None
        for alias in node.names:
            inside = f"{node.module}.{alias.name}"
            yield inside if inside in MODULES else node.module


def imports(path: Path) -> Imports:
    """Every import statement of a file, wherever it stands."""
    found = Imports(set(), set(), set())

    def visit(node: ast.AST, into: set[str]) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, found.typing)
            for child in node.orelse:
                visit(child, into)
            return
        into.update(named(node))
        inner = found.late if isinstance(node, (ast.FunctionDef, ast.Lambda)) else into
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(path.read_text()), found.early)
    return found


IMPORTS = {path: imports(path) for path in SOURCES}


def floor(module: str) -> int:
    """Floor of a module of ours, by the file or folder directly below the package."""
    return FLOOR[module.split(".")[1]]


def inside(names: set[str]) -> list[str]:
    return sorted(n for n in names if n.startswith("lora_lab.") and n in MODULES)


def test_every_file_of_the_package_has_a_floor() -> None:
    found = {module.split(".")[1] for module in MODULES if "." in module}
    assert found == set(FLOOR)


@pytest.mark.parametrize("module", [m for m in MODULES if "." in m])
def test_a_file_imports_only_its_own_floor_and_lower_ones(module: str) -> None:
    found = IMPORTS[MODULES[module]]
    for kind in (found.real, found.typing):
        higher = [name for name in inside(kind) if floor(name) > floor(module)]
        assert not higher, f"{module} (floor {floor(module)}) imports {higher}"


def test_the_package_itself_imports_nothing_before_it_is_asked() -> None:
    found = IMPORTS[PACKAGE / "__init__.py"]
    assert {name.partition(".")[0] for name in found.real} <= {"__future__", "importlib", "typing"}
    assert inside(found.typing), "type checkers see the public surface"


def test_no_file_of_the_package_imports_the_experiments_or_the_plugins() -> None:
    for path in OURS:
        roots = {name.partition(".")[0] for name in IMPORTS[path].real}
        assert not roots & {"experiments", "hydra_plugins", "tests"}, path


def test_there_are_no_circles() -> None:
    graph = {m: inside(IMPORTS[path].real) for m, path in MODULES.items()}
    for module, others in graph.items():
        # A package may load its own files when asked for one, as a registry does.
        late = {n for n in IMPORTS[MODULES[module]].late if n.startswith(f"{module}.")}
        graph[module] = [n for n in others if n not in late]
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in graph[module]:
                visit(other, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("library", HOMES)
def test_an_outside_library_is_imported_only_in_its_home(library: str) -> None:
    for path, found in IMPORTS.items():
        place = path.relative_to(ROOT).as_posix()
        used = {n for n in found.real | found.typing if n.partition(".")[0] == library}
        at_home = any(place.startswith(home) for home in HOMES[library])
        assert not used or at_home, f"{place} imports {sorted(used)}"


UNUSED = ("gguf",)
"""Libraries whose home stands empty."""


@pytest.mark.parametrize("library", [name for name in HOMES if name not in UNUSED])
def test_a_home_is_no_empty_house(library: str) -> None:
    # A home that nobody lives in would make the test above mean nothing for its library.
    users = {n.partition(".")[0] for found in IMPORTS.values() for n in found.real}
    assert library in users


def loaded(code: str, cwd: Path = ROOT) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after some code."""
    tail = "\nimport sys; print('LOADED', *sorted({m.partition('.')[0] for m in sys.modules}))"
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}{tail}"]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.partition("LOADED ")[2].split())


HEAVY = {"torch", "transformers", "hydra", "omegaconf", "accelerate", "wandb", "peft"}


def test_notebooks_start_without_torch() -> None:
    code = "import lora_lab\nlora_lab.load, lora_lab.measure, lora_lab.Spectrum, lora_lab.analyze"
    assert "pandas" in (found := loaded(code)), "the names are resolved"
    assert not found & HEAVY


def test_commands_that_only_read_start_without_torch(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    code = "from lora_lab.cli import main\n"
    code += "".join(f"assert main([{name!r}]) == 0\n" for name in ("status", "runs", "pack"))
    assert not loaded(code, tmp_path) & (HEAVY | {"matplotlib", "seaborn"})


def test_the_pages_and_the_figures_need_no_torch() -> None:
    names = "lora_lab.report, lora_lab.dashboard, lora_lab.figures, lora_lab.checkpoints"
    assert not loaded(f"import {names}") & HEAVY


REGISTRIES = {
    module: registry
    for module in MODULES
    if module.count(".") == 1
    and "Registry" in MODULES[module].read_text()
    and module != "lora_lab.registry"
    for registry in vars(importlib.import_module(module)).values()
    if isinstance(registry, Registry) and registry.package == module
}


def test_the_registries_are_those_that_the_design_names() -> None:
    names = {module.partition(".")[2] for module in REGISTRIES}
    assert {"measures", "probes", "inits", "models", "data", "figures", "adapters"} <= names


@pytest.mark.parametrize("module", REGISTRIES)
def test_every_file_of_a_registry_registers_under_its_own_name(module: str) -> None:
    registry = REGISTRIES[module]
    files = {path.stem for path in MODULES[module].parent.glob("*.py")} - {"__init__"}
    assert set(registry) == files
    for name in files:
        member = registry[name]
        home = getattr(member, "__module__", None) or type(member).__module__
        assert member is registry[name]
        if inspect.isclass(member) or inspect.isfunction(member):
            assert home == f"{module}.{name}"


def public(tree: ast.AST, module: str) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and the module itself."""
    yield module, tree
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name.startswith("_"):
                continue
            yield f"{module}.{node.name}", node


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    bare = [name for name, node in public(tree, module) if ast.get_docstring(node) is None]  # type: ignore[arg-type]
    assert not bare
