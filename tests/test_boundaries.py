"""What importing a module pulls in, and who may import whom."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
SCRIPTS = sorted(path for path in SRC.glob("*.py") if path.stem != "sae_model")
LIBRARY = sorted(path for path in (SRC / "cellcircuits").glob("*.py") if path.stem != "__init__")

HEAVY = ("torch", "transformers", "numpy", "scipy", "pandas", "anndata", "scanpy", "h5py", "pyarrow", "matplotlib")

# modules imported one after the other in one fresh interpreter, with what must still be absent at the end
GROUPS = {
    "standard library only": (
        (
            "errors",
            "files",
            "jsonio",
            "results",
            "manifest",
            "catalog",
            "combinations",
            "pathways",
            "best_annotated",
            "combination_results",
            "panel",
            "steering_results",
            "claims",
            "precision",
            "same_position_record",
            "input_counts",
        ),
        HEAVY,
    ),
    "numpy only": (
        (
            "errors",
            "jsonio",
            "results",
            "manifest",
            "catalog",
            "stats",
            "tokenizer",
            "vocabulary",
            "cells",
            "combination_stats",
            "state_shift",
        ),
        ("torch", "transformers", "anndata", "scanpy", "h5py", "pyarrow", "matplotlib"),
    ),
    "reading cells without torch": (
        ("cells", "cell_rows", "counts", "genes"),  # anndata 0.11, which h5ad needs, imports torch itself
        ("torch", "transformers", "scanpy", "matplotlib"),
    ),
    "torch without transformers": (
        ("sae_model", "interventions", "loading", "sae_store", "sae_training", "device", "stats", "catalog", "finite"),
        ("transformers", "anndata", "scanpy", "h5py", "matplotlib"),
    ),
}


def qualified(name: str) -> str:
    return name if name == "sae_model" else f"cellcircuits.{name}"


@pytest.mark.parametrize("group", GROUPS)
def test_imports_stay_light(group: str) -> None:
    names, absent = GROUPS[group]
    program = (
        "import importlib, json, sys\n"
        f"sys.path.insert(0, {str(SRC)!r})\n"
        "found = {}\n"
        f"for name in {[qualified(name) for name in names]!r}:\n"
        "    importlib.import_module(name)\n"
        f"    for heavy in {absent!r}:\n"
        "        if heavy in sys.modules: found.setdefault(heavy, name)\n"
        "print(json.dumps(found))\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == {}


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file, `from a import b` as both a and a.b."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("path", [*SCRIPTS, *LIBRARY, SRC / "sae_model.py"], ids=lambda path: path.stem)
def test_nothing_imports_a_script(path: Path) -> None:
    assert not imported_modules(path) & {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_leave_transformers_to_the_library(path: Path) -> None:
    assert "transformers" not in imported_modules(path)


def test_no_circle_in_the_library() -> None:
    names = {f"cellcircuits.{path.stem}" for path in LIBRARY}
    below = {f"cellcircuits.{path.stem}": run_time_imports(path) & names for path in LIBRARY}
    while below:
        leaves = {name for name, others in below.items() if not others & below.keys()}
        assert leaves, f"a circle among {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in leaves}


def run_time_imports(path: Path) -> set[str]:
    """`imported_modules` at the top level of the file: not those for type checkers or inside a function."""
    modules = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def test_every_hook_is_set_in_one_file() -> None:
    """Only geneformer.py knows how blocks give their output."""
    users = {path.stem for path in LIBRARY + SCRIPTS if "register_forward" in path.read_text(encoding="utf-8")}
    assert users == {"geneformer"}


def test_strangers_files_are_unpickled_in_one_way() -> None:
    for path in [*LIBRARY, *SCRIPTS, SRC / "sae_model.py"]:
        text = path.read_text(encoding="utf-8")
        assert "weights_only=False" not in text, path
        assert "allow_pickle=True" not in text, path
        assert "pickle.load" not in text, path
