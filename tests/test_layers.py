"""Who may import whom (docs/architecture.md), read from the source of every file."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("specs", "traces", "policies", "profiler", "sim", "runtime", "experiments")

# The rooms that each room may import from, itself included.
ALLOWED_ROOMS = {
    "specs": {"specs"},
    "traces": {"traces", "specs"},
    "policies": {"policies", "traces", "specs"},
    "profiler": {"profiler", "policies", "traces", "specs", "runtime"},
    "sim": {"sim", "policies", "profiler", "traces", "specs"},
    "runtime": {"runtime", "policies", "profiler", "traces", "specs"},
    "experiments": set(ROOMS),
}
# Only profiler/measure may look into the runtime: it times the runtime's own layers.
MEASURE = "measure"
IN_THE_SERVER = "logged_scheduler.py"  # is run by vLLM, in an environment of its own

FORBIDDEN_LIBRARIES = {
    "specs": {"simpy", "torch", "sklearn", "pandas", "numpy"},
    "traces": {"simpy", "torch"},
    "policies": {"simpy", "torch", "sklearn", "pandas"},
    "profiler": {"simpy"},
    "sim": {"torch"},
    "runtime": {"simpy"},
    "experiments": set(),
}


def source_files() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported_modules(tree: ast.AST, package: str) -> set[str]:
    """Dotted names of all modules that are imported anywhere in a file, lazily or for types included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            name = ".".join(part for part in (base if node.level else "", node.module or "") if part)
            found.add(name)
    return found


def imports_of(path: Path) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return imported_modules(ast.parse(path.read_text(encoding="utf-8"), str(path)), package)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_within_the_layers(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for module in imports_of(path):
        top = module.split(".")[0]
        if top in ROOMS:
            assert top in ALLOWED_ROOMS[room], f"{path} imports {module}"
            if room == "profiler" and top == "runtime":
                assert path.stem == MEASURE or MEASURE in path.parts, f"{path} imports {module}"
        assert top not in FORBIDDEN_LIBRARIES[room], f"{path} imports {module}"


def test_traces_take_nothing_but_input_checks_from_specs() -> None:
    for path in (ROOT / "traces").rglob("*.py"):
        taken = {module for module in imports_of(path) if module.split(".")[0] == "specs"}
        assert taken <= {"specs.errors", "specs.input_files"}, f"{path} imports {taken}"


def test_nobody_imports_experiments() -> None:
    for path in source_files():
        if path.relative_to(ROOT).parts[0] != "experiments":
            assert not any(module.split(".")[0] == "experiments" for module in imports_of(path)), path


def test_base_rooms_import_only_what_is_installed_with_them() -> None:
    """Extras (pyarrow, torch, …) may be imported inside functions only, except where torch is the point: in
    the runtime, and in what times it. Nothing else in the profiler imports the latter at the top."""
    base = {
        *sys.stdlib_module_names,
        *ROOMS,
        *(
            "simpy",
            "numpy",
            "pandas",
            "sklearn",
            "scipy",
            "matplotlib",
            "yaml",
            "pydantic",
            "rich",
            "jinja2",
            "joblib",
            "psutil",
            "threadpoolctl",
            "pyarrow",
        ),
    }
    for path in source_files():
        room, *inner = path.relative_to(ROOT).parts
        if path.name == IN_THE_SERVER:
            continue
        needs_torch = room == "runtime" or (room == "profiler" and inner[0] == MEASURE)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        for module in imported_modules(at_top, ".".join(path.relative_to(ROOT).parent.parts)):
            if not needs_torch:
                assert module.split(".")[0] in base, f"{path} needs {module}"
                assert not module.startswith(f"profiler.{MEASURE}"), f"{path} needs torch by {module}"
            else:
                assert module.split(".")[0] in {*base, "torch"}, f"{path} needs {module}"


def test_the_checker_sees_relative_and_lazy_imports() -> None:
    tree = ast.parse("def f():\n    import simpy\n    from ..sim import cluster\n    from . import x\n")
    assert imported_modules(tree, "policies.deep") == {"simpy", "policies.sim", "policies.deep"}
